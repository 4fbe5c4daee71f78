"""Write python_tests/data/spconv_backbone.safetensors: what spconv computes with the backbone of test_spconv_compat.py.

    pip install --no-deps spconv==2.3.8 cumm pccm ccimport && pip install fire lark ninja portalocker pybind11 requests termcolor
    python scripts/store_spconv_backbone.py

One thread: spconv's sums on the CPU race. Each run draws other weights, and the test holds for any.
"""

import sys
from pathlib import Path

import spconv.pytorch as spconv
import torch
from safetensors.torch import save_file

from maskops.testing.sparse_conv import places

TESTS = Path(__file__).resolve().parents[1] / "python_tests"
sys.path.insert(0, str(TESTS))

from test_spconv_compat import SHAPE, backbone  # noqa: E402

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
coords = places(generator, 90, 2, *SHAPE)
x = torch.randn(len(coords), 4, generator=generator)
net = backbone(spconv)
for module in net.modules():
    if hasattr(module, "algo"):
        module.algo = spconv.ConvAlgo.Native  # the only one without a GPU
with torch.no_grad():
    out = net(spconv.SparseConvTensor(x, coords, SHAPE, 2))
found = {f"net.{name}": value for name, value in net.state_dict().items()}
found |= {
    "coords": coords,
    "x": x,
    "out_coords": out.indices,
    "out": out.features,
    "dense_sum": out.dense().sum((2, 3, 4)),
}
save_file(
    {name: value.contiguous().clone() for name, value in found.items()}, TESTS / "data/spconv_backbone.safetensors"
)
