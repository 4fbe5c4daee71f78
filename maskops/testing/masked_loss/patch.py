"""Samples, error samples and traffic of masked_patch_loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import masked_loss as reference
from maskops.reference.visible_tokens import images_of, patches_of
from maskops.testing import ErrorSample, Sample, randn
from maskops.testing.visible_tokens import IMAGE, PATCH, TUBE, VIDEO, split_of

G = torch.Generator
LOSS, BACKWARD = "masked_loss_patch", "_masked_loss_patch_backward"


def _loss(
    size: tuple[int, ...], patch: list[int], split: str, norm_pix: bool, kind: str, on: str, *, images_float32: bool = False,
    constant: bool = False, strided: bool = False, padding: bool = False,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        tokens = math.prod(s // p for s, p in zip(size[1:], patch, strict=True))
        _, _, restore, num_keep, _ = split_of(g, 3, tokens, split)
        num_mask = tokens - num_keep
        if padding:
            num_mask = (num_mask - 2).clamp(min=0)
        chosen = reference.selected_patches(restore, num_keep, num_mask, on)
        patches = patches_of(randn(g, torch.float64, 3, *size), patch)
        if constant:
            patches[:, ::2] = 0.3
        patches[~chosen] = math.nan  # neither target nor prediction of other patches may be read
        images = images_of(patches, patch, list(size[1:])).contiguous()
        images = images.to(torch.float32 if images_float32 and dtype != torch.float64 else dtype)
        pred = randn(g, dtype, 3, tokens + strided, patches.shape[2])[:, strided:]
        pred[~chosen] = math.nan
        return pred, images, restore, num_keep, num_mask, patch, norm_pix, kind, 0.7, on

    return make


def _backward(*args: object, **options: object) -> Callable:
    forward = _loss(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        inputs = forward(dtype, g)
        per_patch, stats = reference.masked_loss_patch(*inputs)
        return torch.randn(per_patch.shape, generator=g).to(per_patch.dtype), inputs[0], inputs[1], stats, *inputs[2:]

    return make


CASES = {
    "mae": _loss(IMAGE, PATCH, "equal", True, "l2", "masked"),
    "ragged": _loss(IMAGE, PATCH, "ragged", True, "l2", "masked"),
    "raw": _loss(IMAGE, PATCH, "ragged", False, "l2", "all"),
    "l1_visible": _loss(IMAGE, PATCH, "ragged", True, "l1", "visible"),
    "smooth": _loss(IMAGE, [4, 3], "ragged", True, "smooth_l1", "masked", strided=True),
    "smooth_raw": _loss((1, 8, 12), [4, 3], "equal", False, "smooth_l1", "all"),
    "constant": _loss(IMAGE, PATCH, "none", True, "l2", "all", constant=True),
    "float_images": _loss(IMAGE, PATCH, "ragged", True, "l2", "masked", images_float32=True),
    "padding": _loss(IMAGE, PATCH, "ragged", True, "l2", "all", padding=True),
    "video": _loss(VIDEO, TUBE, "ragged", True, "l2", "masked"),
    "none_chosen": _loss(IMAGE, PATCH, "none", True, "l2", "masked"),
}
SAMPLES = [
    *(Sample(LOSS, name, make) for name, make in CASES.items()),
    Sample(BACKWARD, "mae", _backward(IMAGE, PATCH, "equal", True, "l2", "masked")),
    Sample(BACKWARD, "l1", _backward(IMAGE, [4, 3], "ragged", True, "l1", "masked", strided=True)),
    Sample(BACKWARD, "smooth", _backward(VIDEO, TUBE, "ragged", False, "smooth_l1", "all")),
]


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


ERRORS = [
    ErrorSample(LOSS, "pred_shape", _at(0, lambda p: p[:, 1:]), ValueError, "masked_patch_loss: pred must have shape"),
    ErrorSample(LOSS, "images_batch", _at(1, lambda i: i[:1]), ValueError, "images must have shape"),
    ErrorSample(LOSS, "images_dtype", _at(1, Tensor.half), ValueError, "images must be float32"),
    ErrorSample(LOSS, "patch", _at(5, lambda p: [5, 5]), ValueError, "patch_size must be positive and divide"),
    ErrorSample(LOSS, "kind", _at(7, lambda k: "l3"), ValueError, "kind must be one of"),
    ErrorSample(LOSS, "on", _at(9, lambda o: "some"), ValueError, "on must be one of"),
    ErrorSample(LOSS, "beta", _at(8, lambda b: 0.0), ValueError, "beta must be above 0"),
    ErrorSample(LOSS, "restore", _at(2, lambda r: r * 0), IndexError, "ids_restore.* must be unique"),
    ErrorSample(LOSS, "count", _at(3, lambda c: c + 99), ValueError, "num_keep.* must be in"),
    ErrorSample(LOSS, "num_mask", _at(4, lambda c: c + 99), ValueError, "num_mask.* must be at least 0"),
]


def _loss_bytes(
    pred: Tensor, images: Tensor, restore: Tensor, num_keep: Tensor, num_mask: Tensor, *rest: object
) -> int:
    chosen = int(reference.selected_patches(restore, num_keep, num_mask, rest[-1]).sum())
    return restore.numel() * (8 + 12) + chosen * pred.shape[2] * (pred.element_size() + images.element_size())


def _backward_bytes(grad: Tensor, pred: Tensor, images: Tensor, stats: Tensor, *rest: object) -> int:
    return _loss_bytes(pred, images, *rest) + pred.numel() * pred.element_size()


TRAFFIC = {LOSS: _loss_bytes, BACKWARD: _backward_bytes}
