"""Less memory for a gradient, for one more forward pass: what backward needs is computed again, piece by piece.

`jax.checkpoint` around a whole loss saves nothing: its backward pass begins by computing everything again, and holds
it all. What saves is to cut the program into pieces of which only one is held at a time. The program is read, so no
layer of the model need know of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
from jaxtyping import Array, Shaped

from woodjax.programs import bind
from woodjax.typing import Example, LossFn, Params

CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("checkpoint", "remat", "remat2")


class _Step(NamedTuple):
    """An equation of the program with its calls inlined; values are numbers."""

    equation: Any
    operands: tuple[Any, ...]  # numbers of values, or literals
    results: tuple[int, ...]


def rematerialised(loss_fn: LossFn) -> Callable[[Params, Example], Shaped[Array, ""]]:
    """The same loss, whose gradient holds what is between the pieces and one piece, not everything.

    A program of `n` layers is cut into about `√n` pieces, where the least is alive; of a `lax.scan`, every step is a
    piece. A scan whose body calls `jax.checkpoint` itself is left as it is. Where a backend schedules for concurrency,
    as XLA does on CPU, long pieces that are not scans save less.

    Args:
        loss_fn: A loss of one example.

    Returns:
        `loss(params, example)` with the same values and gradients.

    Cost:
        One more forward pass for each gradient. Activations of `O(√n)` layers in place of `n`; of a scan, the carry of
        every step and the activations of one.

    References:
        Chen, Xu, Zhang & Guestrin, Training deep nets with sublinear memory cost, 2016 (arXiv 1604.06174), section 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(w * x) * w))
        >>> bool(jax.grad(rematerialised(loss))(0.3, 2.0) == jax.grad(loss)(0.3, 2.0))
        True
    """

    def loss(params: Params, example: Example) -> Shaped[Array, ""]:
        program, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, example)
        steps, inputs, outputs, sizes = _inlined(program)
        values = dict(zip(inputs, [*program.consts, *jax.tree.leaves((params, example))], strict=True))
        for piece, needed, left in _pieces(steps, inputs, outputs, sizes):
            run = jax.checkpoint(_runner(piece, needed, left))
            values.update(zip(left, run(*(values[v] for v in needed)), strict=True))
        found = [values[v] if isinstance(v, int) else v.val for v in outputs]
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return loss


def _inlined(program: Any) -> tuple[list[_Step], list[int], list[Any], list[int]]:
    # Steps, numbers of the inputs, the outputs, and bytes of every value.
    steps: list[_Step] = []
    sizes: list[int] = []

    def new(variable: Any) -> int:
        aval = variable.aval
        sizes.append(math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0))
        return len(sizes) - 1

    def walk(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def look(variable: Any) -> Any:
            return variable if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            operands = tuple(map(look, equation.invars))
            called = equation.params.get("jaxpr") if equation.primitive.name in CALLS else None
            if isinstance(called, core.ClosedJaxpr) and not called.consts:
                results = walk(called.jaxpr, operands)
            else:
                results = [new(v) for v in equation.outvars]
                steps.append(_Step(equation, operands, tuple(results)))
            known.update(zip(equation.outvars, results, strict=True))
        return [look(v) for v in jaxpr.outvars]

    inputs = [new(v) for v in (*program.jaxpr.constvars, *program.jaxpr.invars)]
    return steps, inputs, walk(program.jaxpr, inputs), sizes


def _pieces(
    steps: list[_Step], inputs: Sequence[int], outputs: Sequence[Any], sizes: list[int]
) -> list[tuple[list[_Step], list[int], list[int]]]:
    # Each with the values that it needs, and those that it leaves for later ones.
    last = {v: at for at, step in enumerate(steps) for v in step.operands if isinstance(v, int)}
    last |= {v: len(steps) for v in outputs if isinstance(v, int)}
    given = set(inputs)
    cuts = _cuts(steps, last, sizes)
    pieces = []
    for first, end in zip([0, *cuts], [*cuts, len(steps)], strict=True):
        piece = steps[first:end]
        made = {v for step in piece for v in step.results}
        needed = {v for step in piece for v in step.operands if isinstance(v, int)} - made
        left = sorted(v for v in made - given if last.get(v, -1) >= end)
        pieces.append((piece, sorted(needed), left))
    return pieces


def _cuts(steps: list[_Step], last: dict[int, int], sizes: list[int]) -> list[int]:
    # Of cuts at about equal distances, those that leave the least: what is alive at them, and all that the largest
    # piece computes, which is more than a compiler that fuses it needs to hold.
    n = len(steps)
    made = [sum(sizes[v] for v in step.results) for step in steps]
    before = [0]
    for size in made:
        before.append(before[-1] + size)
    changes = [0] * (n + 2)
    for at, step in enumerate(steps):
        for v in step.results:
            if last.get(v, -1) > at:
                changes[at + 1] += sizes[v]
                changes[min(last[v], n) + 1] -= sizes[v]
    alive = [0]
    for change in changes[1:]:
        alive.append(alive[-1] + change)
    best, least = [], before[-1]
    for count in range(2, 2 * math.isqrt(n) + 3):
        cuts, at = [], 0
        for part in range(1, count):
            low, high = ((part + shift) * before[-1] / count for shift in (-0.5, 0.5))
            places = [x for x in range(at + 1, n) if low <= before[x] <= high]
            if places:
                at = min(places, key=lambda x: alive[x])
                cuts.append(at)
        largest = max(before[b] - before[a] for a, b in zip([0, *cuts], [*cuts, n], strict=True))
        if (cost := largest + sum(alive[x] for x in cuts)) < least:
            best, least = cuts, cost
    return best


def _runner(piece: list[_Step], needed: list[int], left: list[int]) -> Callable[..., list[Any]]:
    def run(*arguments: Any) -> list[Any]:
        values = dict(zip(needed, arguments, strict=True))
        for step in piece:
            operands = [values[v] if isinstance(v, int) else v.val for v in step.operands]
            values.update(zip(step.results, _run(step.equation, operands), strict=True))
        return [values[v] for v in left]

    return run


def _run(equation: Any, operands: list[Any]) -> list[Any]:
    if equation.primitive.name != "scan":
        return bind(equation, operands)
    options = equation.params
    body, consts, carry = options["jaxpr"], options["num_consts"], options["num_carry"]
    if any(inner.primitive.name in CHECKPOINTS for inner in body.jaxpr.eqns):
        return bind(equation, operands)

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = jax.checkpoint(core.jaxpr_as_fun(body))(*operands[:consts], *state, *x)
        return results[:carry], results[carry:]

    start, each = operands[consts : consts + carry], operands[consts + carry :]
    keep = {name: options[name] for name in ("length", "reverse", "unroll")}
    final, stacked = lax.scan(step, start, each, **keep)
    return [*final, *stacked]
