"""Per-example gradients that are computed when they are asked for, and never held all at once.

A `GradientStream` stands for the rows `G [m, d]`. It answers in micro-batches:

| method | gives | memory | passes over the examples |
|---|---|---|---|
| `fold` | anything that is built up row by row: sums of outer products, windows of columns | its result | 1 |
| `products` | `Gv` by forward mode | `d` | 1 forward |
| `combine` | `Gᵀu`, the gradient of `Σ uᵢ lossᵢ` | `d` | 1 |
| `squares` | `Σ g²`, element by element | `d` and a micro-batch of rows | 1 |
| `collect` | the rows themselves | `m·d` | 1 |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.door import checked
from woodjax.loss_rows import LossRow, batch_size, group_examples
from woodjax.placement import Microbatches, Placement, as_gradients, as_params, on_any_axes, placement_of
from woodjax.probe import check_loss
from woodjax.tree import apply_masks, check_bool, check_floating, check_like, wide_dtype
from woodjax.typing import Batch, Gradients, LossFn, Masks, Params

State = TypeVar("State")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "batch", "masks", "signs", "loss_row"],
    meta_fields=["microbatch_size", "examples_per_gradient", "precision"],
)
@dataclass(frozen=True)
class GradientStream:
    """Rows of gradients, not computed yet. Made by `stream_gradients`."""

    params: Params
    batch: Batch  # [n, ...]
    masks: Masks | None  # False: the coordinate is out of the problem
    signs: Float[Array, "m s"] | None  # of the examples of a row; None averages them
    loss_row: LossRow  # loss and gradient of one row
    microbatch_size: int
    examples_per_gradient: int
    precision: str | None = None  # of the model's own matrix products; None leaves it to JAX

    @property
    def num_rows(self) -> int:
        """Rows `m`."""
        return batch_size(self.batch) // self.examples_per_gradient

    @property
    def microbatches(self) -> Microbatches:
        """How the rows are cut."""
        return self._static().cut

    @property
    def rows(self) -> Batch:
        """The examples, each row's group along the second axis where there are several in a row, and their signs."""
        groups = group_examples(self.batch, self.examples_per_gradient)
        return groups if self.signs is None else (groups, self.signs)

    def precise(self) -> "GradientStream":
        """The same rows in at least float32, products of the model included.

        For who divides differences of products with them by a small damping: rows that are computed in
        windows, products and combinations must be those of one matrix.

        Returns:
            A stream.
        """
        params = jax.tree.map(lambda w: w.astype(jnp.promote_types(w.dtype, jnp.float32)), self.params)
        return replace(self, params=params, precision="highest")

    @on_any_axes
    def collect(self) -> Gradients:
        """All rows: a params-tree whose leaves are `[m, *leaf.shape]`."""
        static = self._static()
        empty = _empty_rows(self.params, self.num_rows, static.placement)
        return self.fold(_Write(static.cut, static.placement), empty)

    def fold(
        self,
        step: Callable[[State, Any, Int[Array, " k"], Bool[Array, " k"]], State],
        state: State,
        row: Callable[[Params, Batch], Any] | None = None,
    ) -> State:
        """Build something up from the rows, a micro-batch at a time.

        Args:
            step: `step(state, gradients, numbers, fresh)`: leaves `[k, *leaf.shape]` are the rows of these numbers;
                those that are not `fresh` were seen before, in the last micro-batch. Pass the same function again
                to reuse what was compiled.
            state: What to begin with. Its memory is taken over: do not use it again.
            row: What to compute for a row instead of its masked gradient: `row(params, examples_of_the_row)`.

        Returns:
            The last state.
        """
        arguments, static = (self.params, self.rows, self.masks, self.loss_row), self._static()
        return self._loop(lambda s, start: _fold_step(s, *arguments, start, step=step, row=row, stream=static), state)

    def step_bytes(self, step: Callable[..., State], state: State) -> int:
        """Memory that one step of a `fold` takes beside its arguments, as compiled: nothing is run.

        Args:
            step: As in `fold`.
            state: What to begin with; `jax.ShapeDtypeStruct`s are enough.

        Returns:
            Bytes.

        Raises:
            ValueError: The backend does not tell.
        """
        lowered = _fold_step.lower(
            state, self.params, self.rows, self.masks, self.loss_row, 0, step=step, row=None, stream=self._static()
        )
        memory = lowered.compile().memory_analysis()
        if memory is None:
            raise ValueError("This backend does not say how much memory a program takes: leave memory_budget out.")
        return memory.temp_size_in_bytes

    @on_any_axes
    def products(self, vector: Params) -> Float[Array, " m"]:
        """`Gv`, the derivative of every row's loss along `v`.

        Args:
            vector: A params-tree `v`.

        Returns:
            `[m]`.

        Raises:
            ValueError: Another tree than the parameters.
        """
        check_like(vector, self.params, "vector")
        arguments = self.params, self.rows, self.masks, self.loss_row, vector
        return self._loop(
            lambda s, start: _products_step(s, *arguments, start, stream=self._static()),
            jnp.zeros(self.num_rows, wide_dtype(self.params)),
        )

    @on_any_axes
    def combine(self, coefficients: Float[Array, " m"]) -> Params:
        """`Gᵀu`, a combination of the rows.

        Args:
            coefficients: `u [m]`.

        Returns:
            A params-tree.

        Raises:
            ValueError: Not `m` coefficients.
        """
        if jnp.shape(coefficients) != (self.num_rows,):
            raise ValueError(
                f"coefficients have shape {jnp.shape(coefficients)}, expected one for each of {self.num_rows} rows."
            )
        arguments = self.params, self.rows, self.masks, self.loss_row, coefficients
        empty = _empty_sums(self.params, self._static().placement)
        return self._loop(lambda s, start: _combine_step(s, *arguments, start, stream=self._static()), empty)

    @on_any_axes
    def squares(self, row: Callable[[Params, Batch], Any] | None = None) -> Params:
        """`Σ g²`, the sum over the rows of their squares.

        Args:
            row: As in `fold`; of what it returns for one row, `[c, *leaf.shape]`, the squares are averaged over `c`.

        Returns:
            A params-tree, at least float32.
        """
        empty = _empty_sums(self.params, self._static().placement)
        return self.fold(_add_squares, empty, row=row)

    def _loop(self, step: Callable[[State, Int[Array, ""] | int], State], state: State) -> State:
        # On the host where it can: XLA's CPU backend runs gradients of convolutions slowly inside a compiled loop.
        cut = self._static().cut
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((self, state))):
            return lax.fori_loop(0, len(cut.starts), lambda i, s: step(s, i * cut.at_once), state)
        for start in cut.starts:
            state = step(state, start)
        return state

    def _static(self) -> "_Static":
        placement = placement_of(self.params, self.batch)
        cut = Microbatches.of(self.num_rows, self.microbatch_size, placement)
        return _Static(cut, self.precision, placement)


@checked
@on_any_axes
def stream_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    masks: Masks | None = None,
    microbatch_size: int = 64,
    examples_per_gradient: int = 1,
    signs: Key[Array, ""] | None = None,
    remat: bool = False,
    check: bool = True,
) -> GradientStream:
    """Per-example gradients for a curvature that does not need to hold them.

    `block_fisher`, `diagonal_fisher` and `low_rank_fisher` take a stream wherever they take gradients.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, as in `per_example_gradients`. Arrays bound by
            `jax.tree_util.Partial` may change without compiling anew.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        masks: False takes a coordinate out of the problem: its gradient is zero.
        microbatch_size: Rows computed at once; `microbatch_for` finds as many as a budget takes.
        examples_per_gradient: Average this many consecutive examples `s` into one row.
        signs: Add the examples of a row up with random signs, over `√s`, in place of averaging them: rows of as many
            examples as there are in the pool, at the price of a few, whose Fisher is in expectation that of single
            examples, to be damped like it. Their mean gradient is of no use.
        remat: Compute activations again in the backward pass in place of holding them, as in `per_example_gradients`.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A stream; nothing is computed yet.

    Raises:
        ValueError: As `per_example_gradients`.

    Cost:
        None until it is used.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (w * x).sum() ** 2
        >>> wj.stream_gradients(loss, jnp.ones(1), jnp.array([[1.0], [3.0]])).products(jnp.ones(1)).tolist()
        [1.0, 9.0]
    """
    check_floating(params)
    group_examples(batch, examples_per_gradient)
    if masks is not None:
        check_like(masks, params, "masks")
        check_bool(masks, "masks")
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1.")
    try:
        hash(loss_fn)
    except TypeError as error:
        raise ValueError("The loss cannot be hashed, which jit needs to know it again: pass a function.") from error
    if check:
        check_loss(loss_fn, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
    params, batch, masks = jax.tree.map(jnp.asarray, (params, batch, masks))  # once, not at every micro-batch
    signed = signs is not None and examples_per_gradient > 1
    drawn = None
    if signed:
        rows = batch_size(batch) // examples_per_gradient
        drawn = jax.random.rademacher(signs, (rows, examples_per_gradient), jnp.float32)
    loss_row = LossRow(loss_fn, examples_per_gradient > 1, signed, remat)
    return GradientStream(params, batch, masks, drawn, loss_row, microbatch_size, examples_per_gradient)


@dataclass(frozen=True)
class _Static:
    """What the compiled steps know of a stream."""

    cut: Microbatches
    precision: str | None
    placement: Placement | None


def _losses(loss_row: LossRow, params: Params, chunk: Batch) -> Float[Array, " k"]:
    return jax.vmap(loss_row.loss, in_axes=(None, 0))(params, chunk)


@dataclass(frozen=True)
class _Write:
    """Puts gradients where their rows are; rows that were seen before are written over themselves."""

    cut: Microbatches
    placement: Placement | None

    def __call__(
        self, result: Gradients, gradients: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]
    ) -> Gradients:
        del fresh
        start = self.cut.start_of(numbers)
        return as_gradients(jax.tree.map(lambda x, g: self.cut.put(x, g, start), result, gradients), self.placement)


@partial(jax.jit, static_argnums=(1, 2))
def _empty_rows(params: Params, size: int, placement: Placement | None) -> Gradients:
    return as_gradients(jax.tree.map(lambda w: jnp.zeros((size, *w.shape), w.dtype), params), placement)


@partial(jax.jit, static_argnums=1)
def _empty_sums(params: Params, placement: Placement | None) -> Params:
    wide = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), params)
    return as_params(wide, placement)


def _add_squares(sums: Params, rows: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]) -> Params:
    del numbers

    def add(total: Array, row: Array) -> Array:
        squares = jnp.square(row.reshape(len(row), -1, *total.shape).astype(total.dtype)).mean(axis=1)
        return total + jnp.sum(jnp.where(fresh.reshape(-1, *(1,) * total.ndim), squares, 0), axis=0)

    return jax.tree.map(add, sums, rows)


@partial(jax.jit, static_argnames=("step", "row", "stream"), donate_argnums=0)
def _fold_step(
    state: Any,
    params: Params,
    rows: Batch,
    masks: Masks | None,
    loss_row: LossRow,
    start: int,
    *,
    step: Callable,
    row: Callable[[Params, Batch], Any] | None,
    stream: _Static,
) -> Any:
    chunk, numbers, fresh = stream.cut.take(rows, start)
    with jax.default_matmul_precision(stream.precision):
        gradients = jax.vmap(row or loss_row, in_axes=(None, 0))(params, chunk)
    if masks is not None and row is None:
        gradients = apply_masks(gradients, masks)
    if row is None:
        gradients = as_gradients(gradients, stream.placement)
    return step(state, gradients, numbers, fresh)


@partial(jax.jit, static_argnames="stream", donate_argnums=0)
def _products_step(
    result: Array,
    params: Params,
    rows: Batch,
    masks: Masks | None,
    loss_row: LossRow,
    vector: Params,
    start: int,
    *,
    stream: _Static,
) -> Array:
    chunk, *_ = stream.cut.take(rows, start)
    along = vector if masks is None else apply_masks(vector, masks)
    tangent = jax.tree.map(lambda v, w: v.astype(w.dtype), along, params)
    with jax.default_matmul_precision(stream.precision):
        _, slopes = jax.jvp(lambda p: _losses(loss_row, p, chunk), (params,), (tangent,))
    return stream.cut.put(result, slopes.astype(result.dtype), start)


@partial(jax.jit, static_argnames="stream", donate_argnums=0)
def _combine_step(
    result: Params,
    params: Params,
    rows: Batch,
    masks: Masks | None,
    loss_row: LossRow,
    coefficients: Array,
    start: int,
    *,
    stream: _Static,
) -> Params:
    (chunk, weights), _, fresh = stream.cut.take((rows, coefficients), start)
    with jax.default_matmul_precision(stream.precision):
        gradient = jax.grad(lambda p: jnp.dot(jnp.where(fresh, weights, 0), _losses(loss_row, p, chunk)))(params)
    if masks is not None:
        gradient = apply_masks(gradient, masks)
    return as_params(jax.tree.map(jnp.add, result, gradient), stream.placement)
