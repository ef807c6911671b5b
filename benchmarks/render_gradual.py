"""The table and the picture of gradual pruning; called by `render.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]


def runs(records: list[Record], metric: str) -> dict[tuple[str, float], list[float]]:
    """Values by method and target, one for each seed."""
    found: dict[tuple[str, float], list[float]] = {}
    for r in records:
        if r["metric"] == metric and r["sparsity"] is not None:
            found.setdefault((r["method"], r["sparsity"]), []).append(r["value"])
    return found


def prunings(records: list[Record], method: str, target: float, metric: str) -> tuple[list[float], list[float]]:
    """Sparsity reached and mean over seeds, at each due step."""
    rows = [r for r in records if (r["method"], r["sparsity"], r["metric"]) == (method, target, metric)]
    steps = sorted({r["config"]["step"] for r in rows})
    at = [[r for r in rows if r["config"]["step"] == step] for step in steps]
    return [r[0]["config"]["reached"] for r in at], [float(np.mean([x["value"] for x in r])) for r in at]


def titles(records: list[Record]) -> dict[str, str]:
    """Methods in the order of the runs."""
    return {r["method"]: r["config"]["title"] for r in records if r["metric"] == "seconds"}


def cell(numbers: list[float]) -> str:
    """Mean, and standard deviation where there are several seeds."""
    spread = f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.2f}{spread}"


def readme_table(records: list[Record]) -> str:
    """Final accuracy, and the lowest right after a pruning, by method and target."""
    dense = [r["value"] for r in records if r["method"] == "dense"]
    final = runs(records, "final_accuracy")
    targets = sorted({target for _, target in final})
    head = f"{records[0]['network']} on {records[0]['dataset']}, dense {cell(dense)} %"
    columns = [f"{100 * t:g} % final" for t in targets] + [f"{100 * t:g} % lowest" for t in targets]
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method, title in titles(records).items():
        lowest = [min(prunings(records, method, t, "accuracy_after_prune")[1]) for t in targets]
        cells = [cell(final[method, t]) for t in targets] + [f"{value:.1f}" for value in lowest]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(records: list[Record]) -> str:
    """What the README shows, then every pruning."""
    env, config = records[0]["env"], next(r["config"] for r in records if r["metric"] == "seconds")
    lines = [
        f"# gradual: {records[0]['network']} on {records[0]['dataset']}",
        "",
        f"Test accuracy in %, mean ± standard deviation over seeds, {config['test_examples']} test images. "
        f"JAX {env['jax']}, {env['device']}. Every method has {config['prune_steps']} steps of Adam with prunings and "
        f"{config['tune_steps']} after the last, batches of {config['batch_size']}, cosine from "
        f"{config['learning_rate']:g}; route A sees {config['examples']} more examples at each pruning. *Lowest*: the "
        "lowest mean accuracy right after a pruning."
        + (" The network starts from a checkpoint of other pixels, in a short schedule." if config["weights"] else ""),
        "",
        readme_table(records),
        "",
        "## Right before and right after each pruning",
        "",
    ]
    for target in sorted({t for _, t in runs(records, "final_accuracy")}):
        names = titles(records)
        reached = prunings(records, next(iter(names)), target, "accuracy_after_prune")[0]
        lines += [f"| target {100 * target:g} % | " + " | ".join(f"{100 * s:.1f}" for s in reached) + " |"]
        lines += ["|---|" + "---|" * len(reached)]
        for method, title in names.items():
            before = prunings(records, method, target, "accuracy_before_prune")[1]
            after = prunings(records, method, target, "accuracy_after_prune")[1]
            cells = [f"{b:.1f} → {a:.1f}" for b, a in zip(before, after, strict=True)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(records: list[Record]) -> Figure:
    """Accuracy along the training, with the drop at each pruning, a panel for each target."""
    final = runs(records, "final_accuracy")
    targets = sorted({target for _, target in final})
    config = next(r["config"] for r in records if r["metric"] == "seconds")
    figure = Figure(figsize=(4 * len(targets), 4), layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    dense = float(np.mean([r["value"] for r in records if r["method"] == "dense"]))
    for axes, target in zip(panels, targets, strict=True):
        axes.axhline(dense, color="0.7", linewidth=1, label="dense")
        for method, title in titles(records).items():
            before, after = (prunings(records, method, target, f"accuracy_{w}_prune") for w in ("before", "after"))
            steps = np.repeat(sorted({r["config"]["step"] for r in records if "step" in r["config"]}), 2)
            accuracy = np.ravel(np.column_stack([before[1], after[1]]))
            end = config["prune_steps"] + config["tune_steps"], float(np.mean(final[method, target]))
            (line,) = axes.plot([*steps, end[0]], [*accuracy, end[1]], linewidth=1.2, label=title)
            axes.plot(steps[1::2], after[1], "o", markersize=4, color=line.get_color())
            axes.plot(*end, "*", markersize=9, color=line.get_color())
        axes.set_title(f"to {100 * target:g} %")
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.suptitle(f"{records[0]['network']} on {records[0]['dataset']}: ● right after a pruning, ★ at the end")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
