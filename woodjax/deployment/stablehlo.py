"""Programs that run without the code that made them."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from woodjax.deployment._host import named_leaves
from woodjax.door import checked, checked_but
from woodjax.typing import PyTree


@checked
def export_stablehlo(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    variables: PyTree,
    inputs: PyTree,
    *,
    symbolic_batch: bool = True,
    platforms: Sequence[str] | None = None,
) -> bytes:
    """Compile a network's function into StableHLO, without its weights.

    The weights stay arguments: the program and `save_arrays` together are the network, and a program serves every
    fine-tuning of it. What `apply_fn` carries itself (batch statistics in a `jax.tree_util.Partial`) is in the program.

    Args:
        apply_fn: `apply_fn(variables, inputs)`, a pure function.
        variables: Any pytree; shapes and dtypes are enough.
        inputs: A pytree of dicts, lists and tuples, each leaf with the batch as its first axis; shapes are enough.
        symbolic_batch: Let the program take any number of inputs, one at least; False fixes that of `inputs`.
        platforms: What to compile for, of `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`; None for the device here.

    Returns:
        The bytes of the program, for a file. It has no derivatives.

    Raises:
        ImportError: No flatbuffers, which `jax.export` writes with.
        ValueError: Inputs without one common first axis; a program that depends on the batch size; inputs or results
            in containers other than dicts, lists, tuples and None.

    Cost:
        Two traces and one lowering; nothing runs.

    References:
        `jax.export`, https://docs.jax.dev/en/latest/export/export.html: newer versions of JAX read
        programs for six months, and older ones for three weeks.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> program = wj.export_stablehlo(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)))
        >>> wj.load_stablehlo(program)(params, jnp.ones((5, 2))).shape
        (5, 3)
    """
    _check_flatbuffers()
    shapes = jax.tree.map(_shape, variables)
    named, treedef = named_leaves(shapes), jax.tree.structure(shapes)

    def function(leaves: dict[str, Any], x: PyTree) -> PyTree:
        return apply_fn(jax.tree.unflatten(treedef, [leaves[name] for name in named]), x)

    fixed = jax.tree.map(_shape, inputs)
    outputs = jax.eval_shape(function, named, fixed)  # what is wrong with any batch is said by the function itself
    for what, tree in (("inputs", fixed), ("results", outputs)):
        if not _is_plain(tree):
            raise ValueError(f"The {what} are {jax.tree.structure(tree)}: use dicts, lists and tuples in a program.")
    lower = export.export(jax.jit(function), platforms=platforms)
    if not symbolic_batch:
        return bytes(lower(named, fixed).serialize(vjp_order=0))
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(fixed)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"The inputs have the shapes {[leaf.shape for leaf in jax.tree.leaves(fixed)]}, which have no common first "
            "axis: pass inputs with a batch axis, or symbolic_batch=False."
        )
    (batch,) = export.symbolic_shape("batch")
    free = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), fixed)
    try:
        exported = lower(named, free)
    except Exception as error:  # of any kind: raised by the user's function, at sizes it was not written for
        raise ValueError(
            f"The program depends on the batch size ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
            "Write it for any batch (x.reshape(x.shape[0], -1), no number for the batch, no if on it), or pass "
            f"symbolic_batch=False for the batch of {next(iter(sizes))[0]}."
        ) from error
    return bytes(exported.serialize(vjp_order=0))


@checked_but("program")
def load_stablehlo(program: bytes) -> Callable[[PyTree, PyTree], PyTree]:
    """Read a program that `export_stablehlo` wrote.

    Args:
        program: Its bytes. Nothing of them is executed as Python.

    Returns:
        `function(variables, inputs)`, jitted. Variables are found by the names of their leaves: the tree that was
        exported does, and so do the nested dicts of `load_arrays`.

    Raises:
        ImportError: No flatbuffers.
        ValueError: Other bytes, or those of a newer JAX. When it is called: variables that miss a leaf, have one more,
            or have one of another shape or dtype.

    Cost:
        None; the first call with each batch size compiles.
    """
    _check_flatbuffers()
    try:
        exported = export.deserialize(bytearray(program))
        (named, _), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    except Exception as error:  # the readers of bytes raise what they like
        raise ValueError(
            f"The bytes are no program of export_stablehlo, or of a newer JAX than {jax.__version__}: export it again."
        ) from error
    call = jax.jit(exported.call)

    def function(variables: PyTree, inputs: PyTree) -> PyTree:
        leaves = named_leaves(variables)
        for name in sorted(leaves.keys() ^ named.keys()):
            raise ValueError(
                f"The program has the leaves {sorted(named)}, and '{name}' is only "
                f"{'among the variables' if name in leaves else 'there'}: pass the variables that were exported."
            )
        for name, leaf in leaves.items():
            found, wanted = _shape(leaf), named[name]
            if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"Leaf '{name}' is {found.dtype}{list(found.shape)}, the program takes "
                    f"{wanted.dtype}{list(wanted.shape)}: export the function with these variables."
                )
        return call(leaves, inputs)

    return function


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _is_plain(tree: PyTree) -> bool:
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    if type(tree) in {list, tuple}:
        return all(map(_is_plain, tree))
    return tree is None or isinstance(tree, jax.ShapeDtypeStruct)


def _check_flatbuffers() -> None:
    if find_spec("flatbuffers") is None:
        raise ImportError("Exported programs need flatbuffers: pip install 'woodjax[deploy]'.")
