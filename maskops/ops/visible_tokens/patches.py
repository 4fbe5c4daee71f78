"""Cut the visible patches out of images and project them, without touching the hidden ones."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_ids, check_is_tensor, check_tensor, fail, integer, integers
from maskops._registry import OpSpec, define_op
from maskops.reference import visible_tokens as reference

INT64 = (torch.int64,)
MAX_PIXELS = 2**40  # of a patch and of an image: every product of sizes then fits into int64
PATCHIFY, UNPATCHIFY, EMBED = "patchify", "unpatchify", "embed_patches"


@public("visible_tokens_patchify")
def patchify(
    images: Tensor, patch_size: int | Sequence[int], ids: Tensor | None = None, *, channels_last_patch: bool = True,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Cut images or videos into patches, reading only the patches in ids.

        out[b, k] = flatten(images[b, :, rows and columns of patch ids[b, k]])

    Args:
        images: float [B, C, H, W], or video [B, C, T, H, W].
        patch_size: (p, q), for video (r, p, q); an int means the same along every axis. Must divide the image.
        ids: int64 [B, K] of patches in row-major order of the grid, unique in a row, -1 for an empty slot; None = all N.
        channels_last_patch: values within a patch as (p, q, c), MAE's order, else (c, p, q), a convolution weight's order.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, K, V] (N patches without ids), V = C * prod(patch_size), differentiable in images (twice).

    Notes:
        An empty slot gives a zero row. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device, a patch size that does not divide the image.  IndexError: bad ids.

    Source:
        patchify of MAE (He et al., 2021, arXiv 2111.06377).

    Example:
        >>> maskops.patchify(torch.arange(16.0).view(1, 1, 4, 4), 2, torch.tensor([[3]])).tolist()
        [[[10.0, 11.0, 14.0, 15.0]]]
    """
    check_is_tensor(PATCHIFY, "images", images)
    sizes = patch_sizes(PATCHIFY, patch_size, images.dim() - 2)
    return find_op("visible_tokens_patchify", images.device.type, backend)(images, ids, sizes, channels_last_patch)


@public("visible_tokens_unpatchify")
def unpatchify(
    patches: Tensor, patch_size: int | Sequence[int], image_size: Sequence[int], ids: Tensor | None = None, *,
    channels_last_patch: bool = True, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Put patches back into images: the inverse of patchify.

    Args:
        patches: float [B, K, V].
        patch_size: as in patchify.
        image_size: (H, W), for video (T, H, W).
        ids: int64 [B, K], where each patch goes; None = all N in order.
        channels_last_patch: as in patchify.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, C, H, W] or [B, C, T, H, W], differentiable in patches (twice).

    Notes:
        Pixels of patches that are not in ids are zero. Deterministic.

    Raises:
        ValueError: wrong dtype, shape or device, sizes that do not fit.  IndexError: bad ids.

    Source:
        unpatchify of MAE (He et al., 2021, arXiv 2111.06377).

    Example:
        >>> maskops.unpatchify(torch.tensor([[[1.0, 2.0]]]), (1, 2), (2, 2), torch.tensor([[1]])).tolist()
        [[[[0.0, 0.0], [1.0, 2.0]]]]
    """
    check_is_tensor(UNPATCHIFY, "patches", patches)
    image = integers(UNPATCHIFY, "image_size", image_size)
    sizes = patch_sizes(UNPATCHIFY, patch_size, len(image))
    return find_op("visible_tokens_unpatchify", patches.device.type, backend)(
        patches, ids, sizes, image, channels_last_patch
    )


@public(
    "visible_tokens_embed",
    native="C++ on CPU (AVX-512, AVX2, portable), on GPU the Triton kernel; float32, float64, bfloat16, float16",
)
def embed_patches(
    images: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int | Sequence[int], ids: Tensor | None = None,
    pos: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Project the visible patches: a convolution with stride = kernel, computed only where ids point.

        out[b, k] = weight . patch(images[b], ids[b, k]) + bias + pos[ids[b, k]]

    Args:
        images: float [B, C, H, W], or video [B, C, T, H, W].
        weight: [E, C, p, q] or [E, C, r, p, q], the weight of Conv2d or Conv3d; [E, V] in that order works too.
        bias: [E] or None.
        patch_size: as in patchify.
        ids: int64 [B, K], unique in a row, -1 for an empty slot; None = all N patches.
        pos: position embedding [N, E] or [1, N, E], or None.
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, K, E] in images' dtype, differentiable (once) in images, weight, bias and pos.

    Notes:
        Sums are taken in float32 (float64 for float64). An empty slot gives a zero row and no gradient. Deterministic.
        Autocast casts to its lower dtype, as for a convolution.

    Raises:
        ValueError: wrong dtype, shape or device, a patch size that does not divide the image.  IndexError: bad ids.

    Source:
        Patch embedding of ViT (Dosovitskiy et al., 2020, arXiv 2010.11929) on MAE's visible patches.

    Example:
        >>> weight, images = torch.ones(1, 1, 2, 2), torch.arange(16.0).view(1, 1, 4, 4)
        >>> maskops.embed_patches(images, weight, None, 2, torch.tensor([[3, 0]])).tolist()
        [[[50.0], [10.0]]]
    """
    check_is_tensor(EMBED, "images", images)
    check_is_tensor(EMBED, "weight", weight)
    sizes = patch_sizes(EMBED, patch_size, images.dim() - 2)
    if weight.dim() == 2:
        check_images(EMBED, images, sizes)
        values = images.shape[1] * math.prod(sizes)
        check_tensor(EMBED, "weight", weight, "[E, V]", (weight.dtype,), (None, values), weight)
        weight = weight.view(weight.shape[0], images.shape[1], *sizes)
    if list(weight.shape[2:]) != sizes:
        fail(EMBED, "weight", f"have kernel size = patch_size {sizes}", f"{list(weight.shape)}")
    if pos is not None and pos.dim() == 3 and pos.shape[0] == 1:
        pos = pos[0]
    return find_op("visible_tokens_embed", images.device.type, backend)(images, weight, bias, ids, pos)


def patch_sizes(op: str, patch_size: int | Sequence[int], axes: int) -> list[int]:
    if isinstance(patch_size, Sequence):
        return integers(op, "patch_size", patch_size)
    return [integer(op, "patch_size", patch_size)] * axes


# ---------------------------------------------------------------- checks


def check_grid(op: str, patch_size: list[int], image_size: list[int]) -> int:
    """N, the number of patches; the sizes must be two or three, positive and divide the image."""
    if len(patch_size) not in (2, 3) or len(patch_size) != len(image_size):
        fail(op, "patch_size", "have one size per image axis, (p, q) or (r, p, q)", list(patch_size))
    for patch, size in zip(patch_size, image_size, strict=True):
        if patch <= 0 or size % patch != 0:
            fail(op, "patch_size", f"be positive and divide the image size {list(image_size)}", list(patch_size))
        if size < 0:
            fail(op, "image_size", "be at least 0 along every axis", list(image_size))
    if math.prod(patch_size) > MAX_PIXELS:
        fail(op, "patch_size", "have at most 2^40 pixels", list(patch_size))
    return math.prod(size // patch for patch, size in zip(patch_size, image_size, strict=True))


def check_images(op: str, images: Tensor, patch_size: list[int], dtypes: Sequence[torch.dtype] = FLOATS) -> int:
    if images.dim() not in (4, 5):
        fail(op, "images", "have shape [B, C, H, W] or [B, C, T, H, W]", f"{images.dim()} dimensions")
    check_tensor(op, "images", images, "[B, C, ...]", dtypes, (None,) * images.dim(), images)
    return check_grid(op, patch_size, list(images.shape[2:]))


def _check_optional_ids(op: str, ids: Tensor | None, slots: int | None, like: Tensor) -> None:
    if ids is not None:
        check_tensor(op, "ids", ids, "[B, K]", INT64, (like.shape[0], slots), like)


def _check_patchify(images: Tensor, ids: Tensor | None, patch_size: list[int], channels_last_patch: bool) -> None:
    check_images(PATCHIFY, images, patch_size)
    _check_optional_ids(PATCHIFY, ids, None, images)


def _check_unpatchify(
    patches: Tensor, ids: Tensor | None, patch_size: list[int], image_size: list[int], channels_last_patch: bool
) -> None:
    tokens = check_grid(UNPATCHIFY, patch_size, image_size)
    slots = tokens if ids is None else None
    check_tensor(UNPATCHIFY, "patches", patches, "[B, K, V]", FLOATS, (None, slots, None), patches)
    _check_optional_ids(UNPATCHIFY, ids, patches.shape[1], patches)
    if patches.shape[2] % math.prod(patch_size) != 0:
        fail(UNPATCHIFY, "patches", f"have V divisible by {math.prod(patch_size)}", f"V = {patches.shape[2]}")


def _check_embed(images: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, pos: Tensor | None) -> None:
    axes = images.dim() - 2
    if weight.dim() != images.dim():
        fail(EMBED, "weight", f"have {images.dim()} dimensions, [E, C, patch]", f"{weight.dim()} dimensions")
    tokens = check_images(EMBED, images, list(weight.shape[2:]))
    sizes = (None, images.shape[1], *[None] * axes)
    check_tensor(EMBED, "weight", weight, "[E, C, patch]", (images.dtype,), sizes, images)
    if bias is not None:
        check_tensor(EMBED, "bias", bias, "[E]", (images.dtype,), (weight.shape[0],), images)
    _check_optional_ids(EMBED, ids, None, images)
    if pos is not None:
        check_tensor(EMBED, "pos", pos, "[N, E]", (images.dtype,), (tokens, weight.shape[0]), images)


def _check_embed_backward(grad: Tensor, images: Tensor, weight: Tensor, ids: Tensor | None, *need: bool) -> None:
    _check_embed(images, weight, None, ids, None)
    slots = ids.shape[1] if ids is not None else grid_tokens(images.shape[2:], weight.shape[2:])
    sizes = (images.shape[0], slots, weight.shape[0])
    check_tensor(EMBED, "grad", grad, "[B, K, E]", (images.dtype,), sizes, images)


def grid_tokens(image_size: Sequence[int], patch_size: Sequence[int]) -> int:
    return math.prod(size // patch for size, patch in zip(image_size, patch_size, strict=True))


def _check_optional_ids_data(op: str, ids: Tensor | None, image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    if ids is not None:
        check_ids(op, "ids", ids, grid_tokens(image_size, patch_size))


def _check_unpatchify_data(ids: Tensor | None, patch_size: list[int], image_size: list[int]) -> None:
    if math.prod(image_size) > MAX_PIXELS:
        fail(UNPATCHIFY, "image_size", "have at most 2^40 pixels", list(image_size))
    _check_optional_ids_data(UNPATCHIFY, ids, image_size, patch_size)


# ---------------------------------------------------------------- patchify, unpatchify


def _fake_patchify(images: Tensor, ids: Tensor | None, patch_size: list[int], channels_last_patch: bool) -> Tensor:
    slots = grid_tokens(images.shape[2:], patch_size) if ids is None else ids.shape[1]
    return images.new_empty(images.shape[0], slots, images.shape[1] * math.prod(patch_size))


def _setup_patchify(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, ids, ctx.patch_size, ctx.channels_last = inputs
    ctx.save_for_backward(ids)
    ctx.image_size = list(images.shape[2:])


def _backward_patchify(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    ids = ctx.saved_tensors[0]
    grad_images = ops.visible_tokens_unpatchify(grad, ids, ctx.patch_size, ctx.image_size, ctx.channels_last)
    return grad_images, None, None, None


def _fake_unpatchify(
    patches: Tensor, ids: Tensor | None, patch_size: list[int], image_size: list[int], channels_last_patch: bool
) -> Tensor:
    return patches.new_empty(patches.shape[0], patches.shape[2] // math.prod(patch_size), *image_size)


def _setup_unpatchify(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids, ctx.patch_size, _, ctx.channels_last = inputs
    ctx.save_for_backward(ids)


def _backward_unpatchify(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    grad_patches = ops.visible_tokens_patchify(grad, ctx.saved_tensors[0], ctx.patch_size, ctx.channels_last)
    return grad_patches, None, None, None, None


define_op(
    OpSpec(
        "visible_tokens_patchify(Tensor images, Tensor? ids, SymInt[] patch_size, bool channels_last_patch=True) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_patchify,
        check=_check_patchify,
        check_data=lambda images, ids, patch, last: _check_optional_ids_data(PATCHIFY, ids, images.shape[2:], patch),
        fake=_fake_patchify,
        setup=_setup_patchify,
        backward=_backward_patchify,
    )
)
define_op(
    OpSpec(
        "visible_tokens_unpatchify(Tensor patches, Tensor? ids, SymInt[] patch_size, SymInt[] image_size,"
        " bool channels_last_patch=True) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_unpatchify,
        check=_check_unpatchify,
        check_data=lambda patches, ids, patch, size, last: _check_unpatchify_data(ids, patch, size),
        fake=_fake_unpatchify,
        setup=_setup_unpatchify,
        backward=_backward_unpatchify,
    )
)

# ---------------------------------------------------------------- embed


def _fake_embed(images: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, pos: Tensor | None) -> Tensor:
    slots = grid_tokens(images.shape[2:], weight.shape[2:]) if ids is None else ids.shape[1]
    return images.new_empty(images.shape[0], slots, weight.shape[0])


def _setup_embed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, weight, _, ids, _ = inputs
    ctx.save_for_backward(images, weight, ids)


def _backward_embed(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    need = [ctx.needs[i] for i in (0, 1, 2, 4)]
    grads = ops._visible_tokens_embed_backward(grad, *ctx.saved_tensors, *need)
    images, weight, bias, pos = (g if n else None for g, n in zip(grads, need, strict=True))
    return images, weight, bias, None, pos


def _fake_embed_backward(
    grad: Tensor, images: Tensor, weight: Tensor, ids: Tensor | None,
    need_images: bool, need_weight: bool, need_bias: bool, need_pos: bool,
) -> tuple:  # fmt: skip
    pos_shape = (grid_tokens(images.shape[2:], weight.shape[2:]), weight.shape[0])
    return (
        grad.new_empty(images.shape if need_images else 0),
        grad.new_empty(weight.shape if need_weight else 0),
        grad.new_empty(weight.shape[0] if need_bias else 0),
        grad.new_empty(pos_shape if need_pos else 0),
    )


define_op(
    OpSpec(
        "visible_tokens_embed(Tensor images, Tensor weight, Tensor? bias=None, Tensor? ids=None, Tensor? pos=None) -> Tensor",
        family="visible_tokens",
        reference=reference.visible_tokens_embed,
        check=_check_embed,
        check_data=lambda images, weight, bias, ids, pos: _check_optional_ids_data(
            EMBED, ids, images.shape[2:], weight.shape[2:]
        ),
        fake=_fake_embed,
        setup=_setup_embed,
        backward=_backward_embed,
        cuda=False,
        autocast="lower",
    )
)
define_op(
    OpSpec(
        "_visible_tokens_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? ids, bool need_images,"
        " bool need_weight, bool need_bias, bool need_pos)"
        " -> (Tensor grad_images, Tensor grad_weight, Tensor grad_bias, Tensor grad_pos)",
        family="visible_tokens",
        reference=reference._visible_tokens_embed_backward,
        check=_check_embed_backward,
        check_data=lambda grad, images, weight, ids, *need: _check_optional_ids_data(
            EMBED, ids, images.shape[2:], weight.shape[2:]
        ),
        fake=_fake_embed_backward,
        cuda=False,
    )
)
