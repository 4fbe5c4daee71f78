"""Laws that rank a score per token: weighted without replacement, guided by a loss, coloured noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import fail, number
from maskops.ops.mask_sampling import arguments as given
from maskops.ops.mask_sampling.uniform import Seed
from maskops.ops.visible_tokens.split import TokenSplit

NATIVE = "C++ on CPU (AVX-512, AVX2, portable) and CUDA C++, whole numbers"
TRITON = "CUDA, ROCm and XPU, whole numbers"


@public("mask_sampling_race", native=NATIVE, triton=TRITON)
def weighted_masking(
    weight: Tensor, mask_ratio: float | None = None, *, num_keep: int | None = None, rounding: str = "floor",
    seed: Seed = None, generator: torch.Generator | None = None, order: str = "random", backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Keep tokens drawn without replacement, in proportion to their weights.

        kept = the num_keep largest of log(weight[b, n]) + Gumbel noise, which is torch.multinomial(weight[b], num_keep)

    Args:
        weight: float [B, N], finite, at least 0; read as float32.
        mask_ratio: share of masked tokens; kept = floor, round or ceil of (1 - mask_ratio) N.
        num_keep: instead of mask_ratio.
        rounding: "floor" (MaskAlign), "round" or "ceil".
        seed, generator: as in random_masking.
        order: "random" leaves the kept tokens in the order of their draw; "ascending" sorts them.
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit; nothing in it is differentiable.

    Notes:
        Logarithms are whole numbers, right to 1e-7, so that the masks are the same on every backend. Tokens of weight 0 (or below
        1.2e-38) are kept only when no others are left, in uniformly random order. B = 0 and N = 0 work.

    Raises:
        ValueError: a negative, infinite or NaN weight, neither or both of mask_ratio and num_keep, a value out of range.

    Source:
        Vieira, "Gumbel-max trick and weighted reservoir sampling", 2014; MaskAlign (Xue et al., 2022, arXiv 2211.08887).

    Example:
        >>> split = maskops.weighted_masking(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), num_keep=2, seed=0, order="ascending")
        >>> split.ids_keep.tolist()
        [[1, 2]]
    """
    name = "weighted_masking"
    given.check_scores(name, "weight", weight)
    given.choice(name, "order", order, given.ORDERS)
    keep = given.kept_of(name, weight.shape[1], mask_ratio, num_keep, rounding)
    op = find_op("mask_sampling_race", weight.device.type, backend, name)
    key = op(given.seed_of(name, seed, generator, weight.device), weight.detach().float())
    return given.ranked(key, keep, order, backend, name)


@public("mask_sampling_top", native=NATIVE, triton=TRITON)
def guided_masking(
    score: Tensor, mask_ratio: float | None = None, *, num_keep: int | None = None, num_hard: int,
    rounding: str = "floor", seed: Seed = None, generator: torch.Generator | None = None, order: str = "ascending",
    backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Mask the tokens with the highest scores, and as many others at random as are still to be masked.

        masked = top num_hard of score[b]  +  a uniform subset of the rest, N - num_keep in all

    Args:
        score: float [B, N], such as the loss that is expected of each patch; ties go to the lower index, NaN counts as lowest.
        mask_ratio: share of masked tokens; kept = floor, round or ceil of (1 - mask_ratio) N.
        num_keep: instead of mask_ratio.
        num_hard: how many are masked by score, in [0, N - num_keep].
        rounding: "floor" (HPM), "round" or "ceil".
        seed, generator: as in random_masking.
        order: "ascending", or "random".
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit; nothing in it is differentiable.

    Notes:
        num_hard = 0 is random_masking. Two ops: the highest scores, and a draw. The same masks on every backend.

    Raises:
        ValueError: wrong score, neither or both of mask_ratio and num_keep, num_hard out of range.

    Source:
        HPM (Wang et al., "Hard Patches Mining for Masked Image Modeling", 2023, arXiv 2304.05919).

    Example:
        >>> split = maskops.guided_masking(torch.arange(8.0)[None], num_keep=2, num_hard=3, seed=0)
        >>> split.ids_mask.shape, split.mask[0, 5:].tolist()
        (torch.Size([1, 6]), [True, True, True])
    """
    name = "guided_masking"
    given.check_scores(name, "score", score)
    given.choice(name, "order", order, given.ORDERS)
    B, N = score.shape
    keep = given.kept_of(name, N, mask_ratio, num_keep, rounding)
    hard = given.size(name, "num_hard", num_hard, 0, N - keep)
    seed = given.seed_of(name, seed, generator, score.device)
    score = score.detach() if score.dtype == torch.float64 else score.detach().float()
    highest = find_op("mask_sampling_top", score.device.type, backend, name)(score, hard)
    return given.shuffled(seed, B, N, keep, order, backend, name, highest)


# ---------------------------------------------------------------- coloured noise

COLOURS = {"red": 1, "blue": 1, "green": 2, "purple": 2}
SIGMAS = {"red": (1.5,), "blue": (1.0,), "green": (0.5, 2.0), "purple": (0.5, 2.0)}


@given.table
def _taps(colour: str, device: torch.device, *sigmas: float) -> Tensor:
    """int32 [S, T]: separable filters that are added with signs + - +, each of sum 1024."""
    radius = max(1, math.ceil(3 * max(sigmas)))
    filters = []
    for sigma in sigmas:
        taps = [math.exp(-((i / sigma) ** 2) / 2) for i in range(-radius, radius + 1)]
        filters.append([round(1024 * t / sum(taps)) for t in taps])
        filters[-1][radius] += 1024 - sum(filters[-1])
    white = [1024 * (i == radius) for i in range(2 * radius + 1)]
    return torch.tensor([white] * (colour in ("blue", "purple")) + filters, dtype=torch.int32, device=device)


@public("mask_sampling_colour", native=NATIVE, triton=TRITON)
def colour_masking(
    B: int, grid: Sequence[int], mask_ratio: float | None = None, *, num_keep: int | None = None, colour: str = "green",
    sigma: float | Sequence[float] | None = None, rounding: str = "floor", seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, order: str = "random",
    backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Keep the patches where filtered noise is highest: clumps of visible patches whose size the filter decides.

        W white noise, G_s a Gaussian of width s:   red G_s W;  blue W - G_s W;  green G_s W - G_t W;  purple W - green;  s < t

    Args:
        B, grid: images; patches along height and width.
        mask_ratio: share of masked patches; kept = floor, round or ceil of (1 - mask_ratio) N.
        num_keep: instead of mask_ratio.
        colour: "red", "green", "blue", "purple".
        sigma: s of red and blue, (s, t) of green and purple, in patches, in [0.001, 10]. Default: 1.5, 1, (0.5, 2).
        rounding: "floor" (ColorMAE), "round" or "ceil".
        seed, generator, device: as in random_masking.
        order: "random", highest noise first, or "ascending".
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit, N = h w; nothing in it is differentiable.

    Notes:
        Every image draws noise of its own, on a field wider than the grid by the filter, so that borders are as likely as any
        other place; published are crops of one stored field. Noise and filters are whole numbers: the same masks everywhere.

    Raises:
        ValueError: an unknown colour, sigma out of range, a grid and filter of more than 12288 numbers, a count out of range.

    Source:
        ColorMAE (Hinojosa et al., 2024, arXiv 2407.13036).

    Example:
        >>> split = maskops.colour_masking(2, (14, 14), 0.75, colour="green", seed=0)
        >>> split.ids_keep.shape
        torch.Size([2, 49])
    """
    name = "colour_masking"
    B, (h, w) = given.size(name, "B", B), given.grid_of(name, grid)
    given.choice(name, "colour", colour, tuple(COLOURS))
    given.choice(name, "order", order, given.ORDERS)
    sigmas = SIGMAS[colour] if sigma is None else sigma
    sigmas = tuple(number(name, "sigma", s) for s in (sigmas if isinstance(sigmas, Sequence) else (sigmas,)))
    ordered = all(0.001 <= s <= 10 for s in sigmas) and list(sigmas) == sorted(set(sigmas))
    if len(sigmas) != COLOURS[colour] or not ordered:
        fail(name, "sigma", f"be {COLOURS[colour]} ascending numbers in [0.001, 10] for {colour}", sigma)
    keep = given.kept_of(name, h * w, mask_ratio, num_keep, rounding)
    where = given.where(name, device, seed, generator)
    op = find_op("mask_sampling_colour", where.type, backend, name)
    noise = op(given.seed_of(name, seed, generator, where), _taps(colour, where, *map(given.fixed, sigmas)), B, h, w)
    return given.ranked(noise, keep, order, backend, name)
