"""Layer-by-layer pruning of a byte-level decoder: perplexity on real text before and after.

    python benchmarks/language_model.py --json OUT.jsonl --checkpoint-dir DIR
    python benchmarks/render.py OUT.jsonl

Trains a decoder on the reference of the Python language (`woodjax.datasets.load_text`), once for every seed: with
`--checkpoint-dir` it is kept and found again. The text differs between versions of Python; records say which.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from records import Recorder, parser, pin_blas, seeds
from rich.progress import track

import woodjax as wj
from woodjax.adapters.nnx import host_layers
from woodjax.datasets import TextDataset, load_text
from woodjax.models import Decoder

METHODS = {  # of prune_layers, and whether it is given gradients of the loss
    "magnitude": ("magnitude", False),
    "wanda": ("wanda", False),
    "wanda+fisher": ("wanda", True),
    "sparsegpt": ("sweep", False),
    "row-fisher": ("sweep", True),
}
GROUPS = 4  # of output units that share a Fisher


class Size(NamedTuple):
    """How large everything is."""

    network: str
    widths: dict[str, int]
    context: int
    batch: int
    steps: int
    learning_rate: float
    calibration: int  # sequences
    microbatch: int
    sparsities: tuple[float, ...]
    methods: tuple[str, ...] = tuple(METHODS)


FULL = Size(
    "decoder-6x192",
    {"width": 192, "depth": 6, "heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 512},
    context=128,
    batch=32,
    steps=600,
    learning_rate=2e-3,
    calibration=256,
    microbatch=32,
    sparsities=(0.5, 0.6, 0.7),
)
QUICK = Size(
    "decoder-2x64",
    {"width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 128},
    context=64,
    batch=32,
    steps=100,
    learning_rate=4e-3,
    calibration=64,
    microbatch=32,
    sparsities=(0.5,),
    methods=("magnitude", "wanda", "sparsegpt", "row-fisher"),
)


def decoder(size: Size, seed: int) -> Decoder:
    """The network, untrained."""
    return Decoder(vocabulary=256, context=size.context, **size.widths, rngs=nnx.Rngs(seed))


def blocks_of(model: Decoder) -> list[nnx.Module]:
    """The blocks of a decoder."""
    return [getattr(model, f"blocks_{i}") for i in range(model.depth)]


def embed(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """What goes into the first block."""
    return np.asarray(model.embedding(jnp.asarray(tokens, jnp.int32)) + model.positions[: tokens.shape[1]])


def head_loss(head: tuple[Any, Any], hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum of the cross-entropies of the next bytes, from what the last block makes."""
    scale, kernel = head
    logits = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-6) * scale @ kernel
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype(jnp.int32)))


def head_of(model: Decoder) -> jax.tree_util.Partial:
    """`head_loss` with the final norm and kernel of a model."""
    return jax.tree_util.Partial(head_loss, (model.norm.scale[...], model.linear.kernel[...]))


def trained(size: Size, text: TextDataset, seed: int, folder: Path | None) -> tuple[Decoder, float]:
    """The network after its training, or from its checkpoint; and the seconds that it took."""
    model = decoder(size, seed)
    graph, state = nnx.split(model)
    version = text.source.replace(" ", "-").lower()
    file = folder / f"{size.network}-{size.steps}-{version}-{seed}.safetensors" if folder else None
    if file is not None and file.exists():
        values, metadata = wj.load_arrays(file, like=nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graph, state), metadata["seconds"]
    schedule = optax.warmup_cosine_decay_schedule(0, size.learning_rate, size.steps // 20, size.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def loss_fn(state: nnx.State, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state)(rows[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(state: nnx.State, moments: Any, rows: jax.Array) -> tuple[nnx.State, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(state, rows)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    moments, rng, begin = optimizer.init(state), np.random.default_rng(seed), time.perf_counter()
    for number in track(range(size.steps), f"training, seed {seed}"):
        first = rng.integers(0, len(text.train) - size.context, size.batch)
        rows = text.train[first[:, None] + np.arange(size.context + 1)].astype(np.int32)
        state, moments, loss = step(state, moments, rows)
        if number % 50 == 49:
            print(f"step {number + 1}: {float(loss) / math.log(2):.3f} bits a byte", flush=True)
    seconds = time.perf_counter() - begin
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        wj.save_arrays(file, nnx.to_pure_dict(state), metadata={"seconds": seconds})
    return nnx.merge(graph, state), seconds


@jax.jit
def _layer(function: Any, params: Any, hidden: jax.Array) -> jax.Array:
    return function(params, hidden)


_head = jax.jit(lambda head, hidden, targets: head(hidden, targets))


def bits_per_byte(model: Decoder, layers: list[wj.HostLayer], rows: np.ndarray, microbatch: int) -> float:
    """Mean cross-entropy of the next byte, through the layers as they are now."""
    total, head = 0.0, head_of(model)
    functions = [jax.tree_util.Partial(layer.apply) for layer in layers]
    for start in range(0, len(rows), microbatch):
        part = rows[start : start + microbatch]
        hidden = embed(model, part[:, :-1])
        for function, layer in zip(functions, layers, strict=True):
            hidden = _layer(function, layer.params, hidden)
        total += float(_head(head, hidden, part[:, 1:]))
    return total / rows[:, 1:].size / math.log(2)


def measure(record: Recorder, size: Size, text: TextDataset, seed: int, folder: Path | None) -> None:
    """Perplexity dense, and by every method at every sparsity."""
    model, seconds = trained(size, text, seed, folder)
    validation = text.rows("validation", size.context + 1)
    train = text.rows("train", size.context + 1)
    rows = train[np.random.default_rng(seed).permutation(len(train))[: size.calibration]]
    hidden = embed(model, rows[:, :-1])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    common = {"source": text.source, "calibration": size.calibration, "context": size.context, "parameters": parameters}
    common |= {"steps": size.steps, "groups": GROUPS}
    dense = bits_per_byte(model, host_layers(blocks_of(model)), validation, size.microbatch)
    say = partial(_say, record, seed, common)
    say("dense", None, dense, seconds)
    begin = time.perf_counter()
    layers = host_layers(blocks_of(model))
    options = {"microbatch_size": size.microbatch}
    gradients = wj.squared_output_gradients(layers, hidden, head_of(model), rows[:, 1:], groups=GROUPS, **options)
    backward = time.perf_counter() - begin
    targets = [(sparsity, {"sparsity": sparsity}) for sparsity in size.sparsities] + [("2:4", {"pattern": wj.NM(2, 4)})]
    for name in size.methods:
        method, guided = METHODS[name]
        for target, what in targets:
            layers, begin = host_layers(blocks_of(model)), time.perf_counter()
            how = options | ({"output_gradients": gradients} if guided else {})
            _, infos = wj.prune_layers(layers, hidden, method=method, **what, **how)
            seconds = time.perf_counter() - begin + (backward if guided else 0)
            expected = 0.5 if target == "2:4" else target
            assert all(abs(info.sparsity - expected) < 1e-4 for info in infos)
            say(name, target, bits_per_byte(model, layers, validation, size.microbatch), seconds)


def _say(
    record: Recorder, seed: int, common: dict[str, Any], method: str, target: Any, bits: float, seconds: float
) -> None:
    config = common | {"pattern": target if isinstance(target, str) else None}
    sparsity = 0.5 if isinstance(target, str) else target
    options = {"method": method, "column": None, "sparsity": sparsity, "seed": seed, "config": config}
    record.add("bits_per_byte", bits, "bits", **options)
    record.add("perplexity_per_byte", 2**bits, "1", **options)
    record.add("seconds", seconds, "s", **options)
    print(f"{method} {target or ''}: {bits:.4f} bits a byte, {seconds:.1f} s", flush=True)


def main() -> int:
    """Measure every seed."""
    pin_blas()
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--checkpoint-dir", type=Path, help="folder in which trained networks are kept")
    chosen = options.parse_args()
    size, text = QUICK if chosen.quick else FULL, load_text()
    record = Recorder(chosen.json, "language_model", size.network, text.name)
    for seed in seeds(chosen.seeds):
        measure(record, size, text, seed, chosen.checkpoint_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
