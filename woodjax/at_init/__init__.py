"""Pruning at initialization: scores of a network that is not trained yet, and what they leave of it."""

from woodjax.at_init.collapse import CollapseReport, effective_masks, layer_collapse_report
from woodjax.at_init.control import shuffle_masks
from woodjax.at_init.names import INIT_CRITERIA, InitCriterion
from woodjax.at_init.prune import AtInitInfo, prune_at_init
from woodjax.at_init.second_order import fisher_obs_scores, fisher_scores, gauss_newton_scores, hutchinson_scores
from woodjax.at_init.sensitivity import (
    grad_norm_scores,
    grasp_scores,
    mean_gradient,
    random_scores,
    snip_scores,
    synflow_scores,
)

__all__ = [
    "INIT_CRITERIA",
    "AtInitInfo",
    "CollapseReport",
    "InitCriterion",
    "effective_masks",
    "fisher_obs_scores",
    "fisher_scores",
    "gauss_newton_scores",
    "grad_norm_scores",
    "grasp_scores",
    "hutchinson_scores",
    "layer_collapse_report",
    "mean_gradient",
    "prune_at_init",
    "random_scores",
    "shuffle_masks",
    "snip_scores",
    "synflow_scores",
]
