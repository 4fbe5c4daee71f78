"""What models of text share: embedded tokens, and, where maskops.train pre-trains them on bytes, sizes and ids."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskops.models.sizes import fields_of
from maskops.nn.transformer import sincos_positions

BYTES = 256

# small, base and large are those of ELECTRA, tiny that of the small BERTs.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=128, depth=2, heads=2),
    "small": dict(dim=256, depth=12, heads=4),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
}


class ByteText:
    """Of a config: the ids 0 to 255 are bytes, then come `specials` ids of the system and the mask token.

    window: how many bytes of text a sample has, what is left of the context beside the special tokens.
    """

    samples: ClassVar[str] = "text"
    specials: ClassVar[int] = 0
    on_bytes: ClassVar[dict[str, Any]] = {}  # other fields of of_size

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> Any:
        """The config of a size in SIZES for text as bytes, with single fields changed."""
        usual = {"vocabulary": BYTES + cls.specials + 1, "context": 128, **cls.on_bytes}
        fields = {**usual, **fields_of(cls, SIZES, size, changes)}
        config = cls(**fields)
        if config.window < 1:
            least = fields["context"] - config.window + 1
            raise ValueError(f"{cls.__name__}: context must be at least {least}, got {fields['context']}")
        return config

    @property
    def window(self) -> int:
        return self.context - self.specials  # type: ignore[attr-defined]


class TextModel(nn.Module):
    """A model that reads tokens: the table `embed`, and learned `positions` that begin as sines and cosines.

    std: of the table, by default small beside the positions, as in the published BERT: heads first learn to look at neighbours.
    None leaves it as torch makes it. called: what errors call the model, by default its class.
    """

    called: ClassVar[str] = ""

    def __init__(self, vocabulary: int, context: int, dim: int, std: float | None = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        if std is not None:
            nn.init.normal_(self.embed.weight, std=std)
        self.positions = nn.Parameter(sincos_positions((1, context), dim))

    def _check(self, tokens: Tensor) -> None:
        name, most = self.called or type(self).__name__, len(self.positions)
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"{name}: tokens must be int64 [B, N], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > most:
            raise ValueError(f"{name}: tokens must have at most {most} a row, got {tokens.shape[1]}")

    def _embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, N] -> [B, N, D]."""
        self._check(tokens)
        return self.embed(tokens) + self.positions[: tokens.shape[1]]
