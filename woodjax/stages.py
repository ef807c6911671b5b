"""Pruning in stages: curvature → scores → masks → updates, at each stage at the weights of the one before.

One-shot pruning, a refresh inside a training and the window of an optimizer differ in where the gradients
come from. What is done with them is here, once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from woodjax.compensation import Method, compensate
from woodjax.criteria import magnitude_scores, obs_scores, woodtaylor_scores
from woodjax.curvature import Curvature, low_rank_fisher, predicted_loss_change
from woodjax.groups import GroupScope, pattern_masks
from woodjax.masks import Scope, make_masks, mask_sparsity
from woodjax.patterns import NM, Pattern
from woodjax.placement import Placement, as_params, placement_of
from woodjax.ranking import is_broken
from woodjax.schedules import Path, on_path
from woodjax.sparsities import ExactSparsity, Fraction, Group, Sparsity, sparsity_groups
from woodjax.stream import GradientStream
from woodjax.tree import apply_masks, path_name
from woodjax.typing import Gradients, Masks, Params, Scores, Updates
from woodjax.update_search import UpdateChoice, UpdateSearch, choose_update

CurvatureFn = Callable[[Any], Curvature]
Criterion = Callable[..., Scores]
RowsAt = Callable[[int, Params, Masks], Gradients | GradientStream | None]


class StageInfo(NamedTuple):
    """What one stage did."""

    sparsity: Float[Array, ""]  # reached, of the weights that count
    predicted_loss_change: Float[Array, ""]  # by the quadratic model; NaN without a curvature
    damping: Float[Array, ""]  # the largest of any block: higher than asked if a factor failed
    raised: Int[Array, ""]  # blocks whose factor failed and took more damping
    nonfinite: Bool[Array, " leaves"]  # leaf kept its mask and weights: scores or updates not finite
    choice: UpdateChoice | None  # which update, and why; None where there was nothing to choose


def prune_stages(
    params: Params,
    masks: Masks,
    rows_at: RowsAt,
    sparsity: Sparsity | None,
    *,
    stages: int = 1,
    path: Path = "exponential",
    curvature: CurvatureFn | None = low_rank_fisher,
    criterion: Criterion | None = None,
    method: Method | None = "joint",
    search: UpdateSearch | None = None,
    held_out_losses: Callable[[Params], Float[Array, " n"]] | None = None,
    pattern: Pattern | None = None,
    floor: float = 0.0,
    scope: Scope = "global",
    batch_axes: int = 0,
    first_order: bool = False,
    mean_gradient: Params | None = None,
    gradient_scale: float = 1.0,
    prunable: tuple[bool, ...] | None = None,
    strict: bool = True,
    done: int = 0,
    initial: Float[Array, " groups"] | None = None,
) -> Iterator[tuple[Params, Masks, StageInfo, Float[Array, " groups"] | None]]:
    """Prune to a sparsity in one or several stages.

    Args:
        params: A params-tree.
        masks: What is pruned already stays pruned.
        rows_at: `rows_at(number, params, masks)` gives the gradients of a stage, with what is pruned at zero: leaves
            `[m, *leaf.shape]`, a stream of them, or None where the curvature is None.
        sparsity: As in `make_masks`; None for the pattern `NM`, which fixes it.
        stages: Number of stages.
        path: Sparsities on the way, from that of `masks` to `sparsity`.
        curvature: From gradients to a curvature; None for criteria that see no data.
        criterion: `criterion(params, curvature)`; `criterion(params)` without curvature, `criterion(params,
            curvature, gradient)` with `first_order`. None takes OBS, magnitude or WoodTaylor.
        method: As in `compensate`, or None to leave the survivors where they are.
        search: Candidates to choose the update from, in the place of `method`.
        held_out_losses: With `search`, what chooses: losses at examples that no row is made from; None takes the usual
            candidate.
        pattern: Which weights go together; None for single weights.
        floor: As in `make_masks`.
        scope: As in `make_masks`.
        batch_axes: As in `make_masks`.
        first_order: Use the mean gradient as well, for networks that are not at a minimum.
        mean_gradient: With `first_order`, the gradient where it is not the mean of the rows; None takes that.
        gradient_scale: Factor on it: `1/s` for rows that average `s` examples, whose Fisher is `1/s` of that of single
            examples but for `(1 − 1/s)ḡḡᵀ`, so that `H⁻¹ḡ` has the direction of the latter's step and is shorter.
        prunable: For each leaf, may it be pruned? None leaves that to the scores.
        strict: Outside `jit`, raise on scores that are not finite rather than leave their leaf as it is.
        done: Stages done before: parameters and masks are those after them.
        initial: What was yielded with them.

    Yields:
        Parameters, masks and what was done, after each stage; and the sparsity before the first, for each group of
        leaves that share one, None where no path leads from it.

    Raises:
        ValueError: No sparsity and no pattern that fixes it; groups with the scope `"erdos_renyi"`, a criterion or
            `prunable`.

    Cost:
        For each stage one curvature, its inverse diagonal, one `compensate` and two products.
    """
    if pattern is not None and (criterion is not None or prunable is not None):
        raise ValueError(f"{pattern} ranks groups by their own joint cost: leave criterion and prunable out.")
    if criterion is None:
        criterion = magnitude_scores if curvature is None else woodtaylor_scores if first_order else obs_scores
    for number in range(done, stages):
        rows = rows_at(number, params, masks)
        # A stream runs its own compiled steps from the host, and only there is known where arrays lie on a mesh.
        streamed = isinstance(rows, GradientStream)
        placement = placement_of(params)
        on_host = streamed or placement is not None
        score, move = _score if on_host else _score_jit, _move if streamed else _move_jit
        known = None if mean_gradient is None else apply_masks(mean_gradient, masks)
        hessian, gradient, scores = score(
            params,
            rows,
            known,
            gradient_scale,
            curvature=curvature,
            criterion=criterion,
            first_order=first_order,
            prunable=prunable,
        )
        del rows  # the curvature has what it needs of them
        time = (number + 1) / stages
        target = sparsity
        if sparsity is not None:
            if initial is None and stages > 1:
                initial = _reached(sparsity, masks, scores)
            target = _target(sparsity, initial, params, time, path)
        if pattern is not None and hessian is not None:
            new_masks = pattern_masks(
                params,
                hessian,
                _relaxed(pattern, time),
                target,
                scope=_group_scope(scope),
                previous=masks,
                gradient=gradient,
                floor=floor,
                batch_axes=batch_axes,
            )
        elif target is not None:
            ranked = scores if strict else jax.tree.map(lambda s: jnp.where(is_broken(s), jnp.inf, s), scores)
            new_masks = make_masks(ranked, target, scope=scope, previous=masks, batch_axes=batch_axes, floor=floor)
        else:
            raise ValueError("sparsity is None: pass the fraction to prune.")
        update, choice = None, None
        if search is not None and hessian is not None:
            update, choice = choose_update(params, new_masks, hessian, gradient, search, held_out_losses)
        params, masks, info = move(
            params, masks, new_masks, scores, hessian, gradient, update, choice, method=method, placement=placement
        )
        yield params, masks, info, initial


def _group_scope(scope: Scope) -> GroupScope:
    if scope == "erdos_renyi":
        raise ValueError("scope is 'erdos_renyi': groups of weights take 'global' or 'leaf'.")
    return scope


def _relaxed(pattern: Pattern, time: float) -> Pattern:
    # N:M goes one weight of each group after the other.
    return NM(pattern.m - math.ceil(time * (pattern.m - pattern.n)), pattern.m) if isinstance(pattern, NM) else pattern


def _groups(sparsity: Sparsity, tree: Params | Scores) -> list[Group]:
    return sparsity_groups(sparsity, [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)])


def _reached(sparsity: Sparsity, masks: Masks, scores: Scores) -> Float[Array, " groups"]:
    # Sparsity of the masks, over all leaves or those of each pattern.
    kept, scored = jax.tree.leaves(masks), jax.tree.leaves(scores)
    return jnp.stack([
        mask_sparsity([kept[i] for i in group.members], [scored[i] for i in group.members])
        for group in _groups(sparsity, scores)
    ])


def _target(
    sparsity: Sparsity, initial: Float[Array, " groups"] | None, params: Params, time: float, path: Path
) -> Sparsity:
    if initial is None or time == 1:
        return sparsity  # the last stage meets it to the count
    values = initial if isinstance(initial, jax.core.Tracer) else np.asarray(initial).tolist()
    starts = {group.pattern: values[i] for i, group in enumerate(_groups(sparsity, params))}

    def between(fraction: Fraction, start: Any) -> Any:
        final = fraction.value if isinstance(fraction, ExactSparsity) else fraction
        if any(isinstance(x, jax.Array) for x in (final, start)):
            return on_path(final, jnp.minimum(start, final), time, path)
        return float(on_path(final, min(start, final), time, path))

    if isinstance(sparsity, Mapping):
        return {key: between(fraction, starts.get(key, 0.0)) for key, fraction in sparsity.items()}
    return between(sparsity, starts[None])


def _score(
    params: Params,
    rows: Gradients | GradientStream | None,
    known: Params | None,
    gradient_scale: float,
    *,
    curvature: CurvatureFn | None,
    criterion: Criterion,
    first_order: bool,
    prunable: tuple[bool, ...] | None,
) -> tuple[Curvature | None, Params | None, Scores]:
    if curvature is None:
        hessian, gradient, scores = None, None, criterion(params)
    elif first_order:
        hessian, gradient = curvature(rows), _mean(rows) if known is None else known
        gradient = jax.tree.map(lambda g: g * gradient_scale, gradient)
        scores = criterion(params, hessian, gradient)
    else:
        hessian, gradient = curvature(rows), None
        scores = criterion(params, hessian)
    if prunable is not None:
        leaves, treedef = jax.tree.flatten(scores)
        held = [s if may else jnp.full_like(s, jnp.inf) for s, may in zip(leaves, prunable, strict=True)]
        scores = jax.tree.unflatten(treedef, held)
    return hessian, gradient, scores


def _mean(rows: Gradients | GradientStream | None) -> Params:
    if isinstance(rows, GradientStream):
        return rows.combine(jnp.full(rows.num_rows, 1 / rows.num_rows))
    return jax.tree.map(lambda g: jnp.mean(g, axis=0, dtype=jnp.promote_types(g.dtype, jnp.float32)), rows)


def _move(
    params: Params,
    masks: Masks,
    new_masks: Masks,
    scores: Scores,
    hessian: Curvature | None,
    gradient: Params | None,
    steps: Updates | None,
    choice: UpdateChoice | None,
    *,
    method: Method | None,
    placement: Placement | None,
) -> tuple[Params, Masks, StageInfo]:
    if steps is None:
        steps = jax.tree.map(lambda w, mask: jnp.where(mask, 0, -w), params, new_masks)
        if hessian is not None and method is not None:
            steps = compensate(params, new_masks, hessian, method=method, gradient=gradient)
    finite = jax.tree.map(lambda step: jnp.all(jnp.isfinite(step)), steps)
    # A leaf whose update is lost stays as it is, mask and weights.
    updates = jax.tree.map(lambda ok, step: jnp.where(ok, step, 0), finite, steps)
    kept = jax.tree.map(jnp.where, finite, new_masks, masks)
    pruned = optax.apply_updates(params, updates)
    broken = jax.tree.map(lambda ok, s: ~ok | is_broken(s), finite, scores)
    unknown = jnp.full((), jnp.nan)
    info = StageInfo(
        sparsity=mask_sparsity(kept, scores),
        predicted_loss_change=unknown if hessian is None else predicted_loss_change(updates, hessian, gradient),
        damping=unknown if hessian is None else jnp.max(hessian.damping),
        raised=jnp.zeros((), jnp.int32) if hessian is None else hessian.raised,
        nonfinite=jnp.stack(jax.tree.leaves(broken)),
        choice=choice,
    )
    return as_params(pruned, placement), as_params(kept, placement), info


_score_jit = jax.jit(_score, static_argnames=("curvature", "criterion", "first_order", "prunable"))
_move_jit = jax.jit(_move, static_argnames=("method", "placement"))
