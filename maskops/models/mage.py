"""MAGE: a masked encoder over what is kept, and a decoder that predicts the tokens of an image; generates as MaskGIT does.

B images, N tokens of a grid, V codes, D channels. Li et al., 2022 (arXiv 2211.09117). In training half of the tokens, all of them
masked, are not given to the encoder; the decoder puts the encoded class token in their place and in that of every masked token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops.generation import Attend, attend_to_all
from maskops.nn.transformer import Block, init_linear_and_norm, sincos_positions
from maskops.ops.mask_sampling import Seed

MEAN_RATIO, RATIO_DEVIATION, LEAST_RATIO = 0.55, 0.25, 0.5  # of masked tokens: a normal law, cut to [0.5, 1]
DROPPED = 0.5


@dataclass(frozen=True)
class MAGEConfig:
    """grid: tokens along height and width; vocab: codes; heads have the same width in encoder and decoder."""

    grid: tuple[int, int] = (16, 16)
    vocab: int = 1024
    dim: int = 768
    depth: int = 12
    decoder_depth: int = 8
    heads: int = 12
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"MAGEConfig: heads must divide dim {self.dim}, got {self.heads}")


class MAGE(nn.Module):
    """Unconditional generation of image tokens.

    Example:
        >>> model = MAGE(MAGEConfig(grid=(4, 4), vocab=8, dim=32, depth=1, decoder_depth=1, heads=2))
        >>> model.logits(torch.full((2, 16), -1)).shape, model.loss(torch.randint(8, (2, 16)), seed=0).shape
        (torch.Size([2, 16, 8]), torch.Size([]))
    """

    prefix = 1
    null_condition = 0

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.num_tokens, self.num_layers = c.grid[0] * c.grid[1], c.depth + c.decoder_depth
        self.heads, self.head_dim = c.heads, c.dim // c.heads
        self.codes = nn.Embedding(c.vocab + 1, c.dim)  # the last: masked
        self.class_token = nn.Parameter(torch.zeros(c.dim))
        self.positions = nn.Parameter(torch.zeros(1 + self.num_tokens, c.dim))
        self.encoder = nn.ModuleList(Block(c.dim, c.heads, 4 * c.dim) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.to_decoder = nn.Linear(c.dim, c.dim)
        self.decoder_positions = nn.Parameter(torch.zeros(1 + self.num_tokens, c.dim))
        self.decoder = nn.ModuleList(Block(c.dim, c.heads, 4 * c.dim) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.out = nn.Linear(c.dim, c.vocab)
        self.apply(init_linear_and_norm)
        for weight in (self.codes.weight, self.class_token):
            nn.init.trunc_normal_(weight, std=0.02)
        # Learned, as published; from this table they learn in fewer steps than from noise.
        for table in (self.positions, self.decoder_positions):
            table.data.copy_(sincos_positions(c.grid, c.dim, prefix=1))

    def _blocks(self, x: Tensor, blocks: nn.ModuleList, first: int, attend: Attend) -> Tensor:
        for i, block in enumerate(blocks):
            out = attend(first + i, *block.attn.split_heads(block.norm1(x)))
            x = x + block.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
            x = x + block.mlp(block.norm2(x))
        return x

    def _embed(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        places = self.positions[1:] if ids is None else F.embedding(ids, self.positions[1:])
        x = self.codes(torch.where(tokens < 0, self.config.vocab, tokens)) + places
        start = (self.class_token + self.positions[0]).expand(len(x), 1, -1)
        return torch.cat([start, x], 1)

    def logits(
        self, tokens: Tensor, ids: Tensor | None = None, condition: Tensor | None = None, attend: Attend = attend_to_all
    ) -> Tensor:
        """As MaskedModel; nothing is dropped.  A masked token's features give way to the class token between the two halves."""
        x = self.norm(self._blocks(self._embed(tokens, ids), self.encoder, 0, attend))
        x = self.to_decoder(x)
        places = self.decoder_positions[1:] if ids is None else F.embedding(ids, self.decoder_positions[1:])
        y = torch.where((tokens < 0)[..., None], x[:, :1], x[:, 1:]) + places
        y = torch.cat([x[:, :1] + self.decoder_positions[0], y], 1)
        y = self._blocks(y, self.decoder, len(self.encoder), attend)
        return self.out(self.decoder_norm(y[:, 1:]))

    def loss(self, tokens: Tensor, *, seed: Seed = None) -> Tensor:
        """Cross entropy of masked tokens.  tokens [B, N]; one ratio for the batch, as published."""
        B, N = tokens.shape
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        ratio = _ratio(generator)
        masked = max(int(N * DROPPED), min(N, -int(-N * ratio // 1)))
        shown = N - int(N * DROPPED)  # tokens of the encoder, masked ones among them
        order = maskops.random_masking(B, N, num_keep=shown, generator=generator)
        ids = order.ids_keep
        hidden = torch.arange(shown, device=tokens.device) >= N - masked
        given = torch.where(hidden, -1, tokens.gather(1, ids))
        x = self.to_decoder(self.norm(self._blocks(self._embed(given, ids), self.encoder, 0, attend_to_all)))
        kept = torch.where(hidden[:, None], x[:, :1], x[:, 1:])
        start = x[:, :1]
        # Dropped tokens are masked as well: the encoded class token stands in their place too.
        y = maskops.restore_tokens(kept, order, start.expand(-1, N, -1).contiguous())
        y = torch.cat([start, y], 1) + self.decoder_positions
        logits = self.out(self.decoder_norm(self._blocks(y, self.decoder, len(self.encoder), attend_to_all)[:, 1:]))
        known = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, ids, ~hidden.expand(B, -1))
        target = torch.where(known, -100, tokens)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=self.config.label_smoothing)


def _ratio(generator: torch.Generator | None) -> float:
    """Drawn until it lies in [LEAST_RATIO, 1]."""
    while True:
        found = float(torch.randn((), generator=generator)) * RATIO_DEVIATION + MEAN_RATIO
        if LEAST_RATIO <= found <= 1:
            return found
