"""The questions that every curvature answers, and the one thing they all derive from them."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from string import ascii_letters
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from woodjax import linalg
from woodjax.door import checked
from woodjax.placement import ShardedLayout, on_any_axes
from woodjax.tree import Layout, check_like
from woodjax.typing import Groups, Masks, Params, Updates

SMALL = ("multiples",)  # arguments of curvatures that are no params-trees: the same on all devices

F = TypeVar("F", bound=Callable[..., Any])


def compiled(method: F, *, lead: int = 0, groups: bool = False) -> F:
    """`jax.jit` for a method of a curvature, with the method's own type.

    With a layout on several devices every one of them runs the method, on its own columns and its shards of the
    arguments, and holds its shards of the result.

    Args:
        method: Takes `self`, a pytree with a `layout`, and params-trees or small arrays; returns a params-tree.
        lead: Leading axes of the leaves that it returns.
        groups: Is it asked about groups of weights? These may lie on several devices, so it answers on one only.

    Returns:
        The method, compiled once for each structure and shape.
    """
    signature = inspect.signature(method)

    @wraps(method)
    def run(self: Any, *args: Any, **keywords: Any) -> Any:
        layout = self.layout
        if not isinstance(layout, ShardedLayout):
            return method(self, *args, **keywords)
        if groups:
            raise ValueError(
                "Groups of weights are not answered for on several devices: gather the parameters onto one, or prune "
                "layer by layer (woodjax.prune_layers)."
            )
        bound = signature.bind(self, *args, **keywords).arguments
        given = {name: x for name, x in bound.items() if name != "self"}
        specs = {
            name: PartitionSpec() if x is None or name in SMALL else layout.tree_specs() for name, x in given.items()
        }
        return layout.run(
            lambda own, given: method(replace(own, layout=layout.view), **given),
            (self.shard_specs(), specs),
            layout.tree_specs(lead),
        )(self, given)

    return cast(F, on_any_axes(jax.jit(run)))


@runtime_checkable
class Curvature(Protocol):
    """An approximation `H` of the Hessian of the mean loss, damped: positive definite.

    Scores and updates are written against these questions alone, so an object of your own that
    answers them works everywhere in the library. Leaves that are not prunable are held fixed:
    they have no row or column in `H`, and every answer is 0 there.
    """

    @property
    def damping(self) -> Float[Array, "..."]:
        """`λ` as used, one or one for each block: at least what was asked for."""
        ...

    @property
    def raised(self) -> Int[Array, ""]:
        """Number of blocks whose damping had to be raised above what was asked for."""
        ...

    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq` for every coordinate; 0 where the coordinate is held fixed.

        Returns:
            A params-tree; its entries are positive, or 0, or NaN where rounding has lost them.
        """
        ...

    def solve(self, tree: Params) -> Params:
        """Inverse-Hessian-vector product `H⁻¹v`.

        Args:
            tree: `v`, a params-tree.

        Returns:
            A params-tree; 0 where the coordinate is held fixed.
        """
        ...

    def matvec(self, tree: Params) -> Params:
        """Hessian-vector product `Hv`.

        Args:
            tree: `v`, a params-tree.

        Returns:
            A params-tree; 0 where the coordinate is held fixed.
        """
        ...

    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Exact minimiser `δ` of `ḡᵀδ + ½δᵀHδ` subject to `δ_Q = −w_Q`, all of `Q` at once.

        Args:
            params: Parameters `w`.
            masks: A params-tree of bool, False on `Q`.
            gradient: Mean gradient `ḡ`, a params-tree; None for a network at a minimum.

        Returns:
            `δ`, a params-tree; 0 where the coordinate is held fixed.
        """
        ...


@runtime_checkable
class GroupCurvature(Curvature, Protocol):
    """A curvature that can be asked about groups of weights as well: what N:M, blocks, rows and filters need.

    `groups` are indices `[n, q]` into each flattened leaf, `[0, 0]` for a leaf without groups.
    """

    @property
    def layout(self) -> Layout:
        """Which leaves are prunable."""
        ...

    def group_inverse(self, groups: Groups) -> Params:
        """`[H⁻¹]_QQ` of every group, `[n, q, q]` for each leaf: for groups of a few weights.

        Args:
            groups: A params-tree of indices `[n, q]` into each flattened leaf, `[0, 0]` for a leaf without groups.

        Returns:
            A params-tree of `[n, q, q]`.
        """
        ...

    def group_costs(self, target: Params, groups: Groups) -> Params:
        """`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` of every group, `[n]` for each leaf.

        Args:
            target: `t`, a params-tree.
            groups: As for `group_inverse`.

        Returns:
            A params-tree of `[n]`, in units of the loss.
        """
        ...


@runtime_checkable
class CoupledCurvature(GroupCurvature, Protocol):
    """A curvature that can be asked about groups with weights in several leaves: what channels need."""

    def damping_tree(self) -> Params:
        """`λ` of every coordinate, as used; 0 where it is held fixed."""
        ...

    def coupled_costs(self, target: Params, groups: Groups) -> Float[Array, " n"]:
        """`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` of `n` groups, each row `i` of all leaves: values and indices, `[n, q]` each.

        Args:
            target: `t`, leaves `[n, q]`, `[n, 0]` where the groups have no weights.
            groups: Indices into each flattened leaf, of the same shapes; no weight twice in one group.

        Returns:
            Costs `[n]`, in units of the loss.
        """
        ...


@checked
@on_any_axes
def predicted_loss_change(updates: Updates, curvature: Curvature, gradient: Params | None = None) -> Float[Array, ""]:
    """Loss change that the quadratic model predicts for an update: `ḡᵀδ + ½δᵀHδ`.

    Args:
        updates: `δ`, a params-tree.
        curvature: Stands for `H`, damping included.
        gradient: Mean gradient `ḡ`; None for a network at a minimum.

    Returns:
        A scalar in units of the loss.

    Raises:
        ValueError: `gradient` is not shaped like `updates`.

    Cost:
        One `curvature.matvec`.

    References:
        LeCun, Denker & Solla, Optimal Brain Damage, 1989, equation 1.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.diagonal_fisher({"w": jnp.array([[[1.0, 3.0]]])}, damping=1.0)  # H = diag(2, 10)
        >>> float(wj.predicted_loss_change({"w": jnp.array([[1.0, 1.0]])}, fisher))
        6.0
    """
    change = 0.5 * _inner(updates, curvature.matvec(updates))
    if gradient is not None:
        check_like(gradient, updates, "gradient")
        change += _inner(updates, gradient)
    return change


def _inner(x: Params, y: Params) -> Float[Array, ""]:
    def product(a: Array, b: Array) -> Array:
        axes = ascii_letters[: jnp.ndim(a)]  # not flattened: a leaf may be split along any of them
        return linalg.contract(f"{axes},{axes}->", jnp.asarray(a), jnp.asarray(b))

    products = jax.tree.map(product, x, y)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))
