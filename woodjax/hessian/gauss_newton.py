"""The Gauss–Newton diagonal of softmax cross-entropy."""

import jax
import jax.numpy as jnp

from woodjax.door import checked
from woodjax.gradients import AllClassRows, check_apply
from woodjax.loss_rows import LossRow, batch_size
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import check_floating
from woodjax.typing import ApplyFn, Batch, Params


@checked
@on_any_axes
def gauss_newton_diagonal(
    apply_fn: ApplyFn, params: Params, inputs: Batch, *, microbatch_size: int = 16, check: bool = True
) -> Params:
    """Diagonal of the Gauss–Newton matrix of the mean softmax cross-entropy, without variance and without labels.

    `Σ_c p_c J_c² − (Σ_c p_c J_c)²` with `J` the Jacobian of the logits, summed as `Σ_c p_c (J_c − Σ_k p_k J_k)²`,
    which does not cancel. It is the exact Fisher's diagonal, and `diag(H)` itself where the network is piecewise
    linear in each single weight: ReLUs, max-pooling, batch normalisation in eval mode, no weight used twice. With
    smooth activations (GELU) or layer normalisation it leaves out the mean of `Σ_c (p_c − y_c) ∂²f_c/∂w²`: a positive
    semidefinite approximation of a diagonal that may be negative. For logits at a temperature pass an `apply_fn` that
    divides by it.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        inputs: Inputs without labels, `[n, ...]`.
        microbatch_size: Inputs computed at once.
        check: Look for dropout, train-mode batch normalisation and impure networks first.

    Returns:
        A params-tree, at least float32, not negative, without damping.

    Raises:
        ValueError: Inputs of different or zero length; logits not `[n, C]`; `microbatch_size < 1`; whatever
            `check_loss` finds.

    Cost:
        `n` forward and `n·C` backward passes; memory `microbatch_size · C · d`.

    References:
        Schraudolph 2002 (Gauss–Newton for matching losses); Martens 2014 (arXiv 1412.1193), section 9; the equality
        with `diag(H)`: Botev, Ritter & Barber 2017 (arXiv 1706.03662), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.gauss_newton_diagonal(lambda w, x: x @ w, jnp.zeros((1, 2)), jnp.array([[2.0]])).tolist()  # x² p(1 − p)
        [[1.0, 1.0]]
    """
    check_floating(params)
    n = batch_size(inputs)
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}: pass at least 1.")
    if check:
        check_apply(apply_fn, params, inputs)
    params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
    stream = GradientStream(params, inputs, None, None, LossRow(apply_fn, False), microbatch_size, 1)
    return jax.tree.map(lambda total: total / n, stream.squares(AllClassRows(apply_fn)))
