"""Models as functions of all of their arrays, and layers as wide as the arrays: NNX and Linen."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from woodjax.adapters import linen
from woodjax.adapters.nnx import functional_variables, with_shapes_of, write_variables
from woodjax.models import Decoder, PreResNet


class Images(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.gn = nnx.GroupNorm(16, num_groups=None, group_size=2, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 8, (2, 2), strides=(2, 2), rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.fc1 = nnx.Linear(8, 6, rngs=rngs)
        self.fc2 = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv1(x)))
        x = jax.nn.relu(self.gn(self.depthwise(x)))
        x = jax.nn.relu(self.grouped(jax.nn.relu(self.up(x))))
        return self.fc2(jax.nn.relu(self.fc1(x.mean(axis=(1, 2)))))


class LinenImages(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        x = nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=2, name="gn")(x))
        x = nn.relu(nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="up")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(inputs=x))
        x = nn.relu(nn.Dense(6, name="fc1")(x.mean(axis=(1, 2))))
        return nn.Dense(2, name="fc2")(x)


class Tokens(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(7, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 6, 12, decode=False, rngs=rngs)
        self.up = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)
        self.mixing = nnx.Einsum("nto,oc->ntc", (5, 2), (2,), rngs=rngs)

    def __call__(self, x):
        x = self.embedding(x)
        x = x + self.attention(x)
        return self.mixing(jax.nn.relu(self.down(jax.nn.relu(self.up(x)))))


class LinenTokens(nn.Module):
    def setup(self):
        self.embedding = nn.Embed(7, 6)
        self.attention = nn.MultiHeadDotProductAttention(3, qkv_features=12)
        self.up = nn.DenseGeneral((2, 4))
        self.down = nn.DenseGeneral(5, axis=(-2, -1))
        self.mixing = nn.Dense(2)

    def __call__(self, x):
        x = self.embedding(x)
        x = x + self.attention(x)
        return self.mixing(nn.relu(self.down(nn.relu(self.up(x)))))


HEADS = {f"attention/{name}/kernel": [(1, "head", 1), (0, "width", 1)] for name in ("query", "key", "value")}
PLANS: dict[
    str, Any
] = {  # groups of channels: how many there are, how many stay; then axes of leaves, channels a group
    "images": (
        {"first": (8, 5), "middle": (4, 3), "hidden": (6, 2)},
        {
            "conv1/kernel": [(3, "first", 1)],
            "conv1/bias": [(0, "first", 1)],
            **{f"bn/{name}": [(0, "first", 1)] for name in ("scale", "bias", "mean", "var")},
            "depthwise/kernel": [(3, "first", 2)],
            "depthwise/bias": [(0, "first", 2)],
            "gn/scale": [(0, "first", 2)],
            "gn/bias": [(0, "first", 2)],
            "up/kernel": [(2, "first", 2), (3, "middle", 2)],
            "up/bias": [(0, "middle", 2)],
            "grouped/kernel": [(3, "middle", 2)],
            "grouped/bias": [(0, "middle", 2)],
            "fc1/kernel": [(0, "middle", 2), (1, "hidden", 1)],
            "fc1/bias": [(0, "hidden", 1)],
            "fc2/kernel": [(0, "hidden", 1)],
        },
        jax.random.normal(jax.random.key(9), (2, 6, 6, 3)),
    ),
    "tokens": (
        {"width": (6, 5), "head": (3, 2), "row": (2, 1), "column": (4, 3), "last": (5, 4)},
        {
            "embedding/embedding": [(1, "width", 1)],
            **HEADS,
            **{f"attention/{name}/bias": [(0, "head", 1)] for name in ("query", "key", "value")},
            "attention/out/kernel": [(0, "head", 1), (2, "width", 1)],
            "attention/out/bias": [(0, "width", 1)],
            "up/kernel": [(0, "width", 1), (1, "row", 1), (2, "column", 1)],
            "up/bias": [(0, "row", 1), (1, "column", 1)],
            "down/kernel": [(0, "row", 1), (1, "column", 1), (2, "last", 1)],
            "down/bias": [(0, "last", 1)],
            "mixing/kernel": [(0, "last", 1)],
        },
        jnp.array([[0, 3, 2, 6], [5, 1, 1, 4]]),
    ),
    "decoder": (
        {"heads": (2, 1), "scores": (4, 3), "values": (4, 3), "hidden": (6, 4)},
        {
            "blocks_0/attention/query/kernel": [(1, "heads", 2), (2, "scores", 1)],
            "blocks_0/attention/key/kernel": [(1, "heads", 1), (2, "scores", 1)],
            "blocks_0/attention/value/kernel": [(1, "heads", 1), (2, "values", 1)],
            "blocks_0/attention/out/kernel": [(0, "heads", 2), (1, "values", 1)],
            "blocks_0/mlp/gate/kernel": [(1, "hidden", 1)],
            "blocks_0/mlp/up/kernel": [(1, "hidden", 1)],
            "blocks_0/mlp/down/kernel": [(0, "hidden", 1)],
        },
        jnp.array([[0, 3, 2, 6], [5, 1, 1, 4]]),
    ),
}
DECODER = {"vocabulary": 7, "context": 4, "width": 6, "depth": 1, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 6}
NETWORKS: dict[str, Any] = {
    "decoder-nnx": partial(Decoder, **DECODER),
    "images-nnx": Images,
    "images-linen": LinenImages,
    "tokens-nnx": Tokens,
    "tokens-linen": LinenTokens,
}


def filled(variables):
    """Other numbers in all arrays: untrained biases and statistics would hide an array in the wrong place."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1, leaf.shape) - 0.3, jnp.float32) ** 2, variables)


def dense(name):
    _, _, inputs = PLANS[name.split("-")[0]]
    if name.endswith("nnx"):
        model = nnx.eval_shape(lambda: NETWORKS[name](rngs=nnx.Rngs(0)))
        model.eval()
        apply_fn, variables = functional_variables(model)
        return model, apply_fn, filled(variables), inputs
    module = NETWORKS[name]()
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return module, linen.functional_variables(module, variables)[0], filled(variables), inputs


def leaves_of(variables, plan):
    """Every leaf with its axes in the plan; Linen's have the name of a collection in front."""
    for path, leaf in flatten_dict(variables).items():
        name = "/".join(path)
        yield path, leaf, plan.get(name.removeprefix("params/").removeprefix("batch_stats/"), [])


def cut(variables, plan, kept):
    small = {}
    for path, leaf, axes in leaves_of(variables, plan):
        for axis, group, each in axes:
            leaf = jnp.take(leaf, (kept[group][:, None] * each + np.arange(each)).ravel(), axis)
        small[path] = leaf
    return unflatten_dict(small)


def zeroed(variables, plan, kept):
    masked = {}
    for path, leaf, axes in leaves_of(variables, plan):
        for axis, group, each in axes:
            survives = np.repeat(np.isin(np.arange(leaf.shape[axis] // each), kept[group]), each)
            leaf = leaf * np.expand_dims(survives, [i for i in range(leaf.ndim) if i != axis])
        masked[path] = leaf
    return unflatten_dict(masked)


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_channels_are_channels_set_to_zero(name):
    groups, plan, inputs = PLANS[name.split("-")[0]]
    model, apply_fn, variables, _ = dense(name)
    assert {path for path, _, axes in leaves_of(variables, plan) if axes}
    run = jax.jit(lambda apply_fn, variables: apply_fn(variables, inputs))
    outputs = run(apply_fn, variables)

    @settings(max_examples=4, deadline=None)
    @given(st.integers(0, 2**16))
    def check(seed):
        rng = np.random.default_rng(seed)
        kept = {group: np.sort(rng.permutation(size)[:stay]) for group, (size, stay) in groups.items()}
        small = cut(variables, plan, kept)
        if name.endswith("nnx"):
            fitted = with_shapes_of(model, small)
            found = run(functional_variables(fitted)[0], small)
        else:
            found = run(linen.with_shapes_of(model), small)
        expected = run(apply_fn, zeroed(variables, plan, kept))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
        assert float(jnp.abs(expected - outputs).max()) > 1e-3

    check()
    np.testing.assert_array_equal(run(apply_fn, variables), outputs)  # the model is as it was


def test_widths_of_nnx_layers():
    model, _, variables, _ = dense("tokens-nnx")
    groups, plan, inputs = PLANS["tokens"]
    kept = {group: np.arange(stay) for group, (_, stay) in groups.items()}
    small = with_shapes_of(model, cut(variables, plan, kept))
    attention = small.attention
    assert (attention.num_heads, attention.head_dim, attention.qkv_features) == (2, 4, 8)
    assert (attention.in_features, attention.in_kv_features, attention.out_features) == (5, 5, 5)
    assert (small.embedding.num_embeddings, small.embedding.features) == (7, 5)
    assert (small.up.in_features, small.up.out_features, small.mixing.kernel_shape) == ((5,), (1, 3), (4, 2))
    assert nnx.eval_shape(lambda model, x: model(x), small, inputs).shape == (2, 4, 2)
    assert (model.attention.num_heads, model.up.out_features, model.embedding.features) == (3, (2, 4), 6)


def test_the_mode_of_a_copy_and_training_it():
    """A small model trains like any other: statistics move, and the model it was made of keeps its own."""
    model = PreResNet(1, widths=(4, 4), rngs=nnx.Rngs(0))
    _, variables = functional_variables(model)
    block = variables["layer1_0"]
    block["conv1"]["kernel"] = block["conv1"]["kernel"][..., :3]
    block["bn2"] = {name: leaf[:3] for name, leaf in block["bn2"].items()}
    block["conv2"]["kernel"] = block["conv2"]["kernel"][:, :, :3]
    small = with_shapes_of(model, variables)
    before = np.asarray(small.bn.mean[...])
    assert nnx.jit(lambda model, x: model(x))(small, jnp.ones((2, 4, 4, 3))).shape == (2, 10)
    assert (small.bn.mean[...] != before).any()
    np.testing.assert_array_equal(model.bn.mean[...], before)
    assert (small.layer1_0.conv1.out_features, small.layer1_0.bn2.num_features) == (3, 3)
    assert (small.layer1_0.conv2.in_features, model.layer1_0.conv2.in_features) == (3, 4)


def test_shapes_are_enough():
    model = nnx.eval_shape(lambda: PreResNet(1, widths=(4, 8), rngs=nnx.Rngs(0)))
    _, variables = functional_variables(model)
    variables["linear"]["kernel"] = jax.ShapeDtypeStruct((7, 10), jnp.float32)
    assert with_shapes_of(model, variables).linear.in_features == 7


def grouped(kernel, groups=4):
    layer = nnx.Conv(8, 16, (3, 3), feature_group_count=groups, use_bias=False, rngs=nnx.Rngs(0))
    return with_shapes_of(layer, {"kernel": jnp.ones(kernel)})


def test_groups_of_convolutions():
    """With as many channels a group as before, groups are gone; with fewer, each group is smaller."""
    whole, smaller = grouped((3, 3, 2, 12)), grouped((3, 3, 1, 8))
    assert (whole.feature_group_count, whole.in_features, whole.out_features) == (3, 6, 12)
    assert (smaller.feature_group_count, smaller.in_features, smaller.out_features) == (4, 4, 8)
    assert whole(jnp.ones((1, 4, 4, 6))).shape == (1, 4, 4, 12)
    assert smaller(jnp.ones((1, 4, 4, 4))).shape == (1, 4, 4, 8)
    for kernel in ((3, 3, 2, 10), (3, 3, 1, 10)):
        with pytest.raises(ValueError, match="has 4 groups, 8 channels in and 16 out; its new kernel"):
            grouped(kernel)


def test_layers_that_vmap_stacked():
    layers = nnx.vmap(lambda key: nnx.Linear(3, 4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 5))
    small = with_shapes_of(layers, {"kernel": jnp.ones((5, 3, 2)), "bias": jnp.ones((5, 2))})
    assert (small.in_features, small.out_features) == (3, 2)


def test_group_normalisation():
    layer = nnx.GroupNorm(8, num_groups=4, rngs=nnx.Rngs(0))
    arrays = {name: jnp.ones(6) for name in ("scale", "bias")}
    assert with_shapes_of(layer, arrays).num_groups == 3
    one = with_shapes_of(nnx.GroupNorm(8, num_groups=1, rngs=nnx.Rngs(0)), arrays)
    assert (one.num_groups, one.group_size) == (1, 6)
    with pytest.raises(ValueError, match="normalises groups of 2 channels and now has 5"):
        with_shapes_of(layer, {name: jnp.ones(5) for name in arrays})


def test_heads_that_do_not_divide():
    layer = nnx.MultiHeadAttention(4, 8, rngs=nnx.Rngs(0))
    _, variables = functional_variables(layer)
    variables["query"] = {"kernel": jnp.ones((8, 3, 2)), "bias": jnp.ones((3, 2))}
    variables["key"] = {"kernel": jnp.ones((8, 2, 2)), "bias": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="now has 3 heads of queries and 2 of keys"):
        with_shapes_of(layer, variables)


def test_write_variables():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
    _, variables = functional_variables(model)
    named = {"layers": {str(i): layer for i, layer in variables["layers"].items()}}  # as a file has them
    write_variables(model, jax.tree.map(lambda leaf: leaf + 1, named))
    np.testing.assert_array_equal(model.layers[1].mean[...], [1, 1, 1])
    for name, changed, message in (
        ("kernel", jnp.ones((2, 2)), r"'layers/0/kernel' has the shape \(2, 2\), the model's \(2, 3\)"),
        ("scale", jnp.ones(3), r"missing: \[\]; unknown: \['layers/0/scale'\]"),
    ):
        _, wrong = functional_variables(model)
        wrong["layers"][0][name] = changed
        with pytest.raises(ValueError, match=message):
            write_variables(model, wrong)
    apply_fn, wrong = functional_variables(model)
    del wrong["layers"][1]["var"]
    for function in (write_variables, with_shapes_of):
        with pytest.raises(ValueError, match=r"missing: \['layers/1/var'\]; unknown: \[\]"):
            function(model, wrong)
    with pytest.raises(ValueError, match=r"missing: \['layers/1/var'\]"):
        apply_fn(wrong, jnp.ones((1, 2)))
    wrong["layers"][1]["var"] = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"'layers/1/var' has the shape \(3, 1\)"):
        with_shapes_of(model, wrong)
    np.testing.assert_array_equal(model.layers[1].mean[...], [1, 1, 1])


def test_models_of_one_graph_compile_once():
    traced = []

    @jax.jit
    def run(apply_fn, variables, x):
        traced.append(None)
        return apply_fn(variables, x)

    outputs = []
    for seed in (0, 1):
        layer = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
        layer.eval()
        apply_fn, variables = functional_variables(layer)
        outputs.append(run(apply_fn, jax.tree.map(lambda leaf, seed=seed: leaf + seed, variables), jnp.ones((2, 3))))
    assert len(traced) == 1
    np.testing.assert_allclose(outputs, [np.ones((2, 3)), np.ones((2, 3))], atol=1e-4)


@pytest.mark.parametrize("layer", [nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))])
def test_train_mode_is_refused(layer):
    apply_fn, variables = functional_variables(layer)
    for call in (apply_fn, jax.jit(apply_fn)):
        with pytest.raises(ValueError, match=r"call model\.eval\(\) before"):
            call(variables, jnp.ones((2, 3)))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) * self.param("gain", nn.initializers.ones, (4,))


def test_linen_errors():
    x = jnp.ones((2, 3))
    module = nn.BatchNorm(use_running_average=False)
    apply_fn, variables = linen.functional_variables(module, module.init(jax.random.key(0), x))
    for call in (apply_fn, linen.with_shapes_of(module)):
        with pytest.raises(ValueError, match="while it is evaluated"):
            call(variables, x)
        with pytest.raises(ValueError, match="'params' is missing"):
            call({"batch_stats": variables["batch_stats"]}, x)
    with pytest.raises(ValueError, match="'params' is missing"):
        linen.functional_variables(module, {})
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "gain": jnp.ones(2)}
    with pytest.raises(ValueError, match="own code fixes the shape of an array"):
        linen.with_shapes_of(Fixed())({"params": params}, x)


def test_linen_widths_hold_for_a_call_only():
    """Also inside `nn.remat` and `nn.scan`, and for a module that is given as a field."""

    class Stack(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            x = nn.remat(nn.Dense)(6, name="first")(x)
            layers = nn.scan(
                lambda layer, x, _: (x + layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}
            )
            x, _ = layers(nn.Dense(6, name="stack"), x, jnp.arange(2))
            return self.inner(x)

    inner = nn.Dense(3)
    module = Stack(inner)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    kept = np.array([0, 2, 5])
    small = {
        "first": jax.tree.map(lambda leaf: leaf[..., kept], params["first"]),
        "stack": {
            "kernel": params["stack"]["kernel"][:, kept][..., kept],
            "bias": params["stack"]["bias"][:, kept],
        },
        "inner": {"kernel": params["inner"]["kernel"][kept], "bias": params["inner"]["bias"]},
    }
    y = x @ small["first"]["kernel"] + small["first"]["bias"]
    for i in range(2):
        y = y + y @ small["stack"]["kernel"][i] + small["stack"]["bias"][i]
    expected = y @ small["inner"]["kernel"] + small["inner"]["bias"]
    np.testing.assert_allclose(linen.with_shapes_of(module)({"params": small}, x), expected, rtol=1e-5)
    assert inner.features == 3
    assert linen.functional_variables(module, {"params": params})[0]({"params": params}, x).shape == (2, 3)
