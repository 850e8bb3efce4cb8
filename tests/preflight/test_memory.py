"""Estimates of memory, beside what is measured."""

from itertools import accumulate

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_kd import (
    GKD,
    SFT,
    ArithmeticData,
    CachedSampler,
    ContinuousBatchingSampler,
    FusedLogits,
    LocalTeacher,
    StudentSpec,
    SupervisedKD,
    TransformersContinuousBatching,
    check,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.generation.decoder import Decoder
from lightning_kd.models import LoRA
from lightning_kd.models.skeleton import skeleton
from lightning_kd.preflight import memory
from lightning_kd.preflight.cache_sizes import cache_bytes, kept_types
from lightning_kd.preflight.memory import available_bytes
from tests.support.harness import trainer as trainer_of
from tests.support.toys import letter_tokenizer, tiny_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def parts(report):
    return {part.what: part.bytes for part in report.facts.memory.parts}


def size(tensors):
    """Bytes of the storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Measure(Callback):
    """Measures gradients and states of the optimizer after a step."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.gradients = size(p.grad for p in pl_module.student.parameters() if p.grad is not None)

    def on_train_end(self, trainer, pl_module):
        student = pl_module.student
        self.weights = size([*student.parameters(), *student.buffers()])
        states = trainer.optimizers[0].state.values()
        self.states = size(v for state in states for v in state.values() if torch.is_tensor(v))


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize(
    ("name", "precision", "lora"),
    [
        ("AdamW", "32-true", None),
        ("AdamW", "bf16-true", None),
        ("AdamW", "32-true", LoRA(r=3)),
        ("SGD", "32-true", None),
        ("momentum", "bf16-true", LoRA(r=3)),
        ("fused", "32-true", None),
        ("Adafactor", "32-true", None),
        ("Adafactor", "bf16-true", LoRA(r=3)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_weights_gradients_and_states_are_those_after_a_step(name, precision, lora):
    student = StudentSpec(config=CONFIG, lora=lora)
    module = SFT(student=student, optimizer=OPTIMIZERS[name])
    data = ArithmeticData(train_size=8)
    measured = Measure()
    fit = trainer_of(max_steps=2, max_epochs=None, callbacks=[measured], precision=precision)
    estimated = parts(check(module, data, fit))
    fit.fit(module, datamodule=data)
    assert estimated["weights of the student"] == measured.weights
    assert estimated["gradients"] == measured.gradients
    assert estimated.get("states of the optimizer", 0) == measured.states


def test_weights_of_a_teacher_in_another_type(tmp_path):
    saved = tiny_llama(1, vocab_size=14)
    saved.save_pretrained(tmp_path / "teacher")
    for dtype in ("float32", "bfloat16", "auto"):
        teacher = LocalTeacher(str(tmp_path / "teacher"), dtype=dtype)
        module = SupervisedKD(student=StudentSpec(config=CONFIG), teacher=teacher)
        estimated = parts(check(module, ArithmeticData(train_size=8)))["weights of the teacher"]
        loaded = teacher.load(ArithmeticData().tokenizer, "teacher")
        assert estimated == size([*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize(("prompt", "new"), [(5, 20), (5, 70), (90, 200)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_of_generation_is_as_large_as_the_sampler_makes_it(prompt, new, kind):
    config = dict(CONFIG, max_position_embeddings=512)
    if kind == "gpt2":
        config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 2}
    spec, rows = StudentSpec(config=config), 3
    model = spec.build(letter_tokenizer())
    estimate = memory.allocated_length(prompt, new) * rows
    types = torch.float32, torch.float32
    estimate *= cache_bytes(skeleton(spec, letter_tokenizer(), "student"), types)
    with torch.inference_mode():
        ids = torch.full((rows, prompt), 3)
        decoder = Decoder(model, ids, torch.ones_like(ids))
        for _ in range(new - 1):
            decoder.append(torch.full((rows,), 3))
    layers = decoder._cache.layers
    assert size(t for layer in layers for t in (layer._all_keys, layer._all_values)) == estimate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed", "16-mixed"])
def test_keys_and_values_are_of_the_types_that_generation_keeps(kind, precision):
    """Those of a decoder in the context that the trainer's precision gives a step."""
    config = CONFIG
    if kind == "gpt2":
        config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2}
    spec = StudentSpec(config=config)
    module = GKD(student=spec, teacher=LocalTeacher(config=config))
    options = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=6))
    true = precision.endswith("true")
    if precision == "16-mixed":  # Lightning has it on accelerators alone
        context = torch.autocast("cpu", torch.float16)
        found = kept_types(skeleton(spec, letter_tokenizer(), "student"), torch.float16)
    else:
        fit = trainer_of(callbacks=[options], precision=precision)
        context = fit.precision_plugin.train_step_context()
        said = parts(check(module, ArithmeticData(train_size=8, batch_size=4), fit))
    model = spec.build(letter_tokenizer())
    model = fit.precision_plugin.convert_module(model) if true else model
    with context, torch.inference_mode():
        ids = torch.full((4, 8), 3)
        layers = Decoder(model, ids, torch.ones_like(ids))._cache.layers
    kept = layers[0].keys.dtype, layers[0].values.dtype
    if precision == "16-mixed":
        assert found == kept
    else:
        tensors = [t for layer in layers for t in (layer._all_keys, layer._all_values)]
        assert said["key-value cache of the student"] == size(tensors)


def test_the_chunk_is_of_completions_that_are_trained_on():
    """Completions of the data, or those that are generated, or the longer of both."""
    config = dict(CONFIG, vocab_size=4000)
    long = ArithmeticData(train_size=8, batch_size=4)
    sizes = {}
    for lmbda in (0.0, 0.5, 1.0):
        for new in (2, 200):
            module = GKD(student=StudentSpec(config=config), teacher=LocalTeacher(config=config))
            rollouts = OnPolicyGeneration(
                lmbda=lmbda, generation=SamplingOptions(max_new_tokens=new)
            )
            found = parts(check(module, long, trainer_of(callbacks=[rollouts])))
            sizes[lmbda, new] = found["chunk of logits"]
    assert sizes[1.0, 2] < sizes[0.0, 2] == sizes[0.5, 2] == sizes[0.0, 200] < sizes[1.0, 200]
    assert sizes[0.5, 200] == sizes[1.0, 200]


def test_the_cache_of_a_run_is_of_a_window():
    module = GKD(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    data = ArithmeticData(train_size=64, batch_size=4)
    generation = SamplingOptions(max_new_tokens=6)
    for options, rows in (({}, 8), ({"steps_per_window": 3}, 24), ({"rows_at_once": 5}, 5)):
        rollouts = OnPolicyGeneration(generation=generation, engine=CachedSampler(), **options)
        fit = trainer_of(callbacks=[rollouts], accumulate_grad_batches=2)
        # Two layers, two heads of 6 numbers of 4 bytes, keys and values, for 8 + 64 tokens.
        expected = rows * (8 + 64) * 2 * 2 * 6 * 4 * 2
        assert parts(check(module, data, fit))["key-value cache of the student"] == expected


def test_the_cache_of_continuous_batching_is_of_its_slots():
    module = GKD(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    data = ArithmeticData(train_size=64, batch_size=4)
    generation = SamplingOptions(max_new_tokens=6)
    for slots, rows in ((3, 3), (64, 8)):
        engine = ContinuousBatchingSampler(slots)
        rollouts = OnPolicyGeneration(generation=generation, engine=engine)
        fit = trainer_of(callbacks=[rollouts], accumulate_grad_batches=2)
        # As above, with room for 64 tokens behind the longest completion but its last token.
        expected = rows * (8 + 5 + 64) * 2 * 2 * 6 * 4 * 2
        assert parts(check(module, data, fit))["key-value cache of the student"] == expected


def test_the_paged_cache_is_of_its_slots_in_whole_pages():
    module = GKD(student=StudentSpec(config=CONFIG), teacher=LocalTeacher(config=CONFIG))
    data = ArithmeticData(train_size=64, batch_size=4)
    for slots, rows, new, pages in ((3, 3, 6, 2), (64, 8, 248, 2), (64, 8, 249, 3)):
        engine = TransformersContinuousBatching(slots)
        generation = SamplingOptions(max_new_tokens=new)
        rollouts = OnPolicyGeneration(generation=generation, engine=engine)
        fit = trainer_of(callbacks=[rollouts], accumulate_grad_batches=2)
        # Of 8 + new tokens, and a page more.
        expected = rows * 256 * pages * 2 * 2 * 6 * 4 * 2
        assert parts(check(module, data, fit))["key-value cache of the student"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "kd"])
def test_the_chunk_of_logits_is_what_a_pass_allocates(method):
    """The peak of a pass over a vocabulary that is far larger than the model, by the profiler."""
    wide = dict(CONFIG, vocab_size=40_000)
    options = {"student": StudentSpec(config=wide), "logits_backend": FusedLogits(8)}
    if method == "sft":
        module = SFT(**options)
    else:
        module = SupervisedKD(teacher=LocalTeacher(config=wide), **options)
    data = ArithmeticData(train_size=64, batch_size=32)
    estimated = parts(check(module, data))["chunk of logits"]
    peaks = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            scores = pl_module.score(batch)
            terms = pl_module.loss_terms(batch, scores)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                pl_module._evaluate(scores, terms, None)
            events = profiled.profiler.kineto_results.events()
            changes = [e for e in events if e.name() == "[memory]"]
            held = accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
            peaks.append(max(held))

    fit = trainer_of(max_steps=1, max_epochs=None, callbacks=[Watch()])
    fit.fit(module, datamodule=data)
    assert estimated == pytest.approx(peaks[0], rel=0.1)


def test_no_weights_are_made_and_nothing_random_is_drawn():
    huge = dict(CONFIG, hidden_size=16384, intermediate_size=65536, num_hidden_layers=40)
    module = SFT(student=StudentSpec(config=huge))
    before = torch.get_rng_state()
    report = check(module, ArithmeticData(train_size=8))
    assert torch.equal(before, torch.get_rng_state())
    assert parts(report)["weights of the student"] > 500e9
    assert [finding.name for finding in report.findings] == ["memory"]


def test_a_model_that_was_handed_over_is_left_as_it_is():
    model = tiny_llama(0, vocab_size=14)
    names = list(model.state_dict())
    module = SFT(student=StudentSpec.of(model, lora=LoRA(r=2)))
    report = check(module, ArithmeticData(train_size=8))
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert 0 < report.facts.student.trainable < report.facts.student.parameters
    assert "weights of the student" not in parts(report)  # they are there already


def test_processes_on_one_machine_add_up():
    module, data = SFT(student=StudentSpec(config=CONFIG)), ArithmeticData(train_size=8)
    one, two = (
        check(
            module, data, L.Trainer(accelerator="cpu", devices=n, logger=False)
        ).facts.memory.needed("cpu")
        for n in (1, 2)
    )
    assert two == 2 * one


def test_free_memory_of_the_machine_is_plausible():
    """Less than there is, and more than this process may need."""
    psutil = pytest.importorskip("psutil")
    free = available_bytes(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
    assert available_bytes(torch.device("meta")) is None
    assert available_bytes(torch.device("cuda", 99)) is None  # which its placement refuses by name
