"""Hutchinson's estimate of sums of the diagonal that are neither leaves nor channels of one leaf."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from woodjax.door import checked
from woodjax.hessian._estimate import Signs, estimate
from woodjax.placement import on_any_axes
from woodjax.tree import make_layout
from woodjax.typing import Batch, LossFn, Params, PyTree, Select


class SumEstimate(NamedTuple):
    """Sums of the diagonal of `H`."""

    sums: PyTree  # signed
    standard_error: PyTree
    probes: Int[Array, ""]  # used


@checked
@on_any_axes
def hutchinson_sums(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    sums: Callable[[Params], PyTree],
    *,
    select: Select | None = None,
    probes: int = 100,
    tolerance: float | None = None,
    signs: Signs = "batch",
    probes_at_once: int = 1,
    microbatch_size: int | None = None,
    check: bool = True,
) -> SumEstimate:
    """Unbiased estimate of any sums of `diag(H)` of the mean loss, with standard errors.

    The products `z ⊙ Hz` of a probe are summed before they are squared: entries of one probe go together, so that
    standard errors of a diagonal cannot be added up to that of a sum. What `signs`, `tolerance` and `probes_at_once`
    mean is said at `hutchinson_trace`; the stopping rule looks at all sums together, by their root mean squares.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        sums: Linear function of a params-tree, which returns a tree of arrays.
        select: Which leaves get probes; the others are constants, zeros for `sums`, and add no variance. None for all.
        probes: Passes over the examples, at least two; the most of them with a `tolerance`.
        tolerance: Stop when the standard error is below this fraction of the sums; None uses all `probes`.
        signs: `"batch"` or `"example"`: which examples share signs.
        probes_at_once: Probes computed together; the memory grows with them.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        What `sums` returns, of the diagonal, with standard errors, and the probes used.

    Raises:
        ValueError: No leaf selected; `probes < 2`; `tolerance <= 0`; unknown `signs`; `probes_at_once < 1`; as
            `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products and calls of `sums`, which is compiled; memory `(2 + probes_at_once) d`, and
        `probes_at_once · microbatch_size · 2d` more with `signs="example"`.

    References:
        Avron & Toledo, Journal of the ACM 58, 2011, lemma 9, for the variance.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: w[0] * w[1] * x  # nothing on the diagonal, and both entries of z ⊙ Hz are z₀z₁x
        >>> arguments = loss, jnp.ones(2), jnp.array([3.0]), jax.random.key(0)
        >>> both = wj.hutchinson_sums(*arguments, jnp.sum, probes=4)
        >>> single = wj.hutchinson_diagonal(*arguments, probes=4)
        >>> float(both.standard_error / single.standard_error[0])
        2.0
    """
    leaves, treedef = jax.tree.flatten(params)
    everywhere = [True] * len(leaves)
    selected = everywhere if select is None else [leaf.selected for leaf in make_layout(params, select=select).leaves]

    def whole(values: list[Array]) -> Params:
        known = iter(values)
        pairs = zip(leaves, selected, strict=True)
        return treedef.unflatten([next(known) if chosen else jnp.zeros_like(leaf) for leaf, chosen in pairs])

    structure = jax.tree.structure(jax.eval_shape(sums, params))
    moments = estimate(
        loss_fn,
        params,
        batch,
        key,
        [() if chosen else None for chosen in selected],
        total=False,
        probes=probes,
        tolerance=tolerance,
        signs=signs,
        probes_at_once=probes_at_once,
        microbatch_size=microbatch_size,
        check=check,
        put_together=lambda values: jax.tree.leaves(sums(whole(values))),
    )
    put = structure.unflatten
    return SumEstimate(put(moments.mean), put(moments.standard_error()), moments.count)
