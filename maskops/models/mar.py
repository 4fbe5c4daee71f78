"""MAR: masked generation of continuous tokens, each drawn by a small diffusion head, with or without ReCAP's local steps.

Li et al., "Autoregressive Image Generation without Vector Quantization", 2024 (arXiv 2406.11838); local steps: Liu et al., ReCAP,
2025 (arXiv 2505.19089). B images, N tokens of a grid, C numbers of a token, P buffer positions (class tokens) in front, D channels,
K visible tokens, U local ones.

The encoder sees the buffer and the visible tokens, the decoder all; both leave their keys and values in one ContextCache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops.generation import Attend, attend_to_all
from maskops.nn.diffusion_head import DiffusionHead
from maskops.nn.transformer import Block, init_linear_and_norm, sincos_positions
from maskops.ops.mask_sampling import Seed
from maskops.reuse import FullOnly, ReCAP

MEAN_RATIO, RATIO_DEVIATION, LEAST_RATIO = 1.0, 0.25, 0.7  # of masked tokens: a normal law, cut to [0.7, 1]


@dataclass(frozen=True)
class MARConfig:
    """Sizes of a MAR.

    grid: tokens along height and width; token_dim: C; buffer: P; classes: 0 for an unconditional model; head_*: of the diffusion
    head; noise_levels: of its training; repeats: noise levels drawn for each token and step; clip: tokens lie in [-clip, clip].
    """

    grid: tuple[int, int] = (16, 16)
    token_dim: int = 16
    dim: int = 768
    depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    buffer: int = 64
    classes: int = 1000
    drop_class: float = 0.1
    head_dim: int = 1024
    head_depth: int = 6
    noise_levels: int = 1000
    repeats: int = 4
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"MARConfig: heads must divide dim {self.dim}, got {self.heads}")
        if self.buffer < 1:
            raise ValueError(f"MARConfig: buffer must be at least 1, got {self.buffer}")


class MAR(nn.Module):
    """Features of every masked token from the visible ones, and a diffusion head that draws the token from its features.

    Example:
        >>> config = MARConfig((4, 4), 4, 32, 1, 1, heads=2, buffer=2, classes=3, head_dim=32, head_depth=1)
        >>> model = MAR(config)
        >>> model.loss(torch.randn(2, 16, 4), torch.tensor([0, 2]), seed=0).shape
        torch.Size([])
        >>> generate(model, torch.tensor([0, 1, 2]), steps=4, reuse=ReCAP(0, 1), noise_steps=5).tokens.shape
        torch.Size([3, 16, 4])
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        c = self.config = config
        self.num_tokens, self.num_layers = c.grid[0] * c.grid[1], c.depth + c.decoder_depth
        self.embed, self.embed_norm = nn.Linear(c.token_dim, c.dim), nn.LayerNorm(c.dim, eps=1e-6)
        self.label = nn.Embedding(c.classes + 1, c.dim)  # the last: no class
        self.encoder = nn.ModuleList(Block(c.dim, c.heads, 4 * c.dim) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.to_decoder = nn.Linear(c.dim, c.dim)
        self.mask_token = nn.Parameter(torch.zeros(c.dim))
        self.decoder = nn.ModuleList(Block(c.dim, c.heads, 4 * c.dim) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        # Learned, as published; from these tables they learn in fewer steps than from noise.
        tables = (nn.Parameter(sincos_positions(c.grid, c.dim, prefix)) for prefix in (c.buffer, c.buffer, 0))
        self.positions, self.decoder_positions, self.head_positions = tables
        self.apply(init_linear_and_norm)
        self.head = DiffusionHead(c.token_dim, c.dim, c.head_dim, c.head_depth, c.noise_levels, c.clip)
        for weight in (self.label.weight, self.mask_token):
            nn.init.trunc_normal_(weight, std=0.02)

    def _blocks(self, x: Tensor, blocks: nn.ModuleList, first: int, attend: Attend) -> Tensor:
        for i, block in enumerate(blocks, first):
            out = attend(i, *block.attn.split_heads(block.norm1(x)))
            x = x + block.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
            x = x + block.mlp(block.norm2(x))
        return x

    def encode(self, tokens: Tensor, ids: Tensor, condition: Tensor, attend: Attend = attend_to_all) -> Tensor:
        """Visible tokens [B, K, C] of ids [B, K], behind the buffer -> [B, P + K, D], as the decoder takes them."""
        buffer = self.label(condition)[:, None].expand(-1, self.config.buffer, -1)
        x = torch.cat([buffer, self.embed(tokens)], 1) + F.embedding(self.with_buffer(ids), self.positions)
        x = self._blocks(self.embed_norm(x), self.encoder, 0, attend)
        return self.to_decoder(self.norm(x))

    def decode(self, x: Tensor, attend: Attend = attend_to_all) -> Tensor:
        """x [B, P + U, D], mask tokens in their place and positions added -> features for the head, [B, U, D]."""
        return self.decoder_norm(self._blocks(x, self.decoder, len(self.encoder), attend))[:, self.config.buffer :]

    def features(
        self, tokens: Tensor, split: maskops.TokenSplit, condition: Tensor, attend: tuple[Attend, Attend] | None = None
    ) -> Tensor:
        """Features [B, N, D] of all positions from the tokens [B, N, C] that split keeps.  attend: of encoder and decoder."""
        for_encoder, for_decoder = attend or (attend_to_all, attend_to_all)
        x = self.encode(maskops.gather_tokens(tokens, split.ids_keep), split.ids_keep, condition, for_encoder)
        x = maskops.restore_tokens(x, split, self.mask_token, pos=self.decoder_positions, prefix=self.config.buffer)
        return self.decode(x, for_decoder) + self.head_positions

    def local_features(
        self, tokens: Tensor, ids: Tensor, known: int, condition: Tensor, attend: tuple[Attend, Attend]
    ) -> Tensor:
        """Features [B, U, D] of the positions ids [B, U], of which the first `known` hold tokens [B, known, C] by now."""
        x = self.encode(tokens, ids[:, :known], condition, attend[0])
        masked = self.mask_token.expand(len(ids), ids.shape[1] - known, -1)
        places = F.embedding(self.with_buffer(ids), self.decoder_positions)
        return self.decode(torch.cat([x, masked], 1) + places, attend[1]) + F.embedding(ids, self.head_positions)

    def with_buffer(self, ids: Tensor) -> Tensor:
        """int64 [B, P + U]: the buffer, then the tokens ids [B, U] as positions behind it."""
        P = self.config.buffer
        return torch.cat([torch.arange(P, device=ids.device).expand(len(ids), -1), ids + P], 1)

    def loss(self, tokens: Tensor, condition: Tensor | None = None, *, seed: Seed = None) -> Tensor:
        """Squared error of the noise that the head finds in masked tokens.  tokens [B, N, C], condition int64 [B]."""
        B, N = tokens.shape[:2]
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        masked = min(N, -int(-N * _ratio(generator) // 1))
        split = maskops.random_masking(B, N, num_keep=N - masked, generator=generator)
        condition = self.no_class(tokens) if condition is None else condition
        dropped = torch.rand(B, generator=generator) < self.config.drop_class
        condition = torch.where(dropped.to(condition.device), self.config.classes, condition)
        z = maskops.gather_tokens(self.features(tokens, split, condition), split.ids_mask).flatten(0, 1)
        target = maskops.gather_tokens(tokens, split.ids_mask).flatten(0, 1)
        repeats = self.config.repeats
        return self.head.loss(target.repeat(repeats, 1), z.repeat(repeats, 1), generator)

    def no_class(self, like: Tensor) -> Tensor:
        return torch.full((len(like),), self.config.classes, device=like.device)


def _ratio(generator: torch.Generator | None) -> float:
    """Drawn until it lies in [LEAST_RATIO, 1]."""
    while True:
        found = float(torch.randn((), generator=generator)) * RATIO_DEVIATION + MEAN_RATIO
        if LEAST_RATIO <= found <= 1:
            return found


# ---------------------------------------------------------------- generation


@dataclass
class Continuous:
    """tokens [B, N, C]; kinds: "full" or "local" for each step."""

    tokens: Tensor
    kinds: list[str]


def generate(
    model: MAR, condition: Tensor, steps: int = 64, *, reuse: FullOnly | ReCAP | None = None, guidance: float = 1.0,
    noise_steps: int = 100, temperature: float = 1.0, seed: int = 0, first_row: int = 0,
) -> Continuous:  # fmt: skip
    """Draw tokens in a random order, a cosine schedule's number each step.

    Args:
        model: a MAR.
        condition: int64 [B], classes; model.no_class(...) for none.
        steps: T, at most N.
        reuse: FullOnly() or ReCAP(pre_full, local_steps); published: pre_full = T / 2, one local step.
        guidance: s of unconditional + s (conditional - unconditional) noise, growing linearly with the decoded share from 1 to s;
            1 forwards no second branch.
        noise_steps: of the diffusion head.
        temperature: of its noise.
        seed, first_row: row b draws as row first_row + b of a larger batch with this seed does.
    """
    return _Drawing(model, condition, guidance, noise_steps, temperature, seed, first_row).run(
        (reuse or FullOnly()).groups(maskops.mask_schedule("cosine", steps, model.num_tokens))
    )


class _Drawing:
    """The state of one generation; with guidance the rows stand twice, the second time without a class."""

    def __init__(
        self, model: MAR, condition: Tensor, guidance: float, noise_steps: int, temperature: float, seed: int, first_row: int
    ) -> None:  # fmt: skip
        self.model, self.guidance, self.temperature = model, guidance, temperature
        B, N, C = len(condition), model.num_tokens, model.config.token_dim
        self.twice = 2 if guidance != 1 else 1
        self.condition = condition if self.twice == 1 else torch.cat([condition, model.no_class(condition)])
        streams = [torch.tensor([seed, first_row + b], device=condition.device) for b in range(B)]
        sizes = (N, noise_steps + 1, C)
        # A row's order and the noise of a token do not depend on the steps that are taken.
        words = [
            maskops.random_words(N + 2 * sizes[0] * sizes[1] * C, seed=s, device=condition.device) for s in streams
        ]
        words = torch.stack(words).double() / 2**32 if B else condition.new_zeros(0, N + 2 * N * sizes[1] * C).double()
        self.rank, (radius, angle) = words[:, :N].float(), words[:, N:].view(B, 2, *sizes).unbind(1)
        self.noise = ((-2 * (1 - radius).log()).sqrt() * (2 * torch.pi * angle).cos()).float()  # [B, N, steps + 1, C]
        self.tokens = self.noise.new_zeros(B, N, C)
        self.cache = maskops.ContextCache(
            model.num_layers, self.twice * B, model.config.buffer + N, model.config.heads,
            model.config.dim // model.config.heads, device=condition.device,
        )  # fmt: skip

    @torch.no_grad()
    def run(self, groups: list[list[int]]) -> Continuous:
        """Each group: a full step, then local ones over the positions that the group decodes."""
        known, kinds = 0, []
        for group in groups:
            split = maskops.random_masking(*self.rank.shape, num_keep=known, noise=self.rank)
            local, done = split.ids_mask[:, : sum(group)].contiguous(), 0
            for i, count in enumerate(group):
                z = self.local(local, done) if i else self.full(split, len(group) > 1, local)
                ids = local[:, done : done + count].contiguous()
                self.draw(ids, z[:, done : done + count], known + done + count)
                done += count
                kinds.append("local" if i else "full")
            known += done
        return Continuous(self.tokens, kinds)

    def full(self, split: maskops.TokenSplit, store: bool, ids: Tensor) -> Tensor:
        """Features [(2) B, U, D] of the positions ids after a pass over all."""
        split = maskops.split_tokens(split.mask.repeat(self.twice, 1), max_seqlen=split.max_seqlen)
        everything = torch.arange(self.model.num_tokens, device=ids.device).expand(len(split.mask), -1)
        attend = (self.storing(split.ids_keep), self.storing(everything)) if store else None
        z = self.model.features(self.tokens.repeat(self.twice, 1, 1), split, self.condition, attend)
        return maskops.gather_tokens(z, ids.repeat(self.twice, 1))

    def local(self, ids: Tensor, known: int) -> Tensor:
        ids, tokens = ids.repeat(self.twice, 1), self.tokens.repeat(self.twice, 1, 1)
        given = maskops.gather_tokens(tokens, ids[:, :known].contiguous())
        attend = (self.reading(ids[:, :known]), self.reading(ids))
        return self.model.local_features(given, ids, known, self.condition, attend)

    def storing(self, ids: Tensor) -> Attend:
        ids = self.model.with_buffer(ids)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write_(layer, k, v, ids)
            return maskops.masked_attention(q, k, v)

        return attend

    def reading(self, ids: Tensor) -> Attend:
        ids = self.model.with_buffer(ids)
        view = self.cache.exclude(ids)
        return lambda layer, q, k, v: maskops.cached_attention(q, k, v, self.cache, layer, ids, exclude=view)

    def draw(self, ids: Tensor, z: Tensor, known: int) -> None:
        """Set the tokens ids [B, U] by the diffusion head, from features z [(2) B, U, D]; known: of a row after this step."""
        scale = 1 + (self.guidance - 1) * known / self.model.num_tokens
        noise = maskops.gather_tokens(self.noise.flatten(2), ids).view(*ids.shape, *self.noise.shape[2:])
        found = self.model.head.sample(noise, self.guided(z, scale), self.temperature)
        self.tokens = self.tokens.scatter(1, ids[..., None].expand_as(found), found)

    def guided(self, z: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The noise that the head finds in x [B, U, C] at a level, as a function of both."""

        def find(x: Tensor, level: Tensor) -> Tensor:
            if self.twice == 1:
                return self.model.head(x, level, z)
            conditional, free = self.model.head(torch.cat([x, x]), level, z).chunk(2)
            return torch.lerp(free, conditional, scale)

        return find
