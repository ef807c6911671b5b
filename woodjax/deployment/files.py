"""Arrays and masks as safetensors files: no code in them, and none needed to read them."""

import json
import math
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from woodjax.deployment._host import named_leaves, nested, to_host
from woodjax.door import checked
from woodjax.tree import check_bool
from woodjax.typing import Masks, PyTree

METADATA = "woodjax"  # one entry, so that the same tree is the same file, byte for byte
SHAPES = "mask_shapes"

# The names of the format: safetensors' own reader for NumPy leaves some of these out.
DTYPES = {
    "BOOL": jnp.bool_,
    "U8": jnp.uint8,
    "I8": jnp.int8,
    "U16": jnp.uint16,
    "I16": jnp.int16,
    "U32": jnp.uint32,
    "I32": jnp.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F32": jnp.float32,
    "F64": np.float64,
}


@checked
def save_arrays(path: str | PathLike[str], tree: PyTree, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a pytree of arrays to one safetensors file.

    The file is written beside its name and renamed: whoever is killed leaves the old file. The same tree makes the
    same bytes.

    Args:
        path: Where to; an old file is replaced.
        tree: Any pytree of arrays: parameters, batch statistics, optimizer state. Leaves are named by `path_name`.
        metadata: Values that JSON can hold, under names; they are in the header of the file.

    Raises:
        ImportError: No safetensors.
        OSError: No such folder, or no space in it.
        ValueError: No leaf; a tree that is one array; two leaves of one name, one below another, or one named
            `__metadata__`; a traced leaf, a typed random key, a dtype that the format does not have; metadata that JSON
            cannot hold.

    Cost:
        Two copies of the arrays on the host; the file has their bytes and about 100 for each leaf.

    References:
        The safetensors format, https://huggingface.co/docs/safetensors: a JSON header and raw little-endian arrays.

    Example:
        >>> import tempfile, pathlib, jax.numpy as jnp, woodjax as wj
        >>> file = pathlib.Path(tempfile.mkdtemp(), "network.safetensors")
        >>> wj.save_arrays(file, {"fc": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}, metadata={"width": 3})
        >>> tree, metadata = wj.load_arrays(file)
        >>> tree["fc"]["kernel"].shape, str(tree["fc"]["kernel"].dtype), metadata
        ((2, 3), 'bfloat16', {'width': 3})
    """
    _safetensors()
    from safetensors.numpy import save

    arrays = {name: to_host(name, leaf) for name, leaf in named_leaves(tree).items()}
    if not arrays or "" in arrays:
        raise ValueError('The tree has no leaf with a name: pass a dict of arrays, such as {"kernel": array}.')
    if "__metadata__" in arrays:
        raise ValueError("A leaf is named '__metadata__', which the format keeps for itself: rename it.")
    nested(arrays)
    known = {np.dtype(dtype) for dtype in DTYPES.values()}
    for name, array in arrays.items():
        if array.dtype not in known:
            raise ValueError(
                f"Leaf '{name}' is {array.dtype}, which the format does not have: cast it to one of "
                f"{sorted(map(str, known))}."
            )
    try:
        header = {METADATA: json.dumps(dict(metadata or {}), allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not JSON ({error}): pass strings, numbers, lists and dicts of them.") from error
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:  # not save_file, which lets none but the owner read
            file.write(save(arrays, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@checked
def load_arrays(path: str | PathLike[str], *, like: PyTree | None = None) -> tuple[PyTree, dict[str, Any]]:
    """Read a safetensors file.

    Args:
        path: A file of `save_arrays`, or any other safetensors file.
        like: A pytree with the structure to fill, whose leaves are not looked at, shapes neither; None for nested
            dicts.

    Returns:
        Arrays of the host, bit by bit those that were saved (`jax.device_put` moves them), and the metadata; of a file
        that was not made here, its own strings. Without `like=` dicts come back as nested dicts, lists, tuples and
        NamedTuples as dicts whose keys are `"0"`, `"1"`, ... or field names, and a key with a `/` as two.

    Raises:
        ImportError: No safetensors.
        FileNotFoundError: No such file.
        ValueError: Not a safetensors file; leaves that `like` does not have, or that only `like` has.

    Cost:
        The file is read once, and copied once on the host.

    Example:
        >>> import tempfile, pathlib, jax, jax.numpy as jnp, optax, woodjax as wj
        >>> file = pathlib.Path(tempfile.mkdtemp(), "state.safetensors")
        >>> state = optax.adam(1e-3).init({"kernel": jnp.ones((2, 3))})
        >>> wj.save_arrays(file, state)
        >>> jax.tree.structure(wj.load_arrays(file, like=state)[0]) == jax.tree.structure(state)
        True
    """
    reader = _safetensors()
    try:
        found = reader.deserialize(Path(path).read_bytes())
        arrays = {name: _array(name, entry) for name, entry in found}
    except reader.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}).") from error
    with reader.safe_open(os.fspath(path), framework="np") as file:
        strings = file.metadata() or {}
    metadata = json.loads(strings[METADATA]) if METADATA in strings else strings
    if like is None:
        return nested(dict(sorted(arrays.items()))), metadata
    names = list(named_leaves(like))
    missing, unknown = sorted(set(names) - set(arrays)), sorted(set(arrays) - set(names))
    if missing or unknown:
        raise ValueError(
            f"{path} does not have the leaves of like=: missing are {missing}, not asked for {unknown}. Pass a tree "
            "with the structure that was saved, or none for nested dicts."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names]), metadata


@checked
def save_masks(path: str | PathLike[str], masks: Masks) -> None:
    """Write masks to a safetensors file, eight to a byte.

    Args:
        path: Where to; an old file is replaced, whole or not at all.
        masks: A params-tree of bool.

    Raises:
        ImportError: No safetensors.
        ValueError: A mask that is not bool; as `save_arrays`.

    Cost:
        The file has an eighth of a byte for each weight, and about 100 bytes for each leaf.

    Example:
        >>> import tempfile, pathlib, jax.numpy as jnp, woodjax as wj
        >>> file = pathlib.Path(tempfile.mkdtemp(), "masks.safetensors")
        >>> wj.save_masks(file, {"kernel": jnp.array([[True, False, True]])})
        >>> wj.load_masks(file)["kernel"].tolist()
        [[True, False, True]]
    """
    check_bool(masks, "masks")
    arrays = {name: to_host(name, mask) for name, mask in named_leaves(masks).items()}
    packed = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in arrays.items()}
    save_arrays(path, packed, metadata={SHAPES: {name: mask.shape for name, mask in arrays.items()}})


@checked
def load_masks(path: str | PathLike[str], *, like: PyTree | None = None) -> Masks:
    """Read masks that `save_masks` wrote.

    Args:
        path: The file.
        like: A pytree with the structure to fill; None for nested dicts.

    Returns:
        A params-tree of bool, arrays of the host.

    Raises:
        ImportError: No safetensors.
        FileNotFoundError: No such file.
        ValueError: A file without masks, or with others than its header says; as `load_arrays`.

    Cost:
        A byte for each weight.
    """
    packed, metadata = load_arrays(path, like=like)
    shapes = metadata.get(SHAPES)
    if not isinstance(shapes, dict) or set(shapes) != set(named_leaves(packed)):
        raise ValueError(f"{path} holds no masks of save_masks: read it by load_arrays.")

    def unpacked(name: str, bits: Shaped[np.ndarray, " bytes"]) -> Shaped[np.ndarray, "..."]:
        size = math.prod(shapes[name])
        if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
            raise ValueError(f"{path}: '{name}' is {bits.dtype}{list(bits.shape)}, no mask of shape {shapes[name]}.")
        return np.unpackbits(bits, count=size, bitorder="little").astype(bool).reshape(shapes[name])

    leaves = [unpacked(name, bits) for name, bits in named_leaves(packed).items()]
    return jax.tree.unflatten(jax.tree.structure(packed), leaves)


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("Files of arrays need safetensors: pip install 'woodjax[deploy]'.") from error
    return safetensors


def _array(name: str, entry: Mapping[str, Any]) -> Shaped[np.ndarray, "..."]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"Leaf '{name}' is {entry['dtype']}: known are {sorted(DTYPES)}.")
    return np.frombuffer(entry["data"], np.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
