"""A refresh: new masks from data, and survivors that move to make up for what goes.

`refresh` is called between training steps, when the schedule says so: the training step stays as fast as it is.
`refresh_masks` is the same on masks alone, for `prune_transform`'s `refresh_fn=`, inside a compiled loop.
"""

from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from woodjax.choices import FIXED
from woodjax.compensation import Method
from woodjax.curvature import low_rank_fisher
from woodjax.door import checked
from woodjax.masks import Scope
from woodjax.one_shot import OneShotInfo, prune_one_shot
from woodjax.placement import on_any_axes, placed_like
from woodjax.schedules import Path, check_stages
from woodjax.sparsities import Sparsity
from woodjax.stages import Criterion, CurvatureFn, StageInfo, prune_stages
from woodjax.transform.explicit import automatic
from woodjax.transform.state import (
    OptState,
    RefreshInfo,
    clean_moments,
    densities,
    find_state,
    no_refresh,
    replace_state,
)
from woodjax.transform.window import GradientWindow, WindowState
from woodjax.tree import apply_masks, check_like
from woodjax.typing import Batch, LossFn, Masks, Params


class RefreshOptions(TypedDict, total=False):
    """Keywords of `refresh` and `refresh_masks` that they hand to `prune_one_shot`."""

    curvature: CurvatureFn | None
    criterion: Criterion | None
    method: Method | None
    first_order: bool
    scope: Scope
    batch_axes: int
    path: Path
    stream: bool
    examples_per_stage: int | None
    key: Key[Array, ""] | None
    microbatch_size: int | None
    examples_per_gradient: int
    check: bool


@checked
@on_any_axes
def refresh(
    params: Params,
    opt_state: OptState,
    batch: Batch | None,
    sparsity: Sparsity,
    *,
    loss_fn: LossFn | None = None,
    fisher: GradientWindow | None = None,
    recomputations: int = 1,
    measure_loss: bool = False,
    **options: Unpack[RefreshOptions],
) -> tuple[Params, OptState, RefreshInfo]:
    """Prune a network in training to a sparsity: between two steps, when the schedule says so.

    Args:
        params: A params-tree: the network.
        opt_state: State of an optimizer with one `prune_transform` in it. It is not changed; what is returned shares
            buffers with it that a later donation takes along.
        batch: Examples `[n, ...]` along the first axis of every leaf; None with `fisher` or `curvature=None`.
        sparsity: As in `make_masks`: what is pruned already stays pruned, and counts.
        loss_fn: `loss_fn(params, example) -> scalar` for one example: deterministic, batch normalisation in
            eval mode. Pass the same function again to reuse what was compiled.
        fisher: The window that `prune_transform(optimizer, fisher=...)` recorded gradients in, in the place of a loss
            and examples.
        recomputations: Stages of the refresh, with the curvature computed anew at each.
        measure_loss: Measure the loss over the examples before and after: two forward passes for each
            recomputation.
        **options: `curvature`, `criterion`, `method`, `first_order`, `scope`, `batch_axes`, `path`, `stream`,
            `examples_per_stage`, `key`, `microbatch_size`, `examples_per_gradient` and `check`, all as in
            `prune_one_shot`. `curvature=None` prunes by magnitude, without data.

    Returns:
        Parameters (pruned weights exactly zero), the state with new masks, clean moments and the same info, and
        what was done. A leaf whose scores or updates are not finite keeps its mask and weights.

    Raises:
        ValueError: As `prune_one_shot`; no `PruneState` in `opt_state`; a curvature but no loss or batch; a `fisher`
            beside them, or one that recorded nothing.

    Cost:
        As `prune_one_shot` with `stages=recomputations`.

    References:
        Zhu & Gupta 2017 (arXiv 1710.01878); Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), section 5.3.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> loss = lambda p, xy: (xy[0] @ p["w"][:, 0] - xy[1]) ** 2
        >>> x = jnp.array([[1.0, 1.1], [2.0, 1.9], [3.0, 3.2]])
        >>> params, tx = {"w": jnp.array([[1.0], [0.5]])}, wj.prune_transform(optax.sgd(0.1))
        >>> params, state, info = wj.refresh(params, tx.init(params), (x, x.sum(1)), 0.5, loss_fn=loss)
        >>> wj.get_masks(state)["w"].tolist(), float(info.sparsity)
        ([[True], [False]], 0.5)
    """
    state = find_state(opt_state)

    # Arrays come as arguments: under an explicit mesh none may be closed over.
    arrays: dict[str, Any] = {"batch": batch, "key": options.pop("key", None)}
    if fisher is not None:
        if batch is not None or loss_fn is not None or measure_loss:
            raise ValueError(
                "fisher takes the gradients that were recorded: leave out batch, loss_fn and measure_loss."
            )
        if not isinstance(state.window, WindowState):
            raise ValueError("The optimizer state holds no window: pass the same fisher= to prune_transform.")
        arrays["window"] = state.window
    if isinstance(loss_fn, jax.tree_util.Partial):
        arrays["loss_fn"], loss_fn = loss_fn, None
    if isinstance(sparsity, jax.Array):
        arrays["sparsity"] = sparsity

    def run(params: Params, masks: Masks, arrays: dict[str, Any]) -> tuple[Params, Masks, RefreshInfo]:
        chosen: Any = {
            "sparsity": sparsity,
            "recomputations": recomputations,
            **options,
            **{name: value for name, value in arrays.items() if value is not None},
        }
        if fisher is not None:
            return from_window(fisher, chosen.pop("window"), params, masks, **chosen)
        return refresh_masks(params, masks, measure_loss=measure_loss, **{"loss_fn": loss_fn} | chosen)

    pruned, masks, info = automatic(run, (params, state.masks, state.info))(params, state.masks, arrays)
    info = info._replace(step=state.count)
    # No buffer twice in the state, and none that is handed out beside it: the state may be donated.
    kept = jax.tree.map(jnp.copy, info)
    new_state = clean_moments(replace_state(opt_state, lambda old: old._replace(masks=masks, info=kept)), masks)
    where = placed_like((pruned, new_state), (params, opt_state))
    return *where, info._replace(step=jnp.copy(state.count))


@checked
def refresh_masks(
    params: Params,
    masks: Masks,
    sparsity: Sparsity,
    *,
    loss_fn: LossFn | None = None,
    batch: Batch | None = None,
    recomputations: int = 1,
    measure_loss: bool = False,
    **options: Unpack[RefreshOptions],
) -> tuple[Params, Masks, RefreshInfo]:
    """`refresh` without an optimizer state: for the `refresh_fn=` of an update.

    `tx.update(grads, state, params, refresh_fn=functools.partial(wj.refresh_masks, loss_fn=loss_fn, batch=batch))`

    Args:
        params: As in `refresh`.
        masks: A params-tree of bool: what is pruned so far.
        sparsity: As in `refresh`.
        loss_fn: As in `refresh`.
        batch: As in `refresh`.
        recomputations: As in `refresh`.
        measure_loss: As in `refresh`.
        **options: As in `refresh`.

    Returns:
        Parameters, masks, and what was done, with `step` -1.

    Raises:
        ValueError: As `refresh`.

    Cost:
        As `refresh`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params, masks = {"w": jnp.array([[1.0, 3.0]])}, {"w": jnp.array([[True, True]])}
        >>> params, masks, info = wj.refresh_masks(params, masks, 0.5, curvature=None)  # by magnitude
        >>> params["w"].tolist(), masks["w"].tolist(), float(info.sparsity)
        ([[0.0, 3.0]], [[False, True]], 0.5)
    """
    check_like(masks, params, "masks")
    if options.get("curvature", low_rank_fisher) is None and batch is None:
        if measure_loss:
            raise ValueError("measure_loss needs examples: pass loss_fn and batch.")
        return without_data(params, masks, sparsity, recomputations=recomputations, **options)
    if loss_fn is None or batch is None:
        missing = "loss_fn" if loss_fn is None else "batch"
        raise ValueError(f"{missing} is None: curvature comes from a loss and examples. Without, pass curvature=None.")
    chosen: Any = {**FIXED, "stages": recomputations, **options}
    pruned, masks, info = prune_one_shot(
        loss_fn,
        params,
        batch,
        sparsity,
        masks=masks,
        measure_loss=measure_loss,
        on_broken="keep",
        **chosen,
    )
    return pruned, masks, summary(masks, info, info.loss_before[0], info.loss_after[-1])


def without_data(
    params: Params, masks: Masks, sparsity: Sparsity, *, recomputations: int = 1, **options: Any
) -> tuple[Params, Masks, RefreshInfo]:
    """A refresh by a criterion that sees no data.

    Args:
        params: As in `refresh`.
        masks: As in `refresh_masks`.
        sparsity: As in `refresh`.
        recomputations: As in `refresh`.
        **options: Those of `prune_stages`; `curvature` is None.

    Returns:
        As `refresh_masks`.

    Raises:
        ValueError: An option that needs data.
    """
    _check_needless(options, {"curvature"}, recomputations)
    return run_stages(params, masks, lambda *_: None, sparsity, stages=recomputations, **options)


def from_window(
    fisher: GradientWindow,
    window: WindowState,
    params: Params,
    masks: Masks,
    sparsity: Sparsity,
    *,
    recomputations: int = 1,
    first_order: bool = False,
    **options: Any,
) -> tuple[Params, Masks, RefreshInfo]:
    """A refresh by the gradients of a window.

    Args:
        fisher: What the window is.
        window: Its gradients.
        params: As in `refresh`.
        masks: As in `refresh_masks`.
        sparsity: As in `refresh`.
        recomputations: As in `refresh`, from the same gradients.
        first_order: As in `prune_one_shot`.
        **options: Those of `prune_stages`.

    Returns:
        As `refresh_masks`.

    Raises:
        ValueError: An option that needs data; `first_order` with a memory budget.
    """
    _check_needless(options, set(), recomputations)
    if first_order and fisher.memory_budget is not None:
        raise ValueError("first_order needs the mean gradient, which random signs cancel: leave memory_budget out.")
    rows = fisher.gradients(window, params)
    return run_stages(
        params,
        masks,
        lambda number, params, kept: apply_masks(rows, kept),  # what was pruned leaves the problem
        sparsity,
        stages=recomputations,
        curvature=fisher.curvature,
        prunable=fisher.kept(params),
        first_order=first_order,
        mean_gradient=fisher.mean_gradient(window, params) if first_order else None,
        **options,
    )


def _check_needless(options: dict[str, Any], also: set[str], recomputations: int) -> None:
    needless = sorted(set(options) - {"criterion", "method", "scope", "batch_axes", "path"} - also)
    if needless:
        raise ValueError(f"{needless} are of no use without data: pass loss_fn and batch, or leave them out.")
    check_stages(recomputations, options.get("path", "exponential"))


def run_stages(
    params: Params, masks: Masks, rows_at: Any, sparsity: Sparsity, **options: Any
) -> tuple[Params, Masks, RefreshInfo]:
    """All stages of a refresh whose loss is not measured.

    Args:
        params: As in `refresh`.
        masks: As in `refresh_masks`.
        rows_at: As in `prune_stages`.
        sparsity: As in `refresh`.
        **options: As in `prune_stages`.

    Returns:
        As `refresh_masks`.
    """
    done = list(prune_stages(params, masks, rows_at, sparsity, strict=False, **options))
    pruned, kept, *_ = done[-1]
    infos = jax.tree.map(lambda *fields: jnp.stack(fields), *[info for _, _, info, _ in done])
    return pruned, kept, summary(kept, infos, jnp.full((), jnp.nan), jnp.full((), jnp.nan))


def summary(masks: Masks, info: OneShotInfo | StageInfo, loss_before: Array, loss_after: Array) -> RefreshInfo:
    """What all stages of a refresh did.

    Args:
        masks: After the last.
        info: Fields with one entry for each stage.
        loss_before: Before the first.
        loss_after: After the last.

    Returns:
        The info of the refresh, `step` still -1.
    """
    found = RefreshInfo(
        step=jnp.full((), -1),
        sparsity=info.sparsity[-1],
        predicted_loss_change=jnp.sum(info.predicted_loss_change),
        loss_before=loss_before,
        loss_after=loss_after,
        damping=jnp.max(info.damping),
        raised=jnp.sum(info.raised),
        density=densities(masks),
        nonfinite=jnp.any(info.nonfinite, axis=0),
    )
    return jax.tree.map(lambda x, like: x.astype(like.dtype), found, no_refresh(masks))
