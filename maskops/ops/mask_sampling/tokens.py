"""Laws that decide token by token: random words, Bernoulli, prefixes, 80/10/10, gates; and a collator for a DataLoader."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, may_need_grad, public
from maskops._checks import check_is_dense, check_tensor, fail, integer
from maskops.ops.mask_sampling import arguments as given
from maskops.ops.mask_sampling.scores import NATIVE, TRITON
from maskops.ops.mask_sampling.uniform import Seed


@public("mask_sampling_words", native=NATIVE, triton=TRITON)
def random_words(
    size: int | Sequence[int], *, seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Draw uniform 32-bit numbers, the stream that every mask is made of.

        words.flatten()[i] = Philox4x32-10(seed, offset)[i]

    Args:
        size: of the result.
        seed, generator, device: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        int64 tensor of this size, in [0, 2^32). (words * n) >> 32 is uniform in [0, n) for n below 2^31.

    Notes:
        The same words on every backend.

    Raises:
        ValueError: a negative size.

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Example:
        >>> [hex(word) for word in maskops.random_words(2, seed=0).tolist()]
        ['0x6627e8d5', '0xe169c58d']
    """
    name = "random_words"
    sizes = [given.size(name, "size", s) for s in (size if isinstance(size, Sequence) else (size,))]
    where = given.where(name, device, seed, generator)
    op = find_op("mask_sampling_words", where.type, backend, name)
    count = 1
    for one in sizes:
        count = count * one
        if count > 2**40:
            fail(name, "size", "be of at most 2^40 numbers", tuple(sizes))
    return op(given.seed_of(name, seed, generator, where), count).view(sizes)


@public("mask_sampling_bernoulli", native=NATIVE, triton=TRITON)
def bernoulli_masking(
    B: int, N: int, p: float | Tensor, *, seed: Seed = None, generator: torch.Generator | None = None,
    device: torch.device | str | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Mask each token independently, with a probability of its own.

        mask[b, n] = word[b N + n] < 2^32 p[b, n]

    Args:
        B, N: rows, tokens per row.
        p: probability in [0, 1], or a float tensor of them, [N], [1, N], [B, 1] or [B, N]: clamped to [0, 1], NaN is 0.
        seed, generator, device: as in random_masking; the default device is p's.
        backend: "auto", "native", "triton", "reference".

    Returns:
        bool [B, N], True = masked. Rows may have none; split_tokens makes a TokenSplit of it.

    Notes:
        p is rounded to a multiple of 2^-32. N = 1 masks whole rows, as MCVD's blocks of frames; a rate per row is SUNDAE's.

    Raises:
        ValueError: a number p outside [0, 1], a tensor of another shape.

    Source:
        LXMERT (Tan and Bansal, 2019, arXiv 1908.07490); MCVD (Voleti et al., 2022, arXiv 2205.09853).

    Example:
        >>> maskops.bernoulli_masking(2, 3, torch.tensor([0.0, 1.0, 1.0])).tolist()
        [[False, True, True], [False, True, True]]
    """
    name = "bernoulli_masking"
    B, N = given.size(name, "B", B), given.size(name, "N", N)
    where = given.where(name, device, p, seed, generator)
    if isinstance(p, Tensor):
        check_is_dense(name, "p", p)
        if p.dim() > 2 or not p.is_floating_point():
            fail(name, "p", "be a float tensor of at most two axes", f"{p.dtype} {list(p.shape)}")
        if any(have not in (1, want) for have, want in zip(reversed(p.shape), (N, B), strict=False)):
            fail(name, "p", f"have shape [N], [1 or B, 1 or N] = [1 or {int(B)}, 1 or {int(N)}]", list(p.shape))
        threshold = (p.detach().to(where).double().nan_to_num(0.0).clamp(0, 1) * 2**32).round().long()
        threshold = threshold.view(1, -1) if p.dim() < 2 else threshold
    else:
        threshold = torch.full((1, 1), given.threshold_of(given.share(name, "p", p)), dtype=torch.int64, device=where)
    op = find_op("mask_sampling_bernoulli", where.type, backend, name)
    return op(given.seed_of(name, seed, generator, where), threshold, B, N)


@given.table
def _prefixes(N: int, device: torch.device) -> Tensor:
    """bool [N + 1, N]: the mask of each length of a prefix."""
    return torch.ones(N + 1, N, dtype=torch.bool, device=device).triu()


def prefix_masking(
    B: int, N: int, *, low: int = 1, high: int | None = None, seed: Seed = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Keep a prefix of random length of each row.

        K ~ U{low, ..., high};  mask[b, n] = n >= K[b]

    Args:
        B, N: rows, tokens per row.
        low, high: the shortest and longest prefix, in [0, N]; high is N - 1 by default.
        seed, generator, device, backend: as in random_masking.

    Returns:
        bool [B, N], True = masked. mask.logical_not().sum(1) is K.

    Notes:
        K is uniform to one part in 2^32 / (high - low + 1).

    Raises:
        ValueError: low and high not ascending in [0, N].

    Source:
        TokenUnify (Chen et al., 2024, arXiv 2405.16847).

    Example:
        >>> maskops.prefix_masking(1, 4, low=2, high=2).tolist()
        [[False, False, True, True]]
    """
    name = "prefix_masking"
    B, N = given.size(name, "B", B), given.size(name, "N", N)
    high = max(N - 1, 0) if high is None else given.size(name, "high", high, 0, N)
    low = given.size(name, "low", low, 0, high)
    where = given.where(name, device, seed, generator)
    words = find_op("mask_sampling_words", where.type, backend, name)(given.seed_of(name, seed, generator, where), B)
    keep = (words * (high - low + 1) >> 32) + low
    if N <= 512 and not torch.compiler.is_compiling():  # copies of rows take a sixth of the time of comparisons
        return _prefixes(N, where).index_select(0, keep)
    return torch.arange(N, device=where) >= keep[:, None]


@public("mask_sampling_corrupt", native=NATIVE, triton=TRITON)
def corrupt_tokens(
    ids: Tensor, mask: Tensor, mask_id: int, vocabulary: int | Sequence[int], *, hide: float = 0.8, random: float = 0.1,
    seed: Seed = None, generator: torch.Generator | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Replace masked tokens by the mask token, by random tokens, or leave them: BERT's 80/10/10.

        out = ids where not masked;  else mask_id with chance hide, a uniform id of the vocabulary with chance random, else ids

    Args:
        ids: int64 [B, N].
        mask: bool [B, N], True = masked.
        mask_id: id of the mask token.
        vocabulary: random ids are in [0, vocabulary), or in [low, high) of a pair, which leaves out special tokens.
        hide, random: chances, at most 1 together. ELECTRA: 0.85 and 0; MEAP: 1 and 0.
        seed, generator: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        int64 [B, N].

    Notes:
        A random id may be the original one, as published. Token i reads words 2 i and 2 i + 1 of the stream, so a mask drawn with
        the same seed is not independent of it: give another seed, or none.

    Raises:
        ValueError: wrong shapes or dtypes, chances out of range, an empty vocabulary.

    Source:
        BERT (Devlin et al., 2018, arXiv 1810.04805).

    Example:
        >>> ids = torch.arange(4)[None]
        >>> maskops.corrupt_tokens(ids, ids > 1, 99, 4, hide=1.0, random=0.0).tolist()
        [[0, 1, 99, 99]]
    """
    name = "corrupt_tokens"
    check_tensor(name, "ids", ids, "[B, N]", (torch.int64,), (None, None), ids)
    check_tensor(name, "mask", mask, "[B, N]", (torch.bool,), tuple(ids.shape), ids)
    pair = isinstance(vocabulary, Sequence)
    if pair and len(vocabulary) != 2:
        raise TypeError(f"{name}: vocabulary must be an int or two, got {vocabulary!r}")
    ends = zip(("vocabulary[0]", "vocabulary[1]"), vocabulary, strict=True) if pair else [("vocabulary", vocabulary)]
    low, high = [0] * (not pair) + [integer(name, arg, end) for arg, end in ends]
    hide, random = given.share(name, "hide", hide), given.share(name, "random", random)
    if hide + random > 1 + 1e-9:
        fail(name, "hide + random", "be at most 1", hide + random)
    first, second = given.threshold_of(hide), min(given.threshold_of(hide + random), 2**32)
    if not int(second > first) <= high - low < 2**31:
        fail(name, "vocabulary", "have 1 to 2^31 - 1 ids, or none where random is 0", f"[{low}, {high})")
    op = find_op("mask_sampling_corrupt", ids.device.type, backend, name)
    seed = given.seed_of(name, seed, generator, ids.device)
    return op(
        seed,
        ids,
        mask,
        integer(name, "mask_id", mask_id),
        low,
        high,
        first,
        second,
    )


@public("mask_sampling_gate", native=NATIVE, triton=TRITON)
def sample_gates(
    logits: Tensor, *, noise: str = "logistic", seed: Seed = None, generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Draw hard gates that open with the probability of their logits, with a straight-through gradient.

        logistic: P(1) = sigmoid(l), d/dl = P (1 - P);   gumbel: P(1) = 1 - exp(-exp(l)), d/dl = exp(l - exp(l))

    Args:
        logits: float, any shape. Computed in float32, clamped to [-64, 64]; NaN is a closed gate.
        noise: "logistic", the difference of two Gumbel variables, or "gumbel", a single one, as MaskUNet's.
        seed, generator: as in random_masking.
        backend: "auto", "native", "triton", "reference".

    Returns:
        0 or 1, in the shape and dtype of logits. Differentiable: the gradient is the slope of the probability, which is the
        expected slope of a Gumbel-sigmoid at temperature 1, without the temperature.

    Notes:
        The comparison is between whole numbers: the same gates on every backend.

    Raises:
        ValueError: logits not float, an unknown noise.

    Source:
        Jang et al., 2016 (arXiv 1611.01144); Bengio et al., 2013 (arXiv 1308.3432); MaskUNet (Wang et al., 2025, arXiv 2505.03097).

    Example:
        >>> maskops.sample_gates(torch.tensor([-60.0, 60.0]), seed=0).tolist()
        [0.0, 1.0]
    """
    name = "sample_gates"
    check_is_dense(name, "logits", logits)
    if not logits.is_floating_point():
        fail(name, "logits", "be a float tensor", logits.dtype)
    given.choice(name, "noise", noise, ("logistic", "gumbel"))
    op = find_op("mask_sampling_gate", logits.device.type, backend, name, grad=may_need_grad(logits))
    seed = given.seed_of(name, seed, generator, logits.device)
    gates = op(seed, logits.reshape(-1).float(), noise == "gumbel").view_as(logits)
    return gates if logits.dtype == torch.float32 else gates.to(logits.dtype)


class MaskCollator:
    """A DataLoader's collate_fn that draws the masks of the batch it puts together, in the worker.

        collate([sample, ...]) = (collate(samples), draw(number of samples, **options))

    Args:
        draw: a function of this family that takes B first, such as maskops.random_masking.
        collate: puts the samples together. Default: torch's default_collate.
        **options: arguments of draw, after B.

    Notes:
        The seed comes from the worker's own generator, which the DataLoader seeds from its `generator`: the same loader seed and
        number of workers give the same masks.

    Example:
        >>> collate = maskops.MaskCollator(maskops.random_masking, N=16, mask_ratio=0.75)
        >>> loader = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4, collate_fn=collate)
        >>> [(x.shape, split.ids_keep.shape) for x, split in loader][0]
        (torch.Size([4, 3]), torch.Size([4, 4]))
    """

    def __init__(self, draw: Callable, collate: Callable | None = None, **options: Any) -> None:
        if not callable(draw):
            raise TypeError(f"MaskCollator: draw must be a function, got {draw!r}")
        if collate is not None and not callable(collate):
            raise TypeError(f"MaskCollator: collate must be a function or None, got {collate!r}")
        self.draw, self.collate, self.options = draw, collate, options

    def __call__(self, samples: Sequence) -> tuple[Any, Any]:
        collate = torch.utils.data.default_collate if self.collate is None else self.collate
        return collate(samples), self.draw(len(samples), **self.options)

    def __repr__(self) -> str:
        return f"MaskCollator({getattr(self.draw, '__name__', repr(self.draw))}, {self.options})"
