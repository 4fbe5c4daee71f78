"""maskops.compat.spconv: a backbone written for spconv gives spconv's result with one import changed.

data/spconv_backbone.safetensors holds what spconv 2.3.8 (its CPU wheel, one thread) computed with `backbone` below: input, weights
and result; scripts/store_spconv_backbone.py wrote it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import maskops.compat.spconv as spconv

STORED = load_file(Path(__file__).parent / "data/spconv_backbone.safetensors")
SHAPE = [9, 12, 11]


def backbone(spconv: Any) -> nn.Module:
    """As SECOND's and VoxelNet's middle layers: submanifold blocks, two strides, one way back."""

    def block(kind: Any, *args: Any, **kwargs: Any) -> list:
        return [kind(*args, bias=False, **kwargs), nn.BatchNorm1d(args[1]).eval(), nn.ReLU()]

    return spconv.SparseSequential(
        *block(spconv.SubMConv3d, 4, 8, 3, padding=1, indice_key="subm1"),
        *block(spconv.SubMConv3d, 8, 8, 3, padding=1, indice_key="subm1"),
        *block(spconv.SparseConv3d, 8, 16, 3, stride=2, padding=1, indice_key="down1"),
        *block(spconv.SubMConv3d, 16, 16, 3, padding=1, indice_key="subm2"),
        *block(spconv.SparseConv3d, 16, 16, (3, 1, 1), stride=(2, 1, 1), indice_key="down2"),
        *block(spconv.SparseInverseConv3d, 16, 8, (3, 1, 1), indice_key="down2"),
        *block(spconv.SparseInverseConv3d, 8, 8, 3, indice_key="down1"),
        spconv.SubMConv3d(8, 4, 3, padding=1, indice_key="subm1"),
    )


def stored_input() -> spconv.SparseConvTensor:
    return spconv.SparseConvTensor(STORED["x"], STORED["coords"], SHAPE, 2)


def test_backbone_gives_the_result_of_spconv() -> None:
    net = backbone(spconv)
    net.load_state_dict({key[4:]: value for key, value in STORED.items() if key.startswith("net.")})
    out = net(stored_input())
    assert torch.equal(out.indices, STORED["out_coords"])
    torch.testing.assert_close(out.features, STORED["out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.dense().sum((2, 3, 4)), STORED["dense_sum"], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_weight() -> None:
    net = backbone(spconv)
    net(stored_input()).features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "weight" in name)


def test_weights_move_between_layouts() -> None:
    weight = torch.randn(8, 3, 1, 2, 4)
    assert spconv.from_krsc(weight).shape == (3, 1, 2, 4, 8)
    assert torch.equal(spconv.to_krsc(spconv.from_krsc(weight)), weight)


def test_inverse_needs_its_convolution() -> None:
    x = stored_input()
    with pytest.raises(ValueError, match="indice_key must be that of an earlier convolution"):
        spconv.SparseInverseConv3d(4, 4, 3, indice_key="down")(x)
    y = spconv.SparseConv3d(4, 4, 3, stride=2, padding=1, indice_key="down")(x)
    with pytest.raises(ValueError, match="must have led to these places"):
        spconv.SparseInverseConv3d(4, 4, 5, indice_key="down")(y)
    assert spconv.SparseInverseConv3d(4, 4, 3, indice_key="down")(y).places is x.places


def test_what_is_not_known_is_refused() -> None:
    """spconv can fuse an activation into a convolution: to leave it out in silence would be another network."""
    with pytest.raises(TypeError, match="act_type"):
        spconv.SubMConv3d(4, 4, 3, act_type="relu")
    with pytest.raises(TypeError, match="strid"):
        spconv.SparseConv3d(4, 4, 3, strid=2)


def test_dense_with_channels_last() -> None:
    x = stored_input()
    assert torch.equal(x.dense(channels_first=False), x.dense().permute(0, 2, 3, 4, 1))
    assert spconv.SparseSequential(spconv.ToDense())(x).shape == (2, 4, *SHAPE)


# ---------------------------------------------------------------- pools

POOLED = [[0, 0, 0], [0, 1, 1], [0, 2, 2], [1, 0, 0], [1, 1, 1]]
ROWS = torch.tensor([[1.0, -3.0], [2.0, -2.0], [-1.0, 5.0], [4.0, 4.0], [6.0, -6.0], [3.0, 9.0]])
INDICES = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 3, 3], [0, 5, 5], [1, 1, 1], [1, 2, 2]], dtype=torch.int32)


def small() -> spconv.SparseConvTensor:
    return spconv.SparseConvTensor(ROWS, INDICES, [6, 6], 2)


def test_max_pool_has_the_places_and_the_maxima_of_spconv() -> None:
    """spconv 2.3.8 on the CPU gives these places and values, but 0 for a negative maximum: its algorithm Native starts there."""
    out = spconv.SparseMaxPool2d(2)(small())
    assert out.indices.tolist() == POOLED and out.spatial_shape == (3, 3)
    assert out.features.tolist() == [[2.0, -2.0], [-1.0, 5.0], [4.0, 4.0], [6.0, -6.0], [3.0, 9.0]]


def test_average_pool_counts_active_places() -> None:
    out = spconv.SparseAvgPool2d(2, stride=2)(small())
    assert out.features.tolist() == [[1.5, -2.5], [-1.0, 5.0], [4.0, 4.0], [6.0, -6.0], [3.0, 9.0]]


def test_global_pools() -> None:
    x = small()
    assert spconv.SparseGlobalMaxPool()(x).tolist() == [[4.0, 5.0], [6.0, 9.0]]
    assert spconv.SparseGlobalAvgPool(name="pool")(x).tolist() == [[1.5, 1.0], [4.5, 1.5]]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Max", "Avg"])
def test_arguments_and_keys_of_pools_are_those_of_spconv(kind: str, axes: int) -> None:
    pool = getattr(spconv, f"Sparse{kind}Pool{axes}d")
    made = pool(3, None, 1, 1, "pool", None, False, "name")
    assert made.stride == (3,) * axes and made.padding == (1,) * axes
    indices = torch.tensor([[0] + [1] * axes, [0] + [4] * axes], dtype=torch.int32)
    x = spconv.SparseConvTensor(torch.randn(2, 4), indices, [6] * axes, 1)
    net = spconv.SparseSequential(
        made, nn.ReLU(), getattr(spconv, f"SparseInverseConv{axes}d")(4, 2, 3, indice_key="pool")
    )
    assert net(x).indices is x.indices
    with pytest.raises(TypeError, match=f"Sparse{kind}Pool{axes}d: input must be a SparseConvTensor"):
        made(torch.ones(2, 4))
    with pytest.raises(ValueError, match="stride must be"):
        pool(3, 0)


@pytest.mark.parametrize("kind", ["SubMConv3d", "SubMConv2d", "SparseConv2d"])
def test_wrong_groups_name_the_layer_and_the_argument(kind: str) -> None:
    layer = getattr(spconv, kind)
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"^{kind}: groups must divide 4 and 8 channels, got {groups}"):
            layer(4, 8, 3, groups=groups)
    with pytest.raises(TypeError, match=f"^{kind}: groups must be"):
        layer(4, 8, 3, groups=1.5)
