"""One call: masks for a network that is not trained yet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from woodjax.at_init._selected import inputs_of, keep_selected
from woodjax.at_init.collapse import CollapseReport, layer_collapse_report
from woodjax.at_init.names import INIT_CRITERIA, InitCriterion
from woodjax.door import checked
from woodjax.gradients import check_apply
from woodjax.kinds import hidden_kernels
from woodjax.loss_rows import batch_size
from woodjax.losses import cross_entropy
from woodjax.masks import Scope, make_masks, nonfinite_scores
from woodjax.placement import on_any_axes
from woodjax.sparsities import Sparsity, check_sparsity
from woodjax.tree import apply_masks
from woodjax.typing import ApplyFn, Batch, LossFn, Masks, Params, Scores, Select


class AtInitInfo(NamedTuple):
    """What was done."""

    scores: Scores  # of the last round, `+inf` where not prunable
    report: CollapseReport  # of the leaves that were selected
    nonfinite: Int[Array, ""]  # leaves with a score that was not finite, counted in every round


@checked
@on_any_axes
def prune_at_init(
    apply_fn: ApplyFn,
    params: Params,
    batch: Batch,
    sparsity: Sparsity,
    key: Key[Array, ""],
    *,
    criterion: str | InitCriterion = "synflow",
    rounds: int | None = None,
    loss: Callable[..., LossFn] = cross_entropy,
    scope: Scope = "global",
    floor: float = 0.0,
    select: Select | None = None,
    on_round: Callable[[int, Masks], None] | None = None,
) -> tuple[Masks, AtInitInfo]:
    """Masks at initialization.

    Train under them with `prune_transform(optimizer)` and `set_masks(optimizer.init(params), masks)`: pruned weights
    become zero and stay so.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode. With batch normalisation first consider
            `warm_up_batch_stats`: before it, eval mode normalises by nothing.
        params: A params-tree of floating leaves.
        batch: `(inputs, integer labels)`: 10 examples of each class is usual.
        sparsity: Fraction of the prunable weights to prune, in [0, 1], or a mapping of them, as in `make_masks`.
        key: PRNG key.
        criterion: A name in `INIT_CRITERIA`, or an `InitCriterion`.
        rounds: Score and prune so often, keeping `density^(r/rounds)` after round `r`; None as the criterion was
            published.
        loss: From `apply_fn` (and `temperature=`, where the criterion has one) to the loss of one example. Criteria
            that ask for the network do without: the exact diagonals are those of cross-entropy.
        scope: As in `make_masks`.
        floor: As in `make_masks`: every leaf keeps that fraction of its weights.
        select: Which leaves are prunable; None for `hidden_kernels`: kernels by kind, without the classifier.
        on_round: Called with the number of each round, from 1, and its masks; outside `jit` only.

    Returns:
        Masks, and what was done.

    Raises:
        ValueError: Unknown criterion; `rounds < 1`; labels that are no classes; sparsity or floor outside [0, 1];
            scores that are not finite (outside `jit`; under it such a leaf keeps its masks of the round before, and
            `info` counts them); as the criterion.

    Cost:
        `rounds` times that of the criterion, and of `make_masks`.

    References:
        arXiv 2502.11450; rounds: Tanaka et al., SynFlow, 2020 (arXiv 2006.05467), algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> params = [jnp.array([[1.0, -3.0]]), jnp.array([[1.0], [1.0]])]
        >>> apply_fn = lambda p, x: jnp.maximum(x @ p[0], 0) @ p[1]
        >>> batch = jnp.ones((1, 1)), jnp.zeros(1, int)
        >>> masks, info = wj.prune_at_init(apply_fn, params, batch, 0.5, jax.random.key(0))
        >>> [mask.tolist() for mask in masks]  # the last layer is the classifier
        [[[False, True]], [[True], [True]]]
    """
    chosen = _find(criterion)
    rounds = chosen.rounds if rounds is None else rounds
    if rounds != int(rounds) or rounds < 1:
        raise ValueError(f"rounds is {rounds}: pass a whole number of at least 1.")
    check_sparsity(sparsity)
    inputs = inputs_of(batch)
    batch_size(batch)
    if loss is cross_entropy and chosen.data:
        _check_labels(apply_fn, params, batch)
    if select is None:
        select = hidden_kernels(apply_fn, params, inputs)
    check_apply(apply_fn, params, inputs)
    function = apply_fn if chosen.asks == "network" else _loss(loss, apply_fn, chosen.temperature)

    def prune(number: Int[Array, ""] | int, level: Any, masks: Masks | None) -> tuple[Masks, Scores]:
        sparse = params if masks is None else apply_masks(params, masks)
        scores = chosen.scores(function, sparse, batch, jax.random.fold_in(key, number), select=select, check=False)
        scores = keep_selected(params, scores, select)
        return make_masks(scores, level, scope=scope, previous=masks, floor=floor), scores

    def reached(number: Int[Array, ""] | int) -> Any:
        return jax.tree.map(lambda s: 1 - (1 - s) ** (number / rounds), sparsity)

    masks, nonfinite = None, jnp.zeros((), jnp.int32)
    known = (params, batch, sparsity, key)
    if rounds > 1 and any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(known)):
        dense = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)

        def step(number: Int[Array, ""], state: tuple[Masks, Array]) -> tuple[Masks, Array]:
            masks, scores = prune(number, reached(number), state[0])
            return masks, state[1] + nonfinite_scores(scores)

        masks, nonfinite = lax.fori_loop(1, rounds, step, (dense, nonfinite))
    else:
        for number in range(1, rounds):
            masks, _ = prune(number, reached(number), masks)
            if on_round is not None:
                on_round(number, masks)
    masks, scores = prune(rounds, sparsity, masks)
    if on_round is not None:
        on_round(rounds, masks)
    return masks, AtInitInfo(scores, layer_collapse_report(masks, select=select), nonfinite + nonfinite_scores(scores))


def _check_labels(apply_fn: ApplyFn, params: Params, batch: Batch) -> None:
    inputs = inputs_of(batch)
    if inputs is batch:
        raise ValueError("batch has no labels: pass a tuple (inputs, integer labels).")
    labels, classes = jnp.asarray(batch[1]), jax.eval_shape(apply_fn, params, inputs).shape[-1]
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.ndim != 1:
        raise ValueError(
            f"Labels are {labels.dtype}{list(labels.shape)}: pass integers [n], the index of a class each."
        )
    if not isinstance(labels, jax.core.Tracer) and not bool(jnp.all((labels >= 0) & (labels < classes))):
        raise ValueError(
            f"Labels from {int(labels.min())} to {int(labels.max())}, and {classes} logits: pass labels from 0 to "
            f"{classes - 1}."
        )


def _find(criterion: str | InitCriterion) -> InitCriterion:
    if isinstance(criterion, InitCriterion):
        return criterion
    if criterion not in INIT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: choose one of {sorted(INIT_CRITERIA)}, or pass InitCriterion.")
    return INIT_CRITERIA[criterion]


def _loss(loss: Callable[..., LossFn], apply_fn: ApplyFn, temperature: float) -> LossFn:
    return loss(apply_fn) if temperature == 1 else loss(apply_fn, temperature=temperature)
