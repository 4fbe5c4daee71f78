"""The family masked_attention: attention under masks that are data, tile by tile, empty tiles skipped.

Size letters: B batch, H heads, G heads of keys and values, L or Lq queries, S or Lk keys, D channels, P partial tiles.
"""

from maskops.ops.masked_attention.attention import masked_attention, merge_attention
from maskops.ops.masked_attention.mask import AttentionMask, BlockMap

__all__ = ["AttentionMask", "BlockMap", "masked_attention", "merge_attention"]
