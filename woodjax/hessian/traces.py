"""Hutchinson's estimate of traces: of leaves, and of the channels of leaves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from woodjax.door import checked
from woodjax.hessian._estimate import Signs, estimate
from woodjax.placement import on_any_axes
from woodjax.tree import is_kernel, make_layout
from woodjax.typing import Batch, LossFn, Params, Select


class TraceEstimate(NamedTuple):
    """Traces of the diagonal blocks of `H` that belong to leaves."""

    trace: Params  # a scalar for each leaf; NaN where the leaf was not selected
    standard_error: Params
    total: Float[Array, ""]  # over the selected leaves
    total_standard_error: Float[Array, ""]
    probes: Int[Array, ""]  # used


class AxisTraceEstimate(NamedTuple):
    """Traces of the diagonal blocks of `H` that belong to the indices of one axis."""

    traces: Params  # [channels] for each leaf; [0] where the leaf was not selected
    standard_error: Params
    probes: Int[Array, ""]  # used


@checked
@on_any_axes
def hutchinson_trace(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    select: Select | None = None,
    probes: int = 100,
    tolerance: float | None = None,
    signs: Signs = "batch",
    probes_at_once: int = 1,
    microbatch_size: int | None = None,
    check: bool = True,
) -> TraceEstimate:
    """Unbiased estimate of `tr(H)` of the mean loss, leaf by leaf: the mean of `zᵀHz` over random signs `z`.

    One product serves all leaves. The variance of one probe is `2 Σ_{q≠r} H_qr²` for the total, and for one leaf
    that of its own block plus `Σ H_qr²` over `q` in it and `r` in other leaves: leaves without probes add nothing.

    **When to stop.** With a `tolerance`, as soon as the standard error of the total is at most `tolerance · |tr H|`,
    where `(tr H)²` is estimated without bias as the square of the mean minus that of its standard error. Never
    before `MINIMUM_PROBES`, since the standard error of few probes is itself a guess, and after `probes` at the latest.
    PyHessian stops when the running mean moves by less than the tolerance, but the `i`-th probe moves it by `1/i` of
    its own deviation only: that happens early by luck, and for any variance in the end.

    **Signs.** Let `Hᵢ` be the Hessian of example `i`, and `A` what is off its diagonal. With signs for each
    micro-batch of all examples the variance is that of the mean, `‖(1/n) Σ Aᵢ‖²`; with signs for each example
    `(1/n²) Σ ‖Aᵢ‖²`. The second is lower if the `Aᵢ` agree (`Σ_{i≠j} ⟨Aᵢ, Aⱼ⟩ > 0`), at most `n`-fold, for the same
    number of operations, and higher where they cancel. In a trained and an untrained network the error of signs for
    each example was 0.7 to 1.0 times that of signs for the batch (diagonals, 10 and 64 examples). On CPU products for
    every example took 1.4 to 2.4 times as long (convolutions of 8 channels, one probe at a time): as long as more
    probes of equal worth, so that `"batch"` is the default.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        select: Which leaves count; the others are constants. None for all.
        probes: Passes over the examples, at least two; the most of them with a `tolerance`.
        tolerance: Relative standard error of the total at which to stop; None uses all `probes`.
        signs: `"batch"`: a micro-batch shares its signs. `"example"`: every example has its own, whatever the
            micro-batches are.
        probes_at_once: Probes computed together: they share the forward and backward pass of the loss itself. On CPU
            4 took 0.45 to 1.0 times the time of one after another with `"batch"`, and no less with `"example"`.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        The trace of each leaf's block and the total, signed, with standard errors, and the probes used.

    Raises:
        ValueError: `probes < 2`; `tolerance <= 0`; unknown `signs`; `probes_at_once < 1`; no leaf selected; as
            `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products; memory `probes_at_once` times that of one, and with `signs="example"`
        `microbatch_size` times that. Outside `jit` the loops run on the host; inside, convolutions on CPU are many
        times slower, as in `per_example_gradients`.

    References:
        Hutchinson, Communications in Statistics 19, 1990; Avron & Toledo, Journal of the ACM 58, 2011, for the
        variance; the other stopping rule: Yao et al., PyHessian (arXiv 1912.07145).

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()
        >>> found = wj.hutchinson_trace(loss, jnp.ones(2), jnp.array([[1.0, -2.0]]), jax.random.key(0), tolerance=0.1)
        >>> float(found.total), float(found.total_standard_error), int(found.probes)
        (-2.0, 0.0, 10)
    """
    leaves, treedef = jax.tree.flatten(params)
    everywhere = [True] * len(leaves)
    selected = everywhere if select is None else [leaf.selected for leaf in make_layout(params, select=select).leaves]
    moments = estimate(
        loss_fn,
        params,
        batch,
        key,
        [tuple(range(jnp.ndim(w))) if chosen else None for w, chosen in zip(leaves, selected, strict=True)],
        total=True,
        probes=probes,
        tolerance=tolerance,
        signs=signs,
        probes_at_once=probes_at_once,
        microbatch_size=microbatch_size,
        check=check,
    )

    def put(values: list[Array]) -> Params:
        known = iter(values)
        return treedef.unflatten([next(known) if chosen else jnp.full((), jnp.nan) for chosen in selected])

    means, errors = moments.mean, moments.standard_error()
    return TraceEstimate(put(means[:-1]), put(errors[:-1]), means[-1], errors[-1], moments.count)


@checked
@on_any_axes
def hutchinson_axis_traces(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    axis: int = -1,
    select: Select = is_kernel,
    probes: int = 100,
    tolerance: float | None = None,
    signs: Signs = "batch",
    probes_at_once: int = 1,
    microbatch_size: int | None = None,
    check: bool = True,
) -> AxisTraceEstimate:
    """Unbiased estimate of `tr(H_cc)` for every index `c` of one axis, all leaves at once.

    `H_cc` is the block of `H` of the weights `w[..., c]`: with the output axis of kernels, the curvature of each
    channel. Signs of one probe stand on all selected leaves and channels together; what they share with other
    channels has mean zero and adds variance only, so that 3 probes give little more than noise: look at the standard
    errors. What `signs`, `tolerance` and `probes_at_once` mean is said at `hutchinson_trace`. The stopping rule looks
    at all channels together: their root-mean-square standard error against their root mean square.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        axis: Of each selected leaf; may be negative. The last is the output axis of `[..., in, out]` kernels.
        select: Which leaves get probes; the others are constants.
        probes: Passes over the examples, at least two; the most of them with a `tolerance`.
        tolerance: Stop when the standard error is below this fraction of the traces; None uses all `probes`.
        signs: `"batch"` or `"example"`: which examples share signs.
        probes_at_once: Probes computed together; the memory grows with them.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        `[channels]` for each selected leaf, signed, with standard errors, and the probes used.

    Raises:
        ValueError: A selected leaf without that axis; no leaf selected; `probes < 2`; `tolerance <= 0`; unknown
            `signs`; `probes_at_once < 1`; as `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products; memory as `hutchinson_trace`.

    References:
        Yu, Yao, Gholami et al., Hessian-Aware Pruning (arXiv 2101.08940), section 3: `tr(H_cc)/p · ‖w_c‖²`.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()
        >>> batch, key = jnp.array([[1.0, 2.0]]), jax.random.key(0)
        >>> wj.hutchinson_axis_traces(loss, jnp.ones((3, 2)), batch, key, probes=2).traces.tolist()
        [6.0, 12.0]
    """
    treedef = jax.tree.structure(params)
    layout = make_layout(params, select=select)
    for leaf in layout.selected:
        if not -len(leaf.shape) <= axis < len(leaf.shape):
            raise ValueError(
                f"axis is {axis}, but leaf '{leaf.path}' has shape {leaf.shape}: pass an axis that every selected leaf "
                "has, or leave it out by select."
            )
    others = [
        tuple(a for a in range(len(leaf.shape)) if a != axis % len(leaf.shape)) if leaf.selected else None
        for leaf in layout.leaves
    ]
    moments = estimate(
        loss_fn,
        params,
        batch,
        key,
        others,
        total=False,
        probes=probes,
        tolerance=tolerance,
        signs=signs,
        probes_at_once=probes_at_once,
        microbatch_size=microbatch_size,
        check=check,
    )

    def put(values: list[Array]) -> Params:
        known = iter(values)
        return treedef.unflatten([jnp.zeros(0) if axes is None else next(known) for axes in others])

    return AxisTraceEstimate(put(moments.mean), put(moments.standard_error()), moments.count)
