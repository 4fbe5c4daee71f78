"""token_drift, and the chain of dLLM-Cache: select what moved, recompute it, put it into the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_tensor, fail, number, one_of
from maskops._registry import OpSpec, define_op
from maskops.ops.feature_reuse.cache import ContextCache, check_cache
from maskops.ops.feature_reuse.select import select_tokens
from maskops.ops.visible_tokens.gather import gather_tokens
from maskops.reference import feature_reuse as reference
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION, REFRESH = "token_drift", "refresh_tokens_"
KINDS = {"cosine": reference.COSINE, "l2": reference.L2}


@public(
    "feature_reuse_drift",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def token_drift(new: Tensor, cached: Tensor, kind: str = "cosine", *, backend: str = "auto") -> Tensor:
    """Measure how far each token's features moved from the cached ones, in one pass.

        cosine: 1 - new . cached / (|new| |cached|);   l2: |new - cached|

    Args:
        new, cached: float [B, N, D], the same dtype.
        kind: "cosine" or "l2".
        backend: "auto", "native", "triton", "reference".

    Returns:
        [B, N], float32 (float64 for float64), not differentiable.

    Notes:
        The cosine drift of two zero rows is 0, of a zero row and another 1. A row that holds NaN has drift NaN.

    Raises:
        ValueError: wrong dtype, shape or device, another kind.  TypeError: new or cached is no tensor.

    Source:
        Liu et al., dLLM-Cache, 2025 (arXiv 2506.06295).

    Example:
        >>> maskops.token_drift(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[3.0, 0.0]]])).tolist()
        [[1.0]]
    """
    check_is_tensor(FUNCTION, "new", new)
    check_is_tensor(FUNCTION, "cached", cached)
    one_of(FUNCTION, "kind", kind, KINDS)
    return find_op("feature_reuse_drift", new.device.type, backend)(new, cached, KINDS[kind])


def refresh_tokens_(
    cache: ContextCache, layer: int, x: Tensor, values: Tensor, recompute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ratio: float, *, kind: str = "cosine", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Refresh the tokens of a layer whose values moved furthest from the cached ones.

        ids = the ceil(ratio N) tokens of highest token_drift(values, cached values)
        k, v = recompute(x[ids], ids);   cache.write_(layer, k, v, ids)

    Args:
        cache: holds this layer's keys and values of all N tokens.
        layer: which.
        x: [B, N, C], the layer's input at all tokens.
        values: [B, H, N, D], the new values of all tokens: one product, far cheaper than the layer.
        recompute: (rows [B, K, C], ids [B, K]) -> k, v [B, H, K, D]; may compute whatever else the tokens need.
        ratio: share of the tokens, in [0, 1].
        kind: of token_drift.
        backend: "auto", "native", "triton", "reference".

    Returns:
        ids int64 [B, K] of what was refreshed, the furthest first.

    Notes:
        Tokens that the cache lacks are refreshed before all others. No wait for the device, K follows from ratio alone.

    Raises:
        ValueError: wrong dtype, shape or device, ratio out of range.  IndexError: layer out of range.
        TypeError: an argument of another type, recompute returns no two tensors.

    Source:
        Liu et al., dLLM-Cache, 2025 (arXiv 2506.06295): its chain similarity, top-k, gather, recompute, scatter.

    Example:
        >>> cache, x = maskops.ContextCache(1, 1, 4, 1, 2), torch.randn(1, 4, 2)
        >>> cache.write_(0, x[:, None], x[:, None])
        >>> moved = x.clone()
        >>> moved[0, 2] *= -1
        >>> maskops.refresh_tokens_(cache, 0, moved, moved[:, None], lambda rows, ids: (rows[:, None],) * 2, 0.25).tolist()
        [[2]]
    """
    ratio = number(REFRESH, "ratio", ratio)
    if not 0 <= ratio <= 1:
        fail(REFRESH, "ratio", "be in [0, 1]", ratio)
    check_cache(REFRESH, cache)
    one_of(REFRESH, "kind", kind, KINDS)
    if not callable(recompute):
        raise TypeError(f"{REFRESH}: recompute must be callable, got {type(recompute).__name__}")
    for name, given in (("x", x), ("values", values)):
        check_is_tensor(REFRESH, name, given)
    _, cached, valid = cache.layer(layer, function=REFRESH)
    check_tensor(REFRESH, "values", values, "[B, H, N, D]", (cached.dtype,), cached.shape, cached)
    check_tensor(REFRESH, "x", x, "[B, N, C]", FLOATS, (*valid.shape, None), cached)
    rows = [t.transpose(1, 2).flatten(2) for t in (values, cached)]
    drift = token_drift(*rows, kind, backend=backend)
    drift = torch.where(valid, drift, torch.inf)
    count = -int(-(ratio * drift.shape[1] - 1e-9) // 1)  # 0.07 of 100 are 7, though the product is a little more
    ids = select_tokens(drift, torch.zeros_like(valid), count, backend=backend).ids.contiguous()
    found = recompute(gather_tokens(x, ids, backend=backend), ids)
    if not isinstance(found, tuple | list) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        raise TypeError(f"{REFRESH}: recompute must return k and v, got {got}")
    cache.write_(layer, *found, ids, backend=backend)
    return ids


def _check(new: Tensor, cached: Tensor, kind: int) -> None:
    check_tensor(FUNCTION, "new", new, "[B, N, D]", FLOATS, (None, None, None), new)
    check_tensor(FUNCTION, "cached", cached, "[B, N, D]", (new.dtype,), new.shape, new)
    if kind not in (reference.COSINE, reference.L2):
        fail(FUNCTION, "kind", "be 0 or 1", kind)


define_op(
    OpSpec(
        "feature_reuse_drift(Tensor new, Tensor cached, int kind) -> Tensor",
        family="feature_reuse",
        reference=reference.feature_reuse_drift,
        check=_check,
        fake=lambda new, cached, kind: new.new_empty(new.shape[:2], dtype=accumulation_dtype(new.dtype)),
        cuda=False,
        autocast="promote",
    )
)
