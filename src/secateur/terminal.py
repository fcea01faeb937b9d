"""What the files of the command line share: the application, its consoles, how it stops."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from . import printing

app = typer.Typer(
    help="Prune neural networks, and measure what it brings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
err_console = Console(stderr=True)


def bar(title: str, total: int | None, show: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar on standard error."""
    return printing.bar(err_console, title, total, show)


@contextmanager
def steps(title: str, show: bool) -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error; silent where that is not a terminal."""
    if not (show and err_console.is_terminal):
        yield lambda _: None
        return
    with err_console.status(title) as status:
        yield lambda doing: status.update(escape(doing))


def command() -> str:
    """What the user typed."""
    return shlex.join(["secateur", *sys.argv[1:]])


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C into one sentence; click would only say that it aborted."""
    try:
        yield
    except KeyboardInterrupt:
        fail(message, 130)


def fail(message: str, code: int) -> NoReturn:
    """One sentence on standard error, and the end."""
    err_console.print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
