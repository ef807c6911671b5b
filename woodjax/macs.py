"""What a network costs when it runs, and each of its weights, read from its program.

A kernel is found where the program multiplies by it, in `dot_general` or `conv_general_dilated`: no layer of any
framework is named. Nothing runs on the device.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from woodjax.door import checked
from woodjax.programs import has_products, inner_programs, multiply_adds, program_of
from woodjax.tree import path_name
from woodjax.typing import Batch, Example, Params

LOST = -1  # made of leaves, but not of one leaf's weights, one each


class Held(NamedTuple):
    """What a value holds: the weights of a leaf, or of one layer of it inside a scan."""

    leaf: int
    size: int


Owner = Held | None
LOOPS = ("while", "cond")  # how often they run is not in the program
PER_DEVICE = ("shard_map", "xla_pmap")
UNKNOWN = ("coo_dot", "csr_dot", "coo_conv", "coo_mat", "csr_mat", "ragged_dot", "attention", "pallas", "ffi_call")


@checked
def weight_macs(function: Callable[[Params, Any], Any], params: Params, example: Example | Batch) -> Any:
    """Multiply-adds that each weight of a leaf costs in one call.

    Args:
        function: `function(params, example)`: a loss of one example, or a network (with a batch of one).
        params: A params-tree; shapes are enough.
        example: What the function takes; shapes are enough. The cost is that of all of it.

    Returns:
        A params-tree with one integer for each leaf: the multiply-adds of its products, over the number of its
        weights. 0 for biases, normalisation and embeddings that are looked up. Positions in the padding of a
        convolution count, as they do in published figures. A leaf that is used twice costs twice; a layer inside
        `lax.scan` is counted as often as it runs.

    Raises:
        ValueError: A leaf that is multiplied inside a `while` loop or a `cond`; a product with a part of a leaf, or
            with several leaves in one, whose weights cannot be told apart.

    Cost:
        One trace of the function.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> macs = wj.weight_macs(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((5, 3)))
        >>> macs["kernel"], macs["bias"]
        (5, 0)
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths]
    sizes = [math.prod(leaf.shape) for _, leaf in paths]
    program, carried = program_of(function, params, example)
    inputs = len(jax.tree.leaves(example))
    owners: list[Owner] = [*[None] * carried, *(Held(*pair) for pair in enumerate(sizes)), *[None] * inputs]
    fixed = [True] * (carried + len(sizes)) + [False] * inputs
    totals: Counter[int] = Counter()
    _walk(program, owners, fixed, 1, totals, names)
    return jax.tree.unflatten(treedef, [totals[leaf] // max(size, 1) for leaf, size in enumerate(sizes)])


@checked
def count_macs(apply_fn: Callable[[Params, Any], Any], variables: Params | None, inputs: Example | Batch) -> int:
    """Multiply-adds of all products in one call: with weights, and of activations with each other.

    Unlike `weight_macs`, which shares out those with weights, this counts the two products inside attention as well.
    The count is that of the program: a masked network costs what the dense one does, and padding counts.

    Args:
        apply_fn: `apply_fn(variables, inputs)`.
        variables: Any pytree; shapes are enough.
        inputs: What the function takes, a batch of one for the figure of papers; shapes are enough.

    Returns:
        Multiply-adds of every matrix product and convolution; what is in a `scan` counts as often as it runs.
        Factorisations, Fourier transforms and everything elementwise do not count.

    Raises:
        ValueError: A product whose number of runs is not in the program (`while`, `cond`), or whose size is not (sparse
            and ragged products, kernels of Pallas, parts of devices under `shard_map`).

    Cost:
        One trace of the function.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.count_macs(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))}, jnp.ones((1, 3)))
        6
    """
    return _count(program_of(apply_fn, variables, inputs)[0])


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [count for count in map(_count, inner_programs(equation)) if count]
        if (inner and name in (*LOOPS, *PER_DEVICE)) or len(inner) > 1 or any(part in name for part in UNKNOWN):
            raise ValueError(
                f"The program has products in '{name}', and how many is not in it: count a function without it."
            )
        total += multiply_adds(equation) + sum(inner) * (equation.params["length"] if name == "scan" else 1)
    return total


def _walk(
    jaxpr: Any,
    owners: Sequence[Owner],
    fixed: Sequence[bool],
    times: int,
    totals: Counter[int],
    names: list[str],
) -> tuple[list[Owner], list[bool]]:
    """Follow the leaves through a program that runs `times` times, and add up their products.

    Args:
        jaxpr: What to read.
        owners: Leaf that each input holds.
        fixed: Is an input independent of the example?
        times: How often it runs.
        totals: Multiply-adds of each leaf so far; added to.
        names: Of the leaves.

    Returns:
        Owners of the outputs, and which of them are fixed.

    Raises:
        ValueError: As `weight_macs`.
    """
    owner = dict(zip(jaxpr.invars, owners, strict=True))
    still = dict(zip(jaxpr.invars, fixed, strict=True))

    def owner_of(variable: Any) -> Owner:
        return None if isinstance(variable, core.Literal) else owner.get(variable)

    def is_fixed(variable: Any) -> bool:
        return isinstance(variable, core.Literal) or still.get(variable, True)  # constants are

    for equation in jaxpr.eqns:
        held, steady = [owner_of(v) for v in equation.invars], [is_fixed(v) for v in equation.invars]
        name, inner = equation.primitive.name, inner_programs(equation)
        if name in LOOPS:
            results = _loop(equation, inner, held, steady, names)
        elif len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
            repeats = equation.params["length"] if name == "scan" else 1
            if name == "scan":  # what a step hands to the next one may depend on the example
                carried = range(
                    equation.params["num_consts"], equation.params["num_consts"] + equation.params["num_carry"]
                )
                steady = [ok and i not in carried for i, ok in enumerate(steady)]
                held = [
                    Held(one.leaf, one.size // repeats) if one and i > max(carried, default=-1) else one
                    for i, one in enumerate(held)
                ]
            results = _walk(inner[0], held, steady, times * repeats, totals, names)
            if name == "scan":  # results of all steps are stacked
                results = [one and Held(LOST, 0) for one in results[0]], results[1]
        else:
            products = multiply_adds(equation)
            for leaf in {one.leaf for one in held if one is not None and products}:
                if leaf == LOST:
                    raise ValueError(
                        f"A product with a part of a leaf, or with several leaves at once, among {names}: "
                        "which weights it costs is not in the program. Use whole leaves, or pass costs of your own."
                    )
                totals[leaf] += times * products
            results = _outputs(equation, held, all(steady))
        owner.update(zip(equation.outvars, results[0], strict=True))
        still.update(zip(equation.outvars, results[1], strict=True))
    return [owner_of(v) for v in jaxpr.outvars], [is_fixed(v) for v in jaxpr.outvars]


def _outputs(equation: Any, held: list[Owner], steady: bool) -> tuple[list[Owner], list[bool]]:
    # A kernel that is reshaped, cast, masked or scaled is the same kernel; with the example in it, it is not.
    made_of = {one for one in held if one is not None}
    owners: list[Owner] = []
    for variable in equation.outvars:
        whole = [one for one in made_of if one.leaf != LOST and one.size == math.prod(variable.aval.shape)]
        known = whole[0] if len(whole) == 1 else Held(LOST, 0)
        owners.append(known if made_of and steady and not multiply_adds(equation) else None)
    return owners, [steady] * len(owners)


def _loop(
    equation: Any, inner: list[Any], held: list[Owner], steady: list[bool], names: list[str]
) -> tuple[list[Owner], list[bool]]:
    # Which operand goes to which input differs between loops: whatever is held could be multiplied.
    products = any(has_products(program) for program in inner)
    if products and any(one is not None for one in held):
        used = sorted({names[one.leaf] for one in held if one is not None and one.leaf != LOST})
        raise ValueError(
            f"Leaves {used} go into a {equation.primitive.name} with matrix products in it: how often it runs is not "
            "in the program. Count a function without it, or pass costs of your own."
        )
    return [None] * len(equation.outvars), [all(steady)] * len(equation.outvars)
