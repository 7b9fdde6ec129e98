"""How far a run is: a bar with the time left on a terminal, a line for every video anywhere."""

from __future__ import annotations

from typing import Any


class RunProgress:
    """Shows the progress of a number of videos of so many steps each, while it is entered."""

    def __init__(self, console: Any, num_videos: int, num_steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
        # A video may take an hour: the speed is that of the last hundred steps, however long they took.
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=1e9)
        self._task = self._bar.add_task("…", total=num_videos * num_steps)
        self._num_videos, self._num_steps = num_videos, num_steps
        self._num_done = self._steps_of_this = 0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, what: str) -> None:
        """A video is begun."""
        from rich.markup import escape

        self._steps_of_this = 0
        self._bar.update(self._task, description=escape(what))

    def step(self) -> None:
        """A denoising step of it is done."""
        self._steps_of_this += 1
        self._bar.advance(self._task)

    def end(self, what: str, outcome: str) -> None:
        """It is made, or failed."""
        self._num_done += 1
        self._bar.advance(self._task, self._num_steps - self._steps_of_this)
        self._bar.console.print(
            f"{self._num_done} of {self._num_videos}: {what}: {outcome}", markup=False, soft_wrap=True
        )

    def skip(self, num_videos: int) -> None:
        """So many videos are there already, or are another process's. They do not count as time."""
        self._num_done += num_videos
        total = self._bar.tasks[0].total or 0
        self._bar.update(self._task, total=total - num_videos * self._num_steps)
