import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_kd.generation import GenerationOptions, SamplingOptions, sample, sampler
from lightning_kd.generation.completions import Completions
from lightning_kd.generation.drawing import draw
from lightning_kd.generation.uniforms import Uniforms
from lightning_kd.models import LoRA
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

LENGTHS = [(2, 5), (5, 3), (1, 2), (4, 1), (3, 3), (2, 2)]
BATCH = with_prompts(ragged_batch(LENGTHS))
PROMPTS = BATCH["prompt_ids"], BATCH["prompt_mask"]
ENDS = {"eos_ids": {1}, "pad_id": 0}


def other_models():
    small = {"vocab_size": 18, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    configs = {
        "absolute positions": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **small),
        "no positions": BloomConfig(hidden_size=16, n_layer=2, n_head=2, **small),
        "sliding window": MistralConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
            **small,
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(20)
        yield pytest.param(model, id=name)
    adapted = LoRA(r=2).adapt(tiny_llama(3)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first: without it the adapter does nothing
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    yield pytest.param(adapted, id="adapters")


def greedy_of_transformers(model, ends, longest):
    """What ``generate`` makes of the prompts."""
    return model.generate(
        input_ids=PROMPTS[0],
        attention_mask=PROMPTS[1],
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=sorted(ends),
    )[:, PROMPTS[0].shape[1] :]


@pytest.mark.parametrize("ends", [{1}, {1, 5, 9}], ids=["one end", "several"])
@pytest.mark.parametrize("model", [pytest.param(tiny_llama(3).eval(), id="llama"), *other_models()])
def test_greedy_is_that_of_transformers_token_for_token(model, ends):
    options = GenerationOptions(max_new_tokens=12)
    ours = sample([(model, 1.0)], *PROMPTS, options, seeds=range(6), eos_ids=ends, pad_id=0)
    assert torch.equal(ours.ids, greedy_of_transformers(model, ends, 12))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_forward_pass(temperature):
    model = tiny_llama(0).eval()
    options = SamplingOptions(max_new_tokens=10, temperature=temperature)
    written = sample([(model, 1.0)], *PROMPTS, options, seeds=range(6), **ENDS)
    for row, (prompt, mask) in enumerate(zip(*PROMPTS, strict=True)):
        prompt, completion = prompt[mask.bool()], written.ids[row][written.mask[row]]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        got = written.log_probs[row][written.mask[row]]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert written.log_probs[row][~written.mask[row]].abs().sum() == 0
    assert torch.equal(written.log_probs, written.sampling_log_probs)


VOCABULARY, LONGEST = 5, 3


def small(seed):
    return tiny_llama(seed, vocab_size=VOCABULARY).double().eval()


def warped(logits, options):
    """Next-token probabilities as transformers' own warpers make them."""
    warpers = LogitsProcessorList()
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return warpers(None, (logits / options.temperature)[None])[0].softmax(-1)


@torch.no_grad()
def enumerated(weighted_models, prompt, options):
    """The probability of every completion of at most LONGEST tokens, by full forward passes."""
    result = {}
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            ended = tokens[-1] == 1
            if 1 in tokens[:-1] or not (ended or length == LONGEST):
                continue
            ids, probability = prompt, 1.0
            for token in tokens:
                each = [w * warped(m(ids[None]).logits[0, -1], options) for m, w in weighted_models]
                probability *= sum(each)[token].item()
                ids = torch.cat([ids, torch.tensor([token])])
            result[tokens] = probability
    assert sum(result.values()) == pytest.approx(1, abs=1e-9)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weighted", "options"),
    [
        ([(0, 1.0)], SamplingOptions(max_new_tokens=LONGEST)),
        ([(0, 1.0)], SamplingOptions(max_new_tokens=LONGEST, temperature=0.6)),
        ([(0, 1.0)], SamplingOptions(max_new_tokens=LONGEST, top_k=3)),
        ([(0, 1.0)], SamplingOptions(max_new_tokens=LONGEST, top_p=0.8)),
        ([(0, 0.8), (1, 0.2)], SamplingOptions(max_new_tokens=LONGEST)),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "mixture"],
)
def test_samples_have_the_enumerated_distribution(weighted, options):
    models = [(small(seed), weight) for seed, weight in weighted]
    prompt = torch.tensor([2, 3])
    expected = enumerated(models, prompt, options)
    count = 6000
    prompts = prompt.repeat(count, 1)
    written = sample(models, prompts, torch.ones_like(prompts), options, seeds=range(count), **ENDS)
    seen = dict.fromkeys(expected, 0)
    for ids, mask in zip(written.ids, written.mask, strict=True):
        seen[tuple(ids[mask].tolist())] += 1
    likely = [k for k, p in expected.items() if p * count >= 5]
    rare = [k for k in expected if k not in set(likely)]
    observed = [seen[k] for k in likely] + [sum(seen[k] for k in rare)]
    wanted = [expected[k] * count for k in likely] + [sum(expected[k] for k in rare) * count]
    if wanted[-1] < 5:  # too few for the test's approximation: into the last likely one
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert len(observed) > 5
    assert stats.chisquare(observed, np.array(wanted) * count / sum(wanted)).pvalue > 1e-3
    impossible = [k for k, p in expected.items() if p == 0]
    assert all(seen[k] == 0 for k in impossible)


def test_a_mixture_keeps_the_student_s_log_probs_and_those_it_was_drawn_from():
    student, teacher, alpha = small(0), small(1), 0.2
    prompts = torch.tensor([[2, 3]]).repeat(64, 1)
    options = SamplingOptions(max_new_tokens=LONGEST)
    mask = torch.ones_like(prompts)
    written = sample(
        [(student, 1 - alpha), (teacher, alpha)], prompts, mask, options, seeds=range(64), **ENDS
    )
    ids = torch.cat([prompts, written.ids], -1)
    with torch.no_grad():
        own, other = (
            m(ids).logits[:, 1:-1].softmax(-1).gather(-1, written.ids[:, :, None])[:, :, 0]
            for m in (student, teacher)
        )
    kept = written.mask
    mixture = (1 - alpha) * own + alpha * other
    torch.testing.assert_close(written.log_probs[kept], own.log()[kept])
    torch.testing.assert_close(written.sampling_log_probs[kept], mixture.log()[kept])
    weights = (written.log_probs - written.sampling_log_probs)[kept].exp()
    assert weights.max() <= 1 / (1 - alpha) + 1e-12
    assert weights.min() < 0.95


def test_a_row_writes_the_same_in_any_batch():
    model = tiny_llama(0).eval()
    options = SamplingOptions(max_new_tokens=16)
    seeds = [11, 12, 13, 14, 15, 16]
    together = sample([(model, 1.0)], *PROMPTS, options, seeds=seeds, **ENDS)
    backwards = sample(
        [(model, 1.0)], PROMPTS[0].flip(0), PROMPTS[1].flip(0), options, seeds=seeds[::-1], **ENDS
    )
    for row, (prompt, mask) in enumerate(zip(*PROMPTS, strict=True)):
        own = prompt[mask.bool()][None]
        alone = sample(
            [(model, 1.0)], own, torch.ones_like(own), options, seeds=[seeds[row]], **ENDS
        )
        text = together.ids[row][together.mask[row]]
        assert torch.equal(alone.ids[0][alone.mask[0]], text)
        assert torch.equal(backwards.ids[5 - row][backwards.mask[5 - row]], text)


class Forwarded:
    """Counts the tokens that go through a model."""

    def __init__(self, model) -> None:
        self.tokens = 0
        self.handle: RemovableHandle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, args, kwargs) -> None:
        self.tokens += kwargs["input_ids"].numel()
        assert kwargs["use_cache"]


def test_ended_rows_cost_nothing():
    """At most 1.1 tokens forwarded for each that is generated, also where rows end far apart."""
    model = tiny_llama(0, max_position_embeddings=256).eval()
    rows = 64
    prompts = torch.randint(2, 18, (rows, 2), generator=torch.Generator().manual_seed(0))
    counter = Forwarded(model)
    written = sample(
        [(model, 1.0)],
        prompts,
        torch.ones_like(prompts),
        SamplingOptions(max_new_tokens=128),
        seeds=range(rows),
        **ENDS,
    )
    lengths = written.mask.sum(-1)
    assert lengths.min() < 10 < 40 < lengths.max()
    read_twice = counter.tokens - prompts.numel()
    assert read_twice <= 1.1 * lengths.sum()


def test_training_mode_checkpointing_and_cache_settings_come_back():
    model = tiny_llama(0, attention_dropout=0.5).train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.config.use_cache = False
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    counter = Forwarded(model)
    options = SamplingOptions(max_new_tokens=8)
    first, again = (
        sample([(model, 1.0)], *PROMPTS, options, seeds=range(6), **ENDS) for _ in range(2)
    )
    assert torch.equal(first.ids, again.ids)
    assert modes == [part.training for part in model.modules()]
    assert model.is_gradient_checkpointing
    assert not model.config.use_cache
    assert counter.tokens <= 2 * (PROMPTS[0].numel() + 6 * 8)


@pytest.mark.parametrize("wrong", [{"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_a_mixture_of_truncated_distributions_is_refused(wrong):
    options = SamplingOptions(max_new_tokens=4, **wrong)
    with pytest.raises(ValueError, match="importance weight would be 0 or unbounded"):
        sample([(small(0), 0.8), (small(1), 0.2)], *PROMPTS, options, seeds=range(6), **ENDS)


def test_a_model_can_be_trained_on_what_it_wrote():
    """Also where rotary embeddings change with the length, in buffers that a backward pass meets."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny_llama(0, max_position_embeddings=8, rope_parameters=rope)
    written = sample(
        [(model, 1.0)], *PROMPTS, SamplingOptions(max_new_tokens=16), seeds=range(6), **ENDS
    )
    assert written.ids.shape[1] > 8
    assert not any(buffer.is_inference() for buffer in model.buffers())
    loss = -model(written.ids).logits.log_softmax(-1).gather(-1, written.ids[:, :, None]).mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(tensor.is_inference() for tensor in vars(written).values())


def test_a_model_without_a_cache_is_sent_to_transformers():
    config = MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match="keeps no key-value cache; choose engine: TransformersEngine"
    ):
        sample([(model, 1.0)], *PROMPTS, SamplingOptions(max_new_tokens=4), seeds=range(6), **ENDS)


def test_padding_that_makes_nan_in_float64_is_refused_by_name():
    """Attention of Bloom takes its softmax in float32, where the lowest float64 is minus infinity."""
    config = BloomConfig(vocab_size=18, hidden_size=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    options = SamplingOptions(max_new_tokens=4)
    with pytest.raises(ValueError, match=r"BloomForCausalLM is in float64 and gives NaN.*float32"):
        sample([(model, 1.0)], *PROMPTS, options, seeds=range(6), **ENDS)
    alone = PROMPTS[0][1:2], PROMPTS[1][1:2]
    assert alone[1].all()
    written = sample([(model, 1.0)], *alone, options, seeds=[1], **ENDS)
    expected = sample([(model.float(), 1.0)], *alone, options, seeds=[1], **ENDS)
    assert torch.equal(written.ids, expected.ids)


def test_no_token_beyond_the_shared_vocabulary_is_drawn():
    written = sample(
        [(tiny_llama(0).eval(), 1.0)],
        *PROMPTS,
        SamplingOptions(max_new_tokens=32, temperature=5.0),
        seeds=range(6),
        width=6,
        **ENDS,
    )
    assert written.ids.max() == 5


def test_parts_join_to_what_they_were():
    options = SamplingOptions(max_new_tokens=10)
    whole = sample([(tiny_llama(0).eval(), 1.0)], *PROMPTS, options, seeds=range(6), **ENDS)
    parts = [whole.rows(slice(0, 2)), whole.rows(slice(2, 6))]
    joined = Completions.join(parts, pad_id=0)
    assert torch.equal(joined.ids, whole.ids)
    assert torch.equal(joined.log_probs, whole.log_probs)
    assert torch.equal(joined.ended, whole.ended)


def test_joined_parts_are_filled_up_with_padding_and_log_probs_with_zero():
    """The padding is no zero here, and no log-probability is: neither can stand for the other."""
    short = Completions(
        torch.tensor([[4, 1]]), torch.ones(1, 2, dtype=torch.bool), *torch.full((2, 1, 2), -0.5), T
    )
    long = Completions(
        torch.tensor([[5, 6, 7, 8]]),
        torch.ones(1, 4, dtype=torch.bool),
        *torch.full((2, 1, 4), -0.25),
        ~T,
    )
    joined = Completions.join([short, long], pad_id=9)
    assert joined.ids.tolist() == [[4, 1, 9, 9], [5, 6, 7, 8]]
    assert joined.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert joined.log_probs.tolist() == [[-0.5, -0.5, 0.0, 0.0], [-0.25] * 4]
    assert joined.sampling_log_probs.tolist() == [[-0.5, -0.5, 0.0, 0.0], [-0.25] * 4]
    assert joined.ended.tolist() == [True, False]


T = torch.tensor([True])


@torch.no_grad()
def test_greedy_log_probs_are_those_at_temperature_1():
    model = tiny_llama(0).eval()
    written = sample(
        [(model, 1.0)], *PROMPTS, GenerationOptions(max_new_tokens=6), seeds=range(6), **ENDS
    )
    for row, (prompt, mask) in enumerate(zip(*PROMPTS, strict=True)):
        prompt, completion = prompt[mask.bool()], written.ids[row][written.mask[row]]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).max(-1).values
        got = written.log_probs[row][written.mask[row]]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_limit_that_is_never_reached_takes_no_memory():
    """Without a limit of positions a model may be given any; its random numbers do not change."""
    config = BloomConfig(vocab_size=6, hidden_size=16, n_layer=1, n_head=2, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = torch.full((3, 2), 2)
    few, many = (
        sample(
            [(model, 1.0)],
            prompts,
            torch.ones_like(prompts),
            SamplingOptions(max_new_tokens=count),
            seeds=range(3),
            **ENDS,
        )
        for count in (200, 2**24)
    )
    assert few.ended.all()
    assert torch.equal(few.ids, many.ids)


def test_random_numbers_do_not_depend_on_how_many_are_drawn_at_once():
    numbers = Uniforms([5, 6], torch.device("cpu"))
    drawn = torch.stack([numbers.at(place) for place in range(600)], 1)
    for row, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.rand(600, generator=generator, dtype=torch.float64)
        assert torch.equal(drawn[row], expected)


def test_a_number_that_rounds_up_to_1_draws_the_last_token():
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    drawn = draw(log_probs, torch.ones(1, dtype=torch.float64), SamplingOptions(max_new_tokens=1))
    assert drawn.tolist() == [2]


def test_a_process_whose_rows_have_ended_goes_on_with_the_others(monkeypatch):
    """In shards, all processes run the model together; another one writes three tokens more."""
    left, asked = [], []

    def any_process(flag, device):
        asked.append((flag, device))
        left.append(flag)
        return left.count(False) <= 3

    options = SamplingOptions(max_new_tokens=200)
    alone = sample([(tiny_llama(1), 1.0)], *PROMPTS, options, seeds=range(6), **ENDS)
    monkeypatch.setattr(sampler, "is_sharded", lambda model: True)
    monkeypatch.setattr(sampler, "any_process", any_process)
    together = sample([(tiny_llama(1), 1.0)], *PROMPTS, options, seeds=range(6), **ENDS)
    length = alone.ids.shape[1]
    assert alone.ended.all()
    assert together.ids.shape[1] == length + 3
    assert torch.equal(together.ids[:, :length], alone.ids)
    assert not together.mask[:, length:].any()
    assert {type(flag) for flag, _ in asked} == {bool}
