"""Search for a better mask of the same size on the quadratic model.

Single scores do not see that two weights do the same work: both look dispensable, or both look needed. Two
searches start from any mask and keep the best one seen: iterative hard thresholding, which moves many weights
cheaply, and exchanges of pruned for kept weights around the exact solution, which end where no exchange of the
most promising ones helps.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from woodjax.curvature import LowRankFisher
from woodjax.door import checked
from woodjax.moves import Quadratic, hard_threshold, try_in_rounds
from woodjax.placement import on_any_axes
from woodjax.tree import check_bool, check_like
from woodjax.typing import Masks, Params


class SearchInfo(NamedTuple):
    """What `search_masks` did. Made by it."""

    quadratic: Float[Array, " rounds"]  # of the mask held: at the start, after thresholding, after each round of swaps
    swaps: Int[Array, " swaps"]  # pairs exchanged in each round; 0 where the trial was no better
    thresholded: Int[Array, ""]  # steps of hard thresholding taken
    moved: Int[Array, ""]  # weights that survive now and did not at the start


@checked
@on_any_axes
def search_masks(
    params: Params,
    masks: Masks,
    curvature: LowRankFisher,
    *,
    gradient: Params | None = None,
    iterations: int = 0,
    swaps: int = 20,
    previous: Masks | None = None,
    protected: Masks | None = None,
) -> tuple[Masks, SearchInfo]:
    """Improve masks on the quadratic model `ḡᵀδ + ½δᵀHδ`, `δ_Q = −w_Q`; as many weights survive as before.

    First `iterations` steps of hard thresholding from the masked weights, then `swaps` rounds that exchange the
    cheapest survivors for the best pruned weights, priced at the exact solution: many at once while that helps,
    half as many when it does not, the last 64 by the exact price of every pair. What is no better after the exact
    joint update is thrown away, so that the quadratic never rises, however early the search is stopped.

    Args:
        params: A params-tree of floating leaves, not pruned yet.
        masks: Masks to start from, True = survives, for example those of `make_masks`.
        curvature: Stands for `H`; of the whole network or in blocks.
        gradient: Mean gradient `ḡ` for a network that is not at a minimum; None leaves it out.
        iterations: Most steps of hard thresholding; 0 for none. From a mask of good scores swaps alone reached the
            same quadratic in less time; it is for starts that are far off, and for comparison with CHITA.
        swaps: Most rounds of swaps; 0 for none. The search ends earlier where none helps.
        previous: Masks of an earlier step: what they pruned never returns.
        protected: True on single weights that must survive (those whose score was `+inf` on a prunable leaf).

    Returns:
        Masks with the same number of survivors, and what was done. The update that belongs to them is
        `compensate(params, masks, curvature, gradient=gradient)`.

    Raises:
        ValueError: A curvature that is no `LowRankFisher`; negative `iterations` or `swaps`; trees that differ or
            masks that are not bool; masks that keep what `previous` pruned, or prune what is `protected` (outside
            `jit`; inside it the first are pruned and the second taken back, which changes the count).

    Cost:
        A step of thresholding some products with `G`, `2m·d` flops each. A round of swaps `1.25m²k + 2m³/3 + 8m·d`
        flops for `k` survivors, and `1.25m²d` more when its trial is taken. Memory `2nb·m²` and some `[d]` beside the
        curvature.

    References:
        Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3; Yu et al., the combinatorial brain surgeon,
        2022 (arXiv 2203.04466), for swaps.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.low_rank_fisher({"w": jnp.array([[[1.0, 1.0, 0.5]]])}, damping=0.01)  # twins
        >>> params = {"w": jnp.array([[1.0, 1.0, 0.2]])}
        >>> masks = {"w": jnp.array([[False, False, True]])}
        >>> masks, info = wj.search_masks(params, masks, fisher)
        >>> int(masks["w"].sum()), bool(info.quadratic[-1] < info.quadratic[0])
        (1, True)
    """
    if not isinstance(curvature, LowRankFisher):
        raise ValueError(f"curvature is {type(curvature).__name__}: search_masks takes a LowRankFisher.")
    if iterations < 0 or swaps < 0:
        raise ValueError(f"iterations is {iterations} and swaps {swaps}: pass 0 or positive numbers.")
    check_like(masks, params, "masks")
    check_bool(masks, "masks")
    if gradient is not None:
        check_like(gradient, params, "gradient")
    ones = jax.tree.map(lambda mask: jnp.ones(jnp.shape(mask), bool), masks)
    previous = ones if previous is None else previous
    protected = jax.tree.map(jnp.logical_not, ones) if protected is None else protected
    for name, tree in (("previous", previous), ("protected", protected)):
        check_like(tree, params, name)
        check_bool(tree, name)
    returned = _disagreements(masks, previous)
    lost = _disagreements(protected, masks)
    if returned:
        raise ValueError(f"masks keep {returned} weights that previous pruned: pass previous= to make_masks too.")
    if lost:
        raise ValueError(f"masks prune {lost} weights that are protected: give them the score +inf.")
    return _search(params, masks, curvature, gradient, previous, protected, iterations=iterations, swaps=swaps)


def _disagreements(inside: Masks, outside: Masks) -> int:
    """Number of weights that are True inside and False outside; 0 where that is not known yet."""
    extra = jax.tree.map(lambda a, b: jnp.sum(jnp.asarray(a) & ~jnp.asarray(b)), inside, outside)
    total = sum(jax.tree.leaves(extra))
    return 0 if isinstance(total, jax.core.Tracer) else int(total)


@partial(jax.jit, static_argnames=("iterations", "swaps"))
def _search(
    params: Params,
    masks: Masks,
    curvature: LowRankFisher,
    gradient: Params | None,
    previous: Masks,
    protected: Masks,
    *,
    iterations: int,
    swaps: int,
) -> tuple[Masks, SearchInfo]:
    layout = curvature.layout
    allowed, fixed = layout.to_blocks(previous), layout.to_blocks(protected)  # padding is neither
    dtype = jnp.result_type(curvature.gradients, layout.to_blocks(params))
    problem = Quadratic(
        curvature.gradients,
        curvature.damping,
        layout.to_blocks(params).astype(dtype),
        None if gradient is None else layout.to_blocks(gradient).astype(dtype),
        fixed,
        allowed & ~fixed,
    )
    start = (layout.to_blocks(masks) & allowed) | fixed
    trial, taken = hard_threshold(problem, start, iterations) if iterations else (None, jnp.zeros((), jnp.int32))
    end = try_in_rounds(problem, start, trial, swaps)
    found = layout.to_tree(end.kept, fill=True)
    found = jax.tree.unflatten(
        layout.treedef,
        [
            new if spec.selected else old
            for spec, new, old in zip(layout.leaves, jax.tree.leaves(found), layout.flatten(masks), strict=True)
        ],
    )
    return found, SearchInfo(end.values, end.accepted[2:], taken, jnp.sum(end.kept & ~start))
