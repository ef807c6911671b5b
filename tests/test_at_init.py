"""Pruning at initialization against dense oracles, and its one call."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from built import built
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import woodjax as wj
from woodjax.adapters import nnx as bridge

KEY = jax.random.key(0)


def network(p, x):
    return jax.nn.relu(x @ p["first"] + p["bias"]) @ p["last"]


LOSS = wj.cross_entropy(network)


def problem(seed=0, n=12, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (6,), "first": (4, 6), "last": (6, 3)}
    params = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    return params, (jnp.asarray(rng.standard_normal((n, 4)), dtype), jnp.asarray(rng.integers(0, 3, n)))


def select_first(path, leaf):
    return path == "first"


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@partial(jax.jit, static_argnames="loss")
def dense(params, batch, loss=LOSS):
    """Per-example gradients and Hessian of the kernel `first` alone, in the precision of the parameters."""
    losses = lambda w: jax.vmap(loss, in_axes=(None, 0))(params | {"first": w.reshape(4, 6)}, batch)
    w = params["first"].ravel()
    return jax.jacrev(losses)(w), jax.hessian(lambda w: losses(w).mean())(w)


NAMES = [
    "grad-norm",
    "snip",
    "grasp",
    "fisher-diagonal",
    "fisher-pruner",
    "fisher-taylor",
    "hessian-diagonal",
    "hessian-pruner",
    "hessian-taylor",
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_scores_are_the_papers(name, seed):
    params, batch = problem(seed, dtype=jnp.float64)
    gradients, hessian = dense(params, batch)
    expected = oracle.init_scores(flat(params["first"]), np.asarray(gradients), np.asarray(hessian))[name]
    criterion = wj.INIT_CRITERIA[name]
    function = network if criterion.asks == "network" else LOSS
    for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-6)):
        low, low_batch = jax.tree.map(partial(_cast, dtype=dtype), (params, batch))
        scores = criterion.scores(function, low, low_batch, KEY, select=select_first, check=True)
        np.testing.assert_allclose(flat(scores["first"]), expected, atol=tolerance * np.abs(expected).max())
        assert np.isposinf(scores["last"]).all()
        assert np.isposinf(scores["bias"]).all()


def _cast(x, dtype):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("name", sorted(set(wj.INIT_CRITERIA) - {"obs"}))
def test_scores_in_jit_and_in_half_precision(name):
    params, batch = problem(1)
    criterion = wj.INIT_CRITERIA[name]
    function = network if criterion.asks == "network" else LOSS
    ask = lambda params, batch: criterion.scores(function, params, batch, KEY, select=wj.is_kernel, check=False)
    scores = ask(params, batch)
    np.testing.assert_allclose(flat(jax.jit(ask)(params, batch)), flat(scores), rtol=1e-4, atol=1e-6)
    half = ask(*jax.tree.map(partial(_cast, dtype=jnp.bfloat16), (params, batch)))
    for found, whole in zip(jax.tree.leaves(half), jax.tree.leaves(scores), strict=True):
        assert found.dtype == jnp.float32
        if np.isfinite(whole).all() and "hutchinson" not in name and name != "random":  # those draw other numbers
            assert np.corrcoef(found.ravel(), whole.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_scores_in_micro_batches_are_those_at_once(name):
    params, batch = problem(1)
    criterion = wj.INIT_CRITERIA[name]
    function = network if criterion.asks == "network" else LOSS
    whole, few = (
        criterion.scores(function, params, batch, KEY, select=wj.is_kernel, microbatch_size=size) for size in (12, 5)
    )
    np.testing.assert_allclose(flat(few), flat(whole), rtol=1e-4, atol=1e-6)


def test_published_hutchinson_is_unbiased_and_signed():
    """Its mean over many keys is the exact diagonal at that temperature; many single draws are negative."""
    params, batch = problem(2, n=4)
    hot = wj.cross_entropy(network, temperature=200.0)
    _, hessian = dense(params, batch, hot)
    draws = [
        wj.hutchinson_scores(hot, params, batch, jax.random.key(i), select=select_first, probes=10)["first"].ravel()
        for i in range(100)
    ]
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / 10
    assert (np.abs(mean - np.diag(hessian)) < 5 * error + 1e-9).all()
    assert 0.1 < (np.asarray(draws) < 0).mean() < 0.6


def test_whole_fisher_scores_are_obs_of_the_dense_inverse():
    params, batch = problem(3)
    gradients, _ = dense(params, batch)
    inverse = np.linalg.inv(oracle.fisher(gradients, 0.1))
    scores = wj.fisher_obs_scores(LOSS, params, batch, damping=0.1, select=select_first)["first"]
    np.testing.assert_allclose(scores.ravel(), flat(params["first"]) ** 2 / (2 * np.diag(inverse)), rtol=1e-4)


def chain(kernels, x):
    for kernel in kernels[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ kernels[-1]


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_synflow_is_the_share_of_all_paths(seed):
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (4, 2), (2, 3))]
    scores = wj.synflow_scores(chain, kernels, np.zeros((5, 3), np.float32))
    for found, expected in zip(scores, oracle.path_shares(kernels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e9, 1e-6])
def test_synflow_of_a_network_whose_flow_no_float_holds(size):
    """Six layers, R about 1e57 at the most: shares do not depend on the size of the weights."""
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((4, 4)).astype(np.float32) for _ in range(6)]
    expected = wj.synflow_scores(chain, kernels, np.ones((1, 4), np.float32))
    found = wj.synflow_scores(chain, [np.float32(size) * kernel for kernel in kernels], np.ones((1, 4), np.float32))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-4)


def test_synflow_never_shrinks_the_input_of_a_network_with_biases():
    """It would hide the first layers beside the biases: R of about 1e18 is right, of 1e36 refused."""
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.uniform(1, 2, (4, 4)), jnp.float32) for _ in range(6)]
    biased = lambda p, x: chain(p[2:], jax.nn.relu(x @ p[1] + p[0]))
    params, ones = [jnp.ones(4), *(1e2 * kernel for kernel in kernels)], jnp.ones((1, 4))
    flow, gradient = jax.value_and_grad(lambda p: biased(p, ones).sum())(params)
    shares = wj.synflow_scores(biased, params, ones)
    for found, w, g in zip(shares[1:], params[1:], gradient[1:], strict=True):
        np.testing.assert_allclose(found, w * g / flow, rtol=1e-4)
    large = [params[0], *(1e3 * kernel for kernel in params[1:])]
    with pytest.raises(ValueError, match="does not fit into float32"):
        wj.synflow_scores(biased, large, ones)
    assert np.isnan(jax.jit(partial(wj.synflow_scores, biased, check=False))(large, ones)[1]).all()


def deep(seed, layers=6, width=32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((width, width)) / np.sqrt(width), jnp.float32) for _ in range(layers)]


def test_rounds_keep_every_layer_alive_where_one_shot_does_not():
    """SynFlow's theorem: with enough rounds no layer empties before the critical compression."""
    kernels = deep(0)
    kernels[2] = 0.1 * kernels[2]  # magnitude empties it
    batch = jnp.ones((4, 32)), jnp.zeros(4, int)
    collapsed = {}
    for criterion in ("synflow", "magnitude"):
        masks, info = wj.prune_at_init(chain, kernels, batch, 0.98, KEY, criterion=criterion)
        collapsed[criterion] = info.report.collapsed_layers
        assert sum(int((~mask).sum()) for mask in masks) == oracle.rounded(0.98, 5 * 1024)
        assert masks[-1].all()
    assert collapsed == {"synflow": [], "magnitude": ["2"]}


def test_a_floor_holds_every_layer():
    kernels = deep(0)
    kernels[2] = 0.01 * kernels[2]
    batch = jnp.ones((4, 32)), jnp.zeros(4, int)
    _, info = wj.prune_at_init(chain, kernels, batch, 0.9, KEY, criterion="magnitude", floor=0.05)
    assert float(info.report.lowest_density) == pytest.approx(52 / 1024)
    assert float(info.report.sparsity) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.9995, 1.0])
def test_rounds_to_the_end_and_past_the_last_path(sparsity):
    call = partial(wj.prune_at_init, chain, rounds=20)
    arguments = deep(4), (jnp.ones((4, 32)), jnp.zeros(4, int)), sparsity, KEY
    masks, info = call(*arguments)
    assert sum(int((~mask).sum()) for mask in masks) == oracle.rounded(sparsity, 5 * 1024)
    jitted, jitted_info = jax.jit(call)(*arguments)
    assert sum(int((~mask).sum()) for mask in jitted) == oracle.rounded(sparsity, 5 * 1024)
    assert int(info.nonfinite) == int(jitted_info.nonfinite) == 0


@pytest.mark.parametrize(("criterion", "rounds"), [("snip", 1), ("snip", 5), ("synflow", 5)])
def test_rounds_follow_the_density_and_are_the_same_in_jit(criterion, rounds):
    kernels, seen = deep(1), []
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.standard_normal((6, 32)), jnp.float32), jnp.asarray(rng.integers(0, 32, 6))
    call = partial(wj.prune_at_init, chain, criterion=criterion, rounds=rounds)
    masks, info = call(kernels, batch, 0.9, KEY, on_round=lambda number, masks: seen.append((number, masks)))
    kept = [sum(int(mask.sum()) for mask in masks[:-1]) for _, masks in seen]
    assert [number for number, _ in seen] == list(range(1, rounds + 1))
    np.testing.assert_allclose(kept, [5120 * 0.1 ** (r / rounds) for r in range(1, rounds + 1)], atol=1)
    for (_, earlier), (_, later) in pairwise(seen):
        assert all((e | ~x).all() for e, x in zip(earlier, later, strict=True))
    jitted, jitted_info = jax.jit(call)(kernels, batch, 0.9, KEY)
    for mask, other in zip(masks, jitted, strict=True):
        np.testing.assert_array_equal(mask, other)
    assert int(info.nonfinite) == int(jitted_info.nonfinite) == 0


def test_a_criterion_of_ones_own():
    kernels = deep(2)
    largest = lambda loss_fn, params, batch, key, *, select, check: jax.tree.map(jnp.abs, params)  # of every leaf
    masks, info = wj.prune_at_init(
        chain,
        kernels,
        (jnp.ones((1, 32)), jnp.zeros(1, int)),
        0.5,
        KEY,
        criterion=wj.InitCriterion("own", largest),
        select=lambda path, leaf: path == "0",
    )
    expected = oracle.lowest(np.abs(flat(kernels[0])), 512).reshape(32, 32)
    np.testing.assert_array_equal(~masks[0], expected)
    assert float(info.report.sparsity) == 0.5
    assert all(mask.all() for mask in masks[1:])


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_effective_masks_are_those_on_a_path(seed):
    rng = np.random.default_rng(seed)
    kernels = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 6), (6, 6), (6, 4))]
    masks = [jnp.asarray(rng.random(kernel.shape) < 0.3) for kernel in kernels]
    found = wj.effective_masks(chain, kernels, masks, jnp.ones((1, 5)))
    for mask, expected in zip(found, oracle.on_a_path(masks), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_flow_that_no_float_holds_is_refused():
    """Forty layers, each of which multiplies by twenty."""
    kernels = deep(5, layers=40, width=8)
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), kernels)
    steep = lambda p, x: chain([20 * kernel for kernel in p], x)
    with pytest.raises(ValueError, match="overflows"):
        wj.effective_masks(steep, kernels, masks, jnp.ones((1, 8)))


def test_a_loss_made_again_is_the_same_to_jit():
    assert wj.cross_entropy(network) == wj.cross_entropy(network)
    assert hash(wj.cross_entropy(network)) == hash(wj.cross_entropy(network))
    assert wj.cross_entropy(network) != wj.cross_entropy(network, temperature=2.0)


def test_every_position_of_a_max_pooling_window_counts():
    """A 3×3 kernel on 2×2 maps before a pooling: each corner of it is used at one position alone."""

    def pooled(p, x):
        y = jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(y).max((1, 2)) @ p["b"]

    params = {"a": jnp.ones((3, 3, 2, 8)), "b": jnp.ones((8, 3))}
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["b"] = masks["b"].at[3:].set(False)
    found = wj.effective_masks(pooled, params, masks, jnp.ones((1, 2, 2, 2)))
    assert found["a"][..., :3].all()
    assert found["a"][..., 3:].sum() <= 0.02 * masks["a"][..., 3:].sum()  # up to chance


def test_biases_are_no_path():
    params, batch = problem(4)
    params["bias"] = jnp.full(6, 3.0)
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["first"] = masks["first"].at[:, 2].set(False)  # unit 2 has only its bias
    found = wj.effective_masks(network, params, masks, batch)
    assert found["last"].sum() == 15
    assert not found["last"][2].any()
    assert found["bias"].all()


def test_a_network_that_lets_no_flow_through_is_refused():
    centred = lambda p, x: (x @ p) - (x @ p).mean(axis=1, keepdims=True)
    with pytest.raises(ValueError, match="No flow goes through leaf ''"):
        wj.effective_masks(centred, jnp.ones((3, 4)), jnp.ones((3, 4), bool), jnp.ones((2, 3)))


def test_report_of_stacked_layers():
    masks = {"scan": jnp.stack([jnp.zeros((2, 2), bool), jnp.eye(2, dtype=bool)]), "bias": jnp.zeros(3, bool)}
    report = jax.jit(partial(wj.layer_collapse_report, batch_axes=1))(masks)
    assert report.density["scan"].tolist() == [0.0, 0.5]
    assert int(report.collapsed) == 1
    assert float(report.lowest_density) == 0
    assert float(report.sparsity) == 0.75
    assert report.collapsed_layers == ["scan"]


def test_shuffled_masks_keep_the_budget_and_nothing_else():
    kernels = deep(3)
    masks = wj.make_masks(wj.magnitude_scores(kernels), 0.9)
    shuffled = wj.shuffle_masks(masks, KEY)
    for mask, other in zip(masks, shuffled, strict=True):
        assert mask.sum() == other.sum()
        overlap, chance = float((mask & other).sum()), float(mask.sum()) ** 2 / mask.size
        assert overlap < chance + 5 * np.sqrt(chance)


def test_what_cannot_be_is_refused():
    params, batch = problem()
    prune = partial(wj.prune_at_init, network, params, batch)
    with pytest.raises(ValueError, match="criterion is 'snap': choose one of"):
        prune(0.5, KEY, criterion="snap")
    with pytest.raises(ValueError, match="rounds is 0"):
        prune(0.5, KEY, rounds=0)
    with pytest.raises(ValueError, match="sparsity"):
        prune(1.5, KEY)
    with pytest.raises(ValueError, match="Labels from 0 to 7, and 3 logits"):
        wj.prune_at_init(network, params, (batch[0], jnp.arange(12) % 8), 0.5, KEY, criterion="snip")
    with pytest.raises(ValueError, match=r"Labels are float32\[12\]"):
        wj.prune_at_init(network, params, (batch[0], jnp.ones(12)), 0.5, KEY, criterion="snip")
    with pytest.raises(ValueError, match="no labels"):
        wj.prune_at_init(network, params, batch[0], 0.5, KEY, criterion="snip")
    with pytest.raises(ValueError, match="form is 'square'"):
        wj.fisher_scores(LOSS, params, batch, form="square")
    with pytest.raises(ValueError, match="needs the gradient of the loss"):
        wj.gauss_newton_scores(network, params, batch[0], form="taylor")
    with pytest.raises(ValueError, match="temperature is 0"):
        wj.cross_entropy(network, temperature=0)
    with pytest.raises(ValueError, match="'bias'"):
        wj.snip_scores(LOSS, params | {"bias": jnp.ones(6, int)}, batch)
    broken = params | {"last": params["last"].at[0, 0].set(jnp.nan)}
    noisy = lambda p, x: network(p, x) + jax.random.normal(KEY, (len(x), 3))
    with pytest.raises(ValueError, match="NaN"):
        wj.prune_at_init(network, broken, batch, 0.5, KEY, criterion="snip")
    with pytest.raises(ValueError, match="random"):
        wj.prune_at_init(noisy, params, batch, 0.5, KEY, select=wj.is_kernel)


class Residual(nnx.Module):
    """A convolution, a block of two with batch normalisation and a shortcut, and a classifier."""

    def __init__(self, rngs):
        self.stem, self.one, self.two = (nnx.Conv(n, 4, (3, 3), rngs=rngs) for n in (3, 4, 4))
        self.after_stem, self.after_one, self.after_two = (nnx.BatchNorm(4, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.after_stem(self.stem(x)))
        y = self.after_two(self.two(jax.nn.relu(self.after_one(self.one(x)))))
        return self.head(jax.nn.relu(x + y).mean((1, 2)))


def test_a_residual_network_with_batch_statistics():
    """Warm statistics change what data sees, not the flow without data; hidden kernels alone are pruned."""
    model = built(Residual)
    model.eval()
    cold, params = bridge.functional(model)
    rng = np.random.default_rng(0)
    batch = jnp.asarray(3 + rng.standard_normal((10, 6, 6, 3)), jnp.float32), jnp.arange(10) % 5
    bridge.warm_up_batch_stats(model, [batch[0]])
    warm, _ = bridge.functional(model)
    shares = wj.synflow_scores(cold, params, batch)
    np.testing.assert_allclose(shares["stem"]["kernel"].sum(), 1, rtol=1e-5)  # all flow goes through it
    assert 0.5 < shares["two"]["kernel"].sum() < 0.999  # some goes round
    for name in ("snip", "hutchinson-diagonal"):
        kept = {}
        for apply_fn in (cold, warm):
            masks, info = wj.prune_at_init(apply_fn, params, batch, 0.75, KEY, criterion=name)
            assert set(info.report.density) == {"stem/kernel", "one/kernel", "two/kernel"}
            assert float(info.report.sparsity) == pytest.approx(0.75, abs=1e-3)
            kept[apply_fn is warm] = np.concatenate([np.ravel(masks[n]["kernel"]) for n in ("stem", "one", "two")])
        assert (kept[True] != kept[False]).any()
        assert wj.effective_masks(cold, params, masks, batch)["head"]["kernel"].all()
