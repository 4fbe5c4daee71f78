"""linear_cross_entropy where its exponentials lie in the memory of the gradient of the weight (maskops/ops/masked_loss/kept.py)."""

import pytest
import torch
import torch.nn.functional as F

import maskops
from maskops.testing import randn


def kept_case(dtype: torch.dtype = torch.float32, rows: int = 70, width: int = 40) -> tuple:
    g = torch.Generator().manual_seed(0)
    hidden, weight = randn(g, dtype, rows, width), randn(g, dtype, 211, width)
    target = torch.randint(211, (rows,), generator=g)
    target[::7] = -100
    hidden[::7] = torch.nan
    return hidden.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("counted", [0.0, 0.5, 1.0])
def test_powers_over_tops_are_the_softmax(counted: float) -> None:
    """Only of the rows that are kept: the contract's samples have as many as columns."""
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        randn(g, torch.float32, 19, 24),
        randn(g, torch.float32, 2, 211, 24),
        randn(g, torch.float32, 2, 211),
    )
    target = torch.randint(211, (19, 2), generator=g)
    target[torch.rand(19, 2, generator=g) >= counted] = -100
    args = hidden, weight, bias, target, None, -100, 0.7, 0.0, 0.0, 1.0
    _, lse, _, powers, tops = torch.ops.maskops._masked_loss_linear_kept(*args)
    rows = (target != -100).any(1).nonzero()[:, 0]
    logits = 0.7 * (torch.einsum("nd,gvd->gvn", hidden[rows], weight) + bias[:, :, None])
    kept = powers[:, :, : len(rows)].log() + tops.repeat_interleave(96, 1)[:, :211, : len(rows)]
    torch.testing.assert_close(kept, logits, rtol=1e-5, atol=1e-4)
    for n, g in (target != -100).nonzero().tolist():
        where = (rows == n).nonzero()[0, 0]
        torch.testing.assert_close(lse[n, g], logits[g, :, where].logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,width", [(30, 40), (200, 70)])
def test_a_retained_graph_gives_the_same_bits_again(dtype: torch.dtype, rows: int, width: int) -> None:
    hidden, weight, target = kept_case(dtype, rows, width)
    loss = maskops.linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, copies, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_gradient_that_is_kept_is_that_of_the_op() -> None:
    """backend="native" of the op itself multiplies again."""
    hidden, weight, target = kept_case()
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 0.3, "reduction": "none"}):
        scale, rest = (
            1 / options.get("temperature", 1.0),
            (options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)),
        )
        ours = maskops.linear_cross_entropy(hidden, weight, target, **options)
        plain = torch.ops.maskops.masked_loss_linear(hidden, weight[None], None, target[:, None], -100, scale, *rest)[
            0
        ][:, 0]
        plain = plain if options else plain.sum() / (target != -100).sum()
        assert ours.grad_fn.name() != plain.grad_fn.name()
        grads = [torch.autograd.grad(x, (hidden, weight), torch.ones_like(x)) for x in (ours, plain)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sample_whose_loss_is_kept_is_that_of_the_op() -> None:
    hidden, weight, target = kept_case()
    loss, sample = maskops.linear_sample(hidden, weight, target, seed=5, sample_temperature=0.7)
    with torch.no_grad():
        plain, drawn = maskops.linear_sample(hidden, weight, target, seed=5, sample_temperature=0.7)
    assert loss == plain and torch.equal(sample, drawn) and not sample.requires_grad
    want = torch.autograd.grad(maskops.linear_cross_entropy(hidden, weight, target), (hidden, weight))
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative_of_a_kept_loss() -> None:
    hidden, weight, target = kept_case()
    loss = maskops.linear_cross_entropy(hidden, weight, target)
    (first,) = torch.autograd.grad(loss.square(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        first.square().sum().backward()


def test_kept_under_autocast() -> None:
    hidden, weight, target = kept_case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = maskops.linear_cross_entropy(hidden, weight, target)
    halves = hidden.bfloat16(), weight.bfloat16()
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(maskops.linear_cross_entropy(*halves, target), (hidden, weight)),
        strict=True,
    ):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_what_is_left_of_a_certain_target_in_bfloat16() -> None:
    """1 - p of p = .9998 would be lost in a p of eight bits."""
    weight = torch.eye(64, dtype=torch.bfloat16).requires_grad_()
    hidden = (torch.eye(64) * 12.75).bfloat16().requires_grad_()
    loss = maskops.linear_cross_entropy(hidden, weight, torch.arange(64), reduction="sum")
    (found,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(wide @ weight.double().T, torch.arange(64), reduction="sum"), wide)[0]
    torch.testing.assert_close(found.diagonal().double(), exact.diagonal(), rtol=3e-2, atol=0)
