"""What of a run may be read by everyone: no tokens, and no directories of the machine."""

import os
import re
from pathlib import Path

from huggingface_hub import get_token

_SPECIAL = "".join(
    f"(?<!{name}[_-])" for name in ("eos", "bos", "pad", "unk", "mask", "sep", "cls")
)
_SECRET = (
    rf"(?:{_SPECIAL}token|api_?key|access_?key|\w{{1,40}}[_-]key|secret(?:_?key)?|pass(?:word|wd|phrase)?"
    r"|credentials?)"
)

SECRET_NAME = re.compile(rf"(?:^|[._-])(?:{_SECRET}|key|auth(?:orization)?)$", re.IGNORECASE)
"""Names whose value is a secret; ``max_new_tokens`` and ``pad_token`` are none."""

_ASSIGNED = re.compile(
    rf"""(["']?)\b((?:\w+[._-])?{_SECRET})\1(\s*[:=]\s*)(?:"[^"]*"|'[^']*'|[^\s,&}}\]"']+)""",
    re.IGNORECASE,
)
"""A secret inside of a value, as in ``{api_key: ...}``."""

_HEADER = re.compile(
    r"""(\bauthorization["']?\s*[:=]\s*["']?)(?:(?:basic|bearer|digest|token)\s+)?[^\s,}\]"']+""",
    re.IGNORECASE,
)
_IN_QUERY = re.compile(
    r"""([?&][\w-]*(?:sig|signature|credential|token|key|code)=)[^\s&#"',}\]]+""", re.IGNORECASE
)
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-)[\w-]{8,}|\bBearer\s+[\w.~+/-]{8,}=*"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)"
)
_IN_ADDRESS = re.compile(r"""(?<=://)(?:[^/@\s]+|[^/:@\s]+:(?!\d+/)[^@\s"']+)@""")

_CHARACTERS = r"""[^\s"'`,:;=/\\{}()\[\]<>|]"""
_PIECE = rf"(?:{_CHARACTERS}|\([^\s()/\\]*\)|:(?={_CHARACTERS}+[/\\]))+"
_PART = rf"{_PIECE}(?:(?: +(?![-~]){_PIECE})+(?=[/\\]))?"
"""Between two separators: a name with spaces, if a separator follows it."""

_PATHS = re.compile(
    rf"(?:\bfile:(?://[\w.-]*)?|(?<![\w./~]))(?:~[\w.-]*|(?:[\w.-]+/)*\.\.|/{_PART})(?:/(?:{_PART})?)+"
    rf"|(?:\b[A-Za-z]:[/\\]+|(?<![\w\\])\\\\(?={_CHARACTERS}))(?:{_PART}[/\\]+)+(?:{_PART})?"
)
"""Paths from the root, a home, or a directory above; the second line is Windows'."""

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
    text = _HEADER.sub(rf"\1{LEFT_OUT}", text)
    text = _IN_QUERY.sub(rf"\1{LEFT_OUT}", text)
    text = _ASSIGNED.sub(rf"\1\2\1\3{LEFT_OUT}", text)
    text = _IN_ADDRESS.sub("", text)
    return _PATHS.sub(lambda found: _short(found[0]), text)


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
    if re.match(r"file:|\w:|\\\\", path):
        name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        return f"{LEFT_OUT}/{name}"
    expanded = os.path.expanduser(path)
    whole = Path(os.path.abspath(expanded))
    if not expanded.startswith("~") and whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    return f"{LEFT_OUT}/{whole.name}"
