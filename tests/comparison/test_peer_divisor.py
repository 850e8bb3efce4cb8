"""The peer's divisor of configs/experiments/normalization.yaml, by hand and by the peer itself."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from scipy.special import log_softmax

from lightning_kd import GKD, PromptCompletionData
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.teachers import LocalTeacher
from tests.support.command_line import CONFIGS
from tests.support.harness import GradientProbe, trainer
from tests.support.toys import letter_tokenizer, tiny_llama

ANSWERS = ["ab", "cdefgh", "i", "jklmnopabc"]


@pytest.fixture
def peer_divisor(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS / "experiments"))
    return importlib.import_module("peer_divisor").PeerDivisorGKD


class Trained(Callback):
    """Keeps the rows that a step was trained on."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batch = batch


def step(module, repeats, lmbda=1.0, **settings):
    """Loss, gradient and rows of the first step, with references so many times as long."""
    answers = [answer * repeats for answer in ANSWERS]
    rows = [{"prompt": "abcd"[: k + 1], "completion": text} for k, text in enumerate(answers)]
    writing = OnPolicyGeneration(lmbda=lmbda, generation=SamplingOptions(max_new_tokens=8))
    trained, probe = Trained(), GradientProbe()
    fit = trainer(max_steps=1, callbacks=[writing, trained, probe], **settings)
    data = PromptCompletionData(train=rows, tokenizer=letter_tokenizer(), batch_size=4)
    torch.manual_seed(0)
    fit.fit(module, datamodule=data)
    labels = sum(len(text) + 1 for text in answers)  # with the EOS
    return fit.callback_metrics["train/loss"].item(), probe.gradient, trained.batch, labels


def build(cls, **options):
    return cls(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        divergence="reverse_kl",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        **options,
    )


def predictions(model, batch):
    """Logits at the positions that predict the labels of a batch."""
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("repeats", [1, 4])
def test_the_divisor_is_the_number_of_labels_that_the_data_had(repeats, peer_divisor):
    loss, _, batch, labels = step(build(peer_divisor), repeats)
    student, teacher = (
        log_softmax(predictions(tiny_llama(seed), batch).double().numpy(), axis=-1)
        for seed in (0, 1)
    )
    scored = batch["labels"][:, 1:].numpy() != -100
    assert scored.sum() not in (0, labels)
    divergence = (np.exp(student) * (student - teacher)).sum(-1)
    assert loss == pytest.approx(divergence[scored].sum() / labels, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_it_is_the_loss_of_trl(peer_divisor):
    with warnings.catch_warnings():
        # What TRL and its dependencies warn of while they are imported is not ours to fix.
        warnings.simplefilter("ignore")
        gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    loss, _, batch, labels = step(build(peer_divisor), 2)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        *(predictions(tiny_llama(seed), batch) for seed in (0, 1)),
        labels=batch["labels"][:, 1:],
        beta=1,
        num_items_in_batch=torch.tensor(labels),
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_unused_references_change_the_peer_s_gradient_and_not_ours(peer_divisor):
    short, long = (step(build(peer_divisor), repeats) for repeats in (1, 4))
    torch.testing.assert_close(short[1] * short[3], long[1] * long[3], rtol=1e-4, atol=1e-6)
    assert short[1].norm() > 2 * long[1].norm()
    ours = [step(build(GKD), repeats)[1] for repeats in (1, 4)]
    torch.testing.assert_close(*ours, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_without_generated_completions_it_is_the_mean_over_tokens(peer_divisor):
    (loss, gradient, *_), (own, ours, *_) = (
        step(build(cls), 1, lmbda=0.0) for cls in (peer_divisor, GKD)
    )
    assert loss == pytest.approx(own, rel=1e-6)
    torch.testing.assert_close(gradient, ours)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches 2"),
        ({"normalization": "sequence"}, {}, "SequenceMean"),
    ],
)
def test_what_it_would_divide_otherwise_is_refused(options, settings, message, peer_divisor):
    with pytest.raises(ValueError, match=message):
        step(build(peer_divisor, **options), 1, **settings)
