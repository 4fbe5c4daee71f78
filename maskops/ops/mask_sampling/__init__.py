"""The family mask_sampling: draw random masks on the device, the same ones on every backend.

Size letters: B rows, N tokens, K kept slots, M masked slots.
"""

from maskops.ops.mask_sampling import laws as _laws  # noqa: F401
from maskops.ops.mask_sampling.grids import (
    MultiBlock,
    block_masking,
    cell_masking,
    frequency_masking,
    multiblock_masking,
    sector_groups,
    tube_masking,
)
from maskops.ops.mask_sampling.moves import MovedSpans, move_spans, restore_spans
from maskops.ops.mask_sampling.scores import colour_masking, guided_masking, weighted_masking
from maskops.ops.mask_sampling.sequences import draw_spans, group_masking, span_masking
from maskops.ops.mask_sampling.tokens import (
    MaskCollator,
    bernoulli_masking,
    corrupt_tokens,
    prefix_masking,
    random_words,
    sample_gates,
)
from maskops.ops.mask_sampling.uniform import INT64, Seed, random_masking, seed_tensor, shuffled_split  # noqa: F401
from maskops.ops.mask_sampling.views import disjoint_masking, modality_masking, nested_masking

__all__ = [
    "MaskCollator", "MovedSpans", "MultiBlock", "bernoulli_masking", "block_masking", "cell_masking", "colour_masking",
    "corrupt_tokens", "disjoint_masking", "draw_spans", "frequency_masking", "group_masking", "guided_masking",
    "modality_masking", "move_spans", "multiblock_masking", "nested_masking", "prefix_masking", "random_masking",
    "random_words", "restore_spans", "sample_gates", "sector_groups", "span_masking", "tube_masking", "weighted_masking",
]  # fmt: skip
