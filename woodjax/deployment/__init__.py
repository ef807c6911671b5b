"""Pruned networks on disk, in other programs, and measured side by side.

| file | what |
|---|---|
| `files` | arrays and masks as safetensors |
| `coordinates` | unstructured kernels as BCOO |
| `packs` | N:M kernels as values and positions |
| `pruned` | shrunk networks with their plans |
| `stablehlo` | programs that run without the code that made them |
| `layer_files` | layers of a deep network, a file each, pruned one after another |
| `measurement` | size, multiply-adds and latency, measured |

But for `pruned`, nothing here knows how a network was pruned: any `apply_fn(variables, inputs)`, any pytree of arrays.
"""

from woodjax.deployment.coordinates import from_bcoo, to_bcoo
from woodjax.deployment.files import load_arrays, load_masks, save_arrays, save_masks
from woodjax.deployment.layer_files import LayerFile
from woodjax.deployment.measurement import Measurement, Measurements, measure
from woodjax.deployment.packs import PackedNM, pack_nm, unpack_nm
from woodjax.deployment.pruned import load_pruned, save_pruned
from woodjax.deployment.stablehlo import export_stablehlo, load_stablehlo

__all__ = [
    "LayerFile",
    "Measurement",
    "Measurements",
    "PackedNM",
    "export_stablehlo",
    "from_bcoo",
    "load_arrays",
    "load_masks",
    "load_pruned",
    "load_stablehlo",
    "measure",
    "pack_nm",
    "save_arrays",
    "save_masks",
    "save_pruned",
    "to_bcoo",
    "unpack_nm",
]
