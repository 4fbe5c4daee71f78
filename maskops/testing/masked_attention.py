"""Samples, error samples and traffic of the family masked_attention."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskops.ops.masked_attention import program as rules
from maskops.ops.masked_attention.mask import AttentionMask
from maskops.reference import masked_attention as reference
from maskops.testing import ErrorSample, Sample, randn

G = torch.Generator
ATTENTION, BACKWARD, GRAD_BIAS = "masked_attention", "_masked_attention_backward", "_masked_attention_grad_bias"
MAP = "masked_attention_map"
B, H, L, S = 2, 2, 70, 130  # two tiles by three: interpreted, a tile takes a tenth of a second


def ragged(g: G, heads: int = 1, queries: int = L, keys: int = S) -> AttentionMask:
    """Anything at all; the first query sees nothing, the second one everything, and there are empty and full tiles."""
    seen = torch.rand(B, heads, queries, keys, generator=g) < 0.4
    seen[:, :, 0], seen[:, :, 1] = False, True
    if keys > 128:
        seen[0, :, :64, 64:128], seen[-1, :, 64:, :64] = False, True
        seen[-1, :, 64:, 128:] = True
    return AttentionMask.dense(seen)


MASKS: dict[str, Callable[[G], AttentionMask]] = {
    "dense": lambda g: ragged(g, H),
    "dense_shared": lambda g: AttentionMask.dense(torch.rand(L, S, generator=g) < 0.5),
    "causal": lambda g: AttentionMask.causal(3),
    "window": lambda g: AttentionMask.window(20, 9),
    "lengths": lambda g: AttentionMask.key_padding(torch.tensor([S, 64])),
    "no_keys": lambda g: AttentionMask.key_padding(torch.tensor([0, 70])),
    "prefix": lambda g: AttentionMask.prefix(torch.tensor([10, 90])),
    "block_causal": lambda g: AttentionMask.block_causal(24),
    "columns": lambda g: AttentionMask.intervals(
        torch.randint(0, 50, (B, H, S), generator=g), torch.randint(40, 120, (B, H, S), generator=g)
    ),
    "rows": lambda g: AttentionMask.query_intervals(
        torch.randint(0, 90, (L,), generator=g), torch.randint(60, S + 9, (L,), generator=g)
    ),
    "segments": lambda g: AttentionMask.segments(
        torch.randint(0, 3, (B, L), generator=g), torch.randint(0, 3, (1, S), generator=g)
    ),
    "packed": lambda g: AttentionMask.packed(
        torch.tensor([0, 40, 40, 66]), torch.tensor([0, 64, 70, 130]), total_q=L, total_k=S
    ),
    "groups": lambda g: AttentionMask.groups(
        torch.rand(4, 4, generator=g) < 0.5, torch.randint(0, 4, (L,), generator=g), torch.randint(0, 4, (B, S), generator=g)
    ),
    "keys": lambda g: AttentionMask.keys(torch.rand(B, S, generator=g) < 0.3),
    "hide_self": lambda g: AttentionMask.hide_self(),
    "blocks": lambda g: AttentionMask.from_block_map(torch.rand(1, H, 7, 9, generator=g) < 0.4, 16, 16),
    "combined": lambda g: (
        (AttentionMask.causal() | AttentionMask.key_padding(torch.tensor([9, 60])))
        & (AttentionMask.window(70, 70) | ~AttentionMask.keys(torch.rand(1, S, generator=g) < 0.5))
        & AttentionMask.segments(torch.randint(0, 2, (L,), generator=g), torch.randint(0, 2, (B, S), generator=g))
    ),
}  # fmt: skip


def _map(mask: Callable[[G], AttentionMask], queries: int = L, keys: int = S, batch: int | None = None) -> Callable:
    def make(dtype: torch.dtype, g: G) -> tuple:
        made = mask(g)
        return made.ints, made.bytes, list(made.program), batch or made.batch, made.heads, queries, keys

    return make


def _tensors(
    g: G, dtype: torch.dtype, channels: int, queries: int, keys: int, groups: int, layout: str
) -> list[Tensor]:
    def one(heads: int, rows: int) -> Tensor:
        if layout == "packed":  # [rows, heads, channels] seen as [B, heads, rows, channels]
            return randn(g, dtype, B, rows, heads, channels).transpose(1, 2)
        if layout == "strided":
            return randn(g, dtype, B, heads, rows, channels + 3)[..., 3:]
        return randn(g, dtype, B, heads, rows, channels)

    return [one(H, queries), one(groups, keys), one(groups, keys)]


def _attention(
    mask: Callable[[G], AttentionMask] | None, channels: int = 16, queries: int = L, keys: int = S, groups: int = H,
    layout: str = "plain", hidden_nan: bool = False, bias: tuple[int, ...] | None = None, hide: bool = False,
    dropout_p: float = 0.0, entropy: bool = False,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype, g: G) -> tuple:
        q, k, v = _tensors(g, dtype, channels, queries, keys, groups, layout)
        tiles = words = None
        if mask is not None:
            made = mask(g)
            rest = made.ints, made.bytes, list(made.program), made.batch, made.heads, queries, keys
            tiles, words = reference.masked_attention_map(*rest)
            if hidden_nan:
                seen = reference.dense_mask(tiles, words, queries, keys).expand(B, H, queries, keys)
                unseen_keys, blind = ~seen.any(2), ~seen.any(3)
                q[blind], k[unseen_keys], v[unseen_keys] = math.nan, math.nan, math.nan
        added = None if bias is None else randn(g, dtype, *bias)
        if hide:
            added[..., ::3], added[:, :, :1] = -math.inf, -math.inf
        seed = torch.tensor([7, 2**40 + 3]) if dropout_p else None
        return q, k, v, tiles, words, added, seed, 0.3, dropout_p, entropy

    return make


def _backward(*args: object, **options: object) -> Callable:
    forward = _attention(*args, **options)

    def make(dtype: torch.dtype, g: G) -> tuple:
        inputs = forward(dtype, g)
        results = reference.masked_attention(*inputs)
        return *(randn(g, x.dtype, *x.shape) for x in results), *inputs[:3], *results, *inputs[3:-1]

    return make


def _hidden(queries: int, keys: int) -> Callable[[G], AttentionMask]:
    def make(g: G) -> AttentionMask:
        seen = torch.rand(B, H, queries, keys, generator=g) < 0.4
        seen[:, :, 5], seen[:, :, :, 66] = False, False
        return AttentionMask.dense(seen)

    return make


def _small(g: G) -> AttentionMask:
    return AttentionMask.window(2, 3) | AttentionMask.keys(torch.tensor([[2]]), Lk=7)


def _combined(g: G) -> AttentionMask:
    documents = torch.randint(0, 2, (20,), generator=g), torch.randint(0, 2, (B, 70), generator=g)
    return (AttentionMask.causal(40) | AttentionMask.key_padding(torch.tensor([9, 60]))) & AttentionMask.segments(
        *documents
    )


def _documents(g: G) -> AttentionMask:
    return AttentionMask.packed(torch.tensor([0, 5, 5, 18]), torch.tensor([0, 30, 34, 70]), total_q=20, total_k=70)


SHORT = dict(queries=20, keys=70)  # an interpreted kernel takes a second for a few tiles
CASES = {
    "small": _attention(_small, channels=3, queries=5, keys=7),
    "small_heads": _attention(_small, channels=2, queries=5, keys=7, groups=1),
    "large": _attention(MASKS["dense"]),
    "large_plain": _attention(None, **SHORT),
    "large_causal": _attention(MASKS["causal"], channels=8, **SHORT),
    "large_lengths": _attention(lambda g: AttentionMask.key_padding(torch.tensor([0, 66])), channels=24, **SHORT),
    "large_combined": _attention(_combined, channels=33, **SHORT),
    "large_heads": _attention(MASKS["block_causal"], groups=1, channels=8, **SHORT),
    "large_packed": _attention(_documents, layout="packed", **SHORT),
    "large_strided": _attention(MASKS["window"], layout="strided", **SHORT),
    "large_hidden_nan": _attention(_hidden(20, 70), hidden_nan=True, **SHORT),
    "large_wide": _attention(MASKS["hide_self"], channels=128, queries=17, keys=66),
    "large_bias": _attention(lambda g: ragged(g, H, 20, 70), bias=(1, H, 20, 70), **SHORT),
    "large_keys_bias": _attention(None, bias=(B, H, 1, 70), hide=True, **SHORT),
    "large_dropped": _attention(MASKS["block_causal"], dropout_p=0.25, **SHORT),
    "large_entropy": _attention(_hidden(20, 70), hidden_nan=True, entropy=True, **SHORT),
    "large_all": _attention(
        MASKS["causal"], groups=1, bias=(1, 1, 20, 70), hide=True, dropout_p=0.3, entropy=True, **SHORT
    ),
    "small_all": _attention(_small, channels=3, queries=5, keys=7, bias=(B, 1, 5, 7), dropout_p=0.4, entropy=True),
    "one_query": _attention(lambda g: AttentionMask.key_padding(torch.tensor([90, 30])), queries=1),
    "no_queries": _attention(None, queries=0),
    "without_keys": _attention(None, keys=0),
}
GRADIENTS = {
    "dense": _backward(lambda g: ragged(g, H, 66, 70), bias=(1, H, 66, 70), queries=66, keys=70),
    "none": _backward(None, channels=20, bias=(B, 1, 1, 70), **SHORT),
    "heads": _backward(MASKS["window"], groups=1, bias=(1, 1, 20, 70), hide=True, **SHORT),
    "all": _backward(MASKS["causal"], groups=1, bias=(B, H, 20, 70), dropout_p=0.3, entropy=True, **SHORT),
}


def slow_on(name: str) -> tuple[str, ...]:
    """Masks and options are of no dtype; NaN and inf are."""
    return ("triton",) if name in ("dense", "all") or (name.startswith("large") and name != "large_hidden_nan") else ()


SAMPLES = [
    *(Sample(ATTENTION, name, make, slow_on(name)) for name, make in CASES.items()),
    *(Sample(op, name, make, slow_on(name)) for name, make in GRADIENTS.items() for op in (BACKWARD, GRAD_BIAS)),
    Sample(BACKWARD, "no_bias", _backward(MASKS["window"], **SHORT)),
    Sample(BACKWARD, "dropped", _backward(MASKS["window"], dropout_p=0.5, **SHORT), ("triton",)),
    Sample(BACKWARD, "entropy", _backward(MASKS["window"], entropy=True, **SHORT)),
    *(Sample(MAP, name, _map(mask)) for name, mask in MASKS.items()),
    Sample(MAP, "even", _map(MASKS["causal"], 128, 192, batch=2)),
    Sample(MAP, "nothing", _map(MASKS["causal"], 0, 70)),
]


def _at(index: int, value: Callable) -> Callable:
    return lambda *args: (*args[:index], value(args[index]), *args[index + 1 :])


def _all(change: Callable, first: int = 0) -> Callable:
    """Change q, k and v, or k and v."""
    return lambda *args: (*args[:first], *(change(x) for x in args[first:3]), *args[3:])


def _three_heads(*args: object) -> tuple:
    return *args[:5], torch.zeros(1, 3, 1, args[1].shape[2]), *args[6:]


NO_BLOCK = list(rules.instruction(rules.BLOCK_CAUSAL, block=0))
BAND = list(rules.instruction(rules.BAND, low=0, high=1))
ERRORS = [
    ErrorSample(ATTENTION, "rank", _at(0, lambda q: q[0]), ValueError, "masked_attention: q must have shape"),
    ErrorSample(ATTENTION, "keys_dtype", _at(1, Tensor.double), ValueError, "masked_attention: k must be float32"),
    ErrorSample(ATTENTION, "values_shape", _at(2, lambda v: v[:, :, 1:]), ValueError, "masked_attention: v must have shape"),
    ErrorSample(ATTENTION, "no_channels", _all(lambda x: x[..., :0]), ValueError, "q must have 1 to 256 channels"),
    ErrorSample(ATTENTION, "heads", _all(lambda x: x.repeat(1, 2, 1, 1)[:, :3], 1), ValueError, "k must have a number of heads"),
    ErrorSample(ATTENTION, "one_of_two", _at(4, lambda w: None), ValueError, "tiles and words must be given together"),
    ErrorSample(ATTENTION, "tiles_shape", _at(3, lambda t: t[:, :, 1:]), ValueError, "tiles must have shape"),
    ErrorSample(ATTENTION, "tiles_batch", _at(3, lambda t: torch.cat([t] * 3)), ValueError, "tiles must have 1 or 2 entries"),
    ErrorSample(ATTENTION, "words", _at(4, lambda w: w[:, 1:]), ValueError, "words must have shape"),
    ErrorSample(ATTENTION, "tile", _at(3, lambda t: t + 1000), IndexError, r"tiles\[0, 0, 0, 0\] must be in \[-2, "),
    ErrorSample(ATTENTION, "bias", _at(5, lambda b: torch.zeros(2, 2, 1, 9)), ValueError, "bias must have shape"),
    ErrorSample(ATTENTION, "bias_heads", _three_heads, ValueError, "bias must have 1 or 2 entries along axis 1"),
    ErrorSample(ATTENTION, "no_seed", _at(8, lambda p: 0.5), ValueError, "seed must be given with dropout_p > 0"),
    ErrorSample(ATTENTION, "dropout", _at(8, lambda p: 1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
    ErrorSample(MAP, "code", _at(2, lambda p: [99, *p[1:]]), ValueError, "program must be a postfix program"),
    ErrorSample(MAP, "two_values", _at(2, lambda p: p + BAND), ValueError, "program must be a postfix program"),
    ErrorSample(MAP, "too_deep", _at(2, lambda p: BAND * 5 + [rules.AND, *[0] * 7] * 4), ValueError, "needs 1 to 4 values"),
    ErrorSample(MAP, "reach", _at(5, lambda n: 5000), ValueError, "program must read at inside its"),
    ErrorSample(MAP, "ints", _at(0, Tensor.long), ValueError, "ints must be int32"),
    ErrorSample(MAP, "length", _at(5, lambda n: -1), ValueError, "Lq must be in"),
    ErrorSample(MAP, "block", _at(2, lambda p: NO_BLOCK), ValueError, "program must have positive blocks"),
]  # fmt: skip


def seen_pairs(tiles: Tensor | None, words: Tensor | None, batch: int, heads: int, queries: int, keys: int) -> int:
    """Pairs of query and key in tiles that are not empty."""
    if tiles is None:
        return batch * heads * queries * keys
    used = (tiles != reference.EMPTY).float().mean().item()
    return round(batch * heads * queries * keys * used)


def _bytes(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> int:
    return (2 * q.numel() + k.numel() + v.numel()) * q.element_size() + q[..., 0].numel() * 4


def _backward_bytes(
    grad: Tensor, grad_lse: Tensor, grad_entropy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> int:
    return (4 * q.numel() + 2 * (k.numel() + v.numel())) * q.element_size()


def _map_bytes(ints: Tensor, bytes: Tensor, program: list[int], batch: int, heads: int, queries: int, keys: int) -> int:
    return ints.numel() * 4 + bytes.numel() + batch * heads * -(-queries // 64) * -(-keys // 64) * 4


def _grad_bias_bytes(*args: Tensor) -> int:
    q, k, v, bias = *args[3:6], args[11]
    return (2 * q.numel() + k.numel() + v.numel() + bias.numel()) * q.element_size()


TRAFFIC = {ATTENTION: _bytes, BACKWARD: _backward_bytes, GRAD_BIAS: _grad_bias_bytes, MAP: _map_bytes}
