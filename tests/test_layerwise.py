"""Layer-by-layer pruning against doing it all at once, in float64."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from layerwise_case import HIDDEN, KERNELS, TOKENS, WIDTH, apply, layers_of, matrix, network, reference, square_loss

import woodjax as wj
from woodjax.adapters.nnx import host_layers, write_variables
from woodjax.layerwise.kernels import run_recorded
from woodjax.layerwise.moments import add_moments, advance
from woodjax.layerwise.output_gradients import _backward
from woodjax.layerwise.pruning import _sweep
from woodjax.models import gqa_nano

JOB = Path(__file__).with_name("layerwise_job.py")


def only_down(path, leaf):
    return path == "down"


def swept(kernel, rows, weights, options):
    """SparseGPT on one kernel with one damped Hessian for each group of outputs."""
    groups, total = weights.shape[1], kernel.size
    parts = []
    for group, part in enumerate(np.split(kernel, groups, axis=1)):
        hessian = np.einsum("r,ri,rj->ij", weights[:, group], rows, rows)
        hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
        ends = [oracle.rounded(options.get("sparsity", 0), total * (group + g) // groups) for g in (0, 1)]

        def choose(first, scores, count=ends[1] - ends[0]):
            if "pattern" in options:
                return np.argsort(np.argsort(scores, axis=0, kind="stable"), axis=0) < 2
            return oracle.lowest(scores.ravel(), count).reshape(scores.shape)

        parts.append(oracle.column_sweep(part, hessian, 4 if "pattern" in options else len(part), choose))
    return tuple(np.concatenate(found, axis=1) for found in zip(*parts, strict=True))


@pytest.mark.parametrize("options", [{"sparsity": 0.45}, {"pattern": wj.NM(2, 4)}], ids=["unstructured", "2:4"])
@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_sweep_of_two_layers_is_that_of_the_whole_network(options, seed):
    trees, hidden = network(seed)
    layers = layers_of(trees)
    final, infos = wj.prune_layers(layers, hidden, microbatch_size=4, **options)  # the last micro-batch has two
    x = hidden.astype(np.float64)
    for layer, tree, info in zip(layers, trees, infos, strict=True):
        _, read = reference(tree, x)
        for name in KERNELS:
            dense, rows = matrix(name, tree[name]).astype(np.float64), read[name]
            kernel, mask = swept(dense, rows, np.ones((len(rows), 1)), options)
            np.testing.assert_array_equal(matrix(name, layer.masks[name]), mask)
            np.testing.assert_allclose(matrix(name, layer.params[name]), kernel, atol=2e-3 * np.abs(kernel).max())
            change = np.sum((rows @ (kernel - dense)) ** 2) / np.sum((rows @ dense) ** 2)
            assert info.error[name] == pytest.approx(change, rel=0.02, abs=1e-4)
            assert info.density[name] == mask.mean()
        assert layer.masks["scale"].all()
        x, _ = reference(layer.params, x)
    np.testing.assert_allclose(final, x, rtol=1e-4, atol=1e-4)


@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_row_fisher_of_groups_of_outputs(seed):
    trees, hidden = network(seed, depth=1)
    layers, targets = layers_of(trees), np.ones_like(hidden)
    options = {"select": only_down, "microbatch_size": 6}
    found = wj.squared_output_gradients(layers, hidden, square_loss, targets, groups=4, **options)
    outputs, read = reference(trees[0], hidden)
    delta = 0.7 * (outputs - targets).reshape(-1, WIDTH)
    weights = (delta**2).reshape(len(delta), 4, -1).mean(axis=2)
    np.testing.assert_allclose(found.squares[0]["down"], weights, rtol=2e-3, atol=1e-6)
    wj.prune_layers(layers, hidden, sparsity=0.5, output_gradients=found, **options)
    kernel, mask = swept(matrix("down", trees[0]["down"]).astype(float), read["down"], weights, {"sparsity": 0.5})
    np.testing.assert_array_equal(layers[0].masks["down"], mask)
    np.testing.assert_allclose(layers[0].params["down"], kernel, atol=5e-3 * np.abs(kernel).max())


@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_squares_are_those_of_gradients_of_single_tokens(seed):
    trees, hidden = network(seed)
    hidden = hidden[:, :1]  # one token a sequence: its gradient is x δᵀ
    found = wj.squared_output_gradients(layers_of(trees), hidden, square_loss, 0 * hidden, groups=24, microbatch_size=6)

    def loss(trees, x):
        for tree in trees:
            x = apply(tree, x[None])[0]
        return square_loss(x, 0 * x)

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(trees, hidden)
    x = hidden
    for number, tree in enumerate(trees):
        x, read = reference(tree, x)
        for name in KERNELS:
            rows = np.stack([matrix(name, g) for g in np.asarray(gradients[number][name])]).astype(float)
            squares = np.sum(rows**2, axis=1) / np.sum(read[name] ** 2, axis=1, keepdims=True)
            np.testing.assert_allclose(found.squares[number][name], squares, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_wanda(seed):
    trees, hidden = network(seed, depth=1)
    _, read = reference(trees[0], hidden)
    for options in ({"sparsity": 0.3}, {"pattern": wj.NM(2, 4)}):
        (layer,) = layers = layers_of(trees)
        wj.prune_layers(layers, hidden, method="wanda", microbatch_size=6, **options)
        for name in KERNELS:
            kernel, mask = matrix(name, trees[0][name]), matrix(name, layer.masks[name])
            scores = np.abs(kernel) * np.linalg.norm(read[name], axis=0)[:, None]
            if "pattern" in options:
                runs = scores.reshape(-1, 4, kernel.shape[1])
                expected = (np.argsort(np.argsort(runs, axis=1), axis=1) >= 2).reshape(kernel.shape)
            else:
                ends = [oracle.rounded(0.3, len(kernel) * o) for o in range(kernel.shape[1] + 1)]
                columns = zip(scores.T, np.diff(ends), strict=True)
                expected = ~np.stack([oracle.lowest(column, count) for column, count in columns], axis=1)
                assert (~mask).sum() == oracle.rounded(0.3, kernel.size)
            np.testing.assert_array_equal(mask, expected)
            np.testing.assert_array_equal(matrix(name, layer.params[name]), np.where(mask, kernel, 0))


def test_wanda_with_the_fisher_of_the_loss():
    trees, hidden = network(2, depth=1)
    (layer,) = layers = layers_of(trees)
    found = wj.squared_output_gradients(layers, hidden, square_loss, 0 * hidden, groups=2)
    wj.prune_layers(layers, hidden, method="wanda", pattern=wj.NM(1, 4), output_gradients=found)
    _, read = reference(trees[0], hidden)
    norms = np.sqrt(found.squares[0]["down"].astype(float).T @ read["down"] ** 2).T
    scores = (np.abs(trees[0]["down"]) * np.repeat(norms, WIDTH // 2, axis=1)).reshape(-1, 4, WIDTH)
    kept = np.argsort(np.argsort(scores, axis=1), axis=1) == 3
    np.testing.assert_array_equal(layer.masks["down"], kept.reshape(HIDDEN, WIDTH))


def test_magnitude_counts_are_exact_and_ties_go_by_index():
    trees, hidden = network(3, depth=1)
    trees[0]["up"] = np.ones((WIDTH, HIDDEN), np.float32)
    (layer,) = layers = layers_of(trees)
    _, (info,) = wj.prune_layers(layers, hidden, method="magnitude", sparsity=0.37)
    for name in KERNELS:
        size = trees[0][name].size
        kernel = np.abs(trees[0][name]).ravel()
        np.testing.assert_array_equal(~layer.masks[name].ravel(), oracle.lowest(kernel, oracle.rounded(0.37, size)))
    assert (info.damping, info.error) == ({}, {})


EINSUMS = {
    "heads": ("ntd,dhk->nthk", (WIDTH, 2, 3)),
    "kernel first": ("dhk,ntd->nthk", (WIDTH, 2, 3)),
    "kernel first, two axes read": ("dtk,ntd->nk", (WIDTH, TOKENS, 5)),
    "output axis first": ("ntd,od->nto", (5, WIDTH)),
    "reads the middle": ("ntd,ado->ntao", (2, WIDTH, 3)),
}


WRAPPED = [*((name, "plain") for name in EINSUMS), *(("heads", wrap) for wrap in ("checkpoint", "bfloat16"))]


@pytest.mark.parametrize(("name", "wrap"), WRAPPED)
def test_kernels_are_matrices_whatever_their_axes(name, wrap):
    subscripts, shape = EINSUMS[name]
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.standard_normal(shape), jnp.bfloat16 if wrap == "bfloat16" else jnp.float32)}
    x = jnp.asarray(rng.standard_normal((4, TOKENS, WIDTH)), jnp.float32)
    first, second = ("w", "x") if subscripts.startswith("d") else ("x", "w")

    def function(params, x):
        operands = {"w": params["w"].astype(jnp.float32), "x": x}
        return jnp.sin(jnp.einsum(subscripts, operands[first], operands[second]))

    layer = jax.checkpoint(function) if wrap == "checkpoint" else function
    layout = wj.make_layout(w)
    recording = run_recorded(layer, w, x, layout)
    np.testing.assert_allclose(recording.outputs, function(w, x), rtol=1e-6)
    view, rows = recording.views["w"], recording.inputs["w"]
    kernel = view.to_matrix(w["w"].astype(jnp.float32))
    assert rows.shape[1] == kernel.shape[0]
    np.testing.assert_array_equal(view.to_leaf(kernel, w["w"]), w["w"].astype(jnp.float32))
    shifts = {"w": jnp.zeros((len(rows), kernel.shape[1]))}
    total = lambda shifts: jnp.sum(jnp.cos(run_recorded(layer, w, x, layout, shifts).outputs))
    gradient = jax.grad(lambda w: jnp.sum(jnp.cos(function({"w": w}, x))))(w["w"].astype(jnp.float32))
    deltas = jax.grad(total)(shifts)["w"]
    np.testing.assert_allclose(rows.T @ deltas, view.to_matrix(gradient), rtol=1e-3, atol=1e-4)


class Watched(wj.HostLayer):
    """Notes how much is on the device when it is loaded."""

    def __init__(self, tree, held):
        super().__init__(apply, tree)
        self.held = held

    def load(self):
        self.held.append(sum(array.nbytes for array in jax.live_arrays()))
        return super().load()


@pytest.mark.parametrize("method", ["sweep", "wanda"])
def test_one_layer_is_resident_at_a_time(method):
    trees, hidden = network(0, depth=5)
    held = []
    layers = [Watched(tree, held) for tree in trees]
    before = sum(array.nbytes for array in jax.live_arrays())
    found = wj.squared_output_gradients(layers, hidden, square_loss, 0 * hidden, microbatch_size=2)
    wj.prune_layers(layers, hidden, sparsity=0.5, method=method, output_gradients=found, microbatch_size=2)
    assert len(held) == 15
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(trees[0]))
    assert max(held) - before < largest  # not one kernel of another layer, nor its moments


def test_as_many_programs_for_any_depth():
    def programs(depth):
        trees, hidden = network(0, depth=depth)
        layers = layers_of(trees)
        options = {"select": only_down, "microbatch_size": 3}
        found = wj.squared_output_gradients(layers, hidden, square_loss, 0 * hidden, groups=2, **options)
        wj.prune_layers(layers, hidden, pattern=wj.NM(2, 4), output_gradients=found, **options)
        return [function._cache_size() for function in (add_moments, advance, _sweep, _backward)]

    few = programs(1)
    assert programs(6) == few


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bits():
    trees, hidden = network(7, depth=3)
    whole, killed = layers_of(trees), layers_of(trees)
    final, infos = wj.prune_layers(whole, hidden, sparsity=0.5)
    saved = {}

    def save(info, hidden):
        saved.update(start=info.layer + 1, hidden=hidden.copy())
        if info.layer == 1:
            raise KilledError

    with pytest.raises(KilledError):
        wj.prune_layers(killed, hidden, sparsity=0.5, on_layer=save)
    again, rest = wj.prune_layers(killed, **saved, sparsity=0.5)
    assert rest == infos[2:]
    np.testing.assert_array_equal(again, final)
    for one, other in zip(whole, killed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_layers_in_files(tmp_path):
    trees, hidden = network(7, depth=3)
    for number, tree in enumerate(trees):
        wj.save_arrays(tmp_path / f"{number}.safetensors", tree)
    names = [[tmp_path / f"{i}{end}.safetensors" for end in ("", "-pruned", "-masks")] for i in range(3)]
    whole, files = layers_of(trees), [wj.LayerFile(apply, *paths) for paths in names]
    wj.prune_layers(whole, hidden, sparsity=0.5)

    def kill(info, hidden):
        np.save(tmp_path / "hidden.npy", hidden)
        if info.layer == 0:
            files[1].source.rename(tmp_path / "away")  # the run ends at layer 1

    with pytest.raises(FileNotFoundError):
        wj.prune_layers(files, hidden, sparsity=0.5, on_layer=kill)
    (tmp_path / "away").rename(files[1].source)
    start = sum(layer.destination.exists() for layer in files)
    assert start == 1
    wj.prune_layers(files, np.load(tmp_path / "hidden.npy"), sparsity=0.5, start=start)
    for layer, file in zip(whole, files, strict=True):
        jax.tree.map(np.testing.assert_array_equal, layer.params, wj.load_arrays(file.destination)[0])
        jax.tree.map(np.testing.assert_array_equal, layer.masks, wj.load_masks(file.masks))
    with pytest.raises(ValueError, match="source and destination are both"):
        wj.LayerFile(apply, "a.safetensors", "./a.safetensors")


def test_half_precision_with_moments_in_float32():
    trees, hidden = network(1, dtype=jnp.bfloat16)
    layers = layers_of(trees)
    found = wj.squared_output_gradients(layers, hidden, square_loss, 0 * hidden)
    final, infos = wj.prune_layers(layers, hidden, pattern=wj.NM(2, 4), output_gradients=found)
    assert final.dtype == jnp.bfloat16
    assert found.squares[0]["up"].dtype == np.float32
    for layer, info in zip(layers, infos, strict=True):
        assert {leaf.dtype for leaf in layer.params.values()} == {np.dtype(jnp.bfloat16)}
        assert info.sparsity == 0.5
        assert all(((layer.params[name] != 0) <= layer.masks[name]).all() for name in KERNELS)
    wide = layers_of([jax.tree.map(lambda w: w.astype(np.float32), tree) for tree in trees])
    wj.prune_layers(wide, hidden.astype(np.float32), pattern=wj.NM(2, 4), method="wanda")
    plain = layers_of(trees)
    wj.prune_layers(plain, hidden, pattern=wj.NM(2, 4), method="wanda")
    agreement = np.mean([(plain[0].masks[name] == wide[0].masks[name]).mean() for name in KERNELS])
    assert agreement > 0.97  # inputs are rounded to eight bits


def test_sequences_on_four_devices(tmp_path):
    file = tmp_path / "found.npz"
    subprocess.run([sys.executable, str(JOB), str(file)], check=True, timeout=120, capture_output=True)
    trees, hidden = network(5)
    hidden = np.concatenate([hidden, hidden[:2]])
    layers = layers_of(trees)
    found = wj.squared_output_gradients(layers, hidden, square_loss, np.zeros_like(hidden), microbatch_size=4)
    final, _ = wj.prune_layers(layers, hidden, sparsity=0.5, output_gradients=found, microbatch_size=4)
    with np.load(file) as arrays:
        np.testing.assert_allclose(arrays["final"], final, rtol=1e-4, atol=1e-5)
        for number, layer in enumerate(layers):
            for name, leaf in layer.params.items():
                np.testing.assert_allclose(arrays[f"{number}/{name}"], leaf, rtol=1e-3, atol=1e-4)
        assert arrays["all_reduces"] > 0
        assert arrays["programs"] == 1


def test_hidden_states_may_be_a_tree_with_integers():
    def with_positions(params, hidden):
        x, positions = hidden
        return jnp.sin(x + positions[..., None]) @ params["w"], positions

    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((4, 3, 8)).astype(np.float32), np.tile(np.arange(3, dtype=np.int32), (4, 1))
    layers = [wj.HostLayer(with_positions, {"w": rng.standard_normal((8, 8)).astype(np.float32)}) for _ in range(2)]
    loss = lambda hidden, targets: square_loss(hidden[0], targets)
    found = wj.squared_output_gradients(layers, (x, positions), loss, 0 * x, groups=1)
    assert found.squares[0]["w"].shape == (12, 1)
    (_, out), _ = wj.prune_layers(layers, (x, positions), sparsity=0.5, output_gradients=found)
    np.testing.assert_array_equal(out, positions)


def test_blocks_of_a_flax_decoder():
    model = gqa_nano(nnx.Rngs(0))
    model.eval()
    tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 64)
    hidden = model.embedding(tokens) + model.positions[:16]
    blocks = [model.blocks_0, model.blocks_1]
    layers = host_layers(blocks)
    assert layers[0].apply == layers[1].apply
    final, infos = wj.prune_layers(layers, hidden, pattern=wj.NM(2, 4), method="wanda")
    assert sorted(infos[1].density) == [
        *(f"attention/{name}/kernel" for name in ("key", "out", "query", "value")),
        *(f"mlp/{name}/kernel" for name in ("down", "gate", "up")),
    ]
    for block, layer in zip(blocks, layers, strict=True):
        write_variables(block, layer.params)
        for name, leaf in layer.masks["attention"].items():
            kernel = leaf["kernel"].reshape(-1, 32) if name == "out" else leaf["kernel"].reshape(32, -1)
            assert (kernel.reshape(-1, 4, kernel.shape[1]).sum(axis=1) == 2).all()
    np.testing.assert_allclose(model(tokens), model.linear(model.norm(final)), rtol=1e-4, atol=1e-5)


def test_a_layer_must_answer():
    assert isinstance(wj.HostLayer(apply, {}), wj.ResidentLayer)
    layer = wj.HostLayer(apply, {"w": np.ones(2)})
    with pytest.raises(ValueError, match="params"):
        layer.store({"v": np.ones(2)}, {"v": np.ones(2, bool)})


ONE = {"sparsity": 0.5}
OPTIONS = [
    ({}, "Pass one of sparsity="),
    ({"sparsity": 0.5, "pattern": wj.NM(2, 4)}, "Pass one of sparsity="),
    ({"pattern": (2, 4)}, r"pass woodjax.NM\(n, m\)"),
    ({"sparsity": 1.5}, "sparsity is 1.5"),
    ({**ONE, "method": "sparsegpt"}, "method is 'sparsegpt': choose one of"),
    ({**ONE, "damping": "auto"}, "pass a number or woodjax.Relative"),
    ({**ONE, "damping": -1.0}, "damping is -1.0"),
    ({**ONE, "block_size": 0}, "block_size is 0"),
    ({"pattern": wj.NM(2, 4), "block_size": 6}, "block_size is 6"),
    ({**ONE, "start": 2}, "start is 2 of 2 layers"),
    ({**ONE, "microbatch_size": 0}, "microbatch_size is 0"),
    ({"pattern": wj.NM(2, 5)}, r"Layer 0: Kernel 'down' reads 12 inputs, no multiple of 5|block_size is 128"),
    ({"pattern": wj.NM(2, 5), "block_size": 5}, r"Layer 0: Kernel 'down' reads 12 inputs, no multiple of 5"),
    ({**ONE, "select": lambda path, leaf: False}, "Layer 0: No leaf is selected"),
    ({**ONE, "select": lambda path, leaf: True}, r"Layer 0: The leaves \['scale'\] are not used once"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_do_not_go_together(options, message):
    trees, hidden = network(0)
    with pytest.raises(ValueError, match=message):
        wj.prune_layers(layers_of(trees), hidden, **options)


def test_layers_and_data_that_cannot_be():
    trees, hidden = network(0)
    prune = partial(wj.prune_layers, sparsity=0.5)
    with pytest.raises(ValueError, match="start is 0 of 0 layers"):
        prune([], hidden)
    with pytest.raises(ValueError, match="hidden states that come in hold NaN"):
        prune(layers_of(trees), np.full_like(hidden, np.nan))
    with pytest.raises(ValueError, match="Layer 0: apply makes"):
        prune([wj.HostLayer(lambda p, x: (x @ p["w"], x), {"w": np.eye(WIDTH)})], hidden)
    with pytest.raises(ValueError, match=r"Layer 0: Kernels \['w'\] hold NaN"):
        prune([wj.HostLayer(lambda p, x: x @ p["w"], {"w": np.full((WIDTH, 2), np.nan, np.float32)})], hidden)
    with pytest.raises(ValueError, match="Layer 0: The second moments"):
        prune([wj.HostLayer(lambda p, x: (x * 1e30) @ p["w"], {"w": np.eye(WIDTH, dtype=np.float32)})], hidden)
    with pytest.raises(ValueError, match="Layer 0: The hidden states that go out"):
        prune([wj.HostLayer(lambda p, x: x @ p["w"] / 0, {"w": np.eye(WIDTH, dtype=np.float32)})], hidden)
    with pytest.raises(ValueError, match=r"Layer 0: The leaves \['w'\] are not used once"):
        prune([wj.HostLayer(lambda p, x: x @ p["w"] @ p["w"], {"w": np.eye(WIDTH, dtype=np.float32)})], hidden)


def test_output_gradients_of_something_else():
    trees, hidden = network(0)
    gradients = partial(wj.squared_output_gradients, layers_of(trees), hidden, square_loss)
    found = gradients(0 * hidden, microbatch_size=3)
    prune = partial(wj.prune_layers, layers_of(trees), hidden, sparsity=0.5, output_gradients=found)
    with pytest.raises(ValueError, match="in micro-batches of 3, here are 2, 6 and 8"):
        prune()
    with pytest.raises(ValueError, match="magnitude looks at no data"):
        prune(method="magnitude", microbatch_size=3)
    with pytest.raises(ValueError, match=r"nothing for the kernels \['down'\]"):
        prune(
            microbatch_size=3,
            output_gradients=found._replace(
                squares=[{k: v for k, v in one.items() if k != "down"} for one in found.squares]
            ),
        )
    with pytest.raises(ValueError, match="groups=0"):
        gradients(0 * hidden, groups=0)
    with pytest.raises(ValueError, match="targets are of 2 sequences, hidden of 6"):
        gradients(hidden[:2])
    with pytest.raises(ValueError, match="Layer 1: Gradients of the loss"):
        wj.squared_output_gradients(layers_of(trees), hidden, lambda x, y: jnp.sum(jnp.sqrt(0 * x)), hidden)


def test_a_sharding_must_divide_and_be_auto():
    trees, hidden = network(0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="sharding is of an explicit mesh"):
        wj.prune_layers(layers_of(trees), hidden, sparsity=0.5, sharding=jax.NamedSharding(mesh, jax.P("data")))
