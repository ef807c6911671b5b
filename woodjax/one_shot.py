"""One-shot pruning: gradients → curvature → scores → masks → updates, in one or several stages."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from woodjax.choices import Auto, Plan, choose_plan, choose_search
from woodjax.compensation import Method
from woodjax.curvature import low_rank_fisher
from woodjax.door import checked_but
from woodjax.loss_rows import LossRow, batch_size, example_losses
from woodjax.masks import Scope
from woodjax.patterns import NM, Pattern
from woodjax.placement import all_true, on_any_axes, placed_like, placement_of, take_examples
from woodjax.schedules import Path, check_stages
from woodjax.sparsities import Sparsity, check_sparsity
from woodjax.stages import Criterion, CurvatureFn, prune_stages
from woodjax.stream import GradientStream, stream_gradients
from woodjax.tree import check_floating, check_like, path_name
from woodjax.typing import Batch, Gradients, LossFn, Masks, Params
from woodjax.update_search import UpdateChoice, UpdateSearch

PLAIN = UpdateSearch()  # the joint update as it is: nothing to choose


class OneShotInfo(NamedTuple):
    """What one-shot pruning chose and did; every field has one entry for each stage."""

    sparsity: Float[Array, " stages"]  # reached, of the weights that count
    predicted_loss_change: Float[Array, " stages"]  # by the model, in units of the loss; NaN without a curvature
    loss_before: Float[Array, " stages"]  # mean over the stage's examples; NaN where it is not measured
    loss_after: Float[Array, " stages"]  # the same examples, after the stage
    damping: Float[Array, " stages"]  # the largest of any block: higher than asked if a factor failed
    raised: Int[Array, " stages"]  # blocks whose factor failed and took more damping
    nonfinite: Bool[Array, "stages leaves"]  # leaf kept its mask and weights: scores or updates not finite
    rows: Int[Array, " stages"]  # gradient rows of the curvature
    examples_per_gradient: Int[Array, " stages"]  # examples in each row
    held_out: Int[Array, " stages"]  # examples that chose the update
    choice: UpdateChoice | None  # which update was taken, and the held-out losses of all that were tried


class Stage(NamedTuple):
    """The network after one stage, as `prune_one_shot` hands it to `on_stage`, and takes it to go on from there."""

    params: Params
    masks: Masks
    info: OneShotInfo | None  # fields without the stage axis; None where no data were seen
    infos: tuple[OneShotInfo, ...] = ()  # of all stages so far
    initial: Float[Array, " groups"] | None = None  # sparsity before the first, for each group of leaves that share one
    stages: int | None = None  # of the whole run


@checked_but("params")
@on_any_axes
def prune_one_shot(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    sparsity: Sparsity | None = None,
    *,
    stages: int | Auto = "auto",
    path: Path = "exponential",
    method: Method | Auto | None = "auto",
    damping_multiples: Sequence[float] | Auto = "auto",
    step: float | Auto = "auto",
    held_out: int | Auto = "auto",
    examples_per_stage: int | None = None,
    examples_per_gradient: int | Auto = "auto",
    key: Key[Array, ""] | None = None,
    curvature: CurvatureFn | Auto | None = "auto",
    stream: bool = False,
    criterion: Criterion | None = None,
    first_order: bool = False,
    pattern: Pattern | None = None,
    floor: float = 0.0,
    scope: Scope = "global",
    masks: Masks | None = None,
    batch_axes: int = 0,
    microbatch_size: int | None = 64,
    measure_loss: bool = True,
    check: bool = True,
    on_broken: Literal["raise", "keep"] = "raise",
    on_stage: Callable[[Stage], None] | None = None,
    resume: Stage | None = None,
) -> tuple[Params, Masks, OneShotInfo]:
    """Prune a trained network without training it again.

    In every stage the curvature is computed anew at the current weights, weights pruned before leave the problem, and
    the survivors move to make up for what goes. What is `"auto"` is chosen here: the number of stages from the
    sparsity, the examples from the size of the pool, and at every stage the rule, the damping and the length of the
    survivors' move by the loss on examples that were held out. `info` says what was taken, and the losses of all
    that were tried. `FIXED` turns all of it off.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example: deterministic, batch
            normalisation in eval mode.
        params: A params-tree of floating leaves: the trained network.
        batch: A pool of examples, `[n, ...]` along the first axis of every leaf.
        sparsity: Fraction to prune, or a mapping from leaf path to fraction, as in `make_masks`; None for the pattern
            `NM`, which fixes it.
        stages: Number of stages; more are better at high sparsity and cost in proportion. `"auto"` takes about 8 %
            of the density off in each, with at most 48, and 32 with `first_order`, which descends in each.
        path: Sparsities on the way from that of `masks`, as in `stage_sparsities`.
        method: `"joint"`, `"sum"`, None to prune without moving the survivors, or `"auto"`.
        damping_multiples: Multiples of the curvature's damping to try for joint updates; `(1.0,)` for its own. Only
            `low_rank_fisher` can answer at other dampings; other curvatures are asked at theirs.
        step: Length of the survivors' move, 1 for the whole of it.
        held_out: Examples of the pool, its last ones, that choose. `"auto"`: a fifth, at most 2,048; none where there
            is nothing to choose or fewer than 8 would be left aside. Then the update is the whole joint one.
        examples_per_stage: Examples of the pool that each stage takes, fresh ones until the pool is used up; None
            for what the rows need, or all of them where `examples_per_gradient` is given.
        examples_per_gradient: Examples averaged into one row of the Fisher. `"auto"` makes at most 1,000 rows, or
            512 MiB of them but at least 256, of up to 8 examples, added up with random signs (32, averaged, with
            `first_order`).
        key: Shuffles the pool and draws the signs; None takes the pool in order.
        curvature: From per-example gradients to a curvature, for example
            `functools.partial(woodjax.block_fisher, block_size=128)`. Pass the same object again
            to reuse what was compiled. `"auto"` is the Fisher of the whole network, `low_rank_fisher`. None for
            criteria that see no data, such as magnitude.
        stream: Hand the curvature a `GradientStream` instead of gradients that are held: for example to
            `functools.partial(woodjax.empirical_fisher, memory_budget=2**30)`.
        criterion: From parameters and curvature to scores, `criterion(params, curvature)`; without curvature
            `criterion(params)`, with `first_order` `criterion(params, curvature, mean_gradient)`. None takes
            `obs_scores`, `magnitude_scores`, `woodtaylor_scores`.
        first_order: Take the mean gradient into scores and updates: for a network that is not at a minimum, and to
            descend on the examples while pruning. That is training on their labels, and can pass the dense network;
            compare it with nothing that does not do the same.
        pattern: Which weights go together: `NM(2, 4)`, `Block(4)`, `Rows()`, `Filters()`, as in `pattern_masks`, groups
            chosen by their exact joint cost. N:M takes one weight more of each group in every stage.
        floor: Every leaf keeps at least this fraction of its weights, or groups.
        scope: As in `make_masks`.
        masks: Masks of an earlier pruning: what they pruned stays pruned.
        batch_axes: Leading axes that stack layers, for the scopes `"leaf"` and `"erdos_renyi"`; give
            the curvature its own.
        microbatch_size: Gradient rows computed at once.
        measure_loss: Measure the loss over the stage's examples before and after it: two forward passes.
        check: Look for dropout, train-mode batch normalisation and impure losses first.
        on_broken: What to do, outside `jit`, where scores or updates are not finite: `"raise"`, or `"keep"`, which is
            what happens under `jit`: the leaf keeps its masks and weights, and `info.nonfinite` says so. Costs of the
            groups of a pattern that are not finite raise in either case.
        on_stage: Called on the host with the network after each stage: for progress and
            checkpoints.
        resume: What `on_stage` was handed after the last stage of a run that was stopped. With the arguments of that
            run it goes on to the same bits; stages, rows and shapes are compared, other arguments are not.
            `StageCheckpoints` keeps it on disk.

    Returns:
        Pruned parameters (pruned weights are exactly zero), masks, and what was done.

    Raises:
        ValueError: `first_order` with nothing held out that keeps it in bounds; bad sparsity, stages, batch, loss or
            masks; scores or updates that are not finite (outside `jit`), naming the leaves; `resume` with other stages,
            rows or shapes.

    Cost:
        For each stage a backward pass for each of its examples (up to 8,000), flops and memory of the curvature (for
        the default `2m·d` floats at the peak and about `3.5m²d` flops, `m` up to 1,000 rows; see `woodjax.estimate`),
        and up to 9 forward passes over the held-out examples.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340); Frantar et al., M-FAC, 2021
        (arXiv 2107.03356), section 4 (recomputation); Benbaki et al., CHITA, 2023 (arXiv 2302.14623), sections 3.4
        (stages) and 3.1 (the first-order term).

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda p, xy: (xy[0] @ p["w"][:, 0] - xy[1]) ** 2
        >>> x = jnp.array([[1.0, 1.1], [2.0, 1.9], [3.0, 3.2]])
        >>> params, masks, info = wj.prune_one_shot(loss, {"w": jnp.array([[1.0], [0.5]])}, (x, x.sum(1)), 0.5)
        >>> masks["w"].tolist(), float(info.sparsity[-1])
        ([[True], [False]], 0.5)
    """
    target = _check_target(sparsity, pattern, curvature)
    check_floating(params)
    size = batch_size(batch)
    placement = placement_of(params, batch)
    if masks is None:
        masks = all_true(params, placement)
    check_like(masks, params, "masks")
    given = params
    search = None if curvature is None else choose_search(method, damping_multiples, step, first_order=first_order)
    plan = choose_plan(
        target,
        size,
        sum(w.size for w in jax.tree.leaves(params)),
        stages=stages,
        examples_per_stage=examples_per_stage,
        examples_per_gradient=examples_per_gradient,
        held_out=held_out,
        searching=search is not None and not search.is_fixed,
        first_order=first_order,
        reached=_lost(masks),
        devices=1 if placement is None else placement.size(placement.batch),
    )
    check_stages(plan.stages, path)
    if search is not None and not plan.held_out:
        if first_order and "auto" in (damping_multiples, step):
            raise ValueError(
                f"first_order needs held-out examples to keep its steps in bounds, and none of {size} is left aside: "
                "pass 40 examples or more, or held_out=; or fix damping_multiples and step by hand."
            )
        search = search.narrowed()
    if curvature == "auto":
        curvature = low_rank_fisher
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    order = jnp.arange(size) if key is None else jax.random.permutation(key, size)
    signed = examples_per_gradient == "auto" and not first_order
    signs = jax.random.fold_in(jax.random.key(0) if key is None else key, size)
    row_loss = LossRow(loss_fn, False)

    def take(indices: Int[Array, " k"]) -> Batch:
        return take_examples(batch, order[indices], placement)

    def examples_of(number: int) -> Batch:
        return take((jnp.arange(plan.examples) + number * plan.examples) % (size - plan.held_out))

    def rows_at(number: int, params: Params, masks: Masks) -> Gradients | GradientStream | None:
        if curvature is None:
            return None
        rows = stream_gradients(
            loss_fn,
            params,
            examples_of(number),
            masks=masks,  # what was pruned before leaves the problem
            microbatch_size=microbatch_size or plan.examples,
            examples_per_gradient=plan.examples_per_gradient,
            signs=jax.random.fold_in(signs, number) if signed else None,
            check=check and number == 0,
        )
        return rows if stream else rows.collect()

    def loss(params: Params, number: int) -> Float[Array, ""]:
        if not measure_loss:
            return jnp.full((), jnp.nan)
        return jnp.mean(example_losses(params, examples_of(number), row_loss, microbatch_size=microbatch_size))

    aside = take(size - 1 - jnp.arange(plan.held_out)) if plan.held_out else None

    def held_out_losses(params: Params) -> Float[Array, " n"]:
        return example_losses(params, aside, row_loss, microbatch_size=microbatch_size)

    infos: list[OneShotInfo] = []
    initial = None
    if resume is not None:
        _check_resume(resume, params, plan)
        params, masks, infos, initial = resume.params, resume.masks, list(resume.infos), resume.initial
    done_before, before = len(infos), params
    stages_done = prune_stages(
        params,
        masks,
        rows_at,
        sparsity,
        stages=plan.stages,
        path=path,
        curvature=curvature,
        criterion=criterion,
        method=search.methods[0] if search else None,
        search=None if search == PLAIN else search,
        held_out_losses=held_out_losses if plan.held_out else None,
        pattern=pattern,
        floor=floor,
        scope=scope,
        batch_axes=batch_axes,
        first_order=first_order,
        gradient_scale=1 / plan.examples_per_gradient,
        strict=on_broken == "raise",
        done=done_before,
        initial=initial,
    )
    for number, (params, masks, done, initial) in enumerate(stages_done, done_before):
        if on_broken == "raise" and not isinstance(done.nonfinite, jax.core.Tracer) and done.nonfinite.any():
            bad = [name for name, broken in zip(names, done.nonfinite, strict=True) if broken]
            raise ValueError(
                f"Stage {number + 1} of {plan.stages}: updates of {bad} are not finite. Look for NaN in the parameters "
                "and the batch, or raise the damping of the curvature."
            )
        done = done._replace(
            predicted_loss_change=done.predicted_loss_change * (1 if signed else plan.examples_per_gradient)
        )
        info = OneShotInfo(
            **done._asdict(),
            loss_before=loss(before, number),
            loss_after=loss(params, number),
            rows=jnp.asarray(plan.rows),
            examples_per_gradient=jnp.asarray(plan.examples_per_gradient),
            held_out=jnp.asarray(plan.held_out),
        )
        infos.append(info)
        before = params
        if on_stage is not None:
            on_stage(Stage(params, masks, info, tuple(infos), initial, plan.stages))
    params, masks = placed_like((params, masks), (given, given))
    return params, masks, jax.tree.map(lambda *fields: jnp.stack(fields), *infos)


def _lost(masks: Masks) -> float | Array:
    # Sparsity over all kernels: which of them count is known only when they are scored.
    leaves = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask) >= 2]
    size = sum(mask.size for mask in leaves)
    return 1 - sum(jnp.sum(mask).astype(jnp.float32) for mask in leaves) / size if size else 0.0


def _check_resume(stage: Stage, params: Params, plan: Plan) -> None:
    check_like(stage.params, params, "resume.params")
    check_like(stage.masks, params, "resume.masks")
    if not stage.infos or stage.stages is None:
        raise ValueError("resume holds no stage that is done: pass what on_stage was handed.")
    last = stage.infos[-1]
    then = Plan(stage.stages, *(int(n) for n in (last.rows, last.examples_per_gradient, last.held_out)))
    if then != plan:
        raise ValueError(f"resume is of a run with {then}, and this one has {plan}: pass the arguments of that run.")


def _check_target(sparsity: Sparsity | None, pattern: Pattern | None, curvature: object) -> Sparsity | NM:
    if pattern is not None and curvature is None:
        raise ValueError(f"{pattern} needs the joint cost of groups: pass a curvature, or leave curvature out.")
    if isinstance(pattern, NM):
        if sparsity is not None:
            raise ValueError(f"sparsity is {sparsity}: {pattern} fixes it, leave it out.")
        return pattern
    if sparsity is None:
        raise ValueError("sparsity is missing: pass the fraction to prune, between 0 and 1.")
    check_sparsity(sparsity)
    return sparsity
