"""Read a safetensors file with torch's names and layouts into an NNX model.

| torch | here |
|---|---|
| `layer1.0.conv1.weight` `(out, in, kh, kw)` | `layer1_0/conv1/kernel` `(kh, kw, in, out)` |
| `fc1.weight` `(out, in)` | `fc1/kernel` `(in, out)` |
| `bn1.weight`, `bn1.bias` | `bn1/scale`, `bn1/bias` |
| `bn1.running_mean`, `bn1.running_var` | `bn1/mean`, `bn1/var` |
| `layer2.0.shortcut.0.weight` | `layer2_0/shortcut/conv/kernel` |
| `layer2.0.shortcut.1.weight` | `layer2_0/shortcut/bn/scale` |
"""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
IGNORED = re.compile(r"num_batches_tracked$")
AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # kernels only


def load_torch_layout(model: nnx.Module, file: str | PathLike[str]) -> None:
    """Fill parameters and batch statistics of a model from a torch-layout safetensors file.

    Args:
        model: A module of `woodjax.models`, changed in place only if the whole file fits.
        file: Path of the file. A `module.` in front of names and `num_batches_tracked` entries
            are ignored.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a safetensors file, or one that `woodjax prune` wrote; or entries that are missing,
            unexpected or of another shape, all of them listed.

    Cost:
        Memory of the file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"No weights file at {file}.")
    try:
        found = {_plain(name): array for name, array in load_file(file).items() if not IGNORED.search(name)}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    if any(name.startswith("params/") for name in found):
        raise ValueError(f"{file} is an output of `woodjax prune`, not a file with torch's names and layouts.")
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    wanted: dict[tuple[str | int, ...], Any] = dict(flatten_dict(nnx.to_pure_dict(state)))
    values, problems = {}, []
    for path, value in wanted.items():
        name = torch_name(path)
        if name not in found:
            problems.append(f"missing: {name}")
            continue
        array = _transpose(found.pop(name), path)
        if array.shape != value.shape:
            problems.append(f"shape of {name}: {array.shape} after transposing, the network has {value.shape}")
        values[path] = array
    problems += [f"unexpected: {name} {array.shape}" for name, array in found.items()]
    if problems:
        raise ValueError(f"{file} does not fit the network: " + "; ".join(problems))
    arrays = {path: jnp.asarray(values[path], value.dtype) for path, value in wanted.items()}
    nnx.replace_by_pure_dict(state, unflatten_dict(arrays))
    nnx.update(model, state)


def torch_name(path: tuple[str | int, ...]) -> str:
    """Torch's name of an NNX variable.

    Args:
        path: Attribute names from the model down.

    Returns:
        Names joined by dots.

    Example:
        >>> from woodjax.models.torch_layout import torch_name
        >>> torch_name(("layer1_0", "conv1", "kernel"))
        'layer1.0.conv1.weight'
    """
    *modules, leaf = [str(part) for part in path]
    dotted = ".".join([*modules, LEAVES.get(leaf, leaf)])
    dotted = re.sub(r"(\w+)_(\d+)", r"\1.\2", dotted)
    return dotted.replace("shortcut.conv", "shortcut.0").replace("shortcut.bn", "shortcut.1")


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _transpose(array: np.ndarray, path: tuple[str | int, ...]) -> np.ndarray:
    return array.transpose(AXES[array.ndim]) if path[-1] == "kernel" and array.ndim in AXES else array
