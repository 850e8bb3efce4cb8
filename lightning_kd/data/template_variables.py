"""Variables that a chat template reads."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def check_variables(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Validate that a tokenizer's template reads further variables.

    The template is parsed, and nothing of it runs.

    Args:
        tokenizer: Has the template, or several.
        arguments: The variables, by name.

    Raises:
        ValueError: If it does not read one, which would change nothing.
    """
    if not arguments:
        return
    given = tokenizer.chat_template
    read = set().union(*map(_names, given.values() if isinstance(given, dict) else [given]))
    unread = [name for name in arguments if name not in read]
    if unread:
        others = sorted(read - _GIVEN - set(tokenizer.special_tokens_map))
        raise ValueError(
            f"chat_template_kwargs has {unread[0]!r}, which the chat template does not read, so that "
            f"it would change nothing; variables that it reads are {', '.join(others) or 'none'}"
        )


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"} | {
    *("namespace", "range", "dict", "loop", "lipsum", "cycler", "joiner"),
    *("raise_exception", "strftime_now"),
}


def _names(template: str) -> set[str]:
    """Return the names that a template reads.

    Raises:
        ValueError: If it cannot be parsed.
    """
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = list(environment.parse(_MARKS.sub("", template)).find_all(nodes.Name))
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template cannot be parsed: {error}") from error
    return {name.name for name in names if name.ctx == "load"}
