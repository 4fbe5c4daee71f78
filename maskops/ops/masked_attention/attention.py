"""masked_attention and merge_attention, the ops behind them, and their checks."""

import math
from typing import Any

import torch
from torch import Tensor

from maskops._backends import find_op, public
from maskops._checks import FLOATS, check_is_tensor, check_tensor, describe, fail
from maskops._registry import OpSpec, define_op, dynamic_size
from maskops.ops.masked_attention import program as rules
from maskops.ops.masked_attention.mask import AttentionMask, BlockMap
from maskops.reference import masked_attention as reference
from maskops.reference.masked_attention import TILE
from maskops.reference.visible_tokens import accumulation_dtype

FUNCTION, MERGE, MAP = "masked_attention", "merge_attention", "AttentionMask"
MOST_CHANNELS = 256


@public(
    "masked_attention",
    native="C++ on CPU (AVX-512, AVX2, portable); on CUDA the Triton kernel; float32, float64, bfloat16, float16",
)
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | BlockMap | None = None, *, scale: float | None = None,
    return_lse: bool = False, enable_gqa: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the keys that a mask lets each query see, computing only tiles in which somebody sees somebody.

        out = softmax(scale q k^T + (0 where seen, else -inf)) v        lse = log sum exp of the same scores

    Args:
        q: float [B, H, Lq, D], or packed [total_q, H, D] with an AttentionMask.packed or segments mask; D at most 256.
        k, v: q's dtype [B, G, Lk, D] or [total_k, G, D].  G = H, or with enable_gqa a divisor of it: head h reads h // (H / G).
        mask: what each query sees; None: every key. Its batch and heads are those of q, or 1.
        scale: of the scores. Default: 1 / sqrt(D).
        return_lse: also return lse, with which merge_attention joins results over different keys.
        enable_gqa: allow fewer heads of k and v than of q.
        backend: "auto", "native", "triton", "reference".

    Returns:
        out, like q; with return_lse (out, lse), lse float32 (float64 for float64) [B, H, Lq] or [H, total_q]. Differentiable
        (once) in q, k and v, also through lse.

    Notes:
        A query that sees no key gets out 0, lse -inf and gradient 0. NaN and inf at keys that a query does not see reach neither
        its result nor its gradient; one that sees such a value gets NaN. Scores are never stored. Deterministic.

    Raises:
        ValueError: wrong dtype, shape, device, or a mask of other sizes.  TypeError: q, k or v is no tensor, mask is no mask.

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
    packed = q.dim() == 3
    if packed:
        q, k, v = (x.transpose(0, 1)[None] if x.dim() == 3 else x for x in (q, k, v))
    if not enable_gqa and k.dim() == q.dim() == 4 and k.shape[1] != q.shape[1]:
        fail(FUNCTION, "k", f"have {int(q.shape[1])} heads as q, or enable_gqa be set", describe(k))
    tiles = words = None
    if mask is not None:
        compiled = _compiled(mask, q, k, backend)
        tiles, words = compiled.tiles, compiled.words
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    out, lse = find_op("masked_attention", q.device.type, backend)(q, k, v, tiles, words, scale)
    if packed:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


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


def tiles_in(length: int) -> int:
    return -(-length // TILE)


def _check(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, scale: float) -> None:
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
        for axis, size in ((0, B), (1, H)):
            if tiles.shape[axis] != 1 and tiles.shape[axis] != size:
                fail(FUNCTION, "tiles", f"have 1 or {int(size)} entries along axis {axis}", describe(tiles))
        check_tensor(FUNCTION, "words", words, "[P, 64]", (torch.int64,), (None, TILE), q)


def _check_data(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, words: Tensor | None, *rest: Any) -> None:
    if tiles is None or tiles.device.type != "cpu":
        return
    bad = (tiles < reference.FULL) | (tiles >= len(words))
    if bad.any():
        at = torch.nonzero(bad)[0].tolist()
        where = ", ".join(str(i) for i in at)
        raise IndexError(f"{FUNCTION}: tiles[{where}] must be in [-2, {len(words)}), got {int(tiles[tuple(at)])}")


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ops: Any, ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple:
    q, k, v, out, lse, tiles, words = ctx.saved_tensors
    grads = ops._masked_attention_backward(grad, grad_lse, q, k, v, out, lse, tiles, words, ctx.scale)
    return *grads, None, None, None


def _check_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor | None,
    words: Tensor | None, scale: float,
) -> None:  # fmt: skip
    _check(q, k, v, tiles, words, scale)
    check_tensor(FUNCTION, "grad", grad, "[B, H, Lq, D]", (q.dtype,), q.shape, q)
    check_tensor(FUNCTION, "out", out, "[B, H, Lq, D]", (q.dtype,), q.shape, q)
    for name, x in (("grad_lse", grad_lse), ("lse", lse)):
        check_tensor(FUNCTION, name, x, "[B, H, Lq]", (accumulation_dtype(q.dtype),), q.shape[:3], q)


define_op(
    OpSpec(
        "masked_attention(Tensor q, Tensor k, Tensor v, Tensor? tiles, Tensor? words, float scale) -> (Tensor out, Tensor lse)",
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
define_op(
    OpSpec(
        "_masked_attention_backward(Tensor grad, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " Tensor? tiles, Tensor? words, float scale) -> (Tensor, Tensor, Tensor)",
        family="masked_attention",
        reference=reference._masked_attention_backward,
        check=_check_backward,
        check_data=lambda grad, grad_lse, q, k, v, out, lse, *rest: _check_data(q, k, v, *rest),
        fake=lambda grad, grad_lse, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
        cuda=False,
    )
)


# ---------------------------------------------------------------- the op that compiles masks


def _check_map(ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, L: int, S: int) -> None:
    check_tensor(MAP, "ints", ints, "[n]", (torch.int32,), (None,), ints)
    check_tensor(MAP, "bytes", bytes, "[n]", (torch.uint8,), (None,), ints)
    if not 1 <= rules.depth(program) <= rules.DEPTH:
        fail(MAP, "program", f"be a postfix program that needs 1 to {rules.DEPTH} values", list(program))
    for name, size in (("B", B), ("H", H), ("Lq", L), ("Lk", S)):
        if size < 0 or size >= rules.FAR:
            fail(MAP, name, f"be in [0, {rules.FAR})", size)
    for code, operands in rules.instructions(program):
        blocks = {rules.BLOCK_CAUSAL: ("block",), rules.BYTES: ("q_block", "k_block")}.get(code, ())
        if any(operands[name] < 1 for name in blocks):
            fail(MAP, "program", "have positive blocks", list(program))
        if B and H and L and S:
            _check_reach(code, operands, ints.shape[0], bytes.shape[0], (B - 1, H - 1, L - 1, S - 1))


def _check_reach(code: int, o: dict[str, int], ints: int, bytes: int, last: tuple[int, int, int, int]) -> None:
    """That a rule reads inside its tensors, at the last position as at the first."""
    for name, low, high, size in rules.reach(code, o, last):
        if low < 0 or high >= size_of(size, ints, bytes):
            fail(
                MAP, "program", f"read {name} inside its {size_of(size, ints, bytes)} {size}", f"places {low} to {high}"
            )


def size_of(kind: str, ints: int, bytes: int) -> int:
    return ints if kind == "ints" else bytes


def _fake_map(ints: Tensor, bytes: Tensor, program: list[int], B: int, H: int, L: int, S: int) -> tuple[Tensor, Tensor]:
    return ints.new_empty(B, H, tiles_in(L), tiles_in(S)), ints.new_empty(dynamic_size(), TILE, dtype=torch.int64)


define_op(
    OpSpec(
        "masked_attention_map(Tensor ints, Tensor bytes, SymInt[] program, SymInt B, SymInt H, SymInt Lq, SymInt Lk)"
        " -> (Tensor tiles, Tensor words)",
        family="masked_attention",
        reference=reference.masked_attention_map,
        check=_check_map,
        fake=_fake_map,
    )
)
