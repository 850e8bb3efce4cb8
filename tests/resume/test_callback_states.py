"""What callbacks are restored to: what they have seen, under other settings than those that saved."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lightning_kd.loops.callback_states import stopping_settings, under_new_settings

EXHAUSTED, THRESHOLD = (
    EarlyStoppingReason.PATIENCE_EXHAUSTED.value,
    EarlyStoppingReason.STOPPING_THRESHOLD.value,
)


def trainer(callback):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, callbacks=[callback], max_steps=1, **quiet)


def stopped(reason, waited, before, after):
    """The state of a run that stopped in epoch 7, as one with other settings restores it."""
    saved, now = EarlyStopping("val/loss", **before), EarlyStopping("val/loss", **after)
    state = {"wait_count": waited, "stopped_epoch": 7, "patience": saved.patience}
    state |= {"stopping_reason": reason, "stopping_reason_message": "as it was"}
    settings = {now.state_key: stopping_settings(trainer(saved))[saved.state_key]}
    under_new_settings(trainer(now), {now.state_key: state}, settings)
    return state


@pytest.mark.parametrize(
    ("reason", "waited", "before", "after", "holds"),
    [
        (EXHAUSTED, 2, {"patience": 2}, {"patience": 2}, True),
        (EXHAUSTED, 2, {"patience": 2}, {"patience": 1}, True),
        (EXHAUSTED, 2, {"patience": 2}, {"patience": 3}, False),
        (EXHAUSTED, 2, {"patience": 2}, {"patience": 2, "min_delta": 0.5}, False),
        (THRESHOLD, 0, {"stopping_threshold": 1.0}, {"stopping_threshold": 1.0}, True),
        (THRESHOLD, 0, {"stopping_threshold": 1.0}, {"stopping_threshold": 0.5}, False),
    ],
)
def test_a_decision_to_stop_holds_under_the_settings_that_would_make_it(
    reason, waited, before, after, holds
):
    state = stopped(reason, waited, before, after)
    assert state["patience"] == after.get("patience", 3)
    assert state["wait_count"] == waited
    told = state["stopping_reason"], state["stopped_epoch"], state["stopping_reason_message"]
    nothing = (EarlyStoppingReason.NOT_STOPPED.value, 0, None)
    assert told == ((reason, 7, "as it was") if holds else nothing)


@pytest.mark.parametrize(("mode", "ranked"), [("min", "bcda"), ("max", "adcb")])
@pytest.mark.parametrize("most", [-1, 1, 2, 3])
def test_the_best_are_those_of_the_order_that_is_asked_for(mode, ranked, most, tmp_path):
    scores = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 3.0}
    saving = ModelCheckpoint(tmp_path, monitor="val/loss", mode=mode, save_top_k=most)
    state = {
        "dirpath": saving.dirpath,
        "best_k_models": {k: torch.tensor(v) for k, v in scores.items()},
    }
    state |= {"kth_best_model_path": "z", "best_model_path": "z"}
    under_new_settings(trainer(saving), {saving.state_key: state}, {})
    kept = ranked if most == -1 else ranked[:most]
    assert sorted(state["best_k_models"]) == sorted(kept)
    assert (state["best_model_path"], state["best_model_score"]) == (ranked[0], scores[ranked[0]])
    # The next one has to be better than the worst, where there are as many as are kept.
    assert state["kth_best_model_path"] == ("z" if most == -1 else kept[-1])
