"""Runs over epochs: what Lightning's options do, and that every checkpoint goes on exactly.

A run that is killed goes on from its last checkpoint, so that going on from each checkpoint of a run
that is not killed covers a kill anywhere.
"""

import csv
import logging
import math
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    model_checkpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import PackedTextData, PromptsAndText
from lightning_kd.generation import SamplingOptions
from lightning_kd.loops.checks import check_limits
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SFT, MiniLLM, SupervisedKD, WarmupCosine
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import LETTERS, letter_tokenizer, ragged_batch, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Events(Callback):
    """What happens in a run, in order."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(("begin", trainer.current_epoch, trainer.num_training_batches))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = batch["row"].tolist()
        loss = outputs["loss"].item().hex()
        tokens = hash(tuple(batch["input_ids"].flatten().tolist()))
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.seen.append(("batch", trainer.current_epoch, batch_idx, rows, tokens, loss, last))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            loss = trainer.callback_metrics["val/loss"].item().hex()
            self.seen.append(("validation", trainer.global_step, loss))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("end", trainer.current_epoch, trainer.global_step))


class Ending(Callback):
    """The state of all callbacks and the weights when a run ends."""

    state = None

    def on_train_end(self, trainer, pl_module):
        stopping = [c.state_dict() for c in trainer.callbacks if isinstance(c, EarlyStopping)]
        saving = []
        for callback in trainer.checkpoint_callbacks:
            state = callback.state_dict()
            for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
                state[name] = Path(state[name]).name
            state["best_k_models"] = {Path(k).name: v for k, v in state["best_k_models"].items()}
            saving.append(state | {"dirpath": None})
        self.state = stopping, saving, trainer.current_epoch, trainer.global_step

    def on_fit_end(self, trainer, pl_module):
        self.weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])


class Logged(L.pytorch.loggers.logger.DummyLogger):
    """Rows of a log by step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        clock = {"train/tokens_per_second", "rollout/tokens_per_second", "rollout/time_share"}
        self.rows.append((step, {k: v for k, v in metrics.items() if k not in clock}))


def saves_everything(folder):
    """One that saves after steps, one after epochs, one the best, and a last of each."""
    common = {"dirpath": folder, "save_top_k": -1, "filename": None}
    return [
        ModelCheckpoint(**common | {"filename": "s{step}"}, every_n_train_steps=1),
        ModelCheckpoint(**common | {"filename": "e{epoch}-{step}"}, every_n_epochs=1),
        ModelCheckpoint(
            **common | {"filename": "b{step}", "save_top_k": 2},
            monitor="val/loss",
            save_on_train_epoch_end=False,
        ),
    ]


def plain(**settings):
    return SFT(
        student=StudentSpec.of(tiny_llama(0, attention_dropout=0.1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2),
        lr_scheduler=lambda o: WarmupCosine(o, 2),
        **settings,
    )


def distilled():
    return SupervisedKD(
        student=StudentSpec.of(tiny_llama(0, attention_dropout=0.1)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )


def on_policy(cls=GKD):
    return cls(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )


def rollouts(**settings):
    return OnPolicyGeneration(
        **({"generation": SamplingOptions(max_new_tokens=4), "table_every": 0} | settings)
    )


def run(
    module,
    folder=None,
    *,
    callbacks=(),
    data=None,
    ckpt_path=None,
    events=None,
    log=None,
    **settings,
):
    """Fit, and return the trainer and what happened: events, ending, log."""
    events, ending, log = events or Events(), Ending(), log or Logged()
    listed = [*callbacks, events, ending]
    if folder is not None:
        settings["enable_checkpointing"] = True
        listed += saves_everything(folder)
    fit = trainer(
        callbacks=listed, logger=log, **({"limit_val_batches": 1.0, "max_epochs": 3} | settings)
    )
    data = data or Letters(rows=10, batch_size=2)
    fit.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return fit, events.seen, ending, log.rows


class Snapshots(TorchCheckpointIO):
    """A copy of the directory as it is after each checkpoint, and how much had happened by then."""

    def __init__(self, folder, kept):
        super().__init__()
        self.folder, self.kept, self.taken = folder, kept, []
        self.seen, self.rows = [], []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        copy = self.kept / str(len(self.taken))
        shutil.copytree(self.folder, copy)
        self.taken.append((copy, Path(path), len(self.seen), len(self.rows)))


def names(folder):
    return {entry.name for entry in folder.iterdir()}


def goes_on_from_every_checkpoint(
    module, root, *, callbacks=list, data=Letters, every=1, later=0, **settings
):
    """Run once, then from each checkpoint with the directory as it was; return the first run.

    ``every`` leaves some out, where there are many of the same kind. With ``later``, that many
    checkpoints have been saved behind the one that the run goes on from.
    """
    folder, kept = root / "run", root / "kept"
    if data is Letters:
        data = partial(Letters, rows=10, batch_size=2)
    folder.mkdir()
    snapshots = Snapshots(str(folder), kept)
    events, log = Events(), Logged()
    snapshots.seen, snapshots.rows = events.seen, log.rows
    whole = run(
        module(),
        folder,
        callbacks=callbacks(),
        data=data(),
        events=events,
        log=log,
        plugins=[snapshots],
        **settings,
    )
    files = names(folder)
    for number in range(len(snapshots.taken) - 1 - later, -1, -every):
        copy, path, seen, rows = snapshots.taken[number]
        shutil.rmtree(folder)
        start = snapshots.taken[number + later][0]
        shutil.copytree(start, folder)
        if not path.exists() or (folder / "last.ckpt").exists():
            shutil.copy(copy / path.name, path)
        again = run(
            module(), folder, callbacks=callbacks(), data=data(), ckpt_path=path, **settings
        )
        name = f"{copy.name}: {path.name}"
        assert again[1] == whole[1][seen:], name
        assert again[3] == whole[3][rows:], name
        assert torch.equal(again[2].weights, whole[2].weights), name
        if again[1] or again[3] or again[2].state:
            assert again[2].state == whole[2].state, name
            # One that was about to be removed may be left over.
            assert files <= names(folder) <= files | names(start), name
        else:  # max_steps had ended it inside an epoch: nothing was left to do
            assert again[0].global_step == whole[0].global_step, name
    return whole, len(snapshots.taken)


def stops(patience=1):
    """Early stopping as soon as the loss has not fallen by 10."""
    return EarlyStopping("val/loss", patience=patience, min_delta=10.0)


def steps_of(seen, what):
    return [event[1 if what == "validation" else 2] for event in seen if event[0] == what]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "callbacks", "validations", "ends"),
    [
        # 10 rows in steps of 4: epochs end with steps 3, 5 and 8.
        ({}, list, [3, 5, 8], [3, 5, 8]),
        ({}, lambda: [stops()], [3, 5], [3, 5]),
        ({"min_epochs": 3}, lambda: [stops()], [3, 5, 8], [3, 5, 8]),
        ({"val_check_interval": 4}, list, [2, 5, 7], [3, 5, 8]),
        ({"val_check_interval": 4}, lambda: [stops()], [2, 5], [3, 5]),
        ({"val_check_interval": 0.5}, list, [1, 2, 3, 4, 5, 6, 7, 8], [3, 5, 8]),
        (
            {"val_check_interval": 6, "check_val_every_n_epoch": None, "max_epochs": 2},
            list,
            [3],
            [3, 5],
        ),
        (
            {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 4},
            list,
            [2, 4],
            [3, 4],
        ),
        ({"check_val_every_n_epoch": 2}, list, [5], [3, 5, 8]),
        ({"max_steps": 4, "max_epochs": -1}, list, [3], [3, 4]),
        ({"max_steps": 20, "max_epochs": 2}, list, [3, 5], [3, 5]),
        ({"limit_train_batches": 2}, list, [1, 2, 3], [1, 2, 3]),
        ({"limit_val_batches": 0, "max_epochs": 2}, list, [], [3, 5]),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, list, [3, 5], [3, 5]),
    ],
)
def test_every_checkpoint_goes_on_exactly(tmp_path, settings, callbacks, validations, ends):
    _, seen, ending, _ = goes_on_from_every_checkpoint(
        plain, tmp_path, accumulate_grad_batches=2, callbacks=callbacks, **settings
    )[0]
    assert steps_of(seen, "validation") == validations
    assert steps_of(seen, "end") == ends
    assert ending.state[3] == ends[-1]


WINDOWS = {"steps_per_window": 2, "passes": 2, "group_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", [GKD, MiniLLM])
def test_windows_of_rollouts_go_on_exactly_over_epochs(tmp_path, method):
    """Ten prompts, twice each; a window has eight completions and is passed over two times."""
    settings = WINDOWS | ({"lmbda": 0.6, "off_policy": "teacher"} if method is GKD else {})
    fit, seen, *_ = goes_on_from_every_checkpoint(
        lambda: on_policy(method),
        tmp_path,
        accumulate_grad_batches=2,
        max_epochs=2,
        every=5,
        callbacks=lambda: [rollouts(**settings)],
    )[0]
    assert [e[2] for e in seen if e[0] == "begin"] == [24, 16]
    assert fit.global_step == 20


def text_beside(folder):
    path = folder / "text.txt"
    path.write_text((LETTERS * 30)[7:])
    blocks = PackedTextData(
        tokenizer=letter_tokenizer(), train=str(path), batch_size=2, block_length=8
    )
    return PromptsAndText(Letters(rows=6, batch_size=2), blocks)


@pytest.mark.slow
def test_a_second_stream_of_text_goes_on_exactly_over_epochs(tmp_path):
    goes_on_from_every_checkpoint(
        lambda: on_policy(MiniLLM),
        tmp_path,
        accumulate_grad_batches=2,
        max_epochs=2,
        limit_val_batches=0,
        every=3,
        data=lambda: text_beside(tmp_path),
        callbacks=lambda: [rollouts(passes=2)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("later", [1, 2])
def test_checkpoints_that_a_kill_has_left_behind_are_written_again(tmp_path, later):
    """Under their own names, not beside themselves with a version."""
    best = {"monitor": "train/loss", "filename": "best", "save_top_k": 2, "save_last": True}
    goes_on_from_every_checkpoint(
        plain,
        tmp_path,
        limit_train_batches=2,
        later=later,
        callbacks=lambda: [ModelCheckpoint(tmp_path / "run", **best)],
    )


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_log_in_the_same_directory_has_every_row_once(tmp_path, logger):
    def rows(folder):
        if logger is CSVLogger:
            return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        seen = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        seen.Reload()
        return {
            # Files of one second are read in the order of their names, of which the last part counts.
            tag: sorted((e.step, e.value) for e in seen.Scalars(tag))
            for tag in seen.Tags()["scalars"]
        }

    def fit(folder, **settings):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        made = logger(tmp_path, name=folder, version="log")
        fit = trainer(
            logger=made, callbacks=[save], enable_checkpointing=True, limit_val_batches=1.0
        )
        fit.fit_loop.max_epochs = 2
        fit.fit(plain(), datamodule=Letters(rows=6, batch_size=2), **settings)
        return tmp_path / folder / "log"

    whole = rows(fit("whole"))
    for step in (2, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from{step}")
        again = fit(f"from{step}", ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert rows(again) == whole


class Plateau(SFT):
    """A rate that falls where a validation brings nothing."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        config = {"scheduler": schedule, "monitor": "val/loss", "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_plateau_is_met_at_the_same_validations(tmp_path, interval):
    def module():
        made = Plateau(student=StudentSpec.of(tiny_llama(0)))
        made.interval = interval
        return made

    *_, log = goes_on_from_every_checkpoint(
        module,
        tmp_path,
        accumulate_grad_batches=2,
        val_check_interval=2,
        every=2,
    )[0]
    rates = [row["train/lr"] for _, row in log if "train/lr" in row]
    assert len(set(rates)) > (1 if interval == "epoch" else 5)


# What Lightning's options do.


def refused(match, module=plain, **settings):
    with pytest.raises(ValueError, match=match):
        run(module(), **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"overfit_batches": 2}, "overfit_batches is 2.*rows to overfit"),
        ({"min_steps": 5, "max_steps": 3}, "min_steps is 5, above trainer.max_steps, 3"),
        ({"min_epochs": 5}, "min_epochs is 5, above trainer.max_epochs, 3"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val is -1.0; it must be 0"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val is nan"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch is 0; it must be 1"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; it must be 1"),
        (
            {"accumulate_grad_batches": 2, "val_check_interval": 5},
            "val_check_interval is 5 micro-batches, which accumulate_grad_batches 2.*Use 4 or 6",
        ),
        (
            {"accumulate_grad_batches": 2, "limit_train_batches": 3},
            "limit_train_batches is 3.* which have 2. Use 2 or 4",
        ),
        (
            {"accumulate_grad_batches": 4, "limit_train_batches": 0.5},
            "limit_train_batches is 0.5.* after 2 micro-batches.* which have 4. Use 4",
        ),
        ({"accumulate_grad_batches": 2, "fast_dev_run": 1}, "fast_dev_run is 1.*Use 2"),
        (
            {"val_check_interval": 6},
            "val_check_interval is 6 .* epochs have 5.*every_n_epoch: null",
        ),
        ({"max_epochs": -1}, "the run has no end.*one pass is 5 optimizer steps.*EarlyStopping"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_first_step(settings, match):
    refused(match, **settings)


@pytest.mark.parametrize(("interval", "steps"), [(9, 4), (2, 1)])
def test_a_run_that_ends_before_its_first_validation_says_so(caplog, interval, steps):
    with caplog.at_level(logging.WARNING):
        _, seen, *_ = run(
            plain(), val_check_interval=interval, check_val_every_n_epoch=None, max_steps=steps
        )
    assert not any(event[0] == "validation" for event in seen)
    assert f"{interval} micro-batches, and the run has {steps}: nothing is validated" in caplog.text
    assert f"set trainer.val_check_interval: {steps}" in caplog.text


def test_limits_that_say_none_are_allowed():
    check_limits(trainer(gradient_clip_val=0, accumulate_grad_batches=1, min_steps=2, max_steps=2))


@pytest.mark.parametrize(("interval", "validations"), [(0.1, 5), (0.4, 2), (1.0, 1)])
def test_an_interval_of_less_than_a_step_is_one_step(interval, validations):
    """Five micro-batches: a tenth of them is none."""
    _, seen, *_ = run(plain(), max_epochs=1, val_check_interval=interval)
    assert sum(event[0] == "validation" for event in seen) == validations


@pytest.mark.filterwarnings("ignore:.*ckpt_path=.*:UserWarning")
@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (GradientAccumulationScheduler({1: 2}), "GradientAccumulationScheduler.*accumulate_grad"),
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging.*use WeightAveraging"),
        (OnExceptionCheckpoint("."), "OnExceptionCheckpoint.*every_n_train_steps"),
        (ModelCheckpoint(save_on_exception=True), "ModelCheckpoint is to save on an exception"),
    ],
)
def test_callbacks_that_could_not_do_what_they_say_are_refused(callback, match):
    refused(match, callbacks=[callback], enable_checkpointing=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_of_weights_goes_on_exactly(tmp_path):
    """What is to be used in place of StochasticWeightAveraging."""
    goes_on_from_every_checkpoint(
        distilled,
        tmp_path,
        max_epochs=2,
        limit_train_batches=2,
        callbacks=lambda: [EMAWeightAveraging(decay=0.5)],
    )


def test_a_window_of_rollouts_is_not_cut_by_a_limit():
    refused(
        r"limit_train_batches is 6.* which have 4. Use 4 or 8",
        lambda: on_policy(),
        callbacks=[rollouts(steps_per_window=2, passes=2)],
        limit_train_batches=6,
    )


def test_a_limit_takes_the_first_micro_batches_of_every_pass():
    _, whole, *_ = run(plain(), limit_val_batches=0)
    _, seen, *_ = run(plain(), limit_val_batches=0, limit_train_batches=2)
    rows = {(e[1], e[2]): e[3] for e in whole if e[0] == "batch"}
    assert [e[3] for e in seen if e[0] == "batch"] == [rows[e, b] for e in range(3) for b in (0, 1)]
    _, half, *_ = run(plain(), limit_val_batches=0, limit_train_batches=0.4)
    assert half == seen


@pytest.mark.slow
def test_the_steps_of_a_run_are_the_sum_over_its_epochs():
    """Also where configure_optimizers asks, and where the run goes on."""
    asked = []

    class Asks(SFT):
        def configure_optimizers(self):
            asked.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    for settings, steps in (
        ({}, 8),
        ({"max_epochs": 2}, 5),
        ({"max_steps": 4}, 4),
        ({"limit_train_batches": 2}, 3),
        ({"max_steps": 7, "max_epochs": -1}, 7),
    ):
        fit, *_ = run(
            Asks(student=StudentSpec.of(tiny_llama(0))), accumulate_grad_batches=2, **settings
        )
        assert asked[-1] == fit.estimated_stepping_batches == fit.global_step == steps


def test_a_cosine_without_an_end_ends_with_the_run():
    *_, log = run(plain(), accumulate_grad_batches=2)
    rates = [row["train/lr"] for _, row in log if "train/lr" in row]
    expected = [1 / 2, 1] + [0.5 * (1 + math.cos(math.pi * s / 6)) for s in range(6)]
    assert rates == pytest.approx([3e-2 * factor for factor in expected])
    with pytest.warns(UserWarning, match=r"warmup_steps is 2 .* ends at 50% of the optimizer's"):
        run(plain(), max_steps=1)
    with pytest.raises(ValueError, match="WarmupCosine ends with the run, and this run has no end"):
        run(plain(), max_epochs=-1, callbacks=[stops()])


def test_a_request_to_stop_waits_for_the_optimizer_step():
    class Asks(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.should_stop or trainer.train_dataloader.position == 3

    fit, seen, *_ = run(plain(), callbacks=[Asks()], accumulate_grad_batches=4, max_epochs=9)
    assert fit.train_dataloader.position == 4
    assert [e[0] for e in seen][-3:] == ["batch", "validation", "end"]


def test_no_checkpoint_is_saved_inside_a_step(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt", weights_only=batch_idx == 0)

    with pytest.raises(
        ValueError, match=r"1.ckpt would be inside an optimizer step \(after 2 of its 3"
    ):
        run(plain(), callbacks=[Saves()], accumulate_grad_batches=3, data=Letters(9, batch_size=1))


def test_a_timed_checkpoint_waits_for_the_end_of_its_step(tmp_path, monkeypatch):
    """A second for each micro-batch; every third falls inside a step of two, now and then."""

    class Clock(Callback):
        now = 0

        def on_train_batch_start(self, *_):
            self.now += 1

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(model_checkpoint, "time", clock)
    timed = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, train_time_interval=timedelta(seconds=3)
    )
    run(plain(), callbacks=[clock, timed], accumulate_grad_batches=2, enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"step={k}.ckpt" for k in (2, 4, 6, 8)}
    for path in tmp_path.iterdir():
        saved = torch.load(path, weights_only=True)
        counts = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert counts["processed"] == 2 * saved["global_step"]


# Other cuts, other versions, other loaders.


def batches(seen):
    """The rows of each step, and the epoch it is in."""
    return [(e[1], e[3]) for e in seen if e[0] == "batch"]


def saved_at(folder, step, **settings):
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    cut = {"accumulate_grad_batches": 2, "data": Letters(10, batch_size=2)}
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    run(module, callbacks=[save], enable_checkpointing=True, **(cut | settings))
    return folder / f"step={step}.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_another_cut_of_the_same_steps_goes_on_in_the_same_epochs(tmp_path, step):
    path = saved_at(tmp_path, step)
    settings = {"data": Letters(10, batch_size=4), "max_epochs": 3}
    _, whole, *_ = run(SFT(student=StudentSpec.of(tiny_llama(0))), **settings)
    fit, seen, *_ = run(SFT(student=StudentSpec.of(tiny_llama(0))), ckpt_path=path, **settings)
    assert batches(seen) == batches(whole)[step:]
    assert steps_of(seen, "validation") == [s for s in (3, 5, 8) if s >= step]
    assert fit.global_step == 8


def test_other_steps_are_refused(tmp_path):
    path = saved_at(tmp_path, 3)
    with pytest.raises(ValueError, match=r"global_batch_size .*: 4 -> 2"):
        run(plain(), ckpt_path=path, data=Letters(10, batch_size=2), max_steps=20)


def as_before(path, position, step):
    """The checkpoint as it was when the run was one epoch, and nothing was written besides."""
    saved = torch.load(path, weights_only=True)
    del saved["lightning_kd_run"]
    loops = saved["loops"]["fit_loop"]
    (loader,) = loops["state_dict"]["combined_loader"]
    loader |= {"samples": position * 2, "window": 0}
    counts = dict.fromkeys(("ready", "started", "processed"), position)
    counts["completed"] = position - 1
    loops["epoch_loop.batch_progress"] = {
        "total": counts,
        "current": counts,
        "is_last_batch": False,
    }
    epochs = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loops["epoch_progress"] = {"total": epochs, "current": epochs}
    torch.save(saved, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("step", "cut_into"), [(1, 2), (3, 2), (4, 2), (1, 1), (4, 1)])
def test_a_checkpoint_of_an_earlier_version_goes_on_in_its_epoch(tmp_path, step, cut_into):
    """It was saved by steps of two micro-batches."""
    path = as_before(saved_at(tmp_path, step), 2 * step, step)
    data = Letters(10, batch_size=4 // cut_into)
    settings = {"data": data, "accumulate_grad_batches": cut_into}
    _, whole, *_ = run(SFT(student=StudentSpec.of(tiny_llama(0))), **settings)
    _, seen, *_ = run(SFT(student=StudentSpec.of(tiny_llama(0))), ckpt_path=path, **settings)
    assert batches(seen) == batches(whole)[cut_into * step :]
    assert steps_of(seen, "validation") == [s for s in (3, 5, 8) if s >= step]


def test_a_checkpoint_from_the_inside_of_a_step_is_refused(tmp_path):
    path = as_before(saved_at(tmp_path, 3), 7, 3)
    with pytest.raises(
        ValueError, match=r"inside an optimizer step: 7 micro-batches .* 3 steps of 2"
    ):
        run(
            SFT(student=StudentSpec.of(tiny_llama(0))),
            ckpt_path=path,
            data=Letters(10, batch_size=2),
            accumulate_grad_batches=2,
        )


def listed():
    ragged = [ragged_batch([(2, 3), (1, 4)], seed=seed) for seed in range(5)]
    return BatchList(ragged, ragged[:1])


@pytest.mark.slow
def test_a_loader_of_ones_own_goes_on_exactly_too(tmp_path):
    """With a last step of one micro-batch in each epoch, as Lightning has it."""
    _, seen, *_ = goes_on_from_every_checkpoint(
        distilled, tmp_path, data=listed, accumulate_grad_batches=2, max_epochs=2
    )[0]
    assert steps_of(seen, "end") == [3, 6]


def test_a_loader_that_gives_nothing_ends_with_an_error():
    class Empty(BatchList):
        def train_dataloader(self):
            class ZeroTerm:
                def __len__(self):
                    return 3

                def __iter__(self):
                    return iter(())

            return ZeroTerm()

    with pytest.raises(ValueError, match="given no batch in epoch 1, though its length is 3"):
        run(plain(), data=Empty(listed().batches), max_steps=4, limit_val_batches=0)
