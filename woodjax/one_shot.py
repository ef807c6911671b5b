"""One-shot pruning: gradients → curvature → scores → masks → updates, in one or several stages."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.compensation import Method
from woodjax.curvature import low_rank_fisher
from woodjax.gradients import LossRow, batch_size
from woodjax.masks import Scope, Sparsity, check_sparsity
from woodjax.schedules import Path, check_stages
from woodjax.stages import Criterion, CurvatureFn, prune_stages
from woodjax.stream import GradientStream, stream_gradients
from woodjax.tree import check_floating, check_like, path_name
from woodjax.typing import Batch, Gradients, LossFn, Masks, Params


class OneShotInfo(NamedTuple):
    """What one-shot pruning did; every field has one entry for each stage."""

    sparsity: Float[Array, " stages"]  # reached, of the weights that count
    predicted_loss_change: Float[Array, " stages"]  # by the quadratic model; NaN without a curvature
    loss_before: Float[Array, " stages"]  # mean over the stage's examples; NaN where it is not measured
    loss_after: Float[Array, " stages"]  # the same examples, after the stage
    damping: Float[Array, " stages"]  # the largest of any block: higher than asked if a factor failed
    raised: Int[Array, " stages"]  # blocks whose factor failed and took more damping
    nonfinite: Bool[Array, "stages leaves"]  # leaf kept its mask and weights: scores or updates not finite


class Stage(NamedTuple):
    """The network after one stage, as `prune_one_shot` hands it to `on_stage`."""

    params: Params
    masks: Masks
    info: OneShotInfo | None  # fields without the stage axis; None where no data were seen


def prune_one_shot(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    sparsity: Sparsity,
    *,
    stages: int = 1,
    path: Path = "exponential",
    examples_per_stage: int | None = None,
    key: Key[Array, ""] | None = None,
    curvature: CurvatureFn | None = low_rank_fisher,
    stream: bool = False,
    criterion: Criterion | None = None,
    method: Method | None = "joint",
    first_order: bool = False,
    scope: Scope = "global",
    masks: Masks | None = None,
    batch_axes: int = 0,
    microbatch_size: int | None = 64,
    examples_per_gradient: int = 1,
    measure_loss: bool = True,
    check: bool = True,
    on_broken: Literal["raise", "keep"] = "raise",
    on_stage: Callable[[Stage], None] | None = None,
) -> tuple[Params, Masks, OneShotInfo]:
    """Prune a trained network without training it again.

    In every stage the curvature is computed anew at the current weights, weights pruned before
    leave the problem, and the survivors move to make up for what goes.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example: deterministic, batch
            normalisation in eval mode.
        params: A params-tree of floating leaves: the trained network.
        batch: A pool of examples, `[n, ...]` along the first axis of every leaf.
        sparsity: Fraction to prune, or a mapping from leaf path to fraction, as in `make_masks`.
        stages: Number of stages; more are better at high sparsity and cost in proportion.
        path: Sparsities on the way from that of `masks`, as in `stage_sparsities`.
        examples_per_stage: Examples of the pool that each stage takes, fresh ones until the
            pool is used up; None for all of them in every stage.
        key: Shuffles the pool; None takes it in order.
        curvature: From per-example gradients to a curvature, for example
            `functools.partial(woodjax.block_fisher, block_size=128)`. Pass the same object again
            to reuse what was compiled. None for criteria that see no data, such as magnitude.
        stream: Hand the curvature a `GradientStream` instead of gradients that are held: for example to
            `functools.partial(woodjax.empirical_fisher, memory_budget=2**30)`.
        criterion: From parameters and curvature to scores, `criterion(params, curvature)`; without curvature
            `criterion(params)`, with `first_order` `criterion(params, curvature, mean_gradient)`. None takes
            `obs_scores`, `magnitude_scores`, `woodtaylor_scores`.
        method: `"joint"`, `"sum"`, or None to prune without moving the survivors.
        first_order: Take the mean gradient into scores and updates, for a network that is not at a minimum. The full
            Newton step that comes with it can leave the region where the model holds: raise the damping.
        scope: As in `make_masks`.
        masks: Masks of an earlier pruning: what they pruned stays pruned.
        batch_axes: Leading axes that stack layers, for the scopes `"leaf"` and `"erdos_renyi"`; give
            the curvature its own.
        microbatch_size: Gradient rows computed at once.
        examples_per_gradient: Examples averaged into one row of the Fisher.
        measure_loss: Measure the loss over the stage's examples before and after it: two forward passes.
        check: Look for dropout, train-mode batch normalisation and impure losses first.
        on_broken: What to do, outside `jit`, where scores or updates are not finite: `"raise"`, or `"keep"`, which is
            what happens under `jit`: the leaf keeps its masks and weights, and `info.nonfinite` says so.
        on_stage: Called on the host with the network after each stage: for progress and
            checkpoints.

    Returns:
        Pruned parameters (pruned weights are exactly zero), masks, and what was done.

    Raises:
        ValueError: Bad sparsity, stages, batch, loss or masks; scores or updates that are not
            finite (outside `jit`), naming the leaves.

    Cost:
        For each stage `m` backward passes, and flops and memory of the curvature: for the
        default `2m·d` floats at the peak and about `3.5m²d` flops. See `woodjax.estimate`.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340); Frantar et al., M-FAC, 2021
        (arXiv 2107.03356), section 4 (recomputation).

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda p, xy: (xy[0] @ p["w"][:, 0] - xy[1]) ** 2
        >>> x = jnp.array([[1.0, 1.1], [2.0, 1.9], [3.0, 3.2]])
        >>> params, masks, info = wj.prune_one_shot(loss, {"w": jnp.array([[1.0], [0.5]])}, (x, x.sum(1)), 0.5)
        >>> masks["w"].tolist(), float(info.sparsity[0])
        ([[True], [False]], 0.5)
    """
    check_sparsity(sparsity)
    check_stages(stages, path)
    check_floating(params)
    size = batch_size(batch)
    m = size if examples_per_stage is None else examples_per_stage
    if not 1 <= m <= size:
        raise ValueError(f"examples_per_stage is {m}: pass 1 to {size}, the examples in the batch.")
    if masks is None:
        masks = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)
    check_like(masks, params, "masks")
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    order = jnp.arange(size) if key is None else jax.random.permutation(key, size)

    def examples_of(number: int) -> Batch:
        return jax.tree.map(lambda x: jnp.asarray(x)[order[(jnp.arange(m) + number * m) % size]], batch)

    def rows_at(number: int, params: Params, masks: Masks) -> Gradients | GradientStream | None:
        if curvature is None:
            return None
        rows = stream_gradients(
            loss_fn,
            params,
            examples_of(number),
            masks=masks,  # what was pruned before leaves the problem
            microbatch_size=microbatch_size or m,
            examples_per_gradient=examples_per_gradient,
            check=check and number == 0,
        )
        return rows if stream else rows.collect()

    def loss(params: Params, number: int) -> Float[Array, ""]:
        if not measure_loss:
            return jnp.full((), jnp.nan)
        return _mean_loss(params, examples_of(number), LossRow(loss_fn, False), microbatch_size=microbatch_size)

    infos, before = [], params
    stages_done = prune_stages(
        params,
        masks,
        rows_at,
        sparsity,
        stages=stages,
        path=path,
        curvature=curvature,
        criterion=criterion,
        method=method,
        scope=scope,
        batch_axes=batch_axes,
        first_order=first_order,
        strict=on_broken == "raise",
    )
    for number, (params, masks, done) in enumerate(stages_done):
        if on_broken == "raise" and not isinstance(done.nonfinite, jax.core.Tracer) and done.nonfinite.any():
            bad = [name for name, broken in zip(names, done.nonfinite, strict=True) if broken]
            raise ValueError(
                f"Stage {number + 1} of {stages}: updates of {bad} are not finite. Look for NaN in the parameters "
                "and the batch, or raise the damping of the curvature."
            )
        info = OneShotInfo(**done._asdict(), loss_before=loss(before, number), loss_after=loss(params, number))
        infos.append(info)
        before = params
        if on_stage is not None:
            on_stage(Stage(params, masks, info))
    return params, masks, jax.tree.map(lambda *fields: jnp.stack(fields), *infos)


@partial(jax.jit, static_argnames="microbatch_size")
def _mean_loss(params: Params, examples: Batch, loss_row: LossRow, *, microbatch_size: int | None) -> Float[Array, ""]:
    if microbatch_size is None:
        return jnp.mean(jax.vmap(loss_row.loss, in_axes=(None, 0))(params, examples))
    return jnp.mean(jax.lax.map(lambda x: loss_row.loss(params, x), examples, batch_size=microbatch_size))
