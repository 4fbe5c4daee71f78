"""Arguments that once crashed a kernel, overflowed or were silently taken for something else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import maskops
from maskops.nn import BitmaskLinear, NMLinear, SoftNMLinear
from maskops.testing import op_of

LARGEST = 2**63 - 1
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def loss(backend: str, channels: int, norm_pix: bool, num_mask: int) -> tuple[torch.Tensor, torch.Tensor]:
    args = torch.ones(1, 4, 4 * channels), torch.zeros(1, channels, 4, 4), torch.arange(4)[None], torch.tensor([1])
    return op_of(backend, "masked_loss_patch")(*args, torch.tensor([num_mask]), [2, 2], norm_pix, "l2", 1.0, "masked")


@BACKENDS
def test_count_near_the_largest_int(backend: str) -> None:
    """num_keep + num_mask wraps around, and no patch would count."""
    with pytest.raises(ValueError, match=r"num_mask\[0\] must be at least 0 and num_keep \+ num_mask at most 4"):
        loss(backend, 1, True, LARGEST)


@BACKENDS
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_without_channels(backend: str, norm_pix: bool) -> None:
    """The mean over no values is NaN, as in PyTorch."""
    per_patch, _ = loss(backend, 0, norm_pix, 3)
    assert per_patch[0, 0] == 0
    assert per_patch[0, 1:].isnan().all()


@BACKENDS
@pytest.mark.parametrize("size", [-1, -(2**63)])
def test_negative_size_of_a_gradient(backend: str, size: int) -> None:
    no_ids, no_counts = torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="gather_tokens: N must be at least 0"):
        op_of(backend, "_visible_tokens_gather_backward")(torch.zeros(0, 1, 2), no_ids, size)
    with pytest.raises(ValueError, match="restore_tokens: num_slots must be at least 0"):
        op_of(backend, "_visible_tokens_restore_backward")(
            torch.zeros(0, 1, 2), no_ids, no_counts, size, 0, 1, False, True, True
        )


@BACKENDS
def test_lengths_are_checked_before_anything_is_allocated(backend: str) -> None:
    counts, lengths = torch.tensor([1]), torch.tensor([2**62])
    with pytest.raises(ValueError, match=r"lengths\[0\] must be in \[0, 4\], got 4611686018427387904"):
        op_of(backend, "mask_sampling_uniform")(torch.tensor([1, 2]), counts, lengths, None, 4, 1, 2**62, False)


@BACKENDS
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to_mkldnn()], ids=["sparse", "mkldnn"])
def test_only_dense_tensors(backend: str, change: Callable) -> None:
    with pytest.raises(ValueError, match="gather_tokens: x must be a dense tensor"):
        op_of(backend, "visible_tokens_gather")(change(torch.zeros(1, 4, 2)), torch.tensor([[0]]))


IMAGES, SPLIT = torch.zeros(1, 1, 4, 4), maskops.split_tokens(torch.tensor([[True, False, True, False]]))


@pytest.mark.parametrize(
    "call,argument",
    [
        (lambda: maskops.random_masking(1, 4, 0.5, seed=1.5), "seed"),
        (lambda: maskops.random_masking(1, 4, num_keep=1.5), "num_keep"),
        (lambda: maskops.random_masking(1.0, 4, 0.5), "B"),
        (lambda: maskops.gather_tokens(None, SPLIT.ids_keep), "x"),
        (lambda: maskops.gather_tokens(torch.zeros(1, 4, 2), None), "ids"),
        (lambda: maskops.restore_tokens(torch.zeros(1, 2, 2), SPLIT, None), "fill"),
        (lambda: maskops.patchify(IMAGES, 2.0), "patch_size"),
        (lambda: maskops.patchify(IMAGES, (2, 2.0)), "patch_size"),
        (lambda: maskops.unpatchify(torch.zeros(1, 4, 4), 2, 4), "image_size"),
        (lambda: maskops.masked_patch_loss(None, IMAGES, SPLIT, 2), "pred"),
    ],
)
def test_wrong_kind_of_argument(call: Callable, argument: str) -> None:
    with pytest.raises(TypeError, match=f": {argument} must be "):
        call()


@BACKENDS
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_errors_of_a_split_name_it_and_its_arguments(backend: str, order: str) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])

    def split(**options: object) -> maskops.TokenSplit:
        return maskops.split_tokens(mask, order=order, backend=backend, **options)

    assert split(max_seqlen=2, max_masked=2).ids_keep.shape == (2, 2)
    for options, message in (
        ({"max_seqlen": 1}, r"kept tokens of mask\[0\] must be at most max_seqlen = 1, got 2"),
        ({"max_masked": 1}, r"masked tokens of mask\[1\] must be at most max_masked = 1, got 2"),
        ({"max_seqlen": -1}, "max_seqlen must be at least 0, got -1"),
        ({"max_seqlen": 2**70}, "max_seqlen must fit in 64 bits"),
    ):
        with pytest.raises(ValueError, match=f"^split_tokens: {message}"):
            split(**options)
    for options in ({"max_seqlen": 2.0}, {"max_masked": "2"}, {"seed": [None]}, {"seed": 1.5}, {"generator": 3}):
        with pytest.raises(TypeError, match=f"^split_tokens: {next(iter(options))} must be "):
            split(**options)
    for wrong, error in (("cuda", ValueError), (None, TypeError), ([None], TypeError)):
        with pytest.raises(error, match=r"^split_tokens: backend must be one of"):
            maskops.split_tokens(mask, order=order, backend=wrong)


WEIGHT = maskops.nm_compress(torch.tensor([[0.0, 3.0, 0.0, 4.0]]), 2, 4)
ROW, BYTE, ZERO = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([0])
QUERY = torch.ones(1, 1, 2, 4)
TENSOR, OPTIONAL, INT, NUMBER, FLAG = "x", [None], 4.0, "1", 1  # a value that is none of these
GOOD = {
    "nm_mask": ({"scores": ROW, "n": 2, "m": 4}, {"scores": TENSOR, "n": INT, "m": INT, "dim": INT, "transposable": FLAG}),
    "nm_compress": ({"weight": ROW * 0, "n": 2, "m": 4}, {"weight": TENSOR, "n": INT, "m": INT}),
    "nm_linear": ({"x": ROW, "weight": WEIGHT}, {"x": TENSOR, "weight": TENSOR, "bias": OPTIONAL}),
    "pack_bitmask": ({"mask": ROW > 0}, {"mask": TENSOR}),
    "bitmask_linear": (
        {"x": ROW, "weight": ROW, "bitmask": BYTE},
        {"x": TENSOR, "weight": TENSOR, "bitmask": TENSOR, "bias": OPTIONAL, "scores": OPTIONAL},
    ),
    "nm_soft_linear": (
        {"x": ROW, "weight": ROW, "logits": torch.zeros(1, 1, 6), "n": 2, "m": 4, "tau": 1.0},
        {"x": TENSOR, "weight": TENSOR, "logits": TENSOR, "n": INT, "m": INT, "tau": NUMBER, "scale": NUMBER, "hard": FLAG,
         "seed": INT, "generator": OPTIONAL},
    ),
    "random_masking": (
        {"B": 1, "N": 4, "mask_ratio": 0.5},
        {"B": INT, "N": INT, "mask_ratio": NUMBER, "max_seqlen": INT, "generator": OPTIONAL, "device": OPTIONAL},
    ),
    "restore_tokens": (
        {"x_keep": torch.ones(1, 2, 2), "split": SPLIT, "fill": torch.zeros(2)},
        {"x_keep": TENSOR, "split": OPTIONAL, "fill": TENSOR, "pos": OPTIONAL, "prefix": INT},
    ),
    "masked_attention": (
        {"q": QUERY, "k": QUERY, "v": QUERY},
        {"q": TENSOR, "k": TENSOR, "v": TENSOR, "mask": TENSOR, "bias": OPTIONAL, "scale": NUMBER, "dropout_p": NUMBER,
         "return_lse": FLAG, "return_entropy": FLAG, "enable_gqa": FLAG},
    ),
    "pack_tokens": ({"x": torch.ones(1, 4, 2), "split": SPLIT}, {"x": TENSOR, "split": OPTIONAL, "total": INT}),
    "unpack_tokens": (
        {"packed": torch.ones(2, 2), "split": SPLIT, "fill": torch.zeros(2)},
        {"packed": TENSOR, "split": OPTIONAL, "fill": TENSOR},
    ),
    "masked_patch_loss": (
        {"pred": torch.ones(1, 4, 4), "images": IMAGES, "split": SPLIT, "patch_size": 2},
        {"pred": TENSOR, "images": TENSOR, "split": OPTIONAL, "patch_size": OPTIONAL, "norm_pix": FLAG, "beta": NUMBER,
         "kind": OPTIONAL, "on": OPTIONAL},
    ),
    "linear_cross_entropy": (
        {"hidden": ROW, "weight": ROW, "target": ZERO},
        {"hidden": TENSOR, "weight": TENSOR, "target": TENSOR, "mask": TENSOR, "ids": TENSOR, "bias": OPTIONAL,
         "ignore_index": INT, "label_smoothing": NUMBER, "weight_per_token": TENSOR, "temperature": NUMBER, "cosine": FLAG,
         "z_loss": NUMBER, "reduction": OPTIONAL, "denominator": OPTIONAL},
    ),
    "linear_sample": (
        {"hidden": ROW, "weight": ROW, "target": ZERO},
        {"hidden": TENSOR, "temperature": NUMBER, "sample_temperature": NUMBER, "seed": INT, "generator": OPTIONAL},
    ),
    "masked_regression": (
        {"pred": ROW, "target": ROW},
        {"pred": TENSOR, "target": TENSOR, "mask": TENSOR, "kind": OPTIONAL, "normalise": FLAG, "denominator": OPTIONAL,
         "beta": NUMBER, "eps": NUMBER, "weight_per_token": TENSOR, "reduction": OPTIONAL},
    ),
    "contrastive_loss": (
        {"query": ROW, "keys": ROW, "positives": ZERO, "negatives_ids": ZERO[None]},
        {"query": TENSOR, "keys": TENSOR, "positives": TENSOR, "negatives_ids": TENSOR, "temperature": NUMBER, "collide": FLAG,
         "cosine": FLAG, "weight_per_token": TENSOR, "reduction": FLAG},
    ),
    "linear_max_pool": (
        {"hidden": ROW[None], "weight": ROW},
        {"hidden": TENSOR, "weight": TENSOR, "bias": OPTIONAL, "mask": TENSOR},
    ),
    "corrupt_tokens": (
        {"ids": ZERO[None], "mask": ZERO[None] > 0, "mask_id": 9, "vocabulary": 9},
        {"ids": TENSOR, "mask": TENSOR, "mask_id": INT, "vocabulary": INT, "hide": NUMBER, "random": NUMBER, "seed": INT},
    ),
    "group_masking": ({"groups": ZERO[None], "mask_ratio": 0.5}, {"groups": TENSOR, "weight": TENSOR, "num_groups": INT}),
    "span_masking": ({"B": 1, "N": 9, "mask_prob": 0.5}, {"B": INT, "span": INT, "replacement": FLAG, "lengths": TENSOR}),
    "modality_masking": ({"B": 1, "sizes": (2, 3), "num_keep": 2}, {"B": INT, "sizes": 4.0, "generator": OPTIONAL}),
    "cell_masking": ({"B": 1, "grid": (4, 4), "cell": 2, "mask_ratio": 0.5}, {"cell": INT, "grid": INT, "device": OPTIONAL}),
    "sample_gates": ({"logits": ROW}, {"logits": TENSOR, "seed": INT}),
}  # fmt: skip


@pytest.mark.parametrize("function,argument", [(f, a) for f, (_, wrong) in GOOD.items() for a in wrong])
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_wrong_type_of_every_argument(backend: str, function: str, argument: str) -> None:
    """None, or a list with None in it, is refused by maskops itself: the dispatcher names no argument of the public function."""
    good, wrong = GOOD[function]
    getattr(maskops, function)(**good, backend=backend)
    # Of a sequence its second element is named.
    sequences = {"sizes", "grid", "cell", "vocabulary"}
    values = (
        [wrong[argument]]
        + [[1, None]] * (argument not in sequences)
        + ([None] if argument in good and argument != "mask_ratio" else [])
    )
    for value in values:
        with pytest.raises(TypeError, match=rf"^{function}: {argument} must be .*, got "):
            getattr(maskops, function)(**{**good, argument: value}, backend=backend)


def test_parts_of_tuples_are_checked() -> None:
    with pytest.raises(TypeError, match=r"pack_tokens: split.ids_restore must be a tensor, got NoneType"):
        maskops.pack_tokens(torch.ones(1, 4, 2), SPLIT._replace(ids_restore=None))
    for part, value in {"values": None, "indices": None, "n": 2.0, "K": None}.items():
        with pytest.raises(TypeError, match=f"nm_linear: weight.{part} must be "):
            maskops.nm_linear(ROW, WEIGHT._replace(**{part: value}))
    with pytest.raises(TypeError, match=r"NMWeight.to_dense: values must be a tensor, got NoneType"):
        WEIGHT._replace(values=None).to_dense()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SoftNMLinear(None, 8, 2, 4), TypeError, "SoftNMLinear: in_features must be int, got None"),
        (lambda: SoftNMLinear(8, -1, 2, 4), ValueError, "SoftNMLinear: out_features must be at least 0, got -1"),
        (lambda: BitmaskLinear(8.0, 8), TypeError, "BitmaskLinear: in_features must be int, got 8.0"),
        (lambda: NMLinear(WEIGHT._replace(K=12)), ValueError, "NMLinear: values must have shape"),
        (lambda: NMLinear.from_dense(None, 2, 4), TypeError, "NMLinear: linear must be an nn.Linear, got NoneType"),
        (
            lambda: NMLinear.from_dense(nn.Linear(8, 2), 2, 4, mask=torch.ones(3, 8) > 0),
            ValueError,
            r"NMLinear: mask must have shape \[N, K\] = \[2, 8\], got bool \[3, 8\]",
        ),
        (lambda: BitmaskLinear(8, 2).set_mask(None), TypeError, "BitmaskLinear: mask must be a tensor, got NoneType"),
        (
            lambda: BitmaskLinear(8, 2).set_mask(torch.ones(3, 8) > 0),
            ValueError,
            r"BitmaskLinear: mask must expand to \[N, K\] = \[2, 8\], got bool \[3, 8\]",
        ),
        (
            lambda: BitmaskLinear(8, 2).load_state_dict(
                {**BitmaskLinear(8, 2).state_dict(), "bitmask": torch.zeros(2, 1)}
            ),
            RuntimeError,
            r"bitmask: must be uint8, got float32 \[2, 1\]",
        ),
        (lambda: maskops.explain("nm_linear", torch.ones(1, 8)), TypeError, "nm_linear: weight must be an NMWeight"),
        (lambda: maskops.explain(["nm_linear"]), ValueError, "explain: op must be one of"),
    ],
)
def test_modules_refuse_what_is_no_layer(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_flat_weight_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"embed_patches: weight must have shape \[E, V\] = \[\*, 4\]"):
        maskops.embed_patches(IMAGES, torch.zeros(3, 5), None, 2)


def test_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert maskops.patchify(IMAGES, numpy.int64(2)).shape == (1, 4, 4)
    same = maskops.random_masking(numpy.int64(1), 4, 0.5, seed=numpy.int64(3))
    assert torch.equal(same.ids_keep, maskops.random_masking(1, 4, 0.5, seed=3).ids_keep)


def test_forward_mode_is_refused_and_not_zero() -> None:
    x, ids, token = torch.randn(2, 4, 3), torch.tensor([[0, 1], [2, 3]]), torch.randn(3)
    split = maskops.random_masking(2, 4, num_keep=2, seed=0)
    calls = {
        "x": lambda x: maskops.gather_tokens(x, ids),
        "fill": lambda fill: maskops.restore_tokens(x[:, :2], split, fill),
        "pred": lambda pred: maskops.masked_patch_loss(pred, torch.randn(2, 3, 2, 2), split, 1),
    }
    for (name, call), primal in zip(calls.items(), (x, token, x), strict=True):
        with pytest.raises(NotImplementedError, match=f"forward-mode derivatives are not implemented, and {name} has"):
            torch.func.jvp(call, (primal,), (torch.ones_like(primal),))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="x has a tangent"):
            maskops.gather_tokens(dual, ids)
        # What has no tangent, and what has no derivative, is as ever.
        assert maskops.gather_tokens(x, ids).shape == (2, 2, 3)
        assert torch.equal(maskops.random_masking(2, 4, num_keep=2, noise=dual[..., 0]).num_keep, torch.tensor([2, 2]))


def test_a_compiled_mask_is_of_some_lengths() -> None:
    compiled = maskops.AttentionMask.causal().compile(3, 2)
    with pytest.raises(ValueError, match="masked_attention: mask must be of 2 queries and 2 keys, got 3 and 2"):
        maskops.masked_attention(QUERY, QUERY, QUERY, compiled)
    with pytest.raises(TypeError, match=r"masked_attention: mask.tiles must be a tensor, got NoneType"):
        maskops.masked_attention(QUERY, QUERY, QUERY, compiled._replace(tiles=None, Lq=2))


def test_a_mask_is_an_input_of_an_exported_program(tmp_path: Path) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, mask: maskops.AttentionMask) -> torch.Tensor:
            return maskops.masked_attention(q, q, q, mask)

    mask = maskops.AttentionMask.key_padding(torch.tensor([1]))
    torch.export.save(torch.export.export(Attend(), (QUERY, mask)), tmp_path / "attend.pt2")
    again = torch.export.load(tmp_path / "attend.pt2").module()
    assert torch.equal(again(QUERY, mask), Attend()(QUERY, mask))


LOGITS, ALONE = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
DRAWN = {
    "random_masking": lambda **seeds: maskops.random_masking(2, 16, 0.5, **seeds),
    "block_masking": lambda **seeds: maskops.block_masking(2, (4, 4), 8, **seeds),
    "draw_spans": lambda **seeds: maskops.draw_spans(torch.tensor([40]), **seeds),
    "confidence_select": lambda **seeds: maskops.confidence_select(LOGITS, ALONE, 1, **seeds),
    "linear_sample": lambda **seeds: maskops.linear_sample(
        torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), **seeds
    ),
}


@pytest.mark.parametrize("function", DRAWN)
def test_a_generator_beside_a_seed_is_refused(function: str) -> None:
    """It was ignored: the caller believes that one draws, and the other does."""
    DRAWN[function](seed=1)
    DRAWN[function](generator=torch.Generator())
    with pytest.raises(ValueError, match=f"^{function}: seed and generator must not both be given"):
        DRAWN[function](seed=0, generator=torch.Generator())
