"""Stage 2: train the diffusion transformer on the latents of a stage-1 autoencoder.

    torchrun --nproc_per_node=8 train_dit.py --model XL --data imagenet/train  # the paper's recipe, batch 256
    python train_dit.py --demo                                                 # after train_ae.py --demo

Finds the newest stage-1 run (or takes --ae) and records its fingerprint. Writes runs/<name>/ like stage 1,
with samples labelled by class as previews. The same command resumes from last.pt.
"""
import copy
import functools
import re
from pathlib import Path

import torch

import svg
from lib import data, figures, files, layouts, runs
from lib.files import UserError

DEMO = {  # what --demo changes
    "data": "shapes://train", "name": "demo-dit", "model": "6,128,4", "batch": 64, "lr": 2e-3, "shift": 0.25,
    "steps": 1250, "ema_decay": 0.99, "log_every": 50, "save_every": 625, "preview_every": 625, "workers": 0}
LATENT_IMAGES = 10_240  # that measure the latents' mean and std at the start; whole batches, as a rule


def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__, DEMO)
    runs.add_training_flags(parser, "dit", batch=256, lr=1e-4, steps=400_000)
    add = parser.add_argument
    add("--model", type=model_size, default="XL", help="B, L, XL, or layers,width,heads; a width below the "
        "latents' channels cannot fit them (RAE, arXiv 2510.11690)")
    add("--no-qk-norm", dest="qk_norm", action="store_false",
        help="no LayerNorm of queries and keys (an ablation: the authors' run without it diverged)")
    add("--predict", choices=("velocity", "x"), default="velocity",
        help="what the network answers, of which the velocity is made; x, the clean latent, wants --clip 1 "
        "and 10,000 steps rather than 2,000")
    add("--statistics", choices=("channel", "element"), default="channel",
        help="what of the latents is normalised by itself: channels, or each channel of each token")
    add("--ae", help="stage-1 checkpoint, ours or the authors', or a VAE in LDM's or diffusers' layout; "
        "default: the newest run")
    add("--latent-stats", help="file of the latents' mean and std, authors' or .npz, in place of measuring")
    add("--cache", action="store_true", help="encode all images and their mirror images once, at the start, "
        "and keep the latents in memory in half precision: 4 bytes times tokens times channels an image")
    add("--shift", type=runs.number(above=0), default=0.4, help="timestep shift in training (RAE's rule, "
        "arXiv 2510.11690: sqrt(4096 / (tokens channels)), 0.20 for latents of 256 x 392)")
    add("--label-dropout", type=runs.number(0, 1), default=0.1, help="share of images trained without class")
    add("--ema-decay", type=runs.number(0, 1), default=0.9999, help="decay of the averaged weights per step")
    add("--preview-steps", type=runs.positive, default=10, help="Euler steps of the preview samples")
    add("--preview-guidance", type=runs.number(0, 1000), default=4.0, help="guidance of the preview samples")
    return parser.parse_args()


def model_size(text):
    """Parse "XL", or "6,192,4" as layers, width and heads (an argparse type)."""
    if text in svg.SIT_SIZES:
        return svg.SIT_SIZES[text]
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise UserError(f"--model {text}: give B, L, XL, or layers,width,heads such as 6,192,4")
    depth, dim, heads = map(int, text.split(","))
    if dim % heads or dim % 4:
        raise UserError(f"--model {text}: the width must be a multiple of 4 and of the heads")
    return {"depth": depth, "dim": dim, "heads": heads}


def open_autoencoder(args, device):
    """Return the frozen autoencoder: that of the run if it resumes, and where to keep it."""
    kept = Path("runs", args.name, "autoencoder.pt")
    path = args.ae or runs.latest_run("autoencoder", demo=args.demo)
    resumes = kept.exists() and kept.with_name("last.pt").exists()
    if resumes and files.read_json(kept.with_name("config.json")).get("ae") == args.ae:
        path = kept  # stage 1 may have gone on since
    if not path:
        raise UserError("no stage-1 run below runs/: run train_ae.py first (for --demo with --demo), or name "
                        "a checkpoint by --ae")
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device).requires_grad_(False)
    if isinstance(ae, svg.VAE):
        ae.train()  # it then draws samples of its posterior, on which latent diffusion is trained
    runs.say(f"autoencoder {path}, step {ae.step or 'unknown'}, fingerprint {ae.fingerprint[:12]}")
    return ae, kept


def encode_flipped(ae, images, flip):
    """Return latents [B, N, C] of uint8 images [B, H, W, 3], of which those where flip [B] are mirrored."""
    x = data.to_float(images, flip.device)
    return ae.encode(torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x))


def choose_flipped(latents, flip):
    """encode_flipped with --cache: choose from latents [B, 2, N, C] of images and mirror images."""
    plain, mirrored = latents.to(flip.device, non_blocking=True).float().unbind(1)
    return torch.where(flip.view(-1, 1, 1), mirrored, plain)


@torch.no_grad()
def update_ema(ema, model, decay):
    """Set ema = decay * ema + (1 - decay) * model, for every parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def main():
    """Run stage 2, from the flags to the last checkpoint."""
    args = parse_args()
    device = runs.setup(args.precision)
    local_batch = runs.local_batch(args)

    # Data, models and optimiser.
    ae, kept = open_autoencoder(args, device)
    initial = args.ema_decay ** args.steps
    if initial > 0.1:
        runs.say(f"--ema-decay {args.ema_decay:g}: of the averaged weights, by which samples are drawn, "
                 f"{initial:.0%} will be the initial ones after {args.steps} steps: give a lower decay")
    dataset = data.open_data(args.data, ae.image_size, seed=args.seed)
    classes = dataset.classes
    torch.manual_seed(args.seed)  # every rank starts from the same weights
    model = svg.SiT(args.model, ae.channels, len(classes), ae.grid, args.qk_norm, args.predict,
                    args.statistics).to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0,
                            fused=device.type != "mps")
    if args.compile:
        runs.compile_blocks(model, ae)
    parallel_model = runs.data_parallel(model)
    latents_of = functools.partial(encode_flipped, ae)
    mine = slice(runs.rank() * local_batch, (runs.rank() + 1) * local_batch)  # of the global batch

    def train_step(step, images, y):
        """Step the optimiser on images, or their latents, and labels: loss, gradient norm, if skipped."""
        runs.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        flip, drop, uniform = torch.rand(3, args.batch, device=device)[:, mine]
        noise = torch.randn(args.batch, ae.grid ** 2, ae.channels, device=device)[mine]
        runs.seed_step(args.seed, step, 1 + runs.rank())  # for a VAE's posterior
        y = svg.drop_labels(y.to(device, non_blocking=True), model.num_classes, args.label_dropout, drop)
        opt.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        parts = runs.micro_batches(args.accumulate, [parallel_model], images, flip < 0.5, y, uniform, noise)
        for x, mirrored, labels, u, n in parts:
            with runs.autocast(device, args.precision):
                with torch.no_grad():
                    latents = model.normalize(latents_of(x, mirrored))
                loss = svg.flow_loss(parallel_model, latents, labels, args.shift, u, n).sum() / len(y)
            loss.backward()
            total += loss.detach()
        grad_norm, skipped = runs.optimizer_step(opt, clip=args.clip)
        update_ema(ema, model, args.ema_decay)
        return {"loss": total}, grad_norm, skipped

    # The run, new or resumed; a new one measures the latents.
    run = runs.Run("sit", args, ae.fingerprint, num_classes=len(classes), **data.dataset_identity(dataset))
    runs.say_start(device, args.precision, runs.describe(dataset, args.data),
                   runs.millions(SiT=model, autoencoder=ae), f"writes {run.path}/")
    state = {"model": model, "ema": ema, "opt": opt}
    step = run.resume(state)
    if runs.rank() == 0 and not (step and kept.exists()):
        files.save_checkpoint(kept, {**ae.to_checkpoint(), "step": ae.step})
    at_a_time = local_batch // args.accumulate
    with runs.autocast(device, args.precision):
        if step == 0 and args.latent_stats:
            model.set_latent_stats(*layouts.load_latent_stats(args.latent_stats))
        elif step == 0:
            some = data.spread_batches(dataset, LATENT_IMAGES, at_a_time, args.workers, device)
            model.measure_latents(ae.encode, some)
        ema.set_latent_stats(model.latent_mean, model.latent_std)
        if args.cache:
            dataset = data.Latents(dataset, ae, at_a_time, args.workers, device)
            latents_of = choose_flipped
    preview_labels = torch.arange(16, device=device) % len(classes)
    preview_noise = svg.sample_noise(args.seed, range(16), (ae.grid ** 2, ae.channels)).to(device)

    # Train.
    stop = run.begin()
    batches = data.training_batches(dataset, args.batch, args.seed, step, args.workers, device)
    while step < args.steps and not stop:
        images, y, corrupt = next(batches)
        run.report_corrupt(dataset, corrupt)
        losses, grad_norm, skipped = train_step(step, images, y)
        step += 1
        stop = run.stopped()
        run.record(step, losses, grad_norm, skipped)

        # Preview.
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), runs.autocast(device, args.precision):
                z = svg.euler_sample(ema, preview_noise, preview_labels, args.preview_steps,
                                     args.preview_guidance)
                samples = data.to_uint8(ae.decode(ema.denormalize(z)))
            names = [classes[i] for i in preview_labels.tolist()]
            title = f"{run.path} step {step}: {args.preview_steps} steps, guidance {args.preview_guidance:g}"
            run.picture(step, figures.grid_image(samples, 8, names, title))

        # Save.
        if step % args.save_every == 0 or step == args.steps or stop:
            run.save(step, state, {"kind": "sit", "config": model.config, "classes": classes,
                                   "fingerprint": files.fingerprint(ema.state_dict()),
                                   "autoencoder": {"path": kept.name, "fingerprint": ae.fingerprint}})
    run.end(step)


if __name__ == "__main__":
    runs.run_main(main)
