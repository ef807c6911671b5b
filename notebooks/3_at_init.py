# %% [markdown]
# # Pruning before training
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/3_at_init.ipynb)
#
# Seven criteria (four with `WOODJAX_SMALL=1`) choose which weights of an untrained convolutional network stay. You will
# see what each leaves of every layer, find the ones that cut the network in two, train under the masks, and then ask
# with a control whether it was the choice of weights that helped or only how many each layer kept. On the way: why
# batch normalisation needs a warm-up.
#
# Runtime on two CPU cores: a few minutes in full, less than one with `WOODJAX_SMALL=1`. Data: MNIST (a folder of
# TFDS data sets, named by `WOODJAX_DATA_DIR`), elsewhere the embedded 8×8 digits.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import load_dataset
from woodjax.models import torch_init
from woodjax.training import evaluate_model, fit, sgd_recipe

SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
SPARSITY = 0.98  # of the masks that are looked at
LEVELS = (0.98,) if SMALL else (0.9, 0.98)  # of those that are trained
CRITERIA = ("random", "magnitude", "snip", "synflow", "fisher-diagonal", "grasp", "hutchinson-diagonal")
CONTROLLED = ("snip", "synflow")  # also trained with shuffled masks
DEPTH = 5  # convolutions
ROUNDS = 100  # of SynFlow
if SMALL:
    CRITERIA, CONTROLLED, DEPTH, ROUNDS = CRITERIA[:4], CONTROLLED[1:], 3, 20
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

try:
    if SMALL:
        raise FileNotFoundError
    data = load_dataset("mnist")
    data = data._replace(train_inputs=data.train_inputs[:6400], train_labels=data.train_labels[:6400])
except (ValueError, FileNotFoundError, ImportError):
    print("The embedded 8×8 digits. For MNIST set WOODJAX_DATA_DIR to a folder of TFDS data sets, and WOODJAX_SMALL=0.")
    data = load_dataset("digits")
epochs, batch_size = (2 if data.name == "mnist" else 4 if SMALL else 10), 32

# %% [markdown]
# ## A network of your own
#
# Nothing of what follows asks for a particular class: kernels and their order are read from the program.


# %%
class Net(nnx.Module):
    """Convolutions with batch normalisation, and a classifier."""

    def __init__(self, rngs):
        widths, later = (1, 16, 32, 32, 64, 64), nnx.initializers.zeros_init()  # torch_init draws them
        for i in range(DEPTH):
            stride = 2 if i % 2 == 0 else 1
            layer = {"strides": stride, "use_bias": False, "kernel_init": later, "rngs": rngs}
            setattr(self, f"conv{i + 1}", nnx.Conv(widths[i], widths[i + 1], (3, 3), **layer))
            setattr(self, f"norm{i + 1}", nnx.BatchNorm(widths[i + 1], rngs=rngs))
        self.head = nnx.Linear(widths[DEPTH], 10, kernel_init=later, rngs=rngs)

    def before_relu(self, x):
        """What each convolution hands to its ReLU."""
        signals = []
        for i in range(1, DEPTH + 1):
            signals.append(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
            x = nnx.relu(signals[-1])
        return signals

    def __call__(self, x):
        return self.head(nnx.relu(self.before_relu(x)[-1]).mean((1, 2)))


def new_model():
    rngs = nnx.Rngs(SEED)
    model = Net(rngs)
    torch_init(model, rngs)
    model.eval()
    return model


order = np.random.default_rng(SEED).permutation(data.num_train)
few = np.concatenate([order[data.train_labels[order] == c][:10] for c in range(10)])  # ten of each class
batch = jnp.asarray(data.train_inputs[few]), jnp.asarray(data.train_labels[few])

# %% [markdown]
# ## Batch normalisation before training: the warm-up
#
# Criteria look at one example at a time, and so in eval mode, where batch normalisation takes off *running* statistics.
# Before training these are mean 0 and variance 1: it normalises by nothing, and the signal has another size in every
# layer. One pass over data in train mode, which updates no weight, gives statistics of the network as it is.
# `warm_up_batch_stats` takes plain averages, whatever the momentum of the layers.

# %%
cold, warm = new_model(), new_model()
bridge.warm_up_batch_stats(warm, [data.train_inputs[order[i : i + 400]] for i in range(0, 1200, 400)])


@nnx.jit
def signal(model):
    """Standard deviation of what each convolution hands to its ReLU."""
    return jnp.stack([x.std() for x in model.before_relu(batch[0])])


sizes = {}
figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for name, model, color in (("statistics as they begin", cold, "#56b4e9"), ("after the warm-up", warm, "#d55e00")):
    sizes[name] = np.asarray(signal(model))
    axis.plot(range(1, DEPTH + 1), sizes[name], color=color, marker="o", markersize=4, label=name)
axis.set(yscale="log", xticks=range(1, DEPTH + 1), xlabel="convolution", ylabel="standard deviation before the ReLU")
axis.legend()
plt.show()
assert all(
    0.5 < size < 2 for size in sizes["after the warm-up"]
)  # normalised to 1 over the data, so about 1 over a hundred images
assert sizes["statistics as they begin"][-1] < 0.5 * sizes["after the warm-up"][-1]  # it fades

# %% [markdown]
# ## What each criterion leaves of each layer
#
# `prune_at_init` makes masks by a criterion's name, for all kernels but the classifier's, which a single threshold
# would empty at once. SynFlow sees no data and asks the network with its first statistics.

# %%
warm_fn, params = bridge.functional(warm)
cold_fn, _ = bridge.functional(cold)
select = wj.hidden_kernels(cold_fn, params, batch[0])


def masks_of(criterion, sparsity, apply_fn):
    """Masks and the report on them."""
    function = apply_fn if wj.INIT_CRITERIA[criterion].data else cold_fn
    key = jax.random.key(SEED)
    options = {"criterion": criterion, "rounds": min(wj.INIT_CRITERIA[criterion].rounds, ROUNDS), "select": select}
    masks, info = wj.prune_at_init(function, params, batch, sparsity, key, **options)
    return masks, info.report


found = {criterion: masks_of(criterion, SPARSITY, warm_fn) for criterion in CRITERIA}
layers = list(found["random"][1].density)
prunable = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 4)
print(f"{len(layers)} kernels, {prunable:,} prunable weights, {100 * SPARSITY:g} % of them pruned")
assert len(layers) == DEPTH

# %% [markdown]
# A kernel that keeps nothing **collapses** the network: no signal passes. Less visible are weights that are kept and
# lie on no path from input to output, because their channel has lost all of its inputs or all of its outputs.
# `effective_masks` takes them away; what is left tells how sparse the network really is.

# %%
TITLES = {criterion: wj.INIT_CRITERIA[criterion].title for criterion in CRITERIA}
COLORS = dict(
    zip(CRITERIA, ("#888888", "#000000", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#d55e00"), strict=False)
)

effective = {}
for criterion, (masks, _) in found.items():
    connected = wj.effective_masks(cold_fn, params, masks, batch, select=select)
    effective[criterion] = float(wj.layer_collapse_report(connected, select=select).sparsity)

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained", width_ratios=(3, 2))
for criterion, (_, report) in found.items():
    density = [100 * float(report.density[layer]) for layer in layers]
    left.plot(range(1, DEPTH + 1), density, color=COLORS[criterion], marker="o", markersize=4, label=TITLES[criterion])
left.set_yscale("symlog", linthresh=0.1)
left.set(xticks=range(1, DEPTH + 1), xlabel="convolution", ylabel="weights kept, % (0 = collapsed)", ylim=(0, 110))
left.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
left.set_title(f"layer densities at {100 * SPARSITY:g} %")
left.legend(fontsize=8, ncols=2)
places = range(len(CRITERIA))
right.barh(places, [100 * (1 - effective[c]) for c in CRITERIA], color=[COLORS[c] for c in CRITERIA])
right.axvline(100 * (1 - SPARSITY), color="0.3", linestyle=":")
right.set_yticks(places, TITLES.values())
right.invert_yaxis()
right.set(xlabel="weights on a path from input to output, %", title="what is really left (dotted: asked for)")
plt.show()

for criterion, (_, report) in found.items():
    print(f"{TITLES[criterion]:20} empty layers {int(report.collapsed)}, lowest density", end=" ")
    print(f"{100 * float(report.lowest_density):6.2f} %, effective sparsity {100 * effective[criterion]:6.2f} %")
    assert abs(float(report.sparsity) - SPARSITY) < 1e-3
    assert effective[criterion] > SPARSITY - 1e-3  # never less sparse than asked for
assert int(found["synflow"][1].collapsed) == 0

# %% [markdown]
# And the warm-up? The same criteria with statistics as they begin, in numbers: lowest density of a layer.

# %%
for criterion in (c for c in CRITERIA if c != "random" and wj.INIT_CRITERIA[c].data):
    lowest = [float(r.lowest_density) for r in (masks_of(criterion, SPARSITY, cold_fn)[1], found[criterion][1])]
    print(f"{TITLES[criterion]:20} before the warm-up {100 * lowest[0]:6.2f} %, after it {100 * lowest[1]:6.2f} %")

# %% [markdown]
# Here no criterion's thinnest layer is better off for it: in eval mode the scores are those of another network, whose
# signal does not fade, and another threshold falls elsewhere. On a [slim VGG](../benchmarks/results/pai_vgg_slim.md) it
# goes both ways. Look at the report on both before you train.

# %% [markdown]
# ## Training under the masks
#
# `fit(masks=)` keeps the pruned weights at exactly zero, from the first step to the last. The control is
# `wj.shuffle_masks`: as many weights in every layer, but random ones. If it trains as well, the criterion's merit is
# the budget of the layers and not the weights that it picked.

# %%
sgd = sgd_recipe(0.05, steps=epochs * (data.num_train // batch_size), decay="cosine")


def trained(masks):
    """Test accuracy in %, after a training under the masks."""
    model = new_model()
    fit(model, data, masks=masks, epochs=epochs, optimizer=sgd, seed=SEED, batch_size=batch_size)
    # The running averages of so short a training lag behind the network.
    bridge.reestimate_batch_stats(model, [data.train_inputs[order[i : i + 400]] for i in range(0, 1200, 400)])
    _, weights = bridge.functional(model)
    kept = zip(jax.tree.leaves(weights), jax.tree.leaves(masks), strict=True)
    assert all(bool(jnp.where(mask, True, weight == 0).all()) for weight, mask in kept)
    return 100 * evaluate_model(model, data)


dense = trained(jax.tree.map(lambda w: jnp.ones(w.shape, bool), params))
results = {}
for level in LEVELS:
    for criterion in CRITERIA:
        masks, _ = found[criterion] if level == SPARSITY else masks_of(criterion, level, warm_fn)
        results[criterion, level] = trained(masks)
        if criterion in CONTROLLED and level == SPARSITY:
            shuffled = wj.shuffle_masks(masks, jax.random.key(SEED + 1), select=select)
            results[criterion, "shuffled"] = trained(shuffled)

print(f"test accuracy after {epochs} epochs, dense {dense:.1f} %")
print(f"{'criterion':20}" + "".join(f"{100 * level:>8g} %" for level in LEVELS) + "   shuffled")
for criterion in CRITERIA:
    cells = "".join(f"{results[criterion, level]:9.1f} " for level in LEVELS)
    control = results.get((criterion, "shuffled"))
    print(f"{TITLES[criterion]:20}{cells}" + (f"{control:10.1f}" if control is not None else ""))

# %%
figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
axis.axvline(dense, color="0.4", label="dense")
for criterion, place in zip(CRITERIA, places, strict=True):
    for level, marker in zip(LEVELS, "o^" if len(LEVELS) > 1 else "^", strict=True):
        label = f"{100 * level:g} % pruned" if place == 0 else None
        axis.plot(results[criterion, level], place, marker, color=COLORS[criterion], markersize=8, label=label)
    if (criterion, "shuffled") in results:
        label = f"{100 * SPARSITY:g} %, shuffled in each layer" if criterion == CONTROLLED[0] else None
        axis.plot(results[criterion, "shuffled"], place, "x", color=COLORS[criterion], markersize=8, label=label)
axis.set_yticks(places, TITLES.values())
axis.invert_yaxis()
axis.set(
    xlabel=f"test accuracy after {epochs} epochs, %",
    xlim=(5, 102),
    title="trained under masks of the untrained network",
)
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# Read it with care: one seed, a short training, an easy task. Where a layer is empty the network guesses, whatever the
# ranking was. Where none is, the shuffled control is the number to beat: a criterion that does no better has found how
# much each layer needs, and not which weights.

# %%
for criterion, (_, report) in found.items():
    if int(report.collapsed) or effective[criterion] > 1 - 1e-9:
        assert results[criterion, SPARSITY] < 30, criterion  # no signal passes
assert dense > 90
assert results["synflow", SPARSITY] > 40

# %% [markdown]
# ## Next
#
# - `floor=0.01` in `prune_at_init` keeps a hundredth of every layer, the total unchanged: does magnitude train then?
# - `rounds=20` scores and prunes in rounds; `wj.INIT_CRITERIA` has seventeen names, and `wj.InitCriterion` takes yours.
# - [Pruning at initialization](../docs/at_init.md) has the formulas and what was seen over seeds and networks: see
#   [LeNet](../benchmarks/results/pai_lenet.md) and [a slim VGG](../benchmarks/results/pai_vgg_slim.md).
# - [Smaller networks](4_structured.ipynb) removes whole channels, so that the network is really faster.
