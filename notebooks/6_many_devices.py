# %% [markdown]
# # Many devices, on one machine
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/6_many_devices.ipynb)
#
# The calls that prune on one device prune on a mesh of them. Nothing in the code changes: parameters and examples say
# where they lie, and all that is made from them lies accordingly. You will see
#
# - three layouts, and which device holds what of every array on the way;
# - that the masks are those of one device, to the bit;
# - what travels between devices, read from the compiled programs and predicted beforehand;
# - what a real machine would need.
#
# Eight devices are simulated on the CPU, so this shows *what* happens and not how fast it is. Colab's TPU v5e-1 has one
# core: stay on simulated devices there. Runtime on two CPU cores: about 25 seconds with `WOODJAX_SMALL=1`, less than a
# minute in full. No data are needed: the linear algebra does not mind random examples.

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

# %% [markdown]
# Three settings must be there **before JAX starts** (restart the runtime if it has): threads enough for devices that
# wait for each other, eight devices on the CPU, and no asynchronous dispatch. The last line of flags has XLA write
# down every program that it compiles, to be read below.

# %%
import os
import tempfile
from pathlib import Path

programs = tempfile.TemporaryDirectory()
os.environ["NPROC"] = "64"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={programs.name} --xla_dump_hlo_as_text"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Rectangle

import woodjax as wj

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)
SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
WIDTH, CLASSES, EXAMPLES = (32, 8, 64) if SMALL else (64, 16, 256)
SPARSITY = 0.7
plt.rcParams.update({"figure.dpi": 80})
assert jax.device_count() == 8

# %% [markdown]
# ## A network, and the six words
#
# Three kernels and the loss of one example. `prune` is what runs on one device and on eight: gradients, curvature of
# the whole network, scores, masks, updates. The damping is as large as the mean diagonal, so that float32 says
# something: sums over devices are added up in another order, and a small damping amplifies that.


# %%
def loss_fn(params, example):
    x, label = example
    for name in ("layer0", "layer1"):
        x = jnp.tanh(x @ params[name])
    return -jax.nn.log_softmax(x @ params["out"])[label]


def prune(params, batch):
    gradients = wj.per_example_gradients(loss_fn, params, batch)
    fisher = wj.low_rank_fisher(gradients, damping=wj.Relative(1.0))
    scores = wj.obs_scores(params, fisher)
    masks = wj.make_masks(scores, SPARSITY)
    updates = wj.compensate(params, masks, fisher)
    return {"gradients": gradients, "scores": scores, "masks": masks, "updates": updates}


keys = jax.random.split(jax.random.key(SEED), 5)
shapes = {"layer0": (WIDTH, WIDTH), "layer1": (WIDTH, WIDTH), "out": (WIDTH, CLASSES)}
params = {
    name: jax.random.normal(key, shape) / WIDTH**0.5
    for key, (name, shape) in zip(keys[:3], shapes.items(), strict=True)
}
batch = jax.random.normal(keys[3], (EXAMPLES, WIDTH)), jax.random.randint(keys[4], (EXAMPLES,), 0, CLASSES)
weights = sum(w.size for w in params.values())

alone = prune(params, batch)
sparsity = float(wj.mask_sparsity(alone["masks"], alone["scores"]))
print(f"{weights:,} weights, {EXAMPLES} examples, {100 * sparsity:.1f} % pruned on one device")

# %% [markdown]
# ## Three layouts
#
# Examples are split over the axis `data` of the mesh in all of them. Parameters are *replicated*; or *split* over a
# second axis, as in tensor parallelism; or split over the axis of the data itself, *FSDP*.

# %%
LAYOUTS = {
    "replicated, 8 × 1": ((8, 1), P()),
    "split, 4 × 2": ((4, 2), P("block")),
    "FSDP, 8 × 1": ((8, 1), P("data")),
}


def place(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "block"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(params, NamedSharding(mesh, spec)), jax.device_put(batch, NamedSharding(mesh, P("data")))


def dumped():
    return set(Path(programs.name).glob("*cpu_after_optimizations.txt"))


results, written = {}, {}
for name, (shape, spec) in LAYOUTS.items():
    before = dumped()
    placed = place(shape, spec)
    results[name] = prune(*placed) | {"parameters": placed[0], "inputs": placed[1][0]}
    jax.block_until_ready(results[name])
    written[name] = dumped() - before

# %% [markdown]
# Which device holds what? Each rectangle is a shard of `layer0`, or of the first two axes of what belongs to it, with
# the numbers of the devices that hold it.


# %%
def draw(axes, array):
    """The first two axes of an array, and who holds what of them."""
    holders = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))[:2]
        holders.setdefault(bounds, []).append(device.id)
    for ((top, bottom), (left, right)), ids in holders.items():
        color = plt.colormaps["tab10"](ids[0]) if len(ids) < 8 else "0.9"
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="w", alpha=0.6))
        row = ids == list(range(ids[0], ids[0] + len(ids)))
        text = f"{ids[0]}–{ids[-1]}" if row and len(ids) > 1 else ", ".join(map(str, ids))
        axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, array.shape[1]), ylim=(array.shape[0], 0), xticks=[0, array.shape[1]], yticks=[0, array.shape[0]])


kinds = ("parameters", "inputs", "gradients", "scores", "masks", "updates")
figure, grid = plt.subplots(len(LAYOUTS), len(kinds), figsize=(12, 6.4), layout="constrained")
for row, (name, result) in zip(grid, results.items(), strict=True):
    for axes, kind in zip(row, kinds, strict=True):
        array = result[kind] if kind == "inputs" else result[kind]["layer0"]
        draw(axes, array)
        axes.set_title(f"{kind} {list(array.shape)}", fontsize=9)
    row[0].set_ylabel(name, fontsize=10)
plt.show()

for result in results.values():
    for kind in ("scores", "masks", "updates"):
        for leaf, weight in result["parameters"].items():
            assert result[kind][leaf].sharding.is_equivalent_to(weight.sharding, weight.ndim)

# %% [markdown]
# Scores, masks and updates lie exactly where the parameters do, so `optax.apply_updates` moves nothing. In between,
# every device owns an eighth of the columns of the gradients, whatever the layout: `[m, d/8]`, and nobody holds `[m,
# d]`.
#
# ## The same masks


# %%
def difference(found, expected):
    """Largest one, relative to the largest entry of each leaf."""
    pairs = [(np.asarray(found[name]), np.asarray(expected[name])) for name in expected]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


for name, result in results.items():
    unequal = sum(int((np.asarray(result["masks"][leaf]) != np.asarray(alone["masks"][leaf])).sum()) for leaf in params)
    scores, updates = (difference(result[kind], alone[kind]) for kind in ("scores", "updates"))
    print(f"{name:18} masks that differ: {unequal}, scores by {scores:.0e}, updates by {updates:.0e}")
    assert unequal == 0
    assert max(scores, updates) < 1e-4

# %% [markdown]
# Thresholds are exact: devices add up counts, 65 whole numbers in all, and agree on every bit. A mask could only
# differ where the scores of two weights on either side of the threshold are closer than rounding.
#
# ## What travels
#
# `wj.collectives` reads a compiled program, `wj.wire_bytes` says what a device sends for each collective, in its ring
# form. First a program whose answer is known: the mean gradient of data parallelism, one all-reduce of $4d$ bytes, in
# a ring of $N$ devices $2\,\tfrac{N-1}{N}\cdot 4d$.


# %%
def mean_loss(params, batch):
    return jax.vmap(loss_fn, in_axes=(None, 0))(params, batch).mean()


compiled = jax.jit(jax.grad(mean_loss)).lower(*place((8, 1), P())).compile()
sent = sum(map(wj.wire_bytes, wj.collectives(compiled)))
print(f"{sent:,.0f} bytes sent by each device, {2 * 7 / 8 * 4 * weights:,.0f} expected")
assert np.isclose(sent, 2 * 7 / 8 * 4 * weights, rtol=0.01)

# %% [markdown]
# Now all programs that the prunings above compiled, from XLA's own text. `wj.scaling_cost` predicts the same from the
# numbers $d$, $m$ and $N$ alone. What the program of the gradients sends is the model's own, as in training (split
# activations with tensor parallelism, gathered weights with FSDP), and the cost model leaves it out; with FSDP the
# exchange of gradients is part of it as well, so that there is nothing to compare.

# %%
GRADIENTS = ".jit__vmap_rows."  # the program of the gradients
colors = {
    "all-reduce": "#0072b2",
    "all-to-all": "#e69f00",
    "all-gather": "#cc79a7",
    "gradients, the model's own": "0.8",
}
travels = {}
for name, files in written.items():
    travels[name] = dict.fromkeys(colors, 0.0)
    for file in sorted(files):
        for one in wj.collectives(file.read_text()):
            kind = "gradients, the model's own" if GRADIENTS in file.name else one.kind
            travels[name][kind] += wj.wire_bytes(one)

predicted = {}
for name, replicas in (("replicated, 8 × 1", 8), ("split, 4 × 2", 4)):
    data_devices = LAYOUTS[name][0][0]
    cost = wj.scaling_cost(weights, EXAMPLES, 8, wj.TPU_V5E, data_devices=data_devices, replicas=replicas)
    predicted[name] = cost.wire_bytes
    sent = sum(travels[name].values()) - travels[name]["gradients, the model's own"]
    print(f"{name:18} {sent:>9,.0f} bytes sent by each device, the cost model says {cost.wire_bytes:,.0f}")
    assert abs(sent / cost.wire_bytes - 1) < 0.02

figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
left = np.zeros(len(travels))
for kind, color in colors.items():
    sizes = np.array([sent[kind] for sent in travels.values()]) / 1e3
    axes.barh(list(travels), sizes, left=left, color=color, label=kind)
    left += sizes
axes.plot([size / 1e3 for size in predicted.values()], list(predicted), "kd", label="cost model")
axes.invert_yaxis()
axes.set(xlabel="kB sent by each device, gradients to update")
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## A real machine
#
# The same model with the data sheets of real devices: time, memory and bytes of a pruning before anything runs. It is
# a model, not a measurement: seconds are those of a perfect program. Here are 1,024 gradients on eight H100 and on
# TPU v5e; `fitting_cost` cuts into windows what does not fit at once, and computes gradients again for each.

# %%
ROWS = 1024
resnet50 = {"d": 25_500_000, "gradient_flops": 3 * 2 * 4.1e9}
vit_large = {"d": 304_000_000, "gradient_flops": 3 * 2 * 61.6e9}
machines = {"8 H100": (8, wj.H100_SXM), "8 v5e": (8, wj.TPU_V5E), "256 v5e": (256, wj.TPU_V5E)}
costs = {
    f"{network}, {machine}": wj.fitting_cost(m=ROWS, devices=devices, hardware=hardware, **size)
    for network, size in (("ResNet-50", resnet50), ("ViT-L", vit_large))
    for machine, (devices, hardware) in machines.items()
}
display(Markdown(wj.cost_table(costs)))
assert all(cost.fits for cost in costs.values())

# %%
numbers = [2**k for k in range(9)]
path = [wj.fitting_cost(m=ROWS, devices=n, hardware=wj.TPU_V5E, **resnet50) for n in numbers]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
gradients = np.array([cost.stages[0].seconds for cost in path])
seconds = np.array([cost.seconds for cost in path])
left.loglog(numbers, seconds, "ko-", label="all")
left.loglog(numbers, gradients, "s--", color="#0072b2", label="gradients")
left.loglog(numbers, seconds - gradients, "^--", color="#d55e00", label="linear algebra and what travels")
left.set(xlabel="TPU v5e", ylabel="predicted seconds", title=f"ResNet-50, {ROWS:,} gradients")
left.legend()
right.loglog(numbers, [cost.peak_bytes / 1e9 for cost in path], "ko-", label="peak of a device, GB")
right.loglog(numbers, [cost.passes for cost in path], "s--", color="#0072b2", label="passes over the examples")
right.axhline(16, color="0.5", linestyle=":", label="memory of a v5e, GB")
right.set(xlabel="TPU v5e", title="what windows are for")
right.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.set_xticks(numbers, numbers)
    axes.minorticks_off()
plt.show()
assert all(cost.fits for cost in path)
assert path[-1].passes == 1
assert path[-1].passes < path[0].passes

# %% [markdown]
# **Try next.** `wj.prune_one_shot(loss_fn, params, batch, 0.8)` on a `place(...)` of your choice.
# `wj.block_fisher(gradients, block_size=8)` in `prune`: then sums of blocks travel in place of gradients. A mesh of
# your own GPUs or TPU cores: leave out the three settings at the top. Many hosts, checkpoints of every stage, and
# what does not fit: [many devices](../docs/scale.md).
