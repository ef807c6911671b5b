"""Which sparsity when: in the stages of one pruning, and at the steps of a training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from woodjax.door import checked
from woodjax.sparsities import ExactSparsity, Sparsity, check_sparsity, exact_sparsity

Path = Literal["exponential", "cubic", "linear"]
Target: TypeAlias = float | Mapping[str, float]


@checked
def stage_sparsities(
    target: float, stages: int, *, initial: float = 0.0, path: Path = "exponential"
) -> Float[np.ndarray, " stages"]:
    """Sparsities of a pruning in several stages; the last is the target exactly.

    `"exponential"` keeps the same fraction of the survivors in every stage,
    `1 − (1−s₀)((1−s)/(1−s₀))^{t/T}`; `"cubic"` is `s + (s₀−s)(1−t/T)³`; `"linear"` is the straight line.

    Args:
        target: Final sparsity `s` in [0, 1].
        stages: Number of stages `T >= 1`.
        initial: Sparsity `s₀ <= s` to start from.
        path: The curve between the two.

    Returns:
        `[T]` sparsities, not decreasing.

    Raises:
        ValueError: `stages < 1`, unknown path, or not `0 <= initial <= target <= 1`.

    Cost:
        None; computed on the host.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), appendix (exponential); Zhu & Gupta 2017
        (arXiv 1710.01878), equation 1 (cubic).

    Example:
        >>> import woodjax as wj
        >>> wj.stage_sparsities(0.75, 2).tolist()
        [0.5, 0.75]
    """
    check_stages(stages, path)
    if not 0 <= initial <= target <= 1:
        raise ValueError(f"Need 0 <= initial <= target <= 1, found initial={initial}, target={target}.")
    values = np.asarray(on_path(target, initial, np.arange(1, stages + 1) / stages, path))
    values = np.clip(values, initial, target)
    values[-1] = target
    return values


def on_path(target: Any, initial: Any, time: Any, path: Path) -> Any:
    """A point of a path from one sparsity to another: numbers, arrays or traced values.

    Args:
        target: Sparsity at the end.
        initial: Sparsity at the beginning.
        time: From 0 at the beginning to 1 at the end.
        path: The curve between the two.

    Returns:
        The sparsity at that time.
    """
    if path == "cubic":
        return target + (initial - target) * (1 - time) ** 3
    if path == "linear":
        return initial + (target - initial) * time
    # A path that starts at 1 stays there: 0 · (0/0) is kept out.
    left = (1 - target) / (1 - initial + (initial == 1))
    return 1 - (1 - initial) * left**time


def check_stages(stages: int, path: Path) -> None:
    """Raise unless there are stages, on a path that is known.

    Args:
        stages: Their number.
        path: The curve.

    Raises:
        ValueError: Otherwise.
    """
    if stages < 1:
        raise ValueError(f"stages is {stages}: pass at least 1.")
    if path not in ("exponential", "cubic", "linear"):
        raise ValueError(f"path is {path!r}: choose 'exponential', 'cubic' or 'linear'.")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps at which pruning is due, and the sparsity to reach at each. Static: a table, made on the host.

    Steps count from 0, as those of an Optax schedule do: step `t` is the update that finds `t` updates behind it. A
    pruning that is due at a step takes place after that step's update. Inside the update the transform counts: under
    `optax.MultiSteps` and `optax.apply_if_finite` only the updates that reach it.
    """

    steps: tuple[int, ...]  # increasing
    sparsities: tuple[Sparsity, ...]  # one for each; numbers, or mappings of them with the same keys

    def __call__(self, step: int | Int[Array, ""]) -> Sparsity:
        """Sparsity that holds after a step: that of the last due step, 0 before the first.

        Args:
            step: An integer, or a traced one.

        Returns:
            A number, or a mapping of them; traced, and rounded to float32, if the step is.
        """
        if isinstance(step, jax.core.Tracer):
            exact = self.exact(step)
            return {key: s.value for key, s in exact.items()} if isinstance(exact, dict) else exact.value
        done = sum(due <= int(step) for due in self.steps)
        if done:
            return self.sparsities[done - 1]
        first = self.sparsities[0]
        return dict.fromkeys(first, 0.0) if isinstance(first, Mapping) else 0.0

    def due(self, step: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Is a pruning due after this step?

        Args:
            step: An integer, or a traced one.

        Returns:
            A Python bool, or a traced one.
        """
        if isinstance(step, jax.core.Tracer):
            return jnp.any(jnp.asarray(self.steps, jnp.int32) == step)
        return int(step) in self.steps

    def exact(self, step: Int[Array, ""]) -> ExactSparsity | dict[str, ExactSparsity]:
        """As a call with a traced step, but without the rounding of a float32: `0.9` gives the counts of `0.9`.

        Args:
            step: A traced integer, not before the first due step.

        Returns:
            A sparsity for `make_masks`, or a mapping of them.
        """
        row = jnp.searchsorted(jnp.asarray(self.steps, jnp.int32), step, side="right") - 1

        def column(values: list[float]) -> ExactSparsity:
            table = [exact_sparsity(value) for value in values]
            picked = (jnp.asarray([getattr(s, name) for s in table])[row] for name in ("head", "tail"))
            head, tail = (jnp.where(row < 0, 0, x) for x in picked)
            return ExactSparsity(head, tail)

        rows: Any = self.sparsities
        if not isinstance(rows[0], Mapping):
            return column(list(rows))
        return {key: column([values[key] for values in rows]) for key in rows[0]}


@checked
def cubic_schedule(*, begin: int, end: int, every: int, target: Target, initial: Target = 0.0) -> Schedule:
    """Prune fast at first and slower later: `s_f + (s_i − s_f)(1 − (t − t₀)/(nΔ))³`.

    Args:
        begin: First step `t₀` at which pruning is due; with `initial=0` there is nothing to do there, and the
            first due step is `begin + every`.
        end: Step not after which the last pruning is due.
        every: Steps `Δ` from one due step to the next.
        target: Sparsity `s_f` that the last due step, `begin + every · ((end − begin) // every)`, reaches exactly;
            or a mapping from leaf path or pattern to it, as in `make_masks`.
        initial: Sparsity `s_i` to begin from; a number or a mapping with the same keys.

    Returns:
        A schedule.

    Raises:
        ValueError: No due step; sparsities outside [0, 1] or falling; mappings with different keys.

    Cost:
        None; a table of `(end − begin)/every` rows.

    References:
        Zhu & Gupta 2017 (arXiv 1710.01878), equation 1.

    Example:
        >>> import woodjax as wj
        >>> schedule = wj.cubic_schedule(begin=0, end=199, every=50, target=0.9)
        >>> [(step, round(schedule(step), 3)) for step in schedule.steps]
        [(50, 0.633), (100, 0.867), (150, 0.9)]
    """
    return _along("cubic", begin, end, every, target, initial)


@checked
def linear_schedule(*, begin: int, end: int, every: int, target: Target, initial: Target = 0.0) -> Schedule:
    """Prune the same number of weights at every due step.

    Args:
        begin: As in `cubic_schedule`.
        end: As in `cubic_schedule`.
        every: As in `cubic_schedule`.
        target: As in `cubic_schedule`.
        initial: As in `cubic_schedule`.

    Returns:
        A schedule.

    Raises:
        ValueError: As `cubic_schedule`.

    Cost:
        None.

    Example:
        >>> import woodjax as wj
        >>> wj.linear_schedule(begin=0, end=20, every=10, target=0.5).sparsities
        (0.25, 0.5)
    """
    return _along("linear", begin, end, every, target, initial)


@checked
def exponential_schedule(*, begin: int, end: int, every: int, target: Target, initial: Target = 0.0) -> Schedule:
    """Prune the same fraction of the survivors at every due step.

    Args:
        begin: As in `cubic_schedule`.
        end: As in `cubic_schedule`.
        every: As in `cubic_schedule`.
        target: As in `cubic_schedule`.
        initial: As in `cubic_schedule`.

    Returns:
        A schedule.

    Raises:
        ValueError: As `cubic_schedule`.

    Cost:
        None.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), appendix.

    Example:
        >>> import woodjax as wj
        >>> wj.exponential_schedule(begin=0, end=20, every=10, target=0.75).sparsities
        (0.5, 0.75)
    """
    return _along("exponential", begin, end, every, target, initial)


@checked
def one_shot_schedule(step: int, target: Target) -> Schedule:
    """Prune once, after one step.

    Args:
        step: The step.
        target: As in `cubic_schedule`.

    Returns:
        A schedule.

    Raises:
        ValueError: A negative step; sparsity outside [0, 1].

    Cost:
        None.

    Example:
        >>> import woodjax as wj
        >>> wj.one_shot_schedule(100, 0.9)(100)
        0.9
    """
    return schedule_of(lambda _: target, begin=step, end=step, every=1)


@checked
def schedule_of(sparsity: Callable[[int], Target], *, begin: int, end: int, every: int) -> Schedule:
    """Any function of the step as a schedule; it is asked on the host, once for each due step.

    Args:
        sparsity: `sparsity(step)` is a number or a mapping of them: not falling.
        begin: First step at which pruning is due.
        end: Step not after which the last pruning is due.
        every: Steps from one due step to the next.

    Returns:
        A schedule; steps at which the function is 0 are not due.

    Raises:
        ValueError: As `cubic_schedule`.

    Cost:
        `(end − begin)/every` calls.

    Example:
        >>> import optax, woodjax as wj
        >>> ramp = optax.linear_schedule(0.0, 0.5, transition_steps=100)
        >>> wj.schedule_of(ramp, begin=0, end=100, every=50).steps
        (50, 100)
    """
    if begin < 0 or every < 1 or end < begin:
        raise ValueError(f"Need 0 <= begin <= end and every >= 1, found begin={begin}, end={end}, every={every}.")
    table = []
    for step in range(begin, end + 1, every):
        value = sparsity(step)
        check_sparsity(value)
        table.append((step, _numbers(value)))
    for (_, low), (step, high) in pairwise(table):
        if jax.tree.structure(low) != jax.tree.structure(high):
            raise ValueError(f"The sparsities name different leaves at step {step}: {low} and {high}.")
        if any(a > b for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)):
            raise ValueError(f"The sparsity falls from {low} to {high} at step {step}: what is pruned stays pruned.")
    due = [(step, value) for step, value in table if any(s > 0 for s in jax.tree.leaves(value))]
    if not due:
        raise ValueError(f"Nothing is ever pruned: the sparsity is 0 at every step of {[step for step, _ in table]}.")
    steps, values = zip(*due, strict=True)
    return Schedule(steps, values)


def _along(path: Path, begin: int, end: int, every: int, target: Target, initial: Target) -> Schedule:
    check_sparsity(target)
    check_sparsity(initial)
    last = (end - begin) // every * every if every > 0 else 0

    def point(final: float, first: float, step: int) -> float:
        if first > final:
            raise ValueError(f"initial={first} is above target={final}: what is pruned stays pruned.")
        if step - begin == last:
            return final
        return min(max(float(on_path(final, first, (step - begin) / last, path)), first), final)

    def sparsity(step: int) -> Target:
        if not isinstance(target, Mapping):
            if isinstance(initial, Mapping):
                raise ValueError(f"initial is a mapping and target={target} is not: pass two numbers or two mappings.")
            return point(target, initial, step)
        start = initial if isinstance(initial, Mapping) else {key: min(initial, s) for key, s in target.items()}
        if set(start) != set(target):
            raise ValueError(f"initial names {sorted(start)}, target {sorted(target)}: pass the same leaves.")
        return {key: point(target[key], start[key], step) for key in target}

    return schedule_of(sparsity, begin=begin, end=end, every=every)


def _numbers(value: Target) -> Target:
    return {key: float(s) for key, s in value.items()} if isinstance(value, Mapping) else float(value)
