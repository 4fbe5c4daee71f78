"""Block-masked layers: dense-then-multiply as the oracle, norms of active positions, converted networks, processes."""

import copy
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops.models.cnn import ConvNeXt, Permute, ResNet
from maskops.nn import MaskedBatchNorm2d, block_mask, to_block_masked
from maskops.reference.sparse_conv_block import position_mask
from maskops.testing import instruction_set, instruction_sets

CELLS = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 0], [0, 1, 0]]], dtype=torch.bool)


def times_mask(x: Tensor, cells: Tensor = CELLS) -> Tensor:
    return x * position_mask(cells, *x.shape[2:])


def grads(function: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), leaves)


def assert_all_close(found: tuple, expected: tuple) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("kernel", range(1, 8))
def test_conv_equals_dense_then_multiply(kernel: int, groups: int) -> None:
    for stride, own in itertools.product((1, 2), (2, 4) if kernel != 3 else (2, 4, 8)):
        padding = (kernel - 1) // 2
        if (2 * own + 2 * padding - kernel) // stride + 1 != 2 * own // stride:
            continue  # an even kernel that does not give H / stride positions
        x = torch.randn(2, 12, 2 * own, 3 * own, dtype=torch.float64)
        weight, bias = (
            torch.randn(12, 12 // groups, kernel, kernel, dtype=torch.float64),
            torch.randn(12, dtype=torch.float64),
        )

        def ours(x: Tensor, w: Tensor, b: Tensor, stride: int = stride, padding: int = padding) -> Tensor:
            return maskops.block_masked_conv(x, w, CELLS, b, stride=stride, padding=padding, groups=groups)

        def dense(x: Tensor, w: Tensor, b: Tensor, stride: int = stride, padding: int = padding) -> Tensor:
            return times_mask(F.conv2d(times_mask(x), w, b, stride, padding, 1, groups))

        assert_all_close(grads(ours, x, weight, bias), grads(dense, x, weight, bias))


@pytest.mark.parametrize("kernel,stride,padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (7, 1, 3)])
def test_max_pool_equals_dense_then_multiply(kernel: int, stride: int, padding: int) -> None:
    x = torch.randn(2, 5, 8, 12, dtype=torch.float64)
    found = grads(lambda x: maskops.block_masked_max_pool(x, CELLS, kernel, stride=stride, padding=padding), x)
    assert_all_close(found, grads(lambda x: times_mask(F.max_pool2d(times_mask(x), kernel, stride, padding)), x))


def active_rows(x: Tensor, cells: Tensor = CELLS) -> Tensor:
    """[n, C]"""
    return x.permute(0, 2, 3, 1)[position_mask(cells, *x.shape[2:])[:, 0]]


def test_norms_equal_those_of_the_active_rows_alone() -> None:
    x, weight, bias = torch.randn(2, 6, 4, 6).double() + 3, torch.randn(6).double(), torch.randn(6).double()
    norms = {
        "batch": (
            lambda x, w, b: maskops.masked_batch_norm(x, CELLS, None, None, w, b, training=True),
            lambda rows, w, b: F.batch_norm(rows, None, None, w, b, training=True),
        ),
        "layer": (
            lambda x, w, b: maskops.masked_layer_norm(x, CELLS, w, b, eps=1e-6),
            lambda rows, w, b: F.layer_norm(rows, (6,), w, b, 1e-6),
        ),
    }
    for ours, plain in norms.values():
        spread = torch.linspace(-1, 1, x.numel()).view(x.shape)
        found = grads(ours, x, weight, bias)
        leaves = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
        rows = plain(active_rows(leaves[0]), *leaves[1:])
        expected = torch.autograd.grad((rows * active_rows(spread)).sum(), leaves)
        torch.testing.assert_close(active_rows(found[0]), rows.detach())
        assert torch.equal(found[0], times_mask(found[0]))
        assert_all_close(found[1:], expected)
    for i in range(2):
        own = x[i : i + 1], CELLS[i : i + 1]
        rows = active_rows(*own).T[None]
        group = active_rows(maskops.masked_group_norm(x, CELLS, 2, weight, bias)[i : i + 1], own[1])
        torch.testing.assert_close(group.T[None], F.group_norm(rows, 2, weight, bias))
        instance = active_rows(maskops.masked_instance_norm(x, CELLS, weight, bias)[i : i + 1], own[1])
        torch.testing.assert_close(instance.T[None], F.instance_norm(rows, None, None, weight, bias))


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "layer"])
def test_gradients_of_norms_by_finite_differences(norm: str) -> None:
    """The contract's check cannot: the op takes the statistics that its gradient goes through."""
    calls = {
        "batch": lambda x, w, b: maskops.masked_batch_norm(x, CELLS, None, None, w, b, training=True),
        "group": lambda x, w, b: maskops.masked_group_norm(x, CELLS, 2, w, b),
        "instance": lambda x, w, b: maskops.masked_instance_norm(x, CELLS, w, b),
        "layer": lambda x, w, b: maskops.masked_layer_norm(x, CELLS, w, b),
    }
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 4, 3), (4,), (4,))]
    assert torch.autograd.gradcheck(calls[norm], leaves, fast_mode=True)


def test_running_statistics_are_of_active_positions() -> None:
    x, layer = torch.randn(2, 5, 4, 6) + 2, MaskedBatchNorm2d(5, momentum=1.0)
    poisoned = torch.where(position_mask(CELLS, 4, 6), x, torch.nan)
    with block_mask(CELLS):
        layer(poisoned)
    rows = active_rows(x)
    torch.testing.assert_close(layer.running_mean, rows.mean(0))
    torch.testing.assert_close(layer.running_var, rows.var(0))
    assert (layer.running_mean - x.mean((0, 2, 3))).abs().max() > 0.02  # a dense one would have those
    before = layer.running_mean.clone()
    with block_mask(torch.zeros_like(CELLS)):
        assert layer(poisoned).abs().max() == 0
    assert torch.equal(layer.running_mean, before)


ONE_PROCESS = """
import sys
import torch
from maskops.nn import SyncedBatchNorm2d, block_mask

torch.set_num_threads(1)
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
x, cells = torch.load(f"{folder}/inputs.pt")
layer, own = SyncedBatchNorm2d(x.shape[1]).double(), x[rank : rank + 1].clone().requires_grad_()
with block_mask(cells[rank : rank + 1]):
    out = layer(own)
grad = torch.autograd.grad(out.pow(3).sum(), own)[0]
torch.save((out.detach(), grad, layer.running_mean, layer.running_var), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_weigh_active_positions_alike(tmp_path: Path) -> None:
    """One process has four active cells, the other one."""
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    layer, whole = MaskedBatchNorm2d(5).double(), x.clone().requires_grad_()
    with block_mask(CELLS):
        out = layer(whole)
    expected = out.detach(), torch.autograd.grad(out.pow(3).sum(), whole)[0]
    torch.save((x, CELLS), tmp_path / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-P", "-c", ONE_PROCESS]
    processes = [subprocess.Popen([*command, str(rank), port, str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i in range(2):
        torch.testing.assert_close(torch.cat([f[i] for f in found]), expected[i])
    for own in found:
        torch.testing.assert_close(own[2:], (layer.running_mean, layer.running_var))


# ---------------------------------------------------------------- networks

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet((1, 2), width=8, num_classes=0),
    "convnext": lambda: ConvNeXt((1, 1), (8, 16), num_classes=0),
    "others": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.GroupNorm(2, 8), nn.SiLU(), nn.AvgPool2d(2), nn.InstanceNorm2d(8, affine=True),
        nn.Conv2d(8, 8, 5, 2, 2, groups=8), nn.LeakyReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_converted_network_equals_dense_then_multiply(name: str) -> None:
    torch.manual_seed(0)
    cnn = NETS[name]().double().eval()
    for module in cnn.modules():  # layer scale and new norms would hide a mistake
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3)
    net = to_block_masked(cnn, keep=(Permute,))
    assert list(net.state_dict()) == list(cnn.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), cnn.parameters(), strict=True))
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(net(x), cnn(x))  # outside of a mask it is the network
    spatial = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.GroupNorm, nn.InstanceNorm2d)
    oracle = copy.deepcopy(cnn)  # hooks, as all else, would be shared
    for module in oracle.modules():
        if isinstance(module, spatial):
            module.register_forward_pre_hook(lambda _m, args: (times_mask(args[0]),))
            module.register_forward_hook(lambda _m, _i, out: times_mask(out))
    with block_mask(CELLS):
        found = net(torch.where(position_mask(CELLS, 32, 48), x, torch.nan))
    if name == "others":  # norms per sample have statistics of their own, tested above
        assert found.isfinite().all() and found.shape == (2, 8, 4, 6)
    else:
        torch.testing.assert_close(times_mask(found), times_mask(oracle(x)))


def test_mask_is_of_the_thread_and_of_the_block() -> None:
    net = to_block_masked(nn.Conv2d(1, 1, 1, bias=False))
    x, seen = torch.ones(2, 1, 4, 6), {}

    def run(name: str, cells: Tensor, barrier: threading.Barrier) -> None:
        with block_mask(cells):
            barrier.wait()
            with block_mask(None):
                pass
            seen[name] = net(x).detach() != 0
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(*job, barrier)) for job in (("a", CELLS), ("b", ~CELLS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(seen["a"], position_mask(CELLS, 4, 6)) and torch.equal(seen["b"], ~position_mask(CELLS, 4, 6))
    with pytest.raises(ZeroDivisionError), block_mask(CELLS):
        raise ZeroDivisionError
    assert (net(x) != 0).all()


def test_network_compiles_whole_and_trains_shared_weights() -> None:
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    net = to_block_masked(cnn)

    def run(x: Tensor, cells: Tensor) -> Tensor:
        with block_mask(cells):
            return net(x)

    x = torch.randn(2, 3, 8, 12)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, CELLS), run(x, CELLS))
    run(x, CELLS).square().sum().backward()
    assert cnn[0].weight.grad.abs().sum() > 0 and cnn[1].num_batches_tracked == 3


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(3, 3, 3, dilation=2), ValueError, r"to_block_masked: 0\.0: dilation must be \(1, 1\), got \(2, 2\)"),
        (nn.Conv2d(3, 3, 9), ValueError, r"0\.0: kernel_size must be at most 7, got \(9, 9\)"),
        (nn.Conv2d(3, 3, 3, padding_mode="reflect"), ValueError, r"0\.0: padding_mode must be zeros, got reflect"),
        (nn.MaxPool2d(2, ceil_mode=True), ValueError, r"0\.0: ceil_mode must be False, got True"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), ValueError, r"0\.0: count_include_pad must be True, got False"),
        (nn.ConvTranspose2d(3, 3, 2), TypeError, r"0\.0 is a ConvTranspose2d, which has no block-masked kind"),
        (nn.AdaptiveAvgPool2d(1), TypeError, r"0\.0 is a AdaptiveAvgPool2d"),
    ],
)  # fmt: skip
def test_layers_without_a_masked_kind_are_named(layer: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        to_block_masked(nn.Sequential(nn.Sequential(layer)))


def test_errors_name_the_argument() -> None:
    x, weight = torch.zeros(2, 3, 4, 6), torch.zeros(4, 3, 3, 3)
    with pytest.raises(TypeError, match="block_masked_conv: cells must be a tensor, got list"):
        maskops.block_masked_conv(x, weight, [True])
    with pytest.raises(TypeError, match=r"block_masked_conv: stride must be int, got 1\.5"):
        maskops.block_masked_conv(x, weight, CELLS, stride=1.5)
    with pytest.raises(ValueError, match=r"stride must be one or two numbers, got \[1, 1, 1\]"):
        maskops.block_masked_conv(x, weight, CELLS, stride=[1, 1, 1])
    with pytest.raises(ValueError, match="masked_group_norm: num_groups must divide 3 channels, got 2"):
        maskops.masked_group_norm(x, CELLS, 2)
    with pytest.raises(ValueError, match=r"masked_batch_norm: momentum must be in \[0, 1\], got 2"):
        maskops.masked_batch_norm(x, CELLS, None, None, training=True, momentum=2)
    with pytest.raises(ValueError, match="running_mean and running_var must both be given unless training"):
        maskops.masked_batch_norm(x, CELLS, None, None)
    with pytest.raises(ValueError, match="running_var must have shape"):
        maskops.masked_batch_norm(x, CELLS, torch.zeros(3), torch.zeros(4), training=True)
    with pytest.raises(ValueError, match=r"masked_layer_norm: eps must be at least 0 and finite, got -1"):
        maskops.masked_layer_norm(x, CELLS, eps=-1)
    with pytest.raises(ValueError, match=r"process_group must be None without torch\.distributed"):
        maskops.masked_batch_norm(x, CELLS, None, None, training=True, process_group=True)
    with pytest.raises(TypeError, match="block_mask: cells must be a tensor or None, got str"):
        block_mask("x")


def test_zeros_of_large_images_pass_the_caches_and_fill_their_cells() -> None:
    """Runs of 40 positions of 5 channels begin and end anywhere in a line of the cache."""
    g = torch.Generator().manual_seed(0)
    x, cells = torch.randn(2, 5, 480, 360, generator=g), torch.rand(2, 6, 9, generator=g) < 0.4
    weight = torch.randn(5, 5, 1, 1, generator=g)
    out = maskops.block_masked_conv(x, weight, cells)
    mask = cells.repeat_interleave(80, 1).repeat_interleave(40, 2)[:, None]
    torch.testing.assert_close(out, torch.conv2d(x, weight).masked_fill(~mask, 0.0))
    assert not out.masked_select(~mask).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_weight_over_several_tiles(dtype: torch.dtype) -> None:
    """More rows and channels than are multiplied at a time, on every instruction set."""
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, C, 24, 24, generator=g).to(dtype) for C in (80, 70))
    cells = torch.rand(1, 3, 3, generator=g) < 0.7
    args = (cells, [3, 3], [1, 1], [1, 1], 1)
    exact = torch.ops.maskops_reference._sparse_conv_block_grad_weight(grad.double(), x.double(), *args)
    for name in instruction_sets():
        with instruction_set(name):
            found = torch.ops.maskops._sparse_conv_block_grad_weight(grad, x, *args)
        for own, true in zip(found, exact, strict=True):
            assert (own.double() - true).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-3) * true.abs().max(), (
                name
            )
