"""Checks of the nodes in a running ComfyUI, over its web interface: `python check_comfyui_server.py PATH_OF_COMFYUI`.

Run it by the Python of that ComfyUI, with diffsparse installed there. It starts a server of its own on the CPU, with
tiny random models in a temporary folder, and leaves that ComfyUI as it is. It needs no weights, takes a few minutes,
prints a line for each check and exits with 1 if any fails. Written against 0.3.64 and 0.33.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
SHAPES = {
    "Wan": (1, 16, 5, 24, 24),
    "HunyuanVideo": (1, 16, 5, 24, 24),
    "Flux": (1, 16, 48, 60),
    "LTXV": (1, 128, 6, 12, 12),
    "UNet": (1, 4, 16, 16),
}
PORTS_TRIED_FOR_SECONDS = 300


class Server:
    """A ComfyUI of our own."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.base, self.log = base, base / "log.txt"
        nodes = base / "custom_nodes"
        (nodes / "checks").mkdir(parents=True)
        shutil.copyfile(HERE / "server_nodes.py", nodes / "checks" / "__init__.py")
        subprocess.run([sys.executable, "-m", "diffsparse.eval", "comfyui-install", base], check=True, stdout=-3)
        options = ["--cpu", "--use-pytorch-cross-attention", "--force-fp32", "--disable-auto-launch"]
        places = ["--base-directory", base, "--port", self.url.rpartition(":")[2]]
        if "--database-url" in (comfyui / "comfy" / "cli_args.py").read_text():
            places += ["--database-url", "sqlite:///:memory:"]
        paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "main.py", *options, *places],
            cwd=comfyui,
            env=os.environ | {"CHECK_SAVES_MODELS": "1", "PYTHONPATH": paths},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        until = time.monotonic() + PORTS_TRIED_FOR_SECONDS
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(1)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path, body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, graph, while_it_runs=None, fresh=True):
        """The entry of a graph in ComfyUI's history; its answer where the graph is refused."""
        if fresh:
            # Else ComfyUI gives out what it has kept of the same nodes.
            self.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1)
        answer = self.post("/prompt", {"prompt": graph})
        if "prompt_id" not in answer:
            return answer
        if while_it_runs is not None:
            while_it_runs()
        while True:
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            time.sleep(0.2)


class Graphs:
    """Samples with nodes between model loader and sampler, and gives the latents or what went wrong."""

    def __init__(self, server: Server) -> None:
        self.server, self.number = server, 0

    def graph(self, name, *nodes, shape=None, steps=6, seed=0):
        loader = node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")
        graph = {"0": node("CheckUNet") if name == "UNet" else loader}
        for number, (kind, inputs) in enumerate(nodes, 1):
            graph[str(number)] = node(kind, model=[str(number - 1), 0], **inputs)
        model = [str(len(nodes)), 0]
        self.number += 1
        sampling = {"seed": seed, "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
        links = {"model": model, "positive": ["+", 0], "negative": ["-", 0], "latent_image": ["empty", 0]}
        return graph | {
            "+": node("CheckPrompt", model_name=name, seed=1),
            "-": node("CheckPrompt", model_name=name, seed=2),
            "empty": node("CheckLatent", shape=",".join(map(str, shape or SHAPES[name]))),
            "sampler": node("KSampler", denoise=1.0, **sampling, **links),
            "report": node("DiffSparseReport", model=model, samples=["sampler", 0]),
            "save": node("SaveLatent", samples=["report", 2], filename_prefix=f"n{self.number}"),
        }

    def latents(self, name, *nodes, fresh=True, **sampling):
        """The latents and the text of the report."""
        entry = self.server.run(self.graph(name, *nodes, **sampling), fresh=fresh)
        if "outputs" not in entry or "save" not in entry["outputs"]:
            raise RuntimeError(message(entry))
        file = next((self.server.base / "output").rglob(f"n{self.number}_*.latent"))
        return load_file(file)["latent_tensor"], entry["outputs"]["report"]["text"][0]

    def error(self, name, *nodes, **sampling):
        """What ComfyUI says of a graph that cannot run."""
        return message(self.server.run(self.graph(name, *nodes, **sampling)))


def node(kind, **inputs):
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


def message(entry):
    """What went wrong: refused at a node, or raised in one."""
    details = [error["details"] for refused in entry.get("node_errors", {}).values() for error in refused["errors"]]
    for kind, event in entry.get("status", {}).get("messages", []):
        if kind in ("execution_error", "execution_interrupted"):
            details.append(event.get("exception_message", "interrupted"))
    return " ".join(details)


def sparse(density=0.2, **inputs):
    """DiffSparse Attention at any length of sequence."""
    own = {"enabled": True, "preset": "custom", "start_percent": 0.2, "end_percent": 1.0, "density": density}
    return "DiffSparseAttention", own | {"min_tokens": 0, "strict": True} | inputs


def calibrate(name):
    """DiffSparse Calibrate."""
    return "DiffSparseCalibrate", {"file_name": name}


def distance(latents, dense):
    """Relative L2."""
    return ((latents - dense).norm() / dense.norm()).item()


def check_nodes(server):
    """What ComfyUI tells its front end of the nodes."""
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("DiffSparse")}
    kinds = [info["input"].get(kind, {}) for info in nodes.values() for kind in ("required", "optional")]
    inputs = [spec for kind in kinds for spec in kind.values()]
    yield "four nodes", len(nodes) == 4, sorted(nodes)
    yield "every input has a tooltip", all(spec[1].get("tooltip") for spec in inputs), f"{len(inputs)} inputs"
    pages = []
    for name in nodes:
        with urllib.request.urlopen(f"{server.url}/extensions/comfyui-diffsparse/docs/{name}.md", timeout=30) as page:
            pages.append(page.read().decode().partition("\n")[0])
    yield "help pages", all(page.startswith("# DiffSparse") for page in pages), pages
    workflows = server.get("/workflow_templates").get("comfyui-diffsparse", [])
    yield "example workflows", len(workflows) >= 2, workflows


def check_model(graphs, name):
    """The effect of the node on one model."""
    dense, _ = graphs.latents(name)
    little, text = graphs.latents(name, sparse(0.2))
    again, _ = graphs.latents(name, sparse(0.2))
    more, _ = graphs.latents(name, sparse(0.6))
    off, _ = graphs.latents(name, sparse(enabled=False))
    yield f"{name}: finite", bool(little.isfinite().all()), text.partition("\n")[0]
    yield f"{name}: the same again", torch.equal(little, again), ""
    apart = [distance(each, dense) for each in (little, more)]
    yield f"{name}: near dense, nearer with more", 0.5 > apart[0] > apart[1] > 1e-4, f"{apart[0]:.4f} {apart[1]:.4f}"
    yield f"{name}: equal to the last bit when off", torch.equal(off, dense), ""
    whole, _ = graphs.latents(name, sparse(1.0))
    yield f"{name}: density 1 is dense up to rounding", distance(whole, dense) < 1e-4, f"{distance(whole, dense):.1e}"
    for other, nodes in {
        "a later override": [sparse(), ("CheckOverride", {})],
        "two nodes": [sparse(0.6), sparse(0.2)],
    }.items():
        yield f"{name}: {other} changes nothing", torch.equal(graphs.latents(name, *nodes)[0], little), ""
    frames = [*SHAPES[name][:2], *([1] if len(SHAPES[name]) == 5 else []), *SHAPES[name][-2:]]
    image, text = graphs.latents(name, sparse(), shape=frames)
    yield f"{name}: one frame", bool(image.isfinite().all()) and "0 of 6" not in text, text.partition("\n")[0]


def check_plan_files(graphs, name):
    """Calibrated once, served afterwards."""
    folder = graphs.server.base / "models" / "diffsparse"
    file = f"{name}.safetensors"
    expected, _ = graphs.latents(name, sparse(0.3))
    recorded, _ = graphs.latents(name, sparse(0.3), calibrate(name))
    yield f"{name}: calibrating changes nothing", torch.equal(recorded, expected), names_in(folder)
    inputs = graphs.server.get("/object_info/DiffSparseAttention")["DiffSparseAttention"]["input"]["optional"]
    yield f"{name}: the list of plan_file has the file", file in str(inputs["plan_file"]), inputs["plan_file"][0]
    served, text = graphs.latents(name, sparse(plan_file=file))
    dense, _ = graphs.latents(name)
    apart = distance(served, expected), distance(expected, dense)
    seen = f"{apart[0]:.4f} < {apart[1]:.4f}; {text.partition(chr(10))[0]}"
    yield f"{name}: the file serves", apart[0] < apart[1] and "4 of 6" in text, seen
    yield f"{name}: the same again", torch.equal(graphs.latents(name, sparse(plan_file=file))[0], served), ""
    graphs.latents(name, sparse(0.6), calibrate(name), fresh=False)
    other, _ = graphs.latents(name, sparse(plan_file=file), fresh=False)
    yield f"{name}: a new file of the same name is read", distance(other, served) > 1e-4, ""


def check_timing(graphs):
    """By default a long sequence is timed once, and a short one stays dense."""
    long, default = (1, 16, 9, 44, 44), sparse(min_tokens=-1, strict=False)
    dense, _ = graphs.latents("Wan", shape=long)
    first, text = graphs.latents("Wan", default, shape=long)
    again, _ = graphs.latents("Wan", default, shape=long)
    slow = "as fast as dense attention here" in text
    yield "4,356 tokens: dense if found slow, else sparse", torch.equal(first, dense) == slow, text.partition("\n")[0]
    yield "4,356 tokens: the same again", torch.equal(again, first), ""
    short, text = graphs.latents("Wan", default)
    yield "720 tokens: dense", torch.equal(short, graphs.latents("Wan")[0]), text.partition("\n")[0]


def names_in(folder):
    """The files of a folder."""
    return sorted(file.name for file in folder.iterdir())


def check_accidents(graphs):
    """What goes wrong, what is said, and that the model is usable afterwards."""
    server, folder = graphs.server, graphs.server.base / "models" / "diffsparse"
    dense, (little, _) = graphs.latents("Wan")[0], graphs.latents("Wan", sparse())

    def interrupt():
        time.sleep(4)
        server.post("/interrupt", {})

    for kind, nodes in {"sampling": [sparse()], "calibrating": [sparse(), calibrate("cut")]}.items():
        said = message(server.run(graphs.graph("Wan", *nodes, steps=2000), interrupt))
        yield f"interrupt while {kind}", "interrupted" in said, said
    yield "no file of an interrupted run", not any("cut" in name for name in names_in(folder)), names_in(folder)
    for kind, nodes, before in (("dense", [], dense), ("sparse", [sparse()], little)):
        yield f"afterwards {kind} as before", torch.equal(graphs.latents("Wan", *nodes)[0], before), ""
    short, text = graphs.latents("Wan", sparse(strict=False), ("CheckOutOfMemory", {"broken": True}))
    yield "out of memory makes it dense", torch.equal(short, dense) and "out of memory" in text, text.partition("\n")[0]
    fixed, _ = graphs.latents("Wan", sparse(), ("CheckOutOfMemory", {"broken": False}))
    yield "and sparse again afterwards", torch.equal(fixed, little), ""
    plain, (passed, text) = graphs.latents("UNet")[0], graphs.latents("UNet", sparse(strict=False))
    yield "a U-Net passes through", torch.equal(plain, passed), text
    for kind, nodes, part in [
        ("a U-Net, strict", ("UNet", sparse()), "UNetModel is no diffusion transformer"),
        ("dense_blocks that are no blocks", ("Wan", sparse(dense_blocks="first")), "neither a block nor a range"),
        ("dense_blocks beyond the model", ("Wan", sparse(dense_blocks="0, 9")), "none numbered 9"),
        ("a plan file outside", ("Wan", sparse(plan_file="../../secret.safetensors")), "is no plan file in"),
        ("a plan file of another model", ("LTXV", sparse(plan_file="Wan.safetensors")), "for WanModel with 3"),
        ("a file name outside", ("Wan", sparse(), calibrate("../a")), "no name of a file"),
        ("Calibrate alone", ("Wan", calibrate("a")), "no DiffSparse Attention"),
        ("Calibrate first", ("Wan", sparse(), calibrate("a"), sparse()), "the last of them"),
        ("Calibrate, short", ("Wan", sparse(min_tokens=-1, strict=False), calibrate("a")), "nothing to write"),
    ]:
        said = graphs.error(*nodes)
        yield kind, part in said, said
    said = graphs.error("Wan", sparse(plan_file="Wan.safetensors"), shape=(1, 16, 3, 24, 24))
    yield "a plan file of another size", "but this call has" in said, said
    whole = (folder / "Wan.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    (folder / "newer.safetensors").write_bytes(whole.replace(b'\\"schema\\": 1', b'\\"schema\\": 9'))
    for name, part in (("cut", "cannot be read"), ("newer", "schema is 9")):
        said = graphs.error("Wan", sparse(plan_file=f"{name}.safetensors"))
        yield f"a plan file, {name}", part in said, said
    yield "afterwards the model as before", torch.equal(graphs.latents("Wan", sparse())[0], little), ""


def check_company(graphs):
    """With other nodes of ComfyUI."""
    cache = ("EasyCache", {"reuse_threshold": 1.5, "start_percent": 0.15, "end_percent": 0.95, "verbose": True})
    lora = ("LoraLoaderModelOnly", {"lora_name": "tiny.safetensors", "strength_model": 1.0})
    for kind, other in {"EasyCache": cache, "LoRA": lora}.items():
        dense, _ = graphs.latents("Wan", other)
        plain, _ = graphs.latents("Wan", sparse())
        (before, text), (after, _) = graphs.latents("Wan", other, sparse()), graphs.latents("Wan", sparse(), other)
        yield f"{kind}: the order does not matter", torch.equal(before, after), text.partition("\n")[0]
        yield f"{kind}: both have an effect", distance(before, dense) > 1e-4 and distance(before, plain) > 1e-4, ""


def main(comfyui):
    """1 if any check fails."""
    with tempfile.TemporaryDirectory() as base:
        server = Server(comfyui, Path(base))
        try:
            graphs = Graphs(server)
            version = server.get("/system_stats")["system"].get("comfyui_version")
            print(f"ComfyUI {version}, torch {torch.__version__}")
            names = [name for name in SHAPES if name != "UNet"]
            if version == "0.3.64":
                names.remove("Flux")  # That version takes every Flux for one of width 3072.
            checks = [check_nodes(server)]
            checks += [check_model(graphs, name) for name in names]
            checks += [check_plan_files(graphs, name) for name in names]
            checks += [check_timing(graphs), check_company(graphs), check_accidents(graphs)]
            passed = True
            for check in checks:
                try:
                    for what, right, seen in check:
                        passed &= right
                        print("yes" if right else "NO ", what, f"[{seen}]" if seen else "", flush=True)
                except RuntimeError as error:
                    passed = False
                    print("NO ", f"a run that should end did not: {error}", flush=True)
            return 0 if passed else 1
        finally:
            server.process.terminate()
            server.process.wait(30)
            shutil.copyfile(server.log, Path(tempfile.gettempdir()) / "check_comfyui_server.log")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))
