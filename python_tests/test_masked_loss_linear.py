"""What is special to linear_cross_entropy and linear_sample: PyTorch's values, reductions, denominators, hidden NaN, samples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.testing import assert_same_loss


def inputs(
    shape: tuple[int, ...] = (3, 7), width: int = 20, classes: int = 50
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = torch.randn(*shape, width), torch.randn(classes, width), torch.randn(classes)
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    return hidden, weight, bias, torch.randint(classes, shape)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch_for_every_reduction(reduction: str, smoothing: float) -> None:
    """reduction="none" times weights and ignored targets are the cases that other fused losses get wrong."""
    hidden, weight, bias, target = inputs()
    target[0, :3], target[2] = -100, -100
    ours = maskops.linear_cross_entropy(
        hidden, weight, target, bias=bias, reduction=reduction, label_smoothing=smoothing
    )
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    theirs = F.cross_entropy(logits, target.flatten(), reduction=reduction, label_smoothing=smoothing)
    scale = torch.rand(3, 7) if reduction == "none" else 1.0
    assert_same_loss(ours, theirs.view(ours.shape), [hidden, weight, bias], scale)


def test_mask_and_ids_and_targets_say_the_same() -> None:
    hidden, weight, bias, target = inputs()
    ids = torch.tensor([[0, 4, -1], [-1, -1, -1], [6, 2, 3]])
    mask = torch.zeros(3, 8, dtype=torch.bool).scatter(1, ids % 8, True)[:, :7]
    slots = target.gather(1, ids.clamp_min(0))
    by_mask = maskops.linear_cross_entropy(hidden, weight, target, mask=mask, bias=bias)
    by_ids = maskops.linear_cross_entropy(hidden, weight, slots, ids=ids, bias=bias)
    plain = maskops.linear_cross_entropy(hidden[mask], weight, target[mask], bias=bias)
    assert_same_loss(by_mask, plain, [hidden, weight, bias])
    assert_same_loss(by_ids, plain, [hidden, weight, bias])
    each = maskops.linear_cross_entropy(hidden, weight, slots, ids=ids, bias=bias, reduction="none")
    assert torch.equal(each == 0, ids < 0)


def test_cosine_with_temperature() -> None:
    """HuBERT's logits; the published code puts the target in a second time."""
    hidden, weight, _, target = inputs()
    mask = torch.rand(3, 7) < 0.5
    ours = maskops.linear_cross_entropy(hidden, weight, target, mask=mask, cosine=True, temperature=0.1)
    logits = F.cosine_similarity(hidden[mask][:, None], weight[None], dim=-1) / 0.1
    assert_same_loss(ours, F.cross_entropy(logits, target[mask]), [hidden, weight])


@pytest.mark.parametrize("denominator", ["count", "weight", "all", 7.0, torch.tensor(3.0)])
def test_weights_and_denominators(denominator: object) -> None:
    hidden, weight, bias, target = inputs()
    target[1, 2:] = -100
    each = F.cross_entropy(F.linear(hidden, weight, bias).mT, target, reduction="none")
    share = torch.rand(3, 7, requires_grad=True)
    ours = maskops.linear_cross_entropy(
        hidden, weight, target, bias=bias, weight_per_token=share, denominator=denominator
    )
    counted = target != -100
    by = {"count": counted.sum(), "weight": (share * counted).sum(), "all": counted.numel()}
    theirs = (each * share).sum() / (by[denominator] if isinstance(denominator, str) else denominator)
    assert_same_loss(ours, theirs, [hidden, weight, bias, share])


def test_codebooks_are_as_one_loss_each() -> None:
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 11, 8, requires_grad=True)
    target = torch.randint(11, (2, 5, 3))
    target[0, 0, 1], target[1, 4] = -100, -100
    ours = maskops.linear_cross_entropy(hidden, weight, target, reduction="none")
    each = [maskops.linear_cross_entropy(hidden, weight[g], target[..., g], reduction="none") for g in range(3)]
    assert_same_loss(ours, torch.stack(each, -1), [hidden, weight], torch.rand(2, 5, 3))


def test_z_loss() -> None:
    hidden, weight, bias, target = inputs()
    ours = maskops.linear_cross_entropy(hidden, weight, target, bias=bias, z_loss=0.3)
    logits = F.linear(hidden, weight, bias)
    theirs = F.cross_entropy(logits.mT, target) + 0.3 * logits.logsumexp(-1).square().mean()
    assert_same_loss(ours, theirs, [hidden, weight, bias])


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("by_ids", [False, True])
def test_hidden_nan_reaches_nothing(by_ids: bool, cosine: bool) -> None:
    hidden, weight, bias, target = inputs((1, 4))
    hidden = hidden.detach().clone()
    hidden[:, 1:] = math.nan
    hidden.requires_grad_()
    chosen = {"ids": torch.tensor([[0]])} if by_ids else {"mask": torch.tensor([[True, False, False, False]])}
    loss = maskops.linear_cross_entropy(
        hidden, weight, target[:, :1] if by_ids else target, bias=bias, cosine=cosine, **chosen
    )
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    assert loss.isfinite() and all(g.isfinite().all() for g in grads) and grads[0][:, 1:].abs().sum() == 0


def test_sign_of_a_denominator() -> None:
    """A number is checked where it is given; a tensor is on the device, and what the page says of it holds."""
    given = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 4, 2])
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="linear_cross_entropy: denominator must be"):
            maskops.linear_cross_entropy(*given, denominator=wrong)
    loss = maskops.linear_cross_entropy(*given, denominator=torch.tensor(2.0))
    assert maskops.linear_cross_entropy(*given, denominator=torch.tensor(0.0)) == 0
    assert maskops.linear_cross_entropy(*given, denominator=torch.tensor(-2.0)) == -loss


@pytest.mark.parametrize("denominator", ["count", "weight", "all"])
def test_nothing_that_counts_is_zero(denominator: str) -> None:
    hidden, weight, bias, target = inputs()
    loss = maskops.linear_cross_entropy(
        hidden, weight, target, mask=torch.zeros(3, 7, dtype=torch.bool), bias=bias, denominator=denominator,
        weight_per_token=torch.ones(3, 7),
    )  # fmt: skip
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_a_vocabulary_masked_by_minus_infinity() -> None:
    hidden, weight, _, target = inputs()
    bias = torch.zeros(50)
    bias[25:], target = -math.inf, target % 25
    ours = maskops.linear_cross_entropy(hidden, weight, target, bias=bias)
    assert_same_loss(ours, maskops.linear_cross_entropy(hidden, weight[:25], target), [hidden, weight])


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 4), 1e4), torch.eye(4).repeat(30, 1) * torch.linspace(-1, 1, 120)[:, None]
    loss = maskops.linear_cross_entropy(hidden, weight, torch.tensor([119, 0]), reduction="none")
    expected = F.cross_entropy(hidden @ weight.T, torch.tensor([119, 0]), reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"denominator": "tokens"}, ValueError, "denominator must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"temperature": math.inf}, ValueError, "temperature must be at least 1e-38 and finite, got inf"),
        ({"temperature": 1e-320}, ValueError, "temperature must be at least 1e-38 and finite"),
        ({"temperature": 2**2000}, ValueError, "temperature must fit in a float"),
        ({"z_loss": math.inf}, ValueError, "z_loss must be finite, got inf"),
        ({"reduction": None}, TypeError, "reduction must be str, got None"),
        ({"denominator": -1.0, "reduction": "none"}, ValueError, "denominator must be above 0, got -1"),
        ({"denominator": torch.ones(2)}, ValueError, "denominator must have shape"),
        ({"denominator": math.inf}, ValueError, "denominator must be at least 1e-38 and finite"),
        ({"mask": torch.ones(3, 7).to_sparse()}, ValueError, "mask must be a dense tensor, got one of layout"),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(3, 7)}, ValueError, "mask must be bool"),
        ({"ids": torch.zeros(3, 7, dtype=torch.long)}, IndexError, "ids.* must be unique"),
        ({"mask": torch.ones(3, 7, dtype=torch.bool), "ids": torch.zeros(3, 1)}, ValueError, "mask must not be given with ids"),
        ({"weight_per_token": torch.ones(3)}, ValueError, "weight_per_token must have shape"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be int"),
        ({"cosine": 1}, TypeError, "cosine must be bool"),
        ({"backend": "metal"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_wrong_arguments(change: dict, error: type[Exception], match: str) -> None:
    hidden, weight, bias, target = inputs()
    with pytest.raises(error, match=match):
        maskops.linear_cross_entropy(hidden, weight, target, bias=bias, **change)


def test_options_are_checked_before_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object, **__: object) -> None:
        raise AssertionError("a kernel ran")

    hidden, weight, _, target = inputs()
    for module in ("linear", "sample"):
        monkeypatch.setattr(f"maskops.ops.masked_loss.{module}.find_op", lambda *_: no_kernel)
    for change in ({"reduction": "avg"}, {"weight_per_token": torch.ones(3)}, {"denominator": 0.0}):
        for loss in (maskops.linear_cross_entropy, maskops.linear_sample):
            with pytest.raises(ValueError, match=f"{loss.__name__}: {next(iter(change))} must"):
                loss(hidden, weight, target, **change)


def test_ids_are_checked_in_a_compiled_program() -> None:
    """An id beyond its row would be one of the next row."""
    hidden, weight, _, target = inputs((2, 3))
    loss = torch.compile(
        lambda ids: maskops.linear_cross_entropy(hidden, weight, target[:, :2], ids=ids),
        fullgraph=True,
        backend="aot_eager",
    )
    ids = torch.tensor([[0, 2], [1, -1]])
    torch.testing.assert_close(loss(ids), maskops.linear_cross_entropy(hidden, weight, target[:, :2], ids=ids))
    for wrong, match in ((ids + 1, r"ids must be in \[-1, 3\)"), (ids * 0, "ids must be unique in its row")):
        with pytest.raises(RuntimeError, match=f"linear_cross_entropy: {match}"):
            loss(wrong)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_no_width_and_no_codebooks(backend: str) -> None:
    """Native kernels once read logits that no product had written."""
    bias = torch.arange(5.0, requires_grad=True)
    target = torch.tensor([0, 4])
    loss = maskops.linear_cross_entropy(torch.ones(2, 0), torch.ones(5, 0), target, bias=bias, backend=backend)
    assert_same_loss(loss, F.cross_entropy(bias.expand(2, 5), target), [bias])
    none = maskops.linear_cross_entropy(torch.ones(2, 3), torch.ones(0, 5, 3), target[:, None][:, :0], backend=backend)
    assert none == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vectors_of_zeros_have_no_direction(dtype: torch.dtype) -> None:
    """torch's normalize gives NaN in float16, and a gradient of 1e12 in float32."""
    hidden, weight = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    hidden[1], weight[2] = 0, 0
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = maskops.linear_cross_entropy(*leaves, torch.tensor([0, 1, -100]), cosine=True, reduction="none")
    torch.testing.assert_close(loss[1].item(), math.log(5))
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert loss.isfinite().all() and (grads[0][1] == 0).all() and (grads[1][2] == 0).all()
    assert all(grad.isfinite().all() and grad.abs().max() < 10 for grad in grads)


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """Chi-square of 20000 draws over 12 classes: 35 is beyond 1 in 4000 at 11 degrees of freedom."""
    logits = torch.linspace(-1, 1, 12)
    weight = logits[:, None].contiguous()
    hidden, target = torch.ones(20000, 1), torch.zeros(20000, dtype=torch.long)
    _, sample = maskops.linear_sample(hidden, weight, target, seed=1, sample_temperature=temperature)
    expected = (logits / temperature).softmax(0) * 20000
    assert ((sample.bincount(minlength=12) - expected).square() / expected).sum() < 35


def test_sample_has_the_loss_and_gradient_of_the_plain_loss() -> None:
    hidden, weight, bias, target = inputs()
    mask = torch.rand(3, 7) < 0.5
    loss, sample = maskops.linear_sample(hidden, weight, target, mask=mask, bias=bias, seed=0, temperature=2.0)
    assert_same_loss(
        loss,
        maskops.linear_cross_entropy(hidden, weight, target, mask=mask, bias=bias, temperature=2.0),
        [hidden, weight, bias],
    )
    assert torch.equal(sample >= 0, mask) and sample.max() < 50 and not sample.requires_grad


def test_seeds() -> None:
    hidden, weight, _, target = inputs((200,))
    draw = [maskops.linear_sample(hidden, weight * 0.01, target, seed=seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    generated = [
        maskops.linear_sample(hidden, weight, target, generator=torch.Generator().manual_seed(5))[1] for _ in range(2)
    ]
    assert torch.equal(*generated)


def test_a_row_is_sampled_the_same_whatever_else_counts() -> None:
    hidden, weight, _, target = inputs((40,))
    few = torch.arange(40) % 3 == 0
    all_rows = maskops.linear_sample(hidden, weight, target, seed=3)[1]
    assert torch.equal(maskops.linear_sample(hidden, weight, target, mask=few, seed=3)[1][few], all_rows[few])
