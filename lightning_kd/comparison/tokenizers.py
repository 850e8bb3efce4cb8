"""Tokenizers that an experiment learns before its first run."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from lightning_kd.comparison.contents import content_of
from lightning_kd.comparison.options import flat
from lightning_kd.comparison.placeholders import fill, placeholders
from lightning_kd.comparison.plan import Job
from lightning_kd.data import read_texts, train_tokenizer, write_tokenizer
from lightning_kd.integrity import check_directory, checksums

_CHECKSUMS = ".checksums.json"
"""File of a learned tokenizer: checksums of all others."""


class LearnedTokenizers:
    """Tokenizers of an experiment, in directories that are named by what they are learned from.

    With other options or texts a tokenizer lies elsewhere, so that the runs that read it have changed.

    Args:
        given: Options of ``lightning-kd tokenizer`` by name, without ``output``.
        values: What stands for each placeholder.
        output: Directory of all runs.

    Raises:
        ValueError: If an option is unknown, missing or of the wrong type.
    """

    def __init__(
        self, given: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any], output: Path
    ) -> None:
        self._options = {name: _read(name, options, values) for name, options in given.items()}
        self.places = {
            name: str(output / "tokenizers" / f"{name}-{_digest(options)}")
            for name, options in self._options.items()
        }
        """Directory of each, by name."""

    def learn(self, jobs: Sequence[Job], console: Console) -> None:
        """Learn those that are not there yet.

        Args:
            jobs: Runs that are to be made; what none of them reads is not learned.
            console: Where a line for each goes.

        Raises:
            ValueError: If there is no such text, the vocabulary is too small, or one that is there is
                not as it was learned.
        """
        given = [flat(part) for job in jobs for part in (job.fit, job.test)]
        read = {value for part in given for value in part.values() if isinstance(value, str)}
        for name, place in self.places.items():
            if not any(place in value for value in read):
                continue
            if Path(place).exists():
                _check(name, Path(place))
                continue
            options = self._options[name]
            try:
                texts = read_texts(options["files"], options["columns"])
                tokenizer = train_tokenizer(texts, options["vocab_size"])
            except ValueError as error:
                raise ValueError(f"tokenizers.{name}: {error}") from error
            unfinished = Path(f"{place}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            tokenizer.save_pretrained(unfinished)
            kept = json.dumps(checksums(unfinished))
            (unfinished / _CHECKSUMS).write_text(kept)
            unfinished.rename(place)
            console.print(
                f"{len(tokenizer)} tokens, learned from {len(texts)} "
                f"text{'' if len(texts) == 1 else 's'}, are in {place}",
                soft_wrap=True,
            )


def _check(name: str, place: Path) -> None:
    """Validate that a tokenizer is as it was learned; that of an earlier release, that it is there."""
    try:
        if (place / _CHECKSUMS).exists():
            check_directory(place, json.loads((place / _CHECKSUMS).read_text()))
        elif not (place / "tokenizer.json").is_file():
            raise ValueError("its file tokenizer.json is missing")
    except ValueError as error:
        raise ValueError(
            f"tokenizers.{name}: what is in {place} is damaged: {error}; remove {place} to have it "
            "learned again"
        ) from error


def _read(name: str, options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a tokenizer, filled in and all of them."""
    unknown = sorted({*placeholders(options)} - values.keys())
    if unknown:
        raise ValueError(
            f"tokenizers.{name}: {{{unknown[0]}}} stands for nothing; it is learned before all runs, "
            f"from placeholders (there are {', '.join(values) or 'none'})"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(write_tokenizer, skip={"output"})
    try:
        read = parser.parse_object(fill(options, values))
    except ArgumentError as error:
        raise ValueError(f"tokenizers.{name}: {error}") from error
    return dict(read.as_dict())


def _digest(options: Mapping[str, Any]) -> str:
    """Return a digest of options and of the texts that they name, as far as these are there."""
    texts = [content_of(value) for value in flat(options).values() if isinstance(value, str)]
    return hashlib.sha256(json.dumps([options, texts], sort_keys=True).encode()).hexdigest()[:8]
