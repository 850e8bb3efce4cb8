"""Mismatches that have ruined runs, and what to change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_kd.preflight.facts import Facts, ModelFacts
from lightning_kd.preflight.sizes import in_bytes

_MOST = 0.5
"""Share of the data's completions that may be longer than those that are generated."""


@dataclass(frozen=True)
class Finding:
    """A mismatch.

    Attributes:
        name: One of :data:`MISMATCHES`, or ``refused`` for what ``fit`` would refuse besides.
        says: What is wrong.
        change: What to change.
    """

    name: str
    says: str
    change: str = ""


def judge(facts: Facts) -> list[Finding]:
    """Return the mismatches in what is known of a run.

    A mismatch that follows from another one is left out: of models with another tokenizer, neither
    vocabulary nor template is compared.
    """
    found = [Finding("refused", text) for text in facts.refused]
    for name, check in MISMATCHES.items():
        found += [Finding(name, says, change) for says, change in check(facts)]
    return found


Said = Iterator[tuple[str, str]]


def _template(facts: Facts) -> Said:
    for model in facts.models:
        own = model.tokenizer
        if own is not None and own.other_template and not own.other_ids:
            yield (
                f"the chat template of {own.name}, which the {model.role} was trained with, is "
                f"another one than that of the data's tokenizer, {facts.tokenizer.name}: "
                f"{own.other_template}",
                f"give data.tokenizer: {own.name}, or a {model.role} that was trained with the "
                "data's template",
            )


def _untrained_eos(facts: Facts) -> Said:
    rows = facts.rows
    if rows is None or rows.ended or rows.masked_ends or not _learns_ends(facts):
        return
    if 2 * rows.stopped > rows.labeled:  # fewer may end so by chance
        return
    cause = (
        f"{rows.cut:,} rows were cut, and with the end of a completion goes its EOS: raise "
        "data.max_length, or choose data.truncation: drop or left"
        if rows.cut
        else "let completions end: ended_column: null if the column says nothing of this data, or "
        "an EOS at the end of each completion's labels in a data module of your own"
    )
    yield (
        f"none of {rows.labeled:,} completions that were looked at is trained to end: their labels "
        f"are without {_eos(facts)}. The student will write to the limit of each generation",
        cause,
    )


def _masked_eos(facts: Facts) -> Said:
    rows = facts.rows
    if rows is None or rows.ended or not rows.masked_ends or not _trains_on_data(facts):
        return
    pad = facts.tokenizer.special.get("pad_token")
    same = pad is not None and pad[1] == facts.tokenizer.eos_id
    what = "completions" if rows.have_prompts else "rows"
    yield (
        f"{what} have {_eos(facts)} at their end, and it is masked out of the labels"
        + (": the padding is the same token, and all of it was taken for padding" if same else ""),
        "make labels and attention_mask from the lengths of rows, never from ids != pad, as the data "
        "modules of this library do; or give the tokenizer a padding token of its own",
    )


def _endless(facts: Facts) -> Said:
    rows, rollouts, eos = facts.rows, facts.rollouts, facts.tokenizer.eos_id
    if rollouts is not None and rollouts.any and rows is not None and rows.completions:
        longer = sum(length > rollouts.max_new_tokens for length in rows.completions)
        if longer > _MOST * len(rows.completions):
            longest = max(rows.completions)
            yield (
                f"on_policy.generation.max_new_tokens is {rollouts.max_new_tokens}, and "
                f"{longer} of {len(rows.completions)} of the data's completions are longer (up to "
                f"{longest} tokens): most that are generated would be cut before they end",
                f"give on_policy.generation.max_new_tokens: {longest} or more",
            )
    if rows is not None and rows.turn_end is not None and rows.turn_end[1] != eos:
        token, number = rows.turn_end
        for model in facts.models:
            if number not in _ends(model) and not model.starts_at_random:
                yield (
                    f"the chat template ends a turn with {token!r}, and generation with the "
                    f"{model.role} does not stop there: it stops at {_eos(facts)}"
                    + _listed(" and at ", model, but=eos),
                    f"set data.eos_token: {token!r}, or add {number} to eos_token_id in the "
                    f"generation_config.json of {model.name}",
                )
                return
    for model in facts.models:
        if model.starts_at_random or _other_tokenizer(model):
            continue
        ends = _ends(model)
        unknown = [i for i in ends if i >= min(model.width, facts.tokenizer.size)]
        if unknown:
            yield (
                f"the generation config of the {model.role} ends completions at {unknown[0]}, which is "
                f"no token of the tokenizer ({facts.tokenizer.size:,} ids)",
                f"correct eos_token_id in the generation_config.json of {model.name}",
            )
        # A student learns the data's end from it.
        elif ends and eos not in ends and not (model is facts.student and _learns_ends(facts)):
            yield (
                f"the {model.role} ends its completions at {_listed('', model)} (its generation "
                f"config or tokenizer), and the data's end with {_eos(facts)}, which it does not "
                "write there",
                "give data.tokenizer the eos_token that the model was trained with, or add the "
                f"tokenizer's to eos_token_id in the generation_config.json of {model.name}",
            )


def _context(facts: Facts) -> Said:
    rows, rollouts = facts.rows, facts.rollouts
    if rows is None:
        return
    lengths: dict[str, tuple[int, str]] = {}
    if rollouts is None or rollouts.trains_on_data:
        lengths["rows"] = (rows.longest, "the longest training row has {} tokens")
    if rollouts is not None:
        both = rows.longest_prompt + rollouts.max_new_tokens
        lengths["prompts"] = (both, "the longest prompt and max_new_tokens are {} tokens")
    for model in facts.models:
        for length, what in lengths.values():
            if model.context is not None and length > model.context:
                yield (
                    f"{what.format(f'{length:,}')}, and the {model.role} has {model.context:,} "
                    "positions",
                    "shorten rows with data.max_length or block_length (or max_new_tokens), or take "
                    "a model with more positions; max_positions beside name_or_path goes beyond those "
                    "that a model with rotary positions was trained on",
                )
                break


def _vocabulary(facts: Facts) -> Said:
    if facts.student is None:
        return
    student, size = facts.student, facts.tokenizer.size
    for model in facts.models:
        if _other_tokenizer(model):
            continue
        if model.width < size:
            yield (
                f"the {model.role} has {model.width:,} logits, and the tokenizer gives {size:,} ids",
                f"use the tokenizer that belongs to the {model.role}",
            )
    for teacher in facts.teachers:
        shared = min(student.width, teacher.width)
        if _other_tokenizer(teacher) or student.width == teacher.width or shared < size:
            continue
        beyond = 0 if teacher.tokenizer is None else teacher.tokenizer.size - shared
        if facts.policy != "shared":
            yield (
                f"the student has {student.width:,} logits and the {teacher.role} "
                f"{teacher.width:,}; the tokenizer gives {size:,} ids, so the rest is padding",
                f"set model.vocabulary: shared, which compares the first {shared:,}",
            )
        elif beyond > 0:
            yield (
                f"vocabulary: shared compares the first {shared:,} tokens, and {beyond:,} tokens of "
                f"the {teacher.role}'s tokenizer are beyond them: what it gives to these is left out",
                f"take a student with at least {shared + beyond:,} logits",
            )


def _tokenizer(facts: Facts) -> Said:
    if facts.named is not None and facts.named.other_ids:
        yield (
            f"model.tokenizer ({facts.named.name}) is another one than the data's "
            f"({facts.tokenizer.name}): {facts.named.other_ids}",
            "leave model.tokenizer out; the module takes the data's",
        )
    for model in facts.models:
        if model.tokenizer is not None and _other_tokenizer(model):
            yield (
                f"the {model.role} was trained with another tokenizer ({model.tokenizer.name}) than "
                f"the data's ({facts.tokenizer.name}): {model.tokenizer.other_ids}",
                f"give data.tokenizer: {model.tokenizer.name}, or a {model.role} that was trained "
                "with the data's tokenizer",
            )
        elif model.tokenizer is not None and model.tokenizer.other_start:
            yield (
                f"the tokenizer that the {model.role} was trained with ({model.tokenizer.name}) frames "
                f"texts otherwise than the data's ({facts.tokenizer.name}): "
                f"{model.tokenizer.other_start}",
                f"give data.tokenizer: {model.tokenizer.name}, or have it begin a text as the data's",
            )


def _memory(facts: Facts) -> Said:
    memory = facts.memory
    if memory is None:
        return
    for device, free in memory.available.items():
        needed = memory.needed(device)
        if free is not None and needed > free:
            largest = max((p for p in memory.parts if p.device == device), key=lambda p: p.bytes)
            yield (
                f"the run needs at least {in_bytes(needed)} on {device}, without activations, and "
                f"{in_bytes(free)} are free; the most is {largest.what}, {in_bytes(largest.bytes)}",
                "take smaller models, dtype: bfloat16 or placement: offloaded for the teacher, lora "
                "for the student, or shards (--trainer.strategy fsdp2); a teacher on disk "
                "(docs/cache.md) needs no memory in training",
            )


MISMATCHES: dict[str, Callable[[Facts], Said]] = {
    "template": _template,
    "eos_untrained": _untrained_eos,
    "eos_masked": _masked_eos,
    "endless": _endless,
    "context": _context,
    "vocabulary": _vocabulary,
    "tokenizer": _tokenizer,
    "memory": _memory,
}
"""Checks by the name of what they find."""


def _learns_ends(facts: Facts) -> bool:
    """Return whether completions of the data are trained on, so that they have to end."""
    return facts.rows is not None and facts.rows.have_prompts and _trains_on_data(facts)


def _trains_on_data(facts: Facts) -> bool:
    on_data = facts.rollouts is None or facts.rollouts.trains_on_data
    return facts.rows is not None and on_data and facts.rows.labeled > 0


def _other_tokenizer(model: ModelFacts) -> bool:
    return model.tokenizer is not None and bool(model.tokenizer.other_ids)


def _ends(model: ModelFacts) -> list[int]:
    """Return the tokens that a model ends its completions with, as far as its files tell."""
    if model.eos_ids or model.tokenizer is None or model.tokenizer.eos_id is None:
        return list(model.eos_ids)
    return [model.tokenizer.eos_id]


def _eos(facts: Facts) -> str:
    text, number = facts.tokenizer.special.get("eos_token", ("?", facts.tokenizer.eos_id))
    return f"the EOS, {text!r} ({number})"


def _listed(before: str, model: ModelFacts, but: int | None = None) -> str:
    ids = [str(i) for i in _ends(model) if i != but]
    return before + ", ".join(ids) if ids else ""
