"""At the door of a public function: is each argument of the kind that its annotation says?

One mechanism for all of them, so that a wrong argument is named here and not by an error from deep inside JAX. What an
annotation cannot say (two trees that must be alike, a number in a range) is checked where it is used.
"""

import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, PyTree

F = TypeVar("F", bound=Callable[..., Any])
# What an annotation cannot say of an argument, by its name.
COUNTS = ("block_size", "examples_per_gradient", "keep", "microbatch_size", "probes_at_once", "samples", "window_size")
EXAMPLES = ("batch", "inputs")
CONTAINERS = (Mapping, Sequence, Iterable, dict, list, tuple)


def checked(function: F) -> F:
    """Check the arguments of every call by the annotations of the parameters.

    Args:
        function: With annotated parameters, or a class, of which the constructor is checked. Arrays may be traced:
            only shapes and dtypes are read.

    Returns:
        The function; it raises a `ValueError` that names the argument, and the leaf of a tree.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)
        return function
    return _guarded(function, ())


def checked_but(*own: str) -> Callable[[F], F]:
    """`checked`, but for arguments that the function checks itself, with more to say: of arrays only their shape.

    Args:
        *own: Their names.

    Returns:
        A decorator.
    """
    return lambda function: _guarded(function, own)


def _guarded(function: F, own: tuple[str, ...]) -> F:
    signature = inspect.signature(function)
    hints = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not parameter.empty
        and (name not in own or _is_array(parameter.annotation))
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }

    @wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        sizes: dict[str, tuple[int, str]] = {}
        try:
            given = signature.bind(*args, **keywords).arguments
        except TypeError:  # an argument is missing or has another name: Python's own error names the function
            return function(*args, **keywords)
        for name, value in given.items():
            hint = hints.get(name, Any)
            if value is signature.parameters[name].default:
                continue
            if not _fits(hint, value):
                raise ValueError(f"{name} is {_describe(value)}: pass {' or '.join(_wanted(hint))}.")
            for part in _parts(hint):
                if _is_tree(part) and value is not None and not _is_made(hint, value):
                    _check_leaves(value, name)
                elif _is_array(part) and hasattr(value, "shape") and name not in own:
                    _check_dims(part, value, name, sizes)
            if name in COUNTS and isinstance(value, numbers.Real) and value < 1:
                raise ValueError(f"{name} is {value}: pass at least 1{', or None' * (NoneType in _parts(hint))}.")
            if name == "damping" and _known(value) and not 0 < value < math.inf:
                raise ValueError(f"damping is {float(value)}: it must be positive and finite.")
        return function(*args, **keywords)

    return cast(F, run)


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_made(hint: Any, value: Any) -> bool:
    """Is it an object of one of the classes that may stand for a tree, such as a stream?"""
    return any(type(part) is type and isinstance(value, part) for part in _parts(hint))


def _known(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (_is_scalar(value, jnp.number) and not isinstance(value, jax.core.Tracer))


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    origin = get_origin(hint)
    if len(parts := _parts(hint)) > 1:
        return any(_fits(part, value) for part in parts)
    if hint in (None, NoneType):
        return value is None
    if origin is Literal:
        return isinstance(value, str)  # which of them: asked where it is used, with the mend
    if origin is Callable:
        return callable(value)
    if origin in CONTAINERS:
        return _is_container(hint, origin, value)
    if _is_tree(hint):
        return value is not None and not isinstance(value, str)
    if hint is int:
        return not isinstance(value, bool) and (isinstance(value, numbers.Integral) or _is_scalar(value, jnp.integer))
    if hint is float:
        return not isinstance(value, bool) and (
            (isinstance(value, numbers.Real) and not math.isnan(value)) or _is_scalar(value, jnp.number)
        )
    if _is_array(hint):
        return _has_dtype(hint, value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    if isinstance(hint, type) and hint not in (bool, object) and not hasattr(hint, "__jaxtyping__"):
        protocol = getattr(hint, "_is_protocol", False)
        return isinstance(value, hint) if not protocol or getattr(hint, "_is_runtime_protocol", False) else True
    return True


def _is_container(hint: Any, origin: type, value: Any) -> bool:
    if origin in (Sequence, Iterable) and isinstance(value, jax.Array | np.ndarray):
        return value.ndim > 0
    if isinstance(value, str) or not isinstance(value, origin):
        return False
    one = next(reversed([part for part in get_args(hint) if part is not Ellipsis]), Any)
    if not isinstance(value, list | tuple | dict) or len(set(get_args(hint)) - {Ellipsis, str}) != 1 or _is_array(one):
        return True
    return all(_fits(one, part) for part in (value.values() if isinstance(value, dict) else value))


def _is_tree(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, PyTree)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _is_scalar(value: Any, kind: Any) -> bool:
    return hasattr(value, "dtype") and value.shape == () and jnp.issubdtype(value.dtype, kind)


def _has_dtype(hint: Any, value: Any) -> bool:
    if not hasattr(value, "dtype"):
        kinds = {"int32", "float32"} if isinstance(value, numbers.Integral) else {"float32"}
        fits = not isinstance(hint.dtypes, list | tuple) or not kinds.isdisjoint(hint.dtypes)
        return hint.dim_str in ("", "...") and isinstance(value, numbers.Real) and fits
    if "prng_key" in hint.dtypes and value.dtype == jnp.uint32:
        return value.shape in ((2,), (4,))  # keys as they were before jax.random.key
    names = str(value.dtype).replace("key<fry>", "prng_key")
    names = "prng_key" if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else names
    return not isinstance(hint.dtypes, list | tuple) or any(re.fullmatch(kind, names) for kind in hint.dtypes)


def _check_dims(hint: Any, value: Any, name: str, sizes: dict[str, tuple[int, str]]) -> None:
    dims = hint.dim_str.split()
    if not all(dim.isidentifier() for dim in dims) or "prng_key" in hint.dtypes:
        return
    shape = tuple(value.shape)
    if len(shape) != len(dims):
        raise ValueError(f"{name} has shape {shape}: pass an array [{', '.join(dims)}].")
    for dim, size in zip(dims, shape, strict=True):
        known, where = sizes.setdefault(dim, (size, name))
        if size != known:
            raise ValueError(
                f"{name} has shape {shape}, expected [{', '.join(dims)}] with {dim} = {known} as in {where}: make them "
                "alike."
            )
        if size == 0:
            raise ValueError(f"{name} has shape {shape}: pass an array that is not empty.")


def _check_leaves(tree: Any, name: str) -> None:
    leaves = jax.tree.leaves(tree)
    if name in EXAMPLES and not leaves:
        raise ValueError(f"{name} has no leaf: pass arrays with the examples along the first axis.")
    for place, leaf in enumerate(leaves):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise ValueError(f"{_where(tree, place, name)} is {_describe(leaf)}: pass a tree of arrays.")
        shape = getattr(leaf, "shape", ())
        if name in EXAMPLES and shape[:1] == (0,):
            raise ValueError(f"{_where(tree, place, name)} has shape {shape}: pass a non-zero number of examples.")


def _where(tree: Any, place: int, name: str) -> str:
    """The path of a leaf, written only for an error: it takes longer than all checks."""
    path, _ = jax.tree_util.tree_leaves_with_path(tree)[place]
    return f"leaf '{jax.tree_util.keystr(path, simple=True, separator='/')}' of {name}" if path else name


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    return f"a {type(value).__name__}"


def _wanted(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if len(parts := _parts(hint)) > 1:
        return list(dict.fromkeys(text for part in parts for text in _wanted(part)))
    if hint in (None, NoneType):
        return ["None"]
    if origin is Literal:
        return [repr(word) for word in get_args(hint)]
    if origin is Callable:
        return ["a function"]
    if _is_tree(hint):
        return ["a tree of arrays"]
    if _is_array(hint):
        if "prng_key" in hint.dtypes:
            return ["a key such as jax.random.key(0)"]
        return [f"an array of {hint.dtype.__name__.lower()}" + (f" [{hint.dim_str}]" if hint.dim_str else "")]
    plain = {int: "an integer", float: "a number", str: "a text"}
    return [plain.get(hint, f"a {getattr(origin or hint, '__name__', hint)}")]
