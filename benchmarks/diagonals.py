"""How good diagonals of the Hessian are: exact ones against `H eᵢ`, Hutchinson's against the exact one.

    python benchmarks/diagonals.py --data-dir DIR --seeds 0,1 --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

A slim VGG with batch normalisation on 16×16 images, at initialization and with statistics of the images. Without
`--data-dir` the images are noise. `--quick` takes a few images and up to 30 probes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from records import Recorder, parser, pin_blas, seeds
from rich.progress import track

import woodjax as wj
from woodjax.datasets import load_dataset
from woodjax.typing import ApplyFn, Batch, Params

PROBES = (1, 3, 10, 30, 100, 300)
TEMPERATURES = (1.0, 200.0)
Signs = Literal["batch", "example"]
SIGNS: tuple[Signs, ...] = ("batch", "example")
WIDTHS = (16, 32, 64, 64)


class Network(NamedTuple):
    """A network and labelled images."""

    apply_fn: ApplyFn
    params: Params
    batch: Batch


def diagonal_error(apply_fn: ApplyFn, params: Params, batch: Batch, *, coordinates: int = 32, seed: int = 0) -> float:
    """Relative error of the Gauss–Newton diagonal against `H eᵢ`, over random coordinates of all leaves.

    Zero up to rounding where the network is piecewise linear in each weight.
    """
    exact, put_back = ravel_pytree(wj.gauss_newton_diagonal(apply_fn, params, batch[0]))
    chosen = np.random.default_rng(seed).choice(exact.size, min(coordinates, exact.size), replace=False)
    loss_fn = wj.cross_entropy(apply_fn)
    units = (put_back(jnp.zeros_like(exact).at[i].set(1)) for i in chosen)
    columns = (ravel_pytree(wj.hvp(loss_fn, params, batch, unit))[0] for unit in units)
    found = jnp.stack([column[i] for i, column in zip(chosen, columns, strict=True)])
    return float(jnp.linalg.norm(found - exact[chosen]) / jnp.linalg.norm(exact[chosen]))


def hutchinson_error(
    apply_fn: ApplyFn,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    probes: Sequence[int] = PROBES,
    temperature: float = 1.0,
    signs: Signs = "batch",
    microbatch_size: int | None = None,
    probes_at_once: int = 1,
) -> dict[int, float]:
    """Root-mean-square error of Hutchinson's diagonal over the root mean square of the exact one, for counts of probes.

    Over kernels; every count has probes of its own. Gauss–Newton's diagonal stands for the exact one: give it a network
    of ReLUs. At a temperature `T` the estimate is multiplied by `T²`, which makes it one of the Gauss–Newton diagonal
    at `T = 1` as long as predictions are uniform.
    """
    loss_fn = wj.cross_entropy(apply_fn, temperature=temperature)
    exact = wj.gauss_newton_diagonal(apply_fn, params, batch[0])
    options = {"signs": signs, "microbatch_size": microbatch_size, "probes_at_once": probes_at_once}
    errors = {}
    for count in probes:
        own = jax.random.fold_in(key, count)
        found = wj.hutchinson_diagonal(loss_fn, params, batch, own, probes=max(count, 2), **options)
        squares, size = 0.0, 0.0
        for mean, error, value in zip(*map(jax.tree.leaves, (*found[:2], exact)), strict=True):
            if value.ndim >= 2:
                gap = jnp.square(temperature**2 * mean - value)
                if count == 1:  # two probes are their mean ± its standard error: their squared errors are on average
                    gap += jnp.square(temperature**2 * error)
                squares, size = squares + float(jnp.sum(gap)), size + float(jnp.sum(jnp.square(value)))
        errors[count] = (squares / size) ** 0.5
    return errors


def record_diagonals(
    record: Recorder,
    network: Network,
    *,
    seed: int,
    probes: Sequence[int] = PROBES,
    temperatures: Sequence[float] = TEMPERATURES,
    kinds: Sequence[Signs] = SIGNS,
    microbatch_size: int | None = None,
    probes_at_once: int = 1,
) -> None:
    """Add every measurement of one network."""
    common = {"method": "gauss_newton", "column": None, "seed": seed}
    record.add("diagonal_relative_error", diagonal_error(*network, seed=seed), "1", **common)
    common["method"] = "hutchinson"
    options = {"probes": probes, "microbatch_size": microbatch_size, "probes_at_once": probes_at_once}
    for temperature, signs in track([(t, s) for t in temperatures for s in kinds]):
        kind = {"temperature": temperature, "signs": signs}
        for count, error in hutchinson_error(*network, jax.random.key(seed), **kind, **options).items():
            record.add("hutchinson_relative_error", error, "1", **common, config={"probes": count, **kind})


def slim_vgg(images: jax.Array, labels: jax.Array, seed: int) -> Network:
    """Four stages of two convolutions, normalised by the statistics of these images, with max-pooling between them."""
    rng, params, statistics, inputs = np.random.default_rng(seed), {}, {}, images.shape[-1]
    for number, width in enumerate(np.repeat(WIDTHS, 2)):
        bound = (9 * inputs) ** -0.5  # PyTorch's
        params[f"conv{number}"] = {
            "kernel": jnp.asarray(rng.uniform(-bound, bound, (3, 3, inputs, width)), jnp.float32),
            "scale": jnp.ones(width),
            "bias": jnp.zeros(width),
        }
        inputs = int(width)
    params["last"] = {"kernel": jnp.asarray(rng.uniform(-1, 1, (inputs, 10)) * inputs**-0.5, jnp.float32)}

    def forward(params: Params, x: jax.Array, statistics: Params, measure: bool) -> jax.Array:
        for number in range(2 * len(WIDTHS)):
            name = f"conv{number}"
            layer = params[name]
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            if measure:
                statistics[name] = x.mean((0, 1, 2)), x.var((0, 1, 2))
            mean, variance = statistics[name]
            x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["bias"])
            if number % 2 and number < 2 * len(WIDTHS) - 1:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.mean((1, 2)) @ params["last"]["kernel"]

    forward(params, images, statistics, measure=True)
    return Network(lambda p, x: forward(p, x, statistics, measure=False), params, (images, labels))


def small_images(data_dir: Path | None, count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """CIFAR-10 averaged down to 16×16, or noise without a folder."""
    rng = np.random.default_rng(seed)
    if data_dir is None:
        images, labels = rng.standard_normal((count, 16, 16, 3)), rng.integers(0, 10, count)
        return jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    data = load_dataset("cifar10", data_dir)
    chosen = rng.choice(len(data.train_labels), count, replace=False)
    images = data.train_inputs[chosen].reshape(count, 16, 2, 16, 2, 3).mean((2, 4))
    return jnp.asarray(images), jnp.asarray(data.train_labels[chosen])


def main() -> int:
    """Measure at initialization, one network for each seed."""
    pin_blas()
    args = parser(__doc__.splitlines()[0]).parse_args()
    count, probes = (10, PROBES[:4]) if args.quick else (100, PROBES)
    record = Recorder(args.json, "diagonals", "slim-vgg", "noise 16×16" if args.data_dir is None else "cifar10 16×16")
    for seed in seeds(args.seeds):
        network = slim_vgg(*small_images(args.data_dir, count, seed), seed)
        record_diagonals(record, network, seed=seed, probes=probes, microbatch_size=min(20, count), probes_at_once=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
