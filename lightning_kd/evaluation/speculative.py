"""What a student is worth as the draft model of speculative decoding."""


def tokens_per_call(acceptance: float, gamma: int) -> float:
    r"""Return the expected tokens of one call of the teacher: :math:`(1 - a^{\gamma+1}) / (1 - a)`.

    The student drafts :math:`\gamma` tokens; the teacher reads them at once, keeps them up to the first
    that it rejects, and adds one of its own.

    Args:
        acceptance: Probability :math:`a` that a drafted token is kept: the mean of 1 - TV(p, q).
        gamma: Tokens of a draft.

    Example:
        >>> tokens_per_call(0.5, 2), tokens_per_call(1.0, 2)
        (1.75, 3.0)

    References:
        Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*, ICML 2023, Eq. 1
        (it takes each token's acceptance as independent). https://arxiv.org/abs/2211.17192
    """
    return float(sum(acceptance**kept for kept in range(gamma + 1)))


def speed_up(acceptance: float, gamma: int, cost_ratio: float) -> float:
    r"""Return the expected speed-up: :math:`(1 - a^{\gamma+1}) / ((1 - a)(\gamma c + 1))`.

    Args:
        acceptance: See :func:`tokens_per_call`.
        gamma: Tokens of a draft.
        cost_ratio: Time :math:`c` of a step of the student over that of one of the teacher.

    Example:
        >>> speed_up(0.5, 2, 0.25), speed_up(0.0, 2, 0.0)
        (1.1666666666666667, 1.0)

    References:
        Leviathan et al., 2023, Theorem 3.8. https://arxiv.org/abs/2211.17192
    """
    return tokens_per_call(acceptance, gamma) / (gamma * cost_ratio + 1)
