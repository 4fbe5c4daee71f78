"""The ops of the laws: schemas, checks in the words of csrc/math/mask_sampling_law_check.h, results.

Letters: B rows, N tokens, h x w grid, T targets or taps, S filters or spans, A table rows, G groups, L levels, M numbers.
"""

from typing import Any

import torch
from torch import Tensor

from maskops._checks import check_tensor, check_values, describe, fail
from maskops._registry import OpSpec, define_op
from maskops.reference import mask_sampling as reference

INT64, INT32, FLOAT32, BOOL = (torch.int64,), (torch.int32,), (torch.float32,), (torch.bool,)
MAX_SIDE, MAX_FILTERED, MAX_GROUPS = 64, 12288, 4096


def check_in(op: str, arg: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        fail(op, arg, f"be in [{low}, {high}]", value)


def check_seed(op: str, seed: Tensor) -> None:
    check_tensor(op, "seed", seed, "[2]", INT64, (2,), seed)


def _define(schema: str, check: Any, fake: Any, check_data: Any = None, **options: Any) -> None:
    name = schema.split("(", 1)[0]
    op = getattr(reference, name)
    define_op(
        OpSpec(
            schema,
            family="mask_sampling",
            reference=op,
            check=check,
            fake=fake,
            check_data=check_data,
            **options,
        )
    )


# ---------------------------------------------------------------- per element


def _check_words(seed: Tensor, count: int) -> None:
    check_seed("random_words", seed)
    check_in("random_words", "count", count, 0, 2**40)


def _check_bernoulli(seed: Tensor, threshold: Tensor, B: int, N: int) -> None:
    op = "bernoulli_masking"
    check_seed(op, seed)
    check_in(op, "B", B, 0, 2**40)
    check_in(op, "N", N, 0, 2**40)
    check_tensor(op, "threshold", threshold, "[1 or B, 1 or N]", INT64, (None, None), seed)
    if any(have not in (1, want) for have, want in zip(threshold.shape, (B, N), strict=True)):
        expected = f"have shape [1 or B, 1 or N] = [1 or {int(B)}, 1 or {int(N)}]"
        fail(op, "threshold", expected, describe(threshold))


def _check_race(seed: Tensor, weight: Tensor) -> None:
    check_seed("weighted_masking", seed)
    check_tensor("weighted_masking", "weight", weight, "[B, N]", FLOAT32, (None, None), seed)


def _check_race_data(seed: Tensor, weight: Tensor) -> None:
    check_values("weighted_masking", "weight", (weight >= 0) & weight.isfinite(), "be finite and at least 0", weight)


def _check_top(score: Tensor, count: int) -> None:
    op = "guided_masking"
    check_tensor(op, "score", score, "[B, N]", (torch.float32, torch.float64), (None, None), score)
    check_in(op, "N", score.shape[1], 0, 2**30 - 1)
    check_in(op, "num_hard", count, 0, score.shape[1])


def _check_corrupt(
    seed: Tensor, ids: Tensor, mask: Tensor, mask_id: int, low: int, high: int, hide: int, swap: int
) -> None:
    op = "corrupt_tokens"
    check_seed(op, seed)
    check_tensor(op, "ids", ids, "[B, N]", INT64, (None, None), seed)
    check_tensor(op, "mask", mask, "[B, N]", BOOL, tuple(ids.shape), seed)
    check_in(op, "hide", hide, 0, 2**32)
    check_in(op, "swap", swap, hide, 2**32)
    check_in(op, "high - low", high - low, int(swap > hide), 2**31 - 1)


def _check_gate(seed: Tensor, logits: Tensor, gumbel: bool) -> None:
    check_seed("sample_gates", seed)
    check_tensor("sample_gates", "logits", logits, "[M]", FLOAT32, (None,), seed)


def _setup_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.gumbel = inputs[2]


def _backward_gate(ops: Any, ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    """The slope of the probability: sigmoid' = p (1 - p), or exp(l - exp(l)) for a single Gumbel."""
    (logits,) = ctx.saved_tensors
    logits = torch.where(logits.isnan(), -64.0, logits).clamp(-64, 64)  # as the op reads them: no derivative overflows
    if ctx.gumbel:
        return None, grad * (logits - logits.exp()).exp(), None
    open_ = logits.sigmoid()
    return None, grad * (open_ * (1 - open_)), None


def _check_colour(seed: Tensor, taps: Tensor, B: int, h: int, w: int) -> None:
    op = "colour_masking"
    check_seed(op, seed)
    check_in(op, "B", B, 0, 2**31 - 1)
    check_in(op, "h", h, 0, 4096)
    check_in(op, "w", w, 0, 4096)
    check_tensor(op, "taps", taps, "[S, T]", INT32, (None, None), seed)
    check_in(op, "S", taps.shape[0], 1, 3)
    if taps.shape[1] % 2 != 1 or taps.shape[1] > 63:
        fail(op, "T", "be odd and at most 63", taps.shape[1])
    around = taps.shape[1] - 1
    numbers = (h + around) * (2 * w + around)
    if numbers > MAX_FILTERED:
        fail(op, "(h + T - 1) (2 w + T - 1)", f"be at most {MAX_FILTERED}", numbers)


def _check_colour_data(seed: Tensor, taps: Tensor, B: int, h: int, w: int) -> None:
    sums = taps.long().abs().sum(1)
    check_values("colour_masking", "sum of |taps|", sums <= 1024, "be at most 1024", sums)


_define("mask_sampling_words(Tensor seed, SymInt count) -> Tensor", _check_words,
        lambda seed, count: seed.new_empty(count))  # fmt: skip
_define(
    "mask_sampling_bernoulli(Tensor seed, Tensor threshold, SymInt B, SymInt N) -> Tensor", _check_bernoulli,
    lambda seed, threshold, B, N: seed.new_empty(B, N, dtype=torch.bool),
)  # fmt: skip
_define("mask_sampling_race(Tensor seed, Tensor weight) -> Tensor", _check_race,
        lambda seed, weight: torch.empty_like(weight, memory_format=torch.contiguous_format), _check_race_data,
        constants=("weight",))  # fmt: skip
_define("mask_sampling_top(Tensor score, SymInt count) -> Tensor", _check_top,
        lambda score, count: score.new_empty(score.shape, dtype=torch.bool), constants=("score",))  # fmt: skip
_define(
    "mask_sampling_corrupt(Tensor seed, Tensor ids, Tensor mask, SymInt mask_id, SymInt low, SymInt high, SymInt hide,"
    " SymInt swap) -> Tensor", _check_corrupt,
    lambda seed, ids, *a: torch.empty_like(ids, memory_format=torch.contiguous_format),
)  # fmt: skip
_define(
    "mask_sampling_gate(Tensor seed, Tensor logits, bool gumbel) -> Tensor", _check_gate,
    lambda seed, logits, gumbel: torch.empty_like(logits, memory_format=torch.contiguous_format),
    setup=_setup_gate, backward=_backward_gate,
)  # fmt: skip
_define(
    "mask_sampling_colour(Tensor seed, Tensor taps, SymInt B, SymInt h, SymInt w) -> Tensor", _check_colour,
    lambda seed, taps, B, h, w: seed.new_empty(B, h * w, dtype=torch.float32), _check_colour_data,
)  # fmt: skip


# ---------------------------------------------------------------- rectangles


def _check_sides(op: str, h: int, w: int) -> None:
    check_in(op, "h", h, 0, MAX_SIDE)
    check_in(op, "w", w, 0, MAX_SIDE)


def _check_blocks(
    seed: Tensor, num_mask: Tensor, shapes: Tensor, h: int, w: int, smallest: int, largest: int, tries: int, fill: bool
) -> None:
    op = "block_masking"
    check_seed(op, seed)
    check_tensor(op, "num_mask", num_mask, "[B]", INT64, (None,), seed)
    check_tensor(op, "shapes", shapes, "[A, 2]", INT32, (None, 2), seed)
    check_in(op, "A", shapes.shape[0], 1, 2**20)
    _check_sides(op, h, w)
    check_in(op, "smallest", smallest, 1, 4096)
    check_in(op, "largest", largest, 1, 4096)
    check_in(op, "tries", tries, 1, 1000)


def _check_blocks_data(seed: Tensor, num_mask: Tensor, shapes: Tensor, h: int, w: int, *_: Any) -> None:
    inside = (num_mask >= 0) & (num_mask <= h * w)
    check_values("block_masking", "num_mask", inside, f"be in [0, {h * w}]", num_mask)


def _check_multiblock(
    seed: Tensor, target_sizes: Tensor, context_sizes: Tensor, B: int, h: int, w: int, targets: int, min_keep: int,
    shared: bool,
) -> None:  # fmt: skip
    op = "multiblock_masking"
    check_seed(op, seed)
    for name, sizes in (("target_sizes", target_sizes), ("context_sizes", context_sizes)):
        check_tensor(op, name, sizes, "[A, 2]", INT32, (None, 2), seed)
    for sizes in (target_sizes, context_sizes):
        check_in(op, "A", sizes.shape[0], 1, 2**20)
    check_in(op, "B", B, 0, 2**31 - 1)
    _check_sides(op, h, w)
    check_in(op, "targets", targets, 1, 64)
    check_in(op, "min_keep", min_keep, 0, 4096)


def _check_multiblock_data(
    seed: Tensor, target_sizes: Tensor, context_sizes: Tensor, B: int, h: int, w: int, *_: Any
) -> None:
    for name, sizes in (("target_sizes", target_sizes), ("context_sizes", context_sizes)):
        inside = (sizes >= 1) & (sizes < torch.tensor([h, w], device=sizes.device))
        check_values("multiblock_masking", name, inside, "be at least 1 and less than the grid's side", sizes)


_define(
    "mask_sampling_blocks(Tensor seed, Tensor num_mask, Tensor shapes, SymInt h, SymInt w, SymInt smallest, SymInt largest,"
    " SymInt tries, bool fill) -> Tensor", _check_blocks,
    lambda seed, num_mask, shapes, h, w, *a: seed.new_empty(num_mask.shape[0], h * w, dtype=torch.bool),
    _check_blocks_data,
)  # fmt: skip
_define(
    "mask_sampling_multiblock(Tensor seed, Tensor target_sizes, Tensor context_sizes, SymInt B, SymInt h, SymInt w,"
    " SymInt targets, SymInt min_keep, bool shared) -> (Tensor targets_mask, Tensor context_mask)", _check_multiblock,
    lambda seed, t, c, B, h, w, targets, *a: (
        seed.new_empty(B, targets, h * w, dtype=torch.bool), seed.new_empty(B, h * w, dtype=torch.bool)
    ),
    _check_multiblock_data,
)  # fmt: skip


# ---------------------------------------------------------------- sequences


def _check_spans(
    seed: Tensor, num_spans: Tensor, num_starts: Tensor, lengths: Tensor, N: int, span: int, replacement: bool
) -> None:
    op = "span_masking"
    check_seed(op, seed)
    check_tensor(op, "num_spans", num_spans, "[B]", INT64, (None,), seed)
    check_tensor(op, "num_starts", num_starts, "[B]", INT64, (num_spans.shape[0],), seed)
    check_tensor(op, "lengths", lengths, "[B]", INT64, (num_spans.shape[0],), seed)
    check_in(op, "N", N, 0, 2**18)
    check_in(op, "span", span, 1, 2**18)


def _check_spans_data(seed: Tensor, num_spans: Tensor, num_starts: Tensor, lengths: Tensor, N: int, *_: Any) -> None:
    op = "span_masking"
    check_values(op, "lengths", (lengths >= 0) & (lengths <= N), f"be in [0, {N}]", lengths)
    check_values(op, "num_starts", (num_starts >= 0) & (num_starts <= lengths), "be in [0, length]", num_starts)
    check_values(op, "num_spans", (num_spans >= 0) & (num_spans <= 2**20), "be in [0, 2^20]", num_spans)


def _check_groups(order: Tensor, groups: Tensor, budgets: Tensor, by_tokens: bool) -> None:
    op = "group_masking"
    check_tensor(op, "order", order, "[B, G]", INT64, (None, None), order)
    check_tensor(op, "groups", groups, "[1 or B, N]", INT64, (None, None), order)
    if groups.shape[0] not in (1, order.shape[0]):
        fail(op, "groups", f"have shape [1 or B, N] = [1 or {int(order.shape[0])}, *]", describe(groups))
    check_tensor(op, "budgets", budgets, "[B, L]", INT64, (order.shape[0], None), order)
    check_in(op, "G", order.shape[1], 0, MAX_GROUPS)
    check_in(op, "L", budgets.shape[1], 1, 254)


def _check_groups_data(order: Tensor, groups: Tensor, budgets: Tensor, by_tokens: bool) -> None:
    G = order.shape[1]
    for name, x in (("order", order), ("groups", groups)):
        check_values("group_masking", name, (x >= -1) & (x < G), f"be in [-1, {G})", x)


def _check_intervals(seed: Tensor, num_spans: Tensor, lengths: Tensor, max_spans: int) -> None:
    op = "draw_spans"
    check_seed(op, seed)
    check_tensor(op, "num_spans", num_spans, "[B]", INT64, (None,), seed)
    check_tensor(op, "lengths", lengths, "[B]", INT64, (num_spans.shape[0],), seed)
    check_in(op, "max_spans", max_spans, 1, 64)


def _check_intervals_data(seed: Tensor, num_spans: Tensor, lengths: Tensor, max_spans: int) -> None:
    check_values("draw_spans", "lengths", (lengths >= 0) & (lengths < 2**31), "be in [0, 2^31)", lengths)
    inside = (num_spans >= 0) & (num_spans <= max_spans)
    check_values("draw_spans", "num_spans", inside, f"be in [0, {max_spans}]", num_spans)


_define(
    "mask_sampling_spans(Tensor seed, Tensor num_spans, Tensor num_starts, Tensor lengths, SymInt N, SymInt span,"
    " bool replacement) -> Tensor", _check_spans,
    lambda seed, num_spans, num_starts, lengths, N, *a: seed.new_empty(num_spans.shape[0], N, dtype=torch.bool),
    _check_spans_data,
)  # fmt: skip
_define(
    "mask_sampling_groups(Tensor order, Tensor groups, Tensor budgets, bool by_tokens) -> Tensor", _check_groups,
    lambda order, groups, *a: order.new_empty(order.shape[0], groups.shape[1], dtype=torch.uint8), _check_groups_data,
)  # fmt: skip
_define(
    "mask_sampling_intervals(Tensor seed, Tensor num_spans, Tensor lengths, SymInt max_spans) -> Tensor",
    _check_intervals,
    lambda seed, num_spans, lengths, max_spans: seed.new_empty(num_spans.shape[0], max_spans, 2),
    _check_intervals_data,
)  # fmt: skip
