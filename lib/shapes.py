"""The built-in dataset: ten drawn shapes, so that everything can be tried without a download.

Every image is drawn from (seed, index): a shape with random place, size, rotation, colours, gradients and
textures, 32 x 32 pixels. `demo.pt`, beside this file, is the whole method trained on it at a tiny size.
"""
import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

SIZE = 32  # pixels per side
GRID = 4  # latent tokens per side
DEMO_PT = Path(__file__).parent.parent / "demo.pt"
SPLITS = {"shapes://train": {"count": 20_000, "seed": 1}, "shapes://val": {"count": 2_000, "seed": 2}}


def _polar(radii):
    """Return the polygon with these radii at equal angles, from the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii) - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]


def _heart():
    t = np.linspace(0, 2 * np.pi, 48)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], 1) / 16


OUTLINES = {  # polygons in [-1, 1], y downwards
    "arrow": np.array([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)]),
    "cross": np.array([(-.27, -1), (.27, -1), (.27, -.27), (1, -.27), (1, .27), (.27, .27), (.27, 1),
                       (-.27, 1), (-.27, .27), (-1, .27), (-1, -.27), (-.27, -.27)]),
    "disc": _polar([1] * 48),
    "heart": _heart(),
    "hourglass": np.array([(-.8, -1), (.8, -1), (.12, 0), (.8, 1), (-.8, 1), (-.12, 0)]),
    "moon": _polar([1] * 48),
    "ring": _polar([1] * 48),
    "square": np.array([(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)]),
    "star": _polar([1.1, 0.45] * 5),
    "triangle": _polar([1.15] * 3),
}
CLASSES = sorted(OUTLINES)


def _texture(rng, n, hue, value):
    """Return two shades of a hue, RGB in [0, 255], the second's share [n, n]: plain, striped or grainy."""
    saturation = rng.uniform(0.5, 0.95)

    def shade():
        brightness = np.clip(value + rng.normal(0, 0.08), 0, 1)
        return 255 * np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.03)) % 1, saturation, brightness),
                              np.float32)

    a = shade()
    b = shade()
    x = np.arange(n, dtype=np.float32) / n
    y = x[:, None]
    angle = np.float32(rng.uniform(0, 2 * np.pi))
    frequency = rng.uniform(2, 5)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        weight = (u - u.min()) / (u.max() - u.min())
    elif kind == 1:
        weight = np.sin(2 * np.pi * frequency * u) > 0
    elif kind == 2:
        weight = np.sin(2 * np.pi * frequency * u) * np.sin(2 * np.pi * frequency * v) > 0
    else:
        weight = np.kron(rng.random((16, 16)), np.ones((n // 16, n // 16)))
    return a, b, weight


def draw(label, rng, size=SIZE, radius=None):
    """Draw one picture of class `label`: uint8 [size, size, 3] and its outline mask, float [size, size].

    radius: of the shape, as a share of the picture; default random.
    """
    n = 4 * size  # drawn large and averaged down: smooth edges
    radius = (radius or rng.uniform(0.30, 0.44)) * n
    centre = n / 2 + rng.uniform(-1, 1, 2) * (0.5 * n - radius) * 0.8
    angle = rng.uniform(-0.3, 0.3)
    rotation = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    mask = Image.new("L", (n, n))
    pen = ImageDraw.Draw(mask)

    def polygon(points, fill):
        pen.polygon([tuple(point) for point in points @ rotation * radius + centre], fill=fill)

    name = CLASSES[label]
    polygon(OUTLINES[name], 255)
    if name == "ring":
        polygon(OUTLINES["disc"] * rng.uniform(0.45, 0.65), 0)
    if name == "moon":
        polygon(OUTLINES["disc"] * 0.85 + [0.5, 0], 0)
    hue = rng.random()
    dark = rng.random() < 0.5
    ground = _texture(rng, n, hue, 0.3 if dark else 0.95)
    shape = _texture(rng, n, (hue + rng.uniform(0.25, 0.75)) % 1, 0.95 if dark else 0.35)
    alpha = np.asarray(mask, np.float32) / 255
    average = np.eye(size, dtype=np.float32).repeat(4, 1) / 4  # of four neighbours: [size, n]
    picture = 0
    for (a, b, weight), share in ((shape, alpha), (ground, 1 - alpha)):
        of_b = average @ (share * weight) @ average.T
        of_a = average @ share @ average.T - of_b
        picture = picture + of_a[..., None] * a + of_b[..., None] * b
    return picture.round().astype(np.uint8), average @ alpha @ average.T


class Shapes(torch.utils.data.Dataset):
    """Item (index, position) -> (uint8 [32, 32, 3], label, -1); images stay in memory once drawn."""

    classes = CLASSES

    def __init__(self, count, seed):
        self.seed = seed
        self.images = [None] * count
        self.labels = np.arange(count) % len(CLASSES)

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"shape {index}"

    def __getitem__(self, item):
        index, _ = item
        label = index % len(CLASSES)
        if self.images[index] is None:
            self.images[index], _ = draw(label, np.random.default_rng((self.seed, index)))
        return self.images[index], label, -1


def dataset(name, count=None):
    """Return "shapes://train" (20,000 images) or "shapes://val" (2,000), or the first `count` of it."""
    split = SPLITS[name]
    return Shapes(count or split["count"], split["seed"])


def pictures(name, count):
    """Return the first `count` images of a split: uint8 [count, 32, 32, 3]."""
    split = dataset(name, count)
    return np.stack([split[i, 0][0] for i in range(count)])


def scenes(task, split):
    """Return 600 "train" or 100 "val" pairs (uint8 [32, 32, 3], target [32, 32]) for the dense probes.

    segment: 1 = ground, 2 + class = shape. depth, in metres: a shape 0.9 m wide, 1 to 3 m before a camera
    whose focal length is the picture's width, so it looks the smaller the farther it is; behind it a wall at
    4 m.
    """
    count, seed = {"train": (600, 5), "val": (100, 6)}[split]
    pairs = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        label = i % len(CLASSES)
        metres = rng.uniform(1, 3)
        if task == "segment":
            picture, mask = draw(label, rng)
            target = np.where(mask > 0.5, 2 + label, 1).astype(np.int32)
        else:
            picture, mask = draw(label, rng, radius=0.45 / metres)
            target = np.where(mask > 0.5, metres, 4.0).astype(np.float32)
        pairs.append((picture, target))
    return pairs
