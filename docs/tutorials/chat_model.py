"""Distil one chat model into another, both by name."""

import json
from pathlib import Path

import lightning as L
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_kd import GKD, SFT, ChatData, SamplingOptions, check
from lightning_kd.callbacks import CompletionSamples, HFExport, OnPolicyGeneration
from lightning_kd.data.tokenizer_training import train_tokenizer

# With models of the hub, this part is two names: TEACHER, STUDENT = "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B".
TEACHER, STUDENT = "models/teacher", "models/student"
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}
CAPITALS |= {"Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Ghana": "Accra"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(question, answer):
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return {"messages": list(turns)}


chats = [chat(f"The capital of {c}?", f"It is {capital}.") for c, capital in CAPITALS.items()]
Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)))

texts = [turn["content"] for row in chats for turn in row["messages"]]
tokenizer = train_tokenizer(texts, vocab_size=320)
tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
tokenizer.chat_template = TEMPLATE
for name, width in ((TEACHER, 96), (STUDENT, 48)):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(name)
    tokenizer.save_pretrained(name)


def data(name):
    file = "chats.jsonl"
    return ChatData(train=file, validation=file, tokenizer=name, max_length=64, batch_size=8)


def adamw(weights):
    return torch.optim.AdamW(weights, lr=5e-3)


def fit(module, steps, name, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    exact = CompletionSamples(max_new_tokens=12)
    trainer = L.Trainer(
        max_steps=steps,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        callbacks=[exact, *callbacks, HFExport(name, overwrite=True)],
        **quiet,
    )
    trainer.fit(module, datamodule=data(TEACHER))
    return trainer.callback_metrics


logged = fit(SFT(student=TEACHER, optimizer=adamw), 40, "models/trained_teacher")
print(f"teacher: exact match {logged['val/exact_match']:.0%}")

module = GKD(student=STUDENT, teacher="models/trained_teacher", optimizer=adamw)
report = check(module, data(STUDENT))
print("check:", [finding.name for finding in report.findings])

on_policy = OnPolicyGeneration(lmbda=0.5, generation=SamplingOptions(max_new_tokens=12))
logged = fit(module, 80, "models/distilled", on_policy)
print(f"student: exact match {logged['val/exact_match']:.0%}")

model = AutoModelForCausalLM.from_pretrained("models/distilled")
tokenizer = AutoTokenizer.from_pretrained("models/distilled")
question = [{"role": "user", "content": "The capital of Peru?"}]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
print("student:", tokenizer.decode(answer, skip_special_tokens=True))
