"""Scores and compensation of channels, against dense oracles over hand-written channels."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from structured_cases import arrays, masked

import woodjax as wj

# A residual stream of 3 channels in five kernels, one of them from it to itself, and a hidden layer of 4 in two
# kernels, a scale and a bias.
SHAPES = {
    "entry": (2, 3),
    "hidden": (3, 4),
    "offset": (4,),
    "gain": (4,),
    "merge": (4, 3),
    "mix": (3, 3),
    "output": (3, 2),
}
SIZES = {"entry": 3, "hidden": 4}  # groups, by the first kernel that writes them
WRITERS = {"entry": {"entry": 1, "merge": 1, "mix": 1}, "hidden": {"hidden": 1}}  # leaf and axis
READERS = {"entry": {"hidden": 0, "mix": 0, "output": 0}, "hidden": {"merge": 0}}
OTHERS = {"entry": {}, "hidden": {"offset": 0, "gain": 0}}
INPUTS = np.random.default_rng(7).standard_normal((6, 2)).astype(np.float32)


def network(params, inputs):
    stream = inputs @ params["entry"]
    hidden = jax.nn.relu(stream @ params["hidden"] * params["gain"] + params["offset"])
    stream = stream + hidden @ params["merge"]
    return (stream + stream @ params["mix"]) @ params["output"]


GROUPS = wj.channel_groups(network, jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple)), INPUTS)


def draw(seed, lead=()):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((*lead, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def vector(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def where(channel, *kinds):
    """Coordinates of a channel, by hand."""
    group, index = channel
    marks = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    for kind in kinds:
        for leaf, axis in kind[group].items():
            np.moveaxis(marks[leaf], axis, 0)[index] = True
    return vector(marks).astype(bool)


def channels():
    return [(group, index) for group, size in SIZES.items() for index in range(size)]


def flat(scores):
    assert set(scores) == set(SIZES)
    return np.array([scores[group][index] for group, index in channels()])


def everything(path, leaf):
    return True


def test_groups_are_those_by_hand():
    assert {group.name: group.size for group in GROUPS.groups} == SIZES


@pytest.mark.parametrize("jitted", [False, True])
@given(seed=st.integers(0, 99))
@settings(max_examples=4)
def test_scores_without_curvature(jitted, seed):
    params, other = draw(seed), draw(seed + 1000)
    run = jax.jit if jitted else lambda function: function
    diagonal = jax.tree.map(np.abs, other)
    w, h = vector(params), vector(diagonal)
    written = [where(channel, WRITERS) for channel in channels()]
    read = [where(channel, READERS) for channel in channels()]
    expected = [oracle.hessian_aware_score(w[at], h[at]) for at in written]
    np.testing.assert_allclose(flat(run(lambda p, d: wj.hap_scores(GROUPS, p, d))(params, diagonal)), expected, 1e-5)
    expected = [abs(w[at] @ vector(other)[at]) for at in read]
    found = flat(run(lambda p, g: wj.taylor_channel_scores(GROUPS, p, g))(params, other))
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)
    for relative in (False, True):
        found = flat(run(lambda p, r=relative: wj.l2_channel_scores(GROUPS, p, relative=r))(params))
        expected = [np.linalg.norm(w[at]) / (np.sqrt(at.sum()) if relative else 1) for at in written]
        np.testing.assert_allclose(found, expected, 1e-5)


def test_hap_signs_and_protection():
    params, diagonal = draw(0), jax.tree.map(lambda w: -np.ones_like(w), draw(0))
    diagonal["hidden"][:, 2] = np.inf
    scores = wj.hap_scores(GROUPS, params, diagonal)
    assert scores["hidden"][2] == np.inf
    assert np.all(np.delete(np.asarray(scores["hidden"]), 2) < 0)
    assert np.all(np.asarray(scores["entry"]) < 0)
    params["hidden"][0, 0] = 1e30  # its square leaves the range: not to be taken for protection
    assert np.isnan(wj.hap_scores(GROUPS, params, diagonal)["hidden"][0])


def test_hap_by_random_signs_knows_its_errors():
    """Scores within their errors, and errors those of 2000 probes on the dense Hessian of the kernels."""
    params, labels, probes = draw(3), np.arange(6) % 2, 2000
    loss_fn = wj.cross_entropy(network)
    run = jax.jit(lambda p, key: wj.hap_trace_scores(GROUPS, loss_fn, p, (INPUTS, labels), key, **options))
    options = {"probes": probes, "probes_at_once": 100}
    found = run(params, jax.random.key(0))
    flattened, put = jax.flatten_util.ravel_pytree(params)
    mean = lambda w: jax.vmap(loss_fn, in_axes=(None, 0))(put(w), (jnp.asarray(INPUTS), jnp.asarray(labels))).mean()
    hessian = np.asarray(jax.jit(jax.hessian(mean))(flattened), np.float64)
    probed = np.any([where(channel, WRITERS) for channel in channels()], axis=0)  # the rest adds no variance
    for channel, score, error in zip(channels(), flat(found.scores), flat(found.standard_error), strict=True):
        own = where(channel, WRITERS)
        w = vector(params)[own]
        exact = oracle.hessian_aware_score(w, np.diag(hessian)[own])
        block = np.flatnonzero(own[probed])
        variance = oracle.probe_variance(hessian[np.ix_(probed, probed)], block) / probes
        np.testing.assert_allclose(error, 0.5 * np.sqrt(variance) / own.sum() * (w @ w), rtol=0.15)
        assert abs(score - exact) < 4.5 * error


def test_hap_by_random_signs_stops():
    params, labels = draw(3), np.arange(6) % 2
    arguments = GROUPS, wj.cross_entropy(network), params, (INPUTS, labels), jax.random.key(0)
    stopped = wj.hap_trace_scores(*arguments, probes=40, tolerance=1e3)
    assert int(stopped.probes) == wj.MINIMUM_PROBES
    with pytest.raises(ValueError, match="pass the tree that the groups are of"):
        wj.hap_trace_scores(GROUPS, lambda p, x: p["gain"].sum(), {"gain": params["gain"]}, INPUTS, jax.random.key(0))


@given(seed=st.integers(0, 99))
@settings(max_examples=4)
def test_gate_scores_are_the_gauss_newton_matrix_along_channels(seed):
    params = draw(seed)
    jacobian = jax.jacrev(network)(params, INPUTS)
    rows = np.concatenate([np.asarray(j, np.float64).reshape(6, 2, -1) for j in jax.tree.leaves(jacobian)], axis=-1)
    p = np.asarray(jax.nn.softmax(network(params, INPUTS).astype(jnp.float32)), np.float64)
    hessian = sum(oracle.softmax_fisher(j, q / q.sum()) for j, q in zip(rows, p, strict=True)) / 6
    leaving = np.stack([np.where(where(channel, READERS), vector(params), 0) for channel in channels()])
    expected = [oracle.quadratic(hessian, -t) for t in leaving]
    found = flat(wj.gate_scores(GROUPS, network, params, INPUTS, microbatch_size=4))
    np.testing.assert_allclose(found, expected, 2e-4, 1e-6 * max(expected))
    places = flat(wj.joint_gate_scores(GROUPS, network, params, INPUTS, microbatch_size=4))
    assert sorted(places) == list(range(7))
    gates = leaving @ hessian @ leaving.T
    losses = [oracle.quadratic(gates, -(places <= k).astype(float)) for k in range(7)]
    best = [oracle.quadratic(gates, -(oracle.joint_order(gates) <= k).astype(float)) for k in range(7)]
    np.testing.assert_allclose(losses, best, 1e-3, 1e-5 * max(best))


def test_gates_remove_channels():
    params = draw(1)
    gated, gates = wj.gate_channels(GROUPS, network, params)
    np.testing.assert_allclose(gated(gates, INPUTS), network(params, INPUTS), 1e-6)
    gates["entry"], gates["hidden"] = jnp.array([1.0, 0, 1]), jnp.array([1.0, 1, 0, 1])
    kept = {name: np.asarray(gate) > 0 for name, gate in gates.items()}
    updates = wj.compensate_channels(GROUPS, params, kept, wj.diagonal_fisher(draw(0, (3,)), damping=1.0))
    pruned = jax.tree.map(jnp.add, params, updates)  # a diagonal moves nothing
    np.testing.assert_allclose(gated(gates, INPUTS), network(pruned, INPUTS), 1e-5, 1e-6)


def attention(p, x, gates=None):
    """Queries of 4 channels and values of 5."""
    q, k, v = (x @ p[name] + p[name + "_bias"] for name in ("q", "k", "v"))
    if gates is not None:
        q, v = q * gates["k"], v * gates["v"]
    return jax.nn.softmax(jnp.einsum("nic,njc->nij", q, k)) @ v @ p["head"]


def fused_attention(p, x, gates=None):
    """Queries, keys and values of 4 channels from one kernel."""
    q, k, v = jnp.moveaxis(jnp.einsum("nid,dtc->nitc", x, p["qkv"]) + p["bias"], 2, 0)
    if gates is not None:
        q, v = q * gates["qkv"], v * gates["qkv"]
    return jax.nn.softmax(jnp.einsum("nic,njc->nij", q, k)) @ v @ p["head"]


def tied_embeddings(p, x, gates=None):
    """A stream of 4 channels from an embedding that reads it as well, and a hidden layer of 6."""
    g, hidden = (1, 1) if gates is None else (gates["down"], gates["up"])
    stream = p["table"][x]
    stream = stream + (jax.nn.gelu(stream * g @ p["up"]) * hidden) @ p["down"]
    return stream * g @ p["table"].T


def tied_autoencoder(p, x, gates=None):
    return jax.nn.relu(x @ p["w"]) * (1 if gates is None else gates["w"]) @ p["w"].T


QKV = {"q": (3, 4), "k": (3, 4), "v": (3, 5), "q_bias": (4,), "k_bias": (4,), "v_bias": (5,), "head": (5, 2)}
BY_HAND = {
    "attention": (attention, QKV, np.random.default_rng(1).standard_normal((2, 6, 3)).astype(np.float32)),
    "fused attention": (
        fused_attention,
        {"qkv": (3, 3, 4), "bias": (3, 4), "head": (4, 2)},
        np.random.default_rng(1).standard_normal((2, 6, 3)).astype(np.float32),
    ),
    "tied embeddings": (tied_embeddings, {"table": (11, 4), "up": (4, 6), "down": (6, 4)}, np.arange(8).reshape(2, 4)),
    "tied autoencoder": (tied_autoencoder, {"w": (3, 5)}, np.random.default_rng(1).standard_normal((2, 3))),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("low", [0.0, 0.6])
def test_gates_are_those_by_hand(name, low):
    """Where nothing reads a channel, or the same weights write and read it, it still has one gate."""
    apply_fn, shapes, inputs = BY_HAND[name]
    params = arrays(shapes)
    groups = wj.channel_groups(apply_fn, params, inputs)
    gated, gates = wj.gate_channels(groups, apply_fn, params, inputs)
    rng = np.random.default_rng(3)
    gates = {name: jnp.where(rng.random(g.shape) < 0.5, low, g) for name, g in gates.items()}
    np.testing.assert_allclose(gated(gates, inputs), apply_fn(params, inputs, gates), 1e-4, 1e-5)
    if low == 0:
        kept = {name: np.asarray(g) > 0 for name, g in gates.items()}
        small = masked(wj.make_plan(groups, kept), params)
        np.testing.assert_allclose(gated(gates, inputs), apply_fn(small, inputs), 1e-4, 1e-5)


def test_gate_scores_see_both_uses_of_a_leaf():
    apply_fn, shapes, inputs = BY_HAND["tied autoencoder"]
    params = arrays(shapes)
    groups = wj.channel_groups(apply_fn, params, inputs)
    rows = np.asarray(jax.jacrev(lambda g: apply_fn(params, inputs, {"w": g}))(jnp.ones(5)), np.float64)
    p = np.asarray(jax.nn.softmax(apply_fn(params, inputs)), np.float64)
    fisher = sum(oracle.softmax_fisher(j, q / q.sum()) for j, q in zip(rows, p, strict=True)) / 2
    np.testing.assert_allclose(wj.gate_scores(groups, apply_fn, params, inputs)["w"], np.diag(fisher) / 2, 1e-4, 1e-6)


def dense(name, rows):
    g = np.stack([vector(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(len(rows["output"]))])
    hessian = oracle.fisher(g, 0)
    if name == "whole":
        return hessian
    size = {"diagonal": 1, "blocks": 5}[name]
    blocks, start = [], 0
    for leaf in jax.tree.leaves(rows):
        end = start + leaf[0].size
        blocks += [range(i, min(i + size, end)) for i in range(start, end, size)]
        start = end
    return oracle.blockwise(hessian, blocks)


BUILDERS = {
    "whole": lambda g: wj.low_rank_fisher(g, damping=0.1, select=everything),
    "blocks": lambda g: wj.block_fisher(g, block_size=5, damping=0.1, select=everything),
    "diagonal": lambda g: wj.diagonal_fisher(g, damping=0.1, select=everything),
}


@pytest.mark.parametrize("name", BUILDERS)
@given(seed=st.integers(0, 99))
@settings(max_examples=3)
def test_obs_scores_and_steps(name, seed):
    params, rows = draw(seed), draw(seed + 1, (5,))
    curvature, hessian = BUILDERS[name](rows), dense(name, rows)
    w = vector(params)
    whole = [(where(channel, WRITERS, READERS, OTHERS), where(channel, READERS)) for channel in channels()]
    expected = [oracle.channel_removal(hessian, 0.1, w, *marks)[1] for marks in whole]
    np.testing.assert_allclose(flat(wj.obs_channel_scores(GROUPS, params, curvature)), expected, 2e-3)
    kept = {"entry": np.array([True, False, True]), "hidden": np.array([False, True, True, False])}
    gone = [marks for (group, i), marks in zip(channels(), whole, strict=True) if not kept[group][i]]
    members, readers = (np.any(parts, axis=0) for parts in zip(*gone, strict=True))
    step, _ = oracle.channel_removal(hessian, 0.1, w, members, readers)
    found = vector(wj.compensate_channels(GROUPS, params, kept, curvature))
    np.testing.assert_allclose(found[~members], step[~members], 5e-3, 5e-3 * np.abs(step).max())
    assert np.array_equal(found[members], -w[members])


def test_obs_in_jit_and_with_a_gradient():
    params, rows, mean = draw(2), draw(5, (5,)), draw(6)
    run = jax.jit(lambda p, g, m: wj.obs_channel_scores(GROUPS, p, BUILDERS["whole"](g), gradient=m))
    hessian, w, gradient = dense("whole", rows), vector(params), vector(mean)
    least = -0.5 * gradient @ np.linalg.solve(hessian + 0.1 * np.eye(len(w)), gradient)
    expected = []
    for channel in channels():
        members, readers = where(channel, WRITERS, READERS, OTHERS), where(channel, READERS)
        expected.append(oracle.channel_removal(hessian, 0.1, w, members, readers, gradient)[1] - least)
    np.testing.assert_allclose(flat(run(params, rows, mean)), expected, 2e-3)


def test_obs_holds_fixed_what_the_curvature_does():
    params, rows = draw(2), draw(5, (5,))
    fisher = wj.low_rank_fisher(rows, damping=0.1, select=lambda path, leaf: path != "merge")
    scores = wj.obs_channel_scores(GROUPS, params, fisher)
    assert np.all(np.isposinf(scores["hidden"]))
    assert np.all(np.isfinite(scores["entry"]))
    kept = {"hidden": np.array([False, True, True, True])}
    updates = wj.compensate_channels(GROUPS, params, kept, fisher)
    assert np.array_equal(updates["merge"][0], -params["merge"][0])
    assert not np.any(np.asarray(updates["merge"][1:]))


def test_every_family_of_curvature_answers():
    params, labels = draw(4), np.arange(6) % 2
    stream = wj.stream_gradients(wj.cross_entropy(network), params, (INPUTS, labels))
    rows = wj.row_fisher(stream, damping=0.1)
    scores = wj.obs_channel_scores(GROUPS, params, rows)
    expected = wj.row_fisher(stream, damping=0.1, select=lambda path, leaf: path == "merge")
    one = wj.group_scores(params, expected, wj.Rows())["merge"]  # its readers alone
    one = one - 0.05 * np.sum(params["merge"] ** 2, axis=1)
    np.testing.assert_allclose(scores["hidden"], one, 1e-4, 1e-6)
    with pytest.raises(ValueError, match="KroneckerFisher does not answer"):
        wj.obs_channel_scores(GROUPS, params, wj.kronecker_fisher(stream, select=lambda path, leaf: path == "merge"))


def test_bfloat16_parameters():
    params, rows = draw(4), draw(5, (5,))
    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), small)
    for one in (
        lambda p: wj.l2_channel_scores(GROUPS, p),
        lambda p: wj.hap_scores(GROUPS, p, wide),
        lambda p: wj.obs_channel_scores(GROUPS, p, BUILDERS["whole"](rows)),
    ):
        assert flat(one(small)).dtype == np.float32
        np.testing.assert_allclose(flat(one(small)), flat(one(wide)), 1e-5)


def test_scales_random_and_normalization():
    params = draw(8)
    with pytest.raises(ValueError, match="'entry' has no scale"):
        wj.bn_scale_scores(GROUPS, params)
    names = {
        "a": jnp.ones((1, 2)),
        "norm": {"scale": jnp.array([-2.0, 1.0])},
        "b": jnp.ones((2, 2)),
        "scale": jnp.ones(2),
    }
    groups = wj.channel_groups(
        lambda p, x: (x @ p["a"] * p["norm"]["scale"] * p["scale"]) @ p["b"], names, jnp.ones((1, 1))
    )
    np.testing.assert_allclose(wj.bn_scale_scores(groups, names)["a"], [1.5, 1])
    scores = wj.random_channel_scores(GROUPS, jax.random.key(1))
    assert len(np.unique(flat(scores))) == 7
    scores = {"a": jnp.array([1.0, -3.0, jnp.inf]), "b": jnp.zeros(2)}
    for how, size in (("none", 1), ("mean", 2), ("l2", np.sqrt(5)), ("max", 3)):
        found = wj.normalize_scores(scores, how)
        np.testing.assert_allclose(found["a"], np.array([1, -3, np.inf]) / size, 1e-6)
        assert np.array_equal(found["b"], [0, 0])
    np.testing.assert_allclose(wj.normalize_scores({"a": jnp.array([3e30, 4e30])}, "l2")["a"][0], 6 / np.sqrt(50), 1e-6)
    with pytest.raises(ValueError, match="how is 'sum'"):
        wj.normalize_scores(scores, "sum")


def test_readers_must_be_there():
    params = draw(0)
    some = {name: leaf for name, leaf in params.items() if name != "merge"}
    with pytest.raises(ValueError, match="read group 'hidden' are not in params"):
        wj.taylor_channel_scores(GROUPS, some, some)


CONV = {"one": (3, 3, 1, 3), "scale": (3,), "two": (2, 2, 3, 4), "dense": (16, 5), "out": (5, 2)}
IMAGES = np.random.default_rng(3).standard_normal((5, 7, 7, 1)).astype(np.float32)


def images_to_logits(params, images):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, params["one"], (1, 1), "VALID", dimension_numbers=numbers)
    x = jax.nn.relu(x * params["scale"])
    x = jax.nn.relu(lax.conv_general_dilated(x, params["two"], (2, 2), "VALID", dimension_numbers=numbers))
    return jax.nn.relu(x.reshape(len(x), -1) @ params["dense"]) @ params["out"]


def draw_conv(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in CONV.items()}


CONV_GROUPS = wj.channel_groups(images_to_logits, draw_conv(0), IMAGES)


@given(seed=st.integers(0, 99))
@settings(max_examples=2)
def test_reconstruction_is_least_squares(seed):
    params = draw_conv(seed)
    moments = wj.input_moments(CONV_GROUPS, images_to_logits, params, IMAGES, microbatch_size=3)
    kept = {"one": np.array([True, False, True]), "two": np.array([True, True, False, True])}
    updates = wj.reconstruct_channels(CONV_GROUPS, params, kept, moments, damping=1e-2)
    found = {name: np.asarray(params[name] + updates[name], np.float64) for name in params}

    w = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    first = oracle.patches(IMAGES.astype(np.float64), 3, 1) @ w["one"].reshape(9, 3)
    hidden = np.maximum(first * w["scale"], 0).reshape(5, 5, 5, 3)
    read = oracle.patches(hidden, 2, 2)
    second = np.maximum(read @ w["two"].reshape(12, 4), 0).reshape(5, 16)
    for name, x, lost in (
        ("two", read, np.arange(12) % 3 == 1),
        ("dense", second, np.arange(16) % 4 == 2),  # the channel is every fourth input behind the flattening
    ):
        kernel = w[name].reshape(x.shape[1], -1)
        ridge = 1e-2 * np.mean(np.sum(x**2, axis=0)[~lost])
        best = oracle.reconstruction(x, kernel, lost, ridge).reshape(w[name].shape)
        if name == "two":
            best[..., 2] = 0  # a removed output
        np.testing.assert_allclose(found[name], best, 1e-3, 1e-3 * np.abs(best).max())
    assert not found["one"][..., 1].any()
    assert found["scale"][1] == 0
    np.testing.assert_array_equal(found["out"], params["out"])


def test_reconstruction_moves_nothing_where_nothing_goes():
    params = draw_conv(1)
    moments = wj.input_moments(CONV_GROUPS, images_to_logits, params, IMAGES)
    updates = wj.reconstruct_channels(CONV_GROUPS, params, CONV_GROUPS.all_kept(), moments)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="damping is 0"):
        wj.reconstruct_channels(CONV_GROUPS, params, {}, moments, damping=0)
    with pytest.raises(ValueError, match="moments are of kernels"):
        wj.reconstruct_channels(GROUPS, draw(0), {}, moments)


def test_moments_and_fits_are_finite():
    params, inputs = draw(0), INPUTS.copy()
    inputs[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"Of kernels \['hidden', 'merge', .* the moment is not finite"):
        wj.input_moments(GROUPS, network, params, inputs)
    moments = wj.input_moments(GROUPS, network, params, INPUTS)
    params["merge"][1, 0] = np.inf
    with pytest.raises(ValueError, match=r"Of kernels \['merge'\] the refit is not finite"):
        wj.reconstruct_channels(GROUPS, params, {"hidden": np.arange(4) != 1}, moments)


def test_kernels_in_loops_used_twice_or_changed_have_no_moments():
    params = {
        "entry": jnp.ones((2, 3)),
        "twice": jnp.eye(3),
        "stack": jnp.ones((2, 3, 3)),
        "scaled": jnp.ones((3, 3)),
        "cast": jnp.ones((3, 3)),
        "turned": jnp.ones((2, 3)),
    }

    def apply(params, x):
        x = x @ params["entry"]
        x = x @ params["twice"] @ params["twice"]
        x, _ = lax.scan(lambda h, w: (h @ w, None), x, params["stack"])
        x = (x @ (2 * params["scaled"])).astype(jnp.bfloat16)
        return x @ params["cast"].astype(jnp.bfloat16) @ params["turned"].T.astype(jnp.bfloat16)

    groups = wj.channel_groups(apply, params, jnp.ones((1, 2)))
    moments = wj.input_moments(groups, apply, params, jnp.ones((4, 2))).moments
    assert set(moments) == {"cast"}
    assert moments["cast"].dtype == jnp.float32
