"""What is sampled from student and teacher, against the enumeration of all texts of two tables."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from scipy.special import rel_entr
from transformers import GenerationConfig

from lightning_kd import SFT, DenseLogits, Engine, SupervisedKD, TeacherEnsemble, TopKTeacher
from lightning_kd.batch import FILLER_ROW
from lightning_kd.callbacks import ExposureBias, OwnCompletions
from lightning_kd.callbacks.evaluations import EvaluationCallback
from lightning_kd.generation import Completions
from lightning_kd.models import StudentSpec
from tests.support.harness import BatchList, Letters, trainer
from tests.support.tabular import (
    EOS,
    PROMPT,
    Table,
    all_completions,
    log_probs,
    next_log_probs,
)
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

ROWS, LONGEST = 6000, 3
STUDENT, TEACHER = 0, 1


class Proportional(Engine):
    """Completes row i of N with the text at the quantile (i + 1/2) / N of the model's own distribution.

    So means over many rows are expectations, but for an error of the order of 1 / N.
    """

    def generate(self, prompts, options, *, seeds, models):
        ((model, _),) = models
        texts = all_completions(options.max_new_tokens)
        with torch.no_grad():
            shares = torch.stack([log_probs(model, text).sum().exp() for text in texts])
        quantiles = (torch.arange(len(prompts.ids), dtype=torch.float64) + 0.5) / len(prompts.ids)
        places = torch.searchsorted(shares.cumsum(0), quantiles).clamp(max=len(texts) - 1)
        return Completions.of_tokens(
            [texts[place] for place in places], eos_ids=prompts.eos_ids, pad_id=prompts.pad_id
        )


def prompts(rows):
    ids = torch.full((rows, 1), PROMPT)
    completed = torch.tensor([[PROMPT, 3, 0]]).expand(rows, 3).contiguous()
    return {
        "input_ids": completed,
        "attention_mask": torch.ones_like(completed),
        "labels": torch.tensor([[-100, 3, 0]]).expand(rows, 3).contiguous(),
        "row": torch.arange(rows),
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "prompt": ["a"] * rows,
        "completion": ["b"] * rows,
    }


class Writing(Table):
    """A table that an engine may be asked for."""

    generation_config = GenerationConfig()


def tables(student=STUDENT, teacher=TEACHER):
    return SupervisedKD(
        student=StudentSpec.of(Writing(student)),
        teacher=Writing(teacher),
        engine=Proportional(),
        logits_backend=DenseLogits(),
    )


def evaluated(callback, module=None, batches=None, stage="validate"):
    fit = trainer(limit_val_batches=1.0, callbacks=[callback])
    data = BatchList([], evaluate=batches or [prompts(ROWS)])
    (found,) = getattr(fit, stage)(module or tables(), datamodule=data, verbose=False)
    return {name.partition("/")[2]: value for name, value in found.items()}


def prefixes(writer):
    """Every text that has not ended yet and can go on, with its probability under a table."""
    table = Table(writer)
    for text in [(), *{t[:n] for t in all_completions(LONGEST) for n in range(1, LONGEST)}]:
        if EOS not in text:
            yield text, log_probs(table, text).sum().exp().item() if text else 1.0


def expected(writer, of_prefix, pair=(STUDENT, TEACHER)):
    """Sum of a quantity over the positions of a text, for each number of tokens before it."""
    sums = [0.0] * LONGEST
    with torch.no_grad():
        for text, share in prefixes(writer):
            own, other = (next_log_probs(Table(n), text) for n in pair)
            sums[len(text)] += share * of_prefix(own, other).item()
    return sums


def forward_kl(q, p):
    return (p.exp() * (p - q)).sum()


def mean_of_each_position(writer, pair):
    """The expected error of a token that there is: of texts that have not ended before it."""
    reached = expected(writer, lambda q, p: q.exp().sum(), pair)
    errors = expected(writer, forward_kl, pair)
    return [error / share for error, share in zip(errors, reached, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(0, 3), (2, 0)])
def test_exposure_bias_is_that_of_all_texts(pair):
    callback = ExposureBias(lengths=[1, 2], max_new_tokens=LONGEST, prompts=ROWS)
    found = evaluated(callback, tables(*pair))
    of_student, of_teacher = (mean_of_each_position(writer, pair) for writer in pair)
    for length, name in ((1, "_1"), (2, "_2"), (3, "")):
        r, epsilon = sum(of_student[:length]), sum(of_teacher[:length])
        wanted = (r - epsilon) / epsilon * 100
        assert found[f"exposure_bias{name}"] == pytest.approx(wanted, abs=0.3)
    assert found["exposure_bias_r"] == pytest.approx(sum(of_student), rel=2e-3)
    assert found["exposure_bias_epsilon_sum"] == pytest.approx(sum(of_teacher), rel=2e-3)
    assert found["exposure_bias_1"] == pytest.approx(0, abs=1e-9)  # no token is written before it
    assert abs(found["exposure_bias"]) > 5


def test_the_teacher_reads_what_the_student_writes():
    callback = OwnCompletions(LONGEST, prompts=ROWS, gamma=3, cost_ratio=0.25, overlap_k=1)
    found = evaluated(callback, stage="test")
    tokens = sum(expected(STUDENT, lambda q, p: q.exp().sum()))

    def mean(of_prefix):
        return pytest.approx(sum(expected(STUDENT, of_prefix)) / tokens, abs=1e-3)

    assert found["own_teacher_nats_per_token"] == mean(lambda q, p: -(q.exp() * p).sum())
    assert found["own_reverse_kl"] == mean(lambda q, p: (q.exp() * (q - p)).sum())
    assert found["own_acceptance"] == mean(lambda q, p: torch.minimum(q.exp(), p.exp()).sum())
    same = mean(lambda q, p: (q.argmax() == p.argmax()).double())
    assert found["own_top_k_overlap"] == same
    pairs = [[next_log_probs(Table(n), text).detach().exp() for n in (0, 1)] for text in ((), (3,))]
    acceptance = sum(torch.minimum(*pair).sum().item() for pair in pairs) / 2
    assert found["acceptance"] == pytest.approx(acceptance, rel=1e-6)
    # Leviathan et al., by the distribution of the number of drafted tokens that are kept.
    kept = [acceptance**k * (1 - acceptance) for k in range(3)] + [acceptance**3]
    calls = sum(share * (k + 1) for k, share in enumerate(kept))
    assert found["tokens_per_teacher_call"] == pytest.approx(calls, rel=1e-6)
    assert found["speculative_speed_up"] == pytest.approx(calls / 1.75, rel=1e-6)


def test_a_student_that_is_its_teacher_is_always_accepted_and_has_no_bias():
    found = evaluated(OwnCompletions(LONGEST, prompts=20, gamma=5), tables(0, 0))
    assert found["own_acceptance"] == pytest.approx(1)
    assert found["tokens_per_teacher_call"] == pytest.approx(6)
    assert found["own_reverse_kl"] == pytest.approx(0, abs=1e-9)
    assert "speculative_speed_up" not in found


def llamas(**settings):
    return SupervisedKD(student=tiny_llama(0), teacher=tiny_llama(1), **settings)


LLAMA_BATCHES = [
    with_prompts(ragged_batch([(3, 2), (2, 4), (4, 1)])),
    with_prompts(ragged_batch([(2, 2), (1, 3)])) | {"row": torch.tensor([3, 4])},
]


WRITTEN = [[4, 9, 1], [3], [12, 12, 5, 7]]


class Given(Engine):
    """Writes what it is told."""

    def generate(self, prompts, options, *, seeds, models):
        return Completions.of_tokens(WRITTEN, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id)


def by_transformers(prompt, text):
    """Both distributions at each token of a text, by models in float64 on this row alone."""
    ids = torch.tensor([[*prompt, *text]])
    for seed in (STUDENT, TEACHER):
        with torch.no_grad():
            scores = tiny_llama(seed).double().eval()(ids).logits[0, len(prompt) - 1 : -1]
        yield scores.softmax(-1).numpy()


def test_what_the_student_writes_is_read_as_transformers_reads_it():
    batch, k = LLAMA_BATCHES[0], 5
    own, data = [], []
    for row, text in enumerate(WRITTEN):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        scored = batch["labels"][row]
        for texts, into in ((text, own), (scored[scored != -100].tolist(), data)):
            into += zip(*by_transformers(prompt, texts), texts, strict=True)
    nats, divergence, shared = [], [], []
    for q, p, token in own:
        nats.append(-np.log(p[token]))
        divergence.append(rel_entr(q, p).sum())
        both = sorted(set(np.argsort(q)[-k:]) & set(np.argsort(p)[-k:]))
        shared.append((len(both) / k, q[both].sum(), p[both].sum()))
    kept, of_data = ([np.minimum(q, p).sum() for q, p, _ in rows] for rows in (own, data))
    assert len(own) == 8
    assert len(data) == 7
    overlap, of_student, of_teacher = np.mean(shared, 0)
    found = evaluated(OwnCompletions(4, overlap_k=k), llamas(engine=Given()), [batch])
    wanted = {
        "own_teacher_nats_per_token": np.mean(nats),
        "own_reverse_kl": np.mean(divergence),
        "own_acceptance": np.mean(kept),
        "acceptance": np.mean(of_data),
        "own_top_k_overlap": overlap,
        "own_student_overlap_mass": of_student,
        "own_teacher_overlap_mass": of_teacher,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


class Ends(Engine):
    """Writes texts of given lengths, by student (whose weights train) or teacher."""

    def __init__(self, of_student, of_teacher):
        self.texts = {True: of_student, False: of_teacher}

    def generate(self, prompts, options, *, seeds, models):
        ((model, _),) = models
        texts = self.texts[next(model.parameters()).requires_grad]
        return Completions.of_tokens(texts, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id)


LONG = [[4, 9, 7, 5], [3, 3, 8, 6], [12, 12, 5, 7]]
SHORT = [[4, 1], [3, 9, 1], [1]]


@pytest.mark.parametrize(
    ("of_student", "of_teacher"), [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT), (LONG, WRITTEN)]
)
def test_behind_the_end_of_a_text_there_is_no_error_of_0(of_student, of_teacher):
    """Each position is a mean over the texts that reach it, as far as both sides have one."""
    batch, means = LLAMA_BATCHES[0], []
    for texts in (of_student, of_teacher):
        at = [[] for _ in range(4)]
        for row, text in enumerate(texts):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            for place, (q, p) in enumerate(zip(*by_transformers(prompt, text), strict=True)):
                at[place].append(rel_entr(p, q).sum())
        means.append(at)
    common = [place for place in range(4) if means[0][place] and means[1][place]]
    r, epsilon = (sum(np.mean(at[place]) for place in common) for at in means)
    module = llamas(engine=Ends(of_student, of_teacher))
    found = evaluated(ExposureBias([1], 4, prompts=3), module, [batch])
    assert found["exposure_bias_r"] == pytest.approx(r, rel=1e-4)
    assert found["exposure_bias_epsilon_sum"] == pytest.approx(epsilon, rel=1e-4)
    assert found["exposure_bias"] == pytest.approx((r - epsilon) / epsilon * 100, abs=1e-2)
    assert found["exposure_bias_1"] == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_batches_or_filler():
    """Each row is seeded by its number, and rows beyond the prompts do not count."""
    rows = with_prompts(ragged_batch([(3, 2), (2, 4), (4, 1)]))
    single = [
        {name: value[place : place + 1] for name, value in rows.items()} for place in range(3)
    ]
    filler = rows | {"row": torch.tensor([0, 1, FILLER_ROW])}
    callback = ExposureBias(max_new_tokens=4, prompts=2, samples_per_prompt=2)
    names = ("exposure_bias", "own_reverse_kl", "acceptance", "own_teacher_nats_per_token")
    found = [
        {name: evaluated(callback, llamas(), batches)[name] for name in names}
        for batches in ([rows], single, [filler])
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_training_is_the_same_with_and_without_and_it_can_be_watched(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = llamas()
        fit = trainer(
            max_steps=3,
            limit_val_batches=1.0,
            val_check_interval=1,
            num_sanity_val_steps=1,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
        )
        fit.fit(module, datamodule=Both(batch_size=4))
        return [*module.student.state_dict().values(), torch.get_rng_state()]

    best = ModelCheckpoint(tmp_path / "best", monitor="val/exposure_bias")
    watched = [EarlyStopping("val/own_acceptance", mode="max", patience=9), best]
    pairs = zip(
        weights(), weights(ExposureBias(max_new_tokens=3, prompts=3), *watched), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)
    assert math.isfinite(best.best_model_score)


class Two(EvaluationCallback):
    """Logs a number of its own."""

    def names(self):
        return ("acceptance",)


class Both(Letters):
    """Letters to train on and to evaluate."""


def test_the_curve_is_a_table(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit = trainer(limit_val_batches=1.0, callbacks=[ExposureBias(max_new_tokens=3)], logger=logger)
    data = BatchList([], evaluate=LLAMA_BATCHES)
    (found,) = fit.validate(llamas(), datamodule=data, verbose=False)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("val/exposure_bias_curve/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + 3
    assert lines[0].startswith("| tokens |")
    length, own, theirs, excess = map(float, lines[-1].strip("| ").split("|"))
    assert (length, excess) == (3, pytest.approx(found["val/exposure_bias"], rel=1e-3))
    assert excess == pytest.approx((own / theirs - 1) * 100, abs=0.1)


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (OwnCompletions(4), lambda: SFT(student=tiny_llama(0)), "SFT has none"),
        (
            OwnCompletions(4),
            lambda: SupervisedKD(student=tiny_llama(0), teacher=TopKTeacher(tiny_llama(1), k=3)),
            "OwnCompletions needs a teacher that answers full_distribution; TopKTeacher",
        ),
        (
            ExposureBias(max_new_tokens=4),
            lambda: SupervisedKD(
                student=tiny_llama(0), teacher=TeacherEnsemble([tiny_llama(1), tiny_llama(2)])
            ),
            "ExposureBias needs a teacher that lists 'generation' in answers, got TeacherEnsemble",
        ),
        (OwnCompletions(400), lambda: llamas(), "max_new_tokens of OwnCompletions"),
        (
            OwnCompletions(4, overlap_k=40),
            lambda: llamas(),
            "overlap_k is 40, and there are 18 tokens",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_step(callback, module, message):
    fit = trainer(max_steps=1, limit_val_batches=1.0, num_sanity_val_steps=1, callbacks=[callback])
    with pytest.raises(ValueError, match=message):
        fit.fit(module(), datamodule=Both(batch_size=4))
    assert fit.global_step == 0


@pytest.mark.parametrize("callback", [OwnCompletions, ExposureBias])
def test_a_fit_without_validation_is_refused(callback):
    fit = trainer(max_steps=1, callbacks=[callback(max_new_tokens=4)])
    with pytest.raises(
        ValueError, match=f"{callback.__name__} evaluates in validations, and this fit has none"
    ):
        fit.fit(llamas(), datamodule=Both(batch_size=4))
    assert fit.global_step == 0


@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        ([ExposureBias(max_new_tokens=4), ExposureBias(max_new_tokens=3)], "own_teacher_nats"),
        ([ExposureBias(max_new_tokens=4), OwnCompletions(4)], "own_teacher_nats_per_token"),
        ([Two(), OwnCompletions(4)], "acceptance"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_two_that_log_one_name_are_refused_before_the_first_step(callbacks, name, stage):
    fit = trainer(max_steps=1, limit_val_batches=1.0, callbacks=callbacks)
    prefix = "test" if stage == "test" else "val"
    one, other = (type(callback).__name__ for callback in callbacks)
    with pytest.raises(ValueError, match=f"{one} and {other} would both log {prefix}/{name}"):
        getattr(fit, stage)(llamas(), datamodule=Both(batch_size=4))
    assert fit.global_step == 0


def test_data_without_prompts_is_refused():
    with pytest.raises(ValueError, match="completes prompts, and the data has none"):
        evaluated(OwnCompletions(4), llamas(), [ragged_batch([(0, 4), (0, 3)])])


@pytest.mark.parametrize(
    "option",
    [
        {"prompts": 0},
        {"samples_per_prompt": 0},
        {"gamma": 0},
        {"cost_ratio": -1.0},
        {"overlap_k": 0},
    ],
)
def test_values_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        OwnCompletions(**option)


@pytest.mark.parametrize("lengths", [[0], [5]])
def test_lengths_beyond_the_completions_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths has"):
        ExposureBias(lengths=lengths, max_new_tokens=4)
