"""A student's logits in a chunk, and what several terms make of them."""

from torch import Tensor


class StudentRows:
    """Logits of the student at the rows of a chunk, and their log-probabilities.

    Args:
        logits: ``(n, V)``; ``(n, 0)`` if only the teacher is evaluated.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.events: dict[float, Tensor] = {}
        self._log_probs: dict[float, Tensor] = {}

    events: dict[float, Tensor]
    """Log-probabilities of the events of the teacher's answer, by temperature, where known."""

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """The log-probabilities of all tokens, ``(n, V)``, computed once for each temperature."""
        if temperature not in self._log_probs:
            logits = self.logits if temperature == 1 else self.logits / temperature
            self._log_probs[temperature] = logits.log_softmax(-1)
        return self._log_probs[temperature]
