"""The target between student and teacher, against the formula in NumPy on logits."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from lightning_kd.divergences import Divergence, ForwardKL, available_divergences, make_divergence
from lightning_kd.divergences.interpolated import InterpolatedDivergence
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    MaterializedLogits,
    TopK,
    weighted_sum,
)


def share(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_target_is_the_softmax_of_mixed_logits_and_is_held_constant(t, logits):
    """Value and gradient ``q - p_t`` of the forward KL, with temperatures, from SciPy."""
    z, u = (side.numpy() for side in logits)
    for tau in (1.0, 2.0):
        target = softmax(((1 - t) * z + t * u) / tau, -1)
        own = softmax(z / tau, -1)
        divergence = InterpolatedDivergence(ForwardKL(), share(t))
        student, teacher = ((side / tau).log_softmax(-1) for side in logits)
        value, gradient = divergence.value_and_logit_gradient(student, teacher)
        np.testing.assert_allclose(value.numpy(), entropy(target, own, axis=-1), rtol=1e-11)
        np.testing.assert_allclose(gradient.numpy(), own - target, atol=1e-14)
        np.testing.assert_allclose(
            divergence.target(student, teacher).numpy(),
            log_softmax(((1 - t) * z + t * u) / tau, -1),
            rtol=1e-12,
        )


@pytest.mark.parametrize("name", available_divergences())
def test_the_ends_are_exact_for_every_divergence(name, log_probs):
    student, teacher = log_probs
    inner = make_divergence(name)
    value, gradient = InterpolatedDivergence(inner, share(0.0)).value_and_logit_gradient(*log_probs)
    assert value.abs().max() <= 1e-15
    assert gradient.abs().max() <= 1e-15
    end = InterpolatedDivergence(inner, share(1.0))
    for a, b in zip(
        end.value_and_logit_gradient(student, teacher),
        inner.value_and_logit_gradient(student, teacher),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(end(student, teacher), inner(student, teacher))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_tokens_that_a_side_excludes_leave_everything_finite(t, logits):
    """Excluded by the teacher alone, and by both."""
    z = logits[0].index_fill(-1, torch.tensor([0]), -torch.inf)
    u = logits[1].index_fill(-1, torch.tensor([0, 4]), -torch.inf)
    leaf = z.clone().requires_grad_()
    divergence = InterpolatedDivergence(ForwardKL(), share(t))
    value = divergence(leaf.log_softmax(-1), u.log_softmax(-1))
    value.sum().backward()
    _, gradient = divergence.value_and_logit_gradient(z.log_softmax(-1), u.log_softmax(-1))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(leaf.grad, gradient, atol=1e-13, rtol=1e-12)
    target = divergence.target(z.log_softmax(-1), u.log_softmax(-1)).exp()
    assert (target[..., 0] == 0).all()
    assert bool((target[..., 4] == 0).all()) == (t > 0)


class OwnSquares(Divergence):
    """One without a closed form."""

    def value(self, student_log_probs, teacher_log_probs):
        return (student_log_probs.exp() - teacher_log_probs.exp()).square().sum(-1)


@pytest.mark.parametrize("divergence", [*available_divergences(), OwnSquares()], ids=str)
def test_in_chunks_and_over_events_it_is_what_it_is_on_all_logits(divergence):
    """The fused pass, and a teacher of k tokens whose events are interpolated."""
    divergence = make_divergence(divergence)
    draws = torch.Generator().manual_seed(5)
    states = torch.randn(7, 4, generator=draws, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 4, generator=draws, dtype=torch.float64)
    teacher = 2 * torch.randn(7, 11, generator=draws, dtype=torch.float64)
    term = DivergenceTerm(InterpolatedDivergence(divergence, share(0.4)))
    q, p = (states @ weight.T).log_softmax(-1), teacher.log_softmax(-1)
    best = p.topk(3)
    answers = [
        (FullDistribution((MaterializedLogits(teacher),)), (q, p)),
        (TopK(best.indices, best.values), (events(q, best.indices), events(p, best.indices))),
    ]
    for answer, (own, theirs) in answers:
        chunks = ChunkedPass(LazyHeadLogits(((states, weight),)), answer, [term], 8 * 11 * 2 * 3)
        total, (values,) = weighted_sum(chunks, [torch.ones(7, dtype=torch.float64)])
        target = (0.6 * own.detach() + 0.4 * theirs).log_softmax(-1)
        expected = divergence(own, target)
        torch.testing.assert_close(values, expected.detach(), rtol=1e-11, atol=1e-13)
        (found,) = torch.autograd.grad(total, states, retain_graph=True)
        (exact,) = torch.autograd.grad(expected.sum(), states, retain_graph=True)
        if divergence.name != "adaptive_kl":  # holds its weights constant
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def events(log_probs, ids):
    """The named tokens, and all others as one."""
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), rest], -1)
