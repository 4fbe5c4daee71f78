"""What is special to masked_attention: parity with SDPA, rules of masks, nothing leaks, merging, packing, changing lengths."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import AttentionMask
from maskops.nn import MaskedAttention
from maskops.testing.masked_attention import MASKS, B, H, L, S


def tensors(*shapes: tuple[int, ...], seed: int = 0, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).requires_grad_(grad) for shape in shapes]


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("name", [n for n in MASKS if n not in ("dense", "no_keys")])
def test_equals_sdpa(name: str) -> None:
    mask = MASKS[name](torch.Generator().manual_seed(1))
    q, k, v = tensors((B, H, L, 32), (B, H, S, 32), (B, H, S, 32), grad=True)
    seen = mask.to_dense(L, S).expand(B, H, L, S)
    ours = maskops.masked_attention(q, k, v, mask)
    theirs = torch.where(seen.any(3, keepdim=True), F.scaled_dot_product_attention(q, k, v, attn_mask=seen), 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grad = tensors(ours.shape, seed=2)[0] * seen.any(3, keepdim=True)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, torch.nan_to_num(b), rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing() -> None:
    q, k, v = tensors((1, 1, 2, 8), (1, 1, 3, 8), (1, 1, 3, 8), grad=True)
    mask = AttentionMask.dense(torch.tensor([[False] * 3, [True] * 3]))
    out, lse = maskops.masked_attention(q, k, v, mask, return_lse=True)
    assert torch.equal(out[0, 0, 0], torch.zeros(8)) and lse[0, 0, 0] == -math.inf
    grads = torch.autograd.grad(out.sum() + lse[0, 0, 1], (q, k, v))
    assert all(g.isfinite().all() for g in grads) and torch.equal(grads[0][0, 0, 0], torch.zeros(8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_values_reach_nothing_and_seen_ones_do(bad: float) -> None:
    """Keys from 70 on are hidden from all but the last query, and the queries from 75 to 78 see nothing."""
    q, k, v = tensors((1, 2, 80, 16), (1, 2, 80, 16), (1, 2, 80, 16))
    seen = torch.ones(80, 80, dtype=torch.bool).tril()
    seen[:79, 70:], seen[75:79] = False, False
    mask = AttentionMask.dense(seen)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    spoilt = [x.clone() for x in (q, k, v)]
    spoilt[0][:, :, 75:79], spoilt[1][:, :, 70:], spoilt[2][:, :, 70:] = bad, bad, bad
    spoilt = [x.requires_grad_() for x in spoilt]
    outs = [maskops.masked_attention(*x, mask) for x in (clean, spoilt)]
    assert torch.equal(outs[0][:, :, :79], outs[1][:, :, :79])
    assert outs[1][:, :, 79].isnan().all()
    hidden = AttentionMask.dense(seen & (torch.arange(80)[:, None] < 79))
    grads = [torch.autograd.grad(maskops.masked_attention(*x, hidden).sum(), x) for x in (clean, spoilt)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_merged_halves_are_the_whole_with_gradients() -> None:
    q, k, v = tensors((1, 2, 70, 16), (1, 2, 90, 16), (1, 2, 90, 16), grad=True)
    halves = [
        maskops.masked_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 40), slice(40, 90))
    ]
    out, lse = maskops.merge_attention(*halves[0], *halves[1])
    whole, whole_lse = maskops.masked_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v)),
        torch.autograd.grad(whole.sin().sum() + whole_lse.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_packed_layout_is_each_document_by_itself() -> None:
    lengths = [30, 1, 77]
    cu = torch.tensor([0, 30, 31, 108])
    q, k, v = tensors((108, 4, 16), (108, 2, 16), (108, 2, 16))
    out = maskops.masked_attention(q, k, v, AttentionMask.packed(cu), enable_gqa=True)
    for i, n in enumerate(lengths):
        rows = slice(int(cu[i]), int(cu[i]) + n)
        alone = F.scaled_dot_product_attention(*(x[rows].transpose(0, 1) for x in (q, k, v)), enable_gqa=True)
        torch.testing.assert_close(out[rows].transpose(0, 1), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    q, k, v = tensors((1, 2, 300, 24), (1, 1, 290, 24), (1, 1, 290, 24), grad=True)
    mask = AttentionMask.window(100, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out = maskops.masked_attention(q, k, v, mask, enable_gqa=True)
            found.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_masks_of_every_batch_compile_once() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor) -> Tensor:
        return maskops.masked_attention(q, k, v, maskops.BlockMap(tiles, words, q.shape[2], k.shape[2])) + 1

    for seed, size in enumerate((500, 150, 200, 333)):
        q, k, v = tensors(*[(2, 3, size, 24)] * 3, seed=seed)
        made = AttentionMask.key_padding(torch.tensor([size - 5 - seed, size // 2])).compile(size, size)
        torch.testing.assert_close(
            attend(q, k, v, made.tiles, made.words), maskops.masked_attention(q, k, v, made) + 1, rtol=1e-5, atol=1e-6
        )
    assert counter.frame_count == 1


def test_module_self_cross_and_grouped() -> None:
    torch.manual_seed(0)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 14, 24)
    assert MaskedAttention(32, 4)(x, mask=AttentionMask.causal()).shape == x.shape
    layer = MaskedAttention(32, 4, kv_heads=2, context_dim=24)
    assert layer(x, context, AttentionMask.key_padding(torch.tensor([14, 3]))).shape == x.shape
    with pytest.raises(ValueError, match="heads must divide dim"):
        MaskedAttention(30, 4)


def test_module_names_what_is_wrong() -> None:
    layer, x = MaskedAttention(32, 4, context_dim=24), torch.zeros(1, 5, 32)
    with pytest.raises(TypeError, match="context must be a tensor, got AttentionMask"):
        layer(x, AttentionMask.causal())
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, 32\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"context must have shape \[B, N, 24\]"):
        layer(x)
    with pytest.raises(ValueError, match="heads must divide dim"):
        MaskedAttention(32, 0)
    with pytest.raises(ValueError, match="masked_attention: scale must be finite, got inf"):
        maskops.masked_attention(x[None], x[None], x[None], scale=float("inf"))


def test_an_infinite_score_makes_lse_infinite() -> None:
    q, k, v = tensors((1, 1, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16))
    bias = torch.zeros(1, 1, 70, 70)
    bias[..., 3, 5] = float("inf")
    found = [maskops.masked_attention(q, k, v, bias=bias, return_lse=True, backend=b) for b in ("native", "reference")]
    assert all(lse[0, 0, 3] == float("inf") and out[0, 0, 3].isnan().all() for out, lse in found)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_module_takes_a_bias_and_drops_weights_in_training_only() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 10, 32), torch.randn(1, 4, 10, 10)
    layer = MaskedAttention(32, 4, dropout=0.5)
    assert not torch.equal(layer(x, seed=0), layer(x, seed=1))
    assert torch.equal(layer(x, seed=0), layer(x, seed=0))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not torch.allclose(layer(x), layer(x, bias=bias))
    causal = torch.zeros(10, 10).masked_fill_(torch.ones(10, 10, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(layer(x, bias=causal[None, None]), layer(x, mask=AttentionMask.causal()))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        MaskedAttention(32, 4, dropout=1.0)


def test_few_queries_of_many_keys_are_done_in_parts() -> None:
    """As in generation: the parts of the keys are merged, whatever is switched on, and a part may see nothing."""
    q, k, v, bias = tensors((2, 2, 3, 24), (2, 2, 1500, 24), (2, 2, 1500, 24), (1, 2, 1, 1500), grad=True)
    lengths = torch.tensor([1500, 600])
    mask = AttentionMask.key_padding(lengths) & ~AttentionMask.keys(torch.arange(1500)[None] // 300 == 1)
    options = dict(bias=bias, dropout_p=0.2, seed=3, return_lse=True, return_entropy=True)
    found = {b: maskops.masked_attention(q, k, v, mask, **options, backend=b) for b in ("native", "reference")}
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in out), (q, k, v, bias)) for out in found.values()]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_its_share() -> None:
    q, k = tensors((4, 4, 64, 16), (4, 4, 64, 16))
    ones = torch.ones(4, 4, 64, 16)
    out = maskops.masked_attention(q, k, ones, dropout_p=0.25, seed=5)
    assert abs(out.mean().item() - 1) < 0.01 and out.std() > 0.05
    assert torch.equal(out, maskops.masked_attention(q, k, ones, dropout_p=0.25, seed=5))
    assert not torch.equal(out, maskops.masked_attention(q, k, ones, dropout_p=0.25, seed=6))
    same, each = torch.zeros(4, 4, 64, 64), torch.eye(64).expand(4, 4, 64, 64)
    flat = maskops.masked_attention(same, same, each, dropout_p=0.25, seed=5)
    assert abs((flat == 0).float().mean().item() - 0.25) < 0.005


def test_bias_is_that_of_sdpa() -> None:
    q, k, v, slopes = tensors((2, 4, 90, 16), (2, 4, 90, 16), (2, 4, 90, 16), (1, 4, 1, 1), grad=True)
    distance = (torch.arange(90)[:, None] - torch.arange(90)).abs() * -0.1
    ours = maskops.masked_attention(q, k, v, AttentionMask.causal(), bias=slopes * distance)
    seen = torch.where(AttentionMask.causal().to_dense(90, 90), 0.0, -math.inf)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=slopes * distance + seen)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grad = tensors(ours.shape, seed=4)[0]
    pairs = zip(*(torch.autograd.grad(x, (q, k, v, slopes), grad) for x in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_entropy_of_uniform_and_of_single_weights() -> None:
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 5, 8)
    mask = AttentionMask.dense(torch.tensor([[True] * 5, [True] + [False] * 4, [False] * 5]))
    _, entropy = maskops.masked_attention(q, k, k, mask, return_entropy=True)
    torch.testing.assert_close(entropy[0, 0], torch.tensor([math.log(5), 0.0, 0.0]))
