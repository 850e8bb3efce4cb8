"""The student as its own teacher: what it says, which weights it has, and what is refused."""

import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from scipy.special import rel_entr

from lightning_kd import (
    GKD,
    SFT,
    ArithmeticData,
    EMAStudent,
    FrozenStudent,
    LiveStudent,
    LocalTeacher,
    LoRA,
    OnPolicyDistillation,
    PromptCompletionData,
    RLDistillation,
    RoutedTeacher,
    SequenceKD,
    StudentSpec,
    TeacherEnsemble,
    TopKTeacher,
)
from lightning_kd.callbacks import (
    LossNormalizationDiagnostics,
    NonFiniteGuard,
    OnPolicyGeneration,
    ReplayBuffer,
)
from lightning_kd.generation import SamplingOptions, SpeculativeSampler
from lightning_kd.models import DenseLogits, FusedLogits
from lightning_kd.rewards import exact_match
from lightning_kd.scoring import ScoredPositions
from lightning_kd.strategies import StrategyAdapter
from lightning_kd.teacher_rows import teacher_rows
from lightning_kd.teachers import checked_answer
from tests.support.harness import BatchList, GradientProbe, Letters, fit_one_step, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

ROWS = [
    {"prompt": "ab", "completion": "cdp", "solution": "hijk"},
    {"prompt": "abc", "completion": "e", "solution": "g"},
    {"prompt": "b", "completion": "ffa", "solution": "pon"},
    {"prompt": "dd", "completion": "a", "solution": "mml"},
]


class Told(PromptCompletionData):
    """Rows whose teacher reads a solution before the prompt."""

    def __init__(self, **options):
        given = {"train": ROWS, "teacher_prompt_template": "{solution}{prompt}", "batch_size": 2}
        super().__init__(tokenizer=letter_tokenizer(), **given | options)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.3)


def gkd(teacher, *, student=None, **options):
    student = tiny_llama(0).double() if student is None else student
    options = {"divergence": "reverse_kl", "optimizer": sgd} | options
    return GKD(student=student, teacher=teacher, **options)


def told_alike(seed=0):
    """A batch whose teacher reads the same rows."""
    batch = with_prompts(ragged_batch([(2, 5), (1, 3), (3, 4)], seed))
    real = batch["attention_mask"].bool()
    ids = [row[keep].tolist() for row, keep in zip(batch["input_ids"], real, strict=True)]
    starts = batch["prompt_mask"].sum(-1).tolist()
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    completions = [row[start:] for row, start in zip(ids, starts, strict=True)]
    return batch, prompts, completions


def logits_of(answer):
    (source,) = answer.sources
    found = torch.empty(source.shape, dtype=torch.float64)
    source.fill(slice(0, source.shape[0]), found)
    return found


@pytest.mark.parametrize("backend", [DenseLogits(), FusedLogits()], ids=["dense", "fused"])
@pytest.mark.parametrize("teacher", [LiveStudent, FrozenStudent, lambda: EMAStudent(0.9)])
def test_scores_are_those_of_the_model_behind_the_privileged_prompt(teacher, backend):
    """Beside a forward pass of transformers on each row alone, without padding."""
    model, data = tiny_llama(0).double(), Told(batch_size=4)
    module = gkd(teacher(), student=model, logits_backend=backend)
    seen = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            positions = pl_module.positions(batch)
            seen["batch"] = batch
            seen["logits"] = logits_of(pl_module.teacher_answer(batch, positions))

    fit = trainer(max_steps=1, precision="64-true", callbacks=[Look()])
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    fit.fit(module, datamodule=data)
    model.load_state_dict(start)
    expected, tokenizer = [], letter_tokenizer()
    for row in seen["batch"]["row"].tolist():
        prompt = tokenizer(ROWS[row]["solution"] + ROWS[row]["prompt"])["input_ids"]
        completion = [*tokenizer(ROWS[row]["completion"])["input_ids"], 1]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*prompt, *completion]])).logits[0]
        expected.append(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1])
    torch.testing.assert_close(seen["logits"], torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_scores_behind_generated_completions():
    """The same for what the student has written in a run."""
    seen, model = {}, tiny_llama(0).double()

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                answer = pl_module.teacher_answer(batch, pl_module.positions(batch))
            seen["batch"], seen["logits"] = batch, logits_of(answer)

    writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=5), table_every=0)
    module = gkd(LiveStudent(), student=model, optimizer=lambda g: torch.optim.SGD(g, lr=0.0))
    fit = trainer(max_steps=1, max_epochs=-1, precision="64-true", callbacks=[writes, Look()])
    fit.fit(module, datamodule=Told(batch_size=4))
    expected, batch, tokenizer = [], seen["batch"], letter_tokenizer()
    for number, row in enumerate(batch["row"].tolist()):
        prompt = tokenizer(ROWS[row]["solution"] + ROWS[row]["prompt"])["input_ids"]
        written = batch["input_ids"][number][batch["completion_mask"][number]].tolist()
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*prompt, *written]])).logits[0]
        expected.append(logits[len(prompt) - 1 : len(prompt) + len(written) - 1])
    torch.testing.assert_close(seen["logits"], torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "generalized_jsd"])
def test_with_the_same_context_there_is_nothing_to_learn(divergence):
    batch, prompts, completions = told_alike()
    alike = batch | {"teacher": teacher_rows(prompts, completions, 0)}
    more = batch | {"teacher": teacher_rows([[7, 3, *p] for p in prompts], completions, 0)}
    found = {}
    for name, given in (("alike", alike), ("more", more)):
        module = gkd(LiveStudent(), divergence=divergence)
        loss, gradient = fit_one_step(module, [given], precision="64-true")
        found[name] = abs(loss), gradient.norm().item()
    assert max(found["alike"]) < 1e-14
    assert min(found["more"]) > 1e-2


class Weights(Callback):
    """The student's weights after each optimizer step, in float64, and the teacher's."""

    def __init__(self):
        self.student, self.teacher = [], []

    def on_fit_start(self, trainer, pl_module):
        self.record(pl_module)

    def record(self, module):
        (teacher,) = module.followers
        self.student.append(flat(module.student))
        self.teacher.append(flat(teacher.model))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= len(self.student):
            self.record(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.record(pl_module)


def flat(model):
    parameters = [p.detach().double().flatten() for p in model.parameters()]
    return torch.cat(parameters).numpy().copy()


def test_the_average_after_k_steps_in_closed_form():
    """In steps of two micro-batches, of which each but the last one of a step changes nothing."""
    decay, steps, weights = 0.7, 4, Weights()
    module = gkd(EMAStudent(decay))
    fit = trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        precision="64-true",
        callbacks=[weights],
    )
    fit.fit(module, datamodule=Told(batch_size=1))
    w = weights.student
    assert len(w) == len(weights.teacher) == steps + 1
    assert np.abs(w[-1] - w[0]).max() > 1e-3
    for k in range(steps + 1):
        expected = decay**k * w[0]
        for i in range(1, k + 1):
            expected = expected + (1 - decay) * decay ** (k - i) * w[i]
        np.testing.assert_allclose(weights.teacher[k], expected, rtol=0, atol=1e-14)


def test_live_moves_with_the_student_and_frozen_does_not_move():
    for teacher, moved in ((LiveStudent(), True), (FrozenStudent(), False)):
        weights = Weights()
        fit = trainer(max_steps=2, callbacks=[weights])
        fit.fit(gkd(teacher, student=tiny_llama(0)), datamodule=Told())
        assert not np.array_equal(weights.student[-1], weights.student[0])
        assert np.array_equal(weights.teacher[-1], weights.student[-1 if moved else 0])


class Poison(Callback):
    """A gradient that is not finite, in the second step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            next(pl_module.student.parameters()).grad.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:optimizer step 2 was skipped")
def test_a_skipped_step_is_none(tmp_path):
    weights = Weights()
    guard = NonFiniteGuard("skip", dirpath=str(tmp_path))
    fit = trainer(max_steps=3, max_epochs=-1, callbacks=[Poison(), guard, weights])
    fit.fit(gkd(EMAStudent(0.5), student=tiny_llama(0)), datamodule=Told())
    assert np.array_equal(weights.student[2], weights.student[1])
    assert np.array_equal(weights.teacher[2], weights.teacher[1])
    assert not np.array_equal(weights.teacher[1], weights.teacher[0])
    assert not np.array_equal(weights.teacher[3], weights.teacher[2])


def test_a_step_that_the_gradient_scaler_skips_is_none():
    weights = Weights()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    fit = trainer(max_steps=3, max_epochs=-1, plugins=[plugin], callbacks=[Poison(), weights])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule of a skipped step
        fit.fit(gkd(EMAStudent(0.5), student=tiny_llama(0)), datamodule=Told())
    assert np.array_equal(weights.student[2], weights.student[1])
    assert np.array_equal(weights.teacher[2], weights.teacher[1])
    assert not np.array_equal(weights.teacher[3], weights.teacher[2])


def test_an_average_of_bfloat16_is_in_float32():
    weights, student = Weights(), tiny_llama(0).bfloat16()
    fit = trainer(max_steps=3, max_epochs=-1, callbacks=[weights])
    teacher = EMAStudent(0.999)
    fit.fit(gkd(teacher, student=student), datamodule=Told())
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    moved = weights.student[-1] != weights.student[0]
    assert (weights.teacher[-1] != weights.teacher[0])[moved].mean() > 0.99


@pytest.mark.parametrize("teacher", [LiveStudent, FrozenStudent, lambda: EMAStudent(0.9)])
def test_a_student_with_adapters_shares_the_weights_that_they_adapt(teacher):
    student, made = StudentSpec.of(tiny_llama(0), lora=LoRA(r=2)), teacher()
    fit = trainer(max_steps=2)
    module = gkd(made, student=student)
    fit.fit(module, datamodule=Told())
    theirs = dict(made.model.named_parameters())
    for name, own in module.student.named_parameters():
        shared = theirs[name].data_ptr() == own.data_ptr()
        assert shared == (not own.requires_grad or isinstance(made, LiveStudent)), name
        if isinstance(made, FrozenStudent) and "lora_B" in name:
            assert own.any()
            assert not theirs[name].any()
    assert any(p.requires_grad for p in module.student.parameters())
    assert isinstance(made, LiveStudent) or not any(p.requires_grad for p in theirs.values())


@pytest.mark.slow
def test_a_copy_is_in_no_optimizer_and_no_state_of_the_student(tmp_path):
    module, fit = gkd(EMAStudent(0.5), student=tiny_llama(0)), trainer(max_steps=1)
    fit.fit(module, datamodule=Told())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(name.startswith("student.") for name in saved["state_dict"])
    (averages,) = saved["self_teachers"]
    assert averages.keys() == {name for name, _ in module.student.named_parameters()}
    live, fit = gkd(LiveStudent(), student=tiny_llama(0)), trainer(max_steps=1)
    fit.fit(live, datamodule=Told())
    fit.save_checkpoint(tmp_path / "b.ckpt")
    assert "self_teachers" not in torch.load(tmp_path / "b.ckpt", weights_only=True)


def run(steps, ckpt_path=None, teacher=None, start=0):
    weights = Weights()
    fit = trainer(max_steps=steps, max_epochs=-1, callbacks=[weights])
    module = gkd(teacher or EMAStudent(0.8), student=tiny_llama(start))
    fit.fit(module, datamodule=Told(), ckpt_path=ckpt_path)
    return fit, weights


def test_a_resumed_run_averages_on_bit_for_bit(tmp_path):
    _, whole = run(4)
    fit, _ = run(2)
    fit.save_checkpoint(tmp_path / "two.ckpt")
    fit, resumed = run(4, tmp_path / "two.ckpt")
    assert np.array_equal(resumed.student[-1], whole.student[-1])
    assert np.array_equal(resumed.teacher[-1], whole.teacher[-1])
    assert not np.array_equal(whole.teacher[-1], whole.teacher[2])


class SavesFirst(Callback):
    """Saves at the end of each batch, before the teacher's own callback has heard of the step."""

    def __init__(self, place):
        self.place = place

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(self.place / f"{trainer.global_step}.ckpt")


def test_a_checkpoint_between_a_step_and_its_average_has_the_average(tmp_path):
    weights = Weights()
    fit = trainer(max_steps=3, max_epochs=-1, callbacks=[SavesFirst(tmp_path), weights])
    fit.fit(gkd(EMAStudent(0.8), student=tiny_llama(0)), datamodule=Told())
    for step in (1, 2, 3):
        (saved,) = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["self_teachers"]
        parts = [average.double().flatten() for average in saved.values()]
        assert np.array_equal(torch.cat(parts).numpy(), weights.teacher[step])
    _, whole = run(3)
    assert np.array_equal(whole.teacher[-1], weights.teacher[-1])


@pytest.mark.parametrize("teacher", [FrozenStudent, lambda: EMAStudent(0.8)])
def test_a_second_fit_goes_on_with_the_teacher_of_the_first(teacher):
    module, weights = gkd(teacher(), student=tiny_llama(0)), Weights()
    trainer(max_steps=2, callbacks=[weights]).fit(module, datamodule=Told())
    again = Weights()
    trainer(max_steps=2, callbacks=[again]).fit(module, datamodule=Told())
    assert np.array_equal(again.teacher[0], weights.teacher[-1])
    assert np.array_equal(again.teacher[-1], again.teacher[0]) == (teacher is FrozenStudent)


def validated(module, ckpt_path=None):
    fit = trainer(limit_val_batches=1.0)
    (found,) = fit.validate(module, Told(validation=ROWS), ckpt_path, verbose=False)
    return found


def test_an_evaluation_of_a_checkpoint_has_its_average(tmp_path):
    fit, weights = run(3)
    fit.save_checkpoint(tmp_path / "three.ckpt")
    expected = validated(fit.lightning_module)
    assert expected["val/reverse_kl"] > 0
    module = gkd(EMAStudent(0.8), student=tiny_llama(5))
    assert validated(module, tmp_path / "three.ckpt") == expected
    assert np.array_equal(flat(module.teacher.model), weights.teacher[-1])
    # Made from the checkpoint alone, too.
    alone = restored(tmp_path / "three.ckpt")
    assert validated(alone) == expected
    assert np.array_equal(flat(alone.teacher.model), weights.teacher[-1])


def restored(path):
    student = StudentSpec.of(tiny_llama(6))
    return GKD.load_from_checkpoint(path, student=student, tokenizer=letter_tokenizer())


def test_a_frozen_teacher_of_another_start_is_refused_on_a_resume(tmp_path):
    fit, _ = run(1, teacher=FrozenStudent())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    _, weights = run(2, tmp_path / "one.ckpt", teacher=FrozenStudent())
    _, whole = run(2, teacher=FrozenStudent())
    assert np.array_equal(weights.student[-1], whole.student[-1])
    with pytest.raises(ValueError, match="the student here starts with other weights"):
        run(2, tmp_path / "one.ckpt", teacher=FrozenStudent(), start=3)


def test_a_start_that_a_checkpoint_does_not_have_is_not_made_up(tmp_path):
    fit, _ = run(1, teacher=FrozenStudent())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="FrozenStudent is the student as its run started"):
        validated(restored(tmp_path / "one.ckpt"))
    anew = gkd(FrozenStudent(), student=tiny_llama(0))
    assert validated(anew, tmp_path / "one.ckpt")["val/reverse_kl"] > 0


def test_copies_of_another_kind_or_number_are_not_taken_from_a_checkpoint(tmp_path):
    fit, _ = run(1)
    fit.save_checkpoint(tmp_path / "average.ckpt")
    fit, _ = run(1, teacher=LiveStudent())
    fit.save_checkpoint(tmp_path / "live.ckpt")
    frozen, average = (gkd(t, student=tiny_llama(0)) for t in (FrozenStudent(), EMAStudent(0.8)))
    for module, place, said in (
        (frozen, "average.ckpt", r"model\.teacher .*\(FrozenStudent\).* has those of EMAStudent;"),
        (average, "live.ckpt", r"model\.teacher .*\(EMAStudent\).* has those of LiveStudent;"),
    ):
        with pytest.raises(ValueError, match=said):
            validated(module, tmp_path / place)
    with pytest.raises(ValueError, match=r"model\.teacher"):
        run(2, tmp_path / "average.ckpt", teacher=FrozenStudent())
    two = gkd(TeacherEnsemble([EMAStudent(0.8), FrozenStudent()]), student=tiny_llama(0))
    with pytest.raises(ValueError, match=r"\(EMAStudent, FrozenStudent\).* those of EMAStudent;"):
        validated(two, tmp_path / "average.ckpt")


def test_a_checkpoint_that_does_not_name_its_copies_is_refused_with_a_way_out(tmp_path):
    """As checkpoints did before their kinds were written."""
    fit, _ = run(1)
    fit.save_checkpoint(tmp_path / "new.ckpt")
    saved = torch.load(tmp_path / "new.ckpt", weights_only=True)
    del saved["self_teacher_kinds"]
    torch.save(saved, tmp_path / "old.ckpt")
    said = r"has those of none that it names; .* new run from its student: lightning-kd export"
    with pytest.raises(ValueError, match=said):
        run(2, tmp_path / "old.ckpt")


def test_an_evaluation_without_the_reference_has_the_average(tmp_path):
    """A run asks its reference as well: an evaluation takes the average of the teacher alone."""

    def distilled(teacher, start=0):
        student = tiny_llama(start)
        return OnPolicyDistillation(
            student=student, teacher=teacher, reference=FrozenStudent(), optimizer=sgd
        )

    writes, average = (
        OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=3)),
        EMAStudent(0.5),
    )
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writes])
    fit.fit(distilled(average), datamodule=Told(batch_size=4))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    again = EMAStudent(0.5)
    validated(distilled(again, start=4), tmp_path / "one.ckpt")
    assert np.array_equal(flat(again.model), flat(average.model))


def test_a_teacher_that_is_asked_twice_follows_a_step_once():
    teacher, weights = EMAStudent(0.5), Weights()
    fit = trainer(max_steps=1, callbacks=[weights])
    fit.fit(gkd(TeacherEnsemble([teacher, teacher]), student=tiny_llama(0)), datamodule=Told())
    half = 0.5 * weights.student[0] + 0.5 * weights.student[1]
    assert np.abs(weights.student[1] - weights.student[0]).max() > 1e-3
    np.testing.assert_allclose(weights.teacher[1], half, rtol=0, atol=1e-6)


def test_another_decay_is_refused_on_a_resume(tmp_path):
    fit, _ = run(1)
    fit.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"teacher\.decay: 0\.8 -> 0\.9"):
        run(2, tmp_path / "one.ckpt", teacher=EMAStudent(0.9))


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_audit_finds_nothing_and_the_loss_is_normalized_as_told(normalization):
    """Also where the average moves with every step, which no replay may do."""
    logged = {}

    class Logger(L.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.update(metrics)

    audit = LossNormalizationDiagnostics(audit=1, on_fault="raise", histograms_every=0)
    weights = Weights()
    fit = trainer(
        max_steps=3,
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=[audit, weights],
        logger=Logger(),
    )
    module = gkd(EMAStudent(0.5), student=tiny_llama(0), normalization=normalization)
    fit.fit(module, datamodule=Told(batch_size=2))
    assert audit.audit.report.differences["as_trained"] < 1e-5
    assert audit.audit.report.differences["per_sample"] < 1e-5
    assert logged["norm/terms_agree"] == 1
    divided_by = logged["train/tokens"] if normalization == "token" else 4
    assert logged["norm/count"] == divided_by
    expected = 0.5 * weights.teacher[2] + 0.5 * weights.student[3]
    np.testing.assert_allclose(weights.teacher[3], expected, rtol=0, atol=1e-6)


def test_a_member_of_an_ensemble_and_k_tokens_of_the_student():
    for teacher in (
        TeacherEnsemble([LocalTeacher.of(tiny_llama(1)), EMAStudent(0.5)]),
        TopKTeacher(LiveStudent(), k=4),
    ):
        module = gkd(teacher, student=tiny_llama(0))
        loss, gradient = fit_one_step_of(module)
        assert loss > 0
        assert gradient > 0


ROUTED = [row | {"teacher": who} for row, who in zip(ROWS, "abba", strict=True)]


def routed():
    """Rows of which the student's average teaches some, and another model the others."""
    return Told(train=ROUTED, batch_size=4, extra_columns=["teacher"])


def test_a_routed_teacher_has_the_average_for_its_rows_and_another_model_for_the_others():
    """The loss of two steps, beside transformers on each row alone and SciPy's KL divergence."""
    average, other, weights = EMAStudent(0.6), tiny_llama(1).double(), Weights()
    members = {"a": average, "b": LocalTeacher.of(other)}
    module, losses = gkd(RoutedTeacher(members), divergence="forward_kl"), []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/loss"].item())

    fit = trainer(max_steps=2, max_epochs=-1, precision="64-true", callbacks=[weights, Losses()])
    fit.fit(module, datamodule=routed())
    first, second = weights.student[:2]
    for loss, own, own_average in zip(
        losses, (first, second), (first, 0.6 * first + 0.4 * second), strict=True
    ):
        student, teachers = model_with(own), {"a": model_with(own_average), "b": other}
        expected = []
        for row in ROUTED:
            p = distributions(teachers[row["teacher"]], row["solution"] + row["prompt"], row)
            expected += list(rel_entr(p, distributions(student, row["prompt"], row)).sum(-1))
        assert loss == pytest.approx(np.mean(expected), rel=1e-6)  # as it is logged, in float32
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def model_with(weights):
    """The student with these weights, in a row."""
    model, start = tiny_llama(0).double().eval(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            end = start + parameter.numel()
            parameter.copy_(torch.from_numpy(weights[start:end]).view_as(parameter))
            start = end
    return model


@torch.no_grad()
def distributions(model, prompt, row):
    """What a model expects at each token of a row's completion, behind a prompt."""
    tokenizer = letter_tokenizer()
    prompt = tokenizer(prompt)["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], 1]
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize("nested", [False, True])
def test_a_student_in_shards_does_not_teach_some_of_the_rows(monkeypatch, nested):
    """It answers on all processes together, and one may have no row of its."""
    monkeypatch.setattr(StrategyAdapter, "shards_weights", True)
    teacher = RoutedTeacher({"a": LiveStudent(), "b": LocalTeacher.of(tiny_llama(1))})
    teacher = TeacherEnsemble([teacher, LocalTeacher.of(tiny_llama(2))]) if nested else teacher
    said = "LiveStudent is a member of a RoutedTeacher, and has its weights in shards under"
    with pytest.raises(ValueError, match=said):
        trainer(max_steps=1).fit(gkd(teacher, student=tiny_llama(0)), datamodule=routed())


@pytest.mark.parametrize("generated", [False, True])
def test_mixed_precision_keeps_the_gradient_of_weights_that_the_teacher_reads_first(generated):
    """Up to torch 2.10 autocast kept what it had made of weights without a gradient, and the student
    got that."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=4), table_every=0)
        probe, module = GradientProbe(), gkd(LiveStudent(), student=tiny_llama(0))
        callbacks = [writes, probe] if generated else [probe]
        fit = trainer(max_steps=1, max_epochs=-1, precision=precision, callbacks=callbacks)
        fit.fit(module, datamodule=Told(batch_size=4))
        assert all(weight.grad.any() for weight in module.student.parameters())
        found.append(probe.gradient)
    whole, mixed = found
    assert not torch.equal(whole, mixed)
    assert torch.nn.functional.cosine_similarity(mixed, whole, dim=0) > 0.98
    assert mixed.norm().item() == pytest.approx(whole.norm().item(), rel=0.1)


def fit_one_step_of(module, data=None):
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=data or Told())
    return fit.callback_metrics["train/loss"].item(), fit.callback_metrics["train/grad_norm"].item()


def test_a_penalty_for_leaving_the_start_needs_no_context():
    """Its reward teaches; what there is of the start is what the student is held to."""
    module = RLDistillation(
        student=tiny_llama(0), teacher=FrozenStudent(), rewards=[exact_match], optimizer=sgd
    )
    writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=3), group_size=2)
    fit = trainer(max_steps=2, max_epochs=-1, callbacks=[writes])
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.callback_metrics["train/divergence"].item() >= 0


@pytest.mark.parametrize(
    ("build", "data", "message"),
    [
        (
            lambda: gkd(LiveStudent(), student=tiny_llama(0)),
            lambda: Letters(batch_size=4),
            "the teacher is LiveStudent, and reads what the student reads",
        ),
        (
            lambda: gkd(EMAStudent(0.5), student=tiny_llama(0)),
            lambda: Letters(batch_size=4),
            "the teacher is EMAStudent, and reads what the student reads",
        ),
        (
            lambda: gkd(TeacherEnsemble([FrozenStudent(), LiveStudent()]), student=tiny_llama(0)),
            lambda: Letters(batch_size=4),
            "the teacher is FrozenStudent, and reads what the student reads",
        ),
        (
            lambda: RLDistillation(
                student=tiny_llama(0), teacher=LiveStudent(), rewards=[exact_match]
            ),
            lambda: Letters(batch_size=4),
            "the teacher is LiveStudent, and reads what the student reads",
        ),
        (
            lambda: SFT(student=tiny_llama(0)),
            Told,
            "the data tells a teacher more than the student .* and SFT asks none about its rows",
        ),
        (
            lambda: SequenceKD(student=tiny_llama(0), teacher=LocalTeacher.of(tiny_llama(1))),
            Told,
            "and SequenceKD asks none about its rows",
        ),
        (
            lambda: gkd(LiveStudent(), student=tiny_llama(0, max_position_embeddings=9)),
            Told,
            "train rows, as the teacher reads them, take up to 10 tokens, but the teacher has 9",
        ),
        (
            lambda: gkd(FrozenStudent(), student=quantized()),
            Told,
            "FrozenStudent copies the student, and quantized weights cannot be copied",
        ),
    ],
)
def test_what_could_teach_nothing_is_refused(build, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1, max_epochs=-1, callbacks=generating(build)).fit(
            build(), datamodule=data()
        )


def generating(build):
    if not isinstance(build(), RLDistillation):
        return []
    return [OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=3), group_size=2)]


def quantized():
    model = tiny_llama(0)
    model.hf_quantizer = SimpleNamespace()
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_policy": "teacher", "lmbda": 0.5}, "reads other prompts than the student"),
        ({"mixture_alpha": 0.1}, "reads other prompts than the student"),
        ({"engine": SpeculativeSampler(2)}, "reads other prompts than the student"),
        (
            {"generation": SamplingOptions(max_new_tokens=251)},
            r"as the teacher reads them, take up to 257 tokens, but the teacher has 256",
        ),
    ],
)
def test_generation_knows_of_the_teachers_prompts(options, message):
    module = gkd(LocalTeacher.of(tiny_llama(1)), student=tiny_llama(0))
    options = {"generation": SamplingOptions(max_new_tokens=3)} | options
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[OnPolicyGeneration(**options)])
    with pytest.raises(ValueError, match=message):
        fit.fit(module, datamodule=Told(batch_size=4))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        EMAStudent(decay)


def test_only_an_average_has_a_decay():
    for kind in (LiveStudent, FrozenStudent):
        with pytest.raises(TypeError, match="decay"):
            kind(decay=0.9)


def test_a_strategy_that_flattens_weights_is_refused(monkeypatch):
    monkeypatch.setattr(StrategyAdapter, "flattens_weights", True)
    module = gkd(EMAStudent(0.5), student=tiny_llama(0))
    with pytest.raises(ValueError, match="EMAStudent has its weights from the student, and under"):
        trainer(max_steps=1).fit(module, datamodule=Told())


def test_without_a_student_there_is_no_answer():
    teacher, batch = LiveStudent(), ragged_batch([(1, 2)])
    positions = ScoredPositions.from_labels(batch["labels"])
    with pytest.raises(ValueError, match="is neither cached nor served"):
        checked_answer(
            teacher, batch, positions, kind="full_distribution", logits_backend=DenseLogits()
        )


def test_a_local_teacher_may_be_told_more_as_well():
    """Another model that reads the solution: its answer behind its own prompt."""
    plain, told = (
        fit_one_step_of(
            gkd(LocalTeacher.of(tiny_llama(1)), student=tiny_llama(0)),
            Told(teacher_prompt_template=template),
        )[0]
        for template in (None, "{solution}{prompt}")
    )
    assert plain != told


def test_sums_with_a_hint_are_read_by_the_average():
    module = gkd(EMAStudent(0.5), student=tiny_llama(0, vocab_size=14))
    data = ArithmeticData(train_size=8, validation_size=4, batch_size=4, hint="feedback")
    loss, gradient = fit_one_step_of(module, data)
    assert loss > 0
    assert gradient > 0


def test_replayed_completions_stand_behind_the_teachers_prompt():
    """What the teacher reads of each row is its own prompt, and what the row was completed with."""
    replay, tokenizer, seen = ReplayBuffer(capacity=4, fresh=0.0), letter_tokenizer(), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch)

    writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=4), replay=replay)
    fit = trainer(max_steps=4, max_epochs=-1, callbacks=[writes, Look()])
    fit.fit(gkd(LiveStudent(), student=tiny_llama(0)), datamodule=Told(batch_size=4))
    assert replay.replaying
    assert fit.callback_metrics["train/loss"].item() > 0
    for batch in seen:
        read = batch["teacher"]
        for number, row in enumerate(batch["row"].tolist()):
            prompt = tokenizer(ROWS[row]["solution"] + ROWS[row]["prompt"])["input_ids"]
            written = batch["input_ids"][number][batch["completion_mask"][number]].tolist()
            real, told = read["attention_mask"][number].bool(), read["prompt_mask"][number].bool()
            assert read["prompt_ids"][number][told].tolist() == prompt
            assert read["input_ids"][number][real].tolist() == [*prompt, *written]


def test_a_reference_may_be_the_student_as_it_started():
    """Without a context of its own: the teacher is another model, and it is extrapolated."""
    module = OnPolicyDistillation(
        student=tiny_llama(0),
        teacher=LocalTeacher.of(tiny_llama(1)),
        reference=FrozenStudent(),
        optimizer=sgd,
    )
    writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=4))
    weights = Weights()
    fit = trainer(max_steps=2, max_epochs=-1, callbacks=[writes, weights])
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert np.array_equal(weights.teacher[-1], weights.student[0])
    assert not np.array_equal(weights.student[-1], weights.student[0])


def test_batches_of_ones_own_may_bring_the_teachers_rows():
    batch, prompts, completions = told_alike()
    told = batch | {"teacher": teacher_rows([[5, *p] for p in prompts], completions, 0)}
    fit = trainer(max_steps=1)
    fit.fit(gkd(LiveStudent(), student=tiny_llama(0)), datamodule=BatchList([told]))
    assert fit.callback_metrics["train/loss"].item() > 0
