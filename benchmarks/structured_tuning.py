"""Half of the multiply-adds, and then a few epochs: with and without implants, at equal parameters."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree
from records import Recorder

import woodjax as wj
from woodjax.adapters.nnx import functional, functional_variables
from woodjax.datasets import Dataset, augment
from woodjax.training import fit_shrunk, reestimate_shrunk, sgd_recipe

SCORE_IMAGES = 128
MOMENT_IMAGES = 512
IMPLANTS = 0.3  # of what goes
BATCH = 128


def tune(
    record: Recorder,
    model: nnx.Module,
    data: Dataset,
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    seed: int,
    quick: bool,
) -> None:
    """Fine-tune what is left, and record accuracy before and after, multiply-adds and parameters."""
    epochs, examples, rate = (1, data.num_train, 0.02) if quick else (2, 12_500, 0.02)
    order = np.random.default_rng(seed).permutation(data.num_train)[:examples]
    part = data._replace(train_inputs=data.train_inputs[order], train_labels=data.train_labels[order])
    apply_fn, variables = functional_variables(model)
    params_fn, params = functional(model)
    groups = wj.channel_groups(apply_fn, variables, part.train_inputs[:1])
    images = jnp.asarray(part.train_inputs[:MOMENT_IMAGES])
    scores = wj.gate_scores(groups, params_fn, params, images[:SCORE_IMAGES])
    plain = wj.select_channels(groups, scores, macs=0.5)
    parameters = float(groups.parameters(*plain))
    mixed = wj.select_channels(groups, scores, parameters=parameters, implants=IMPLANTS)
    refitted = _refitted(groups, params_fn, params, variables, plain.kept, images)
    moved = _refitted(groups, params_fn, params, variables, mixed.kept, images)
    plans = {
        "dense": wj.make_plan(groups, {}),
        "shrunk": wj.make_plan(groups, *plain),
        "implants": wj.make_plan(groups, *mixed),
    }
    implanted = partial(wj.start_implants, apply_fn, plan=plans["implants"], inputs=images)
    starts = {
        "dense": ("dense", variables),
        "shrunk": ("shrunk", plans["shrunk"].shrink(variables)),
        "shrunk, least squares": ("shrunk", plans["shrunk"].shrink(refitted)),
        "implants, zero": ("implants", implanted(variables, start="zero")),
        "implants, centre": ("implants", implanted(variables, start="centre")),
        "implants, least squares": ("implants", implanted(variables)),
        "implants, all least squares": ("implants", implanted(moved)),
    }
    if quick:
        starts = {name: starts[name] for name in ("shrunk, least squares", "implants, least squares")}
    steps = epochs * (part.num_train // BATCH)
    optimizer = sgd_recipe(rate, steps=steps, decay="cosine", weight_decay=1e-4)
    for name, (plan, begin) in starts.items():
        network = jax.jit(wj.shrunk_network(apply_fn, plans[plan]))
        after = fit_shrunk(
            model,
            plans[plan],
            begin,
            part,
            optimizer=optimizer,
            epochs=epochs,
            seed=seed,
            batch_size=BATCH,
            augment=None if quick else augment,
            on_epoch=lambda info, _, name=name: print(
                f"{name}: epoch {info.epoch}, loss {info.losses[-50:].mean():.3f}"
            ),
        )
        again = partial(reestimate_shrunk, model, plans[plan], batches=_batches(part))
        for when, tree in {"before": begin, "re-estimated": again(begin), "after": again(after)}.items():
            for test, (inputs, labels) in tests.items():
                config = {"test": test, "when": when, "epochs": epochs, "examples": part.num_train}
                value = accuracy_of(network, tree, inputs, labels)
                record.add("accuracy", value, "1", method=name, column=None, seed=seed, config=config)
                print(f"{name}, {when}, {test}: {100 * value:.1f}")
        chosen = {"dense": ({}, {}), "shrunk": plain, "implants": mixed}[plan]
        for metric, value in (("macs", groups.macs(*chosen)), ("parameters", groups.parameters(*chosen))):
            record.add(metric, value, "1", method=name, column=None, seed=seed, config={"part": "tune"})


def _refitted(
    groups: wj.ChannelGroups,
    params_fn: wj.typing.ApplyFn,
    params: PyTree,
    variables: PyTree,
    kept: Mapping[str, np.ndarray],
    images: jax.Array,
) -> PyTree:
    """The variables with kernels fitted to what they read after pruning."""
    moments = wj.input_moments(groups, params_fn, params, images, microbatch_size=32)
    moved = optax.apply_updates(params, wj.reconstruct_channels(groups, params, kept, moments))
    return _joined(variables, moved)


def _joined(tree: PyTree, some: PyTree) -> PyTree:
    if not isinstance(some, dict):
        return some
    return {name: _joined(inner, some[name]) if name in some else inner for name, inner in tree.items()}


def _batches(data: Dataset) -> list[np.ndarray]:
    size = min(500, data.num_train)
    return [data.train_inputs[i : i + size] for i in range(0, min(data.num_train - size + 1, 5000), size)]


def accuracy_of(network: wj.typing.ApplyFn, variables: PyTree, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the images that are told right."""
    right = [
        np.asarray(network(variables, jnp.asarray(images[i : i + 500])).argmax(-1)) == labels[i : i + 500]
        for i in range(0, len(labels), 500)
    ]
    return float(np.concatenate(right).mean())
