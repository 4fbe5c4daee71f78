"""Samples of the family visible_tokens."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.reference import visible_tokens as reference
from maskops.testing import Sample, ragged_mask, randn

G = torch.Generator
D_ODD = 37


def split_of(g: G, batch: int, tokens: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids_keep, ids_mask, ids_restore, num_keep, cu_seqlens) of a mask that is ragged, all, none or equal."""
    if kind == "ragged":
        mask = ragged_mask(g, batch, tokens)
    elif kind == "equal":
        mask = torch.rand(batch, tokens, generator=g).argsort(1) >= tokens // 4
    else:
        mask = torch.full((batch, tokens), kind == "all")
    kept = (~mask).sum(1)
    return reference.visible_tokens_split(mask, int(kept.max()) if batch and tokens else 0, tokens)


KINDS = ("ragged", "equal", "all", "none")

# ---------------------------------------------------------------- split


def _split(batch: int, tokens: int, kind: str) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        ids_keep, _, restore, num_keep, _ = split_of(g, batch, tokens, kind)
        return restore >= num_keep[:, None], ids_keep.shape[1], tokens

    return make


# ---------------------------------------------------------------- gather


def _gather(batch: int, tokens: int, channels: int, kind: str) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        return randn(g, dtype, batch, tokens, channels), split_of(g, batch, tokens, kind)[0]

    return make


def _gather_holes(dtype: torch.dtype, g: G) -> tuple:
    """Empty slots in the middle of a row, and rows of x that are never read hold NaN."""
    x = randn(g, dtype, 2, 6, D_ODD)
    x[:, 5] = math.nan
    return x, torch.tensor([[4, -1, 0, -1], [-1, -1, 3, 2]])


def _gather_strided(dtype: torch.dtype, g: G) -> tuple:
    x = randn(g, dtype, 3, 13, 16)
    return x[:, 1:], split_of(g, 3, 12, "ragged")[0]


def _gather_backward(dtype: torch.dtype, g: G) -> tuple:
    ids = split_of(g, 3, 12, "ragged")[0]
    grad = randn(g, dtype, *ids.shape, D_ODD)
    return torch.where((ids < 0)[:, :, None], math.nan, grad).to(dtype), ids, 12


# ---------------------------------------------------------------- restore, pack, unpack


def _restore(batch: int, tokens: int, channels: int, kind: str, fill_dim: int, prefix: int, with_pos: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        ids_keep, _, restore, num_keep, _ = split_of(g, batch, tokens, kind)
        x = randn(g, dtype, batch, prefix + ids_keep.shape[1], channels)
        x[:, prefix:][ids_keep < 0] = math.nan  # padded slots must never be read
        fill = randn(g, dtype, *(batch, tokens, channels)[3 - fill_dim :])
        pos = randn(g, dtype, prefix + tokens, channels) if with_pos else None
        return x, restore, num_keep, fill, pos, prefix

    return make


def _restore_backward(kind: str, fill_dim: int, need: tuple[bool, bool, bool]) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        ids_keep, _, restore, num_keep, _ = split_of(g, 3, 20, kind)
        return randn(g, dtype, 3, 21, D_ODD), restore, num_keep, ids_keep.shape[1] + 2, 1, fill_dim, *need

    return make


def _pack(kind: str, extra: int) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        _, _, restore, num_keep, starts = split_of(g, 3, 12, kind)
        x = randn(g, dtype, 3, 12, D_ODD)
        x[restore >= num_keep[:, None]] = math.nan  # masked rows must never be read
        return x, restore, starts, int(starts[-1]) + extra

    return make


def _unpack(kind: str, fill_dim: int) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        _, _, restore, _, starts = split_of(g, 3, 12, kind)
        packed = randn(g, dtype, int(starts[-1]) + 1, D_ODD)
        packed[-1] = math.nan  # past the last row
        return packed, restore, starts, randn(g, dtype, *(3, 12, D_ODD)[3 - fill_dim :])

    return make


def _unpack_backward(kind: str, fill_dim: int) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        _, _, restore, _, starts = split_of(g, 3, 12, kind)
        return randn(g, dtype, 3, 12, D_ODD), restore, starts, int(starts[-1]) + 1, fill_dim, True, True

    return make


# ---------------------------------------------------------------- patches


def _patchify(size: tuple[int, ...], patch: list[int], kind: str | None, last: bool, hide: bool = False) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        tokens = math.prod(s // p for s, p in zip(size[1:], patch, strict=True))
        ids = None if kind is None else split_of(g, 2, tokens, kind)[0]
        images = randn(g, dtype, 2, *size)
        return images, ids, patch, last

    return make


def _unpatchify(size: tuple[int, ...], patch: list[int], kind: str | None, last: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        images, ids, _, _ = _patchify(size, patch, kind, last)(dtype, g)
        patches = reference.visible_tokens_patchify(images, ids, patch, last)
        return patches, ids, patch, list(size[1:]), last

    return make


def _embed(size: tuple[int, ...], patch: list[int], kind: str | None, width: int, bias: bool, pos: bool) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        images, ids, _, _ = _patchify(size, patch, kind, False)(dtype, g)
        tokens = math.prod(s // p for s, p in zip(size[1:], patch, strict=True))
        if ids is not None:  # hidden pixels must never be read
            seen = torch.zeros(2, tokens + 1).scatter_(1, torch.where(ids < 0, tokens, ids), 1.0)[:, :tokens]
            patches = reference.patches_of(images, patch)
            patches[seen == 0] = math.nan
            images = reference.images_of(patches, patch, list(size[1:])).contiguous()
        weight = randn(g, dtype, width, size[0], *patch) / math.sqrt(size[0] * math.prod(patch))
        return (
            images, weight.to(dtype), randn(g, dtype, width) if bias else None, ids,
            randn(g, dtype, tokens, width) if pos else None,
        )  # fmt: skip

    return make


def _embed_backward(size: tuple[int, ...], patch: list[int], kind: str | None, need: tuple[bool, ...]) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        images, weight, _, ids, _ = _embed(size, patch, kind, 24, False, False)(dtype, g)
        slots = math.prod(s // p for s, p in zip(size[1:], patch, strict=True)) if ids is None else ids.shape[1]
        grad = randn(g, dtype, 2, slots, 24)
        if ids is not None:
            grad[ids < 0] = math.nan
        return grad, images, weight, ids, *need

    return make


IMAGE, VIDEO, PATCH, TUBE = (3, 16, 24), (2, 4, 8, 12), [4, 8], [2, 4, 3]

SAMPLES = [
    *(Sample("visible_tokens_split", f"{k}", _split(3, 37, k)) for k in KINDS),
    Sample("visible_tokens_split", "no_rows", _split(0, 5, "none")),
    Sample("visible_tokens_split", "no_tokens", _split(2, 0, "none")),
    *(Sample("visible_tokens_gather", k, _gather(3, 12, 16, k)) for k in KINDS),
    Sample("visible_tokens_gather", "odd", _gather(2, 70, D_ODD, "ragged")),
    Sample("visible_tokens_gather", "holes", _gather_holes),
    Sample("visible_tokens_gather", "strided", _gather_strided),
    Sample("visible_tokens_gather", "no_rows", _gather(0, 4, 8, "none")),
    Sample("visible_tokens_gather", "no_channels", _gather(2, 4, 0, "none")),
    Sample("_visible_tokens_gather_backward", "ragged", _gather_backward),
    *(Sample("visible_tokens_restore", k, _restore(3, 12, 16, k, 1, 1, True)) for k in KINDS),
    *(
        Sample("visible_tokens_restore", f"fill{d}_prefix{p}", _restore(2, 20, D_ODD, "ragged", d, p, pos))
        for d, p, pos in ((1, 0, False), (2, 2, True), (3, 1, True), (3, 0, False), (2, 0, False))
    ),
    Sample("visible_tokens_restore", "no_rows", _restore(0, 4, 8, "none", 1, 1, True)),
    Sample("visible_tokens_restore", "no_tokens", _restore(2, 0, 8, "none", 1, 1, True)),
    *(
        Sample("_visible_tokens_restore_backward", f"{k}_fill{d}", _restore_backward(k, d, need))
        for k, d, need in (
            ("ragged", 1, (True, True, True)), ("ragged", 2, (True, True, True)), ("ragged", 3, (False, True, True)),
            ("all", 1, (True, True, False)), ("none", 1, (True, False, True)),
        )
    ),
    *(Sample("visible_tokens_pack", k, _pack(k, 2 * (k == "ragged"))) for k in KINDS),
    *(Sample("visible_tokens_unpack", f"{k}_fill{d}", _unpack(k, d)) for k, d in (("ragged", 1), ("equal", 2), ("all", 3))),
    *(Sample("_visible_tokens_unpack_backward", f"fill{d}", _unpack_backward("ragged", d)) for d in (1, 2, 3)),
    *(
        Sample("visible_tokens_patchify", name, _patchify(size, patch, kind, last))
        for name, size, patch, kind, last in (
            ("all_patches", IMAGE, PATCH, None, True), ("ragged", IMAGE, PATCH, "ragged", True),
            ("conv_order", IMAGE, PATCH, "equal", False), ("video", VIDEO, TUBE, "ragged", True),
            ("video_conv_order", VIDEO, TUBE, None, False), ("one_channel", (1, 6, 6), [3, 2], "equal", True),
            ("none_kept", IMAGE, PATCH, "all", True),
        )
    ),
    *(
        Sample("visible_tokens_unpatchify", name, _unpatchify(size, patch, kind, last))
        for name, size, patch, kind, last in (
            ("all_patches", IMAGE, PATCH, None, True), ("ragged", IMAGE, PATCH, "ragged", True),
            ("video", VIDEO, TUBE, "equal", False), ("conv_order", IMAGE, PATCH, None, False),
        )
    ),
    *(
        Sample("visible_tokens_embed", name, _embed(size, patch, kind, width, bias, pos))
        for name, size, patch, kind, width, bias, pos in (
            ("equal", IMAGE, PATCH, "equal", 32, True, True), ("ragged", IMAGE, PATCH, "ragged", D_ODD, True, True),
            ("all_patches", IMAGE, PATCH, None, 40, True, False), ("plain", IMAGE, [4, 3], "equal", 17, False, False),
            ("video", VIDEO, TUBE, "ragged", 24, False, True), ("none_kept", IMAGE, PATCH, "all", 16, True, True),
        )
    ),
    *(
        Sample("_visible_tokens_embed_backward", name, _embed_backward(size, patch, kind, need))
        for name, size, patch, kind, need in (
            ("all_needed", IMAGE, PATCH, "equal", (True, True, True, True)),
            ("ragged", IMAGE, [4, 3], "ragged", (False, True, True, True)),
            ("images_only", IMAGE, PATCH, "ragged", (True, False, False, False)),
            ("video", VIDEO, TUBE, None, (True, True, False, True)),
        )
    ),
]  # fmt: skip
