"""What the server takes, what it refuses and why, and how it ends."""

import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest
import torch

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.serving import Limits, TeacherServer
from lightning_kd.serving.batching import Batcher, Job
from lightning_kd.serving.limits import RefusedError
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, Teacher, TopKTeacher
from lightning_kd.wire import Question, pack, unpack
from tests.serving.conftest import served
from tests.support.toys import ragged_batch, tiny_llama

V = 18
NOT_JSON = b"<html>"


def send(server, path, body=b"", method="POST", headers=None):
    """Status, reply and headers of a request."""
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(host, port, timeout=30)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, body=body, headers=headers or {})
    reply = connection.getresponse()
    return reply.status, reply.read(), dict(reply.getheaders())


def refused(server, *request, **more):
    status, body, _ = send(server, *request, **more)
    return status, json.loads(body)["error"]["message"]


def question(lengths=((2, 5), (5, 3)), payload="hidden", seed=0, **options):
    batch = ragged_batch(list(lengths), seed)
    mask = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]
    ids, real = batch["input_ids"], batch["attention_mask"]
    return Question(ids, real, mask, targets, payload, **options)


def log_probs(network, ids):
    """Of every next token of one row, by numpy."""
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0].double().numpy()
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_vllm_shape_of_prompt_log_probs(server):
    prompts = [[3, 4, 5, 6], [7, 8]]
    body = {"prompt": prompts, "max_tokens": 0, "prompt_logprobs": 3}
    status, reply, _ = send(server, "/v1/completions", body)
    assert status == 200
    value = json.loads(reply)
    assert value["object"] == "text_completion"
    assert [choice["index"] for choice in value["choices"]] == [0, 1]
    network = tiny_llama(1)
    for ids, choice in zip(prompts, value["choices"], strict=True):
        expected = log_probs(network, ids)
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(ids) - 1
        for place, entry in enumerate(others):
            best = np.argsort(-expected[place])[:3]
            assert {int(i) for i in entry} == {*best.tolist(), ids[place + 1]}
            for token, about in entry.items():
                assert about["logprob"] == pytest.approx(expected[place, int(token)], abs=1e-5)
            ranks = [entry[str(token)]["rank"] for token in best]
            assert ranks == [1, 2, 3]


def test_completions_are_seeded(server):
    body = {"prompt": [[3, 4, 5]] * 2, "max_tokens": 5, "seed": 3, "return_token_ids": True}
    first, again = (json.loads(send(server, "/v1/completions", body)[1]) for _ in range(2))
    other = json.loads(send(server, "/v1/completions", body | {"seed": 4})[1])
    texts = [[choice["token_ids"] for choice in v["choices"]] for v in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]  # each row has random numbers of its own
    assert first["usage"]["prompt_tokens"] == 6
    assert {choice["finish_reason"] for choice in first["choices"]} <= {"stop", "length"}


def test_texts_are_tokenized(server):
    status, reply, _ = send(server, "/tokenize", {"prompt": "abc"})
    assert (status, json.loads(reply)["tokens"]) == (200, [2, 3, 4])
    body = {"prompt": ["abc"], "max_tokens": 1, "return_token_ids": True}
    choice = json.loads(send(server, "/v1/completions", body)[1])["choices"][0]
    assert choice["prompt_token_ids"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (NOT_JSON, 400, "the body is no JSON"),
        (b"[1]", 400, "the body is a list; send a JSON mapping"),
        ({"prompt": []}, 400, "prompt must be a text"),
        ({"prompt": [[]]}, 400, "give text or token ids"),
        ({"prompt": [[3, "x"]]}, 400, "give text or token ids"),
        ({"prompt": [3], "foo": 1}, 400, "unknown fields: foo"),
        ({"prompt": [3], "n": 2}, 400, "n is 2; this server knows only 1"),
        ({"prompt": [3], "stream": True}, 400, "stream is True"),
        ({"prompt": [3], "n": True}, 400, "n is True"),
        ({"prompt": [3], "top_k": 2.9}, 400, "top_k is 2.9; it must be an integer"),
        ({"prompt": [3], "temperature": "0.5"}, 400, "temperature is '0.5'; it must be a number"),
        ({"prompt": [3], "return_token_ids": 1}, 400, "return_token_ids is 1; it must be true or"),
        ({"prompt": [3], "add_special_tokens": "no"}, 400, "add_special_tokens is 'no'"),
        ({"prompt": [[3]] * 5000}, 413, "5000 prompts and 0 characters; at most 4096 and"),
        ({"prompt": "a" * (2**22 + 1)}, 413, "1 prompts and 4194305 characters"),
        ({"prompt": [[-1, 2]], "max_tokens": 0, "prompt_logprobs": 1}, 400, "token ids go from -1"),
        ({"prompt": [[3, 99]], "max_tokens": 0, "prompt_logprobs": 1}, 400, "knows 0 to 17"),
        ({"prompt": [3], "max_tokens": -1}, 400, "max_tokens is -1; it must be an integer from 0"),
        ({"prompt": [3], "max_tokens": 0}, 400, "nothing is asked for"),
        ({"prompt": [3], "temperature": -1}, 400, "temperature is -1.0"),
        ({"prompt": [3], "temperature": 1e-320}, 400, "above 0 at least 1e-06"),
        ({"prompt": [2**63], "max_tokens": 1}, 400, "give text or token ids"),
        ({"prompt": "a\ud800"}, 400, "a text is not Unicode"),
        ({"prompt": [3], "temperature": "hot"}, 400, "hot"),
        ({"prompt": [3, 99], "max_tokens": 1}, 400, "ids beyond those of the teacher, 18"),
        ({"prompt": [3], "max_tokens": 300}, 400, "reads 256 at most"),
        ({"prompt": [3] * 300, "max_tokens": 1}, 400, "reads 256 at most"),
        ({"prompt": [3, 4], "max_tokens": 0, "prompt_logprobs": 99}, 400, "answers 18 at most"),
        ({"prompt": [3], "model": "other"}, 404, "the model 'other' is not served here"),
    ],
)
def test_a_completion_is_refused_with_a_reason(server, body, status, reason):
    found, message = refused(server, "/v1/completions", body)
    assert found == status
    assert reason in message


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"prompt": 3}, 400, 'send {"prompt": "a text"}'),
        ({"prompt": "a", "add_special_tokens": "false"}, 400, "add_special_tokens is 'false'"),
        ({"prompt": "a\ud800"}, 400, "a text is not Unicode"),
        ({"prompt": "a" * (2**22 + 1)}, 413, "4194305 characters"),
    ],
)
def test_a_text_is_refused_with_a_reason(server, body, status, reason):
    found, message = refused(server, "/tokenize", body)
    assert found == status
    assert reason in message


def order(tensors=None, **about):
    ids = torch.tensor([[3, 4], [5, 6]])
    given = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids)} | (tensors or {})
    return pack(given, {"options": {"max_new_tokens": 2}, "seeds": [1, 2], "width": None} | about)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            order(options={"max_new_tokens": 1.5}),
            "max_new_tokens is 1.5; it must be a whole number",
        ),
        (order(options={"max_new_tokens": True}), "max_new_tokens is True"),
        (order(options={"max_new_tokens": 2, "top_k": 1.5}), "top_k is 1.5"),
        (order(options={"max_new_tokens": 2, "temperature": "1"}), "temperature is '1'"),
        (order(options={"longest": 2}), "longest"),
        (order(seeds=[1]), "seeds must be a list of 2"),
        (order(seeds=["7", 1]), "a seed must be a whole number"),
        (order(seeds=[1.9, 1]), "a seed must be a whole number"),
        (order(seeds=[2**64, 1]), "a seed must be a whole number"),
        (order(width=0), "width is 0; it must be a number of tokens"),
        (order(width=True), "width is True"),
        (order(width="a"), "width is 'a'"),
        (order({"prompt_ids": torch.full((2, 2), 2.7)}), "must be integers"),
        (order({"prompt_mask": torch.tensor([[1, 0], [1, 1]])}), "0 to the left of them"),
        (order({"prompt_mask": torch.tensor([[0, 0], [1, 1]])}), "0 to the left of them"),
        (order({"prompt_mask": torch.full((2, 2), 7)}), "0 to the left of them"),
        (order({"prompt_mask": torch.ones(2, 3, dtype=torch.long)}), "do not fit"),
    ],
)
def test_an_order_of_completions_is_refused_with_a_reason(server, body, reason):
    assert send(server, "/v1/generate", order())[0] == 200
    status, message = refused(server, "/v1/generate", body)
    assert status == 400
    assert reason in message


def altered(**changes):
    tensors, about = unpack(question().message())
    return pack(tensors | changes.pop("tensors", {}), about | changes)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not safetensors"),
        (b"\x80\x04K\x01.", "not safetensors"),
        (altered(protocol=0), "is of protocol 0, this side speaks 1"),
        (altered(payload="logits"), "unknown payload 'logits'; there are hidden, top_k"),
        (altered(k=0), "k is 0"),
        (altered(payload="top_k", k=19), "k is 19; this server answers 18 at most"),
        (altered(temperatures=[-1.0]), "give a list of numbers above 0"),
        (altered(tensors={"targets": torch.zeros(3)}), "(3,) targets for 8 positions"),
        (altered(tensors={"targets": torch.full((8,), 77)}), "the teacher knows 0 to 17"),
        (altered(tensors={"input_ids": torch.zeros(2, 3)}), "must be one (rows, tokens)"),
        (altered(tensors={"input_ids": torch.full((2, 8), 77)}), "token ids go from 77 to 77"),
        (altered(tensors={"attention_mask": torch.zeros(2, 8)}), "must be integers"),
        (
            altered(tensors={"attention_mask": torch.zeros(2, 8, dtype=torch.long)}),
            "1 at each position asked about",
        ),
    ],
)
def test_a_question_is_refused_with_a_reason(server, body, reason):
    status, message = refused(server, "/v1/answers", body)
    assert status == 400
    assert reason in message


def test_addresses_and_methods(server):
    status, message = refused(server, "/v2/answers")
    assert status == 404
    assert "/v1/answers" in message
    assert refused(server, "/health")[0] == 405
    assert send(server, "/health", method="GET")[0] == 200
    models = json.loads(send(server, "/v1/models", method="GET")[1])
    assert models["data"][0]["max_model_len"] == 256


def test_a_body_that_is_too_large_is_not_read():
    with served(body_megabytes=1) as small:
        status, message = refused(small, "/v1/answers", b"x" * (2**20 + 1))
        assert (status, "at most 1048576 are taken" in message) == (413, True)
    with served(tokens=15) as small:
        status, message = refused(small, "/v1/answers", question().message())
        assert (status, "16 padded tokens" in message) == (413, True)


def test_a_length_must_be_said(server):
    with socket.create_connection(server.server_address[:2], timeout=10) as raw:
        raw.sendall(b"POST /v1/answers HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 411")


@pytest.mark.slow
def test_one_who_sends_slowly_is_cut_off():
    with (
        served(read_seconds=0.5) as server,
        socket.create_connection(server.server_address[:2], timeout=10) as raw,
    ):
        raw.sendall(b"POST /v1/answers HTTP/1.1\r\n")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 8:
                raw.sendall(b"X-Slow: 1\r\n")
                time.sleep(0.1)
        except OSError:
            pass
        assert time.monotonic() - began < 5


def test_a_token_is_asked_for():
    with served(token="secret") as server:
        assert refused(server, "/v1/teacher", method="GET")[0] == 401
        wrong = {"Authorization": "Bearer secre"}
        assert refused(server, "/v1/teacher", method="GET", headers=wrong)[0] == 401
        right = {"Authorization": "Bearer secret"}
        assert send(server, "/v1/teacher", method="GET", headers=right)[0] == 200
        assert send(server, "/health", method="GET")[0] == 200


def test_others_are_let_in_with_a_token_alone(server):
    with pytest.raises(ValueError, match=r"host is '0\.0\.0\.0'.* there is no token"):
        TeacherServer(None, Limits(), host="0.0.0.0")


def test_a_failure_of_the_teacher_is_said_and_survived():
    class Fails(LocalTeacher):
        def answer(self, batch, positions, *, kind, logits_backend):
            if len(batch["input_ids"]) == 3:
                raise RuntimeError("out of memory")
            return super().answer(batch, positions, kind=kind, logits_backend=logits_backend)

    with served(Fails.of(tiny_llama(1))) as server:
        status, message = refused(server, "/v1/answers", question([(1, 2)] * 3).message())
        assert (status, "RuntimeError: out of memory" in message) == (500, True)
        assert send(server, "/v1/answers", question().message())[0] == 200


def test_a_teacher_that_needs_more_than_tokens_is_refused():
    routed = RoutedTeacher({"a": LocalTeacher.of(tiny_llama(1))})
    with (
        pytest.raises(ValueError, match="RoutedTeacher cannot be served: it chooses by a column"),
        served(routed),
    ):
        pass


def test_a_teacher_of_nothing_is_refused():
    class Mute(Teacher):
        answers = frozenset()
        vocabulary_size = V

        def answer(self, batch, positions, *, kind, logits_backend):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Mute answers nothing; a server needs"), served(Mute()):
        pass


def test_merged_questions_have_the_answers_of_each(server):
    """Three at once, of other lengths: one thread waits until all are there."""
    asked = [
        question(lengths, seed=seed, alone=alone)
        for seed, (lengths, alone) in enumerate(
            [([(2, 5)], False), ([(4, 6), (1, 3)], False), ([(3, 3)], False)]
        )
    ]
    calls = []
    gate = threading.Event()
    service = server.endpoints._service

    def compute(works):
        gate.wait(10)
        calls.append(len(works))
        return service.compute(works)

    batcher = Batcher(compute, Limits())
    found = [None] * 4

    def ask(number, job):
        found[number] = batcher.answer(job)

    jobs = [Job(question(alone=True), None, 1, 1)]
    jobs += [Job(q, "together", *q.input_ids.shape) for q in asked]
    threads = []
    for number, job in enumerate(jobs):
        threads.append(threading.Thread(target=ask, args=(number, job)))
        threads[-1].start()
        time.sleep(0.1)
    gate.set()
    for thread in threads:
        thread.join(20)
    assert calls == [1, 3]
    for one, together in zip(asked, found[1:], strict=True):
        (alone,) = service.compute([one])
        assert torch.allclose(alone["states.0"], together["states.0"], atol=1e-5)
        assert torch.allclose(alone["spots"], together["spots"], atol=1e-5)
    batcher.close()


def test_a_full_queue_says_so_and_goes_on():
    gate = threading.Event()
    batcher = Batcher(lambda works: [gate.wait(20) for _ in works], Limits(queue=1))
    threads = [
        threading.Thread(target=batcher.answer, args=(Job(0, None, 1, 1),)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    with pytest.raises(RefusedError, match="1 requests are waiting") as error:
        batcher.answer(Job(0, None, 1, 1))
    assert error.value.status == 503
    gate.set()
    for thread in threads:
        thread.join(20)
    assert batcher.answer(Job(0, None, 1, 1)) is True
    batcher.close()


def test_an_answer_that_takes_too_long_is_given_up():
    gate = threading.Event()
    batcher = Batcher(lambda works: [gate.wait(20) for _ in works], Limits(answer_seconds=0.2))
    with pytest.raises(RefusedError, match=r"not ready after 0\.2 s") as error:
        batcher.answer(Job(0, None, 1, 1))
    assert error.value.status == 504
    gate.set()
    batcher.close()


@pytest.mark.slow
def test_what_was_taken_is_answered_before_the_end():
    gate, replies = threading.Event(), []
    with served() as server:
        service = server.endpoints._service
        honest = service.compute

        def slowly(works):
            gate.wait(20)
            return honest(works)

        server.batcher._compute = slowly
        ask = threading.Thread(
            target=lambda: replies.append(send(server, "/v1/answers", question().message())[0])
        )
        ask.start()
        time.sleep(0.3)
        ending = threading.Thread(target=server.end)
        ending.start()
        time.sleep(0.3)
        assert refused(server, "/v1/answers", question().message())[0] == 503
        gate.set()
        ask.join(20)
        ending.join(20)
    assert replies == [200]


@pytest.mark.parametrize("name", ["body_megabytes", "queue", "answer_seconds", "k"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=rf"limits\.{name} is 0; it must be above 0"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 1.5),
        ("queue", True),
        ("read_seconds", 1e10),
        ("answer_seconds", "10"),
        ("rows", 2**50),
    ],
)
def test_limits_are_of_their_kind_and_within_what_clocks_count(name, value):
    with pytest.raises(ValueError, match=rf"limits\.{name} is .*, and a (whole )?number of"):
        Limits(**{name: value})


def test_a_teacher_of_more_tokens_than_are_asked_for_tells_the_others_in_the_tail():
    """By numpy, from the model's own probabilities."""
    network = tiny_llama(1)
    with served(TopKTeacher(LocalTeacher.of(network), k=6, temperatures=[1.0, 2.0])) as server:
        asked = question(payload="top_k", k=3, temperatures=(1.0, 2.0))
        status, body, _ = send(server, "/v1/answers", asked.message())
    assert status == 200, body
    tensors, _ = unpack(body)
    expected = []
    for ids, real, mask in zip(asked.input_ids, asked.attention_mask, asked.mask, strict=True):
        own = log_probs(network, ids[real.bool()].tolist())
        expected.append(own[mask[real.bool()].numpy()])
    for temperature in (1.0, 2.0):
        p = np.exp(np.concatenate(expected) / temperature)
        p /= p.sum(-1, keepdims=True)
        tail = np.log(np.sort(p, axis=-1)[:, :-3].sum(-1))
        np.testing.assert_allclose(tensors[f"tail.{temperature!r}"], tail, atol=1e-5)
