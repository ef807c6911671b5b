"""Hutchinson's estimate of the diagonal."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Key

from woodjax.door import checked
from woodjax.hessian._estimate import Signs, estimate
from woodjax.placement import on_any_axes
from woodjax.typing import Batch, LossFn, Params


class DiagonalEstimate(NamedTuple):
    """A diagonal that was estimated."""

    diagonal: Params  # signed
    standard_error: Params  # of the mean over probes
    probes: Int[Array, ""]  # used


@checked
@on_any_axes
def hutchinson_diagonal(
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
) -> DiagonalEstimate:
    """Unbiased estimate of `diag(H)` of the mean loss: the mean of `z ⊙ Hz` over random signs `z`.

    The variance of one probe at `q` is `Σ_{r≠q} H_qr²`, whatever `H_qq` is: look at the standard error. What `signs`,
    `tolerance` and `probes_at_once` mean is said at `hutchinson_trace`. The stopping rule looks at all entries
    together: their root-mean-square standard error against their root mean square, so that large entries decide.

    At initialization the estimate is mostly noise: see `benchmarks/diagonals.py`. The published mode of pruning
    there is `probes=10, signs="example"` with `cross_entropy(apply_fn, temperature=200)`, ranked by its sign too.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        probes: Passes over the examples, at least two; the most of them with a `tolerance`.
        tolerance: Stop when the standard error is below this fraction of the diagonal; None uses all `probes`.
        signs: `"batch"` or `"example"`: which examples share signs.
        probes_at_once: Probes computed together; the memory grows with them.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        The diagonal, signed, the standard error of each entry, and the probes used. A negative entry of a network
        of ReLUs is noise; otherwise it may be negative curvature. `diagonal_curvature` says what to do with it.

    Raises:
        ValueError: `probes < 2`; `tolerance <= 0`; unknown `signs`; `probes_at_once < 1`; as `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products; memory `(4 + probes_at_once) d`, and `probes_at_once · microbatch_size · 2d`
        more with `signs="example"`.

    References:
        Bekas, Kokiopoulou & Saad, An estimator for the diagonal of a matrix, 2007; the standard error by
        Welford, Technometrics 4, 1962; at initialization: Gollini et al. (arXiv 2502.11450).

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()
        >>> found = wj.hutchinson_diagonal(loss, jnp.ones(2), jnp.array([[1.0, -2.0]]), jax.random.key(0), probes=2)
        >>> found.diagonal.tolist(), found.standard_error.tolist()  # nothing off the diagonal: no variance
        ([2.0, -4.0], [0.0, 0.0])
    """
    leaves, treedef = jax.tree.flatten(params)
    moments = estimate(
        loss_fn,
        params,
        batch,
        key,
        [()] * len(leaves),
        total=False,
        probes=probes,
        tolerance=tolerance,
        signs=signs,
        probes_at_once=probes_at_once,
        microbatch_size=microbatch_size,
        check=check,
    )
    put = treedef.unflatten
    return DiagonalEstimate(put(moments.mean), put(moments.standard_error()), moments.count)
