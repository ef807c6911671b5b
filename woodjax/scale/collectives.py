"""What a compiled program sends between devices, read from its text.

Nothing runs: `jax.jit(f).lower(...).compile()` is enough, on simulated devices too.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from woodjax.door import checked
from woodjax.scale._groups import group_size
from woodjax.scale._hlo import Instruction, Program, parse, shape_bytes
from woodjax.scale._loops import Known, loop_constants, trip_count

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)
GATHERS = ("all-gather", "collective-broadcast")
WHOLE = ("collective-permute", "collective-broadcast", "send")  # sent on as it is


class Collective(NamedTuple):
    """One communication of a compiled program, as one device sees it."""

    kind: str
    operand_bytes: int
    """Bytes that the device puts in, in one run."""
    result_bytes: int
    """Bytes that it holds afterwards."""
    group_size: int
    """Devices that take part in one group; 1 where nothing leaves the device."""
    count: int | None
    """How often it runs; None inside a loop whose length is decided while it runs."""
    source: str
    """Where it comes from: JAX's name of the operation, or the compiler's."""


@checked
def collectives(compiled: jax.stages.Compiled | str) -> tuple[Collective, ...]:
    """Every communication of a compiled program, and how often it runs.

    A start and its done are one. What is inside a loop runs as often as the loop, times that of the loops around it.
    Of a conditional, the branch that sends the most counts, as all do in `largest_gather`. What a kernel of its own
    sends (a Pallas kernel with remote copies) is not in the text.

    Args:
        compiled: A compiled program, `jax.jit(f).lower(...).compile()`, or its HLO text.

    Returns:
        A tuple, in the order of the program. Bytes are those of arrays: a compiler may pad or widen them (XLA's CPU
        backend sums bfloat16 as float32, and that is what its program says), and it chooses how to send: on TPU, XLA
        makes sums of small gathers and scatters.

    Raises:
        ValueError: A backend that does not give the text of a program; groups of devices in a notation that is not
            known.

    Cost:
        One reading of the text. Nothing runs.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> wj.collectives(jax.jit(jnp.sum).lower(jnp.ones(3)).compile())
        ()
    """
    program = _read(compiled)
    return tuple(_collect(program, program.entry, {}))


@checked
def wire_bytes(collective: Collective) -> float:
    """Bytes that a device sends in all runs of a collective, in its ring form.

    | kind | sends, for a group of `g` |
    |---|---|
    | all-gather | result · (g − 1)/g |
    | reduce-scatter, all-to-all | operand · (g − 1)/g |
    | all-reduce | operand · 2(g − 1)/g |
    | permute, broadcast, send | operand |

    Of a ragged all-to-all the operand is all of its buffer: an upper bound.

    Args:
        collective: One of `collectives`.

    Returns:
        Bytes. Multiply by devices for all links together.

    Raises:
        ValueError: It runs an unknown number of times: take those of one run, `collective._replace(count=1)`.

    Cost:
        None.

    References:
        Chan, Heimlich, Purkayastha & van de Geijn, Collective communication: theory, practice, and experience, 2007.

    Example:
        >>> import woodjax as wj
        >>> wj.wire_bytes(wj.Collective("all-reduce", 400, 400, 4, 2, "psum"))
        1200.0
    """
    if collective.count is None:
        raise ValueError(
            f"{collective.kind} of {collective.source} runs an unknown number of times: give the loop a length that is "
            "known when it is compiled, or pass collective._replace(count=1) for one run."
        )
    others = (collective.group_size - 1) / collective.group_size
    if collective.kind in WHOLE:
        return float(collective.count * collective.operand_bytes * (others > 0))
    if collective.kind == "all-gather":
        return collective.count * collective.result_bytes * others
    return collective.count * collective.operand_bytes * others * (2 if collective.kind == "all-reduce" else 1)


@checked
def gathered_bytes(compiled: jax.stages.Compiled | str) -> int:
    """Bytes that a device receives whole from others, in all gathers and broadcasts together.

    Args:
        compiled: As in `collectives`.

    Returns:
        Results of gathers, times how often they run.

    Raises:
        ValueError: As `collectives`; a gather that runs an unknown number of times.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> wj.gathered_bytes(jax.jit(jnp.sum).lower(jnp.ones(3)).compile())
        0
    """
    found = [one for one in collectives(compiled) if one.kind in GATHERS]
    for one in found:
        if one.count is None:
            raise ValueError(f"{one.kind} of {one.source} runs an unknown number of times.")
    return sum(one.result_bytes * (one.count or 0) for one in found)


@checked
def largest_gather(compiled: jax.stages.Compiled | str, kinds: Sequence[str] = GATHERS) -> int:
    """The largest array that a collective puts together on a device, in any branch and any loop.

    What a test asks that wants to know that no parameter is gathered. A gather can also be written as a sum of arrays
    that are zero elsewhere, as XLA does for small ones on TPU: pass `kinds=("all-gather", "all-reduce")` where no
    large sum is expected.

    Args:
        compiled: As in `collectives`.
        kinds: Kinds of collectives that are looked at.

    Returns:
        Bytes of the largest result; 0 without any. A group of one device counts for nothing.

    Raises:
        ValueError: As `collectives`.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> wj.largest_gather(jax.jit(jnp.sum).lower(jnp.ones(3)).compile())
        0
    """
    program = _read(compiled)
    every = (_collective(program, x) for instructions in program.computations.values() for x in instructions)
    return max((x.result_bytes for x in every if x is not None and x.kind in kinds and x.group_size > 1), default=0)


def _read(compiled: jax.stages.Compiled | str) -> Program:
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if text is None:
        raise ValueError("This backend does not give the text of a compiled program.")
    return parse(text)


def _collect(program: Program, name: str, known: Known) -> list[Collective]:
    # Of one run of a computation.
    found: list[Collective] = []
    for instruction in program.computations.get(name, ()):
        one = _collective(program, instruction)
        if one is not None:
            found.append(one)
        if one is not None or instruction.opcode.endswith(("-done", "-update")):
            continue  # the start has been counted
        called, loop = instruction.called(), instruction.opcode == "while"
        constants = loop_constants(program, instruction, known) if loop else {}
        inside = {word: [_collect(program, inner, constants) for inner in names] for word, names in called.items()}
        if loop:
            trips = trip_count(program, instruction, known)
            found += [y for x in inside["body"] for y in _times(x, trips)]
            found += [y for x in inside["condition"] for y in _times(x, None if trips is None else trips + 1)]
        elif instruction.opcode == "conditional":
            found += max((x for branches in inside.values() for x in branches), key=_weight)
        else:
            found += [y for inner in inside.values() for x in inner for y in x]
    return found


def _times(found: list[Collective], trips: int | None) -> list[Collective]:
    if trips == 0:
        return []
    return [x._replace(count=None if trips is None or x.count is None else trips * x.count) for x in found]


def _weight(branch: list[Collective]) -> tuple[bool, float, int]:
    # An unknown number of times may be the most.
    unknown = any(x.count is None for x in branch)
    return unknown, sum(wire_bytes(x if x.count is not None else x._replace(count=1)) for x in branch), len(branch)


def _collective(program: Program, instruction: Instruction) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or "is_host_transfer=true" in instruction.attributes:
        return None
    devices = 2 if kind == "send" else group_size(instruction.attributes, program.devices)
    # Other operands of these say where the parts go, and when.
    operand = program.operand_bytes(instruction, 1 if kind in {"ragged-all-to-all", "send"} else None)
    result = shape_bytes(instruction.shape)
    if kind != instruction.opcode or kind == "send":  # the result of a start holds the operands as well
        result = {"all-gather": operand * devices, "reduce-scatter": operand // devices}.get(kind, operand)
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, operand, result, devices, 1, name[1] if name else instruction.name)
