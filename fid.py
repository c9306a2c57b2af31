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
import math
import os
import struct
import warnings
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import data
import files
import runs
import shapes
import svg
from files import UserError
from perceptual import LPIPS, Inception, inception_features, load_inception

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
DEMO_REFERENCE = "shapes://val"
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

    Means [D], covariances [D, D] of any rank; in float64. UserError if they do not fit or are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        raise UserError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} "
                        f"do not fit together: they are not of the same features")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance is not finite")

    def root(sigma):  # R [D, rank] with sigma = R R^T: a pivoted Cholesky factor, 6 times faster than eigh
        factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
        out = np.empty((len(sigma), rank))
        out[pivots - 1] = np.tril(factor)[:, :rank]
        return out

    # The trace of (sigma1 sigma2)^(1/2) is the sum of the singular values of R1^T R2.
    cross = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


def expected_bias(sigma, counts):
    """Return the Frechet distance, to second order, of sets of `counts` images that differ by chance alone.

    A mean of n draws adds tr(sigma) / n, a covariance sum_ij (1 + d_ij) l_i l_j / (l_i + l_j) / 2n with the
    eigenvalues l of sigma. Too low, up to half, if sigma itself is of fewer images than dimensions.
    """
    values = np.linalg.eigvalsh(sigma).clip(1e-30)
    pairs = np.outer(values, values) / np.add.outer(values, values)
    bias = values.sum() + (pairs.sum() + np.trace(pairs)) / 2
    return bias * sum(1 / n for n in counts)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of `splits` parts in order: mean, standard deviation (Salimans et al. 2016).

    logits: [N, classes], N >= splits.
    """
    scores = []
    for log_p in float64(torch.as_tensor(logits)).log_softmax(1).tensor_split(splits):
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def neighbour_distances(x, k):
    """Return the distance of each of x [N, D] to its k-th nearest neighbour among the others, [N]."""
    # k + 1, for each is its own nearest.
    nearest = [torch.cdist(rows, x).topk(k + 1, largest=False).values for rows in x.split(BLOCK)]
    return torch.cat(nearest).amax(1)


def precision_recall(real, fake, k=3):
    """Return precision and recall of features [N, D], [M, D] (Kynkaanniemi et al. 2019).

    Precision is the share of fake images within the distance to the k-th neighbour of some real one, recall
    the other way round. UserError for k images or fewer.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall take more than {k} images, not {len(real)} and {len(fake)}")
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

class Images(torch.utils.data.Dataset):
    """Images of one size, uint8 [H, W, 3]; UserError names one that is unreadable or of another size.

    source: paths, or an array uint8 [N, H, W, 3]. size: pixels to crop to; 0: as they are.
    """

    def __init__(self, name, source, size=0):
        self.name = name
        self.source = source
        self.size = size
        self.files = isinstance(source, list)
        self.shape = None
        self.shape = self[0].shape

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image = data.open_rgb(self.source[i]) if self.files else Image.fromarray(self.source[i])
        image = data.crop(image, self.size) if self.size else np.array(image)
        if self.shape and image.shape != self.shape:
            raise UserError(f"{self.source[i]} has {pixels(image.shape)}, {self.source[0]} has "
                            f"{pixels(self.shape)}: one size is needed; --size N crops every image to NxN")
        return image


def pixels(shape):
    """Return "64x48 pixels" for an array of shape [48, 64, 3]."""
    return f"{shape[1]}x{shape[0]} pixels"


def files_by_key(images):
    """Return a dict of the files of Images by their path below the folder, without suffix."""
    by_key = {}
    for path in images.source:
        key = os.path.splitext(os.path.relpath(path, images.name))[0]
        if key in by_key:
            raise UserError(f"--paired: {by_key[key]} and {path} differ by suffix alone: rename one")
        by_key[key] = path
    return by_key


def pair_up(samples, originals, partial):
    """Return originals in the samples' order: files by relative path without suffix, arrays by index.

    partial: some may be left over. UserError names a file without its counterpart.
    """
    if samples.files and originals.files:
        ours = files_by_key(samples)
        theirs = files_by_key(originals)
        alone = [path for key, path in ours.items() if key not in theirs]
        if not partial:
            alone += [path for key, path in theirs.items() if key not in ours]
        if alone:
            raise UserError(f"--paired: {alone[0]} has no counterpart ({len(alone)} in all): pairs have one "
                            f"path below {samples.name} and {originals.name}, but for the suffix")
        originals = Images(originals.name, [theirs[key] for key in ours], originals.size)
    if len(samples) != len(originals) or samples.shape != originals.shape:
        sides = [f"{len(images)} images of {pixels(images.shape)} in {images.name}"
                 for images in (samples, originals)]
        raise UserError(f"--paired: {' but '.join(sides)}; --size N crops every image to NxN")
    return originals


def map_images(path):
    """Return arr_0 of an .npz, memory-mapped unless it is compressed (ADM's are 2 to 10 GB), or None."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        if "arr_0.npy" not in archive.namelist():
            return None
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return files.load_npz(path, ("arr_0",))["arr_0"]
        file.seek(info.header_offset + 26)  # the lengths of the name and of the extra field before the data
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version, _ = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version}_0")
        shape, fortran, dtype = read_header(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def open_npz(path):
    """Return the statistics (a dict, maybe empty) and the images (an array, or None) of an .npz."""
    try:
        images = map_images(path)
    except (OSError, ValueError, zipfile.BadZipFile, struct.error) as e:
        raise UserError(f"{path}: no folder of images and no whole .npz ({files.short_error(e)})") from e
    arrays = files.load_npz(path, STATISTICS)
    statistics = {key: array.item() if array.ndim == 0 else array for key, array in arrays.items()}
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3
                               or 0 in images.shape):
        raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]")
    if "mu" not in arrays or "sigma" not in arrays:
        if images is None:
            raise UserError(f"{path}: holds neither mu and sigma nor images (arr_0)")
        return {}, images
    for key, array in arrays.items():
        if key != "protocol" and (array.dtype.kind not in "fiu" or not np.isfinite(array).all()):
            raise UserError(f"{path}: {key} is not finite")
    sigma = arrays["sigma"]
    num = statistics.get("num", 2)
    if sigma.ndim != 2 or (np.diagonal(sigma) < 0).any() or np.ndim(num) or num < 2 or num != int(num):
        raise UserError(f"{path}: sigma or num is not that of a set of images")
    if not isinstance(statistics.get("protocol", ""), str):
        raise UserError(f"{path}: its protocol is not text")
    return statistics, images


def open_source(path, size=0, num=0):
    """Return what a folder (any depth, sorted by path), a packed set, an .npz or a split of shapes holds.

    A dict of name, images (Images of the first `num`) and, of an .npz, those STATISTICS that it has.
    """
    statistics = {}
    if path in shapes.SPLITS:
        images = shapes.pictures(path, num or 1000)
    elif os.path.exists(os.path.join(path, "images.npy")):
        images = data.Packed(path).images
    elif os.path.isdir(path):
        images = data.list_images(path)
        recorded = [name for name in files.read_record(path).get("files", [])
                    if not name.startswith(files.OVERVIEW)]
        if len(images) < len(recorded):
            warnings.warn(f"{path}: {len(images)} images, but its record says {len(recorded)}: its program "
                          f"was stopped, or images were removed")
    else:
        statistics, images = open_npz(path)
    if statistics and num:
        raise UserError(f"{path}: holds statistics, so --num {num} cannot choose among its images")
    if images is None:
        return {"name": path, **statistics}
    if len(images) < num:
        raise UserError(f"{path}: {len(images)} images, fewer than --num {num}")
    images = images[:num or None]
    if len(images) < 2:
        raise UserError(f"{path}: {len(images)} images found; a covariance takes at least 2")
    return {"name": path, **statistics, "images": Images(path, images, size)}


# -- Images -> features -> numbers -------------------------------------------------------------------------

def open_features(args, device):
    """Return how images are compared: a function extract, the protocol in words, the distance's name.

    extract: uint8 images [B, H, W, 3] -> a dict of features [B, D]; Inception's have spatial [B, 2023] too,
    and logits [B, 1008] if the weights have the classifier.
    """
    if args.demo:
        model = svg.load_encoder(shapes.DEMO_PT).to(device)

        def extract(images):
            return {"features": model(data.to_float(images, device)).mean(1)}
        return extract, f"not Inception FID: mean patch tokens of {shapes.DEMO_PT.name}", "FD-demo-encoder"

    if args.features:
        path = runs.fetch_weights(args.features, args.weights)
        model = svg.load_encoder(path).to(device)

        def extract(images):
            return {"features": model(data.to_float(images, device), grid=(16, 16), cls=True)[0]}
        token = "CLS token" if model.vit.cls else "mean patch token"
        protocol = f"{token} of {path.name} ({model.fingerprint[:8]}) on 16x16 patches"
        return extract, protocol, f"FD-{model.name}"

    model = load_inception(runs.fetch_weights(INCEPTION, args.weights)).to(device)

    def extract(images):
        out = inception_features(model, images, args.protocol)
        out = {"features": out["pool3"], "spatial": out["spatial"], "logits": out["logits_unbiased"]}
        return {key: value for key, value in out.items() if value is not None}
    return extract, f"{args.protocol} protocol, {INCEPTION}", "FID"


def choose_features(sources, args, device):
    """Return open_features, or what the statistics say where there are no images.

    UserError for statistics of other features.
    """
    protocols = [source["protocol"] for source in sources if "protocol" in source]
    if any("images" in source for source in sources):
        extract, protocol, name = open_features(args, device)
    else:
        extract = None
        protocol = protocols[0] if protocols else None
        name = "FID" if protocol is None or INCEPTION in protocol else "FD"
    for source in sources:
        own = source.get("protocol")
        if own and own != protocol:
            raise UserError(f"{source['name']} was measured by another protocol: {own}, not {protocol}")
        if "mu" in source and not own:
            if args.features:
                raise UserError(f"{source['name']}: statistics of unknown features; --features takes images")
            if extract and "mu_s" not in source and protocol == f"adm protocol, {INCEPTION}":
                warnings.warn(f"{source['name']} does not name its protocol; "
                              f"pytorch-fid's take --protocol pytorch-fid")
    return extract, protocol, name


def batches(images, args, device):
    """Yield this process's share of Images, each once, in batches on the device, with a progress line."""
    world = runs.world_size()
    share = range(len(images) * runs.rank() // world, len(images) * (runs.rank() + 1) // world)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, share), args.batch, pin_memory=device.type == "cuda",
        num_workers=args.workers if images.files else 0)  # an array needs no decoding
    for batch in runs.progress(loader, images.name, len(images)):
        yield batch.to(device, non_blocking=True)


def measure(source, extract, protocol, args, device):
    """Return a source with what its images tell: features, logits, and STATISTICS if it has none.

    Statistics that came with it stay: ADM's are of the whole training set, its images 10,000 of that.
    """
    if "images" not in source:
        return source
    totals = {}
    kept = {}
    for batch in batches(source["images"], args, device):
        for key, value in extract(batch).items():
            if key != "logits":
                new = moments(value)
                totals[key] = merge_moments(totals[key], new) if key in totals else new
            if key != "spatial":
                kept.setdefault(key, []).append(value)

    # Those of all processes together; a process may have had no image.
    totals = {key: (count, mean.cpu(), scatter.cpu()) for key, (count, mean, scatter) in totals.items()}
    kept = {key: torch.cat(values).cpu() for key, values in kept.items()}
    parts = [part for part in runs.gather((totals, kept)) if part[0]]
    if runs.rank() > 0:
        return source
    measured = {key: torch.cat([kept[key] for _, kept in parts]) for key in parts[0][1]}
    if "mu" in source:
        return {**source, **measured}
    for key in parts[0][0]:
        count, mean, scatter = functools.reduce(merge_moments, [totals[key] for totals, _ in parts])
        if not scatter.isfinite().all():
            raise UserError(f"{source['name']}: features are not finite: damaged weights? ({protocol})")
        suffix = "_s" if key == "spatial" else ""
        measured[f"mu{suffix}"] = mean.numpy()
        measured[f"sigma{suffix}"] = (scatter / (count - 1)).numpy()
    return {**source, **measured, "num": count, "protocol": protocol}


def source_distance(fake, real, suffix=""):
    """Return the Frechet distance of two measured sources; UserError names both."""
    mu = f"mu{suffix}"
    sigma = f"sigma{suffix}"
    try:
        return frechet_distance(fake[mu], fake[sigma], real[mu], real[sigma])
    except UserError as e:
        raise UserError(f"{fake['name']} against {real['name']}: {e}") from e


def compare(fake, real, name, device):
    """Return every number that two measured sources allow, and why the others are missing: two dicts."""
    def without(key):
        return [source["name"] for source in (fake, real) if key not in source]

    numbers = {name: source_distance(fake, real)}
    missing = {}
    if name == "FID":  # the other encoders have features alone
        if without("mu_s"):
            missing["sFID"] = f"no mu_s in {without('mu_s')[0]}"
        else:
            numbers["sFID"] = source_distance(fake, real, "_s")
        if "images" not in fake:
            missing["IS"] = "no images of it"
        elif "logits" not in fake:
            missing["IS"] = "no classifier (fc) in the weights"
        elif len(fake["logits"]) < 10:
            missing["IS"] = "fewer than 10 images"
        else:
            logits = fake["logits"]
            if fake["images"].files and len({os.path.dirname(path) for path in fake["images"].source}) > 1:
                logits = torch.cat([logits[i::10] for i in range(10)])  # else each split had few classes
            numbers["IS"], numbers["IS_std"] = inception_score(logits)
    if without("features"):
        missing["precision, recall, KID"] = f"no images in {without('features')[0]}"
    elif min(len(fake["features"]), len(real["features"])) < 4:
        missing["precision, recall, KID"] = "fewer than 4 images"
    else:
        device = device if device.type == "cuda" else "cpu"
        features = [source["features"].to(device) for source in (real, fake)]
        numbers["precision"], numbers["recall"] = precision_recall(*features)
        numbers["KID"] = kernel_distance(*features)
    return numbers, missing


def compare_pairs(samples, originals, args, device):
    """Return PSNR, SSIM and LPIPS (VGG16) with standard deviations, and what is missing: two dicts."""
    lpips = None
    if args.lpips:
        lpips = LPIPS(runs.fetch_weights(args.lpips, args.weights)).to(device)
    scores = []
    for a, b in zip(batches(samples, args, device), batches(originals, args, device), strict=True):
        batch = [psnr(a, b), ssim(a, b)]
        if lpips:
            with torch.inference_mode():
                batch.append(lpips(data.to_float(b, device), data.to_float(a, device)))
        scores.append(torch.stack([score.cpu().double() for score in batch]))
    parts = runs.gather(scores)
    if runs.rank() > 0:
        return {}, {}
    scores = torch.cat([batch for part in parts for batch in part], 1)
    numbers = {}
    for name, score in zip(("PSNR", "SSIM", "LPIPS"), scores):
        numbers[name] = score.mean().item()
        numbers[f"{name}_std"] = score.std(correction=0).item()  # nan if PSNR is infinite
    return numbers, {} if lpips else {"LPIPS": "--demo downloads nothing"}


def report(numbers, missing, fake, real, protocol, path=None):
    """Print the numbers, what they were measured on and what is missing; write the same as JSON to `path`."""
    if path:
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        files.write_json(path, {
            **finite, "protocol": protocol, "samples": fake["name"], "num": fake.get("num"),
            "reference": real["name"], "reference_num": real.get("num"), "not_measured": missing})
    shown = ""
    for key, value in numbers.items():
        text = f"{value:.6f}" if key == "KID" else f"{value:.4f}"
        shown += f" +- {text}" if key.endswith("_std") else f"  {key} {text}"
    sides = [f"{s['num']} images of {s['name']}" if "num" in s else s["name"] for s in (fake, real)]
    print(f"{shown.strip()}  ({' against '.join(sides)}, {protocol or 'saved statistics'})")
    if missing:
        print("not measured: " + "; ".join(f"{key} ({why})" for key, why in missing.items()))


# -- The command -------------------------------------------------------------------------------------------

def parse_args():
    """Parse the command line; UserError for a flag that is wrong or out of place."""
    parser = runs.Parser(__doc__, demo={"ref": DEMO_REFERENCE, "lpips": None, "enough": 0})
    parser.set_defaults(lpips="vgg16-397923af.pth", enough=10_000)  # images, below which FID's bias is named
    parser.set_defaults(precision="fp32", compile=False)  # other ways would give another FID
    add = parser.add_argument
    add("samples", nargs="?", default="samples/",
        help="folder of images (of any depth), or .npz with arr_0 (uint8 [N, H, W, 3]) or with mu and sigma")
    add("--ref", help="what to compare with, of the same kinds; a bare name is also looked for in the "
        f"weights folder (default: {ADM_REFERENCE} there, 2 GB, downloaded on first use)")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--protocol", choices=("adm", "pytorch-fid"), default="adm",
               help="resize to Inception's 299 pixels as ADM's evaluator (TensorFlow 1) or as pytorch-fid")
    add_one_of("--features", metavar="FILE", help="instead of Inception's, the CLS token of this encoder: "
               "a file in the weights folder, or a path")
    add_one_of("--demo", action="store_true",
               help="features of the demo's encoder instead; without --ref, against the demo's images")
    add("--paired", action="store_true", help="rFID, PSNR, SSIM and LPIPS of reconstructions of --ref, "
        "paired by relative path without suffix (arrays: by index)")
    add("--size", type=runs.not_negative, default=0, metavar="N", help="pixels: first centre-crop every "
        "image to NxN as ADM does; 0: as they are, all of one size (--paired: --ref to the samples' size)")
    add("--num", type=runs.not_negative, default=0, metavar="N",
        help="images: score exactly the first N of the samples, sorted by path; 0: all")
    add("--batch", type=runs.positive, default=64, help="images per step; the result does not depend on it")
    add("--workers", type=runs.not_negative, default=min(4, os.cpu_count() or 1),
        help="processes that decode images, per process that measures; 0: this one does")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--save-stats", metavar="OUT.npz", type=runs.new_file,
        help="write the samples' statistics, for --ref, pytorch-fid or ADM; without --ref, only that")
    add("--json", metavar="OUT.json", type=runs.new_file,
        help="write the numbers and what they were measured on")
    runs.add_bench_flag(parser)
    args = parser.parse_args()
    for flag, path in (("--save-stats", args.save_stats), ("--json", args.json)):
        for source in (args.samples, args.ref):
            if path and source and os.path.exists(source) and runs.lies_in(path, source):
                raise UserError(f"{flag} {path} would write into {source}, which is measured: give another "
                                f"place")
    if args.paired and args.ref in (None, DEMO_REFERENCE):
        raise UserError("--paired needs --ref, the originals")
    if args.features and not args.ref and not args.save_stats:
        raise UserError("--features needs --ref: ADM's file holds Inception's statistics alone")
    return args


def open_reference(args, samples):
    """Return the reference as open_source does, or None where only statistics are to be saved."""
    if args.ref is None and args.save_stats:
        return None
    ref = args.ref or ADM_REFERENCE
    size = args.size
    if args.paired and not size and "images" in samples:
        size = samples["images"].shape[0]
    if not os.path.exists(ref) and os.path.basename(ref) == ref:
        ref = runs.fetch_weights(ref, args.weights)
    return open_source(str(ref), size)


def bench(args, device):
    """Time features and moments of synthetic images of 256 pixels, the weights being random."""
    model = Inception().eval().requires_grad_(False).to(device)

    def make(n):
        images = runs.synthetic_images(n, 256, device)

        def step():
            out = inception_features(model, images.to(device, non_blocking=True), args.protocol)
            moments(out["pool3"])
        return step
    runs.bench(args, device, make, args.batch * runs.world_size(), script="fid")


def main():
    """Measure what the flags name, and print, write or save it."""
    args = parse_args()
    device = runs.setup()
    if args.bench:
        return bench(args, device)
    samples = open_source(args.samples, args.size, args.num)
    reference = open_reference(args, samples)
    sources = [source for source in (samples, reference) if source]
    extract, protocol, name = choose_features(sources, args, device)
    counts = [f"{s['name']}: {len(s['images']):,} images" if "images" in s else s["name"] for s in sources]
    runs.say_start(device, args.precision, " against ".join(counts), protocol or "saved statistics")

    # Every process measures its share; the first one continues with the whole.
    if args.paired:
        if any("mu" in source or "images" not in source for source in sources):
            raise UserError("--paired takes images on both sides, not statistics")
        reference["images"] = pair_up(samples["images"], reference["images"], partial=bool(args.num))
        numbers, missing = compare_pairs(samples["images"], reference["images"], args, device)
    fake = measure(samples, extract, protocol, args, device)
    real = measure(reference, extract, protocol, args, device) if reference else None
    if runs.rank() > 0:
        return

    if args.save_stats:
        kept = {key: fake[key] for key in STATISTICS if key in fake}
        files.write_atomically(args.save_stats, lambda file: np.savez(file, **kept))
        print(f"statistics of {fake['name']} written to {args.save_stats}")
    if real is None:
        return
    if args.paired:
        numbers = {f"r{name}": source_distance(fake, real), **numbers}
    else:
        numbers, missing = compare(fake, real, name, device)
    counts = [source["num"] for source in (fake, real) if "num" in source]
    if min(counts, default=args.enough) < args.enough:
        bias = "" if args.paired else f", here by about {expected_bias(real['sigma'], counts):.3g} or more"
        warnings.warn(f"{name} of fewer than 10,000 images is biased upward{bias}; compare it only at equal "
                      f"numbers")
    report(numbers, missing, fake, real, protocol, args.json)


if __name__ == "__main__":
    runs.run_main(main)
