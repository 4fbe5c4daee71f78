"""R-MAE: whole sectors of a LiDAR scan are masked, a sparse encoder sees the rest, and the occupancy of every voxel is predicted.

Tayebati, Tulabandhula, Trivedi, "Sense Less, Generate More: Pre-training LiDAR Perception with Masked Autoencoders for
Ultra-Efficient 3D Sensing", 2024 (arXiv 2406.07833). B scans, G sectors, a grid of X x Y x Z voxels.

The authors' code takes angles of voxel numbers about the corner of the grid, so that all lie in a quarter turn, and draws one set
of sectors for the whole batch. Here angles are those of voxel centres about the sensor, and each scan has its own sectors. Width
and depth are options; the loss over all voxels, empty and visible ones too, is theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import SparseTensor
from maskops.nn import SparseConv3d, SubMConv3d


class RMAEOutput(NamedTuple):
    """loss, a scalar; logits [B, X, Y, Z] and target bool of the same shape, of occupancy; hidden bool [B, X, Y, Z], the voxels
    of masked sectors, empty ones too; visible: the tensor that the encoder saw."""

    loss: Tensor
    logits: Tensor
    target: Tensor
    hidden: Tensor
    visible: SparseTensor


@dataclass(frozen=True)
class RMAEConfig:
    """range: (low of x, y, z, high of x, y, z) in metres; voxel_size of each axis. channels: of the points, x, y, z among them.

    sectors: G, of a full turn about the sensor (x, y), which by default stands in the middle of the range. mask_ratio: G less
    int((1 - mask_ratio) G) sectors are masked. widths: of the encoder, each stage but the first halves the grid.
    """

    range: tuple[float, ...] = (-20.48, -20.48, -3.2, 20.48, 20.48, 3.2)
    voxel_size: tuple[float, float, float] = (0.16, 0.16, 0.2)
    channels: int = 4
    sectors: int = 360
    mask_ratio: float = 0.8
    sensor: tuple[float, float] | None = None
    widths: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"RMAEConfig: mask_ratio must be in [0, 1], got {self.mask_ratio}")
        if self.sectors < 1 or self.channels < 3 or len(self.widths) < 2:
            raise ValueError(
                "RMAEConfig: sectors must be at least 1, channels 3 and widths two numbers, got"
                f" {self.sectors}, {self.channels}, {self.widths}"
            )
        if any(size % 2 ** (len(self.widths) - 1) for size in self.shape):
            raise ValueError(
                f"RMAEConfig: the grid must be divisible by {2 ** (len(self.widths) - 1)}, got {self.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        ends = zip(self.range[:3], self.range[3:], self.voxel_size, strict=True)
        return tuple(round((high - low) / size) for low, high, size in ends)

    @property
    def keep(self) -> int:
        return int((1 - self.mask_ratio) * self.sectors + 1e-9)


class Stage(nn.Module):
    """A convolution, with a stride or on the same places, a norm over active places and a ReLU."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.LayerNorm(conv.out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        x = self.conv(x)
        return x.replace(F.relu(self.norm(x.features)))


class RMAE(nn.Module):
    """Radially masked autoencoder of LiDAR scans.

        sector = floor(angle of the voxel's centre about the sensor / (2 pi / G));  visible = voxels of kept sectors
        loss = mean over all voxels of BCE(decoder(encoder(visible)), whether the voxel holds a point)

    Example:
        >>> config = RMAEConfig((-4, -4, 0, 4, 4, 4), (1.0, 1.0, 1.0), channels=3, sectors=12, mask_ratio=0.5, widths=(4, 8))
        >>> out = RMAE(config)(torch.rand(50, 3) * 8 - 4, torch.zeros(50, dtype=torch.int64), 1, seed=0)
        >>> out.logits.shape
        torch.Size([1, 8, 8, 4])
    """

    def __init__(self, config: RMAEConfig) -> None:
        super().__init__()
        c = self.config = config
        first, *rest = c.widths
        stages, before = [Stage(SubMConv3d(c.channels, first, 3))], first
        for width in rest:
            stages += [Stage(SparseConv3d(before, width, 3, stride=2, padding=1)), Stage(SubMConv3d(width, width, 3))]
            before = width
        self.encoder = nn.Sequential(*stages)
        up: list[nn.Module] = []
        for width in (*reversed(c.widths[:-1]),):
            up += [
                nn.ConvTranspose3d(before, width, 2, stride=2),
                nn.ReLU(),
                nn.Conv3d(width, width, 3, padding=1),
                nn.ReLU(),
            ]
            before = width
        self.decoder = nn.Sequential(*up, nn.Conv3d(before, 1, 1))
        self.register_buffer("sector", self.sectors_of_columns(), persistent=False)

    def sectors_of_columns(self) -> Tensor:
        """int64 [X, Y]: the sector of every column of voxels, by its centre."""
        c = self.config
        middle = [(low + high) / 2 for low, high in zip(c.range[:2], c.range[3:5], strict=True)]
        axes = []
        for axis, origin in enumerate(middle if c.sensor is None else c.sensor):
            axes.append(c.range[axis] + (torch.arange(c.shape[axis]) + 0.5).double() * c.voxel_size[axis] - origin)
        angle = torch.atan2(axes[1][None, :], axes[0][:, None]).remainder(2 * math.pi)
        return (angle / (2 * math.pi) * c.sectors).long().clamp(max=c.sectors - 1)

    def voxels(self, points: Tensor, batch_index: Tensor, batch_size: int) -> SparseTensor:
        """The voxels that hold points, with the mean of their points, places measured in halves of the range."""
        c = self.config
        x = maskops.voxelize(points, c.voxel_size, c.range, batch_index=batch_index, batch_size=batch_size).tensor
        low, high = (points.new_tensor(ends) for ends in (c.range[:3], c.range[3:]))
        places = (2 * x.features[:, :3] - low - high) / (high - low)
        return x.replace(torch.cat([places, x.features[:, 3:]], 1))

    def forward(
        self, points: Tensor, batch_index: Tensor, batch_size: int, *, seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RMAEOutput:  # fmt: skip
        """Mask sectors of each scan and predict which voxels hold points.

        Args:
            points: [P, channels], x, y, z first; points out of range are dropped.
            batch_index: int [P], the scan of each point.
            batch_size: scans, B.
            seed, generator: where the sectors are drawn from, as in maskops.random_masking.
        """
        c = self.config
        x = self.voxels(points, batch_index, batch_size)
        split = maskops.random_masking(
            batch_size, c.sectors, num_keep=c.keep, seed=seed, generator=generator, device=points.device
        )
        hidden = split.mask[:, self.sector]  # [B, X, Y]
        b, i, j = x.coords[:, :3].long().unbind(1)
        kept = ~hidden[b, i, j]
        visible = SparseTensor(x.features[kept], x.coords[kept], c.shape, batch_size)
        logits = self.decoder(self.encoder(visible).dense())[:, 0]
        target = x.replace(torch.ones_like(x.features[:, :1])).dense()[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, target)
        return RMAEOutput(loss, logits, target > 0, hidden[..., None].expand(target.shape), visible)
