"""The command ``lightning-kd cache``."""

from collections.abc import Mapping
from typing import Any, Self

import lightning

from lightning_kd.cache_writing import CacheOptions, check_method, write_cache
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import DistillationData
from lightning_kd.modules import TeacherModule


class CachingTrainer(lightning.Trainer):
    """Lightning's trainer, with the command that writes what a teacher says."""

    @classmethod
    def of_options(
        cls,
        options: Mapping[str, Any],
        model: lightning.LightningModule,
        *,
        on_policy: OnPolicyGeneration | None,
    ) -> Self:
        """Return the trainer of a run's options, without what belongs to a student that learns.

        Args:
            options: Of the run's trainer.
            model: Its method.
            on_policy: What generates completions in the run.

        Raises:
            ValueError: If something does, or no cache can serve the method.
        """
        check_method(model)
        if on_policy is not None:
            raise ValueError(
                "on_policy generates texts during training, and a cache knows those of the data "
                "alone; give --on_policy null here, and to fit"
            )
        given = {**options, "callbacks": None, "logger": False, "enable_checkpointing": False}
        return cls(**given)

    def write_answers(
        self,
        model: TeacherModule,
        datamodule: DistillationData,
        *,
        cache: CacheOptions,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write what the teacher of a method says about its data, for CachedTeacher to read.

        Args:
            model: The method. Its student is not built.
            datamodule: The texts.
            cache: What is written, and where.
            ckpt_path: Null, as in the configuration that a run leaves: no checkpoint is read.
            weights_only: As for ``fit``; nothing is loaded here.

        Raises:
            ValueError: If a checkpoint is given.
        """
        if ckpt_path is not None:
            raise ValueError(
                f"ckpt_path is {ckpt_path!r}, and a cache reads no checkpoint: the teacher has none of "
                "its weights there. Leave it out; model.teacher says whose answers are kept"
            )
        write_cache(self, model, datamodule, cache)

    cache = write_answers
    """The command; jsonargparse names a group by the function, and the options have this name."""
