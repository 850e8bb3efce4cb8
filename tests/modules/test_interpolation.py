"""Targets that move from the student to the teacher: limits, the update of TAID, resumes."""

import math

import pytest
import torch

from lightning_kd.callbacks import NonFiniteGuard
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, TAID, Interpolation, SupervisedKD
from lightning_kd.modules.reverse_kl_estimators import CorrectedTopK
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, GradientProbe, Letters, fit_one_step, trainer
from tests.support.sparse_teachers import Tells
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (1, 3), (3, 7)])


def module(method=SupervisedKD, dtype=torch.float32, **options):
    defaults = {"alpha": 0.0} if method is SupervisedKD else {}
    return method(
        student=StudentSpec.of(tiny_llama(0).to(dtype)),
        teacher=LocalTeacher.of(tiny_llama(1).to(dtype)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        **(defaults | options),
    )


@pytest.mark.parametrize("method", [SupervisedKD, GKD])
def test_at_its_ends_there_is_nothing_to_learn_and_then_the_teacher_itself(method):
    loss, gradient = fit_one_step(
        module(method, interpolation=Interpolation(0, 0, steps=1)), [BATCH]
    )
    assert loss == 0
    assert gradient.abs().max() <= 1e-12
    end = fit_one_step(module(method, interpolation=Interpolation(1, 1, steps=1)), [BATCH])
    plain = fit_one_step(module(method), [BATCH])
    assert end[0] == plain[0]
    assert torch.equal(end[1], plain[1])


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_gradient_of_a_step_is_that_of_the_formula(tau):
    """Forward KL to ``softmax((1 - t) z + t u)`` at a temperature, in plain torch on all logits."""
    student, teacher = tiny_llama(0), tiny_llama(1)
    scored = BATCH["labels"][:, 1:] != -100
    z, u = (
        m(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[:, :-1][scored] / tau
        for m in (student, teacher)
    )
    target = (0.75 * z + 0.25 * u).detach().softmax(-1)
    loss = tau**2 * (target * (target.log() - z.log_softmax(-1))).sum(-1).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    built = module(interpolation=Interpolation(0.25, 0.25, steps=1), temperature=tau)
    found, gradient = fit_one_step(built, [BATCH])
    assert found == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def official(losses, start, end, steps, rate, momentum):
    """The update of the paper's algorithm in Python floats: the share at each step."""
    t, previous, mean, shares = start, None, 0.0, []
    for step, loss in enumerate(losses):
        at = t = max(t, start + (end - start) * min(1.0, step / steps))
        shares.append(t)
        if previous:
            mean = momentum * mean + (1 - momentum) * (previous - loss) / (previous + 1e-15)
            t = min(end, t + rate / (1 + math.exp(-mean)) * (1 - t))
        previous = loss if at > 0 else None  # from the student itself there is none
    return shares


@pytest.mark.parametrize("steps", [5, 1000])
@pytest.mark.parametrize("rate", [0.05, 0.9])
def test_the_share_follows_the_algorithm_of_the_paper(steps, rate):
    losses = [2.0, 1.5, 1.6, 0.4, 0.4, 3.0, 0.1, 0.1]
    taid = TAID(0.2, 0.9, steps=steps, rate=rate, momentum=0.6)
    shares = []
    for step, loss in enumerate(losses):
        shares.append(taid.share(step, torch.device("cpu")).item())
        taid.update(step, torch.tensor(loss), torch.tensor(3.0))
        # A step that has scored nothing leaves everything as it is.
        before = taid.state_dict()
        taid.update(step, torch.tensor(0.0), torch.tensor(0.0))
        assert taid.state_dict() == before
    expected = official(losses, 0.2, 0.9, steps, rate, 0.6)
    assert shares == pytest.approx(expected, rel=1e-6)
    assert sorted(shares) == shares
    assert shares[-1] <= 0.9


@pytest.mark.parametrize("nothing", [0.0, 1e-12, -1e-12])
def test_from_the_student_itself_it_begins_with_the_loss_after_the_first(nothing):
    """Its first loss is 0, or rounding alone; a relative change of that would be kept for long."""
    losses = [nothing, *(2.0 * 0.9**step for step in range(20))]
    taid = TAID(0.0, steps=1000, rate=0.05, momentum=0.9)
    shares = []
    for step, loss in enumerate(losses):
        shares.append(taid.share(step, torch.device("cpu")).item())
        taid.update(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(3.0))
    assert shares == pytest.approx(official(losses, 0.0, 1.0, 1000, 0.05, 0.9), rel=1e-6)
    assert shares[-1] > 0.3  # of the line, 0.02


@pytest.mark.filterwarnings("ignore:optimizer step 2 was skipped")
@pytest.mark.parametrize("broken", ["gradient", "weights"])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_step_that_is_skipped_or_not_finite_does_not_move_it(broken, guarded, tmp_path):
    """The step may have a loss that is finite, and one that is not may be taken."""
    built = module(interpolation=TAID(0.3, steps=1000, rate=0.5, momentum=0.5))
    seen = Broken(broken)
    guard = [NonFiniteGuard("skip", dirpath=str(tmp_path))] if guarded else []
    trainer(max_steps=4, max_epochs=-1, callbacks=[seen, *guard]).fit(
        built, datamodule=Letters(rows=8, batch_size=4)
    )
    states = [torch.tensor(state) for state in seen.states]
    assert states[0].isfinite().all()
    if guarded or broken == "weights":
        assert torch.equal(states[1], states[0])
    if guarded:
        assert all(state.isfinite().all() for state in states)
        assert states[3][0] > states[2][0] > states[1][0]


class Broken(GradientProbe):
    """An optimizer step, the second, whose loss, or only whose gradient, is not finite."""

    def __init__(self, what):
        self.what, self.states = what, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and self.what == "weights":
            weight = pl_module.student.lm_head.weight
            self.old = weight.detach().clone()
            weight.data[0] = torch.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1 and self.what == "gradient":
            pl_module.student.lm_head.weight.grad[0] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and self.what == "weights":
            pl_module.student.lm_head.weight.data.copy_(self.old)
        pl_module.follow_step()  # a checkpoint may be saved here, before others have heard of it
        self.states.append(pl_module.interpolation.state_dict()["taid"])


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
def test_a_run_follows_it_however_its_steps_are_cut():
    """What moves the share is the loss of the whole step: 8 rows at once, in pairs, one by one."""
    found = {}
    for window, size in ((1, 8), (4, 2), (8, 1)):
        built = module(
            dtype=torch.float64, interpolation=TAID(0.3, steps=1000, rate=0.5, momentum=0.5)
        )
        seen = Shares()
        fit = trainer(
            accumulate_grad_batches=window,
            precision="64-true",
            max_steps=4,
            max_epochs=-1,
            callbacks=[seen],
        )
        fit.fit(built, datamodule=Letters(rows=32, batch_size=size))
        found[window] = (seen, torch.cat([p.flatten() for p in built.parameters()]))
    whole, weights = found[1]
    assert whole.shares == pytest.approx(official(whole.losses, 0.3, 1.0, 1000, 0.5, 0.5), rel=1e-5)
    assert whole.shares[-1] > 0.5
    for seen, others in (found[4], found[8]):
        assert seen.shares == pytest.approx(whole.shares, rel=1e-6)
        assert (others - weights).norm() / weights.norm() < 1e-10


class Shares(GradientProbe):
    """The share and the loss of each step."""

    def __init__(self):
        self.shares, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.shares.append(trainer.callback_metrics["train/interpolation"].item())
            self.losses.append(trainer.callback_metrics["train/divergence"].item())


def test_a_resumed_run_goes_on_bit_for_bit_and_a_new_one_begins_anew(tmp_path):
    def fit(built, steps, resume=None):
        run = trainer(max_steps=steps, max_epochs=-1)
        run.fit(built, datamodule=Letters(rows=8, batch_size=4), ckpt_path=resume)
        return run

    def built():
        return module(interpolation=TAID(0.3, steps=1000, rate=0.5, momentum=0.5))

    whole = built()
    fit(whole, 5)
    half = built()
    fit(half, 3).save_checkpoint(tmp_path / "three.ckpt")
    rest = built()
    fit(rest, 5, tmp_path / "three.ckpt")
    assert rest.interpolation.state_dict() == whole.interpolation.state_dict()
    assert rest.interpolation.state_dict() != half.interpolation.state_dict()
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"interpolation.*rate"):
        fit(module(interpolation=TAID(0.3, steps=1000, rate=0.4)), 5, tmp_path / "three.ckpt")
    fit(whole, 1)  # another run of the same module
    assert whole.interpolation.state_dict()["taid"][0] == 0.3


def test_validation_measures_the_divergence_from_the_teacher_itself():
    measured = []
    for interpolation in (None, Interpolation(0.1, 0.2, steps=9)):
        run = trainer(limit_val_batches=1)
        metrics = run.validate(
            module(interpolation=interpolation),
            datamodule=BatchList([BATCH], [BATCH]),
            verbose=False,
        )
        measured.append(metrics[0]["val/divergence"])
    assert measured[0] == measured[1] > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Interpolation(0.5, 0.4, steps=3), "not below the start"),
        (lambda: Interpolation(0.5, 1.4, steps=3), "it is a share"),
        (lambda: Interpolation(steps=0), "1 or more"),
        (lambda: TAID(steps=3, rate=0.0), "choose Interpolation"),
        (lambda: TAID(steps=3, momentum=1.0), r"must lie in \[0, 1\)"),
        (lambda: module(interpolation=0.5), "interpolation"),
        (
            lambda: module(alpha=1.0, interpolation=TAID(steps=3)),
            "alpha is 1, .* leave interpolation out",
        ),
        (
            lambda: module(
                GKD,
                divergence="reverse_kl",
                estimator=CorrectedTopK(),
                interpolation=TAID(steps=3),
            ),
            "leave one of them out",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_teacher_that_answers_drawn_tokens_is_refused_and_one_of_k_tokens_is_not():
    """Of its k tokens and the rest as one event the target is made as of all tokens."""
    for kind in ("sampled", "top_k"):
        built = SupervisedKD(
            student=StudentSpec.of(tiny_llama(0)),
            teacher=Tells(tiny_llama(1), kind),
            interpolation=Interpolation(0.5, 0.5, steps=1),
            alpha=0.0,
        )
        if kind == "sampled":
            with pytest.raises(ValueError, match=r"model\.interpolation mixes .* Tells answers"):
                fit_one_step(built, [BATCH])
        else:
            loss, _ = fit_one_step(built, [BATCH])
            assert loss > 0
