"""Around the commands: their registration, errors in one sentence, the display."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TextIO, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from potstill.display import Display, Task, seconds_in_words
from potstill.errors import PotstillError
from potstill.process import tune_process

P = ParamSpec("P")
T = TypeVar("T")

#: Called before a command does its work. Only the entry point may restart the process: whoever
#: calls `app` from Python has one of their own.
BEFORE_WORK: list[Callable[[], None]] = []

#: Exit codes: a mistake that the user can fix; an interruption.
MISTAKE, INTERRUPTED = 2, 130


class RichDisplay(Display):
    """Progress bars with time left on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, highlight=False, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table; a header without words is left out."""
        table = Table(title=escape(title) or None, title_justify="left", show_header=any(columns))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*[escape(str(cell)) for cell in row])
        self.console.print(table)

    @contextmanager
    def task(self, title: str, total: float | None = None) -> Iterator[Task]:
        """Show a progress bar; its last state stays as a line."""
        if not self.console.is_terminal:
            with _Lines(self, title, total) as task:
                yield task
            return
        with Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        ) as progress:
            bar = progress.add_task(title, total=total, note="")
            yield _Bar(progress, bar)
            whole = progress.tasks[0].total
            progress.update(bar, total=whole or 1, completed=whole or 1)


class _Bar(Task):
    """A bar of rich."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress, self._bar = progress, bar

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Move the bar."""
        self._progress.update(self._bar, completed=done, total=total, note=note)


class _Lines(Task):
    """A line at the start, one every half minute, and one at the end: for logs."""

    EVERY = 30.0

    def __init__(self, display: RichDisplay, title: str, total: float | None) -> None:
        self._display, self._title, self._total = display, title, total
        self._began = self._last = time.monotonic()
        self._note = ""

    def __enter__(self) -> _Lines:
        self._display.say(f"{self._title} ...")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        words = "done" if kind is None else "stopped"
        taken = seconds_in_words(time.monotonic() - self._began)
        note = f" ({self._note})" if self._note else ""
        self._display.say(f"{self._title}: {words} after {taken}{note}")

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Print a line if the last is half a minute old."""
        self._note, total = note, total or self._total
        now = time.monotonic()
        if now - self._last < self.EVERY or not total:
            return
        self._last = now
        left = (now - self._began) * (total - done) / done if done else 0.0
        words = f", about {seconds_in_words(left)} left" if done else ""
        tail = f": {note}" if note else ""
        self._display.say(f"  {100.0 * done / total:3.0f} %{words}{tail}")


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print potstill's own errors as one sentence and exit; all others keep their traceback."""
    console = Console(stderr=True)
    try:
        yield
    except PotstillError as error:
        console.print(
            f"potstill: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt:
        console.print("potstill: interrupted; run the same command again to resume", style="yellow")
        raise typer.Exit(INTERRUPTED) from None


def quiet_warnings(console: Console) -> None:
    """Show warnings as one line without the place in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning):
            console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    warnings.showwarning = show


app = typer.Typer(
    name="potstill",
    help="""Distill accurate interatomic potentials into fast ones.

    A teacher (any potential) labels structures, a small student learns from the labels, and the
    student runs in ASE and LAMMPS.

    Start with: [bold]potstill distill[/bold]
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
display = RichDisplay(Console())


def main() -> None:
    """Entry point of the command `potstill`."""
    BEFORE_WORK.append(tune_process)
    app()


def command(
    panel: str, *, name: str | None = None, within: typer.Typer = app
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register a command, of `potstill` or of a group, which ends with one sentence on mistakes.

    Only a command that does its work restarts the process. The lines of each paragraph of its help
    are joined, to fill any width.
    """

    def register(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def work(*args: P.args, **kwargs: P.kwargs) -> T:
            for prepare in BEFORE_WORK:
                prepare()
            with one_sentence():
                return function(*args, **kwargs)

        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)
        within.command(name, help=text, rich_help_panel=panel)(work)
        return function

    return register
