"""One-shot pruning: gradients → curvature → scores → masks → updates, in one or several stages."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.compensation import Method, compensate
from woodjax.criteria import obs_scores
from woodjax.curvature import Curvature, low_rank_fisher, predicted_loss_change
from woodjax.gradients import batch_size
from woodjax.masks import Scope, Sparsity, check_sparsity, is_broken, make_masks, mask_sparsity
from woodjax.schedules import Path, stage_sparsities
from woodjax.stream import GradientStream, stream_gradients
from woodjax.tree import check_floating, check_like, path_name
from woodjax.typing import Batch, Gradients, LossFn, Masks, Params, Scores


class OneShotInfo(NamedTuple):
    """What one-shot pruning did; every field has one entry for each stage."""

    sparsity: Float[Array, " stages"]  # reached, of the weights that count
    predicted_loss_change: Float[Array, " stages"]  # by the quadratic model, first-order term left out
    loss_before: Float[Array, " stages"]  # mean over the stage's examples
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
    curvature: Callable[[Any], Curvature] = low_rank_fisher,
    stream: bool = False,
    criterion: Callable[[Params, Curvature], Scores] = obs_scores,
    method: Method | None = "joint",
    scope: Scope = "global",
    masks: Masks | None = None,
    batch_axes: int = 0,
    microbatch_size: int | None = 64,
    examples_per_gradient: int = 1,
    check: bool = True,
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
            Traced with `stages=1` only.
        stages: Number of stages; more are better at high sparsity and cost in proportion.
        path: Sparsities on the way, as in `stage_sparsities`.
        examples_per_stage: Examples of the pool that each stage takes, fresh ones until the
            pool is used up; None for all of them in every stage.
        key: Shuffles the pool; None takes it in order.
        curvature: From per-example gradients to a curvature, for example
            `functools.partial(woodjax.block_fisher, block_size=128)`. Pass the same object again
            to reuse what was compiled.
        stream: Hand the curvature a `GradientStream` instead of gradients that are held: for example to
            `functools.partial(woodjax.empirical_fisher, memory_budget=2**30)`.
        criterion: From parameters and curvature to scores.
        method: `"joint"`, `"sum"`, or None to prune without moving the survivors.
        scope: As in `make_masks`; `"leaf"` with a mapping.
        masks: Masks of an earlier pruning: what they pruned stays pruned.
        batch_axes: Leading axes that stack layers, for the scopes `"leaf"` and `"erdos_renyi"`; give
            the curvature its own.
        microbatch_size: Gradient rows computed at once.
        examples_per_gradient: Examples averaged into one row of the Fisher.
        check: Look for dropout, train-mode batch normalisation and impure losses first.
        on_stage: Called on the host with the network after each stage: for progress and
            checkpoints.

    Returns:
        Pruned parameters (pruned weights are exactly zero), masks, and what was done.

    Raises:
        ValueError: Bad sparsity, stages, batch, loss or masks; scores or updates that are not
            finite (outside `jit`), naming the leaves; a traced sparsity with several stages.

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
    check_floating(params)
    targets = _targets(sparsity, stages, path)
    size = batch_size(batch)
    m = size if examples_per_stage is None else examples_per_stage
    if not 1 <= m <= size:
        raise ValueError(f"examples_per_stage is {m}: pass 1 to {size}, the examples in the batch.")
    if masks is None:
        masks = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)
    check_like(masks, params, "masks")
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    infos = []
    order = jnp.arange(size) if key is None else jax.random.permutation(key, size)
    for number, target in enumerate(targets):
        examples = _take(batch, order[(jnp.arange(m) + number * m) % size])
        rows = stream_gradients(
            loss_fn,
            params,
            examples,
            masks=masks,  # what was pruned before leaves the problem
            microbatch_size=microbatch_size or m,
            examples_per_gradient=examples_per_gradient,
            check=check and number == 0,
        )
        # A stream runs its own compiled steps from the host; gradients that are held go through one program.
        score, move = (_score, _move) if stream else (_score_jit, _move_jit)
        if not stream:
            rows = rows.collect()
        hessian, scores = score(params, rows, curvature=curvature, criterion=criterion)
        del rows  # the curvature has what it needs of them
        new_masks = make_masks(scores, target, scope=scope, previous=masks, batch_axes=batch_axes)
        params, masks, info = move(
            params,
            masks,
            new_masks,
            scores,
            hessian,
            examples,
            loss_fn=loss_fn,
            method=method,
            microbatch_size=microbatch_size,
        )
        if not isinstance(info.nonfinite, jax.core.Tracer) and info.nonfinite.any():
            bad = [name for name, broken in zip(names, info.nonfinite, strict=True) if broken]
            raise ValueError(
                f"Stage {number + 1} of {stages}: updates of {bad} are not finite. Look for NaN in the parameters "
                "and the batch, or raise the damping of the curvature."
            )
        infos.append(info)
        if on_stage is not None:
            on_stage(Stage(params, masks, info))
    return params, masks, jax.tree.map(lambda *fields: jnp.stack(fields), *infos)


def _take(batch: Batch, chosen: Int[Array, " m"]) -> Batch:
    return jax.tree.map(lambda x: jnp.asarray(x)[chosen], batch)


def _targets(sparsity: Sparsity, stages: int, path: Path) -> list[Sparsity]:
    values = list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]
    if stages == 1:
        return [sparsity]
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise ValueError("A traced sparsity goes with stages=1: the sparsities of several stages are made on the host.")
    curves = [stage_sparsities(float(value), stages, path=path) for value in values]
    if isinstance(sparsity, Mapping):
        return [dict(zip(sparsity, map(float, at_stage), strict=True)) for at_stage in zip(*curves, strict=True)]
    return [float(value) for value in curves[0]]


def _score(
    params: Params,
    rows: Gradients | GradientStream,
    *,
    curvature: Callable[[Any], Curvature],
    criterion: Callable[[Params, Curvature], Scores],
) -> tuple[Curvature, Scores]:
    hessian = curvature(rows)
    return hessian, criterion(params, hessian)


def _move(
    params: Params,
    masks: Masks,
    new_masks: Masks,
    scores: Scores,
    hessian: Curvature,
    examples: Batch,
    *,
    loss_fn: LossFn,
    method: Method | None,
    microbatch_size: int | None,
) -> tuple[Params, Masks, OneShotInfo]:
    plain = jax.tree.map(lambda w, mask: jnp.where(mask, 0, -w), params, new_masks)
    steps = plain if method is None else compensate(params, new_masks, hessian, method=method)
    finite = jax.tree.map(lambda step: jnp.all(jnp.isfinite(step)), steps)
    # A leaf whose update is lost stays as it is, mask and weights.
    updates = jax.tree.map(lambda ok, step: jnp.where(ok, step, 0), finite, steps)
    kept = jax.tree.map(jnp.where, finite, new_masks, masks)
    pruned = optax.apply_updates(params, updates)
    broken = jax.tree.map(lambda ok, s: ~ok | is_broken(s), finite, scores)
    info = OneShotInfo(
        sparsity=mask_sparsity(kept, scores),
        predicted_loss_change=predicted_loss_change(updates, hessian),
        loss_before=_mean_loss(params, examples, loss_fn=loss_fn, microbatch_size=microbatch_size),
        loss_after=_mean_loss(pruned, examples, loss_fn=loss_fn, microbatch_size=microbatch_size),
        damping=jnp.max(hessian.damping),
        raised=hessian.raised,
        nonfinite=jnp.stack(jax.tree.leaves(broken)),
    )
    return pruned, kept, info


_score_jit = jax.jit(_score, static_argnames=("curvature", "criterion"))
_move_jit = jax.jit(_move, static_argnames=("loss_fn", "method", "microbatch_size"))


@partial(jax.jit, static_argnames=("loss_fn", "microbatch_size"))
def _mean_loss(params: Params, examples: Batch, *, loss_fn: LossFn, microbatch_size: int | None) -> Float[Array, ""]:
    if microbatch_size is None:
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, examples))
    return jnp.mean(jax.lax.map(lambda x: loss_fn(params, x), examples, batch_size=microbatch_size))
