"""Curvatures: what stands for the Hessian of the mean loss, behind one protocol."""

from woodjax.curvature.block_fisher import BlockFisher, block_fisher
from woodjax.curvature.diagonal_fisher import DiagonalFisher, diagonal_fisher
from woodjax.curvature.low_rank_fisher import LowRankFisher, low_rank_fisher
from woodjax.curvature.protocol import Curvature, predicted_loss_change

__all__ = [
    "BlockFisher",
    "Curvature",
    "DiagonalFisher",
    "LowRankFisher",
    "block_fisher",
    "diagonal_fisher",
    "low_rank_fisher",
    "predicted_loss_change",
]
