"""The mean over probes, its standard error, and when there were enough of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.hessian._loops import at_once, loop
from woodjax.hessian._probes import Probing, Values, add_probes
from woodjax.loss_rows import LossRow, batch_size
from woodjax.probe import check_loss
from woodjax.tree import check_floating
from woodjax.typing import Batch, LossFn, Params

Signs = Literal["batch", "example"]
MINIMUM_PROBES = 10
"""Probes before which `tolerance` stops nothing: the standard error of fewer is itself off by more than a quarter."""


class Moments(NamedTuple):
    """Of the probes so far (Welford)."""

    mean: Values
    squares: Values  # sums of squared deviations
    count: Int[Array, ""]

    def standard_error(self) -> Values:
        """Of the mean."""
        return [jnp.sqrt(s / (self.count * (self.count - 1))) for s in self.squares]


def estimate(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    summed: Sequence[tuple[int, ...] | None],
    *,
    total: bool,
    probes: int,
    tolerance: float | None,
    signs: Signs,
    probes_at_once: int,
    microbatch_size: int | None,
    check: bool,
    put_together: Callable[[Values], Values] | None = None,
) -> Moments:
    """Moments of sums of `z ⊙ Hz` over probes `z`.

    Args:
        loss_fn: The loss of one example.
        params: A params-tree.
        batch: Examples `[n, ...]`.
        key: PRNG key.
        summed: Axes of each leaf to sum over; None for a leaf without probes.
        total: Whether the sum over leaves is wanted too, as the last value; the stopping rule then looks at it alone.
        probes: At most so many.
        tolerance: As in `hutchinson_trace`.
        signs: As in `hutchinson_trace`.
        probes_at_once: Probes computed together.
        microbatch_size: Examples computed at once.
        check: Whether to look at the loss first.
        put_together: Linear function of the values of one probe, one for each leaf with probes, whose moments are
            wanted in their place.

    Returns:
        A value for each leaf with probes, or what they were put together to, and the total.

    Raises:
        ValueError: What `hutchinson_trace` says.
    """
    if probes < 2:
        raise ValueError(f"probes is {probes}: a standard error needs at least 2; 100 is a beginning.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}: pass a positive number, or None to use all probes.")
    if signs not in {"batch", "example"}:
        raise ValueError(f"signs is {signs!r}: pass 'batch' or 'example'.")
    if probes_at_once < 1:
        raise ValueError(f"probes_at_once is {probes_at_once}: pass at least 1.")
    n, size = batch_size(batch), at_once(batch, microbatch_size)
    check_floating(params)
    if check:
        check_loss(loss_fn, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
    probing = Probing(tuple(summed), signs == "example", min(probes_at_once, probes), size)
    arrays: Any = jax.tree.map(jnp.asarray, (params, batch))
    row, everything = LossRow(loss_fn, False), (*arrays, key)
    each = list if put_together is None else jax.jit(jax.vmap(put_together))

    def add_round(moments: Moments, number: Int[Array, ""] | int) -> Moments:
        first = number * probing.probes_at_once
        values = loop(
            lambda totals, i: add_probes(totals, row, *arrays, key, first, i * size, probing=probing),
            probing.zeros(arrays[0]),
            -(-n // size),
            everything,
        )
        return _welford(moments, each(values), probes, total=total)

    done = None if tolerance is None else partial(_enough, tolerance=tolerance, total=total)
    values = jax.eval_shape(each, probing.zeros(arrays[0]))
    return loop(add_round, _nothing(values, total), -(-probes // probing.probes_at_once), everything, done)


def _nothing(values: Sequence[jax.ShapeDtypeStruct], total: bool) -> Moments:
    shapes = [jnp.zeros(v.shape[1:], v.dtype) for v in values]
    if total:
        shapes.append(jnp.zeros((), jnp.result_type(*(v.dtype for v in values))))
    return Moments(shapes, [jnp.zeros_like(v) for v in shapes], jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="total", donate_argnums=0)
def _welford(moments: Moments, values: Values, probes: int, *, total: bool) -> Moments:
    if total:
        values = [*values, jnp.sum(jnp.stack(values), axis=0)]

    def add(old: Moments, value: Values) -> tuple[Moments, None]:
        count = old.count + 1
        mean = [m + (x - m) / count for m, x in zip(old.mean, value, strict=True)]
        squares = [s + (x - a) * (x - b) for s, x, a, b in zip(old.squares, value, old.mean, mean, strict=True)]
        wanted = old.count < probes  # the last round may bring more
        return jax.tree.map(lambda a, b: jnp.where(wanted, a, b), Moments(mean, squares, count), old), None

    return lax.scan(add, moments, values)[0]


@partial(jax.jit, static_argnames="total")
def _enough(moments: Moments, *, tolerance: Float[Array, ""] | float, total: bool) -> Bool[Array, ""]:
    judged = slice(-1, None) if total else slice(None)
    noise = sum(jnp.sum(s) for s in moments.squares[judged]) / (moments.count * jnp.maximum(moments.count - 1, 1))
    size = sum(jnp.sum(jnp.square(m)) for m in moments.mean[judged]) - noise  # a square has the noise in it
    return (moments.count >= MINIMUM_PROBES) & (noise <= tolerance**2 * size)
