# %% [markdown]
# # One-shot pruning in six words
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/1_one_shot.ipynb)
#
# A trained network, some thousand labelled examples, no further training: which weights can go, and how must the others
# move to make up for it? You will build WoodFisher from its parts,
#
# `loss → gradients → curvature → scores → masks → updates`,
#
# see which pixels a pruned network still looks at, put the predicted loss beside the measured one, and compare with
# magnitude and with the one call that does all of it.
#
# Runtime on two CPU cores: a few minutes in full, less than one with `WOODJAX_SMALL=1`. With MNIST (a folder of
# TFDS data sets, named by `WOODJAX_DATA_DIR`) the network is MLPNet, 32,360 weights; elsewhere one for 8×8 digits.

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
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.datasets import load_dataset
from woodjax.models import digits_mlp, load_torch_layout, mlpnet
from woodjax.training import evaluate, train

SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
EXAMPLES = 500 if SMALL else 1000  # that the curvature is made of
STAGES = 8 if SMALL else "auto"  # of the one call
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})


# %% [markdown]
# ## A trained network
#
# Any function `apply_fn(params, inputs) -> logits` will do; `functional` makes one of a Flax NNX module.

# %%
try:
    if SMALL:
        raise FileNotFoundError
    data = load_dataset("mnist")
except (ValueError, FileNotFoundError, ImportError):
    print("The embedded 8×8 digits. For MNIST set WOODJAX_DATA_DIR to a folder of TFDS data sets, and WOODJAX_SMALL=0.")
    data = load_dataset("digits")

# The small network has less to spare.
SPARSITY = 0.9 if data.name == "mnist" else 0.8
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98) if data.name == "mnist" else (0.5, 0.6, 0.7, 0.8, 0.9)
side = data.train_inputs.shape[1]
model = mlpnet(nnx.Rngs(SEED)) if data.name == "mnist" else digits_mlp(nnx.Rngs(SEED))
checkpoint = Path(os.environ.get("WOODJAX_DATA_DIR", "")) / "checkpoints" / "mlpnet_mnist.safetensors"
if data.name == "mnist" and checkpoint.is_file():
    load_torch_layout(model, checkpoint)  # the network of the published tables
else:
    train(model, data, epochs=4 if data.name == "mnist" else 10, seed=SEED)
model.eval()

apply_fn, dense = functional(model)
apply_fn = jax.jit(apply_fn)
num_weights = wj.make_layout(dense).num_weights
dense_accuracy = evaluate(apply_fn, dense, data)
print(f"{data.name}: {num_weights:,} prunable weights, test accuracy {100 * dense_accuracy:.2f} %")
assert dense_accuracy > 0.9

# %% [markdown]
# ## 1. Loss
#
# The loss of **one** example. Second-order pruning asks how the mean of it, $L$, changes when the weights move by
# $\delta$. At a trained network the gradient is about zero, and what is left is the quadratic model
#
# $$L(w + \delta) - L(w) \approx \tfrac12\, \delta^\top H\, \delta .$$

# %%
loss_fn = wj.cross_entropy(apply_fn)

order = np.random.default_rng(SEED).permutation(data.num_train)
inputs, labels = jnp.asarray(data.train_inputs[order]), jnp.asarray(data.train_labels[order])
batch = inputs[:EXAMPLES], labels[:EXAMPLES]


@jax.jit
def mean_loss(params):
    return jax.vmap(lambda *example: loss_fn(params, example))(inputs, labels).mean()


dense_loss = float(mean_loss(dense))
print(f"loss of the first example {loss_fn(dense, (inputs[0], labels[0])):.4f}, mean {dense_loss:.4f}")

# %% [markdown]
# ## 2. Gradients
#
# The gradient $g_i$ of every example by itself, not their mean: how much they *differ* is what tells about curvature.

# %%
gradients = wj.per_example_gradients(loss_fn, dense, batch, microbatch_size=64)
jax.tree.map(jnp.shape, gradients)

# %% [markdown]
# ## 3. Curvature
#
# The empirical Fisher with a damping $\lambda$ stands for the Hessian,
#
# $$F = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top .$$
#
# The whole matrix has the square of the number of weights. WoodFisher keeps blocks along its diagonal and inverts them
# by the Woodbury identity. (`wj.low_rank_fisher` keeps the gradients instead and is exact for the whole network;
# [curvature](../docs/curvature.md) has the others.)

# %%
fisher = wj.block_fisher(gradients, block_size=512, damping=1e-4)
print(f"{num_weights:,}² = {num_weights**2:,} entries, of which the blocks hold {num_weights * 512:,}")

# %% [markdown]
# ## 4. Scores
#
# If the weight $w_q$ is removed and all others in its block move as they best can, the loss grows by
#
# $$\rho_q = \frac{w_q^2}{2\,[F^{-1}]_{qq}}, \qquad \delta = -\frac{w_q}{[F^{-1}]_{qq}}\, F^{-1} e_q .$$
#
# That is Optimal Brain Surgeon. Magnitude is the same score with $F = I$.

# %%
scores = wj.obs_scores(dense, fisher)
magnitude = wj.magnitude_scores(dense)

# %% [markdown]
# Is it true? Take one weight out, let the others move, and ask the quadratic model: it has to give back the score.

# %%
first = scores["fc1"]["kernel"]
q = jnp.unravel_index(jnp.argmax(jnp.where(jnp.isfinite(first), first, -1)), first.shape)
without_q = jax.tree.map(lambda w: jnp.ones(w.shape, bool), dense)
without_q["fc1"]["kernel"] = without_q["fc1"]["kernel"].at[q].set(False)
updates = wj.compensate(dense, without_q, fisher)
predicted = float(wj.predicted_loss_change(updates, fisher))
print(f"score {float(first[q]):.4g}, predicted change of the loss {predicted:.4g}")
assert np.isclose(predicted, float(first[q]), rtol=1e-2)

# %% [markdown]
# What does each score think of a pixel? The first kernel has one row of weights for each pixel of the input. The
# gradient at a weight is the pixel times something: where pixels hardly vary, the Fisher sees that their weights do
# little.


# %%
def by_pixel(values):
    """A number for each weight of the first kernel, averaged for each input pixel."""
    return np.asarray(values["fc1"]["kernel"], np.float64).mean(1).reshape(side, side)


def show_pixels(pictures, label, *, log=False):
    """Maps over the pixels of the input, each with its own colour scale where they are logarithmic."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(3.4 * len(pictures), 3), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        if log:
            picture = np.log10(np.maximum(picture, picture[picture > 0].min()))
        image = axis.imshow(picture, cmap="magma", vmin=None if log else 0)
        figure.colorbar(image, ax=axis, label=label, shrink=0.85)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(visible=False)
    plt.show()


pixels = {"mean image": data.train_inputs.reshape(-1, side, side).mean(0) - data.train_inputs.min()}
pixels |= {"magnitude score": by_pixel(magnitude), "OBS score": by_pixel(scores)}
show_pixels(pixels, "log10 of the mean", log=True)

# %% [markdown]
# ## 5. Masks
#
# The lowest scores go, counted over the whole network: exactly `round(sparsity · n)` weights. Where do the survivors of
# the first kernel sit?

# %%
masks = wj.make_masks(scores, SPARSITY)
magnitude_masks = wj.make_masks(magnitude, SPARSITY)
kept = {"magnitude": by_pixel(magnitude_masks), "WoodFisher": by_pixel(masks)}
show_pixels({title: 100 * picture for title, picture in kept.items()}, "weights kept, %")

for name, chosen in (("magnitude", magnitude_masks), ("WoodFisher", masks)):
    layers = ", ".join(f"{layer} {100 * float(leaf['kernel'].mean()):.1f} %" for layer, leaf in chosen.items())
    print(f"{name:10} keeps {layers}")
assert abs(float(wj.mask_sparsity(masks, scores)) - SPARSITY) < 1e-4

# %% [markdown]
# ## 6. Updates
#
# With the mask fixed, the survivors move. `"sum"` adds up the moves for each removed weight by itself, as WoodFisher
# does; `"joint"` solves for all of them at once, which is the minimum of the quadratic model in each block. Both give
# exactly $-w$ on the weights that go, so that they end at zero.


# %%
def removal(masks):
    """The pruned weights go, the others stay where they are."""
    return jax.tree.map(lambda w, mask: jnp.where(mask, 0, -w), dense, masks)


def measure(updates):
    """What the quadratic model expects of an update, and what happens."""
    pruned = optax.apply_updates(dense, updates)
    return {
        "predicted": float(wj.predicted_loss_change(updates, fisher)),
        "measured": float(mean_loss(pruned)) - dense_loss,
        "accuracy": evaluate(apply_fn, pruned, data),
    }


one_step = {
    "magnitude, mask alone": measure(removal(magnitude_masks)),
    "WoodFisher, mask alone": measure(removal(masks)),
    "WoodFisher, sum": measure(wj.compensate(dense, masks, fisher, method="sum")),
    "WoodFisher, joint": measure(wj.compensate(dense, masks, fisher, method="joint")),
}
print(f"dense {100 * dense_accuracy:.2f} %; {100 * SPARSITY:g} % pruned:")
print(f"{'':24} predicted change   measured change   test accuracy")
for name, row in one_step.items():
    print(f"{name:24} {row['predicted']:16.3f} {row['measured']:17.3f} {100 * row['accuracy']:13.2f} %")
assert one_step["WoodFisher, joint"]["predicted"] <= one_step["WoodFisher, sum"]["predicted"]
assert one_step["WoodFisher, joint"]["predicted"] <= one_step["WoodFisher, mask alone"]["predicted"]
assert one_step["WoodFisher, joint"]["measured"] < one_step["magnitude, mask alone"]["measured"]

# %% [markdown]
# ## Over all sparsities, and the one call
#
# `wj.prune_one_shot` does the six words again and again at the current weights, a little sparser each time, with the
# Fisher of the whole network, and chooses rule, damping and length of every move by the loss on examples held out.
# `on_stage` shows the network after every stage, so that one run draws a whole curve.

# %%
rows = []
for level in LEVELS:
    masks, magnitude_masks = wj.make_masks(scores, level), wj.make_masks(magnitude, level)
    rows.append({
        "magnitude": measure(removal(magnitude_masks)),
        "WoodFisher, sum": measure(wj.compensate(dense, masks, fisher, method="sum")),
        "WoodFisher, joint": measure(wj.compensate(dense, masks, fisher, method="joint")),
    })

stages = []
pruned, pruned_masks, info = wj.prune_one_shot(
    loss_fn, dense, (inputs, labels), LEVELS[-1], stages=STAGES, key=jax.random.key(SEED), on_stage=stages.append
)
print(f"{len(stages)} stages to {100 * LEVELS[-1]:g} %")
path = [(float(stage.info.sparsity), evaluate(apply_fn, stage.params, data)) for stage in stages]

# %%
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
axis.axhline(100 * dense_accuracy, color="0.6", label="dense")
axis.plot([1 - s for s, _ in path], [100 * a for _, a in path], color="#0072b2", label="prune_one_shot, every stage")
styles = {"magnitude": ":", "WoodFisher, sum": "--", "WoodFisher, joint": "-."}
colors = {"magnitude": "#000000", "WoodFisher, sum": "#e69f00", "WoodFisher, joint": "#009e73"}
for name, style in styles.items():
    values = [100 * row[name]["accuracy"] for row in rows]
    axis.plot([1 - level for level in LEVELS], values, style, color=colors[name], marker="o", markersize=4, label=name)
axis.set_xscale("log")
axis.set_xlim(1 - LEVELS[0], (1 - LEVELS[-1]) / 1.08)
axis.set_xticks([1 - level for level in LEVELS], [f"{100 * level:g}" for level in LEVELS])
axis.minorticks_off()
axis.set(xlabel="sparsity, %", ylabel="test accuracy, %", title=f"{num_weights:,} weights, no training after pruning")
axis.legend(loc="lower left")
plt.show()

last = rows[-1]
print(f"at {100 * LEVELS[-1]:g} %: magnitude {100 * last['magnitude']['accuracy']:.2f} %, ", end="")
print(f"prune_one_shot {100 * path[-1][1]:.2f} %")
assert path[-1][1] > max(row["accuracy"] for row in last.values())
for weight, mask in zip(jax.tree.leaves(pruned), jax.tree.leaves(pruned_masks), strict=True):
    assert bool((weight[~mask] == 0).all())

# %% [markdown]
# ## A prediction, and no promise
#
# The model predicts too little, and the more so the better the update fits it: `"joint"` is its minimum, and goes where
# a sample of examples knows least. The Fisher is not the Hessian either, and a long step leaves the region where any
# Taylor expansion holds. So the prediction is good for choosing weights and for comparing steps of one kind; the loss
# on held-out examples is what decides in `prune_one_shot`, and many short stages are the mend at high sparsity.

# %%
figure, axis = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
for name in ("WoodFisher, sum", "WoodFisher, joint"):
    predicted = [row[name]["predicted"] for row in rows]
    measured = [row[name]["measured"] for row in rows]
    axis.plot(predicted, measured, styles[name], color=colors[name], marker="o", markersize=4, label=name)
    if name.endswith("joint"):
        for x, y, level in zip(predicted, measured, LEVELS, strict=True):
            axis.annotate(f"{100 * level:g} %", (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
values = [row[name][part] for row in rows for name in styles for part in ("predicted", "measured")]
ends = [min(v for v in values if v > 0), max(values)]
axis.plot(ends, ends, color="0.6", linewidth=1, label="predicted = measured")
axis.set(xscale="log", yscale="log", xlabel="predicted change of the loss, nats", ylabel="measured change, nats")
axis.legend()
plt.show()
assert all(row["WoodFisher, joint"]["measured"] > row["WoodFisher, joint"]["predicted"] for row in rows)

# %% [markdown]
# ## Next
#
# - Put a function of your own in the place of a word: `scores = my_scores(params)`, low = prune first, is all that
#   `make_masks` wants.
# - `wj.low_rank_fisher(gradients)` instead of the blocks; `pattern=wj.NM(2, 4)` in the one call; `wj.prune_to_loss` for
#   a promise about the loss. [One-shot pruning](../docs/one_shot.md) says what is chosen and how.
# - [How good is each inverse?](../docs/inverse_quality.md) compares fifteen curvatures with the Hessian, and
#   [the record of MLPNet](../benchmarks/results/one_shot_mlpnet.md) has five seeds of each method.
# - [Gradual pruning](2_gradual.ipynb) prunes while the network trains.
