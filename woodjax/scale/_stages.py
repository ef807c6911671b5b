"""Flops, bytes and communication of each stage of a pruning on many devices, as `costs` has them."""

from typing import NamedTuple

from woodjax.scale.collectives import Collective
from woodjax.scale.layouts import Sharding

FLOAT = 4
WORKSPACE_COLUMNS = 4096  # that a Gram matrix and a diagonal have in work at once
THRESHOLD_SUMS = 33 + 32  # bits of a float, then bits of an index


class Draft(NamedTuple):
    """A stage without its time."""

    name: str
    flops: float
    traffic_bytes: float
    collectives: tuple[Collective, ...]
    memory_bytes: float


def by_columns(s: Sharding) -> tuple[list[Draft], int, float]:
    """Devices own columns of `G`: the whole network through `m × m`, or blocks each through its own.

    Args:
        s: What lies where.

    Returns:
        Stages after the gradients, passes over the examples, and bytes held while gradients are computed.
    """
    whole = s.block_size is None
    blocks = 1 if s.block_size is None else -(-s.columns // s.block_size)
    square = FLOAT * s.m * s.m
    rows = FLOAT * s.m * s.columns
    times = (3 if whole else 2) if s.windowed else 1  # that all columns are made
    together = 1 if s.block_size is None else -(-s.window_columns // s.block_size)  # factors held at once
    held = FLOAT * s.m * s.window_columns + together * square
    work = 2 * FLOAT * s.m * min(s.window_columns, WORKSPACE_COLUMNS)
    vectors = 3 * FLOAT * s.columns
    passes = times * s.windows + (2 if whole and s.windowed else 0)

    again_blocks = 1 if whole else times  # of blocks, everything is made again for the update
    sums = (_reduced(square, s.devices, "gram"),) if whole else ()
    damping = (_reduced(2 * FLOAT, s.devices, "damping"),)
    again = (_reduced(square, s.devices, "update"), _reduced(FLOAT * s.m, s.devices, "update")) if whole else ()
    if whole and s.windowed:  # Gᵀu is one gradient of a weighted loss, added up over the examples
        again += (Collective("reduce-scatter", FLOAT * s.shared, FLOAT * s.columns, s.data_devices, 1, "update"),)
    product = 1.25 * s.m * s.m * s.columns
    cube = blocks * 2 * s.m**3 / 3
    drafts = [
        Draft("gram", again_blocks * product, again_blocks * rows, sums, held + work + 2 * square),
        Draft("factor", again_blocks * cube, again_blocks * 3 * blocks * square, damping, held + 3 * square),
        Draft("scores", product, rows + 3 * FLOAT * s.columns, (), held + work + vectors),
        _threshold(s, held),
        Draft(
            "update",
            product + cube + 4 * s.m * s.columns,
            3 * rows + 3 * blocks * square,
            again,
            held + work + 4 * square + vectors,
        ),
    ]
    return [*_to_owners(s, times, held), *drafts, _back(s, held)], passes, held


def by_sums(s: Sharding, *, gradients_travel: bool) -> tuple[list[Draft], int, float]:
    """Devices own blocks. Sums of outer products travel, `b` numbers for each weight, or rows do, `m/D` for each.

    Args:
        s: What lies where.
        gradients_travel: Rows do.

    Returns:
        As `by_columns`.
    """
    b = s.block_size or 1
    inverse = FLOAT * s.columns * b
    rows = FLOAT * s.m * s.columns
    operand = FLOAT * s.shared * b
    vectors = 3 * FLOAT * s.columns
    every, seen = FLOAT * s.columns * b, FLOAT * s.rows * s.shared
    damping = (_reduced(2 * FLOAT, s.devices, "damping"),)
    if gradients_travel:
        held, before, sent = rows, _to_owners(s, 1, rows), ()
        traffic, memory = every + seen, held + inverse
    else:
        result = operand // s.data_devices
        split = s.data_devices > 1
        sent = (Collective("reduce-scatter", operand, result, s.data_devices, 1, "sums"),) * split
        held, before = operand, []
        traffic = s.steps * 2 * FLOAT * s.shared * b + seen
        memory = held + inverse * split + s.microbatch_bytes
    drafts = [
        *before,
        Draft("sums", 2 * s.rows * s.shared * b, traffic, sent, memory),
        Draft("factor", 2 * s.columns * b * b, 3 * every, damping, 3 * inverse + vectors),
        Draft("scores", s.columns, every, (), inverse + vectors),
        _threshold(s, inverse),
        Draft("update", s.columns * (b * b / 3 + 6 * b), 2 * every, (), 2 * inverse + vectors),
        _back(s, inverse),
    ]
    return drafts, 1, max(held, inverse)


def _to_owners(s: Sharding, times: int, held: float) -> list[Draft]:
    # Rows of all columns, so many times, a window at a time.
    if s.data_devices == 1:
        return []
    every = FLOAT * s.rows * s.shared
    moved = every // s.windows
    sent = Collective("all-to-all", moved, moved, s.data_devices, times * s.windows, "to owners")
    return [Draft("to owners", 0, 2 * times * every, (sent,), held + moved)]


def _threshold(s: Sharding, held: float) -> Draft:
    counts = _reduced(FLOAT, s.devices, "threshold", THRESHOLD_SUMS)
    scores = FLOAT * s.columns
    return Draft("threshold", THRESHOLD_SUMS * s.columns, THRESHOLD_SUMS * scores, (counts,), held + 2 * scores)


def _back(s: Sharding, held: float) -> Draft:
    # Scores and updates take four bytes a weight; masks are ranked where the scores are.
    sent = tuple(
        Collective("all-gather", FLOAT * weights // s.devices, FLOAT * weights * r // s.devices, r, 1, name)
        for r, weights in s.replicas.items()
        for name in ("scores", "updates")
        if r > 1
    )
    whole = 9 * s.parameter_bytes / FLOAT
    return Draft("back", 0, whole + 9 * s.columns, sent, held + whole + 9 * s.columns)


def _reduced(size: int, devices: int, source: str, count: int = 1) -> Collective:
    return Collective("all-reduce", size, size, devices, count, source)
