"""How good is each inverse: every curvature against the dense Hessian of a network that is small enough to have one.

A network 64-16-10 of ReLUs, 1,184 weights, on the embedded digits, at a minimum of the training loss plus the weight
decay `½ λ |w|²`; biases are held fixed. The Hessian of that objective is the Hessian of the loss plus `λI`: one `λ` is
weight decay and damping at once, the same for every curvature, and there is no first-order term. What is left of
negative eigenvalues is set to zero in the reference.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from records import Recorder, parser, pin_blas, seeds
from rich.progress import track
from scipy.stats import spearmanr

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.datasets import load_dataset
from woodjax.losses import cross_entropy
from woodjax.models.mlp import MLP
from woodjax.training import train

DECAY = 1e-3
LEVELS = np.linspace(0.05, 0.95, 19).round(2)
DEPTH = 64  # unit vectors, or steps, in work at once

Build = Callable[..., wj.Curvature]


class Task(NamedTuple):
    """A trained network, and its Hessian."""

    apply_fn: Any
    loss_fn: Any
    params: Any
    batch: Any
    layout: wj.Layout
    hessian: np.ndarray  # [d, d], without weight decay
    gradient_norm: float

    @property
    def weights(self) -> np.ndarray:
        """Prunable weights `[d]`."""
        return np.asarray(self.layout.to_blocks(self.params), np.float64)[0]

    @property
    def reference(self) -> np.ndarray:
        """The nearest Hessian without negative eigenvalues, damped."""
        values, vectors = np.linalg.eigh(self.hessian)
        return (vectors * (np.maximum(values, 0) + DECAY)) @ vectors.T


class Titled(NamedTuple):
    """A method, as pictures call it."""

    title: str
    family: str
    build: Build


def to_minimum(loss_fn: Any, params: Any, batch: Any, steps: int) -> tuple[Any, float]:
    """L-BFGS on the mean training loss plus the weight decay; and the norm of the gradient that is left."""

    def objective(p: Any) -> jax.Array:
        decay = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch)) + 0.5 * DECAY * decay

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        p, state = carry
        value, gradient = value_and_grad(p, state=state)
        updates, state = tx.update(gradient, state, p, value=value, grad=gradient, value_fn=objective)
        return (optax.apply_updates(p, updates), state), None

    @jax.jit
    def run(p: Any) -> tuple[Any, jax.Array]:
        (p, _), _ = lax.scan(step, (p, tx.init(p)), length=steps)
        return p, optax.global_norm(jax.grad(objective)(p))

    params, norm = run(params)
    return params, float(norm)


def make_task(seed: int, quick: bool) -> Task:
    """Train to a minimum, and take the Hessian column by column."""
    data = load_dataset("digits")
    model = MLP((64, 8 if quick else 16, 10), rngs=nnx.Rngs(seed))
    train(model, data, epochs=10 if quick else 30, seed=seed)
    apply_fn, params = functional(model)
    loss_fn = cross_entropy(apply_fn)
    batch = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    params, norm = to_minimum(loss_fn, params, batch, 100 if quick else 1000)
    layout = wj.make_layout(params)

    @jax.jit
    def columns(params: Any, batch: Any) -> jax.Array:
        def column(unit: jax.Array) -> jax.Array:
            return layout.to_blocks(wj.hvp(loss_fn, params, batch, layout.to_tree(unit[None], 0)))[0]

        return lax.map(column, jnp.eye(layout.num_weights), batch_size=DEPTH)

    hessian = np.asarray(columns(params, batch), np.float64)
    return Task(apply_fn, loss_fn, params, batch, layout, (hessian + hessian.T) / 2, norm)


def methods(task: Task, seed: int, quick: bool) -> dict[str, Titled]:
    """Every curvature, as a function of its damping."""
    params, (inputs, labels) = task.params, task.batch
    sampled_key, probe_key = jax.random.split(jax.random.key(seed))
    rows = wj.per_example_gradients(task.loss_fn, params, task.batch, check=False)
    drawn = jax.random.categorical(sampled_key, task.apply_fn(params, inputs))
    sampled = wj.per_example_gradients(task.loss_fn, params, (inputs, drawn), check=False)
    classes = wj.all_class_gradients(task.apply_fn, params, inputs, microbatch_size=256)
    stream = partial(wj.stream_gradients, task.loss_fn, params, microbatch_size=256, check=False)
    exact = wj.gauss_newton_diagonal(task.apply_fn, params, inputs, microbatch_size=128)
    probes = 20 if quick else 100
    estimate = wj.hutchinson_diagonal(task.loss_fn, params, task.batch, probe_key, probes=probes).diagonal

    def blocks(gradients: Any, block_size: int | None) -> Build:
        return lambda damping: wj.block_fisher(gradients, block_size=block_size, damping=damping, engine="primal")

    mean = float(np.trace(task.hessian)) / task.layout.num_weights  # layer inputs are in other units than the loss
    layer = max(spec.size for spec in task.layout.selected)
    return {
        "hutchinson": Titled(f"Hutchinson, {probes} probes", "diagonal", partial(wj.diagonal_curvature, estimate)),
        "gauss-newton-diagonal": Titled("Gauss–Newton, exact", "diagonal", partial(wj.diagonal_curvature, exact)),
        "diagonal": Titled("diagonal", "empirical", lambda damping: wj.diagonal_fisher(rows, damping=damping)),
        "block-8": Titled("blocks of 8", "empirical", blocks(rows, 8)),
        "block-32": Titled("blocks of 32", "empirical", blocks(rows, 32)),
        "block-128": Titled("blocks of 128", "empirical", blocks(rows, 128)),
        "layer": Titled("whole layers", "empirical", blocks(rows, layer)),
        "network": Titled("whole network", "empirical", blocks(rows, None)),
        "sampled-layer": Titled("whole layers, sampled labels", "true", blocks(sampled, layer)),
        "sampled-network": Titled("whole network, sampled labels", "true", blocks(sampled, None)),
        "all-class-layer": Titled("whole layers, all classes", "true", blocks(classes, layer)),
        "all-class-network": Titled("whole network, all classes", "true", blocks(classes, None)),
        "kronecker": Titled(
            "K-FAC, true labels",
            "factored",
            lambda damping: wj.kronecker_fisher(stream((inputs, labels)), damping=damping),
        ),
        "kronecker-sampled": Titled(
            "K-FAC, sampled labels",
            "factored",
            lambda damping: wj.kronecker_fisher(stream((inputs, drawn)), damping=damping),
        ),
        "layer-inputs": Titled(
            "layer inputs",
            "factored",
            lambda damping: wj.layer_input_hessian(stream(task.batch), damping=wj.Relative(damping / mean)),
        ),
        "hessian": Titled("Hessian, damped", "dense", partial(dense, task)),
    }


def dense(task: Task, damping: float) -> wj.BlockFisher:
    """The reference as a curvature."""
    inverse = jnp.asarray(np.linalg.inv(task.reference), jnp.float32)[None]
    return wj.BlockFisher(task.layout, inverse, jnp.full(1, damping), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="layout")
def dense_inverse(curvature: wj.Curvature, *, layout: wj.Layout) -> jax.Array:
    """All columns of `H⁻¹`."""

    def column(unit: jax.Array) -> jax.Array:
        return layout.to_blocks(curvature.solve(layout.to_tree(unit[None], 0)))[0]

    return lax.map(column, jnp.eye(layout.num_weights), batch_size=DEPTH)


@partial(jax.jit, static_argnames=("loss_fn", "layout"))
def losses_after(steps: jax.Array, params: Any, batch: Any, *, loss_fn: Any, layout: wj.Layout) -> jax.Array:
    """Mean training loss after each of many steps `[k, d]`."""

    def loss(step: jax.Array) -> jax.Array:
        moved = jax.tree.map(jnp.add, params, layout.to_tree(step[None], 0))
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(moved, batch))

    return lax.map(loss, steps, batch_size=DEPTH)


def increases(task: Task, steps: np.ndarray) -> np.ndarray:
    """Measured increase of the objective."""
    all_steps = jnp.asarray(np.concatenate([np.zeros((1, steps.shape[1])), steps]), jnp.float32)
    losses = losses_after(all_steps, task.params, task.batch, loss_fn=task.loss_fn, layout=task.layout)
    losses = np.asarray(losses, np.float64)
    decay = 0.5 * DECAY * (2 * steps @ task.weights + np.sum(steps**2, axis=1))
    return losses[1:] - losses[0] + decay


def single_steps(inverse: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Optimal Brain Surgeon's step for each weight alone, `[d, d]`."""
    return -(weights / np.diag(inverse))[:, None] * inverse


def compare(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Mean cosine, and mean relative error, of rows."""
    norms = np.linalg.norm(expected, axis=1)
    cosine = np.sum(found * expected, axis=1) / norms / np.linalg.norm(found, axis=1)
    return float(cosine.mean()), float((np.linalg.norm(found - expected, axis=1) / norms).mean())


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Of the logarithms, where there is an increase."""
    rising = measured > 0
    return float(np.corrcoef(np.log(predicted[rising]), np.log(measured[rising]))[0, 1])


def measure(record: Recorder, task: Task, seed: int, quick: bool) -> None:
    """All metrics of all curvatures."""
    d, weights = task.layout.num_weights, task.weights
    exact = np.linalg.inv(task.reference)
    vectors = np.random.default_rng(seed).standard_normal((32, d))
    optimum = increases(task, single_steps(exact, weights))
    magnitude = wj.magnitude_scores(task.params)
    masks = [wj.make_masks(magnitude, float(level)) for level in LEVELS]
    spectrum = np.linalg.eigvalsh(task.hessian)
    facts = {"weights": d, "examples": len(task.batch[1]), "damping": DECAY, "gradient_norm": task.gradient_norm}
    facts |= {"mean_diagonal": float(np.trace(task.hessian)) / d}
    facts |= {"smallest_eigenvalue": float(spectrum[0]), "largest_eigenvalue": float(spectrum[-1])}
    record.add(
        "negative_part", _negative_part(spectrum), "ratio", method="spectrum", column=None, seed=seed, config=facts
    )

    def add(method: str, titled: Titled, metric: str, value: float, unit: str, **more: Any) -> None:
        config = {"title": titled.title, "family": titled.family}
        record.add(metric, float(value), unit, method=method, column=None, seed=seed, config=config, **more)

    ranked = Titled("magnitude", "none", partial(dense, task))
    large = np.abs(weights) >= np.median(np.abs(weights))  # the others' increases are too small to be divided by w²
    stiffness = optimum[large] / weights[large] ** 2
    add("magnitude", ranked, "single_spearman", spearmanr(np.abs(weights), optimum)[0], "correlation")
    for method, titled in track(methods(task, seed, quick).items(), description=f"seed {seed}"):
        put = partial(add, method, titled)
        curvature = titled.build(damping=DECAY)
        inverse = np.asarray(dense_inverse(curvature, layout=task.layout), np.float64)
        for name, right in (("random", vectors), ("columns", np.eye(d))):
            cosine, error = compare(right @ inverse, right @ exact)
            put(f"cosine_{name}", cosine, "cosine")
            put(f"error_{name}", error, "relative")
        predicted = weights**2 / (2 * np.diag(inverse))
        own = increases(task, single_steps(inverse, weights))
        put("single_spearman", spearmanr(predicted, optimum)[0], "correlation")
        put("stiffness_spearman", spearmanr(1 / np.diag(inverse)[large], stiffness)[0], "correlation")
        put("single_ratio", predicted.sum() / own.sum(), "ratio")
        put("single_increase", own.sum() / optimum.sum(), "ratio")
        updates = [wj.compensate(task.params, mask, curvature) for mask in masks]
        predictions = np.array([float(wj.predicted_loss_change(update, curvature)) for update in updates])
        measured = increases(task, np.stack([np.asarray(task.layout.to_blocks(update))[0] for update in updates]))
        put("path_correlation", correlation(predictions, measured), "correlation")
        for level, change, prediction in zip(LEVELS, measured, predictions, strict=True):
            put("path_increase", change, "nats", sparsity=float(level))
            put("path_prediction", prediction, "nats", sparsity=float(level))


def _negative_part(spectrum: np.ndarray) -> float:
    return float(-spectrum[spectrum < 0].sum() / spectrum[spectrum > 0].sum())


def main() -> int:
    """Every seed trains a network of its own."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    pin_blas()
    hidden = 8 if args.quick else 16
    record = Recorder(args.json, "inverse_quality", f"mlp 64-{hidden}-10", "digits")
    for seed in seeds(args.seeds):
        measure(record, make_task(seed, args.quick), seed, args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
