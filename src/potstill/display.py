"""What workflows tell the user: lines, tables, progress. `Display` itself keeps silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Task:
    """One piece of work on a display."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Show progress and a short note."""


class Display:
    """Receives the messages of a workflow; this one is silent."""

    def say(self, text: str) -> None:
        """Show a line."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table."""

    @contextmanager
    def task(self, title: str, total: float | None = None) -> Iterator[Task]:
        """Show the progress of a task while it runs."""
        yield Task()


def seconds_in_words(seconds: float) -> str:
    """Write a duration: `45 s`, `3.5 min`, `2.1 h`."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.1f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"
