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
from jax.extend.core import Literal
from jaxtyping import Array, Float

from woodjax.gradients import LossRow
from woodjax.programs import bind
from woodjax.typing import Batch, LossFn, Params

CALLS = ("pjit", "jit", "closed_call")  # primitives that only wrap a program


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
            def tap(leaf: int, value: Array, output: Array) -> Array:
                if leaf not in shifts:
                    return output
                inputs[leaf] = value.reshape(-1)
                return output + shifts[leaf].reshape(output.shape).astype(output.dtype)

            return _trace(self.row.loss, params, example, tap, Counter())

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

    def tap(leaf: int, value: Array, output: Array) -> Array:
        del value
        found[leaf] += 1
        return output

    jax.eval_shape(lambda p, e: _trace(loss_fn, p, e, tap, uses), params, example)
    return tuple(leaf for leaf in sorted(found) if uses[leaf] == 1)


def _trace(
    loss_fn: LossFn, params: Params, example: Batch, tap: Callable[[int, Array, Array], Array], uses: Counter[int]
) -> Array:
    """Run the loss from its program, with `tap(leaf, input, output)` around every product with a kernel."""
    program = jax.make_jaxpr(loss_fn)(params, example)
    weights = jax.tree.leaves(params)
    owners = [*range(len(weights)), *(None for _ in jax.tree.leaves(example))]
    (loss,) = _run(program.jaxpr, program.consts, [*weights, *jax.tree.leaves(example)], owners, tap, uses)
    return loss


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    owners: Sequence[int | None],
    tap: Callable[[int, Array, Array], Array],
    uses: Counter[int],
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    owner = dict(zip(jaxpr.invars, owners, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    def leaf_of(variable: Any) -> int | None:
        return None if isinstance(variable, Literal) else owner.get(variable)

    for equation in jaxpr.eqns:
        operands, leaves = [read(v) for v in equation.invars], [leaf_of(v) for v in equation.invars]
        if equation.primitive.name in CALLS:
            inner = equation.params["jaxpr"]
            results = _run(inner.jaxpr, inner.consts, operands, leaves, tap, uses)
        else:
            uses.update(leaf for leaf in leaves if leaf is not None)
            results = bind(equation, operands)
            kernel = _kernel(equation, operands, leaves)
            if kernel is not None:
                results = [tap(kernel, operands[0], results[0])]
        values.update(zip(equation.outvars, results, strict=True))
    uses.update(leaf for leaf in map(leaf_of, jaxpr.outvars) if leaf is not None)
    return [read(v) for v in jaxpr.outvars]


def _kernel(equation: Any, operands: Sequence[Any], leaves: Sequence[int | None]) -> int | None:
    # y = a W with one vector a: the kernel on the right, contracted along its first axis.
    if equation.primitive.name != "dot_general":
        return None
    (_, contracted), batch = equation.params["dimension_numbers"]
    value, kernel = operands
    fits = kernel.ndim == 2 and tuple(contracted) == (0,) and not batch[0] and value.size == kernel.shape[0]
    return leaves[1] if fits else None
