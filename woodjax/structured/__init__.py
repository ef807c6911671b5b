"""Structured pruning: channels, plans and networks that are really smaller."""

from woodjax.structured.channels import ChannelGroup, ChannelGroups, ChannelScores
from woodjax.structured.find import channel_groups
from woodjax.structured.implants import ImplantedKernel
from woodjax.structured.plan import PrunePlan, make_plan
from woodjax.structured.restrict import shrink_groups
from woodjax.structured.select import Selection, select_channels
from woodjax.structured.shrunk import ShrunkNetwork, shrunk_network
from woodjax.structured.start import start_implants

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "ChannelScores",
    "ImplantedKernel",
    "PrunePlan",
    "Selection",
    "ShrunkNetwork",
    "channel_groups",
    "make_plan",
    "select_channels",
    "shrink_groups",
    "shrunk_network",
    "start_implants",
]
