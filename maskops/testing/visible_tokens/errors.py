"""Calls of the family visible_tokens that must fail."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops.testing import ErrorSample


def _with(index: int, change: Callable) -> Callable:
    def spoil(*args: object) -> tuple:
        return *args[:index], change(args[index]), *args[index + 1 :]

    return spoil


def _set(x: Tensor, value: int, *at: int) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def _twice(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[-1, 1] = ids[-1, 0]
    return ids


GATHER, RESTORE, PACK = "visible_tokens_gather", "visible_tokens_restore", "visible_tokens_pack"
EMBED, PATCHIFY = "visible_tokens_embed", "visible_tokens_patchify"
ERRORS = [
    ErrorSample(
        "visible_tokens_split", "mask_dtype", _with(0, Tensor.float), ValueError, "split_tokens: mask must be bool"
    ),
    ErrorSample("visible_tokens_split", "mask_rank", _with(0, lambda m: m[0]), ValueError, "mask must have shape"),
    ErrorSample("visible_tokens_split", "bound", _with(1, lambda k: 0), ValueError, "at most max_seqlen = 0, got"),
    ErrorSample(GATHER, "ids_dtype", _with(1, Tensor.int), ValueError, r"ids must be int64 \[B, K\], got int32"),
    ErrorSample(GATHER, "x_dtype", _with(0, Tensor.long), ValueError, "x must be float32 or float64 or bfloat16"),
    ErrorSample(GATHER, "x_rank", _with(0, lambda x: x[0]), ValueError, r"x must have shape \[B, N, D\]"),
    ErrorSample(GATHER, "batch", _with(1, lambda i: i[:1]), ValueError, "ids must have shape"),
    ErrorSample(
        GATHER,
        "too_large",
        _with(1, lambda i: _set(i, 99, 1, 0)),
        IndexError,
        r"ids\[1, 0\] must be in \[-1, 12\), got 99",
    ),
    ErrorSample(
        GATHER, "too_small", _with(1, lambda i: _set(i, -2, 1, 0)), IndexError, r"must be in \[-1, 12\), got -2"
    ),
    ErrorSample(
        "_visible_tokens_gather_backward", "no_tokens", _with(2, lambda n: 0), IndexError, r"must be in \[-1, 0\), got"
    ),
    ErrorSample(GATHER, "twice", _with(1, _twice), IndexError, "must be unique in its row"),
    ErrorSample(RESTORE, "no_permutation", _with(1, _twice), IndexError, "ids_restore.* must be unique in its row"),
    ErrorSample(RESTORE, "count", _with(2, lambda c: c + 99), ValueError, "num_keep.* must be in"),
    ErrorSample(RESTORE, "negative_count", _with(2, lambda c: c - 99), ValueError, "num_keep.* must be in"),
    ErrorSample(RESTORE, "fill_shape", _with(3, lambda f: f[:-1]), ValueError, "restore_tokens: fill must have shape"),
    ErrorSample(RESTORE, "fill_dtype", _with(3, Tensor.double), ValueError, "fill must be float32"),
    ErrorSample(RESTORE, "pos_shape", _with(4, lambda p: p[1:]), ValueError, "pos must have shape"),
    ErrorSample(RESTORE, "prefix", _with(5, lambda p: 99), ValueError, r"prefix must be in \[0, "),
    ErrorSample(PACK, "total", _with(3, lambda t: 0), ValueError, "cu_seqlens.* must be at most total = 0"),
    ErrorSample(PACK, "starts", _with(2, lambda s: s + 1), ValueError, "cu_seqlens.* must start at 0"),
    ErrorSample(PACK, "starts_dtype", _with(2, Tensor.long), ValueError, "cu_seqlens must be int32"),
    ErrorSample("visible_tokens_unpack", "short", _with(0, lambda p: p[:2]), ValueError, "at most total = 2"),
    ErrorSample(
        PATCHIFY,
        "patch",
        _with(2, lambda p: [5, 8]),
        ValueError,
        r"patch_size must be positive and divide .*\[16, 24\]",
    ),
    ErrorSample(PATCHIFY, "patch_zero", _with(2, lambda p: [0, 8]), ValueError, "patch_size must be positive"),
    ErrorSample(
        PATCHIFY, "patch_axes", _with(2, lambda p: [4]), ValueError, "patch_size must have one size per image axis"
    ),
    ErrorSample(PATCHIFY, "images_rank", _with(0, lambda i: i[0]), ValueError, "images must have shape"),
    ErrorSample(
        "visible_tokens_unpatchify",
        "negative",
        _with(3, lambda s: [-16, -24]),
        ValueError,
        "image_size must be at least 0",
    ),
    ErrorSample(
        "visible_tokens_unpatchify",
        "patch_overflow",  # the product of the sizes is 0 in 64 bits
        lambda p, ids, patch, size, last: (p[:, :1], ids, [2**32, 2**32], [2**32, 2**32], last),
        ValueError,
        "patch_size must have at most 2\\^40 pixels",
    ),
    ErrorSample(
        "visible_tokens_unpatchify",
        "image_overflow",
        lambda p, ids, patch, size, last: (
            p,
            torch.arange(p.shape[1]).expand(p.shape[:2]),
            patch,
            [2**33, 2**33],
            last,
        ),
        ValueError,
        "image_size must have at most 2\\^40 pixels",
    ),
    ErrorSample(
        "visible_tokens_unpatchify",
        "empty_image",
        lambda p, ids, patch, size, last: (p, torch.zeros(p.shape[:2], dtype=torch.int64), patch, [0, 24], last),
        IndexError,
        r"ids\[.*\] must be in \[-1, 0\), got 0",
    ),
    ErrorSample(
        "visible_tokens_unpatchify", "slots", _with(0, lambda p: p[:, 1:]), ValueError, "patches must have shape"
    ),
    ErrorSample(
        "visible_tokens_unpatchify", "values", _with(0, lambda p: p[:, :, 1:]), ValueError, "V divisible by 32"
    ),
    ErrorSample(EMBED, "channels", _with(1, lambda w: w[:, :2]), ValueError, "embed_patches: weight must have shape"),
    ErrorSample(EMBED, "bias", _with(2, lambda b: b[1:]), ValueError, "bias must have shape"),
    ErrorSample(EMBED, "pos", _with(4, lambda p: p[1:]), ValueError, "pos must have shape"),
    ErrorSample(EMBED, "ids", _with(3, lambda i: i + 99), IndexError, "ids.* must be in"),
    ErrorSample(EMBED, "weight_dtype", _with(1, Tensor.double), ValueError, "weight must be float32"),
]
