"""Which part of the gradients, the curvature and the parameters lies on each of many devices."""

from collections.abc import Mapping
from typing import NamedTuple


class Sharding(NamedTuple):
    """Sizes of the parts. Made by `make_sharding`."""

    d: int
    m: int
    devices: int
    data_devices: int
    block_size: int | None
    window: int | None
    replicas: dict[int, int]
    """Parameters by the number of devices that each lies on."""
    microbatch_size: int

    @property
    def rows(self) -> int:
        """Rows of gradients that a device computes."""
        return -(-self.m // self.data_devices)

    @property
    def steps(self) -> int:
        """Micro-batches of them."""
        return -(-self.rows // self.microbatch_size)

    @property
    def shared(self) -> int:
        """Parameters whose gradients it computes."""
        return -(-self.d * self.data_devices // self.devices)

    @property
    def columns(self) -> int:
        """Columns that it owns."""
        return -(-self.d // self.devices)

    @property
    def windowed(self) -> bool:
        """Are there fewer columns in memory than it owns?"""
        return self.windows > 1

    @property
    def window_columns(self) -> int:
        """Columns that it holds at once."""
        return min(self.window or self.columns, self.columns)

    @property
    def windows(self) -> int:
        """Times that it makes a part of its columns."""
        return -(-self.columns // self.window_columns)

    @property
    def parameter_bytes(self) -> float:
        """Of the parameters on a device, in float32."""
        return 4 * sum(r * weights for r, weights in self.replicas.items()) / self.devices

    @property
    def microbatch_bytes(self) -> int:
        """Of the gradients of a micro-batch."""
        return 4 * self.microbatch_size * self.shared


def make_sharding(
    d: int,
    m: int,
    devices: int,
    data_devices: int | None,
    block_size: int | None,
    window: int | None,
    replicas: int | Mapping[int, int] | None,
    microbatch_size: int,
) -> Sharding:
    """Check the numbers of `scaling_cost`.

    Args:
        d: As there.
        m: As there.
        devices: As there.
        data_devices: As there.
        block_size: As there.
        window: As there.
        replicas: As there.
        microbatch_size: As there.

    Returns:
        A `Sharding`.

    Raises:
        ValueError: As there.
    """
    data = devices if data_devices is None else data_devices
    spread = {data: d} if replicas is None else {replicas: d} if isinstance(replicas, int) else dict(replicas)
    numbers = {"d": d, "m": m, "devices": devices, "data_devices": data, "microbatch_size": microbatch_size}
    optional = {"block_size": block_size, "window": window}
    for name, number in (numbers | {k: v for k, v in optional.items() if v is not None}).items():
        if number < 1:
            raise ValueError(f"{name} is {number}: pass at least 1.")
    for name, number in [("data_devices", data), *(("replicas", r) for r in spread)]:
        if number < 1 or devices % number:
            raise ValueError(f"{name} is {number}: pass a divisor of devices, which is {devices}.")
    if sum(spread.values()) != d:
        raise ValueError(f"replicas has {sum(spread.values())} parameters, d is {d}: every weight counts once.")
    return Sharding(d, m, devices, data, block_size, window, spread, microbatch_size)
