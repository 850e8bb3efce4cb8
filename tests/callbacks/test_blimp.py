"""Minimal pairs, against a loop over transformers."""

import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging

from lightning_kd import SFT, DenseLogits, DocumentData
from lightning_kd.callbacks import BLiMP
from lightning_kd.evaluation.minimal_pairs import MinimalPairs, accuracies, read_minimal_pairs
from tests.callbacks.test_document_likelihoods import TOKENIZER, rows, student
from tests.support.harness import trainer
from tests.test_token_bytes import sentence_piece

PAIRS = {
    "anaphor": (
        "morphology",
        "agreement",
        [("two is four", "two are four"), ("be five", "is not be"), ("two is five", "five is is")],
    ),
    "binding": ("syntax/semantics", "binding", [("to be five", "to five be"), ("a b c", "c b")]),
    "island": ("syntax", "binding", [("that is two", "that two is"), ("not to", "to not to")]),
}


def write(folder, files=PAIRS):
    for name, (field, phenomenon, pairs) in files.items():
        lines = [
            {"sentence_good": a, "sentence_bad": b, "field": field, "linguistics_term": phenomenon}
            for a, b in pairs
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@torch.no_grad()
def by_hand(model, tokenizer, folder, limit=None):
    """The twenty lines: one sentence after another, in float64."""
    model = model.double().eval()

    def score(sentence):
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(-1, ids[0, 1:, None]).sum().item()

    shares = {}
    for path in folder.glob("*.jsonl"):
        pairs = [json.loads(line) for line in path.read_text().splitlines()][:limit]
        won = [score(pair["sentence_good"]) > score(pair["sentence_bad"]) for pair in pairs]
        shares[path.stem] = sum(won) / len(won)
    return shares


def data(**settings):
    settings = {"tokenizer": TOKENIZER, "validation": rows(), "test": rows()} | settings
    return DocumentData(**settings)


def found_by(callback, stage="validate", module=None, **settings):
    fit = trainer(limit_val_batches=1.0, callbacks=[callback])
    module = module or SFT(student=student())
    (result,) = getattr(fit, stage)(module, datamodule=data(**settings), verbose=False)
    return {name: value for name, value in result.items() if "blimp" in name}


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_accuracies_are_those_of_a_loop(tmp_path, limit, batch_size):
    found = found_by(BLiMP(write(tmp_path), limit=limit, batch_size=batch_size), "test")
    shares = by_hand(student(), TOKENIZER, tmp_path, limit)
    assert found == pytest.approx(
        {
            "test/blimp": sum(shares.values()) / 3,
            "test/blimp_morphology": shares["anaphor"],
            "test/blimp_agreement": shares["anaphor"],
            "test/blimp_syntax_semantics": shares["binding"],
            "test/blimp_binding": (shares["binding"] + shares["island"]) / 2,
            "test/blimp_syntax": shares["island"],
        }
    )


def test_a_bos_of_the_tokenizer_begins_each_sentence(tmp_path):
    """So that the first word is scored: these pairs differ in nothing else."""
    tokenizer = sentence_piece()
    pairs = [("On a", "ce a"), ("a On", "t On"), ("n t", "e t"), ("O a", "t a")]
    write(tmp_path, {"first": (None, None, pairs)})
    for seed in range(3):
        module = SFT(student=student(seed), tokenizer=tokenizer)
        found = found_by(BLiMP(str(tmp_path)), module=module, tokenizer=tokenizer)
        assert found == {"val/blimp": by_hand(student(seed), tokenizer, tmp_path)["first"]}


def test_every_so_often_also_in_a_run_that_goes_on(tmp_path):
    seen = []

    class Counted(BLiMP):
        def evaluate(self, module, *, is_trial):
            seen.append(is_trial)
            return super().evaluate(module, is_trial=is_trial)

    def run(steps, checkpoint=None):
        callback = Counted(write(tmp_path), every_n_validations=3)
        saved = ModelCheckpoint(tmp_path / f"to{steps}", monitor="val/blimp", save_last=True)
        stops = EarlyStopping("val/blimp", mode="max", patience=100)
        fit = trainer(
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=1.0,
            val_check_interval=1,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
            callbacks=[callback, saved, stops],
        )
        fit.fit(SFT(student=student()), datamodule=data(train=rows()), ckpt_path=checkpoint)
        return saved.last_model_path

    last = run(2)
    assert len(seen) == 1
    run(5, last)  # from step 1 on: validations 2 to 5, of which the fourth is the next one
    assert len(seen) == 2


def test_only_in_the_test(tmp_path):
    with pytest.raises(
        ValueError, match=r"BLiMP\.every_n_validations is 0, .* validate has nothing"
    ):
        found_by(BLiMP(write(tmp_path), every_n_validations=0))
    assert "test/blimp" in found_by(BLiMP(str(tmp_path), every_n_validations=0), "test")


def test_a_run_that_only_validates_evaluates_whatever_validations_there_were(tmp_path):
    callback = BLiMP(write(tmp_path), every_n_validations=3)
    module = SFT(student=student())
    settings = {"max_steps": 2, "max_epochs": -1, "val_check_interval": 1, "limit_val_batches": 1.0}
    trainer(callbacks=[callback], **settings).fit(module, datamodule=data(train=rows()))
    assert set(found_by(callback, module=module)) == set(found_by(BLiMP(str(tmp_path)), "validate"))


class OfTheStart(WeightAveraging):
    """Validates the weights of the start, whatever was trained."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return False


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_averaged_weights_are_measured_wherever_their_callback_stands(tmp_path):
    """So that the accuracy is of the weights that val/loss is of."""

    def trained(*callbacks):
        fit = trainer(
            max_steps=2, val_check_interval=1, limit_val_batches=1.0, callbacks=list(callbacks)
        )
        sgd = partial(torch.optim.SGD, lr=10.0)
        module = SFT(student=student(), optimizer=sgd)
        fit.fit(module, datamodule=data(train=rows(), batch_size=2))
        return {n: v.item() for n, v in fit.callback_metrics.items() if n.startswith("val/")}

    callback, averages = BLiMP(write(tmp_path)), OfTheStart()
    live, one, other = trained(callback), trained(callback, averages), trained(averages, callback)
    start = found_by(callback)
    assert {name: one[name] for name in start} == start
    assert other == one
    assert live["val/blimp"] != one["val/blimp"]


def test_scores_that_are_no_numbers_make_no_accuracy(tmp_path):
    """NaN is greater than nothing, and would count as wrong."""
    broken = student()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    found = found_by(
        BLiMP(write(tmp_path)), module=SFT(student=broken, logits_backend=DenseLogits())
    )
    assert len(found) == 6
    assert all(math.isnan(value) for value in found.values())


def test_one_score_that_is_no_number_spoils_the_means_that_it_is_part_of():
    files = [
        MinimalPairs("one", ("a", "b"), ("c", "d"), "syntax", "binding"),
        MinimalPairs("two", ("a", "b"), ("c", "d"), "semantics", "binding"),
    ]
    good = torch.tensor([2.0, 2.0, math.nan, 2.0])
    found = accuracies(files, good, torch.ones(4))
    assert found.pop("blimp_syntax") == 1
    assert set(found) == {"blimp", "blimp_semantics", "blimp_binding"}
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("every", [0, 1])
def test_a_fit_without_validation_is_refused_unless_it_is_for_the_test(tmp_path, every):
    fit = trainer(max_steps=1, callbacks=[BLiMP(write(tmp_path), every_n_validations=every)])
    if every:
        with pytest.raises(
            ValueError, match="BLiMP evaluates in validations, and this fit has none"
        ):
            fit.fit(SFT(student=student()), datamodule=data(train=rows(), validation=None))
    else:
        fit.fit(SFT(student=student()), datamodule=data(train=rows(), validation=None))
    assert fit.global_step == 1 - every


@pytest.mark.parametrize("watching", [EarlyStopping, ModelCheckpoint])
def test_what_watches_an_accuracy_that_is_left_to_the_test_is_refused(tmp_path, watching):
    fit = trainer(
        max_steps=1,
        limit_val_batches=1.0,
        enable_checkpointing=True,
        callbacks=[
            BLiMP(write(tmp_path), every_n_validations=0),
            watching(monitor="val/blimp_syntax"),
        ],
    )
    with pytest.raises(
        ValueError, match=f"every_n_validations is 0.*{watching.__name__} monitors val/blimp_syntax"
    ):
        fit.fit(SFT(student=student()), datamodule=data(train=rows()))
    assert fit.global_step == 0


def test_training_is_the_same_with_and_without(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = SFT(student=student())
        settings = {"max_steps": 3, "limit_val_batches": 1.0, "val_check_interval": 1}
        fit = trainer(callbacks=list(callbacks), num_sanity_val_steps=2, **settings)
        fit.fit(module, datamodule=data(train=rows(), batch_size=2))
        return [*module.student.state_dict().values(), torch.get_rng_state()]

    pairs = zip(weights(), weights(BLiMP(write(tmp_path))), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there are no .jsonl files of minimal pairs"),
        ("", "has no minimal pairs"),
        ("{", "line 1, is no JSON"),
        ('{"sentence_good": "a"}', "line 1: a minimal pair is an object"),
        ('{"sentence_good": "a", "sentence_bad": "a"}', "no pair of two different sentences"),
    ],
)
def test_what_are_no_pairs_is_refused_before_anything_runs(tmp_path, text, message):
    if text is not None:
        (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        found_by(BLiMP(str(tmp_path)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pair_of_equal_sentences_is_a_tie(tmp_path, batch_size):
    """BLiMP has seven, in passive_1 and principle_A_case_2."""
    equal = [(text, text) for text in ("a b c", "two is four", "to be five", "b c", "is not be")]
    write(tmp_path, {"equal": (None, None, [*equal, ("that is two", "that two is")])})
    found = found_by(BLiMP(str(tmp_path), batch_size=batch_size))
    by_loop = by_hand(student(), TOKENIZER, tmp_path)["equal"]
    assert by_loop < 0.2
    assert found == {"val/blimp": pytest.approx(by_loop)}


@pytest.mark.parametrize("option", [{"limit": 0}, {"every_n_validations": -1}, {"batch_size": 0}])
def test_values_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        BLiMP("blimp", **option)


def test_a_sentence_of_one_token_is_refused_where_no_bos_comes_before_it(tmp_path):
    write(tmp_path, {"short": (None, None, [("a b", "a c"), ("two is", "two"), ("be", "is be")])})
    assert len(TOKENIZER("be")["input_ids"]) == 1
    fit = trainer(max_steps=1, limit_val_batches=1.0, callbacks=[BLiMP(str(tmp_path))])
    with pytest.raises(ValueError, match="is one token, of which nothing is scored"):
        fit.fit(SFT(student=student()), datamodule=data(train=rows()))
    assert fit.global_step == 0


@pytest.mark.parametrize("sign", ["\u2028", "\u0085"])
def test_a_line_ends_with_a_line_feed_alone(tmp_path, sign):
    good, bad = f"two {sign} four", "two are four"
    line = json.dumps({"sentence_good": good, "sentence_bad": bad}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    assert read_minimal_pairs(tmp_path)[0].good == (good, good)


@pytest.mark.parametrize("name", [3, ["syntax"], "", " "])
@pytest.mark.parametrize("key", ["field", "linguistics_term"])
def test_a_group_without_a_name_is_refused(tmp_path, key, name):
    line = json.dumps({"sentence_good": "a", "sentence_bad": "b", key: name})
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: {key} is .*the name of a group"):
        read_minimal_pairs(tmp_path)


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"sentence_good": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl is not written in UTF-8"):
        read_minimal_pairs(tmp_path)
