"""Reference of the family masked_loss: B batch, N patches, V values per patch; the other losses name their letters below."""

import torch
from torch import Tensor

from maskops.reference.mask_sampling import philox_words
from maskops.reference.visible_tokens import accumulation_dtype, patches_of

VARIANCE_EPS = 1e-6
COSINE_EPS = 1e-8


def selected_patches(ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, on: str) -> Tensor:
    """bool [B, N]: the patches that the loss counts. Padding tokens (slot >= num_keep + num_mask) never count."""
    keep, end = num_keep[:, None], (num_keep + num_mask)[:, None]
    if on == "masked":
        return (ids_restore >= keep) & (ids_restore < end)
    return ids_restore < (keep if on == "visible" else end)


def normalised_target(images: Tensor, patch_size: list[int], norm_pix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """target [B, N, V], mean [B, N], rstd [B, N]; (0, 1) without norm_pix. The variance is unbiased, as in MAE."""
    target = patches_of(images, patch_size).to(accumulation_dtype(images.dtype))
    mean = target.new_zeros(target.shape[:2])
    if not norm_pix:
        return target, mean, mean + 1
    mean = target.mean(2)
    centred = target - mean[:, :, None]
    variance = centred.square().sum(2) / max(target.shape[2] - 1, 1)
    rstd = (variance + VARIANCE_EPS).rsqrt()
    return centred * rstd[:, :, None], mean, rstd


def masked_loss_patch(
    pred: Tensor, images: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor, patch_size: list[int],
    norm_pix: bool, kind: str, beta: float, on: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = selected_patches(ids_restore, num_keep, num_mask, on)
    target, mean, rstd = normalised_target(images.to(accumulation_dtype(pred.dtype)), patch_size, norm_pix)
    error = pred.to(target.dtype) - target
    if kind == "l2":
        value = error.square()
    elif kind == "l1":
        value = error.abs()
    else:
        size = error.abs()
        value = torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)
    per_patch = torch.where(chosen, value.mean(2), 0)
    return per_patch, torch.where(chosen[:, :, None], torch.stack([mean, rstd], 2), 0)


def _masked_loss_patch_backward(
    grad: Tensor, pred: Tensor, images: Tensor, stats: Tensor, ids_restore: Tensor, num_keep: Tensor, num_mask: Tensor,
    patch_size: list[int], norm_pix: bool, kind: str, beta: float, on: str,
) -> Tensor:  # fmt: skip
    chosen = selected_patches(ids_restore, num_keep, num_mask, on)[:, :, None]
    target = (patches_of(images, patch_size).to(stats.dtype) - stats[:, :, :1]) * stats[:, :, 1:]
    error = pred.to(stats.dtype) - target
    if kind == "l2":
        slope = 2 * error
    elif kind == "l1":
        slope = error.sign()
    else:
        slope = (error / beta).clamp(-1, 1)
    return torch.where(chosen, slope * (grad[:, :, None] / pred.shape[2]), 0).to(pred.dtype)


# ---------------------------------------------------------------- linear cross-entropy: N rows, D width, G codebooks, V classes


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor, scale: float) -> Tensor:
    """scale (hidden weight^T + bias), [N, G, V] in the accumulation dtype; 0 in rows of which nothing is counted, bool [N, G]."""
    dtype = accumulation_dtype(hidden.dtype)
    used = counted.any(1)
    rows = torch.where(used[:, None], hidden.to(dtype), 0)
    logits = torch.einsum("nd,gvd->ngv", rows, weight.to(dtype))
    if bias is not None:
        logits = logits + bias.to(dtype)
    return torch.where(used[:, None, None], logits * scale, 0)


def masked_loss_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, scale: float, smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = linear_logits(hidden, weight, bias, target != ignore, scale)
    return _linear_loss(logits, target, target != ignore, smoothing, z_loss)


def _linear_loss(
    logits: Tensor, target: Tensor, counted: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    if logits.shape[2] == 0:
        return logits.new_zeros(target.shape), logits.new_zeros(target.shape)
    lse = logits.logsumexp(2)
    picked = logits.gather(2, torch.where(counted, target, 0)[:, :, None])[:, :, 0]
    loss = lse - (1 - smoothing) * picked
    if smoothing:
        loss = loss - smoothing * logits.mean(2)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(counted, loss, 0), torch.where(counted, lse, 0)


def _masked_loss_linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, ignore: int,
    scale: float, smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    counted = target != ignore
    logits = linear_logits(hidden, weight, bias, counted, scale)
    dtype, classes = logits.dtype, logits.shape[2]
    slope = (logits - lse[:, :, None]).exp() * (1 + 2 * z_loss * lse)[:, :, None] - smoothing / max(classes, 1)
    if classes:
        known = torch.full_like(target, smoothing - 1, dtype=dtype)
        slope = slope.scatter_add(2, torch.where(counted, target, 0)[:, :, None], known[:, :, None])
    slope = torch.where(counted[:, :, None], slope * (grad * scale)[:, :, None], 0)
    rows = torch.where(counted.any(1)[:, None], hidden.to(dtype), 0)
    grad_hidden = torch.einsum("ngv,gvd->nd", slope, weight.to(dtype)).to(hidden.dtype)
    grad_weight = torch.einsum("ngv,nd->gvd", slope, rows).to(weight.dtype)
    return grad_hidden, grad_weight, slope.sum(0).to(weight.dtype)


def tiles_of(classes: int) -> int:
    """Tiles of 96 classes."""
    return -(-classes // 96)


def _kept_rows(counted: Tensor, width: int) -> Tensor:
    """int64 [K], the rows of which masked_loss_linear_kept keeps the powers."""
    rows = counted.any(1).nonzero()[:, 0]
    return rows if len(rows) <= width else rows[: width // 64 * 64]


def _masked_loss_linear_kept(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor | None, ignore: int, scale: float,
    smoothing: float, z_loss: float, temperature: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = ignore, scale, smoothing, z_loss
    loss, lse = masked_loss_linear(hidden, weight, bias, target, *options)
    sample = target.new_empty(0)
    if seed is not None:
        sample = masked_loss_sample(hidden, weight, bias, target, seed, *options, temperature)[2]
    counted = target != ignore
    logits = linear_logits(hidden, weight, bias, counted, scale)
    powers, (books, classes, width) = weight.new_zeros(weight.shape), weight.shape
    tops = logits.new_zeros(books, tiles_of(classes), width)
    if classes:
        kept = logits[_kept_rows(counted, width)].permute(1, 2, 0)
        padded = torch.nn.functional.pad(kept, (0, 0, 0, tops.shape[1] * 96 - classes), value=-torch.inf)
        high = padded.unflatten(1, (-1, 96)).amax(2)
        powers[:, :, : kept.shape[2]] = (kept - high.repeat_interleave(96, 1)[:, :classes]).exp().to(weight.dtype)
        tops[:, :, : kept.shape[2]] = high
    return loss, lse, sample, powers, tops


def _masked_loss_linear_kept_backward_(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, powers: Tensor,
    tops: Tensor, grad_hidden: Tensor, grad_bias: Tensor, *options: float,
) -> None:  # fmt: skip
    found = _masked_loss_linear_backward(grad, hidden, weight, bias, target, lse, *options)
    for to, x in zip((grad_hidden, powers, grad_bias), found, strict=True):
        to.copy_(x)


def masked_loss_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, seed: Tensor, ignore: int,
    scale: float, smoothing: float, z_loss: float, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    counted = target != ignore
    logits = linear_logits(hidden, weight, bias, counted, scale)
    loss, lse = _linear_loss(logits, target, counted, smoothing, z_loss)
    noise = gumbel_noise(seed, logits.shape, logits.dtype)
    sample = (logits / temperature + noise).argmax(2) if logits.shape[2] else target
    return loss, lse, torch.where(counted, sample, -1)


def gumbel_noise(seed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """-log(-log(u)) of u in (0, 1) with 23 bits, element i from word i of the generator."""
    words = philox_words(seed, shape.numel()).view(shape)
    return -(-((words >> 9).to(dtype) + 0.5).mul(2.0**-23).log()).log()


# ---------------------------------------------------------------- regression of features: N rows, D width


def _normalised_rows(target: Tensor, normalise: bool, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(target, target.shape[1:], eps=eps) if normalise else target


def masked_loss_regression(
    pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float, normalise: bool, eps: float
) -> Tensor:
    dtype = accumulation_dtype(pred.dtype)
    rows = torch.where(mask[:, None], pred.to(dtype), 0)
    wanted = _normalised_rows(torch.where(mask[:, None], target.to(dtype), 0), normalise, eps)
    if kind == "cosine":
        lengths = (rows.norm(dim=1) * wanted.norm(dim=1)).clamp(min=COSINE_EPS)
        return torch.where(mask, 1 - (rows * wanted).sum(1) / lengths, 0)
    error = rows - wanted
    if kind == "l2":
        value = error.square()
    elif kind == "l1":
        value = error.abs()
    else:
        size = error.abs()
        value = torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)
    return torch.where(mask, value.sum(1) / max(pred.shape[1], 1), 0)


def _masked_loss_regression_backward(
    grad: Tensor, pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float, normalise: bool, eps: float
) -> Tensor:
    dtype = accumulation_dtype(pred.dtype)
    rows = torch.where(mask[:, None], pred.to(dtype), 0)
    wanted = _normalised_rows(torch.where(mask[:, None], target.to(dtype), 0), normalise, eps)
    if kind == "cosine":
        square, product = rows.square().sum(1, keepdim=True), (rows * wanted).sum(1, keepdim=True)
        lengths = square.sqrt() * wanted.norm(dim=1, keepdim=True)
        along = torch.where(lengths > COSINE_EPS, product / square * rows, 0)
        slope = (along - wanted) / lengths.clamp(min=COSINE_EPS)
        return torch.where(mask[:, None], slope * grad[:, None], 0).to(pred.dtype)
    error = rows - wanted
    slope = 2 * error if kind == "l2" else error.sign() if kind == "l1" else (error / beta).clamp(-1, 1)
    return torch.where(mask[:, None], slope * (grad[:, None] / max(pred.shape[1], 1)), 0).to(pred.dtype)


# ---------------------------------------------------------------- contrast: M queries, P keys, K negatives, D width


def _contrast_logits(
    query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, scale: float, collide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and ids [M, 1 + K] of the positive and the negatives; queries and keys in the accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    counted = positive >= 0
    ids = torch.cat([positive[:, None], negatives], 1)
    ids = torch.where(counted[:, None], ids, -1)
    used = torch.zeros(keys.shape[0] + 1, dtype=torch.bool, device=keys.device)
    used = used.scatter(0, torch.where(ids < 0, keys.shape[0], ids).flatten(), True)[:-1]
    rows, known = torch.where(counted[:, None], query.to(dtype), 0), torch.where(used[:, None], keys.to(dtype), 0)
    if keys.shape[0] == 0:
        return rows.new_zeros(ids.shape), ids, rows, known
    chosen = known[ids.clamp(min=0)]
    logits = torch.einsum("md,mkd->mk", rows, chosen) * scale
    hidden = ids < 0
    if collide:
        same = (chosen == chosen[:, :1]).all(2)
        same[:, 0] = False
        hidden = hidden | same
    return torch.where(hidden & counted[:, None], -torch.inf, logits), ids, rows, known


def masked_loss_contrast(
    query: Tensor, keys: Tensor, positive: Tensor, negatives: Tensor, scale: float, collide: bool
) -> tuple[Tensor, Tensor]:
    logits, _, _, _ = _contrast_logits(query, keys, positive, negatives, scale, collide)
    lse, counted = logits.logsumexp(1), positive >= 0
    return torch.where(counted, lse - logits[:, 0], 0), torch.where(counted, lse, 0)


def _masked_loss_contrast_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    positive: Tensor,
    negatives: Tensor,
    lse: Tensor,
    scale: float,
    collide: bool,
) -> tuple[Tensor, Tensor]:
    logits, ids, rows, known = _contrast_logits(query, keys, positive, negatives, scale, collide)
    slope = (logits - lse[:, None]).exp()
    slope[:, 0] -= 1
    slope = torch.where((positive >= 0)[:, None], slope * (grad * scale)[:, None], 0)
    if keys.shape[0] == 0:
        return torch.zeros_like(query), torch.zeros_like(keys)
    grad_query = torch.einsum("mk,mkd->md", slope, known[ids.clamp(min=0)])
    each = (slope[:, :, None] * rows[:, None]).flatten(0, 1)
    grad_keys = torch.zeros_like(known).index_add(0, ids.clamp(min=0).flatten(), each)
    return grad_query.to(query.dtype), grad_keys.to(keys.dtype)


# ---------------------------------------------------------------- max-pooled logits: B samples, L tokens, D width, V classes


def masked_loss_max_pool(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    rows = torch.where(mask[:, :, None], hidden.to(dtype), 0)
    logits = rows @ weight.to(dtype).T
    logits = torch.where(mask[:, :, None], logits if bias is None else logits + bias.to(dtype), -torch.inf)
    shape = logits.shape[0], logits.shape[2]
    if logits.shape[1] == 0:
        return logits.new_full(shape, -torch.inf), mask.new_full(shape, -1, dtype=torch.int64)
    # The first of equal ones: max() does not say which it takes.
    out = logits.amax(1)
    at = (logits == out[:, None]).to(torch.int8).argmax(1)
    any_token = mask.any(1)[:, None]
    return out, torch.where(any_token, at, -1)


def _masked_loss_max_pool_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, at: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.where(at >= 0, grad, 0)
    B, L = hidden.shape[:2]
    chosen = torch.zeros(B, L + 1, weight.shape[0], dtype=grad.dtype, device=grad.device)
    chosen = chosen.scatter(1, torch.where(at < 0, L, at)[:, None], grad[:, None])[:, :L]
    used = chosen.new_zeros(B, L + 1, dtype=torch.bool).scatter(1, torch.where(at < 0, L, at), True)[:, :L]
    rows = torch.where(used[:, :, None], hidden.to(grad.dtype), 0)
    grad_hidden = chosen @ weight.to(grad.dtype)
    grad_weight = torch.einsum("blv,bld->vd", chosen, rows)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad.sum(0).to(weight.dtype)
