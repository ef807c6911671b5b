"""Second-order model compression in JAX.

`loss → per-example gradients → curvature → scores → masks → updates`: six kinds of object, each a
pytree, each made by a pure function of the one before.
"""

from woodjax.compensation import compensate
from woodjax.criteria import magnitude_scores, obd_scores, obs_scores, woodtaylor_scores
from woodjax.curvature import (
    Accumulator,
    BlockFisher,
    BlockSums,
    Curvature,
    DiagonalFisher,
    DiagonalSums,
    Estimate,
    GradientRows,
    LowRankFisher,
    Relative,
    RowFisher,
    StreamedFisher,
    block_fisher,
    diagonal_fisher,
    empirical_fisher,
    estimate,
    low_rank_fisher,
    predicted_loss_change,
    row_fisher,
    streamed_fisher,
)
from woodjax.gradients import all_class_gradients, per_example_gradients, sampled_label_gradients
from woodjax.linalg import (
    DampedInverse,
    Whitener,
    contract,
    dual_inverse,
    dual_inverse_diagonal,
    dual_solve,
    fisher_inverse,
    gram,
    joint_step_gram,
    joint_step_inverse,
    primal_inverse,
    whiten,
    whiten_gram,
    woodbury_scan,
    woodbury_scan_rank_k,
)
from woodjax.masks import make_masks, mask_sparsity, nonfinite_scores, prune_count
from woodjax.one_shot import OneShotInfo, Stage, prune_one_shot
from woodjax.probe import check_loss
from woodjax.schedules import stage_sparsities
from woodjax.sparsity_path import SparsityPath, sparsity_path
from woodjax.stream import GradientStream, stream_gradients
from woodjax.tree import Layout, apply_masks, is_kernel, make_layout, path_name

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "BlockFisher",
    "BlockSums",
    "Curvature",
    "DampedInverse",
    "DiagonalFisher",
    "DiagonalSums",
    "Estimate",
    "GradientRows",
    "GradientStream",
    "Layout",
    "LowRankFisher",
    "OneShotInfo",
    "Relative",
    "RowFisher",
    "SparsityPath",
    "Stage",
    "StreamedFisher",
    "Whitener",
    "all_class_gradients",
    "apply_masks",
    "block_fisher",
    "check_loss",
    "compensate",
    "contract",
    "diagonal_fisher",
    "dual_inverse",
    "dual_inverse_diagonal",
    "dual_solve",
    "empirical_fisher",
    "estimate",
    "fisher_inverse",
    "gram",
    "is_kernel",
    "joint_step_gram",
    "joint_step_inverse",
    "low_rank_fisher",
    "magnitude_scores",
    "make_layout",
    "make_masks",
    "mask_sparsity",
    "nonfinite_scores",
    "obd_scores",
    "obs_scores",
    "path_name",
    "per_example_gradients",
    "predicted_loss_change",
    "primal_inverse",
    "prune_count",
    "prune_one_shot",
    "row_fisher",
    "sampled_label_gradients",
    "sparsity_path",
    "stage_sparsities",
    "stream_gradients",
    "streamed_fisher",
    "whiten",
    "whiten_gram",
    "woodbury_scan",
    "woodbury_scan_rank_k",
    "woodtaylor_scores",
]
