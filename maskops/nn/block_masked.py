"""Dense CNN layers under a mask of cells, taken from block_mask(cells); outside of it they are the layers of torch.nn."""

from __future__ import annotations

import threading
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

import maskops
from maskops._checks import check_is_tensor_or_none, check_tensor
from maskops.reference.visible_tokens import accumulation_dtype

_state = threading.local()


class block_mask:
    """Inside `with block_mask(cells):` the block-masked layers compute active cells only. Threads do not see each other's masks.

    Works under torch.compile. Checkpointing that runs layers anew in the backward pass must set the mask within what it runs.

    Args:
        cells: bool [B, h, w]; True = active: this mask keeps. h divides the height of every feature map, w its width. None: as
            outside.

    Example:
        >>> net = maskops.nn.to_block_masked(torch.nn.Conv2d(3, 8, 3, padding=1))
        >>> with maskops.nn.block_mask(torch.tensor([[[True, False]]])):
        ...     out = net(torch.rand(1, 3, 4, 8))
        >>> out[..., 4:].abs().sum().item()
        0.0
    """

    def __init__(self, cells: Tensor | None) -> None:
        check_is_tensor_or_none("block_mask", "cells", cells)
        if cells is not None:
            check_tensor("block_mask", "cells", cells, "[B, h, w]", (torch.bool,), (None, None, None), cells)
        self.cells = cells
        self.before: list[Tensor | None] = []  # one for each time that it is entered

    def __enter__(self) -> Tensor | None:
        self.before.append(current_cells())
        _state.cells = self.cells
        return self.cells

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _state.cells = self.before.pop()


def current_cells() -> Tensor | None:
    """The mask that this thread's layers run under."""
    return getattr(_state, "cells", None)


def wide(x: Tensor, value: Tensor | None) -> Tensor | None:
    """A weight of a norm in the precision of sums."""
    return None if value is None else value.to(accumulation_dtype(x.dtype))


class BlockMaskedConv2d(nn.Conv2d):
    """Conv2d of active cells; arguments as of Conv2d, dilation 1, zeros as padding."""

    def forward(self, x: Tensor) -> Tensor:
        cells, padding = current_cells(), self.padding
        if cells is None:
            return super().forward(x)
        if padding == "same":  # stride 1, as Conv2d checks
            padding = [k // 2 for k in self.kernel_size]
        elif padding == "valid":
            padding = [0, 0]
        return maskops.block_masked_conv(
            x, self.weight, cells, self.bias, stride=self.stride, padding=padding, groups=self.groups
        )


class BlockMaskedLinear(nn.Linear):
    """Linear over the channels of [B, H, W, C], at active positions."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        if x.dim() != 4:
            raise ValueError(f"BlockMaskedLinear: x must be [B, H, W, C], got {list(x.shape)}")
        x = maskops.block_masked_conv(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], cells, self.bias)
        return x.permute(0, 2, 3, 1)


class BlockMaskedMaxPool2d(nn.MaxPool2d):
    """MaxPool2d of active cells, to which hidden neighbours are 0."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        return maskops.block_masked_max_pool(x, cells, self.kernel_size, stride=self.stride, padding=self.padding)


class BlockMaskedAvgPool2d(nn.AvgPool2d):
    """AvgPool2d of active cells, to which hidden neighbours are 0; padding counts."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        kernel = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * 2
        weight = x.new_full((x.shape[1], 1, *kernel), 1 / (kernel[0] * kernel[1]))
        return maskops.block_masked_conv(x, weight, cells, stride=self.stride, padding=self.padding, groups=x.shape[1])


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of active positions.

    process_group: None, or over which processes statistics are taken: a torch.distributed group, or True for all of them, where
    there are any. That holds outside of a mask too, and on the CPU (torch's SyncBatchNorm needs a GPU).
    """

    process_group: object = None

    def forward(self, x: Tensor) -> Tensor:
        cells, training = current_cells(), self.training or self.running_mean is None
        several = training and bool(self.process_group) and dist.is_available() and dist.is_initialized()
        if cells is None:
            if not several:
                return super().forward(x)
            cells = x.new_ones((x.shape[0], 1, 1), dtype=torch.bool)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else momentum
        return maskops.masked_batch_norm(
            x, cells, self.running_mean, self.running_var, wide(x, self.weight), wide(x, self.bias), training=training,
            momentum=momentum, eps=self.eps, process_group=self.process_group if several else None,
        )  # fmt: skip


class SyncedBatchNorm2d(MaskedBatchNorm2d):
    """MaskedBatchNorm2d over all processes, where there are several."""

    process_group: object = True


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm of [B, C, H, W] over active positions."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        return maskops.masked_group_norm(
            x, cells, self.num_groups, wide(x, self.weight), wide(x, self.bias), eps=self.eps
        )


class MaskedInstanceNorm2d(nn.InstanceNorm2d):
    """InstanceNorm2d over active positions; without running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        if self.running_mean is not None:
            raise ValueError("MaskedInstanceNorm2d: track_running_stats must be False, got True")
        return maskops.masked_instance_norm(x, cells, wide(x, self.weight), wide(x, self.bias), eps=self.eps)


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, H, W, C] at active positions."""

    def forward(self, x: Tensor) -> Tensor:
        cells = current_cells()
        if cells is None:
            return super().forward(x)
        if x.dim() != 4 or x.shape[3:] != self.normalized_shape:
            C = self.normalized_shape[-1]
            raise ValueError(f"MaskedLayerNorm: x must be [B, H, W, {C}], got {list(x.shape)}")
        x = x.permute(0, 3, 1, 2)
        x = maskops.masked_layer_norm(x, cells, wide(x, self.weight), wide(x, self.bias), eps=self.eps)
        return x.permute(0, 2, 3, 1)


class MaskedLayerNorm2d(MaskedLayerNorm):
    """LayerNorm over the channels of [B, C, H, W] at active positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
