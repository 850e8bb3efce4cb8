"""Read the diagnostics of a loss and of rollouts, on runs that are broken on purpose."""

import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd import (
    GKD,
    SFT,
    ArithmeticData,
    PromptCompletionData,
    SamplingOptions,
    arithmetic_tokenizer,
)
from lightning_kd.callbacks import HealthOptions, LossNormalizationDiagnostics, OnPolicyGeneration

END, PLUS = arithmetic_tokenizer().convert_tokens_to_ids(["<eos>", "+"])
rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "9+8=", "completion": "71" * 6}]
rows += [{"prompt": "3+4=", "completion": "7"}, {"prompt": "2+2=", "completion": "4"}]


def make_model(width):
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    ids = {"vocab_size": 14, "eos_token_id": END, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2))


class Kept(Callback):
    """Keeps what is logged, step by step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def fit(module, data, steps, *callbacks, **options):
    kept = Kept()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, kept],
        **options,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
    return kept.steps, [str(warning.message) for warning in said]


# A loss of one's own that divides each micro-batch by its own tokens.


class MeanOfMeans(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model(32)

    def training_step(self, batch, batch_idx):
        names = ("input_ids", "attention_mask", "labels")
        return self.model(**{name: batch[name] for name in names}).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def few_rows():
    return PromptCompletionData(train=rows, tokenizer=arithmetic_tokenizer(), batch_size=2)


audit = LossNormalizationDiagnostics(audit="first")
steps, said = fit(MeanOfMeans(), few_rows(), 1, audit, accumulate_grad_batches=2)
print(*[text.partition(" (relative")[0] for text in said if "gradient of step" in text])
print(f"norm/audit/as_trained: {steps[-1]['norm/audit/as_trained']:.2f}")

# The same rows, through a method of the library.

module = SFT(student=make_model(32), normalization="token")
audit = LossNormalizationDiagnostics(audit="first")
steps, said = fit(module, few_rows(), 1, audit, accumulate_grad_batches=2)
print("warnings of the audit:", [text for text in said if "gradient of step" in text])
for name in ("count", "count_min", "count_max", "mean_of_means_error", "sequence_over_token"):
    print(f"norm/{name}: {steps[-1][f'norm/{name}']:.3f}")

# Rollouts: a teacher that ends as the student does, and one that ends with another token.


def adamw(lr):
    return lambda weights: torch.optim.AdamW(weights, lr=lr)


def sums():
    return ArithmeticData(digits=1, test_size=10, validation_size=10, batch_size=16)


teacher, start = make_model(64), make_model(32)
fit(SFT(student=teacher, optimizer=adamw(lr=5e-3)), sums(), 100)
fit(SFT(student=start, optimizer=adamw(lr=5e-3)), sums(), 30)
other_end = LlamaForCausalLM(teacher.config)
other_end.load_state_dict(teacher.state_dict())
with torch.no_grad():
    other_end.lm_head.weight[[END, PLUS]] = teacher.lm_head.weight[[PLUS, END]]

for name, model in (("healthy", teacher), ("another EOS", other_end)):
    student = LlamaForCausalLM(start.config)
    student.load_state_dict(start.state_dict())
    rollouts = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=8), health=HealthOptions(overlap_k=2)
    )
    module = GKD(student=student, teacher=model, optimizer=adamw(lr=2e-3))
    steps, said = fit(module, sums(), 24, rollouts)
    print(name, *(f"step {n:2}" for n in (1, 8, 16, 24)), sep="\t")
    for shown in ("train/loss", "rollout/eos_rate", "rollout/length_mean", "train/top_k_overlap"):
        print(shown, *(f"{steps[n - 1][shown]:.2f}" for n in (1, 8, 16, 24)), sep="\t")
    for text in said:
        if text.startswith("completions run away"):
            print(text)
