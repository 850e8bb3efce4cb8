"""The difference of log-probabilities between sampling and training, in real runs."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_kd import CachedSampler, SamplingOptions
from lightning_kd.callbacks.metric_logging import on_one_device
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, MiniLLM, OnPolicyDistillation
from lightning_kd.teachers import LocalTeacher
from tests.callbacks.rollouts.test_health import Seen, module_of
from tests.callbacks.two_rank_health import run
from tests.generation.test_engine import ListedEngine
from tests.support.toys import tiny_llama

NAMES = ["rollout/log_prob_difference_mean", "rollout/log_prob_difference_max"]


class Inexact(CachedSampler):
    """Records other log-probabilities than those it has sampled with."""

    def generate(self, prompts, options, *, seeds, models):
        found = super().generate(prompts, options, seeds=seeds, models=models)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(found.ids.shape, generator=generator) * found.mask
        return replace(found, log_probs=found.log_probs - noise)


def difference(logged):
    return [logged.get(name) for name in NAMES]


@torch.no_grad()
def by_a_forward_pass(batch):
    """Mean and largest difference to the untrained student, from all logits in float64."""
    model = tiny_llama(0).double().eval()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    following = batch["input_ids"][:, 1:, None]
    own = logits.log_softmax(-1).gather(-1, following)[..., 0]
    found = (own - batch["log_probs"][:, 1:]).abs()[batch["labels"][:, 1:] != -100]
    return [found.mean().item(), found.max().item()]


@pytest.mark.parametrize("method", [GKD, OnPolicyDistillation, MiniLLM])
def test_a_sampler_that_records_other_numbers_is_found_out(method):
    seen = Seen()
    module = module_of(method, LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 1, options={"engine": Inexact()}, callbacks=[seen]).steps[0]
    expected = by_a_forward_pass(seen.batches[0])
    assert 0.3 < expected[0] < 0.7 < expected[1] < 1.01
    assert difference(logged) == pytest.approx(expected, rel=1e-4)


def test_in_float32_there_is_round_off_alone():
    module = module_of(OnPolicyDistillation, LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 2).steps
    for step in (0, 1):
        mean, largest = difference(logged[step])
        assert 0 <= mean <= largest < 1e-4


@pytest.mark.parametrize("method", [GKD, OnPolicyDistillation])
@pytest.mark.filterwarnings("ignore:the student gives")
def test_tokens_that_only_the_student_has_are_in_neither(method):
    module = method(
        student=StudentSpec.of(tiny_llama(0, vocab_size=24)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        vocabulary="shared",
    )
    logged = run(module, 1).steps[0]
    assert logged["train/student_dropped_mass"] > 0.1
    mean, largest = difference(logged)
    assert 0 <= mean <= largest < 1e-4


def test_greedy_completions_are_measured_at_temperature_1():
    seen = Seen()
    generation = SamplingOptions(max_new_tokens=24, temperature=0.0)
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    options = {"engine": Inexact(), "generation": generation}
    logged = run(module, 1, options=options, callbacks=[seen]).steps[0]
    expected = by_a_forward_pass(seen.batches[0])
    assert difference(logged) == pytest.approx(expected, rel=1e-4)


def test_in_bfloat16_it_is_of_its_precision():
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    mean, largest = difference(run(module, 1, precision="bf16-mixed").steps[0])
    assert 1e-4 < mean < largest < 1


def test_only_the_first_step_of_a_window_has_the_weights_it_was_sampled_with():
    """Micro-batches of that step count together; a second pass, and steps between logs, do not."""
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    seen = Seen()
    options = {"engine": Inexact(), "passes": 2, "steps_per_window": 2}
    logged = run(
        module, 4, options=options, callbacks=[seen], batch_size=4, accumulate_grad_batches=2
    ).steps
    first = [by_a_forward_pass(batch) for batch in seen.batches[:2]]
    tokens = [int((batch["labels"] != -100).sum()) for batch in seen.batches[:2]]
    mean = sum(n * m for n, (m, _) in zip(tokens, first, strict=True)) / sum(tokens)
    expected = [mean, max(largest for _, largest in first)]
    assert difference(logged[3]) == pytest.approx(expected, rel=1e-4)
    assert [step for step in logged if NAMES[0] in logged[step]] == [3]
    module = module_of(GKD, LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 4, options={"steps_per_window": 4}, log_every_n_steps=2).steps
    assert not any(NAMES[0] in values for values in logged.values())


@pytest.mark.parametrize(
    "options",
    [
        {"engine": ListedEngine()},
        {"generation": SamplingOptions(max_new_tokens=24, temperature=0.7)},
        {"lmbda": 0.0},
    ],
    ids=["nothing recorded", "another temperature", "completions of the data"],
)
def test_what_is_not_known_is_not_logged(options):
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    logged = run(module, 2, options=options).steps
    assert not any(NAMES[0] in values for values in logged.values())


def test_values_of_the_host_and_of_a_gpu_are_logged_together():
    with FakeTensorMode():
        values = [torch.tensor(1.0), torch.empty((), device="cuda"), torch.tensor(True)]
        together = on_one_device(values)
    assert (together.device.type, together.dtype, together.shape) == ("cuda", torch.float64, (3,))
