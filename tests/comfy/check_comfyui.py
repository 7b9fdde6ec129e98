"""Checks of the node in a real ComfyUI, with tiny random models on the CPU: `python check_comfyui.py PATH_OF_COMFYUI`.

Run it by the Python of that ComfyUI, with diffsparse installed there. It needs no weights, takes a few minutes, and was
written against 0.3.64 and 0.33. It prints a line for each model and exits with 1 if any check fails. Names of models
after the path check these alone.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import torch
from check_models import IMAGES, MODELS, PROMPTS


def build(name, arguments):
    """A patcher of the model with random weights, whose attention is sharp enough to notice what is skipped."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)(dict(arguments))
    config.unet_config = dict(arguments)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.diffusion_model.named_parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
            else:
                sharp = any(part in key for part in ("query_norm", "norm_q", "q_norm", "qnorm", "ln_q", "q_rms_norm"))
                weight.fill_(3.0 if sharp else float("norm" in key or key.endswith(".weight")))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def parameters_of(name):
    """What the parameters of a model are called in this version, to leave out what it does not know."""
    import comfy.ldm.flux.model
    import comfy.ldm.hunyuan_video.model

    known = {"Flux": comfy.ldm.flux.model.FluxParams, "HunyuanVideo": comfy.ldm.hunyuan_video.model.HunyuanVideoParams}
    return {*inspect.signature(known[name]).parameters, "image_model"} if name in known else None


def condition(name, seed, images=()):
    """A random prompt, and images to edit."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 16, 32, generator=generator)
    more = dict(PROMPTS.get(name, {}))
    if images:
        more |= IMAGES[name].prompt(images)
    return [[text, {"pooled_output": torch.randn(1, 32, generator=generator), **more}]]


def sample(model, name, shape, noise=None, images=()):
    """Six steps of Euler with guidance."""
    import comfy.sample

    latents = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latents, 0) if noise is None else noise
    positive, negative = condition(name, 1, images), condition(name, 2, images)
    return comfy.sample.sample(model, noise, 6, 4.0, "euler", "simple", positive, negative, latents, seed=0)


class Seen(Exception):
    """Thrown where the first call of a model has reached its last attention."""


def seen_by(model, name, inputs):
    """Queries [B, H, S, D] of all layers that a node is given in its first call, and the grid that it takes them for.

    Args:
        model: with a node that is sparse from the first step on.
        inputs: noise, then images to edit.
    """
    from diffsparse.session import Session

    queries, grids = [], set()

    def attend(session, layer, query, key, *args, **kwargs):
        queries.append(query)
        grids.add(session._tokens(query, key).grid)
        if layer + 1 == len(session.layer_names):
            raise Seen

    original, Session.attend = Session.attend, attend
    try:
        sample(model, name, inputs[0].shape, inputs[0], inputs[1:])
    except Seen:
        (grid,) = grids
        return queries, grid
    finally:
        Session.attend = original
    raise AssertionError("the node was not given the attention of the last layer")


def is_laid_out(model, name, shape, where):
    """Whether pixels of the latent, and of images to edit, are in every query where the layout has them.

    A pixel that is changed changes the query of its own token most.

    Args:
        where: where the images to edit are, None for none.
    """
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(shape, generator=generator) for _ in range(2 if where else 1)]
    if where in ("before", "behind"):
        # Of another size, so that it has no place in the grid.
        inputs.append(inputs[1][..., 8:, 4:])
    queries, grid = seen_by(model, name, inputs)
    patch, frames = -(-shape[-2] // grid.height), shape[2] if len(shape) == 5 else 1
    width = -(-shape[-1] // patch)

    def tokens(of, frame, y, x):
        """Where in the grid a pixel is of the latent, 0, or of an image, by each layer; None if nowhere."""
        changed = [latents.clone() for latents in inputs]
        (changed[of][:, :, frame] if len(shape) == 5 else changed[of])[..., y, x] += 10
        pairs = zip(seen_by(model, name, changed)[0], queries)
        places = {int((now - before).abs().sum((0, 1, 3)).argmax()) - grid.text_before for now, before in pairs}
        return {
            (place // (grid.height * grid.width), place // grid.width % grid.height, place % grid.width)
            if 0 <= place < grid.num_video_tokens
            else None
            for place in places
        }

    # Not the first pixel: some models pad the last patch with copies of what the first begins with.
    for frame, y, x in (
        (0, patch - 1, patch - 1),
        (frames // 2, shape[-2] // 2, shape[-1] // 3),
        (frames - 1, shape[-2] - 1, shape[-1] - 1),
    ):
        row, column = y // patch, x // patch
        expected = [{(frame + (where == "before"), row, column)}]
        if where:
            expected.append({(int(where == "behind"), row, column + width * (where == "beside"))})
        if [tokens(of, frame, y, x) for of in range(len(expected))] != expected:
            return False
    return len(inputs) < 3 or tokens(2, 0, 1, 1) == {None}


def is_counted(model, name, shape):
    """Whether DiffSparse Token Count finds the tokens and the width of attention."""
    from operator import attrgetter

    from diffsparse.comfy.models import diffusion_model, find_model
    from diffsparse.comfy.token_count import count_tokens

    (query, *_), grid = seen_by(model, name, [torch.zeros(shape)])
    module = diffusion_model(model)
    entry = find_model(module)
    count = count_tokens(module, entry, torch.zeros(shape), 0.2)
    width = query.shape[1] * query.shape[3]
    return count.num_tokens == grid.num_video_tokens and attrgetter(entry.width)(module) == width


def check(name, model, shape):
    """Name and result of each check of one model."""
    from diffsparse.comfy import NODE_CLASS_MAPPINGS

    def patched(model, **settings):
        settings = {"preset": "custom", "min_tokens": 0, "strict": True} | settings
        return NODE_CLASS_MAPPINGS["DiffSparseAttention"]().patch(model, **settings)[0]

    def distance(latents):
        return ((latents - dense).norm() / dense.norm()).item()

    def later(function, *args, **kwargs):
        return function(*args, **kwargs)

    dense = sample(model, name, shape)
    node = patched(model, density=0.2)
    sparse = sample(node, name, shape)
    (report,) = node.get_attachment("diffsparse").report().transformers
    places = [None, IMAGES[name].where] if name in IMAGES else [None]
    from_the_first = patched(model, start_percent=0.0)
    followed = patched(model, density=0.2)
    followed.model_options["transformer_options"]["optimized_attention_override"] = later
    return {
        # Four of six steps.
        "sparse": report.sparse_calls == 2 * report.dense_calls == 2 * report.dense_reasons["early step"],
        "laid out": all(is_laid_out(from_the_first, name, shape, where) for where in places),
        "counted": is_counted(from_the_first, name, shape),
        "finite": bool(torch.isfinite(sparse).all()),
        "deterministic": torch.equal(sparse, sample(patched(model, density=0.2), name, shape)),
        "closer with more": distance(sparse) > distance(sample(patched(model, density=0.6), name, shape)) > 1e-4,
        "equal with all": distance(sample(patched(model, density=1.0), name, shape)) < 1e-4,
        "a later override": torch.equal(sparse, sample(followed, name, shape)),
        "two nodes": torch.equal(sparse, sample(patched(patched(model, density=0.6), density=0.2), name, shape)),
        "bit-equal off": torch.equal(dense, sample(patched(model, enabled=False), name, shape)),
    }


def main(path, *names):
    """Check every model, or those of these names; 1 if any check fails."""
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention", "--force-fp32"]
    sys.path.insert(0, str(path))
    os.chdir(path)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.supported_models

    passed = True
    for name in names or MODELS:
        config, arguments, shape = MODELS[name]
        if not hasattr(comfy.supported_models, config):
            print(name, "is not in this ComfyUI")
            continue
        known = parameters_of(name)
        arguments = {key: value for key, value in arguments.items() if known is None or key in known}
        results = check(name, build(config, arguments), shape)
        passed &= all(results.values())
        print(name, ", ".join(f"{check}: {'yes' if result else 'NO'}" for check, result in results.items()))
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
