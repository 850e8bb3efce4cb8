"""The report of a check: as a table, and in a few lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_kd.preflight.facts import Facts, ModelFacts, Token, TokenizerFacts
from lightning_kd.preflight.findings import Finding
from lightning_kd.preflight.sizes import counted, in_bytes

_WIDTH = 100
"""Columns where there is no terminal."""

_LINES = 5
_SHORT = 24
"""Tokens of the example in a few lines."""


@dataclass(frozen=True)
class Report:
    """What is known of a run before it starts.

    Attributes:
        facts: What was found.
        findings: Mismatches that would ruin the run.
    """

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 if there is no mismatch, 1 if there is one, 2 if ``fit`` would refuse the configuration."""
        if any(finding.name == "refused" for finding in self.findings):
            return 2
        return 1 if self.findings else 0

    def show(self, console: Console | None = None) -> None:
        """Print the report: in colour to a terminal, as plain text elsewhere."""
        console = console or Console()
        if not console.is_terminal:
            console.width = _WIDTH
        console.print(self.table())

    def table(self) -> Group:
        """Return the report for a console of rich."""
        facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for label, value in self._lines():
            facts.add_row(label, value)
        return Group(facts, Text(), self._verdict())

    def short(self) -> list[str]:
        """Return the report in at most five lines of plain text."""
        facts, rows = self.facts, self.facts.rows
        lines = []
        if rows is not None:
            shown = [token for token in rows.example if token.text != "..."]
            at = next((i for i, token in enumerate(shown) if token.trained), 0)
            begin = max(0, at - _SHORT // 2)
            lines.append(f"Row ([trained on]): {example(shown[begin : begin + _SHORT]).plain}")
        lines.append(
            "; ".join([*(_model_in_short(m) for m in facts.models), *self._memory_in_short()])
        )
        if rows is not None:
            about = "; ".join([*_about_rows(facts), *_about_ends(facts)])
            lines.append(f"Training rows: {about}")
        said = [f"Would ruin the run: {f.name}: {f.says}. {f.change}" for f in self.findings]
        room = _LINES - len(lines)
        if len(said) > room:
            names = ", ".join(f.name for f in self.findings[room - 1 :])
            said = [*said[: room - 1], f"Would ruin the run as well: {names} (lightning-kd check)"]
        return [*lines, *said]

    def _memory_in_short(self) -> Iterator[str]:
        memory = self.facts.memory
        for device, free in ({} if memory is None else memory.available).items():
            assert memory is not None  # it has the devices
            of = "" if free is None else f" of {in_bytes(free)} free"
            yield f"{in_bytes(memory.needed(device))}{of} on {device}, without activations"

    def _lines(self) -> Iterator[tuple[str, Text]]:
        facts, rows = self.facts, self.facts.rows
        yield "method", Text(facts.method)
        if rows is not None:
            generated = facts.rollouts is not None and not facts.rollouts.trains_on_data
            of = " (its completion will be generated)" if generated else ""
            yield "example row", example(rows.example)
            yield "", Text(f"tokens of a row; [ ] is trained on{of}", style="dim")
            if rows.told:
                yield "teacher reads", Text(rows.told.replace("\n", "\\n"))
                yield "", Text("in place of the prompt of this row", style="dim")
            yield "rows", Text("; ".join(_about_rows(facts)))
            yield "completions", Text("; ".join(_about_ends(facts)))
        yield "tokenizer", _about_tokenizer(facts.tokenizer)
        for model in facts.models:
            yield model.role, _about_model(model, facts)
        for model in facts.with_other_tokens:
            said = f"{model.name}: {counted(model.parameters)} weights; frozen; tokens of its own"
            yield model.role, Text(said)
        if facts.student is not None and facts.teachers:
            yield "vocabulary", Text(_about_vocabulary(facts))
        yield from self._memory()

    def _memory(self) -> Iterator[tuple[str, Text]]:
        memory = self.facts.memory
        if memory is None:
            return
        for number, part in enumerate(memory.parts):
            text = f"{in_bytes(part.bytes):>9}  {part.what} ({part.device})"
            yield "" if number else "memory", Text(text)
        for device, free in memory.available.items():
            count = memory.processes.get(device, 1)
            of = "free memory is not known" if free is None else f"{in_bytes(free)} are free"
            each = f" for {count} processes" if count > 1 else ""
            text = f"{in_bytes(memory.needed(device)):>9}  at least, on {device}{each}; {of}"
            yield "", Text(text, style="bold")
        for what in memory.unknown:
            yield "", Text(f"{'?':>9}  {what}: not counted")
        yield "", Text("activations are not counted", style="dim")

    def _verdict(self) -> Text:
        if not self.findings:
            return Text("No mismatch was found.", style="green")
        text = Text()
        for number, finding in enumerate(self.findings):
            text.append("\n" if number else "")
            text.append(f"{finding.name}: ", style="bold red")
            text.append(finding.says)
            if finding.change:
                text.append(f"\n  change: {finding.change}", style="yellow")
        return text


def example(tokens: Sequence[Token]) -> Text:
    """Return tokens in one line; those that are trained on are in brackets, and in colour.

    Example:
        >>> example([Token("1+1", False), Token("=", False), Token("2", True)]).plain
        '1+1 = [2]'
    """
    text = Text()
    for token in tokens:
        shown = token.text.replace("\n", "\\n").replace("\t", "\\t")
        text.append(" " if text else "")
        text.append(
            f"[{shown}]" if token.trained else shown, "bold green" if token.trained else "dim"
        )
    return text


def _about_rows(facts: Facts) -> Iterator[str]:
    rows = facts.rows
    assert rows is not None  # it is asked of those alone
    if rows.kept is None:
        yield f"{rows.looked_at:,} looked at"
    else:
        given = rows.kept + rows.dropped
        yield f"{rows.kept:,}"
        left = [f"{rows.dropped / given:.1%} dropped", f"{rows.cut / given:.1%} cut"]
        yield " and ".join(left) if rows.dropped or rows.cut else "none dropped or cut"
    yield f"the longest has {rows.longest:,} tokens"
    if rows.longest_prompt:
        yield f"the longest prompt {rows.longest_prompt:,}"
    limits = [f"{m.role} {m.context:,}" for m in facts.models if m.context is not None]
    if limits:
        yield f"context of {', '.join(limits)}"
    if facts.rollouts is not None:
        yield f"max_new_tokens {facts.rollouts.max_new_tokens:,}"


def _about_ends(facts: Facts) -> Iterator[str]:
    rows = facts.rows
    assert rows is not None  # it is asked of those alone
    if rows.labeled:
        text, number = facts.tokenizer.special.get("eos_token", ("?", facts.tokenizer.eos_id))
        share = rows.ended / rows.labeled
        yield f"{share:.1%} of {rows.labeled:,} are trained to end ({text!r}, {number})"
        yield f"the longest of them is trained on for {max(rows.completions):,} tokens"
    else:
        yield "the data has no completions"
    if facts.rollouts is not None:
        shorter = [n for n in rows.completions if n <= facts.rollouts.max_new_tokens]
        if rows.completions:
            share = len(shorter) / len(rows.completions)
            yield f"{share:.1%} fit into max_new_tokens {facts.rollouts.max_new_tokens:,}"
    if rows.turn_end is not None:
        yield f"the template ends a turn with {rows.turn_end[0]!r} ({rows.turn_end[1]})"


def _about_tokenizer(tokenizer: TokenizerFacts) -> Text:
    special = ", ".join(
        f"{role.removesuffix('_token')} {text!r} {number}"
        for role, (text, number) in tokenizer.special.items()
    )
    template = "a chat template" if tokenizer.has_template else "no chat template"
    return Text(f"{tokenizer.name}: {tokenizer.size:,} ids; {special}; {template}")


def _about_model(model: ModelFacts, facts: Facts) -> Text:
    said = [f"{model.name}: {counted(model.parameters)} weights"]
    if model.role == "student":
        share = model.trainable / max(1, model.parameters)
        lora = f" (LoRA of rank {model.rank})" if model.rank else ""
        said.append(f"{counted(model.trainable)} of them train, {share:.1%}{lora}")
    else:
        said.append("frozen")
    limit = "any length" if model.context is None else f"context {model.context:,}"
    surplus = model.width - facts.tokenizer.size
    said += [limit, f"{model.width:,} logits, {surplus:,} beyond the tokenizer"]
    said.append(f"EOS {', '.join(map(str, model.eos_ids)) or 'none'}")
    own = model.tokenizer
    if own is None:
        said.append("no tokenizer of its own")
    else:
        said.append("another tokenizer" if own.other_ids else "the same ids")
        said.append(
            "no chat template"
            if not own.has_template
            else "another chat template"
            if own.other_template
            else "a chat template"
        )
    return Text("; ".join(said))


def _about_vocabulary(facts: Facts) -> str:
    assert facts.student is not None  # it is asked of pairs alone
    widths = [facts.student.width, *(teacher.width for teacher in facts.teachers)]
    shared = min(widths)
    if max(widths) == shared:
        return f"{facts.policy}: all {shared:,} logits are compared"
    left_out = f"{max(widths) - shared:,} of the widest are left out"
    known = "none of them is a token of the tokenizer" if shared >= facts.tokenizer.size else ""
    return "; ".join(filter(None, [f"{facts.policy}: the first {shared:,}", left_out, known]))


def _model_in_short(model: ModelFacts) -> str:
    if model.role != "student":
        return f"{model.role} {counted(model.parameters)} weights"
    return f"Student {counted(model.parameters)} weights, {counted(model.trainable)} train"
