"""Answers that are under way before they are needed."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from lightning_kd.wire import Question

_T = TypeVar("_T")


class Ahead(Generic[_T]):
    """Asks questions in threads of their own, and keeps the answers until they are asked for.

    Args:
        ask: Answers a question, within a bounded time.
        most: Answers that are kept; the oldest goes first.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[4, 5]])
        >>> question = Question(ids, torch.ones_like(ids), ids > 0, ids[0], "hidden")
        >>> asked = []
        >>> ahead = Ahead(lambda question: asked.append("once") or "answer")
        >>> ahead.begin(question)
        >>> ahead.result(question), asked
        ('answer', ['once'])
    """

    def __init__(self, ask: Callable[[Question], _T], most: int = 2) -> None:
        self._ask, self._most = ask, most
        self._under_way: dict[str, Future[_T]] = {}

    def begin(self, question: Question) -> None:
        """Ask a question in the background, unless it has been asked already."""
        key = question.digest()
        if key in self._under_way:
            return
        while len(self._under_way) >= self._most:
            del self._under_way[next(iter(self._under_way))]
        future: Future[_T] = Future()
        self._under_way[key] = future
        # A thread that ends with the process: a server that hangs does not keep it.
        threading.Thread(target=self._run, args=(question, future), daemon=True).start()

    def result(self, question: Question) -> _T:
        """Return the answer to a question, asked before or now."""
        future = self._under_way.pop(question.digest(), None)
        return self._ask(question) if future is None else future.result()

    def _run(self, question: Question, future: "Future[_T]") -> None:
        try:
            future.set_result(self._ask(question))
        except BaseException as error:
            future.set_exception(error)
