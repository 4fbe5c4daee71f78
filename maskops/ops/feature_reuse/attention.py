"""cached_attention: a few local queries against a cache and against themselves."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_ids, check_is_tensor, check_tensor, describe, fail, number
from maskops._registry import OpSpec, define_op
from maskops.ops.feature_reuse.cache import BOOL, EXCLUDE, INT64, CacheView, ContextCache, check_cache
from maskops.ops.masked_attention.map import tiles_in
from maskops.reference import feature_reuse as reference
from maskops.reference.masked_attention import TILE
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION = "cached_attention"
MOST_CHANNELS = 256


@public(
    "feature_reuse_attention",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def cached_attention(
    q_local: Tensor, k_local: Tensor, v_local: Tensor, cache: ContextCache, layer: int, local_ids: Tensor, *,
    exclude: Tensor | CacheView | None = None, scale: float | None = None, return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from a few local tokens to the cached tokens that are not local, and to the local ones, in one pass.

        keys = [valid cached tokens that exclude does not name ; local tokens];   values likewise
        out = softmax(scale q keys^T) values;   lse = log sum exp

    Args:
        q_local, k_local, v_local: float [B, H, U, D], any strides; D at most 256.
        cache: the ContextCache of the model, in the dtype of q_local.
        layer: which of its layers.
        local_ids: int64 [B, U], which token each slot is; -1 for an empty slot, which nobody sees and whose result is 0.
        exclude: int64 [B, K], the cached tokens that are hidden. Default: local_ids, whose cached features are old. Or the
            view that ContextCache.exclude made, once for all layers.
        scale: of the products. Default: 1 / sqrt(D).
        return_lse: also return lse, with which merge_attention joins results over different keys.
        backend: "auto", "native", "triton", "reference".

    Returns:
        out [B, H, U, D] in q_local's dtype; with return_lse also lse [B, H, U], float32 (float64 for float64). Differentiable
        (once) in q_local, k_local, v_local and the cache's tensors.

    Notes:
        Nothing is gathered or concatenated: hidden tokens are skipped where they lie, and NaN there reaches nothing. Equal to
        attention over all tokens whose local features were written first. A row does not depend on the rest of its batch, nor
        on the number of threads. A query that sees nothing has out 0, lse -inf and gradient 0.

    Raises:
        ValueError: wrong dtype, shape or device.  IndexError: layer or an id out of range, an id twice in a row.
        TypeError: a tensor is none, cache is no ContextCache.

    Source:
        Local steps of ReCAP, 2025 (arXiv 2505.19089); the dual cache of Fast-dLLM, 2025 (arXiv 2505.22618).

    Example:
        >>> cache = maskops.ContextCache(num_layers=1, batch=2, max_tokens=9, heads=4, head_dim=8)
        >>> cache.write_(0, *torch.randn(2, 2, 4, 9, 8))
        >>> q, k, v = torch.randn(3, 2, 4, 2, 8)
        >>> maskops.cached_attention(q, k, v, cache, 0, torch.tensor([[3, 5], [0, -1]])).shape
        torch.Size([2, 4, 2, 8])
    """
    for name, x in (("q_local", q_local), ("k_local", k_local), ("v_local", v_local), ("local_ids", local_ids)):
        check_is_tensor(FUNCTION, name, x)
    check_cache(FUNCTION, cache)
    boolean(FUNCTION, "return_lse", return_lse)
    check_tensor(FUNCTION, "q_local", q_local, "[B, H, U, D]", FLOATS, (None,) * 4, q_local)
    scale = 1 / math.sqrt(max(q_local.shape[-1], 1)) if scale is None else number(FUNCTION, "scale", scale)
    if not -math.inf < scale < math.inf:
        fail(FUNCTION, "scale", "be finite", scale)
    keys, values, valid = cache.layer(layer, function=FUNCTION)
    _check_cache_of(q_local, keys)
    if isinstance(exclude, CacheView):
        if exclude.cache is not cache:
            fail(FUNCTION, "exclude", "be a view of cache", "one of another cache")
        seen = exclude.seen[layer]
    elif exclude is None:
        seen = _seen(valid, local_ids, "local_ids", backend)
    else:
        check_is_tensor(FUNCTION, "exclude", exclude)
        seen = _seen(valid, exclude, "exclude", backend)
    op = find_op("feature_reuse_attention", q_local.device.type, backend)
    out, lse = op(q_local, k_local, v_local, keys, values, seen, local_ids, scale)
    return (out, lse) if return_lse else out


def _check_cache_of(q: Tensor, keys: Tensor) -> None:
    """The cache is of q's batch, heads and channels."""
    B, H, _, D = q.shape
    if keys.shape[:2] != (B, H) or keys.shape[3] != D:
        own, wanted = (
            f"B, H, D = {int(b)}, {int(h)}, {int(d)}" for b, h, d in ((B, H, D), (*keys.shape[:2], keys.shape[3]))
        )
        fail(FUNCTION, "cache", f"be of q_local's {own}", wanted)


def _seen(valid: Tensor, ids: Tensor, name: str, backend: str) -> Tensor:
    """bool [B, N]: the valid tokens but ids. Errors name the argument that ids were."""
    check_tensor(FUNCTION, name, ids, "[B, U]", INT64, (valid.shape[0], None), valid)
    op = find_op("feature_reuse_exclude", valid.device.type, backend, FUNCTION)
    if torch.compiler.is_compiling():
        return op(valid[None], ids)[0]
    try:
        return op(valid[None], ids)[0]
    except IndexError as error:
        raise IndexError(str(error).replace(f"{EXCLUDE}: ids", f"{FUNCTION}: {name}", 1)) from None


# ---------------------------------------------------------------- the op


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, ids: Tensor, scale: float
) -> None:
    check_tensor(FUNCTION, "q_local", q, "[B, H, U, D]", FLOATS, (None,) * 4, q)
    B, H, U, D = q.shape
    if not 1 <= D <= MOST_CHANNELS:
        fail(FUNCTION, "q_local", f"have 1 to {MOST_CHANNELS} channels", describe(q))
    for name, x in (("k_local", k), ("v_local", v)):
        check_tensor(FUNCTION, name, x, "[B, H, U, D]", (q.dtype,), (B, H, U, D), q)
    check_tensor(FUNCTION, "cached keys", k_cache, "[B, H, N, D]", (q.dtype,), (B, H, None, D), q)
    check_tensor(FUNCTION, "cached values", v_cache, "[B, H, N, D]", (q.dtype,), k_cache.shape, q)
    check_tensor(FUNCTION, "seen", seen, "[B, N]", BOOL, (B, k_cache.shape[2]), q)
    check_tensor(FUNCTION, "local_ids", ids, "[B, U]", INT64, (B, U), q)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *saved, ctx.scale = inputs
    ctx.save_for_backward(*saved, *output)


def _backward(ops: Any, ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple:
    """The gradient of masked_attention over the cached and the local keys side by side: here they may be copied."""
    q, k, v, k_cache, v_cache, seen, ids, out, lse = ctx.saved_tensors
    keys, values = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    real = ids >= 0
    allowed = torch.cat([seen, real], 1)[:, None, None, :] & real[:, None, :, None]
    tiles, words = _tiles_of(allowed)
    none = lse.new_empty(*lse.shape[:2], 0)
    grad_q, grad_k, grad_v = ops._masked_attention_backward(
        grad, grad_lse, none, q, keys, values, out, lse, none, tiles, words, None, None, ctx.scale, 0.0
    )
    cached = k_cache.shape[2]
    return (
        grad_q,
        grad_k[:, :, cached:],
        grad_v[:, :, cached:],
        grad_k[:, :, :cached],
        grad_v[:, :, :cached],
        None,
        None,
        None,
    )


def _tiles_of(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """allowed [B, 1, L, S] as masked_attention takes it, every tile partial: of the map op nobody knows how many there are."""
    B, _, L, S = allowed.shape
    padded = F.pad(allowed, (0, -S % TILE, 0, -L % TILE))
    rows, columns = tiles_in(L), tiles_in(S)
    bits = padded.view(B, rows, TILE, columns, TILE).transpose(2, 3).long()
    words = (bits << torch.arange(TILE, device=bits.device)).sum(4).view(-1, TILE)
    return torch.arange(B * rows * columns, dtype=torch.int32, device=bits.device).view(B, 1, rows, columns), words


define_op(
    OpSpec(
        "feature_reuse_attention(Tensor q_local, Tensor k_local, Tensor v_local, Tensor k_cache, Tensor v_cache, Tensor seen,"
        " Tensor local_ids, float scale) -> (Tensor out, Tensor lse)",
        family="feature_reuse",
        reference=reference.feature_reuse_attention,
        check=_check,
        check_data=lambda q, k, v, k_cache, v_cache, seen, ids, scale: check_ids(
            FUNCTION, "local_ids", ids, k_cache.shape[2]
        ),
        fake=lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))),
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)
