"""OPTIN: prune heads and neurons of a trained transformer in one shot, by how much their absence changes what later layers compute.

Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", 2024 (OPTIN).
L layers, H heads of d_h channels, P neurons, D width, B images, N tokens, C candidates masked in one pass.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import maskops
from maskops.nn import BitmaskLinear, PatchEmbed
from maskops.nn.transformer import Attention, Block, Mask


class PrunedAttention(Attention):
    """Self-attention whose heads need not fill the width: qkv is D -> 3 H d_h and proj H d_h -> D.  x [B, N, D] -> [B, N, D]."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, heads: int) -> None:
        nn.Module.__init__(self)
        self.qkv, self.proj, self.heads = qkv, proj, heads

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        return super().forward(x, mask) if self.heads else self.proj.bias.expand_as(x)


class ViT(nn.Module):
    """A small vision transformer, class token first.  images [B, C, S, S] -> logits [B, classes]."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn((image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images, pos=self.pos_embed)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[..., 0, :]))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class PruneMask(NamedTuple):
    """What stays.  heads bool [L, H], neurons bool [L, P]."""

    heads: Tensor
    neurons: Tensor


class Scores(NamedTuple):
    """Importance of each part, at least 0: larger changes more when it is missing.  heads [L, H], neurons [L, P]."""

    heads: Tensor
    neurons: Tensor


def gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart the similarities of all pairs of rows are.

        || S S^T - T T^T ||_F^2 with rows of length 1, from D x D products only: with E = S - T,
        <E^T E, S^T S> + <E^T E, T^T T> + 2 tr(E^T S E^T T)

    Args:
        student: [C, K, D].
        teacher: [K, D].

    Returns:
        [C]. No K x K matrix is formed, and no two large numbers are subtracted.
    """
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    e = s - t
    ee, es, et = e.mT @ e, e.mT @ s, e.mT @ t
    return ((ee * (s.mT @ s)).sum((1, 2)) + (ee * (t.mT @ t)).sum((1, 2)) + 2 * (es * et.mT).sum((1, 2))).clamp_min(0)


class Optin:
    """Scores the parts of a ViT on one batch, finds what to keep within a budget of multiplications, and compacts the model.

        score = w * ( sum over hidden states after the masked part of ||Gram_t - Gram_s||^2 + 10^p KL(teacher || student) T^2 )

    with Gram taken over K sampled tokens, w = 0.5 for heads and 0.5 again in the last layer, and one power p for all heads, one for
    all neurons, which brings the mean KL to 1 / balance of the mean Gram term, to the next power of ten.

    Layers before the masked one see what they always see, so they run once. Candidates of one layer run together: their masks are
    masks per sample of bitmask_linear.

    Args:
        model: a trained ViT; not changed.
        images: the batch, [B, C, S, S]; labels are not needed.
        tokens: K.
        chunk: how many candidates run together.
        reuse_prefix: False computes every layer for every candidate: the same scores, slower.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> optin = Optin(ViT(8, 2, 1, dim=16, depth=2, heads=4, mlp_dim=8, classes=3), torch.rand(4, 1, 8, 8))
        >>> mask = optin.search(optin.scores(), budget=0.6)
        >>> optin.macs(mask) <= 0.6 * optin.macs()
        True
        >>> optin.compact(mask)(torch.rand(4, 1, 8, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, model: ViT, images: Tensor, *, tokens: int = 768, temperature: float = 4.0, balance: float = 10.0,
        chunk: int = 16, reuse_prefix: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.temperature, self.balance = model.eval(), temperature, balance
        self.chunk, self.reuse_prefix = chunk, reuse_prefix
        with torch.no_grad():
            self.states = [model.embed(images)]
            for block in model.blocks:
                self.states.append(block(self.states[-1]))
            self.logits = model.classify(self.states[-1])
        count = self.states[0].shape[0] * self.states[0].shape[1]
        self.rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:tokens].to(images.device)
        self.blocks_run = 0  # blocks computed for scoring, in candidates; tests read it

    # ------------------------------------------------------------ scores

    @torch.no_grad()
    def scores(self) -> Scores:
        """Mask every head and every neuron alone and see what changes."""
        return Scores(self._scores_of("heads"), self._scores_of("neurons"))

    def _scores_of(self, kind: str) -> Tensor:
        gram, divergence = [], []
        for layer in range(len(self.model.blocks)):
            masks = _one_off(self.model.blocks[layer], kind)
            parts = [self._distances(layer, kind, part) for part in masks.split(self.chunk)]
            gram.append(torch.cat([p[0] for p in parts]))
            divergence.append(torch.cat([p[1] for p in parts]))
        manifold, kl = torch.stack(gram), torch.stack(divergence)
        # One power of ten for all of a kind: a power per candidate would change their order.
        ratio = manifold.mean() / (self.balance * kl.mean().clamp_min(1e-30))
        score = manifold + kl * 10 ** ratio.clamp_min(1e-30).log10().round()
        score[-1] *= 0.5
        return score * 0.5 if kind == "heads" else score

    def _distances(self, layer: int, kind: str, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gram term and KL of the candidates of one layer.  columns bool [C, H d_h or P], False = masked -> [C], [C]."""
        start = layer if self.reuse_prefix else 0
        x = repeat(self.states[start], "b n d -> c b n d", c=len(columns))
        gram = x.new_zeros(len(columns))
        for index in range(start, len(self.model.blocks)):
            x = _run_masked(self.model.blocks[index], x, kind if index == layer else None, columns)
            self.blocks_run += len(columns)
            if index >= layer:
                gram += gram_difference(self._sample(x), self._sample(self.states[index + 1][None])[0])
        t = self.temperature
        target, found = (self.logits / t).log_softmax(-1), (self.model.classify(x) / t).log_softmax(-1)
        return gram, (target.exp() * (target - found)).sum(-1).sum(-1).clamp_min(0) * t * t

    def _sample(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, self.rows]

    # ------------------------------------------------------------ search

    def macs(self, mask: PruneMask | None = None) -> int:
        """Multiply-adds of attention and MLP of one image, of all parts or of what stays."""
        per_head, per_neuron = self._costs()
        if mask is not None:
            return per_head * int(mask.heads.sum()) + per_neuron * int(mask.neurons.sum())
        blocks = self.model.blocks
        return sum(per_head * b.attn.heads + per_neuron * b.mlp.fc1.out_features for b in blocks)

    def _costs(self) -> tuple[int, int]:
        """A head is q, k, v, the two products of attention and its share of the output; a neuron is a row and a column."""
        n, d = self.states[0].shape[1:]
        dh = d // self.model.heads
        return 3 * n * d * dh + 2 * n * n * dh + n * dh * d, 2 * n * d

    def search(self, scores: Scores, budget: float) -> PruneMask:
        """For every number of heads, best first, fill up with the best neurons; the split that keeps the largest sum of scores."""
        per_head, per_neuron = self._costs()
        limit = int(budget * self.macs())
        order = [s.flatten().argsort(descending=True, stable=True) for s in scores]
        sums = [F.pad(s.flatten()[o].double().cumsum(0), (1, 0)) for s, o in zip(scores, order, strict=True)]
        heads = torch.arange(min(len(order[0]), limit // per_head) + 1)
        neurons = ((limit - heads * per_head) // per_neuron).clamp_max(len(order[1]))
        best = int((sums[0].cpu()[heads] + sums[1].cpu()[neurons]).argmax())
        keep = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
        for mask, ids, count in zip(keep, order, (heads[best], neurons[best]), strict=True):
            mask.view(-1)[ids[:count]] = True
        return PruneMask(*keep)

    # ------------------------------------------------------------ the pruned model

    def masked(self, mask: PruneMask) -> ViT:
        """The model with the output columns of the pruned parts under a bit mask; no GEMM is smaller."""
        model = copy.deepcopy(self.model)
        for block, heads, neurons in zip(model.blocks, *mask, strict=True):
            columns = heads.repeat_interleave(block.attn.proj.in_features // block.attn.heads)
            block.attn.proj = BitmaskLinear.from_dense(block.attn.proj, columns.expand_as(block.attn.proj.weight))
            block.mlp.fc2 = BitmaskLinear.from_dense(block.mlp.fc2, neurons.expand_as(block.mlp.fc2.weight))
        return model

    def compact(self, mask: PruneMask) -> ViT:
        """The same function as masked(mask), on smaller matrices."""
        model = copy.deepcopy(self.model)
        for block, heads, neurons in zip(model.blocks, *mask, strict=True):
            columns = heads.repeat_interleave(block.attn.proj.in_features // block.attn.heads)
            qkv, proj = _take(block.attn.qkv, columns.repeat(3), None), _take(block.attn.proj, None, columns)
            block.attn = PrunedAttention(qkv, proj, int(heads.sum()))
            block.mlp.fc1, block.mlp.fc2 = _take(block.mlp.fc1, neurons, None), _take(block.mlp.fc2, None, neurons)
        return model


def _one_off(block: Block, kind: str) -> Tensor:
    """Every candidate of a layer, as a mask of the columns of proj or fc2.  bool [candidates, columns]."""
    heads, width = block.attn.heads, block.attn.proj.in_features
    if kind == "heads":
        return ~torch.eye(heads, dtype=torch.bool, device=block.attn.proj.weight.device).repeat_interleave(
            width // heads, 1
        )
    return ~torch.eye(block.mlp.fc2.in_features, dtype=torch.bool, device=block.mlp.fc2.weight.device)


def _run_masked(block: Block, x: Tensor, kind: str | None, columns: Tensor) -> Tensor:
    """One block on all candidates, [C, B, N, D]; proj or fc2 is under each candidate's own mask if kind says so."""
    flat = x.flatten(0, 1)
    attn = block.attn
    out = maskops.masked_attention(*attn.split_heads(block.norm1(flat)))
    out = rearrange(out, "(c b) h n d -> c b n (h d)", c=len(x))
    x = x + _project(attn.proj, out, columns if kind == "heads" else None)
    hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
    return x + _project(block.mlp.fc2, hidden, columns if kind == "neurons" else None)


def _project(linear: nn.Linear, x: Tensor, columns: Tensor | None) -> Tensor:
    if columns is None:
        return linear(x)
    bits = maskops.pack_bitmask(columns)[:, None].expand(-1, linear.out_features, -1)
    return maskops.bitmask_linear(x, linear.weight, bits.contiguous(), linear.bias)


def _take(linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    """The linear layer on some of its outputs and inputs."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    weight = weight if columns is None else weight[:, columns]
    taken = nn.Linear(1, 1, device="meta")  # of no size yet: torch warns when it initialises an empty weight
    taken.out_features, taken.in_features = weight.shape
    taken.weight, taken.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return taken
