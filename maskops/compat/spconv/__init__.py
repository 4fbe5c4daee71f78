"""The names of spconv 2 over maskops' sparse convolutions: `import maskops.compat.spconv as spconv` in place of `spconv.pytorch`.

Classes, argument names and the layout of the weights (KRSC: [out, *kernel_size, in]) are those of spconv, so that a backbone and
its checkpoints move without a change. Arguments that choose between spconv's own algorithms are taken and have no effect.

    import maskops.compat.spconv as spconv

    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 16, 3, bias=False, indice_key="subm1"), nn.BatchNorm1d(16), nn.ReLU(),
        spconv.SparseConv3d(16, 32, 3, stride=2, padding=1, bias=False, indice_key="down1"),
    )
    out = net(spconv.SparseConvTensor(features, indices, spatial_shape, batch_size)).dense()
"""

from maskops.compat.spconv.conv import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseInverseConv1d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
    from_krsc,
    to_krsc,
)
from maskops.compat.spconv.pool import (
    SparseAvgPool1d,
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseGlobalAvgPool,
    SparseGlobalMaxPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
)
from maskops.compat.spconv.tensor import SparseConvTensor, SparseModule, SparseSequential, ToDense

__all__ = [
    "SparseAvgPool1d",
    "SparseAvgPool2d",
    "SparseAvgPool3d",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTensor",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseGlobalAvgPool",
    "SparseGlobalMaxPool",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseMaxPool1d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SparseModule",
    "SparseSequential",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "ToDense",
    "from_krsc",
    "to_krsc",
]
