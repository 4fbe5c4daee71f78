"""Calls of the family nm_matmul that must fail; each spoils the first sample of its op."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample
from maskops.testing.nm_matmul.samples import (
    BITMASK,
    BITMASK_BACKWARD,
    COMPRESS,
    DECOMPRESS,
    LINEAR,
    LINEAR_BACKWARD,
    MASK,
    PACK,
    SELECT,
    SOFT,
    SOFT_BACKWARD,
)


def _with(index: int, change: Callable) -> Callable:
    return lambda *args: (*args[:index], change(args[index]), *args[index + 1 :])


def _pattern(first: int, n: int, m: int) -> Callable:
    return lambda *args: (*args[:first], n, m, *args[first + 2 :])


def _too_full(weight: Tensor) -> Tensor:
    weight = torch.zeros_like(weight)
    weight[2, 8:12] = torch.tensor([1.5, -2.0, 0.0, 1e-6])
    weight[4, :4] = 1
    return weight


def _no_bits(bits: Tensor) -> Tensor:
    return bits[:, :, :-1]


PATTERN = "n and m must satisfy 1 <= n < m <= 32, got"
ERRORS = [
    *(
        ErrorSample(op, name, _pattern(first, n, m), ValueError, rf"{PATTERN} \({n}, {m}\)")
        for op, first in ((MASK, 1), (COMPRESS, 1), (DECOMPRESS, 2), (SELECT, 2), (LINEAR, 4), (SOFT, 4))
        for name, n, m in (("n_zero", 0, 4), ("n_is_m", 4, 4), ("m_large", 2, 33))
    ),
    ErrorSample(MASK, "dtype", _with(0, Tensor.long), ValueError, "nm_mask: scores must be float32 or float64 or bfloat16"),
    ErrorSample(MASK, "rank", _with(0, lambda s: s[0]), ValueError, r"scores must have shape \[R, K\] = \[\*, \*\], got"),
    ErrorSample(COMPRESS, "dtype", _with(0, Tensor.int), ValueError, "nm_compress: weight must be float32 or float64"),
    ErrorSample(COMPRESS, "rank", _with(0, lambda w: w[None]), ValueError, r"weight must have shape \[N, K\] = \[\*, \*\]"),
    ErrorSample(COMPRESS, "full", _with(0, _too_full), ValueError, "weight.* must have at most 2 nonzeros"),
    ErrorSample(DECOMPRESS, "columns", _with(4, lambda k: k + 4), ValueError, r"values must have shape \[N, J\] = \[\*, 22\]"),
    ErrorSample(DECOMPRESS, "negative", _with(4, lambda k: -1), ValueError, "nm_decompress: K must be at least 0, got -1"),
    ErrorSample(DECOMPRESS, "dtype", _with(0, Tensor.short), ValueError, "values must be float32"),
    ErrorSample(DECOMPRESS, "indices_dtype", _with(1, Tensor.long), ValueError, r"indices must be uint8 \[N, ceil\(J bits / 8\)\]"),
    ErrorSample(DECOMPRESS, "indices", _with(1, lambda i: i[:, 1:]), ValueError, "indices must have shape"),
    ErrorSample(DECOMPRESS, "rows", _with(1, lambda i: i[1:]), ValueError, "indices must have shape"),
    ErrorSample(SELECT, "dtype", _with(0, Tensor.long), ValueError, "nm_select: dense must be float32"),
    ErrorSample(SELECT, "rank", _with(0, lambda d: d[0]), ValueError, r"dense must have shape \[N, K\]"),
    ErrorSample(SELECT, "rows", _with(1, lambda i: i[1:]), ValueError, "indices must have shape"),
    ErrorSample(LINEAR, "x_dtype", _with(0, Tensor.long), ValueError, "nm_linear: x must be float32"),
    ErrorSample(LINEAR, "x_rank", _with(0, lambda x: x[None]), ValueError, r"x must have shape \[M, K\]"),
    ErrorSample(LINEAR, "x_columns", _with(0, lambda x: x[:, :9]), ValueError, r"values must have shape \[N, J\] = \[\*, 6\]"),
    ErrorSample(LINEAR, "values_dtype", _with(1, Tensor.double), ValueError, r"values must be float32 \[N, J\], got float64"),
    ErrorSample(LINEAR, "indices_dtype", _with(2, Tensor.int), ValueError, "indices must be uint8"),
    ErrorSample(LINEAR, "indices", _with(2, lambda i: i[:, :-1]), ValueError, "indices must have shape"),
    ErrorSample(LINEAR, "bias", _with(3, lambda b: b[1:]), ValueError, r"bias must have shape \[N\] = \[8\]"),
    ErrorSample(LINEAR, "bias_dtype", _with(3, Tensor.half), ValueError, "bias must be float32"),
    ErrorSample(LINEAR_BACKWARD, "grad", _with(0, lambda g: g[1:]), ValueError, r"grad must have shape \[M, N\] = \[5, 8\]"),
    ErrorSample(PACK, "dtype", _with(0, Tensor.float), ValueError, r"pack_bitmask: mask must be bool \[R, K\], got float32"),
    ErrorSample(PACK, "rank", _with(0, lambda m: m[0]), ValueError, r"mask must have shape \[R, K\]"),
    ErrorSample(BITMASK, "x_rank", _with(0, lambda x: x[0]), ValueError, r"bitmask_linear: x must have shape \[S, M, K\]"),
    ErrorSample(BITMASK, "x_columns", _with(0, lambda x: x[..., 1:]), ValueError, r"weight must have shape \[N, K\] = \[\*, 39\]"),
    ErrorSample(BITMASK, "weight_dtype", _with(1, Tensor.double), ValueError, "weight must be float32"),
    ErrorSample(BITMASK, "bits_dtype", _with(2, Tensor.bool), ValueError, "bitmask must be uint8"),
    ErrorSample(BITMASK, "bits", _with(2, _no_bits), ValueError, r"bitmask must have shape \[1 or S, N, ceil\(K / 8\)\]"),
    ErrorSample(BITMASK, "masks", _with(2, lambda b: b.repeat(3, 1, 1)), ValueError, "bitmask must have 1 or S = 1 masks, got"),
    ErrorSample(BITMASK, "bias", _with(3, lambda b: b[1:]), ValueError, r"bias must have shape \[N\] = \[7\]"),
    ErrorSample(
        BITMASK, "scores", lambda x, w, b, i, s: (x, w, b, i, w[1:]), ValueError, r"scores must have shape \[N, K\] = \[7, 40\]"
    ),
    ErrorSample(
        BITMASK, "scores_3", lambda x, w, b, i, s: (x, w, b, i, w.expand(2, 7, 40)), ValueError, r"scores must have .*\[S, N, K\]"
    ),
    ErrorSample(BITMASK, "scores_dtype", lambda x, w, b, i, s: (x, w, b, i, w.int()), ValueError, "scores must be float32 or"),
    ErrorSample(BITMASK_BACKWARD, "grad", _with(0, lambda g: g[:, 1:]), ValueError, r"grad must have shape \[S, M, N\]"),
    ErrorSample(SOFT, "x_rank", _with(0, lambda x: x[0]), ValueError, r"nm_soft_linear: x must have shape \[M, K\]"),
    ErrorSample(SOFT, "weight", _with(1, lambda w: w[:, 1:]), ValueError, r"weight must have shape \[N, K\] = \[\*, 24\]"),
    ErrorSample(SOFT, "weight_dtype", _with(1, Tensor.double), ValueError, "weight must be float32"),
    ErrorSample(SOFT, "divisible", _pattern(4, 2, 5), ValueError, "weight must have K divisible by m = 5, got float32"),
    ErrorSample(SOFT, "logits", _with(2, lambda l: l[..., 1:]), ValueError, r"logits must have shape \[N, G, P\] = \[6, 6, 6\]"),
    ErrorSample(SOFT, "logits_2", _with(2, lambda l: l[0]), ValueError, r"logits must have shape \[N, K\] = \[6, 24\]"),
    ErrorSample(SOFT, "logits_dtype", _with(2, Tensor.half), ValueError, r"logits must be float32 \[N, G, P\], got float16"),
    ErrorSample(SOFT, "patterns", _pattern(4, 6, 12), ValueError, r"n and m must have at most 128 patterns for logits.*, got 924"),
    ErrorSample(SOFT, "seed", _with(3, lambda s: s[0]), ValueError, r"seed must have shape \[2\]"),
    ErrorSample(SOFT, "seed_dtype", _with(3, Tensor.int), ValueError, r"seed must be int64 \[2\]"),
    ErrorSample(SOFT, "tau", _with(6, lambda t: 0.0), ValueError, "tau must be above 0, got 0"),
    ErrorSample(SOFT_BACKWARD, "grad", _with(0, lambda g: g[1:]), ValueError, r"grad must have shape \[M, N\] = \[5, 6\]"),
    ErrorSample(SOFT_BACKWARD, "grad_kept", _with(1, lambda g: g[None]), ValueError, r"grad_kept must have shape \[\] = \[\]"),
]  # fmt: skip
