"""Stage 2: train the diffusion transformer on the latents of a stage-1 autoencoder.

    torchrun --nproc_per_node=8 train_dit.py --model XL --data imagenet/train   # the paper's recipe, batch 256
    python train_dit.py --demo                                                  # after train_ae.py --demo

Finds the newest stage-1 run (or takes --ae) and records its fingerprint. Writes runs/<name>/ like stage 1, with
samples labelled by class as previews. The same command goes on from last.pt.
"""
import copy
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import demo
import svg


def parse_args():
    p = svg.Parser(__doc__)
    p.demo = demo.TRAIN_DIT
    svg.add_training_flags(p, batch=256, lr=1e-4, steps=400_000)
    p.add_argument("--model", default="XL", help="B, L, XL, or layers,width,heads")
    p.add_argument("--ae", help="stage-1 checkpoint, ours or the authors'; default: the newest run")
    p.add_argument("--latent-stats", help="a statistics file instead of the autoencoder's own mean and std")
    p.add_argument("--shift", type=svg.number(above=0), default=0.4, help="timestep shift in training")
    p.add_argument("--label-dropout", type=svg.number(0, 1), default=0.1, help="share of images trained without class")
    p.add_argument("--ema-decay", type=svg.number(0, 1), default=0.9999, help="decay of the averaged weights per step")
    p.add_argument("--preview-steps", type=svg.positive, default=10, help="Euler steps of the preview samples")
    p.add_argument("--preview-guidance", type=svg.number(), default=4.0, help="guidance of the preview samples")
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


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema = decay * ema + (1 - decay) * model, for every parameter."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def main():
    args = parse_args()
    size = model_size(args.model)
    device = svg.setup()
    path = args.ae or svg.latest_run("ae", demo=args.demo)
    if not path:
        raise svg.UserError("no stage-1 run below runs/: run train_ae.py" + (" --demo" if args.demo else "")
                            + " first, or name a checkpoint by --ae")
    ae = svg.load_autoencoder(path, weights_dir=args.weights).to(device)
    data = demo.dataset("train") if args.demo else svg.ImageFolder(args.data, ae.image_size, seed=args.seed)
    if args.latent_stats:
        ae.set_latent_stats(*svg.load_latent_stats(args.latent_stats))
    elif not ae.measured:  # the authors' autoencoder
        ae.measure(data, 10_000, max(1, args.batch // svg.world_size()), args.workers)
    run = svg.Run("dit", args, {"autoencoder": ae.fingerprint, "num_classes": len(data.classes)})

    torch.manual_seed(args.seed)  # every rank starts from the same weights
    model = svg.SiT(size, ae.channels, len(data.classes), ae.grid).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0,
                            fused=device.type == "cuda")
    step = 0
    if checkpoint := run.resume():
        step = checkpoint["step"]
        for target, key in ((model, "model"), (ema, "ema"), (opt, "opt")):
            target.load_state_dict(checkpoint[key])
    velocity = DistributedDataParallel(model, broadcast_buffers=False) if svg.world_size() > 1 else model

    labels = torch.arange(16, device=device) % len(data.classes)
    noise = svg.sample_noise(args.seed, range(16), (ae.grid ** 2, ae.channels)).to(device)
    batches = svg.loader(data, args.batch, args.seed, step, args.workers, device)
    share = args.batch // svg.world_size()
    local = slice(svg.rank() * share, (svg.rank() + 1) * share)  # this rank's part of the global batch
    start = since = time.time()
    total, count = 0, 0
    while step < args.steps:
        images, y, corrupt = next(batches)
        run.report_corrupt(data, corrupt)
        svg.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        step += 1
        flip, drop, u = torch.rand(3, args.batch, device=device)[:, local]
        images, y = svg.to_float(images, device), y.to(device)
        images = torch.where((flip < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
        y = svg.drop_labels(y, model.num_classes, args.label_dropout, drop)

        with svg.autocast(device, args.precision):
            with torch.no_grad():
                latents = ae.normalize(ae.encode(images))
            epsilon = torch.randn(args.batch, *latents.shape[1:], device=device)[local]
            loss = svg.flow_loss(velocity, latents, y, args.shift, u, epsilon).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        update_ema(ema, model, args.ema_decay)

        total, count = total + loss.detach(), count + 1
        if step % args.log_every == 0 or step == args.steps:
            mean = (svg.all_reduce(total.cpu(), device) / count / svg.world_size()).item()
            run.log(step, start, {"loss": mean}, count * args.batch / (time.time() - since))
            total, count, since = 0, 0, time.time()
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), svg.autocast(device, args.precision):
                z = svg.euler_sample(ema, noise, labels, args.preview_steps, args.preview_guidance)
                samples = svg.to_uint8(ae.decode(ae.denormalize(z)))
            run.picture(step, svg.grid_image(samples, 8, [data.classes[i] for i in labels.tolist()], (
                f"{run.path} step {step}: {args.preview_steps} steps, guidance {args.preview_guidance:g}")))
        if step % args.save_every == 0 or step == args.steps:
            run.save({"kind": "sit", "config": model.config, "step": step, "classes": data.classes,
                      "model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                      "latent_mean": ae.latent_mean, "latent_std": ae.latent_std,
                      "autoencoder": {"path": str(path), "fingerprint": ae.fingerprint}})
    run.say(f"done: {run.last}")


if __name__ == "__main__":
    svg.run_main(main)
