"""Least squares for the kernels that read: what they wrote from all channels, as well as it can be had from the rest.

A kernel `W` that reads inputs `x` becomes the one that writes nearly the same from the inputs that stay,
`min_Δ E‖xᵀW − x_Kᵀ(W_K + Δ)‖²`: Optimal Brain Surgeon with the layer's own Hessian `2E[xxᵀ]`. It needs neither labels
nor gradients, and one system for all outputs of a kernel, since they lose the same inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax import linalg
from woodjax.door import checked
from woodjax.loss_rows import batch_size
from woodjax.structured.channels import ChannelGroups, Kept, stay_along
from woodjax.structured.matching import match
from woodjax.structured.plan import make_plan
from woodjax.structured.recording import Reader, record_readers
from woodjax.typing import ApplyFn, Batch, Params, Updates


class InputMoments(NamedTuple):
    """Second moments of what kernels read. Made by `input_moments`."""

    readers: dict[str, Reader]  # by the path of the kernel
    moments: dict[str, Float[Array, "f f"]]  # E[xxᵀ], summed over the places that a kernel is moved to
    count: int  # examples


@checked
def input_moments(
    groups: ChannelGroups, apply_fn: ApplyFn, params: Params, inputs: Batch, *, microbatch_size: int = 64
) -> InputMoments:
    """Second moments of the inputs of every kernel that reads channels: from one pass, for any number of prunings.

    Args:
        groups: From `channel_groups`.
        apply_fn: `apply_fn(params, inputs)`, eval mode.
        params: The parameters, or all variables.
        inputs: Inputs without labels, `[n, ...]`: a few hundred images, for each place of a convolution is a row.
        microbatch_size: Inputs computed at once.

    Returns:
        Moments by the path of the kernel. Kernels that are used twice, inside a loop, transposed, or in a grouped
        convolution have none: they are left as they are.

    Raises:
        ValueError: Inputs of different or zero length; `microbatch_size < 1`; moments that are not finite.

    Cost:
        `n` forward passes and `2n · places · f²` flops a kernel of `f` inputs; memory `Σ f²` and the patches of a
        micro-batch.

    References:
        He, Zhang & Sun, Channel Pruning, 2017 (arXiv 1707.06168), section 3.1.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.ones((2, 1))}
        >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> wj.input_moments(groups, apply_fn, params, jnp.ones((4, 1))).moments["b"].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    size = batch_size(inputs)
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1.")
    readers: dict[str, Reader] = {}

    @jax.jit
    def moments_of(params: Params, chunk: Batch) -> dict[str, Float[Array, "f f"]]:
        found = record_readers(groups, apply_fn, params, chunk)
        readers.update({path: reader for path, (reader, _) in found.items()})
        rows = {path: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for path, (_, x) in found.items()}
        return {path: linalg.contract("ri,rj->ij", x, x) for path, x in rows.items()}

    total: dict[str, Float[Array, "f f"]] = {}
    for start in range(0, size, microbatch_size):
        chunk = jax.tree.map(lambda x, start=start: jnp.asarray(x)[start : start + microbatch_size], inputs)
        found = moments_of(params, chunk)
        total = found if not total else jax.tree.map(jnp.add, total, found)
    _check_finite(total, "the moment", "look for NaN and infinities in inputs and params")
    return InputMoments(readers, jax.tree.map(lambda moment: moment / size, total), size)


@checked
def reconstruct_channels(
    groups: ChannelGroups, params: Params, kept: Kept, moments: InputMoments, *, damping: float = 1e-3
) -> Updates:
    """Update that removes channels and refits, by least squares, the kernels that read them.

    Args:
        groups: From `channel_groups`.
        params: The parameters that the moments were taken at.
        kept: Which channels stay.
        moments: From `input_moments`.
        damping: Ridge towards the weights as they are, as a fraction of the mean square of an input; positive.

    Returns:
        Updates `δ` for `optax.apply_updates`: exactly `−w` on all weights of removed channels, 0 on kernels that
        lose no input.

    Raises:
        ValueError: As `ChannelGroups.kept_units`; damping not positive; moments of other parameters; a fit that is
            not finite (outside `jit`).

    Cost:
        `f³/3 + 2f²o` flops for each kernel `[f, o]` that loses inputs.

    References:
        He, Zhang & Sun, Channel Pruning, 2017 (arXiv 1707.06168), equation 1; Luo et al., ThiNet, 2017
        (arXiv 1707.06342), section 3.2; as a group OBS: Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580).

    Example:
        >>> import jax.numpy as jnp, numpy as np, optax, woodjax as wj
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.ones((2, 1))}
        >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
        >>> groups = wj.channel_groups(apply_fn, params, jnp.ones((1, 1)))
        >>> moments = wj.input_moments(groups, apply_fn, params, jnp.ones((4, 1)))
        >>> kept = {"a": np.array([False, True])}
        >>> updates = wj.reconstruct_channels(groups, params, kept, moments)  # 1·1 + 2·1 = 2·1.5
        >>> optax.apply_updates(params, updates)["b"].round(2).tolist()
        [[0.0], [1.5]]
    """
    if not damping > 0:
        raise ValueError(f"damping is {damping}: pass a positive fraction, such as 1e-3.")
    units = groups.kept_units(kept)
    masks = make_plan(groups, kept).masks(params)
    found = match(groups.leaves, params)
    if lost := sorted({leaf.path for leaf in groups.leaves} - {leaf.path for leaf, _, _ in found if leaf}):
        raise ValueError(f"params lack leaves {lost} that the groups go through: pass those of channel_groups.")
    if lost := sorted(set(moments.moments) - {path for _, path, _ in found}):
        raise ValueError(f"moments are of kernels {lost}, which params lack: take them at these parameters.")
    updates, fits = [], {}
    for (leaf, path, w), mask in zip(found, jax.tree.leaves(masks), strict=True):
        step = jnp.zeros_like(w)
        if path in moments.moments and leaf is not None:
            reader = moments.readers[path]
            stay = stay_along((factor for axis in reader.axes for factor in leaf.axes[axis]), units)
            if not stay.all():
                fits[path] = _refit(moments.moments[path], reader.to_matrix(w), stay, damping)
                step = reader.to_leaf(fits[path], w)
        updates.append(jnp.where(mask, step, -w))
    _check_finite(fits, "the refit", "look for NaN in params, or raise damping")
    return jax.tree.unflatten(jax.tree.structure(params), updates)


def _check_finite(arrays: dict[str, Float[Array, "..."]], what: str, mend: str) -> None:
    finite = {path: jnp.all(jnp.isfinite(array)) for path, array in arrays.items()}
    if any(isinstance(value, jax.core.Tracer) for value in finite.values()):
        return
    if lost := [path for path, value in jax.device_get(finite).items() if not value]:
        raise ValueError(f"Of kernels {lost} {what} is not finite: {mend}.")


@jax.jit
def _refit(
    moment: Float[Array, "f f"], kernel: Float[Array, "f o"], stay: Bool[Array, " f"], damping: float
) -> Float[Array, "f o"]:
    kernel = kernel.astype(moment.dtype)
    ridge = damping * jnp.sum(jnp.where(stay, jnp.diagonal(moment), 0)) / jnp.sum(stay)
    ridge = jnp.where(ridge > 0, ridge, 1)  # nothing but zeros goes in
    both = stay[:, None] & stay[None, :]
    system = jnp.where(both, moment, 0) + jnp.diag(jnp.where(stay, ridge, 1))
    lost = linalg.contract("fg,go->fo", moment, jnp.where(stay[:, None], 0, kernel))
    factor = jnp.linalg.cholesky(system)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.where(stay[:, None], lost, 0))
