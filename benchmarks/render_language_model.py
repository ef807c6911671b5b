"""Table and picture of `language_model.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]

TITLES = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "wanda+fisher": "Wanda, inputs weighted by gradients of the loss",
    "sparsegpt": "column sweep (SparseGPT)",
    "row-fisher": "column sweep, row Fisher of {groups} groups of outputs",
}


def _values(records: list[Record], metric: str, **wanted: Any) -> list[float]:
    def value(r: Record, key: str) -> Any:
        return r[key] if key in r else r["config"].get(key)

    return [r["value"] for r in records if r["metric"] == metric and all(value(r, k) == v for k, v in wanted.items())]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _columns(records: list[Record]) -> list[tuple[str, dict[str, Any]]]:
    sparsities = sorted({r["sparsity"] for r in records if r["sparsity"] is not None and not r["config"]["pattern"]})
    patterns = sorted({r["config"]["pattern"] for r in records} - {None})
    plain = [(f"{100 * s:g} %", {"sparsity": s, "pattern": None}) for s in sparsities]
    return plain + [(pattern, {"pattern": pattern}) for pattern in patterns]


def _grid(records: list[Record], metric: str) -> list[str]:
    columns = _columns(records)
    lines = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for method, title in TITLES.items():
        if cells := [_cell(_values(records, metric, method=method, **wanted)) for _, wanted in columns]:
            lines.append(f"| {title.format(**records[0]['config'])} | " + " | ".join(cells) + " |")
    return lines


def readme_table(records: list[Record]) -> str:
    """Bits a byte, and what was run."""
    first = records[0]
    config, seeds = first["config"], len({r["seed"] for r in records})
    dense = _cell(_values(records, "bits_per_byte", method="dense"))
    perplexity = _cell(_values(records, "perplexity_per_byte", method="dense"))
    trained = f"{config['parameters'] / 1e6:.1f} million parameters, trained for {config['steps']} steps"
    data = f"{config['calibration']} calibration sequences of {config['context']} bytes"
    text = f"{first['dataset']} ({config['source']})"
    lines = [
        f"Bits a byte on held-out text: {first['network']}, {trained} on {text}; {data}; "
        f"{seeds} seed{'s' if seeds > 1 else ''}. Dense: {dense}, a perplexity of {perplexity} a byte.",
        "",
        *_grid(records, "bits_per_byte"),
    ]
    return "\n".join(lines)


def table(records: list[Record]) -> str:
    """Bits and perplexity a byte, and seconds."""
    env = records[0]["env"]
    parts = ["# Layer-by-layer pruning of a language model", "", f"JAX {env['jax']}, {env['device']}.", ""]
    parts += [readme_table(records), "", "Perplexity a byte:", "", *_grid(records, "perplexity_per_byte")]
    parts += ["", "Seconds of a pruning, compilation where it comes first included, the backward sweep where used:", ""]
    return "\n".join([*parts, *_grid(records, "seconds")]) + "\n"


def picture(records: list[Record]) -> Figure:
    """Bits a byte against sparsity."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(np.mean(_values(records, "bits_per_byte", method="dense")), color="0.6", linewidth=1, label="dense")
    plain = [wanted for _, wanted in _columns(records) if "sparsity" in wanted]
    for method, title in TITLES.items():
        means = [np.mean(_values(records, "bits_per_byte", method=method, **wanted)) for wanted in plain]
        line = axes.plot([100 * wanted["sparsity"] for wanted in plain], means, "-o", markersize=4)[0]
        line.set_label(title.format(**records[0]["config"]))
        if values := _values(records, "bits_per_byte", method=method, pattern="2:4"):
            axes.plot([50], [np.mean(values)], "x", color=line.get_color())
    axes.set(xlabel="% of weights pruned (crosses: 2:4)", ylabel="bits a byte", title=records[0]["network"])
    axes.legend(frameon=False, fontsize=7)
    return figure
