"""Latency of dense and smaller networks side by side, beside their multiply-adds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import Recorder
from structured_zoo import Kind, drawn

import woodjax as wj
from woodjax import models
from woodjax.adapters.nnx import functional_variables
from woodjax.deployment import measure
from woodjax.deployment.measurement import Variant

WIDE = {
    "Wide ResNet-10-4, 64 to 256 channels": Kind(lambda rngs: models.WideResNet(10, 4, rngs=rngs), (32, 32, 3)),
    "VGG-11, 64 to 512 channels": Kind(models.vgg11_bn, (32, 32, 3)),
    "ViT, width 192": Kind(
        lambda rngs: models.ViT(image_size=32, patch=4, width=192, depth=4, heads=6, rngs=rngs), (32, 32, 3)
    ),
    "MLP, 2 × 2048": Kind(lambda rngs: models.MLP((784, 2048, 2048, 10), rngs=rngs), (784,)),
}
BUDGETS = (0.5, 0.25)  # of the multiply-adds


def record_narrow(
    record: Recorder,
    model: nnx.Module,
    narrow: nnx.Module,
    images: np.ndarray,
    *,
    batches: tuple[int, ...],
    repeats: int,
    round_to: int,
) -> None:
    """Dense, masked, smaller and implanted networks, and one that is built with half the widths."""
    apply_fn, variables = functional_variables(model)
    groups = wj.channel_groups(apply_fn, variables, images[:1])
    scores = wj.l2_channel_scores(groups, variables, relative=True)
    plans = {
        name: wj.make_plan(groups, *wj.select_channels(groups, scores, macs=0.5, round_to=round_to, **options))
        for name, options in {"shrunk": {}, "implanted": {"implants": 0.3}}.items()
    }
    half = wj.make_plan(groups, {group.name: np.arange(group.size) < group.size // 2 for group in groups.groups})
    narrow.eval()
    variants = {
        "dense": (apply_fn, variables),
        "masked": (apply_fn, wj.apply_masks(variables, plans["shrunk"].masks(variables))),
        **{name: (wj.shrunk_network(apply_fn, plan), plan.shrink(variables)) for name, plan in plans.items()},
        "half of every group": (wj.shrunk_network(apply_fn, half), half.shrink(variables)),
        "built with half the widths": functional_variables(narrow),
        "dense again": (apply_fn, variables),
    }
    _record(record, variants, images, batches=batches, repeats=repeats, round_to=round_to)


def record_wide(
    recorder: Callable[[str], Recorder], names: list[str], *, batches: tuple[int, ...], repeats: int, round_to: int
) -> None:
    """Networks that are wide enough for the hardware to show what smaller products are worth."""
    random = np.random.default_rng(0)
    for name in names:
        apply_fn, variables = drawn(WIDE[name], random)
        images = random.normal(size=(1, *WIDE[name].shape)).astype(np.float32)
        groups = wj.channel_groups(apply_fn, variables, images)
        scores = wj.l2_channel_scores(groups, variables, relative=True)
        variants: dict[str, Variant] = {"dense": (apply_fn, variables)}
        for budget in BUDGETS:
            plan = wj.make_plan(groups, *wj.select_channels(groups, scores, macs=budget, round_to=round_to))
            variants[f"shrunk to {budget:g}"] = wj.shrunk_network(apply_fn, plan), plan.shrink(variables)
        variants["dense again"] = apply_fn, variables
        _record(recorder(name), variants, images, batches=batches, repeats=repeats, round_to=round_to)


def _record(
    record: Recorder,
    variants: dict[str, Variant],
    images: np.ndarray,
    *,
    batches: tuple[int, ...],
    repeats: int,
    round_to: int,
) -> None:
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)  # a quick run sets it
    for batch in batches:
        inputs = jnp.asarray(np.resize(images, (batch, *images.shape[1:])))
        rows = measure(variants, inputs, repeats=repeats, progress=True)
        print(rows)
        for row in rows:
            values = {
                "latency_ratio": (row.latency / rows[0].latency, "1"),
                "latency": (row.latency, "s"),
                "macs_ratio": (row.multiply_adds / rows[0].multiply_adds, "1"),
                "macs": (row.multiply_adds / batch, "multiply-adds an image"),
                "parameters": (row.parameters, "1"),
                "bytes_on_disk": (row.bytes_on_disk, "bytes"),
            }
            for metric, (value, unit) in values.items():
                config = {"batch": batch, "round_to": round_to}
                record.add(metric, value, unit, method=row.name, column=None, seed=0, config=config)
