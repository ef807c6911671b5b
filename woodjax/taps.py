"""Inputs and output gradients of dense layers, found in the program of a loss.

The gradient of a dense kernel `W [in, out]` that is used once, `y = a W`, is the outer product of its
input `a` and the gradient `δ` of its output. Whoever needs only products of the two need not form it.
A kernel is found where the loss multiplies by it: no layer of any framework is named.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Float

from woodjax.loss_rows import LossRow
from woodjax.programs import bind
from woodjax.typing import Batch, LossFn, Params

CALLS = ("pjit", "jit", "closed_call", "checkpoint", "remat2")  # only wrap a program; what is remade is then kept

KernelOf = Callable[[Any, Sequence[int | None]], int | None]  # equation, leaves of its operands -> operand


class Product(NamedTuple):
    """A product with a leaf, as it is run."""

    leaf: int  # number of the leaf
    side: int  # which operand it is, 0 or 1
    equation: Any
    value: Array  # the other operand
    output: Array


class Tap(NamedTuple):
    """One dense layer, for one example."""

    inputs: Float[Array, " in"]
    output_gradient: Float[Array, " out"]


@dataclass(frozen=True)
class TapRow:
    """Taps of some leaves and the gradients of all, for one example; what is not used is not computed."""

    row: LossRow
    leaves: tuple[int, ...]

    def __call__(self, params: Params, example: Batch) -> tuple[Params, dict[int, Tap]]:
        """Gradients, and a tap by the number of its leaf."""
        weights = jax.tree.leaves(params)
        inputs: dict[int, Array] = {}

        def loss(params: Params, shifts: dict[int, Array]) -> Array:
            def tap(product: Product) -> Array:
                if product.leaf not in shifts:
                    return product.output
                inputs[product.leaf] = product.value.reshape(-1)
                shift = shifts[product.leaf].reshape(product.output.shape)
                return product.output + shift.astype(product.output.dtype)

            return run_tapped(self.row.loss, params, example, _vector_times_kernel, tap, Counter())

        shifts = {leaf: jnp.zeros(weights[leaf].shape[1]) for leaf in self.leaves}

        def with_inputs(params: Params, shifts: dict[int, Array]) -> tuple[Array, dict[int, Array]]:
            value = loss(params, shifts)
            return value, dict(inputs)

        (gradients, deltas), found = jax.grad(with_inputs, argnums=(0, 1), has_aux=True)(params, shifts)
        return gradients, {leaf: Tap(found[leaf], deltas[leaf]) for leaf in self.leaves}


def dense_leaves(loss_fn: LossFn, params: Params, example: Batch) -> tuple[int, ...]:
    """Leaves `[in, out]` that the loss uses once, to multiply one vector from the left.

    Args:
        loss_fn: Loss of one example.
        params: A params-tree; shapes are enough.
        example: One example; shapes are enough.

    Returns:
        Their numbers, in the order of `jax.tree.leaves(params)`.

    Cost:
        One trace.
    """
    found: Counter[int] = Counter()
    uses: Counter[int] = Counter()

    def tap(product: Product) -> Array:
        found[product.leaf] += 1
        return product.output

    jax.eval_shape(lambda p, e: run_tapped(loss_fn, p, e, _vector_times_kernel, tap, uses), params, example)
    return tuple(leaf for leaf in sorted(found) if uses[leaf] == 1)


def run_tapped(
    function: Callable[..., Any],
    params: Params,
    inputs: Batch,
    kernel_of: KernelOf,
    tap: Callable[[Product], Array],
    uses: Counter[int],
) -> Any:
    """Run a function from its program, with a tap behind every product with a leaf.

    Args:
        function: `function(params, inputs)`.
        params: A params-tree.
        inputs: What the function takes.
        kernel_of: `kernel_of(equation, leaves)` says which of the two operands, if any, an equation is tapped for;
            `leaves` are the numbers of the leaves that its operands are, None for other operands. A cast of a leaf
            is the leaf.
        tap: `tap(product)` returns what goes on in place of the product's output.
        uses: Counts, for each leaf, how many equations use it.

    Returns:
        What the function returns.

    Cost:
        One trace, and what the function costs.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    weights, others = jax.tree.leaves(params), jax.tree.leaves(inputs)
    owners = [*range(len(weights)), *(None for _ in others)]
    results = _run(program.jaxpr, program.consts, [*weights, *others], owners, kernel_of, tap, uses)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    owners: Sequence[int | None],
    kernel_of: KernelOf,
    tap: Callable[[Product], Array],
    uses: Counter[int],
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    leaf_at = dict(zip(jaxpr.invars, owners, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    def leaf_of(variable: Any) -> int | None:
        return None if isinstance(variable, Literal) else leaf_at.get(variable)

    for equation in jaxpr.eqns:
        operands, leaves = [read(v) for v in equation.invars], [leaf_of(v) for v in equation.invars]
        name = equation.primitive.name
        if name in CALLS:
            inner = equation.params["jaxpr"]
            inner, held = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            results = _run(inner, held, operands, leaves, kernel_of, tap, uses)
        elif name == "convert_element_type" and leaves[0] is not None:
            results = bind(equation, operands)
            leaf_at[equation.outvars[0]] = leaves[0]
        else:
            uses.update(leaf for leaf in leaves if leaf is not None)
            results = bind(equation, operands)
            side = kernel_of(equation, leaves)
            leaf = None if side is None else leaves[side]
            if side is not None and leaf is not None:
                results = [tap(Product(leaf, side, equation, operands[1 - side], results[0]))]
        values.update(zip(equation.outvars, results, strict=True))
    uses.update(leaf for leaf in map(leaf_of, jaxpr.outvars) if leaf is not None)
    return [read(v) for v in jaxpr.outvars]


def _vector_times_kernel(equation: Any, leaves: Sequence[int | None]) -> int | None:
    # y = a W with one vector a: the kernel on the right, contracted along its first axis.
    if equation.primitive.name != "dot_general":
        return None
    (_, contracted), batch = equation.params["dimension_numbers"]
    value, kernel = (variable.aval for variable in equation.invars)
    fits = kernel.ndim == 2 and tuple(contracted) == (0,) and not batch[0] and value.size == kernel.shape[0]
    return 1 if fits else None
