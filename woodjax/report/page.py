"""The page: one HTML file with everything in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path

from woodjax.report.markup import Section


@dataclass(frozen=True)
class Page:
    """A report. Nothing in it is loaded from elsewhere, and no script runs.

    Attributes:
        html: The whole document.
    """

    html: str

    def save(self, file: str | PathLike[str]) -> Path:
        """Write the page.

        Args:
            file: Where to; its folder exists.

        Returns:
            The file.
        """
        path = Path(file)
        path.write_text(self.html, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # In a frame: the notebook's style and the page's do not meet.
        style = "width: 100%; height: 48rem; border: 1px solid #8888"
        return f'<iframe title="Pruning report" sandbox style="{style}" srcdoc="{escape(self.html)}"></iframe>'


def make_page(title: str, notes: str, sections: Sequence[Section]) -> Page:
    """Put sections together.

    Args:
        title: Of the page.
        notes: A paragraph below the title; lines that are empty separate paragraphs.
        sections: In their order; the first stands without a heading.

    Returns:
        The page.
    """
    style = files("woodjax.report").joinpath("page.css").read_text(encoding="utf-8")
    head, *others = sections
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a> ' for section in others)
    paragraphs = "".join(f"<p>{escape(text.strip())}</p>" for text in notes.split("\n\n") if text.strip())
    bodies = "".join(
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{escape(section.title)}</h2>{section.body}</section>\n'
        for section in others
    )
    return Page(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>{paragraphs}</header>\n"
        f'<main>\n<section id="{head.name}" aria-label="{escape(head.title)}">{head.body}</section>\n'
        f'<nav aria-label="Sections">{links}</nav>\n{bodies}</main>\n</body>\n</html>\n'
    )
