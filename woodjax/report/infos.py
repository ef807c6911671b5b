"""What the functions of the library hand back as info, told in tables and sentences."""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from woodjax.at_init import AtInitInfo
from woodjax.exact_obs import ExactObsInfo
from woodjax.guarantee import GuaranteeInfo
from woodjax.layerwise import LayerInfo
from woodjax.mask_search import SearchInfo
from woodjax.one_shot import OneShotInfo
from woodjax.report.markup import Table, number, percent
from woodjax.sparsity_path import SparsityPath
from woodjax.structured import PrunePlan
from woodjax.transform import RefreshInfo

RULE = (
    "Held-out examples choose the update of a stage: the usual one stands unless another has a clearly lower loss, by "
    "more than two standard errors of the difference and by 0.5 %, or by 5 %."
)
UNKNOWN = np.full(1, np.nan)  # of one stage


class Story(NamedTuple):
    """What an info says."""

    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    sparsity: Float[np.ndarray, " stages"] = np.zeros(0)
    predicted: Float[np.ndarray, " stages"] = np.zeros(0)  # change of the loss in each stage; NaN where not known
    measured: Float[np.ndarray, " stages"] = np.zeros(0)  # on the examples of the stage


def tell(info: Any, names: Sequence[str]) -> Story:
    """Tell any info, or several of one run in their order.

    Args:
        info: What a function of the library returned, or a list of such; None says nothing.
        names: Of the leaves, in the order of `jax.tree.leaves`.

    Returns:
        The story; tables with the same columns are made one.

    Raises:
        ValueError: An object that is not known.
    """
    if type(info) not in (list, tuple):
        return _story(info, names)
    stories = [_story(part, names) for part in info]
    tables: dict[tuple[str, tuple[str, ...]], tuple[tuple[str, ...], ...]] = {}
    for table in (table for story in stories for table in story.tables):
        key = table.caption, table.header
        tables[key] = tables.get(key, ()) + table.rows
    columns = ([story[i] for story in stories] for i in (2, 3, 4))
    return Story(
        tuple(Table(*key, rows) for key, rows in tables.items()),
        tuple(dict.fromkeys(note for story in stories for note in story.notes)),
        *(np.concatenate([np.zeros(0), *column]) for column in columns),
    )


@singledispatch
def _story(info: object, names: Sequence[str]) -> Story:
    if info is None:
        return Story()
    known = ", ".join(sorted(kind.__name__ for kind in _story.registry if kind is not object))
    raise ValueError(
        f"info is a {type(info).__name__}: pass what the pruning returned, which is one of {known}, a list of them, or "
        "None."
    )


@_story.register
def _(info: OneShotInfo, names: Sequence[str]) -> Story:
    before, after = _column(info.loss_before), _column(info.loss_after)
    sparsity, predicted = _column(info.sparsity), _column(info.predicted_loss_change)
    columns: dict[str, list[str]] = {
        "stage": [str(i + 1) for i in range(len(sparsity))],
        "sparsity": [percent(s) for s in sparsity],
        "loss before": _cells(before),
        "loss after": _cells(after),
        "predicted change": _cells(predicted),
        "measured change": _cells(after - before),
        "damping": _cells(info.damping),
        "factors raised": _cells(info.raised),
        "gradient rows": _cells(info.rows),
        "examples a row": _cells(info.examples_per_gradient),
        "held out": _cells(info.held_out),
    }
    notes = [*_not_finite(info.nonfinite, names), *_raised(info.raised)]
    if info.choice is not None:
        choice = info.choice
        columns["rule"] = ["joint" if joint else "sum" for joint in _column(choice.joint)]
        columns["damping ×"] = _cells(choice.damping_multiple)
        columns["step"] = _cells(choice.step)
        columns["held-out loss"] = _cells(choice.held_out_loss)
        lowest, highest = (
            _floats(f(np.asarray(choice.candidate_losses).reshape(len(sparsity), -1), axis=1)) for f in (np.min, np.max)
        )
        columns["of those tried"] = [f"{number(a)} to {number(b)}" for a, b in zip(lowest, highest, strict=True)]
        notes.append(RULE)
    same = {name: cells[0] for name, cells in columns.items() if len(cells) > 1 and len(set(cells)) == 1}
    if same:
        notes.append("The same in every stage: " + ", ".join(f"{name} {cell}" for name, cell in same.items()) + ".")
    columns = {name: cells for name, cells in columns.items() if name not in same}
    rows = tuple(zip(*columns.values(), strict=True))
    return Story((Table("Stages", tuple(columns), rows),), tuple(notes), sparsity, predicted, after - before)


@_story.register
def _(info: RefreshInfo, names: Sequence[str]) -> Story:
    measured = _column(info.loss_after) - _column(info.loss_before)
    sparsity, predicted = _column(info.sparsity), _column(info.predicted_loss_change)
    cells = [_cells(x) for x in (info.step, info.loss_before, info.loss_after, predicted, measured, info.damping)]
    header = ("updates done", "loss before", "loss after", "predicted change", "measured change", "damping")
    row = (*(cell[0] for cell in cells), percent(float(sparsity[0])))
    notes = (*_not_finite(info.nonfinite, names), *_raised(info.raised))
    return Story((Table("Refreshes", (*header, "sparsity"), (row,)),), notes, sparsity, predicted, measured)


@_story.register
def _(info: AtInitInfo, names: Sequence[str]) -> Story:
    empty = info.report.collapsed_layers
    lowest = percent(float(info.report.lowest_density))
    rows = (
        ("sparsity of the leaves that were prunable", percent(float(info.report.sparsity))),
        ("lowest density of a layer", lowest),
        ("layers that keep nothing", ", ".join(empty) or "none"),
        ("scores that were not finite, leaves", number(int(info.nonfinite))),
    )
    notes = (f"{', '.join(empty)}: nothing is left, and the network is cut there.",) if empty else ()
    return Story((Table("At initialization", ("", "value"), rows),), notes)


@_story.register
def _(info: GuaranteeInfo, names: Sequence[str]) -> Story:
    promise = (
        f"With confidence {percent(info.confidence)} the expected loss of fresh examples of the same distribution "
        f"rises by at most {number(info.max_loss_increase)}, differences clipped to ±{number(info.loss_bound)}. "
        f"Tested on {info.num_calibration:,} examples."
        if info.certified
        else "No sparsity passed the test: the dense network came back, and nothing is promised."
    )
    rows = tuple(
        (
            percent(float(s)),
            number(float(mean)),
            number(float(p)),
            _verdict(passed, p),
        )
        for s, mean, p, passed in zip(info.sparsities, info.mean_increase, info.p_value, info.passed, strict=True)
    )
    rungs = Table("Sparsities tested, in this order", ("sparsity", "mean increase", "p-value", "passed"), rows)
    inner = tell(info.prune_info if type(info.prune_info) in _story.registry else None, names)
    return inner._replace(tables=(rungs, *inner.tables), notes=(promise, *inner.notes))


@_story.register
def _(info: SearchInfo, names: Sequence[str]) -> Story:
    values = _column(info.quadratic)
    rows = (
        ("predicted loss change of the masks it began with", number(float(values[0]))),
        ("of those it ended with", number(float(values[-1]))),
        ("pairs exchanged", number(int(np.sum(np.asarray(info.swaps))))),
        ("steps of hard thresholding", number(int(info.thresholded))),
        ("survivors that the first masks pruned", number(int(info.moved))),
    )
    return Story((Table("Mask search", ("", "value"), rows),), (), UNKNOWN, values[-1:], UNKNOWN)


@_story.register
def _(info: ExactObsInfo, names: Sequence[str]) -> Story:
    predicted = _column(info.predicted_loss_change)
    rows = (
        ("blocks", number(len(np.asarray(info.removed)))),
        ("weights removed one at a time", number(int(np.sum(np.asarray(info.removed))))),
        ("predicted loss change", number(float(predicted[0]))),
    )
    return Story((Table("Exact removal", ("", "value"), rows),), (), UNKNOWN, predicted, UNKNOWN)


@_story.register
def _(info: LayerInfo, names: Sequence[str]) -> Story:
    header = ("layer", "kernel", "kept", "damping", "relative error of its outputs")
    rows = tuple(
        (str(info.layer), name, percent(kept), number(info.damping.get(name)), number(info.error.get(name)))
        for name, kept in info.density.items()
    )
    return Story((Table("Layers, one at a time", header, rows),))


@_story.register
def _(info: PrunePlan, names: Sequence[str]) -> Story:
    rows = tuple(
        (group.name, number(group.size), number(len(group.kept)), number(len(group.implanted))) for group in info.groups
    )
    return Story((Table("Groups of channels", ("group", "channels", "kept", "with implants"), rows),))


@_story.register
def _(info: SparsityPath, names: Sequence[str]) -> Story:
    levels = zip(_floats(info.sparsity), _floats(info.predicted_loss_change), strict=True)
    rows = tuple((percent(sparsity), number(change)) for sparsity, change in levels)
    return Story((Table("Path of masks", ("sparsity", "predicted loss change"), rows),))


def _verdict(passed: bool, p_value: float) -> str:
    return "yes" if passed else "not tested" if np.isnan(p_value) else "no"


def _column(values: Any) -> Float[np.ndarray, " stages"]:
    return np.asarray(values, np.float64).reshape(-1)


def _floats(values: Any) -> list[float]:
    return _column(values).tolist()


def _cells(values: Any) -> list[str]:
    if np.issubdtype(np.asarray(values).dtype, np.integer):
        return [number(value) for value in np.asarray(values).reshape(-1).tolist()]
    return [number(value) for value in _floats(values)]


def _not_finite(flags: Any, names: Sequence[str]) -> tuple[str, ...]:
    hit = np.asarray(flags).reshape(-1, len(names))
    which = ", ".join(name for i, name in enumerate(names) if hit[:, i].any())
    return (f"{which}: masks and weights were kept at some stage, as scores were not finite.",) if which else ()


def _raised(blocks: Any) -> tuple[str, ...]:
    total = int(np.sum(np.asarray(blocks)))
    return (f"Factors that failed and took more damping: {total:,}.",) if total > 0 else ()
