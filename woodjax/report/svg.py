"""A matplotlib picture as SVG that stands in a page: its text is text, and takes the page's colours."""

import io
import re
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from woodjax.plots.layers import BLUE

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "woodjax", "font.size": 9.0}
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def inline_svg(draw: Callable[[Axes], object], *, prefix: str, label: str, size: tuple[float, float]) -> str:
    """Draw, and write the picture as an `<svg>` element.

    Args:
        draw: Draws on the axes that it is given.
        prefix: Put before every id, so that pictures of one page do not share any.
        label: What a reader who does not see the picture is told.
        size: Width and height in inches of the drawing; the page scales it.

    Returns:
        The element, without namespaces, fonts or anything outside the page.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a page looks alike whatever style the caller draws in
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(written.getvalue())
    for parent in [*root.iter()]:  # its style sheet would be that of the whole page
        for child in [c for c in parent if c.tag == f"{SVG}style" or c.tag == f"{SVG}metadata"]:
            parent.remove(child)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        element.attrib = {
            key: value for key, value in (_attribute(*pair, prefix, used) for pair in element.attrib.items()) if key
        }
        if element.tag != "text" and element.tag != "tspan":
            element.text = None
    shape = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    # Black text and faces carry no colour of their own in matplotlib's SVG: they take the page's.
    root.attrib = {**shape, "fill": "currentColor", "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


def _references(value: str) -> list[str]:
    return re.findall(r"url\(#([^)]+)\)", value) + re.findall(r"^#(.+)$", value)


def _attribute(key: str, value: str, prefix: str, used: set[str]) -> tuple[str, str]:
    if key == "id":
        return (key, f"{prefix}-{value}") if value in used else ("", "")
    if key == LINK:
        return "href", f"#{prefix}-{value[1:]}" if value.startswith("#") else "".join(value.split())
    value = value.replace("url(#", f"url(#{prefix}-").replace("stroke: #000000", "stroke: currentColor")
    value = re.sub(r" ?font-family: [^;]*;?", "", value).replace(BLUE, "var(--blue)")
    return key, " ".join(value.split())
