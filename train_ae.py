"""Stage 1: train the residual encoder and the decoder around a frozen encoder.

    torchrun --nproc_per_node=8 train_ae.py --data imagenet/train      # the paper's recipe: batch 512, 100K steps
    python train_ae.py --demo                                          # tiny sizes on built-in data, two CPU cores

Loss (the authors' code): sum over pixels of |x - y| + LPIPS(x, y), plus an adaptively weighted PatchGAN hinge
loss from step --disc-start on. Writes runs/<name>/: config.json, log.jsonl, loss.png, last.pt, numbered
checkpoints, previews (originals above reconstructions). The same command goes on from last.pt.
"""
import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import demo
import svg

# -- Losses ------------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """Perceptual distance of images [B, 3, H, W] in [-1, 1]: one number per image [B] (Zhang et al., v0.1,
    VGG16).

    vgg: path of torchvision's vgg16-397923af.pth; the published linear heads lie in assets/.
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
        weights = svg.load_checkpoint(vgg)
        weights = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
        svg.strict_load(self, weights, vgg, "VGG16")
        heads = svg.load_npz(Path(__file__).parent / "assets" / "lpips_vgg_heads.npz")
        for i in range(5):
            head = torch.from_numpy(heads[f"lin{i}"]).view(1, -1, 1, 1)
            self.register_buffer(f"head{i}", head, persistent=False)
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

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


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN: images [B, 3, H, W] -> logits [B, 1, h, w], one per 70 x 70 pixel patch."""

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.main = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * w, 8 * w, 4, 1, 1, bias=False), nn.BatchNorm2d(8 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * w, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images):
        return self.main(images)


def reconstruction_loss(x, y, lpips, weight):
    """Sum over pixels and channels of |x - y| + weight * LPIPS, per image, and the two parts' means."""
    l1 = (x - y).abs()
    perceptual = lpips(x, y) if lpips else x.new_zeros(len(x))
    nll = (l1.sum((1, 2, 3)) + weight * perceptual * l1[0].numel()).mean()
    return nll, l1.mean().detach(), perceptual.mean().detach()


def adaptive_weight(reconstruction, gan, last_layer):
    """||d reconstruction / d last_layer|| / (||d gan / d last_layer|| + 1e-4), at most 1e4 (VQGAN, eq. 7)."""
    g_rec, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    g_gan, = torch.autograd.grad(gan, last_layer, retain_graph=True)
    return (g_rec.norm() / (g_gan.norm() + 1e-4)).clamp(0, 1e4).detach()


def hinge_loss(real, fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# -- The program -------------------------------------------------------------------------------------------

def parse_args():
    p = svg.Parser(__doc__)
    p.demo = demo.TRAIN_AE
    svg.add_training_flags(p, batch=512, lr=1e-4, steps=100_000)
    p.add_argument("--encoder", default="dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
                   help="frozen encoder: a file in the weights folder, or a path")
    p.add_argument("--image-size", type=svg.positive, default=256, help="pixels per side")
    p.add_argument("--grid", type=svg.positive, default=16, help="latent tokens per side")
    p.add_argument("--residual-channels", type=svg.not_negative, default=8, help="latent channels of the residual encoder")
    p.add_argument("--align", choices=("batch", "none"), default="batch",
                   help="alignment of the residual to the encoder's statistics; none: the ablation of table 4")
    p.add_argument("--residual-dim", type=svg.positive, default=384, help="width of the residual encoder")
    p.add_argument("--residual-depth", type=svg.positive, default=6, help="layers of the residual encoder")
    p.add_argument("--decoder-channels", type=svg.positive, default=128, help="decoder's width at full resolution")
    p.add_argument("--decoder-mult", help="factors of it by level, full resolution first (default: 1,1,2,2,4)")
    p.add_argument("--lpips", type=svg.number(), default=1.0, help="weight of LPIPS; 0: off, VGG16 is not needed")
    p.add_argument("--gan", type=svg.number(), default=0.5, help="weight of the adaptively weighted GAN loss; 0: off")
    p.add_argument("--disc-start", type=svg.positive, default=2501, help="first step of the GAN loss")
    p.add_argument("--stats-images", type=svg.positive, default=10_000, help="images for latent mean and std")
    return p.parse_args()


def decoder_size(args):
    """--decoder-channels and --decoder-mult as arguments of svg.Decoder."""
    if args.decoder_channels % 32:
        raise svg.UserError(f"--decoder-channels {args.decoder_channels}: GroupNorm takes multiples of 32")
    if not args.decoder_mult:
        return {"ch": args.decoder_channels}
    mult = args.decoder_mult.split(",")
    if not all(m.isdigit() and int(m) for m in mult) or 2 ** (len(mult) - 1) * args.grid != args.image_size:
        raise svg.UserError(f"--decoder-mult {args.decoder_mult}: give a factor for each level from --image-size "
                            f"{args.image_size} to --grid {args.grid}")
    return {"ch": args.decoder_channels, "ch_mult": [int(m) for m in mult]}


def main():
    args = parse_args()
    device = svg.setup()
    torch.manual_seed(args.seed)  # every rank starts from the same weights
    encoder = svg.load_encoder(svg.fetch_weights(args.encoder, args.weights))
    heads = max(1, args.residual_dim // 48)
    if args.residual_dim % heads:
        raise svg.UserError(f"--residual-dim {args.residual_dim}: give a multiple of 48, or less than 96")
    residual = {"dim": args.residual_dim, "depth": args.residual_depth, "heads": heads}
    model = svg.Autoencoder(encoder, args.residual_channels, args.image_size, args.grid, residual=residual,
                            decoder=decoder_size(args), align=args.align)
    lpips = LPIPS(svg.fetch_weights("vgg16-397923af.pth", args.weights)).to(device) if args.lpips else None
    data = (demo.dataset("train") if args.demo else
            svg.ImageFolder(args.data, args.image_size, random_crop=True, seed=args.seed))
    run = svg.Run("ae", args, {"encoder_fingerprint": encoder.fingerprint})

    model = model.to(device).train()
    disc = PatchDiscriminator().to(device)
    opt = torch.optim.Adam(model.parameters(), args.lr, betas=(0.5, 0.9))
    opt_disc = torch.optim.Adam(disc.parameters(), args.lr, betas=(0.5, 0.9))
    step = 0
    if checkpoint := run.resume():
        step = checkpoint["step"]
        for target, key in ((model, "model"), (disc, "disc"), (opt, "opt"), (opt_disc, "opt_disc")):
            target.load_state_dict(checkpoint[key])
    forward, discriminate = model, disc
    if svg.world_size() > 1:
        forward = DistributedDataParallel(model, broadcast_buffers=False)
        if device.type == "cuda":
            disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        discriminate = DistributedDataParallel(disc, broadcast_buffers=False)

    plain = copy.copy(data)
    plain.random_crop = False
    preview = np.stack([plain[i, 0][0] for i in np.linspace(0, len(plain) - 1, 10).astype(int).tolist()])
    preview = svg.to_float(torch.from_numpy(preview), device)
    batches = svg.loader(data, args.batch, args.seed, step, args.workers, device)
    start = since = time.time()
    sums, count = 0, 0
    while step < args.steps:
        images, _, corrupt = next(batches)
        run.report_corrupt(data, corrupt)
        svg.seed_step(args.seed, step, svg.rank())
        step += 1
        images = svg.to_float(images, device)
        adversarial = bool(args.gan) and step >= args.disc_start

        with svg.autocast(device, args.precision):
            reconstruction = forward(images).float()
            loss, l1, perceptual = reconstruction_loss(images, reconstruction, lpips, args.lpips)
            if adversarial:
                disc.requires_grad_(False)
                g_loss = -disc(reconstruction).float().mean()
                disc.requires_grad_(True)
        if adversarial:
            loss = loss + args.gan * adaptive_weight(loss, g_loss, model.decoder.conv_out.weight) * g_loss
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

        d_loss = torch.zeros_like(l1)
        if adversarial:
            with svg.autocast(device, args.precision):
                real, fake = discriminate(images).float(), discriminate(reconstruction.detach()).float()
                d_loss = hinge_loss(real, fake)
            opt_disc.zero_grad(set_to_none=True)
            d_loss.backward()
            opt_disc.step()

        sums, count = sums + torch.stack([l1, perceptual, d_loss.detach()]), count + 1
        if step % args.log_every == 0 or step == args.steps:
            l1, perceptual, d_loss = (svg.all_reduce(sums.cpu(), device) / count / svg.world_size()).tolist()
            values = {"l1_loss": l1, **({"lpips_loss": perceptual} if lpips else {}),
                      **({"disc_loss": d_loss} if args.gan else {})}
            run.log(step, start, values, count * args.batch / (time.time() - since))
            sums, count, since = 0, 0, time.time()
        if step % args.preview_every == 0 or step == args.steps:
            with torch.no_grad(), svg.autocast(device, args.precision):
                pair = torch.cat([preview, model.eval()(preview).float()])
            model.train()
            run.picture(step, svg.grid_image(svg.to_uint8(pair), len(preview), title=(
                f"{run.path} step {step}: originals above reconstructions")))
        if step % args.save_every == 0 or step == args.steps:
            with svg.autocast(device, args.precision):
                model.measure(plain, args.stats_images, args.batch // svg.world_size(), args.workers)
            run.save({**model.checkpoint(), "step": step, "disc": disc.state_dict(), "opt": opt.state_dict(),
                      "opt_disc": opt_disc.state_dict()})
    run.say(f"done: {run.last}")


if __name__ == "__main__":
    svg.run_main(main)
