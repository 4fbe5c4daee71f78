"""DupMAE: a text's class token must decode all of it through one layer, and its other tokens must name its words.

Xiao et al., "RetroMAE v2: Duplex Masked Auto-Encoder", 2022 (arXiv 2211.08769).
B texts, L tokens, token 0 the class token and the last a separator, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.texts import ByteText, TextModel
from maskops.nn.transformer import CrossBlock, Transformer, init_linear_and_norm

if TYPE_CHECKING:
    from maskops.train import Step


@dataclass(frozen=True)
class DupMAEConfig(ByteText):
    """Sizes of a DupMAE; the last id of the vocabulary is the mask token.  hide: share of keys that a decoder row does not see."""

    system: ClassVar[str] = "dupmae"
    specials: ClassVar[int] = 2  # the class token and the separator
    vocabulary: int
    context: int = 512
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mask_ratio: float = 0.3
    hide: float = 0.5
    bow_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "hide"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"DupMAEConfig: {name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class DupMAEOutput(NamedTuple):
    """What DupMAE.forward returns, scalars: loss = decoder_loss + bow_weight bow_loss + encoder_loss."""

    loss: Tensor
    decoder_loss: Tensor
    bow_loss: Tensor
    encoder_loss: Tensor


class DupMAE(TextModel):
    """Masked auto-encoder of texts with two decoders.

        x = encoder(masked tokens);  encoder_loss = cross-entropy at the masked tokens
        decoder: query i = x[0] + position i, keys x[0] and the embeddings of the ORIGINAL tokens, of which row i sees a random half
            and never its own; decoder_loss = cross-entropy at every token but the first and the last
        bow_loss = -mean over the distinct tokens of log softmax(max over the tokens of x[1:] embedding^T)

    Example:
        >>> model = DupMAE(DupMAEConfig(vocabulary=100, context=20, dim=32, depth=1, heads=4))
        >>> tokens = torch.randint(99, (2, 20))
        >>> model(tokens).loss.shape, model.embedding(tokens, top=16).shape
        (torch.Size([]), torch.Size([2, 48]))
    """

    Config = DupMAEConfig

    def __init__(self, config: DupMAEConfig) -> None:
        c = config
        super().__init__(c.vocabulary, c.context, c.dim)
        self.config = c
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.decoder = CrossBlock(c.dim, c.heads, 4 * c.dim).apply(init_linear_and_norm)
        self.norm = nn.LayerNorm(c.dim)
        self.bias = nn.Parameter(torch.zeros(c.vocabulary))

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens int64 [B, L] -> [B, L, D]."""
        return self.encoder(self._embed(tokens), AttentionMask.key_padding(lengths))

    def decode(self, summary: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """summary [B, D], the original tokens int64 [B, L], seen bool [B, L, L] (row, key) -> [B, L, D]."""
        queries = summary[:, None] + self.positions[: tokens.shape[1]]
        context = torch.cat([summary[:, None], self._embed(tokens)[:, 1:]], 1)
        return self.norm(self.decoder(queries, context, AttentionMask.dense(seen[:, None])))

    def visible(self, real: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """bool [B, L, L]: what each decoder row sees, a random share of the real keys, never its own, the class token always."""
        length = real.shape[1]
        drawn = torch.rand(len(real), length, length, generator=generator, device=real.device) >= self.config.hide
        itself = torch.eye(length, dtype=torch.bool, device=real.device)
        seen = drawn & real[:, None] & ~itself
        # Key 0 is the summary, not a token, so row 0 may see it.
        return torch.cat([torch.ones_like(seen[:, :, :1]), seen[:, :, 1:]], 2)

    def bag_of_words(self, x: Tensor, real: Tensor) -> Tensor:
        """The highest logit of each word over the tokens after the class token.  [B, L, D] -> [B, V]."""
        return maskops.linear_max_pool(x[:, 1:].contiguous(), self.embed.weight, self.bias, real[:, 1:])

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, *, mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DupMAEOutput:  # fmt: skip
        """Mask, encode, and decode twice.

        Args:
            tokens: int64 [B, L].
            lengths: int64 [B], how many tokens of each text are real, the first and the last of them special. Default: L.
            mask: bool [B, L], which tokens the encoder does not see. Default: a share mask_ratio of the tokens in between.
            generator: where everything random is drawn from.
        """
        device, length = tokens.device, tokens.shape[1]
        lengths = torch.full((len(tokens),), length, device=device) if lengths is None else lengths
        at = torch.arange(length, device=device)
        real, inner = at < lengths[:, None], (at > 0) & (at < lengths[:, None] - 1)
        if mask is None:
            noise = torch.rand(tokens.shape, generator=generator, device=device).masked_fill(~inner, 2)
            count = (self.config.mask_ratio * inner.sum(1)).round().long()
            mask = maskops.random_masking(*tokens.shape, num_keep=length - count, noise=1 - noise).mask
        x = self.encode(tokens.masked_fill(mask, self.config.mask_id), lengths)
        told = maskops.linear_cross_entropy(x, self.embed.weight, tokens, mask=mask, bias=self.bias)
        decoded = self.decode(x[:, 0], tokens, self.visible(real, generator))
        decoder_loss = maskops.linear_cross_entropy(decoded, self.embed.weight, tokens, mask=inner, bias=self.bias)
        words = self.bag_of_words(x, real).log_softmax(1)
        asked = torch.zeros_like(words).scatter(1, torch.where(inner, tokens, tokens[:, :1]), 1.0)
        bow_loss = -(words * asked).sum(1).div(lengths.clamp(min=1)).mean()
        return DupMAEOutput(decoder_loss + self.config.bow_weight * bow_loss + told, decoder_loss, bow_loss, told)

    def training_loss(self, texts: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  texts: bytes, int64 [B, window]."""
        # Before the mask token, the last id, come the class token and the separator.
        first, last = (texts.new_full((len(texts), 1), self.config.mask_id - i) for i in (2, 1))
        return self(torch.cat([first, texts, last], 1), generator=step.generator()).loss

    def embedding(self, tokens: Tensor, lengths: Tensor | None = None, *, top: int = 0) -> Tensor:
        """Vectors for retrieval: the class token's, and of the bag of words the `top` first of the hashed parts.  [B, D + top].

        The published reduction is learned; here part j is the highest logit among the words v with v mod top = j, both halves of
        length 1.
        """
        lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device) if lengths is None else lengths
        x = self.encode(tokens, lengths)
        first = nn.functional.normalize(x[:, 0], dim=1)
        if top == 0:
            return first
        words = self.bag_of_words(x, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])
        words = nn.functional.relu(words - words.mean(1, keepdim=True))
        part = (torch.arange(words.shape[1], device=tokens.device) % top).expand_as(words)
        parts = words.new_zeros(len(words), top).scatter_reduce(1, part, words, "amax")
        return torch.cat([first, nn.functional.normalize(parts, dim=1).to(first.dtype)], 1)
