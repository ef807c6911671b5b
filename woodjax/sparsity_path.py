"""A path of nested masks from dense to almost nothing, with predicted losses, from one curvature.

One pass over the data serves every sparsity: the masks of a path are nested, so that a single integer
for each weight, the level at which it goes, is all of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from woodjax.compensation import compensate
from woodjax.criteria import obs_scores
from woodjax.curvature import Curvature, LowRankFisher, predicted_loss_change
from woodjax.door import checked
from woodjax.masks import Scope, make_masks, mask_sparsity
from woodjax.placement import on_any_axes
from woodjax.sparsities import check_sparsity
from woodjax.typing import Masks, Params, PyTree, Scores


class SparsityPath(NamedTuple):
    """Nested masks, and what the quadratic model predicts for each. Made by `sparsity_path`."""

    sparsity: Float[Array, " levels"]  # reached, of the weights that count
    predicted_loss_change: Float[Array, " levels"]  # of the joint update, first-order term left out
    level: PyTree  # a params-tree of integers: first level at which a weight is gone; `levels`: never

    def masks(self, number: int) -> Masks:
        """Masks of one level, True = survives.

        Args:
            number: 0 to `levels - 1`; negative from the end.

        Returns:
            A params-tree of bool.

        Raises:
            ValueError: There is no such level.
        """
        levels = self.sparsity.shape[0]
        if not -levels <= number < levels:
            raise ValueError(f"The path has levels 0 to {levels - 1}, not {number}.")
        return jax.tree.map(lambda level: level > number % levels, self.level)


@checked
@on_any_axes
def sparsity_path(
    params: Params,
    curvature: Curvature,
    sparsities: Sequence[float] | None = None,
    *,
    criterion: Callable[[Params, Curvature], Scores] = obs_scores,
    scope: Scope = "global",
    batch_axes: int = 0,
) -> SparsityPath:
    """Masks at every sparsity from one curvature, each a subset of the one before.

    Args:
        params: A params-tree of floating leaves.
        curvature: Stands for `H`.
        sparsities: Increasing fractions; None for 0 %, 1 %, ..., 99 %.
        criterion: From parameters and curvature to scores.
        scope: As in `make_masks`; not a mapping.
        batch_axes: As in `make_masks`.

    Returns:
        The path. Prune at level `i` by `compensate(params, path.masks(i), curvature)`.

    Raises:
        ValueError: Sparsities that do not increase or are outside `[0, 1]`; scores that are not finite.

    Cost:
        For a `LowRankFisher` one Gram matrix and `2m³/3` flops a level; for others one
        `curvature.compensate` a level. The path keeps two bytes a weight.

    References:
        Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580), section 5: one trace serves every budget.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.low_rank_fisher({"w": jnp.array([[[1.0, 3.0]]])}, damping=1.0)
        >>> path = wj.sparsity_path({"w": jnp.array([[1.0, 1.0]])}, fisher, [0.0, 0.5, 1.0])
        >>> path.masks(1)["w"].tolist(), path.predicted_loss_change.round(2).tolist()
        ([[False, True]], [0.0, 0.550000011920929, 9.0])
    """
    fractions = np.arange(100) / 100 if sparsities is None else np.asarray(sparsities, float)
    if fractions.ndim != 1 or not fractions.size or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"sparsities are {sparsities}: pass fractions in increasing order, such as [0.5, 0.9].")
    for fraction in fractions:
        check_sparsity(float(fraction))
    scores = criterion(params, curvature)
    level = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.int16), params)
    reached, masks = [], None
    for fraction in fractions:
        masks = make_masks(scores, float(fraction), scope=scope, previous=masks, batch_axes=batch_axes)
        level = jax.tree.map(lambda count, mask: count + mask, level, masks)
        reached.append(mask_sparsity(masks, scores))
    path = SparsityPath(jnp.stack(reached), jnp.zeros(len(fractions)), level)
    return path._replace(predicted_loss_change=_predict(params, curvature, path))


def _predict(params: Params, curvature: Curvature, path: SparsityPath) -> Float[Array, " levels"]:
    levels = path.sparsity.shape[0]
    if isinstance(curvature, LowRankFisher):
        return _predict_low_rank(params, curvature, path.level, levels=levels)
    return jnp.stack([_predict_one(params, curvature, path.masks(number)) for number in range(levels)])


def _predict_one(params: Params, curvature: Curvature, masks: Masks) -> Float[Array, ""]:
    return predicted_loss_change(compensate(params, masks, curvature), curvature)


@partial(jax.jit, static_argnames="levels")
def _predict_low_rank(
    params: Params, curvature: LowRankFisher, level: PyTree, *, levels: int
) -> Float[Array, " levels"]:
    return curvature.path_losses(params, level, levels)
