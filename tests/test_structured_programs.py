"""Channels through programs in programs: loops, branches, functions with rules of their own; and what stops them."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from structured_cases import Case, arrays, assert_close, check, masked, random_channels, sizes

import woodjax as wj

OTHER = {"other": (5, 4), "end": (4, 2)}


def dense(between, *, groups=None, union=None, unknown="error", last=6, **shapes):
    def apply_fn(v, x):
        return between(jnp.tanh(x @ v["first"]), v) @ v["last"]

    shapes = {"first": (5, 6), "last": (last, 3), **shapes}
    return Case(apply_fn, shapes, (5,), {"first": 6} if groups is None else groups, union, unknown)


def beside(between, *, unknown="error", last=6, **shapes):
    """Nothing but the other hidden layer can go."""

    def apply_fn(v, x):
        return between(jnp.tanh(x @ v["first"]), v) @ v["last"], jnp.tanh(x @ v["other"]) @ v["end"]

    return Case(apply_fn, {"first": (5, 6), "last": (last, 3), **OTHER, **shapes}, (5,), {"other": 4}, None, unknown)


def layers(h, v):
    def step(h, weights):
        kernel, bias = weights
        return jnp.tanh(h @ kernel + bias), None

    return lax.scan(step, h, (v["kernels"], v["biases"]))[0]


def residual_layers(h, v):
    def step(h, weights):
        up, down = weights
        return h + jnp.tanh(h @ up) @ down, h.sum(-1)

    h, sums = lax.scan(step, h, (v["up"], v["down"]))
    return h * sums.sum(0)[:, None]


def recurrent(x, v):
    """A cell over five steps, that starts from zero."""

    def step(h, part):
        h = jnp.tanh(h @ v["hidden"] + part @ v["first"])
        return h, h

    last, all_of_them = lax.scan(step, jnp.zeros((len(x), 6)), jnp.moveaxis(x, 1, 0), reverse=True)
    return (last + all_of_them.mean(0)) @ v["last"]


def gated(x, v):
    def step(h, part):
        both = part @ v["first"] + h @ v["hidden"]
        gate, candidate = jnp.split(both, 2, -1)
        gate = jax.nn.sigmoid(gate)
        return gate * h + (1 - gate) * jnp.tanh(candidate), None

    return lax.scan(step, jnp.zeros((len(x), 6)), jnp.moveaxis(x, 1, 0))[0] @ v["last"]


def branches(h, v):
    return lax.cond(h.sum() > 0, lambda h: jnp.tanh(h @ v["second"]), lambda h: h * v["bias"], h)


def loop(h, v):
    return lax.fori_loop(0, jnp.int32(h.sum() > 0) + 2, lambda i, h: h * 0.5, h)


@jax.custom_jvp
def straight(h):
    return jnp.sign(h)


straight.defjvps(lambda t, ans, h: t)


@jax.custom_vjp
def clipped(h):
    return h * 2.0


clipped.defvjp(lambda h: (h * 2.0, None), lambda _, g: (jnp.clip(g, -1, 1),))


def embedded(v, x):
    found = v["table"][(x > 0).astype(jnp.int32)]  # [n, 5, 6]
    return jnp.tanh(found.mean(1)) @ v["last"]


def tied(v, x):
    found = v["table"][(x > 0).astype(jnp.int32)].mean(1)
    return (found + jnp.tanh(found @ v["up"]) @ v["down"]) @ v["table"].T


CASES = {
    "scan over layers": dense(layers, kernels=(3, 6, 6), biases=(3, 6)),
    "scan over residual layers": dense(residual_layers, up=(2, 6, 7), down=(2, 7, 6), groups={"down": 6, "up": 7}),
    "recurrent": Case(
        lambda v, x: recurrent(x, v),
        {"first": (2, 6), "hidden": (6, 6), "last": (6, 3)},
        (5, 2),
        {"first": 6},
    ),
    "gated recurrent": Case(
        lambda v, x: gated(x, v), {"first": (2, 12), "hidden": (6, 12), "last": (6, 3)}, (5, 2), {"first": 6}
    ),
    "branches": dense(branches, second=(6, 6), bias=(6,)),
    "a loop that is a barrier": beside(loop, unknown="barrier"),
    "functions of functions": dense(
        lambda h, v: jax.jit(jax.checkpoint(lambda h: jnp.tanh(h @ v["second"])))(straight(h) + clipped(h)),
        second=(6, 6),
        groups={"first": 6, "second": 6},
    ),
    "dead leaf": dense(lambda h, v: h, dead=(6, 6)),
    "dead product": dense(lambda h, v: h + 0 * (h @ v["dead"]).sum(), dead=(6, 4), groups={"dead": 4, "first": 6}),
    "embedding": Case(embedded, {"table": (2, 6), "last": (6, 3)}, (5,), {"table": 6}),
    "tied embedding": Case(
        tied,
        {"table": (2, 6), "up": (6, 7), "down": (7, 6)},
        (5,),
        {"down": 6, "up": 7},
    ),
    "mapped": dense(
        lambda h, v: jax.vmap(lambda row: jnp.tanh(row @ v["second"]))(h),
        second=(6, 6),
        groups={"first": 6, "second": 6},
    ),
    "mapped loop": dense(
        lambda h, v: lax.map(lambda row: jnp.tanh(row @ v["second"]), h),
        second=(6, 6),
        groups={"first": 6, "second": 6},
    ),
    "dict": Case(
        lambda v, x: {"y": jnp.tanh(x @ v["first"]) @ v["last"], "x": x, "last": v["last"][0] * 0 + 1},
        {"first": (5, 6), "last": (6, 3), **OTHER},
        (5,),
        {"first": 5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_is_shrunk(name):
    @hypothesis.settings(max_examples=2)
    @hypothesis.given(st.integers(0, 2**16))
    def hold(seed):
        check(CASES[name], "joint", [seed])
        if CASES[name].union is not None:
            check(CASES[name], "union", [seed])

    hold()


@pytest.mark.parametrize(
    ("function", "primitive"),
    [
        (loop, "while"),
        (lambda h, v: lax.linalg.cholesky(h.T @ h + jnp.eye(6))[:1] + h, "cholesky"),
        (lambda h, v: h.at[:, 0].set(1.0), "scatter"),
    ],
)
def test_unknown_primitives_name_the_line(function, primitive):
    case = dense(function)
    with pytest.raises(ValueError, match=rf"'{primitive}' at .*test_structured_programs.py:\d+.*unknown='barrier'"):
        wj.channel_groups(case.apply_fn, arrays(case.shapes), jnp.ones((1, 5)))
    check(beside(function, unknown="barrier"), "joint", [0])


def test_captured_arrays_keep_their_channels():
    held = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)
    check(beside(lambda h, v: h * held), "joint", [0])
    case = dense(lambda h, v: h * held)
    with pytest.raises(ValueError, match=r"No channel can be removed from .*'first', 'last'.*functional_variables"):
        wj.channel_groups(case.apply_fn, arrays(case.shapes), jnp.ones((1, 5)))


def test_partials_carry_arrays():
    def apply_fn(held, v, x):
        return jnp.tanh(x @ v["first"]) @ v["last"] * held

    variables, x = arrays({"first": (5, 6), "last": (6, 3)}), jnp.ones((2, 5))
    partial = jax.tree_util.Partial(apply_fn, jnp.arange(1.0, 4.0))
    groups = wj.channel_groups(partial, variables, x)
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    found = jax.jit(wj.shrunk_network(partial, plan))(plan.shrink(variables), x)
    assert_close(found, partial(masked(plan, variables), x))


def test_bfloat16_and_integers():
    def apply_fn(v, x):
        h = jax.nn.gelu(v["table"][x].mean(1)) @ v["second"]
        return jax.nn.relu(h.astype(jnp.float32)).astype(jnp.bfloat16) @ v["last"]

    variables = arrays({"table": (9, 6), "second": (6, 5), "last": (5, 3)}, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, 7)))
    groups = wj.channel_groups(apply_fn, variables, x[:1])
    assert sizes(groups) == {"second": 5, "table": 6}
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    small = plan.shrink(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(wj.shrunk_network(apply_fn, plan)(small, x), apply_fn(masked(plan, variables), x), 2e-2)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, jax.nn.softplus, straight, clipped])
def test_derivative_rules(activation):
    """Those of the network, at zero too, where masked channels are."""

    def apply_fn(v, x):
        return activation(activation(x @ v["first"]) @ v["second"]) @ v["last"]

    variables = arrays({"first": (5, 6), "second": (6, 6), "last": (6, 3)})
    x = jnp.concatenate([jnp.zeros((1, 5)), jnp.ones((1, 5))])
    groups = wj.channel_groups(apply_fn, variables, x)
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    network = wj.shrunk_network(apply_fn, plan)
    found = jax.grad(lambda v: network(v, x).sum())(plan.shrink(variables))
    assert_close(found, plan.shrink(jax.grad(lambda v: apply_fn(v, x).sum())(masked(plan, variables))))


@pytest.mark.parametrize(
    ("options", "match"), [({"streams": "both"}, "'joint' or 'union'"), ({"unknown": "skip"}, "'error' or 'barrier'")]
)
def test_unknown_options(options, match):
    with pytest.raises(ValueError, match=match):
        wj.channel_groups(lambda v, x: x @ v, jnp.ones((2, 2)), jnp.ones((1, 2)), **options)
