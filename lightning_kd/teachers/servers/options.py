"""Which server is asked for what: options that must go together."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lightning_kd.option_checks import check_choice, is_number
from lightning_kd.teachers.contract import Ability
from lightning_kd.teachers.servers.backend import Backend
from lightning_kd.teachers.servers.own import OwnServer
from lightning_kd.teachers.servers.sglang import SGLangServer
from lightning_kd.teachers.servers.vllm import VLLMServer
from lightning_kd.wire.messages import Payload

BackendName = Literal["lightning_kd", "vllm", "sglang"]
"""A program that serves teachers."""

_ABILITIES: Mapping[Payload, frozenset[Ability]] = {
    "hidden": frozenset({"full_distribution"}),
    "top_k": frozenset({"top_k", "top_k_and_token"}),
    "token_log_probs": frozenset({"token_log_probs"}),
}


def abilities_of(name: BackendName, payload: Payload) -> frozenset[Ability]:
    """Return what a teacher behind such a server can do."""
    also: set[Ability] = {"generation"} if name == "lightning_kd" else set()
    return _ABILITIES[payload] | also


def backend_of(name: BackendName, model: str | None) -> Backend:
    """Return what speaks to a kind of server.

    Args:
        name: The kind.
        model: Name of the model, on a server that has several.

    Raises:
        ValueError: If the kind is unknown, or takes no name.
    """
    check_choice("backend", name, get_args(BackendName))
    if name == "vllm":
        return VLLMServer(model)
    if name == "sglang":
        return SGLangServer(model)
    if model is not None:
        raise ValueError(f"model is {model!r}, but lightning-kd serve has one model; leave it out")
    return OwnServer()


def check_payload(
    name: BackendName,
    backend: Backend,
    payload: Payload,
    k: int | None,
    temperatures: Sequence[float],
) -> None:
    """Validate what a server is asked for.

    Raises:
        ValueError: If it cannot answer so, or a value is of another type.
    """
    if not (k is None or is_number(k, whole=True)):
        raise ValueError(f"k is {k!r}, of type {type(k).__name__}; give a whole number, such as 8")
    if not isinstance(temperatures, list | tuple) or not all(map(is_number, temperatures)):
        raise ValueError(
            f"temperatures are {temperatures!r}; give a list of numbers, such as [2.0]"
        )
    check_choice("payload", payload, get_args(Payload))
    if (k is not None) != (payload == "top_k") or (k is not None and k < 1):
        raise ValueError(
            f"payload is {payload!r} and k {k}; give k, 1 or more, with payload: top_k, and only there"
        )
    if payload not in backend.payloads:
        raise ValueError(
            f"payload is {payload!r}, which backend: {name} cannot answer; choose one of "
            f"{', '.join(sorted(backend.payloads))}"
        )
    tempered = [t for t in temperatures if t != 1]
    if tempered and not (payload == "top_k" and backend.any_temperature):
        raise ValueError(
            f"temperatures are {list(temperatures)} with backend: {name} and payload: {payload}; the "
            "tail's mass at other temperatures than 1 comes with top_k from lightning_kd alone (and "
            "hidden holds at all of them)"
        )
    if any(not 0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures are {list(temperatures)}; they must be above 0")
