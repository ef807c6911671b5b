"""Two processes of two devices: every stage against one device; a process that is killed; a restart to the same bits.

What is killed leaves a folder that one device goes on from as well.
"""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import free_port, run_processes
from processes_job import HEARTBEAT, examples, network, prune

import woodjax as wj

JOB = Path(__file__).with_name("processes_job.py")
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "multihost.py"
LIMIT = 100  # seconds after which a launch is killed: it fails, and does not hang


def said(ended):
    return "\n".join(f"process {i}: {one.returncode}\n{one.output[-6000:]}" for i, one in enumerate(ended))


def launch(folder, kill=0):
    port = str(free_port())
    commands = [[str(JOB), port, str(process), str(folder), str(kill)] for process in range(2)]
    return run_processes(commands, devices=2, timeout=LIMIT)


class StoppedError(Exception):
    pass


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def whole():
    return prune(network(), examples())


@pytest.fixture
def stopped_after_one(tmp_path):
    """A folder that a run has left, and what it handed out."""
    seen = []
    with wj.StageCheckpoints(tmp_path, network()) as saved:

        def on_stage(stage):
            saved.save(stage)
            seen.append(stage)
            raise StoppedError

        with pytest.raises(StoppedError):
            prune(network(), examples(), on_stage=on_stage, resume=saved.last())
    return tmp_path, seen[0]


def test_two_processes_agree_with_one_device(tmp_path):
    """The benchmark itself, which starts its processes; the damping is 1 times the mean diagonal."""
    out = tmp_path / "out.jsonl"
    command = [str(BENCHMARK), "--processes", "2", "--devices", "2", "--quick", "--json", str(out)]
    (ended,) = run_processes([[*command, "--timeout", str(LIMIT)]], devices=2, timeout=LIMIT + 10)
    assert ended.returncode == 0, ended.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(r["method"], r["column"]): r["value"] for r in records if r["metric"] == "max_difference"}
    alone = {("blocks", stage) for stage in ("gradients", "scores", "masks", "update")}
    assert set(found) == {("low rank", "one shot")} | alone
    assert all(value < 1e-6 for value in found.values()), found
    assert all(r["config"]["processes"] == 2 and r["config"]["devices"] == 4 for r in records)


def test_a_killed_process_ends_the_other_and_both_go_on(tmp_path, whole):
    ended = launch(tmp_path, kill=1)
    survivor, killed = ended
    assert killed.returncode == -signal.SIGKILL, said(ended)
    assert survivor.returncode in (1, -signal.SIGABRT), said(ended)  # a lost connection, or no heartbeat
    assert survivor.seconds - killed.seconds < 3 * HEARTBEAT, said(ended)
    assert "saved 2" not in survivor.output
    with wj.StageCheckpoints(tmp_path, network()) as saved:  # on one device
        pruned, masks, info = prune(network(), examples(), resume=saved.last())
    for ours, theirs in zip(arrays((masks, info.sparsity)), arrays((whole[1], whole[2].sparsity)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, weights in pruned.items():
        np.testing.assert_allclose(weights, whole[0][name], atol=1e-5)
    again = launch(tmp_path)
    for one in again:
        assert one.returncode == 0, said(again)
        assert "from 1" in one.output
        assert "the same bits" in one.output


def test_stopped_and_resumed_to_the_same_bits(whole, stopped_after_one):
    """From the stage itself, and from the file; a run that is done is handed back."""
    folder, stage = stopped_after_one
    for resume in (stage, None):
        with wj.StageCheckpoints(folder, network()) as saved:
            resumed = prune(network(), examples(), on_stage=saved.save, resume=resume or saved.last())
            assert jax.tree.structure(resumed) == jax.tree.structure(whole)
            for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


def test_what_is_of_another_run_is_refused(stopped_after_one):
    folder, stage = stopped_after_one
    with pytest.raises(ValueError, match=r"resume is of a run with Plan\(stages=3, .*and this one has Plan\(stages=2"):
        prune(network(), examples(), resume=stage, stages=2)
    with pytest.raises(ValueError, match="resume holds no stage that is done"):
        prune(network(), examples(), resume=wj.Stage(stage.params, stage.masks, None))
    with pytest.raises(ValueError, match=r"resume.masks has the structure"):
        prune(network(), examples(), resume=stage._replace(masks={}))
    with wj.StageCheckpoints(folder, network()) as saved, pytest.raises(ValueError, match="saw no data"):
        saved.save(wj.Stage(stage.params, stage.masks, None))
    with pytest.raises(ValueError, match=r"holds a run with other settings: target None there and 0.9 here"):
        wj.StageCheckpoints(folder, network(), settings={"target": 0.9})


def test_one_process_fails_as_usual():
    with pytest.raises(StoppedError), wj.fail_together():
        raise StoppedError
