"""``lightning-kd check``: each mismatch is named, and only that one; sound configurations have none."""

import json
import re
from pathlib import Path

import pytest

from lightning_kd.preflight import MISMATCHES
from tests.preflight.places import (
    SIZE,
    STUDENT,
    TEMPLATE,
    chat_tokenizer,
    command,
    save_model,
    write_chats,
    write_rows,
)
from tests.support.command_line import CONFIGS, DEBUG, EXPECTED_WARNINGS, QUIET, fit

pytestmark = EXPECTED_WARNINGS

PROMPTS, CHATS = "PromptCompletionData", "ChatData"
OTHER_TEMPLATE = TEMPLATE.replace("<end>", "<end>\n")
ON_POLICY = ("--on_policy.lmbda", 0.5, "--on_policy.generation.max_new_tokens")

MASKING = """
import json
from pathlib import Path
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling


class Masking(LightningDataModule):
    def __init__(self, tokenizer: str, train: str, batch_size: int = 4) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.train, self.batch_size = train, batch_size

    def train_dataloader(self) -> DataLoader:
        eos = self.tokenizer.eos_token_id
        rows = [json.loads(line) for line in Path(self.train).read_text().splitlines()]
        ids = [self.tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
        collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        batches = [ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size)]
        return DataLoader(
            [[{"input_ids": [*row, eos]} for row in batch] for batch in batches],
            batch_size=None,
            collate_fn=self.collated(collate, [len(row["prompt"]) for row in rows][0]),
        )

    def collated(self, collate, prompt):
        def make(rows):
            batch = dict(collate(rows))
            batch["labels"][:, :prompt] = -100
            return batch
        return make
"""


@pytest.fixture
def place(tmp_path):
    """A sound teacher, its tokenizer, rows and chats."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained("tokenizer")
    save_model("teacher", tokenizer)
    write_rows()
    write_chats()
    return tmp_path


@pytest.fixture
def check(cli, capsys):
    """Run a command; returns its exit code and what it printed."""

    def run(*arguments):
        code = 0
        try:
            cli(*arguments)
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return run


def named(said):
    return [name for name in (*MISMATCHES, "refused") if re.search(rf"^{name}: ", said, re.M)]


def other_template():
    save_model("teacher", chat_tokenizer(template=OTHER_TEMPLATE))
    return command("SupervisedKD", CHATS, "tokenizer", "chats.jsonl")


def eos_never_in_the_labels():
    rows = write_rows("cut.jsonl", ended=False)
    return command("SupervisedKD", PROMPTS, "tokenizer", rows)


def pad_equal_to_eos_masked():
    chat_tokenizer(pad="<end>").save_pretrained("tokenizer")
    save_model("teacher", chat_tokenizer(pad="<end>"))
    Path("masking.py").write_text(MASKING)
    return command("SupervisedKD", "masking.Masking", "tokenizer", "rows.jsonl")


def too_few_new_tokens():
    return command("GKD", PROMPTS, "tokenizer", "rows.jsonl", *ON_POLICY, 3)


def context_too_short():
    save_model("teacher", chat_tokenizer(), max_position_embeddings=8)
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl")


def vocabulary_padding():
    save_model("teacher", chat_tokenizer(), vocab_size=SIZE + 11)
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl")


def another_tokenizer():
    save_model("teacher", chat_tokenizer("ponmlkjihgfedcba"))
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl")


def memory_beyond_the_machine():
    student = (
        "{model_type: llama, hidden_size: 65536, intermediate_size: 65536, num_hidden_layers: 64, "
        "num_attention_heads: 64, tie_word_embeddings: true}"
    )
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl", student=student)


PLANTED = {
    other_template: ("template", r"a short chat is .*<bot>So\.<end>", "data.tokenizer: teacher"),
    eos_never_in_the_labels: ("eos_untrained", "none of 40 completions", "ended_column"),
    pad_equal_to_eos_masked: ("eos_masked", "the padding is the same token", "ids != pad"),
    too_few_new_tokens: ("endless", "max_new_tokens is 3, and 40 of 40", "max_new_tokens: 6"),
    context_too_short: ("context", "has 9 tokens, and the teacher has 8", "max_length"),
    vocabulary_padding: ("vocabulary", "21 logits and the teacher 32", "vocabulary: shared"),
    another_tokenizer: ("tokenizer", "'a' is 5 in the data's and 20 in", "tokenizer: teacher"),
    memory_beyond_the_machine: ("memory", r"needs at least .* TB on cpu", "lora for the student"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_mismatch_is_named_and_only_that_one(place, check, monkeypatch, plant):
    monkeypatch.syspath_prepend(str(place))
    name, says, change = PLANTED[plant]
    code, said = check(*plant())
    refused = plant in REFUSED
    assert named(said) == [name, *(["refused"] if refused else [])], said
    told = " ".join(said[re.search(rf"^{name}: ", said, re.M).start() :].split())
    assert re.search(says, told), told
    assert change in told.partition("change: ")[2]
    assert code == (2 if refused else 1)


def test_all_mismatches_are_planted():
    assert {name for name, *_ in PLANTED.values()} == set(MISMATCHES)


def generation_config_without_the_eos():
    save_model("teacher", chat_tokenizer(), generation_eos=1)
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl")


def generation_config_of_no_token():
    save_model("teacher", chat_tokenizer(), generation_eos=[4, 999])
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl")


def end_of_turn_that_ends_nothing():
    chat_tokenizer(eos="<eos>").save_pretrained("tokenizer")
    save_model("teacher", chat_tokenizer(eos="<eos>"))
    return command("SupervisedKD", CHATS, "tokenizer", "chats.jsonl")


def student_with_another_tokenizer():
    save_model("student", chat_tokenizer("ponmlkjihgfedcba"))
    given = command("SFT", PROMPTS, "tokenizer", "rows.jsonl")
    place = given.index("--model.student.config")
    return [*given[:place], "--model.student.name_or_path", "student", *given[place + 2 :]]


def cut_ends():
    cut = ("--data.max_length", 6, "--data.truncation", "right")
    return command("SFT", PROMPTS, "tokenizer", "rows.jsonl", *cut)


def prompts_and_new_tokens_beyond_the_context():
    return command("GKD", PROMPTS, "tokenizer", "rows.jsonl", *ON_POLICY, 300)


def tokens_of_the_teacher_left_out():
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    save_model("teacher", tokenizer, vocab_size=SIZE + 11)
    shared = ("--model.vocabulary", "shared")
    return command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl", *shared)


FURTHER = {
    generation_config_without_the_eos: ("endless", "ends its completions at 1"),
    generation_config_of_no_token: ("endless", "at 999, which is no token"),
    end_of_turn_that_ends_nothing: ("endless", "ends a turn with '<end>'"),
    student_with_another_tokenizer: ("tokenizer", "the student was trained with another"),
    cut_ends: ("eos_untrained", "40 rows were cut"),
    prompts_and_new_tokens_beyond_the_context: ("context", "max_new_tokens are 303"),
    tokens_of_the_teacher_left_out: ("vocabulary", "1 tokens of the teacher's tokenizer"),
}


REFUSED = {
    context_too_short,
    vocabulary_padding,
    another_tokenizer,
    prompts_and_new_tokens_beyond_the_context,
}
"""What ``fit`` refuses, too."""


@pytest.mark.parametrize("plant", FURTHER, ids=lambda plant: plant.__name__)
def test_other_forms_of_the_mismatches(place, check, plant):
    name, says = FURTHER[plant]
    code, said = check(*plant())
    expected = (2, [name, "refused"]) if plant in REFUSED else (1, [name])
    assert (code, named(said)) == expected, said
    assert says in " ".join(said.split())


def of_config(name, *more):
    """A shipped configuration, with a student and a teacher that are there."""
    arguments = [str(argument) for argument in fit(name, *more)]
    return ["check", *arguments[1:]]


SOUND = {
    "sft": lambda teacher: of_config("sft"),
    "supervised_kd": lambda t: of_config("supervised_kd", "--model.teacher.name_or_path", t),
    "gkd": lambda t: of_config("gkd", "--model.teacher.name_or_path", t),
    "chats": lambda t: command("SupervisedKD", CHATS, "tokenizer", "chats.jsonl"),
    "padding is the EOS": lambda t: command("SFT", PROMPTS, "padded", "rows.jsonl"),
    "prompts alone": lambda t: command(
        *("GKD", PROMPTS, "tokenizer", "rows.jsonl", "--data.completion_column", "null"),
        *("--on_policy.lmbda", 1, "--on_policy.generation.max_new_tokens", 3),
    ),
    "shared vocabulary": lambda t: command(
        *("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl", "--model.vocabulary", "shared"),
        student=STUDENT.replace("{", "{vocab_size: 64, "),
    ),
    "documents": lambda t: command("SFT", "DocumentData", "tokenizer", "text.jsonl"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_configuration_has_no_mismatch(place, check, saved_teacher, name):
    chat_tokenizer(pad="<end>").save_pretrained("padded")
    Path("text.jsonl").write_text("\n".join([json.dumps({"text": "abcabc"})] * 9))
    code, said = check(*SOUND[name](saved_teacher))
    assert named(said) == [], said
    assert "No mismatch was found." in said
    assert code == 0


def test_the_report_says_what_a_run_is(place, check):
    save_model("teacher", chat_tokenizer(), max_position_embeddings=64)
    limit = ("--data.max_length", 12, "--data.truncation", "drop")
    Path("long.jsonl").write_text(Path("chats.jsonl").read_text().replace("bcdef", "bcdefg"))
    code, said = check(
        *command("GKD", CHATS, "tokenizer", "long.jsonl", *ON_POLICY, 8, *limit),
        *("--model.student.lora", "{r: 2}"),
    )
    assert code == 0, said
    told = " ".join(said.split())
    # Of 40 chats, each seventh begins with the second letter and is one token too long.
    for part in (
        "<user> a b c <end> <bot> [a] [b] [c] [d] [e] [<end>]",
        "rows 34; 15.0% dropped and 0.0% cut; the longest has 12 tokens",
        "100.0% of 34 are trained to end ('<end>', 4)",
        "eos '<end>' 4",
        "pad '<pad>' 0",
        "; a chat template",
        "context of student 2,048, teacher 64; max_new_tokens 8",
        "(LoRA of rank 2)",
        "frozen",
        "equal: all 21 logits are compared",
        "key-value cache of the student",
        "states of the optimizer",
        "chunk of logits",
        "activations are not counted",
    ):
        assert part in told, (part, said)
    assert "\x1b[" not in said  # no colour where there is no terminal


def test_what_fit_would_refuse_is_said_among_the_rest(place, check):
    code, said = check(
        *command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl", "--data.max_length", 4),
    )
    assert code == 2
    assert "refused: rows.jsonl:1: the prompt has 3 tokens" in " ".join(said.split())
    assert "teacher: 5." in said or "weights" in said


def test_a_wrong_configuration_ends_with_2(place, check):
    for wrong in (["--model.alpha", "3"], ["--model.aplha", "0.5"], ["--trainer.max_step", "1"]):
        code, said = check(*command("SupervisedKD", PROMPTS, "tokenizer", "rows.jsonl", *wrong))
        assert code == 2, said
        assert "error:" in said


def test_the_command_takes_what_fit_takes_and_trains_nothing(place, cli, check):
    cli(*command("SFT", PROMPTS, "tokenizer", "rows.jsonl", name="fit"))
    saved = "runs/version_0/config.yaml"
    code, said = check("check", "--config", saved)
    assert code == 0, said
    code, said = check("check", "--config", saved, "--ckpt_path", "none.ckpt")
    assert code == 2
    assert "does not exist" in said
    assert not Path("runs/version_1").exists()


def test_fit_says_it_in_five_lines_or_not_at_all(place, cli, caplog):
    run = command("GKD", PROMPTS, "tokenizer", "rows.jsonl", *ON_POLICY, 3, name="fit")
    with caplog.at_level("INFO"):
        cli(*run)
    lines = [r.message for r in caplog.records if r.pathname.endswith("preflight/callback.py")]
    assert len(lines) == 4
    assert lines[0].endswith("a b c [a] [b] [c] [d] [e] [<end>]")
    assert lines[1].startswith("Student 3.3 k weights, 3.3 k train; teacher 5.9 k weights; ")
    assert lines[2].startswith("Training rows: 40; none dropped or cut")
    assert lines[3].startswith("Would ruin the run: endless: ")
    caplog.clear()
    with caplog.at_level("INFO"):
        cli(*run, "--preflight.enabled", "false")
    assert caplog.records
    assert not [r for r in caplog.records if r.pathname.endswith("preflight/callback.py")]


def test_configs_are_checked_with_their_overlays(check, teacher):
    arguments = ["check", "--config", CONFIGS / "supervised_kd.yaml", *DEBUG, *QUIET]
    code, said = check(*arguments, "--model.teacher.name_or_path", teacher)
    assert code == 0, said
