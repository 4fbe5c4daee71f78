"""Triton kernel of neighbour_fill: one ring of all images at a time, from one buffer into the other."""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import Arg, accumulator, cdiv, launch

PLACES = 256


@triton.jit
def _ring_kernel(x_ptr, known_ptr, out_ptr, now_ptr, C, H, W, eps_ptr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    # One program owns BLOCK places of one channel of x [B, C, H, W]; known uint8 [B, H, W]. The programs of channel 0 write `now`.
    blocks = tl.cdiv(H * W, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < H * W
    y, x = at // W, at % W
    image = plane // C * H * W
    total = tl.zeros([BLOCK], ACC)
    count = tl.zeros([BLOCK], ACC)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            exists = inside & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            here = tl.load(known_ptr + image + at + dy * W + dx, mask=exists, other=0) != 0
            total += tl.load(x_ptr + plane * H * W + at + dy * W + dx, mask=exists & here, other=0.0)
            count += here.to(ACC)
    known = tl.load(known_ptr + image + at, mask=inside, other=0) != 0
    own = tl.load(x_ptr + plane * H * W + at, mask=inside & known, other=0.0)
    # A place that knows nothing stays 0, also with eps = 0.
    filled = tl.where(count > 0, total / tl.where(count > 0, count + tl.load(eps_ptr), 1.0), 0.0)
    tl.store(out_ptr + plane * H * W + at, tl.where(known, own, filled), mask=inside)
    tl.store(
        now_ptr + image + at,
        (known | (count > 0)).to(tl.uint8),
        mask=inside & (tl.program_id(0) // blocks % C + at * 0 == 0),
    )


def sparse_conv_fill(x, mask, iterations, eps):
    B, C, H, W = x.shape
    dtype, acc = accumulator(x)
    filled = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).to(dtype).contiguous()
    known = mask.to(torch.uint8).contiguous()
    eps = torch.full((1,), eps, dtype=dtype, device=x.device)  # a number would become float32
    other, now = torch.empty_like(filled), torch.empty_like(known)
    # No place is farther from a known one than the longer side.
    for _ in range(min(iterations, max(H, W)) if C else 0):
        launch(
            _ring_kernel,
            B * C * cdiv(H * W, PLACES),
            filled,
            known,
            other,
            now,
            C,
            H,
            W,
            eps,
            ACC=acc,
            BLOCK=PLACES,
            num_warps=4,
        )
        filled, other, known, now = other, filled, now, known
    return filled.to(x.dtype), known != 0


AOT_SAMPLES = {
    "sparse_conv_fill": ((Arg("float", (2, 64, 56, 56)), Arg("bool", (2, 1, 56, 56)), 3, 1e-5),),
}
LIMITS = {"sparse_conv_fill": {"dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16), "reason": ""}}
