"""Time, memory and bytes on the wire of a one-shot pruning over many devices, before anything runs.

`N` devices, `D` of them along the axes over which examples are split, `S = N/D` the others. A device computes the
gradients of its `m/D` examples for the `d/S` parameters that it shares with others, and owns `n = d/N` columns.

| stage | whole network, and blocks with `m ≤ b` | blocks with `m > b` |
|---|---|---|
| gradients | `[m/D, d/S]` | the same, a micro-batch at a time |
| to owners | all-to-all over data, `4mn` bytes | where gradients travel, not sums: the same |
| gram, sums | `1.25m²n`; whole: all-reduce of `4m²` | `2(m/D)(d/S)b`; reduce-scatter over data of `4bd/S` |
| factor | `2m³/3`, on every device or for its blocks | `2b³` a block |
| scores | `1.25m²n` | diagonal of the inverse |
| threshold | 33 + 32 sums of one integer | the same |
| update | Gram of survivors, factor, products | `b³/3` a block |
| back | all-gather of scores and updates over replicas | the same |
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from woodjax.door import checked
from woodjax.scale._stages import FLOAT, Draft, by_columns, by_sums
from woodjax.scale.collectives import Collective, wire_bytes
from woodjax.scale.hardware import Hardware
from woodjax.scale.layouts import Sharding, make_sharding

Exchange = Literal["auto", "sums", "gradients"]


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


@checked
def scaling_cost(
    d: int,
    m: int,
    devices: int,
    hardware: Hardware,
    *,
    data_devices: int | None = None,
    block_size: int | None = None,
    window: int | None = None,
    exchange: Exchange = "auto",
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
            the whole network only. Windows are made three times: for the Gram matrix, for the diagonal and for the
            survivors' Gram matrix.
        exchange: What travels for blocks with `m > b`: `"sums"` of outer products, `b` numbers a weight, or
            `"gradients"`, `m/D` numbers a weight. `"auto"` takes the fewer, as `block_fisher` does.
        replicas: On how many devices each parameter lies: one number, or the number of parameters for each. None is
            `D`: divided among the others, and repeated along the axes of the data. 1 is divided among all.
        gradient_flops: Of one row's gradient; None is `6d`, each weight used once.
        microbatch_size: Rows of gradients computed at once.

    Returns:
        A `ScalingCost`.

    Raises:
        ValueError: Another `exchange`; a window with blocks; numbers below 1; `data_devices` or `replicas` that do not
            divide `devices`; numbers of parameters that do not add up to `d`.

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
    if window is not None and block_size is not None:
        raise ValueError(f"window is {window} and block_size {block_size}: only the whole network is cut into windows.")
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange is {exchange!r}: choose one of {list(get_args(Exchange))}.")
    sharding = make_sharding(d, m, devices, data_devices, block_size, window, replicas, microbatch_size)
    work = 6.0 * d if gradient_flops is None else gradient_flops
    if sharding.block_size is None or m <= sharding.block_size:
        built, passes, held = by_columns(sharding)
    else:
        fewer = sharding.rows <= sharding.block_size
        travel = fewer if exchange == "auto" else exchange == "gradients"
        built, passes, held = by_sums(sharding, gradients_travel=travel)
    rows = FLOAT * sharding.rows * sharding.shared
    gradients = Draft(
        "gradients",
        passes * work * sharding.rows / (devices // sharding.data_devices),
        # Rows are written; parameters are read forward and backward, for the activations and for themselves.
        passes * (rows + sharding.steps * 3 * FLOAT * sharding.shared),
        (),
        held + sharding.microbatch_bytes,
    )
    stages = tuple(_timed(stage, hardware) for stage in (gradients, *built))
    return ScalingCost(sharding, hardware, stages, passes)


@checked
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
        ValueError: As `scaling_cost`; not even one column fits, or blocks do not.

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

    while not cost.fits and windows < columns and cost.sharding.block_size is None:
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
        f"{d} weights on {devices} devices do not fit {hardware.memory_bytes / 1e9:.1f} GB each: "
        f"{cost.sharding.parameter_bytes / 1e9:.1f} GB of parameters and {largest.memory_bytes / 1e9:.1f} GB for "
        f"{largest.name}. Divide parameters among more devices: a smaller data_devices or replicas."
    )


def _timed(stage: Draft, hardware: Hardware) -> Stage:
    local = max(stage.flops / hardware.flops, stage.traffic_bytes / hardware.memory_bandwidth)
    sent = sum(map(wire_bytes, stage.collectives)) / hardware.link_bandwidth
    waited = sum(map(_messages, stage.collectives)) * hardware.link_latency
    return Stage(*stage, local + sent + waited)


def _messages(collective: Collective) -> int:
    # One after the other: doubling and halving have the bytes of a ring in a logarithmic number of messages.
    rounds = math.ceil(math.log2(collective.group_size))
    one = {"all-reduce": 2 * rounds, "all-to-all": collective.group_size - 1}.get(collective.kind, rounds)
    return (collective.count or 0) * one
