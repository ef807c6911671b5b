"""Optimizers of published trainings."""

from functools import lru_cache
from typing import Literal, get_args

import optax

Decay = Literal["steps", "cosine", "constant"]


@lru_cache(maxsize=32)
def sgd_recipe(
    learning_rate: float,
    *,
    steps: int,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay: Decay = "steps",
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as networks pruned at initialization are trained: `v = μv + g + λw`, `w = w − ηv`.

    Weight decay is added to the gradient, before momentum, on all parameters, as in PyTorch's `SGD`. The same
    arguments give the same object, so that `fit` compiles nothing anew.

    Args:
        learning_rate: `η` of the first step; positive.
        steps: Steps of the whole training, `epochs * (examples // batch_size)`.
        momentum: `μ`, in [0, 1).
        weight_decay: `λ`, not negative.
        decay: `"steps"`: times 0.2 at 50 % and again at 75 % of the steps; `"cosine"`: to zero; `"constant"`.
        nesterov: Nesterov's momentum.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: A value out of its range.

    Cost:
        One copy of the parameters, for the momentum.

    References:
        Sutskever et al. 2013 (ICML), momentum; Zagoruyko & Komodakis, Wide residual networks, 2016 (arXiv 1605.07146),
        section 3: times 0.2 in steps; Loshchilov & Hutter 2016 (arXiv 1608.03983), equation 5: cosine.

    Example:
        >>> from woodjax.training import sgd_recipe
        >>> optimizer = sgd_recipe(0.1, steps=160 * 390)
    """
    if not learning_rate > 0 or steps < 1 or not 0 <= momentum < 1 or weight_decay < 0:
        raise ValueError(
            f"Found learning_rate={learning_rate}, steps={steps}, momentum={momentum}, weight_decay={weight_decay}: "
            "pass learning_rate > 0, steps >= 1, momentum in [0, 1) and weight_decay >= 0."
        )
    if decay not in get_args(Decay):
        raise ValueError(f"decay is {decay!r}: choose one of {list(get_args(Decay))}.")
    schedules = {
        "steps": lambda: optax.piecewise_constant_schedule(learning_rate, {steps // 2: 0.2, steps * 3 // 4: 0.2}),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps),
        "constant": lambda: learning_rate,
    }
    sgd = optax.sgd(schedules[decay](), momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd)
