"""The methods, one page each, and what they share."""

from lightning_kd.modules.baby_llama import BabyLlama
from lightning_kd.modules.chunk_likelihood_kd import ChunkLikelihoodKD
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.divergence_module import DivergenceModule
from lightning_kd.modules.gkd import GKD
from lightning_kd.modules.interpolation import TAID, Interpolation
from lightning_kd.modules.loss import LossTerm, MicroBatchLoss, Scores
from lightning_kd.modules.minillm import MiniLLM
from lightning_kd.modules.minillm_objective import MiniLLMObjective, OfficialCode, Paper
from lightning_kd.modules.on_policy_distillation import OnPolicyDistillation
from lightning_kd.modules.optimization import WarmupCosine
from lightning_kd.modules.policy_gradient import PolicyGradientModule
from lightning_kd.modules.reverse_kl_estimators import (
    CorrectedTopK,
    ReverseKLEstimator,
    SampledToken,
)
from lightning_kd.modules.rl_distillation import RLDistillation
from lightning_kd.modules.sequence_kd import SequenceKD
from lightning_kd.modules.sft import SFT
from lightning_kd.modules.supervised_kd import SupervisedKD
from lightning_kd.modules.teacher_module import TeacherModule
from lightning_kd.modules.uld import ULD

__all__ = [
    "GKD",
    "SFT",
    "TAID",
    "ULD",
    "BabyLlama",
    "ChunkLikelihoodKD",
    "CorrectedTopK",
    "DistillationModule",
    "DivergenceModule",
    "Interpolation",
    "LossTerm",
    "MicroBatchLoss",
    "MiniLLM",
    "MiniLLMObjective",
    "OfficialCode",
    "OnPolicyDistillation",
    "Paper",
    "PolicyGradientModule",
    "RLDistillation",
    "ReverseKLEstimator",
    "SampledToken",
    "Scores",
    "SequenceKD",
    "SupervisedKD",
    "TeacherModule",
    "WarmupCosine",
]
