"""The text of a compiled program: computations, their instructions, and the sizes of what they make."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_WIDTH = re.compile(r"(?:bf|f|s|u|c)(\d+)")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(
    r"\b(to_apply|calls|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_PARTS = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # as written, layouts included; tuples in parentheses
    opcode: str
    operands: str
    attributes: str

    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it runs, by the word that introduces them."""
        found: dict[str, list[str]] = {}
        for word, names in _CALLED.findall(self.attributes):
            found.setdefault(word, []).extend(_NAME.findall(names))
        return found

    def names(self) -> list[str]:
        """Names of its operands; older releases write their shapes before them."""
        return re.findall(r"%([\w.\-]+)", self.operands) or _NAME.findall(self.operands)


class Program(NamedTuple):
    """A compiled program."""

    entry: str
    computations: dict[str, list[Instruction]]
    roots: dict[str, Instruction]  # what each computation returns
    instructions: dict[str, Instruction]
    devices: int

    def operand_bytes(self, instruction: Instruction, first: int | None = None) -> int:
        """Bytes of the operands.

        Args:
            instruction: Of this program.
            first: Count this many of them; None for all.

        Returns:
            Bytes on one device.
        """
        return sum(shape_bytes(self.instructions[name].shape) for name in instruction.names()[:first])


def shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays.

    Args:
        shape: As in the text of a program: `f32[8,16]{1,0}`, `(bf16[4], pred[])`.

    Returns:
        Bytes, without what a tiled layout pads. Tokens have none.

    Raises:
        ValueError: An element type that has no width in its name.

    Example:
        >>> shape_bytes("(f32[8,16]{1,0:T(8,128)}, bf16[3], pred[<=5], f8e4m3fn[2], s4[3], token[])")
        527
    """
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _array_bytes(dtype: str, dimensions: str) -> int:
    if dtype in {"token", "opaque"}:
        return 0
    width = _WIDTH.match(dtype)
    if width is None and dtype != "pred":
        raise ValueError(f"The program has an array of {dtype!r}, whose width is not known.")
    bits = int(width[1]) if width else 8
    elements = math.prod(int(size.removeprefix("<=")) for size in dimensions.split(",") if size.strip())
    return -(-elements * bits // 8)


def parse(text: str) -> Program:
    """Read the text of an optimized program.

    Args:
        text: HLO, as `jax.stages.Compiled.as_text()` gives it.

    Returns:
        Its computations.

    Raises:
        ValueError: No entry computation in it.
    """
    computations: dict[str, list[Instruction]] = {}
    roots: dict[str, Instruction] = {}
    instructions: dict[str, Instruction] = {}
    entry, current, devices = None, "", 1
    for line in text.splitlines():
        if line.startswith("HloModule"):
            devices = math.prod(map(int, _PARTS.findall(line)))
        elif line[:1] not in {"", " ", "}"} and line.rstrip().endswith("{"):
            head = line.removeprefix("ENTRY ")
            name = _NAME.match(head)
            if name is None:
                continue
            current = name[1]
            computations[current] = []
            entry = name[1] if head != line else entry
        elif current and (instruction := _instruction(line)) is not None:
            computations[current].append(instruction)
            instructions[instruction.name] = instruction
            if line.strip().startswith("ROOT "):
                roots[current] = instruction
    if entry is None:
        raise ValueError("The text has no ENTRY computation: pass what Compiled.as_text() returns.")
    return Program(entry, computations, roots, instructions, devices)


def _instruction(line: str) -> Instruction | None:
    left, separator, right = line.strip().removeprefix("ROOT ").partition(" = ")
    name = _NAME.fullmatch(left)
    if not separator or name is None:
        return None
    end = _closing(right) if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].strip()
    opcode = re.match(r"[\w\-]+(?=\()", rest)
    if opcode is None:
        return None
    after = rest[opcode.end() :]
    end = _closing(after)
    return Instruction(name[1], shape, opcode[0], after[:end], after[end:])


def _closing(text: str) -> int:
    # One past the parenthesis that closes the first character.
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)
