"""Stage 2: train the diffusion transformer on the latents of a stage-1 autoencoder.

    torchrun --nproc_per_node=8 train_dit.py --model XL --data imagenet/train  # the paper's recipe, batch 256
    python train_dit.py --demo                                                 # after train_ae.py --demo
    python train_dit.py --model XL --batch 32 --bench 20                       # speed and memory, no files

Finds the newest stage-1 run (or takes --ae) and records its fingerprint. Writes runs/<name>/ like stage 1,
with samples labelled by class as previews. The same command resumes from last.pt.
"""
import copy
import warnings
from pathlib import Path

import torch

import data
import figures
import files
import runs
import svg
from files import UserError

DEMO = {  # what --demo changes
    "data": "shapes://train", "name": "demo-dit", "model": "6,128,4", "batch": 64, "lr": 1e-3, "steps": 2700,
    "ema_decay": 0.99, "log_every": 100, "save_every": 900, "preview_every": 900, "workers": 0}


def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__, DEMO)
    runs.add_training_flags(parser, "dit", batch=256, lr=1e-4, steps=400_000)
    add = parser.add_argument
    add("--model", type=model_size, default="XL", help="B, L, XL, or layers,width,heads")
    add("--no-qk-norm", dest="qk_norm", action="store_false",
        help="no LayerNorm of queries and keys (an ablation: the authors' run without it diverged)")
    add("--ae", help="stage-1 checkpoint, ours or the authors', or a VAE in LDM's or diffusers' layout; "
        "default: the newest run")
    add("--latent-stats", help="a statistics file instead of the autoencoder's own mean and std")
    add("--residual-scale", type=runs.number(above=0), default=1.0,
        help="standard deviation at which the residual enters the transformer; the features' is 1")
    add("--cache", metavar="FOLDER", help="encode all images and their mirror images "
        "once, in half precision, to this folder, and train from it; other runs may share it")
    add("--shift", type=runs.number_or_auto, default=0.4, help="timestep shift in training; auto: "
        "sqrt(4096 / (N C)), 0.20 for latents of 256 x 392 (RAE, arXiv 2510.11690: gFID 23.1 -> 4.8)")
    add("--mid-loss", type=runs.number(), default=0.0,
        help="weight of the flow loss of a second head after a third of the blocks, for sample.py "
        "--internal-guidance; 0: no such head (arXiv 2512.24176: 0.5; SiT-XL's FID 1.75 without --guidance)")
    add("--label-dropout", type=runs.number(0, 1), default=0.1, help="share of images trained without class")
    add("--ema-decay", type=runs.number(0, 1), default=0.9999, help="decay of the averaged weights per step")
    add("--preview-steps", type=runs.positive, default=10, help="Euler steps of the preview samples")
    add("--preview-guidance", type=runs.number(0, 1000), default=4.0, help="guidance of the preview samples")
    return parser.parse_args()


def model_size(text):
    """Check "XL" or "6,192,4" (layers, width, heads), an argparse type; the text stays as it is."""
    if text not in svg.SIT_SIZES:
        numbers = [int(n) if n.isdecimal() else 0 for n in text.split(",")]
        if len(numbers) != 3 or 0 in numbers:
            raise UserError(f"--model {text}: give B, L, XL, or layers,width,heads such as 6,192,4")
        _, dim, heads = numbers
        if dim % heads or dim % 4:
            raise UserError(f"--model {text}: the width must be a multiple of 4 and of the heads")
    return text


def build_sit(size, ae, num_classes, qk_norm, middle_head):
    """Return a new transformer for the latents of an autoencoder."""
    if size not in svg.SIT_SIZES:
        depth, dim, heads = map(int, size.split(","))
        size = {"depth": depth, "dim": dim, "heads": heads}
        if middle_head and depth < 2:
            raise UserError("--mid-loss needs a --model of at least 2 layers")
    return svg.SiT(size, ae.channels, num_classes, ae.grid, qk_norm, middle_head)


def open_autoencoder(args):
    """Return the autoencoder, and the path of its file; with --bench an untrained one of the paper's size."""
    if args.bench and not args.ae:
        name = "dinov3_vits16plus"
        ae = svg.Autoencoder(svg.Encoder(svg.ViT(**svg.ENCODERS[name]), name, name))
        ae.alignment_batches.fill_(1)
        return ae, None
    path = args.ae or runs.latest_run("ae", demo=args.demo)
    if not path:
        raise UserError("no stage-1 run below runs/: run train_ae.py first (for --demo with --demo), or name "
                        "a checkpoint by --ae, as that of a --vae run")
    return svg.load_autoencoder(path, weights_dir=args.weights), path


def say_autoencoder(ae, path):
    """Say which autoencoder is taken, at which of its training steps; warn of one that is not finished."""
    folder = Path(path).parent
    config = files.read_json(folder / "config.json")
    steps = config.get("steps") if config.get("stage") in ("ae", "vae") else ae.step
    at = f" at step {ae.step} of {steps}" if ae.step else ""
    runs.say(f"autoencoder {path}{at}, fingerprint {ae.fingerprint[:12]}")
    training = runs.rank() == 0 and runs.is_locked(folder)
    if runs.rank() == 0 and (training or steps != ae.step):
        state = "still being trained" if training else "not trained to its end"
        warnings.warn(f"{path} is {state}: this run takes its weights of now")


def loss_by_u(losses, u):
    """Return sums and counts [2, 4] of the losses [B] of images whose u [B] is in each quarter of [0, 1]."""
    inside = (4 * u).floor().view(-1, 1) == torch.arange(4, device=u.device)  # [B, 4]
    return torch.stack([(losses.view(-1, 1) * inside).sum(0), inside.sum(0)])


def training_gib(model, images, bf16):
    """Return about how many GiB training takes of a device, eager, for so many images at a time.

    Weights, gradients, Adam's two moments and the EMA in fp32, with bf16 a copy of the weights; and what the
    backward pass keeps: per token, channel of the width and block 63 bytes, in fp32 93, or with recomputation
    the input and the step's condition alone, and one block whole (counted, see docs/runs.md).
    """
    size = model.config["model"]
    block = 63 if bf16 else 93
    kept = block * size["depth"]
    if model.recompute:
        kept = 4.5 * size["depth"] + block
    parameters = sum(p.numel() for p in model.parameters())
    return (parameters * (22 if bf16 else 20) + images * model.grid ** 2 * size["dim"] * kept) / 2**30


@torch.no_grad()
def update_ema(ema, model, decay):
    """Set ema = decay * ema + (1 - decay) * model, for every parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def main():
    """Run stage 2, from the flags to the last checkpoint."""
    args = parse_args()
    device = runs.setup(args.precision)
    local_batch = runs.local_batch(args)

    # Autoencoder and data.
    ae, ae_path = open_autoencoder(args)
    ae.to(device).eval().requires_grad_(False)
    if args.shift == "auto":
        args.shift = svg.auto_shift(ae.grid, ae.channels)
    if args.residual_scale != 1 and ae.channels == ae.feature_channels:
        raise UserError(f"--residual-scale {args.residual_scale:g}: {ae_path} has no residual")
    if args.bench:
        classes = [str(i) for i in range(1000)]
    else:
        dataset = data.open_data(args.data, ae.image_size, seed=args.seed)
        classes = dataset.classes
        if args.cache:
            if runs.lies_in(args.cache, Path("runs", args.name)):
                raise UserError(f"--cache {args.cache} lies in the run's own folder: give another folder")
            cache_of = {"autoencoder": ae.fingerprint, "precision": args.precision,
                        "data": data.dataset_fingerprint(dataset)}
            data.cache_state(args.cache, cache_of, len(dataset))  # refuses a stale one
        run = runs.Run("dit", args, {"trained_on": ae.fingerprint, "num_classes": len(classes),
                                     **data.dataset_identity(dataset)})
        say_autoencoder(ae, ae_path)

    # Model and optimiser.
    torch.manual_seed(args.seed)  # every rank starts from the same weights
    model = build_sit(args.model, ae, len(classes), args.qk_norm, args.mid_loss > 0).to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0,
                            fused=device.type != "mps")
    if args.compile:
        runs.compile_blocks(model)
        if isinstance(ae, svg.VAE):
            ae.encoder.compile(dynamic=False)
        else:
            runs.compile_blocks(ae.encoder.vit)
        if ae.channels > ae.feature_channels:
            runs.compile_blocks(ae.residual)
    parallel_model = runs.data_parallel(model)
    mine = slice(runs.rank() * local_batch, (runs.rank() + 1) * local_batch)  # of the global batch

    def train_step(step, images, y):
        """Step the optimiser on images and labels [B]: mean losses, loss_by_u, gradient norm, if skipped.

        images: uint8 [B, H, W, 3], or with --cache their moments and those of their mirror images.
        """
        runs.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        flip, drop, uniform = torch.rand(3, args.batch, device=device)[:, mine][:, :len(y)]
        tokens = (args.batch, ae.grid ** 2, ae.channels)
        draws = [uniform, torch.randn(tokens, device=device)[mine][:len(y)]]
        if isinstance(ae, svg.VAE):  # which trains on samples of its posterior
            draws.append(torch.randn(tokens, device=device)[mine][:len(y)])
        if args.cache:
            plain, mirrored = images.to(device, non_blocking=True).float().unbind(1)
        else:
            plain = data.to_float(images, device)
            mirrored = plain.flip(-1)
        flip = (flip < 0.5).view(-1, *[1] * (plain.dim() - 1))
        flipped = torch.where(flip, mirrored, plain)
        y = svg.drop_labels(y.to(device, non_blocking=True), model.num_classes, args.label_dropout, drop)
        opt.zero_grad(set_to_none=True)
        totals = torch.zeros(2, device=device)
        by_u = torch.zeros(2, 4, device=device)
        parts = runs.micro_batches(args.accumulate, [parallel_model], flipped, y, *draws)
        for x, labels, u, noise, *posterior_noise in parts:
            with runs.autocast(device, args.precision):
                with torch.no_grad():
                    moments = x if args.cache else ae.moments(x)
                    latents = ae.normalize(ae.draw(moments, *posterior_noise))
                losses = svg.flow_loss(parallel_model, latents, labels, args.shift, u, noise,
                                       both=args.mid_loss > 0)
                mid_loss = torch.zeros((), device=device)
                if args.mid_loss:
                    losses, mid_losses = losses
                    mid_loss = mid_losses.sum() / len(y)
                loss = losses.sum() / len(y)
            (loss + args.mid_loss * mid_loss).backward()
            totals += torch.stack([loss.detach(), mid_loss.detach()])
            by_u += loss_by_u(losses.detach(), u)
        grad_norm, skipped = runs.optimizer_step(opt, clip=args.clip)
        update_ema(ema, model, args.ema_decay)
        means = {"loss": totals[0]}
        if args.mid_loss:
            means["mid_loss"] = totals[1]
        return means, by_u, grad_norm, skipped

    if args.bench:
        def make(n):
            images = runs.synthetic_images(n, ae.image_size, device)
            if args.cache:
                images = ae.moments(data.to_float(images, device)).half().cpu()
                images = torch.stack([images, images], 1)
            return lambda: train_step(1, images, torch.arange(n) % len(classes))

        runs.bench(args, device, make, args.batch, script="train_dit", model=args.model)
        return

    # The run to resume, or the latents' mean and std to start with.
    runs.say_start(device, args.precision, runs.describe(dataset, args.data),
                   runs.millions(SiT=model, autoencoder=ae), f"writes {run.path}/")
    if model.config["model"]["dim"] < ae.channels:
        runs.say(f"--model is narrower, {model.config['model']['dim']}, than a token, which has "
                 f"{ae.channels} channels: it cannot fit them (RAE, arXiv 2510.11690)")
    at_a_time = local_batch // args.accumulate
    needed = training_gib(model, at_a_time, args.precision == "bf16")
    room = 0.95 * runs.total_gib(device) - 1  # the rest is for the encoder, buffers and fragments
    if needed > room and runs.rank() == 0:
        remedies = ["--accumulate N"] if at_a_time > 1 else []
        remedies += [] if args.recompute else ["--recompute"]
        warnings.warn(f"{at_a_time} images at a time take about {needed:.0f} GiB, where the device has "
                      f"{room:.0f}: give {' or '.join(remedies or ['a smaller --model'])}")
    step = 0
    checkpoint = run.resume()
    if checkpoint:
        step = checkpoint["step"]
        files.strict_load(model, checkpoint["model"], run.last, "the same transformer")
        files.strict_load(ema, checkpoint["ema"], run.last, "the same transformer",
                          checkpoint.get("fingerprint"))
        files.load_optimizer(opt, checkpoint["opt"], run.last)
        opt.param_groups[0]["lr"] = args.lr
        ae.load_statistics(checkpoint)
    else:
        if not (ae.measured and ae.aligned):  # the authors' autoencoder, or one whose training was stopped
            with runs.autocast(device, args.precision):
                ae.measure_statistics(data.spread_batches(dataset, 10_000, local_batch, args.workers, device))
        if args.latent_stats:
            ae.set_latent_stats(*files.load_latent_stats(args.latent_stats))
        ae.latent_std[ae.feature_channels:] /= args.residual_scale  # travels with the checkpoint
    if args.cache:
        # The alignment may have been measured just now; mean and std do not enter what is cached.
        cache_of["alignment"] = [float(value) for value in ae.statistics().get("alignment", ())]
        shape = (ae.grid ** 2, ae.channels * (2 if isinstance(ae, svg.VAE) else 1))
        with runs.autocast(device, args.precision):
            dataset = data.cache_latents(args.cache, dataset, ae.moments, shape, cache_of, at_a_time,
                                         args.workers, device, run.report_corrupt)
    preview_labels = torch.arange(16, device=device) % len(classes)
    preview_noise = svg.sample_noise(args.seed, range(16), (ae.grid ** 2, ae.channels)).to(device)
    batches = data.training_batches(dataset, args.batch, args.seed, step, args.workers, device)

    # Train.
    stop = run.begin()
    while step < args.steps and not stop:
        images, y, corrupt = next(batches)
        run.report_corrupt(dataset, corrupt)
        losses, by_u, grad_norm, skipped = train_step(step, images, y)
        step += 1
        stop = run.stopped()
        run.record(step, losses, grad_norm, skipped, {f"loss_u{i + 1}": by_u[:, i] for i in range(4)})

        # Preview.
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), runs.autocast(device, args.precision):
                z = svg.euler_sample(ema, preview_noise, preview_labels, args.preview_steps,
                                     args.preview_guidance)
                samples = data.to_uint8(ae.decode(ae.denormalize(z)))
            names = [classes[i] for i in preview_labels.tolist()]
            title = f"{run.path} step {step}: {args.preview_steps} steps, guidance {args.preview_guidance:g}"
            run.picture(step, figures.grid_image(samples, 8, names, title))

        # Save.
        if step % args.save_every == 0 or step == args.steps or stop:
            run.save({"kind": "sit", "config": model.config, "step": step, "classes": classes,
                      "model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                      "fingerprint": files.fingerprint(ema.state_dict()), **ae.statistics(),
                      "autoencoder": {"path": str(ae_path), "fingerprint": ae.fingerprint}})
    run.end(step)


if __name__ == "__main__":
    runs.run_main(main)
