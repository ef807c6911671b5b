"""The empirical Fisher of one block and its inverse, on arrays alone.

Symbols: `G [m, b]` gradients, `λ` damping, `F = λI + GᵀG/m` the damped Fisher.

| function | gives | flops | best for |
|---|---|---|---|
| `woodbury_scan` | `F⁻¹`, one example at a time | `4mb²`, and as many bytes | the paper's form |
| `woodbury_scan_rank_k` | `F⁻¹`, k examples at a time | `4mb² + 2mk(b + k)` | |
| `primal_inverse` | `F⁻¹` by Cholesky of `F` | `2mb² + 2b³` | `m ≥ b` |
| `dual_inverse` | `F⁻¹` by Cholesky of the Gram matrix | `3m²b + 2m³/3 + 2mb²` | `m < b` |
| `whiten_gram` | the factor that answers the rest without `F⁻¹` | `m²b + 2m³/3` | `m ≪ b`, the whole network |

A diagonal that is a small difference of large numbers may come out as nothing, or below: it is bounded
by `[F⁻¹]_qq ≥ 1/F_qq`, which holds for every positive definite matrix. A Cholesky factor that rounding
has spoiled is made again with ten times the damping, block by block; the damping that was used is
returned beside the factor.

Everything here is for one block, jitted, and meant to be `vmap`ped.
"""

from woodjax.linalg.dense import DampedInverse, fisher_inverse, joint_step_inverse, primal_inverse, solve_cholesky
from woodjax.linalg.dual import (
    Whitener,
    dual_inverse,
    dual_inverse_diagonal,
    dual_solve,
    joint_step_gram,
    joint_steps_gram,
    solve_whitened,
    whiten,
    whiten_gram,
    window_inverse_diagonal,
)
from woodjax.linalg.greedy import greedy_trace
from woodjax.linalg.groups import (
    ELIMINATED,
    MAX_SUBSETS,
    cheapest_subset,
    dual_group_cost,
    dual_submatrices,
    group_cost,
)
from woodjax.linalg.path import path_losses
from woodjax.linalg.products import COLUMN_WINDOW, contract, gram, total_over
from woodjax.linalg.support import Support, exchange_scales, quadratic, solve_support, survivor_gram
from woodjax.linalg.woodbury import woodbury_scan, woodbury_scan_rank_k

__all__ = [
    "COLUMN_WINDOW",
    "ELIMINATED",
    "MAX_SUBSETS",
    "DampedInverse",
    "Support",
    "Whitener",
    "cheapest_subset",
    "contract",
    "dual_group_cost",
    "dual_inverse",
    "dual_inverse_diagonal",
    "dual_solve",
    "dual_submatrices",
    "exchange_scales",
    "fisher_inverse",
    "gram",
    "greedy_trace",
    "group_cost",
    "joint_step_gram",
    "joint_step_inverse",
    "joint_steps_gram",
    "path_losses",
    "primal_inverse",
    "quadratic",
    "solve_cholesky",
    "solve_support",
    "solve_whitened",
    "survivor_gram",
    "total_over",
    "whiten",
    "whiten_gram",
    "window_inverse_diagonal",
    "woodbury_scan",
    "woodbury_scan_rank_k",
]
