"""Layer masking: any trained CNN on images with missing pixels, whose values it never reads. Inference only, no training.

Balasubramanian, Feizi, "Towards Improved Input Masking for Convolutional Neural Networks", 2023 (arXiv 2211.14646).
B images, C channels, H x W places; a mask is bool [B, 1, H, W], True where a place is known.

Every layer gets what it knows and where. Convolution: unknown places are filled from known ones, as many rings as the kernel is
wide; then the ordinary convolution, and a result is known where its kernel touched anything known. Norms and activations act on
known places. Sums are known where all their terms are. The mean of an image is that of its known places. Ours: average and max
pools take known places only, which the paper's code leaves open.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import maskops

POINTWISE = (
    nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout2d,
)  # fmt: skip
POINTWISE_FUNCTIONS = (F.relu, F.silu, F.gelu, F.leaky_relu, torch.relu, torch.sigmoid, torch.tanh)
SUMS = (operator.add, operator.iadd, torch.add)


class Known(NamedTuple):
    """x [B, C, H, W], 0 where mask bool [B, 1, H, W] is False."""

    x: Tensor
    mask: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> Known:
        return cls(torch.where(mask, x, 0), mask)


class LayerMasked(fx.Interpreter):
    """A CNN that takes a mask: LayerMasked(net)(images, mask) -> what net returns, of known pixels only.

        conv:  fill(x, mask, rings = kernel width); y = conv(x); mask = maxpool(mask); y * mask
        f:     f(x * mask) * mask       a + b:  mask_a and mask_b       global mean:  mean(x * mask) / (mean(mask) + 1e-8)

    Args:
        net: any module that torch.fx can trace, of convolutions, norms, activations, pools, sums and a linear head; in eval mode.
        fill: fill unknown places before convolutions; without, they are 0.

    Raises:
        NotImplementedError: a layer with no rule, as the image passes through it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> image, mask = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8) < 0.5
        >>> LayerMasked(net)(image, mask).shape
        torch.Size([1, 2])
    """

    def __init__(self, net: nn.Module, fill: bool = True) -> None:
        super().__init__(fx.symbolic_trace(net.eval()))
        self.fill = fill

    def __call__(self, images: Tensor, mask: Tensor) -> Tensor:
        out = self.run(Known.of(images, mask))
        return out.x if isinstance(out, Known) else out

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        module = self.fetch_attr(target)
        return self.masked(module, *args) if isinstance(args[0], Known) else module(*args, **kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if not any(isinstance(a, Known) for a in args):
            return super().call_function(target, args, kwargs)
        if target in SUMS and all(isinstance(a, Known) for a in args):
            return Known.of(args[0].x + args[1].x, args[0].mask & args[1].mask)
        if target in POINTWISE_FUNCTIONS:
            return Known.of(target(args[0].x, *args[1:], **kwargs), args[0].mask)
        if target is torch.flatten and args[0].x.shape[2:] == (1, 1):
            return args[0].x.flatten(1)
        if target is F.adaptive_avg_pool2d and args[1] in (1, (1, 1)):
            return self.mean(args[0])
        raise NotImplementedError(f"LayerMasked: no rule for the function {target}")

    def call_method(self, target: str, args: tuple, kwargs: dict) -> Any:
        if isinstance(args[0], Known):
            if target == "mean" and set(args[1] if len(args) > 1 else kwargs["dim"]) in ({2, 3}, {-1, -2}):
                return self.mean(args[0]).x[:, :, 0, 0]
            if target == "flatten" and args[0].x.shape[2:] == (1, 1):
                return args[0].x.flatten(1)
            raise NotImplementedError(f"LayerMasked: no rule for the method {target}")
        return super().call_method(target, args, kwargs)

    def masked(self, module: nn.Module, known: Known) -> Known | Tensor:
        x, mask = known
        if isinstance(module, nn.Conv2d):
            return self.convolved(module, known)
        if isinstance(module, POINTWISE):
            return Known.of(module(x), mask)
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and not module.ceil_mode:
            return self.pooled(module, known)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return self.mean(known)
        if isinstance(module, nn.Flatten) and x.shape[2:] == (1, 1):
            return module(x)
        raise NotImplementedError(f"LayerMasked: no rule for {type(module).__name__}")

    def convolved(self, conv: nn.Conv2d, known: Known) -> Known:
        x, mask = known
        rings = max(conv.kernel_size)
        if self.fill and rings > 1:  # a kernel of one place reads no neighbour
            x = maskops.neighbour_fill(x, mask, rings)[0]
        padding = conv.padding
        if isinstance(padding, str):
            raise NotImplementedError(f"LayerMasked: no rule for padding={padding!r}")
        return Known.of(conv(x), maskops.downsample_mask(mask, conv.kernel_size, conv.stride, padding, conv.dilation))

    @staticmethod
    def pooled(pool: nn.MaxPool2d | nn.AvgPool2d, known: Known) -> Known:
        x, mask = known
        if isinstance(pool, nn.MaxPool2d):
            after = maskops.downsample_mask(mask, pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            return Known.of(pool(torch.where(mask, x, -torch.inf)), after)
        average, share, inside = (
            F.avg_pool2d(y, pool.kernel_size, pool.stride, pool.padding)
            for y in (x, mask.to(x.dtype), torch.ones_like(x[:, :1]))
        )
        # Padding counts as zeros where the pool says so, unknown places never.
        counted = share + (1 - inside) if pool.count_include_pad else share
        return Known.of(average / counted.clamp(min=1e-8), share > 0)

    @staticmethod
    def mean(known: Known) -> Known:
        """Over known places; 0 of an image without any."""
        share = known.mask.to(known.x.dtype).mean((2, 3), keepdim=True)
        return Known(known.x.mean((2, 3), keepdim=True) / (share + 1e-8), share > 0)
