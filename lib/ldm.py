"""The networks of latent diffusion (LDM, arXiv 2112.10752): the decoder, SVG's too, and the baseline VAEs.

    latent map -> Decoder -> image            image -> VAE -> latent, as by svg.Autoencoder
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from lib import files

# -- Latent -> image: the VQGAN/LDM decoder ----------------------------------------------------------------

group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm-SiLU-conv twice, with a 1x1 shortcut where the width changes."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1 = group_norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = group_norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution; computed as one transposed convolution.

    Of the 9 pixels under the kernel at most 4 are different ones, so that 4 products give what 9 do.
    """

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        # Add up the weights that fall on the same pixel, in each way the kernel can lie: [C, C, 4, 4].
        kernel = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def run_block(block, *inputs, recompute=False):
    """Return block(*inputs); recompute: keep only the inputs, and compute again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return recomputed(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def middle(c):
    """Return two blocks and the attention between them, what both halves have at the lowest resolution."""
    mid = nn.Module()
    mid.block_1 = ResnetBlock(c, c)
    mid.block_2 = ResnetBlock(c, c)
    mid.attn_1 = AttnBlock(c)
    return mid


class Decoder(nn.Module):
    """[B, z, h, w] -> RGB [B, 3, h*2^(levels-1), ...]; attention at the lowest, or in the middle alone."""
    recompute = False

    def __init__(self, z_channels, ch=128, ch_mult=(1, 1, 2, 2, 4), attention=True):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = middle(c)
        self.up = nn.ModuleList()  # level 0 is the full resolution; decoding starts at the last level
        for level in reversed(range(len(widths))):
            up = nn.Module()
            width = widths[level]
            up.block = nn.ModuleList(ResnetBlock(cin, width) for cin in (c, width, width))
            c = width
            attentive = attention and level == len(widths) - 1
            up.attn = nn.ModuleList(AttnBlock(c) for _ in range(3 if attentive else 0))
            if level > 0:
                up.upsample = Upsample(c)
            self.up.insert(0, up)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def features(self, z):
        """Return all but the last layer's output, [B, ch, H, W]: the GAN weight needs that layer alone."""
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(range(len(self.up))):
            up = self.up[level]
            for i, block in enumerate(up.block):
                h = run_block(block, h, recompute=self.recompute)
                if len(up.attn):
                    h = up.attn[i](h)
            if level > 0:
                h = up.upsample(h)
        return F.silu(self.norm_out(h))

    def forward(self, z):
        return self.conv_out(self.features(z))


# -- The paper's baselines: VAEs -------------------------------------------------------------------------

class VAEEncoder(nn.Module):
    """RGB [B, 3, H, W] -> [B, 2z, H/f, W/f] with f = 2^(levels-1): the Decoder's counterpart."""

    def __init__(self, z_channels, ch, ch_mult, attention):
        super().__init__()
        c = ch
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList()  # level 0 is the full resolution
        for level, factor in enumerate(ch_mult):
            lowest = level == len(ch_mult) - 1
            down = nn.Module()
            down.block = nn.ModuleList([ResnetBlock(c, ch * factor), ResnetBlock(ch * factor, ch * factor)])
            c = ch * factor
            down.attn = nn.ModuleList(AttnBlock(c) for _ in range(2 if attention and lowest else 0))
            if not lowest:
                down.downsample = nn.Module()
                down.downsample.conv = nn.Conv2d(c, c, 3, stride=2)
            self.down.append(down)
        self.mid = middle(c)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 2 * z_channels, 3, padding=1)

    def forward(self, images):
        h = self.conv_in(images)
        for down in self.down:
            for i, block in enumerate(down.block):
                h = block(h)
                if len(down.attn):
                    h = down.attn[i](h)
            if hasattr(down, "downsample"):
                h = down.downsample.conv(F.pad(h, (0, 1, 0, 1)))  # one pixel on the right and below
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """SD-VAE (f8d4), VA-VAE (f16d32) and their like, used as svg.Autoencoder is; LDM's parameter names.

    A token stands for 16 x 16 pixels: 2 x 2 cells of an f8 map (SiT's patch size 2), one cell of an f16 map.
    Its channels are in the order of pixel_unshuffle: map channel by map channel, each row by row.
    """

    def __init__(self, z_channels, ch, ch_mult, attention, image_size=256):
        super().__init__()
        factor = 2 ** (len(ch_mult) - 1)
        self.ratio = max(16, factor)  # pixels per token and side
        self.patch = self.ratio // factor  # cells per token and side
        self.image_size = image_size
        self.grid = image_size // self.ratio
        self.channels = z_channels * self.patch ** 2
        self.feature_channels = self.channels  # all come from the encoder, there is no residual
        self.config = {"z_channels": z_channels, "ch": ch, "ch_mult": ch_mult, "attention": attention,
                       "image_size": image_size}
        self.encoder = VAEEncoder(z_channels, ch, ch_mult, attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.decoder = Decoder(z_channels, ch, ch_mult, attention=attention)
        self.to(memory_format=torch.channels_last)

    def posterior(self, images):
        """Return mean and log-variance [B, N, C] of the latents of images [B, 3, H, W]."""
        moments = self.quant_conv(self.encoder(images)).float()  # [B, 2z, H/f, W/f]
        mean, logvar = (F.pixel_unshuffle(part, self.patch).flatten(2).transpose(1, 2)
                        for part in moments.chunk(2, 1))
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        """Return latents [B, N, C] of images [B, 3, H, W]: the posterior's mean; in train mode a sample."""
        mean, logvar = self.posterior(images)
        if self.training:
            return mean + (logvar / 2).exp() * torch.randn_like(mean)
        return mean

    def decode(self, latents, grid=None):
        """Return images [B, 3, H, W], nominally in [-1, 1], of latents [B, h*w, C]; grid: (h, w)."""
        grid = grid or [math.isqrt(latents.shape[1])] * 2
        patches = latents.unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
        return self.decoder(self.post_quant_conv(F.pixel_shuffle(patches, self.patch)))

    def to_checkpoint(self):
        """Return what a file holds of this model."""
        return {"kind": "vae", "config": self.config, "model": self.state_dict(),
                "fingerprint": files.fingerprint(self.state_dict())}
