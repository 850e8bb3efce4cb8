"""The contract of engines, which generate completions."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from lightning_kd.fused import are_log_probs
from lightning_kd.generation.completions import Completions, completion_mask, is_end
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.prompts import Prompts
from lightning_kd.option_checks import check_instance
from lightning_kd.resuming import Resumable


class Engine(Resumable, ABC):
    """Generates completions, in this process or elsewhere.

    A local engine generates with the models that each call hands to it. An engine elsewhere, such as a
    server, takes its models in its constructor and new weights of the student in :meth:`update`. What
    an engine does not state that it can is refused before the first step.
    """

    gives_log_probs: bool = False
    """Whether completions come with the log-probability of each token, which policy gradients need."""

    supports_mixtures: bool = False
    """Whether tokens can be sampled from a mixture of two models, for ``mixture_alpha``."""

    seeds_rows: bool = False
    """Whether a completion depends on its prompt and seed alone, not on the rows beside it."""

    supports_beam_search: bool = False
    """Whether ``num_beams`` may be above 1."""

    refills_slots: bool = False
    """Whether it generates a part of the rows at a time by itself, so that ``rows_at_once`` would have
    it wait for the last row of each part."""

    asks_teacher: bool = False
    """Whether it generates with the student and a teacher together: it is then given both, the student
    first and with weight 1, and serves rollouts alone."""

    @abstractmethod
    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Generate one completion of each prompt, on the device of the prompts.

        The global random state and the models' modes must be left as they are.

        Args:
            prompts: The prompts.
            options: Length and sampling.
            seeds: One for each row.
            models: The generating model and its weight 1; or the models of a mixture and their
                weights, the student first.
        """

    def check_options(self, options: GenerationOptions) -> None:
        """Refuse options that it does not support, before anything is loaded.

        Does nothing by default.

        Raises:
            ValueError: If it does not support them.
        """

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        """Refuse models that it cannot generate with, before the first step; called on every process.

        Does nothing by default.

        Args:
            models: Those that it will be given.
            gathered: Whether weights in shards of FSDP2 will be whole on every process meanwhile.

        Raises:
            ValueError: If it cannot generate with one of them.
        """

    def update(self, student: PreTrainedModel) -> None:
        """Take the student's weights, which have changed; called on every process.

        Does nothing by default: local engines get the model itself with each call.
        """


def check_engine(
    engine: object,
    options: GenerationOptions,
    *,
    mixture: bool = False,
    teacher: bool = False,
) -> None:
    """Validate an engine, and options against what it can do.

    Args:
        engine: The engine.
        options: Length and sampling.
        mixture: Whether a mixture of two models is sampled from.
        teacher: Whether there is a teacher to generate with.

    Raises:
        ValueError: If it is no engine, or the options need what it does not have.
    """
    check_instance(
        "engine", engine, Engine, "CachedSampler() or ContinuousBatchingSampler(slots=64)"
    )
    assert isinstance(engine, Engine)  # as checked
    name = type(engine).__name__
    if options.num_beams > 1 and not engine.supports_beam_search:
        raise ValueError(
            f"num_beams is {options.num_beams}, but {name} has no beam search; leave engine out, or "
            "choose TransformersEngine"
        )
    if mixture and not engine.supports_mixtures:
        raise ValueError(
            f"{name} cannot sample from a mixture of two models; set mixture_alpha: 0, or choose an "
            "engine that can, such as CachedSampler, and num_beams: 1"
        )
    if engine.asks_teacher and not teacher:
        raise ValueError(
            f"{name} generates with the student and its teacher together, which is for rollouts "
            "alone: give it as on_policy.engine, and here an engine such as CachedSampler"
        )
    engine.check_options(options)


def check_log_probs(engine: Engine, method: str) -> None:
    """Refuse an engine without the log-probabilities that a policy gradient needs.

    Raises:
        ValueError: If the engine gives no log-probabilities.
    """
    if not engine.gives_log_probs:
        raise ValueError(
            f"{method} needs the log-probability of each sampled token, which {type(engine).__name__} "
            "does not give; choose an engine that does, such as CachedSampler, or a method without "
            "policy gradient, such as GKD"
        )


def check_completions(
    source: str,
    completions: object,
    rows: int,
    options: GenerationOptions,
    *,
    eos_ids: Collection[int],
    other_ends: bool = False,
    width: int | None,
    log_probs: bool = False,
) -> Completions:
    """Return completions that an engine or a teacher has generated, if they are what they must be.

    Args:
        source: Name of the engine or teacher, for messages.
        completions: What it returned.
        rows: Number of prompts.
        options: Length and sampling.
        eos_ids: Tokens that end a completion.
        other_ends: Whether further tokens may end one.
        width: Tokens from here on must not be generated; None for no limit.
        log_probs: Whether each token must come with its log-probability.

    Raises:
        ValueError: If rows, columns or log-probabilities are missing, a completion is too long, has
            other tokens, or goes on behind its EOS, or ``ended`` does not say which have one.
    """
    if not isinstance(completions, Completions):
        raise ValueError(f"{source} returned {type(completions).__name__}; return Completions")
    _check_shapes(source, completions, rows)
    if log_probs and (completions.log_probs is None or completions.sampling_log_probs is None):
        raise ValueError(
            f"{source} has gives_log_probs: True, but returned completions without log_probs or "
            "sampling_log_probs; return both, or set it to False"
        )
    _check_ends(source, completions, eos_ids, other_ends)
    mask = completions.mask
    longest, tokens = int(mask.sum(-1).max()), completions.ids[mask]
    if longest > options.max_new_tokens:
        raise ValueError(
            f"{source} returned a completion of {longest} tokens; max_new_tokens is "
            f"{options.max_new_tokens}"
        )
    if (
        width is not None
        and len(tokens)
        and not 0 <= int(tokens.min()) <= int(tokens.max()) < width
    ):
        raise ValueError(
            f"{source} returned tokens from {int(tokens.min())} to {int(tokens.max())}; they must be "
            f"from 0 to {width - 1}, those that student and teacher share"
        )
    for name in ("log_probs", "sampling_log_probs"):
        values = getattr(completions, name)
        if values is not None and not are_log_probs(values[mask]):
            raise ValueError(
                f"{source} returned {name} that are no log-probabilities of its tokens: they must be "
                "finite and 0 or less, in nats"
            )
    return completions


def _check_shapes(source: str, completions: Completions, rows: int) -> None:
    """Validate shapes and types."""
    ids = completions.ids
    if len(ids) != rows:
        raise ValueError(
            f"{source} returned {len(ids)} completions for {rows} prompts; it must return "
            "one for each, in their order"
        )
    wanted = {"ids": ("integers", ids.shape), "mask": ("bool", ids.shape)}
    wanted |= dict.fromkeys(("log_probs", "sampling_log_probs"), ("floats", ids.shape))
    wanted |= {"ended": ("bool", ids.shape[:1])}
    for name, (kind, shape) in wanted.items():
        value = getattr(completions, name)
        if value is None and kind == "floats":
            continue
        is_bool, is_float = value.dtype == torch.bool, value.is_floating_point()
        came = "bool" if is_bool else "floats" if is_float else "integers"
        if ids.ndim != 2 or value.shape != shape or came != kind:
            raise ValueError(
                f"{source} returned {name} of shape {tuple(value.shape)} and type {value.dtype} beside "
                f"ids of shape {tuple(ids.shape)}; ids are integers, (rows, tokens), mask (bool) and "
                "log-probabilities (floats) have their shape, ended (bool) is (rows,)"
            )


def _check_ends(
    source: str, completions: Completions, eos_ids: Collection[int], other_ends: bool
) -> None:
    """Validate mask and ``ended`` against the tokens."""
    ids, mask = completions.ids, completions.mask
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            f"{source} returned a mask with gaps; a completion is padded on the right alone"
        )
    if (mask & ~completion_mask(ids, eos_ids)).any():
        raise ValueError(
            f"{source} returned a completion that goes on behind its EOS; the mask must end with it"
        )
    ends = (is_end(ids, eos_ids) & mask).any(-1)
    if (ends & ~completions.ended).any() or (not other_ends and (completions.ended & ~ends).any()):
        raise ValueError(
            f"{source} returned ended that is not true where a completion has an EOS "
            f"({', '.join(map(str, sorted(eos_ids)))}) and false elsewhere"
        )
