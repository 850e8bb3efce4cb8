"""A teacher that tells some of its tokens, written out on all logits."""

import torch

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused import (
    FullDistribution,
    MaterializedLogits,
    SampledTokens,
    TokenLogProbs,
    TopK,
    TopKAndToken,
)
from lightning_kd.teachers import Teacher


class Tells(Teacher):
    """A network that answers in one way, at some temperatures, with probabilities in float64."""

    answers = frozenset()
    vocabulary_size = 18

    def __init__(self, network, kind, *, k=4, temperatures=(1.0,), draws=8):
        self.network, self.k, self.draws = network.eval(), k, draws
        self.answers, self.temperatures = frozenset({kind}), frozenset(temperatures)

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits[positions.mask]
        return tell(logits.double(), positions.targets, kind, self.k, self.temperatures, self.draws)


def tell(logits, targets, kind, k=4, temperatures=(1.0,), draws=8):
    """Return an answer of a kind from all logits, ``(N, V)``."""
    log_probs = logits.log_softmax(-1)
    labels = log_probs.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    labels = labels.masked_fill(targets == IGNORE_INDEX, 0.0)
    best, ids = log_probs.topk(k)
    tails = {
        t: (logits / t).softmax(-1).scatter(-1, ids, 0.0).sum(-1).log()
        for t in temperatures or ()
        if k < logits.shape[1]
    }
    generator = torch.Generator().manual_seed(0)
    if kind == "full_distribution":
        return FullDistribution((MaterializedLogits(logits),))
    if kind == "top_k":
        return TopK(ids, best, tails)
    if kind == "top_k_and_token":
        return TopKAndToken(ids, best, tails, label_log_probs=labels)
    if kind == "sampled":
        drawn = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator)
        weights = torch.full_like(drawn, 1 / draws, dtype=logits.dtype)
        return SampledTokens(drawn, weights, -(log_probs.exp() * log_probs).sum(-1))
    return TokenLogProbs(labels)
