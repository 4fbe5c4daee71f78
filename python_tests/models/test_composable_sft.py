"""Composable SFT (the Works check): a task learnt on English and a language learnt from raw text add up, if both are sparse.

Real text: the messages of Sphinx, English and translated to Albanian, in Latin letters and far from English. The task
is to tell words from words with their letters shuffled: its label means the same in every language, and telling needs the language.
"""

import ast
import copy
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops import AttentionMask
from maskops.models.composable_sft import SparseAdamW, SparseDelta, SparseFineTuning, largest_changes
from maskops.nn.transformer import Block

LENGTH, DIM, BATCH = 48, 48, 32
SHARE = 0.1  # K as a share of the weights that may change
L1 = 0.1
RATE, HEAD_RATE = 4e-3, 1e-2
BASE_STEPS, LANGUAGE_STEPS, TASK_STEPS = 500, 300, 100
LANGUAGE, TASK_SEEDS, LANGUAGE_SEEDS = "sq", (0, 1, 2), (0, 1)
MARGIN, DENSE_MARGIN = 2, 0.5  # points


# ---------------------------------------------------------------- the mechanism


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


class Tuned:
    """A small network after both phases."""

    def __init__(self, k: int = 20, rewind: Callable = SparseFineTuning.rewind) -> None:
        self.k, self.model = k, network()
        self.x, self.y = torch.randn(64, 12), torch.randint(3, (64,))
        self.start = copy.deepcopy(self.model)
        self.sft = SparseFineTuning(self.model, lambda name: name != "2.bias")
        self.run(torch.optim.AdamW(self.sft.parameters, 1e-2))
        changes = [(p - q).abs().flatten() for p, q in self.pairs()]
        self.largest = torch.cat(changes).topk(k).indices.sort().values
        self.run(rewind(self.sft, k, lr=1e-2))
        self.delta = self.sft.delta()

    def run(self, optimizer: object) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            optimizer.step()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        before = dict(self.start.named_parameters())
        return [
            (p.detach(), before[name].detach()) for name, p in self.model.named_parameters() if name in self.sft.sizes
        ]

    def only_the_support_changed(self) -> bool:
        changed = torch.cat([(p != q).flatten() for p, q in self.pairs()]).nonzero()[:, 0]
        untouched = torch.equal(self.model[2].bias, self.start[2].bias)
        return untouched and len(changed) <= self.k and torch.equal(changed, self.largest)


def test_only_the_largest_changes_train() -> None:
    tuned = Tuned()
    assert tuned.only_the_support_changed()
    assert torch.equal(tuned.delta.indices, tuned.largest)


def masked_gradients(sft: SparseFineTuning, k: int, **options: float) -> torch.optim.AdamW:
    """A planted fault: gradients outside the support are 0, but weight decay is not."""
    sft.rewind(k)
    for p in sft.parameters:
        p.register_hook(torch.zeros_like)
    return torch.optim.AdamW(sft.parameters, **options)


def no_rewind(sft: SparseFineTuning, k: int, **options: float) -> SparseAdamW:
    """A planted fault: phase 2 goes on from theta_1."""
    after = [p.detach().clone() for p in sft.parameters]
    optimizer = sft.rewind(k, **options)
    for p, value in zip(sft.parameters, after, strict=True):
        p.data.copy_(value)
    return optimizer


@pytest.mark.parametrize("fault", [masked_gradients, no_rewind])
def test_the_support_check_goes_red_when_broken(fault: Callable) -> None:
    assert not Tuned(rewind=fault).only_the_support_changed()


def test_largest_changes_are_exact_with_ties() -> None:
    deltas = [torch.tensor([[1.0, -2.0], [0.0, 2.0]]), torch.tensor([2.0, -3.0, 1.0])]
    assert largest_changes(deltas, 3).tolist() == [1, 3, 5]  # of three 2s the first two
    assert largest_changes(deltas, 0).tolist() == [] and largest_changes(deltas, 7).tolist() == list(range(7))
    ties = [torch.ones(1000), torch.ones(10, 10)]
    assert largest_changes(ties, 700).tolist() == list(range(700))
    with pytest.raises(ValueError, match=r"k must be in \[0, 7\], got 8"):
        largest_changes(deltas, 8)


def test_apply_and_revert(tmp_path: Path) -> None:
    tuned = Tuned()
    model = copy.deepcopy(tuned.start)
    tuned.delta.apply_(model)
    torch.testing.assert_close(model.state_dict(), tuned.model.state_dict(), rtol=0, atol=1e-7)
    tuned.delta.revert_(model)
    torch.testing.assert_close(model.state_dict(), tuned.start.state_dict(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="must have the tensors of the delta"):
        tuned.delta.apply_(nn.Linear(3, 3))


@pytest.mark.parametrize("indices", [[], [0], [3, 4, 250, 70_000], [5, 3_000_000_000, 3_000_000_001]])
def test_file_holds_the_delta(indices: list[int], tmp_path: Path) -> None:
    delta = SparseDelta(
        {"a.weight": 10, "b": 4_000_000_000}, torch.tensor(indices, dtype=torch.int64), torch.randn(len(indices))
    )
    delta.save(tmp_path / "delta.safetensors")
    read = SparseDelta.load(tmp_path / "delta.safetensors")
    assert (
        read.sizes == delta.sizes
        and torch.equal(read.indices, delta.indices)
        and torch.equal(read.values, delta.values)
    )


def test_file_is_small(tmp_path: Path) -> None:
    indices = torch.randperm(100_000)[:5000].sort().values
    SparseDelta({"w": 100_000}, indices, torch.randn(5000)).save(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").stat().st_size < 5000 * (
        4 + 2
    ) + 300  # float32 values, at most two bytes a step


def test_sparse_adamw_is_adamw_on_its_entries() -> None:
    ours, theirs = nn.Parameter(torch.randn(4, 5)), None
    index = torch.tensor([0, 7, 8, 19])
    theirs = nn.Parameter(ours.detach().flatten()[index])
    optimizers = SparseAdamW([ours], [index], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(5):
        for value, optimizer in zip((ours.flatten()[index], theirs), optimizers, strict=True):
            optimizer.zero_grad()
            value.cosh().sum().backward()
            optimizer.step()
    assert torch.equal(ours.detach().flatten()[index], theirs.detach())


# ---------------------------------------------------------------- the Works check on text


def messages(language: str) -> list[tuple[str, str]]:
    """(English, translation) of every translated message of Sphinx."""
    sphinx = pytest.importorskip("sphinx")
    file = Path(sphinx.__file__).parent / "locale" / language / "LC_MESSAGES" / "sphinx.po"
    found = []
    for entry in file.read_text(encoding="utf-8").split("\n\n"):
        parts = re.search(r'^msgid ((?:"[^\n]*"\s*)+)^msgstr ((?:"[^\n]*"\s*)+)', entry, re.MULTILINE)
        if parts and not re.search("^#, .*fuzzy", entry, re.MULTILINE):
            english, other = (
                "".join(ast.literal_eval(line) for line in part.split("\n") if line) for part in parts.groups()
            )
            if english and other:
                found.append((english, other))
    return found


class CharBias(nn.Module):
    """What each character gets on top of its logit."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(characters))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class CharTransformer(nn.Module):
    """Characters [B, N], 0 = padding, 1 = mask -> hidden states [B, N, DIM].

    The convolution gives neighbouring letters at once: attention alone would need thousands of steps to leave letter frequencies.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(characters, DIM), nn.Embedding(LENGTH, DIM)
        self.near = nn.Conv1d(DIM, DIM, 7, padding=3)
        self.blocks = nn.ModuleList(Block(DIM, 4, 2 * DIM) for _ in range(2))
        self.norm, self.char_bias = nn.LayerNorm(DIM), CharBias(characters)
        nn.init.normal_(self.emb.weight, std=0.3)
        nn.init.normal_(self.pos.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        chars = self.emb(ids) * (ids > 0)[:, :, None]
        x = chars + self.pos.weight + self.near(chars.mT).mT
        real = AttentionMask.keys(ids > 0)
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x)

    def pooled(self, ids: Tensor) -> Tensor:
        real = (ids > 0)[:, :, None]
        return (self(ids) * real).sum(1) / real.sum(1)

    def mlm_loss(self, ids: Tensor) -> Tensor:
        rows = ids[torch.randint(len(ids), (BATCH,))]
        masked = (torch.rand(rows.shape) < 0.15) & (rows > 0)
        hidden = self(rows.masked_fill(masked, 1))[masked]
        return F.cross_entropy(self.char_bias(hidden @ self.emb.weight.T), rows[masked])


def scramble(text: str, rng: random.Random) -> str:
    """The same letters, in any order within each word."""
    return " ".join("".join(rng.sample(word, len(word))) for word in text.split(" "))


def train(optimizers: tuple, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()


class Texts:
    """The base model, and everything that is fine-tuned from it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        pairs = messages(LANGUAGE)
        english, other = sorted({a for a, _ in messages("fr")}), sorted({b for _, b in pairs})
        self.ids = {c: i + 2 for i, c in enumerate(sorted(set("".join(english + other))))}
        self.model = CharTransformer(len(self.ids) + 2)
        plain, self.other_plain = self.encode(english), self.encode(other)
        train((torch.optim.AdamW(self.model.parameters(), 3e-3),), lambda: self.model.mlm_loss(plain), BASE_STEPS)
        rng = random.Random(0)
        self.english, self.english_labels = self.half_scrambled(english, rng)
        self.other, self.other_labels = self.half_scrambled(other, rng)
        order = torch.randperm(len(other))
        self.unlabelled, self.held_out = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]

    def encode(self, texts: list[str]) -> Tensor:
        return torch.tensor([[*(self.ids[c] for c in t[:LENGTH]), *([0] * (LENGTH - len(t)))] for t in texts])

    def half_scrambled(self, texts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        labels = [rng.random() < 0.5 for _ in texts]
        return self.encode([scramble(t, rng) if l else t for t, l in zip(texts, labels, strict=True)]), torch.tensor(
            labels
        )

    def tuned(self, loss: Callable[[SparseFineTuning], Tensor], steps: int, head: nn.Module) -> tuple:
        """((sparse delta, its head), (dense delta of phase 1, its head)); the model is as before."""
        sft = SparseFineTuning(self.model, lambda name: "norm" not in name and "char_bias" not in name)
        k = int(SHARE * sum(sft.sizes.values()))
        found, start = [], copy.deepcopy(head.state_dict())
        for phase in (lambda: torch.optim.AdamW(sft.parameters, RATE), lambda: sft.rewind(k, lr=RATE)):
            optimizer = phase()
            head.load_state_dict(start)
            train((optimizer, torch.optim.AdamW(head.parameters(), HEAD_RATE)), lambda: loss(sft), steps)
            found.append((sft.delta(), copy.deepcopy(head)))
        head.load_state_dict(start)
        sft.restore()
        assert len(found[1][0].indices) <= k
        return tuple(reversed(found))

    def language(self, seed: int) -> tuple:
        """The bias of the characters is tuned as a head is: the task does not use it."""
        torch.manual_seed(10 + seed)
        text = self.other_plain[self.unlabelled]
        loss = lambda sft: self.model.mlm_loss(text) + L1 * sft.distance()  # noqa: E731
        return self.tuned(loss, LANGUAGE_STEPS, self.model.char_bias)

    def task(self, seed: int) -> tuple:
        torch.manual_seed(20 + seed)
        head, labels = nn.Linear(DIM, 1), self.english_labels.float()

        def loss(sft: SparseFineTuning) -> Tensor:
            rows = torch.randint(len(labels), (BATCH,))
            logits = head(self.model.pooled(self.english[rows]))[:, 0]
            return F.binary_cross_entropy_with_logits(logits, labels[rows]) + L1 * sft.distance()

        return self.tuned(loss, TASK_STEPS, head)

    @torch.no_grad()
    def accuracy(self, head: nn.Module, *deltas: SparseDelta, english: bool = False) -> float:
        """How often, in percent, the shuffled text of a pair gets the larger logit, over all pairs of held-out texts.

        Not the share of logits on the right side of 0: in a new language all logits shift, and noise in the weights undoes that as
        well as knowing the language does.
        """
        ids, labels = self.other[self.held_out], self.other_labels[self.held_out]
        if english:
            ids, labels = self.english, self.english_labels
        before = copy.deepcopy(self.model.state_dict())
        for delta in deltas:
            delta.apply_(self.model)
        logits = head(self.model.pooled(ids))[:, 0]
        self.model.load_state_dict(before)
        return 100 * (logits[labels][:, None] > logits[~labels]).float().mean().item()


class Composition:
    """Accuracies on held-out Albanian, in percent: means over all tasks and languages."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.tasks = [texts.task(seed) for seed in TASK_SEEDS]
        self.languages = [texts.language(seed) for seed in LANGUAGE_SEEDS]

    def of_task(self, kind: int, **options: bool) -> float:
        """theta_0 + task.  kind: 0 sparse, 1 dense."""
        found = [self.texts.accuracy(task[kind][1], task[kind][0], **options) for task in self.tasks]
        return sum(found) / len(found)

    def of_both(self, kind: int, change: Callable = lambda delta: delta) -> float:
        """theta_0 + task + language."""
        found = [
            self.texts.accuracy(task[kind][1], task[kind][0], change(language[kind][0]))
            for task in self.tasks
            for language in self.languages
        ]
        return sum(found) / len(found)


@pytest.fixture(scope="module")
def composition() -> Composition:
    with torch.random.fork_rng():
        return Composition(Texts())


def test_the_task_is_learnt_on_english(composition: Composition) -> None:
    assert composition.of_task(0, english=True) > 90


def test_task_and_language_compose(composition: Composition) -> None:
    assert composition.of_both(0) > composition.of_task(0) + MARGIN


def test_dense_deltas_compose_worse(composition: Composition) -> None:
    assert composition.of_both(1) < composition.of_both(0) - DENSE_MARGIN


def shuffled(delta: SparseDelta) -> SparseDelta:
    """A planted fault: the right values at the wrong places of the support."""
    order = torch.randperm(len(delta.values), generator=torch.Generator().manual_seed(0))
    return SparseDelta(delta.sizes, delta.indices, delta.values[order])


def negated(delta: SparseDelta) -> SparseDelta:
    """A planted fault: subtracts the language."""
    return SparseDelta(delta.sizes, delta.indices, -delta.values)


@pytest.mark.parametrize("fault", [shuffled, negated])
def test_the_composition_check_goes_red_when_broken(composition: Composition, fault: Callable) -> None:
    assert composition.of_both(0, fault) < composition.of_task(0)
