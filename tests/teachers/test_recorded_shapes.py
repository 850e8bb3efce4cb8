"""Answers in the shapes that the documentation of vLLM and SGLang shows; neither was run here."""

import copy
import json
from pathlib import Path

import pytest
import torch

from lightning_kd.fused import TokenLogProbs, TopKAndToken
from lightning_kd.teachers.servers import SGLangServer, VLLMServer
from lightning_kd.wire import Question, Reply, WireError

RECORDED = Path(__file__).parent / "recorded"
URL = "http://there:8000"
IDS = torch.tensor([[3, 4, 9, 8], [5, 6, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
TARGETS = torch.tensor([4, 9, 8, 6])
SERVERS = {"vllm": VLLMServer, "sglang": SGLangServer}
FILES = {"vllm": "vllm_completions.json", "sglang": "sglang_generate.json"}


def recorded(name):
    return json.loads((RECORDED / name).read_text())


def answered(name, value, payload="top_k", k=2, sent=None, mask=MASK, targets=TARGETS):
    """What a backend makes of an answer."""

    def ask(request):
        if request.path == "/v1/models":
            return Reply(URL + request.path, 200, json.dumps(recorded("vllm_models.json")).encode())
        if sent is not None:
            sent.append((request.path, json.loads(request.body)))
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return Reply(URL + request.path, 200, body, {"content-type": "application/json"})

    backend = SERVERS[name]()
    backend.describe(ask)
    question = Question(IDS, REAL, mask, targets, payload, k)
    return backend.answer(ask, question, torch.device("cpu"))


@pytest.mark.parametrize("name", SERVERS)
def test_k_tokens_and_the_one_that_follows(name):
    answer = answered(name, recorded(FILES[name]))
    assert isinstance(answer, TopKAndToken)
    assert answer.token_ids.tolist() == [[4, 7], [5, 2], [6, 8], [6, 2]]
    assert answer.log_probs.tolist() == [[-0.25, -2.5], [-0.5, -1.5], [-1.0, -1.25], [-0.125, -4.0]]
    assert answer.label_log_probs.tolist() == [-0.25, -3.75, -1.25, -0.125]


@pytest.mark.parametrize("name", SERVERS)
def test_the_one_that_follows_alone(name):
    answer = answered(name, recorded(FILES[name]), "token_log_probs")
    assert isinstance(answer, TokenLogProbs)
    assert answer.values.tolist() == [-0.25, -3.75, -1.25, -0.125]


def test_what_vllm_is_asked():
    sent = []
    answered("vllm", recorded(FILES["vllm"]), sent=sent)
    ((path, body),) = sent
    assert path == "/v1/completions"
    assert body["model"] == "Qwen/Qwen3-0.6B"
    assert body["prompt"] == [[3, 4, 9, 8], [5, 6]]
    assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 2)


def test_what_sglang_is_asked():
    sent = []
    answered("sglang", recorded(FILES["sglang"]), sent=sent)
    ((path, body),) = sent
    assert path == "/generate"
    assert body["input_ids"] == [[3, 4, 9, 8], [5, 6]]
    assert (body["return_logprob"], body["logprob_start_len"]) == (True, 0)
    assert body["top_logprobs_num"] == 2


def test_vllm_lists_its_choices_in_any_order():
    value = recorded(FILES["vllm"])
    value["choices"].reverse()
    assert answered("vllm", value).label_log_probs.tolist() == [-0.25, -3.75, -1.25, -0.125]


def test_a_position_behind_the_last_token_is_asked_about_with_one_more():
    sent, value = [], recorded(FILES["vllm"])
    entries = value["choices"][0]["prompt_logprobs"]
    entries.append({"3": {"logprob": -0.75}, "8": {"logprob": -9.0}, "4": {"logprob": -1.75}})
    value["choices"] = value["choices"][:1]
    del value["choices"][0]["prompt_token_ids"]
    mask = torch.tensor([[False, False, False, True], [False] * 4])
    answer = answered("vllm", value, sent=sent, mask=mask, targets=torch.tensor([-100]))
    assert sent[0][1]["prompt"] == [[3, 4, 9, 8, 8]]
    assert answer.token_ids.tolist() == [[3, 4]]
    assert answer.label_log_probs.tolist() == [0.0]


def of_vllm(change):
    value = copy.deepcopy(recorded(FILES["vllm"]))
    return change(value["choices"][0]["prompt_logprobs"], value) or value


def of_sglang(change):
    value = copy.deepcopy(recorded(FILES["sglang"]))
    return change(value[0]["meta_info"], value) or value


def rotated(entries, value):
    entries[1:] = [*entries[2:], entries[1]]


def no_echo(value):
    for choice in value["choices"]:
        choice.pop("prompt_token_ids")


def with_nan(entries, value):
    entries[1]["4"]["logprob"] = float("nan")


def not_listed(meta, value):
    meta["input_top_logprobs"][1][0][0] = -0.7


BROKEN = {
    "html": ("vllm", b"<html>Bad gateway</html>", "where JSON was expected; they begin '<html>Bad"),
    "null": ("vllm", b"null", "completions with choices was expected"),
    "a row less": (
        "vllm",
        of_vllm(lambda e, v: v["choices"].pop() and None),
        r"choices \[0\], where those of 2 rows",
    ),
    "none asked for": (
        "vllm",
        of_vllm(lambda e, v: v["choices"][0].update(prompt_logprobs=None)),
        "prompt_logprobs with None, where one for each of 4 tokens",
    ),
    "fewer positions": ("vllm", of_vllm(lambda e, v: e.pop() and None), "with 3 entries, where"),
    "shifted to the left": (
        "vllm",
        of_vllm(lambda e, v: e.append(e.pop(0))),
        "null was expected, .* the list is shifted",
    ),
    "rotated": ("vllm", of_vllm(rotated), "does not list the token 4 that follows position 0"),
    "nan": ("vllm", of_vllm(with_nan), "NaN or infinite"),
    "a list": (
        "vllm",
        of_vllm(lambda e, v: e.__setitem__(1, [-0.25, 4])),
        "where log-probabilities by token id were expected",
    ),
    "a cap": (
        "vllm",
        of_vllm(lambda e, v: e[1].pop("7") and None),
        "1 tokens for a position, where 2 were asked for, .* larger --max-logprobs",
    ),
    "other tokens": (
        "vllm",
        of_vllm(lambda e, v: v["choices"][0].update(prompt_token_ids=[3, 4, 9, 7])),
        r"has read \[3, 4, 9, 7\], where \[3, 4, 9, 8\] was sent",
    ),
    "sglang: html": ("sglang", b"<html>", "where JSON was expected"),
    "sglang: a row less": ("sglang", of_sglang(lambda m, v: v.pop() and None), "a list of 2 rows"),
    "sglang: no log-probabilities": (
        "sglang",
        of_sglang(lambda m, v: m.pop("input_token_logprobs") and None),
        "meta_info with input_token_logprobs",
    ),
    "sglang: shifted": (
        "sglang",
        of_sglang(lambda m, v: m["input_token_logprobs"].pop(0) and None),
        r"about the tokens \[4, 9, 8\], where \[3, 4, 9, 8\] was sent",
    ),
    "sglang: shifted against each other": (
        "sglang",
        of_sglang(lambda m, v: rotated(m["input_top_logprobs"], v)),
        "the lists are shifted against each other",
    ),
    "sglang: another value": (
        "sglang",
        of_sglang(not_listed),
        "gives the token 4 log-probability -0.2500, which its 2 most likely",
    ),
    "sglang: fewer positions": (
        "sglang",
        of_sglang(lambda m, v: m["input_top_logprobs"].pop() and None),
        "input_top_logprobs with 3 entries",
    ),
    "sglang: fewer tokens": (
        "sglang",
        of_sglang(lambda m, v: m["input_top_logprobs"][2].pop() and None),
        "2 tokens were asked for",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_answer_is_said(case):
    name, value, message = BROKEN[case]
    with pytest.raises(WireError, match=message) as error:
        answered(name, value)
    assert URL in str(error.value)


def test_a_rotated_list_is_found_without_an_echo():
    value = of_vllm(rotated)
    no_echo(value)
    with pytest.raises(WireError, match="does not list the token 4"):
        answered("vllm", value)


@pytest.mark.parametrize("name", SERVERS)
def test_a_model_that_is_not_there(name):
    models = json.dumps(recorded("vllm_models.json")).encode()

    def ask(request):
        return Reply(URL + request.path, 200, models)

    with pytest.raises(
        WireError, match=r"has the models Qwen/Qwen3-0\.6B, where other was expected"
    ):
        SERVERS[name]("other").describe(ask)
    assert SERVERS[name]().describe(ask).length == 40960


def test_the_ids_of_a_text():
    def ask(request):
        if request.path == "/tokenize":
            assert json.loads(request.body)["add_special_tokens"] is False
            value = {"count": 2, "max_model_len": 40960, "tokens": [4, 5], "token_strs": None}
        else:
            value = {
                "text": "",
                "meta_info": {"input_token_logprobs": [[None, 4, "a"], [-1, 5, "b"]]},
            }
        return Reply(URL + request.path, 200, json.dumps(value).encode())

    assert VLLMServer("x").token_ids(ask, "ab") == [4, 5]
    assert SGLangServer().token_ids(ask, "ab") == [4, 5]
