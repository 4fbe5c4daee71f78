"""Calls that reach every kernel of visible_tokens in every launch configuration, as data: op -> argument lists.

scripts/gpu_check.py runs the launchers on meta tensors of these shapes, records what they would launch and compiles it.
"""

import torch
from maskops.kernels._common import Arg

# One width per column tile (256, 128, 64, 32, 16); odd ones also take the path without 16-byte vectors.
WIDTHS = (768, 100, 60, 30, 10)
NEEDS = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
PATCHES = (
    ((32, 3, 224, 224), (16, 16)),
    ((8, 3, 224, 224), (14, 14)),
    ((4, 3, 16, 224, 224), (2, 16, 16)),
    ((8, 1, 28, 28), (4, 4)),
)


def _f(*shape):
    return Arg("float", shape)


def _i(*shape):
    return Arg("int64", shape)


CU = Arg("int32", (65,))
FILLS = (_f(768), _f(196, 768), _f(64, 196, 768))


def _grid(image, patch):
    tokens = 1
    for size, step in zip(image[2:], patch, strict=True):
        tokens *= size // step
    values = image[1]
    for step in patch:
        values *= step
    return tokens, values


def _patch_samples(to_images):
    calls = []
    for image, patch in PATCHES:
        tokens, values = _grid(image, patch)
        for ids, slots in ((None, tokens), (_i(image[0], tokens // 4), tokens // 4)):
            for channels_last in (True, False):
                if to_images:
                    calls.append((_f(image[0], slots, values), ids, patch, image[2:], channels_last))
                else:
                    calls.append((_f(*image), ids, patch, channels_last))
    return tuple(calls)


def _embed_samples(backward):
    calls = []
    # 49 of 196 tokens: few programs at batch 32, enough for the large tile at batch 256.
    cases = [((batch, 3, 224, 224), (16, 16), 768) for batch in (32, 256)]
    cases += [((32, 3, 224, 224), (14, 14), 1024), ((4, 3, 16, 224, 224), (2, 16, 16), 768)]
    for image, patch, channels in cases:
        tokens, _ = _grid(image, patch)
        weight = _f(channels, image[1], *patch)
        for ids, slots in ((_i(image[0], tokens // 4), tokens // 4), (None, tokens)):
            if backward:
                calls.append((_f(image[0], slots, channels), _f(*image), weight, ids, True, True, True, True))
            else:
                for bias, pos in ((_f(channels), _f(tokens, channels)), (None, None)):
                    calls.append((_f(*image), weight, bias, ids, pos))
    return tuple(calls)


AOT_SAMPLES = {
    "visible_tokens_split": ((Arg("bool", (64, 196)), 49, 147), (Arg("bool", (8, 1568)), 392, 1176)),
    "visible_tokens_gather": tuple((_f(64, 196, d), _i(64, 49)) for d in WIDTHS),
    "_visible_tokens_gather_backward": ((_f(64, 49, 768), _i(64, 49), 196),),
    "visible_tokens_restore": tuple(
        (_f(64, prefix + 49, 768), _i(64, 196), _i(64), fill, pos, prefix)
        for fill in FILLS for prefix in (0, 1) for pos in (None, _f(prefix + 196, 768))
    ) + tuple((_f(64, 49, d), _i(64, 196), _i(64), _f(d), None, 0) for d in WIDTHS[1:]),
    "_visible_tokens_restore_backward": tuple(
        (_f(64, 1 + 196, 768), _i(64, 196), _i(64), 49, 1, fill_dim, *needs)
        for fill_dim in (1, 2, 3) for needs in NEEDS
    ) + tuple((_f(3, 196, d), _i(3, 196), _i(3), 49, 0, 1, True, True, True) for d in WIDTHS[1:]),
    "visible_tokens_pack": tuple((_f(64, 196, d), _i(64, 196), CU, 3136) for d in WIDTHS),
    "visible_tokens_unpack": tuple((_f(3136, 768), _i(64, 196), CU, fill) for fill in FILLS)
    + tuple((_f(3136, d), _i(64, 196), CU, _f(d)) for d in WIDTHS[1:]),
    "_visible_tokens_unpack_backward": tuple(
        (_f(64, 196, 768), _i(64, 196), CU, 3136, fill_dim, True, True) for fill_dim in (1, 2, 3)
    ),
    "visible_tokens_patchify": _patch_samples(to_images=False),
    "visible_tokens_unpatchify": _patch_samples(to_images=True),
    "visible_tokens_embed": _embed_samples(backward=False),
    "_visible_tokens_embed_backward": _embed_samples(backward=True),
}  # fmt: skip

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = {name: {"dtypes": _FLOATS, "reason": ""} for name in AOT_SAMPLES}
