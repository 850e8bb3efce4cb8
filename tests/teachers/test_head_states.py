"""What a teacher says as plain tensors, and back."""

import json

import pytest
import torch
from safetensors.torch import load, save

from lightning_kd.fused import FullDistribution, LazyHeadLogits
from lightning_kd.models import DenseLogits, FusedLogits
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from lightning_kd.teachers.head_states import answer_from, head_of, states_of
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (3, 2)])
SCORED = ScoredPositions.from_labels(BATCH["labels"])
TEMPERATURES = [1.0, 2.5]


def teacher_of(kind):
    models = [LocalTeacher.of(tiny_llama(seed, hidden_size=16 * seed)) for seed in (1, 2, 3)]
    pair = TeacherEnsemble(models[:2], combine="probabilities", weights=[1.0, 3.0])
    return {
        "one model": models[0],
        "logits": TeacherEnsemble(models, weights=[1.0, 2.0, 5.0]),
        "log_probs": TeacherEnsemble(models, combine="log_probs"),
        "an ensemble in an ensemble": TeacherEnsemble([pair, models[2]], combine="log_probs"),
        "one model in two places": TeacherEnsemble([models[0], models[1], models[0]]),
    }[kind]


def answered(teacher, tokenizer, backend=None):
    teacher.prepare(tokenizer, torch.device("cpu"), "equal")
    return teacher.answer(
        BATCH, SCORED, kind="full_distribution", logits_backend=backend or FusedLogits()
    )


def log_probs(answer, temperature):
    everything = slice(0, len(SCORED.targets))
    logits = []
    for source in answer.sources:
        out = torch.empty(source.shape, dtype=source.dtype)
        source.fill(everything, out)
        logits.append(out)
    return answer.rows(everything, logits, 18).log_probs(temperature)


def sent(answer):
    """An answer that has been text and bytes meanwhile."""
    tensors, layout = head_of(answer)
    states = {str(number): one for number, one in enumerate(states_of(answer))}
    arrived = load(save(states))
    return answer_from(
        [arrived[str(number)] for number in range(len(states))],
        load(save(tensors)),
        json.loads(json.dumps(layout)),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "kind",
    ["one model", "logits", "log_probs", "an ensemble in an ensemble", "one model in two places"],
)
def test_a_distribution_survives_as_states_and_a_head_bit_for_bit(kind, temperature, tokenizer):
    answer = answered(teacher_of(kind), tokenizer)
    assert torch.equal(log_probs(sent(answer), temperature), log_probs(answer, temperature))


def test_a_head_that_several_share_is_there_once(tokenizer):
    tensors, layout = head_of(answered(teacher_of("one model in two places"), tokenizer))
    assert tensors.keys() == {"0.weight.0", "1.weight.0"}
    assert layout["same"] == {"2.weight.0": "0.weight.0"}


def test_bias_scale_soft_cap_and_a_second_product_survive():
    draws = torch.Generator().manual_seed(0)
    n, width = len(SCORED.targets), 18
    factors = tuple(
        (
            torch.randn(n, h, generator=draws).bfloat16(),
            torch.randn(width, h, generator=draws).bfloat16(),
        )
        for h in (5, 2)
    )
    head = LazyHeadLogits(factors, torch.randn(width, generator=draws), 0.3, 7.1)
    answer = FullDistribution((head,))
    assert torch.equal(log_probs(sent(answer), 1.0), log_probs(answer, 1.0))


def test_narrower_answers_stay_equal(tokenizer):
    answer = answered(teacher_of("logits"), tokenizer)
    assert torch.equal(log_probs(sent(answer).narrowed(7), 1.0), log_probs(answer.narrowed(7), 1.0))


def test_whole_logits_have_no_states(tokenizer):
    answer = answered(teacher_of("one model"), tokenizer, DenseLogits())
    with pytest.raises(ValueError, match=r"MaterializedLogits.*FusedLogits"):
        states_of(answer)


def test_routed_teachers_are_taken_one_by_one(tokenizer):
    teacher = RoutedTeacher({"a": LocalTeacher.of(tiny_llama(1))})
    teacher.prepare(tokenizer, torch.device("cpu"), "equal")
    batch = BATCH | {"extra": {"teacher": ["a", "a"]}}
    answer = teacher.answer(batch, SCORED, kind="full_distribution", logits_backend=FusedLogits())
    with pytest.raises(ValueError, match=r"RoutedLogits.*by itself"):
        head_of(answer)


def test_a_combination_of_someones_own_is_refused(tokenizer):
    answer = answered(teacher_of("one model"), tokenizer)
    with pytest.raises(ValueError, match=r"cannot be written down; that of TeacherEnsemble can"):
        head_of(FullDistribution(answer.logits, lambda logits, temperature: logits[0]))


DAMAGE = {
    "no models": lambda layout: layout.pop("models"),
    "no combination": lambda layout: layout.pop("average"),
    "another number of products": lambda layout: layout["models"][0].update(products=2),
    "text for a number": lambda layout: layout["models"][0].update(scale="wide"),
    "a lacking weight": lambda layout: layout["average"]["weights"].pop(),
    "a lacking member": lambda layout: layout["average"]["members"].pop(),
    "an unknown average": lambda layout: layout["average"].update(of="median"),
    "no average": lambda layout: layout.update(average=None),
    "a list": lambda layout: layout.update(average=[1]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_layout_is_an_error_that_says_so(damage, tokenizer):
    answer = answered(teacher_of("logits"), tokenizer)
    tensors, layout = head_of(answer)
    layout = json.loads(json.dumps(layout))
    damage(layout)
    with pytest.raises(ValueError, match=r"layout|states|average|models|float"):
        answer_from(states_of(answer), tensors, layout)


def test_states_of_another_width_do_not_fit(tokenizer):
    answer = answered(teacher_of("one model"), tokenizer)
    tensors, layout = head_of(answer)
    with pytest.raises(ValueError, match=r"\(7, 15\) do not fit a head \(18, 16\)"):
        answer_from([states_of(answer)[0][:, 1:]], tensors, layout)


def test_a_head_has_no_gradient(tokenizer):
    tensors, _ = head_of(answered(teacher_of("one model"), tokenizer))
    assert not any(tensor.requires_grad for tensor in tensors.values())
