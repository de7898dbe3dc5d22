"""Tables of numbers for people: one type that becomes Markdown, CSV and HTML.

A table holds plain values; how they are rounded is decided where they are shown. CSV keeps all
digits, Markdown and HTML show a mean with its standard deviation, to two digits of the latter.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


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
    """Named columns and rows of plain values: strings, integers, floats, `Spread` or None.

    Parameters
    ----------
    name, title, note : str
        Short name, that of its files; one line above it; one or two sentences below it.
    columns : tuple of str
        Headers, with units.
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
            _line([shown(cell, self.digits).replace("|", "\\|") for cell in row])
            for row in self.rows
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
        cells = ([shown(cell, self.digits) for cell in row] for row in self.rows)
        body = "\n".join(line(row, "td") for row in cells)
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def csv(self) -> str:
        """All digits; a mean with spread fills three columns (value, `_sd`, `_n`)."""
        columns = range(len(self.columns))
        spread = [any(isinstance(row[k], Spread) for row in self.rows) for k in columns]
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

    def _html_class(self, column: int, left: bool) -> str:
        """`number` and `text` stay on one line, `words` may break."""
        longest = max((len(shown(row[column], self.digits)) for row in self.rows), default=0)
        return "number" if not left else "words" if longest > 24 else "text"

    def _left_aligned(self) -> list[bool]:
        """Whether a column holds text."""
        return [
            any(isinstance(row[k], str) for row in self.rows) or not self.rows
            for k in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Row:
    """One quantity, and its value for each model (or pair of these): a row of `rows_table`."""

    label: str
    values: Mapping[str, Cell]


def rows_table(
    name: str,
    title: str,
    rows: Sequence[Row],
    note: str = "",
    *,
    labels: Mapping[str, str] | None = None,
    deviations_from: str = "",
) -> Table | None:
    """Table of quantities against models, in order of first appearance; None without rows.

    `labels` say what to call some models. From the model `deviations_from`, if it is there, the
    deviations of the others are added in percent.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    if not keys:
        return None
    shown = {key: (labels or {}).get(key, key) for key in keys}
    others = [k for k in keys if k != deviations_from] if deviations_from in keys else []
    body = []
    for row in rows:
        origin = row.values.get(deviations_from)
        changes = [_deviation(row.values.get(key), origin) for key in others]
        body.append((row.label, *(row.values.get(key) for key in keys), *changes))
    columns = (*shown.values(), *(f"{shown[k]} − {shown[deviations_from]} (%)" for k in others))
    return Table(name, title, ("Quantity", *columns), tuple(body), note, 4)


def _deviation(value: Cell, origin: Cell) -> float | None:
    if not isinstance(value, int | float) or not isinstance(origin, int | float) or not origin:
        return None
    return 100.0 * (value - origin) / abs(origin)


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


def signed(value: float) -> str:
    """A number of two digits with its sign."""
    return f"{'−' if value < 0 else '+'}{number(abs(value), 2)}"


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
