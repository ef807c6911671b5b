"""p-values for the mean of bounded observations: no assumption about their distribution but independence.

All test the hypothesis that the mean is above `mean`: small where the observations lie clearly below it.
"""

import numpy as np
from jaxtyping import Float

from woodjax.door import checked_but

LARGEST_BET = 0.75  # of the capital that may be lost on one observation


@checked_but("values")
def betting_p_value(values: Float[np.ndarray, " n"], mean: float, level: float = 0.05) -> float:
    """p-value of `E[x] ≥ mean` by betting against it: exact at every sample size, sharp where the variance is small.

    A gambler stakes on each observation to lie below `mean`, the stake chosen from the observations before it.
    If the hypothesis is true the capital is not expected to grow, whatever the stakes, and by Ville's inequality
    it passes `1/α` with a probability of at most `α`.

    Args:
        values: Independent observations in [0, 1], in an order that does not depend on them.
        mean: Between 0 and 1.
        level: The `α` that the stakes are sized for; any number fixed beforehand keeps the p-value valid.

    Returns:
        A valid p-value in (0, 1]: at or below `α` with a probability of at most `α` where the hypothesis is true.

    Raises:
        ValueError: No observations, or some outside [0, 1]; `mean` or `level` outside (0, 1).

    Cost:
        A few passes over the observations.

    References:
        Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, 2020 (arXiv 2010.09686),
        the one-sided capital process with predictable plug-in bets.

    Example:
        >>> import numpy as np, woodjax as wj
        >>> wj.betting_p_value(np.full(100, 0.5), 0.5), wj.betting_p_value(np.full(100, 0.4), 0.5) < 1e-3
        (1.0, True)
    """
    values = _checked(values, mean)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: pass a number between 0 and 1, such as 0.05.")
    n = values.size
    seen = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(values)) / (seen + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (seen + 1)
    before = np.concatenate([[0.25], variances[:-1]])  # what is known when the stake is placed
    stakes = np.minimum(np.sqrt(2 * np.log(1 / level) / (n * before)), LARGEST_BET / (1 - mean))
    log_capital = np.cumsum(np.log1p(stakes * (mean - values)))
    return float(np.exp(-max(0.0, log_capital.max())))


@checked_but("values")
def hoeffding_bentkus_p_value(values: Float[np.ndarray, " n"], mean: float) -> float:
    """p-value of `E[x] ≥ mean`, the smaller of Hoeffding's and Bentkus's: a function of the sample mean alone.

    Args:
        values: Independent observations in [0, 1].
        mean: Between 0 and 1.

    Returns:
        A valid p-value in [0, 1].

    Raises:
        ValueError: No observations, or some outside [0, 1]; `mean` outside (0, 1).

    Cost:
        One pass over the observations.

    References:
        Angelopoulos et al., Learn then Test, 2021 (arXiv 2110.01052), Hoeffding–Bentkus p-values.

    Example:
        >>> import numpy as np, woodjax as wj
        >>> round(wj.hoeffding_bentkus_p_value(np.zeros(100), 0.1), 8)  # 0.9¹⁰⁰, Hoeffding's
        2.656e-05
    """
    from scipy.special import bdtr  # here: it would be a quarter of the time of `import woodjax`

    values = _checked(values, mean)
    n, found = values.size, min(values.mean(), mean)
    first = found * np.log(found / mean) if found > 0 else 0.0
    second = (1 - found) * np.log((1 - found) / (1 - mean)) if found < 1 else 0.0
    bentkus = np.e * bdtr(float(np.ceil(values.sum())), n, mean)
    return float(min(np.exp(-n * (first + second)), bentkus, 1.0))


def _checked(values: Float[np.ndarray, " n"], mean: float) -> Float[np.ndarray, " n"]:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"values of shape {values.shape} are not observations in [0, 1].")
    if not 0 < mean < 1:
        raise ValueError(f"mean is {mean}: pass a number between 0 and 1.")
    return values
