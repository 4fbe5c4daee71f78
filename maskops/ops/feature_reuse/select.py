"""confidence_select and select_tokens: sample a token everywhere, then choose which of them to keep."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_is_tensor, check_tensor, check_values, fail, integer, number, one_of
from maskops._registry import OpSpec, define_op
from maskops.ops.mask_sampling import INT64, Seed, seed_tensor
from maskops.reference import feature_reuse as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION, RANK = "confidence_select", "select_tokens"
SCORES = (torch.float32, torch.float64)
BOOL = (torch.bool,)


@dataclass(frozen=True)
class Selection:
    """What confidence_select and select_tokens find.

    Args:
        ids: int64 [B, K], the tokens to decode, best first; -1 fills a row that has fewer.
        rest: int64 [B, N], the unknown tokens that stay masked, best first; -1 fills the row.
        count: int64 [B], tokens to decode per row.
        tokens: int64 [B, N], the sample at every unknown token, -1 where known; None from select_tokens.
        confidence: [B, N], inf where known; for select_tokens the score.
    """

    ids: Tensor
    rest: Tensor
    count: Tensor
    tokens: Tensor | None
    confidence: Tensor


_PARTS = ("ids", "rest", "count", "tokens", "confidence")
_pytree.register_pytree_node(  # so that an exported program may return one
    Selection,
    lambda found: ([getattr(found, name) for name in _PARTS], None),
    lambda parts, _: Selection(*parts),
    serialized_type_name="maskops.Selection",
)


@public(
    "feature_reuse_sample",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def confidence_select(
    logits: Tensor, known: Tensor, num_select: int | Tensor | None = None, *, temperature: float = 0, seed: Seed = None,
    generator: torch.Generator | None = None, noise: str = "gumbel", sample_temperature: float = 1,
    threshold: float | None = None, probs: bool = False, first_row: int = 0, backend: str = "auto",
) -> Selection:  # fmt: skip
    """Sample a token everywhere, then keep the most confident of each row, in one pass over the logits.

        p = softmax(logits / sample_temperature);  token ~ p;  confidence = log p[token] + temperature * Gumbel
        decode the num_select unknown tokens of highest confidence, or all with p[token] > threshold, but at least one

    Args:
        logits: float [B, N, V], or with probs=True probabilities (any weights; one below 0 counts as NaN).
        known: bool [B, N], tokens that are decoded already: never chosen, their logits never read.
        num_select: how many to decode in each row, an int or int64 [B]; at most the unknown ones are.
        temperature: of the noise in the choice; 0 for none.
        seed, generator: where sample and noise are drawn from, as in random_masking.
        noise: "gumbel", or "none", as temperature 0.
        sample_temperature: of the sample; 0 takes the likeliest token (and p at temperature 1).
        threshold: instead of num_select, in [0, 1): the rule of parallel decoding in diffusion language models; no noise.
        probs: whether logits are probabilities already; sample_temperature is then 0 or 1.
        first_row: row b draws as row first_row + b of a larger batch does; below 2^31.
        backend: "auto", "native", "triton", "reference".

    Returns:
        Selection(ids, rest, count, tokens, confidence). ids has num_select columns if that is an int, else N. Nothing in it is
        differentiable.

    Notes:
        One random number samples a token (inverse of the running sum), so nothing of size V is stored or sorted. Ties go to the
        lower index. Logits of an unknown token that hold NaN or +inf, or -inf only, give token -1 and confidence -inf. The same
        seed draws the same on every backend and for every number of threads; a row does not depend on the rest of its batch.

    Raises:
        ValueError: wrong dtype, shape, device or value, neither or both of num_select and threshold.
        TypeError: logits or known is no tensor.

    Source:
        Chang et al., MaskGIT, 2022 (arXiv 2202.04200); threshold: Wu et al., Fast-dLLM, 2025 (arXiv 2505.22618).

    Example:
        >>> logits = torch.tensor([[[9.0, 0, 0], [0, 9, 1], [0, 1, 2]]])
        >>> found = maskops.confidence_select(logits, torch.tensor([[True, False, False]]), 1, sample_temperature=0)
        >>> found.ids.tolist(), found.tokens.tolist(), found.rest.tolist()
        ([[1]], [[-1, 1, 2]], [[2, -1, -1]])
    """
    check_is_tensor(FUNCTION, "logits", logits)
    check_is_tensor(FUNCTION, "known", known)
    boolean(FUNCTION, "probs", probs)
    first_row = integer(FUNCTION, "first_row", first_row)
    one_of(FUNCTION, "noise", noise, ("gumbel", "none"))
    temperature = number(FUNCTION, "temperature", temperature) if noise == "gumbel" else 0.0
    sample_temperature = number(FUNCTION, "sample_temperature", sample_temperature)
    lowest = -math.inf
    if threshold is not None:
        threshold = number(FUNCTION, "threshold", threshold)
        if not 0 <= threshold < 1:
            fail(FUNCTION, "threshold", "be in [0, 1)", threshold)
        if temperature != 0:
            fail(FUNCTION, "temperature", "be 0 with a threshold", temperature)
        lowest = math.log(threshold) if threshold > 0 else -math.inf
    draw = seed_tensor(seed, generator, logits.device, FUNCTION)
    op = find_op("feature_reuse_sample", logits.device.type, backend)
    tokens, confidence = op(logits, known, draw, first_row, sample_temperature, temperature, probs)
    ids, rest, count = _rank(FUNCTION, confidence, known, num_select, lowest, threshold is not None, backend)
    return Selection(ids, rest, count, tokens, confidence)


@public(
    "feature_reuse_rank",
    native="C++ on CPU and CUDA C++; float32, float64",
    triton="CUDA, ROCm and XPU; float32, float64",
)
def select_tokens(
    score: Tensor, known: Tensor, num_select: int | Tensor | None = None, *, threshold: float | None = None,
    backend: str = "auto",
) -> Selection:  # fmt: skip
    """Choose the unknown tokens of highest score in each row.

        ids[b] = the num_select[b] unknown tokens of row b with the highest score, or all with score > threshold, at least one

    Args:
        score: float32 or float64 [B, N]; NaN comes last.
        known: bool [B, N], tokens that are not to be chosen.
        num_select: how many in each row, an int or int64 [B]; at most the unknown ones are chosen.
        threshold: instead of num_select.
        backend: "auto", "native", "triton", "reference".

    Returns:
        Selection with tokens None and confidence = score. ids has num_select columns if that is an int, else N.

    Notes:
        Best first, ties go to the lower index. Rows of any number of unknown tokens, none among them. Nothing waits for the device.

    Raises:
        ValueError: wrong dtype, shape, device or value, neither or both of num_select and threshold.
        TypeError: score or known is no tensor.

    Source:
        Tokens by their drift: Liu et al., dLLM-Cache, 2025 (arXiv 2506.06295).

    Example:
        >>> score, known = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[False, True, False]])
        >>> maskops.select_tokens(score, known, 1).ids.tolist()
        [[2]]
    """
    check_is_tensor(RANK, "score", score)
    check_is_tensor(RANK, "known", known)
    lowest = -math.inf if threshold is None else number(RANK, "threshold", threshold)
    ids, rest, count = _rank(RANK, score, known, num_select, lowest, threshold is not None, backend)
    return Selection(ids, rest, count, None, score)


def _rank(
    function: str, score: Tensor, known: Tensor, num_select: int | Tensor | None, lowest: float, by_threshold: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if by_threshold == (num_select is not None):
        got = (
            f"{num_select if not isinstance(num_select, Tensor) else 'a tensor'} and {'one' if by_threshold else None}"
        )
        fail(function, "num_select or threshold", "be given, one of them", got)
    columns, counts = None, num_select
    if num_select is not None and not isinstance(num_select, Tensor):
        columns = integer(function, "num_select", num_select)
        if columns < 0:
            fail(function, "num_select", "be at least 0", columns)
        counts = torch.full(score.shape[:1], columns, dtype=torch.int64, device=score.device)
    elif num_select is not None:  # of confidence_select the op knows nothing
        check_tensor(function, "num_select", counts, "[B]", INT64, (score.shape[0],), score)
        if function != RANK and not torch.compiler.is_compiling():
            check_values(function, "num_select", counts >= 0, "be at least 0", counts)
    op = find_op("feature_reuse_rank", score.device.type, backend)
    ids, rest, count = op(score, known, counts, lowest)
    return ids if columns is None else ids[:, :columns], rest, count


# ---------------------------------------------------------------- the ops


def _check_sample(
    logits: Tensor, known: Tensor, seed: Tensor, first_row: int, temperature: float, noise: float, probs: bool
) -> None:
    check_tensor(FUNCTION, "logits", logits, "[B, N, V]", FLOATS, (None, None, None), logits)
    check_tensor(FUNCTION, "known", known, "[B, N]", BOOL, logits.shape[:2], logits)
    check_tensor(FUNCTION, "seed", seed, "[2]", INT64, (2,), logits)
    if logits.shape[2] < 1:
        fail(FUNCTION, "logits", "have V of at least 1", int(logits.shape[2]))
    if not 0 <= first_row < 2**31:
        fail(FUNCTION, "first_row", "be in [0, 2^31)", first_row)
    if not 0 <= temperature < math.inf:
        fail(FUNCTION, "sample_temperature", "be finite and at least 0", f"{temperature:g}")
    if probs and temperature not in (0, 1):
        fail(FUNCTION, "sample_temperature", "be 0 or 1 of probabilities", f"{temperature:g}")
    if not 0 <= noise < math.inf:
        fail(FUNCTION, "temperature", "be finite and at least 0", f"{noise:g}")


def _fake_sample(logits: Tensor, known: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (
        known.new_empty(known.shape, dtype=torch.int64),
        logits.new_empty(known.shape, dtype=accumulation_dtype(logits.dtype)),
    )


def _check_rank(score: Tensor, known: Tensor, num_select: Tensor | None, threshold: float) -> None:
    check_tensor(RANK, "score", score, "[B, N]", SCORES, (None, None), score)
    check_tensor(RANK, "known", known, "[B, N]", BOOL, score.shape, score)
    if num_select is not None:
        check_tensor(RANK, "num_select", num_select, "[B]", INT64, (score.shape[0],), score)
    if threshold != threshold:
        fail(RANK, "threshold", "be a number", "nan")


def _check_rank_data(score: Tensor, known: Tensor, num_select: Tensor | None, threshold: float) -> None:
    if num_select is not None:
        check_values(RANK, "num_select", num_select >= 0, "be at least 0", num_select)


def _fake_rank(score: Tensor, known: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    ids = score.new_empty(score.shape, dtype=torch.int64)
    return ids, ids.new_empty(ids.shape), ids.new_empty(score.shape[0])


define_op(
    OpSpec(
        "feature_reuse_sample(Tensor logits, Tensor known, Tensor seed, SymInt first_row, float temperature, float noise,"
        " bool probs) -> (Tensor tokens, Tensor confidence)",
        family="feature_reuse",
        reference=reference.feature_reuse_sample,
        check=_check_sample,
        fake=_fake_sample,
        cuda=False,
    )
)
define_op(
    OpSpec(
        "feature_reuse_rank(Tensor score, Tensor known, Tensor? num_select, float threshold)"
        " -> (Tensor ids, Tensor rest, Tensor count)",
        family="feature_reuse",
        reference=reference.feature_reuse_rank,
        check=_check_rank,
        check_data=_check_rank_data,
        fake=_fake_rank,
    )
)
