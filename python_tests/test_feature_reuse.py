"""What is special to feature_reuse: exact local steps, writes in place, published counts, random choices, batch invariance."""

import math

import pytest
import torch
from torch import Tensor

import maskops
from maskops import ContextCache

B, H, N, U, D = 3, 2, 40, 7, 16


def filled(dtype: torch.dtype = torch.float32, layers: int = 1) -> tuple[ContextCache, Tensor, Tensor]:
    cache = ContextCache(layers, B, N, H, D, dtype)
    k, v = torch.randn(2, B, H, N, D).to(dtype)
    for layer in range(layers):
        cache.write_(layer, k, v)
    return cache, k, v


def local_ids() -> Tensor:
    ids = torch.stack([torch.randperm(N)[:U] for _ in range(B)])
    ids[1, 3:] = -1
    return ids


def rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, H, N, D] at ids [B, U], garbage at empty slots."""
    found = x.gather(2, ids.clamp(min=0)[:, None, :, None].expand(-1, H, -1, D)).clone()
    found.transpose(1, 2)[ids < 0] = math.nan
    return found


# ---------------------------------------------------------------- the cache


def test_local_attention_equals_attention_over_all_tokens() -> None:
    """Local features that did not change give what a full step gives; changed ones what a full step with them written gives."""
    cache, k, v = filled()
    q, ids = torch.randn(B, H, N, D), local_ids()
    real = (ids >= 0)[:, None, :, None]
    full = maskops.masked_attention(q, k, v)
    local = maskops.cached_attention(rows(q, ids), rows(k, ids), rows(v, ids), cache, 0, ids)
    assert (torch.where(real, local - rows(full, ids), 0).abs() < 1e-5).all()
    assert torch.equal(local[1, :, 3:], torch.zeros(H, U - 3, D))
    new_k, new_v = torch.randn(2, B, H, U, D)
    local = maskops.cached_attention(rows(q, ids), new_k, new_v, cache, 0, ids)
    stale = maskops.cached_attention(rows(q, ids), new_k, new_v, cache, 0, ids, exclude=torch.full((B, 0), -1))
    cache.write_(0, new_k, new_v, ids)
    full = maskops.masked_attention(q, cache.keys[0], cache.values[0])
    assert (torch.where(real, local - rows(full, ids), 0).abs() < 1e-5).all()
    assert (torch.where(real, stale - rows(full, ids), 0).abs() > 1e-3).any(), (
        "without exclude the old features count too"
    )


def test_all_tokens_local_and_parts_merge() -> None:
    cache, k, v = filled()
    q = torch.randn(B, H, N, D)
    everyone = torch.arange(N).expand(B, N)
    full, lse = maskops.masked_attention(q, k, v, return_lse=True)
    out, own = maskops.cached_attention(q, k, v, cache, 0, everyone, return_lse=True)
    assert torch.allclose(out, full, atol=1e-5) and torch.allclose(own, lse, atol=1e-5)
    merged, joint = maskops.merge_attention(out, own, out, own)
    assert torch.allclose(merged, full, atol=1e-5) and torch.allclose(joint, lse + math.log(2), atol=1e-5)


def test_views_serve_every_layer_and_follow_valid() -> None:
    cache, _, _ = filled(layers=2)
    cache.reset_rows_(torch.tensor([False, True, False]))
    ids = local_ids()
    view = cache.exclude(ids)
    assert view.seen.shape == (2, B, N) and not view.seen[:, 1].any()
    q, k, v = torch.randn(3, B, H, U, D)
    for layer in range(2):
        one = maskops.cached_attention(q, k, v, cache, layer, ids, exclude=view)
        assert torch.equal(one, maskops.cached_attention(q, k, v, cache, layer, ids))
    alone = maskops.masked_attention(q[1:2, :, :3], k[1:2, :, :3], v[1:2, :, :3])
    assert torch.allclose(one[1:2, :, :3], alone, atol=1e-5), "a forgotten row sees its local tokens only"


def test_gather_save_and_restore() -> None:
    cache, k, _ = filled(torch.bfloat16)
    state, ids = cache.state_dict(), local_ids()
    keys, _ = cache.gather(0, ids)
    assert torch.equal(keys[0], rows(k, ids)[0]) and (keys[1, :, 3:] == 0).all()
    cache.write_(0, torch.zeros(B, H, U, D).bfloat16(), torch.zeros(B, H, U, D).bfloat16(), ids)
    assert not torch.equal(cache.keys, state["keys"])
    cache.load_state_dict(state)
    assert torch.equal(cache.keys, state["keys"]) and torch.equal(cache.valid, state["valid"])
    with pytest.raises(ValueError, match="load_state_dict: values must be bfloat16"):
        cache.load_state_dict({**state, "values": state["values"].float()})


def test_writes_want_no_gradient_and_are_seen_by_autograd() -> None:
    cache, k, v = filled()
    with pytest.raises(ValueError, match="k must need no gradient"):
        cache.write_(0, k.requires_grad_(), v)
    with torch.no_grad():
        cache.write_(0, k, v)
    q = torch.randn(B, H, U, D, requires_grad=True)
    ids = local_ids()
    out = maskops.cached_attention(q, q, q, cache, 0, ids)
    cache.write_(0, v, v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_reach_the_cache() -> None:
    keys, values = (torch.randn(1, B, H, N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    q, k, v = torch.randn(3, B, H, U, D, dtype=torch.float64).unbind()
    ids = local_ids()
    out = maskops.cached_attention(q, k, v, ContextCache.of(keys, values), 0, ids)
    found = torch.autograd.grad(out.square().sum(), (keys, values))
    hidden = torch.zeros(B, N + 1, dtype=torch.bool).scatter(1, ids % (N + 1), True)[:, :N]
    for grad in found:
        assert (grad[0].transpose(1, 2)[hidden] == 0).all() and (grad[0].transpose(1, 2)[~hidden] != 0).all()


def test_compiled_steps_write_in_place() -> None:
    """One graph, functionalised: a write, a view and an attention that reads what was written."""
    torch._dynamo.reset()
    cache, k, v = filled()
    same = ContextCache.of(cache.keys.clone(), cache.values.clone(), cache.valid.clone())
    ids = torch.stack([torch.randperm(N)[:U] for _ in range(B)])

    def step(cache: ContextCache, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        cache.write_(0, k, v, ids)
        return maskops.cached_attention(q, k, v, cache, 0, ids) + cache.keys[0, :, :, :U]

    q, k, v = torch.randn(3, B, H, U, D)
    expected = step(cache, q, k, v, ids)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(same, q, k, v, ids)
    assert torch.equal(actual, expected)
    assert torch.equal(same.keys, cache.keys) and torch.equal(same.valid, cache.valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bit for bit, attention, choice and drift; Fast-dLLM's accuracy changes with the batch size (issue 39)."""
    cache, k, v = filled(dtype)
    q, ids = torch.randn(B, H, U, D).to(dtype), local_ids()
    logits, known = torch.randn(B, N, 300).to(dtype), torch.rand(B, N) < 0.5
    options = {"num_select": 5, "temperature": 2.0, "seed": 3}
    out = maskops.cached_attention(q, k[:, :, :U], v[:, :, :U], cache, 0, ids)
    found = maskops.confidence_select(logits, known, **options)
    drift = maskops.token_drift(logits, logits.roll(1, 1))
    for b in range(B):
        one = slice(b, b + 1)
        alone = ContextCache.of(cache.keys[:, one], cache.values[:, one], cache.valid[:, one])
        assert torch.equal(
            maskops.cached_attention(q[one], k[one, :, :U], v[one, :, :U], alone, 0, ids[one])[0], out[b]
        )
        other = maskops.confidence_select(logits[one], known[one], first_row=b, **options)
        assert torch.equal(other.ids[0], found.ids[b]) and torch.equal(other.tokens[0], found.tokens[b])
        assert torch.equal(other.confidence[0], found.confidence[b])
        assert torch.equal(maskops.token_drift(logits[one], logits[one].roll(1, 1))[0], drift[b])


# ---------------------------------------------------------------- choices


def test_samples_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    tokens = maskops.confidence_select(
        p.log().expand(1, 40000, 5), torch.zeros(1, 40000, dtype=torch.bool), 1, seed=1
    ).tokens
    share = torch.bincount(tokens[0], minlength=5) / 40000
    assert (share - p).abs().max() < 0.01 and share[2] == 0
    sharp = maskops.confidence_select(p.expand(1, 40000, 5), tokens < 0, 1, seed=1, probs=True).tokens
    assert torch.equal(sharp, tokens), "probabilities and their logarithms draw the same"


def test_the_choice_is_gumbel_top_k() -> None:
    """With temperature 1 the chance to be chosen first is p[token] over its sum: two tokens of p 0.8 and 0.2."""
    logits = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    rows = torch.stack([logits[0], logits[1]])[None].expand(20000, 2, 2).contiguous()
    rows[:, 1] = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2][:2]).log()  # p = 1 / 2 of whatever is drawn
    known = torch.zeros(20000, 2, dtype=torch.bool)
    found = maskops.confidence_select(rows, known, 1, temperature=1.0, sample_temperature=0, seed=2)
    first = (found.ids[:, 0] == 0).double().mean()
    assert abs(first - 0.8 / 1.3) < 0.015


def test_threshold_decodes_all_that_is_sure_and_at_least_one() -> None:
    p = torch.tensor([[[0.95, 0.05], [0.6, 0.4], [0.91, 0.09]], [[0.5, 0.5], [0.55, 0.45], [0.5, 0.5]]])
    known = torch.tensor([[False, False, False], [True, False, False]])
    found = maskops.confidence_select(p.log(), known, threshold=0.9, sample_temperature=0)
    assert found.ids.tolist() == [[0, 2, -1], [1, -1, -1]] and found.count.tolist() == [2, 1]
    assert found.rest.tolist() == [[1, -1, -1], [2, -1, -1]]


@pytest.mark.parametrize(
    "change,match",
    [
        ({"threshold": 0.5}, "num_select or threshold must be given, one of them"),
        ({"num_select": -1}, "num_select must be at least 0, got -1"),
        ({"noise": "uniform"}, r"noise must be one of \('gumbel', 'none'\)"),
        ({"num_select": None, "threshold": 1.5}, r"threshold must be in \[0, 1\)"),
        ({"num_select": None, "threshold": 0.5, "temperature": 1.0}, "temperature must be 0 with a threshold"),
        ({"probs": True, "sample_temperature": 0.5}, "sample_temperature must be 0 or 1 of probabilities"),
    ],
)
def test_wrong_choices_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        maskops.confidence_select(
            torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), **{"num_select": 1, **change}
        )


# ---------------------------------------------------------------- schedules and drift


def published(kind: str, steps: int, tokens: int) -> list[int]:
    """The loop of parallel_decode.py, counted by hand: mask_len = floor(N gamma), max(1, min(unknown - 1, mask_len))."""
    gamma = {
        "cosine": lambda r: math.cos(math.pi / 2 * r),
        "linear": lambda r: 1 - r,
        "log": lambda r: -math.log2(r) / math.log2(tokens),
    }
    unknown, counts = tokens, []
    for step in range(steps):
        ratio = min(max(gamma[kind]((step + 1) / steps), 1e-6), 1)
        left = 0 if step == steps - 1 else max(1, min(unknown - 1, math.floor(tokens * ratio)))
        counts.append(unknown - left)
        unknown = left
    return counts


@pytest.mark.parametrize("kind", ["cosine", "linear", "log"])
@pytest.mark.parametrize("steps,tokens", [(8, 256), (12, 256), (1, 9), (16, 64), (5, 5)])
def test_counts_are_the_published_ones(kind: str, steps: int, tokens: int) -> None:
    assert maskops.mask_schedule(kind, steps, tokens) == published(kind, steps, tokens)


@pytest.mark.parametrize("kind", ["cosine", "linear", "pow", "log", "exp", "arccos"])
def test_counts_add_up(kind: str) -> None:
    for steps, tokens in ((1, 1), (7, 3), (12, 256), (4, 0)):
        counts = maskops.mask_schedule(kind, steps, tokens)
        assert sum(counts) == tokens and len(counts) == steps and min(counts) >= 0
    some = maskops.mask_schedule(kind, 32, 256, at_least_one=True)
    assert sum(some) == 256 and min(some) >= 1
    with pytest.raises(ValueError, match="steps must be at most num_tokens = 3"):
        maskops.mask_schedule(kind, 4, 3, at_least_one=True)


def test_refresh_recomputes_what_moved_and_what_is_missing() -> None:
    cache, _, values = filled()
    cache.valid[0, 2, 5] = False
    moved = values.clone()
    moved[0, :, 11] *= -1
    moved[1, :, 30] *= -1
    asked = []

    def recompute(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(ids)
        new = rows(moved, ids)
        return new, new

    found = maskops.refresh_tokens_(cache, 0, moved.transpose(1, 2).flatten(2), moved, recompute, 1 / N)
    assert found[:, 0].tolist() == [11, 30, 5] and torch.equal(asked[0], found)
    assert torch.equal(cache.values[0, 0, :, 11], moved[0, :, 11]) and cache.valid.all()
