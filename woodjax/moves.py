"""Moves from one support to a better one of the same size, on the quadratic model of a low-rank Fisher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import map_blocks
from woodjax.ranking import lowest

SHORTLIST = 64  # weights on either side among which exchanges are priced exactly
LIPSCHITZ_MARGIN = 1.05  # on the largest eigenvalue, which power iteration finds from below


class Quadratic(NamedTuple):
    """The quadratic in blocks, and what may change."""

    gradients: Float[Array, "m nb b"]
    damping: Float[Array, " nb"]
    weights: Float[Array, "nb b"]
    gradient: Float[Array, "nb b"] | None
    fixed: Bool[Array, "nb b"]  # must survive
    free: Bool[Array, "nb b"]  # may survive or not

    def solve(self, kept: Bool[Array, "nb b"]) -> linalg.Support:
        """The minimum on a support."""
        return map_blocks(linalg.solve_support, self.gradients, self.damping, self.weights, kept, self.gradient)

    def scales(self, kept: Bool[Array, "nb b"], support: linalg.Support) -> Float[Array, "nb b"]:
        """What exchanges are priced by: `1 − h` and `1 + h`."""
        return map_blocks(linalg.exchange_scales, self.gradients, support.whitener, kept)

    def value(self, blocks: Float[Array, "nb b"]) -> Float[Array, ""]:
        """The quadratic at the weights `blocks`."""
        step = blocks - self.weights
        return jnp.sum(map_blocks(linalg.quadratic, self.gradients, self.damping, step, self.gradient))

    def slope(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """Gradient of the quadratic there."""
        step = blocks - self.weights
        along = linalg.contract("mnb,nb->mn", self.gradients, step)
        slope = self.damping[:, None] * step + self.fisher_half(along)
        return slope if self.gradient is None else slope + self.gradient

    def fisher_half(self, along: Float[Array, "m nb"]) -> Float[Array, "nb b"]:
        """`Gᵀx/m`."""
        return linalg.contract("mnb,mn->nb", self.gradients, along) / self.gradients.shape[0]

    def best(self, keys: Float[Array, "nb b"], count: Int[Array, ""]) -> Bool[Array, "nb b"]:
        """Keep `count` weights, those with the highest keys; only free ones are chosen."""
        ranked = jnp.where(self.free, keys, jnp.where(self.fixed, jnp.inf, -jnp.inf))
        return ~_lowest(ranked, keys.size - count)


def hard_threshold(
    problem: Quadratic, start: Bool[Array, "nb b"], iterations: int
) -> tuple[Bool[Array, "nb b"], Int[Array, ""]]:
    """Gradient step, then the largest weights; the step is doubled for as long as the quadratic falls."""
    count = jnp.sum(start, dtype=jnp.int32)
    shortest = 1 / (LIPSCHITZ_MARGIN * _largest_eigenvalue(problem))

    def threshold(blocks: Array) -> tuple[Array, Array]:
        kept = problem.best(jnp.abs(blocks), count)
        return jnp.where(kept, blocks, 0), kept

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        blocks, kept, value, length, number, _ = state
        slope = problem.slope(blocks)

        def lengthen(line: tuple[Array, ...]) -> tuple[Array, ...]:
            best, best_kept, lowest_value, length, _ = line
            trial, trial_kept = threshold(blocks - length * slope)
            trial_value = problem.value(trial)
            falls = trial_value < lowest_value
            best, best_kept = (jnp.where(falls, x, y) for x, y in ((trial, best), (trial_kept, best_kept)))
            lowest_value = jnp.where(falls, trial_value, lowest_value)
            return best, best_kept, lowest_value, jnp.where(falls, 2 * length, length), falls

        line = (blocks, kept, value, length, jnp.bool_(True))
        best, best_kept, lowest_value, last, _ = lax.while_loop(lambda line: line[-1], lengthen, line)
        falls = lowest_value < value
        ended = ~falls & (length <= shortest)  # even the step that must not raise the quadratic did not lower it
        following = jnp.where(falls, jnp.maximum(last / 8, shortest), shortest)
        return best, best_kept, lowest_value, following, number + falls, ended

    def step_in_turn(state: tuple[Array, ...]) -> tuple[Array, ...]:
        *inner, turn = state
        return *step(tuple(inner)), turn + 1

    masked = jnp.where(start, problem.weights, 0)
    zero = jnp.zeros((), jnp.int32)
    state = (masked, start, problem.value(masked), shortest, zero, jnp.bool_(False), zero)
    _, kept, _, _, taken, _, _ = lax.while_loop(
        lambda state: ~state[-2] & (state[-1] < iterations), step_in_turn, state
    )
    return kept, taken


def _largest_eigenvalue(problem: Quadratic) -> Float[Array, ""]:
    """Of `H`, from below: power iteration in every block at once."""

    def turn(_: Array, vector: Array) -> Array:
        norm = jnp.sqrt(linalg.contract("mn,mn->n", vector, vector))
        unit = vector / jnp.where(norm > 0, norm, 1)
        return linalg.contract("mnb,nb->mn", problem.gradients, problem.fisher_half(unit))

    vector = lax.fori_loop(0, 20, turn, jnp.ones(problem.gradients.shape[:2], problem.weights.dtype))
    return jnp.max(problem.damping + jnp.sqrt(linalg.contract("mn,mn->n", vector, vector)))


class Rounds(NamedTuple):
    """The best support seen, its exact solution, and what to try next."""

    kept: Bool[Array, "nb b"]
    support: linalg.Support
    scales: Float[Array, "nb b"]
    proposal: Bool[Array, "nb b"]
    pairs: Int[Array, ""]  # that the proposal exchanges; 0 ends the search
    limit: Int[Array, ""]  # on the pairs of a round
    number: Int[Array, ""]
    values: Float[Array, " rounds"]
    accepted: Int[Array, " rounds"]


def try_in_rounds(
    problem: Quadratic, start: Bool[Array, "nb b"], thresholded: Bool[Array, "nb b"] | None, swaps: int
) -> Rounds:
    """Solve exactly at the start, then at a second support, then at swaps from the best one seen.

    Args:
        problem: The quadratic.
        start: The support to start from.
        thresholded: The second support; None for none.
        swaps: Most rounds of swaps.

    Returns:
        The last state, with `2 + swaps` rounds of values.

    Cost:
        For each round `1.25m²k + 2m³/3 + 8m·d` flops for `k` survivors, and `1.25m²d` where the quadratic fell.
    """
    first = 0 if thresholded is not None else 1  # one program holds one factorisation: it compiles in half the time
    zeros = _zeros_like(jax.eval_shape(problem.solve, start))
    size = jnp.asarray(start.size, jnp.int32)

    def turn(state: Rounds) -> Rounds:
        other = problem.solve(state.proposal)
        falls = (jnp.sum(other.value) < jnp.sum(state.support.value)) | (state.number == first)
        kept, support, scales = lax.cond(
            falls,
            lambda: (state.proposal, other, problem.scales(state.proposal, other)),
            lambda: (state.kept, state.support, state.scales),
        )
        # The pairs of the shortlist are asked before the search ends: prices of single weights may see none that help.
        least = jnp.where(state.limit > SHORTLIST, SHORTLIST, 0)
        halved = jnp.maximum(jnp.where(falls, state.pairs, state.pairs // 2), least)
        limit = jnp.where(state.number < 2, size, halved)
        state = state._replace(
            kept=kept,
            support=support,
            scales=scales,
            limit=limit,
            number=state.number + 1,
            values=state.values.at[state.number].set(jnp.sum(support.value)),
            accepted=state.accepted.at[state.number].set(jnp.where(falls, state.pairs, 0)),
        )
        proposal, pairs = _propose(problem, state)
        if thresholded is not None:
            proposal = jnp.where(state.number == 1, thresholded, proposal)
            pairs = jnp.where(state.number == 1, size, pairs)
        return state._replace(proposal=proposal, pairs=pairs)

    begin = Rounds(
        kept=start,
        support=zeros,
        scales=_zeros_like(jax.eval_shape(problem.scales, start, zeros)),
        proposal=start,
        pairs=size,
        limit=size,
        number=jnp.asarray(first, jnp.int32),
        values=jnp.zeros(2 + swaps, zeros.value.dtype),
        accepted=jnp.zeros(2 + swaps, jnp.int32),
    )
    last = lax.while_loop(lambda state: (state.pairs > 0) & (state.number < 2 + swaps), turn, begin)
    done = jnp.arange(2 + swaps) < last.number
    values = jnp.where(done, last.values, jnp.sum(last.support.value))
    return last._replace(values=values.at[0].set(values[first]))


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _propose(problem: Quadratic, state: Rounds) -> tuple[Bool[Array, "nb b"], Int[Array, ""]]:
    """Exchange the cheapest survivors for the best pruned weights: by single prices while many, by pairs when few."""
    costs = 0.5 * _damping_used(state.support) * state.support.pull**2 / state.scales
    most = jnp.sum(problem.best(costs, jnp.sum(state.kept)) & ~state.kept, dtype=jnp.int32)

    def many() -> tuple[Array, Array]:
        pairs = jnp.minimum(state.limit, most)
        drop = _lowest(jnp.where(state.kept & problem.free, costs, jnp.inf), pairs)
        add = _lowest(jnp.where(~state.kept & problem.free, -costs, jnp.inf), pairs)
        return (state.kept & ~drop) | add, pairs

    several = (state.limit > SHORTLIST) & (most > 0)
    return lax.cond(several, many, lambda: _exchange_pairs(problem, state, costs))


def _damping_used(support: linalg.Support) -> Float[Array, "nb 1"]:
    """The damping that each block's factor took."""
    return support.whitener.damping[:, None]


def _exchange_pairs(problem: Quadratic, state: Rounds, costs: Float[Array, "nb b"]) -> tuple[Array, Array]:
    """Up to `state.limit` exchanges among the shortlist, the best first, each priced exactly as if it were alone."""
    nb, b = costs.shape
    size = min(SHORTLIST, nb * b)
    price, out = lax.top_k(-jnp.where(state.kept & problem.free, costs, jnp.inf).reshape(-1), size)
    worth, back = lax.top_k(jnp.where(~state.kept & problem.free, costs, -jnp.inf).reshape(-1), size)
    rows = problem.gradients.reshape(-1, nb * b)

    def whitened(index: Array) -> Array:
        root = state.support.whitener.root[index // b]
        return linalg.contract("ij,j->i", root, jnp.take(rows, index, axis=1))

    z = lax.map(whitened, jnp.concatenate([out, back]))
    same_block = (out // b)[:, None] == (back // b)[None, :]
    coupling = jnp.where(same_block, linalg.contract("im,jm->ij", z[:size], z[size:]), 0)
    pull, scales = (x.reshape(-1) for x in (state.support.pull, state.scales))
    damping = jnp.broadcast_to(_damping_used(state.support), costs.shape).reshape(-1)
    along = coupling / scales[back]
    removed = damping[out][:, None] * (pull[out][:, None] - along * pull[back]) ** 2
    change = 0.5 * removed / (scales[out][:, None] + along * coupling) - costs.reshape(-1)[back]
    change = jnp.where(jnp.isfinite(price)[:, None] & jnp.isfinite(worth), change, jnp.inf)

    def take(number: Array, taken: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        change, kept, pairs = taken
        best = jnp.argmin(change)
        i, j = best // size, best % size
        helps = (change[i, j] < 0) & (number < state.limit)
        swapped = kept.at[out[i]].set(False).at[back[j]].set(True)
        crossed = change.at[i, :].set(jnp.inf).at[:, j].set(jnp.inf)
        return jnp.where(helps, crossed, change), jnp.where(helps, swapped, kept), pairs + helps

    start = (change, state.kept.reshape(-1), jnp.zeros((), jnp.int32))
    _, kept, pairs = lax.fori_loop(0, size, take, start)
    return kept.reshape(nb, b), pairs


def _lowest(keys: Float[Array, "nb b"], count: Int[Array, ""]) -> Bool[Array, "nb b"]:
    return lowest([keys.reshape(1, -1)], [jnp.reshape(count, 1)])[0].reshape(keys.shape)
