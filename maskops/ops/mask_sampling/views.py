"""Several masks from one random order of the tokens: disjoint and nested views, modalities that share a budget."""

from collections.abc import Sequence

import torch

from maskops._backends import find_op
from maskops._checks import fail
from maskops.ops.mask_sampling import arguments as given
from maskops.ops.mask_sampling.uniform import Seed
from maskops.ops.visible_tokens.split import TokenSplit


def _views(name: str, B: int, N: int, counts: object, argument: str = "num_keep") -> tuple[int, int, list[int]]:
    if not isinstance(counts, Sequence) or not counts:
        raise TypeError(f"{name}: {argument} must be a sequence of int, got {counts!r}")
    N = given.size(name, "N", N, 0, 2**30 - 1)
    sizes = [given.size(name, f"{argument}[{i}]", count, 0, N) for i, count in enumerate(counts)]
    return given.size(name, "B", B), N, sizes


def disjoint_masking(
    B: int, N: int, num_keep: Sequence[int], *, seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> tuple[TokenSplit, ...]:  # fmt: skip
    """Draw several views of each row that share no visible token.

        one uniformly random order of the tokens; view 0 keeps the first num_keep[0], view 1 the next num_keep[1], ...

    Args:
        B, N: rows, tokens per row.
        num_keep: visible tokens of each view; their sum is at most N.
        seed, generator, device, backend: as in random_masking.

    Returns:
        One TokenSplit a view, ids ascending; nothing in it is differentiable.

    Notes:
        Each view alone is uniform. (49, 49) of 196 are LUT's two views; (19, 19) of 49 cells, spread by cell_mask, DMJD's: masks of
        30 cells that cover all and overlap in 11.

    Raises:
        ValueError: a count out of range, or more than N in all.

    Source:
        LUT (Kim et al., 2023, arXiv 2310.04408); DMJD (Ma et al., 2022, arXiv 2212.00433).

    Example:
        >>> first, second = maskops.disjoint_masking(1, 8, (2, 3), seed=0)
        >>> int((~first.mask & ~second.mask).sum()), second.ids_keep.shape
        (0, torch.Size([1, 3]))
    """
    name = "disjoint_masking"
    B, N, sizes = _views(name, B, N, num_keep)
    if sum(sizes) > N:
        fail(name, "sum of num_keep", f"be at most {N}", sum(sizes))
    where = given.where(name, device, seed, generator)
    seed, views, seen = given.seed_of(name, seed, generator, where), [], None
    # The same order for each view: what others have seen comes last in it.
    for size in sizes:
        views.append(given.shuffled(seed, B, N, size, "ascending", backend, name, seen))
        if len(views) < len(sizes):
            visible = views[-1].ids_restore < size
            seen = visible if seen is None else seen | visible
    return tuple(views)


def nested_masking(
    B: int, N: int, num_keep: Sequence[int], *, seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> tuple[TokenSplit, ...]:  # fmt: skip
    """Draw several views of each row whose visible tokens contain one another.

        one uniformly random order of the tokens; view i keeps the first num_keep[i]

    Args:
        B, N: rows, tokens per row.
        num_keep: visible tokens of each view, in any order.
        seed, generator, device, backend: as in random_masking.

    Returns:
        One TokenSplit a view, ids ascending; nothing in it is differentiable.

    Notes:
        Whole words nested in one another: group_masking with several ratios.

    Raises:
        ValueError: a count out of range.

    Source:
        Progressive masking of Hybrid Distillation (Shi et al., 2023, arXiv 2306.15876), with a random order.

    Example:
        >>> small, large = maskops.nested_masking(1, 8, (2, 5), seed=0)
        >>> int((~small.mask & large.mask).sum())
        0
    """
    name = "nested_masking"
    B, N, sizes = _views(name, B, N, num_keep)
    where = given.where(name, device, seed, generator)
    seed = given.seed_of(name, seed, generator, where)
    return tuple(given.shuffled(seed, B, N, size, "ascending", backend, name) for size in sizes)


def modality_masking(
    B: int, sizes: Sequence[int], num_keep: int, *, alpha: int | Sequence[int] = 1, seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, order: str = "ascending",
    backend: str = "auto",
) -> TokenSplit:  # fmt: skip
    """Keep num_keep tokens of several modalities, shared out among them by a Dirichlet law.

        shares ~ Dirichlet(alpha);  counts = round(num_keep shares);  a random subset of counts[m] tokens of modality m,
        then tokens are dropped, or added, at random until num_keep are kept

    Args:
        B, sizes: rows; tokens of each modality, which stand behind one another in a row of N = sum of sizes.
        num_keep: visible tokens of all modalities together.
        alpha: the Dirichlet's concentration, a whole number of at least 1, or one per modality.
        seed, generator, device: as in random_masking.
        order: "ascending" or "random".
        backend: "auto", "native", "triton", "reference".

    Returns:
        TokenSplit over the N tokens; exactly num_keep are kept in every row.

    Notes:
        Shares are gaps between sorted uniform numbers, so whole numbers decide: the same masks on every backend. Fractional alpha
        is refused. A share of more tokens than the modality has keeps all of them; others make up for the rest.

    Raises:
        ValueError: sizes, num_keep or alpha out of range.

    Source:
        MultiMAE (Bachmann et al., 2022, arXiv 2204.01678).

    Example:
        >>> split = maskops.modality_masking(4, (196, 196, 196), 98, seed=0)
        >>> split.ids_keep.shape, split.ids_restore.shape
        (torch.Size([4, 98]), torch.Size([4, 588]))
    """
    name = "modality_masking"
    B, _, sizes = _views(name, B, 2**30 - 1, sizes, "sizes")
    given.check_tokens(name, "sum of sizes", sum(sizes))
    keep = given.size(name, "num_keep", num_keep, 0, sum(sizes))
    given.choice(name, "order", order, given.ORDERS)
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * len(sizes)
    alphas = [given.size(name, f"alpha[{i}]", a, 1, 1000) for i, a in enumerate(alphas)]
    if len(alphas) != len(sizes):
        fail(name, "alpha", f"be one number or {len(sizes)}", len(alphas))
    where = given.where(name, device, seed, generator)
    seed, M, widest = given.seed_of(name, seed, generator, where), len(sizes), max(sizes)
    words = find_op("mask_sampling_words", where.type, backend, name)(seed, B * (sum(alphas) - 1))
    words = words.view(B, sum(alphas) - 1)
    ends = [sum(alphas[: i + 1]) - 1 for i in range(M - 1)]
    edges = torch.nn.functional.pad(words.sort(1).values[:, ends], (1, 0))
    gaps = torch.cat([edges, torch.full_like(edges[:, :1], 2**32)], 1).diff(dim=1)
    limits = torch.tensor(sizes, device=where)
    counts = torch.minimum((keep * gaps + 2**31) >> 32, limits).flatten()
    op = find_op("mask_sampling_uniform", where.type, backend, name)
    rank = op(given.later(seed, 1), counts, limits.repeat(B), None, widest, widest, widest, True)[2]
    hidden = (rank >= counts[:, None]).view(B, M, widest)
    hidden = torch.cat([hidden[:, m, :size] for m, size in enumerate(sizes)], 1)
    return given.shuffled(given.later(seed, 2), B, sum(sizes), keep, order, backend, name, hidden)
