# SPDX-License-Identifier: Apache-2.0
"""A report's parts, and how they become one HTML page and one Markdown file.

The page loads nothing: pictures are embedded, there is no script, links are relative to the page's folder.
"""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Cell:
    """A table's entry: pieces of text, each with its link or none."""

    parts: tuple[tuple[str, str | None], ...]
    strong: bool = False
    colour: str | None = None
    """Of a swatch before the text."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False
    """Shown at a click on its title."""


@dataclass(frozen=True)
class Plot:
    """A picture that is drawn when the report is written."""

    name: str
    """Of the PNG, without the suffix."""
    caption: str
    draw: Callable[[], Any]
    """Returns a matplotlib figure."""


@dataclass(frozen=True)
class Details:
    """A part that opens at a click: pairs of names and cells, and files shown as they are."""

    anchor: str
    summary: Cell
    facts: Sequence[tuple[str, Cell]] = ()
    files: Sequence[tuple[str, str]] = ()


@dataclass
class Section:
    """A headed part of the report; left out where it has nothing to show."""

    title: str
    anchor: str
    text: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parts: list[Table | Plot] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)


def cell(text: object, link: str | None = None, *, strong: bool = False, colour: str | None = None) -> Cell:
    """A cell of one piece."""
    return Cell(((str(text), link),), strong=strong, colour=colour)


def render_html(sections: Sequence[Section], *, title: str, lead: str, images: dict[str, bytes]) -> str:
    """The page.

    Args:
        images: name of a Plot to its PNG.
    """
    entries = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(_html_section(section, images) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_style()}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f'<nav aria-label="Contents"><ul>{entries}</ul></nav>\n<main>{body}</main></body></html>\n'
    )


def render_markdown(sections: Sequence[Section], *, title: str, lead: str) -> str:
    """The same texts and tables, with the pictures as files beside it."""
    blocks = [f"# {_md(title)}", _md(lead)]
    for section in sections:
        if section.details and not section.parts:
            continue
        blocks.append(f"## {_md(section.title)}")
        blocks += [_md(text) for text in section.text]
        blocks += [f"> **Note:** {_md(text)}" for text in section.warnings]
        for part in section.parts:
            blocks.append(_markdown_table(part) if isinstance(part, Table) else _markdown_plot(part))
    return "\n\n".join(blocks) + "\n"


def _style() -> str:
    return (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def _html_section(section: Section, images: dict[str, bytes]) -> str:
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in section.text)
    items = "".join(f"<li>{escape(warning)}</li>" for warning in section.warnings)
    warnings = f'<ul class="warnings">{items}</ul>' if items else ""
    parts = "".join(
        _html_table(part) if isinstance(part, Table) else _html_plot(part, images[part.name]) for part in section.parts
    )
    details = "".join(_html_details(item) for item in section.details)
    return (
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{text}{warnings}{parts}{details}</section>\n'
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_html_cell(entry)}</td>' for entry in row)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    caption = "" if table.folded else f"<caption>{escape(table.title)}</caption>"
    whole = (
        f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}'
    )
    return f"<details><summary>{escape(table.title)}</summary>{whole}</details>" if table.folded else whole


def _html_cell(entry: Cell) -> str:
    text = "".join(escape(t) if link is None else f'<a href="{_url(link)}">{escape(t)}</a>' for t, link in entry.parts)
    swatch = f'<span class="swatch" style="background:{escape(entry.colour)}"></span>' if entry.colour else ""
    return f"{swatch}<strong>{text}</strong>" if entry.strong else f"{swatch}{text}"


def _html_plot(plot: Plot, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure id="{plot.name}"><img alt="{escape(plot.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _html_details(item: Details) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{_html_cell(entry)}</dd>" for name, entry in item.facts)
    files = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in item.files
    )
    return (
        f'<details class="run" id="{escape(item.anchor)}"><summary>{_html_cell(item.summary)}</summary>'
        f"{f'<dl>{facts}</dl>' if facts else ''}{files}</details>"
    )


def _markdown_table(table: Table) -> str:
    lines = [f"**{_md(table.title)}**", "", "| " + " | ".join(_md(column) for column in table.columns) + " |"]
    lines.append("|" + "---|" * len(table.columns))
    lines += ["| " + " | ".join(_markdown_cell(entry) for entry in row) + " |" for row in table.rows]
    return "\n".join(lines + (["", _md(table.note)] if table.note else []))


def _markdown_cell(entry: Cell) -> str:
    # An anchor leads into the HTML page; Markdown has no such place.
    text = "".join(
        _md(text) if link is None or link.startswith("#") else f"[{_md(text)}]({_url(link)})"
        for text, link in entry.parts
    )
    return f"**{text}**" if entry.strong else text


def _markdown_plot(plot: Plot) -> str:
    return f"![{_md(plot.caption)}]({plot.name}.png)\n\n*{_md(plot.caption)}*"


def _md(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return re.sub(r"\s+", " ", text)


def _url(link: str) -> str:
    return escape(link if link.startswith("#") else quote(link, safe="/.#-_~"))
