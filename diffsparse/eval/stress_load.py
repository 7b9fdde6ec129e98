"""Processes that keep a device busy: each multiplies matrices without end. `diffsparse stress` starts them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from diffsparse.eval.child_process import child_process, follow_parent

RUNNING = "running"
SECONDS_TO_START = 300
# Rows of the square matrices: a product takes 1 to 10 ms on a large GPU, or on a core.
ROWS_ON_GPU, ROWS_ELSEWHERE = 8192, 512
PRODUCTS_IN_TURN = 8


@contextlib.contextmanager
def busy_device(device: str, processes: int, module: str = __name__) -> Iterator[Callable[[], int]]:
    """While it lasts, so many processes keep the device busy; gives what says how many of them still run.

    Each runs `module`, which says when it is at work.

    Raises:
        ValueError: one of them ended, or did not get to work.
    """
    deadline = time.monotonic() + SECONDS_TO_START
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child_process(module, device)) for _ in range(processes)]
        try:
            for child in children:
                while RUNNING not in child.lines():
                    if not child.runs or time.monotonic() > deadline:
                        why = (child.last_complaints() or ["it said nothing"])[-1]
                        raise ValueError(
                            f"`--processes` {processes} do not all get to work on {device}: {why}. Ask for fewer."
                        )
                    time.sleep(0.05)
            yield lambda: sum(child.runs for child in children)
        finally:
            # All at once: waiting for each before the next is told would take long.
            for child in children:
                child.kill()


def multiply_for_ever(device: str) -> None:
    """Products of matrices, one after the other, with the next ones waiting before the last ones are done."""
    import torch

    torch.set_num_threads(1)
    on_gpu = torch.device(device).type == "cuda"
    rows = ROWS_ON_GPU if on_gpu else ROWS_ELSEWHERE
    matrix = torch.randn((rows, rows), device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    product = torch.empty_like(matrix)
    waits: list[Callable[[], object]] = []
    has_said = False
    while True:
        for _ in range(PRODUCTS_IN_TURN):
            torch.mm(matrix, matrix, out=product)
        if on_gpu:
            # One that sleeps: those who wait awake would take the processor from who is to be tried.
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            waits.append(event.synchronize)
        else:
            waits.append(product[0, 0].item)
        if len(waits) == 2:
            waits.pop(0)()
            if not has_said:
                print(RUNNING, flush=True)
                has_said = True


if __name__ == "__main__":
    follow_parent()
    multiply_for_ever(sys.argv[1])
