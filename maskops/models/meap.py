"""MEAP: next-token prediction on a text in which some tokens of the input are masked, so that attention learns to go to the others.

Zhuang et al., "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", 2025 (arXiv 2502.07490).
B texts, T tokens, D width, V vocabulary.

The published code draws one mask for all texts of a batch, from only 51 seeds; here every text has its own, and every seed counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.texts import TextModel
from maskops.nn.transformer import Transformer


@dataclass(frozen=True)
class MEAPConfig:
    """Sizes of a MEAP decoder; vocabulary counts the mask token, which is its last id.  mask_ratio: of the input tokens."""

    vocabulary: int
    context: int = 4096
    dim: int = 2048
    depth: int = 24
    heads: int = 32
    mask_ratio: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"MEAPConfig: mask_ratio must be in [0, 1), got {self.mask_ratio}")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class MEAP(TextModel):
    """A causal language model that trains on masked inputs; with mask_ratio 0 it is plain next-token prediction.

        input = text[:, :-1] with int(mask_ratio T) tokens replaced by the mask token, the last one never
        loss  = cross-entropy of text[:, 1:] at all T positions, masked or not

    Example:
        >>> model = MEAP(MEAPConfig(vocabulary=257, context=16, dim=32, depth=1, heads=4))
        >>> text = torch.randint(256, (2, 17))
        >>> model(text[:, :-1]).shape, model.loss(text, seed=0).shape
        (torch.Size([2, 16, 257]), torch.Size([]))
    """

    def __init__(self, config: MEAPConfig) -> None:
        c = config
        super().__init__(c.vocabulary, c.context, c.dim, std=None)
        self.config = c
        self.decoder = Transformer(c.dim, c.depth, c.heads)
        self.head = nn.Linear(c.dim, c.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] with T up to the context -> logits [B, T, V]."""
        causal = AttentionMask.causal().to(tokens.device)
        return self.head(self.decoder(self._embed(tokens), causal))

    def mask_input(
        self, tokens: Tensor, *, seed: int | Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Replace exactly int(mask_ratio T) tokens of each row, drawn without replacement from all but the last.  int64 [B, T]."""
        rows, length = tokens.shape
        keep = length - 1 - int(self.config.mask_ratio * length)
        split = maskops.random_masking(
            rows, length - 1, num_keep=keep, seed=seed, generator=generator, device=tokens.device
        )
        return tokens.masked_fill(F.pad(split.mask, (0, 1)), self.config.mask_id)

    def loss(
        self, text: Tensor, *, seed: int | Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean cross-entropy of each token after the first, the inputs masked.  text int64 [B, T + 1]."""
        logits = self(self.mask_input(text[:, :-1], seed=seed, generator=generator))
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    def fine_tuning_loss(
        self, text: Tensor, answer: Tensor, ratio: float = 0.1, *, longer_than: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """The published loss of fine-tuning: every text twice, as it is, and with some of its answer masked and only that counted.

        A masked token is predicted from the position before it, as any other token is.

        Args:
            text: int64 [B, T].
            answer: bool [B, T], the tokens of the answer, which alone count in the plain copy.
            ratio: the share of the answer that is masked, rounded down for each text.
            longer_than: shorter answers are not masked.

        Returns:
            A scalar: the mean over the counted tokens of both copies.
        """
        tokens = answer.sum(1)
        count = torch.where(tokens > longer_than, (ratio * tokens).long(), 0)
        noise = torch.rand(answer.shape, generator=generator, device=text.device).masked_fill(~answer, -1)
        hidden = maskops.random_masking(*text.shape, num_keep=text.shape[1] - count, noise=noise).mask
        inputs = torch.cat([text, text.masked_fill(hidden, self.config.mask_id)])
        counted = torch.cat([answer, hidden])[:, 1:]
        return F.cross_entropy(self(inputs)[:, :-1][counted].float(), text.repeat(2, 1)[:, 1:][counted])
