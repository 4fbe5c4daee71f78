"""Products of bfloat16 in AMX tiles: sizes that no tile register fits, and what must not leak through its zeros."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import testing

pytestmark = pytest.mark.skipif("amx_bf16" not in testing.instruction_sets(), reason="this CPU has no AMX")


@pytest.fixture(autouse=True)
def amx() -> Iterator[None]:
    with testing.instruction_set("amx_bf16"):
        yield


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_near(actual: Tensor, expected: Tensor, limit: float = 4e-3) -> None:
    error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < limit, error


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(33, 32, 32), (100, 70, 45), (300, 1256, 130), (48, 0, 5), (7, 1040, 65)]
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (1, 32), (3, 7), (5, 32)])
def test_nm_linear(rows: int, inputs: int, outputs: int, n: int, m: int) -> None:
    x, weight, bias = rand(rows, inputs), rand(outputs, inputs, seed=1), rand(outputs, seed=2)
    weight = weight * maskops.nm_mask(weight.float().abs(), n, m)
    x.requires_grad_()
    y = maskops.nm_linear(x, maskops.nm_compress(weight, n, m), bias)
    assert_near(y.detach(), F.linear(x.detach().double(), weight.double(), bias.double()))
    grad = rand(rows, outputs, seed=3)
    y.backward(grad)
    if inputs:
        assert_near(x.grad, grad.double() @ weight.double())


@pytest.mark.parametrize(
    ("rows", "n", "m", "inputs"), [(64, 2, 4, 33), (40, 3, 4, 33), (300, 9, 16, 35), (40, 20, 32, 40)]
)
def test_slots_past_the_last_column_reach_nothing(rows: int, n: int, m: int, inputs: int) -> None:
    weight = rand(40, inputs)
    weight = maskops.nm_compress(weight * maskops.nm_mask(weight.float().abs(), n, m), n, m)
    kept = torch.ops.maskops.nm_matmul_select(torch.ones(40, inputs).bfloat16(), weight.indices, n, m)
    values = weight.values.masked_fill(kept == 0, torch.nan)
    assert values.isnan().any()
    x = rand(rows, inputs, seed=1)
    y = torch.ops.maskops.nm_matmul_linear(x, values, weight.indices, None, n, m)
    assert torch.equal(y, maskops.nm_linear(x, weight))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (1, 8), (9, 16)])
def test_damaged_places_stay_in_their_group(n: int, m: int) -> None:
    """Places that do not ascend, which NMWeight refuses: past the group means its last, and of equal ones the last counts."""
    x = rand(40, 1100)
    weight = maskops.nm_compress(rand(70, 1100, seed=1) * maskops.nm_mask(torch.rand(70, 1100), n, m), n, m)
    places = torch.randint(0, 256, weight.indices.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits, slots = (m - 1).bit_length(), weight.values.shape[1]
    flat = (
        torch.stack([places >> b & 1 for b in range(8)], -1).flatten(1)[:, : slots * bits].unflatten(1, (slots, bits))
    )
    at = (flat * 2 ** torch.arange(bits)).sum(-1).clamp(max=m - 1) + torch.arange(slots) // n * m
    dense = torch.zeros(70, -(-1100 // m) * m)
    for i in range(n):  # of each group, in order: a later slot replaces an earlier one
        dense.scatter_(1, at[:, i::n], weight.values[:, i::n].float())
    y = torch.ops.maskops.nm_matmul_linear(x, weight.values, places, None, n, m)
    assert_near(y, x.double() @ dense[:, :1100].double().T)


def test_pruned_weights_do_not_carry_nan() -> None:
    x, weight = rand(64, 64), rand(40, 64, seed=1)
    mask = maskops.nm_mask(weight.float().abs(), 2, 4)
    x[3, 5] = float("nan")
    y = maskops.nm_linear(x, maskops.nm_compress(weight * mask, 2, 4))
    assert torch.equal(y[3].isnan(), mask[:, 5]) and y[:3].isfinite().all()


@pytest.mark.parametrize(("queries", "keys", "channels"), [(70, 130, 40), (9, 65, 8), (128, 64, 96), (64, 300, 64)])
def test_attention(queries: int, keys: int, channels: int) -> None:
    """A bias, a scale of either sign and hidden values that are not finite."""
    q, k, v = rand(2, 3, queries, channels), rand(2, 3, keys, channels, seed=1), rand(2, 3, keys, channels, seed=2)
    bias = rand(1, 3, queries, keys, seed=3)
    lengths = torch.tensor([keys, keys // 2])
    seen = torch.arange(keys) < lengths[:, None, None, None]
    k[1, :, keys // 2 :], v[1, :, keys // 2 :] = float("nan"), float("inf")
    for scale, added in ((0.2, None), (-0.1, bias), (0.0, None)):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = maskops.masked_attention(*inputs, maskops.AttentionMask.key_padding(lengths), scale=scale, bias=added)
        exact = [x.detach().double().nan_to_num(0, 0, 0).requires_grad_() for x in inputs]
        score = exact[0] @ exact[1].transpose(-1, -2) * scale + (0 if added is None else added.double())
        expected = score.masked_fill(~seen, -torch.inf).softmax(-1) @ exact[2]
        assert_near(out.detach(), expected.detach())
        grad = rand(2, 3, queries, channels, seed=4)
        out.backward(grad)
        expected.backward(grad.double())
        for ours, theirs in zip(inputs, exact, strict=True):
            if theirs.grad.abs().max() > 0:
                assert_near(ours.grad, theirs.grad, 8e-3)
            else:
                assert not ours.grad.any()


@pytest.mark.parametrize("size", [1e5, 3e9, 1e12])
def test_attention_of_huge_scores(size: float) -> None:
    """One key: its weight is 1, whatever its score."""
    q = (
        (size * (1 + torch.rand(1, 1, 64, 1, generator=torch.Generator().manual_seed(0))))
        .bfloat16()
        .expand(1, 1, 64, 8)
    )
    k, v = torch.ones(1, 1, 1, 8).bfloat16(), torch.ones(1, 1, 1, 8).bfloat16()
    out, entropy = maskops.masked_attention(q, k, v, scale=0.7, return_entropy=True)
    assert torch.equal(out, torch.ones_like(out)) and not entropy.any()


@pytest.mark.parametrize(("tokens", "width", "classes"), [(50, 40, 200), (130, 64, 97), (16, 96, 960), (3, 8, 5)])
def test_linear_cross_entropy(tokens: int, width: int, classes: int) -> None:
    hidden, weight, bias = rand(tokens, width), rand(classes, width, seed=1) * 0.2, rand(classes, seed=2)
    target = torch.randint(classes, (tokens,), generator=torch.Generator().manual_seed(0))
    target[0] = -100
    ours = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    loss = maskops.linear_cross_entropy(ours[0], ours[1], target, bias=ours[2], label_smoothing=0.1)
    expected = F.cross_entropy(F.linear(*exact), target, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    loss.backward()
    expected.backward()
    for mine, other in zip(ours, exact, strict=True):
        assert_near(mine.grad, other.grad, 8e-3)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "groups"),
    [(48, 40, 3, 2, 1), (32, 96, 1, 1, 1), (36, 20, 5, 1, 1), (64, 32, 3, 1, 2)],
)
def test_block_masked_conv(channels: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
    x, weight, bias = (
        rand(2, channels, 16, 16),
        rand(outputs, channels // groups, kernel, kernel, seed=1),
        rand(outputs, seed=2),
    )
    cells = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    ours = [a.detach().clone().requires_grad_() for a in (x.masked_fill(~seen, float("nan")), weight, bias)]
    exact = [a.detach().double().nan_to_num(0).requires_grad_() for a in ours]
    options = {"stride": stride, "padding": kernel // 2, "groups": groups}
    out = maskops.block_masked_conv(ours[0], ours[1], cells, ours[2], **options)
    expected = F.conv2d(exact[0], exact[1], exact[2], **options) * seen[:, :, ::stride, ::stride]
    assert_near(out.detach(), expected.detach())
    grad = rand(*out.shape, seed=3)
    out.backward(grad)
    expected.backward(grad.double())
    assert_near(ours[0].grad, exact[0].grad * seen, 8e-3)
    for mine, other in zip(ours[1:], exact[1:], strict=True):
        assert_near(mine.grad, other.grad, 8e-3)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups"), [(8, 8, 1), (40, 24, 1), (64, 96, 1), (33, 50, 1), (48, 72, 3), (64, 64, 8)]
)
@pytest.mark.parametrize("places", [1, 30, 700])
def test_sparse_conv(channels: int, outputs: int, groups: int, places: int) -> None:
    """A place that holds NaN reaches its neighbours only, whatever tile register they share with others."""
    cells = torch.randperm(12**3, generator=torch.Generator().manual_seed(0))[:places]
    coords = torch.stack([cells // 1728, cells // 144, cells // 12 % 12, cells % 12], 1).int()
    found = maskops.kernel_map(coords, 3)
    x, weight = rand(places, channels).requires_grad_(), rand(27, channels // groups, outputs, seed=1).requires_grad_()
    bias, grad = rand(outputs, seed=2), rand(places, outputs, seed=3)
    y = maskops.sparse_conv(x, weight, found, bias, groups=groups)
    y.backward(grad)
    expected = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = maskops.sparse_conv(*expected, found, bias.double(), groups=groups, backend="reference")
    exact.backward(grad.double())
    for actual, want in ((y.detach(), exact.detach()), (x.grad, expected[0].grad), (weight.grad, expected[1].grad)):
        assert_near(actual, want)
    broken = x.detach().clone()
    broken[places // 2] = torch.nan
    reached = maskops.sparse_conv(broken, weight.detach(), found, bias, groups=groups).isnan().any(1)
    assert torch.equal(reached, (found.map == places // 2).any(0))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 8, 1), (17, 40, 33), (33, 352, 336), (70, 1, 15), (200, 515, 64)]
)
@pytest.mark.parametrize("samples", [1, 3])
def test_bitmask_linear(rows: int, inputs: int, outputs: int, samples: int) -> None:
    x, weight, bias = rand(samples, rows, inputs), rand(outputs, inputs, seed=1), rand(outputs, seed=2)
    mask = rand(samples, outputs, inputs, seed=3) > 0
    scores = torch.zeros(samples, outputs, inputs, dtype=torch.bfloat16, requires_grad=True)
    x.requires_grad_()
    weight.requires_grad_()
    y = maskops.bitmask_linear(x, weight, maskops.pack_bitmask(mask), bias, scores=scores)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, mask)]
    expected = exact[0] @ (exact[1] * exact[2]).transpose(1, 2) + bias.double()
    assert_near(y.detach(), expected.detach())
    grad = rand(samples, rows, outputs, seed=4)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip((x, weight, scores), exact, strict=True):
        assert_near(ours.grad, theirs.grad)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 1), (17, 40, 33), (65, 352, 336), (200, 516, 47)])
@pytest.mark.parametrize("exact", [True, False])
def test_soft_linear(rows: int, inputs: int, outputs: int, exact: bool) -> None:
    """Against float64, with the same noise: of both ways of writing the logits, all gradients that there are."""
    x, weight = rand(rows, inputs), rand(outputs, inputs, seed=1)
    logits = rand(outputs, inputs // 4, 6, seed=2).float() if exact else rand(outputs, inputs, seed=2).float()

    def call(dtype: torch.dtype) -> list[Tensor]:
        kinds = (dtype, torch.promote_types(dtype, torch.float32))
        ours = [t.detach().to(kind).requires_grad_() for t, kind in zip((x, logits), kinds, strict=True)]
        y, kept = maskops.nm_soft_linear(ours[0], weight.to(dtype), ours[1], 2, 4, tau=0.7, scale=1.5, seed=5)
        (y * rand(rows, outputs, seed=4).to(dtype)).sum().backward()
        return [y.detach(), kept.detach(), ours[0].grad, ours[1].grad]

    for found, wanted in zip(call(torch.bfloat16), call(torch.float64), strict=True):
        assert_near(found, wanted, 8e-3)


@pytest.mark.parametrize(
    ("images", "patch", "channels"),
    [((2, 3, 32, 48), (8, 8), 70), ((3, 1, 10, 6), (5, 3), 5), ((20, 3, 64, 64), (8, 8), 33)],
)
def test_embed_patches(images: tuple[int, ...], patch: tuple[int, int], channels: int) -> None:
    """Some slots are empty; the last case has more slots than one pass of the weight's gradient."""
    x, values = rand(*images), images[1] * patch[0] * patch[1]
    tokens = images[2] // patch[0] * (images[3] // patch[1])
    ids = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(b)) for b in range(images[0])])
    ids[0, 0] = -1
    weight, bias, pos = (
        rand(channels, images[1], *patch, seed=1),
        rand(channels, seed=2),
        rand(tokens, channels, seed=3),
    )
    inputs = [t.requires_grad_() for t in (x, weight, bias, pos)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = maskops.embed_patches(x, weight, bias, patch, ids, pos)
    whole = (
        F.unfold(exact[0], patch, stride=patch).transpose(1, 2) @ exact[1].reshape(channels, values).T
        + exact[2]
        + exact[3]
    )
    expected = whole.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, channels)) * (ids >= 0)[..., None]
    assert_near(out.detach(), expected.detach())
    grad = rand(*out.shape, seed=4)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert_near(ours.grad, theirs.grad)


def test_cached_attention_without_scale() -> None:
    """Products that overflow, times zero: every key has the same weight."""
    q = torch.full((1, 1, 8, 32), 1e20).bfloat16()
    v = rand(1, 1, 8, 32)
    cache = maskops.ContextCache.of(q[None], v[None])
    out = maskops.cached_attention(q, q, v, cache, 0, torch.arange(8)[None], scale=0.0)
    assert_near(out[0, 0, 0], v[0, 0].double().mean(0), 1e-2)


@pytest.mark.parametrize(("local", "tokens", "channels"), [(1, 5, 8), (33, 257, 64), (70, 130, 40), (16, 64, 96)])
@pytest.mark.parametrize("scale", [0.2, -0.1, 0.0])
def test_cached_attention(local: int, tokens: int, channels: int, scale: float) -> None:
    """Empty slots and tokens that are not in the cache hold what is not finite."""
    q, k, v = (rand(2, 3, local, channels, seed=s) for s in range(3))
    keys, values = (rand(2, 3, tokens, channels, seed=s) for s in (3, 4))
    ids = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(b))[:local] for b in range(2)])
    ids = F.pad(ids, (0, local - ids.shape[1]), value=-1)
    ids[1, local // 2 :] = -1
    for x in (q, k, v):
        x[ids[:, None, :, None].expand_as(x) < 0] = float("nan")
    cache = maskops.ContextCache.of(keys[None], values[None])
    out, lse = maskops.cached_attention(q, k, v, cache, 0, ids, scale=scale, return_lse=True)
    for b in range(2):
        real = ids[b] >= 0
        rest = torch.ones(tokens, dtype=torch.bool).index_fill(0, ids[b, real], False)
        seen, added = (torch.cat([x[b][:, rest], y[b][:, real]], 1).double() for x, y in ((keys, k), (values, v)))
        if real.any():
            score = q[b][:, real].double() @ seen.transpose(1, 2) * scale
            assert_near(out[b][:, real], score.softmax(-1) @ added, 6e-3)
            torch.testing.assert_close(lse[b][:, real], score.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
        assert not out[b][:, ~real].any() and (lse[b][:, ~real] == -torch.inf).all()
