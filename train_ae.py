"""Stage 1: train the residual encoder and the decoder around a frozen encoder.

    torchrun --nproc_per_node=8 train_ae.py --data imagenet/train  # paper's recipe: batch 512, 100K steps
    python train_ae.py --demo                                      # tiny sizes on built-in data, two cores

Loss (the authors' code): sum over pixels of |x - y| + LPIPS(x, y), plus an adaptively weighted PatchGAN hinge
loss from step --disc-start on. Writes runs/<name>/: config.json, log.jsonl, loss.png, last.pt, numbered
checkpoints, previews (originals above reconstructions). The same command resumes from last.pt.
"""
import copy
import re

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient

import svg
from lib import data, figures, files, runs, shapes
from lib.files import UserError
from lib.perceptual import LPIPS

DEMO = {  # what --demo changes: sizes, schedule, and the losses that need a download
    "data": "shapes://train", "name": "demo-ae", "encoder": str(shapes.DEMO_PT), "image_size": shapes.SIZE,
    "grid": shapes.GRID, "decoder_channels": 32, "decoder_mult": "1,1,2,2", "residual_dim": 64,
    "residual_depth": 2, "lpips": 0.0, "gan": 0.0, "batch": 16, "lr": 5e-4, "steps": 1050,
    "log_every": 50, "save_every": 1050, "preview_every": 350, "workers": 0}

ALIGNMENT_IMAGES = 2048  # that measure the alignment statistics at each save

# -- Discriminator -----------------------------------------------------------------------------------------


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, as if they were one; unlike SyncBatchNorm on CPUs too."""

    def forward(self, x):
        if not self.training or runs.world_size() == 1:
            return super().forward(x)
        n = runs.world_size() * x.numel() / x.shape[1]
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        moments = torch.stack([mean, var + mean.square()]) / runs.world_size()
        mean, square = all_reduce_with_gradient(moments)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN: images [B, 3, H, W] -> logits [B, 1, h, w], one per 70 x 70 pixel patch."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), BatchNorm2d(128), nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, 4, 2, 1, bias=False), BatchNorm2d(256), nn.LeakyReLU(0.2),
            nn.Conv2d(256, 512, 4, 1, 1, bias=False), BatchNorm2d(512), nn.LeakyReLU(0.2),
            nn.Conv2d(512, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.main(images)


# -- Losses ------------------------------------------------------------------------------------------------

def reconstruction_loss(x, y, lpips, weight):
    """Return the sum over pixels and channels of |x - y| + weight * LPIPS, per image, and both parts' means.

    LPIPS is one number per image, added to every pixel and channel; lpips: None leaves it out.
    """
    l1 = (x - y).abs()
    perceptual = lpips(x, y) if lpips else x.new_zeros(len(x))
    nll = (l1.sum((1, 2, 3)) + weight * perceptual * l1[0].numel()).mean()
    return nll, l1.mean().detach(), perceptual.mean().detach()


def adaptive_weight(reconstruction, gan, last_layer):
    """||d reconstruction / d last_layer|| / (||d gan / d last_layer|| + 1e-4), at most 1e4 (VQGAN, eq. 7).

    The gradients are those of all ranks' losses.
    """
    gradients = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                             for loss in (reconstruction, gan)])
    if runs.world_size() > 1:
        dist.all_reduce(gradients)
        gradients /= runs.world_size()
    rec_norm, gan_norm = gradients.flatten(1).norm(dim=1)
    return (rec_norm / (gan_norm + 1e-4)).clamp(0, 1e4).detach()


def generator_gradient(y, nll, g_loss, gan, last_layer):
    """Return d (nll + gan * w * g_loss) / dy for the reconstruction y, w the adaptive weight.

    g_loss: None before the discriminator starts. VGG16 and the discriminator are passed backward once each:
    (y * gradient).sum() is a loss with the same gradient at the last layer, so that w needs, besides, only
    that layer's own backward pass.
    """
    g_rec, = torch.autograd.grad(nll, y)
    if g_loss is None:
        return g_rec
    g_gan, = torch.autograd.grad(g_loss, y)
    weight = adaptive_weight((y * g_rec).sum(), (y * g_gan).sum(), last_layer)
    return g_rec + gan * weight * g_gan


def hinge_loss(real, fake):
    """Return the discriminator's loss, which wants real logits above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# -- The program -------------------------------------------------------------------------------------------

def parse_args():
    """Parse the command line."""
    parser = runs.Parser(__doc__, DEMO)
    runs.add_training_flags(parser, "ae", batch=512, lr=1e-4, steps=100_000)
    add = parser.add_argument
    add("--encoder", default=next(iter(files.OPEN_ENCODERS)),
        help="frozen encoder: a path, or a file in the weights folder, to which these are downloaded: "
        f"{', '.join(files.OPEN_ENCODERS)}")
    add("--image-size", type=runs.positive, default=256, help="pixels per side")
    add("--grid", type=runs.positive, default=16, help="latent tokens per side")
    add("--residual-channels", type=runs.not_negative, default=8,
        help="latent channels of the residual encoder; 0: an autoencoder without it")
    add("--align", choices=("batch", "none"), default="batch",
        help="alignment of the residual to the encoder's statistics; none: the ablation of table 4")
    add("--mask-ratio", type=runs.number(0, 1), default=0.1,
        help="share of images whose residual is masked in training, so that the decoder does not lean on it")
    add("--residual-dim", type=runs.positive, default=384, help="width of the residual encoder")
    add("--residual-depth", type=runs.positive, default=6, help="layers of the residual encoder")
    add("--residual-dropout", type=runs.number(0, 1), default=0.1, help="dropout in the residual encoder")
    add("--decoder-channels", type=runs.positive, default=128, help="decoder's width at full resolution")
    add("--decoder-mult", help="factors of it by level, full resolution first (default: 1,1,2,2,4)")
    add("--lpips", type=runs.number(), default=1.0, help="weight of LPIPS; 0: off, VGG16 is not needed")
    add("--gan", type=runs.number(), default=0.5, help="weight of the adaptively weighted GAN loss; 0: off")
    add("--disc-start", type=runs.positive, default=2501, help="first step of the GAN loss")
    return parser.parse_args()


def build_autoencoder(encoder, args):
    """Return a new autoencoder of the size that the flags ask for."""
    heads = max(1, args.residual_dim // 48)
    if args.residual_dim % heads:
        raise UserError(f"--residual-dim {args.residual_dim}: give a multiple of 48, or less than 96")
    if args.decoder_channels % 32:
        raise UserError(f"--decoder-channels {args.decoder_channels}: GroupNorm takes multiples of 32")
    residual = {"dim": args.residual_dim, "depth": args.residual_depth, "heads": heads,
                "dropout": args.residual_dropout}
    decoder = {"ch": args.decoder_channels}
    if args.decoder_mult:
        factors = list(map(int, re.findall(r"[1-9]\d*", args.decoder_mult)))
        if 2 ** (len(factors) - 1) * args.grid != args.image_size:
            raise UserError(f"--decoder-mult {args.decoder_mult}: give a factor for each level from "
                            f"--image-size {args.image_size} to --grid {args.grid}")
        decoder["ch_mult"] = factors
    return svg.Autoencoder(encoder, args.residual_channels, args.image_size, args.grid, args.mask_ratio,
                           residual, decoder, align=args.align)


def preview_images(dataset, count=10):
    """Return some images of a dataset, evenly spaced: [count, 3, H, W] in [-1, 1]."""
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    return data.to_float(torch.from_numpy(np.stack([dataset[i, 0][0] for i in indices])), "cpu")


def main():
    """Run stage 1, from the flags to the last checkpoint."""
    args = parse_args()
    device = runs.setup(args.precision)
    local_batch = runs.local_batch(args)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape

    # Data, models and optimisers.
    dataset = data.open_data(args.data, args.image_size, random_crop=True, seed=args.seed)
    torch.manual_seed(args.seed)  # every rank starts from the same weights
    encoder = svg.load_encoder(runs.fetch_weights(args.encoder, args.weights))
    model = build_autoencoder(encoder, args)
    lpips = None
    if args.lpips:
        lpips = LPIPS(runs.fetch_weights("vgg16-397923af.pth", args.weights)).to(device)
    disc = PatchDiscriminator().to(device)
    model.to(device).train()
    model.decoder.recompute = args.recompute
    fused = device.type != "mps"
    opt = torch.optim.Adam(model.parameters(), args.lr, betas=(0.5, 0.9), fused=fused)
    opt_disc = torch.optim.Adam(disc.parameters(), args.lr, betas=(0.5, 0.9), fused=fused)
    if args.compile:
        runs.compile_blocks(model)
        model.decoder.features = torch.compile(model.decoder.features, dynamic=False)
        disc.compile(dynamic=False)
        if lpips:
            lpips.compile(dynamic=False)
    parallel_model = runs.data_parallel(model)
    parallel_disc = runs.data_parallel(disc)
    last_layer = model.decoder.conv_out.weight
    mine = slice(runs.rank() * local_batch, (runs.rank() + 1) * local_batch)  # of the global batch

    def train_step(step, images):
        """Step both optimisers on uint8 images [B, H, W, 3]: losses, gradient norm, whether skipped."""
        runs.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        masked = torch.rand(args.batch, device=device)[mine] < args.mask_ratio
        runs.seed_step(args.seed, step, 1 + runs.rank())  # for dropout
        images = data.to_float(images, device)
        adversarial = args.gan > 0 and step + 1 >= args.disc_start
        opt.zero_grad(set_to_none=True)
        opt_disc.zero_grad(set_to_none=True)
        averages = [buffer.clone() for buffer in disc.buffers()]  # BatchNorm's
        totals = torch.zeros(3, device=device)
        for x, mask in runs.micro_batches(args.accumulate, [parallel_model, parallel_disc], images, masked):
            part = len(x) / len(images)
            # Autoencoder.
            with runs.autocast(device, args.precision):
                y = parallel_model(x, mask).float()
                nll, l1, perceptual = reconstruction_loss(x, y, lpips, args.lpips)
                disc.requires_grad_(False)
                g_loss = -disc(y).float().mean() if adversarial else None
                disc.requires_grad_(True)
            y.backward(part * generator_gradient(y, nll, g_loss, args.gan, last_layer))
            # Discriminator.
            d_loss = torch.zeros_like(l1)
            if adversarial:
                with runs.autocast(device, args.precision):
                    d_loss = hinge_loss(parallel_disc(x).float(), parallel_disc(y.detach()).float())
                (part * d_loss).backward()
            totals += part * torch.stack([l1, perceptual, d_loss.detach()])
        optimizers = [opt, opt_disc] if adversarial else [opt]
        grad_norm, skipped = runs.optimizer_step(*optimizers, clip=args.clip)
        for buffer, before in zip(disc.buffers(), averages, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        losses = {"l1_loss": totals[0]}
        if lpips:
            losses["lpips_loss"] = totals[1]
        if args.gan:
            losses["disc_loss"] = totals[2]
        return losses, grad_norm, skipped

    # The run, new or resumed.
    run = runs.Run("autoencoder", args, encoder.fingerprint, **data.dataset_identity(dataset))
    runs.say_start(device, args.precision, runs.describe(dataset, args.data),
                   runs.millions(autoencoder=model, decoder=model.decoder), f"writes {run.path}/")
    state = {"model": model, "disc": disc, "opt": opt, "opt_disc": opt_disc}
    step = run.resume(state)
    centred = copy.copy(dataset)
    centred.random_crop = False
    preview = preview_images(centred).to(device)

    # Train.
    stop = run.begin()
    batches = data.training_batches(dataset, args.batch, args.seed, step, args.workers, device)
    while step < args.steps and not stop:
        images, _, corrupt = next(batches)
        run.report_corrupt(dataset, corrupt)
        losses, grad_norm, skipped = train_step(step, images)
        step += 1
        stop = run.stopped()
        run.record(step, losses, grad_norm, skipped)

        # Preview.
        if step % args.preview_every == 0 or step == args.steps:
            model.eval()
            with torch.no_grad(), runs.autocast(device, args.precision):
                pair = torch.cat([preview, model(preview).float()])
            model.train()
            title = f"{run.path} step {step}: originals above reconstructions"
            run.picture(step, figures.grid_image(data.to_uint8(pair), len(preview), title=title))

        # Save.
        if step % args.save_every == 0 or step == args.steps or stop:
            if not stop:  # else seconds may be left, and the running averages do
                some = data.spread_batches(centred, ALIGNMENT_IMAGES, local_batch, args.workers, device)
                with runs.autocast(device, args.precision):
                    model.measure_alignment(some)
                model.train()
            run.save(step, state, model.to_checkpoint())
    run.end(step)


if __name__ == "__main__":
    runs.run_main(main)
