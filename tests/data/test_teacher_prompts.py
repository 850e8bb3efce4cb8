"""What the teacher reads in place of the prompt: privileged text, by templates."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.data import ArithmeticData, ChatData, PromptCompletionData
from lightning_kd.generation import Completions
from lightning_kd.generation.rollouts import rollout_batch
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teacher_rows import as_teacher_reads, check_teacher_rows
from tests.support.templates import CHATML
from tests.support.toys import letter_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzDQ:. ()"
ROWS = [
    {"prompt": "ab", "completion": "cd", "solution": "xyz"},
    {"prompt": "abc", "completion": "e", "solution": "w"},
]


def data(*rows, **options):
    options = {"teacher_prompt_template": "{solution}: {prompt}"} | options
    given = PromptCompletionData(
        tokenizer=letter_tokenizer(LETTERS), train=list(rows or ROWS), **options
    )
    given.read("train")
    return given


def texts(rows, mask):
    tokenizer = letter_tokenizer(LETTERS)
    return [
        tokenizer.decode(ids[keep.bool()]).replace("<eos>", "$").replace(" ", "")
        for ids, keep in zip(rows, mask, strict=True)
    ]


def test_the_same_completion_stands_behind_the_teachers_prompt():
    batch = data().batch_of("train", [0, 1])
    assert texts(batch["input_ids"], batch["attention_mask"]) == ["abcd$", "abce$"]
    told = batch["teacher"]
    assert texts(told["input_ids"], told["attention_mask"]) == ["xyz:abcd$", "w:abce$"]
    assert texts(told["prompt_ids"], told["prompt_mask"]) == ["xyz:ab", "w:abc"]
    positions = ScoredPositions.from_labels(batch["labels"])
    check_teacher_rows(batch, positions)
    read, scored = as_teacher_reads(batch, positions)
    assert scored.targets.tolist() == positions.targets.tolist()
    assert scored.rows.tolist() == positions.rows.tolist()
    following = read["input_ids"].flatten()[scored.places + 1]
    assert following.tolist() == positions.targets.tolist()
    assert ScoredPositions.from_labels(read["labels"]).places.tolist() == scored.places.tolist()
    assert "teacher" not in read
    assert as_teacher_reads(read, scored) == (read, scored)


def test_some_of_the_positions_move_as_all_do():
    batch = data().batch_of("train", [0, 1])
    positions = ScoredPositions.from_labels(batch["labels"])
    chosen = torch.tensor([True, False, True, False, True])
    whole = as_teacher_reads(batch, positions)[1]
    some = as_teacher_reads(batch, positions.subset(chosen))[1]
    assert some.places.tolist() == whole.places[chosen].tolist()
    assert (
        as_teacher_reads(batch, positions.subset(chosen))[0]["labels"] != IGNORE_INDEX
    ).sum() == 3


def test_generated_completions_stand_behind_both_prompts():
    batch = data().batch_of("train", [0, 1])
    ids = letter_tokenizer(LETTERS)(["fgh", "ij "], add_special_tokens=False)["input_ids"]
    mask = torch.tensor([[True] * 3, [True, True, False]])
    completions = Completions(torch.tensor(ids), mask, None, None, torch.tensor([False, True]))
    rollout = rollout_batch(batch, completions, pad_id=0, truncation="mask")
    assert texts(rollout["input_ids"], rollout["attention_mask"]) == ["abfgh", "abcij"]
    told = rollout["teacher"]
    assert texts(told["input_ids"], told["attention_mask"]) == ["xyz:abfgh", "w:abcij"]
    positions = ScoredPositions.from_labels(rollout["labels"])
    assert positions.rows.tolist() == [1, 1]  # the other did not end
    check_teacher_rows(rollout, positions)
    read, scored = as_teacher_reads(rollout, positions)
    assert read["input_ids"].flatten()[scored.places + 1].tolist() == positions.targets.tolist()


def test_of_several_templates_the_last_does_without_the_privileged_text():
    rows = [ROWS[0], ROWS[1] | {"solution": ""}]
    told = data(*rows, teacher_prompt_template=["{solution}: {prompt}", ". {prompt}"])
    batch = told.batch_of("train", [0, 1])["teacher"]
    assert texts(batch["prompt_ids"], batch["prompt_mask"]) == ["xyz:ab", ".abc"]


def test_the_completion_may_be_what_the_teacher_is_told():
    told = data(teacher_prompt_template="{prompt}. {completion}. {prompt}")
    batch = told.batch_of("train", [0])
    assert texts(batch["teacher"]["input_ids"], batch["teacher"]["attention_mask"]) == [
        "ab.cd.abcd$"
    ]


def test_predict_needs_no_privileged_text():
    rows = [{"prompt": "ab"}]
    found = PromptCompletionData(
        tokenizer=letter_tokenizer(LETTERS),
        predict=rows,
        teacher_prompt_template="{solution}: {prompt}",
    ).rows("predict")
    assert found.example(0, 0).teacher_prompt is None


def test_a_teachers_prompt_is_never_cut():
    long = {"prompt": "abcdefgh", "completion": "cd", "solution": "xyz"}
    with pytest.raises(
        ValueError, match=r"train\[0\]: the teacher reads 7 tokens of its prompt and 3"
    ):
        data(max_length=8)
    for truncation in ("left", "right"):
        with pytest.raises(ValueError, match="allowed are 8 together, and its prompt is never cut"):
            data(max_length=8, truncation=truncation)
    assert data(max_length=8, max_teacher_length=10).longest_of_teacher() == {"train": (10, 7)}
    kept = data(*ROWS, long, max_length=8, truncation="drop")
    assert len(kept.read_rows("train")) == 1
    assert kept.read_rows("train").dropped == 2
    assert kept.longest_of_teacher() == {"train": (8, 6)}
    # Where the student's prompt is cut, the teacher's stays.
    cut = data(long, max_length=8, max_teacher_length=99, truncation="left")
    batch = cut.batch_of("train", [0])
    assert texts(batch["prompt_ids"], batch["prompt_mask"]) == ["defgh"]
    told = batch["teacher"]
    assert texts(told["input_ids"], told["attention_mask"]) == ["xyz:abcdefghcd$"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ROWS,
            {"teacher_prompt_template": "{hint} {prompt}"},
            r"column 'hint' is missing; there are \['completion', 'prompt', 'solution'\]",
        ),
        (
            [ROWS[0] | {"solution": ""}],
            {},
            r"train\[0\]: column 'solution' has no text, and teacher_prompt_template",
        ),
        (
            ROWS,
            {"teacher_prompt_template": ["{hint} {prompt}", "{prompt}"]},
            r"no row of data\.train has text in the column 'hint', which data\.teacher_prompt",
        ),
        (ROWS, {"teacher_prompt_template": "{prompt}: {prompt}"}, "would be told no more"),
        (
            ROWS,
            {"prompt_template": "{solution} {prompt}"},
            "names no column that the student's prompt has not",
        ),
        (ROWS, {"teacher_prompt_template": "{prompt.a}"}, "teacher_prompt_template has {prompt.a}"),
        (
            ROWS,
            {"teacher_prompt_template": None, "max_teacher_length": 9},
            "max_teacher_length is 9, and the teacher reads the student's rows",
        ),
        (ROWS, {"max_teacher_length": 0}, "max_teacher_length is 0; it must be 1 or more"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(rows, options, message):
    with pytest.raises(ValueError, match=message):
        data(*rows, **options)


def test_the_yaml_of_the_docs_tells_the_teacher_a_solution():
    page = Path(__file__).resolve().parents[2] / "docs" / "self_distillation.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S)
    options = yaml.safe_load(block)["data"]["init_args"]
    rows = [{"question": "ab", "answer": "cd"}]
    signs = LETTERS + "\nASIabcdefghijklmnopqrstuvwxyz"
    tokenizer = letter_tokenizer("".join(dict.fromkeys(signs)))
    found = PromptCompletionData(**options | {"tokenizer": tokenizer, "train": rows})
    found.read("train")
    told = tokenizer.decode(found.batch_of("train", [0])["teacher"]["input_ids"][0])
    assert told.replace(" ", "") == "ab\n\nAsolution:\ncd\n\nSolveitinyourownwords.\ncd<eos>"


def chats(*rows, **options):
    tokenizer = letter_tokenizer("abcdefghijklmnopqrstuvwxyz:<|_>\n ")
    tokenizer.chat_template = CHATML
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"teacher_prompt_template": "{prompt} {solution}", "max_length": 400} | options
    found = ChatData(tokenizer=tokenizer, train="chats.jsonl", **options)
    found.read("train")
    return found


def test_a_chat_template_renders_what_only_the_teacher_reads():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "de"},
    ]
    found = chats({"messages": messages, "solution": "xy"}, train_on="each")
    batch = found.batch_of("train", [0, 1])
    told, tokenizer = batch["teacher"], found.tokenizer
    told_texts = [
        tokenizer.decode(ids[mask.bool()]).replace(" ", "")
        for ids, mask in zip(told["prompt_ids"], told["prompt_mask"], strict=True)
    ]
    turn, ask = "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    first = turn.format("user", "axy") + ask
    second = turn.format("user", "a") + turn.format("assistant", "b") + turn.format("user", "cxy")
    assert told_texts == [first, second + ask]
    positions = ScoredPositions.from_labels(batch["labels"])
    check_teacher_rows(batch, positions)
    read, scored = as_teacher_reads(batch, positions)
    assert read["input_ids"].flatten()[scored.places + 1].tolist() == positions.targets.tolist()


def test_chats_refuse_what_cannot_be_told():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="column 'solution' is missing"):
        chats(row)
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: column 'solution' has no text"):
        chats(row | {"solution": ""})
    with pytest.raises(ValueError, match="train_on is all, which learns several answers"):
        chats(row | {"solution": "x"}, train_on="all")
    system = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="changes the last message of the user before the answer"):
        chats({"messages": system, "solution": "x"})


@pytest.mark.parametrize("hint", ["solution", "demonstration", "feedback"])
def test_hints_of_sums(hint):
    sums = ArithmeticData(train_size=4, hint=hint)
    sums.setup("fit")
    batch = sums.batch_of("train", [0, 1, 2, 3])
    tokenizer = sums.tokenizer
    prompts = tokenizer.batch_decode(batch["teacher"]["prompt_ids"])
    check_teacher_rows(batch, ScoredPositions.from_labels(batch["labels"]))
    for told, prompt, completion in zip(prompts, batch["prompt"], batch["completion"], strict=True):
        assert told.endswith(prompt)
        shown = told.removesuffix(prompt)
        if hint == "solution":
            assert shown == prompt + completion
        elif hint == "feedback":
            assert shown.startswith(prompt)
            wrong, right = shown.removeprefix(prompt).split("=")
            assert right == completion
            assert sum(a != b for a, b in zip(wrong, right, strict=True)) == 1
        else:
            problem, solution = shown.split("=")
            assert problem + "=" != prompt
            first, second = (int(number[::-1]) for number in problem.split("+"))
            assert int(solution[::-1]) == first + second
    row, longest = batch["teacher"]["input_ids"].shape[1], batch["teacher"]["prompt_ids"].shape[1]
    assert sums.longest_of_teacher()["train"] == (row, longest)
    assert sums.rows("predict").example(0, 0).teacher_prompt is None
    with pytest.raises(ValueError, match="unknown hint"):
        ArithmeticData(hint="answer")


def test_rows_that_do_not_match_are_refused():
    batch = data().batch_of("train", [0, 1])
    positions = ScoredPositions.from_labels(batch["labels"])
    changed = [row | {"completion": "z" * len(row["completion"])} for row in ROWS]
    other = data(*changed).batch_of("train", [0, 1])
    with pytest.raises(ValueError, match="the teacher's row 0 has other tokens behind its prompt"):
        check_teacher_rows(batch | {"teacher": other["teacher"]}, positions)
    shorter = data(ROWS[1], ROWS[0]).batch_of("train", [0, 1])
    with pytest.raises(ValueError, match="the teacher's row 0 has other tokens behind its prompt"):
        check_teacher_rows(batch | {"teacher": shorter["teacher"]}, positions)
    everywhere = ScoredPositions.everywhere(batch["labels"], batch["attention_mask"])
    with pytest.raises(ValueError, match="row 0 is scored at token 1, in its prompt"):
        check_teacher_rows(batch, everywhere)
    without = {name: value for name, value in batch.items() if not name.startswith("prompt")}
    with pytest.raises(ValueError, match="rows for the teacher and no prompts of its own"):
        check_teacher_rows(without, positions)
