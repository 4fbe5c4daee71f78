"""Calls of visible_tokens's public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

import maskops
from maskops.testing.calls._shared import DIM, tokens


def case_split(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda m: maskops.split_tokens(m, max_seqlen=m.shape[1]).ids_keep, (tokens(batch, count)[1].mask,)


def case_gather(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    return maskops.gather_tokens, (x.requires_grad_(), split.ids_keep)


def case_restore(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    kept, pos = maskops.gather_tokens(x, split.ids_keep), torch.randn(count, DIM).requires_grad_()
    fill = torch.randn(DIM, requires_grad=True)
    return lambda k, s, f, p: maskops.restore_tokens(k, s, f, pos=p), (kept.requires_grad_(), split, fill, pos)


def case_pack(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    return lambda x, s: maskops.pack_tokens(x, s, total=s.total), (x.requires_grad_(), split)


def case_unpack(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    packed = maskops.pack_tokens(x, split).requires_grad_()
    return maskops.unpack_tokens, (packed, split, torch.randn(DIM, requires_grad=True))


def images_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16).requires_grad_()


def case_patchify(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda i, ids: maskops.patchify(i, 4, ids), (images_of(batch), tokens(batch, 16)[1].ids_keep)


def case_unpatchify(batch: int, count: int) -> tuple[Callable, tuple]:
    patches = torch.randn(batch, 4, 48, requires_grad=True)
    return lambda p, ids: maskops.unpatchify(p, 4, (16, 16), ids), (patches, tokens(batch, 16)[1].ids_keep)


def case_embed(batch: int, count: int) -> tuple[Callable, tuple]:
    weight, bias, pos = torch.randn(DIM, 3, 4, 4), torch.randn(DIM), torch.randn(16, DIM)
    leaves = [t.requires_grad_() for t in (weight, bias, pos)]
    args = (images_of(batch), *leaves, tokens(batch, 16)[1].ids_keep)
    return lambda i, w, b, p, ids: maskops.embed_patches(i, w, b, 4, ids, p), args


CALLS = {
    "split_tokens": case_split,
    "gather_tokens": case_gather,
    "restore_tokens": case_restore,
    "pack_tokens": case_pack,
    "unpack_tokens": case_unpack,
    "patchify": case_patchify,
    "unpatchify": case_unpatchify,
    "embed_patches": case_embed,
}
AUTOCAST = {
    "gather_tokens": torch.float32,
    "restore_tokens": torch.float32,
    "pack_tokens": torch.float32,
    "unpack_tokens": torch.float32,
    "patchify": torch.float32,
    "unpatchify": torch.float32,
    "embed_patches": torch.bfloat16,
}
