"""Lightning callbacks: rollouts, diagnostics, export, predictions, samples, TensorBoard."""

from lightning_kd.callbacks.blimp import BLiMP
from lightning_kd.callbacks.completion_samples import CompletionSamples
from lightning_kd.callbacks.document_likelihoods import DocumentLikelihoods
from lightning_kd.callbacks.exposure_bias import ExposureBias
from lightning_kd.callbacks.hf_export import HFExport
from lightning_kd.callbacks.jsonl_predictions import JsonlPredictions
from lightning_kd.callbacks.lm_eval_tasks import LMEvalTasks
from lightning_kd.callbacks.loss_normalization import LossNormalizationDiagnostics
from lightning_kd.callbacks.non_finite_guard import NonFiniteGuard
from lightning_kd.callbacks.on_policy_generation import OnPolicyGeneration
from lightning_kd.callbacks.own_completions import OwnCompletions
from lightning_kd.callbacks.progress_bar import ProgressBar
from lightning_kd.callbacks.rollouts.health import HealthOptions
from lightning_kd.callbacks.rollouts.replay import ReplayBuffer
from lightning_kd.callbacks.save_on_termination import SaveOnTermination
from lightning_kd.callbacks.tensorboard_layout import TensorBoardLayout
from lightning_kd.callbacks.throughput import TokensPerSecond
from lightning_kd.callbacks.timeout_report import TimeoutReport
from lightning_kd.callbacks.training_cost import TrainingCost

__all__ = [
    "BLiMP",
    "CompletionSamples",
    "DocumentLikelihoods",
    "ExposureBias",
    "HFExport",
    "HealthOptions",
    "JsonlPredictions",
    "LMEvalTasks",
    "LossNormalizationDiagnostics",
    "NonFiniteGuard",
    "OnPolicyGeneration",
    "OwnCompletions",
    "ProgressBar",
    "ReplayBuffer",
    "SaveOnTermination",
    "TensorBoardLayout",
    "TimeoutReport",
    "TokensPerSecond",
    "TrainingCost",
]
