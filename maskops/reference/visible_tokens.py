"""Reference of the family visible_tokens: B batch, N tokens, K kept slots, P prefix tokens, D channels, V values per patch."""

import math

import torch
from einops import rearrange
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float32, in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- split


def visible_tokens_split(mask: Tensor, max_keep: int, max_mask: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_keep = (~mask).sum(1)
    slot = torch.where(mask, num_keep[:, None] + mask.cumsum(1) - 1, (~mask).cumsum(1) - 1)
    ids_keep = ids_of_slots(slot, torch.zeros_like(num_keep), num_keep, max_keep)
    ids_mask = ids_of_slots(slot, num_keep, mask.sum(1), max_mask)
    return ids_keep, ids_mask, slot, num_keep, exclusive_cumsum(num_keep)


def ids_of_slots(slot: Tensor, first: Tensor, count: Tensor, width: int) -> Tensor:
    """ids [B, width]: the token that has slot first + k, for k < count, then -1.  slot [B, N], first [B], count [B]."""
    batch, tokens = slot.shape
    token_at = slot.argsort(1)
    k = torch.arange(width, device=slot.device).expand(batch, width)
    wanted = (first[:, None] + k).clamp(max=max(tokens - 1, 0))
    ids = token_at.gather(1, wanted) if tokens else torch.full_like(k, -1)
    return torch.where(k < count[:, None], ids, -1)


def exclusive_cumsum(counts: Tensor) -> Tensor:
    """int32 [B + 1] from counts [B]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


# ---------------------------------------------------------------- gather


def visible_tokens_gather(x: Tensor, ids: Tensor) -> Tensor:
    batch, _, channels = x.shape
    if x.shape[1] == 0:
        return x.new_zeros(batch, ids.shape[1], channels)
    rows = x.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, channels))
    return torch.where((ids >= 0)[:, :, None], rows, 0)


def _visible_tokens_gather_backward(grad: Tensor, ids: Tensor, N: int) -> Tensor:
    batch, _, channels = grad.shape
    b, k = torch.nonzero(ids >= 0, as_tuple=True)
    grad_x = grad.new_zeros(batch, N, channels)
    grad_x[b, ids[b, k]] = grad[b, k]
    return grad_x


# ---------------------------------------------------------------- restore


def visible_tokens_restore(
    x_keep: Tensor, ids_restore: Tensor, num_keep: Tensor, fill: Tensor, pos: Tensor | None = None, prefix: int = 0
) -> Tensor:
    batch, tokens = ids_restore.shape
    visible = (ids_restore < num_keep[:, None])[:, :, None]
    kept = visible_tokens_gather(x_keep[:, prefix:], torch.where(visible[:, :, 0], ids_restore, -1))
    body = torch.where(visible, kept, fill.expand(batch, tokens, x_keep.shape[2]))
    out = torch.cat([x_keep[:, :prefix], body], 1)
    if pos is None:
        return out
    acc = accumulation_dtype(out.dtype)
    return (out.to(acc) + pos.to(acc)).to(out.dtype)


def _visible_tokens_restore_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: Tensor, num_slots: int, prefix: int, fill_dim: int,
    need_x: bool, need_fill: bool, need_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, channels = grad.shape
    grad_x = grad_fill = grad_pos = grad.new_empty(0)
    visible = ids_restore < num_keep[:, None]
    body = grad[:, prefix:]
    if need_x:
        b, n = torch.nonzero(visible, as_tuple=True)
        grad_x = grad.new_zeros(batch, prefix + num_slots, channels)
        grad_x[:, :prefix] = grad[:, :prefix]
        grad_x[b, prefix + ids_restore[b, n]] = body[b, n]
    if need_fill:
        grad_fill = sum_fill(torch.where(visible[:, :, None], 0, body), fill_dim)
    if need_pos:
        grad_pos = grad.sum(0, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype)
    return grad_x, grad_fill, grad_pos


def sum_fill(grad: Tensor, fill_dim: int) -> Tensor:
    """Reduce the gradient [B, N, D] of the filled rows to the shape of fill: [D], [N, D] or [B, N, D]."""
    if fill_dim == 3:
        return grad.clone()
    return grad.sum([0, 1] if fill_dim == 1 else [0], dtype=accumulation_dtype(grad.dtype)).to(grad.dtype)


# ---------------------------------------------------------------- pack, unpack


def packed_rows(ids_restore: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """visible [B, N] and the packed row of every visible token [B, N] (meaningless where not visible)."""
    start = cu_seqlens[:-1, None].long()
    count = (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
    return ids_restore < count, start + ids_restore


def visible_tokens_pack(x: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    visible, row = packed_rows(ids_restore, cu_seqlens)
    packed = x.new_zeros(total, x.shape[2])
    packed[row[visible]] = x[visible]
    return packed


def visible_tokens_unpack(packed: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, fill: Tensor) -> Tensor:
    visible, row = packed_rows(ids_restore, cu_seqlens)
    out = fill.expand(*ids_restore.shape, packed.shape[1]).clone()
    out[visible] = packed[row[visible]]
    return out


def _visible_tokens_unpack_backward(
    grad: Tensor, ids_restore: Tensor, cu_seqlens: Tensor, total: int, fill_dim: int, need_packed: bool, need_fill: bool
) -> tuple[Tensor, Tensor]:
    grad_packed = grad_fill = grad.new_empty(0)
    if need_packed:
        grad_packed = visible_tokens_pack(grad, ids_restore, cu_seqlens, total)
    if need_fill:
        visible, _ = packed_rows(ids_restore, cu_seqlens)
        grad_fill = sum_fill(torch.where(visible[:, :, None], 0, grad), fill_dim)
    return grad_packed, grad_fill


# ---------------------------------------------------------------- patches


def patches_of(images: Tensor, patch_size: list[int], channels_last_patch: bool = True) -> Tensor:
    """All patches [B, N, V] of images [B, C, H, W] or videos [B, C, T, H, W]."""
    order = "{p} c" if channels_last_patch else "c {p}"
    if len(patch_size) == 2:
        p, q = patch_size
        return rearrange(images, f"b c (h p) (w q) -> b (h w) ({order.format(p='p q')})", p=p, q=q)
    r, p, q = patch_size
    return rearrange(images, f"b c (t r) (h p) (w q) -> b (t h w) ({order.format(p='r p q')})", r=r, p=p, q=q)


def images_of(
    patches: Tensor, patch_size: list[int], image_size: list[int], channels_last_patch: bool = True
) -> Tensor:
    """The inverse of patches_of."""
    order = "{p} c" if channels_last_patch else "c {p}"
    grid = [size // patch for size, patch in zip(image_size, patch_size, strict=True)]
    channels = patches.shape[2] // math.prod(patch_size)
    if len(patch_size) == 2:
        pattern = f"b (h w) ({order.format(p='p q')}) -> b c (h p) (w q)"
        return rearrange(patches, pattern, c=channels, h=grid[0], w=grid[1], p=patch_size[0], q=patch_size[1])
    pattern = f"b (t h w) ({order.format(p='r p q')}) -> b c (t r) (h p) (w q)"
    sizes = dict(zip("thw", grid, strict=True)) | dict(zip("rpq", patch_size, strict=True))
    return rearrange(patches, pattern, c=channels, **sizes)


def visible_tokens_patchify(
    images: Tensor, ids: Tensor | None, patch_size: list[int], channels_last_patch: bool = True
) -> Tensor:
    patches = patches_of(images, patch_size, channels_last_patch)
    return patches.contiguous().clone() if ids is None else visible_tokens_gather(patches, ids)


def visible_tokens_unpatchify(
    patches: Tensor, ids: Tensor | None, patch_size: list[int], image_size: list[int], channels_last_patch: bool = True
) -> Tensor:
    if ids is not None:
        tokens = math.prod(size // patch for size, patch in zip(image_size, patch_size, strict=True))
        patches = _visible_tokens_gather_backward(patches, ids, tokens)
    return images_of(patches, patch_size, image_size, channels_last_patch).clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- embed


def visible_tokens_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, ids: Tensor | None = None, pos: Tensor | None = None
) -> Tensor:
    acc = accumulation_dtype(images.dtype)
    patches = visible_tokens_patchify(images, ids, list(weight.shape[2:]), channels_last_patch=False)
    out = patches.to(acc) @ weight.flatten(1).to(acc).T
    if bias is not None:
        out = out + bias.to(acc)
    if pos is not None:
        rows = pos.to(acc).expand(images.shape[0], -1, -1)
        out = out + (rows if ids is None else visible_tokens_gather(rows, ids))
    if ids is not None:
        out = torch.where((ids >= 0)[:, :, None], out, 0)
    return out.to(images.dtype)


def _visible_tokens_embed_backward(
    grad: Tensor, images: Tensor, weight: Tensor, ids: Tensor | None,
    need_images: bool, need_weight: bool, need_bias: bool, need_pos: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc, patch_size = accumulation_dtype(grad.dtype), list(weight.shape[2:])
    grad_images = grad_weight = grad_bias = grad_pos = grad.new_empty(0)
    out_grad = grad.to(acc)
    if ids is not None:
        out_grad = torch.where((ids >= 0)[:, :, None], out_grad, 0)
    if need_images:
        grad_patches = (out_grad @ weight.flatten(1).to(acc)).to(grad.dtype)
        grad_images = visible_tokens_unpatchify(grad_patches, ids, patch_size, list(images.shape[2:]), False)
    if need_weight:
        patches = visible_tokens_patchify(images, ids, patch_size, channels_last_patch=False).to(acc)
        grad_weight = (out_grad.flatten(0, 1).T @ patches.flatten(0, 1)).view(weight.shape).to(grad.dtype)
    if need_bias:
        grad_bias = out_grad.sum([0, 1]).to(grad.dtype)
    if need_pos:
        tokens = math.prod(size // patch for size, patch in zip(images.shape[2:], patch_size, strict=True))
        spread = out_grad if ids is None else _visible_tokens_gather_backward(out_grad, ids, tokens)
        grad_pos = spread.sum(0).to(grad.dtype)
    return grad_images, grad_weight, grad_bias, grad_pos
