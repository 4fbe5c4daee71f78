"""LLaDA: a language model that fills masked tokens, and its decoding block by block with a cache, as Fast-dLLM does it.

Nie et al., "Large Language Diffusion Models", 2025 (arXiv 2502.09992); caches and threshold: Wu et al., Fast-dLLM, 2025 (arXiv
2505.22618). B texts, N tokens, V vocabulary, D channels. The network has LLaMA's rotary positions on the transformer that the
other models share (LayerNorm and GELU, not RMSNorm and SwiGLU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops.generation import Attend, MaskedGenerator, attend_to_all
from maskops.nn.rotary import rotary
from maskops.nn.transformer import Transformer
from maskops.reuse import BlockCache


@dataclass(frozen=True)
class LLaDAConfig:
    """Sizes of a LLaDA; context is the number of tokens that it generates or completes.  least_rate: of masked tokens."""

    context: int = 4096
    vocab: int = 256
    dim: int = 256
    depth: int = 4
    heads: int = 4
    least_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"LLaDAConfig: twice heads must divide dim {self.dim}, got heads {self.heads}")
        if not 0 < self.least_rate <= 1:
            raise ValueError(f"LLaDAConfig: least_rate must be in (0, 1], got {self.least_rate}")


class LLaDA(nn.Module):
    """Logits of every token from those that are known, both sides.  A MaskedModel without a prefix.

    Example:
        >>> model = LLaDA(LLaDAConfig(context=16, vocab=8, dim=32, depth=2, heads=2))
        >>> text = torch.randint(8, (2, 16))
        >>> model(text).shape, model.loss(text, seed=0).shape
        (torch.Size([2, 16, 8]), torch.Size([]))
        >>> print(block_generator(model, block_size=8).explain())
        blocks of 8, dual cache: a full step, and local ones per block; 144 of 256 token evaluations of as many full steps (56%)
    """

    prefix = 0

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens, self.num_layers = config.context, config.depth
        self.heads, self.head_dim = config.heads, config.dim // config.heads
        self.embed = nn.Embedding(config.vocab + 1, config.dim)  # the last: masked
        self.trunk = Transformer(config.dim, config.depth, config.heads)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def features(self, tokens: Tensor, ids: Tensor | None = None, attend: Attend = attend_to_all) -> Tensor:
        """tokens [B, U], -1 where masked, of ids [B, U] or of all -> [B, U, D]."""
        places = torch.arange(tokens.shape[1], device=tokens.device) if ids is None else ids
        x = self.embed(torch.where(tokens < 0, self.config.vocab, tokens))
        for i, block in enumerate(self.trunk.blocks):
            q, k, v = block.attn.split_heads(block.norm1(x))
            # Keys are cached with their place in them: a local step need not know where the others are.
            out = attend(i, rotary(q, places), rotary(k, places), v)
            x = x + block.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
            x = x + block.mlp(block.norm2(x))
        return self.trunk.norm(x)

    def logits(
        self, tokens: Tensor, ids: Tensor | None = None, condition: Tensor | None = None, attend: Attend = attend_to_all
    ) -> Tensor:
        """As MaskedModel -> [B, U, V]; there is no condition but the tokens that are known."""
        return self.head(self.features(tokens, ids, attend))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)

    def loss(
        self, tokens: Tensor, prompt: Tensor | None = None, *, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """The bound on the negative log-likelihood per token that LLaDA trains.

            t ~ U(0, 1) per text;  p = (1 - least_rate) t + least_rate;  every token of the answer is masked with chance p
            loss = mean over texts of 1 / |answer| sum over masked tokens of cross-entropy / p

        Args:
            tokens: int64 [B, N].
            prompt: bool [B, N], tokens that are never masked (fine-tuning). Default: none, all of the text is the answer.
            seed: of masks and rates; or a generator.
        """
        B, N = tokens.shape
        words = maskops.random_words((B, N + 1), seed=seed, generator=generator, device=tokens.device) / 2**32
        low = self.config.least_rate
        rate = (1 - low) * words[:, :1] + low
        masked = words[:, 1:] < rate
        answer = torch.full((B, 1), N, device=tokens.device)
        if prompt is not None:
            masked, answer = masked & ~prompt, (~prompt).sum(1, keepdim=True).clamp(min=1)
        x = self.features(torch.where(masked, -1, tokens))
        weight = (1 / (rate * answer)).expand(B, N).to(x.dtype)
        return maskops.linear_cross_entropy(
            x, self.head.weight, tokens, mask=masked, weight_per_token=weight, reduction="sum"
        ) / max(B, 1)


def block_generator(
    model: LLaDA, block_size: int = 32, mode: str = "dual", *, threshold: float | None = None, steps: int | None = None,
    refresh: int | None = None, temperature: float = 0.0,
) -> MaskedGenerator:  # fmt: skip
    """Low-confidence remasking in blocks from left to right: the tokens of a block that are surest are decoded first.

    Args:
        model: a LLaDA, or any other MaskedModel of a sequence.
        block_size, mode, threshold, steps, refresh: see BlockCache. LLaDA as published recomputes all, refresh=1; Fast-dLLM
            decodes all that is surer than threshold=0.9.
        temperature: of the sampled tokens; 0 takes the likeliest.

    Returns:
        A MaskedGenerator; generate(tokens=...) completes a prompt, -1 behind it. Blocks begin at token 0, wherever prompts end.
    """
    reuse = BlockCache(block_size, mode, threshold, steps, refresh)
    return MaskedGenerator(model, None, reuse, sample_temperature=temperature)
