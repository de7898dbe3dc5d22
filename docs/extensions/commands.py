"""Write the command reference into docs/commands.md: `python docs/extensions/commands.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from potstill.cli import app

PAGE, MARK = Path(__file__).parents[1] / "commands.md", "<!-- commands: written by a script -->\n"


def page() -> str:
    """The page with the reference of today's commands."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + reference() + "\n"


def reference() -> str:
    """All commands in Markdown, grouped as in `potstill --help`."""
    named = dict(_commands(typer.main.get_command(app), "potstill"))
    names = {command: name for name, command in named.items()}
    panels = list(dict.fromkeys(command.rich_help_panel for command in named.values()))
    parts, panel = [], None
    for command in sorted(
        named.values(), key=lambda command: panels.index(command.rich_help_panel)
    ):
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            parts.append(f"## {panel}")
        parts += [f"### {names[command]}", _prose(command.help)]
        parameters = [p for p in command.params if "--help" not in p.opts]
        rows = [f"| {_names(p)} | {_cell(p.help)} |" for p in parameters]
        parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Commands of a group, and of the groups in it, by their full names."""
    for command in group.commands.values():
        own = f"{name} {command.name}"
        yield from _commands(command, own) if hasattr(command, "commands") else [(own, command)]


def _prose(text: str | None) -> str:
    """Help text with its headings in bold and its indented lines as one block of commands."""
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"**\1**", inspect.cleandoc(text or ""))
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        code = paragraph.startswith("  ")
        if code and paragraphs and paragraphs[-1].endswith("```"):
            paragraphs[-1] = f"{paragraphs[-1][:-3]}{inspect.cleandoc(paragraph)}\n```"
        elif code:
            paragraphs.append(f"```bash\n{inspect.cleandoc(paragraph)}\n```")
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.name.upper()
        return f"`{name}`" if parameter.required else f"`[{name}]`"
    return ", ".join(f"`{name}`" for name in parameter.opts)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
