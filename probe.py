"""Every number about features: what frozen features know, how a latent space is laid out (paper, 3.2, 4.3).

    python probe.py classify --data imagenet --ae runs/ae/last.pt       # linear head: top-1, top-5
    python probe.py segment --data ADEChallengeData2016 --features latent              # FPN head: mIoU, mAcc
    python probe.py depth --data nyu/official_splits                    # FPN head: RMSE, A.Rel
    python probe.py space --data imagenet/val                           # separability and t-SNE (figure 4a)
    python probe.py pca --class 207                                     # hidden states (figures 10, 11)
    python probe.py toy                                                 # mean velocity fields (figure 4b)

Each takes --help, and --demo for a run of a minute on a CPU without download. --features chooses encoder,
residual, latent (both) or pixels. Writes numbers and pictures as probes/<probe>.json and .png.
"""
import json
import math
import os
import sys
import time
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
    """A function (images [B, 3, H, W], space) -> float map [B, C, h, w], and what it was loaded from.

    By --encoder FILE a frozen encoder alone, else an autoencoder: its encoder's channels, its aligned residual, or
    both; pixels are the picture's own, one token of 3 * patch * patch channels for each patch.
    """
    if args.encoder:
        path, model = args.encoder, svg.load_encoder(svg.fetch_weights(args.encoder, args.weights)).to(device)
        ratio, known = 16 if model.vit.patch == 14 else model.vit.patch, ("encoder", "pixels")
    else:
        path = args.ae or (sample.DEMO_PT if args.demo else svg.latest_run("ae", demo=False))
        if not path:
            raise svg.UserError("no stage-1 run below runs/: name one by --ae, or an encoder by --encoder, or try "
                                "--demo")
        model = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
        ratio, known = model.ratio, SPACES if model.config["residual_channels"] else ("encoder", "pixels")
    if getattr(args, "features", "pixels") not in known:
        raise svg.UserError(f"--features {args.features}: {path} has {', '.join(known)} only")

    @torch.no_grad()
    def features(images, space):
        h, w = (n // ratio for n in images.shape[-2:])
        if space == "pixels":
            return F.pixel_unshuffle(images, ratio)
        with svg.autocast(device, args.precision):
            tokens = model(images, grid=(h, w)) if args.encoder else model.encode(images)
        split = tokens.shape[-1] if args.encoder else model.feature_channels
        tokens = {"encoder": tokens[..., :split], "residual": tokens[..., split:], "latent": tokens}[space]
        return tokens.float().transpose(1, 2).unflatten(2, (h, w))

    return features, known, str(path)


def in_order(dataset, indices, batch, workers):
    """Batches (images, labels, corrupt) of the chosen items of a dataset, in their order."""
    chunks = [[(int(i), 0) for i in indices[j:j + batch]] for j in range(0, len(indices), batch)]
    return torch.utils.data.DataLoader(dataset, batch_sampler=chunks, num_workers=workers)


def report(args, what, numbers, picture=None):
    """Print the numbers, and write them with the settings, and the picture, below --out."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{what}.json").write_text(json.dumps({**numbers, "settings": vars(args)}, indent=1, default=str))
    except OSError as e:
        raise svg.UserError(f"--out {out}: could not be written ({e.strerror})") from e
    if picture:
        picture.save(out / f"{what}.png")
    print(json.dumps(numbers), f"\n{out / what}.json" + f" and {out / what}.png" * bool(picture))


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


def fit_linear(features, labels, classes, epochs, batch, lr, wd, seed):
    """A linear head on standardised features [n, C], trained by AdamW; or on batches (x, y) of features(epoch)."""
    torch.manual_seed(seed)
    draw = features if callable(features) else lambda epoch: (
        (features[i], labels[i]) for i in torch.randperm(len(features)).split(batch))
    head = optimizer = None
    for epoch in range(epochs):
        for x, y in draw(epoch):
            if head is None:
                norm = nn.BatchNorm1d(x.shape[1], affine=False)  # spaces differ in scale
                head = nn.Sequential(norm, nn.Linear(x.shape[1], classes)).to(x.device)
                optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=wd)
            if len(x) > 1:  # a batch of one has no variance
                optimizer.zero_grad()
                F.cross_entropy(head(x), y).backward()
                optimizer.step()
    return head.eval()


def classify(args, device):
    """Linear probe on the mean of the tokens (paper: AdamW 5e-4, weight decay 1e-2, batch 3072, 30 epochs)."""
    features, _, path = load_features(args, device)
    train, val = (demo.dataset(s, n) if args.demo else svg.open_data(os.path.join(args.data, s), args.size)
                  for s, n in (("train", 3000), ("val", 1000)))
    if train.classes != val.classes:
        raise svg.UserError(f"--data {args.data}: train/ and val/ hold different class folders")
    generator = torch.Generator().manual_seed(args.seed)

    def encode(data, augment, order):
        for images, y, _ in in_order(data, order, args.encode_batch, args.workers):
            images = svg.to_float(images, device)
            images = random_resized_crops(images, generator) if augment else images
            yield features(images, args.features).mean((2, 3)), y.to(device)

    def draw(epoch):
        rows = []
        for row in encode(train, True, np.random.default_rng((args.seed, epoch)).permutation(len(train))):
            rows.append(row)
            if sum(len(y) for _, y in rows) >= args.batch:
                yield tuple(map(torch.cat, zip(*rows, strict=True)))
                rows = []
        if rows:
            yield tuple(map(torch.cat, zip(*rows, strict=True)))

    start, x, y = time.time(), draw, None
    if args.cache:
        x, y = map(torch.cat, zip(*encode(train, False, np.arange(len(train))), strict=True))
    head = fit_linear(x, y, len(train.classes), args.epochs, args.batch, args.lr, args.wd, args.seed)
    x, y = map(torch.cat, zip(*encode(val, False, np.arange(len(val))), strict=True))
    with torch.no_grad():
        hits = head(x).topk(min(5, len(train.classes))).indices == y[:, None]
    top1, top5 = (round(h.float().mean().item(), 4) for h in (hits[:, 0], hits.any(1)))
    report(args, "classify", {"features": args.features, "of": path, "top1": top1, "top5": top5, "images": len(y),
                              "seconds": round(time.time() - start)})


# -- Segmentation and depth: a pyramid head on the single-scale map ----------------------------------------

class PyramidHead(nn.Module):
    """Map [B, C, h, w] -> [B, out, 4h, 4w]: four scales made of the one map, summed from coarse to fine (FPN)."""

    def __init__(self, channels, out, width):
        super().__init__()

        def then(layer):
            return [layer, nn.GroupNorm(1, width), nn.GELU()]

        def up(c):
            return then(nn.ConvTranspose2d(c, width, 2, 2))

        self.scales = nn.ModuleList([nn.Sequential(*up(channels), *up(width)), nn.Sequential(*up(channels)),
                                     nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.norm = nn.BatchNorm2d(channels, affine=False)  # spaces differ in scale
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (width, width, channels, channels))
        self.smooth = nn.ModuleList(nn.Sequential(*then(nn.Conv2d(width, width, 3, padding=1))) for _ in range(4))
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


def list_pairs(root, layout, splits, find):
    """[training, test], each pairs (image, label) of files in a published layout; UserError that describes it."""
    sets = []
    for split in splits:
        pairs = find(root, split)
        lacking = [label for _, label in pairs if not os.path.exists(label)]
        if not pairs or lacking:
            what = f"{lacking[0]} is missing" if lacking else f"no images for '{split}'"
            raise svg.UserError(f"--data {root}: {what}; expected {layout}")
        sets.append(pairs)
    return sets


def ade20k_pairs(root, split):
    images = Path(root, "images", split)
    return [(f, str(Path(root, "annotations", split, Path(f).relative_to(images)).with_suffix(".png")))
            for f in svg.list_images(images)]


def nyu_pairs(root, split):
    files = [Path(f) for f in svg.list_images(os.path.join(root, split))]
    return [(str(f), str(f.with_name("sync_depth" + f.stem[3:] + ".png"))) for f in files if f.name.startswith("rgb")]


LAYOUTS = {
    "segment": ("ADE20K's layout: {images,annotations}/{training,validation}/*, 0 = no label, 1 to 150",
                ("training", "validation"), ade20k_pairs),
    "depth": ("NYUv2's layout: {train,test}/<scene>/rgb_N.jpg with sync_depth_N.png in 16-bit millimetres",
              ("train", "test"), nyu_pairs),
}


def read_pair(pair, task):
    """The image and its target [H, W]: class numbers, -1 = none; or metres, 0 = unknown."""
    image, target = pair
    if isinstance(image, np.ndarray):  # the demo's
        return Image.fromarray(image), target
    image = svg.open_rgb(image)
    try:
        with Image.open(target) as f:
            label = np.asarray(f).astype(np.int64)
    except (OSError, ValueError) as e:
        raise svg.UserError(f"{target}: not a readable label ({svg.brief(e)})") from e
    if label.ndim != 2 or label.shape != image.size[::-1] or (task == "segment" and label.max() > 150):
        raise svg.UserError(f"{target}: not a label of {pair[0]} in {LAYOUTS[task][0]}")
    return image, label - 1 if task == "segment" else (label / 1000).astype(np.float32)


class Crops(torch.utils.data.Dataset):
    """Item i: a random scaled, mirrored crop (uint8 [size, size, 3], target): a function of (seed, i)."""

    def __init__(self, pairs, task, args, length):
        self.pairs, self.task, self.size, self.seed, self.length = pairs, task, args.size, args.seed, length
        self.scale = (1, 1) if task == "depth" or args.demo else (0.5, 2)  # scaling would belie the depth

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        image, target = read_pair(self.pairs[rng.integers(len(self.pairs))], self.task)
        factor = self.size * rng.uniform(*self.scale) / min(image.size)
        w, h = (round(n * factor) for n in image.size)
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((h, image.height), (w, image.width)))
        image, target = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)), target[rows][:, columns]
        lack = [(0, max(0, self.size - n)) for n in (h, w)]
        image = np.pad(image, (*lack, (0, 0)))
        target = np.pad(target, lack, constant_values=-1 if self.task == "segment" else 0)
        y, x = (rng.integers(0, n - self.size + 1) for n in target.shape)
        cut = np.s_[y:y + self.size, x:x + self.size]
        step = -1 if rng.random() < 0.5 else 1
        return image[cut][:, ::step].copy(), target[cut][:, ::step].copy()


def sliding(predict, image, size):
    """predict() of windows of `size` at a stride of 2/3 of it, averaged where they overlap: [1, out, H, W]."""
    stride, total, count = size * 2 // 3, 0, 0
    ys, xs = ([min(i, n - size) for i in range(0, n - size + stride, stride)] for n in image.shape[-2:])
    for y in ys:
        for x in xs:
            window = predict(image[..., y:y + size, x:x + size])
            around = (x, image.shape[-1] - x - size, y, image.shape[-2] - y - size)
            total, count = total + F.pad(window, around), count + F.pad(torch.ones_like(window), around)
    return total / count


def depth_loss(out, target):
    """Scale-invariant error of log depth (Eigen et al.), with 0.15 of the scale's own error kept."""
    known = target > 0
    d = out.squeeze(1)[known] - target[known].log()
    return (d.square().mean() - 0.85 * d.mean().square()).clamp(min=1e-8).sqrt()


def dense(task, args, device):
    """Train a pyramid head on frozen maps and measure it by sliding window."""
    features, _, path = load_features(args, device)
    train, val = ((demo.scenes(task, s) for s in ("train", "val")) if args.demo else
                  list_pairs(args.data, *LAYOUTS[task]))
    for pair in (train[0], val[0]):
        read_pair(pair, task)  # so that a wrong label is refused here, not by a worker's stack trace
    outputs = 1 if task == "depth" else 1 + len(demo.CLASSES) if args.demo else 150
    steps = args.steps if task == "segment" else max(1, args.epochs * len(train) // args.batch)
    torch.manual_seed(args.seed)
    channels = features(torch.zeros(1, 3, args.size, args.size, device=device), args.features).shape[1]
    head = PyramidHead(channels, outputs, args.width).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
    crops = Crops(train, task, args, steps * args.batch)
    crops = torch.utils.data.DataLoader(crops, args.batch, num_workers=args.workers)

    def predict(images):
        return F.interpolate(head(features(images, args.features)), images.shape[-2:], mode="bilinear")

    start = time.time()
    for step, (images, target) in enumerate(crops):
        lr = 1e-6 + (args.lr - 1e-6) * (1 - step / steps) ** 0.9  # polynomial
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / max(1, args.warmup))
        out, target = predict(svg.to_float(images, device)), target.to(device)
        loss = depth_loss(out, target) if task == "depth" else F.cross_entropy(out, target, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.log_every == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)

    head.eval()
    confusion, errors, shown = np.zeros((outputs, outputs), np.int64), [], []
    for pair in val:
        image, target = read_pair(pair, task)
        scale = args.size / min(image.size)
        image = image.resize([max(args.size, round(n * scale)) for n in image.size], Image.Resampling.BILINEAR)
        x = svg.to_float(torch.from_numpy(np.array(image))[None], device)
        with torch.no_grad():
            out = sliding(predict, x, args.size)
            if task == "depth":
                out = (out + sliding(predict, x.flip(-1), args.size).flip(-1)) / 2
            out = F.interpolate(out, target.shape, mode="bilinear")[0].cpu()
        if task == "segment":
            answer, known = out.argmax(0).numpy(), target >= 0
            pairs = outputs * target[known] + answer[known]
            confusion += np.bincount(pairs, minlength=outputs ** 2).reshape(outputs, outputs)
        else:
            answer, known = out[0].exp().clamp(1e-3, 10).numpy(), target > 0
            d = answer[known] - target[known]
            errors.append((np.sqrt((d ** 2).mean()), (np.abs(d) / target[known]).mean()))
        if len(shown) < 8:
            shown.append((np.asarray(image), target, answer))
    if task == "segment":
        right, truth, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        occurs = truth + said > 0
        numbers = {"mIoU": (right / np.maximum(truth + said - right, 1))[occurs].mean(),
                   "mAcc": (right / np.maximum(truth, 1))[truth > 0].mean()}
    else:
        numbers = dict(zip(("RMSE_m", "A.Rel"), np.mean(errors, 0), strict=True))
    numbers = {k: round(float(v), 4) for k, v in numbers.items()}
    report(args, task, {"features": args.features, "of": path, **numbers, "images": len(val),
                        "seconds": round(time.time() - start)}, figures.dense_picture(task, args, shown))


# -- How separable a latent space is (figure 4a) -----------------------------------------------------------

def separability(x, labels, seed):
    """Accuracy of logistic regression and of the nearest neighbour on a held-out half of x [n, d], and the ratio
    of between-class to within-class scatter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, test = order[:len(x) // 2], order[len(x) // 2:]
    head = nn.Linear(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    x = x / x.std()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x[fit]), labels[fit]) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        linear = (head(x[test]).argmax(1) == labels[test]).float().mean().item()
    nearest = (labels[fit][torch.cdist(x[test], x[fit]).argmin(1)] == labels[test]).float().mean().item()
    means = torch.stack([x[labels == c].mean(0) for c in labels])
    ratio = ((means - x.mean(0)).square().sum() / (x - means).square().sum()).item()
    return {"linear": round(linear, 4), "1-NN": round(nearest, 4), "between/within": round(ratio, 4)}


def space(args, device):
    """Separability of each space: all tokens of an image together, on the first 64 principal axes."""
    features, known, path = load_features(args, device)
    data = demo.dataset("val") if args.demo else svg.open_data(args.data, args.size)
    labels = np.array([data[i, 0][1] for i in range(len(data))]) if args.demo else data.labels
    share = max(1, args.images // len(data.classes))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:share] for c in range(len(data.classes))])
    if len(data.classes) < 2 or len(chosen) < 20:
        raise svg.UserError(f"--data {args.data}: {len(chosen)} images of {len(data.classes)} classes: too few")
    parts = {name: [] for name in known}
    for images, _, _ in in_order(data, chosen, args.encode_batch, args.workers):
        images = svg.to_float(images, device)
        for name in known:
            parts[name].append(features(images, name).flatten(1).half().cpu())
    y, numbers, panels = torch.from_numpy(labels[chosen]), {}, []
    for name in known:
        x = figures.principal(torch.cat(parts[name]).float(), 64)
        numbers[name] = separability(x.float(), y, args.seed)
        some = np.linspace(0, len(x), min(len(x), 500), endpoint=False).astype(int)
        panels.append((name, numbers[name], figures.tsne(x[some].float(), seed=args.seed).numpy()))
    numbers = {"of": path, "images": len(y), "chance": round(1 / len(data.classes), 4), **numbers}
    report(args, "space", numbers, figures.space_picture(panels, y[some].numpy(), data.classes))


# -- Mean velocity fields of two classes, entangled and separated (figure 4b) ------------------------------

def toy(args, device):
    """Two classes on six blobs: the error of 1, 5, 25 Euler steps against 1000, on exact mean velocity fields.

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
        errors = {s: (ends[s] - ends[1000]).norm(dim=2).mean().item() for s in (1, 5, 25)}
        numbers[kind] = {f"error_{s}": round(error, 4) for s, error in errors.items()}
        panels.append((kind, velocity, ends[5][:, 0], numbers[kind]))
    report(args, "toy", numbers, figures.toy_picture(panels, y))


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
        tiles = figures.component_colours(maps.flatten(2).transpose(1, 2), maps.shape[2:])
        tiles = np.concatenate([figures.enlarge(x, 160) for x in (photos, tiles)])
        picture = svg.grid_image(tiles, len(photos), title=f"{Path(path).name}: principal components as RGB")
        return report(args, "pca", {"of": path, "images": len(photos)}, picture)

    sit, ae, path = sample.find_models(args, device, encoder=None)
    names = sit.meta.get("classes", [])
    y = torch.tensor(sample.class_numbers([args.class_], names, sit.num_classes), device=device)
    noise = svg.sample_noise(args.seed, [0], (sit.grid ** 2, sit.channels)).to(device)
    times = svg.euler_times(25, 0.4)
    chosen = [times[i] for i in np.linspace(0, 25, args.columns).round().astype(int)]
    with torch.no_grad(), svg.autocast(device, args.precision):
        if photos:
            x = svg.to_float(torch.from_numpy(svg.crop(photos[0], ae.image_size))[None], device)
            z = ae.normalize(ae.encode(x)).float()
            states = {t: (1 - t) * noise + t * z for t in chosen}
        else:
            states = {0.0: noise}

            def record(t, x):
                return states.setdefault(t, x)

            svg.euler_sample(sit, noise, y, times, args.guidance, after=record)
        decoded = svg.to_uint8(torch.cat([ae.decode(ae.denormalize(states[t])) for t in chosen]))
        layers = sorted({round(i) for i in np.linspace(0, len(sit.blocks) - 1, args.rows)})
        hidden = {i: [] for i in layers}
        hooks = [sit.blocks[i].register_forward_hook(lambda m, _, out, i=i: hidden[i].append(
            # What differs between tokens: size and mean change with t much more.
            F.layer_norm((out - out.mean(1, keepdim=True)).float(), out.shape[-1:]).cpu())) for i in layers]
        for t in chosen:
            sit(states[t], torch.full((1,), t, device=device), y)
        for hook in hooks:
            hook.remove()
        final = ae.denormalize(states[chosen[-1]])[..., :ae.feature_channels].cpu()
    shown = np.concatenate([figures.enlarge(decoded, 128),
                            figures.enlarge(figures.component_colours(final, (ae.grid, ae.grid)), 128)])
    tiles, labels = [*shown], [*(f"x_t decoded, t {t:.2f}" for t in chosen), "encoder channels, t 1"]
    for i in layers:
        colours = figures.component_colours(torch.cat(hidden[i]), (sit.grid, sit.grid))
        tiles += [*figures.enlarge(colours, 128), np.full((128, 128, 3), 255, np.uint8)]
        labels += [*(f"layer {i + 1}, t {t:.2f}" for t in chosen), ""]
    what = args.images[0] if photos else f"a sample of class {args.class_}, seed {args.seed}"
    title = f"{Path(path).name}, {what}: principal components of hidden states"
    report(args, "pca", {"of": str(path), "picture": what, "layers": [i + 1 for i in layers]},
           svg.grid_image(np.stack(tiles), len(chosen) + 1, labels, title))


# -- The program -------------------------------------------------------------------------------------------

PAPER = {  # each probe's defaults: the paper's
    "classify": {"data": "data/imagenet", "size": 256, "lr": 5e-4, "wd": 1e-2, "batch": 3072, "epochs": 30},
    "segment": {"data": "data/ADEChallengeData2016", "size": 512, "lr": 8e-5, "wd": 1e-3, "batch": 16, "steps": 8000,
                "warmup": 1500},
    "depth": {"data": "data/nyu", "size": 480, "lr": 5e-4, "wd": 1e-2, "batch": 24, "epochs": 25, "warmup": 0},
    "space": {"data": "data/imagenet/val", "size": 256}, "pca": {"size": 256}, "toy": {},
}
SMALL = {  # with --demo
    "classify": {"size": 32, "batch": 500, "epochs": 30, "lr": 5e-3, "cache": True},
    "segment": {"size": 32, "lr": 2e-3, "steps": 300, "warmup": 30, "width": 64},
    "depth": {"size": 32, "lr": 2e-3, "epochs": 5, "width": 64},
    "space": {"size": 32, "images": 500}, "pca": {"size": 32}, "toy": {},
}


def parse_args(what):
    p = svg.Parser(globals()[what if what in globals() else "dense"].__doc__)
    p.prog, p.demo, paper = f"probe.py {what}", {**SMALL[what], "workers": 0}, PAPER[what]
    add = p.add_argument
    add("--demo", action="store_true", help="built-in data and model, tiny sizes, no download")
    add("--out", default="probes", help="folder for the numbers and the picture")
    add("--seed", type=svg.not_negative, default=0, help="of weights, order, crops and noise")
    if what != "toy":
        add("--encoder", help="frozen encoder alone: a file in the weights folder, or a path")
        add("--ae", help="autoencoder checkpoint (default: the newest run; the shipped one with --demo)")
        add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
        add("--size", type=svg.positive, default=paper["size"], help="pixels per side of a crop")
        add("--precision", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32",
            help="of the frozen models' arithmetic")
    if what in ("classify", "segment", "depth", "space"):
        folders = {"classify": "class folders of images in train/ and val/", "space": "class folders of images"}
        add("--data", default=paper["data"], help=folders.get(what) or LAYOUTS[what][0])
        add("--workers", type=svg.not_negative, default=8, help="data loading processes")
    if what in ("classify", "space"):
        add("--encode-batch", type=svg.positive, default=64, help="images encoded at a time")
    if what in ("classify", "segment", "depth"):
        add("--features", choices=SPACES, default="encoder", help="which frozen features the head sees")
        add("--lr", type=svg.number(above=0), default=paper["lr"], help="AdamW's learning rate, at first")
        add("--wd", type=svg.number(), default=paper["wd"], help="weight decay")
        add("--batch", type=svg.positive, default=paper["batch"], help="images per step")
    if what in ("classify", "depth"):
        add("--epochs", type=svg.positive, default=paper["epochs"], help="passes over the training images")
    if what == "classify":
        add("--cache", action="store_true", help="encode each image once, uncropped, not new crops in every epoch")
    if what in LAYOUTS:
        add("--width", type=svg.positive, default=256, help="channels of the head")
        add("--warmup", type=svg.not_negative, default=paper["warmup"], help="steps of rising learning rate")
        add("--log-every", type=svg.positive, default=50, help="steps between progress lines")
    if what == "segment":
        add("--steps", type=svg.positive, default=paper["steps"], help="training steps")
    if what == "space":
        add("--images", type=svg.positive, default=1000, help="images in all, equally many of each class")
    if what == "pca":
        add("--images", nargs="+", metavar="FILE", help="pictures (default: a sample of --class)")
        add("--ckpt", help="transformer checkpoint (default: the newest run, else demo.pt)")
        add("--any-ae", action="store_true", help="take --ae even if the transformer was not trained on it")
        add("--latent-stats", help="the authors' statistics file: latent mean and std")
        add("--class", dest="class_", default="0", help="class number or name that the transformer is told")
        add("--guidance", type=svg.number(), default=4.0, help="guidance scale of the sample")
        add("--rows", type=svg.positive, default=4, help="layers shown")
        add("--columns", type=svg.positive, default=6, help="times shown")
    return p.parse_args(sys.argv[2:])


def main():
    what = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if what in ("-h", "--help"):
        return print(__doc__)
    if what not in PAPER:
        raise svg.UserError(f"probe.py {what}: give one of {', '.join(PAPER)}")
    args, device = parse_args(what), svg.setup()
    if svg.world_size() > 1:
        raise svg.UserError("probe.py runs as one process: start it without torchrun")
    if what in LAYOUTS:
        dense(what, args, device)
    else:
        globals()[what](args, device)


if __name__ == "__main__":
    svg.run_main(main)
