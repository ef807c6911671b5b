"""Examples of the README run as they stand, and do what it says."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import load_dataset
from woodjax.models import MLP
from woodjax.training import evaluate, train

pytestmark = pytest.mark.newest  # 300 steps each; test_transform_frameworks does the same in 8

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
AT_INIT = next(block for block in BLOCKS if "prune_at_init" in block)
SMALLER = next(block for block in BLOCKS if "channel_groups" in block)
MESH = next(block for block in BLOCKS if "make_mesh" in block)
NNX, LINEN = (next(b for b in BLOCKS if "prune_transform" in b and word in b) for word in ("nnx.jit", "TrainState"))
ONE_CALL = next(block for block in BLOCKS if "# a trained nnx.Module" in block)
VARIATIONS = next(block for block in BLOCKS if "prune_to_loss" in block)
SIX_WORDS = next(block for block in BLOCKS if "predicted_loss_change(updates, fisher)" in block)


@pytest.fixture(scope="module")
def trained():
    """What the README's reader has: a trained model, its loss, and examples."""
    data, model = load_dataset("digits"), MLP((64, 8, 10), rngs=nnx.Rngs(0))
    train(model, data, epochs=2, seed=0)
    apply_fn, params = bridge.functional(model)
    inputs, labels = data.train_inputs[:40], data.train_labels[:40]
    return {
        "wj": wj,
        "jax": jax,
        "optax": optax,
        "model": model,
        "apply_fn": apply_fn,
        "params": params,
        "loss_fn": wj.cross_entropy(apply_fn),
        "inputs": inputs,
        "labels": labels,
        "batch": (inputs, labels),
        "fresh_examples": (data.train_inputs[40:440], data.train_labels[40:440]),
    }


def kernels(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


def zeros(tree):
    return sum(int((w == 0).sum()) for w in kernels(tree)), sum(w.size for w in kernels(tree))


def run(block, names=()):
    names = dict(names)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, str(README), "exec"), names)
    return names, printed.getvalue().splitlines()


def test_one_call(trained):
    names, _ = run(ONE_CALL, trained)
    found, size = zeros(bridge.functional(names["model"])[1])
    assert found == round(0.9 * size)
    assert float(names["info"].sparsity[-1]) == pytest.approx(0.9, abs=1e-3)


def test_variations(trained):
    """Every line is one call; what comes back is what its comment says, here in two stages or levels."""
    short = {
        "prune_one_shot": partial(wj.prune_one_shot, stages=2),
        "prune_to_loss": partial(wj.prune_to_loss, sparsities=(0.3, 0.6)),
    }
    few = SimpleNamespace(**vars(wj) | short)
    trained = trained | {"wj": few}
    lines = [ast.unparse(statement) for statement in ast.parse(VARIATIONS).body]
    assert len(lines) == 5
    (halved, *_), (floored, *_), (taught, *_), promised = (eval(line, dict(trained)) for line in lines[:4])
    for kernel in kernels(halved):
        groups = np.asarray(kernel).reshape(-1, 4, kernel.shape[-1])
        assert ((groups != 0).sum(axis=1) == 2).all()
    assert all((np.asarray(kernel) != 0).mean() >= 0.01 for kernel in kernels(floored))
    for params in (floored, taught):
        found, size = zeros(params)
        assert found == round(0.95 * size)
    assert zeros(promised[0])[0] > 0
    names, _ = run(lines[4], trained)
    assert names["labels"].shape == (40,)
    assert set(np.asarray(names["labels"]).tolist()) <= set(range(10))


def test_six_words(trained):
    names, _ = run(SIX_WORDS, trained)
    found, size = zeros(names["params"])
    assert found == round(0.9 * size)
    assert float(names["change"]) > 0


def test_nnx():
    names, lines = run(NNX)
    assert [line.split(",")[0] for line in lines[-2:]] == ["250 sparsity 0.886", "300 sparsity 0.900"]
    apply_fn, params = bridge.functional(names["model"])
    assert evaluate(apply_fn, params, names["data"]) > 0.9
    masks = bridge.masks(names["optimizer"])
    assert float(1 - masks["fc1"]["kernel"].mean()) == pytest.approx(0.9, abs=0.08)


def test_linen():
    names, lines = run(LINEN)
    assert lines == ["sparsity 0.900"]
    data = names["data"]._replace(test_inputs=names["data"].test_inputs.reshape(-1, 64))
    apply_fn = lambda params, x: names["module"].apply({"params": params}, x)
    assert evaluate(apply_fn, names["state"].params, data) > 0.85
    assert int(wj.get_info(names["state"].opt_state).step) == 301


def test_before_training():
    names, lines = run(AT_INIT)
    assert lines[0].startswith("empty layers: [] lowest density: 0.")
    assert float(lines[1].removeprefix("test accuracy ")) > 0.85
    _, params = bridge.functional(names["model"])
    kernels = [(params[layer]["kernel"], leaves["kernel"]) for layer, leaves in names["masks"].items()]
    assert sum(int((~mask).sum()) for _, mask in kernels) == round(0.9 * (64 * 64 + 64 * 32))
    assert all((kernel[~mask] == 0).all() and (kernel[mask] != 0).all() for kernel, mask in kernels)


def test_smaller_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, lines = run(SMALLER)
    macs, left, accuracy = re.fullmatch(r"([\d,]+) multiply-adds, ([\d,]+) left, test accuracy (.*)", lines[0]).groups()
    assert macs == "6,464"
    assert 0 < int(left.replace(",", "")) <= 6464 // 4
    assert float(accuracy) > 0.85
    small, plan = wj.load_pruned("small.safetensors")
    assert plan == names["plan"]
    assert small["fc1"]["kernel"].shape == (64, int(plan.kept["fc1/kernel"].sum()))


def test_many_devices():
    command = [sys.executable, "-c", MESH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    spec, sparsity = done.stdout.rsplit(" ", 1)
    assert "block" in spec
    assert float(sparsity) == pytest.approx(0.8, abs=1e-3)
