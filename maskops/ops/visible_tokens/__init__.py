"""The family visible_tokens: find, gather, restore, pack, cut out and embed the tokens that a mask leaves visible.

Size letters: B batch, N tokens, K kept slots, M masked slots, P prefix tokens (such as a class token), D channels, E embedding
width, C image channels, V values per patch.
"""

from maskops.ops.visible_tokens.gather import gather_tokens, restore_tokens
from maskops.ops.visible_tokens.pack import pack_tokens, unpack_tokens
from maskops.ops.visible_tokens.patches import embed_patches, patchify, unpatchify
from maskops.ops.visible_tokens.split import TokenSplit, split_tokens

__all__ = [
    "TokenSplit", "embed_patches", "gather_tokens", "pack_tokens", "patchify", "restore_tokens", "split_tokens",
    "unpack_tokens", "unpatchify",
]  # fmt: skip
