"""All routes on two devices with an explicit mesh: `python explicit_job.py FOLDER` leaves what came out there.

Run by `test_transform_conformance`, which compares it with one device.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # doctests of this folder are collected by importing it
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

    import jax
    import numpy as np
    from jax.sharding import AxisType
    from test_transform_conformance import TWO_DEVICES, placed

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    for name in TWO_DEVICES:
        with jax.set_mesh(mesh):
            found = placed(name, lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("x"))))
        np.savez(Path(sys.argv[1]) / f"{name}.npz", *jax.tree.leaves(found))
