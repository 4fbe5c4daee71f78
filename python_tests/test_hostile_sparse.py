"""Arguments of sparse_conv, its tensors and modules that once crashed, hung or were silently taken for something else."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maskops
import maskops.compat.spconv as spconv
from maskops import SparseTensor
from maskops.compat import sparse_layouts
from maskops.nn import block_mask, block_masked, to_block_masked

BACKENDS = pytest.mark.parametrize("backend", ["auto", "native", "reference"])
NAN, INF, HUGE = float("nan"), float("inf"), 2**40


def places(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


LINE, PLANE = places([0, 4], [0, 5], [0, 9]), places([0, 1, 1], [0, 1, 2], [1, 3, 3])
MAP, X, W = maskops.kernel_map(LINE, 3), torch.randn(3, 4), torch.randn(3, 4, 2)
POINTS, IMAGES = torch.rand(6, 4) * 4, torch.randn(2, 4, 8, 8)
CELLS, MASK, FOUR = torch.ones(2, 2, 2) > 0, torch.ones(2, 1, 8, 8) > 0, torch.ones(4)
VOXELS = {"points": POINTS, "voxel_size": (1.0, 1.0), "range": (0, 0, 4, 4)}
NORM = {"x": IMAGES, "cells": CELLS}
WRONG = [  # function, good arguments, argument, a wrong value, the error, what it says
    ("kernel_map", {"coords": LINE, "kernel_size": 3}, [
        ("coords", LINE.long(), ValueError, "be int32"),
        ("coords", torch.cat([LINE, LINE[:1]]), IndexError, r"be unique, got \[0, 4\] as in row 0"),
        ("kernel_size", 0, ValueError, "be 1 numbers from 1"), ("kernel_size", (3, 3), ValueError, "be 1 numbers"),
        ("kernel_size", [], ValueError, "be 1 numbers"), ("dilation", (1, 1), ValueError, "be 1 numbers"),
        ("stride", HUGE, ValueError, "be 1 numbers"), ("padding", "1", TypeError, "be int"),
        ("in_shape", (-1,), ValueError, "be 1 numbers from 0"), ("in_shape", (4, 4), ValueError, "be 1 numbers"),
        ("out_shape", (HUGE,), ValueError, "be 1 numbers"), ("out_coords", LINE[:, :1], ValueError, "have shape"),
    ]),
    ("kernel_map", {"coords": torch.zeros(0, 4, dtype=torch.int32), "kernel_size": 3}, [
        ("kernel_size", 2**31 - 1, ValueError, r"have fewer than 2\^31 places"),
    ]),
    ("sparse_conv", {"features": X, "weight": W, "map": MAP}, [
        ("features", X.long(), ValueError, "be float32"), ("features", X.to(torch.complex64), ValueError, "be .* got complex64"),
    ]),
    ("sparse_max_pool", {"features": X, "map": MAP}, [("features", X[0], ValueError, "have shape")]),
    ("sparse_avg_pool", {"features": X, "map": MAP}, [("features", X.bool(), ValueError, "be float32")]),
    ("sparse_global_pool", {"features": X, "batch_index": torch.tensor([0, 2, 0]), "batch_size": 3}, [
        ("batch_size", HUGE, ValueError, r"be in \[0, 2\^31\)"), ("reduce", [], ValueError, "be one of"),
        ("batch_index", torch.tensor([0, 2**32, 0]), IndexError, r"be in \[0, 3\)"),
    ]),
    ("voxelize", VOXELS, [
        ("range", (-1e308, 0, 1e308, 4), ValueError, "be a whole number of cells"),
        ("range", None, None, ""), ("voxel_size", (10**400, 1), ValueError, "fit in a float"),
        ("batch_size", HUGE, ValueError, r"be in \[1, 2\^31\)"), ("reduce", [], ValueError, "be one of"),
    ]),
    ("voxelize", {"points": POINTS * 1e30, "voxel_size": (1e25, 1e25)}, [
        ("voxel_size", (1e-300, 1.0), ValueError, r"fewer than 2\^31 cells"),
    ]),
    ("voxelize", {"points": POINTS, "voxel_size": (1.0,) * 3}, [
        ("voxel_size", (4e-9,) * 3, ValueError, r"at most 2\^62 cells"),
    ]),
    ("neighbour_fill", {"x": IMAGES, "mask": MASK}, [
        ("x", IMAGES.long(), ValueError, "be float32"), ("mask", MASK[:1], ValueError, "have shape"),
        ("iterations", -1, ValueError, "be at least 0"), ("eps", NAN, ValueError, "be at least 0 .* got nan"),
    ]),
    ("block_masked_conv", {**NORM, "weight": torch.randn(6, 4, 3, 3)}, [
        ("weight", torch.randn(6, 4), ValueError, r"have shape \[O, C / groups, kh, kw\]"),
        ("padding", 2**62, ValueError, "give 8 x 8 positions"),
    ]),
    ("masked_batch_norm", {**NORM, "running_mean": FOUR * 0, "running_var": FOUR, "training": True}, [
        ("running_mean", torch.zeros(1).expand(4), ValueError, "have no expanded axis"), ("eps", INF, ValueError, "finite"),
    ]),
]  # fmt: skip
CASES = [(function, good, *wrong) for function, good, group in WRONG for wrong in group]


@BACKENDS
@pytest.mark.parametrize(("function", "good", "argument", "value", "error", "expected"), CASES)
def test_errors_name_function_and_argument(
    function: str, good: dict, argument: str, value: object, error: type | None, expected: str, backend: str
) -> None:
    call = getattr(maskops, function)
    call(**good, backend=backend)
    if error is None:
        call(**{**good, argument: value}, backend=backend)
        return
    with pytest.raises(error, match=rf"^{function}: ({argument}|mask)(\[[\d, ]+\])? must .*{expected}"):
        call(**{**good, argument: value}, backend=backend)


@BACKENDS
def test_images_of_2_31_positions_are_refused(backend: str) -> None:
    x, cells = torch.zeros(1).expand(1, 1, 2**16, 2**16), torch.ones(1, 1, 1) > 0
    with pytest.raises(ValueError, match=r"block_masked_max_pool: x must have fewer than 2\^31 positions"):
        maskops.block_masked_max_pool(x, cells, 2, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 9}, r"kernel_size must reach no further than the 8 \+ 2 x 0 places of axis 2"),
        ({"dilation": 9}, "kernel_size must reach no further"),
        ({"stride": HUGE}, "stride must be 2 numbers from 1"),
    ],
)
def test_downsampled_masks_have_places(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"downsample_mask: {message}"):
        maskops.downsample_mask(MASK, **{"kernel_size": 3, **options})
    assert maskops.downsample_mask(MASK[..., :0], 3, padding=2).shape == (2, 1, 10, 2)


@pytest.mark.parametrize("bad", [[0, 3, 0], [0, 2**32, 0], [0, -1, 0]])
def test_compiled_programs_check_samples_too(bad: list[int]) -> None:
    """2^32 is 0 in 32 bits, and the row of a sample that does not exist was dropped in silence."""
    index = torch.tensor(bad)
    pool = torch.compile(lambda x, i: maskops.sparse_global_pool(x, i, 3), fullgraph=True)
    with pytest.raises(RuntimeError, match="batch_index must be in"):
        pool(torch.ones(3, 2), index)
    voxels = torch.compile(
        lambda x, i: maskops.voxelize(x, (1.0, 1.0), (0, 0, 4, 4), batch_index=i, batch_size=3).tensor.coords
    )
    with pytest.raises(RuntimeError, match="batch_index must be in"):
        voxels(torch.ones(3, 2), index)


# ---------------------------------------------------------------- SparseTensor


def tensor(
    features: Tensor = X, coords: Tensor = PLANE, shape: object = (4, 4), batch_size: object = 2, **options: object
):
    return SparseTensor(features, coords, shape, batch_size, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tensor(shape=(HUGE, 4)), ValueError, "spatial_shape must be one to three sizes from 0"),
        (lambda: tensor(batch_size=HUGE), ValueError, r"batch_size must be in \[0, 2\^31\)"),
        (lambda: tensor(X[:0], PLANE[:0], batch_size=-5), ValueError, "batch_size must be in"),
        (lambda: tensor(stride="ab"), TypeError, "stride must be int"),
        (lambda: tensor(stride=(1, 0)), ValueError, "stride must be 2 numbers from 1"),
        (lambda: tensor(duplicates="first"), ValueError, "duplicates must be one of"),
        (lambda: tensor().replace(X.long()), ValueError, "replace: features must be float32"),
        (lambda: tensor().replace(None), TypeError, "replace: features must be a tensor"),
        (lambda: tensor().to(torch.int64), ValueError, "to: dtype must be float32"),
        (lambda: tensor().cat(X), TypeError, "the other tensor of cat must be a SparseTensor"),
        (lambda: tensor() + tensor(shape=(5, 5)), ValueError, r"the other tensor of \+ must have shape"),
        (lambda: tensor() + X[:2], ValueError, r"the other side of \+ must fit float32 \[3, 4\]"),
        (lambda: tensor() * "2", TypeError, r"the other side of \* must be a SparseTensor"),
        (lambda: tensor().sample(1.0), TypeError, "sample: b must be int"),
        (
            lambda: SparseTensor.stack([tensor(), X]),
            TypeError,
            r"tensors must be a sequence .* \[SparseTensor, Tensor\]",
        ),
        (lambda: SparseTensor.stack([tensor(), tensor(X.double())]), ValueError, r"tensors\[1\] must be float32"),
        (lambda: SparseTensor.stack([tensor(), tensor(X[:, :2])]), ValueError, r"tensors\[1\] must have shape"),
        (lambda: SparseTensor.reduced(torch.tensor(1.0), PLANE, (4, 4), 2), ValueError, "features must have shape"),
        (lambda: SparseTensor.from_dense(IMAGES, CELLS), ValueError, "from_dense: active must have shape"),
        (lambda: SparseTensor.from_dense(IMAGES, IMAGES[:, 0]), ValueError, "from_dense: active must be bool"),
    ],
)
def test_what_is_no_sparse_tensor_is_refused(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=rf"^SparseTensor.*{message}"):
        call()


TWICE = places([0, 3, 3], [0, 1, 1], [0, 3, 3], [0, 2, 0])


@pytest.mark.parametrize("shape", [(4, 4), (2**31 - 1, 2**31 - 1)], ids=["small", "no_flat_number"])
def test_a_place_is_there_once(shape: tuple[int, int]) -> None:
    """dense() took the last of two rows in silence, and a global pool both."""
    with pytest.raises(IndexError, match=r"SparseTensor: coords\[2\] must be unique, got \[0, 3, 3\] as in row 0"):
        SparseTensor(torch.ones(4, 1), TWICE, shape, 1)
    assert len(SparseTensor(torch.ones(3, 1), TWICE[1:], shape, 1)) == 3
    compiled = torch.compile(lambda x, at: SparseTensor(x, at, (4, 4), 1).dense(), fullgraph=True)
    with pytest.raises(RuntimeError, match="coords must be unique"):
        compiled(torch.ones(4, 1), TWICE)
    with pytest.raises(RuntimeError, match="coords must be inside of the grid"):
        compiled(torch.ones(4, 1), TWICE * 9)


@pytest.mark.parametrize(("how", "joined"), [("sum", 4.0), ("mean", 2.0), ("max", 3.0), ("min", 1.0)])
def test_rows_of_one_place_are_joined_on_request(how: str, joined: float) -> None:
    features = torch.tensor([[1.0], [7.0], [3.0], [8.0]], requires_grad=True)
    x = SparseTensor(features, TWICE, (4, 4), 1, duplicates=how)
    assert x.coords.tolist() == [[0, 1, 1], [0, 2, 0], [0, 3, 3]] and x.features[:, 0].tolist() == [7.0, 8.0, joined]
    x.features[2].sum().backward()
    assert features.grad.sum() == (2.0 if how == "sum" else 1.0) and (features.grad[[1, 3]] == 0).all()
    assert torch.equal(x.features, SparseTensor.reduced(features, TWICE, (4, 4), 1, how).features)


def test_points_become_a_tensor() -> None:
    index = torch.tensor([0, 0, 1, 1, 0, 1])
    options = {"batch_index": index, "batch_size": 2, "reduce": "max", "max_points": 2}
    x = SparseTensor.from_points(POINTS, (1.0, 1.0), (0, 0, 4, 4), **options)
    found = maskops.voxelize(POINTS, (1.0, 1.0), (0, 0, 4, 4), **options).tensor
    assert torch.equal(x.coords, found.coords) and torch.equal(x.features, found.features) and x.batch_size == 2
    y = spconv.SparseConvTensor.from_points(POINTS, (1.0, 1.0), (0, 0, 4, 4))
    assert spconv.SubMConv2d(4, 3, 3, indice_key="a")(y).indices.shape[1] == 3
    with pytest.raises(ValueError, match="voxelize: points must be float32"):
        SparseTensor.from_points(POINTS.long(), (1.0, 1.0))


def test_numbers_on_the_left() -> None:
    x = tensor()
    assert torch.equal((1 - x).features, 1 - X) and torch.equal((1 / x).features, 1 / X)


# ---------------------------------------------------------------- maps that are kept


def net() -> nn.Module:
    from maskops.nn import SparseAvgPool2d, SparseConv2d, SparseGlobalPool, SparseMaxPool2d, SubMConv2d

    pools = SparseMaxPool2d(2), SparseAvgPool2d(3, submanifold=True), SparseGlobalPool("max")
    return nn.Sequential(SubMConv2d(4, 6, 3), SparseConv2d(6, 6, 3, stride=2, padding=1), *pools)


def test_maps_made_in_inference_mode_serve_training() -> None:
    x, model = tensor(), net()
    with torch.inference_mode():
        model(x)
    model(SparseTensor.over(X.clone().requires_grad_(), x.places)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_tensor_from_outside_of_a_compiled_program() -> None:
    x, model = tensor(), net()
    expected = model(tensor())
    compiled = torch.compile(model, fullgraph=True)
    for found in (compiled(x), model(x), compiled(x)):
        assert torch.equal(found, expected)


def test_an_exported_program_leaves_nothing_in_a_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, features: Tensor) -> Tensor:
            return self.net(SparseTensor.over(features, x.places))

    x, model = tensor(), Model()
    exported = torch.export.export(model, (X,)).module()
    expected = model.net(tensor())
    assert torch.equal(exported(X), expected) and torch.equal(model.net(x), expected)


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: maskops.nn.SubMConv2d(-1, 4, 3), ValueError, "SubMConv2d: in_channels must be at least 0"),
        (lambda: maskops.nn.SubMConv2d(4, 4, 3, bias=None), TypeError, "SubMConv2d: bias must be bool"),
        (lambda: maskops.nn.SparseConv3d(4, 4, 2**21), ValueError, r"kernel_size must have fewer than 2\^31 places"),
        (lambda: maskops.nn.SparseConv3d(4, 4, 3)(tensor()), ValueError, "SparseConv3d: x must have 3 axes, got 2"),
        (lambda: maskops.nn.SparseMaxPool1d(2)(tensor()), ValueError, "SparseMaxPool1d: x must have 1 axes, got 2"),
        (lambda: block_mask(CELLS.float()), ValueError, "block_mask: cells must be bool"),
        (lambda: block_mask(CELLS[0]), ValueError, "block_mask: cells must have shape"),
        (lambda: to_block_masked(nn.ReLU(), keep=nn.Upsample), TypeError, "keep must be a sequence of classes"),
        (
            lambda: to_block_masked(nn.LayerNorm((4, 8, 8), elementwise_affine=False)),
            ValueError,
            "normalized_shape must be the channels alone",
        ),
        (
            lambda: to_block_masked(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
            TypeError,
            "ParametrizedConv2d, which has no block-masked kind",
        ),
    ],
)
def test_modules_refuse_what_does_not_fit(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_changed_layer_is_no_container() -> None:
    """A Conv2d with an activation inside was copied as it was, and read hidden cells."""

    class Activated(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.act = nn.ReLU()

    with pytest.raises(TypeError, match="0 is a Activated, which has no block-masked kind, as Conv2d itself has"):
        to_block_masked(nn.Sequential(Activated()))


def test_norms_of_other_channels_are_refused() -> None:
    norm = to_block_masked(nn.LayerNorm(5, elementwise_affine=False))
    with block_mask(CELLS), pytest.raises(ValueError, match=r"x must be \[B, H, W, 5\], got \[2, 8, 8, 4\]"):
        norm(IMAGES.permute(0, 2, 3, 1))


def test_one_mask_may_be_entered_twice() -> None:
    """The outer exit put the mask itself back, which then stayed."""
    mask = block_mask(CELLS)
    with mask:
        with mask:
            pass
        assert block_masked.current_cells() is CELLS
    assert block_masked.current_cells() is None


# ---------------------------------------------------------------- other libraries


def sparse() -> spconv.SparseConvTensor:
    return spconv.SparseConvTensor(X, PLANE, [4, 4], 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: spconv.SparseConvTensor(X, PLANE.long(), [4, 4], 2),
            ValueError,
            "SparseConvTensor: indices must be int32",
        ),
        (lambda: spconv.SparseConvTensor(X, PLANE, [4.7, 4], 2), TypeError, "spatial_shape must be int, got 4.7"),
        (lambda: spconv.SparseConvTensor(X, PLANE, 4, 2), TypeError, "spatial_shape must be a sequence of int"),
        (lambda: spconv.SubMConv2d(4, 4, 3)(tensor()), TypeError, "SubMConv2d: input must be a SparseConvTensor"),
        (lambda: spconv.SubMConv3d(4, 4, 3)(sparse()), ValueError, "SubMConv3d: input must have 3 axes, got 2"),
        (lambda: spconv.SubMConv2d(4, 4, 2), ValueError, "SubMConv2d: kernel_size must be odd"),
        (lambda: spconv.SparseConv2d(4, 4, 3, indice_key=["a"]), TypeError, "indice_key must be a string or None"),
        (lambda: spconv.ToDense()(X), TypeError, "ToDense: input must be a SparseConvTensor"),
        (lambda: sparse_layouts.to_torchsparse(None), TypeError, "to_torchsparse: weight must be a tensor"),
        (lambda: sparse_layouts.from_torchsparse(torch.ones(27, 4, 5), 3), TypeError, "kernel_size must be a sequence"),
        (
            lambda: sparse_layouts.from_minkowski(torch.ones(27, 4, 5), (-3, -3, 3)),
            ValueError,
            "kernel_size must be one to",
        ),
        (lambda: sparse_layouts.padding_of("minkowski", (3,), 1.5), TypeError, "dilation must be int"),
        (lambda: sparse_layouts.padding_of("minkowski", (0,)), ValueError, "kernel_size must be one to three sizes"),
    ],
)
def test_names_of_other_libraries(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_whatever_makes_a_tensor_of_spconv_keeps_its_maps() -> None:
    """x + y had no indice_dict, and the next convolution fell over it."""
    x = sparse()
    y = spconv.SparseConv2d(4, 4, 3, padding=1, indice_key="down")(x + x)
    assert spconv.SparseInverseConv2d(4, 4, 3, indice_key="down")(y * 2).places is x.places
    assert spconv.SparseConvTensor.from_dense(x.dense()).indice_dict == {} and y.find_indice_pair("up") is None
    assert spconv.SparseSequential(OrderedDict(act=nn.ReLU()))(x).spatial_size == 16
