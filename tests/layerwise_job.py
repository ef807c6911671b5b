"""Layer-by-layer pruning with sequences on four devices: `python layerwise_job.py FILE` leaves what came out there.

Run by `test_layerwise`, which compares it with one device.
"""

import os
import sys

if __name__ == "__main__":  # doctests of this folder are collected by importing it
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from layerwise_case import layers_of, network, square_loss

    import woodjax as wj
    from woodjax.layerwise.hidden import MicroBatches
    from woodjax.layerwise.moments import add_moments

    trees, hidden = network(5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    options = {"microbatch_size": 4, "sharding": NamedSharding(mesh, jax.P("data"))}
    hidden = np.concatenate([hidden, hidden[:2]])
    layers = layers_of(trees)
    found = wj.squared_output_gradients(layers, hidden, square_loss, np.zeros_like(hidden), **options)
    final, _ = wj.prune_layers(layers, hidden, sparsity=0.5, output_gradients=found, **options)
    out = {f"{i}/{name}": leaf for i, layer in enumerate(layers) for name, leaf in layer.params.items()}
    programs = add_moments._cache_size()

    layer = layers[0]
    layout = wj.make_layout(layer.params)
    batches = MicroBatches.of(hidden, 4, options["sharding"])
    params, (part, *_) = batches.place(layer.params), batches.cut(hidden)
    moments = {"up": jax.numpy.zeros((1, 8, 8))}
    function = jax.tree_util.Partial(layer.apply)
    lowered = add_moments.lower(function, params, part, None, moments, layout=layout, diagonal=False)
    all_reduces = lowered.compile().as_text().count("all-reduce(")
    np.savez(sys.argv[1], final=final, programs=programs, all_reduces=all_reduces, **out)
