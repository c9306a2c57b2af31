"""How demo.pt was made, and who judges it.

    python -m lab.demo pack                        # demo.pt from the newest --demo runs of both stages
    python -m lab.demo classify samples/           # how many samples show the class they were asked for

docs/results.md has the commands that made demo.pt. Its frozen encoder, a DINOv3 of 0.2M parameters, knows
like DINO what is where, and colour only coarsely; it was trained by this program at fb018f5.
"""
from pathlib import Path

import numpy as np
import torch

import svg
from lib import data, files, runs
from lib.files import UserError
from lib.shapes import CLASSES, DEMO_PT, SIZE, pictures
from sample import bundle

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


def judge(images):
    """Return the share of uint8 images [n, 32, 32, 3], of the classes in turn, that show their class.

    A picture shows the class whose mean CLS token, of 1,000 real images, is the nearest to its own.
    """
    encoder = svg.load_encoder(DEMO_PT)

    def tokens(images):
        return encoder(data.to_float(torch.from_numpy(images), "cpu"), cls=True)[0]

    means = tokens(pictures("shapes://train", 1000)).unflatten(0, (-1, len(CLASSES))).mean(0)
    nearest = torch.cdist(tokens(images), means).argmin(1)
    return (nearest == torch.arange(len(images)) % len(CLASSES)).double().mean().item()


def classify(folder):
    """Print how many samples, taken as classes in turn, show the class they were asked for."""
    images = [np.asarray(data.open_rgb(path)) for path in data.list_images(folder)]
    if not images or any(image.shape != (SIZE, SIZE, 3) for image in images):
        raise UserError(f"{folder}: give the demo's samples, of {SIZE} x {SIZE} pixels, by sample.py")
    print(f"{judge(np.stack(images)):.1%} of {len(images)} samples show their class, "
          f"{judge(pictures('shapes://val', 2000)):.1%} of real images")


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
