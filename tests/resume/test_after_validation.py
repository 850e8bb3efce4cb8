"""What decides by a metric of validation: the weights it was measured on are those that are ranked."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def module(turns=3):
    """Its loss falls for so many steps, and then rises."""
    return SFT(
        student=StudentSpec.of(tiny_llama(0)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: 1.0 if step < turns else -1.0
        ),
    )


def fit(callbacks, **settings):
    settings = {"limit_val_batches": 1.0, "max_epochs": -1, "max_steps": 6} | settings
    settings |= {"enable_checkpointing": True, "callbacks": callbacks}
    resume = settings.pop("resume", None)
    run, of = trainer(**settings), module()
    data = Letters(rows=10, batch_size=2)
    run.fit(of, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return run


def measured(path):
    """The loss of validation, of weights alone: in a run of its own."""
    own = module()
    run = trainer(limit_val_batches=1.0)
    (result,) = run.validate(
        own,
        datamodule=Letters(rows=10, batch_size=2),
        ckpt_path=path,
        weights_only=True,
        verbose=False,
    )
    return result["val/loss"]


EVERY_STEP = {"val_check_interval": 2, "accumulate_grad_batches": 2}
EVERY_STEP |= {"check_val_every_n_epoch": None}


def best(folder, **options):
    options = {"every_n_train_steps": 1, "save_top_k": 1} | options
    return ModelCheckpoint(folder, "{step}", monitor="val/loss", **options)


def test_the_best_checkpoint_is_the_one_with_the_lowest_loss_of_validation(tmp_path):
    every = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    saving = best(tmp_path / "best", save_last=True)
    fit([saving, every], **EVERY_STEP)
    losses = {path.name: measured(path) for path in (tmp_path / "all").iterdir()}
    assert len(losses) == 6
    lowest = min(losses, key=losses.get)
    assert lowest == "step=3.ckpt"
    assert Path(saving.best_model_path).name == lowest
    assert saving.best_model_score.item() == pytest.approx(losses[lowest], rel=1e-6)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {lowest, "last.ckpt"}
    assert torch.load(tmp_path / "best/last.ckpt", weights_only=True)["global_step"] == 6
    assert measured(saving.best_model_path) == losses[lowest]


@pytest.mark.slow
@pytest.mark.parametrize("from_step", [2, 4])
@pytest.mark.parametrize("source", ["all", "best"])
def test_a_run_that_goes_on_ranks_the_same(tmp_path, from_step, source):
    """From before the validation of a step, and from behind it."""

    def callbacks(folder):
        every = ModelCheckpoint(folder / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
        return [best(folder / "best", every_n_train_steps=2, save_top_k=-1), every]

    def ranking(saving):
        return {Path(path).name: score.item() for path, score in saving.best_k_models.items()}

    first, again = callbacks(tmp_path / "first"), callbacks(tmp_path / "again")
    fit(first, **EVERY_STEP)
    fit(again, resume=tmp_path / "first" / source / f"step={from_step}.ckpt", **EVERY_STEP)
    assert list(ranking(first[0])) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert ranking(again[0]) == ranking(first[0])


def test_an_epoch_that_is_cut_short_is_not_ranked_by_the_validation_of_another(tmp_path):
    """Epochs of five steps, and a run of six: the last step is not validated."""
    saving = best(tmp_path, every_n_train_steps=None, save_top_k=-1)
    stopping = EarlyStopping("val/loss", patience=9, min_delta=10.0)
    run = fit([saving, stopping], val_check_interval=1.0)
    assert run.global_step == 6
    assert [Path(path).name for path in saving.best_k_models] == ["step=5.ckpt"]
    assert stopping.wait_count == 0


@pytest.mark.parametrize(
    ("options", "settings", "match"),
    [
        (
            {"every_n_train_steps": 3},
            {"val_check_interval": 4, "accumulate_grad_batches": 2},
            "ranks by val/loss and has every_n_train_steps 3, but step 3 .* multiple of 2, .*add",
        ),
        (
            {"every_n_train_steps": 1},
            {"val_check_interval": 2},
            "every_n_train_steps 1, but step 1 .* Drop every_n_train_steps",
        ),
        (
            {"every_n_train_steps": 5},
            {"val_check_interval": 1.0, "check_val_every_n_epoch": 2, "max_steps": 10},
            "every_n_train_steps 5, but step 5",
        ),
        (
            {"every_n_train_steps": 1},
            {"val_check_interval": timedelta(seconds=9)},
            "every_n_train_steps 1, but step 1",
        ),
        (
            {"every_n_train_steps": None, "save_on_train_epoch_end": True},
            {"val_check_interval": 2},
            "save_on_train_epoch_end, but not every epoch ends with a validation",
        ),
        (
            {"every_n_train_steps": None, "every_n_epochs": 3},
            {"check_val_every_n_epoch": 2, "max_epochs": 6, "max_steps": -1},
            "every_n_epochs 3, .*check_val_every_n_epoch 2",
        ),
    ],
)
def test_a_save_that_no_validation_follows_is_refused(tmp_path, options, settings, match):
    settings = {"check_val_every_n_epoch": None} | settings
    if settings.get("val_check_interval") == 1.0:
        settings["check_val_every_n_epoch"] = settings["check_val_every_n_epoch"] or 1
    with pytest.raises(ValueError, match=match):
        fit([best(tmp_path, **options)], **settings)
    assert not list(tmp_path.iterdir())


def test_early_stopping_by_epochs_that_are_not_validated_is_refused():
    stopping = EarlyStopping("val/loss", check_on_train_epoch_end=True)
    with pytest.raises(ValueError, match="check_on_train_epoch_end, but not every epoch ends"):
        fit([stopping], check_val_every_n_epoch=2, max_steps=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        # Five micro-batches are an epoch.
        ({"every_n_train_steps": 5}, {"val_check_interval": 1.0}),
        ({"every_n_train_steps": 2}, {"val_check_interval": 2, "check_val_every_n_epoch": None}),
        ({"every_n_train_steps": 1, "save_top_k": 0}, {"val_check_interval": 5}),
        ({"every_n_train_steps": None, "save_on_train_epoch_end": True}, {}),
    ],
)
def test_saves_that_validations_follow_are_allowed(tmp_path, options, settings):
    saving = best(tmp_path, **options)
    fit([saving], max_steps=10, **{k: v for k, v in settings.items() if k != "max_steps"})
    assert bool(saving.best_k_models) == (saving.save_top_k != 0)
    for path, score in saving.best_k_models.items():
        assert score.item() == pytest.approx(measured(path), rel=1e-6)


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss"])
def test_early_stopping_where_validation_goes_by_time_also_on_a_resume(tmp_path, monitor):
    def stopping():
        return EarlyStopping(monitor, patience=2, min_delta=10.0)

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    by_time = {"val_check_interval": timedelta(seconds=0), "check_val_every_n_epoch": None}
    assert fit([stopping(), keep], **by_time).global_step == 3
    before = fit([stopping(), keep], max_steps=2, val_check_interval=2)
    assert before.global_step == 2
    after = fit([stopping()], resume=tmp_path / "step=2-v1.ckpt", **by_time)
    assert after.global_step == 4  # after the second one in vain


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_epochs": 1}, r"ends, by trainer\.max_epochs 1, before its first validation"),
        (
            {"max_epochs": 2, "limit_train_batches": 3},
            r"ends, by trainer\.max_epochs 2, before its first validation, after 1000",
        ),
        ({"max_epochs": 2, "max_steps": 7}, r"ends, by trainer\.max_steps 7, before its first"),
    ],
)
@pytest.mark.parametrize("callback", [EarlyStopping, ModelCheckpoint])
def test_a_run_that_epochs_end_before_its_first_validation_is_refused(callback, settings, match):
    settings = {"max_steps": -1, "val_check_interval": 1000} | settings
    with pytest.raises(ValueError, match=match):
        fit([callback(monitor="val/loss")], check_val_every_n_epoch=None, **settings)


@pytest.mark.parametrize("interval", [10, 6])
def test_a_validation_that_comes_in_a_later_epoch_is_one(interval):
    """Ten micro-batches in two epochs."""
    run = fit(
        [EarlyStopping("val/loss")],
        max_steps=-1,
        max_epochs=2,
        val_check_interval=interval,
        check_val_every_n_epoch=None,
    )
    assert "val/loss" in run.callback_metrics


class Sometimes(Callback):
    """Measures in every other validation, at first better and then worse."""

    def __init__(self, every=2):
        self.every, self.validations = every, 0

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            if self.validations % self.every == 0:
                pl_module.log("val/rare", abs(trainer.global_step - 3.0))
            self.validations += 1

    def state_dict(self):
        return {"validations": self.validations}

    def load_state_dict(self, state):
        self.validations = state["validations"]


class Plateau(ReduceLROnPlateau):
    """Counts how often it is asked."""

    steps: tuple = ()

    def step(self, metrics, epoch=None):
        self.steps = (*self.steps, float(metrics))
        super().step(metrics)


def rare(folder, resume=None, **options):
    saving = ModelCheckpoint(
        folder / "rare", "{step}", monitor="val/rare", save_top_k=-1, **options
    )
    every = ModelCheckpoint(folder / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    stopping = EarlyStopping("val/rare", patience=20, min_delta=100.0)
    run, of = (
        trainer(
            limit_val_batches=1.0,
            max_epochs=-1,
            max_steps=6,
            enable_checkpointing=True,
            callbacks=[Sometimes(), saving, every, stopping],
            **EVERY_STEP,
        ),
        SFT(
            student=StudentSpec.of(tiny_llama(0)),
            lr_scheduler=lambda o: Plateau(o, monitor="val/rare", patience=0),
        ),
    )
    data = Letters(rows=10, batch_size=2)
    run.fit(of, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    scores = {Path(path).name: score.item() for path, score in saving.best_k_models.items()}
    return scores, stopping.wait_count, run.lr_scheduler_configs[0].scheduler


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 1}])
def test_what_watches_a_rare_metric_decides_where_it_is_measured(tmp_path, options):
    """After validations 1, 3 and 5, by their own weights, not by a value of the one before."""
    scores, waited, plateau = rare(tmp_path, **options)
    assert scores == {"step=1.ckpt": 2.0, "step=3.ckpt": 0.0, "step=5.ckpt": 2.0}
    assert waited == 2  # the first one is the best so far
    assert plateau.steps == (2.0, 0.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("place", ["all", "rare"])
def test_so_does_a_run_that_goes_on(tmp_path, step, place):
    whole = rare(tmp_path / "whole")
    if place == "rare":
        step = 3
    again = rare(tmp_path / "again", tmp_path / "whole" / place / f"step={step}.ckpt")
    assert again[:2] == whole[:2]
    assert again[2].state_dict()["num_bad_epochs"] == whole[2].state_dict()["num_bad_epochs"]
    assert again[2].state_dict()["best"] == whole[2].state_dict()["best"]


class Shrinks(SFT):
    """One that changes its weights in hooks of its own."""

    at = "on_train_batch_end"

    def shrink(self, hook):
        if hook == self.at:
            self.calls = getattr(self, "calls", 0) + 1
            with torch.no_grad():
                for weight in self.student.parameters():
                    weight.mul_(0.9)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["loss"].isfinite()
        assert len(batch["row"]) == 2
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.shrink("on_train_batch_end")

    def on_validation_end(self):
        self.shrink("on_validation_end")

    def on_train_epoch_end(self):
        self.shrink("on_train_epoch_end")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "times", "saves"),
    [
        ("on_train_batch_end", 6, {"every_n_train_steps": 5}),
        ("on_validation_end", 6, {"monitor": "val/loss", "save_top_k": -1}),
        ("on_train_epoch_end", 2, {"save_on_train_epoch_end": True, "save_top_k": -1}),
    ],
)
def test_what_a_module_does_in_hooks_of_its_own_is_in_the_checkpoint(tmp_path, hook, times, saves):
    def end(folder, resume=None):
        torch.manual_seed(0)
        made = Shrinks(student=StudentSpec.of(tiny_llama(0)))
        made.at = hook
        keep = ModelCheckpoint(tmp_path / folder, "{step}", **saves)
        run = trainer(
            limit_val_batches=1.0,
            enable_checkpointing=True,
            callbacks=[keep],
            val_check_interval=1,
            max_epochs=-1,
            max_steps=6,
        )
        data = Letters(rows=10, batch_size=2)
        run.fit(made, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        assert hook not in vars(made)
        return made

    whole = end("whole")
    assert whole.calls == times
    again = end("again", tmp_path / "whole/step=5.ckpt")
    assert again.calls == 1
    for expected, found in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_an_evaluation_has_no_directory_of_checkpoints_to_warn_of(tmp_path):
    fit(
        [ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)],
        val_check_interval=2,
    )
    run = trainer(
        limit_val_batches=1.0,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(monitor="val/loss", save_top_k=-1)],
    )
    path = next(tmp_path.glob("*.ckpt"))
    data = Letters(rows=10, batch_size=2)
    run.validate(module(), datamodule=data, ckpt_path=path, weights_only=True)
    assert run.checkpoint_callback.best_model_path.startswith(str(tmp_path))
