"""Captioned synthetic video: textured shapes that move, turn and pulse over drifting backgrounds.

The same few parameters, a `Scene`, give the picture and the caption, so the caption is always right. Lengths are
fractions of the canvas's shorter side and speeds are per frame: a small canvas or a short clip shows the same world.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.98, 0.86, 0.12),
    "purple": (0.62, 0.18, 0.80),
    "cyan": (0.15, 0.82, 0.88),
    "orange": (1.00, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
}
# a background is darker than a shape of the same colour
BACKGROUND_NAMES = {"white": "gray"}
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "striped", "checkered", "gradient", "wavy")
DIRECTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "moves up and left": (-1, -1),
    "moves up and right": (1, -1),
    "moves down and left": (-1, 1),
    "moves down and right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "turns", "pulses")


@dataclass(frozen=True)
class Shape:
    """One moving shape. `center` is where it is in the middle of the clip, (0, 0) the middle of the canvas."""

    color: str
    texture: str
    kind: str
    motion: str
    center: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.26
    angle: float = 0.0
    speed: float = 0.05

    @property
    def words(self) -> str:
        """Colour, texture and kind as the caption has them."""
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{self.color}{texture} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """What is seen: a front shape, perhaps one behind it, and a background that drifts by `drift` per frame."""

    front: Shape
    behind: Shape | None
    color: str
    pattern: str
    drift: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        """The scene in words."""
        pattern = "" if self.pattern == "plain" else f" {self.pattern}"
        background = f"{BACKGROUND_NAMES.get(self.color, self.color)}{pattern} background"
        behind = f" in front of {_a(self.behind.words)} that {self.behind.motion}" if self.behind else ""
        return f"{_a(self.front.words)} {self.front.motion}{behind} over {_a(background)}"


def _a(words: str) -> str:
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def random_scene(generator: torch.Generator) -> Scene:
    """A scene drawn with `generator`; its colours differ from one another."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    colors = [tuple(COLORS)[i] for i in torch.randperm(len(COLORS), generator=generator)[:3].tolist()]

    def shape(color: str, radius: float, spread: float) -> Shape:
        kind, texture, motion = pick(KINDS), pick(TEXTURES), pick(MOTIONS)
        if motion == "turns" and texture == "plain" and kind in ("circle", "ring"):
            texture = "striped"
        center = (uniform(-spread, spread), uniform(-spread, spread))
        angle = uniform(-0.25, 0.25)
        return Shape(color, texture, kind, motion, center, radius, angle, speed=uniform(0.042, 0.056))

    has_behind = uniform(0, 1) < 0.35
    front = shape(colors[0], uniform(0.20, 0.25) if has_behind else uniform(0.24, 0.32), 0.14)
    behind = shape(colors[1], uniform(0.26, 0.32), 0.18) if has_behind else None
    heading = uniform(0, 2 * math.pi)
    drift = (0.015 * math.cos(heading), 0.015 * math.sin(heading))
    return Scene(front, behind, colors[2], pick(BACKGROUNDS), drift)


def render(
    scene: Scene,
    num_frames: int,
    height: int,
    width: int,
    *,
    zoom: float = 1.0,
    look_at: tuple[float, float] = (0.0, 0.0),
    device: torch.device | str = "cpu",
) -> Tensor:
    """The scene as video [3, num_frames, height, width], float32 in 0..1.

    `zoom` above 1 shows a part of the canvas around `look_at`, enlarged.
    """
    side = min(height, width)
    pixels = side * zoom
    y = ((torch.arange(height, device=device) + 0.5 - height / 2) / pixels + look_at[1])[None, :, None]
    x = ((torch.arange(width, device=device) + 0.5 - width / 2) / pixels + look_at[0])[None, None, :]
    # [F, 1, 1], zero in the middle of the clip
    time = (torch.arange(num_frames, device=device) - (num_frames - 1) / 2)[:, None, None]
    image = _background(scene, x, y, time, pixels)
    for shape in (scene.behind, scene.front):
        if shape is not None:
            image = _draw(shape, image, x, y, time, pixels)
    return image.clamp(0, 1)


def _background(scene: Scene, x: Tensor, y: Tensor, time: Tensor, pixels: float) -> Tensor:
    """[3, F, H, W]"""
    u = x - scene.drift[0] * time + 0 * y
    v = y - scene.drift[1] * time + 0 * x
    if scene.pattern == "striped":
        light = _square_wave(u + v, 0.40, pixels * math.sqrt(2))
    elif scene.pattern == "checkered":
        light = _checker(u, v, 0.5, pixels)
    elif scene.pattern == "gradient":
        light = 0.5 + 0.5 * torch.sin(2 * math.pi * (0.5 * v + 8 * scene.drift[0] * time))
    elif scene.pattern == "wavy":
        light = _square_wave(v + 0.06 * torch.sin(2 * math.pi * u / 0.5), 0.34, pixels)
    else:
        light = torch.full_like(u, 0.7)
    return _tinted(0.30 + 0.40 * light, scene.color)


def _draw(shape: Shape, image: Tensor, x: Tensor, y: Tensor, time: Tensor, pixels: float) -> Tensor:
    """The image [3, F, H, W] with the shape over it: textured inside, a dark rim."""
    step_x, step_y = DIRECTIONS.get(shape.motion, (0, 0))
    length = max(math.hypot(step_x, step_y), 1.0)
    travel = shape.speed * time / length
    angle = shape.angle + (4.0 * shape.speed * time if shape.motion == "turns" else 0 * time)
    radius: float | Tensor = shape.radius
    if shape.motion == "pulses":
        radius = radius * (1 + 0.35 * torch.sin(12.0 * shape.speed * time))
    dx, dy = x - shape.center[0] - step_x * travel, y - shape.center[1] - step_y * travel
    # the shape's own coordinates: turned, its radius 1
    u = (torch.cos(angle) * dx + torch.sin(angle) * dy) / radius
    v = (torch.cos(angle) * dy - torch.sin(angle) * dx) / radius
    distance = _signed_distance(shape.kind, u, v) * radius * pixels
    rim = 0.022 * pixels
    inside = (0.5 - distance).clamp(0, 1)
    core = (0.5 - distance - rim).clamp(0, 1)
    own_pixels = pixels * shape.radius
    if shape.texture == "striped":
        light = _square_wave(v, 0.5, own_pixels)
    elif shape.texture == "dotted":
        dots = 0.5 + 0.25 * (torch.cos(2 * math.pi * u / 0.55) + torch.cos(2 * math.pi * v / 0.55))
        light = 1 - ((dots - 0.68) * own_pixels * 0.25 + 0.5).clamp(0, 1)
    elif shape.texture == "checkered":
        light = _checker(u, v, 0.9, own_pixels)
    else:
        light = torch.ones_like(u)
    paint = _tinted(0.25 + 0.75 * light, shape.color) * core + 0.04 * (1 - core)
    return image * (1 - inside) + paint * inside


def _signed_distance(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1, negative inside."""
    if kind == "circle":
        return torch.hypot(u, v) - 1
    if kind == "ring":
        return (torch.hypot(u, v) - 0.72).abs() - 0.28
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.82
    if kind == "cross":
        a, b = u.abs(), v.abs()
        return torch.minimum(torch.maximum(a - 1, b - 0.34), torch.maximum(a - 0.34, b - 1))
    # up is -v; both are folded onto one sector of their symmetry, its axis the first coordinate
    if kind == "triangle":
        along, _ = _fold(u, -v, 3, offset=math.pi)
        return along - 0.62
    if kind == "star":
        along, across = _fold(u, -v, 5, offset=0.0)
        inner_x, inner_y = 0.48 * math.cos(math.pi / 5), 0.48 * math.sin(math.pi / 5)
        edge_x, edge_y = inner_x - 1.08, inner_y
        return ((along - 1.08) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)
    raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")


def _fold(u: Tensor, v: Tensor, sides: int, offset: float) -> tuple[Tensor, Tensor]:
    """Coordinates along and across the axis of the nearest of `sides` sectors; one axis points up at offset 0."""
    angle = torch.atan2(u, v) + offset
    sector = 2 * math.pi / sides
    angle = torch.remainder(angle + sector / 2, sector) - sector / 2
    r = torch.hypot(u, v)
    return r * torch.cos(angle), (r * torch.sin(angle)).abs()


def _square_wave(u: Tensor, period: float, pixels: float) -> Tensor:
    """0 and 1 in turn, with edges one pixel wide."""
    slope = period * pixels / (2 * math.pi)
    return (0.5 + slope * torch.sin(2 * math.pi * u / period)).clamp(0, 1)


def _checker(u: Tensor, v: Tensor, period: float, pixels: float) -> Tensor:
    a, b = _square_wave(u, period, pixels), _square_wave(v, period, pixels)
    return a * b + (1 - a) * (1 - b)


def _tinted(light: Tensor, color: str) -> Tensor:
    """Light [F, H, W] in a colour, [3, F, H, W]."""
    # numbers, not a tensor of them: copying one to a GPU would wait for all work before it
    return torch.stack([light * value for value in COLORS[color]])
