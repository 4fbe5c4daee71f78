"""The least bytes and flops of the ops of visible_tokens."""

import math

from torch import Tensor


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _gather_bytes(x: Tensor, ids: Tensor) -> int:
    kept = int((ids >= 0).sum())
    return size_of(ids) + (kept + ids.numel()) * x.shape[2] * x.element_size()


def _gather_backward_bytes(grad: Tensor, ids: Tensor, tokens: int) -> int:
    row = grad.shape[2] * grad.element_size()
    return size_of(ids) + (int((ids >= 0).sum()) + grad.shape[0] * tokens) * row


def _restore_bytes(x: Tensor, restore: Tensor, num_keep: Tensor, fill: Tensor, pos: Tensor | None, prefix: int) -> int:
    row = x.shape[2] * x.element_size()
    rows = int(num_keep.sum()) + x.shape[0] * prefix
    out = x.shape[0] * (prefix + restore.shape[1])
    return size_of(restore, num_keep, fill, pos) + (rows + out) * row


def _restore_backward_bytes(
    grad: Tensor, restore: Tensor, num_keep: Tensor, slots: int, prefix: int, *rest: int
) -> int:
    row = grad.shape[2] * grad.element_size()
    fill_rows = (1, restore.shape[1], restore.numel())[rest[0] - 1]
    written = rest[1] * grad.shape[0] * (prefix + slots) + rest[2] * fill_rows + rest[3] * grad.shape[1]
    return size_of(restore, num_keep, grad) + written * row


def _pack_bytes(x: Tensor, restore: Tensor, starts: Tensor, total: int) -> int:
    return size_of(restore, starts) + (int(starts[-1]) + total) * x.shape[2] * x.element_size()


def _unpack_bytes(packed: Tensor, restore: Tensor, starts: Tensor, fill: Tensor) -> int:
    row = packed.shape[1] * packed.element_size()
    return size_of(restore, starts, fill) + (int(starts[-1]) + restore.numel()) * row


def _patch_bytes(x: Tensor, ids: Tensor | None, *rest: object) -> int:
    if ids is None:
        return 2 * size_of(x)
    patch = rest[0]
    values = x.shape[1] * math.prod(patch) if x.dim() > 3 else x.shape[2]
    return size_of(ids) + 2 * ids.numel() * values * x.element_size()


def _embed_bytes(images: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, pos: Tensor | None) -> int:
    slots = ids.numel() if ids is not None else images.numel() // math.prod(weight.shape[1:])
    rows = slots * (math.prod(weight.shape[1:]) + weight.shape[0])
    return size_of(ids, weight, bias, pos) + rows * images.element_size()


def embed_flops(images: Tensor, weight: Tensor, ids: Tensor | None) -> int:
    slots = ids.numel() if ids is not None else images.numel() // math.prod(weight.shape[1:])
    return 2 * slots * weight.numel()


TRAFFIC = {
    "visible_tokens_split": lambda mask, k, m: size_of(mask) + 8 * mask.shape[0] * (k + m + mask.shape[1] + 1),
    "visible_tokens_gather": _gather_bytes,
    "_visible_tokens_gather_backward": _gather_backward_bytes,
    "visible_tokens_restore": _restore_bytes,
    "_visible_tokens_restore_backward": _restore_backward_bytes,
    "visible_tokens_pack": _pack_bytes,
    "visible_tokens_unpack": _unpack_bytes,
    "visible_tokens_patchify": _patch_bytes,
    "visible_tokens_unpatchify": _patch_bytes,
    "visible_tokens_embed": _embed_bytes,
}
