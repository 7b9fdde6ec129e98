"""A Python process of our own that may die or hang: it takes nothing down with it, and never outlives us."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SECONDS_TO_DIE = 10
SECONDS_TO_SAY_WHERE = 0.5
LAST_COMPLAINTS = 20


@contextlib.contextmanager
def child_process(module: str, *arguments: str) -> Iterator[ChildProcess]:
    """`python -m module arguments`, with our environment; at the end it is killed, and whatever it has started.

    The module should call `follow_parent` first.
    """
    # Files without a name: nothing of them is left, however we end.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        # A new process, not a fork of ours, which may hold a CUDA context. In a session of its own, so that one signal
        # reaches all that it starts.
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=complaints,
            start_new_session=True,
        )
        child = ChildProcess(process, output.fileno(), complaints.fileno())
        try:
            yield child
        finally:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_DIE)
            assert process.stdin is not None
            process.stdin.close()


def follow_parent() -> None:
    """In a child process: it ends as soon as its parent has, even if that was killed, and it answers `say_where`."""
    faulthandler.register(signal.SIGUSR1)

    def wait() -> None:
        # The parent never writes; there is an end to read when its side of the pipe is closed.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True)
class ChildProcess:
    """A process that was started here, and descriptors of the files that its output and its complaints go to."""

    process: subprocess.Popen[bytes]
    output: int
    complaints: int

    @property
    def runs(self) -> bool:
        """It has not ended yet."""
        # WNOWAIT: its number, which is that of its group too, stays its own until `child_process` is done with it.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self.process.returncode is None and os.waitid(os.P_PID, self.process.pid, options) is None

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        end = time.monotonic() + seconds
        while self.runs and time.monotonic() < end:
            time.sleep(0.02)
        return not self.runs

    def lines(self) -> list[str]:
        """The whole lines of its output so far."""
        return _text(self.output).split("\n")[:-1]

    def last_complaints(self) -> list[str]:
        """The last lines of its standard error so far."""
        return _text(self.complaints).splitlines()[-LAST_COMPLAINTS:]

    def say_where(self) -> None:
        """Have it write to its standard error where in its code it is."""
        os.kill(self.process.pid, signal.SIGUSR1)
        self.wait(SECONDS_TO_SAY_WHERE)

    def kill(self) -> None:
        """End it and whatever it has started, without waiting for that."""
        # macOS refuses where all of them have ended.
        if self.process.returncode is None:
            with contextlib.suppress(PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _text(file: int) -> str:
    # From its start without going there: the child writes at the same place in the file.
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
