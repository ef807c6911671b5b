"""Scores of channels from their weights alone, and the control: what those with data are compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from woodjax.door import checked
from woodjax.structured.channels import ChannelGroups, ChannelScores
from woodjax.structured.matching import match
from woodjax.structured.scores import guard, wide
from woodjax.typing import Params, Select


@checked
def l2_channel_scores(groups: ChannelGroups, params: Params, *, relative: bool = False) -> ChannelScores:
    """Length `‖w_c‖` of the weights by which kernels write a channel.

    Args:
        groups: From `channel_groups`.
        params: The parameters, or all variables.
        relative: Divide by `√p`, the number of weights: layers of different width are ranked together fairly.

    Returns:
        Scores `[n]` for each group.

    Raises:
        ValueError: No kernel among `params`.

    Cost:
        One pass over the weights.

    References:
        Li et al. 2017 (arXiv 1608.08710), with the Euclidean norm.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.array([[3.0, 1.0], [4.0, 0.0]]), "b": jnp.ones((2, 1))}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 2)))
        >>> wj.l2_channel_scores(groups, params)["a"].tolist()
        [5.0, 1.0]
    """
    norms = groups.sums(jax.tree.map(jnp.square, wide(params)), ("out",))
    sizes = groups.counts(params, ("out",)) if relative else jax.tree.map(jnp.ones_like, norms)
    return jax.tree.map(lambda norm, size: guard(jnp.sqrt(norm / size)), norms, sizes)


def is_scale(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Select leaves that are called `scale`, as those of normalisation are in Flax.

    Args:
        path: Name of the leaf.
        leaf: Its shape; not looked at.

    Returns:
        Whether it is one.
    """
    del leaf
    return path.rpartition("/")[2] == "scale"


@checked
def bn_scale_scores(groups: ChannelGroups, params: Params, *, select: Select = is_scale) -> ChannelScores:
    """Network slimming: mean `|γ|` of the normalisation layers behind a channel.

    Args:
        groups: From `channel_groups`.
        params: The parameters, or all variables.
        select: Which leaves are scales, asked as `select(path, leaf)`.

    Returns:
        Scores `[n]` for each group.

    Raises:
        ValueError: A group without a scale.

    Cost:
        One pass over the scales.

    References:
        Liu et al., Network Slimming, 2017 (arXiv 1708.06519), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1)), "scale": jnp.array([-2.0, 1.0])}
        >>> apply_fn = lambda p, x: (x @ p["a"] * p["scale"]) @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> wj.bn_scale_scores(groups, params)["a"].tolist()
        [2.0, 1.0]
    """
    scales = {leaf.path: jnp.abs(w) for leaf, name, w in match(groups.leaves, params) if leaf and select(name, w)}
    paths = set(scales)
    for group in groups.groups:
        if not any(path in paths and role == "each" for path, _, role in group.places):
            raise ValueError(
                f"Group '{group.name}' has no scale among {sorted(path for path, _, _ in group.places)}: pass a select "
                "that finds it, or take another score."
            )
    tree = _nested(scales)
    totals, numbers = groups.sums(tree, ("each",)), groups.counts(tree, ("each",))
    return jax.tree.map(lambda total, number: guard(total / number), totals, numbers)


@checked
def random_channel_scores(groups: ChannelGroups, key: Key[Array, ""]) -> ChannelScores:
    """Uniform scores in [0, 1): the control that every other score should beat.

    Args:
        groups: From `channel_groups`.
        key: PRNG key.

    Returns:
        Scores `[n]` for each group.

    Cost:
        One number for each channel.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
        >>> wj.random_channel_scores(groups, jax.random.key(0))["a"].shape
        (2,)
    """
    flat = jax.random.uniform(key, (groups.num_channels,))
    return {group.name: flat[group.start : group.start + group.size] for group in groups.groups}


def _nested(leaves: dict[str, Float[Array, " n"]]) -> Params:
    """A tree with these paths."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *outer, last = path.split("/")
        here = tree
        for name in outer:
            here = here.setdefault(name, {})
        here[last] = leaf
    return tree
