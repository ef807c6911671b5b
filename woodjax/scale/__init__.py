"""Many devices: what a pruning costs on them, and what a compiled program sends between them.

| file | what |
|---|---|
| `collectives` | communication of a compiled program, read from its text |
| `hardware` | rates of devices |
| `layouts` | what lies where |
| `costs` | time, memory and bytes on the wire, computed |
| `tables` | costs side by side |
"""

from woodjax.scale.collectives import Collective, collectives, gathered_bytes, largest_gather, wire_bytes
from woodjax.scale.costs import ScalingCost, fitting_cost, scaling_cost
from woodjax.scale.hardware import H100_SXM, TPU_V5E, Hardware
from woodjax.scale.tables import cost_table

__all__ = [
    "H100_SXM",
    "TPU_V5E",
    "Collective",
    "Hardware",
    "ScalingCost",
    "collectives",
    "cost_table",
    "fitting_cost",
    "gathered_bytes",
    "largest_gather",
    "scaling_cost",
    "wire_bytes",
]
