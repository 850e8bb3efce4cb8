"""Training from a cache is training from its teacher, bit for bit."""

import json
import os
import signal

import pytest
import torch

from lightning_kd.cache import CacheWriter, read_manifest
from lightning_kd.cache_writing import CacheOptions, write_cache
from lightning_kd.callbacks import OnPolicyGeneration, SaveOnTermination
from lightning_kd.data import PromptCompletionData
from lightning_kd.fused import TopK
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.modules import GKD, BabyLlama, OnPolicyDistillation, SupervisedKD
from lightning_kd.resuming import differences
from lightning_kd.teachers import (
    CachedTeacher,
    LocalTeacher,
    RoutedTeacher,
    TeacherEnsemble,
    TeacherUnavailableError,
)
from tests.support.caches import ensemble, fitted, method, written
from tests.support.harness import Letters, trainer
from tests.support.toys import letter_tokenizer, tiny_llama

METHODS = {
    "SupervisedKD": (SupervisedKD, {"temperature": 2.0}),
    "GKD": (GKD, {"teacher_temperature": 0.5}),
    "BabyLlama": (BabyLlama, {}),
    "BabyLlama on the official scale": (BabyLlama, {"kl_scale": "batchmean"}),
}


def data(**options):
    return Letters(100, batch_size=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_fifty_steps_from_hidden_states_equal_those_from_the_teacher_bit_for_bit(name, tmp_path):
    kind, options = METHODS[name]

    def teacher():
        return ensemble() if kind is BabyLlama else LocalTeacher.of(tiny_llama(2))

    steps = {"max_steps": 50, "limit_val_batches": 2}
    losses, weights = fitted(method(teacher(), kind, **options), data(), **steps)
    cache = CachedTeacher(
        str(written(tmp_path / "cache", method(teacher(), kind, **options), data()))
    )
    cached_losses, cached = fitted(method(cache, kind, **options), data(), **steps)
    assert len(losses) == 50
    assert cached_losses == losses
    assert all(map(torch.equal, cached, weights))


def test_a_cache_is_of_what_the_teacher_reads(tmp_path):
    """Which is another prompt than the student's, where the data tells it more."""
    told = Letters(20, batch_size=2, told=True)
    expected, _ = fitted(method(LocalTeacher.of(tiny_llama(2))), told, max_steps=4)
    cache = CachedTeacher(str(written(tmp_path / "told", data=told)))
    found, _ = fitted(method(cache), Letters(20, batch_size=2, told=True), max_steps=4)
    assert found == expected
    with pytest.raises(ValueError, match="not in the cache"):
        fitted(method(cache), Letters(20, batch_size=2), max_steps=4)


@pytest.mark.slow
def test_members_of_an_ensemble_and_a_route_may_be_caches(tmp_path):
    def mixed(teacher):
        return TeacherEnsemble([LocalTeacher.of(tiny_llama(2)), teacher], combine="probabilities")

    local = LocalTeacher.of(tiny_llama(3))
    cache = CachedTeacher(str(written(tmp_path / "cache", method(local), data())))
    expected, _ = fitted(method(mixed(LocalTeacher.of(tiny_llama(3)))), data(), max_steps=3)
    assert fitted(method(mixed(cache)), data(), max_steps=3)[0] == expected
    assert not mixed(cache).answers_any_text
    assert not RoutedTeacher({"a": cache}).answers_any_text
    assert mixed(local).answers_any_text


def test_a_method_that_learns_from_own_samples_is_refused(tmp_path):
    cache = CachedTeacher(str(written(tmp_path / "cache")))
    module = method(cache, OnPolicyDistillation)
    with pytest.raises(ValueError, match=r"OnPolicyDistillation asks.*LocalTeacher.*SupervisedKD"):
        trainer(callbacks=[OnPolicyGeneration()]).fit(module, datamodule=Letters(40, batch_size=2))


def test_gkd_is_refused_where_the_student_generates_and_only_there(tmp_path):
    cache = str(written(tmp_path / "cache"))
    rows = {"datamodule": Letters(40, batch_size=2)}
    never = trainer(callbacks=[OnPolicyGeneration(lmbda=0.0)], max_steps=1)
    never.fit(method(CachedTeacher(cache), GKD), **rows)
    sometimes = trainer(callbacks=[OnPolicyGeneration(lmbda=0.01)], max_steps=1)
    with pytest.raises(ValueError, match=r"GKD asks.*on_policy: null"):
        sometimes.fit(method(CachedTeacher(cache), GKD), **rows)


@pytest.mark.slow
def test_a_cache_serves_other_batches_orders_and_epochs(tmp_path):
    cache = CachedTeacher(str(written(tmp_path / "cache")))
    losses, _ = fitted(method(cache), Letters(40, batch_size=8), max_epochs=2)
    expected, _ = fitted(
        method(LocalTeacher.of(tiny_llama(2))), Letters(40, batch_size=8), max_epochs=2
    )
    assert losses == pytest.approx(expected, rel=1e-5)


TOP_K = {
    "SupervisedKD": (SupervisedKD, {"temperature": 2.0}),
    "GKD": (GKD, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOP_K)
def test_k_tokens_of_the_whole_vocabulary_are_the_full_distribution(name, tmp_path):
    kind, options = TOP_K[name]
    teacher = LocalTeacher.of(tiny_llama(2).double())
    kept = {"kind": "top_k", "k": 18, "temperatures": [2.0]}
    cache = written(tmp_path / "cache", method(teacher, kind, **options), data(), **kept)
    expected, _ = fitted(method(teacher, kind, **options), data(), max_steps=4)
    losses, _ = fitted(method(CachedTeacher(str(cache)), kind, **options), data(), max_steps=4)
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_run_from_few_tokens_is_that_of_a_teacher_that_answers_as_many(tmp_path):
    class Few(LocalTeacher):
        answers = frozenset({"top_k"})
        temperatures = frozenset({1.0, 2.0})

        def answer(self, batch, positions, *, kind, logits_backend):
            whole = super().answer(batch, positions, logits_backend=logits_backend)
            top = top_k_of(whole, positions.targets, 4, temperatures=[1.0, 2.0])
            return TopK(top.token_ids, top.log_probs, top.tail_log_probs)

    given = {"temperature": 2.0}
    local = LocalTeacher.of(tiny_llama(2))
    kept = {"kind": "top_k", "k": 4, "temperatures": [2.0]}
    cache = CachedTeacher(str(written(tmp_path / "cache", method(local), data(), **kept)))
    assert cache.answers == {"top_k", "top_k_and_token"}
    assert cache.temperatures == {1.0, 2.0}
    few, weights = fitted(method(Few.of(tiny_llama(2)), **given), data(), max_steps=4)
    losses, cached = fitted(method(cache, **given), data(), max_steps=4)
    assert losses == few
    assert all(map(torch.equal, cached, weights))
    undeclared = method(cache, temperature=3.0)
    with pytest.raises(ValueError, match=r"holds at temperature 1, 2 alone"):
        fitted(undeclared, data(), max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 4])
def test_drawn_tokens_stand_in_for_the_forward_kl(k, tmp_path):
    local = LocalTeacher.of(tiny_llama(2))
    options = {"divergence": "forward_kl", "alpha": 0.0}
    kept = {"kind": "sampled", "draws": 400, "k": k}
    place = str(written(tmp_path / "cache", method(local, **options), data(), **kept))
    expected, _ = fitted(method(local, **options), data(), max_steps=20)
    losses, _ = fitted(method(CachedTeacher(place), **options), data(), max_steps=20)
    assert sum(losses) == pytest.approx(sum(expected), rel=0.1)
    again = written(tmp_path / "again", method(local, **options), data(), **kept)
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()
    reverse = method(CachedTeacher(place), divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"answers sampled: .*forward_kl"):
        fitted(reverse, data(), max_steps=1)


# Teachers that read more of a row than its tokens.


def routed_data(path, teachers, columns=("teacher",)):
    """Texts of which each comes once for each of two teachers."""
    rows = [
        {"prompt": prompt, "completion": "cdb", "teacher": teacher}
        for prompt, teacher in zip("aabbcc", teachers, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = letter_tokenizer()
    return PromptCompletionData(
        train=str(path), tokenizer=tokenizer, batch_size=3, extra_columns=list(columns)
    )


def routed():
    return RoutedTeacher({name: LocalTeacher.of(tiny_llama(n)) for n, name in ((2, "a"), (3, "b"))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "exact"),
    [({"kind": "top_k", "k": 18}, 1e-5), ({"kind": "sampled", "draws": 20_000}, 0.05)],
    ids=["top_k", "sampled"],
)
def test_one_text_for_two_teachers_is_two_rows(kept, exact, tmp_path):
    options = {"divergence": "forward_kl", "alpha": 0.0}
    data = routed_data(tmp_path / "rows.jsonl", "ababab")
    cache = written(tmp_path / "cache", method(routed(), **options), data, splits=["train"], **kept)
    cached = CachedTeacher(str(cache))
    assert cached.columns == {"teacher"}
    for teachers in ("ababab", "bababa"):
        data = routed_data(tmp_path / "again.jsonl", teachers)
        expected, _ = fitted(method(routed(), **options), data, max_steps=3)
        losses, _ = fitted(method(CachedTeacher(str(cache)), **options), data, max_steps=3)
        assert losses == pytest.approx(expected, rel=exact)


def test_another_teacher_of_a_known_text_is_another_row(tmp_path):
    kept = {"kind": "top_k", "k": 4, "splits": ["train"]}
    data = routed_data(tmp_path / "rows.jsonl", "aabbaa")
    cache = str(written(tmp_path / "cache", method(routed()), data, **kept))
    other = routed_data(tmp_path / "other.jsonl", "aaabaa")
    with pytest.raises(ValueError, match=r"row 2 .* not in the cache .* its teacher was another"):
        fitted(method(CachedTeacher(cache)), other, max_steps=1)
    without = routed_data(tmp_path / "other.jsonl", "aabbaa", columns=[])
    with pytest.raises(ValueError, match=r"no column 'teacher'.*data.extra_columns"):
        fitted(method(CachedTeacher(cache)), without, max_steps=1)


class ReadsColumns(LocalTeacher):
    """A teacher that does not say which column it reads."""

    def answer(self, batch, positions, **options):
        assert len(batch["extra"]["teacher"]) == len(batch["input_ids"])
        return super().answer(batch, positions, **options)


def test_a_teacher_that_does_not_say_which_column_it_reads_is_refused(tmp_path):
    data = routed_data(tmp_path / "rows.jsonl", "ababab")
    module = method(ReadsColumns.of(tiny_llama(2)))
    with pytest.raises(ValueError, match=r"ReadsColumns reads the column 'teacher' and does not"):
        written(tmp_path / "cache", module, data, splits=["train"])
    ReadsColumns.columns = frozenset({"teacher"})
    written(tmp_path / "cache", module, data, splits=["train"])


# What is kept of several models.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the teacher gives .* to tokens beyond")
@pytest.mark.parametrize(
    ("kept", "exact"),
    [
        ({"kind": "hidden"}, 1e-5),
        ({"kind": "top_k", "k": 18}, 1e-5),
        ({"kind": "sampled", "draws": 20_000}, 0.05),
    ],
    ids=["hidden", "top_k", "sampled"],
)
def test_of_unequal_vocabularies_the_tokens_that_all_members_have_are_told(kept, exact, tmp_path):
    def both():
        members = [
            LocalTeacher.of(tiny_llama(n, vocab_size=width)) for n, width in ((2, 18), (3, 25))
        ]
        return TeacherEnsemble(members, combine="probabilities")

    options = {"divergence": "forward_kl", "alpha": 0.0, "vocabulary": "shared"}
    module = method(both(), **options)
    cache = CachedTeacher(str(written(tmp_path / "cache", module, data(), **kept)))
    expected, _ = fitted(method(both(), **options), data(), max_steps=3)
    losses, _ = fitted(method(cache, **options), data(), max_steps=3)
    assert losses == pytest.approx(expected, rel=exact)


# What ends the writing, and what has changed when it goes on.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_writing_and_the_same_call_goes_on(number, tmp_path, monkeypatch):
    write, before = CacheWriter.write, signal.getsignal(number)

    def interrupted(self, shard, rows):
        write(self, shard, rows)
        if shard == 2:
            os.kill(os.getpid(), number)

    place = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", interrupted)
        with pytest.raises(SystemExit) as ended:
            written(place)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert len(list(place.glob("shard-*"))) == 3
    whole = written(tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in written(place).iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_a_run_of_another_precision_is_told_so(tmp_path):
    cache = CachedTeacher(str(written(tmp_path / "cache")))
    both = TeacherEnsemble([LocalTeacher.of(tiny_llama(2)), cache], combine="probabilities")
    said = r"cache was written with trainer.precision 32-true, and this run has bf16-mixed"
    for teacher in (cache, both):
        with pytest.warns(UserWarning, match=said):
            fitted(method(teacher), Letters(40, batch_size=2), max_steps=1, precision="bf16-mixed")


def test_splits_that_the_data_has_not_are_named(tmp_path):
    class Nothing(Letters):
        def has(self, split):
            return False

    with pytest.raises(ValueError, match=r"cache.splits is \['train'\], and the data has none"):
        written(tmp_path / "cache", data=Nothing(4, batch_size=2), splits=["train"])


def test_writing_goes_on_in_the_same_precision_alone(tmp_path):
    cache = written(tmp_path / "cache")
    (cache / "shard-00001.safetensors").unlink()
    options = CacheOptions(str(cache), shard_megabytes=1e-3)
    module, rows = method(LocalTeacher.of(tiny_llama(2))), Letters(40, batch_size=2)
    with pytest.raises(ValueError, match=r"something else: .*precision: 32-true -> bf16-mixed"):
        write_cache(trainer(precision="bf16-mixed"), module, rows, options)


def test_a_run_goes_on_with_a_cache_of_the_same_precision_alone(tmp_path):
    places = {name: tmp_path / name for name in ("32-true", "64-true")}
    module = method(LocalTeacher.of(tiny_llama(2).double()))
    for precision, place in places.items():
        options = CacheOptions(str(place))
        write_cache(trainer(precision=precision), module, Letters(40, batch_size=2), options)
    before, after = (CachedTeacher(str(place)).resume_settings() for place in places.values())
    assert list(differences(before, after)) == ["cache.precision: 32-true -> 64-true"]


def test_rows_that_have_changed_since_are_not_left_out(tmp_path):
    class Others(Letters):
        def example(self, row, pass_):
            return super().example(row + 100 if row % 2 else row, pass_)

    Others.__qualname__ = "Letters"  # nothing but the rows is another
    cache = written(tmp_path / "cache")
    (cache / "shard-00009.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.safetensors has other rows than the data"):
        written(cache, data=Others(40, batch_size=2))


@pytest.mark.slow
def test_an_ensemble_may_have_one_model_twice(tmp_path):
    one, other = LocalTeacher.of(tiny_llama(2)), LocalTeacher.of(tiny_llama(3))
    thrice = TeacherEnsemble([one, other, one])
    cache = written(tmp_path / "cache", method(thrice), data())
    expected, _ = fitted(method(thrice), data(), max_steps=3)
    assert fitted(method(CachedTeacher(str(cache))), data(), max_steps=3)[0] == expected


def test_a_damaged_row_ends_the_run_with_a_checkpoint_of_the_step_before(tmp_path):
    cache = written(tmp_path / "cache")
    number = max(n for n, shard in enumerate(read_manifest(cache).shards) if shard.rows)
    last = cache / f"shard-{number:05d}.safetensors"
    content = bytearray(last.read_bytes())
    header = int.from_bytes(content[:8], "little")
    (planes,) = (v for k, v in json.loads(content[8 : 8 + header]).items() if "states" in k)
    content[8 + header + planes["data_offsets"][1] - 1] ^= 1
    last.write_bytes(content)
    run = trainer(max_steps=20, callbacks=[SaveOnTermination(str(tmp_path))])
    with pytest.raises(TeacherUnavailableError, match=last.name) as error:
        run.fit(method(CachedTeacher(str(cache))), datamodule=Letters(40, batch_size=2))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == run.global_step > 1
    assert "optimizer steps are saved" in error.value.__notes__[0]
