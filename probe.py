"""Every number about features: what frozen features know, how a latent space is laid out (paper, 3.2, 4.3).

    python probe.py classify --data imagenet --ae runs/ae/last.pt       # linear head: top-1, top-5
    python probe.py segment --data ADEChallengeData2016 --features latent              # FPN head: mIoU, mAcc
    python probe.py depth --data nyu/official_splits                    # FPN head: RMSE, A.Rel
    python probe.py space --data imagenet/val                           # separability and t-SNE (figure 4a)
    python probe.py pca --class 207                                     # hidden states (figures 10, 11)
    python probe.py features --encoder dinov2_vits14_pretrain.pth --images a.jpg b.jpg
    python probe.py toy                                                 # mean velocity fields (figure 4b)

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

import data
import dense
import files
import maps
import runs
import shapes
import svg
from files import UserError
from sample import add_model_flags, class_numbers, find_models

# -- Frozen features ---------------------------------------------------------------------------------------

SPACES = ("encoder", "residual", "latent", "pixels")


def load_features(args, device, needed="encoder", ae_path=None):
    """Return features(images [B, 3, H, W], space) -> float map [B, C, h, w], the spaces it has, and its file.

    --encoder is a frozen encoder alone. --ae is an autoencoder: its encoder's channels, its aligned residual,
    or both ("latent"); of a VAE all are the encoder's. "pixels" are the picture's own: 3 * ratio * ratio
    channels for each patch. ae_path: one of several files. Raises UserError without the `needed` space.
    """
    if args.encoder:
        path = args.encoder
        model = svg.load_encoder(runs.fetch_weights(path, args.weights)).to(device)
        ratio = 16 if model.vit.patch == 14 else model.vit.patch  # pixels per token and side
        width = model.dim
    else:
        path = ae_path or args.ae or runs.latest_run("autoencoder", demo=False)
        if not path:
            raise UserError("no stage-1 run below runs/: name one by --ae, or an encoder by --encoder")
        model = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
        ratio = model.ratio
        width = model.feature_channels
    channels = {"encoder": slice(width), "residual": slice(width, None),  # of each space
                "latent": slice(None), "pixels": None}
    if args.encoder or model.channels == width:
        del channels["residual"], channels["latent"]
    if needed not in channels:
        raise UserError(f"--features {needed}: {path} has {', '.join(channels)} only")
    if args.size % ratio:
        raise UserError(f"--size {args.size}: give a multiple of {ratio}")
    runs.say(f"features of {path}: {runs.millions(model=model)}")

    @torch.no_grad()
    def features(images, space):
        if space == "pixels":
            return F.pixel_unshuffle(images, ratio)
        grid = [n // ratio for n in images.shape[-2:]]
        with runs.autocast(device, args.precision):
            tokens = model(images, grid) if args.encoder else model.encode(images)  # [B, N, C]
        return tokens[..., channels[space]].float().transpose(1, 2).unflatten(2, grid)

    return features, list(channels), str(path)


@functools.cache
def name_unreadable(dataset, index):
    """Warn of a picture that cannot be read; once, for all epochs."""
    warnings.warn(f"{dataset.name(index)}: not a readable image, skipped")


def encode(function, dataset, indices, args, device):
    """Return function(images) and labels, --encode-batch images at a time; unreadable ones are left out."""
    items = [[(i, 0) for i in part.tolist()] for part in indices.split(args.encode_batch)]
    batches = data.batches_of(dataset, items, args.workers)
    encoded = []
    labels = []
    for images, y, corrupt in runs.progress(batches, "encoding", len(indices), data.batch_size):
        for i in corrupt[corrupt >= 0].tolist():
            name_unreadable(dataset, i)
        encoded.append(function(data.to_float(images, device))[corrupt < 0])
        labels.append(y[corrupt < 0])
    return torch.cat(encoded), torch.cat(labels).to(device)


# -- Results -----------------------------------------------------------------------------------------------

def report(args, numbers, picture=None):
    """Print the numbers; write them with the settings, and the picture, to --out."""
    # Rounded to 4 digits; NaN and infinity, which JSON does not know, become null.
    numbers = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 4),
                         parse_constant=lambda _: None)
    print(json.dumps(numbers), flush=True)
    path = Path(args.out, f"{args.probe}.json")
    files.write_json(path, {**numbers, "settings": vars(args)})
    print(path)
    if picture:
        files.save_image(path.with_suffix(".png"), picture)
        print(path.with_suffix(".png"))


def evenly(first, last, count):
    """Return whole numbers evenly spaced from first to last: `count`, or all if there are fewer."""
    return np.unique(np.linspace(first, last, count).round().astype(int)).tolist()


# -- Classification ----------------------------------------------------------------------------------------

def random_resized_crops(images, generator):
    """Crop 8 to 100% of the area, ratio 3:4 to 4:3, half of them mirrored, at full size: [B, 3, H, W]."""
    u = torch.rand(5, len(images), generator=generator)
    area = 0.08 + 0.92 * u[0]
    ratio = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    size = torch.stack([area * ratio, area / ratio]).sqrt().clamp(max=1)  # width and height, [2, B]
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = size[0] * torch.where(u[4] < 0.5, -1, 1)
    theta[:, 1, 1] = size[1]
    theta[:, :, 2] = ((2 * u[2:4] - 1) * (1 - size)).T
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def training_batches(features, train, args, device):
    """Yield features [b, C] and labels [b] of --batch images in random order, for --epochs epochs.

    With --cache each image is encoded once, uncropped; otherwise a new crop of it in each epoch. The features
    of a whole epoch are in memory, on the device.
    """
    if args.cache:
        x, y = encode(features, train, torch.arange(len(train)), args, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def features_of_crops(images):
        return features(random_resized_crops(images, generator))

    for _ in range(args.epochs):
        if args.cache:
            order = torch.randperm(len(y))
        else:
            x, y = encode(features_of_crops, train, torch.randperm(len(train)), args, device)
            order = torch.arange(len(y))
        for block in order.split(args.batch):
            yield x[block], y[block]


def classify(args, device):
    """Linear head on the mean of the tokens (paper: AdamW 5e-4, weight decay 1e-2, batch 3072, 30 epochs)."""
    features, _, path = load_features(args, device, args.features)
    train, test = [data.open_data(os.path.join(args.data, split), args.size) for split in ("train", "val")]
    if train.classes != test.classes:
        raise UserError(f"--data {args.data}: train/ and val/ hold different class folders")
    if args.demo:  # a part of it is enough
        train = shapes.dataset("shapes://train", 3000)
        test = shapes.dataset("shapes://val", 1000)
    runs.say(f"{runs.describe(train, 'train')}; {len(test):,} to test")

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
    x, y = encode(pooled, test, torch.arange(len(test)), args, device)
    with torch.no_grad():
        hits = head(x).topk(min(5, len(train.classes))).indices == y[:, None]
    report(args, {"features": args.features, "of": path, "top1": hits[:, 0].float().mean().item(),
                  "top5": hits.any(1).float().mean().item(), "images": len(y)})


# -- Segmentation and depth --------------------------------------------------------------------------------

def predict_densely(args, device):
    """Train a pyramid head on frozen maps and measure it by sliding window."""
    features, _, path = load_features(args, device, args.features)
    train, test = dense.open_pairs(args)
    torch.manual_seed(args.seed)
    channels = features(torch.zeros(1, 3, args.size, args.size, device=device), args.features).shape[1]
    head = dense.PyramidHead(channels, args.outputs, args.width).to(device)

    def predict(images):
        return F.interpolate(head(features(images, args.features)), images.shape[-2:], mode="bilinear")

    dense.train_head(head, predict, train, args, device)
    head.eval()
    numbers, shown = dense.measure(predict, test, args, device)
    picture = maps.dense_picture(args.probe, shown, args.features, max(96, min(192, args.size)))
    report(args, {"features": args.features, "of": path, **numbers, "images": len(test)}, picture)


# -- How separable a latent space is (figure 4a) -----------------------------------------------------------

def separability(x, labels, seed):
    """Return how well the classes of x [n, d] are told apart; labels [n] from 0, with every class.

    That is the accuracy of logistic regression and of the nearest neighbour, on the half of each class that
    is held out, and the ratio of between-class to within-class scatter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort()]
    fit = order[::2]
    test = order[1::2]
    count = int(labels.max()) + 1
    head = nn.Linear(x.shape[1], count)
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
    means = torch.stack([x[labels == c].mean(0) for c in range(count)])[labels]
    between = (means - x.mean(0)).square().sum()
    within = (x - means).square().sum()
    return {"linear": (linear == labels[test]).double().mean().item(),
            "1-NN": (nearest == labels[test]).double().mean().item(),
            "between/within": (between / within).item()}


def images_by_class(dataset, args):
    """Return --classes classes, evenly spaced, and the indices of equally many images of each."""
    classes = evenly(0, len(dataset.classes) - 1, args.classes)
    labels = torch.as_tensor(dataset.labels)
    chosen = [(labels == c).nonzero()[:args.images // len(classes), 0] for c in classes]
    if len(classes) < 2 or min(len(indices) for indices in chosen) < 4:
        raise UserError(f"--images {args.images}, --classes {args.classes}: too few: it takes 2 classes and "
                        f"4 images of each at least")
    return classes, torch.cat(chosen)


def encode_whole(features, kind, dataset, indices, args, device):
    """Return all tokens of each image together, on the first 64 principal axes [n, 64], and labels [n]."""
    def flat(images):
        return features(images, kind).flatten(1).half()  # a thousand 256-pixel latents take 200 MB

    x, y = encode(flat, dataset, indices, args, device)
    return maps.principal(x.cpu().float(), 64).float(), y.cpu()


def space(args, device):
    """Separability of each space: all tokens of an image together, on the first 64 principal axes.

    Of one file each space is shown, of several the whole latents of each.
    """
    shown = {}  # name: features, space
    for ae_path in args.ae or [None]:
        features, spaces, path = load_features(args, device, ae_path=ae_path)
        shown[path] = features, "latent" if "latent" in spaces else "encoder"
    of = list(shown)
    if len(shown) == 1:
        of = path
        shown = {kind: (features, kind) for kind in spaces}
    dataset = data.open_data(args.data, args.size)
    classes, indices = images_by_class(dataset, args)

    numbers = {}
    panels = []
    for name, (features, kind) in shown.items():
        x, y = encode_whole(features, kind, dataset, indices, args, device)
        y = torch.searchsorted(torch.tensor(classes), y)
        some = np.linspace(0, len(x), min(len(x), 500), endpoint=False).astype(int)
        numbers[name] = separability(x, y, args.seed)
        panels.append((name, numbers[name], maps.tsne(x[some], seed=args.seed).numpy()))
    picture = maps.space_picture(panels, y[some].numpy(), [dataset.classes[c] for c in classes])
    report(args, {"of": of, "images": len(y), "classes": len(classes), "chance": 1 / len(classes), **numbers},
           picture)


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
    spots = torch.cartesian_prod(line, line)
    half = torch.full((len(spots),), 0.5)
    numbers = {}
    panels = []
    for kind, split in BLOBS_OF_CLASSES.items():
        blobs = BLOBS[torch.tensor(split)]  # [class, 3, 2]
        # The sampler passes labels on to the model: here a point's label is the blobs of its class.
        ends = {steps: svg.euler_sample(mean_velocity, noise, blobs[y], steps, shift=1.0)
                for steps in (1, 5, 25, 1000)}
        numbers[kind] = {f"error_{steps}": (ends[steps] - ends[1000]).norm(dim=2).mean().item()
                         for steps in (1, 5, 25)}
        velocities = [mean_velocity(spots[:, None], half, blobs[None, c])[:, 0].numpy() for c in (0, 1)]
        panels.append((kind, numbers[kind], blobs.numpy(), velocities, ends[5][:600, 0].numpy()))
    report(args, numbers, maps.toy_picture(panels, spots.numpy(), y[:600].numpy()))


# -- Principal components of hidden states and features (figures 10, 11) -----------------------------------

def show_features(args, device):
    """Features of some pictures by a frozen encoder, their principal components as colours."""
    photos = np.stack([data.crop(data.open_rgb(file), args.size) for file in args.images])
    features, _, path = load_features(args, device)
    encoded = features(data.to_float(torch.from_numpy(photos), device), "encoder").cpu()
    report(args, {"of": path, "images": len(photos)},
           maps.feature_picture(Path(path).name, photos, encoded))


def pca(args, device):
    """Hidden states of some layers at some t: of a sample, or with --image of a photo."""
    sit, ae, path = find_models(args, device, decode_only=not args.image)
    y = torch.tensor(class_numbers([args.class_], sit), device=device)
    noise = svg.sample_noise(args.seed, [0], (sit.grid ** 2, sit.channels)).to(device)
    times = svg.euler_times(25, 0.4)
    chosen = evenly(0, 25, args.columns)
    t_shown = [times[i] for i in chosen]
    layers = evenly(0, len(sit.blocks) - 1, args.rows)
    hidden = []

    def record(block, inputs, out):
        hidden.append(out.float().cpu())

    with torch.no_grad(), runs.autocast(device, args.precision):
        # States x_t, each [1, N, C].
        if args.image:
            what = args.image
            photo = torch.from_numpy(data.crop(data.open_rgb(what), ae.image_size))[None]
            latents = sit.normalize(ae.encode(data.to_float(photo, device))).float()
            states = [(1 - t) * noise + t * latents for t in t_shown]
        else:
            what = f"a sample of class {args.class_}, seed {args.seed}"
            states = [noise]
            for a, b in itertools.pairwise(chosen):
                states.append(svg.euler_sample(sit, states[-1], y, times[a:b + 1], args.guidance,
                                               zero_init=a == 0))

        # Hidden states, and what x_t decodes to.
        x_t = torch.cat(states)
        for i in layers:
            sit.blocks[i].register_forward_hook(record)
        sit(x_t, torch.tensor(t_shown, device=device), y.expand(len(x_t)))
        latents = sit.denormalize(x_t)
        decoded = data.to_uint8(ae.decode(latents))
    features = latents[-1:, :, :ae.feature_channels].cpu()
    names = [f"layer {i + 1}" for i in layers]
    picture = maps.hidden_picture(f"{Path(path).name}, {what}", t_shown, decoded, features,
                                  dict(zip(names, hidden, strict=True)))
    report(args, {"of": str(path), "picture": what, "layers": [i + 1 for i in layers]}, picture)


# -- The command -------------------------------------------------------------------------------------------

PROBES = {"classify": classify, "segment": predict_densely, "depth": predict_densely, "space": space,
          "pca": pca, "features": show_features, "toy": toy}
LAYOUTS = {  # what --data holds
    "classify": "class folders of images, or packed sets, in train/ and val/",
    "space": "class folders of images, or a packed set",
    **dense.LAYOUTS,
}
PAPER = {  # the defaults
    "classify": {"data": "data/imagenet", "lr": 5e-4, "wd": 1e-2, "batch": 3072, "epochs": 30},
    "segment": {"data": "data/ADEChallengeData2016", "size": 512, "lr": 8e-5, "wd": 1e-3, "batch": 16,
                "steps": 8000, "warmup": 1500, "outputs": 150, "least_scale": 0.5},
    "depth": {"data": "data/nyu", "size": 480, "lr": 5e-4, "wd": 1e-2, "batch": 24, "epochs": 25,
              "warmup": 0, "outputs": 1, "least_scale": 1.0},  # scaling would change the depth
    "space": {"data": "data/imagenet/val"},
}
TINY = {"ae": shapes.DEMO_PT, "size": shapes.SIZE, "workers": 0}
DEMO = {  # those of --demo
    "classify": {**TINY, "data": "shapes://", "batch": 500, "lr": 5e-3, "cache": True},
    "segment": {**TINY, "lr": 2e-3, "steps": 300, "warmup": 30, "width": 64,
                "outputs": 1 + len(shapes.CLASSES), "least_scale": 1.0},
    "depth": {**TINY, "lr": 2e-3, "epochs": 5, "width": 64},
    "space": {**TINY, "data": "shapes://val", "ae": [shapes.DEMO_PT], "images": 500},
}


def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__)
    subparsers = parser.add_subparsers(dest="probe", required=True, metavar=" | ".join(PROBES))
    commands = {name: subparsers.add_parser(name, doc=probe.__doc__, demo=DEMO.get(name))
                for name, probe in PROBES.items()}

    def add(names, flag, **settings):
        """Add a flag to each of the probes named."""
        for name in names.split():
            commands[name].add_argument(flag, **settings)

    # Output, data and models.
    every = " ".join(PROBES)
    add(every, "--out", default="probes", help="folder for the numbers and the picture")
    add(every, "--seed", type=runs.not_negative, default=0, help="seed of weights, order, crops and noise")
    for name, layout in LAYOUTS.items():
        group = commands[name].add_mutually_exclusive_group()
        group.add_argument("--demo", action="store_true", help="built-in data and model, tiny, no download")
        group.add_argument("--data", help=layout)
        group = commands[name].add_mutually_exclusive_group()
        group.add_argument("--ae", nargs="+" if name == "space" else None, metavar="FILE",
                           help="autoencoder, SVG's or a VAE (default: the newest run; demo.pt with --demo); "
                           "space takes several and compares their latents")
        group.add_argument("--encoder", help="frozen encoder alone: a file in the weights folder, or a path")
    inputs = " ".join(LAYOUTS)
    add("features", "--encoder", required=True, help="frozen encoder: a file in the weights folder or a path")
    add("features", "--images", required=True, nargs="+", metavar="PHOTO", help="pictures, one a column")
    add(f"{inputs} features", "--weights", help="pretrained files (default: $SVG_WEIGHTS or weights/)")
    add(f"{inputs} features", "--size", type=runs.positive, default=256, help="pixels per side of a crop")
    add(inputs, "--workers", type=runs.not_negative, default=8, help="data loading processes")
    add_model_flags(commands["pca"].add_argument)
    add(f"{inputs} features pca", "--precision", choices=("fp32", "bf16"),
        default="bf16" if torch.cuda.is_available() else "fp32", help="arithmetic of the frozen models")

    # Heads.
    heads = "classify segment depth"
    add(heads, "--features", choices=SPACES, default="encoder", help="frozen features that the head sees")
    add(heads, "--lr", type=runs.number(above=0), help="AdamW's learning rate, at first")
    add(heads, "--wd", type=runs.number(), help="weight decay")
    add(heads, "--batch", type=runs.whole(2), help="images per step")
    add("classify depth", "--epochs", type=runs.positive, help="passes over the training images")
    add("classify", "--cache", action="store_true", help="encode each image once, uncropped, for all epochs")
    add("segment", "--steps", type=runs.positive, help="training steps")
    add("segment depth", "--width", type=runs.positive, default=256, help="channels of the head")
    add("segment depth", "--warmup", type=runs.not_negative, help="steps of rising learning rate")

    # Spaces and hidden states.
    add("classify space", "--encode-batch", type=runs.positive, default=64, help="images encoded at a time")
    add("space", "--images", type=runs.positive, default=1000, help="images in all, shared by the classes")
    add("space", "--classes", type=runs.positive, default=20, help="number of classes, evenly spaced")
    add("pca", "--image", metavar="PHOTO", help="picture to add noise to (default: a sample of --class)")
    add("pca", "--class", dest="class_", default="0", help="number or name of the class that is given")
    add("pca", "--guidance", type=runs.number(), default=4.0, help="guidance scale of the sample; 1: none")
    add("pca", "--rows", type=runs.positive, default=4, help="layers shown")
    add("pca", "--columns", type=runs.positive, default=6, help="times shown")
    for name, defaults in PAPER.items():
        commands[name].set_defaults(**defaults)
    return parser.parse_args()


def main():
    """Run the probe that the first argument names."""
    args = parse_args()
    device = runs.setup()
    if runs.world_size() > 1:
        raise UserError("probe.py runs as one process: start it without torchrun")
    written = Path(args.out, f"{args.probe}.json")
    for path in (written, written.with_suffix(".png")):
        if path.exists() and "settings" not in files.read_json(written):
            raise UserError(f"{path} is there and not of this program: give another --out")
    Path(args.out).mkdir(parents=True, exist_ok=True)  # fails now, and not after hours
    runs.say_start(device, getattr(args, "precision", "fp32"), args.probe, f"writes {args.out}/")
    PROBES[args.probe](args, device)


if __name__ == "__main__":
    runs.run_main(main)
