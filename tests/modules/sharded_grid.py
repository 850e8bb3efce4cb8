"""Every method in shards over two processes, in float64; run as a user would start it:
``python sharded_grid.py OUT``.
"""

import os
import sys
import warnings
from pathlib import Path

import torch

from lightning_kd.generation import ContinuousBatchingSampler
from tests.modules.partition_grid import (
    METHODS,
    ON_POLICY,
    ON_POLICY_VARIANTS,
    OTHER_TOKENS,
    OTHER_TOKENS_ON_POLICY,
    VARIANTS,
    run,
    without_float32_islands,
)

CASES = [
    (method, "sequence" if method == "baby_llama_batchmean" else "token", clip)
    for method in METHODS
    for clip in (None, 0.01)
]
CASES += [(method, "sequence", None) for method in ON_POLICY]
ADDED = [
    (method, "token", None)
    for method in [*VARIANTS, *ON_POLICY_VARIANTS, *OTHER_TOKENS, *OTHER_TOKENS_ON_POLICY]
]
"""Options of the methods above, and teachers with other tokens."""
RUNS = [((2, 1, 4), "replicated", CASES), ((2, 2, 2), "sharded", [*CASES, *ADDED])]
"""How the batch is cut, where the teacher is kept, and of which methods."""
UNSHARDED = [(method, "sequence", None) for method in ("gkd", "minillm")]


def main() -> None:
    """All runs; the first rank writes them down."""
    warnings.simplefilter("ignore")
    without_float32_islands()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    results = {}
    for cut, placement, cases in RUNS:
        for case in cases:
            results[case, cut, placement] = run(
                case, cut, rank, strategy="fsdp2", placement=placement
            )
    for case in UNSHARDED:
        results[case, (2, 1, 4), "unsharded"] = run(
            case, (2, 1, 4), rank, strategy="fsdp2", placement="sharded", unshard=True
        )
        # Each rank runs its models as often as its own rows need.
        slots = ContinuousBatchingSampler(2)
        results[case, (2, 1, 4), "slots"] = run(
            case, (2, 1, 4), rank, strategy="fsdp2", placement="sharded", unshard=True, engine=slots
        )
    if rank == 0:
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
