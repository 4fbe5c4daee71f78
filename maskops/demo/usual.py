"""The MAE step written the usual way, on the weights of our model: what the speed table compares with.

The transformer blocks are shared.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskops.models.mae import MAE


def usual_loss(model: MAE, images: Tensor, noise: Tensor) -> Tensor:
    """Loss of a step as in the published code: two argsorts, torch.gather with an expanded index, cat and gather to restore."""
    c = model.config
    x = _embed_all(model, images)
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    ids_keep = ids_shuffle[:, : c.num_keep]
    x = torch.gather(x, 1, ids_keep[:, :, None].repeat(1, 1, c.dim))
    latent = _encode(model, x)
    x = model.decoder_embed(latent)
    mask_tokens = model.mask_token.repeat(x.shape[0], c.num_patches - c.num_keep, 1)
    tokens = torch.cat([x[:, 1:], mask_tokens], 1)
    tokens = torch.gather(tokens, 1, ids_restore[:, :, None].repeat(1, 1, c.decoder_dim))
    return _decoded_loss(model, torch.cat([x[:, :1], tokens], 1), images, _mask(ids_restore, c.num_keep))


def all_tokens_loss(model: MAE, images: Tensor, noise: Tensor) -> Tensor:
    """The same job with an encoder that runs over all tokens; masked ones are replaced by the mask token after it."""
    c = model.config
    mask = _mask(noise.argsort(1).argsort(1), c.num_keep)
    x = model.decoder_embed(_encode(model, _embed_all(model, images)))
    tokens = torch.where(mask[:, :, None].bool(), model.mask_token, x[:, 1:])
    return _decoded_loss(model, torch.cat([x[:, :1], tokens], 1), images, mask)


def _embed_all(model: MAE, images: Tensor) -> Tensor:
    embed = model.patch_embed
    x = F.conv2d(images, embed.weight, embed.bias, stride=model.patch_size)
    return x.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]


def _encode(model: MAE, x: Tensor) -> Tensor:
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    x = torch.cat([cls, x], 1)
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def _mask(ids_restore: Tensor, num_keep: int) -> Tensor:
    """float [B, N], 1 = masked, made and unshuffled as in the published code."""
    mask = torch.ones(ids_restore.shape, device=ids_restore.device)
    mask[:, :num_keep] = 0
    return torch.gather(mask, 1, ids_restore)


def _decoded_loss(model: MAE, x: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    x = x + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    p = model.config.patch_size
    target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    if model.config.norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    per_patch = (pred - target).square().mean(-1)
    return (per_patch * mask).sum() / mask.sum()
