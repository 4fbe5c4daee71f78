"""ERNIE-Gram: each masked n-gram becomes one token that is named whole, and beside the text its tokens are named one by one.

Xiao et al., "ERNIE-Gram: Pre-Training with Explicitly N-Gram Masked Language Modeling for Natural Language Understanding", 2021
(arXiv 2010.12148).
B texts, N tokens, K of them left when each masked n-gram is one, M masked ones, D width, V tokens and G n-grams of the vocabulary.

The published code is of fine-tuning only. Where we had to choose: slots keep the positions of the original text; a sampled n-gram
is read as one token, by its own row of the embedding; the generator names whole n-grams only; the four losses count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.texts import ByteText, TextModel
from maskops.nn.transformer import Transformer, init_linear_and_norm

LEFT, FINE, EMPTY = 0, 1, 2  # parts of the input: the shortened text, one slot for each masked token, empty slots
SEES = (
    (True, False, False),
    (True, False, False),
    (False, False, False),
)  # query's part, key's part; FINE also sees itself

if TYPE_CHECKING:
    from maskops.texts import TextFolder
    from maskops.train import Step


@dataclass(frozen=True)
class ERNIEGramConfig(ByteText):
    """Sizes of an ERNIE-Gram; the last of the `vocabulary` tokens is the mask token.

    ngrams: entries of the lexicon, of 2 to `longest` tokens; mask_ratio: of the n-grams of a text, single tokens among them;
    generator_size: the generator's share of dim and heads, 0 for none, that is without sampled n-grams and replaced tokens.
    """

    system: ClassVar[str] = "ernie_gram"
    on_bytes: ClassVar[dict[str, Any]] = {"ngrams": 20_000, "longest": 6}
    vocabulary: int
    ngrams: int = 300_000
    context: int = 512
    dim: int = 768
    depth: int = 12
    heads: int = 12
    longest: int = 3
    mask_ratio: float = 0.15
    generator_size: float = 0.25
    discriminator_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1 or not 0 <= self.generator_size <= 1:
            shares = f"mask_ratio {self.mask_ratio} and generator_size {self.generator_size}"
            raise ValueError(f"ERNIEGramConfig: mask_ratio must be in (0, 1), generator_size in [0, 1], got {shares}")
        if self.longest < 2 or (self.vocabulary + 1) ** self.longest >= 2**63:
            sizes = f"{self.longest} for a vocabulary of {self.vocabulary}"
            raise ValueError(f"ERNIEGramConfig: longest must be at least 2 and n-grams fit 63 bits, got {sizes}")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class Segments(NamedTuple):
    """A text cut into n-grams, all int64 [B, N].

    group: the number of each token's n-gram in its row, -1 for padding; place: the token's place in it; identity: the n-gram's
    row of the vocabulary, that of the token itself where it stands alone.
    """

    group: Tensor
    place: Tensor
    identity: Tensor


class Slots(NamedTuple):
    """The input: K tokens of the shortened text, then M slots of masked tokens.

    at: int64 [B, K + M], the place of each in the original text, -1 for an empty slot; part: int64 [B, K + M], LEFT, FINE or
    EMPTY; masked: bool [B, K + M], where a whole n-gram is to be named; text: K.
    """

    at: Tensor
    part: Tensor
    masked: Tensor
    text: int


class ERNIEGramOutput(NamedTuple):
    """What ERNIEGram.forward returns: the scalars, what the encoder says of each slot [B, K + M, D], and the slots."""

    loss: Tensor
    coarse_loss: Tensor
    fine_loss: Tensor
    generator_loss: Tensor
    discriminator_loss: Tensor
    hidden: Tensor
    slots: Slots


class ERNIEGram(TextModel):
    """Explicit n-gram masking, and with a generator also replaced n-grams.

        text  = tokens, each masked n-gram ONE mask token, or with a generator a draw from its softmax over V + G
        input = [text, one slot for each token of the masked n-grams]; text sees text, a slot sees text and itself
        loss  = CE(n-grams over V + G) + CE(slots over V) + CE of the generator + BCE(replaced?) over the text

    Example:
        >>> model = ERNIEGram(ERNIEGramConfig(vocabulary=20, ngrams=30, context=16, dim=32, depth=1, heads=4))
        >>> tokens = torch.arange(32).view(2, 16) % 8
        >>> model.learn_lexicon(tokens.flatten())
        16
        >>> model(tokens).loss.shape, model.encode(tokens).shape
        (torch.Size([]), torch.Size([2, 16, 32]))
    """

    Config = ERNIEGramConfig

    def __init__(self, config: ERNIEGramConfig) -> None:
        c = config
        super().__init__(c.vocabulary + c.ngrams, c.context, c.dim)
        self.config = c
        self.slots = nn.Parameter(
            0.1 * torch.randn(c.longest, c.dim)
        )  # the mask tokens [M1], [M2], ... of single tokens
        self.encoder = Transformer(c.dim, c.depth, c.heads)
        self.head, self.bias = _head(c.dim, c.dim), nn.Parameter(torch.zeros(c.vocabulary + c.ngrams))
        # The keys of the n-grams, ascending; an entry that is not used is larger than every key.
        self.register_buffer("lexicon", torch.full((c.ngrams,), 2**63 - 1))
        if c.generator_size:
            heads = max(1, round(c.heads * c.generator_size))
            width = max(heads, round(c.dim * c.generator_size) // heads * heads)
            self.to_generator, self.generator = nn.Linear(c.dim, width), Transformer(width, c.depth, heads)
            self.generator_head, self.generator_bias = _head(width, c.dim), nn.Parameter(torch.zeros_like(self.bias))
            self.discriminator = nn.Sequential(nn.Linear(c.dim, c.dim), nn.GELU(), nn.Linear(c.dim, 1))
            for module in (self.to_generator, self.discriminator):
                module.apply(init_linear_and_norm)

    # ---------------------------------------------------------------- n-grams

    @torch.no_grad()
    def learn_lexicon(self, tokens: Tensor) -> int:
        """Fill the lexicon from a text, int64 [T], with as many n-grams of each length; those of the highest t-statistic.

            t = (p - product of its tokens' p) / sqrt(p (1 - p) / number of n-grams)

        N-grams that occur once are left out.  Returns how many were found.
        """
        c, found = self.config, []
        share = tokens.bincount(minlength=c.vocabulary).double() / len(tokens)
        for n in range(2, c.longest + 1):
            keys, count = self._keys(tokens, n).unique(return_counts=True)
            keys, count = keys[count > 1], count[count > 1]
            chance = torch.stack([share[keys // (c.vocabulary + 1) ** i % (c.vocabulary + 1) - 1] for i in range(n)])
            p, total = count / (len(tokens) - n + 1), len(tokens) - n + 1
            score = (p - chance.prod(0)) / (p * (1 - p) / total).clamp_min(1e-30).sqrt()
            most = c.ngrams * (n - 1) // (c.longest - 1) - c.ngrams * (n - 2) // (c.longest - 1)
            found.append(keys[score.topk(min(most, len(keys))).indices])
        keys = torch.cat(found).sort().values
        self.lexicon.fill_(2**63 - 1)[: len(keys)] = keys
        return len(keys)

    def segment(self, tokens: Tensor, lengths: Tensor | None = None) -> Segments:
        """Cut texts into n-grams from left to right, the longest of the lexicon first.  tokens int64 [B, N]."""
        c, (rows, length) = self.config, tokens.shape
        at = torch.arange(length, device=tokens.device).expand(rows, -1)
        end = torch.full((rows, 1), length, device=tokens.device) if lengths is None else lengths[:, None]
        size, identity = torch.ones_like(tokens), tokens
        for n in range(2, min(c.longest, length) + 1 if c.ngrams else 2):
            keys = self._keys(tokens, n)
            entry = torch.searchsorted(self.lexicon, keys).clamp(max=c.ngrams - 1)
            hit = F.pad((self.lexicon[entry] == keys) & (at[:, : 1 - n] + n <= end), (0, n - 1))
            size = torch.where(hit, n, size)
            identity = torch.where(hit, c.vocabulary + F.pad(entry, (0, n - 1)), identity)
        start = _reached(at + size)
        first = torch.where(start, at, 0).cummax(1).values
        group = (start.cumsum(1) - 1).masked_fill(at >= end, -1)
        return Segments(group, at - first, identity.gather(1, first))

    def _keys(self, tokens: Tensor, n: int) -> Tensor:
        """int64 [..., N - n + 1]: a number for each n-gram; no digit is 0, so n-grams of different lengths differ too."""
        base = self.config.vocabulary + 1
        return sum((tokens[..., i : tokens.shape[-1] - n + 1 + i] + 1) * base**i for i in range(n))

    # ---------------------------------------------------------------- forward

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What is left after pre-training.  tokens int64 [B, N] -> [B, N, D]."""
        real = None if lengths is None else AttentionMask.key_padding(lengths)
        return self.encoder(self._embed(tokens), real)

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, *, mask: Tensor | None = None, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ERNIEGramOutput:  # fmt: skip
        """Cut into n-grams, mask some, and name them.

        Args:
            tokens: int64 [B, N].
            lengths: int64 [B], how many tokens of each text are real. Default: N.
            mask: bool [B, N], whole n-grams of `segment`. Default: a share mask_ratio of them, at least one.
            seed: of the generator's samples.
            generator: where the mask is drawn from, and the samples too without a seed.
        """
        self._check(tokens)
        c, segments = self.config, self.segment(tokens, lengths)
        if mask is None:
            mask = maskops.group_masking(segments.group, c.mask_ratio, unit="group", generator=generator)
        slots = arrange(segments, mask)
        from_text, at = slots.text, slots.at.clamp_min(0)
        asked = segments.identity.gather(1, at)
        # Beside the masked n-grams the text is as it was, token by token.
        truth = torch.where(slots.masked, asked, tokens.gather(1, at))[:, :from_text]
        masked, left = slots.masked[:, :from_text], slots.part[:, :from_text] == LEFT
        corrupted, zero = truth.masked_fill(masked, c.mask_id), self.bias.new_zeros(())
        told = replaced = zero
        if c.generator_size:
            x = self.to_generator(self.embed(corrupted) + self.positions[at[:, :from_text]])
            x = self.generator_head(self.generator(x, AttentionMask.keys(left)))
            weight, bias = self.embed.weight, self.generator_bias
            told, sample = maskops.linear_sample(
                x, weight, truth, mask=masked, bias=bias, seed=seed, generator=generator
            )
            corrupted = torch.where(masked, sample, truth)
        x = torch.cat([self.embed(corrupted), self.slots[segments.place.gather(1, at[:, from_text:])]], 1)
        mask = AttentionMask.groups(torch.tensor(SEES, device=x.device), slots.part) | AttentionMask.window(0, 0).to(
            x.device
        )
        hidden = self.encoder(x + self.positions[at], mask)
        if c.generator_size:
            logits = self.discriminator(hidden[:, :from_text])[..., 0]
            replaced = maskops.replaced_token_loss(logits, truth, corrupted, left)
        named = self.head(hidden)
        coarse = maskops.linear_cross_entropy(named, self.embed.weight, asked, mask=slots.masked, bias=self.bias)
        words, bias = self.embed.weight[: c.vocabulary], self.bias[: c.vocabulary]
        fine = maskops.linear_cross_entropy(named, words, tokens.gather(1, at), mask=slots.part == FINE, bias=bias)
        loss = coarse + fine + told + c.discriminator_weight * replaced
        return ERNIEGramOutput(loss, coarse, fine, told, replaced, hidden, slots)

    def prepare(self, data: TextFolder) -> None:
        """Learn the lexicon from the text that maskops.train trains on; 64 MB of it tell enough."""
        self.learn_lexicon(data.bytes[: 2**26].long())

    def training_loss(self, texts: Tensor, step: Step) -> Tensor:
        """The loss of this process's rows of a step of maskops.train.  texts: bytes, int64 [B, window]."""
        return self(texts, generator=step.generator()).loss


def arrange(segments: Segments, mask: Tensor) -> Slots:
    """The slots of a text of which mask bool [B, N] hides whole n-grams."""
    absent, mask = segments.group < 0, mask & (segments.group >= 0)
    text = maskops.split_tokens(absent | (mask & (segments.place > 0))).ids_keep
    at = torch.cat([text, maskops.split_tokens(~mask).ids_keep], 1)
    part = (torch.arange(at.shape[1], device=at.device) >= text.shape[1]).long().masked_fill(at < 0, EMPTY)
    return Slots(at, part, mask.gather(1, at.clamp_min(0)) & (part == LEFT), text.shape[1])


def _reached(to: Tensor) -> Tensor:
    """bool [B, N]: where one comes from 0 by steps n -> to[n] > n; in about log N rounds, each with twice the steps."""
    length = to.shape[1]
    to = F.pad(to.clamp(max=length), (0, 1), value=length)
    found = torch.zeros_like(to, dtype=torch.bool)
    found[:, :1] = True
    for _ in range(length.bit_length()):
        found = found.scatter(1, to.where(found, length), True)
        to = to.gather(1, to)
    return found[:, :length]


def _head(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.LayerNorm(dim)).apply(init_linear_and_norm)
