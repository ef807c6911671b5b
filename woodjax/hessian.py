"""The Hessian of the mean loss: products, and its diagonal.

| function | gives | passes over the examples |
|---|---|---|
| `hvp` | `Hv`, exact | 1, of about four gradients' cost |
| `hutchinson_diagonal` | `diag(H)` of any loss, with a standard error | one `hvp` a probe |
| `gauss_newton_diagonal` | the Gauss–Newton diagonal of softmax cross-entropy, exact | `C` backward passes an example |

In a network of ReLUs and max-pooling the second derivative by one weight alone is that of the Gauss–Newton matrix:
the last two then estimate the same numbers, and the third has no variance.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from woodjax.gradients import AllClassRows, LossRow, batch_size, check_apply
from woodjax.probe import check_loss
from woodjax.stream import GradientStream
from woodjax.tree import check_floating, check_like
from woodjax.typing import ApplyFn, Batch, Gradients, LossFn, Params

State = TypeVar("State")


class DiagonalEstimate(NamedTuple):
    """A diagonal that was estimated."""

    diagonal: Params  # signed
    standard_error: Params  # of the mean over probes


def hvp(loss_fn: LossFn, params: Params, batch: Batch, vector: Params, *, microbatch_size: int | None = None) -> Params:
    """Hessian-vector product `Hv` of the mean loss: the forward derivative of its gradient.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        vector: A params-tree `v`. Leaves that are not prunable count: put zeros there to leave them out.
        microbatch_size: Examples computed at once; None for all.

    Returns:
        A params-tree, at least float32.

    Raises:
        ValueError: Trees that differ; batch leaves of different or zero length; `microbatch_size < 1`.

    Cost:
        About two forward and two backward passes an example; memory as for one gradient, twice.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()  # H = diag(2 · mean x)
        >>> wj.hvp(loss, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, -1.0])).tolist()
        [4.0, -6.0]
    """
    check_floating(params)
    check_like(vector, params, "vector")
    row, n, k = LossRow(loss_fn, False), batch_size(batch), _at_once(batch, microbatch_size)
    arrays = jax.tree.map(jnp.asarray, (params, batch, vector))
    return _loop(lambda s, i: _add_product(s, row, *arrays, i * k, at_once=k), _zeros(params), -(-n // k), arrays)


def hutchinson_diagonal(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    probes: int = 100,
    microbatch_size: int | None = None,
    check: bool = True,
) -> DiagonalEstimate:
    """Unbiased estimate of `diag(H)` of the mean loss: the mean of `z ⊙ Hz` over random signs `z`.

    The variance of one probe at `q` is `Σ_{r≠q} H_qr²`, whatever `H_qq` is: look at the standard error. Every
    micro-batch draws signs of its own, so that smaller ones have less variance at the same number of products.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        probes: Passes over the examples, at least two.
        microbatch_size: Examples computed at once; None for all.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        The diagonal, signed, and the standard error of each entry. A negative entry of a network of ReLUs is
        noise; otherwise it may be negative curvature. `diagonal_curvature` says what to do with it.

    Raises:
        ValueError: `probes < 2`; as `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products; memory `5d`.

    References:
        Bekas, Kokiopoulou & Saad, An estimator for the diagonal of a matrix, 2007; the standard error by
        Welford, Technometrics 4, 1962.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()
        >>> found = wj.hutchinson_diagonal(loss, jnp.ones(2), jnp.array([[1.0, -2.0]]), jax.random.key(0), probes=2)
        >>> found.diagonal.tolist(), found.standard_error.tolist()  # nothing off the diagonal: no variance
        ([2.0, -4.0], [0.0, 0.0])
    """
    if probes < 2:
        raise ValueError(f"probes is {probes}: a standard error needs at least 2; 100 is a beginning.")
    n, k = batch_size(batch), _at_once(batch, microbatch_size)
    if check:
        check_loss(loss_fn, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
    check_floating(params)
    row, arrays = LossRow(loss_fn, False), jax.tree.map(jnp.asarray, (params, batch))
    everything = (*arrays, key)

    def add_probe(moments: tuple[Params, Params], number: Int[Array, ""] | int) -> tuple[Params, Params]:
        signs = jax.random.fold_in(key, number)
        estimate = _loop(
            lambda s, i: _add_probe(s, row, *arrays, signs, i * k, at_once=k), _zeros(params), -(-n // k), everything
        )
        return _welford(*moments, estimate, number)

    mean, squares = _loop(add_probe, (_zeros(params), _zeros(params)), probes, everything)
    return DiagonalEstimate(mean, jax.tree.map(lambda s: jnp.sqrt(s / (probes * (probes - 1))), squares))


def gauss_newton_diagonal(apply_fn: ApplyFn, params: Params, inputs: Batch, *, microbatch_size: int = 16) -> Params:
    """Diagonal of the Gauss–Newton matrix of the mean softmax cross-entropy, without variance and without labels.

    `Σ_c p_c J_c² − (Σ_c p_c J_c)²` with `J` the Jacobian of the logits, summed as `Σ_c p_c (J_c − Σ_k p_k J_k)²`,
    which does not cancel. It is the exact Fisher's diagonal, and `diag(H)` itself where the network is piecewise
    linear in each single weight: ReLUs, max-pooling, batch normalisation in eval mode.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        inputs: Inputs without labels, `[n, ...]`.
        microbatch_size: Inputs computed at once.

    Returns:
        A params-tree, at least float32, not negative, without damping.

    Raises:
        ValueError: Inputs of different or zero length; logits not `[n, C]`; `microbatch_size < 1`; whatever
            `check_loss` finds.

    Cost:
        `n` forward and `n·C` backward passes; memory `microbatch_size · C · d`.

    References:
        Schraudolph 2002 (Gauss–Newton for matching losses); Martens 2014 (arXiv 1412.1193), section 9; the equality
        with `diag(H)`: Botev, Ritter & Barber 2017 (arXiv 1706.03662), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.gauss_newton_diagonal(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.array([[2.0]])).tolist()  # x² p(1 − p)
        [[1.0, 1.0]]
    """
    check_floating(params)
    n = batch_size(inputs)
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1.")
    check_apply(apply_fn, params, inputs)
    params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
    row = AllClassRows(apply_fn)
    stream = GradientStream(params, inputs, None, None, LossRow(apply_fn, False), microbatch_size, 1)
    sums = stream.fold(_add_squares, _zeros(params), row=row)
    return jax.tree.map(lambda total: total / n, sums)


def _add_squares(sums: Params, rows: Gradients, first: Int[Array, ""], fresh: Bool[Array, " k"]) -> Params:
    del first

    def add(total: Array, row: Array) -> Array:
        squares = jnp.mean(jnp.square(row.astype(total.dtype)), axis=1)  # over the classes
        return total + jnp.sum(jnp.where(fresh.reshape(-1, *(1,) * total.ndim), squares, 0), axis=0)

    return jax.tree.map(add, sums, rows)


def _at_once(batch: Batch, microbatch_size: int | None) -> int:
    n = batch_size(batch)
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1, or None.")
    return n if microbatch_size is None else min(microbatch_size, n)


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.promote_types(jnp.result_type(w), jnp.float32)), params)


def _loop(step: Callable[[State, Any], State], state: State, count: int, arrays: Any) -> State:
    # On the host where it can: XLA's CPU backend runs gradients of convolutions slowly inside a compiled loop.
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, state))):
        return lax.fori_loop(0, count, lambda i, s: step(s, i), state)
    for i in range(count):
        state = step(state, i)
    return state


def _product(
    row: LossRow, params: Params, batch: Batch, vector: Params, start: Int[Array, ""] | int, at_once: int
) -> Params:
    # The part of Hv that the examples from `start` on have in the mean over all.
    n = batch_size(batch)
    first = jnp.minimum(start, n - at_once)  # the last micro-batch repeats examples of the one before
    chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, at_once), batch)
    fresh = first + jnp.arange(at_once) >= start

    def part(p: Params) -> Array:
        losses = jax.vmap(row.loss, in_axes=(None, 0))(p, chunk)
        return jnp.sum(jnp.where(fresh, losses, 0)) / n

    tangent = jax.tree.map(lambda v, w: v.astype(w.dtype), vector, params)
    return jax.jvp(jax.grad(part), (params,), (tangent,))[1]


@partial(jax.jit, static_argnames="at_once", donate_argnums=0)
def _add_product(
    total: Params, row: LossRow, params: Params, batch: Batch, vector: Params, start: int, *, at_once: int
) -> Params:
    return jax.tree.map(jnp.add, total, _product(row, params, batch, vector, start, at_once))


@partial(jax.jit, static_argnames="at_once", donate_argnums=0)
def _add_probe(
    total: Params, row: LossRow, params: Params, batch: Batch, key: Key[Array, ""], start: int, *, at_once: int
) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, start), len(leaves))
    signs = [jax.random.rademacher(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
    z = jax.tree.unflatten(treedef, signs)
    product = _product(row, params, batch, z, start, at_once)
    return jax.tree.map(lambda t, s, hz: t + (s * hz).astype(t.dtype), total, z, product)


@partial(jax.jit, donate_argnums=(0, 1))
def _welford(mean: Params, squares: Params, estimate: Params, number: int) -> tuple[Params, Params]:
    new = jax.tree.map(lambda a, x: a + (x - a) / (number + 1), mean, estimate)
    spread = jax.tree.map(lambda s, x, a, b: s + (x - a) * (x - b), squares, estimate, mean, new)
    return new, spread
