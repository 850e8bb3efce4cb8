"""What of a run may be read by everyone: no tokens, and no directories of the machine."""

import os
import re
from pathlib import Path

from huggingface_hub import get_token

_SPECIAL = "".join(
    f"(?<!{name}[_-])" for name in ("eos", "bos", "pad", "unk", "mask", "sep", "cls")
)
_SECRET = rf"(?:{_SPECIAL}token|api_?key|access_?key|secret(?:_?key)?|password|passwd|credentials?)"

SECRET_NAME = re.compile(rf"(?:^|[._-]){_SECRET}$", re.IGNORECASE)
"""Names whose value is a secret; ``max_new_tokens`` and ``pad_token`` are none."""

_ASSIGNED = re.compile(
    rf"""(["']?)\b((?:\w+[._-])?{_SECRET})\1(\s*[:=]\s*)(?:"[^"]*"|'[^']*'|[^\s,}}\]"']+)""",
    re.IGNORECASE,
)
"""A secret inside of a value, as in ``{api_key: ...}``."""

_LOOKS_SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-)[\w-]{8,}|\bBearer\s+[\w.~+/-]{8,}=*"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_PART = r"""[^\s"'`,:;=/\\{}()\[\]<>|]+"""
_ABSOLUTE = re.compile(rf"(?<![\w.:/~])(?:~|/{_PART})(?:/(?:{_PART})?)+")

_SHORTEST = 6
"""Characters of a variable's value that are enough to look for; shorter ones are in every text."""

LEFT_OUT = "..."


def presentable(text: str) -> str:
    r"""Return a text without secrets, and with paths as the working directory sees them.

    What is elsewhere on the machine keeps its last name alone.

    Example:
        >>> presentable("/home/ada/secret-project/train.jsonl")
        '.../train.jsonl'
        >>> presentable("{api_key: abc123, lr: 0.1}")
        '{api_key: ..., lr: 0.1}'
        >>> presentable("https://user:pass@example.org/a/b"), presentable("Q: {prompt}\\nA: yes/no")
        ('https://example.org/a/b', 'Q: {prompt}\\nA: yes/no')
    """
    for secret in _known_secrets():
        text = text.replace(secret, LEFT_OUT)
    text = _LOOKS_SECRET.sub(LEFT_OUT, text)
    text = _ASSIGNED.sub(rf"\1\2\1\3{LEFT_OUT}", text)
    text = _IN_ADDRESS.sub("", text)
    return _ABSOLUTE.sub(lambda found: _short(found[0]), text)


def presentable_command(arguments: list[str]) -> list[str]:
    """Return a command line without options that are secrets.

    Example:
        >>> presentable_command(["/usr/bin/lightning-kd", "fit", "--hf_token", "x", "--seed", "1"])
        ['lightning-kd', 'fit', '--seed', '1']
    """
    program, *rest = arguments
    shown = _program(program)
    behind_secret = False
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if behind_secret and not argument.startswith("--"):
            behind_secret = False
            continue
        behind_secret = False
        if argument.startswith("-") and SECRET_NAME.search(name.lstrip("-")):
            behind_secret = not equals
            continue
        shown.append(presentable(argument))
    return shown


def _program(path: str) -> list[str]:
    if Path(path).parts[-2:] == ("lightning_kd", "__main__.py"):
        return ["lightning-kd"]
    return ["python", presentable(path)] if path.endswith(".py") else [Path(path).name]


def _known_secrets() -> list[str]:
    named = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    known = {*named, get_token() or ""}
    return sorted((value for value in known if len(value) >= _SHORTEST), key=len, reverse=True)


def _short(path: str) -> str:
    whole = Path(path).expanduser()
    if whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    return f"{LEFT_OUT}/{whole.name}"
