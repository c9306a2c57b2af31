"""Every number about pictures: FID of a folder of images against a reference, by ADM's or pytorch-fid's rule.

    python fid.py samples/                                        against ADM's ImageNet 256x256 statistics
    python fid.py samples/ --ref imagenet/val --size 256          against a tree of images, centre-cropped
    python fid.py samples.npz --ref other.npz --resize pytorch    arr_0 (uint8 images) or mu and sigma
    python fid.py imagenet/val --size 256 --save-stats val.npz    statistics once, for --ref val.npz later
    python fid.py samples/ --demo                                 in the demo's encoder, with no download

FID is comparable only within one protocol: the same resize, Inception weights, reference and number of images
(50,000 as a rule). ADM's evaluator and its reference statistics go with the default, `--resize tf1`.
"""
import os
import sys
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import svg
from svg import UserError

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
ADM_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/{ADM_REFERENCE}"


# -- Images: a folder or an .npz -> uint8 [H, W, 3] --------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Images of one size from `source`, a list of paths or an array uint8 [N, H, W, 3].

    Item -> uint8 [H, W, 3], centre-cropped the ADM way to `size` pixels if that is given; or, as text, what
    is wrong with it, for an exception that leaves a DataLoader's worker has a stack trace for its message.
    """

    def __init__(self, name, source, size=None):
        self.name, self.source, self.size = name, source, size
        self.shape = self.load(0).shape

    def __len__(self):
        return len(self.source)

    def load(self, i):
        item = self.source[i]
        image = svg.open_rgb(item) if isinstance(item, str) else Image.fromarray(item)
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
        return image


def collate(items):
    """Images -> uint8 [B, H, W, 3], or the first error among them."""
    return next((i for i in items if isinstance(i, str)), None) or torch.from_numpy(np.stack(items))


def open_source(path, size=None, num=None):
    """Images of a folder (any depth, sorted by path) or of an .npz (arr_0), or the statistics of an .npz.

    size: pixels, as in Images; num: only the first so many images. Statistics: a dict of mu [D], sigma [D, D]
    and, if they were written here, num and protocol. UserError for anything else.
    """
    if os.path.isdir(path):
        source = svg.list_images(path)
    elif not os.path.exists(path):
        adm = os.path.basename(path) == ADM_REFERENCE
        raise UserError(f"{path}: no such folder or .npz file" + (
            f"; download it from {ADM_URL}, or name another reference by --ref" if adm else ""))
    elif not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no folder of images, and no .npz file that is whole")
    else:
        arrays = svg.load_npz(path, ("mu", "sigma", "num", "protocol"))  # not ADM's 2 GB of images beside them
        if "mu" in arrays and "sigma" in arrays:
            if num:
                raise UserError(f"{path}: holds statistics, so --num {num} cannot choose among its images")
            stats = {"name": str(path), **{k: arrays.get(k) for k in ("mu", "sigma", "num", "protocol")}}
            if not np.isfinite(stats["mu"]).all() or not np.isfinite(stats["sigma"]).all():
                raise UserError(f"{path}: mu or sigma is not finite")
            return stats
        source = svg.load_npz(path, ("arr_0",)).get("arr_0")
        if source is None:
            raise UserError(f"{path}: holds neither mu and sigma nor images (arr_0)")
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[-1] != 3:
            raise UserError(f"{path}: arr_0 is {source.dtype} {list(source.shape)}, not uint8 [N, H, W, 3]")
    if num and len(source) < num:
        raise UserError(f"{path}: {len(source)} images, fewer than --num {num}")
    source = source[:num or None]
    if len(source) < 2:
        raise UserError(f"{path}: {len(source)} images found; a covariance takes at least 2")
    return Images(str(path), source, size)


# -- Images -> features: the Inception network of the FID, a TensorFlow graph of 2015-12-05 ----------------

class ConvBN(nn.Module):
    """Convolution, batch normalisation, ReLU; padded to keep the size, or not at all (same=False)."""

    def __init__(self, cin, cout, kernel, stride=1, same=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.conv = nn.Conv2d(cin, cout, kernel, stride, [k // 2 for k in kernel] if same else 0, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated; each is a chain of convolutions (width, kernel).

    A list of kernels stands for convolutions side by side in the chain. A block with a `_pool` branch keeps
    the grid; one without ends its branches with stride 2 and adds the max-pooled input.
    """

    def __init__(self, cin, branches, pool="avg"):
        super().__init__()
        self.pool, self.reduce, self.chains = pool, "_pool" not in branches, {}
        for branch, chain in branches.items():
            width, steps = cin, []
            for i, (cout, kernels) in enumerate(chain, 1):
                name = f"branch{branch}_{i}" if len(chain) > 1 else f"branch{branch}"
                parts = {name: kernels}
                if isinstance(kernels, list):
                    parts = {name + "a": kernels[0], name + "b": kernels[1]}
                stride = 2 if self.reduce and i == len(chain) else 1
                for part, kernel in parts.items():
                    self.add_module(part, ConvBN(width, cout, kernel, stride, same=stride == 1))
                steps.append(list(parts))
                width = cout * len(parts)
            self.chains[branch] = steps

    def forward(self, x):
        out = []
        for branch, steps in self.chains.items():
            h = x
            if branch == "_pool":
                h = (F.max_pool2d(x, 3, 1, 1) if self.pool == "max"
                     else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            for parts in steps:
                h = torch.cat([getattr(self, part)(h) for part in parts], 1)
            out.append(h)
        return torch.cat(out + ([F.max_pool2d(x, 3, 2)] if self.reduce else []), 1)


def mixed_blocks():
    """The blocks in order: name, input width, branches, pooling."""
    def grid35(pool):
        return {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)],
                "_pool": [(pool, 1)]}

    def grid17(c):
        row, column = (1, 7), (7, 1)
        return {"1x1": [(192, 1)], "7x7": [(c, 1), (c, row), (192, column)],
                "7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)], "_pool": [(192, 1)]}

    cross = [(1, 3), (3, 1)]
    grid8 = {"1x1": [(320, 1)], "3x3": [(384, 1), (384, cross)], "3x3dbl": [(448, 1), (384, 3), (384, cross)],
             "_pool": [(192, 1)]}
    to17 = {"3x3": [(384, 3)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    to8 = {"3x3": [(192, 1), (320, 3)], "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
    return [("5b", 192, grid35(32)), ("5c", 256, grid35(64)), ("5d", 288, grid35(64)), ("6a", 288, to17),
            ("6b", 768, grid17(128)), ("6c", 768, grid17(160)), ("6d", 768, grid17(160)),
            ("6e", 768, grid17(192)), ("7a", 768, to8), ("7b", 1280, grid8), ("7c", 2048, grid8, "max")]


class Inception(nn.Module):
    """Inception v3 as FID uses it; parameter names are those of pytorch-fid's file.

    It differs from torchvision's: average pools do not count the padding, the last block pools by maximum,
    and there are 1008 classes. fc=False: without the classifier.
    """

    def __init__(self, fc=True):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, same=False)
        for name, *config in mixed_blocks():
            self.add_module(f"Mixed_{name}", Mixed(*config))
        self.fc = nn.Linear(2048, 1008) if fc else None

    def forward(self, x):
        """Normalised images [B, 3, 299, 299] -> pool3 [B, 2048]."""
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            if name != "fc":
                x = layer(x)
        return x.mean((2, 3))


def load_inception(path):
    """The FID Inception from `pt_inception-2015-12-05-6726825d.pth`, in eval mode on the CPU.

    The classifier (fc.weight and fc.bias) may be absent; then there are features, but no logits. UserError
    for a missing or damaged file and for any tensor that does not fit.
    """
    weights = svg.load_checkpoint(path)
    model = Inception(fc="fc.weight" in weights or "fc.bias" in weights)
    svg.strict_load(model, weights, path, "the FID Inception")
    return model.eval().requires_grad_(False)


def tf1_resize_matrix(n, size=299):
    """[size, n]: linear interpolation as TensorFlow 1 did it, source position = target position * n / size.

    No half-pixel offset and no antialiasing: the picture shifts by a fraction of a pixel, and the published
    statistics have that shift in them.
    """
    position = np.arange(size, dtype=np.float32) * np.float32(n / size)
    low = position.astype(np.int64)
    matrix = np.zeros((size, n), np.float32)
    np.add.at(matrix, (np.arange(size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(size), np.minimum(low + 1, n - 1)), position - low)
    return matrix


@torch.inference_mode()
def inception_features(model, images, resize="tf1"):
    """uint8 images [B, H, W, 3] -> dict of float32 pool3 [B, 2048], logits_unbiased and logits [B, 1008].

    resize: "tf1" as ADM's evaluator (TensorFlow 1, input (x - 128) / 128) or "pytorch" as pytorch-fid
    (half-pixel bilinear, input 2x/255 - 1). The Inception Score takes the logits without bias; both are None
    if the weights have no `fc`. UserError for another resize.
    """
    device = next(model.parameters()).device
    x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()  # [B, 3, H, W]
    if resize == "tf1":
        rows, columns = (torch.from_numpy(tf1_resize_matrix(n)).to(device) for n in x.shape[-2:])
        x = (rows @ x @ columns.T - 128) / 128
    elif resize == "pytorch":
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 255 - 1
    else:
        raise UserError(f"resize '{resize}' is neither tf1 nor pytorch")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pool3 = model(x)
    if model.fc is None:
        return {"pool3": pool3, "logits_unbiased": None, "logits": None}
    logits = pool3 @ model.fc.weight.T
    return {"pool3": pool3, "logits_unbiased": logits, "logits": logits + model.fc.bias}


# -- Features -> moments -> distance -----------------------------------------------------------------------

def moments(features):
    """Features [B, D] -> (count, mean [D], scatter [D, D]), float64; covariance = scatter / (count - 1)."""
    features = features.cpu().double() if features.device.type == "mps" else features.double()
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

    def root(sigma):  # R with sigma = R R^T; an eigenvalue 1e-16 that should be 0 would enter as 1e-8
        values, vectors = np.linalg.eigh(sigma)
        keep = values > values.max() * len(values) * np.finfo(np.float64).eps
        return vectors[:, keep] * np.sqrt(values[keep])

    # The trace of (sigma1 sigma2)^(1/2) is the sum of the singular values of R1^T R2.
    cross = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return max(float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross), 0.0)


# -- The command -------------------------------------------------------------------------------------------

def inception(args, device):
    """features(uint8 images [B, H, W, 3]) -> [B, 2048], and what they are called."""
    model = load_inception(svg.fetch_weights(INCEPTION, args.weights)).to(device)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times the speed there
    return (lambda images: inception_features(model, images, args.resize)["pool3"],
            f"{'TF1' if args.resize == 'tf1' else 'PyTorch'} resize, {INCEPTION}")


def demo_encoder(args, device):
    """features(uint8 images [B, H, W, 3]) -> [B, D], and what they are called."""
    import demo
    encoder = svg.load_encoder(demo.ENCODER).to(device)
    return (lambda images: encoder(svg.to_float(images, device)).mean(1),
            f"mean patch tokens of {demo.ENCODER.name}")


def demo_images(num=1000):
    """The demo's validation images."""
    import demo
    data = demo.dataset("val", num)
    return Images("the demo's validation set", np.stack([data[i, i][0] for i in range(num)]))


def measure(source, features, protocol, args, device):
    """Images -> statistics of features(uint8 images [B, H, W, 3]) -> [B, D]; statistics are passed on."""
    if not isinstance(source, Images):
        return source
    workers = 0 if isinstance(source.source, np.ndarray) else args.workers  # an array needs no decoding
    batches = torch.utils.data.DataLoader(source, args.batch, num_workers=workers, collate_fn=collate,
                                          pin_memory=device.type == "cuda")
    total, start, tty = None, time.time(), sys.stderr.isatty()
    shown = start
    for batch in batches:
        if isinstance(batch, str):
            raise UserError(batch)
        new = moments(features(batch))
        if not torch.isfinite(new[1]).all():
            raise UserError(f"{source.name}: features are not finite; are the weights damaged? ({protocol})")
        total = merge_moments(total, new) if total else new
        n, now = total[0], time.time()
        if n == len(source) or now - shown > (1 if tty else 10):
            shown = now
            print(f"{source.name}: {n}/{len(source)} images  {n / (now - start):.1f} images/s",
                  end="\r" if tty and n < len(source) else "\n", file=sys.stderr, flush=True)
    n, mean, scatter = total
    return {"name": source.name, "num": n, "protocol": protocol,
            "mu": mean.cpu().numpy(), "sigma": (scatter / (n - 1)).cpu().numpy()}


def save_stats(path, stats):
    """Write mu and sigma as pytorch-fid reads them, num and protocol beside them; UserError if that fails."""
    try:
        with open(path, "wb") as f:
            np.savez(f, **{k: stats[k] for k in ("mu", "sigma", "num", "protocol") if stats[k] is not None})
    except OSError as e:
        raise UserError(f"--save-stats {path}: could not be written ({e.strerror})") from e


def parse_args():
    parser = svg.Parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", default="samples/",
        help="folder of images (of any depth), or .npz with mu and sigma or with arr_0 (uint8 [N, H, W, 3])")
    add("--ref", default=ADM_REFERENCE,
        help="what to compare with, of the same kinds; a bare name is also looked for in the weights folder")
    add("--resize", choices=("tf1", "pytorch"), default="tf1",
        help="to Inception's 299 pixels, as ADM's evaluator or as pytorch-fid does it")
    add("--size", type=svg.not_negative, default=0, metavar="N",
        help="pixels: first centre-crop every image to NxN as ADM does; 0: as they are, all of one size")
    add("--num", type=svg.not_negative, default=0, metavar="N",
        help="images: score the first N of the samples, sorted by path; 0: all")
    add("--batch", type=svg.positive, default=64, help="images per step; the result does not depend on it")
    add("--workers", type=svg.not_negative, default=min(4, os.cpu_count() or 1),
        help="processes that decode images; 0: this one does")
    add("--weights", default=os.environ.get("SVG_WEIGHTS") or "weights",
        help="folder of pretrained files; Inception's is downloaded to it on first use")
    add("--save-stats", metavar="OUT.npz",
        help="write mu and sigma of the samples, for --ref or pytorch-fid; without a reference, only that")
    add("--demo", action="store_true",
        help="features of the demo's encoder instead of Inception's; without --ref, against its images")
    svg.add_bench_flag(parser)
    parser.set_defaults(precision="fp32", compile=False)  # other ways would give another FID
    return parser.parse_args()


def bench(args, device):
    """Time features and moments of synthetic images of 256 pixels, the weights being random."""
    model = Inception().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def make(n):
        images = torch.randint(256, (n, 256, 256, 3), dtype=torch.uint8)
        return lambda: moments(inception_features(model, images, args.resize)["pool3"])

    svg.bench(args, device, make, args.batch * svg.world_size(), script="fid")


def main():
    args = parse_args()
    device = svg.setup()
    if args.bench:
        return bench(args, device)
    if args.save_stats and not os.path.isdir(os.path.dirname(args.save_stats) or "."):
        raise UserError(f"--save-stats {args.save_stats}: no such folder")
    ref, no_ref = args.ref, args.ref == ADM_REFERENCE
    if not os.path.exists(ref) and os.path.basename(ref) == ref:
        ref = svg.find_weights(ref, args.weights)
    if args.demo and no_ref:
        reference = demo_images()
        args.size = args.size or reference.shape[0]
    else:
        save_only = args.save_stats and no_ref and not os.path.exists(ref)
        reference = None if save_only else open_source(ref, args.size)
    samples = open_source(args.samples, args.size, args.num)

    features, protocol = None, None
    if isinstance(samples, Images) or isinstance(reference, Images):
        features, protocol = (demo_encoder if args.demo else inception)(args, device)
    saved = [s for s in (samples, reference) if isinstance(s, dict) and s["protocol"] is not None]
    protocol = protocol or (str(saved[0]["protocol"]) if saved else "saved statistics")
    for s in saved:
        if str(s["protocol"]) != protocol:
            raise UserError(f"{s['name']} was measured by another protocol: {s['protocol']}, not {protocol}")

    fake = measure(samples, features, protocol, args, device)
    if args.save_stats:
        save_stats(args.save_stats, fake)
        print(f"statistics of {fake['name']} written to {args.save_stats}", file=sys.stderr)
    if reference is None:
        return
    real = measure(reference, features, protocol, args, device)
    distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    if not args.demo and any(s["num"] is not None and s["num"] < 10000 for s in (fake, real)):
        print("warning: FID of fewer than 10,000 images is biased upward; compare it only at equal numbers",
              file=sys.stderr)
    sides = " against ".join(
        s["name"] if s["num"] is None else f"{s['num']} images of {s['name']}" for s in (fake, real))
    name, note = ("FD-demo-encoder", "not Inception FID: ") if args.demo else ("FID", "")
    print(f"{name} {distance:.4f}  ({note}{sides}, {protocol})")


if __name__ == "__main__":
    svg.run_main(main)
