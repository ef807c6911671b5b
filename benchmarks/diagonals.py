"""How good diagonals of the Hessian are: exact ones against `H eᵢ`, Hutchinson's against the exact one.

    python benchmarks/diagonals.py --data-dir DIR --seeds 0,1 --json OUT.jsonl
    python benchmarks/render.py OUT.jsonl

A slim VGG at initialization, after a warm-up of its batch statistics, and ten images of each class, 16×16: of
CIFAR-10, or of the embedded digits without `--data-dir`. `--quick` takes one image of each class and up to 30 probes.
"""

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from pai_start import load, start
from records import Recorder, parser, pin_blas, seeds
from rich.progress import track

import woodjax as wj
from woodjax.typing import ApplyFn, Batch, Params

PROBES = (1, 3, 10, 30, 100, 300)
TEMPERATURES = (1.0, 200.0)
Signs = Literal["batch", "example"]
SIGNS: tuple[Signs, ...] = ("batch", "example")
EXAMPLES = 16_000  # for the warm-up


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


def main() -> int:
    """Measure at initialization, one network for each seed."""
    pin_blas()
    args = parser(__doc__.splitlines()[0]).parse_args()
    dataset = "digits" if args.data_dir is None else "cifar10"
    per_class, probes = (1, PROBES[:4]) if args.quick else (10, PROBES)
    record = Recorder(args.json, "diagonals", "vgg-slim", f"{dataset} 16×16")
    data = load(dataset, args.data_dir, image_size=16, examples=EXAMPLES)
    for seed in seeds(args.seeds):
        begin = start("vgg-slim", data, seed, warm=True, per_class=per_class)
        network = Network(begin.apply_fn, begin.params, begin.batch)
        record_diagonals(record, network, seed=seed, probes=probes, microbatch_size=10 * per_class, probes_at_once=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
