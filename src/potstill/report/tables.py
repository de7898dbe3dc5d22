"""Tables of numbers for people: one type that becomes Markdown, CSV and HTML.

A table holds plain values; how they are rounded is decided where they are shown. CSV keeps all
digits, Markdown and HTML show a mean with its standard deviation, to two digits of the latter.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from potstill.units import GPA


@dataclass(frozen=True)
class Metric:
    """How one metric is shown.

    Parameters
    ----------
    key : str
        Its key in the numbers.
    name : str
        In words, as the start of a label.
    unit : str
        Unit that is shown; "" for pure numbers.
    scale : float
        The number shown per number stored.
    lower_is_better : bool
        False for cosines and EFwT.
    """

    key: str
    name: str
    unit: str = ""
    scale: float = 1.0
    lower_is_better: bool = True

    @property
    def label(self) -> str:
        """Name and unit, for axes and columns."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


_SHOWN = (
    Metric("forces_rmse", "Force RMSE", "eV/Å"),
    Metric("forces_mae", "Force MAE", "eV/Å"),
    Metric("forces_relative_rmse", "Rel. force RMSE", "%", 100.0),
    Metric("forces_cosine", "Force cosine", lower_is_better=False),
    Metric("energy_per_atom_rmse", "Energy RMSE", "meV/atom", 1e3),
    Metric("energy_per_atom_mae", "Energy MAE", "meV/atom", 1e3),
    Metric("energy_rmse", "Total energy RMSE", "eV"),
    Metric("energy_mae", "Total energy MAE", "eV"),
    Metric("atomic_energies_rmse", "Atomic energy RMSE", "meV", 1e3),
    Metric("atomic_energies_mae", "Atomic energy MAE", "meV", 1e3),
    Metric("stress_rmse", "Stress RMSE", "GPa", 1.0 / GPA),
    Metric("stress_mae", "Stress MAE", "GPa", 1.0 / GPA),
    Metric("efwt", "EFwT", "%", lower_is_better=False),
    Metric("rdf_error", "RDF error", "Å"),
    Metric("rdf_error_reference", "RDF error to the reference", "Å"),
    Metric("time_per_step_atom_us", "Time per step and atom", "µs"),
    Metric("memory_per_atom_kib", "Memory per atom", "KiB"),
)

#: Metrics by key: those of `potstill.metrics`, and those of whole studies.
METRICS: dict[str, Metric] = {metric.key: metric for metric in _SHOWN}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over repetitions.

    Parameters
    ----------
    mean : float
        NaN without repetitions.
    deviation : float
        Sample standard deviation (n - 1); NaN with fewer than two repetitions.
    n : int
        Repetitions.
    """

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Over all values that are finite."""
        finite = [float(v) for v in values if v is not None and math.isfinite(v)]
        return cls(
            statistics.fmean(finite) if finite else math.nan,
            statistics.stdev(finite) if len(finite) > 1 else math.nan,
            len(finite),
        )

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.mean * factor, self.deviation * abs(factor), self.n)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        if math.isnan(self.deviation) or self.deviation == 0:
            return number(self.mean)
        places = max(0, 1 - math.floor(math.log10(self.deviation)))
        return f"{self.mean:.{places}f} ± {self.deviation:.{places}f}"


Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values.

    Parameters
    ----------
    name : str
        Short name: that of its files.
    title : str
        One line above it.
    columns : tuple of str
        Headers, with units.
    rows : tuple of tuple
        Strings, integers, floats, `Spread` or None.
    note : str
        One or two sentences below it.
    digits : int
        Significant digits of numbers without a spread.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    digits: int = 3

    def markdown(self) -> str:
        """As a Markdown table with title and note."""
        align = ["---" if left else "---:" for left in self._left_aligned()]
        lines = [f"**{self.title}**", "", _line(self.columns), _line(align)]
        lines += [
            _line([self._shown(cell).replace("|", "\\|") for cell in row]) for row in self.rows
        ]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def html(self) -> str:
        """As an HTML table; all text is escaped."""
        classes = [self._html_class(k, left) for k, left in enumerate(self._left_aligned())]

        def line(cells: Sequence[str], tag: str) -> str:
            inner = (  # the word joiner keeps units such as eV/Å on one line
                f'<{tag} class="{kind}">{escape(cell).replace("/", "/&#8288;")}</{tag}>'
                for kind, cell in zip(classes, cells, strict=True)
            )
            return f"<tr>{''.join(inner)}</tr>"

        head = line(self.columns, "th")
        body = "\n".join(line([self._shown(cell) for cell in row], "td") for row in self.rows)
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def csv(self) -> str:
        """All digits; a mean with spread fills three columns (value, `_sd`, `_n`)."""
        spread = [any(isinstance(row[k], Spread) for row in self.rows) for k in range(self._width)]
        header: list[str] = []
        for column, wide in zip(self.columns, spread, strict=True):
            header += [column, f"{column} sd", f"{column} n"] if wide else [column]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            cells: list[str] = []
            for cell, wide in zip(row, spread, strict=True):
                cells += _wide_cells(cell) if wide else [_exact(cell)]
            writer.writerow(cells)
        return out.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write `<name>.csv` and `<name>.md` into a folder."""
        paths = [folder / f"{self.name}.csv", folder / f"{self.name}.md"]
        for path, text in zip(paths, (self.csv(), self.markdown()), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    @property
    def _width(self) -> int:
        return len(self.columns)

    def _html_class(self, column: int, left: bool) -> str:
        """`number` and `text` stay on one line, `words` may break."""
        longest = max((len(self._shown(row[column])) for row in self.rows), default=0)
        return "number" if not left else "words" if longest > 24 else "text"

    def _shown(self, cell: Cell) -> str:
        return shown(cell, self.digits)

    def _left_aligned(self) -> list[bool]:
        """Whether a column holds text."""
        return [
            any(isinstance(row[k], str) for row in self.rows) or not self.rows
            for k in range(self._width)
        ]


def number(value: float, digits: int = 3) -> str:
    """Round to significant digits, without exponents where these would not help reading."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 <= size < 7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def shown(cell: Cell, digits: int = 3) -> str:
    """One cell as people read it."""
    if cell is None:
        return "–"
    if isinstance(cell, bool | str | Spread):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else number(cell, digits)


def _exact(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return repr(cell) if isinstance(cell, float) else str(cell)


def _wide_cells(cell: Cell) -> list[str]:
    if isinstance(cell, Spread):
        return [_exact(cell.mean), _exact(cell.deviation), str(cell.n)]
    return [_exact(cell), "", ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
