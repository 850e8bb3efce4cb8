"""Every registered divergence from its published formula, in NumPy and SciPy, on probabilities.

A function takes the teacher, the student and the parameters of the divergence.
"""

import numpy as np
from scipy.special import rel_entr, xlogy
from scipy.stats import entropy


def jensen_shannon(p, q, beta=0.5, normalized=False):
    """The concavity of the entropy: ``H(m) - beta H(p) - (1 - beta) H(q)``."""
    near = 1e-4 if normalized else 0.0
    if beta == 0 or beta < near:
        return entropy(p, q, axis=-1)
    if beta == 1 or 1 - beta < near:
        return entropy(q, p, axis=-1)
    mixture = entropy(beta * p + (1 - beta) * q, axis=-1)
    gap = mixture - beta * entropy(p, axis=-1) - (1 - beta) * entropy(q, axis=-1)
    return gap / (beta * (1 - beta)) if normalized else gap


def alpha_beta(p, q, alpha=0.2, beta=0.7):
    ratio = (p / q) ** alpha
    if alpha == beta == 0:
        return (np.log(p / q) ** 2).sum(-1) / 2
    if alpha + beta == 0:
        return (ratio - 1 - np.log(ratio)).sum(-1) / alpha**2
    if beta == 0:
        return (xlogy(p**alpha, ratio) - p**alpha + q**alpha).sum(-1) / alpha**2
    if alpha == 0:
        return (rel_entr(q**beta, p**beta) - q**beta + p**beta).sum(-1) / beta**2
    total = alpha + beta
    mean = alpha / total * p**total + beta / total * q**total
    return (mean - p**alpha * q**beta).sum(-1) / (alpha * beta)


def adaptive_kl(p, q, mu=0.5):
    def at_one_position(row):
        teacher, student = np.split(row, 2)
        ranking = np.argsort(-teacher)
        reach = np.cumsum(teacher[ranking])
        head = {v for rank, v in enumerate(ranking) if rank == 0 or reach[rank] <= mu}
        gaps = np.abs(teacher - student)
        weight = sum(gaps[v] for v in head) / gaps.sum()
        return weight * entropy(teacher, student) + (1 - weight) * entropy(student, teacher)

    return np.apply_along_axis(at_one_position, -1, np.concatenate([p, q], -1))


REFERENCES = {
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "forward_kl": lambda p, q: entropy(p, q, axis=-1),
    "generalized_jsd": jensen_shannon,
    "jeffreys": lambda p, q: ((p - q) * np.log(p / q)).sum(-1),
    "negative_log_acceptance": lambda p, q: -np.log(np.minimum(p, q).sum(-1)),
    "reverse_kl": lambda p, q: entropy(q, p, axis=-1),
    "skew_kl": lambda p, q, alpha=0.1: entropy(p, alpha * p + (1 - alpha) * q, axis=-1),
    "skew_reverse_kl": lambda p, q, alpha=0.1: entropy(q, alpha * q + (1 - alpha) * p, axis=-1),
    "squared_hellinger": lambda p, q: 1 - np.sqrt(p * q).sum(-1),
    "total_variation": lambda p, q: np.maximum(p - q, 0).sum(-1),
}
