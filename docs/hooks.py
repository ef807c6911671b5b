"""What MkDocs does not do by itself: pages from outside `docs/`, and formulas without JavaScript.

Pages link to `../benchmarks/results/NAME.md` as the repository has them, so that the links work there too. The site has
no folder above its own: those files come into it under their own paths, and links out of `docs/` lose the step up.
"""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FROM_OUTSIDE = ("CHANGELOG.md", *(f"benchmarks/results/*.{kind}" for kind in ("jsonl", "md", "png")))
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_files(files: Files, config: Any) -> Files:
    """Add the records and the changelog to the site."""
    for pattern in FROM_OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that climb out of `docs/` stop at its root, and those of records find it there."""
    depth = page.file.src_uri.count("/")
    markdown = markdown.replace("](" + "../" * depth + "docs/", "](" + "../" * depth)
    return re.sub(rf"\]\((?:\.\./){{{depth + 1}}}(?=CHANGELOG|benchmarks/results/)", "](" + "../" * depth, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script or a font from elsewhere."""

    def replace(found: re.Match[str]) -> str:
        formula = found[3]
        for entity, character in ENTITIES.items():
            formula = formula.replace(entity, character)
        return convert(formula, display="block" if found[2] == "[" else "inline")

    return FORMULA.sub(replace, html)
