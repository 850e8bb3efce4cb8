import pytest
import torch

from lightning_kd.generation import GenerationOptions, completion_mask, generate
from tests.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
PROMPTS = BATCH["prompt_ids"], BATCH["prompt_mask"]


def by_hand(model, prompt, steps):
    """The most likely token, one full forward pass at a time."""
    ids = prompt[None]
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
        if ids[0, -1] == 1:
            break
    return ids[0, len(prompt) :]


@torch.no_grad()
def test_greedy_completions_are_the_argmax_of_full_forward_passes(tokenizer):
    model = tiny_llama(3).eval()
    written = generate(model, tokenizer, *PROMPTS, GenerationOptions(max_new_tokens=9), seed=0)
    for row, (ids, mask) in enumerate(zip(*PROMPTS, strict=True)):
        expected = by_hand(model, ids[mask.bool()], 9)
        assert torch.equal(written.ids[row][written.mask[row]], expected)


def test_samples_repeat_with_their_seed_and_leave_the_global_state_alone(tokenizer):
    model = tiny_llama(0).train()
    options = GenerationOptions(max_new_tokens=12, temperature=1.0)
    before = torch.random.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, *PROMPTS, options, seed=seed).ids for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert model.training


def test_the_first_eos_belongs_to_the_completion_also_where_pad_is_eos():
    ids = torch.tensor([[4, 1, 1, 1], [1, 1, 1, 1], [4, 5, 6, 7], [4, 3, 1, 5]])
    assert completion_mask(ids, {1}).sum(-1).tolist() == [2, 1, 4, 3]
    assert completion_mask(ids, {1, 3}).sum(-1).tolist() == [2, 1, 4, 2]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("temperature", -1.0, "0 \\(greedy\\) or more"),
        ("top_k", -1, "0 \\(keep all\\)"),
        ("top_p", 0.0, "above 0"),
        ("num_beams", 0, "1 or more"),
    ],
)
def test_wrong_options_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} is .*{expected}"):
        GenerationOptions(**{name: value})
