"""What implants start from: zero, the centre of the kernel, or a fit to what they replace."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.linalg import contract
from woodjax.structured.axes import Value
from woodjax.structured.find import kernel_of
from woodjax.structured.implants import ImplantedKernel, centre_padding, is_implanted
from woodjax.structured.plan import PrunePlan
from woodjax.structured.reading import Traced, read_program
from woodjax.structured.running import Running
from woodjax.structured.staying import LeafPlan
from woodjax.structured.walk import Walk
from woodjax.tree import path_name
from woodjax.typing import ApplyFn, Batch, PyTree

Start: TypeAlias = Literal["least-squares", "centre", "zero"]


class Moments(NamedTuple):
    """Sums over examples and places of what a convolution reads at its centre, and of what it writes."""

    inputs: Float[Array, "i i"]
    both: Float[Array, "i o"]
    outputs: Float[Array, "o o"]


@checked
def start_implants(
    apply_fn: ApplyFn,
    variables: PyTree,
    plan: PrunePlan,
    inputs: Batch,
    *,
    start: Start = "least-squares",
    rank: int | None = None,
    ridge: float = 1e-6,
    microbatch_size: int = 128,
) -> PyTree:
    """Shrink the variables, and give implants their first weights.

    `W = argmin Σ ‖y − Wᵀx‖² + ridge · mean(diag XᵀX) · ‖W‖²`, over all places of all examples: `y` is what the kernel
    that is replaced wrote in the whole network, `x` what it read at its centre, of the channels that stay.

    Args:
        apply_fn: The network.
        variables: Of the whole network, trained.
        plan: With implants.
        inputs: Examples, stacked along the first axis.
        start: `"least-squares"`, or what it is compared with: `"centre"`, the centre of the replaced kernel, and
            `"zero"`, as the authors have it.
        rank: Implants of full places and this rank, in the stead of one place: `rank` outputs that all implants of a
            kernel are mixed from, the directions in which the response is largest. At most as many as there are
            implants.
        ridge: Relative weight of the penalty.
        microbatch_size: Examples in work at once.

    Returns:
        What the plan leaves of the variables.

    Raises:
        ValueError: An unknown start; a rank or microbatches below one; a negative ridge.

    Cost:
        A forward pass over the examples, and `i² + io + o²` numbers and `2n(i² + io + o²)` flops for each kernel with
        implants, of `i` inputs, `o` implants and `n` places.

    References:
        Yu et al., HAP, 2021 (arXiv 2101.08940), section 3.3, where implants start from zero.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, woodjax as wj
        >>> def apply_fn(v, x):
        ...     x = jax.lax.conv(x, v["first"], (1, 1), "SAME")
        ...     return jnp.einsum("nchw,co->no", jnp.tanh(x), v["head"])
        >>> variables = {"first": jnp.ones((4, 2, 3, 3)), "head": jnp.ones((4, 2))}
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 2, 5, 5)))
        >>> stays, replaced = np.array([True, True, True, False]), np.array([False, True, False, False])
        >>> plan = wj.make_plan(groups, {"first": stays}, {"first": replaced})
        >>> small = wj.start_implants(apply_fn, variables, plan, jnp.ones((6, 2, 5, 5)))
        >>> small["first"].kernel.shape, small["first"].implant.shape
        ((2, 2, 3, 3), (1, 2, 1, 1))
    """
    if start not in ("least-squares", "centre", "zero"):
        raise ValueError(f"start is {start!r}: choose 'least-squares', 'centre' or 'zero'.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}: expected 1 or more, or None for convolutions of one place.")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}: expected a weight of 0 or more.")
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: expected a number of examples, 1 or more.")
    small = plan.shrink(variables)
    if start == "zero":
        return jax.tree.map(lambda leaf: _zeroed(leaf) if is_implanted(leaf) else leaf, small, is_leaf=is_implanted)
    if start == "centre" and rank is None:
        return small
    leaves = {leaf.path: leaf for leaf in plan.leaves if leaf.implants is not None}
    count = len(jax.tree.leaves(inputs)[0])
    total: dict[str, Moments] = {}
    step = jax.jit(partial(_moments, apply_fn, plan))
    for first in range(0, count, microbatch_size):
        here = slice(first, first + microbatch_size)
        part = step(variables, jax.tree.map(operator.itemgetter(here), inputs))
        total = part if not total else jax.tree.map(jnp.add, total, part)

    def fitted(path: Sequence[Any], leaf: Any) -> Any:
        name = path_name(path)
        if not is_implanted(leaf):
            return leaf
        kernel = _array(variables, name)
        return (
            _fitted(leaf, leaves[name], total[name], ridge)
            if rank is None
            else _factored(leaf, leaves[name], total[name], kernel, rank)
        )

    return jax.tree_util.tree_map_with_path(fitted, small, is_leaf=is_implanted)


def _zeroed(leaf: ImplantedKernel) -> ImplantedKernel:
    return replace(leaf, implant=jnp.zeros_like(leaf.implant))


def _array(variables: PyTree, name: str) -> Array:
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    return found[name]


def _moments(apply_fn: ApplyFn, plan: PrunePlan, variables: PyTree, inputs: Batch) -> dict[str, Moments]:
    """Moments of every convolution that gets implants, in the network as it is."""
    traced = Traced.of(apply_fn, variables, inputs)
    reading = read_program(traced, union=False, barriers=True)
    leaves = {leaf.path: leaf for leaf in plan.leaves if leaf.implants is not None}
    found: dict[str, Moments] = {}

    def watch(equation: Any, values: Sequence[Value], operands: Sequence[Array], results: Sequence[Array]) -> None:
        if equation.primitive.name != "conv_general_dilated":
            return
        known = kernel_of(equation, values[1], traced.leaves)
        if known is None or known[1].path not in leaves:
            return
        path = known[1].path
        here = _of_convolution(equation, operands[0], results[0], _implanted_outputs(leaves[path]))
        found[path] = here if path not in found else jax.tree.map(jnp.add, found[path], here)

    running = Running(reading.solver, np.ones(reading.solver.size, bool), watch)
    walk = Walk(reading.solver, barriers=True, running=running)
    walk.program(traced.jaxpr, traced.consts, reading.items([*jax.tree.leaves(variables), *jax.tree.leaves(inputs)]))
    return found


def _implanted_outputs(leaf: LeafPlan) -> np.ndarray:
    """Outputs of the whole kernel that become implants."""
    assert leaf.implants is not None
    kept = leaf.axes[leaf.implants.outputs].indices()
    at = np.array(leaf.implants.at)
    return at if kept is None else kept[at]


def _of_convolution(equation: Any, inputs: Array, outputs: Array, at: np.ndarray) -> Moments:
    numbers = equation.params["dimension_numbers"]
    padding, strides = centre_padding(equation), equation.params["window_strides"]
    config, stride = [(0, 0, 0)] * inputs.ndim, [1] * inputs.ndim
    for i, axis in enumerate(numbers.lhs_spec[2:]):
        config[axis], stride[axis] = (*padding[i], equation.params["lhs_dilation"][i] - 1), strides[i]
    seen = lax.pad(inputs, jnp.zeros((), inputs.dtype), config)
    seen = lax.slice(seen, [0] * seen.ndim, seen.shape, stride)
    read = jnp.moveaxis(seen, numbers.lhs_spec[1], -1).reshape(-1, seen.shape[numbers.lhs_spec[1]])
    written = jnp.take(jnp.moveaxis(outputs, numbers.out_spec[1], -1), at, -1).reshape(-1, len(at))
    return Moments(
        contract("ni,nj->ij", read, read), contract("ni,no->io", read, written), contract("no,np->op", written, written)
    )


def _fitted(leaf: ImplantedKernel, plan: LeafPlan, moments: Moments, ridge: float) -> ImplantedKernel:
    """`W = argmin ‖XW − Y‖² + ridge · mean(diag XᵀX) ‖W‖²` over the inputs that stay."""
    (axis,) = (i for i in range(len(plan.shape)) if i not in (leaf.outputs, *leaf.places))
    kept = plan.axes[axis].indices()
    at = np.arange(plan.shape[axis]) if kept is None else kept
    gram = np.asarray(moments.inputs, np.float64)[np.ix_(at, at)]
    both = np.asarray(moments.both, np.float64)[at]
    scale = max(np.trace(gram) / len(at), np.finfo(np.float32).tiny)
    weights = np.linalg.solve(gram + ridge * scale * np.eye(len(at)), both)
    ordered = weights if axis < leaf.outputs else weights.T
    return replace(leaf, implant=jnp.asarray(ordered.reshape(leaf.implant.shape), leaf.implant.dtype))


def _factored(leaf: ImplantedKernel, plan: LeafPlan, moments: Moments, kernel: Array, rank: int) -> ImplantedKernel:
    """The kernel's own outputs on the directions in which the response is largest."""
    assert plan.implants is not None
    count = len(plan.implants.at)
    rank = min(rank, count)
    _, vectors = np.linalg.eigh(np.asarray(moments.outputs, np.float64))
    top = jnp.asarray(vectors[:, ::-1][:, :rank], kernel.dtype)
    for i, axis in enumerate(plan.axes):
        at = _implanted_outputs(plan) if i == leaf.outputs else axis.indices()
        kernel = kernel if at is None else jnp.take(kernel, at, i)
    shape = [1] * kernel.ndim
    (inputs,) = (i for i in range(kernel.ndim) if i not in (leaf.outputs, *leaf.places))
    shape[inputs], shape[leaf.outputs] = rank, count
    mix = (top.T if inputs < leaf.outputs else top).reshape(shape)
    first = jnp.moveaxis(contract("...o,or->...r", jnp.moveaxis(kernel, leaf.outputs, -1), top), -1, leaf.outputs)
    return replace(leaf, implant=first.astype(kernel.dtype), mix=mix)
