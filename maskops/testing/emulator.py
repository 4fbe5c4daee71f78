"""Build and load the CUDA kernels for the emulator: the unchanged csrc/cuda sources, compiled by a host compiler, on CPU tensors.

    from maskops.testing import emulator
    emulator.load()                       # torch.ops.maskops_emulated.* now run the CUDA C++ code
    python -m maskops.testing.emulator    # only build, print the library's path

Objects are kept in build/emulator of the source tree under a hash of everything they are made of.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
_COUNTERS = ("launches", "blocks", "bytes_read", "bytes_written")


def reason_unavailable() -> str:
    """Why the emulator cannot be built here, or an empty string if it can."""
    if not CSRC.is_dir():
        return f"the emulator is built from a source tree of maskops, and {ROOT} is none"
    if _compiler() is None:
        return "the emulator needs g++ 11 or newer on the PATH (or CXX)"
    if cuda_include() is None:
        return "the emulator needs the CUDA headers: nvcc on the PATH, CUDA_HOME, or the package nvidia-cuda-runtime"
    return ""


def cuda_include() -> Path | None:
    """The folder with cuda_runtime.h: of CUDA_HOME, of the nvcc on the PATH, or of NVIDIA's Python packages."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1], _nvcc_top(nvcc)]
    homes.append(Path("/usr/local/cuda"))
    folders = [home / "include" for home in homes]
    for package in map(Path, sys.path):
        folders += [*package.glob("nvidia/cuda_runtime/include"), *package.glob("nvidia/cu1*/include")]
    wanted = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")
    return next((folder for folder in folders if all((folder / name).is_file() for name in wanted)), None)


def build(
    sanitize: bool = False, sources: Sequence[Path] | None = None, defines: Sequence[str] = (), stable_abi: bool = True,
    csrc: Path = CSRC,
) -> Path:  # fmt: skip
    """Compile CUDA sources for the emulator into a shared library.

    Args:
        sanitize: with AddressSanitizer and UBSan; the process that loads it must preload libasan (see sanitizer_environment).
        sources: .cu files. Default: every kernel of the package.
        defines: macros, "NAME=value".
        stable_abi: link with PyTorch. False for stand-alone kernels.
        csrc: the tree to include from; tests pass a copy with a planted fault.

    Returns:
        The path of the library; built only if nothing of the same content is there.

    Raises:
        RuntimeError: a prerequisite is missing, or the compiler refuses (with its output).
    """
    reason = reason_unavailable()
    if reason:
        raise RuntimeError(reason)
    sources = sorted((csrc / "cuda").rglob("*.cu")) if sources is None else [Path(source) for source in sources]
    flags = _flags(sanitize, defines, stable_abi, csrc)
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    headers = _hash([p for p in sorted(csrc.rglob("*")) if p.suffix in (".h", ".cuh")], flags)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder, flags, headers), sources))
    library = folder / f"emulated_{_hash(objects, flags)}.so"
    if not library.exists():
        link = [
            "-shared",
            *(SANITIZE_FLAGS if sanitize else ()),
            *map(str, objects),
            *(_torch_libraries() if stable_abi else ()),
        ]
        _run([_compiler(), *link], library)
    return library


@cache
def load() -> ctypes.CDLL:
    """Build the emulated library if need be and register its ops under torch.ops.maskops_emulated."""
    path = build(sanitize="libasan" in os.environ.get("LD_PRELOAD", ""))
    torch.ops.load_library(str(path))
    return open_library(path)


def open_library(path: Path) -> ctypes.CDLL:
    """A library with the emulator's own functions declared: seed and counters."""
    library = ctypes.CDLL(str(path))
    library.maskops_emulator_set_seed.argtypes = [ctypes.c_ulonglong]
    library.maskops_emulator_counter.argtypes = [ctypes.c_int]
    library.maskops_emulator_counter.restype = ctypes.c_ulonglong
    return library


def set_seed(seed: int) -> None:
    """The order of threads and blocks from now on. A correct kernel gives the same bits for every seed."""
    load().maskops_emulator_set_seed(seed)


def counters() -> dict[str, int]:
    """Kernel launches, blocks, and bytes of global memory that kernels asked for, since the library was loaded."""
    library = load()
    return {name: library.maskops_emulator_counter(i) for i, name in enumerate(_COUNTERS)}


def sanitizer_environment() -> dict[str, str]:
    """What the environment of a process must hold to load a library that was built with sanitize=True."""
    libraries = [_output([_compiler(), f"-print-file-name={name}"]) for name in ("libasan.so", "libubsan.so")]
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {"LD_PRELOAD": " ".join(libraries), **options}


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def _nvcc_top(nvcc: str) -> Path:
    """Where nvcc says that its toolkit is: on many machines the nvcc on the PATH is a wrapper."""
    text = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    ).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in text.splitlines() if "TOP=" in line]
    return Path(tops[0]) if tops else Path(nvcc).parents[1]


def _flags(sanitize: bool, defines: Sequence[str], stable_abi: bool, csrc: Path) -> list[str]:
    flags = [
        "-x",
        "c++",
        "-std=c++20",
        # Where nothing is optimised away, sanitized kernels compile in half the time, and the sanitizers see more.
        "-O0" if sanitize else "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    flags += ["-DMASKOPS_EMULATE", *(f"-D{define}" for define in defines), *(SANITIZE_FLAGS if sanitize else ())]
    flags += [f"-I{csrc}", f"-I{csrc / 'cuda_emulator'}", "-isystem", str(cuda_include())]
    if stable_abi:
        include = Path(torch.__file__).parent / "include"
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include)]
        flags += ["-isystem", str(include / "torch/csrc/api/include")]
    return flags


def _torch_libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _hash(files: Sequence[Path], flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join([str(_compiler()), torch.__version__, *flags]).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: Path, folder: Path, flags: list[str], headers: str) -> Path:
    target = folder / f"{source.stem}_{_hash([source], [*flags, headers])}.o"
    if not target.exists():
        _run([_compiler(), *flags, "-c", str(source)], target)
    return target


def _run(command: list[str], target: Path) -> None:
    """Run a compiler and put its output in place in one step, so that processes that build at the same time do no harm."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    print(build(sanitize="--sanitize" in sys.argv))
