"""Which columns of a curvature a device owns: those of the shards that it holds.

A shard is flattened in row-major order and cut into blocks as a leaf is; blocks do not cross shards. Where several
devices hold the same shard its blocks are shared out among them, those along the axes of the examples first: that is
how an exchange of gradients leaves them. With parameters that are replicated the blocks are those of one device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from woodjax.placement.mesh import Axes, Placement
from woodjax.tree import Layout, LeafSpec
from woodjax.typing import PyTree


class Share(NamedTuple):
    """Selected leaves whose shards are held by devices alike, and so are shared out alike."""

    members: tuple[int, ...]  # numbers of the leaves
    rows: Axes  # axes along which rows of gradients are split
    others: Axes  # further axes along which the leaves are replicated
    layout: Layout  # of the shards
    pieces: int  # devices that hold the same shards
    each: int  # blocks, or columns of the whole network, of one of them

    @property
    def free(self) -> Axes:
        """Axes along which the leaves are replicated."""
        return (*self.rows, *self.others)


@dataclass(frozen=True)
class ShardedLayout(Layout):
    """A layout of parameters on a mesh. Made by `sharded_layout`.

    Arrays of blocks are split over all devices along the blocks, or along the columns where the whole network is one
    block: `num_blocks` and `block_size` count the padding that makes the parts equal.
    """

    placement: Placement

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """How the selected leaves are shared out."""
        return _shares(self.leaves, self.placement, self._size, self.whole)

    @property
    def _size(self) -> int | None:
        return None if self.whole else self.block_size

    @property
    def own(self) -> int:
        """Blocks of one device; columns where the whole network is one block."""
        return sum(share.each for share in self.shares)

    @property
    def row_devices(self) -> int:
        """Devices that rows of gradients are split over at most."""
        return max(self.placement.size(share.rows) for share in self.shares)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, padding included."""
        return 1 if self.whole else self.placement.mesh.size * self.own

    @property
    def view(self) -> "ShardView":
        """The layout as a device sees it inside `shard_map`."""
        local = _local(self.leaves, self.placement)
        return ShardView(self.treedef, local, self.own if self.whole else self.block_size, self.whole, self)

    def spread(self, axis: int) -> PartitionSpec:
        """Spec of an array that is split over all devices along one axis."""
        return PartitionSpec(*(None,) * axis, self.placement.mesh.axis_names)

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device, of what it holds of the arguments."""
        mesh = self.placement.mesh
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axis: int) -> Shaped[Array, "..."]:
        """Zeros that are split over all devices along one axis."""
        placed = NamedSharding(self.placement.mesh, self.spread(axis))
        return _zeros(shape, dtype, placed)

    def placed(self, shapes: PyTree, specs: PyTree) -> PyTree:
        """Shapes of arrays with their shardings."""

        def place(x: Any, spec: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.placement.mesh, spec))

        return jax.tree.map(place, shapes, specs)

    def tree_specs(self, lead: int = 0) -> PyTree:
        """Specs of a params-tree, or of one with a leading axis that is not split."""
        specs = [PartitionSpec(*(None,) * lead, *leaf.spec) for leaf in self.placement.leaves]
        return jax.tree.unflatten(self.treedef, specs)

    def gradient_specs(self) -> PyTree:
        """Specs of gradients."""
        return jax.tree.unflatten(self.treedef, [leaf.gradient_spec for leaf in self.placement.leaves])

    def to_blocks(self, tree: PyTree) -> Shaped[Array, "*lead nb b"]:
        """As `Layout.to_blocks`; the rows of gradients go to the owners of their columns by one all-to-all."""
        lead = len(self.lead(tree))
        if lead > 1:
            raise ValueError(f"Leaves have {lead} leading axes: pass a params-tree, or gradients [m, *leaf.shape].")
        return _to_blocks(tree, self, lead)

    def to_tree(self, blocks: Shaped[Array, "nb b"], fill: float | bool) -> PyTree:
        """As `Layout.to_tree`; a leaf that several devices hold alike is put together among them."""
        return _to_tree(blocks, fill, self)


@dataclass(frozen=True)
class ShardView(Layout):
    """What a device sees of a sharded layout: its own blocks, and its shards of the leaves."""

    whole_layout: ShardedLayout

    @property
    def num_blocks(self) -> int:
        """Own blocks."""
        return 1 if self.whole else self.whole_layout.own

    @property
    def view(self) -> "ShardView":
        """Itself."""
        return self

    @property
    def column_axes(self) -> Axes:
        """Mesh axes over which the columns of one block are split."""
        return self.mesh_axes if self.whole else ()

    @property
    def mesh_axes(self) -> Axes:
        """Mesh axes over which blocks and columns are split."""
        return tuple(self.whole_layout.placement.mesh.axis_names)

    def to_blocks(self, tree: PyTree) -> Shaped[Array, "*lead nb b"]:
        """Own blocks of the shards of a tree, or of all rows of gradients of which some are here."""
        leaves = self.flatten(tree)
        parts = [self._exchanged(share, leaves) for share in self.whole_layout.shares]
        blocks = jnp.concatenate(parts, axis=-2)
        return jnp.swapaxes(blocks, -1, -2) if self.whole else blocks

    def window(self, gradients: PyTree, start: Array, width: int) -> Float[Array, "m w"]:
        """Some of the own columns of gradients: only these travel.

        Args:
            gradients: Shards, leaves `[k, *leaf.shape]`.
            start: First of the own columns of the whole network.
            width: How many.

        Returns:
            All rows of the columns.
        """
        leaves, position, parts = self.flatten(gradients), 0, []
        for share in self.whole_layout.shares:
            # Columns of other shares are zero here; together the shares fill the window.
            places = start - position + jnp.arange(width)
            inside = (places >= 0) & (places < share.each)
            pieces = self._pieces(share, leaves)[..., 0]
            some = jnp.where(inside, jnp.take(pieces, jnp.clip(places, 0, share.each - 1), axis=-1), 0)
            parts.append(_to_owners(some, share.rows))
            position += share.each
        return sum(parts[1:], start=parts[0])

    def sums(self, gradients: PyTree, outer: Callable[[Array], Array]) -> Float[Array, "nb b b"]:
        """Sums over the rows of all devices for the own blocks: sums travel, rows do not.

        Args:
            gradients: Shards, leaves `[k, *leaf.shape]`.
            outer: From rows `[k, n, b]` to sums `[n, b, b]`.

        Returns:
            Sums.
        """
        leaves, parts = self.flatten(gradients), []
        for share in self.whole_layout.shares:
            pieces = self._pieces(share, leaves)  # [k, pieces along the rows, each, b]
            totals = outer(pieces.reshape(len(pieces), -1, pieces.shape[-1]))
            totals = totals.reshape(*pieces.shape[1:3], *totals.shape[1:])
            parts.append(lax.psum_scatter(totals, share.rows) if share.rows else totals[0])
        return jnp.concatenate(parts)

    def to_tree(self, blocks: Shaped[Array, "nb b"], fill: float | bool) -> PyTree:
        """Shards of a tree from the own blocks of all devices."""
        units = blocks.reshape(-1, 1) if self.whole else blocks
        leaves = [jnp.full(spec.shape, fill, blocks.dtype) for spec in self.leaves]
        position = 0
        for share in self.whole_layout.shares:
            part = units[position : position + share.each]
            position += share.each
            if share.pieces > 1:
                part = lax.all_gather(part, share.free, tiled=True)
            part = part[: _units(share.layout)]
            held = share.layout.to_tree(part.reshape(1, -1) if self.whole else part, fill)
            for number, leaf in zip(share.members, held, strict=True):
                leaves[number] = leaf
        return jax.tree.unflatten(self.treedef, leaves)

    def _pieces(self, share: Share, leaves: list[Array]) -> Shaped[Array, "*lead r each w"]:
        # Blocks of the shards, cut for the devices along the axes of the rows; those along other axes take their own.
        blocks = share.layout.to_blocks([leaves[number] for number in share.members])
        units = jnp.swapaxes(blocks, -1, -2) if self.whole else blocks
        lead, (n, width) = units.shape[:-2], units.shape[-2:]
        padding = [(0, 0)] * len(lead) + [(0, share.pieces * share.each - n), (0, 0)]
        along = self.whole_layout.placement.size(share.rows)
        cut = jnp.pad(units, padding).reshape(*lead, along, -1, share.each, width)
        return jnp.take(cut, _index(share.others), axis=len(lead) + 1)

    def _exchanged(self, share: Share, leaves: list[Array]) -> Shaped[Array, "*lead each w"]:
        pieces = self._pieces(share, leaves)
        if pieces.ndim == 3:
            return jnp.take(pieces, _index(share.rows), axis=0)
        return _to_owners(pieces, share.rows)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: DTypeLike, placed: NamedSharding) -> Array:
    return lax.with_sharding_constraint(jnp.zeros(shape, dtype), placed)


@partial(jax.jit, static_argnums=(1, 2))
def _to_blocks(tree: PyTree, layout: ShardedLayout, lead: int) -> Shaped[Array, "*lead nb b"]:
    specs = layout.gradient_specs() if lead else layout.tree_specs()
    return layout.run(layout.view.to_blocks, (specs,), layout.spread(lead + layout.whole))(tree)


@partial(jax.jit, static_argnums=(1, 2))
def _to_tree(blocks: Array, fill: float | bool, layout: ShardedLayout) -> PyTree:
    specs = (layout.spread(int(layout.whole)),), layout.tree_specs()
    return layout.run(partial(layout.view.to_tree, fill=fill), *specs)(blocks)


def sharded_layout(layout: Layout, placement: Placement) -> ShardedLayout:
    """The layout of parameters that lie on a mesh.

    Args:
        layout: Of the parameters as one device would see them.
        placement: Where they lie.

    Returns:
        A static, hashable layout.
    """
    size = None if layout.whole else layout.block_size
    shares = _shares(layout.leaves, placement, size, layout.whole)
    if layout.whole:
        columns = placement.mesh.size * sum(share.each for share in shares)
    else:
        columns = max(share.layout.block_size for share in shares)
    return ShardedLayout(layout.treedef, layout.leaves, columns, layout.whole, placement)


def _shares(leaves: tuple[LeafSpec, ...], placement: Placement, size: int | None, whole: bool) -> tuple[Share, ...]:
    alike: dict[tuple[Axes, Axes], list[int]] = {}
    for number, spec in enumerate(leaves):
        if spec.selected:
            place = placement.leaves[number]
            others = [axis for axis in placement.mesh.axis_names if axis not in (*place.axes, *place.rows)]
            alike.setdefault((place.rows, tuple(others)), []).append(number)
    local = _local(leaves, placement)
    largest = max(spec.row_size for spec in local if spec.selected)
    shares = []
    for (rows, others), members in alike.items():
        specs = tuple(local[number] for number in members)
        total = sum(spec.size for spec in specs)
        width = total if whole or size is None else min(size, largest)
        layout = Layout(jax.tree.structure([0] * len(members)), specs, width, whole)
        pieces = placement.size((*rows, *others))
        shares.append(Share(tuple(members), rows, others, layout, pieces, -(-_units(layout) // pieces)))
    return tuple(shares)


def _units(layout: Layout) -> int:
    return layout.num_weights if layout.whole else layout.num_blocks


def _local(leaves: tuple[LeafSpec, ...], placement: Placement) -> tuple[LeafSpec, ...]:
    # The shards that a device holds.
    local = []
    for number, spec in enumerate(leaves):
        shape, stacked = placement.local_shape(number, spec.shape), 0
        while math.prod(spec.shape[:stacked]) < spec.rows:  # layers along the leading axes, of which a shard holds some
            stacked += 1
        local.append(spec._replace(shape=shape, rows=math.prod(shape[:stacked])))
    return tuple(local)


def _index(axes: Axes) -> Any:
    return lax.axis_index(axes) if axes else 0


def _to_owners(pieces: Shaped[Array, "k r *unit"], rows: Axes) -> Shaped[Array, "m *unit"]:
    if rows:
        pieces = lax.all_to_all(pieces, rows, split_axis=1, concat_axis=0, tiled=True)
    return pieces[:, 0]
