"""Rivals of sparse_conv: spconv's CPU backend, where it is installed, and plain PyTorch, one kernel place after the other.

spconv 2.3.8 adds with a race on the CPU: with two threads some rows are wrong, and others on each run (2 to 7% RMS). It is compared
with one thread, where it agrees, and timed with as many as ours. How it is installed: scripts/store_spconv_backbone.py.
"""

from typing import Any

import _block_masked
import torch
from _harness import RIVAL_RMS, Case, Inputs, Timer, interleaved, quantiles
from torch import Tensor

import maskops
from maskops.testing.sparse_conv import lidar_like

try:
    import spconv.pytorch as spconv
except ImportError as reason:
    spconv, WHY_NOT = None, f"spconv is not installed: {reason}"

SPCONV, PLAIN = "spconv", "PyTorch, place by place"
SHAPE = (41, 640, 640)
# places, spread, channels: 16, 16 and 11 neighbours of a place, as in scans of near and far surroundings
SCANS = ((35575, 0.33, 64), (35575, 0.33, 32), (156054, 0.435, 64))


def ours(x: Tensor, weight: Tensor, map: maskops.KernelMap, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.sparse_conv(x, weight, map, backend=backend)


def ours_with_map(x: Tensor, weight: Tensor, coords: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.sparse_conv(x, weight, maskops.kernel_map(coords, 3), backend=backend)


def plain(x: Tensor, weight: Tensor, pairs: list[tuple[Tensor, Tensor]], **_: Any) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for w, (rows, targets) in zip(weight, pairs, strict=True):
        out = out.index_add(0, targets, x.index_select(0, rows) @ w)
    return out


def theirs(x: Tensor, layer: Any, with_map: Any, **_: Any) -> Tensor:
    return layer(with_map.replace_feature(x)).features


def theirs_with_map(x: Tensor, layer: Any, coords: Tensor, **_: Any) -> Tensor:
    return layer(spconv.SparseConvTensor(x, coords, list(SHAPE), 1)).features


def make(places: int, spread: float, channels: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        coords = lidar_like(places, spread, SHAPE, seed).to(device)
        x = torch.randn(len(coords), channels, generator=g).to(device, dtype)
        weight = (torch.randn(27, channels, channels, generator=g) / (27 * channels) ** 0.5).to(device, dtype)
        found = maskops.kernel_map(coords, 3)
        rows = [torch.nonzero(row >= 0)[:, 0] for row in found.map]
        pairs = [(row[m].long(), m) for row, m in zip(found.map, rows, strict=True)]
        made: Inputs = {"x": x, "weight": weight, "coords": coords, "map": found, "pairs": pairs}
        made["grad_out"] = torch.randn(len(coords), channels, generator=g).to(device, dtype)
        if spconv is not None and dtype == torch.float32 and device.type == "cpu":
            layer = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="all", algo=spconv.ConvAlgo.Native)
            layer.weight.data = weight.view(3, 3, 3, channels, channels).permute(4, 0, 1, 2, 3).contiguous()
            layer.requires_grad_(False)
            made |= {"layer": layer, "with_map": layer(spconv.SparseConvTensor(x, coords, list(SHAPE), 1))}
        return made

    return inputs


def gate(made: Inputs) -> None:
    """Ours against float64; spconv with one thread."""
    exact = {name: value.double() if name in ("x", "weight") else value for name, value in made.items()}
    expected = plain(**exact)
    limit = RIVAL_RMS[made["x"].dtype] * expected.square().mean().sqrt()
    results = {"ours": ours(**made), "ours, with the map": ours_with_map(**made)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "layer" in made:
        results |= {SPCONV: theirs(**made), f"{SPCONV}, with the map": theirs_with_map(**made)}
    torch.set_num_threads(threads)
    for name, result in results.items():
        off = (result.double() - expected).square().mean().sqrt()
        assert off <= limit, f"{name}: off by {off:.2e} (RMS)"


def flops(inputs: Inputs) -> int:
    return 2 * inputs["map"].pairs() * inputs["weight"].shape[1] * inputs["weight"].shape[2]


def share_of_forward(made: Inputs) -> dict[str, Any]:
    """The time of forward and backward over that of the forward pass, which is asked to be at most 3.2."""
    x, weight = (made[name].detach().requires_grad_() for name in ("x", "weight"))

    def both(_: Inputs) -> None:
        torch.autograd.grad(ours(x, weight, made["map"]), [x, weight], made["grad_out"])

    calls = {"forward": lambda _: ours(x.detach(), weight.detach(), made["map"]), "both": both}
    times, _ = interleaved(calls, [made], Timer(x.device), 5, 5, 20)
    return {"of_forward": quantiles(times["both"])[1] / quantiles(times["forward"])[1]}


# ---------------------------------------------------------------- points to voxels

RANGE, VOXEL = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0), (0.05, 0.05, 0.1)


def make_points(points: int) -> Any:
    """Points of a scan, around the ground and near the sensor as LiDAR has them; a tenth lies out of range."""

    def inputs(device: torch.device, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        distance, angle = 75 * torch.rand(points, generator=g) ** 2 + 2, (torch.rand(points, generator=g) - 0.5) * 2.4
        height = -1.7 + 0.6 * torch.randn(points, generator=g).abs()
        found = torch.stack(
            [distance * angle.cos(), distance * angle.sin(), height, torch.rand(points, generator=g)], 1
        )
        made: Inputs = {"points": found.to(device)}
        if spconv is not None and device.type == "cpu":
            from spconv.pytorch.utils import PointToVoxel

            made["to_voxels"] = PointToVoxel(VOXEL, RANGE, 4, points, 5, device=device)
        return made

    return inputs


def voxels(points: Tensor, backend: str = "auto", **_: Any) -> Tensor:
    return maskops.voxelize(points, VOXEL, RANGE, max_points=5, backend=backend).tensor.features


def voxels_of_spconv(points: Tensor, to_voxels: Any, **_: Any) -> Tensor:
    rows, _, count = to_voxels(points)
    return rows.sum(1) / count[:, None]


def gate_voxels(made: Inputs) -> None:
    """As many voxels, and the same rows, but for points at an edge, which spconv divides in float32."""
    own = voxels(**made)
    if "to_voxels" in made:
        other = voxels_of_spconv(**made)
        assert abs(len(own) - len(other)) <= 1e-3 * len(own), f"{len(own)} voxels, spconv has {len(other)}"
        torch.testing.assert_close(own.mean(0), other.mean(0), rtol=1e-3, atol=1e-3)


def voxel_cases() -> list[Case]:
    rivals = {SPCONV: voxels_of_spconv} if spconv is not None else {}
    absent = {} if spconv is not None else {SPCONV: WHY_NOT}
    common = {
        "dtype": torch.float32, "work": lambda made: 2 * made["points"].numel() * 4, "kind": "bytes", "sets": "one", "rounds": 20,
    }  # fmt: skip
    return [
        Case(
            f"voxelize, {count} points, mean of at most 5", "fwd", make=make_points(count), ours=voxels, rivals=rivals,
            absent=absent, gate=gate_voxels, quick=count < 100000, **common,
        )
        for count in (20000, 200000)
    ]  # fmt: skip


def cases() -> list[Case]:
    absent = {} if spconv is not None else {SPCONV: WHY_NOT}
    out = []
    for scan in SCANS:
        for dtype in (torch.float32, torch.bfloat16):
            full = dtype == torch.float32
            name = f"SubMConv3d, {scan[0]} places, {scan[2]} channels"
            rivals = {SPCONV: theirs} if full and spconv is not None else {}
            common = {
                "dtype": dtype,
                "make": make(*scan, dtype),
                "work": flops,
                "kind": "flops",
                "sets": "one",
                "rounds": 20,
            }
            common |= {"quick": full and scan is SCANS[1], "absent": absent, "gate": gate}
            asked = {SPCONV: 3.0} if full else {}
            out.append(
                Case(f"{name}, map reused", "fwd", ours=ours, rivals=rivals | {PLAIN: plain}, asked=asked, **common)
            )
            if full:
                rivals = {SPCONV: theirs_with_map} if rivals else {}
                out.append(
                    Case(
                        f"{name}, with the map", "fwd", ours=ours_with_map, rivals=rivals, asked={SPCONV: 4.0}, **common
                    )
                )
            common |= {"work": lambda made: 3 * flops(made), "gate": None, "absent": {}, "grads": ("x", "weight")}
            both = Case(
                f"{name}, map reused", "fwd+bwd", ours=ours, rivals={PLAIN: plain}, after=share_of_forward, **common
            )
            out.append(both)
    return out + voxel_cases() + _block_masked.cases()
