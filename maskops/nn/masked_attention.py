"""Modules of the family masked_attention: B batch, L queries, S keys, D channels, H heads, G heads of keys and values."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from maskops.ops.mask_sampling import Seed
from maskops.ops.masked_attention import AttentionMask, BlockMap, masked_attention


class MaskedAttention(nn.Module):
    """Multi-head attention, self or cross, under a mask that is data.  See masked_attention.

    Args:
        dim: channels of x and of the result.
        heads: of the queries; dim is divisible by them.
        kv_heads: of keys and values, a divisor of heads. Default: heads.
        context_dim: channels of the context. Default: dim.
        bias: of the projections.
        dropout: in [0, 1), the chance that a weight is dropped while training, drawn from torch's generator or forward's seed.

    Raises:
        ValueError: heads that do not divide, a dropout outside of [0, 1).

    Example:
        >>> attention = maskops.nn.MaskedAttention(32, heads=4, dropout=0.1)
        >>> attention(torch.rand(2, 9, 32), mask=maskops.AttentionMask.causal()).shape
        torch.Size([2, 9, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, context_dim: int | None = None, bias: bool = True,
        dropout: float = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or dim % heads or heads % kv_heads:
            raise ValueError(
                f"MaskedAttention: heads must divide dim and kv_heads heads, got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"MaskedAttention: dropout must be in [0, 1), got {dropout}")
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        kv_dim = dim // heads * kv_heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(context_dim or dim, kv_dim, bias=bias)
        self.v = nn.Linear(context_dim or dim, kv_dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: AttentionMask | BlockMap | None = None, *,
        bias: Tensor | None = None, seed: Seed = None,
    ) -> Tensor:  # fmt: skip
        """x [B, L, D], context [B, S, context_dim] or None for x itself, bias [B or 1, H or 1, L or 1, S] -> [B, L, D]."""
        context = x if context is None else context
        for name, given, dim in (("x", x, self.q.in_features), ("context", context, self.k.in_features)):
            if not isinstance(given, Tensor):
                raise TypeError(f"MaskedAttention: {name} must be a tensor, got {type(given).__name__}")
            if given.dim() != 3 or given.shape[2] != dim:
                raise ValueError(f"MaskedAttention: {name} must have shape [B, N, {dim}], got {list(given.shape)}")
        split = "b n (h d) -> b h n d"
        q = rearrange(self.q(x), split, h=self.heads)
        k, v = (rearrange(part(context), split, h=self.kv_heads) for part in (self.k, self.v))
        dropout_p = self.dropout if self.training else 0
        gqa = self.kv_heads != self.heads
        out = masked_attention(q, k, v, mask, bias=bias, dropout_p=dropout_p, seed=seed, enable_gqa=gqa)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, dropout={self.dropout}"
