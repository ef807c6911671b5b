"""Round trips to the same bits, programs that agree with their functions, and counts that can be checked by hand."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import woodjax as wj
from woodjax.adapters.nnx import functional
from woodjax.models import NETWORKS

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "float64"),
]
seeds = st.integers(0, 2**32 - 1)


def any_bits(rng, shape, dtype):
    """Arrays of arbitrary bits, NaNs with a payload and negative zeros among them."""
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def same_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.asarray(a, order="C").tobytes() == np.asarray(b, order="C").tobytes()


def network(variables, x):
    hidden = jax.nn.relu(x @ variables["fc1"]["kernel"] + variables["fc1"]["bias"])
    return hidden @ variables["fc2"]["kernel"]


def weights(seed=0, sizes=(12, 8, 4)):
    rng = np.random.default_rng(seed)
    a, b, c = sizes
    kernels = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((a, b), (b,), (b, c))]
    return {"fc1": {"kernel": kernels[0], "bias": kernels[1]}, "fc2": {"kernel": kernels[2]}}


# Files


@given(seed=seeds, shape=st.sampled_from([(), (0, 3), (5,), (3, 2), (2, 1, 3)]))
def test_arrays_come_back_bit_by_bit(tmp_path_factory, seed, shape):
    rng = np.random.default_rng(seed)
    file = tmp_path_factory.mktemp("arrays") / "arrays.safetensors"
    tree = {"layer": {dtype: any_bits(rng, shape, dtype) for dtype in DTYPES}, "list": [np.arange(3), np.eye(2)]}
    wj.save_arrays(file, tree, metadata={"plan": {"fc1": [0, 2]}, "rate": 0.1, "name": "α"})
    loaded, metadata = wj.load_arrays(file)
    assert metadata == {"plan": {"fc1": [0, 2]}, "rate": 0.1, "name": "α"}
    assert set(loaded) == {"layer", "list"}
    assert set(loaded["list"]) == {"0", "1"}
    for dtype in DTYPES:
        same_bits(loaded["layer"][dtype], tree["layer"][dtype])
    jax.tree.map(same_bits, wj.load_arrays(file, like=tree)[0], tree)
    first = file.read_bytes()
    wj.save_arrays(file, tree, metadata=metadata)
    assert file.read_bytes() == first


def test_views_and_big_ends_are_saved_by_value(tmp_path):
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {"transposed": kernel.T, "strided": kernel[::2, ::-1], "big": kernel.astype(">f4"), "jax": jnp.ones(2)}
    wj.save_arrays(tmp_path / "a", tree)
    for name, array in wj.load_arrays(tmp_path / "a")[0].items():
        np.testing.assert_array_equal(array, tree[name])


def test_optimizer_state_fills_its_structure(tmp_path):
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(weights())
    wj.save_arrays(tmp_path / "a", state)
    empty = jax.tree.map(lambda x: None if x is None else 0, state)
    loaded, _ = wj.load_arrays(tmp_path / "a", like=empty)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    with pytest.raises(ValueError, match="missing are \\['other'\\]"):
        wj.load_arrays(tmp_path / "a", like={"other": 0})


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    wj.save_arrays(file, {"w": np.ones(3)})
    before = file.read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        wj.save_arrays(file, {"w": np.zeros(3)})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]
    with pytest.raises(FileNotFoundError):
        wj.save_arrays(tmp_path / "nowhere" / "a", {"w": np.zeros(3)})


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    wj.save_arrays(tmp_path / "a", {"w": np.ones(3)})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.newest
def test_a_killed_save_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    wj.save_arrays(file, {"w": np.ones(3)})
    job = (
        "import os, signal, sys, numpy as np, woodjax as wj\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "wj.save_arrays(sys.argv[1], {'w': np.zeros(3)})\n"
    )
    done = subprocess.run([sys.executable, "-c", job, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(wj.load_arrays(file)[0]["w"], 1)


@pytest.mark.parametrize(
    ("tree", "metadata", "message"),
    [
        ({}, None, "no leaf"),
        (np.ones(3), None, "no leaf with a name"),
        ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, None, "Two leaves are named 'a/b'"),
        ({"a": np.ones(1), "a/b": np.ones(1)}, None, "'a' is a leaf"),
        ({"__metadata__": np.ones(1)}, None, "__metadata__"),
        ({"a": np.array(["text"])}, None, "Leaf 'a' is <U4"),
        ({"a": jnp.ones(2, jnp.int4)}, None, "Leaf 'a' is int4"),
        ({"a": jnp.ones(2, jnp.complex64)}, None, "Leaf 'a' is complex64"),
        ({"a": jax.random.key(0)}, None, "random key"),
        ({"a": np.ones(1)}, {"f": float("nan")}, "not JSON"),
        ({"a": np.ones(1)}, {"f": print}, "not JSON"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path, tree, metadata, message):
    with pytest.raises(ValueError, match=message):
        wj.save_arrays(tmp_path / "a", tree, metadata=metadata)
    assert not os.listdir(tmp_path)


def test_files_of_others_are_read_or_refused(tmp_path):
    save_file({"encoder.weight": np.ones((2, 2))}, tmp_path / "torch", metadata={"format": "pt"})
    tree, metadata = wj.load_arrays(tmp_path / "torch")
    assert (list(tree), metadata) == (["encoder.weight"], {"format": "pt"})
    with pytest.raises(ValueError, match="no masks"):
        wj.load_masks(tmp_path / "torch")
    for content in (b"", b"\x80\x04pickle", b"\xff" * 8 + b"{}", (tmp_path / "torch").read_bytes()[:-1]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            wj.load_arrays(tmp_path / "broken")
    with pytest.raises(FileNotFoundError):
        wj.load_arrays(tmp_path / "nowhere")


def test_nothing_that_is_traced_is_saved(tmp_path):
    with pytest.raises(ValueError, match="Leaf 'w' is traced"):
        jax.jit(lambda w: wj.save_arrays(tmp_path / "a", {"w": w}))(jnp.ones(2))


@given(seed=seeds, density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_masks_come_back_and_take_an_eighth_of_a_byte(tmp_path_factory, seed, density):
    rng = np.random.default_rng(seed)
    shapes = {"scalar": (), "none": (0,), "seven": (7,), "eight": (2, 4), "conv": (3, 3, 5, 7), "large": (200, 300)}
    masks = {"layer": {name: jnp.asarray(rng.random(shape) < density) for name, shape in shapes.items()}}
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    wj.save_masks(file, masks)
    jax.tree.map(same_bits, wj.load_masks(file), masks)
    jax.tree.map(same_bits, wj.load_masks(file, like=masks), masks)
    assert file.stat().st_size <= sum(-(-int(np.prod(s)) // 8) for s in shapes.values()) + 130 * len(shapes)


def test_masks_that_are_not_masks(tmp_path):
    with pytest.raises(ValueError, match="leaf 'w' is float32"):
        wj.save_masks(tmp_path / "a", {"w": jnp.ones(3)})
    wj.save_arrays(tmp_path / "a", {"w": np.zeros(1, np.uint8)}, metadata={"mask_shapes": {"w": [9]}})
    with pytest.raises(ValueError, match=r"no mask of shape \[9\]"):
        wj.load_masks(tmp_path / "a")


# Sparse forms


def random_mask(rng, shape, survivors):
    """A fixed number of survivors, so that one program serves all examples."""
    return rng.permutation(np.arange(np.prod(shape)) < survivors).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "survivors", "dtype", "index"),
    [
        ((5, 255), 300, jnp.float32, "uint8"),
        ((5, 255), 0, jnp.float32, "uint8"),
        ((256, 3), 300, jnp.bfloat16, "uint16"),
        ((2, 70_000), 300, jnp.float32, "int32"),
    ],
)
@settings(max_examples=5)
@given(seed=seeds)
def test_bcoo_is_the_masked_matrix(shape, survivors, dtype, index, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(shape)
    kernel[rng.random(shape) < 0.2] = 0  # survivors that are zero are stored
    params = {"w": jnp.asarray(kernel, dtype), "b": jnp.asarray(kernel[0], dtype)}
    masks = {"w": random_mask(rng, shape, survivors), "b": np.arange(shape[1]) % 2 == 0}
    sparse = wj.to_bcoo(params, masks)
    assert sparse["w"].indices.dtype == index
    assert sparse["w"].nse == survivors
    assert sparse["w"].data.dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, wj.from_bcoo(sparse), wj.apply_masks(params, masks))
    np.testing.assert_array_equal(to_dense(sparse["w"]), wj.apply_masks(params, masks)["w"])


to_dense = jax.jit(wj.from_bcoo)


@settings(max_examples=5)
@given(seed=seeds)
def test_products_with_the_smallest_indices(seed):
    """The side of the leaf, 255, is the largest that fits: JAX pads with it."""
    rng = np.random.default_rng(seed)
    kernel, mask = rng.standard_normal((255, 255)), random_mask(rng, (255, 255), 9999)
    sparse = wj.to_bcoo(jnp.asarray(kernel, jnp.float32), mask)
    x = jnp.asarray(rng.standard_normal((3, 255)), jnp.float32)
    for result in (x @ sparse, matmul(x, sparse), (sparse.T @ x.T).T):
        np.testing.assert_allclose(result, np.asarray(x, float) @ np.where(mask, kernel, 0), atol=1e-4)


@jax.jit
def matmul(x, kernel):
    return x @ kernel


def test_leaves_that_stay_dense():
    params = {"full": jnp.ones((2, 2)), "conv": jnp.ones((3, 3, 1, 2))}
    masks = {"full": np.ones((2, 2), bool), "conv": np.arange(18).reshape(3, 3, 1, 2) % 2 == 0}
    sparse = wj.to_bcoo(params, masks)
    jax.tree.map(same_bits, sparse, wj.apply_masks(params, masks))
    with pytest.raises(ValueError, match="Leaf 'w' is traced"):
        jax.jit(lambda w: wj.to_bcoo({"w": w}, {"w": w > 0}))(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="masks are bool"):
        wj.to_bcoo(params, params)


unpack = jax.jit(wj.unpack_nm)


@pytest.mark.parametrize(
    ("shape", "axis", "pattern", "dtype"),
    [
        ((8, 3), -2, wj.NM(2, 4), jnp.float32),
        ((3, 8), -1, wj.NM(2, 4), jnp.bfloat16),
        ((3, 3, 8, 5), -2, wj.NM(1, 8), jnp.float16),
        ((2, 10, 3), -2, wj.NM(3, 5), jnp.float32),
        ((9, 2, 2), -3, wj.NM(1, 3), jnp.float32),
    ],
)
@settings(max_examples=8)
@given(seed=seeds, short=st.booleans())
def test_packs_are_those_of_the_oracle_and_come_back(shape, axis, pattern, dtype, seed, short):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(any_bits(rng, shape, dtype))
    scores = np.moveaxis(rng.random(shape), axis, -1)
    grouped = scores.reshape(*scores.shape[:-1], -1, pattern.m)
    kept = grouped.argsort(-1).argsort(-1) < pattern.n
    if short:  # groups with fewer survivors, some with none
        kept &= rng.random(kept.shape) < 0.5
    mask = np.moveaxis(kept.reshape(scores.shape), -1, axis)
    packed = wj.pack_nm(kernel, mask, pattern, axis=axis)
    values, positions = oracle.pack_nm(np.moveaxis(np.asarray(kernel), axis, -1), kept, pattern.n, pattern.m)
    same_bits(packed.values, values)
    same_bits(packed.positions, positions)
    masked = wj.apply_masks(kernel, jnp.asarray(mask))
    same_bits(wj.unpack_nm(packed), masked)
    same_bits(unpack(packed), masked)


def test_packs_in_a_tree_in_files_and_in_slices(tmp_path):
    rng = np.random.default_rng(0)
    params = {"first": rng.random((3, 8)), "layers": rng.random((2, 8, 12)), "bias": rng.random(8)}
    params = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), params)
    gradients = {"layers": jnp.asarray(rng.standard_normal((3, 2, 8, 12)), jnp.float32)}
    fisher = wj.diagonal_fisher(gradients, damping=1.0, batch_axes=1)
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["layers"] = wj.pattern_masks({"layers": params["layers"]}, fisher, wj.NM(2, 4), batch_axes=1)["layers"]
    packed = wj.pack_nm(params, masks, wj.NM(2, 4))
    jax.tree.map(same_bits, wj.unpack_nm(packed), wj.apply_masks(params, masks))
    same_bits(packed["first"], params["first"])
    layers = packed["layers"]
    assert layers.values.nbytes + layers.positions.nbytes == Fraction(17, 32) * params["layers"].nbytes
    wj.save_arrays(tmp_path / "a", packed)
    jax.tree.map(same_bits, wj.load_arrays(tmp_path / "a", like=packed)[0], packed)
    loaded = wj.load_arrays(tmp_path / "a")[0]["layers"]
    same_bits(wj.unpack_nm(wj.PackedNM(**loaded, pattern=wj.NM(2, 4))), wj.unpack_nm(layers))
    slices = jax.lax.map(wj.unpack_nm, layers)
    same_bits(slices, wj.unpack_nm(layers))


def test_masks_that_are_no_pack():
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(8)}
    masks = {"w": np.arange(16).reshape(8, 2) < 6, "b": np.arange(8) < 4}
    with pytest.raises(ValueError, match="Leaf 'w' has a group of 4 with 3 survivors"):
        wj.pack_nm(params, masks, wj.NM(2, 4))
    with pytest.raises(ValueError, match="Leaf 'w' has 8 weights along axis -2, no multiple of 3"):
        wj.pack_nm(params, masks, wj.NM(1, 3))
    with pytest.raises(ValueError, match="count it from the end"):
        wj.pack_nm(params, masks, wj.NM(2, 4), axis=0)
    with pytest.raises(ValueError, match="Leaf 'b' is traced"):
        jax.jit(lambda p: wj.pack_nm(p, masks, wj.NM(2, 4)))(params)


# Programs


def test_a_program_runs_at_any_batch_from_files_alone(tmp_path):
    params = weights()
    program = wj.export_stablehlo(network, params, jnp.ones((1, 12)))
    wj.save_arrays(tmp_path / "a", params)
    loaded = wj.load_stablehlo(program)
    for batch in (1, 7):
        x = jax.random.normal(jax.random.key(batch), (batch, 12))
        expected = network(jax.tree.map(np.float64, params), np.asarray(x, np.float64))
        np.testing.assert_allclose(loaded(params, x), expected, atol=1e-4)
        np.testing.assert_allclose(loaded(wj.load_arrays(tmp_path / "a")[0], x), expected, atol=1e-4)
    # Another network of the same shapes, and not a constant of the program.
    other = weights(1)
    np.testing.assert_allclose(jax.jit(loaded)(other, x), network(other, x), atol=1e-4)
    with pytest.raises(ValueError, match="Leaf 'fc1/bias' is float32\\[9\\]"):
        loaded({**params, "fc1": {**params["fc1"], "bias": jnp.ones(9)}}, x)
    with pytest.raises(ValueError, match="'fc2/kernel' is only there"):
        loaded({"fc1": params["fc1"]}, x)
    with pytest.raises(ValueError, match="'fc3' is only among the variables"):
        loaded({**params, "fc3": x}, x)


def test_programs_that_know_their_batch():
    def fixed(variables, x):
        return x.reshape(3, -1) @ variables["w"]

    variables, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"depends on the batch size .* symbolic_batch=False for the batch of 3"):
        wj.export_stablehlo(fixed, variables, x)
    loaded = wj.load_stablehlo(wj.export_stablehlo(fixed, variables, x, symbolic_batch=False))
    np.testing.assert_allclose(loaded(variables, x), 4)
    with pytest.raises(ValueError, match="depends on the batch size"):
        wj.export_stablehlo(lambda v, x: x if x.shape[0] > 2 else x + 1, variables, x)
    with pytest.raises(ValueError, match="no common first axis"):
        wj.export_stablehlo(lambda v, x: x["a"], variables, {"a": x, "b": jnp.ones(())})
    with pytest.raises(ValueError, match="no common first axis"):
        wj.export_stablehlo(lambda v, x: x["a"], variables, {"a": x, "b": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="dot_general"):  # wrong at any batch: the function's own words
        wj.export_stablehlo(lambda v, x: x @ v["w"], variables, x)
    state = optax.EmptyState()
    with pytest.raises(ValueError, match="The results are"):
        wj.export_stablehlo(lambda v, x: (x, state), variables, x)


def test_programs_for_devices_that_are_not_here():
    params = weights()
    with pytest.raises(ValueError, match="cpu"):
        wj.load_stablehlo(wj.export_stablehlo(network, params, jnp.ones((1, 12)), platforms=["tpu"]))(
            params, jnp.ones((1, 12))
        )
    both = wj.load_stablehlo(wj.export_stablehlo(network, params, jnp.ones((1, 12)), platforms=["cpu", "tpu"]))
    np.testing.assert_allclose(both(params, jnp.ones((1, 12))), network(params, jnp.ones((1, 12))), atol=1e-4)


def test_bytes_that_are_no_program():
    for content in (b"", b"not a program", bytes(100)):
        with pytest.raises(ValueError, match="no program of export_stablehlo"):
            wj.load_stablehlo(content)
    other = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((3,), jnp.float32)).serialize()
    with pytest.raises(ValueError, match="no program of export_stablehlo"):
        wj.load_stablehlo(other)


# Measurements


def test_multiply_adds_of_a_whole_program():
    x, kernels = jnp.ones((2, 6, 4)), jnp.ones((5, 4, 4))

    def attention(v, x):
        return jax.nn.softmax(x @ jnp.swapaxes(x, 1, 2)) @ x

    def layers(v, x):
        return jax.lax.scan(lambda h, kernel: (jax.nn.relu(h @ kernel), None), x, v)[0]

    def conv(v, x):
        return jax.lax.conv_general_dilated(x, v, (1,), "SAME", feature_group_count=2, dimension_numbers=DIMENSIONS)

    assert wj.count_macs(attention, None, x) == 2 * (2 * 6 * 6 * 4)
    assert wj.count_macs(layers, kernels, x) == 5 * (2 * 6 * 4 * 4)
    assert wj.count_macs(jax.jit(jax.checkpoint(layers)), kernels, x) == 5 * (2 * 6 * 4 * 4)
    assert wj.count_macs(conv, jnp.ones((3, 2, 8)), x) == 2 * 6 * 8 * (3 * 2)
    carried = jax.tree_util.Partial(lambda kernel, v, x: x @ kernel @ v, jnp.ones((4, 4)))
    assert wj.count_macs(carried, jnp.ones((4, 3)), x) == 12 * (4 * 4 + 4 * 3)
    assert wj.count_macs(network, weights(), jnp.ones((1, 12))) == 12 * 8 + 8 * 4


DIMENSIONS = ("NWC", "WIO", "NWC")


def test_multiply_adds_that_the_program_does_not_say():
    x, kernel = jnp.ones((4, 4)), jnp.ones((4, 4))
    sparse = wj.to_bcoo(kernel, np.eye(4, dtype=bool))
    functions = {
        "while": lambda v, x: jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h @ v, x),
        "cond": lambda v, x: jax.lax.cond(jnp.sum(x) > 0, lambda h: h @ v, lambda h: h, x),
    }
    for name, function in functions.items():
        with pytest.raises(ValueError, match=name):
            wj.count_macs(function, kernel, x)
    with pytest.raises(ValueError, match="bcoo_dot_general"):
        wj.count_macs(lambda v, x: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ v, lambda: x), sparse, x)
    bounded = lambda v, x: jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h + 1, x) @ v
    assert wj.count_macs(bounded, kernel, x) == 64


def test_networks_side_by_side(tmp_path):
    dense, small = weights(), weights(sizes=(12, 4, 4))
    masks = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 4 != 0, dense)
    masked = wj.apply_masks(dense, masks)
    sparse = wj.to_bcoo(masked, masks)
    calls = []

    def logged(variables, x):
        jax.debug.callback(lambda _: calls.append(variables["fc1"]["bias"].shape[0]), x[0, 0])
        return network(variables, x)

    variants = {"dense": (logged, dense), "shrunk": (logged, small), "sparse": (network, sparse)}
    results = wj.measure({**variants, "masked": (network, masked)}, jnp.ones((5, 12)), repeats=3, progress=True)
    jax.effects_barrier()
    assert calls == [8, 8, 4, 4, *(8, 4), *(4, 8), *(8, 4)]  # twice to compile, then in turns
    assert [row.name for row in results] == ["dense", "shrunk", "sparse", "masked"]
    assert [row.parameters for row in results] == [136, 68, 104, 136]
    assert [row.nonzero for row in results] == [136, 68, 102, 102]
    assert [row.multiply_adds for row in results] == [5 * 128, 5 * 64, None, 5 * 128]
    for row, variables in zip(results, (dense, small, sparse, masked), strict=True):
        wj.save_arrays(tmp_path / "a", variables)
        assert row.bytes_on_disk == (tmp_path / "a").stat().st_size
        assert 0 < row.latency_low <= row.latency <= row.latency_high
    lines = str(results).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[1].startswith("dense ")
    assert lines[1].endswith(" 1.00")
    assert "–" in lines[3]
    assert "3 interleaved calls on float32[5, 12]" in lines[5]


def test_latency_is_that_of_the_work():
    """A network of 64 times the work takes longer, and so do calls that are not waited for if that is forgotten."""
    kernel, start = {"w": jnp.ones((512, 512)) / 512}, jnp.ones((512, 512))

    def loop(times, v, x):
        return jax.lax.fori_loop(0, times, lambda _, h: h @ v["w"], x)

    few, many = wj.measure({"1": (partial(loop, 1), kernel), "64": (partial(loop, 64), kernel)}, start, repeats=5)
    assert many.latency > 4 * few.latency
    assert many.multiply_adds == 64 * few.multiply_adds == 64 * 512**3


def test_what_a_partial_carries_is_no_constant():
    traced = []

    def scaled(kernel, variables, x):
        traced.append(all(isinstance(leaf, jax.core.Tracer) for leaf in (kernel, variables["scale"], x)))
        return x @ kernel * variables["scale"]

    carrying = jax.tree_util.Partial(scaled, jnp.ones((4, 4)))
    (row,) = wj.measure({"a": (carrying, {"scale": jnp.ones(())})}, jnp.ones((2, 4)), repeats=1)
    assert row.multiply_adds == 32
    assert traced
    assert all(traced)


@pytest.mark.newest
def test_multiply_adds_of_the_literature():
    apply_fn, params = functional(NETWORKS["resnet20-b"](nnx.Rngs(0)))
    assert wj.count_macs(apply_fn, params, jnp.ones((1, 32, 32, 3))) == 40_813_184


def test_measure_asks_for_something_to_measure():
    with pytest.raises(ValueError, match="No variant"):
        wj.measure({}, jnp.ones(1))
    with pytest.raises(ValueError, match="repeats is 0"):
        wj.measure({"a": (network, weights())}, jnp.ones((1, 12)), repeats=0)
