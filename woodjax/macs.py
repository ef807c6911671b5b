"""What each weight costs when the network runs, read from the program of its loss.

A kernel is found where the program multiplies by it, in `dot_general` or `conv_general_dilated`: no layer of any
framework is named. Nothing runs on the device.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from woodjax.tree import path_name
from woodjax.typing import Batch, Example, Params

Owner = int | None  # number of the leaf whose weights a value holds, one each
LOOPS = ("while", "cond")  # how often they run is not in the program


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
        ValueError: A leaf that is multiplied inside a `while` loop or a `cond`.

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
    program = jax.make_jaxpr(function)(params, example)
    owners: list[Owner] = [*range(len(paths)), *(None for _ in jax.tree.leaves(example))]
    fixed = [owner is not None for owner in owners]
    totals: Counter[int] = Counter()
    _walk(program.jaxpr, owners, fixed, 1, totals, sizes, names)
    return jax.tree.unflatten(treedef, [totals[leaf] // max(size, 1) for leaf, size in enumerate(sizes)])


def _walk(
    jaxpr: Any,
    owners: Sequence[Owner],
    fixed: Sequence[bool],
    times: int,
    totals: Counter[int],
    sizes: list[int],
    names: list[str],
) -> tuple[list[Owner], list[bool]]:
    """Follow the leaves through a program that runs `times` times, and add up their products.

    Args:
        jaxpr: What to read.
        owners: Leaf that each input holds.
        fixed: Is an input independent of the example?
        times: How often it runs.
        totals: Multiply-adds of each leaf so far; added to.
        sizes: Of the leaves.
        names: Of the leaves.

    Returns:
        Owners of the outputs, and which of them are fixed.
    """
    owner = dict(zip(jaxpr.invars, owners, strict=True))
    still = dict(zip(jaxpr.invars, fixed, strict=True))

    def owner_of(variable: Any) -> Owner:
        return None if isinstance(variable, core.Literal) else owner.get(variable)

    def is_fixed(variable: Any) -> bool:
        return isinstance(variable, core.Literal) or still.get(variable, True)  # constants are

    for equation in jaxpr.eqns:
        held, steady = [owner_of(v) for v in equation.invars], [is_fixed(v) for v in equation.invars]
        name, inner = equation.primitive.name, _inner_programs(equation)
        if name in LOOPS:
            results = _loop(equation, inner, held, steady, sizes, names)
        elif len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
            repeats = equation.params["length"] if name == "scan" else 1
            if name == "scan":  # what a step hands to the next one may depend on the example
                carried = range(
                    equation.params["num_consts"], equation.params["num_consts"] + equation.params["num_carry"]
                )
                steady = [ok and i not in carried for i, ok in enumerate(steady)]
            results = _walk(inner[0], held, steady, times * repeats, totals, sizes, names)
        else:
            for leaf in {leaf for leaf in held if leaf is not None}:
                totals[leaf] += times * _multiply_adds(equation)
            results = _outputs(equation, held, all(steady), sizes)
        owner.update(zip(equation.outvars, results[0], strict=True))
        still.update(zip(equation.outvars, results[1], strict=True))
    return [owner_of(v) for v in jaxpr.outvars], [is_fixed(v) for v in jaxpr.outvars]


def _outputs(equation: Any, held: list[Owner], steady: bool, sizes: list[int]) -> tuple[list[Owner], list[bool]]:
    # A kernel that is reshaped, cast, masked or scaled is the same kernel; with the example in it, it is not.
    leaves = {leaf for leaf in held if leaf is not None}
    leaf = leaves.pop() if len(leaves) == 1 and steady and not _multiply_adds(equation) else None
    same = [leaf is not None and math.prod(v.aval.shape) == sizes[leaf] for v in equation.outvars]
    return [leaf if ok else None for ok in same], [steady] * len(equation.outvars)


def _multiply_adds(equation: Any) -> int:
    """Of a matrix product or a convolution; 0 for everything else."""
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0
    left, right = (v.aval.shape for v in equation.invars)
    outputs = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return outputs * math.prod(left[axis] for axis in contracted)
    numbers = equation.params["dimension_numbers"]
    return outputs * math.prod(right) // right[numbers.rhs_spec[0]]


def _loop(
    equation: Any, inner: list[Any], held: list[Owner], steady: list[bool], sizes: list[int], names: list[str]
) -> tuple[list[Owner], list[bool]]:
    # Which operand goes to which input differs between loops: whatever is held could be multiplied.
    products = any(_has_products(program) for program in inner)
    if products and any(leaf is not None for leaf in held):
        used = sorted({names[leaf] for leaf in held if leaf is not None})
        raise ValueError(
            f"Leaves {used} go into a {equation.primitive.name} with matrix products in it: how often it runs is not "
            "in the program. Count a function without it, or pass costs of your own."
        )
    return [None] * len(equation.outvars), [all(steady)] * len(equation.outvars)


def _has_products(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in ("dot_general", "conv_general_dilated")
        or any(map(_has_products, _inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def _inner_programs(equation: Any) -> list[Any]:
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
