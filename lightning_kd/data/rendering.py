"""Rendering of chat templates within limits: they come with a tokenizer, and are programs."""

import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_kd.data.conversations import Chat
from lightning_kd.data.turns import ChatTemplate, RenderedChat, TemplateMisfitError

try:
    import resource
except ImportError:  # Windows, which render_chats refuses
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RenderLimits:
    """Limits of a chat template for one chat.

    Attributes:
        seconds: Processor time. Three times as much may pass on the clock, where the machine is busy.
        megabytes: Memory beyond what this process has.
        characters: Length of what is rendered.
    """

    seconds: int = 20
    megabytes: int = 1024
    characters: int = 20_000_000


def render_chats(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any] | None = None,
    limits: RenderLimits | None = None,
) -> list[RenderedChat]:
    """Render each conversation, with what is trained on of it.

    A template is a program: its loops can be endless for all practical purposes, a single
    expression of it can ask for any amount of memory, and neither can be stopped from within Python.
    So it runs in a child process, whose processor time and memory the operating system limits, also
    where this process is a worker or this thread not the main one.

    Args:
        chats: The conversations.
        tokenizer: Has the template.
        arguments: Further variables of the template.
        limits: Limits of a chat. Defaults to those of :class:`RenderLimits`.

    Raises:
        ValueError: If the template refuses a chat, fails, or exceeds the limits, or turns of the
            chat cannot be told apart in what it renders.
    """
    if resource is None or not hasattr(os, "fork"):
        raise ValueError(
            "chat templates are rendered in a child process with limits on time and memory, which "
            "this system does not have; render the chats elsewhere and give prompt columns"
        )
    limits, template = limits or RenderLimits(), ChatTemplate(tokenizer, arguments)
    rendered: list[RenderedChat] = []
    with _child(lambda write: _render_all(chats, template, limits, write)) as answers:
        for answer in answers(limits.seconds * 3):
            if "error" in answer:
                raise ValueError(
                    f"{chats[len(rendered)].where}: the chat template {answer['error']}"
                )
            spans = [(start, end) for start, end in answer["spans"]]
            rendered.append(RenderedChat(**answer | {"spans": spans}))
    if len(rendered) < len(chats):
        raise ValueError(
            f"{chats[len(rendered)].where}: the chat template takes more than {limits.seconds} "
            f"seconds for this chat, or more than {limits.megabytes} MB; look for nested loops, "
            "repeated strings and large powers in it"
        )
    return rendered


Write = Callable[[dict[str, Any]], None]


def _render_all(
    chats: Sequence[Chat], template: ChatTemplate, limits: RenderLimits, write: Write
) -> None:
    """Render in the child, and return each chat through a pipe until one fails."""
    _limit_memory(limits.megabytes)
    for chat in chats:
        _limit_processor(limits.seconds)
        try:
            rendered = template.rendered(chat)
        except TemplateMisfitError as error:
            return write({"error": str(error)})
        except TemplateError as error:
            return write({"error": f"refuses the messages: {error}"})
        except MemoryError:
            return write({"error": f"needs more than {limits.megabytes} MB for this chat"})
        except Exception as error:  # whatever it is, the parent raises it with its place
            return write({"error": f"fails: {type(error).__name__}: {error!s:.500}"})
        if len(rendered.text) > limits.characters:
            return write({"error": f"renders more than {limits.characters:,} characters"})
        write(asdict(rendered))
    return None


def _limit_memory(megabytes: int) -> None:
    """Limit the address space to what is used now and a number of megabytes."""
    with suppress(OSError, ValueError):  # where there is no /proc the time alone is limited
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_processor(seconds: int) -> None:
    """End the process once it has used that much more time: the kernel does, also inside C code."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    until = until if hard == resource.RLIM_INFINITY else min(until, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


Answers = Callable[[float], Iterator[dict[str, Any]]]


@contextmanager
def _child(task: Callable[[Write], None]) -> Iterator[Answers]:
    """Run a task in a copy of this process; gives what it writes, and ends it in any case."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads; the child takes no lock that they might hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _run(task, writing)
    os.close(writing)
    try:
        yield lambda seconds: _answers(reading, seconds)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _run(task: Callable[[Write], None], writing: int) -> NoReturn:
    """Run the task and leave, without anything that this process's copy would do at its end."""
    code = 1
    try:
        # Handlers of the trainer, which would save a checkpoint, are none of a renderer's.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        with open(writing, "w", encoding="utf-8", errors="surrogatepass") as file:

            def write(answer: dict[str, Any]) -> None:
                file.write(json.dumps(answer) + "\n")
                file.flush()

            task(write)
        code = 0
    finally:
        os._exit(code)


def _answers(reading: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield lines of a pipe, until it ends or a line takes too long."""
    buffer, deadline = bytearray(), time.monotonic() + seconds
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(reading, 1 << 20)
        if not data:
            return
        buffer += data
        if b"\n" not in data:
            continue
        *lines, rest = buffer.split(b"\n")
        for line in lines:
            yield json.loads(line)
        buffer, deadline = bytearray(rest), time.monotonic() + seconds
