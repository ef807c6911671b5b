"""Curvatures: what stands for the Hessian of the mean loss, behind one protocol."""

from woodjax.curvature.block_fisher import BlockFisher, BlockSums, block_fisher
from woodjax.curvature.damping import Relative
from woodjax.curvature.diagonal_fisher import DiagonalFisher, DiagonalSums, diagonal_curvature, diagonal_fisher
from woodjax.curvature.engines import Estimate, empirical_fisher, estimate
from woodjax.curvature.gradient_rows import GradientRows
from woodjax.curvature.kronecker_fisher import KroneckerFisher, kronecker_fisher
from woodjax.curvature.layer_input import LayerInputHessian, layer_input_hessian
from woodjax.curvature.low_rank import LowRankFisher
from woodjax.curvature.low_rank_fisher import low_rank_fisher
from woodjax.curvature.protocol import CoupledCurvature, Curvature, GroupCurvature, predicted_loss_change
from woodjax.curvature.row_fisher import RowFisher, row_fisher
from woodjax.curvature.streamed_fisher import StreamedFisher, streamed_fisher
from woodjax.curvature.sums import Accumulator

__all__ = [
    "Accumulator",
    "BlockFisher",
    "BlockSums",
    "CoupledCurvature",
    "Curvature",
    "DiagonalFisher",
    "DiagonalSums",
    "Estimate",
    "GradientRows",
    "GroupCurvature",
    "KroneckerFisher",
    "LayerInputHessian",
    "LowRankFisher",
    "Relative",
    "RowFisher",
    "StreamedFisher",
    "block_fisher",
    "diagonal_curvature",
    "diagonal_fisher",
    "empirical_fisher",
    "estimate",
    "kronecker_fisher",
    "layer_input_hessian",
    "low_rank_fisher",
    "predicted_loss_change",
    "row_fisher",
    "streamed_fisher",
]
