"""The pre-norm transformer of ViT, shared by the models: B batch, N tokens, S tokens of a context, D channels, H heads.

Every mask is an AttentionMask or a BlockMap, as in masked_attention: a fact about which keys a query sees, not an added matrix.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from maskops.nn.masked_attention import MaskedAttention
from maskops.ops.masked_attention import AttentionMask, BlockMap, masked_attention

Mask = AttentionMask | BlockMap | None

# Names as in transformers' configs.
ACTIVATIONS: dict[str, type[nn.Module] | tuple[type[nn.Module], str]] = {
    "gelu": nn.GELU,
    "gelu_new": (nn.GELU, "tanh"),
    "gelu_pytorch_tanh": (nn.GELU, "tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def make_activation(name: str) -> nn.Module:
    """The activation module of this name; ValueError for a name that ACTIVATIONS lacks."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    found = ACTIVATIONS[name]
    return found[0](found[1]) if isinstance(found, tuple) else found()


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v.  x [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: dim must be divisible by heads, got dim {dim} and heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of x [B, N, D], each [B, H, N, D / H]."""
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind(0)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        out = masked_attention(*self.split_heads(x), mask)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class Mlp(nn.Module):
    """Linear, activation, linear.  x [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = make_activation(activation)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).  x [B, N, D] -> [B, N, D]."""

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, *, qkv_bias: bool = True, activation: str = "gelu", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_dim, activation)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """x + attention(norm(x), norm(context)), then x + mlp(norm(x)).  x [B, N, D], context [B, S, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm_context = nn.LayerNorm(dim, eps=eps)
        self.attn = MaskedAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x: Tensor, context: Tensor, mask: Mask = None) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_context(context), mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks and a last norm.  x [B, N, D] -> [B, N, D].

    Example:
        >>> Transformer(dim=32, depth=2, heads=4)(torch.rand(2, 9, 32), AttentionMask.causal()).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int | None = None, *, eps: float = 1e-6) -> None:
        """mlp_dim: hidden units of the MLP. Default: 4 dim."""
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim or 4 * dim, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.apply(init_linear_and_norm)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def sincos_positions(grid: tuple[int, int], dim: int, prefix: int = 0) -> Tensor:
    """The fixed 2-D sin-cos position table of MAE: `prefix` zero rows, then one row per patch, row-major.  [prefix + h w, dim].

    Channels are [sin x | cos x | sin y | cos y], x = column: the order of the published weights, and of those only.
    """
    if dim % 4:
        raise ValueError(f"sincos_positions: dim must be divisible by 4, got {dim}")
    # float64 as published: at float32 the angles of a large grid lose digits.
    omega = torch.exp(torch.arange(dim // 4, dtype=torch.float64) * (-math.log(10000.0) / (dim // 4)))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle_x, angle_y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    table = torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], 1)
    return torch.cat([table.new_zeros(prefix, dim), table]).float()


def init_linear_and_norm(module: nn.Module) -> None:
    """Initialise as MAE does: xavier-uniform linear weights, zero biases, LayerNorm 1 and 0.  For nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
