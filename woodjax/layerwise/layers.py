"""What a layer has to answer so that one after another can be loaded, pruned and put back."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from woodjax.door import checked
from woodjax.tree import check_like
from woodjax.typing import Masks, Params, PyTree

Hidden = PyTree
"""What goes from layer to layer: an array, or a pytree of them, with sequences along the first axis of every leaf."""

LayerFn = Callable[[Params, Hidden], Hidden]


@runtime_checkable
class ResidentLayer(Protocol):
    """One layer of a network, whose parameters are on the device only between `load` and `store`.

    An object of your own that answers this works: parameters from a file, from a checkpoint of many hosts, or cut
    out of a larger tree.
    """

    @property
    def apply(self) -> LayerFn:
        """`apply(params, hidden) -> hidden`, eval mode, on a batch of sequences.

        The same function for layers of one shape (or a `jax.tree_util.Partial` of it): one program then serves all.
        """
        ...

    def load(self) -> Params:
        """The parameters, dense: arrays of the host, which are put on the device, or of the device."""
        ...

    def store(self, params: Params, masks: Masks) -> None:
        """Take the pruned parameters and their masks, arrays of the device, out of the way.

        A run that can be resumed writes elsewhere than `load` reads.

        Args:
            params: A params-tree, pruned weights exactly zero.
            masks: A params-tree of bool, True = survives.
        """
        ...


@checked
class HostLayer:
    """A layer whose parameters are held by the host. Made by hand, one for each layer.

    Args:
        apply: `apply(params, hidden) -> hidden`.
        params: A params-tree; it is copied to the host.

    Attributes:
        apply: As given.
        params: As given, then as pruned.
        masks: None, then a params-tree of bool.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> layer = wj.HostLayer(lambda w, x: x @ w, jnp.eye(2))
        >>> type(layer.load()).__name__, layer.masks
        ('ndarray', None)
    """

    def __init__(self, apply: LayerFn, params: Params) -> None:
        """Copy the parameters to the host."""
        self.apply = apply
        self.params: Params = _to_host(params)
        self.masks: Masks | None = None

    def load(self) -> Params:
        """The parameters."""
        return self.params

    def store(self, params: Params, masks: Masks) -> None:
        """Hold the pruned parameters in place of the others.

        Raises:
            ValueError: Trees of another structure or other shapes.
        """
        check_like(params, self.params, "params")
        check_like(masks, self.params, "masks")
        self.params, self.masks = _to_host(params), _to_host(masks)


def as_partial(function: Callable[..., Any]) -> jax.tree_util.Partial:
    """A function as an argument of a jitted one: known by what it is, not by where it stands.

    Args:
        function: Of a layer, or a loss.

    Returns:
        A `Partial`.
    """
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.array(x), jax.device_get(tree))
