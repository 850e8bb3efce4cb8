"""A full distribution as plain tensors: hidden states of each batch, and one head for all of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_kd.fused import (
    ChunkedPass,
    FullDistribution,
    LazyHeadLogits,
    LazyLogits,
    PaddedLogits,
    TeacherTokenLogProb,
    evaluate_no_grad,
    single_model_log_probs,
)
from lightning_kd.teachers.composite import same_width
from lightning_kd.teachers.ensemble import AveragedDistribution

Layout = dict[str, Any]
"""What joins states and tensors of a head, as JSON has it: numbers, text, lists and mappings."""


def states_of(answer: FullDistribution) -> list[Tensor]:
    """Return the hidden states of an answer.

    Raises:
        ValueError: If its logits are not hidden states and a head.

    Returns:
        One tensor for each matrix product of each model, ``(N, H_j)``.
    """
    return [states for source in answer.logits for states, _ in _head_logits(source).factors]


def head_of(answer: FullDistribution) -> tuple[dict[str, Tensor], Layout]:
    """Return the part of an answer that is the same for every batch.

    Raises:
        ValueError: If its logits are not hidden states and a head, or are combined in another way
            than an ensemble does.

    Returns:
        Weights and biases by name, without gradients and each once, and how they are put together.
    """
    tensors: dict[str, Tensor] = {}
    models = []
    for number, logits in enumerate(map(_head_logits, answer.logits)):
        for place, (_, weight) in enumerate(logits.factors):
            tensors[f"{number}.weight.{place}"] = weight.detach()
        if logits.bias is not None:
            tensors[f"{number}.bias"] = logits.bias.detach()
        about = {"products": len(logits.factors), "scale": logits.scale, "softcap": logits.softcap}
        models.append(about)
    same = _repeated(tensors)
    layout = {"models": models, "average": _average_of(answer)} | ({"same": same} if same else {})
    return {name: tensor for name, tensor in tensors.items() if name not in same}, layout


def _repeated(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of tensors that are there before, as of one model in two places."""
    places: dict[tuple[object, ...], str] = {}
    before = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):  # its memory is in parts, which tell it from no other
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if (first := places.setdefault(place, name)) != name:
            before[name] = first
    return before


def log_probs_at(answer: FullDistribution, places: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of one token at each of some positions, ``(M,)``.

    Args:
        answer: Hidden states and a head.
        places: Numbers of positions, ``(M,)``.
        tokens: Their tokens, ``(M,)``.
    """
    few = answer_from([state[places] for state in states_of(answer)], *head_of(answer))
    return evaluate_no_grad(ChunkedPass(None, few, [TeacherTokenLogProb(tokens)]))[0]


def answer_from(
    states: Sequence[Tensor], tensors: Mapping[str, Tensor], layout: Layout
) -> FullDistribution:
    """Put an answer together again; its logits are the same, bit for bit.

    Args:
        states: Those of :func:`states_of`.
        tensors: Those of :func:`head_of`, on the device of the states.
        layout: The layout of :func:`head_of`; it may come from a file or a server.

    Raises:
        ValueError: If they do not fit each other.

    Example:
        >>> import torch
        >>> head = LazyHeadLogits(((torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])),))
        >>> tensors, layout = head_of(FullDistribution((head,)))
        >>> again = answer_from([torch.ones(1, 2)], tensors, layout)
        >>> out = torch.empty(1, 2)
        >>> again.logits[0].fill(slice(0, 1), out)
        >>> out
        tensor([[3., 7.]])
    """
    try:
        ends = [0]
        for about in layout["models"]:
            ends.append(ends[-1] + int(about["products"]))
        if ends[-1] != len(states):
            raise ValueError(f"{len(states)} tensors of states came, {ends[-1]} are expected")
        repeated = {name: tensors[first] for name, first in layout.get("same", {}).items()}
        whole = {**tensors, **repeated}
        logits = tuple(
            _with_states(number, states[start:end], whole, about)
            for number, (about, (start, end)) in enumerate(
                zip(layout["models"], pairwise(ends), strict=True)
            )
        )
        return _put_together(logits, layout["average"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"the layout of a teacher's head is damaged, or of another version of this library "
            f"({type(error).__name__}: {error})"
        ) from error


def _head_logits(logits: LazyLogits) -> LazyHeadLogits:
    if isinstance(logits, LazyHeadLogits):
        return logits
    if isinstance(logits, PaddedLogits):
        return _head_logits(logits.source)
    raise ValueError(
        f"hidden states are asked for, and the teacher answers {type(logits).__name__}, which has "
        "none. A model answers them with model.logits_backend: FusedLogits, if its output head is a "
        "product, a bias, a scale and a soft cap; of several routed teachers, take each by itself"
    )


def _average_of(answer: FullDistribution) -> Layout | None:
    """Return the tree of averages that makes one distribution of the models; None for one model."""
    if isinstance(answer, AveragedDistribution):
        members = [
            {"models": len(member.logits), "average": _average_of(member)}
            for member in answer.members
        ]
        return {"of": answer.averaging, "weights": list(answer.weights), "members": members}
    if type(answer) is FullDistribution and answer.combine is single_model_log_probs:
        return None
    raise ValueError(
        f"the teacher's {type(answer).__name__} makes one distribution of its models by code of its "
        "own, which cannot be written down; that of TeacherEnsemble can"
    )


def _put_together(logits: tuple[LazyLogits, ...], tree: Layout | None) -> FullDistribution:
    if tree is None:
        if len(logits) != 1:
            raise ValueError(f"{len(logits)} models came without a way to combine them")
        return FullDistribution(logits)
    own, start = [], 0
    for member in tree["members"]:
        end = start + int(member["models"])
        own.append(_put_together(logits[start:end], member["average"]))
        start = end
    weights = tuple(float(weight) for weight in tree["weights"])
    if start != len(logits) or len(weights) != len(own):
        raise ValueError(
            f"an average of {len(own)} members with {len(weights)} weights has {start} models of "
            f"{len(logits)}"
        )
    if tree["of"] not in {"logits", "probabilities", "log_probs"}:
        raise ValueError(f"an average of {tree['of']!r} is not known")
    members = same_width(own)
    return AveragedDistribution(
        tuple(source for member in members for source in member.logits),
        members=members,
        weights=weights,
        averaging=tree["of"],
    )


def _with_states(
    number: int, states: Sequence[Tensor], tensors: Mapping[str, Tensor], about: Layout
) -> LazyHeadLogits:
    weights = [tensors[f"{number}.weight.{place}"] for place in range(len(states))]
    for own, weight in zip(states, weights, strict=True):
        if own.ndim != 2 or weight.ndim != 2 or own.shape[1] != weight.shape[1]:
            raise ValueError(
                f"hidden states {tuple(own.shape)} do not fit a head {tuple(weight.shape)}"
            )
    scale, softcap = float(about["scale"]), about["softcap"]
    return LazyHeadLogits(
        tuple(zip(states, weights, strict=True)),
        tensors.get(f"{number}.bias"),
        scale,
        None if softcap is None else float(softcap),
    )
