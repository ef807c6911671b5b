# %% [markdown]
# # Anatomy of the Fisher: how good is the inverse?
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/woodjax/woodjax/blob/main/notebooks/5_anatomy.ipynb)
#
# Second-order pruning rests on one matrix that nobody can hold, the inverse of the Hessian. On a network that is small
# enough it can be held, and everything that stands in for it can be put beside it. You will see
#
# - the spectrum of the Hessian, of the Gauss–Newton matrix and of the empirical Fisher;
# - how much of each lies in blocks along the diagonal;
# - what rounding costs, engine by engine, and what approximation costs, curvature by curvature;
# - predicted against measured changes of the loss, for random and for Optimal Brain Surgeon's prunings;
# - what damping and the number of examples do.
#
# Runtime on two CPU cores: about a third of a minute with `WOODJAX_SMALL=1`, a minute in full. The data are the
# embedded digits.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import woodjax as wj
from woodjax.datasets import load_dataset

jax.config.update("jax_default_matmul_precision", "highest")  # a TPU multiplies in bfloat16 otherwise
SMALL = bool(int(os.environ.get("WOODJAX_SMALL", "0")))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}, {'small' if SMALL else 'full'}")

# %%
SEED = 0
HIDDEN = 8 if SMALL else 16
STEPS = 300 if SMALL else 600  # of L-BFGS
DECAY = 3e-3
DRAWS = 2 if SMALL else 6  # of random masks for each sparsity
plt.rcParams.update({"figure.dpi": 60, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
COLORS = {"Hessian": "#000000", "Gauss–Newton": "#0072b2", "empirical Fisher": "#d55e00"}

# %% [markdown]
# ## A network at a minimum
#
# One hidden layer of tanh, no biases, trained to a minimum of the mean loss plus a weight decay
#
# $$ J(w) = L(w) + \tfrac{\lambda}{2}\lVert w\rVert^2, \qquad \nabla^2 J = H + \lambda I . $$
#
# So one $\lambda$ is the weight decay of the objective *and* the damping of every curvature, and no first-order term
# is in the way: the question how good an inverse is has an answer.

# %%
data = load_dataset("digits")
batch = jnp.asarray(data.train_inputs.reshape(-1, 64)), jnp.asarray(data.train_labels)
inputs, labels = batch
keys = jax.random.split(jax.random.key(SEED), 3)
start = {
    "hidden": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
    "out": jax.random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5,
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


loss_fn = wj.cross_entropy(apply_fn)


@jax.jit
def objective(params):
    losses = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, inputs), labels)
    return losses.mean() + 0.5 * DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@jax.jit
def to_minimum(params):
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return params, values, optax.global_norm(jax.grad(objective)(params))


params, values, norm = to_minimum(start)
w, unravel = ravel_pytree(params)
d = w.size
print(f"{d:,} weights, objective {values[0]:.3f} → {values[-1]:.4f}, gradient norm {norm:.1e}")
assert norm < 0.01

# %% [markdown]
# ## Three matrices
#
# Softmax cross-entropy gives three candidates for the curvature, from exact to cheap:
#
# $$ H = \tfrac1n\sum_i \nabla^2 \ell_i, \qquad
# G = \tfrac1n\sum_i\sum_c p_{ic}\, g_{ic} g_{ic}^\top, \qquad
# \hat F = \tfrac1n\sum_i g_{i y_i} g_{i y_i}^\top . $$
#
# $G$, the Gauss–Newton matrix, is the exact Fisher: gradients at every class, weighted by the model's own
# probabilities. $\hat F$, the empirical Fisher, takes the true label alone: that is what WoodFisher inverts. Here are
# all three in full, $H$ by one Hessian-vector product for each column.


# %%
@jax.jit
def hessian_columns(params):
    column = lambda unit: ravel_pytree(wj.hvp(loss_fn, params, batch, unravel(unit)))[0]  # noqa: E731
    return jax.lax.map(column, jnp.eye(d), batch_size=64)


def matrix(rows):
    """Rows of gradients `[m, d]` in the order of `ravel_pytree`."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)], axis=1)


gradients = wj.per_example_gradients(loss_fn, params, batch)
class_gradients = wj.all_class_gradients(apply_fn, params, inputs)
H = np.asarray(hessian_columns(params), np.float64)
G, F = ((rows.T @ rows / len(rows)).astype(np.float64) for rows in map(matrix, (class_gradients, gradients)))
H = (H + H.T) / 2
matrices = {"Hessian": H, "Gauss–Newton": G, "empirical Fisher": F}

diagonal = ravel_pytree(wj.gauss_newton_diagonal(apply_fn, params, inputs))[0]
np.testing.assert_allclose(diagonal, np.diag(G), rtol=1e-3, atol=1e-7)  # without the matrix: the same diagonal
spectra = {name: np.linalg.eigvalsh(A)[::-1] for name, A in matrices.items()}
assert spectra["Hessian"][-1] > -1.2 * DECAY, "a minimum, to the precision of float32"

figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for name, spectrum in spectra.items():
    axes.semilogy(np.arange(1, d + 1), np.maximum(spectrum, 1e-9), color=COLORS[name], label=name)
axes.axhline(DECAY, color="0.5", linestyle=":", label="damping λ")
axes.set(xlabel="number of the eigenvalue", ylabel="eigenvalue", ylim=(1e-8, None))
axes.legend()
plt.show()

for name, A in matrices.items():
    above = int((spectra[name] > DECAY).sum())
    cosine = np.sum(A * H) / np.linalg.norm(A) / np.linalg.norm(H)
    print(f"{name:17} trace {np.trace(A):7.3f}, {above:4} eigenvalues above λ, cosine with the Hessian {cosine:.3f}")

# %% [markdown]
# Most directions are flat: a few hundred eigenvalues stand above the damping, and in all others the damped inverse is
# $1/\lambda$ whatever the network does. Gauss–Newton follows the Hessian closely. The empirical Fisher has the
# direction but not the **scale**: gradients at the true labels are small where the network is right. All pruning
# decisions survive a wrong scale; predictions of the loss, and the damping that fits, do not.

# One blemish: where a hidden unit has died in training, a few eigenvalues of $H$ are as negative as $-\lambda$, and the
# objective is flat there. In the reference below the negative ones are set to zero.

# %%
values, directions = np.linalg.eigh(H)
assert -values[values < 0].sum() < 0.1 * values[values > 0].sum()
matrices["Hessian"] = (directions * np.maximum(values, 0)) @ directions.T
error = {name: np.linalg.norm(A - H) / np.linalg.norm(H) for name, A in matrices.items()}
assert error["Gauss–Newton"] < 0.5 * error["empirical Fisher"]
assert np.trace(F) < 0.8 * np.trace(G)

# %% [markdown]
# ## Blocks
#
# WoodFisher keeps blocks along the diagonal. How much does that leave out? Left, the Hessian in tiles of 16 × 16
# weights: black are pixels at the edge, which are always empty, and the small square at the end is the output layer.
# Right, the part of the squared entries that lies in blocks of $b$ consecutive weights: little in small ones, and all
# three matrices agree. What that costs a pruning is measured below.

# %%
sizes = (1, 8, 32, 128, 64 * HIDDEN)


def in_blocks(A, size):
    block = np.arange(d) // size
    return np.sum(A**2, where=block[:, None] == block[None]) / np.sum(A**2)


shares = {name: [in_blocks(A, size) for size in sizes] for name, A in matrices.items()}
assert all(np.all(np.diff(share) > 0) for share in shares.values())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
tiles = np.abs(H).reshape(d // 16, 16, d // 16, 16).mean(axis=(1, 3))
picture = left.imshow(
    np.log10(tiles + 1e-9), cmap="magma", vmin=-5, vmax=-1, extent=(0, d, d, 0), interpolation="nearest"
)
left.axhline(64 * HIDDEN, color="w", linewidth=0.7)
left.axvline(64 * HIDDEN, color="w", linewidth=0.7)
left.grid(visible=False)
left.set(title="Hessian", xlabel="weight", ylabel="weight")
figure.colorbar(picture, ax=left, label="log₁₀ of the mean |entry|", shrink=0.85)
for name, share in shares.items():
    right.semilogx(sizes, [100 * x for x in share], "o-", color=COLORS[name], label=name)
right.set_xticks(sizes, [*map(str, sizes[:-1]), "layer"])
right.minorticks_off()
right.set(xlabel="block size", ylabel="squared entries inside blocks, %", ylim=(0, 100))
right.legend()
plt.show()

# %% [markdown]
# ## Engines: what rounding costs
#
# The same $\hat F + \lambda I$ can be inverted by WoodFisher's recursion over examples (`scan`, `rank_k`), by a
# Cholesky factor of the sums (`primal`), by Woodbury's identity for all rows at once (`dual`), or never, holding
# gradients and a factor of their Gram matrix (`low_rank_fisher`). In exact arithmetic they are equal. In float32,
# against NumPy in double precision:

# %%
few = jax.tree.map(lambda g: g[:128], gradients)
few_matrix = matrix(few).astype(np.float64)
gram = few_matrix.T @ few_matrix / 128
vectors = np.random.default_rng(SEED).standard_normal((16, d))
dampings = (1e-5, 1e-3, 1e-1) if SMALL else (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@jax.jit
def products(curvature, vectors):
    return jax.vmap(lambda v: ravel_pytree(curvature.solve(unravel(v)))[0])(vectors)


def relative_error(found, expected):
    return float(np.mean(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)))


engines = {
    name: partial(wj.block_fisher, block_size=None, engine=name)
    for name in (("primal", "dual") if SMALL else ("scan", "rank_k", "primal", "dual"))
}
engines["low rank"] = wj.low_rank_fisher
rounding = {
    name: [
        relative_error(
            products(build(few, damping=damping), jnp.asarray(vectors, jnp.float32)),
            vectors @ np.linalg.inv(gram + damping * np.eye(d)),
        )
        for damping in dampings
    ]
    for name, build in engines.items()
}
assert all(errors[-1] < 1e-4 for errors in rounding.values())

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, errors), marker in zip(rounding.items(), "os^vD", strict=False):
    axes.loglog(dampings, errors, marker=marker, label=name)
axes.set(xlabel="damping λ", ylabel="relative error of $F^{-1}v$", title=f"float32, 128 rows, {d:,} weights, one block")
axes.legend()
plt.show()

# %% [markdown]
# Rounding is not what decides at any usual damping; the Cholesky factor of the sums feels a small one first. So
# choose the engine by cost, as `empirical_fisher` does by itself.
#
# ## Curvatures: what approximation costs
#
# Now each curvature with the same $\lambda$ against the exact $(H + \lambda I)^{-1}$. Left, the mean cosine of the
# products with random vectors. Right, what it is for: 75 % of the weights go, the same ones for all by magnitude, and
# the others move as the curvature says,
#
# $$ \delta_K = (F^{-1})_{KQ}\,[(F^{-1})_{QQ}]^{-1}(-w_Q); $$
#
# the increase of $J$ is measured by evaluating the network.

# %%
layout = wj.make_layout(params)
exact = np.linalg.inv(matrices["Hessian"] + DECAY * np.eye(d))
layer = 64 * HIDDEN
curvatures = {
    "diagonal": wj.diagonal_fisher(gradients, damping=DECAY),
    "blocks of 32": wj.block_fisher(gradients, block_size=32, damping=DECAY),
    "blocks of 128": wj.block_fisher(gradients, block_size=128, damping=DECAY),
    "whole layers": wj.block_fisher(gradients, block_size=layer, damping=DECAY, engine="primal"),
    "K-FAC": wj.kronecker_fisher(wj.stream_gradients(loss_fn, params, batch), damping=DECAY),
    "whole network": wj.block_fisher(gradients, block_size=None, damping=DECAY, engine="primal"),
    "all classes": wj.block_fisher(class_gradients, block_size=None, damping=DECAY, engine="primal"),
    "the Hessian": wj.BlockFisher(
        layout, jnp.asarray(exact[None], jnp.float32), jnp.full(1, DECAY), jnp.zeros((), jnp.int32)
    ),
}
if SMALL:
    del curvatures["blocks of 32"], curvatures["whole layers"]
mask = wj.make_masks(wj.magnitude_scores(params), 0.75)
base = float(objective(params))


def increase(updates):
    return float(objective(optax.apply_updates(params, updates))) - base


cosines, increases = {}, {"no update": increase(jax.tree.map(lambda w, keep: jnp.where(keep, 0, -w), params, mask))}
for name, curvature in curvatures.items():
    found, expected = products(curvature, jnp.asarray(vectors, jnp.float32)), vectors @ exact
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines[name] = float(np.mean(np.sum(found * expected, axis=1) / lengths))
    increases[name] = increase(wj.compensate(params, mask, curvature))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.barh(list(cosines), list(cosines.values()), color="#56b4e9")
left.set(xlabel="cosine with the exact product", xlim=(min(cosines.values()) - 0.05, 1))
right.barh(list(increases), list(increases.values()), color="#0072b2")
right.set(xlabel="increase of the objective at 75 %, nats")
for axes in (left, right):
    axes.invert_yaxis()
plt.show()

for name in increases:
    cosine = f"cosine {cosines[name]:.3f}" if name in cosines else ""
    print(f"{name:14} increase {increases[name]:.4f} {cosine}")
assert cosines["diagonal"] < cosines["blocks of 128"] < cosines["whole network"] < cosines["all classes"]
assert np.isclose(increases["diagonal"], increases["no update"], rtol=1e-3)
assert increases["the Hessian"] < increases["whole network"] < increases["blocks of 128"] < increases["diagonal"]

# %% [markdown]
# A diagonal moves nothing: it knows of no other weight that could make up for one that goes. Larger blocks pay, and
# K-FAC, which keeps no gradient of any single example, compensates well for its price.
#
# ## Predicted against measured
#
# Every curvature predicts $\tfrac12\,\delta^\top(F + \lambda I)\,\delta$ for a step $\delta$
# (`wj.predicted_loss_change`). Each point is a pruning. *Random*: random weights go and nothing moves. *OBS*: the
# weights with the lowest scores go, $s_q = w_q^2 / 2[F^{-1}]_{qq}$, and the others make up for it. The line is
# perfection.

# %%
levels = (0.02, 0.1, 0.3, 0.6) if SMALL else (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
judges = {"empirical Fisher": "whole network", "Gauss–Newton": "all classes", "Hessian": "the Hessian"}
points = {}
for title, name in judges.items():
    curvature, A = curvatures[name], matrices[title] + DECAY * np.eye(d)
    rows = []
    for number, level in enumerate(levels):
        for draw in range(DRAWS):
            rng = np.random.default_rng((SEED, number, draw))
            step = np.where(rng.random(d) < level, -np.asarray(w), 0)
            rows.append(("random", 0.5 * step @ A @ step, increase(unravel(jnp.asarray(step, jnp.float32)))))
        updates = wj.compensate(params, wj.make_masks(wj.obs_scores(params, curvature), level), curvature)
        step = np.asarray(ravel_pytree(updates)[0], np.float64)
        predicted = float(wj.predicted_loss_change(updates, curvature))
        np.testing.assert_allclose(predicted, 0.5 * step @ A @ step, rtol=0.02)  # the library's, and by hand
        rows.append(("OBS", predicted, increase(updates)))
    points[title] = rows

figure, panels = plt.subplots(1, 3, figsize=(11, 3.7), sharex=True, sharey=True, layout="constrained")
ratios = {}
for axes, (title, rows) in zip(panels, points.items(), strict=True):
    for kind, color in (("random", "#e69f00"), ("OBS", "#0072b2")):
        found = np.array([row[1:] for row in rows if row[0] == kind])
        rising = found[found[:, 1] > 1e-5]  # below it is the rounding of the measured loss
        axes.loglog(rising[:, 1], rising[:, 0], "o", markersize=4, color=color, label=kind)
        near = rising[rising[:, 1] < 0.1]
        ratios[title, kind] = float(np.median(near[:, 0] / near[:, 1]))
    axes.loglog([1e-5, 10], [1e-5, 10], color="0.6", linewidth=1)
    axes.set(title=title, xlabel="measured increase, nats")
panels[0].set_ylabel("predicted increase, nats")
panels[0].legend()
plt.show()
for (title, kind), ratio in ratios.items():
    print(f"{title:17} {kind:6} median of predicted over measured, where that is below 0.1: {ratio:.2f}")
assert abs(ratios["Hessian", "OBS"] - 1) < 0.3
assert ratios["empirical Fisher", "OBS"] < 0.8

# %% [markdown]
# Near the minimum the Hessian is right and the empirical Fisher too small, by the scale found above. Far from it every
# quadratic fails, the exact one too: **stages**, with the curvature taken anew, are the mend, and that is what
# `wj.prune_one_shot` does.
#
# ## Damping and the number of examples
#
# Same mask, 75 % gone; the empirical Fisher of the first $m$ examples at damping $\lambda$ moves the rest. With few
# examples $\hat F$ has rank $m$, and in all other directions the damping alone decides.

# %%
counts = (32, 256, 1347) if SMALL else (16, 64, 256, 1347)
grid = np.logspace(-6, 1, 5 if SMALL else 9)


@jax.jit
def moved(rows, damping):
    return objective(
        optax.apply_updates(params, wj.compensate(params, mask, wj.low_rank_fisher(rows, damping=damping)))
    )


figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
table = {}
for count, color in zip(counts, ("#cc79a7", "#e69f00", "#56b4e9", "#0072b2")[-len(counts) :], strict=True):
    rows = jax.tree.map(lambda g, count=count: g[:count], gradients)
    table[count] = np.array([float(moved(rows, damping)) - base for damping in grid])
    axes.loglog(grid, table[count], "o-", color=color, label=f"{count:,} examples")
axes.axhline(increases["no update"], color="0.4", linestyle=":", label="no update")
axes.axhline(increases["the Hessian"], color="0.4", linestyle="--", label="the Hessian, all examples")
axes.set(xlabel="damping λ", ylabel="increase of the objective at 75 %, nats")
axes.legend(fontsize=8)
plt.show()

for count, row in table.items():
    print(f"{count:5} examples: best at λ = {grid[row.argmin()]:.0e}, increase {row.min():.3f}, at 1e-6 {row[0]:.3f}")
best = [row.min() for row in table.values()]
assert best[-1] == min(best), "more examples are better"
assert np.isclose(table[counts[-1]][-1], increases["no update"], rtol=0.05), "large damping: a diagonal, so no update"

# %% [markdown]
# Too much damping makes a multiple of the identity of the Fisher, whose update moves nothing. Too little lets
# directions without any gradient move freely. The default, `wj.Relative(1e-2)`, is 1 % of the mean diagonal, and
# `prune_one_shot` chooses by the loss on examples that it holds out.
#
# **Try next.** `ReLU` in place of tanh: kinks, and negative eigenvalues that no damping covers. `HIDDEN = 32`. A
# `wj.hutchinson_diagonal` among the curvatures, with 3 and with 300 probes. Fifteen curvatures, three seeds and all
# numbers are in [How good is each inverse?](../docs/inverse_quality.md); [curvature](../docs/curvature.md) has
# engines and damping.
