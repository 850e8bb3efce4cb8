"""A teacher over HTTP: its options, what it asks before the first step, and what it answers."""

import pytest
import torch

from lightning_kd.fused import FullDistribution, TokenLogProbs
from lightning_kd.generation import GenerationOptions
from lightning_kd.models import FusedLogits, StudentSpec
from lightning_kd.modules import GKD, SupervisedKD
from lightning_kd.resuming import describe
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, ServedTeacher, TeacherUnavailableError
from tests.serving.conftest import served
from tests.serving.faults import after
from tests.support.harness import BatchList, Letters, fit_one_step, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama

CPU, BACKEND = torch.device("cpu"), FusedLogits()
BATCH = ragged_batch([(2, 5), (5, 3), (1, 7)])
POSITIONS = ScoredPositions.from_labels(BATCH["labels"])
V = 18
HONEST = 4
"""Questions of a run without faults that a server may answer."""


@pytest.fixture(scope="module")
def server():
    with served() as running:
        yield running


def prepared(teacher, tokenizer=None):
    teacher.prepare(tokenizer or letter_tokenizer(), CPU, "equal")
    return teacher


def remote(server, **options):
    return ServedTeacher([server.url], **({"timeout": 20.0, "retries": 0} | options))


@pytest.fixture(scope="module")
def local():
    return prepared(LocalTeacher.of(tiny_llama(1)))


def log_probs():
    """The teacher's, ``(N, V)``, in float64 and by its own forward."""
    with torch.no_grad():
        logits = tiny_llama(1)(BATCH["input_ids"], BATCH["attention_mask"]).logits
    return logits[POSITIONS.mask].double().log_softmax(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"backend": "tgi"}, "unknown backend 'tgi'; choose one of"),
        ({"payload": "logits"}, "unknown payload 'logits'"),
        ({"batching": "some"}, "unknown batching 'some'"),
        ({"k": 4}, "payload is 'hidden' and k 4; give k"),
        ({"payload": "top_k"}, "payload is 'top_k' and k None"),
        ({"payload": "top_k", "k": 0}, "k 0"),
        ({"backend": "vllm"}, "payload is 'hidden', which backend: vllm cannot answer; choose"),
        ({"backend": "sglang"}, "which backend: sglang cannot answer"),
        (
            {"backend": "vllm", "payload": "top_k", "k": 4, "temperatures": [2.0]},
            "temperatures are .* with backend: vllm",
        ),
        ({"temperatures": [2.0]}, "hidden holds at all of them"),
        ({"payload": "top_k", "k": 2, "temperatures": [0.0]}, "must be above 0"),
        ({"model": "a"}, "has one model; leave it out"),
        ({"timeout": -1.0}, "timeout is -1"),
        (
            {"backend": "vllm", "payload": "top_k", "k": 4, "batching": "merged"},
            "batching is 'merged', but vllm batches as it does",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServedTeacher(**({"urls": ["http://127.0.0.1:9"]} | options))


def test_hidden_states_are_the_local_ones(server, local):
    found = prepared(remote(server)).answer(BATCH, POSITIONS, logits_backend=BACKEND)
    expected = local.answer(BATCH, POSITIONS, logits_backend=BACKEND)
    assert isinstance(found, FullDistribution)
    for tensors in zip(found.logits[0].inputs, expected.logits[0].inputs, strict=True):
        assert torch.equal(*tensors)


@pytest.mark.parametrize(
    ("backend", "batching"),
    [("lightning_kd", "alone"), ("lightning_kd", "merged"), ("vllm", "alone")],
)
def test_k_tokens_are_the_most_likely(server, backend, batching):
    teacher = prepared(remote(server, backend=backend, payload="top_k", k=4, batching=batching))
    answer = teacher.answer(BATCH, POSITIONS, kind="top_k_and_token", logits_backend=BACKEND)
    expected = log_probs()
    best = expected.topk(4)
    assert torch.equal(answer.token_ids, best.indices)
    assert torch.allclose(answer.log_probs.double(), best.values, atol=1e-5)
    labels = expected.gather(-1, POSITIONS.targets[:, None])[:, 0]
    assert torch.allclose(answer.label_log_probs.double(), labels, atol=1e-5)
    plain = teacher.answer(BATCH, POSITIONS, kind="top_k", logits_backend=BACKEND)
    assert plain.kind == "top_k"


def test_tails_are_told_at_declared_temperatures(server):
    teacher = prepared(remote(server, payload="top_k", k=4, temperatures=[2.0]))
    assert teacher.temperatures == {1.0, 2.0}
    answer = teacher.answer(BATCH, POSITIONS, kind="top_k_and_token", logits_backend=BACKEND)
    tempered = (log_probs() / 2).log_softmax(-1)
    tail = 1 - tempered.exp().gather(-1, answer.token_ids).sum(-1)
    assert torch.allclose(answer.tail_log_probs[2.0].double(), tail.log(), atol=1e-4)


@pytest.mark.parametrize("backend", ["lightning_kd", "vllm"])
def test_the_token_that_follows(server, backend):
    teacher = prepared(remote(server, backend=backend, payload="token_log_probs"))
    answer = teacher.answer(BATCH, POSITIONS, kind="token_log_probs", logits_backend=BACKEND)
    assert isinstance(answer, TokenLogProbs)
    expected = log_probs().gather(-1, POSITIONS.targets[:, None])[:, 0]
    assert torch.allclose(answer.values.double(), expected, atol=1e-5)


@pytest.mark.parametrize("payload", ["hidden", "token_log_probs"])
def test_positions_without_a_token_behind_them(server, payload):
    everywhere = ScoredPositions.everywhere(BATCH["labels"], BATCH["attention_mask"])
    teacher = prepared(remote(server, payload=payload))
    kind = "full_distribution" if payload == "hidden" else payload
    answer = teacher.answer(BATCH, everywhere, kind=kind, logits_backend=BACKEND)
    answer.check(len(everywhere.targets), V)


def test_a_batch_without_a_scored_position(server):
    nowhere = ScoredPositions(torch.zeros_like(POSITIONS.mask), POSITIONS.targets[:0])
    for options in ({}, {"payload": "top_k", "k": 2}, {"payload": "token_log_probs"}):
        teacher = prepared(remote(server, **options))
        kind = {None: "full_distribution", "top_k": "top_k"}.get(
            options.get("payload"), "token_log_probs"
        )
        teacher.answer(BATCH, nowhere, kind=kind, logits_backend=BACKEND).check(0, V)


@pytest.mark.parametrize(
    "options", [GenerationOptions(6), GenerationOptions(6, temperature=1.0, top_k=9)]
)
def test_completions_are_the_local_ones(server, local, options):
    prompts = torch.tensor([[0, 3, 4], [5, 6, 7]])
    given = letter_tokenizer(), prompts, (prompts != 0).long(), options
    expected = local.generate(*given, seeds=[3, 4], width=V)
    found = prepared(remote(server)).generate(*given, seeds=[3, 4], width=V)
    for name in ("ids", "mask", "log_probs", "sampling_log_probs", "ended"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_other_tokens_are_found_out(server):
    other = letter_tokenizer("ponmlkjihgfedcba")
    with pytest.raises(TeacherUnavailableError, match=r"give different ids: 'a' is 17 in"):
        prepared(remote(server), other)
    teacher = remote(server, backend="vllm", payload="top_k", k=2)
    with pytest.raises(TeacherUnavailableError, match=r"mismatch: .* from token \d+ on .*'p'"):
        prepared(teacher, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"payload": "top_k", "k": 19}, "k is 19, but .* answers 18 tokens at most; lower k"),
        ({"backend": "vllm", "payload": "top_k", "k": 19}, "status 400 .*answers 18 at most"),
        ({"vocabulary_size": 20}, "vocabulary_size is 20, but the server's teacher has 18"),
    ],
)
def test_what_the_server_cannot_is_said_before_the_first_step(server, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(remote(server, **options))


def test_servers_of_two_teachers_are_refused(server):
    with served(LocalTeacher.of(tiny_llama(2))) as other:
        teacher = ServedTeacher([server.url, other.url], timeout=20.0)
        with pytest.raises(TeacherUnavailableError, match="all urls must be of one teacher"):
            prepared(teacher)


def test_a_server_that_is_not_there():
    with pytest.raises(
        TeacherUnavailableError, match=r"http://127\.0\.0\.1:9/health cannot be reached"
    ):
        prepared(ServedTeacher(["http://127.0.0.1:9"], timeout=1.0, retries=0))


def test_a_server_of_something_else(server):
    def page(body):
        raise AssertionError

    with served() as other:
        other.endpoints.reads = {**other.endpoints.reads, "/v1/teacher": other.endpoints._models}
        with pytest.raises(
            TeacherUnavailableError, match="description that lightning-kd serve gives"
        ):
            prepared(remote(other))


def test_another_token_is_refused(monkeypatch):
    with served(token="secret") as server:
        monkeypatch.setenv("OWN_TOKEN", "wrong")
        with pytest.raises(TeacherUnavailableError, match=r"status 401 .*variable OWN_TOKEN"):
            prepared(remote(server, token_variable="OWN_TOKEN"))
        monkeypatch.setenv("OWN_TOKEN", "secret")
        prepared(remote(server, token_variable="OWN_TOKEN"))


def test_a_row_that_depends_on_its_batch_is_found_out():
    with served() as server:
        service = server.endpoints._service
        honest = service.compute

        def mixes_rows_up(works):
            answers = honest(works)
            if len(works[0].input_ids) > 1:
                answers[0]["values"] = answers[0]["values"].flip(0)
            return answers

        server.batcher._compute = mixes_rows_up
        with pytest.raises(
            TeacherUnavailableError, match="other log-probabilities alone than in a"
        ):
            prepared(remote(server, payload="token_log_probs"))


def test_rows_that_are_too_long_are_refused_before_the_first_step():
    with served(length=12) as server:
        module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=remote(server))
        data = Letters(batch_size=2)
        data.longest = lambda: {"train": (13, 5)}
        with pytest.raises(ValueError, match=r"train rows take up to .* reads 12 at most"):
            trainer(max_steps=1).fit(module, datamodule=data)
        teacher = prepared(remote(server))
        long = ragged_batch([(8, 5)])
        with pytest.raises(ValueError, match="the rows of a batch take up to 13 tokens"):
            teacher.answer(
                long, ScoredPositions.from_labels(long["labels"]), logits_backend=BACKEND
            )


def test_a_temperature_that_was_not_declared_is_refused(server):
    module = GKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=remote(server, payload="top_k", k=4),
        teacher_temperature=2.0,
    )
    with pytest.raises(ValueError, match="teacher_temperature"):
        fit_one_step(module, [BATCH])


def test_the_next_micro_batch_is_asked_about_while_this_one_is_trained_on():
    """Each is asked about once, and all but the first before its own step."""
    with served() as server:
        asked = after(server, 100, None)
        teacher, started = remote(server), []
        honest = teacher.answer

        def answer(batch, positions, **options):
            started.append(len(asked))
            found = honest(batch, positions, **options)
            started.append(len(asked))
            return found

        teacher.answer = answer
        module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
        trainer(max_steps=5).fit(module, datamodule=Letters(batch_size=2))
        handshake = started[0]
        assert len(asked) - handshake <= 6
        assert len(asked) - handshake >= 5


def test_loaders_that_do_not_know_the_next_one_do_without(server):
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=remote(server))
    trainer(max_steps=2).fit(module, datamodule=BatchList([BATCH, BATCH]))
    assert module.coming is None


def test_a_resumed_run_compares_the_teacher_and_not_its_address(server):
    settings = [describe(prepared(remote(server, timeout=t))) for t in (20.0, 30.0)]
    assert settings[0] == settings[1]
    with served(LocalTeacher.of(tiny_llama(2))) as other:
        assert describe(prepared(remote(other))) != settings[0]
    assert describe(prepared(remote(server, payload="top_k", k=2))) != settings[0]
