"""masked_regression, contrastive_loss, linear_max_pool, mask_pool, replaced_token_loss, pairwise_rank_loss: what they equal."""

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.testing import assert_same_loss, op_of

IDS = torch.tensor([0, 1, 2])


# ---------------------------------------------------------------- regression

WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda p, t: F.mse_loss(p, t, reduction="none").mean(-1),
    "l1": lambda p, t: F.l1_loss(p, t, reduction="none").mean(-1),
    "smooth_l1": lambda p, t: F.smooth_l1_loss(p, t, reduction="none", beta=0.5).mean(-1),
    "cosine": lambda p, t: 1 - F.cosine_similarity(p, t, dim=-1),
}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", WRITTEN)
def test_regression_equals_torch(kind: str, normalise: bool) -> None:
    pred, target, mask = (
        torch.randn(3, 5, 24, requires_grad=True),
        torch.randn(3, 5, 24) * 3 + 1,
        torch.rand(3, 5) < 0.6,
    )
    wanted = F.layer_norm(target, (24,), eps=1e-6) if normalise else target
    each = WRITTEN[kind](pred, wanted)
    ours = maskops.masked_regression(pred, target, mask, kind, normalise, beta=0.5)
    assert_same_loss(ours, each[mask].mean(), [pred])
    ours = maskops.masked_regression(pred, target, mask, kind, normalise, beta=0.5, reduction="none")
    assert_same_loss(ours, each * mask, [pred], torch.rand(3, 5))
    ours = maskops.masked_regression(pred, target, mask, kind, normalise, "all", beta=0.5)
    assert_same_loss(ours, (each * mask).mean(), [pred])


def test_regression_of_nothing_and_of_nan() -> None:
    pred, target = torch.randn(4, 8, requires_grad=True), torch.full((4, 8), math.nan)
    loss = maskops.masked_regression(pred, target, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (pred.grad == 0).all()


# ---------------------------------------------------------------- contrast


def published_contrast(query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """compute_preds of fairseq's wav2vec 2.0: all distractors side by side, equal ones at -inf."""
    targets = torch.cat([keys[positive][None], keys[negatives].transpose(0, 1)])
    equal = (targets[0] == targets[1:]).all(-1)
    logits = F.cosine_similarity(query, targets, dim=-1) / temperature
    logits = torch.cat([logits[:1], logits[1:].masked_fill(equal, -math.inf)])
    return F.cross_entropy(logits.T, torch.zeros(len(query), dtype=torch.long))


def test_contrast_equals_the_published_loss() -> None:
    query, keys = (
        torch.randn(12, 16, requires_grad=True),
        torch.randn(9, 16).index_copy(0, torch.tensor([3]), torch.zeros(1, 16)),
    )
    keys[3] = keys[5]  # two codes that are one
    keys.requires_grad_()
    positive, negatives = torch.randint(9, (12,)), torch.randint(9, (12, 7))
    positive[0], negatives[0, 0] = 3, 5
    ours = maskops.contrastive_loss(query, keys, positive, negatives, 0.1)
    assert_same_loss(ours, published_contrast(query, keys, positive, negatives, 0.1), [query, keys])


def test_contrast_keeps_collisions_when_asked_to() -> None:
    keys = torch.eye(3)
    asked = [
        maskops.contrastive_loss(keys[:1], keys, torch.tensor([0]), torch.tensor([[0, 1]]), 1.0, how)
        for how in ("-inf", "keep")
    ]
    expected = [math.log(1 + math.exp(-1)), math.log(2 + math.exp(-1))]
    torch.testing.assert_close(torch.stack(asked), torch.tensor(expected))
    with pytest.raises(ValueError, match="collide must be one of"):
        maskops.contrastive_loss(keys, keys, torch.arange(3), torch.zeros(3, 1, dtype=torch.long), collide="drop")


def test_contrast_with_nan_in_a_query_that_does_not_count() -> None:
    query, keys = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    query[1] = math.nan
    query.requires_grad_()
    loss = maskops.contrastive_loss(query, keys, torch.tensor([0, -1, 2]), torch.tensor([[1], [2], [-1]]))
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all() and keys.grad.isfinite().all() and (query.grad[1] == 0).all()


def test_nan_in_a_key_that_no_counted_query_names() -> None:
    """0 times NaN in the backward of a unit vector once was that key's gradient."""
    query, keys = torch.randn(3, 8), torch.randn(5, 8)
    keys[3:] = math.nan
    keys.requires_grad_()
    ids = torch.tensor([[1], [3], [-1]])
    maskops.contrastive_loss(query, keys, torch.tensor([0, -1, 2]), ids).backward()
    assert keys.grad.isfinite().all() and (keys.grad[3:] == 0).all() and (keys.grad[:3] != 0).any(1)[:2].all()


def test_autocast_takes_two_dtypes() -> None:
    x, y, ids = torch.randn(3, 8), torch.randn(3, 8), torch.arange(3)
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            (maskops.masked_regression(half, y), maskops.masked_regression(half.float(), y)),
            (
                maskops.contrastive_loss(half, y, ids, ids[:, None]),
                maskops.contrastive_loss(half.float(), y, ids, ids[:, None]),
            ),
        ]
    for mixed, wide in losses:
        torch.testing.assert_close(mixed, wide, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="masked_regression: target must be bfloat16"):
        maskops.masked_regression(half, y)
    with pytest.raises(ValueError, match="contrastive_loss: keys must be bfloat16"):
        maskops.contrastive_loss(half, y, ids, ids[:, None])


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda x: maskops.masked_regression(x, x, kind="smooth_l1", beta=math.inf),
            "beta must be at least 1e-38 and finite",
        ),
        (lambda x: maskops.masked_regression(x, x, eps=math.inf), "eps must be at least 1e-38 and finite"),
        (lambda x: maskops.masked_regression(x.long(), x), "pred must be float32 or"),
        (
            lambda x: maskops.contrastive_loss(x, x, IDS.int(), IDS[:, None]),
            r"positives must be int64 \[M\], got int32",
        ),
        (lambda x: maskops.contrastive_loss(x, x, IDS, IDS), r"negatives_ids must have shape \[M, K\]"),
        (lambda x: maskops.contrastive_loss(x, x, IDS, IDS[:, None], math.inf), "temperature must be at least"),
        (lambda x: maskops.pairwise_rank_loss(x, x, margin=math.inf), "margin must be finite"),
        (lambda x: maskops.mask_pool(x[None].to_sparse(), x[None]), "features must be a dense tensor"),
        (
            lambda x: maskops.linear_max_pool(torch.nested.nested_tensor([x]), x),
            "hidden must be a dense tensor, got a nested",
        ),
    ],
)
def test_arguments_once_taken_in_silence(call: Callable, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(torch.ones(3, 3))


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_max_pool_without_width_and_with_a_nan_that_counts(backend: str) -> None:
    bias = torch.arange(3.0, requires_grad=True)
    out = maskops.linear_max_pool(torch.ones(2, 4, 0), torch.ones(3, 0), bias, backend=backend)
    assert torch.equal(out, bias.expand(2, 3)) and torch.autograd.grad(out.sum(), bias)[0].tolist() == [2, 2, 2]
    assert (
        maskops.masked_regression(torch.ones(2, 0), torch.ones(2, 0), kind="cosine", normalise=True, backend=backend)
        == 1
    )
    hidden = torch.randn(2, 70, 4)
    hidden[0, 40] = math.nan
    out = maskops.linear_max_pool(hidden, torch.randn(3, 4), backend=backend)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 << 30, reason="reserves 7 GB")
def test_max_pool_of_more_tokens_than_float32_counts() -> None:
    tokens = 2**24 + 20
    hidden = torch.zeros(1, tokens, 1)
    hidden[0, 2**24 + 1] = 5
    _, at = op_of("native", "masked_loss_max_pool")(hidden, torch.ones(1, 1), None, torch.ones(1, tokens) > 0)
    assert at.item() == 2**24 + 1


def test_mask_pool_of_sums_beyond_float16() -> None:
    for tokens, value in ((1000, 100.0), (70000, 0.5)):
        out = maskops.mask_pool(torch.full((1, tokens, 1), value).half(), torch.ones(1, 1, tokens) > 0)
        torch.testing.assert_close(out.item(), value, rtol=2e-3, atol=0)


def test_max_pool_equals_the_naive_one() -> None:
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((3, 40, 16), (150, 16), (150,)))
    mask = torch.rand(3, 40) < 0.5
    ours = maskops.linear_max_pool(hidden, weight, bias, mask)
    theirs = F.linear(hidden, weight, bias).masked_fill(~mask[..., None], -math.inf).amax(1)
    assert_same_loss(ours, theirs, [hidden, weight, bias], torch.rand(3, 150))


def test_max_pool_without_tokens_and_with_nan() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    hidden[0, 0] = math.nan
    mask = torch.tensor([[False, True, True], [False, False, False]])
    out = maskops.linear_max_pool(hidden, weight, mask=mask)
    assert out[0].isfinite().all() and (out[1] == -math.inf).all()
    assert torch.autograd.grad(out[0].sum(), weight)[0].isfinite().all()
    mask[0, 0] = True
    assert maskops.linear_max_pool(hidden, weight, mask=mask)[0].isnan().all(), "a NaN that counts is not swept away"


@pytest.mark.parametrize("kind", ["mean", "softmax", "max"])
def test_mask_pool_equals_one_mask_after_the_other(kind: str) -> None:
    features = torch.randn(2, 7, 5, requires_grad=True)
    shown = torch.rand(2, 3, 7) < 0.6
    shown[0, 1] = False
    scores = torch.randn(2, 3, 7).masked_fill(~shown, -math.inf)
    out = maskops.mask_pool(features, scores if kind == "softmax" else shown, kind)
    rows = []
    for b in range(2):
        for q in range(3):
            chosen = features[b, shown[b, q]]
            if len(chosen) == 0:
                rows.append(features[b, 0] * 0)
            elif kind == "softmax":
                rows.append(scores[b, q][shown[b, q]].softmax(0) @ chosen)
            else:
                rows.append(chosen.mean(0) if kind == "mean" else chosen.amax(0))
    assert_same_loss(out, torch.stack(rows).view(2, 3, 5), [features], torch.rand(2, 3, 5))


def test_maps_of_thirty_are_masks() -> None:
    """The Works check of Mask-Adapter: maps of +30 inside and -30 outside give mask pooling."""
    features, shown = torch.randn(1, 50, 8), torch.rand(1, 4, 50) < 0.5
    soft = maskops.mask_pool(features, torch.where(shown, 30.0, -30.0), "softmax")
    torch.testing.assert_close(soft, maskops.mask_pool(features, shown), rtol=1e-5, atol=1e-5)


def test_mask_pool_of_hidden_nan() -> None:
    features = torch.ones(1, 3, 2)
    features[0, 2] = math.nan
    for kind in ("mean", "max"):
        assert (maskops.mask_pool(features, torch.tensor([[[True, True, False]]]), kind) == 1).all()
    with pytest.raises(ValueError, match="kind must be one of"):
        maskops.mask_pool(features, torch.ones(1, 1, 3, dtype=torch.bool), "median")
    with pytest.raises(ValueError, match="masks must be bool"):
        maskops.mask_pool(features, torch.ones(1, 1, 3), "max")


# ---------------------------------------------------------------- composed losses


def test_replaced_token_loss() -> None:
    """Every position counts, and a sample that equals the original is no replacement."""
    logits = torch.randn(2, 6, requires_grad=True)
    text = torch.randint(9, (2, 6))
    read = text.clone()
    read[:, 2] = 9
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    ours = maskops.replaced_token_loss(logits, text, read, real)
    theirs = F.binary_cross_entropy_with_logits(logits[real], (text != read)[real].float())
    assert_same_loss(ours, theirs, [logits])
    assert (torch.autograd.grad(ours, logits)[0] != 0).equal(real)
    spoiled = torch.where(real, logits.detach(), math.nan).requires_grad_()
    loss = maskops.replaced_token_loss(spoiled, text, read, real)
    torch.testing.assert_close(loss, ours)
    assert torch.autograd.grad(loss, spoiled)[0].isfinite().all()
    assert maskops.replaced_token_loss(logits, text, read, ~torch.ones_like(real)) == 0
    with pytest.raises(ValueError, match="replaced_token_loss: corrupted must have shape"):
        maskops.replaced_token_loss(logits, text, read[:, 1:])


def test_pairwise_rank_loss() -> None:
    scores, target = torch.randn(2, 5, requires_grad=True), torch.rand(2, 5)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    target[0, 1] = target[0, 2]
    total, pairs = 0.0, 0
    for b in range(2):
        for i in range(5):
            for j in range(5):
                if mask[b, i] and mask[b, j] and target[b, i] > target[b, j]:
                    total, pairs = total - F.logsigmoid(scores[b, i] - scores[b, j]), pairs + 1
    assert_same_loss(maskops.pairwise_rank_loss(scores, target, mask), total / pairs, [scores])
    assert maskops.pairwise_rank_loss(scores, torch.zeros(2, 5)) == 0
    spoiled = torch.where(mask, target, math.nan)
    torch.testing.assert_close(maskops.pairwise_rank_loss(scores, spoiled, mask), total / pairs)
    with pytest.raises(ValueError, match="margin must be at least 0"):
        maskops.pairwise_rank_loss(scores, target, margin=-1.0)
