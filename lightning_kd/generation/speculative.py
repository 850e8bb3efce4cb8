"""Sampling from the student, with the teacher in the place of what it would not say."""

from lightning_kd.generation.decoding import CacheKind
from lightning_kd.generation.drawing import Mix, Replacement
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.sampler import CachedSampler
from lightning_kd.option_checks import check_whole


class SpeculativeSampler(CachedSampler):
    r"""The student writes, and the teacher replaces what is not among its ``k`` most likely tokens.

    For rollouts (``on_policy.engine``). A token of the student :math:`q` that is none of the set
    :math:`S` of the teacher's ``k`` most likely is drawn again from the teacher :math:`p` over
    :math:`S`, both at the sampling temperature; so tokens are drawn from

    .. math:: m(v) = q(v) + \Bigl(1 - \sum_{u \in S} q(u)\Bigr) \frac{p(v)}{\sum_{u \in S} p(u)},
        \quad v \in S

    in one step, with one random number. With ``k`` as large as the vocabulary the text is the
    student's own, the same as :class:`~lightning_kd.CachedSampler` gives for the same seed; with ``k``
    1 it is the greedy teacher's. (The reference draws a rejected token from all of the teacher's
    distribution, and verifies several drafted tokens at once, which saves time and changes no
    distribution.)

    A policy gradient cannot use the text: tokens outside of :math:`S` have no importance weight.

    Args:
        k: Tokens that the teacher accepts; 25 in the paper.
        cache: As of :class:`~lightning_kd.CachedSampler`.

    Raises:
        ValueError: If ``k`` is no positive whole number, or tokens are sampled greedily or from part of
            the vocabulary; before the first step, if there is no teacher that runs in this process.

    References:
        Xu et al., *Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through
        Interleaved Sampling*, ICLR 2025, Algorithm 1. https://arxiv.org/abs/2410.11325
    """

    supports_mixtures = False
    asks_teacher = True

    def __init__(self, k: int = 25, cache: CacheKind = "auto") -> None:
        super().__init__(cache)
        check_whole("k", k)
        self.k = k

    def check_options(self, options: GenerationOptions) -> None:
        """Refuse other distributions than those of both models at a temperature."""
        if options.truncates:
            raise ValueError(
                f"SpeculativeSampler with temperature {options.temperature}, top_k {options.top_k} and "
                f"top_p {options.top_p}: its k alone decides what is left out. Sample with a "
                "temperature above 0, top_k 0 and top_p 1"
            )

    @property
    def mix(self) -> Mix:
        """The student's distribution, and the teacher's in the place of what it does not accept."""
        return Replacement(self.k)
