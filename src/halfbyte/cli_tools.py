"""What commands have in common: errors become exit codes, results tables or JSON, and progress bars."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .errors import FormatError, HalfbyteError

if TYPE_CHECKING:
    from .checkpoint.ranks import Ranks

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, …")]


def examples(*commands: str) -> str:
    """The end of a command's --help: a list, so that each can be copied."""
    return "\n\n".join(["Examples:", *(f"* `{command}`" for command in commands)])


def usable_device(name: str) -> str:
    """The device that --device names, "auto" resolved."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FormatError(f"--device {name}: not a device ({str(error).splitlines()[0]})") from error
    if device.type not in ("cpu", "cuda"):
        raise FormatError(f"--device {name}: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FormatError(f"--device {name}: no CUDA GPU is usable here; use --device cpu")
    return name


def emit(as_json: bool, data: Callable[[], dict[str, Any]], show: Callable[[Console], None]) -> None:
    """Print a result, as JSON or for people; where no terminal's width is to be kept to, names stay whole, for grep."""
    if as_json:
        print(json.dumps(data(), indent=2, ensure_ascii=False))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, 250)
        show(console)


def warn(message: str) -> None:
    """Say something on stderr."""
    Console(stderr=True).print(f"[yellow]warning:[/] {message}", highlight=False)


def fail(message: str, as_json: bool) -> NoReturn:
    """End with exit code 2."""
    if as_json:
        print(json.dumps({"error": message}, ensure_ascii=False))
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(2)


def escape(message: str) -> str:
    """Text that rich prints as it is; what a terminal would take for a command is shown instead of done."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message))


@contextlib.contextmanager
def errors(as_json: bool, ranks: Ranks | None = None) -> Iterator[None]:
    """Bad input becomes one message and exit code 2; of several ranks, those say it that should."""
    try:
        yield
    except (HalfbyteError, OSError) as error:
        if ranks is not None and not ranks.speaks:
            raise typer.Exit(2) from error
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        fail(message, as_json and (ranks is None or ranks.rank == 0))


class _Stopped(BaseException):
    """A signal that ends the process, as an exception: files are closed, and what is kept is said."""


@contextlib.contextmanager
def resumable(work: Path, is_interrupted: Callable[[Path], bool], speaks: bool = True) -> Iterator[None]:
    """Whatever stops the command, Ctrl-C and SIGTERM included, ends with how to go on, if that is possible."""
    from .checkpoint.journal import comes_again

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in known} if in_main else {}
    try:
        yield
    except BaseException as error:
        if speaks and is_interrupted(work) and not comes_again(error):
            arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
            command = shlex.join(["halfbyte", *arguments, "--resume"])
            text = f"stopped; what is finished is kept in {escape(str(work))}. Go on with: {escape(command)}"
            Console(stderr=True, soft_wrap=True).print(text, highlight=False)
        if isinstance(error, _Stopped):
            raise typer.Exit(128 + error.args[0]) from error
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(128 + signal.SIGINT) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(title: str, total: int | None, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar that counts bytes, where someone looks at it."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done."""
    with Console(stderr=True).status(text) as status:
        yield status.update
