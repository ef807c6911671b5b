"""What `prune_transform` keeps, and how to read and set it, wherever it stands in an optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from woodjax.door import checked
from woodjax.tree import check_bool, check_like, is_kernel, make_layout
from woodjax.typing import Masks, Params, Select

OptState = TypeVar("OptState")


class RefreshInfo(NamedTuple):
    """What the last refresh did: arrays, to be logged. NaN is what was not known or not asked for."""

    step: Int[Array, ""]  # updates done before it; -1 if there was none yet
    sparsity: Float[Array, ""]  # reached, of the weights that count
    predicted_loss_change: Float[Array, ""]  # by the quadratic model, added up over recomputations
    loss_before: Float[Array, ""]  # mean over the examples of the first recomputation
    loss_after: Float[Array, ""]  # mean over the examples of the last one
    damping: Float[Array, ""]  # the largest of any block and recomputation
    raised: Int[Array, ""]  # blocks whose factor failed and took more damping
    density: Float[Array, " leaves"]  # surviving fraction of each leaf, in the order of `jax.tree.leaves`
    nonfinite: Bool[Array, " leaves"]  # leaf kept its mask and weights: scores or updates not finite


class PruneState(NamedTuple):
    """State of `prune_transform`: arrays only, of a structure that never changes."""

    count: Int[Array, ""]  # updates done
    masks: Masks  # like the parameters, bool, True = survives
    window: Any  # gradients seen, or () where none are kept
    info: RefreshInfo  # of the last refresh
    inner_state: Any  # of the wrapped optimizer


def no_refresh(masks: Masks) -> RefreshInfo:
    """The info before any refresh.

    Args:
        masks: A params-tree of bool.

    Returns:
        Step -1, and NaN wherever nothing is known.
    """
    leaves = len(jax.tree.leaves(masks))

    def unknown() -> Float[Array, ""]:  # each a buffer of its own: two that are one cannot be donated
        return jnp.full((), jnp.nan, jnp.float32)

    return RefreshInfo(
        step=jnp.full((), -1, jnp.int32),
        sparsity=jnp.zeros((), jnp.float32),
        predicted_loss_change=unknown(),
        loss_before=unknown(),
        loss_after=unknown(),
        damping=unknown(),
        raised=jnp.zeros((), jnp.int32),
        density=jnp.ones(leaves, jnp.float32),
        nonfinite=jnp.zeros(leaves, bool),
    )


def densities(masks: Masks) -> Float[Array, " leaves"]:
    """Surviving fraction of every leaf.

    Args:
        masks: A params-tree of bool.

    Returns:
        `[leaves]`, 1 for an empty leaf.
    """
    leaves = jax.tree.leaves(masks)
    if not leaves:
        return jnp.ones(0, jnp.float32)
    return jnp.stack([jnp.mean(m, dtype=jnp.float32) if m.size else jnp.ones((), jnp.float32) for m in leaves])


@checked
def get_masks(opt_state: Any) -> Masks:
    """A copy of the masks in an optimizer state, which outlives a donated state.

    Args:
        opt_state: State of an optimizer that holds one `prune_transform`, at any depth.

    Returns:
        A params-tree of bool, True = survives.

    Raises:
        ValueError: No `PruneState` in it, or several.

    Cost:
        A copy.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> tx = optax.chain(optax.adam(1e-3), wj.prune_transform())
        >>> wj.get_masks(tx.init({"w": jnp.ones(2)}))["w"].tolist()
        [True, True]
    """
    return jax.tree.map(jnp.copy, find_state(opt_state).masks)


@checked
def get_info(opt_state: Any) -> RefreshInfo:
    """A copy of what the last refresh did, which outlives a donated state.

    Args:
        opt_state: As in `get_masks`.

    Returns:
        Its info; `step` is -1 before the first.

    Raises:
        ValueError: As `get_masks`.

    Cost:
        None.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> state = wj.prune_transform(optax.adam(1e-3)).init({"w": jnp.ones(2)})
        >>> int(wj.get_info(state).step)
        -1
    """
    return jax.tree.map(jnp.copy, find_state(opt_state).info)


@checked
def set_masks(opt_state: OptState, masks: Masks) -> OptState:
    """The optimizer state with other masks, and no moments for what they prune.

    Weights that the new masks prune become zero at the next update, or at once by
    `apply_masks(params, masks)`. A weight that comes back begins at zero, with moments at zero: this is how to
    regrow.

    Args:
        opt_state: As in `get_masks`.
        masks: A params-tree of bool, True = survives.

    Returns:
        A new state; moments of the whole optimizer state that are shaped like the parameters are cleaned.

    Raises:
        ValueError: As `get_masks`; masks not bool, or not shaped like the parameters.

    Cost:
        One pass over the optimizer state.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> tx = wj.prune_transform(optax.adam(1e-3))
        >>> state = wj.set_masks(tx.init(jnp.ones(2)), jnp.array([True, False]))
        >>> wj.get_masks(state).tolist()
        [True, False]
    """
    old = find_state(opt_state)
    check_like(masks, old.masks, "masks")
    check_bool(masks, "masks")
    masks = jax.tree.map(jnp.copy, masks)  # the caller's own outlive a state that is donated
    return clean_moments(replace_state(opt_state, lambda state: state._replace(masks=masks)), masks)


@checked
def masks_from_params(params: Params, *, select: Select = is_kernel) -> Masks:
    """Masks of a sparse checkpoint: what is exactly zero in the prunable leaves is pruned.

    Args:
        params: A params-tree of floating leaves, pruned.
        select: Which leaves are prunable; the others survive whole.

    Returns:
        A params-tree of bool, for `set_masks`.

    Raises:
        ValueError: A prunable leaf is zero altogether, which is how layers are initialised, not how they
            are pruned; whatever `make_layout` finds.

    Cost:
        One pass.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.masks_from_params({"w": jnp.array([[0.0, 2.0]]), "b": jnp.zeros(2)})
        {'b': Array([ True,  True], dtype=bool), 'w': Array([[False,  True]], dtype=bool)}
    """
    layout = make_layout(params, select=select)
    masks = []
    for spec, leaf in zip(layout.leaves, layout.flatten(params), strict=True):
        mask = jnp.asarray(leaf) != 0 if spec.selected else jnp.ones_like(leaf, dtype=bool)
        if not isinstance(mask, jax.core.Tracer) and not mask.any():
            raise ValueError(
                f"Leaf '{spec.path}' is zero altogether: initialised so, rather than pruned. Leave it out by select=."
            )
        masks.append(mask)
    return jax.tree.unflatten(layout.treedef, masks)


@checked
def find_state(opt_state: Any) -> PruneState:
    """The one `PruneState` in an optimizer state.

    Args:
        opt_state: Any pytree.

    Returns:
        It.

    Raises:
        ValueError: None, or several.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> state = wj.prune_transform(optax.adam(1e-3)).init({"w": jnp.ones(2)})
        >>> wj.find_state(state).masks["w"].tolist()
        [True, True]
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"The optimizer state holds {len(found)} prune_transform states, expected one: pass the state of an "
            "optimizer with one woodjax.prune_transform in it, as it came from init or update (a checkpoint restored "
            "without a target has lost its types)."
        )
    if any(map(_is_left_out, jax.tree.leaves(found[0].masks, is_leaf=_is_left_out))):
        raise ValueError(
            "prune_transform stands inside optax.partition or optax.masked and sees a part of the parameters: put it "
            "around, prune_transform(optax.partition(...)), to read, set and refresh its masks."
        )
    return found[0]


def replace_state(opt_state: OptState, change: Callable[[PruneState], PruneState]) -> OptState:
    """The optimizer state with its `PruneState` changed.

    Args:
        opt_state: Any pytree.
        change: From the old to the new.

    Returns:
        A new optimizer state.
    """
    return jax.tree.map(lambda node: change(node) if _is_state(node) else node, opt_state, is_leaf=_is_state)


def clean_moments(opt_state: OptState, masks: Masks) -> OptState:
    """Zero for pruned weights in every part of an optimizer state that is shaped like the parameters.

    Leading axes, as of a memory of past steps, may come before those of the parameters. What is shaped otherwise
    (counts, factored moments) stays. Parts in which some leaves are left out by `optax.masked` or `optax.partition`
    are cleaned where they have leaves.

    Args:
        opt_state: Any optimizer state.
        masks: A params-tree of bool.

    Returns:
        A new state.

    Cost:
        One pass, which XLA fuses with the update of the moments.
    """

    def masks_of(node: Any) -> list[Any] | None:
        # The masks of a node that is shaped like the parameters, but for leaves and branches left out of it.
        leaves, structure = jax.tree.flatten(node, is_leaf=_is_left_out)
        try:
            parts = structure.flatten_up_to(masks)
        except (ValueError, TypeError):
            return None
        fits = (_is_left_out(x) or jax.tree.structure(m).num_nodes == 1 for x, m in zip(leaves, parts, strict=True))
        return parts if all(fits) else None

    def clean(node: Any) -> Any:
        if _is_state(node):
            return node._replace(inner_state=clean_moments(node.inner_state, masks))
        parts = masks_of(node)
        if parts is None:
            return node
        leaves, structure = jax.tree.flatten(node, is_leaf=_is_left_out)
        return jax.tree.unflatten(structure, [_clean_leaf(x, m) for x, m in zip(leaves, parts, strict=True)])

    return jax.tree.map(clean, opt_state, is_leaf=lambda node: _is_state(node) or masks_of(node) is not None)


def _clean_leaf(moment: Any, mask: Bool[Array, "..."]) -> Any:
    if _is_left_out(moment):
        return moment
    # Leading axes, as of an L-BFGS memory, are theirs; a mask without axes would fit every number in the state.
    axes = jnp.ndim(mask)
    if axes == 0 or jnp.ndim(moment) < axes:
        return moment
    if jnp.shape(moment)[jnp.ndim(moment) - axes :] != jnp.shape(mask):
        return moment
    if not jnp.issubdtype(jnp.result_type(moment), jnp.floating):
        return moment
    return jnp.where(mask, moment, jnp.zeros_like(moment))


def _is_state(node: Any) -> bool:
    return isinstance(node, PruneState)


def _is_left_out(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
