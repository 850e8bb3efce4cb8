import math

import numpy as np
import pytest
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.data import DocumentData, PackedTextData, PairedLoader, PromptsAndText
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import MiniLLM, MiniLLMObjective, OfficialCode, Paper
from lightning_kd.teachers import LocalTeacher
from tests.modules.partition_grid import without_float32_islands
from tests.support.harness import GradientProbe, Letters, trainer
from tests.support.toys import LETTERS, letter_tokenizer, tiny_llama

LENGTHS = [4, 1, 6]
MASK = torch.tensor([[0] + [1] * n + [0] * (7 - n) for n in LENGTHS], dtype=torch.bool)
REWARDS = torch.tensor(np.random.default_rng(0).normal(size=MASK.shape)) * MASK


def by_hand(rewards, return_from, gamma, length_norm):
    """One row, token by token, as the formulas are written: positions count from 0 to T - 1."""
    result = []
    for t in range(len(rewards)):
        start = t + 1 if return_from == "next" else t
        later = rewards[start:]
        value = sum(gamma**k * r for k, r in enumerate(later))
        if length_norm == "remaining":
            value /= max(1, len(later))
        elif length_norm == "paper":  # t counts from 1 in the paper
            value /= max(1, len(rewards) - (t + 1) - 1)
        result.append(value)
    return result


@pytest.mark.parametrize("return_from", ["next", "current"])
@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("length_norm", ["none", "remaining", "paper"])
def test_advantages_are_those_of_the_formulas(return_from, gamma, length_norm):
    objective = OfficialCode(return_from=return_from, gamma=gamma, length_norm=length_norm)
    got = objective.advantages(REWARDS, MASK)
    assert got[~MASK].abs().sum() == 0
    for row in range(3):
        expected = by_hand(REWARDS[row][MASK[row]].tolist(), return_from, gamma, length_norm)
        np.testing.assert_allclose(got[row][MASK[row]], expected, atol=1e-12)


def test_rewards_are_scaled_then_clipped():
    ratios = torch.tensor([-400.0, -1.0, 0.0, 3.0])
    assert OfficialCode().reward(ratios).tolist() == [-100, -2, 0, 6]
    assert Paper().reward(ratios).tolist() == ratios.tolist()


def test_the_presets_are_the_columns_of_the_table():
    table = {
        "return_from": ("next", "current"),
        "gamma": (1.0, 0.95),
        "length_norm": ("paper", "remaining"),
        "whitening": ("none", "padded"),
        "weigh_single_step": (True, False),
        "reward_scale": (1.0, 0.5),
        "reward_clip": (None, 100.0),
        "reward_temperature": (None, 1.0),
        "text_kd_ratio": (0.0, 0.5),
    }
    for column, preset in enumerate((Paper(), OfficialCode())):
        assert {name: getattr(preset, name) for name in table} == {
            name: values[column] for name, values in table.items()
        }
    assert set(MiniLLMObjective.__dataclass_fields__) == set(table)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"return_from": "last"}, "return_from is 'last'; choose one of"),
        ({"length_norm": "sqrt"}, "length_norm is 'sqrt'"),
        ({"whitening": "rows"}, "whitening is 'rows'"),
        ({"gamma": 1.5}, "gamma is 1.5; it must lie in"),
        ({"text_kd_ratio": -1}, "text_kd_ratio is -1"),
        ({"reward_scale": 0}, "reward_scale is 0; it must be positive"),
        ({"reward_clip": -1}, "reward_clip is -1"),
        ({"reward_temperature": 0}, "reward_temperature is 0"),
    ],
)
def test_wrong_switches_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Paper(**wrong)


def step(objective, batch_size=4, window=1, text=None, coefficient=1.0, more=(), **options):
    """The rollouts, the logs and the gradient of one optimizer step, in float64."""

    class Kept(OnPolicyGeneration):
        def on_train_batch_end(self, *arguments):
            self.kept = self._rollouts
            super().on_train_batch_end(*arguments)

    sampling = SamplingOptions(max_new_tokens=6, temperature=0.8)
    settings = {"generation": sampling, "table_every": 0} | options
    callback, probe = Kept(**settings), GradientProbe()
    module = MiniLLM(
        student=StudentSpec.of(tiny_llama(0).double()),
        teacher=LocalTeacher.of(tiny_llama(1).double()),
        temperature=0.8,
        objective=objective,
        text_coefficient=coefficient,
    )
    data = Letters(batch_size=batch_size)
    if text is not None:
        blocks = PackedTextData(
            tokenizer=letter_tokenizer(), train=str(text), block_length=8, batch_size=batch_size
        )
        data = PromptsAndText(data, blocks)
    fit = trainer(
        max_steps=1,
        max_epochs=-1,
        accumulate_grad_batches=window,
        precision="64-true",
        callbacks=[callback, probe, *more],
    )
    fit.fit(module, datamodule=data)
    return callback.kept, fit, probe.gradient


def log_ratios(batch, teacher_temperature):
    """log p - log q at every written token, from the models themselves."""
    scores = []
    for model, temperature in ((tiny_llama(1), teacher_temperature), (tiny_llama(0), 0.8)):
        logits = model.double().eval()(batch["input_ids"], attention_mask=batch["attention_mask"])
        log_probs = (logits.logits[:, :-1] / temperature).log_softmax(-1)
        scores.append(log_probs.gather(-1, batch["input_ids"][:, 1:, None])[:, :, 0])
    ratio = torch.nn.functional.pad(scores[0] - scores[1], (1, 0))
    return (ratio * batch["completion_mask"]).detach()


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("whitening", ["none", "tokens", "padded"])
def test_the_advantages_of_a_window_are_those_of_the_official_code(whitening):
    objective = OfficialCode(whitening=whitening)
    ((batch,), _, _) = step(objective)
    mask = batch["completion_mask"]
    rewards = np.clip(log_ratios(batch, 1.0).numpy() / 0.5, -100, 100)
    rows = [
        by_hand(rewards[row][mask[row]].tolist(), "current", 0.95, "remaining")
        for row in range(len(mask))
    ]
    flat = np.concatenate(rows)
    if whitening != "none":
        padded = np.zeros(4 * 6) if whitening == "padded" else np.zeros(len(flat))
        padded[: len(flat)] = flat
        flat = (flat - padded.mean()) / math.sqrt(padded.var() + 1e-8)
    np.testing.assert_allclose(batch["advantages"][mask], flat, atol=1e-9)


@pytest.fixture
def _float64_norms(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", LlamaRMSNorm.forward)
    without_float32_islands()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((LETTERS * 30)[7:])
    return path


def text_of(fit):
    """The first micro-batch of the second stream."""
    seen = fit.train_dataloader
    assert isinstance(seen, PairedLoader)
    seen.text.position = 0
    return next(iter(seen.text))["input_ids"]


def text_gradient(ids):
    """The gradient of the mean cross-entropy (transformers' own loss is float32)."""
    model = tiny_llama(0).double()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_the_text_terms_gradient_is_added(coefficient, text):
    """With text minus without it: once the coefficient, upwards."""
    _, fit, gradient = step(Paper(), 4, 1, text, coefficient)
    _, _, without = step(Paper(), 4, 1, text, coefficient=0.0)
    expected = coefficient * text_gradient(text_of(fit))
    assert (gradient - without - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.usefixtures("_float64_norms")
def test_the_text_terms_gradient_is_the_slope_of_its_loss(text):
    """Finite differences: no derivative of anybody."""
    _, fit, gradient = step(Paper(), 4, 1, text)
    _, _, without = step(Paper(), 4, 1, text, coefficient=0.0)
    ids, direction = text_of(fit), torch.randn(len(gradient), dtype=torch.float64)

    def loss(distance):
        model = tiny_llama(0).double()
        with torch.no_grad():
            parameters = torch.nn.utils.parameters_to_vector(model.parameters())
            torch.nn.utils.vector_to_parameters(
                parameters + distance * direction, model.parameters()
            )
            nll = -model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return nll.mean().item()

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert torch.dot(gradient - without, direction).item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.filterwarnings("ignore:In this window no completion ended")
@pytest.mark.parametrize("truncated", ["mask", "drop"])
@pytest.mark.parametrize(("batch_size", "window"), [(4, 1), (2, 2)])
def test_text_is_trained_on_where_every_rollout_is_masked(text, truncated, batch_size, window):
    """One token is not an end, so nothing is left of the rollouts: the step is the text's."""
    options = {"generation": SamplingOptions(max_new_tokens=1, temperature=0.8)}
    diagnostics = LossNormalizationDiagnostics()
    rollouts, fit, gradient = step(
        Paper(), batch_size, window, text, truncated=truncated, more=[diagnostics], **options
    )
    for batch in rollouts:
        assert (batch["labels"] == -100).all(), "choose a seed whose first tokens do not end"
    logged = fit.callback_metrics
    whole = step(Paper(), 4, 1, text)[1] if window > 1 else fit
    ids = text_of(whole)
    expected = text_gradient(ids)
    assert (gradient - expected).norm() < 1e-9 * expected.norm()
    assert logged["train/tokens"] == 0
    assert logged["train/loss"] == logged["train/language_modeling"]
    assert logged["train/loss"].item() == pytest.approx(
        tiny_llama(0).double()(ids, labels=ids).loss.item(), rel=1e-6
    )
    assert logged["norm/language_modeling/denominator"] == ids[:, 1:].numel()


@pytest.mark.usefixtures("_float64_norms")
def test_the_diagnostics_know_the_tokens_of_the_text(text):
    for coefficient in (0.5, 0.0):
        _, fit, _ = step(Paper(), 4, 1, text, coefficient, more=[LossNormalizationDiagnostics()])
        logged = fit.callback_metrics
        assert logged["norm/policy_gradient/denominator"] == logged["train/tokens"]
        assert logged["norm/terms_agree"] == (coefficient == 0)
        assert logged["norm/loss_token"].item() == pytest.approx(logged["train/loss"].item())
        if coefficient:
            assert logged["norm/language_modeling/denominator"] == text_of(fit)[:, 1:].numel()
            assert logged["norm/language_modeling/weight"].item() == pytest.approx(0.5)
            assert logged["train/tokens"] != text_of(fit)[:, 1:].numel()


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_padded_whitening_counts_a_masked_row_and_not_a_dropped_one(truncated):
    """A masked row is a row of zeros; a dropped one is not there."""
    ((batch,), _, _) = step(OfficialCode(), batch_size=8, truncated=truncated)
    mask = batch["labels"] != -100
    ended = mask.any(-1)
    assert 0 < ended.sum() < 8
    assert (batch["row"] < 0).sum() == (0 if truncated == "mask" else (~ended).sum())
    rewards = np.clip(log_ratios(batch, 1.0).numpy() / 0.5, -100, 100)
    rows = [
        by_hand(rewards[row][mask[row]].tolist(), "current", 0.95, "remaining")
        for row in range(8)
        if ended[row]
    ]
    flat = np.concatenate(rows)
    padded = np.zeros((8 if truncated == "mask" else int(ended.sum())) * 6)
    padded[: len(flat)] = flat
    flat = (flat - padded.mean()) / math.sqrt(padded.var() + 1e-8)
    np.testing.assert_allclose(batch["advantages"][mask], flat, atol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("objective", [Paper(), OfficialCode()])
def test_the_text_term_is_the_mean_over_its_tokens_in_every_cut(objective, text):
    _, whole, gradient = step(objective, 8, 1, text)
    ids = text_of(whole)
    student, teacher = (
        m.double().eval()(ids).logits[:, :-1].log_softmax(-1)
        for m in (tiny_llama(0), tiny_llama(1))
    )
    cross_entropy = -student.gather(-1, ids[:, 1:, None]).mean().item()
    divergence_term = -(teacher.exp() * student).sum(-1).mean().item()
    ratio = objective.text_kd_ratio
    expected = (1 - ratio) * cross_entropy + ratio * divergence_term
    assert whole.callback_metrics["train/language_modeling"].item() == pytest.approx(expected)
    for batch_size, window in ((4, 2), (2, 4), (1, 8)):
        _, other, cut = step(objective, batch_size, window, text)
        assert other.callback_metrics["train/loss"].item() == pytest.approx(
            whole.callback_metrics["train/loss"].item(), rel=1e-6
        )
        assert (cut - gradient).norm() < 1e-9 * gradient.norm()


def test_text_in_other_batches_than_the_prompts_is_refused(text):
    blocks = PackedTextData(tokenizer=letter_tokenizer(), train=str(text), batch_size=2)
    with pytest.raises(ValueError, match="prompts have batch_size 4, text has 2"):
        PromptsAndText(Letters(batch_size=4), blocks)


def test_text_of_several_lengths_is_refused(text):
    """Its mean over a step would be a mean of means."""
    documents = DocumentData(tokenizer=letter_tokenizer(), train=str(text), batch_size=4)
    with pytest.raises(ValueError, match="text is a DocumentData; it must be PackedTextData"):
        PromptsAndText(Letters(batch_size=4), documents)


def test_a_checkpoint_without_a_second_stream_is_refused(text):
    _, fit, _ = step(Paper(), 4, 1, text)
    state = fit.train_dataloader.state_dict()
    assert state["main"]["samples"] == state["text"]["samples"] == 4
    fit.train_dataloader.load_state_dict(state)
    with pytest.raises(ValueError, match="without a second stream of text"):
        fit.train_dataloader.load_state_dict(state["main"])
