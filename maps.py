"""The lab's drawings: t-SNE maps, principal components as colours, velocity fields, dense predictions.

Nothing here reads or writes a file; each function takes arrays and returns an array or a Pillow image.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from figures import grid_image

# -- Many dimensions -> two, or three colours --------------------------------------------------------------

def principal(x, count):
    """Return centred x [n, d] on its first principal axes, the largest first: [n, count]."""
    x = x - x.mean(0)
    if len(x) < x.shape[1]:
        u, s2, _ = torch.linalg.svd((x @ x.T).double())
        return (u * s2.sqrt())[:, :count]
    _, axes = torch.linalg.eigh((x.T @ x).double())
    return x.double() @ axes.flip(1)[:, :count]


def component_colours(x, grid):
    """Return the first three principal components of tokens [n, N, C], over all n, as RGB [n, h, w, 3]."""
    c = principal(x.float().flatten(0, 1), 3)
    low = torch.quantile(c, 0.02, 0)
    high = torch.quantile(c, 0.98, 0)
    c = ((c - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255
    return F.pad(c, (0, 3 - c.shape[1])).view(len(x), *grid, 3).byte().numpy()


def tsne(x, perplexity=30, steps=400, seed=0):
    """Map x [n, d] to [n, 2] by exact t-SNE (van der Maaten and Hinton, 2008), for some thousand points."""
    # Similarities: bisection, in logarithms, for the precision whose neighbours have the perplexity.
    n = len(x)
    d2 = torch.cdist(x, x).square()
    eye = torch.eye(n, dtype=torch.bool)
    target = math.log(min(perplexity, (n - 1) / 3))
    low = torch.full((n, 1), 1e-12).to(x)
    high = torch.full((n, 1), 1e12).to(x)
    for _ in range(60):
        beta = (low * high).sqrt()
        p = torch.softmax((-beta * d2).masked_fill(eye, -math.inf), 1)
        too_wide = torch.special.entr(p).sum(1, keepdim=True) > target
        low = torch.where(too_wide, beta, low)
        high = torch.where(too_wide, high, beta)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12)

    # Gradient descent with momentum, at first with exaggerated similarities.
    y = 1e-4 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    move = torch.zeros_like(y)
    for step in range(steps):
        exaggeration = 12 if step < 100 else 1
        momentum = 0.5 if step < 100 else 0.8
        difference = y.unsqueeze(1) - y  # [n, n, 2]
        q = 1 / (1 + difference[..., 0] ** 2 + difference[..., 1] ** 2).masked_fill(eye, math.inf)
        pull = (p * exaggeration - q / q.sum()) * q
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        move = momentum * move - max(n / 12, 50) * gradient
        y = y + move
    return y - y.mean(0)


# -- Pictures of features ----------------------------------------------------------------------------------

def depth_colours(metres, far):
    """Colour depth [H, W] from dark blue over red to yellow at `far`; 0, the unknown, is black."""
    v = np.clip(metres / far, 0, 1)
    rgb = np.stack([2 * v - 0.2, 2 * v - 1, 0.4 + v - 2.2 * v * v], -1)
    return (255 * np.clip(rgb, 0, 1) * (metres > 0)[..., None]).astype(np.uint8)


def label_colours(labels):
    """Colour class numbers [H, W] from 1 to 150; 0, no label, is black."""
    colours = np.random.default_rng(5).integers(40, 256, (150, 3))
    return np.concatenate([np.zeros((1, 3)), colours]).astype(np.uint8)[labels]


def dense_picture(task, shown, features, tile):
    """Draw rows of images, targets and predictions of "depth" or "segment"; shown: such triples of arrays."""
    images, targets, predictions = zip(*shown, strict=True)
    if task == "depth":
        far = max(target.max() for target in targets)
        title = f"depth, dark blue 0 m to yellow {far:.1f} m, black: unknown"
        coloured = [depth_colours(values, far) for values in targets + predictions]
    else:
        title = "segmentation, a colour for each class, black: no label"
        coloured = [label_colours(values) for values in targets + predictions]
    labels = [name for name in ("image", "label", "prediction") for _ in shown]
    return grid_image([*images, *coloured], len(shown), labels, f"{title}, {features} features", tile)


def feature_picture(name, photos, features):
    """Draw photos [n, H, W, 3] above the principal components of their features [n, C, h, w]."""
    colours = component_colours(features.flatten(2).transpose(1, 2), features.shape[2:])
    title = f"{name}: principal components as RGB"
    return grid_image([*photos, *colours], len(photos), title=title, tile=160)


def hidden_picture(title, times, decoded, features, hidden):
    """Draw a column for each t, and for each layer a row of the principal components of its tokens.

    Above them stand what x_t decodes to [T, H, W, 3] and the encoder's channels [1, N, C]. hidden: {name of
    the layer: tokens [T, N, C]}.
    """
    grid = [math.isqrt(features.shape[1])] * 2
    tiles = [*decoded, *component_colours(features, grid)]
    labels = [*(f"x_t decoded, t {t:.2f}" for t in times), f"encoder channels, t {times[-1]:g}"]
    blank = np.full((1, 1, 3), 255, np.uint8)
    for name, x in hidden.items():
        # Size and mean change with t, far more than what differs from token to token.
        x = F.layer_norm(x - x.mean(1, keepdim=True), x.shape[-1:])
        tiles += [*component_colours(x, grid), blank]
        labels += [*(f"{name}, t {t:.2f}" for t in times), ""]
    title += ": principal components of hidden states"
    return grid_image(tiles, len(times) + 1, labels, title, tile=128)


# -- Points in the plane -----------------------------------------------------------------------------------

def framed(side):
    """Return an empty square with a frame, and the pen to draw in it."""
    sheet = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, side - 1, side - 1), outline="#bbbbbb")
    return sheet, pen


def draw_circle(pen, centre, radius, **colour):
    """Draw a circle around a point [2] in pixels; colour: fill or outline."""
    pen.ellipse((*(centre - radius), *(centre + radius)), **colour)


def draw_arrow(pen, start, move, colour):
    """Draw an arrow; start and move [2] in pixels."""
    across = 0.3 * move[::-1] * (1, -1)
    pen.line((*start, *(start + 0.8 * move)), fill=colour, width=2)
    head = start + [move, 0.5 * move + across, 0.5 * move - across]
    pen.polygon(head.ravel().tolist(), fill=colour)


def space_picture(panels, labels, classes, side=300):
    """Draw t-SNE maps side by side, coloured by class, with their numbers; at the right the classes' names.

    panels: (name, {name: number}, points [n, 2]) of each; labels [n]: class numbers of the points.
    """
    colours = [f"hsv({360 * i / len(classes)}, 90%, {90 if i % 2 else 60}%)" for i in range(len(classes))]
    font = ImageFont.load_default(12)
    sheets = []
    for _, numbers, points in panels:
        sheet, pen = framed(side)
        text = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items())
        pen.text((8, 4), text, fill="black", font=font)
        points = (points - points.min(0)) / np.ptp(points, 0).max()
        points += (1 - points.max(0)) / 2
        for point, label in zip(points * (side - 40) + (20, 30), labels, strict=True):
            draw_circle(pen, point, 2.5, fill=colours[label])
        sheets.append(np.asarray(sheet))
    legend, pen = framed(side)
    for i, (name, colour) in enumerate(zip(classes[:38], colours)):
        centre = np.array([14 + i // 19 * side // 2, 14 + i % 19 * 15])
        draw_circle(pen, centre, 4, fill=colour)
        pen.text((*(centre + (10, 0)),), name, fill="black", font=font, anchor="lm")
    names = [*(name for name, _, _ in panels), "classes"]
    return grid_image(np.stack([*sheets, np.asarray(legend)]), len(names), names,
                      "t-SNE of whole latents, coloured by class")


def toy_picture(panels, spots, y, side=380):
    """Draw per panel the mean velocity at t = 0.5 of two classes, and where 5 Euler steps arrive.

    panels: (kind, {name: number}, blobs [class, k, 2], velocities [class, n, 2] at the spots [n, 2], ends
    [m, 2]) of each; y [m]: the classes of the ends. The plane is shown from -3 to 3.
    """
    colours = ("#d95f02", "#1f78b4")
    scale = np.array([side, -side]) / 6  # pixels per unit; y points downwards
    fields = []
    arrivals = []
    names = [f"{kind}: velocity at t = 0.5" for kind, *_ in panels]
    for _, numbers, blobs, velocities, ends in panels:
        field, field_pen = framed(side)
        arrival, arrival_pen = framed(side)
        for c, colour in enumerate(colours):
            for centre in side / 2 + blobs[c] * scale:
                draw_circle(field_pen, centre, 19, outline=colour, width=3)
                draw_circle(arrival_pen, centre, 19, outline=colour, width=3)
            for spot, move in zip(spots, velocities[c], strict=True):
                draw_arrow(field_pen, side / 2 + spot * scale, 0.055 * move * scale, colour)
            for end in ends[y == c]:
                draw_circle(arrival_pen, side / 2 + end * scale, 1.5, fill=colour)
        fields.append(np.asarray(field))
        arrivals.append(np.asarray(arrival))
        text = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        names.append(f"5 Euler steps; {text}")
    title = "Mean velocity of two classes, orange and blue (figure 4b): same data (rings), other labels"
    return grid_image(np.stack(fields + arrivals), len(panels), names, title)
