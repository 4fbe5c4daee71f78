"""Laws on a grid of patches or voxels: rectangles, cells, tubes, frequencies, sectors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_is_dense, check_tensor, fail, finite, number
from maskops.ops.mask_sampling import arguments as given
from maskops.ops.mask_sampling.scores import NATIVE, TRITON
from maskops.ops.mask_sampling.uniform import Seed
from maskops.ops.visible_tokens.split import TokenSplit

TABLE = 1024  # entries: a uniform number of the laws below is taken from so many


@given.table
def _shapes(aspect: float, device: torch.device) -> Tensor:
    """int32 [TABLE, 2]: sqrt(height / width) and its inverse, 14 bits after the point, log-uniform in [aspect, 1 / aspect]."""
    at = [math.exp(math.log(aspect) * (0.5 - (i + 0.5) / TABLE)) for i in range(TABLE)]
    return torch.tensor([[round(s * 2**14), round(2**14 / s)] for s in at], dtype=torch.int32, device=device)


@public("mask_sampling_blocks", native=NATIVE, triton=TRITON)
def block_masking(
    B: int, grid: Sequence[int], num_mask: int, *, smallest: int = 4, largest: int | None = None, aspect: float = 0.3,
    tries: int = 10, exact: bool = True, seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Mask rectangles of patches, of any overlap, until exactly num_mask of each image are masked.

        while some are left:  area ~ U(smallest, left);  h / w ~ exp U(log aspect, -log aspect), rounded, less than the grid's;
            a uniform place;  taken if it masks 1 to `left` patches more; the first that fits of `tries` draws
        if none of them fits: what is left is drawn from the unmasked patches one by one

    Args:
        B, grid: images, patches along height and width, at most 64 each.
        num_mask: of every image, in [0, h w].
        smallest, largest: area of a rectangle before it is rounded; largest replaces `left` where it is less.
        aspect: in [0.001, 1], of 1024 equally likely shapes. smallest, aspect and tries are CAE's by default; BEiT: smallest 16.
        tries: in [1, 1000].
        exact: False stops where no rectangle fits, as BEiT does: num_mask is then an upper bound.
        seed, generator, device: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit, ids ascending; nothing in it is differentiable.

    Notes:
        Areas and shapes are whole numbers of 32 and 14 bits after the point: the same masks on every backend.

    Raises:
        ValueError: an argument out of range.

    Source:
        Bao et al., BEiT, 2021 (arXiv 2106.08254); exact count: Chen et al., Context Autoencoder, 2022 (arXiv 2202.03026).

    Example:
        >>> split = maskops.block_masking(2, (14, 14), 98, seed=0)
        >>> split.num_mask.tolist()
        [98, 98]
    """
    name = "block_masking"
    B, (h, w) = given.size(name, "B", B), given.grid_of(name, grid)
    num_mask = given.size(name, "num_mask", num_mask, 0, h * w)
    aspect, exact = number(name, "aspect", aspect), boolean(name, "exact", exact)
    if not 0.001 <= aspect <= 1:
        fail(name, "aspect", "be in [0.001, 1]", aspect)
    sizes = [given.size(name, "smallest", smallest), given.size(name, "largest", 4096 if largest is None else largest)]
    where = given.where(name, device, seed, generator)
    op = find_op("mask_sampling_blocks", where.type, backend, name)
    counts = torch.full((B,), num_mask, dtype=torch.int64, device=where)
    seed = given.seed_of(name, seed, generator, where)
    mask = op(seed, counts, _shapes(given.fixed(aspect), where), h, w, *sizes, given.size(name, "tries", tries), exact)
    return given.rows_split(mask, h * w - num_mask if exact else None, backend)


class MultiBlock(NamedTuple):
    """What multiblock_masking draws.

    targets: bool [B, T, N], the patches of each target block; context: bool [B, N], what the context encoder sees, none of them a
    target's. split: the TokenSplit that keeps the context.
    """

    targets: Tensor
    context: Tensor
    split: TokenSplit


@given.table
def _block_sizes(h: int, w: int, device: torch.device, *numbers: float) -> Tensor:
    """int32 [2, TABLE, 2], height and width of targets and contexts; numbers: (scale from, to, aspect from, to) of both.

    One uniform number drives scale and aspect, as in the published code.
    """
    sizes: list[list[list[int]]] = [[], []]
    for found, low, high, narrow, wide in zip(sizes, *(numbers[i::4] for i in range(4)), strict=True):
        for i in range(TABLE):
            at = (i + 0.5) / TABLE
            area, ratio = int(h * w * (low + at * (high - low))), narrow + at * (wide - narrow)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            found.append([max(1, min(height, h - 1)), max(1, min(width, w - 1))])
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def _range_of(name: str, arg: str, pair: object, low: float, high: float) -> tuple[float, float]:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name}: {arg} must be two numbers, got {pair!r}")
    a, b = number(name, arg, pair[0]), number(name, arg, pair[1])
    if not low <= a <= b <= high:
        fail(name, arg, f"be two ascending numbers in [{low:g}, {high:g}]", pair)
    return a, b


@public("mask_sampling_multiblock", native=NATIVE, triton=TRITON)
def multiblock_masking(
    B: int, grid: Sequence[int], *, targets: int = 4, target_scale: Sequence[float] = (0.15, 0.2),
    target_aspect: Sequence[float] = (0.75, 1.5), context_scale: Sequence[float] = (0.85, 1.0),
    context_aspect: Sequence[float] = (1.0, 1.0), min_keep: int = 10, shared_sizes: bool = True, seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, backend: str = "auto",
) -> MultiBlock:  # fmt: skip
    """Draw target blocks, and a large context block without them: I-JEPA's masks.

        u ~ U(0, 1);  area = int(h w scale(u));  height, width = round(sqrt(area aspect(u))), round(sqrt(area / aspect(u)))
        targets at uniform places;  context = its own block minus all targets, drawn again until more than min_keep are left

    Args:
        B, grid: images, patches along height and width, 2 to 64 each.
        targets: target blocks of an image, 1 to 64.
        target_scale, target_aspect, context_scale, context_aspect: from and to; share of the grid in [1e-6, 1], height over width.
        min_keep: what a context must have more of.
        shared_sizes: one size of the targets and one of the contexts for all images, so that rows are equally long, as published.
        seed, generator, device: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        MultiBlock; nothing in it is differentiable. The split is ragged: published code cuts contexts to the shortest.

    Notes:
        u is one of 1024 equally likely numbers. As published, corners are below h - height and w - width,
        so no block reaches the last row or column. After 20 contexts that keep too little, one target less is left out of the next.

    Raises:
        ValueError: an argument out of range.

    Source:
        I-JEPA (Assran et al., 2023, arXiv 2301.08243); DMT-JEPA (Mo and Yun, 2024, arXiv 2405.17995).

    Example:
        >>> masks = maskops.multiblock_masking(2, (14, 14), seed=0)
        >>> masks.targets.shape, bool((masks.targets & masks.context[:, None]).any())
        (torch.Size([2, 4, 196]), False)
    """
    name = "multiblock_masking"
    B, (h, w) = given.size(name, "B", B), given.grid_of(name, grid)
    if min(h, w) < 2:
        fail(name, "grid", "be at least 2 x 2", (h, w))
    scales = [
        _range_of(name, "target_scale", target_scale, 1e-6, 1),
        _range_of(name, "context_scale", context_scale, 1e-6, 1),
    ]
    aspects = [
        _range_of(name, "target_aspect", target_aspect, 0.01, 100),
        _range_of(name, "context_aspect", context_aspect, 0.01, 100),
    ]
    where = given.where(name, device, seed, generator)
    op = find_op("mask_sampling_multiblock", where.type, backend, name)
    numbers = [given.fixed(x) for s, a in zip(scales, aspects, strict=True) for x in (*s, *a)]
    sizes = _block_sizes(len(range(h)), len(range(w)), where, *numbers)
    seed = given.seed_of(name, seed, generator, where)
    counts = given.size(name, "targets", targets), given.size(name, "min_keep", min_keep)
    found, kept = op(seed, sizes[0], sizes[1], B, h, w, *counts, boolean(name, "shared_sizes", shared_sizes))
    split = ragged_split(~kept, h * w, backend)
    return MultiBlock(found, kept, split)


def ragged_split(mask: Tensor, bound: int, backend: str) -> TokenSplit:
    """A ragged split whose widths need no question to the device."""
    from maskops.ops.visible_tokens.split import split_tokens

    return split_tokens(mask, max_seqlen=bound, max_masked=bound, backend=backend)


def cell_masking(
    B: int, grid: Sequence[int], cell: int | Sequence[int], mask_ratio: float | None = None, *,
    num_keep: int | None = None, rounding: str = "floor", seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Mask whole cells of patches, a uniformly random subset of them.

        cells = random_masking(B, N / patches of a cell, ...);  a patch is masked where its cell is

    Args:
        B, grid: images; patches along height and width.
        cell: patches along a cell's height and width; they divide the grid's.
        mask_ratio: share of masked cells; kept cells = floor, round or ceil of (1 - mask_ratio) cells.
        num_keep: instead of mask_ratio: cells that stay visible.
        rounding: "floor" (SimMIM, which masks ceil(ratio cells)), "round" (SparK) or "ceil".
        seed, generator, device, backend: as in random_masking.

    Returns:
        TokenSplit of the N patches, ids ascending; nothing in it is differentiable.

    Notes:
        Every image keeps the same number. The kept cells are those of random_masking of the cells with the same seed.

    Raises:
        ValueError: a cell that does not divide the grid, a count out of range.

    Source:
        SimMIM (Xie et al., 2021, arXiv 2111.09886); SparK (Tian et al., 2023, arXiv 2301.03580).

    Example:
        >>> split = maskops.cell_masking(1, (4, 4), 2, 0.75, seed=0)
        >>> split.ids_keep.tolist()
        [[0, 1, 4, 5]]
    """
    name = "cell_masking"
    B, (h, w) = given.size(name, "B", B), given.grid_of(name, grid)
    ch, cw = given.grid_of(name, cell, "cell") if isinstance(cell, Sequence) else [given.size(name, "cell", cell)] * 2
    if not ch or not cw or h % ch or w % cw:
        fail(name, "cell", f"divide the grid {h} x {w}", (ch, cw))
    given.check_tokens(name, "grid[0] grid[1]", h * w)
    cells = (h // ch) * (w // cw)
    keep = given.kept_of(name, cells, mask_ratio, num_keep, rounding)
    where = given.where(name, device, seed, generator)
    seed = given.seed_of(name, seed, generator, where)
    return given.shuffled(seed, B, cells, keep, "ascending", backend, name, cells=(max(w // cw, 1), ch, cw))


def tube_masking(
    B: int, frames: int, N: int, mask_ratio: float | None = None, *, num_keep: int | None = None,
    rounding: str = "floor", seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Mask the same patches in every frame of a video.

        one = random_masking(B, N, ...);  token t N + n is masked where patch n is

    Args:
        B, frames, N: videos, frames of tokens, patches of a frame.
        mask_ratio: share of masked patches of a frame.
        num_keep: instead of mask_ratio: patches of a frame that stay visible.
        rounding: "floor", "round" or "ceil" of the kept ones.
        seed, generator, device, backend: as in random_masking.

    Returns:
        TokenSplit of the frames * N tokens, ids ascending; nothing in it is differentiable.

    Notes:
        The patches are those of random_masking with the same seed.

    Raises:
        ValueError: a count out of range.

    Source:
        VideoMAE (Tong et al., 2022, arXiv 2203.12602).

    Example:
        >>> maskops.tube_masking(1, 2, 4, num_keep=1, seed=0).ids_keep.tolist()
        [[0, 4]]
    """
    name = "tube_masking"
    B, frames, N = given.size(name, "B", B), given.size(name, "frames", frames), given.size(name, "N", N)
    given.check_tokens(name, "N", N)
    given.check_tokens(name, "frames N", frames * N)
    keep = given.kept_of(name, N, mask_ratio, num_keep, rounding)
    where = given.where(name, device, seed, generator)
    seed = given.seed_of(name, seed, generator, where)
    # Patches are cells of one line, a frame each of its lines.
    return given.shuffled(seed, B, N, keep, "ascending", backend, name, cells=(max(N, 1), frames, 1))


def frequency_masking(
    B: int, size: Sequence[int], radius: float, *, low_share: float = 0.5, seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Choose for each image whether its high or its low frequencies are masked.

        low = (y - h // 2)^2 + (x - w // 2)^2 < radius^2, of the shifted spectrum;  masked = ~low with chance low_share, else low

    Args:
        B, size: images; height and width of the spectrum, zero frequency at (h // 2, w // 2) as fftshift puts it.
        radius: of the low frequencies.
        low_share: chance of an image to keep its low frequencies.
        seed, generator, device: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        bool [B, h, w], True = masked.

    Notes:
        MFM: radius 16 of 224, low_share 0.5 for ViT and 0.3 for ResNet-50.

    Raises:
        ValueError: an argument out of range.

    Source:
        Masked Frequency Modeling (Xie et al., 2022, arXiv 2206.07706).

    Example:
        >>> maskops.frequency_masking(2, (8, 8), 2.0, low_share=1.0).sum((1, 2)).tolist()
        [55, 55]
    """
    name = "frequency_masking"
    B, (h, w) = given.size(name, "B", B), given.grid_of(name, size, "size")
    radius, low_share = number(name, "radius", radius), given.share(name, "low_share", low_share)
    if not radius >= 0:
        fail(name, "radius", "be at least 0", radius)
    where = given.where(name, device, seed, generator)
    threshold = torch.full((1, 1), given.threshold_of(low_share), dtype=torch.int64, device=where)
    op = find_op("mask_sampling_bernoulli", where.type, backend, name)
    keep_low = op(given.seed_of(name, seed, generator, where), threshold, B, 1)[:, :, None]
    y, x = torch.arange(h, device=where) - h // 2, torch.arange(w, device=where) - w // 2
    return keep_low ^ ((y * y)[:, None] + x * x < radius * radius)


def sector_groups(
    points: Tensor, sectors: int, *, rings: int = 1, max_radius: float | None = None, valid: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Tell which sector, and which ring, around the origin each point is in: groups for group_masking.

        sector = floor(sectors * azimuth / 2 pi), azimuth = atan2(y, x) in [0, 2 pi);  ring = floor(rings * |(x, y)| / max_radius)
        group = ring * sectors + sector

    Args:
        points: float [B, P, 2 or more], x and y first, relative to the sensor.
        sectors: of the full circle.
        rings: of equal width, up to max_radius; what lies beyond is in the last.
        max_radius: needed for rings above 1.
        valid: bool [B, P]; other points are in no group, -1.

    Returns:
        int64 [B, P], in [-1, rings * sectors).

    Notes:
        atan2 may differ in its last bit between devices: a point on an edge may then be in the next sector. A NaN is in no group.

    Raises:
        ValueError: wrong points, sectors or rings below 1, rings without max_radius.

    Source:
        R-MAE (Tayebati et al., 2024, arXiv 2406.07833); its code measures angles from the grid's corner, this from the sensor.

    Example:
        >>> maskops.sector_groups(torch.tensor([[[1.0, 0.5], [-1.0, 0.5], [-1.0, -0.5], [1.0, -0.5]]]), 4).tolist()
        [[0, 1, 2, 3]]
    """
    name = "sector_groups"
    check_is_dense(name, "points", points)
    if points.dim() != 3 or points.shape[2] < 2 or points.dtype not in FLOATS:
        fail(name, "points", "be a float tensor [B, P, 2 or more]", f"{points.dtype} {list(points.shape)}")
    sectors, rings = given.size(name, "sectors", sectors, 1), given.size(name, "rings", rings, 1)
    if rings > 1 and (max_radius is None or not finite(name, "max_radius", max_radius) > 0):
        fail(name, "max_radius", "be above 0 for more than one ring", max_radius)
    if valid is not None:
        check_tensor(name, "valid", valid, "[B, P]", (torch.bool,), points.shape[:2], points)
    # Half precision has fewer numbers than a circle may have sectors.
    points = points if points.dtype == torch.float64 else points.float()
    # Contiguous: torch's atan2 makes vectors of such numbers only, 20 times as fast.
    x, y = points[..., 0].contiguous(), points[..., 1].contiguous()
    angle = torch.atan2(y, x) / (2 * math.pi)
    group = ((angle - angle.floor()) * sectors).nan_to_num(-1.0).long().clamp(max=sectors - 1)
    if rings > 1:
        far = (torch.hypot(x, y) * rings / max_radius).nan_to_num(0.0).clamp(max=rings - 1).long()
        group = torch.where(group < 0, -1, group + far * sectors)
    return group if valid is None else torch.where(valid, group, -1)
