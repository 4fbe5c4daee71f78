"""The wording of every error about an argument; csrc/common/check.h says the same sentences for the C++ backends."""

import math
import numbers
import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, arg: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {arg} must {expected}, got {got}")


def describe(x: Tensor) -> str:
    """'float32 [2, 3]' of a tensor."""
    return f"{str(x.dtype).removeprefix('torch.')} [{', '.join(str(int(s)) for s in x.shape)}]"


def check_is_tensor(op: str, arg: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor, got {type(x).__name__}")


def check_is_dense(op: str, arg: str, x: object) -> None:
    """As check_is_tensor; nested and sparse tensors are refused too, before anything asks for their sizes."""
    check_is_tensor(op, arg, x)
    if x.layout != torch.strided or x.is_nested:
        fail(op, arg, "be a dense tensor", "a nested one" if x.is_nested else f"one of layout {x.layout}")


def integer(op: str, arg: str, value: object) -> int:
    """Any kind of int of 64 bits (also numpy's) as an int; a float is refused, not cut off, and so is a bool."""
    value = any_integer(op, arg, value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        fail(op, arg, "fit in 64 bits", value)
    return value


def check_is_tensor_or_none(op: str, arg: str, x: object) -> None:
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor or None, got {type(x).__name__}")


def any_integer(op: str, arg: str, value: object) -> int:
    """As integer, of any size."""
    if isinstance(value, bool):
        raise TypeError(f"{op}: {arg} must be int, got {value!r}")
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {arg} must be int, got {value!r}") from None


def number(op: str, arg: str, value: object) -> float:
    """value as a float; TypeError for what is no number, a bool among them."""
    if isinstance(value, float | torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {arg} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        fail(op, arg, "fit in a float", "a larger number")


def finite(op: str, arg: str, value: object) -> float:
    """As number, without infinities; NaN is left to a range."""
    value = number(op, arg, value)
    if value in (math.inf, -math.inf):
        fail(op, arg, "be finite", f"{value:g}")
    return value


def above_zero(op: str, arg: str, value: object) -> float:
    """A finite number above 0, of which the inverse is finite too, in float32."""
    value = number(op, arg, value)
    if not value > 0:
        fail(op, arg, "be above 0", f"{value:g}")
    if not 1e-38 <= value < math.inf:
        fail(op, arg, "be at least 1e-38 and finite", f"{value:g}")
    return value


def boolean(op: str, arg: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {arg} must be bool, got {value!r}")
    return value


def one_of(op: str, arg: str, value: object, known: Collection[str]) -> str:
    """value, one of a few words."""
    if not isinstance(value, str) or value not in known:
        fail(op, arg, f"be one of {tuple(known)}", repr(value))
    return value


def sizes_of(op: str, arg: str, value: object, axes: int, least: int) -> list[int]:
    """One number for each axis, or one for all: from `least` to 2^31 - 1."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        sizes = integers(op, arg, value)
    else:
        sizes = [integer(op, arg, value)] * axes
    if len(sizes) != axes or any(isinstance(size, int) and not least <= size < 2**31 for size in sizes):
        fail(op, arg, f"be {axes} numbers from {least} to 2^31 - 1", f"[{', '.join(map(str, sizes))}]")
    return sizes


def check_generator(op: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")


def integers(op: str, arg: str, values: object) -> list[int]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{op}: {arg} must be a sequence of int, got {values!r}")
    return [integer(op, arg, value) for value in values]


def check_tensor(
    op: str, arg: str, x: Tensor, shape: str, dtypes: Sequence[torch.dtype], sizes: Sequence[int | None], like: Tensor
) -> None:
    """One sentence for a wrong dtype, rank, size or device.  shape: the sizes in words, "[B, N, D]"; None = any size."""
    check_is_tensor(op, arg, x)
    if x.layout != torch.strided or x.is_nested:
        fail(op, arg, f"be a dense tensor {shape}", "a nested one" if x.is_nested else f"one of layout {x.layout}")
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(op, arg, f"be {names} {shape}", describe(x))
    if x.dim() != len(sizes) or any(
        want is not None and have != want for have, want in zip(x.shape, sizes, strict=True)
    ):
        known = ", ".join("*" if s is None else str(int(s)) for s in sizes)
        fail(op, arg, f"have shape {shape} = [{known}]", describe(x))
    if x.device != like.device:
        fail(op, arg, f"be on {like.device}", f"a tensor on {x.device}")


def check_ids(op: str, arg: str, ids: Tensor, tokens: int, *, allow_pad: bool = True) -> None:
    """ids [B, K] of distinct tokens in [0, tokens), -1 for an empty slot. Looks at the data: not for fake tensors."""
    low = -1 if allow_pad else 0
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        _assert_ids_on_device(op, arg, ids, tokens, low)
        return
    outside = (ids < low) | (ids >= tokens)
    if outside.any():
        b, k = torch.nonzero(outside)[0].tolist()
        raise IndexError(f"{op}: {arg}[{b}, {k}] must be in [{low}, {tokens}), got {int(ids[b, k])}")
    # Padding becomes distinct negative numbers, so that any equal neighbours after sorting are a real duplicate.
    spread = torch.where(ids < 0, -1 - torch.arange(ids.shape[1]), ids)
    ordered, order = spread.sort(dim=1, stable=True)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        row = int(torch.nonzero(repeated)[0, 0])
        k = int(order[row, 1:][repeated[row]].min())
        raise IndexError(f"{op}: {arg}[{row}, {k}] must be unique in its row, got {int(ids[row, k])} again")


def _assert_ids_on_device(op: str, arg: str, ids: Tensor, tokens: int, low: int) -> None:
    """The same two rules as device-side assertions: no host sync, so the message cannot name the position."""
    inside = (ids >= low) & (ids < tokens)
    torch._assert_async(inside.all(), f"{op}: {arg} must be in [{low}, {tokens})")
    counts = torch.zeros(ids.shape[0], tokens + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(1, torch.where(ids < 0, tokens, ids).clamp(0, tokens), torch.ones_like(ids))
    torch._assert_async((counts[:, :tokens] <= 1).all(), f"{op}: {arg} must be unique in its row")


def check_values(op: str, arg: str, good: Tensor, expected: str, values: Tensor) -> None:
    """Every element of `good` must hold; the first bad element of `values` is named."""
    if good.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good.all(), f"{op}: {arg} must {expected}")
        return
    batched = torch._C._functorch.is_batchedtensor(good)
    while torch._C._functorch.is_batchedtensor(good):  # torch.vmap allows no `if` on its tensors
        good = torch._C._functorch.get_unwrapped(good)
    if good.all():
        return
    if batched:
        raise ValueError(f"{op}: {arg} must {expected}, got others in a batch of torch.vmap")
    at = torch.nonzero(~good)[0].tolist()
    where = ", ".join(str(i) for i in at)
    raise ValueError(f"{op}: {arg}[{where}] must {expected}, got {values[tuple(at)].item()}")
