"""Reading the program (jaxpr) of a function: what every reader of one shares."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from woodjax.typing import Batch, Example, Params

PRODUCTS = ("dot_general", "conv_general_dilated")


def program_of(function: Callable[[Params, Any], Any], params: Params, inputs: Example | Batch) -> tuple[Any, int]:
    """Trace `function(params, inputs)`.

    Args:
        function: Any function; of a `jax.tree_util.Partial`, shapes of what it carries are enough.
        params: A params-tree; shapes are enough.
        inputs: What the function takes; shapes are enough.

    Returns:
        The jaxpr, and how many of its first inputs are arrays that the function carries. Those of `params` follow,
        and then those of `inputs`.
    """
    if not isinstance(function, jax.tree_util.Partial):
        return jax.make_jaxpr(function)(params, inputs).jaxpr, 0
    program = jax.make_jaxpr(lambda carried, p, x: carried(p, x))(function, params, inputs)
    return program.jaxpr, len(jax.tree.leaves(function))


def inner_programs(equation: Any) -> list[Any]:
    """Programs inside an equation: the body of a loop, a function that is called.

    Args:
        equation: Of a jaxpr.

    Returns:
        Their jaxprs.
    """
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def has_products(jaxpr: Any) -> bool:
    """Does a program, or one inside it, have a matrix product or a convolution?

    Args:
        jaxpr: The program.

    Returns:
        Whether it has one.
    """
    return any(
        equation.primitive.name in PRODUCTS or any(map(has_products, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Run an equation.

    Args:
        equation: Of a jaxpr.
        operands: What it runs on.

    Returns:
        Its results.
    """
    made = equation.primitive.get_bind_params(equation.params)
    functions, params = made if isinstance(made, tuple) else ((), made)  # a pair in older releases of JAX
    results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def multiply_adds(equation: Any) -> int:
    """Multiply-adds of a matrix product or a convolution.

    Args:
        equation: Of a jaxpr.

    Returns:
        Their number; 0 for everything else.
    """
    if equation.primitive.name not in PRODUCTS:
        return 0
    left, right = (v.aval.shape for v in equation.invars)
    outputs = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return outputs * math.prod(left[axis] for axis in contracted)
    numbers = equation.params["dimension_numbers"]
    return outputs * math.prod(right) // right[numbers.rhs_spec[0]]
