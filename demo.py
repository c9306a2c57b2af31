"""All that is demo-only: a labelled synthetic dataset, the tiny sizes, and the tiny frozen encoder's origin.

    python demo.py show                        # shapes.png: what the dataset looks like
    python demo.py encoder                     # trains runs/demo-encoder.pt, the frozen encoder of demo.pt
    python demo.py pack                        # demo.pt from the newest --demo runs of both stages
    python demo.py classify samples/           # how many samples show the class they were asked for

The dataset is drawn image by image from (seed, index): ten shapes with random place, size, rotation, colours,
gradients and textures. Like DINO the encoder knows what is where, and colour only coarsely; the residual
branch adds the rest. The README has the commands that made demo.pt.
"""
import colorsys
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import svg

ENCODER = Path(__file__).parent / "demo.pt"
SIZE, GRID = 32, 4  # pixels per side, tokens per side
VIT = {"patch": SIZE // GRID, "dim": 64, "depth": 4, "heads": 1, "registers": 4, "eps": 1e-5}

# What --demo changes in each script: sizes, schedule and losses that need no download.
TRAIN_AE = {"encoder": str(ENCODER), "image_size": SIZE, "grid": GRID, "decoder_channels": 32,
            "decoder_mult": "1,1,2,2", "residual_dim": 64, "residual_depth": 2, "lpips": 0.0, "gan": 0.0,
            "batch": 64, "lr": 8e-4, "steps": 600, "log_every": 50, "save_every": 300, "preview_every": 300,
            "stats_images": 2048, "workers": 0}
TRAIN_DIT = {"model": "6,128,4", "batch": 64, "lr": 1e-3, "steps": 2700, "ema_decay": 0.99, "log_every": 100,
             "save_every": 900, "preview_every": 900, "workers": 0}

# -- The dataset -------------------------------------------------------------------------------------------


def _polar(radii, start=-np.pi / 2):
    angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]


def _heart():
    t = np.linspace(0, 2 * np.pi, 48)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
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
    """A gradient between two shades of a hue, plain, striped, chequered or grainy: float [n, n, 3] in [0,
    255].
    """
    saturation = rng.uniform(0.5, 0.95)

    def shade():
        brightness = np.clip(value + rng.normal(0, 0.08), 0, 1)
        return np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.03)) % 1, saturation, brightness),
                        np.float32)

    a, b = 255 * shade(), 255 * shade()
    y, x = np.mgrid[:n, :n].astype(np.float32) / n
    angle, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(2, 5)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        weight = (u - u.min()) / (u.max() - u.min())
    elif kind == 1:
        weight = np.sin(2 * np.pi * frequency * u) > 0
    elif kind == 2:
        weight = np.sin(2 * np.pi * frequency * u) * np.sin(2 * np.pi * frequency * v) > 0
    else:
        weight = np.kron(rng.random((16, 16)), np.ones((n // 16, n // 16)))
    return a + (b - a) * np.asarray(weight, np.float32)[..., None]


def draw(label, rng, size=SIZE, radius=None):
    """One picture of class `label`: uint8 [size, size, 3] and its outline mask, float [size, size]. radius:
    of the figure, in pictures; default random.
    """
    n = 4 * size  # drawn large and averaged down: smooth edges
    radius = (radius or rng.uniform(0.30, 0.44)) * n
    centre = n / 2 + rng.uniform(-1, 1, 2) * (0.5 * n - radius) * 0.8
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    mask = Image.new("L", (n, n))
    pen = ImageDraw.Draw(mask)

    def polygon(points, fill):
        pen.polygon([tuple(p) for p in points @ turn.T * radius + centre], fill=fill)

    name = CLASSES[label]
    polygon(OUTLINES[name], 255)
    if name == "ring":
        polygon(OUTLINES["disc"] * rng.uniform(0.45, 0.65), 0)
    if name == "moon":
        polygon(OUTLINES["disc"] * 0.85 + [0.5, 0], 0)
    hue, dark = rng.random(), rng.random() < 0.5
    ground = _texture(rng, n, hue, 0.3 if dark else 0.95)
    figure = _texture(rng, n, (hue + rng.uniform(0.25, 0.75)) % 1, 0.95 if dark else 0.35)
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    picture = (figure * alpha + ground * (1 - alpha)).reshape(size, 4, size, 4, 3).mean((1, 3))
    return picture.round().astype(np.uint8), alpha.reshape(size, 4, size, 4).mean((1, 3))


class Shapes(torch.utils.data.Dataset):
    """Item (index, position) -> (uint8 [32, 32, 3], label, -1), as svg.ImageFolder; held in memory after
    the first use.
    """

    classes = CLASSES

    def __init__(self, count, seed):
        self.seed, self.images, self.labels = seed, [None] * count, np.arange(count) % len(CLASSES)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        i = item[0]
        if self.images[i] is None:
            self.images[i] = draw(i % len(CLASSES), np.random.default_rng((self.seed, i)))[0]
        return self.images[i], i % len(CLASSES), -1


def dataset(split, count=None):
    """The demo's "train" (20,000) or "val" (2,000) images, which share no seed."""
    return Shapes(count or {"train": 20000, "val": 2000}[split], {"train": 1, "val": 2}[split])


def scenes(task, split):
    """600 "train" or 100 "val" pairs (uint8 [32, 32, 3], target [32, 32]) for the dense probes.

    segment: 1 = ground, 2 + class = figure. depth, in metres: a figure 0.9 m wide, 1 to 3 m before a camera
    whose focal length is the picture's width: it looks the smaller the farther it is; behind, a wall at 4 m.
    """
    pairs = []
    for i in range({"train": 600, "val": 100}[split]):
        rng = np.random.default_rng(({"train": 5, "val": 6}[split], i))
        metres = rng.uniform(1, 3)
        picture, mask = draw(i % len(CLASSES), rng, radius=0.45 / metres if task == "depth" else None)
        figure = mask > 0.5
        target = (np.where(figure, 2 + i % len(CLASSES), 1).astype(np.int32) if task == "segment" else
                  np.where(figure, metres, 4.0).astype(np.float32))
        pairs.append((picture, target))
    return pairs


# -- The frozen encoder: a DINOv3 architecture of 0.2M parameters, taught class and outline ----------------

def _batches(seed, steps, batch, count=20000):
    """`steps` random batches (images, labels, outline masks) from `count` pictures drawn with `seed`."""
    rng = np.random.default_rng(seed)
    drawn = [draw(i % len(CLASSES), rng) for i in range(count)]
    pictures, masks = (torch.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
    for _ in range(steps):
        i = torch.from_numpy(rng.integers(0, count, batch))
        yield svg.to_float(pictures[i], "cpu"), i % len(CLASSES), masks[i]


def train_encoder(path, steps=5000, batch=64, seed=0):
    """Train the tiny ViT on drawn pictures: every patch token (and CLS) learns to tell the class, the coarse
    outline of the whole figure and the mean colours, each patch token its own outline: meaning and place.
    """
    torch.manual_seed(seed)
    vit, p = svg.ViT(**VIT), VIT["patch"]
    told = nn.Linear(64, len(CLASSES) + 64 + 6)  # of every token: class, 8 x 8 outline, two mean colours
    local = nn.Linear(64, p * p)  # of each patch token: its own outline
    optimizer = torch.optim.AdamW([*vit.parameters(), *told.parameters(), *local.parameters()], 2e-3,
                                  weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)

    def every_token(target):
        return target.unsqueeze(1).expand(-1, 1 + GRID * GRID, *target.shape[1:])

    start = time.time()
    for step, (images, labels, masks) in enumerate(_batches(3, steps, batch), 1):
        tokens = vit(svg.imagenet_normalize(images))
        tokens = torch.cat([tokens[:, :1], tokens[:, vit.prefix:]], 1)  # [B, 17, 64]
        logits, coarse, colours = told(tokens).split([len(CLASSES), 64, 6], -1)
        outline = F.pixel_unshuffle(masks[:, None], p).flatten(2).transpose(1, 2)  # [B, 16, p*p]
        m = masks[:, None]
        mean = [(images * w).sum((2, 3)) / w.sum((2, 3)) for w in (m, 1 - m)]  # [B, 3] each

        loss = (F.cross_entropy(logits.flatten(0, 1), every_token(labels).flatten())
                + 2 * F.binary_cross_entropy_with_logits(coarse, every_token(F.avg_pool2d(m, 4).flatten(1)))
                + 2 * F.binary_cross_entropy_with_logits(local(tokens[:, 1:]), outline)
                + F.mse_loss(colours, every_token(torch.cat(mean, 1))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            accuracy = (logits.mean(1).argmax(1) == labels).float().mean()
            print(f"step {step}/{steps}  loss {loss:.3f}  accuracy {accuracy:.2f}  "
                  f"{time.time() - start:.0f} s", flush=True)
    # Half precision here, so that stage 1 trains on exactly the weights that demo.pt ships.
    model = {k: v.half() for k, v in vit.state_dict().items()}
    svg.save_checkpoint(path, {"encoder": {"name": "demo", "vit": VIT, "model": model}})


def pack(path):
    """demo.pt: encoder, autoencoder and EMA transformer of the newest --demo runs, in half precision."""
    ae, dit = svg.latest_run("ae", demo=True), svg.latest_run("dit", demo=True)
    if not (ae and dit):
        raise svg.UserError("no --demo runs of both stages below runs/; see the README for the commands")
    ae, dit = svg.load_checkpoint(ae), svg.load_checkpoint(dit)
    if dit["autoencoder"]["fingerprint"] != ae["fingerprint"]:
        raise svg.UserError("the newest --demo transformer was not trained on the newest --demo autoencoder")
    encoder = svg.load_checkpoint(ae["encoder_file"]["file"])["encoder"]
    half = {k: v.half() if v.is_floating_point() else v for k, v in ae["model"].items()}
    told = ("kind", "config", "fingerprint", "encoder_file", "autoencoder", "classes", "step")
    svg.save_checkpoint(path, {
        "encoder": encoder,
        "autoencoder": {**{k: v for k, v in ae.items() if k in told}, "model": half},
        "sit": {**{k: v for k, v in dit.items() if k in told},
                "ema": {k: v.half() for k, v in dit["ema"].items()}},
    })


# -- The judge: do samples show what they were asked for? --------------------------------------------------

def train_classifier(steps=1500, batch=64, seed=0):
    """A small convolutional classifier trained on the demo's real pictures; returns it and its held-out
    accuracy.
    """
    torch.manual_seed(seed)
    layers, c = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        c = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for images, labels, _ in _batches(4, steps, batch, 10000):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    val = dataset("val")
    pictures = np.stack([val[i, 0][0] for i in range(len(val))])
    return model, accuracy(model, pictures, np.arange(len(val)) % len(CLASSES))[0]


@torch.no_grad()
def accuracy(model, images, labels):
    """Share of uint8 images [n, 32, 32, 3] that the classifier gives their label, in all and per class."""
    right = model(svg.to_float(torch.from_numpy(images), "cpu")).argmax(1).numpy() == labels
    return right.mean(), [right[labels == c].mean() for c in range(len(CLASSES))]


def main():
    """python demo.py show, encoder, pack or classify FOLDER."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "show":
        val = dataset("val")
        pictures = np.stack([val[i, 0][0] for i in range(60)])
        svg.grid_image(pictures, 10, CLASSES * 6, "the demo's real images").save("shapes.png")
    elif command == "encoder":
        Path("runs").mkdir(exist_ok=True)
        train_encoder("runs/demo-encoder.pt")
    elif command == "pack":
        pack("demo.pt")
        print(f"demo.pt: {Path('demo.pt').stat().st_size / 1e6:.2f} MB")
    elif command == "classify" and len(sys.argv) == 3:
        files = svg.list_images(sys.argv[2])
        if not files:
            raise svg.UserError(f"{sys.argv[2]}: no images; run sample.py first")
        images = np.stack([np.asarray(svg.open_rgb(f)) for f in files])
        model, real = train_classifier()
        share, each = accuracy(model, images, np.arange(len(files)) % len(CLASSES))
        print(f"classifier: {real:.1%} right on held-out real images; "
              f"{share:.1%} of {len(files)} samples right")
        print("  ".join(f"{name} {a:.0%}" for name, a in zip(CLASSES, each)))
    else:
        raise svg.UserError("python demo.py show | encoder | pack | classify FOLDER")


if __name__ == "__main__":
    svg.run_main(main)
