"""First-order scores at initialization, and GraSP: what a weight does to the loss, or to the flow of its gradient.

With `ḡ` the gradient of the mean loss and high = keep:

| function | score | data |
|---|---|---|
| `random_scores` | a random number | none |
| `grad_norm_scores` | `|ḡ|` | examples |
| `snip_scores` | `|w ḡ|` | examples |
| `grasp_scores` | `w · Hḡ`, signed | examples |
| `synflow_scores` | `|w ∂R/∂w| / R`, `R` the sum of the outputs of the network of absolute values | none |
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from woodjax.at_init._selected import inputs_of, keep_selected, wide
from woodjax.door import checked
from woodjax.gradients import check_apply
from woodjax.hessian import hvp
from woodjax.loss_rows import LossRow, batch_size
from woodjax.stream import stream_gradients
from woodjax.tree import is_kernel
from woodjax.typing import ApplyFn, Batch, LossFn, Params, Scores, Select

MICROBATCH = 64
LARGE = 1e30  # R above this may have overflowed on the way


@checked
def random_scores(
    loss_fn: LossFn | None, params: Params, batch: Batch | None, key: Key[Array, ""], *, select: Select = is_kernel
) -> Scores:
    """Random scores: the layer budget is the same fraction everywhere, but for chance.

    Args:
        loss_fn: Of no use; stands here because every criterion at initialization is called alike.
        params: A params-tree of floating leaves.
        batch: Of no use.
        key: PRNG key.
        select: Which leaves are prunable; the others score `+inf`.

    Returns:
        A params-tree of scores in [0, 1).

    Raises:
        ValueError: No leaf selected; a selected leaf that is empty or not floating.

    Cost:
        `d` random numbers.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> wj.random_scores(None, {"w": jnp.ones((2, 3))}, None, jax.random.key(0))["w"].shape
        (2, 3)
    """
    del loss_fn, batch
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([jnp.size(w) for w in leaves])
    drawn = jnp.split(jax.random.uniform(key, (ends[-1],) if leaves else (0,)), ends[:-1])  # one program for all shapes
    shaped = [jnp.reshape(x, jnp.shape(w)) for x, w in zip(drawn, leaves, strict=True)]
    return keep_selected(params, jax.tree.unflatten(treedef, shaped), select)


@checked
def mean_gradient(
    loss_fn: LossFn, params: Params, batch: Batch, *, microbatch_size: int = MICROBATCH, check: bool = True
) -> Params:
    """Gradient of the mean loss, a micro-batch at a time.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree, at least float32.

    Raises:
        ValueError: As `stream_gradients`.

    Cost:
        `n` forward and backward passes; memory `d` and the activations of a micro-batch.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (w * x).sum() ** 2
        >>> wj.mean_gradient(loss, jnp.ones(1), jnp.array([[1.0], [3.0]])).tolist()
        [5.0]
    """
    n = batch_size(batch)
    stream = stream_gradients(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    return stream.combine(jnp.full(n, 1 / n))


@checked
def grad_norm_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    select: Select = is_kernel,
    microbatch_size: int = MICROBATCH,
    check: bool = True,
) -> Scores:
    """GradNorm: `|ḡ|`, the absolute gradient of the mean loss.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: Of no use.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores.

    Raises:
        ValueError: No leaf selected; as `stream_gradients`.

    Cost:
        `n` forward and backward passes; memory `d`.

    References:
        A baseline of arXiv 2502.11450, section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (w * x).sum()
        >>> wj.grad_norm_scores(loss, jnp.ones((1, 2)), jnp.array([[1.0, -3.0]])).tolist()
        [[1.0, 3.0]]
    """
    del key
    gradient = mean_gradient(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    return keep_selected(params, jax.tree.map(jnp.abs, gradient), select)


@checked
def snip_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    select: Select = is_kernel,
    microbatch_size: int = MICROBATCH,
    check: bool = True,
) -> Scores:
    """SNIP, connection sensitivity: `|w ḡ|`, what removing a weight does to the loss to first order.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: Of no use.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores, in units of the loss.

    Raises:
        ValueError: No leaf selected; as `stream_gradients`.

    Cost:
        `n` forward and backward passes; memory `d`.

    References:
        Lee, Ajanthan & Torr, SNIP, 2019 (arXiv 1810.02340), equation 6 (there divided by its sum); in rounds:
        de Jorge et al. 2021 (arXiv 2006.09081).

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (w * x).sum()
        >>> wj.snip_scores(loss, jnp.array([[4.0, 1.0]]), jnp.array([[1.0, -3.0]])).tolist()
        [[4.0, 3.0]]
    """
    del key
    gradient = mean_gradient(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    return keep_selected(params, jax.tree.map(lambda w, g: jnp.abs(wide(w) * g), params, gradient), select)


@checked
def grasp_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    select: Select = is_kernel,
    microbatch_size: int = MICROBATCH,
    check: bool = True,
) -> Scores:
    """GraSP: `w · Hḡ`. Removing a weight changes `½ ‖ḡ‖²`, the flow of gradient, by the negative of it.

    The paper removes the LARGEST `−w · Hḡ`; here, as everywhere, the lowest score goes, which is the same. `ḡ` is
    that of the selected leaves alone: the flow through the others is not what is pruned.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode. The paper divides logits by 200:
            `cross_entropy(apply_fn, temperature=200)`.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: Of no use.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores, signed.

    Raises:
        ValueError: No leaf selected; as `stream_gradients`.

    Cost:
        One gradient and one Hessian-vector product of every example; memory `3d`.

    References:
        Wang, Zhang & Grosse, GraSP, 2020 (arXiv 2002.07376), equation 8 and algorithm 1.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (x * w**2).sum()  # g = x w, H = diag(x)
        >>> wj.grasp_scores(loss, jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -1.0]])).tolist()
        [[9.0, 4.0]]
    """
    del key
    gradient = mean_gradient(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    flow = keep_selected(params, gradient, select, others=0.0)
    product = hvp(loss_fn, params, batch, flow, microbatch_size=min(microbatch_size, batch_size(batch)))
    return keep_selected(params, jax.tree.map(lambda w, hg: wide(w) * hg, params, product), select)


@checked
def synflow_scores(
    apply_fn: ApplyFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    select: Select = is_kernel,
    check: bool = True,
) -> Scores:
    """SynFlow: `|w ∂R/∂w| / R`, the share of a weight in the flow from an input of ones to the outputs.

    `R` is the sum of the outputs of the network with the absolute value of every parameter. Where the network is
    positively homogeneous (ReLUs, no biases, batch statistics as they begin) the shares of a layer add up to one. Where
    it takes means away (layer normalisation, batch statistics after a warm-up) scores are defined, but no flow.
    Meant for many rounds: `prune_at_init(..., criterion="synflow")` takes 100, after which no layer is empty before
    every layer must be.

    Args:
        apply_fn: `apply_fn(params, inputs) -> outputs [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        batch: `(inputs, labels)` or inputs: their shape alone counts.
        key: Of no use.
        select: Which leaves are prunable; the others score `+inf`.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores; zero where there is no flow at all.

    Raises:
        ValueError: No leaf selected; as `check_loss`; `R` above 1e30 in a network that is not homogeneous, or above
            1e65 (outside `jit`; under it scores are NaN).

    Cost:
        One forward and backward pass of one input, and three forward passes for the scale of `R`: it grows
        exponentially with depth. Above 1e30 the input is made smaller, which changes nothing in a homogeneous network.

    References:
        Tanaka, Kunin, Yamins & Ganguli, SynFlow, 2020 (arXiv 2006.05467), equation 2 and algorithm 1.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = [jnp.array([[1.0, -3.0]]), jnp.array([[1.0], [1.0]])]
        >>> apply_fn = lambda p, x: jnp.maximum(x @ p[0], 0) @ p[1]
        >>> [leaf.ravel().tolist() for leaf in wj.synflow_scores(apply_fn, params, jnp.ones((1, 1)))]
        [[0.25, 0.75], [0.25, 0.75]]
    """
    del key
    inputs = inputs_of(batch)
    if check:
        check_apply(apply_fn, params, inputs)
    ones = jax.tree.map(lambda x: jnp.ones((1, *x.shape[1:]), x.dtype), inputs)
    shares = _shares(LossRow(apply_fn, False), params, ones)
    if any(bool(jnp.any(jnp.isnan(x))) for x in jax.tree.leaves(shares) if not isinstance(x, jax.core.Tracer)):
        raise ValueError(
            "The flow R of SynFlow does not fit into float32: pass apply_fn with batch statistics as they begin "
            "(SynFlow needs no data) and zero biases, or parameters that are finite."
        )
    return keep_selected(params, shares, select)


@jax.jit
def _shares(network: LossRow, params: Params, ones: Batch) -> Params:
    positive = jax.tree.map(lambda w: jnp.abs(wide(w)), params)

    def total(p: Params, scale: Float[Array, ""] | float) -> Float[Array, ""]:
        return jnp.sum(network.loss_fn(p, jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), ones)))

    plain, small, smaller = (total(positive, scale) for scale in (1.0, 1 / LARGE, 1e-3 / LARGE))
    fits = jnp.abs(plain) < LARGE
    homogeneous = jnp.abs(small - 1e3 * smaller) <= 1e-3 * jnp.abs(small)  # then a smaller input changes no share
    root = jnp.where(fits, jnp.sqrt(jnp.abs(plain)), jnp.sqrt(jnp.abs(small)) * jnp.sqrt(LARGE))
    scale = jnp.where(fits, 1.0, 1 / root)
    # Half of the scale goes to the cotangent, or either end of a deep network would be out of range.
    value, gradient = jax.value_and_grad(lambda p: total(p, scale) / root)(positive)
    known = fits | homogeneous

    def share(w: Array, g: Array) -> Array:
        return jnp.where(known, jnp.where(plain == 0, 0, jnp.abs(w * g / value)), jnp.nan)

    return jax.tree.map(share, positive, gradient)
