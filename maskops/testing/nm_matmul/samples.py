"""Samples of the family nm_matmul, kept small: Triton's interpreter and the emulator run them too."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import nm_matmul as reference
from maskops.reference.visible_tokens import accumulation_dtype
from maskops.testing import Sample, is_float, randn

G = torch.Generator
MASK, COMPRESS, DECOMPRESS, SELECT = (f"nm_matmul_{verb}" for verb in ("mask", "compress", "decompress", "select"))
LINEAR, LINEAR_BACKWARD = "nm_matmul_linear", "_nm_matmul_linear_backward"
PACK, BITMASK, BITMASK_BACKWARD = "nm_matmul_pack", "nm_matmul_bitmask", "_nm_matmul_bitmask_backward"
SOFT, SOFT_BACKWARD = "nm_matmul_soft", "_nm_matmul_soft_backward"


def same(x: Tensor) -> Tensor:
    return x


def wide_rows(x: Tensor) -> Tensor:
    """The same values as a view whose rows lie further apart than they are long, with poison between them."""
    storage = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan if is_float(x) else 1)
    storage[..., 2:-1] = x
    return storage[..., 2:-1]


def transposed(x: Tensor) -> Tensor:
    """The same values, the last two axes exchanged in memory."""
    return x.mT.contiguous().mT


def nm_weight(g: G, dtype: torch.dtype, outputs: int, inputs: int, n: int, m: int) -> Tensor:
    """A random weight [N, K] that keeps n of m; some groups keep less."""
    weight = randn(g, dtype, outputs, inputs)
    kept = reference.nm_matmul_mask(randn(g, torch.float32, outputs, inputs), n, m)
    kept &= torch.rand(outputs, inputs, generator=g) < 0.95
    return torch.where(kept, weight, 0)


# ---------------------------------------------------------------- masks and compressed weights

# Rows, K, n, m: the first is the plain case, the others are tails, straddling bits, few or many places, and empty axes.
WEIGHTS = {
    "2:4": (6, 40, 2, 4), "1:4": (5, 21, 1, 4), "2:8": (9, 48, 2, 8), "4:8": (3, 150, 4, 8), "3:5": (7, 43, 3, 5),
    "1:2": (4, 9, 1, 2), "3:4": (3, 32, 3, 4), "7:32": (3, 71, 7, 32), "31:32": (2, 40, 31, 32), "narrow": (4, 2, 3, 8),
    "one": (1, 1, 1, 2), "large": (70, 160, 2, 4), "no_rows": (0, 8, 2, 4), "no_columns": (3, 0, 2, 4),
}  # fmt: skip


def _mask(R: int, K: int, n: int, m: int, change: Callable = same) -> Callable:
    return lambda dtype, g: (change(randn(g, dtype, R, K)), n, m)


def _mask_ties(n: int, m: int) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        scores = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
        return scores[torch.randint(7, (40, 29), generator=g)].to(dtype), n, m

    return make


def slow_on(name: str) -> tuple[str, ...]:
    return ("triton",) if "large" in name else ()


def _compress(N: int, K: int, n: int, m: int, change: Callable = same) -> Callable:
    return lambda dtype, g: (change(nm_weight(g, dtype, N, K, n, m)), n, m)


def _compress_special(dtype: torch.dtype, g: G) -> tuple:
    rows = [
        [math.nan, 0, 0, 0],
        [-0.0, 0, 3, -0.0],
        [0] * 4,
        [0, math.inf, 0, -math.inf],
        [0, 0, 0, 1],
        [0, 0, 1, 1e-6],
    ]
    return torch.tensor(rows).to(dtype), 2, 4


def _decompress(N: int, K: int, n: int, m: int, change: Callable = same) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        values, indices = reference.nm_matmul_compress(nm_weight(g, dtype, N, K, n, m), n, m)
        return change(values), change(indices), n, m, K

    return make


def _select(N: int, K: int, n: int, m: int, change: Callable = same) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        values, indices = reference.nm_matmul_compress(nm_weight(g, dtype, N, K, n, m), n, m)
        kept = reference.nm_matmul_decompress(torch.ones_like(values), indices, n, m, K)
        dense = torch.where(kept == 1, randn(g, dtype, N, K), math.nan)  # nothing else may be read
        return change(dense), change(indices), n, m

    return make


def _pack(R: int, K: int, share: float, change: Callable = same) -> Callable:
    return lambda dtype, g: (change(torch.rand(R, K, generator=g) < share),)


STORAGE_SAMPLES = [
    *(Sample(MASK, name, _mask(*size)) for name, size in WEIGHTS.items()),
    *(Sample(MASK, f"ties_{n}:{m}", _mask_ties(n, m)) for n, m in ((2, 4), (3, 8), (2, 5), (9, 32))),
    Sample(MASK, "transposed", _mask(6, 22, 2, 4, transposed)),
    Sample(MASK, "wide_rows", _mask(6, 24, 2, 4, wide_rows)),
    *(Sample(COMPRESS, name, _compress(*size)) for name, size in WEIGHTS.items()),
    Sample(COMPRESS, "special", _compress_special),
    Sample(COMPRESS, "transposed", _compress(6, 23, 2, 4, transposed)),
    Sample(COMPRESS, "wide_rows", _compress(6, 24, 2, 4, wide_rows)),
    *(Sample(DECOMPRESS, name, _decompress(*size)) for name, size in WEIGHTS.items()),
    Sample(DECOMPRESS, "transposed", _decompress(6, 43, 3, 5, transposed)),
    Sample(DECOMPRESS, "wide_rows", _decompress(6, 40, 2, 4, wide_rows)),
    *(Sample(SELECT, name, _select(*size)) for name, size in WEIGHTS.items()),
    Sample(SELECT, "transposed", _select(6, 43, 3, 5, transposed)),
    Sample(SELECT, "wide_rows", _select(6, 40, 2, 4, wide_rows)),
    *(Sample(PACK, f"{R}x{K}", _pack(R, K, 0.5)) for R, K in ((5, 40), (3, 1), (2, 7), (4, 8), (3, 67), (0, 9), (4, 0), (30, 257))),
    Sample(PACK, "all", _pack(3, 13, 2.0)),
    Sample(PACK, "none", _pack(3, 13, -1.0)),
    Sample(PACK, "transposed", _pack(9, 21, 0.5, transposed)),
    Sample(PACK, "wide_rows", _pack(9, 21, 0.5, wide_rows)),
]  # fmt: skip


# ---------------------------------------------------------------- product with a compressed weight

# M, N, K, n, m
LINEARS = {
    "2:4": (5, 8, 40, 2, 4), "one_row": (1, 24, 64, 2, 4), "1:4": (17, 9, 30, 1, 4), "2:8": (33, 7, 48, 2, 8),
    "4:8": (4, 18, 50, 4, 8), "3:5": (3, 11, 43, 3, 5), "1:2": (2, 5, 9, 1, 2), "7:32": (6, 4, 71, 7, 32),
    "one_row_tail": (1, 5, 75, 3, 5), "large": (70, 96, 160, 2, 4), "large_4:8": (37, 65, 131, 4, 8), "no_rows": (0, 4, 8, 2, 4),
    "no_outputs": (3, 0, 8, 2, 4), "no_inputs": (3, 4, 0, 2, 4), "last_alone": (7, 65, 65, 2, 4),
}  # fmt: skip


def _linear(M: int, N: int, K: int, n: int, m: int, *, bias: bool = True, change: Callable = same) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        values, indices = reference.nm_matmul_compress(nm_weight(g, dtype, N, K, n, m), n, m)
        x = randn(g, dtype, M, K)
        return change(x), change(values), change(indices), randn(g, dtype, N) if bias else None, n, m

    return make


def _linear_hidden_nan(M: int) -> Callable:
    """NaN in a column of x that no output keeps a weight for."""

    def make(dtype: torch.dtype, g: G) -> tuple:
        weight = nm_weight(g, dtype, 6, 24, 2, 4)
        weight[:, 8:12] = torch.tensor([1.0, 0.0, 2.0, 0.0])
        x = randn(g, dtype, M, 24)
        x[:, 9], x[-1, 11] = math.nan, math.nan
        return x, *reference.nm_matmul_compress(weight, 2, 4), randn(g, dtype, 6), 2, 4

    return make


def _linear_backward(forward: Callable, need_x: bool = True, need_values: bool = True) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, values, indices, _, n, m = forward(dtype, g)
        return randn(g, dtype, x.shape[0], values.shape[0]), x, values, indices, n, m, need_x, need_values

    return make


LINEAR_SAMPLES = [
    *(Sample(LINEAR, name, _linear(*size), slow_on(name)) for name, size in LINEARS.items()),
    Sample(LINEAR, "no_bias", _linear(3, 5, 16, 2, 4, bias=False)),
    Sample(LINEAR, "transposed", _linear(6, 7, 40, 2, 4, change=transposed)),
    Sample(LINEAR, "wide_rows", _linear(6, 7, 40, 3, 5, change=wide_rows)),
    Sample(LINEAR, "hidden_nan", _linear_hidden_nan(5)),
    Sample(LINEAR, "hidden_nan_one_row", _linear_hidden_nan(1)),
    *(
        Sample(LINEAR_BACKWARD, name, _linear_backward(_linear(*LINEARS[name])))
        for name in ("2:4", "3:5", "7:32", "no_rows", "last_alone")
    ),
    Sample(LINEAR_BACKWARD, "only_x", _linear_backward(_linear(4, 5, 24, 2, 4), need_values=False)),
    Sample(LINEAR_BACKWARD, "only_values", _linear_backward(_linear(4, 5, 24, 2, 4), need_x=False)),
    Sample(LINEAR_BACKWARD, "wide_rows", _linear_backward(_linear(4, 5, 24, 2, 4, change=wide_rows))),
    Sample(LINEAR_BACKWARD, "hidden_nan", _linear_backward(_linear_hidden_nan(5))),
]


# ---------------------------------------------------------------- product with a bit-packed mask


def _bitmask(
    S: int, M: int, N: int, K: int, *, per_sample: bool = False, scores: int = 0, bias: bool = True, share: float = 0.5,
    hidden_nan: bool = False, change: Callable = same,
) -> Callable:  # fmt: skip
    """scores: 0 none, 2 [N, K], 3 [S, N, K]."""

    def make(dtype: torch.dtype, g: G) -> tuple:
        mask = torch.rand(S if per_sample else 1, N, K, generator=g) < share
        bits = reference.pack_bits(mask.flatten(0, 1))
        weight = randn(g, dtype, N, K)
        if hidden_nan:
            weight = torch.where(mask.any(0), weight, math.nan)
        # The values of the scores are never read.
        wanted = {0: None, 2: torch.full((N, K), math.nan), 3: torch.full((S, N, K), math.nan)}[scores]
        x = change(randn(g, dtype, S, M, K))
        bits = change(bits.view(*mask.shape[:2], bits.shape[1]))
        return (
            x,
            change(weight),
            bits,
            randn(g, dtype, N) if bias else None,
            None if wanted is None else wanted.to(dtype),
        )

    return make


def _bitmask_backward(forward: Callable, *need: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, bits, _, scores = forward(dtype, g)
        per_sample = scores is not None and scores.dim() == 3
        needs = need or (True, True, scores is not None)
        return randn(g, dtype, *x.shape[:2], weight.shape[0]), x, weight, bits, *needs, per_sample

    return make


# S, M, N, K
BITMASKS = {
    "shared": _bitmask(1, 5, 7, 40),
    "shared_by_samples": _bitmask(3, 5, 7, 21),
    "per_sample": _bitmask(3, 5, 9, 67, per_sample=True),
    "one_row": _bitmask(1, 1, 24, 80),
    "one_row_per_sample": _bitmask(4, 1, 9, 43, per_sample=True),
    "rows_17": _bitmask(1, 17, 5, 13),
    "rows_33": _bitmask(2, 33, 5, 8, per_sample=True),
    "large": _bitmask(1, 70, 96, 160),
    "large_per_sample": _bitmask(2, 37, 65, 131, per_sample=True),
    "no_bias": _bitmask(2, 3, 4, 16, bias=False),
    "all": _bitmask(1, 4, 5, 19, share=2.0),
    "none": _bitmask(2, 4, 5, 19, per_sample=True, share=-1.0),
    "hidden_nan": _bitmask(1, 6, 7, 30, hidden_nan=True),
    "hidden_nan_one_row": _bitmask(1, 1, 7, 30, hidden_nan=True),
    "hidden_nan_per_sample": _bitmask(3, 4, 7, 30, per_sample=True, share=0.2, hidden_nan=True),
    "transposed": _bitmask(2, 5, 6, 29, per_sample=True, change=transposed),
    "wide_rows": _bitmask(2, 5, 6, 29, change=wide_rows),
    "no_samples": _bitmask(0, 4, 5, 9, per_sample=True),
    "no_rows": _bitmask(2, 0, 5, 9),
    "no_outputs": _bitmask(2, 3, 0, 9),
    "no_inputs": _bitmask(2, 3, 4, 0),
    "straight_through": _bitmask(1, 5, 7, 21, scores=2),
    "straight_through_samples": _bitmask(3, 5, 7, 21, scores=2, per_sample=True),
    "straight_through_per_sample": _bitmask(3, 5, 7, 21, scores=3, per_sample=True),
    "straight_through_shared_mask": _bitmask(3, 5, 7, 21, scores=3),
    "straight_through_hidden_nan": _bitmask(2, 5, 7, 21, scores=2, hidden_nan=True),
    "straight_through_no_samples": _bitmask(0, 4, 5, 9, scores=2),
}
BITMASK_SAMPLES = [
    *(Sample(BITMASK, name, make, slow_on(name)) for name, make in BITMASKS.items()),
    *(
        Sample(BITMASK_BACKWARD, name, _bitmask_backward(BITMASKS[name]))
        for name in ("per_sample", "shared", "no_rows", *(name for name in BITMASKS if "straight" in name))
    ),
    Sample(BITMASK_BACKWARD, "only_x", _bitmask_backward(BITMASKS["per_sample"], True, False, False)),
    Sample(BITMASK_BACKWARD, "only_weight", _bitmask_backward(BITMASKS["per_sample"], False, True, False)),
    Sample(BITMASK_BACKWARD, "only_scores", _bitmask_backward(BITMASKS["straight_through"], False, False, True)),
    Sample(BITMASK_BACKWARD, "wide_rows", _bitmask_backward(BITMASKS["wide_rows"])),
]


# ---------------------------------------------------------------- product with a learnable mask


def _soft(
    M: int, N: int, K: int, n: int, m: int, *, exact: bool, hard: bool = False, tau: float = 0.7, scale: float = 1.3,
    change: Callable = same,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        size = (N, K // m, math.comb(m, n)) if exact else (N, K)
        logits = randn(g, accumulation_dtype(dtype), *size)
        seed = torch.tensor([-(2**63) + 12345, 2**40 + 7])
        x, weight = randn(g, dtype, M, K), randn(g, dtype, N, K)
        return change(x), change(weight), change(logits), seed, n, m, tau, scale, hard

    return make


def _soft_backward(forward: Callable, need_x: bool = True, need_logits: bool = True) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        x, weight, *rest = forward(dtype, g)
        grad = randn(g, dtype, x.shape[0], weight.shape[0])
        return grad, randn(g, accumulation_dtype(dtype)), x, weight, *rest, need_x, need_logits

    return make


SOFTS = {
    "exact_2:4": _soft(5, 6, 24, 2, 4, exact=True),
    "exact_1:4": _soft(1, 7, 20, 1, 4, exact=True, tau=2.0, scale=0.5),
    "exact_2:8": _soft(17, 5, 16, 2, 8, exact=True),
    "exact_4:8": _soft(3, 4, 16, 4, 8, exact=True),
    "exact_3:5": _soft(33, 3, 15, 3, 5, exact=True),
    "exact_1:2": _soft(4, 3, 10, 1, 2, exact=True),
    "exact_large": _soft(37, 66, 72, 2, 4, exact=True),
    "exact_transposed": _soft(4, 5, 12, 2, 4, exact=True, change=transposed),
    "exact_wide_rows": _soft(4, 5, 12, 2, 4, exact=True, change=wide_rows),
    "exact_no_rows": _soft(0, 3, 8, 2, 4, exact=True),
    "exact_no_outputs": _soft(3, 0, 8, 2, 4, exact=True),
    "exact_no_inputs": _soft(3, 4, 0, 2, 4, exact=True),
    "exact_hard_2:4": _soft(5, 6, 24, 2, 4, exact=True, hard=True),
    "exact_hard_3:5": _soft(1, 4, 35, 3, 5, exact=True, hard=True),
    "linear_2:4": _soft(5, 6, 24, 2, 4, exact=False),
    "linear_1:4": _soft(1, 7, 20, 1, 4, exact=False, tau=2.0, scale=0.5),
    "linear_4:8": _soft(17, 5, 16, 4, 8, exact=False),
    "linear_3:5": _soft(33, 3, 15, 3, 5, exact=False),
    "linear_1:2": _soft(4, 3, 10, 1, 2, exact=False),
    "linear_7:32": _soft(3, 4, 64, 7, 32, exact=False, tau=1.5),
    "linear_large": _soft(37, 66, 72, 2, 4, exact=False),
    "linear_transposed": _soft(4, 5, 12, 2, 4, exact=False, change=transposed),
    "linear_wide_rows": _soft(4, 5, 12, 2, 4, exact=False, change=wide_rows),
    "linear_no_rows": _soft(0, 3, 8, 2, 4, exact=False),
    "linear_no_outputs": _soft(3, 0, 8, 2, 4, exact=False),
    "linear_no_inputs": _soft(3, 4, 0, 2, 4, exact=False),
    "linear_hard_2:4": _soft(5, 6, 24, 2, 4, exact=False, hard=True),
    "linear_hard_7:32": _soft(1, 4, 64, 7, 32, exact=False, hard=True, tau=1.5),
}
SOFT_SAMPLES = [
    *(Sample(SOFT, name, make, slow_on(name)) for name, make in SOFTS.items()),
    *(
        Sample(SOFT_BACKWARD, name, _soft_backward(SOFTS[name]))
        for name in ("exact_2:4", "exact_hard_3:5", "exact_no_rows", "linear_3:5", "linear_hard_7:32")
    ),
    Sample(SOFT_BACKWARD, "only_x", _soft_backward(SOFTS["exact_2:4"], need_logits=False)),
    Sample(SOFT_BACKWARD, "only_logits", _soft_backward(SOFTS["linear_2:4"], need_x=False)),
]

SAMPLES = STORAGE_SAMPLES + LINEAR_SAMPLES + BITMASK_SAMPLES + SOFT_SAMPLES
