"""The command: what it leaves behind, and how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from woodjax.cli import main

SMALL = [
    "--epochs",
    "3",
    "--examples",
    "64",
    "--stages",
    "2",
    "--sparsity",
    "0.3",
    "0.5",
]  # stages of auto grow with them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["prune", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.mark.newest
def test_report(run):
    report = json.loads((run / "report.json").read_text())
    assert report["network"] == "digits-mlp"
    assert report["dense_accuracy"] > 0.7
    assert report["config"]["seed"] == 0
    results = report["results"]
    assert {r["method"] for r in results} == {
        "magnitude",
        "diagonal",
        "woodfisher",
        "auto",
        "joint",
        "joint-staged",
    }
    for result in results:
        assert result["reached"] == pytest.approx(result["sparsity"], abs=1e-4)
        assert 0 <= result["accuracy"] <= 1
        assert set(result["leaf_density"]) == {"fc1/kernel", "fc2/kernel", "fc3/kernel"}
    columns = {r["method"]: r["column"] for r in results}
    assert columns["magnitude"] == "mask"
    assert columns["joint"] == "update"
    assert columns["joint-staged"] == columns["auto"] == "staged"


@pytest.mark.newest
def test_arrays_are_the_pruned_network(run):
    for file in sorted((run / "arrays").glob("*.safetensors")):
        arrays = load_file(file)
        kernels = [name.removeprefix("masks/") for name in arrays if name.startswith("masks/fc")]
        pruned = 0
        for name in kernels:
            mask, weights = arrays[f"masks/{name}"], arrays[f"params/{name}"]
            assert mask.dtype == bool
            assert not weights[~mask].any()
            pruned += int((~mask).sum())
        assert pruned == round(float(file.stem.rsplit("-", 1)[1]) * 6464)


@pytest.mark.newest
def test_picture(run):
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.newest
def test_page_shows_the_best_network(run):
    results = [r for r in json.loads((run / "report.json").read_text())["results"] if r["sparsity"] == 0.5]
    best = max(results, key=lambda result: result["accuracy"])
    html = (run / "report.html").read_text(encoding="utf-8")
    assert f"{best['title']}: the most accurate of 6 methods" in html
    assert f"<b>{100 * best['accuracy']:.2f} %</b>" in html


@pytest.mark.newest
def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    assert main(["prune", *SMALL, "--method", "joint-staged", "--out", str(tmp_path)]) == 0
    name = "arrays/joint-staged-0.5.safetensors"
    first, second = load_file(run / name), load_file(tmp_path / name)
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Unknown dataset 'imagenet'"),
        (["--network", "lenet"], "Unknown network 'lenet'"),
        (["--method", "magic"], "Unknown method 'magic'"),
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--damping", "0"], "damping is 0.0"),
        (["--damping", "0%"], "--damping is '0%'"),
        (["--damping", "much"], "--damping is 'much'"),
        (["--stages", "1"], "stages is 1"),
        (["--epochs", "0"], "epochs is 0"),
        (["--examples", "0"], "--examples and --microbatch-size"),
        (["--block-size", "0"], "block_size is 0"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "No mnist in nowhere"),
        (["--weights", "nowhere.safetensors"], "No weights file"),
        (["--network", "resnet20"], "does not take the inputs of 'digits'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert main(["prune", "--epochs", "1", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("woodjax: error: ")
    assert error.count("\n") == 1


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "woodjax", "prune", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--sparsity" in done.stdout
    bad = [sys.executable, "-m", "woodjax", "prune", "--sparsity", "x"]
    refused = subprocess.run(bad, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_everything_can_go(tmp_path):
    assert main(["prune", *SMALL[:6], "--sparsity", "1", "--method", "magnitude", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["reached"] == 1
