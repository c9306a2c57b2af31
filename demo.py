"""How demo.pt was made, and who judges it: packed from runs of both stages; a classifier of its samples.

    python demo.py pack                        # demo.pt from the newest --demo runs of both stages
    python demo.py classify samples/           # how many samples show the class they were asked for

docs/results.md has the commands that made demo.pt. Its frozen encoder, a DINOv3 of 0.2M parameters, knows like DINO
what is where, and colour only coarsely; it was trained by this program at fb018f5.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import files
import runs
import svg
from files import UserError
from sample import bundle
from shapes import CLASSES, SIZE, draw, pictures

STATISTICS = ("alignment", "alignment_batches", "latent_mean", "latent_std")  # stay in full precision


def pack(path):
    """Write encoder, autoencoder and EMA transformer of the newest --demo runs in half precision."""
    ae = svg.load_autoencoder(runs.latest_run("autoencoder", demo=True) or "runs/demo-ae/last.pt")
    sit = svg.load_sit(runs.latest_run("sit", demo=True) or "runs/demo-dit/last.pt")
    if sit.meta["autoencoder"]["fingerprint"] != ae.fingerprint:
        raise UserError("the newest --demo runs of both stages do not belong together: train stage 2 again")
    both = bundle(sit, ae)
    both["encoder"] = files.load_checkpoint(ae.encoder.file)["encoder"]
    # Rounded weights are other weights, with another fingerprint.
    for part, key in (("autoencoder", "model"), ("sit", "ema")):
        weights = {k: v if k in STATISTICS else v.half() for k, v in both[part][key].items()}
        both[part] |= {key: weights, "fingerprint": files.fingerprint(weights)}
    both["sit"]["autoencoder"]["fingerprint"] = both["autoencoder"]["fingerprint"]
    files.save_checkpoint(path, both)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")


def train_classifier(steps=1500, batch=64, count=10_000):
    """Train a small convolutional classifier on drawn pictures; return it and its held-out accuracy."""
    torch.manual_seed(0)
    layers = []
    c = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        c = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    rng = np.random.default_rng(4)
    images = torch.from_numpy(np.stack([draw(i % len(CLASSES), rng)[0] for i in range(count)]))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in runs.progress(range(steps), "training the classifier", steps * batch, lambda _: batch):
        i = torch.from_numpy(rng.integers(0, count, batch))
        loss = F.cross_entropy(model(data.to_float(images[i], "cpu")), i % len(CLASSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out, _ = accuracy(model.eval(), pictures("shapes://val", 2000))
    return model, held_out


@torch.no_grad()
def accuracy(model, images):
    """Return the share of uint8 images [n, 32, 32, 3], of the classes in turn, that are told, and by class."""
    labels = np.arange(len(images)) % len(CLASSES)
    right = model(data.to_float(torch.from_numpy(images), "cpu")).argmax(1).numpy() == labels
    return right.mean(), [right[labels == c].mean() for c in range(len(CLASSES))]


def classify(folder):
    """Print how many samples, taken as classes in turn, show the class they were asked for."""
    images = [np.asarray(data.open_rgb(path)) for path in data.list_images(folder)]
    if not images or any(image.shape != (SIZE, SIZE, 3) for image in images):
        raise UserError(f"{folder}: give the demo's samples, of {SIZE} x {SIZE} pixels, by sample.py")
    model, held_out = train_classifier()
    share, by_class = accuracy(model, np.stack(images))
    print(f"classifier: {held_out:.1%} right on held-out real images; "
          f"{share:.1%} of {len(images)} samples right")
    print("  ".join(f"{name} {a:.0%}" for name, a in zip(CLASSES, by_class, strict=True)))


def main():
    """Run the command that the first argument names."""
    parser = runs.Parser(__doc__)
    parser.add_argument("command", choices=("pack", "classify"))
    parser.add_argument("folder", nargs="?", default="samples", help="images by sample.py, for classify")
    args = parser.parse_args()
    if args.command == "pack":
        pack("demo.pt")
    else:
        classify(args.folder)


if __name__ == "__main__":
    runs.run_main(main)
