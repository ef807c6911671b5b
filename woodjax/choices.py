"""What one-shot pruning chooses by itself: stages, gradient rows, held-out examples, candidates for the update."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import jax
from jaxtyping import Array

from woodjax.compensation import Method
from woodjax.patterns import NM
from woodjax.sparsities import ExactSparsity, Sparsity
from woodjax.update_search import UpdateSearch

Auto = Literal["auto"]

DENSITY_DECAY = 1 / 12  # log of the density that a stage takes off: 28 stages to 90 %, 47 to 98 %
MOST_STAGES = 48
TRACED_STAGES = 16
FIRST_ORDER_STAGES = 32
ROWS, LEAST_ROWS, ROW_BYTES = 1000, 256, 2**29  # gradient rows of a stage, and the memory that they may take
EXAMPLES_PER_ROW = 8
FIRST_ORDER_EXAMPLES_PER_ROW = 32
HELD_OUT_FRACTION, MOST_HELD_OUT, LEAST_HELD_OUT = 0.2, 2048, 8
DAMPING_MULTIPLES = (0.1, 1.0, 10.0)
FIRST_ORDER_MULTIPLES = (10.0, 100.0, 1000.0)  # a Newton step leaves the model's region where damping is small
STEPS = (0.0, 0.25, 0.5, 0.7, 1.0, 1.4)


class FixedChoices(TypedDict):
    """Arguments of `prune_one_shot` that leave nothing to choose."""

    stages: int
    method: Method | None
    damping_multiples: tuple[float, ...]
    step: float
    examples_per_gradient: int


FIXED: FixedChoices = {
    "stages": 1,
    "method": "joint",
    "damping_multiples": (1.0,),
    "step": 1.0,
    "examples_per_gradient": 1,
}


class Plan(NamedTuple):
    """How many examples go where."""

    stages: int
    rows: int  # gradient rows of a stage
    examples_per_gradient: int
    held_out: int

    @property
    def examples(self) -> int:
        """Examples of a stage."""
        return self.rows * self.examples_per_gradient


def choose_plan(
    sparsity: Sparsity | NM,
    examples: int,
    weights: int,
    *,
    stages: int | Auto,
    examples_per_stage: int | None,
    examples_per_gradient: int | Auto,
    held_out: int | Auto,
    searching: bool,
    first_order: bool = False,
    reached: float | Array = 0.0,
    devices: int = 1,
) -> Plan:
    """Fill in what was left to choose.

    Args:
        sparsity: Target, or the pattern that fixes it.
        examples: In the pool.
        weights: Of the network.
        stages: Number, or `"auto"`: each takes about 8 % of the density off, up to 48.
        examples_per_stage: Number, or None.
        examples_per_gradient: Number, or `"auto"`: up to 8, or 32 with `first_order`, as many as the pool has for
            the rows: 1,000, fewer where they would take more than 512 MiB, but 256.
        held_out: Number, or `"auto"`: a fifth of the pool, at most 2,048, none of a pool of fewer than 40.
        searching: Is there anything that held-out examples decide?
        first_order: Does every stage descend as well?
        reached: Sparsity of the masks to begin with.
        devices: That the examples are split over: rows and held-out examples that are chosen here are a multiple.

    Returns:
        The plan.

    Raises:
        ValueError: More examples asked for than there are; numbers that the devices do not divide.
    """
    aside = _held_out(examples) if held_out == "auto" else held_out
    if not searching and held_out == "auto":
        aside = 0
    if held_out == "auto" and aside and examples_per_gradient != "auto" and examples_per_gradient > 0:
        aside += (examples - aside) % (examples_per_gradient * devices)  # what would not fill a row on each
    if held_out == "auto":
        aside -= aside % devices if examples_per_gradient == "auto" else 0
    pool = examples - aside
    if aside < 0 or pool < 1:
        raise ValueError(f"held_out is {held_out}: pass 0 to {examples - 1}, less than the {examples} examples.")
    if examples_per_stage is not None and not 1 <= examples_per_stage <= pool:
        kept = f", {aside} of which are held out" if aside else ""
        raise ValueError(f"examples_per_stage is {examples_per_stage}: pass 1 to {pool} of {examples} examples{kept}.")
    available = pool if examples_per_stage is None else examples_per_stage
    if examples_per_gradient == "auto":
        most = FIRST_ORDER_EXAMPLES_PER_ROW if first_order else EXAMPLES_PER_ROW
        rows = max(LEAST_ROWS, min(ROWS, ROW_BYTES // (4 * weights)))
        s = max(1, min(most, available // rows))
        rows = min(rows, available // s)
        rows -= rows % devices
    else:
        s = examples_per_gradient
        rows = available // s if s > 0 and available % s == 0 else 0
    if rows < 1 and available < devices:
        raise ValueError(f"{available} examples for {devices} devices: pass at least one for each, or fewer devices.")
    if rows < 1:
        raise ValueError(
            f"{available} examples cannot be averaged in groups of examples_per_gradient={s}: pass a divisor."
        )
    if aside % devices or rows % devices:
        raise ValueError(
            f"{rows} rows and {aside} held-out examples cannot be split evenly over {devices} devices: pass multiples "
            f"of {devices}, or leave examples_per_gradient, examples_per_stage and held_out to be chosen."
        )
    return Plan(
        stages_for(sparsity, first_order=first_order, reached=reached) if stages == "auto" else stages, rows, s, aside
    )


def stages_for(sparsity: Sparsity | NM, *, first_order: bool = False, reached: float | Array = 0.0) -> int:
    """Number of stages to a sparsity: each takes about 8 % of the density off.

    Args:
        sparsity: Target; the highest of a mapping counts. A traced one takes 16 stages, N:M one for each weight that a
            group loses.
        first_order: Every stage descends as well: 32 of them.
        reached: Sparsity of the masks to begin with.

    Returns:
        1 to 48.
    """
    if first_order:
        return FIRST_ORDER_STAGES
    if isinstance(sparsity, NM):
        return sparsity.m - sparsity.n
    fractions = list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]
    if not fractions:
        return 1
    values = [fraction.value if isinstance(fraction, ExactSparsity) else fraction for fraction in fractions]
    if any(isinstance(value, jax.core.Tracer) for value in (*values, reached)):
        return TRACED_STAGES
    density = 1 - max(float(value) for value in values)
    if density <= 0:
        return MOST_STAGES
    return min(MOST_STAGES, max(1, math.ceil(math.log((1 - float(reached)) / density) / DENSITY_DECAY)))


def choose_search(
    method: Method | Auto | None,
    damping_multiples: Sequence[float] | Auto,
    step: float | Auto,
    *,
    first_order: bool,
) -> UpdateSearch | None:
    """The candidates for the update.

    Args:
        method: A rule, `"auto"` for both, None to leave the survivors where they are.
        damping_multiples: As in `prune_one_shot`.
        step: As in `prune_one_shot`.
        first_order: Is the mean gradient taken along?

    Returns:
        The candidates; None where nothing moves.

    Raises:
        ValueError: A multiple that is not positive; none at all; a negative step.
    """
    if method is None:
        return None
    if method not in ("auto", "joint", "sum"):
        raise ValueError(f"method is {method!r}: choose 'joint', 'sum', 'auto' or None.")
    multiples = FIRST_ORDER_MULTIPLES if first_order else DAMPING_MULTIPLES
    if damping_multiples != "auto":
        multiples = tuple(float(multiple) for multiple in damping_multiples)
    if not multiples or not all(0 < multiple < math.inf for multiple in multiples):
        raise ValueError(f"damping_multiples are {multiples}: pass positive numbers, or 'auto'.")
    steps = STEPS if step == "auto" else (float(step),)
    if not all(0 <= length < math.inf for length in steps):
        raise ValueError(f"step is {step}: pass a number of at least 0, or 'auto'.")
    return UpdateSearch(("joint", "sum") if method == "auto" else (method,), multiples, steps)


def _held_out(examples: int) -> int:
    count = min(MOST_HELD_OUT, int(examples * HELD_OUT_FRACTION))
    return count if count >= LEAST_HELD_OUT else 0
