"""Updates: how the surviving weights move to make up for the pruned ones.

| method | step | |
|---|---|---|
| `"joint"` | `−H⁻¹_{:Q}([H⁻¹]_QQ)⁻¹w_Q` | exact minimiser of the quadratic model, all of `Q` at once |
| `"sum"` | `Σ_q −(w_q/[H⁻¹]_qq) H⁻¹e_q` | WoodFisher's sum of single-weight updates |
"""

from typing import Literal

import jax
import jax.numpy as jnp

from woodjax.curvature import Curvature
from woodjax.door import checked
from woodjax.placement import on_any_axes
from woodjax.tree import check_bool, check_floating, check_like
from woodjax.typing import Masks, Params, Updates

Method = Literal["joint", "sum"]


@checked
@on_any_axes
def compensate(
    params: Params,
    masks: Masks,
    curvature: Curvature,
    *,
    method: Method = "joint",
    gradient: Params | None = None,
) -> Updates:
    """Update that removes the pruned weights and moves the others by the curvature.

    Args:
        params: A params-tree of floating leaves.
        masks: A params-tree of bool, True = survives.
        curvature: Stands for `H`.
        method: `"joint"`, the exact constrained minimiser, or `"sum"`, the sum of single-weight
            Optimal Brain Surgeon updates.
        gradient: Mean gradient `ḡ` for a network that is not at a minimum, of the same scale as
            the rows that `H` was made from; None leaves the first-order term out.

    Returns:
        Updates `δ` for `optax.apply_updates`: exactly `−w` on pruned weights, so that they
        become exactly zero; 0 on leaves that are not prunable; in the dtype of the leaf.

    Raises:
        ValueError: Unknown method; masks that are not bool or not shaped like `params`.

    Cost:
        `"joint"`: `curvature.compensate`. `"sum"`: one diagonal and one `curvature.solve` (two
        with a gradient).

    References:
        Hassibi & Stork 1992, equation 5; Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340),
        section 4 (`"sum"`); Kurtić et al., oBERT, 2022 (arXiv 2203.07259), equation 5 (`"joint"`).

    Example:
        >>> import jax.numpy as jnp, optax, woodjax as wj
        >>> params = {"w": jnp.array([[2.0, 1.0]])}
        >>> fisher = wj.block_fisher({"w": jnp.array([[[1.0, 1.0]]])}, damping=1.0)  # H = [[2, 1], [1, 2]]
        >>> updates = wj.compensate(params, {"w": jnp.array([[True, False]])}, fisher)
        >>> optax.apply_updates(params, updates)["w"].round(3).tolist()  # 2 + 1 · 1/2
        [[2.5, 0.0]]
    """
    check_floating(params)
    check_like(masks, params, "masks")
    check_bool(masks, "masks")
    if gradient is not None:
        check_like(gradient, params, "gradient")
    if method == "joint":
        steps = curvature.compensate(params, masks, gradient)
    elif method == "sum":
        steps = _sum_of_single_steps(params, masks, curvature, gradient)
    else:
        raise ValueError(f"method is {method!r}: choose 'joint' or 'sum'.")
    return jax.tree.map(
        lambda w, mask, step: jnp.where(mask, step.astype(jnp.result_type(w)), -w), params, masks, steps
    )


def _sum_of_single_steps(params: Params, masks: Masks, curvature: Curvature, gradient: Params | None) -> Updates:
    newton = jax.tree.map(jnp.zeros_like, params) if gradient is None else curvature.solve(gradient)
    multipliers = jax.tree.map(
        lambda w, h, d, mask: jnp.where(mask | (d == 0), 0, (w - h) / jnp.where(d == 0, 1, d)),
        params,
        newton,
        curvature.inverse_diagonal(),
        masks,
    )
    return jax.tree.map(lambda h, step: -h - step, newton, curvature.solve(multipliers))
