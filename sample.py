"""Class-conditional samples of a trained model: noise -> pictures.

    python sample.py --steps 5                           # the last run, or the shipped demo.pt
    python sample.py --classes 207 360 --seed 1
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --guidance 1.55 --npz samples.npz           # for FID

Writes samples/000000.png and so on, named by global index; record.json there says what they are and
overview/samples.png shows the first ones. The noise and label of image i depend on --seed and i alone, not on
the batch or the number of processes; the pictures are then equal up to rounding.
"""
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import svg
from lib import data, figures, files, layouts, runs, shapes
from lib.files import UserError

# -- Flags and models, also for editing and probes ---------------------------------------------------------

def add_model_flags(add):
    """Add the flags that find_models reads."""
    add("--demo", action="store_true", help="only look at --demo runs, not at others, before taking demo.pt")
    add("--ckpt", help="transformer checkpoint, ours or the authors' (default: the newest run, else demo.pt)")
    add("--ae", help="autoencoder checkpoint (default: the one the transformer was trained on)")
    add("--any-ae", action="store_true", help="decode by --ae even if the transformer was not trained on it")
    add("--latent-stats", help="the authors' statistics file: latent mean and std")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")


def add_flow_flags(add, steps, shift):
    """Add the flags that flow_settings reads."""
    add("--steps", type=runs.positive, default=steps, help="steps of the sampler")
    add("--guidance", type=runs.number(0, 1000), default=4.0,
        help="guidance scale; 1: none (paper: 4 for figures, 1.55 for FID)")
    add("--guidance-interval", type=runs.number(0, 1), nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="range of t that is guided")
    add("--shift", type=runs.number(above=0), default=shift, help="timestep shift in sampling")


def add_sampler_flags(add):
    """Add --sampler, which images_of reads, and --no-zero-init, which flow_settings reads too."""
    add("--sampler", choices=svg.SAMPLERS, default="euler",
        help="Heun: second order, two evaluations a step (EDM, arXiv 2206.00364)")
    add("--no-zero-init", dest="zero_init", action="store_false", help="do not skip the first guided step")


def flow_settings(args):
    """Return the flags as arguments of the samplers."""
    return {"steps": args.steps, "guidance": args.guidance, "shift": args.shift, "zero_init": args.zero_init,
            "guidance_interval": args.guidance_interval}


def describe_sampler(args):
    """Return "25 Euler steps, guidance 4, shift 0.15"; UserError for an empty interval."""
    start, end = args.guidance_interval
    if start > end:
        raise UserError(f"--guidance-interval {start:g} {end:g}: it ends before it starts")
    return f"{args.steps} {args.sampler.title()} steps, guidance {args.guidance:g}, shift {args.shift:g}"


def evaluations(sampler, **settings):
    """Return how often a sample evaluates the network (NFE); a guided velocity takes two evaluations."""
    counted = []

    def velocity(x, t, y):
        counted.append(len(x))
        return x

    velocity.num_classes = 0
    svg.SAMPLERS[sampler](velocity, torch.zeros(1, 1, 1), torch.tensor([0]), **settings)
    return sum(counted)


def newest_run(stage, args):
    """Return the newest run of a stage, with --demo of the demo's, or else demo.pt."""
    only = {"demo": True} if args.demo else {}
    return runs.latest_run(stage, **only) or shapes.DEMO_PT


def find_models(args, device, decode_only=True):
    """Return the transformer and the autoencoder that belong together, and the transformer's path.

    decode_only: False if the autoencoder must also encode, which needs its encoder's file.
    """
    path = args.ckpt or newest_run("sit", args)
    sit = svg.load_sit(path).to(device)
    trained_on = sit.meta.get("autoencoder", {})
    ae_path = args.ae or trained_on.get("path")
    if not ae_path or not os.path.exists(ae_path):
        raise UserError(f"{path} needs its autoencoder, {ae_path or 'not named there'}: name it by --ae")
    ae = svg.load_autoencoder(ae_path, decode_only=decode_only, weights_dir=args.weights).to(device)
    if (sit.channels, sit.grid) != (ae.channels, ae.grid):
        raise UserError(f"{path} makes latents of {sit.grid}x{sit.grid}x{sit.channels}, the autoencoder "
                        f"{ae_path} takes {ae.grid}x{ae.grid}x{ae.channels}: they do not belong together")
    if trained_on and trained_on["fingerprint"] != ae.fingerprint and not args.any_ae:
        raise UserError(f"{path} was not trained on the autoencoder {ae_path}: name the right one by --ae, "
                        f"or insist by --any-ae")
    if args.latent_stats:
        sit.set_latent_stats(*layouts.load_latent_stats(args.latent_stats))
    if sit.latent_std.isnan().any():
        raise UserError(f"{path} does not hold the latents' mean and std: name them by --latent-stats (the "
                        f"authors' dinov3_sp_stats.pt)")
    return sit, ae, path


def class_numbers(names, sit):
    """Return --classes as numbers: each is a number, or a name that the checkpoint knows; None: all."""
    if names is None:
        return list(range(sit.num_classes))
    known = sit.meta.get("classes", [])
    by_position = not any(map(str.isdecimal, known))  # else 3 would mean the folder 2 of 0, 1, 10, 2
    numbers = []
    for name in names:
        if name not in known and not (by_position and name.isdecimal() and int(name) < sit.num_classes):
            raise UserError(f"--classes {name}: the model has classes 0 to {sit.num_classes - 1} "
                            f"({', '.join(known[:10]) or 'without names'})")
        numbers.append(known.index(name) if name in known else int(name))
    return numbers


def fingerprints(sit, ae):
    """Return what identifies the models of some pictures, for the record beside them."""
    return {"step": sit.meta.get("step"),
            "transformer": sit.meta.get("fingerprint") or files.fingerprint(sit.state_dict()),
            "statistics": files.fingerprint({"mean": sit.latent_mean, "std": sit.latent_std}),
            "autoencoder": ae.fingerprint}


# -- Sampling ----------------------------------------------------------------------------------------------

def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add_model_flags(add)
    runs.add_output_flags(parser, "samples")
    add("--num", type=runs.positive, default=40, help="images in all")
    add("--classes", "--class", nargs="+", help="class numbers or names, taken in turn (default: all)")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="classes in turn, or drawn at random")
    add("--seed", type=runs.not_negative, default=0, help="of noise and random labels")
    add_flow_flags(add, steps=25, shift=0.15)
    add_sampler_flags(add)
    add("--batch", type=runs.positive, default=64, help="images at a time and process")
    add("--export", metavar="FILE.pt", type=runs.output_file("sit"), help="only write transformer (EMA), "
        "autoencoder and class names into one file for --ckpt, to give away")
    runs.add_speed_flags(parser)
    parser.set_defaults(compile=False)  # a minute's wait pays off only for thousands of images
    add("--npz", type=runs.output_file("program"),
        help="also write all images as arr_0, uint8 [num, H, W, 3], for ADM")
    return parser.parse_args()


def bundle(sit, ae):
    """Return one checkpoint of a transformer and its autoencoder, as demo.pt is, without the frozen encoder.

    load_sit and load_autoencoder read it; to encode, the encoder's file is looked for as that of a run is.
    """
    autoencoder = ae.to_checkpoint()
    if encoder := autoencoder.get("encoder_file"):
        autoencoder["encoder_file"] = {**encoder, "file": Path(encoder["file"]).name}
    transformer = {"kind": "sit", "config": sit.config, **sit.meta, "ema": sit.state_dict(),
                   "fingerprint": files.fingerprint(sit.state_dict()),
                   "autoencoder": {"path": "", "fingerprint": autoencoder["fingerprint"]}}
    return {"sit": transformer, "autoencoder": autoencoder}


def label_of(i, numbers, args):
    """Return the class of image i, a function of (seed, i) alone."""
    if args.labels == "random":
        return numbers[np.random.default_rng((args.seed, i, 1)).integers(len(numbers))]
    return numbers[i % len(numbers)]


def images_of(sit, ae, noise, y, args):
    """Return uint8 images [B, H, W, 3] of noise [B, N, C] and labels y [B]."""
    with torch.no_grad(), runs.autocast(noise.device, args.precision):
        latents = svg.SAMPLERS[args.sampler](sit, noise, y, **flow_settings(args))
        return data.to_pictures(ae.decode(sit.denormalize(latents)))


def write_images(sit, ae, numbers, out, args, device):
    """Write this rank's share of the images, with progress lines from rank 0."""
    mine = list(range(args.num))[runs.rank()::runs.world_size()]
    parts = [mine[j:j + args.batch] for j in range(0, len(mine), args.batch)]
    written = ()

    def noise_of(indices):
        return svg.sample_noise(args.seed, indices, (sit.grid ** 2, sit.channels))

    with ThreadPoolExecutor(8) as pool:  # Pillow and NumPy work outside of Python's lock
        noises = pool.map(noise_of, parts[:1])
        for i, indices in enumerate(runs.progress(parts, "sampling", args.num), 1):
            noise = next(noises).to(device)
            noises = pool.map(noise_of, parts[i:i + 1])  # while this batch is computed
            y = torch.tensor([label_of(j, numbers, args) for j in indices], device=device)
            images = images_of(sit, ae, noise, y, args)
            list(written)  # the batch before: its errors are raised here
            written = pool.map(files.save_image, [out / f"{j:06d}.png" for j in indices], images)
        list(written)


def compile_models(sit, ae):
    """Compile what runs at every step, and the decoder."""
    runs.compile_blocks(sit)
    ae.decoder.compile(dynamic=False)


def main():
    """Sample: write PNGs, an overview and, with --npz, one file of all images."""
    args = parse_args()
    device = runs.setup(args.precision)

    # Models, classes, and the folder to write.
    start = time.time()
    sit, ae, path = find_models(args, device)
    if args.export:
        if runs.rank() == 0:
            files.save_checkpoint(args.export, bundle(sit, ae))
            print(f"{args.export}: {path} and its autoencoder, without the frozen encoder")
        return
    numbers = class_numbers(args.classes, sit)
    out = Path(args.out)
    sampler = describe_sampler(args)
    names = [f"{i:06d}.png" for i in range(args.num)]
    overview = f"{files.OVERVIEW}/samples.png"
    runs.claim_folder(args, [*names, overview], fingerprints(sit, ae))
    name = "the shipped demo.pt" if Path(path) == shapes.DEMO_PT else path
    runs.say_start(device, args.precision, str(name), runs.millions(SiT=sit, decoder=ae.decoder),
                   f"writes {args.num} images to {out}/")
    nfe = evaluations(args.sampler, **flow_settings(args))
    runs.say(f"{sampler}: {nfe} network evaluations (NFE) an image")
    if args.compile:
        compile_models(sit, ae)

    # Samples.
    write_images(sit, ae, numbers, out, args, device)
    runs.barrier()
    if runs.rank() != 0:
        return

    # Overview.
    shown = np.stack([np.asarray(Image.open(out / name)) for name in names[:80]])
    labels = [label_of(i, numbers, args) for i in range(len(shown))]
    classes = sit.meta.get("classes", range(sit.num_classes))
    title = f"{name}: {sampler}, seed {args.seed}"
    files.save_image(out / overview, figures.grid_image(shown, 10, [classes[i] for i in labels], title))
    results = f"{out}/ and {out}/{overview}"
    if args.npz:
        images = np.stack([np.asarray(Image.open(out / name)) for name in names])
        files.write_atomically(args.npz, lambda file: np.savez(file, arr_0=images, program="SVG"))
        results += f" and {args.npz}"
    print(f"{results} in {time.time() - start:.1f} s")


if __name__ == "__main__":
    runs.run_main(main)
