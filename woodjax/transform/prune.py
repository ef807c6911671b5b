"""`prune_transform`: pruned weights stay zero through any optimizer, and more are pruned on schedule.

What is returned for a pruned weight is `−p`: `p + (−p)` is exactly zero, in bfloat16 too. So the transform has to
be the last that touches the updates: the last element of a chain, or around everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from woodjax.compensation import Method
from woodjax.door import checked_but
from woodjax.masks import Scope
from woodjax.schedules import Path, Schedule, check_stages
from woodjax.sparsities import ExactSparsity, Sparsity
from woodjax.stages import Criterion
from woodjax.transform.explicit import automatic
from woodjax.transform.refresh import from_window, without_data
from woodjax.transform.state import PruneState, RefreshInfo, clean_moments, densities, no_refresh
from woodjax.transform.window import GradientWindow, WindowState
from woodjax.tree import apply_masks, check_bool, check_like
from woodjax.typing import Masks, Params, Updates

RefreshFn = Callable[[Params, Masks, Sparsity], tuple[Params, Masks] | tuple[Params, Masks, RefreshInfo]]


@checked_but("schedule")
def prune_transform(
    inner: optax.GradientTransformation | None = None,
    *,
    schedule: Schedule | None = None,
    fisher: GradientWindow | None = None,
    criterion: Criterion | None = None,
    method: Method | None = "joint",
    first_order: bool = False,
    scope: Scope = "global",
    batch_axes: int = 0,
    recomputations: int = 1,
    path: Path = "exponential",
) -> optax.GradientTransformationExtraArgs:
    """Train with pruned weights at zero, and prune more of them on schedule.

    | who prunes | what says when and how | a step on which none is due |
    |---|---|---|
    | you, by `woodjax.refresh(params, opt_state, ...)` where `schedule.due(step)` | `refresh` | holds zeros |
    | `tx.update(grads, state, params, refresh_fn=...)` | `schedule`, `refresh_fn` | and holds the refresh's workspace |
    | you, by `woodjax.refresh(..., fisher=window)` | `refresh`, with the same `fisher=window` here | and writes a row |
    | the transform, by gradients it saw | `schedule`, `fisher=window` | that, and holds the refresh's workspace |
    | the transform, without data | `schedule`, `criterion=magnitude_scores` | holds zeros |

    Around an optimizer, `prune_transform(optax.adamw(1e-3), ...)`, gradients of pruned weights are zero
    before it sees them (for clipping and moments), and moments of weights are zeroed when they die. As the last
    element of a chain it can only hold the zeros: what is before it never hears of them.

    Args:
        inner: The optimizer to wrap; None for the last element of a chain.
        schedule: When to prune, and to what sparsity.
        fisher: A `gradient_window`. With a schedule the transform prunes by it, without one it only records the
            gradients, for a `refresh`. As the element of a chain it sees updates, not gradients: wrap the whole
            chain, or pass `grad=` to the update.
        criterion: As in `prune_one_shot`.
        method: As in `prune_one_shot`.
        first_order: As in `prune_one_shot`.
        scope: As in `make_masks`.
        batch_axes: As in `make_masks`.
        recomputations: Stages of one pruning, the curvature computed anew at each from the same gradients.
        path: Sparsities of the recomputations.

    Returns:
        A transformation whose state holds masks; `get_masks`, `set_masks` and `get_info` find it in any state.
        Its update takes two more keywords. `refresh_fn(params, masks, sparsity) -> (params, masks, info)`, for
        example a `functools.partial` of `refresh_masks`; one of your own may leave the info out, and hands the
        sparsity on to `make_masks` (`sparsity.value` is the number). `grad`: the gradients for `fisher`, where the
        updates are not: in a chain, or after a transformation that changed them. Others go to `inner`.

    Raises:
        ValueError: `criterion` without a schedule, or a schedule that is a bare function. At an update: no
            `params`; updates or `grad` not shaped like the parameters; a `refresh_fn` without a schedule, or beside
            `fisher` or `criterion`; `fisher` without gradients. Options that nobody here would use.

    Cost:
        A byte a weight for masks. Holding zeros reads masks and parameters once, in the same pass as the update.

    References:
        Zhu & Gupta 2017 (arXiv 1710.01878); Frantar et al., M-FAC, 2021 (arXiv 2107.03356), section 3.2.

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> schedule = wj.one_shot_schedule(step=0, target=0.5)
        >>> tx = wj.prune_transform(optax.sgd(0.1), schedule=schedule, criterion=wj.magnitude_scores)
        >>> params = {"w": jnp.array([[3.0, 1.0]])}
        >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, tx.init(params), params)
        >>> [round(w, 3) for w in optax.apply_updates(params, updates)["w"][0].tolist()]
        [2.9, 0.0]
    """
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is a {type(schedule).__name__}: pass a woodjax schedule, or make one of a function by "
            "woodjax.schedule_of(function, begin=, end=, every=)."
        )
    if inner is not None and not hasattr(inner, "update"):
        raise ValueError(f"inner is a {type(inner).__name__}: pass an Optax optimizer, and all else by keyword.")
    if criterion is not None and schedule is None:
        raise ValueError("criterion prunes on schedule: pass schedule=, for example cubic_schedule(...).")
    prunes = schedule is not None and (fisher is not None or criterion is not None)
    optimizer = None if inner is None else optax.with_extra_args_support(inner)
    options = {"criterion": criterion, "method": method, "scope": scope, "batch_axes": batch_axes, "path": path}
    asked = options | {"recomputations": recomputations, "first_order": first_order}
    _check_options(fisher if prunes else None, criterion, asked)
    own_refresh = None
    if fisher is not None and prunes:
        own_refresh = partial(_from_window, fisher, asked)
    elif criterion is not None:
        own_refresh = partial(_from_nothing, options | {"curvature": None, "recomputations": recomputations})

    def init_fn(params: Params) -> PruneState:
        masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
        return PruneState(
            count=jnp.zeros((), jnp.int32),
            masks=masks,
            window=() if fisher is None else fisher.init(params),
            info=no_refresh(masks),
            inner_state=() if optimizer is None else optimizer.init(params),
        )

    def update_fn(
        updates: Updates,
        state: PruneState,
        params: Params | None = None,
        *,
        grad: Params | None = None,
        refresh_fn: RefreshFn | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, PruneState]:
        if params is None:
            raise ValueError(
                "params is None: pruned weights are held at zero by -params. Call tx.update(grads, state, params)."
            )
        trees = {"updates": updates, "params": params} | ({} if grad is None else {"grad": grad})
        for name, tree in trees.items():
            check_like(tree, state.masks, name)
        if refresh_fn is not None and (prunes or schedule is None):
            raise ValueError(
                "refresh_fn prunes on schedule, and alone: "
                + ("leave out fisher and criterion." if prunes else "pass schedule= to prune_transform.")
            )
        window, inner_state = state.window, state.inner_state
        if fisher is not None:
            gradients = updates if grad is None and optimizer is not None else grad
            if gradients is None:
                raise ValueError(
                    "fisher needs gradients, and an element of a chain sees updates: wrap the whole chain, "
                    "prune_transform(optax.chain(...), fisher=...), or pass tx.update(..., grad=grads)."
                )
            window = fisher.add(window, gradients)
        if optimizer is not None:
            extra_args |= {} if grad is None else {"grad": grad}
            masked = apply_masks(updates, state.masks)
            updates, inner_state = optimizer.update(masked, inner_state, params, **extra_args)
        held, masks, info = hold(updates, params, state.masks), state.masks, state.info
        count = jnp.asarray(optax.safe_increment(state.count))
        prune = own_refresh if refresh_fn is None else lambda window, *network: refresh_fn(*network)
        if schedule is not None and prune is not None and jax.tree.leaves(masks):
            now = held, masks, info
            step = automatic(partial(_prune, prune), now)
            arguments = window, params, held, masks, _pairs(schedule.exact(state.count)), count
            held, masks, info = lax.cond(schedule.due(state.count), lambda: step(*arguments), lambda: now)
            inner_state = clean_moments(inner_state, masks)
        return held, PruneState(count, masks, window, info, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, cast(optax.TransformUpdateExtraArgsFn, update_fn))


def hold(updates: Updates, params: Params, masks: Masks) -> Updates:
    """Updates that leave pruned weights at zero: `where(mask, u, −p)`.

    Args:
        updates: A params-tree.
        params: A params-tree.
        masks: A params-tree of bool.

    Returns:
        Updates, in a dtype that holds `−p` exactly.
    """
    return jax.tree.map(lambda u, p, mask: jnp.where(mask, u, -p), updates, params, masks)


def _check_options(fisher: GradientWindow | None, criterion: Criterion | None, options: dict[str, Any]) -> None:
    defaults = {"scope": "global", "batch_axes": 0, "path": "exponential", "recomputations": 1, "first_order": False}
    defaults |= {"method": "joint"}
    if fisher is None:
        useless = [name for name, value in defaults.items() if options[name] != value]
        if criterion is not None:
            useless = [name for name in useless if name in ("first_order", "method")]
        if useless:
            raise ValueError(
                f"{useless} are of no use "
                + ("without fisher=." if criterion else "here: pass them to refresh or refresh_fn, which prune.")
            )
    check_stages(options["recomputations"], options["path"])
    if options["scope"] not in get_args(Scope):
        raise ValueError(f"scope is {options['scope']!r}: choose one of {list(get_args(Scope))}.")
    if options["method"] not in (None, *get_args(Method)):
        raise ValueError(f"method is {options['method']!r}: choose 'joint', 'sum' or None.")


def _prune(
    prune: Callable[..., Any],
    window: Any,
    params: Params,
    held: Updates,
    masks: Masks,
    sparsity: Any,
    count: Int[Array, ""],
) -> tuple[Updates, Masks, RefreshInfo]:
    # The optimizer's step, then the pruning: both as one update of the parameters.
    stepped = optax.apply_updates(params, held)
    target = sparsity if isinstance(sparsity, ExactSparsity) else {key.name: value for key, value in sparsity}
    pruned, masks, *rest = prune(window, stepped, masks, target)
    check_like(pruned, params, "refresh_fn's params")
    check_like(masks, params, "refresh_fn's masks")
    check_bool(masks, "refresh_fn's masks")
    unknown = no_refresh(masks)
    info = rest[0] if rest else unknown._replace(sparsity=jnp.full((), jnp.nan), density=densities(masks))
    info = jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype), info._replace(step=count), unknown)
    moved = hold(jax.tree.map(jnp.subtract, pruned, params), params, masks)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), moved, held), masks, info


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Key:
    name: str


def _pairs(sparsity: ExactSparsity | dict[str, ExactSparsity]) -> Any:
    # A dict would come out of a compiled function with its keys sorted, and the last pattern that matches holds.
    return [(_Key(key), value) for key, value in sparsity.items()] if isinstance(sparsity, dict) else sparsity


def _from_window(
    fisher: GradientWindow,
    options: dict[str, Any],
    window: WindowState,
    params: Params,
    masks: Masks,
    sparsity: Sparsity,
) -> tuple[Params, Masks, RefreshInfo]:
    return from_window(fisher, window, params, masks, sparsity, **options)


def _from_nothing(
    options: dict[str, Any], window: Any, params: Params, masks: Masks, sparsity: Sparsity
) -> tuple[Params, Masks, RefreshInfo]:
    del window
    return without_data(params, masks, sparsity, **options)
