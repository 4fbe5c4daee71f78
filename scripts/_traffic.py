"""Global memory that the CUDA kernels ask for, counted by the emulator, against the least that the op can do with.

The least is the bytes model of maskops/testing/F: TRAFFIC = {op: function of the op's arguments -> bytes}. The call is one of those
below, or the op's largest sample.
"""

import importlib
import math

import torch

from maskops._registry import OPS

PATCH = (4, 4)
IMAGE = (4, 3, 32, 32)  # 64 patches of 48 values
WIDTH = 64


def _split():
    """A split of [4, 64] tokens with rows of different lengths, as the ops would make it."""
    torch.manual_seed(0)
    mask = torch.rand(IMAGE[0], 64) < 0.75
    num_keep = (~mask).sum(1)
    args = (mask, int(num_keep.max()), int(mask.sum(1).max()))
    return args, torch.ops.maskops_reference.visible_tokens_split(*args)


def example_arguments():
    """op -> arguments of a small but typical call, float32."""
    split_args, (ids, _, restore, num_keep, cu) = _split()
    B, (N, V, slots) = IMAGE[0], (64, 48, ids.shape[1])
    total, patch, images = int(cu[-1]), list(PATCH), torch.rand(IMAGE)
    rows, kept, fill, pos = (
        torch.rand(B, N, WIDTH),
        torch.rand(B, slots, WIDTH),
        torch.rand(WIDTH),
        torch.rand(N, WIDTH),
    )
    weight, bias = torch.rand(WIDTH, IMAGE[1], *PATCH), torch.rand(WIDTH)
    seed, lengths = torch.tensor([7, 0]), torch.full((B,), N)
    loss = (restore, num_keep, lengths - num_keep, patch, True, "l2", 1.0, "masked")
    pred = torch.rand(B, N, V)
    _, stats = torch.ops.maskops_reference.masked_loss_patch(pred, images, *loss)
    few = torch.full((B,), N // 4)
    return {
        "visible_tokens_split": split_args,
        "visible_tokens_gather": (rows, ids),
        "_visible_tokens_gather_backward": (kept, ids, N),
        "visible_tokens_restore": (kept, restore, num_keep, fill, pos, 0),
        "_visible_tokens_restore_backward": (rows, restore, num_keep, slots, 0, 1, True, True, True),
        "visible_tokens_pack": (rows, restore, cu, total),
        "visible_tokens_unpack": (torch.rand(total, WIDTH), restore, cu, fill),
        "_visible_tokens_unpack_backward": (rows, restore, cu, total, 1, True, True),
        "visible_tokens_patchify": (images, ids, patch, True),
        "visible_tokens_unpatchify": (torch.rand(B, slots, V), ids, patch, list(IMAGE[2:]), True),
        "visible_tokens_embed": (images, weight, bias, ids, pos),
        "_visible_tokens_embed_backward": (kept, images, weight, ids, True, True, True, True),
        "mask_sampling_uniform": (seed, few, None, None, N, N // 4, N - N // 4, False, 1, 1, 1),
        "mask_sampling_top": (torch.rand(B, N), N // 4),
        "mask_sampling_rank": (torch.rand(B, N), few, None, N // 4, N - N // 4, False),
        "masked_loss_patch": (pred, images, *loss),
        "_masked_loss_patch_backward": (torch.rand(B, N), pred, images, stats, *loss),
    }


def _nm_arguments():
    """op -> arguments of the family nm_matmul: a 2:4 weight [64, 128] and 64 rows."""
    M, N, K, n, m = 64, 64, 128, 2, 4
    reference, x, weight = torch.ops.maskops_reference, torch.rand(M, K), torch.rand(N, K)
    mask = reference.nm_matmul_mask(weight, n, m)
    values, indices = reference.nm_matmul_compress(weight * mask, n, m)
    bits, grad, bias = reference.nm_matmul_pack(mask)[None], torch.rand(M, N), torch.rand(N)
    soft = (x, weight, torch.randn(N, K // m, 6), torch.tensor([7, 0]), n, m, 1.0, 1.0, False)
    return {
        "nm_matmul_mask": (weight, n, m),
        "nm_matmul_compress": (weight * mask, n, m),
        "nm_matmul_decompress": (values, indices, n, m, K),
        "nm_matmul_select": (weight, indices, n, m),
        "nm_matmul_linear": (x, values, indices, bias, n, m),
        "_nm_matmul_linear_backward": (grad, x, values, indices, n, m, True, True),
        "nm_matmul_pack": (mask,),
        "nm_matmul_bitmask": (x[None], weight, bits, bias, None),
        "_nm_matmul_bitmask_backward": (grad[None], x[None], weight, bits, True, True, False, False),
        "nm_matmul_soft": soft,
        "_nm_matmul_soft_backward": (grad, torch.tensor(1.0), *soft, True, True),
    }


def _is_emulated(op):
    """Whether the op has CUDA C++ that the emulator runs."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"maskops_emulated::{op}", "CPU")


def _largest_samples(samples, models):
    """op -> arguments, of the ops with CUDA C++ and a bytes model: the float32 sample that has to move most."""
    found = {}
    for sample in samples:
        op = sample.op
        if op not in models or not _is_emulated(op):
            continue
        args = sample.arguments()
        if op not in found or models[op](*args) > models[op](*found[op]):
            found[op] = args
    return found


def measure(families):
    """One row (dict) per op: least and counted bytes; math.nan where there is no number, with the reason in "note"."""
    emulator = importlib.import_module("maskops.testing.emulator")
    reason = emulator.reason_unavailable()
    if not reason:
        emulator.load()
    models, samples = {}, []
    for family in families:
        shared = importlib.import_module(f"maskops.testing.{family}")
        models |= getattr(shared, "TRAFFIC", {})
        samples += shared.SAMPLES
    rows = []
    calls = _largest_samples(samples, models) | example_arguments() | _nm_arguments()
    for op, args in calls.items():
        if OPS[op].family not in families:
            continue
        row = {"op": op, "least": math.nan, "counted": math.nan, "note": "", "error": ""}
        if op in models:
            row["least"] = models[op](*args)
        else:
            row["note"] = "no bytes model"
        if reason:
            row["note"] = reason
        elif _is_emulated(op):
            row["counted"] = _counted(emulator, op, args)
        else:
            row["note"] = "no CUDA C++ kernel: Triton serves GPUs"
        if row["counted"] < row["least"]:
            row["error"] = "counted less than the least: the bytes model is wrong"
        rows.append(row)
    return rows


def _counted(emulator, op, args):
    before = emulator.counters()
    getattr(torch.ops.maskops_emulated, op)(*args)
    after = emulator.counters()
    return sum(after[name] - before[name] for name in ("bytes_read", "bytes_written"))
