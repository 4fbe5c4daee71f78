"""ELECTRA: a small generator fills masked tokens in, a discriminator tells for every token whether it was replaced.

Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", 2020 (arXiv 2003.10555).
B texts, N tokens, D width, V vocabulary.

The published code draws a fixed number of slots with replacement, so that fewer tokens than asked for are masked; we do the same,
but a token drawn twice counts once in the generator's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.texts import ByteText, TextModel
from maskops.nn.transformer import Transformer, init_linear_and_norm

if TYPE_CHECKING:
    from maskops.train import Step


@dataclass(frozen=True)
class ELECTRAConfig(ByteText):
    """Sizes of an ELECTRA; the last id of the vocabulary is the mask token.  generator_size: its share of dim and heads."""

    system: ClassVar[str] = "electra"
    vocabulary: int
    context: int = 128
    dim: int = 256
    depth: int = 12
    heads: int = 4
    generator_size: float = 0.25
    mask_ratio: float = 0.15
    discriminator_weight: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1 or not 0 < self.generator_size <= 1:
            shares = f"mask_ratio {self.mask_ratio} and generator_size {self.generator_size}"
            raise ValueError(f"ELECTRAConfig: mask_ratio must be in (0, 1) and generator_size in (0, 1], got {shares}")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class ELECTRAOutput(NamedTuple):
    """What ELECTRA.forward returns.  corrupted int64 [B, N] is what the discriminator read; mask bool [B, N], what was drawn."""

    loss: Tensor
    generator_loss: Tensor
    discriminator_loss: Tensor
    logits: Tensor  # [B, N], above 0: replaced
    corrupted: Tensor
    mask: Tensor


class ELECTRA(TextModel):
    """Replaced-token detection.

        loss, sample = cross-entropy of the generator at the masked tokens, and a draw from its softmax, in one pass
        corrupted    = tokens, the masked ones replaced by the draw (no gradient)
        loss         = loss + 50 * binary cross-entropy of (corrupted != tokens) at every real token

    Example:
        >>> model = ELECTRA(ELECTRAConfig(vocabulary=100, context=20, dim=32, depth=1))
        >>> out = model(torch.randint(99, (2, 20)), seed=0)
        >>> out.loss.shape, out.logits.shape
        (torch.Size([]), torch.Size([2, 20]))
    """

    Config = ELECTRAConfig

    def __init__(self, config: ELECTRAConfig) -> None:
        c = config
        super().__init__(c.vocabulary, c.context, c.dim)
        self.config = c
        heads = max(1, round(c.heads * c.generator_size))
        width = max(heads, round(c.dim * c.generator_size) // heads * heads)
        self.to_generator = nn.Linear(c.dim, width)
        self.generator = Transformer(width, c.depth, heads)
        self.generator_head = nn.Sequential(nn.Linear(width, c.dim), nn.GELU(), nn.LayerNorm(c.dim))
        self.generator_bias = nn.Parameter(torch.zeros(c.vocabulary))
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.head = nn.Sequential(nn.Linear(c.dim, c.dim), nn.GELU(), nn.Linear(c.dim, 1))
        for module in (self.to_generator, self.generator_head, self.head):
            module.apply(init_linear_and_norm)

    def draw_mask(
        self, shape: tuple[int, int], lengths: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """bool [B, N]: int((mask_ratio + 0.005) N) slots a text, drawn with replacement from its real tokens."""
        rows, count = shape
        device = generator.device if generator is not None else self.positions.device
        slots = max(1, int((self.config.mask_ratio + 0.005) * count))
        real = torch.full((rows,), count, device=device) if lengths is None else lengths
        at = (torch.rand(rows, slots, generator=generator, device=device) * real[:, None]).long()
        # Shorter texts use fewer of the slots, but never none.
        used = (self.config.mask_ratio * real).round().clamp(min=1)[:, None] > torch.arange(slots, device=device)
        used = used & (real > 0)[:, None]
        return torch.zeros(rows, count + 1, dtype=torch.bool, device=device).scatter(
            1, torch.where(used, at, count), True
        )[:, :count]

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What is left after pre-training.  tokens int64 [B, N] -> [B, N, D]."""
        return self.encoder(self._embed(tokens), _real(lengths))

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, *, mask: Tensor | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ELECTRAOutput:  # fmt: skip
        """Mask, fill in, and tell.

        Args:
            tokens: int64 [B, N].
            lengths: int64 [B], how many tokens of each text are real. Default: N.
            mask: bool [B, N], instead of drawing one.
            seed: of the generator's samples.
            generator: where everything else random is drawn from, and the samples too without a seed.
        """
        mask = self.draw_mask(tuple(tokens.shape), lengths, generator) if mask is None else mask
        # 15 % of what is masked stays as it is in the generator's input.
        kept = torch.rand(tokens.shape, generator=generator, device=tokens.device) >= 0.85
        hidden = tokens.masked_fill(mask & ~kept, self.config.mask_id)
        found = self.generator_head(self.generator(self.to_generator(self._embed(hidden)), _real(lengths)))
        loss, sample = maskops.linear_sample(
            found, self.embed.weight, tokens, mask=mask, bias=self.generator_bias, seed=seed,
            generator=generator if seed is None else None,
        )  # fmt: skip
        corrupted = torch.where(mask, sample, tokens)
        logits = self.head(self.encode(corrupted, lengths))[..., 0]
        real = None if lengths is None else torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        told = maskops.replaced_token_loss(logits, tokens, corrupted, real)
        return ELECTRAOutput(loss + self.config.discriminator_weight * told, loss, told, logits, corrupted, mask)

    def training_loss(self, texts: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  texts: bytes, int64 [B, window]."""
        return self(texts, generator=step.generator()).loss


def _real(lengths: Tensor | None) -> AttentionMask | None:
    """Keys that are no padding."""
    return None if lengths is None else AttentionMask.key_padding(lengths)
