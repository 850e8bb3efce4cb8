"""Teachers of third parties: k tokens and a tail from memory, and single tokens' probabilities."""

import json
import math

import numpy as np
import pytest
import torch

from lightning_kd.callbacks import JsonlPredictions, OnPolicyGeneration
from lightning_kd.divergences import Divergence, available_divergences, make_divergence
from lightning_kd.fused import FullDistribution, MaterializedLogits, TokenLogProbs, TopK
from lightning_kd.generation import Completions, GenerationOptions, SamplingOptions
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import (
    GKD,
    MiniLLM,
    OnPolicyDistillation,
    RLDistillation,
    SequenceKD,
    SupervisedKD,
)
from lightning_kd.rewards import exact_match
from lightning_kd.teachers import LocalTeacher, Teacher
from tests.support.harness import BatchList, Letters, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 7)]))
V = 18


@torch.no_grad()
def distribution(network, batch):
    """The network's log-probabilities at the labels, ``(N, V)``, float64."""
    logits = network(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].double()
    return logits[batch["labels"][:, 1:] != -100].log_softmax(-1)


class Remembers(Teacher):
    """Has k tokens for each row and place in a dictionary."""

    answers = frozenset({"top_k"})
    vocabulary_size = V

    def __init__(self, known):
        self.known = known

    @classmethod
    def of(cls, network, batch, k):
        with torch.no_grad():
            logits = network(batch["input_ids"], batch["attention_mask"]).logits
        best = logits.log_softmax(-1).topk(k)
        return cls(
            {
                (row, place): (best.indices[number, place], best.values[number, place])
                for number, row in enumerate(batch["row"].tolist())
                for place in range(batch["input_ids"].shape[1])
            }
        )

    def answer(self, batch, positions, *, kind, logits_backend):
        places = positions.mask.nonzero().tolist()
        found = [self.known[batch["row"][number].item(), place] for number, place in places]
        ids, log_probs = (torch.stack(column) for column in zip(*found, strict=True))
        return TopK(ids, log_probs)


class TellsOneToken(Teacher):
    """A model behind a wall, which says how likely a text's tokens are and no more."""

    answers = frozenset({"token_log_probs"})
    vocabulary_size = V

    def __init__(self, network):
        self.network = network.eval()

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits
        log_probs = logits.log_softmax(-1)[positions.mask]
        return TokenLogProbs(log_probs.gather(-1, positions.targets[:, None])[:, 0])


class Chi(Divergence):
    """A divergence that the library does not have."""

    def value(self, student_log_probs, teacher_log_probs):
        return (2 * student_log_probs - teacher_log_probs).exp().sum(-1) - 1


def writing(**options):
    generation = SamplingOptions(max_new_tokens=6)
    return OnPolicyGeneration(**({"generation": generation, "table_every": 0} | options))


@pytest.mark.parametrize("backend", [None, DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("name", [*available_divergences(), "a user's own"])
def test_gkd_from_a_dictionary(name, backend):
    divergence = Chi() if name == "a user's own" else make_divergence(name)
    student, network = tiny_llama(0).double(), tiny_llama(1).double()
    teacher = Remembers.of(network, BATCH, 4)
    q, p = (distribution(model, BATCH).exp().numpy() for model in (student, network))
    ids = np.argsort(-p, -1)[:, :4]
    known = [np.take_along_axis(x, ids, -1) for x in (q, p)]
    events = [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in known]
    expected = divergence(*(torch.from_numpy(x).log() for x in events)).mean().item()
    module = GKD(
        student=StudentSpec.of(student),
        teacher=teacher,
        divergence=divergence,
        logits_backend=backend,
    )
    loss, gradient = fit_one_step(module, [BATCH])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("k", [V - 1, V])
def test_a_dictionary_of_all_tokens_is_the_model(k):
    results = []
    for local in (True, False):
        network = tiny_llama(1).double()
        teacher = LocalTeacher.of(network) if local else Remembers.of(network, BATCH, k)
        module = GKD(student=StudentSpec.of(tiny_llama(0).double()), teacher=teacher)
        results.append(fit_one_step(module, [BATCH]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_metrics_over_k_tokens_have_names_of_their_own():
    student, network = tiny_llama(0).double(), tiny_llama(1).double()
    module = SupervisedKD(
        student=StudentSpec.of(student), teacher=Remembers.of(network, BATCH, 3), alpha=0.5
    )
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    q, p = distribution(student, BATCH), distribution(network, BATCH)
    agree = (q.argmax(-1) == p.argmax(-1)).double().mean().item()
    known = p.topk(3).indices
    events = [x.exp().gather(-1, known) for x in (q, p)]
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).numpy() for x in events)
    expected = {
        "val/top_k_forward_kl": (p * np.log(p / q)).sum(-1).mean(),
        "val/top_k_reverse_kl": (q * np.log(q / p)).sum(-1).mean(),
        "val/top1_agreement": agree,
    }
    assert {name: shown[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not {"val/forward_kl", "val/reverse_kl", "val/teacher_entropy"} & shown.keys()
    assert all(math.isfinite(value) for value in shown.values())


def test_on_policy_distillation_needs_one_token():
    """The loss and the weights are those with a model that tells everything."""
    results = []
    for make in (LocalTeacher.of, TellsOneToken):
        student = tiny_llama(0)
        module = OnPolicyDistillation(student=StudentSpec.of(student), teacher=make(tiny_llama(1)))
        fit = trainer(max_steps=2, max_epochs=-1, callbacks=[writing()])
        fit.fit(module, datamodule=Letters(batch_size=4))
        weights = torch.cat([weight.detach().flatten() for weight in student.parameters()])
        results.append((fit.callback_metrics, weights))
    (told, whole), (shown, weights) = results
    assert shown["train/loss"].item() == pytest.approx(told["train/loss"].item(), rel=1e-5)
    torch.testing.assert_close(weights, whole, rtol=1e-4, atol=1e-5)
    assert "train/reverse_kl" in told
    assert "train/label_log_ratio" in shown
    assert not {name for name in shown if name.endswith(("_kl", "teacher_entropy"))}
    assert all(value.isfinite() for value in shown.values())


def test_validation_with_one_token_is_the_log_ratio_of_the_labels():
    student, network = tiny_llama(0), tiny_llama(1)
    module = OnPolicyDistillation(student=StudentSpec.of(student), teacher=TellsOneToken(network))
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    labels = BATCH["labels"][:, 1:]
    targets = labels[labels != -100][:, None]
    ratio = distribution(student, BATCH) - distribution(network, BATCH)
    expected = ratio.gather(-1, targets).mean().item()
    assert shown["val/label_log_ratio"] == pytest.approx(expected, rel=1e-5)
    assert shown["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert "val/reverse_kl" not in shown
    assert all(math.isfinite(value) for value in shown.values())


def test_rl_distillation_over_k_tokens_validates_under_its_own_name():
    network = tiny_llama(1)
    module = RLDistillation(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=Remembers.of(network, BATCH, 3),
        rewards=[exact_match],
        normalization="token",
    )
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    assert shown["val/top_k_reverse_kl"] == pytest.approx(shown["val/loss"])
    assert shown["val/loss"] > 0
    assert "val/reverse_kl" not in shown


class Recites(TellsOneToken):
    """A teacher somewhere else that also completes prompts."""

    answers = frozenset({"full_distribution", "generation"})

    def __init__(self, network, completions):
        super().__init__(network)
        self.completions, self.seen = completions, []

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits
        return FullDistribution((MaterializedLogits(logits[positions.mask]),))

    def generate(
        self, tokenizer, prompt_ids, prompt_mask, options, *, seeds, engine=None, width=None
    ):
        self.seen.append((len(prompt_ids), len(set(seeds)), width))
        return Completions.of_tokens(
            [self.completions[seed % len(self.completions)] for seed in seeds],
            eos_ids={tokenizer.eos_token_id},
            pad_id=tokenizer.pad_token_id,
        )


def test_completions_of_a_teacher_elsewhere_are_trained_on(tmp_path):
    recited = [[4, 5, 1], [6, 1]]
    teacher = Recites(tiny_llama(1), recited)
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    path = tmp_path / "rollouts.jsonl"
    callback = writing(lmbda=0.0, off_policy="teacher", path=str(path), rows_at_once=3)
    fit = trainer(max_steps=2, max_epochs=-1, callbacks=[callback])
    fit.fit(module, datamodule=Letters(batch_size=4))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8
    assert {tuple(row["completion_ids"]) for row in rows} <= set(map(tuple, recited))
    assert teacher.seen == [(3, 3, V), (1, 1, V)] * 2


def test_predict_of_sequence_kd_writes_what_a_teacher_elsewhere_completes(tmp_path):
    teacher = Recites(tiny_llama(1), [[4, 5, 1]])
    module = SequenceKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    path = tmp_path / "completed.jsonl"
    predict = trainer(callbacks=[JsonlPredictions(str(path))])
    predict.predict(module, datamodule=Letters(batch_size=4), return_predictions=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) > 1
    assert {tuple(row["completion_ids"]) for row in rows} == {(4, 5, 1)}


@pytest.mark.parametrize(
    ("completions", "kept", "message"),
    [
        ([[4, 1]], slice(1, None), "of Wrong returned 3 completions for 4 prompts; it must"),
        ([[4, 5, 4, 5, 4, 5, 1]], slice(None), "a completion of 7 tokens; max_new_tokens is 6"),
        ([[4, 99, 1]], slice(None), "returned tokens from 1 to 99; they must be from 0 to 17"),
    ],
    ids=["too few", "too long", "unknown"],
)
@pytest.mark.parametrize("method", [GKD, SequenceKD])
def test_completions_that_cannot_be_are_named(method, completions, kept, message):
    class Wrong(Recites):
        def generate(self, tokenizer, prompt_ids, *rest, seeds, **options):
            return super().generate(tokenizer, prompt_ids, *rest, seeds=seeds[kept], **options)

    teacher, student = Wrong(tiny_llama(1), completions), StudentSpec.of(tiny_llama(0))
    if method is GKD:
        module = GKD(student=student, teacher=teacher)
        refused(module, message, [writing(lmbda=0.0, off_policy="teacher")])
    else:
        module = SequenceKD(
            student=student, teacher=teacher, generation=GenerationOptions(max_new_tokens=6)
        )
        with pytest.raises(ValueError, match=message):
            trainer().predict(module, datamodule=Letters(batch_size=4), return_predictions=False)


# Refusals, all before the first step.


def refused(module, message, callbacks=()):
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=list(callbacks))
    with pytest.raises(ValueError, match=message):
        fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 0


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        (GKD, "full_distribution or top_k or top_k_and_token or sampled"),
        (SupervisedKD, "full_distribution or top_k or top_k_and_token or sampled"),
        (MiniLLM, "full_distribution"),
        (
            lambda **k: RLDistillation(rewards=[exact_match], **k),
            "full_distribution or top_k or top_k_and_token",
        ),
    ],
)
def test_a_method_that_needs_more_than_single_tokens(method, needs):
    module = method(student=StudentSpec.of(tiny_llama(0)), teacher=TellsOneToken(tiny_llama(1)))
    name = type(module).__name__
    message = rf"{name} needs a teacher that answers {needs}; TellsOneToken answers token_log_probs"
    others = r"(, \w+)*, TopKTeacher(, \w+)*" if "top_k" in needs else r"(, \w+)*"
    refused(module, rf"{message}.*LocalTeacher, TeacherEnsemble, RoutedTeacher{others} can")


@pytest.mark.parametrize("method", [MiniLLM, OnPolicyDistillation])
def test_a_method_that_needs_other_than_k_tokens(method):
    module = method(student=StudentSpec.of(tiny_llama(0)), teacher=Remembers({}))
    refused(module, f"{method.__name__} needs a teacher that answers .*Remembers answers top_k")


@pytest.mark.parametrize(
    ("method", "options"),
    [(GKD, {"teacher_temperature": 0.1}), (SupervisedKD, {"temperature": 2.0})],
)
def test_a_tail_cannot_be_tempered(method, options):
    module = method(student=StudentSpec.of(tiny_llama(0)), teacher=Remembers({}), **options)
    ((name, value),) = options.items()
    refused(module, rf"model.{name} is {value}, but Remembers answers top_k.*model.{name}: 1")


def test_a_tokens_probability_cannot_be_tempered():
    teacher = TellsOneToken(tiny_llama(1))
    module = OnPolicyDistillation(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, temperature=0.7
    )
    hot = SamplingOptions(max_new_tokens=6, temperature=0.7)
    refused(module, r"model.temperature is 0.7.*token_log_probs", [writing(generation=hot)])


@pytest.mark.parametrize(
    ("policy", "message"), [("equal", "vocabulary mismatch"), ("shared", "cannot be known")]
)
def test_a_wider_teacher_of_k_tokens(policy, message):
    student = StudentSpec.of(tiny_llama(0, vocab_size=18))
    teacher = Remembers({})
    teacher.vocabulary_size = 20
    refused(GKD(student=student, teacher=teacher, vocabulary=policy), message)


@pytest.mark.filterwarnings("ignore:the student gives .* beyond")
def test_a_wider_student_is_cut():
    network = tiny_llama(1)
    module = GKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=20)),
        teacher=Remembers.of(network, BATCH, 3),
        vocabulary="shared",
    )
    loss, gradient = fit_one_step(module, [BATCH])
    assert math.isfinite(loss)
    assert gradient.isfinite().all()


def test_a_teacher_that_cannot_write():
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=Remembers({}))
    refused(module, "Remembers", [writing(lmbda=0.5, off_policy="teacher")])


def test_an_answer_of_another_kind():
    class Confused(Remembers):
        answers = frozenset({"full_distribution"})

    teacher = Confused(Remembers.of(tiny_llama(1), BATCH, 3).known)
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    with pytest.raises(ValueError, match="asked for full_distribution and has answered top_k"):
        fit_one_step(module, [BATCH])


@pytest.mark.parametrize(
    ("options", "ability"),
    [({"lmbda": 0.0, "off_policy": "teacher"}, "generation"), ({"mixture_alpha": 0.2}, "mixture")],
)
def test_a_teacher_that_cannot_generate(options, ability):
    teacher = Remembers.of(tiny_llama(1), BATCH, 3)
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    message = (
        f"GKD with .* a teacher that lists '{ability}' in answers, got Remembers; .*LocalTeacher"
    )
    refused(module, message, [writing(**options)])


def test_sequence_kd_needs_a_teacher_that_generates():
    teacher = TellsOneToken(tiny_llama(1))
    module = SequenceKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    needs = r"SequenceKD's predict needs a teacher that lists 'generation' in answers, got Tells"
    with pytest.raises(ValueError, match=needs):
        trainer().predict(module, datamodule=Letters(batch_size=4))


@pytest.mark.parametrize(
    ("options", "method"),
    [({"lmbda": 0.0, "off_policy": "teacher"}, "generate"), ({"mixture_alpha": 0.2}, "model_on")],
)
def test_an_ability_without_its_method_is_refused_before_the_first_step(options, method):
    class Promises(TellsOneToken):
        answers = frozenset({"full_distribution", "generation", "mixture"})

    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=Promises(tiny_llama(1)))
    refused(module, f"Promises lists .* in answers and has no {method}", [writing(**options)])


class Answers(Teacher):
    """A model whose answer a function changes."""

    answers = frozenset({"full_distribution"})
    vocabulary_size = V

    def __init__(self, network, change):
        self.network, self.change = network.eval(), change

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits
        batch["input_ids"].fill_(3)  # to mask something for its own model
        batch["labels"].fill_(3)
        return self.change(logits[positions.mask])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: None, "Answers has answered with a NoneType; return a FullDistribution"),
        (FullDistribution, "must be a tuple of LazyLogits, .*; got Tensor"),
        (
            lambda logits: FullDistribution((MaterializedLogits(logits[:, :10]),)),
            "has logits of 10 tokens, and the teacher says that it knows 18",
        ),
        (
            lambda logits: FullDistribution((MaterializedLogits(logits.repeat(1, 2)),)),
            "vocabulary_size of Answers is 18, and it has answered with logits of 36 tokens",
        ),
    ],
    ids=["nothing", "a tensor", "narrower", "wider"],
)
def test_a_full_distribution_over_other_tokens_is_refused(change, message):
    teacher = Answers(tiny_llama(1), change)
    refused(SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher), message)


def test_what_a_teacher_does_to_its_batch_stays_with_it():
    masking = Answers(tiny_llama(1), lambda x: FullDistribution((MaterializedLogits(x),)))
    found, expected = (
        fit_one_step(
            SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher), [BATCH, BATCH]
        )
        for teacher in (masking, LocalTeacher.of(tiny_llama(1)))
    )
    assert found[0] == pytest.approx(expected[0])
    torch.testing.assert_close(found[1], expected[1])


class Both(TellsOneToken):
    """A model that tells one token or all of them."""

    answers = frozenset({"token_log_probs", "full_distribution"})

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        if kind == "token_log_probs":
            return super().answer(batch, positions, kind=kind, logits_backend=logits_backend)
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits
        return FullDistribution((MaterializedLogits(logits[positions.mask]),))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "token_log_probs"),
        ({"temperature": 2.0}, "full_distribution"),
        ({"vocabulary": "shared"}, "full_distribution"),
    ],
    ids=str,
)
def test_of_several_kinds_the_one_that_the_options_need_is_asked_for(options, kind):
    student = StudentSpec.of(tiny_llama(0))
    module = OnPolicyDistillation(student=student, teacher=Both(tiny_llama(1)), **options)
    assert module.answer_kind == kind
    sampling = SamplingOptions(max_new_tokens=4, temperature=options.get("temperature", 1.0))
    fit = trainer(max_steps=1, callbacks=[OnPolicyGeneration(generation=sampling)])
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 1


@pytest.mark.parametrize("answers", [{"top_k"}, ["top_k"], "top_k", None], ids=str)
def test_answers_that_are_no_frozenset_are_refused(answers):
    class Mine(Remembers):
        pass

    Mine.answers = answers
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=Mine.of(tiny_llama(1), BATCH, 4))
    refused(module, r"Mine has the answers .*; give the class a frozenset")


@pytest.mark.parametrize("size", [0, None, "18"])
def test_a_vocabulary_size_that_is_no_number_of_tokens_is_refused(size):
    class Mine(Remembers):
        vocabulary_size = size

    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=Mine.of(tiny_llama(1), BATCH, 4))
    refused(module, f"the vocabulary_size of Mine is {size!r}; it must be the number of tokens")
