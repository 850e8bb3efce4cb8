"""Tokenizers that are learned before the runs that read them."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lightning_kd.comparison.tokenizers import LearnedTokenizers

VALUES = {"data": "texts", "size": 262}


@dataclass(frozen=True)
class Run:
    """What a run is given."""

    fit: dict
    test: dict


def learned(**options):
    given = {"files": "{data}/*.txt", "vocab_size": "{size}"} | options
    return LearnedTokenizers({"bpe": given, "unread": {"files": "gone.txt"}}, VALUES, Path("out"))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("aaaa bbbb " * 20)
    Path("texts/b.txt").write_text("cccc " * 20)


def test_those_that_runs_read_are_learned_once(texts, capsys):
    made = learned()
    place = Path(made.places["bpe"])
    runs = [Run({"data": {"init_args": {"tokenizer": str(place)}}}, {})]
    made.learn([Run({"data": {"tokenizer": "another"}}, {})], Console())
    assert not place.exists()
    made.learn(runs, Console(width=200))
    assert f"262 tokens, learned from 2 texts, are in {place}" in capsys.readouterr().out
    assert [*place.parent.iterdir()] == [place]
    tokenizer = AutoTokenizer.from_pretrained(place)
    assert len(tokenizer) == 262
    # 256 bytes and 2 special tokens leave 4 merges, of the commonest pairs.
    assert {"aa", "bb", "cc"} <= tokenizer.get_vocab().keys()
    made.learn(runs, Console())
    assert capsys.readouterr().out == ""


def test_other_texts_are_another_directory(texts, capsys):
    before = learned().places["bpe"]
    Path("texts/b.txt").write_text("zzzz " * 40)
    made = learned()
    assert made.places["bpe"] != before
    made.learn([Run({"tokenizer": made.places["bpe"]}, {})], Console())
    vocabulary = AutoTokenizer.from_pretrained(made.places["bpe"]).get_vocab()
    assert "zz" in vocabulary
    assert "cc" not in vocabulary


def test_one_that_is_part_of_a_path_is_learned(texts, capsys):
    made = learned()
    made.learn([Run({"model": f"{made.places['bpe']}/tokenizer.json"}, {})], Console())
    assert Path(made.places["bpe"], "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "{}"])
def test_one_that_is_not_as_it_was_learned_is_refused(name, text, texts):
    made = learned()
    place, runs = made.places["bpe"], [Run({"tokenizer": made.places["bpe"]}, {})]
    made.learn(runs, Console())
    Path(place, name).unlink()
    if text is not None:
        Path(place, name).write_text(text)
    message = rf"tokenizers\.bpe: what is in {place} is damaged: .*{name}.*; remove {place}"
    with pytest.raises(ValueError, match=message):
        made.learn(runs, Console())


def test_a_directory_that_was_removed_by_half_is_no_tokenizer_of_an_earlier_release(texts):
    made = learned()
    Path(made.places["bpe"]).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"its file tokenizer\.json is missing"):
        made.learn([Run({"tokenizer": made.places["bpe"]}, {})], Console())


def test_other_options_are_another_directory(texts):
    places = {learned(**options).places["bpe"] for options in ({}, {"vocab_size": 300})}
    assert len(places) == 2
    assert learned().places == learned(vocab_size=262).places


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "{SFT}"}, "{SFT} stands for nothing; it is learned before all runs"),
        ({"files": None}, "tokenizers.bpe: the following arguments are required: files"),
        ({"vocab_size": "x"}, 'tokenizers.bpe: Parser key "vocab_size"'),
        ({"size": 300}, "tokenizers.bpe: Option 'size' is not accepted"),
        ({"output": "there"}, "tokenizers.bpe: Option 'output' is not accepted"),
    ],
)
def test_what_is_no_option_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        learned(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "none.txt"}, "tokenizers.bpe: the data file 'none.txt' does not exist"),
        ({"vocab_size": 200}, "tokenizers.bpe: vocab_size is 200"),
    ],
)
def test_what_cannot_be_learned_is_said_and_leaves_nothing(texts, options, message):
    made = learned(**options)
    with pytest.raises(ValueError, match=message):
        made.learn([Run({"tokenizer": made.places["bpe"]}, {})], Console())
    assert not Path("out").exists()
