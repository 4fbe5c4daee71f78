"""What is special to visible_tokens: hand-computed cases, invariances, properties of random shapes, parity with MAE's idiom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maskops
from maskops.nn import PatchEmbed, TokenRestore

SIZES = st.integers(0, 40)


def mae_random_masking(x: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The published way: two sorts and a gather with an index of the whole size."""
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(dim=1, stable=True)
    ids_keep = shuffle[:, :keep]
    return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2])), restore, ids_keep


def mae_restore(kept: Tensor, restore: Tensor, token: Tensor, pos: Tensor) -> Tensor:
    batch, tokens = restore.shape
    filled = token.expand(batch, tokens + 1 - kept.shape[1], -1)
    body = torch.cat([kept[:, 1:], filled], 1).gather(1, restore[:, :, None].expand(-1, -1, kept.shape[2]))
    return torch.cat([kept[:, :1], body], 1) + pos


def test_equals_the_published_masking_and_restore() -> None:
    x, noise, pos, token = torch.randn(4, 196, 64), torch.rand(4, 196), torch.randn(197, 64), torch.randn(64)
    split = maskops.random_masking(4, 196, 0.75, noise=noise)
    kept, restore, ids_keep = mae_random_masking(x, noise, 49)
    assert torch.equal(split.ids_keep, ids_keep) and torch.equal(split.ids_restore, restore)
    assert torch.equal(maskops.gather_tokens(x, split.ids_keep), kept)
    with_class = torch.cat([torch.randn(4, 1, 64), kept], 1)
    ours = maskops.restore_tokens(with_class, split, token, pos=pos, prefix=1)
    assert torch.equal(ours, mae_restore(with_class, restore, token, pos))


def test_split_by_hand() -> None:
    split = maskops.split_tokens(torch.tensor([[True, False, True], [False, False, False], [True, True, True]]))
    assert split.ids_keep.tolist() == [[1, -1, -1], [0, 1, 2], [-1, -1, -1]]
    assert split.ids_mask.tolist() == [[0, 2, -1], [-1, -1, -1], [0, 1, 2]]
    assert split.ids_restore.tolist() == [[1, 0, 2], [0, 1, 2], [0, 1, 2]]
    assert split.num_keep.tolist() == [1, 3, 0] and split.num_mask.tolist() == [2, 0, 3]
    assert split.cu_seqlens.tolist() == [0, 1, 4, 4] and split.max_seqlen == 3 and split.total == 4
    assert split.mask.tolist() == [[True, False, True], [False] * 3, [True] * 3]


def test_split_with_bounds_asks_the_device_nothing() -> None:
    mask = torch.rand(3, 20) < 0.5
    bounded = maskops.split_tokens(mask, max_seqlen=20)
    exact = maskops.split_tokens(mask)
    assert bounded.total is None and bounded.ids_keep.shape == (3, 20)
    assert torch.equal(bounded.ids_keep[:, : exact.max_seqlen], exact.ids_keep)
    assert (bounded.ids_keep[:, exact.max_seqlen :] == -1).all()


def test_split_in_random_order_keeps_the_sets() -> None:
    mask = torch.rand(5, 50) < 0.6
    plain, shuffled = maskops.split_tokens(mask), maskops.split_tokens(mask, order="random", seed=3)
    again = maskops.split_tokens(mask, order="random", generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain.ids_keep.sort(1).values, shuffled.ids_keep.sort(1).values)
    assert not torch.equal(plain.ids_keep, shuffled.ids_keep) and not torch.equal(again.ids_keep, shuffled.ids_keep)
    assert torch.equal(shuffled.mask, mask)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(0, 5), tokens=SIZES, channels=st.integers(0, 33), seed=st.integers(0, 2**31))
def test_restore_undoes_gather(batch: int, tokens: int, channels: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=g) < torch.rand(batch, 1, generator=g)
    x, fill = torch.randn(batch, tokens, channels, generator=g), torch.randn(channels, generator=g)
    split = maskops.split_tokens(mask)
    expected = torch.where(mask[:, :, None], fill, x)
    assert torch.equal(maskops.restore_tokens(maskops.gather_tokens(x, split.ids_keep), split, fill), expected)
    packed = maskops.pack_tokens(x, split)
    assert packed.shape == (int((~mask).sum()), channels) and torch.equal(packed, x[~mask])
    assert torch.equal(maskops.unpack_tokens(packed, split, fill), expected)
    masked = maskops.gather_tokens(x, split.ids_mask)
    assert torch.equal(masked[split.ids_mask >= 0], x[mask])


@settings(max_examples=60, deadline=None)
@given(grid=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=2, max_size=3), channels=st.integers(1, 4),
       last=st.booleans(), seed=st.integers(0, 2**31))  # fmt: skip
def test_unpatchify_undoes_patchify(grid: list[tuple[int, int]], channels: int, last: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    patch, size = [p for _, p in grid], [n * p for n, p in grid]
    images = torch.randn(2, channels, *size, generator=g)
    patches = maskops.patchify(images, patch, channels_last_patch=last)
    assert torch.equal(maskops.unpatchify(patches, patch, size, channels_last_patch=last), images)
    split = maskops.random_masking(2, patches.shape[1], 0.5, seed=seed)
    chosen = maskops.patchify(images, patch, split.ids_keep, channels_last_patch=last)
    assert torch.equal(chosen, maskops.gather_tokens(patches, split.ids_keep))


def test_embed_equals_convolution_then_gather() -> None:
    conv, images = torch.nn.Conv2d(3, 96, 16, 16), torch.randn(2, 3, 64, 80)
    ids, pos = maskops.random_masking(2, 20, 0.75, seed=0).ids_keep, torch.randn(20, 96)
    everything = conv(images).flatten(2).transpose(1, 2) + pos
    expected = everything.gather(1, ids[:, :, None].expand(-1, -1, 96))
    ours = maskops.embed_patches(images, conv.weight, conv.bias, 16, ids, pos)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    flat = maskops.embed_patches(images, conv.weight.flatten(1), conv.bias, 16, ids, pos)
    assert torch.equal(flat, ours)


def test_images_in_channels_last_memory() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(maskops.patchify(images.to(memory_format=torch.channels_last), 4), maskops.patchify(images, 4))


def test_fully_masked_sample_gets_no_gradient_and_pads_are_zero() -> None:
    split = maskops.split_tokens(torch.tensor([[True, True], [False, True]]))
    x = torch.randn(2, 2, 3, requires_grad=True)
    kept = maskops.gather_tokens(x, split.ids_keep)
    assert kept[0].abs().sum() == 0
    kept.sum().backward()
    assert x.grad[0].abs().sum() == 0 and torch.equal(x.grad[1], torch.tensor([[1.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8), (8,)])
def test_mask_token_may_have_leading_ones(shape: tuple[int, ...]) -> None:
    split = maskops.random_masking(2, 6, 0.5, seed=0)
    token = torch.randn(shape, requires_grad=True)
    out = maskops.restore_tokens(torch.zeros(2, 3, 8), split, token, pos=torch.zeros(1, 6, 8))
    out.sum().backward()
    assert token.grad.shape == token.shape and torch.equal(token.grad, torch.full(shape, 6.0))


def test_modules_hold_parameters_and_call_the_ops() -> None:
    embed, restore = PatchEmbed(4, 3, 24), TokenRestore(24, prefix=0)
    split = maskops.random_masking(2, 16, 0.5, seed=0)
    out = restore(embed(torch.randn(2, 3, 16, 16), split.ids_keep), split)
    assert out.shape == (2, 16, 24) and "dim=24" in repr(embed) and "prefix=0" in repr(restore)
    out.sum().backward()
    assert all(p.grad is not None for p in [*embed.parameters(), *restore.parameters()])
    video = PatchEmbed((2, 4, 4), 3, 24, axes=3)
    assert video(torch.randn(1, 3, 4, 8, 8)).shape == (1, 8, 24)


@pytest.mark.parametrize(
    "bad", [{"patch_size": 5}, {"ids": torch.zeros(1, 1, dtype=torch.int32)}, {"ids": torch.full((2, 1), 4)}]
)
def test_public_errors_name_the_argument(bad: dict) -> None:
    arguments = {"images": torch.ones(2, 1, 4, 4), "patch_size": 2, "ids": torch.zeros(2, 1, dtype=torch.int64)} | bad
    with pytest.raises((ValueError, IndexError), match=f"patchify: {next(iter(bad))}"):
        maskops.patchify(**arguments)


def test_large_offsets_do_not_wrap() -> None:
    """More than 2^31 elements in x, of which a few rows are read: 32-bit offsets would read elsewhere."""
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16).expand(1, 70_000, 32_768)
    probe = torch.as_strided(torch.zeros(70_000 + 32_768, dtype=torch.bfloat16), (1, 70_000, 32_768), (0, 1, 1))
    probe[0, 69_999, 32_767] = 5
    out = maskops.gather_tokens(probe, torch.tensor([[69_999]]))
    assert out[0, 0, -1] == 5 and out.sum() == 5 and x.shape == probe.shape
