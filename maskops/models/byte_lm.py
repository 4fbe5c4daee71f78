"""A small language model on bytes, plain pre-norm transformer: something to prune that trains in seconds.

B batch, T bytes of context, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops import AttentionMask
from maskops.nn.transformer import Block

BYTES = 256


@dataclass(frozen=True)
class ByteLMConfig:
    """Sizes of a ByteLM."""

    context: int = 128
    dim: int = 128
    depth: int = 2
    heads: int = 4
    mlp_dim: int = 512

    def __post_init__(self) -> None:
        for name in ("context", "dim", "depth", "heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"ByteLMConfig: {name} must be at least 1, got {getattr(self, name)}")


class ByteLM(nn.Module):
    """Predict the next byte.

    Example:
        >>> model = ByteLM(ByteLMConfig(context=16, dim=32))
        >>> model(torch.zeros(2, 10, dtype=torch.long)).shape
        torch.Size([2, 10, 256])
    """

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(BYTES, c.dim)
        self.positions = nn.Parameter(torch.empty(c.context, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, BYTES)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as GPT-2: normal with 0.02, narrower before the residual sum."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_sum = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.depth) if into_sum else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, text: Tensor) -> Tensor:
        """text int64 [B, T] with T up to the context -> logits [B, T, 256]."""
        length = text.shape[1]
        if length > self.config.context:
            raise ValueError(f"ByteLM: text must have at most {self.config.context} bytes a row, got {length}")
        x = self.embed(text) + self.positions[:length]
        causal = AttentionMask.causal().to(text.device)
        for block in self.blocks:
            x = block(x, causal)
        return self.head(self.norm(x))

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross-entropy of each byte after the first.  text int64 [B, T + 1]."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten())


class Text:
    """Bytes in two parts: every tenth stretch of 4 kB is held out, the rest is trained on."""

    STRETCH, PERIOD = 4096, 10

    def __init__(self, data: bytes, context: int) -> None:
        self.context = context
        stretches = [data[i : i + self.STRETCH] for i in range(0, len(data), self.STRETCH)]
        # A text of one stretch or two still needs both parts.
        if len(stretches) < self.PERIOD:
            cut = len(data) - len(data) // self.PERIOD
            train, held_out = data[:cut], data[cut:]
        else:
            train = b"".join(s for i, s in enumerate(stretches) if i % self.PERIOD != self.PERIOD - 1)
            held_out = b"".join(stretches[self.PERIOD - 1 :: self.PERIOD])
        if min(len(train), len(held_out)) <= context:
            least = (context + 1) * self.PERIOD
            raise ValueError(f"Text: data must have at least {least} bytes for a context of {context}, got {len(data)}")
        self.train, self.held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held_out))

    @classmethod
    def from_files(cls, paths: list[Path], context: int) -> Text:
        """The files, one after the other."""
        return cls(b"".join(path.read_bytes() for path in paths), context)

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Random windows of the training part, for ever.  int64 [size, context + 1]."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(self.context + 1)
        while True:
            start = torch.randint(len(self.train) - self.context, (size, 1), generator=generator)
            yield self.train[start + window].long()

    def held_out_batches(self, size: int = 32, most: int | None = None) -> Iterator[Tensor]:
        """The held-out part once, in order, each byte predicted once; at most `most` batches."""
        count = (len(self.held_out) - 1) // self.context
        rows = torch.stack([self.held_out[i * self.context :][: self.context + 1] for i in range(count)]).long()
        yield from rows.split(size)[:most]


@torch.no_grad()
def perplexity(model: ByteLM, batches: Iterator[Tensor]) -> float:
    """exp of the mean loss per byte; the model is left in evaluation mode."""
    model.eval()
    losses = [(model.loss(batch).double(), len(batch)) for batch in batches]
    return math.exp(sum(loss.item() * rows for loss, rows in losses) / sum(rows for _, rows in losses))


def train(model: ByteLM, batches: Iterator[Tensor], steps: int, *, lr: float = 2e-3, on_step: object = None) -> None:
    """AdamW, a tenth of the steps to warm up, then a cosine to 0.  on_step(step, loss) after every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        warm, rest = (step + 1) / max(1, steps // 10), math.cos(math.pi / 2 * step / steps) ** 2
        for group in optimizer.param_groups:
            group["lr"] = lr * min(warm, 1.0, rest)
        loss = model.loss(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, loss.item())
