"""Arguments of the family feature_reuse and of generation that once crashed or were silently taken for something else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maskops
from maskops import ContextCache
from maskops.generation import BlockCache, FullOnly, MaskedGenerator, ReCAP
from maskops.models.maskgit import MaskGIT, MaskGITConfig

BACKENDS = pytest.mark.parametrize("backend", ["auto", "native", "reference"])
NAN, HUGE = float("nan"), 2**40
L, B, H, N, U, D, V = 2, 2, 3, 7, 2, 4, 5
IDS = torch.tensor([[1, 3], [0, -1]])


def filled(**options: object) -> ContextCache:
    cache = ContextCache(L, B, N, H, D, **options)
    cache.write_(0, *torch.randn(2, B, H, N, D).to(cache.keys.dtype))
    return cache


Q, CACHE, KNOWN = torch.randn(B, H, U, D), filled(), torch.zeros(B, N) > 0
LOGITS, SCORE, ROWS = torch.randn(B, N, V), torch.randn(B, N), torch.randn(B, N, 6)
VALUES = torch.randn(B, H, N, D)


def recompute(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(B, H, ids.shape[1], D), torch.zeros(B, H, ids.shape[1], D)


ATTEND = {"q_local": Q, "k_local": Q, "v_local": Q, "cache": CACHE, "layer": 0, "local_ids": IDS}
REFRESH = {"cache": CACHE, "layer": 0, "x": ROWS, "values": VALUES, "recompute": recompute, "ratio": 0.3}
SELECT, RANK = {"logits": LOGITS, "known": KNOWN, "num_select": 2}, {"score": SCORE, "known": KNOWN, "num_select": 2}
WRONG = [  # function, good arguments, argument, a wrong value, the error, what it says
    ("cached_attention", ATTEND, [
        ("q_local", torch.tensor(1.0), ValueError, "have shape"),
        ("cache", ContextCache(L, 1, N, H, D), ValueError, "be of q_local's B, H, D = 2, 3, 4, got B, H, D = 1, 3, 4"),
        ("layer", 2, IndexError, r"be in \[0, 2\)"), ("layer", True, TypeError, "be int"),
        ("local_ids", IDS.int(), ValueError, "be int64"), ("local_ids", IDS + 5, IndexError, r"be in \[-1, 7\), got 8"),
        ("local_ids", IDS * 0, IndexError, "be unique in its row"), ("exclude", IDS - 1, IndexError, r"be in \[-1, 7\), got -2"),
        ("exclude", IDS[:1], ValueError, "have shape"), ("exclude", filled().exclude(IDS), ValueError, "be a view of cache"),
    ]),
    ("confidence_select", SELECT, [
        ("num_select", torch.tensor([1, -2]), ValueError, "be at least 0, got -2"),
        ("num_select", torch.tensor([1.0, 2.0]), ValueError, "be int64"), ("noise", [], ValueError, "be one of"),
        ("first_row", 2**31, ValueError, r"be in \[0, 2\^31\)"), ("logits", LOGITS.to(torch.complex64), ValueError, "complex64"),
    ]),
    ("select_tokens", RANK, [("num_select", torch.tensor([1, -2]), ValueError, "be at least 0")]),
    ("token_drift", {"new": ROWS, "cached": ROWS}, [("kind", [], ValueError, "be one of")]),
    ("refresh_tokens_", REFRESH, [
        ("cache", None, TypeError, "be a ContextCache"), ("layer", -1, IndexError, r"be in \[0, 2\)"),
        ("x", None, TypeError, "be a tensor"), ("x", torch.randn(B, N + 3, 6), ValueError, "have shape"),
        ("recompute", None, TypeError, "be callable"), ("recompute", lambda rows, ids: rows, TypeError, "return k and v"),
        ("recompute", lambda rows, ids: (rows,) * 3, TypeError, "return k and v, got 3 values"),
        ("kind", "x", ValueError, "be one of"),
    ]),
]  # fmt: skip
CASES = [(function, good, *wrong) for function, good, group in WRONG for wrong in group]


@BACKENDS
@pytest.mark.parametrize(("function", "good", "argument", "value", "error", "expected"), CASES)
def test_errors_name_function_and_argument(
    function: str, good: dict, argument: str, value: object, error: type, expected: str, backend: str
) -> None:
    call = getattr(maskops, function)
    call(**good, backend=backend)
    with pytest.raises(error, match=rf"^{function}: {argument}(\[[\d, ]+\])? must .*{expected}"):
        call(**{**good, argument: value}, backend=backend)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kind": ["cosine"]}, ValueError), ({"at_least_one": 1}, TypeError), ({"steps": 2**20 + 1}, ValueError),
        ({"steps": 10**15, "at_least_one": True}, ValueError), ({"num_tokens": 2**31}, ValueError),
        ({"steps": 17, "at_least_one": True}, ValueError),
    ],
)  # fmt: skip
def test_schedule_refuses_what_is_no_word_and_what_is_too_large(options: dict, error: type) -> None:
    with pytest.raises(error, match=f"mask_schedule: {next(iter(options))} must be"):
        maskops.mask_schedule(**{"kind": "cosine", "steps": 4, "num_tokens": 16, **options})


def test_refreshed_tokens_are_counted_without_rounding() -> None:
    """0.07 times 100 is a little more than 7 in float64."""
    cache, x = ContextCache(1, 1, 100, 1, 2), torch.randn(1, 100, 2)
    ids = maskops.refresh_tokens_(cache, 0, x, x[:, None], lambda rows, ids: (rows[:, None],) * 2, 0.07)
    assert ids.shape == (1, 7)


# ---------------------------------------------------------------- the cache


@BACKENDS
def test_rows_of_the_cache_itself_are_read_before_they_are_written(backend: str) -> None:
    for shift in (1, -1):
        cache, expected = filled(), None
        source, into = (slice(1, None), slice(0, N - 1)) if shift == 1 else (slice(0, N - 1), slice(1, None))
        k, v = cache.keys[0][:, :, source], cache.values[0][:, :, source]
        expected = k.clone(), v.clone()
        cache.write_(0, k, v, torch.arange(N)[into].expand(B, -1), backend=backend)
        assert torch.equal(cache.keys[0][:, :, into], expected[0])
        assert torch.equal(cache.values[0][:, :, into], expected[1])


def test_keys_and_values_in_one_memory_are_not_written() -> None:
    x = torch.zeros(1, B, H, N, D)
    with pytest.raises(ValueError, match="the cache's values must have memory of their own"):
        ContextCache.of(x, x).write_(0, Q, Q, IDS)


@BACKENDS
@pytest.mark.parametrize("which", ["keys", "values"])
def test_caches_that_need_a_gradient_are_not_written(which: str, backend: str) -> None:
    parts = {name: torch.zeros(1, B, H, N, D, requires_grad=name == which) for name in ("keys", "values")}
    cache = ContextCache.of(**parts)
    with pytest.raises(ValueError, match=f"the cache's {which} must need no gradient"):
        cache.write_(0, Q, Q, IDS, backend=backend)
    with torch.no_grad():
        cache.write_(0, Q, Q, IDS, backend=backend)
    state = cache.state_dict()
    assert not state[which].requires_grad
    cache.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: [1], TypeError, "state must be a dict of tensors, got list"),
        (lambda s: {}, ValueError, "state must hold"),
        (lambda s: {**s, "more": s["keys"]}, ValueError, "state must hold"),
        (lambda s: {**s, "valid": s["valid"].float()}, ValueError, "valid must be bool"),
        (lambda s: {**s, "values": 3}, TypeError, "values must be a tensor"),
        (lambda s: {**s, "values": s["values"].to("meta")}, ValueError, "values must be .* on meta"),
    ],
)
def test_a_wrong_state_changes_nothing(change: Callable, error: type, message: str) -> None:
    cache = filled()
    before = cache.keys.clone()
    state = {name: torch.zeros_like(x) for name, x in cache.state_dict().items()}
    with pytest.raises(error, match=f"ContextCache.load_state_dict: {message}"):
        cache.load_state_dict(change(state))
    assert torch.equal(cache.keys, before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CACHE.write_(0, torch.tensor(1.0), Q), ValueError, "write_: k must have shape"),
        (
            lambda: CACHE.write_(0, VALUES.repeat(1, 1, 2, 1), VALUES),
            ValueError,
            "write_: k must have at most 7 tokens",
        ),
        (lambda: CACHE.write_(9, Q, Q, IDS), IndexError, r"write_: layer must be in \[0, 2\)"),
        (lambda: ContextCache(2**62, 1, 4, 2, 8), ValueError, r"have a product below 2\^60"),
    ],
)
def test_wrong_calls_of_a_cache(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_exported_program_may_return_a_selection() -> None:
    class Select(nn.Module):
        def forward(self, logits: Tensor, known: Tensor) -> maskops.Selection:
            return maskops.confidence_select(logits, known, 3, seed=0)

    found = torch.export.export(Select(), (LOGITS, KNOWN)).module()(LOGITS, KNOWN)
    assert torch.equal(found.ids, maskops.confidence_select(LOGITS, KNOWN, 3, seed=0).ids)


# ---------------------------------------------------------------- generation

MODEL = MaskGIT(MaskGITConfig(grid=(2, 4), vocab=8, dim=16, depth=1, heads=2, classes=3)).eval()
MASKED = torch.full((2, 8), -1)
RAGGED = MASKED.clone()
RAGGED[1, 0] = 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a MaskedModel, got Linear without num_tokens"),
        ({"schedule": [4.0, 4.0]}, TypeError, "schedule must be int"),
        ({"schedule": 3}, TypeError, "schedule must be a sequence"),
        ({"reuse": "recap"}, TypeError, "reuse must be FullOnly, ReCAP or BlockCache, got str"),
        ({"temperature": NAN}, ValueError, "temperature must be finite and at least 0, got nan"),
        ({"sample_temperature": "1"}, TypeError, "sample_temperature must be a number"),
        ({"guidance": None}, TypeError, "guidance must be a number"),
        ({"guidance": [1, NAN]}, ValueError, "guidance must be finite"),
    ],
)
def test_a_generator_refuses_what_is_no_option(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^MaskedGenerator: {message}"):
        MaskedGenerator(**{"model": MODEL, "schedule": [4, 4], **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReCAP(1.5, 1), TypeError, "ReCAP: pre_full must be int"),
        (lambda: BlockCache(2.0), TypeError, "BlockCache: block_size must be int"),
        (lambda: BlockCache(4, threshold=2), ValueError, r"BlockCache: threshold must be in \[0, 1\)"),
        (lambda: BlockCache(4, steps=1.5), TypeError, "BlockCache: steps must be int"),
    ],
)
def test_plans_are_checked(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be at least 0"),
        ({"batch": 2.0}, TypeError, "batch must be int"),
        ({"tokens": RAGGED}, ValueError, "schedule must decode the 7 masked tokens of row 1, got 8"),
        ({"tokens": MASKED - 5}, ValueError, r"tokens\[0, 0\] must be at least -1"),
        ({"tokens": [1]}, TypeError, "tokens must be a tensor"),
        ({"batch": 2, "seed": 1.5}, TypeError, "seed must be int"),
        ({"batch": 2, "seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ({"batch": 2, "condition": [0, 1]}, TypeError, "condition must be a tensor"),
        ({"batch": 2, "condition": torch.tensor([0.0, 1.0])}, ValueError, "condition must be int64"),
        ({"batch": 2, "condition": torch.tensor([0, 7])}, ValueError, r"condition\[1\] must be in \[0, 3\]"),
    ],
)
def test_a_generation_refuses_what_it_cannot_do(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^generate: {message}"):
        MaskedGenerator(MODEL, [4, 4], ReCAP(0, 1)).generate(**options)


def test_guidance_needs_a_condition() -> None:
    with pytest.raises(ValueError, match="generate: condition must be given with guidance, got None"):
        MaskedGenerator(MODEL, [4, 4], guidance=1.0).generate(2)


def test_a_batch_of_nothing() -> None:
    for reuse, schedule in ((FullOnly(), [4, 4]), (ReCAP(0, 1), [4, 4]), (BlockCache(4), None)):
        assert MaskedGenerator(MODEL, schedule, reuse).generate(0).tokens.shape == (0, 8)
