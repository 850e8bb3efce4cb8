"""One text in the tokens of two tokenizers, aligned by bytes."""

from lightning_kd.alignment.chunks import Chunks, align
from lightning_kd.alignment.counterparts import counterparts
from lightning_kd.alignment.encoder import ByteEncoder, Token
from lightning_kd.alignment.rows import AlignedRow, Retokenizer

__all__ = [
    "AlignedRow",
    "ByteEncoder",
    "Chunks",
    "Retokenizer",
    "Token",
    "align",
    "counterparts",
]
