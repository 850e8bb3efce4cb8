"""States that Lightning's callbacks are restored to, under the settings of this run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.loops.fit import checkpoint_callbacks, early_stoppings

_DECIDES = ("min_delta", "check_finite", "stopping_threshold", "divergence_threshold")
"""Settings that an EarlyStopping compares a measurement with; patience is compared with its count."""


def stopping_settings(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """Return the settings of each ``EarlyStopping``, which Lightning does not save."""
    return {c.state_key: _settings(c) for c in early_stoppings(trainer)}


def under_new_settings(
    trainer: L.Trainer, states: dict[str, Any], stopped_by: Mapping[str, Mapping[str, Any]]
) -> None:
    """Change the saved states of callbacks in place, before they are restored.

    Lightning restores the patience of an ``EarlyStopping`` and a decision that was made under other
    settings, more checkpoints than a lowered ``save_top_k`` leaves, and not which one was best, where
    a ``ModelCheckpoint`` has another directory.

    Args:
        trainer: Its callbacks have been set up.
        states: Of its callbacks, from a checkpoint.
        stopped_by: The settings of each ``EarlyStopping`` of the run that saved.
    """
    for stopping in early_stoppings(trainer):
        if (state := states.get(stopping.state_key)) is not None:
            state["patience"] = stopping.patience
            before = stopped_by.get(stopping.state_key, _settings(stopping))
            if not _still_stopped(stopping, state, before):
                reason = EarlyStoppingReason.NOT_STOPPED.value
                state |= {"stopping_reason": reason, "stopped_epoch": 0}
                state["stopping_reason_message"] = None
    for saving in checkpoint_callbacks(trainer):
        if (state := states.get(saving.state_key)) is not None:
            if state["dirpath"] != saving.dirpath:
                _take_along(trainer, state)
                state |= {"dirpath": saving.dirpath, "last_model_path": ""}
            _rank(saving, state)


def for_evaluation(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Change the saved states of callbacks in place, before an evaluation restores them.

    An evaluation has no directory of its own, and Lightning warns of every other than the saved one.
    """
    for saving in checkpoint_callbacks(trainer):
        if saving.state_key in states:
            states[saving.state_key]["dirpath"] = saving.dirpath


def _settings(stopping: EarlyStopping) -> dict[str, Any]:
    return {name: getattr(stopping, name) for name in _DECIDES}


def _still_stopped(
    stopping: EarlyStopping, state: Mapping[str, Any], before: Mapping[str, Any]
) -> bool:
    """Return whether a decision to stop holds under the settings of this run."""
    if before != _settings(stopping):
        return False
    exhausted = state.get("stopping_reason") == EarlyStoppingReason.PATIENCE_EXHAUSTED.value
    return not exhausted or bool(state["wait_count"] >= stopping.patience)


def _take_along(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Find the best checkpoints of the run that saved; they stay where they are."""
    beside = Path(str(trainer.ckpt_path)).absolute().parent
    best = {**state["best_k_models"]}
    if state["best_model_path"]:
        best.setdefault(state["best_model_path"], state["best_model_score"])
    places = {path: _found(path, beside) for path in best}
    places = trainer.strategy.broadcast(places)
    lost = sorted(path for path, place in places.items() if place is None)
    if lost:
        rank_zero_warn(
            f"{', '.join(lost)} does not exist any more, so it is no longer among the best "
            "checkpoints of this run"
        )
    kept = {place: best[path] for path, place in places.items() if place is not None}
    state["best_k_models"] = {p: v for p, v in kept.items() if v is not None}
    if places.get(state["best_model_path"]) is None:
        state |= {"best_model_path": "", "best_model_score": None}
    else:
        state["best_model_path"] = places[state["best_model_path"]]


def _found(path: str, beside: Path) -> str | None:
    """Return the path of a checkpoint; the run may have been moved."""
    if "://" in path:
        return path
    places = [Path(path), beside / Path(path).name]
    return next((str(place) for place in places if place.exists()), None)


def _rank(saving: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Keep the ``save_top_k`` best, and set the best and the worst of them, as Lightning does."""
    best = state["best_k_models"]
    if not best or saving.monitor is None:
        return
    descending = saving.mode == "max"
    if saving.save_top_k > 0:
        ranked = sorted(best, key=best.__getitem__, reverse=descending)[: saving.save_top_k]
        best = {path: score for path, score in best.items() if path in ranked}
    # Of equal ones Lightning takes the first.
    least, most = min(best, key=best.__getitem__), max(best, key=best.__getitem__)
    first, last = (most, least) if descending else (least, most)
    state |= {"best_k_models": best, "best_model_path": first, "best_model_score": best[first]}
    if len(best) == saving.save_top_k:  # the next one has to be better than this one
        state |= {"kth_best_model_path": last, "kth_value": best[last]}
