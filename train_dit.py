"""Stage 2: train the diffusion transformer on the latents of a stage-1 autoencoder.

    torchrun --nproc_per_node=8 train_dit.py --model XL --data imagenet/train  # the paper's recipe, batch 256
    python train_dit.py --demo                                                 # after train_ae.py --demo
    python train_dit.py --model XL --batch 32 --bench 20                       # speed and memory, no files

Finds the newest stage-1 run (or takes --ae) and records its fingerprint. Writes runs/<name>/ like stage 1,
with samples labelled by class as previews. The same command goes on from last.pt.
"""
import copy

import torch

import demo
import svg


def parse_args():
    """The command line; UserError for a flag that is wrong or out of place."""
    p = svg.Parser(__doc__)
    p.demo = demo.TRAIN_DIT
    svg.add_training_flags(p, batch=256, lr=1e-4, steps=400_000)
    p.add_argument("--model", default="XL", help="B, L, XL, or layers,width,heads")
    p.add_argument("--ae", help="stage-1 checkpoint, ours or the authors'; default: the newest run")
    p.add_argument("--latent-stats", help="a statistics file instead of the autoencoder's own mean and std")
    p.add_argument("--shift", type=svg.number(above=0), default=0.4, help="timestep shift in training")
    p.add_argument("--label-dropout", type=svg.number(0, 1), default=0.1,
                   help="share of images trained without class")
    p.add_argument("--ema-decay", type=svg.number(0, 1), default=0.9999,
                   help="decay of the averaged weights per step")
    p.add_argument("--preview-steps", type=svg.positive, default=10,
                   help="Euler steps of the preview samples")
    p.add_argument("--preview-guidance", type=svg.number(), default=4.0,
                   help="guidance of the preview samples")
    return p.parse_args()


def model_size(text):
    """"XL" or "6,192,4" (layers, width, heads) -> what SiT takes."""
    if text in svg.SIT_SIZES:
        return text
    try:
        depth, dim, heads = map(int, text.split(","))
    except ValueError:
        raise svg.UserError(f"--model {text}: give B, L, XL, or layers,width,heads such as 6,192,4") from None
    if min(depth, dim, heads) < 1 or dim % heads or dim % 4:
        raise svg.UserError(f"--model {text}: the width must be a multiple of 4 and of the heads")
    return {"depth": depth, "dim": dim, "heads": heads}


def find_autoencoder(args):
    """The autoencoder, and where it was found; for --bench demo.pt's or a fresh one of the paper's size."""
    if args.bench and not (args.demo or args.ae):
        ae = svg.Autoencoder(svg.fresh_encoder("dinov3_vits16plus"))
        ae.alignment_batches.fill_(1)
        return ae, None
    path = args.ae or (demo.ENCODER if args.bench else svg.latest_run("ae", demo=args.demo))
    if not path:
        raise svg.UserError("no stage-1 run below runs/: run train_ae.py" + (" --demo" if args.demo else "")
                            + " first, or name a checkpoint by --ae")
    return svg.load_autoencoder(path, weights_dir=args.weights), path


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, for every parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def main():
    """Stage 2, from the flags to the last checkpoint."""
    args = parse_args()
    size = model_size(args.model)
    device, share = svg.setup(args.precision), svg.local_batch(args)
    ae, path = find_autoencoder(args)
    ae = ae.to(device).eval().requires_grad_(False)
    if args.bench:
        classes, run, checkpoint = [str(i) for i in range(1000)], None, None
    else:
        data = demo.dataset("train") if args.demo else svg.open_data(args.data, ae.image_size, seed=args.seed)
        classes = data.classes
        run = svg.Run("dit", args, {"trained_on": ae.fingerprint, "num_classes": len(classes),
                                  **svg.identity(data)})
        checkpoint = run.resume()
        if checkpoint:
            ae.set_latent_stats(checkpoint["latent_mean"], checkpoint["latent_std"])
        elif args.latent_stats:
            ae.set_latent_stats(*svg.load_latent_stats(args.latent_stats))
        elif not ae.measured:  # the authors' autoencoder, or one whose training was stopped
            ae.measure(data, 10_000, share, args.workers)

    torch.manual_seed(args.seed)  # every rank starts from the same weights
    model = svg.SiT(size, ae.channels, len(classes), ae.grid).to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0,
                            fused=device.type != "mps")
    step = 0
    if checkpoint:
        step = checkpoint["step"]
        svg.strict_load(model, checkpoint["model"], run.last, "the same transformer")
        for target, key in ((ema, "ema"), (opt, "opt")):
            target.load_state_dict(checkpoint[key])
        opt.param_groups[0]["lr"] = args.lr
    if args.compile:
        svg.compile_blocks(model, ae.encoder.vit, *([ae.residual] if ae.channels > ae.encoder.dim else []))
    velocity = svg.data_parallel(model) if svg.world_size() > 1 else model
    local = slice(svg.rank() * share, (svg.rank() + 1) * share)  # this rank's part of the global batch

    def train_step(step, images, y):
        """One optimiser step on uint8 images [B, H, W, 3] and labels: loss, gradient norm, skipped or not."""
        svg.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        flip, drop, u = torch.rand(3, args.batch, device=device)[:, local][:, :len(images)]
        epsilon = torch.randn(args.batch, ae.grid ** 2, ae.channels, device=device)[local][:len(images)]
        images, y = svg.to_float(images, device), y.to(device, non_blocking=True)
        images = torch.where((flip < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
        y = svg.drop_labels(y, model.num_classes, args.label_dropout, drop)
        opt.zero_grad(set_to_none=True)
        total = 0
        for x, labels, *draws in svg.micro_batches(args.accumulate, [velocity], images, y, u, epsilon):
            with svg.autocast(device, args.precision):
                with torch.no_grad():
                    latents = ae.normalize(ae.encode(x))
                loss = svg.flow_loss(velocity, latents, labels, args.shift, *draws).sum() / len(images)
            loss.backward()
            total = total + loss.detach()
        norm, skipped = svg.optimizer_step(opt, clip=args.clip)
        update_ema(ema, model, args.ema_decay)
        return total, norm, skipped

    if args.bench:
        def make(n):
            images = svg.synthetic_images(n, ae.image_size, device)
            return lambda: train_step(1, images, torch.arange(n) % len(classes))

        return svg.bench(args, device, make, args.batch, script="train_dit", model=args.model)

    labels = torch.arange(16, device=device) % len(classes)
    noise = svg.sample_noise(args.seed, range(16), (ae.grid ** 2, ae.channels)).to(device)
    batches = svg.loader(data, args.batch, args.seed, step, args.workers, device)
    stop = run.stopped()
    while step < args.steps and not stop:
        images, y, corrupt = next(batches)
        run.report_corrupt(data, corrupt)
        loss, norm, skipped = train_step(step, images, y)
        step, stop = step + 1, run.stopped()
        run.record(step, {"loss": loss}, norm, skipped)
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), svg.autocast(device, args.precision):
                z = svg.euler_sample(ema, noise, labels, args.preview_steps, args.preview_guidance)
                samples = svg.to_uint8(ae.decode(ae.denormalize(z)))
            run.picture(step, svg.grid_image(samples, 8, [classes[i] for i in labels.tolist()], (
                f"{run.path} step {step}: {args.preview_steps} steps, guidance {args.preview_guidance:g}")))
        if step % args.save_every == 0 or step == args.steps or stop:
            run.save({"kind": "sit", "config": model.config, "step": step, "classes": classes,
                      "model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                      "latent_mean": ae.latent_mean, "latent_std": ae.latent_std,
                      "autoencoder": {"path": str(path), "fingerprint": ae.fingerprint}})
    run.end(step)


if __name__ == "__main__":
    svg.run_main(main)
