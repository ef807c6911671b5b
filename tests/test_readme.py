"""Examples of the README and whole programs of the guides run as they stand, and do what is said there."""

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
import pytest
from flax import nnx

import woodjax as wj
from woodjax.adapters import nnx as bridge
from woodjax.datasets import load_dataset
from woodjax.models import MLP
from woodjax.training import evaluate, train

pytestmark = pytest.mark.newest  # 300 steps each; test_transform_frameworks does the same in 8

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def program(page, word):
    """The first block of a page with a word in it."""
    return next(block for block in blocks(page) if word in block)


@pytest.fixture(scope="module")
def trained():
    """What the reader of a guide has: a trained network, its loss, and examples."""
    data, model = load_dataset("digits"), MLP((64, 8, 10), rngs=nnx.Rngs(0))
    train(model, data, epochs=2, seed=0)
    apply_fn, params = bridge.functional(model)
    batch, loss_fn = (data.train_inputs[:40], data.train_labels[:40]), wj.cross_entropy(apply_fn)
    fisher = wj.low_rank_fisher(wj.per_example_gradients(loss_fn, params, batch))
    example = batch[0][0], batch[1][0]
    return {"loss_fn": loss_fn, "params": params, "batch": batch, "fisher": fisher, "example": example}


def kernels(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


def zeros(tree):
    return sum(int((w == 0).sum()) for w in kernels(tree)), sum(w.size for w in kernels(tree))


def run(block, names=()):
    names = dict(names)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "example", "exec"), names)
    return names, printed.getvalue().splitlines()


def test_quick_starts(tmp_path, monkeypatch):
    """The README from top to bottom, each start on from the names of the first."""
    monkeypatch.chdir(tmp_path)
    names, lines = run("\n".join(blocks("README.md")))
    data, (found, size) = names["data"], zeros(names["pruned"])
    assert found == round(0.9 * size)
    assert zeros(bridge.functional(names["model"])[1]) == (found, size)
    assert evaluate(names["apply_fn"], names["pruned"], data) > 0.85
    found, size = zeros(names["weights"])
    assert found == round(0.9 * size)
    assert float(names["change"]) > 0
    assert lines[0].startswith("empty layers: [] lowest density: 0.")
    macs = names["groups"].macs
    assert macs(names["plan"].kept) <= macs({}) / 4
    logits = names["network"](names["small"], data.test_inputs[:3])
    assert logits.shape == (3, 10)
    assert wj.load_pruned("small.safetensors")[1] == names["plan"]
    assert "<html" in Path("report.html").read_text()


def test_constraints(trained):
    """Every call gives what its comment says, here in two stages."""
    few = SimpleNamespace(**{**vars(wj), "prune_one_shot": partial(wj.prune_one_shot, stages=2)})
    names = trained | {"wj": few}
    calls = [ast.unparse(statement) for statement in ast.parse(program("docs/one_shot.md", "wj.NM(2, 4)")).body]
    (halved, *_), (blocked, *_), (floored, *_) = (eval(call, names) for call in calls[:3])
    for kernel in map(np.asarray, kernels(halved)):
        assert ((kernel.reshape(-1, 4, kernel.shape[-1]) != 0).sum(axis=1) == 2).all()
    for kernel in map(np.asarray, kernels(blocked)):
        groups = (kernel.reshape(-1, 4, kernel.shape[-1]) != 0).sum(axis=1)
        assert set(np.unique(groups)) <= {0, 4}
    assert all((np.asarray(kernel) != 0).mean() >= 0.01 for kernel in kernels(floored))
    found, size = zeros(floored)
    assert found == round(0.95 * size)
    made, _ = run("\n".join(calls[3:]), names)
    costs, masks = (jax.tree.leaves(made[name]) for name in ("costs", "masks"))
    of = [(cost, mask) for cost, mask in zip(costs, masks, strict=True) if mask.ndim > 1]
    assert sum(cost * int(mask.sum()) for cost, mask in of) <= 0.3 * sum(cost * mask.size for cost, mask in of)


def test_nnx():
    names, lines = run(program("docs/gradual.md", "nnx.jit"))
    assert [line.split(",")[0] for line in lines[-2:]] == ["250 sparsity 0.886", "300 sparsity 0.900"]
    apply_fn, params = bridge.functional(names["model"])
    assert evaluate(apply_fn, params, names["data"]) > 0.9
    masks = bridge.masks(names["optimizer"])
    assert float(1 - masks["fc1"]["kernel"].mean()) == pytest.approx(0.9, abs=0.08)


def test_linen():
    names, lines = run(program("docs/gradual.md", "TrainState"))
    assert lines == ["sparsity 0.900"]
    data = names["data"]._replace(test_inputs=names["data"].test_inputs.reshape(-1, 64))
    apply_fn = lambda params, x: names["module"].apply({"params": params}, x)
    assert evaluate(apply_fn, names["state"].params, data) > 0.85
    assert int(wj.get_info(names["state"].opt_state).step) == 301


def test_before_training():
    names, lines = run(program("docs/at_init.md", "evaluate_model"))
    assert lines[0].startswith("empty layers: [] lowest density: 0.")
    assert float(lines[1].removeprefix("test accuracy ")) > 0.85
    _, params = bridge.functional(names["model"])
    kernels = [(params[layer]["kernel"], leaves["kernel"]) for layer, leaves in names["masks"].items()]
    assert sum(int((~mask).sum()) for _, mask in kernels) == round(0.9 * (64 * 64 + 64 * 32))
    assert all((kernel[~mask] == 0).all() and (kernel[mask] != 0).all() for kernel, mask in kernels)


def test_smaller_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, lines = run(program("docs/structured.md", "fit_shrunk"))
    macs, left, accuracy = re.fullmatch(r"([\d,]+) multiply-adds, ([\d,]+) left, test accuracy (.*)", lines[0]).groups()
    assert macs == "6,464"
    assert 0 < int(left.replace(",", "")) <= 6464 // 4
    assert float(accuracy) > 0.85
    small, plan = wj.load_pruned("small.safetensors")
    assert plan == names["plan"]
    assert small["fc1"]["kernel"].shape == (64, int(plan.kept["fc1/kernel"].sum()))


def test_many_devices():
    command = [sys.executable, "-c", program("docs/scale.md", "os.environ")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    spec, sparsity = done.stdout.rsplit(" ", 1)
    assert "block" in spec
    assert float(sparsity) == pytest.approx(0.8, abs=1e-3)
