"""CM3: a causal language model of documents whose hidden spans are moved to the end, so that it also fills gaps from both sides.

Aghajanyan et al., "CM3: A Causal Masked Multimodal Model of the Internet", 2022 (arXiv 2201.07520).
B documents, N tokens, W tokens of a moved document, S sentinels, D width, V vocabulary.

Spans are drawn as in maskops.draw_spans: one or more are asked for, as in the paper, from n^2 candidates, as in the published code;
a short document may get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.texts import BYTES, ByteText
from maskops.nn.transformer import Transformer
from maskops.ops.mask_sampling.moves import MovedSpans

if TYPE_CHECKING:
    from maskops.train import Step


@dataclass(frozen=True)
class CM3Config(ByteText):
    """Sizes of a CM3; the defaults are those of the smallest published model.

    vocabulary: of the text; the end of a document and the sentinels are ids behind it. context: tokens of a moved document.
    max_spans: S, the most spans of a document. mean: of the Poisson law that their number follows before it is clamped.
    """

    system: ClassVar[str] = "cm3"
    on_bytes: ClassVar[dict[str, Any]] = {"vocabulary": BYTES}  # no mask token
    vocabulary: int
    context: int = 2048
    dim: int = 768
    depth: int = 12
    heads: int = 12
    max_spans: int = 16
    mean: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_spans <= 64:
            raise ValueError(f"CM3Config: max_spans must be in [1, 64], got {self.max_spans}")

    @property
    def window(self) -> int:
        """Of the context, what the sentinels, each of which stands twice, and the end leave."""
        return self.context - 2 * self.max_spans - 1

    @property
    def end_id(self) -> int:
        """Stands before the first token and behind the last."""
        return self.vocabulary

    @property
    def ids(self) -> int:
        """How many ids there are: of text, the end, and the sentinels."""
        return self.vocabulary + 1 + self.max_spans


class CM3(nn.Module):
    """A causal language model that trains on documents with moved spans.

        document: a b c d e, spans [b] and [d e]   ->   target: a <0> c <1>  <0> b  <1> d e  <end>
        input = <end> and the target without its last token
        loss  = cross-entropy of the target, each original token and <end> exactly once, sentinels never

    Example:
        >>> model = CM3(CM3Config(vocabulary=256, context=32, dim=32, depth=1, heads=4, max_spans=4))
        >>> text = torch.randint(256, (2, 20))
        >>> model.loss(text, seed=0).shape, model.infill(text, 5, 9, most=3).shape
        (torch.Size([]), torch.Size([2, 3]))
    """

    Config = CM3Config

    def __init__(self, config: CM3Config) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.ids, c.dim)
        self.positions = nn.Parameter(torch.empty(c.context, c.dim))
        self.decoder = Transformer(c.dim, c.depth, c.heads)
        self.head = nn.Linear(c.dim, c.ids, bias=False)
        self.register_buffer("sentinels", c.vocabulary + 1 + torch.arange(c.max_spans), persistent=False)
        for weight in (self.embed.weight, self.positions, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def encode(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, W] with W up to the context -> [B, W, D]."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"CM3: tokens must have at most {self.config.context} a row, got {length}")
        causal = AttentionMask.causal().to(tokens.device)
        return self.decoder(self.embed(tokens) + self.positions[:length], causal)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, W], <end> first -> the logits of what follows each of them [B, W, ids]."""
        return self.head(self.encode(tokens))

    def move(
        self, text: Tensor, lengths: Tensor | None = None, *, spans: Tensor | None = None,
        seed: int | Tensor | None = None, generator: torch.Generator | None = None,
    ) -> MovedSpans:  # fmt: skip
        """Move spans of each document to its end.  W = N + 2 S + 1.

        Args:
            text: int64 [B, N] in [0, vocabulary).
            lengths: int64 [B], real tokens of each document. Default: N.
            spans: int64 [B, S, 2], as from maskops.draw_spans; all -1 for a plain document. Default: drawn here.
            seed, generator: where they are drawn from otherwise.
        """
        c = self.config
        if spans is None:
            rows = torch.full((len(text),), text.shape[1], device=text.device) if lengths is None else lengths
            spans = maskops.draw_spans(rows, max_spans=c.max_spans, mean=c.mean, seed=seed, generator=generator)
        return maskops.move_spans(text, spans, self.sentinels[: spans.shape[1]], lengths=lengths, end_id=c.end_id)

    def losses(self, moved: MovedSpans) -> Tensor:
        """The cross-entropy of each token of moved documents; 0 for sentinels and padding.  [B, W]."""
        # Padding at the end of all rows has nothing to say.
        width = int(moved.lengths.max()) if moved.lengths.numel() else 0
        target, counted = moved.ids[:, :width], moved.predicted[:, :width]
        tokens = F.pad(target, (1, 0), value=self.config.end_id)[:, :width]
        found = maskops.linear_cross_entropy(
            self.encode(tokens), self.head.weight, target, mask=counted, reduction="none"
        )
        return F.pad(found, (0, moved.ids.shape[1] - width))

    def loss(
        self, text: Tensor, lengths: Tensor | None = None, *, spans: Tensor | None = None,
        seed: int | Tensor | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross-entropy of all original tokens and ends, spans moved; arguments as of move."""
        moved = self.move(text, lengths, spans=spans, seed=seed, generator=generator)
        return self.losses(moved).sum() / moved.predicted.sum().clamp(min=1)

    def training_loss(self, texts: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  texts: bytes, int64 [B, window]."""
        return self.loss(texts, generator=step.generator())

    @torch.no_grad()
    def infill(self, text: Tensor, begin: int, end: int, *, most: int) -> Tensor:
        """Write what may stand in place of tokens [begin, end), from both sides, the likeliest token each time.

        Args:
            text: int64 [B, N]; what is there now is not read.
            begin, end: the gap.
            most: tokens at most; a row that ends earlier is filled with <end>.

        Returns:
            int64 [B, most].
        """
        c, first = self.config, self.sentinels[:1].expand(len(text), 1)
        stop = torch.full_like(first, c.end_id)
        tokens = torch.cat([stop, text[:, :begin], first, text[:, end:], first], 1)
        prompt, done = tokens.shape[1], torch.zeros_like(stop, dtype=torch.bool)
        for _ in range(most):
            written = self(tokens)[:, -1:, : c.end_id + 1].argmax(-1)
            done = done | (written == c.end_id)
            tokens = torch.cat([tokens, torch.where(done, stop, written)], 1)
        return tokens[:, prompt:]
