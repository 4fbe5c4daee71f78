"""Calls that reach every kernel of nm_matmul in every launch configuration, as data: op -> argument lists.

scripts/gpu_check.py runs the launchers on meta tensors of these shapes, records what they would launch and compiles it.
"""

import math

import torch
from maskops.kernels._common import Arg, cdiv
from maskops.kernels.nm_matmul.compress import row_bytes_of

# One or several bytes of places per group, places across bytes (8 and 24 need 3 and 5 bits), a group that is no power of
# two, and one with so many places that they are read one by one (16 of 32).
PATTERNS = ((2, 4), (1, 2), (4, 8), (3, 24), (16, 32))
# (M, N, K) per tile shape: a full device, a small layer, decoding.
SIZES = ((4096, 4096, 4096), (200, 768, 768), (4, 4096, 4096))


def _f(*shape):
    return Arg("float", shape)


def _acc(*shape):
    return Arg("accumulator", shape)


def _u8(*shape):
    return Arg("uint8", shape)


def _weight(N, K, n, m):
    slots = cdiv(K, m) * n
    return _f(N, slots), _u8(N, row_bytes_of(slots, m))


def _linear_samples(backward):
    calls = []
    for i, (n, m) in enumerate(PATTERNS):
        for M, N, K in SIZES if i == 0 else SIZES[:1]:
            if backward:
                calls.append((_f(M, N), _f(M, K), *_weight(N, K, n, m), n, m, True, True))
            else:
                for bias in (None, _f(N)) if i == 0 and M == 4096 else (_f(N),):
                    calls.append((_f(M, K), *_weight(N, K, n, m), bias, n, m))
    return tuple(calls)


def _bitmask_samples(backward):
    calls = []
    needs = ((True, True, True, True), (False, True, False, False), (False, False, True, False))
    for i, (S, M, N, K) in enumerate(((8, 512, 4096, 4096), (2, 100, 256, 768), (64, 16, 512, 768))):
        for masks in (1, S) if i == 0 else (S,):
            bits = _u8(masks, N, cdiv(K, 8))
            if backward:
                chosen = needs if i == 0 else needs[:1]
                calls += [(_f(S, M, N), _f(S, M, K), _f(N, K), bits, *need) for need in chosen]
            else:
                calls.append((_f(S, M, K), _f(N, K), bits, _f(N) if masks == 1 else None, None))
    return tuple(calls)


def _soft_samples(backward):
    calls = []
    for n, m, exact in ((2, 4, True), (2, 4, False), (1, 3, True), (4, 8, True), (4, 8, False), (5, 24, False)):
        M, N, K = 4096, 4096, 4096 // m * m
        logits = _acc(N, K // m, math.comb(m, n)) if exact else _acc(N, K)
        for hard in (False, True) if (n, m) == (2, 4) else (exact,):
            rest = (_f(M, K), _f(N, K), logits, Arg("int64", (2,)), n, m, 0.7, 100.0, hard)
            calls.append((_f(M, N), _acc(), *rest, True, True) if backward else rest)
    return tuple(calls)


AOT_SAMPLES = {
    "nm_matmul_mask": tuple((_f(4096, K), n, m) for n, m in PATTERNS[:3] for K in (4096, 100)),
    "nm_matmul_compress": tuple((_f(4096, 4096), n, m) for n, m in PATTERNS),
    "nm_matmul_decompress": tuple((*_weight(4096, 4096, n, m), n, m, 4096) for n, m in PATTERNS),
    "nm_matmul_select": tuple((_f(4096, 4096), _weight(4096, 4096, n, m)[1], n, m) for n, m in PATTERNS),
    "nm_matmul_linear": _linear_samples(backward=False),
    "_nm_matmul_linear_backward": _linear_samples(backward=True),
    "nm_matmul_pack": ((Arg("bool", (4096, 4096)),), (Arg("bool", (4096, 100)),)),
    "nm_matmul_bitmask": _bitmask_samples(backward=False),
    "_nm_matmul_bitmask_backward": _bitmask_samples(backward=True),
    "nm_matmul_soft": _soft_samples(backward=False),
    "_nm_matmul_soft_backward": _soft_samples(backward=True),
}

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {name: {"dtypes": _FLOATS, "reason": ""} for name in AOT_SAMPLES}
LIMITS["nm_matmul_pack"] = {"dtypes": (), "reason": "takes no floating tensor"}
