"""masked_attention as an attention implementation of Hugging Face transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskops.ops.masked_attention import AttentionMask, masked_attention

FUNCTION = "register_hf_attention"


def register_hf_attention(name: str = "maskops") -> None:
    """Let transformers' models take attn_implementation=name: masks become tiles, and empty tiles are skipped.

    Args:
        name: what from_config, from_pretrained and set_attn_implementation are then given.

    Returns:
        Nothing.

    Notes:
        Causal, bidirectional and padding masks are rules without a [Lq, Lk] tensor; any other mask of a model is made dense, bool
        and batch by batch, and compiled from that. A query that sees no key gives 0. Additive masks and position biases are
        masked_attention's bias, dropout draws its seed from torch's generator. Soft caps and attention sinks are refused:
        NotImplementedError, when the model is called.

    Raises:
        ImportError: transformers is not installed, or too old to take attention implementations.

    Source:
        The attention interface of transformers.

    Example:
        >>> maskops.register_hf_attention()
        >>> # model = transformers.AutoModel.from_pretrained(folder, attn_implementation="maskops")
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"{FUNCTION}: transformers >= 4.56 is needed: pip install 'torch-maskops[bench]'") from error
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, _make_mask)


def _make_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Callable | None = None, attention_mask: Tensor | None = None, **options: Any,
) -> AttentionMask | None:  # fmt: skip
    """What transformers calls where a model makes its mask: once for all its layers."""
    from transformers import masking_utils

    plain = {
        masking_utils.causal_mask_function: lambda: AttentionMask.causal(int(q_offset) - int(kv_offset)),
        masking_utils.bidirectional_mask_function: lambda: None,
    }
    if mask_function in plain:
        mask, padding = plain[mask_function](), _padding(attention_mask, kv_length, int(kv_offset))
        return padding if mask is None else mask if padding is None else mask & padding
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    seen = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options
    )
    return AttentionMask.dense(seen)


def _padding(attention_mask: Tensor | None, keys: int, first: int) -> AttentionMask | None:
    """transformers' [B, positions] mask, true for real tokens, on the keys of a call; keys past its end are not seen."""
    if attention_mask is None:
        return None
    real = attention_mask[:, first : first + keys].bool()
    return AttentionMask.keys(torch.nn.functional.pad(real, (0, keys - real.shape[1])))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionMask | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    for feature in ("softcap", "s_aux"):
        if options.get(feature) is not None:
            raise NotImplementedError(f"{FUNCTION}: masked_attention takes no {feature}")
    bias = options.get("position_bias")
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
        attention_mask = AttentionMask.dense(attention_mask)
    elif isinstance(attention_mask, Tensor):  # added to the scores
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask, is_causal = None, False
    if bias is not None:
        bias = bias[..., : key.shape[2]].to(query.dtype)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = AttentionMask.causal()
    out = masked_attention(
        query, key, value, attention_mask, bias=bias, scale=scaling, dropout_p=dropout, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None
