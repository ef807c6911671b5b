"""Choosing channels for a budget."""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from woodjax.door import checked
from woodjax.structured.channels import ChannelGroups, ChannelScores, Kept

Chosen = dict[str, Bool[np.ndarray, " n"]]


class Selection(NamedTuple):
    """What stays of each group, and which of that has implants."""

    kept: Chosen
    implanted: Chosen


@checked
def select_channels(
    groups: ChannelGroups,
    scores: ChannelScores,
    *,
    ratio: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    cost: tuple[Callable[[Kept, Kept], float], float] | None = None,
    implants: float = 0.0,
    max_ratio: float = 0.95,
    round_to: int = 1,
) -> Selection:
    """Choose which channels stay, lowest scores out first over all groups, until the network fits a budget.

    Args:
        groups: Of the network.
        scores: For each group `[n]`, low = goes first, `+inf` = never. Groups that are left out stay whole. Ties go by
            the order of groups and channels.
        ratio: Budget: fraction of the channels with scores to remove, exactly `round(ratio · channels)` of them; with
            implants, those that get one are among them.
        parameters: Budget: at most this fraction of the numbers in the variables, or this many if above 1.
        macs: Budget: at most this fraction of the multiply-adds, or this many if above 1.
        cost: Budget: a function of what stays and what has implants, such as a latency measured on a device, and its
            limit. It is called about `log₂(channels)` times, and should fall as channels go.
        implants: Fraction of the channels taken out, the ones with the highest scores, that is replaced by implants,
            where a k×k kernel writes them.
        max_ratio: Largest fraction of a group that may go. One channel of every group always stays.
        round_to: Widths of groups are raised to multiples of this by the best of what went, as far as there are any.

    Returns:
        What stays, and what has implants: `make_plan(groups, *selection)`.

    Raises:
        ValueError: No budget or several; one that cannot be reached; scores of another shape, NaN or `-inf`; a
            fraction outside its range.

    Cost:
        A sort, and `log₂(channels)` counts on the host.

    References:
        Yu et al., HAP, 2021 (arXiv 2101.08940), sections 3.2 and 3.3: one ranking, a cap for each layer, implants for
        the most sensitive of what goes.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> chosen = wj.select_channels(groups, {"hidden": jnp.array([3.0, 1.0, 2.0, 4.0])}, macs=0.5)
        >>> chosen.kept["hidden"].tolist()
        [True, False, False, True]
    """
    asked = {"ratio": ratio, "parameters": parameters, "macs": macs, "cost": cost}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Budgets given: {given}. Pass one of ratio, parameters, macs and cost.")
    for name, value, least in (("implants", implants, 0.0), ("max_ratio", max_ratio, 0.0)):
        if not least <= value <= 1:
            raise ValueError(f"{name} is {value}: expected a fraction between 0 and 1.")
    if not isinstance(round_to, (int, np.integer)) or round_to < 1:
        raise ValueError(f"round_to is {round_to}: expected a whole number of channels, 1 or more.")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}: expected a fraction of the channels between 0 and 1.")
    fraction, budget = (0.0, _budget(groups, parameters, macs, cost)) if ratio is None else (ratio, None)
    if not scores:
        raise ValueError("scores are empty: pass scores of one group at least, such as l2_channel_scores(...) makes.")
    order = _removable(groups, scores, max_ratio)

    def first(count: int) -> Selection:
        return _without(groups, order[:count], implants, round_to)

    if budget is None:
        scored = sum(groups[name].size for name in scores)
        count = round(fraction * scored)
        if count > len(order):
            raise ValueError(
                f"ratio is {ratio}, {count} of {scored} channels: max_ratio={max_ratio}, one channel that "
                f"every group keeps and scores of +inf leave {len(order)} to remove."
            )
        return first(count)
    measure, limit = budget
    if measure(first(len(order))) > limit:
        raise ValueError(
            f"The budget {given[0]}={asked[given[0]]} cannot be reached: with all {len(order)} channels removed that "
            f"may be, {measure(first(len(order))):.6g} are left, {limit:.6g} are asked. Raise max_ratio or the budget."
        )
    low, high = -1, len(order)  # high fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(first(middle)) <= limit else (middle, high)
    return first(high)


def _budget(
    groups: ChannelGroups,
    parameters: float | None,
    macs: float | None,
    cost: tuple[Callable[[Kept, Kept], float], float] | None,
) -> tuple[Callable[[Selection], float], float]:
    if cost is not None:
        function, limit = cost
        return lambda chosen: function(chosen.kept, chosen.implanted), limit
    name, wanted, count = (
        ("macs", macs, groups.macs) if macs is not None else ("parameters", parameters, groups.parameters)
    )
    if wanted is None or not wanted > 0:
        raise ValueError(f"{name} is {wanted}: expected a fraction of the whole, at most 1, or a number above 1.")
    limit = wanted * count({}) if wanted <= 1 else wanted
    return lambda chosen: count(chosen.kept, chosen.implanted), limit


def _removable(groups: ChannelGroups, scores: ChannelScores, max_ratio: float) -> list[tuple[str, int]]:
    """Channels in the order in which they go, no more of a group than its cap."""
    names: list[tuple[str, int]] = []
    values = []
    for name in sorted(scores, key=lambda name: groups[name].start):
        group, score = groups[name], np.asarray(scores[name], np.float64)
        if score.shape != (group.size,):
            raise ValueError(
                f"scores['{name}'] has shape {score.shape}, expected ({group.size},): one for each channel."
            )
        if np.isnan(score).any() or np.isneginf(score).any():
            raise ValueError(f"scores['{name}'] has NaN or -inf: look at what they were made of.")
        names += [(name, i) for i in range(group.size)]
        values.append(score)
    cap = Fraction(str(float(max_ratio)))  # 0.29 of 100 are 29
    left = {group.name: min(int(cap * group.size), group.size - 1) for group in groups.groups}
    ranked = np.concatenate(values) if values else np.zeros(0)
    found = []
    for at in np.argsort(ranked, kind="stable"):
        name, index = names[at]
        if ranked[at] != np.inf and left[name] > 0:
            left[name] -= 1
            found.append((name, index))
    return found


def _without(groups: ChannelGroups, removed: list[tuple[str, int]], implants: float, round_to: int) -> Selection:
    """Remove channels, keep the last of them as implants, and give back what makes widths round."""
    replaceable = set(groups.implantable)
    kept, implanted = groups.all_kept(), {group.name: np.zeros(group.size, bool) for group in groups.groups}
    wanted = round(implants * len(removed))
    for name, index in removed:
        kept[name][index] = False
    for name, index in reversed(removed):
        if wanted and name in replaceable:
            kept[name][index] = implanted[name][index] = True
            wanted -= 1
    back = {group.name: -int(kept[group.name].sum()) % round_to for group in groups.groups}
    for name, index in reversed(removed):
        if back[name] and not kept[name][index]:
            kept[name][index] = True
            back[name] -= 1
    return Selection(kept, implanted)
