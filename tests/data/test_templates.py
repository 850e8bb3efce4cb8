"""Templates of prompts over several columns."""

import json
from pathlib import Path

import pytest

from lightning_kd.data import PromptCompletionData
from lightning_kd.data.templates import PromptTemplate
from tests.support.toys import letter_tokenizer

ALPACA = ["Do {instruction}: {input}.", "Do {instruction}."]


def prompts(*rows, **options):
    Path("rows.jsonl").write_text("\n".join(json.dumps(row | {"completion": "a"}) for row in rows))
    tokenizer = letter_tokenizer("abcdefghijklmnopqrstuvwxyzDQ:. {}()[]_%\\0")
    found = PromptCompletionData(tokenizer=tokenizer, train="rows.jsonl", **options).rows("train")
    return [found.example(row, 0).prompt for row in range(len(found))]


def test_any_columns_of_the_row_are_filled_in():
    rows = [{"instruction": "sort", "input": "b a"}, {"instruction": "{input}", "input": ""}]
    assert prompts(*rows, prompt_template="{instruction}:{input}") == ["sort:b a", "{input}:"]


def test_of_several_templates_the_first_is_taken_whose_columns_have_text():
    rows = [{"instruction": "sort", "input": "b a"}, {"instruction": "sing", "input": ""}]
    rows += [{"instruction": "run"}, {"instruction": "go", "input": None}]
    assert prompts(*rows, prompt_template=ALPACA) == [
        "Do sort: b a.",
        "Do sing.",
        "Do run.",
        "Do go.",
    ]


def test_the_prompt_goes_by_its_name_or_its_column():
    row = {"question": "why", "topic": "math"}
    for template in ("{topic}: {prompt}", "{topic}: {question}"):
        assert prompts(row, prompt_column="question", prompt_template=template) == ["math: why"]


def test_other_braces_stand_for_themselves():
    """As LaTeX has them, of which prompts of mathematics are full."""
    text = "a \\boxed{} {0} { prompt } %s {prompt}"
    assert prompts({"prompt": "{prompt}"}, prompt_template=text) == [
        "a \\boxed{} {0} { prompt } %s {prompt}"
    ]


@pytest.mark.parametrize(
    "text",
    ["{prompt.__class__}", "{prompt[0]}", "{prompt!r}", "{prompt:>9}", "{prompt.a} {prompt}"],
)
def test_a_template_reads_columns_and_nothing_of_them(text):
    with pytest.raises(ValueError, match="it takes names of columns alone"):
        PromptTemplate((text,))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"instruction": "sort"},
            {"prompt_template": "{instruction} {inptu}"},
            r"rows\.jsonl:1: column 'inptu' is missing; there are \['completion', 'instruction'\]",
        ),
        (
            {"instruction": "sort", "input": None},
            {"prompt_template": "{instruction} {input}"},
            r"rows\.jsonl:1: column 'input' must be text, got nothing",
        ),
        (
            {"instruction": "sort", "input": "b"},
            {"prompt_template": ["{instruction} {inptu}", "{instruction}"]},
            r"no row of data\.train has text in the column 'inptu', which data\.prompt_template",
        ),
        ({"prompt": "a"}, {"prompt_template": "Q: "}, "lacks the place of {prompt}"),
        ({"prompt": "a"}, {"prompt_template": []}, "an empty list"),
        (
            {"prompt": "a"},
            {"prompt_template": "{a}", "prompt_column": "question"},
            "prompt_column is 'question', and prompt_template has neither",
        ),
    ],
)
def test_what_a_row_lacks_is_named(row, options, message):
    with pytest.raises(ValueError, match=message):
        prompts(row, **options)
