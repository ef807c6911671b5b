"""Time, memory and bytes on the wire of a one-shot pruning over many devices, before anything runs.

`N` devices, `D` of them along the axes over which examples are split, `S = N/D` the others. A device computes the
gradients of its `m/D` examples for the `d/S` parameters that it shares with others, and owns `n = d/N` columns.

| stage | whole network, and blocks with `m ≤ b` | blocks with `m > b` |
|---|---|---|
| gradients | `[m/D, d/S]` | the same, a micro-batch at a time |
| to owners | all-to-all over data, `4mn` bytes | |
| gram, sums | `1.25m²n`; whole: all-reduce of `4m²` | `2(m/D)(d/S)b`; reduce-scatter over data of `4bd/S` |
| factor | `2m³/3`, on every device or for its blocks | `2b³` a block |
| scores | `1.25m²n` | diagonal of the inverse |
| threshold | 33 + 32 sums of one integer | the same |
| update | Gram of survivors, factor, products | `b³/3` a block |
| back | all-gather of masks, scores, updates over replicas | the same |
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from woodjax.scale.collectives import Collective, wire_bytes
from woodjax.scale.hardware import Hardware
from woodjax.scale.layouts import Sharding, make_sharding

FLOAT = 4
WORKSPACE_COLUMNS = 4096  # that a Gram matrix and a diagonal have in work at once
THRESHOLD_SUMS = 33 + 32  # bits of a float, then bits of an index


class Stage(NamedTuple):
    """What one stage costs each device."""

    name: str
    flops: float
    traffic_bytes: float
    """Read from and written to the device's memory."""
    collectives: tuple[Collective, ...]
    memory_bytes: float
    """Alive at the same time, beside the parameters."""
    seconds: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends."""
        return sum(map(wire_bytes, self.collectives))


class ScalingCost(NamedTuple):
    """What a pruning costs each of many devices. Made by `scaling_cost`."""

    sharding: Sharding
    hardware: Hardware
    stages: tuple[Stage, ...]
    passes: int
    """Times that every example's gradient is computed."""

    @property
    def seconds(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """On each device."""
        return sum(stage.flops for stage in self.stages)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends."""
        return sum(stage.wire_bytes for stage in self.stages)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Of all stages: to compare with `woodjax.collectives` of a compiled program."""
        return tuple(one for stage in self.stages for one in stage.collectives)

    @property
    def peak_bytes(self) -> float:
        """On each device: parameters, and the stage that needs the most."""
        return self.sharding.parameter_bytes + max(stage.memory_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Does the peak fit the device's memory?"""
        return self.peak_bytes <= self.hardware.memory_bytes


def scaling_cost(
    d: int,
    m: int,
    devices: int,
    hardware: Hardware,
    *,
    data_devices: int | None = None,
    block_size: int | None = None,
    window: int | None = None,
    replicas: int | Mapping[int, int] | None = None,
    gradient_flops: float | None = None,
    microbatch_size: int = 1,
) -> ScalingCost:
    """Cost of gradients, curvature, scores, masks and a joint update over many devices, in float32.

    A model, not a measurement: seconds are `max(flops / rate, bytes / bandwidth)`, and what is sent after it, so they
    are what a perfect program would take that does not overlap the two. Activations, and what the model itself sends
    while it computes a gradient, are not in it.

    Args:
        d: Prunable weights.
        m: Rows of gradients.
        devices: All devices, `N`.
        hardware: Of one device: `H100_SXM`, `TPU_V5E` or your own `Hardware`.
        data_devices: Devices among which the examples are divided, `D`, a divisor of `N`. None for all.
        block_size: Coordinates in a block `b`; None for the whole network.
        window: Columns that a device holds at once, computing gradients again for every window; None to hold all. For
            the whole network, windows are made three times: for the Gram matrix, for the diagonal and for the
            survivors' Gram matrix; for blocks twice, for scores and for the update.
        replicas: On how many devices each parameter lies: one number, or the number of parameters for each. None is
            `D`: divided among the others, and repeated along the axes of the data. 1 is divided among all.
        gradient_flops: Of one row's gradient; None is `6d`, each weight used once.
        microbatch_size: Rows of gradients computed at once.

    Returns:
        A `ScalingCost`.

    Raises:
        ValueError: Numbers below 1; `data_devices` or `replicas` that do not divide `devices`; numbers of parameters
            that do not add up to `d`.

    Cost:
        Arithmetic on a few numbers.

    References:
        Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH, 2005: messages of
        logarithmic number with the bytes of a ring. Williams, Waterman & Patterson, Roofline, 2009.

    Example:
        >>> import woodjax as wj
        >>> cost = wj.scaling_cost(25_500_000, 1024, 8, wj.H100_SXM)
        >>> cost.fits, round(cost.peak_bytes / 1e9), [x.name for x in cost.stages][:3]
        (True, 26, ['gradients', 'to owners', 'gram'])
    """
    sharding = make_sharding(d, m, devices, data_devices, block_size, window, replicas, microbatch_size)
    work = 6.0 * d if gradient_flops is None else gradient_flops
    if sharding.block_size is None or m <= sharding.block_size:
        built, passes, held = _by_columns(sharding)
    else:
        built, passes, held = _by_sums(sharding)
    rows = FLOAT * sharding.rows * sharding.shared
    gradients = _Draft(
        "gradients",
        passes * work * sharding.rows / (devices // sharding.data_devices),
        # Rows are written; parameters are read forward and backward, for the activations and for themselves.
        passes * (rows + sharding.steps * 3 * FLOAT * sharding.shared),
        (),
        held + sharding.microbatch_bytes,
    )
    stages = tuple(_timed(stage, hardware) for stage in (gradients, *built))
    return ScalingCost(sharding, hardware, stages, passes)


def fitting_cost(d: int, m: int, devices: int, hardware: Hardware, **options: Any) -> ScalingCost:
    """The cost with the fewest windows that fit the memory.

    Args:
        d: As in `scaling_cost`.
        m: As in `scaling_cost`.
        devices: As in `scaling_cost`.
        hardware: As in `scaling_cost`.
        **options: As in `scaling_cost`, but for `window`.

    Returns:
        A `ScalingCost`; `sharding.window` is None where everything fits at once.

    Raises:
        ValueError: As `scaling_cost`; not even one column fits.

    Cost:
        As `scaling_cost`, for each of a few numbers of windows.

    Example:
        >>> import woodjax as wj
        >>> cost = wj.fitting_cost(300_000_000, 1024, 8, wj.TPU_V5E)
        >>> cost.sharding.window, cost.passes, cost.fits
        (1785715, 65, True)
    """
    cost = scaling_cost(d, m, devices, hardware, **options)
    columns, too_few, windows = cost.sharding.columns, 1, 1

    def cut(windows: int) -> ScalingCost:
        return scaling_cost(d, m, devices, hardware, **options, window=-(-columns // windows))

    while not cost.fits and windows < columns:
        too_few, windows = windows, 2 * windows
        cost = cut(windows)
    while cost.fits and windows - too_few > 1:
        middle = (too_few + windows) // 2
        tried = cut(middle)
        too_few, windows, cost = (too_few, middle, tried) if tried.fits else (middle, windows, cost)
    if cost.fits:
        return cost
    largest = max(cost.stages, key=lambda stage: stage.memory_bytes)
    raise ValueError(
        f"{d} weights on {devices} devices do not fit {hardware.memory_bytes / 1e9:.1f} GB each, whatever the window: "
        f"{cost.sharding.parameter_bytes / 1e9:.1f} GB of parameters and {largest.memory_bytes / 1e9:.1f} GB for "
        f"{largest.name}. Divide parameters among more devices: a smaller data_devices or replicas."
    )


class _Draft(NamedTuple):
    """A stage without its time."""

    name: str
    flops: float
    traffic_bytes: float
    collectives: tuple[Collective, ...]
    memory_bytes: float


def _by_columns(s: Sharding) -> tuple[list[_Draft], int, float]:
    # Devices own columns of G: the whole network through m × m, or blocks each through its own.
    whole = s.block_size is None
    blocks = 1 if s.block_size is None else -(-s.columns // s.block_size)
    square = FLOAT * s.m * s.m
    rows = FLOAT * s.m * s.columns
    times = (3 if whole else 2) if s.windowed else 1  # that all columns are made
    held = FLOAT * s.m * s.window_columns + (square if whole else blocks * square)
    work = 2 * FLOAT * s.m * min(s.window_columns, WORKSPACE_COLUMNS)
    vectors = 3 * FLOAT * s.columns
    passes = times * s.windows + (2 if whole and s.windowed else 0)

    gram = blocks * 2 * square if whole else work
    sums = (_reduced(square, s.devices, "gram"), _reduced(2 * FLOAT, s.devices, "damping")) if whole else ()
    again = (_reduced(square, s.devices, "update"), _reduced(FLOAT * s.m, s.devices, "update")) if whole else ()
    if whole and s.windowed:  # Gᵀu is one gradient of a weighted loss, added up over the examples
        again += (Collective("reduce-scatter", FLOAT * s.shared, FLOAT * s.columns, s.data_devices, 1, "update"),)
    product = 1.25 * s.m * s.m * s.columns
    cube = blocks * 2 * s.m**3 / 3
    drafts = [
        _Draft("gram", product, rows, sums[:1], held + work + gram),
        _Draft("factor", cube, 3 * blocks * square, sums[1:], held + 3 * square),
        _Draft("scores", product, rows + 3 * FLOAT * s.columns, (), held + work + vectors),
        _threshold(s, held),
        _Draft(
            "update",
            product + cube + 4 * s.m * s.columns,
            3 * rows + 3 * blocks * square,
            again,
            held + work + 4 * square + vectors,
        ),
    ]
    if s.data_devices > 1:
        moved = FLOAT * s.rows * s.shared // s.windows
        sent = Collective("all-to-all", moved, moved, s.data_devices, times * s.windows, "to owners")
        drafts.insert(0, _Draft("to owners", 0, 2 * times * rows, (sent,), held + moved))
    return [*drafts, _back(s, held)], passes, held


def _by_sums(s: Sharding) -> tuple[list[_Draft], int, float]:
    # Devices own blocks: sums of outer products travel, b for each weight instead of m.
    b = s.block_size or 1
    times = 2 if s.windowed else 1
    inverse = FLOAT * s.window_columns * b
    before = inverse * s.data_devices
    operand = FLOAT * s.shared * b // s.windows
    vectors = 3 * FLOAT * s.columns
    sent = ()
    if s.data_devices > 1:
        result = operand // s.data_devices
        sent = (Collective("reduce-scatter", operand, result, s.data_devices, times * s.windows, "sums"),)
    damping = (_reduced(2 * FLOAT, s.devices, "damping"),)
    every = FLOAT * s.columns * b
    drafts = [
        _Draft(
            "sums",
            times * 2 * s.rows * s.shared * b,
            times * (s.steps * 2 * FLOAT * s.shared * b + FLOAT * s.rows * s.shared),
            sent,
            before + (inverse if sent else 0) + s.microbatch_bytes,
        ),
        _Draft("factor", times * 2 * s.columns * b * b, times * 3 * every, damping, 3 * inverse + vectors),
        _Draft("scores", s.columns, every, (), inverse + vectors),
        _threshold(s, inverse),
        _Draft("update", s.columns * (b * b / 3 + 6 * b), 2 * every, (), 2 * inverse + vectors),
        _back(s, inverse),
    ]
    return drafts, times * s.windows, before


def _threshold(s: Sharding, held: float) -> _Draft:
    counts = _reduced(FLOAT, s.devices, "threshold", THRESHOLD_SUMS)
    scores = FLOAT * s.columns
    return _Draft("threshold", THRESHOLD_SUMS * s.columns, THRESHOLD_SUMS * scores, (counts,), held + 2 * scores)


def _back(s: Sharding, held: float) -> _Draft:
    # Masks take one byte a weight, scores and updates four each.
    sent = tuple(
        Collective("all-gather", width * weights // s.devices, width * weights * r // s.devices, r, 1, name)
        for r, weights in s.replicas.items()
        for width, name in ((1, "masks"), (FLOAT, "scores"), (FLOAT, "updates"))
        if r > 1
    )
    whole = 9 * s.parameter_bytes / FLOAT
    return _Draft("back", 0, whole + 9 * s.columns, sent, held + whole + 9 * s.columns)


def _reduced(size: int, devices: int, source: str, count: int = 1) -> Collective:
    return Collective("all-reduce", size, size, devices, count, source)


def _timed(stage: _Draft, hardware: Hardware) -> Stage:
    local = max(stage.flops / hardware.flops, stage.traffic_bytes / hardware.memory_bandwidth)
    sent = sum(map(wire_bytes, stage.collectives)) / hardware.link_bandwidth
    waited = sum(map(_messages, stage.collectives)) * hardware.link_latency
    return Stage(*stage, local + sent + waited)


def _messages(collective: Collective) -> int:
    # One after the other: doubling and halving have the bytes of a ring in a logarithmic number of messages.
    rounds = math.ceil(math.log2(collective.group_size))
    one = {"all-reduce": 2 * rounds, "all-to-all": collective.group_size - 1}.get(collective.kind, rounds)
    return (collective.count or 0) * one
