"""Charts that belong together, together: the custom scalars tab of TensorBoard."""

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

LAYOUT = {
    "Loss": {
        "loss": ["Multiline", [r"(train|val)/loss$"]],
        "cross-entropy": ["Multiline", [r"(train|val)/cross_entropy$"]],
        "divergence": ["Multiline", [r"(train|val)/divergence$"]],
        "policy gradient": ["Multiline", [r"train/policy_gradient$"]],
        "single step and language modeling": [
            "Multiline",
            [r"train/(single_step|language_modeling)$"],
        ],
        "reward": ["Multiline", [r"train/reward$"]],
    },
    "Rollouts": {
        "written by the student": ["Multiline", [r"rollout/own$"]],
        "length": ["Margin", ["rollout/length_mean", "rollout/length_min", "rollout/length_max"]],
        "ended and cut off": ["Multiline", [r"rollout/(eos|truncation)_rate$"]],
        "distinct n-grams": ["Multiline", [r"rollout/distinct_[12]$"]],
        "tokens per second": ["Multiline", [r"rollout/tokens_per_second$"]],
        "share of time": ["Multiline", [r"rollout/time_share$"]],
    },
    "Student and teacher": {
        "KL in both directions (validation)": ["Multiline", [r"val/(forward|reverse)_kl$"]],
        "KL in both directions (training)": ["Multiline", [r"train/(forward|reverse)_kl$"]],
        "same most likely token": ["Multiline", [r"(train|val)/top1_agreement$"]],
        "entropy": ["Multiline", [r"val/(student|teacher)_entropy$"]],
    },
    "Text": {
        "perplexity": ["Multiline", [r"(train|val)/perplexity$"]],
        "exact match": ["Multiline", [r"val/exact_match$"]],
    },
    "Normalization": {
        "loss under each normalization": [
            "Multiline",
            [r"norm/loss_(token|sequence|batch|constant)$"],
        ],
        "sequence over token": ["Multiline", [r"norm/sequence_over_token$"]],
        "effective weight of a token": ["Multiline", [r"norm/weight_(min|max)$"]],
        "total weight of each term": ["Multiline", [r"norm/\w+/weight$"]],
        "count over ranks and micro-batches": ["Multiline", [r"norm/count_(min|max)$"]],
        "error of a mean of means": ["Multiline", [r"norm/mean_of_means_error$"]],
        "padding": ["Multiline", [r"norm/padding_share$"]],
        "length and loss": ["Multiline", [r"norm/length_loss_covariance$"]],
    },
    "Optimization": {
        "gradient norm": ["Multiline", [r"train/grad_norm$"]],
        "learning rate": ["Multiline", [r"train/lr$"]],
        "scored tokens per step": ["Multiline", [r"train/tokens$"]],
        "tokens per second": ["Multiline", [r"train/tokens_per_second$"]],
    },
}


class TensorBoardLayout(Callback):
    """Group the scalars of every method on TensorBoard's *Custom Scalars* tab."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the layout once per run."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(LAYOUT)
