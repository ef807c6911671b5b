"""Groups of weights: exact joint costs, N:M against all subsets, masks that follow a pattern."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj
from woodjax import linalg

DAMPING = 0.1
SHAPES = {"bias": (3,), "conv": (1, 2, 4, 2), "fc": (4, 3)}  # 16 + 12 prunable
D = 28
PATTERNS = {
    "2:4": wj.NM(2, 4),
    "1:2": wj.NM(1, 2),
    "blocks of 4": wj.Block(),
    "blocks of 2 inputs": wj.Block(2),
    "rows": wj.Rows(),
    "filters": wj.Filters(),
}
UNITS = [[2 * i + o for i in range(8)] for o in range(2)] + [[16 + 3 * i + o for i in range(4)] for o in range(3)]
BUILDERS = {
    "low rank": (wj.low_rank_fisher, [range(D)]),
    "blocks": (lambda g, **k: wj.block_fisher(g, block_size=5, **k), None),
    "diagonal": (wj.diagonal_fisher, [[i] for i in range(D)]),
    "rows": (None, UNITS),
}
BUILDERS["blocks"] = (
    BUILDERS["blocks"][0],
    [range(5), range(5, 10), range(10, 15), range(15, 16), range(16, 21), range(21, 26), range(26, 28)],
)


def linear_loss(params, example):
    """Its gradient is the example itself."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, example)))


def draw(rng, lead=()):
    return {name: rng.standard_normal((*lead, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def vector(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).reshape(-1) for name in ("conv", "fc")])


def build(name, gradients, damping=DAMPING):
    if name != "rows":
        return BUILDERS[name][0](gradients, damping=damping)
    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), gradients)
    return wj.row_fisher(wj.stream_gradients(linear_loss, params, gradients), damping=damping)


def dense(name, gradients):
    m = len(gradients["bias"])
    rows = np.stack([vector(jax.tree.map(lambda g, i=i: g[i], gradients)) for i in range(m)])
    return oracle.blockwise(oracle.fisher(rows, DAMPING), [list(block) for block in BUILDERS[name][1]])


def groups_by_hand(name, shape):
    """From the meaning of the pattern, weight by weight."""
    pattern, members = PATTERNS[name], {}
    for flat, index in enumerate(np.ndindex(shape)):
        rest, i, o = index[:-2], index[-2], index[-1]
        if isinstance(pattern, wj.Rows):
            key = (i,)
        elif isinstance(pattern, wj.Filters):
            key = (o,)
        else:
            key = (*rest, i // (pattern.m if isinstance(pattern, wj.NM) else pattern.size), o)
        members.setdefault(key, []).append(flat)
    return {key: members[key] for key in sorted(members)}


def removal_cost(hessian, weights, members, gradient=None):
    pruned = np.isin(np.arange(len(weights)), members)
    step = oracle.constrained_minimiser(hessian, weights, pruned, gradient)
    return oracle.quadratic(hessian, step, gradient)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", [(4, 3), (8, 1), (1, 2, 4, 2)])
def test_indices_are_the_groups(name, shape):
    found = PATTERNS[name].indices(shape)
    assert sorted(map(sorted, found.tolist())) == sorted(groups_by_hand(name, shape).values())
    assert sorted(found.ravel()) == list(range(np.prod(shape)))
    assert hash(PATTERNS[name]) == hash(type(PATTERNS[name])(**vars(PATTERNS[name])))


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=2)
@given(seed=st.integers(0, 1000))
def test_costs_are_those_of_the_dense_minimiser(name, seed):
    rng = np.random.default_rng(seed)
    gradients, params, mean = draw(rng, (6,)), draw(rng), draw(rng)
    hessian, weights, first = dense(name, gradients), vector(params), vector(mean)
    newton = np.linalg.solve(hessian, first)
    curvature = build(name, gradients)
    for pattern in (wj.Block(), wj.Rows(), wj.Filters()):
        plain = wj.group_scores(params, curvature, pattern)
        shifted = wj.group_scores(params, curvature, pattern, gradient=mean)  # the same program
        assert plain["bias"].shape == (0,)
        for leaf, start in (("conv", 0), ("fc", 16)):
            at = pattern.indices(SHAPES[leaf]) + start
            expected = [removal_cost(hessian, weights, q) for q in at]
            np.testing.assert_allclose(plain[leaf], expected, rtol=2e-3)
            expected = [removal_cost(hessian, weights, q, first) + 0.5 * first @ newton for q in at]
            np.testing.assert_allclose(shifted[leaf], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("m", [3, 60])
def test_groups_of_more_than_a_few_weights(m):
    """Filters of 40 weights: fewer and more than the gradients, several at a time and one leaf after another."""
    rng = np.random.default_rng(0)
    gradients = {name: rng.standard_normal((m, 40, 3)).astype(np.float32) for name in "ab"}
    params = {name: rng.standard_normal((40, 3)).astype(np.float32) for name in "ab"}
    rows = np.concatenate([gradients[name].reshape(m, -1) for name in "ab"], axis=1)
    weights = np.concatenate([params[name].reshape(-1) for name in "ab"]).astype(np.float64)
    hessian = oracle.fisher(rows, DAMPING)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    found = wj.group_scores(params, fisher, wj.Filters())
    at = wj.Filters().indices((40, 3))
    for i, name in enumerate("ab"):
        expected = [removal_cost(hessian, weights, q + 120 * i) for q in at]
        np.testing.assert_allclose(found[name], expected, rtol=1e-3)
    inverse = np.linalg.inv(hessian)
    submatrices = fisher.group_inverse({"a": np.zeros((0, 0), np.int32), "b": at})
    assert submatrices["a"].shape == (0, 0, 0)
    expected = np.stack([inverse[np.ix_(q + 120, q + 120)] for q in at])
    np.testing.assert_allclose(submatrices["b"], expected, atol=1e-4 * np.abs(expected).max())


def test_many_groups_in_several_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    gradients = {"w": rng.standard_normal((6, 14, 2)).astype(np.float32)}  # shapes of this test alone
    params = {"w": rng.standard_normal((14, 2)).astype(np.float32)}
    monkeypatch.setattr(linalg, "COLUMN_WINDOW", 6)  # three groups of fourteen at a time
    monkeypatch.setattr("woodjax.groups.SUBSET_BYTES", 120)  # five
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    hessian, weights = oracle.fisher(gradients["w"].reshape(6, -1), DAMPING), params["w"].reshape(-1).astype(float)
    found = wj.group_scores(params, fisher, wj.Block(2))["w"]
    kept = np.asarray(wj.pattern_masks(params, fisher, wj.NM(1, 2))["w"]).reshape(-1)
    for q, cost in zip(wj.Block(2).indices((14, 2)), found, strict=True):
        np.testing.assert_allclose(cost, removal_cost(hessian, weights, q), rtol=1e-3)
        cheaper = min(q, key=lambda i: removal_cost(hessian, weights, [i]))
        np.testing.assert_array_equal(kept[q], q != cheaper)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=2)
@given(seed=st.integers(0, 1000))
def test_nm_is_the_best_of_all_subsets(name, seed):
    rng = np.random.default_rng(seed)
    gradients, params = draw(rng, (6,)), draw(rng)
    hessian, weights = dense(name, gradients), vector(params)
    curvature = build(name, gradients)
    for pattern in (wj.NM(2, 4), wj.NM(1, 4)):
        masks = wj.pattern_masks(params, curvature, pattern)
        assert masks["bias"].all()
        flat = vector(masks).astype(bool)
        for at in (pattern.indices(SHAPES["conv"]), pattern.indices(SHAPES["fc"]) + 16):
            for q in at:
                costs = {c: removal_cost(hessian, weights, c) for c in combinations(q.tolist(), pattern.m - pattern.n)}
                chosen = tuple(i for i in q.tolist() if not flat[i])
                assert costs[chosen] <= min(costs.values()) * (1 + 1e-3)


def test_four_of_eight_beats_greedy_and_the_score_is_the_cost():
    rng = np.random.default_rng(3)
    gradients = {"w": rng.standard_normal((8, 32, 2)).astype(np.float32)}
    params = {"w": rng.standard_normal((32, 2)).astype(np.float32)}
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    hessian = oracle.fisher(gradients["w"].reshape(8, -1), DAMPING)
    scores = wj.group_scores(params, fisher, wj.NM(4, 8))["w"]
    flat = np.asarray(wj.pattern_masks(params, fisher, wj.NM(4, 8))["w"]).reshape(-1)
    for q, score in zip(wj.NM(4, 8).indices((32, 2)), scores, strict=True):
        costs = [removal_cost(hessian, params["w"].reshape(-1).astype(float), c) for c in combinations(q, 4)]
        found = removal_cost(hessian, params["w"].reshape(-1).astype(float), q[~flat[q]])
        np.testing.assert_allclose(found, min(costs), rtol=1e-3)
        np.testing.assert_allclose(score, min(costs), rtol=2e-3)


def greedy_by_hand(hessian, weights, q, count):
    """ExactOBS on the group: remove the cheapest, move the others, again."""
    inverse = np.linalg.inv(hessian)[np.ix_(q, q)]
    weights, left, total = weights[q].copy(), list(range(len(q))), 0.0
    for _ in range(count):
        costs = {i: weights[i] ** 2 / (2 * inverse[i, i]) for i in left}
        best = min(costs, key=costs.get)
        total += costs[best]
        weights = weights - inverse[:, best] / inverse[best, best] * weights[best]
        inverse = inverse - np.outer(inverse[:, best], inverse[best]) / inverse[best, best]
        left.remove(best)
    return [q[i] for i in left], total


def test_eight_of_sixteen_is_greedy():
    rng = np.random.default_rng(1)
    gradients = {"w": rng.standard_normal((8, 32, 2)).astype(np.float32)}
    params = {"w": rng.standard_normal((32, 2)).astype(np.float32)}
    fisher = wj.low_rank_fisher(gradients, damping=1.0)
    hessian = oracle.fisher(gradients["w"].reshape(8, -1), 1.0)
    flat = np.asarray(wj.pattern_masks(params, fisher, wj.NM(8, 16))["w"]).reshape(-1)
    scores = wj.group_scores(params, fisher, wj.NM(8, 16))["w"]
    for q, score in zip(wj.NM(8, 16).indices((32, 2)), scores, strict=True):
        kept, total = greedy_by_hand(hessian, params["w"].reshape(-1).astype(float), q, 8)
        assert sorted(q[flat[q]]) == sorted(kept)
        np.testing.assert_allclose(score, total, rtol=1e-3)
        np.testing.assert_allclose(
            removal_cost(hessian, params["w"].reshape(-1).astype(float), q[~flat[q]]), total, rtol=1e-6
        )


def test_pruned_before_goes_first_in_its_group():
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((32, 2)).astype(np.float32)}
    previous = {"w": rng.random((32, 2)) < 0.6}
    params = wj.apply_masks(params, previous)
    gradients = wj.apply_masks({"w": rng.standard_normal((8, 32, 2)).astype(np.float32)}, previous)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    for pattern in (wj.NM(4, 8), wj.NM(8, 16)):
        masks = np.asarray(wj.pattern_masks(params, fisher, pattern, previous=previous)["w"])
        assert not (masks & ~previous["w"]).any()
        at = pattern.indices((32, 2))
        before, after = previous["w"].reshape(-1)[at].sum(1), masks.reshape(-1)[at].sum(1)
        np.testing.assert_array_equal(after, np.minimum(before, pattern.n))


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_blocks_are_counted_exactly(scope):
    rng = np.random.default_rng(0)
    gradients, params = draw(rng, (6,)), draw(rng)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    scores = wj.group_scores(params, fisher, wj.Block(2))
    masks = wj.pattern_masks(params, fisher, wj.Block(2), 0.6, scope=scope)
    ranked = [scores["conv"], scores["fc"]] if scope == "leaf" else [np.concatenate([scores["conv"], scores["fc"]])]
    expected = np.concatenate([~oracle.lowest(s, oracle.rounded(0.6, len(s))) for s in map(np.asarray, ranked)])
    groups = np.concatenate([wj.Block(2).indices(SHAPES["conv"]), wj.Block(2).indices(SHAPES["fc"]) + 16])
    np.testing.assert_array_equal(vector(masks).astype(bool)[groups], np.repeat(expected[:, None], 2, axis=1))
    assert masks["bias"].all()
    under_jit = jax.jit(lambda s: wj.pattern_masks(params, fisher, wj.Block(2), s, scope=scope))(0.6)
    np.testing.assert_array_equal(vector(under_jit), vector(masks))


@given(sparsity=st.floats(0, 1))
def test_groups_of_two_sizes_are_ranked_per_weight(sparsity):
    rng = np.random.default_rng(5)
    params = {"a": rng.standard_normal((2, 6)).astype(np.float32), "b": rng.standard_normal((5, 4)).astype(np.float32)}
    gradients = {"a": np.ones((1, 2, 6), np.float32), "b": np.ones((1, 5, 4), np.float32)}
    fisher = wj.diagonal_fisher(gradients, damping=1.0)
    masks = wj.pattern_masks(params, fisher, wj.Filters(), sparsity)
    per_weight = np.concatenate([(params[name] ** 2).mean(0) for name in "ab"])
    sizes = np.repeat([2, 5], [6, 4])
    order = np.argsort(per_weight, kind="stable")
    held = np.concatenate([[0], np.cumsum(sizes[order])])
    gone = order[: np.searchsorted(held, oracle.rounded(sparsity, 32))]
    expected = ~np.isin(np.arange(10), gone)
    np.testing.assert_array_equal(np.concatenate([masks["a"][0], masks["b"][0]]), expected)
    assert (masks["a"] == masks["a"][:1]).all()
    assert (masks["b"] == masks["b"][:1]).all()


def test_masks_of_groups_are_nested_and_no_layer_is_lost():
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((2, 6)).astype(np.float32), "b": 1e-3 * np.ones((5, 4), np.float32)}
    gradients = {"a": np.ones((1, 2, 6), np.float32), "b": np.ones((1, 5, 4), np.float32)}
    fisher = wj.diagonal_fisher(gradients, damping=1.0)
    first = wj.pattern_masks(params, fisher, wj.Filters(), 0.3, floor=0.25)
    assert np.asarray(first["b"]).sum() == 10  # two filters, ten weights of 9.6, are gone
    second = wj.pattern_masks(
        {"a": -params["a"], "b": 1e3 * params["b"]}, fisher, wj.Filters(), 0.5, floor=0.25, previous=first
    )
    assert not (np.asarray(second["b"]) & ~np.asarray(first["b"])).any()
    assert np.asarray(wj.pattern_masks(params, fisher, wj.Filters(), 0.6)["b"]).sum() == 0
    floored = wj.pattern_masks(params, fisher, wj.Filters(), 0.6, floor=0.25)
    assert [int(np.asarray(floored[name]).sum()) for name in "ab"] == [8, 5]  # 15 of b and 4 of a are 19
    with pytest.raises(ValueError, match="leaves 23 weights to prune where the sparsity asks for 29"):
        wj.pattern_masks(params, fisher, wj.Filters(), 0.9, floor=0.25)


def test_stacked_layers_are_separate():
    rng = np.random.default_rng(0)
    gradients = {"w": rng.standard_normal((6, 2, 4, 3)).astype(np.float32)}
    params = {"w": rng.standard_normal((2, 4, 3)).astype(np.float32)}
    fisher = wj.block_fisher(gradients, block_size=5, damping=DAMPING, batch_axes=1)  # two of padding a layer
    found = wj.group_scores(params, fisher, wj.Filters(), batch_axes=1)["w"]
    filters = np.asarray(wj.pattern_masks(params, fisher, wj.Filters(), 0.4, scope="leaf", batch_axes=1)["w"])
    assert filters.all(1).sum() == (~filters).all(1).sum() * 2 == 4  # one of three goes in each layer
    pairs = wj.pattern_masks(params, fisher, wj.NM(2, 4), batch_axes=1)["w"]
    assert (pairs.sum(1) == 2).all()
    for layer in range(2):
        rows, weights = gradients["w"][:, layer].reshape(6, 12), params["w"][layer].reshape(12).astype(float)
        hessian = oracle.blockwise(oracle.fisher(rows, DAMPING), [range(5), range(5, 10), range(10, 12)])
        expected = [removal_cost(hessian, weights, q) for q in wj.Filters().indices((4, 3))]
        np.testing.assert_allclose(found[layer], expected, rtol=1e-3)
        np.testing.assert_array_equal(np.argmin(found[layer]), np.flatnonzero(~filters[layer].any(0))[0])


def test_a_group_lost_to_rounding_is_bounded():
    """Twins with a tiny damping: `1 − ΣZ²` has no digits left, the cost is still positive and bounded."""
    rng = np.random.default_rng(0)
    column = rng.standard_normal((30, 1)).astype(np.float32)
    gradients = {"w": np.concatenate([column] * 3 + [rng.standard_normal((30, 5)).astype(np.float32)], axis=1)}
    gradients = {"w": 100 * gradients["w"][:, :, None]}
    fisher = wj.low_rank_fisher(gradients, damping=1e-3)
    params = {"w": np.ones((8, 1), np.float32)}
    costs = np.asarray(wj.group_scores(params, fisher, wj.Block(4))["w"])
    rows = gradients["w"][:, :, 0].astype(np.float64)
    for i, q in enumerate((slice(0, 4), slice(4, 8))):
        together = rows[:, q]
        alone = 0.5 * (4e-3 + ((together @ np.ones(4)) ** 2).mean())
        assert 0 < costs[i] <= 8 * alone  # q times more where correlations are lost: they were positive
    masks = wj.pattern_masks(params, fisher, wj.NM(2, 4))
    assert np.asarray(masks["w"]).sum() == 4


def test_narrow_weights():
    rng = np.random.default_rng(0)
    gradients = draw(rng, (6,))
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), draw(rng))
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    found, expected = (wj.group_scores(p, fisher, wj.Filters()) for p in (params, wide))
    assert found["fc"].dtype == jnp.float32
    np.testing.assert_allclose(found["fc"], expected["fc"], rtol=1e-5)


def test_broken_groups_are_refused():
    rng = np.random.default_rng(0)
    gradients, params = draw(rng, (3,)), draw(rng)
    gradients["fc"][0, 0, 0] = 1e25  # overflows when squared
    fisher = wj.low_rank_fisher(gradients, damping=DAMPING)
    for pattern, sparsity in ((wj.Filters(), 0.5), (wj.NM(2, 4), None)):
        assert np.isnan(wj.group_scores(params, fisher, pattern)["fc"]).any()
        with pytest.raises(ValueError, match="NaN"):
            wj.pattern_masks(params, fisher, pattern, sparsity)


def test_bad_requests():
    rng = np.random.default_rng(0)
    gradients, params = draw(rng, (3,)), draw(rng)
    fisher = wj.diagonal_fisher(gradients)
    for make, message in (
        (lambda: wj.NM(4, 4), r"1 <= n < m"),
        (lambda: wj.Block(0), "at least 1 weight"),
        (lambda: wj.Block(4, axis=0), "input axis or -1"),
        (lambda: wj.NM(1, 2).indices((4,)), r"has no axis -2"),
        (lambda: wj.group_scores(params, fisher, wj.NM(1, 3)), r"Leaf 'conv': axis -2 of shape .* no multiple of 3"),
        (lambda: wj.pattern_masks(params, fisher, wj.NM(2, 4), 0.5), "leave both out"),
        (lambda: wj.pattern_masks(params, fisher, wj.Rows()), "needs the fraction"),
        (lambda: wj.pattern_masks(params, fisher, wj.Rows(), 1.5), r"sparsity is 1\.5"),
        (lambda: wj.pattern_masks(params, fisher, wj.Rows(), 0.5, scope="erdos_renyi"), "choose 'global' or 'leaf'"),
        (lambda: wj.pattern_masks(params, fisher, wj.Rows(), {"v": 0.5}), "matches no leaf"),
        (lambda: wj.group_scores(params, fisher, wj.Rows(), gradient={"w": 1}), "gradient has the structure"),
        (lambda: wj.group_scores(draw(rng, (2,)), fisher, wj.Rows()), "params: leaf .bias. has shape"),
        (
            lambda: wj.group_scores(params, wj.low_rank_fisher(gradients, block_size=4), wj.Rows()),
            "build it with block_size=None",
        ),
        (
            lambda: wj.group_scores(
                params,
                wj.streamed_fisher(
                    wj.stream_gradients(linear_loss, jax.tree.map(jnp.asarray, params), gradients), window_size=9
                ),
                wj.Rows(),
            ),
            "StreamedFisher does not answer for groups",
        ),
        (
            lambda: wj.expand_group_masks(
                {"bias": jnp.ones(0, bool), "conv": jnp.ones(3, bool), "fc": jnp.ones(3, bool)}, params, wj.Filters()
            ),
            "leaf 'conv' has 3 groups, expected 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_mapping_and_its_rest():
    rng = np.random.default_rng(0)
    gradients, params = draw(rng, (3,)), draw(rng)
    masks = wj.pattern_masks(params, wj.diagonal_fisher(gradients), wj.Filters(), {"fc": 0.4})
    assert np.asarray(masks["conv"]).all()
    assert np.asarray(masks["fc"]).sum() == 8
    np.testing.assert_array_equal(np.asarray(masks["fc"]).all(0).sum(), 2)


def test_elimination_is_the_quadratic_form():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 5, 5))
    matrices = np.einsum("nij,nkj->nik", root, root) + np.eye(5)
    target = rng.standard_normal((6, 5))
    found = jax.vmap(linalg.group_cost)(jnp.float32(matrices), jnp.float32(target))
    np.testing.assert_allclose(
        found, 0.5 * np.einsum("ni,nij,nj->n", target, np.linalg.inv(matrices), target), rtol=1e-4
    )
