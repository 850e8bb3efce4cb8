"""Text is framed as its tokenizer frames it: in blocks, alone in a row, and as a prompt."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_kd.data import ChatData, DocumentData, PackedTextData, PromptCompletionData
from lightning_kd.data.collate import Collator
from lightning_kd.tokenization import encode_prompts, special_token_frame
from tests.support.toys import LETTERS, letter_tokenizer

EOS, BOS, OTHER = 1, 2, 3
FRAMES = {
    "nothing": "$A",
    "BOS": "<bos> $A",
    "BOS and EOS": "<bos> $A <eos>",
    "EOS": "$A <eos>",
    "EOS on both sides": "<eos> $A <eos>",
    "EOS as BOS": "<eos> $A",
    "something else at the end": "<bos> $A <other>",
}
DOCUMENTS = ["abc", "d", "efgh", "ab<eos>cd", "gh<eos>"]


def framing(template):
    """A tokenizer that adds what a template says; ids 1 EOS, 2 BOS, 3 another one."""
    tokenizer = letter_tokenizer("<>" + LETTERS)
    tokenizer.add_special_tokens({"bos_token": "<", "additional_special_tokens": [">"]})
    named = template.replace("<bos>", "<").replace("<other>", ">")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=named, special_tokens=[("<eos>", EOS), ("<", BOS), (">", OTHER)]
    )
    return tokenizer


def jsonl(*rows, name="rows.jsonl"):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return name


@pytest.mark.parametrize("frame", FRAMES)
def test_packed_documents_are_in_order_each_framed_and_ended_once(frame):
    tokenizer = framing(FRAMES[frame])
    path = jsonl(*({"text": text} for text in DOCUMENTS))
    blocks = PackedTextData(tokenizer=tokenizer, validation=path, block_length=2).rows("validation")
    before, after = {
        "nothing": ([], [EOS]),
        "BOS": ([BOS], [EOS]),
        "BOS and EOS": ([BOS], [EOS]),
        "EOS": ([], [EOS]),
        "EOS on both sides": ([EOS], [EOS]),
        "EOS as BOS": ([EOS], [EOS]),
        "something else at the end": ([BOS], [OTHER, EOS]),
    }[frame]
    letters = {c: i + 4 for i, c in enumerate(LETTERS)}
    stream = []
    for text in DOCUMENTS:
        own = [letters[c] for c in text.replace("<eos>", "")]
        if text == "ab<eos>cd":  # read as the token that it names, as transformers does
            own.insert(2, EOS)
        ended = text == "gh<eos>"
        stream += [*before, *own, *([EOS, *after[:-1]] if ended else after)]
    packed = [t for k in range(len(blocks)) for t in blocks.example(k, 0).input_ids]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 2


@pytest.mark.parametrize("frame", FRAMES)
def test_documents_without_an_end_have_none_and_prompts_only_begin(frame):
    tokenizer = framing(FRAMES[frame])
    path = jsonl({"text": " abc "}, {"text": "defg"})
    module = DocumentData(tokenizer=tokenizer, train=path, add_eos=False, strip=True)
    rows = module.rows("train")
    before, after = special_token_frame(tokenizer)
    assert tokenizer("abc")["input_ids"] == [*before, 4, 5, 6, *after]
    expected = [*before, 4, 5, 6, *([OTHER] if "else" in frame else [])]
    assert rows.example(0, 0).input_ids == expected
    assert encode_prompts(["abc", ""], tokenizer) == [[*before, 4, 5, 6], before]


def test_what_begins_a_text_is_there_once_also_where_the_text_names_it():
    tokenizer = framing(FRAMES["BOS"])
    assert encode_prompts(["<abc"], tokenizer) == [[BOS, 4, 5, 6]]


def test_a_tokenizer_that_does_more_than_to_add_tokens_is_refused():
    tokenizer = framing("$A")
    as_it_was = type(tokenizer).__call__

    class Reversing(type(tokenizer)):
        def __call__(self, text, add_special_tokens=True, **options):
            output = as_it_was(self, text, add_special_tokens=False, **options)
            if add_special_tokens:
                output["input_ids"] = [9, 9]
            return output

    tokenizer.__class__ = Reversing
    with pytest.raises(ValueError, match=r"makes \[9, 9\] of 'a' and \[4\] without special tokens"):
        special_token_frame(tokenizer)


def test_documents_are_rows_of_their_own_padded_and_all_is_scored():
    tokenizer = framing(FRAMES["BOS"])
    path = jsonl({"text": "abc", "kind": "x"}, {"text": "d", "kind": "y"})
    module = DocumentData(tokenizer=tokenizer, train=path, extra_columns=["kind"])
    rows = module.rows("train")
    batch = Collator(0)([(k, k, rows.example(k, 0)) for k in range(2)])
    assert batch["input_ids"].tolist() == [[BOS, 4, 5, 6, EOS], [BOS, 7, EOS, 0, 0]]
    assert batch["labels"].tolist() == [[BOS, 4, 5, 6, EOS], [BOS, 7, EOS, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["extra"] == {"kind": ["x", "y"]}
    assert "prompt_ids" not in batch


def test_long_documents_are_refused_dropped_or_cut_with_their_end(caplog):
    path = jsonl({"text": "abcdef"}, {"text": "g"})
    settings = {"tokenizer": framing(FRAMES["BOS"]), "train": path, "max_length": 4}
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: the document has 8 tokens; allowed are 4"
    ):
        DocumentData(**settings).rows("train")
    with caplog.at_level(logging.WARNING):
        cut = DocumentData(**settings, truncation="right").rows("train")
    assert [cut.example(k, 0).input_ids for k in range(2)] == [[BOS, 4, 5, 6], [BOS, 10, EOS]]
    assert "of 2 rows, 0 were dropped and 1 cut" in caplog.text
    dropped = DocumentData(**settings, truncation="drop").rows("train")
    assert (len(dropped), dropped.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (
            DocumentData,
            {"truncation": "left"},
            "unknown truncation 'left'; choose one of .*windows",
        ),
        (DocumentData, {"max_length": 1}, "max_length is 1; it must be 2 or more"),
        (PackedTextData, {"extra_columns": ["kind"]}, "extra_columns is .* several rows"),
    ],
)
def test_options_that_could_not_take_effect_are_refused(module, settings, message):
    with pytest.raises(ValueError, match=message):
        module(tokenizer=letter_tokenizer(), train="rows.jsonl", **settings)


def test_a_document_with_nothing_to_predict_is_refused_with_its_place():
    path = jsonl({"text": "abc"}, {"text": ""})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the document has 1 tokens"):
        DocumentData(tokenizer=letter_tokenizer(), train=path).rows("train")


def test_what_stands_behind_an_end_in_a_completion_is_counted_and_said(caplog):
    tokenizer = letter_tokenizer()
    path = jsonl(
        {"prompt": "a", "completion": "bc"},
        {"prompt": "a", "completion": "b<eos>cd"},
        {"prompt": "a", "completion": "b<eos>"},
        {"prompt": "a", "completion": "<eos>e"},
    )
    with caplog.at_level(logging.WARNING):
        rows = PromptCompletionData(tokenizer=tokenizer, train=path).rows("train")
    assert rows.cut_at_eos == 2
    assert rows.example(1, 0).input_ids == [2, 3, EOS]
    assert "of 4 rows, 2 have text behind an EOS inside their completion" in caplog.text
    assert "The first is rows.jsonl:2, which goes on with 'c d'" in caplog.text


def test_chats_too_but_not_for_what_their_template_ends_with(caplog):
    tokenizer = letter_tokenizer(LETTERS + "\n")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>\n{% endif %}{% endfor %}"
    )
    ask = {"role": "user", "content": "ab"}
    path = jsonl(
        {"messages": [ask, {"role": "assistant", "content": "c"}]},
        {"messages": [ask, {"role": "assistant", "content": "c<eos>d"}]},
    )
    with caplog.at_level(logging.WARNING):
        rows = ChatData(tokenizer=tokenizer, train=path).rows("train")
    assert rows.cut_at_eos == 1
    assert "of 2 rows, 1 have text behind an EOS" in caplog.text
    assert "rows.jsonl:2" in caplog.text


@torch.no_grad()
def nats_by_hand(directory, stories):
    """Nats and tokens of texts, each alone, in a plain loop over transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    nats, tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer(story.strip())["input_ids"][:512]])
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= log_probs.gather(-1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    return nats / tokens, tokens


def validate_stories(cli, capsys, shared_data, rows):
    model = shared_data / "models" / "stories260K"
    cli(
        *("validate", "--model", "SFT", "--model.student.name_or_path", model),
        *("--data", "DocumentData", "--data.tokenizer", model),
        *("--data.validation", shared_data / "tinystories" / "heldout.jsonl"),
        *("--data.strip", "true", "--data.add_eos", "false"),
        *("--data.max_length", 512, "--data.truncation", "right"),
        *("--data.eval_batch_size", 20, "--trainer.limit_val_batches", rows // 20),
        *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.logger", "false"),
        *("--trainer.enable_progress_bar", "false"),
    )
    table = capsys.readouterr().out

    def value(name):
        (line,) = [line for line in table.splitlines() if name in line]
        return float(line.replace("│", " ").replace("┃", " ").split()[-1])

    return value("val/cross_entropy"), value("val/tokens")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_stories_are_scored_as_by_a_loop_over_transformers(cli, capsys, shared_data):
    with (shared_data / "tinystories" / "heldout.jsonl").open() as file:
        stories = [json.loads(next(file))["text"] for _ in range(40)]
    expected, count = nats_by_hand(shared_data / "models" / "stories260K", stories)
    nats, tokens = validate_stories(cli, capsys, shared_data, 40)
    assert tokens == count
    assert nats == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_thousand_stories_have_the_known_loss(cli, capsys, shared_data):
    nats, tokens = validate_stories(cli, capsys, shared_data, 1000)
    assert tokens == 382_961
    assert round(nats, 4) == 1.3970


@pytest.mark.parametrize("frame", FRAMES)
def test_a_document_begins_with_its_prompt(frame):
    tokenizer = framing(FRAMES[frame])
    path = jsonl({"text": "abcde"}, {"text": "fghab"})
    whole = DocumentData(tokenizer=tokenizer, train=path).rows("train")
    parts = DocumentData(tokenizer=tokenizer, train=path, prompt_length=3).rows("train")
    before = len(special_token_frame(tokenizer)[0])
    for row, text in enumerate(("abcde", "fghab")):
        example = parts.example(row, 0)
        assert example.input_ids == whole.example(row, 0).input_ids
        assert example.prompt_length == 3
        assert example.prompt.replace(" ", "") == text[: 3 - before]
        assert example.completion.replace(" ", "") == text[3 - before :]
    batch = Collator(0)([(0, 0, parts.example(0, 0)), (1, 1, parts.example(1, 0))])
    ids = batch["input_ids"]
    assert torch.equal(batch["prompt_ids"], ids[:, :3])
    assert torch.equal(batch["labels"][:, 3:], ids[:, 3:])
    assert (batch["labels"][:, :3] == -100).all()


def test_a_short_document_keeps_a_token_to_learn():
    tokenizer = framing(FRAMES["nothing"])
    path = jsonl({"text": "abc"}, {"text": "abcdef"})
    rows = DocumentData(tokenizer=tokenizer, train=path, prompt_length=5).rows("train")
    assert [rows.example(row, 0).prompt_length for row in range(2)] == [3, 5]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: the document has 1 tokens, so there is none"
    ):
        DocumentData(
            tokenizer=tokenizer, train=jsonl({"text": "a"}), prompt_length=5, add_eos=False
        ).rows("train")


def test_a_prompt_is_shorter_than_the_longest_document():
    tokenizer = framing(FRAMES["nothing"])
    for length in (-1, 8):
        with pytest.raises(ValueError, match=f"prompt_length is {length}; it must be 0, for no"):
            DocumentData(tokenizer=tokenizer, train="x.jsonl", prompt_length=length, max_length=8)
