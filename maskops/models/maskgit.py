"""MaskGIT: a bidirectional transformer that predicts masked tokens of an image, and the codebook of patches that makes them tokens.

B images, N tokens of a grid, V codes, D channels. Chang et al., 2022 (arXiv 2202.04200). Generation: maskops.generation, with
ReCAP's settings in maskops.models.recap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops.generation import Attend, attend_to_all
from maskops.nn.transformer import Transformer


@dataclass(frozen=True)
class MaskGITConfig:
    """grid: tokens along height and width; vocab: codes; classes: 0 for an unconditional model.

    Training masks ceil(N max(cos(pi u / 2), min_mask_rate)) tokens of an image, u uniform (published: 0.5), and drops the class of
    a tenth of the images.
    """

    grid: tuple[int, int] = (16, 16)
    vocab: int = 1024
    dim: int = 768
    depth: int = 24
    heads: int = 12
    classes: int = 0
    min_mask_rate: float = 0.5
    label_smoothing: float = 0.1
    drop_class: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"MaskGITConfig: heads must divide dim {self.dim}, got {self.heads}")
        for name in ("vocab", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"MaskGITConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.min_mask_rate <= 1:
            raise ValueError(f"MaskGITConfig: min_mask_rate must be in [0, 1], got {self.min_mask_rate}")


class MaskGIT(nn.Module):
    """Logits of every token from those that are known; a class token, or a learned one, stands in front.

    Example:
        >>> model = MaskGIT(MaskGITConfig(grid=(4, 4), vocab=8, dim=32, depth=2, heads=2))
        >>> model(torch.full((2, 16), -1)).shape
        torch.Size([2, 16, 8])
    """

    prefix = 1

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens, self.num_layers = config.grid[0] * config.grid[1], config.depth
        self.heads, self.head_dim = config.heads, config.dim // config.heads
        self.null_condition = config.classes
        self.codes = nn.Embedding(config.vocab + 1, config.dim)  # the last: masked
        self.label = nn.Embedding(config.classes + 1, config.dim)  # the last: no class
        self.positions = nn.Parameter(torch.zeros(self.num_tokens, config.dim))
        self.trunk = Transformer(config.dim, config.depth, config.heads)
        self.out = nn.Linear(config.dim, config.vocab)
        for weight in (self.codes.weight, self.label.weight, self.positions):
            nn.init.trunc_normal_(weight, std=0.02)

    def logits(
        self, tokens: Tensor, ids: Tensor | None = None, condition: Tensor | None = None, attend: Attend = attend_to_all
    ) -> Tensor:
        """As MaskedModel: tokens [B, U], -1 where masked, of ids [B, U] or of all -> [B, U, V]."""
        places = self.positions if ids is None else F.embedding(ids, self.positions)
        x = self.codes(torch.where(tokens < 0, self.config.vocab, tokens)) + places
        if condition is None:
            condition = tokens.new_full(tokens.shape[:1], self.null_condition)
        x = torch.cat([self.label(condition)[:, None], x], 1)
        for i, block in enumerate(self.trunk.blocks):
            out = attend(i, *block.attn.split_heads(block.norm1(x)))
            x = x + block.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
            x = x + block.mlp(block.norm2(x))
        return self.out(self.trunk.norm(x[:, 1:]))

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.logits(tokens, None, condition)

    def loss(
        self, tokens: Tensor, condition: Tensor | None = None, *, seed: maskops.ops.mask_sampling.Seed = None
    ) -> Tensor:
        """Cross entropy of masked tokens.  tokens [B, N], all known."""
        B, N = tokens.shape
        generator = seed if isinstance(seed, torch.Generator) else None
        u = torch.rand(B, generator=generator, device=tokens.device, dtype=torch.float64)
        rate = (u * (math.pi / 2)).cos().clamp(min=self.config.min_mask_rate)
        masked = (rate * N).ceil().long().clamp(1, N)
        split = maskops.random_masking(
            B, N, num_keep=N - masked, max_seqlen=N, generator=generator, seed=None if generator else seed
        )
        hidden = split.mask
        if condition is not None:
            dropped = torch.rand(B, generator=generator, device=tokens.device) < self.config.drop_class
            condition = torch.where(dropped, self.null_condition, condition)
        logits = self(torch.where(hidden, -1, tokens), condition)
        target = torch.where(hidden, tokens, -100)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=self.config.label_smoothing)


class PatchCodebook(nn.Module):
    """Square patches of grey images as the nearest of V codes, and back: a tokeniser that needs no training but k-means.

    Example:
        >>> book = PatchCodebook.fit(torch.rand(20, 1, 8, 8), patch=2, vocab=4)
        >>> book.decode(book.encode(torch.rand(3, 1, 8, 8)), (4, 4)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, codes: Tensor, patch: int) -> None:
        """codes: float [V, patch * patch]."""
        super().__init__()
        self.patch = patch
        self.register_buffer("codes", codes)

    @classmethod
    def fit(cls, images: Tensor, patch: int, vocab: int, *, rounds: int = 20, seed: int = 0) -> PatchCodebook:
        """Lloyd's algorithm from random patches.  images [B, 1, H, W]."""
        patches = maskops.patchify(images, patch).flatten(0, 1)
        distinct = patches.unique(dim=0)
        if len(distinct) < vocab:
            raise ValueError(
                f"PatchCodebook.fit: vocab must be at most the {len(distinct)} distinct patches, got {vocab}"
            )
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
        book = cls(distinct[order[:vocab]], patch)
        for _ in range(rounds):
            nearest = torch.cdist(patches, book.codes).argmin(1)
            sums = torch.zeros_like(book.codes).index_add_(0, nearest, patches)
            count = torch.bincount(nearest, minlength=vocab)[:, None]
            book.codes = torch.where(count > 0, sums / count.clamp(min=1), book.codes)
        return book

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 1, H, W] -> int64 [B, N]."""
        patches = maskops.patchify(images, self.patch)
        return torch.cdist(patches, self.codes).argmin(2)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [B, N] of a grid -> images [B, 1, H, W]."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        return maskops.unpatchify(F.embedding(tokens, self.codes), self.patch, size)


def digits() -> tuple[Tensor, Tensor, PatchCodebook]:
    """scikit-learn's 1797 digits as 64 tokens of 8 grey levels: tokens [1797, 64], classes [1797], codebook."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    book = PatchCodebook(((torch.arange(8) + 0.5) / 8)[:, None], 1)
    return book.encode(images), torch.from_numpy(data.target).long(), book


def faces(vocab: int = 128) -> tuple[Tensor, Tensor, PatchCodebook]:
    """The 100 faces of scikit-image's lfw_subset and their mirror images as 64 patches of 3 x 3: tokens, classes, codebook."""
    from skimage.data import lfw_subset

    images = torch.from_numpy(lfw_subset()[:100, :24, :24].copy()).float()[:, None]
    images = torch.cat([images, images.flip(3)])
    book = PatchCodebook.fit(images, 3, vocab)
    return book.encode(images), torch.zeros(len(images), dtype=torch.long), book


DATA: dict[str, Callable[[], tuple[Tensor, Tensor, PatchCodebook]]] = {"digits": digits, "faces": faces}
