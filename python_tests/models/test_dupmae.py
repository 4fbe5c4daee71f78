"""DupMAE (the Works check): no token decodes itself, each is scored, the class token carries the text, both vectors find it.

Text of the first claim is the topics of pydoc, small letters and spaces, ten to a text; seed 0. That of the second is the
docstrings of scikit-learn: of 300 that training has not seen, the first sentence asks for the rest (46 words) among all.

    claim                                                       measured, one thread    broken
    held-out decoder loss with the class token's vector at 0    1.295                   1.057: the class token gets no gradient
      over that with it > 1.1                                                             from the decoder (detached)
    recall@1 of class token and bag of words > 1.3 times that   1.92 (0.097, 0.133      0.013 with both: no loss on the bag of
      of the class token, mean of 2 seeds                         over 0.047, 0.073)      words

So few steps need a weight of 1 for the bag of words (published: 0.1). Longer training brings them nearer to one another: 0.163
and 0.180 over 0.140 and 0.127 after 1200 steps of twice as many texts.
"""

import ast
import functools
import math
import random
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from maskops.models.dupmae import DupMAE, DupMAEConfig
from maskops.testing.works import train

CONTEXT, STEPS = 12, 400
CLS, SEP = 27, 28


def texts() -> tuple[Tensor, Tensor]:
    """Rows of the first nine tenths of the text, overlapping, and of the last tenth; class token first, separator last."""
    text = re.sub("[^a-z]+", " ", " ".join(topics[name] for name in sorted(topics)).lower())
    ids = torch.tensor([" abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text])
    cut, size = len(ids) * 9 // 10, CONTEXT - 2
    return ids[:cut].unfold(0, size, 1), framed(ids[cut:].unfold(0, size, size)[:600])


def framed(words: Tensor) -> Tensor:
    """[B, n] -> [B, n + 2]"""
    return torch.cat([words.new_full((len(words), 1), CLS), words, words.new_full((len(words), 1), SEP)], 1)


def test_the_class_token_carries_the_text() -> None:
    torch.manual_seed(0)
    model, (rows, new) = DupMAE(DupMAEConfig(30, CONTEXT, dim=64, depth=1, heads=4)), texts()
    train(model.parameters(), lambda step: model(framed(rows[torch.randint(len(rows), (64,))])).loss, STEPS, 4e-3)
    model.eval().requires_grad_(False)
    losses, decode = [], model.decode
    for factor in (1, 0):
        model.decode = lambda summary, *rest, factor=factor: decode(summary * factor, *rest)
        losses.append(model(new, generator=torch.Generator().manual_seed(0)).decoder_loss.item())
    assert losses[1] > 1.1 * losses[0], losses


WORDS, LENGTH, QUERIES = 2000, 48, 300


@functools.cache
def docstrings() -> list[tuple[list[str], list[str]]]:
    """(first sentence, rest) of scikit-learn's functions and classes, in a random order, as words; short ones are left out."""
    found = {}
    for file in sorted(Path(find_spec("sklearn").origin).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())) if "tests" not in file.parts else ():
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            first, rest = (re.findall("[a-z]+", part.lower()) for part in (text or "").partition("\n\n")[::2])
            if len(first) >= 4 and len(rest) >= LENGTH - 2:
                found[text] = first, rest
    pairs = list(found.values())
    random.Random(0).shuffle(pairs)
    return pairs


def rows_of(texts: list[list[str]]) -> tuple[Tensor, Tensor]:
    """(tokens [B, LENGTH], lengths [B]): the class token, words, what is left is the separator."""
    counts = Counter(word for pair in docstrings() for part in pair for word in part)
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1))}
    tokens = torch.full((len(texts), LENGTH), WORDS + 1)
    tokens[:, 0] = WORDS
    for row, text in zip(tokens, texts, strict=True):
        words = [ids.get(word, WORDS - 1) for word in text[: LENGTH - 2]]
        row[1 : len(words) + 1] = torch.tensor(words)
    return tokens, torch.tensor([min(len(text), LENGTH - 2) + 2 for text in texts])


def recalls(seed: int) -> tuple[float, float]:
    """How many first sentences find their docstring: by the class token, and by class token and bag of words."""
    torch.manual_seed(seed)
    model = DupMAE(DupMAEConfig(WORDS + 3, LENGTH, dim=64, depth=1, heads=4, bow_weight=1.0))
    size, seen = LENGTH - 2, [first + rest for first, rest in docstrings()[QUERIES:]]
    tokens, lengths = rows_of([t[i : i + size] for t in seen for i in range(0, len(t) - size // 2, size // 2)])

    def loss(step: int) -> Tensor:
        at = torch.randint(len(tokens), (16,))
        return model(tokens[at], lengths[at]).loss

    train(model.parameters(), loss, 1000, 4e-3)
    model.eval().requires_grad_(False)
    asked, told = (
        model.embedding(*rows_of(list(part)), top=WORDS + 3) for part in zip(*docstrings()[:QUERIES], strict=True)
    )
    found = (a @ b.T for a, b in ((asked[:, :64], told[:, :64]), (asked, told)))
    return tuple((s.argmax(1) == torch.arange(QUERIES)).double().mean().item() for s in found)


def test_class_token_and_bag_of_words_retrieve_better_than_the_class_token() -> None:
    found = torch.tensor([recalls(seed) for seed in (0, 1)])
    alone, both = found.mean(0).tolist()
    assert both > 1.3 * alone and alone > 0.02, found.tolist()


def test_embeddings_for_retrieval_have_unit_parts() -> None:
    model, tokens = small()
    found = model.embedding(tokens, torch.tensor([16, 9]), top=20)
    for part in (found[:, :32], found[:, 32:]):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(2, dtype=torch.float64))


# ---------------------------------------------------------------- exact


def small() -> tuple[DupMAE, Tensor]:
    torch.manual_seed(0)
    return DupMAE(DupMAEConfig(60, 16, dim=32, depth=1, heads=4)).double(), torch.randint(59, (2, 16))


def test_no_token_decodes_itself() -> None:
    """The gradient of row i by the embedding of token i, through the decoder, is 0."""
    model, tokens = small()
    embedded = model._embed(tokens).detach().requires_grad_()
    model._embed = lambda _: embedded
    seen = model.visible(torch.ones(2, 16, dtype=torch.bool))
    out = model.decode(torch.randn(2, 32, dtype=torch.float64), tokens, seen)
    for i in range(1, 16):
        grad = torch.autograd.grad(out[:, i].square().sum(), embedded, retain_graph=True)[0]
        reached = (grad != 0).any(-1)
        assert torch.equal(reached[:, 1:], seen[:, i, 1:]) and not reached[:, i].any()


def test_half_of_the_keys_are_seen_and_every_token_is_scored() -> None:
    model, tokens = small()
    seen = model.visible(torch.ones(200, 16, dtype=torch.bool), torch.Generator().manual_seed(0))
    inner = seen[:, 1:, 1:]
    assert abs(inner.double().sum(2).mean() / 14 - 0.5) < 0.02 and seen[:, :, 0].all()
    assert not inner.diagonal(dim1=1, dim2=2).any()
    lengths = torch.tensor([16, 9])
    kept: list[Tensor] = []
    decode = model.decode
    model.decode = lambda *args: (kept.append(decode(*args).detach().requires_grad_()), kept[-1])[1]
    grad = torch.autograd.grad(model(tokens, lengths).decoder_loss, kept[0])[0]
    scored = (grad != 0).any(-1)
    assert scored.sum(1).tolist() == [14, 7] and not scored[:, 0].any() and not scored[1, 8:].any()


def test_bag_of_words_equals_the_published_loss() -> None:
    model, tokens = small()
    lengths = torch.tensor([16, 9])
    out = model(tokens, lengths, mask=torch.zeros_like(tokens, dtype=torch.bool))
    x = model.encode(tokens, lengths)
    for b, length in enumerate(lengths.tolist()):
        logits = x[b, 1:length] @ model.embed.weight.T + model.bias
        logp = logits.amax(0).log_softmax(0)
        words = torch.cat([tokens[b, :1], tokens[b, 1 : length - 1]]).unique()
        expected = -logp[words].sum() / length
        assert math.isfinite(expected.item())
        out = out._replace(bow_loss=out.bow_loss - expected / 2)
    torch.testing.assert_close(out.bow_loss, torch.zeros_like(out.bow_loss), atol=1e-9, rtol=0)


def test_padding_reaches_nothing() -> None:
    model, tokens = small()
    lengths, other = torch.tensor([16, 9]), tokens.clone()
    other[1, 9:] = 3
    losses = [model(t, lengths, generator=torch.Generator().manual_seed(1)).loss for t in (tokens, other)]
    torch.testing.assert_close(*losses)
