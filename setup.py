"""Builds the compiled libraries; everything else about the package stands in pyproject.toml.

    maskops/_C.so         CPU kernels: every csrc/cpu source once per instruction set, chosen at run time
    maskops/_C_cuda.so    CUDA kernels, when nvcc is found and torch is a CUDA build
    maskops/_host.so      pybind11: build facts, CPU features, machine roofs

MASKOPS_CUDA=auto|0|1 builds the CUDA library where it can, never, or fails where it cannot. MASKOPS_SANITIZE=1 builds the CPU
kernels with AddressSanitizer and UBSan. Without a C++ compiler the package installs the reference and Triton backends.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ISA_FLAGS = {
    0: [],
    1: ["-mavx2", "-mfma", "-mf16c"],
    2: [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bf16",
        "-mbmi2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
CUDA_ARCHS = ("75", "80", "90", "100", "120")


def sources(folder: str, suffix: str) -> list[Path]:
    return sorted((ROOT / "csrc" / folder).rglob(f"*{suffix}"))


class BuildLibraries(build_ext):
    """Compiles with g++ and nvcc directly: three sets of flags for one source is more than an Extension can say."""

    def run(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            sys.stderr.write(
                "maskops: no C++ compiler found, so only the reference and Triton backends are installed\n"
            )
            return
        super().run()

    def build_extension(self, extension: Extension) -> None:
        self.objects = object_folder(Path(self.build_temp)) / extension.name.rsplit(".", 1)[-1]
        self.objects.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        {"_C": self.build_cpu, "_C_cuda": self.build_cuda, "_host": self.build_host}[self.objects.name](output)

    def get_ext_filename(self, name: str) -> str:
        # The op libraries use no Python API, so their file names carry no Python version.
        plain = name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name) if name.endswith("_host") else plain

    def build_cpu(self, output: Path) -> None:
        jobs = [self.cpu_job(source, level) for source in sources("cpu", ".cpp") for level in ISA_FLAGS]
        jobs.append(self.cpu_job(ROOT / "csrc/common/isa.cpp", 0))
        self.compile_and_link(
            jobs, [cxx(), "-shared", *sanitize_flags(), *torch_link_flags("torch_cpu"), "-o", str(output)]
        )

    def cpu_job(self, source: Path, level: int) -> tuple[list[str], Path]:
        name = "_".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
        target = self.objects / f"{name}.isa{level}.o"
        # Where nothing is optimised away, compilation takes a third of the time and the sanitizers see more.
        level_of_optimisation = "-O0" if sanitize_flags() else "-O3"
        # Off: false alarms of GCC 12 in its own string and AVX headers.
        warnings = ["-Wall", "-Wno-unknown-pragmas", "-Wno-restrict", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        flags = ["-std=c++20", level_of_optimisation, "-g1", "-fPIC", "-fvisibility=hidden", *warnings]
        command = [cxx(), *flags, *ISA_FLAGS[level], *sanitize_flags(), f"-DMASKOPS_ISA_LEVEL={level}", TARGET]
        return [*command, "-MMD", *include_flags(), "-c", str(source), "-o", str(target)], target

    def build_cuda(self, output: Path) -> None:
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda_archs()]
        jobs = []
        for source in sources("cuda", ".cu"):
            name = "_".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            target = self.objects / f"{name}.o"
            built_for = f'-DMASKOPS_CUDA_ARCHS="{" ".join(cuda_archs())}"'
            host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]
            flags = ["-std=c++20", "-O3", "-DUSE_CUDA", built_for, *host]
            jobs.append(
                (
                    [nvcc(), *flags, "-MMD", TARGET, *archs, *include_flags(), "-c", str(source), "-o", str(target)],
                    target,
                )
            )
        link = [nvcc(), "-shared", *torch_link_flags("torch_cuda"), "-o", str(output)]
        self.compile_and_link(jobs, link)

    def build_host(self, output: Path) -> None:
        import sysconfig

        import pybind11

        target = self.objects / "host.o"
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]
        command = [
            cxx(),
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-MMD",
            *include,
            "-c",
            str(ROOT / "csrc/host.cpp"),
        ]
        self.compile_and_link(
            [([*command, "-o", str(target)], target)], [cxx(), "-shared", "-ldl", "-lpthread", "-o", str(output)]
        )

    def compile_and_link(self, jobs: list[tuple[list[str], Path]], link: list[str]) -> None:
        stale = [command for command, target in jobs if not up_to_date(target)]
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, stale))
        # Libraries come after the objects that need them.
        run([link[0], *[str(target) for _, target in jobs], *link[1:]])


def object_folder(temporary: Path) -> Path:
    """Where objects stay: pip builds in folders that it throws away, and an installation after an edit would compile everything."""
    import torch

    kind = "-sanitized" if sanitize_flags() else ""
    folder = ROOT / "build" / f"objects{kind}-{Path(cxx()).name}-torch{torch.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # sources that may not be written to
        return temporary
    return folder if os.access(folder, os.W_OK) else temporary


def up_to_date(target: Path) -> bool:
    """Whether an object is newer than this file and all that it was compiled from, by the compiler's own list (-MMD)."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    # "target.o: a.cpp b.h \\\n c.h"; system headers are not listed.
    read = listed.read_text().replace("\\\n", " ").split(": ", 1)[1].split()
    files = [Path(name) for name in read] + [ROOT / "setup.py"]
    return all(p.exists() and p.stat().st_mtime < target.stat().st_mtime for p in files)


def run(command: list[str]) -> None:
    if os.environ.get("MASKOPS_VERBOSE"):
        print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    return f"{home}/bin/nvcc" if home else (shutil.which("nvcc") or "nvcc")


def cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0") where given, else every architecture that maskops is checked for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("+PTX", "").replace(" ", ";")
    return [a.replace(".", "") for a in listed.split(";") if a] or list(CUDA_ARCHS)


def sanitize_flags() -> list[str]:
    if os.environ.get("MASKOPS_SANITIZE") != "1":
        return []
    return ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def include_flags() -> list[str]:
    import torch

    base = Path(torch.__file__).parent / "include"
    return [f"-I{ROOT / 'csrc'}", "-isystem", str(base), "-isystem", str(base / "torch/csrc/api/include")]


def torch_link_flags(library: str) -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-ltorch", f"-l{library}", *(["-ltorch_cpu"] if library != "torch_cpu" else []), "-lc10"]


def wants_cuda() -> bool:
    choice = os.environ.get("MASKOPS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"MASKOPS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    import torch

    found = shutil.which(nvcc()) is not None
    ready = found and torch.version.cuda is not None
    if choice == "1" and not ready:
        raise SystemExit(
            f"MASKOPS_CUDA=1 needs nvcc ({'found' if found else 'not found'}) and a CUDA build of torch ({torch.__version__})"
        )
    return ready


def extensions() -> list[Extension]:
    names = ["maskops._C", "maskops._host"] + (["maskops._C_cuda"] if wants_cuda() else [])
    return [Extension(name, []) for name in names]


PACKAGES = find_packages(include=["maskops", "maskops.*"])
KERNELS = ["maskops.kernels" + p.removeprefix("kernels") for p in find_packages(include=["kernels", "kernels.*"])]

setup(
    packages=PACKAGES + KERNELS,
    package_dir={"maskops.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
)
