"""What the Triton kernels of several families share: launching, tiles, Philox, patch addressing, row sums.

Rules that hold for every kernel here and in the families:
- one-dimensional grids (CUDA caps y and z at 65535), rows as int64, so that offsets are safe beyond 2^31 elements;
- a reduction has a fixed order (no float atomics), so results are the same on every run;
- masked-out data is never loaded, so a NaN there cannot spread.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_recorded = None


class Launch(NamedTuple):
    """One recorded launch: what the JIT would have compiled."""

    kernel: object
    programs: int
    args: tuple
    meta: dict


class Arg(NamedTuple):
    """A tensor of an AOT sample; dtype "float" is each floating dtype of the op, "accumulator" the one of its sums."""

    dtype: str
    shape: tuple


@contextlib.contextmanager
def record_launches():
    """Collect the launches instead of running them, e.g. to compile them ahead of time from meta tensors."""
    global _recorded
    saved, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = saved


def launch(kernel, programs, *args, **meta):
    """Run `programs` instances of a kernel; none for an empty grid, which CUDA would refuse."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, args, meta))
        return
    if torch.version.hip:
        meta.pop("maxnreg", None)  # an option of NVIDIA's assembler
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    # Triton launches on the current device, which need not be the tensors' device.
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
    with guard:
        # Multiply-add fusion is said aloud because Triton 3.10 changes its default.
        kernel[(programs,)](*args, enable_fp_fusion=True, **meta)


def cdiv(a, b):
    return -(-a // b)


def row_tile(width, elements=2048):
    """Tile for copying rows: whole 512-byte (16-bit) or 1 KiB runs of a row, so many elements a program."""
    block_d = min(256, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_R": min(32, elements // block_d), "BLOCK_D": block_d, "num_warps": 4}


def rows_of(x):
    """x with unit stride in the last dimension; copies only if it must."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def accumulator(x):
    """(torch dtype, Triton dtype) in which sums over x are kept."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def bits_of(value):
    """The bits of a float64 as an int, see float_of."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").view(torch.int64).item()


@triton.jit
def float_of(bits):
    """A float64 argument: Triton itself passes floats as float32."""
    return (tl.zeros([], tl.int64) + bits).to(tl.float64, bitcast=True)


def heads_of(x):
    """(x, its strides of batch, head and row), copied unless 16-byte loads can read every row: channels side by side, their number
    and the strides multiples of 16. Channels that a copy adds are zeros."""
    D = x.shape[3]
    if D % 16:
        padded = x.new_zeros((*x.shape[:3], cdiv(D, 16) * 16))
        padded[..., :D] = x
        x = padded
    elif x.stride(3) != 1 or any(stride % 16 for stride in strides_of(x)):
        x = x.contiguous()
    return x, strides_of(x)


def strides_of(x):
    """Of the first three axes, 0 where there is but one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


class PatchGrid(NamedTuple):
    """An image or video batch as [B, C, T, H, W] cut into patches; an image is a video of one frame."""

    images: torch.Tensor
    strides: tuple  # of B, C, T, H; that of W is 1
    grid: tuple  # patches along T, H, W
    patch: dict  # constexprs C, PT, PH, PW
    values: int  # V, values per patch

    @property
    def tokens(self):
        return self.grid[0] * self.grid[1] * self.grid[2]


def patch_grid(images, patch_size):
    images = rows_of(images)
    strides = images.stride()
    pt, ph, pw = (1, *patch_size) if len(patch_size) == 2 else patch_size
    channels = images.shape[1]
    if len(patch_size) == 2:
        frames, strides = 1, (strides[0], strides[1], 0, strides[2])
    else:
        frames, strides = images.shape[2], strides[:4]
    grid = (frames // pt, images.shape[-2] // ph, images.shape[-1] // pw)
    patch = {"C": channels, "PT": pt, "PH": ph, "PW": pw}
    return PatchGrid(images, strides, grid, patch, channels * pt * ph * pw)


@triton.jit
def patch_origin(n, s_t, s_h, grid_h, grid_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of the first pixel of patch n (row-major over t, h, w) from the start of its image."""
    x = n % grid_w
    y = (n // grid_w) % grid_h
    t = n // (grid_w * grid_h)
    return (t * PT).to(tl.int64) * s_t + (y * PH).to(tl.int64) * s_h + x * PW


@triton.jit
def patch_value(v, s_c, s_t, s_h, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Offset of value v of a patch from the patch's first pixel; v counts (t, h, w, c) or (c, t, h, w)."""
    if CHANNELS_LAST:
        c = v % C
        p = v // C
    else:
        c = v // (PT * PH * PW)
        p = v % (PT * PH * PW)
    x = p % PW
    y = (p // PW) % PH
    t = p // (PW * PH)
    return c.to(tl.int64) * s_c + t.to(tl.int64) * s_t + y.to(tl.int64) * s_h + x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as dtype, to nearest even. Triton's interpreter truncates to bfloat16: there the bits are rounded by hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. Triton's interpreter multiplies the bits of bfloat16 operands, so there they are widened first."""
    if INTERPRETED:
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def philox4x32(index, offset, seed):
    """Four uint32 words of Philox4x32-10: counter (index, offset), key seed, each int64 split in low and high half."""
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1)


@triton.jit
def write_padding(ids_ptr, start, width, BLOCK: tl.constexpr):
    """ids[start:width] = -1."""
    for j0 in range(0, width, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        tl.store(ids_ptr + j, tl.full([BLOCK], -1, tl.int64), mask=(j >= start) & (j < width))


@triton.jit
def _cu_seqlens_kernel(counts_ptr, cu_ptr, B, BLOCK: tl.constexpr):
    # The one program owns all of counts [B] and cu [B+1]; B is small next to B*N, so one running scan is enough.
    total = tl.zeros([], tl.int32)
    tl.store(cu_ptr, total)
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + b, mask=b < B, other=0).to(tl.int32)
        tl.store(cu_ptr + 1 + b, total + tl.cumsum(count, 0), mask=b < B)
        total += tl.sum(count, 0)


def cu_seqlens_of(counts):
    """counts int64 [B] -> int32 [B+1], exclusive running sum with the total at the end."""
    cu = torch.empty(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    launch(_cu_seqlens_kernel, 1, counts, cu, counts.shape[0], BLOCK=1024, num_warps=4)
    return cu


@triton.jit
def _sum_rows_kernel(x_ptr, out_ptr, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    # One program owns BLOCK_D columns of x [R, D] and walks down all rows, BLOCK_R at a time: coalesced, fixed order.
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], x_ptr.dtype.element_ty)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        offset = r.to(tl.int64)[:, None] * D + d[None, :]
        total += tl.load(x_ptr + offset, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(out_ptr + d, rounded(tl.sum(total, 0), out_ptr.dtype.element_ty), mask=d < D)


def sum_rows(x, dtype):
    """x [R, D] in accumulator precision, contiguous -> its column sums [D] in dtype."""
    out = torch.empty(x.shape[1], dtype=dtype, device=x.device)
    warps = 8 if x.dtype == torch.float64 else 4
    launch(_sum_rows_kernel, cdiv(x.shape[1], 128), x, out, *x.shape, BLOCK_R=16, BLOCK_D=128, num_warps=warps)
    return out
