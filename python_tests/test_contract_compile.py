"""Every public function under torch.compile(fullgraph=True) with dynamic shapes, torch.export, autocast and inference mode."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import maskops
from maskops import TokenSplit
from maskops._backends import PUBLIC
from maskops.ops.mask_sampling import seed_tensor

DIM = 18  # like no other size, or "duck sizing" ties the two together


def tokens(batch: int, count: int) -> tuple[Tensor, TokenSplit]:
    return torch.randn(batch, count, DIM), maskops.random_masking(batch, count, 0.75, seed=1)


def case_split(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda m: maskops.split_tokens(m, max_seqlen=m.shape[1]).ids_keep, (tokens(batch, count)[1].mask,)


def case_masking(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, seed: Tensor) -> Tensor:
        return maskops.random_masking(x.shape[0], x.shape[1], num_keep=4, seed=seed).ids_keep

    return f, (torch.randn(batch, count), seed_tensor(3, None, torch.device("cpu")))


def case_gather(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    return maskops.gather_tokens, (x.requires_grad_(), split.ids_keep)


def case_restore(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    kept, pos = maskops.gather_tokens(x, split.ids_keep), torch.randn(count, DIM).requires_grad_()
    fill = torch.randn(DIM, requires_grad=True)
    return lambda k, s, f, p: maskops.restore_tokens(k, s, f, pos=p), (kept.requires_grad_(), split, fill, pos)


def case_pack(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    return lambda x, s: maskops.pack_tokens(x, s, total=s.total), (x.requires_grad_(), split)


def case_unpack(batch: int, count: int) -> tuple[Callable, tuple]:
    x, split = tokens(batch, count)
    packed = maskops.pack_tokens(x, split).requires_grad_()
    return maskops.unpack_tokens, (packed, split, torch.randn(DIM, requires_grad=True))


def images_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16).requires_grad_()


def case_patchify(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda i, ids: maskops.patchify(i, 4, ids), (images_of(batch), tokens(batch, 16)[1].ids_keep)


def case_unpatchify(batch: int, count: int) -> tuple[Callable, tuple]:
    patches = torch.randn(batch, 4, 48, requires_grad=True)
    return lambda p, ids: maskops.unpatchify(p, 4, (16, 16), ids), (patches, tokens(batch, 16)[1].ids_keep)


def case_embed(batch: int, count: int) -> tuple[Callable, tuple]:
    weight, bias, pos = torch.randn(DIM, 3, 4, 4), torch.randn(DIM), torch.randn(16, DIM)
    leaves = [t.requires_grad_() for t in (weight, bias, pos)]
    args = (images_of(batch), *leaves, tokens(batch, 16)[1].ids_keep)
    return lambda i, w, b, p, ids: maskops.embed_patches(i, w, b, 4, ids, p), args


def case_loss(batch: int, count: int) -> tuple[Callable, tuple]:
    pred = torch.randn(batch, 16, 48, requires_grad=True)
    args = (pred, images_of(batch).detach(), tokens(batch, 16)[1])
    return lambda p, i, s: maskops.masked_patch_loss(p, i, s, 4), args


def classes_of(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = torch.randn(batch, count, DIM), torch.randn(37, DIM), torch.randn(37)
    return (*(t.requires_grad_() for t in (hidden, weight, bias)), torch.randint(37, (batch, count)))


def case_linear_cross_entropy(batch: int, count: int) -> tuple[Callable, tuple]:
    mask = torch.arange(count).expand(batch, count) % 3 == 0

    def f(h: Tensor, w: Tensor, b: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return maskops.linear_cross_entropy(h, w, t, mask=m, bias=b, label_smoothing=0.1)

    return f, (*classes_of(batch, count), mask)


def case_linear_sample(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(h: Tensor, w: Tensor, b: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        loss, sample = maskops.linear_sample(h, w, t, bias=b, seed=seed, reduction="none")
        return loss + sample * 0

    return f, (*classes_of(batch, count), seed_tensor(3, None, torch.device("cpu")))


def case_masked_regression(batch: int, count: int) -> tuple[Callable, tuple]:
    pred, mask = torch.randn(batch, count, DIM, requires_grad=True), torch.rand(batch, count) < 0.5
    return lambda p, t, m: maskops.masked_regression(p, t, m, normalise=True), (
        pred,
        torch.randn(batch, count, DIM),
        mask,
    )


def case_contrastive_loss(batch: int, count: int) -> tuple[Callable, tuple]:
    query, keys = torch.randn(batch, DIM, requires_grad=True), torch.randn(count, DIM, requires_grad=True)
    positives, negatives = torch.randint(count, (batch,)), torch.randint(count, (batch, 3))
    return lambda q, k, p, n: maskops.contrastive_loss(q, k, p, n), (query, keys, positives, negatives)


def case_linear_max_pool(batch: int, count: int) -> tuple[Callable, tuple]:
    hidden, weight, bias, _ = classes_of(batch, count)
    return maskops.linear_max_pool, (hidden, weight, bias, torch.arange(count).expand(batch, count) % 3 == 0)


def case_nm_mask(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda s: maskops.nm_mask(s, 2, 4), (torch.randn(batch, count),)


def nm_weight(count: int) -> Tensor:
    weight = torch.randn(DIM, count)
    return torch.where(maskops.nm_mask(weight.abs(), 2, 4), weight, 0)


def case_nm_compress(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda w: maskops.nm_compress(w, 2, 4).values, (nm_weight(count).requires_grad_(),)


def case_nm_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    weight, x = maskops.nm_compress(nm_weight(count), 2, 4), torch.randn(batch, count, requires_grad=True)

    def f(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
        return maskops.nm_linear(x, maskops.NMWeight(values, indices, 2, 4, x.shape[1]), bias)

    return f, (x, weight.values.requires_grad_(), weight.indices, torch.randn(DIM, requires_grad=True))


def case_pack_bitmask(batch: int, count: int) -> tuple[Callable, tuple]:
    return maskops.pack_bitmask, (torch.rand(batch, count) < 0.5,)


def case_bitmask_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    bitmask = maskops.pack_bitmask(torch.rand(batch, DIM, count) < 0.5)
    leaves = torch.randn(batch, 5, count), torch.randn(DIM, count), torch.randn(DIM), torch.zeros(DIM, count)
    x, weight, bias, scores = (t.requires_grad_() for t in leaves)
    return lambda x, w, m, b, s: maskops.bitmask_linear(x, w, m, b, scores=s), (x, weight, bitmask, bias, scores)


def case_nm_soft_linear(batch: int, count: int) -> tuple[Callable, tuple]:
    # One row more, or the first batch is tied to the 6 patterns.
    x, logits = torch.randn(batch + 1, count, requires_grad=True), torch.randn(DIM, count // 4, 6, requires_grad=True)

    def f(x: Tensor, weight: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        y, kept = maskops.nm_soft_linear(x, weight, logits, 2, 4, tau=0.5, seed=seed)
        return y + kept.to(y.dtype)

    return f, (x, torch.randn(DIM, count), logits, seed_tensor(3, None, torch.device("cpu")))


def case_masked_attention(batch: int, count: int) -> tuple[Callable, tuple]:
    found = maskops.AttentionMask.key_padding(torch.full((batch,), count - 1)).compile(count, count)

    def f(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor) -> Tensor:
        return maskops.masked_attention(q, k, v, maskops.BlockMap(tiles, words, q.shape[2], k.shape[2]))

    return f, (*(torch.randn(batch, 3, count, 4, requires_grad=True) for _ in range(3)), found.tiles, found.words)


def places(batch: int, count: int) -> Tensor:
    """int32 [batch * count, 2]: every other place of a line."""
    at = torch.arange(count).repeat(batch) * 2
    return torch.stack([torch.arange(batch).repeat_interleave(count), at + at // 3], 1).int()


def case_kernel_map(batch: int, count: int) -> tuple[Callable, tuple]:
    return lambda coords: maskops.kernel_map(coords, 3).map, (places(batch, count),)


def case_sparse_conv(batch: int, count: int) -> tuple[Callable, tuple]:
    def f(x: Tensor, weight: Tensor, bias: Tensor, coords: Tensor) -> Tensor:
        return maskops.sparse_conv(x, weight, maskops.kernel_map(coords, 3), bias)

    leaves = torch.randn(batch * count, 4), torch.randn(3, 4, DIM), torch.randn(DIM)
    return f, (*(t.requires_grad_() for t in leaves), places(batch, count))


CASES = {
    "split_tokens": case_split, "random_masking": case_masking, "gather_tokens": case_gather, "restore_tokens": case_restore,
    "pack_tokens": case_pack, "unpack_tokens": case_unpack, "patchify": case_patchify, "unpatchify": case_unpatchify,
    "embed_patches": case_embed, "masked_patch_loss": case_loss,
    "linear_cross_entropy": case_linear_cross_entropy, "linear_sample": case_linear_sample,
    "masked_regression": case_masked_regression, "contrastive_loss": case_contrastive_loss,
    "linear_max_pool": case_linear_max_pool,
    "nm_mask": case_nm_mask, "nm_compress": case_nm_compress,
    "nm_linear": case_nm_linear, "pack_bitmask": case_pack_bitmask, "bitmask_linear": case_bitmask_linear,
    "nm_soft_linear": case_nm_soft_linear, "masked_attention": case_masked_attention, "kernel_map": case_kernel_map,
    "sparse_conv": case_sparse_conv,
}  # fmt: skip


def test_every_public_function_has_a_case() -> None:
    assert set(CASES) == set(PUBLIC)


def leaves_of(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph_for_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    function = CASES[name](2, 16)[0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for batch, count in ((6, 16), (7, 24), (5, 40)):
        args = CASES[name](batch, count)[1]
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
    function, args = case_restore(2, 16)
    compiled = torch.compile(lambda *a: function(*a).relu() * 2, fullgraph=True)
    assert torch.allclose(compiled(*args), function(*args).relu() * 2)


@pytest.mark.parametrize("name", CASES)
def test_exports(name: str) -> None:
    function, args = CASES[name](2, 16)

    class Module(torch.nn.Module):
        def forward(self, *inputs: object) -> Tensor:
            return function(*inputs)

    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    program = torch.export.export(Module(), args)
    assert torch.equal(program.module()(*args), function(*args))
    assert any("maskops" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_inference_mode_and_no_grad_agree(name: str) -> None:
    function, args = CASES[name](2, 16)
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


AUTOCAST = {
    "gather_tokens": torch.float32, "restore_tokens": torch.float32, "pack_tokens": torch.float32,
    "unpack_tokens": torch.float32, "patchify": torch.float32, "unpatchify": torch.float32, "embed_patches": torch.bfloat16,
    "masked_patch_loss": torch.float32, "linear_cross_entropy": torch.float32,
    "masked_regression": torch.float32, "contrastive_loss": torch.float32, "linear_max_pool": torch.float32,
    "nm_linear": torch.bfloat16, "bitmask_linear": torch.bfloat16,
    "nm_soft_linear": torch.bfloat16, "sparse_conv": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_dtype(name: str) -> None:
    """float32 inputs: only products with a weight are lowered, as torch lowers a convolution; gradients come back in float32."""
    function, args = CASES[name](2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*args)
    assert out.dtype == AUTOCAST[name]
    leaves = leaves_of(args)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves, strict=True))


def test_autocast_promotes_a_lowered_input() -> None:
    """The decoder's input under autocast: kept tokens come out of a linear layer in bfloat16, token and pos are parameters."""
    function, (kept, split, fill, pos) = case_restore(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(kept.bfloat16(), split, fill, pos)
    assert out.dtype == torch.float32
    expected = function(kept.bfloat16().float(), split, fill, pos)
    assert torch.equal(out, expected)


def test_loss_takes_lowered_predictions_and_float_images() -> None:
    pred, images, split = case_loss(2, 16)[1]
    loss = maskops.masked_patch_loss(pred.bfloat16(), images, split, 4)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, pred)[0].dtype == torch.float32
