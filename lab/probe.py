"""Every number about features: what frozen features know, how a latent space is laid out (paper, 3.2, 4.3).

    python -m lab.probe classify --data imagenet --ae runs/ae/last.pt     # linear head: top-1, top-5
    python -m lab.probe segment --data ADEChallengeData2016 --features latent     # FPN head: mIoU, mAcc
    python -m lab.probe depth --data nyu/official_splits                  # FPN head: RMSE, A.Rel
    python -m lab.probe space --data imagenet/val                         # separability, t-SNE (figure 4a)
    python -m lab.probe pca --class 207                                   # hidden states (figures 10, 11)
    python -m lab.probe flow --data imagenet/val --ckpt runs/dit/last.pt  # loss by t, distance by evaluations
    python -m lab.probe features --encoder dinov2_vits14_pretrain.pth --images a.jpg b.jpg
    python -m lab.probe toy                                               # mean velocity fields (figure 4b)

Each takes --help, and all but features and toy take --demo: a run of a minute on a CPU without download.
--features chooses encoder, residual, latent (both) or pixels. Numbers and pictures go to probes/<probe>.json
and .png.
"""
import functools
import itertools
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import svg
from fid import frechet_distance, moments
from lab import dense, maps
from lib import data, files, runs, shapes
from lib.files import UserError
from sample import add_model_flags, class_numbers, evaluations, find_models

# -- Frozen features ---------------------------------------------------------------------------------------

SPACES = ("encoder", "residual", "latent", "pixels")
ENCODE_BATCH = 64  # images at a time


def load_features(args, path=None):
    """Return features(images [B, 3, size, size], space) -> float map [B, C, h, w], its spaces and its file.

    --encoder is a frozen encoder alone. --ae is an autoencoder: its encoder's channels, its aligned residual,
    or both ("latent"); of a VAE all are the encoder's. "pixels" are the picture's own: 3 * ratio * ratio
    channels for each patch. path: one of several files.
    """
    spaces = ("encoder", "pixels")
    if args.encoder:
        path = args.encoder
        model = svg.load_encoder(runs.fetch_weights(path, args.weights)).to(args.device)
        ratio = 16 if model.vit.patch == 14 else model.vit.patch  # pixels per token and side
        width = model.dim
    else:
        path = path or args.ae or runs.latest_run("autoencoder", demo=False)
        if not path:
            raise UserError("no stage-1 run below runs/: name one by --ae, or an encoder by --encoder")
        model = svg.load_autoencoder(path, weights_dir=args.weights).to(args.device)
        ratio = model.ratio
        width = model.feature_channels
        if model.channels > width:
            spaces = SPACES
    if args.size % ratio:
        raise UserError(f"--size {args.size}: give a multiple of {ratio}")
    grid = [args.size // ratio] * 2

    @torch.no_grad()
    def features(images, space):
        if space not in spaces:
            raise UserError(f"--features {space}: not in {path}, only in an SVG autoencoder: give its --ae")
        if space == "pixels":
            return F.pixel_unshuffle(images, ratio)
        with runs.autocast(args.device, args.precision):
            tokens = model(images, grid) if args.encoder else model.encode(images)  # [B, N, C]
        part = {"encoder": tokens[..., :width], "residual": tokens[..., width:], "latent": tokens}[space]
        return part.float().mT.unflatten(2, grid)

    return features, spaces, str(path)


@functools.cache
def warn_once(text):
    """Warn of something once, and not again in each epoch."""
    warnings.warn(text)


def encode(function, dataset, indices, args):
    """Return function(images) and labels of some images; unreadable ones are named and left out."""
    encoded = []
    labels = []
    batches = data.in_batches(dataset, indices.tolist(), ENCODE_BATCH, args.workers, "encoding")
    for _, images, y, corrupt in batches:
        good = corrupt < 0
        for i in corrupt[~good].tolist():
            warn_once(f"{dataset.name(i)}: not a readable image, skipped")
        encoded.append(function(data.to_float(images, args.device))[good])
        labels.append(y[good])
    return torch.cat(encoded), torch.cat(labels).to(args.device)


def rounded(value):
    """Round the floats in dicts to 4 digits; NaN and infinity, which JSON does not know, become None."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def report(args, numbers, picture=None):
    """Print the numbers; write them with the settings, and the picture, to --out."""
    numbers = rounded(numbers)
    print(json.dumps(numbers), flush=True)
    path = f"{args.out}/{args.probe}"
    files.write_json(f"{path}.json", {**numbers, "settings": vars(args)})
    if picture:
        files.save_image(f"{path}.png", picture)


def evenly(length, count):
    """Return `count` of the numbers from 0 to `length` - 1, evenly spaced; all if they are fewer."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(int)


# -- Classification ----------------------------------------------------------------------------------------

def random_resized_crops(images, generator):
    """Crop 8 to 100% of the area, ratio 3:4 to 4:3, half of them mirrored, at full size: [B, 3, H, W]."""
    u = torch.rand(5, len(images), generator=generator)
    area = 0.08 + 0.92 * u[0]
    ratio = (4 / 3) ** (2 * u[1] - 1)
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)  # width and height, [B, 2]
    centre = (2 * u[2:4].T - 1) * (1 - size)
    size[u[4] < 0.5, 0] *= -1
    theta = torch.cat([size.diag_embed(), centre.unsqueeze(2)], 2)  # [B, 2, 3]
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def train_linear(pooled, train, args):
    """Return a linear head trained on pooled(images), [B, C].

    With --cache each image is encoded once, uncropped; otherwise a new crop of it in each epoch. The features
    of a whole epoch are in memory, on the device.
    """
    if args.cache:
        x, y = encode(pooled, train, torch.arange(len(train)), args)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def pooled_crops(images):
        return pooled(random_resized_crops(images, generator))

    for epoch in range(args.epochs):
        if args.cache:
            order = torch.randperm(len(y))
        else:
            x, y = encode(pooled_crops, train, torch.randperm(len(train)), args)
            order = torch.arange(len(y))
        if epoch == 0:
            norm = nn.BatchNorm1d(x.shape[1], affine=False)  # spaces differ in scale
            head = nn.Sequential(norm, nn.Linear(x.shape[1], len(train.classes))).to(args.device)
            optimizer = torch.optim.AdamW(head.parameters(), args.lr, weight_decay=args.wd)
        for part in order.split(args.batch):
            if len(part) > 1:  # one left over has no variance
                optimizer.zero_grad()
                F.cross_entropy(head(x[part]), y[part]).backward()
                optimizer.step()
    return head.eval()


def classify(args):
    """Linear head on the mean of the tokens (paper: AdamW 5e-4, weight decay 1e-2, batch 3072, 30 epochs)."""
    features, _, path = load_features(args)
    train, test = [data.open_data(os.path.join(args.data, split), args.size) for split in ("train", "val")]
    if train.classes != test.classes:
        raise UserError(f"--data {args.data}: train/ and val/ hold different class folders")
    if args.demo:  # a part of it is enough
        train = shapes.dataset("shapes://train", 3000)
        test = shapes.dataset("shapes://val", 1000)

    def pooled(images):
        return features(images, args.features).mean((2, 3))

    head = train_linear(pooled, train, args)
    x, y = encode(pooled, test, torch.arange(len(test)), args)
    hits = head(x).topk(min(5, len(train.classes))).indices == y[:, None]
    report(args, {"features": args.features, "of": path, "images": len(y),
                  **{f"top{k}": hits[:, :k].any(1).float().mean().item() for k in (1, 5)}})


# -- Segmentation and depth --------------------------------------------------------------------------------

def predict_densely(args):
    """Train a pyramid head on frozen maps and measure it by sliding window."""
    features, _, path = load_features(args)
    feature_map = functools.partial(features, space=args.features)
    channels = feature_map(torch.zeros(1, 3, args.size, args.size, device=args.device)).shape[1]
    train, test = dense.list_pairs(args)
    torch.manual_seed(args.seed)
    head = dense.PyramidHead(feature_map, channels, args.outputs, args.width).to(args.device)
    dense.train_head(head, train, args)
    numbers, shown = dense.measure(head.eval(), test, args)
    report(args, {"features": args.features, "of": path, **numbers, "images": len(test)},
           maps.dense_picture(args.probe, shown, args.features))


# -- How separable a latent space is (figure 4a) -----------------------------------------------------------

def separability(x, labels, seed):
    """Return how well the classes of x [n, d] are told apart; labels [n] from 0, with every class.

    That is the accuracy of logistic regression and of the nearest neighbour, on the half of each class that
    is held out, and the ratio of between-class to within-class scatter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort()]
    labels = labels[order]
    x = x[order] / x.std()
    count = int(labels.max()) + 1
    head = nn.Linear(x.shape[1], count)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x[::2]), labels[::2]) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    linear = head(x[1::2]).argmax(1)
    nearest = labels[::2][torch.cdist(x[1::2], x[::2]).argmin(1)]
    means = torch.stack([x[labels == c].mean(0) for c in range(count)])[labels]
    between = (means - x.mean(0)).square().sum()
    within = (x - means).square().sum()
    return {"linear": (linear == labels[1::2]).double().mean().item(),
            "1-NN": (nearest == labels[1::2]).double().mean().item(),
            "between/within": (between / within).item()}


def images_by_class(dataset, args):
    """Return the indices of equally many images of each of --classes classes, evenly spaced."""
    classes = evenly(len(dataset.classes), args.classes)
    labels = torch.as_tensor(dataset.labels)
    chosen = [(labels == c).nonzero()[:args.images // len(classes), 0] for c in classes]
    if len(classes) < 2 or min(map(len, chosen)) < 4:
        raise UserError(f"--images {args.images}, --classes {args.classes}: too few for 2 classes of 4")
    return torch.cat(chosen)


def whole(images, features, space):
    """Return all tokens of each image together, [B, N * C]; a thousand 256-pixel latents take 200 MB."""
    return features(images, space).flatten(1).half()


def compare_spaces(args):
    """Separability of each space, or of several files' latents: whole images on their 64 first axes."""
    shown = {}
    for ae_path in args.ae or [None]:
        features, spaces, path = load_features(args, ae_path)
        shown[path] = features, spaces[-2]  # the last but pixels is the whole
    of = list(shown)
    if len(of) == 1:
        shown = {kind: (features, kind) for kind in spaces}
    dataset = data.open_data(args.data, args.size)
    indices = images_by_class(dataset, args)
    numbers = {}
    panels = {}
    for name, (features, kind) in shown.items():
        x, y = encode(functools.partial(whole, features=features, space=kind), dataset, indices, args)
        x = maps.principal(x.cpu().float(), 64).float()
        classes, y = y.cpu().unique(return_inverse=True)
        numbers[name] = separability(x, y, args.seed)
        panels[name] = maps.tsne(x).numpy()
    picture = maps.space_picture(panels, y, [dataset.classes[c] for c in classes])
    report(args, {"of": of, "images": len(y), "classes": len(classes), "chance": 1 / len(classes), **numbers},
           picture)


# -- The flow: how far samples are from images, with no decoder between ------------------------------------

def gaussian_distance(a, b):
    """Return the Frechet distance of Gaussians through the rows of a [n, D] and b [m, D]."""
    parts = []
    for count, mean, scatter in map(moments, (a, b)):
        parts += [mean.cpu(), scatter.cpu() / (count - 1)]
    return frechet_distance(*parts)


@torch.no_grad()
def flow(args):
    """Flow loss by t; Frechet distance of samples from held-out images by evaluations of the network.

    Distances are of the encoder's channels, each in units of its deviation: "pooled" of their means over an
    image, "tokens" of the tokens one by one. Samples: as many as the images, of the same classes, unguided.
    """
    sit, ae, path = find_models(args, args.device, decode_only=False)
    dataset = data.open_data(args.data, ae.image_size)
    if dataset.classes != sit.meta.get("classes", dataset.classes) or len(dataset.classes) != sit.num_classes:
        raise UserError(f"--data {args.data}: not the classes that {path} was trained on")
    chosen = torch.from_numpy(evenly(len(dataset), args.images))
    with runs.autocast(args.device, args.precision):
        latents, y = encode(ae.encode, dataset, chosen, args)
        noise = svg.sample_noise(args.seed, range(len(y)), latents.shape[1:]).to(args.device)
        parts = list(zip(*(x.split(ENCODE_BATCH) for x in (sit.normalize(latents), noise, y)), strict=True))

        losses = {}
        for u in runs.progress(torch.arange(0.05, 1, 0.1).tolist(), "loss", 10 * len(y), lambda _: len(y)):
            loss = [svg.flow_loss(sit, z, c, u=torch.full((len(z),), u).to(z), noise=n) for z, n, c in parts]
            losses[f"{svg.shift_time(u, 0.4):.3f}"] = torch.cat(loss).mean().item()

        real = latents[..., :ae.feature_channels]
        scale = real.std((0, 1))
        real = real / scale
        distances = {}
        for name, sampler in svg.SAMPLERS.items():
            distances[name] = {}
            for budget in args.evaluations:
                steps = budget // evaluations(name, steps=1)
                if steps == 0:
                    continue
                shown = runs.progress(parts, f"{name} {budget}", len(y), lambda part: len(part[2]))
                z = torch.cat([sampler(sit, n, c, steps, shift=args.shift) for _, n, c in shown])
                fake = sit.denormalize(z)[..., :ae.feature_channels] / scale
                distances[name][str(budget)] = {
                    "steps": steps, "pooled": gaussian_distance(fake.mean(1), real.mean(1)),
                    "tokens": gaussian_distance(fake.flatten(0, 1), real.flatten(0, 1))}
    report(args, {"of": str(path), "images": len(y), "loss": float(np.mean([*losses.values()])),
                  "loss_by_t": losses, "distance": distances})


# -- Mean velocity fields of two classes, entangled and separated (figure 4b) ------------------------------

BLOBS = torch.cartesian_prod(torch.tensor([-2.0, 2.0]), torch.tensor([-0.8, 0.0, 0.8]))  # two groups of three
SIGMA = 0.15  # their standard deviation
BLOBS_OF_CLASSES = {"entangled": [[0, 2, 4], [1, 3, 5]], "separated": [[0, 1, 2], [3, 4, 5]]}


def mean_velocity(x, t, blobs):
    """Return E[data - noise | x_t = x] of Gaussian blobs: x [B, 1, 2], t [B], blobs [B, k, 2] -> like x."""
    t = t.view(-1, 1, 1)
    variance = (1 - t) ** 2 + (t * SIGMA) ** 2
    away = x - t * blobs
    share = torch.softmax(-away.square().sum(2, keepdim=True) / (2 * variance), 1)  # of each blob, given x
    return (share * (blobs + (t * SIGMA ** 2 - (1 - t)) / variance * away)).sum(1, keepdim=True)


def toy(args):
    """Two classes, entangled or separated: the mean error of 1, 5, 25 Euler steps' ends against 1000."""
    noise = svg.sample_noise(args.seed, range(2000), (1, 2))
    line = torch.linspace(-2.6, 2.6, 10)
    spots = torch.cartesian_prod(line, line).unsqueeze(1)  # [100, 1, 2]
    numbers = {}
    panels = {}
    for kind, split in BLOBS_OF_CLASSES.items():
        blobs = BLOBS[torch.tensor(split)]  # [class, 3, 2]
        # The sampler passes labels on to the model: here a point's label is the blobs of its class, in turn.
        labels = blobs.repeat(1000, 1, 1)
        ends = {steps: svg.euler_sample(mean_velocity, noise, labels, steps, shift=1.0)
                for steps in (1, 5, 25, 1000)}
        numbers[kind] = {f"error_{steps}": (ends[steps] - ends[1000]).norm(dim=2).mean().item()
                         for steps in (1, 5, 25)}
        panels[kind] = blobs.numpy(), [mean_velocity(spots, torch.tensor(0.5), b).squeeze(1).numpy()
                                       for b in blobs]
    report(args, numbers, maps.toy_picture(panels, spots[:, 0].numpy()))


# -- Principal components of hidden states and features (figures 10, 11) -----------------------------------

def show_features(args):
    """Features of some pictures by a frozen encoder, their principal components as colours."""
    photos = np.stack([data.crop(data.open_rgb(file), args.size) for file in args.images])
    features, _, path = load_features(args)
    encoded = features(data.to_float(torch.from_numpy(photos), args.device), "encoder").cpu()
    rows = {"features": encoded.flatten(2).mT}
    report(args, {"of": path}, maps.component_picture(Path(path).name, args.images, photos, rows))


@torch.no_grad()
def pca(args):
    """Hidden states of some layers at some t: of a sample, or with --image of a photo."""
    sit, ae, path = find_models(args, args.device, decode_only=not args.image)
    y = torch.tensor(class_numbers([args.class_], sit), device=args.device)
    noise = svg.sample_noise(args.seed, [0], (sit.grid ** 2, sit.channels)).to(args.device)
    times = svg.euler_times(25, 0.4)

    # States x_t.
    if args.image:
        photo = torch.from_numpy(data.crop(data.open_rgb(args.image), ae.image_size))[None]
        latents = sit.normalize(ae.encode(data.to_float(photo, args.device)))
        states = [(1 - t) * noise + t * latents for t in times]
    else:
        states = [noise]
        for pair in itertools.pairwise(times):
            states.append(svg.euler_sample(sit, states[-1], y, pair, guidance=4, zero_init=pair[0] == 0))
    x_t = torch.cat(states[::5])  # [6, N, C]
    t = torch.tensor(times[::5], device=args.device)

    # What they decode to, and hidden states.
    decoded = data.to_uint8(ae.decode(sit.denormalize(x_t)))
    rows = {}
    for i in evenly(len(sit.blocks), 4):
        sit.blocks[i].register_forward_hook(functools.partial(record, rows, f"layer {i + 1}"))
    sit(x_t, t, y.expand(len(t)))
    names = [f"t {time:.2f}" for time in times[::5]]
    report(args, {"of": str(path)}, maps.component_picture(Path(path).name, names, decoded, rows))


def record(rows, name, block, inputs, out):
    """Keep the tokens of a block [T, N, C] (a hook of torch's).

    Their size and mean change with t, far more than what differs from token to token.
    """
    rows[name] = F.layer_norm(out - out.mean(1, keepdim=True), out.shape[-1:]).cpu()


# -- The command -------------------------------------------------------------------------------------------

PROBES = {"classify": classify, "segment": predict_densely, "depth": predict_densely, "space": compare_spaces,
          "pca": pca, "flow": flow, "features": show_features, "toy": toy}
LAYOUTS = {"classify": "class folders of images, or packed sets, in train/ and val/",
           "space": "class folders of images, or a packed set", **dense.LAYOUTS}  # what --data holds
PAPER = {  # the defaults, of flags and of settings that have none
    "classify": {"data": "data/imagenet", "lr": 5e-4, "wd": 1e-2, "batch": 3072, "epochs": 30},
    "segment": {"data": "data/ADEChallengeData2016", "size": 512, "lr": 8e-5, "wd": 1e-3, "batch": 16,
                "steps": 8000, "warmup": 1500, "width": 256, "outputs": 150, "least_scale": 0.5},
    "depth": {"data": "data/nyu", "size": 480, "lr": 5e-4, "wd": 1e-2, "batch": 24, "epochs": 25, "warmup": 1,
              "steps": None, "width": 256, "outputs": 1, "least_scale": 1.0},  # scaling changes the depth
    "space": {"data": "data/imagenet/val"},
    "flow": {"data": "data/imagenet/val"},
}
TINY = {"ae": shapes.DEMO_PT, "size": shapes.SIZE, "workers": 0}
DEMO = {  # those of --demo; 11 are the ground and ten shapes
    "classify": {**TINY, "data": "shapes://", "batch": 500, "lr": 5e-3, "cache": True},
    "segment": {**TINY, "lr": 2e-3, "steps": 300, "warmup": 30, "width": 64, "outputs": 11, "least_scale": 1},
    "depth": {**TINY, "lr": 2e-3, "epochs": 5, "width": 64},
    "space": {**TINY, "data": "shapes://val", "ae": [shapes.DEMO_PT], "images": 500},
    "flow": {"data": "shapes://val", "workers": 0},
}


def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__)
    subparsers = parser.add_subparsers(dest="probe", required=True,
                                       metavar="classify|segment|depth|space|pca|flow|features|toy")
    commands = {name: subparsers.add_parser(name, doc=probe.__doc__, demo=DEMO.get(name))
                for name, probe in PROBES.items()}

    def add(names, flag, **settings):
        """Add a flag to each of the probes named."""
        for name in names.split():
            commands[name].add_argument(flag, **settings)

    # Output, data and models.
    every = " ".join(PROBES)
    inputs = "classify segment depth space features"
    add(every, "--out", default="probes", help="folder for the numbers and the picture")
    add(every, "--seed", type=runs.not_negative, default=0, help="seed of weights, order, crops and noise")
    for name, layout in LAYOUTS.items():
        group = commands[name].add_mutually_exclusive_group()
        group.add_argument("--demo", action="store_true", help="built-in data and model, tiny, no download")
        group.add_argument("--data", help=layout)
        group = commands[name].add_mutually_exclusive_group()
        group.add_argument("--ae", nargs="+" if name == "space" else None,
                           help="autoencoder, SVG's or a VAE (default: the newest run); space takes several")
        group.add_argument("--encoder", help="frozen encoder alone: a file in the weights folder, or a path")
    add("features", "--encoder", required=True, help="frozen encoder: a file in the weights folder or a path")
    add("features", "--images", required=True, nargs="+", help="pictures, one a column")
    add(inputs, "--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add(inputs, "--size", type=runs.positive, default=256, help="pixels per side of a crop")
    add("classify segment depth space flow", "--workers", type=runs.not_negative, default=8,
        help="data processes")
    for name in ("pca", "flow"):
        add_model_flags(commands[name].add_argument)
    add(f"{inputs} flow", "--precision", choices=("fp32", "bf16"),
        default="bf16" if torch.cuda.is_available() else "fp32", help="arithmetic of the frozen models")

    # Heads.
    add("classify segment depth", "--features", choices=SPACES, default="encoder", help="what a head sees")
    add("classify segment depth", "--lr", type=runs.number(above=0), help="AdamW's learning rate, at first")
    add("classify segment depth", "--batch", type=runs.whole(2), help="images per step")
    add("classify depth", "--epochs", type=runs.positive, help="passes over the training images")
    add("classify", "--cache", action="store_true", help="encode each image once, uncropped, for all epochs")
    add("segment", "--steps", type=runs.positive, help="training steps")

    # Spaces and hidden states.
    add("space flow", "--images", type=runs.whole(2), default=1000, help="images in all, evenly spaced")
    add("space", "--classes", type=runs.positive, default=20, help="number of classes, evenly spaced")
    add("flow", "--data", help="class folders of images that the transformer has not seen, or a packed set")
    add("flow", "--evaluations", type=runs.positive, nargs="+", default=[5, 10, 25],
        help="of the network an image; a sampler takes as many steps as these allow")
    add("flow", "--shift", type=runs.number(above=0), default=0.15, help="timestep shift in sampling")
    add("pca", "--image", help="picture to add noise to (default: a sample of --class)")
    add("pca", "--class", dest="class_", default="0", help="number or name of the class that is given")
    for name, defaults in PAPER.items():
        commands[name].set_defaults(**defaults)
    return parser.parse_args()


def main():
    """Run the probe that the first argument names."""
    args = parse_args()
    args.device = runs.setup()
    if runs.world_size() > 1:
        raise UserError("lab.probe runs as one process: start it without torchrun")
    out = Path(args.out)
    if "settings" not in files.read_json(out / f"{args.probe}.json") and any(out.glob(f"{args.probe}.*")):
        raise UserError(f"{out}/{args.probe}.* is there and not of this program: give another --out")
    out.mkdir(parents=True, exist_ok=True)  # fails now, and not after hours
    runs.say(f"{runs.device_name(args.device)} | {args.probe} | writes to {out}/")
    PROBES[args.probe](args)


if __name__ == "__main__":
    runs.run_main(main)
