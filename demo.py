"""Where demo.pt comes from, and who judges it: the tiny frozen encoder, the embedded model, a classifier.

    python demo.py encoder                     # trains runs/demo-encoder.pt, the frozen encoder of demo.pt
    python demo.py pack                        # demo.pt from the newest --demo runs of both stages
    python demo.py classify samples/           # how many samples show the class they were asked for

Like DINO the encoder knows what is where, and colour only coarsely; the residual branch adds the rest.
docs/results.md has the commands that made demo.pt.
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
from shapes import CLASSES, GRID, SIZE, draw, pictures

# A DINOv3 architecture of 0.2M parameters.
VIT = {"patch": SIZE // GRID, "dim": 64, "depth": 4, "heads": 1, "registers": 4, "eps": 1e-5}


def train(loss_of, parameters, seed, steps, count, batch=64, **settings):
    """Minimise loss_of(images, labels, outline masks) by AdamW on `count` pictures drawn with `seed`."""
    rng = np.random.default_rng(seed)
    drawing = runs.progress(range(count), "drawing", count, lambda _: 1)
    drawn = [draw(i % len(CLASSES), rng) for i in drawing]
    images, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
    optimizer = torch.optim.AdamW(parameters, 2e-3, **settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in runs.progress(range(steps), "training", steps * batch, lambda _: batch):
        i = torch.from_numpy(rng.integers(0, count, batch))
        loss = loss_of(data.to_float(images[i], "cpu"), i % len(CLASSES), masks[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


# -- The frozen encoder ------------------------------------------------------------------------------------

def train_encoder(path, steps=5000, seed=0):
    """Train the tiny ViT to tell class, outlines and colours, and save it in half precision.

    Of every token: logits of the class, of an 8 x 8 outline of the whole shape, and the mean colours of shape
    and ground; of each patch token, logits of its own outline.
    """
    torch.manual_seed(seed)
    vit = svg.ViT(**VIT)
    global_head = nn.Linear(VIT["dim"], len(CLASSES) + 64 + 6)
    local_head = nn.Linear(VIT["dim"], VIT["patch"] ** 2)

    def loss_of(images, labels, masks):
        tokens = vit(svg.imagenet_normalize(images))
        patches = tokens[:, vit.prefix:]
        tokens = torch.cat([tokens[:, :1], patches], 1)  # [B, 17, 64]
        logits, coarse, colours = global_head(tokens).split([len(CLASSES), 64, 6], -1)

        def every_token(target):
            return target.unsqueeze(1).expand(-1, tokens.shape[1], *target.shape[1:])

        masks = masks[:, None]
        outline = F.pixel_unshuffle(masks, VIT["patch"]).flatten(2).transpose(1, 2)  # [B, 16, patch^2]
        mean_colours = [(images * m).sum((2, 3)) / m.sum((2, 3)) for m in (masks, 1 - masks)]  # [B, 3] each
        bce = F.binary_cross_entropy_with_logits
        return (F.cross_entropy(logits.flatten(0, 1), every_token(labels).flatten())
                + 2 * bce(coarse, every_token(F.avg_pool2d(masks, 4).flatten(1)))
                + 2 * bce(local_head(patches), outline)
                + F.mse_loss(colours, every_token(torch.cat(mean_colours, 1))))

    parameters = [*vit.parameters(), *global_head.parameters(), *local_head.parameters()]
    train(loss_of, parameters, 3, steps, 20_000, weight_decay=0.05)
    # Half precision here, so that stage 1 trains on exactly the weights that demo.pt ships.
    model = {k: v.half() for k, v in vit.state_dict().items()}
    files.save_checkpoint(path, {"encoder": {"name": "demo", "vit": VIT, "model": model}})


# -- The embedded model ------------------------------------------------------------------------------------

STATISTICS = ("alignment", "alignment_batches", "latent_mean", "latent_std")


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


# -- The classifier: do samples show what they were asked for? ---------------------------------------------

def train_classifier(steps=1500, seed=0):
    """Train a small convolutional classifier on drawn pictures; return it and its held-out accuracy."""
    torch.manual_seed(seed)
    layers = []
    c = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        c = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    train(lambda images, labels, _: F.cross_entropy(model(images), labels), model.parameters(), 4, steps, 10_000)
    model.eval()
    held_out, _ = accuracy(model, pictures("shapes://val", 2000))
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
    parser.add_argument("command", choices=("encoder", "pack", "classify"))
    parser.add_argument("folder", nargs="?", default="samples", help="images by sample.py, for classify")
    args = parser.parse_args()
    if args.command == "encoder":
        Path("runs").mkdir(exist_ok=True)
        train_encoder("runs/demo-encoder.pt")
    elif args.command == "pack":
        pack("demo.pt")
        print(f"demo.pt: {Path('demo.pt').stat().st_size / 1e6:.2f} MB")
    else:
        classify(args.folder)


if __name__ == "__main__":
    runs.run_main(main)
