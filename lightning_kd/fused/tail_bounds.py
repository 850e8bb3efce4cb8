"""What the k most likely tokens say of the rest at other temperatures."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_kd.fused.answers import SURPLUS, rounding


def tail_bounds(
    log_probs: Tensor, rest: tuple[Tensor, Tensor], others: int, temperature: float
) -> tuple[Tensor, Tensor]:
    r"""Return the least and the largest log-probability that the rest can have at a temperature.

    The rest has :math:`n` tokens of together :math:`P`, none likelier than the least likely named one,
    :math:`p_k`. The sum of :math:`p^{1/\tau}` over them is largest where they are all alike and least
    where as few as possible share :math:`P`, above temperature 1; below it is the other way round.

    Args:
        log_probs: Of the k most likely tokens at temperature 1, ``(N, k)``.
        rest: The least and the largest probability of the rest at temperature 1, ``(N,)`` each.
        others: Its tokens, 1 or more.
        temperature: The temperature.

    Example:
        >>> named, rest = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25])
        >>> [bound.exp() for bound in tail_bounds(named, (rest, rest), 4, 2.0)]
        [tensor([0.2929]), tensor([0.4531])]
    """
    power = 1 / temperature
    named = (log_probs * power).logsumexp(-1)
    least = log_probs.amin(-1).exp().clamp_min(torch.finfo(log_probs.dtype).tiny)
    low, high = (share.clamp_max(others * least) for share in rest)

    def alike(share: Tensor) -> Tensor:
        return others * (share / others) ** power

    def by_few(share: Tensor) -> Tensor:
        whole = (share / least).floor()
        return whole * least**power + (share - whole * least).clamp_min(0) ** power

    sums = (by_few(low), alike(high)) if power < 1 else (alike(low), by_few(high))
    lower, upper = (total.log() - torch.logaddexp(total.log(), named) for total in sums)
    return lower, upper


def check_tails(kind: str, log_probs: Tensor, tails: Mapping[float, Tensor], width: int) -> None:
    """Refuse a tail at another temperature than 1 that the k most likely tokens rule out.

    Args:
        kind: Of the answer, for the message.
        log_probs: Of the k most likely tokens at temperature 1, ``(N, k)``.
        tails: Log-probability of the others at each declared temperature, ``(N,)``.
        width: Tokens of the vocabulary.

    Raises:
        ValueError: If there is one, by more than rounding explains.
    """
    exact, others = log_probs.double(), width - log_probs.shape[1]
    if others == 0:
        return
    if 1.0 in tails:
        left = tails[1.0].double().exp()
        slack = left * SURPLUS + rounding(tails[1.0][:, None])
    else:
        left, slack = 1 - exact.exp().sum(-1), SURPLUS + rounding(log_probs)
    rest = (left - slack).clamp_min(0), (left + slack).clamp(0, 1)
    for temperature, tail in tails.items():
        if temperature == 1:
            continue
        lower, upper = (b.exp() for b in tail_bounds(exact, rest, others, temperature))
        share = tail.double().exp()
        wrong = ((share < lower - SURPLUS) | (share > upper + SURPLUS)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(
                f"the teacher's {kind} has a tail of probability {share[place]:.4f} at temperature "
                f"{temperature:g} at position {place}; by the {log_probs.shape[1]} most likely tokens "
                f"and the {others} others it is from {lower[place]:.4f} to {upper[place]:.4f}"
            )
