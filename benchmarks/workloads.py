"""A network with its loss and examples: trained and real, or the same shapes at random for a quick run."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from woodjax.adapters.nnx import functional
from woodjax.comparison import load_problem
from woodjax.losses import cross_entropy
from woodjax.models import mlpnet, resnet20
from woodjax.typing import Batch, LossFn, Params


class Workload(NamedTuple):
    """What a part of the benchmark runs on."""

    name: str
    loss_fn: LossFn
    params: Params
    batch: Batch
    examples: int
    microbatch_size: int = 64


def workload(name: str, data_dir: Path | None, quick: bool) -> Workload:
    """The network by its name."""
    if not quick and data_dir is not None:
        dataset, weights = {
            "mlpnet": ("mnist", "mlpnet_mnist.safetensors"),
            "resnet20": ("cifar10-subset", "resnet20_cifar10.safetensors"),
        }[name]
        problem = load_problem(dataset, data_dir=data_dir, network=name, weights=data_dir / "checkpoints" / weights)
        return Workload(name, problem.loss_fn, problem.params, problem.pool, 1000)
    make, shape, examples = {"mlpnet": (mlpnet, (784,), 1000), "resnet20": (resnet20, (32, 32, 3), 64)}[name]
    model = make(nnx.Rngs(0))
    model.eval()
    apply_fn, params = functional(model)
    inputs = jax.random.normal(jax.random.key(0), (examples, *shape))
    batch = inputs, jnp.arange(examples) % 10
    return Workload(name, cross_entropy(apply_fn), params, batch, min(examples, 256))
