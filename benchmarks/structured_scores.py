"""Scores of channels and what is done after, by the names that the records have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

import woodjax as wj
from woodjax.typing import ApplyFn, Batch, Params

PROBES = (3, 10, 30, 300)
ROW_IMAGES = 128  # whose Gauss–Newton rows make the curvature of the whole network
MOMENT_IMAGES = 512


@dataclass(frozen=True)
class Case:
    """A trained network, its channels, and images to score them with."""

    apply_fn: ApplyFn
    params: Params
    groups: wj.ChannelGroups
    images: Any  # [n, ...]
    labels: Any
    seed: int
    row_images: int = ROW_IMAGES

    @cached_property
    def batch(self) -> Batch:
        """Images and labels for traces."""
        return self.images[: self.row_images], self.labels[: self.row_images]

    @cached_property
    def exact(self) -> Params:
        """Diagonal of the Gauss–Newton matrix."""
        return wj.gauss_newton_diagonal(self.apply_fn, self.params, self.batch[0], microbatch_size=32)

    @cached_property
    def curvature(self) -> wj.LowRankFisher:
        """The Gauss–Newton matrix of the whole network on some images."""
        rows = wj.all_class_gradients(self.apply_fn, self.params, self.batch[0], microbatch_size=16)
        return wj.low_rank_fisher(rows, damping=wj.Relative(1e-2), select=lambda path, leaf: True)

    @cached_property
    def moments(self) -> wj.InputMoments:
        """What kernels read."""
        images = self.images[:MOMENT_IMAGES]
        return wj.input_moments(self.groups, self.apply_fn, self.params, images, microbatch_size=32)

    @cached_property
    def obs(self) -> wj.ChannelScores:
        """Group OBS scores."""
        return wj.obs_channel_scores(self.groups, self.params, self.curvature)

    def hutchinson(self, probes: int) -> wj.ChannelScores:
        """The published scores."""
        loss_fn, key = wj.cross_entropy(self.apply_fn), jax.random.key(1000 + self.seed)
        options = {"microbatch_size": len(self.batch[1]), "probes_at_once": 1}
        return wj.hap_scores(
            self.groups,
            self.params,
            wj.hutchinson_diagonal(loss_fn, self.params, self.batch, key, probes=probes, **options).diagonal,
        )

    def fisher(self) -> wj.ChannelScores:
        """HAP with the diagonal of the empirical Fisher."""
        gradients = wj.per_example_gradients(
            wj.cross_entropy(self.apply_fn), self.params, self.batch, microbatch_size=32
        )
        return wj.hap_scores(self.groups, self.params, jax.tree.map(lambda g: (g**2).mean(0), gradients))

    def taylor(self) -> wj.ChannelScores:
        """First order."""
        gradient = wj.mean_gradient(wj.cross_entropy(self.apply_fn), self.params, self.batch)
        return wj.taylor_channel_scores(self.groups, self.params, gradient)

    def compensated(self, kept: Mapping[str, np.ndarray]) -> Params:
        """All survivors moved by the curvature of the whole network."""
        updates = wj.compensate_channels(self.groups, self.params, kept, self.curvature)
        return optax.apply_updates(self.params, updates)

    def refitted(self, kept: Mapping[str, np.ndarray]) -> Params:
        """Kernels that read what was removed, by least squares."""
        updates = wj.reconstruct_channels(self.groups, self.params, kept, self.moments)
        return optax.apply_updates(self.params, updates)

    def masked(self, kept: Mapping[str, np.ndarray]) -> Params:
        """Nothing moved."""
        return wj.apply_masks(self.params, wj.make_plan(self.groups, kept).masks(self.params))


Scores = Callable[[Case], wj.ChannelScores]
After = Callable[[Case, Mapping[str, np.ndarray]], Params]


def methods(probes: tuple[int, ...]) -> dict[str, tuple[Scores, After]]:
    """Scores, and what is done after, in the order in which they are measured."""
    return {
        "random": (lambda case: wj.random_channel_scores(case.groups, jax.random.key(case.seed)), Case.masked),
        "bn-scale": (lambda case: wj.bn_scale_scores(case.groups, case.params), Case.masked),
        "l2": (lambda case: wj.l2_channel_scores(case.groups, case.params), Case.masked),
        "taylor": (Case.taylor, Case.masked),
        "hap-fisher": (Case.fisher, Case.masked),
        "hap-exact": (lambda case: wj.hap_scores(case.groups, case.params, case.exact), Case.masked),
        **{f"hap-{n}": (lambda case, n=n: case.hutchinson(n), Case.masked) for n in probes},
        "gate": (
            lambda case: wj.gate_scores(case.groups, case.apply_fn, case.params, case.batch[0]),
            Case.masked,
        ),
        "joint-gate": (
            lambda case: wj.joint_gate_scores(case.groups, case.apply_fn, case.params, case.batch[0]),
            Case.masked,
        ),
        "obs": (lambda case: case.obs, Case.masked),
        "obs+compensation": (lambda case: case.obs, Case.compensated),
        "hap-exact+least-squares": (
            lambda case: wj.hap_scores(case.groups, case.params, case.exact),
            Case.refitted,
        ),
        "obs+least-squares": (lambda case: case.obs, Case.refitted),
    }
