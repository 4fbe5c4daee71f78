"""The command maskops: pretrain, generate, prune, systems, masks, info, bench, demo.

Exit codes: 0 good, 1 failed, 2 wrong use, 130 interrupted.
"""

import platform
import subprocess
import sys
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("maskops: the command line needs the extra `train`: pip install 'torch-maskops[train]'")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "run.py"


class System(str, Enum):
    """Systems that can be pre-trained."""

    mae = "mae"
    colormae = "colormae"
    dmjd = "dmjd"
    hpm = "hpm"
    spark = "spark"
    maskgit = "maskgit"
    cm3 = "cm3"
    electra = "electra"
    dupmae = "dupmae"
    ernie_gram = "ernie_gram"
    multimae = "multimae"
    openbeats = "openbeats"


# What the systems of maskops.train train on: the option that gives it, and others that belong to it.
_OPTIONS = {
    "images": ("--images", "--image-size", "--patch-size"),
    "scenes": ("--images", "--image-size", "--patch-size", "--classes"),
    "text": ("--text", "--context"),
    "sounds": ("--sounds", "--seconds"),
}


class Data(str, Enum):
    """Names in maskops.models.maskgit.DATA."""

    digits = "digits"
    faces = "faces"


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
    out: Annotated[Path, typer.Option(help="Where losses.jsonl, checkpoints/ and model/ go.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, searched with its subfolders; for systems of images, not maskgit. "
            "For multimae the folders rgb, depth and semseg, with files of the same names."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file, or folder of text files; for cm3, electra, dupmae, ernie_gram.")
    ] = None,
    sounds: Annotated[Path | None, typer.Option(help="Folder of recordings (wav, flac, ...); for openbeats.")] = None,
    system: Annotated[System, typer.Option(help="What to train.")] = System.mae,
    data: Annotated[Data, typer.Option(help="maskgit: images that scikit-learn or scikit-image ships.")] = Data.digits,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the samples.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step and process.")] = 64,
    mask_ratio: Annotated[
        float | None, typer.Option(help="Share that is masked, above 0 and below 1. Default: as published.")
    ] = None,
    size: Annotated[
        str,
        typer.Option(help="Size of the model: tiny, small, base, large; for spark also resnet50, convnext_base, ..."),
    ] = "base",
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the crops. Default: 224.")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=4, help="Tokens of a text: bytes, and the special tokens of dupmae and cm3. Default: 128."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.2, max=600.0, help="Of a clip of sound. Default: 10.")] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, max=65536, help="multimae: of semseg. Default: the 133 of COCO.")
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width of a patch. Default: 16; of spark the stride of the CNN, 32."),
    ] = None,
    norm_pix: Annotated[bool, typer.Option(help="Predict patches normalised by their mean and deviation.")] = True,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="For 256 samples a step, scaled with the batch; 1e-3 on text, else 1.5e-4. maskgit: of a step, by size.",
        ),
    ] = None,
    warmup_epochs: Annotated[float | None, typer.Option(min=0.0, help="Default: 5% of the epochs.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the samples and the masks.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load samples, per training process.")] = 2,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision in bfloat16.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
) -> None:
    """Pre-train a model on images, text or sounds. On several processes or machines: `accelerate launch -m maskops pretrain ...`.
    maskgit trains in one process on --data and takes --size, --epochs, --batch-size, --lr, --seed, --resume and --save-every.
    """
    given = {
        "--images": images, "--image-size": image_size, "--patch-size": patch_size, "--classes": classes, "--text": text,
        "--context": context, "--sounds": sounds, "--seconds": seconds,
    }  # fmt: skip
    if system is System.maskgit:
        given |= {"--mask-ratio": mask_ratio, "--warmup-epochs": warmup_epochs, "--bf16": bf16 or None}
        refused = [name for name, value in given.items() if value is not None]
        rest = (epochs, batch_size, lr, seed, resume, save_every or 500)
        return _pretrain_maskgit(refused, out, data.value, size, *rest)
    _need("accelerate", "safetensors", "PIL", "rich")
    source, changes = _chosen(system.value, given, norm_pix, mask_ratio)
    _pretrain_samples(
        system.value, size, changes, source, data=given[source], out=out, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
        workers=workers, bf16=bf16, resume=resume, warmup_epochs=warmup_epochs, save_every=save_every,
    )  # fmt: skip


def _chosen(system: str, given: dict[str, Any], norm_pix: bool, mask_ratio: float | None) -> tuple[str, dict[str, Any]]:
    """(the option that gives what the system trains on, fields of its config).  given: options of _OPTIONS, None by default."""
    from maskops.pretrained import samples_of

    source, *own = _OPTIONS[samples_of(system)]
    given = {name: value for name, value in given.items() if value is not None}
    other = [name for name in given if name not in (source, *own)]
    if other:
        _fail(f"--system {system} trains on {source}: leave out {', '.join(other)}", 2)
    changes = {name[2:].replace("-", "_"): given[name] for name in own if name in given}
    if source == "--sounds":
        _need("soundfile", "scipy", "transformers")
        changes = {"frames": round(100 * changes["seconds"])} if changes else {}
    if source == "--images":
        changes["norm_pix"] = norm_pix
    return source, changes | ({} if mask_ratio is None else {"mask_ratio": mask_ratio})


def _pretrain_samples(
    system: str, size: str, changes: dict[str, Any], source: str, *, data: Path | None, out: Path, **settings: Any
) -> None:
    """The systems of maskops.train.  changes: of the config; source: what gives data; settings: of maskops.train.Settings."""
    from maskops.checkpoint import CheckpointError
    from maskops.data import EmptyFolderError
    from maskops.train import Settings, TrainingError, model_class
    from maskops.train import pretrain as train

    _check_epochs(settings["epochs"])
    usual = {"lr": 1e-3 if source == "--text" else 1.5e-4, "warmup_epochs": 0.05 * settings["epochs"]}
    settings |= {name: value for name, value in usual.items() if settings[name] is None}
    try:
        if data is None:
            raise ValueError(f"{source} must be given with --system {system}")
        if not 0 < changes.get("mask_ratio", 0.5) < 1:
            raise ValueError(f"--mask-ratio must be above 0 and below 1, got {changes['mask_ratio']:g}")
        result = train(model_class(system).Config.of_size(size, **changes), Settings(data, out, **settings))
    except (EmptyFolderError, CheckpointError, ValueError, OSError) as error:
        # Of an error in a process that loads samples, torch gives the traceback; what it says is the last line.
        lines = str(error).rstrip().splitlines()
        _fail(lines[-1].partition(": ")[2] if "Original Traceback" in str(error) else error, 2)
    except TrainingError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print(f"maskops: interrupted; add --resume to go on from the last checkpoint in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{result.step} steps, loss {result.loss:.4f}, {_speed(result, result.unit)}: {result.model_folder}")
    if result.unreadable:
        print(f"unreadable, skipped: {len(result.unreadable)}")


def _speed(result, unit: str) -> str:
    """A resumed run that had nothing left to do has no speed."""
    return f"{result.samples_per_second:.0f} {unit}/s" if result.samples_per_second else "already finished"


def _check_epochs(epochs: float) -> None:
    if not 0 < epochs < 1e6:
        _fail(f"--epochs must be above 0 and below 1000000, got {epochs}", 2)


def _pretrain_maskgit(
    refused: list[str], out: Path, data: str, size: str, epochs: float, batch_size: int, lr: float | None, *rest: int
) -> None:
    if refused:
        _fail(f"--system maskgit trains on --data, in float32: leave out {', '.join(refused)}", 2)
    _need("safetensors", "rich", *(("sklearn",) if data == "digits" else ("skimage",)))
    from maskops.checkpoint import CheckpointError
    from maskops.maskgit import Settings
    from maskops.maskgit import pretrain as train

    _check_epochs(epochs)
    try:
        result = train(Settings(out, data, size, epochs, batch_size, lr, *rest))
    except (CheckpointError, ValueError, OSError) as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        print(f"maskops: interrupted; add --resume to go on from the last checkpoint in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{result.step} steps, loss {result.loss:.4f}, {_speed(result, 'images')}: {result.model_folder}")


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder of a finished `pretrain --system maskgit`.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("out/generated.png"),
    setting: Annotated[str, typer.Option(help="Full + local steps of ReCAP: 8+8, 12+4, 15+5, 17+7 or 22+10.")] = "8+8",
    rows: Annotated[int, typer.Option(min=1, help="Rows of images.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the noise in the order of decoding.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and noise.")] = 0,
) -> None:
    """Draw real images, images of full steps only and images with ReCAP side by side, with their times."""
    _need("safetensors", "rich", "matplotlib")
    from maskops.checkpoint import CheckpointError
    from maskops.maskgit import generate as draw

    try:
        draw(model, out, setting, rows=rows, temperature=temperature, seed=seed)
    except (CheckpointError, ValueError, OSError) as error:
        _fail(error, 2)


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
def systems() -> None:
    """The published systems that the library is to serve, the ops they use, and which of them work."""
    from maskops.systems import table

    print(table())


@app.command()
def masks(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("masks.png"),
    seed: Annotated[int, typer.Option(min=0, help="Of the masks.")] = 0,
) -> None:
    """Draw a picture of every mask law."""
    _need("matplotlib")
    from maskops.demo.masks import draw

    try:
        draw(out, seed)
    except (OSError, ValueError) as error:
        _fail(error, 2)
    print(out)


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
