"""Structured pruning: channels, plans and networks that are really smaller.

| files | what |
|---|---|
| `axes`, `solver`, `rules/` | which indices of which axes go together, primitive by primitive |
| `walk`, `reading`, `running` | a program, read for its channels and run on fewer of them |
| `find`, `channels`, `restrict`, `matching` | groups of channels, and what stays of leaves and costs |
| `scores`, `hessian_aware`, `weight_scores`, `gates`, `reads`, `joint`, `surgeon` | what each channel is worth |
| `reconstruction`, `recording` | readers refitted by least squares |
| `select`, `plan`, `staying` | what stays, for a budget |
| `implants`, `start` | kernels of which some outputs are low-rank |
| `shrunk`, `rebuilt` | the smaller network |
"""

from woodjax.structured.channels import ChannelGroup, ChannelGroups, ChannelScores
from woodjax.structured.find import channel_groups
from woodjax.structured.gates import gate_channels
from woodjax.structured.hessian_aware import ChannelScoreEstimate, hap_scores, hap_trace_scores
from woodjax.structured.implants import ImplantedKernel
from woodjax.structured.joint import joint_gate_scores
from woodjax.structured.plan import PrunePlan, make_plan
from woodjax.structured.rebuilt import check_rebuilt
from woodjax.structured.reconstruction import InputMoments, input_moments, reconstruct_channels
from woodjax.structured.restrict import shrink_groups
from woodjax.structured.scores import (
    gate_scores,
    normalize_scores,
    taylor_channel_scores,
)
from woodjax.structured.select import Selection, select_channels
from woodjax.structured.shrunk import ShrunkNetwork, shrunk_network
from woodjax.structured.start import start_implants
from woodjax.structured.surgeon import compensate_channels, obs_channel_scores
from woodjax.structured.weight_scores import bn_scale_scores, l2_channel_scores, random_channel_scores

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "ChannelScoreEstimate",
    "ChannelScores",
    "ImplantedKernel",
    "InputMoments",
    "PrunePlan",
    "Selection",
    "ShrunkNetwork",
    "bn_scale_scores",
    "channel_groups",
    "check_rebuilt",
    "compensate_channels",
    "gate_channels",
    "gate_scores",
    "hap_scores",
    "hap_trace_scores",
    "input_moments",
    "joint_gate_scores",
    "l2_channel_scores",
    "make_plan",
    "normalize_scores",
    "obs_channel_scores",
    "random_channel_scores",
    "reconstruct_channels",
    "select_channels",
    "shrink_groups",
    "shrunk_network",
    "start_implants",
    "taylor_channel_scores",
]
