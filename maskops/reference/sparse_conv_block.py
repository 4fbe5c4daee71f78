"""Reference of block-masked dense convolution, pooling and normalisation: the plain op on x times the mask, times the mask.

x [B, C, H, W]; cells bool [B, h, w], True where active, each H/h x W/w positions. Results are channels_last in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.reference.visible_tokens import accumulation_dtype

NOBODY = 255  # of max pooling: no active position holds the largest value


def position_mask(cells: Tensor, H: int, W: int) -> Tensor:
    """bool [B, 1, H, W]"""
    return cells.repeat_interleave(H // cells.shape[1], 1).repeat_interleave(W // cells.shape[2], 2)[:, None]


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def _active(x: Tensor, cells: Tensor) -> Tensor:
    """x in the precision of sums, 0 in hidden cells."""
    return torch.where(position_mask(cells, *x.shape[2:]), x, 0).to(accumulation_dtype(x.dtype))


def sparse_conv_block(
    x: Tensor, weight: Tensor, bias: Tensor | None, cells: Tensor, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    if 0 in x.shape or 0 in weight.shape:  # of which torch's convolutions know little: what is left is the bias
        sizes = x.shape[0], weight.shape[0], x.shape[2] // stride[0], x.shape[3] // stride[1]
        out = x.new_zeros(sizes, dtype=dtype)
        out = out if bias is None else out + bias.to(dtype)[:, None, None]
        return channels_last(_active(out, cells), x.dtype)
    wide = None if bias is None else bias.to(dtype)
    out = F.conv2d(_active(x, cells), weight.to(dtype), wide, stride, padding, 1, groups)
    return channels_last(_active(out, cells), x.dtype)


def _sparse_conv_block_grad_input(
    grad: Tensor, weight: Tensor, cells: Tensor, size: list[int], stride: list[int], padding: list[int], groups: int
) -> Tensor:
    dtype = accumulation_dtype(grad.dtype)
    x = grad.new_zeros((grad.shape[0], weight.shape[1] * groups, *size), dtype=dtype)
    if 0 in grad.shape or 0 in x.shape:
        return channels_last(x, grad.dtype)
    found = torch.ops.aten.convolution_backward(
        _active(grad, cells), x, weight.to(dtype), None, stride, padding, [1, 1], False, [0, 0], groups, [True, False, False]
    )[0]  # fmt: skip
    return channels_last(_active(found, cells), grad.dtype)


def _sparse_conv_block_grad_weight(
    grad: Tensor, x: Tensor, cells: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    dtype, wide = accumulation_dtype(x.dtype), _active(grad, cells)
    weight = x.new_zeros((grad.shape[1], x.shape[1] // groups, *kernel_size), dtype=dtype)
    if 0 in grad.shape or 0 in x.shape:
        return weight.to(x.dtype), wide.sum((0, 2, 3)).to(x.dtype)
    found = torch.ops.aten.convolution_backward(
        wide, _active(x, cells), weight, None, stride, padding, [1, 1], False, [0, 0], groups, [False, True, False]
    )[1]  # fmt: skip
    return found.to(x.dtype).contiguous(), wide.sum((0, 2, 3)).to(x.dtype)


def sparse_conv_block_max_pool(
    x: Tensor, cells: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    (H, W), (kh, kw) = x.shape[2:], kernel_size
    if 0 in x.shape:
        out = x.new_zeros((*x.shape[:2], H // stride[0], W // stride[1]))
        return channels_last(out, x.dtype), channels_last(out, torch.uint8)
    # Windows side by side: [B, C, kh kw, positions]; what pads them is less than anything.
    wide = F.pad(_active(x, cells), (padding[1], padding[1], padding[0], padding[0]), value=-torch.inf)
    seen = F.pad(position_mask(cells, H, W), (padding[1], padding[1], padding[0], padding[0]), value=False)
    windows = wide.unfold(2, kh, stride[0]).unfold(3, kw, stride[1]).flatten(4)
    seen = seen.unfold(2, kh, stride[0]).unfold(3, kw, stride[1]).flatten(4).expand_as(windows)
    value = windows.amax(-1)
    tap = (windows == value[..., None]).int().argmax(-1)  # the first of equal ones
    is_nan = windows.isnan()
    tap = torch.where(is_nan.any(-1), is_nan.int().argmax(-1), tap)
    nobody = ~seen.gather(-1, tap[..., None])[..., 0] | ~position_mask(cells, *value.shape[2:])
    out = channels_last(_active(value, cells), x.dtype)
    return out, channels_last(torch.where(nobody, NOBODY, tap), torch.uint8)


def _sparse_conv_block_max_pool_backward(
    grad: Tensor, taps: Tensor, cells: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:  # fmt: skip
    B, C, h, w = grad.shape
    (H, W), kw = size, kernel_size[1]
    wide = torch.where(taps == NOBODY, 0, grad).to(accumulation_dtype(grad.dtype))
    tap = torch.where(taps == NOBODY, 0, taps).long()
    y = torch.arange(h, device=grad.device)[:, None] * stride[0] - padding[0] + tap // kw
    x = torch.arange(w, device=grad.device) * stride[1] - padding[1] + tap % kw
    at = torch.where(taps == NOBODY, 0, y * W + x)
    found = wide.new_zeros(B, C, H * W).scatter_add_(2, at.flatten(2), wide.flatten(2)).view(B, C, H, W)
    return channels_last(_active(found, cells), grad.dtype)


# ---------------------------------------------------------------- normalisation: S samples with statistics of their own, 1 or B


def _sums(x: Tensor, per_sample: bool) -> Tensor:
    """[S, C]"""
    return x.sum((2, 3)) if per_sample else x.sum((0, 2, 3))[None]


def _spread(stats: Tensor) -> Tensor:
    return stats[:, :, None, None]


def _counts(cells: Tensor, H: int, W: int, per_sample: bool) -> Tensor:
    """float [S, 1]: active positions."""
    counts = cells.sum((1, 2)) if per_sample else cells.sum()[None]
    return counts[:, None] * ((H // cells.shape[1]) * (W // cells.shape[2]))


def _sparse_conv_block_moments(x: Tensor, cells: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    wide, mask = _active(x, cells), position_mask(cells, *x.shape[2:])
    mean = _sums(wide, per_sample) / _counts(cells, *x.shape[2:], per_sample).clamp(min=1)
    off = torch.where(mask, wide - _spread(mean), 0)
    return mean, _sums(off.square(), per_sample)


def sparse_conv_block_norm(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, cells: Tensor, count: Tensor | None,
    groups: int, process_group: str,
) -> Tensor:  # fmt: skip
    y = (_active(x, cells) - _spread(mean)) * _spread(rstd)
    y = y if weight is None else y * weight[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return channels_last(_active(y, cells), x.dtype)


def _sparse_conv_block_norm_sums(grad: Tensor, x: Tensor, mean: Tensor, cells: Tensor) -> Tensor:
    wide, off = _active(grad, cells), _active(x, cells) - _spread(mean)
    per_sample = mean.shape[0] == x.shape[0]
    return torch.stack([_sums(wide, per_sample), _sums(wide * off, per_sample)])


def _sparse_conv_block_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, of_grad: Tensor, of_x: Tensor, constant: Tensor, cells: Tensor
) -> Tensor:
    found = (
        _active(grad, cells) * _spread(of_grad)
        + (_active(x, cells) - _spread(mean)) * _spread(of_x)
        + _spread(constant)
    )
    return channels_last(_active(found, cells), x.dtype)


def _normalised(x: Tensor, cells: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _active(x, cells)
    off = wide - wide.mean(1, keepdim=True)
    rstd = (off.square().mean(1, keepdim=True) + eps).rsqrt()
    return off * rstd, rstd


def sparse_conv_block_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cells: Tensor, eps: float
) -> Tensor:
    y = _normalised(x, cells, eps)[0]
    y = y if weight is None else y * weight[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return channels_last(_active(y, cells), x.dtype)


def _sparse_conv_block_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cells: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, (y, rstd) = _active(grad, cells), _normalised(x, cells, eps)
    g = wide if weight is None else wide * weight[:, None, None]
    found = (g - g.mean(1, keepdim=True) - y * (g * y).mean(1, keepdim=True)) * rstd
    return channels_last(_active(found, cells), x.dtype), (wide * y).sum((0, 2, 3)), wide.sum((0, 2, 3))
