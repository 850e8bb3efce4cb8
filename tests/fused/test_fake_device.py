"""What runs on a device that is not there: shapes, types and devices are known, and no value is.

``FakeTensorMode`` raises where tensors of two devices meet, and where a value is asked for. So what
passes here mixes no devices on a GPU and makes the host wait for nothing. Fake tensors of CUDA itself
cannot be sliced where PyTorch comes without it, so they are of another device; what is done for CUDA
alone (products of narrow operands, compiled code) is not seen.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.divergences import available_divergences, make_divergence
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    FullDistribution,
    LazyHeadLogits,
    LogRatio,
    TeacherCrossEntropy,
    TeacherEntropy,
    TeacherTokenLogProb,
    Top1Agreement,
    TopK,
    WeightedSum,
)
from lightning_kd.generation import SamplingOptions
from lightning_kd.generation.decoder import Decoder
from lightning_kd.generation.drawing import Mixture, draw, next_token
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.models import FusedLogits
from lightning_kd.models.output_head import OutputHead
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher
from lightning_kd.teachers.ensemble import AveragedDistribution

ELSEWHERE = torch.device("lazy", 0)
"""Of the devices that are not there, one of which tensors can be sliced by a PyTorch without CUDA."""

COUNT, WIDTH, VOCABULARY = 11, 8, 19
CHUNK_BYTES = 2 * VOCABULARY * 4 * 4
"""Chunks of four positions."""


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


models_run_elsewhere = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="this transformers asks the device for autocast, which it has none of",
)


def elsewhere(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device=ELSEWHERE)


def labels():
    return elsewhere(COUNT, dtype=torch.long)


def head(dtype=torch.float32, **options):
    pair = elsewhere(COUNT, WIDTH, dtype=dtype), elsewhere(VOCABULARY, WIDTH, dtype=dtype)
    return LazyHeadLogits((pair,), elsewhere(VOCABULARY, dtype=dtype), **options)


def full():
    return FullDistribution((head(),))


def averaged(averaging):
    members = tuple(FullDistribution((head(),)) for _ in range(2))
    logits = tuple(source for member in members for source in member.logits)
    return AveragedDistribution(logits, members=members, weights=(0.3, 0.7), averaging=averaging)


def top_k():
    return TopK(elsewhere(COUNT, 3, dtype=torch.long), elsewhere(COUNT, 3))


def evaluated(student, teacher, terms):
    """Values and gradients of terms, one more of them only looked at."""
    weights = [*[elsewhere(COUNT, dtype=torch.float64) for _ in terms], None]
    chunked = ChunkedPass(student, teacher, [*terms, CrossEntropy(labels())], CHUNK_BYTES)
    return chunked.values_and_gradients(weights, [True] * len(student.inputs))


def test_a_fake_device_refuses_what_it_is_here_for(fake):
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.add(elsewhere(2), torch.empty(2))
    with pytest.raises(DataDependentOutputException):
        elsewhere(1).item()
    with pytest.raises(DynamicOutputShapeException):
        elsewhere(2).nonzero()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 3.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", available_divergences())
def test_every_divergence(fake, name, temperature, options):
    term = DivergenceTerm(
        make_divergence(name), student_temperature=temperature, teacher_temperature=temperature
    )
    values, gradients = evaluated(head(**options), full(), [term])
    assert values.shape == (2, COUNT)
    assert values.device == ELSEWHERE
    assert [gradient.device for gradient in gradients] == [ELSEWHERE] * 3
    assert gradients[1].shape == (VOCABULARY, WIDTH)


TERMS = {
    "cross_entropy": lambda: CrossEntropy(labels()),
    "entropy": Entropy,
    "teacher_cross_entropy": TeacherCrossEntropy,
    "weighted_sum": lambda: WeightedSum(
        (CrossEntropy(labels()), 0.5), (TeacherCrossEntropy(), 0.5)
    ),
    "log_ratio": lambda: LogRatio(labels(), elsewhere(COUNT)),
}


@pytest.mark.parametrize("name", TERMS)
def test_every_other_term_of_a_loss(fake, name):
    values, _ = evaluated(head(), full(), [TERMS[name]()])
    assert values.device == ELSEWHERE


@pytest.mark.parametrize("averaging", ["logits", "probabilities", "log_probs"])
def test_an_ensemble(fake, averaging):
    values, _ = evaluated(
        head(), averaged(averaging), [DivergenceTerm(make_divergence("forward_kl"))]
    )
    assert values.device == ELSEWHERE


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_k_tokens(fake, name):
    values, _ = evaluated(head(), top_k(), [DivergenceTerm(make_divergence(name))])
    assert values.device == ELSEWHERE


def test_what_is_looked_at_and_not_trained_on(fake):
    terms = [Entropy(), TeacherEntropy(), Top1Agreement(), TeacherTokenLogProb(labels())]
    values = ChunkedPass(head(), full(), terms, CHUNK_BYTES).values()
    assert values.shape == (4, COUNT)
    assert values.device == ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands(fake, dtype):
    values, gradients = evaluated(
        head(dtype),
        FullDistribution((head(dtype),)),
        [DivergenceTerm(make_divergence("reverse_kl"))],
    )
    assert values.dtype == gradients[0].dtype == torch.float32


def test_positions_that_are_known(fake):
    mask = elsewhere(2, 7, dtype=torch.bool)
    places = elsewhere(COUNT, dtype=torch.long)
    positions = ScoredPositions(mask, labels(), places)
    assert positions.rows.device == ELSEWHERE
    assert positions.tokens_per_row.shape == (2,)
    assert positions.pick(elsewhere(2, 7, WIDTH)).shape == (COUNT, WIDTH)
    assert positions.at_tokens(elsewhere(COUNT)).shape == (2, 7)
    assert positions.select(elsewhere(2, 7, VOCABULARY, dtype=torch.bfloat16)).device == ELSEWHERE


def test_positions_that_nobody_has_found_are_asked_for(fake):
    with pytest.raises(DynamicOutputShapeException):
        ScoredPositions.from_labels(elsewhere(2, 7, dtype=torch.long))


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(),
        SamplingOptions(),
        SamplingOptions(top_k=3),
        SamplingOptions(top_p=0.9),
        SamplingOptions(top_k=5, top_p=0.9),
    ],
    ids=["greedy", "sampled", "top_k", "top_p", "both"],
)
def test_tokens_are_drawn(fake, options):
    tokens = draw(elsewhere(4, VOCABULARY), elsewhere(4, dtype=torch.float64), options)
    assert tokens.shape == (4,)
    assert tokens.device == ELSEWHERE


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with ELSEWHERE:
        return LlamaForCausalLM(config).eval()


@models_run_elsewhere
def test_a_decoder_looks_at_values_once(fake, monkeypatch):
    """Whether prompts are padded, before the first token."""
    model, ids = llama(), elsewhere(2, 5, dtype=torch.long)
    with pytest.raises(DataDependentOutputException):
        Decoder(model, ids, torch.ones_like(ids))
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch.Tensor, "all", lambda self: True)
        decoder = Decoder(model, ids, torch.ones_like(ids))
    for _ in range(3):
        with torch.no_grad():
            _, log_probs = next_token([decoder], Mixture((1.0,)), SamplingOptions(), None)
            decoder.append(draw(log_probs, elsewhere(2, dtype=torch.float64), SamplingOptions()))
    assert decoder.logits.shape == (2, VOCABULARY)
    assert decoder.logits.device == ELSEWHERE


@models_run_elsewhere
def test_a_teacher_answers(fake):
    model = llama()
    teacher, backend = LocalTeacher.of(model), FusedLogits()
    teacher._model = model
    # To find a head, a model's logits are compared with those of its parts: values, once in a run.
    backend._heads.append((model, OutputHead(model.lm_head)))
    ids = elsewhere(2, 7, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": elsewhere(2, 7, dtype=torch.long), "labels": ids}
    places = elsewhere(COUNT, dtype=torch.long)
    positions = ScoredPositions(elsewhere(2, 7, dtype=torch.bool), labels(), places)
    answer = teacher.answer(batch, positions, logits_backend=backend)
    values, _ = evaluated(head(), answer, [DivergenceTerm(make_divergence("forward_kl"))])
    assert values.device == ELSEWHERE
