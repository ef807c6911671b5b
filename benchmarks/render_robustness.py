"""Table of `robustness.py`."""

import collections
from typing import Any

OUTCOMES = ("right", "refused", "shown", "passed on", "defect")
HEADS = ("right answer", "refused clearly", "NaN shown", "user's own error", "defects")


def table(records: list[dict[str, Any]]) -> str:
    """Calls of each kind of mutation, then of each function, by outcome."""
    env = records[0]["env"]
    by_mutation, by_function = (
        collections.defaultdict(collections.Counter),
        collections.defaultdict(collections.Counter),
    )
    for record in _calls(records):
        by_mutation[record["config"]["mutation"]][record["config"]["outcome"]] += record["value"]
        by_function[record["method"]][record["config"]["outcome"]] += record["value"]
    lines = ["# Bad arguments", "", f"JAX {env['jax']}, {env['device']}.", "", readme_table(records), ""]
    for title, counts in (("argument is", by_mutation), ("function", by_function)):
        lines += [f"| {title} | " + " | ".join(HEADS) + " |", "|---|" + "---|" * len(HEADS)]
        for name in sorted(counts):
            lines.append(f"| {name} | " + " | ".join(f"{counts[name][kind] or ''}" for kind in OUTCOMES) + " |")
        lines.append("")
    return "\n".join(lines)


def readme_table(records: list[dict[str, Any]]) -> str:
    """All calls by outcome."""
    counts = collections.Counter()
    for record in _calls(records):
        counts[record["config"]["outcome"]] += record["value"]
    functions = len({record["method"] for record in _calls(records)})
    mutations = len({record["config"]["mutation"] for record in _calls(records)})
    kind = ", of those that must be refused alone" if records[0]["config"].get("quick") else ""
    head = f"{functions} functions, {mutations} ways to spoil an argument{kind}"
    return "\n".join([
        f"| {head} | {sum(counts.values()):,} calls |",
        "|---|---|",
        *(f"| {title} | {counts[name]:,} |" for title, name in zip(HEADS, OUTCOMES, strict=True)),
    ])


def _calls(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["metric"] == "calls"]
