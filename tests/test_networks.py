"""The networks of `woodjax.models`: what docs/models.md says of them, what they compute, and how they begin."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import built
from flax import nnx
from scipy.special import erf, softmax

import woodjax as wj
from woodjax import models
from woodjax.adapters.nnx import functional
from woodjax.models import (
    NETWORKS,
    VGG,
    DenseNet,
    MobileNetV2,
    PreResNet,
    ResNet,
    UNet,
    ViT,
    WideResNet,
    gqa_nano,
    torch_init,
)
from woodjax.models.densenet import DenseLayer, Transition
from woodjax.models.grouped_query import DecoderBlock, GroupedQueryAttention
from woodjax.models.mobilenet import SeparableBlock
from woodjax.models.mobilenet_v2 import InvertedResidual
from woodjax.models.preresnet import PreActivationBottleneck
from woodjax.models.torch_layout import torch_name
from woodjax.models.unet import Up
from woodjax.models.vit import EncoderBlock

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
ROW = re.compile(r"\| `([a-z0-9-]+)` \| (\d+)×\d+×(\d) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|")
ROWS = [(found[0], *(int(n.replace(",", "")) for n in found[1:])) for found in ROW.findall(PAGE)]
OTHER = re.compile(r"\| `(\w+_nano)` \| ([\d×]+)( tokens)? \| ([\d×]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|")

PUBLISHED = {  # by name and classes
    ("vgg11-bn", 10): 9_231_114,
    ("vgg16-bn", 10): 14_728_266,
    ("resnet20", 10): 269_722,
    ("resnet32", 10): 464_154,
    ("resnet18", 10): 11_173_962,
    ("resnet18", 1000): 11_689_512,
    ("resnet50", 10): 23_520_842,
    ("resnet50", 1000): 25_557_032,
    ("wrn16-8", 10): 10_961_370,
    ("wrn28-10", 10): 36_479_194,
    ("mobilenet-v1", 10): 3_217_226,
    ("mobilenet-v1", 1000): 4_231_976,
    ("mobilenet-v2", 10): 2_296_922,
    ("mobilenet-v2", 1000): 3_504_872,
    ("densenet40", 10): 176_122,
    ("vit-tiny", 1000): 5_717_416,
}
MULTIPLY_ADDS = {
    ("resnet18", 1000): 1.814e9,
    ("resnet50", 1000): 4.089e9,
    ("mobilenet-v1", 1000): 0.569e9,
    ("mobilenet-v2", 1000): 0.301e9,
}


def options(classes):
    return {} if classes == 10 else {"classes": classes, "stem": "imagenet"}


def test_the_page_has_all_networks():
    assert {name for name, *_ in ROWS} == set(NETWORKS)
    assert set(PUBLISHED) <= {(name, classes) for name, _, _, classes, *_ in ROWS}


@pytest.mark.newest
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_is_true(row):
    """Shapes only: no weight is made."""
    name, size, channels, classes, parameters, weights, multiply_adds = row
    model = nnx.eval_shape(lambda: NETWORKS[name](nnx.Rngs(0), **options(classes)))
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    assert nnx.eval_shape(lambda model, x: model(x), model, images).shape == (1, classes)  # train mode
    model.eval()
    assert counts(model, images) == (parameters, weights, multiply_adds)
    assert parameters == PUBLISHED.get((name, classes), parameters)
    assert multiply_adds == pytest.approx(MULTIPLY_ADDS.get((name, classes), multiply_adds), rel=1e-3)


def counts(model, inputs):
    apply_fn, params = functional(model)
    leaves = jax.tree.leaves(params)
    select = wj.hidden_kernels(apply_fn, params, inputs)
    costs = jax.tree.leaves(wj.weight_macs(apply_fn, params, inputs))
    return (
        sum(leaf.size for leaf in leaves),
        wj.make_layout(params, select=select).num_weights,
        sum(cost * leaf.size for cost, leaf in zip(costs, leaves, strict=True)),
    )


@pytest.mark.newest
def test_the_table_of_other_networks_is_true():
    rows = OTHER.findall(PAGE)
    assert {name for name, *_ in rows} == {"unet_nano", "gqa_nano"}
    for name, inputs, tokens, logits, *numbers in rows:
        model = nnx.eval_shape(lambda name=name: getattr(models, name)(nnx.Rngs(0)))
        batch = jax.ShapeDtypeStruct((1, *map(int, inputs.split("×"))), jnp.int32 if tokens else jnp.float32)
        called = nnx.eval_shape(lambda model, x: model(x), model, batch)  # train mode
        assert called.shape == (1, *map(int, logits.split("×")))
        model.eval()
        assert counts(model, batch) == tuple(int(number.replace(",", "")) for number in numbers)


def test_the_examples_of_the_page_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/models.md", "exec"), names)
    assert capsys.readouterr().out == "145584\n"


SMALL = {
    "vgg": lambda rngs: VGG((4, "M", 4), rngs=rngs),
    "resnet": lambda rngs: ResNet(1, widths=(4,), bottleneck=True, stem="imagenet", rngs=rngs),
    "wide resnet": lambda rngs: WideResNet(10, 1, rngs=rngs),
    "preresnet": lambda rngs: PreResNet(1, widths=(4, 8), rngs=rngs),
    "mobilenet v2": lambda rngs: MobileNetV2(((1, 4, 1, 1), (2, 4, 2, 2)), first=4, last=8, rngs=rngs),
    "densenet": lambda rngs: DenseNet((1, 1), growth=4, rngs=rngs),
    "u-net": lambda rngs: UNet((4, 8), rngs=rngs),
    "vit": lambda rngs: ViT(image_size=16, patch=8, width=8, depth=1, heads=2, rngs=rngs),
}


call = nnx.jit(lambda layer, x: layer(x))


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_forward_in_both_modes(make):
    """Eval mode treats each image by itself; train mode does not where there is batch normalisation, and moves it."""
    model = built(make)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    stats = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    logits = call(model, x)
    assert logits.shape == ((4, 16, 16, 10) if isinstance(model, UNet) else (4, 10))
    assert bool(jnp.isfinite(logits).all())
    moved = nnx.state(model, nnx.BatchStat)
    assert all(bool((a != b).any()) for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(moved), strict=True))
    model.eval()
    evaluated = call(model, x)
    np.testing.assert_allclose(call(model, x[::-1])[::-1], evaluated, rtol=1e-4, atol=1e-5)
    if jax.tree.leaves(moved):
        assert float(jnp.abs(evaluated - logits).max()) > 1e-3


def test_a_separable_block_mixes_channels_in_its_second_convolution_only():
    block = built(lambda rngs: SeparableBlock(3, 5, 2, rngs=rngs))
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    difference = block.conv1(x.at[..., 1].add(1.0)) - block.conv1(x)
    np.testing.assert_array_equal(jnp.any(difference != 0, axis=(0, 1, 2)), [False, True, False])
    assert block.conv2(block.conv1(x)).shape == (1, 3, 3, 5)


def zero(layer):
    layer.kernel[...] = jnp.zeros_like(layer.kernel[...])


def test_a_pre_activation_block_adds_to_the_stream_itself():
    """Neither normalisation nor ReLU is on the way of a shortcut, also where it is a projection."""
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3), np.float32)
    for stride in (1, 2):
        block = built(lambda rngs, stride=stride: PreActivationBottleneck(3, 3 * stride, stride, rngs=rngs))
        zero(block.conv3)
        skipped = x[:, ::2, ::2] @ np.asarray(block.shortcut.kernel[0, 0]) if stride == 2 else x
        np.testing.assert_allclose(call(block, x), skipped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stem", "inputs", "outputs", "stride", "expansion", "layers", "residual"),
    [
        ("cifar", 4, 4, 1, 1, {"conv1", "conv2", "conv3"}, True),
        ("cifar", 4, 6, 1, 2, {"conv1", "conv2", "conv3", "shortcut"}, True),
        ("cifar", 4, 4, 2, 2, {"conv1", "conv2", "conv3"}, False),
        ("imagenet", 4, 4, 1, 1, {"conv2", "conv3"}, True),
        ("imagenet", 4, 6, 1, 2, {"conv1", "conv2", "conv3"}, False),
    ],
)
def test_inverted_residuals(stem, inputs, outputs, stride, expansion, layers, residual):
    """Which layers a block has in the two forms, and that its last convolution is linear."""
    block = built(lambda rngs: InvertedResidual(inputs, outputs, stride, expansion, stem, rngs=rngs))
    assert {name for name in ("conv1", "conv2", "conv3", "shortcut") if hasattr(block, name)} == layers
    assert block.conv2.feature_group_count == expansion * inputs
    block.eval()
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, inputs))
    y = call(block, x)
    assert float(y.min()) < 0
    zero(block.conv3)
    skipped = block.shortcut(x) if hasattr(block, "shortcut") else x
    np.testing.assert_array_equal(call(block, x), skipped if residual else jnp.zeros_like(y))


def test_a_deep_dense_net_has_the_parameters_that_are_published():
    model = nnx.eval_shape(lambda: DenseNet((16, 16, 16), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 769_162


def test_a_dense_layer_keeps_its_input_and_a_transition_halves():
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 6), np.float32)
    layer, transition = built(lambda rngs: DenseLayer(6, 3, rngs=rngs)), built(lambda rngs: Transition(6, rngs=rngs))
    transition.eval()  # batch normalisation of mean 0 and variance 1
    y = call(layer, x)
    assert y.shape == (2, 4, 4, 9)
    np.testing.assert_array_equal(y[..., :6], x)
    inner = np.maximum(x, 0) @ np.asarray(transition.conv.kernel[0, 0])
    halved = inner.reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(call(transition, x), halved, rtol=1e-4, atol=1e-5)


def test_an_encoder_block_is_the_paper_s():
    """Against the equations in float64: pre-norm, softmax over keys at 1/√(width of a head), exact GELU."""
    apply_fn, params = functional(nnx.eval_shape(lambda: EncoderBlock(8, 2, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), params)
    x = rng.standard_normal((2, 5, 8))
    scaled = lambda name, x: p[name]["scale"] * x + p[name]["bias"]
    norm = lambda name, x: scaled(name, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6))
    dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
    queries, keys, values = np.split(dense("qkv", norm("norm1", x)), 3, axis=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = softmax(queries[..., head] @ np.swapaxes(keys[..., head], 1, 2) / 2, axis=-1)
        heads.append(weights @ values[..., head])
    y = x + dense("projection", np.concatenate(heads, axis=-1))
    hidden = dense("fc1", norm("norm2", y))
    y = y + dense("fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    p, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (p, x))
    np.testing.assert_allclose(jax.jit(apply_fn.func)(*apply_fn.args, p, x), y, rtol=1e-4, atol=1e-5)


def test_a_level_of_a_u_net_doubles_the_image_behind_the_skip():
    """Flax does not turn the kernel of a transposed convolution, so its taps come out reversed."""
    level = built(lambda rngs: Up(3, 2, rngs=rngs))
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 3), np.float32)
    found = call(level.up, x)
    blocks = np.einsum("nhwc,abco->nhawbo", x, np.asarray(level.up.kernel[...])[::-1, ::-1]).reshape(1, 4, 4, 2)
    np.testing.assert_allclose(found, blocks, rtol=1e-5, atol=1e-6)
    joined = []
    level.convolutions = lambda x: joined.append(x)
    level(x, jnp.ones((1, 4, 4, 2)))
    np.testing.assert_array_equal(joined[0], jnp.concatenate([jnp.ones((1, 4, 4, 2)), found], axis=-1))


def test_a_decoder_block_is_the_papers():
    """Against the equations in float64: RMSNorm, two heads of queries to one of keys and values, causal, SwiGLU."""
    apply_fn, params = functional(nnx.eval_shape(lambda: DecoderBlock(8, 4, 2, 3, 5, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), params)
    x = rng.standard_normal((2, 5, 8))
    norm = lambda name, x: p[name]["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    y, attention = norm("norm1", x), jax.tree.map(np.asarray, p["attention"])
    attended = np.zeros_like(x)
    for head in range(4):
        query = y @ attention["query"]["kernel"][:, head]
        key, value = (y @ attention[name]["kernel"][:, head // 2] for name in ("key", "value"))
        scores = np.where(np.tri(5, dtype=bool), query @ np.swapaxes(key, 1, 2) / np.sqrt(3), -np.inf)
        attended += softmax(scores, axis=-1) @ value @ attention["out"]["kernel"][head]
    x2 = x + attended
    gate, up, down = (p["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
    y = norm("norm2", x2)
    expected = x2 + (y @ gate / (1 + np.exp(-y @ gate)) * (y @ up)) @ down
    p, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (p, x))
    np.testing.assert_allclose(jax.jit(apply_fn.func)(*apply_fn.args, p, x), expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_does_not_look_ahead():
    model = built(lambda rngs: gqa_nano(rngs, vocabulary=16, context=6))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]])
    logits = call(model, tokens)
    np.testing.assert_allclose(logits[0, :3], logits[1, :3], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(logits[0, 3:] - logits[1, 3:]).max(axis=1).min()) > 1e-3
    with pytest.raises(ValueError, match="Rows of 7 tokens: this network has positions for 6"):
        nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((1, 7), jnp.int32))
    with pytest.raises(ValueError, match="heads=4, kv_heads=3"):
        GroupedQueryAttention(8, 4, 3, 2, rngs=nnx.Rngs(0))


class Layers(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.convolution = nnx.Conv(8, 64, (3, 3), feature_group_count=4, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.linear = nnx.Linear(64, 4608, rngs=rngs)


def test_torch_init():
    """Uniform on ±1/√fan_in, kernels and biases; a group of channels has a fan-in of its own; the rest stays."""
    model, again = Layers(0), Layers(5)
    for one in (model, again):
        torch_init(one, nnx.Rngs(1))
    drawn = [model.convolution.kernel, model.convolution.bias, model.linear.kernel, model.linear.bias]
    for parameter, fan_in in zip(drawn, (18, 18, 64, 64), strict=True):
        values = np.sort(np.asarray(parameter[...]).ravel()) * fan_in**0.5
        assert np.abs(values).max() <= 1
        distance = np.abs(values - np.linspace(-1, 1, values.size)).max() / 2
        assert distance < 2.7 / values.size**0.5  # Kolmogorov's test, at a level of 1e-6
    assert not np.allclose(model.linear.bias[:64] * 8, model.convolution.bias[...] * 18**0.5)
    assert (np.asarray(model.norm.scale[...]) == 1).all()
    values = [nnx.to_pure_dict(nnx.state(one, nnx.Param)) for one in (model, again)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *values))


def test_torch_init_names_a_layer_that_it_does_not_know():
    class Net(nnx.Module):
        def __init__(self):
            self.fc, self.mixing = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Einsum("ab,bc->ac", (2, 2), rngs=nnx.Rngs(0))

    model = Net()
    before = np.asarray(model.fc.kernel[...])
    with pytest.raises(ValueError, match="Layer 'mixing' is a Einsum"):
        torch_init(model, nnx.Rngs(1))
    np.testing.assert_array_equal(model.fc.kernel[...], before)


def test_activations_fade_by_the_factors_that_torch_init_names():
    x = jax.random.normal(jax.random.key(0), (512, 400))
    for draw, factor in ((lambda layer: None, 0.5**0.5), (lambda layer: torch_init(layer, nnx.Rngs(3)), 6**-0.5)):
        layer = nnx.Linear(400, 400, use_bias=False, rngs=nnx.Rngs(2))
        draw(layer)
        assert float(jnp.sqrt(jnp.mean(jax.nn.relu(layer(x)) ** 2))) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("resnet18", {"layer2.0.shortcut.0.weight", "layer4.1.conv2.weight", "linear.bias"}),
        ("resnet50", {"layer3.5.conv3.weight", "layer1.0.shortcut.1.bias"}),
        ("mobilenet-v1", {"layers.12.conv1.weight", "layers.0.bn2.weight"}),
    ],
)
def test_names_of_torch_files(name, some):
    """Those of kuangliu/pytorch-cifar, whose files the importer reads."""
    model = nnx.eval_shape(lambda: NETWORKS[name](nnx.Rngs(0)))
    assert some <= {torch_name(path) for path in nnx.to_flat_state(nnx.state(model, nnx.Param)).paths}


def test_errors():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="stem is 'mnist'"):
        NETWORKS["resnet18"](rngs, stem="mnist")
    with pytest.raises(ValueError, match="depth is 20"):
        WideResNet(20, 1, rngs=rngs)
    with pytest.raises(ValueError, match="patches must divide"):
        ViT(image_size=30, patch=4, width=8, depth=1, heads=2, rngs=rngs)
    abstract = {
        name: nnx.eval_shape(lambda name=name: NETWORKS[name](nnx.Rngs(0))) for name in ("vgg-slim", "vit-nano")
    }
    image = jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        nnx.eval_shape(lambda model, x: model(x), abstract["vgg-slim"], image)
    with pytest.raises(ValueError, match="do not divide by the 2 max-pools"):
        nnx.eval_shape(lambda x: UNet((2, 2, 2), rngs=nnx.Rngs(0))(x), jnp.ones((1, 8, 6, 3)))
    with pytest.raises(ValueError, match="positions for 32×32"):
        nnx.eval_shape(lambda model, x: model(x), abstract["vit-nano"], image)
