"""The groups of the network that a plan leaves."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from woodjax.door import checked
from woodjax.structured.channels import FIXED, ChannelGroups, stays
from woodjax.structured.plan import PrunePlan


@checked
def shrink_groups(groups: ChannelGroups, plan: PrunePlan) -> ChannelGroups:
    """The channels of the network that a plan leaves, for a further round of pruning.

    Args:
        groups: Of the whole network.
        plan: Made of them.

    Returns:
        Groups of the same names, of what stays. A plan made of them shrinks the smaller variables, and
        `plan.then(later)` the whole ones.

    Raises:
        ValueError: A plan with implants.

    Cost:
        None on the device.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> plan = wj.make_plan(groups, {"hidden": np.array([True, False, False, True])})
        >>> later = wj.make_plan(wj.shrink_groups(groups, plan), {"hidden": np.array([False, True])})
        >>> plan.then(later).kept["hidden"].tolist()
        [False, False, False, True]
    """
    if plan.has_implants:
        raise ValueError("The plan has implants: a network with implants is not pruned further.")
    units = groups.kept_units(plan.kept)
    number = np.append(np.cumsum(units) - 1, FIXED)

    def left(factor: Int[np.ndarray, " size"]) -> Int[np.ndarray, " left"]:
        return number[factor[stays(factor, units)]]

    smaller, start = [], 0
    for group in groups.groups:
        size = int(plan.kept[group.name].sum())
        smaller.append(group._replace(start=start, size=size))
        start += size
    leaves = tuple(
        leaf._replace(shape=described.small, axes=tuple(tuple(map(left, axis)) for axis in leaf.axes))
        for leaf, described in zip(groups.leaves, plan.leaves, strict=True)
    )
    channels = units[: groups.num_channels]
    unions = [tuple(int(number[i]) for i in union if channels[i]) for union in groups.unions]
    products = tuple(
        part._replace(written=tuple(map(left, part.written)), factors=tuple(map(left, part.factors)))
        for part in groups.products
    )
    return replace(groups, groups=tuple(smaller), leaves=leaves, unions=tuple(filter(None, unions)), products=products)
