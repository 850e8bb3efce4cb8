"""A teacher in another process, over HTTP."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, TeacherAnswer, TopKAndToken
from lightning_kd.generation import CachedSampler, Completions, Engine, GenerationOptions
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.option_checks import check_choice
from lightning_kd.resuming import describe
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.contract import Ability, Teacher, TeacherUnavailableError
from lightning_kd.teachers.servers import (
    Ahead,
    BackendName,
    Description,
    OwnServer,
    abilities_of,
    backend_of,
    check_labels,
    check_payload,
    handshake,
)
from lightning_kd.wire import Question, Servers, WireError
from lightning_kd.wire.messages import Payload
from lightning_kd.wire.servers import TOKEN_VARIABLE, check_addresses, token_from

Batching = Literal["alone", "merged"]


class ServedTeacher(Teacher):
    """A teacher in another process or on another machine, asked over HTTP.

    ``lightning-kd serve`` answers hidden states, and the output head once: every divergence at every
    temperature is then that of the same model in this process, and so are the bits, where both run on
    the same kind of device with the same number of threads. Servers of vLLM and SGLang answer the k
    most likely tokens, at temperature 1.

    Before the first step each server is asked whether it is up, has the same tokens, and gives one row
    the same answer alone and in a batch. While a micro-batch is trained on, the next one is asked
    about, where it is known. A server that fails, stalls or answers nonsense ends the run, after at
    most ``(retries + 1) * timeout`` seconds and the pauses between attempts.

    Args:
        urls: Root of a server, such as ``http://127.0.0.1:8765``, or of several, asked in turn.
        backend: What they are: ``lightning_kd``, ``vllm`` or ``sglang``.
        payload: What answers hold: ``hidden`` states, ``top_k`` tokens with the following token's
            log-probability, or ``token_log_probs`` alone.
        k: Tokens at each position of ``top_k``.
        temperatures: Temperatures at which the tail's mass is asked for with ``top_k``.
        batching: ``alone`` has each micro-batch computed by itself, so that the answer does not depend
            on what others ask; ``merged`` lets the server compute several together, which is faster
            with many processes and rounds otherwise.
        vocabulary_size: Tokens of the teacher's vocabulary, where the server does not say. Defaults
            to those of the tokenizer.
        model: Name of the model on a server that has several. Defaults to its first.
        timeout: Seconds in which an attempt must be answered.
        retries: Further attempts after a failure.
        token_variable: Environment variable with the bearer token. None is sent where the default one
            is not set; another one must be.

    Raises:
        ValueError: If the options do not go together.
    """

    answers: frozenset[Ability] = frozenset(
        {"full_distribution", "top_k", "top_k_and_token", "token_log_probs", "generation"}
    )

    may_change_on_resume = frozenset(
        {"urls", "timeout", "retries", "token_variable", "batching", "model"}
    )

    is_remote = looks_ahead = True

    def __init__(
        self,
        urls: list[str] | str,
        *,
        backend: BackendName = "lightning_kd",
        payload: Payload = "hidden",
        k: int | None = None,
        temperatures: list[float] | None = None,
        batching: Batching = "alone",
        vocabulary_size: int | None = None,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        addresses = [urls] if isinstance(urls, str) else urls
        check_addresses(addresses, timeout, retries)
        check_choice("batching", batching, get_args(Batching))
        if batching != "alone" and backend != "lightning_kd":
            raise ValueError(
                f"batching is {batching!r}, but {backend} batches as it does; leave it out"
            )
        self._speaks = backend_of(backend, model)
        check_payload(backend, self._speaks, payload, k, temperatures or [])
        self.payload: Payload = payload
        self.k = k or 1
        self._tail_temperatures = tuple(sorted({1.0, *map(float, temperatures or [])}))
        self.temperatures = None if payload == "hidden" else frozenset(self._tail_temperatures)
        self.batching: Batching = batching
        self.answers = abilities_of(backend, payload)
        self._backend = backend
        self._given_size, self._size = vocabulary_size, 0
        self._description: Description | None = None
        self._device = torch.device("cpu")
        self._servers = Servers(
            addresses,
            timeout=timeout,
            retries=retries,
            token=token_from(token_variable),
            token_variable=token_variable,
        )
        self._ahead = Ahead(self._ask)

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the teacher knows."""
        return self._size

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Ask every server what it is, and whether its answers are sound.

        Raises:
            TeacherUnavailableError: If one does not answer, or not so.
        """
        self._device, self._ahead = device, Ahead(self._ask)
        before = self._description
        try:
            found = handshake(
                self._speaks,
                self._servers,
                tokenizer,
                policy=policy,
                payload=self.payload,
                k=self.k,
                temperatures=self._tail_temperatures,
                device=device,
            )
        except WireError as error:
            raise TeacherUnavailableError(f"the {role} cannot be used: {error}") from error
        if before is not None and before.fingerprint != found.fingerprint:
            raise TeacherUnavailableError(
                f"the {role} was {before.fingerprint!r} and is {found.fingerprint!r} now: another "
                "teacher is served"
            )
        known = max(tokenizer.get_vocab().values()) + 1
        self._description = found
        self._size = found.vocabulary_size or self._given_size or known
        if self._given_size not in {None, self._size}:
            raise ValueError(
                f"vocabulary_size is {self._given_size}, but the server's {role} has {self._size}; "
                "leave it out"
            )
        if known > self._size:
            raise ValueError(
                f"the tokenizer gives ids up to {known - 1}, but the {role} knows {self._size} "
                f"tokens: use the tokenizer that belongs to the {role}"
            )

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments and, once it was asked, the fingerprint of what is served."""
        found = self._description
        served = {} if found is None else {"teacher": found.fingerprint}
        return super().resume_settings() | served

    def check_data(self, data: object) -> None:
        """Refuse rows that are longer than the server reads; those that are generated are not known.

        Raises:
            ValueError: If there are some.
        """
        longest = getattr(data, "longest", None)
        rewritten = getattr(data, "rollout_plan", None) is not None
        for split, (row, _) in (longest() if longest is not None else {}).items():
            if split != "predict" and not (split == "train" and rewritten):
                self._check_length(row, f"{split} rows")

    @property
    def longest_row(self) -> int | None:
        """What the server reads, less what a question takes beside its rows."""
        most = None if self._description is None else self._description.length
        return None if most is None else most - self._speaks.tokens_beside

    def _check_length(self, length: int, what: str) -> None:
        most, beside = self.longest_row, self._speaks.tokens_beside
        if most is not None and length > most:
            also = f" ({most + beside}, less {beside} that a question takes)" if beside else ""
            raise ValueError(
                f"{what} take up to {length} tokens, but the server of the teacher reads {most} at "
                f"most{also}. Shorten them with the data's max_length or block_length, or start the "
                "server for longer ones"
            )

    def announce(self, batch: Batch, positions: ScoredPositions, *, kind: AnswerKind) -> None:
        """Ask about a micro-batch that comes next, in the background."""
        self._ahead.begin(self._question(batch, positions))

    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Ask a server, or take the answer to what was asked before.

        Raises:
            TeacherUnavailableError: If no sound answer came.
        """
        question = self._question(batch, positions)
        self._check_length(self._speaks.longest(question), "the rows of a batch")
        try:
            if self._speaks.lists_rows and kind != "top_k":
                check_labels(question, self._backend)
            answer = self._ahead.result(question)
            answer.check(len(question.targets), self.vocabulary_size)
        except ValueError as error:
            raise TeacherUnavailableError(f"the teacher cannot be asked: {error}") from error
        if kind == "top_k" and isinstance(answer, TopKAndToken):
            return answer.without_label()
        return answer

    def check_generation(self, engine: Engine | None = None) -> None:
        """Refuse a server whose teacher does not generate, and an engine of the run.

        Raises:
            ValueError: If it does not, or the run has another engine than the default one.
        """
        if self._description is not None and not self._description.generates:
            raise ValueError(
                "the teacher is to generate, but what is served at "
                f"{' and '.join(self._servers.urls)} does not: serve a LocalTeacher"
            )
        if engine is not None and describe(engine) != describe(CachedSampler()):
            raise ValueError(
                f"engine is {type(engine).__name__}, but a ServedTeacher generates with an engine of "
                "its server's own; leave engine out, or take a LocalTeacher"
            )

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        engine: Engine | None = None,
        width: int | None = None,
    ) -> Completions:
        """Have prompts completed by the server, with an engine of its own.

        Raises:
            TeacherUnavailableError: If no completions came.
        """
        assert isinstance(self._speaks, OwnServer)  # no other server lists the ability
        self.check_generation(engine)
        longest = int(prompt_mask.sum(-1).max()) + options.max_new_tokens
        self._check_length(longest, "prompts and max_new_tokens")
        try:
            return self._speaks.complete(
                self._servers.ask, prompt_ids, prompt_mask, options, list(seeds), width
            )
        except ValueError as error:
            raise TeacherUnavailableError(f"the teacher cannot be asked: {error}") from error

    def _question(self, batch: Batch, positions: ScoredPositions) -> Question:
        return Question(
            batch["input_ids"].cpu(),
            batch["attention_mask"].cpu(),
            positions.mask.cpu(),
            positions.targets.cpu(),
            self.payload,
            self.k,
            self._tail_temperatures,
            self.batching == "alone",
        )

    def _ask(self, question: Question) -> TeacherAnswer:
        return self._speaks.answer(self._servers.ask, question, self._device)
