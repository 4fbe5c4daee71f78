"""Masks of masked_attention: rules by hand, copies, limits, errors, saving, compiling."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import maskops
from maskops import AttentionMask
from maskops.ops.masked_attention import program as rules
from maskops.testing.masked_attention import MASKS, L, S


def grid(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None]


@pytest.mark.parametrize(
    "mask,expected",
    [
        (AttentionMask.causal(), lambda q, k: k <= q),
        (AttentionMask.causal(offset=30), lambda q, k: k <= q + 30),
        (AttentionMask.window(5, 2), lambda q, k: (k >= q - 5) & (k <= q + 2)),
        (AttentionMask.block_causal(7), lambda q, k: k // 7 <= q // 7),
        (AttentionMask.hide_self(), lambda q, k: k != q),
        (AttentionMask.key_padding(torch.tensor([33])), lambda q, k: (k < 33) & (q > -1)),
        (AttentionMask.prefix(torch.tensor([33])), lambda q, k: (k < 33) | (k <= q)),
        (AttentionMask.causal() & ~AttentionMask.window(0, 0), lambda q, k: k < q),
        (AttentionMask.causal() | AttentionMask.window(0, 3), lambda q, k: k <= q + 3),
    ],
    ids=lambda value: repr(value) if isinstance(value, AttentionMask) else "",
)
def test_rules_by_hand(mask: AttentionMask, expected: object) -> None:
    assert torch.equal(mask.to_dense(90, 130)[0, 0], expected(*grid(90, 130)))


def test_intervals_are_those_of_flashmask() -> None:
    start, end = torch.tensor([0, 1, 0, 2]), torch.tensor([3, 2, 0, 3])
    seen = AttentionMask.intervals(start, end).to_dense(Lq=3)[0, 0]
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]


def test_packed_documents_and_what_lies_behind_them() -> None:
    mask = AttentionMask.packed(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 4]), total_q=4, total_k=5)
    assert mask.to_dense()[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0] * 5]


def test_groups_and_key_ids() -> None:
    matrix = torch.tensor([[True, False], [True, True]])
    seen = AttentionMask.groups(matrix, torch.tensor([0, 1]), torch.tensor([1, 0, 1])).to_dense()[0, 0]
    assert seen.int().tolist() == [[0, 1, 0], [1, 1, 1]]
    ids = AttentionMask.keys(torch.tensor([[2, 0, -1]]), Lk=4)
    assert ids.to_dense(Lq=1)[0, 0].int().tolist() == [[1, 0, 1, 0]]
    with pytest.raises(IndexError, match=r"group_of_k must be in \[0, 2\)"):
        AttentionMask.groups(matrix, torch.tensor([0, 1]), torch.tensor([1, 2]))


def test_block_map_density_and_repr() -> None:
    mask = AttentionMask.causal()
    assert mask.block_map(64, 64, Lq=128, Lk=192)[0, 0].tolist() == [[1, 0, 0], [2, 1, 0]]
    assert mask.block_map(128, 64, Lq=128, Lk=192)[0, 0].tolist() == [[1, 1, 0]]
    assert mask.density(4, 4) == 10 / 16
    assert "band" in repr(mask) and "Lk=7" in repr(AttentionMask.keys(torch.ones(2, 7, dtype=torch.bool)))
    with pytest.raises(ValueError, match="q_block must be a positive multiple of 64"):
        mask.block_map(100, 64, Lq=128, Lk=128)


def test_a_mask_is_compiled_once() -> None:
    mask = AttentionMask.causal()
    assert mask.compile(100, 100) is mask.compile(100, 100)
    assert mask.compile(100, 100) is not mask.compile(101, 100)


def test_masks_are_pytrees() -> None:
    mask = MASKS["combined"](torch.Generator().manual_seed(0))
    leaves, spec = torch.utils._pytree.tree_flatten(mask)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 2 and torch.equal(again.to_dense(L, S), mask.to_dense(L, S))


def test_masks_that_do_not_fit() -> None:
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 12, 8)
    with pytest.raises(ValueError, match="mask must have 12 keys"):
        maskops.masked_attention(q, k, k, AttentionMask.keys(torch.ones(2, 9, dtype=torch.bool)))
    with pytest.raises(ValueError, match="mask must have batch 1 or 2"):
        maskops.masked_attention(q, k, k, AttentionMask.key_padding(torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match="batch must be 2 in both masks"):
        AttentionMask.key_padding(torch.tensor([1, 2])) & AttentionMask.key_padding(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="Lq must be given"):
        AttentionMask.causal().compile()
    with pytest.raises(TypeError, match="mask must be an AttentionMask"):
        maskops.masked_attention(q, k, k, torch.ones(10, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="or enable_gqa be set"):
        maskops.masked_attention(q, k[:, :1], k[:, :1])


def test_a_combination_that_is_too_deep_says_so() -> None:
    def pair(depth: int) -> AttentionMask:
        return AttentionMask.causal() if depth == 0 else pair(depth - 1) & ~pair(depth - 1)

    assert rules.depth(pair(3).program) == 4
    with pytest.raises(ValueError, match="at most 4 values at once"):
        pair(4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_are_combined_inside_a_compiled_function(dynamic: bool) -> None:
    q = torch.randn(2, 2, 70, 16)

    def attend(q: Tensor, lengths: Tensor) -> Tensor:
        mask = AttentionMask.causal() & AttentionMask.key_padding(lengths) | AttentionMask.hide_self().complement()
        return maskops.masked_attention(q, q, q, mask)

    lengths = torch.tensor([70, 33])
    found = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")(q, lengths)
    torch.testing.assert_close(found, attend(q, lengths))


# ---------------------------------------------------------------- what masks are made of


LENGTHS, IDS = torch.tensor([60, 3]), torch.arange(70) // 5
MAKE = {
    "key_padding": (AttentionMask.key_padding, LENGTHS),
    "prefix": (AttentionMask.prefix, LENGTHS),
    "segments": (AttentionMask.segments, IDS),
    "intervals": (lambda x: AttentionMask.intervals(x, x + 9), IDS),
    "packed": (AttentionMask.packed, torch.tensor([0, 30, 70])),
    "groups": (lambda x: AttentionMask.groups(torch.eye(14) > 0, x), IDS),
    "dense": (AttentionMask.dense, (IDS[:, None] + IDS) % 3 == 0),
    "keys": (AttentionMask.keys, IDS[None] % 3 == 0),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_mask_does_not_change_with_the_tensor_it_was_made_of(name: str) -> None:
    make, data = MAKE[name]
    expected = make(data).to_dense(70, 70)
    for dtype in (torch.bool,) if data.dtype == torch.bool else (torch.int32, torch.int64):
        own = data.to(dtype, copy=True)
        mask = make(own)
        own.zero_()
        assert torch.equal(mask.to_dense(70, 70), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numbers_of_64_bits(backend: str) -> None:
    def share(mask: AttentionMask) -> float:
        return mask.compile(70, 70, backend=backend).dense().float().mean().item()

    far = torch.full((70,), 2**63 - 1)
    assert share(AttentionMask.causal(2**63 - 1)) == 1 and share(AttentionMask.causal(-(2**63))) == 0
    assert share(AttentionMask.window(2**63 - 1, 2**63 - 1)) == 1
    assert share(AttentionMask.key_padding(far[:1])) == 1 and share(AttentionMask.key_padding(-far[:1])) == 0
    assert share(AttentionMask.intervals(-far, far)) == 1 and share(AttentionMask.query_intervals(far, far)) == 0
    assert share(AttentionMask.block_causal(2**62)) == 1
    with pytest.raises(
        IndexError, match=r"AttentionMask.segments: ids_q must be in \[-2147483648, 2147483648\), got 0 to"
    ):
        AttentionMask.segments(torch.tensor([0, 2**32]))


def test_lengths_past_the_blocks_of_a_block_map() -> None:
    """They would read the bits of the next row, or those of the mask that it is combined with."""
    blocks = AttentionMask.from_block_map(torch.zeros(2, 3) > 0, 16, 16)
    everything = AttentionMask.dense(torch.ones(70, 70) > 0)
    for mask, lengths in ((blocks, (33, 48)), (blocks, (32, 49)), (~blocks | everything, (70, 70))):
        with pytest.raises(ValueError, match=r"must be at most (32|48), what the blocks of from_block_map cover"):
            mask.compile(*lengths)
    assert not (blocks & AttentionMask.causal()).to_dense(32, 48).any()
    assert (~blocks).to_dense(20, 1).all()


def test_masks_are_saved_without_what_was_compiled(tmp_path: Path) -> None:
    mask = AttentionMask.from_block_map(torch.eye(2) > 0, 40, 40) & AttentionMask.key_padding(LENGTHS)
    compiled = mask.compile(70, 70)
    for value in (mask, compiled):
        torch.save(value, tmp_path / "mask.pt")
        for copied in (torch.load(tmp_path / "mask.pt", weights_only=True), copy.deepcopy(value)):
            dense = copied.to_dense(70, 70) if value is mask else copied.dense()
            assert torch.equal(dense, compiled.dense())
    assert not copy.deepcopy(mask)._maps and copy.deepcopy(mask).most_q == 80


CU = torch.tensor([0, 3, 7])


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: AttentionMask.packed(CU, total_q=7.0), TypeError, "packed: total_q must be int, got 7.0"),
        (lambda: AttentionMask.packed(CU, total_q=-1), ValueError, "packed: total_q must be at least 0, got -1"),
        (lambda: AttentionMask.packed(CU, total_k=6), ValueError, "packed: total_k must be at least 7, the last of"),
        (lambda: AttentionMask.packed(CU[1:]), ValueError, r"packed: cu_seqlens_q must start with 0 .* got \[3, 7\]"),
        (lambda: AttentionMask.packed(CU, CU.flip(0)), ValueError, "packed: cu_seqlens_k must start with 0 and never"),
        (lambda: AttentionMask.packed(CU[:0]), ValueError, "packed: cu_seqlens_q must have an entry"),
        (lambda: AttentionMask.segments(CU, CU.to("meta")), ValueError, "segments: ids_k must be on cpu, got a tensor on"),
        (lambda: AttentionMask.intervals(CU, CU.to("meta")), ValueError, "intervals: end must be on cpu"),
        (lambda: AttentionMask.groups(torch.eye(8) > 0, CU.to("meta")), ValueError, "groups: group_of_q must be on cpu"),
        (lambda: AttentionMask.segments(CU.to_sparse()), ValueError, "segments: ids_q must be dense, int"),
        (lambda: AttentionMask.keys(CU[None], 7), IndexError, r"keys: keys must be in \[-1, 7\), got 0 to 7"),
        (lambda: AttentionMask.keys(CU[None], 8.0), TypeError, "keys: Lk must be int, got 8.0"),
        (lambda: AttentionMask.keys(CU[None], -1), ValueError, "keys: Lk must be at least 0, got -1"),
        (lambda: AttentionMask.keys(CU[None] > 0, 7), ValueError, r"keys: keys must have Lk = 7 entries .* bool \[1, 3\]"),
        (lambda: AttentionMask.key_padding(torch.ones(2, 3).long()), ValueError, r"int \[B\] or bool \[B, Lk\] \(attention_mask"),
        (lambda: maskops.merge_attention(*[torch.ones(1, 1, 1).long()] * 4), ValueError, "merge_attention: out_a must be float"),
        (lambda: AttentionMask.causal().compile(3.0, 3), TypeError, "AttentionMask: Lq must be int, got 3.0"),
        (lambda: AttentionMask.causal().compile(3, 3, backend=[]), TypeError, "AttentionMask.compile: backend must be"),
        (lambda: AttentionMask.causal().to(torch.float32), TypeError, "AttentionMask.to: device must be a device"),
        (lambda: AttentionMask.causal().block_map(64.0, Lq=5, Lk=5), TypeError, "block_map: q_block must be int, got 64.0"),
        (lambda: AttentionMask.causal().plot(0, 5), ValueError, "AttentionMask.plot: the mask must have queries"),
        (lambda: AttentionMask.key_padding(CU.to("meta")).density(3, 3), ValueError, "compile: the mask must hold data"),
    ],
)  # fmt: skip
def test_errors_of_masks(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_block_maps_of_no_tokens() -> None:
    assert AttentionMask.causal().block_map(Lq=0, Lk=70).shape == (1, 1, 0, 2)
    assert AttentionMask.causal().block_map(64, 2**62, Lq=70, Lk=70).tolist() == [[[[1], [1]]]]
