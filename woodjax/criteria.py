"""Scores: an estimate of what each weight is worth. Low = prune first.

Wherever the method has such a meaning a score is the loss increase of removing that weight
alone. Coordinates that are held fixed score `+inf`: never pruned, never counted. A weight whose
score cannot be computed scores NaN, which `make_masks` refuses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from woodjax.curvature import Curvature
from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.tree import check_like, is_kernel, make_layout
from woodjax.typing import Params, Scores, Select


@checked
@on_any_axes
def magnitude_scores(params: Params, *, select: Select = is_kernel, batch_axes: int = 0) -> Scores:
    """Magnitude `|w|`.

    Args:
        params: A params-tree of floating leaves.
        select: Which leaves are prunable; the others score `+inf`.
        batch_axes: Leading axes that stack layers.

    Returns:
        A params-tree of scores.

    Raises:
        ValueError: No leaf selected; a leaf that is not floating, or selected and empty.

    Cost:
        `d` flops.

    References:
        Han et al. 2015 (arXiv 1506.02626).

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.magnitude_scores({"w": jnp.array([[1.0, -3.0]])})["w"].tolist()
        [[1.0, 3.0]]
    """
    layout = make_layout(params, select=select, batch_axes=batch_axes)
    scores = [
        _guard(jnp.abs(_wide(w))) if spec.selected else jnp.full(spec.shape, jnp.inf)
        for spec, w in zip(layout.leaves, layout.flatten(params), strict=True)
    ]
    return jax.tree.unflatten(layout.treedef, scores)


@checked
def obd_scores(params: Params, diagonal: Params) -> Scores:
    """Optimal Brain Damage: `½ h_q w_q²`, the loss increase if the Hessian were diagonal.

    Args:
        params: A params-tree of floating leaves.
        diagonal: Diagonal of a Hessian approximation `h`, for example
            `DiagonalFisher.diagonal()`; `+inf` where a coordinate is held fixed.

    Returns:
        A params-tree of scores.

    Raises:
        ValueError: The two trees differ.

    Cost:
        `3d` flops.

    References:
        LeCun, Denker & Solla, Optimal Brain Damage, 1989, equation 5.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.obd_scores(jnp.array([2.0]), jnp.array([3.0])).tolist()
        [6.0]
    """
    check_like(diagonal, params, "diagonal")
    return jax.tree.map(
        lambda w, h: jnp.where(jnp.isposinf(h), jnp.inf, _guard(0.5 * h * _wide(w) ** 2)), params, diagonal
    )


@checked
@on_any_axes
def obs_scores(params: Params, curvature: Curvature) -> Scores:
    """Optimal Brain Surgeon: `w_q² / (2 [H⁻¹]_qq)`, the loss increase after the others moved.

    Args:
        params: A params-tree of floating leaves.
        curvature: Stands for `H`.

    Returns:
        A params-tree of scores, in units of the loss.

    Raises:
        ValueError: `params` differs from the tree that the curvature was made for.

    Cost:
        One `curvature.inverse_diagonal` and `3d` flops.

    References:
        Hassibi & Stork, Optimal Brain Surgeon, 1992, equation 5; Singh & Alistarh, WoodFisher,
        2020 (arXiv 2004.14340), equation 9.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.diagonal_fisher({"w": jnp.array([[[1.0, 3.0]]])}, damping=1.0)  # H = diag(2, 10)
        >>> wj.obs_scores({"w": jnp.array([[2.0, 2.0]])}, fisher)["w"].round(3).tolist()
        [[4.0, 20.0]]
    """
    return _surgeon(params, curvature.inverse_diagonal())


@checked
@on_any_axes
def woodtaylor_scores(params: Params, curvature: Curvature, gradient: Params) -> Scores:
    """WoodTaylor: `(w_q − [H⁻¹ḡ]_q)² / (2 [H⁻¹]_qq)`, for networks that are not at a minimum.

    The change that is common to all weights, `−½ ḡᵀH⁻¹ḡ` of the Newton step, is left out: it
    does not change the order.

    Args:
        params: A params-tree of floating leaves.
        curvature: Stands for `H`.
        gradient: Mean gradient `ḡ`, of the same scale as the rows that `H` was made from.

    Returns:
        A params-tree of scores, in units of the loss, up to that constant.

    Raises:
        ValueError: Trees that differ.

    Cost:
        One `curvature.inverse_diagonal`, one `curvature.solve`, `4d` flops.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), section 5 and appendix S4.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.diagonal_fisher({"w": jnp.array([[[1.0, 3.0]]])}, damping=1.0)  # H = diag(2, 10)
        >>> weights, gradient = {"w": jnp.array([[1.0, 1.0]])}, {"w": jnp.array([[2.0, 0.0]])}
        >>> wj.woodtaylor_scores(weights, fisher, gradient)["w"].round(3).tolist()  # ḡ takes the first one to 0
        [[0.0, 5.0]]
    """
    check_like(gradient, params, "gradient")
    target = jax.tree.map(lambda w, h: _wide(w) - h, params, curvature.solve(gradient))
    return _surgeon(target, curvature.inverse_diagonal())


@jax.jit
def _surgeon(target: Params, inverse_diagonal: Params) -> Scores:
    check_like(inverse_diagonal, target, "params and curvature disagree: the curvature's tree")
    return jax.tree.map(
        lambda w, d: jnp.where(d == 0, jnp.inf, _guard(_wide(w) ** 2 / (2 * d))), target, inverse_diagonal
    )


def _wide(w: Float[Array, "..."]) -> Float[Array, "..."]:
    w = jnp.asarray(w)
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _guard(score: Float[Array, "..."]) -> Float[Array, "..."]:
    # +inf means "never prune": an overflow must not be taken for it.
    return jnp.where(jnp.isfinite(score), score, jnp.nan)
