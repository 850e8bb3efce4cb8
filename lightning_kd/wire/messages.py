"""Messages of this library's own server: tensors as safetensors, and what they are about."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.scoring import ScoredPositions

PROTOCOL = 1
"""Version of the messages; server and client must have the same."""

CONTENT_TYPE = "application/vnd.safetensors"

Payload = Literal["hidden", "top_k", "token_log_probs"]
"""What an answer holds: hidden states, the k most likely tokens, or one log-probability."""

_ABOUT = "about"


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return tensors and plain data as one message.

    Example:
        >>> tensors, about = unpack(pack({"x": torch.ones(2)}, {"kind": "hidden"}))
        >>> tensors["x"], about
        (tensor([1., 1.]), {'kind': 'hidden'})
    """
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        # safetensors takes no memory twice, as two names of one tensor or parts of one have it.
        place = here.untyped_storage().data_ptr()
        held[name] = here.clone() if place in seen else here
        seen.add(place)
    return save(held, {_ABOUT: json.dumps(about)})


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the plain data of a message; nothing is unpickled.

    Raises:
        ValueError: If it is none.
    """
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        about = json.loads(header["__metadata__"][_ABOUT])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not safetensors with the key {_ABOUT!r} ({error})") from error
    if not isinstance(about, dict):
        raise ValueError(f"the key {_ABOUT!r} holds no mapping")
    return tensors, about


@dataclass(frozen=True)
class Question:
    """A padded micro-batch, and what is asked about it.

    Attributes:
        input_ids: Padded on the right, ``(B, T)``.
        attention_mask: 1 on real tokens, ``(B, T)``.
        mask: True at the positions that are asked about, ``(B, T)``.
        targets: The token that follows each of these, ``(N,)``; ``IGNORE_INDEX`` where none is known.
        payload: What the answer holds.
        k: Tokens at each position of ``top_k``.
        temperatures: Temperatures at which the tail's mass is wanted with ``top_k``.
        alone: Whether it is computed by itself, as in the process that asks, so that its bits do not
            depend on what others ask.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    targets: Tensor
    payload: Payload
    k: int = 1
    temperatures: tuple[float, ...] = (1.0,)
    alone: bool = True

    @property
    def positions(self) -> ScoredPositions:
        """The positions that are asked about."""
        return ScoredPositions(self.mask, self.targets)

    def spots(self) -> Tensor:
        """Return numbers of positions at which an answer is checked: of each row the ends, and two."""
        numbers = self.positions.scattered(torch.arange(len(self.targets)))
        chosen: set[int] = set()
        for row, (held, mask) in enumerate(zip(numbers, self.mask, strict=True)):
            own = held[mask].tolist()
            drawn = hashlib.blake2b(f"{self.digest()} {row}".encode(), digest_size=8).digest()
            inner = [
                own[int.from_bytes(drawn[n : n + 4], "little") % len(own)] for n in (0, 4) if own
            ]
            chosen |= {*own[:1], *own[-1:], *inner}
        return torch.tensor(sorted(chosen), dtype=torch.long)

    def message(self) -> bytes:
        """Return it as a message."""
        tensors = {
            "input_ids": self.input_ids.long(),
            "attention_mask": self.attention_mask.long(),
            "mask": self.mask.bool(),
            "targets": self.targets.long(),
        }
        return pack(tensors, self._about())

    def digest(self) -> str:
        """Return a digest, which an answer repeats."""
        hashed = hashlib.blake2b(json.dumps(self._about()).encode(), digest_size=16)
        for tensor in (self.input_ids, self.attention_mask, self.mask, self.targets):
            values = tensor.detach().cpu().long().contiguous()
            hashed.update(str(tuple(values.shape)).encode())
            hashed.update(values.numpy().tobytes())
        return hashed.hexdigest()

    def _about(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "payload": self.payload,
            "k": self.k,
            "temperatures": list(self.temperatures),
            "alone": self.alone,
        }

    @classmethod
    def read(cls, body: bytes) -> "Question":
        """Read a message.

        Raises:
            ValueError: If it is no question, or does not fit together.
        """
        tensors, about = unpack(body)
        if about.get("protocol") != PROTOCOL:
            raise ValueError(
                f"the message is of protocol {about.get('protocol')!r}, this side speaks {PROTOCOL}: "
                "install one version of lightning-kd on both"
            )
        names = ("input_ids", "attention_mask", "mask", "targets")
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"the question lacks {', '.join(missing)}")
        ids, attention, mask, targets = (tensors[name] for name in names)
        if ids.ndim != 2 or 0 in ids.shape or not ids.shape == attention.shape == mask.shape:
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
            raise ValueError(
                f"the question has {shapes}; the first three must be one (rows, tokens)"
            )
        mask = mask.bool()
        if targets.shape != (int(mask.sum()),):
            raise ValueError(
                f"the question has {tuple(targets.shape)} targets for {int(mask.sum())} positions"
            )
        types = [tensor.dtype for tensor in (ids, attention, targets)]
        if any(dtype.is_floating_point or dtype.is_complex for dtype in types):
            raise ValueError("the ids, masks and targets of a question must be integers")
        if ((attention != 0) & (attention != 1)).any() or (mask & (attention == 0)).any():
            raise ValueError("attention_mask must be 0 or 1, and 1 at each position asked about")
        return cls(ids.long(), attention.long(), mask, targets.long(), **_options(about))


def row_tags(
    prompt_ids: Tensor, prompt_mask: Tensor, seeds: Sequence[int], about: Mapping[str, Any]
) -> Tensor:
    """Return a number for each row of an order of completions, which the answer repeats, ``(B,)``.

    Args:
        prompt_ids: Padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        seeds: One for each row.
        about: What is asked of all rows.
    """
    common = hashlib.blake2b(json.dumps(about, sort_keys=True).encode())
    tags = []
    for ids, mask, seed in zip(prompt_ids.cpu(), prompt_mask.cpu().bool(), seeds, strict=True):
        own = common.copy()
        own.update(f"{ids[mask].tolist()} {int(seed)}".encode())
        tags.append(int.from_bytes(own.digest()[:8], "little", signed=True))
    return torch.tensor(tags, dtype=torch.long)


def _options(about: Mapping[str, Any]) -> dict[str, Any]:
    payload, k, alone = about.get("payload"), about.get("k"), about.get("alone")
    temperatures = about.get("temperatures")
    if payload not in get_args(Payload):
        raise ValueError(f"unknown payload {payload!r}; there are {', '.join(get_args(Payload))}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1 or not isinstance(alone, bool):
        raise ValueError(f"k is {k!r} and alone {alone!r}; give 1 or more, and true or false")
    if not isinstance(temperatures, list) or not all(
        isinstance(t, int | float) and not isinstance(t, bool) and 0 < t < torch.inf
        for t in temperatures
    ):
        raise ValueError(f"temperatures are {temperatures!r}; give a list of numbers above 0")
    return {
        "payload": payload,
        "k": k,
        "temperatures": tuple(float(t) for t in temperatures),
        "alone": alone,
    }


def check_ids(question: Question, vocabulary_size: int) -> None:
    """Validate that a question asks about known tokens.

    Raises:
        ValueError: If an id is out of range.
    """
    ids, targets = question.input_ids, question.targets
    known = (targets >= 0) & (targets < vocabulary_size) | (targets == IGNORE_INDEX)
    if not ((ids >= 0) & (ids < vocabulary_size)).all() or not known.all():
        raise ValueError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}; the teacher knows 0 to "
            f"{vocabulary_size - 1}"
        )
