"""MAE: equal to transformers' ViTMAE in loss, outputs and gradients; and it learns (the Works check)."""

import dataclasses

import pytest
import torch
from torch import Tensor

import maskops
from maskops.models import mae
from maskops.models.mae import MAE, MAEConfig, MAEOutput
from maskops.nn.transformer import sincos_positions

transformers = pytest.importorskip("transformers")
from transformers.models.vit_mae import modeling_vit_mae  # noqa: E402

CONFIGS = {
    "square": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
                   decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
                   decoder_intermediate_size=64, norm_pix_loss=True),
    "wide decoder, no qkv bias": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                      image_size=48, patch_size=16, decoder_hidden_size=64, decoder_num_hidden_layers=3,
                                      decoder_num_attention_heads=4, decoder_intermediate_size=96, qkv_bias=False, mask_ratio=0.5),
    "one channel, tanh gelu": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
                                   image_size=28, patch_size=4, num_channels=1, decoder_hidden_size=32,
                                   decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64,
                                   hidden_act="gelu_new", layer_norm_eps=1e-6, norm_pix_loss=True, mask_ratio=0.9),
}  # fmt: skip
TINY = MAEConfig(
    image_size=32, patch_size=8, dim=64, depth=2, heads=4, mlp_dim=128, decoder_dim=48, decoder_depth=1, decoder_heads=4,
    decoder_mlp_dim=96, norm_pix=False,
)  # fmt: skip


def make_hf(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    hf = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**CONFIGS[name])).double()
    with torch.no_grad():
        # Untrained, biases and mask token are 0 or tiny and position tables may be 0: errors in them would not show.
        for p in hf.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return hf


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_transformers(name: str) -> None:
    hf = make_hf(name)
    ours = MAE.from_hf(hf)
    config = ours.config
    images = torch.randn(3, config.channels, *config.image_hw, dtype=torch.float64)
    noise = torch.rand(3, config.num_patches, dtype=torch.float64)
    theirs, out = hf(images, noise=noise), ours(images, noise)
    torch.testing.assert_close(out.loss, theirs.loss, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(out.pred, theirs.logits, rtol=1e-6, atol=1e-8)
    assert torch.equal(out.split.mask, theirs.mask.bool())
    assert torch.equal(out.split.ids_restore, theirs.ids_restore)
    out.loss.backward()
    theirs.loss.backward()
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    wanted = mae.state_from_hf({name: p.grad for name, p in hf.named_parameters() if p.requires_grad})
    assert set(wanted) == trained
    for parameter in trained:
        torch.testing.assert_close(ours.get_parameter(parameter).grad, wanted[parameter], rtol=1e-5, atol=1e-8)


def test_float32_and_full_encoder_equal_to_transformers() -> None:
    hf = make_hf("square").float().eval()
    ours = MAE.from_hf(hf)
    assert not ours.training
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.testing.assert_close(ours(images, noise).loss, hf(images, noise=noise).loss, rtol=1e-5, atol=1e-6)
    hf.vit.config.mask_ratio = 0.0
    in_order = torch.arange(16.0).expand(2, 16)
    torch.testing.assert_close(
        ours.encode(images), hf.vit(images, noise=in_order).last_hidden_state, rtol=1e-4, atol=1e-5
    )


def test_equal_noise_keeps_the_lower_index() -> None:
    split = MAE(TINY)(torch.randn(2, 3, 32, 32), torch.zeros(2, 16)).split
    assert split.ids_keep.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_from_hf_refuses_dropout(field: str) -> None:
    hf = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**CONFIGS["square"], **{field: 0.1}))
    with pytest.raises(ValueError, match=f"{field} must be 0, got 0.1"):
        MAE.from_hf(hf)


def test_from_hf_refuses_an_unknown_activation() -> None:
    hf = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**CONFIGS["square"], "hidden_act": "mish"}))
    with pytest.raises(ValueError, match="activation must be one of"):
        MAE.from_hf(hf)


def test_position_table_is_the_published_one() -> None:
    table = modeling_vit_mae.build_2d_sinusoidal_position_embedding(5, 5, 32, cls_token=True)
    published = torch.cat([table[:, 16:], table[:, :16]], 1)
    torch.testing.assert_close(sincos_positions((5, 5), 32, prefix=1), published, rtol=0, atol=1e-6)


def test_published_names_load() -> None:
    state = MAE(TINY).state_dict()
    published = {name.replace("patch_embed.", "patch_embed.proj."): value for name, value in state.items()}
    model = MAE(TINY)
    model.load_state_dict(published)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = MAE(MAEConfig.of_size("tiny", image_size=64))
    fan_sum = 192 + 3 * 16 * 16
    bound = (6 / fan_sum) ** 0.5
    assert 0.98 * bound < model.patch_embed.weight.abs().max() <= bound
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert 0.01 < model.mask_token.std() < 0.03
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


def test_sizes() -> None:
    base = MAEConfig.of_size("base")
    assert (base.num_patches, base.num_keep) == (196, 49)
    with torch.device("meta"):
        trained = sum(p.numel() for p in MAE(base).parameters() if p.requires_grad)
    assert trained == 111_655_680  # counted on the published MAE-Base without its position tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size must be a multiple of patch_size 8, got 30"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": 0.99}, "keeps none of 16 patches"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_wrong_image_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[2, 3, 32, 40\]"):
        MAE(TINY)(torch.randn(2, 3, 32, 40))


def test_oblong_images_and_autocast() -> None:
    model = MAE(dataclasses.replace(TINY, image_size=(16, 48)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 16, 48), seed=0)
    assert out.loss.dtype == torch.float32 and out.pred.shape == (2, 12, 192)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct_puts_a_perfect_prediction_in_place(norm_pix: bool) -> None:
    model = MAE(dataclasses.replace(TINY, norm_pix=norm_pix))
    images = torch.randn(2, 3, 32, 32)
    out = model(images, seed=0)
    patches = maskops.patchify(images, 8)
    if norm_pix:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    visible, painted = model.reconstruct(images, out._replace(pred=patches))
    torch.testing.assert_close(painted, images, rtol=1e-4, atol=1e-5)
    shown = maskops.unpatchify((~out.split.mask)[:, :, None].expand(-1, -1, 192).float(), 8, (32, 32))
    torch.testing.assert_close(visible, images * shown)


# ---------------------------------------------------------------- the Works check

# Measured after 300 steps: 0.020 to 0.046 over ten seeds; broken 0.90 and more over three, where 1 is painting the mean.
# The broken ones get half the steps, after which a sound model is below 0.15.
STEPS, LEARNED, UNLEARNED = 300, 0.1, 0.5


def gradient_images(count: int, generator: torch.Generator) -> Tensor:
    """Planes of colour with a random slope: a masked patch follows from where it is and from what is visible elsewhere."""
    slope = torch.randn(count, 3, 2, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    return slope[:, :, 0] * x + slope[:, :, 1] * y


def train_error(kind: type[MAE], seed: int, steps: int = STEPS) -> float:
    """Held-out masked error after a short training, as a share of the variance of the pixels.

    The seed chooses the weights, the images and the masks of the training.
    """
    torch.manual_seed(seed)
    model = kind(TINY)
    generator = torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        model(gradient_images(32, generator), seed=seed * STEPS + step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    images = gradient_images(256, generator)
    with torch.no_grad():
        out = model(images, seed=10_000)
    # Not model(...).loss: what is judged must not depend on what was broken.
    error = (out.pred - maskops.patchify(images, 8)).square().mean(-1)[out.split.mask].mean()
    return (error / images.var()).item()


class VisibleLoss(MAE):
    """A planted fault: the loss counts the visible patches instead of the masked ones."""

    def forward(self, images: Tensor, **options: object) -> MAEOutput:
        out = super().forward(images, **options)
        loss = maskops.masked_patch_loss(out.pred, images, out.split, 8, norm_pix=False, on="visible")
        return out._replace(loss=loss)


class Placeless(MAE):
    """A planted fault: restored tokens get no position, so that one mask token is like any other."""

    def decode(self, latent: Tensor, split: maskops.TokenSplit) -> Tensor:
        self.decoder_pos_embed.data.zero_()
        return super().decode(latent, split)


class Blind(MAE):
    """A planted fault: the decoder gets the class token of nothing visible."""

    def decode(self, latent: Tensor, split: maskops.TokenSplit) -> Tensor:
        return super().decode(torch.zeros_like(latent), split)


SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_learns_to_paint_masked_patches(seed: int) -> None:
    assert train_error(MAE, seed) < LEARNED


@pytest.mark.parametrize("broken", [VisibleLoss, Blind, Placeless])
def test_the_works_check_goes_red_when_broken(broken: type[MAE]) -> None:
    assert train_error(broken, SEEDS[0], STEPS // 2) > UNLEARNED
