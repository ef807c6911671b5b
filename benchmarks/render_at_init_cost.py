"""Table of `at_init_cost.py`."""

from typing import Any


def table(records: list[dict[str, Any]]) -> str:
    """Seconds of each criterion at each size."""
    env = records[0]["env"]
    sizes = sorted({r["config"]["parameters"] for r in records if r["metric"] == "seconds"})
    lines = [
        "# Cost of scores at initialization",
        "",
        "Seconds for the scores of 20 images of 16×16, slim VGGs of as many parameters as the column says, and "
        f"the exponent of a power law through them. JAX {env['jax']}, {env['device']}.",
        "",
        "| criterion | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for method in dict.fromkeys(r["method"] for r in records):
        own = [r for r in records if r["method"] == method]
        times = {r["config"]["parameters"]: r["value"] for r in own if r["metric"] == "seconds"}
        exponent = next(r["value"] for r in own if r["metric"] == "time_exponent")
        cells = [f"{times[size]:.3g}" for size in sizes]
        lines.append(f"| {own[0]['config']['title']} | " + " | ".join(cells) + f" | {exponent:.2f} |")
    return "\n".join(lines) + "\n"
