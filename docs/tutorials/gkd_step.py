"""Steps of GKD, written out in PyTorch."""

import torch
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_kd as kd

tokenizer = kd.arithmetic_tokenizer()
divergence = kd.make_divergence("generalized_jsd")
normalization = kd.TokenMean()
END, PAD = tokenizer.eos_token_id, tokenizer.pad_token_id


def make_model(width, spread):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": END, "pad_token_id": PAD}
    config = LlamaConfig(**sizes, **ids, num_attention_heads=2, initializer_range=spread)
    return LlamaForCausalLM(config)


def generate(model, texts, seeds):
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    prompts = kd.Prompts(encoded["input_ids"], encoded["attention_mask"], frozenset({END}), PAD)
    options = kd.SamplingOptions(max_new_tokens=8, temperature=1.0)
    sampler = kd.CachedSampler()
    return prompts, sampler.generate(prompts, options, seeds=seeds, models=[(model, 1.0)])


def summed_loss(student, teacher, prompts, completions):
    mask = torch.cat([prompts.mask, completions.mask.long()], 1)
    read = {
        "input_ids": torch.cat([prompts.ids, completions.ids], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad():
        p = teacher(**read).logits.log_softmax(-1)
    q = student(**read).logits.log_softmax(-1)
    # The logits at a token are about the next one.
    scored = pad(completions.mask, (prompts.ids.shape[1] - 1, 1))
    of_rows = (divergence(q, p) * scored).sum(1)
    lengths = scored.sum(1)
    return (normalization.row_weights(lengths) * of_rows).sum(), normalization.count(lengths)


torch.manual_seed(0)
student, teacher = make_model(width=64, spread=0.02), make_model(width=64, spread=0.1)
optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
problems = [f"{a}+{b}=" for a in (3, 12, 120) for b in (4, 33, 81, 19)]
for step in range(21):
    total, count = 0.0, 0.0
    for begin in (0, 8):  # micro-batches of 8 rows and of 4
        texts = problems[begin : begin + 8]
        seeds = [100 * step + begin + row for row in range(len(texts))]
        loss, tokens = summed_loss(student, teacher, *generate(student, texts, seeds))
        loss.backward()
        total, count = total + loss.item(), count + tokens.item()
    for weight in student.parameters():
        weight.grad /= count
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2}: loss {total / count:.3f} over {count:.0f} tokens")
