"""Every public function under torch.compile(fullgraph=True) with dynamic shapes, torch.export, autocast and inference mode."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import maskops
from maskops._backends import PUBLIC
from maskops.testing.calls import AUTOCAST, CALLS


def test_every_public_function_has_a_case() -> None:
    assert set(CALLS) == set(PUBLIC)


def leaves_of(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph_for_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    function = CALLS[name](2, 16)[0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for batch, count in ((6, 16), (7, 24), (5, 40)):
        args = CALLS[name](batch, count)[1]
        expected, actual = function(*args), compiled(*args)
        assert torch.equal(actual, expected)
        leaves = leaves_of(args)
        if leaves:
            wanted = torch.autograd.grad(expected.square().sum(), leaves)
            found = torch.autograd.grad(actual.square().sum(), leaves)
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, wanted, strict=True))
        # The first call may compile twice (a float argument becomes a constant); no later one may compile at all.
        compiled_once = counter.frame_count if compiled_once is None else compiled_once
        assert counter.frame_count == compiled_once, "a new size compiled again"


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    function, args = CALLS["restore_tokens"](2, 16)
    compiled = torch.compile(lambda *a: function(*a).relu() * 2, fullgraph=True)
    assert torch.allclose(compiled(*args), function(*args).relu() * 2)


@pytest.mark.parametrize("name", CALLS)
def test_exports(name: str) -> None:
    function, args = CALLS[name](2, 16)

    class Module(torch.nn.Module):
        def forward(self, *inputs: object) -> Tensor:
            return function(*inputs)

    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    program = torch.export.export(Module(), args)
    assert torch.equal(program.module()(*args), function(*args))
    assert any("maskops" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_and_no_grad_agree(name: str) -> None:
    function, args = CALLS[name](2, 16)
    expected = function(*args)
    with torch.inference_mode():
        assert torch.equal(function(*args), expected)


def test_compiled_program_draws_fresh_masks() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(seed: Tensor) -> Tensor:
        return maskops.random_masking(2, 64, 0.5, seed=seed).ids_keep

    first, second, again = (draw(torch.tensor(value)) for value in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_dtype(name: str) -> None:
    """float32 inputs: only products with a weight are lowered, as torch lowers a convolution; gradients come back in float32."""
    function, args = CALLS[name](2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*args)
    assert out.dtype == AUTOCAST[name]
    leaves = leaves_of(args)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves, strict=True))


def test_autocast_promotes_a_lowered_input() -> None:
    """The decoder's input under autocast: kept tokens come out of a linear layer in bfloat16, token and pos are parameters."""
    function, (kept, split, fill, pos) = CALLS["restore_tokens"](2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(kept.bfloat16(), split, fill, pos)
    assert out.dtype == torch.float32
    expected = function(kept.bfloat16().float(), split, fill, pos)
    assert torch.equal(out, expected)


def test_loss_takes_lowered_predictions_and_float_images() -> None:
    pred, images, split = CALLS["masked_patch_loss"](2, 16)[1]
    loss = maskops.masked_patch_loss(pred.bfloat16(), images, split, 4)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, pred)[0].dtype == torch.float32
