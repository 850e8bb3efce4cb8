"""What the k most likely tokens say of the rest at other temperatures."""

import torch
from torch import Tensor


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
    least = log_probs.amin(-1).exp()
    low, high = (share.clamp_max(others * least) for share in rest)

    def alike(share: Tensor) -> Tensor:
        return others * (share / others) ** power

    def by_few(share: Tensor) -> Tensor:
        whole = (share / least).floor()
        return whole * least**power + (share - whole * least).clamp_min(0) ** power

    sums = (by_few(low), alike(high)) if power < 1 else (alike(low), by_few(high))
    lower, upper = (total.log() - torch.logaddexp(total.log(), named) for total in sums)
    return lower, upper
