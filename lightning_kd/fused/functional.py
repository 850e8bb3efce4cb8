"""The fused divergence as a function of hidden states and output heads."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.fused.answers import FullDistribution
from lightning_kd.fused.autograd import per_token, total_of, weighted_sum
from lightning_kd.fused.chunked_pass import ChunkedPass
from lightning_kd.fused.compile_choice import Compile
from lightning_kd.fused.lazy_logits import LazyHeadLogits
from lightning_kd.fused.token_terms import DivergenceTerm
from lightning_kd.option_checks import check_choice, check_whole

Mode = Literal["fused", "recompute"]


class FusedDivergence(NamedTuple):
    """Result of :func:`fused_linear_divergence`."""

    total: Tensor
    """The weighted sum, ``()``, float64; gradients flow from here."""
    values: Tensor
    """The divergence at each position in nats, ``(...)``, 0 where it is not scored."""


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: Divergence | str = "forward_kl",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    scored: Tensor | None = None,
    weights: Tensor | None = None,
    mode: Mode = "fused",
    chunk_bytes: int | None = None,
    compile: Compile = "auto",  # noqa: A002  as in Lightning and PyTorch
) -> FusedDivergence:
    r"""Any divergence between two output heads, :math:`\sum_t w_t D(p_t, q_t)`, without all logits.

    .. math:: q_t = \mathrm{softmax}\bigl((W_s h_t + b_s) / \tau_s\bigr), \qquad
              p_t = \mathrm{softmax}\bigl((W_t g_t + b_t) / \tau_t\bigr)

    The logits of one chunk of positions are alive at a time, of scored positions only, in float32
    also where hidden states and weights are narrower. No factor :math:`\tau^2` is applied. Gradients
    go to the student's hidden states, weight and bias.

    Args:
        student_hidden: ``(..., H_s)``.
        student_weight: ``(V_s, H_s)``.
        teacher_hidden: ``(..., H_t)``, the same positions; constant.
        teacher_weight: ``(V_t, H_t)``; of heads of unequal width the first ``min(V_s, V_t)`` tokens
            are compared.
        student_bias: ``(V_s,)``.
        teacher_bias: ``(V_t,)``.
        divergence: A registered name or an instance; a closed-form gradient is used where it has
            one, else automatic differentiation within a chunk.
        student_temperature: :math:`\tau_s`.
        teacher_temperature: :math:`\tau_t`.
        scored: True where a position counts, ``(...)``. Defaults to all.
        weights: :math:`w_t`, ``(...)``, constants. Defaults to 1.
        mode: ``fused`` makes the gradients of the sum in the forward pass. ``recompute`` gives
            ``values`` a gradient too, for weights that are known only afterwards, and computes the
            logits a second time in the backward pass.
        chunk_bytes: Logits that may be alive at once, of both sides. Defaults to three
            quarters of what the gradient of ``student_weight`` takes, and at least 64 MiB.
        compile: Whether ``torch.compile`` makes code of what is done with a chunk of logits: ``auto``
            (on CUDA), ``always`` or ``never``.

    Raises:
        ValueError: If shapes do not fit, a temperature or ``chunk_bytes`` is not positive, a name is
            unknown, or no code can be made where ``compile`` is ``always``.

    Example:
        >>> hidden, weight = torch.zeros(3, 2), torch.eye(4, 2)
        >>> other = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> fused_linear_divergence(hidden, weight, other, weight).values
        tensor([0.0000, 0.4680, 0.1180])

    References:
        Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM Training*, 2024 (gradients in the
        forward pass, for one divergence family). https://arxiv.org/abs/2410.10989
    """
    _check_shapes(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")
    check_choice("compile", compile, get_args(Compile))
    if chunk_bytes is not None:
        check_whole("chunk_bytes", chunk_bytes, ", or None for the default")
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(
            f"student_temperature is {student_temperature} and teacher_temperature "
            f"{teacher_temperature}; both must be positive"
        )
    positions = student_hidden.shape[:-1]
    mask = torch.ones(positions, dtype=torch.bool, device=student_hidden.device)
    mask = mask if scored is None else scored.bool()
    weight = torch.ones(positions, device=student_hidden.device) if weights is None else weights
    for name, given in (("scored", mask), ("weights", weight)):
        if given.shape != positions:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; there are positions {tuple(positions)}"
            )
    student = LazyHeadLogits(((student_hidden[mask], student_weight),), student_bias)
    with torch.no_grad():
        teacher = LazyHeadLogits(((teacher_hidden[mask], teacher_weight),), teacher_bias)
    width = min(student.shape[1], teacher.shape[1])
    token_term = DivergenceTerm(
        make_divergence(divergence),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    chunked_pass = ChunkedPass(
        student.narrowed(width),
        FullDistribution((teacher.narrowed(width),)),
        [token_term],
        chunk_bytes,
        compile,
    )
    if mode == "fused":
        total, values = weighted_sum(chunked_pass, [weight[mask].detach().double()])
    else:
        values = per_token(chunked_pass)
        total = total_of(values, [weight[mask].double()])
    scattered = values.new_zeros(positions).masked_scatter(mask, values[0])
    return FusedDivergence(total, scattered)


def _check_shapes(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.shape[-1] != weight.shape[-1] or weight.ndim != 2:
            raise ValueError(
                f"{name}_hidden has shape {tuple(hidden.shape)} and {name}_weight "
                f"{tuple(weight.shape)}; expected (..., H) and (V, H)"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden has positions {tuple(student_hidden.shape[:-1])}, teacher_hidden "
            f"{tuple(teacher_hidden.shape[:-1])}; both must see the same tokens"
        )
