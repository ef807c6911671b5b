"""Networks that do not fit: pruned layer by layer, with one layer on the device at a time.

| file | what |
|---|---|
| `layers` | what a layer has to answer |
| `hidden` | hidden states on the host, micro-batches on the device |
| `kernels` | kernels as matrices, found in the program of a layer |
| `moments` | second moments of what they read |
| `output_gradients` | the backward sweep: squared gradients of what they write |
| `pruning` | one kernel: magnitude, Wanda, the column sweep |
| `driver` | `prune_layers` |
"""

from woodjax.layerwise.driver import LayerInfo, prune_layers
from woodjax.layerwise.layers import HostLayer, ResidentLayer
from woodjax.layerwise.output_gradients import OutputGradients, squared_output_gradients

__all__ = [
    "HostLayer",
    "LayerInfo",
    "OutputGradients",
    "ResidentLayer",
    "prune_layers",
    "squared_output_gradients",
]
