"""Windows of the student's earlier completions, and a share of windows that follows validations."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_kd.batch import references_of
from lightning_kd.callbacks import OnPolicyGeneration, ReplayBuffer
from lightning_kd.callbacks.occasional import OccasionalEvaluation
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, OnPolicyDistillation
from lightning_kd.schedules import AdaptiveShare, Linear
from lightning_kd.teachers import LocalTeacher
from tests.callbacks.two_rank_health import Memory, Routed, routed
from tests.support.harness import GradientProbe, Letters, trainer
from tests.support.toys import tiny_llama


class Seen(GradientProbe):
    """Batches and gradients of each step, and checkpoints where there is a folder."""

    def __init__(self, folder=None):
        self.batches, self.gradients, self.folder = [], [], folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(dict(batch))

    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        self.gradients.append(self.gradient)
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    @property
    def texts(self):
        """Of each step, the prompt's tokens and the completion's of every row."""
        found = []
        for batch in self.batches:
            own = batch["completion_mask"]
            real = batch["attention_mask"].bool()
            rows = zip(batch["input_ids"], real & ~own, own, strict=True)
            found.append([(tuple(i[p].tolist()), tuple(i[c].tolist())) for i, p, c in rows])
        return found


class Weighed(Seen):
    """The student's weights at the start of each step, too."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.weights.append({n: w.clone() for n, w in pl_module.student.state_dict().items()})


def fit(steps, *, method=GKD, teacher=None, seen=None, data=None, resume=None, run=(), **options):
    seen, memory = seen or Seen(), Memory()
    given = {"generation": SamplingOptions(max_new_tokens=6), "table_every": 0} | options
    module = method(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher or LocalTeacher.of(tiny_llama(1))
    )
    settings = {"max_steps": steps, "max_epochs": -1, "logger": memory} | dict(run)
    lightning = trainer(callbacks=[OnPolicyGeneration(**given), seen], **settings)
    lightning.fit(module, datamodule=data or Letters(batch_size=4), ckpt_path=resume)
    return seen, memory


def test_once_full_it_gives_the_students_earlier_texts_and_the_oldest_leave():
    """Capacity 6: of two windows of 4, the last 6; none is generated after that with fresh 0."""
    seen, memory = fit(5, replay=ReplayBuffer(6, fresh=0.0))
    first, second, *replayed = seen.texts
    buffer = [*first, *second][-6:]
    drawn = [row for rows in replayed for row in rows]
    assert len(drawn) == 12
    assert set(drawn) <= set(buffer)
    assert len(set(drawn)) > 3
    logged = [values["rollout/replayed"] for _, values in sorted(memory.steps.items())]
    assert logged == [0, 0, 1, 1, 1]
    sizes = [values["rollout/replay_buffer"] for _, values in sorted(memory.steps.items())]
    assert sizes == [4, 6, 6, 6, 6]
    # What is trained on are the completions, and their prompts come along.
    for batch, rows in zip(seen.batches, seen.texts, strict=True):
        assert torch.equal(batch["labels"] != -100, batch["completion_mask"])
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        assert prompts == [prompt for prompt, _ in rows]


def test_the_gradient_of_a_replayed_window_is_that_of_the_present_student_on_its_texts():
    """Beside transformers on each text alone, and the formula of the reverse KL divergence."""
    seen = Weighed()
    fit(
        2,
        method=partial(GKD, divergence="reverse_kl"),
        seen=seen,
        replay=ReplayBuffer(4, fresh=0.0),
    )
    again, _ = fit(1, method=partial(GKD, divergence="reverse_kl"))
    assert set(seen.texts[1]) <= set(again.texts[0])
    student, teacher = tiny_llama(0).eval(), tiny_llama(1).eval()
    student.load_state_dict(seen.weights[1])
    loss = tokens = 0
    for prompt, completion in seen.texts[1]:
        ids, scored = torch.tensor([[*prompt, *completion]]), slice(len(prompt) - 1, -1)
        ours = student(ids).logits[0, scored].log_softmax(-1)
        theirs = teacher(ids).logits[0, scored].log_softmax(-1).detach()
        loss, tokens = loss + (ours.exp() * (ours - theirs)).sum(), tokens + len(completion)
    (loss / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(seen.gradients[1], expected, rtol=1e-4, atol=1e-6)


def test_with_fresh_1_nothing_is_replayed_and_the_run_is_that_without_a_buffer():
    with_buffer, _ = fit(4, replay=ReplayBuffer(4, fresh=1.0))
    without, _ = fit(4)
    assert with_buffer.texts == without.texts
    for a, b in zip(with_buffer.gradients, without.gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_share_is_fresh():
    _, memory = fit(40, replay=ReplayBuffer(4, fresh=Linear(0.5, 0.5, steps=1)))
    logged = [values["rollout/replayed"] for _, values in sorted(memory.steps.items())]
    assert 10 < sum(logged) < 30


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 4])
def test_what_is_replayed_does_not_depend_on_the_micro_batches(cut):
    buffer = {"replay": ReplayBuffer(6, fresh=0.0)}
    whole, _ = fit(3, **buffer)
    parts, _ = fit(
        3, data=Letters(batch_size=4 // cut), run={"accumulate_grad_batches": cut}, **buffer
    )
    rows = [row for rows in parts.texts for row in rows]
    assert rows == [row for rows in whole.texts for row in rows]


def test_columns_of_a_row_come_along():
    seen, _ = fit(
        4,
        teacher=routed(),
        data=Routed(batch_size=4),
        replay=ReplayBuffer(8, fresh=0.0),
    )
    for batch in seen.batches:
        wanted = ["b" if row % 3 == 0 else "a" for row in batch["row"].tolist()]
        assert batch["extra"]["teacher"] == wanted
        assert batch["prompt"] == [f"prompt {row}" for row in batch["row"].tolist()]


class Mixed(Letters):
    """Some rows have several references, and some were tokenized in parts, beside others."""

    def example(self, row, pass_):
        found = super().example(row, pass_)
        more = {"references": [f"r{row}", f"s{row}"]} if row % 3 == 0 else {}
        return replace(found, tokenized_apart=row % 4 == 1, **more)


@pytest.mark.slow
def test_a_replayed_batch_has_the_fields_of_its_own_rows():
    data = Mixed(rows=12, batch_size=1)
    seen, _ = fit(40, data=data, replay=ReplayBuffer(12, fresh=0.0))
    pairs, _ = fit(16, data=Mixed(batch_size=2), replay=ReplayBuffer(12, fresh=0.0))
    replayed = [*seen.batches[12:], *pairs.batches[6:]]
    drawn = [tuple(batch["row"].tolist()) for batch in replayed]
    assert len(set(drawn)) > 12
    for batch, rows in zip(replayed, drawn, strict=True):
        examples = [data.example(row, 0) for row in rows]
        assert batch["completion"] == [example.completion for example in examples]
        expected = [example.references or [example.completion] for example in examples]
        assert references_of(batch) == expected
        apart = batch.get("tokenized_apart", torch.zeros(len(rows), dtype=torch.bool))
        assert apart.tolist() == [example.tokenized_apart for example in examples]


class Sometimes(OccasionalEvaluation):
    """Measures ``val/x``, always the same."""

    def evaluate(self, module, *, is_trial):
        return {"x": 1.0}

    def measures(self, name):
        return name == "x"


def of_x(folder=None, resume=None, occasional=None):
    share = AdaptiveShare(start=0.1, increase=0.2, tolerance=0.0, monitor="val/x")
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=3), table_every=0, lmbda=share
    )
    callbacks = [generation, occasional or Sometimes(3), Seen(folder)]
    run = trainer(max_steps=8, max_epochs=-1, callbacks=callbacks, **VALIDATED)
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    run.fit(module, datamodule=Letters(batch_size=4), ckpt_path=resume)
    return share.share


def test_a_share_follows_those_validations_that_have_measured_what_it_follows(tmp_path):
    """Of four validations the first and the last have: it grows once, also in a resumed run."""
    assert of_x(tmp_path) == pytest.approx(0.3)
    assert of_x(resume=tmp_path / "step3.ckpt") == pytest.approx(0.3)


def test_a_share_of_what_no_validation_measures_is_refused():
    with pytest.raises(ValueError, match=r"on_policy\.lmbda monitors val/x; set it to 1 or more"):
        of_x(occasional=Sometimes(0))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_share_grows_on_behind_a_value_that_is_not_finite(broken):
    share = AdaptiveShare(increase=0.25, tolerance=0.1)
    for value, expected in ((broken, 0), (2.0, 0), (2.05, 0), (2.2, 0.25), (math.nan, 0.25)):
        share.update(value)
        assert share(0) == expected
    share.update(2.4)
    assert share(0) == 0.5
    assert share.has_heard


def adaptive():
    """Each validation counts as worse: the number of its tokens never falls."""
    share = AdaptiveShare(start=0.5, increase=0.1, tolerance=0.0, monitor="val/tokens")
    return {"lmbda": share, "replay": ReplayBuffer(4, fresh=0.4)}


VALIDATED = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.slow
def test_a_resumed_run_replays_and_adapts_bit_for_bit(tmp_path):
    whole, memory = fit(12, seen=Seen(tmp_path), run=VALIDATED, **adaptive())
    logged = [values["rollout/lmbda"] for _, values in sorted(memory.steps.items())]
    assert logged == pytest.approx([0.5] * 4 + [0.6] * 2 + [0.7] * 2 + [0.8] * 2 + [0.9] * 2)
    flags = [values["rollout/replayed"] for _, values in sorted(memory.steps.items())]
    assert 0 < sum(flags) < 12
    for done in (4, 5, 8):  # of which two are saved just before a validation
        rest, again = fit(12, run=VALIDATED, resume=tmp_path / f"step{done}.ckpt", **adaptive())
        for a, b in zip(rest.batches, whole.batches[done:], strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(rest.gradients, whole.gradients[done:], strict=True):
            assert torch.equal(a, b)
        for step in range(done, 12):
            for name in ("rollout/lmbda", "rollout/replayed", "rollout/replay_buffer"):
                assert again.steps[step][name] == memory.steps[step][name]
    other = adaptive() | {"replay": ReplayBuffer(5, fresh=0.4)}
    with pytest.raises(ValueError, match=r"on_policy\.replay\.capacity: 4 -> 5"):
        fit(12, run=VALIDATED, resume=tmp_path / "step5.ckpt", **other)


def test_a_second_run_begins_with_an_empty_buffer():
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=6), table_every=0, **adaptive()
    )
    for _ in range(2):
        run = trainer(max_steps=4, max_epochs=-1, callbacks=[generation], **VALIDATED)
        module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
        run.fit(module, datamodule=Letters(batch_size=4))
        assert run.callback_metrics["rollout/lmbda"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"method": OnPolicyDistillation, "replay": ReplayBuffer()},
            "OnPolicyDistillation learns from samples of the student as it is",
        ),
        ({"lmbda": 0.0, "replay": ReplayBuffer()}, "with lmbda: 0 it generates nothing"),
        ({"lmbda": AdaptiveShare()}, "this run has no validation"),
        (
            {"lmbda": AdaptiveShare(monitor="val/nothing"), "run": VALIDATED},
            "lmbda.monitor is 'val/nothing', and validation has measured val/",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        fit(3, **given)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="capacity is 0; it must be a whole number"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match=r"value is 1\.5; it is a share"):
        ReplayBuffer(4, fresh=1.5)
    with pytest.raises(ValueError, match=r"replay\.fresh is an AdaptiveShare"):
        ReplayBuffer(4, fresh=AdaptiveShare())
