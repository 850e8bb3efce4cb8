"""Base of every method, without a loss: a student, its tokenizer and its completions."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch, require_prompts
from lightning_kd.checkpoints import RUN_KEY, compare_weights
from lightning_kd.generation import Completions, Engine, GenerationOptions, engine_for, generate
from lightning_kd.loops import prepare_trainer
from lightning_kd.models import StudentLike
from lightning_kd.models.adapters import has_adapters
from lightning_kd.models.given import student_of
from lightning_kd.models.positions import check_length, check_split
from lightning_kd.models.sharding import is_sharded, shard
from lightning_kd.modules.evaluated_checkpoint import prepare_evaluation
from lightning_kd.modules.own_data import ReadsOwnBatches
from lightning_kd.modules.restoring import RestorableModule, check_method
from lightning_kd.modules.resume import Resumption
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.strategies import adapter_of, check_trainer, searches_of
from lightning_kd.tokenization import TokenizerLike, tokenizer_of


class StudentModule(ReadsOwnBatches, RestorableModule):
    """A student that completes prompts, and whose checkpoints name their method.

    Args:
        student: The model that trains. In Python also its name, its configuration, or a model.
        tokenizer: Directory or hub name; in Python also a tokenizer. Defaults to the data module's,
            or else to that beside a student with a name.
        generation: How completions are generated in ``predict``.
        engine: What generates in ``predict`` and for samples. Defaults to ``CachedSampler``, to
            ``TransformersEngine`` for beam search.
    """

    may_change_on_resume = frozenset({"generation", "engine"})

    def __init__(
        self,
        *,
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(generation, GenerationOptions | None):
            raise ValueError(
                f"generation is a {type(generation).__name__}; give GenerationOptions(...)"
            )
        self.student_spec = student_of(student)
        self.generation = generation or GenerationOptions()
        self.engine = engine
        engine_for(self.generation, engine)
        self._engine_updated_at: int | None = None
        self.own_tokenizer = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.resumption = Resumption(self)
        self._has_weights = False
        self.save_hyperparameters()

    def configure_callbacks(self) -> list[Callback]:
        """Prepare a trainer for fitting, before its loggers open their files; adds no callback.

        Raises:
            ValueError: If the trainer's limits cannot be kept.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            prepare_trainer(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Validate the trainer.

        Raises:
            ValueError: If the loss would be divided wrongly under it.
        """
        check_trainer(self.trainer)
        self._engine_updated_at = None
        if stage == "fit":
            prepare_trainer(self.trainer)  # where a subclass has callbacks of its own
            self.resumption = Resumption(self)  # an earlier fit is none of this one's business

    def check_rows(self, batch: Batch, batch_idx: int) -> None:
        """Validate the form of a batch, its length for each model, padding and labels."""
        self.check_own(batch, batch_idx)
        check_length(self.models, batch["input_ids"].shape[1], "the rows of a batch")

    def configure_model(self) -> None:
        """Build the student, once; in shards if the strategy shards weights.

        Raises:
            ValueError: If it could not be exported in the end, or the data has longer rows than a
                model takes.
        """
        if not hasattr(self, "student"):
            self.student = self.student_spec.build(self.tokenizer)
        if not is_sharded(self.student):
            self._shard()
        self.check_lengths(rewritten=generates_completions(self.trainer))

    def _shard(self) -> None:
        adapted = self.student_spec.is_given and has_adapters(self.student)
        if adapted and adapter_of(self.trainer).shards_weights:
            raise ValueError(
                "adapters of a model that was handed over cannot be exported from shards; give the "
                "student's name_or_path or config instead, with lora"
            )
        mesh = adapter_of(self.trainer).shard_mesh()
        if mesh is not None:
            shard(self.student, mesh)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models that read the rows, by role."""
        return {"student": self.student}

    def check_lengths(self, *, rewritten: bool) -> None:
        """Validate that rows fit the positions of the models, and are more than prompts to train on.

        Args:
            rewritten: Whether completions of the training rows may be generated.

        Raises:
            ValueError: If rows, or prompts with their completions, are longer, or nothing completes
                the prompts.
        """
        for split, (row, prompt) in longest_rows(self.trainer).items():
            if split == "predict":
                length = prompt + self.generation.max_new_tokens
                what = "prompts and max_new_tokens of predict"
                check_length(self.generating_models, length, what)
            elif split != "train" or not rewritten:
                check_split(self.models, row, split)
                if split == "train" and row == prompt:
                    raise ValueError(
                        "the training rows are prompts alone: give on_policy, or data with completions"
                    )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or else the data module's, or that beside the student.

        Raises:
            ValueError: If there is none.
        """
        if self._tokenizer is None:
            given = self.own_tokenizer
            if given is None:
                given = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
            if given is None:
                given = self.student_spec.name_or_path
            if given is None:
                raise ValueError(
                    "no tokenizer: give tokenizer=... (a directory, a hub name, or a tokenizer; to "
                    "load_from_checkpoint too), or train the module with data that have one"
                )
            self._tokenizer = tokenizer_of(given)
        return self._tokenizer

    @property
    def generating_models(self) -> Mapping[str, PreTrainedModel]:
        """The models of this process that generate completions, by role."""
        return {"student": self.student}

    def predict_step(self, batch: Batch, batch_idx: int) -> Completions:
        """Complete the prompts of a batch."""
        return self.complete(batch, purpose="predict")

    def complete(
        self, batch: Batch, *, purpose: str, options: GenerationOptions | None = None
    ) -> Completions:
        """Complete the prompts of a batch with :meth:`generate`.

        Args:
            batch: Has prompts.
            purpose: With the run's seed and the row's number, it seeds each row's samples.
            options: Defaults to the module's own.

        Raises:
            ValueError: If the batch has no prompts.
        """
        prompts = require_prompts(batch)
        seeds = [derive_seed(run_seed(), purpose, row) for row in batch["row"].tolist()]
        ids, mask = prompts["prompt_ids"], prompts["prompt_mask"]
        return self.generate(ids, mask, options or self.generation, seeds)

    def generate(
        self, prompt_ids: Tensor, prompt_mask: Tensor, options: GenerationOptions, seeds: list[int]
    ) -> Completions:
        """Complete prompts, ``(B, P)``, with the student."""
        self._update_engine()
        return generate(
            self.student,
            self.tokenizer,
            prompt_ids,
            prompt_mask,
            options,
            seeds=seeds,
            engine=self.engine,
        )

    def check_generation(self, options: GenerationOptions | None = None) -> None:
        """Refuse models, and options (the module's own), that the engine cannot generate with."""
        engine = engine_for(options or self.generation, self.engine)
        engine.check_models(list(self.generating_models.values()))

    def _update_engine(self) -> None:
        """Update the engine's weights, if the student's have changed since the last time."""
        step = self.global_step
        if self.engine is None or self._engine_updated_at == step:
            return
        self.engine.update(self.student)
        self._engine_updated_at = step

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that a resumed run must not change; models as they were built."""
        spec, built = self.student_spec.resume_settings(), {"config": self.student.config}
        return super().resume_settings() | {"tokenizer": self.tokenizer, "student": spec | built}

    def on_fit_start(self) -> None:
        """Record the settings of this run, and refuse those that a resumed one must not change.

        Raises:
            ValueError: If a setting differs from the saved run's.
        """
        self.resumption.begin()

    def on_train_start(self) -> None:
        """Apply new options to a resumed run's optimizer and schedule."""
        self.resumption.apply()
        self._has_weights = True

    def on_validation_start(self) -> None:
        """Refuse to evaluate random weights.

        Raises:
            ValueError: If the student starts at random, and no checkpoint was given.
        """
        spec = self.student_spec
        random = spec.config is not None and not spec.is_given and not self._has_weights
        if random and self.trainer.state.fn is not TrainerFn.FITTING and self._uses_student:
            raise ValueError(
                "the student starts from a config, so its weights are random: give the checkpoint that "
                "is meant (--ckpt_path PATH or last; ckpt_path=... in Python), or a trained student as "
                "model.student.name_or_path"
            )

    def on_test_start(self) -> None:
        """Refuse to test random weights; see :meth:`on_validation_start`."""
        self.on_validation_start()

    def on_predict_start(self) -> None:
        """Refuse random weights (:meth:`on_validation_start`) and models that the engine cannot run."""
        self.on_validation_start()
        self.check_generation()

    @property
    def _uses_student(self) -> bool:
        return not self.trainer.predicting or "student" in self.generating_models

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the name of the method and the settings of the run."""
        method, settings = {"method": type(self).__name__}, self.resumption.record
        checkpoint[RUN_KEY] = method | settings | self.restoration()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another method, or of another model.

        Raises:
            ValueError: If method or weights are another's.
        """
        check_method(checkpoint.get(RUN_KEY, {}), type(self).__name__)
        if "state_dict" in checkpoint:  # a strategy that shards has loaded it already
            compare_weights(checkpoint["state_dict"], self.state_dict())
        self._has_weights = True
        if self._trainer is None or searches_of(self.trainer):
            return  # what a search has tried is taken back, and no run goes on
        if self.trainer.state.fn is TrainerFn.FITTING:
            self.resumption.load(checkpoint, checkpoint[RUN_KEY])
        else:
            prepare_evaluation(self.trainer, checkpoint, self.tokenizer)


def generates_completions(trainer: L.Trainer) -> bool:
    """Return whether a run's data follows a plan of rollouts: its completions may be generated."""
    given = (getattr(trainer, "datamodule", None), trainer.fit_loop._data_source.instance)
    return any(getattr(data, "rollout_plan", None) is not None for data in given)


def longest_rows(trainer: L.Trainer) -> dict[str, tuple[int, int]]:
    """Return the tokens of the longest row and prompt of each split; empty if they are unknown."""
    longest = getattr(getattr(trainer, "datamodule", None), "longest", None)
    return {} if longest is None else longest()
