"""The token that ends a turn by another tokenizer's template, and templates that do not tell it."""

import pytest

from lightning_kd.data import ChatData
from tests.support.templates import CHATML, LLAMA3, family_tokenizer

CHAT = [("user", "what is 2+2 ?"), ("assistant", "it is 4.")]
OPENS = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALWAYS = "<|im_start|>assistant\n"
DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)


def end_of(template, said=CHAT):
    """What the column says of a chat, for a teacher whose EOS is another token than the end."""
    teacher = family_tokenizer("chatml")
    teacher.add_special_tokens({"eos_token": "<|endoftext|>"})
    names = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    teacher.add_special_tokens({"additional_special_tokens": names})
    teacher.chat_template = template
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}]
    data = ChatData(tokenizer=family_tokenizer("chatml"), train=rows, teacher_tokenizer=teacher)
    return data.rows("train").example(0, 0).extra["teacher_end"]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (DEFAULT + CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (OPENS + "{{ m.content.rstrip('.') }}<|im_end|>\n{% endfor %}" + ASKED, "<|im_end|>"),
        (OPENS + "{{ m.content | lower }}<|im_end|>\n{% endfor %}" + ASKED, "<|im_end|>"),
        (OPENS + "{{ m.content }} bye<|im_end|>{{ eos_token }}{% endfor %}" + ASKED, "<|im_end|>"),
        (OPENS + "{{ m.content }}<|im_end|>\n{% endfor %}" + ALWAYS, "<|im_end|>"),
        (
            OPENS + "{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + ASKED,
            "<|im_end|>",
        ),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<|endoftext|>"),
    ],
    ids=[
        *("chatml", "a system message of its own", "llama3", "without a dot", "in small letters"),
        *("two tokens", "an answer is always begun", "an end of the text", "EOS between messages"),
    ],
)
def test_a_turn_ends_with_the_first_special_token_before_what_a_next_one_begins_with(
    template, end, caplog
):
    assert end_of(template) == end
    assert not caplog.text


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (
            OPENS + "{{ m.content | upper if m.role == 'assistant' else m.content }}<|im_end|>\n"
            "{% endfor %}" + ASKED,
            "the answer 'nineteen' is not in what is rendered",
        ),
        (
            OPENS
            + "{{ m.content }}{% if m.role == 'user' %}<|im_end|>{% endif %}\n{% endfor %}"
            + ALWAYS,
            "the first special token behind an answer is <|im_start|>, which is not seen to end it",
        ),
        (OPENS + "{{ m.content }}\n{% endfor %}" + ASKED, None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    ],
    ids=["in capitals", "an answer is always begun", "no end", "no token"],
)
def test_a_template_that_does_not_tell_the_end_leaves_the_teachers_eos(template, warning, caplog):
    assert end_of(template) == ""
    if warning is None:
        assert not caplog.text
    else:
        assert warning in caplog.text
        assert "So the EOS of the student's answers is the teacher's EOS" in caplog.text


def test_what_the_data_have_before_a_question_is_given_where_a_template_demands_it(caplog):
    before = ("system", "be brief")
    assert end_of(SYSTEM_FIRST + CHATML, [before, *CHAT]) == "<|im_end|>"
    assert end_of(NO_SYSTEM) == "<|im_end|>"
    assert not caplog.text


ONE_TOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
BEGINS_TURNS = (
    "{% for m in messages %}{{ '' if loop.first else '<|im_start|>' }}{{ m.role }}: {{ m.content }}"
    "{% endfor %}<|im_start|>assistant: "
)


def test_the_end_of_a_turn_also_ends_what_is_before_the_question(caplog):
    before = ("system", "be brief")
    assert end_of(SYSTEM_FIRST + ONE_TOKEN, [before, *CHAT]) == "<|im_end|>"
    assert not caplog.text
    assert end_of(SYSTEM_FIRST + BEGINS_TURNS, [before, *CHAT]) == ""
    assert "<|im_start|>, which is not seen to end it" in caplog.text
    assert end_of(SYSTEM_FIRST + ONE_TOKEN, [("system", ""), *CHAT]) == ""
