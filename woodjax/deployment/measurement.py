"""Networks side by side: size on disk, multiply-adds, and latency on the device at hand."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from woodjax.deployment._host import named_leaves, to_host
from woodjax.deployment.files import save_arrays
from woodjax.door import checked
from woodjax.macs import count_macs
from woodjax.typing import PyTree

Variant = tuple[Callable[[PyTree, PyTree], PyTree], PyTree]

COLUMNS = ("network", "parameters", "nonzero", "bytes on disk", "multiply-adds", "latency ms", "quartiles", "latency ×")


class Measurement(NamedTuple):
    """What one network costs."""

    name: str
    parameters: int
    """Floating numbers among its variables, batch statistics too."""
    nonzero: int
    """Of these, those that are not zero."""
    bytes_on_disk: int
    """Size of the safetensors file of its variables."""
    multiply_adds: int | None
    """Of one call; None where the program does not say, see `count_macs`."""
    latency: float
    """Median seconds of a call."""
    latency_low: float
    """Seconds that a quarter of the calls stay below."""
    latency_high: float
    """Seconds that a quarter of the calls exceed."""


class Measurements(tuple[Measurement, ...]):
    """Measurements of one run, the first network being what the others are compared with. `str` is a table."""

    note: str

    def __new__(cls, rows: Iterable[Measurement], note: str = "") -> "Measurements":
        """Rows, and a line that says where and on what they were taken."""
        self = super().__new__(cls, rows)
        self.note = note
        return self

    def __str__(self) -> str:
        """A table of plain text."""
        cells = [COLUMNS, *(_cells(row, self[0]) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([*lines, self.note]) if self.note else "\n".join(lines)


@checked
def measure(
    variants: Mapping[str, Variant], inputs: PyTree, *, repeats: int = 30, progress: bool = False
) -> Measurements:
    """Measure networks side by side: dense, masked, shrunk, in whatever form.

    Every network is compiled and called twice before the clock runs. Then the networks take turns, in an order that is
    reversed every other round, so that what the machine does meanwhile hits all of them. Variables and inputs are
    arguments of the compiled program, never constants of it. Each call is waited for. A call of few microseconds is
    mostly its dispatch.

    Args:
        variants: `(apply_fn, variables)` by name; the first is what the table compares with.
        inputs: What all of them take, with the batch that they are to run at.
        repeats: Timed calls of each.
        progress: Show a bar by rich.

    Returns:
        One measurement for each, in the order of `variants`.

    Raises:
        ImportError: No safetensors; no rich with `progress`.
        ValueError: No variant; `repeats < 1`; as `save_arrays`.

    Cost:
        A compilation and `repeats + 2` calls of each network; its variables are held on the device and written to a
        temporary file.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> network = lambda params, x: x @ params["kernel"]
        >>> sizes = {"dense": 64, "shrunk": 32}
        >>> variants = {name: (network, {"kernel": jnp.ones((8, n))}) for name, n in sizes.items()}
        >>> dense, shrunk = wj.measure(variants, jnp.ones((2, 8)), repeats=3)
        >>> dense.parameters, shrunk.multiply_adds
        (512, 512)
    """
    if not variants:
        raise ValueError('No variant: pass a mapping such as {"dense": (apply_fn, variables)}.')
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: pass at least 1, about 30 for quartiles.")
    inputs = jax.device_put(inputs)
    calls = [_call(apply_fn, variables, inputs) for apply_fn, variables in variants.values()]
    seconds = _seconds(calls, repeats, progress)
    rows = [
        _row(name, *variant, inputs, times) for (name, variant), times in zip(variants.items(), seconds.T, strict=True)
    ]
    return Measurements(rows, _note(inputs, repeats))


def _call(apply_fn: Callable[[PyTree, PyTree], PyTree], variables: PyTree, inputs: PyTree) -> Callable[[], PyTree]:
    variables = jax.device_put(variables)
    if isinstance(apply_fn, jax.tree_util.Partial):  # what it carries is an argument too
        call = partial(jax.jit(lambda function, v, x: function(v, x)), jax.device_put(apply_fn), variables, inputs)
    else:
        call = partial(jax.jit(apply_fn), variables, inputs)
    for _ in range(2):
        jax.block_until_ready(call())
    return call


def _seconds(calls: list[Callable[[], PyTree]], repeats: int, progress: bool) -> Float[np.ndarray, "repeats networks"]:
    rounds: Iterable[int] = range(repeats)
    if progress:
        try:
            from rich.progress import track
        except ImportError as error:
            raise ImportError("progress=True needs rich: pip install rich.") from error
        rounds = track(rounds, "Measuring")
    seconds = np.empty((repeats, len(calls)))
    for turn in rounds:
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for network in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[network]())
            seconds[turn, network] = time.perf_counter() - start
    return seconds


def _row(
    name: str,
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    variables: PyTree,
    inputs: PyTree,
    seconds: Float[np.ndarray, " repeats"],
) -> Measurement:
    leaves = [to_host(path, leaf) for path, leaf in named_leaves(variables).items()]
    floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "variables.safetensors")
        save_arrays(file, variables)
        written = file.stat().st_size
    try:
        products = count_macs(apply_fn, variables, inputs)
    except ValueError:
        products = None
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    nonzero = sum(int(np.count_nonzero(leaf)) for leaf in floating)
    return Measurement(name, sum(leaf.size for leaf in floating), nonzero, written, products, median, low, high)


def _note(inputs: PyTree, repeats: int) -> str:
    shapes = ", ".join(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in jax.tree.leaves(inputs))
    device = jax.devices()[0]
    return (
        f"Median of {repeats} interleaved calls on {shapes}; {device.platform} ({device.device_kind}), "
        f"jax {jax.__version__}."
    )


def _cells(row: Measurement, first: Measurement) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.parameters:,}",
        f"{row.nonzero:,}",
        f"{row.bytes_on_disk:,}",
        "–" if row.multiply_adds is None else f"{row.multiply_adds:,}",
        f"{1e3 * row.latency:.3f}",
        f"{1e3 * row.latency_low:.3f} – {1e3 * row.latency_high:.3f}",
        f"{row.latency / first.latency:.2f}",
    )
