"""The additive life of a Fisher: while data arrive it is a state that can be added to, merged and saved.

`init → add → merge → finalize(damping)`. A state is a pytree of arrays: `jit` it, save it by Orbax,
merge states of other runs, devices and days. One state serves any damping, sparsity, pattern and
budget afterwards, without new gradients.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from woodjax.curvature.damping import ONE_PERCENT, Damping, check_damping
from woodjax.curvature.protocol import Curvature
from woodjax.placement import on_any_axes, placement_of, sharded_layout
from woodjax.stream import GradientStream
from woodjax.tree import Layout, check_floating, make_layout
from woodjax.typing import Batch, Gradients, Params, Select


@dataclass(frozen=True)
class Accumulator(abc.ABC):
    """A state that rows of gradients are added to."""

    layout: Layout
    count: Int[Array, ""]  # rows added so far, m

    @abc.abstractmethod
    def add_rows(self, rows: Float[Array, "k nb b"], fresh: Bool[Array, " k"] | None = None) -> Self:
        """The state with those of the rows added that are fresh; None for all.

        Args:
            rows: Gradients, cut into the blocks of the layout.
            fresh: Which rows count.

        Returns:
            The new state.
        """

    @abc.abstractmethod
    def shard_specs(self) -> Self:
        """The state with the specs of its arrays in their place."""

    def add_gradients(self, gradients: Gradients, fresh: Bool[Array, " k"] | None = None) -> Self:
        """`add_rows` of gradients that are a tree still.

        Args:
            gradients: Leaves `[k, *leaf.shape]`.
            fresh: Which rows count; None for all.

        Returns:
            The new state.
        """
        return self.add_rows(self.layout.to_blocks(gradients), fresh)

    @abc.abstractmethod
    def finalize(self, damping: Damping = ONE_PERCENT, *, held_out: Any = None) -> Curvature:
        """Factor once, into a curvature.

        Args:
            damping: `λ`; a number, `Relative`, or `"auto"`.
            held_out: Gradients that choose the damping where it is `"auto"`.

        Returns:
            A curvature of the rows seen.
        """

    @abc.abstractmethod
    def _merged(self, other: Any) -> Self:
        """The state of the rows of both."""

    @on_any_axes
    def add(self, gradients: Gradients) -> Self:
        """The state with more rows; this one stays as it is.

        Args:
            gradients: Leaves `[k, *leaf.shape]`, as `per_example_gradients` returns them.

        Returns:
            The new state.

        Raises:
            ValueError: A leaf that does not have the shape of the parameters that the state was made for; more
                rows than there is room for.
        """
        check_floating(gradients)
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
        if len(counts) != 1 or () in counts or jax.eval_shape(self.layout.to_blocks, gradients).ndim != 3:
            raise ValueError(
                f"Gradient leaves have leading sizes {sorted(counts)}: every leaf must be [k, *leaf.shape]."
            )
        ((new,),) = counts
        if self.room is not None and not isinstance(self.count, jax.core.Tracer) and self.count + new > self.room:
            raise ValueError(
                f"{new} rows do not fit behind {int(self.count)} of {self.room}: make the state with a larger "
                "capacity, or merge it with a new one."
            )
        return _add(self, gradients)

    @property
    def room(self) -> int | None:
        """Rows that the state can hold; None for sums, which take any number."""
        return None

    @on_any_axes
    def merge(self, other: Self) -> Self:
        """The state of the rows of both, as if all had been added to one.

        Args:
            other: A state made with the same parameters and options.

        Returns:
            The new state.

        Raises:
            ValueError: The two are of another kind or layout.
        """
        if type(self) is not type(other) or self.layout != other.layout:
            raise ValueError(
                f"{type(self).__name__} with blocks of {self.layout.block_size} of {self.layout.num_weights} weights "
                f"cannot be merged with {type(other).__name__} with blocks of {other.layout.block_size} of "
                f"{other.layout.num_weights}: make both by init with the same parameters and options."
            )
        return self._merged(other)


S = TypeVar("S", bound=Accumulator)


def layout_of(
    gradients: Gradients | GradientStream, *, block_size: int | None, select: Select, batch_axes: int
) -> Layout:
    """Layout of the parameters that some gradients belong to.

    Args:
        gradients: Leaves `[m, *leaf.shape]`, or a stream.
        block_size: As in `make_layout`.
        select: As in `make_layout`.
        batch_axes: As in `make_layout`.

    Returns:
        The layout.

    Raises:
        ValueError: As `make_layout`; leaves without an example axis, or that disagree on the number of
            examples, or no example at all.
    """
    options: Any = {"block_size": block_size, "select": select, "batch_axes": batch_axes}
    if isinstance(gradients, GradientStream):
        return placed_layout(gradients.params, gradients.batch, **options)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(counts) != 1 or () in counts or (0,) in counts:
        raise ValueError(
            f"Gradient leaves have leading sizes {sorted(counts)}: every leaf must be [m, *leaf.shape] with the "
            "same m >= 1, as woodjax.per_example_gradients returns them."
        )
    shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(jnp.shape(g)[1:], jnp.result_type(g)), gradients)
    layout, placement = make_layout(shapes, **options), placement_of(gradients, rows=True)
    return layout if placement is None else sharded_layout(layout, placement)


def placed_layout(params: Params, batch: Batch = None, **options: Any) -> Layout:
    """Layout of parameters where they lie, on one device or many.

    Args:
        params: A params-tree.
        batch: Examples, or None.
        **options: As in `make_layout`.

    Returns:
        The layout.

    Raises:
        ValueError: As `make_layout` and `placement_of`.
    """
    layout, placement = make_layout(params, **options), placement_of(params, batch)
    return layout if placement is None else sharded_layout(layout, placement)


def sum_up(gradients: Gradients | GradientStream, empty: Callable[[], S], damping: Damping) -> Any:
    """Add all rows and finalise; for `"auto"` the even rows are known and the odd ones held out.

    Args:
        gradients: Leaves `[m, *leaf.shape]`, or a stream, of which a micro-batch is in work at a time.
        empty: Makes the state before any data.
        damping: As asked.

    Returns:
        A curvature.

    Raises:
        ValueError: As `finalize`.
    """
    copies = 2 if isinstance(damping, str) else 1
    states = accumulate(gradients, tuple(empty() for _ in range(copies)))
    return states[0].finalize(damping, held_out=states[1] if copies == 2 else None)


def accumulate(gradients: Gradients | GradientStream, states: tuple[S, ...]) -> tuple[S, ...]:
    """Add all rows, in turn, to the states.

    Args:
        gradients: Leaves `[m, *leaf.shape]`, or a stream, of which a micro-batch is in work at a time.
        states: One for all rows, or two for the even and the odd ones; taken over by a stream.

    Returns:
        The new states.
    """
    if isinstance(gradients, GradientStream):
        return gradients.fold(add_microbatch, states)
    if len(states) == 1:
        return (_add(states[0], gradients),)
    return _add_in_turn(states, gradients)


@jax.jit
def _add(state: S, gradients: Gradients) -> S:
    return state.add_gradients(gradients)


@jax.jit
def _add_in_turn(states: tuple[S, ...], gradients: Gradients) -> tuple[S, ...]:
    rows = jax.tree.leaves(gradients)[0].shape[0]
    return _in_turn(states, gradients, jnp.arange(rows), jnp.ones(rows, bool))


def add_microbatch(
    states: tuple[S, ...], gradients: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]
) -> tuple[S, ...]:
    """One step of the fold that `accumulate` makes of a stream.

    Args:
        states: As in `accumulate`.
        gradients: Leaves `[k, *leaf.shape]`.
        numbers: Of the rows.
        fresh: Rows that were not seen before.

    Returns:
        The new states.
    """
    return _in_turn(states, gradients, numbers, fresh)


def _in_turn(
    states: tuple[S, ...], gradients: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]
) -> tuple[S, ...]:
    turns = numbers % len(states)
    return tuple(state.add_gradients(gradients, fresh & (turns == i)) for i, state in enumerate(states))


def check_finalize(state: S, damping: Damping, held_out: S | None) -> None:
    """Raise unless a state of sums can be finalised.

    Args:
        state: The sums.
        damping: As asked.
        held_out: Sums of other examples.

    Raises:
        ValueError: No row added yet; bad damping; `"auto"` without held-out sums, or these without it.
    """
    check_damping(damping)
    if (damping == "auto") != (held_out is not None):
        raise ValueError(
            f"damping is {damping!r} and held_out {'is not given' if held_out is None else 'is given'}: "
            'damping="auto" is chosen on the sums of other examples, pass them as held_out with it alone.'
        )
    for name, sums in (("state", state), ("held-out state", held_out)):
        if sums is not None and not isinstance(sums.count, jax.core.Tracer) and sums.count == 0:
            raise ValueError(f'The {name} has no rows yet: add gradients first; damping="auto" needs at least two.')


def only_fresh(
    rows: Float[Array, "k nb b"], fresh: Bool[Array, " k"] | None
) -> tuple[Float[Array, "k nb b"], Int[Array, ""] | int]:
    """Rows that count, the others zero, and how many they are.

    Args:
        rows: Rows of gradients.
        fresh: Which of them count; None for all, which are not copied.

    Returns:
        Rows, and their number.
    """
    if fresh is None:
        return rows, rows.shape[0]
    return jnp.where(fresh[:, None, None], rows, 0), jnp.sum(fresh, dtype=jnp.int32)
