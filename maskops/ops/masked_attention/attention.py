"""masked_attention and merge_attention, the ops behind them, and their checks."""

import math
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, boolean, check_is_tensor, check_tensor, describe, fail, number
from maskops._registry import OpSpec, define_op
from maskops.ops.mask_sampling import INT64, Seed, seed_tensor
from maskops.ops.masked_attention.map import tiles_in
from maskops.ops.masked_attention.mask import AttentionMask, BlockMap
from maskops.reference import masked_attention as reference
from maskops.reference.masked_attention import TILE
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION, MERGE = "masked_attention", "merge_attention"
MOST_CHANNELS = 256


@public(
    "masked_attention",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | BlockMap | None = None, *, scale: float | None = None,
    bias: Tensor | None = None, dropout_p: float = 0, seed: Seed = None, generator: torch.Generator | None = None,
    return_lse: bool = False, return_entropy: bool = False, enable_gqa: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Attend to the keys that a mask lets each query see, computing only tiles in which somebody sees somebody.

        score = scale q k^T + bias (-inf where not seen);   lse = log sum exp score;   p = exp(score - lse)
        out = dropout(p) v;   entropy = - sum p log p

    Args:
        q: float [B, H, Lq, D], or packed [total_q, H, D] with an AttentionMask.packed or segments mask; D at most 256.
        k, v: q's dtype [B, G, Lk, D] or [total_k, G, D].  G = H, or with enable_gqa a divisor of it: head h reads h // (H / G).
        mask: what each query sees; None: every key. Its batch and heads are those of q, or 1.
        scale: of the products. Default: 1 / sqrt(D).
        bias: q's dtype [B or 1, H or 1, Lq or 1, Lk], added to the scores: T5's position buckets, ALiBi. -inf hides a key.
        dropout_p: in [0, 1), the chance that a weight is dropped; the others are divided by 1 - dropout_p.
        seed, generator: where dropout is drawn from, as in random_masking.
        return_lse: also return lse, with which merge_attention joins results over different keys.
        return_entropy: also return the entropy of each query's weights, in nats, before dropout.
        enable_gqa: allow fewer heads of k and v than of q.
        backend: "auto", "native", "triton", "reference".

    Returns:
        out, like q; with return_lse or return_entropy a tuple (out[, lse][, entropy]), the latter two float32 (float64 for
        float64) [B, H, Lq] or [H, total_q]. Differentiable (once) in q, k, v and bias through each of them.

    Notes:
        A query that sees no key gets out 0, lse -inf, entropy 0 and gradient 0. NaN and inf at keys that a query does not see
        reach neither its result nor its gradient; one that sees such a value gets a result that is not finite. Scores are never
        stored. Deterministic; dropout depends on seed, batch, head, query and key alone, so it is the same on every backend.

    Raises:
        ValueError: wrong dtype, shape, device, or a mask of other sizes.  TypeError: q, k, v or bias is no tensor, mask is no mask.

    Source:
        Tiled softmax: Dao et al., FlashAttention, 2022; masks as data: Wang et al., FlashMask, 2024 (arXiv 2410.01359).

    Example:
        >>> q = k = v = torch.randn(2, 4, 100, 32)
        >>> mask = maskops.AttentionMask.causal() & maskops.AttentionMask.key_padding(torch.tensor([100, 60]))
        >>> maskops.masked_attention(q, k, v, mask).shape
        torch.Size([2, 4, 100, 32])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_is_tensor(FUNCTION, name, x)
    if bias is not None:
        check_is_tensor(FUNCTION, "bias", bias)
    for name, x in (("return_lse", return_lse), ("return_entropy", return_entropy), ("enable_gqa", enable_gqa)):
        boolean(FUNCTION, name, x)
    if packed := q.dim() == 3:
        q, k, v = (x.transpose(0, 1)[None] if x.dim() == 3 else x for x in (q, k, v))
    if not enable_gqa and k.dim() == q.dim() == 4 and k.shape[1] != q.shape[1]:
        fail(FUNCTION, "k", f"have {int(q.shape[1])} heads as q, or enable_gqa be set", describe(k))
    tiles = words = None
    if mask is not None:
        compiled = _compiled(mask, q, k, backend)
        tiles, words = compiled.tiles, compiled.words
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else number(FUNCTION, "scale", scale)
    if not -math.inf < scale < math.inf:
        fail(FUNCTION, "scale", "be finite", scale)
    draw = None
    if dropout_p != 0:  # the default is an int: torch.compile would make a float an input, and compile twice
        dropout_p, draw = number(FUNCTION, "dropout_p", dropout_p), seed_tensor(seed, generator, q.device, FUNCTION)
    op = find_op("masked_attention", q.device.type, backend)
    out, *rows = op(q, k, v, tiles, words, bias, draw, scale, dropout_p, return_entropy)
    if packed:
        out, rows = out[0].transpose(0, 1), [x[0] for x in rows]
    wanted = [x for x, asked in zip(rows, (return_lse, return_entropy), strict=True) if asked]
    return (out, *wanted) if wanted else out


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attentions of the same queries over different keys into the one over all of them.

        lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
        out_a, out_b: [B, H, Lq, D] of masked_attention.
        lse_a, lse_b: [B, H, Lq], of the same calls with return_lse=True.

    Returns:
        (out, lse), out in out_a's dtype. Differentiable.

    Notes:
        A query that sees no key in either has out 0 and lse -inf. Deterministic.

    Raises:
        ValueError: shapes that do not belong together.  TypeError: an argument is no tensor.

    Source:
        Online softmax: Milakov and Gimelshein, 2018 (arXiv 1805.02867).

    Example:
        >>> q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
        >>> halves = [maskops.masked_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(4), slice(4, 6))]
        >>> bool(torch.allclose(maskops.merge_attention(*halves[0], *halves[1])[0], maskops.masked_attention(q, k, v), atol=1e-6))
        True
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_is_tensor(MERGE, name, x)
        if not x.is_floating_point():
            fail(MERGE, name, "be float", describe(x))
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        fail(
            MERGE,
            "out_b, lse_b",
            f"have the shapes of {describe(out_a)}, {describe(lse_a)}",
            f"{describe(out_b)}, {describe(lse_b)}",
        )
    lse = torch.logaddexp(lse_a, lse_b)
    some = lse != -math.inf
    safe = torch.where(some, lse, 0)
    a, b = (torch.where(some, (x - safe).exp(), 0)[..., None] for x in (lse_a, lse_b))
    return (a * out_a + b * out_b).to(out_a.dtype), lse


def _compiled(mask: AttentionMask | BlockMap, q: Tensor, k: Tensor, backend: str) -> BlockMap:
    if isinstance(mask, BlockMap):
        for name in ("tiles", "words"):
            check_is_tensor(FUNCTION, f"mask.{name}", getattr(mask, name))
        if q.dim() == k.dim() == 4 and (mask.Lq, mask.Lk) != (q.shape[2], k.shape[2]):
            fail(FUNCTION, "mask", f"be of {q.shape[2]} queries and {k.shape[2]} keys", f"{mask.Lq} and {mask.Lk}")
        return mask
    if not isinstance(mask, AttentionMask):
        raise TypeError(f"{FUNCTION}: mask must be an AttentionMask, a BlockMap or None, got {type(mask).__name__}")
    if q.dim() != 4 or k.dim() != 4:
        fail(FUNCTION, "q and k", "have 4 axes, or 3 packed", f"{describe(q)} and {describe(k)}")
    for name, own, size in (("batch", mask.batch, q.shape[0]), ("heads", mask.heads, q.shape[1])):
        if own not in (1, size):
            fail(FUNCTION, "mask", f"have {name} 1 or {size}", own)
    for name, own, size in (("queries", mask.Lq, q.shape[2]), ("keys", mask.Lk, k.shape[2])):
        if own is not None and own != size:
            fail(FUNCTION, "mask", f"have {size} {name}", own)
    if mask.device != q.device:
        mask = mask.to(q.device)
    return mask.compile(q.shape[2], k.shape[2], backend=backend)


# ---------------------------------------------------------------- the ops


def _check(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float, *rest: Any,
) -> None:  # fmt: skip
    check_tensor(FUNCTION, "q", q, "[B, H, Lq, D]", FLOATS, (None, None, None, None), q)
    B, H, L, D = q.shape
    if not 1 <= D <= MOST_CHANNELS:
        fail(FUNCTION, "q", f"have 1 to {MOST_CHANNELS} channels", describe(q))
    check_tensor(FUNCTION, "k", k, "[B, G, Lk, D]", (q.dtype,), (B, None, None, D), q)
    check_tensor(FUNCTION, "v", v, "[B, G, Lk, D]", (q.dtype,), k.shape, q)
    G, S = k.shape[1:3]
    if (G == 0) != (H == 0) or (G > 0 and H % G):
        fail(FUNCTION, "k", f"have a number of heads that divides {int(H)}", describe(k))
    if (tiles is None) != (words is None):
        fail(FUNCTION, "tiles and words", "be given together", "one of them")
    if tiles is not None:
        shape = "[B, H, Lq / 64, Lk / 64]"
        check_tensor(FUNCTION, "tiles", tiles, shape, (torch.int32,), (None, None, tiles_in(L), tiles_in(S)), q)
        _check_shared("tiles", tiles, (B, H))
        check_tensor(FUNCTION, "words", words, "[P, 64]", (torch.int64,), (None, TILE), q)
    if bias is not None:
        check_tensor(FUNCTION, "bias", bias, "[B, H, Lq, Lk]", (q.dtype,), (None, None, None, S), q)
        _check_shared("bias", bias, (B, H, L))
    if not 0 <= dropout_p < 1:
        fail(FUNCTION, "dropout_p", "be in [0, 1)", f"{dropout_p:g}")
    if (dropout_p > 0) != (seed is not None):
        got = None if seed is None else describe(seed)
        fail(FUNCTION, "seed", "be given with dropout_p > 0, and only then", got)
    if seed is not None:
        check_tensor(FUNCTION, "seed", seed, "[2]", INT64, (2,), q)


def _check_shared(name: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    for axis, size in enumerate(sizes):
        if x.shape[axis] != 1 and x.shape[axis] != size:
            fail(FUNCTION, name, f"have 1 or {int(size)} entries along axis {axis}", describe(x))


def _check_data(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, *rest: Any) -> None:
    if tiles is None or tiles.device.type != "cpu":
        return
    bad = (tiles < reference.FULL) | (tiles >= len(words))
    if bad.any():
        at = torch.nonzero(bad)[0].tolist()
        where = ", ".join(str(i) for i in at)
        raise IndexError(f"{FUNCTION}: tiles[{where}] must be in [-2, {len(words)}), got {int(tiles[tuple(at)])}")


def _fake(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float, entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse, lse.new_empty(*q.shape[:2], q.shape[2] if entropy else 0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, tiles, words, bias, seed, ctx.scale, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(q, k, v, *output, tiles, words, bias, seed)


def _backward(ops: Any, ctx: Any, *grads: Tensor) -> tuple:
    args = (*grads, *ctx.saved_tensors, ctx.scale, ctx.dropout_p)
    grad_q, grad_k, grad_v = ops._masked_attention_backward(*args) if any(ctx.needs[:3]) else (None, None, None)
    grad_bias = ops._masked_attention_grad_bias(*args) if ctx.needs[5] else None
    return grad_q, grad_k, grad_v, None, None, grad_bias, None, None, None, None


def _check_backward(
    grad: Tensor, grad_lse: Tensor, grad_entropy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    entropy: Tensor, tiles: Tensor | None, words: Tensor | None, bias: Tensor | None, seed: Tensor | None, scale: float,
    dropout_p: float,
) -> None:  # fmt: skip
    _check(q, k, v, tiles, words, bias, seed, scale, dropout_p)
    check_tensor(FUNCTION, "grad", grad, "[B, H, Lq, D]", (q.dtype,), q.shape, q)
    check_tensor(FUNCTION, "out", out, "[B, H, Lq, D]", (q.dtype,), q.shape, q)
    B, H, L = q.shape[:3]
    sums = (accumulation_dtype(q.dtype),)
    for name, x in (("grad_lse", grad_lse), ("lse", lse)):
        check_tensor(FUNCTION, name, x, "[B, H, Lq]", sums, (B, H, L), q)
    check_tensor(FUNCTION, "entropy", entropy, "[B, H, Lq or 0]", sums, (B, H, L if entropy.shape[2] else 0), q)
    check_tensor(FUNCTION, "grad_entropy", grad_entropy, "[B, H, Lq or 0]", sums, entropy.shape, q)


def _check_grad_bias(*args: Any) -> None:
    _check_backward(*args)
    if args[11] is None:
        fail(FUNCTION, "bias", "be given", None)


define_op(
    OpSpec(
        "masked_attention(Tensor q, Tensor k, Tensor v, Tensor? tiles, Tensor? words, Tensor? bias, Tensor? seed, float scale,"
        " float dropout_p, bool entropy) -> (Tensor out, Tensor lse, Tensor entropy)",
        family="masked_attention",
        reference=reference.masked_attention,
        check=_check,
        check_data=_check_data,
        fake=_fake,
        setup=_setup,
        backward=_backward,
        cuda=False,
        autocast="lower",
    )
)
GRADIENT = (
    "Tensor grad, Tensor grad_lse, Tensor grad_entropy, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor entropy,"
    " Tensor? tiles, Tensor? words, Tensor? bias, Tensor? seed, float scale, float dropout_p"
)
define_op(
    OpSpec(
        f"_masked_attention_backward({GRADIENT}) -> (Tensor, Tensor, Tensor)",
        family="masked_attention",
        reference=reference._masked_attention_backward,
        check=_check_backward,
        check_data=lambda *args: _check_data(*args[3:6], *args[9:11]),
        fake=lambda *args: tuple(x.new_empty(x.shape) for x in args[3:6]),
        cuda=False,
    )
)
define_op(
    OpSpec(
        f"_masked_attention_grad_bias({GRADIENT}) -> Tensor",
        family="masked_attention",
        reference=reference._masked_attention_grad_bias,
        check=_check_grad_bias,
        check_data=lambda *args: _check_data(*args[3:6], *args[9:11]),
        fake=lambda *args: args[11].new_empty(args[11].shape),
        cuda=False,
    )
)
