"""How often a loop of a compiled program runs: as the compiler wrote it down, or proved from its counter.

XLA's backends for CPU and GPU write the number down. That for TPU does not, but leaves the loop as `lax.scan` made it:
a counter that starts at a constant, goes up by a constant, and is compared with a constant.
"""

import re

from woodjax.scale._hlo import Instruction, Program

Known = dict[int, int]  # elements of a computation's parameter that are constants

_WRITTEN = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_INDEX = re.compile(r"index=(\d+)")
_SAME = ("copy", "bitcast", "copy-start", "copy-done")


def trip_count(program: Program, loop: Instruction, known: Known) -> int | None:
    """How often a `while` runs its body.

    Args:
        program: The program.
        loop: The instruction.
        known: Constants in the parameter of the computation that it stands in.

    Returns:
        The number; None where it is decided while the program runs, or cannot be proved.
    """
    if written := _WRITTEN.search(loop.attributes):
        return int(written[1])
    starts, steps = _elements(program, loop, known), _results(program, loop)
    fixed = loop_constants(program, loop, known)
    compared = _root(program, loop, "condition")
    if compared is None or compared.opcode != "compare" or "direction=LT" not in compared.attributes:
        return None
    left, right = compared.names()
    counter, limit = _element(program, left), _value(program, right, fixed)
    start = starts.get(counter) if counter is not None else None
    after = steps.get(counter) if counter is not None else None
    if start is None or after is None or limit is None:
        return None
    added = program.instructions[after]
    if added.opcode != "add":
        return None
    parts = [(_element(program, name), _value(program, name, fixed)) for name in added.names()]
    by = [value for element, value in parts if element != counter]
    if len(by) != 1 or by[0] is None or by[0] <= 0:
        return None
    return max(0, -(-(limit - start) // by[0]))


def loop_constants(program: Program, loop: Instruction, known: Known) -> Known:
    """Constants in the parameter of a loop's body: what starts as one and is passed on as it is.

    Args:
        program: The program.
        loop: The instruction.
        known: Those of the computation that it stands in.

    Returns:
        By their place in the tuple.
    """
    results = _results(program, loop)
    starts = _elements(program, loop, known)
    return {i: value for i, value in starts.items() if i in results and _element(program, results[i]) == i}


def _elements(program: Program, loop: Instruction, known: Known) -> Known:
    made = program.instructions.get(loop.names()[0])
    if made is None or made.opcode != "tuple":
        return {}
    values = {i: _value(program, name, known) for i, name in enumerate(made.names())}
    return {i: value for i, value in values.items() if value is not None}


def _results(program: Program, loop: Instruction) -> dict[int, str]:
    root = _root(program, loop, "body")
    return dict(enumerate(root.names())) if root is not None and root.opcode == "tuple" else {}


def _root(program: Program, loop: Instruction, word: str) -> Instruction | None:
    names = loop.called().get(word, [])
    return program.roots.get(names[0]) if names else None


def _source(program: Program, name: str) -> Instruction | None:
    found = program.instructions.get(name)
    while found is not None and found.opcode in _SAME:
        found = program.instructions.get(found.names()[0])
    return found


def _element(program: Program, name: str) -> int | None:
    # The place in the computation's parameter that a value is.
    found = _source(program, name)
    if found is None or found.opcode != "get-tuple-element":
        return None
    whole, index = _source(program, found.names()[0]), _INDEX.search(found.attributes)
    return int(index[1]) if index and whole is not None and whole.opcode == "parameter" else None


def _value(program: Program, name: str, known: Known) -> int | None:
    found = _source(program, name)
    if found is not None and found.opcode == "constant" and re.fullmatch(r"\(-?\d+\)", found.operands):
        return int(found.operands[1:-1])
    element = _element(program, name)
    return known.get(element) if element is not None else None
