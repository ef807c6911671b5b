"""Valid calls of `robustness_cases` with one argument spoiled at a time, and what became of them.

| outcome | |
|---|---|
| `right` | an answer that passes the checks of `_wrong` |
| `refused` | a `ValueError` or `TypeError` raised by woodjax's own code |
| `shown` | NaN or infinity went in, and is seen in the answer |
| `passed on` | the user's own function raised |
| `defect` | anything else |
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import robustness_cases as cases

import woodjax

# By default JAX takes its own frames out of a traceback, and an error from deep inside would look like one of ours.
jax.config.update("jax_traceback_filtering", "off")
PACKAGE = Path(woodjax.__file__).parent
Expected = Literal["refuse", "either", "nonfinite"]
OUTCOMES = ("right", "refused", "shown", "passed on", "defect")
BATCHES = ("batch", "inputs", "hidden", "targets")
FRACTIONS = ("sparsity", "target", "held_out", "floor", "confidence", "ratio", "budget", "max_ratio", "level")
# Integers that may be zero or negative, and what is not a number of things.
ANY_INTEGER = (
    "batch_axes",
    "axis",
    "seed",
    "start",
    "iterations",
    "swaps",
    "held_out",
    "step",
    "size",
    "begin",
    "rounds",
)
# Decisions: a network or masks come out, in which a NaN would be lost.
DECIDES = (
    "budget_masks", "column_sweep", "exact_obs", "make_masks", "pattern_masks", "prune_at_init", "prune_layers",
    "prune_one_shot", "prune_to_loss", "refresh_masks", "search_masks", "select_channels",
)  # fmt: skip


# What looks spoiled and is not, by function and argument, with the reason.
FINE = {
    ("HostLayer", "params"): "a layer may have no parameters",
    ("StageCheckpoints", "params"): "checked when a stage is saved",
    ("apply_masks", "masks"): "a mask has the shape of the last axes",
    ("budget_masks", "costs"): "one number a leaf",
    ("budget_masks", "scores"): "a cost is of a leaf, whatever its size",
    ("column_sweep", "kernel"): "any number of outputs",
    ("compensate_channels", "kept"): "groups that are not named stay whole",
    ("cost_table", "costs"): "a table without rows",
    ("expand_group_masks", "kept"): "a leaf may have no groups",
    ("from_bcoo", "tree"): "leaves that are not sparse stay",
    ("joint_steps_gram", "dampings"): "any number of them",
    ("load_arrays", "like"): "only the structure is read",
    ("load_masks", "like"): "only the structure is read",
    ("make_plan", "kept"): "groups that are not named stay whole",
    ("nonfinite_scores", "scores"): "none of no leaves",
    ("normalize_scores", "scores"): "no groups",
    ("random_scores", "batch"): "not read",
    ("reconstruct_channels", "kept"): "groups that are not named stay whole",
    ("reconstruct_channels", "params"): "leaves that no group goes through stay",
    ("reestimate_batch_stats", "batch_stats"): "no statistics, nothing to do",
    ("reestimate_batch_stats", "params"): "for the user's own function",
    ("split_batch", "batch"): "any number of parts",
    ("warm_up_batch_stats", "batch_stats"): "no statistics, nothing to do",
    ("warm_up_batch_stats", "params"): "for the user's own function",
    ("unpack_nm", "tree"): "leaves that are not packed stay",
    ("weight_macs", "params"): "a leaf that is not read has no multiply-adds",
}
# Called by woodjax itself with one leaf, and not by users with what they have; or an error of `einsum` that is clear.
ONLY_VALID = ("contract", "is_kernel", "path_name")


@dataclass(frozen=True)
class Spoiled:
    """One call with one argument spoiled."""

    function: str
    argument: str
    mutation: str
    expected: Expected
    spoil: Callable[[Any], Any]


@dataclass(frozen=True)
class Outcome:
    """What became of it, and the words of the error or of what is wrong."""

    kind: str
    words: str = ""


def spoiled_calls(name: str) -> Iterator[Spoiled]:
    """Every spoiled call of a function."""
    if name in ONLY_VALID:
        return
    function, arguments = cases.call_of(name)
    parameters = inspect.signature(function).parameters
    trees = [key for key, value in arguments.items() if _is_tree(value) and key not in BATCHES]
    for argument, value in arguments.items():
        may_be_none = argument in parameters and (
            parameters[argument].default is None or type(None) in get_args(parameters[argument].annotation)
        )
        for mutation, expected, spoil in _mutations(argument, value, len(trees) > 1):
            if not (mutation == "None" and may_be_none):
                if (name, argument) in FINE and mutation not in ("None", "text"):
                    expected = "either" if expected == "refuse" else expected
                yield Spoiled(name, argument, mutation, expected, spoil)


def run(spoiled: Spoiled) -> Outcome:
    """Make the call and judge what comes of it."""
    function, arguments = cases.call_of(spoiled.function)
    arguments[spoiled.argument] = spoiled.spoil(arguments[spoiled.argument])
    try:
        result = jax.block_until_ready(call(function, arguments))
    except Exception as error:
        return _judge_error(error)
    if spoiled.expected == "refuse":
        return Outcome("defect", f"accepted, returned {str(result)[:200]}")
    if spoiled.function.endswith("_schedule") or callable(result):
        return Outcome("right")
    wrong = _wrong(spoiled, arguments, result)
    if spoiled.expected == "nonfinite" and wrong and spoiled.function not in DECIDES:
        return Outcome("shown")
    return Outcome("defect", wrong) if wrong else Outcome("right")


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call by keywords, but for a parameter that takes any number of arguments."""
    many = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_POSITIONAL]
    if not many:
        return function(**arguments)
    (first, *_), rest = [value for key, value in arguments.items() if key not in many], arguments[many[0]]
    return function(first, *rest)


def _judge_error(error: Exception) -> Outcome:
    words = f"{type(error).__name__}: {str(error)[:300]}"
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if any(frame.name == "robustness_cases.py" for frame in frames):
        return Outcome("passed on", words)
    raised_here = PACKAGE in frames[-1].parents or frames[-1].name == "robustness_calls.py"
    if raised_here and type(error) in (ValueError, TypeError):
        return Outcome("refused", words)
    return Outcome("defect", f"{words} at {frames[-1].name}")


def _wrong(spoiled: Spoiled, arguments: dict[str, Any], result: Any) -> str:
    """What is wrong with an answer: not finite, or not as many weights pruned as asked."""
    for leaf in jax.tree.leaves(result):
        array = (
            np.asarray(leaf) if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
        )
        if array is not None and jnp.issubdtype(array.dtype, jnp.inexact):
            unsound = np.isnan(array) | np.isneginf(array)
            if unsound.any():
                return f"{unsound.sum()} of {array.size} not finite"
    counted = spoiled.argument == "sparsity" and spoiled.mutation in ("none", "all")
    if counted and spoiled.function in ("make_masks", "prune_one_shot", "prune_at_init", "exact_obs", "pattern_masks"):
        masks = result if spoiled.function in ("make_masks", "pattern_masks") else result[-2]
        masks = result[0] if spoiled.function == "prune_at_init" else masks
        selected = [mask for mask in jax.tree.leaves(masks) if mask.dtype == bool and mask.ndim == 2]
        pruned = sum(int(np.sum(~np.asarray(mask))) for mask in selected)
        before = arguments.get("previous", arguments.get("masks"))
        least = 0 if before is None else sum(int(np.sum(~np.asarray(mask))) for mask in jax.tree.leaves(before))
        wanted = sum(mask.size for mask in selected) if spoiled.mutation == "all" else least
        if pruned != wanted:
            return f"{pruned} weights pruned, not {wanted}"
    return ""


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict | jax.Array | np.ndarray) and not _is_key(value) and bool(jax.tree.leaves(value))


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _constant(mutation: str, value: Any, expected: Expected = "refuse") -> tuple[str, Expected, Callable[[Any], Any]]:
    return mutation, expected, lambda _: value


def _mutations(argument: str, value: Any, related: bool) -> Iterator[tuple[str, Expected, Callable[[Any], Any]]]:
    if argument in ("operands", "held_out_losses"):
        return
    if argument != "tree" or not isinstance(value, dict):
        yield _constant("None", None)
    if not isinstance(value, str | Path):
        yield _constant("text", "nonsense")
    if isinstance(value, str):
        yield _constant("unknown word", "nonsense")
        yield _constant("number for a word", 3)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        yield from _integers(argument)
    elif isinstance(value, float):
        yield from _numbers(argument)
    elif _is_key(value):
        yield _constant("number for a key", 3)
        yield _constant("floats for a key", jnp.ones(3))
    elif argument in BATCHES:
        yield from _of_batch(value)
    elif _is_tree(value) and not callable(next(iter(jax.tree.leaves(value)))):
        yield from _of_tree(value, related)
    else:
        yield _constant("number for an object", 3)


def _integers(argument: str) -> Iterator[tuple[str, Expected, Callable[[Any], Any]]]:
    free = argument in ANY_INTEGER
    yield _constant("zero", 0, "either" if free else "refuse")
    yield _constant("minus one", -1, "either" if free else "refuse")
    yield _constant("2.5", 2.5, "either" if argument in ("held_out", "size", "memory_budget") else "refuse")
    if argument not in (
        "probes",
        "iterations",
        "repeats",
        "swaps",
        "size",
        "stages",
        "rounds",
        "recomputations",
        "end",
    ):
        yield _constant("a million", 10**6, "either")


def _numbers(argument: str) -> Iterator[tuple[str, Expected, Callable[[Any], Any]]]:
    yield _constant("NaN", float("nan"))
    if "damping" in argument or argument == "alpha":
        for mutation, number in (("zero", 0.0), ("minus one", -1.0), ("infinity", float("inf"))):
            yield _constant(mutation, number)
        yield _constant("tiny", 1e-30, "either")
        yield _constant("huge", 1e30, "either")
    elif argument in FRACTIONS:
        yield _constant("below zero", -0.1)
        yield _constant("above one", 1.1)
        yield _constant("none", 0.0, "either")
        yield _constant("all", 1.0, "either")
    else:
        for mutation, number in (("zero", 0.0), ("minus one", -1.0), ("huge", 1e30), ("infinity", float("inf"))):
            yield _constant(mutation, number, "either")


def _of_batch(value: Any) -> Iterator[tuple[str, Expected, Callable[[Any], Any]]]:
    yield "examples without an axis", "either", lambda v: jax.tree.map(lambda x: x.reshape(-1)[0], v)
    yield "no examples", "refuse", lambda v: jax.tree.map(lambda x: x[:0], v)
    yield "leaf of text", "refuse", lambda v: jax.tree.map(lambda _: "text", v)
    yield "NaN", "nonfinite", lambda v: jax.tree.map(_with(jnp.nan), v)
    yield "infinity", "nonfinite", lambda v: jax.tree.map(_with(jnp.inf), v)
    yield "empty tree", "refuse", lambda _: ()
    if isinstance(value, tuple):
        yield "different lengths", "refuse", lambda v: (v[0], v[1][:-1])
        yield "a part missing", "refuse", lambda v: v[:1]


def _of_tree(value: Any, related: bool) -> Iterator[tuple[str, Expected, Callable[[Any], Any]]]:
    alone: Expected = "refuse" if related else "either"
    if isinstance(value, dict):
        first = next(iter(value))
        yield "key missing", alone, lambda v: {key: leaf for key, leaf in v.items() if key != first}
        yield "key too many", alone, lambda v: v | {"extra": jax.tree.leaves(v)[0]}
        yield "other structure", alone, jax.tree.leaves
        yield "empty tree", "refuse", lambda _: {}
        yield "leaf of text", "refuse", lambda v: _at(v, lambda _: "text")
    if jnp.ndim(jax.tree.leaves(value)[0]) == 0:
        return
    yield "wrong shape", alone, lambda v: _at(v, lambda x: np.concatenate([x, x], axis=-1))
    yield "empty leaf", alone, lambda v: _at(v, lambda x: x[..., :0])
    yield "scalar leaf", alone, lambda v: _at(v, lambda x: x.reshape(-1)[0])
    kind = jnp.result_type(jax.tree.leaves(value)[0])
    if jnp.issubdtype(kind, jnp.floating):
        yield "complex leaf", "either", lambda v: _at(v, lambda x: x.astype(np.complex64))
        yield "integer leaf", "either", lambda v: _at(v, lambda x: x.astype(np.int32))
        yield "bool leaf", "either", lambda v: _at(v, lambda x: x > 0)
        yield "bfloat16", "either", lambda v: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), v)
        yield "float16", "either", lambda v: jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), v)
        yield "NaN", "nonfinite", lambda v: _at(v, _with(jnp.nan))
        yield "infinity", "nonfinite", lambda v: _at(v, _with(jnp.inf))
    elif jnp.issubdtype(kind, jnp.bool_):
        yield "floats for masks", "refuse", lambda v: jax.tree.map(lambda x: x.astype(np.float32), v)
        yield "integers for masks", "refuse", lambda v: jax.tree.map(lambda x: x.astype(np.int32), v)


def _at(tree: Any, change: Callable[[Any], Any]) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    at = max(range(len(leaves)), key=lambda i: np.ndim(leaves[i]))  # a kernel
    return jax.tree.unflatten(treedef, [change(leaf) if i == at else leaf for i, leaf in enumerate(leaves)])


def _with(value: float) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        return x.at[(0,) * x.ndim].set(value) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return lambda x: change(jnp.asarray(x))
