"""Masks that meet a budget: multiply-adds, parameters, or any cost that adds up over the weights."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.masks import protect_highest
from woodjax.placement import on_any_axes
from woodjax.ranking import LARGEST_COST, Cost, fewest_that_cost, ranked_leaves
from woodjax.tree import path_name
from woodjax.typing import Masks, Scores

FLOAT_ROUNDING = Fraction(1, 2**52)  # of a budget that was written in decimals: 0.85 of 40 is 34


@checked
@on_any_axes
def budget_masks(
    scores: Scores,
    costs: Any,
    budget: float,
    *,
    power: float = 1.0,
    previous: Masks | None = None,
    floor: float = 0.0,
) -> Masks:
    """Prune until what is left costs no more than a budget.

    Weights go in the order of `score / cost**power`, by one threshold for all leaves: as few as bring the cost of the
    others to the budget, which is missed by less than the cost of one weight.

    Args:
        scores: A params-tree of floats: low = prune first, `+inf` = never prune. Scores over groups, as
            `group_scores` gives them, are ranked in the same way; see `expand_group_masks`.
        costs: A params-tree with one number for each leaf: what each of its entries costs, as `weight_macs` gives it
            (times the size of the groups for scores over groups). Ones for a budget of parameters. Entries that cost
            nothing are kept.
        budget: Fraction of the dense cost that may stay, in (0, 1]. The dense cost is that of all entries,
            those that score `+inf` too: these stay, and cost.
        power: How much the cost of a weight counts in the order: 1 ranks by loss increase per cost, 0 by the score
            alone, WoodFisher takes 0.3.
        previous: Masks of an earlier step: what they pruned stays pruned and costs nothing.
        floor: Every leaf keeps at least the `ceil(floor · n)` highest of its `n` scores, as in `make_masks`.

    Returns:
        A params-tree of bool, True = survives. Under `jit`, where the budget cannot be met all goes that may go.

    Raises:
        ValueError: Costs that are not one finite number a leaf, or negative, or all zero; a budget outside (0, 1],
            or below what scores `+inf` or the floor keep (outside `jit`); as `make_masks`.

    Cost:
        64 passes over the scores. Integers are summed exactly, up to a dense cost of 2⁴⁰ in units of their greatest
        common divisor; other costs, and larger sums, are rounded to one part in 2⁴⁰ of the dense cost.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), FLOPs-aware pruning, with the power; the ranking by
        loss per cost is the greedy rule of the knapsack problem.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> scores = {"conv": jnp.array([1.0, 2.0, 3.0, 4.0]), "head": jnp.array([0.5, 0.6])}
        >>> masks = wj.budget_masks(scores, {"conv": 10, "head": 1}, 0.6)  # 25 of 42
        >>> masks["conv"].tolist(), masks["head"].tolist()
        ([False, False, True, True], [True, True])
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}: it is the fraction of the dense cost that may stay, in (0, 1].")
    if not (math.isfinite(power) and power >= 0):
        raise ValueError(f"power is {power}: pass 0 or a positive number.")
    names, leaves = ranked_leaves(scores, previous)
    each = _numbers(scores, costs)
    units, allowed = _in_units(each, [leaf.size for leaf in leaves], budget)
    try:
        worth = [float(cost) ** power if cost else 0.0 for cost in each]
    except OverflowError as error:
        raise ValueError(f"power is {power}: costs to that power overflow, pass a smaller one.") from error
    shares = [_per_cost(leaf, cost) for leaf, cost in zip(leaves, worth, strict=True)]
    _, rows = protect_highest(names, [share.reshape(1, -1) for share in shares], floor)
    dense = sum(unit * leaf.size for unit, leaf in zip(units, leaves, strict=True))
    pruned = fewest_that_cost([row[0] for row in rows], Cost.of(dense - allowed), tuple(units))
    counts = [jnp.sum(mark, dtype=jnp.int32) for mark in pruned]
    if not any(isinstance(count, jax.core.Tracer) for count in counts):
        left = dense - sum(unit * int(count) for unit, count in zip(units, counts, strict=True))
        if left > allowed:
            raise ValueError(
                f"budget is {budget}: weights that may not be pruned cost {left / dense:.6f} of the dense network. "
                "Raise the budget, lower the floor, or let more leaves be pruned."
            )
    masks = [~mark.reshape(leaf.shape) for mark, leaf in zip(pruned, leaves, strict=True)]
    tree = jax.tree.unflatten(jax.tree.structure(scores), masks)
    return tree if previous is None else jax.tree.map(jnp.logical_and, tree, previous)


def _numbers(scores: Scores, costs: Any) -> list[Fraction]:
    if jax.tree.structure(costs) != jax.tree.structure(scores):
        raise ValueError("costs have another tree structure than scores: pass one number for each leaf.")
    found = []
    for path, cost in jax.tree_util.tree_leaves_with_path(costs):
        name = path_name(path)
        if isinstance(cost, jax.core.Tracer) or jnp.ndim(cost) != 0:
            raise ValueError(f"costs: leaf '{name}' is no plain number: pass what each weight of the leaf costs.")
        number = cost.item() if hasattr(cost, "item") else cost
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"costs: leaf '{name}' is {number}: pass a finite number, 0 or more.")
        found.append(Fraction(number))
    if not any(found):
        raise ValueError("costs are all zero: there is nothing that a budget could be a fraction of.")
    return found


def _in_units(costs: list[Fraction], sizes: list[int], budget: float) -> tuple[list[int], int]:
    """Costs as integers that sum up to `LARGEST_COST` at most, and how many of these units the budget allows."""
    dense = sum(cost * size for cost, size in zip(costs, sizes, strict=True))
    unit = Fraction(
        math.gcd(*(cost.numerator * math.lcm(*(c.denominator for c in costs)) // cost.denominator for cost in costs)),
        math.lcm(*(c.denominator for c in costs)),
    )
    unit = max(unit, dense / (LARGEST_COST - sum(sizes)))  # rounding adds half a unit to each at most
    units = [round(cost / unit) for cost in costs]
    total = sum(whole * size for whole, size in zip(units, sizes, strict=True))
    return units, math.floor(Fraction(budget) * (1 + FLOAT_ROUNDING) * total)


def _per_cost(leaf: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    if divisor == 0:
        return jnp.full_like(leaf, jnp.inf)  # to prune what costs nothing saves nothing
    return jnp.where(jnp.isfinite(leaf), leaf / divisor, leaf)
