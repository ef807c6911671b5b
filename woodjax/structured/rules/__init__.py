"""How channels go through each primitive: what is tied to what, and how it runs on fewer."""

from woodjax.structured.rules import elementwise, moves, products, shapes
from woodjax.structured.rules.products import parts_of
from woodjax.structured.rules.rule import Counts, Rule, Spread, Wanted, as_they_are

RULES: dict[str, Rule] = {**elementwise.RULES, **moves.RULES, **products.RULES, **shapes.RULES}

__all__ = ["RULES", "Counts", "Rule", "Spread", "Wanted", "as_they_are", "parts_of"]
