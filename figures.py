"""The pictures of probe.py: t-SNE maps, principal components as colours, predictions, velocity fields.

Nothing here reads a file; each function takes arrays and returns an array or a Pillow image.
"""
import colorsys
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import svg

# -- Many dimensions -> two, or three colours --------------------------------------------------------------

def principal(x, count):
    """Centred x [n, d] on its first `count` principal axes, the largest first: [n, count]."""
    x = x - x.mean(0)
    if len(x) < x.shape[1]:
        u, s2, _ = torch.linalg.svd((x @ x.T).double())
        return (u * s2.sqrt())[:, :count]
    _, axes = torch.linalg.eigh((x.T @ x).double())
    return x.double() @ axes.flip(1)[:, :count]


def component_colours(x, grid):
    """Tokens [n, N, C] -> uint8 [n, h, w, 3]: their first three principal components, over all n, as RGB."""
    c = principal(x.float().flatten(0, 1), 3)
    low, high = (torch.quantile(c, q, 0) for q in (0.02, 0.98))
    c = ((c - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255
    return F.pad(c, (0, 3 - c.shape[1])).view(len(x), *grid, 3).byte().numpy()


def tsne(x, perplexity=30, steps=400, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, 2008) of x [n, d] to [n, 2], for up to some thousand points."""
    n = len(x)
    d2 = torch.cdist(x, x).square()
    low, high = torch.full((n, 1), 1e-12).to(x), torch.full((n, 1), 1e12).to(x)
    eye = torch.eye(n, dtype=torch.bool)
    target = math.log(min(perplexity, (n - 1) / 3))
    for _ in range(60):  # bisection, in logarithms, for the precision whose neighbours have the perplexity
        beta = (low * high).sqrt()
        p = torch.softmax((-beta * d2).masked_fill(eye, -math.inf), 1)
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        low, high = torch.where(entropy > target, beta, low), torch.where(entropy > target, high, beta)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12)
    y = 1e-4 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    move = torch.zeros_like(y)
    for step in range(steps):
        apart = y.unsqueeze(1) - y  # [n, n, 2]
        q = 1 / (1 + apart[..., 0] ** 2 + apart[..., 1] ** 2).masked_fill(eye, math.inf)
        pull = (p * (12 if step < 100 else 1) - q / q.sum()) * q  # exaggerated at first
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        move = (0.5 if step < 100 else 0.8) * move - max(n / 12, 50) * gradient
        y = y + move
    return y - y.mean(0)


# -- Pictures ----------------------------------------------------------------------------------------------

def enlarge(images, side):
    """uint8 images [n, h, w, 3] -> [n, side, side, 3], every pixel a square."""
    nearest = Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(i).resize((side, side), nearest)) for i in images])


def ramp(values):
    """Values in [0, 1] -> colours from dark blue over red to yellow."""
    v = np.clip(values, 0, 1)[..., None]
    return 255 * np.clip(np.concatenate([2 * v - 0.2, 2 * v - 1, 0.4 + v - 2.2 * v * v], -1), 0, 1)


def dense_picture(args, shown):
    """Rows of images, targets and predictions of --probe; 0, the unknown, is black."""
    task, far = args.probe, max(target.max() for _, target, _ in shown)

    def colour(values):
        if task == "depth":
            return (ramp(values / far) * (values > 0)[..., None]).astype(np.uint8)
        drawn = np.random.default_rng(5).integers(40, 256, (150, 3))
        return np.concatenate([np.zeros((1, 3)), drawn]).astype(np.uint8)[values]

    rows = zip(*((image, colour(target), colour(answer)) for image, target, answer in shown), strict=True)
    tiles = np.stack([enlarge([picture], max(96, min(192, args.size)))[0] for row in rows for picture in row])
    labels = [name for name in ("image", "label", "prediction") for _ in shown]
    title = (f"depth, dark blue 0 m to yellow {far:.1f} m, black: unknown" if task == "depth" else
             "segmentation, a colour for each class, black: no label")
    return svg.grid_image(tiles, len(shown), labels, f"{title}, {args.features} features")


def feature_picture(name, photos, maps):
    """Photos [n, H, W, 3] above the principal components of their features [n, C, h, w]."""
    colours = component_colours(maps.flatten(2).transpose(1, 2), maps.shape[2:])
    tiles = np.concatenate([enlarge(x, 160) for x in (photos, colours)])
    return svg.grid_image(tiles, len(photos), title=f"{name}: principal components as RGB")


def hidden_picture(title, times, decoded, features, hidden):
    """Per layer the principal components of its tokens, a column for each t; above them what x_t decodes to
    [T, H, W, 3] and the encoder's channels [1, N, C]. hidden: {name: tokens [T, N, C]}.
    """
    def colours(x):
        return enlarge(component_colours(x, (math.isqrt(x.shape[1]),) * 2), 128)

    tiles = [enlarge(decoded, 128), colours(features)]
    labels = [*(f"x_t decoded, t {t:.2f}" for t in times), f"encoder channels, t {times[-1]:g}"]
    for name, x in hidden.items():
        x = F.layer_norm(x - x.mean(1, keepdim=True), x.shape[-1:])  # size and mean change with t, far more
        tiles += [colours(x), np.full((1, 128, 128, 3), 255, np.uint8)]
        labels += [*(f"{name}, t {t:.2f}" for t in times), ""]
    title += ": principal components of hidden states"
    return svg.grid_image(np.concatenate(tiles), len(times) + 1, labels, title)


def class_colours(count):
    """Distinct RGB colours: hues in turn, every second one darker."""
    rgb = [colorsys.hsv_to_rgb(i / count, 0.9, 0.9 if i % 2 else 0.6) for i in range(count)]
    return [tuple(int(255 * v) for v in c) for c in rgb]


def space_picture(panels, labels, classes, side=300):
    """t-SNE maps side by side, coloured by class, with the numbers above and the classes below."""
    colours, columns = class_colours(len(classes)), 2 * len(panels)
    shown = classes[:40]
    sheet = Image.new("RGB", (len(panels) * side, side + 90 + 16 * -(-len(shown) // columns)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    big = ImageFont.load_default(14)
    pen.text((8, 4), "t-SNE of whole latents, coloured by class", fill="black", font=big)
    for k, (name, numbers, xy) in enumerate(panels):
        pen.text((k * side + 8, 28), name, fill="black", font=big)
        text = "  ".join(f"{a} {b:.2f}" for a, b in numbers.items())
        pen.text((k * side + 8, 48), text, fill="black", font=font)
        pen.rectangle((k * side + 4, 68, (k + 1) * side - 4, side + 68), outline="#bbbbbb")
        xy = (xy - xy.min(0)) / np.ptp(xy, 0).max()
        xy += (1 - xy.max(0)) / 2
        for (x, y), c in zip(xy * (side - 28) + (k * side + 14, 80), labels, strict=True):
            pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colours[c])
    for i, name in enumerate(shown):
        x, y = i % columns * (side // 2) + 10, side + 76 + i // columns * 16
        pen.ellipse((x, y + 3, x + 8, y + 11), fill=colours[i])
        pen.text((x + 14, y), name, fill="black", font=font)
    return sheet


# -- Mean velocity fields of two classes (figure 4b) -------------------------------------------------------

BLOBS = torch.tensor([[x, y] for x in (-2.0, 2.0) for y in (-0.8, 0.0, 0.8)])  # two groups of three
SIGMA = 0.15  # their standard deviation
LAYOUT = {"entangled": [[0, 2, 4], [1, 3, 5]], "separated": [[0, 1, 2], [3, 4, 5]]}  # blobs of each class


def mean_velocity(x, t, blobs):
    """E[data - noise | x_t = x] in closed form, x [B, 1, 2], t [B], for data in Gaussian blobs [B, k, 2]."""
    t = t.view(-1, 1, 1)
    variance, away = (1 - t) ** 2 + (t * SIGMA) ** 2, x - t * blobs
    share = torch.softmax(-away.square().sum(2, keepdim=True) / (2 * variance), 1)  # of each blob, given x
    return (share * (blobs + (t * SIGMA ** 2 - (1 - t)) / variance * away)).sum(1, keepdim=True)


def toy_picture(panels, y, side=380):
    """Per panel the mean velocity at t = 0.5 of both classes, and below it where 5 Euler steps arrive."""
    colours, head = ("#d95f02", "#1f78b4"), 66
    sheet = Image.new("RGB", (2 * side + 24, 2 * side + head + 70), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    title = "Mean velocity field of two classes (figure 4b), computed: same data, other labels"
    pen.text((8, 4), title, fill="black", font=ImageFont.load_default(15))
    for k, name in enumerate(("class A", "class B")):
        pen.ellipse((10 + 90 * k, 29, 20 + 90 * k, 39), fill=colours[k])
        pen.text((24 + 90 * k, 26), name, fill="black", font=font)
    pen.text((200, 26), "rings: the data; arrows: where a class's flow goes on average; axes from -3 to 3",
             fill="black", font=font)
    line = torch.linspace(-2.6, 2.6, 10)
    spots = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 1, 2)
    for k, (kind, velocity, ends, numbers) in enumerate(panels):
        left = 8 + k * (side + 8)
        errors = ", ".join(f"{v:.3f} ({n.removeprefix('error_')})" for n, v in numbers.items())
        titles = f"{kind}: velocity at t = 0.5", f"5 Euler steps; error by steps: {errors}"
        for row, title in enumerate(titles):
            top = head + row * (side + 28)

            def place(p, left=left, top=top + 18):
                return left + (float(p[0]) + 3) / 6 * side, top + (3 - float(p[1])) / 6 * side

            pen.text((left, top - 2), title, fill="black", font=font)
            pen.rectangle((*place((-3, 3)), *place((3, -3))), outline="#999999")
            for i, blob in enumerate(BLOBS):
                colour = colours[[i in c for c in LAYOUT[kind]].index(True)]
                corner = torch.tensor([0.3, -0.3])
                pen.ellipse((*place(blob - corner), *place(blob + corner)), outline=colour, width=3)
            for c in (0, 1) if row == 0 else ():
                moves = velocity(spots, torch.full((len(spots),), 0.5), torch.full((len(spots),), c))
                for spot, move in zip(spots[:, 0], moves[:, 0], strict=True):
                    move = 0.055 * move
                    side_step = 0.3 * torch.stack([-move[1], move[0]])
                    pen.line((*place(spot), *place(spot + 0.8 * move)), fill=colours[c], width=2)
                    head_points = move, 0.5 * move + side_step, 0.5 * move - side_step
                    pen.polygon([place(spot + p) for p in head_points], fill=colours[c])
            for point, c in zip(ends[:600], y.tolist(), strict=False) if row else ():
                if point.abs().max() < 2.95:
                    x0, y0 = place(point)
                    pen.ellipse((x0 - 1.5, y0 - 1.5, x0 + 1.5, y0 + 1.5), fill=colours[c])
    return sheet
