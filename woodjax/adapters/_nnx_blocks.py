"""Blocks of a deep NNX model as layers that `woodjax.prune_layers` takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.adapters._nnx_variables import apply_variables, split_variables
from woodjax.layerwise import HostLayer
from woodjax.typing import PyTree


def layer_function(block: nnx.Module) -> "LayerFunction":
    """A block as a function of its variables, without holding any of them.

    Call `block.eval()` first. A block of shapes alone, from `nnx.eval_shape`, will do: parameters then come from
    wherever a layer's `load` finds them.

    Args:
        block: A module whose call takes hidden states and returns hidden states.

    Returns:
        `apply(variables, hidden)`, of a nested dict of all variables but those of random numbers. Those of blocks of
        the same graph are equal, so that one compiled program serves all of them.

    Cost:
        None.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import layer_function
        >>> first, second = (nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(seed)) for seed in range(2))
        >>> layer_function(first) == layer_function(second)
        True
        >>> layer_function(first)({"kernel": jnp.eye(2)}, jnp.ones((1, 2))).tolist()
        [[1.0, 1.0]]
    """
    graph, *states = split_variables(block)
    rest, state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states)
    return LayerFunction(graph, state, rest)


@dataclass(frozen=True)
class LayerFunction:
    """A call of a block, known to `jit` by its graph. Made by `layer_function`."""

    graph: nnx.GraphDef[Any]
    state: nnx.State[Any, Any] = field(compare=False, repr=False)  # of shapes
    rest: nnx.State[Any, Any] = field(compare=False, repr=False)

    def __call__(self, variables: PyTree, hidden: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Apply the block."""
        return apply_variables(self.graph, self.state, self.rest, variables, hidden)


def host_layers(blocks: Sequence[nnx.Module]) -> list[HostLayer]:
    """Copy the variables of blocks to the host, as layers for `woodjax.prune_layers`.

    Call `model.eval()` first. The blocks keep their own arrays; `woodjax.adapters.nnx.write_variables(block,
    layer.params)` puts the pruned ones back.

    Args:
        blocks: In their order.

    Returns:
        A layer for each.

    Cost:
        A copy of the variables on the host.

    Example:
        >>> import numpy as np, woodjax as wj
        >>> from flax import nnx
        >>> from woodjax.adapters.nnx import host_layers, write_variables
        >>> blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2)]
        >>> layers = host_layers(blocks)
        >>> _ = wj.prune_layers(layers, np.eye(4, dtype=np.float32), sparsity=0.5)
        >>> write_variables(blocks[0], layers[0].params)
        >>> int((blocks[0].kernel[...] == 0).sum())
        8
    """
    return [HostLayer(layer_function(block), nnx.to_pure_dict(split_variables(block)[2])) for block in blocks]
