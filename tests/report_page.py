# SPDX-License-Identifier: Apache-2.0
"""A report's page and its Markdown, read back."""

import re
from html.parser import HTMLParser
from pathlib import Path

from merit_ds.lab.report import write_report

BEST = "0.8M, 9.83 M tokens: final validation loss (nats a token)"
"""The caption of the best losses in `synthetic_study`'s report."""


class Page(HTMLParser):
    """Tables as lists of rows of texts, by caption; links, ids, images and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._text = ""
        self._caption = ""
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.attributes |= attributes.keys()
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes["src"])
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("caption", "td", "th", "summary"):
            self._text = ""

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        if tag in ("caption", "summary"):
            self._caption = self._text
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append(self._text)


def markdown_table(text: str, title: str) -> list[list[str]]:
    block = text.split(f"**{title}**\n\n", 1)[1].split("\n\n", 1)[0]
    rows = [line[2:-2].split(" | ") for line in block.split("\n") if not line.startswith("|---")]
    return [[re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", entry).replace("**", "") for entry in row] for row in rows]


def report(study: Path, **arguments) -> tuple[Page, str]:
    output = study / "report"
    write_report([study], output=output, **arguments)
    return Page(output / "report.html"), (output / "report.md").read_text()
