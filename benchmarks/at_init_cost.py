"""What scores at initialization cost, and how that grows with the network.

    python benchmarks/at_init_cost.py --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

A slim VGG at one, two and four times its width (0.1, 0.6 and 2.3 million weights), 20 images of noise of 16×16.
Seconds are of the second call, the better of two; a criterion of several rounds is asked for one. The exponent is that
of a power law through the sizes: 1 is linear. `--quick` takes the two smaller sizes and four criteria.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import Recorder, parser, pin_blas
from rich.progress import track

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.models.vgg import SLIM, VGG

IMAGES = 20
REPEATS = 2
WIDTHS = (1, 2, 4)
QUICK = ("snip", "synflow", "fisher-diagonal", "hessian-diagonal")


def network(times: int) -> tuple[Any, Any]:
    """The slim VGG, so many times as wide, in eval mode."""
    model = VGG([x * times if isinstance(x, int) else x for x in SLIM], rngs=nnx.Rngs(0))
    model.eval()
    return functional(model)


def seconds(call: Callable[[], Any]) -> float:
    """Of the second call, the better of two."""
    jax.block_until_ready(call())
    laps = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        laps.append(time.perf_counter() - start)
    return min(laps)


def main() -> int:
    """Time every criterion at every size."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--criterion", nargs="*", default=list(wj.INIT_CRITERIA), choices=list(wj.INIT_CRITERIA))
    args = options.parse_args()
    record = Recorder(args.json, "at_init_cost", "vgg-slim", "noise")
    key = jax.random.key(0)
    batch = jax.random.normal(key, (IMAGES, 16, 16, 3)), jnp.arange(IMAGES) % 10
    networks = [network(times) for times in (WIDTHS[:2] if args.quick else WIDTHS)]
    for name in track(QUICK if args.quick else args.criterion):
        criterion = wj.INIT_CRITERIA[name]
        sizes, times = [], []
        for apply_fn, params in networks:
            select = wj.hidden_kernels(apply_fn, params, batch[0])
            function = apply_fn if criterion.asks == "network" else wj.cross_entropy(apply_fn)
            ask = partial(criterion.scores, function, params, batch, key, select=select, check=False)
            sizes.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
            times.append(seconds(ask))
            config = {"title": criterion.title, "parameters": sizes[-1]}
            record.add("seconds", times[-1], "s", method=name, column=None, config=config)
        exponent = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
        record.add("time_exponent", exponent, "", method=name, column=None, config={"title": criterion.title})
    return 0


if __name__ == "__main__":
    sys.exit(main())
