"""Every number about features: what frozen features know, how a latent space is laid out (paper, 3.2, 4.3).

    python probe.py classify --data imagenet --ae runs/ae/last.pt       # linear head: top-1, top-5
    python probe.py segment --data ADEChallengeData2016 --features latent              # FPN head: mIoU, mAcc
    python probe.py depth --data nyu/official_splits                    # FPN head: RMSE, A.Rel
    python probe.py space --data imagenet/val                           # separability and t-SNE (figure 4a)
    python probe.py flow --data imagenet/val                            # where the transformer errs
    python probe.py pca --class 207                                     # hidden states (figures 10, 11)
    python probe.py toy                                                 # mean velocity fields (figure 4b)
    python probe.py pixels --patch 8 --channels 392                     # an encoder without semantics (3.1)

Each takes --help, and all but toy and pixels --demo: a run of a minute on a CPU without download. --features
chooses encoder, residual, latent (both) or pixels. Numbers and pictures go to probes/<probe>.json and .png.
"""
import functools
import itertools
import json
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import data
import figures
import files
import runs
import shapes
import svg
from fid import frechet_distance, moments
from files import UserError
from sample import add_model_flags, class_numbers, find_models, fit_flow_flags

# -- Frozen features ---------------------------------------------------------------------------------------

SPACES = ("encoder", "residual", "latent", "pixels")


def load_features(args, device, needed="encoder", ae=None):
    """Return features(images [B, 3, H, W], space) -> float map [B, C, h, w], the spaces it has, and its file.

    --encoder is a frozen encoder alone. --ae is an autoencoder: its encoder's channels, its aligned residual,
    or both ("latent"); of a VAE all are the encoder's. "pixels" are the picture's own: 3 * ratio * ratio
    channels for each patch. ae: one of several files. Raises UserError if the `needed` space is not there.
    """
    if args.encoder:
        path = args.encoder
        model = svg.load_encoder(runs.fetch_weights(path, args.weights)).to(device)
        encoder_channels = model.dim
        ratio = 16 if model.vit.patch == 14 else model.vit.patch  # pixels per token and side
        spaces = ("encoder", "pixels")
    else:
        path = ae or args.ae or runs.latest_run("ae", demo=False)
        if not path:
            raise UserError("no stage-1 run below runs/: name one by --ae, or an encoder by --encoder")
        model = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
        encoder_channels = model.feature_channels
        ratio = model.ratio
        spaces = SPACES if model.channels > encoder_channels else ("encoder", "pixels")
    if needed not in spaces:
        raise UserError(f"--features {needed}: {path} has {', '.join(spaces)} only")
    runs.say(f"features of {path}: {runs.millions(model=model)}")
    if args.size % ratio:
        raise UserError(f"--size {args.size}: give a multiple of {ratio}")

    @torch.no_grad()
    def features(images, space):
        if space == "pixels":
            return F.pixel_unshuffle(images, ratio)
        h, w = (n // ratio for n in images.shape[-2:])
        with runs.autocast(device, args.precision):
            tokens = model(images, grid=(h, w)) if args.encoder else model.encode(images)  # [B, N, C]
        if space == "encoder":
            tokens = tokens[..., :encoder_channels]
        elif space == "residual":
            tokens = tokens[..., encoder_channels:]
        return tokens.float().transpose(1, 2).unflatten(2, (h, w))

    return features, spaces, str(path)


def encode(function, dataset, blocks, args, device):
    """Yield function(images) and labels of each block of indices, --encode-batch images at a time.

    Unreadable images are left out.
    """
    parts_of_blocks = [block.split(args.encode_batch) for block in blocks]
    items = [[(i, 0) for i in part.tolist()] for part in itertools.chain(*parts_of_blocks)]
    count = sum(len(part) for part in items)
    batches = iter(runs.progress(data.batches_of(dataset, items, args.workers), "encoding", count,
                                 data.batch_size))
    for parts in parts_of_blocks:
        encoded = []
        labels = []
        for images, y, corrupt in itertools.islice(batches, len(parts)):
            for i in set(corrupt.tolist()) - {-1}:  # Python shows the same warning only once
                warnings.warn(f"{dataset.name(i)}: not a readable image, skipped")
            encoded.append(function(data.to_float(images, device))[corrupt < 0])
            labels.append(y[corrupt < 0])
        yield torch.cat(encoded), torch.cat(labels).to(device)


# -- Data in, numbers out ----------------------------------------------------------------------------------

LAYOUTS = {  # what --data holds
    "classify": "class folders of images, or packed sets, in train/ and val/",
    "space": "class folders of images, or a packed set",
    "segment": "ADE20K's layout: {images,annotations}/{training,validation}/*, 0 = no label, 1 to 150",
    "depth": "NYUv2's layout: {train,test}/<scene>/rgb_N.jpg with sync_depth_N.png in 16-bit millimetres",
}


def open_sets(args):
    """Return the sets of a probe's data: [training, test], for `space` one alone."""
    if args.demo:
        return demo_sets(args.probe, args.size)
    if args.probe == "space":
        return [data.open_data(args.data, args.size)]
    if args.probe == "classify":
        return [data.open_data(os.path.join(args.data, split), args.size) for split in ("train", "val")]
    sets = list_pairs(args.probe, args.data)
    runs.say(f"{args.data}: {len(sets[0]):,} pairs to train, {len(sets[1]):,} to test")
    return sets


def demo_sets(probe, size):
    """open_sets for the built-in data."""
    if probe in ("segment", "depth"):
        return [shapes.scenes(probe, "train"), shapes.scenes(probe, "val")]
    if size != shapes.SIZE:
        raise UserError(f"--size {size}: the images of --demo have {shapes.SIZE} pixels, leave it out")
    if probe == "space":
        return [shapes.dataset("shapes://val")]
    return [shapes.dataset("shapes://train", 3000), shapes.dataset("shapes://val", 1000)]


def rounded(value):
    """Round the floats in dicts and lists to 4 digits; those that are not finite become None."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return round(float(value), 4) if math.isfinite(value) else None
    return value


def report(args, numbers, picture=None):
    """Print the numbers (null: not finite); write them with the settings, and the picture, to --out."""
    numbers = rounded(numbers)
    print(json.dumps(numbers), flush=True)
    out = Path(args.out, args.probe)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(f"{out}.json", {**numbers, "settings": vars(args)})
    written = f"{out}.json"
    if picture:
        files.save_image(f"{out}.png", picture)
        written += f" and {out}.png"
    print(written)


# -- Classification ----------------------------------------------------------------------------------------

def random_resized_crops(images, generator):
    """Crop 8 to 100% of the area, ratio 3:4 to 4:3, half of them mirrored, at full size: [B, 3, H, W]."""
    n = len(images)
    u = torch.rand(5, n, generator=generator)
    area = 0.08 + 0.92 * u[0]
    ratio = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w = (area * ratio).sqrt().clamp(max=1)
    h = (area / ratio).sqrt().clamp(max=1)
    x = (2 * u[2] - 1) * (1 - w)
    y = (2 * u[3] - 1) * (1 - h)
    mirror = torch.where(u[4] < 0.5, -1, 1)
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([w * mirror, zero, x], 1), torch.stack([zero, h, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def training_batches(features, train, args, device):
    """Yield features [b, C] and labels [b] of --batch images in random order, for --epochs epochs.

    With --cache each image is encoded once, uncropped; otherwise a new crop of it in each epoch.
    """
    if args.cache:
        x, y = next(encode(features, train, [torch.arange(len(train))], args, device))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        if args.cache:
            for block in torch.randperm(len(y)).split(args.batch):
                yield x[block], y[block]
        else:
            blocks = torch.randperm(len(train)).split(args.batch)
            yield from encode(lambda images: features(random_resized_crops(images, generator)),
                              train, blocks, args, device)


def classify(args, device):
    """Linear head on the mean of the tokens (paper: AdamW 5e-4, weight decay 1e-2, batch 3072, 30 epochs)."""
    features, _, path = load_features(args, device, args.features)
    train, val = open_sets(args)
    if train.classes != val.classes:
        raise UserError(f"--data {args.data}: train/ and val/ hold different class folders")
    runs.say(f"{runs.describe(train, 'train')}; {len(val):,} to test")
    if args.batch < 2:
        raise UserError(f"--batch {args.batch}: the head's normalisation takes at least 2 images")
    start = time.time()

    def pooled(images):
        return features(images, args.features).mean((2, 3))

    # Training.
    head = None
    for x, y in training_batches(pooled, train, args, device):
        if head is None:
            norm = nn.BatchNorm1d(x.shape[1], affine=False)  # spaces differ in scale
            head = nn.Sequential(norm, nn.Linear(x.shape[1], len(train.classes))).to(device)
            optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
        if len(x) > 1:  # one left over has no variance
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()

    # Test.
    head.eval()
    x, y = next(encode(pooled, val, [torch.arange(len(val))], args, device))
    with torch.no_grad():
        hits = head(x).topk(min(5, len(train.classes))).indices == y[:, None]
    top1 = hits[:, 0].float().mean().item()
    top5 = hits.any(1).float().mean().item()
    report(args, {"features": args.features, "of": path, "top1": top1, "top5": top5, "images": len(y),
                  "seconds": round(time.time() - start)})


# -- Segmentation and depth: pairs of images and targets ---------------------------------------------------

def list_pairs(task, root):
    """Return [training, test], pairs (image, label) of files; raises UserError that describes the layout."""
    sets = []
    for split in ("images/training", "images/validation") if task == "segment" else ("train", "test"):
        folder = Path(root, split)
        images = [Path(file) for file in data.list_images(folder)]
        if task == "segment":
            labels = Path(root, split.replace("images", "annotations"))
            pairs = [(image, labels / image.relative_to(folder).with_suffix(".png")) for image in images]
        else:
            pairs = [(image, image.with_name(f"sync_depth{image.stem[3:]}.png")) for image in images
                     if image.stem.startswith("rgb")]
        if not pairs:
            raise UserError(f"--data {root}: no images for '{split}'; expected {LAYOUTS[task]}")
        for _, label in pairs:
            read_label(label, task, lambda file: file.size)  # its header alone
        sets.append(pairs)
    return sets


def read_label(path, task, read=np.asarray):
    """Return read(the opened file); raises UserError that names a missing or damaged one."""
    try:
        with Image.open(path) as file:
            return read(file)
    except Exception as e:  # as in data.open_rgb
        raise UserError(f"{path}: not a readable label ({files.short_error(e)}); expected "
                        f"{LAYOUTS[task]}") from e


def read_pair(pair, task):
    """Return the image and its target [H, W]: class numbers or metres, 0 = unknown."""
    image, target = pair
    if isinstance(image, np.ndarray):  # the demo's
        return Image.fromarray(image), target
    image = data.open_rgb(image)
    label = read_label(target, task).astype(np.int32)
    if label.ndim != 2 or label.shape != image.size[::-1] or (task == "segment" and label.max() > 150):
        raise UserError(f"{target}: not a label of {pair[0]}; expected {LAYOUTS[task]}")
    if task == "segment":
        return image, label
    return image, (label / 1000).astype(np.float32)


def is_known(pair, task):
    """Whether the target of a pair has a known pixel."""
    _, target = read_pair(pair, task)
    return target.any()


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


# -- Segmentation and depth: a pyramid head on the single-scale map ----------------------------------------

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
    start = time.time()
    shown = 0.0
    for step, (images, target) in enumerate(crops):
        if not target.any():  # nothing known: the mean over no pixel is NaN
            continue
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        loss = dense_loss(args.probe, predict(data.to_float(images, device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.log_every == 0 or runs.due(start, shown):
            shown = time.time()
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


def sliding(predict, image, size):
    """Average predict() over windows of `size` at a stride of 2/3 of it: [1, out, H, W]."""
    stride = size * 2 // 3
    height, width = image.shape[-2:]
    total = 0
    count = 0
    for start_y in range(0, height - size + stride, stride):
        for start_x in range(0, width - size + stride, stride):
            y = min(start_y, height - size)
            x = min(start_x, width - size)
            window = predict(image[..., y:y + size, x:x + size])
            around = (x, width - x - size, y, height - y - size)
            total = total + F.pad(window, around)
            count = count + F.pad(torch.ones_like(window), around)
    return total / count


@torch.no_grad()
def answer_of(predict, image, shape, args, device):
    """Return the answer for a picture, NumPy [H, W] of the target's shape: class numbers or metres."""
    x = data.to_float(torch.from_numpy(np.array(image))[None], device)
    out = sliding(predict, x, args.size)
    if args.probe == "depth":
        out = (out + sliding(predict, x.flip(-1), args.size).flip(-1)) / 2
    out = F.interpolate(out, shape, mode="bilinear")[0].cpu()
    if args.probe == "depth":
        return out[0].exp().clamp(1e-3, 10).numpy()
    return (1 + out.argmax(0)).numpy()


def measure(predict, pairs, args, device):
    """Return the numbers over all pairs, and the first 8 as (image, target, answer) to show."""
    confusion = np.zeros((args.outputs, args.outputs), np.int64)  # [truth, answer]
    errors = []
    shown = []
    for pair in runs.progress(pairs, "testing", len(pairs), lambda _: 1):
        image, target = read_pair(pair, args.probe)
        size = [max(args.size, round(n * args.size / min(image.size))) for n in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        answer = answer_of(predict, image, target.shape, args, device)
        if len(shown) < 8:
            shown.append((np.asarray(image), target, answer))
        a = answer[target > 0]
        b = target[target > 0]
        if args.probe == "segment":
            np.add.at(confusion, (b - 1, a - 1), 1)
        else:
            errors.append((np.sqrt(((a - b) ** 2).mean()), (np.abs(a - b) / b).mean()))
    if args.probe == "depth":
        rmse, relative = np.mean(errors, 0).tolist()
        return {"RMSE_m": rmse, "A.Rel": relative}, shown
    right = np.diag(confusion)
    truth = confusion.sum(1)
    union = truth + confusion.sum(0) - right
    return {"mIoU": (right[union > 0] / union[union > 0]).mean(),
            "mAcc": (right[truth > 0] / truth[truth > 0]).mean()}, shown


def dense(args, device):
    """Train a pyramid head on frozen maps and measure it by sliding window."""
    features, _, path = load_features(args, device, args.features)
    train, val = open_sets(args)
    val = [pair for pair in val if is_known(pair, args.probe)]  # so a bad file shows now, not after training
    if not val:
        raise UserError(f"--data {args.data}: no test target has known pixels")
    if not any(is_known(pair, args.probe) for pair in train):
        raise UserError(f"--data {args.data}: no training target has known pixels")
    torch.manual_seed(args.seed)
    channels = features(torch.zeros(1, 3, args.size, args.size, device=device), args.features).shape[1]
    head = PyramidHead(channels, args.outputs, args.width).to(device)

    def predict(images):
        return F.interpolate(head(features(images, args.features)), images.shape[-2:], mode="bilinear")

    start = time.time()
    train_head(head, predict, train, args, device)
    head.eval()
    numbers, shown = measure(predict, val, args, device)
    picture = figures.dense_picture(args.probe, shown, args.features, max(96, min(192, args.size)))
    report(args, {"features": args.features, "of": path, **numbers, "images": len(val),
                  "seconds": round(time.time() - start)}, picture)


# -- How separable a latent space is (figure 4a) -----------------------------------------------------------

def separability(x, labels, seed):
    """Return how well the classes of x [n, d] are told apart.

    That is the accuracy of logistic regression and of the nearest neighbour, on the half of each class that
    is held out, and the ratio of between-class to within-class scatter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort()]
    fit = order[::2]
    test = order[1::2]
    head = nn.Linear(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    x = x / x.std()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x[fit]), labels[fit]) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    linear = head(x[test]).argmax(1)
    nearest = labels[fit][torch.cdist(x[test], x[fit]).argmin(1)]
    means = torch.stack([x[labels == c].mean(0) for c in labels])
    between = (means - x.mean(0)).square().sum()
    within = (x - means).square().sum()
    return {"linear": (linear == labels[test]).double().mean().item(),
            "1-NN": (nearest == labels[test]).double().mean().item(),
            "between/within": (between / within).item()}


def space(args, device):
    """Separability of each space: all tokens of an image together, on the first 64 principal axes.

    Of one file each space is shown, of several the whole latents of each.
    """
    paths = args.ae or [None]
    opened = [load_features(args, device, ae=ae) for ae in paths]
    [dataset] = open_sets(args)

    # Classes evenly spaced, the same number of images of each.
    count = min(args.classes, len(dataset.classes))
    classes = torch.linspace(0, len(dataset.classes) - 1, count).round().long()
    labels = torch.as_tensor(dataset.labels)
    chosen = [(labels == c).nonzero()[:args.images // count, 0] for c in classes]
    least = min(len(indices) for indices in chosen)
    if count < 2 or least < 4:
        raise UserError(f"--images {args.images}, --classes {args.classes}: too few: {count} classes, one of "
                        f"{least} images; 2 of 4 images each are the least")

    # Numbers and a map of each space.
    numbers = {}
    panels = []
    for features, spaces, path in opened:
        if len(paths) > 1:
            spaces = ["latent" if "latent" in spaces else "encoder"]
        for kind in spaces:
            def flat(images, features=features, kind=kind):
                return features(images, kind).flatten(1).half()  # a thousand 256-pixel latents take 200 MB

            x, y = next(encode(flat, dataset, [torch.cat(chosen)], args, device))
            x = figures.principal(x.cpu().float(), 64).float()
            y = torch.searchsorted(classes, y.cpu())
            some = np.linspace(0, len(x), min(len(x), 500), endpoint=False).astype(int)
            name = kind if len(paths) == 1 else path
            numbers[name] = separability(x, y, args.seed)
            panels.append((name, numbers[name], figures.tsne(x[some], seed=args.seed).numpy()))
    picture = figures.space_picture(panels, y[some].numpy(), [dataset.classes[c] for c in classes])
    of = path if len(paths) == 1 else paths
    report(args, {"of": of, "images": len(y), "classes": count, "chance": 1 / count, **numbers}, picture)


# -- The flow: where the transformer errs, with no decoder in it -------------------------------------------

@torch.no_grad()
def flow(args, device):
    """Flow loss of features and residual by t, and the Frechet distance of the samples' features.

    Features are normalised; the distance is that of their means over the tokens of an image, from those of
    held-out images. It sees no decoder, and compares models of one encoder.
    """
    sit, ae, path = find_models(args, device, decode_only=False)
    fit_flow_flags(args, sit)
    if args.train_shift == "auto":
        args.train_shift = svg.auto_shift(sit.grid, sit.channels)
    dataset = data.open_data(args.data, ae.image_size)
    known = sit.meta.get("classes", dataset.classes)
    if dataset.classes != known or len(known) != sit.num_classes:
        raise UserError(f"--data {args.data}: not the classes that {path} was trained on")
    runs.say(f"{path} | {runs.describe(dataset, args.data)}")

    def latents_of(images):
        with runs.autocast(device, args.precision):
            return ae.normalize(ae.encode(images))

    chosen = np.linspace(0, len(dataset), min(args.images, len(dataset)), endpoint=False).astype(int)
    latents, y = next(encode(latents_of, dataset, [torch.from_numpy(chosen)], args, device))
    if len(y) < 2:
        raise UserError(f"--images {args.images}: fewer than 2 readable ones of --data {args.data}")
    noise = svg.sample_noise(args.seed, range(len(y)), latents.shape[1:]).to(device)
    parts = list(zip(*(x.split(args.encode_batch) for x in (latents, y, noise)), strict=True))
    channels = {"features": slice(ae.feature_channels)}
    if ae.channels > ae.feature_channels:
        channels["residual"] = slice(ae.feature_channels, None)

    # Loss by t, at the middles of ten equal parts of the training's times.
    curves = {name: [] for name in channels}
    with runs.autocast(device, args.precision):
        for i in runs.progress(range(10), "flow loss", 10 * len(y), lambda i: len(y)):
            u = (i + 0.5) / 10
            errors = [svg.flow_error(sit, z, labels, args.train_shift, torch.full((len(z),), u).to(z), n)
                      for z, labels, n in parts]
            by_channel = torch.cat([error.mean(1) for error in errors]).mean(0)  # [C]
            for name, part in channels.items():
                curves[name].append([svg.shift_time(u, args.train_shift), by_channel[part].mean().item()])

        # The samples' features.
        distances = {}
        real = latents[..., channels["features"]].mean(1)
        for steps in args.steps:
            shown = runs.progress(parts, f"{steps} steps", len(y), lambda part: len(part[1]))
            z = [svg.euler_sample(sit, n, labels, steps, args.guidance, args.shift,
                                  internal_guidance=args.internal_guidance) for _, labels, n in shown]
            fake = torch.cat(z)[..., channels["features"]].mean(1)
            gaussians = []
            for x in (fake, real):
                count, mean, scatter = moments(x)
                gaussians += [mean.cpu(), scatter.cpu() / (count - 1)]
            distances[str(steps)] = frechet_distance(*gaussians)
    means = {f"loss_{name}": float(np.mean([loss for _, loss in curve])) for name, curve in curves.items()}
    report(args, {"of": str(path), "images": len(y), **means, "frechet_by_steps": distances,
                  "loss_by_t": curves}, figures.line_chart(curves, f"{path}: flow loss by t", "t"))


# -- Mean velocity fields of two classes, entangled and separated (figure 4b) ------------------------------

BLOBS = torch.tensor([[x, y] for x in (-2.0, 2.0) for y in (-0.8, 0.0, 0.8)])  # two groups of three
SIGMA = 0.15  # their standard deviation
BLOBS_OF_CLASSES = {"entangled": [[0, 2, 4], [1, 3, 5]], "separated": [[0, 1, 2], [3, 4, 5]]}


def mean_velocity(x, t, blobs):
    """Return E[data - noise | x_t = x] in closed form, for data in Gaussian blobs.

    x [B, 1, 2], t [B], blobs [B, k, 2] -> [B, 1, 2].
    """
    t = t.view(-1, 1, 1)
    variance = (1 - t) ** 2 + (t * SIGMA) ** 2
    away = x - t * blobs
    share = torch.softmax(-away.square().sum(2, keepdim=True) / (2 * variance), 1)  # of each blob, given x
    return (share * (blobs + (t * SIGMA ** 2 - (1 - t)) / variance * away)).sum(1, keepdim=True)


def toy(args, device):
    """Two classes on six blobs: the error of 1, 5, 25 Euler steps against 1000, on exact mean velocities.

    Entangled and separated have the same data and other labels; the error is the mean distance of the ends.
    """
    count = 2000
    noise = svg.sample_noise(args.seed, range(count), (1, 2))
    y = torch.arange(count) % 2
    line = torch.linspace(-2.6, 2.6, 10)
    spots = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 1, 2)
    half = torch.full((len(spots),), 0.5)
    numbers = {}
    panels = []
    for kind, split in BLOBS_OF_CLASSES.items():
        blobs = BLOBS[torch.tensor(split)]  # [class, 3, 2]

        def velocity(x, t, y, blobs=blobs):
            return mean_velocity(x, t, blobs[y])

        velocity.num_classes = 2
        ends = {steps: svg.euler_sample(velocity, noise, y, steps, shift=1.0) for steps in (1, 5, 25, 1000)}
        errors = {steps: (ends[steps] - ends[1000]).norm(dim=2).mean().item() for steps in (1, 5, 25)}
        arrows = [velocity(spots, half, torch.full((len(spots),), c))[:, 0] for c in (0, 1)]
        numbers[kind] = {f"error_{steps}": error for steps, error in errors.items()}
        panels.append((kind, errors, blobs, arrows, ends[5][:600, 0]))
    report(args, numbers, figures.toy_picture(panels, spots[:, 0], y[:600]))


# -- An encoder that knows nothing ------------------------------------------------------------------------

def pixels(args, device):
    """Write an encoder without semantics, for --encoder: a fixed rotation of the pixels of each patch.

    The same transformer on its latents shows what the encoder's knowledge is worth (paper, section 3.1).
    """
    p = args.patch
    dim = args.channels
    if 3 * p * p > dim:
        raise UserError(f"--channels {dim}: a --patch {p} has {3 * p * p} numbers, give at least as many")
    vit = {"patch": p, "dim": dim, "depth": 0, "heads": 1, "grid": 1, "cls": False, "imagenet": False}
    random = torch.randn(dim, 3 * p * p, generator=torch.Generator().manual_seed(args.seed))
    rotation, _ = torch.linalg.qr(random)
    weights = {"patch_embed.proj.weight": rotation.reshape(dim, 3, p, p),
               "patch_embed.proj.bias": torch.zeros(dim),
               "pos_embed": torch.zeros(1, 1, dim)}
    path = Path(args.out, "pixels.pt")
    if path.exists():
        svg.load_encoder(path)  # refuses to replace anything else
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_checkpoint(path, {"encoder": {"name": f"pixels{p}", "vit": vit, "model": weights}})
    print(path)


# -- Principal components of hidden states and features (figures 10, 11) -----------------------------------

def pca_of_features(args, device):
    """Features of some pictures."""
    photos = np.stack([data.crop(data.open_rgb(file), args.size) for file in args.images])
    features, _, path = load_features(args, device)
    maps = features(data.to_float(torch.from_numpy(photos), device), "encoder").cpu()
    report(args, {"of": path, "images": len(photos)},
           figures.feature_picture(Path(path).name, photos, maps))


def pca(args, device):
    """Hidden states of some layers at some t for an image or a sample; with --encoder, features of images."""
    if args.encoder:
        return pca_of_features(args, device)
    photos = [data.open_rgb(file) for file in args.images or ()]
    sit, ae, path = find_models(args, device, decode_only=False)
    y = torch.tensor(class_numbers([args.class_], sit), device=device)
    noise = svg.sample_noise(args.seed, [0], (sit.grid ** 2, sit.channels)).to(device)
    times = svg.euler_times(25, 0.4)
    chosen = [times[i] for i in sorted({round(i) for i in np.linspace(0, 25, args.columns)})]
    layers = sorted({round(i) for i in np.linspace(0, len(sit.blocks) - 1, args.rows)})
    hidden = []
    with torch.no_grad(), runs.autocast(device, args.precision):
        # States x_t [T, N, C].
        if photos:
            what = args.images[0]
            x = data.to_float(torch.from_numpy(data.crop(photos[0], ae.image_size))[None], device)
            z = ae.normalize(ae.encode(x)).float()
            states = {t: (1 - t) * noise + t * z for t in chosen}
        else:
            what = f"a sample of class {args.class_}, seed {args.seed}"
            states = {0.0: noise}

            def record(t, x):
                states[t] = x
                return x

            svg.euler_sample(sit, noise, y, times, args.guidance, after=record)
        x_t = torch.cat([states[t] for t in chosen])

        # Hidden states, and what x_t decodes to.
        for i in layers:
            sit.blocks[i].register_forward_hook(lambda _, inputs, out: hidden.append(out.float().cpu()))
        sit(x_t, torch.tensor(chosen, dtype=torch.float32, device=device), y.expand(len(x_t)))
        latents = ae.denormalize(x_t)
        decoded = data.to_uint8(ae.decode(latents))
        final = latents[-1:, :, :ae.feature_channels].cpu()
    names = [f"layer {i + 1}" for i in layers]
    picture = figures.hidden_picture(f"{Path(path).name}, {what}", chosen, decoded, final,
                                     dict(zip(names, hidden, strict=True)))
    report(args, {"of": str(path), "picture": what, "layers": [i + 1 for i in layers]}, picture)


# -- The command -------------------------------------------------------------------------------------------

PROBES = {"classify": classify, "segment": dense, "depth": dense, "space": space, "flow": flow, "pca": pca,
          "toy": toy, "pixels": pixels}
PRECISION = "bf16" if torch.cuda.is_available() else "fp32"
TINY = {"ae": shapes.DEMO_PT, "size": shapes.SIZE, "workers": 0}
DEMO = {  # the defaults that --demo replaces
    "classify": {**TINY, "batch": 500, "lr": 5e-3, "cache": True},
    "segment": {**TINY, "lr": 2e-3, "steps": 300, "warmup": 30, "width": 64,
                "outputs": 1 + len(shapes.CLASSES), "least_scale": 1.0},
    "depth": {**TINY, "lr": 2e-3, "epochs": 5, "width": 64},
    "space": {**TINY, "ae": [shapes.DEMO_PT], "images": 500},
    "flow": {"data": "shapes://val", "workers": 0},
}


def add_input_flags(command, probe, folder, size):
    """Add the flags of data and frozen features."""
    add = command.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="built-in data and model, tiny sizes, no download")
    add("--data", default=folder, help=LAYOUTS[probe])
    add = command.add_mutually_exclusive_group().add_argument
    about = "autoencoder checkpoint, SVG's or a VAE's (default: the newest run; demo.pt with --demo)"
    if probe == "space":
        add("--ae", nargs="+", metavar="FILE", help=about + "; of several their whole latents side by side")
    else:
        add("--ae", help=about)
    add("--encoder", help="frozen encoder alone: a file in the weights folder, or a path")
    add = command.add_argument
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--size", type=runs.positive, default=size, help="pixels per side of a crop")
    add("--workers", type=runs.not_negative, default=8, help="data loading processes")
    add("--precision", choices=("fp32", "bf16"), default=PRECISION, help="of the frozen models' arithmetic")


def add_head_flags(add, lr, wd, batch):
    """Add the flags of every head and its optimiser."""
    add("--features", choices=SPACES, default="encoder", help="which frozen features the head sees")
    add("--lr", type=runs.number(above=0), default=lr, help="AdamW's learning rate, at first")
    add("--wd", type=runs.number(), default=wd, help="weight decay")
    add("--batch", type=runs.positive, default=batch, help="images per step")


def add_dense_flags(add, warmup):
    """Add the flags of pyramid heads."""
    add("--width", type=runs.positive, default=256, help="channels of the head")
    add("--warmup", type=runs.not_negative, default=warmup, help="steps of rising learning rate")
    add("--log-every", type=runs.positive, default=50, help="steps between progress lines")


def parse_args():
    """Parse the command line; the defaults are the paper's."""
    parser = runs.Parser(__doc__)
    commands = parser.add_subparsers(dest="probe", required=True, metavar=" | ".join(PROBES))

    def add_probe(name):
        command = commands.add_parser(name, doc=PROBES[name].__doc__, demo=DEMO.get(name))
        command.add_argument("--out", type=runs.new_folder, default="probes",
                             help="folder for the numbers and the picture")
        command.add_argument("--seed", type=runs.not_negative, default=0,
                             help="of weights, order, crops and noise")
        return command, command.add_argument

    command, add = add_probe("classify")
    add_input_flags(command, "classify", "data/imagenet", size=256)
    add("--encode-batch", type=runs.positive, default=64, help="images encoded at a time")
    add_head_flags(add, lr=5e-4, wd=1e-2, batch=3072)
    add("--epochs", type=runs.positive, default=30, help="passes over the training images")
    add("--cache", action="store_true", help="encode each image once, uncropped, for all epochs")

    command, add = add_probe("segment")
    command.set_defaults(outputs=150, least_scale=0.5)
    add_input_flags(command, "segment", "data/ADEChallengeData2016", size=512)
    add_head_flags(add, lr=8e-5, wd=1e-3, batch=16)
    add_dense_flags(add, warmup=1500)
    add("--steps", type=runs.positive, default=8000, help="training steps")

    command, add = add_probe("depth")
    command.set_defaults(outputs=1, least_scale=1.0)  # scaling would change the depth
    add_input_flags(command, "depth", "data/nyu", size=480)
    add_head_flags(add, lr=5e-4, wd=1e-2, batch=24)
    add_dense_flags(add, warmup=0)
    add("--epochs", type=runs.positive, default=25, help="passes over the training images")

    command, add = add_probe("space")
    add_input_flags(command, "space", "data/imagenet/val", size=256)
    add("--encode-batch", type=runs.positive, default=64, help="images encoded at a time")
    add("--images", type=runs.positive, default=1000, help="images in all, shared by the classes")
    add("--classes", type=runs.positive, default=20, help="of the data's, evenly spaced among them")

    command, add = add_probe("flow")
    add_model_flags(add)
    add("--data", default="data/imagenet/val", help=LAYOUTS["space"] + ", not those of the training")
    add("--images", type=runs.positive, default=1000,
        help="images of them, and samples; as few as the features' channels bias the distance upward")
    add("--steps", type=runs.positive, nargs="+", default=[5, 25], help="Euler steps of the samples")
    add("--guidance", type=runs.number(0, 1000), default=1.0, help="guidance scale of the samples; 1: none")
    add("--internal-guidance", type=runs.number(0, 1000), default=1.0,
        help="guidance of the samples by the middle head, as sample.py's; 1: none")
    add("--shift", type=runs.number_or_auto, default=0.15, help="timestep shift in sampling, as sample.py's")
    add("--train-shift", type=runs.number_or_auto, default=0.4,
        help="timestep shift of the loss's times, as train_dit.py's --shift")
    add("--encode-batch", type=runs.positive, default=64, help="images at a time")
    add("--workers", type=runs.not_negative, default=8, help="data loading processes")
    add("--precision", choices=("fp32", "bf16"), default=PRECISION, help="of the models' arithmetic")

    command, add = add_probe("pca")
    add_model_flags(add)
    add("--images", nargs="+", metavar="FILE", help="pictures (default: a sample of --class)")
    add("--class", dest="class_", help="number or name of the class it is given (default: 0)")
    add("--guidance", type=runs.number(), help="guidance scale of the sample (default: 4.0)")
    add("--rows", type=runs.positive, default=4, help="layers shown")
    add("--columns", type=runs.positive, default=6, help="times shown")
    add("--encoder", help="show the features of a frozen encoder: a file in the weights folder, or a path")
    add("--size", type=runs.positive, help="pixels per side of a crop for --encoder (default: 256)")
    add("--precision", choices=("fp32", "bf16"), default=PRECISION, help="of the models' arithmetic")

    add_probe("toy")

    command, add = add_probe("pixels")
    add("--patch", type=runs.positive, default=8, help="pixels per side of a patch")
    add("--channels", type=runs.positive, default=392, help="of a token, 3 * patch^2 or more")

    args = parser.parse_args()
    if args.probe == "pca":
        check_pca_flags(args)
    return args


def check_pca_flags(args):
    """Raise UserError for flags of `pca` that contradict each other; set those that were not given."""
    if args.encoder:
        for flag, value in (("--demo", args.demo), ("--ckpt", args.ckpt), ("--ae", args.ae),
                            ("--class", args.class_)):
            if value:
                raise UserError(f"{flag} does nothing with --encoder: leave one of them out")
        if not args.images:
            raise UserError("--encoder needs --images: pictures whose features to show")
    elif args.size:
        raise UserError("--size does nothing without --encoder: leave it out")
    elif args.images and len(args.images) > 1:
        raise UserError("--images: give one picture, or with --encoder any number")
    if args.images and args.guidance is not None:
        raise UserError("--guidance does nothing with --images: leave one of them out")
    for name, default in (("class_", "0"), ("guidance", 4.0), ("size", 256)):
        if getattr(args, name) is None:
            setattr(args, name, default)


def main():
    """Run the probe that the first argument names."""
    args = parse_args()
    device = runs.setup()
    if runs.world_size() > 1:
        raise UserError("probe.py runs as one process: start it without torchrun")
    written = Path(args.out, args.probe)
    ours = "settings" in files.read_json(f"{written}.json")
    foreign = [path for path in (f"{written}.json", f"{written}.png") if os.path.exists(path) and not ours]
    if foreign:
        raise UserError(f"{foreign[0]} is there and not of this program: give another --out")
    runs.say_start(device, getattr(args, "precision", "fp32"), args.probe, f"writes {args.out}/")
    PROBES[args.probe](args, device)


if __name__ == "__main__":
    runs.run_main(main)
