"""Second-order scores at initialization: three diagonals in three forms, and Optimal Brain Surgeon.

With `h` a diagonal and `ḡ` the gradient of the mean loss:

| form | score | of the Fisher | of Hutchinson |
|---|---|---|---|
| `"diagonal"` | `h` | Fisher diagonal, FD | HD |
| `"pruner"` | `½ w² h` | Fisher pruner, FP | HP |
| `"taylor"` | `|−w ḡ + ½ w² h|` | Fisher–Taylor sensitivity, FTS | HTS |

| function | `h` | variance |
|---|---|---|
| `fisher_scores` | mean of `g²` over examples | none, but of the examples |
| `hutchinson_scores` | mean of `z ⊙ Hz` over random signs | large; signed |
| `gauss_newton_scores` | `Σ_c p_c J_c² − (Σ_c p_c J_c)²`, which is `diag(H)` for networks of ReLUs | none |

Removing a weight is `δ = −w`: the first-order term of the loss is `−w ḡ`.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from woodjax.at_init._selected import inputs_of, keep_selected, wide
from woodjax.at_init.sensitivity import MICROBATCH, mean_gradient
from woodjax.criteria import obs_scores
from woodjax.curvature import low_rank_fisher
from woodjax.curvature.damping import ONE_PERCENT, Damping
from woodjax.door import checked
from woodjax.hessian import gauss_newton_diagonal, hutchinson_diagonal
from woodjax.loss_rows import batch_size
from woodjax.losses import cross_entropy
from woodjax.stream import stream_gradients
from woodjax.tree import is_kernel
from woodjax.typing import ApplyFn, Batch, LossFn, Params, Scores, Select

Form = Literal["diagonal", "pruner", "taylor"]

ROWS = 16  # per-example gradients held at once
PROBES = 10  # of the paper


@checked
def fisher_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    form: Form = "diagonal",
    select: Select = is_kernel,
    microbatch_size: int = ROWS,
    check: bool = True,
) -> Scores:
    """Scores of the diagonal empirical Fisher: FD, FP or FTS by `form`.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: Of no use.
        form: `"diagonal"`, `"pruner"` or `"taylor"`.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores.

    Raises:
        ValueError: Unknown form; no leaf selected; as `stream_gradients`.

    Cost:
        `n` forward and backward passes (twice for `"taylor"`); memory `microbatch_size · d`.

    References:
        arXiv 2502.11450, section 3; the pruner: Theis et al. 2018 (arXiv 1801.05787), equation 6.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (w * x).sum()
        >>> batch = jnp.array([[[1.0, 2.0]], [[3.0, 2.0]]])
        >>> wj.fisher_scores(loss, jnp.array([[2.0, 1.0]]), batch, form="pruner").tolist()
        [[10.0, 2.0]]
    """
    del key
    _check_form(form)
    n = batch_size(batch)
    stream = stream_gradients(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    diagonal = jax.tree.map(lambda total: total / n, stream.squares())
    return _scores(loss_fn, params, batch, diagonal, form, select)


@checked
def hutchinson_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    form: Form = "diagonal",
    probes: int = PROBES,
    select: Select = is_kernel,
    microbatch_size: int = ROWS,
    check: bool = True,
) -> Scores:
    """Scores of Hutchinson's estimate of `diag(H)`: HD, HP or HTS by `form`, signed.

    The study that proposed them takes 10 probes an example of the loss with logits over 200:
    `hutchinson_scores(cross_entropy(apply_fn, temperature=200), ...)`, with signs on every leaf, prunable or not, as in
    its released code. At initialization that is noise of the size of
    the rows of `H`, a thousand times the diagonal itself; what it does is to spread the budget over the layers. For
    the diagonal itself see `gauss_newton_scores`.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: PRNG key.
        form: `"diagonal"`, `"pruner"` or `"taylor"`.
        probes: Random signs drawn for every example, at least 2.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores; with negative ones, unless the form is `"taylor"`: those go first.

    Raises:
        ValueError: Unknown form; `probes < 2`; no leaf selected; as `per_example_gradients`.

    Cost:
        `probes` Hessian-vector products of every example, each about four gradients; memory `microbatch_size · d`.

    References:
        arXiv 2502.11450, section 3.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x * w**2).sum()  # nothing off the diagonal: no variance
        >>> batch = jnp.array([[[1.0, -2.0]]])
        >>> wj.hutchinson_scores(loss, jnp.array([[1.0, 1.0]]), batch, jax.random.key(0)).tolist()
        [[2.0, -4.0]]
    """
    _check_form(form)
    diagonal = hutchinson_diagonal(
        loss_fn, params, batch, key, probes=probes, signs="example", microbatch_size=microbatch_size, check=check
    ).diagonal
    return _scores(loss_fn, params, batch, diagonal, form, select)


@checked
def gauss_newton_scores(
    apply_fn: ApplyFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    form: Form = "diagonal",
    select: Select = is_kernel,
    microbatch_size: int = ROWS,
    check: bool = True,
) -> Scores:
    """Scores of the exact Gauss–Newton diagonal of softmax cross-entropy: HD, HP or HTS without variance.

    For networks of ReLUs, max-pooling and eval-mode batch normalisation it is `diag(H)`. Never negative.

    Args:
        apply_fn: `apply_fn(params, inputs) -> logits [n, C]`, eval mode.
        params: A params-tree of floating leaves.
        batch: `(inputs, integer labels)`; inputs alone where the form is not `"taylor"`.
        key: Of no use.
        form: `"diagonal"`, `"pruner"` or `"taylor"`.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Inputs computed at once; each holds `C` gradients.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores.

    Raises:
        ValueError: Unknown form; `"taylor"` without labels; logits not `[n, C]`; no leaf selected; as `check_loss`.

    Cost:
        `n` forward and `n·C` backward passes; memory `microbatch_size · C · d`.

    References:
        The form: arXiv 2502.11450, section 3; the diagonal: see `gauss_newton_diagonal`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> apply_fn = lambda w, x: x @ w
        >>> wj.gauss_newton_scores(apply_fn, jnp.zeros((1, 2)), jnp.array([[2.0]])).tolist()  # x² p(1 − p)
        [[1.0, 1.0]]
    """
    del key
    _check_form(form)
    if form == "taylor" and inputs_of(batch) is batch:
        raise ValueError("form='taylor' needs the gradient of the loss: pass batch=(inputs, labels).")
    diagonal = gauss_newton_diagonal(apply_fn, params, inputs_of(batch), microbatch_size=microbatch_size, check=check)
    return _scores(cross_entropy(apply_fn), params, batch, diagonal, form, select)


@checked
def fisher_obs_scores(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    *,
    damping: Damping = ONE_PERCENT,
    select: Select = is_kernel,
    microbatch_size: int = ROWS,
    check: bool = True,
) -> Scores:
    """Optimal Brain Surgeon at initialization: `w² / (2 [F⁻¹]_qq)` with all correlations of the empirical Fisher.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example, eval mode.
        params: A params-tree of floating leaves.
        batch: Examples stacked along the first axis of every leaf, `[n, ...]`.
        key: Of no use.
        damping: `λ`; see `woodjax.curvature.damping`.
        select: Which leaves are prunable; the others score `+inf`.
        microbatch_size: Examples computed at once.
        check: Look for dropout, train-mode batch normalisation and impure losses first.

    Returns:
        A params-tree of scores, in units of the loss.

    Raises:
        ValueError: Damping not positive; no leaf selected; as `stream_gradients`.

    Cost:
        `n` forward and backward passes, then `n²·d` flops; memory `n·d`: the gradients are held.

    References:
        Hassibi & Stork, Optimal Brain Surgeon, 1992, equation 5, at other weights than its minimum.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (w * x).sum()
        >>> batch = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])  # F = diag(½, 2) + λ
        >>> wj.fisher_obs_scores(loss, jnp.ones((1, 2)), batch, damping=1.0).round(2).tolist()
        [[0.75, 1.5]]
    """
    del key
    stream = stream_gradients(loss_fn, params, batch, microbatch_size=microbatch_size, check=check)
    return obs_scores(params, low_rank_fisher(stream, damping=damping, select=select))


def _scores(loss_fn: LossFn, params: Params, batch: Batch, diagonal: Params, form: Form, select: Select) -> Scores:
    if form == "diagonal":
        return keep_selected(params, diagonal, select)
    quadratic = jax.tree.map(lambda w, h: 0.5 * wide(w) ** 2 * h, params, diagonal)
    if form == "pruner":
        return keep_selected(params, quadratic, select)
    gradient = mean_gradient(loss_fn, params, batch, microbatch_size=MICROBATCH, check=False)
    taylor = jax.tree.map(lambda w, g, second: jnp.abs(second - wide(w) * g), params, gradient, quadratic)
    return keep_selected(params, taylor, select)


def _check_form(form: Any) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}: choose 'diagonal', 'pruner' or 'taylor'.")
