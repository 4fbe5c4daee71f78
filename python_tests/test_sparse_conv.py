"""sparse_conv: dense convolutions as the oracle, shared maps, invariances, errors of SparseTensor."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import SparseTensor
from maskops.nn import (
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose2d,
    SparseInverseConv,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
)
from maskops.testing import instruction_set, instruction_sets
from maskops.testing.sparse_conv import places

DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def tensor(batch: int, channels: int, *shape: int, count: int = 40, dtype: torch.dtype = torch.float64) -> SparseTensor:
    g = torch.Generator().manual_seed(0)
    coords = places(g, count, batch, *shape)
    return SparseTensor(torch.randn(len(coords), channels, generator=g, dtype=dtype), coords, shape, batch)


def dense_weight(weight: Tensor) -> Tensor:
    """[*kernel_size, C / G, D] as torch's [D, C / G, *kernel_size]."""
    return weight.movedim(-1, 0).movedim(-1, 1)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dilation", [1, 2])
def test_submanifold_equals_dense_at_active_places(axes: int, groups: int, dilation: int) -> None:
    x = tensor(2, 8, *(9, 8, 7)[:axes])
    layer = (SubMConv1d, SubMConv2d, SubMConv3d)[axes - 1](8, 16, 3, dilation=dilation, groups=groups).double()
    out = layer(x)
    dense = DENSE[axes](
        x.dense(), dense_weight(layer.weight), layer.bias, padding=dilation, dilation=dilation, groups=groups
    )
    assert out.places is x.places
    torch.testing.assert_close(out.features, SparseTensor.from_dense(dense, active_of(x)).features[order_of(x)])


def active_of(x: SparseTensor) -> Tensor:
    return x.replace(torch.ones(len(x), 1)).dense()[:, 0] > 0


def order_of(x: SparseTensor) -> Tensor:
    """Where the rows of x stand in ascending order."""
    return torch.unique(x.coords, dim=0, return_inverse=True)[1]


@pytest.mark.parametrize("stride,padding,kernel", [(2, 1, 3), (2, 0, 2), ((2, 1), (0, 2), (3, 5))])
def test_strided_equals_dense_where_anything_is_read(stride: object, padding: object, kernel: object) -> None:
    x = tensor(2, 4, 11, 10)
    layer = SparseConv2d(4, 6, kernel, stride=stride, padding=padding, bias=False).double()
    out = layer(x)
    dense = F.conv2d(x.dense(), dense_weight(layer.weight), stride=stride, padding=padding)
    assert out.spatial_shape == tuple(dense.shape[2:])
    torch.testing.assert_close(out.dense(), dense)
    reached = F.conv2d(
        active_of(x)[:, None].double(), torch.ones(1, 1, *layer.kernel_size).double(), stride=stride, padding=padding
    )
    assert torch.equal(out.coords, torch.nonzero(reached[:, 0] > 0).int())


def test_transposed_equals_dense() -> None:
    x = tensor(2, 4, 6, 5, count=12)
    layer = SparseConvTranspose2d(4, 3, 3, stride=2, padding=1, bias=False).double()
    weight = layer.weight.movedim(-1, 0).movedim(-1, 0)  # torch: [C, D, *kernel_size]
    torch.testing.assert_close(layer(x).dense(), F.conv_transpose2d(x.dense(), weight, stride=2, padding=1))


def test_inverse_returns_to_the_places_it_came_from() -> None:
    x = tensor(1, 4, 8, 9, 7)
    down, up = (
        SparseConv3d(4, 8, 3, stride=2, padding=1).double(),
        SparseInverseConv(8, 4, (3, 3, 3), bias=False).double(),
    )
    middle = down(x)
    back = up(middle)
    assert back.places is x.places and middle.stride == (2, 2, 2)
    # Its matrix is the transposed one of a convolution with the same weight.
    weight = up.conv.weight.detach().transpose(-1, -2).contiguous()
    probe = torch.randn(len(middle), 8, dtype=torch.float64)
    found = middle.places.origin[1]
    forward = maskops.sparse_conv(x.features, weight, found)
    torch.testing.assert_close((forward * probe).sum(), (x.features * up(middle.replace(probe)).features).sum())
    with pytest.raises(ValueError, match="must come from a convolution with a stride"):
        up(x.replace(torch.zeros(len(x), 8, dtype=torch.float64)))


def test_layers_over_the_same_places_share_a_map() -> None:
    x = tensor(1, 4, 9, 9)
    first, second = SubMConv2d(4, 4, 3).double(), SubMConv2d(4, 4, 3).double()
    y = second(first(x))
    assert y.places.submanifold((3, 3), (1, 1)) is x.places.submanifold((3, 3), (1, 1)) and len(x.places._maps) == 1


def test_order_of_places_does_not_matter() -> None:
    x, layer = tensor(2, 8, 9, 9, 9, count=200, dtype=torch.float32), SubMConv3d(8, 16, 3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    shuffled = SparseTensor(x.features[order], x.coords[order], x.spatial_shape, x.batch_size)
    assert torch.equal(layer(shuffled).features, layer(x).features[order])


@pytest.mark.parametrize("corner", [0, 2**20, 2**31 - 2])
def test_places_at_the_ends_of_32_bits(corner: int) -> None:
    near = torch.tensor(list(itertools.product([0], [0, 1], [0, 1], [0, 1])), dtype=torch.int64)
    near[:, 1:] += corner
    coords = near.int()
    assert maskops.kernel_map(coords, 3).pairs() == 64  # each of eight sees all of them
    assert torch.equal(maskops.kernel_map(coords, 3).map, maskops.kernel_map(coords, 3, backend="reference").map)


def test_hostile_places() -> None:
    """All on a line, in one plane, at random over 2^20: as the reference has it."""
    g = torch.Generator().manual_seed(0)
    line = torch.zeros(300, 4, dtype=torch.int32)
    line[:, 3] = torch.randperm(300, generator=g).int() * 63
    plane = places(g, 300, 1, 40, 40, 1)
    far = places(g, 300, 3, 2**20, 2**20, 2**20)
    for coords in (line, plane, far, torch.cat([far, far[:1] + 1])):
        own, plain = (maskops.kernel_map(coords, (3, 1, 5), backend=backend).map for backend in ("native", "reference"))
        assert torch.equal(own, plain)


@pytest.mark.parametrize("order", ["ascending", "shuffled", "halves"])
@pytest.mark.parametrize(
    "size,padding,dilation",
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((1, 1, 7), (0, 0, 3), (1, 1, 1)),
        ((5, 3, 1), (4, 2, 0), (1, 2, 1)),
        ((1, 2, 65), (0, 0, 1), (1, 1, 1)),
        ((3, 1, 127), (1, 0, 63), (1, 1, 1)),
        ((1, 1, 128), (0, 0, 64), (1, 1, 1)),  # further than a column is long
        ((3, 1, 5), (2, 0, 6), (2, 1, 3)),
    ],
)
def test_columns_equal_places_looked_up_one_by_one(size: tuple, padding: tuple, dilation: tuple, order: str) -> None:
    """A copy of the places as those of the result is looked up place by place; columns of 64 are crossed, and begin below 0."""
    g, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    coords = places(g, 1500, 2, 6, 6, 200) - torch.tensor([0, 5, 0, 70], dtype=torch.int32)
    if order == "shuffled":
        coords = coords[torch.randperm(len(coords), generator=g)]
    elif order == "halves":
        coords = torch.cat([coords[700:], coords[:700]])
    sizes = {"padding": padding, "dilation": dilation}
    whole = maskops.kernel_map(coords, size, out_coords=coords.clone(), **sizes).map
    assert torch.equal(whole, maskops.kernel_map(coords, size, out_coords=coords, backend="reference", **sizes).map)
    try:
        for count, name in itertools.product((1, 3), instruction_sets()):
            torch.set_num_threads(count)
            with instruction_set(name):
                assert torch.equal(maskops.kernel_map(coords, size, out_coords=coords, **sizes).map, whole)
    finally:
        torch.set_num_threads(threads)


def test_reverse_of_a_submanifold_is_its_mirror_image() -> None:
    x = tensor(2, 1, 9, 9, 9, count=300)
    found = x.places.submanifold((3, 3, 3), (1, 1, 1))
    assert found.symmetric and torch.equal(found.reverse(), torch.ops.maskops.sparse_conv_reverse(found.map, len(x)))


def test_empty_tensor_goes_through_a_network() -> None:
    x = SparseTensor(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, dtype=torch.int32), (8, 8, 8), 2)
    net = nn.Sequential(SubMConv3d(4, 8, 3), SparseConv3d(8, 8, 3, stride=2, padding=1), SubMConv3d(8, 4, 3))
    out = net(x)
    assert out.features.shape == (0, 4) and out.dense().shape == (2, 4, 4, 4, 4)
    out.features.sum().backward()
    assert net[0].weight.grad.abs().sum() == 0


def test_gradients_equal_those_of_the_dense_convolution() -> None:
    x, layer = tensor(2, 4, 8, 7), SubMConv2d(4, 6, 3).double()
    features = x.features.clone().requires_grad_()
    probe = torch.randn(len(x), 6, dtype=torch.float64)
    own = torch.autograd.grad((layer(x.replace(features)).features * probe).sum(), [features, layer.weight, layer.bias])
    dense = F.conv2d(x.replace(features).dense(), dense_weight(layer.weight), layer.bias, padding=1)
    at = dense.movedim(1, -1)[tuple(x.coords.long().T)]
    for a, b in zip(own, torch.autograd.grad((at * probe).sum(), [features, layer.weight, layer.bias]), strict=True):
        torch.testing.assert_close(a, b)


def test_network_compiles_whole() -> None:
    x = tensor(1, 4, 9, 9, dtype=torch.float32)
    net = nn.Sequential(SubMConv2d(4, 8, 3), SubMConv2d(8, 4, 3))
    found = x.places.submanifold((3, 3), (1, 1))

    def run(features: Tensor) -> Tensor:
        return maskops.sparse_conv(
            torch.relu(maskops.sparse_conv(features, net[0].weight, found)), net[1].weight, found
        )

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x.features), run(x.features))


def test_sparse_tensor_arithmetic_and_parts() -> None:
    x = tensor(3, 2, 5, 5)
    assert torch.equal((x + x).features, (x * 2).features) and torch.equal(
        (x - x).features, torch.zeros_like(x.features)
    )
    assert torch.equal(x.cat(x).dense()[:, 2:], x.dense())
    assert torch.equal(x.sample(1).dense()[0], x.dense()[1])
    assert "places x 2 channels of 3 grids 5x5" in repr(x)
    with pytest.raises(ValueError, match=r"the other tensor of \+ must have the same places"):
        x + tensor(3, 2, 5, 5, count=20)


def test_repeated_places_are_refused_or_joined() -> None:
    coords = torch.tensor([[0, 1], [0, 3], [0, 1]], dtype=torch.int32)
    features = torch.tensor([[1.0], [2.0], [5.0]])
    with pytest.raises(IndexError, match=r"coords\[2\] must be unique, got \[0, 1\] as in row 0"):
        SubMConv1d(1, 1, 3)(SparseTensor(features, coords, (4,), 1))
    for how, first in (("sum", 6.0), ("mean", 3.0), ("max", 5.0), ("min", 1.0)):
        assert SparseTensor.reduced(features, coords, (4,), 1, how).features[:, 0].tolist() == [first, 2.0]


def test_errors_name_the_argument() -> None:
    x = tensor(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"SparseTensor: coords\[0\] must be at least 0 and below \[1, 2, 2\]"):
        SparseTensor(torch.zeros(1, 1), torch.tensor([[0, 0, 2]], dtype=torch.int32), (2, 2), 1)
    with pytest.raises(ValueError, match="coords must be int32"):
        SparseTensor(x.features, x.coords.long(), (5, 5), 1)
    with pytest.raises(ValueError, match="features must have shape"):
        x.replace(x.features[1:])
    with pytest.raises(ValueError, match="padding must be given for a kernel of even size"):
        maskops.kernel_map(x.coords, 2)
    with pytest.raises(ValueError, match="in_shape must be given with a stride"):
        maskops.kernel_map(x.coords, 3, stride=2)
    with pytest.raises(TypeError, match="map must be a KernelMap"):
        maskops.sparse_conv(x.features, torch.zeros(9, 4, 4), x.coords)
    with pytest.raises(TypeError, match="sparse_conv: bias must be a tensor or None, got int"):
        maskops.sparse_conv(x.features, torch.zeros(9, 4, 4), x.places.submanifold((3, 3), (1, 1)), bias=3)
    with pytest.raises(TypeError, match="kernel_map: transposed must be bool, got 'x'"):
        maskops.kernel_map(x.coords, 3, transposed="x")
    with pytest.raises(TypeError, match="kernel_map: out_coords must be a tensor or None, got str"):
        maskops.kernel_map(x.coords, 3, out_coords="x")
    with pytest.raises(TypeError, match="SubMConv2d: x must be a SparseTensor, got Tensor"):
        SubMConv2d(4, 4, 3)(x.features)
    with pytest.raises(TypeError, match=r"SubMConv2d: kernel_size must be int, got 3.5"):
        SubMConv2d(4, 4, 3.5)
    with pytest.raises(ValueError, match="features must be float32 or float64"):
        SparseTensor(x.features.long(), x.coords, (5, 5), 1)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SubMConv2d(4, 4, 2)
    with pytest.raises(ValueError, match="groups must divide 4 and 6"):
        SubMConv2d(4, 6, 3, groups=4)
    with pytest.raises(ValueError, match="kernel_size must be one to three numbers, one per axis, got 3"):
        SparseInverseConv(4, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_weight_over_several_blocks(dtype: torch.dtype) -> None:
    """More rows than are multiplied, and than stay in the cache, at a time, on every instruction set."""
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, 200, generator=g).to(dtype) for rows in (900, 1100))
    map = torch.randint(-400, 900, (9, 1100), generator=g, dtype=torch.int32).clamp(min=-1)
    exact = torch.ops.maskops_reference._sparse_conv_grad_weight(grad.double(), x.double(), map, 2)
    for name in instruction_sets():
        with instruction_set(name):
            own = torch.ops.maskops._sparse_conv_grad_weight(grad, x, map, 2)
        assert (own.double() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-3) * exact.abs().max(), (
            name
        )
