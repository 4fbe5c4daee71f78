"""What is special to nm_matmul, the layers: paths, masks per sample, straight-through gradients, noise, soft masks, modules."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import maskops
from maskops._backends import has_kernel
from maskops.nn import BitmaskLinear, NMLinear, SoftNMLinear
from maskops.reference import nm_matmul as reference


def backends(op: str) -> list[str]:
    return [b for b in ("native", "triton", "emulated") if has_kernel(b, op, "cpu")] + ["reference"]


def pruned(rows: int, columns: int, n: int, m: int) -> Tensor:
    weight = torch.randn(rows, columns)
    return torch.where(maskops.nm_mask(weight.abs(), n, m), weight, 0)


# ---------------------------------------------------------------- the linear layer


def test_any_leading_shape() -> None:
    weight = maskops.nm_compress(pruned(6, 20, 2, 4), 2, 4)
    x, bias = torch.randn(2, 3, 20), torch.randn(6)
    expected = torch.nn.functional.linear(x, weight.to_dense(), bias)
    torch.testing.assert_close(maskops.nm_linear(x, weight, bias), expected)
    torch.testing.assert_close(maskops.nm_linear(x[0, 0], weight, bias), expected[0, 0])
    torch.testing.assert_close(maskops.nm_linear(x.mT.contiguous().mT, weight, bias), expected)
    assert maskops.nm_linear(x[:0], weight, bias).shape == (0, 3, 6)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_without_outputs_or_inputs(value: float) -> None:
    for outputs, inputs, rows in ((0, 8, 3), (3, 0, 3), (0, 0, 3), (0, 8, 0), (3, 0, 0)):
        weight, bias = maskops.nm_compress(torch.zeros(outputs, inputs), 2, 4), torch.ones(outputs)
        for backend in ("auto", *backends("_nm_matmul_linear_backward")):
            x, values = torch.full((rows, inputs), value, requires_grad=True), weight.values.clone().requires_grad_()
            y = maskops.nm_linear(x, weight._replace(values=values), bias, backend=backend)
            assert torch.equal(y, torch.ones(rows, outputs)), backend
            grad_x, grad_values = torch.autograd.grad(y.sum(), (x, values))
            assert grad_x.shape == x.shape and (grad_x == 0).all() and grad_values.shape == values.shape, backend


def test_a_weight_goes_through_a_compiled_function_as_one_argument() -> None:
    torch._dynamo.reset()
    weight, x = maskops.nm_compress(pruned(6, 20, 2, 4), 2, 4), torch.randn(3, 20)
    compiled = torch.compile(maskops.nm_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), maskops.nm_linear(x, weight))


# ---------------------------------------------------------------- bit-packed masks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=2), st.integers(0, 70))
def test_pack_round_trip(leading: list[int], columns: int) -> None:
    numpy = pytest.importorskip("numpy")
    mask = torch.rand(*leading, columns) < 0.5
    packed = maskops.pack_bitmask(mask)
    assert torch.equal(maskops.unpack_bitmask(packed, columns), mask)
    assert packed.tolist() == numpy.packbits(mask.numpy(), axis=-1, bitorder="little").tolist()


@pytest.mark.parametrize("shape", [(20,), (5, 20), (2, 3, 5, 20)])
def test_shared_mask_and_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, weight, bias, mask = torch.randn(shape), torch.randn(6, 20), torch.randn(6), torch.rand(6, 20) < 0.5
    y = maskops.bitmask_linear(x, weight, maskops.pack_bitmask(mask), bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight * mask, bias))


@pytest.mark.parametrize("shape", [(4, 20), (4, 5, 20), (4, 2, 3, 20), (4, 0, 20)])
def test_mask_per_sample(shape: tuple[int, ...]) -> None:
    x, weight, mask = torch.randn(shape), torch.randn(6, 20), torch.rand(4, 6, 20) < 0.5
    y = maskops.bitmask_linear(x, weight, maskops.pack_bitmask(mask))
    torch.testing.assert_close(y, torch.stack([a @ (weight * m).T for a, m in zip(x, mask, strict=True)]))


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf])
def test_masked_out_weights_are_never_used(hidden: float) -> None:
    mask = torch.rand(6, 20) < 0.5
    weight = torch.where(mask, torch.randn(6, 20), hidden).requires_grad_()
    x = torch.randn(5, 20, requires_grad=True)
    for backend in backends("nm_matmul_bitmask"):
        y = maskops.bitmask_linear(x, weight, maskops.pack_bitmask(mask), backend=backend)
        grads = torch.autograd.grad(y.square().sum(), (x, weight))
        assert all(t.isfinite().all() for t in (y, *grads)) and (grads[1][~mask] == 0).all(), backend


def test_straight_through_gradient() -> None:
    """As if y = x @ (weight * scores).T; the scores' own values and dtype do not matter."""
    x, weight, mask = torch.randn(3, 5, 20), torch.randn(6, 20), torch.rand(3, 6, 20) < 0.5
    grad = torch.randn(3, 5, 6)
    outer = torch.einsum("smn,smk->snk", grad, x) * weight
    for scores, expected in ((torch.full((6, 20), math.nan), outer.sum(0)), (torch.zeros(3, 6, 20).double(), outer)):
        scores.requires_grad_()
        y = maskops.bitmask_linear(x, weight, maskops.pack_bitmask(mask), scores=scores)
        (found,) = torch.autograd.grad(y, scores, grad)
        assert found.dtype == scores.dtype
        torch.testing.assert_close(found.float(), expected)


# ---------------------------------------------------------------- learnable masks


def soft_mask(logits: Tensor, n: int, m: int, **options: object) -> Tensor:
    """The mask that nm_soft_linear multiplies by: x and the weight are the identity and ones."""
    K = logits.shape[1] * (m if logits.dim() == 3 else 1)
    weight = torch.ones(logits.shape[0], K, dtype=logits.dtype)
    return maskops.nm_soft_linear(torch.eye(K, dtype=logits.dtype), weight, logits, n, m, **options).y.T


def test_patterns_by_hand() -> None:
    said = ["".join(str(int(bit)) for bit in row) for row in maskops.nm_patterns(2, 4)]
    assert said == ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert maskops.nm_patterns(4, 8).shape == (70, 8) and (maskops.nm_patterns(4, 8).sum(1) == 4).all()


def test_noise_is_gumbel() -> None:
    noise = reference.gumbel_noise(torch.tensor([3, 0]), 200_000, torch.float64)
    assert abs(float(noise.mean()) - 0.57722) < 0.01 and abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert noise.isfinite().all()
    # The largest and the smallest word that Philox can give.
    words = torch.tensor([0, 2**32 - 1])
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    assert (-(-uniform.log()).log()).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(2, 4), (1, 4), (3, 5), (4, 8), (1, 2)]), st.booleans(), st.booleans(), st.floats(0.1, 5))
def test_groups_of_a_soft_mask_sum_to_n(pattern: tuple[int, int], exact: bool, hard: bool, tau: float) -> None:
    n, m = pattern
    size = (3, 4, math.comb(m, n)) if exact else (3, 4 * m)
    mask = soft_mask(torch.randn(size, dtype=torch.float64), n, m, tau=tau, hard=hard, seed=1)
    torch.testing.assert_close(mask.unflatten(1, (-1, m)).sum(-1), torch.full((3, 4), float(n), dtype=torch.float64))
    assert (mask >= 0).all() and (mask <= n).all()
    if hard:
        assert ((mask == 0) | (mask == 1)).all()


@pytest.mark.parametrize("exact", [True, False])
def test_low_temperature_and_large_scale_give_the_hard_mask(exact: bool) -> None:
    logits = torch.randn((5, 6, 6) if exact else (5, 24), dtype=torch.float64)
    hard = soft_mask(logits, 2, 4, tau=1.0, hard=True, seed=2)
    torch.testing.assert_close(soft_mask(logits, 2, 4, tau=1e-4, seed=2), hard, rtol=0, atol=1e-6)
    most_likely = maskops.nm_mask_of_logits(logits, 2, 4).double()
    assert torch.equal(soft_mask(logits, 2, 4, tau=1.0, scale=1e6, hard=True, seed=2), most_likely)


def test_hard_masks_are_drawn_by_the_softmax_of_the_logits() -> None:
    """The Gumbel-max trick; 5 degrees of freedom: 20.5 is the 0.1% point."""
    logits, draws = torch.tensor([0.0, 0.5, 1.0, -1.0, 0.2, -0.3]), 20_000
    mask = soft_mask(logits.expand(draws, 1, 6), 2, 4, tau=1.0, hard=True, seed=4)
    counts = (mask[:, None] == maskops.nm_patterns(2, 4)).all(2).sum(0)
    expected = logits.softmax(0) * draws
    assert float(((counts - expected).square() / expected).sum()) < 20.5


@pytest.mark.parametrize("exact", [True, False])
def test_noise_is_the_same_on_every_backend_and_seed(exact: bool) -> None:
    logits = torch.randn((7, 6, 6) if exact else (7, 24))
    for seed in (0, -1, 2**63 - 1, torch.tensor([5, 2**40 + 1])):
        masks = [soft_mask(logits, 2, 4, tau=1.0, hard=True, seed=seed, backend=b) for b in backends("nm_matmul_soft")]
        assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_seeds_and_generators() -> None:
    draw = lambda **options: soft_mask(torch.zeros(4, 6, 6), 2, 4, tau=1.0, **options)  # noqa: E731
    assert torch.equal(draw(seed=3), draw(seed=torch.tensor(3))) and not torch.equal(draw(seed=3), draw(seed=4))
    assert not torch.equal(draw(seed=torch.tensor([3, 0])), draw(seed=torch.tensor([3, 1])))
    g = torch.Generator().manual_seed(1)
    first, second = draw(generator=g), draw(generator=g)
    assert not torch.equal(first, second) and torch.equal(first, draw(generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(5)
    one = draw()
    torch.manual_seed(5)
    assert torch.equal(one, draw())


@pytest.mark.parametrize("hard", [False, True])
def test_kept_norm(hard: bool) -> None:
    x, weight, logits = torch.randn(3, 24), torch.randn(5, 24), torch.randn(5, 6, 6, requires_grad=True)
    out = maskops.nm_soft_linear(x, weight, logits, 2, 4, tau=0.7, seed=1, hard=hard)
    masked = weight * soft_mask(logits, 2, 4, tau=0.7, seed=1, hard=hard)
    torch.testing.assert_close(out.kept_norm, masked.square().sum())
    torch.testing.assert_close(out.y, x @ masked.T)
    (grad,) = torch.autograd.grad(out.kept_norm, logits)
    assert grad.abs().sum() > 0


def test_hard_gradient_is_that_of_the_soft_mask() -> None:
    x, weight, logits = torch.randn(3, 24), torch.randn(5, 24), torch.randn(5, 6, 6, requires_grad=True)
    grads = [
        torch.autograd.grad(
            maskops.nm_soft_linear(x, weight, logits, 2, 4, tau=0.7, seed=1, hard=hard).y.sum(), logits
        )[0]
        for hard in (False, True)
    ]
    torch.testing.assert_close(*grads)


def test_weight_is_frozen_and_lowered_logits_are_raised() -> None:
    weight, logits = torch.randn(5, 24, requires_grad=True), torch.randn(5, 6, 6, requires_grad=True)
    y, _ = maskops.nm_soft_linear(torch.randn(3, 24), weight, logits.bfloat16(), 2, 4, tau=1.0, seed=0)
    found = torch.autograd.grad(y.sum(), (weight, logits), allow_unused=True)
    assert found[0] is None and found[1].dtype == torch.float32


def test_mask_of_logits() -> None:
    logits = torch.randn(3, 5, 6)
    expected = maskops.nm_patterns(2, 4)[logits.argmax(-1)].flatten(1)
    assert torch.equal(maskops.nm_mask_of_logits(logits, 2, 4), expected)
    assert torch.equal(maskops.nm_mask_of_logits(logits.flatten(1), 2, 5), maskops.nm_mask(logits.flatten(1), 2, 5))
    assert maskops.nm_mask_of_logits(torch.zeros(1, 1, 6), 2, 4).int().tolist() == [[1, 1, 0, 0]]


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("bias", [True, False])
def test_nm_linear_module(bias: bool, tmp_path: Path) -> None:
    dense = nn.Linear(22, 6, bias=bias)
    mask = maskops.nm_mask(dense.weight.abs(), 2, 4)
    layer, x = NMLinear.from_dense(dense, 2, 4, mask=mask), torch.randn(3, 22)
    torch.testing.assert_close(layer(x), F.linear(x, dense.weight * mask, dense.bias))
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    layer(x).sum().backward()
    assert layer.values.grad is not None
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = NMLinear.from_dense(nn.Linear(22, 6, bias=bias), 2, 4, mask=~mask & False)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))
    assert copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="at most 2 nonzeros"):
        NMLinear.from_dense(dense, 2, 4)


def test_nm_linear_refuses_the_state_of_another_pattern() -> None:
    state = NMLinear(maskops.nm_compress(torch.zeros(2, 12), 1, 3)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"layout: the state is of \(n, m, K\) = \[1, 3, 12\], this module of \[2, 4, 8\]"
    ):
        NMLinear(maskops.nm_compress(torch.zeros(2, 8), 2, 4)).load_state_dict(state)


@pytest.mark.parametrize("per_pattern", [True, False])
def test_soft_linear_module(per_pattern: bool) -> None:
    dense = nn.Linear(24, 6)
    layer, x = SoftNMLinear.from_linear(dense, 2, 4, per_pattern=per_pattern, tau=0.5), torch.randn(3, 24)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["logits"]
    y = layer(x, seed=1)
    assert torch.equal(y, layer(x, seed=1)) and not torch.equal(y, layer(x, seed=2))
    (y.square().mean() - 1e-3 * layer.kept_norm).backward()
    assert layer.logits.grad.abs().sum() > 0
    copy.deepcopy(layer)  # although kept_norm has a graph
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, dense.weight * layer.mask(), dense.bias))
    torch.testing.assert_close(layer.harden()(x), layer(x))
    maskops.nm_validate(layer.harden().to_dense().weight, 2, 4)


def test_soft_linear_learns_the_mask_that_matters() -> None:
    """Inputs 0 and 3 of every group carry the target, so the mask must come to 1001."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    dense = nn.Linear(8, 4, bias=False)
    nn.init.constant_(dense.weight, 1.0)
    wanted = torch.tensor([1.0, 0, 0, 1] * 2).expand(4, 8)
    layer = SoftNMLinear.from_linear(dense, 2, 4)
    optimizer = torch.optim.Adam([layer.logits], 0.1)
    for step in range(150):
        optimizer.zero_grad()
        F.mse_loss(layer(x, seed=step), x @ wanted.T).backward()
        optimizer.step()
    assert torch.equal(layer.mask().float(), wanted)


def test_bitmask_module() -> None:
    dense, mask, x = nn.Linear(20, 6), torch.rand(6, 20) < 0.5, torch.randn(4, 5, 20)
    layer = BitmaskLinear.from_dense(dense, mask, scores=True)
    torch.testing.assert_close(layer(x), F.linear(x, dense.weight * mask, dense.bias))
    assert torch.equal(layer.mask(), mask)
    other = torch.rand(4, 6, 20) < 0.5
    y = layer(x, maskops.pack_bitmask(other))
    torch.testing.assert_close(y[2], F.linear(x[2], dense.weight * other[2], dense.bias))
    y.sum().backward()
    assert layer.scores.grad.shape == (6, 20) and layer.weight.grad.shape == (6, 20)
    fresh = BitmaskLinear(20, 6, scores=True)
    assert fresh.mask().all()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_modules_describe_themselves() -> None:
    said = repr(nn.Sequential(SoftNMLinear(8, 2, 2, 4), SoftNMLinear(8, 2, 2, 4).harden(), BitmaskLinear(8, 2)))
    assert "pattern=2:4, per_pattern=True" in said and "in_features=8, out_features=2, pattern=2:4" in said


def test_damaged_places_stay_in_memory_and_are_refused_where_they_are_loaded() -> None:
    """Places that no group has: every kernel reads inside its row, forward and backward."""
    g = torch.Generator().manual_seed(0)
    for n, m, K in ((3, 9, 10), (2, 17, 40), (5, 12, 130), (2, 4, 64)):
        dense = torch.zeros(40, K)
        weight = maskops.nm_compress(dense, n, m)
        damaged = weight._replace(indices=torch.randint(0, 256, weight.indices.shape, dtype=torch.uint8, generator=g))
        for rows in (1, 5, 70):
            x = torch.ones(rows, K, requires_grad=True)
            values = torch.ones_like(weight.values).requires_grad_()
            y = maskops.nm_linear(x, damaged._replace(values=values), backend="native")
            grads = torch.autograd.grad(y.sum(), (x, values))
            assert y.max() <= K and all(grad.abs().max() <= max(rows, 40) * n for grad in grads)
    layer = NMLinear(maskops.nm_compress(torch.eye(4), 2, 4))
    state = {**layer.state_dict(), "indices": torch.full_like(layer.indices, 255)}
    with pytest.raises(RuntimeError, match="indices of row 0, group 0 must be 2 ascending places below 4"):
        layer.load_state_dict(state)


def test_the_dense_path_reads_nothing_between_rows() -> None:
    apart = torch.full((300, 34), torch.nan).bfloat16()
    apart[:, :33] = 1
    dense = torch.ones(48, 33)
    weight = maskops.nm_compress((dense * maskops.nm_mask(dense, 5, 6)).bfloat16(), 5, 6)
    assert "dense" in maskops.explain("nm_linear", apart[:, :33], weight)
    assert maskops.nm_linear(apart[:, :33], weight).isfinite().all()


def test_the_dense_path_checks_as_the_sparse_one() -> None:
    weight = maskops.nm_compress(torch.ones(6, 8) * torch.tensor([0.0] + [1.0] * 7), 7, 8)
    with pytest.raises(ValueError, match="bias must have shape"):
        maskops.nm_linear(torch.ones(2, 8), weight, torch.ones(1))
    with pytest.raises(ValueError, match="x must be float32 or"):
        maskops.nm_linear(torch.ones(2, 8).int(), weight)


def test_constructors_refuse_what_forward_would() -> None:
    with pytest.raises(ValueError, match="n and m must satisfy"):
        SoftNMLinear(8, 8, 2, 0)
    with pytest.raises(ValueError, match="in_features must be divisible by m = 4"):
        SoftNMLinear(7, 8, 2, 4)
    with pytest.raises(ValueError, match="at most 128 patterns"):
        SoftNMLinear(32, 1, 16, 32)
    with pytest.raises(TypeError, match="weight must be an NMWeight"):
        NMLinear(torch.ones(4, 4))


def test_patterns_of_nearly_everything_are_quick() -> None:
    assert maskops.nm_patterns(31, 32).shape == (32, 32)


def test_a_pattern_of_logit_minus_infinity_is_never_taken() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, logits = (
        torch.randn(2, 8, generator=g),
        torch.randn(3, 8, generator=g),
        torch.randn(3, 2, 6, generator=g),
    )
    logits[0, 0, 1] = -math.inf
    found = [
        maskops.nm_soft_linear(x, weight, logits, 2, 4, tau=1.0, seed=0, backend=b)[0] for b in ("native", "reference")
    ]
    torch.testing.assert_close(*found)
