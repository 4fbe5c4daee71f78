"""Calls that reach every kernel of masked_attention in every launch configuration, as data: op -> argument lists."""

import torch
from maskops.kernels._common import Arg
from maskops.kernels.masked_attention.tiles import CHANNELS

B, H, L = 2, 8, 2048


def _attention(channels, heads, masked, backward):
    x, y = Arg("float", (B, H, L, channels)), Arg("float", (B, heads, L, channels))
    mask = (Arg("int32", (1, 1, L // 64, L // 64)), Arg("int64", (100, 64))) if masked else (None, None)
    rows = Arg("accumulator", (B, H, L))
    before, after = ((x, rows), (x, rows)) if backward else ((), ())
    return (*before, x, y, y, *after, *mask, channels**-0.5)


def _samples(backward):
    # Every width of a tile under a mask, which compiles the careful kernels too; one without a mask; rows of odd lengths.
    calls = [_attention(channels, H, True, backward) for channels in CHANNELS]
    return (*calls, _attention(64, 2, False, backward), *(_attention(c, 2, True, backward) for c in (40, 250)))


BAND = (6, -(1 << 30), 0, 0, 0, 0, 0, 0)
AOT_SAMPLES = {
    "masked_attention": _samples(backward=False),
    "_masked_attention_backward": _samples(backward=True),
    "masked_attention_map": ((Arg("int32", (100,)), Arg("uint8", (100,)), BAND, B, H, L, L),),
}

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {
    "masked_attention": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "_masked_attention_backward": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "masked_attention_map": {"dtypes": (), "reason": "takes no floating tensor"},
}
