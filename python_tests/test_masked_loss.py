"""What is special to masked_loss: parity with the published formula, constant patches, reductions, hidden NaN."""

import math

import pytest
import torch
from torch import Tensor

import maskops


def published(pred: Tensor, images: Tensor, mask: Tensor, patch: int, norm_pix: bool) -> Tensor:
    """forward_loss of MAE, in PyTorch."""
    target = maskops.patchify(images, patch)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    per_patch = (pred - target).square().mean(-1)
    return (per_patch * mask).sum() / mask.sum()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_the_published_loss_and_gradient(norm_pix: bool) -> None:
    images, pred = torch.rand(4, 3, 64, 64), torch.randn(4, 16, 768, requires_grad=True)
    split = maskops.random_masking(4, 16, 0.75, seed=0)
    ours = maskops.masked_patch_loss(pred, images, split, 16, norm_pix=norm_pix)
    theirs = published(pred, images, split.mask.float(), 16, norm_pix)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(loss, pred)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)


def test_reductions_agree() -> None:
    images, pred = torch.rand(3, 1, 8, 8), torch.randn(3, 4, 16)
    split = maskops.split_tokens(torch.tensor([[True, False, False, True], [True] * 4, [False] * 4]))
    loss = {r: maskops.masked_patch_loss(pred, images, split, 4, reduction=r) for r in ("mean", "sum", "none")}
    torch.testing.assert_close(loss["none"].sum(), loss["sum"])
    torch.testing.assert_close(loss["sum"] / 6, loss["mean"])
    assert torch.equal(loss["none"] == 0, ~split.mask)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_weighted_reduction_has_the_right_gradient(reduction: str) -> None:
    """reduction="none" times weights, the case that other fused losses get wrong."""
    images, pred = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 48, requires_grad=True)
    split, weights = maskops.random_masking(2, 4, 0.5, seed=0), torch.rand(2, 4)
    ours = maskops.masked_patch_loss(pred, images, split, 4, reduction="none")
    target = maskops.patchify(images, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    theirs = (pred - target).square().mean(-1) * split.mask
    scale = weights if reduction == "none" else torch.ones(2, 4)
    grads = [torch.autograd.grad((x * scale).sum(), pred)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_constant_patch_has_target_zero(value: float) -> None:
    """One-pass variances give garbage, or NaN, for a constant patch of large pixels."""
    split = maskops.split_tokens(torch.ones(1, 4, dtype=torch.bool))
    loss = maskops.masked_patch_loss(torch.zeros(1, 4, 48), torch.full((1, 3, 8, 8), value), split, 4)
    assert loss.item() == 0


def test_nothing_selected_is_zero_with_zero_gradient() -> None:
    split = maskops.split_tokens(torch.zeros(2, 4, dtype=torch.bool))
    pred = torch.randn(2, 4, 48, requires_grad=True)
    loss = maskops.masked_patch_loss(pred, torch.rand(2, 3, 8, 8), split, 4)
    loss.backward()
    assert loss.item() == 0 and pred.grad.abs().sum() == 0


def test_hidden_nan_reaches_nothing() -> None:
    split = maskops.split_tokens(torch.tensor([[True, False, False, False]]))
    pred, images = torch.randn(1, 4, 16), torch.rand(1, 1, 8, 8)
    pred[:, 1:], images[:, :, 4:] = math.nan, math.inf
    pred.requires_grad_()
    loss = maskops.masked_patch_loss(pred, images, split, 4)
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all() and pred.grad[:, 1:].abs().sum() == 0


def test_smooth_l1_equals_torch() -> None:
    split = maskops.split_tokens(torch.ones(2, 4, dtype=torch.bool))
    pred, images = torch.randn(2, 4, 48), torch.rand(2, 3, 8, 8)
    ours = maskops.masked_patch_loss(pred, images, split, 4, norm_pix=False, kind="smooth_l1", beta=2.0)
    theirs = torch.nn.functional.smooth_l1_loss(pred, maskops.patchify(images, 4), beta=2.0)
    torch.testing.assert_close(ours, theirs)


def test_images_get_no_gradient() -> None:
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    pred = torch.randn(1, 4, 48, requires_grad=True)
    maskops.masked_patch_loss(pred, images, maskops.split_tokens(torch.ones(1, 4, dtype=torch.bool)), 4).backward()
    assert images.grad is None and pred.grad is not None


def test_unknown_reduction() -> None:
    split = maskops.split_tokens(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction must be one of"):
        maskops.masked_patch_loss(torch.ones(1, 4, 48), torch.ones(1, 3, 8, 8), split, 4, reduction="avg")


@pytest.mark.parametrize("values", [1, 2, 4, 6])
def test_small_patches_wherever_the_heap_puts_their_buffer(values: int) -> None:
    """The buffer of a patch of four pixels once missed its place when malloc gave an address far from a cache line's start."""
    split = maskops.split_tokens(torch.tensor([[True, False]]))
    pred, images = torch.ones(1, 2, values), torch.zeros(1, values, 1, 2)
    held = []
    for size in range(200):
        held.append(torch.UntypedStorage(16 * size + 8))
        assert maskops.masked_patch_loss(pred, images, split, 1, norm_pix=False).item() == 1.0
