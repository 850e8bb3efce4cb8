"""A checkpoint that is evaluated or exported, and not trained on from."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_kd.checkpoints import RUN_KEY
from lightning_kd.loops import for_evaluation
from lightning_kd.resuming import tokenizer_digest


def prepare_evaluation(
    trainer: L.Trainer, checkpoint: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Leave out what only training goes on from, and warn of another tokenizer than the run had.

    Args:
        trainer: Evaluates, predicts or exports.
        checkpoint: Its contents.
        tokenizer: The one that is there now.
    """
    for_evaluation(trainer, checkpoint.get("callbacks", {}))
    saved = checkpoint[RUN_KEY].get("settings", {}).get("model", {}).get("tokenizer")
    if saved is not None:
        run = "that of the run which saved the checkpoint"
        warn_of_another_tokenizer(tokenizer, saved, run)


def warn_of_another_tokenizer(
    tokenizer: PreTrainedTokenizerBase, students: str, students_is: str
) -> None:
    """Warn of a tokenizer that is not the student's.

    Args:
        tokenizer: The one that is there now.
        students: Digest of the student's own.
        students_is: Which one that is.
    """
    if tokenizer_digest(tokenizer) != students:
        rank_zero_warn(
            f"{tokenizer.name_or_path or 'the tokenizer'} is another tokenizer than {students_is} "
            "(tokens, rules or chat template differ), so what the student says may mean something "
            "else. Give data.tokenizer as the student had it"
        )
