"""Which update to take: candidates from one curvature, chosen by the loss on examples that it has not seen.

A quadratic model says how the survivors should move, and examples that were held out say how far it can be trusted:
how much damping, which rule, how long a step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax.compensation import Method, compensate
from woodjax.curvature import Curvature, LowRankFisher, StreamedFisher
from woodjax.door import checked
from woodjax.tree import check_bool, check_floating, check_like
from woodjax.typing import Masks, Params, Updates

SMALL, LARGE = 0.005, 0.05  # falls of the loss by less are not worth following, by more need no further proof


class UpdateSearch(NamedTuple):
    """The candidates."""

    methods: tuple[Method, ...] = ("joint",)
    damping_multiples: tuple[float, ...] = (1.0,)  # of the curvature's damping, for joint updates
    steps: tuple[float, ...] = (1.0,)  # lengths of the survivors' move

    @property
    def usual(self) -> tuple[int, int]:
        """Numbers of the candidate and of the step that stand unless others are clearly better."""
        middle = len(self.damping_multiples) // 2 if self.methods[0] == "joint" else 0
        return middle, self.steps.index(1.0) if 1.0 in self.steps else 0

    def narrowed(self) -> "UpdateSearch":
        """The usual candidate alone."""
        candidate, step = self.usual
        method, multiple = self.candidates[candidate]
        return UpdateSearch((method,), (multiple,), (self.steps[step],))

    @property
    def is_fixed(self) -> bool:
        """Is there only one candidate?"""
        return len(self.methods) == len(self.damping_multiples) == len(self.steps) == 1

    @property
    def candidates(self) -> tuple[tuple[Method, float], ...]:
        """Rules, each with the damping multiples that it is tried at."""
        return tuple(
            (method, multiple)
            for method in self.methods
            for multiple in (self.damping_multiples if method == "joint" else (1.0,))
        )


class UpdateChoice(NamedTuple):
    """What was chosen, and the held-out losses that decided it."""

    joint: Bool[Array, ""]  # else the sum of single-weight updates
    damping_multiple: Float[Array, ""]
    step: Float[Array, ""]
    held_out_loss: Float[Array, ""]  # mean, of the update that was taken
    candidate_losses: Float[Array, " candidates"]  # of each rule and damping multiple at full step
    step_losses: Float[Array, " steps"]  # of the best of them at each step length


@checked
def choose_update(
    params: Params,
    masks: Masks,
    curvature: Curvature,
    gradient: Params | None,
    search: UpdateSearch,
    held_out_losses: Callable[[Params], Float[Array, " n"]] | None,
) -> tuple[Updates, UpdateChoice]:
    """Take the update that held-out examples prefer.

    First the rule and the damping, at full step; then the step length of the best. The middle one of the damping
    multiples under the first rule, and the full step, stand unless another is clearly better: by more than two
    standard errors of the difference, example by example, and by 0.5 %, or by 5 %. A choice that follows noise at
    every stage is worse than none.

    Args:
        params: A params-tree.
        masks: True = survives.
        curvature: Stands for `H`. Only a `LowRankFisher` can answer at other dampings than its own; others are asked
            at theirs.
        gradient: Mean gradient of a network that is not at a minimum, or None.
        search: The candidates.
        held_out_losses: Losses of a network at examples that the curvature was not made from; None takes the usual
            candidate and step.

    Returns:
        The update, and what was chosen. A candidate whose loss is not finite is never chosen while another one's is.

    Cost:
        One Gram matrix and a factor for each multiple, one `compensate` for each other rule, and one forward pass over
        the held-out examples for each candidate and each step.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params, masks = {"w": jnp.ones((1, 2))}, {"w": jnp.array([[True, False]])}
        >>> fisher = wj.low_rank_fisher({"w": jnp.ones((1, 1, 2))}, damping=1.0)
        >>> update, choice = wj.choose_update(params, masks, fisher, None, wj.UpdateSearch(), None)
        >>> update["w"].round(3).tolist(), bool(choice.joint)
        ([[0.5, -1.0]], True)
    """
    check_floating(params)
    check_like(masks, params, "masks")
    check_bool(masks, "masks")
    if not isinstance(curvature, LowRankFisher):
        search = search._replace(damping_multiples=(1.0,))
    if held_out_losses is None:
        search, held_out_losses = search.narrowed(), _unknown
    usual = search.usual
    # A stream runs its own compiled steps from the host.
    run = _updates_of if isinstance(curvature, StreamedFisher) else _candidate_updates
    updates, candidates = run(params, masks, curvature, gradient, search=search), search.candidates
    numbers = range(len(candidates))
    losses = jnp.stack([held_out_losses(_moved(params, _take(updates, number))) for number in numbers])
    best = _preferred(losses, usual[0])
    update = _take(updates, best)
    step_losses = jnp.stack([
        losses[best] if t == 1 else held_out_losses(_moved(params, scale(update, masks, t))) for t in search.steps
    ])
    length = _preferred(step_losses, usual[1])
    step = jnp.array(search.steps)[length]
    choice = UpdateChoice(
        joint=jnp.array([method == "joint" for method, _ in candidates])[best],
        damping_multiple=jnp.array([multiple for _, multiple in candidates])[best],
        step=step,
        held_out_loss=jnp.mean(step_losses[length]),
        candidate_losses=jnp.mean(losses, axis=1),
        step_losses=jnp.mean(step_losses, axis=1),
    )
    return scale(update, masks, step), choice


def scale(update: Updates, masks: Masks, step: Float[Array, ""] | float) -> Updates:
    """An update whose survivors go a part of the way; what is pruned goes all of it.

    Args:
        update: A params-tree of steps.
        masks: True = survives.
        step: Length of the survivors' move, 1 for the whole.

    Returns:
        A params-tree.
    """
    return jax.tree.map(lambda u, mask: jnp.where(mask, jnp.asarray(step, u.dtype) * u, u), update, masks)


def _unknown(params: Params) -> Float[Array, " 1"]:
    del params
    return jnp.full(1, jnp.nan)


def _take(updates: Updates, number: Array | int) -> Updates:
    return jax.tree.map(lambda u: u[number], updates)


def _moved(params: Params, update: Updates) -> Params:
    return jax.tree.map(jnp.add, params, update)


def _preferred(losses: Float[Array, "candidates n"], usual: int) -> Array:
    # The lowest mean, if it is clearly below the usual one's.
    mean = jnp.mean(losses, axis=1)
    best = jnp.argmin(jnp.where(jnp.isfinite(mean), mean, jnp.inf))
    gain = losses[usual] - losses[best]
    noise = jnp.std(gain) / math.sqrt(losses.shape[1])
    # One outlier has noise as large as its gain: a large fall is taken for what it is.
    size = jnp.abs(mean[usual])
    clear = jnp.mean(gain) > jnp.clip(2 * noise, SMALL * size, LARGE * size)
    return jnp.where(clear | ~jnp.isfinite(mean[usual]), best, usual)


def _updates_of(
    params: Params, masks: Masks, curvature: Curvature, gradient: Params | None, search: UpdateSearch
) -> Updates:
    parts = []
    for method in search.methods:
        if method == "joint" and isinstance(curvature, LowRankFisher):
            steps = curvature.compensate_at(params, masks, jnp.array(search.damping_multiples), gradient)
            parts.append(jax.tree.map(lambda s, w, mask: jnp.where(mask, s.astype(w.dtype), -w), steps, params, masks))
        else:
            parts.append(_single(compensate(params, masks, curvature, method=method, gradient=gradient)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _single(update: Updates) -> Updates:
    return jax.tree.map(lambda u: u[None], update)


_candidate_updates = jax.jit(_updates_of, static_argnames="search")
