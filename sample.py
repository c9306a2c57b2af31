"""Every picture: class-conditional samples of a trained model, reconstructions, edits, interpolations.

    python sample.py --steps 5                           # the last run, or the shipped demo.pt
    python sample.py --classes 207 360 --seed 1
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --guidance 1.55 --npz samples.npz           # for FID
    python sample.py --reconstruct val/ --out reconstructions
    python sample.py --edit photo.jpg --box 60,40,200,180 --class 207                    # paper, appendix C
    python sample.py --interpolate slerp lerp --class 207 --seeds 1 2 --frames 8         # appendix D

Writes samples/000000.png and so on, named by global index; samples.json beside them says what they are and
samples.png is an overview. Image i depends on --seed and i alone, not on batch size or number of processes.
"""
import argparse
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import svg

DEMO_PT = Path(__file__).parent / "demo.pt"
_SAMPLING = "--num --labels --npz --compile --no-compile"
IDLE = {  # flags that do nothing beside another
    "--reconstruct": f"{_SAMPLING} --bench --ckpt --any-ae --latent-stats --class --classes --seed --steps "
                     "--guidance --guidance-interval --no-zero-init --shift",
    "--edit": f"{_SAMPLING} --bench --batch-size --no-zero-init",
    "--interpolate": f"{_SAMPLING} --bench --seed",
    "--bench": "--num --labels --npz --class --classes --out --overwrite",
}
NEEDS = {"--align": "--reconstruct --edit", "--box": "--edit", "--outside": "--edit", "--t-edit": "--edit",
         "--seeds": "--interpolate", "--frames": "--interpolate"}


def add_model_flags(add):
    """The flags that find_models reads."""
    add("--demo", action="store_true", help="only look at --demo runs, not at others, before taking demo.pt")
    add("--ckpt", help="transformer checkpoint, ours or the authors' (default: the newest run, else demo.pt)")
    add("--ae", help="autoencoder checkpoint (default: the one the transformer was trained on)")
    add("--any-ae", action="store_true", help="decode by --ae even if the transformer was not trained on it")
    add("--latent-stats", help="the authors' statistics file: latent mean and std")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")


def parse_args():
    """The command line; UserError for a flag that is wrong or out of place."""
    p = svg.Parser(__doc__)
    add_model_flags(p.add_argument_group("model").add_argument)
    add = p.add_argument_group("samples").add_argument
    add("--out", help="folder to write (default: samples, reconstructions, edit or interpolation)")
    add("--overwrite", action="store_true", help="replace what another run left in --out")
    add("--num", type=svg.positive, default=40, help="images in all")
    add("--classes", "--class", nargs="+", help="class numbers or names, taken in turn (default: all)")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="classes in turn, or drawn at random")
    add("--seed", type=svg.not_negative, default=0, help="of noise and random labels")
    add("--steps", type=svg.positive, default=25, help="Euler steps; 100 in editing")
    add("--guidance", type=svg.number(), default=4.0,
        help="guidance scale; 1: none (paper: 4 for figures, 1.55 for FID)")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="range of t that is guided")
    add("--no-zero-init", dest="zero_init", action="store_false", help="do not skip the first guided step")
    add("--shift", type=svg.number(above=0), default=0.15, help="timestep shift in sampling; 0.4 in editing")
    add("--batch-size", type=svg.positive, default=64, help="images at a time and process")
    svg.add_speed_flags(p)
    p.set_defaults(compile=False)  # a minute's wait pays off only for thousands of images
    add("--npz", help="also write all images as arr_0, uint8 [num, H, W, 3], for ADM's evaluator")

    group = p.add_argument_group("instead of samples")
    add = group.add_mutually_exclusive_group().add_argument
    add("--reconstruct", metavar="DIR", help="encode and decode the images of a folder")
    add("--edit", metavar="PHOTO", help="redraw --box of a picture as one --class")
    add("--interpolate", nargs="+", choices=("slerp", "lerp"), help="walk between the noises of two --seeds")
    add = group.add_argument
    add("--align", choices=("running", "batch"),
        help="alignment statistics of encoding (default: running; the authors' checkpoint allows only batch)")
    add("--box", type=box, metavar="X0,Y0,X1,Y1", help="what to redraw, in pixels of the picture")
    add("--outside", action="store_true", help="redraw all but the box")
    add("--t-edit", type=svg.number(0, 0.99), default=0.2,
        help="how far the flow is inverted, of 1 (data) to 0 (noise); lower changes more")
    add("--seeds", type=svg.not_negative, nargs=2, metavar=("A", "B"), help="ends of the interpolation")
    add("--frames", type=svg.positive, default=8, help="of the interpolation, both ends included")
    if any(a.split("=")[0] == "--edit" for a in sys.argv[1:]):
        p.set_defaults(steps=100, shift=0.4)  # paper, appendix C
    svg.refuse_idle(IDLE, NEEDS)
    args = p.parse_args()
    if args.npz and not os.path.isdir(os.path.dirname(args.npz) or "."):
        raise svg.UserError(f"--npz {args.npz}: no such folder")
    for mode, flag in (("edit", "box"), ("interpolate", "seeds")):
        if getattr(args, mode) and not getattr(args, flag):
            raise svg.UserError(f"--{mode} needs --{flag}")
        if getattr(args, mode) and len(args.classes or ()) != 1:
            raise svg.UserError(f"--{mode} needs one class: --class 207")
    return args


def box(text):
    """argparse type: "x0,y0,x1,y1", a rectangle in whole pixels."""
    values = [int(v) if v.strip().isdecimal() else -1 for v in text.split(",")]
    if len(values) != 4 or min(values) < 0 or values[0] >= values[2] or values[1] >= values[3]:
        raise argparse.ArgumentTypeError(f"'{text}' is not x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1")
    return values


def find_models(args, device, encoder=False):
    """The transformer and the autoencoder that belong together, and the first's path; encoder=None: an
    autoencoder that can encode too.
    """
    path = args.ckpt or svg.latest_run("dit", demo=True if args.demo else None) or DEMO_PT
    sit = svg.load_sit(path).to(device)
    trained_on = sit.meta.get("autoencoder", {})
    ae_path = args.ae or (path if Path(path).name == "demo.pt" else trained_on.get("path"))
    if not ae_path:
        raise svg.UserError(f"{path} does not say which autoencoder it was trained on: name it by --ae")
    if not os.path.exists(ae_path):
        raise svg.UserError(f"{path} needs the autoencoder {ae_path}, which is not there: name it by --ae")
    ae = svg.load_autoencoder(ae_path, encoder, args.weights).to(device)
    if (sit.channels, sit.grid) != (ae.channels, ae.grid):
        raise svg.UserError(f"{path} makes latents of {sit.grid}x{sit.grid}x{sit.channels}, the autoencoder "
                            f"{ae_path} takes {ae.grid}x{ae.grid}x{ae.channels}: they do not belong together")
    if trained_on and trained_on["fingerprint"] != ae.fingerprint and not args.any_ae:
        raise svg.UserError(f"{path} was not trained on the autoencoder {ae_path}: name the right one by "
                            f"--ae, or insist by --any-ae")
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
        number = int(name) if str(name).isdecimal() else classes.index(name) if name in classes else -1
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


def describe(sit, ae, args, *told):
    """What decides the pictures, for the record beside them."""
    told += ("seed", "steps", "guidance", "zero_init", "shift", "precision")
    return {"step": sit.meta.get("step"), "transformer": svg.fingerprint(sit.state_dict()),
            "autoencoder": ae.fingerprint, **{k: getattr(args, k) for k in told},
            "guidance_interval": list(args.guidance_interval)}


def images_from_noise(sit, ae, noise, y, args):
    """noise [B, N, C], labels y [B] -> uint8 [B, H, W, 3]."""
    with torch.no_grad(), svg.autocast(noise.device, args.precision):
        latents = svg.euler_sample(sit, noise, y, args.steps, args.guidance, args.shift, args.zero_init,
                                   args.guidance_interval)
        return svg.to_uint8(ae.decode(ae.denormalize(latents)))


def bench(args, device):
    """Time the sampling of batches by --ckpt or (--demo) demo.pt, else by fresh models of size XL."""
    if args.ckpt or args.demo:
        args.ckpt = args.ckpt or DEMO_PT
        sit, ae, path = find_models(args, device)
    else:
        models = svg.SiT("XL"), svg.Autoencoder(None, feature_channels=384)
        (sit, ae), path = (m.to(device).eval() for m in models), "XL"
    compile_models(sit, ae, args)

    def make(n):
        noise = svg.sample_noise(args.seed, range(n), (sit.grid ** 2, sit.channels)).to(device)
        y = torch.arange(n, device=device) % sit.num_classes
        return lambda: images_from_noise(sit, ae, noise, y, args)

    svg.bench(args, device, make, args.batch_size * svg.world_size(), script="sample", model=str(path),
              euler_steps=args.steps, guidance=args.guidance)


def compile_models(sit, ae, args):
    """torch.compile what runs at every step, and the decoder, with --compile."""
    if args.compile:
        svg.compile_blocks(sit)
        ae.decoder.compile(dynamic=False)


def generate(args, device):
    """Sample; returns nothing, leaves PNGs, an overview and, if asked for, an .npz."""
    sit, ae, path = find_models(args, device)
    classes = sit.meta.get("classes", [])
    numbers = class_numbers(args.classes, classes, sit.num_classes)
    out = Path(args.out or "samples")
    claim_folder(out, describe(sit, ae, args, "num", "classes", "labels"), args.overwrite)
    shipped = Path(path) == DEMO_PT
    if svg.rank() == 0:
        found = "no run below runs/: " * (shipped and not args.ckpt)
        print(f"{found}using {'the shipped demo.pt' if found else path}")
        print(f"{args.num} images, {args.steps} Euler steps, guidance {args.guidance:g}, "
              f"shift {args.shift:g}", flush=True)
    compile_models(sit, ae, args)
    mine = list(range(args.num))[svg.rank()::svg.world_size()]
    start = time.time()
    for j in range(0, len(mine), args.batch_size):
        indices = mine[j:j + args.batch_size]
        noise = svg.sample_noise(args.seed, indices, (sit.grid ** 2, sit.channels)).to(device)
        y = torch.tensor([label_of(i, numbers, args) for i in indices], device=device)
        for i, image in zip(indices, images_from_noise(sit, ae, noise, y, args), strict=True):
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
        title = (f"{'demo.pt' if shipped else path}: {args.steps} Euler steps, guidance {args.guidance:g}, "
                 f"seed {args.seed}")
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


def need_alignment(ae, path, args):
    """Refuse to encode by running statistics that an autoencoder does not have."""
    if args.align != "batch" and not ae.aligned:
        raise svg.UserError(f"{path} keeps no running alignment statistics, as the authors' does: give "
                            f"--align batch")


def reconstruct(args, device):
    """Encode and decode each image of a folder, cropped the ADM way; same names, as PNG."""
    path = args.ae or svg.latest_run("ae", demo=True if args.demo else None) or DEMO_PT
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
    need_alignment(ae, path, args)
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


# -- Editing (paper, appendix C) ---------------------------------------------------------------------------

def edit_mask(photo_size, box, size, grid, outside=False):
    """Weights [grid*grid, 1] of the noise: a 2-D Gaussian about the box's centre for the tokens in the box,
    or what it leaves of 1 for those outside; 0 for the others. The box is in pixels of the picture, of
    photo_size (width, height); its central square, shrunk to `size` pixels, is what is encoded.
    """
    given, scale = f"--box {','.join(map(str, box))}", size / min(photo_size)
    shift = [(round(n * scale) - size) // 2 for n in photo_size]
    x0, y0, x1, y1 = ((v * scale - shift[i % 2]) * grid / size for i, v in enumerate(box))  # in tokens
    if max(box[0::2]) > photo_size[0] or max(box[1::2]) > photo_size[1]:
        raise svg.UserError(f"{given}: the picture has {photo_size[0]} x {photo_size[1]} pixels")
    y, x = torch.meshgrid(torch.arange(grid) + 0.5, torch.arange(grid) + 0.5, indexing="ij")
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    chosen = ~inside if outside else inside
    if not chosen.any():
        raise svg.UserError(f"{given}{' --outside' * outside}: no token has its centre there; a token is a "
                            f"square of {size / grid / scale:.0f} pixels; only the central square is encoded")
    u, v = (x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0)
    gauss = torch.exp(-2 * (u * u + v * v))  # its sigma is half the box
    return (chosen * (1 - gauss if outside else gauss)).flatten().unsqueeze(1)


def invert(model, latents, times):
    """Run the flow back along rising `times` (the last is 1) without class; {t: state} at each of them."""
    trajectory = {times[-1]: latents}

    def record(t, x):
        trajectory[t] = x
        return x

    null = torch.full(latents.shape[:1], model.num_classes, device=latents.device)
    svg.euler_sample(model, latents, null, times[::-1], after=record)
    return trajectory


def edit_latents(model, latents, y, weights, times, seed=0, guidance=4.0, guidance_interval=(0.0, 1.0)):
    """Redraw normalised latents [1, N, C] as class y [1] where weights [N, 1] are above 0; the rest stays,
    bit for bit.

    The flow is inverted to times[0]; there the noise is renewed by its weight, sqrt(1 - w^2) old + w new, and
    again after each step by the share in which the step lowers it, so that what is new fades with 1 - t;
    elsewhere the inverted trajectory is put back.
    """
    trajectory = invert(model, latents, times)
    chosen, steps = weights > 0, {t: i for i, t in enumerate(times)}

    def renew(t, x, old, share):
        w = weights * share ** 0.5
        new = svg.sample_noise(seed, [steps[t]], x.shape[1:]).to(x.device)
        return torch.where(chosen, x + (1 - t) * (((1 - w * w).sqrt() - 1) * old + w * new), trajectory[t])

    def after(t, x):
        nonlocal state
        t_from = times[steps[t] - 1]
        velocity = (x - state) / (t - t_from)
        state = renew(t, x, x - t * velocity, (t - t_from) / (1 - t_from))
        return state

    t, start = times[0], trajectory[times[0]]
    state = renew(t, start, (start - t * latents) / (1 - t), 1.0)
    return svg.euler_sample(model, state, y, times, guidance, zero_init=False, after=after,
                            guidance_interval=guidance_interval)


def edit(args, device):
    """Redraw the box of a picture as a class; an overview shows original, reconstruction, mask and edit."""
    sit, ae, path = find_models(args, device, encoder=None)
    need_alignment(ae, path, args)
    y = torch.tensor(class_numbers(args.classes, sit.meta.get("classes", []), sit.num_classes), device=device)
    photo = svg.open_rgb(args.edit)
    weights = edit_mask(photo.size, args.box, ae.image_size, ae.grid, args.outside).to(device)
    out = Path(args.out or "edit")
    told = ("edit", "box", "outside", "t_edit", "classes", "align")
    claim_folder(out, describe(sit, ae, args, *told), args.overwrite)
    original = svg.crop(photo, ae.image_size)
    times = [args.t_edit, *(t for t in svg.euler_times(args.steps, args.shift) if t > args.t_edit)]
    with torch.no_grad(), svg.autocast(device, args.precision):
        latents = ae.encode(svg.to_float(torch.from_numpy(original)[None], device), args.align)
        latents = ae.normalize(latents).float()
        edited = edit_latents(sit, latents, y, weights, times, args.seed, args.guidance,
                              args.guidance_interval)
        before, after = (svg.to_uint8(ae.decode(ae.denormalize(z)))[0] for z in (latents, edited))
    if svg.rank() == 0:
        Image.fromarray(after).save(out / f"{Path(args.edit).stem}.png")
        mask = (weights.view(ae.grid, ae.grid, 1).cpu().numpy() * 255).round().astype(np.uint8).repeat(3, 2)
        mask = mask.repeat(ae.ratio, 0).repeat(ae.ratio, 1)
        labels = ("original", "reconstruction", "noise (white: all new)", f"edit: class {args.classes[0]}")
        title = (f"{args.edit}: t_edit {args.t_edit:g}, {len(times) - 1} of {args.steps} Euler "
                 f"steps, guidance {args.guidance:g}, seed {args.seed}")
        tiles = np.stack([original, before, mask, after])
        svg.grid_image(tiles, 4, labels, title, max(192, ae.image_size)).save(beside(out, ".png"))
        print(f"{out / Path(args.edit).stem}.png and {beside(out, '.png')}, by {path}")


# -- Interpolation (paper, appendix D) ---------------------------------------------------------------------

def interpolate_noise(a, b, weights, kind):
    """Noises [n, N, C] between a and b [N, C] at weights [n] of b: along the line (lerp), or along the great
    circle (slerp), which keeps the length that noise has.
    """
    w = weights.view(-1, 1, 1)
    if kind == "lerp":
        return (1 - w) * a + w * b
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
    if angle < 1e-4:  # the same seed twice
        return a.expand(len(w), -1, -1)
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()


def interpolate(args, device):
    """Frames from the first sample of one seed to that of another, and a labelled strip, for each kind."""
    sit, ae, path = find_models(args, device)
    y = torch.tensor(class_numbers(args.classes, sit.meta.get("classes", []), sit.num_classes), device=device)
    out = Path(args.out or "interpolation")
    claim_folder(out, describe(sit, ae, args, "interpolate", "seeds", "frames", "classes"), args.overwrite)
    a, b = (svg.sample_noise(seed, [0], (sit.grid ** 2, sit.channels))[0] for seed in args.seeds)
    weights = torch.linspace(0, 1, args.frames)
    for kind in args.interpolate:
        noise = interpolate_noise(a, b, weights, kind).to(device)
        frames = np.concatenate([images_from_noise(sit, ae, part, y.expand(len(part)), args)
                                 for part in noise.split(args.batch_size)])
        if svg.rank() == 0:
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(out / f"{kind}-{i:06d}.png")
            labels = [f"seed {args.seeds[0]}", *(f"{w:.2f}" for w in weights[1:-1]), f"seed {args.seeds[1]}"]
            title = f"{kind}, class {args.classes[0]}: {args.steps} Euler steps, guidance {args.guidance:g}"
            svg.grid_image(frames, len(frames), labels[:len(frames)], title).save(beside(out, f"-{kind}.png"))
            print(f"{out}/{kind}-*.png and {beside(out, f'-{kind}.png')}, by {path}")


def main():
    """Make the pictures that the flags ask for."""
    args = parse_args()
    device = svg.setup(args.precision)
    mode = (bench if args.bench else reconstruct if args.reconstruct else edit if args.edit else
            interpolate if args.interpolate else generate)
    mode(args, device)


if __name__ == "__main__":
    svg.run_main(main)
