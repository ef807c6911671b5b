"""What each channel is worth, from its weights and a diagonal. Low = prune first.

| score | needs | in units of the loss |
|---|---|---|
| `gate_scores` | inputs: the exact Gauss–Newton matrix over the weights that read a channel | yes |
| `hap_scores`, `hap_trace_scores` | any diagonal of the Hessian; labels, for traces by random signs | yes |
| `taylor_channel_scores` | the mean gradient | yes |
| `l2_channel_scores`, `bn_scale_scores`, `random_channel_scores` | nothing | no |

`joint_gate_scores` counts what channels cost together as well, `obs_channel_scores` what the survivors make up for.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.hessian import gauss_newton_diagonal
from woodjax.structured.channels import ChannelGroups, ChannelScores
from woodjax.structured.gates import gate_channels, one_example
from woodjax.structured.reads import check_reads, reading_places
from woodjax.tree import check_like
from woodjax.typing import ApplyFn, Batch, Params

Normalization: TypeAlias = Literal["none", "mean", "l2", "max"]


@checked
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
    `hap_scores` has none. For softmax cross-entropy; the exact Fisher, not the empirical one. Channels of queries and
    keys and of tied weights have square-root gates on all their weights, see `gate_channels`. What sees a channel by
    the side of its kernels, as layer normalisation or a sum of squares, is not counted.

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
        `n` forward and `n·C` backward passes, a trace of the network; memory `microbatch_size · C · d`.

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
    gated, gates = gate_channels(groups, apply_fn, params, one_example(inputs))
    diagonal = gauss_newton_diagonal(gated, gates, inputs, microbatch_size=microbatch_size, check=check)
    return jax.tree.map(lambda h: guard(0.5 * h), diagonal)


@checked
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
    products = jax.tree.map(jnp.multiply, wide(params), wide(gradient))
    return jax.tree.map(lambda total: guard(jnp.abs(total)), reads.sums(products))


@checked
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


def wide(tree: Params) -> Params:
    """The leaves in at least float32.

    Args:
        tree: Floating leaves.

    Returns:
        A tree of the same structure.
    """
    return jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.promote_types(jnp.result_type(w), jnp.float32)), tree)


def guard(score: Float[Array, " n"]) -> Float[Array, " n"]:
    """NaN for what is not finite: `+inf` means "never prune", and an overflow must not be taken for it.

    Args:
        score: Scores.

    Returns:
        Scores.
    """
    return jnp.where(jnp.isfinite(score), score, jnp.nan)
