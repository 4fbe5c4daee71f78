"""What models of text share when they are pre-trained on bytes by maskops.train: sizes and ids."""

from __future__ import annotations

from typing import Any, ClassVar

from maskops.models.sizes import fields_of

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
