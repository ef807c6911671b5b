"""One conformance suite: every curvature answers the protocol's questions as its dense matrix would."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj

DAMPING = 0.1


def linear_loss(params, example):
    """Its gradient is the example itself."""
    return sum(jax.tree.leaves(jax.tree.map(lambda w, g: jnp.vdot(w, g), params, example)))


def streamed(build, **options):
    """The builder, given a stream of the same gradients: three rows at a time, whether or not they divide m."""

    def from_stream(gradients, *, damping, **more):
        params = jax.tree.map(lambda g: jnp.ones_like(g[0]), gradients)
        stream = wj.stream_gradients(linear_loss, params, gradients, microbatch_size=3)
        return build(stream, damping=damping, **options, **more)

    return from_stream


BUILDERS = {
    "block scan": partial(wj.block_fisher, block_size=4, engine="scan"),
    "block rank_k": partial(wj.block_fisher, block_size=4, engine="rank_k"),
    "block primal": partial(wj.block_fisher, block_size=4, engine="primal"),
    "block dual": partial(wj.block_fisher, block_size=4, engine="dual"),
    "block auto": partial(wj.block_fisher, block_size=4),
    "one block a leaf": partial(wj.block_fisher, block_size=99),
    "low rank, blocks": partial(wj.low_rank_fisher, block_size=4),
    "low rank, whole": wj.low_rank_fisher,
    "diagonal": wj.diagonal_fisher,
    "block, streamed": streamed(wj.block_fisher, block_size=4),
    "low rank, streamed": streamed(wj.low_rank_fisher),
    "diagonal, streamed": streamed(wj.diagonal_fisher),
    "windows of 4": streamed(wj.streamed_fisher, window_size=4),
    "rows": streamed(wj.row_fisher),
    "one window": streamed(wj.streamed_fisher, window_size=99),
}
STREAMED = {"rows", "block, streamed", "low rank, streamed", "diagonal, streamed", "windows of 4", "one window"}
WHOLE = {"low rank, whole", "low rank, streamed", "windows of 4", "one window"}
SHAPES = {"bias": (2,), "fc1": (2, 3), "fc2": (3, 3)}  # 6 + 9 prunable, flattened in this order
SPLITS = {  # leaf-wise blocks of the 15 prunable coordinates
    4: [range(4), range(4, 6), range(6, 10), range(10, 14), range(14, 15)],
    99: [range(6), range(6, 15)],
    None: [range(15)],
    "rows": [[0, 3], [1, 4], [2, 5], [6, 9, 12], [7, 10, 13], [8, 11, 14]],
    1: [[i] for i in range(15)],
}


def split(name):
    sizes = {"one block a leaf": 99, "diagonal": 1, "diagonal, streamed": 1, "rows": "rows"} | dict.fromkeys(WHOLE)
    return [list(block) for block in SPLITS[sizes.get(name, 4)]]


def draw_tree(rng, lead=()):
    return {name: rng.standard_normal((*lead, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def vector(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).reshape(-1) for name in ("fc1", "fc2")])


def dense(gradients, blocks):
    rows = np.stack([vector(jax.tree.map(lambda g, i=i: g[i], gradients)) for i in range(len(gradients["bias"]))])
    return oracle.blockwise(oracle.fisher(rows, DAMPING), blocks)


for_each = pytest.mark.parametrize("name", BUILDERS)


def answers(name, gradients, params, v, masks, mean):
    curvature = BUILDERS[name](gradients, damping=DAMPING)
    return (
        curvature.inverse_diagonal(),
        curvature.solve(v),
        curvature.matvec(v),
        curvature.compensate(params, masks),
        curvature.compensate(params, masks, mean),
    )


jitted_answers = jax.jit(answers, static_argnames="name")  # compiled once for each number of rows


@for_each
@pytest.mark.parametrize("jit", [False, True])
@settings(max_examples=6)
@given(seed=st.integers(0, 1000), m=st.sampled_from([1, 3, 20]))
def test_agrees_with_its_dense_matrix(name, jit, seed, m):
    m = m if jit else 3  # outside jit every operation is compiled for every number of rows
    rng = np.random.default_rng(seed)
    gradients, params, v, mean = draw_tree(rng, (m,)), draw_tree(rng), draw_tree(rng), draw_tree(rng)
    masks = jax.tree.map(lambda x: rng.random(x.shape) < 0.5, params)
    hessian = dense(gradients, split(name))
    inverse = np.linalg.inv(hessian)
    found = (jitted_answers if jit else answers)(name, gradients, params, v, masks, mean)
    pruned = ~np.concatenate([masks[leaf].reshape(-1) for leaf in ("fc1", "fc2")])
    expected = (
        np.diag(inverse),
        inverse @ vector(v),
        hessian @ vector(v),
        oracle.constrained_minimiser(hessian, vector(params), pruned),
        oracle.constrained_minimiser(hessian, vector(params), pruned, vector(mean)),
    )
    for tree, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(vector(tree), values, atol=2e-4 * np.abs(values).max())
        np.testing.assert_array_equal(tree["bias"], 0)


@for_each
def test_is_a_curvature_and_a_pytree(name):
    curvature = BUILDERS[name](draw_tree(np.random.default_rng(0), (3,)), damping=DAMPING)
    assert isinstance(curvature, wj.Curvature)
    again = jax.jit(lambda x: x)(curvature)
    assert jax.tree.structure(again) == jax.tree.structure(curvature)
    np.testing.assert_allclose(curvature.damping, DAMPING)


@for_each
def test_order_of_examples_does_not_matter(name):
    gradients = draw_tree(np.random.default_rng(0), (8,))
    reverse = jax.tree.map(lambda g: g[::-1], gradients)
    ours, theirs = (BUILDERS[name](g, damping=DAMPING).inverse_diagonal() for g in (gradients, reverse))
    np.testing.assert_allclose(vector(ours), vector(theirs), rtol=1e-4)


@for_each
def test_predicted_loss_change_is_the_quadratic(name):
    rng = np.random.default_rng(3)
    gradients, step, mean = draw_tree(rng, (5,)), draw_tree(rng), draw_tree(rng)
    curvature = BUILDERS[name](gradients, damping=DAMPING)
    hessian = dense(gradients, split(name))
    fixed = jax.tree.map(jnp.zeros_like, step) | {"fc1": step["fc1"], "fc2": step["fc2"]}
    for gradient, argument in ((None, None), (vector(mean), mean)):
        expected = oracle.quadratic(hessian, vector(fixed), gradient)
        np.testing.assert_allclose(wj.predicted_loss_change(fixed, curvature, argument), expected, rtol=2e-4)


@for_each
def test_bfloat16_gradients(name):
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), draw_tree(rng, (6,)))
    wide = jax.tree.map(lambda g: np.asarray(g, np.float32), gradients)
    diagonal = BUILDERS[name](gradients, damping=DAMPING).inverse_diagonal()
    assert diagonal["fc1"].dtype == jnp.float32
    np.testing.assert_allclose(vector(diagonal), np.diag(np.linalg.inv(dense(wide, split(name)))), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in WHOLE | {"rows"}])  # they have no layers
def test_stacked_layers_are_separate(name):
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((5, 2, 3)).astype(np.float32) for _ in range(3)]
    stacked = BUILDERS[name]({"w": np.stack(layers, axis=1)}, damping=DAMPING, batch_axes=1).inverse_diagonal()
    for i, layer in enumerate(layers):
        alone = BUILDERS[name]({"w": layer}, damping=DAMPING).inverse_diagonal()
        np.testing.assert_allclose(stacked["w"][i], alone["w"], rtol=1e-4)


def test_blocks_of_one_are_the_diagonal():
    gradients = draw_tree(np.random.default_rng(0), (7,))
    ones = wj.block_fisher(gradients, block_size=1, damping=DAMPING)
    diagonal = wj.diagonal_fisher(gradients, damping=DAMPING)
    np.testing.assert_allclose(vector(ones.inverse_diagonal()), vector(diagonal.inverse_diagonal()), rtol=1e-5)


def test_damping_is_traced():
    gradients = draw_tree(np.random.default_rng(0), (3,))
    traces = []

    @jax.jit
    def diagonal(damping):
        traces.append(1)
        return wj.low_rank_fisher(gradients, damping=damping).inverse_diagonal()

    for damping in (0.1, 0.2):
        expected = wj.low_rank_fisher(gradients, damping=damping).inverse_diagonal()
        np.testing.assert_allclose(vector(diagonal(jnp.float32(damping))), vector(expected), rtol=1e-5)
    assert len(traces) == 1


@for_each
@pytest.mark.parametrize("damping", [0.0, -1.0, 1e-50, float("nan"), float("inf")])
def test_damping_must_be_positive(name, damping):
    with pytest.raises(ValueError, match="must be positive and finite"):
        BUILDERS[name]({"w": np.ones((2, 2, 2), np.float32)}, damping=damping)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in STREAMED])  # a stream has its own checks
@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": np.ones((2, 2, 2)), "b": np.ones((3, 2, 2))}, "leading sizes"),
        ({"a": np.ones((0, 2, 2))}, "leading sizes"),
        ({"a": np.float32(1)}, "leading sizes"),
        ({"a": np.ones((2, 2, 2), int)}, "Leaf 'a' is int"),
    ],
)
def test_bad_gradients(name, gradients, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](gradients, damping=DAMPING)


@for_each
def test_a_lost_diagonal_is_broken_and_not_held_fixed(name):
    gradients = {"w": np.ones((3, 2, 2), np.float32) * np.float32(1e25)}  # overflows when squared
    curvature = BUILDERS[name](gradients, damping=DAMPING)
    assert np.isnan(curvature.inverse_diagonal()["w"]).all()
    assert np.isnan(wj.obs_scores({"w": np.ones((2, 2), np.float32)}, curvature)["w"]).all()


def test_unknown_engine():
    with pytest.raises(ValueError, match="engine is 'fast': choose one of"):
        wj.block_fisher({"w": np.ones((2, 2, 2))}, engine="fast")


@for_each
def test_another_tree_is_refused(name):
    curvature = BUILDERS[name]({"w": np.ones((2, 2, 2), np.float32)}, damping=DAMPING)
    with pytest.raises(ValueError, match="Leaf 'w' has shape"):
        curvature.solve({"w": np.ones((3, 3))})
    with pytest.raises(ValueError, match="Tree structure"):
        curvature.solve({"v": np.ones((2, 2))})


@pytest.mark.parametrize("engine", ["scan", "rank_k", "dual"])
def test_predictions_stay_finite_where_the_damping_is_tiny(engine):
    rng = np.random.default_rng(0)
    gradients = {"w": jnp.asarray(10 * rng.standard_normal((24, 8, 8)), jnp.float32)}
    params = {"w": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)}
    fisher = wj.block_fisher(gradients, block_size=64, damping=1e-5, engine=engine)
    step = wj.compensate(params, wj.make_masks(wj.obs_scores(params, fisher), 0.5), fisher)
    assert np.isfinite(wj.predicted_loss_change(step, fisher))
