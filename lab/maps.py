"""The lab's drawings: t-SNE maps, principal components as colours, velocity fields, dense predictions.

Nothing here reads or writes a file; each function takes arrays and returns an array or a Pillow image.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from lib.figures import grid_image

# -- Many dimensions -> two, or three colours --------------------------------------------------------------

def principal(x, count):
    """Return centred x [n, d] on its first principal axes, the largest first: [n, count]."""
    x = x - x.mean(0)
    _, r = torch.linalg.qr(x.T, mode="r")  # r.T is as x is, up to a rotation, and has n columns at most
    u, s, _ = torch.linalg.svd(r.T.double(), full_matrices=False)
    return (u * s)[:, :count]


def component_colours(x):
    """Return the first three principal components of tokens [n, N, C], over all n, as RGB [n, h, w, 3]."""
    c = principal(x.float().flatten(0, 1), 3)
    low, high = torch.quantile(c, c.new_tensor([0.02, 0.98]), 0)
    c = ((c - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255
    side = math.isqrt(x.shape[1])
    return c.view(len(x), side, side, 3).byte().numpy()


def tsne(x, perplexity=30):
    """Map x [n, d] to [n, 2] by exact t-SNE (van der Maaten and Hinton, 2008), for some thousand points."""
    # Similarities: bisection, in logarithms, for the precision whose neighbours have the perplexity.
    n = len(x)
    d2 = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    log_beta = torch.zeros(n, 1)
    for step in 32 * 0.5 ** torch.arange(24):
        p = torch.softmax(-log_beta.exp() * d2, 1)
        too_wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(min(perplexity, (n - 1) / 3))
        log_beta += torch.where(too_wide, step, -step)
    p = (p + p.T) / (2 * n)

    # Gradient descent with momentum, at first with exaggerated similarities.
    y = 1e-4 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    move = torch.zeros_like(y)
    for steps, exaggeration, momentum in ((100, 12, 0.5), (300, 1, 0.8)):
        for _ in range(steps):
            d2 = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square()
            q = (1 / (1 + d2)).fill_diagonal_(0)
            pull = (exaggeration * p - q / q.sum()) * q
            gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
            move = momentum * move - max(n / 12, 50) * gradient
            y = y + move
    return y - y.mean(0)


# -- Pictures of features ----------------------------------------------------------------------------------

def dense_picture(task, shown, features):
    """Draw rows of images, targets and predictions of "depth" or "segment"; shown: such triples of arrays."""
    images, targets, predictions = zip(*shown)
    factors = (25, 25, 25) if task == "depth" else (67, 151, 219)  # grey to 10 m, or a colour a class
    drawn = [np.uint8(values[..., None] * factors % 256) for values in targets + predictions]
    title = f"{task} by {features} features: image, label, prediction; black is unknown"
    return grid_image([*images, *drawn], len(shown), title=title, tile=128)


def component_picture(title, columns, pictures, rows):
    """Draw pictures, named in `columns`, and the principal components of {row: tokens [pictures, N, C]}."""
    tiles = [*pictures]
    for tokens in rows.values():
        tiles += [*component_colours(tokens)]
    labels = [f"{row}, {column}" for row in ("picture", *rows) for column in columns]
    return grid_image(tiles, len(columns), labels, f"{title}: principal components as RGB", tile=128)


# -- Points in the plane -----------------------------------------------------------------------------------

def canvas(side):
    """Return an empty square picture, and the pen to draw in it."""
    sheet = Image.new("RGB", (side, side), "#f4f4f4")
    return sheet, ImageDraw.Draw(sheet)


def space_picture(panels, labels, classes, side=300):
    """Draw t-SNE maps {name: points [n, 2]} side by side, coloured by class; labels [n]: class numbers."""
    colours = [f"hsv({360 * i / len(classes)}, 90%, 80%)" for i in range(len(classes))]
    sheets = []
    for points in panels.values():
        sheet, pen = canvas(side)
        points = side / 2 * (1 + 0.95 * points / np.abs(points).max())
        for point, label in zip(points, labels):
            pen.circle(point, 2.5, fill=colours[label])
        sheets.append(np.asarray(sheet))
    title = f"t-SNE of whole latents; hues from red on: {', '.join(classes)}"
    return grid_image(sheets, len(sheets), list(panels), title, side)


def toy_picture(panels, spots, side=380):
    """Draw the mean velocity of two classes at some spots [n, 2] as wedges, in the plane from -3 to 3.

    panels: {name: (blobs [class, k, 2], velocities [class, n, 2])}.
    """
    sheets = []
    for blobs, velocities in panels.values():
        sheet, pen = canvas(side)
        for colour, centres, velocity in zip(("#d95f02", "#1f78b4"), blobs, velocities):
            for centre in side / 2 + side / 6 * centres:
                pen.circle(centre, 19, outline=colour, width=3)
            across = 0.006 * velocity[:, ::-1] * (1, -1)
            wedges = np.hstack([spots - across, spots + 0.05 * velocity, spots + across])
            for wedge in side / 2 + side / 6 * wedges:
                pen.polygon(wedge.tolist(), fill=colour)
        sheets.append(np.asarray(sheet))
    title = "Mean velocity of two classes at t = 0.5: same data (rings), other labels (colours)"
    return grid_image(sheets, len(sheets), list(panels), title, side)
