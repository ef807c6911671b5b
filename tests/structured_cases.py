"""What the tests of structured pruning share: random plans, and how a shrunk network is held against the masked one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import woodjax as wj
from woodjax.programs import inner_programs
from woodjax.tree import path_name


class Case(NamedTuple):
    """A small program, and the groups that must be found in it."""

    apply_fn: Callable[[Any, Any], Any]
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[int, ...]
    groups: dict[str, int]
    union: dict[str, int] | None = None  # where they differ
    unknown: str = "error"


def arrays(shapes: dict[str, tuple[int, ...]], dtype=jnp.float32, seed: int = 0):
    """Random arrays; of statistics and scales only positive ones."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            rng.uniform(0.3, 1.3, shape) * rng.choice([-1, 1], shape)
            if name[:3] not in ("var", "sca")
            else rng.uniform(0.5, 1.5, shape),
            dtype,
        )
        for name, shape in shapes.items()
    }


def filled_in(shapes):
    """Random variables, without zeros and ones that would hide an error; variances are positive."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        values = rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1], leaf.shape) / np.sqrt(fan_in)
        return np.asarray(abs(values) if "var" in path_name(path) else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_channels(groups, seed: int, *, implants: bool = False):
    """About 60 % of every group, at random places, and implants for a third of them, where there can be any."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups.groups:
        at = rng.permutation(group.size)[: max(1, round(0.6 * group.size))]
        kept[group.name] = np.isin(np.arange(group.size), at)
    drawn = {name: mask & (rng.random(len(mask)) < 0.35 * implants) for name, mask in kept.items()}
    return kept, {name: mask & (name in groups.implantable) for name, mask in drawn.items()}


def masked(plan, variables):
    """The whole variables, with zeros for what goes."""
    masks = {leaf.path: leaf.mask() for leaf in plan.leaves}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * masks[path_name(path)], variables)


def assert_close(found, expected, tolerance: float = 2e-5):
    """Equal to float error, relative to the largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(), 1e-30))


def assert_counts(apply_fn, groups, kept, implanted, variables, inputs):
    """Parameters and multiply-adds are those of the shrunk network, counted in its own program."""
    plan = wj.make_plan(groups, kept, implanted)
    small = jax.eval_shape(plan.shrink, variables)
    assert groups.parameters(kept, implanted) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(small))
    assert groups.macs(kept, implanted) == multiply_adds(wj.shrunk_network(apply_fn, plan), small, inputs)


def multiply_adds(function, *arguments) -> int:
    """Multiply-adds of a call, those in the padding of convolutions included."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(program) -> int:
    total = 0
    for equation in program.eqns:
        inner = sum(_count(body) for body in inner_programs(equation))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += _size(equation.outvars[0]) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        if equation.primitive.name == "conv_general_dilated":
            _outputs, *reads = equation.params["dimension_numbers"].rhs_spec
            total += _size(equation.outvars[0]) * math.prod(equation.invars[1].aval.shape[i] for i in reads)
    return total


def _size(variable) -> int:
    return math.prod(variable.aval.shape)


def sizes(groups) -> dict[str, int]:
    """Names and sizes of groups."""
    return {group.name: group.size for group in groups.groups}


def check(case: Case, streams: str, seeds: Sequence[int]):
    """The expected groups, and for random plans the same output as the masked network and the right counts."""
    variables, rng = arrays(case.shapes), np.random.default_rng(1)
    inputs, more = (jnp.asarray(rng.normal(size=(n, *case.inputs)), jnp.float32) for n in (1, 3))
    groups = wj.channel_groups(case.apply_fn, variables, inputs, streams=streams, unknown=case.unknown)
    expected = case.union if streams == "union" and case.union is not None else case.groups
    assert sizes(groups) == expected
    for seed in seeds:
        kept, implanted = random_channels(groups, seed, implants=True)
        assert_counts(case.apply_fn, groups, kept, implanted, variables, inputs)
        for implants in (None, implanted) if groups.kernels else (None,):
            plan = wj.make_plan(groups, kept, implants)
            found = wj.shrunk_network(case.apply_fn, plan)(plan.shrink(variables), more)
            assert_close(found, case.apply_fn(masked(plan, variables), more))
