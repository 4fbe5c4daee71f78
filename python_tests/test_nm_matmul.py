"""What is special to nm_matmul, masks and storage: known masks and bytes, transposable masks, messages, torch's 2:4 layout."""

import math
import pickle
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.sparse import _semi_structured_conversions as torch_layout

import maskops
from maskops import NMWeight
from maskops._backends import has_kernel


def backends(op: str) -> list[str]:
    return [b for b in ("native", "triton", "emulated") if has_kernel(b, op, "cpu")] + ["reference"]


def pruned(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(rows, columns, dtype=dtype)
    return torch.where(maskops.nm_mask(weight.abs(), n, m, backend="reference"), weight, 0)


# ---------------------------------------------------------------- masks


def test_mask_by_hand() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.5, math.nan, -math.inf, math.nan, math.nan, 2.0]])
    for backend in backends("nm_matmul_mask"):
        kept = maskops.nm_mask(scores, 2, 4, backend=backend)
        assert kept.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1]], backend


def test_mask_along_any_axis() -> None:
    scores = torch.randn(5, 12, 3, 2)
    expected = maskops.nm_mask(scores.movedim(1, -1).reshape(-1, 12), 2, 4).view(5, 3, 2, 12).movedim(-1, 1)
    assert torch.equal(maskops.nm_mask(scores, 2, 4, dim=1), expected)
    assert torch.equal(maskops.nm_mask(scores, 2, 4, dim=-3), expected)
    assert maskops.nm_mask(scores[0, :, 0, 0], 2, 4).shape == (12,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 70), st.integers(2, 32), st.data())
def test_mask_keeps_the_n_largest(rows: int, columns: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = torch.randint(-3, 4, (rows, columns)).float()  # many ties
    kept = maskops.nm_mask(scores, n, m)
    for start in range(0, columns, m):
        group, chosen = scores[:, start : start + m], kept[:, start : start + m]
        width = group.shape[1]
        assert (chosen.sum(1) == min(n, width)).all()
        for row in range(rows):
            best = sorted(range(width), key=lambda i: (-float(group[row, i]), i))[:n]
            assert chosen[row].nonzero().flatten().tolist() == sorted(best)


def exhaustive(block: Tensor, n: int) -> float:
    """The largest total of an m x m block with n kept per row and column."""
    m, best = block.shape[0], -math.inf
    rows = list(combinations(range(m), n))
    for choice in product(rows, repeat=m):
        if all(sum(column in row for row in choice) == n for column in range(m)):
            best = max(best, sum(float(block[i, j]) for i, row in enumerate(choice) for j in row))
    return best


@pytest.mark.parametrize("n,m", [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_small_transposable_masks_are_the_best(n: int, m: int) -> None:
    scores = torch.randn(m, 3 * m, dtype=torch.float64)
    kept = maskops.nm_mask(scores, n, m, transposable=True)
    for block, chosen in zip(scores.split(m, 1), kept.split(m, 1), strict=True):
        assert float(block[chosen].sum()) == pytest.approx(exhaustive(block, n))
    assert torch.equal(
        maskops.nm_mask(torch.zeros(m, m), n, m, transposable=True)[0].int(), maskops.nm_patterns(n, m)[0].int()
    )


@pytest.mark.parametrize("n,m", [(2, 4), (3, 5), (2, 8), (4, 8), (7, 8), (1, 16), (8, 16), (5, 32)])
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_transposable_masks_have_n_in_rows_and_columns(n: int, m: int, kind: str) -> None:
    scores = torch.randn(2, 3 * m, 4 * m)
    if kind == "ties":
        scores = scores.round()
    if kind == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1.0])
        scores = values[torch.randint(7, scores.shape)]
    kept = maskops.nm_mask(scores, n, m, transposable=True)
    assert kept.shape == scores.shape
    assert (kept.unflatten(-1, (-1, m)).sum(-1) == n).all() and (kept.unflatten(-2, (-1, m)).sum(-2) == n).all()
    assert torch.equal(kept, maskops.nm_mask(scores, n, m, transposable=True))
    for dim in (-1, -2):
        maskops.nm_validate(kept.float(), n, m, dim)


def test_transposable_greedy_is_close_to_the_best() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    scores = torch.rand(64, 8, 8)
    kept = maskops.nm_mask(scores, 1, 8, transposable=True)
    best = sum(float(s[optimize.linear_sum_assignment(s, maximize=True)].sum()) for s in scores)
    assert float(scores[kept].sum()) > 0.93 * best


def test_transposable_prefers_numbers_to_nan() -> None:
    scores = torch.full((4, 4), math.nan)
    wanted = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    scores[wanted] = -math.inf
    assert torch.equal(maskops.nm_mask(scores, 2, 4, transposable=True), wanted)


def test_transposable_sizes() -> None:
    assert maskops.nm_mask(torch.zeros(0, 8), 2, 4, transposable=True).shape == (0, 8)
    assert maskops.nm_mask(torch.zeros(8, 0), 2, 4, transposable=True).shape == (8, 0)
    with pytest.raises(
        ValueError, match=r"nm_mask: scores must have shape \[..., R, K\] with R and K divisible by m = 4"
    ):
        maskops.nm_mask(torch.zeros(6, 8), 2, 4, transposable=True)
    with pytest.raises(ValueError, match="dim must be one of the last two axes"):
        maskops.nm_mask(torch.zeros(3, 8, 8), 2, 4, dim=0, transposable=True)


@pytest.mark.parametrize("n,m", [(2, 4), (3, 8)])
def test_transposable_masks_under_vmap(n: int, m: int) -> None:
    scores = torch.randn(3, 2, m, 2 * m)

    def mask(part: Tensor) -> Tensor:
        return maskops.nm_mask(part, n, m, transposable=True)

    expected = mask(scores)
    assert torch.equal(torch.vmap(mask)(scores), expected)
    assert torch.equal(torch.vmap(torch.vmap(mask))(scores), expected)
    assert torch.equal(torch.vmap(mask, in_dims=-1)(scores.movedim(0, -1)), expected)
    assert not mask(scores.requires_grad_()).requires_grad
    with pytest.raises(ValueError, match=rf"nm_mask: scores must have shape .*, got float32 \[{2 * m}\]"):
        torch.vmap(mask)(scores[0, 0])


# ---------------------------------------------------------------- validation


def test_validate_names_the_group() -> None:
    weight = torch.zeros(3, 8, 2)
    weight[2, 4:7, 1] = torch.tensor([1.0, math.nan, -0.25])
    weight[2, :4, 1] = torch.tensor([0.0, -0.0, 5.0, 6.0])
    maskops.nm_validate(weight, 3, 4, dim=1)
    message = r"nm_validate: weight\[2, 4:8, 1\] must have at most 2 nonzeros, got \[1, nan, -0.25, 0\]; too many in 1 of 12 groups"
    with pytest.raises(ValueError, match=message):
        maskops.nm_validate(weight, 2, 4, dim=1)
    with pytest.raises(ValueError, match=r"weight\[0:2, 0\] .*got \[1, 1\]; too many in 4 of 4 groups"):
        maskops.nm_validate(torch.ones(4, 2), 1, 2, dim=0)
    with pytest.raises(ValueError, match=r"weight\[4:5\] .*got \[7\]|weight\[0:4\]"):
        maskops.nm_validate(torch.tensor([1.0, 2, 3, 4, 7]), 3, 4)


def test_compress_says_the_same() -> None:
    weight = torch.zeros(4, 10)
    weight[1, 8:], weight[3, :4] = torch.tensor([2.5, -1e-7]), 1.0
    said = set()
    for backend in ("native", "reference") if has_kernel("native", "nm_matmul_compress", "cpu") else ("reference",):
        with pytest.raises(ValueError) as caught:
            maskops.nm_compress(weight, 1, 4, backend=backend)
        said.add(str(caught.value))
    assert said == {
        "nm_compress: weight[1, 8:10] must have at most 1 nonzeros, got [2.5, -1e-07]; too many in 2 of 12 groups"
    }


@pytest.mark.parametrize(
    "call,argument",
    [
        (lambda: maskops.nm_mask(torch.ones(4), 2.0, 4), "n"),
        (lambda: maskops.nm_mask([1.0], 2, 4), "scores"),
        (lambda: maskops.nm_compress(None, 2, 4), "weight"),
        (lambda: maskops.nm_linear(torch.ones(1, 4), torch.ones(1, 4)), "weight"),
        (lambda: maskops.nm_linear(None, maskops.nm_compress(torch.zeros(1, 4), 2, 4)), "x"),
        (lambda: maskops.bitmask_linear(torch.ones(1, 4), torch.ones(1, 4), None), "bitmask"),
        (lambda: maskops.pack_bitmask([True]), "mask"),
        (lambda: maskops.unpack_bitmask(torch.zeros(1, dtype=torch.uint8), 4.0), "K"),
        (lambda: maskops.nm_soft_linear(torch.ones(1, 4), torch.ones(1, 4), None, 2, 4, tau=1.0), "logits"),
    ],
)
def test_wrong_kind_of_argument(call: Callable, argument: str) -> None:
    with pytest.raises(TypeError, match=f": {argument} must be "):
        call()


FOUR, WORD = torch.ones(1, 4), torch.zeros(1, 1, 1, dtype=torch.uint8)
SOFT = FOUR, FOUR, torch.zeros(1, 1, 6), 2, 4


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: maskops.nm_mask(FOUR, 4, 4), r"nm_mask: n and m must satisfy 1 <= n < m <= 32, got \(4, 4\)"),
        (lambda: maskops.nm_mask(FOUR[0], 2, 4, dim=1), r"scores must have an axis 1, got float32 \[4\]"),
        (
            lambda: maskops.nm_linear(FOUR[:, 1:], maskops.nm_compress(FOUR * 0, 2, 4)),
            r"x must have shape \[..., K\] = \[..., 4\]",
        ),
        (
            lambda: maskops.bitmask_linear(FOUR[0], FOUR, WORD),
            r"x must have shape \[S, ..., K\] for a mask or scores per sample",
        ),
        (lambda: maskops.unpack_bitmask(WORD, 9), "bitmask must have shape"),
        (lambda: maskops.nm_soft_linear(*SOFT, tau=1.0, seed=torch.zeros(3)), "nm_soft_linear: seed must be int"),
        (lambda: maskops.nm_soft_linear(*SOFT, tau=math.nan), "tau must be above 0, got nan"),
        (
            lambda: maskops.nm_soft_linear(*SOFT, tau=1.0, scale=math.inf),
            "nm_soft_linear: scale must be finite, got inf",
        ),
        (lambda: maskops.nm_patterns(16, 32), "n and m must have at most 1048576 patterns, got 601080390"),
        (
            lambda: maskops.nm_mask_of_logits(torch.zeros(1, 2, 5), 2, 4),
            r"logits must have shape \[N, G, P\] = \[\*, \*, 6\]",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the compressed form


def test_bytes_by_hand() -> None:
    """3:5: places 0 2 4 | 1 2 3 in three bits each, little endian, straddle the bytes."""
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 5.0, 6.0, 0.0]])
    number = sum(place << 3 * slot for slot, place in enumerate([0, 2, 4, 1, 2, 3]))
    for backend in backends("nm_matmul_compress"):
        compressed = maskops.nm_compress(weight, 3, 5, backend=backend)
        assert compressed.values.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
        assert compressed.indices.tolist() == [list(number.to_bytes(3, "little"))]
        assert compressed.indices.dtype == torch.uint8 and compressed.shape == (1, 10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 70), st.integers(2, 32), st.data())
def test_compress_round_trip(rows: int, columns: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    dense = pruned(rows, columns, n, m)
    dense[torch.rand(dense.shape) < 0.3] = 0  # groups with less than n
    weight = maskops.nm_compress(dense, n, m)
    weight.check()
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(maskops.nm_compress(weight.to_dense(), n, m).indices, weight.indices)
    assert torch.equal(torch.ops.maskops.nm_matmul_select(dense, weight.indices, n, m), weight.values)
    x = torch.randn(3, columns)
    torch.testing.assert_close(maskops.nm_linear(x, weight), x @ dense.T, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_three_forms() -> None:
    dense = pruned(3, 22, 2, 4, torch.float64).requires_grad_()
    weight = maskops.nm_compress(dense, 2, 4)
    grad = torch.randn_like(weight.values)
    (found,) = torch.autograd.grad(weight.values, dense, grad)
    assert torch.equal(found, weight._replace(values=grad).to_dense())
    values = weight.values.detach().requires_grad_()
    arguments = (weight.indices, 2, 4)
    for op in (torch.ops.maskops_reference, torch.ops.maskops):
        assert torch.autograd.gradgradcheck(lambda v, op=op: op.nm_matmul_decompress(v, *arguments, 22), (values,))
        assert torch.autograd.gradgradcheck(
            lambda d, op=op: op.nm_matmul_select(d, *arguments), (dense.detach().requires_grad_(),)
        )


@pytest.mark.parametrize("n,m,rows", [(2, 4, 300), (1, 4, 30), (3, 5, 140)])
def test_large_products(n: int, m: int, rows: int) -> None:
    """Several chunks of outputs, sections of inputs and panels of rows, none of them whole; the same bits for any threads."""
    dense = pruned(1100, 901, n, m)
    weight, grad_out, threads = maskops.nm_compress(dense, n, m), torch.randn(rows, 1100), torch.get_num_threads()
    x, values = torch.randn(rows, 901).requires_grad_(), weight.values.clone().requires_grad_()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = maskops.nm_linear(x, weight._replace(values=values), backend="native")
        results.append((y.detach(), *torch.autograd.grad(y, (x, values), grad_out)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    wide_x, wide, wide_out = x.detach().double(), dense.double(), grad_out.double()
    grad_dense = torch.where(dense != 0, wide_out.T @ wide_x, 0)
    expected = wide_x @ wide.T, wide_out @ wide, maskops.nm_compress(grad_dense, n, m).values
    for actual, exact in zip(results[0], expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-3)


def test_state_survives_files(tmp_path: Path) -> None:
    weight = maskops.nm_compress(pruned(4, 21, 3, 5), 3, 5)
    save_file(weight.state_dict(), tmp_path / "weight.safetensors")
    torch.save(weight.state_dict(), tmp_path / "weight.pt")
    states = load_file(tmp_path / "weight.safetensors"), torch.load(tmp_path / "weight.pt", weights_only=True)
    torch.save(weight, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for found in (*map(NMWeight.from_state_dict, states), pickle.loads(pickle.dumps(weight)), whole):
        assert found[2:] == (3, 5, 21) and torch.equal(found.to_dense(), weight.to_dense())
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16 and weight.to("cpu").indices.dtype == torch.uint8
    assert weight.requires_grad_().values.requires_grad and not weight.detach().values.requires_grad


def test_state_is_checked() -> None:
    state = maskops.nm_compress(pruned(2, 10, 3, 5), 3, 5).state_dict()
    with pytest.raises(ValueError, match="NMWeight: state must hold values, indices and layout"):
        NMWeight.from_state_dict({"values": state["values"]})
    with pytest.raises(ValueError, match="NMWeight: indices must have shape"):
        NMWeight.from_state_dict({**state, "indices": state["indices"][:, 1:]})
    with pytest.raises(
        ValueError, match=r"indices of row 0, group 0 must be 3 ascending places below 5, got \[7, 7, 7\]"
    ):
        NMWeight.from_state_dict({**state, "indices": torch.full_like(state["indices"], 255)})
    with pytest.raises(ValueError, match="layout must be int64"):
        NMWeight.from_state_dict({**state, "layout": state["layout"].float()})
    with pytest.raises(TypeError, match="NMWeight: state must be a dict of tensors, got NoneType"):
        NMWeight.from_state_dict(None)
    with pytest.raises(ValueError, match="NMWeight: values must have values, got a tensor on meta"):
        NMWeight.from_state_dict({name: x if name == "layout" else x.to("meta") for name, x in state.items()})
    with pytest.raises(ValueError, match="nm_validate: weight must have values"):
        maskops.nm_validate(torch.ones(1, 4, device="meta"), 2, 4)
    narrow = maskops.nm_compress(torch.ones(1, 1), 3, 5)
    with pytest.raises(ValueError, match=r"values\[0, 1\] must be 0, its column is padding, got 1"):
        NMWeight.from_state_dict({**narrow.state_dict(), "values": torch.ones(1, 3)})


@pytest.mark.parametrize("dtype,n,m", [(torch.float16, 2, 4), (torch.bfloat16, 2, 4), (torch.float32, 1, 2)])
@pytest.mark.parametrize("rows,columns", [(32, 64), (96, 192), (64, 32)])
def test_torch_layout(dtype: torch.dtype, n: int, m: int, rows: int, columns: int) -> None:
    # 16 bits are enough: torch decodes a float32 as two float16, and changes one that is a NaN there.
    dense = torch.randn(rows, columns).abs().add(0.1).bfloat16().float()
    dense = torch.where(maskops.nm_mask(torch.randn(rows, columns), n, m), dense, 0).to(dtype)
    weight = maskops.nm_compress(dense, n, m)
    values, metadata = weight.to_semi_structured()
    expected = torch_layout.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    back = NMWeight.from_semi_structured(*expected)
    assert torch.equal(back.values, weight.values) and torch.equal(back.indices, weight.indices)
    # Groups with less than n nonzeros: torch fills them otherwise, both decode to the same weight.
    dense[torch.rand(rows, columns) < 0.4] = 0
    weight = maskops.nm_compress(dense, n, m)
    assert torch.equal(torch_layout.sparse_semi_structured_to_dense_cutlass(*weight.to_semi_structured()), dense)
    back = NMWeight.from_semi_structured(*torch_layout.sparse_semi_structured_from_dense_cutlass(dense))
    assert torch.equal(back.to_dense(), dense) and torch.equal(back.indices, weight.indices)


def test_torch_layout_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"to_semi_structured: values must be one of 2:4 in float16; .*, got 2:4 in float32"
    ):
        maskops.nm_compress(torch.zeros(32, 64), 2, 4).to_semi_structured()
    with pytest.raises(ValueError, match=r"weight must have N divisible by 32 and K by 32, got \[30, 64\]"):
        maskops.nm_compress(torch.zeros(30, 64).half(), 2, 4).to_semi_structured()
    with pytest.raises(ValueError, match="metadata must be int16"):
        NMWeight.from_semi_structured(torch.zeros(32, 32).half(), torch.zeros(32, 4))
