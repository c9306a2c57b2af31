"""Every picture: class-conditional samples of a trained model, and reconstructions of real images.

    python sample.py --steps 5                           # the last run, or the shipped demo.pt if there is none
    python sample.py --num 50000 --guidance 1.55 --npz samples.npz         # for FID; under torchrun on several GPUs
    python sample.py --classes 207 360 --guidance 4.0
    python sample.py --reconstruct val/ --out reconstructions

Writes samples/000000.png and so on, named by global index; what they are stands beside them in samples.json, and an
overview in samples.png. Image i depends on --seed and i alone, not on the batch size or the number of processes.
"""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import svg


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
    add("--labels", choices=("balanced", "random"), default="balanced", help="each class in turn, or drawn at random")
    add("--seed", type=int, default=0, help="of noise and random labels")
    add("--steps", type=svg.positive, default=25, help="Euler steps")
    add("--guidance", type=float, default=1.55, help="guidance scale; 1: none (1.55 in the paper's FID, 4 in its figures)")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="t where guided")
    add("--no-zero-init", dest="zero_init", action="store_false", help="do not skip the first guided step")
    add("--shift", type=svg.above_zero, default=0.15, help="timestep shift in sampling")
    add("--batch-size", type=svg.positive, default=64, help="images at a time and process")
    add("--precision", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the models' arithmetic; the sampler's state is fp32")
    add("--npz", help="also write all images as uint8 [num, H, W, 3], key arr_0, as ADM's evaluator reads them")
    add("--reconstruct", metavar="DIR", help="instead of sampling, encode and decode the images of a folder")
    add("--align", choices=("running", "batch"), default="running",
        help="alignment statistics of --reconstruct; batch: the authors', the only ones their checkpoint allows")
    args = p.parse_args()
    if args.guidance < 0:
        raise svg.UserError(f"--guidance {args.guidance:g}: give a number of at least 0 (1: no guidance)")
    return args


def find_models(args, device):
    """The transformer and the autoencoder that belong together, the first's path, and the autoencoder's
    path.
    """
    demo_pt = Path(__file__).parent / "demo.pt"
    path = args.ckpt or svg.latest_run("dit", demo=True if args.demo else None) or demo_pt
    sit = svg.load_sit(path).to(device)
    trained_on = sit.meta.get("autoencoder", {})
    ae_path = args.ae or (path if Path(path).name == "demo.pt" else trained_on.get("path"))
    if not ae_path:
        raise svg.UserError(f"{path} does not say which autoencoder it was trained on: name it by --ae")
    if not os.path.exists(ae_path):
        raise svg.UserError(f"{path} was trained on the autoencoder {ae_path}, which is not there: name it by --ae")
    ae = svg.load_autoencoder(ae_path, encoder=False).to(device)
    if (trained_on and trained_on["fingerprint"] != ae.fingerprint and not args.any_ae) or sit.channels != ae.channels:
        raise svg.UserError(f"{path} was not trained on the autoencoder {ae_path} (latents of {sit.channels} and "
                            f"{ae.channels} channels); name the right one by --ae"
                            + (", or give --any-ae" if sit.channels == ae.channels else ""))
    if args.latent_stats:
        ae.set_latent_stats(*svg.load_latent_stats(args.latent_stats))
    elif "latent_mean" in sit.meta:
        ae.set_latent_stats(sit.meta["latent_mean"], sit.meta["latent_std"])
    elif not ae.measured:
        raise svg.UserError(f"neither {path} nor {ae_path} holds the latents' mean and std: give --latent-stats "
                            f"(the authors' dinov3_sp_stats.pt)")
    return sit, ae, path, ae_path


def class_numbers(names, classes, num_classes):
    """--classes as numbers: each a number, or a name that the checkpoint knows."""
    numbers = []
    for name in names or range(num_classes):
        number = classes.index(name) if name in classes else int(name) if str(name).isdigit() else -1
        if not 0 <= number < num_classes:
            raise svg.UserError(f"--classes {name}: the model has classes 0 to {num_classes - 1}"
                                + (f" ({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})" if classes else ""))
        numbers.append(number)
    return numbers


def label_of(i, numbers, args):
    """The class of image i: a function of (seed, i) alone."""
    if args.labels == "random":
        return numbers[np.random.default_rng((args.seed, i, 1)).integers(len(numbers))]
    return numbers[i % len(numbers)]


def claim_folder(out, settings, overwrite):
    """Make the output folder this run's: refuse one that holds anything else, so that no FID mixes two
    runs.
    """
    record = out.with_suffix(".json")
    before = json.loads(record.read_text()) if record.exists() else None
    if svg.rank() == 0 and out.exists() and any(out.iterdir()) and before != settings:
        if not overwrite:
            raise svg.UserError(f"{out} already holds a different run: choose another --out, or give --overwrite")
        shutil.rmtree(out)
    svg.barrier()
    if svg.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1))
    svg.barrier()


def generate(args, device):
    """Sample; returns nothing, leaves PNGs, an overview and, if asked for, an .npz."""
    sit, ae, path, ae_path = find_models(args, device)
    classes = sit.meta.get("classes", [])
    numbers = class_numbers(args.classes, classes, sit.num_classes)
    out = Path(args.out or "samples")
    settings = {k: v for k, v in vars(args).items() if k not in ("batch_size", "overwrite", "weights", "demo", "npz")}
    settings |= {"ckpt": str(path), "ae": str(ae_path), "step": sit.meta.get("step"),
                 "guidance_interval": list(args.guidance_interval), "weights": svg.fingerprint(sit.state_dict())}
    claim_folder(out, settings, args.overwrite)
    if svg.rank() == 0:
        what = "no run below runs/, so the shipped demo.pt" if Path(path).name == "demo.pt" and not args.ckpt else path
        print(f"{what}: {args.num} images, {args.steps} Euler steps, guidance {args.guidance:g}, shift {args.shift:g}",
              flush=True)
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
                  f"{time.strftime('%H:%M:%S', time.gmtime((len(mine) - done) / rate))} left", flush=True)
    svg.barrier()
    if svg.rank() == 0:
        files = [out / f"{i:06d}.png" for i in range(args.num)]
        shown = np.stack([np.asarray(Image.open(f)) for f in files[:80]])
        labels = [label_of(i, numbers, args) for i in range(len(shown))]
        title = f"{path}: {args.steps} Euler steps, guidance {args.guidance:g}, seed {args.seed}"
        svg.grid_image(shown, 10, [classes[c] if classes else c for c in labels], title).save(out.with_suffix(".png"))
        if args.npz:
            write_npz(args.npz, files)
        print(f"{out}/ and {out.with_suffix('.png')}" + (f" and {args.npz}" if args.npz else "")
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
    path = args.ae or svg.latest_run("ae", demo=True if args.demo else None) or Path(__file__).parent / "demo.pt"
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
    files = svg.list_images(args.reconstruct)
    if not files:
        raise svg.UserError(f"--reconstruct {args.reconstruct}: no images there")
    out = Path(args.out or "reconstructions")
    settings = {"autoencoder": ae.fingerprint, "reconstruct": os.path.abspath(args.reconstruct), "align": args.align}
    claim_folder(out, settings, args.overwrite)
    mine, first = files[svg.rank()::svg.world_size()], []
    for j in range(0, len(mine), args.batch_size):
        chunk = mine[j:j + args.batch_size]
        originals = np.stack([svg.crop(svg.open_rgb(f), ae.image_size) for f in chunk])
        with torch.no_grad(), svg.autocast(device, args.precision):
            latents = ae.encode(svg.to_float(torch.from_numpy(originals), device), args.align)
            images = svg.to_uint8(ae.decode(latents))
        for file, image in zip(chunk, images, strict=True):
            target = (out / os.path.relpath(file, args.reconstruct)).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target)
        first = first or [originals[:10], images[:10]]
    svg.barrier()
    if svg.rank() == 0:
        title = f"{path}: originals above reconstructions"
        svg.grid_image(np.concatenate(first), len(first[0]), title=title).save(out.with_suffix(".png"))
        print(f"{len(files)} reconstructions by {path} in {out}/, overview in {out.with_suffix('.png')}")


def main():
    args = parse_args()
    device = svg.setup()
    (reconstruct if args.reconstruct else generate)(args, device)


if __name__ == "__main__":
    svg.run_main(main)
