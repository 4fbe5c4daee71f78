"""The command maskops: pretrain, prune, info, bench, demo. Exit codes: 0 good, 1 failed, 2 wrong use, 130 interrupted."""

import platform
import subprocess
import sys
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("maskops: the command line needs the extra `train`: pip install 'torch-maskops[train]'")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "run.py"


class System(str, Enum):
    """Systems that can be pre-trained."""

    mae = "mae"


class Size(str, Enum):
    """Names in maskops.models.mae.SIZES."""

    tiny = "tiny"
    small = "small"
    base = "base"
    large = "large"


class Method(str, Enum):
    """Names in maskops.sparsify.METHODS."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    learned = "learned"


def main() -> None:
    """Run the command; Ctrl-C ends it with 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        print("maskops: interrupted", file=sys.stderr)
        sys.exit(130)


@app.callback()
def _root() -> None:
    """Kernels for masked models, and models that are trained with them."""


@app.command()
def pretrain(
    images: Annotated[Path, typer.Option(help="Folder of images, searched with its subfolders.")],
    out: Annotated[Path, typer.Option(help="Where losses.jsonl, checkpoints/ and model/ go.")],
    system: Annotated[System, typer.Option(help="What to train.")] = System.mae,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step and process.")] = 64,
    mask_ratio: Annotated[float, typer.Option(help="Share of patches that are masked, above 0 and below 1.")] = 0.75,
    size: Annotated[Size, typer.Option(help="Size of the model.")] = Size.base,
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the crops.")] = 224,
    patch_size: Annotated[int, typer.Option(min=1, help="Height and width of a patch.")] = 16,
    norm_pix: Annotated[bool, typer.Option(help="Predict patches normalised by their mean and deviation.")] = True,
    lr: Annotated[
        float, typer.Option(min=0.0, help="Learning rate for 256 images a step; scaled with the batch.")
    ] = 1.5e-4,
    warmup_epochs: Annotated[float | None, typer.Option(min=0.0, help="Default: 5% of the epochs.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the crops and the masks.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images, per training process.")] = 2,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision in bfloat16.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, if there is one.")
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints. Default: every 5 minutes.")
    ] = None,
) -> None:
    """Pre-train a model on a folder of images. On several processes or machines: `accelerate launch -m maskops pretrain ...`."""
    _need("accelerate", "safetensors", "PIL", "rich")
    from maskops.checkpoint import CheckpointError
    from maskops.data import EmptyFolderError
    from maskops.train import Settings, TrainingError, model_class
    from maskops.train import pretrain as train

    if not 0 < epochs < 1e6:
        _fail(f"--epochs must be above 0 and below 1000000, got {epochs}", 2)
    if not 0 < mask_ratio < 1:
        _fail(f"--mask-ratio must be above 0 and below 1, got {mask_ratio:g}", 2)
    try:
        config = model_class(system.value).Config.of_size(
            size.value, image_size=image_size, patch_size=patch_size, mask_ratio=mask_ratio, norm_pix=norm_pix
        )
        result = train(
            config,
            Settings(
                images, out, epochs, batch_size, lr, seed=seed, workers=workers, bf16=bf16, resume=resume,
                warmup_epochs=0.05 * epochs if warmup_epochs is None else warmup_epochs, save_every=save_every,
            ),
        )  # fmt: skip
    except (EmptyFolderError, CheckpointError, ValueError, OSError) as error:
        _fail(error, 2)
    except TrainingError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print(f"maskops: interrupted; add --resume to go on from the last checkpoint in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(
        f"{result.step} steps, loss {result.loss:.4f}, {result.images_per_second:.0f} images/s: {result.model_folder}"
    )
    if result.unreadable:
        print(f"{len(result.unreadable)} unreadable images were skipped")


@app.command()
def prune(
    text: Annotated[list[Path], typer.Option(help="File to train and judge on; give the option again for more.")],
    out: Annotated[Path, typer.Option(help="Where dense/ and pruned/ go.")],
    method: Annotated[Method, typer.Option(help="What chooses the weights that stay.")] = Method.magnitude,
    nm: Annotated[str, typer.Option(help="The pattern n:m: so many of so many consecutive weights stay.")] = "2:4",
    model: Annotated[
        Path | None, typer.Option(help="Dense model of an earlier run (OUT/dense). Default: train one on the text.")
    ] = None,
    train_steps: Annotated[int, typer.Option(min=1, help="Steps of training the dense model.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Steps of learning masks, for --method learned.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of 128 bytes per step.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, texts and masks.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take the dense model that stands in --out; replace the pruned one.")
    ] = False,
) -> None:
    """Prune a small language model on bytes to n:m, and compare its held-out perplexity with the dense one's."""
    _need("safetensors", "rich")
    from maskops.checkpoint import CheckpointError
    from maskops.prune import Settings
    from maskops.prune import prune as run

    parts = nm.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        _fail(f"--nm must be n:m, as 2:4, got {nm!r}", 2)
    settings = Settings(
        text, out, method.value, int(parts[0]), int(parts[1]), model, train_steps, steps, batch_size, seed, resume
    )
    try:
        result = run(settings)
    except (CheckpointError, ValueError, OSError) as error:
        _fail(error, 2)
    except FloatingPointError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print(f"maskops: interrupted; --resume takes the dense model in {out}, if it was finished", file=sys.stderr)
        raise typer.Exit(130) from None
    print(
        f"{method.value} {nm}: held-out perplexity {result.dense:.3f} dense, {result.pruned:.3f} pruned; "
        f"{result.dense_bytes / 1e6:.2f} MB dense, {result.pruned_bytes / 1e6:.2f} MB pruned: {result.folder}"
    )


@app.command()
def info() -> None:
    """Versions, CPU features, the instruction set in use, compiled libraries and GPU backends, with reasons if missing."""
    print("\n".join(f"{name:<14}{value}" for name, value in _facts().items()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source tree; arguments are those of benchmarks/run.py."""
    if not _BENCHMARKS.exists():
        _fail(
            "the benchmarks are in the source tree only: clone it, `pip install -e '.[bench]'`, then run this again", 2
        )
    raise typer.Exit(subprocess.call([sys.executable, str(_BENCHMARKS), *context.args]))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where pictures, tables and the run go; a run there is replaced.")] = Path(
        "out/demo"
    ),
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Time for training; a slow machine takes fewer steps.")
    ] = 210.0,
) -> None:
    """Pre-train a small MAE on the photos that scikit-image and scikit-learn ship, and judge it on regions it has not seen."""
    _need("accelerate", "safetensors", "PIL", "rich", "matplotlib", "skimage", "sklearn")
    from maskops.demo import run

    try:
        passed = run(out, seconds)
    except (ValueError, RuntimeError) as error:
        _fail(error, 1)
    raise typer.Exit(0 if passed else 1)


def _facts() -> dict[str, str]:
    import torch

    import maskops
    from maskops import _extension

    facts = {
        "maskops": maskops.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    facts["cpu"] = str(_extension.cpu_facts().get("cpu_name", "unknown"))
    status = _extension.status()
    if status.get("_host") == "loaded":
        from maskops import _host

        facts["cpu features"] = _host.cpu_features().replace(",", " ")
        facts["isa in use"] = _host.isa_in_use()
    facts |= status
    facts["cuda archs"] = _extension.cuda_archs()
    if torch.cuda.is_available():
        facts["cuda"] = f"{torch.cuda.get_device_name()}, torch built for {' '.join(torch.cuda.get_arch_list())}"
    else:
        facts["cuda"] = "no device" if torch.version.cuda else "no device, and this torch is a CPU build"
    for name in ("triton", "transformers", "accelerate"):
        facts[name] = metadata.version(name) if find_spec(name) else "not installed"
    return facts


def _need(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        _fail(f"{', '.join(missing)} missing: pip install 'torch-maskops[train,demo]'", 2)


def _fail(error: object, code: int) -> NoReturn:
    print(f"maskops: {error}", file=sys.stderr)
    raise typer.Exit(code)
