"""Reading a program for its channels, and running it on fewer of them: one walk for both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from woodjax.programs import PRODUCTS, bind
from woodjax.structured.axes import FREE, KEPT, Value, filled, kept_axes
from woodjax.structured.rules import RULES
from woodjax.structured.rules.moves import tied
from woodjax.structured.running import UNCHANGED, Running
from woodjax.structured.solver import Solver

REMATERIALISED = ("checkpoint", "remat", "remat2")  # by release of JAX
CONSTANT_SIZE = 2**16  # largest captured array that is looked at


class Item(NamedTuple):
    """What is known of a value and, when the program runs, the value: what stays of it."""

    value: Value
    array: Any = None


class Walk:
    """A walk through a program, which may run it.

    Attributes:
        solver: Of the units.
        barriers: Is a primitive that is not known taken to need all its channels, rather than an error?
        running: What stays, when the program runs.
        on_product: Called with each product or look-up, its operands and how often it runs.
    """

    def __init__(
        self,
        solver: Solver,
        *,
        barriers: bool,
        running: Running | None = None,
        on_product: Callable[[Any, Sequence[Value], int], None] | None = None,
    ) -> None:
        """Prepare a walk; see the attributes."""
        self.solver: Solver = solver
        self.barriers: bool = barriers
        self.running: Running | None = running
        self._on_product, self._times = on_product, 1
        self._within: list[Any] = []  # equations, each in the program of the one before

    def program(self, jaxpr: Any, consts: Sequence[Any], items: Sequence[Item]) -> list[Item]:
        """Walk through a jaxpr.

        Args:
            jaxpr: The program.
            consts: What it captured.
            items: Its inputs.

        Returns:
            Its outputs.

        Raises:
            ValueError: A primitive that is not known.
        """
        known = dict(zip(jaxpr.invars, items, strict=True))
        known.update(zip(jaxpr.constvars, map(_captured, consts), strict=True))

        def read(variable: Any) -> Item:
            if not isinstance(variable, core.Literal):
                return known[variable]
            return Item(Value((), np.asarray(variable.val)[()]), variable.val)  # an array in older releases of JAX

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(v) for v in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, items: list[Item]) -> list[Item]:
        self._within.append(equation)
        try:
            return self._followed(equation, items)
        finally:
            self._within.pop()

    def _followed(self, equation: Any, items: list[Item]) -> list[Item]:
        name, rule = equation.primitive.name, RULES.get(equation.primitive.name)
        if rule is not None:
            values = [item.value for item in items]
            spread = rule.spread(self.solver, equation, values)
            results = [value.made_by(values[0].leaf if name in UNCHANGED else None) for value in spread.results]
            if self._on_product is not None and name in (*PRODUCTS, "gather"):
                self._on_product(equation, values, self._times)
            if self.running is None:
                return [Item(value) for value in results]
            arrays = self.running.run(equation, items, spread, rule.params)
            return [Item(value, array) for value, array in zip(results, arrays, strict=True)]
        if name == "scan":
            return self._scan(equation, items)
        if name == "cond":
            return self._cond(equation, items)
        inner = _closed_programs(equation)
        if name in REMATERIALISED and self.running is not None:
            return self._checkpoint(equation, inner[0], items)
        if len(inner) == 1 and _takes(inner[0].jaxpr, equation):
            rule = _derivative_rule(equation, inner[0].jaxpr)
            if rule is None or self.running is None:
                return self.program(inner[0].jaxpr, inner[0].consts, items)
            return self._with_rule(rule, equation, inner[0], items)
        if name == "random_bits":  # any number of them will do
            values = [Value(tuple(filled(size, FREE) for size in v.aval.shape)) for v in equation.outvars]
            arrays = [None] * len(values) if self.running is None else self._whole(equation, items, self.running)
            return [Item(value, array) for value, array in zip(values, arrays, strict=True)]
        if not self.barriers and not name.startswith("random_"):
            lines = (source_info_util.summarize(outer.source_info) for outer in reversed(self._within))
            raise ValueError(
                f"Channels cannot be followed through '{name}' at {next(filter(None, lines), 'an unknown line')}: "
                "pass unknown='barrier' to keep all channels that go in, or write it otherwise."
            )
        return self._barrier(equation, items)

    def _checkpoint(self, equation: Any, body: Any, items: list[Item]) -> list[Item]:
        values: list[Value] = []

        def run(*arrays: Any) -> list[Any]:
            given = [item._replace(array=array) for item, array in zip(items, arrays, strict=True)]
            found = self.program(body.jaxpr, body.consts, given)
            values[:] = [item.value for item in found]
            return [item.array for item in found]

        options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
        arrays = jax.checkpoint(run, **options)(*(item.array for item in items))
        return [Item(value, array) for value, array in zip(values, arrays, strict=True)]

    def _with_rule(self, rule: Any, equation: Any, body: Any, items: list[Item]) -> list[Item]:
        """A function with a derivative that is not the one of its program: of the whole width, unless it is known."""
        running, self.running = self.running, None
        values = [item.value for item in self.program(body.jaxpr, body.consts, [Item(item.value) for item in items])]
        self.running = running
        assert running is not None
        if callable(rule):
            return [Item(values[0], rule(items[0].array))]
        arrays = self._whole(equation, items, running)
        whole = (
            Item(Value(kept_axes(variable.aval.shape)), a) for variable, a in zip(equation.outvars, arrays, strict=True)
        )
        return [Item(value, running.fitted(item, value)) for value, item in zip(values, whole, strict=True)]

    def _whole(self, equation: Any, items: list[Item], running: Running) -> list[Any]:
        values = [Value(kept_axes(variable.aval.shape)) for variable in equation.invars]
        return bind(equation, [running.fitted(item, value) for item, value in zip(items, values, strict=True)])

    def _barrier(self, equation: Any, items: list[Item]) -> list[Item]:
        for item in items:
            for axis in item.value.axes:
                self.solver.fix(axis)
        example = any(item.value.example for item in items)
        results = tuple(Value(kept_axes(variable.aval.shape), None, example) for variable in equation.outvars)
        if self.running is None:
            return [Item(value) for value in results]
        arrays = self._whole(equation, items, self.running)
        return [Item(value, array) for value, array in zip(results, arrays, strict=True)]

    def _scan(self, equation: Any, items: list[Item]) -> list[Item]:
        body, length = equation.params["jaxpr"], equation.params["length"]
        first, last = equation.params["num_consts"], equation.params["num_consts"] + equation.params["num_carry"]
        consts, start, stacked = [_no_leaf(item) for item in items[:first]], items[first:last], items[last:]
        for item in stacked:
            self.solver.fix(item.value.axes[0])
        slices = [Item(item.value._replace(axes=item.value.axes[1:], constant=None, leaf=None)) for item in stacked]
        quiet = Walk(self.solver, barriers=self.barriers)
        quiet._within = [*self._within]
        carry = [item.value._replace(leaf=None) for item in start]
        inputs = [Item(item.value) for item in consts]
        while True:  # what a step hands to the next one
            after = quiet.program(body.jaxpr, body.consts, [*inputs, *map(Item, carry), *slices])[: len(carry)]
            joined = [self._either([one, other.value]) for one, other in zip(carry, after, strict=True)]
            if all(self._alike(one, other) for one, other in zip(carry, joined, strict=True)):
                break
            carry = joined
        self._times *= length
        running, self.running = self.running, None
        outputs = self.program(body.jaxpr, body.consts, [*inputs, *map(Item, carry), *slices])
        self._times //= length
        self.running = running
        results = [*carry]
        results += [o.value._replace(axes=(filled(length, KEPT), *o.value.axes)) for o in outputs[len(carry) :]]
        if running is None:
            return [Item(value) for value in results]

        fitted = running.fitted

        def step(held: Sequence[Any], parts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            given = [*consts, *map(Item, carry, held), *map(Item, [item.value for item in slices], parts)]
            found = self.program(body.jaxpr, body.consts, given)
            handed = [fitted(item, value) for item, value in zip(found, carry, strict=False)]
            return handed, [item.array for item in found[len(carry) :]]

        begin = [fitted(item, value) for item, value in zip(start, carry, strict=True)]
        options = {name: equation.params[name] for name in ("reverse", "unroll")}
        arrays = lax.scan(step, begin, [fitted(item, item.value) for item in stacked], length, **options)
        return [Item(value, array) for value, array in zip(results, [*arrays[0], *arrays[1]], strict=True)]

    def _cond(self, equation: Any, items: list[Item]) -> list[Item]:
        index, *given = map(_no_leaf, items)
        branches, running = equation.params["branches"], self.running
        self.running = None
        found = [self.program(branch.jaxpr, branch.consts, [Item(item.value) for item in given]) for branch in branches]
        self.running = running
        values = [self._either([item.value for item in results]) for results in zip(*found, strict=True)]
        values = [value._replace(example=value.example or index.value.example) for value in values]
        if running is None:
            return [Item(value) for value in values]

        fitted = running.fitted

        def run(branch: Any) -> Callable[..., list[Any]]:
            def call(*arrays: Any) -> list[Any]:
                operands = [Item(item.value, array) for item, array in zip(given, arrays, strict=True)]
                results = self.program(branch.jaxpr, branch.consts, operands)
                return [fitted(item, value) for item, value in zip(results, values, strict=True)]

            return call

        arrays = lax.switch(index.array, [run(branch) for branch in branches], *(item.array for item in given))
        return [Item(value, array) for value, array in zip(values, arrays, strict=True)]

    def _either(self, values: Sequence[Value]) -> Value:
        axes = tuple(tied(self.solver, axes) for axes in zip(*(value.axes for value in values), strict=True))
        constants = {None if value.constant is None else float(value.constant) for value in values}
        constant = values[0].constant if len(constants) == 1 else None
        return Value(axes, constant, any(value.example for value in values))

    def _alike(self, one: Value, other: Value) -> bool:
        if (one.constant is None, one.example) != (other.constant is None, other.example):
            return False
        pairs = [(a, b) for axes in zip(one.axes, other.axes, strict=True) for a, b in zip(*axes, strict=False)]
        cuts = all(len(a) == len(b) for a, b in zip(one.axes, other.axes, strict=True))
        return cuts and all(
            a.zero == b.zero and (self.solver.roots(a.units) == self.solver.roots(b.units)).all() for a, b in pairs
        )


def _no_leaf(item: Item) -> Item:
    """In a loop or a branch no kernel is seen: what it reads there cannot be handed out for the fit of an implant."""
    return item._replace(value=item.value._replace(leaf=None))


def _captured(array: Any) -> Item:
    constant = None
    if isinstance(array, np.ndarray | np.generic | float | int | bool) and np.size(array) <= CONSTANT_SIZE:
        numbers = np.asarray(array)
        if numbers.size and (numbers == numbers.flat[0]).all():
            constant = numbers.flat[0]
    shape = np.shape(array)
    axes = tuple(filled(size, KEPT if constant is None else FREE) for size in shape)
    return Item(Value(axes, constant), array)


def _closed_programs(equation: Any) -> list[Any]:
    found = []
    for value in equation.params.values():
        if isinstance(value, core.ClosedJaxpr):
            found.append(value)
        elif isinstance(value, core.Jaxpr):
            found.append(core.ClosedJaxpr(value, ()))
    return found


def _takes(program: Any, equation: Any) -> bool:
    """Is a program called with the operands of an equation, as they are?"""
    shapes = [[v.aval.shape for v in variables] for variables in (program.invars, equation.invars)]
    results = [[v.aval.shape for v in variables] for variables in (program.outvars, equation.outvars)]
    return shapes[0] == shapes[1] and results[0] == results[1] and equation.primitive.name != "while"


def _derivative_rule(equation: Any, body: Any) -> Any:
    """What a derivative differs in from that of the program: a function of JAX, or True; None if in nothing."""
    if equation.primitive.name not in ("custom_jvp_call", "custom_vjp_call"):
        return None
    file = getattr(body.debug_info, "func_filename", None)
    if file is None or not Path(file).is_relative_to(Path(jax.__file__).parent):
        return True
    names = [inner.params.get("name") for inner in body.eqns]
    return {"relu": jax.nn.relu, "relu6": jax.nn.relu6}.get(names[0]) if len(names) == 1 else None
