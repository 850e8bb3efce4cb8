"""Generation with a static cache, recorded or not, against the dynamic one and transformers."""

import copy
import gc
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    XGLMConfig,
    XGLMForCausalLM,
)

from lightning_kd import CachedSampler, GenerationOptions, Prompts, SamplingOptions
from lightning_kd.generation import decoding, recording, sample, static_decoder
from lightning_kd.generation.drawing import Mixture, Replacement
from lightning_kd.generation.recording import Recorded
from tests.generation.test_sampler import (
    BATCH,
    ENDS,
    PROMPTS,
    Forwarded,
    greedy_of_transformers,
    other_models,
)
from tests.support.tape import Tape
from tests.support.toys import tiny_gemma, tiny_llama

assert not BATCH["prompt_mask"].all()


def gemma():
    """Layers with a sliding window beside others, each kind with rotary embeddings of its own."""
    model = tiny_gemma(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def gpt2():
    """Enough positions for what is generated here."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, vocab_size=18)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    return model


def eager():
    return tiny_llama(3, attn_implementation="eager").eval()


def models():
    yield pytest.param(tiny_llama(3).eval(), id="llama")
    yield pytest.param(eager(), id="eager attention")
    yield pytest.param(gemma(), id="both kinds of layer")
    yield pytest.param(gpt2(), id="absolute positions")
    yield from (each for each in other_models() if each.id != "absolute positions")


OPTIONS = {
    "greedy": GenerationOptions(max_new_tokens=90),
    "sampled": SamplingOptions(max_new_tokens=90),
    "truncated": SamplingOptions(max_new_tokens=40, temperature=1.3, top_k=9, top_p=0.9),
}


@pytest.fixture
def tapes(monkeypatch):
    """Recordings on the CPU, one for each shape."""
    made = []

    def recorder(device):
        def record(function):
            made.append(Tape())
            return Recorded(function, made[-1])

        return record

    monkeypatch.setattr(recording, "recorder", recorder)
    return made


def generated(weighted, options, *, cache, prompts=PROMPTS, ends=ENDS, seeds=None):
    seeds = range(len(prompts[0])) if seeds is None else seeds
    return sample(weighted, *prompts, options, seeds=seeds, cache=cache, **ends)


def assert_same(expected, got, atol):
    for name in ("ids", "mask", "ended"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("log_probs", "sampling_log_probs"):
        values = getattr(got, name)
        torch.testing.assert_close(values, getattr(expected, name), atol=atol, rtol=0)
        assert not values.is_inference()


def in_double(model):
    """The model in float64 and what may differ; softmax in float32 allows no more than that."""
    own = model.config.get_text_config()._attn_implementation
    if own == "eager" or model.config.model_type == "bloom":
        return model, 2e-5
    return model.double(), 1e-12


NO_END = {"eos_ids": {17}, "pad_id": 0, "width": 17}
"""An end that is beyond the width, and so is never drawn."""


@pytest.mark.slow
@pytest.mark.parametrize("model", [*models()])
def test_a_static_cache_writes_what_a_dynamic_one_writes(model):
    model, atol = in_double(model)
    expected, got = (
        generated([(model, 1.0)], OPTIONS["sampled"], cache=c, ends=NO_END)
        for c in ("dynamic", "static")
    )
    assert_same(expected, got, atol)
    assert got.ids.shape[1] == 90


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("model", [*models()])
def test_a_recording_repeats_what_it_does(tapes, model, kind):
    """Of 90 tokens all but the first two of each shape are repeated, with the tensors of the second."""
    model, atol = in_double(model)
    expected, got = (
        generated([(model, 1.0)], OPTIONS[kind], cache=cache, ends=NO_END)
        for cache in ("dynamic", "static")
    )
    assert_same(expected, got, atol)
    assert [tape.recorded for tape in tapes] == [1, 1]
    # Each shape is warmed up by a token, and the first token is drawn from the prompts' scores.
    assert [tape.replayed for tape in tapes] == [64 - 1, 90 - 1 - 64 - 1]


@pytest.mark.parametrize("kind", OPTIONS)
def test_rows_leave_recordings(tapes, kind):
    model = tiny_llama(3).double().eval()
    for ends in (ENDS, {"eos_ids": {1, 5, 9}, "pad_id": 0}):
        expected, got = (
            generated([(model, 1.0)], OPTIONS[kind], cache=cache, ends=ends)
            for cache in ("dynamic", "static")
        )
        assert_same(expected, got, 1e-12)
        assert got.ended.any()


@pytest.mark.parametrize("ends", [{1}, {1, 5, 9}], ids=["one end", "several"])
@pytest.mark.parametrize("model", [*models()])
def test_greedy_is_that_of_transformers_token_for_token(tapes, model, ends):
    model = model.float()
    ours = generated(
        [(model, 1.0)],
        GenerationOptions(max_new_tokens=12),
        cache="static",
        ends={"eos_ids": ends, "pad_id": 0},
    )
    assert torch.equal(ours.ids, greedy_of_transformers(model, ends, 12))


def test_prompts_of_one_length_and_a_mixture_are_recorded_too(tapes):
    weighted = [(tiny_llama(0).double().eval(), 0.8), (tiny_llama(1).double().eval(), 0.2)]
    ids = torch.randint(2, 18, (5, 3), generator=torch.Generator().manual_seed(0))
    prompts = ids, torch.ones_like(ids)
    expected, got = (
        generated(weighted, SamplingOptions(max_new_tokens=30), cache=cache, prompts=prompts)
        for cache in ("dynamic", "static")
    )
    assert_same(expected, got, 1e-12)
    assert not torch.equal(got.log_probs, got.sampling_log_probs)
    assert sum(tape.replayed for tape in tapes) > 0


def test_mixed_precision_is_recorded_too(tapes):
    """Values are then narrower than what the cache keeps; later texts may differ by round-off."""
    options = GenerationOptions(max_new_tokens=12)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (
            generated([(tiny_llama(3).eval(), 1.0)], options, cache=cache, ends=NO_END)
            for cache in ("dynamic", "static")
        )
    torch.testing.assert_close(got.log_probs[:, :2], expected.log_probs[:, :2], atol=0.05, rtol=0)
    assert sum(tape.replayed for tape in tapes) == 10


def test_one_token_needs_no_room():
    options = SamplingOptions(max_new_tokens=1)
    model = tiny_llama(0).double().eval()
    expected, got = (
        generated([(model, 1.0)], options, cache=cache) for cache in ("dynamic", "static")
    )
    assert_same(expected, got, 1e-12)


def test_half_of_the_rows_leave_together(tapes):
    """Rows end far apart: a recording for each halving and each growth at most."""
    model = tiny_llama(0).double().eval()
    rows = 64
    ids = torch.randint(2, 18, (rows, 2), generator=torch.Generator().manual_seed(0))
    prompts, options = (ids, torch.ones_like(ids)), SamplingOptions(max_new_tokens=60)
    expected = generated([(model, 1.0)], options, cache="dynamic", prompts=prompts)
    counter = Forwarded(model)
    got = generated([(model, 1.0)], options, cache="static", prompts=prompts)
    counter.handle.remove()
    assert_same(expected, got, 1e-12)
    lengths = got.mask.sum(-1)
    assert lengths.min() < 10 < 40 < lengths.max()
    assert 2 < len(tapes) <= 7
    replayed = sum(tape.replayed for tape in tapes)
    assert replayed > lengths.max() - 2 * len(tapes) - 2


def test_what_is_forwarded_for_rows_that_have_ended():
    model = tiny_llama(0).double().eval()
    ids = torch.randint(2, 18, (64, 2), generator=torch.Generator().manual_seed(0))
    prompts, options = (ids, torch.ones_like(ids)), SamplingOptions(max_new_tokens=60)
    counter = Forwarded(model)
    got = generated([(model, 1.0)], options, cache="static", prompts=prompts)
    counter.handle.remove()
    assert counter.tokens - ids.numel() <= 2 * got.mask.sum()


def test_the_cache_grows_by_half_and_never_beyond_the_last_token(monkeypatch):
    model = tiny_llama(0).double().eval()
    held = Counter()
    grow = static_decoder.StaticDecoder._forward

    def watched(decoder, ids, positions):
        if ids.shape[1] == 1:
            held[decoder._cache.layers[0].keys.shape[-2]] += 1
        return grow(decoder, ids, positions)

    monkeypatch.setattr(static_decoder.StaticDecoder, "_forward", watched)
    generated([(model, 1.0)], SamplingOptions(max_new_tokens=200), cache="static", ends=NO_END)
    # 5 + 64, then as much again, and the last of 200 tokens is not read.
    assert dict(held) == {69: 64, 133: 64, 199: 66, 204: 5}


@pytest.mark.parametrize("changed", ["in place", "elsewhere"])
def test_weights_may_change_between_two_windows(tapes, changed):
    model = tiny_llama(0).double().eval()
    options = SamplingOptions(max_new_tokens=20)
    generated([(model, 1.0)], options, cache="static")
    before = len(tapes)
    with torch.no_grad():
        for parameter in model.parameters():
            new = parameter * 1.1
            if changed == "in place":
                parameter.copy_(new)
            else:
                parameter.data = new
    expected, got = (
        generated([(model, 1.0)], options, cache=cache) for cache in ("dynamic", "static")
    )
    assert_same(expected, got, 1e-12)
    assert len(tapes) > before  # recorded anew


def test_a_model_can_be_trained_on_what_it_wrote(tapes):
    model = tiny_llama(0)
    written = generated([(model, 1.0)], SamplingOptions(max_new_tokens=16), cache="static")
    assert not any(buffer.is_inference() for buffer in model.buffers())
    loss = -model(written.ids).logits.log_softmax(-1).gather(-1, written.ids[:, :, None]).mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(tensor.is_inference() for tensor in vars(written).values())


def test_recordings_and_the_cache_are_released_with_the_last_token(monkeypatch):
    """At once, not when the collector comes by: training needs the memory."""
    alive = []

    def recorder(device):
        def record(function):
            recorded = Recorded(function, Tape())
            alive.append(weakref.ref(recorded))
            alive.extend(weakref.ref(decoder) for decoder in function.args[0])
            return recorded

        return record

    monkeypatch.setattr(recording, "recorder", recorder)
    gc.collect()
    gc.disable()
    try:
        generated([(tiny_llama(0), 1.0)], SamplingOptions(max_new_tokens=20), cache="static")
        assert alive
        assert [each() for each in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_a_row_writes_the_same_in_any_batch(tapes):
    model = tiny_llama(0).eval()
    options, seeds = SamplingOptions(max_new_tokens=16), [11, 12, 13, 14, 15, 16]
    together = generated([(model, 1.0)], options, cache="static", seeds=seeds)
    for row, (prompt, mask) in enumerate(zip(*PROMPTS, strict=True)):
        own = prompt[mask.bool()][None]
        alone = generated(
            [(model, 1.0)],
            options,
            cache="static",
            prompts=(own, torch.ones_like(own)),
            seeds=[seeds[row]],
        )
        text = together.ids[row][together.mask[row]]
        assert torch.equal(alone.ids[0][alone.mask[0]], text)


# Which cache it is.


def kinds_of_steps(monkeypatch, cache):
    made = []
    original = decoding.decoding_of

    def watched(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr("lightning_kd.generation.sampler.decoding_of", watched)
    prompts = Prompts(*PROMPTS, eos_ids=frozenset({1}), pad_id=0)
    CachedSampler(*cache).generate(
        prompts,
        SamplingOptions(max_new_tokens=4),
        seeds=range(6),
        models=[(tiny_llama(0).eval(), 1.0)],
    )
    return [type(each) for each in made]


@pytest.mark.parametrize(
    ("cache", "on", "kind"),
    [
        ((), set(), decoding.Decoding),
        ((), {"cpu"}, decoding.RecordedDecoding),
        (("auto",), {"cpu"}, decoding.RecordedDecoding),
        (("dynamic",), {"cpu"}, decoding.Decoding),
        (("static",), set(), decoding.RecordedDecoding),
    ],
)
def test_the_cache_is_static_where_steps_are_recorded(monkeypatch, tapes, cache, on, kind):
    assert {"cuda"} == recording.RECORDED_ON
    monkeypatch.setattr(recording, "RECORDED_ON", on)
    assert kinds_of_steps(monkeypatch, cache) == [kind]


def test_only_a_device_with_recordings_has_them():
    def function(x):
        return (x,)

    assert recording.recorder(torch.device("cpu"))(function) is function


def mamba():
    config = MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, state_size=4)
    return AutoModelForCausalLM.from_config(config).eval()


def rope(kind):
    settings = {"rope_type": kind, "factor": 2.0, "rope_theta": 10_000.0}
    return tiny_llama(0, max_position_embeddings=8, rope_parameters=settings).eval()


def with_flash_attention():
    model = tiny_llama(0).eval()
    model.config._attn_implementation = "flash_attention_2"
    return model


def not_known_to_work():
    model = tiny_llama(0).eval()
    model._can_compile_fullgraph = False
    return model


class Packed:
    is_compileable = False


def quantized():
    model = tiny_llama(0).eval()
    model.hf_quantizer = Packed()
    return model


def on_two_devices():
    model = tiny_llama(0).eval()
    model.lm_head.to("meta")
    return model


def xglm():
    """A model whose forward pass branches on a tensor."""
    config = XGLMConfig(
        vocab_size=18, d_model=16, num_layers=1, attention_heads=2, ffn_dim=32, eos_token_id=17
    )
    return XGLMForCausalLM(config)


OBSTACLES = {
    "recurrent": (mamba, "keeps something else than keys and values"),
    "dynamic NTK": (lambda: rope("dynamic"), "rotary embeddings follow the length"),
    "flash attention": (with_flash_attention, "flash attention reads no columns"),
    "unknown": (not_known_to_work, "transformers knows it not to work"),
    "quantized": (quantized, "quantized weights are unpacked on the host"),
    "two devices": (on_two_devices, "several devices"),
    "branches on a tensor": (xglm, "looks at values while it reads"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_static_is_refused_by_name(name):
    make, reason = OBSTACLES[name]
    model = make()
    refused = f"{type(model).__name__} cannot generate with a static key-value cache: .*{reason}"
    with pytest.raises(ValueError, match=refused + r".*set cache: auto or cache: dynamic"):
        generated([(model, 1.0)], SamplingOptions(max_new_tokens=16), cache="static")


def test_shards_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(static_decoder, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="it is in shards"):
        generated([(tiny_llama(0), 1.0)], SamplingOptions(max_new_tokens=2), cache="static")


def test_what_cannot_be_static_is_dynamic_and_said_once(monkeypatch, tapes):
    said = []
    monkeypatch.setattr(recording, "RECORDED_ON", {"cpu"})
    monkeypatch.setattr(decoding, "rank_zero_info", said.append)
    model, options = rope("dynamic"), SamplingOptions(max_new_tokens=16)
    came = [generated([(model, 1.0)], options, cache=c) for c in ("auto", "auto", "dynamic")]
    assert torch.equal(came[0].ids, came[2].ids)
    assert torch.equal(came[0].log_probs, came[2].log_probs)
    assert tapes == []
    assert len(said) == 1
    assert "LlamaForCausalLM cannot generate with a static key-value cache" in said[0]


@pytest.mark.parametrize("cache", ["fast", None, True, 1])
def test_no_other_kind_of_cache(cache):
    with pytest.raises(ValueError, match=r"unknown cache .*choose one of .*dynamic.*static"):
        CachedSampler(cache)


# Recordings.


class Unable(Tape):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_is_called_with_a_warning(monkeypatch):
    monkeypatch.setattr(recording, "recorder", lambda device: lambda f: Recorded(f, Unable()))
    model, options = tiny_llama(0).double().eval(), SamplingOptions(max_new_tokens=9)
    expected = generated([(model, 1.0)], options, cache="dynamic", ends=NO_END)
    with pytest.warns(UserWarning, match="not permitted when stream.*choose cache: dynamic"):
        got = generated([(model, 1.0)], options, cache="static", ends=NO_END)
    assert_same(expected, got, 1e-12)


def test_results_are_not_those_of_the_next_call():
    state = torch.zeros(2)

    def function(x):
        state.add_(x)
        return (state * 1, x + 1)

    recorded = Recorded(function, Tape())
    came = [recorded(torch.tensor([float(n), 1.0])) for n in range(5)]
    assert [values.tolist() for values, _ in came] == [[0, 1], [1, 2], [3, 3], [6, 4], [10, 5]]
    assert [values.tolist() for _, values in came] == [[n + 1, 2] for n in range(5)]


def test_a_number_of_the_host_does_not_change_in_a_recording():
    """The tape sees what a CUDA graph would do wrong."""
    count = [0]

    def function(x):
        count[0] += 1
        return (x + count[0],)

    recorded = Recorded(function, Tape())
    came = [recorded(torch.zeros(1))[0].item() for _ in range(4)]
    assert came == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x.sum().item(),),
        lambda x: (x[x > 0],),
        lambda x: (x + torch.tensor(1.0),),
        lambda x: (x.nonzero(),),
    ],
)
def test_the_tape_refuses_what_a_device_cannot_record(function):
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        Tape().record(lambda: function(torch.ones(3)))


class FakeCuda:
    """What is called of a CUDA device, in order."""

    def __init__(self, fails=False) -> None:
        self.calls, self.fails = [], fails

    def note(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *kwargs.values()))

    def CUDAGraph(self):  # noqa: N802
        return self

    def Stream(self, device):  # noqa: N802
        self.calls.append(("new stream", str(device)))
        return self

    def current_stream(self, device):
        return self

    @contextmanager
    def stream(self, stream):
        self.calls.append(("enter",))
        try:
            yield
        finally:
            self.calls.append(("leave",))

    def capture_end(self):
        self.calls.append(("end",))
        if self.fails:
            raise RuntimeError("the capture was invalidated")

    def __getattr__(self, name):
        return self.note(name)


@pytest.fixture
def cuda(monkeypatch):
    made = FakeCuda()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    recording._side_stream.cache_clear()
    yield made
    recording._side_stream.cache_clear()


RECORDING = [
    ("synchronize",),
    ("enter",),
    ("capture_begin", "thread_local"),
    ("end",),
    ("leave",),
]


def test_a_cuda_graph_is_warmed_up_recorded_and_replayed_on_one_stream(cuda):
    device = torch.device("cuda:1")
    for number in range(2):  # two shapes
        recorded = recording.recorder(device)(lambda x: (x + 1,))
        for _ in range(3):
            assert recorded(torch.ones(2))[0].tolist() == [2, 2]
        first = [("new stream", "cuda:1")] if number == 0 else []
        warm = [("wait_stream",), ("enter",), ("leave",), ("wait_stream",)]
        assert cuda.calls == [*first, *warm, *RECORDING, ("replay",), ("replay",)]
        cuda.calls.clear()


def test_a_capture_that_fails_leaves_its_stream(cuda):
    cuda.fails = True
    recorded = recording.recorder(torch.device("cuda:0"))(lambda x: (x + 1,))
    recorded(torch.ones(1))
    cuda.calls.clear()
    with pytest.warns(UserWarning, match="the capture was invalidated"):
        assert recorded(torch.ones(1))[0].item() == 2
    assert cuda.calls == RECORDING
    assert recorded(torch.ones(1))[0].item() == 2
    assert cuda.calls == RECORDING


class HostTensors(TorchDispatchMode):
    """Names of operations with a tensor of the host, which would be copied to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.add(func.overloadpacket.__name__)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("model", [*models()])
def test_no_tensor_of_the_host_takes_part_in_a_step(monkeypatch, model, kind):
    """On a device without numbers, where a copy from the host is seen as on any other."""
    device = torch.device("meta")
    model = copy.deepcopy(model).to(device)
    ids = torch.ones(3, 5, dtype=torch.long, device=device)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", lambda tensor: False)  # is all of a mask 1?
            decoders = [
                static_decoder.StaticDecoder(each, ids, torch.ones_like(ids), 20)
                for each in (model, copy.deepcopy(model))
            ]
        numbers = torch.zeros(3, dtype=torch.float64, device=device)
        with HostTensors() as seen:
            for number, mix in (
                (1, Mixture((1.0,))),
                (2, Mixture((0.8, 0.2))),
                (2, Replacement(3)),
            ):
                state = decoders[:number], mix, OPTIONS[kind], None
                decoding._read_and_draw(*state, ids[:, 0], numbers)
    assert seen.found == set()
    with HostTensors() as seen:
        ids + torch.ones(1, dtype=torch.long).to(device)
    assert "_to_copy" in seen.found
