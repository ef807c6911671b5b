"""A valid call of every public function, on arrays as small as they can be: what `robustness_calls.py` spoils."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import woodjax as wj

EXAMPLES, INPUTS, HIDDEN, CLASSES = 4, 3, 4, 2


def apply_fn(params, inputs):
    return jnp.tanh(inputs @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]


def linear_fn(params, inputs):
    return (inputs @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]


def loss_fn(params, example):
    inputs, label = example
    return -jax.nn.log_softmax(apply_fn(params, inputs[None])[0].astype(jnp.float32))[label]


def metric(params, example):
    return jnp.tanh(loss_fn(params, example))  # within [0, 1]


def held_out_losses(params):
    return jnp.stack([loss_fn(params, (x, label)) for x, label in zip(*batch(), strict=True)])


def layer_fn(params, inputs):
    return jnp.tanh(inputs @ params["kernel"])


def square_loss(hidden, targets):
    return 0.5 * jnp.sum((hidden - targets) ** 2)


def stats_fn(params, stats, batch):
    assert jnp.shape(params["a"]["kernel"]) == (INPUTS, HIDDEN)
    assert jnp.shape(params["b"]) == (HIDDEN, CLASSES)
    return {"mean": 0.5 * stats["mean"] + 0.5 * batch.mean(0)}


@cache
def params():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (INPUTS, HIDDEN)), "bias": jax.random.normal(keys[1], (HIDDEN,))},
        "b": jax.random.normal(keys[2], (HIDDEN, CLASSES)),
    }


@cache
def inputs():
    return jax.random.normal(jax.random.key(2), (EXAMPLES, INPUTS))


def batch():
    return inputs(), jnp.array([0, 1, 1, 0])


@cache
def gradients():
    return wj.per_example_gradients(loss_fn, params(), batch())


@cache
def stream():
    return wj.stream_gradients(loss_fn, params(), batch())


def mean():
    return jax.tree.map(lambda g: g.mean(0), gradients())


@cache
def fisher():
    return wj.low_rank_fisher(gradients())


@cache
def blocks():
    return wj.block_fisher(gradients(), block_size=4)


@cache
def scores():
    return wj.magnitude_scores(params())


@cache
def masks():
    return wj.make_masks(scores(), 0.5)


@cache
def groups():
    return wj.channel_groups(apply_fn, params(), inputs()[:1])


@cache
def channel_scores():
    return wj.l2_channel_scores(groups(), params())


def kept():
    return {group.name: np.arange(group.size) % 2 == 0 for group in groups().groups}


@cache
def plan():
    return wj.make_plan(groups(), kept())


@cache
def small():
    return plan().shrink(params())


@cache
def moments():
    return wj.input_moments(groups(), apply_fn, params(), inputs())


@cache
def folder():
    place = Path(tempfile.mkdtemp())
    wj.save_arrays(place / "arrays.safetensors", params())
    wj.save_masks(place / "masks.safetensors", masks())
    wj.save_pruned(place / "pruned.safetensors", small(), plan())
    return place


@cache
def program():
    return wj.export_stablehlo(apply_fn, params(), inputs())


@cache
def compiled():
    return jax.jit(apply_fn).lower(params(), inputs()).compile()


@cache
def optimizer():
    return wj.prune_transform(optax.sgd(0.1))


@cache
def opt_state():
    return optimizer().init(params())


def rows(m=EXAMPLES, b=3):
    return jax.random.normal(jax.random.key(3), (m, b))


def kernel():
    return jax.random.normal(jax.random.key(4), (4, 3))


def hessian():
    x = jax.random.normal(jax.random.key(5), (8, 4))
    return x.T @ x / 8


def layers():
    return [wj.HostLayer(layer_fn, {"kernel": np.asarray(kernel()[:, :1] * np.ones((1, 4)), np.float32)})]


def hidden():
    return np.asarray(jax.random.normal(jax.random.key(6), (EXAMPLES, 4)), np.float32)


def key():
    return jax.random.key(0)


def network():
    return {"params": params(), "inputs": inputs(), "apply_fn": apply_fn}


def loss():
    return {"loss_fn": loss_fn, "params": params(), "batch": batch()}


def scored(**more):
    return loss() | {"key": key()} | more


def timed(**more):
    return {"begin": 10, "end": 50, "every": 10} | more


def whitener():
    return wj.whiten_gram(rows(), 0.1)


def channels(*names):
    return {"groups": groups()} | {name: network()[name] for name in names}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "Block": lambda: {"size": 2, "axis": -2},
    "HostLayer": lambda: {"apply": layer_fn, "params": {"kernel": kernel()}},
    "LayerFile": lambda: {
        "apply": layer_fn,
        "source": folder() / "arrays.safetensors",
        "destination": folder() / "out",
    },
    "NM": lambda: {"n": 1, "m": 2},
    "Relative": lambda: {"alpha": 0.1},
    "StageCheckpoints": lambda: {"folder": folder() / "stages", "params": params(), "keep": 2},
    "all_class_gradients": lambda: network() | {"microbatch_size": 2},
    "apply_masks": lambda: {"tree": params(), "masks": masks()},
    "betting_p_value": lambda: {"values": np.array([0.1, 0.2, 0.0]), "mean": 0.5, "level": 0.05},
    "block_fisher": lambda: {
        "gradients": gradients(),
        "block_size": 4,
        "damping": 0.1,
        "engine": "auto",
        "batch_axes": 0,
    },
    "bn_scale_scores": lambda: channels("params") | {"select": lambda path, leaf: path == "a/bias"},
    "budget_masks": lambda: {
        "scores": scores(),
        "costs": {"a": {"kernel": np.array(2), "bias": np.array(0)}, "b": np.array(1)},
        "budget": 0.5,
        "power": 1.0,
        "previous": None,
        "floor": 0.0,
    },
    "channel_groups": lambda: {
        "apply_fn": apply_fn,
        "variables": params(),
        "inputs": inputs()[:1],
        "streams": "joint",
        "unknown": "error",
    },
    "check_loss": lambda: {"loss_fn": loss_fn, "params": params(), "example": jax.tree.map(lambda x: x[0], batch())},
    "check_rebuilt": lambda: {
        "rebuilt_fn": apply_fn,
        "network": wj.shrunk_network(apply_fn, plan()),
        "variables": small(),
        "inputs": inputs(),
        "tolerance": 1e-4,
    },
    "choose_update": lambda: {
        "params": params(),
        "masks": masks(),
        "curvature": fisher(),
        "gradient": mean(),
        "search": wj.UpdateSearch(),
        "held_out_losses": held_out_losses,
    },
    "collectives": lambda: {"compiled": compiled()},
    "column_sweep": lambda: {
        "kernel": kernel(),
        "hessian": hessian(),
        "sparsity": 0.5,
        "block_size": 2,
        "damping": 0.1,
    },
    "compensate": lambda: {
        "params": params(),
        "masks": masks(),
        "curvature": fisher(),
        "method": "joint",
        "gradient": mean(),
    },
    "compensate_channels": lambda: channels("params") | {"kept": kept(), "curvature": fisher(), "gradient": mean()},
    "contract": lambda: {"subscripts": "ij,jk->ik", "operands": (jnp.ones((2, 3)), jnp.ones((3, 2)))},
    "cost_table": lambda: {"costs": {"one": wj.scaling_cost(1000, 64, 2, wj.TPU_V5E)}},
    "count_macs": lambda: {"apply_fn": apply_fn, "variables": params(), "inputs": inputs()},
    "cross_entropy": lambda: {"apply_fn": apply_fn, "temperature": 1.0},
    "cubic_schedule": lambda: timed(target=0.9, initial=0.0),
    "diagonal_curvature": lambda: {
        "diagonal": jax.tree.map(jnp.square, params()),
        "damping": 0.1,
        "negative": "clip",
        "batch_axes": 0,
    },
    "diagonal_fisher": lambda: {"gradients": gradients(), "damping": 0.1, "batch_axes": 0},
    "dual_inverse": lambda: {"gradients": rows(), "damping": 0.1},
    "dual_inverse_diagonal": lambda: {"gradients": rows(), "whitener": whitener()},
    "dual_solve": lambda: {"gradients": rows(), "whitener": whitener(), "vector": jnp.ones(3)},
    "effective_masks": lambda: (
        network() | {"apply_fn": linear_fn, "masks": masks(), "batch": inputs(), "seed": 0, "inputs": ...}
    ),
    "empirical_fisher": lambda: {
        "gradients": gradients(),
        "block_size": 4,
        "damping": 0.1,
        "engine": "auto",
        "memory_budget": 2**24,
        "batch_axes": 0,
    },
    "estimate": lambda: {
        "gradients": gradients(),
        "block_size": 4,
        "engine": "auto",
        "damping": 0.1,
        "memory_budget": 2**24,
        "batch_axes": 0,
    },
    "exact_obs": lambda: {"params": params(), "fisher": blocks(), "sparsity": 0.5, "previous": masks()},
    "expand_group_masks": lambda: {
        "kept": {"a": {"kernel": jnp.arange(4) % 2 == 0, "bias": jnp.zeros(0, bool)}, "b": jnp.arange(2) % 2 == 0},
        "params": params(),
        "pattern": wj.Filters(),
        "batch_axes": 0,
    },
    "exponential_schedule": lambda: timed(target=0.9, initial=0.0),
    "export_stablehlo": lambda: {"apply_fn": apply_fn, "variables": params(), "inputs": inputs()},
    "find_state": lambda: {"opt_state": opt_state()},
    "fisher_inverse": lambda: {"fisher": hessian(), "damping": 0.1},
    "fisher_obs_scores": lambda: scored(damping=0.1, microbatch_size=2),
    "fisher_scores": lambda: scored(form="diagonal", microbatch_size=2),
    "fitting_cost": lambda: {"d": 1000, "m": 64, "devices": 2, "hardware": wj.TPU_V5E},
    "from_bcoo": lambda: {"tree": wj.to_bcoo(params(), masks())},
    "gate_channels": lambda: channels("apply_fn", "params", "inputs"),
    "gate_scores": lambda: channels("apply_fn", "params", "inputs") | {"microbatch_size": 2},
    "gathered_bytes": lambda: {"compiled": compiled()},
    "gauss_newton_diagonal": lambda: network() | {"microbatch_size": 2},
    "gauss_newton_scores": lambda: (
        network() | {"batch": batch(), "inputs": ..., "form": "diagonal", "microbatch_size": 2}
    ),
    "get_info": lambda: {"opt_state": opt_state()},
    "get_masks": lambda: {"opt_state": opt_state()},
    "grad_norm_scores": lambda: scored(microbatch_size=2),
    "gradient_window": lambda: {"size": 4, "examples_per_gradient": 1, "memory_budget": None},
    "gram": lambda: {"gradients": rows(), "kept": jnp.array([True, False, True])},
    "grasp_scores": lambda: scored(microbatch_size=2),
    "group_scores": lambda: {
        "params": params(),
        "curvature": fisher(),
        "pattern": wj.Filters(),
        "gradient": mean(),
        "batch_axes": 0,
    },
    "hap_scores": lambda: channels("params") | {"diagonal": jax.tree.map(jnp.square, params())},
    "hap_trace_scores": lambda: scored(
        groups=groups(), probes=4, probes_at_once=2, signs="batch", tolerance=None, microbatch_size=2
    ),
    "hidden_kernels": network,
    "hoeffding_bentkus_p_value": lambda: {"values": np.array([0.1, 0.2, 0.0]), "mean": 0.5},
    "hutchinson_axis_traces": lambda: scored(
        axis=-1, probes=10, probes_at_once=2, signs="batch", tolerance=None, microbatch_size=2
    ),
    "hutchinson_diagonal": lambda: scored(
        probes=10, probes_at_once=2, signs="batch", tolerance=None, microbatch_size=2
    ),
    "hutchinson_scores": lambda: scored(form="diagonal", probes=10, microbatch_size=2),
    "hutchinson_trace": lambda: scored(probes=10, probes_at_once=2, signs="batch", tolerance=None, microbatch_size=2),
    "hutchinson_sums": lambda: scored(
        sums=lambda tree: jax.tree.map(jnp.sum, tree),
        probes=10,
        probes_at_once=2,
        signs="batch",
        tolerance=None,
        microbatch_size=2,
    ),
    "hvp": lambda: loss() | {"vector": params(), "microbatch_size": 2},
    "input_moments": lambda: channels("apply_fn", "params", "inputs") | {"microbatch_size": 2},
    "is_kernel": lambda: {"path": "a", "leaf": jax.ShapeDtypeStruct((2, 2), "float32")},
    "joint_gate_scores": lambda: channels("apply_fn", "params", "inputs") | {"microbatch_size": 2},
    "joint_step_gram": lambda: {
        "gradients": rows(),
        "damping": 0.1,
        "weights": jnp.ones(3),
        "kept": jnp.array([True, False, True]),
        "gradient": jnp.ones(3),
    },
    "joint_step_inverse": lambda: {
        "inverse": hessian(),
        "weights": jnp.ones(4),
        "kept": jnp.array([True, False, True, True]),
        "gradient": jnp.ones(4),
    },
    "joint_steps_gram": lambda: {
        "gradients": rows(),
        "dampings": jnp.array([0.1, 1.0]),
        "weights": jnp.ones(3),
        "kept": jnp.array([True, False, True]),
        "gradient": jnp.ones(3),
    },
    "kronecker_fisher": lambda: {"stream": stream(), "damping": 0.1},
    "l2_channel_scores": lambda: channels("params"),
    "largest_gather": lambda: {"compiled": compiled()},
    "layer_collapse_report": lambda: {"masks": masks(), "batch_axes": 0},
    "layer_input_hessian": lambda: {"stream": stream(), "damping": 0.1},
    "linear_schedule": lambda: timed(target=0.9, initial=0.0),
    "load_arrays": lambda: {"path": folder() / "arrays.safetensors", "like": params()},
    "load_masks": lambda: {"path": folder() / "masks.safetensors", "like": masks()},
    "load_pruned": lambda: {"path": folder() / "pruned.safetensors"},
    "load_stablehlo": lambda: {"program": program()},
    "low_rank_fisher": lambda: {"gradients": gradients(), "block_size": 4, "damping": 0.1, "batch_axes": 0},
    "magnitude_scores": lambda: {"params": params(), "batch_axes": 0},
    "make_layout": lambda: {"params": params(), "block_size": 4, "batch_axes": 0},
    "make_masks": lambda: {
        "scores": scores(),
        "sparsity": 0.5,
        "scope": "global",
        "previous": masks(),
        "batch_axes": 0,
        "floor": 0.1,
    },
    "make_plan": lambda: {"groups": groups(), "kept": kept(), "implanted": None},
    "mask_sparsity": lambda: {"masks": masks(), "scores": scores()},
    "masks_from_params": lambda: {"params": params()},
    "mean_gradient": lambda: loss() | {"microbatch_size": 2},
    "measure": lambda: {"variants": {"dense": (apply_fn, params())}, "inputs": inputs(), "repeats": 2},
    "microbatch_for": lambda: loss() | {"memory_budget": 2**22, "examples_per_gradient": 1},
    "nonfinite_scores": lambda: {"scores": scores()},
    "normalize_scores": lambda: {"scores": channel_scores(), "how": "mean"},
    "obd_scores": lambda: {"params": params(), "diagonal": jax.tree.map(jnp.square, params())},
    "obs_channel_scores": lambda: channels("params") | {"curvature": fisher(), "gradient": mean()},
    "obs_scores": lambda: {"params": params(), "curvature": fisher()},
    "one_shot_schedule": lambda: {"step": 5, "target": 0.9},
    "pack_nm": lambda: {
        "params": kernel(),
        "masks": jnp.arange(12).reshape(4, 3) // 3 % 2 == 0,
        "pattern": wj.NM(1, 2),
        "axis": -2,
    },
    "path_name": lambda: {"path": (jax.tree_util.DictKey("a"),)},
    "pattern_masks": lambda: {
        "params": params(),
        "curvature": fisher(),
        "pattern": wj.Filters(),
        "sparsity": 0.5,
        "scope": "global",
        "previous": None,
        "gradient": mean(),
        "floor": 0.0,
        "batch_axes": 0,
    },
    "per_example_gradients": lambda: loss() | {"microbatch_size": 2, "examples_per_gradient": 1},
    "predicted_loss_change": lambda: {"updates": params(), "curvature": fisher(), "gradient": mean()},
    "primal_inverse": lambda: {"gradients": rows(), "damping": 0.1},
    "prune_at_init": lambda: (
        network()
        | {
            "inputs": ...,
            "batch": batch(),
            "sparsity": 0.5,
            "key": key(),
            "criterion": "snip",
            "rounds": 1,
            "scope": "global",
            "floor": 0.0,
            "select": wj.is_kernel,
        }
    ),
    "prune_count": lambda: {"sparsity": 0.5, "size": 10},
    "prune_layers": lambda: {
        "layers": layers(),
        "hidden": hidden(),
        "sparsity": 0.5,
        "method": "sweep",
        "damping": 0.1,
        "block_size": 2,
        "microbatch_size": 2,
        "start": 0,
    },
    "prune_one_shot": lambda: (
        loss()
        | {
            "sparsity": 0.5,
            **wj.FIXED,
            "held_out": 0,
            "key": key(),
            "damping_multiples": (1.0,),
            "method": "joint",
            "step": 1.0,
            "stages": 1,
            "curvature": wj.low_rank_fisher,
            "microbatch_size": 2,
            "floor": 0.0,
            "scope": "global",
            "masks": masks(),
            "batch_axes": 0,
        }
    ),
    "prune_to_loss": lambda: (
        loss()
        | {
            "max_loss_increase": 0.5,
            "confidence": 0.9,
            "sparsities": (0.2, 0.4),
            "held_out": 0.5,
            "loss_bound": 1.0,
            "metric": metric,
            "prune": magnitude_prune,
            "test": "betting",
            "key": key(),
            "microbatch_size": 2,
        }
    ),
    "prune_transform": lambda: {
        "inner": optax.sgd(0.1),
        "schedule": wj.one_shot_schedule(3, 0.5),
        "fisher": wj.gradient_window(2),
        "method": "joint",
        "scope": "global",
        "batch_axes": 0,
        "recomputations": 1,
        "path": "exponential",
    },
    "random_channel_scores": lambda: {"groups": groups(), "key": key()},
    "random_scores": scored,
    "reconstruct_channels": lambda: channels("params") | {"kept": kept(), "moments": moments(), "damping": 1e-3},
    "reestimate_batch_stats": lambda: {
        "update_fn": stats_fn,
        "params": params(),
        "batch_stats": {"mean": jnp.zeros(INPUTS)},
        "batches": [inputs(), inputs()],
    },
    "refresh": lambda: loss() | {"opt_state": opt_state(), "sparsity": 0.5, "recomputations": 1},
    "refresh_masks": lambda: loss() | {"masks": masks(), "sparsity": 0.5, "recomputations": 1},
    "row_fisher": lambda: {"stream": stream(), "damping": 0.1},
    "sample_labels": lambda: network() | {"key": key()},
    "sampled_label_gradients": lambda: network() | {"key": key(), "samples": 2, "microbatch_size": 2},
    "save_arrays": lambda: {"path": folder() / "new.safetensors", "tree": params(), "metadata": None},
    "save_masks": lambda: {"path": folder() / "new.safetensors", "masks": masks()},
    "save_pruned": lambda: {"path": folder() / "new.safetensors", "variables": small(), "plan": plan()},
    "scaling_cost": lambda: {
        "d": 1000,
        "m": 64,
        "devices": 2,
        "hardware": wj.TPU_V5E,
        "data_devices": 1,
        "block_size": None,
        "window": None,
        "exchange": "auto",
        "microbatch_size": 1,
    },
    "schedule_of": lambda: timed(sparsity=lambda step: step / 100),
    "search_masks": lambda: {
        "params": params(),
        "masks": masks(),
        "curvature": fisher(),
        "gradient": mean(),
        "iterations": 1,
        "swaps": 2,
        "previous": None,
        "protected": None,
    },
    "select_channels": lambda: {
        "groups": groups(),
        "scores": channel_scores(),
        "ratio": 0.5,
        "implants": 0.0,
        "max_ratio": 0.95,
        "round_to": 1,
    },
    "set_masks": lambda: {"opt_state": opt_state(), "masks": masks()},
    "shrink_groups": lambda: {"groups": groups(), "plan": plan()},
    "shrunk_network": lambda: {"apply_fn": apply_fn, "plan": plan()},
    "shuffle_masks": lambda: {"masks": masks(), "key": key()},
    "snip_scores": lambda: scored(microbatch_size=2),
    "sparsity_path": lambda: {
        "params": params(),
        "curvature": fisher(),
        "sparsities": (0.2, 0.5),
        "scope": "global",
        "batch_axes": 0,
    },
    "split_batch": lambda: {"batch": batch(), "held_out": 2, "key": key()},
    "squared_output_gradients": lambda: {
        "layers": layers(),
        "hidden": hidden(),
        "loss_fn": square_loss,
        "targets": hidden(),
        "groups": 2,
        "microbatch_size": 2,
    },
    "stage_sparsities": lambda: {"target": 0.9, "stages": 3, "initial": 0.0, "path": "exponential"},
    "start_implants": lambda: (
        network()
        | {
            "params": ...,
            "variables": params(),
            "plan": plan(),
            "start": "least-squares",
            "rank": None,
            "ridge": 1e-6,
            "microbatch_size": 2,
        }
    ),
    "stream_gradients": lambda: (
        loss() | {"masks": masks(), "microbatch_size": 2, "examples_per_gradient": 1, "signs": None}
    ),
    "streamed_fisher": lambda: {"stream": stream(), "window_size": 4, "damping": 0.1, "batch_axes": 0},
    "synflow_scores": lambda: network() | {"inputs": ..., "batch": batch(), "key": key()},
    "taylor_channel_scores": lambda: channels("params") | {"gradient": mean()},
    "to_bcoo": lambda: {"params": params(), "masks": masks()},
    "unpack_nm": lambda: {"tree": wj.pack_nm(kernel(), jnp.arange(12).reshape(4, 3) // 3 % 2 == 0, wj.NM(1, 2))},
    "warm_up_batch_stats": lambda: {
        "update_fn": stats_fn,
        "params": params(),
        "batch_stats": {"mean": jnp.zeros(INPUTS)},
        "batches": [inputs(), inputs()],
    },
    "weight_macs": lambda: {"function": apply_fn, "params": params(), "example": inputs()},
    "whiten": lambda: {"matrix": hessian(), "damping": 0.1},
    "whiten_gram": lambda: {"gradients": rows(), "damping": 0.1, "kept": jnp.array([True, False, True])},
    "wire_bytes": lambda: {"collective": wj.Collective("all-gather", 8, 16, 2, 1, "here")},
    "woodbury_scan": lambda: {"gradients": rows(), "damping": 0.1},
    "woodbury_scan_rank_k": lambda: {"gradients": rows(), "damping": 0.1, "rank": 2},
    "woodtaylor_scores": lambda: {"params": params(), "curvature": fisher(), "gradient": mean()},
}

# Classes that functions fill in, protocols, and records of numbers: nobody writes a call of them with arrays.
MADE_BY_FUNCTIONS = {
    "Accumulator",
    "AtInitInfo",
    "AxisTraceEstimate",
    "BlockFisher",
    "BlockSums",
    "ChannelGroup",
    "ChannelScoreEstimate",
    "ChannelGroups",
    "ChannelScores",
    "CollapseReport",
    "Collective",
    "CoupledCurvature",
    "Curvature",
    "DampedInverse",
    "DiagonalEstimate",
    "DiagonalFisher",
    "DiagonalSums",
    "Estimate",
    "ExactObsInfo",
    "ExactSparsity",
    "Filters",
    "GradientRows",
    "GradientStream",
    "GradientWindow",
    "GroupCurvature",
    "GuaranteeInfo",
    "Hardware",
    "ImplantedKernel",
    "InitCriterion",
    "InputMoments",
    "KroneckerFisher",
    "LayerInfo",
    "LayerInputHessian",
    "Layout",
    "LowRankFisher",
    "Measurement",
    "Measurements",
    "OneShotInfo",
    "OutputGradients",
    "PackedNM",
    "Pattern",
    "PrunePlan",
    "PruneState",
    "RefreshInfo",
    "ResidentLayer",
    "RowFisher",
    "Rows",
    "ScalingCost",
    "Schedule",
    "SearchInfo",
    "Selection",
    "ShrunkNetwork",
    "SparsityPath",
    "Stage",
    "StreamedFisher",
    "SumEstimate",
    "SweptKernel",
    "TraceEstimate",
    "UpdateChoice",
    "UpdateSearch",
    "Whitener",
}


def magnitude_prune(batch, sparsity):
    del batch
    found = wj.make_masks(scores(), sparsity)
    return wj.apply_masks(params(), found), found, None


def call_of(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A public function and valid arguments by name."""
    return getattr(wj, name), {key: value for key, value in CASES[name]().items() if value is not ...}
