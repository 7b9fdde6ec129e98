"""What PyTorch has kernels for on Apple's GPUs, by the list of operators that comes with it."""

from __future__ import annotations

from pathlib import Path

import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

_LIST = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
_OPERATORS = {each["func"].partition("(")[0]: each for each in yaml.safe_load(_LIST.read_text("utf-8"))}


class Lacking(TorchDispatchMode):
    """The names of the operators that ran and have no kernel there."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not _is_there(str(function).removeprefix("aten.").removesuffix(".default")):
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _is_there(name):
    operator = _OPERATORS[name]
    while "structured_delegate" in operator:
        operator = _OPERATORS[operator["structured_delegate"]]
    # One that names no device is made of others.
    devices = ", ".join(operator.get("dispatch", ["Composite"])).split(", ")
    return any(device == "MPS" or device.startswith("Composite") for device in devices)
