"""Triton kernels of visible_tokens; one launcher per op, with the op's name and arguments."""

from maskops.kernels.visible_tokens.embed import _visible_tokens_embed_backward, visible_tokens_embed
from maskops.kernels.visible_tokens.index import visible_tokens_split
from maskops.kernels.visible_tokens.patches import visible_tokens_patchify, visible_tokens_unpatchify
from maskops.kernels.visible_tokens.rows import (
    _visible_tokens_gather_backward,
    _visible_tokens_restore_backward,
    _visible_tokens_unpack_backward,
    visible_tokens_gather,
    visible_tokens_pack,
    visible_tokens_restore,
    visible_tokens_unpack,
)
from maskops.kernels.visible_tokens.samples import AOT_SAMPLES, LIMITS

__all__ = [
    "AOT_SAMPLES",
    "LIMITS",
    "_visible_tokens_embed_backward",
    "_visible_tokens_gather_backward",
    "_visible_tokens_restore_backward",
    "_visible_tokens_unpack_backward",
    "visible_tokens_embed",
    "visible_tokens_gather",
    "visible_tokens_pack",
    "visible_tokens_patchify",
    "visible_tokens_restore",
    "visible_tokens_split",
    "visible_tokens_unpack",
    "visible_tokens_unpatchify",
]
