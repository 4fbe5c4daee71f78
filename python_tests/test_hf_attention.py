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


def test_t5_with_its_position_bias() -> None:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    inputs = padded()
    check(both(config, transformers.T5Model), inputs | {"decoder_input_ids": inputs["input_ids"][:, :33]})


def test_dropout_of_the_weights() -> None:
    config = transformers.BertConfig(
        vocab_size=50, **TINY, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0, use_cache=False
    )
    model, inputs = both(config, transformers.BertModel)[1], padded()
    calm = model(**inputs).last_hidden_state
    model.train()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(**inputs).last_hidden_state)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], calm)


def test_additive_masks_and_position_biases() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    maskops.register_hf_attention()
    ours = transformers.AttentionInterface()["maskops"]
    module = nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(2, 4, n, 8) for n in (10, 12, 12))
    added = torch.randn(2, 1, 10, 12).masked_fill(torch.rand(2, 1, 10, 12) < 0.3, torch.finfo(torch.float32).min)
    expected = sdpa_attention_forward(module, q, k, v, added)[0]
    torch.testing.assert_close(ours(module, q, k, v, added)[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(module, q, k, v, None, position_bias=added)[0], expected, rtol=1e-5, atol=1e-6)


def test_what_it_lacks_is_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    ours = transformers.AttentionInterface()["maskops"]
    with pytest.raises(NotImplementedError, match="takes no softcap"):
        ours(nn.Module(), q, q, q, None, softcap=30.0)
