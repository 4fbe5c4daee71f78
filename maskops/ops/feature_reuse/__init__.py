"""The family feature_reuse: caches of keys and values for masked generation, and the choice of what is decoded next.

Size letters: B rows, H heads, N tokens of a row, U local tokens, D channels of a head, V vocabulary.
"""

from maskops.ops.feature_reuse.attention import cached_attention
from maskops.ops.feature_reuse.cache import CacheView, ContextCache
from maskops.ops.feature_reuse.drift import refresh_tokens_, token_drift
from maskops.ops.feature_reuse.schedule import mask_schedule
from maskops.ops.feature_reuse.select import Selection, confidence_select, select_tokens

__all__ = [
    "CacheView",
    "ContextCache",
    "Selection",
    "cached_attention",
    "confidence_select",
    "mask_schedule",
    "refresh_tokens_",
    "select_tokens",
    "token_drift",
]
