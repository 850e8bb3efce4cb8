"""Continuous batching: new rows enter the batch where others have ended."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.generation.cache import ordinary_buffers
from lightning_kd.generation.completions import Completions, is_end
from lightning_kd.generation.decoder import Decoder, evaluating, tokens_between_looks
from lightning_kd.generation.decoding import Decoding
from lightning_kd.generation.drawing import Mixture, check_mixture, draw_next
from lightning_kd.generation.engine import Engine
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.packed_linears import packed_layers
from lightning_kd.generation.prompts import Prompts, check_seeds
from lightning_kd.generation.slots import SlotDecoder, check_slots
from lightning_kd.generation.uniforms import DRAWN_AT_ONCE, Uniforms
from lightning_kd.models.rotary import within_own_length
from lightning_kd.models.sharding import is_fsdp2_sharded, is_gathered, is_sharded
from lightning_kd.option_checks import check_whole

_FREE_SHARE = 1 / 8
"""New rows enter when this share of the slots is free: sooner costs more passes over prompts, later
forward passes for nobody."""


class ContinuousBatchingSampler(Engine):
    """The library's own sampler with continuous batching: a batch that is kept full.

    Of the rows of a window, ``slots`` are generated at once, and where some have ended, the next ones
    enter. For windows of more rows than fit into memory together, whose completions are of unequal
    length: :class:`~lightning_kd.CachedSampler` with ``rows_at_once`` goes on in each part for as long
    as its longest row. The key-value cache holds ``slots`` rows, with room for the longest prompt and
    completion and half as much again (at least 64 tokens).

    A row's completion depends on its prompt and seed alone, never on the number of slots: it is that
    of :class:`~lightning_kd.CachedSampler`, up to round-off. Rotary embeddings that follow the length
    (dynamic NTK, longrope) are those of the longest row that is generated beside it.

    Args:
        slots: Largest number of rows that are generated at once.

    Raises:
        ValueError: If ``slots`` is no positive number; before the first step, if a model is in shards
            that are not gathered (``on_policy.unshard``), which all processes must run together, keeps
            a sliding window or a recurrent state, or has no ``position_ids`` and counts the columns of
            its cache.

    References:
        Yu et al., *Orca: A Distributed Serving System for Transformer-Based Generative Models*, OSDI
        2022. https://www.usenix.org/conference/osdi22/presentation/yu
    """

    gives_log_probs = True
    supports_mixtures = True
    seeds_rows = True
    refills_slots = True
    may_change_on_resume = frozenset({"slots"})

    def __init__(self, slots: int = 64) -> None:
        check_whole("slots", slots)
        self.slots = slots

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        """Refuse models in shards that are not gathered, and those that no row can enter late."""
        for model in models:
            if is_sharded(model) and not (gathered and is_fsdp2_sharded(model)):
                raise _needs_all_processes(model)
            check_slots(model)

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Generate with one model or a mixture."""
        check_mixture(models, options)
        check_seeds(seeds, len(prompts.ids))
        mixed = [model for model, _ in models]
        for model in mixed:
            if is_sharded(model) and not is_gathered(model):
                raise _needs_all_processes(model)
        # Weights that were gathered outlive the context, and the backward pass would refuse what
        # inference mode has made of them.
        gathered = any(is_sharded(model) for model in mixed)
        mode = torch.no_grad() if gathered else torch.inference_mode()
        longest = int(prompts.mask.sum(-1).max()) + options.max_new_tokens
        own_length, layers = within_own_length(mixed, longest), packed_layers(*mixed)
        with ordinary_buffers(mixed), evaluating(*mixed), own_length, mode, layers:
            batch = _Slots(models, prompts, options, seeds, self.slots)
            batch.generate()
        # Outside of inference mode, where joining makes ordinary tensors that can be trained on.
        return batch.completions()


def _needs_all_processes(model: PreTrainedModel) -> ValueError:
    """Return the error for a model that a process cannot run alone."""
    return ValueError(
        f"{type(model).__name__} is in shards, so all processes must run it together, and with "
        "ContinuousBatchingSampler each takes the steps that its own rows need; choose engine: "
        "CachedSampler, or for rollouts under fsdp2 gather the weights (on_policy.unshard: true)"
    )


class _Slots:
    """The slots, and the rows of a window that go through them.

    What decides which rows enter and when is kept on the host; it looks at the device only to see which
    rows have ended.
    """

    def __init__(
        self,
        models: Sequence[tuple[PreTrainedModel, float]],
        prompts: Prompts,
        options: GenerationOptions,
        seeds: Sequence[int],
        slots: int,
    ) -> None:
        self._models = [model for model, _ in models]
        self._mix = Mixture(tuple(weight for _, weight in models))
        self._prompts, self._options, self._device = prompts, options, prompts.ids.device
        self._most = slots
        self._lengths: list[int] = prompts.mask.sum(-1).tolist()
        self._last_position = max(self._lengths) + options.max_new_tokens - 1
        self._uniforms = Uniforms(seeds, self._device)
        self._ends = torch.tensor(sorted(prompts.eos_ids), device=self._device)
        self._next, self._step = 0, 0
        # Of each token: row, place in its completion, whether the row goes on; the token; log-probs.
        self._drawn: list[tuple[Tensor, ...]] = []

    def generate(self) -> None:
        """Generate all rows."""
        between = tokens_between_looks(self._device)
        while self._next < len(self._lengths):
            self._begin()
            while True:
                tokens = self._draw()
                free = self._free() if self._step % between == 0 else []
                if len(free) == len(self._started):
                    break
                for decoder in self._decoders:
                    decoder.append(tokens)
                self._column += 1
                waiting, slots = len(self._lengths) - self._next, len(self._started)
                if waiting and len(free) >= max(1, _FREE_SHARE * slots):
                    self._enter(free[:waiting], set(free[waiting:]))
                elif not waiting and len(free) > Decoding.idle_share * slots:
                    self._leave(set(free))
                elif free:
                    columns = self._columns(set(free))
                    for decoder in self._decoders:
                        decoder.fit(columns)

    def completions(self) -> Completions:
        """Return what has been generated, in the order of the prompts."""
        row, place, goes_on, *values = (torch.cat(c) for c in zip(*self._drawn, strict=True))
        where = row[goes_on], place[goes_on]
        shape = len(self._lengths), int(where[1].max()) + 1

        def laid_out(of_tokens: Tensor, fill: int) -> Tensor:
            return of_tokens.new_full(shape, fill).index_put_(where, of_tokens[goes_on])

        ids, log_probs, sampling_log_probs = values
        return Completions.of_columns(
            laid_out(ids, self._prompts.pad_id),
            laid_out(log_probs, 0),
            laid_out(sampling_log_probs, 0),
            self._prompts.eos_ids,
        )

    def _begin(self) -> None:
        """Fill all slots with the next rows."""
        rows, ids, mask = self._take(self._most)
        self._decoders = [SlotDecoder(m, ids, mask, self._last_position) for m in self._models]
        self._column = ids.shape[1]
        self._rows = torch.arange(rows.start, rows.stop, device=self._device)
        self._places = torch.zeros_like(self._rows)
        self._ended = torch.zeros_like(self._rows, dtype=torch.bool)
        self._numbers = self._uniforms.block(rows)
        # Of each slot: its row, the step at which that entered, and the column in which it begins.
        self._row_of = list(rows)
        self._started = [self._step] * len(rows)
        self._begins = [self._column - self._lengths[row] for row in rows]

    def _take(self, count: int) -> tuple[range, Tensor, Tensor]:
        """Return the next rows and their prompts, without the padding that none of them needs."""
        rows = range(self._next, min(self._next + count, len(self._lengths)))
        self._next = rows.stop
        width = max(self._lengths[row] for row in rows)
        part = slice(rows.start, rows.stop), slice(self._prompts.ids.shape[1] - width, None)
        return rows, self._prompts.ids[part], self._prompts.mask[part]

    def _draw(self) -> Tensor:
        """Draw a token in each slot, ``(slots,)``."""
        options = self._options
        if options.max_new_tokens > DRAWN_AT_ONCE:
            self._draw_further_numbers()
        place = (self._places % DRAWN_AT_ONCE)[:, None]
        numbers = self._numbers.gather(1, place)[:, 0]
        drawn = draw_next(self._decoders, self._mix, options, self._prompts.width, numbers)
        self._drawn.append((self._rows, self._places, ~self._ended, *drawn))
        tokens = drawn[0]
        ends = is_end(tokens, self._ends) | (self._places == options.max_new_tokens - 1)
        self._ended = self._ended | ends
        self._places = self._places + 1
        self._step += 1
        return tokens

    def _draw_further_numbers(self) -> None:
        """Draw the random numbers of rows that have used theirs up."""
        ages = [self._step - started for started in self._started]
        due = [slot for slot, age in enumerate(ages) if age > 0 and age % DRAWN_AT_ONCE == 0]
        if due:
            further = self._uniforms.block([self._row_of[slot] for slot in due])
            self._numbers[torch.tensor(due, device=self._device)] = further

    def _free(self) -> list[int]:
        """Return slots whose rows have ended: the host waits for the device."""
        return [slot for slot, ended in enumerate(self._ended.tolist()) if ended]

    def _columns(self, free: AbstractSet[int]) -> int:
        """Return the columns that the longest row has tokens in, rows that have ended apart."""
        return self._column - min(b for slot, b in enumerate(self._begins) if slot not in free)

    def _enter(self, slots: Sequence[int], free: AbstractSet[int]) -> None:
        """Put the next rows into slots; others may still be free."""
        rows, ids, mask = self._take(len(slots))
        for slot, row in zip(slots, rows, strict=True):
            self._row_of[slot], self._started[slot] = row, self._step
            self._begins[slot] = self._column - self._lengths[row]
        where, columns = torch.tensor(slots, device=self._device), self._columns(free)
        for decoder in self._decoders:
            decoder.enter(where, Decoder(decoder.model, ids, mask), columns)
        # Anew, since what was drawn refers to the tensors as they were.
        numbers = torch.arange(rows.start, rows.stop, device=self._device)
        self._rows = self._rows.index_copy(0, where, numbers)
        self._places = self._places.index_fill(0, where, 0)
        self._ended = self._ended.index_fill(0, where, False)
        self._numbers[where] = self._uniforms.block(rows)

    def _leave(self, free: AbstractSet[int]) -> None:
        """Take slots out of the batch that no row waits for."""
        columns = self._columns(free)
        kept = [slot for slot in range(len(self._started)) if slot not in free]
        where = torch.tensor(kept, device=self._device)
        for decoder in self._decoders:
            decoder.fit(columns)
            decoder.keep(where)
        self._rows, self._places = self._rows[where], self._places[where]
        self._ended, self._numbers = self._ended[where], self._numbers[where]
        self._row_of = [self._row_of[slot] for slot in kept]
        self._started = [self._started[slot] for slot in kept]
        self._begins = [self._begins[slot] for slot in kept]
