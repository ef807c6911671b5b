"""One call for every way to the empirical Fisher: which engine, how much memory, and whether it fits.

| engine | curvature | holds | chosen |
|---|---|---|---|
| `"scan"`, `"rank_k"`, `"dual"` | `BlockFisher` | gradients and inverse blocks | by name |
| `"primal"` | `BlockFisher` | sums and inverse blocks | `m ≥ 0.9b` |
| `"factored"` | `LowRankFisher` | gradients, an `m × m` factor a block | `m < 0.9b`, and the whole network |
| `"streamed"` | `StreamedFisher` | a window of columns, an `m × m` factor | the whole network in little memory |
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, WORKSPACE, blocks_at_once
from woodjax.curvature.block_fisher import PRIMAL_FROM, BlockSums, block_fisher
from woodjax.curvature.damping import ONE_PERCENT, Damping, check_damping
from woodjax.curvature.gradient_rows import GradientRows
from woodjax.curvature.low_rank_fisher import low_rank_fisher
from woodjax.curvature.protocol import Curvature
from woodjax.curvature.streamed_fisher import streamed_fisher
from woodjax.curvature.sums import add_microbatch, layout_of
from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel
from woodjax.typing import Gradients, Select

Engine = Literal["auto", "scan", "rank_k", "primal", "dual", "factored", "streamed"]


class Estimate(NamedTuple):
    """What an engine takes to build a curvature and to answer its questions once."""

    engine: Engine
    peak_bytes: int  # beside what is passed in
    result_bytes: int  # what the curvature holds
    flops: float  # of the linear algebra: build, diagonal and one product
    passes: int  # over the examples: backward passes of the whole batch
    window_size: int = 0  # columns held at once where gradients are streamed, else 0


@checked
@on_any_axes
def estimate(
    gradients: Gradients | GradientStream,
    *,
    block_size: int | None = None,
    engine: Engine = "auto",
    damping: Damping = ONE_PERCENT,
    memory_budget: int | None = None,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> Estimate:
    """Memory and flops of `empirical_fisher` with the same arguments, before anything runs.

    For a stream the step over a micro-batch is compiled, and its memory read off; nothing is computed.

    Args:
        gradients: Leaves `[m, *leaf.shape]`, or shapes of them, or a stream.
        block_size: Coordinates in a block; None for the whole network.
        engine: As in `empirical_fisher`.
        damping: As in `empirical_fisher`; `"auto"` takes more memory.
        memory_budget: As in `empirical_fisher`.
        select: Which leaves are prunable.
        batch_axes: Leading axes that stack layers.

    Returns:
        An estimate.

    Raises:
        ValueError: As `empirical_fisher`, also where nothing fits the budget.

    Cost:
        Compilation of one micro-batch for a stream.

    Example:
        >>> import jax, woodjax as wj
        >>> gradients = {"w": jax.ShapeDtypeStruct((1000, 512, 512), "float32")}  # one gigabyte
        >>> wj.estimate(gradients).engine, round(wj.estimate(gradients).peak_bytes / 1e9, 1)
        ('factored', 1.1)
    """
    check_damping(damping)
    layout, chosen = _choose(gradients, block_size, engine, select, batch_axes)
    streamed = isinstance(gradients, GradientStream)
    m = gradients.num_rows if streamed else jnp.shape(jax.tree.leaves(gradients)[0])[0]
    plan = _plan(chosen, layout, m, gradients, auto=isinstance(damping, str))
    if memory_budget is None or plan.peak_bytes <= memory_budget:
        return plan
    if streamed and layout.whole and engine in ("auto", "streamed"):
        plan = _fitting_window(layout, m, gradients, memory_budget)
        if plan.peak_bytes <= memory_budget:
            return plan
    raise ValueError(
        f"The {plan.engine} engine needs {_size(plan.peak_bytes)} for {m} rows of {layout.num_weights} weights, the "
        f"budget is {_size(memory_budget)}: {_advice(plan, layout, m, streamed)}"
    )


@checked
@on_any_axes
def empirical_fisher(
    gradients: Gradients | GradientStream,
    *,
    block_size: int | None = None,
    damping: Damping = ONE_PERCENT,
    engine: Engine = "auto",
    memory_budget: int | None = None,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> Curvature:
    """Empirical Fisher, by the engine that suits the number of examples, the blocks and the memory.

    Args:
        gradients: Leaves `[m, *leaf.shape]`, or a stream of them, which can be cut to fit a budget.
        block_size: Coordinates in a block `b`; None for the whole network as one block.
        damping: As in `low_rank_fisher`.
        engine: One of the table above, or `"auto"`.
        memory_budget: Bytes beside what is passed in; None for no limit.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers.

    Returns:
        A curvature; all engines stand for the same matrix, up to rounding.

    Raises:
        ValueError: Unknown engine, or one that cannot do this; a budget that nothing fits, with advice.

    Cost:
        See `estimate`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.empirical_fisher({"w": jnp.array([[[1.0, 0.0]]])}, damping=1.0)
        >>> type(fisher).__name__, fisher.inverse_diagonal()["w"].tolist()
        ('LowRankFisher', [[0.5, 1.0]])
    """
    layout, chosen = _choose(gradients, block_size, engine, select, batch_axes)
    options = {"select": select, "batch_axes": batch_axes, "damping": damping}
    window_size = layout.view.block_size
    if memory_budget is not None:
        plan = estimate(gradients, block_size=block_size, engine=engine, memory_budget=memory_budget, **options)
        chosen, window_size = plan.engine, plan.window_size
    if chosen == "streamed":
        return streamed_fisher(gradients, window_size=window_size, **options)
    if chosen == "factored":
        return low_rank_fisher(gradients, block_size=block_size, **options)
    if isinstance(gradients, GradientStream) and chosen != "primal":
        gradients = gradients.collect()
    return block_fisher(gradients, block_size=block_size, engine=chosen, **options)


def _choose(
    gradients: Gradients | GradientStream, block_size: int | None, engine: Engine, select: Select, batch_axes: int
) -> tuple[Layout, Engine]:
    if engine not in get_args(Engine):
        raise ValueError(f"engine is {engine!r}: choose one of {list(get_args(Engine))}.")
    layout = layout_of(gradients, block_size=block_size, select=select, batch_axes=batch_axes)
    streamed = isinstance(gradients, GradientStream)
    if engine == "streamed" and not (streamed and layout.whole):
        raise ValueError(
            "engine 'streamed' needs a stream of gradients and the whole network: pass "
            "woodjax.stream_gradients(...) and block_size=None."
        )
    if engine != "auto":
        return layout, engine
    m, b = gradients.num_rows if streamed else jnp.shape(jax.tree.leaves(gradients)[0])[0], layout.block_size
    return layout, "primal" if m >= PRIMAL_FROM * b and not layout.whole else "factored"


def _plan(
    engine: Engine,
    layout: Layout,
    m: int,
    gradients: Gradients | GradientStream,
    window_size: int = 0,
    auto: bool = False,
) -> Estimate:
    # float32 arrays that live at the same time, and a micro-batch of gradients where they are streamed.
    nb, b = layout.view.num_blocks, layout.view.block_size  # of one device
    d, rows, inverse = nb * b, 4 * m * nb * b, 4 * nb * b * b
    step = _step_bytes(gradients, layout, engine) if isinstance(gradients, GradientStream) else 0
    products = 4 * m * d
    if engine == "streamed":
        width = window_size or b
        work = max(_dual_bytes(layout, m) + 8 * m * min(width, linalg.COLUMN_WINDOW), step)
        flops = 2.5 * m * m * d + 2 * m**3 / 3 + products
        return Estimate(engine, 4 * m * width + work, 4 * m * m, flops, 2 * -(-d // width) + 2, width)
    if engine == "factored":
        work = max(_dual_bytes(layout, m) + 8 * m * min(b, linalg.COLUMN_WINDOW), step)
        flops = 2.5 * m * m * d + nb * 2 * m**3 / 3 + products
        return Estimate(engine, rows + work, rows + 4 * nb * m * m, flops, 1)
    if engine == "primal":
        at_once = blocks_at_once(INVERSION_BYTES * b * b)
        inversion = min(nb, at_once) * INVERSION_BYTES * b * b
        work = max(2 * inverse + inversion, step if step else rows)  # XLA copies the sums into LAPACK's layout
        sums = 6 * inverse if auto else inverse  # two states, their means, sum and eigenvectors
        return Estimate(engine, sums + work, inverse, 2 * m * d * b + 2 * d * b * b, 1)
    flops = 3 * m * m * d + nb * 2 * m**3 / 3 + 2 * m * d * b if engine == "dual" else 4 * m * d * b
    return Estimate(engine, (2 if step else 1) * rows + inverse + 12 * b * b, inverse, flops, 1)


def _dual_bytes(layout: Layout, m: int) -> int:
    # Gram matrices and factors of all blocks, those of a chunk in work; and vectors as long as the parameters.
    nb, weights = layout.view.num_blocks, layout.view.num_blocks * layout.view.block_size
    return 4 * (2 * nb * m * m + min(6 * nb * m * m, max(WORKSPACE // 4, 6 * m * m)) + 6 * weights)


def _step_bytes(stream: GradientStream, layout: Layout, engine: Engine) -> int:
    if engine == "primal":
        state = jax.eval_shape(lambda: (BlockSums.empty(layout),))
    else:  # whatever is kept of the rows, a step computes them first
        state = jax.eval_shape(lambda: (GradientRows.empty(layout, stream.num_rows),))
    return stream.step_bytes(add_microbatch, tuple(layout.placed(some, some.shard_specs()) for some in state))


def _fitting_window(layout: Layout, m: int, stream: GradientStream, budget: int) -> Estimate:
    # Beside the window stand two narrower ones in work, or a micro-batch of gradients: whichever is more.
    column, columns = 4 * m, linalg.COLUMN_WINDOW
    step, dual = _step_bytes(stream, layout, "streamed"), _dual_bytes(layout, m)
    width = (budget - dual - 2 * column * columns) // column
    if width < columns:
        width = min((budget - dual) // (3 * column), columns)
    width = min(width, (budget - step) // column, layout.view.block_size)
    return _plan("streamed", layout, m, stream, max(1, width))


def _size(number: int) -> str:
    return f"{number / 2**20:,.3g} MiB"


def _advice(plan: Estimate, layout: Layout, m: int, streamed: bool) -> str:
    if plan.engine == "streamed":
        return "even one column of gradients does not fit. Take fewer examples, or a smaller microbatch_size."
    if plan.engine == "factored":
        smaller = "pass a stream of gradients (woodjax.stream_gradients)"
        if streamed:
            smaller = "leave the engine to 'auto' and block_size to None, which streams"
        return f"{smaller}, or take fewer examples."
    fewer = "take a smaller block_size, or fewer examples"
    if m < layout.block_size:
        fewer += ", or engine='factored', which holds no inverse"
    return f"{fewer}."
