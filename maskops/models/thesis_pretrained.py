"""Two parts of Yoshida's thesis "Making the Most of your Model": hidden-state optimisation, and SUNDAE.

Hidden-state optimisation: a language model reads on, and what it has cached of the text so far learns; its parameters do not
(Yoshida and Gimpel, "Reconsidering the Past: Optimizing Hidden States in Language Models", 2021, arXiv 2112.08653).
SUNDAE: a text is denoised over and over, every token at once (Savinov et al., "Step-unrolled Denoising Autoencoders for Text
Generation", 2021, arXiv 2112.06749).
B texts, T bytes of a window, S cached ones, D channels, L layers.

The cache holds hidden states, the inputs of every layer; keys and values are computed from them, so gradients reach them. A window
attends to them by masked_attention with a causal mask; a single next byte by cached_attention, which has gradients as well but lets
local tokens see each other, and so is not for a causal window of more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import maskops
from maskops import AttentionMask
from maskops.models.byte_lm import BYTES
from maskops.models.texts import TextModel
from maskops.nn.rotary import rotary
from maskops.nn.transformer import Block, Transformer


@dataclass(frozen=True)
class CachedLMConfig:
    """Sizes of a CachedLM."""

    dim: int = 128
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"CachedLMConfig: twice heads must divide dim {self.dim}, got heads {self.heads}")


class CachedLM(nn.Module):
    """A causal language model on bytes that goes on from cached hidden states, as Transformer-XL does; rotary positions.

    Example:
        >>> model = CachedLM(CachedLMConfig(dim=32, depth=2, heads=2))
        >>> logits, states = model(torch.randint(256, (3, 8)))
        >>> model(torch.randint(256, (3, 5)), states)[0].shape, len(states), states[0].shape
        (torch.Size([3, 5, 256]), 2, torch.Size([3, 8, 32]))
    """

    def __init__(self, config: CachedLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(BYTES, config.dim)
        self.trunk = Transformer(config.dim, config.depth, config.heads)
        self.head = nn.Linear(config.dim, BYTES)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, text: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """text int64 [B, T] after the bytes of `states` (L of [B, S, D]) -> logits [B, T, 256] and the text's own states."""
        x, own = self.embed(text), []
        past = 0 if states is None else states[0].shape[1]
        positions = torch.arange(past + text.shape[1], device=text.device)
        causal = AttentionMask.causal(offset=past).to(text.device)
        for i, block in enumerate(self.trunk.blocks):
            own.append(x)
            seen = x if states is None else torch.cat([states[i], x], 1)
            q, k, v = _project(block, seen, positions)
            x = _finish(block, x, maskops.masked_attention(q[:, :, past:].contiguous(), k, v, causal))
        return self.head(self.trunk.norm(x)), own

    def next_logits(self, byte: Tensor, states: list[Tensor]) -> Tensor:
        """Logits [B, 256] after one more byte int64 [B], through a ContextCache; gradients reach the states."""
        past = states[0].shape[1]
        places = torch.arange(past, device=byte.device)
        cached = [_project(block, h, places)[1:] for block, h in zip(self.trunk.blocks, states, strict=True)]
        cache = maskops.ContextCache.of(*(torch.stack(x) for x in zip(*cached, strict=True)))
        slot = byte.new_zeros(len(byte), 1)
        nothing = cache.exclude(slot - 1)  # the byte is new: none of the cached ones gives way to it
        x = self.embed(byte)[:, None]
        for i, block in enumerate(self.trunk.blocks):
            q, k, v = _project(block, x, slot[0] + past)
            x = _finish(block, x, maskops.cached_attention(q, k, v, cache, i, slot, exclude=nothing))
        return self.head(self.trunk.norm(x))[:, 0]

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross-entropy of each byte after the first.  text int64 [B, T + 1]."""
        return F.cross_entropy(self(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())


def _project(block: Block, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.attn.split_heads(block.norm1(x))
    return rotary(q, positions), rotary(k, positions), v


def _finish(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.attn.proj(rearrange(attended, "b h n d -> b n (h d)"))
    return x + block.mlp(block.norm2(x))


class HiddenStateOptimiser:
    """Read a text window by window; after each, an Adam step on the hidden states of the window and of those before it.

        states <- states - lr Adam(d NLL(window) / d states)

    Every state has moments and a count of steps of its own, since it enters the cache with its window and leaves it with age.

    Args:
        model: a CachedLM; its parameters are neither changed nor given gradients.
        lr: of a step; 0 only caches.
        memory: how many states are kept, the newest ones.
        betas, eps: of Adam.

    Example:
        >>> reader = HiddenStateOptimiser(CachedLM(CachedLMConfig(dim=32, depth=2, heads=2)), lr=0.01, memory=12)
        >>> for window in torch.randint(256, (3, 2, 9)).unbind():
        ...     losses = reader.read(window)
        >>> losses.shape, reader.states[0].shape
        (torch.Size([2, 8]), torch.Size([2, 12, 32]))
    """

    def __init__(
        self, model: CachedLM, lr: float, memory: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        for name, value in (("lr", lr), ("memory", memory)):
            if value < 0:
                raise ValueError(f"HiddenStateOptimiser: {name} must be at least 0, got {value}")
        self.model, self.lr, self.memory, self.betas, self.eps = model, lr, memory, betas, eps
        self.states: list[Tensor] | None = None
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.steps = torch.zeros(0)

    def read(self, text: Tensor) -> Tensor:
        """text int64 [B, T + 1], each window beginning with the last byte of the one before -> losses [B, T], then a step."""
        before = None if self.states is None else [h.detach().requires_grad_() for h in self.states]
        with torch.enable_grad():
            logits, own = self.model(text[:, :-1], before)
            losses = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
            leaves = own if before is None else [*before, *own]
            # Rows do not meet, and Adam does not see the scale: the sum is as good as the mean.
            grads = torch.autograd.grad(losses.sum(), leaves) if self.lr else [torch.zeros_like(h) for h in leaves]
        if before is not None:
            L = len(own)
            own = [torch.cat(pair, 1) for pair in zip(before, own, strict=True)]
            grads = [torch.cat(pair, 1) for pair in zip(grads[:L], grads[L:], strict=True)]
        self._step([h.detach() for h in own], grads)
        return losses.detach()

    @torch.no_grad()
    def _step(self, states: list[Tensor], grads: list[Tensor] | tuple[Tensor, ...]) -> None:
        new = states[0].shape[1] - len(self.steps)
        self.steps = F.pad(self.steps.to(states[0].device), (0, new)) + 1
        moments = self.moments or [(h[:, :0], h[:, :0]) for h in states]
        (first, second), keep = self.betas, slice(max(0, states[0].shape[1] - self.memory), None)
        count = self.steps[:, None]
        self.states, self.moments = [], []
        for state, grad, old in zip(states, grads, moments, strict=True):
            mean, square = (F.pad(m, (0, 0, 0, new)) for m in old)
            mean, square = mean.lerp(grad, 1 - first), square.lerp(grad.square(), 1 - second)
            step = mean / (1 - first**count) / ((square / (1 - second**count)).sqrt() + self.eps)
            self.states.append((state - self.lr * step)[:, keep])
            self.moments.append((mean[:, keep], square[:, keep]))
        self.steps = self.steps[keep]


@dataclass(frozen=True)
class SUNDAEConfig:
    """Sizes of a SUNDAE.  unroll: denoising steps of training, each on the samples of the one before."""

    vocabulary: int
    context: int
    dim: int = 128
    depth: int = 2
    heads: int = 4
    unroll: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.unroll, int) or self.unroll < 1:
            raise ValueError(f"SUNDAEConfig: unroll must be an int of at least 1, got {self.unroll}")


class SUNDAE(TextModel):
    """Step-unrolled denoising autoencoder: a bidirectional model that is trained on what it makes itself.

        corrupt: each text has a rate of its own, uniform in [0, 1]; each token becomes a uniform one with that chance
        repeat `unroll` times: loss += cross-entropy of the clean text at all positions; text <- sample of the logits, no gradient

    There is no mask token. Loss and sample come from the same pass over the logits, which take no memory of their own.

    Example:
        >>> model = SUNDAE(SUNDAEConfig(vocabulary=256, context=16, dim=32, depth=1, heads=2))
        >>> text = torch.randint(256, (3, 16))
        >>> model.loss(text).shape, model.refine(text, steps=8).shape
        (torch.Size([]), torch.Size([3, 16]))
    """

    def __init__(self, config: SUNDAEConfig) -> None:
        c = config
        super().__init__(c.vocabulary, c.context, c.dim, std=0.02)
        self.config = c
        self.trunk = Transformer(c.dim, c.depth, c.heads)
        self.head = nn.Linear(c.dim, c.vocabulary)

    def encode(self, text: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, D]."""
        return self.trunk(self._embed(text))

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the clean text: int64 [B, T] -> [B, T, V]."""
        return self.head(self.encode(text))

    def corrupt(self, text: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform tokens, at a rate of its own for every text.  int64 [B, T]."""
        self._check(text)
        rates = torch.rand(len(text), 1, generator=generator, device=text.device)
        hidden = maskops.bernoulli_masking(*text.shape, rates, generator=generator)
        return maskops.corrupt_tokens(
            text, hidden, 0, self.config.vocabulary, hide=0.0, random=1.0, generator=generator
        )

    def loss(self, text: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean over the unrolled steps.  text int64 [B, T]; generator: where everything random is drawn from."""
        seen, total = self.corrupt(text, generator), 0.0
        for _ in range(self.config.unroll):
            loss, seen = self._denoise(seen, text, generator)
            total = total + loss
        return total / self.config.unroll

    @torch.no_grad()
    def refine(
        self, text: Tensor, steps: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample every token anew, `steps` times, from the logits of the text before.  int64 [B, T]; from noise, new text."""
        for _ in range(steps):
            text = self._denoise(text, text, generator, temperature)[1]
        return text

    def _denoise(
        self, seen: Tensor, clean: Tensor, generator: torch.Generator | None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(loss, sample) of a pass over a text."""
        return maskops.linear_sample(
            self.encode(seen),
            self.head.weight,
            clean,
            bias=self.head.bias,
            sample_temperature=temperature,
            generator=generator,
        )
