"""Shrunk networks as one file: their arrays and their plan."""

from os import PathLike
from typing import Any

from woodjax.deployment.files import load_arrays, save_arrays
from woodjax.door import checked
from woodjax.structured import ImplantedKernel, PrunePlan
from woodjax.typing import PyTree

PLAN = "plan"


@checked
def save_pruned(path: str | PathLike[str], variables: PyTree, plan: PrunePlan) -> None:
    """Write what a plan leaves of a network, and the plan, to a safetensors file.

    Args:
        path: Of the file; one that is there is replaced once the new one is whole.
        variables: What the plan leaves, as nested dicts of arrays and kernels with implants.
        plan: What stays; it is written into the file as text.

    Raises:
        ValueError: As `save_arrays`.
        ImportError: Without safetensors.

    Cost:
        As `save_arrays`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, tempfile, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> plan = wj.make_plan(groups, {"hidden": np.array([True, False, False, True])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     wj.save_pruned(f"{folder}/small.safetensors", plan.shrink(variables), plan)
        ...     small, again = wj.load_pruned(f"{folder}/small.safetensors")
        >>> small["hidden"].shape, again == plan
        ((3, 2), True)
    """
    save_arrays(path, variables, metadata={PLAN: plan.to_json()})


@checked
def load_pruned(path: str | PathLike[str]) -> tuple[PyTree, PrunePlan]:
    """Read what `save_pruned` wrote: no class and no code of the network is in the file.

    Args:
        path: Of the file.

    Returns:
        The variables as nested dicts, and the plan: run them by `shrunk_network(apply_fn, plan)`.

    Raises:
        ValueError: A file that `save_pruned` did not write.
        FileNotFoundError: No such file.
        ImportError: Without safetensors.
    """
    arrays, metadata = load_arrays(path)
    if PLAN not in metadata:
        raise ValueError(f"{path} has no plan: save_pruned did not write it. load_arrays reads its arrays.")
    plan = PrunePlan.from_json(metadata[PLAN])
    kernels = {leaf.path: leaf.implants for leaf in plan.leaves if leaf.implants is not None}

    def rebuilt(node: Any, name: str) -> Any:
        if name in kernels:
            return ImplantedKernel(node["kernel"], node["implant"], node.get("mix"), *kernels[name])
        if isinstance(node, dict):
            return {key: rebuilt(inner, f"{name}/{key}" if name else key) for key, inner in node.items()}
        return node

    return rebuilt(arrays, ""), plan
