"""Grids of pictures and line charts: arrays in, Pillow images out; nothing here reads or writes a file."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def grid_image(images, columns, labels=None, title="", tile=None):
    """Draw a grid of uint8 images [n, H, W, 3], with a title and a label above each image.

    tile: pixels per side to which images, then of any sizes, are enlarged; default 96, or their own size if
    that is more.
    """
    tile = tile or max(96, images.shape[1])
    gap = 4
    text = 16 if labels else 0
    head = 24 if title else 0
    rows = -(-len(images) // columns)
    size = (columns * (tile + gap) + gap, head + rows * (tile + gap + text) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 4), title, fill="black", font=ImageFont.load_default(14))
    for i, array in enumerate(images):
        x = gap + i % columns * (tile + gap)
        y = gap + head + i // columns * (tile + gap + text)
        if labels:
            pen.text((x, y), str(labels[i])[:tile // 6], fill="black", font=ImageFont.load_default(12))
        enlarged = Image.fromarray(array).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y + text))
    return sheet


def loss_curve(entries, title):
    """Draw every *loss of a log against the step; None for fewer than two entries."""
    if len(entries) < 2:
        return None
    names = [name for name in entries[-1] if name.endswith("loss")]
    return line_chart({name: [(e["step"], e[name]) for e in entries if name in e] for name in names}, title)


def line_chart(curves, title):
    """Draw curves {name: [(x, y), ...]} on one labelled scale."""
    points = np.array([point for curve in curves.values() for point in curve] or [(0, 0)], float)
    low = points.min(0)
    span = np.maximum(np.ptp(points, 0), 1e-12)

    corner = np.array([60, 364])  # of the axes, in pixels; y points downwards
    extent = np.array([644, -320])
    sheet = Image.new("RGB", (720, 400), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((60, 6), title, fill="black")
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * span
        x, y = corner + share * extent
        pen.line((60, y, 704, y), fill="#dddddd")
        pen.text((4, y - 7), f"{value[1]:.3g}", fill="black")
        pen.text((x - 12, 370), f"{value[0]:.0f}", fill="black")
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS)):
        placed = corner + (np.array(curve).reshape(-1, 2) - low) / span * extent
        pen.line(placed.ravel().tolist(), fill=colour, width=2)
        pen.text((60 + 160 * i, 24), name, fill=colour)
    return sheet
