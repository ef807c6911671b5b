"""What `prune_transform` adds to a training step on which no pruning is due, by route.

    python benchmarks/transform_overhead.py --json OUT.jsonl

A LeNet-300-100 (266,200 weights) on random images, Adam with weight decay, everything donated. Steps of all routes
take turns, so that the machine's moods meet all of them: medians of ratios in one run. `--quick` takes fewer turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from records import Recorder, parser, pin_blas, seeds

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.losses import cross_entropy
from woodjax.models import lenet_300_100

NEVER = wj.one_shot_schedule(2**30, 0.9)
WINDOW = 64
EXAMPLES = 256


def routes(loss_fn: Any, batch: Any) -> dict[str, tuple[optax.GradientTransformation, dict[str, Any]]]:
    """Transformations by route, with the keywords of their update."""
    adam = optax.adamw(1e-3)
    small = jax.tree.map(lambda x: x[:EXAMPLES], batch)
    return {
        "none": (adam, {}),
        "A": (wj.prune_transform(adam), {}),
        "A in a chain": (optax.chain(adam, wj.prune_transform()), {}),
        "magnitude in the update": (wj.prune_transform(adam, schedule=NEVER, criterion=wj.magnitude_scores), {}),
        "B": (
            wj.prune_transform(adam, schedule=NEVER),
            {"refresh_fn": partial(wj.refresh_masks, loss_fn=loss_fn, batch=small)},
        ),
        "D, refreshed from outside": (wj.prune_transform(adam, fisher=wj.gradient_window(WINDOW)), {}),
        "D": (wj.prune_transform(adam, schedule=NEVER, fisher=wj.gradient_window(WINDOW)), {}),
        "D in bfloat16": (
            wj.prune_transform(adam, schedule=NEVER, fisher=wj.gradient_window(WINDOW, dtype=jnp.bfloat16)),
            {},
        ),
    }


def stepper(tx: optax.GradientTransformation, keywords: dict[str, Any], loss_fn: Any) -> Callable[..., Any]:
    """A compiled training step."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch)))(params)
        updates, state = tx.update(gradient, state, params, **keywords)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> int:
    """Measure all routes at two batch sizes."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    args = options.parse_args()
    record = Recorder(args.json, "transform_overhead", "lenet-300-100", "random")
    turns, steps = (5, 20) if args.quick else (25, 40)
    (seed,) = seeds(args.seeds)
    apply_fn, start = functional(lenet_300_100(nnx.Rngs(seed)))
    loss_fn = cross_entropy(apply_fn)
    for size in (128, 1024):
        batch = jax.random.normal(jax.random.key(seed), (size, 784)), jnp.arange(size) % 10
        found, networks, compiled = {}, {}, {}
        for name, (tx, keywords) in routes(loss_fn, batch).items():
            params = jax.tree.map(jnp.copy, start)
            found[name], compiled[name] = [], stepper(tx, keywords, loss_fn)
            networks[name] = jax.block_until_ready(compiled[name](params, tx.init(params), batch))
        for _ in range(turns):
            for name, step in compiled.items():
                mark = time.perf_counter()
                for _ in range(steps):
                    networks[name] = step(*networks[name], batch)
                jax.block_until_ready(networks[name])
                found[name].append((time.perf_counter() - mark) / steps)
        for name, times in found.items():
            ratios = [t / plain for t, plain in zip(times, found["none"], strict=True)]
            arguments = *jax.eval_shape(lambda network: network, networks[name]), batch
            memory = compiled[name].lower(*arguments).compile().memory_analysis()
            config = {
                "route": name,
                "batch_size": size,
                "seconds": statistics.median(times),
                "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
            }
            record.add("step_overhead", statistics.median(ratios), "ratio", method=name, column=None, config=config)
            print(f"batch {size}, route {name}: {statistics.median(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
