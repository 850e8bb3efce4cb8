"""The same samples in many cuts, in float64; run as a script, on two processes through real ddp.

A script of its own, because that is how a user starts ddp: ``python partition_grid.py OUT``.
"""

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_kd.batch import Batch
from lightning_kd.callbacks import OnPolicyGeneration, ReplayBuffer
from lightning_kd.generation import SamplingOptions, SpeculativeSampler
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.modules import (
    GKD,
    SFT,
    TAID,
    ULD,
    BabyLlama,
    ChunkLikelihoodKD,
    DistillationModule,
    MiniLLM,
    OfficialCode,
    OnPolicyDistillation,
    RLDistillation,
    SequenceKD,
    SupervisedKD,
)
from lightning_kd.modules.loss_sums import LossSums
from lightning_kd.normalization import ConstantLength
from lightning_kd.schedules import AdaptiveShare
from lightning_kd.teachers import (
    EMAStudent,
    FrozenStudent,
    LiveStudent,
    LocalTeacher,
    RetokenizingTeacher,
    TeacherEnsemble,
)
from tests.support.harness import BatchList, Letters, trainer
from tests.support.tokenizers import byte_level
from tests.support.toys import LETTERS, fused_letter_tokenizer, ragged_batch, tiny_llama

# Eight rows for the first optimizer step, four for the second: where there are several
# micro-batches, the second window is a short one. One row has nothing scored.
LENGTHS = [(2, 5), (1, 3), (3, 7), (2, 1), (1, 9), (2, 2), (3, 0), (1, 4)]
LENGTHS += [(1, 6), (4, 1), (2, 8), (1, 2)]
ROWS = ragged_batch(LENGTHS)
CUTS = [(1, 1, 8), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 2, 2), (2, 4, 1)]
POLICY_GRADIENTS = ["on_policy_distillation", "minillm", "minillm_code", "rl_distillation"]
SELF_TAUGHT = ["sdft", "opsd", "frozen", "sdft_lora"]
ON_POLICY = ["gkd", *POLICY_GRADIENTS, *SELF_TAUGHT]
OTHER_TOKENS = ["chunk_likelihood_kd", "uld"]
OTHER_TOKENS_ON_POLICY = ["chunk_gkd", "chunk_opd"]
METHODS = ["sft", "sequence_kd", "supervised_kd", "baby_llama", "baby_llama_batchmean"]
NORMALIZATIONS = ["token", "sequence", "batch", "constant"]
CLIPS = [None, 0.01]
STEPS = {"adaptive": 3}
"""Optimizer steps of a method, 2 of others; after each of these ``adaptive`` validates."""
CASES = list(itertools.product(METHODS, NORMALIZATIONS, CLIPS))
# The official scale of tokens and rows needs a step in one micro-batch.
CASES = [case for case in CASES if case[:2] != ("baby_llama_batchmean", "token")]
CASES += list(itertools.product(ON_POLICY, NORMALIZATIONS, [None]))
CASES = [case for case in CASES if case[0] not in SELF_TAUGHT[1:] or case[1] == "token"]
VARIANTS = ["taid", "uncertain", "lk"]
ON_POLICY_VARIANTS = ["exopd", "uncertain_gkd", "speculative", "replay", "adaptive"]
CASES += list(itertools.product([*VARIANTS, *ON_POLICY_VARIANTS], ["token", "sequence"], [None]))
# What these add has nothing to do with the normalization.
CASES = [case for case in CASES if case[0] not in {"lk", "adaptive"} or case[1] == "token"]
GENERATING = [*ON_POLICY, *ON_POLICY_VARIANTS, *OTHER_TOKENS_ON_POLICY]
CASES += list(itertools.product(OTHER_TOKENS, ["token", "sequence"], [None]))
CASES += list(itertools.product(OTHER_TOKENS_ON_POLICY, ["token", "batch"], [None]))


def without_float32_islands() -> None:
    """Let the norms of a Llama compute in the type of their input: stock ones round to float32."""

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    LlamaRMSNorm.forward = forward


def rows(picked: list[int]) -> Batch:
    """A micro-batch of these rows, padded to its own longest."""
    longest = int(ROWS["attention_mask"][picked].sum(-1).max())
    batch: Any = {k: v[picked] for k, v in ROWS.items()}
    return {k: v if k == "row" else v[:, :longest].clone() for k, v in batch.items()}


def micro_batches(world: int, window: int, size: int, rank: int) -> list[Batch]:
    """What a rank sees: two optimizer steps, eight rows and four."""
    first = [list(range(start, start + size)) for start in range(0, 8, size)]
    second_size = size if window > 1 else size // 2
    second = [list(range(s, s + second_size)) for s in range(8, 12, second_size)]
    return [rows(picked) for picked in [*first[rank::world], *second[rank::world]]]


def build(
    method: str,
    normalization: str,
    placement: str = "replicated",
    *,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
) -> DistillationModule:
    """A method on fresh models."""

    def llama(seed: int, **settings: Any) -> Any:
        return tiny_llama(seed, tie_word_embeddings=tied, **settings).to(dtype)

    # A policy gradient has no dropout in its steps: no cut and no process draws any.
    dropout = 0.3 if method in [*POLICY_GRADIENTS, "exopd", "chunk_opd"] else 0.0
    common: dict[str, Any] = {
        "student": StudentSpec.of(llama(0, attention_dropout=dropout)),
        "normalization": ConstantLength(16) if normalization == "constant" else normalization,
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    }
    two = TeacherEnsemble([LocalTeacher.of(llama(seed), placement=placement) for seed in (1, 2)])
    one = LocalTeacher.of(llama(1), placement=placement)
    if method in {*OTHER_TOKENS, *OTHER_TOKENS_ON_POLICY}:
        return of_other_tokens(method, llama, placement, common)
    if method == "sft":
        return SFT(**common)
    if method == "sequence_kd":
        return SequenceKD(teacher=one, **common)
    if method == "supervised_kd":
        return SupervisedKD(
            teacher=one, divergence="generalized_jsd", temperature=2.0, alpha=0.3, **common
        )
    if method == "sdft":
        return GKD(teacher=EMAStudent(0.6), divergence="forward_kl", **common)
    if method == "opsd":
        return GKD(teacher=LiveStudent(), **common)
    if method == "frozen":
        return GKD(teacher=FrozenStudent(), **common)
    if method == "sdft_lora":
        return GKD(teacher=EMAStudent(0.6), **common | {"student": with_adapters()})
    if method == "taid":
        moving = TAID(0.2, 0.9, steps=3, rate=0.5)
        return SupervisedKD(teacher=one, interpolation=moving, alpha=0.3, **common)
    if method == "uncertain":
        return SupervisedKD(teacher=one, position_share=0.4, **common)
    if method == "lk":
        return SupervisedKD(teacher=one, divergence="negative_log_acceptance", alpha=0.3, **common)
    if method == "uncertain_gkd":
        return GKD(teacher=one, position_share=0.4, **common)
    if method in {"gkd", "speculative", "replay", "adaptive"}:
        return GKD(teacher=one, teacher_temperature=0.7, **common)
    if method == "on_policy_distillation":
        return OnPolicyDistillation(teacher=one, gamma=0.9, **common)
    if method == "exopd":
        reference = LocalTeacher.of(llama(3), placement=placement)
        return OnPolicyDistillation(
            teacher=one, reference=reference, extrapolation=1.5, gamma=0.9, **common
        )
    if method == "minillm":
        return MiniLLM(teacher=one, **common)
    if method == "minillm_code":
        return MiniLLM(teacher=one, objective=OfficialCode(), **common)
    if method == "rl_distillation":
        return RLDistillation(teacher=one, rewards=[longer_is_better], **common)
    scale = "batchmean" if method.endswith("batchmean") else "token"
    return BabyLlama(teacher=two, kl_scale=scale, **common)


def with_adapters() -> StudentSpec:
    """A student with LoRA from a configuration: one that was handed over may not be in shards."""
    config = tiny_llama(0).config.to_diff_dict() | {"initializer_range": 0.16}
    return StudentSpec(config=config, lora=LoRA(r=2, target_modules=["q_proj", "down_proj"]))


def of_other_tokens(method: str, llama: Any, placement: str, common: Any) -> DistillationModule:
    """A method whose teacher reads the letters in tokens of several."""
    tokenizer = byte_level(290, texts=[LETTERS, LETTERS[::2], LETTERS[::3], LETTERS[::-1]] * 3)
    wide = llama(1, vocab_size=len(tokenizer))
    teacher = RetokenizingTeacher(LocalTeacher.of(wide, placement=placement), tokenizer=tokenizer)
    common |= {"teacher": teacher, "tokenizer": fused_letter_tokenizer()}
    if method == "uld":
        return ULD(**common)
    if method == "chunk_opd":
        return OnPolicyDistillation(gamma=0.9, **common)
    return ChunkLikelihoodKD(alpha=0.3, divergence="generalized_jsd", **common)


def longer_is_better(*, completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [float(len(text)) for text in completions]


def writing(method: str, **more: Any) -> OnPolicyGeneration:
    """Rollouts of ragged lengths; MiniLLM's come twice, from a mixture."""
    options: dict[str, Any] = {"truncated": "mask", "table_every": 0} | more
    if method.startswith("minillm"):
        options |= {"passes": 2, "mixture_alpha": 0.2, "truncated": "keep"}
    if method == "speculative":
        options |= {"engine": SpeculativeSampler(8), "truncated": "keep"}
    if method == "replay":  # the second step is all of the first one's rows
        options |= {"replay": ReplayBuffer(8, fresh=0.0), "truncated": "keep"}
    if method == "adaptive":  # the entropy rises, so that the third step is the student's
        share = AdaptiveShare(0.0, 1.0, 0.0, "val/student_entropy")
        options |= {"lmbda": share, "truncated": "keep"}
    if method in OTHER_TOKENS_ON_POLICY:
        options |= {"truncated": "keep"}
    if method == "rl_distillation":
        options |= {"group_size": 4, "truncated": "drop"}
    return OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=7), **options)


class Steps(Callback):
    """The gradient of every step, as the optimizer gets it, and whether it was of rollouts."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.generated: list[bool] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.before:
            gradients = [p.grad for p in pl_module.parameters()]
            self.gradients.append(flat([each for each in gradients if each is not None]))
            self.generated.append("completion_mask" in batch)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All of them in a row, and whole."""
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in whole]).clone()


def run(
    case: tuple[str, str, float | None],
    cut: tuple[int, int, int],
    rank: int = 0,
    *,
    strategy: str = "ddp",
    placement: str = "replicated",
    **rollouts: Any,
) -> Any:
    """Losses (float64, before any logger) and gradients of the two steps, and the last weights."""
    method, normalization, clip = case
    world, _, _ = cut
    steps = Steps()
    module = build(method, normalization, placement)
    _, losses = fitted(
        module,
        method,
        cut,
        rank,
        strategy=strategy if world > 1 else "auto",
        precision="64-true",
        gradient_clip_val=clip,
        callbacks=[writing(method, **rollouts), steps] if method in GENERATING else [steps],
    )
    weights = flat(list(module.parameters()))
    done = {"gradients": steps.gradients, "generated": steps.generated}
    return {"losses": losses, "weights": weights, **done}


def fitted(
    module: DistillationModule,
    method: str,
    cut: tuple[int, int, int],
    rank: int,
    **settings: Any,
) -> tuple[L.Trainer, list[float]]:
    """The trainer after two optimizer steps, and their losses."""
    world, window, size = cut
    losses: list[float] = []
    reduce = LossSums.reduce

    def recording(self: LossSums, all_reduce: Any) -> Any:
        reduced = reduce(self, all_reduce)
        losses.append(reduced.read().means["loss"])
        return reduced

    LossSums.reduce = recording
    try:
        count = STEPS.get(method, 2)
        steps = {"max_steps": count, "max_epochs": -1} if method in GENERATING else {}
        if method == "adaptive":
            often = {"val_check_interval": window, "check_val_every_n_epoch": None}
            steps |= {"limit_val_batches": 1.0} | often
        defaults = {"devices": world, "accumulate_grad_batches": window, "log_every_n_steps": 100}
        fit = trainer(**(defaults | steps | settings))
        data: Any = Letters(batch_size=size, told=method in SELF_TAUGHT)
        if method not in GENERATING:
            data = BatchList(micro_batches(world, window, size, rank))
        fit.fit(module, datamodule=data)
    finally:
        LossSums.reduce = reduce
    return fit, losses


def empty_windows(rank: int) -> list[tuple[list[float], bool]]:
    """Steps in which one rank, then every rank, has nothing to score."""
    full, nothing = rows([0, 1]), ragged_batch([(3, 0), (2, 0)])
    results = []
    for batch in (full if rank == 0 else nothing, nothing):
        module = build("supervised_kd", "token")
        steps = Steps()
        fit = trainer(devices=2, strategy="ddp", precision="64-true", callbacks=[steps])
        fit.fit(module, datamodule=BatchList([batch]))
        (gradient,) = steps.gradients
        finite = bool(gradient.isfinite().all())
        results.append(
            ([fit.callback_metrics["train/loss"].item(), gradient.norm().item()], finite)
        )
    return results


def main() -> None:
    """All two-process cuts of all cases; the first rank writes them down."""
    import os

    warnings.simplefilter("ignore")
    without_float32_islands()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    results = {(case, cut): run(case, cut, rank) for cut in CUTS if cut[0] == 2 for case in CASES}
    empty = empty_windows(rank)
    if rank == 0:
        torch.save({"grid": results, "empty": empty}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
