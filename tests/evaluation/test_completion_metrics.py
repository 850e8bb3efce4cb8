"""Metrics of completions, against other packages, the rules as they are published, and by hand."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchmetrics import Metric
from torchmetrics.text import (
    BLEUScore,
    CharErrorRate,
    EditDistance,
    MatchErrorRate,
    WordErrorRate,
    WordInfoLost,
    WordInfoPreserved,
)

from lightning_kd.evaluation import (
    DistinctN,
    ExactMatch,
    GSM8KAccuracy,
    MeanScore,
    Repetition,
    RougeL,
    as_metric,
    computed,
)
from lightning_kd.evaluation.completion_metric import metric_name
from lightning_kd.evaluation.given_metrics import MeanOfFunction

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "were", "running", "quickly"]


def values(metric, completions, references):
    metric.update(completions, references)
    return {name: value.item() for name, value in computed(metric).items()}


def random_texts(number, seed=0, longest=14):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, number)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def test_a_match_is_with_any_reference_and_whole():
    rows = [(" 12", ["12 "]), ("12", ["1 2", "12"]), ("12", ["123"]), ("", [""])]
    assert values(ExactMatch(), *zip(*rows, strict=True)) == {"exact_match": 0.75}


def by_table(ours, theirs):
    """ROUGE-L by dynamic programming in NumPy, from Lin's formula."""
    table = np.zeros((len(ours) + 1, len(theirs) + 1))
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            longest = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else longest
    precision, recall = table[-1, -1] / len(ours), table[-1, -1] / len(theirs)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def test_rouge_l_is_the_best_f1_by_the_formula():
    completions, first, second = (random_texts(30, seed) for seed in range(3))
    references = list(zip(first, second, strict=True))
    best = [
        max(by_table(c.split(), r.split()) for r in texts)
        for c, texts in zip(completions, references, strict=True)
    ]
    assert len(set(best)) > 15
    found = values(RougeL(), completions, references)
    assert found == pytest.approx({"rouge_l": np.mean(best)}, abs=1e-6)


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_l_is_that_of_the_package_rouge_score(use_stemmer):
    scoring = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scoring.RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    completions = [*random_texts(20), "The dog's 2 running-shoes!", "...", "Cats sat"]
    references = [
        [a, b.title()] for a, b in zip(random_texts(23, 1), random_texts(23, 2), strict=True)
    ]
    references[-1] = ["A cat is sitting", "the cat ran"]
    wanted = [
        scorer.score_multi(texts, completion)["rougeL"].fmeasure
        for completion, texts in zip(completions, references, strict=True)
    ]
    found = values(RougeL(use_stemmer), completions, references)
    assert found["rouge_l"] == pytest.approx(np.mean(wanted), abs=1e-6)


def test_the_stemmer_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setattr("torchmetrics.functional.text.rouge._NLTK_AVAILABLE", False)
    with pytest.raises(ValueError, match="use_stemmer needs nltk"):
        RougeL(use_stemmer=True)


def as_published(text, pattern, choose):
    """A filter and exact match as lm-eval 0.4.13 writes them in gsm8k.yaml, done literally."""
    found = re.compile(pattern).findall(text)
    if not found:
        return "[invalid]"
    match = found[choose]
    if isinstance(match, tuple):
        match = next(part for part in match if part)
    match = match.strip()
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        match = re.sub(ignored, "", match)
    return match.lower()


STRICT = (r"#### (\-?[0-9\.\,]+)", 0)
FLEXIBLE = (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
PROBLEM = "Natalia sold 48/2 = <<48/2=24>>24 clips, and 48+1024 = <<48+1024=1072>>1,072 in all.\n"


GSM8K_CASES = [
    (PROBLEM + "#### 1,072", 1, 1),
    (PROBLEM + "#### 1072", 1, 1),
    ("#### 1072.", 1, 1),
    ("#### $1072", 0, 1),
    ("It is $1,072.", 0, 1),
    ("48+1024 = <<48+1024=1072>>", 0, 1),
    ("48+1024 = <<48+1024=1072>>1072", 0, 1),
    ("#### 1072\n\nQuestion: 1+1\nAnswer: #### 2", 1, 0),
    ("#### 71, no: #### 1072", 0, 1),
    ("####1072", 0, 1),
    ("#### 1072.0", 0, 0),
    ("#### -1072", 0, 0),
    ("1072 ...", 0, 0),
    ("#### ,", 0, 0),
    ("no number", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("completion", "strict", "flexible"), GSM8K_CASES)
def test_gsm8k_is_scored_as_lm_eval_scores_it(completion, strict, flexible):
    reference = PROBLEM + "#### 1,072"
    found = values(GSM8KAccuracy(), [completion], [[reference]])
    assert found == {"gsm8k_accuracy_strict": strict, "gsm8k_accuracy_flexible": flexible}
    wanted = as_published(reference, *STRICT)
    assert strict == (as_published(completion, *STRICT) == wanted)
    assert flexible == (as_published(completion, *FLEXIBLE) == wanted)


@pytest.mark.filterwarnings("default")
def test_gsm8k_is_scored_as_the_installed_lm_eval_scores_it():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    package = Path(extraction.__file__).parents[1]
    task = yaml.safe_load((package / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    ignored = task["metric_list"][0]["regexes_to_ignore"]
    texts = [completion for completion, *_ in GSM8K_CASES]
    wanted = {}
    for rule in task["filter_list"]:
        options = {name: value for name, value in rule["filter"][0].items() if name != "function"}
        found = extraction.RegexFilter(**options).apply(
            [[text] for text in texts], [{}] * len(texts)
        )
        scores = [
            exact_match_hf_evaluate(
                predictions=one,
                references=[PROBLEM + "#### 1,072"],
                regexes_to_ignore=ignored,
                ignore_case=True,
            )["exact_match"]
            for one in found
        ]
        wanted[rule["name"]] = [int(score) for score in scores]
    assert wanted["strict-match"] == [strict for _, strict, _ in GSM8K_CASES]
    assert wanted["flexible-extract"] == [flexible for *_, flexible in GSM8K_CASES]


def test_every_answer_of_gsm8k_is_right_by_both_rules(shared_data):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    found = values(GSM8KAccuracy(), answers, [[answer] for answer in answers])
    assert set(found.values()) == {1.0}
    shifted = [[answer] for answer in answers[1:] + answers[:1]]
    assert 0 < values(GSM8KAccuracy(), answers, shifted)["gsm8k_accuracy_strict"] < 0.1


def test_a_reference_without_an_answer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"GSM8KAccuracy reads .* 'seventy-two' has none"):
        GSM8KAccuracy().update(["#### 72"], [["seventy-two"]])


def test_distinct_and_repeated_ngrams_are_counted_by_hand():
    rows = random_texts(12)
    grams = {
        n: [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in map(str.split, rows)]
        for n in (1, 2, 3)
    }
    metric = DistinctN()
    for start in (0, 5, 9):
        part = rows[start : {0: 5, 5: 9, 9: 12}[start]]
        metric.update(part, [[]] * len(part))
    for n, found in grams.items():
        everything = Counter(gram for row in found for gram in row)
        wanted = len(everything) / everything.total()
        assert metric.compute()[f"distinct_{n}"].item() == pytest.approx(wanted, abs=1e-12)
        again = sum(row[i] in row[:i] for row in found for i in range(len(row)))
        repetition = values(Repetition(n), rows, [[]] * len(rows))
        assert repetition == pytest.approx({f"repetition_{n}": again / everything.total()})


def test_without_ngrams_there_is_no_repetition_and_nothing_distinct():
    texts = ["one two", ""]
    assert values(Repetition(), texts, [[], []]) == {"repetition_4": 0.0}
    assert values(DistinctN([3]), texts, [[], []]) == {"distinct_3": 0.0}


def test_a_metric_that_was_never_updated_is_zero():
    for metric in (ExactMatch(), DistinctN(), Repetition()):
        metric.update([], [])
        assert {value.item() for value in computed(metric).values()} == {0.0}


def test_a_metric_begins_again_after_reset():
    for metric in (ExactMatch(), DistinctN(), Repetition(1)):
        metric.update(["a a"], [["a"]])
        before = computed(metric)
        metric.reset()
        metric.update(["b b"], [["b b"]])
        metric.reset()
        metric.update(["a a"], [["a"]])
        assert computed(metric) == before


def test_an_evaluation_in_inference_mode_is_followed_by_one_outside():
    metric = ExactMatch()
    with torch.inference_mode():
        metric.update(["a"], [["a"]])
    metric.update(["a"], [["b"]])
    assert computed(metric)["exact_match"] == 0.5


def test_a_metric_of_torchmetrics_is_taken_as_it_is():
    bleu = BLEUScore(n_gram=1)
    assert as_metric(bleu) is bleu
    assert values(bleu, ["a b c d"], [["a b x y", "c"]]) == pytest.approx({"bleu_score": 0.75})


class Spread(Metric):
    """A metric of a user: one that is no number."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, completions, references):
        self.seen = self.seen + len(completions)

    def compute(self):
        return self.seen


def test_what_is_no_number_is_not_logged():
    with pytest.raises(ValueError, match="Spread computes tensor"):
        values(Spread(), ["a"], [["a"]])


def share_of_a(completion, references):
    return completion.count("a") / len(completion) + len(references)


def test_a_function_is_averaged_under_its_name():
    found = values(as_metric(share_of_a), ["aa", "ab"], [["x", "y"], []])
    assert found == {"share_of_a": (1 + 2 + 0.5 + 0) / 2}


def nothing(completion, references):
    return None


def endless(completion, references):
    return float("inf")


def test_a_function_that_gives_no_number_is_named():
    with pytest.raises(ValueError, match="the metric nothing gave None for the completion 'ab'"):
        values(as_metric(nothing), ["ab"], [[]])
    with pytest.raises(ValueError, match="the metric endless gave inf"):
        values(as_metric(endless), ["ab"], [[]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda completion, references: 1.0, "has no name to be logged under"),
        (len, "len does not take what it is given"),
        (ExactMatch, "metrics has the class ExactMatch"),
        ("ExactMatch", "metrics has 'ExactMatch'"),
    ],
)
def test_what_is_no_metric_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        as_metric(given)


@pytest.mark.parametrize("metric", [ExactMatch(), RougeL(), GSM8KAccuracy()])
def test_references_are_needed_by_name(metric):
    with pytest.raises(ValueError, match=f"{type(metric).__name__} compares .* has none"):
        metric.update(["a", "b"], [["#### 1"], []])
    with pytest.raises(ValueError, match="are the text '12'; give a list of texts"):
        metric.update(["12"], ["12"])


@pytest.mark.parametrize(
    "build", [lambda: Repetition(0), lambda: DistinctN([]), lambda: DistinctN([0, 1])]
)
def test_sizes_are_checked(build):
    with pytest.raises(ValueError, match=r"n is (0|\[.*\])"):
        build()


def test_a_mean_of_several_numbers_keeps_them_apart():
    class Two(MeanScore):
        names = ("first", "second")

        def scores(self, completion, references):
            return [len(completion), 1]

    assert values(Two(), ["ab", ""], [[""], [""]]) == {"first": 1.0, "second": 1.0}
    assert isinstance(as_metric(share_of_a), MeanOfFunction)


WRITTEN, WANTED = ["975", "a b d", "fifteen"], ["975", "a b c", "five"]


def edits(one, other):
    """Levenshtein's distance, by its recursion."""
    if not one or not other:
        return len(one) + len(other)
    same = edits(one[1:], other[1:])
    return (
        same if one[0] == other[0] else 1 + min(same, edits(one[1:], other), edits(one, other[1:]))
    )


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (CharErrorRate, sum(map(edits, WRITTEN, WANTED)) / sum(map(len, WANTED))),
        (EditDistance, sum(map(edits, WRITTEN, WANTED)) / 3),
        (WordErrorRate, 2 / 5),
        (MatchErrorRate, 2 / 5),
        (WordInfoLost, 1 - 9 / 25),
        (WordInfoPreserved, 9 / 25),
    ],
)
def test_a_metric_that_compares_with_one_text_is_given_it(metric, value):
    found = as_metric(metric())
    for _ in range(2):
        found.update(WRITTEN[:1], [WANTED[:1]])
        found.update(WRITTEN[1:], [[text] for text in WANTED[1:]])
        found.update([], [])
        (number,) = computed(found).values()
        assert number.item() == pytest.approx(value)
        found.reset()
    assert metric_name(found) == metric.__name__
    with pytest.raises(ValueError, match=f"{metric.__name__} compares a completion with one ref"):
        found.check_references([["a"], ["a", "b"]])
    with pytest.raises(ValueError, match=f"{metric.__name__} compares completions with references"):
        found.check_references([[]])


class Broken(MeanScore):
    names = ("broken",)

    def scores(self, completion, references):
        return [int(completion)]


def broken_function(completion, references):
    return int(completion)


@pytest.mark.parametrize(
    ("given", "name"), [(Broken(), "Broken"), (broken_function, "broken_function")]
)
def test_a_metric_that_raises_is_named_with_the_completion(given, name):
    message = (
        f"the metric {name} failed for the completion 'no number': ValueError: invalid literal"
    )
    with pytest.raises(ValueError, match=message):
        as_metric(given).update(["3", "no number"], [["3"], ["3"]])


def too_large(completion, references):
    return 10**400


class TooLarge(Broken):
    def scores(self, completion, references):
        return [10**400]


@pytest.mark.parametrize(("given", "name"), [(TooLarge(), "TooLarge"), (too_large, "too_large")])
def test_a_number_too_large_is_named(given, name):
    with pytest.raises(ValueError, match=f"the metric {name} .* the completion 'a'"):
        as_metric(given).update(["a"], [["b"]])


@pytest.mark.parametrize("sizes", [[1.5], [True], ["1"], [], [0]])
def test_sizes_of_n_grams_are_whole_numbers(sizes):
    with pytest.raises(ValueError, match=r"n is .*; give one or more whole numbers"):
        DistinctN(sizes)


def test_the_first_answer_of_a_reference_counts_as_in_the_official_script():
    official = re.compile(r"#### (\-?[0-9\.\,]+)")
    reference = "a #### 5 b #### 7"
    metric = GSM8KAccuracy()
    metric.update([f"#### {official.search(reference)[1]}"], [[reference]])
    assert metric.compute()["gsm8k_accuracy_strict"] == 1
