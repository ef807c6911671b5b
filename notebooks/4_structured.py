# %% [markdown]
# # Structured pruning: a network that is really smaller
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/4_structured.ipynb)
#
# Zeros in a kernel save nothing by themselves. Here whole channels go, with every row and column that belongs to them:
#
# 1. find the channels in the *program* of the network, with no table of layers;
# 2. score them, by HAP's trace of the Hessian and by the loss along the whole channel;
# 3. choose what stays for a budget of multiply-adds;
# 4. cut, and check that the smaller network is the masked one to rounding;
# 5. refit by least squares the kernels that read what went;
# 6. put neural implants where it hurts, fine-tune, and measure everything side by side.
#
# With data: ResNet-20 from its checkpoint, on CIFAR-10. Without: a small network that is trained on the digits first.
# Runtime on two CPU cores: about half a minute with `WOODJAX_SMALL=1`, about 4 minutes in full with CIFAR-10.

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
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import woodjax as wj
from woodjax.adapters.nnx import functional, functional_variables
from woodjax.datasets import augment, load_dataset
from woodjax.models import VGG, ResNet, load_torch_layout, resnet20
from woodjax.training import fit, fit_shrunk, reestimate_shrunk, sgd_recipe

jax.config.update("jax_default_matmul_precision", "highest")  # a TPU multiplies in bfloat16 otherwise
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})

SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
device = jax.devices()[0]
print(f"{device.device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
RATIOS = (0.3, 0.6) if SMALL else (0.1, 0.2, 0.3, 0.4)
SCORE_IMAGES = 64
TUNE_IMAGES, TUNE_EPOCHS, BATCH = 1280, 1 if SMALL else 2, 64
REPEATS = 10 if SMALL else 15

# %% [markdown]
# ## A trained network
#
# The checkpoint is that of a ResNet-20 with 91.7 % on CIFAR-10. Without the data, a small network learns the digits
# in a few seconds.


# %%
def trained_network():
    """A model in eval mode, its data set, and what to augment images with."""
    folder = os.environ.get("WOODJAX_DATA_DIR")
    weights = Path(folder or "", "checkpoints", "resnet20_cifar10.safetensors")
    if not SMALL and folder and weights.is_file():
        try:
            data = load_dataset("cifar10-subset")
        except FileNotFoundError:
            print("No CIFAR-10 in WOODJAX_DATA_DIR.")
        else:
            model = resnet20(nnx.Rngs(SEED))
            load_torch_layout(model, weights)
            model.eval()
            return model, data, augment
    print("The digits, and a small network: WOODJAX_DATA_DIR in full mode names a folder with CIFAR-10 and ResNet-20.")
    data = load_dataset("digits")
    data = data._replace(
        train_inputs=np.repeat(data.train_inputs, 3, -1), test_inputs=np.repeat(data.test_inputs, 3, -1)
    )
    # Three convolutions compile fastest; a ResNet has residual streams to look at.
    rngs = nnx.Rngs(SEED)
    model = VGG((16, "M", 32, 32), rngs=rngs) if SMALL else ResNet(1, widths=(8, 16, 32), rngs=rngs)
    fit(model, data, epochs=6, optimizer=sgd_recipe(0.1, steps=6 * (data.num_train // 64)), seed=SEED, batch_size=64)
    return model, data, None


model, data, crop = trained_network()
apply_fn, variables = functional_variables(model)  # parameters and batch statistics: both have channels


def accuracy(network, tree):
    return float((network(tree, data.test_inputs).argmax(-1) == data.test_labels).mean())


whole = jax.jit(apply_fn)
dense_accuracy = accuracy(whole, variables)
print(f"{data.name}: test accuracy of the dense network {100 * dense_accuracy:.1f} % on {len(data.test_labels)} images")

# %% [markdown]
# ## Channels from the program
#
# `channel_groups` reads the jaxpr of the network. What is added or multiplied elementwise is tied, so a residual stream
# is one group and goes as a whole, with the scales, shifts and statistics of every normalisation on it.

# %%
groups = wj.channel_groups(apply_fn, variables, data.train_inputs[:1])
total_macs, total_parameters = groups.macs({}), groups.parameters({})
for group in groups.groups:
    writers = [path for path, _, role in group.places if role == "out"]
    readers = [path for path, _, role in group.places if role == "in"]
    print(f"{group.name:24} {group.size:3} channels, written by {len(writers)} kernels, read by {len(readers)}")
print(f"{total_macs:,} multiply-adds for one image, {total_parameters:,} numbers")

# %% [markdown]
# ## Scores
#
# HAP (Yu et al. 2021) scores channel $c$ with weights $w_c$ ($p$ of them) by the mean curvature of its own weights,
#
# $$ s_c = \frac{\operatorname{tr} H_{cc}}{2p}\,\lVert w_c\rVert^2. $$
#
# `gate_scores` looks along the direction in which the channel really goes, all readers to zero at once, with the
# Gauss–Newton matrix and nothing estimated: $s_c = \tfrac12\, w_c^\top H_{cc}\, w_c$. Neither needs labels. Images are
# augmented, because on images that a network knows by heart gradients vanish, and second-order scores with them.

# %%
images = jnp.asarray(data.train_inputs[:SCORE_IMAGES])
if crop is not None:
    images = crop(jax.random.key(SEED), images)
params_fn, params = functional(model)
diagonal = wj.gauss_newton_diagonal(params_fn, params, images, microbatch_size=32)
scores = {
    "random": wj.random_channel_scores(groups, jax.random.key(SEED)),
    "L2 norm": wj.l2_channel_scores(groups, params),
    "HAP, exact trace": wj.hap_scores(groups, params, diagonal),
    "gates, Gauss–Newton": wj.gate_scores(groups, apply_fn, variables, images),
}

# %% [markdown]
# Channels inside a block are written by one kernel. We remove a fraction of those at once, lowest first in one ranking
# over all layers, train nothing, and look at the test accuracy. The last line then refits the kernels that read what
# went, to write from the channels $K$ that are left what they wrote from all:
#
# $$ \min_{W_K}\ \mathbb{E}\,\lVert x^\top W - x_K^\top W_K\rVert^2 . $$

# %%
inside = [group.name for group in groups.groups if sum(role == "out" for _, _, role in group.places) == 1]
moments = wj.input_moments(groups, apply_fn, variables, data.train_inputs[:256], microbatch_size=64)


def refit(kept):
    return optax.apply_updates(variables, wj.reconstruct_channels(groups, variables, kept, moments))


curves = {name: [] for name in (*scores, "gates, readers refitted")}
for ratio in RATIOS:
    for name, score in scores.items():
        kept = wj.select_channels(groups, {group: score[group] for group in inside}, ratio=ratio).kept
        masked = wj.apply_masks(variables, wj.make_plan(groups, kept).masks(variables))
        curves[name].append(accuracy(whole, masked))
    curves["gates, readers refitted"].append(accuracy(whole, refit(kept)))  # of the last score: the gates

assert np.mean(curves["gates, readers refitted"]) > np.mean(curves["gates, Gauss–Newton"])
assert np.mean(curves["gates, Gauss–Newton"]) > np.mean(curves["random"])

figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
axes.axhline(100 * dense_accuracy, color="0.6", label="dense")
for (name, values), color in zip(curves.items(), ("0.5", "#e69f00", "#56b4e9", "#0072b2", "#d55e00"), strict=True):
    axes.plot([100 * ratio for ratio in RATIOS], [100 * value for value in values], "o-", color=color, label=name)
axes.set(
    xlabel="channels removed inside blocks, %", ylabel="test accuracy, %", title=f"{data.name}, nothing trained after"
)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# What survives matters more than the score: least squares on a few hundred images without labels gives back most of
# what is lost.
#
# ## A budget
#
# Half of the multiply-adds, over all groups, residual streams too. The count is exact, made from the program. Beside it
# the same number of *parameters* with implants: of what goes, the most sensitive 30 % leave a convolution of one
# place in the stead of 3×3, a ninth of the cost, and their channel stays for everybody else (HAP's neural implants).

# %%
gates = scores["gates, Gauss–Newton"]
plain = wj.select_channels(groups, gates, macs=0.5)
mixed = wj.select_channels(groups, gates, parameters=float(groups.parameters(*plain)), implants=0.3)
plans = {"shrunk": wj.make_plan(groups, *plain), "implants": wj.make_plan(groups, *mixed)}
assert groups.macs(*plain) <= 0.5 * total_macs
assert groups.parameters(*mixed) <= groups.parameters(*plain)

figure, rows = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
names = [group.name.removesuffix("/kernel") for group in groups.groups]
for axes, (title, plan) in zip(rows, plans.items(), strict=True):
    sizes = np.array([group.size for group in groups.groups])
    kept = np.array([plan.kept[group.name].sum() for group in groups.groups])
    implants = np.array([plan.implanted[group.name].sum() for group in groups.groups])
    axes.barh(names, kept - implants, color="#0072b2", label="whole kernels")
    axes.barh(names, implants, left=kept - implants, color="#e69f00", label="implants")
    axes.barh(names, sizes - kept, left=kept, color="0.88", label="removed")
    chosen = plan.kept, plan.implanted
    parts = groups.macs(*chosen) / total_macs, groups.parameters(*chosen) / total_parameters
    axes.set(title=f"{title}: {100 * parts[0]:.0f} % of multiply-adds, {100 * parts[1]:.0f} % of parameters")
    axes.set(xlabel="channels")
rows[0].invert_yaxis()
rows[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# ## The smaller network is the masked one
#
# `plan.shrink` takes what stays out of any tree; `shrunk_network` runs the *same program* on the smaller arrays. No
# class is built anew, and the outputs are those of the whole network under masks, to rounding.

# %%
small = plans["shrunk"].shrink(variables)
network = jax.jit(wj.shrunk_network(apply_fn, plans["shrunk"]))
expected = whole(wj.apply_masks(variables, plans["shrunk"].masks(variables)), data.test_inputs[:64])
difference = float(jnp.abs(network(small, data.test_inputs[:64]) - expected).max() / jnp.abs(expected).max())
print(f"largest difference of outputs, relative to the largest output: {difference:.0e}")
assert difference < 1e-5
assert wj.count_macs(network, small, data.test_inputs[:1]) == groups.macs(*plain)

# %% [markdown]
# ## What implants start from
#
# The authors start them from zero. Their best linear fit to the kernel that they replace is one least-squares problem
# each, `start_implants(...)`, again without labels. Batch statistics are taken anew before any accuracy is looked at.

# %%
fit_images = jnp.asarray(data.train_inputs[:256])
batches = [data.train_inputs[i : i + 256] for i in (0, 256, 512)]
networks = {name: jax.jit(wj.shrunk_network(apply_fn, plan)) for name, plan in plans.items()}
moved = refit(mixed.kept)
start = partial(wj.start_implants, apply_fn, plan=plans["implants"], inputs=fit_images)
starts = {
    "shrunk": ("shrunk", small),
    "shrunk, readers refitted": ("shrunk", plans["shrunk"].shrink(refit(plain.kept))),
    "implants from zero": ("implants", start(moved, start="zero")),
    "implants from the centre": ("implants", start(moved, start="centre")),
    "implants by least squares": ("implants", start(moved)),
}
if SMALL:
    del starts["implants from zero"], starts["implants from the centre"]
starts = {name: (kind, reestimate_shrunk(model, plans[kind], tree, batches)) for name, (kind, tree) in starts.items()}
before = {name: accuracy(networks[kind], tree) for name, (kind, tree) in starts.items()}
for name, value in before.items():
    print(f"{name:28} {100 * value:5.1f} % before any training")
assert before["shrunk, readers refitted"] > before["shrunk"]

# %% [markdown]
# ## Fine-tuning
#
# A short one, the same for all (without implants in the small mode); `fit_shrunk` runs the network in train mode with
# the plan.

# %%
part = data._replace(train_inputs=data.train_inputs[:TUNE_IMAGES], train_labels=data.train_labels[:TUNE_IMAGES])
optimizer = sgd_recipe(0.02, steps=TUNE_EPOCHS * (part.num_train // BATCH), decay="cosine", weight_decay=1e-4)
tuned = {}
for name in ("shrunk", "shrunk, readers refitted", *([] if SMALL else ["implants by least squares"])):
    kind, tree = starts[name]
    tree = fit_shrunk(
        model,
        plans[kind],
        tree,
        part,
        optimizer=optimizer,
        epochs=TUNE_EPOCHS,
        seed=SEED,
        batch_size=BATCH,
        augment=crop,
    )
    tuned[name] = kind, reestimate_shrunk(model, plans[kind], tree, batches)
after = {name: accuracy(networks[kind], tree) for name, (kind, tree) in tuned.items()}
assert after["shrunk"] > before["shrunk"]

figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
names = list(before)
axes.barh(names, [100 * before[name] for name in names], height=0.7, color="#56b4e9", label="before training")
axes.barh(list(after), [100 * value for value in after.values()], height=0.3, color="#0072b2", label="fine-tuned")
axes.axvline(100 * dense_accuracy, color="0.4", linestyle=":", label="dense")
axes.invert_yaxis()
axes.set(xlabel="test accuracy, %", xlim=(0, 100))
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
for name, value in after.items():
    print(f"{name:28} {100 * value:5.1f} % fine-tuned, dense {100 * dense_accuracy:.1f} %")

# %% [markdown]
# Beware of reading more into this than one seed and a short training on few images can say; the
# [record](../benchmarks/results/structured.md) has a longer run.
#
# ## What it costs, side by side
#
# `measure` compiles every network and lets them take turns call by call, so that whatever else the machine does hits
# all. The dense network stands in twice: the difference between the two is the noise. A *masked* network has as many
# multiply-adds as the dense one. Multiply-adds are not seconds: narrow convolutions use a machine badly, and implants
# add convolutions and a permutation. Only the device that counts says what is gained.

# %%
at_end = starts | tuned
measured = wj.measure(
    {
        "dense": (apply_fn, variables),
        "masked": (apply_fn, wj.apply_masks(variables, plans["shrunk"].masks(variables))),
        "shrunk": (wj.shrunk_network(apply_fn, plans["shrunk"]), at_end["shrunk, readers refitted"][1]),
        "implants": (wj.shrunk_network(apply_fn, plans["implants"]), at_end["implants by least squares"][1]),
        "dense again": (apply_fn, variables),
    },
    data.test_inputs[:64],
    repeats=REPEATS,
)
print(measured)
by_name = {row.name: row for row in measured}
assert by_name["masked"].multiply_adds == by_name["dense"].multiply_adds
assert by_name["shrunk"].multiply_adds <= 0.5 * by_name["dense"].multiply_adds

figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
place = np.arange(len(measured))
bars = (("parameters", "#56b4e9"), ("multiply_adds", "#0072b2"), ("latency", "#e69f00"))
for shift, (field, color) in enumerate(bars):
    values = [100 * getattr(row, field) / getattr(measured[0], field) for row in measured]
    axes.bar(place + 0.27 * (shift - 1), values, width=0.25, color=color, label=field.replace("_", "-"))
axes.axhline(100, color="0.4", linestyle=":")
axes.set_xticks(place, [row.name for row in measured])
axes.set(
    ylabel="% of the dense network", ylim=(0, 145), title=f"batch of 64 on {device.device_kind} ({device.platform})"
)
axes.legend(ncols=3, loc="upper center")
plt.show()

# %% [markdown]
# ## On disk, and on
#
# One file holds arrays and plan, with no class and no code in it; `wj.load_pruned` gives both back.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "small.safetensors")
    wj.save_pruned(file, tuned["shrunk, readers refitted"][1], plans["shrunk"])
    loaded, plan = wj.load_pruned(file)
    print(f"{file.stat().st_size:,} bytes")
again = jax.jit(wj.shrunk_network(apply_fn, plan))
assert accuracy(again, loaded) == after["shrunk, readers refitted"]

# %% [markdown]
# **Try next.** `round_to=8` in `select_channels` for widths that a device likes; `cost=(seconds, 0.02)` with a latency
# that you measured as the budget; `obs_channel_scores` and `compensate_channels`, which move all survivors by the
# curvature of the whole network; `start_implants(..., rank=4)`; a network of your own: the groups are found in whatever
# JAX program you hand over. [Structured pruning](../docs/structured.md) has all of it with its limits, and
# [deployment](../docs/deployment.md) what comes after.
