"""ELECTRA (the Works check): every real token is told, samples give no gradient, telling all tokens teaches more.

Text is the names of characters, its 510 most frequent words and one id for the others.

    claim, each of seeds 0 and 1                                measured, one thread   broken
    held-out AUC of replaced against original tokens > 0.7      0.757, 0.765           0.506: discriminator not trained (weight 0)
    the same > .02 over a loss of the masked tokens only        0.706, 0.699           0: every token is masked tokens only
      (the "ELECTRA 15%" of the paper), equal steps
    distinct tokens of 19 draws over 126: 17.70                 exact                  19: without replacement

Seeds 2 and 3 had 0.768 and 0.756. It takes the time: seeds 0 to 3 had 0.725, 0.754, 0.709, 0.681 after 1500 steps at 4e-3. On the
topics of pydoc all tokens taught no more than the masked ones (0.694 and 0.701 against 0.699 and 0.702, windows of 16).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.models.electra import ELECTRA, ELECTRAConfig
from maskops.testing.works import character_names, train, word_ids

CONTEXT, WORDS, BATCH, STEPS = 16, 510, 128, 2400


def texts() -> tuple[Tensor, Tensor]:
    """Overlapping windows of nine tenths of the names, a comma behind each, and windows of the last tenth."""
    words = torch.tensor(word_ids([word for name in character_names() for word in (*name, ",")], WORDS))
    cut = len(words) * 9 // 10
    return words[:cut].unfold(0, CONTEXT, 1), words[cut:].unfold(0, CONTEXT, CONTEXT)


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive has a higher score than a negative."""
    rank = scores.argsort().argsort().double() + 1
    count = positive.sum().double()
    return ((rank[positive].sum() - count * (count + 1) / 2) / (count * (~positive).sum())).item()


def held_out_auc(seed: int, all_tokens: bool) -> float:
    torch.manual_seed(seed)
    model = ELECTRA(ELECTRAConfig(WORDS + 2, CONTEXT, dim=64, depth=1, heads=4))
    rows, new = texts()

    def loss(step: int) -> Tensor:
        tokens = rows[torch.randint(len(rows), (BATCH,))]
        out = model(tokens, seed=step)
        if all_tokens:
            return out.loss
        told = F.binary_cross_entropy_with_logits(out.logits[out.mask], (out.corrupted != tokens)[out.mask].float())
        return out.generator_loss + model.config.discriminator_weight * told

    train(model.parameters(), loss, STEPS, 6e-3)
    model.eval().requires_grad_(False)
    out = model(new, seed=99, generator=torch.Generator().manual_seed(99))
    return area_under_curve(out.logits.flatten(), (out.corrupted != new).flatten())


@pytest.mark.parametrize("seed", [0, 1])
def test_replaced_tokens_are_told_and_all_tokens_teach_more(seed: int) -> None:
    every, masked = held_out_auc(seed, True), held_out_auc(seed, False)
    assert every > 0.7 and every > masked + 0.02, (every, masked)


# ---------------------------------------------------------------- exact


def small(**change: float) -> tuple[ELECTRA, Tensor]:
    torch.manual_seed(0)
    return ELECTRA(ELECTRAConfig(50, 20, dim=32, depth=1, heads=4, **change)), torch.randint(49, (3, 20))


def test_the_discriminator_loss_is_over_every_real_token() -> None:
    model, tokens = small()
    lengths = torch.tensor([20, 11, 1])
    out = model(tokens, lengths, seed=0)
    grad = torch.autograd.grad(out.discriminator_loss, out.logits)[0]
    assert torch.equal(grad != 0, torch.arange(20) < lengths[:, None])


def test_no_gradient_goes_from_the_discriminator_to_the_generator() -> None:
    model, tokens = small()
    model(tokens, seed=0).discriminator_loss.backward()
    parts = (model.generator, model.generator_head, model.to_generator)
    assert all(p.grad is None for part in parts for p in part.parameters()) and model.generator_bias.grad is None
    assert model.embed.weight.grad is not None


def test_a_sample_that_is_right_counts_as_real() -> None:
    model, tokens = small()
    with torch.no_grad():
        model.generator_bias[7] = 1e4  # the generator always says 7
    tokens[:, ::2] = 7
    out = model(tokens, mask=torch.ones_like(tokens, dtype=torch.bool), seed=0)
    assert (out.corrupted == 7).all()
    told = torch.autograd.grad(out.discriminator_loss, out.logits)[0]
    assert torch.equal(told < 0, tokens != 7), "a gradient below 0 raises the logit: replaced"


def test_only_masked_tokens_change_and_the_mask_follows_the_published_draw() -> None:
    model, tokens = small()
    out = model(tokens, seed=0)
    assert torch.equal(out.corrupted[~out.mask], tokens[~out.mask])
    wide = ELECTRA(ELECTRAConfig(50, 128, dim=32, depth=1, heads=4))
    drawn = wide.draw_mask((4000, 126), generator=torch.Generator().manual_seed(0)).sum(1).double()
    slots = int(0.155 * 126)
    assert abs(drawn.mean() - 126 * (1 - (1 - 1 / 126) ** slots)) < 0.05, drawn.mean()
    lengths = torch.tensor([0, 1, 50])
    short = wide.draw_mask((3, 126), lengths)
    assert short[0].sum() == 0 and short[1].nonzero().tolist() == [[0]] and short[2, 50:].sum() == 0
