"""Prune to a promise: the sparsest network of a ladder whose loss increase passes a test on held-out examples.

The examples are split in two. One part prunes, the other, which the pruning never sees, tests the networks from
the least to the most pruned, and stops at the first that fails. Because the order is fixed before the test
begins, every rung is tested at the full error rate: a wrong promise needs the first bad network to pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from woodjax.door import checked
from woodjax.loss_rows import LossRow, batch_size, example_losses
from woodjax.one_shot import prune_one_shot
from woodjax.p_values import betting_p_value, hoeffding_bentkus_p_value
from woodjax.placement import on_any_axes
from woodjax.tree import check_floating, check_like
from woodjax.typing import Batch, LossFn, Masks, Params

Prune = Callable[[Batch, float], tuple[Params, Masks, Any]]
Test = Literal["betting", "hoeffding_bentkus"]

LADDER = (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)

TESTS = ("betting", "hoeffding_bentkus")


class GuaranteeInfo(NamedTuple):
    """What was tested, and what is promised. Made by `prune_to_loss`; the arrays are NumPy's."""

    sparsity: float  # of the rung returned; 0 for the dense network
    certified: bool  # False: nothing passed, and the dense network came back
    confidence: float
    max_loss_increase: float
    loss_bound: float  # the promise is on differences clipped to ± this
    num_calibration: int
    sparsities: Float[np.ndarray, " rungs"]
    mean_increase: Float[np.ndarray, " rungs"]  # clipped, over the calibration set; NaN where not tested
    p_value: Float[np.ndarray, " rungs"]  # NaN where not tested
    passed: Bool[np.ndarray, " rungs"]
    prune_info: Any  # of the rung returned; None for the dense network


@checked
@on_any_axes
def prune_to_loss(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    max_loss_increase: float,
    confidence: float = 0.95,
    sparsities: Sequence[float] | None = None,
    held_out: float | int = 0.5,
    loss_bound: float = 1.0,
    metric: LossFn | None = None,
    prune: Prune | None = None,
    test: Test = "betting",
    key: Key[Array, ""] | None = None,
    microbatch_size: int = 256,
) -> tuple[Params, Masks, GuaranteeInfo]:
    """Prune as far as a distribution-free test on held-out examples allows.

    What is promised: with probability at least `confidence` over the draw of the calibration examples, the expected
    increase `E[clip(l(pruned) − l(dense), −B, B)]` of the network returned is at most `max_loss_increase`, for fresh
    examples of the same distribution. It holds for any network, loss and way of pruning. It says nothing about
    single examples, about groups of them, about another distribution, nor about the part of a difference
    beyond `B`; and it is spent once: running again until something passes voids it.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar` for one example.
        params: A params-tree of floating leaves: the trained network.
        batch: Independent examples that the network was not trained on, `[n, ...]`; on training examples the promise
            is about those.
        max_loss_increase: Tolerance, below the bound `B`; in units of the loss, or of `metric`.
        confidence: Between 0 and 1.
        sparsities: Increasing fractions, tested in this order; None for 0.2 to 0.99 in 15 steps.
        held_out: Share of the batch, below 1, or number of examples that calibrate. The rest prunes.
        loss_bound: `B`, what differences of the loss are clipped to. The smaller, the fewer examples are needed.
        metric: What to promise about instead of the loss: `metric(params, example)` in [0, 1], such as the 0-1 error;
            then `B` is 1 and nothing is clipped.
        prune: `prune(pool, sparsity) -> (params, masks, info)`, a way of pruning of your own, which must not see the
            calibration examples. None for `prune_one_shot(loss_fn, params, pool, sparsity)`, nothing else chosen.
        test: `"betting"`, which profits from a small variance, or `"hoeffding_bentkus"`.
        key: Decides the split; None for `jax.random.key(0)`. The split is always random.
        microbatch_size: Examples in one forward pass.

    Returns:
        The network and its masks, or the dense network and masks that are all True where nothing passed; and
        what was tested.

    Raises:
        ValueError: `confidence`, `held_out`, `loss_bound` or `max_loss_increase` out of range; sparsities that do not
            increase; an unknown test; losses of the dense network that are not finite; a metric outside [0, 1];
            pruned parameters shaped otherwise than `params`.

    Cost:
        For each rung tested one pruning and one forward pass over the calibration examples; nothing for the rungs
        after the first that fails.

    References:
        Angelopoulos et al., Learn then Test, 2021 (arXiv 2110.01052), fixed-sequence testing;
        Waudby-Smith & Ramdas, 2020 (arXiv 2010.09686), betting.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> loss = lambda p, xy: (xy[0] @ p["w"][:, 0] - xy[1]) ** 2
        >>> x = jax.random.normal(jax.random.key(0), (2000, 4))
        >>> params = {"w": jnp.array([[1.0], [0.5], [0.02], [0.01]])}
        >>> promise = dict(max_loss_increase=0.1, sparsities=[0.5, 0.75])
        >>> params, masks, info = wj.prune_to_loss(loss, params, (x, x @ params["w"][:, 0]), **promise)
        >>> info.sparsity, info.passed.tolist(), masks["w"][:, 0].tolist()
        (0.5, [True, False], [True, True, False, False])
    """
    ladder = np.asarray(LADDER if sparsities is None else sparsities, float)
    bound = 1.0 if metric is not None else float(loss_bound)
    _check(ladder, bound, max_loss_increase, confidence, test)
    check_floating(params)
    pool, calibration = split_batch(batch, held_out, key)
    if prune is None:
        prune = partial(_prune, loss_fn, params)
    measure = LossRow(loss_fn if metric is None else metric, False)
    before = _losses(params, calibration, measure, microbatch_size)
    if not np.isfinite(before).all():
        raise ValueError(f"{(~np.isfinite(before)).sum()} of {before.size} losses of the dense network are not finite.")
    increase, p_values = np.full(ladder.size, np.nan), np.full(ladder.size, np.nan)
    passed = np.zeros(ladder.size, bool)
    best = (params, jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params), None)
    for rung, sparsity in enumerate(ladder):
        pruned, masks, info = prune(pool, float(sparsity))
        check_like(pruned, params, "pruned parameters")
        after = _losses(pruned, calibration, measure, microbatch_size)
        if metric is not None:
            _check_metric(np.concatenate([before, after]))
        # A loss that is not a number is as bad as can be.
        difference = np.clip(np.where(np.isnan(after), np.inf, after) - before, -bound, bound)
        increase[rung] = difference.mean()
        p_values[rung] = _p_value(difference, max_loss_increase, bound, 1 - confidence, test)
        passed[rung] = p_values[rung] <= 1 - confidence
        if not passed[rung]:
            break
        best = (pruned, masks, info)
    count = int(passed.sum())
    report = GuaranteeInfo(
        sparsity=float(ladder[count - 1]) if count else 0.0,
        certified=count > 0,
        confidence=confidence,
        max_loss_increase=max_loss_increase,
        loss_bound=bound,
        num_calibration=before.size,
        sparsities=ladder,
        mean_increase=increase,
        p_value=p_values,
        passed=passed,
        prune_info=best[2],
    )
    return best[0], best[1], report


@checked
@on_any_axes
def split_batch(batch: Batch, held_out: float | int, key: Key[Array, ""] | None = None) -> tuple[Batch, Batch]:
    """Two disjoint parts of a batch, drawn at random.

    Args:
        batch: Examples, `[n, ...]` along the first axis of every leaf.
        held_out: Share of the second part, below 1, or its number of examples.
        key: Decides which; None for `jax.random.key(0)`.

    Returns:
        The rest, and the examples held out.

    Raises:
        ValueError: One of the two parts would be empty.

    Cost:
        A copy of the batch.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> pool, calibration = wj.split_batch(jnp.arange(10), 0.3)
        >>> len(pool), sorted([*pool.tolist(), *calibration.tolist()]) == list(range(10))
        (7, True)
    """
    size = batch_size(batch)
    count = int(held_out) if held_out >= 1 else round(held_out * size)
    if not 1 <= count < size or (held_out > 1 and held_out != count):
        raise ValueError(
            f"held_out is {held_out}: pass a share, or a number, that leaves some of {size} on both sides."
        )
    order = jax.random.permutation(jax.random.key(0) if key is None else key, size)
    first, second = order[count:], order[:count]
    return (
        jax.tree.map(lambda x: jnp.asarray(x)[first], batch),
        jax.tree.map(lambda x: jnp.asarray(x)[second], batch),
    )


def _check(ladder: np.ndarray, bound: float, max_loss_increase: float, confidence: float, test: str) -> None:
    if ladder.ndim != 1 or not ladder.size or np.any(np.diff(ladder) <= 0) or not 0 <= ladder[0] <= ladder[-1] <= 1:
        raise ValueError(f"sparsities are {ladder.tolist()}: pass increasing fractions in [0, 1], such as [0.5, 0.9].")
    if not 0 < bound < np.inf:
        raise ValueError(f"loss_bound is {bound}: pass a positive number, what differences of the loss are clipped to.")
    if not -bound < max_loss_increase < bound:
        raise ValueError(f"max_loss_increase is {max_loss_increase}: pass a number between ±{bound}, the bound.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: pass a number between 0 and 1, such as 0.95.")
    if test not in TESTS:
        raise ValueError(f"test is {test!r}: choose one of {list(TESTS)}.")


def _p_value(difference: Float[np.ndarray, " n"], tolerance: float, bound: float, level: float, test: Test) -> float:
    """Of the hypothesis that the mean difference, within ±`bound`, is above the tolerance."""
    values, mean = (difference + bound) / (2 * bound), (tolerance + bound) / (2 * bound)
    if test == "betting":
        return betting_p_value(values, mean, level)
    return hoeffding_bentkus_p_value(values, mean)


def _check_metric(values: Float[np.ndarray, " n"]) -> None:
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"metric is between {values.min()} and {values.max()}: it must lie in [0, 1].")


def _prune(loss_fn: LossFn, params: Params, pool: Batch, sparsity: float) -> tuple[Params, Masks, Any]:
    return prune_one_shot(loss_fn, params, pool, sparsity)


def _losses(params: Params, examples: Batch, row: LossRow, microbatch_size: int) -> Float[np.ndarray, " n"]:
    return np.asarray(example_losses(params, examples, row, microbatch_size=microbatch_size), np.float64)
