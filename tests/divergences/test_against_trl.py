import warnings

import pytest
import torch

from lightning_kd.divergences import ForwardKL, GeneralizedJSD, ReverseKL
from tests.support.toys import logit_gradient


@pytest.fixture(scope="module")
def trl_loss():
    with warnings.catch_warnings():
        # What TRL and its dependencies warn of while they are imported is not ours to fix.
        warnings.simplefilter("ignore")
        try:
            from trl.experimental.gkd import GKDTrainer
        except ImportError as error:
            pytest.skip(f"trl, the peer to compare with, cannot be imported: {error}")
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize(
    ("dtype", "gradient_tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        *((GeneralizedJSD(beta), beta) for beta in (0, 0.1, 0.3, 0.5, 0.9, 1)),
        (ForwardKL(), 0),
        (ReverseKL(), 1),
    ],
    ids=repr,
)
def test_equals_the_loss_of_trl(trl_loss, divergence, beta, dtype, gradient_tolerance, logits):
    student_logits, teacher_logits = (side.to(dtype).requires_grad_() for side in logits)
    theirs = trl_loss(student_logits, teacher_logits.detach(), beta=beta, reduction="none").sum(-1)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), student_logits)

    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    torch.testing.assert_close(divergence(student, teacher), theirs, rtol=1e-6, atol=1e-6)
    gradient = logit_gradient(divergence, student.detach(), teacher)
    torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=gradient_tolerance)
