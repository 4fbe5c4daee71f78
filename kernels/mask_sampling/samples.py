"""Calls that reach every kernel of mask_sampling in every launch configuration, for scripts/gpu_check.py."""

import torch
from maskops.kernels._common import Arg


def _samples():
    """op -> argument lists."""
    seed, counts, lengths, mask = Arg("int64", (2,)), Arg("int64", (64,)), Arg("int64", (64,)), Arg("bool", (64, 196))
    sizes, ids, values = Arg("int32", (128, 2)), Arg("int64", (64, 196)), Arg("float32", (64, 196))
    uniform, rank = [], []
    for ascending in (False, True):
        for given in (None, lengths):
            for hidden in (None, mask):
                uniform.append((seed, counts, given, hidden, 196, 49, 147, ascending, 1, 1, 1))
            rank.append((Arg("float", (64, 196)), counts, given, 49, 147, ascending))
    for cells in ((14, 2, 2), (196, 8, 1), (14, 1, 2)):  # Triton makes a constant of each 1
        uniform.append((seed, counts, None, None, 196, 49, 147, True, *cells))
    return {
        "mask_sampling_uniform": tuple(uniform),
        "mask_sampling_rank": tuple(rank),
        "mask_sampling_top": ((Arg("float", (64, 196)), 73),),
        "mask_sampling_words": ((seed, 1000),),
        "mask_sampling_bernoulli": ((seed, Arg("int64", (64, 1)), 64, 196),),
        "mask_sampling_race": ((seed, values),),
        "mask_sampling_corrupt": ((seed, ids, mask, 3, 10, 1000, 2**31, 2**31 + 9),),
        "mask_sampling_gate": tuple((seed, Arg("float32", (1000,)), gumbel) for gumbel in (False, True)),
        "mask_sampling_colour": ((seed, Arg("int32", (2, 13)), 64, 14, 14),),
        "mask_sampling_blocks": tuple((seed, counts, sizes, 14, 14, 4, 98, 10, fill) for fill in (False, True)),
        "mask_sampling_multiblock": tuple((seed, sizes, sizes, 64, 14, 14, 4, 10, shared) for shared in (False, True)),
        "mask_sampling_spans": tuple((seed, counts, counts, lengths, 500, 10, again) for again in (False, True)),
        "mask_sampling_groups": tuple((ids, ids, Arg("int64", (64, 2)), by_tokens) for by_tokens in (False, True)),
        "mask_sampling_intervals": ((seed, counts, lengths, 16),),
    }


AOT_SAMPLES = _samples()
_NO_FLOATS = {"dtypes": (), "reason": "takes no floating tensor"}
LIMITS = dict.fromkeys(AOT_SAMPLES, _NO_FLOATS) | {
    "mask_sampling_uniform": {"dtypes": (), "reason": "takes no floating tensor; N < 2^30"},
    "mask_sampling_rank": {"dtypes": (torch.float32, torch.float64), "reason": "noise of 16 bits would tie too often"},
    "mask_sampling_top": {"dtypes": (torch.float32, torch.float64), "reason": "scores of 16 bits are widened before"},
    "mask_sampling_race": {"dtypes": (torch.float32,), "reason": "weights are read by their bits"},
    "mask_sampling_gate": {"dtypes": (torch.float32,), "reason": "logits are compared as whole numbers of 24 bits"},
}
