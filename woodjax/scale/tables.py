"""Costs of several prunings side by side."""

from collections.abc import Mapping

from woodjax.door import checked
from woodjax.scale.costs import ScalingCost

HEADER = (
    "| | devices | data × others | window | passes | peak GB | fits | seconds | gradients | linear algebra | GB sent |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


@checked
def cost_table(costs: Mapping[str, ScalingCost]) -> str:
    """A Markdown table with a row for each cost.

    Args:
        costs: By the name that the row shall have.

    Returns:
        Text. Peak, seconds and bytes are those of one device; seconds of the linear algebra are those of everything
        but gradients, communication included.

    Example:
        >>> import woodjax as wj
        >>> print(wj.cost_table({"ResNet-50": wj.scaling_cost(25_500_000, 1024, 8, wj.H100_SXM)}).splitlines()[-1])
        | ResNet-50 | 8 H100 SXM | 8 × 1 | all | 1 | 26.2 of 80 | yes | 0.239 | 0.0156 | 0.223 | 11.6 |
    """
    return "\n".join([*HEADER, *(_row(name, cost) for name, cost in costs.items())]) + "\n"


def _row(name: str, cost: ScalingCost) -> str:
    sharding, gradients = cost.sharding, cost.stages[0].seconds
    cells = [
        name,
        f"{sharding.devices} {cost.hardware.name}",
        f"{sharding.data_devices} × {sharding.devices // sharding.data_devices}",
        f"{sharding.window_columns:,}" if sharding.windowed else "all",
        f"{cost.passes:,}",
        f"{cost.peak_bytes / 1e9:.1f} of {cost.hardware.memory_bytes / 1e9:.0f}",
        "yes" if cost.fits else "no",
        *(_short(seconds) for seconds in (cost.seconds, gradients, cost.seconds - gradients)),
        _short(cost.wire_bytes / 1e9),
    ]
    return "| " + " | ".join(cells) + " |"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
