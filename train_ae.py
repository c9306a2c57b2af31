"""Stage 1: train the residual encoder and the decoder around a frozen encoder.

    torchrun --nproc_per_node=8 train_ae.py --data imagenet/train  # paper's recipe: batch 512, 100K steps
    python train_ae.py --demo                                      # tiny sizes on built-in data, two cores
    python train_ae.py --batch 64 --bench 20                       # speed and memory, without any file

Loss (the authors' code): sum over pixels of |x - y| + LPIPS(x, y), plus an adaptively weighted PatchGAN hinge
loss from step --disc-start on. Writes runs/<name>/: config.json, log.jsonl, loss.png, last.pt, numbered
checkpoints, previews (originals above reconstructions). The same command goes on from last.pt.
"""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import demo
import svg

# -- Losses ------------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """Perceptual distance of images [B, 3, H, W] in [-1, 1]: one number per image [B] (Zhang et al., v0.1,
    VGG16).

    vgg: path of torchvision's vgg16-397923af.pth, or None for random weights (--bench); the published linear
    heads lie in assets/.
    """

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, vgg):
        super().__init__()
        layers, c, self.taps = [], 3, []
        for i, widths in enumerate(self.WIDTHS):
            if i:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        if vgg:
            weights = svg.load_checkpoint(vgg)
            weights = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
            svg.strict_load(self, weights, vgg, "VGG16")
        heads = svg.load_npz(Path(__file__).parent / "assets" / "lpips_vgg_heads.npz")
        for i in range(5):
            head = torch.from_numpy(heads[f"lin{i}"]).view(1, -1, 1, 1)
            self.register_buffer(f"head{i}", head, persistent=False)
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def unit_features(self, images):
        """The five tapped feature maps, each of unit length over its channels."""
        h, out = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                out.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    def forward(self, target, images):
        with torch.no_grad():  # only `images` is being learned
            targets = self.unit_features(target)
        distance = 0
        for i, (a, b) in enumerate(zip(targets, self.unit_features(images), strict=True)):
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).float().mean((1, 2))
        return distance


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, and in the backward pass the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.forward(ctx, gradient)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, as if they were one; unlike SyncBatchNorm on CPUs too."""

    def forward(self, x):
        if not self.training or svg.world_size() == 1:
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        moments = torch.stack([mean, var + mean.square()]) / svg.world_size()
        mean, square = AllReduce.apply(moments)
        var, n = (square - mean.square()).clamp(min=0), svg.world_size() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (x * scale.view(-1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1)).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN: images [B, 3, H, W] -> logits [B, 1, h, w], one per 70 x 70 pixel patch."""

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.main = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), BatchNorm2d(4 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * w, 8 * w, 4, 1, 1, bias=False), BatchNorm2d(8 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * w, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.main(images)


def reconstruction_loss(x, y, lpips, weight):
    """Sum over pixels and channels of |x - y| + weight * LPIPS, per image, and the two parts' means."""
    l1 = (x - y).abs()
    perceptual = lpips(x, y) if lpips else x.new_zeros(len(x))
    nll = (l1.sum((1, 2, 3)) + weight * perceptual * l1[0].numel()).mean()
    return nll, l1.mean().detach(), perceptual.mean().detach()


def adaptive_weight(reconstruction, gan, last_layer):
    """||d reconstruction / d last_layer|| / (||d gan / d last_layer|| + 1e-4), at most 1e4 (VQGAN, eq. 7);
    the gradients are those of all ranks' losses.
    """
    gradients = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                             for loss in (reconstruction, gan)])
    if svg.world_size() > 1:
        dist.all_reduce(gradients)
        gradients /= svg.world_size()
    rec, gan = gradients.flatten(1).norm(dim=1)
    return (rec / (gan + 1e-4)).clamp(0, 1e4).detach()


def generator_gradient(y, nll, g_loss, gan, last_layer):
    """d (nll + gan * w * g_loss) / dy for the reconstruction y, w the adaptive weight; g_loss may be None.

    VGG16 and the discriminator are passed backward once each. The sum of y times such a gradient is a loss
    with the same gradient at the last layer, so all that w takes besides is that layer's own backward.
    """
    g_rec, = torch.autograd.grad(nll, y)
    if g_loss is None:
        return g_rec
    g_gan, = torch.autograd.grad(g_loss, y)
    return g_rec + gan * adaptive_weight((y * g_rec).sum(), (y * g_gan).sum(), last_layer) * g_gan


def hinge_loss(real, fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# -- The program -------------------------------------------------------------------------------------------

def parse_args():
    """The command line; UserError for a flag that is wrong or out of place."""
    p = svg.Parser(__doc__)
    p.demo = demo.TRAIN_AE
    svg.add_training_flags(p, batch=512, lr=1e-4, steps=100_000)
    p.add_argument("--encoder", default="dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
                   help="frozen encoder: a file in the weights folder, or a path")
    p.add_argument("--image-size", type=svg.positive, default=256, help="pixels per side")
    p.add_argument("--grid", type=svg.positive, default=16, help="latent tokens per side")
    p.add_argument("--residual-channels", type=svg.not_negative, default=8,
                   help="latent channels of the residual encoder")
    p.add_argument("--align", choices=("batch", "none"), default="batch", help=(
        "alignment of the residual to the encoder's statistics; none: the ablation of table 4"))
    p.add_argument("--residual-dim", type=svg.positive, default=384, help="width of the residual encoder")
    p.add_argument("--residual-depth", type=svg.positive, default=6, help="layers of the residual encoder")
    p.add_argument("--residual-dropout", type=svg.number(0, 1), default=0.1,
                   help="dropout in the residual encoder")
    p.add_argument("--decoder-channels", type=svg.positive, default=128,
                   help="decoder's width at full resolution")
    p.add_argument("--decoder-mult",
                   help="factors of it by level, full resolution first (default: 1,1,2,2,4)")
    p.add_argument("--lpips", type=svg.number(), default=1.0,
                   help="weight of LPIPS; 0: off, VGG16 is not needed")
    p.add_argument("--gan", type=svg.number(), default=0.5,
                   help="weight of the adaptively weighted GAN loss; 0: off")
    p.add_argument("--disc-start", type=svg.positive, default=2501, help="first step of the GAN loss")
    p.add_argument("--stats-images", type=svg.positive, default=10_000, help="images for latent mean and std")
    args = p.parse_args()
    if not args.residual_channels:
        svg.refuse_idle({"--residual-channels": "--align"})
    return args


def decoder_size(args):
    """--decoder-channels and --decoder-mult as arguments of svg.Decoder."""
    if args.decoder_channels % 32:
        raise svg.UserError(f"--decoder-channels {args.decoder_channels}: GroupNorm takes multiples of 32")
    if not args.decoder_mult:
        return {"ch": args.decoder_channels}
    mult = args.decoder_mult.split(",")
    if not all(m.isdecimal() and int(m) for m in mult) or 2 ** (len(mult) - 1) * args.grid != args.image_size:
        raise svg.UserError(f"--decoder-mult {args.decoder_mult}: give a factor for each level from "
                            f"--image-size {args.image_size} to --grid {args.grid}")
    return {"ch": args.decoder_channels, "ch_mult": [int(m) for m in mult]}


def main():
    """Stage 1, from the flags to the last checkpoint."""
    args = parse_args()
    device, share = svg.setup(args.precision), svg.local_batch(args)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    torch.manual_seed(args.seed)  # every rank starts from the same weights
    if args.bench and not args.demo:
        encoder, vgg = svg.fresh_encoder(args.encoder), None
    else:
        encoder = svg.load_encoder(svg.fetch_weights(args.encoder, args.weights))
        vgg = svg.fetch_weights("vgg16-397923af.pth", args.weights) if args.lpips else None
    heads = max(1, args.residual_dim // 48)
    if args.residual_dim % heads:
        raise svg.UserError(f"--residual-dim {args.residual_dim}: give a multiple of 48, or less than 96")
    residual = {"dim": args.residual_dim, "depth": args.residual_depth, "heads": heads,
                "dropout": args.residual_dropout}
    model = svg.Autoencoder(encoder, args.residual_channels, args.image_size, args.grid, residual=residual,
                            decoder=decoder_size(args), align=args.align)
    lpips = LPIPS(vgg).to(device) if args.lpips else None
    disc = PatchDiscriminator()
    checkpoint = None
    if not args.bench:
        data = (demo.dataset("train") if args.demo else
                svg.open_data(args.data, args.image_size, random_crop=True, seed=args.seed))
        run = svg.Run("ae", args, {"trained_on": encoder.fingerprint, **svg.identity(data)})
        checkpoint = run.resume()

    model, disc = model.to(device).train(), disc.to(device)
    model.decoder.recompute = args.recompute
    opt, opt_disc = (torch.optim.Adam(m.parameters(), args.lr, betas=(0.5, 0.9), fused=device.type != "mps")
                     for m in (model, disc))
    step = 0
    if checkpoint:
        step = checkpoint["step"]
        svg.strict_load(model, checkpoint["model"], run.last, "the same autoencoder")
        for target, key in ((disc, "disc"), (opt, "opt"), (opt_disc, "opt_disc")):
            target.load_state_dict(checkpoint[key])
        opt.param_groups[0]["lr"] = opt_disc.param_groups[0]["lr"] = args.lr
    if args.compile:
        svg.compile_blocks(encoder.vit, *([model.residual] if args.residual_channels else []))
        model.decoder.features = torch.compile(model.decoder.features, dynamic=False)
        for module in (lpips, disc) if lpips else (disc,):
            module.compile(dynamic=False)
    forward, discriminate, last_layer = model, disc, model.decoder.conv_out.weight
    if svg.world_size() > 1:
        forward, discriminate = svg.data_parallel(model), svg.data_parallel(disc)
    local = slice(svg.rank() * share, (svg.rank() + 1) * share)  # this rank's part of the global batch

    def train_step(step, images):
        """One step of both optimisers on uint8 images [B, H, W, 3]: losses, gradient norm, skipped or not."""
        svg.seed_step(args.seed, step)  # every rank draws for the whole batch, whatever their number
        masked = torch.rand(args.batch, device=device)[local][:len(images)] < model.mask_ratio
        svg.seed_step(args.seed, step, 1 + svg.rank())  # for dropout
        images = svg.to_float(images, device)
        adversarial = bool(args.gan) and step + 1 >= args.disc_start
        opt.zero_grad(set_to_none=True)
        opt_disc.zero_grad(set_to_none=True)
        totals = torch.zeros(3, device=device)
        for x, mask in svg.micro_batches(args.accumulate, [forward, discriminate], images, masked):
            part = len(x) / len(images)
            with svg.autocast(device, args.precision):
                y = forward(x, mask).float()
                nll, l1, perceptual = reconstruction_loss(x, y, lpips, args.lpips)
                disc.requires_grad_(False)
                g_loss = -disc(y).float().mean() if adversarial else None
                disc.requires_grad_(True)
            y.backward(part * generator_gradient(y, nll, g_loss, args.gan, last_layer))
            d_loss = torch.zeros_like(l1)
            if adversarial:
                with svg.autocast(device, args.precision):
                    d_loss = hinge_loss(discriminate(x).float(), discriminate(y.detach()).float())
                (part * d_loss).backward()
            totals += part * torch.stack([l1, perceptual, d_loss.detach()])
        return totals, *svg.optimizer_step(*[opt, opt_disc][:1 + adversarial], clip=args.clip)

    if args.bench:
        def make(n):
            images = svg.synthetic_images(n, args.image_size, device)
            return lambda: train_step(args.disc_start, images)

        return svg.bench(args, device, make, args.batch, script="train_ae")

    plain = copy.copy(data)
    plain.random_crop = False
    preview = np.stack([plain[i, 0][0] for i in np.linspace(0, len(plain) - 1, 10).astype(int).tolist()])
    preview = svg.to_float(torch.from_numpy(preview), device)
    batches = svg.loader(data, args.batch, args.seed, step, args.workers, device)
    names = {"l1_loss": True, "lpips_loss": bool(lpips), "disc_loss": bool(args.gan)}
    stop = run.stopped()
    while step < args.steps and not stop:
        images, _, corrupt = next(batches)
        run.report_corrupt(data, corrupt)
        losses, norm, skipped = train_step(step, images)
        step, stop = step + 1, run.stopped()
        run.record(step, {k: v for (k, used), v in zip(names.items(), losses, strict=True) if used},
                   norm, skipped)
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), svg.autocast(device, args.precision):
                pair = torch.cat([preview, model.eval()(preview).float()])
            model.train()
            run.picture(step, svg.grid_image(svg.to_uint8(pair), len(preview), title=(
                f"{run.path} step {step}: originals above reconstructions")))
        if step % args.save_every == 0 or step == args.steps or stop:
            if stop and step < args.steps:  # seconds may be left, so no figures; stage 2 can measure them
                model.latent_mean.zero_()
            else:
                with svg.autocast(device, args.precision):
                    model.measure(plain, args.stats_images, share, args.workers)
            run.save({**model.checkpoint(), "step": step, "disc": disc.state_dict(), "opt": opt.state_dict(),
                      "opt_disc": opt_disc.state_dict()})
    run.end(step)


if __name__ == "__main__":
    svg.run_main(main)
