"""Which sparsity when."""

from typing import Literal

import numpy as np
from jaxtyping import Float

Path = Literal["exponential", "cubic"]


def stage_sparsities(
    target: float, stages: int, *, initial: float = 0.0, path: Path = "exponential"
) -> Float[np.ndarray, " stages"]:
    """Sparsities of a pruning in several stages; the last is the target exactly.

    `"exponential"` keeps the same fraction of the survivors in every stage,
    `1 − (1−s₀)((1−s)/(1−s₀))^{t/T}`; `"cubic"` is `s + (s₀−s)(1−t/T)³`.

    Args:
        target: Final sparsity `s` in [0, 1].
        stages: Number of stages `T >= 1`.
        initial: Sparsity `s₀ <= s` to start from.
        path: The curve between the two.

    Returns:
        `[T]` sparsities, not decreasing.

    Raises:
        ValueError: `stages < 1`, unknown path, or not `0 <= initial <= target <= 1`.

    Cost:
        None; computed on the host.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), appendix (exponential); Zhu & Gupta 2017
        (arXiv 1710.01878), equation 1 (cubic).

    Example:
        >>> import woodjax as wj
        >>> wj.stage_sparsities(0.75, 2).tolist()
        [0.5, 0.75]
    """
    if stages < 1:
        raise ValueError(f"stages is {stages}: pass at least 1.")
    if not 0 <= initial <= target <= 1:
        raise ValueError(f"Need 0 <= initial <= target <= 1, found initial={initial}, target={target}.")
    time = np.arange(1, stages + 1) / stages
    if path == "cubic":
        values = target + (initial - target) * (1 - time) ** 3
    elif path == "exponential":
        left = (1 - target) / (1 - initial) if initial < 1 else 1.0
        values = 1 - (1 - initial) * left**time
    else:
        raise ValueError(f"path is {path!r}: choose 'exponential' or 'cubic'.")
    values = np.clip(values, initial, target)
    values[-1] = target
    return values
