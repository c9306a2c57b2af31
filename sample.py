"""Every picture: class-conditional samples of a trained model, and reconstructions of real images.

    python sample.py --steps 5                           # the last run, or the shipped demo.pt if there is none
    python sample.py --classes 207 360 --seed 1
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --guidance 1.55 --npz samples.npz           # for FID
    python sample.py --reconstruct val/ --out reconstructions

Writes samples/000000.png and so on, named by global index; samples.json beside them says what they are and
samples.png is an overview. Image i depends on --seed and i alone, not on batch size or number of processes.
"""
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import svg

DEMO_PT = Path(__file__).parent / "demo.pt"


def parse_args():
    p = svg.Parser(__doc__)
    add = p.add_argument
    add("--demo", action="store_true", help="only look at --demo runs, not at others, before taking demo.pt")
    add("--ckpt", help="transformer checkpoint, ours or the authors' (default: the newest run, else demo.pt)")
    add("--ae", help="autoencoder checkpoint (default: the one the transformer was trained on)")
    add("--any-ae", action="store_true", help="decode by --ae even if the transformer was not trained on it")
    add("--latent-stats", help="the authors' statistics file: latent mean and std")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--out", help="folder to write (default: samples, or reconstructions)")
    add("--overwrite", action="store_true", help="replace what another run left in --out")
    add("--num", type=svg.positive, default=40, help="images in all")
    add("--classes", nargs="+", help="class numbers or names, taken in turn (default: all)")
    add("--labels", choices=("balanced", "random"), default="balanced", help="classes in turn, or drawn at random")
    add("--seed", type=svg.not_negative, default=0, help="of noise and random labels")
    add("--steps", type=svg.positive, default=25, help="Euler steps")
    add("--guidance", type=svg.number(), default=4.0, help="guidance scale; 1: none (paper: 4 for figures, 1.55 for FID)")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="range of t that is guided")
    add("--no-zero-init", dest="zero_init", action="store_false", help="do not skip the first guided step")
    add("--shift", type=svg.number(above=0), default=0.15, help="timestep shift in sampling")
    add("--batch-size", type=svg.positive, default=64, help="images at a time and process")
    add("--precision", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the models' arithmetic; the sampler's state is fp32")
    add("--npz", help="also write all images as arr_0, uint8 [num, H, W, 3], for ADM's evaluator")
    add("--reconstruct", metavar="DIR", help="instead of sampling, encode and decode the images of a folder")
    add("--align", choices=("running", "batch"),
        help="alignment statistics of --reconstruct (default: running; the authors' checkpoint allows only batch)")
    args = p.parse_args()
    if args.npz and not os.path.isdir(os.path.dirname(args.npz) or "."):
        raise svg.UserError(f"--npz {args.npz}: no such folder")
    return args


def find_models(args, device):
    """The transformer and the autoencoder that belong together, and the first's path."""
    path = args.ckpt or svg.latest_run("dit", demo=True if args.demo else None) or DEMO_PT
    sit = svg.load_sit(path).to(device)
    trained_on = sit.meta.get("autoencoder", {})
    ae_path = args.ae or (path if Path(path).name == "demo.pt" else trained_on.get("path"))
    if not ae_path:
        raise svg.UserError(f"{path} does not say which autoencoder it was trained on: name it by --ae")
    if not os.path.exists(ae_path):
        raise svg.UserError(f"{path} needs the autoencoder {ae_path}, which is not there: name it by --ae")
    ae = svg.load_autoencoder(ae_path, encoder=False).to(device)
    if (sit.channels, sit.grid) != (ae.channels, ae.grid):
        raise svg.UserError(f"{path} makes latents of {sit.grid}x{sit.grid}x{sit.channels}, the autoencoder {ae_path} "
                            f"takes {ae.grid}x{ae.grid}x{ae.channels}: they do not belong together")
    if trained_on and trained_on["fingerprint"] != ae.fingerprint and not args.any_ae:
        raise svg.UserError(f"{path} was not trained on the autoencoder {ae_path}: name the right one by --ae, or "
                            f"insist by --any-ae")
    if args.latent_stats:
        ae.set_latent_stats(*svg.load_latent_stats(args.latent_stats))
    elif "latent_mean" in sit.meta:
        ae.set_latent_stats(sit.meta["latent_mean"], sit.meta["latent_std"])
    elif not ae.measured:
        raise svg.UserError(f"neither {path} nor {ae_path} holds the latents' mean and std: name them by "
                            f"--latent-stats (the authors' dinov3_sp_stats.pt)")
    return sit, ae, path


def class_numbers(names, classes, num_classes):
    """--classes as numbers: each a number, or a name that the checkpoint knows."""
    numbers = []
    for name in names or range(num_classes):
        number = int(name) if str(name).isdigit() else classes.index(name) if name in classes else -1
        if not 0 <= number < num_classes:
            known = f" ({', '.join([*classes[:10], *['...'][:len(classes) > 10]])})" if classes else ""
            raise svg.UserError(f"--classes {name}: the model has classes 0 to {num_classes - 1}{known}")
        numbers.append(number)
    return numbers


def label_of(i, numbers, args):
    """The class of image i: a function of (seed, i) alone."""
    if args.labels == "random":
        return numbers[np.random.default_rng((args.seed, i, 1)).integers(len(numbers))]
    return numbers[i % len(numbers)]


def beside(out, suffix):
    """samples -> samples.json and the like, whatever dots are in the name."""
    return out.with_name(out.name + suffix)


def claim_folder(out, settings, overwrite):
    """Make the output folder this run's: refuse one that holds anything else, so that no FID mixes two
    runs.
    """
    if not out.name or (out.exists() and not out.is_dir()):
        raise svg.UserError(f"--out {out}: give the name of a folder to make")
    record = beside(out, ".json")
    before = svg.read_json(record)
    if svg.rank() == 0 and out.exists() and any(out.iterdir()) and before != settings:
        if not before:
            raise svg.UserError(f"{out} holds files that are not of this program: give another --out")
        if not overwrite:
            raise svg.UserError(f"{out} already holds a different run: give another --out, or --overwrite")
        shutil.rmtree(out)
    svg.barrier()
    if svg.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1))
    svg.barrier()


def generate(args, device):
    """Sample; returns nothing, leaves PNGs, an overview and, if asked for, an .npz."""
    sit, ae, path = find_models(args, device)
    classes = sit.meta.get("classes", [])
    numbers = class_numbers(args.classes, classes, sit.num_classes)
    out = Path(args.out or "samples")
    told = ("num", "classes", "labels", "seed", "steps", "guidance", "zero_init", "shift", "precision")
    settings = {"step": sit.meta.get("step"), "transformer": svg.fingerprint(sit.state_dict()),
                "autoencoder": ae.fingerprint, **{k: getattr(args, k) for k in told},
                "guidance_interval": list(args.guidance_interval)}
    claim_folder(out, settings, args.overwrite)
    shipped = Path(path) == DEMO_PT
    if svg.rank() == 0:
        print("no run below runs/: using the shipped demo.pt" if shipped and not args.ckpt else f"using {path}")
        print(f"{args.num} images, {args.steps} Euler steps, guidance {args.guidance:g}, shift {args.shift:g}", flush=True)
    mine = list(range(args.num))[svg.rank()::svg.world_size()]
    start = time.time()
    for j in range(0, len(mine), args.batch_size):
        indices = mine[j:j + args.batch_size]
        noise = svg.sample_noise(args.seed, indices, (sit.grid ** 2, sit.channels)).to(device)
        y = torch.tensor([label_of(i, numbers, args) for i in indices], device=device)
        with torch.no_grad(), svg.autocast(device, args.precision):
            latents = svg.euler_sample(sit, noise, y, args.steps, args.guidance, args.shift, args.zero_init,
                                       args.guidance_interval)
            images = svg.to_uint8(ae.decode(ae.denormalize(latents)))
        for i, image in zip(indices, images, strict=True):
            Image.fromarray(image).save(out / f"{i:06d}.png")
        if svg.rank() == 0 and len(mine) > args.batch_size:
            done = j + len(indices)
            rate = done / (time.time() - start)
            print(f"{done * svg.world_size()}/{args.num}  {rate * svg.world_size():.1f} images/s  "
                  f"{svg.duration((len(mine) - done) / rate)} left", flush=True)
    svg.barrier()
    if svg.rank() == 0:
        files = [out / f"{i:06d}.png" for i in range(args.num)]
        shown = np.stack([np.asarray(Image.open(f)) for f in files[:80]])
        labels = [label_of(i, numbers, args) for i in range(len(shown))]
        title = f"{'demo.pt' if shipped else path}: {args.steps} Euler steps, guidance {args.guidance:g}, seed {args.seed}"
        names = [classes[c] if classes else c for c in labels]
        svg.grid_image(shown, 10, names, title).save(beside(out, ".png"))
        if args.npz:
            write_npz(args.npz, files)
        print(f"{out}/ and {beside(out, '.png')}" + (f" and {args.npz}" if args.npz else "")
              + f" in {time.time() - start:.1f} s")


def write_npz(path, files):
    """All images as uint8 [N, H, W, 3] under the key arr_0."""
    temporary = Path(f"{path}.tmp.npz")
    try:
        np.savez(temporary, arr_0=np.stack([np.asarray(Image.open(f)) for f in files]))
        os.replace(temporary, path)
    except OSError as e:
        raise svg.UserError(f"--npz {path}: could not be written ({e.strerror})") from e
    finally:
        temporary.unlink(missing_ok=True)


def reconstruct(args, device):
    """Encode and decode each image of a folder, cropped the ADM way; same names, as PNG."""
    path = args.ae or svg.latest_run("ae", demo=True if args.demo else None) or DEMO_PT
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
    aligned = ae.channels > ae.feature_channels and ae.config["align"] != "none"
    if args.align != "batch" and aligned and ae.alignment_batches == 0:
        raise svg.UserError(f"{path} keeps no running alignment statistics, as the authors' does: give --align batch")
    targets = {}
    for file in svg.list_images(args.reconstruct):
        target = os.path.splitext(os.path.relpath(file, args.reconstruct))[0] + ".png"
        if target in targets:
            raise svg.UserError(f"{targets[target]} and {file} would both become {target}: rename one")
        targets[target] = file
    if not targets:
        raise svg.UserError(f"--reconstruct {args.reconstruct}: no images there")
    out = Path(args.out or "reconstructions")
    told = ("reconstruct", "align", "precision")
    claim_folder(out, {"autoencoder": ae.fingerprint, **{k: getattr(args, k) for k in told}}, args.overwrite)
    mine = list(targets.items())[svg.rank()::svg.world_size()]
    for j in range(0, len(mine), args.batch_size):
        originals, names = [], []
        for target, file in mine[j:j + args.batch_size]:
            try:
                originals.append(svg.crop(svg.open_rgb(file), ae.image_size))
                names.append(out / target)
            except svg.UserError as e:
                warnings.warn(f"{e}, left out")
        if not originals:
            continue
        with torch.no_grad(), svg.autocast(device, args.precision):
            latents = ae.encode(svg.to_float(torch.from_numpy(np.stack(originals)), device), args.align)
            images = svg.to_uint8(ae.decode(latents))
        for name, image in zip(names, images, strict=True):
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(name)
    svg.barrier()
    if svg.rank() == 0:
        shown = [t for t in targets if (out / t).exists()]
        if not shown:
            raise svg.UserError(f"--reconstruct {args.reconstruct}: no readable image there")
        shown = [shown[i] for i in np.linspace(0, len(shown) - 1, min(10, len(shown))).astype(int)]
        pairs = [svg.crop(svg.open_rgb(targets[t]), ae.image_size) for t in shown]
        pairs += [np.asarray(Image.open(out / t)) for t in shown]
        title = f"{'demo.pt' if path == DEMO_PT else path}: originals above reconstructions"
        svg.grid_image(np.stack(pairs), len(shown), title=title).save(beside(out, ".png"))
        print(f"{len(targets)} images reconstructed by {path} in {out}/, overview in {beside(out, '.png')}")


def main():
    args = parse_args()
    device = svg.setup()
    (reconstruct if args.reconstruct else generate)(args, device)


if __name__ == "__main__":
    svg.run_main(main)
