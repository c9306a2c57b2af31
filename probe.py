"""Every number about features: what frozen features know, how a latent space is laid out (paper, 3.2, 4.3).

    python probe.py classify --data imagenet --ae runs/ae/last.pt       # linear head: top-1, top-5
    python probe.py segment --data ADEChallengeData2016 --features latent              # FPN head: mIoU, mAcc
    python probe.py depth --data nyu/official_splits                    # FPN head: RMSE, A.Rel
    python probe.py space --data imagenet/val                           # separability and t-SNE (figure 4a)
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
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import demo
import figures
import sample
import svg

SPACES = ("encoder", "residual", "latent", "pixels")


# -- Frozen features ---------------------------------------------------------------------------------------

def load_features(args, device):
    """A function (images [B, 3, H, W], space) -> float map [B, C, h, w], the spaces it has, and its file.

    --encoder is a frozen encoder alone, --ae an autoencoder: its encoder's channels, its aligned residual, or
    both; pixels are the picture's own, one token of 3 * ratio * ratio channels for each patch.
    """
    if args.encoder:
        path, model = args.encoder, svg.load_encoder(svg.fetch_weights(args.encoder, args.weights))
        ratio, split, channels = 16 if model.vit.patch == 14 else model.vit.patch, model.dim, model.dim
    else:
        path = args.ae or (sample.DEMO_PT if args.demo else svg.latest_run("ae", demo=False))
        if not path:
            raise svg.UserError("no stage-1 run below runs/: name one by --ae, or an encoder by --encoder")
        model = svg.load_autoencoder(path, weights_dir=args.weights)
        ratio, split, channels = model.ratio, model.feature_channels, model.channels
    known, model = SPACES if channels > split else ("encoder", "pixels"), model.to(device)
    if args.features not in known:
        raise svg.UserError(f"--features {args.features}: {path} has {', '.join(known)} only")
    if args.size % ratio:
        raise svg.UserError(f"--size {args.size}: give a multiple of {ratio}")

    @torch.no_grad()
    def features(images, space):
        if space == "pixels":
            return F.pixel_unshuffle(images, ratio)
        h, w = (n // ratio for n in images.shape[-2:])
        with svg.autocast(device, args.precision):
            tokens = model(images, grid=(h, w)) if args.encoder else model.encode(images)
        tokens = {"encoder": tokens[..., :split], "residual": tokens[..., split:], "latent": tokens}[space]
        return tokens.float().transpose(1, 2).unflatten(2, (h, w))

    return features, known, str(path)


def encode(function, data, blocks, args, device):
    """For each block of indices [function(images), labels], --encode-batch at once, less unreadable ones."""
    parts = [block.split(args.encode_batch) for block in blocks]
    items = [[(i, 0) for i in part.tolist()] for part in itertools.chain(*parts)]
    batches = iter(svg.batches_of(data, items, args.workers))
    for part in parts:
        rows = []
        for x, y, corrupt in itertools.islice(batches, len(part)):
            for i in set(corrupt.tolist()) - {-1}:  # Python shows the same warning only once
                warnings.warn(f"{data.name(i)}: not a readable image, skipped")
            rows.append((function(svg.to_float(x, device))[corrupt < 0], y[corrupt < 0]))
        yield [torch.cat(column).to(device) for column in zip(*rows, strict=True)]


def report(args, numbers, picture=None):
    """Print the numbers (null: not finite), and write them with the settings, and the picture, to --out."""
    numbers = json.loads(json.dumps(numbers), parse_float=lambda v: round(float(v), 4), parse_constant={}.get)
    out = Path(args.out, args.probe)
    print(json.dumps(numbers), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**numbers, "settings": vars(args)}, indent=1, default=str)
    svg.write_atomically(f"{out}.json", lambda f: f.write(text.encode()))
    if picture:
        svg.write_atomically(f"{out}.png", lambda f: picture.save(f, "PNG"))
    print(f"{out}.json" + f" and {out}.png" * bool(picture))


# -- Classification ----------------------------------------------------------------------------------------

def random_resized_crops(images, generator):
    """Crops of 8 to 100% of the area, ratio 3:4 to 4:3, half of them mirrored, at full size: [B, 3, H, W]."""
    n = len(images)
    u = torch.rand(5, n, generator=generator)
    area, ratio = 0.08 + 0.92 * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * u[2] - 1) * (1 - w), (2 * u[3] - 1) * (1 - h)
    zero, mirror = torch.zeros(n), torch.where(u[4] < 0.5, -1, 1)
    theta = torch.stack([torch.stack([w * mirror, zero, x], 1), torch.stack([zero, h, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def classify(args, device):
    """Linear head on the mean of the tokens (paper: AdamW 5e-4, weight decay 1e-2, batch 3072, 30 epochs)."""
    features, _, path = load_features(args, device)
    train, val = (demo.dataset(s, n) if args.demo else svg.open_data(os.path.join(args.data, s), args.size)
                  for s, n in (("train", 3000), ("val", 1000)))
    if train.classes != val.classes:
        raise svg.UserError(f"--data {args.data}: train/ and val/ hold different class folders")
    if args.batch < 2:
        raise svg.UserError(f"--batch {args.batch}: the head's normalisation takes at least 2 images")
    generator, start = torch.Generator().manual_seed(args.seed), time.time()

    def pooled(images):
        return features(images, args.features).mean((2, 3))

    def cropped(images):
        return pooled(random_resized_crops(images, generator))

    cached = args.cache and next(encode(pooled, train, [torch.arange(len(train))], args, device))
    torch.manual_seed(args.seed)
    head = None
    for _ in range(args.epochs):
        blocks = torch.randperm(len(cached[1] if args.cache else train)).split(args.batch)
        fresh = encode(cropped, train, blocks, args, device)
        for x, y in ([column[block] for column in cached] for block in blocks) if args.cache else fresh:
            if head is None:
                norm = nn.BatchNorm1d(x.shape[1], affine=False)  # spaces differ in scale
                head = nn.Sequential(norm, nn.Linear(x.shape[1], len(train.classes))).to(device)
                optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
            if len(x) > 1:  # one left over has no variance
                optimizer.zero_grad()
                F.cross_entropy(head(x), y).backward()
                optimizer.step()
    x, y = next(encode(pooled, val, [torch.arange(len(val))], args, device))
    with torch.no_grad():
        hits = head.eval()(x).topk(min(5, len(train.classes))).indices == y[:, None]
    top1, top5 = (h.float().mean().item() for h in (hits[:, 0], hits.any(1)))
    report(args, {"features": args.features, "of": path, "top1": top1, "top5": top5, "images": len(y),
                  "seconds": round(time.time() - start)})


# -- Segmentation and depth: a pyramid head on the single-scale map ----------------------------------------

class PyramidHead(nn.Module):
    """Map [B, C, h, w] -> [B, out, 4h, 4w]: four scales of the one map, summed from coarse to fine (FPN)."""

    def __init__(self, channels, out, width):
        super().__init__()

        def then(layer):
            return nn.Sequential(layer, nn.GroupNorm(1, width), nn.GELU())

        def up(c):
            return then(nn.ConvTranspose2d(c, width, 2, 2))

        self.norm = nn.BatchNorm2d(channels, affine=False)  # spaces differ in scale
        self.scales = nn.ModuleList([nn.Sequential(up(channels), up(width)), up(channels), nn.Identity(),
                                     nn.MaxPool2d(2, ceil_mode=True)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (width, width, channels, channels))
        self.smooth = nn.ModuleList(then(nn.Conv2d(width, width, 3, padding=1)) for _ in range(4))
        self.head = nn.Conv2d(width, out, 1)

    def forward(self, x):
        x, total, above = self.norm(x), 0, None
        size = [4 * n for n in x.shape[-2:]]
        for i in (3, 2, 1, 0):
            level = self.lateral[i](self.scales[i](x))
            if above is not None:
                level = level + F.interpolate(above, level.shape[-2:], mode="bilinear")
            total, above = total + F.interpolate(self.smooth[i](level), size, mode="bilinear"), level
        return self.head(total)


LAYOUTS = {  # what --data holds
    "classify": "class folders of images, or packed sets, in train/ and val/",
    "space": "class folders of images, or a packed set",
    "segment": "ADE20K's layout: {images,annotations}/{training,validation}/*, 0 = no label, 1 to 150",
    "depth": "NYUv2's layout: {train,test}/<scene>/rgb_N.jpg with sync_depth_N.png in 16-bit millimetres",
}


def list_pairs(task, root):
    """[training, test]: pairs (image, label) of files in a published layout; a UserError describes it."""
    sets = []
    for split in ("images/training", "images/validation") if task == "segment" else ("train", "test"):
        where, labels = Path(root, split), Path(root, split.replace("images", "annotations"))
        images = [Path(f) for f in svg.list_images(where)]
        pairs = ([(f, labels / f.relative_to(where).with_suffix(".png")) for f in images]
                 if task == "segment" else
                 [(f, f.with_name(f"sync_depth{f.stem[3:]}.png")) for f in images if f.stem[:3] == "rgb"])
        if not pairs:
            raise svg.UserError(f"--data {root}: no images for '{split}'; expected {LAYOUTS[task]}")
        for _, label in pairs:
            read_label(label, task, lambda file: file.size)  # its header alone
        sets.append(pairs)
    return sets


def read_label(path, task, read=np.asarray):
    """read(the opened file); UserError names one that is missing or damaged."""
    try:
        with Image.open(path) as file:
            return read(file)
    except Exception as e:  # as in svg.open_rgb
        raise svg.UserError(f"{path}: not a readable label ({svg.brief(e)}); expected {LAYOUTS[task]}") from e


def read_pair(pair, task):
    """The image and its target [H, W]: class numbers or metres, 0 = unknown."""
    image, target = pair
    if isinstance(image, np.ndarray):  # the demo's
        return Image.fromarray(image), target
    image, label = svg.open_rgb(image), read_label(target, task).astype(np.int32)
    if label.ndim != 2 or label.shape != image.size[::-1] or (task == "segment" and label.max() > 150):
        raise svg.UserError(f"{target}: not a label of {pair[0]}; expected {LAYOUTS[task]}")
    return image, label if task == "segment" else (label / 1000).astype(np.float32)


def random_crops(pairs, args, numbers):
    """Scaled, mirrored crops (uint8 [B, size, size, 3], targets), each a function of (seed, its number).

    Or, as text, what is wrong with a file: an exception that leaves a worker has a trace for its message.
    """
    crops = []
    for number in numbers:
        rng = np.random.default_rng((args.seed, number))
        try:
            image, target = read_pair(pairs[rng.integers(len(pairs))], args.probe)
        except svg.UserError as e:
            return str(e)
        low = 1 if args.probe == "depth" or args.demo else 0.5  # scaling would belie the depth
        factor = args.size * rng.uniform(low, 1 / low) / min(image.size)
        size = [round(n * factor) for n in image.size]
        y, x = (int(rng.integers(max(0, n - args.size) + 1)) for n in size[::-1])
        box, step = (x, y, x + args.size, y + args.size), -1 if rng.random() < 0.5 else 1
        ways = (image, Image.Resampling.BILINEAR), (Image.fromarray(target), Image.Resampling.NEAREST)
        # Beyond the picture crop() fills in 0, which is unknown.
        crops.append([np.array(part.resize(size, way).crop(box))[:, ::step] for part, way in ways])
    return [torch.from_numpy(np.stack(parts)) for parts in zip(*crops, strict=True)]


def sliding(predict, image, size):
    """predict() of windows of `size` at a stride of 2/3 of it, averaged in overlaps: [1, out, H, W]."""
    stride, total, count = size * 2 // 3, 0, 0
    ys, xs = ([min(i, n - size) for i in range(0, n - size + stride, stride)] for n in image.shape[-2:])
    for y, x in itertools.product(ys, xs):
        window = predict(image[..., y:y + size, x:x + size])
        around = (x, image.shape[-1] - x - size, y, image.shape[-2] - y - size)
        total, count = total + F.pad(window, around), count + F.pad(torch.ones_like(window), around)
    return total / count


def dense_loss(task, out, target):
    """Cross-entropy; of log depth the scale-invariant error (Eigen et al.), with 0.15 of the scale's own."""
    if task == "segment":
        return F.cross_entropy(out, target.long() - 1, ignore_index=-1)
    known = target > 0
    d = out.squeeze(1)[known] - target[known].log()
    return (d.square().mean() - 0.85 * d.mean().square()).clamp(min=1e-8).sqrt()


def learning_rate(step, args, steps):
    """Polynomial decay of power 0.9 from --lr to 1e-6, and before it a linear rise for --warmup steps."""
    return (1e-6 + (args.lr - 1e-6) * (1 - step / steps) ** 0.9) * min(1, (step + 1) / max(1, args.warmup))


def dense(args, device):
    """Train a pyramid head on frozen maps and measure it by sliding window."""
    features, _, path = load_features(args, device)
    segment = args.probe == "segment"
    train, val = ([demo.scenes(args.probe, s) for s in ("train", "val")] if args.demo else
                  list_pairs(args.probe, args.data))
    val = [p for p in val if read_pair(p, args.probe)[1].any()]  # so a bad file shows now, not after training
    if not val or not any(read_pair(p, args.probe)[1].any() for p in train):
        raise svg.UserError(f"--data {args.data}: no {'training' if val else 'test'} target has known pixels")
    outputs = 1 if not segment else 1 + len(demo.CLASSES) if args.demo else 150
    steps = args.steps if segment else max(1, args.epochs * len(train) // args.batch)
    torch.manual_seed(args.seed)
    channels = features(torch.zeros(1, 3, args.size, args.size, device=device), args.features).shape[1]
    head = PyramidHead(channels, outputs, args.width).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
    crops = torch.utils.data.DataLoader(range(steps * args.batch), args.batch, num_workers=args.workers,
                                        collate_fn=functools.partial(random_crops, train, args))

    def predict(images):
        return F.interpolate(head(features(images, args.features)), images.shape[-2:], mode="bilinear")

    start = time.time()
    for step, batch in enumerate(crops):
        if isinstance(batch, str):
            raise svg.UserError(batch)
        images, target = batch
        if not target.any():  # nothing known: the mean over no pixel is NaN
            continue
        optimizer.param_groups[0]["lr"] = learning_rate(step, args, steps)
        loss = dense_loss(args.probe, predict(svg.to_float(images, device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.log_every == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)

    head.eval()
    confusion, errors, shown = np.zeros((outputs, outputs), np.int64), [], []
    for pair in val:
        image, target = read_pair(pair, args.probe)
        size = [max(args.size, round(n * args.size / min(image.size))) for n in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        x = svg.to_float(torch.from_numpy(np.array(image))[None], device)
        with torch.no_grad():
            out = sliding(predict, x, args.size)
            if not segment:
                out = (out + sliding(predict, x.flip(-1), args.size).flip(-1)) / 2
            out = F.interpolate(out, target.shape, mode="bilinear")[0].cpu()
        answer = (1 + out.argmax(0) if segment else out[0].exp().clamp(1e-3, 10)).numpy()
        a, b = answer[target > 0], target[target > 0]
        if segment:
            pairs = np.bincount(outputs * (b - 1) + a - 1, minlength=outputs ** 2)
            confusion += pairs.reshape(outputs, outputs)  # [truth, answer]
        else:
            errors.append((np.sqrt(((a - b) ** 2).mean()), (np.abs(a - b) / b).mean()))
        shown = [*shown, (np.asarray(image), target, answer)][:8]
    if segment:
        right, truth = np.diag(confusion), confusion.sum(1)
        union = truth + confusion.sum(0) - right
        numbers = {"mIoU": (right[union > 0] / union[union > 0]).mean(),
                   "mAcc": (right[truth > 0] / truth[truth > 0]).mean()}
    else:
        numbers = dict(zip(("RMSE_m", "A.Rel"), map(float, np.mean(errors, 0)), strict=True))
    report(args, {"features": args.features, "of": path, **numbers, "images": len(val),
                  "seconds": round(time.time() - start)}, figures.dense_picture(args, shown))


# -- How separable a latent space is (figure 4a) -----------------------------------------------------------

def separability(x, labels, seed):
    """Accuracy of logistic regression and of the nearest neighbour on the held-out half of each class of
    x [n, d], and the ratio of between-class to within-class scatter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort()]
    fit, test = order[::2], order[1::2]
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
    return {"linear": (linear == labels[test]).double().mean().item(),
            "1-NN": (nearest == labels[test]).double().mean().item(),
            "between/within": ((means - x.mean(0)).square().sum() / (x - means).square().sum()).item()}


def space(args, device):
    """Separability of each space: all tokens of an image together, on the first 64 principal axes."""
    features, known, path = load_features(args, device)
    data = demo.dataset("val") if args.demo else svg.open_data(args.data, args.size)
    count = min(args.classes, len(data.classes))
    classes = torch.linspace(0, len(data.classes) - 1, count).round().long()
    chosen = [(torch.as_tensor(data.labels) == c).nonzero()[:args.images // count, 0] for c in classes]
    least = min(map(len, chosen))
    if count < 2 or least < 4:
        raise svg.UserError(f"--images {args.images}, --classes {args.classes}: too few: {count} classes, "
                            f"one of {least} images; 2 of 4 images each are the least")
    numbers, panels = {}, []
    for name in known:
        def flat(images, name=name):
            return features(images, name).flatten(1).half()  # a thousand 256-pixel latents take 200 MB

        x, y = (v.cpu() for v in next(encode(flat, data, [torch.cat(chosen)], args, device)))
        x, y = figures.principal(x.float(), 64).float(), torch.searchsorted(classes, y)
        some = np.linspace(0, len(x), min(len(x), 500), endpoint=False).astype(int)
        numbers[name] = separability(x, y, args.seed)
        panels.append((name, numbers[name], figures.tsne(x[some], seed=args.seed).numpy()))
    report(args, {"of": path, "images": len(y), "classes": count, "chance": 1 / count, **numbers},
           figures.space_picture(panels, y[some].numpy(), [data.classes[c] for c in classes]))


# -- Mean velocity fields of two classes, entangled and separated (figure 4b) ------------------------------

def toy(args, device):
    """Two classes on six blobs: the error of 1, 5, 25 Euler steps against 1000, on exact mean velocities.

    Entangled and separated have the same data and other labels; the error is the mean distance of the ends.
    """
    n, numbers, panels = 2000, {}, []
    noise, y = svg.sample_noise(args.seed, range(n), (1, 2)), torch.arange(n) % 2
    for kind, split in figures.LAYOUT.items():
        blobs = figures.BLOBS[torch.tensor(split)]  # [class, 3, 2]

        def velocity(x, t, y, blobs=blobs):
            return figures.mean_velocity(x, t, blobs[y])

        velocity.num_classes = 2
        ends = {steps: svg.euler_sample(velocity, noise, y, steps, shift=1.0) for steps in (1, 5, 25, 1000)}
        numbers[kind] = {f"error_{s}": (ends[s] - ends[1000]).norm(dim=2).mean().item() for s in (1, 5, 25)}
        panels.append((kind, velocity, ends[5][:, 0], numbers[kind]))
    report(args, numbers, figures.toy_picture(panels, y))


# -- An encoder that knows nothing ------------------------------------------------------------------------

def pixels(args, device):
    """Write an encoder without semantics, for --encoder: a fixed rotation of the pixels of each patch.

    The same transformer on its latents shows what the encoder's knowledge is worth (paper, section 3.1).
    """
    p, d = args.patch, args.channels
    if 3 * p * p > d:
        raise svg.UserError(f"--channels {d}: a --patch {p} has {3 * p * p} numbers, give at least as many")
    vit = {"patch": p, "dim": d, "depth": 0, "heads": 1, "grid": 1, "cls": False, "imagenet": False}
    rotation = torch.linalg.qr(
        torch.randn(d, 3 * p * p, generator=torch.Generator().manual_seed(args.seed)))[0]
    weights = {"patch_embed.proj.weight": rotation.reshape(d, 3, p, p),
               "patch_embed.proj.bias": torch.zeros(d), "pos_embed": torch.zeros(1, 1, d)}
    path = Path(args.out, "pixels.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    svg.save_checkpoint(path, {"encoder": {"name": f"pixels{p}", "vit": vit, "model": weights}})
    print(path)


# -- Principal components of hidden states and features (figures 10, 11) -----------------------------------

def pca(args, device):
    """Hidden states of some layers at some t for an image or a sample; with --encoder, features of images."""
    photos = [svg.open_rgb(f) for f in args.images or ()]
    if args.encoder:
        if not photos:
            raise svg.UserError("--encoder needs --images: pictures whose features to show")
        features, _, path = load_features(args, device)
        photos = np.stack([svg.crop(p, args.size) for p in photos])
        maps = features(svg.to_float(torch.from_numpy(photos), device), "encoder").cpu()
        return report(args, {"of": path, "images": len(photos)},
                      figures.feature_picture(Path(path).name, photos, maps))

    if len(photos) > 1:
        raise svg.UserError("--images: give one picture, or with --encoder any number")
    sit, ae, path = sample.find_models(args, device, encoder=None)
    number = sample.class_numbers([args.class_], sit.meta.get("classes", []), sit.num_classes)
    y, noise = torch.tensor(number), svg.sample_noise(args.seed, [0], (sit.grid ** 2, sit.channels))
    y, noise, times = y.to(device), noise.to(device), svg.euler_times(25, 0.4)
    chosen = [times[i] for i in sorted({round(i) for i in np.linspace(0, 25, args.columns)})]
    layers = sorted({round(i) for i in np.linspace(0, len(sit.blocks) - 1, args.rows)})
    states, hidden = {0.0: noise}, []
    with torch.no_grad(), svg.autocast(device, args.precision):
        if photos:
            x = svg.to_float(torch.from_numpy(svg.crop(photos[0], ae.image_size))[None], device)
            z = ae.normalize(ae.encode(x)).float()
            states = {t: (1 - t) * noise + t * z for t in chosen}
        else:
            svg.euler_sample(sit, noise, y, times, args.guidance, after=states.setdefault)
        for i in layers:
            sit.blocks[i].register_forward_hook(lambda _, inputs, out: hidden.append(out.float().cpu()))
        x_t = torch.cat([states[t] for t in chosen])
        sit(x_t, torch.tensor(chosen, dtype=torch.float32, device=device), y.expand(len(x_t)))
        latents = ae.denormalize(x_t)
        decoded, final = svg.to_uint8(ae.decode(latents)), latents[-1:, :, :ae.feature_channels].cpu()
    what = args.images[0] if photos else f"a sample of class {args.class_}, seed {args.seed}"
    picture = figures.hidden_picture(f"{Path(path).name}, {what}", chosen, decoded, final,
                                     {f"layer {i + 1}": out for i, out in zip(layers, hidden, strict=True)})
    report(args, {"of": str(path), "picture": what, "layers": [i + 1 for i in layers]}, picture)


# -- The program -------------------------------------------------------------------------------------------

PROBES = {"classify": classify, "segment": dense, "depth": dense, "space": space, "pca": pca, "toy": toy,
          "pixels": pixels}
PAPER = {  # each probe's defaults: the paper's
    "classify": {"data": "data/imagenet", "lr": 5e-4, "wd": 1e-2, "batch": 3072, "epochs": 30},
    "segment": {"data": "data/ADEChallengeData2016", "size": 512, "lr": 8e-5, "wd": 1e-3, "batch": 16,
                "warmup": 1500, "steps": 8000},
    "depth": {"data": "data/nyu", "size": 480, "lr": 5e-4, "wd": 1e-2, "batch": 24, "epochs": 25},
    "space": {"data": "data/imagenet/val"},
}
SMALL = {  # with --demo
    "classify": {"batch": 500, "lr": 5e-3, "cache": True}, "space": {"images": 500},
    "segment": {"lr": 2e-3, "steps": 300, "warmup": 30, "width": 64},
    "depth": {"lr": 2e-3, "epochs": 5, "width": 64},
}
IDLE = {"--demo": "--data", "--images": "--guidance",  # flags that do nothing beside another
        "--encoder": "--ae --any-ae --ckpt --latent-stats --class --guidance --rows --columns"}


def parse_args(what):
    """The command line of the probe `what`, with the paper's or the demo's defaults."""
    p = svg.Parser(PROBES[what].__doc__)
    p.prog, p.demo = f"probe.py {what}", {"size": 32, "workers": 0, **SMALL.get(what, {})}

    def add(probes, flag, **settings):
        if what in probes.split():
            p.add_argument(flag, **settings)

    heads = "classify segment depth"
    sets, models = f"{heads} space", f"{heads} space pca"
    p.add_argument("--out", default="probes", help="folder for the numbers and the picture")
    p.add_argument("--seed", type=svg.not_negative, default=0, help="of weights, order, crops and noise")
    if what == "pca":
        sample.add_model_flags(p.add_argument)
    add(sets, "--demo", action="store_true", help="built-in data and model, tiny sizes, no download")
    add(sets, "--ae", help="autoencoder checkpoint (default: the newest run; demo.pt with --demo)")
    add(sets, "--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add(models, "--encoder", help="frozen encoder alone: a file in the weights folder, or a path")
    add(models, "--size", type=svg.positive, help="pixels per side of a crop")
    add(models, "--precision", choices=("fp32", "bf16"), help="of the frozen models' arithmetic",
        default="bf16" if torch.cuda.is_available() else "fp32")
    add(sets, "--data", help=LAYOUTS.get(what))
    add(sets, "--workers", type=svg.not_negative, default=8, help="data loading processes")
    add("classify space", "--encode-batch", type=svg.positive, default=64, help="images encoded at a time")
    add(heads, "--features", choices=SPACES, help="which frozen features the head sees")
    add(heads, "--lr", type=svg.number(above=0), help="AdamW's learning rate, at first")
    add(heads, "--wd", type=svg.number(), help="weight decay")
    add(heads, "--batch", type=svg.positive, help="images per step")
    add("classify depth", "--epochs", type=svg.positive, help="passes over the training images")
    add("classify", "--cache", action="store_true", help="encode each image once, uncropped, for all epochs")
    add("segment", "--steps", type=svg.positive, help="training steps")
    add("segment depth", "--width", type=svg.positive, default=256, help="channels of the head")
    add("segment depth", "--warmup", type=svg.not_negative, default=0, help="steps of rising learning rate")
    add("segment depth", "--log-every", type=svg.positive, default=50, help="steps between progress lines")
    add("space", "--images", type=svg.positive, default=1000, help="images in all, shared by the classes")
    add("space", "--classes", type=svg.positive, default=20, help="of the data's, evenly spaced among them")
    add("pca", "--images", nargs="+", metavar="FILE", help="pictures (default: a sample of --class)")
    add("pixels", "--patch", type=svg.positive, default=8, help="pixels per side of a patch")
    add("pixels", "--channels", type=svg.positive, default=392, help="of a token, 3 * patch^2 or more")
    add("pca", "--class", dest="class_", default="0", help="number or name of the class it is told")
    add("pca", "--guidance", type=svg.number(), default=4.0, help="guidance scale of the sample")
    add("pca", "--rows", type=svg.positive, default=4, help="layers shown")
    add("pca", "--columns", type=svg.positive, default=6, help="times shown")
    p.set_defaults(**{"probe": what, "features": "encoder", "size": 256, **PAPER.get(what, {})})
    fixed = {"--demo": "--data --size"} if what in ("classify", "space") else {}  # the demo's 32 pixels
    svg.refuse_idle({**IDLE, **fixed}, {"--size": "--encoder"} if what == "pca" else None)
    return p.parse_args(sys.argv[2:])


def main():
    """Run the probe that the first argument names."""
    what = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if what in ("-h", "--help"):
        return print(__doc__)
    if what not in PROBES:
        raise svg.UserError(f"probe.py {what}: give one of {', '.join(PROBES)}")
    args, device = parse_args(what), svg.setup()
    if svg.world_size() > 1:
        raise svg.UserError("probe.py runs as one process: start it without torchrun")
    place = next(p for p in Path(args.out, "file").absolute().parents if os.path.lexists(p))
    if not (place.is_dir() and os.access(place, os.W_OK)):  # the folder is made when there is what to write
        raise svg.UserError(f"--out {args.out}: {place} is not a folder that can be written")
    PROBES[what](args, device)


if __name__ == "__main__":
    svg.run_main(main)
