"""Calls that reach every kernel in every launch configuration, for scripts/gpu_check.py: op -> argument lists."""

import torch
from maskops.kernels._common import Arg


def _patch_samples():
    """Every kind, selection and tile of masked_patch_loss."""
    sizes = [((64, 3, 224, 224), (16, 16)), ((8, 3, 224, 224), (14, 14)), ((4, 3, 16, 224, 224), (2, 16, 16))]
    # Small patches: one per column tile of 16 to 512 values.
    sizes += [((2, channels, 32, 32), (4, 4)) for channels in (1, 2, 4, 8, 16, 32)]
    choices = [(norm, kind, on) for norm in (True, False) for kind in ("l2", "l1", "smooth_l1") for on in ("masked",)]
    choices += [(True, "l2", "visible"), (True, "l2", "all")]
    forward, backward = [], []
    for i, (image, patch) in enumerate(sizes):
        tokens, values = 1, image[1]
        for size, step in zip(image[2:], patch, strict=True):
            tokens, values = tokens * (size // step), values * step
        counts, restore = Arg("int64", image[:1]), Arg("int64", (image[0], tokens))
        pred, acc = Arg("float", (image[0], tokens, values)), Arg("accumulator", (image[0], tokens))
        stats = Arg("accumulator", (image[0], tokens, 2))
        for norm, kind, on in choices if i == 0 else choices[:1]:
            for images in (Arg("float", image), Arg("accumulator", image)):
                rest = (restore, counts, counts, patch, norm, kind, 0.5, on)
                forward.append((pred, images, *rest))
                backward.append((acc, pred, images, stats, *rest))
    return {"masked_loss_patch": tuple(forward), "_masked_loss_patch_backward": tuple(backward)}


def _linear_samples():
    """Sizes of BERT and of a large vocabulary, several codebooks, a width that fills no tile."""
    forward, backward, drawn = [], [], []
    for rows, width, books, classes, bias in (
        (4096, 768, 1, 30522, True),
        (2048, 1024, 1, 128256, False),
        (999, 100, 2, 504, True),
    ):
        hidden, weight = Arg("float", (rows, width)), Arg("float", (books, classes, width))
        shift = Arg("float", (books, classes)) if bias else None
        target, sums = Arg("int64", (rows, books)), Arg("accumulator", (rows, books))
        options = (-100, 1.0, 0.1 if bias else 0.0, 0.0)
        forward.append((hidden, weight, shift, target, *options))
        backward.append((sums, hidden, weight, shift, target, sums, *options))
        drawn.append((hidden, weight, shift, target, Arg("int64", (2,)), *options, 1.0))
    return {
        "masked_loss_linear": tuple(forward),
        "_masked_loss_linear_backward": tuple(backward),
        "masked_loss_sample": tuple(drawn),
    }


def _row_samples():
    """Widths of Base and of an odd model for every kind, 100 distractors, a bag of words."""
    samples = {name: [] for name in ("masked_loss_regression", "masked_loss_contrast", "masked_loss_max_pool")}
    samples |= {f"_{name}_backward": [] for name in list(samples)}
    choices = [("l2", True), ("l1", False), ("smooth_l1", True), ("cosine", False)]
    for rows, width, kind, normalise in [(4096, 768, *c) for c in choices] + [
        (999, 1000, "l2", True),
        (64, 20, "cosine", True),
    ]:
        x, sums = Arg("float", (rows, width)), Arg("accumulator", (rows,))
        args = (x, x, Arg("bool", (rows,)), kind, 0.5, normalise, 1e-6)
        samples["masked_loss_regression"].append(args)
        samples["_masked_loss_regression_backward"].append((sums, *args))
    for queries, keys, negatives, width, collide in ((1600, 1600, 100, 256, True), (333, 77, 5, 20, False)):
        sums = Arg("accumulator", (queries,))
        args = (
            Arg("float", (queries, width)),
            Arg("float", (keys, width)),
            Arg("int64", (queries,)),
            Arg("int64", (queries, negatives)),
        )
        samples["masked_loss_contrast"].append((*args, 10.0, collide))
        samples["_masked_loss_contrast_backward"].append((sums, *args, sums, 10.0, collide))
    for batch, tokens, width, classes, bias in ((32, 128, 768, 30522, True), (3, 21, 100, 505, False)):
        hidden, weight = Arg("float", (batch, tokens, width)), Arg("float", (classes, width))
        args = hidden, weight, Arg("float", (classes,)) if bias else None, Arg("bool", (batch, tokens))
        samples["masked_loss_max_pool"].append(args)
        grad, at = (Arg(dtype, (batch, classes)) for dtype in ("accumulator", "int64"))
        samples["_masked_loss_max_pool_backward"].append((grad, hidden, weight, at))
    return {name: tuple(calls) for name, calls in samples.items()}


AOT_SAMPLES = _patch_samples() | _linear_samples() | _row_samples()
LIMITS = {
    name: {"dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16), "reason": ""}
    for name in AOT_SAMPLES
}
