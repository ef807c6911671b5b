"""The sections of the page: each is made of what there is, or is None."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from woodjax.plots import draw_accuracy, draw_kept, draw_mask, draw_predicted_loss, draw_updates, draw_weights
from woodjax.plots.layers import kept_cells
from woodjax.records import Result
from woodjax.report.infos import Story
from woodjax.report.leaves import Leaf
from woodjax.report.markup import Section, Table, figure_html, number, paragraphs_html, percent, table_html
from woodjax.report.svg import inline_svg

WIDE = (4.6, 2.9)  # inches: text stays readable on a phone
MOST_MASKS = 24


def accuracy_section(points: Sequence[Result], dense: float) -> Section | None:
    """Accuracy against sparsity."""
    points = [point for point in points if point.sparsity < 1]  # no place on the axis for nothing kept
    if not points:
        return None
    titles = list(dict.fromkeys(point.title for point in points))

    def draw(axes):
        draw_accuracy(axes, points, dense=dense)
        legend = axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)

    height = WIDE[1] + 0.17 * (len(titles) // 2 + 1)
    svg = inline_svg(
        draw, prefix="accuracy", label=f"Accuracy against sparsity: {', '.join(titles)}", size=(WIDE[0], height)
    )
    rows = tuple((p.title, percent(p.sparsity), percent(p.accuracy)) for p in points)
    caption = "The axis is logarithmic in what is kept. The grey line is the network before the pruning."
    table = table_html(Table("Accuracy", ("network", "sparsity", "accuracy"), rows))
    return Section("accuracy-section", "Accuracy and sparsity", _beside(figure_html(svg, caption), table))


def layers_section(leaves: Sequence[Leaf]) -> Section:
    """What every prunable leaf keeps."""
    density = {leaf.name: leaf.density for leaf in leaves}
    svg = inline_svg(
        lambda axes: draw_kept(axes, density),
        prefix="layers",
        label="Kept of each leaf: " + ", ".join(f"{name} {percent(value)}" for name, value in density.items()),
        size=(WIDE[0], 0.7 + 0.2 * len(leaves)),
    )
    rows = tuple(
        (
            leaf.name,
            " × ".join(map(str, leaf.mask.shape)),
            number(leaf.mask.size),
            number(leaf.kept),
            percent(leaf.density),
        )
        for leaf in leaves
    )
    table = table_html(Table("Counts", ("leaf", "shape", "weights", "kept", "density"), rows))
    return Section("layers-section", "What each layer keeps", _beside(figure_html(svg, "Kept of each leaf."), table))


def loss_section(story: Story) -> Section | None:
    """Predicted and measured change of the loss."""
    if not np.isfinite(story.measured).any() or not np.isfinite(story.predicted).any():
        return None
    draw = partial(draw_predicted_loss, predicted=story.predicted, measured=story.measured, sparsity=story.sparsity)
    label = (
        f"Change of the loss in {len(story.predicted)} stages: predicted {number(total(story.predicted))} in all, "
        f"measured {number(total(story.measured))}"
    )
    svg = inline_svg(draw, prefix="loss", label=label, size=WIDE)
    caption = (
        "Change of the mean loss in each stage: what the quadratic model predicts, and what was measured on the "
        "examples of that stage. Far apart means that the model does not hold over such a "
        "step, and that its size is not to be relied on."
    )
    return Section("loss-section", "Predicted and measured loss", figure_html(svg, caption))


def weights_section(leaves: Sequence[Leaf]) -> Section:
    """Distributions of weights and of their moves."""
    survivors = [leaf.after[leaf.mask] for leaf in leaves]
    moves = [leaf.after[leaf.mask] - leaf.before[leaf.mask] for leaf in leaves]
    svg = inline_svg(
        lambda axes: draw_weights(axes, [leaf.before for leaf in leaves], survivors),
        prefix="weights",
        label="Histogram of all weights before and of the survivors after the pruning",
        size=WIDE,
    )
    pictures = figure_html(svg, "Weights of the leaves above, on a logarithmic axis.")
    moved = sum(int(np.count_nonzero(move)) for move in moves)
    if moved:
        lengths = [float(np.sqrt(sum(np.vdot(x, x) for x in arrays))) for arrays in (moves, survivors)]
        svg = inline_svg(
            lambda axes: draw_updates(axes, moves),
            prefix="moves",
            label=f"Histogram of the moves of the survivors; {moved} of them moved",
            size=WIDE,
        )
        pictures += figure_html(
            svg,
            f"How far the survivors moved: {moved:,} of them, the length of the move {number(lengths[0])} against "
            f"{number(lengths[1])} of the survivors themselves.",
        )
    return Section("weights-section", "Weights", f'<div class="pictures">{pictures}</div>')


def masks_section(leaves: Sequence[Leaf]) -> Section | None:
    """Where in a kernel the survivors are."""
    cut = [leaf for leaf in leaves if leaf.mask.ndim >= 2 and 0 < leaf.kept < leaf.mask.size]
    if not cut:
        return None
    largest = sorted(cut, key=lambda leaf: leaf.mask.size, reverse=True)[:MOST_MASKS]
    shown = [leaf for leaf in cut if any(leaf is other for other in largest)]
    pictures = ""
    for number_, leaf in enumerate(shown):
        densest = float(kept_cells(leaf.mask).max())
        scale = f", full colour at {percent(densest)}" if densest < 1 else ""
        svg = inline_svg(
            partial(draw_mask, mask=leaf.mask),
            prefix=f"mask{number_}",
            label=f"Mask of {leaf.name}, {percent(leaf.density)} kept",
            size=(2.1, 2.0),
        )
        pictures += figure_html(svg, f"{leaf.name}: {percent(leaf.density)} kept{scale}")
    said = (
        "Inputs downwards, outputs to the right; empty is pruned. Where there are more channels than cells, and of the "
    )
    said += "positions of a filter, a cell shows the fraction that is kept."
    if len(shown) < len(cut):
        said += f" The {len(shown)} largest of {len(cut)} kernels."
    return Section("masks-section", "Masks", f'{paragraphs_html([said])}<div class="masks">{pictures}</div>')


def cost_section(leaves: Sequence[Leaf], macs: Sequence[int] | None, seconds: float | None) -> Section:
    """Bytes, multiply-adds and seconds."""
    dense = sum(leaf.mask.size * leaf.itemsize for leaf in leaves)
    survivors = sum(leaf.kept * leaf.itemsize for leaf in leaves)
    bits = sum(-(-leaf.mask.size // 8) for leaf in leaves)
    pointers = sum(4 * (leaf.mask.size // leaf.mask.shape[-1] + 1) for leaf in leaves)
    csr = survivors + 4 * sum(leaf.kept for leaf in leaves) + pointers
    rows = [
        ("bytes, dense", number(dense), "100.00 %"),
        ("bytes, survivors and a bit a weight", number(survivors + bits), percent((survivors + bits) / dense)),
        ("bytes, CSR with 32-bit indices", number(csr), percent(csr / dense)),
    ]
    if macs is not None and sum(macs):
        whole = sum(mac * leaf.mask.size for mac, leaf in zip(macs, leaves, strict=True))
        left = sum(mac * leaf.kept for mac, leaf in zip(macs, leaves, strict=True))
        rows += [
            ("multiply-adds of these leaves, dense", number(whole), "100.00 %"),
            ("multiply-adds with a survivor", number(left), percent(left / whole)),
        ]
    if seconds is not None:
        rows.append(("seconds that the pruning took", number(float(seconds)), "–"))
    said = ["Computed from the counts above. Zeros make a network smaller, not faster, unless a kernel skips them."]
    table = table_html(Table("Of the prunable leaves", ("", "amount", "of the dense"), tuple(rows)))
    return Section("cost-section", "Cost", paragraphs_html(said) + table)


def info_section(story: Story) -> Section | None:
    """What the pruning said of itself."""
    if not story.tables and not story.notes:
        return None
    body = paragraphs_html(story.notes) + "".join(map(table_html, story.tables))
    return Section("info-section", "How it was pruned", body)


def environment_section(environment: dict[str, str]) -> Section:
    """Versions and device."""
    table = Table("The page was made with", ("", "value"), tuple(environment.items()))
    return Section("environment-section", "Environment", table_html(table))


def total(values: np.ndarray) -> float | None:
    """Sum over stages; None where one of them is not known."""
    return float(values.sum()) if values.size and np.isfinite(values).all() else None


def _beside(picture: str, table: str) -> str:
    return f'<div class="pictures">{picture}<div>{table}</div></div>'
