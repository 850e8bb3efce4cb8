"""Divergences between student and teacher, and the registry that names them."""

from lightning_kd.divergences.adaptive_kl import AdaptiveKL
from lightning_kd.divergences.alpha_beta import AlphaBeta
from lightning_kd.divergences.base import (
    ENTRY_POINT_GROUP,
    Divergence,
    available_divergences,
    make_divergence,
    register_divergence,
)
from lightning_kd.divergences.forward_kl import ForwardKL
from lightning_kd.divergences.generalized_jsd import GeneralizedJSD
from lightning_kd.divergences.jeffreys import Jeffreys
from lightning_kd.divergences.negative_log_acceptance import NegativeLogAcceptance
from lightning_kd.divergences.reverse_kl import ReverseKL
from lightning_kd.divergences.skew_kl import SkewKL, SkewReverseKL
from lightning_kd.divergences.squared_hellinger import SquaredHellinger
from lightning_kd.divergences.total_variation import TotalVariation

__all__ = [
    "ENTRY_POINT_GROUP",
    "AdaptiveKL",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "GeneralizedJSD",
    "Jeffreys",
    "NegativeLogAcceptance",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "TotalVariation",
    "available_divergences",
    "make_divergence",
    "register_divergence",
]
