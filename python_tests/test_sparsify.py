"""sparsify_ on models of all kinds."""

import pytest
import torch
from torch import nn

import maskops
from maskops.nn import NMLinear, SoftNMLinear
from maskops.one_shot import sparsegpt
from maskops.ops.nm_matmul.cost import Estimate
from maskops.sparsify import METHODS


def make_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 8))


def correlated(rows: int, seed: int) -> torch.Tensor:
    """Inputs of very different sizes that hang together, as those of trained networks do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    return torch.randn(rows, 64, generator=generator) * torch.logspace(-1, 1, 64) @ mix / 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_every_layer_gets_the_pattern(method: str, n: int, m: int) -> None:
    model = make_mlp()
    fits = [name for name in ("0", "2", "4") if method != "learned" or not model.get_submodule(name).in_features % m]
    report = maskops.sparsify_(model, n, m, method, calibration=[correlated(96, 1)], only_if_faster=False)
    assert [row.name for row in report] == ["0", "2", "4"]
    for row in report:
        layer = model.get_submodule(row.name)
        if row.name not in fits:
            assert row.path == "dense" and "not divisible" in row.reason and type(layer) is nn.Linear
            continue
        assert type(layer) is (SoftNMLinear if method == "learned" else NMLinear)
        assert 0 < row.kept_norm < 1
        weight = layer.harden().weight if method == "learned" else layer.weight
        assert weight.shape == row.shape
        maskops.nm_validate(weight.to_dense(), n, m)
    assert model(correlated(3, 2)).shape == (3, 8)


def test_methods_rank_as_published() -> None:
    x, held_out = correlated(512, 1), correlated(256, 2)
    want = make_mlp()(held_out)
    errors = {}
    for method in METHODS[:3]:
        model = make_mlp()
        maskops.sparsify_(model, 2, 4, method, calibration=[x[:256], x[256:]], only_if_faster=False)
        errors[method] = ((model(held_out) - want).norm() / want.norm()).item()
    assert errors["sparsegpt"] < 0.9 * errors["wanda"] < 0.9 * errors["magnitude"], errors


def test_sparsegpt_on_uncorrelated_inputs_is_magnitude_without_an_update() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    pruned, mask = sparsegpt(weight, torch.eye(32, dtype=torch.float64), 2, 4)
    assert torch.equal(mask, maskops.nm_mask(weight.abs(), 2, 4))
    torch.testing.assert_close(pruned, weight * mask)


def test_sparsegpt_is_no_worse_than_any_mask_without_an_update() -> None:
    """One group of four and one row: all six masks with their least-squares values can be tried."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.9 * x[:, 0]
    weight = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    pruned, _ = sparsegpt(weight, x.T @ x, 2, 4)
    error = (x @ (pruned - weight).T).norm()
    kept = [(x @ (weight * p - weight).T).norm() for p in maskops.nm_patterns(2, 4)]
    assert error < min(kept)


def test_layers_that_must_stay_dense_say_why() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.unused = nn.Linear(8, 8)
            self.used = nn.Linear(8, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            return self.head(self.used(self.encoder(self.attention(x, x, x)[0])))

    model = Tied().eval()
    ids = torch.arange(16)[None]
    report = maskops.sparsify_(model, 2, 4, "wanda", calibration=[ids], only_if_faster=False)
    reasons = {row.name: row.reason for row in report}
    assert "shared with embed.weight" in reasons["head"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert "TransformerEncoderLayer" in reasons["encoder.linear1"]
    assert reasons["unused"] == "calibration never called it"
    assert [row.name for row in report if row.path == "sparse"] == ["used"] and isinstance(model.used, NMLinear)
    with torch.no_grad():
        assert model(ids).isfinite().all()
    text = str(report)
    assert "1 of 7 layers converted" in text and all(name in text for name in reasons)


def test_only_if_faster_follows_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import maskops.sparsify as module

    seen = []

    def estimate(rows: int, outputs: int, *rest: object) -> Estimate:
        seen.append(rows)
        return Estimate("dense", "too narrow", 0.5) if outputs == 8 else Estimate("sparse", "fast", 2.0)

    monkeypatch.setattr(module, "against_dense", estimate)
    model = make_mlp()
    report = maskops.sparsify_(model, 2, 4, calibration=[correlated(100, 1), correlated(60, 2)])
    assert [(row.path, row.reason) for row in report][2] == ("dense", "too narrow") and type(model[4]) is nn.Linear
    assert set(seen) == {80} and "slower" not in str(report)
    forced = maskops.sparsify_(make_mlp(), 2, 4, only_if_faster=False)
    assert [row.speedup for row in forced] == [2.0, 2.0, 0.5] and forced[2].reason == "too narrow"
    assert "1 of them are expected to be slower on this machine than the dense layers were" in str(forced)


def test_training_flags_hooks_and_frozen_parameters_stay() -> None:
    model = make_mlp().train()
    model[2].requires_grad_(False)
    maskops.sparsify_(model, 2, 4, "sparsegpt", calibration=[correlated(64, 1)], only_if_faster=False)
    assert model.training and model[0].training and not model[0]._forward_pre_hooks
    assert model[0].values.requires_grad and not model[2].values.requires_grad
    model(correlated(4, 1)).sum().backward()
    assert model[0].values.grad.shape == model[0].values.shape


def test_learned_keeps_the_weights_and_starts_from_the_prior() -> None:
    before, model, pruned = make_mlp(), make_mlp(), make_mlp()
    x = [correlated(64, 1)]
    maskops.sparsify_(model, 2, 4, "learned", calibration=x, prior_strength=100.0, only_if_faster=False)
    maskops.sparsify_(pruned, 2, 4, "sparsegpt", calibration=x, only_if_faster=False)
    for i in (0, 2, 4):
        assert torch.equal(model[i].weight, before[i].weight)
        assert torch.equal(model[i].mask(), pruned[i].weight.to_dense() != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method must be one of magnitude, wanda, sparsegpt, learned, got 'random'"),
        ({"method": "wanda"}, "calibration must hold a batch for wanda, got nothing"),
        ({"method": "sparsegpt", "calibration": []}, "calibration must hold a batch for sparsegpt, got no batch"),
        ({"prior": "wanda"}, "prior must be None unless method is \"learned\", got 'wanda'"),
        ({"method": "learned", "prior": "x"}, "prior must be one of magnitude, wanda, sparsegpt, got 'x'"),
        ({"method": "wanda", "calibration": [torch.full((2, 64), torch.nan)]}, "calibration must give 0 finite inputs"),
        (
            {"method": "wanda", "calibration": [torch.zeros(0, 64)] * 2},
            "calibration must give the layers at least one row, got none in 2",
        ),
        (
            {"method": "sparsegpt", "calibration": [torch.zeros(0, 64)]},
            "calibration must give the layers at least one row",
        ),
        ({"n": 4}, r"n and m must satisfy 1 <= n < m <= 32, got \(4, 4\)"),
    ],
)
def test_errors_leave_the_model_alone(options: dict, message: str) -> None:
    model, before = make_mlp(), make_mlp()
    with pytest.raises(ValueError, match=message):
        maskops.sparsify_(model, **{"n": 2, "m": 4, **options})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class Routed(nn.Module):
    """Two experts, of which one gets no rows, and a layer that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(input=torch.cat([self.experts[0](x), self.experts[1](x[:0])]))


def test_a_layer_without_rows_stays_dense() -> None:
    model = Routed()
    report = maskops.sparsify_(model, 2, 4, "sparsegpt", calibration=[torch.randn(4, 8)], only_if_faster=False)
    assert [row.path for row in report] == ["sparse", "dense", "sparse"]
    assert report[1].reason == "calibration gave it no row"


class FailsAtCall(nn.Module):
    """Passes its input on, but for one call."""

    def __init__(self, call: int, error: BaseException):
        super().__init__()
        self.left, self.error = call, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt("broken")])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(error: BaseException) -> None:
    model, before = make_mlp(), make_mlp()
    model.insert(3, FailsAtCall(2, error))
    with pytest.raises(type(error), match="broken"):
        maskops.sparsify_(model, 2, 4, "sparsegpt", calibration=[correlated(8, 1)], only_if_faster=False)
    assert [type(layer) for layer in model[:3]] == [nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert not model[0]._forward_pre_hooks and model.training


def test_a_failing_conversion_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    convert, calls = NMLinear.from_dense, []

    def fails_at_the_second(*args: object, **options: object) -> NMLinear:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return convert(*args, **options)

    monkeypatch.setattr(NMLinear, "from_dense", fails_at_the_second)
    model, before = make_mlp(), make_mlp()
    with pytest.raises(RuntimeError, match="no memory"):
        maskops.sparsify_(model, 2, 4, only_if_faster=False)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_layers_without_values_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    model[2].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    reasons = [row.reason for row in maskops.sparsify_(model, 2, 4, only_if_faster=False)]
    assert type(model[0]) is NMLinear and "LazyLinear" in reasons[1]
    assert reasons[2:] == ["its weight is int8", "its weight is on the meta device"]


def test_calibration_is_a_list_of_batches() -> None:
    with pytest.raises(TypeError, match="calibration must be an iterable of batches, got a tensor"):
        maskops.sparsify_(make_mlp(), 2, 4, "wanda", calibration=correlated(8, 1))
    with pytest.raises(TypeError, match="n must be int, got True"):
        maskops.sparsify_(make_mlp(), True, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model must be an nn.Module, got NoneType"),
        ({"m": "4"}, "m must be int, got '4'"),
        ({"filter": "0"}, r"filter must be a function \(name, layer\) -> bool, got '0'"),
        ({"calibration": 3}, "calibration must be an iterable of batches, got 3"),
        ({"prior_strength": None}, "prior_strength must be a number, got NoneType"),
        ({"rows": 2.0}, "rows must be int, got 2.0"),
        ({"only_if_faster": None}, "only_if_faster must be bool, got None"),
    ],
)
def test_wrong_kind_of_argument(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=f"sparsify_: {message}"):
        maskops.sparsify_(**{"model": make_mlp(), "n": 2, "m": 4, **options})
