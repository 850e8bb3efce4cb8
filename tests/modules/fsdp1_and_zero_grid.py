"""Every method under FSDP1 or a stage of ZeRO, on two processes, in float32; run as a user would start
it: ``python fsdp1_and_zero_grid.py OUT STRATEGY``.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_kd.modules import WarmupCosine
from lightning_kd.strategies import adapter_of
from tests.modules.partition_grid import (
    GENERATING,
    METHODS,
    ON_POLICY,
    ON_POLICY_VARIANTS,
    OTHER_TOKENS,
    OTHER_TOKENS_ON_POLICY,
    SELF_TAUGHT,
    VARIANTS,
    build,
    fitted,
    writing,
)
from tests.support.cpu_strategies import STRATEGIES

CASES = [(method, clip, tied) for method in METHODS for clip, tied in [(None, True), (0.01, False)]]
CASES += [(method, None, False) for method in ON_POLICY if method not in SELF_TAUGHT]
ADDED = [
    (method, None, False)
    for method in [*VARIANTS, *ON_POLICY_VARIANTS, *OTHER_TOKENS, *OTHER_TOKENS_ON_POLICY]
]
"""Options of the methods above, and teachers with other tokens; under FSDP1, in its last cut."""
FEW = [case for case in CASES if case[0] in {"supervised_kd", "gkd", "minillm"}]
OF_STRATEGY = {"zero_1": FEW, "zero_3_offload": FEW}
"""Stage 1 is stage 2 with gradients that are whole, and offloading is stage 3 with weights elsewhere:
what differs are weights and gradients, of which no method knows."""
CUTS = {"fsdp": [(2, 1, 4), (2, 2, 2)]}
"""DeepSpeed takes one micro-batch per step."""


def adamw(groups: Any) -> torch.optim.Optimizer:
    """So much decay that a weight in the wrong group would show."""
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=1.0, eps=1e-3)


def run(
    case: tuple[str, float | None, bool],
    cut: tuple[int, int, int],
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> dict[str, Any]:
    """Losses of the two steps, the last norm and learning rate, and the weights before and after."""
    method, clip, tied = case
    by_row = method in {"gkd", "baby_llama_batchmean"}
    module = build(method, "sequence" if by_row else "token", dtype=dtype, tied=tied)
    module._optimizer = adamw
    module._lr_scheduler = lambda optimizer: WarmupCosine(optimizer, warmup_steps=4, total_steps=8)
    before = {n: t.clone() for n, t in module.student_spec._given.state_dict().items()}
    fit, losses = fitted(
        module,
        method,
        cut,
        rank,
        gradient_clip_val=clip,
        log_every_n_steps=1,
        callbacks=[writing(method)] if method in GENERATING else [],
        **settings,
    )
    logged = {name: fit.callback_metrics[f"train/{name}"].item() for name in ("grad_norm", "lr")}
    return {
        "losses": losses,
        "logged": logged,
        "before": before,
        "after": adapter_of(fit).full_state_dict(module.student),
        "buffers": sorted({str(buffer.dtype) for buffer in module.student.buffers()}),
    }


def main() -> None:
    """All runs; the first rank writes them down."""
    warnings.simplefilter("ignore")
    rank, name = int(os.environ.get("LOCAL_RANK", "0")), sys.argv[2]
    results = {}
    for cut in CUTS.get(name, [(2, 1, 4)]):
        for case in [*OF_STRATEGY.get(name, CASES), *(ADDED if cut == (2, 2, 2) else [])]:
            strategy = STRATEGIES[name]()
            results[case, cut] = run(case, cut, rank, strategy=strategy, precision="32-true")
    strategy = STRATEGIES[name]()
    results["bf16"] = run(
        OF_STRATEGY.get(name, CASES)[0], (2, 1, 4), rank, strategy=strategy, precision="bf16-mixed"
    )
    if rank == 0:
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
