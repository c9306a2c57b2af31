"""Every number about pictures: FID, sFID, IS, precision, recall, KID of samples; PSNR, SSIM, LPIPS of pairs.

    python fid.py samples/                                        against ADM's ImageNet 256x256 statistics
    python fid.py samples/ --ref imagenet/val --size 256          against a tree of images, centre-cropped
    python fid.py samples.npz --ref stats.npz --json out.json     arr_0 (uint8 images) and/or mu and sigma
    python fid.py reconstructions/ --ref imagenet/val --paired    rFID, PSNR, SSIM, LPIPS
    python fid.py samples/ --ref val/ --features dinov2_vits14_pretrain.pth       FD in its CLS token
    python fid.py imagenet/val --size 256 --save-stats val.npz    statistics once, for --ref val.npz later
    torchrun --nproc_per_node=8 -- fid.py samples/                the same numbers, the images shared out
    python fid.py samples/ --demo                                 in the demo's encoder, with no download

FID is comparable only within one protocol: the same resize, Inception weights, reference and number of images
(50,000 as a rule). ADM's evaluator and its reference statistics go with the default, `--protocol adm`.
"""
import functools
import json
import math
import os
import re
import struct
import sys
import time
import warnings
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import svg
from inception import Inception, inception_features, load_inception
from svg import UserError

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"


# -- Images: a folder or an .npz -> uint8 [H, W, 3] --------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Images of one size from `source`, a list of paths or an array uint8 [N, H, W, 3].

    Item -> uint8 [H, W, 3], centre-cropped the ADM way to `size` pixels if that is given; with `originals`,
    Images too, the pair [2, H, W, 3]. Or, as text, what is wrong with it, for an exception that leaves a
    DataLoader's worker has a stack trace for its message.
    """

    def __init__(self, name, source, size=0):
        self.name, self.source, self.size, self.originals = name, source, size, None
        self.files = isinstance(source, list)
        self.shape = self.load(0).shape

    def __len__(self):
        return len(self.source)

    def load(self, i):
        item = self.source[i]
        if not self.files and not self.size:
            return item
        image = svg.open_rgb(item) if self.files else Image.fromarray(item)
        return svg.crop(image, self.size) if self.size else np.asarray(image)

    def __getitem__(self, i):
        try:
            image = self.load(i)
        except UserError as e:
            return str(e)
        if image.shape != self.shape:
            (h, w, _), (h0, w0, _) = image.shape, self.shape
            return (f"{self.source[i]} has {w}x{h} pixels, {self.source[0]} {w0}x{h0}: one size is needed; "
                    f"--size N crops every image to NxN")
        if self.originals is None:
            return image
        original = self.originals[i]
        return original if isinstance(original, str) else np.stack([image, original])


def pair_up(samples, originals, partial):
    """Give samples their originals: files by relative path without suffix, arrays by index.

    UserError names a file without its counterpart; partial: originals may be left over.
    """
    by_key = []
    for images in (samples, originals) if samples.files and originals.files else ():
        by_key.append({})
        for path in images.source:
            key = os.path.splitext(os.path.relpath(path, images.name))[0]
            if key in by_key[-1]:
                raise UserError(f"--paired: {by_key[-1][key]} and {path} differ by suffix alone: rename one")
            by_key[-1][key] = path
    if by_key:
        ours, theirs = by_key
        alone = [path for key, path in ours.items() if key not in theirs]
        alone += [path for key, path in theirs.items() if key not in ours and not partial]
        if alone:
            raise UserError(f"--paired: {alone[0]} has no counterpart ({len(alone)} in all): pairs have one "
                            f"path below {samples.name} and {originals.name}, but for the suffix")
        originals.source = [theirs[key] for key in ours]
    if len(samples) != len(originals) or samples.shape != originals.shape:
        counts = " but ".join(f"{len(s)} images of {s.shape[1]}x{s.shape[0]} pixels in {s.name}"
                              for s in (samples, originals))
        raise UserError(f"--paired: {counts}; --size N crops every image to NxN")
    samples.originals = originals


def collate(items):
    """Images -> uint8 [B, H, W, 3], or the first error among them."""
    return next((i for i in items if isinstance(i, str)), None) or torch.from_numpy(np.stack(items))


def map_images(path):
    """arr_0 of an .npz, or None: memory-mapped within the archive, as np.savez stores it, for ADM's are 2 to
    10 GB; only a compressed one is read whole.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as f:
            if "arr_0.npy" not in archive.namelist():
                return None
            info = archive.getinfo("arr_0.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                return svg.load_npz(path, ("arr_0",))["arr_0"]
            f.seek(info.header_offset + 26)  # the lengths of the name and of the extra field before the data
            f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)
            version = np.lib.format.read_magic(f)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(f)
            return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, zipfile.BadZipFile, struct.error) as e:
        raise UserError(f"{path}: arr_0 is not readable ({svg.brief(e)})") from e


def open_source(path, size=0, num=0):
    """What a folder of images (any depth, sorted by path), a packed set or an .npz holds, as a dict.

    name; images: Images of the folder or of arr_0; of an .npz also mu [D], sigma [D, D], mu_s and sigma_s (of
    the spatial features) and, if they were written here, num and protocol. size: pixels, as in Images; num:
    only the first so many images. UserError for anything else.
    """
    found = {"name": str(path)}
    if os.path.exists(os.path.join(path, "images.npy")):
        images = svg.Packed(path).images
    elif os.path.isdir(path):
        images = svg.list_images(path)
    elif not os.path.exists(path):
        raise UserError(f"{path}: no such folder or .npz file")
    elif not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no folder of images, and no .npz file that is whole")
    else:
        arrays = svg.load_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "num", "protocol"))
        images = map_images(path)
        if "mu" in arrays and "sigma" in arrays:
            found |= {k: v.item() if v.ndim == 0 else v for k, v in arrays.items()}
            numbers = [v for k, v in arrays.items() if k != "protocol"]
            if not all(v.dtype.kind in "fiu" and np.isfinite(v).all() for v in numbers):
                raise UserError(f"{path}: mu or sigma is not finite")
            if (np.diagonal(arrays["sigma"]) < 0).any() or np.ndim(found.get("num", 0)):
                raise UserError(f"{path}: sigma or num is not of a set of images")
            if num:
                raise UserError(f"{path}: holds statistics, so --num {num} cannot choose among its images")
        elif images is None:
            raise UserError(f"{path}: holds neither mu and sigma nor images (arr_0)")
        if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
            raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]")
    if images is None:
        return found
    if num and len(images) < num:
        raise UserError(f"{path}: {len(images)} images, fewer than --num {num}")
    images = images[:num or None]
    if len(images) < 2:
        raise UserError(f"{path}: {len(images)} images found; a covariance takes at least 2")
    return {**found, "images": Images(str(path), images, size)}


# -- Features -> moments -> distances between two sets -----------------------------------------------------

def float64(x):
    """In double precision: on the device, or on the CPU where the device has none (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def moments(features):
    """Features [B, D] -> (count, mean [D], scatter [D, D]), float64; covariance = scatter / (count - 1)."""
    features = float64(features)
    mean = features.mean(0)
    return len(features), mean, (features - mean).T @ (features - mean)


def merge_moments(a, b):
    """Moments of two sets together; no cancellation, so that batches do not matter (Chan et al. 1979)."""
    n, delta = a[0] + b[0], b[1] - a[1]
    return n, a[1] + delta * (b[0] / n), a[2] + b[2] + torch.outer(delta, delta) * (a[0] * b[0] / n)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) in float64 (Heusel et al. 2017, eq. 6).

    Means [D], covariances [D, D], of any rank. UserError if the dimensions differ or anything is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise UserError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} "
                        "do not fit together: they are not of the same features")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance is not finite")

    def root(sigma):  # R [D, rank] with sigma = R R^T: a pivoted Cholesky factor, 6 times faster than eigh
        factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
        out = np.empty((len(sigma), rank))
        out[pivots - 1] = np.tril(factor)[:, :rank]
        return out

    # The trace of (sigma1 sigma2)^(1/2) is the sum of the singular values of R1^T R2.
    cross = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return max(float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross), 0.0)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of `splits` parts in order: mean, standard deviation (Salimans et al. 2016).

    logits: [N, classes], N >= splits.
    """
    scores = []
    for log_p in float64(torch.as_tensor(logits)).log_softmax(1).tensor_split(splits):
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


BLOCK = 4096  # rows: of the N x M distances, only BLOCK x BLOCK are ever in memory (128 MiB)


def neighbour_distance(x, k):
    """[N, D] -> the distance of each row to its k-th nearest other one [N]."""
    out = []
    for rows in x.split(BLOCK):
        near = rows.new_empty((len(rows), 0), dtype=torch.float64)
        for others in x.split(BLOCK):
            near = torch.cat([near, torch.cdist(rows.double(), others.double())], 1)
            near = near.topk(min(k + 1, near.shape[1]), largest=False).values  # + 1: each is its own nearest
        out.append(near.max(1).values)
    return torch.cat(out)


def covered(x, centres, radii):
    """The share of the rows of x [N, D] in at least one of the balls around centres [M, D]."""
    inside = 0
    for rows in x.split(BLOCK):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        for centre, radius in zip(centres.split(BLOCK), radii.split(BLOCK), strict=True):
            hit |= (torch.cdist(rows.double(), centre.double()) <= radius).any(1)
        inside += hit.sum().item()
    return inside / len(x)


def precision_recall(real, fake, k=3):
    """(precision, recall) of features [N, D], [M, D] (Kynkaanniemi et al. 2019).

    Precision is the share of fake images within the distance to the k-th neighbour of some real one, recall
    the other way round. UserError for k images or fewer.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall take more than {k} images, not {len(real)} and {len(fake)}")
    return covered(fake, real, neighbour_distance(real, k)), covered(real, fake, neighbour_distance(fake, k))


def kernel_distance(real, fake):
    """KID: unbiased squared MMD of features [N, D], [M, D], kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Over all pairs, where other tools draw random subsets: the same expectation without their noise.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    dim = real.shape[1]

    def mean(a, b):  # of the kernel; within one set, over the pairs of different images
        total = 0
        for x in a.split(BLOCK):
            total = total + sum(((x.double() @ y.double().T / dim + 1) ** 3).sum() for y in b.split(BLOCK))
            if a is b:
                total = total - ((x.double().square().sum(1) / dim + 1) ** 3).sum()
        return total / (len(a) * (len(b) - (a is b)))

    return (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake)).item()


def expected_bias(sigma, counts):
    """The Frechet distance, to second order, of sets of `counts` images that differ by chance alone.

    A mean of n draws adds tr(sigma) / n, a covariance sum_ij (1 + d_ij) l_i l_j / (l_i + l_j) / 2n with the
    eigenvalues l of sigma. Too low, up to half, if sigma itself is of fewer images than dimensions.
    """
    values = np.linalg.eigvalsh(sigma).clip(1e-30)
    pairs = values[:, None] * values / (values[:, None] + values)
    return (values.sum() + (pairs.sum() + np.trace(pairs)) / 2) * sum(1 / n for n in counts)


# -- Pairs -> numbers per image ----------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 images [B, H, W, 3]: [B], infinite for equal ones."""
    error = (float64(a) - float64(b)).square().flatten(1).mean(1)
    return 10 * torch.log10(255 ** 2 / error)


def ssim(a, b):
    """Structural similarity of uint8 images [B, H, W, 3]: [B] (Wang et al. 2004).

    Gaussian window of 11 pixels, sigma 1.5, mean over RGB and the positions where the window fits. UserError
    for images below 11 pixels.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM takes images of at least 11x11 pixels, not {a.shape[2]}x{a.shape[1]}")
    a, b = (float64(x).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for x in (a, b))  # [B*3, 1, H, W]
    window = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5 ** 2))
    window = (window / window.sum()).view(1, 1, 1, 11)

    def blur(x):
        return F.conv2d(F.conv2d(x, window), window.mT)

    mean_a, mean_b, c1, c2 = blur(a), blur(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
             / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return score.flatten(1).mean(1).view(-1, 3).mean(1)


# -- The command -------------------------------------------------------------------------------------------

def inception(args, device):
    """extract(uint8 images [B, H, W, 3]) -> dict of features [B, 2048], spatial [B, 2023] and, if the weights
    have the classifier, logits [B, 1008]; the protocol in words; the distance's name.
    """
    model = load_inception(svg.fetch_weights(INCEPTION, args.weights)).to(device)
    model.to(memory_format=torch.channels_last)  # 1.6 times the speed on a CPU

    def extract(images):
        out = inception_features(model, images, args.protocol)
        out = {"features": out["pool3"], "spatial": out["spatial"], "logits": out["logits_unbiased"]}
        return {k: v for k, v in out.items() if v is not None}

    return extract, f"{args.protocol} protocol, {INCEPTION}", "FID"


def encoder(args, device):
    """The same for a frozen encoder: features [B, D] alone."""
    if args.demo:
        import demo
        model = svg.load_encoder(demo.ENCODER).to(device)
        return (lambda images: {"features": model(svg.to_float(images, device)).mean(1)},
                f"not Inception FID: mean patch tokens of {demo.ENCODER.name}", "FD-demo-encoder")
    path = svg.fetch_weights(args.features, args.weights)
    model = svg.load_encoder(path).to(device)
    return (lambda images: {"features": model(svg.to_float(images, device), grid=(16, 16), cls=True)[0]},
            (f"{'CLS token' if model.vit.cls else 'mean patch token'} of {path.name} "
             f"({model.fingerprint[:8]}) on 16x16 patches"), f"FD-{model.name}")


def gather(value):
    """The value of every process, in order of rank, on rank 0."""
    if svg.world_size() == 1:
        return [value]
    values = [None] * svg.world_size() if svg.rank() == 0 else None
    dist.gather_object(value, values)
    return values or [value]


def batches(images, args, device):
    """This rank's contiguous share of Images in batches on the device, with a progress line.

    Each image is seen once, whatever the number of processes. UserError for the first bad image.
    """
    count, rank, world = len(images), svg.rank(), svg.world_size()
    mine = torch.utils.data.Subset(images, range(count * rank // world, count * (rank + 1) // world))
    start, done, tty = time.time(), 0, sys.stderr.isatty()
    shown = start
    workers = args.workers if images.files else 0  # an array needs no decoding
    for batch in torch.utils.data.DataLoader(mine, args.batch, num_workers=workers, collate_fn=collate,
                                             pin_memory=device.type == "cuda"):
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch.to(device, non_blocking=True)
        done, now = done + len(batch), time.time()
        last = done == len(mine)
        if rank == 0 and (last or now - shown > (1 if tty else 10)):
            shown = now
            print(f"{images.name}: {count if last else done * world}/{count} images  "
                  f"{done * world / (now - start):.1f} images/s", end="\r" if tty and not last else "\n",
                  file=sys.stderr, flush=True)


def measure(source, extract, protocol, args, device):
    """Add to a source what its images tell: num, protocol, mu, sigma, mu_s, sigma_s, features, logits.

    Rank 0 gets all processes'. Statistics that came with it stay: ADM's are of the whole training set, its
    images 10,000 of that.
    """
    if "images" not in source:
        return source
    total, kept = {}, {"features": [], "logits": []}
    for batch in batches(source["images"], args, device):
        for key, value in extract(batch).items():
            if key in kept:
                kept[key].append(value)
            if key != "logits":
                new = moments(value)
                total[key] = merge_moments(total[key], new) if key in total else new
    parts = gather(({key: (n, mean.cpu(), scatter.cpu()) for key, (n, mean, scatter) in total.items()},
                    {key: torch.cat(values).cpu() for key, values in kept.items() if values}))
    measured = {key: torch.cat([p[key] for _, p in parts if key in p])
                for key in kept if any(key in p for _, p in parts)}  # a process may have had no image
    for key, suffix in (("features", ""), ("spatial", "_s")) if "mu" not in source else ():
        found = [p[key] for p, _ in parts if key in p]
        if found:
            n, mean, scatter = functools.reduce(merge_moments, found)
            if not scatter.isfinite().all():
                raise UserError(f"{source['name']}: features are not finite; are the weights damaged? "
                                f"({protocol})")
            measured |= {"num": n, "protocol": protocol, f"mu{suffix}": mean.numpy(),
                         f"sigma{suffix}": (scatter / (n - 1)).numpy()}
    return {**source, **measured}


def compare(fake, real, name, device):
    """Two measured sources -> every number that they allow, and why the others are missing: two dicts."""
    def distance(suffix=""):
        try:
            return frechet_distance(*(s[key + suffix] for s in (fake, real) for key in ("mu", "sigma")))
        except UserError as e:
            raise UserError(f"{fake['name']} against {real['name']}: {e}") from e

    numbers, missing, logits = {name: distance()}, {}, fake.get("logits")
    if name == "FID":  # the other encoders have features alone
        without = [s["name"] for s in (fake, real) if not {"mu_s", "sigma_s"} <= s.keys()]
        if without:
            missing["sFID"] = f"no mu_s in {without[0]}"
        else:
            numbers["sFID"] = distance("_s")
        if logits is None:
            missing["IS"] = "no classifier (fc) in the weights" if "images" in fake else "no images of it"
        elif len(logits) < 10:
            missing["IS"] = "fewer than 10 images"
        else:
            if fake["images"].files and len({os.path.dirname(path) for path in fake["images"].source}) > 1:
                logits = torch.cat([logits[i::10] for i in range(10)])  # else each split had few classes
            numbers["IS"], numbers["IS_std"] = inception_score(logits)
    without = [s["name"] for s in (fake, real) if "features" not in s]
    if without or min(len(fake["features"]), len(real["features"])) < 4:
        missing["precision, recall, KID"] = f"no images in {without[0]}" if without else "fewer than 4 images"
    else:
        features = [s["features"].to(device if device.type == "cuda" else "cpu") for s in (real, fake)]
        numbers["precision"], numbers["recall"] = precision_recall(*features)
        numbers["KID"] = kernel_distance(*features)
    return numbers, missing


def compare_pairs(images, args, device):
    """Images with originals -> PSNR, SSIM, LPIPS (VGG16) with standard deviations, and what is missing."""
    lpips, scores = None, []
    if not args.demo:
        import train_ae
        lpips = train_ae.LPIPS(svg.fetch_weights("vgg16-397923af.pth", args.weights)).to(device)
    for batch in batches(images, args, device):  # [B, 2, H, W, 3]
        a, b = batch.unbind(1)
        rows = [psnr(a, b), ssim(a, b)]
        with torch.inference_mode():
            rows += [lpips(svg.to_float(b, device), svg.to_float(a, device))] if lpips else []
        scores.append(torch.stack([row.cpu().double() for row in rows], 1))
    scores = [part for parts in gather(scores) for part in parts]
    scores, numbers = torch.cat(scores or [torch.zeros(1, 0)]).numpy(), {}
    for key, column in zip(("PSNR", "SSIM", "LPIPS"), scores.T, strict=False):
        finite = np.isfinite(column).all()  # PSNR is infinite for an exact copy
        numbers |= {key: float(column.mean()), f"{key}_std": float(column.std()) if finite else math.nan}
    return numbers, {} if lpips else {"LPIPS": "--demo downloads nothing"}


def write(path, flag, save):
    """Write a file as a whole or not at all; UserError names the flag."""
    try:
        svg.write_atomically(path, save)
    except OSError as e:
        raise UserError(f"{flag} {path}: could not be written ({e.strerror})") from e


def parse_args():
    """The command line; UserError for a flag that is wrong or out of place."""
    parser = svg.Parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", default="samples/",
        help="folder of images (of any depth), or .npz with arr_0 (uint8 [N, H, W, 3]) or with mu and sigma")
    add("--ref", help="what to compare with, of the same kinds; a bare name is also looked for in the "
        f"weights folder (default: {ADM_REFERENCE} there, 2 GB, downloaded on first use)")
    add("--protocol", choices=("adm", "pytorch-fid"), default="adm",
        help="resize to Inception's 299 pixels as ADM's evaluator (TensorFlow 1) or as pytorch-fid does it")
    add("--features", metavar="FILE",
        help="instead of Inception's, the CLS token of this encoder: a file in the weights folder, or a path")
    add("--paired", action="store_true", help="rFID, PSNR, SSIM and LPIPS of reconstructions of --ref, "
        "paired by relative path without suffix (arrays: by index)")
    add("--size", type=svg.not_negative, default=0, metavar="N",
        help="pixels: first centre-crop every image to NxN as ADM does; 0: as they are, all of one size "
        "(--paired: --ref to the samples' size)")
    add("--num", type=svg.not_negative, default=0, metavar="N",
        help="images: score exactly the first N of the samples, sorted by path; 0: all")
    add("--batch", type=svg.positive, default=64, help="images per step; the result does not depend on it")
    add("--workers", type=svg.not_negative, default=min(4, os.cpu_count() or 1),
        help="processes that decode images, per process that measures; 0: this one does")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--save-stats", metavar="OUT.npz",
        help="write the samples' statistics, for --ref, pytorch-fid or ADM; without --ref, only that")
    add("--json", metavar="OUT.json", help="write the numbers and what they were measured on")
    add("--demo", action="store_true",
        help="features of the demo's encoder instead of Inception's; without --ref, against its images")
    svg.add_bench_flag(parser)
    parser.set_defaults(precision="fp32", compile=False)  # other ways would give another FID
    svg.refuse_idle({"--demo": "--features --protocol", "--features": "--protocol", "--bench": (
        "--ref --features --paired --size --num --workers --weights --save-stats --json --demo")})
    args = parser.parse_args()
    for flag, path in (("--save-stats", args.save_stats), ("--json", args.json)):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{flag} {path}: no such folder")
    for flag in ("paired", "features"):
        if getattr(args, flag) and not args.ref and not (args.save_stats and flag == "features"):
            raise UserError(f"--{flag} needs --ref: ADM's file holds Inception's statistics alone")
    return args


def open_reference(args, samples):
    """The reference as open_source gives it, or None where only statistics are to be saved."""
    if args.ref is None and args.demo:
        import demo
        data = demo.dataset("val", 1000)
        name, array = "the demo's validation set", np.stack([data[i, i][0] for i in range(1000)])
        return {"name": name, "images": Images(name, array, args.size)}
    if args.ref is None and args.save_stats:
        return None
    ref, size = args.ref or ADM_REFERENCE, args.size
    if args.paired and not size and "images" in samples:
        size = samples["images"].shape[0]
    if not os.path.exists(ref) and os.path.basename(ref) == ref:
        ref = svg.fetch_weights(ref, args.weights)
    return open_source(ref, size)


def bench(args, device):
    """Time features and moments of synthetic images of 256 pixels, the weights being random."""
    model = Inception().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def make(n):
        images = svg.synthetic_images(n, 256, device)
        return lambda: moments(inception_features(
            model, images.to(device, non_blocking=True), args.protocol)["pool3"])

    svg.bench(args, device, make, args.batch * svg.world_size(), script="fid")


def main():
    """Measure what the flags name, and print, write or save it."""
    args = parse_args()
    device = svg.setup()
    if args.bench:
        return bench(args, device)
    samples = open_source(args.samples, args.size, args.num)
    reference = open_reference(args, samples)
    sources = [s for s in (samples, reference) if s]
    extract, protocol, name = None, None, None
    if any("images" in s for s in sources):
        extract, protocol, name = (encoder if args.demo or args.features else inception)(args, device)
    for s in sources:
        if "mu" in s:
            own = s.get("protocol")
            protocol = protocol or own
            if own and own != protocol:
                raise UserError(f"{s['name']} was measured by another protocol: {own}, not {protocol}")
            if not own and args.features:
                raise UserError(f"{s['name']}: holds statistics of unknown features; --features takes images")
            if not own and "mu_s" not in s and (name, args.protocol) == ("FID", "adm"):
                warnings.warn(f"{s['name']} does not name its protocol; "
                              "pytorch-fid's take --protocol pytorch-fid")
    name = name or ("FID" if INCEPTION in (protocol or INCEPTION) else "FD")  # FD of saved statistics

    paired = None
    if args.paired:
        if not all("images" in s and "mu" not in s for s in sources):
            raise UserError("--paired takes images on both sides, not statistics")
        pair_up(samples["images"], reference["images"], partial=bool(args.num))
        paired = compare_pairs(samples["images"], args, device)
        samples["images"].originals = None
    fake = measure(samples, extract, protocol, args, device)
    real = reference and measure(reference, extract, protocol, args, device)
    if svg.rank():
        return
    if args.save_stats:
        kept = {k: fake[k] for k in ("mu", "sigma", "mu_s", "sigma_s", "num", "protocol") if k in fake}
        write(args.save_stats, "--save-stats", lambda f: np.savez(f, **kept))
        print(f"statistics of {fake['name']} written to {args.save_stats}", file=sys.stderr)
    if real is None:
        return
    numbers, missing = paired or compare(fake, real, name, device)
    if paired:
        distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
        numbers = {f"r{name}": distance, **numbers}
    counts = [s["num"] for s in (fake, real) if "num" in s]
    if not args.demo and min(counts, default=10000) < 10000:
        chance = "" if paired else f", here by about {expected_bias(real['sigma'], counts):.3g} or more"
        warnings.warn(f"{name} of fewer than 10,000 images is biased upward{chance}; compare it only at "
                      "equal numbers")
    if args.json:
        result = {**{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "protocol": protocol,
                  "samples": fake["name"], "num": fake.get("num"), "reference": real["name"],
                  "reference_num": real.get("num"), "not_measured": missing}
        write(args.json, "--json", lambda f: f.write(json.dumps(result, indent=1).encode() + b"\n"))
    shown = "  ".join(f"{k} {v:.{6 if k == 'KID' else 4}f}" for k, v in numbers.items())
    sides = " against ".join(
        f"{s['num']} images of {s['name']}" if "num" in s else s["name"] for s in (fake, real))
    print(re.sub(r"  \w+_std ", " +- ", f"{shown}  ({sides}, {protocol or 'saved statistics'})"))
    if missing:
        print("not measured: " + "; ".join(f"{k} ({v})" for k, v in missing.items()))


if __name__ == "__main__":
    svg.run_main(main)
