"""Everything drawn: grids of pictures, loss curves, t-SNE maps, principal components, velocity fields.

Nothing here reads a file; each function takes arrays and returns an array or a Pillow image.
"""
import colorsys
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# -- Grids and curves --------------------------------------------------------------------------------------


def grid_image(images, columns, labels=None, title="", tile=None):
    """Draw a grid of uint8 images [n, H, W, 3], with a title and a label above each image.

    tile: pixels per side to which images are enlarged, default 96 or their own size if that is more.
    """
    tile = tile or max(96, images.shape[1])
    gap = 4
    text = 16 if labels else 0
    head = 24 if title else 0
    rows = -(-len(images) // columns)
    size = (columns * (tile + gap) + gap, head + rows * (tile + gap + text) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 4), title, fill="black", font=ImageFont.load_default(14))
    for i, array in enumerate(images):
        x = gap + i % columns * (tile + gap)
        y = gap + head + i // columns * (tile + gap + text)
        if labels:
            draw.text((x, y), str(labels[i])[:tile // 6], fill="black", font=ImageFont.load_default(12))
        enlarged = Image.fromarray(array).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y + text))
    return sheet


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def is_number(value):
    """Whether a value of a log is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def loss_curve(entries, title):
    """Draw every *loss of a log against the step, on one labelled scale; None for fewer than two entries."""
    if len(entries) < 2:
        return None
    curves = {}
    for name in [key for key in entries[-1] if key.endswith("loss")]:
        curves[name] = [(e["step"], e[name]) for e in entries if is_number(e.get(name))]
    return line_chart(curves, title, "step")


def line_chart(curves, title, x_name, log=False):
    """Draw curves {name: [(x, y), ...]} on one labelled scale; log: both axes are logarithmic."""
    width, height = 720, 400
    left, right, top, bottom = 60, width - 16, 44, height - 36
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    draw.text((left, 6), title, fill="black", font=ImageFont.load_default(14))
    draw.text((width - 10, height - 4), x_name, fill="black", font=font, anchor="rs")
    scale, unscale = (math.log, math.exp) if log else (float, float)
    points = [(scale(x), scale(y)) for curve in curves.values() for x, y in curve] or [(0.0, 0.0)]
    x_low, y_low = (min(values) for values in zip(*points))
    x_high, y_high = (max(values) for values in zip(*points))

    def place(x, y):
        return (left + (x - x_low) / max(x_high - x_low, 1e-12) * (right - left),
                top + (y_high - y) / max(y_high - y_low, 1e-12) * (bottom - top))

    for i in range(5):
        x = x_low + (x_high - x_low) * i / 4
        y = y_low + (y_high - y_low) * i / 4
        across, down = place(x, y)
        draw.line([(left, down), (right, down)], fill="#dddddd")
        draw.text((4, down - 7), f"{unscale(y):.3g}", fill="black", font=font)
        digits = 2 if unscale(x_high) <= 1 else 0
        draw.text((across - 12, bottom + 6), f"{unscale(x):.{digits}f}", fill="black", font=font)
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS)):
        draw.line([place(scale(x), scale(y)) for x, y in curve], fill=colour, width=2)
        draw.text((left + 160 * i, 24), name, fill=colour, font=font)
    return sheet


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

def enlarge(images, side):
    """Enlarge uint8 images [n, h, w, 3] to [n, side, side, 3]; every pixel becomes a square."""
    nearest = Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(i).resize((side, side), nearest)) for i in images])


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
    """Draw rows of images, targets and answers of "depth" or "segment"; shown: such triples of arrays."""
    images, targets, answers = zip(*shown, strict=True)
    if task == "depth":
        far = max(target.max() for target in targets)
        title = f"depth, dark blue 0 m to yellow {far:.1f} m, black: unknown"
        coloured = [depth_colours(values, far) for values in targets + answers]
    else:
        title = "segmentation, a colour for each class, black: no label"
        coloured = [label_colours(values) for values in targets + answers]
    tiles = np.concatenate([enlarge([picture], tile) for picture in (*images, *coloured)])
    labels = [name for name in ("image", "label", "prediction") for _ in shown]
    return grid_image(tiles, len(shown), labels, f"{title}, {features} features")


def feature_picture(name, photos, maps):
    """Draw photos [n, H, W, 3] above the principal components of their features [n, C, h, w]."""
    colours = component_colours(maps.flatten(2).transpose(1, 2), maps.shape[2:])
    tiles = np.concatenate([enlarge(photos, 160), enlarge(colours, 160)])
    return grid_image(tiles, len(photos), title=f"{name}: principal components as RGB")


def hidden_picture(title, times, decoded, features, hidden):
    """Draw a column for each t, and for each layer a row of the principal components of its tokens.

    Above them stand what x_t decodes to [T, H, W, 3] and the encoder's channels [1, N, C]. hidden: {name of
    the layer: tokens [T, N, C]}.
    """
    def colours(x):
        side = math.isqrt(x.shape[1])
        return enlarge(component_colours(x, (side, side)), 128)

    blank = np.full((1, 128, 128, 3), 255, np.uint8)
    tiles = [enlarge(decoded, 128), colours(features)]
    labels = [*(f"x_t decoded, t {t:.2f}" for t in times), f"encoder channels, t {times[-1]:g}"]
    for name, x in hidden.items():
        # Size and mean change with t, far more than what differs from token to token.
        x = F.layer_norm(x - x.mean(1, keepdim=True), x.shape[-1:])
        tiles += [colours(x), blank]
        labels += [*(f"{name}, t {t:.2f}" for t in times), ""]
    title += ": principal components of hidden states"
    return grid_image(np.concatenate(tiles), len(times) + 1, labels, title)


# -- Points in the plane -----------------------------------------------------------------------------------

def dot(pen, x, y, radius, colour):
    """Draw a filled circle."""
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def class_colours(count):
    """Return distinct RGB colours: hues in turn, every second one darker."""
    rgb = [colorsys.hsv_to_rgb(i / count, 0.9, 0.9 if i % 2 else 0.6) for i in range(count)]
    return [tuple(int(255 * v) for v in c) for c in rgb]


def space_picture(panels, labels, classes, side=300):
    """Draw t-SNE maps side by side, coloured by class, with the numbers above and the classes below.

    panels: (name, {name: number}, points [n, 2]) of each; labels [n]: class numbers of the points.
    """
    colours = class_colours(len(classes))
    shown = classes[:40]
    columns = 2 * len(panels)
    height = side + 90 + 16 * -(-len(shown) // columns)
    sheet = Image.new("RGB", (len(panels) * side, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    big = ImageFont.load_default(14)
    pen.text((8, 4), "t-SNE of whole latents, coloured by class", fill="black", font=big)
    for k, (name, numbers, xy) in enumerate(panels):
        left = k * side
        text = "  ".join(f"{a} {b:.2f}" for a, b in numbers.items())
        pen.text((left + 8, 28), name, fill="black", font=big)
        pen.text((left + 8, 48), text, fill="black", font=font)
        pen.rectangle((left + 4, 68, left + side - 4, side + 68), outline="#bbbbbb")
        xy = (xy - xy.min(0)) / np.ptp(xy, 0).max()
        xy += (1 - xy.max(0)) / 2
        for (x, y), c in zip(xy * (side - 28) + (left + 14, 80), labels, strict=True):
            dot(pen, x, y, 2.5, colours[c])
    for i, name in enumerate(shown):
        x = i % columns * (side // 2) + 10
        y = side + 76 + i // columns * 16
        dot(pen, x + 4, y + 7, 4, colours[i])
        pen.text((x + 14, y), name, fill="black", font=font)
    return sheet


def draw_arrow(pen, place, spot, move, colour):
    """Draw an arrow at a spot [2] of the plane; place: point of the plane -> pixels."""
    move = 0.055 * move
    across = 0.3 * torch.stack([-move[1], move[0]])
    pen.line((*place(spot), *place(spot + 0.8 * move)), fill=colour, width=2)
    head = (move, 0.5 * move + across, 0.5 * move - across)
    pen.polygon([place(spot + corner) for corner in head], fill=colour)


def toy_picture(panels, spots, y, side=380):
    """Draw per panel the mean velocity at t = 0.5 of two classes, and where 5 Euler steps arrive.

    panels: (kind, {steps: error}, blobs [class, k, 2], velocities [class, n, 2] at the spots [n, 2], ends
    [m, 2]) of each; y [m]: the classes of the ends.
    """
    colours = ("#d95f02", "#1f78b4")
    sheet = Image.new("RGB", (2 * side + 24, 2 * side + 136), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    title = "Mean velocity field of two classes (figure 4b), computed: same data, other labels"
    pen.text((8, 4), title, fill="black", font=ImageFont.load_default(15))
    for c, name in enumerate(("class A", "class B")):
        dot(pen, 15 + 90 * c, 34, 5, colours[c])
        pen.text((24 + 90 * c, 26), name, fill="black", font=font)
    pen.text((200, 26), "rings: the data; arrows: where a class's flow goes on average; axes from -3 to 3",
             fill="black", font=font)

    def square(left, top, title, blobs):
        """Draw title, frame and rings of a square; return the function from its plane to pixels."""
        def place(point):
            x, y = point.tolist()
            return left + (x + 3) / 6 * side, top + (3 - y) / 6 * side

        pen.text((left, top - 20), title, fill="black", font=font)
        pen.rectangle((left, top, left + side, top + side), outline="#999999")
        corner = torch.tensor([0.3, -0.3])
        for colour, blobs_of_class in zip(colours, blobs, strict=True):
            for blob in blobs_of_class:
                pen.ellipse((*place(blob - corner), *place(blob + corner)), outline=colour, width=3)
        return place

    for k, (kind, errors, blobs, velocities, ends) in enumerate(panels):
        left = 8 + k * (side + 8)
        place = square(left, 84, f"{kind}: velocity at t = 0.5", blobs)
        for c in (0, 1):
            for spot, move in zip(spots, velocities[c], strict=True):
                draw_arrow(pen, place, spot, move, colours[c])
        text = ", ".join(f"{error:.3f} ({steps})" for steps, error in errors.items())
        place = square(left, side + 112, f"5 Euler steps; error by steps: {text}", blobs)
        for end, c in zip(ends, y.tolist(), strict=True):
            if end.abs().max() < 2.95:
                dot(pen, *place(end), 1.5, colours[c])
    return sheet
