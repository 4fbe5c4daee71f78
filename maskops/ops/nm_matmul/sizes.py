"""Sizes and checks that the ops of nm_matmul share.

Size letters: R rows of scores, N outputs, K inputs, G = ceil(K / m) groups, J = G n kept slots per output, M rows of x, S samples,
P = C(m, n) patterns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail, integer

LARGEST_GROUP = 32
UINT8, INT64, BOOL = (torch.uint8,), (torch.int64,), (torch.bool,)


def check_pattern(op: str, n: int, m: int) -> None:
    if not 1 <= n < m <= LARGEST_GROUP:
        fail(op, "n and m", f"satisfy 1 <= n < m <= {LARGEST_GROUP}", f"({n}, {m})")


def pattern(op: str, n: object, m: object) -> tuple[int, int]:
    """n and m of a public function as two checked ints."""
    n, m = integer(op, "n", n), integer(op, "m", m)
    check_pattern(op, n, m)
    return n, m


def groups_in(K: int, m: int) -> int:
    return (K + m - 1) // m


def index_bytes(slots: int, m: int) -> int:
    """Bytes of a row of indices: ceil(J bits / 8)."""
    return (slots * (m - 1).bit_length() + 7) // 8


def mask_bytes(K: int) -> int:
    return (K + 7) // 8


def check_compressed(
    op: str, values: Tensor, indices: Tensor, n: int, m: int, K: int, dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    """values [N, J] and indices [N, ceil(J bits / 8)] of a weight with K inputs."""
    slots = groups_in(K, m) * n
    check_tensor(op, "values", values, "[N, J]", dtypes, (None, slots), like)
    check_indices(op, indices, values.shape[0], slots, m, like)


def check_indices(op: str, indices: Tensor, rows: int | None, slots: int, m: int, like: Tensor) -> None:
    check_tensor(op, "indices", indices, "[N, ceil(J bits / 8)]", UINT8, (rows, index_bytes(slots, m)), like)


def check_floats(op: str, arg: str, x: Tensor, shape: str, rank: int) -> None:
    """The first tensor of an op: any floating dtype, any sizes."""
    check_tensor(op, arg, x, shape, FLOATS, (None,) * rank, x)


def check_has_values(op: str, arg: str, x: Tensor) -> None:
    """For what looks at the values themselves."""
    if x.is_meta:
        fail(op, arg, "have values", "a tensor on meta")


def check_bias(op: str, bias: Tensor | None, outputs: int, x: Tensor) -> None:
    if bias is not None:
        check_tensor(op, "bias", bias, "[N]", (x.dtype,), (outputs,), x)


def on_rows(op: str, arg: str, x: Tensor, dim: int, call: Callable[[Tensor], Tensor]) -> Tensor:
    """call([R, K]) on a tensor of any rank whose axis `dim` is K; the result keeps the shape."""
    check_is_tensor(op, arg, x)
    if not -x.dim() <= dim < x.dim():
        fail(op, arg, f"have an axis {dim}", describe(x))
    moved = x.movedim(dim, -1)
    rows = moved.unsqueeze(0) if moved.dim() == 1 else moved.flatten(0, -2)
    return call(rows).view(moved.shape).movedim(-1, dim)


def check_last_axis(op: str, x: Tensor, K: int) -> None:
    check_is_tensor(op, "x", x)
    if x.dim() == 0 or x.shape[-1] != K:
        fail(op, "x", f"have shape [..., K] = [..., {int(K)}]", describe(x))


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
