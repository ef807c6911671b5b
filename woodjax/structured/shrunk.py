"""A network that runs on what stays of its variables, whatever its code says of widths."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from woodjax.structured.axes import KEPT, Value, filled
from woodjax.structured.implants import is_implanted
from woodjax.structured.plan import PrunePlan
from woodjax.structured.reading import Reading, Traced, read_program, staying
from woodjax.structured.running import Running
from woodjax.structured.walk import Walk
from woodjax.tree import path_name
from woodjax.typing import ApplyFn, Batch


@dataclass(frozen=True)
class ShrunkNetwork:
    """`network(variables, inputs)` on the variables that a plan leaves. Made by `shrunk_network`."""

    apply_fn: ApplyFn
    plan: PrunePlan

    def __call__(self, variables: PyTree, inputs: Batch) -> Any:
        """Run the network.

        Args:
            variables: What the plan leaves.
            inputs: As the whole network takes them.

        Returns:
            What the whole network returns.

        Raises:
            ValueError: Variables that the plan does not leave; inputs for which other channels go together than for
                the example that the groups were found with.
        """
        paths, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_implanted)
        plans = {plan.path: plan for plan in self.plan.leaves}
        whole = []
        for path, leaf in paths:
            plan = plans.get(path_name(path))
            if plan is None or tuple(leaf.shape) != plan.small:
                raise ValueError(
                    f"Leaf '{path_name(path)}' has shape {tuple(leaf.shape)}, expected "
                    f"{None if plan is None else plan.small}: pass plan.shrink(variables)."
                )
            whole.append(jax.ShapeDtypeStruct(plan.shape, leaf.dtype))
        missing = [plan.path for plan in self.plan.leaves if plan.path not in {path_name(path) for path, _ in paths}]
        if missing:
            raise ValueError(f"Leaves {missing} are not among the variables: pass plan.shrink(variables).")
        full = jax.tree.unflatten(structure, whole)
        traced = Traced.of(self.apply_fn, full, inputs)
        cuts = {}
        for i, plan in enumerate(self.plan.leaves):
            for k, axis in enumerate(plan.axes):
                behind = [int(np.prod(axis.sizes[j:])) for j in range(1, len(axis.sizes))]
                if behind:
                    cuts[i, k] = frozenset(behind)
        barriers = self.plan.unknown == "barrier"
        reading = read_program(traced, union=self.plan.streams == "union", barriers=barriers, cuts=cuts)
        running = Running(reading.solver, staying(reading.solver, self._independent(reading, inputs)))
        walk = Walk(reading.solver, barriers=barriers, running=running)
        arrays = [a if is_implanted(a) else jnp.asarray(a) for a in (*(a for _, a in paths), *jax.tree.leaves(inputs))]
        outputs = walk.program(traced.jaxpr, traced.consts, reading.items(arrays))
        results = []
        for item, variable in zip(outputs, traced.jaxpr.outvars, strict=True):
            whole = Value(tuple(filled(size, KEPT) for size in variable.aval.shape))
            results.append(running.fitted(item, whole))
        return jax.tree.unflatten(traced.result, results)

    def _independent(self, reading: Reading, inputs: Batch) -> dict[int, bool]:
        unions, found = reading.solver.unions(), {KEPT: True}
        for plan, axes in zip(self.plan.leaves, reading.leaves, strict=True):
            for axis_plan, axis in zip(plan.axes, axes, strict=True):
                same = [factor.size for factor in axis] == list(axis_plan.sizes)
                for factor, kept in zip(axis, axis_plan.kept, strict=False):
                    roots = reading.solver.roots(factor.units)
                    stays = np.ones(len(roots), bool) if kept is None else np.isin(np.arange(len(roots)), kept)
                    for root, stay in zip(map(int, roots), map(bool, stays), strict=True):
                        same &= root in unions or found.setdefault(root, stay) == stay
                if not same:
                    shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(inputs)]
                    raise ValueError(
                        f"The plan leaves {plan.small} of leaf '{plan.path}' {plan.shape}, but for inputs of shape "
                        f"{shapes} other channels go together in the program: find the groups with such an example."
                    )
        return found


def shrunk_network(apply_fn: ApplyFn, plan: PrunePlan) -> ShrunkNetwork:
    """The network on the variables that a plan leaves, whatever its code says of widths.

    The program of the whole network runs with the operands that are left: shapes, slices and groups in it are made
    smaller, constants stay. No module is rebuilt, nothing depends on a framework, and the result is the output of the
    whole network with zeros for what went, to rounding.

    Args:
        apply_fn: `apply_fn(variables, inputs)`, the network that the groups were found in.
        plan: What stays.

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
    return ShrunkNetwork(apply_fn, plan)
