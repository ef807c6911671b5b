"""Is this loss fit for per-example gradients? Asked of its trace, before anything runs.

Two mistakes give plausible numbers and wrong curvature, and neither raises by itself: dropout
(or any noise) left on, and batch normalisation left in train mode, which inside `vmap`
normalises every example by itself alone. Both leave marks in the jaxpr of the loss: random
primitives, and a reciprocal square root of a reduction over a batch axis of length one.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from woodjax.door import checked
from woodjax.programs import inner_programs
from woodjax.tree import check_floating
from woodjax.typing import Example, LossFn, Params

RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
ROOTS = ("rsqrt", "sqrt", "pow")
MIXING = ("dot_general", "conv_general_dilated")  # a new layer begins: what came before is not its statistics


@checked
def check_loss(loss_fn: LossFn, params: Params, example: Example) -> None:
    """Raise unless `loss_fn(params, example)` is a deterministic, per-example scalar loss.

    Args:
        loss_fn: The loss of one example.
        params: A params-tree, or its shapes.
        example: One example, or its shapes.

    Raises:
        ValueError: A parameter leaf that is not floating; a loss that is not a floating scalar;
            random numbers inside the loss (dropout); train-mode batch normalisation; two
            traces that differ.

    Cost:
        Two traces of the loss; nothing runs on the device.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.check_loss(lambda w, x: (w * x).sum(), jnp.ones(2), jnp.ones(2))
    """
    check_floating(params)
    closed, shape = _trace(loss_fn, params, example)
    if not hasattr(shape, "shape") or shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(f"loss_fn returned {shape}: it must return one floating scalar for ONE example.")
    for equation in _equations(closed.jaxpr):
        if equation.primitive.name in RANDOM:
            raise ValueError(
                f"loss_fn draws random numbers ({equation.primitive.name}), for example by dropout: its gradients "
                "would be of another network each time. Call it in eval mode (model.eval(), deterministic=True). If a "
                "fixed key is meant, pass check=False."
            )
    sizes = len(jax.tree.leaves(params)), len(jax.tree.leaves(example))
    if _batch_normalised(closed.jaxpr, [INDEPENDENT] * sizes[0] + [DATA] * sizes[1])[0]:
        raise ValueError(
            "loss_fn divides by the standard deviation over a batch axis of length one: batch normalisation in "
            "train mode. Per-example gradients need running statistics: call model.eval() or pass "
            "use_running_average=True. If this is another kind of layer, pass check=False."
        )
    again, _ = _trace(loss_fn, params, example)
    if _program(closed) != _program(again) or not _same_constants(closed.consts, again.consts):
        raise ValueError(
            "loss_fn gave two different programs when traced twice: it reads state from outside (NumPy random "
            "numbers, a counter). Make it a pure function of (params, example)."
        )


def _trace(loss_fn: LossFn, params: Params, example: Example) -> tuple[Any, Any]:
    # A new function each time: JAX would hand back the first trace of one that it knows.
    try:
        return jax.make_jaxpr(lambda p, e: loss_fn(p, e), return_shape=True)(params, example)
    except Exception as error:
        shapes = jax.tree.map(jnp.shape, example)
        error.add_note(f"woodjax called loss_fn(params, example) with ONE example, of shapes {shapes}: no batch axis.")
        raise


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_programs(equation):
            yield from _equations(inner)


INDEPENDENT, DATA, STATISTIC = 0, 1, 2  # of the example; made from it; reduced over a batch axis of length one


def _batch_normalised(jaxpr: Any, marks: list[int]) -> tuple[bool, list[int]]:
    """Follow every reduction of data over a batch axis of length one until it meets a root.

    Args:
        jaxpr: What to read.
        marks: What each input is: `INDEPENDENT`, `DATA` or `STATISTIC`.

    Returns:
        Whether a root was met, and the marks of the outputs.
    """
    marked = dict(zip(jaxpr.invars, marks, strict=True))

    def mark(var: Any) -> int:
        return INDEPENDENT if isinstance(var, core.Literal) else marked.get(var, INDEPENDENT)

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [mark(var) for var in equation.invars]
        highest = max(inputs, default=INDEPENDENT)
        if name in ROOTS and highest == STATISTIC:
            return True, []
        if name in MIXING:
            highest = min(highest, DATA)
        if name == "reduce_sum" and highest >= DATA:
            shape, axes = equation.invars[0].aval.shape, equation.params["axes"]
            highest = STATISTIC if 0 in axes and shape[0] == 1 and len(axes) < len(shape) else DATA
        outputs = [highest] * len(equation.outvars)
        for inner in inner_programs(equation):
            surplus = len(inputs) - len(inner.invars)  # cond has its index in front
            found, inner_marks = _batch_normalised(
                inner, inputs[surplus:] if surplus >= 0 else [highest] * len(inner.invars)
            )
            if found:
                return True, []
            if len(inner_marks) == len(outputs):
                outputs = inner_marks
        marked.update(zip(equation.outvars, outputs, strict=True))
    return False, [mark(var) for var in jaxpr.outvars]


def _program(closed: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))  # addresses of custom derivative rules


def _same_constants(ours: list[Any], theirs: list[Any]) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        known = not isinstance(a, jax.core.Tracer) and not isinstance(b, jax.core.Tracer)
        if a is not b and known and not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True):
            return False
    return True
