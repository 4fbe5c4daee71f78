"""CM3: moved spans come back exactly, gaps are filled from both sides (the Works check, in part).

Real documents, digits as 16 squares and their class; 500 steps each; new documents, over a left-only causal model of the same size.

    claim, mean of 2 seeds                              measured (each), one thread   broken
    NLL of hidden spans, left and right known, < 0.98   0.955 (0.975, 0.935)          1.17: right side of another document, which
      of left-only's, which knows the left alone                                        the test asks for, too (> 1.05)
    NLL of whole documents < 1.06 of left-only's        1.020 (1.027, 1.013)          3.20, seed 0: only moved tokens counted

Seed 2 had 0.964 and 1.031. In trials with seed 0 left-only was no better after 300 or 800 steps than after 500.

Not shown: the same on text. In trials with seed 0 hidden spans had 1.29 of left-only's NLL on letters of pydoc (windows of 10, 3000
steps), 1.05 on its words (windows of 16, 800 steps), and 1.22 on these digits when a token did not tell its square (800 steps). It
seems that so small a model does not learn in that time to look up what stands around a sentinel; tokens that tell their square make
that needless.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.models.cm3 import CM3, CM3Config
from maskops.testing.works import train

SEEDS = (0, 1)
LEVELS, SQUARES, STEPS, SPANS = 9, 16, 500, 1
N = SQUARES + 1


def documents() -> tuple[Tensor, Tensor]:
    """Digits as documents: the brightness of each of 4 x 4 squares, then the digit.  1400 and 397 rows, int64 [B, 17].

    A token tells its square as well, as a tag of a page tells what it is about: 9 brightnesses of each square.
    """
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, classes = torch.tensor(digits.images).float(), torch.tensor(digits.target)
    squares = F.avg_pool2d(images[:, None], 2).flatten(1).div(2).round().long() + LEVELS * torch.arange(SQUARES)
    rows = torch.cat([squares, LEVELS * SQUARES + classes[:, None]], 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:1400], rows[1400:]


def no_spans(count: int) -> Tensor:
    return torch.full((count, 1, 2), -1)


def pretrain(seed: int, moved: bool) -> CM3:
    torch.manual_seed(seed)
    config = CM3Config(LEVELS * SQUARES + 10, N + 2 * SPANS + 1, dim=64, depth=1, heads=4, max_spans=SPANS)
    model, (rows, _) = CM3(config), documents()

    def loss(step: int) -> Tensor:
        batch = rows[torch.randint(len(rows), (32,))]
        return model.loss(batch, spans=None if moved else no_spans(len(batch)), seed=step)

    train(model.parameters(), loss, STEPS, 6e-3)
    return model.requires_grad_(False)


def span_loss(model: CM3, text: Tensor, moved: bool, spans: Tensor) -> float:
    """Mean NLL of the tokens of spans: after all the rest of the document, or where they are, after what is left of them."""
    found = model.move(text, spans=spans if moved else no_spans(len(text)))
    inside = (found.source[:, :, None] >= spans[:, None, :, 0]) & (found.source[:, :, None] < spans[:, None, :, 1])
    return model.losses(found)[inside.any(2) & (found.source >= 0)].mean().item()


def plain_loss(model: CM3, text: Tensor) -> float:
    return model.loss(text, spans=no_spans(len(text))).item()


def other_right_sides(text: Tensor, spans: Tensor) -> Tensor:
    """What follows the first span is taken from the next document, spans excepted."""
    at = torch.arange(N)
    inside = ((at >= spans[:, :, :1]) & (at < spans[:, :, 1:])).any(1)
    return torch.where((at >= spans[:, 0, 1:]) & ~inside, text.roll(1, 0), text)


def test_gaps_are_filled_from_both_sides() -> None:
    _, new = documents()
    spans = maskops.draw_spans(torch.full((len(new),), N), max_spans=SPANS, seed=99)
    ratios = []
    for seed in SEEDS:
        both, left = pretrain(seed, True), pretrain(seed, False)
        before = span_loss(left, new, False, spans)
        ratios.append(
            [
                span_loss(both, new, True, spans) / before,
                span_loss(both, other_right_sides(new, spans), True, spans) / before,
                plain_loss(both, new) / plain_loss(left, new),
            ]
        )
    print(ratios)
    infill, misled, plain = torch.tensor(ratios).mean(0).tolist()
    assert infill < 0.98 and misled > 1.05 and plain < 1.06, ratios


# ---------------------------------------------------------------- exact


def sample(rows: int = 4, length: int = 24) -> tuple[CM3, Tensor, Tensor]:
    """A model of the published law, documents of bytes, and their lengths."""
    torch.manual_seed(0)
    model = CM3(CM3Config(256, length + 33, dim=32, depth=1, heads=4)).double()
    return model, torch.randint(256, (rows, length)), torch.randint(1, length + 1, (rows,))


def test_a_thousand_documents_come_back_exactly() -> None:
    model, text, lengths = sample(1000, 60)
    moved = model.move(text, lengths, seed=1)
    back, sizes = maskops.restore_spans(moved.ids, model.sentinels, lengths=moved.lengths, end_id=model.config.end_id)
    real = torch.arange(60) < lengths[:, None]
    assert torch.equal(sizes, lengths) and torch.equal(back[:, :60] * real, text * real)
    # Only where the one candidate is empty, in short documents, nothing moves.
    assert ((moved.lengths > lengths + 1) | (lengths < 16)).double().mean() > 0.95


def test_each_token_is_a_target_exactly_once_and_sentinels_never() -> None:
    model, text, lengths = sample()
    moved = model.move(text, lengths, seed=1)
    for b, length in enumerate(lengths.tolist()):
        targets = moved.source[b][moved.predicted[b]]
        assert torch.equal(targets[targets >= 0].sort().values, torch.arange(length)) and (targets < 0).sum() == 1
    hidden: list[Tensor] = []
    encode = model.encode
    model.encode = lambda tokens: (hidden.append(encode(tokens).detach().requires_grad_()), hidden[-1])[1]
    losses = model.losses(moved)
    reached = (torch.autograd.grad(losses.sum(), hidden[0])[0] != 0).any(-1)
    assert torch.equal(reached, moved.predicted[:, : reached.shape[1]])
    sentinel = moved.ids > model.config.end_id
    assert sentinel.any() and not moved.predicted[sentinel].any() and (losses[~moved.predicted] == 0).all()


def test_loss_is_the_mean_of_what_counts() -> None:
    model, text, lengths = sample()
    moved = model.move(text, lengths, seed=1)
    tokens = torch.cat([torch.full((4, 1), model.config.end_id), moved.ids[:, :-1]], 1)
    nll = -model(tokens).log_softmax(-1).gather(-1, moved.ids[:, :, None])[..., 0]
    want = nll[moved.predicted].mean()
    torch.testing.assert_close(model.loss(text, lengths, seed=1).double(), want, rtol=1e-9, atol=0)


def test_logits_do_not_depend_on_later_tokens() -> None:
    model, text, _ = sample()
    want = model(text)
    edited = text.clone()
    edited[0, 10] = (edited[0, 10] + 1) % 256
    changed = (model(edited) != want).any(-1)
    assert not changed[1:].any() and not changed[0, :10].any() and changed[0, 10:].all()


def test_spans_follow_the_published_law() -> None:
    """Simulated: 0.37 of a document moves, in 1.23 spans, one span in 0.82 of all documents."""
    spans = maskops.draw_spans(torch.full((20000,), 2048), seed=3)
    there = spans[:, :, 0] >= 0
    moved = torch.where(there, spans[:, :, 1] - spans[:, :, 0], 0).sum(1).double().mean() / 2048
    count = there.sum(1)
    found = moved.item(), count.double().mean().item(), (count == 1).double().mean().item()
    assert all(abs(a - b) < 0.02 for a, b in zip(found, (0.37, 1.23, 0.82), strict=True)), found


def test_infill_writes_the_likeliest_tokens_and_stops_at_the_end() -> None:
    model, text, _ = sample()
    config = model.config
    written = model.infill(text, 5, 9, most=4)
    assert torch.equal(written, model.infill(text.index_fill(1, torch.arange(5, 9), 7), 5, 9, most=4))
    gap, stop = torch.full((4, 1), config.end_id + 1), torch.full((4, 1), config.end_id)
    whole = torch.cat([stop, text[:, :5], gap, text[:, 9:], gap, written], 1)
    told = model(whole)[:, -5:-1, : config.end_id + 1].argmax(-1)
    over = (written == config.end_id).cumsum(1) > 0
    assert torch.equal(torch.where(over, config.end_id, told), written)
    model.head.weight.data.zero_()
    model.decoder.norm.bias.data.fill_(1)
    model.head.weight.data[config.end_id] = 1
    model.decoder.norm.weight.data.zero_()
    assert (model.infill(text, 5, 9, most=4) == config.end_id).all()


def test_errors() -> None:
    model, text, _ = sample()
    with pytest.raises(ValueError, match="tokens must have at most 57 a row, got 96"):
        model(text.repeat(1, 4))
    with pytest.raises(ValueError, match="max_spans must be in"):
        CM3Config(256, max_spans=65)
