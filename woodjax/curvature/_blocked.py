"""What all Fishers share: the way from a tree to blocks `[nb, b]` and back.

A member computes on blocks; this file gives it the protocol's face, checks what comes in and
keeps padding and unselected leaves out of every answer.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature.protocol import Curvature, compiled
from woodjax.tree import Layout
from woodjax.typing import Groups, Masks, Params, Updates

INVERSION_BYTES = 52  # of workspace for each entry of a matrix that is factored and inverted, as compiled
WORKSPACE = 2**26  # bytes that a step over several blocks may take beside its input and result


@dataclass(frozen=True)
class Grouped(abc.ABC):
    """A curvature that answers for groups from `[H⁻¹]_QQ` of some of them at a time.

    Leaves whose groups can be looked up together are one `part`, and one program for each size of groups.
    """

    layout: Layout

    @abc.abstractmethod
    def group_places(self, leaf: int, groups: Int[Array, "n q"]) -> tuple[int, Int[Array, "n q"]]:
        """The part that a leaf belongs to, and where in it the weights of the leaf's groups stand.

        Args:
            leaf: Number of the leaf.
            groups: Indices into the flattened leaf.

        Returns:
            The number of the part, and places in it.
        """

    @abc.abstractmethod
    def damping_tree(self) -> Params:
        """`λ` of every coordinate, as used; 0 on leaves that are not prunable."""

    @abc.abstractmethod
    def submatrices(self, part: int, places: Int[Array, "c q"]) -> Float[Array, "c q q"]:
        """`[H⁻¹]_QQ` of some groups of a part, all at once.

        Args:
            part: Number of the part.
            places: Of the weights of each group.

        Returns:
            `[c, q, q]`; 0 between weights whose correlation `H` does not hold.
        """

    def costs(self, part: int, places: Int[Array, "c q"], target: Float[Array, "c q"]) -> Float[Array, " c"]:
        """`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` of some groups of a part, all at once.

        Args:
            part: Number of the part.
            places: Of the weights of each group.
            target: `t`, at these places.

        Returns:
            `[c]`, in units of the loss.
        """
        inverse = self.submatrices(part, places)
        if len(inverse) == 1:  # no batch of LAPACK calls where there is one group
            return linalg.group_cost(inverse[0], target[0])[None]
        return jax.vmap(linalg.group_cost)(inverse, target)

    def group_bytes(self, size: int) -> int:
        """Workspace for one group.

        Args:
            size: Weights in the group.

        Returns:
            Bytes.
        """
        return INVERSION_BYTES * size * size

    @partial(compiled, groups=True)
    def group_inverse(self, groups: Groups) -> Params:
        """`[H⁻¹]_QQ` of every group, `[n, q, q]` for each leaf. Correlations that `H` does not hold are zero."""
        return self._group_answers(self.submatrices, groups)

    @partial(compiled, groups=True)
    def group_costs(self, target: Params, groups: Groups) -> Params:
        """`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` of every group, `[n]` for each leaf, a bounded workspace of groups at a time."""
        jax.eval_shape(self.layout.to_blocks, target)  # checks structure and shapes
        return self._group_answers(self.costs, groups, target)

    @partial(compiled, groups=True)
    def coupled_costs(self, target: Params, groups: Groups) -> Float[Array, " n"]:
        """`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` of groups whose weights are in several leaves: the `i`-th is row `i` of every leaf.

        Args:
            target: `t`, leaves `[n, q]`, `[n, 0]` where the groups have no weights.
            groups: Indices into each flattened leaf, of the same shapes; no weight twice in one group.

        Returns:
            `[n]`, in units of the loss.

        Raises:
            ValueError: Another tree structure; groups in a leaf that is not prunable.

        Cost:
            As `group_costs`; correlations between parts are zero.
        """
        parts: dict[int, list[tuple[Array, Array]]] = {}
        pairs = zip(self.layout.flatten(groups), self.layout.flatten(target), strict=True)
        for leaf, (at, t) in enumerate(pairs):
            if at.size and not self.layout.leaves[leaf].selected:
                raise ValueError(f"Leaf '{self.layout.leaves[leaf].path}' is not prunable: it has no groups.")
            if at.size:
                part, places = self.group_places(leaf, at)
                parts.setdefault(part, []).append((places, t))
        total = jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(self)))
        for part, members in parts.items():  # one after another; no correlations between parts
            places, values = (jnp.concatenate(held, axis=1) for held in zip(*members, strict=True))
            waiting = places + after(jnp.zeros((), total.dtype), total).astype(places.dtype)
            costs = _stream(partial(self.costs, part), self.group_bytes, waiting, values.astype(total.dtype))
            total = total + costs
        return total

    def _group_answers(self, function: Callable[..., Array], groups: Groups, target: Params | None = None) -> Params:
        indices = self.layout.flatten(groups)
        values = [None] * len(indices) if target is None else self.layout.flatten(target)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(self))
        together: dict[tuple[int, int], list[tuple[int, list[Array]]]] = {}
        for leaf, (at, w) in enumerate(zip(indices, values, strict=True)):
            if len(at) and not self.layout.leaves[leaf].selected:
                raise ValueError(f"Leaf '{self.layout.leaves[leaf].path}' is not prunable: it has no groups.")
            if len(at):
                part, places = self.group_places(leaf, at)
                per_group = [places] if w is None else [places, w.reshape(-1)[at].astype(dtype)]
                together.setdefault((part, at.shape[1]), []).append((leaf, per_group))
        results = [jnp.zeros((0,) if target is not None else (0, *at.shape[1:] * 2), dtype) for at in indices]
        done = jnp.zeros((), dtype)
        for (part, _), members in together.items():  # one after another
            places, *targets = (jnp.concatenate(parts) for parts in zip(*(held for _, held in members), strict=True))
            waiting = places + after(jnp.zeros((), dtype), done).astype(places.dtype)
            done = _stream(partial(function, part), self.group_bytes, waiting, *targets)
            ends = np.cumsum([len(held[0]) for _, held in members])[:-1]
            for (leaf, _), result in zip(members, jnp.split(done, ends), strict=True):
                results[leaf] = result
        return jax.tree.unflatten(self.layout.treedef, results)


@dataclass(frozen=True)
class Blocked(Grouped):
    """A curvature that is block-diagonal in the blocks of a layout."""

    @abc.abstractmethod
    def shard_specs(self) -> Any:
        """The curvature with the specs of its arrays in their place."""

    @abc.abstractmethod
    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """Diagonal of `H⁻¹`, block by block."""

    @abc.abstractmethod
    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`H⁻¹v`, block by block.

        Args:
            blocks: `v`.

        Returns:
            Blocks.
        """

    @abc.abstractmethod
    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`Hv`, block by block.

        Args:
            blocks: `v`.

        Returns:
            Blocks.
        """

    @abc.abstractmethod
    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """Constrained minimiser, block by block.

        Args:
            weights: `w`.
            kept: True = survives.
            gradient: Mean gradient; None for a network at a minimum.

        Returns:
            The update `δ`, exactly `−w` on pruned weights.
        """

    def group_places(self, leaf: int, groups: Int[Array, "n q"]) -> tuple[int, Int[Array, "n q"]]:
        """All leaves are one part: places among the flattened blocks."""
        return 0, self.layout.positions(leaf, groups)

    @compiled
    def damping_tree(self) -> Params:
        """One number for each block."""
        shape = self.layout.num_blocks, self.layout.block_size
        return self.layout.to_tree(jnp.broadcast_to(cast(Curvature, self).damping.reshape(-1, 1), shape), fill=0)

    @compiled
    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq` for every coordinate; 0 on leaves that are not prunable."""
        diagonal = self.block_inverse_diagonal()
        # 0 says "held fixed": a prunable coordinate whose diagonal was lost must not be taken for that.
        return self.layout.to_tree(jnp.where(diagonal > 0, diagonal, jnp.nan), fill=0)

    @compiled
    def solve(self, tree: Params) -> Params:
        """`H⁻¹v`; 0 on leaves that are not prunable."""
        return self.layout.to_tree(self.block_solve(self.layout.to_blocks(tree)), fill=0)

    @compiled
    def matvec(self, tree: Params) -> Params:
        """`Hv`; 0 on leaves that are not prunable."""
        return self.layout.to_tree(self.block_matvec(self.layout.to_blocks(tree)), fill=0)

    @compiled
    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`; 0 on leaves that are not prunable."""
        pruned = self.layout.to_blocks(jax.tree.map(jnp.logical_not, masks))  # padding is not pruned
        first_order = None if gradient is None else self.layout.to_blocks(gradient)
        blocks = self.block_compensate(self.layout.to_blocks(params), ~pruned, first_order)
        return self.layout.to_tree(blocks, fill=0)


def map_blocks(function: Callable[..., Any], rows: Float[Array, "m nb b"], *per_block: Any) -> Any:
    """Apply a function of one block to every block, within a bounded workspace.

    XLA's CPU backend multiplies one block at a time faster than a batch of them, and
    never transposes the rows that way; accelerators want as many at once as the workspace takes.

    Args:
        function: `function(columns [m, b], *leaves)`, for one block.
        rows: Gradients in blocks.
        *per_block: Trees of arrays with a leading axis `[nb]`.

    Returns:
        What the function returns, with a leading axis `[nb]`.
    """
    m, nb, b = rows.shape
    if nb == 1:
        only = function(rows.reshape(m, b), *jax.tree.map(lambda x: x[0], per_block))
        return jax.tree.map(lambda x: x[None], only)
    flat = rows.reshape(m, nb * b)

    def one(arguments: tuple[Any, ...]) -> Any:
        index, *leaves = arguments
        return function(lax.dynamic_slice_in_dim(flat, index * b, b, axis=1), *leaves)

    at_once = blocks_at_once(4 * (m * b + min(m, b) ** 2))
    return lax.map(one, (jnp.arange(nb), *per_block), batch_size=at_once if at_once > 1 else None)


def map_chunks(function: Callable[..., Any], per_block: Any, bytes_each: int) -> Any:
    """Apply a function of one block to every block, within a bounded workspace.

    On CPU one after another: jaxlib 0.10 shards a batch of LAPACK calls over the threads that run the
    program and waits for them, and on few cores two such calls wait for each other for ever.

    Args:
        function: `function(leaves)`, for one block.
        per_block: A tree of arrays with a leading axis `[nb]`.
        bytes_each: Workspace of one block.

    Returns:
        What the function returns, with a leading axis `[nb]`.
    """
    nb = jax.tree.leaves(per_block)[0].shape[0]
    if nb == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], per_block)))
    at_once = blocks_at_once(bytes_each)
    return lax.map(function, per_block, batch_size=at_once if at_once > 1 else None)


def after(operand: Float[Array, "..."], done: Float[Array, "..."]) -> Float[Array, "..."]:
    """The operand, not before another result is there: see `map_chunks` for why.

    Args:
        operand: Any array.
        done: What to wait for; its first entry is read.

    Returns:
        The operand. Barriers are removed before XLA's CPU backend makes its schedule; a product with zero is not.
    """
    return operand + 0 * jnp.nan_to_num(done.reshape(-1)[0])


def blocks_at_once(bytes_each: int) -> int:
    """How many blocks may be in work at the same time: on CPU one, see `map_blocks` and `map_chunks` for why.

    Args:
        bytes_each: Workspace of one block.

    Returns:
        At least 1.
    """
    return 1 if jax.default_backend() == "cpu" else max(1, WORKSPACE // bytes_each)


def _stream(
    function: Callable[..., Array], bytes_each: Callable[[int], int], groups: Int[Array, "n q"], *more: Array
) -> Array:
    """Apply a function of some groups to all of them, within a bounded workspace."""
    n, q = groups.shape
    at_once = max(1, linalg.COLUMN_WINDOW // q) if q <= linalg.ELIMINATED else blocks_at_once(bytes_each(q))
    if n <= at_once:
        return function(groups, *more)

    def chunks(x: Any) -> Array:
        padded = jnp.pad(x, [(0, -n % at_once)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return padded.reshape(-1, at_once, *x.shape[1:])

    results = lax.map(lambda some: function(*some), tuple(map(chunks, (groups, *more))))
    return results.reshape(-1, *results.shape[2:])[:n]
