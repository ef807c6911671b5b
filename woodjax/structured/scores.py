"""What each channel is worth, from its weights and a diagonal. Low = prune first.

| score | needs | in units of the loss |
|---|---|---|
| `gate_scores` | inputs: the exact Gauss–Newton matrix over the weights that read a channel | yes |
| `hap_scores` | any diagonal of the Hessian | yes |
| `taylor_channel_scores` | the mean gradient | yes |
| `l2_channel_scores`, `bn_scale_scores`, `random_channel_scores` | nothing | no |

`joint_gate_scores` counts what channels cost together as well, `obs_channel_scores` what the survivors make up for.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from woodjax.hessian import gauss_newton_diagonal
from woodjax.structured.channels import ChannelGroups, ChannelScores
from woodjax.structured.matching import match
from woodjax.structured.reads import check_reads, gate_channels, reading_places
from woodjax.tree import check_like
from woodjax.typing import ApplyFn, Batch, Params, Select

Normalization: TypeAlias = Literal["none", "mean", "l2", "max"]


def gate_scores(
    groups: ChannelGroups,
    apply_fn: ApplyFn,
    params: Params,
    inputs: Batch,
    *,
    microbatch_size: int = 16,
    check: bool = True,
) -> ChannelScores:
    """Half the Gauss–Newton matrix along each channel: `½ w_QᵀH_QQ w_Q`, the loss if a channel goes and nothing moves.

    `Q` are the weights that read the channel, so that all correlations inside it count, where the diagonal of
    `hap_scores` has none. For softmax cross-entropy; the exact Fisher, not the empirical one.

    Args:
        groups: From `channel_groups`.
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: The parameters, or all variables.
        inputs: Inputs without labels, `[n, ...]`. Images that the network is sure of say little: prefer some that it
            was not trained on.
        microbatch_size: Inputs computed at once.
        check: Look for dropout, train-mode batch normalisation and impure networks first.

    Returns:
        Scores `[n]` for each group.

    Raises:
        ValueError: As `gate_channels` and `gauss_newton_diagonal`.

    Cost:
        `n` forward and `n·C` backward passes; memory `microbatch_size · C · d`.

    References:
        Liu et al., Group Fisher Pruning, 2021 (arXiv 2108.00708), section 3, with the exact in place of the
        empirical Fisher; Theis et al. 2018 (arXiv 1801.05787).

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0, -1.0], [2.0, -2.0]])}
        >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> scores = wj.gate_scores(groups, apply_fn, params, jnp.full((1, 1), 0.01))
        >>> round(float(scores["a"][1] / scores["a"][0]), 3)
        4.0
    """
    gated, gates = gate_channels(groups, apply_fn, params)
    diagonal = gauss_newton_diagonal(gated, gates, inputs, microbatch_size=microbatch_size, check=check)
    return jax.tree.map(lambda h: _guard(0.5 * h), diagonal)


def hap_scores(groups: ChannelGroups, params: Params, diagonal: Params) -> ChannelScores:
    """Hessian-aware pruning: `½ tr(H_cc)/p · ‖w_c‖²` over the `p` weights by which kernels write a channel.

    The average curvature of a channel times its squared length. Any diagonal will do: `gauss_newton_diagonal` is
    exact, that of a Fisher is an estimate. `hutchinson_diagonal` gives the published scores: the trace of a channel
    is the sum of the same products `z ⊙ Hz`. Few probes leave mostly noise, and negative traces go first.

    Args:
        groups: From `channel_groups`.
        params: The parameters, or all variables.
        diagonal: Diagonal of a Hessian approximation; `+inf` where a coordinate is held fixed, and with it its channel.

    Returns:
        Scores `[n]` for each group, signed as the traces are. A channel that several kernels write is one vector.

    Raises:
        ValueError: Trees that differ; no kernel among `params`.

    Cost:
        Two passes over the weights.

    References:
        Yu, Yao, Gholami et al., Hessian-Aware Pruning (arXiv 2101.08940), section 3; the ½ is left out there.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.array([[1.0, 3.0], [2.0, 0.0]]), "b": jnp.ones((2, 1))}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 2)))
        >>> diagonal = {"a": jnp.array([[1.0, 2.0], [1.0, 4.0]]), "b": jnp.ones((2, 1))}
        >>> wj.hap_scores(groups, params, diagonal)["a"].tolist()  # ½ · 2/2 · 5, ½ · 6/2 · 9
        [2.5, 13.5]
    """
    check_like(diagonal, params, "diagonal")
    norms = groups.sums(jax.tree.map(jnp.square, _wide(params)), ("out",))
    traces, sizes = groups.sums(_wide(diagonal), ("out",)), groups.counts(params, ("out",))
    return {
        name: jnp.where(jnp.isposinf(traces[name]), jnp.inf, _guard(0.5 * traces[name] / sizes[name] * norms[name]))
        for name in norms
    }


def taylor_channel_scores(groups: ChannelGroups, params: Params, gradient: Params) -> ChannelScores:
    """First-order Taylor: `|Σ w ḡ|` over the weights that read a channel.

    Args:
        groups: From `channel_groups`.
        params: The parameters, or all variables.
        gradient: Mean gradient `ḡ`.

    Returns:
        Scores `[n]` for each group.

    Raises:
        ValueError: Trees that differ; a group whose readers are not among `params`.

    Cost:
        One pass over the weights.

    References:
        Molchanov et al. 2019 (arXiv 1906.10771), equation 8, at a gate.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [2.0]])}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
        >>> gradient = {"a": jnp.zeros((1, 2)), "b": jnp.array([[3.0], [-1.0]])}
        >>> wj.taylor_channel_scores(groups, params, gradient)["a"].tolist()
        [3.0, 2.0]
    """
    check_like(gradient, params, "gradient")
    reads = reading_places(groups)
    check_reads(reads, params)
    products = jax.tree.map(jnp.multiply, _wide(params), _wide(gradient))
    return jax.tree.map(lambda total: _guard(jnp.abs(total)), reads.sums(products))


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
    norms = groups.sums(jax.tree.map(jnp.square, _wide(params)), ("out",))
    sizes = groups.counts(params, ("out",)) if relative else jax.tree.map(jnp.ones_like, norms)
    return jax.tree.map(lambda norm, size: _guard(jnp.sqrt(norm / size)), norms, sizes)


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
    return jax.tree.map(lambda total, number: _guard(total / number), totals, numbers)


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


def normalize_scores(scores: ChannelScores, how: Normalization) -> ChannelScores:
    """Divide the scores of each group by their size, so that no group is pruned for its units alone.

    Args:
        scores: `[n]` for each group.
        how: By what: `"mean"` of the absolute scores, `"l2"` their root mean square, `"max"` the largest, or
            `"none"`. Protected channels (`+inf`) do not count; a group of zeros stays as it is.

    Returns:
        Scores `[n]` for each group.

    Raises:
        ValueError: Another `how`.

    Cost:
        One pass over the scores.

    References:
        Molchanov et al. 2017 (arXiv 1611.06440), section 2.2, for `"l2"`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.normalize_scores({"a": jnp.array([1.0, 3.0])}, "mean")["a"].tolist()
        [0.5, 1.5]
    """
    if how not in ("none", "mean", "l2", "max"):
        raise ValueError(f"how is {how!r}: choose 'none', 'mean', 'l2' or 'max'.")

    def group(score: Float[Array, " n"]) -> Float[Array, " n"]:
        counted = ~jnp.isposinf(score)
        known = jnp.where(counted, jnp.abs(score), 0)
        number = jnp.maximum(jnp.sum(counted), 1)
        largest = jnp.max(known, initial=0)
        safe = jnp.where(largest > 0, largest, 1)
        size = {
            "none": jnp.ones(()),
            "mean": jnp.sum(known / number),
            "l2": safe * jnp.sqrt(jnp.sum((known / safe) ** 2) / number),
            "max": largest,
        }[how]
        return score / jnp.where(largest > 0, size, 1)

    return jax.tree.map(group, scores)


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


def _wide(tree: Params) -> Params:
    return jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.promote_types(jnp.result_type(w), jnp.float32)), tree)


def _guard(score: Float[Array, " n"]) -> Float[Array, " n"]:
    # +inf means "never prune": an overflow must not be taken for it.
    return jnp.where(jnp.isfinite(score), score, jnp.nan)
