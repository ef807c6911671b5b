"""Which leaves are prunable by kind: kernels of hidden layers, read from the program of the network.

No layer of any framework and no name is looked at. A kernel is a leaf of two or more axes by which the program
multiplies something made of the inputs, in a matrix product or a convolution. An output layer is a kernel with a
product that reaches the output and no other kernel: all other kernels are hidden.

The products form a graph: there is an edge from one to another where its result goes, through anything but a kernel,
into the other. Only products count from which the output can be reached. A residual stream that goes past a kernel
and through it as well gives such an edge, so every block of a residual network is hidden and its head is not.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from woodjax.door import checked
from woodjax.programs import PRODUCTS, has_products, inner_programs, program_of
from woodjax.tree import path_name
from woodjax.typing import ApplyFn, Batch, Params, Select

Place: TypeAlias = tuple[int, ...]  # of an equation: numbers from the whole program down
NONE: frozenset[Any] = frozenset()
JOINING = (*PRODUCTS, "concatenate", "dynamic_update_slice")  # of values into a larger one
GROUPED = ("ragged_dot", "ragged_dot_general")  # of experts


class Value(NamedTuple):
    """What the reader knows of a value in the program."""

    example: bool = False  # is it made of the inputs?
    trained: bool = False  # is it made of leaves?
    leaves: frozenset[int] = NONE  # without the inputs: the leaves that it holds
    spread: frozenset[int] = NONE  # the same, of leaves that were broadcast: scales, unless there is nothing else
    products: frozenset[Place] = NONE  # with the inputs: the last products on all ways to it


@dataclass
class Products:
    """The graph of products with kernels."""

    leaves: dict[Place, frozenset[int]] = field(default_factory=dict)
    later: dict[Place, set[Place]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class HiddenKernels:
    """A `Select` of leaves by their paths. Made by `hidden_kernels`; hashable, and equal by what it selects."""

    paths: frozenset[str]

    def __call__(self, path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        """Whether the leaf at this path is a hidden kernel."""
        del leaf
        return path in self.paths


@checked
def hidden_kernels(apply_fn: ApplyFn, params: Params, inputs: Batch) -> Select:
    """Select the kernels of hidden layers, whatever their names: what pruning at initialization may remove.

    Selected are leaves of two or more axes by which the network multiplies something made of its inputs, as they
    are or reshaped, cast, masked, scaled or sliced. Not selected are biases, scales of normalisation, embeddings
    that are looked up, class tokens, position embeddings, and output layers: kernels whose product reaches the
    output and nothing but the output. The first convolution and the projection of patches are hidden kernels.

    - In a residual network every block goes through the head, on all ways: only the head is an output layer.
    - Where the last residual sum is the output itself, only the kernels of the last block that end in it are.
    - An embedding that is the classifier as well is an output layer.
    - Layers stacked in one leaf under `lax.scan` are hidden if any of them is.
    - A matrix that is trained and multiplied, such as the queries of an attention pooling, is a kernel.
    - A kernel that the inputs pick, such as an expert gathered by the index of a router, is taken for an embedding.

    Args:
        apply_fn: `apply_fn(params, inputs)`, a network; a loss will do as well. Of a `jax.tree_util.Partial`,
            as `woodjax.adapters.nnx.functional` returns, shapes of what it carries are enough.
        params: A params-tree; shapes are enough.
        inputs: What the network takes; shapes are enough, and a batch of one.

    Returns:
        `select(path, leaf) -> bool`, to be passed as `select=`. It is hashable and equal to another one that
        selects the same leaves, so it can be a static argument of `jit`.

    Raises:
        ValueError: An output that does not depend on the parameters; no hidden kernel; a product with a kernel
            inside an operation that is not followed, such as a kernel written by hand.

    Cost:
        One trace of the network; nothing runs on the device.

    References:
        Pruning at initialization leaves out the classifier: Lee et al. 2019 (arXiv 1810.02340) and later papers do
        so by name or by position.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"hidden": jnp.ones((3, 4)), "bias": jnp.ones((1, 4)), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda p, x: jnp.tanh(x @ p["hidden"] + p["bias"]) @ p["head"]
        >>> select = wj.hidden_kernels(apply_fn, params, jnp.ones((1, 3)))
        >>> wj.make_layout(params, select=select).num_weights
        12
    """
    paths = [(path_name(path), jnp.ndim(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    program, carried = program_of(apply_fn, params, inputs)
    values = [Value()] * carried
    values += [Value(trained=True, leaves=frozenset([i]) if ndim else NONE) for i, (_, ndim) in enumerate(paths)]
    values += [Value(example=True)] * len(jax.tree.leaves(inputs))
    found = Products()
    outputs = _walk(program, values, (), found)
    if not any(value.trained for value in outputs):
        raise ValueError(
            f"The output of apply_fn does not depend on any of the leaves {[path for path, _ in paths]}: pass the "
            "params that it uses."
        )
    last = frozenset[Place]().union(*(value.products for value in outputs))
    hidden, output = ({paths[leaf][0] for leaf in leaves if paths[leaf][1] >= 2} for leaves in _kinds(found, last))
    if not hidden - output:
        raise ValueError(
            f"No hidden kernel among {[path for path, _ in paths]}; output layers: {sorted(output)}. Pass select= to "
            "choose leaves yourself."
        )
    return HiddenKernels(frozenset(hidden - output))


def _kinds(found: Products, last: frozenset[Place]) -> tuple[set[int], set[int]]:
    """Leaves with a product that goes into another one on a way to the output, and with one that does not."""
    earlier = defaultdict(set)
    for place, followers in found.later.items():
        for follower in followers:
            earlier[follower].add(place)
    live, waiting = set(last), list(last)
    while waiting:
        for place in earlier[waiting.pop()] - live:
            live.add(place)
            waiting.append(place)
    hidden, output = set[int](), set[int]()
    for place in live:
        (hidden if found.later[place] & live else output).update(found.leaves[place])
    return hidden, output


def _walk(jaxpr: Any, values: Sequence[Value], place: Place, found: Products) -> list[Value]:
    known = dict(zip(jaxpr.invars, values, strict=True))

    def read(variable: Any) -> Value:
        return Value() if isinstance(variable, core.Literal) else known.get(variable, Value())  # constants

    for number, equation in enumerate(jaxpr.eqns):
        results = _results(equation, [read(v) for v in equation.invars], (*place, number), found)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _results(equation: Any, operands: list[Value], here: Place, found: Products) -> list[Value]:
    name, inner = equation.primitive.name, inner_programs(equation)
    if name == "scan":
        consts, carry = equation.params["num_consts"], equation.params["num_carry"]
        return _loop(inner[0], operands[:consts], operands[consts:][:carry], operands[consts + carry :], here, found)
    if name == "while":
        skipped, consts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        body = equation.params["body_jaxpr"].jaxpr
        return _loop(body, operands[skipped:][:consts], operands[skipped + consts :], [], here, found)
    if name == "cond":
        branches = [_walk(program, operands[1:], (*here, i), found) for i, program in enumerate(inner)]
        return [_either(*values) for values in zip(*branches, strict=True)]
    if len(inner) == 1 and len(inner[0].invars) == len(operands):
        return _walk(inner[0], operands, here, found)
    if any(map(has_products, inner)) and any(value.trained for value in operands):
        raise ValueError(
            f"A product inside a {name}, which is not followed: which leaves are kernels is not in the program. "
            "Pass select= to choose leaves yourself."
        )
    if name in GROUPED or (name in PRODUCTS and _contracts(equation)):
        for kernel, data in (operands[:2], operands[1::-1]):
            if data.example and not kernel.example and (kernel.leaves or kernel.spread):
                found.leaves[here] = kernel.leaves or kernel.spread
                for earlier in data.products:
                    found.later[earlier].add(here)
                return [Value(example=True, trained=True, products=frozenset([here]))]
    return [_made_of(equation, operands)] * len(equation.outvars)


def _contracts(equation: Any) -> bool:
    # einsum writes a product of elements as a dot_general that sums over nothing.
    return equation.primitive.name != "dot_general" or bool(equation.params["dimension_numbers"][0][0])


def _made_of(equation: Any, operands: list[Value]) -> Value:
    if equation.primitive.name not in JOINING:
        size = max((variable.aval.size for variable in equation.outvars), default=0)
        operands = [
            value._replace(leaves=NONE, spread=value.leaves | value.spread) if variable.aval.size < size else value
            for value, variable in zip(operands, equation.invars, strict=True)
        ]
    return _either(*operands)


def _either(*values: Value) -> Value:
    example = any(value.example for value in values)
    return Value(
        example,
        any(value.trained for value in values),
        NONE if example else NONE.union(*(value.leaves for value in values)),
        NONE if example else NONE.union(*(value.spread for value in values)),
        NONE.union(*(value.products for value in values)),
    )


def _loop(
    body: Any, consts: list[Value], carry: list[Value], slices: list[Value], here: Place, found: Products
) -> list[Value]:
    def step(carry: list[Value], found: Products) -> list[Value]:
        return _walk(body, [*consts, *carry, *slices], here, found)

    while True:  # what a step hands to the next one, until nothing is added
        after = step(carry, Products())[: len(carry)]
        joined = [_either(*pair) for pair in zip(carry, after, strict=True)]
        if joined == carry:
            break
        carry = joined
    return [*carry, *step(carry, found)[len(carry) :]]
