"""Decoding: a token of each row is drawn, and the models read it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.generation import recording
from lightning_kd.generation.decoder import Decoder
from lightning_kd.generation.drawing import Mix, draw_next
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.recording import Tensors
from lightning_kd.generation.static_decoder import StaticDecoder, static_obstacle

CacheKind = Literal["auto", "dynamic", "static"]
"""Key-value cache of :class:`~lightning_kd.CachedSampler`."""

_told: WeakSet[PreTrainedModel] = WeakSet()


class Decoding:
    """Draws a token of each row from what models have read, and has them read it.

    Args:
        decoders: One of each model, which have read the prompts.
        mix: What is drawn from.
        options: Sampling.
        width: Tokens from here on are never drawn.
    """

    idle_share = 1 / 16
    """Ended rows are taken out of the batch when they are more than this share of it: more often costs
    copies of the cache, less often forward passes for nobody."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        mix: Mix,
        options: GenerationOptions,
        width: int | None,
    ) -> None:
        self._decoders, self._mix = decoders, mix
        self._options, self._width = options, width

    def draw(self, uniforms: Tensor) -> Tensors:
        """Return a token of each row and its two log-probabilities; see :func:`draw_next`."""
        return draw_next(self._decoders, self._mix, self._options, self._width, uniforms)

    def append(self, tokens: Tensor) -> None:
        """Have the models read a token of each row, ``(rows,)``."""
        for decoder in self._decoders:
            decoder.append(tokens)

    @property
    def can_drop_rows(self) -> bool:
        """Whether rows can be removed."""
        return all(decoder.can_drop_rows for decoder in self._decoders)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only."""
        for decoder in self._decoders:
            decoder.keep(rows)
            decoder.logits = decoder.logits[rows]


class RecordedDecoding(Decoding):
    """Decoding by steps that are recorded once for each number of rows and length of the cache.

    A token is read only when the next one is drawn, so that both are one recording.

    Args:
        decoders: One of each model, which have read the prompts.
        mix: What is drawn from.
        options: Sampling.
        width: Tokens from here on are never drawn.
        record: Makes a recorded function of one.
    """

    idle_share = 1 / 2
    """Each other number of rows is recorded anew."""

    def __init__(
        self,
        decoders: Sequence[StaticDecoder],
        mix: Mix,
        options: GenerationOptions,
        width: int | None,
        record: Callable[[Callable[..., Tensors]], Callable[..., Tensors]],
    ) -> None:
        super().__init__(decoders, mix, options, width)
        self._static, self._record = decoders, record
        self._room = min(decoder.room for decoder in decoders)
        self._unread: Tensor | None = None
        self._step: Callable[..., Tensors] | None = None

    def draw(self, uniforms: Tensor) -> Tensors:
        """Return a token of each row and its two log-probabilities, behind those that were appended."""
        if self._unread is None:
            return super().draw(uniforms)
        if self._room == 0:
            self._step = None  # frees its memory before there is a larger cache
            for decoder in self._static:
                decoder.grow()
            self._room = min(decoder.room for decoder in self._static)
        if self._step is None:
            # Not a method: a recording that refers to what holds it would wait for the collector.
            state = self._decoders, self._mix, self._options, self._width
            self._step = self._record(partial(_read_and_draw, *state))
        self._room -= 1
        return self._step(self._unread, uniforms)

    def append(self, tokens: Tensor) -> None:
        """Remember a token of each row until the next one is drawn, ``(rows,)``."""
        self._unread = tokens

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self._step = None
        for decoder in self._static:
            decoder.keep(rows)
        assert self._unread is not None  # rows end with a token that has been drawn
        self._unread = self._unread[rows]


def _read_and_draw(
    decoders: Sequence[Decoder],
    mix: Mix,
    options: GenerationOptions,
    width: int | None,
    tokens: Tensor,
    uniforms: Tensor,
) -> Tensors:
    """Have models read a token of each row, and draw the next one."""
    for decoder in decoders:
        decoder.append(tokens)
    return draw_next(decoders, mix, options, width, uniforms)


def decoding_of(
    models: Sequence[PreTrainedModel],
    mix: Mix,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    width: int | None,
    cache: CacheKind,
) -> Decoding:
    """Have models read prompts, and return their decoding.

    Args:
        models: The models.
        mix: Makes one distribution of theirs.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        width: Tokens from here on are never drawn.
        cache: Kind of key-value cache.

    Raises:
        ValueError: If a static cache is asked for and a model has an obstacle to it.
    """
    device, longest = prompt_ids.device, options.max_new_tokens
    wanted = cache == "static" or (cache == "auto" and device.type in recording.RECORDED_ON)
    if wanted and can_be_static(models, cache):
        decoders = [StaticDecoder(m, prompt_ids, prompt_mask, longest) for m in models]
        return RecordedDecoding(decoders, mix, options, width, recording.recorder(device))
    dynamic = [Decoder(model, prompt_ids, prompt_mask) for model in models]
    return Decoding(dynamic, mix, options, width)


def can_be_static(models: Sequence[PreTrainedModel], cache: CacheKind) -> bool:
    """Return whether no model has an obstacle to a static cache, and say it once for each that has.

    Raises:
        ValueError: If a static cache is asked for and a model has an obstacle to it.
    """
    for model in models:
        obstacle = static_obstacle(model)
        if obstacle is None:
            continue
        said = f"{type(model).__name__} cannot generate with a static key-value cache: {obstacle}"
        if cache == "static":
            raise ValueError(f"{said}; set cache: auto or cache: dynamic of CachedSampler")
        if model not in _told:
            _told.add(model)
            rank_zero_info(f"{said}. Its kernels are launched one by one")
        return False
    return True
