"""register_hf_attention: models of transformers give what they give with "sdpa", padding included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskops

transformers = pytest.importorskip("transformers")

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def both(config: Any, kind: type) -> tuple[nn.Module, nn.Module]:
    """The same random model with sdpa and with maskops."""
    maskops.register_hf_attention()
    torch.manual_seed(0)
    models = [kind._from_config(config, attn_implementation=name).eval() for name in ("sdpa", "maskops")]
    models[1].load_state_dict(models[0].state_dict())
    return tuple(models)


def padded(tokens: int = 70) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (3, tokens), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([tokens, 41, 5])
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def check(models: tuple[nn.Module, nn.Module], inputs: dict[str, Tensor], real: Tensor | None = None) -> None:
    outs = [model(**inputs).last_hidden_state for model in models]
    if real is not None:
        outs = [out[real] for out in outs]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad(out.square().mean(), next(m.parameters())) for out, m in zip(outs, models, strict=True)
    ]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-3, atol=1e-6)


def test_bert() -> None:
    config = transformers.BertConfig(vocab_size=50, **TINY, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    inputs = padded()
    check(both(config, transformers.BertModel), inputs, inputs["attention_mask"].bool())


def test_llama_with_grouped_heads() -> None:
    config = transformers.LlamaConfig(vocab_size=50, **TINY, num_key_value_heads=2)
    inputs = padded()
    check(both(config, transformers.LlamaModel), inputs, inputs["attention_mask"].bool())
    check(both(config, transformers.LlamaModel), {"input_ids": inputs["input_ids"]})


def test_sliding_windows() -> None:
    config = transformers.MistralConfig(vocab_size=50, **TINY, num_key_value_heads=2, sliding_window=9)
    inputs = padded()
    check(both(config, transformers.MistralModel), inputs, inputs["attention_mask"].bool())


def test_generation_with_a_cache() -> None:
    config = transformers.LlamaConfig(vocab_size=50, **TINY, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    prompts = {"input_ids": padded(12)["input_ids"], "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    prompts["attention_mask"][1, :4] = 0  # padded in front
    models = both(config, transformers.LlamaForCausalLM)
    said = [model.generate(**prompts, max_new_tokens=8, do_sample=False) for model in models]
    assert torch.equal(*said)


def test_vit_mae() -> None:
    config = transformers.ViTMAEConfig(
        **TINY, image_size=32, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=48,
    )  # fmt: skip
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    check(both(config, transformers.ViTMAEModel), {"pixel_values": images, "noise": noise})


def test_what_it_lacks_is_refused() -> None:
    config = transformers.BertConfig(vocab_size=50, **TINY, attention_probs_dropout_prob=0.1)
    model = both(config, transformers.BertModel)[1].train()
    with pytest.raises(NotImplementedError, match="masked_attention has no dropout"):
        model(**padded())
