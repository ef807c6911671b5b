"""Per-example gradients: the rows of every empirical Fisher.

Which label a gradient is taken at decides which Fisher comes out:

| function | a row for each | at | `(1/rows) Σ g gᵀ` is |
|---|---|---|---|
| `per_example_gradients` | example | its true label | the empirical Fisher |
| `sampled_label_gradients` | sample | a label drawn from the model | an unbiased estimate of the Fisher |
| `all_class_gradients` | example, class | that class, times `√(C p_c)` | the exact Fisher |

The last two need no labels; for softmax cross-entropy the exact Fisher is the Gauss–Newton matrix.

Memory: `rows · d` for the result; the backward pass holds `microbatch_size` examples at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from woodjax.door import checked
from woodjax.loss_rows import LossRow, batch_size, group_examples
from woodjax.placement import Microbatches, Placement, as_gradients, on_any_axes, place_rows, placement_of
from woodjax.probe import check_loss
from woodjax.typing import ApplyFn, Batch, Gradients, LossFn, Params


@checked
@on_any_axes
def per_example_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    microbatch_size: int | None = None,
    examples_per_gradient: int = 1,
    remat: bool = False,
    check: bool = True,
) -> Gradients:
    """Gradient of the loss at every example, by `vmap` in micro-batches.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example: deterministic, batch
            normalisation in eval mode. It is compiled once for each function object, as by `jit`:
            what it reads from outside is read the first time.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        microbatch_size: Rows computed at once; None for all. Bounds the memory of the backward
            pass, not of the result. Outside `jit` the loop over micro-batches runs on the host;
            inside it is a `lax.map`, which XLA's CPU backend runs slowly for convolutions.
        examples_per_gradient: Average this many consecutive examples `s` into one row
            (WoodFisher's "fisher mini-batch"). The Fisher of such rows is about `1/s` of the
            per-example Fisher, so the same damping then damps `s` times more.
        remat: Compute activations again in the backward pass, piece by piece, in place of holding them all: less
            memory for one more forward pass. Of a `lax.scan`, what one step holds.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree whose leaves are `[n / s, *leaf.shape]`, in the dtype of the leaf.

    Raises:
        ValueError: Batch leaves of different or zero length; `n` not a multiple of
            `examples_per_gradient`; `microbatch_size < 1`; a loss that cannot be hashed; whatever `check_loss` finds.

    Cost:
        `n` forward and backward passes; memory `(n/s)·d` for the result and
        `microbatch_size` examples of activations.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (w * x).sum() ** 2
        >>> wj.per_example_gradients(loss, jnp.ones(1), jnp.array([[1.0], [3.0]])).tolist()
        [[1.0], [9.0]]
    """
    rows = group_examples(batch, examples_per_gradient)
    if check:
        check_loss(loss_fn, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
    return _map_rows(LossRow(loss_fn, examples_per_gradient > 1, remat=remat), params, rows, microbatch_size)


@checked
@on_any_axes
def sampled_label_gradients(
    apply_fn: ApplyFn,
    params: Params,
    inputs: Batch,
    key: Key[Array, ""],
    *,
    samples: int = 1,
    microbatch_size: int | None = None,
) -> Gradients:
    """Gradients of softmax cross-entropy at labels drawn from the model: the true Fisher's rows.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        inputs: Inputs without labels, `[n, ...]`.
        key: PRNG key.
        samples: Labels drawn for each input.
        microbatch_size: Inputs computed at once; None for all.

    Returns:
        A params-tree whose leaves are `[n · samples, *leaf.shape]`.

    Raises:
        ValueError: Inputs of different or zero length; `samples < 1`; logits not `[n, C]`;
            whatever `check_loss` finds.

    Cost:
        `n` forward and `n · samples` backward passes.

    References:
        Kunstner, Hennig & Balles 2019 (arXiv 1905.12558), section 2: why the empirical Fisher is
        not the Fisher.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> apply_fn = lambda w, x: x @ w
        >>> weights, inputs, key = jnp.zeros((1, 2)), jnp.ones((4, 1)), jax.random.key(0)
        >>> rows = wj.sampled_label_gradients(apply_fn, weights, inputs, key, samples=3)
        >>> rows.shape, jnp.unique(jnp.abs(rows)).round(3).tolist()
        ((12, 1, 2), [0.5])
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: pass at least 1.")

    placement = placement_of(params, inputs)
    keys = place_rows(jax.random.split(key, batch_size(inputs)), placement)
    check_apply(apply_fn, params, inputs)
    return _merge_rows(_map_rows(_SampledRows(apply_fn, samples), params, (inputs, keys), microbatch_size))


@checked
@on_any_axes
def sample_labels(apply_fn: ApplyFn, params: Params, inputs: Batch, key: Key[Array, ""]) -> Int[Array, " n"]:
    """Labels drawn from the model: they make a pool of examples out of inputs without labels.

    The Fisher of losses at such labels is an estimate of the model's own. Draw them once, from the dense network, and
    everything that takes a loss and examples works on `(inputs, labels)`.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        inputs: Inputs without labels, `[n, ...]`.
        key: PRNG key.

    Returns:
        Labels `[n]`.

    Raises:
        ValueError: Inputs of different or zero length; logits not `[n, C]`.

    Cost:
        `n` forward passes.

    References:
        Kunstner, Hennig & Balles 2019 (arXiv 1905.12558), section 2.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> certain = lambda params, x: jnp.stack([0 * x, 1e9 * x], axis=1)
        >>> wj.sample_labels(certain, jnp.ones(1), jnp.array([1.0, -1.0]), jax.random.key(0)).tolist()
        [1, 0]
    """
    size = batch_size(inputs)
    logits = apply_fn(params, inputs)
    if logits.ndim != 2 or logits.shape[0] != size:
        raise ValueError(f"apply_fn returned {logits.shape} for {size} inputs: expected logits [{size}, C].")
    return jax.random.categorical(key, logits)


@checked
@on_any_axes
def all_class_gradients(
    apply_fn: ApplyFn, params: Params, inputs: Batch, *, microbatch_size: int | None = None
) -> Gradients:
    """Gradients at every class, weighted so that their mean outer product is the exact Fisher.

    Row `(i, c)` is `√(C p_c) ∇(−log p_c)`; the mean over all `n·C` rows is
    `(1/n) Σᵢ Σ_c p_c g_c g_cᵀ`, the Gauss–Newton matrix of softmax cross-entropy.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        inputs: Inputs without labels, `[n, ...]`.
        microbatch_size: Inputs computed at once; None for all.

    Returns:
        A params-tree whose leaves are `[n · C, *leaf.shape]`.

    Raises:
        ValueError: Inputs of different or zero length; logits not `[n, C]`;
            whatever `check_loss` finds.

    Cost:
        `n` forward and `n·C` backward passes.

    References:
        Martens 2014 (arXiv 1412.1193), section 9.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> apply_fn = lambda w, x: x @ w
        >>> wj.all_class_gradients(apply_fn, jnp.zeros((1, 2)), jnp.ones((1, 1))).round(3).tolist()  # p = ½, ½
        [[[-0.5, 0.5]], [[0.5, -0.5]]]
    """
    batch_size(inputs)
    check_apply(apply_fn, params, inputs)
    return _merge_rows(_map_rows(AllClassRows(apply_fn), params, inputs, microbatch_size))


@dataclass(frozen=True)
class _SampledRows:
    """Gradients of one input at labels drawn from the model."""

    apply_fn: ApplyFn
    samples: int

    def __call__(self, params: Params, row: Batch) -> Gradients:
        example, key = row
        logits, pull_back = _logits(self.apply_fn, params, example)
        labels = jax.random.categorical(key, logits, shape=(self.samples,))
        return pull_back(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[0], dtype=logits.dtype))


@dataclass(frozen=True)
class AllClassRows:
    """Weighted gradients of one input at every class."""

    apply_fn: ApplyFn

    def __call__(self, params: Params, row: Batch) -> Gradients:
        """A row for each class: their mean outer product is the exact Fisher of the input."""
        logits, pull_back = _logits(self.apply_fn, params, row)
        p, classes = jax.nn.softmax(logits), logits.shape[0]
        return pull_back(jnp.sqrt(classes * p)[:, None] * (p - jnp.eye(classes, dtype=logits.dtype)))


def _logits(apply_fn: ApplyFn, params: Params, example: Batch) -> tuple[Array, Callable[[Array], Gradients]]:
    # Logits [C] of one input, and the map from cotangents [r, C] to r rows of gradients.
    one = jax.tree.map(lambda x: x[None], example)
    logits, vjp = jax.vjp(lambda p: apply_fn(p, one), params)
    if logits.ndim != 2 or logits.shape[0] != 1:
        raise ValueError(f"apply_fn returned {logits.shape} for one input: expected logits [1, C].")
    return logits[0], jax.vmap(lambda direction: vjp(direction[None])[0])


def check_apply(apply_fn: ApplyFn, params: Params, inputs: Batch) -> None:
    """Raise unless `apply_fn` is deterministic and in eval mode.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits`.
        params: A params-tree.
        inputs: `[n, ...]`.

    Raises:
        ValueError: As `check_loss`.
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    check_loss(lambda p, e: jnp.sum(apply_fn(p, jax.tree.map(lambda x: x[None], e))), params, example)


def _merge_rows(gradients: Gradients) -> Gradients:
    return jax.tree.map(lambda g: jnp.reshape(g, (-1, *g.shape[2:])), gradients)


def _map_rows(
    row_fn: Callable[[Params, Batch], Params], params: Params, rows: Batch, microbatch_size: int | None
) -> Gradients:
    size = batch_size(rows)
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1, or None.")
    try:
        hash(row_fn)
    except TypeError as error:
        raise ValueError("The loss cannot be hashed, which jit needs to know it again: pass a function.") from error
    placement = placement_of(params, rows)
    cut = Microbatches.of(size, microbatch_size or size, placement)
    if cut.at_once == size:
        return _vmap_rows(params, rows, row_fn=row_fn, placement=placement)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, rows))):
        return lax.map(lambda row: row_fn(params, row), rows, batch_size=microbatch_size)
    # Outside jit the loop runs on the host, into one donated buffer. XLA's CPU backend runs the gradient of a
    # convolution inside a compiled loop by a naive kernel, many times slower than the same outside one.
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)  # no row leaves its device
    row_shapes = jax.eval_shape(row_fn, params, row)
    result = _empty_rows(size, jax.tree.structure(row_shapes), tuple(jax.tree.leaves(row_shapes)), placement)
    for start in cut.starts:
        result = _fill_rows(result, params, rows, start, row_fn=row_fn, cut=cut, placement=placement)
    return result


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_rows(size: int, treedef: Any, shapes: tuple[Any, ...], placement: Placement | None) -> Gradients:
    empty = [jnp.zeros((size, *shape.shape), shape.dtype) for shape in shapes]
    return as_gradients(jax.tree.unflatten(treedef, empty), placement)


@partial(jax.jit, static_argnames=("row_fn", "placement"))
def _vmap_rows(
    params: Params, rows: Batch, *, row_fn: Callable[[Params, Batch], Params], placement: Placement | None
) -> Gradients:
    return as_gradients(jax.vmap(lambda row: row_fn(params, row))(rows), placement)


@partial(jax.jit, static_argnames=("row_fn", "cut", "placement"), donate_argnums=0)
def _fill_rows(
    result: Gradients,
    params: Params,
    rows: Batch,
    start: int,
    *,
    row_fn: Callable[[Params, Batch], Params],
    cut: Microbatches,
    placement: Placement | None,
) -> Gradients:
    chunk, *_ = cut.take(rows, start)
    filled = as_gradients(jax.vmap(lambda row: row_fn(params, row))(chunk), placement)
    return as_gradients(jax.tree.map(lambda x, g: cut.put(x, g, start), result, filled), placement)
