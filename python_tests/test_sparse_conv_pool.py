"""sparse_conv, pooling and voxels: dense pooling and brute force as oracles, determinism, hostile points, errors."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import SparseTensor
from maskops.nn import (
    SparseAvgPool2d,
    SparseConv2d,
    SparseGlobalPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
    SubMConv2d,
)
from maskops.testing import emulator
from maskops.testing.sparse_conv import lidar_like, places

DENSE = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def tensor(batch: int, channels: int, *shape: int, count: int = 40) -> SparseTensor:
    g = torch.Generator().manual_seed(0)
    coords = places(g, count, batch, *shape)
    return SparseTensor(torch.randn(len(coords), channels, generator=g, dtype=torch.float64), coords, shape, batch)


def dense_with(x: SparseTensor, empty: float) -> Tensor:
    """[B, C, *shape] with another value than 0 where no place is active."""
    active = x.replace(torch.ones(len(x), 1, dtype=torch.float64)).dense()
    return torch.where(active > 0, x.dense(), empty)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("submanifold", [False, True])
def test_max_pool_equals_dense_over_minus_infinity(axes: int, submanifold: bool) -> None:
    x = tensor(2, 5, *(9, 8, 7)[:axes])
    pool = (SparseMaxPool1d, SparseMaxPool2d, SparseMaxPool3d)[axes - 1]
    sizes = {"submanifold": True} if submanifold else {"stride": 2, "padding": 1}
    out = pool(3, **sizes)(x)
    dense = DENSE[axes](dense_with(x, -torch.inf), 3, stride=1 if submanifold else 2, padding=1)
    at = out.coords.long().T
    torch.testing.assert_close(out.features, dense.movedim(1, -1)[tuple(at)], rtol=0, atol=0)
    assert (
        out.places is x.places if submanifold else torch.equal(out.coords, torch.nonzero(dense[:, 0].isfinite()).int())
    )


@pytest.mark.parametrize("inactive", [False, True])
def test_average_pool_equals_dense(inactive: bool) -> None:
    x = tensor(2, 5, 9, 8)
    out = SparseAvgPool2d(3, 2, 1, count_include_inactive=inactive)(x)
    total, count = (F.avg_pool2d(d, 3, 2, 1) * 9 for d in (x.dense(), (dense_with(x, torch.inf) < torch.inf).double()))
    expected = total / (9 if inactive else count.clamp(min=1))
    torch.testing.assert_close(out.features, expected.movedim(1, -1)[tuple(out.coords.long().T)])


def test_the_first_of_equal_values_gets_the_gradient() -> None:
    """In map order, not by row: rows 2, 0, 1 lie left to right; and once only."""
    coords = torch.tensor([[0, 1], [0, 2], [0, 0]], dtype=torch.int32)
    features = torch.ones(3, 1, requires_grad=True)
    out = maskops.sparse_max_pool(features, maskops.kernel_map(coords, 3))
    out.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert features.grad[:, 0].tolist() == [10.0, 0.0, 101.0]
    whole = torch.ones(3, 1, requires_grad=True)
    maskops.sparse_global_pool(whole, coords[:, 0], 1, "max").sum().backward()
    assert whole.grad[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_a_place_that_reads_nothing_is_zero() -> None:
    coords, out = (torch.tensor(rows, dtype=torch.int32) for rows in ([[0, 0]], [[0, 0], [0, 9]]))
    found = maskops.kernel_map(coords, 3, out_coords=out)
    features = torch.full((1, 2), -1.0, requires_grad=True)
    for pool in (maskops.sparse_max_pool, maskops.sparse_avg_pool):
        assert pool(features, found).tolist() == [[-1.0, -1.0], [0.0, 0.0]]


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_global_pool_equals_each_sample_alone(reduce: str, order: str) -> None:
    """Sample 1 of 4 has no place; sample 3 is so long that it is summed in parts."""
    index = torch.tensor([0] * 3 + [2] * 100 + [3] * 5000)
    if order == "mixed":
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    x = torch.randn(len(index), 7, dtype=torch.float64, requires_grad=True)
    out = maskops.sparse_global_pool(x, index, 4, reduce)
    function = {"max": lambda r: r.amax(0), "mean": lambda r: r.mean(0), "sum": lambda r: r.sum(0)}[reduce]
    expected = torch.stack([function(x[index == b]) if (index == b).any() else x.new_zeros(7) for b in range(4)])
    torch.testing.assert_close(out, expected)
    probe = torch.randn(4, 7, dtype=torch.float64)
    own, plain = (torch.autograd.grad((y * probe).sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(own, plain)


def test_results_do_not_depend_on_threads() -> None:
    coords = lidar_like(6000, 0.8)
    x = torch.randn(len(coords), 33)
    found, threads, results = maskops.kernel_map(coords, 3), torch.get_num_threads(), []
    points = torch.rand(30000, 4) * 8
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            out = [maskops.sparse_max_pool(leaf, found), maskops.sparse_avg_pool(leaf, found)]
            out += [maskops.sparse_global_pool(leaf, coords[:, 0], 1, reduce) for reduce in ("mean", "max")]
            grad = torch.autograd.grad(sum(y.square().sum() for y in out), leaf)[0]
            voxels = maskops.voxelize(points, 0.25, (0, 0, 0, 8, 8, 8))
            results.append([*out, grad, voxels.tensor.features, voxels.tensor.coords, *voxels.segments])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives() -> None:
    coords = places(torch.Generator().manual_seed(0), 12, 1, 5, 5)
    found, x = maskops.kernel_map(coords, 3), torch.randn(len(coords), 2, dtype=torch.float64, requires_grad=True)
    segments = maskops.Segments.of(torch.arange(len(coords)) % 3, 3)
    for f in (
        lambda x: maskops.sparse_max_pool(x.square(), found),
        lambda x: maskops.sparse_avg_pool(x.square(), found),
        lambda x: maskops.sparse_global_pool(x.square(), segments.inverse, 3),
        lambda x: maskops.sparse_global_pool(x.square(), segments.inverse, 3, "max"),
    ):
        assert torch.autograd.gradgradcheck(f, (x,))


def test_empty_tensor_goes_through_pools() -> None:
    x = SparseTensor(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 3, dtype=torch.int32), (8, 8), 2)
    net = nn.Sequential(
        SubMConv2d(4, 4, 3), SparseMaxPool2d(2), SparseAvgPool2d(3, submanifold=True), SparseGlobalPool("max")
    )
    out = net(x)
    assert torch.equal(out, torch.zeros(2, 4))
    out.sum().backward()


# ---------------------------------------------------------------- voxels


def brute(points: Tensor, size: float, low: float, cells: int) -> dict[tuple, list[int]]:
    """Place -> its points, in order."""
    found: dict[tuple, list[int]] = {}
    for row, point in enumerate(points[:, :3].double().tolist()):
        if all(value == value and 0 <= (value - low) / size < cells for value in point):
            found.setdefault(tuple(int((value - low) / size // 1) for value in point), []).append(row)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("kind", ["any", "one", "line", "hole"])
@pytest.mark.parametrize("most", [None, 2])
def test_voxels_equal_brute_force(kind: str, most: int | None) -> None:
    points = torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) * 5 - 0.5
    if kind == "one":
        points[:, :3] = 1.3
    elif kind == "line":
        points[:, :2] = 0.0
    elif kind == "hole":
        points[::3] = torch.nan
        points[1::3, 0], points[2, 1] = torch.inf, -torch.inf
    found = maskops.voxelize(points, 0.5, (0, 0, 0, 4, 4, 4), max_points=most)
    expected = brute(points, 0.5, 0.0, 8)
    assert [tuple(row) for row in found.tensor.coords[:, 1:].tolist()] == list(expected)
    for v, rows in enumerate(expected.values()):
        torch.testing.assert_close(found.tensor.features[v], points[rows[:most]].mean(0))
        assert int(found.counts[v]) == len(rows[:most]) and (found.inverse[rows] == v).all()
    inside = sum(len(rows) for rows in expected.values())
    assert int(found.dropped) == 400 - inside == int((found.inverse < 0).sum())


def test_gradient_of_voxels_is_that_of_the_mean() -> None:
    points = (torch.rand(60, 4, dtype=torch.float64) * 3).requires_grad_()
    for reduce in ("mean", "max", "first"):
        found = maskops.voxelize(points, 1.0, (0, 0, 0, 2, 2, 2), reduce=reduce, max_points=4)
        probe = torch.randn_like(found.tensor.features)
        own = torch.autograd.grad((found.tensor.features * probe).sum(), points)[0]
        expected = torch.zeros_like(points)
        for v in range(len(found.counts)):
            rows = torch.nonzero(found.inverse == v)[:4, 0]
            if reduce == "mean":
                expected[rows] = probe[v] / len(rows)
            else:
                best = points[rows].argmax(0) if reduce == "max" else torch.zeros(4, dtype=torch.int64)
                expected[rows[best], torch.arange(4)] = probe[v]
        torch.testing.assert_close(own, expected)


def test_slice_gives_points_the_row_of_their_voxel() -> None:
    points = torch.rand(50, 3) * 3
    found = maskops.voxelize(points, 1.0, (0, 0, 0, 2, 2, 2), max_points=2)
    rows = torch.randn(len(found.tensor), 6, dtype=torch.float64, requires_grad=True)
    back = found.slice(rows)
    expected = torch.where((found.inverse >= 0)[:, None], rows[found.inverse.clamp(min=0).long()], 0)
    assert torch.equal(back, expected)
    assert torch.autograd.gradcheck(found.slice, (rows,))


def test_samples_and_a_range_from_the_points() -> None:
    g = torch.Generator().manual_seed(0)
    points, index = torch.randn(300, 3, generator=g), torch.randint(0, 4, (300,), generator=g)
    points[5] = torch.nan
    found = maskops.voxelize(points, 0.3, batch_index=index)
    assert found.tensor.batch_size == 4 and int(found.dropped) == 1
    for b in range(4):
        own = maskops.voxelize(points[index == b], 0.3, (-6, -6, -6, 6, 6, 6))
        torch.testing.assert_close(found.tensor.sample(b).features, own.tensor.features)


def test_errors_name_the_argument() -> None:
    points, x = torch.zeros(3, 3), torch.zeros(3, 2)
    points[1] = 9.0
    good = {"points": points, "voxel_size": 1.0, "range": (0, 0, 0, 4, 4, 4)}
    for change, error, words in (
        ({"outside": "raise"}, ValueError, r"voxelize: points\[1\] must be inside of \[0, 0, 0, 4, 4, 4\], got \[9.0"),
        ({"range": (0, 0, 0, 4, 4, 4.5)}, ValueError, "range must be a whole number of cells of 1.0"),
        ({"range": (0, 0, 4, 4)}, ValueError, "range must be 3 low and 3 high ends"),
        ({"voxel_size": (1.0,) * 4}, ValueError, "voxel_size must be one to three sizes above 0"),
        ({"voxel_size": "big"}, TypeError, "voxel_size must be a sequence of numbers, got 'big'"),
        ({"reduce": "median"}, ValueError, "reduce must be one of .*, got 'median'"),
        ({"max_points": 0}, ValueError, "max_points must be at least 1"),
        ({"batch_index": torch.tensor([0, -1, 0])}, IndexError, r"batch_index\[1\] must be in \[0, 1\), got -1"),
        ({"points": points.int()}, ValueError, "voxelize: points must be float32"),
        ({"points": None}, TypeError, "voxelize: points must be a tensor"),
    ):
        with pytest.raises(error, match=words):
            maskops.voxelize(**{**good, **change})
    with pytest.raises(TypeError, match="sparse_max_pool: map must be a KernelMap"):
        maskops.sparse_max_pool(x, points)
    with pytest.raises(IndexError, match=r"batch_index\[2\] must be in \[0, 2\), got 5"):
        maskops.sparse_global_pool(x, torch.tensor([0, 1, 5]), 2)
    with pytest.raises(ValueError, match="SparseMaxPool2d: kernel_size must be odd for a submanifold"):
        SparseMaxPool2d(2, submanifold=True)
    with pytest.raises(ValueError, match="SparseMaxPool2d: stride must be 1 for a submanifold"):
        SparseMaxPool2d(3, 2, submanifold=True)
    with pytest.raises(ValueError, match="SparseGlobalPool: reduce must be one of"):
        SparseGlobalPool("median")
    with pytest.raises(TypeError, match="SparseMaxPool2d: x must be a SparseTensor"):
        SparseMaxPool2d(2)(points)


# ---------------------------------------------------------------- SparseTensor


def test_stacked_samples_are_those_of_each_tensor() -> None:
    x, y = tensor(2, 3, 5, 5), tensor(1, 3, 5, 5, count=9)
    both = SparseTensor.stack([x, y])
    assert both.batch_size == 3 and torch.equal(both.dense(), torch.cat([x.dense(), y.dense()]))
    assert torch.equal((-x).features, -x.features)
    torch.testing.assert_close((2 * x + 1 - x / 2).features, x.features * 1.5 + 1)
    with pytest.raises(ValueError, match=r"tensors\[1\] must have the grid"):
        SparseTensor.stack([x, tensor(1, 3, 5, 6)])


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_repeated_places_are_joined_with_gradients(reduce: str) -> None:
    coords = torch.tensor([[0, 1], [0, 3], [0, 1], [1, 2]], dtype=torch.int32)
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: SparseTensor.reduced(f, coords, (4,), 2, reduce).features, (features,))


# ---------------------------------------------------------------- a backbone as one graph


class Backbone(nn.Module):
    """Points to logits: voxels, convolutions whose maps are built inside, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.down, self.conv2 = (
            SubMConv2d(3, 8, 3),
            SparseConv2d(8, 8, 3, stride=2, padding=1),
            SubMConv2d(8, 8, 3),
        )
        self.pool, self.whole, self.head = SparseMaxPool2d(2), SparseGlobalPool("mean"), nn.Linear(8, 5)

    def forward(self, points: Tensor, index: Tensor) -> Tensor:
        x = maskops.voxelize(points, (0.25, 0.25), (0, 0, 4, 4), batch_index=index, batch_size=2).tensor
        for layer in (self.conv1, self.down, self.conv2, self.pool):
            x = layer(x)
            x = x.replace(torch.relu(x.features))
        return self.head(self.whole(x))


def cloud(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=g) * 4.2, torch.randint(0, 2, (count,), generator=g)


def test_backbone_compiles_to_one_graph_for_any_number_of_points() -> None:
    torch._dynamo.reset()
    model = Backbone()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for count in (50, 90, 400):
        args = cloud(count, count)
        out, expected = compiled(*args), model(*args)
        torch.testing.assert_close(out, expected)
        own, plain = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (out, expected))
        for a, b in zip(own, plain, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_backbone_is_exported_and_takes_other_points() -> None:
    model = Backbone().eval()
    rows = torch.export.Dim("rows", min=2, max=10000)
    program = torch.export.export(model, cloud(60, 0), dynamic_shapes=({0: rows}, {0: rows}))
    for count in (60, 300):
        torch.testing.assert_close(program.module()(*cloud(count, 1)), model(*cloud(count, 1)))


@pytest.mark.skipif(bool(emulator.reason_unavailable()), reason=emulator.reason_unavailable() or "-")
@pytest.mark.parametrize("shape", [(7, 9, 3), (2**20, 2**20)])
def test_voxels_of_many_blocks_are_the_same_on_cuda(shape: tuple[int, ...]) -> None:
    """More points than one block takes, and keys of one to six digits."""
    g = torch.Generator().manual_seed(0)
    points = (torch.rand(5000, len(shape), generator=g, dtype=torch.float64) * 1.1 - 0.03) * torch.tensor(shape)
    points[::50] = torch.nan
    batch = torch.randint(3, (5000,), generator=g, dtype=torch.int32)
    arguments = points, batch, [1.0] * len(shape), [0.0] * len(shape), list(shape), 3
    found = torch.ops.maskops_emulated.sparse_conv_voxelize(*arguments)
    assert len(found[0]) > 400
    for ours, expected in zip(found, torch.ops.maskops.sparse_conv_voxelize(*arguments), strict=True):
        assert torch.equal(ours, expected)
