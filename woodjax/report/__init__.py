"""One page that says what a pruning did: `report(before, after, masks, info)`.

It needs matplotlib, and so the extra `examples`; `import woodjax` does not import it.
"""

from woodjax.report.build import report
from woodjax.report.page import Page

__all__ = ["Page", "report"]
