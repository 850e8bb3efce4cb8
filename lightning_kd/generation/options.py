"""Options of generation."""

from dataclasses import dataclass, fields

from lightning_kd.option_checks import is_number

_MOST_TOKENS = 2**24
_MOST_BEAMS = 1000
_LEAST_TEMPERATURE = 1e-6
"""At which logits do not overflow yet."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation, which alone decide how completions are generated.

    Nothing that a checkpoint's generation config asks for (``repetition_penalty``, ``min_p``,
    ``suppress_tokens``, a temperature of its own, ...) is done, by any engine: samples come from the
    distribution whose log-probabilities are recorded. Only its EOS tokens end a completion too.

    Attributes:
        max_new_tokens: Longest completion, its EOS included. With the prompt it must be within the
            model's context.
        temperature: 0 takes the most likely token; above 0, samples at this temperature.
        top_k: When sampling, keep only the ``top_k`` most likely tokens; 0 keeps all.
        top_p: When sampling, keep the smallest set of tokens with this probability; 1 keeps all.
        num_beams: Width of beam search; 1 is none. Kim and Rush (2016) use 5 for the texts of
            sequence-level distillation.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        """Check kinds and ranges."""
        for field in fields(self):
            value, whole = getattr(self, field.name), isinstance(field.default, int)
            if not is_number(value, whole=whole):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{field.name} is {value!r}; it must be {kind}")
        for name, ok, expected in (
            (
                "max_new_tokens",
                1 <= self.max_new_tokens <= _MOST_TOKENS,
                f"1 or more, and at most {_MOST_TOKENS:,}",
            ),
            (
                "temperature",
                self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE,
                f"0 (greedy) or more, and above 0 at least {_LEAST_TEMPERATURE:g}",
            ),
            ("top_k", self.top_k >= 0, "0 (keep all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "num_beams",
                1 <= self.num_beams <= _MOST_BEAMS,
                f"1 or more, and at most {_MOST_BEAMS:,}",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {expected}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the model's distribution are never sampled."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.num_beams > 1


@dataclass(frozen=True)
class SamplingOptions(GenerationOptions):
    """:class:`GenerationOptions` that sample from the whole distribution if nothing else is said.

    Attributes:
        temperature: The sampling temperature; independent of any temperature in a loss.
    """

    temperature: float = 1.0
