"""Published accuracies that the one-shot tables are compared with; where each figure comes from stands beside it."""

from typing import NamedTuple


class Published(NamedTuple):
    """One row of a published table."""

    title: str
    column: str
    source: str  # "read" in the named project's data, or "as recalled" from the paper and not read again
    accuracy: dict[float, float]  # by sparsity, in %


MLPNET = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
RESNET20 = (0.5, 0.6, 0.7, 0.8, 0.9)
READ = "read in CBS's result files"
RECALLED = "as recalled from CHITA, table 1"


def _row(title: str, column: str, source: str, levels: tuple[float, ...], *accuracy: float) -> Published:
    return Published(title, column, source, dict(zip(levels, accuracy, strict=True)))


TABLES = {
    "mlpnet": (
        93.97,
        [
            _row("Magnitude", "mask", READ, MLPNET, 93.93, 93.78, 93.62, 92.89, 90.30, 83.64, 32.25),
            _row("WoodFisher", "update", READ, MLPNET, 94.02, 93.82, 93.77, 93.57, 91.69, 85.54, 38.26),
            _row("CBS", "update", READ, MLPNET, 93.96, 93.96, 93.98, 93.90, 93.14, 88.92, 55.45),
            _row("CBS, mask only", "mask", READ, MLPNET, 93.91, 93.85, 93.75, 93.59, 92.37, 88.24, 66.64),
            _row("CHITA", "update", RECALLED, MLPNET, 93.97, 93.94, 93.80, 93.59, 92.46, 88.09, 46.25),
            _row("CHITA++", "first_order", RECALLED, MLPNET, 95.97, 95.93, 95.89, 95.80, 95.55, 94.70, 90.73),
        ],
    ),
    "resnet20": (
        91.36,
        [
            _row("Magnitude", "mask", RECALLED, RESNET20, 88.44, 85.24, 78.79, 54.01, 11.79),
            _row("WoodFisher", "update", RECALLED, RESNET20, 90.23, 87.96, 81.05, 62.63, 11.49),
            _row("CBS", "update", RECALLED, RESNET20, 90.58, 88.88, 81.84, 51.28, 13.68),
            _row("CHITA", "update", RECALLED, RESNET20, 90.60, 89.22, 84.12, 57.90, 15.60),
            _row("CHITA++", "first_order", RECALLED, RESNET20, 91.04, 90.78, 90.38, 88.72, 79.32),
        ],
    ),
}


def table(network: str, dense: float) -> list[str]:
    """Lines of the published table of a network; with the drop where it is of another checkpoint."""
    if network not in TABLES:
        return []
    reference, rows = TABLES[network]
    same = abs(reference - dense) < 0.01
    note = (
        "the same checkpoint and test set: accuracies compare"
        if same
        else f"another checkpoint, dense {reference:.2f}: compare the drop, dense minus accuracy"
    )
    levels = list(rows[0].accuracy)
    lines = [
        "",
        f"Published, {note}.",
        "",
        "| method | column | source | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |",
    ]
    lines += ["|---|---|---|" + "---|" * len(levels)]
    for row in rows:
        cells = [
            f"{value:.2f}" if same else f"{value:.2f} (−{reference - value:.2f})" for value in row.accuracy.values()
        ]
        lines.append("| " + " | ".join([row.title, row.column, row.source, *cells]) + " |")
    return lines
