"""A progress bar on a terminal, one line every few seconds elsewhere: loss, rate, time left."""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LINE_EVERY = 10.0  # seconds between two lines in a log file


class TrainingProgress:
    """Use as a context; `update` after every step. Prints nothing if not `shown` (processes other than the first)."""

    def __init__(
        self, total: int, done: int = 0, *, title: str = "train", shown: bool = True, stream: TextIO | None = None,
        unit: str = "images",
    ):  # fmt: skip
        """unit: what a batch is made of."""
        self.total, self.start, self.title, self.shown, self.unit = total, done, title, shown, unit
        self.console = Console(file=stream or sys.stderr)
        self._bar: Progress | None = None
        self._began = self._printed = time.monotonic()
        self._images = 0

    def __enter__(self) -> "TrainingProgress":
        if self.shown and self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, text="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, images: int) -> None:
        """step: steps finished of the whole run; images: images of this step, over all processes."""
        self._images += images
        now = time.monotonic()
        last = step == self.total
        if not self.shown or not (self._bar or last or now - self._printed >= _LINE_EVERY):
            return
        text = self._text(step, loss, now - self._began)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self._printed = now
            self.console.print(f"{self.title} {text}", soft_wrap=True)

    @property
    def samples_per_second(self) -> float:
        return self._images / max(time.monotonic() - self._began, 1e-9)

    def _text(self, step: int, loss: float, seconds: float) -> str:
        left = seconds / max(step - self.start, 1) * (self.total - step)
        return f"step {step}/{self.total}  loss {loss:.4f}  {self.samples_per_second:.0f} {self.unit}/s  {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
