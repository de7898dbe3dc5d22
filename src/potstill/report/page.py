"""One self-contained HTML page: text, tables, figures, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from potstill import __version__
from potstill.files import write_atomically
from potstill.report.plots import Figure
from potstill.report.tables import Table


@dataclass(frozen=True)
class Fact:
    """One number of the summary box, as in "0.041", "eV/Å", "force RMSE of the student"."""

    value: str
    unit: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with text, figures and tables below it."""

    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def anchor(self) -> str:
        """Name within the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """What a report page says, from top to bottom.

    `about` is shown as a list; verdicts and facts are in the summary box; sections without content
    are left out.
    """

    title: str
    about: tuple[tuple[str, str], ...]
    verdicts: tuple[str, ...]
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]


def write_page(page: Page, path: Path) -> Path:
    """Write HTML with all figures inside, in one step, so that no reader sees half of it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("potstill.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = _embedded
    environment.filters["tidy"] = _tidy
    sections = [s for s in page.sections if s.text or s.figures or s.tables]
    template = environment.get_template("page.html")
    write_atomically(path, template.render(page=page, sections=sections, version=__version__))
    return path


def _tidy(text: str) -> str:
    """Keep numbers and their units, and the sides of small equations, on one line."""
    text = re.sub(r"(?<=\d) (?=(%|[mµ]?eV|µs|Å|GPa|K|ps|fs)\b|%)", "\u00a0", text)
    return text.replace(" = ", "\u00a0=\u00a0").replace(" ± ", "\u00a0±\u00a0")


def _embedded(figure: Figure) -> str:
    """The figure as a data address: SVG, isolated from the ids of the page's other figures."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg.read_bytes()).decode()
