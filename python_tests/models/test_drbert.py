"""DrBERT (the Works check): masks come off layer by layer, the decoder leaves a plain BERT behind and lowers the loss.

Text is the topics of pydoc, small letters and spaces, a byte a token. First weights, batches and masks are the same with and
without the decoder.

    claim, each of 2 seeds                                 measured, one thread       broken, seed 0
    held-out MLM loss with 2 decoder layers < 0.99 of      0.980, 0.978               1.000: head trained on the encoder
      the plain head's, at equal steps                                                  only (mix = 1)
    weight of hidden keys: 0 in layer 1, > 0 in layer 2    exact                      no key hidden; hidden in both layers

30 % of the tokens are masked, twice the published share: as many steps then teach more. The gain is that of a deeper network;
hiding no keys gives as much (0.981, 0.979, 0.975).
"""

import re
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops.models.byte_lm import Text
from maskops.models.drbert import DrBERT, DrBERTConfig
from maskops.ops.masked_attention import masked_attention
from maskops.testing.works import train

SEEDS = (0, 1)
CONTEXT, STEPS = 16, 600


def letters() -> Text:
    """The text in the ids 0 to 26."""
    text = re.sub("[^a-z]+", " ", " ".join(topics[name] for name in sorted(topics)).lower())
    return Text(bytes(" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text), CONTEXT - 1)


def held_out_loss(decoder_depth: int, seed: int, **change: float) -> float:
    torch.manual_seed(seed)
    model = DrBERT(DrBERTConfig(28, CONTEXT, 32, 1, 4, decoder_depth, mask_ratio=0.3, **change))
    text = letters()
    batches = text.batches(64, seed)

    def loss(step: int) -> Tensor:
        return model(next(batches), generator=torch.Generator().manual_seed(1000 * seed + step)).loss

    train(model.parameters(), loss, STEPS, 4e-3)
    model.eval().requires_grad_(False)
    new = torch.cat(list(text.held_out_batches(64, 40)))
    return model(new, generator=torch.Generator().manual_seed(99)).loss.item()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decoder_lowers_the_loss(seed: int) -> None:
    decoded, plain = held_out_loss(2, seed), held_out_loss(0, seed)
    assert decoded < 0.99 * plain, f"{decoded:.3f} with a decoder, {plain:.3f} without"


# ---------------------------------------------------------------- exact


def sample(**change: float) -> tuple[DrBERT, Tensor, maskops.TokenSplit]:
    """An untrained network, 4 texts of 32 tokens, 10 of each masked.  A head has 32 channels."""
    torch.manual_seed(0)
    model = DrBERT(DrBERTConfig(50, 32, 64, 2, 2, **change)).double().eval()
    return model, torch.randint(49, (4, 32)), maskops.random_masking(4, 32, num_keep=22, seed=0)


def hidden_of(split: maskops.TokenSplit) -> Tensor:
    """Every other masked token.  bool [B, N]."""
    return torch.zeros_like(split.mask).scatter(1, split.ids_mask[:, ::2], True)


def decoder_weights(model: DrBERT, x: Tensor, hidden: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """The weights of each decoder layer, [B, H, N, N], from the op itself: its values are the unit vectors, N = D / H."""
    found: list[Tensor] = []

    def record(block: nn.Module, arguments: tuple) -> None:
        x, mask = arguments
        q, k, v = block.attn.split_heads(block.norm1(x))
        found.append(masked_attention(q, k, torch.eye(32, dtype=v.dtype).expand_as(v).contiguous(), mask))

    hooks = [block.register_forward_pre_hook(record) for block in model.decoder]
    model.decode(x, hidden, lengths)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("lengths", [None, torch.tensor([32, 20, 31, 25])])
def test_hidden_keys_get_weight_in_the_second_layer_only(lengths: Tensor | None) -> None:
    model, _, split = sample()
    hidden = hidden_of(split)
    real = torch.arange(32) < (torch.full((4,), 32) if lengths is None else lengths)[:, None]
    first, second = decoder_weights(model, torch.randn(4, 32, 64, dtype=torch.float64), hidden, lengths)
    for weights, seen in ((first, real & ~hidden), (second, real)):
        seen = seen[:, None, None].expand_as(weights)
        assert (weights[~seen] == 0).all() and (weights[seen] > 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 32, dtype=torch.float64))


def test_a_hidden_token_reaches_others_through_the_second_layer_only() -> None:
    """The same in gradients: of one other token's output, by the layer's input."""
    model, _, split = sample()
    hidden = hidden_of(split)
    other = split.ids_keep[0, 0]
    for depth, reaches in ((1, ~hidden[0]), (2, torch.ones(32, dtype=torch.bool))):
        x = torch.randn(4, 32, 64, dtype=torch.float64, requires_grad=True)
        whole, model.decoder = model.decoder, model.decoder[:depth]
        model.decode(x, hidden)[0, other].square().sum().backward()
        model.decoder = whole
        assert torch.equal((x.grad[0] != 0).any(-1), reaches) and (x.grad[1:] == 0).all()


def test_only_masked_tokens_are_hidden_and_how_many_follows_the_rate() -> None:
    model, tokens, split = sample(hide=0.5)
    seen: list[Tensor] = []
    decode = model.decode
    model.decode = lambda x, hidden, lengths: (seen.append(hidden), decode(x, hidden, lengths))[1]
    for seed in range(50):
        model(tokens, split=split, generator=torch.Generator().manual_seed(seed))
    share = torch.stack(seen)[:, split.mask].double().mean().item()
    assert not torch.stack(seen)[:, ~split.mask].any() and abs(share - 0.5) < 0.05
    assert not torch.equal(seen[0], seen[1])


def test_the_decoder_can_be_dropped() -> None:
    """What is left is a plain BERT: PyTorch's own pre-norm encoder with the same weights."""
    model, tokens, _ = sample()
    c = model.config
    layer = nn.TransformerEncoderLayer(
        c.dim, c.heads, 4 * c.dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    plain = nn.TransformerEncoder(layer, c.depth, nn.LayerNorm(c.dim, 1e-6, dtype=torch.float64), False)
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj": "attn.proj",
        "linear": "mlp.fc",
        "layers": "blocks",
    }
    state = model.encoder.blocks.state_dict()
    renamed = {}
    for name in plain.state_dict():
        ours = name
        for old, new in names.items():
            ours = ours.replace(old, new)
        renamed[name] = state.pop(ours)
    assert not state, "nothing of the decoder is in the encoder"
    plain.load_state_dict(renamed)
    want = plain.eval()(model.encoder.embed(tokens) + model.encoder.positions)
    without, _, _ = sample(decoder_depth=0)
    without.encoder.load_state_dict(model.encoder.state_dict())
    del model.decoder, model.head
    torch.testing.assert_close(model.encoder(tokens), want, rtol=0, atol=1e-12)
    assert torch.equal(model.encoder(tokens), without.encoder(tokens))


def test_loss_is_over_the_masked_tokens() -> None:
    model, tokens, _ = sample()
    lengths = torch.tensor([32, 20, 31, 0])
    out = model(tokens, lengths, generator=torch.Generator().manual_seed(0))
    assert out.split.num_mask.tolist() == [5, 3, 5, 0], "15 %, rounded"
    real = out.split.ids_mask >= 0
    labels = tokens.gather(1, out.split.ids_mask.clamp_min(0))[real]
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[real].float(), labels))
    out.logits.retain_grad()
    out.loss.backward()
    assert torch.equal((out.logits.grad != 0).any(-1), real)
    assert all((p.grad != 0).any() for p in model.parameters()), "every part learns"


def test_no_masked_token_gives_loss_0() -> None:
    model, tokens, _ = sample(mask_ratio=0.0)
    out = model(tokens)
    assert out.loss.item() == 0 and out.logits.shape == (4, 0, 50)


def test_eighty_ten_ten() -> None:
    model, _, _ = sample()
    tokens = torch.randint(49, (400, 32))
    split = maskops.random_masking(400, 32, num_keep=22, seed=0)
    corrupted = model.corrupt(tokens, split, torch.Generator().manual_seed(0))
    assert torch.equal(corrupted[~split.mask], tokens[~split.mask])
    masked, same = corrupted[split.mask] == model.config.mask_id, corrupted[split.mask] == tokens[split.mask]
    assert abs(masked.double().mean() - 0.8) < 0.02 and abs(same.double().mean() - 0.1 - 0.1 / 49) < 0.02


def test_the_head_reads_the_encoder_for_a_share_of_tokens_in_training_only() -> None:
    model, tokens, split = sample(mix=0.3)
    inputs: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model.decode = lambda x, hidden, lengths: torch.zeros_like(x)
    for _ in range(50):
        model.train()(tokens, split=split)
    share = (torch.stack(inputs) != 0).any(-1).double().mean().item()
    assert abs(share - 0.3) < 0.05
    model.eval()(tokens, split=split)
    assert (inputs[-1] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hide": 1.5}, r"DrBERTConfig: hide must be in \[0, 1\], got 1.5"),
        ({"mask_ratio": -0.1}, r"DrBERTConfig: mask_ratio must be in \[0, 1\], got -0.1"),
        ({"vocabulary": 1}, "DrBERTConfig: vocabulary must be at least 2, got 1"),
    ],
)
def test_config_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrBERTConfig(**{"vocabulary": 8, **change})


def test_errors() -> None:
    model, _, _ = sample()
    with pytest.raises(ValueError, match="DrBERT: tokens must have at most 32 a row, got 33"):
        model(torch.zeros(2, 33, dtype=torch.long))
