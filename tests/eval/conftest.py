"""A tiny model in a folder, as the demo finds its own: random weights, for tests that do not look at the video."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny_models import tiny_wan_pipeline
from torchvision.models import alexnet, squeezenet1_1
from torchvision.models.vgg import cfgs, make_layers

from diffsparse.eval import child_process
from diffsparse.eval.lpips_backbone import BACKBONES
from diffsparse.eval.run_folder import Pair, RunFolder
from diffsparse.kernels import backends, block_sparse, capabilities, self_test

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

SAMPLING = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "max_sequence_length": 24,
    "fps": 8,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_wan_pipeline().save_pretrained(folder)
    (folder / "demo.json").write_text(json.dumps(SAMPLING))
    return folder


@pytest.fixture
def own_tiny_model(tiny_model, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_model, tmp_path / "broken-model")


@pytest.fixture(scope="module")
def browser():
    # Not for the whole session: while it lasts, no other test can run an event loop.
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        # What a browser does by itself over the network is not the page's.
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield launched
        launched.close()


@pytest.fixture
def browser_page(browser):
    """An empty page; afterwards: no error on its console, and no request but the first."""
    page = browser.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == requests[:1]


@pytest.fixture
def fake_run(tmp_path):
    """Writes a run as `diffsparse eval run` does, with given videos: make(prompts, configs, seeds, error).

    `error(config, prompt, seed)` is what is added to the noise that stands for the dense video.
    """

    def make(prompts, configs=("fast",), seeds=(0,), error=lambda *of: 0.1, name="run", height=34, width=48):
        run = RunFolder(tmp_path / name)
        settings = {"model": "demo", "model_sha256": "0", "sampling": SAMPLING, "prompts": list(prompts)}
        texts = {config: {"text": config, "config": f"SparseAttentionConfig({config})"} for config in configs}
        environment = {"device": "cpu", "machine": {"cpu": "2 cores"}, "versions": {"torch": "2"}, "git_revision": "a"}
        command = f"diffsparse eval run --output {run.path}"
        run.agree(settings | {"seeds": list(seeds), "configs": texts}, {"command": command} | environment)
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                random = np.random.default_rng([index, seed])
                dense = random.random((3, height, width, 3)) * 0.5 + 0.2
                for config in ("dense", *configs):
                    is_dense = config == "dense"
                    frames = dense if is_dense else dense + error(config, index, seed) * random.random(dense.shape)
                    record = {
                        "prompt": prompt,
                        "seed": seed,
                        "config": config,
                        "num_frames": 3,
                        "total_seconds": 10.0 if is_dense else 5.0 + index,
                        "seconds_per_step": 2.0 if is_dense else 1.0,
                        "attention_seconds": 4.0 if is_dense else 1.5 + index,
                        "peak_memory_bytes": 3_000_000_000,
                        "peak_memory_kind": "resident in the process",
                        "attention": None if is_dense else ATTENTION,
                        "environment": environment,
                        "process": "a",
                    }
                    run.add(config, Pair(index, seed), frames, record)
        return run.path

    return make


@pytest.fixture
def children_find_the_standins(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2)))


@pytest.fixture
def started(monkeypatch):
    """Every process that is started."""
    processes, popen = [], subprocess.Popen
    monkeypatch.setattr(
        child_process.subprocess, "Popen", lambda *args, **more: processes.append(popen(*args, **more)) or processes[-1]
    )
    return processes


class RandomBackbones:
    """LPIPS' backbones with random weights, in files as torchvision's."""

    def __init__(self, folder):
        self.folder = folder
        self.networks = {}

    def features(self, net):
        if net not in self.networks:
            torch.manual_seed(0)
            make = {
                "alex": lambda: alexnet(weights=None).features,
                "vgg": lambda: make_layers(cfgs["D"]),
                "squeeze": lambda: squeezenet1_1(weights=None).features,
            }
            self.networks[net] = make[net]().eval().requires_grad_(False)
        return self.networks[net]

    def file(self, net):
        file = self.folder / f"{net}.pth"
        if not file.is_file():
            torch.save({f"features.{name}": value for name, value in self.features(net).state_dict().items()}, file)
        return file

    @contextlib.contextmanager
    def trusted(self):
        """While it lasts, they pass for the real ones."""
        with pytest.MonkeyPatch.context() as patch:
            for net in ("alex", "squeeze", "vgg"):
                start = hashlib.sha256(self.file(net).read_bytes()).hexdigest()[:8]
                patch.setitem(BACKBONES, net, dataclasses.replace(BACKBONES[net], file_name=f"{net}-{start}.pth"))
            yield

    def put_into(self, folder, net):
        """Within `trusted`: a copy under the name that it has there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BACKBONES[net].file_name).write_bytes(self.file(net).read_bytes())


@pytest.fixture(scope="session")
def random_backbones(tmp_path_factory):
    return RandomBackbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Where torch looks for backbones, not made yet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def only_backends(monkeypatch):
    """A function that leaves no backends but the given ones: `why_not` and `attend` by name."""

    def replace(**given):
        for name, (why_not, attend) in given.items():
            module = ModuleType(f"backend_{name}")
            module.why_not, module.attend = why_not, attend
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for user in (backends, block_sparse, capabilities, self_test):
            monkeypatch.setattr(user, "BACKENDS", {name: f"backend_{name}" for name in given})

    return replace


ATTENTION = {
    "density": 0.25,
    "overall_density": 0.4,
    "transformers": [
        {
            "name": "transformer",
            "family": "wan",
            "num_layers": 1,
            "num_heads": 2,
            "sparse_calls": 8,
            "dense_calls": 2,
            "dense_reasons": {"early step": 2},
            "density": 0.25,
            "overall_density": 0.4,
            "head_classes": [["spatial", "temporal"]],
            "head_densities": [[0.2, 0.3]],
            "class_shares": {"spatial": 0.5, "temporal": 0.5},
        }
    ],
}
