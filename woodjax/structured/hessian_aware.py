"""Hessian-aware pruning: the average curvature of a channel, times its squared length. Low = prune first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from woodjax.door import checked
from woodjax.hessian import hutchinson_sums
from woodjax.hessian.hutchinson import Signs
from woodjax.structured.channels import ChannelGroups, ChannelScores
from woodjax.structured.matching import match
from woodjax.structured.scores import guard, wide
from woodjax.tree import check_like
from woodjax.typing import Batch, LossFn, Params


class ChannelScoreEstimate(NamedTuple):
    """Scores of channels that were estimated."""

    scores: ChannelScores
    standard_error: ChannelScores  # of the mean over probes
    probes: Int[Array, ""]  # used


@checked
def hap_scores(groups: ChannelGroups, params: Params, diagonal: Params) -> ChannelScores:
    """Hessian-aware pruning: `½ tr(H_cc)/p · ‖w_c‖²` over the `p` weights by which kernels write a channel.

    The average curvature of a channel times its squared length. Any diagonal will do: `gauss_newton_diagonal` is
    exact, that of a Fisher is an estimate. The published scores, by random signs, are those of `hap_trace_scores`,
    which knows their standard errors.

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
    traces = groups.sums(wide(diagonal), ("out",))
    relative = _relative(groups, params, traces)
    return {name: jnp.where(jnp.isposinf(traces[name]), jnp.inf, relative[name]) for name in relative}


@checked
def hap_trace_scores(
    groups: ChannelGroups,
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    probes: int = 100,
    tolerance: float | None = None,
    signs: Signs = "batch",
    probes_at_once: int = 1,
    microbatch_size: int | None = None,
    check: bool = True,
) -> ChannelScoreEstimate:
    """The scores of `hap_scores` with `tr(H_cc)` by random signs, as published, and their standard errors.

    `zᵀHz` is summed over each channel probe by probe, so that the errors are those of channels. Few probes leave mostly
    noise, and noise that is negative goes first: compare errors with differences of scores, or pass a `tolerance`.
    Kernels that write channels alone have probes: all else would add variance.

    Args:
        groups: From `channel_groups`.
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: The parameters, or all variables if they are floating.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        probes: Passes over the examples, at least two; the most of them with a `tolerance`.
        tolerance: Stop when the root-mean-square standard error of the traces of all channels is below this fraction of
            their root mean square; None uses all `probes`.
        signs: `"batch"` or `"example"`: which examples share signs, see `hutchinson_trace`.
        probes_at_once: Probes computed together; the memory grows with them.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        Scores `[n]` for each group, signed, their standard errors, and the probes used.

    Raises:
        ValueError: No kernel among `params`; as `hutchinson_sums`.

    Cost:
        `probes` Hessian-vector products; memory `(2 + probes_at_once) d`.

    References:
        Yu, Yao, Gholami et al., Hessian-Aware Pruning (arXiv 2101.08940), section 3; the ½ is left out there.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.ones((2, 1))}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
        >>> loss_fn = lambda p, x: 0.5 * x * (p["a"] ** 2).sum()  # H = x: no signs in it, no variance
        >>> found = wj.hap_trace_scores(groups, loss_fn, params, jnp.array([3.0]), jax.random.key(0), probes=2)
        >>> found.scores["a"].tolist(), found.standard_error["a"].tolist()  # ½ · 3 · 1², ½ · 3 · 2²
        ([1.5, 6.0], [0.0, 0.0])
    """
    written = {path for group in groups.groups for path, _, role in group.places if role == "out"}
    names = [name for leaf, name, _ in match(groups.leaves, params) if leaf is not None and leaf.path in written]
    if not names:
        raise ValueError("No leaf of params is a kernel that writes a channel: pass the tree that the groups are of.")
    found = hutchinson_sums(
        loss_fn,
        params,
        batch,
        key,
        lambda tree: groups.sums(tree, ("out",)),
        select=lambda path, leaf: path in names,
        probes=probes,
        tolerance=tolerance,
        signs=signs,
        probes_at_once=probes_at_once,
        microbatch_size=microbatch_size,
        check=check,
    )
    scores, errors = (_relative(groups, params, traces) for traces in (found.sums, found.standard_error))
    return ChannelScoreEstimate(scores, errors, found.probes)


def _relative(groups: ChannelGroups, params: Params, traces: ChannelScores) -> ChannelScores:
    norms, sizes = groups.sums(jax.tree.map(jnp.square, wide(params)), ("out",)), groups.counts(params, ("out",))
    return {name: guard(0.5 * traces[name] / sizes[name] * norms[name]) for name in norms}
