"""The documentation: its examples run, its links lead somewhere, its reference has every public name once."""

import contextlib
import importlib.util
import io
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import woodjax as wj

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = [page for folder in ("methods", "how_to") for page in sorted((DOCS / folder).glob("*.md"))]
MODULES = [
    *("adapters.linen", "adapters.nnx", "datasets", "linalg", "models"),
    *("plots", "records", "report", "training", "typing"),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """Text without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Anchors of headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def run(page, names):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, name(page), "exec"), names)
    return names


@cache
def concepts():
    return run(DOCS / "concepts.md", {})


def test_concepts():
    names = concepts()
    dense, pruned = (float(names["accuracy"](names[which])) for which in ("params", "pruned"))
    assert dense > 0.95
    assert pruned > 0.85


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples(page):
    run(page, dict(concepts()))


def test_method_pages_have_the_same_headings():
    for page in (DOCS / "methods").glob("*.md"):
        if page.name != "index.md":
            headings = re.findall(r"^## (.*)", prose(page), flags=re.MULTILINE)
            assert headings == ["Formula", "When to use it", "Cost", "Reference", "Example"], name(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    for link in LINK.findall(re.sub(r"`[^`]*`", "", prose(page))):  # brackets of code are not links
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to {link}"


def test_navigation_has_every_page_once():
    listed = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    records = {name(page) for page in (ROOT / "benchmarks" / "results").glob("*.md")}
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages | records | {"CHANGELOG.md"})


def public_names():
    """Names of `woodjax`, and those of its public modules that it does not have."""
    for module in MODULES:
        found = importlib.import_module(f"woodjax.{module}")
        own = [key for key, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__]
        for key in getattr(found, "__all__", own):
            if not key.startswith("_") and getattr(wj, key, None) is not getattr(found, key):
                yield f"{module}.{key}"
    yield from wj.__all__


def test_reference_has_every_public_name_once():
    listed = [
        entry
        for page in sorted((DOCS / "api").glob("*.md"))
        for entry in re.findall(r"^::: woodjax\.(\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    wanted = set(public_names())
    assert len(listed) == len(set(listed))
    assert sorted(wanted - set(listed)) == []
    for entry in set(listed) - wanted:  # names of other kinds: aliases of types, functions from private files
        module, _, key = entry.rpartition(".")
        assert module in MODULES, f"{entry} is not public"
        assert hasattr(importlib.import_module(f"woodjax.{module}"), key)


def test_names_in_the_text_exist():
    for page in PAGES:
        for used in re.findall(r"\b(?:wj|woodjax)\.([a-z_A-Z0-9]+)\b(?!/)", page.read_text()):
            known = hasattr(wj, used) or importlib.util.find_spec(f"woodjax.{used}")
            assert known, f"{name(page)}: woodjax.{used}"


def test_floors_are_those_that_are_checked():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    checked = [{part.strip() for part in layer.split("|")} - {"__main__"} for layer in layers]
    table = prose(DOCS / "architecture.md").split("| floor | files |")[1].split("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)/?`", row)) for row in table.splitlines()[2:]]
    places = {file: place for place, files in enumerate(rows) for file in files}
    in_order = [sorted(places[file] for file in layer) for layer in checked if layer]
    assert set(places) == set.union(*checked)
    assert [place for layer in in_order for place in layer] == sorted(places.values())
