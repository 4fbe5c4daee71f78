"""to_block_masked: any CNN of known layers, with the same weights, computing the active cells of a mask only."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from maskops.nn import block_masked as ours

# Work on each value alone, so that what they make of hidden cells is never read.
POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
LAYERS: dict[type, type] = {
    nn.Conv2d: ours.BlockMaskedConv2d, nn.Linear: ours.BlockMaskedLinear, nn.MaxPool2d: ours.BlockMaskedMaxPool2d,
    nn.AvgPool2d: ours.BlockMaskedAvgPool2d, nn.BatchNorm2d: ours.MaskedBatchNorm2d, nn.SyncBatchNorm: ours.MaskedBatchNorm2d,
    nn.GroupNorm: ours.MaskedGroupNorm,
    nn.InstanceNorm2d: ours.MaskedInstanceNorm2d, nn.LayerNorm: ours.MaskedLayerNorm,
}  # fmt: skip
OURS = (*set(LAYERS.values()), ours.SyncedBatchNorm2d, ours.MaskedLayerNorm2d)


def to_block_masked(cnn: nn.Module, *, keep: Sequence[type[nn.Module]] = ()) -> nn.Module:
    """Turn a CNN into one that computes only the active cells of the mask of `with maskops.nn.block_mask(cells):`.

    Convolutions, Linear layers over channels, pooling and norms become their block-masked kind; activations and containers stay
    what they are. Parameters and buffers are shared with cnn, names and all: training one trains the other. Outside
    of a mask the result computes what cnn does. Under one, results equal those of
    cnn with its input and the output of every layer multiplied by the mask, and with norms over active positions only.

    Args:
        cnn: of layers in LAYERS and POINTWISE, in containers of any class. A subclass of LayerNorm called LayerNorm2d takes
            [B, C, H, W]; LayerNorm itself and Linear take [B, H, W, C].
        keep: more classes without parameters to leave as they are: what they do must not mix positions (a Permute, a drop path).

    Returns:
        A module of the same class.

    Raises:
        TypeError: a layer that is not known, with its path.  ValueError: an option of a layer that is not supported, with its path.

    Source:
        dense_model_to_sparse of SparK (Tian et al., 2023, arXiv 2301.03580).

    Example:
        >>> from torch import nn
        >>> cnn = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> net = maskops.nn.to_block_masked(cnn)
        >>> with maskops.nn.block_mask(torch.rand(2, 4, 4) < 0.4):
        ...     net(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 8, 16, 16])
    """
    if not isinstance(cnn, nn.Module):
        raise TypeError(f"to_block_masked: cnn must be a module, got {type(cnn).__name__}")
    if not isinstance(keep, Sequence) or not all(isinstance(kind, type) for kind in keep):
        raise TypeError(f"to_block_masked: keep must be a sequence of classes, got {keep!r}")
    return _convert(cnn, "", tuple(keep), {})


def _convert(module: nn.Module, path: str, keep: tuple[type, ...], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:  # a layer that is used twice stays one layer
        return done[id(module)]
    kind = LAYERS.get(type(module))
    if type(module).__name__ == "LayerNorm2d" and isinstance(module, nn.LayerNorm):
        kind = ours.MaskedLayerNorm2d
    if kind is not None:
        new = _as_kind(module, kind, path)
    elif type(module) in (*POINTWISE, *OURS) or isinstance(module, keep):
        new = module
    elif isinstance(module, tuple(LAYERS)):
        # Not a container, whatever it holds: its own forward would read hidden cells.
        kind, base = type(module).__name__, _base(module).__name__
        raise TypeError(
            f"to_block_masked: {_name(path)} is a {kind}, which has no block-masked kind, as {base} itself has;"
            " a parametrization must be removed first"
        )
    elif module._modules:
        new = copy.copy(module)
        new._modules = {
            name: child and _convert(child, f"{path}.{name}".lstrip("."), keep, done)
            for name, child in module._modules.items()
        }
    else:
        raise TypeError(f"to_block_masked: {_name(path)} is a {type(module).__name__}, which has no block-masked kind")
    done[id(module)] = new
    return new


def _base(module: nn.Module) -> type:
    return next(kind for kind in LAYERS if isinstance(module, kind))


def _name(path: str) -> str:
    return path or "the module itself"


def _as_kind(module: nn.Module, kind: type, path: str) -> nn.Module:
    """The layer as another class over the same parameters, buffers and options."""
    for option, usual in _PLAIN.get(kind, {}).items():
        found = getattr(module, option)
        if found not in usual:
            raise ValueError(f"to_block_masked: {_name(path)}: {option} must be {usual[0]}, got {found}")
    if kind in (ours.BlockMaskedConv2d, ours.BlockMaskedMaxPool2d, ours.BlockMaskedAvgPool2d):
        sizes = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,)
        if max(sizes) > 7:
            raise ValueError(f"to_block_masked: {_name(path)}: kernel_size must be at most 7, got {module.kernel_size}")
    if kind is ours.BlockMaskedConv2d and module.padding == "same" and not all(k % 2 for k in module.kernel_size):
        raise ValueError(
            f"to_block_masked: {_name(path)}: kernel_size must be odd for padding 'same', got {module.kernel_size}"
        )
    if kind is ours.BlockMaskedAvgPool2d and not module.count_include_pad and module.padding not in (0, (0, 0)):
        raise ValueError(f"to_block_masked: {_name(path)}: count_include_pad must be True, got False")
    if issubclass(kind, ours.MaskedLayerNorm) and len(module.normalized_shape) != 1:
        raise ValueError(
            f"to_block_masked: {_name(path)}: normalized_shape must be the channels alone, got {module.normalized_shape}"
        )
    new = kind.__new__(kind)
    new.__dict__ = module.__dict__.copy()
    if isinstance(module, nn.SyncBatchNorm):
        new.process_group = True if module.process_group is None else module.process_group
    if isinstance(module, ours.SyncedBatchNorm2d):
        new.process_group = (
            True if ours.torch.distributed.is_available() and ours.torch.distributed.is_initialized() else None
        )
    return new


_PLAIN: dict[type, dict[str, tuple]] = {
    ours.BlockMaskedConv2d: {"dilation": ((1, 1),), "padding_mode": ("zeros",)},
    ours.BlockMaskedMaxPool2d: {"dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)},
    ours.BlockMaskedAvgPool2d: {"ceil_mode": (False,), "divisor_override": (None,)},
    ours.MaskedInstanceNorm2d: {"track_running_stats": (False,)},
}
