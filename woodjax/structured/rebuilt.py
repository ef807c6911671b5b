"""Does the code of a network run on fewer channels, and to the right result?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from woodjax.door import checked
from woodjax.structured.shrunk import ShrunkNetwork
from woodjax.typing import Batch, PyTree


@checked
def check_rebuilt(
    rebuilt_fn: Callable[[PyTree, Batch], Any],
    network: ShrunkNetwork,
    variables: PyTree,
    inputs: Batch,
    *,
    tolerance: float = 1e-4,
) -> None:
    """Raise unless a network's own code gives on smaller variables what the shrunk program gives.

    Code that takes widths from its arrays runs on fewer channels by itself, or after
    `woodjax.adapters.nnx.with_shapes_of`. Code that has a width in it fails, or goes wrong in silence: a mean over 64
    channels is another one over 48, a shortcut that pads by a fixed number pads in the wrong place.

    Args:
        rebuilt_fn: `rebuilt_fn(variables, inputs)`, the code to be checked.
        network: From `shrunk_network`, which is right for any code.
        variables: What its plan leaves, without implants.
        inputs: Some inputs.
        tolerance: Largest difference, relative to the largest output.

    Raises:
        ValueError: The code fails, returns other shapes, or other numbers.

    Cost:
        A forward pass of each.

    Example:
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> plan = wj.make_plan(groups, {"hidden": np.array([True, False, False, True])})
        >>> wj.check_rebuilt(apply_fn, wj.shrunk_network(apply_fn, plan), plan.shrink(variables), jnp.ones((5, 3)))
    """
    mend = "run shrunk_network, or take widths from the arrays and write numbers of channels nowhere."
    expected = jax.jit(network)(variables, inputs)
    try:
        found = jax.jit(rebuilt_fn)(variables, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The network's own code does not run on fewer channels ({error}): {mend}") from error
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, expected):
        raise ValueError(
            f"The network's own code returns {jax.tree.map(jnp.shape, found)} on fewer channels, expected "
            f"{jax.tree.map(jnp.shape, expected)}: {mend}"
        )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        gap, largest = float(jnp.max(jnp.abs(one - other))), float(jnp.max(jnp.abs(other)))
        if not gap <= tolerance * largest:
            raise ValueError(
                f"The network's own code differs by {gap:.3g} from the shrunk program, whose largest output is "
                f"{largest:.3g}: a width is written into it. {mend[0].upper()}{mend[1:]}"
            )
