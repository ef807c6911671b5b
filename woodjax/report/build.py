"""From three trees and an info to a page."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from woodjax.macs import weight_macs
from woodjax.masks import make_masks
from woodjax.records import Result, environment
from woodjax.report.infos import Story, tell
from woodjax.report.leaves import Leaf, read_leaves
from woodjax.report.markup import Section, cards_html, number, percent
from woodjax.report.page import Page, make_page
from woodjax.report.sections import (
    accuracy_section,
    cost_section,
    environment_section,
    info_section,
    layers_section,
    loss_section,
    masks_section,
    total,
    weights_section,
)
from woodjax.tree import apply_masks
from woodjax.typing import ApplyFn, Batch, Masks, Params

HERE = "this network"


def report(
    before: Params,
    after: Params,
    masks: Masks,
    info: Any = None,
    *,
    evaluate: Callable[[Params], float] | None = None,
    magnitude: bool = False,
    history: Sequence[Result | tuple[float, float]] = (),
    apply_fn: ApplyFn | None = None,
    example: Batch | None = None,
    seconds: float | None = None,
    title: str = "Pruning report",
    notes: str = "",
) -> Page:
    """One HTML page that says what a pruning did, for a person to read.

    Prunable, and counted in every number of the page, are leaves of two or more axes, and others that a mask prunes.
    What is not known is left out: a page without `evaluate` has no accuracy, one without `info` no losses.

    Args:
        before: A params-tree of floating leaves: the network before.
        after: The same, pruned and with zeros where it was. For masks without a network yet, as at initialization,
            `apply_masks(before, masks)`.
        masks: A params-tree of bool, True = survives.
        info: What the pruning returned: of `prune_one_shot`, `refresh`, `prune_at_init`, `prune_to_loss`,
            `search_masks`, `exact_obs`, `make_plan`, `sparsity_path`; a list where there are several, as after
            refreshes in a training, or of the layers of `prune_layers`.
        evaluate: From parameters to an accuracy in [0, 1]; called for `before` and `after`.
        magnitude: Also evaluate `before` without its smallest weights, as many as were pruned.
        history: Other networks, to stand beside this one: records, or pairs of sparsity and accuracy in [0, 1].
        apply_fn: `apply_fn(params, example)`, to count the multiply-adds.
        example: What it takes, a batch of one for the figure of papers; shapes are enough.
        seconds: How long the pruning took.
        title: Of the page.
        notes: Text below it; an empty line begins a paragraph.

    Returns:
        The page: `page.save("report.html")`, or the last line of a cell of a notebook.

    Raises:
        ValueError: Trees that differ; a leaf that is empty, not floating or not finite; a mask that is not bool;
            pruned weights that are not zero; an info that is not known; an accuracy outside [0, 1]; `magnitude` or
            `history` without `evaluate`; only one of `apply_fn` and `example`; as `weight_macs`.

    Cost:
        A copy of the trees on the host, two or three evaluations, and about a tenth of a second for each picture.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> from woodjax.report import report
        >>> before = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> masks = {"kernel": jnp.array([[False, True], [True, True]])}
        >>> page = report(before, wj.apply_masks(before, masks), masks)
        >>> "1 of 4 weights are gone" in page.html
        True
    """
    if (apply_fn is None) != (example is None):
        raise ValueError("Multiply-adds need both apply_fn and example: pass the other one too, or neither.")
    if evaluate is None and (magnitude or history):
        raise ValueError("magnitude and history compare accuracies: pass evaluate, from parameters to a number.")
    everything = read_leaves(before, after, masks)
    leaves = [leaf for leaf in everything if leaf.counts]
    sparsity = 1 - sum(leaf.kept for leaf in leaves) / sum(leaf.mask.size for leaf in leaves)
    story = tell(info, [leaf.name for leaf in everything])
    accuracies: dict[str, float] = {}
    if evaluate is not None:
        accuracies = {"before": _accuracy(evaluate(before)), "after": _accuracy(evaluate(after))}
    if evaluate is not None and magnitude:
        accuracies["magnitude"] = _accuracy(evaluate(_smallest_gone(before, everything)))
    macs = None
    if apply_fn is not None:
        each = jax.tree.leaves(weight_macs(apply_fn, before, example))
        macs = [mac for mac, leaf in zip(each, everything, strict=True) if leaf.counts]
    sections = [
        Section("summary", "Summary", cards_html(_cards(leaves, sparsity, accuracies, story))),
        accuracy_section(_points(sparsity, accuracies, history), accuracies["before"]) if accuracies else None,
        layers_section(leaves),
        loss_section(story),
        weights_section(leaves),
        masks_section(leaves),
        cost_section(leaves, macs, seconds),
        info_section(story),
        environment_section(environment()),
    ]
    return make_page(title, notes, [section for section in sections if section is not None])


def _accuracy(value: Any) -> float:
    accuracy = float(value)
    if not 0 <= accuracy <= 1:
        raise ValueError(f"An accuracy is {accuracy}: evaluate and history give fractions in [0, 1], not percentages.")
    return accuracy


def _smallest_gone(before: Params, leaves: Sequence[Leaf]) -> Params:
    """As many weights gone as were pruned, of the leaves that anything was pruned of."""
    touched = [leaf.counts and not leaf.mask.all() for leaf in leaves]
    scores = [
        jnp.abs(jnp.asarray(leaf.before)) if here else jnp.full(leaf.mask.shape, jnp.inf)
        for leaf, here in zip(leaves, touched, strict=True)
    ]
    ranked = [leaf for leaf, here in zip(leaves, touched, strict=True) if here]
    if not ranked:
        return before
    sparsity = 1 - sum(leaf.kept for leaf in ranked) / sum(leaf.mask.size for leaf in ranked)
    return apply_masks(before, make_masks(jax.tree.unflatten(jax.tree.structure(before), scores), sparsity))


def _points(
    sparsity: float, accuracies: dict[str, float], history: Sequence[Result | tuple[float, float]]
) -> list[Result]:
    others = [other if isinstance(other, Result) else _point("others", *other) for other in history]
    for other in others:
        _accuracy(other.accuracy)
        if not 0 <= other.sparsity <= 1:
            raise ValueError(f"history has the sparsity {other.sparsity}: it is a fraction in [0, 1].")
    here = [_point(HERE, sparsity, accuracies["after"])]
    if "magnitude" in accuracies:
        here.append(_point("magnitude", sparsity, accuracies["magnitude"], column="mask"))
    return [*others, *here]


def _point(title: str, sparsity: float, accuracy: float, column: str = "staged") -> Result:
    return Result(title, title, column, sparsity, sparsity, accuracy, math.nan, None, None, {})


def _cards(
    leaves: Sequence[Leaf], sparsity: float, accuracies: dict[str, float], story: Story
) -> list[tuple[str, str, str]]:
    kept, size = sum(leaf.kept for leaf in leaves), sum(leaf.mask.size for leaf in leaves)
    sparsest = min(leaves, key=lambda leaf: leaf.density)
    cards = [
        ("Sparsity", percent(sparsity), f"{size - kept:,} of {size:,} weights are gone"),
        ("Weights kept", number(kept), "of those that are prunable"),
    ]
    if accuracies:
        change = f"{100 * (accuracies['after'] - accuracies['before']):+.2f} points".replace("-", "−")
        cards.append(("Accuracy before", percent(accuracies["before"]), "of the network as it was"))
        cards.append(("Accuracy after", percent(accuracies["after"]), change))
    if "magnitude" in accuracies:
        cards.append(("Magnitude", percent(accuracies["magnitude"]), "accuracy, as many weights pruned"))
    if (predicted := total(story.predicted)) is not None:
        cards.append(("Predicted loss change", number(predicted), "by the quadratic model"))
    if (measured := total(story.measured)) is not None:
        cards.append(("Measured loss change", number(measured), "on the examples of each stage, added up"))
    cards.append(("Sparsest leaf", percent(sparsest.density), f"kept of {sparsest.name}"))
    return cards
