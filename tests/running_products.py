"""Whether Hopper's machine code leaves the registers of a running matrix product alone.

Such a product reads its left operand from registers while what follows runs, until a wait says that it is done. The
assembler of CUDA 12.9 is known to give these registers to others too early in some kernels, which spoils results now
and then (https://github.com/triton-lang/triton/pull/11781).
"""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+) (.*?);", re.MULTILINE)
_PRODUCT = re.compile(r"[HIQ]GMMA\.\d+x(\d+)x\d+\.")
_WAIT = re.compile(r"gsb0, 0x(\d)")


def touched_while_running(code: str) -> list[str]:
    """The instructions of a listing by `cuobjdump -sass` that take registers of a product that is not waited for.

    Taken from top to bottom: loops of attention kernels end with a wait.
    """
    touching = []
    batches: list[set[int]] = []  # of each batch of products the registers, the oldest first
    started: set[int] = set()  # of those whose batch is not full yet
    for operation, operands in _INSTRUCTION.findall(code):
        product = _PRODUCT.match(operation)
        if product is not None:
            out, left = operands.split(",")[:2]
            started |= _registers(out, int(product[1]) // 2) | _registers(left, 4)
            if "gsb0" in operands:
                batches.append(started)
                started = set()
        elif operation == "WARPGROUP.DEPBAR.LE":
            wait = _WAIT.search(operands)
            assert wait is not None, operands
            batches = batches[len(batches) - int(wait[1]) :] if int(wait[1]) else []
        elif started.union(*batches) & _taken(operation, operands):
            touching.append(f"{operation} {operands}")
    return touching


def _taken(operation: str, operands: str) -> set[int]:
    """The registers that an instruction reads or writes. An address takes one or two, however much lies there."""
    width = 4 if "128" in operation else 2 if "64" in operation or "WIDE" in operation else 1
    addresses = re.findall(r"\[.*?\]", operands)
    numbers = re.sub(r"\[.*?\]", "", operands)
    factors = ""
    if operation.startswith("IMAD.WIDE"):
        # What it writes and adds is of two registers, what it multiplies of one. Predicates may stand among them.
        out, *two, addend = (x for x in numbers.split(",") if not re.match(r" !?U?P", x))
        numbers, factors = f"{out},{addend}", ",".join(two)
    of_addresses = (_registers(x, 2 if ".64" in x else 1) for x in addresses)
    return _registers(numbers, width).union(_registers(factors, 1), *of_addresses)


def _registers(operands: str, width: int) -> set[int]:
    """The numbers of the registers named, and of those that follow each of them."""
    return {int(number) + i for number in re.findall(r"\bR(\d+)\b", operands) for i in range(width)}
