"""Tables, cards and pictures as HTML. What comes from outside goes through `escape`, everywhere."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

NONE = "–"


class Table(NamedTuple):
    """Cells of text; nothing in it is markup."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """A part of the page; its body is markup."""

    name: str
    title: str
    body: str


def table_html(table: Table) -> str:
    """A table that scrolls in itself where the page is narrow, without the columns that say nothing."""
    said = [i for i in range(len(table.header)) if any(row[i] != NONE for row in table.rows)]
    head = "".join(f'<th scope="col">{escape(table.header[i])}</th>' for i in said)
    lines = []
    for row in table.rows:
        first, *others = (escape(row[i]) for i in said)
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>')
    caption = escape(table.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure_html(svg: str, caption: str) -> str:
    """A picture, which is markup, and its caption, which is not."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def cards_html(cards: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: name, number, and a line that says what it is of."""
    items = (
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(number)}</b><span>{escape(of)}</span></dd></div>"
        for name, number, of in cards
    )
    return f'<dl class="cards">{"".join(items)}</dl>'


def paragraphs_html(lines: Sequence[str]) -> str:
    """Sentences, one a paragraph."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def number(value: object, digits: int = 4) -> str:
    """A number as a reader wants it; a dash where there is none (None or NaN)."""
    if value is None or value != value:
        return NONE
    if isinstance(value, float):
        return f"{value:.{digits}g}".replace("-", "−")
    return f"{value:,}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with two decimals; a dash where there is none."""
    return NONE if value is None or value != value else f"{100 * value:.2f} %"
