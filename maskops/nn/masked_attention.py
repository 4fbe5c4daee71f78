"""Modules of the family masked_attention: B batch, L queries, S keys, D channels, H heads, G heads of keys and values."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from maskops.ops.masked_attention import AttentionMask, BlockMap, masked_attention


class MaskedAttention(nn.Module):
    """Multi-head attention, self or cross, under a mask that is data.  See masked_attention.

    Args:
        dim: channels of x and of the result.
        heads: of the queries; dim is divisible by them.
        kv_heads: of keys and values, a divisor of heads. Default: heads.
        context_dim: channels of the context. Default: dim.
        bias: of the projections.
    """

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, context_dim: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or heads % kv_heads:
            raise ValueError(
                f"MaskedAttention: heads must divide dim and kv_heads heads, got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        self.heads, self.kv_heads = heads, kv_heads
        kv_dim = dim // heads * kv_heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(context_dim or dim, kv_dim, bias=bias)
        self.v = nn.Linear(context_dim or dim, kv_dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: AttentionMask | BlockMap | None = None) -> Tensor:
        """x [B, L, D], context [B, S, context_dim] or None for x itself -> [B, L, D]."""
        context = x if context is None else context
        split = "b n (h d) -> b h n d"
        q = rearrange(self.q(x), split, h=self.heads)
        k, v = (rearrange(part(context), split, h=self.kv_heads) for part in (self.k, self.v))
        out = masked_attention(q, k, v, mask, enable_gqa=self.kv_heads != self.heads)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}"
