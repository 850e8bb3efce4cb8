"""Options of a resumed run: each takes effect, or is refused by name."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_kd.checkpoints import weights_alone
from lightning_kd.functions import FunctionDescription, is_nameless
from lightning_kd.resuming import SHOWN, Plain, Resumable, describe, differences
from lightning_kd.seeding import run_seed

_T = TypeVar("_T")
_SETTINGS, _OPTIMIZERS, _SCHEDULES = "settings", "optimizers", "schedules"
_STEPPED = ("interval", "frequency", "reduce_on_plateau")


class Resumption:
    """Comparison of a resumed run with the saved one, and application of new options.

    Args:
        module: What trains; with its trainer's data module and callbacks it says what a run is.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.record: dict[str, Any] = {}
        """Settings of this run in its checkpoints."""
        self.saved: dict[str, Any] | None = None
        """Settings in the checkpoint that the run resumes from."""
        self.schedules: list[dict[str, Any]] = []
        """The states of its schedules."""
        self._groups: list[list[dict[str, Any]]] = []

    def begin(self) -> None:
        """Record the settings of a run before its first step; if it is resumed, compare them.

        Raises:
            ValueError: If it differs in what must not change.
        """
        trainer = self.module.trainer
        self._groups = [_made(optimizer) for optimizer in trainer.optimizers]
        record = {
            _SETTINGS: settings_of(trainer, self.module),
            _OPTIMIZERS: [
                {"class": type(_inner(optimizer)).__qualname__, "groups": describe(groups)}
                for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True)
            ],
        }
        self.record = self._of_the_first_process(record)
        self.compare()

    def load(self, checkpoint: dict[str, Any] | None, saved: dict[str, Any]) -> None:
        """Read the saved run's settings, and hold back the states of its schedules.

        Args:
            checkpoint: Its contents, as the trainer will restore them; None where they come later.
            saved: What it remembers.

        Raises:
            ValueError: If this run differs in what must not change.
        """
        if checkpoint is not None and "lr_schedulers" not in checkpoint:
            raise weights_alone()
        if isinstance(self.module.trainer.precision_plugin, DoublePrecision):
            # Lightning does it when the weights have been read, and rounded to float32.
            self.module.double()
        if _SETTINGS not in saved:
            rank_zero_warn(
                "the checkpoint does not remember what its run was told, so this run is not "
                "compared with it, and learning rate and schedule stay as they were saved"
            )
            return
        if self.saved is None:
            self.saved = saved
            if self.record:
                self.compare()
            else:
                # A loader refuses other data when its place is restored, and knows fewer names. The
                # model is still to be converted.
                now = self._of_the_first_process(settings_of(self.module.trainer, self.module))
                before = saved[_SETTINGS] | {"model": now["model"]}
                _refuse(list(differences(before, now)))
        if checkpoint is not None:
            self.schedules, checkpoint["lr_schedulers"] = checkpoint["lr_schedulers"], []

    def _of_the_first_process(self, description: _T) -> _T:
        """Return the first process's description of a run, which is the one in checkpoints.

        A function may read what differs between processes (a device); all of them decide alike.
        """
        return self.module.trainer.strategy.broadcast(description)

    def compare(self) -> None:
        """Refuse what differs from the saved run and must not.

        Raises:
            ValueError: If there is something to refuse, by its names.
        """
        saved = self.saved
        if saved is None or not self.record:
            return
        found = list(differences(saved[_SETTINGS], self.record[_SETTINGS]))
        before, after = (
            ", ".join(o["class"] for o in r[_OPTIMIZERS]) for r in (saved, self.record)
        )
        _refuse([*found, *differences(before, after, "model.optimizer")])

    def apply(self) -> None:
        """Restore the schedules, and apply this run's new options to optimizers and schedules.

        Raises:
            ValueError: If a schedule was changed that depends on more than the step.
        """
        trainer = self.module.trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        fresh = self._of_the_first_process(
            [_constants(config) for config in trainer.lr_scheduler_configs]
        )
        self.record[_SCHEDULES] = fresh
        saved, states, self.schedules = self.saved, self.schedules, []
        self.saved = None
        if saved is None:
            return
        changed = saved.get(_SCHEDULES) != fresh
        if not changed:
            for scheduler, state in zip(schedulers, states, strict=True):
                scheduler.load_state_dict(state)
        for optimizer, made, before in zip(
            trainer.optimizers, self._groups, saved[_OPTIMIZERS], strict=True
        ):
            _update(optimizer, made, before["groups"], follow_schedule=changed)
        if changed:
            for number, config in enumerate(trainer.lr_scheduler_configs):
                done = trainer.global_step if config.interval == "step" else trainer.current_epoch
                if number < len(states) and _counts_as(saved[_SCHEDULES][number], fresh[number]):
                    done = _steps_of(states[number])
                _advance(config.scheduler, done)


def settings_of(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Plain]:
    """Describe all of a run that a resumed one must not change.

    Args:
        trainer: Ready to train.
        module: Its module, with a built student and a loaded teacher.
    """
    data = getattr(trainer, "datamodule", None)
    parts: dict[str, Any] = {"model": module, "data": _of_foreign(data)}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Resumable):
            parts[callback.resume_name or type(callback).__qualname__] = callback
    rows = getattr(data, "batch_size", None)
    clip = trainer.gradient_clip_val or None
    parts["trainer"] = {
        "precision": trainer.precision,
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": clip and (trainer.gradient_clip_algorithm or "norm"),
        "global_batch_size (data.batch_size x processes x accumulate_grad_batches)": rows
        and rows * trainer.world_size * trainer.accumulate_grad_batches,
        "limit_train_batches": trainer.limit_train_batches,
        "overfit_batches": trainer.overfit_batches,  # type: ignore[attr-defined]
    }
    parts["seed_everything"] = run_seed()
    return {name: describe(part) for name, part in parts.items()}


def _refuse(found: Sequence[str]) -> None:
    """Refuse to go on with differences, if there are any.

    Raises:
        ValueError: If there are; it lists them.
    """
    if not found:
        return
    more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise ValueError(
        "the run that saved the checkpoint had another loss, other data or another teacher "
        "(saved -> this run):\n  " + "\n  ".join(found[:SHOWN]) + more + "\n"
        "Resume with the saved values; to change them on purpose, start a new run from the "
        "exported student (model.student.name_or_path). docs/resuming.md says what may change"
    )


def _of_foreign(data: L.LightningDataModule | None) -> Any:
    """Describe a data module of another library by the hyperparameters that it has saved."""
    if data is None or isinstance(data, Resumable):
        return data
    return {"class": type(data).__qualname__, **data.hparams}


def _inner(optimizer: Any) -> Optimizer:
    """Return the optimizer that a strategy has wrapped."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _made(optimizer: Any) -> list[dict[str, Any]]:
    """Return the hyperparameters of each group, as given to the constructor."""
    return [
        # A rate may be a tensor, which its schedule changes in place.
        {name: deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _constants(config: LRSchedulerConfig) -> dict[str, Plain]:
    """Describe a fresh schedule: its numbers, names and functions."""
    stepped = {name: getattr(config, name) for name in (*_STEPPED, "monitor")}
    return {"stepped": stepped, **_of_schedule(config.scheduler)}


def _of_schedule(scheduler: Any) -> dict[str, Plain]:
    """Describe a schedule; its state has neither its functions nor the classes of inner schedules."""
    cls = type(scheduler)
    found: dict[str, Plain] = {"class": cls.__qualname__}
    if is_nameless(cls):
        found |= FunctionDescription(describe).of(cls)
    found |= {name: describe(value) for name, value in sorted(scheduler.state_dict().items())}
    functions: dict[str, Plain] = {}
    for name, value in sorted(vars(scheduler).items()):
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, LRScheduler) for part in parts):
            found[name] = [_of_schedule(part) for part in parts]
        elif any(callable(part) for part in parts):
            functions[name] = [describe(_without_owner(part)) for part in parts]
    return found | {"functions": functions}


def _without_owner(function: Any) -> Any:
    """Return a bound method without its owner, if that is the schedule or the module."""
    owner = getattr(function, "__self__", None)
    own = isinstance(owner, LRScheduler | L.LightningModule)
    return function.__func__ if own else function


def _steps_of(state: dict[str, Any]) -> int:
    """Return the number of steps of a saved schedule; one that chains others counts none itself."""
    inner = state.get("_schedulers", [])
    steps: int = state["last_epoch"] if "last_epoch" in state else _steps_of(inner[0])
    return steps


def _counts_as(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether a saved schedule was stepped as often as this one would have been."""
    return all(saved["stepped"][name] == now["stepped"][name] for name in _STEPPED)


def _update(
    optimizer: Any,
    made: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]],
    *,
    follow_schedule: bool,
) -> None:
    """Update each group of a restored optimizer with options that differ from the saved run's."""
    for group, new, old in zip(optimizer.param_groups, made, before, strict=True):
        changed = {name for name in new if describe(new[name]) != old.get(name)}
        if follow_schedule:  # which begins at its first step, and is then advanced
            changed |= {"lr", "initial_lr"} & new.keys()
        for name in changed:
            group[name] = new[name]
        if group.get("fused") or group.get("capturable"):
            for parameter in group["params"]:
                state = _inner(optimizer).state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device)


def _advance(scheduler: Any, steps: int) -> None:
    """Advance a fresh schedule to a step."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau depends on what has been measured, so its options, and the learning "
            "rate under it, cannot be changed on a resume; start a new run from the exported student"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps of a schedule before those of the optimizer
        for _ in range(steps):
            scheduler.step()
