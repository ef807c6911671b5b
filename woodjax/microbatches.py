"""How many rows of gradients to compute at once: as many as the memory takes."""

from functools import partial
from typing import Any

import jax

from woodjax.door import checked
from woodjax.loss_rows import LossRow, batch_size, group_examples
from woodjax.placement import on_any_axes, placement_of
from woodjax.typing import Batch, Gradients, LossFn, Params


@checked
@on_any_axes
def microbatch_for(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    memory_budget: int,
    examples_per_gradient: int = 1,
    remat: bool = False,
) -> int:
    """The largest `microbatch_size` whose gradients fit a budget on one device, by what the compiler says.

    Args:
        loss_fn: As in `per_example_gradients`.
        params: A params-tree; shapes are enough.
        batch: Examples `[n, ...]`; shapes are enough.
        memory_budget: Bytes for a micro-batch, beside parameters and examples: its gradients, and what is held while
            they are computed. What is made of them (a Fisher, all rows) comes on top.
        examples_per_gradient: As in `per_example_gradients`.
        remat: As in `per_example_gradients`.

    Returns:
        All rows, or the largest power of two that fits by a line through two sizes, checked by compiling it. Of
        examples that are split over devices, that of one device times their number; parameters count as if whole.

    Raises:
        ValueError: Not even one row fits; a backend that does not say how much memory a program takes; examples of
            different or zero length; `n` not a multiple of `examples_per_gradient`.

    Cost:
        Nothing is run; the step is compiled for two sizes and for the one found, in the usual case.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (w * x).sum() ** 2
        >>> wj.microbatch_for(loss, jnp.ones(1000), jnp.ones((500, 1000)), memory_budget=400_000)
        64
    """
    group = partial(group_examples, examples_per_gradient=examples_per_gradient)
    placement = placement_of(params, batch)
    devices = 1 if placement is None else placement.size(placement.batch)
    params, rows = jax.eval_shape(lambda p, x: (p, group(x)), params, batch)
    loss_row, most = LossRow(loss_fn, examples_per_gradient > 1, remat=remat), batch_size(rows) // devices
    bytes_of = partial(_step_bytes, loss_row, params, rows)
    one = bytes_of(1)
    if one > memory_budget:
        mend = "" if remat else ", or remat=True"
        raise ValueError(f"One row takes {one} bytes, memory_budget is {memory_budget}: pass more{mend}.")
    few = min(4, most)
    if few == 1:
        return devices
    each = (bytes_of(few) - one) / (few - 1)
    guess = most if each <= 0 else min(most, int(1 + (memory_budget - one) / each))
    size = guess if guess == most else 1 << (guess.bit_length() - 1)
    while size > 1 and bytes_of(size) > memory_budget:
        size = 1 << ((size - 1).bit_length() - 1)
    return size * devices


def _step_bytes(loss_row: LossRow, params: Params, rows: Batch, size: int) -> int:
    chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows)
    memory: Any = _rows.lower(params, chunk, loss_row).compile().memory_analysis()
    if memory is None:
        raise ValueError("This backend does not say how much memory a program takes: choose microbatch_size yourself.")
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


@jax.jit
def _rows(params: Params, chunk: Batch, loss_row: LossRow) -> Gradients:
    return jax.vmap(loss_row, in_axes=(None, 0))(params, chunk)
