"""Training of the network that a plan leaves of an NNX model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array

from woodjax.adapters.nnx import TrainFn, functional_train
from woodjax.batch_stats import reestimate_batch_stats
from woodjax.datasets import TrainingData
from woodjax.structured import PrunePlan, shrunk_network
from woodjax.training.loop import EpochInfo, fit_network
from woodjax.typing import Batch, PyTree


def fit_shrunk(
    model: nnx.Module,
    plan: PrunePlan,
    variables: PyTree,
    dataset: TrainingData,
    *,
    optimizer: optax.GradientTransformation,
    on_epoch: Callable[[EpochInfo, PyTree], None] | None = None,
    **options: Any,
) -> PyTree:
    """Fine-tune what a plan leaves of a model, in train mode.

    Args:
        model: The whole model, left as it is; its variables are not looked at.
        plan: Made of the groups of `woodjax.adapters.nnx.functional_variables(model)`.
        variables: What the plan leaves of its variables, with implants or without.
        dataset: Where the train split comes from.
        optimizer: For example of `sgd_recipe`.
        on_epoch: Called after each epoch with what is known of it and copies of the variables.
        **options: Of `fit`: `epochs`, `seed`, `batch_size`, `augment`, `checkpoint_dir` and so on.

    Returns:
        The trained variables.

    Raises:
        ValueError: As `fit`; variables that the plan does not leave.

    Cost:
        As `fit`, for the smaller network.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, numpy as np, woodjax as wj
        >>> from woodjax.adapters.nnx import functional_variables
        >>> from woodjax.datasets import load_dataset
        >>> from woodjax.models import digits_mlp
        >>> from woodjax.training import fit_shrunk, sgd_recipe
        >>> digits, model = load_dataset("digits"), digits_mlp(nnx.Rngs(0))
        >>> apply_fn, variables = functional_variables(model)
        >>> groups = wj.channel_groups(apply_fn, variables, digits.normalise(digits.test_inputs[:1]))
        >>> plan = wj.make_plan(groups, {"fc1/kernel": np.arange(64) < 16})
        >>> sgd, small = sgd_recipe(0.1, steps=100), plan.shrink(variables)
        >>> small = fit_shrunk(model, plan, small, digits, epochs=2, optimizer=sgd, seed=0, batch_size=64)
        >>> small["fc1"]["kernel"].shape
        (64, 16)
    """
    whole, params, rest = _train_mode(model)

    def tell(info: EpochInfo | None, params: PyTree, rest: PyTree) -> None:
        if info is not None and on_epoch is not None:
            on_epoch(info, jax.tree.map(lambda x: x.copy(), _joined(params, rest)))

    forward = jax.tree_util.Partial(_Forward(plan), whole)
    parts = (_part(variables, params), _part(variables, rest, others=True))
    return _joined(*fit_network(forward, *parts, dataset, optimizer=optimizer, on_epoch=tell, **options))


def reestimate_shrunk(model: nnx.Module, plan: PrunePlan, variables: PyTree, batches: Iterable[Batch]) -> PyTree:
    """`woodjax.reestimate_batch_stats` of what a plan leaves of a model: before its accuracy is looked at.

    Args:
        model: The whole model, left as it is; its variables are not looked at.
        plan: As for `fit_shrunk`.
        variables: What the plan leaves of its variables.
        batches: Inputs, all of the same size; large ones.

    Returns:
        The variables with batch statistics of the smaller network.

    Raises:
        ValueError: As `woodjax.reestimate_batch_stats`.

    Cost:
        A forward pass a batch, and one more.
    """
    whole, params, rest = _train_mode(model)
    forward = _Forward(plan)

    def update(params: PyTree, rest: PyTree, inputs: Batch) -> PyTree:
        return forward(whole, params, rest, inputs)[1]

    some, stats = _part(variables, params), _part(variables, rest, others=True)
    return _joined(some, reestimate_batch_stats(update, some, stats, batches))


def _train_mode(model: nnx.Module) -> tuple[TrainFn, PyTree, PyTree]:
    twin = nnx.merge(*nnx.split(model))  # the same arrays, a mode of its own
    twin.train()
    return functional_train(twin)


@dataclass(frozen=True)
class _Forward:
    """A forward pass in train mode, known to `jit` by its plan."""

    plan: PrunePlan

    def __call__(self, whole: TrainFn, params: PyTree, rest: PyTree, inputs: Batch) -> tuple[Array, PyTree]:
        def apply_fn(variables: PyTree, inputs: Batch) -> tuple[Array, PyTree]:
            return whole(variables["params"], variables["rest"], inputs)

        return shrunk_network(apply_fn, self.plan, updates=True)({"params": params, "rest": rest}, inputs)


def _part(variables: PyTree, like: PyTree, path: str = "variables", *, others: bool = False) -> PyTree:
    """The leaves of nested dicts that another one has too; with `others` those that are missing as they are there."""
    if not isinstance(like, dict):
        return variables
    found = {}
    for name, inner in like.items():
        if isinstance(variables, dict) and name in variables:
            found[name] = _part(variables[name], inner, f"{path}/{name}", others=others)
        elif others:
            found[name] = inner
        else:
            raise ValueError(f"{path} has no '{name}', which the model has: pass plan.shrink(variables) of this model.")
    return found


def _joined(first: PyTree, second: PyTree) -> PyTree:
    """All leaves of two nested dicts."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first
    return first | {name: _joined(first[name], inner) if name in first else inner for name, inner in second.items()}
