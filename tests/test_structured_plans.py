"""Plans: what they leave of every tree alike, one after another, and as text; and how channels are chosen."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from structured_cases import arrays, assert_close, masked, random_channels

import woodjax as wj

SHAPES = {"first": (3, 3, 2, 8), "second": (3, 3, 8, 6), "bias": (6,), "last": (54, 3), "step": ()}
NUMBERS = ("NHWC", "HWIO", "NHWC")


def apply_fn(variables, x):
    v = variables["params"]
    for name, strides in (("first", (2, 2)), ("second", (1, 1))):
        x = jax.nn.relu(lax.conv_general_dilated(x, v[name], strides, "SAME", dimension_numbers=NUMBERS))
    return (x + v["bias"]).reshape(len(x), -1) @ v["last"] * v["step"]


@pytest.fixture(scope="module")
def variables():
    return {"params": arrays(SHAPES)}


@pytest.fixture(scope="module")
def groups(variables):
    return wj.channel_groups(apply_fn, variables, jnp.ones((1, 6, 6, 2)))


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@hypothesis.given(st.integers(0, 2**16), st.booleans())
@hypothesis.settings(max_examples=5)
def test_expand_is_masked_and_text_is_equal(groups, variables, seed, implants):
    plan = wj.make_plan(groups, *random_channels(groups, seed, implants=implants))
    equal(plan.expand(plan.shrink(variables)), masked(plan, variables))
    equal(jax.tree.map(jnp.multiply, variables, plan.masks(variables)), masked(plan, variables))
    again = wj.PrunePlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert all((again.kept[name] == at).all() for name, at in plan.kept.items())


@hypothesis.given(st.integers(0, 2**16))
@hypothesis.settings(max_examples=3)
def test_two_plans_are_one(groups, variables, seed):
    first = wj.make_plan(groups, random_channels(groups, seed)[0])
    smaller = wj.shrink_groups(groups, first)
    kept, implanted = random_channels(smaller, seed + 1, implants=True)
    second = wj.make_plan(smaller, kept, implanted)
    both = first.then(second)
    small = first.shrink(variables)
    equal(both.shrink(variables), second.shrink(small))
    assert wj.PrunePlan.from_json(both.to_json()) == both
    assert smaller.parameters({}) == sum(leaf.size for leaf in jax.tree.leaves(small))
    whole, replaced = both.kept, both.implanted
    assert smaller.macs(kept, implanted) == groups.macs(whole, replaced)
    assert smaller.parameters(kept, implanted) == groups.parameters(whole, replaced)
    assert wj.make_plan(groups, whole, replaced) == both


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-2),
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)),
        optax.multi_transform(
            {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
            {"params": {name: "a" if name == "first" else "b" for name in SHAPES}},
        ),
    ],
    ids=["adam", "momentum", "adamw", "multi_transform"],
)
def test_optimizer_states_shrink_along(groups, variables, optimizer):
    """Steps after shrinking are those of the whole network with zeros, where the gradient is zero."""
    plan = wj.make_plan(groups, *random_channels(groups, 0))
    whole = masked(plan, variables)
    state = optimizer.init(whole)
    gradient = jax.tree.map(lambda leaf: jnp.sign(leaf) * 0.1, whole)
    _, state = optimizer.update(gradient, state, whole)
    small_state = plan.shrink(state)
    assert jax.tree.structure(small_state) == jax.tree.structure(optimizer.init(plan.shrink(whole)))
    expected, _ = optimizer.update(gradient, state, whole)
    found, _ = optimizer.update(plan.shrink(gradient), small_state, plan.shrink(whole))
    assert_close(found, plan.shrink(expected), 1e-5)


def test_other_trees(groups, variables):
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    params_alone = variables["params"]  # paths without the collection
    equal(plan.shrink(params_alone), plan.shrink(variables)["params"])
    mixed = {"bias": variables["params"]["bias"], "other": jnp.ones(7), "t": 2.0}
    equal({name: plan.shrink(mixed)[name] for name in ("other", "t")}, {"other": jnp.ones(7), "t": 2.0})
    equal(plan.shrink({"key": jax.random.PRNGKey(0), "count": 3}), {"key": jax.random.PRNGKey(0), "count": 3})
    for function in (plan.shrink, plan.expand, plan.masks):
        with pytest.raises(ValueError, match=r"No leaf of the tree is of the network: its paths are \['other'\]"):
            function({"other": jnp.ones(7), "t": 2.0})
    with pytest.raises(
        ValueError, match=r"'mu/bias' has shape \(5,\), expected \(6,\) of the variables' 'params/bias'"
    ):
        plan.shrink({"mu": {"bias": jnp.ones(5)}})
    with pytest.raises(ValueError, match=r"No leaf of the tree has a path of the variables"):
        groups.sums({"other": jnp.ones(7)})


def test_sums_and_counts(groups, variables):
    params = variables["params"]
    sums = groups.sums(params)
    np.testing.assert_allclose(
        sums["params/first"], params["first"].sum((0, 1, 2)) + params["second"].sum((0, 1, 3)), rtol=1e-5
    )
    last = params["last"].reshape(9, 6, 3).sum((0, 2))
    np.testing.assert_allclose(groups.sums(params, ("in",))["params/second"], last, rtol=1e-5)
    np.testing.assert_array_equal(groups.counts(params, ("each",))["params/second"], np.ones(6))
    np.testing.assert_array_equal(groups.counts(params)["params/second"], np.full(6, 72 + 27 + 1.0))


@pytest.mark.parametrize(
    ("kept", "implanted", "match"),
    [
        ({"params/third": [True]}, None, r"No group 'params/third'; there are \['params/first', 'params/second'\]"),
        ({"params/first": np.ones(7, bool)}, None, r"kept\['params/first'\] is bool\[7\], expected bool\[8\]"),
        ({"params/first": np.ones(8)}, None, r"is float64\[8\], expected bool\[8\]"),
        ({"params/first": np.zeros(8, bool)}, None, "keeps nothing"),
        ({"params/first": np.arange(8) > 0}, {"params/first": np.arange(8) < 1}, "do not stay in kept"),
        ({}, {"params/first": np.ones(7, bool)}, r"implanted\['params/first'\] is bool\[7\], expected bool\[8\]"),
    ],
)
def test_bad_plans(groups, kept, implanted, match):
    with pytest.raises(ValueError, match=match):
        wj.make_plan(groups, kept, implanted)


def test_implants_stand_in_convolutions():
    variables = arrays({"first": (3, 3, 2, 4), "middle": (4, 5), "last": (5, 3)})

    def apply_fn(v, x):
        x = lax.conv_general_dilated(x, v["first"], (1, 1), "SAME", dimension_numbers=NUMBERS)
        return jnp.tanh(jnp.tanh(x).mean((1, 2)) @ v["middle"]) @ v["last"]

    groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 4, 4, 2)))
    assert groups.implantable == ("first",)
    with pytest.raises(ValueError, match=r"channels of \['middle'\].*implants can stand in \['first'\]"):
        wj.make_plan(groups, {}, {"first": np.arange(4) < 1, "middle": np.arange(5) < 1})
    assert wj.make_plan(groups, {}, {"first": np.arange(4) < 1, "middle": np.arange(5) < 0}).has_implants


def test_plans_that_do_not_fit(groups, variables):
    kept, implanted = random_channels(groups, 0, implants=True)
    plan, implants = wj.make_plan(groups, kept), wj.make_plan(groups, kept, implanted)
    assert implants.has_implants
    for bad in (lambda: implants.then(plan), lambda: wj.shrink_groups(groups, implants)):
        with pytest.raises(ValueError, match="a network with implants is not pruned further"):
            bad()
    with pytest.raises(ValueError, match="not for the network that this one leaves"):
        plan.then(plan)
    for text in ("{}", "no", '{"version": 9}', "[]", '{"version": 1, "groups": 3}'):
        with pytest.raises(ValueError, match=r"No plan that PrunePlan.to_json wrote|version 9"):
            wj.PrunePlan.from_json(text)
    network, x = wj.shrunk_network(apply_fn, plan), jnp.ones((1, 6, 6, 2))
    with pytest.raises(ValueError, match=r"'params/bias' has shape \(6,\), expected \(4,\)"):
        network(variables, x)
    small = plan.shrink(variables)
    np.testing.assert_array_equal(network(small | {"unused": jnp.ones(2)}, x), network(small, x))
    with pytest.raises(ValueError, match=r"without the leaves \['params/bias'\].*plan.shrink"):
        network({"params": {name: leaf for name, leaf in small["params"].items() if name != "bias"}}, x)


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        (("groups", 0, "kept"), [3, 1], r"Group 'params/first' of the plan: kept is \(3, 1\): expected rising"),
        (("groups", 0, "kept"), [0, 8], "expected rising indices below 8"),
        (("groups", 0, "kept"), [], r"Group 'params/first' of the plan keeps \(\)"),
        (("groups", 0, "kept"), 3, "No plan that PrunePlan.to_json wrote"),
        (("groups", 0, "implanted"), [7], "implants are"),
        (("groups", 0, "size"), 8.5, "Group 'params/first' of the plan: size is 8.5"),
        (("groups", 1, "name"), "params/first", "The groups of the plan are"),
        (("leaves", 1, "shape"), [3, 3, 2, 9], r"Leaf 'params/first' of the plan has shape \(3, 3, 2, 9\)"),
        (("leaves", 1, "axes", 3, "kept", 0), [0, -1], "Leaf 'params/first' of the plan: kept is"),
        (("leaves", 1, "axes", 3, "kept"), [], "Leaf 'params/first' of the plan has shape"),
        (("leaves", 1, "implants", "at"), [5], "Leaf 'params/first' of the plan: implants is"),
        (("leaves", 1, "implants", "outputs"), 4, "axis of implants"),
        (("leaves", 1, "implants", "places"), [0, 3], "leave no axis of inputs"),
        (("streams",), "both", "streams is 'both'"),
    ],
)
def test_text_with_other_numbers(groups, where, value, match):
    stays = {"params/first": np.arange(8) < 4}
    found = json.loads(wj.make_plan(groups, stays, {"params/first": np.arange(8) == 1}).to_json())
    *inside, last = where
    part = found
    for key in inside:
        part = part[key]
    part[last] = value
    with pytest.raises(ValueError, match=match):
        wj.PrunePlan.from_json(json.dumps(found))


def test_inputs_for_which_other_channels_go_together():
    def apply_fn(v, x):
        h = jnp.tanh(x @ v["first"])
        return (jax.nn.softmax(h) if x.shape[1] > 1 else h) @ v["last"]

    variables = arrays({"first": (5, 6), "last": (6, 3)})
    groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 1, 5)))
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    with pytest.raises(ValueError, match=r"leaf 'first' \(5, 6\), but for inputs of shape \[\(1, 2, 5\)\] other"):
        wj.shrunk_network(apply_fn, plan)(plan.shrink(variables), jnp.ones((1, 2, 5)))


def test_a_network_is_a_function_like_others(groups, variables):
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    network = wj.shrunk_network(apply_fn, plan)
    same = wj.shrunk_network(apply_fn, wj.PrunePlan.from_json(plan.to_json()))
    assert network == same
    assert hash(network) == hash(same)
    assert network != wj.shrunk_network(apply_fn, wj.make_plan(groups, random_channels(groups, 1)[0]))
    small, x = plan.shrink(variables), jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 2)), jnp.float32)
    y = jnp.array([0, 1, 2, 0])
    expected = jax.jit(network)(small, x)
    assert_close(jax.jit(jax.vmap(lambda example: network(small, example[None])[0]))(x), expected)

    def loss(v, example):
        return optax.softmax_cross_entropy_with_integer_labels(network(v, example["x"][None]), example["y"][None]).sum()

    gradients = wj.per_example_gradients(loss, small, {"x": x, "y": y})
    one = jax.jit(jax.grad(loss))(small, {"x": x[1], "y": y[1]})
    assert_close(jax.tree.map(lambda leaf: leaf[1], gradients), one)
