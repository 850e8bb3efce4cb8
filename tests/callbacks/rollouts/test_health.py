"""Health of real on-policy runs, against what is counted from their tokens and models."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import HealthOptions
from lightning_kd.callbacks.tensorboard_layout import LAYOUT
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, OnPolicyDistillation
from lightning_kd.teachers import LocalTeacher, TopKTeacher
from tests.callbacks.two_rank_health import STEPS, gkd, routed, run
from tests.support.scripts import run_script
from tests.support.sparse_teachers import Tells
from tests.support.toys import tiny_llama

ROOT = Path(__file__).resolve().parents[3]
OVERLAPS = ["train/top_k_overlap", "train/student_overlap_mass", "train/teacher_overlap_mass"]


class Seen(Callback):
    """The batches that are trained on, and a checkpoint after every step."""

    def __init__(self, folder=None) -> None:
        self.batches, self.folder = [], folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(dict(batch))

    def on_train_batch_end(self, trainer, *_) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


@torch.no_grad()
def distributions(model, batch):
    """Probabilities at the scored positions, from all logits."""
    logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100].double().softmax(-1).numpy()


def by_sets(batch, teacher, k):
    """Mean share and masses of the shared tokens of the untrained student, and the entropy gap."""
    found = []
    for q, p in zip(distributions(tiny_llama(0), batch), teacher, strict=True):
        shared = sorted(set(np.argsort(-q)[:k]) & set(np.argsort(-p)[:k]))
        gap = (p * np.log(p)).sum() - (q * np.log(q)).sum()
        found.append((len(shared) / k, q[shared].sum(), p[shared].sum(), gap))
    return np.mean(found, 0)


def module_of(method, teacher):
    return method(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)


@pytest.mark.parametrize("method", [GKD, OnPolicyDistillation])
@pytest.mark.parametrize("k", [None, 3])
def test_overlap_and_entropies_are_those_of_all_logits_on_the_students_tokens(method, k):
    seen = Seen()
    module = module_of(method, LocalTeacher.of(tiny_llama(1)))
    options = {"health": HealthOptions(overlap_k=k)}
    logged = run(module, 1, options=options, callbacks=[seen]).steps[0]
    (batch,) = seen.batches
    assert "completion_mask" in batch
    expected = by_sets(batch, distributions(tiny_llama(1), batch), k or 16)
    got = [logged[name] for name in [*OVERLAPS, "train/entropy_gap"]]
    assert got == pytest.approx(expected, rel=1e-5)


def test_overlap_is_logged_at_the_steps_whose_completions_the_student_wrote():
    """Lightning alone would repeat the last value at each step in between."""
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 12, options={"lmbda": 0.5}, batch_size=2).steps
    written = [step for step in logged if logged[step]["rollout/on_policy"] == 1]
    assert 0 < len(written) < 12
    for name in OVERLAPS:
        assert [step for step in logged if name in logged[step]] == written
    assert all("train/forward_kl" in values for values in logged.values())


@pytest.mark.parametrize(
    ("teacher", "k", "there"),
    [
        (lambda: TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=5), 5, True),
        (lambda: TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=5), 3, True),
        (lambda: TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=5), None, False),
        (lambda: Tells(tiny_llama(1), "sampled"), None, False),
    ],
    ids=["all that are told", "fewer than are told", "16 of 5", "sampled"],
)
def test_of_a_teacher_that_tells_less_only_what_it_tells_is_logged(teacher, k, there):
    seen = Seen()
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher(), divergence="forward_kl")
    options = {"health": HealthOptions(overlap_k=k)}
    logged = run(module, 1, options=options, callbacks=[seen]).steps[0]
    (batch,) = seen.batches
    if there:
        expected = by_sets(batch, distributions(tiny_llama(1), batch), k)[:3]
        assert [logged[name] for name in OVERLAPS] == pytest.approx(expected, rel=1e-5)
    assert bool(logged.keys() & set(OVERLAPS)) == there
    assert ("train/entropy_gap" in logged) == isinstance(module.teacher, Tells)


@pytest.mark.parametrize(
    ("make", "k", "message"),
    [
        (lambda: TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=5), 6, "top_k does not tell its 6"),
        (
            lambda: Tells(tiny_llama(1), "sampled"),
            2,
            "overlap_k is 2, and the teacher answers samp",
        ),
        (lambda: LocalTeacher.of(tiny_llama(1)), 19, "overlap_k is 19, and 18 tokens are compared"),
    ],
)
def test_a_k_that_cannot_be_told_is_refused_before_a_step(make, k, message):
    module = module_of(GKD, make())
    if module.teacher.answers == {"sampled"}:
        module = GKD(student=module.student_spec, teacher=make(), divergence="forward_kl")
    with pytest.raises(ValueError, match=message):
        run(module, 3, options={"health": HealthOptions(overlap_k=k)}, log_every_n_steps=3)
    assert module.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_k": -1}, r"health.overlap_k is -1; it must be 0 \(none\) or more"),
        ({"windows": 3}, "health.windows is 3; it must be 4 or more"),
        ({"truncation_limit": 1.5}, "health.truncation_limit is 1.5; it must be a share"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HealthOptions(**options)


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    """At steps that are not logged, of completions of the data, and with a k of 0."""
    found = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda *a, **b: found.append(1) or topk(*a, **b))
    run(gkd(), 3, log_every_n_steps=4)
    assert not found
    for options in ({"lmbda": 0.0}, {"health": HealthOptions(overlap_k=0)}):
        logged = run(gkd(), 2, options=options).steps
        assert not found
        assert not logged[1].keys() & set(OVERLAPS)
    run(gkd(), 3, log_every_n_steps=3)
    assert len(found) == 2


def test_it_is_logged_where_the_student_has_generated():
    logged = run(gkd(), 12, options={"lmbda": 0.5}).steps
    own = {step: values["rollout/on_policy"] == 1 for step, values in logged.items()}
    assert 2 < sum(own.values()) < 10
    student_windows = 0
    for step, values in logged.items():
        student_windows += own[step]
        assert all((name in values) == own[step] for name in OVERLAPS)
        assert ("rollout/length_trend" in values) == (own[step] and student_windows > 2)


def test_windows_of_the_teacher_are_no_windows_of_the_student():
    options = {"lmbda": 0.0, "off_policy": "teacher"}
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 6, options=options).steps
    assert "rollout/length_mean" in logged[5]
    assert not any("rollout/length_trend" in values for values in logged.values())


def test_a_later_run_without_the_callback_compares_no_tokens():
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    run(module, 1)
    assert module.train_distribution.overlap is not None
    module.setup("fit")
    assert module.train_distribution.overlap is None


def test_statistics_of_a_window_are_counted_one_by_one():
    seen = Seen()
    memory = run(gkd(), STEPS, callbacks=[seen])
    lengths = []
    for step, batch in enumerate(seen.batches):
        logged, rows = memory.steps[step], []
        for ids, own in zip(batch["input_ids"].tolist(), batch["completion_mask"], strict=True):
            rows.append([token for token, mine in zip(ids, own.tolist(), strict=True) if mine])
        lengths.append(np.mean([len(row) for row in rows]))
        empty = np.mean([len(row) - row.count(1) == 0 for row in rows])
        grams = [[row[i : i + 4] for i in range(len(row) - 3)] for row in rows]
        again = sum(of_row[:i].count(g) > 0 for of_row in grams for i, g in enumerate(of_row))
        assert logged["rollout/empty_rate"] == pytest.approx(empty)
        assert logged["rollout/repetition_4"] == pytest.approx(again / sum(map(len, grams)))
        if step >= 2:
            last = slice(max(0, step - 3), step + 1)
            slope = np.polyfit(np.arange(step + 1.0)[last], lengths[last], 1)[0]
            assert logged["rollout/length_trend"] == pytest.approx(100 * slope, rel=1e-6)
        tokens = {"a": 0, "b": 0}
        for name, row in zip(batch["extra"]["teacher"], rows, strict=True):
            tokens[name] += len(row)
        for name, count in tokens.items():
            share = logged[f"rollout/teacher_share/{name}"]
            assert share == pytest.approx(count / sum(tokens.values()))
            assert 0 < share < 1


def test_only_scored_tokens_have_a_teacher():
    """Of completions that were cut, none is scored under mask."""
    seen = Seen()
    options = {"truncated": "mask", "generation": SamplingOptions(max_new_tokens=12)}
    logged = run(gkd(), 1, options=options, callbacks=[seen]).steps[0]
    (batch,) = seen.batches
    tokens = {"a": 0, "b": 0}
    for name, labels in zip(batch["extra"]["teacher"], batch["labels"].tolist(), strict=True):
        tokens[name] += sum(label != -100 for label in labels)
    assert 0 < sum(tokens.values()) < batch["completion_mask"].sum()
    for name, count in tokens.items():
        share = logged[f"rollout/teacher_share/{name}"]
        assert share == pytest.approx(count / sum(tokens.values()))


def test_a_wrapped_teacher_has_the_shares_of_what_it_wraps():
    logged = run(module_of(GKD, TopKTeacher(routed(), k=16)), 1).steps[0]
    whole = run(gkd(), 1).steps[0]
    for name in ("rollout/teacher_share/a", "rollout/teacher_share/b", *OVERLAPS):
        assert logged[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 4])
def test_the_numbers_do_not_depend_on_the_micro_batches(cut):
    whole = run(gkd(), 3).timeless()
    parts = run(gkd(), 3, batch_size=8 // cut, accumulate_grad_batches=cut).timeless()
    assert whole.keys() == parts.keys()
    for step, values in whole.items():
        assert parts[step] == pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.mark.processes
def test_the_numbers_are_over_all_ranks(tmp_path):
    run_script("callbacks/two_rank_health.py", tmp_path)
    (logged, first), (_, second) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)
    )
    alone = run(gkd()).timeless()
    of_rank = {"rollout/distinct_1", "rollout/distinct_2"}
    assert logged.keys() == alone.keys()
    for step, values in alone.items():
        assert logged[step].keys() == values.keys()
        shared = {name: value for name, value in values.items() if name not in of_rank}
        assert {n: logged[step][n] for n in shared} == pytest.approx(shared, rel=1e-4, abs=1e-6)
    assert "rollout/length_trend" in first
    for name in first.keys() - of_rank:
        assert second[name] == first[name], name


@pytest.mark.slow
@pytest.mark.parametrize("done", [6, 13])
def test_a_run_resumed_inside_a_window_logs_the_same_bits(tmp_path, done):
    """Windows of four steps, in two passes: between the passes, and within the first.

    The last step before the checkpoint is logged again: the checkpoint is made before it is logged.
    """
    options = {"steps_per_window": 2, "passes": 2}
    whole = run(gkd(), 24, options=options, callbacks=[Seen(tmp_path)]).timeless()
    rest = run(gkd(), 24, options=options, ckpt=tmp_path / f"step{done}.ckpt").timeless()
    assert rest == {step: values for step, values in whole.items() if step >= done - 1}
    assert "rollout/length_trend" in rest[23]
    assert "rollout/length_trend" in rest[15]


@pytest.fixture
def endless(monkeypatch):
    """Sampler that never samples EOS."""
    for module in ("sampler", "completions", "engine"):
        monkeypatch.setattr(f"lightning_kd.generation.{module}.is_end", lambda ids, _: ids != ids)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "completions" in str(w.message)]


@pytest.mark.slow
@pytest.mark.usefixtures("endless")
def test_a_student_that_never_ends_is_warned_of_once_also_if_resumed(tmp_path):
    (message,) = said(lambda: run(gkd(), 7, callbacks=[Seen(tmp_path)], log_every_n_steps=50))
    assert "rollout/truncation_rate is 1.00 over the last 2 windows" in message
    assert "rollout/length_mean is 24.0 tokens" in message
    assert "max_new_tokens is 24" in message
    assert said(lambda: run(gkd(), 9, ckpt=tmp_path / "step7.ckpt")) == []
    assert len(said(lambda: run(gkd(), 9, ckpt=tmp_path / "step2.ckpt"))) == 1


def test_a_student_that_ends_is_not_warned_of():
    assert said(lambda: run(gkd(), 10)) == []


def test_the_docs_name_what_is_logged():
    text = (ROOT / "docs" / "on_policy.md").read_text().partition("## Health")[2]
    rows = [line.split("|")[1] for line in text.partition("\n## ")[0].splitlines() if "|" in line]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    logged = run(gkd(), 3).steps[2].keys()
    documented = {name.replace("NAME", letter) for name in named for letter in "ab"}
    rollouts = {name for name in logged if name.startswith("rollout/")}
    elsewhere = {"rollout/on_policy", "rollout/tokens_per_second", "rollout/time_share"}
    assert len(named) > 12
    assert documented == (rollouts - elsewhere) | {*OVERLAPS, "train/entropy_gap"}
    charts = [pattern for chart in LAYOUT["Health of rollouts"].values() for pattern in chart[1]]
    for name in documented:
        assert any(re.match(pattern, name) for pattern in charts), name
    for pattern in charts:
        assert any(re.match(pattern, name) for name in documented), pattern


def test_the_docs_say_the_defaults():
    text = (ROOT / "docs" / "on_policy.md").read_text().partition("## Health")[2]
    options = HealthOptions()
    assert f"mean lengths of the last {options.windows} windows" in text
    assert f"`on_policy.health.truncation_limit` ({options.truncation_limit}; 1 never" in text
    assert "16 most likely tokens" in text
