"""Criteria at initialization by the names of the field."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from woodjax.at_init.second_order import fisher_obs_scores, fisher_scores, gauss_newton_scores, hutchinson_scores
from woodjax.at_init.sensitivity import (
    grad_norm_scores,
    grasp_scores,
    random_scores,
    snip_scores,
    synflow_scores,
)
from woodjax.criteria import magnitude_scores
from woodjax.typing import Batch, Params, Scores, Select


class InitCriterion(NamedTuple):
    """Scores at initialization, and how they are asked for.

    `scores(function, params, batch, key, *, select, check)`: `function` is the loss of one example, or the network.
    """

    title: str
    scores: Callable[..., Scores]
    asks: Literal["loss", "network"] = "loss"
    temperature: float = 1.0  # divides the logits of the loss
    rounds: int = 1  # as published
    data: bool = True  # does it need labelled examples?


def _magnitude(function: Any, params: Params, batch: Batch, key: Any, *, select: Select, check: bool = True) -> Scores:
    del function, batch, key, check
    return magnitude_scores(params, select=select)


def _random(function: Any, params: Params, batch: Batch, key: Any, *, select: Select, check: bool = True) -> Scores:
    del check
    return random_scores(function, params, batch, key, select=select)


PAPER_TEMPERATURE = 200.0

INIT_CRITERIA: dict[str, InitCriterion] = {
    "random": InitCriterion("Random", _random, data=False),
    "magnitude": InitCriterion("Magnitude", _magnitude, data=False),
    "grad-norm": InitCriterion("GradNorm", grad_norm_scores),
    "snip": InitCriterion("SNIP", snip_scores),
    "iterative-snip": InitCriterion("SNIP, 100 rounds", snip_scores, rounds=100),
    "grasp": InitCriterion("GraSP", grasp_scores, temperature=PAPER_TEMPERATURE),
    "synflow": InitCriterion("SynFlow", synflow_scores, "network", rounds=100, data=False),
    "fisher-diagonal": InitCriterion("Fisher diagonal", partial(fisher_scores, form="diagonal")),
    "fisher-pruner": InitCriterion("Fisher pruner", partial(fisher_scores, form="pruner")),
    "fisher-taylor": InitCriterion("Fisher–Taylor", partial(fisher_scores, form="taylor")),
    "hutchinson-diagonal": InitCriterion(
        "Hutchinson diagonal", partial(hutchinson_scores, form="diagonal"), temperature=PAPER_TEMPERATURE
    ),
    "hutchinson-pruner": InitCriterion(
        "Hutchinson pruner", partial(hutchinson_scores, form="pruner"), temperature=PAPER_TEMPERATURE
    ),
    "hutchinson-taylor": InitCriterion(
        "Hutchinson–Taylor", partial(hutchinson_scores, form="taylor"), temperature=PAPER_TEMPERATURE
    ),
    "hessian-diagonal": InitCriterion("Exact diagonal", partial(gauss_newton_scores, form="diagonal"), "network"),
    "hessian-pruner": InitCriterion("Exact pruner", partial(gauss_newton_scores, form="pruner"), "network"),
    "hessian-taylor": InitCriterion("Exact–Taylor", partial(gauss_newton_scores, form="taylor"), "network"),
    "obs": InitCriterion("OBS, whole Fisher", fisher_obs_scores),
}
"""`hutchinson-…` is the published mode: 10 probes an example, logits over 200, signed. `hessian-…` is exact. `grasp`
has the temperature of its authors' code."""
