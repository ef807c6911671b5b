# %% [markdown]
# # Gradual pruning in an Optax chain
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/2_gradual.ipynb)
#
# A network trains, loses a few of its weights at each of a dozen steps, and trains on. You will wrap an optimizer by
# `wj.prune_transform`, prune a Flax NNX model by the Fisher of a batch between two training steps, and watch loss,
# sparsity and accuracy along the way, beside the same training pruned by magnitude. Then a checkpoint of it all.
#
# Runtime on two CPU cores: a few minutes in full, less than one with `WOODJAX_SMALL=1`. With MNIST (a folder of
# TFDS data sets, named by `WOODJAX_DATA_DIR`) the network is LeNet-300-100, 266,200 weights; elsewhere one for 8×8
# digits.

# %%
# Installs woodjax where it is missing, and holds the jax that is there.
import importlib.metadata
import importlib.util
import sys

if "google.colab" in sys.modules or importlib.util.find_spec("woodjax") is None:
    pin = f"jax=={importlib.metadata.version('jax')}" if importlib.util.find_spec("jax") else "jax"
    # %pip install -q "woodjax[examples] @ git+https://github.com/woodjax/woodjax" "{pin}"
    found = f"jax=={importlib.metadata.version('jax')}"
    print(f"{found} as before" if found == pin else f"{pin} became {found}: restart the runtime")

# %%
import itertools
import os
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import load_dataset
from woodjax.models import digits_mlp, lenet_300_100

SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

try:
    if SMALL:
        raise FileNotFoundError
    data = load_dataset("mnist")
except (ValueError, FileNotFoundError, ImportError):
    print("The embedded 8×8 digits. For MNIST set WOODJAX_DATA_DIR to a folder of TFDS data sets, and WOODJAX_SMALL=0.")
    data = load_dataset("digits")
data = data.on_device()

if data.name == "mnist":
    make_model, batch_size, examples, target = lenet_300_100, 128, 256, 0.98
    begin, every, prunings, tune = 600, 80, 12, 600
else:
    make_model, batch_size, examples, target = digits_mlp, 64, 256, 0.9
    begin, every, prunings, tune = 200, 20, 8, 100
end = begin + every * prunings  # at `begin` itself nothing is pruned yet
steps = end + tune
test = jnp.asarray(data.test_inputs[:2000]), jnp.asarray(data.test_labels[:2000])

# %% [markdown]
# ## A schedule and an optimizer
#
# Zhu and Gupta's cubic schedule prunes much at first, while there is much that is useless, and little in the end:
#
# $$s(t) = s_{\text{end}} \left[1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right].$$
#
# `prune_transform` goes around any Optax optimizer. Pruned weights stay exactly zero, their gradients are zero before
# the optimizer sees them, and moments of weights are zeroed when they die.

# %%
schedule = wj.cubic_schedule(begin=begin, end=end, every=every, target=target)
transform = wj.prune_transform(optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
due = [step for step in range(steps) if schedule.due(step)]
print(f"{len(due)} prunings, at steps {due[0]} to {due[-1]}, to", ", ".join(f"{100 * schedule(s):.1f} %" for s in due))
assert len(due) == prunings
assert schedule(due[-1]) == target

# %% [markdown]
# ## The training loop
#
# The step is the one that you would write anyway. Where the schedule says so, `bridge.refresh` prunes between two
# steps: per-example gradients of a batch, the Fisher of the whole network, OBS scores, masks, and the joint update of
# the survivors. The same call with `curvature=None` prunes by magnitude and moves nobody.


# %%
@nnx.jit
def train_step(model, optimizer, inputs, labels):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


@nnx.jit
def accuracy(model):
    return (model(test[0]).argmax(-1) == test[1]).mean()


@dataclass
class Run:
    """A training, and what was seen on the way."""

    model: nnx.Module
    optimizer: nnx.Optimizer
    losses: list = field(default_factory=list)  # of every step
    points: list = field(default_factory=list)  # step, sparsity, accuracy
    prunings: list = field(default_factory=list)  # info, accuracy before, accuracy after


def endless_batches(seed):
    for epoch in itertools.count():
        yield from data.train_batches(batch_size=batch_size, seed=seed, epoch=epoch)


def train(**options):
    """From the first step to the last; options go to the refresh."""
    model = make_model(nnx.Rngs(SEED))
    run = Run(model, nnx.Optimizer(model, transform, wrt=nnx.Param))
    fresh = endless_batches(SEED + 1)  # for the curvature: another order than that of the training
    sparsity = 0.0
    for step, batch in zip(range(steps), endless_batches(SEED), strict=False):
        run.losses.append(train_step(model, run.optimizer, *batch))
        if schedule.due(step):
            rows = [next(fresh) for _ in range(-(-examples // batch_size))]
            pool = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:examples], *rows)
            before = float(accuracy(model))
            run.points.append((step, sparsity, before))
            info = bridge.refresh(model, run.optimizer, pool, schedule(step), **options)
            sparsity, after = float(info.sparsity), float(accuracy(model))
            run.points.append((step, sparsity, after))
            run.prunings.append((info, before, after))
        elif step % 20 == 19:
            run.points.append((step, sparsity, float(accuracy(model))))
    run.losses = np.asarray(jax.device_get(run.losses))
    return run


runs = {"Fisher": train(measure_loss=True), "magnitude": train(curvature=None)}
for name, run in runs.items():
    worst = min(after for _, _, after in run.prunings)
    print(f"{name:10} sparsity {run.points[-1][1]:.4f}, lowest accuracy after a pruning {100 * worst:5.1f} %,", end=" ")
    print(f"at the end {100 * run.points[-1][2]:.1f} %")

# %%
COLORS = {"Fisher": "#0072b2", "magnitude": "#e69f00"}
figure, axes = plt.subplots(3, 1, figsize=(8, 7.5), sharex=True, layout="constrained", height_ratios=(2, 1, 2))
window = 20
for name, run in runs.items():
    smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
    axes[0].plot(np.arange(window - 1, steps), smooth, color=COLORS[name], label=name, linewidth=1.2)
    at, sparsities, accuracies = zip(*run.points, strict=True)
    axes[1].plot(at, 100 * np.array(sparsities), color=COLORS[name], linestyle="-" if name == "Fisher" else "--")
    axes[2].plot(at, 100 * np.array(accuracies), color=COLORS[name], linewidth=1.2)
axes[0].set(yscale="log", ylabel=f"training loss, mean of {window} steps", title="dense training, pruning, tuning")
axes[0].legend()
axes[1].set(ylabel="sparsity, %")
axes[2].set(ylabel="test accuracy, %", xlabel="step")
for axis in axes:
    axis.axvspan(begin, end, color="0.5", alpha=0.1)
plt.show()

# %% [markdown]
# Until the first pruning the two are the same training, bit for bit. After it the vertical falls are the prunings: the
# Fisher chooses what the loss does not need, and its update makes up for most of the rest.

# %%
fisher, magnitude = runs["Fisher"], runs["magnitude"]
assert np.array_equal(fisher.losses[: due[0] + 1], magnitude.losses[: due[0] + 1])
falls = {name: np.array([before - after for _, before, after in run.prunings]) for name, run in runs.items()}
assert falls["Fisher"].mean() < falls["magnitude"].mean()
assert fisher.points[-1][2] > magnitude.points[-1][2] - 0.02
for run in runs.values():
    masks = bridge.masks(run.optimizer)
    _, params = bridge.functional(run.model)
    kernels = [(params[layer]["kernel"], masks[layer]["kernel"]) for layer in masks]
    pruned = sum(int((~mask).sum()) for _, mask in kernels)
    assert pruned == int(wj.prune_count(target, sum(mask.size for _, mask in kernels)))
    assert all(bool((kernel[~mask] == 0).all()) for kernel, mask in kernels)

# %% [markdown]
# ## What a pruning costs, and what the model said it would
#
# `refresh` returns a `RefreshInfo`. Its predicted change is that of the quadratic model with the Fisher; with
# `measure_loss=True` it also measures the loss over the same examples before and after.

# %%
infos = [info for info, _, _ in fisher.prunings]
predicted = [float(info.predicted_loss_change) for info in infos]
measured = [float(info.loss_after - info.loss_before) for info in infos]

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
places = np.arange(prunings)
for shift, name in ((-0.2, "Fisher"), (0.2, "magnitude")):
    left.bar(places + shift, 100 * falls[name], 0.4, color=COLORS[name], label=name)
right.plot(places, predicted, color=COLORS["Fisher"], linestyle="--", marker="o", markersize=4, label="predicted")
right.plot(places, measured, color=COLORS["Fisher"], marker="o", markersize=4, label="measured")
for axis in (left, right):
    axis.set_xticks(places, [f"{100 * schedule(step):.0f}" for step in due])
    axis.set_xlabel("sparsity after the pruning, %")
    axis.legend()
left.set(ylabel="fall of the test accuracy, points", title="each pruning")
right.set(ylabel="change of the loss, nats", title="Fisher: the quadratic model and the truth")
plt.show()
assert all(np.isfinite(predicted))
assert predicted[-1] >= 0

# %% [markdown]
# The prediction is far too small: some hundred gradients say nothing about most directions of so many weights, and what
# they say nothing about looks free. It ranks weights well all the same. What a pruning costs, `loss_after -
# loss_before` tells.

# %% [markdown]
# ## Checkpoint and resume
#
# Masks and counts are arrays in the optimizer state: whatever saves that saves the pruning. Two lines to save, two to
# load; the run that was loaded goes on with the same bits. (With Orbax: [gradual
# pruning](../docs/gradual.md#checkpoints).)

# %%
state = nnx.to_pure_dict(nnx.state((fisher.model, fisher.optimizer)))
wj.save_arrays("run.safetensors", state)

model = make_model(nnx.Rngs(SEED + 1))
resumed = Run(model, nnx.Optimizer(model, transform, wrt=nnx.Param))
loaded, _ = wj.load_arrays("run.safetensors", like=state)
places = nnx.state((resumed.model, resumed.optimizer))
nnx.replace_by_pure_dict(places, jax.tree.map(jnp.asarray, loaded))
nnx.update((resumed.model, resumed.optimizer), places)

batch = next(endless_batches(SEED + 2))
one, other = (train_step(run.model, run.optimizer, *batch) for run in (fisher, resumed))
assert float(one) == float(other)
for weight, again in zip(*(jax.tree.leaves(nnx.state(run.model)) for run in (fisher, resumed)), strict=True):
    assert bool((weight == again).all())
print(f"{os.path.getsize('run.safetensors') / 2**20:.1f} MiB; the next step has the loss {float(one):.6f} in both runs")

# %% [markdown]
# ## Next
#
# - `fisher=wj.gradient_window(64)` and `schedule=` in `prune_transform` prune inside the update, by the last 64
#   gradients that the optimizer saw: no data to plumb. [Gradual pruning](../docs/gradual.md) has all routes and Optax
#   wrappers.
# - Targets by layer: `target={"*": 0.95, "fc3/kernel": 0.5}`. A sparser one: 99 % of LeNet-300-100.
# - [The record](../benchmarks/results/gradual_lenet.md) has three sparsities and three seeds, from equal dense
#   networks.
# - [Pruning at initialization](3_at_init.ipynb) does not wait for the training at all.
