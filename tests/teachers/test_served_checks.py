"""What a served teacher refuses, so that no run goes on with something else than it says."""

import json

import pytest
import torch

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import (
    CachedSampler,
    GenerationOptions,
    SamplingOptions,
    TransformersEngine,
)
from lightning_kd.models import FusedLogits, StudentSpec
from lightning_kd.modules import GKD, BabyLlama, SequenceKD, SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.serving.endpoints import Body
from lightning_kd.teachers import (
    CachedTeacher,
    LocalTeacher,
    ServedTeacher,
    TeacherEnsemble,
    TeacherUnavailableError,
    TopKTeacher,
)
from lightning_kd.wire import pack, unpack
from tests.serving.conftest import served
from tests.serving.faults import after, of_states
from tests.support.harness import Letters, trainer
from tests.support.toys import LETTERS, letter_tokenizer, ragged_batch, tiny_llama

CPU, BACKEND = torch.device("cpu"), FusedLogits()
BATCH = ragged_batch([(2, 5), (5, 3), (1, 7)])
POSITIONS = ScoredPositions.from_labels(BATCH["labels"])
VLLM = {"backend": "vllm", "payload": "top_k"}


@pytest.fixture(scope="module")
def server():
    with served() as running:
        yield running


def remote(server, **options):
    return ServedTeacher([server.url], **({"timeout": 20.0, "retries": 0} | options))


def prepared(teacher, tokenizer=None):
    teacher.prepare(tokenizer or letter_tokenizer(), CPU, "equal")
    return teacher


def fit(teacher, *callbacks, method=SupervisedKD, **options):
    run = trainer(max_steps=1, callbacks=list(callbacks))
    module = method(student=StudentSpec.of(tiny_llama(0)), teacher=teacher, **options)
    try:
        run.fit(module, datamodule=Letters(batch_size=2))
    finally:
        steps = run.global_step
    return steps


class Own(CachedSampler):
    """An engine of a user's."""


@pytest.mark.parametrize("engine", [Own(), TransformersEngine()])
def test_an_engine_that_the_server_would_not_use_is_refused(server, engine):
    writes = OnPolicyGeneration(
        lmbda=0.0,
        off_policy="teacher",
        engine=engine,
        generation=SamplingOptions(max_new_tokens=4),
        table_every=0,
    )
    with pytest.raises(ValueError, match=f"engine is {type(engine).__name__}, but a ServedTeacher"):
        fit(remote(server), writes, method=GKD)
    prompts = torch.tensor([[3, 4]])
    given = letter_tokenizer(), prompts, torch.ones_like(prompts), GenerationOptions(2)
    with pytest.raises(ValueError, match="leave engine out"):
        prepared(remote(server)).generate(*given, seeds=[1], engine=engine)


def setting(name, change):
    """A change of one tensor of completions."""
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


def first_is(value):
    def change(ids):
        ids[:, 0] = value
        return ids

    return change


UNSOUND = {
    "rows in another order": lambda t: {n: v.roll(1, 0) for n, v in t.items()},
    "one row fewer": lambda t: {n: v[:-1] for n, v in t.items()},
    "nothing written": setting("mask", lambda mask: mask & False),
    "no columns": lambda t: {n: v[:, :0] if v.ndim > 1 else v for n, v in t.items()},
    "the other ends": setting("ended", lambda ended: ~ended),
    "beyond the vocabulary": setting("ids", first_is(500)),
    "NaN": setting("log_probs", lambda values: values * torch.nan),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_completions_end_the_run_with_the_address(name):
    with served() as server:
        honest = server.endpoints.asks["/v1/generate"]

        def answer(body):
            found = honest(body)
            tensors, about = unpack(found.data)
            return Body(found.content_type, pack(UNSOUND[name](tensors), about))

        server.endpoints.asks = {**server.endpoints.asks, "/v1/generate": answer}
        prompts = torch.tensor([[0, 3, 4], [5, 6, 7]])
        given = letter_tokenizer(), prompts, (prompts != 0).long()
        teacher = prepared(remote(server))
        with pytest.raises(TeacherUnavailableError, match=server.url):
            teacher.generate(*given, GenerationOptions(6), seeds=[3, 4], width=18)


def inner_rolled(states):
    rolled = states.clone()
    rolled[2:-2] = rolled[2:-2].roll(1, 0)
    return rolled


def rows_swapped(states):
    """The first and the last row of the batch, 5 and 7 positions long, but for the ends."""
    swapped = states.clone()
    swapped[1:4], swapped[-4:-1] = states[-4:-1], states[1:4]
    return swapped


@pytest.mark.parametrize("change", [inner_rolled, rows_swapped, lambda states: states.flip(0)])
def test_states_of_other_positions_are_found_out(change):
    with served() as server:
        teacher = prepared(remote(server))
        after(server, 0, of_states(change))
        with pytest.raises(TeacherUnavailableError, match="do not belong to their positions"):
            teacher.answer(BATCH, POSITIONS, logits_backend=BACKEND)


def predict(teacher, **options):
    module = SequenceKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher, **options)
    found = trainer().predict(module, datamodule=Letters(batch_size=2))
    return [row for batch in found for row in batch["completion"]]


def test_an_engine_of_predict_is_refused(server):
    with pytest.raises(ValueError, match="engine is TransformersEngine, but a ServedTeacher"):
        predict(remote(server), engine=TransformersEngine())


def test_beams_are_those_of_the_local_teacher(server):
    options = GenerationOptions(6, num_beams=3)
    prompts = torch.tensor([[0, 3, 4], [5, 6, 7]])
    given = letter_tokenizer(), prompts, (prompts != 0).long(), options
    local = prepared(LocalTeacher.of(tiny_llama(1))).generate(*given, seeds=[1, 2], width=18)
    found = prepared(remote(server)).generate(*given, seeds=[1, 2], width=18)
    assert torch.equal(found.ids, local.ids)
    assert torch.equal(found.log_probs, local.log_probs)


def test_an_ensemble_that_is_asked_to_write_is_refused_with_its_address():
    twins = TeacherEnsemble([LocalTeacher.of(tiny_llama(seed)) for seed in (1, 2)])
    with (
        served(twins) as ensemble,
        pytest.raises(ValueError, match=f"served at {ensemble.url} does not: serve a LocalTeacher"),
    ):
        predict(remote(ensemble))


def test_one_model_twice_is_an_ensemble_too():
    model = tiny_llama(1)
    twice = TeacherEnsemble([LocalTeacher.of(model), LocalTeacher.of(model)])
    with served(twice) as ensemble:
        found = prepared(remote(ensemble)).answer(BATCH, POSITIONS, logits_backend=BACKEND)
    alone = prepared(LocalTeacher.of(model)).answer(BATCH, POSITIONS, logits_backend=BACKEND)
    whole = slice(0, len(POSITIONS.targets))
    log_probs = [answer.computed(whole).log_probs(1.0) for answer in (found, alone)]
    assert torch.allclose(*log_probs, atol=1e-5)


def shifted(server, by):
    """Let a server answer in vLLM's shape, with each entry beside its token."""
    honest = server.endpoints.asks["/v1/completions"]

    def answer(body):
        value = json.loads(honest(body).data)
        for choice in value["choices"]:
            entries = choice["prompt_logprobs"]
            moved = [entries[1], *entries[1:-1]] if by > 0 else [*entries[2:], entries[-1]]
            choice["prompt_logprobs"] = [None, *moved]
        return Body.of_json(value)

    server.endpoints.asks = {**server.endpoints.asks, "/v1/completions": answer}


@pytest.mark.parametrize("k", [1, 4, 17, 18])
@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_list_of_vllm_is_found_out_before_the_first_step(k, by):
    with served() as server:
        shifted(server, by)
        with pytest.raises(TeacherUnavailableError, match="the list is shifted"):
            prepared(remote(server, **VLLM, k=k))


@pytest.mark.parametrize("payload", ["top_k", "token_log_probs"])
def test_labels_that_are_not_the_rows_tokens_are_refused_where_the_server_reads_the_row(
    server, payload
):
    labels = BATCH["labels"].clone()
    labels[1, 6] = 7 if labels[1, 6] != 7 else 8
    positions = ScoredPositions.from_labels(labels)
    options = {"payload": payload} | ({"k": 4} if payload == "top_k" else {})
    kind = "top_k_and_token" if payload == "top_k" else payload
    teacher = prepared(remote(server, backend="vllm", **options))
    with pytest.raises(
        TeacherUnavailableError, match=r"in row 1 .* label at token 6 is [78], where"
    ):
        teacher.answer(BATCH, positions, kind=kind, logits_backend=BACKEND)
    own = prepared(remote(server, **options))
    answer = own.answer(BATCH, positions, kind=kind, logits_backend=BACKEND)
    with torch.no_grad():
        logits = tiny_llama(1)(BATCH["input_ids"], BATCH["attention_mask"]).logits
    expected = logits[positions.mask].log_softmax(-1).gather(-1, positions.targets[:, None])[:, 0]
    found = answer.label_log_probs if payload == "top_k" else answer.values
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_token_that_vllm_writes_counts_for_the_longest_row():
    class Rows:
        def longest(self):
            return {"train": (12, 5)}

    with served(length=12) as server:
        prepared(remote(server, payload="top_k", k=4)).check_data(Rows())
        teacher = prepared(remote(server, **VLLM, k=4))
        with pytest.raises(ValueError, match=r"up to 12 tokens, .* reads 11 at most \(12, less 1"):
            teacher.check_data(Rows())
        long = ragged_batch([(4, 7)])
        positions = ScoredPositions.from_labels(long["labels"])
        teacher.answer(long, positions, kind="top_k", logits_backend=BACKEND)
        everywhere = ScoredPositions.everywhere(long["labels"], long["attention_mask"])
        with pytest.raises(ValueError, match="the rows of a batch take up to 12 tokens"):
            teacher.answer(long, everywhere, kind="top_k", logits_backend=BACKEND)


def test_a_teacher_of_k_tokens_can_be_served():
    local = prepared(TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=6))
    expected = local.answer(BATCH, POSITIONS, logits_backend=BACKEND)
    with served(TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=6)) as server:
        teacher = prepared(remote(server, payload="top_k", k=6))
        found = teacher.answer(BATCH, POSITIONS, kind="top_k_and_token", logits_backend=BACKEND)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.allclose(found.label_log_probs, expected.label_log_probs, atol=1e-6)
        tempered = remote(server, payload="top_k", k=6, temperatures=[2.0])
        with pytest.raises(TeacherUnavailableError, match=r"tail\.2\.0"):
            prepared(tempered)
        with pytest.raises(TeacherUnavailableError, match="takes backend: lightning_kd"):
            prepared(remote(server, **VLLM, k=6))


def test_temperatures_may_be_whole_numbers(server):
    teacher = prepared(remote(server, payload="top_k", k=4, temperatures=[2]))
    answer = teacher.answer(BATCH, POSITIONS, kind="top_k_and_token", logits_backend=BACKEND)
    assert set(answer.tail_log_probs) >= {2.0}


def swapped():
    """Two ids that the handshake's text has not: capitals."""
    letters = f"{LETTERS}XY"
    return letter_tokenizer(letters), letter_tokenizer(f"{LETTERS}YX")


@pytest.mark.parametrize("options", [{}, VLLM | {"k": 2}])
def test_two_ids_that_are_swapped_are_found_out_and_named(options):
    theirs, ours = swapped()
    teacher = LocalTeacher.of(tiny_llama(1, vocab_size=20))
    with served(teacher, tokenizer=theirs) as server:
        prepared(remote(server, **options), theirs)
        with pytest.raises(TeacherUnavailableError, match=r"tokenizer mismatch: .*'[XY]'"):
            prepared(remote(server, **options), ours)


def test_another_chat_template_is_no_other_vocabulary(server):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    prepared(remote(server), tokenizer)


def test_what_is_served_on_keeps_its_length_and_what_it_cannot_do():
    ensemble = TeacherEnsemble([LocalTeacher.of(tiny_llama(seed)) for seed in (1, 2)])
    with served(ensemble) as first, served(remote(first)) as second:
        about = second.endpoints._service.description()
    assert about["length"] == 256
    assert about["generation"] is False
    assert about["payloads"] == ["hidden", "token_log_probs", "top_k"]


def test_a_limit_beyond_the_teacher_is_refused():
    with (
        pytest.raises(ValueError, match=r"limits\.length is 1000, but the teacher reads 256"),
        served(length=1000),
    ):
        pass


def test_a_cached_teacher_is_not_served():
    cached = CachedTeacher.__new__(CachedTeacher)
    with (
        pytest.raises(ValueError, match=r"CachedTeacher cannot be served: .* to the run itself"),
        served(cached),
    ):
        pass


def test_one_address_may_stand_alone(server):
    assert fit(ServedTeacher(server.url, timeout=20.0, retries=0)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": 8}, "urls is 8; give a list"),
        ({"urls": [8]}, "a URL is 8, of type int"),
        ({"payload": "top_k", "k": "8"}, "k is '8', of type str; give a whole number"),
        ({"payload": "top_k", "k": 8.5}, "k is 8.5, of type float"),
        ({"payload": "top_k", "k": 8, "temperatures": 2}, r"temperatures are 2; give a list"),
        ({"timeout": "10"}, "timeout is '10'"),
        ({"timeout": 1e10}, "above 0 and up to 1,000,000"),
        ({"retries": 1.5}, "retries 1.5"),
        ({"urls": ["http://user:word@a:80"]}, "'http://a:80' comes with a user name or a password"),
        ({"urls": ["http://a:80/?x=1"]}, "goes on with a query or a fragment"),
        ({"urls": ["http://a:80#f"]}, "goes on with a query or a fragment"),
        ({"urls": ["http://a:99999"]}, "'http://a:99999' is none of a server"),
        ({"urls": ["http://a:80/v1/"]}, "ends in /v1; give the root of the server, 'http://a:80'"),
        ({"token_variable": "NOT_SET"}, "environment variable NOT_SET is not set"),
    ],
)
def test_arguments_are_checked_and_passwords_not_shown(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ServedTeacher(**({"urls": ["http://127.0.0.1:9"]} | options))
    assert "word" not in str(error.value).replace("password", "")


def test_another_temperature_names_the_option_that_tells_it(server):
    with pytest.raises(ValueError, match=r"by model\.teacher\.temperatures: \[2\], or take"):
        fit(remote(server, payload="top_k", k=4), method=GKD, teacher_temperature=2.0)


def test_a_method_that_needs_more_names_the_payload(server):
    with pytest.raises(ValueError, match=r"a ServedTeacher with payload: hidden"):
        fit(remote(server, payload="token_log_probs"), method=BabyLlama)
