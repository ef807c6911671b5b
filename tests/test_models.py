"""Networks, the torch-layout importer, and the published checkpoints where they are at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.comparison import load_problem
from woodjax.datasets import load_dataset
from woodjax.models import MLP, NETWORKS, ResNet, load_torch_layout, resnet20


@pytest.mark.parametrize(
    ("name", "weights", "parameters"),
    [
        ("mlpnet", 32_360, 32_360),
        ("digits-mlp", 6_464, 6_570),
        ("resnet20", 268_336, 269_722),
        ("resnet20-b", 270_896, 272_474),
    ],
)
def test_parameter_counts(name, weights, parameters):
    """268,336 and 269,722 are the literature's; option B adds two 1×1 convolutions and their norms."""
    _, params = functional(NETWORKS[name](nnx.Rngs(0)))
    assert wj.make_layout(params).num_weights == weights
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_shapes(shortcut):
    model = resnet20(nnx.Rngs(0), shortcut)
    model.eval()
    apply_fn, params = functional(model)
    assert jax.eval_shape(apply_fn, params, jnp.ones((2, 32, 32, 3))).shape == (2, 10)


def test_option_a_pads_channels_on_both_sides():
    block = ResNet(1, rngs=nnx.Rngs(0)).layer2_0
    skipped = block._skip(jnp.ones((1, 4, 4, 16)))
    assert skipped.shape == (1, 2, 2, 32)
    np.testing.assert_array_equal(skipped[0, 0, 0], [0] * 8 + [1] * 16 + [0] * 8)


def test_unknown_shortcut():
    with pytest.raises(ValueError, match="shortcut is 'C'"):
        ResNet(1, shortcut="C", rngs=nnx.Rngs(0))


def torch_arrays(rng, bias=True):
    arrays = {"fc1.weight": (4, 3), "fc1.bias": (4,), "fc2.weight": (2, 4), "fc2.bias": (2,)}
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in arrays.items()
        if bias or "bias" not in name
    }


def test_importer_transposes_and_computes_what_torch_would(tmp_path):
    arrays = torch_arrays(np.random.default_rng(0))
    extra = {"module." + name: array for name, array in arrays.items()} | {"bn.num_batches_tracked": np.array([1])}
    save_file(extra, tmp_path / "net.safetensors")
    model = MLP((3, 4, 2), rngs=nnx.Rngs(0))
    load_torch_layout(model, tmp_path / "net.safetensors")
    x = np.ones((5, 3), np.float32)
    hidden = np.maximum(x @ arrays["fc1.weight"].T + arrays["fc1.bias"], 0)
    np.testing.assert_allclose(model(x), hidden @ arrays["fc2.weight"].T + arrays["fc2.bias"], rtol=1e-5)


def test_importer_lists_everything_that_is_wrong(tmp_path):
    arrays = torch_arrays(np.random.default_rng(0))
    del arrays["fc1.bias"]
    arrays["fc2.weight"] = np.ones((2, 5), np.float32)
    arrays["fc9.weight"] = np.ones((1, 1), np.float32)
    save_file(arrays, tmp_path / "net.safetensors")
    model = MLP((3, 4, 2), rngs=nnx.Rngs(0))
    before = np.asarray(model.fc1.kernel[...])
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_torch_layout(model, tmp_path / "net.safetensors")
    for part in ("missing: fc1.bias", "shape of fc2.weight: (5, 2)", "(4, 2)", "unexpected: fc9.weight"):
        assert part in str(caught.value)
    np.testing.assert_array_equal(model.fc1.kernel[...], before)


def test_importer_needs_a_safetensors_file(tmp_path):
    model = MLP((3, 2), rngs=nnx.Rngs(0))
    with pytest.raises(FileNotFoundError, match="No weights file"):
        load_torch_layout(model, tmp_path / "none.safetensors")
    save_file({"params/fc1/kernel": np.ones((3, 2))}, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="an output of `woodjax prune`"):
        load_torch_layout(model, tmp_path / "own.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_torch_layout(model, tmp_path / "text.safetensors")


def test_datasets_are_refused_clearly(tmp_path, monkeypatch):
    monkeypatch.delenv("WOODJAX_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="Unknown dataset 'imagenet'"):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match="pass --data-dir or set WOODJAX_DATA_DIR"):
        load_dataset("mnist")
    with pytest.raises(FileNotFoundError, match="No mnist in"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No cifar10_exact_subset\.npz"):
        load_dataset("cifar10-subset", tmp_path)


def test_digits_are_embedded_and_split_without_overlap():
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1347, 8, 8, 1)
    assert digits.test_inputs.shape == (450, 8, 8, 1)
    assert digits.train_inputs.max() == 1
    assert np.bincount(digits.train_labels).min() > 100


def test_published_mlpnet(data_dir):
    """The whole published magnitude column, to the digit: its counts keep int(n·(1 − s)) weights."""
    problem = load_problem("mnist", data_dir=data_dir, weights=data_dir / "checkpoints/mlpnet_mnist.safetensors")
    assert 100 * problem.accuracy(problem.params) == pytest.approx(93.97, abs=0.005)
    column = {0.5: 93.93, 0.6: 93.78, 0.7: 93.62, 0.8: 92.89, 0.9: 90.30, 0.95: 83.64, 0.98: 32.25}
    scores = wj.magnitude_scores(problem.params)
    for sparsity, published in column.items():
        kept = int(problem.num_weights * (1 - sparsity))
        masks = wj.make_masks(scores, 1 - kept / problem.num_weights)
        accuracy = 100 * problem.accuracy(wj.apply_masks(problem.params, masks))
        assert accuracy == pytest.approx(published, abs=0.005)


def test_published_resnet20(data_dir):
    problem = load_problem(
        "cifar10-subset", data_dir=data_dir, weights=data_dir / "checkpoints/resnet20_cifar10.safetensors"
    )
    assert 100 * problem.accuracy(problem.params) == pytest.approx(91.72, abs=0.15)
