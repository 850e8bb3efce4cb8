import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.callbacks.rollouts.statistics import RolloutStatistics
from lightning_kd.data import Collator, PromptCompletionData, RolloutPlan
from lightning_kd.generation import Completions, SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import (
    GKD,
    SFT,
    MiniLLM,
    OfficialCode,
    OnPolicyDistillation,
    Paper,
    RLDistillation,
)
from lightning_kd.schedules import Linear
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from tests.callbacks.two_rank_rollouts import STEPS, run
from tests.support.harness import BatchList, Letters, trainer
from tests.support.scripts import run_script
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

ROOT = Path(__file__).resolve().parents[2]


class Seen(Callback):
    """Record of the batches that the module receives, and of gradients."""

    def __init__(self) -> None:
        self.batches, self.gradients = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append({k: v.clone() for k, v in batch.items() if torch.is_tensor(v)})

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])


class Saves(Callback):
    """Checkpoint after every optimizer step, without state of this callback."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


def models(student=0, teacher=1, **settings):
    return {
        "student": StudentSpec.of(tiny_llama(student, **settings)),
        "teacher": LocalTeacher.of(tiny_llama(teacher)),
    }


def fit(module, *, steps=2, batch_size=4, options=(), more=(), data=None, ckpt=None, **settings):
    seen = Seen()
    generation = OnPolicyGeneration(
        **({"generation": SamplingOptions(max_new_tokens=6), "table_every": 0} | dict(options))
    )
    lightning = trainer(
        max_steps=steps, max_epochs=-1, callbacks=[generation, seen, *more], **settings
    )
    lightning.fit(
        module, datamodule=data or Letters(batch_size=batch_size), ckpt_path=ckpt, weights_only=True
    )
    return lightning, seen


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Which model generates.


@pytest.mark.processes
def test_all_ranks_choose_the_same_windows(tmp_path):
    """Two ranks, 200 steps; one rank also draws from global random generators."""
    run_script("callbacks/two_rank_rollouts.py", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first == second
    assert len(first) == STEPS
    assert 70 < sum(first) < 130
    alone = run(tmp_path / "alone.jsonl", draws=False, world=1)
    assert alone == first
    # The first windows come before weights have moved apart by rounding: the same texts.
    both = [records(tmp_path / name)[:8] for name in ("rollouts.jsonl", "alone.jsonl")]
    assert both[0] == both[1]


@pytest.mark.slow
def test_a_resumed_run_chooses_the_same_windows(tmp_path):
    options = {"lmbda": 0.5}
    _, whole = fit(GKD(**models()), steps=20, options=options, more=[Saves(tmp_path)])
    for done in (7, 14):
        _, rest = fit(
            GKD(**models()), steps=20, options=options, ckpt=tmp_path / f"step{done}.ckpt"
        )
        assert len(rest.batches) == 20 - done
        for a, b in zip(rest.batches, whole.batches[done:], strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(rest.gradients, whole.gradients[done:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_lmbda_is_the_share_of_windows_and_may_be_scheduled():
    generation = OnPolicyGeneration(lmbda=0.3)
    assert sum(generation.is_on_policy(k, k) for k in range(4000)) / 4000 == pytest.approx(
        0.3, abs=0.03
    )
    assert not any(OnPolicyGeneration(lmbda=0.0).is_on_policy(k, k) for k in range(100))
    assert all(OnPolicyGeneration(lmbda=1.0).is_on_policy(k, k) for k in range(100))
    rising = OnPolicyGeneration(lmbda=Linear(0.0, 1.0, steps=1000))
    halves = [
        sum(rising.is_on_policy(k, k) for k in range(start, start + 500)) for start in (0, 500)
    ]
    assert halves[0] / 500 == pytest.approx(0.25, abs=0.06)
    assert halves[1] / 500 == pytest.approx(0.75, abs=0.06)


def test_completions_of_the_dataset_are_unchanged():
    _, seen = fit(GKD(**models()), options={"lmbda": 0.0})
    plain = Letters(batch_size=4)
    loader = trainer(max_steps=2, max_epochs=-1)
    plain.trainer = loader
    plain.setup("fit")
    assert len(seen.batches) == 2
    for got, expected in zip(seen.batches, plain.train_dataloader(), strict=False):
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert torch.equal(got["labels"], expected["labels"])


def test_student_and_teacher_generate_their_own_completions():
    """Near temperature 0, these are the most likely tokens of each."""
    options = {"generation": SamplingOptions(max_new_tokens=5, temperature=1e-4)}
    for writer, seed, settings in (
        ("student", 0, {"lmbda": 1.0}),
        ("teacher", 1, {"lmbda": 0.0, "off_policy": "teacher"}),
    ):
        _, seen = fit(GKD(**models()), steps=1, options=options | settings)
        model = tiny_llama(seed).eval()
        (batch,) = seen.batches
        expected = model.generate(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )[:, batch["prompt_ids"].shape[1] :]
        for row in range(4):
            own = batch["input_ids"][row][batch["completion_mask"][row]]
            assert torch.equal(own, expected[row][: len(own)]), writer
            assert torch.equal(batch["labels"][row][batch["completion_mask"][row]], own)


# Windows.


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "window"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_completion_does_not_depend_on_the_micro_batches(tmp_path, batch_size, window):
    paths = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path, size, cut in zip(paths, (8, batch_size), (1, window), strict=True):
        options = {"path": str(path), "rows_at_once": 3}
        fit(GKD(**models()), batch_size=size, accumulate_grad_batches=cut, options=options, steps=1)
    assert records(paths[0]) == records(paths[1])
    assert len(records(paths[0])) == 8


def test_recorded_completions_are_read_as_the_tokens_that_were_trained_on(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    _, seen = fit(GKD(**models()), steps=3, options={"path": str(path)})
    rows = PromptCompletionData(tokenizer=letter_tokenizer(), train=str(path)).rows("train")
    trained = [
        (ids[mask.bool()].tolist(), int((mask.bool() & (labels < 0)).sum()))
        for batch in seen.batches
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]
    examples = [rows.example(k, 0) for k in range(len(rows))]
    assert [(row.input_ids, row.prompt_length) for row in examples] == trained
    ended = [row["ended"] for row in records(path)]
    assert ended == [ids[-1] == 1 for ids, _ in trained]
    assert set(ended) == {True, False}


def test_a_window_is_generated_once_and_trained_on_several_times():
    _, seen = fit(
        OnPolicyDistillation(**models()),
        steps=8,
        options={"passes": 2, "steps_per_window": 2},
    )
    ids = [batch["input_ids"] for batch in seen.batches]
    for window in (0, 4):
        for k in (0, 1):
            first, again = seen.batches[window + k], seen.batches[window + k + 2]
            assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(ids[0], ids[1])
    assert ids[0].shape != ids[4].shape or not torch.equal(ids[0], ids[4])
    # The student has moved on: the same text has another gradient.
    assert any(
        not torch.equal(a, b) for a, b in zip(seen.gradients[0], seen.gradients[2], strict=True)
    )


@pytest.mark.slow
def test_a_run_resumed_inside_a_window_continues_bit_for_bit(tmp_path):
    options = {"passes": 2, "steps_per_window": 2, "mixture_alpha": 0.2}
    module = MiniLLM(**models(attention_dropout=0.1), objective=OfficialCode())
    _, whole = fit(module, steps=8, options=options, more=[Saves(tmp_path)])
    for stop in range(1, 8):
        resumed = MiniLLM(**models(attention_dropout=0.1), objective=OfficialCode())
        _, rest = fit(resumed, steps=8, options=options, ckpt=tmp_path / f"step{stop}.ckpt")
        assert len(rest.gradients) == 8 - stop
        for a, b in zip(rest.gradients, whole.gradients[stop:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4)])
def test_a_window_from_a_checkpoint_is_not_cut_again(tmp_path, batch_size, accumulate):
    options = {"steps_per_window": 2}
    saved = {"batch_size": 4, "accumulate_grad_batches": 2}
    other = {"batch_size": batch_size, "accumulate_grad_batches": accumulate}
    fit(GKD(**models()), steps=2, options=options, more=[Saves(tmp_path)], **saved)
    own = f"{2 * accumulate} of {batch_size}"
    message = f"window of 4 micro-batches of 4 rows, and this run cuts windows into {own}:"
    with pytest.raises(ValueError, match=message):
        fit(GKD(**models()), steps=4, options=options, ckpt=tmp_path / "step1.ckpt", **other)
    at_its_end = tmp_path / "step2.ckpt"
    _, rest = fit(GKD(**models()), steps=4, options=options, ckpt=at_its_end, **other)
    assert len(rest.batches) == 2 * accumulate


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", ["max_steps", "an exception"])
@pytest.mark.parametrize("options", [{"steps_per_window": 3}, {"passes": 3}], ids=str)
def test_a_window_that_was_left_unfinished_is_not_trained_on_by_the_next_run(options, ended_by):
    class Fails(Callback):
        def on_train_batch_end(self, *_) -> None:
            if ended_by == "an exception":
                raise RuntimeError

    class Keeps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch["input_ids"])

    def run(generation, student, data, *more, steps):
        lightning = trainer(max_steps=steps, callbacks=[generation, Keeps(), *more])
        lightning.fit(GKD(**models(student)), datamodule=data)

    def generation():
        sampling = SamplingOptions(max_new_tokens=6)
        return OnPolicyGeneration(generation=sampling, table_every=0, **options)

    used, seen = generation(), []
    with nullcontext() if ended_by == "max_steps" else pytest.raises(RuntimeError):
        run(used, 5, Letters(24, batch_size=4), Fails(), steps=1)
    seen.clear()
    run(used, 0, Letters(30, batch_size=4), steps=3)
    again = list(seen)
    seen.clear()
    run(generation(), 0, Letters(30, batch_size=4), steps=3)
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in seen]


class Masks(Callback):
    """Takes one more label of each row away, in place."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        for labels in batch["labels"]:
            labels[(labels >= 0).nonzero()[0]] = -100


def test_a_checkpoint_of_a_callback_in_front_does_not_keep_a_window_that_has_ended(tmp_path):
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=6), table_every=0, steps_per_window=2
    )
    lightning = trainer(max_steps=3, callbacks=[Saves(tmp_path), generation])
    lightning.fit(GKD(**models()), datamodule=Letters(batch_size=4))
    kept = [
        "window"
        in torch.load(tmp_path / f"step{k}.ckpt", weights_only=True)["on_policy_generation"]
        for k in (1, 2, 3)
    ]
    assert kept == [True, False, True]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_what_a_callback_does_to_a_batch_does_not_last_into_the_next_pass(tmp_path, lmbda):
    options, more = {"passes": 3, "lmbda": lmbda}, [Masks()]
    _, whole = fit(GKD(**models()), steps=6, options=options, more=[*more, Saves(tmp_path)])
    labels = [batch["labels"].tolist() for batch in whole.batches]
    assert labels[0] == labels[1] == labels[2] != labels[3]
    _, rest = fit(
        GKD(**models()), steps=6, options=options, more=more, ckpt=tmp_path / "step1.ckpt"
    )
    for a, b in zip(rest.gradients, whole.gradients[1:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_line_that_was_being_written_when_a_run_was_killed_is_written_anew(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    options = {"path": str(path)}
    fit(GKD(**models()), steps=4, options=options, more=[Saves(tmp_path)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fit(GKD(**models()), steps=4, options=options, ckpt=tmp_path / "step2.ckpt")
    assert path.read_bytes() == whole
    path.write_bytes(b"nothing of ours\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .*rollouts.jsonl is no record"):
        fit(GKD(**models()), steps=4, options=options, ckpt=tmp_path / "step2.ckpt")


def test_a_new_run_does_not_write_over_the_completions_of_another(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=6), table_every=0, path=str(path)
    )

    def run(steps):
        lightning = trainer(max_steps=steps, callbacks=[generation])
        lightning.fit(GKD(**models()), datamodule=Letters(batch_size=4))

    run(3)
    whole = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"rollouts.jsonl', which exists, and this run goes on from no"
    ):
        run(2)
    assert path.read_bytes() == whole
    path.unlink()
    run(2)
    assert [row["sample"] for row in records(path)] == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_an_unfinished_window_is_no_matter_of_an_evaluation(tmp_path, stage):
    options = {"steps_per_window": 3}
    _, fitted = fit(GKD(**models()), steps=1, options=options, more=[Saves(tmp_path)])
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=6), table_every=0, **options
    )
    saved = torch.load(tmp_path / "step1.ckpt", weights_only=True)
    saved["on_policy_generation"]["ranks"] *= 2  # of two processes
    torch.save(saved, tmp_path / "two.ckpt")
    evaluate = getattr(trainer(callbacks=[generation]), stage)
    evaluate(
        GKD(**models()), datamodule=Letters(), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    seen = Seen()
    again = trainer(max_steps=1, callbacks=[generation, seen])
    again.fit(GKD(**models()), datamodule=Letters(batch_size=4))
    assert torch.equal(seen.batches[0]["input_ids"], fitted.batches[0]["input_ids"])


def test_a_share_of_the_datas_completions_needs_some():
    class PromptsAlone(Letters):
        def example(self, row, pass_):
            found = super().example(row, pass_)
            return replace(found, input_ids=found.input_ids[: found.prompt_length], completion="")

        max_lengths = (5, 5)

    data = PromptsAlone(batch_size=4)
    with pytest.raises(ValueError, match="the data has prompts alone; set lmbda: 1"):
        fit(GKD(**models()), data=data, options={"lmbda": 0.5})


def test_rollouts_of_a_resumed_run_are_recorded_once(tmp_path):
    path = tmp_path / "new" / "folder" / "rollouts.jsonl"
    options = {"path": str(path)}
    fit(GKD(**models()), steps=4, options=options, more=[Saves(tmp_path)])
    whole = records(path)
    fit(GKD(**models()), steps=4, options=options, ckpt=tmp_path / "step2.ckpt")
    assert records(path) == whole
    assert [row["sample"] for row in whole] == list(range(16))
    names = {"window", "sample", "row", "prompt", "completion"}
    ids = {"prompt_ids", "completion_ids", "ended", "tokenizer_fingerprint"}
    assert whole[0].keys() == names | ids


# Scored tokens.


@pytest.mark.parametrize("policy", ["keep", "mask", "drop"])
def test_the_count_follows_the_treatment_of_truncated_completions(policy):
    lightning, seen = fit(GKD(**models()), steps=1, batch_size=12, options={"truncated": policy})
    (batch,) = seen.batches
    written = batch["completion_mask"]
    ended = ((batch["input_ids"] == 1) & written).any(-1)
    assert 0 < ended.sum() < 12
    kept = written if policy == "keep" else written[ended]
    assert lightning.callback_metrics["train/tokens"] == kept.sum()
    assert (batch["row"] < 0).sum() == (0 if policy != "drop" else (~ended).sum())


def test_padding_prompts_and_tokens_after_the_eos_have_no_gradient():
    """Logits at these positions have no gradient: their tokens change nothing."""
    for make in (OnPolicyDistillation, MiniLLM):
        module = make(**models(), **({"gamma": 0.9} if make is OnPolicyDistillation else {}))
        _, seen = fit(module, steps=1)
        positions = module.micro_batch_loss.positions
        labeled = seen.batches[0]["labels"] != -100
        assert torch.equal(labeled, seen.batches[0]["completion_mask"])
        assert positions.mask.sum() == labeled.sum()
        if "advantages" in seen.batches[0]:
            assert seen.batches[0]["advantages"][~labeled].abs().sum() == 0
            assert not seen.batches[0]["advantages"].requires_grad


class OtherReferences(Letters):
    """Data with the same prompts and several times longer references, which are not used."""

    def example(self, row, pass_):
        example = super().example(row, pass_)
        prompt = example.input_ids[: example.prompt_length]
        longer = [*(example.input_ids[example.prompt_length : -1] * 16), 1]
        return type(example)([*prompt, *longer], len(prompt), example.prompt, "b" * 99)


@pytest.mark.parametrize("make", [GKD, OnPolicyDistillation, MiniLLM])
def test_unscored_references_do_not_affect_the_gradient(make):
    gradients = [
        fit(make(**models()), steps=1, data=data(batch_size=4))[1].gradients[0]
        for data in (Letters, OtherReferences)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_teacher_equal_to_the_student_gives_no_gradient():
    lightning, seen = fit(GKD(**models(0, 0)), steps=1)
    assert lightning.callback_metrics["train/loss"].abs() < 1e-6
    assert max(g.abs().max() for g in seen.gradients[0]) < 1e-6
    for objective in (Paper(), OfficialCode()):
        lightning, seen = fit(
            MiniLLM(**models(0, 0), objective=objective), steps=1, options={"mixture_alpha": 0.3}
        )
        assert seen.batches[0]["advantages"].abs().max() < 1e-2
        assert lightning.callback_metrics["train/single_step"].abs() < 1e-6


def test_the_two_temperatures_of_gkd_are_independent():
    """One changes the sampled text, the other the loss of the same text."""

    def run(sampling, teacher):
        options = {"generation": SamplingOptions(max_new_tokens=6, temperature=sampling)}
        module = GKD(**models(), teacher_temperature=teacher)
        lightning, seen = fit(module, steps=1, options=options)
        return seen.batches[0]["input_ids"], lightning.callback_metrics["train/loss"].item()

    text, loss = run(1.0, 1.0)
    same_text, other_loss = run(1.0, 0.5)
    assert torch.equal(text, same_text)
    assert abs(loss - other_loss) > 1e-3
    other_text, _ = run(0.3, 1.0)
    assert text.shape != other_text.shape or not torch.equal(text, other_text)


def test_group_advantages_are_centered_over_micro_batches():
    def parity(*, completions, **_):
        return [float(len(text) % 3) for text in completions]

    module = RLDistillation(**models(), rewards=[parity], reward_weights=[2.0])
    lightning, seen = fit(
        module, steps=1, batch_size=2, accumulate_grad_batches=6, options={"group_size": 4}
    )
    groups = torch.cat([batch["group"] for batch in seen.batches])
    advantages = torch.cat(
        [batch["advantages"].sum(-1) / batch["completion_mask"].sum(-1) for batch in seen.batches]
    )
    rows = torch.cat([batch["row"] for batch in seen.batches])
    assert groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for group in range(3):
        assert len(rows[groups == group].unique()) == 1
        assert advantages[groups == group].sum().abs() < 1e-5
    assert advantages.abs().max() > 0.1
    assert "train/reward" in lightning.callback_metrics


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_the_first_loss_of_a_centered_policy_gradient(normalization):
    """0 under sequence; minus the covariance of length and advantage over mean length under token."""

    def length(*, completions, **_):
        return [float(len(text)) for text in completions]

    module = RLDistillation(
        **models(), rewards=[length], alpha=0.0, reward_normalization=normalization
    )
    lightning, seen = fit(module, steps=1, batch_size=12, options={"group_size": 4})
    (batch,) = seen.batches
    lengths = batch["completion_mask"].sum(-1).double()
    advantages = (batch["advantages"].sum(-1) / lengths).double()
    covariance = ((lengths - lengths.mean()) * (advantages - advantages.mean())).mean()
    expected = 0 if normalization == "sequence" else -(covariance / lengths.mean()).item()
    assert lightning.callback_metrics["train/loss"].item() == pytest.approx(expected, abs=1e-6)
    assert abs(covariance) > 0.1
    assert max(g.abs().max() for g in seen.gradients[0]) > 1e-4


def test_each_row_has_its_own_teacher():
    """A routed teacher's logits are those of the row's member, in any order of rows."""
    batch = ragged_batch([(2, 5), (3, 2), (1, 4)])
    members = {"a": tiny_llama(1), "b": tiny_llama(2)}
    sources = {name: LocalTeacher.of(model) for name, model in members.items()}
    module = GKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=RoutedTeacher(sources),
        divergence="reverse_kl",
    )
    names = ["b", "a", "b"]
    rows = [batch | {"extra": {"teacher": names}}]
    lightning = trainer(max_steps=1)
    lightning.fit(module, datamodule=BatchList(rows))
    expected = []
    student = tiny_llama(0)
    for row, name in enumerate(names):
        scored = batch["labels"][row, 1:] != -100
        own, other = (
            m(
                batch["input_ids"][row : row + 1],
                attention_mask=batch["attention_mask"][row : row + 1],
            )
            .logits[0, :-1][scored]
            .log_softmax(-1)
            for m in (student, members[name])
        )
        expected.append((own.exp() * (own - other)).sum(-1))
    got = lightning.callback_metrics["train/loss"].item()
    assert got == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


# Logs.


def test_statistics_of_a_window_are_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    lightning, seen = fit(
        GKD(**models()), steps=2, options={"table_every": 2, "table_rows": 2}, logger=logger
    )
    values = {k: v.item() for k, v in lightning.callback_metrics.items() if "rollout/" in k}
    mask = seen.batches[-1]["completion_mask"]
    ended = ((seen.batches[-1]["input_ids"] == 1) & mask).any(-1).double().mean().item()
    assert values["rollout/on_policy"] == 1
    assert values["rollout/length_mean"] == pytest.approx(mask.sum(-1).double().mean().item())
    assert values["rollout/length_max"] == mask.sum(-1).max()
    assert values["rollout/eos_rate"] == pytest.approx(ended)
    assert values["rollout/truncation_rate"] == pytest.approx(1 - ended)
    assert values["rollout/tokens_per_second"] > 0
    assert 0 < values["rollout/time_share"] < 1
    tokens = seen.batches[-1]["input_ids"][mask]
    assert values["rollout/distinct_1"] == pytest.approx(len(tokens.unique()) / len(tokens))
    written = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "histograms": 0})
    written.Reload()
    assert [event.step for event in written.Scalars("rollout/on_policy")] == [0, 1]
    (text,) = written.Tensors("rollout/samples/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.count("\n") == 3
    assert "reverse KL per token" in table
    assert written.Histograms("rollout/length")


def test_tokens_per_second_counts_all_tokens():
    """Three tokens and one, in a quarter of a second."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ids, numbers = torch.tensor([[3, 4, 1], [1, 0, 0]]), torch.zeros(2, 3)
    statistics = RolloutStatistics(0)
    statistics.add(Completions(ids, mask, numbers, numbers, torch.tensor([True, True])), 0.25)
    alone = SimpleNamespace(all_gather=lambda own: own[None])
    lightning = SimpleNamespace(
        global_step=4, log_every_n_steps=1, strategy=alone, loggers=[], callback_metrics={}
    )
    statistics.end(lightning, True, 1)
    assert lightning.callback_metrics["rollout/tokens_per_second"] == 16
    assert lightning.callback_metrics["rollout/length_mean"] == 2
    assert lightning.callback_metrics["rollout/length_min"] == 1
    assert lightning.callback_metrics["rollout/length_max"] == 3


def test_gkd_with_on_policy_generation_does_not_warn(caplog):
    """With any other callbacks."""
    with caplog.at_level("INFO"):
        fit(GKD(**models()), steps=1)
    assert "GKD without the callback" not in caplog.text


def test_a_window_is_logged_if_any_of_its_steps_is():
    """The third step, in a window's first pass, is; the fourth ends its second pass."""
    options = {"passes": 2}
    for steps, logged in ((2, False), (4, True)):
        module = OnPolicyDistillation(**models())
        lightning, _ = fit(module, steps=steps, options=options, log_every_n_steps=3)
        assert ("rollout/length_mean" in lightning.callback_metrics) == logged


def test_generation_does_not_change_the_mode_of_models():
    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            assert "completion_mask" in batch
            assert all(part.training for part in pl_module.student.modules())
            assert not any(part.training for part in pl_module.teacher.model.modules())

    fit(GKD(**models(attention_dropout=0.5)), more=[Modes()])


# Rejected options.


class Unprompted(Letters):
    def example(self, row, pass_):
        example = super().example(row, pass_)
        return type(example)(example.input_ids, example.prompt_length)


def two_teachers():
    members = [LocalTeacher.of(tiny_llama(k)) for k in (1, 2)]
    return TeacherEnsemble(members)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: OnPolicyDistillation(**models()), {"lmbda": 0.5}, "only from what the student"),
        (
            lambda: MiniLLM(**models()),
            {"generation": SamplingOptions(max_new_tokens=4, top_p=0.9)},
            "which top_k, top_p and greedy decoding distort",
        ),
        (
            lambda: MiniLLM(temperature=0.7, **models()),
            {},
            "sampled at temperature 1.0, but MiniLLM trains the student at 0.7",
        ),
        (
            lambda: SFT(student=StudentSpec.of(tiny_llama(0))),
            {"lmbda": 0.0, "off_policy": "teacher"},
            "SFT learns the completions of the data",
        ),
        (
            lambda: GKD(student=StudentSpec.of(tiny_llama(0)), teacher=two_teachers()),
            {"mixture_alpha": 0.2},
            "needs a teacher that lists .mixture. in answers, got TeacherEnsemble; .* LocalTeacher",
        ),
        (lambda: GKD(**models()), {"group_size": 3}, "4 rows .* group_size 3 does not divide"),
        (
            lambda: GKD(**models(max_position_embeddings=32)),
            {"generation": SamplingOptions(max_new_tokens=33)},
            "on_policy.generation.max_new_tokens take up to .* the student has 32 positions",
        ),
        (
            lambda: RLDistillation(**models(), rewards=[lambda **_: [1.0]]),
            {"group_size": 2},
            "it must give one finite number for each",
        ),
        (
            lambda: RLDistillation(
                **models(), rewards=[lambda *, completions, **_: [None] * len(completions)]
            ),
            {"group_size": 2},
            r"the reward <lambda> gave \[None.* it must give one finite number for each",
        ),
        (
            lambda: RLDistillation(
                **models(), rewards=[lambda completions: [1.0] * len(completions)]
            ),
            {"group_size": 2},
            "<lambda> does not take what it is given .* takes prompts, completions, references by",
        ),
        (
            lambda: GKD(
                student=StudentSpec.of(tiny_llama(0)),
                teacher=RoutedTeacher({"a": LocalTeacher.of(tiny_llama(1))}, column="who"),
            ),
            {},
            "no column 'who' that says which teacher",
        ),
    ],
)
def test_incompatible_options_are_rejected_before_the_first_step(module, options, message):
    built = module()
    with pytest.raises(ValueError, match=message):
        fit(built, options=options)
    assert built.global_step == 0


def test_completions_without_a_group_are_trained_on_with_a_warning():
    """Their advantage is their reward: unbiased, without a baseline."""
    module = RLDistillation(**models(), rewards=[lambda *, prompts, **_: [2.0] * len(prompts)])
    with pytest.warns(UserWarning, match="Give the callback OnPolicyGeneration a group_size of 2"):
        _, seen = fit(module, steps=1)
    advantages = seen.batches[0]["advantages"]
    assert torch.equal(advantages, 2.0 * (seen.batches[0]["labels"] != -100))


@pytest.mark.slow
def test_a_window_is_collated_once_and_again_by_a_run_that_resumes_inside_it(tmp_path, monkeypatch):
    collate, samples = Collator.__call__, []

    def noted(self, rows):
        samples.append([sample for sample, *_ in rows])
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", noted)
    settings = {
        "steps": 8,
        "batch_size": 2,
        "options": {"steps_per_window": 2, "passes": 2},
        "accumulate_grad_batches": 2,
    }
    _, whole = fit(MiniLLM(**models()), more=[Saves(tmp_path)], **settings)
    micro_batches = [[2 * k, 2 * k + 1] for k in range(8)]
    assert samples == micro_batches
    samples.clear()
    _, rest = fit(MiniLLM(**models()), ckpt=tmp_path / "step5.ckpt", **settings)
    assert samples == micro_batches[4:]
    for got, expected in zip(rest.batches, whole.batches[10:], strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_data_without_prompts_or_windows_is_rejected():
    with pytest.raises(ValueError, match="no prompts to complete"):
        fit(GKD(**models()), data=Unprompted(batch_size=2))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_several_loaders_or_one_without_a_length_are_rejected():
    batches = BatchList([with_prompts(ragged_batch([(2, 3)]))]).train_dataloader()
    settings = {"max_steps": 1, "callbacks": [OnPolicyGeneration()]}
    module = {"tokenizer": letter_tokenizer()}
    with pytest.raises(ValueError, match="needs one training loader, not a list of them"):
        trainer(**settings).fit(GKD(**models(), **module), [batches, batches])
    with pytest.raises(ValueError, match="needs a loader that has a length"):
        trainer(**settings).fit(GKD(**models(), **module), (batch for batch in batches))


def test_two_callbacks_that_generate_are_rejected():
    class Mine(OnPolicyGeneration):
        pass

    for second in (OnPolicyGeneration(table_every=0), Mine(table_every=0)):
        named = f"OnPolicyGeneration and {type(second).__name__} would both generate"
        with pytest.raises(ValueError, match=named):
            fit(GKD(**models()), more=[second])


def test_data_that_keeps_the_plan_of_an_earlier_run_is_told_how_to_forget_it():
    class Mine(Letters):
        def setup(self, stage) -> None:
            if not self._rows:
                super().setup(stage)

    data = Mine(batch_size=4)
    fit(GKD(**models()), data=data)
    with pytest.raises(ValueError, match=r"call super\(\).setup\(stage\) in the setup of Mine"):
        fit(GKD(**models()), data=data)


def test_each_run_of_a_data_module_has_the_plan_of_its_own_callback():
    data = Letters(batch_size=2)
    options = {"steps_per_window": 2, "passes": 3, "group_size": 2}
    lightning, _ = fit(GKD(**models()), data=data, options=options, accumulate_grad_batches=2)
    assert lightning.train_dataloader.plan == data.rollout_plan == RolloutPlan(4, 3, 2)
    plain = trainer(max_steps=2)
    plain.fit(GKD(**models()), datamodule=data)
    assert plain.train_dataloader.plan == RolloutPlan(1)
    assert data.rollout_plan is None
    lightning, _ = fit(GKD(**models()), data=data)
    assert lightning.train_dataloader.plan == data.rollout_plan == RolloutPlan(1)


def test_a_policy_gradient_without_rollouts_is_rejected():
    module = OnPolicyDistillation(**models())
    with pytest.raises(ValueError, match="add the callback OnPolicyGeneration with lmbda: 1"):
        trainer(max_steps=1).fit(module, datamodule=BatchList([ragged_batch([(2, 3)])]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lmbda": 1.5}, "lmbda is 1.5; it is a share"),
        ({"off_policy": "nobody"}, "unknown off_policy 'nobody'; choose one of"),
        ({"truncated": "cut"}, "unknown truncated 'cut'"),
        ({"mixture_alpha": 1.0}, "mixture_alpha is 1.0"),
        ({"passes": 0}, "passes is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"steps_per_window": 0}, "steps_per_window is 0"),
        ({"rows_at_once": 0}, "rows_at_once 0"),
        ({"table_every": -1}, "table_every is -1"),
        ({"table_rows": 0}, "table_rows is 0"),
    ],
)
def test_invalid_values_are_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        OnPolicyGeneration(**wrong)


def test_the_smallest_valid_values_are_accepted():
    settings = {"passes": 1, "group_size": 1, "steps_per_window": 1, "rows_at_once": 1}
    made = OnPolicyGeneration(lmbda=0.0, mixture_alpha=0.0, table_every=0, table_rows=1, **settings)
    assert (made.plan.passes, made.plan.group_size, made.rows_at_once) == (1, 1, 1)


def test_the_default_of_table_every_is_that_of_the_docs():
    docs = (ROOT / "docs" / "on_policy.md").read_text()
    every = int(re.search(r"a table of rollouts comes every (\d+) steps", docs)[1])
    made = OnPolicyGeneration()
    assert made.statistics.histograms_every == made.records.table_every == every


AUDITED = {
    "gkd": (GKD, {}),
    "on-policy": (lambda **k: OnPolicyDistillation(gamma=0.9, **k), {"truncated": "mask"}),
    "minillm": (MiniLLM, {"mixture_alpha": 0.2, "steps_per_window": 2, "passes": 2}),
    "minillm-code": (lambda **k: MiniLLM(objective=OfficialCode(), **k), {"mixture_alpha": 0.2}),
    "rl": (
        lambda **k: RLDistillation(
            rewards=[lambda *, completions, **_: list(map(len, completions))], **k
        ),
        {"group_size": 2, "truncated": "drop"},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:In this window no completion ended")
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("name", AUDITED)
def test_the_audit_finds_no_fault_in_any_policy_gradient(name, normalization):
    make, options = AUDITED[name]
    audit = LossNormalizationDiagnostics(audit=1, on_fault="raise", tolerance=1e-6)
    module = make(
        student=StudentSpec.of(tiny_llama(0).double()),
        teacher=LocalTeacher.of(tiny_llama(1).double()),
        normalization=normalization,
    )
    lightning, _ = fit(
        module,
        batch_size=2,
        accumulate_grad_batches=2,
        options=options,
        more=[audit],
        precision="64-true",
    )
    found = [v.item() for k, v in lightning.callback_metrics.items() if "audit" in k]
    assert len(found) == 5
    assert max(found) < 1e-6
