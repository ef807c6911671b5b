"""A decoder with grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), RMSNorm and SwiGLU."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int


class GroupedQueryAttention(nnx.Module):
    """Causal self-attention in which several heads of queries share a head of keys and values.

    The kernels have an axis of heads: `[width, heads, head_dim]` and, of the output, `[heads, head_dim, width]`.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, *, rngs: nnx.Rngs) -> None:
        """Build the projections.

        Args:
            width: Of the residual stream.
            heads: Of the queries.
            kv_heads: Of keys and values; they divide the heads.
            head_dim: Of a head.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Heads that do not divide.
        """
        if heads % kv_heads:
            raise ValueError(f"heads={heads}, kv_heads={kv_heads}: the second must divide the first.")
        self.scale: float = head_dim**-0.5  # of the network as it was made, also when heads become narrower
        self.query: nnx.LinearGeneral = nnx.LinearGeneral(width, (heads, head_dim), use_bias=False, rngs=rngs)
        self.key: nnx.LinearGeneral = nnx.LinearGeneral(width, (kv_heads, head_dim), use_bias=False, rngs=rngs)
        self.value: nnx.LinearGeneral = nnx.LinearGeneral(width, (kv_heads, head_dim), use_bias=False, rngs=rngs)
        self.out: nnx.LinearGeneral = nnx.LinearGeneral(
            (heads, head_dim), width, axis=(-2, -1), use_bias=False, rngs=rngs
        )

    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        """Apply the attention to a batch."""
        attended = jax.nn.dot_product_attention(
            self.query(x), self.key(x), self.value(x), scale=self.scale, is_causal=True
        )
        return self.out(attended)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) · up(x))`, three kernels without biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        """Build the kernels.

        Args:
            width: Of the residual stream.
            hidden: Of the gate.
            rngs: Random numbers for the initial weights.
        """
        self.gate: nnx.Linear = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up: nnx.Linear = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down: nnx.Linear = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        """Apply the layers to a batch."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nnx.Module):
    """Attention and SwiGLU, each behind an RMSNorm and beside a residual stream."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            width: Of the residual stream.
            heads: Of the queries.
            kv_heads: Of keys and values; they divide the heads.
            head_dim: Of a head.
            hidden: Of the SwiGLU.
            rngs: Random numbers for the initial weights.
        """
        self.norm1: nnx.RMSNorm = nnx.RMSNorm(width, rngs=rngs)
        self.attention: GroupedQueryAttention = GroupedQueryAttention(width, heads, kv_heads, head_dim, rngs=rngs)
        self.norm2: nnx.RMSNorm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp: SwiGLU = SwiGLU(width, hidden, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        """Apply the block to a batch."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nnx.Module):
    """Embeddings of tokens and positions, blocks, RMSNorm, and one linear layer."""

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the network.

        Args:
            vocabulary: Number of different tokens.
            context: Largest number of tokens in a row.
            width: Of the residual stream.
            depth: Number of blocks.
            heads: Of the queries.
            kv_heads: Of keys and values; they divide the heads.
            head_dim: Of a head.
            hidden: Of the SwiGLU of a block.
            rngs: Random numbers for the initial weights.
        """
        self.context: int = context
        self.depth: int = depth
        self.embedding: nnx.Embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions: nnx.Param[Any] = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
        for i in range(depth):
            block = DecoderBlock(width, heads, kv_heads, head_dim, hidden, rngs=rngs)
            setattr(self, f"blocks_{i}", block)
        self.norm: nnx.RMSNorm = nnx.RMSNorm(width, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "n tokens"]) -> Float[Array, "n tokens vocabulary"]:
        """Logits of the token after each token of a batch of rows."""
        if tokens.shape[1] > self.context:
            raise ValueError(f"Rows of {tokens.shape[1]} tokens: this network has positions for {self.context}.")
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for i in range(self.depth):
            x = getattr(self, f"blocks_{i}")(x)
        return self.linear(self.norm(x))


def gqa_nano(rngs: nnx.Rngs, *, vocabulary: int = 64, context: int = 32) -> Decoder:
    """A decoder of two blocks with four heads of queries over two of keys and values: 23,712 parameters.

    Args:
        rngs: Random numbers for the initial weights.
        vocabulary: Number of different tokens.
        context: Largest number of tokens in a row.

    Returns:
        A network of width 32 with heads of width 8, integer inputs `[n, tokens]` and a vector of logits for every
        token.

    References:
        Ainslie et al. 2023 (arXiv 2305.13245), section 2.2; Shazeer 2020 (arXiv 2002.05202), equation 6; Zhang &
        Sennrich 2019 (arXiv 1910.07467), equation 4. Positions are learned, not rotary.
    """
    return Decoder(
        vocabulary=vocabulary,
        context=context,
        width=32,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=64,
        rngs=rngs,
    )
