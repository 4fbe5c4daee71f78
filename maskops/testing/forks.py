"""Programs in processes that start with torch imported: forked from a server that imported it once, which takes seconds each time.

What such a process does from then on is what a fresh one does: it has an environment, arguments, output and a death of its own.
Tests keep some fresh processes, for what an import itself may break.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

# torch._dynamo is what the first optimiser imports. No module that looks at the terminal, or at COLUMNS, when it is imported.
PRELOADED = ("torch", "torch._dynamo", "maskops.train")


class Forked:
    """A running program: of a module by its name, else of source code.

    Args:
        program: the name of a module, run as `python -m` does, or source code, as with `python -c`.
        arguments: sys.argv from 1 on.
        env: added to the environment.
        output: a folder for the files stdout and stderr; made if it is not there.
        cwd: the working directory, by default the root.
    """

    def __init__(
        self, program: str, arguments: list[str], env: dict[str, str], output: Path, cwd: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        output.mkdir(parents=True, exist_ok=True)
        self.arguments, self.stdout, self.stderr = arguments, output / "stdout", output / "stderr"
        given = program, arguments, env, str(self.stdout), str(self.stderr), str(cwd or "/")
        self.process = context.Process(target=_run, args=given)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs; below 0, the signal that ended it."""
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float) -> CompletedProcess:
        """What it printed, and its exit code; TimeoutError, which tells where it stood, after so many seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGABRT)  # its faulthandler writes the stacks of all threads
            self.process.join(5)
            self.kill()
            raise TimeoutError(f"{self.arguments} took more than {timeout} s: {self.stderr.read_text()}")
        return CompletedProcess(self.arguments, self.returncode, self.stdout.read_text(), self.stderr.read_text())


def _run(program: str, arguments: list[str], env: dict[str, str], stdout: str, stderr: str, cwd: str) -> None:
    for path, descriptor in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    faulthandler.enable()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [program if program.isidentifier() else "-c", *arguments]
    sys.path[:] = [entry for entry in sys.path if entry]  # as -P does: nothing is imported from the working directory
    code = 0
    try:
        if program.isidentifier():
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            space: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(program, "<program>", "exec"), space)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
