"""What curvatures of dense layers share: sums over taps, and a matrix `[in, out]` for each selected leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import after
from woodjax.stream import GradientStream
from woodjax.taps import Tap, TapRow, dense_leaves
from woodjax.tree import Layout, make_layout
from woodjax.typing import Gradients, Params, Select

State: TypeAlias = Any  # what a leaf is summed into: a pytree of arrays
Add = Callable[[State, Float[Array, "k in"], Float[Array, "k out"]], State]
Matrices = list[Float[Array, "in out"]]  # one for each selected leaf


@dataclass(frozen=True)
class DenseLayers:
    """A curvature that is block-diagonal in the kernels of dense layers."""

    layout: Layout

    def _matrices(self, tree: Params) -> Matrices:
        jax.eval_shape(self.layout.to_blocks, tree)  # checks structure and shapes
        found = zip(self.layout.leaves, self.layout.flatten(tree), strict=True)
        return [jnp.asarray(leaf) for spec, leaf in found if spec.selected]

    def _tree(self, matrices: Matrices) -> Params:
        found = iter(matrices)
        leaves = [next(found) if spec.selected else jnp.zeros(spec.shape) for spec in self.layout.leaves]
        return jax.tree.unflatten(self.layout.treedef, leaves)


def layout_of_dense_layers(stream: GradientStream, select: Select, name: str) -> Layout:
    """Layout of the selected leaves, all of which must be kernels of dense layers.

    Args:
        stream: Rows of gradients.
        select: Which leaves are prunable.
        name: Of the curvature, for messages.

    Returns:
        The layout.

    Raises:
        ValueError: Not a stream, or one with masks; a selected leaf whose inputs are not found; as `make_layout`.
    """
    if not isinstance(stream, GradientStream):
        raise ValueError(f"{name} takes a stream of gradients: pass woodjax.stream_gradients(...).")
    if stream.masks is not None:
        raise ValueError(
            f"{name} has one matrix of inputs for all output units and cannot leave single weights out: pass a stream "
            "without masks, or use woodjax.row_fisher."
        )
    layout = make_layout(stream.params, select=select)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stream.rows)
    tapped = dense_leaves(stream.loss_row.loss, stream.params, example)
    lost = [spec.path for i, spec in enumerate(layout.leaves) if spec.selected and i not in tapped]
    if lost:
        raise ValueError(
            f"{name}: the leaves {lost} are not used once as a @ W with one vector a for each row, as the kernels of "
            "dense layers are (and not with examples_per_gradient > 1). Leave them out by select=, for example "
            f"select=lambda path, leaf: path not in {lost} and len(leaf.shape) >= 2; woodjax.row_fisher takes any "
            "kernel."
        )
    return layout


@dataclass(frozen=True)
class _AddTaps:
    """Adds the taps of a micro-batch, leaf by leaf; rows that are not fresh are zero."""

    add: Add
    numbers: tuple[int, ...]

    def __call__(
        self,
        sums: list[State],
        found: tuple[Gradients, dict[int, Tap]],
        numbers: Int[Array, " k"],
        fresh: Bool[Array, " k"],
    ) -> list[State]:
        def only_fresh(rows: Array) -> Array:
            return jnp.where(fresh[:, None], rows, 0).astype(jnp.promote_types(rows.dtype, jnp.float32))

        _, taps = found
        return [
            self.add(total, only_fresh(taps[number].inputs), only_fresh(taps[number].output_gradient))
            for total, number in zip(sums, self.numbers, strict=True)
        ]


def sum_taps(
    stream: GradientStream,
    layout: Layout,
    add: Add,
    empty: list[State],
) -> list[State]:
    """Build something up from the inputs and output gradients of every selected leaf.

    Args:
        stream: Rows of gradients.
        layout: From `layout_of_dense_layers`.
        add: `add(state, inputs, output_gradients)` of one leaf and micro-batch; what it does not use is not computed.
        empty: The states before any data, one for each selected leaf; taken over.

    Returns:
        The new states.
    """
    numbers = tuple(number for number, spec in enumerate(layout.leaves) if spec.selected)
    return stream.fold(_AddTaps(add, numbers), empty, row=TapRow(stream.loss_row, numbers))


def add_outer(total: Float[Array, "n n"], rows: Float[Array, "k n"]) -> Float[Array, "n n"]:
    """`total + Σ x xᵀ`.

    Args:
        total: `[n, n]`.
        rows: `[k, n]`.

    Returns:
        `[n, n]`.
    """
    return total + linalg.contract("ki,kj->ij", rows, rows).astype(total.dtype)


def invert_in_turn(matrices: list[Float[Array, "n n"]], dampings: list[Float[Array, ""]]) -> list[linalg.DampedInverse]:
    """Damped inverses of matrices of different sizes, one factorisation after another.

    Args:
        matrices: Positive semidefinite.
        dampings: One for each.

    Returns:
        An inverse for each.

    Cost:
        `2n³` flops each.
    """
    results: list[linalg.DampedInverse] = []
    for matrix, damping in zip(matrices, dampings, strict=True):
        waiting = after(matrix, results[-1].damping) if results else matrix
        results.append(linalg.fisher_inverse(waiting, damping))
    return results


def damp(matrix: Float[Array, "n n"], damping: Float[Array, ""]) -> Float[Array, "n n"]:
    """`matrix + λI`.

    Args:
        matrix: `[n, n]`.
        damping: `λ`.

    Returns:
        `[n, n]`.
    """
    return matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
