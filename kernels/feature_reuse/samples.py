"""Calls that reach every kernel of feature_reuse in every launch configuration, as data: op -> argument lists."""

import torch
from maskops.kernels._common import Arg

B, H, N, U = 8, 12, 257, 33


def _attention(channels):
    local, cached = Arg("float", (B, H, U, channels)), Arg("float", (B, H, N, channels))
    return local, local, local, cached, cached, Arg("bool", (B, N)), Arg("int64", (B, U)), channels**-0.5


def _sample(values, temperature, noise, probs):
    return Arg("float", (B, N, values)), Arg("bool", (B, N)), Arg("int64", (2,)), 0, temperature, noise, probs


def _write():
    local, cached = Arg("float", (B, H, U, 64)), Arg("float", (B, H, N, 64))
    return cached, cached, Arg("bool", (B, N)), local, local, Arg("int64", (B, U))


SCORE, KNOWN = Arg("float", (B, N)), Arg("bool", (B, N))
AOT_SAMPLES = {
    "feature_reuse_attention": tuple(_attention(c) for c in (32, 64, 72, 128, 256)),
    "feature_reuse_write_": (_write(),),
    "feature_reuse_exclude": ((Arg("bool", (24, B, N)), Arg("int64", (B, U))),),
    "feature_reuse_sample": tuple(
        _sample(values, temperature, noise, probs)
        for values in (1024, 32000)
        for temperature, noise, probs in ((1.0, 4.5, False), (0.0, 0.0, False), (1.0, 0.0, True), (0.7, 0.0, False))
    ),
    "feature_reuse_rank": ((SCORE, KNOWN, Arg("int64", (B,)), float("-inf")), (SCORE, KNOWN, None, -0.1)),
    "feature_reuse_drift": tuple((Arg("float", (B, N, 768)), Arg("float", (B, N, 768)), kind) for kind in (0, 1)),
}

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {
    "feature_reuse_attention": {"dtypes": _FLOATS, "reason": "D is at most 256"},
    "feature_reuse_write_": {"dtypes": _FLOATS, "reason": ""},
    "feature_reuse_exclude": {"dtypes": (), "reason": "takes no floating tensor"},
    "feature_reuse_sample": {"dtypes": _FLOATS, "reason": ""},
    "feature_reuse_rank": {"dtypes": (torch.float32, torch.float64), "reason": "scores of 16 bits would tie too often"},
    "feature_reuse_drift": {"dtypes": _FLOATS, "reason": ""},
}
