"""A reference from which the teacher is extrapolated: its limit, where it is asked, what is refused."""

import pytest
import torch

from lightning_kd import check
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import ArithmeticData
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import CorrectedTopK, OnPolicyDistillation
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, GradientProbe, Letters, trainer
from tests.support.sparse_teachers import Tells
from tests.support.toys import ragged_batch, tiny_llama


def module(**options):
    return OnPolicyDistillation(
        student=StudentSpec.of(tiny_llama(0)),
        **({"teacher": LocalTeacher.of(tiny_llama(1))} | options),
    )


def gradient(built, **settings):
    probe = GradientProbe()
    writing = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=6), table_every=0)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing, probe], **settings)
    fit.fit(built, datamodule=Letters(batch_size=4))
    return probe.gradient


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_at_1_any_reference_is_on_policy_distillation_bit_for_bit(gamma):
    plain = gradient(module(gamma=gamma))
    for seed in (0, 5):
        reference = LocalTeacher.of(tiny_llama(seed))
        extrapolated = module(gamma=gamma, reference=reference, extrapolation=1.0)
        assert torch.equal(gradient(extrapolated), plain)
        further = module(gamma=gamma, reference=reference, extrapolation=1.25)
        assert (gradient(further) - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_advantage_is_that_of_the_paper(temperature):
    """From the logits of three models, in plain torch, at the tokens of a rollout."""
    seen = {}

    class Watched(OnPolicyDistillation):
        def rollout_terms(self, rollout, scores):
            seen.update(rollout, mask=scores.positions.mask)
            return super().rollout_terms(rollout, scores)

    built = Watched(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        reference=LocalTeacher.of(tiny_llama(2)),
        temperature=temperature,
    )
    probe = GradientProbe()
    options = SamplingOptions(max_new_tokens=6, temperature=temperature)
    writing = OnPolicyGeneration(generation=options, table_every=0)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing, probe])
    fit.fit(built, datamodule=Letters(batch_size=4))
    ids, mask = seen["input_ids"], seen["mask"]
    own, teacher, reference = (
        (tiny_llama(seed)(ids, attention_mask=seen["attention_mask"]).logits / temperature)
        .log_softmax(-1)[:, :-1]
        .gather(-1, ids[:, 1:, None])[..., 0][mask[:, :-1]]
        for seed in (0, 1, 2)
    )
    reward = 1.25 * (teacher - reference) - (own - reference)
    student = tiny_llama(0)
    log_probs = student(ids, attention_mask=seen["attention_mask"]).logits / temperature
    log_probs = log_probs.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    (-(reward.detach() * log_probs[mask[:, :-1]]).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(probe.gradient, expected, rtol=1e-3, atol=1e-5)


def test_it_is_in_no_checkpoint_never_trains_and_an_evaluation_does_not_load_it(tmp_path):
    reference = tiny_llama(2)
    before = [weight.clone() for weight in reference.parameters()]
    built = module(reference=LocalTeacher.of(reference))
    gradient(built)
    assert not any("reference" in name or "teacher" in name for name in built.state_dict())
    for weight, old in zip(reference.parameters(), before, strict=True):
        assert torch.equal(weight, old)
    assert set(built.models) == {"student", "teacher", "reference"}
    batch = ragged_batch([(2, 5)])
    unloaded = module(reference=LocalTeacher("nowhere/at_all"))
    trainer(limit_val_batches=1).validate(
        unloaded, datamodule=BatchList([], [batch]), verbose=False
    )
    assert set(unloaded.models) == {"student", "teacher"}


def test_what_cannot_take_effect_is_refused():
    with pytest.raises(ValueError, match="no reference to extrapolate from"):
        module(extrapolation=1.25)
    reference = LocalTeacher.of(tiny_llama(2))
    with pytest.raises(ValueError, match="must be positive"):
        module(reference=reference, extrapolation=0.0)
    with pytest.raises(ValueError, match="leave estimator out, or reference"):
        module(reference=reference, estimator=CorrectedTopK())
    student = tiny_llama(0)
    with pytest.raises(ValueError, match="are one model object"):
        gradient(
            OnPolicyDistillation(
                student=StudentSpec.of(student),
                teacher=LocalTeacher.of(tiny_llama(1)),
                reference=LocalTeacher.of(student),
            )
        )
    with pytest.raises(ValueError, match="the reference has 20 tokens, and 18 of the student"):
        gradient(module(reference=LocalTeacher.of(tiny_llama(2, vocab_size=20))))
    with pytest.raises(ValueError, match="OnPolicyDistillation needs a teacher that answers"):
        gradient(module(reference=Tells(tiny_llama(2), "top_k")))


@pytest.mark.slow
def test_a_reference_and_a_teacher_may_answer_in_different_ways():
    """One tells the sampled token alone, the other everything: the gradient is the same."""
    whole = gradient(module(reference=LocalTeacher.of(tiny_llama(2))))
    told = gradient(module(reference=Tells(tiny_llama(2), "token_log_probs")))
    torch.testing.assert_close(told, whole, rtol=1e-4, atol=1e-6)


def test_the_check_before_a_run_counts_it():
    vocabulary = {"vocab_size": 14}
    built = OnPolicyDistillation(
        student=StudentSpec.of(tiny_llama(0, **vocabulary)),
        teacher=LocalTeacher.of(tiny_llama(1, **vocabulary)),
        reference=LocalTeacher.of(tiny_llama(2, **vocabulary)),
    )
    facts = check(built, ArithmeticData(train_size=64)).facts
    assert [model.role for model in facts.models] == ["student", "teacher", "reference"]
