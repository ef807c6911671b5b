"""One-shot pruning as a whole: on any tree, in stages, and when something is wrong."""

from dataclasses import dataclass
from functools import cache, partial

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import woodjax as wj
from woodjax.adapters import linen as linen_adapter
from woodjax.adapters import nnx as nnx_adapter
from woodjax.losses import cross_entropy

KEY = jax.random.key(0)
BLOCKS = partial(wj.block_fisher, block_size=8, damping=1e-3)
WHOLE = partial(wj.low_rank_fisher, damping=1e-3)
HIDDEN = partial(wj.low_rank_fisher, damping=1e-3, select=lambda path, leaf: path == "out")
prune = partial(wj.prune_one_shot, **wj.FIXED)  # nothing left to choose; test_choices has the rest


def data(n=64):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    centres = 2 * rng.standard_normal((3, 5))
    return (centres[labels] + 1.0 * rng.standard_normal((n, 5))).astype(np.float32), labels


def dict_network():
    params = {
        "fc1": {"kernel": jax.random.normal(KEY, (5, 6)), "bias": jnp.zeros(6)},
        "out": jnp.ones((6, 3)) / 6,
    }
    return lambda p, x: jax.nn.relu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"]) @ p["out"], params


def nnx_network():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc1, self.out = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.relu(self.fc1(x)))

    return nnx_adapter.functional(Net(nnx.Rngs(0)))


def linen_network():
    module = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    return linen_adapter.functional(module, module.init(KEY, jnp.ones((1, 5))))


def equinox_network():
    params, static = eqx.partition(eqx.nn.MLP(5, 3, 6, 1, key=KEY), eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params


NETWORKS = {"dict": dict_network, "nnx": nnx_network, "linen": linen_network, "equinox": equinox_network}


def trained(make=dict_network):
    """One loss function for all tests: what is compiled for it in one serves the others."""
    loss_fn, params, mean_loss = train(make)
    return loss_fn, jax.tree.map(lambda w: w, params), mean_loss


@cache
def train(make):
    apply_fn, params = make()
    loss_fn = cross_entropy(apply_fn)
    mean_loss = jax.jit(lambda p, batch: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch)))
    step = jax.jit(lambda p, batch: jax.tree.map(lambda w, g: w - 0.3 * g, p, jax.grad(mean_loss)(p, batch)))
    for _ in range(30):
        params = step(params, data())
    return loss_fn, params, mean_loss


# To a curvature all trees are alike once they are blocks.
@pytest.mark.parametrize(
    ("make", "curvature"), [("dict", BLOCKS), *((name, WHOLE) for name in NETWORKS)], ids=["blocks", *NETWORKS]
)
def test_any_tree_goes_through(make, curvature):
    loss_fn, params, _ = trained(NETWORKS[make])
    pruned, masks, info = prune(loss_fn, params, data(), 0.5, stages=2, curvature=curvature)
    assert jax.tree.structure(pruned) == jax.tree.structure(masks) == jax.tree.structure(params)
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(pruned), jax.tree.leaves(masks), strict=True))
    for before, after, mask in leaves:
        assert after.dtype == before.dtype
        assert not np.asarray(after)[~np.asarray(mask)].any()
        if before.ndim < 2:
            np.testing.assert_array_equal(after, before)
            assert mask.all()
    total = sum(mask.size for _, _, mask in leaves if mask.ndim >= 2)
    assert sum(int((~mask).sum()) for *_, mask in leaves) == round(0.5 * total)
    np.testing.assert_allclose(info.sparsity[-1], 0.5, atol=0.5 / total)


def test_second_order_beats_magnitude_and_stages_help():
    """By the loss that is measured, not the model's; the three differ by a wide margin here."""
    loss_fn, params, mean_loss = trained()
    losses = {}
    masks = wj.make_masks(wj.magnitude_scores(params), 0.7)
    losses["magnitude"] = float(mean_loss(wj.apply_masks(params, masks), data()))
    for name, stages in (("one stage", 1), ("staged", 8)):
        pruned, _, info = prune(loss_fn, params, data(), 0.7, stages=stages, curvature=WHOLE)
        losses[name] = float(mean_loss(pruned, data()))
        np.testing.assert_allclose(info.loss_after[-1], losses[name], rtol=1e-4)
    assert 2 * losses["staged"] < losses["one stage"] < 0.9 * losses["magnitude"]


def test_stages_are_the_steps_written_out():
    loss_fn, params, _ = trained()
    pruned, masks, info = prune(
        loss_fn, params, data(), 0.75, stages=2, examples_per_stage=20, curvature=BLOCKS, method="sum"
    )

    @jax.jit
    def step(ours, kept, gradients, sparsity):
        fisher = BLOCKS(wj.apply_masks(gradients, kept))
        kept = wj.make_masks(wj.obs_scores(ours, fisher), sparsity, previous=kept)
        updates = wj.compensate(ours, kept, fisher, method="sum")
        return jax.tree.map(jnp.add, ours, updates), kept, wj.predicted_loss_change(updates, fisher)

    ours, kept = params, jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    for stage, sparsity in enumerate([0.5, 0.75]):
        batch = jax.tree.map(lambda x, stage=stage: x[20 * stage : 20 * (stage + 1)], data())
        ours, kept, change = step(ours, kept, wj.per_example_gradients(loss_fn, ours, batch), sparsity)
        np.testing.assert_allclose(info.predicted_loss_change[stage], change, rtol=1e-3)
    chex.assert_trees_all_equal(kept, masks)
    chex.assert_trees_all_close(ours, pruned, rtol=1e-3, atol=1e-4)


def test_masks_only():
    loss_fn, params, _ = trained()
    pruned, masks, _ = prune(loss_fn, params, data(), 0.5, curvature=WHOLE, method=None)
    chex.assert_trees_all_equal(pruned, wj.apply_masks(params, masks))


def test_the_same_under_jit():
    loss_fn, params, _ = trained()
    run = partial(prune, loss_fn, curvature=WHOLE)
    eager, jitted = run(params, data(), 0.5), jax.jit(run)(params, data(), 0.5)
    chex.assert_trees_all_equal(eager[1], jitted[1])
    chex.assert_trees_all_close(eager[0], jitted[0], rtol=1e-3, atol=1e-4)


def test_key_decides_which_examples():
    loss_fn, params, _ = trained()
    run = partial(prune, loss_fn, params, data(), 0.5, examples_per_stage=8, curvature=WHOLE)
    losses = [float(run(key=key)[2].loss_before[0]) for key in (None, KEY, KEY, jax.random.key(1))]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_earlier_masks_are_kept_and_scopes_mapped():
    loss_fn, params, _ = trained()
    first = prune(loss_fn, params, data(), {"out": 0.5}, scope="leaf", curvature=WHOLE)
    assert int((~first[1]["out"]).sum()) == 9
    assert first[1]["fc1"]["kernel"].all()
    again = prune(loss_fn, first[0], data(), 0.6, stages=2, masks=first[1], scope="leaf", curvature=WHOLE)
    assert not (np.asarray(again[1]["out"]) & ~np.asarray(first[1]["out"])).any()
    assert int((~again[1]["out"]).sum()) == 11


def test_on_stage_sees_every_stage():
    loss_fn, params, _ = trained()
    seen = []
    pruned, _, info = prune(loss_fn, params, data(), 0.75, stages=2, curvature=WHOLE, on_stage=seen.append)
    assert [float(stage.info.sparsity) for stage in seen] == info.sparsity.tolist()
    chex.assert_trees_all_equal(seen[-1].params, pruned)


def test_bfloat16_parameters():
    loss_fn, params, _ = trained()
    small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    pruned, masks, _ = prune(loss_fn, small, data(), 0.5, curvature=BLOCKS)
    assert pruned["out"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(pruned["out"] != 0, masks["out"])


def test_nan_is_named_outside_jit_and_counted_inside():
    loss_fn, params, _ = trained()
    inputs, labels = data()
    inputs = inputs.copy()
    inputs[0, 0] = np.nan
    run = partial(prune, loss_fn, params, sparsity=0.5, curvature=wj.diagonal_fisher)
    with pytest.raises(ValueError, match=r"Scores of leaf 'fc1/kernel' hold 6 NaN or -inf of 30"):
        run((inputs, labels))
    pruned, masks, info = jax.jit(lambda batch: run(batch))((inputs, labels))
    assert info.nonfinite.any()
    assert masks["fc1"]["kernel"].all()
    chex.assert_trees_all_equal(pruned["fc1"]["kernel"], params["fc1"]["kernel"])


def test_gradients_too_large_to_square_are_not_taken_for_protection():
    loss_fn, params, _ = trained()
    with pytest.raises(ValueError, match=r"Scores of leaf .* hold .* NaN"):
        prune(lambda p, x: 1e25 * loss_fn(p, x), params, data(), 1.0, curvature=wj.diagonal_fisher, method=None)


def spoiled(gradients):
    """A Fisher whose updates, but not whose scores, are lost on one leaf."""
    return Spoiled(wj.diagonal_fisher(gradients))


@partial(jax.tree_util.register_dataclass, data_fields=["fisher"], meta_fields=[])
@dataclass(frozen=True)
class Spoiled:
    fisher: wj.DiagonalFisher

    def compensate(self, params, masks, gradient=None):
        updates = self.fisher.compensate(params, masks, gradient)
        return {**updates, "out": updates["out"] * jnp.nan}

    def __getattr__(self, name):
        return getattr(self.fisher, name)


def test_a_leaf_with_lost_updates_stays_as_it_is():
    loss_fn, params, _ = trained()
    run = partial(prune, loss_fn, params, sparsity=0.5, curvature=spoiled)
    with pytest.raises(ValueError, match=r"Stage 1 of 1: updates of \['out'\] are not finite"):
        run(data())
    pruned, masks, info = jax.jit(lambda batch: run(batch))(data())
    assert info.nonfinite.tolist() == [[False, False, True]]
    assert masks["out"].all()
    chex.assert_trees_all_equal(pruned["out"], params["out"])
    assert not masks["fc1"]["kernel"].all()


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.45, 0.7, 0.9])
def test_counts_are_those_of_make_masks(sparsity):
    """15 weights, where float32 rounds 0.3 · 15 and 0.9 · 15 the other way."""
    params = {"w": jax.random.normal(KEY, (5, 3))}
    loss_fn = cross_entropy(lambda p, x: x @ p["w"])
    _, masks, _ = prune(loss_fn, params, data(), sparsity, curvature=WHOLE)
    assert int((~masks["w"]).sum()) == int(wj.prune_count(sparsity, 15))


def test_the_last_pattern_of_a_mapping_holds():
    loss_fn, params, _ = trained()
    _, masks, _ = prune(loss_fn, params, data(), {"o*": 0.5, "*": 0.0}, scope="leaf", curvature=WHOLE)
    assert masks["out"].all()


def test_means_of_examples_make_another_fisher():
    loss_fn, params, _ = trained()
    run = partial(prune, loss_fn, params, data(), 0.5, curvature=WHOLE)
    grouped = run(examples_per_gradient=4)
    fisher = WHOLE(wj.per_example_gradients(loss_fn, params, data(), examples_per_gradient=4))
    masks = wj.make_masks(wj.obs_scores(params, fisher), 0.5)
    chex.assert_trees_all_equal(grouped[1], masks)
    assert float(grouped[2].predicted_loss_change[0]) != float(run()[2].predicted_loss_change[0])


def test_path_and_damping_are_reported():
    loss_fn, params, _ = trained()
    _, _, info = prune(loss_fn, params, data(), 0.75, stages=3, path="cubic", curvature=WHOLE)
    np.testing.assert_allclose(info.sparsity, wj.stage_sparsities(0.75, 3, path="cubic"), atol=0.5 / 48)
    np.testing.assert_allclose(info.damping, 1e-3, rtol=1e-6)


def test_stacked_layers_are_leaves():
    params = {"w": jax.random.normal(KEY, (2, 5, 5)), "out": jax.random.normal(KEY, (1, 5, 3))}
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["out"][0]
    curvature = partial(wj.diagonal_fisher, batch_axes=1)
    _, masks, _ = prune(cross_entropy(apply_fn), params, data(), 0.4, scope="leaf", batch_axes=1, curvature=curvature)
    assert (~masks["w"]).sum((1, 2)).tolist() == [10, 10]


def test_check_can_be_turned_off():
    loss_fn, params, _ = trained()
    noisy = lambda p, x: loss_fn(p, x) + 0 * jax.random.normal(KEY)
    with pytest.raises(ValueError, match="draws random numbers"):
        prune(noisy, params, data(), 0.5, curvature=WHOLE)
    prune(noisy, params, data(), 0.5, curvature=WHOLE, check=False)


def test_a_model_that_is_not_partitioned_is_refused():
    with pytest.raises(ValueError, match=r"activation' is custom_jvp: only floating arrays .* eqx.partition"):
        prune(lambda p, x: 0.0, eqx.nn.MLP(5, 3, 6, 1, key=KEY), data(), 0.5)


@pytest.mark.parametrize("stages", [1, 3])
def test_traced_sparsity(stages):
    loss_fn, params, _ = trained()
    run = partial(prune, loss_fn, params, data(), curvature=WHOLE, stages=stages)
    traced = jax.jit(lambda s: run(s)[::2])(jnp.float32(0.5))
    eager = run(0.5)
    chex.assert_trees_all_close(traced[0], eager[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(traced[1].sparsity, eager[2].sparsity)


def test_stages_begin_at_the_masks_that_are_there():
    loss_fn, params, _ = trained()
    params, masks, _ = prune(loss_fn, params, data(), 0.5, curvature=WHOLE)
    again = partial(prune, loss_fn, params, data(), masks=masks, stages=2, curvature=WHOLE)
    np.testing.assert_allclose(again(0.875)[2].sparsity, [0.75, 0.875])
    leaves = again({"out": 0.9, "fc1/kernel": 0.8}, scope="leaf")[1]
    assert int((~leaves["out"]).sum()) == 16
    assert int((~leaves["fc1"]["kernel"]).sum()) == 24


def test_magnitude_sees_no_data_and_moves_nothing():
    loss_fn, params, _ = trained()
    pruned, masks, info = prune(loss_fn, params, data(), 0.5, stages=2, curvature=None)
    expected = wj.make_masks(wj.magnitude_scores(params), 0.5)
    chex.assert_trees_all_equal(masks, expected)
    chex.assert_trees_all_equal(pruned, wj.apply_masks(params, expected))
    assert np.isnan(info.predicted_loss_change).all()
    assert (info.loss_after > info.loss_before).all()


def test_first_order_is_woodtaylor():
    loss_fn, params, _ = trained()
    options = {"curvature": partial(wj.low_rank_fisher, damping=1.0), "first_order": True}
    ours = [prune(loss_fn, params, data(), 0.5, stream=stream, **options) for stream in (False, True)]
    gradients = wj.per_example_gradients(loss_fn, params, data())
    mean = jax.tree.map(lambda g: g.mean(0), gradients)

    @jax.jit
    def written_out(params, gradients, mean):
        fisher = wj.low_rank_fisher(gradients, damping=1.0)
        masks = wj.make_masks(wj.woodtaylor_scores(params, fisher, mean), 0.5)
        updates = wj.compensate(params, masks, fisher, gradient=mean)
        return jax.tree.map(jnp.add, params, updates), masks, wj.predicted_loss_change(updates, fisher, mean)

    expected, masks, change = written_out(params, gradients, mean)
    for pruned, kept, info in ours:
        chex.assert_trees_all_equal(kept, masks)
        chex.assert_trees_all_close(pruned, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(info.predicted_loss_change[0], change, rtol=1e-4)


def test_broken_leaves_can_be_kept_outside_jit_too():
    loss_fn, params, _ = trained()
    inputs, labels = data()
    inputs[0, 0] = np.nan
    pruned, masks, info = prune(
        loss_fn, params, (inputs, labels), 0.5, curvature=wj.diagonal_fisher, on_broken="keep", measure_loss=False
    )
    assert info.nonfinite.any()
    assert np.isnan(info.loss_before[0])
    assert masks["fc1"]["kernel"].all()
    chex.assert_trees_all_equal(pruned["fc1"]["kernel"], params["fc1"]["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, r"sparsity is 1\.2"),
        ({"stages": 0}, "stages is 0"),
        ({"stages": 2, "path": "square"}, "path is 'square'"),
        ({"examples_per_stage": 65}, "examples_per_stage is 65: pass 1 to 64"),
        ({"batch": (np.ones((3, 5)), np.ones(2))}, "leading sizes"),
        ({"masks": {"w": np.ones(3, bool)}}, "masks has the structure"),
        ({"method": "add"}, "method is 'add'"),
    ],
)
def test_bad_requests(options, message):
    loss_fn, params, _ = trained()
    arguments = {"batch": data(), "sparsity": 0.5, **options}
    with pytest.raises(ValueError, match=message):
        prune(loss_fn, params, **arguments)


@pytest.mark.parametrize("path", ["exponential", "cubic"])
@pytest.mark.parametrize(("initial", "target"), [(0.0, 0.9), (0.3, 0.3), (0.5, 1.0), (1.0, 1.0)])
def test_stage_sparsities(path, initial, target):
    values = wj.stage_sparsities(target, 7, initial=initial, path=path)
    assert values[-1] == target
    assert (np.diff([initial, *values]) >= 0).all()


def test_exponential_keeps_a_constant_fraction_and_cubic_is_zhu_and_gupta():
    kept = 1 - wj.stage_sparsities(0.99, 4)
    np.testing.assert_allclose(kept[1:] / kept[:-1], kept[0])
    np.testing.assert_allclose(wj.stage_sparsities(0.8, 2, path="cubic"), [0.8 - 0.8 * 0.125, 0.8])
    with pytest.raises(ValueError, match="0 <= initial <= target <= 1"):
        wj.stage_sparsities(0.5, 2, initial=0.6)


@pytest.mark.parametrize(
    "curvature",
    [BLOCKS, WHOLE, partial(wj.empirical_fisher, damping=1e-3, engine="streamed")],
    ids=["blocks", "whole", "streamed"],
)
def test_a_stream_prunes_as_held_gradients_do(curvature):
    loss_fn, params, _ = trained()
    options = {"stages": 3, "microbatch_size": 24, "examples_per_stage": 40}
    held = prune(loss_fn, params, data(), 0.6, curvature=BLOCKS if curvature is BLOCKS else WHOLE, **options)
    ours = prune(loss_fn, params, data(), 0.6, curvature=curvature, stream=True, **options)
    chex.assert_trees_all_equal(ours[1], held[1])
    chex.assert_trees_all_close(ours[0], held[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours[2].predicted_loss_change, held[2].predicted_loss_change, rtol=1e-2)


def test_raised_blocks_are_reported():
    loss_fn, params, _ = trained()
    rows = np.tile(data(4)[0], (16, 1)), np.tile(data(4)[1], 16)  # four examples, again and again: singular
    tiny = partial(wj.low_rank_fisher, damping=1e-12)
    _, _, info = prune(loss_fn, params, rows, 0.3, curvature=tiny)
    assert info.raised.tolist() == [1]
    assert float(info.damping[0]) > 5e-12
    assert prune(loss_fn, params, rows, 0.3, curvature=WHOLE)[2].raised.tolist() == [0]


def test_n_of_m_in_stages():
    """Every group of three inputs keeps one; one weight of each group goes in a stage."""
    loss_fn, params, _ = trained()
    seen = []
    _, masks, info = wj.prune_one_shot(
        loss_fn, params, data(), pattern=wj.NM(1, 3), curvature=HIDDEN, on_stage=lambda s: seen.append(s.masks["out"])
    )
    assert len(seen) == len(info.sparsity) == 2
    for stage, kept in zip(seen, (2, 1), strict=True):
        assert (np.asarray(stage).reshape(2, 3, 3).sum(axis=1) == kept).all()
    np.testing.assert_array_equal(masks["out"], seen[-1])
    assert masks["fc1"]["kernel"].all()


@pytest.mark.parametrize("pattern", [wj.Filters(), wj.Rows(), wj.Block(3)], ids=lambda p: type(p).__name__)
def test_groups_go_together(pattern):
    loss_fn, params, _ = trained()
    pruned, masks, info = wj.prune_one_shot(loss_fn, params, data(), 0.34, pattern=pattern, curvature=HIDDEN)
    mask = np.asarray(masks["out"]).reshape(-1)[pattern.indices((6, 3))]
    assert (mask.all(axis=1) | ~mask.any(axis=1)).all()
    assert (~mask.any(axis=1)).sum() == round(0.34 * len(mask))
    np.testing.assert_array_equal(np.asarray(pruned["out"]) != 0, masks["out"])
    assert np.isfinite(info.predicted_loss_change).all()


def test_floors_hold_in_every_stage():
    loss_fn, params, _ = trained()
    seen = []
    prune(loss_fn, params, data(), 0.8, stages=3, floor=0.15, curvature=WHOLE, on_stage=lambda s: seen.append(s.masks))
    assert len(seen) == 3
    for masks in seen:
        assert masks["out"].sum() >= 3
        assert masks["fc1"]["kernel"].sum() >= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity is missing"),
        ({"pattern": wj.NM(2, 4), "sparsity": 0.5}, "fixes it, leave it out"),
        ({"pattern": wj.Rows(), "sparsity": 0.5, "curvature": None}, "needs the joint cost of groups"),
        ({"pattern": wj.Rows(), "sparsity": 0.5, "scope": "erdos_renyi"}, "groups of weights take 'global' or 'leaf'"),
        ({"pattern": wj.Rows(), "sparsity": 0.5, "criterion": wj.obs_scores}, "leave criterion and prunable out"),
    ],
)
def test_targets_that_cannot_be(options, message):
    loss_fn, params, _ = trained()
    with pytest.raises(ValueError, match=message):
        prune(loss_fn, params, data(), **options)
