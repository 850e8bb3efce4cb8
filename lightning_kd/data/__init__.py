"""From rows to padded micro-batches, and back to the same row after a resume."""

from lightning_kd.data.arithmetic import ArithmeticData, arithmetic_tokenizer
from lightning_kd.data.chat import ChatData
from lightning_kd.data.collate import Collator
from lightning_kd.data.datamodule import DistillationData
from lightning_kd.data.encoding import Example
from lightning_kd.data.evaluation_loader import EvaluationLoader
from lightning_kd.data.limits import LengthLimit
from lightning_kd.data.loader import TrainingLoader
from lightning_kd.data.own_loader import WindowedLoader
from lightning_kd.data.paired import PairedLoader, PromptsAndText
from lightning_kd.data.plain_text import DocumentData, PackedTextData
from lightning_kd.data.plan import Epochs, RolloutPlan
from lightning_kd.data.rows import EncodedRows, PackedRows
from lightning_kd.data.sources import load_rows
from lightning_kd.data.text import PromptCompletionData
from lightning_kd.data.tokenizer_training import read_texts, train_tokenizer, write_tokenizer
from lightning_kd.data.window import Window
from lightning_kd.data.workers import Rows

__all__ = [
    "ArithmeticData",
    "ChatData",
    "Collator",
    "DistillationData",
    "DocumentData",
    "EncodedRows",
    "Epochs",
    "EvaluationLoader",
    "Example",
    "LengthLimit",
    "PackedRows",
    "PackedTextData",
    "PairedLoader",
    "PromptCompletionData",
    "PromptsAndText",
    "RolloutPlan",
    "Rows",
    "TrainingLoader",
    "Window",
    "WindowedLoader",
    "arithmetic_tokenizer",
    "load_rows",
    "read_texts",
    "train_tokenizer",
    "write_tokenizer",
]
