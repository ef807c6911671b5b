"""The table of the transform's cost on a step on which no pruning is due; called by `render.py`."""

from typing import Any

Record = dict[str, Any]


def table(records: list[Record]) -> str:
    """One row for each route, a pair of columns for each batch size."""
    env, sizes = records[0]["env"], sorted({r["config"]["batch_size"] for r in records})
    lines = [
        "# What `prune_transform` adds to a training step on which no pruning is due",
        "",
        f"{records[0]['network']}, AdamW, state donated. JAX {env['jax']}, {env['device']}. Median of the ratios to a "
        "step without it, steps taken in turns.",
        "",
        "| route | " + " | ".join(f"batch {n}: ratio | ms | temporary MB" for n in sizes) + " |",
        "|---|" + "---|" * (3 * len(sizes)),
    ]
    for route in dict.fromkeys(r["config"]["route"] for r in records):
        cells = [route]
        for size in sizes:
            row = next(r for r in records if (r["config"]["route"], r["config"]["batch_size"]) == (route, size))
            memory = row["config"]["temporary_bytes"]
            cells += [f"{row['value']:.3f}", f"{1e3 * row['config']['seconds']:.2f}"]
            cells.append("" if memory is None else f"{memory / 1e6:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
