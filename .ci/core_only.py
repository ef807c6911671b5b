"""In an environment with the wheel and its core dependencies alone: import it and prune a network that is a dict."""

import importlib.util

import jax
import jax.numpy as jnp

import woodjax as wj

extras = ("chex", "equinox", "flax", "matplotlib", "pytest", "rich", "safetensors", "sklearn", "tensorflow_datasets")
there = [name for name in extras if importlib.util.find_spec(name)]
assert not there, f"this environment has {there}: it shows nothing about the core alone"
assert "site-packages" in wj.__file__, f"{wj.__file__} is not what the wheel installed"
for name in wj.__all__:
    getattr(wj, name)

keys = jax.random.split(jax.random.key(0), 3)
params = {"hidden": jax.random.normal(keys[0], (8, 16)), "out": jax.random.normal(keys[1], (16, 3))}
inputs = jax.random.normal(keys[2], (64, 8))


def apply_fn(params, x):
    """Logits of a batch."""
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


batch = inputs, jnp.argmax(apply_fn(params, inputs), axis=1)
pruned, masks, info = wj.prune_one_shot(wj.cross_entropy(apply_fn), params, batch, 0.5)
zeros = sum(int((w == 0).sum()) for w in pruned.values())
assert zeros == sum(int((~mask).sum()) for mask in masks.values()) == 88, zeros
print(f"woodjax {wj.__version__}, jax {jax.__version__}: pruned {zeros} of 176 weights, {len(info.sparsity)} stages")
