"""DrBERT: BERT whose masked-word head is a small transformer that sees the masked positions only little by little.

Liang and Liang, "BPDec: Unveiling the Potential of Masked Language Modeling Decoder in BERT pretraining", 2024 (arXiv 2401.15861).
B texts, N tokens, M masked ones, D width, V vocabulary.

There is no public code. Where the paper is silent we chose: layers are pre-norm; the first decoder layer hides each masked
position with probability `hide`, drawn for every call; while training, the head reads the encoder instead of the decoder with
probability `mix`, drawn for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import AttentionMask, TokenSplit
from maskops.models.texts import TextModel
from maskops.nn.transformer import Block, Transformer, init_linear_and_norm

PAD = -1  # the label of an empty slot


@dataclass(frozen=True)
class DrBERTConfig:
    """Sizes of a DrBERT; the last id of the vocabulary is the mask token.  decoder_depth 0: plain BERT, the head on the encoder."""

    vocabulary: int
    context: int = 512
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_depth: int = 2
    mask_ratio: float = 0.15
    hide: float = 0.5
    mix: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "hide", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"DrBERTConfig: {name} must be in [0, 1], got {getattr(self, name)}")
        for name, least in (("vocabulary", 2), ("context", 1), ("decoder_depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"DrBERTConfig: {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class DrBERTOutput(NamedTuple):
    """What DrBERT.forward returns.  loss: scalar; logits [B, M, V], of the tokens split.ids_mask; split: which are masked."""

    loss: Tensor
    logits: Tensor
    split: TokenSplit


class Encoder(TextModel):
    """BERT: all that is left after pre-training.  tokens int64 [B, N], lengths int64 [B] or None -> [B, N, D]."""

    called = "DrBERT"

    def __init__(self, config: DrBERTConfig) -> None:
        c = config
        super().__init__(c.vocabulary, c.context, c.dim)
        self.blocks = Transformer(c.dim, c.depth, c.heads)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.blocks(self._embed(tokens), _real(lengths))


class DrBERT(nn.Module):
    """Masked language model with gradual unmasking.

        x = encoder(text with 15 % of its tokens replaced: 80 % by the mask token, 10 % by a random one, 10 % by themselves)
        x = layer 1(x, keys: no padding and not the hidden ones among the masked);  x = layer 2...(x, keys: no padding)
        loss = cross-entropy of head(x) at the masked tokens

    Example:
        >>> model = DrBERT(DrBERTConfig(vocabulary=100, context=20, dim=32, depth=1, heads=4))
        >>> out = model(torch.randint(99, (2, 20)))
        >>> out.logits.shape, model.encoder(torch.randint(99, (2, 20))).shape
        (torch.Size([2, 3, 100]), torch.Size([2, 20, 32]))
    """

    def __init__(self, config: DrBERTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c)
        self.head = nn.Sequential(
            nn.Linear(c.dim, c.dim), nn.GELU(), nn.LayerNorm(c.dim), nn.Linear(c.dim, c.vocabulary)
        )
        self.head.apply(init_linear_and_norm)
        self.decoder = nn.ModuleList(Block(c.dim, c.heads, 4 * c.dim) for _ in range(c.decoder_depth))
        for block in self.decoder.apply(init_linear_and_norm):
            # Almost the identity at first: the head reads the encoder, and the decoder learns what to change.
            nn.init.normal_(block.attn.proj.weight, std=1e-3)
            nn.init.normal_(block.mlp.fc2.weight, std=1e-3)

    def corrupt(self, tokens: Tensor, split: TokenSplit, generator: torch.Generator | None = None) -> Tensor:
        """Of the masked tokens replace 80 % by the mask token and 10 % by random ones.  int64 [B, N] -> [B, N]."""
        how = torch.rand(tokens.shape, generator=generator, device=tokens.device).masked_fill(~_masked(split), 1)
        other = torch.randint(self.config.mask_id, tokens.shape, generator=generator, device=tokens.device)
        return torch.where(how < 0.8, self.config.mask_id, torch.where(how < 0.9, other, tokens))

    def decode(self, x: Tensor, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Refine latents; the first layer does not see the hidden tokens.  x [B, N, D], hidden bool [B, N] -> [B, N, D]."""
        real = _real(lengths)
        shown = AttentionMask.keys(~hidden)
        mask = shown if real is None else shown & real
        for block in self.decoder:
            x, mask = block(x, mask), real
        return x

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, *, split: TokenSplit | None = None,
        generator: torch.Generator | None = None,
    ) -> DrBERTOutput:  # fmt: skip
        """Mask tokens and predict them.

        Args:
            tokens: int64 [B, N].
            lengths: int64 [B], how many tokens of each text are real. Default: N.
            split: which tokens are asked for. Default: a share mask_ratio of the real ones.
            generator: where everything random is drawn from.
        """
        c, device = self.config, tokens.device
        if split is None:
            split = maskops.random_masking(
                *tokens.shape, c.mask_ratio, rounding="round", lengths=lengths, generator=generator, device=device
            )
        x = self.encoder(self.corrupt(tokens, split, generator), lengths)
        hide, mix = (torch.rand(tokens.shape, generator=generator, device=device) < p for p in (c.hide, c.mix))
        refined = self.decode(x, hide & _masked(split), lengths)
        if self.training:
            refined = torch.where(mix[:, :, None], x, refined)
        logits = self.head(maskops.gather_tokens(refined, split.ids_mask))
        labels = tokens.gather(1, split.ids_mask.clamp_min(0)).where(split.ids_mask >= 0, PAD)
        total = F.cross_entropy(logits.float().mT, labels, ignore_index=PAD, reduction="sum")
        return DrBERTOutput(total / split.num_mask.sum().clamp_min(1), logits, split)


def _real(lengths: Tensor | None) -> AttentionMask | None:
    """Keys that are no padding."""
    return None if lengths is None else AttentionMask.key_padding(lengths)


def _masked(split: TokenSplit) -> Tensor:
    """bool [B, N]: the masked tokens; split.mask counts padding too."""
    slot = split.ids_restore - split.num_keep[:, None]
    return (slot >= 0) & (slot < split.num_mask[:, None])
