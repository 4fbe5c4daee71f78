"""Calls that reach every kernel of masked_attention in every launch configuration, as data: op -> argument lists."""

import torch
from maskops.kernels._common import Arg
from maskops.kernels.masked_attention.tiles import CHANNELS

B, H, L = 2, 8, 2048
ALL = ("bias", "dropout", "entropy")


def _attention(backward, channels, heads=H, masked=True, extras=(), keys=L, bias=(1, H, L)):
    x, y = Arg("float", (B, H, L, channels)), Arg("float", (B, heads, keys, channels))
    mask = (Arg("int32", (1, 1, L // 64, -(-keys // 64))), Arg("int64", (100, 64))) if masked else (None, None)
    rows, entropy = Arg("accumulator", (B, H, L)), Arg("accumulator", (B, H, L if "entropy" in extras else 0))
    before, after = ((x, rows, entropy), (x, rows, entropy)) if backward else ((), ())
    added = Arg("float", (*bias, keys)) if "bias" in extras else None
    seed, dropout_p = (Arg("int64", (2,)), 0.1) if "dropout" in extras else (None, 0.0)
    flag = () if backward else ("entropy" in extras,)
    return (*before, x, y, y, *after, *mask, added, seed, channels**-0.5, dropout_p, *flag)


def _samples(backward):
    # Every width of a tile under a mask, which compiles the careful kernels too; one without a mask; shared keys, odd lengths.
    calls = [{"channels": c} for c in CHANNELS]
    calls += [{"channels": 64, "heads": 2, "masked": False}, {"channels": 250, "heads": 2, "keys": 2001}]
    # The most registers with all of bias, dropout and entropy, and two of them alone; a bias with rows of odd length.
    calls += [{"channels": c, "extras": ALL} for c in CHANNELS]
    calls += [{"channels": c, "heads": 2, "extras": ALL, "keys": 2001} for c in (40, 128, 250)]
    calls += [{"channels": 64, "extras": (one,)} for one in ("bias", "dropout")]
    return tuple(_attention(backward, **call) for call in calls)


def _bias_samples():
    calls = [{"channels": c, "extras": ALL} for c in CHANNELS]
    calls += [{"channels": 40, "heads": 2, "extras": ALL, "keys": 2001}]
    calls += [{"channels": 64, "extras": ("bias",), "masked": False, "bias": bias} for bias in ((1, H, L), (B, 1, 1))]
    return tuple(_attention(True, **call) for call in calls)


BAND = (6, -(1 << 30), 0, 0, 0, 0, 0, 0)
AOT_SAMPLES = {
    "masked_attention": _samples(backward=False),
    "_masked_attention_backward": _samples(backward=True),
    "_masked_attention_grad_bias": _bias_samples(),
    "masked_attention_map": ((Arg("int32", (100,)), Arg("uint8", (100,)), BAND, B, H, L, L),),
}

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {
    "masked_attention": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "_masked_attention_backward": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "_masked_attention_grad_bias": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "masked_attention_map": {"dtypes": (), "reason": "takes no floating tensor"},
}
