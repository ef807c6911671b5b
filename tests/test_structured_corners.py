"""Programs that a review found to crash or to go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from structured_cases import arrays, assert_close, masked, random_channels

import woodjax as wj
from woodjax.adapters.nnx import functional_variables
from woodjax.datasets import load_dataset
from woodjax.training import fit_shrunk, sgd_recipe


def later_sum(v, x):
    h = x @ v["a"]
    z = h @ v["w"]
    return jnp.tanh(z + h) @ v["h2"] + z @ v["h"]


def sum_of_sums(v, x):
    a, b, c = x @ v["a"], x @ v["b"], x @ v["c"]
    return (a + b) @ v["h"] + ((a + b) + c) @ v["h2"] + (a * c) @ v["h3"]


def two_factorings(v, x):
    h = (x @ v["a"]).reshape(len(x), 3, 8) * v["s"]
    k = (x @ v["b"]).reshape(len(x), 2, 12) * v["t"]
    return jnp.concatenate([h.reshape(len(x), -1), k.reshape(len(x), -1)], 1) @ v["w"] @ v["h"]


def last_of_padding(v, x):
    h = jnp.pad(x @ v["a"], ((0, 0), (1, 2)))
    return h[:, -1:] @ v["s"] + h @ v["h"]


def nothing_of_it(v, x):
    h = x @ v["a"]
    return jnp.concatenate([h[:, 0:0], jnp.roll(h[:, :1], 1, 1), h], 1) @ v["w"] @ v["h"]


def rematerialised(v, x):
    return jax.checkpoint(lambda x: jnp.tanh(x @ v["a"]) @ v["w"])(x) @ v["h"]


CASES = {
    "later sum": (later_sum, {"a": (3, 4), "w": (4, 4), "h": (4, 2), "h2": (4, 2)}),
    "sum of sums": (
        sum_of_sums,
        {"a": (3, 4), "b": (3, 4), "c": (3, 4), "h": (4, 2), "h2": (4, 2), "h3": (4, 2)},
    ),
    "two factorings": (
        two_factorings,
        {"a": (3, 24), "b": (3, 24), "s": (8,), "t": (12,), "w": (48, 4), "h": (4, 2)},
    ),
    "last of padding": (last_of_padding, {"a": (3, 4), "s": (1, 2), "h": (7, 2)}),
    "nothing of it": (nothing_of_it, {"a": (3, 4), "w": (5, 4), "h": (4, 2)}),
    "rematerialised": (rematerialised, {"a": (3, 4), "w": (4, 5), "h": (5, 2)}),
}


@pytest.mark.parametrize("streams", ["joint", "union"])
@pytest.mark.parametrize("name", CASES)
def test_masked_is_shrunk(name, streams):
    apply_fn, shapes = CASES[name]
    variables, x = arrays(shapes), jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    groups = wj.channel_groups(apply_fn, variables, x[:1], streams=streams)
    for seed in range(4):
        kept, _ = random_channels(groups, seed)
        plan = wj.make_plan(groups, kept)
        network = wj.shrunk_network(apply_fn, plan)
        assert_close(network(plan.shrink(variables), x), apply_fn(masked(plan, variables), x))


def test_a_rematerialised_body_stays_one():
    apply_fn, shapes = CASES["rematerialised"]
    variables, x = arrays(shapes), jnp.ones((2, 3))
    groups = wj.channel_groups(apply_fn, variables, x)
    plan = wj.make_plan(groups, random_channels(groups, 0)[0])
    program = jax.make_jaxpr(wj.shrunk_network(apply_fn, plan))(plan.shrink(variables), x)
    assert {"checkpoint", "remat2"} & {equation.primitive.name for equation in program.jaxpr.eqns}


class Dropped(nnx.Module):
    """A hidden layer with dropout behind it, which keeps a state of its own."""

    def __init__(self, rngs):
        self.fc1 = nnx.Linear(64, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.fc2 = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.drop(nnx.relu(self.fc1(x.reshape(len(x), -1)))))


def test_dropout_and_the_mode_of_the_model():
    digits, model = load_dataset("digits"), Dropped(nnx.Rngs(0))
    model.eval()
    apply_fn, variables = functional_variables(model)
    groups = wj.channel_groups(apply_fn, variables, digits.test_inputs[:1])
    plan = wj.make_plan(groups, {"fc1/kernel": np.arange(8) < 5})
    options = {"optimizer": sgd_recipe(0.1, steps=100), "epochs": 1, "seed": 0, "batch_size": 64}
    model.train()
    small = fit_shrunk(model, plan, plan.shrink(variables), digits, **options)
    assert small["fc1"]["kernel"].shape == (64, 5)
    assert not model.drop.deterministic
    with pytest.raises(ValueError, match="variables has no 'fc2'"):
        fit_shrunk(model, plan, {"fc1": plan.shrink(variables)["fc1"]}, digits, **options)
