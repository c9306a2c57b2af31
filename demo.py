"""Where demo.pt comes from, and who judges it: the tiny frozen encoder, the embedded model, a classifier.

    python demo.py encoder                     # trains runs/demo-encoder.pt, the frozen encoder of demo.pt
    python demo.py pack                        # demo.pt from the newest --demo runs of both stages
    python demo.py classify samples/           # how many samples show the class they were asked for

Like DINO the encoder knows what is where, and colour only coarsely; the residual branch adds the rest.
docs/results.md has the commands that made demo.pt.
"""
import time
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


def random_batches(seed, steps, batch, count=20_000):
    """Return `steps` random batches (images, labels, outline masks) of `count` pictures drawn with `seed`."""
    rng = np.random.default_rng(seed)
    drawing = runs.progress(range(count), "drawing", count, lambda _: 1)
    drawn = [draw(i % len(CLASSES), rng) for i in drawing]
    images, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
    chosen = (torch.from_numpy(rng.integers(0, count, batch)) for _ in range(steps))
    return ((data.to_float(images[i], "cpu"), i % len(CLASSES), masks[i]) for i in chosen)


# -- The frozen encoder ------------------------------------------------------------------------------------

def encoder_loss(logits, coarse, colours, local, images, labels, masks):
    """Return what the encoder is taught: class, outlines and colours.

    Of every token [B, 17]: logits of the class, of an 8 x 8 outline of the whole shape, and the mean colours
    of shape and ground; of each patch token [B, 16] logits of its own outline, [B, 16, patch^2].
    """
    def every_token(target):
        return target.unsqueeze(1).expand(-1, logits.shape[1], *target.shape[1:])

    masks = masks[:, None]
    outline = F.pixel_unshuffle(masks, VIT["patch"]).flatten(2).transpose(1, 2)  # [B, 16, patch^2]
    mean_colours = [(images * m).sum((2, 3)) / m.sum((2, 3)) for m in (masks, 1 - masks)]  # [B, 3] each
    return (F.cross_entropy(logits.flatten(0, 1), every_token(labels).flatten())
            + 2 * F.binary_cross_entropy_with_logits(coarse, every_token(F.avg_pool2d(masks, 4).flatten(1)))
            + 2 * F.binary_cross_entropy_with_logits(local, outline)
            + F.mse_loss(colours, every_token(torch.cat(mean_colours, 1))))


def train_encoder(path, steps=5000, batch=64, seed=0):
    """Train the tiny ViT on drawn pictures, and save it in half precision."""
    torch.manual_seed(seed)
    vit = svg.ViT(**VIT)
    global_head = nn.Linear(VIT["dim"], len(CLASSES) + 64 + 6)
    local_head = nn.Linear(VIT["dim"], VIT["patch"] ** 2)
    parameters = [*vit.parameters(), *global_head.parameters(), *local_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    start = time.time()
    for step, (images, labels, masks) in enumerate(random_batches(3, steps, batch), 1):
        tokens = vit(svg.imagenet_normalize(images))
        cls, patches = tokens[:, :1], tokens[:, vit.prefix:]
        logits, coarse, colours = global_head(torch.cat([cls, patches], 1)).split([len(CLASSES), 64, 6], -1)
        loss = encoder_loss(logits, coarse, colours, local_head(patches), images, labels, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            accuracy = (logits.mean(1).argmax(1) == labels).float().mean()
            print(f"step {step}/{steps}  loss {loss:.3f}  accuracy {accuracy:.2f}  "
                  f"{time.time() - start:.0f} s", flush=True)
    # Half precision here, so that stage 1 trains on exactly the weights that demo.pt ships.
    model = {k: v.half() for k, v in vit.state_dict().items()}
    files.save_checkpoint(path, {"encoder": {"name": "demo", "vit": VIT, "model": model}})


# -- The embedded model ------------------------------------------------------------------------------------

STATISTICS = ("alignment", "alignment_batches", "latent_mean", "latent_std")


def half(weights):
    """Return a state dict in half precision, but for its statistics."""
    return {k: v if k in STATISTICS else v.half() for k, v in weights.items()}


def pack(path):
    """Write encoder, autoencoder and EMA transformer of the newest --demo runs in half precision."""
    ae_path = runs.latest_run("autoencoder", demo=True)
    dit_path = runs.latest_run("sit", demo=True)
    if not (ae_path and dit_path):
        raise UserError("no --demo runs of both stages below runs/: run train_ae.py --demo and "
                        "train_dit.py --demo first")
    ae = svg.load_autoencoder(ae_path)
    sit = svg.load_sit(dit_path)
    if sit.meta["autoencoder"]["fingerprint"] != ae.fingerprint:
        raise UserError(f"{dit_path} was not trained on {ae_path}: train the newest of both stages together")
    both = bundle(sit, ae)
    both["encoder"] = files.load_checkpoint(ae.encoder.file)["encoder"]
    # Rounded weights are other weights, with another fingerprint.
    for part, key in (("autoencoder", "model"), ("sit", "ema")):
        both[part][key] = half(both[part][key])
        both[part]["fingerprint"] = files.fingerprint(both[part][key])
    both["sit"]["autoencoder"]["fingerprint"] = both["autoencoder"]["fingerprint"]
    files.save_checkpoint(path, both)


# -- The judge: do samples show what they were asked for? --------------------------------------------------

def train_classifier(steps=1500, batch=64, seed=0):
    """Train a small convolutional classifier on drawn pictures; return it and its held-out accuracy."""
    torch.manual_seed(seed)
    layers = []
    c = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        c = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    batches = random_batches(4, steps, batch, 10_000)
    for images, labels, _ in runs.progress(batches, "training the classifier", steps * batch, data.batch_size):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    held_out, _ = accuracy(model, pictures("shapes://val", 2000), np.arange(2000) % len(CLASSES))
    return model, held_out


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the share of uint8 images [n, 32, 32, 3] that get their label, in all and per class."""
    right = model(data.to_float(torch.from_numpy(images), "cpu")).argmax(1).numpy() == labels
    return right.mean(), [right[labels == c].mean() for c in range(len(CLASSES))]


def classify(folder):
    """Print how many samples, taken as classes in turn, show the class they were asked for."""
    paths = data.list_images(folder)
    if not paths:
        raise UserError(f"{folder}: no images; run sample.py first")
    images = [np.asarray(data.open_rgb(path)) for path in paths]
    if any(image.shape != (SIZE, SIZE, 3) for image in images):
        raise UserError(f"{folder}: give the demo's samples, of {SIZE} x {SIZE} pixels")
    images = np.stack(images)
    runs.say_start(torch.device("cpu"), "fp32", f"{folder}: {len(paths)} images")
    model, held_out = train_classifier()
    share, by_class = accuracy(model, images, np.arange(len(paths)) % len(CLASSES))
    print(f"classifier: {held_out:.1%} right on held-out real images; "
          f"{share:.1%} of {len(paths)} samples right")
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
