"""Evaluation of the student on tasks of lm-eval."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_kd.callbacks.evaluations import Stage
from lightning_kd.callbacks.occasional import OccasionalEvaluation
from lightning_kd.models.sharding import is_sharded
from lightning_kd.modules import DistillationModule

_SANITY_ROWS = 2


class LMEvalTasks(OccasionalEvaluation):
    """Log the student's results on tasks of lm-eval (the LM Evaluation Harness).

    ``val/TASK_METRIC`` (``test/``), as ``val/my_task_acc``; behind a filter other than ``none``,
    ``val/gsm8k_exact_match_strict-match``. Standard errors are not logged. The tasks and their data are
    lm-eval's: what is not on disk it fetches. An exported student needs no callback:
    ``lm_eval --model hf --model_args pretrained=runs/version_0/student``.

    It needs ``pip install 'lightning-kd[lm_eval]'``. Every process evaluates all rows, so several are
    not faster than one; a student in shards is refused. The random state stays as it was.

    Args:
        tasks: Names of tasks, groups or tags.
        include_path: Directory with YAML files of your own tasks.
        limit: Rows of each task, the first ones. Defaults to all.
        num_fewshot: Examples in the prompt. Defaults to those of the task.
        batch_size: Requests that run together.
        every_n_validations: Validations of a fit from one evaluation to the next, the first included; 0
            leaves it to the test. What watches a number decides in those validations alone.

    Raises:
        ValueError: If lm-eval is not installed, or a value is out of its range.

    References:
        https://github.com/EleutherAI/lm-evaluation-harness
    """

    def __init__(
        self,
        tasks: list[str],
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__(every_n_validations)
        if not tasks:
            raise ValueError("tasks is empty; name tasks of lm-eval, or leave the callback out")
        for name, value, least in (
            ("limit", limit, 1),
            ("num_fewshot", num_fewshot, 0),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        if find_spec("lm_eval") is None:
            raise ValueError(
                "LMEvalTasks needs lm-eval, which is not installed: pip install 'lightning-kd[lm_eval]'"
            )
        self.tasks, self.include_path, self.limit = tasks, include_path, limit
        self.num_fewshot, self.batch_size = num_fewshot, batch_size
        self._manager: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look the tasks up.

        Raises:
            ValueError: If there is no such task.
        """
        if stage == "predict":
            return
        from lm_eval.tasks import TaskManager

        self._manager = TaskManager(include_path=self.include_path)
        unknown = [name for name in self.tasks if not self._manager.match_tasks([name])]
        if unknown:
            where = "" if self.include_path is None else f" and {self.include_path}"
            raise ValueError(
                f"there is no task {', '.join(unknown)} in lm-eval{where}; `lm_eval ls tasks` lists "
                "its own, and include_path is a directory with YAML files of yours"
            )

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Refuse a student in shards, before the first step of a run that would evaluate it.

        Raises:
            ValueError: If its weights are in shards; see also
                :meth:`~lightning_kd.callbacks.occasional.OccasionalEvaluation.check`.
        """
        super().check(trainer, module, stage)
        assert isinstance(module, DistillationModule)
        is_evaluated = stage == "test" or self.every_n_validations > 0
        if is_evaluated and is_sharded(module.student):
            raise ValueError(
                "lm-eval runs a whole model, and the student is in shards; use ddp, or evaluate the "
                "exported student: lm_eval --model hf --model_args pretrained=DIRECTORY"
            )

    def measures(self, name: str) -> bool:
        """Return whether a name begins as that of a task does."""
        return any(name.startswith(f"{task}_") for task in self.tasks)

    def evaluate(self, module: L.LightningModule, *, is_trial: bool) -> dict[str, float]:
        """Run the tasks, on a few rows in a trial."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        assert isinstance(module, DistillationModule)
        with isolate_rng():
            student = HFLM(
                pretrained=module.student,
                tokenizer=module.tokenizer,
                batch_size=self.batch_size,
                dtype=None,
            )
            found = lm_eval.simple_evaluate(
                model=student,
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=_SANITY_ROWS if is_trial else self.limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        return {
            f"{task}_{name}": value
            for task, results in found["results"].items()
            for name, value in _numbers(results).items()
        }


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task by name, without standard errors.

    Example:
        >>> _numbers({"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict-match": 1})
        {'acc': 0.5, 'em_strict-match': 1.0}
    """
    numbers: dict[str, float] = {}
    for key, value in results.items():
        metric, _, name = key.partition(",")
        if name and not metric.endswith("_stderr") and isinstance(value, int | float):
            numbers[metric if name == "none" else f"{metric}_{name}"] = float(value)
    return numbers
