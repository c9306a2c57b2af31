"""Pictures from pictures, and walks through noise: reconstruct, redraw, interpolate.

    python -m lab.edit reconstruct val/ --out reconstructions        # encode and decode a folder's images
    python -m lab.edit redraw photo.jpg --box 60,40,200,180 --class 207  # paper, appendix C
    python -m lab.edit interpolate --class 207 --seeds 1 2 --frames 8    # paper, appendix D

Each takes --help. Each writes its pictures into a folder, with a record (record.json) and a labelled overview
(overview/) in it.
"""
import argparse
import itertools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import svg
from lib import data, figures, files, runs
from lib.files import UserError
from sample import (
    add_flow_flags,
    add_model_flags,
    add_sampler_flags,
    class_numbers,
    describe_sampler,
    find_models,
    fingerprints,
    images_of,
    newest_run,
)

# -- Reconstruction ----------------------------------------------------------------------------------------


def reconstruct(args, device):
    """Encode and decode each image of a folder, cropped the ADM way; same names, as PNG."""
    path = args.ae or newest_run("autoencoder", args)
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
    dataset = data.ImageFolder(args.folder, ae.image_size, flat=True)
    targets = [os.path.splitext(os.fsdecode(name))[0] + ".png" for name in dataset.names]
    if len(set(targets)) < len(targets):
        raise UserError(f"{args.folder}: two images of different suffix would become one PNG: rename one")
    out = Path(args.out)
    if Path(args.folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in {args.folder}, which is reconstructed: give another --out")
    overview = f"{files.OVERVIEW}/reconstructions.png"
    runs.claim_folder(args, [*targets, overview], {"autoencoder": ae.fingerprint})
    runs.say_start(device, args.precision, f"{args.folder}: {len(dataset):,} images",
                   runs.millions(autoencoder=ae), f"writes {out}/")

    # This rank's share of the images.
    mine = range(len(targets))[runs.rank()::runs.world_size()]
    batches = data.in_batches(dataset, mine, args.batch, args.workers, "reconstructing")
    written = ()
    with ThreadPoolExecutor(8) as pool:  # Pillow compresses outside of Python's lock
        for indices, images, _, corrupt in batches:
            with torch.no_grad(), runs.autocast(device, args.precision):
                images = data.to_pictures(ae.decode(ae.encode(data.to_float(images, device))))
            for i in set(corrupt.tolist()) - {-1}:
                warnings.warn(f"{dataset.name(i)}: not a readable image, left out")
            good = (corrupt < 0).tolist()
            paths = [out / targets[i] for i in itertools.compress(indices, good)]
            list(written)  # the batch before: its errors are raised here
            written = pool.map(files.save_image, paths, images[good])
        list(written)
    runs.barrier()
    if runs.rank() != 0:
        return

    # Overview.
    done = [i for i, target in enumerate(targets) if (out / target).exists()]
    shown = done[::max(1, len(done) // 10)][:10]
    pairs = [dataset[i, 0][0] for i in shown]
    pairs += [np.asarray(Image.open(out / targets[i])) for i in shown]
    title = f"originals, reconstructions by {path}"
    files.save_image(out / overview, figures.grid_image(np.stack(pairs), len(shown), title=title))
    print(f"{len(done)} images reconstructed by {path} in {out}/, overview in {out}/{overview}")


# -- Redrawing a part of a picture (paper, appendix C) -----------------------------------------------------

def edit_mask(photo_size, box, size, grid, outside=False):
    """Return the weights [grid*grid, 1] of the new noise.

    In the box they are a 2-D Gaussian about its centre, whose sigma is half the box, and 0 elsewhere; with
    `outside` they are 0 in the box, and 1 minus the Gaussian elsewhere. The box is in pixels of the picture,
    of photo_size (width, height); its central square, shrunk to `size` pixels, is what is encoded.
    """
    given = f"--box {','.join(map(str, box))}" + (" --outside" if outside else "")
    if max(box[0::2]) > photo_size[0] or max(box[1::2]) > photo_size[1]:
        raise UserError(f"{given}: the picture has {photo_size[0]} x {photo_size[1]} pixels")
    # The box in tokens of the central square: its corners (x, y).
    scale = size / min(photo_size)
    left_top = ((torch.tensor(photo_size) * scale).round() - size) // 2
    low, high = (torch.tensor(box).view(2, 2) * scale - left_top) * grid / size
    y_x = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)) + 0.5  # centres of the tokens
    centres = y_x.flip(1)
    chosen = ((centres > low) & (centres < high)).all(1)
    weights = torch.exp(-2 * ((centres - (low + high) / 2) / (high - low)).square().sum(1))
    if outside:
        chosen = ~chosen
        weights = 1 - weights
    if not chosen.any():
        raise UserError(f"{given}: no token has its centre there; a token is a square of "
                        f"{size / grid / scale:.0f} pixels; only the central square is encoded")
    return (chosen * weights).unsqueeze(1)


def invert(model, latents, times):
    """Run the flow back along rising `times` (the last is 1) without class; return the state at each."""
    no_class = torch.full(latents.shape[:1], model.num_classes, device=latents.device)
    trajectory = [latents]
    for t, t_before in itertools.pairwise(times[::-1]):
        x = trajectory[-1]
        trajectory.append(x + (t_before - t) * svg.guided_velocity(model, x, t, no_class))
    return trajectory[::-1]


@torch.no_grad()
def edit_latents(model, latents, y, weights, times, seed=0, guidance=4.0, guidance_interval=(0.0, 1.0)):
    """Redraw normalised latents [1, N, C] as class y [1] where weights [N, 1] are above 0.

    The rest stays, bit for bit. The flow is inverted to times[0]. There the noise is renewed by its weight w,
    sqrt(1 - w^2) old + w new, and again after each step by the share in which the step lowers it, so that
    what is new fades with 1 - t. Elsewhere the inverted trajectory is put back.
    """
    trajectory = invert(model, latents, times)

    def renew(i, x, old, share):
        """Renew the noise `old` in the state x of times[i]."""
        w = weights * share ** 0.5
        new = svg.sample_noise(seed, [i], x.shape[1:]).to(x.device)
        change = ((1 - w * w).sqrt() - 1) * old + w * new
        return torch.where(weights > 0, x + (1 - times[i]) * change, trajectory[i])

    start = times[0]
    x = renew(0, trajectory[0], (trajectory[0] - start * latents) / (1 - start), 1.0)
    for i, (t, t_next) in enumerate(itertools.pairwise(times), 1):
        v = svg.guided_velocity(model, x, t, y, guidance, guidance_interval)
        noise = x - t * v  # where the step's straight line began
        x = renew(i, x + (t_next - t) * v, noise, (t_next - t) / (1 - t))
    return x


def redraw(args, device):
    """Redraw the box of a picture as a class; the overview shows original, reconstruction, mask, edit."""
    sit, ae, path = find_models(args, device, decode_only=False)
    y = torch.tensor(class_numbers(args.classes, sit), device=device)
    sampler = describe_sampler(args)
    photo = data.open_rgb(args.photo)
    weights = edit_mask(photo.size, args.box, ae.image_size, ae.grid, args.outside).to(device)
    out = Path(args.out)
    result = f"{Path(args.photo).stem}.png"
    overview = f"{files.OVERVIEW}/{result}"
    runs.claim_folder(args, [result, overview], fingerprints(sit, ae))
    runs.say_start(device, args.precision, f"{args.photo}, {photo.width} x {photo.height} pixels",
                   runs.millions(SiT=sit, autoencoder=ae), f"writes {out}/")
    original = data.crop(photo, ae.image_size)
    times = [args.t_edit, *(t for t in svg.euler_times(args.steps, args.shift) if t > args.t_edit)]
    with torch.no_grad(), runs.autocast(device, args.precision):
        image = data.to_float(torch.from_numpy(original)[None], device)
        latents = sit.normalize(ae.encode(image)).float()
        edited = edit_latents(sit, latents, y, weights, times, args.seed, args.guidance,
                              args.guidance_interval)
        before, after = data.to_pictures(ae.decode(sit.denormalize(torch.cat([latents, edited]))))
    if runs.rank() != 0:
        return

    # The result, and an overview.
    files.save_image(out / result, after)
    mask = (weights.view(ae.grid, ae.grid, 1).cpu().numpy() * 255).round().astype(np.uint8)
    mask = mask.repeat(ae.ratio, 0).repeat(ae.ratio, 1).repeat(3, 2)
    labels = ("original", "reconstruction", "noise (white: all new)", f"edit: class {args.classes[0]}")
    title = f"{args.photo}: t_edit {args.t_edit:g}, {sampler}, seed {args.seed}"
    tiles = np.stack([original, before, mask, after])
    files.save_image(out / overview, figures.grid_image(tiles, 4, labels, title, max(192, ae.image_size)))
    print(f"{out}/{result} and {out}/{overview}, by {path}")


# -- Interpolation (paper, appendix D) ---------------------------------------------------------------------

KINDS = ("slerp", "lerp")  # along the great circle, along the line


def interpolate_noise(a, b, weights, kind):
    """Return noises [n, N, C] between a and b [N, C] at weights [n] of b.

    kind: one of KINDS; the great circle keeps the length that noise has.
    """
    w = weights.view(-1, 1, 1)
    if kind == "lerp":
        return (1 - w) * a + w * b
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
    if angle < 1e-4:  # the same seed twice
        return a.expand(len(w), -1, -1)
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()


def interpolate(args, device):
    """Write frames from the first sample of one seed to that of another, and a strip of them, per kind."""
    sit, ae, path = find_models(args, device)
    y = torch.tensor(class_numbers(args.classes, sit), device=device)
    out = Path(args.out)
    names = [f"{kind}-{i:06d}.png" for kind in KINDS for i in range(args.frames)]
    overviews = [f"{files.OVERVIEW}/{kind}.png" for kind in KINDS]
    sampler = describe_sampler(args)
    runs.claim_folder(args, [*names, *overviews], fingerprints(sit, ae))
    runs.say_start(device, args.precision, str(path), runs.millions(SiT=sit, decoder=ae.decoder),
                   f"writes {out}/")
    a, b = (svg.sample_noise(seed, [0], (sit.grid ** 2, sit.channels))[0] for seed in args.seeds)
    weights = torch.linspace(0, 1, args.frames)
    labels = [f"{w:.2f} of seed {args.seeds[1]}" for w in weights]
    for kind in KINDS:
        noise = interpolate_noise(a, b, weights, kind).to(device)
        frames = np.concatenate([images_of(sit, ae, part, y.expand(len(part)), args)
                                 for part in noise.split(args.batch)])
        if runs.rank() == 0:
            for i, frame in enumerate(frames):
                files.save_image(out / f"{kind}-{i:06d}.png", frame)
            title = f"{kind}, class {args.classes[0]}: {sampler}"
            strip = figures.grid_image(frames, len(frames), labels, title)
            files.save_image(out / files.OVERVIEW / f"{kind}.png", strip)
    runs.say(f"{out}/, by {path}")


# -- The command -------------------------------------------------------------------------------------------

def box(text):
    """Parse "x0,y0,x1,y1", a rectangle in whole pixels (an argparse type)."""
    values = list(map(int, text.split(",")))
    if len(values) != 4 or min(values) < 0 or values[0] >= values[2] or values[1] >= values[3]:
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1")
    return values


def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="reconstruct | redraw | interpolate")

    def add_command(function, out, **defaults):
        command = commands.add_parser(function.__name__, doc=function.__doc__)
        command.set_defaults(function=function, **defaults)
        runs.add_output_flags(command, out)
        runs.add_precision_flag(command)
        return command.add_argument

    add = add_command(reconstruct, "reconstructions")
    add("folder", help="folder of images, of any depth")
    add("--demo", action="store_true", help="only look at --demo runs, not at others, before taking demo.pt")
    add("--ae", help="autoencoder checkpoint, SVG's or a VAE's (default: the newest run, else demo.pt)")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--batch", type=runs.positive, default=64, help="images at a time and process")
    add("--workers", type=runs.not_negative, default=min(4, os.cpu_count() or 1),
        help="data loading processes per process; 0: this one loads")

    add = add_command(redraw, "edit", sampler="euler")
    add("photo", help="the picture")
    add("--box", type=box, required=True, metavar="X0,Y0,X1,Y1", help="what to redraw, in its pixels")
    add("--outside", action="store_true", help="redraw all but the box")
    add("--class", dest="classes", nargs=1, required=True, help="number or name of the class")
    add("--t-edit", type=runs.number(0, 0.99), default=0.2,
        help="how far the flow is inverted, of 1 (data) to 0 (noise); lower changes more")
    add("--seed", type=runs.not_negative, default=0, help="seed of the new noise")
    add_flow_flags(add, steps=100, shift=0.4)  # paper, appendix C
    add_model_flags(add)

    add = add_command(interpolate, "interpolation")
    add("--class", dest="classes", nargs=1, required=True, help="number or name of the class")
    add("--seeds", type=runs.not_negative, nargs=2, required=True, metavar=("A", "B"), help="both ends")
    add("--frames", type=runs.positive, default=8, help="pictures, both ends included")
    add("--batch", type=runs.positive, default=64, help="images at a time")
    add_flow_flags(add, steps=25, shift=0.15)
    add_sampler_flags(add)
    add_model_flags(add)
    return parser.parse_args()


def main():
    """Run the command that the first argument names."""
    args = parse_args()
    args.function(args, runs.setup(args.precision))


if __name__ == "__main__":
    runs.run_main(main)
