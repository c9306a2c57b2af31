"""Every number about pictures: FID, sFID, IS, precision, recall, KID of samples; PSNR, SSIM, LPIPS of pairs.

    python fid.py samples/                                        against ADM's ImageNet 256x256 statistics
    python fid.py samples/ --ref imagenet/val --size 256          against a tree of images, centre-cropped
    python fid.py reconstructions/ --ref imagenet/val --paired    rFID, PSNR, SSIM, LPIPS
    python fid.py samples/ --ref val/ --features dinov2_vits14_pretrain.pth       FD in its CLS token
    python fid.py imagenet/val --size 256 --save-stats val.npz    statistics once, for --ref val.npz later
    python fid.py samples/ --demo                                 in the demo's encoder, with no download

FID is comparable only within one protocol: resize, Inception weights, reference and number of images.
"""
import functools
import math
import os
import warnings
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import svg
from lib import data, files, runs, shapes
from lib.files import UserError
from lib.perceptual import LPIPS, inception_features, load_inception

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "num", "protocol")  # of an .npz; _s: of the spatial features
BLOCK = 1024  # rows of a distance matrix that are in memory at a time: 400 MB against 50,000 images

# -- The formulas ------------------------------------------------------------------------------------------

def float64(x):
    """Return x in double precision: on its device, or on the CPU if the device has none (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def moments(features):
    """Return count, mean [D] and scatter [D, D] of features [B, D]; covariance = scatter / (count - 1)."""
    features = float64(features)
    mean = features.mean(0)
    centred = features - mean
    return len(features), mean, centred.T @ centred


def merge_moments(a, b):
    """Return the moments of two sets together, without cancellation (Chan et al. 1979)."""
    count_a, mean_a, scatter_a = a
    count_b, mean_b, scatter_b = b
    count = count_a + count_b
    delta = mean_b - mean_a
    between = torch.outer(delta, delta) * (count_a * count_b / count)
    return count, mean_a + delta * (count_b / count), scatter_a + scatter_b + between


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, eq. 6).

    Means [D], covariances [D, D] of any rank; in float64. ValueError if they do not fit or are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError("means or covariances of other features")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite")

    def root(sigma):  # R [D, rank] with sigma = R R^T: a pivoted Cholesky factor, 6 times faster than eigh
        factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
        out = np.empty((len(sigma), rank))
        out[pivots - 1] = np.tril(factor)[:, :rank]
        return out

    # The trace of (sigma1 sigma2)^(1/2) is the sum of the singular values of R1^T R2.
    cross = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of parts of logits [N, classes]: mean, deviation (Salimans et al. 2016)."""
    scores = []
    cuts = [i * len(logits) // splits for i in range(1, splits)]
    for log_p in float64(torch.as_tensor(logits)).log_softmax(1).tensor_split(cuts):
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def neighbour_distances(x, k):
    """Return the distance of each of x [N, D] to its k-th nearest neighbour but itself, [N]."""
    nearest = [torch.cdist(rows, x).topk(k + 1, largest=False).values for rows in x.split(BLOCK)]
    return torch.cat(nearest).amax(1)


def precision_recall(real, fake, k=3):
    """Return precision and recall of features [N, D], [M, D] (Kynkaanniemi et al. 2019).

    Precision is the share of fakes no farther from some real one than its k-th neighbour; recall: vice versa.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()
    real_radii = neighbour_distances(real, k)
    fake_radii = neighbour_distances(fake, k)
    precise = []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(BLOCK), fake_radii.split(BLOCK), strict=True):
        distances = torch.cdist(rows, real)  # of each pair once, for both questions
        precise.append((distances <= real_radii).any(1))
        recalled |= (distances <= radii.unsqueeze(1)).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def kernel_distance(real, fake):
    """KID: unbiased squared MMD of features [N, D], [M, D], kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Over all pairs, where other tools draw random subsets: the same expectation without their noise.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()

    def total(a, b):
        return sum(((rows @ b.T / b.shape[1] + 1) ** 3).sum() for rows in a.split(BLOCK))

    def within(a):  # over the pairs of different images
        blocks = a.split(BLOCK)
        later = sum(total(rows, a[(i + 1) * BLOCK:]) for i, rows in enumerate(blocks))  # each pair once
        same = ((a.square().mean(1) + 1) ** 3).sum()
        pairs = 2 * later + sum(total(rows, rows) for rows in blocks) - same
        return pairs / (len(a) * (len(a) - 1))

    between = total(real, fake) / (len(real) * len(fake))
    return (within(real) + within(fake) - 2 * between).item()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 images [B, H, W, 3]: [B], infinite for equal ones."""
    error = (float64(a) - float64(b)).square().flatten(1).mean(1)
    return 10 * torch.log10(255 ** 2 / error)


def ssim(a, b):
    """Structural similarity of uint8 images [B, H, W, 3]: [B] (Wang et al. 2004).

    Gaussian window of 11 pixels (UserError for smaller images), sigma 1.5, mean over RGB and where it fits.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM takes images of at least 11x11 pixels, not {a.shape[2]}x{a.shape[1]}")
    a, b = (float64(x).permute(0, 3, 1, 2) for x in (a, b))
    window = torch.exp(-torch.arange(-5, 6, dtype=a.dtype, device=a.device).square() / (2 * 1.5 ** 2))
    window = (window / window.sum()).view(1, 1, 1, 11)
    maps = torch.stack([a, b, a * a, b * b, a * b])  # [5, B, 3, H, W]
    blurred = F.conv2d(F.conv2d(maps.flatten(0, 2)[:, None], window), window.mT)
    mean_a, mean_b, square_a, square_b, product = blurred.unflatten(0, maps.shape[:3])
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    variances = square_a - mean_a ** 2 + square_b - mean_b ** 2
    structure = (2 * (product - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(1)


# -- Sources: a folder, a packed set or an .npz ------------------------------------------------------------

def open_arr_0(path):
    """Return the images of an .npz, left on the disk unless they are compressed: ADM's hold 2 to 10 GB."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return np.load(path)["arr_0"]
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        file.seek(member.header_offset + file.read(1000).index(b"\x93NUMPY"))  # behind the zip's own header
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


class Source(torch.utils.data.Dataset):
    """What is measured: images, uint8 [H, W, 3] of one size, or the statistics in an .npz, or both.

    name: a folder (any depth, sorted by path), a packed set, an .npz or a split of shapes. size: pixels to
    crop to; 0: none. num: take the first images alone, without statistics; 0: all.
    """

    def __init__(self, name, size=0, num=0):
        self.name = name
        self.size = size
        self.shape = None  # of an image
        self.statistics = {}  # STATISTICS, from an .npz or measured
        self.rows = {}  # features of every image, measured
        images = []
        if name in shapes.SPLITS:
            images = shapes.pictures(name, num or 1000)
        elif os.path.exists(f"{name}/images.npy"):
            images = data.Packed(name).images
        elif os.path.isdir(name):
            images = data.list_images(name)
            listed = {file for file in files.read_record(name).get("files", [])
                      if not file.startswith(files.OVERVIEW)}
            found = {os.path.relpath(path, name) for path in images}
            if listed and found != listed:
                warnings.warn(f"{name}: of the images in its record {len(listed - found)} are missing, and "
                              f"{len(found - listed)} that are not in it are counted too")
        else:
            with files.reading(name, "a folder of images or an .npz"), np.load(name) as arrays:
                if "mu" in arrays and "sigma" in arrays and not num:
                    self.statistics = {key: arrays[key][()] for key in STATISTICS if key in arrays}
                if "arr_0" in arrays:
                    images = open_arr_0(name)
                    if images.dtype != np.uint8 or images.shape[3:] != (3,):
                        raise UserError(f"{name}: arr_0 is not uint8 [N, H, W, 3]")
        if len(images) < max(num, 2) and not self.statistics:
            raise UserError(f"{name}: {len(images)} images found, but at least {max(num, 2)} are needed")
        self.images = images[:num or None]
        self.paths = self.images if isinstance(images, list) else []
        self.num = int(self.statistics.get("num", 0)) if self.statistics else len(self)  # 0: unknown
        self.shape = self[0].shape if len(self) else (0,)

    def __str__(self):
        return f"{self.num:,} images of {self.name}" if self.num else self.name

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = data.open_rgb(self.paths[i]) if self.paths else Image.fromarray(self.images[i])
        image = data.crop(image, self.size) if self.size else np.array(image)
        if self.shape not in (None, image.shape):
            raise UserError(f"{self.paths[i]} and {self.paths[0]} differ in size: --size N crops all to NxN")
        return image

    def keys(self):
        """Return what the two of a pair share: the path below the folder without suffix, or the index."""
        keys = [os.path.splitext(os.path.relpath(path, self.name))[0] for path in self.paths]
        return keys or list(map(str, range(len(self))))


# -- Images -> features -> numbers -------------------------------------------------------------------------

def open_features(args, device):
    """Return how images are compared: a function extract, the protocol in words, the distance's name.

    extract: uint8 images [B, H, W, 3] -> a dict of features [B, D]; Inception's have spatial [B, 2023] too,
    and logits [B, 1008] if the weights have the classifier.
    """
    if args.demo:
        model = svg.load_encoder(shapes.DEMO_PT).to(device)
        return (lambda images: {"features": model(data.to_float(images, device)).mean(1)},
                f"not Inception FID: mean patch tokens of {shapes.DEMO_PT.name}", "FD-demo-encoder")
    path = runs.fetch_weights(args.features or INCEPTION, args.weights)
    if args.features:
        model = svg.load_encoder(path).to(device)
        token = "CLS token" if model.vit.cls else "mean patch token"
        return (lambda images: {"features": model(data.to_float(images, device), (16, 16), cls=True)[0]},
                f"{token} of {path.name} ({model.fingerprint[:8]}) on 16x16 patches", f"FD-{model.name}")
    extract = functools.partial(inception_features, load_inception(path).to(device), protocol=args.protocol)
    return extract, f"{args.protocol} protocol, {INCEPTION}", "FID"


def batches(source, args, device):
    """Yield this process's share of the images, each once, in batches on the device."""
    share = np.array_split(range(len(source)), runs.world_size())[runs.rank()]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(source, share), args.batch, pin_memory=device.type == "cuda",
        num_workers=args.workers if source.paths else 0)  # an array needs no decoding
    for batch in runs.progress(loader, source.name, len(source)):
        yield batch.to(device, non_blocking=True)


def collect(rows):
    """Join the dicts of tensors [B, ...] of all processes in order: a dict on rank 0, {} on the others."""
    rows = [row for part in runs.gather(rows) for row in part]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]} if rows else {}


def measure(source, extract, protocol, args, device):
    """Give a source the features of its images, and STATISTICS if it has none, on rank 0."""
    rows = []
    totals = {}  # moments of this process's features, merged batch by batch
    for batch in batches(source, args, device):
        out = extract(batch)
        for key in ("features", "spatial"):
            if key in out:
                new = moments(out[key])
                totals[key] = merge_moments(totals[key], new) if key in totals else new
        rows.append({key: value.cpu() for key, value in out.items() if key != "spatial"})
    source.rows = collect(rows)
    totals = {key: (count, mean.cpu(), scatter.cpu()) for key, (count, mean, scatter) in totals.items()}
    parts = [part for part in runs.gather(totals) if part]  # a process may have had no image
    if source.statistics or not parts:
        return  # ADM's statistics are of the whole training set, its images 10,000 of that
    source.statistics = {"num": source.num, "protocol": protocol}
    for key, suffix in (("features", ""), ("spatial", "_s")):
        if key in parts[0]:
            count, mean, scatter = functools.reduce(merge_moments, [part[key] for part in parts])
            if not scatter.isfinite().all():
                raise UserError(f"{source.name}: features are not finite: damaged weights? ({protocol})")
            source.statistics[f"mu{suffix}"] = mean.numpy()
            source.statistics[f"sigma{suffix}"] = (scatter / (count - 1)).numpy()


def distance(fake, real, suffix=""):
    """Return the Frechet distance of two sources, NaN if one lacks the features ("_s": the spatial ones)."""
    try:
        gaussians = [source.statistics[key + suffix] for source in (fake, real) for key in ("mu", "sigma")]
    except KeyError:
        return math.nan
    with files.reading(real.name, f"statistics to compare {fake.name} with"):
        return frechet_distance(*gaussians)


def compare(fake, real, name, device):
    """Return every number of two measured sources, by name; NaN where they do not allow it."""
    numbers = {name: distance(fake, real)}
    if name == "FID":  # the other encoders have features alone
        numbers |= {"sFID": distance(fake, real, "_s"), "IS": math.nan}
        logits = fake.rows.get("logits", [])
        if len(logits) >= 10:
            shuffled = np.random.default_rng(0).permutation(len(logits))  # or each part had few classes
            numbers["IS"], numbers["IS_std"] = inception_score(logits[shuffled])
    numbers |= {"precision": math.nan, "recall": math.nan, "KID": math.nan}
    if min(len(fake), len(real)) > 3:
        features = [float64(source.rows["features"].to(device)) for source in (real, fake)]
        numbers["precision"], numbers["recall"] = precision_recall(*features)
        numbers["KID"] = kernel_distance(*features)
    return numbers


@torch.inference_mode()
def compare_pairs(fake, real, args, device):
    """Return PSNR, SSIM and LPIPS (VGG16; not with --demo) with standard deviations, on rank 0."""
    if fake.keys() != real.keys() or fake.shape != real.shape:
        alone = sorted(set(fake.keys()) ^ set(real.keys()))[:3]
        raise UserError(f"--paired: {fake} and {real} need one size (--size N), here {fake.shape} and "
                        f"{real.shape}, and the same paths below but for suffixes; in one alone: {alone}")
    metrics = {"PSNR": psnr, "SSIM": ssim}
    if not args.demo:
        lpips = LPIPS(runs.fetch_weights("vgg16-397923af.pth", args.weights)).to(device)
        metrics["LPIPS"] = lambda a, b: lpips(data.to_float(b, device), data.to_float(a, device))
    pairs = zip(batches(fake, args, device), batches(real, args, device), strict=True)
    scores = [{name: metric(a, b).cpu().double() for name, metric in metrics.items()} for a, b in pairs]
    numbers = {}
    for name, score in collect(scores).items():
        if score.isinf().any() and not score.isinf().all():
            warnings.warn(f"{name}: {score.isinf().sum()} of {len(score)} pairs are identical, and left out")
            score = score[score.isfinite()]
        numbers |= {name: score.mean().item(), f"{name}_std": score.std(correction=0).item()}
    return numbers


# -- The command -------------------------------------------------------------------------------------------

def parse_args():
    """Parse the command line; UserError for a flag that is out of place."""
    parser = runs.Parser(__doc__, demo={"ref": "shapes://val"})
    add = parser.add_argument
    add("samples", nargs="?", default="samples/",
        help="folder of images (any depth), or .npz with arr_0 (uint8 [N, H, W, 3]) and/or mu and sigma")
    add("--ref", help=f"reference, as samples (default: {ADM_REFERENCE} in the weights folder, 2 GB, "
        "downloaded on first use; with --demo the built-in images)")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--protocol", choices=("adm", "pytorch-fid"), default="adm",
               help="resize to Inception's 299 pixels as ADM's evaluator (TensorFlow 1) or as pytorch-fid")
    add_one_of("--features", metavar="FILE",
               help="encoder whose CLS token replaces Inception's features: a path, or in the weights folder")
    add_one_of("--demo", action="store_true", help="use the features of the demo's encoder; no download")
    add("--paired", action="store_true", help="rFID, PSNR, SSIM and (without --demo) LPIPS of "
        "reconstructions of --ref, paired by relative path without suffix (arrays: by index)")
    add("--size", type=runs.not_negative, default=0, metavar="N", help="pixels to which images are "
        "centre-cropped as by ADM; 0: as they are, all of one size (--paired: --ref to the samples' size)")
    add("--num", type=runs.not_negative, default=0, metavar="N", help="images: the first N by path; 0: all")
    add("--batch", type=runs.positive, default=64, help="images per step; no number depends on it")
    add("--workers", type=runs.not_negative, default=min(4, os.cpu_count() or 1),
        help="image decoding processes, for each process that measures; 0: none")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--save-stats", metavar="OUT.npz", type=runs.output_file("protocol"),
        help="file for the samples' statistics, for --ref, pytorch-fid or ADM; without --ref, only that")
    add("--json", metavar="OUT.json", type=runs.output_file("not_measured"),
        help="file for the numbers and their sources")
    args = parser.parse_args()
    if not args.ref and (args.paired or (args.features and not args.save_stats)):
        raise UserError("--paired and --features need --ref: ADM's default holds Inception's statistics")
    return args


def check_source(source, protocol, args):
    """Raise UserError if a source has statistics of another protocol, or would be overwritten."""
    for path in (args.save_stats, args.json):
        if path and os.path.realpath(path) == os.path.realpath(source.name):
            raise UserError(f"{path} is measured and would be overwritten: give another place")
    own = source.statistics.get("protocol", protocol)
    if own != protocol:
        raise UserError(f"{source.name} has statistics of another protocol: {own}, not {protocol}")
    if source.statistics.keys() == {"mu", "sigma"} and protocol.startswith("adm"):
        warnings.warn(f"{source.name} does not name its protocol; pytorch-fid's take --protocol pytorch-fid")


def main():
    """Measure what the flags name, and print, write or save it."""
    args = parse_args()
    device = runs.setup()
    fake = Source(args.samples, args.size, args.num)
    sources = [fake]
    if args.paired:
        sources.append(Source(args.ref, args.size or fake.shape[0], args.num))
    elif args.ref or not args.save_stats:
        sources.append(Source(args.ref or runs.fetch_weights(ADM_REFERENCE, args.weights), args.size))
    real = sources[-1]
    if any(len(source) for source in sources):
        extract, protocol, name = open_features(args, device)
    else:  # statistics alone need no network
        extract = None
        named = [source.statistics["protocol"] for source in sources if "protocol" in source.statistics]
        protocol = named[0] if named else "saved statistics"
        name = "FID" if INCEPTION in protocol or not named else "FD"
    for source in sources:
        check_source(source, protocol, args)
    runs.say_start(device, "fp32", " against ".join(map(str, sources)), protocol)

    # Every process measures its share; the first one continues with the whole.
    if args.paired:
        pairs = compare_pairs(fake, real, args, device)
    for source in sources:
        measure(source, extract, protocol, args, device)
    if runs.rank() > 0:
        return
    if args.save_stats:
        files.write_atomically(args.save_stats, lambda file: np.savez(file, **fake.statistics))
        print(f"statistics of {fake.name} written to {args.save_stats}")
    if real is fake:
        return
    if args.paired:
        numbers = {f"r{name}": distance(fake, real), **pairs}
    else:
        numbers = compare(fake, real, name, device)
    if not args.demo and any(0 < source.num < 10_000 for source in sources):
        warnings.warn(f"{name} of fewer than 10,000 images is biased upward: compare it only at equal "
                      f"numbers")
    shown = "".join(f" +- {value:.5g}" if key.endswith("_std") else f"  {key} {value:.5g}"
                    for key, value in numbers.items() if not math.isnan(value))
    missing = [key for key, value in numbers.items() if math.isnan(value)]
    print(f"{shown.strip()}  ({fake} against {real}, {protocol})")
    if missing:
        print(f"not measured: {', '.join(missing)}")
    if args.json:
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        files.write_json(args.json, {
            **finite, "protocol": protocol, "samples": fake.name, "num": fake.num or None,
            "reference": real.name, "reference_num": real.num or None, "not_measured": missing})


if __name__ == "__main__":
    runs.run_main(main)
