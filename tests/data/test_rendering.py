"""A chat template is a program that came from elsewhere: it ends, within time and memory."""

import json
import resource
import threading
import time
from pathlib import Path

import pytest

from lightning_kd.data import ChatData
from lightning_kd.data.conversations import Chat
from lightning_kd.data.rendering import RenderLimits, render_chats
from tests.support.toys import letter_tokenizer

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c\u20ac\n"}]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL = RenderLimits(seconds=1, megabytes=200, characters=100_000)


def with_template(template):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(messages, where):
    return Chat(messages, where, (len(messages) - 1,))


def test_it_renders_what_transformers_does():
    tokenizer = with_template(PLAIN)
    chats = [CHAT, [CHAT[0], CHAT[1], CHAT[0], CHAT[1]]]
    expected = [
        (
            tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(chat, tokenize=False),
        )
        for chat in chats
    ]
    rendered = render_chats([chat(chats[0], "a"), chat(chats[1], "b")], tokenizer)
    assert [(each.text[: each.prompt], each.text) for each in rendered] == expected
    assert expected[0][1] == "user: ab<eos>assistant: c\u20ac<eos>"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "nested loops": (ENDLESS, "more than 1 seconds"),
    "a power": ("{{ 9**(9**9) }}", "more than 1 seconds"),
    "a repeated string": ("{{ 'a' * 10**10 }}", "needs more than 200 MB"),
    "a padded string": ("{{ 'a' | center(10**10) }}", "needs more than 200 MB"),
    "a formatted number": ("{{ '%10000000000d' | format(1) }}", "needs more than 200 MB"),
    "a string doubled": (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "needs more than 200 MB",
    ),
    "calls of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "long text": ("{{ 'a' * 100001 }}" + PLAIN, "renders more than 100,000 characters"),
    "an error": ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
}


def children():
    """Processes that this one has started and that are still there, those of other tests too."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {number for path in tasks for number in path.read_text().split()}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_ends_in_bounded_time_and_memory_and_names_the_row(attack):
    template, message = ATTACKS[attack]
    others = children()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    chats = [chat(CHAT, "file:1"), chat(CHAT, "file:2")]
    with pytest.raises(ValueError, match=rf"file:1: the chat template .*{message}"):
        render_chats(chats, with_template(template), limits=SMALL)
    assert time.monotonic() - start < 30  # three times the limit, and a busy machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # in KB
    assert children() <= others


@pytest.mark.slow
def test_the_chat_that_takes_too_long_is_named_not_the_first():
    template = f"{{% if messages[0]['content'] == 'b' %}}{ENDLESS}{{% endif %}}{PLAIN}"
    chats = [CHAT, [CHAT[0] | {"content": "b"}, CHAT[1]], CHAT]
    chats = [chat(messages, f"file:{line}") for line, messages in enumerate(chats, 1)]
    with pytest.raises(ValueError, match="file:2: the chat template takes more than 1 seconds"):
        render_chats(chats, with_template(template), limits=SMALL)


@pytest.mark.slow
def test_a_thread_that_is_not_the_main_one_is_no_way_around(monkeypatch):
    said = []

    def render():
        try:
            render_chats([chat(CHAT, "file:1")], with_template(ENDLESS), limits=SMALL)
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert "takes more than 1 seconds" in said[0]


@pytest.mark.slow
def test_chats_of_a_data_module_are_rendered_so(monkeypatch):
    monkeypatch.setattr("lightning_kd.data.rendering.RenderLimits", lambda: SMALL)
    Path("chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    data = ChatData(tokenizer=with_template(ENDLESS), train="chats.jsonl")
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: the chat template takes more than"):
        data.rows("train")
