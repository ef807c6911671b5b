"""A small network of two kinds of kernels, in JAX and in float64 NumPy, for the tests of layer-by-layer pruning."""

import jax
import jax.numpy as jnp
import numpy as np

import woodjax as wj

WIDTH, HEADS, HEAD, HIDDEN, TOKENS = 8, 2, 4, 12, 3
KERNELS = ("query", "out", "up", "down")


def apply(params, x):
    heads = jnp.einsum("ntd,dhk->nthk", x, params["query"])
    x = x + jnp.einsum("nthk,hkd->ntd", jnp.tanh(heads), params["out"])
    return x + params["scale"] * (jnp.tanh(x @ params["up"]) @ params["down"])


def reference(params, x):
    """Outputs, and what each kernel reads, `[rows, in]`."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    rows = np.asarray(x, np.float64).reshape(-1, WIDTH)
    read = {"query": rows, "out": np.tanh(rows @ p["query"].reshape(WIDTH, -1))}
    rows = rows + read["out"] @ p["out"].reshape(-1, WIDTH)
    read["up"] = rows
    read["down"] = np.tanh(rows @ p["up"])
    return (rows + p["scale"] * (read["down"] @ p["down"])).reshape(np.shape(x)), read


def matrix(name, leaf):
    leaf = np.asarray(leaf)
    return leaf.reshape(WIDTH, -1) if name == "query" else leaf.reshape(-1, leaf.shape[-1])


def network(seed, depth=2, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (WIDTH, HEADS, HEAD),
        "out": (HEADS, HEAD, WIDTH),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    params = [{name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()} for _ in range(depth)]
    trees = [jax.tree.map(lambda w: w.astype(dtype), tree | {"scale": np.array([0.7])}) for tree in params]
    hidden = rng.standard_normal((6, TOKENS, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) / 2
    return trees, hidden.astype(dtype)


def layers_of(trees):
    return [wj.HostLayer(apply, tree) for tree in trees]


def square_loss(hidden, targets):
    return 0.5 * jnp.sum((hidden - targets) ** 2)
