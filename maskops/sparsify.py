"""sparsify_: turn the linear layers of a model into N:M ones, in place."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops._checks import FLOATS, boolean, fail, integer, number
from maskops.nn import NMLinear, SoftNMLinear
from maskops.one_shot import InputStatistics, magnitude_mask, sparsegpt, wanda_mask
from maskops.ops.nm_matmul import nm_patterns
from maskops.ops.nm_matmul.cost import Estimate, against_dense
from maskops.ops.nm_matmul.sizes import pattern
from maskops.ops.nm_matmul.soft import MOST_PATTERNS

FUNCTION = "sparsify_"
METHODS = ("magnitude", "wanda", "sparsegpt", "learned")
ONE_SHOT = METHODS[:3]
USUAL_ROWS = 256  # rows of x that a layer is thought to see where no calibration tells

Filter = Callable[[str, nn.Linear], bool]


class LayerReport(NamedTuple):
    """What became of one linear layer.

    Attributes:
        name: as in model.named_modules().
        shape: (N, K) of its weight.
        method: what chose the mask: a name in METHODS; "" for a layer that stayed dense.
        kept_norm: sum((W * mask)^2) / sum(W^2) of the weight before, 1 for a layer that stayed dense.
        path: "sparse", "learning" (a SoftNMLinear) or "dense".
        reason: why.
        speedup: expected time of the dense layer / that of the sparse one on this machine; None where nothing is known.
    """

    name: str
    shape: tuple[int, int]
    method: str
    kept_norm: float
    path: str
    reason: str
    speedup: float | None = None


class SparsifyReport(list[LayerReport]):
    """The rows of a call of sparsify_, one per linear layer that the filter let through; str() is a table."""

    def __str__(self) -> str:
        head = ("layer", "shape", "method", "kept norm", "path", "reason")
        cells = [
            (r.name, f"{r.shape[0]} x {r.shape[1]}", r.method or "-", f"{r.kept_norm:.3f}", r.path, r.reason)
            for r in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *cells)]
        lines.append(f"{sum(r.path != 'dense' for r in self)} of {len(self)} layers converted")
        slower = sum(r.path != "dense" and r.speedup is not None and r.speedup < 1 for r in self)
        if slower:
            lines.append(f"{slower} of them are expected to be slower on this machine than the dense layers were")
        return "\n".join(lines)


def sparsify_(
    model: nn.Module, n: int, m: int, method: str = "magnitude", filter: Filter | None = None,
    calibration: Iterable[Any] | None = None, *, prior: str | None = None, prior_strength: float = 3.0, rows: int | None = None,
    only_if_faster: bool = True,
) -> SparsifyReport:  # fmt: skip
    """Replace the linear layers of a model by layers that keep n of every m inputs.

        magnitude   mask = n largest |W| of a group
        wanda       mask = n largest |W| ||x||_2
        sparsegpt   column by column; mask = n largest w^2 / diag(Hinv)^2, the later weights take over the error
        learned     nothing is pruned yet: SoftNMLinear layers on the frozen weight, for models.maskllm or a loop of your own

    Args:
        model: changed in place; only modules of the type nn.Linear are replaced, the model itself is not.
        n, m: the pattern, 1 <= n < m <= 32.
        method: one of the above.
        filter: (name, layer) -> whether to look at this layer; default: every layer. Output layers are usually left out.
        calibration: batches that the model is called with, as model(batch), model(*batch) or model(**batch). Needed by wanda and
            sparsegpt. The layers of a block (names that agree up to their first number) are pruned together, on the inputs that
            the pruned blocks before them give.
        prior: for "learned", which of the other methods gives the mask that learning starts from. Default: "sparsegpt" with
            calibration, else "magnitude". The weights stay what they were.
        prior_strength: how many standard deviations of the initial logits the prior is worth; 0: no prior.
        rows: rows of x in a call of a layer, for judging whether sparse is faster. Default: the mean in calibration, else 256.
        only_if_faster: leave a layer dense where maskops expects the sparse product to be slower: on this machine, with these rows
            and torch's number of threads. The report has the estimate in any case; on a CPU it is off by a fifth or so.

    Returns:
        SparsifyReport: a list of LayerReport, one per layer; str() is a table.

    Notes:
        These stay dense, with the reason in the report: layers with a shared weight, layers whose weight a module of PyTorch reads
        around their forward (nn.MultiheadAttention, nn.TransformerEncoderLayer), layers that calibration never called, weights
        without values of a floating dtype, and for "learned" layers with K not divisible by m. Optimisers must be made anew: the
        parameters are other ones. Deterministic but for the initial logits of "learned", which PyTorch's generator draws.

    Raises:
        ValueError: unknown method or prior, n and m out of range, calibration missing, empty or not finite. After an error of any
        kind, one of the model's own among them, the model is what it was.

    Source:
        Zhu and Gupta, 2017, arXiv 1710.01878; Wanda: Sun et al., 2023, arXiv 2306.11695; SparseGPT: Frantar and Alistarh, 2023,
        arXiv 2301.00774; MaskLLM: Fang et al., 2024, arXiv 2409.17481.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> inner, batches = lambda name, layer: name != "2", [torch.randn(32, 64)]
        >>> report = maskops.sparsify_(model, 2, 4, "wanda", inner, batches, only_if_faster=False)
        >>> model[0], [row.name for row in report]
        (NMLinear(in_features=64, out_features=64, pattern=2:4, bias=True), ['0'])
    """
    n, m = pattern(FUNCTION, n, m)
    prior_strength, rows = _checked(model, filter, prior_strength, rows, only_if_faster)
    batches = _batches_of(calibration)
    one_shot = _one_shot_of(method, prior, batches)
    learned = method == "learned"
    chosen = _linears(model, filter)
    dense = {name: why for name in chosen if (why := _refusal(model, name, m, learned))}
    before = {name: layer.weight.detach().clone() for name, layer in chosen.items() if name not in dense}
    with _restored_on_error(chosen, before):
        masks, estimates = _prune_in_stages(model, chosen, dense, n, m, one_shot, batches, rows, only_if_faster)
        if learned:
            _restore(chosen, before)
        new = {name: _converted(chosen[name], n, m, mask, learned, prior_strength) for name, mask in masks.items()}
        report = {name: _row(name, before[name], masks[name], method, one_shot, estimates[name]) for name in masks}
    for name, layer in new.items():
        model.set_submodule(name, layer)
    report |= {name: _dense_row(name, chosen[name], why) for name, why in dense.items()}
    return SparsifyReport(report[name] for name in chosen)


@contextmanager
def _restored_on_error(chosen: dict[str, nn.Linear], before: dict[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt, too, must not leave half a model
        _restore(chosen, before)
        raise


def _restore(chosen: dict[str, nn.Linear], before: dict[str, Tensor]) -> None:
    for name, weight in before.items():
        chosen[name].weight.data.copy_(weight)


def _prune_in_stages(
    model: nn.Module, chosen: dict[str, nn.Linear], dense: dict[str, str], n: int, m: int, method: str, batches: list | None,
    rows: int | None, only_if_faster: bool,
) -> tuple[dict[str, Tensor], dict[str, Estimate]]:  # fmt: skip
    """Prune block after block, each on the inputs that the pruned ones before give: masks and expectations of the pruned layers.

    dense: why a layer is left alone; layers that turn out to be better left dense are added.
    """
    masks: dict[str, Tensor] = {}
    estimates: dict[str, Estimate] = {}
    calls = rows_seen = 0
    for stage in _stages(name for name in chosen if name not in dense):
        layers = {name: chosen[name] for name in stage}
        seen = collect(model, layers, batches, gram=method == "sparsegpt") if batches else dict.fromkeys(stage)
        if batches:
            calls += sum(sums.calls for sums in seen.values())
            rows_seen += sum(sums.rows for sums in seen.values())
        estimates |= {name: _estimate(layers[name], n, m, seen[name], rows) for name in stage}
        dense |= {name: why for name in stage if (why := _left_dense(seen[name], estimates[name], only_if_faster))}
        masks |= {name: prune_(layers[name], n, m, method, seen[name]) for name in stage if name not in dense}
    if calls and not rows_seen:
        fail(FUNCTION, "calibration", "give the layers at least one row", f"none in {len(batches)} batches")
    return masks, estimates


def add_prior_(layer: SoftNMLinear, mask: Tensor, strength: float) -> None:
    """Lift the logits of patterns that agree with a mask, lower those that do not.

        logits[pattern] += (sum(pattern * mask) - n^2 / m) std(logits) strength

    n^2 / m is the mean overlap of all patterns: for 2:4 the pattern of the mask itself gets +strength standard deviations, its
    complement -strength, the other four nothing. Logits per weight get (mask - n / m) std strength, the same for the sum over a
    pattern.  mask: bool [N, K], n of every m.
    """
    n, m = layer.n, layer.m
    with torch.no_grad():
        step = layer.logits.std() * strength
        if layer.logits.dim() == 2:
            layer.logits += (mask.to(step.dtype) - n / m) * step
        else:
            options = nm_patterns(n, m).to(step)
            overlap = mask.to(step.dtype).unflatten(1, (-1, m)) @ options.T
            layer.logits += (overlap - n * n / m) * step


def collect(
    model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable[Any], *, gram: bool
) -> dict[str, InputStatistics]:
    """Call the model on each batch, in evaluation mode, and sum up what the layers get."""
    statistics = {name: InputStatistics(layer, gram=gram) for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        layer.register_forward_pre_hook(_adding_to(statistics[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, dict):
                    model(**batch)
                else:
                    model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for name, sums in statistics.items():
        if not sums.squares.isfinite().all():
            fail(FUNCTION, "calibration", f"give {name} finite inputs", "NaN or inf")
    return statistics


def _adding_to(sums: InputStatistics) -> Callable:
    def hook(_: nn.Module, inputs: tuple, named: dict[str, Tensor]) -> None:
        sums.add(inputs[0] if inputs else named["input"])

    return hook


def prune_(layer: nn.Linear, n: int, m: int, method: str, seen: InputStatistics | None) -> Tensor:
    """Zero what the mask leaves out, in place (sparsegpt also updates the rest); returns the mask, bool [N, K]."""
    weight = layer.weight.detach()
    if method == "magnitude":
        mask = magnitude_mask(weight, n, m)
    elif method == "wanda":
        mask = wanda_mask(weight, seen.squares, n, m)
    else:
        pruned, mask = sparsegpt(weight, seen.gram, n, m)
        weight.copy_(pruned)
    weight.masked_fill_(~mask, 0)
    return mask


def _checked(
    model: object, filter: object, prior_strength: object, rows: object, only_if_faster: object
) -> tuple[float, int | None]:
    """prior_strength and rows of sparsify_; TypeError or ValueError for wrong arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{FUNCTION}: model must be an nn.Module, got {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"{FUNCTION}: filter must be a function (name, layer) -> bool, got {filter!r}")
    boolean(FUNCTION, "only_if_faster", only_if_faster)
    rows = None if rows is None else integer(FUNCTION, "rows", rows)
    if rows is not None and rows < 1:
        fail(FUNCTION, "rows", "be at least 1", rows)
    return number(FUNCTION, "prior_strength", prior_strength), rows


def _batches_of(calibration: Iterable[Any] | None) -> list[Any] | None:
    if isinstance(calibration, Tensor):
        raise TypeError(f"{FUNCTION}: calibration must be an iterable of batches, got a tensor: put it into a list")
    if calibration is not None and not isinstance(calibration, Iterable):
        raise TypeError(f"{FUNCTION}: calibration must be an iterable of batches, got {calibration!r}")
    return None if calibration is None else list(calibration)


def _one_shot_of(method: str, prior: str | None, batches: list | None) -> str:
    """The method that the masks come from at first; checks what depends on it."""
    if method not in METHODS:
        fail(FUNCTION, "method", f"be one of {', '.join(METHODS)}", repr(method))
    if method != "learned" and prior is not None:
        fail(FUNCTION, "prior", 'be None unless method is "learned"', repr(prior))
    if method == "learned":
        method = prior or ("magnitude" if batches is None else "sparsegpt")
        if method not in ONE_SHOT:
            fail(FUNCTION, "prior", f"be one of {', '.join(ONE_SHOT)}", repr(prior))
    if batches == [] or (batches is None and method != "magnitude"):
        fail(FUNCTION, "calibration", f"hold a batch for {method}", "nothing" if batches is None else "no batch")
    return method


def _stages(names: Iterable[str]) -> Iterator[list[str]]:
    """Names in the order of the model, those of a block together: equal up to the first number, else alone."""
    stages: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        stages.setdefault(".".join(parts[: first + 1]), []).append(name)
    return iter(stages.values())


def _linears(model: nn.Module, filter: Filter | None) -> dict[str, nn.Linear]:
    linears = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return {name: layer for name, layer in linears if filter is None or filter(name, layer)}


def _refusal(model: nn.Module, name: str, m: int, learned: bool) -> str:
    """Why this layer cannot be replaced; empty if it can."""
    layer = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if not name:
        return "it is the model itself"
    if type(layer) is not nn.Linear:
        return f"its type is {type(layer).__name__}, whose weight may be read around its forward"
    if layer.weight.dtype not in FLOATS or layer.weight.is_meta:
        return f"its weight is {'on the meta device' if layer.weight.is_meta else str(layer.weight.dtype)[6:]}"
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"{type(parent).__name__} reads its weight around its forward"
    owners = [
        f"{other}.{part}".lstrip(".")
        for other, module in model.named_modules(remove_duplicate=False)
        for part, value in module.named_parameters(recurse=False)
        if value is layer.weight and other != name
    ]
    if owners:
        return f"its weight is shared with {owners[0]}"
    if learned and layer.in_features % m:
        return f"its {layer.in_features} inputs are not divisible by {m}"
    return ""


def _estimate(layer: nn.Linear, n: int, m: int, seen: InputStatistics | None, rows: int | None) -> Estimate:
    """What this layer would gain, now that its inputs are known."""
    if rows is None:
        rows = USUAL_ROWS if seen is None else max(1, seen.rows // max(1, seen.calls))
    weight = layer.weight
    return against_dense(rows, *weight.shape, n, m, weight.dtype, weight.device.type)


def _left_dense(seen: InputStatistics | None, estimate: Estimate, only_if_faster: bool) -> str:
    """Why this layer stays dense; empty if it does not."""
    if seen is not None and not seen.rows:
        return "calibration gave it no row" if seen.calls else "calibration never called it"
    return estimate.reason if only_if_faster and estimate.path == "dense" else ""


def _dense_row(name: str, layer: nn.Linear, why: str) -> LayerReport:
    return LayerReport(name, (layer.out_features, layer.in_features), "", 1.0, "dense", why)


def _row(name: str, before: Tensor, mask: Tensor, method: str, one_shot: str, estimate: Estimate) -> LayerReport:
    squares = before.double().square()
    kept = (squares * mask).sum() / squares.sum() if squares.any() else torch.ones(())
    path, reason = "sparse", estimate.reason
    if method == "learned":
        path, reason = "learning", f"starts from the mask of {one_shot}; once hardened {reason}"
    return LayerReport(name, tuple(before.shape), method, kept.item(), path, reason, estimate.speedup)


def _converted(layer: nn.Linear, n: int, m: int, mask: Tensor, learned: bool, strength: float) -> nn.Module:
    if learned:
        per_pattern = math.comb(m, n) <= MOST_PATTERNS
        new: nn.Module = SoftNMLinear.from_linear(layer, n, m, per_pattern=per_pattern)
        add_prior_(new, mask, strength)
    else:
        new = NMLinear.from_dense(layer, n, m, mask=mask)
        for parameter in new.parameters():
            parameter.requires_grad_(layer.weight.requires_grad)
    return new.train(layer.training)
