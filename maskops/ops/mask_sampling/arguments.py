"""What the functions that draw masks take alike: sizes, where to draw, what to draw from."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from maskops._backends import find_op
from maskops._checks import check_is_dense, fail, integer, number
from maskops.ops.mask_sampling.uniform import MAX_TOKENS, Seed, seed_tensor
from maskops.ops.visible_tokens.split import TokenSplit, split_tokens

ORDERS = ("ascending", "random")
# Draws that follow one another in one law read streams of their own: their offsets are so far apart.
OFFSET = 1 << 44


def fixed(value: float) -> float:
    """A number of at least 0 to the nearest millionth; in a compiled program a constant, as only a range's length becomes."""
    return len(range(int(value * 1e6 + 0.5))) / 1e6


def table(function: Callable) -> Callable:
    """Cache a tensor that depends on numbers alone; compiled programs take it for a constant, as assume_constant_result says."""
    made: dict[tuple, Tensor] = {}

    def look_up(*numbers: object) -> Tensor:
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if fake is not None and not fake.allow_non_fake_inputs and not torch._guards.TracingContext.try_get():
            return function(*numbers)  # in a FakeTensorMode of the caller's, which takes no plain tensors
        found = made.get(numbers)
        if found is not None:
            return found
        # Also where the first call is traced or in inference mode: what is kept is a plain tensor.
        with unset_fake_temporarily(), torch.inference_mode(False):
            found = function(*numbers)
        found._dynamo_static_indices = set(range(found.dim()))  # type: ignore[attr-defined]  # what mark_static notes
        if len(made) >= 64:
            made.clear()
        made[numbers] = found
        return found

    look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the function of that name imports all of dynamo
    return look_up


def where(function: str, device: object, *given: object) -> torch.device:
    """The device that is named, or that of the first tensor or generator, or the CPU."""
    if device is not None:
        try:
            return torch.device(device)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{function}: device must be a device or its name, got {device!r}") from None
    for x in given:
        if isinstance(x, Tensor | torch.Generator):
            return x.device
    return torch.device("cpu")


def seed_of(function: str, seed: Seed, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return seed_tensor(seed, generator, device, function)


def later(seed: Tensor, step: int) -> Tensor:
    """The seed of the step-th draw of a law that draws several times."""
    return torch.stack([seed[0], seed[1] + step * OFFSET])


def size(function: str, name: str, value: object, low: int = 0, high: int = 2**31 - 1) -> int:
    found = integer(function, name, value)
    if not low <= found <= high:
        fail(function, name, f"be in [{low}, {high}]", found)
    return found


def share(function: str, name: str, value: object) -> float:
    found = number(function, name, value)
    if not 0 <= found <= 1:
        fail(function, name, "be in [0, 1]", found)
    return found


def grid_of(function: str, grid: object, name: str = "grid") -> tuple[int, int]:
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"{function}: {name} must be two int, got {grid!r}")
    return size(function, f"{name}[0]", grid[0]), size(function, f"{name}[1]", grid[1])


def check_tokens(function: str, name: str, tokens: int) -> None:
    """As many tokens of a row as the kernels count. name: the argument, or the product of several."""
    if tokens >= MAX_TOKENS:
        fail(function, name, "be below 2^30", tokens)


def choice(function: str, name: str, value: object, options: Sequence[str]) -> str:
    if value not in options:
        fail(function, name, f"be one of {tuple(options)}", repr(value))
    return value  # type: ignore[return-value]


def kept_of(function: str, N: int, mask_ratio: float | None, num_keep: object, rounding: str) -> int:
    """How many of N tokens are kept, from one of mask_ratio and num_keep."""
    choice(function, "rounding", rounding, ("floor", "round", "ceil"))
    if (mask_ratio is None) == (num_keep is None):
        fail(function, "mask_ratio or num_keep", "be given, one of them", f"{mask_ratio} and {num_keep}")
    if num_keep is not None:
        return size(function, "num_keep", num_keep, 0, N)
    exact = N * (1 - share(function, "mask_ratio", mask_ratio))
    return {"floor": math.floor, "round": round, "ceil": math.ceil}[rounding](exact)


def threshold_of(probability: float) -> int:
    """The 32-bit threshold of a probability in [0, 1]."""
    return round(probability * 2**32)


def rows_split(mask: Tensor, num_keep: int | None, backend: str) -> TokenSplit:
    """The split of a mask bool [B, N] that a law has made, ascending; num_keep where every row keeps as many."""
    if num_keep is None:
        return split_tokens(mask, backend=backend)
    B, N = mask.shape
    op = find_op("visible_tokens_split", mask.device.type, backend)
    ids_keep, ids_mask, ids_restore, kept, cu_seqlens = op(mask, num_keep, N - num_keep)
    return TokenSplit(ids_keep, ids_mask, ids_restore, kept, N - kept, cu_seqlens, num_keep, B * num_keep)


def ranked(key: Tensor, keep: int, order: str, backend: str, function: str) -> TokenSplit:
    """Keep the tokens with the smallest float key [B, N]."""
    B, N = key.shape
    counts = torch.full((B,), keep, dtype=torch.int64, device=key.device)
    op = find_op("mask_sampling_rank", key.device.type, backend, function)
    out = op(key, counts, None, keep, N - keep, order == "ascending")
    return TokenSplit(*out[:3], counts, *out[3:], keep, B * keep)


def shuffled(
    seed: Tensor, B: int, N: int, keep: int, order: str, backend: str, function: str, mask: Tensor | None = None,
    cells: tuple[int, int, int] = (1, 1, 1),
) -> TokenSplit:  # fmt: skip
    """Keep a uniformly random subset; tokens of mask bool [B, N] are kept only when no others are left.

    cells: (cells of a line, patches along a cell's height, along its width), where the tokens are cells of a grid of patches, and
    the split is that of the patches.
    """
    counts = torch.full((B,), keep, dtype=torch.int64, device=seed.device)
    op = find_op("mask_sampling_uniform", seed.device.type, backend, function)
    out = op(seed, counts, None, mask, N, keep, N - keep, order == "ascending", *cells)
    area = cells[1] * cells[2]
    if area != 1:
        keep = area * keep
        counts = torch.full((B,), keep, dtype=torch.int64, device=seed.device)
    return TokenSplit(*out[:3], counts, *out[3:], keep, B * keep)


def check_scores(function: str, name: str, x: Tensor) -> None:
    check_is_dense(function, name, x)
    if x.dim() != 2 or not x.is_floating_point():
        fail(function, name, "be a float tensor [B, N]", f"{x.dtype} {list(x.shape)}")
