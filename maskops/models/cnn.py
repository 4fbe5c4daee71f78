"""ResNet and ConvNeXt, thin, with the shapes and parameter names of torchvision's, so that weights move either way.

He et al., "Deep Residual Learning", 2016; Liu et al., "A ConvNet for the 2020s", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskops.nn.block_masked import MaskedLayerNorm2d, SyncedBatchNorm2d


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, and the way around them."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = SyncedBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = SyncedBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = SyncedBatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), SyncedBatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Bottleneck ResNet.  layers: blocks per stage; width: of the first stage.

    stem: "published", 7x7 stride 2 and max pooling, so that the last of four stages is 32 times coarser than the image; "small",
    for small images, 3x3 stride 1. num_classes 0: no head.

    Example:
        >>> net = ResNet((1, 1), width=8, num_classes=10)
        >>> net(torch.rand(2, 3, 64, 64)).shape, [m.shape[1:] for m in net.features(torch.rand(1, 3, 64, 64))]
        (torch.Size([2, 10]), [torch.Size([32, 16, 16]), torch.Size([64, 8, 8])])
    """

    norm = "batch"

    def __init__(
        self, layers: Sequence[int] = (3, 4, 6, 3), *, width: int = 64, stem: str = "published", num_classes: int = 1000,
        channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        if stem not in ("published", "small"):
            raise ValueError(f"ResNet: stem must be 'published' or 'small', got {stem!r}")
        published = stem == "published"
        self.conv1 = nn.Conv2d(
            channels, width, 7 if published else 3, 2 if published else 1, 3 if published else 1, bias=False
        )
        self.bn1 = SyncedBatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if published else nn.Identity()
        self.widths, before = [], width
        for i, blocks in enumerate(layers):
            own = width * 2**i
            stage = [Bottleneck(before, own, 2 if i else 1), *(Bottleneck(4 * own, own, 1) for _ in range(blocks - 1))]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            before = 4 * own
            self.widths.append(before)
        self.stride = (4 if published else 1) * 2 ** (len(layers) - 1)
        self.fc = nn.Linear(before, num_classes) if num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> list[Tensor]:
        """The map of every stage, finest first."""
        x, found = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for i in range(len(self.widths)):
            x = getattr(self, f"layer{i + 1}")(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, num_classes]; the last map without a head."""
        x = self.features(x)[-1]
        return x if self.fc is None else self.fc(x.mean((2, 3)))


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class CNBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, two Linear layers over channels, scaled, and the way around them."""

    def __init__(self, dim: int, scale: float = 1e-6) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim), Permute(0, 2, 3, 1), nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), Permute(0, 3, 1, 2),
        )  # fmt: skip
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    """ConvNeXt.  depths and dims of the stages; patch: of the stem. num_classes 0: no head.

    Example:
        >>> net = ConvNeXt((1, 1), (8, 16), num_classes=0)
        >>> [m.shape[1:] for m in net.features_of(torch.rand(1, 3, 64, 64))]
        [torch.Size([8, 16, 16]), torch.Size([16, 8, 8])]
    """

    norm = "layer"

    def __init__(
        self, depths: Sequence[int] = (3, 3, 9, 3), dims: Sequence[int] = (96, 192, 384, 768), *, patch: int = 4,
        num_classes: int = 1000, channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        parts = [nn.Sequential(nn.Conv2d(channels, dims[0], patch, patch), MaskedLayerNorm2d(dims[0], eps=1e-6))]
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if i:
                parts.append(nn.Sequential(MaskedLayerNorm2d(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2)))
            parts.append(nn.Sequential(*(CNBlock(dim) for _ in range(depth))))
        self.features = nn.Sequential(*parts)
        self.widths, self.stride = list(dims), patch * 2 ** (len(dims) - 1)
        self.classifier = None
        if num_classes:
            head = MaskedLayerNorm2d(dims[-1], eps=1e-6), nn.Flatten(1), nn.Linear(dims[-1], num_classes)
            self.classifier = nn.Sequential(*head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features_of(self, x: Tensor) -> list[Tensor]:
        """The map of every stage, finest first."""
        found = []
        for i, part in enumerate(self.features):
            x = part(x)
            if i % 2:
                found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, num_classes]; the last map without a head."""
        x = self.features(x)
        return x if self.classifier is None else self.classifier(x.mean((2, 3), keepdim=True))


def maps_of(cnn: nn.Module, x: Tensor) -> list[Tensor]:
    """The map of every stage of a ResNet or ConvNeXt, finest first."""
    return cnn.features_of(x) if hasattr(cnn, "features_of") else cnn.features(x)
