"""Segmentation and depth from frozen features, for lab.probe: pairs of images and targets, a pyramid head.

A target [H, W] holds class numbers from 1, or metres; 0 is unknown. `args` are the flags of segment or depth.
"""
import functools
import glob
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lib import data, files, runs, shapes
from lib.files import UserError

# -- Pairs of images and targets ---------------------------------------------------------------------------

LAYOUTS = {  # what --data holds
    "segment": "ADE20K's layout: images/{training,validation}/*.jpg, annotations/*/*.png, 0 = none, 1 to 150",
    "depth": "NYUv2's layout: {train,test}/<scene>/rgb_N.jpg with sync_depth_N.png in 16-bit millimetres",
}
IMAGES = {"segment": ("images/training/*.jpg", "images/validation/*.jpg"),
          "depth": ("train/*/rgb_*.jpg", "test/*/rgb_*.jpg")}  # to train and to test
LABELS = {"segment": ("images/", "annotations/"), "depth": ("/rgb_", "/sync_depth_")}  # in an image's path


def list_pairs(args):
    """Return the training and the test pairs for read_pair; test targets without a known pixel are left out.

    They are all read, so that a bad one ends the program now and not after the training.
    """
    if args.demo:
        return shapes.scenes(args.probe, "train"), shapes.scenes(args.probe, "val")
    train, test = (sorted(glob.glob(pattern, root_dir=args.data)) for pattern in IMAGES[args.probe])
    test = [pair for pair in test if read_pair(pair, args)[1].any()]
    if not test or not any(read_pair(pair, args)[1].any() for pair in train):
        raise UserError(f"--data {args.data}: nothing to train or to test on; expected {LAYOUTS[args.probe]}")
    return train, test


def read_pair(pair, args):
    """Return an image, uint8 [H, W, 3], and its target; pair: an image's path below --data, or the demo's."""
    if args.demo:
        return pair
    image = np.asarray(data.open_rgb(Path(args.data, pair)))
    path = Path(args.data, pair.replace(*LABELS[args.probe])).with_suffix(".png")
    with files.reading(path, f"a label of {pair} in {LAYOUTS[args.probe]}"):
        label = np.array(Image.open(path), np.int32)
        if label.shape != image.shape[:2] or (args.probe == "segment" and label.max() > 150):
            raise ValueError(f"shape {label.shape}, values up to {label.max()}")
    if args.probe == "segment":
        return image, label
    return image, np.float32(label / 1000)


def random_crops(pairs, args, numbers):
    """Return uint8 [B, size, size, 3] and targets: scaled, mirrored crops; number and seed decide on each."""
    crops = []
    for number in numbers:
        rng = np.random.default_rng((args.seed, number))
        image, target = read_pair(pairs[rng.integers(len(pairs))], args)
        scale = args.size * rng.uniform(args.least_scale, 1 / args.least_scale) / min(target.shape)
        height, width = (round(n * scale) for n in target.shape)
        y = rng.integers(max(0, height - args.size) + 1)
        x = rng.integers(max(0, width - args.size) + 1)
        box = (x, y, x + args.size, y + args.size)  # beyond the picture crop() fills in 0, which is unknown
        mirrored = rng.random() < 0.5
        crop = []
        for array, resample in ((image, Image.BILINEAR), (target, Image.NEAREST)):
            picture = Image.fromarray(array).resize((width, height), resample).crop(box)
            crop.append(np.array(ImageOps.mirror(picture) if mirrored else picture))
        crops.append(crop)
    return default_collate(crops)


# -- A pyramid head on the single-scale map ----------------------------------------------------------------

def activated(convolution):
    """Return a convolution, normalised, with a GELU."""
    return nn.Sequential(convolution, nn.GroupNorm(1, convolution.out_channels), nn.GELU())


class PyramidHead(nn.Module):
    """Images -> answers [B, out, H, W]: features(images) [B, channels, h, w] at four scales, summed (FPN)."""

    def __init__(self, features, channels, out, width):
        super().__init__()
        self.features = features
        self.norm = nn.BatchNorm2d(channels, affine=False)  # spaces differ in scale
        self.up2 = nn.Sequential(activated(nn.ConvTranspose2d(channels, width, 2, 2)),
                                 activated(nn.ConvTranspose2d(width, width, 2, 2)))
        self.up1 = activated(nn.ConvTranspose2d(channels, width, 2, 2))
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (width, width, channels, channels))
        self.smooth = nn.ModuleList(activated(nn.Conv2d(width, width, 3, padding=1)) for _ in range(4))
        self.head = nn.Conv2d(width, out, 1)

    def forward(self, images):
        x = self.norm(self.features(images))
        scales = [F.max_pool2d(x, 2, ceil_mode=True), x, self.up1(x), self.up2(x)]
        level = x.new_zeros(1, 1, 1, 1)  # nothing is above the coarsest
        total = 0
        for scale, lateral, smooth in zip(scales, self.lateral[::-1], self.smooth[::-1]):
            level = lateral(scale) + F.interpolate(level, scale.shape[-2:], mode="bilinear")
            total = total + F.interpolate(smooth(level), scales[3].shape[-2:], mode="bilinear")
        return F.interpolate(self.head(total), images.shape[-2:], mode="bilinear")


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
    return decayed * min(1, (step + 1) / warmup)


def train_head(head, pairs, args):
    """Train a PyramidHead in place."""
    steps = args.steps or max(1, args.epochs * len(pairs) // args.batch)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=args.wd)
    crops = DataLoader(range(steps * args.batch), args.batch, num_workers=args.workers,
                       collate_fn=functools.partial(random_crops, pairs, args))
    for step, (images, target) in enumerate(crops):
        if not target.any():  # nothing known: the mean over no pixel is NaN
            continue
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        loss = dense_loss(args.probe, head(data.to_float(images, args.device)), target.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            runs.say(f"step {step}/{steps}: loss {loss.item():.4f}")


# -- Testing -----------------------------------------------------------------------------------------------

def sliding(predict, image, args):
    """Average predict(windows of an image) at a stride of 2/3 of --size: [1, 3, H, W] -> [1, out, H, W]."""
    size = args.size
    stride = size * 2 // 3
    starts = [[min(i, n - size) for i in range(0, n - size + stride, stride)] for n in image.shape[2:]]
    total = image.new_zeros(1, args.outputs, *image.shape[2:])
    count = torch.zeros_like(total)
    for y, x in itertools.product(*starts):
        window = (..., slice(y, y + size), slice(x, x + size))
        total[window] += predict(image[window])
        count[window] += 1
    return total / count


@torch.no_grad()
def prediction_for(head, image, args):
    """Return the prediction for a picture, uint8 [H, W, 3]: class numbers or metres, NumPy [H, W]."""
    shape = image.shape[:2]
    size = [round(n * args.size / min(shape)) for n in shape[::-1]]
    resized = np.array(Image.fromarray(image).resize(size, Image.BILINEAR))
    x = data.to_float(torch.from_numpy(resized)[None], args.device)
    out = sliding(head, x, args)
    if args.probe == "segment":
        return 1 + F.interpolate(out, shape, mode="bilinear")[0].argmax(0).cpu().numpy()
    out = (out + sliding(head, x.flip(3), args).flip(3)) / 2
    return F.interpolate(out, shape, mode="bilinear")[0, 0].exp().clamp(1e-3, 10).cpu().numpy()


def measure(head, pairs, args):
    """Return the numbers over all pairs, and the first 8 as (image, target, prediction) to show."""
    confusion = torch.zeros(args.outputs, args.outputs, dtype=torch.float64)  # [truth, prediction]
    errors = []
    shown = []
    for pair in runs.progress(pairs, "testing", len(pairs), lambda _: 1):
        image, target = read_pair(pair, args)
        prediction = prediction_for(head, image, args)
        if len(shown) < 8:
            shown.append((image, target, prediction))
        truth = target[target > 0]
        answer = prediction[target > 0]
        if args.probe == "segment":
            np.add.at(confusion.numpy(), (truth - 1, answer - 1), 1)
        else:
            error = np.abs(answer - truth)
            errors.append((np.sqrt((error ** 2).mean()), (error / truth).mean()))
    if args.probe == "depth":
        return dict(zip(("RMSE_m", "A.Rel"), np.mean(errors, 0).tolist())), shown
    right = confusion.diag()
    pixels = confusion.sum(1)  # of each class
    union = pixels + confusion.sum(0) - right
    # Classes that are nowhere are 0 / 0, and left out.
    return {"mIoU": (right / union).nanmean().item(), "mAcc": (right / pixels).nanmean().item()}, shown
