"""What AttentionMask's constructors accept, and the integers that they make of it."""

from typing import Any

import torch
from torch import Tensor

from maskops._checks import check_is_tensor, describe, fail, integer
from maskops.ops.masked_attention.program import FAR

CLASS = "AttentionMask"
INTEGERS = (torch.int32, torch.int64)
INT32 = torch.iinfo(torch.int32)


def check(x: Any, constructor: str, name: str, dtypes: tuple, shape: str, ranks: tuple[int, ...]) -> None:
    function = f"{CLASS}.{constructor}"
    check_is_tensor(function, name, x)
    if x.layout != torch.strided or x.is_nested:
        fail(function, name, f"be dense, {shape}", "a nested tensor" if x.is_nested else f"one of layout {x.layout}")
    if x.dtype not in dtypes or x.dim() not in ranks:
        fail(function, name, f"be {shape}", describe(x))


def check_same_device(constructor: str, first: Tensor, name: str, second: Tensor) -> None:
    if first.device != second.device:
        fail(f"{CLASS}.{constructor}", name, f"be on {first.device}", f"a tensor on {second.device}")


def size(constructor: str, name: str, value: Any, least: int = 0) -> int:
    value = integer(f"{CLASS}.{constructor}", name, value)
    if value < least:
        fail(f"{CLASS}.{constructor}", name, f"be at least {least}", value)
    return value


def near(value: int) -> int:
    """The number, no further than any position: sums of it and a position then fit."""
    return max(-FAR, min(value, FAR))


def near_tensor(x: Tensor) -> Tensor:
    """int32, a copy always: a mask does not change when the tensor that it was made of does."""
    return x.clamp(-FAR, FAR).to(torch.int32)


def readable(x: Tensor) -> bool:
    """Whether looking at the values costs nothing but time: not on a GPU, while compiling, or in vmap."""
    compiling = torch.compiler.is_compiling()
    return not compiling and x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_range(constructor: str, name: str, x: Tensor, low: int, high: int) -> None:
    """IndexError for values outside of [low, high), where they can be looked at."""
    if not readable(x) or not x.numel():
        return
    least, most = (int(value) for value in x.aminmax())
    if least < low or most >= high:
        raise IndexError(f"{CLASS}.{constructor}: {name} must be in [{low}, {high}), got {least} to {most}")


def check_cumulative(name: str, cu_seqlens: Tensor) -> None:
    """[sequences + 1] from 0 on, never less than the one before."""
    check(cu_seqlens, "packed", name, INTEGERS, "int [sequences + 1]", (1,))
    if not len(cu_seqlens):
        fail(f"{CLASS}.packed", name, "have an entry, 0, and one more per sequence", describe(cu_seqlens))
    if readable(cu_seqlens) and (cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any()):
        fail(f"{CLASS}.packed", name, "start with 0 and never fall", cu_seqlens.tolist()[:16])


def total(name: str, value: Any, cu_name: str, cu_seqlens: Tensor) -> int:
    """The positions of packed sequences: as given, or the last of cu_seqlens."""
    if value is None:
        return int(cu_seqlens[-1])
    value = size("packed", name, value)
    if readable(cu_seqlens) and value < cu_seqlens[-1]:
        fail(f"{CLASS}.packed", name, f"be at least {int(cu_seqlens[-1])}, the last of {cu_name}", value)
    return value


def ids(constructor: str, name: str, x: Any) -> Tensor:
    """int [B or 1, L] that fit in 32 bits."""
    check(x, constructor, name, INTEGERS, "int [L] or [B, L]", (1, 2))
    if x.dtype == torch.int64:
        check_range(constructor, name, x, INT32.min, INT32.max + 1)
    return x[None] if x.dim() == 1 else x
