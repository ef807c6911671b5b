"""A network that runs on what stays of its variables, whatever its code says of widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from woodjax.door import checked
from woodjax.structured.axes import KEPT, Place, Value, kept_axes
from woodjax.structured.implants import is_implanted
from woodjax.structured.matching import match
from woodjax.structured.plan import PrunePlan
from woodjax.structured.reading import Reading, Traced, read_program, staying
from woodjax.structured.running import Running
from woodjax.structured.staying import LeafPlan
from woodjax.structured.walk import Walk
from woodjax.typing import Batch, PyTree


@dataclass(frozen=True)
class ShrunkNetwork:
    """`network(variables, inputs)` on the variables that a plan leaves. Made by `shrunk_network`."""

    apply_fn: Callable[[PyTree, Batch], Any]
    plan: PrunePlan
    updates: bool = False

    def __call__(self, variables: PyTree, inputs: Batch) -> Any:
        """Run the network.

        Args:
            variables: What the plan leaves.
            inputs: As the whole network takes them.

        Returns:
            What the whole network returns.

        Raises:
            ValueError: Variables that the plan does not leave; inputs for which other channels go together than for
                the example that the groups were found with, or of sizes that are symbols.
        """
        for leaf in jax.tree.leaves(inputs):
            if not all(isinstance(size, int) for size in jnp.shape(leaf)):
                raise ValueError(
                    f"Inputs of shape {jnp.shape(leaf)}: a shrunk program is made for sizes that are numbers. Use one "
                    "size of a batch, or the model's own code on the smaller arrays (with_shapes_of in the adapters)."
                )
        small = [leaf._replace(shape=leaf.small) for leaf in self.plan.leaves]
        whole = dict(zip(small, self.plan.leaves, strict=True))
        found = match(small, variables)
        missing = {leaf.path for leaf in small} - {leaf.path for leaf, _, _ in found if leaf is not None}
        if missing:
            raise ValueError(f"Variables without the leaves {sorted(missing)}: pass plan.shrink(variables).")
        plans = [None if leaf is None else whole[leaf] for leaf, _, _ in found]
        shapes = [
            jax.ShapeDtypeStruct(jnp.shape(leaf) if plan is None else plan.shape, leaf.dtype)
            for plan, (_, _, leaf) in zip(plans, found, strict=True)
        ]
        full = jax.tree.unflatten(jax.tree.structure(variables, is_leaf=is_implanted), shapes)
        traced = Traced.of(self.apply_fn, full, inputs)
        union, barriers = self.plan.streams == "union", self.plan.unknown == "barrier"
        outputs = len(jax.tree.leaves(traced.result[0])) if self.updates else None
        reading = read_program(traced, union=union, barriers=barriers, cuts=_cuts(plans), whole=outputs)
        running = Running(reading.solver, staying(reading.solver, _independent(reading, plans, inputs)))
        walk = Walk(reading.solver, barriers=barriers, running=running)
        arrays = [leaf for _, _, leaf in found] + [jnp.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
        results = walk.program(traced.jaxpr, traced.consts, reading.items(arrays))
        wanted = self._wanted(traced, reading)
        fitted = [running.fitted(item, value) for item, value in zip(results, wanted, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(traced.result), fitted)

    def _wanted(self, traced: Traced, reading: Reading) -> list[Value]:
        """Outputs whole, and updates as the variables are."""
        whole = [Value(kept_axes(variable.aval.shape)) for variable in traced.jaxpr.outvars]
        if not self.updates:
            return whole
        leaves = {path: Value(axes) for (path, _), axes in zip(traced.leaves, reading.leaves, strict=True)}
        described = [LeafPlan(path, shape, ()) for path, shape in traced.leaves]
        updates = match(described, traced.result[1])
        first = len(whole) - len(updates)
        for i, (leaf, _, _) in enumerate(updates):
            if leaf is not None:
                whole[first + i] = leaves[leaf.path]
        return whole


def _cuts(plans: Sequence[LeafPlan | None]) -> dict[Place, frozenset[int]]:
    cuts = {}
    for i, plan in enumerate(plans):
        for k, axis in enumerate(plan.axes if plan is not None else ()):
            behind = [int(np.prod(axis.sizes[j:])) for j in range(1, len(axis.sizes))]
            if behind:
                cuts[i, k] = frozenset(behind)
    return cuts


def _independent(reading: Reading, plans: Sequence[LeafPlan | None], inputs: Batch) -> dict[int, bool]:
    """For roots that are no unions: do they stay?"""
    unions, found = reading.solver.unions(), {KEPT: True}
    for plan, axes in zip(plans, reading.leaves, strict=True):
        for axis_plan, axis in zip(plan.axes if plan is not None else (), axes, strict=plan is not None):
            same = [factor.size for factor in axis] == list(axis_plan.sizes)
            for factor, kept in zip(axis, axis_plan.kept, strict=False):
                roots = reading.solver.roots(factor.units)
                stays = np.ones(len(roots), bool) if kept is None else np.isin(np.arange(len(roots)), kept)
                for root, stay in zip(map(int, roots), map(bool, stays), strict=False):
                    same &= root in unions or found.setdefault(root, stay) == stay
            if plan is not None and not same:
                shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(inputs)]
                raise ValueError(
                    f"The plan leaves {plan.small} of leaf '{plan.path}' {plan.shape}, but for inputs of shape "
                    f"{shapes} other channels go together in the program: find the groups with such an example."
                )
    return found


@checked
def shrunk_network(
    apply_fn: Callable[[PyTree, Batch], Any], plan: PrunePlan, *, updates: bool = False
) -> ShrunkNetwork:
    """The network on the variables that a plan leaves, whatever its code says of widths.

    The program of the whole network runs with the operands that are left: shapes, slices and groups in it are made
    smaller, constants stay. No module is rebuilt, nothing depends on a framework, and the result is the output of the
    whole network with zeros for what went, to rounding.

    Args:
        apply_fn: `apply_fn(variables, inputs)`, the network that the groups were found in.
        plan: What stays.
        updates: Does `apply_fn` return `(outputs, updates)`, as in train mode? Updates are variables that changed,
            batch statistics for example, found by the ends of their paths, and come back small.

    Returns:
        `network(small, inputs)`, a function of `plan.shrink(variables)` and a batch of any size that the network
        takes. It can be jitted, differentiated, mapped and exported, and is equal to another of the same function and
        plan. Call it under `jax.jit`: a call outside reads the program again.

    Raises:
        ValueError: When called: variables that the plan does not leave.

    Cost:
        That of the smaller network; once for each shape of the inputs, a trace and a reading of the program.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> plan = wj.make_plan(groups, {"hidden": np.array([True, False, False, True])})
        >>> network = jax.jit(wj.shrunk_network(apply_fn, plan))
        >>> network(plan.shrink(variables), jnp.ones((5, 3))).shape
        (5, 2)
    """
    return ShrunkNetwork(apply_fn, plan, updates)
