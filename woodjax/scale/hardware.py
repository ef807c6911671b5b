"""What the machines can do that costs are computed for."""

from typing import NamedTuple


class Hardware(NamedTuple):
    """Peak rates of one device. Nothing reaches all of them at once: costs computed from them are lower bounds.

    Args:
        name: As tables show it.
        flops: Of matrix products that are accurate to float32, per second.
        memory_bandwidth: Bytes per second.
        memory_bytes: Of one device.
        link_bandwidth: Bytes per second that a device sends to others, over all its links.
        link_latency: Seconds from one device to another for a message of no length.

    Example:
        >>> import woodjax as wj
        >>> wj.H100_SXM._replace(name="two nodes", link_bandwidth=50e9).link_bandwidth
        50000000000.0
    """

    name: str
    flops: float
    memory_bandwidth: float
    memory_bytes: float
    link_bandwidth: float
    link_latency: float


# NVIDIA's data sheet of the H100 SXM: 67 TFLOP/s in FP32, 80 GB of HBM3 at 3.35 TB/s, NVLink 900 GB/s in both
# directions together. JAX's HIGHEST precision of float32 does not use the TF32 tensor cores. The latency is assumed.
H100_SXM = Hardware("H100 SXM", 67e12, 3.35e12, 80e9, 450e9, 5e-6)

# Google Cloud's page on the TPU v5e: 197 TFLOP/s in bfloat16, 16 GB at 819 GB/s, 1,600 Gbit/s between chips (the sum
# of four links: a transfer along one axis of the torus has half of it). HIGHEST precision multiplies float32 in six
# passes of bfloat16. The latency is assumed.
TPU_V5E = Hardware("TPU v5e", 197e12 / 6, 819e9, 16e9, 200e9, 1e-6)
