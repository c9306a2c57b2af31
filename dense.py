"""Segmentation and depth from frozen features, for probe.py: pairs of images and targets, a pyramid head.

A target [H, W] holds class numbers from 1, or metres; 0 is unknown. `args` are the flags of segment or depth.
"""
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import data
import files
import runs
import shapes
from files import UserError

# -- Pairs of images and targets ---------------------------------------------------------------------------

LAYOUTS = {  # what --data holds
    "segment": "ADE20K's layout: {images,annotations}/{training,validation}/*, 0 = no label, 1 to 150",
    "depth": "NYUv2's layout: {train,test}/<scene>/rgb_N.jpg with sync_depth_N.png in 16-bit millimetres",
}


def open_pairs(args):
    """Return the training and the test pairs; test targets without a known pixel are left out.

    They are all read, so that a bad one ends the program now and not after the training.
    """
    if args.demo:
        return shapes.scenes(args.probe, "train"), shapes.scenes(args.probe, "val")
    train, test = list_pairs(args.probe, args.data)
    runs.say(f"{args.data}: {len(train):,} pairs to train, {len(test):,} to test")
    test = [pair for pair in test if read_pair(pair, args.probe)[1].any()]
    if not test or not any(read_pair(pair, args.probe)[1].any() for pair in train):
        raise UserError(f"--data {args.data}: no {'training' if test else 'test'} target has known pixels")
    return train, test


def list_pairs(task, root):
    """Return [training, test], pairs (image, label) of files; raises UserError that describes the layout."""
    sets = []
    for split in ("images/training", "images/validation") if task == "segment" else ("train", "test"):
        images = [Path(file) for file in data.list_images(Path(root, split))]
        if task == "segment":
            folder = Path(root, split.replace("images", "annotations"))
            labels = [folder / image.relative_to(Path(root, split)).with_suffix(".png") for image in images]
        else:
            images = [image for image in images if image.stem.startswith("rgb")]
            labels = [image.with_name(f"sync_depth{image.stem[3:]}.png") for image in images]
        if not images:
            raise UserError(f"--data {root}: no images for '{split}'; expected {LAYOUTS[task]}")
        for label in labels:
            if not label.exists():
                raise UserError(f"{label}: no such label; expected {LAYOUTS[task]}")
        sets.append(list(zip(images, labels, strict=True)))
    return sets


def read_pair(pair, task):
    """Return the image and its target, NumPy [H, W]."""
    image, target = pair
    if isinstance(image, np.ndarray):  # the demo's
        return Image.fromarray(image), target
    image = data.open_rgb(image)
    with files.reading(target, f"a label of {pair[0]} in {LAYOUTS[task]}"):
        label = np.asarray(Image.open(target)).astype(np.int32)
        if label.shape != image.size[::-1] or (task == "segment" and label.max() > 150):
            raise ValueError(f"shape {label.shape}, values up to {label.max()}")
    if task == "segment":
        return image, label
    return image, (label / 1000).astype(np.float32)


def random_crops(pairs, args, numbers):
    """Return scaled, mirrored crops, each a function of (seed, its number) alone.

    uint8 [B, size, size, 3], targets [B, size, size].
    """
    crops = []
    for number in numbers:
        rng = np.random.default_rng((args.seed, number))
        image, target = read_pair(pairs[rng.integers(len(pairs))], args.probe)
        factor = args.size * rng.uniform(args.least_scale, 1 / args.least_scale) / min(image.size)
        size = [round(n * factor) for n in image.size]
        y, x = (int(rng.integers(max(0, n - args.size) + 1)) for n in size[::-1])
        box = (x, y, x + args.size, y + args.size)  # beyond the picture crop() fills in 0, which is unknown
        image = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        target = Image.fromarray(target).resize(size, Image.Resampling.NEAREST).crop(box)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
            target = ImageOps.mirror(target)
        crops.append((np.array(image), np.array(target)))
    return torch.utils.data.default_collate(crops)


# -- A pyramid head on the single-scale map ----------------------------------------------------------------

class PyramidHead(nn.Module):
    """Map [B, C, h, w] -> [B, out, 4h, 4w]: four scales of the one map, summed from coarse to fine (FPN)."""

    def __init__(self, channels, out, width):
        super().__init__()

        def activated(layer):
            return nn.Sequential(layer, nn.GroupNorm(1, width), nn.GELU())

        def doubled(c):
            return activated(nn.ConvTranspose2d(c, width, 2, 2))

        self.norm = nn.BatchNorm2d(channels, affine=False)  # spaces differ in scale
        self.scales = nn.ModuleList([nn.Sequential(doubled(channels), doubled(width)), doubled(channels),
                                     nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (width, width, channels, channels))
        self.smooth = nn.ModuleList(activated(nn.Conv2d(width, width, 3, padding=1)) for _ in range(4))
        self.head = nn.Conv2d(width, out, 1)

    def forward(self, x):
        x = self.norm(x)
        size = [4 * n for n in x.shape[-2:]]
        total = 0
        above = None
        for i in (3, 2, 1, 0):
            level = self.lateral[i](self.scales[i](x))
            if above is not None:
                level = level + F.interpolate(above, level.shape[-2:], mode="bilinear")
            total = total + F.interpolate(self.smooth[i](level), size, mode="bilinear")
            above = level
        return self.head(total)


# -- Training ----------------------------------------------------------------------------------------------

def dense_loss(task, out, target):
    """Cross-entropy; of log depth the scale-invariant error (Eigen et al.), with 0.15 of the scale's own."""
    if task == "segment":
        return F.cross_entropy(out, target.long() - 1, ignore_index=-1)
    known = target > 0
    d = out.squeeze(1)[known] - target[known].log()
    return (d.square().mean() - 0.85 * d.mean().square()).clamp(min=1e-8).sqrt()


def learning_rate(step, steps, lr, warmup):
    """Polynomial decay of power 0.9 from `lr` to 1e-6; before it a linear rise over `warmup` steps."""
    decayed = 1e-6 + (lr - 1e-6) * (1 - step / steps) ** 0.9
    return decayed * min(1, (step + 1) / max(1, warmup))


def train_head(head, predict, pairs, args, device):
    """Train a head in place; predict(images) is its answer in pixels, [B, out, H, W]."""
    if args.probe == "segment":
        steps = args.steps
    else:
        steps = max(1, args.epochs * len(pairs) // args.batch)
    optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
    crops = torch.utils.data.DataLoader(range(steps * args.batch), args.batch, num_workers=args.workers,
                                        collate_fn=functools.partial(random_crops, pairs, args))
    shown = runs.progress(crops, "training the head", steps * args.batch, data.batch_size)
    for step, (images, target) in enumerate(shown):
        if not target.any():  # nothing known: the mean over no pixel is NaN
            continue
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        loss = dense_loss(args.probe, predict(data.to_float(images, device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            runs.say(f"step {step + 1}/{steps}: loss {loss.item():.4f}")


# -- Testing -----------------------------------------------------------------------------------------------

def sliding(predict, image, size):
    """Average predict() over windows of `size` at a stride of 2/3 of it: [1, out, H, W]."""
    stride = size * 2 // 3
    height, width = image.shape[-2:]

    def starts(length):
        return [min(start, length - size) for start in range(0, length - size + stride, stride)]

    total = 0
    count = 0
    for y, x in itertools.product(starts(height), starts(width)):
        window = predict(image[..., y:y + size, x:x + size])
        around = (x, width - x - size, y, height - y - size)
        total = total + F.pad(window, around)
        count = count + F.pad(torch.ones_like(window), around)
    return total / count


@torch.no_grad()
def prediction_for(predict, image, shape, args, device):
    """Return the prediction for a picture, NumPy [H, W] of the target's shape: class numbers or metres."""
    x = data.to_float(torch.from_numpy(np.array(image))[None], device)
    out = sliding(predict, x, args.size)
    if args.probe == "depth":
        out = (out + sliding(predict, x.flip(-1), args.size).flip(-1)) / 2
    out = F.interpolate(out, shape, mode="bilinear")[0].cpu()
    if args.probe == "depth":
        return out[0].exp().clamp(1e-3, 10).numpy()
    return (1 + out.argmax(0)).numpy()


def measure(predict, pairs, args, device):
    """Return the numbers over all pairs, and the first 8 as (image, target, prediction) to show."""
    confusion = np.zeros((args.outputs, args.outputs), np.int64)  # [truth, prediction]
    errors = []
    shown = []
    for pair in runs.progress(pairs, "testing", len(pairs), lambda _: 1):
        image, target = read_pair(pair, args.probe)
        size = [max(args.size, round(n * args.size / min(image.size))) for n in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        prediction = prediction_for(predict, image, target.shape, args, device)
        if len(shown) < 8:
            shown.append((np.asarray(image), target, prediction))
        known = target > 0
        truth = target[known]
        answer = prediction[known]
        if args.probe == "segment":
            np.add.at(confusion, (truth - 1, answer - 1), 1)
        else:
            error = np.abs(answer - truth)
            errors.append((np.sqrt((error ** 2).mean()), (error / truth).mean()))
    if args.probe == "depth":
        rmse, relative = np.mean(errors, 0).tolist()
        return {"RMSE_m": rmse, "A.Rel": relative}, shown
    right = np.diag(confusion)
    pixels = confusion.sum(1)  # of each class
    union = pixels + confusion.sum(0) - right
    return {"mIoU": (right[union > 0] / union[union > 0]).mean(),
            "mAcc": (right[pixels > 0] / pixels[pixels > 0]).mean()}, shown
