"""SVG: Latent Diffusion Model without Variational Autoencoder (arXiv 2510.15301), the method in one file.

    image -> frozen DINO tokens + aligned residual tokens = latent -> noise -> velocity -> latent -> image

Read from top to bottom. The paper's symbols and the shapes:

    x      image          float RGB [B, 3, H, W] in [-1, 1]
    z      latent         tokens [B, N, C], row-major, N = H/16 * W/16, C = 384 (DINO) + 8 (residual)
    t      time           [B] in [0, 1]: 0 is noise, 1 is data (the paper counts the other way)
    x_t    noisy latent   (1-t) noise + t z
    v      velocity       [B, N, C], what the transformer answers: the mean of z - noise, given x_t

`train_ae.py` and `train_dit.py` train it, `sample.py` draws samples from it, `fid.py` scores them.
"""
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import files
from files import UserError, load_checkpoint, save_checkpoint  # noqa: F401 (also svg.save_checkpoint)
from runs import all_reduce, world_size

# -- Image -> tokens: one vision transformer for every frozen encoder and for the residual encoder ---------


def rotary_positions(periods, h, w):
    """Return cosines and sines [2, h*w, 4*len(periods)] of DINOv3's rotary positions, centres in [-1, 1]."""
    y = (torch.arange(h, device=periods.device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=periods.device) + 0.5) / w * 2 - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)  # [h*w, 2, 1]
    angles = 2 * math.pi * centres / periods.float()  # [h*w, 2, len(periods)]
    angles = angles.flatten(1).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Rotate the patch tokens of x [B, heads, tokens, head_dim]; the tokens before them stay."""
    cos, sin = rotary
    prefix, patches = x.split([x.shape[2] - len(cos), len(cos)], 2)
    a, b = patches.chunk(2, -1)
    patches = patches * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([prefix, patches.to(x.dtype)], 2)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D]; QK-Norm is a LayerNorm over each head's dimension."""

    def __init__(self, dim, heads, qk_norm=False, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotary=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q = self.q_norm(q).to(v.dtype)  # [B, heads, N, D/heads]
        k = self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Linear-GELU-Linear; dropout after both, as in torchvision's ViT."""

    def __init__(self, dim, hidden, approximate="none", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.approximate = approximate
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x), approximate=self.approximate))
        return self.dropout(self.fc2(x))


class SwiGLU(nn.Module):
    """The gated MLP of DINOv3 S+: w3(silu(w1 x) * w2 x)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """A learned factor per channel at the end of each branch."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, swiglu, layer_scale, eps, dropout, gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, dropout=dropout)
        self.mlp = SwiGLU(dim, 4 * dim) if swiglu else Mlp(dim, 4 * dim, gelu, dropout)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary=None):
        x = x + self.dropout(self.ls1(self.attn(self.norm1(x), rotary)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A plain vision transformer; parameter names are those of the official DINO files.

    Images [B, 3, h*patch, w*patch] -> tokens after the final norm [B, prefix + h*w, dim]; the prefix is CLS
    and registers. grid: None for DINOv3's rotary positions, n for a learned position embedding of CLS and n*n
    patches that is resized (bicubic) to other grids; `offset` and `antialias` are the two ways DINOv2's
    releases do that. cls: False leaves out the CLS token and its position. imagenet: whether its images are
    normalised by ImageNet's statistics (the caller does it) or stay in [-1, 1].
    """

    def __init__(self, patch, dim, depth, heads, grid=None, registers=0, swiglu=False, layer_scale=True,
                 eps=1e-6, offset=0.0, antialias=False, dropout=0.0, cls=True, gelu="none", imagenet=True):
        super().__init__()
        self.patch = patch
        self.dim = dim
        self.grid = grid
        self.offset = offset
        self.antialias = antialias
        self.cls = int(cls)
        self.prefix = int(cls) + registers
        self.imagenet = imagenet
        if cls:
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, dim) * 0.02)
        if grid:
            self.pos_embed = nn.Parameter(torch.randn(1, self.cls + grid * grid, dim) * 0.02)
        else:
            n = dim // heads // 4
            self.register_buffer("rope_periods", 100.0 ** (torch.arange(n) / n), persistent=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, swiglu, layer_scale, eps, dropout, gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps) if depth else nn.Identity()  # depth 0: raw patches

    def positions(self, h, w):
        """Return the learned position embedding on an h x w grid, that of CLS first: [1, cls + h*w, dim]."""
        n = self.grid
        if (h, w) == (n, n):
            return self.pos_embed
        patches = self.pos_embed[:, self.cls:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
        target = {"size": (h, w)}
        if self.offset:  # gives a scale instead of a size, which moves the sampling positions
            target = {"scale_factor": ((h + self.offset) / n, (w + self.offset) / n)}
        patches = F.interpolate(patches, mode="bicubic", antialias=self.antialias, **target)
        return torch.cat([self.pos_embed[:, :self.cls], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, x, layers=1):
        """Return the tokens; layers: the mean of those after so many of the last blocks, each normed."""
        x = self.patch_embed.proj(x)
        B, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # [B, h*w, dim]
        if self.cls:
            x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)
        rotary = None
        if self.grid:
            x = x + self.positions(h, w)
        else:
            rotary = rotary_positions(self.rope_periods, h, w)  # once, for all blocks
        if self.prefix > 1:
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)
        x = self.dropout(x)
        last = []
        for block in self.blocks:
            x = block(x, rotary)
            last = [*last, x][-layers:]
        if layers == 1:
            return self.norm(x)
        return torch.stack([self.norm(x) for x in last]).mean(0)


_DINOV3 = {"patch": 16, "registers": 4, "eps": 1e-5}
_DINOV2 = {"patch": 14, "grid": 37, "offset": 0.1}
_DINOV2_REG = {"patch": 14, "grid": 37, "registers": 4, "antialias": True}
_MAE = {"patch": 16, "grid": 14, "layer_scale": False}
_SIGLIP2 = {"patch": 16, "grid": 16, "layer_scale": False, "cls": False, "gelu": "tanh", "imagenet": False}
_S = {"dim": 384, "depth": 12, "heads": 6}
_B = {"dim": 768, "depth": 12, "heads": 12}
_L = {"dim": 1024, "depth": 24, "heads": 16}
ENCODERS = {  # name: arguments of ViT
    "dinov3_vits16": {**_DINOV3, **_S},
    "dinov3_vits16plus": {**_DINOV3, **_S, "swiglu": True},  # the paper's
    "dinov3_vitb16": {**_DINOV3, **_B},
    "dinov3_vitl16": {**_DINOV3, **_L},
    "dinov2_vits14": {**_DINOV2, **_S},
    "dinov2_vitb14": {**_DINOV2, **_B},
    "dinov2_vitl14": {**_DINOV2, **_L},
    "dinov2_vits14_reg": {**_DINOV2_REG, **_S},
    "dinov2_vitb14_reg": {**_DINOV2_REG, **_B},
    "dinov2_vitl14_reg": {**_DINOV2_REG, **_L},
    "mae_vitb16": {**_MAE, **_B},
    "siglip2_vitb16_256": {**_SIGLIP2, **_B},
}


def imagenet_normalize(images):
    """Convert [-1, 1] to zero mean and unit variance per channel by ImageNet's statistics."""
    statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    mean, std = statistics.to(images, non_blocking=True)  # new_tensor would wait for the device
    return ((images + 1) / 2 - mean) / std


class Encoder(nn.Module):
    """A frozen ViT: images [B, 3, H, W] in [-1, 1] -> patch tokens [B, N, D].

    Its weights are buffers outside the state dict, not parameters: no `.train()`, `.requires_grad_()`,
    optimiser or checkpoint of what contains it can reach them. (In train mode DINOv3 would jitter its
    coordinates at random.)
    """

    def __init__(self, vit, name, file):
        super().__init__()
        self.fingerprint = files.fingerprint(vit.state_dict())
        self.vit = vit
        self.name = name
        self.file = str(file)
        self.dim = vit.dim
        for module in vit.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, value in own:
                delattr(module, key)
                module.register_buffer(key, value.detach(), persistent=False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images, grid=None, cls=False, layers=1):
        """Return patch tokens [B, h*w, D]; with cls=True the CLS token [B, D] (or their mean) before them.

        grid: (h, w) tokens, to which images are resized (bicubic, antialiased) if they do not fit; default:
        one token per patch where the patches fit exactly, else one per 16 pixels (256 become 224 for 14).
        layers: as ViT.forward's.
        """
        size = images.shape[-2:]
        patch = self.vit.patch
        if grid is None:
            grid = [n // patch if n % patch == 0 else n // 16 for n in size]
        h, w = grid
        if size != (h * patch, w * patch):
            images = F.interpolate(images.float(), (h * patch, w * patch), mode="bicubic", antialias=True)
        if self.vit.imagenet:
            images = imagenet_normalize(images)
        tokens = self.vit(images, layers).float()
        patches = tokens[:, self.vit.prefix:]
        if not cls:
            return patches
        return tokens[:, 0] if self.vit.cls else patches.mean(1), patches


def load_encoder(path, name=None):
    """Load a frozen encoder: encoder(images [B, 3, H, W] in [-1, 1]) -> patch tokens [B, N, D].

    path: an official DINOv3, DINOv2 or MAE `.pth`, DINO's or SigLIP2's Hugging Face `.safetensors` (with or
    without its text tower), or a file with an encoder of ours (demo.pt). The architecture follows from the
    shapes, or from a `name` of ENCODERS; UserError names tensors that are missing, unexpected or misshapen.
    """
    return encoder_from_weights(load_checkpoint(path), path, name)


def encoder_from_weights(weights, path, name=None):
    """load_encoder for weights in memory; `path` is what messages and checkpoints call them."""
    if isinstance(weights.get("encoder"), dict):
        weights = weights["encoder"]
    if "vit" in weights:  # ours, with its architecture
        files.check_fields(weights, {"name": str, "vit": dict, "model": dict}, path)
        name = weights["name"]
        config = weights["vit"]
        weights = weights["model"]
    else:
        if isinstance(weights.get("model"), dict):  # MAE
            weights = weights["model"]
        files.check_tensors(weights, path)
        try:
            weights = files.to_official_names(weights)
            name = name or files.detect_architecture(weights, ENCODERS, path)
        except (KeyError, IndexError, RuntimeError, ValueError) as e:  # tensors of odd shapes
            raise UserError(f"{path}: not the weights of an encoder ({files.short_error(e)})") from e
        if name not in ENCODERS:
            raise UserError(f"{name}: no such encoder; known: {', '.join(ENCODERS)}")
        config = ENCODERS[name]
    vit = files.build(ViT, config, path)
    files.strict_load(vit, weights, path, name)
    return Encoder(vit, name, path)


# -- Tokens -> latent: the residual gets the features' scale -----------------------------------------------

def channel_statistics(x, synchronise=False):
    """Return mean and std of tokens x [B, N, C]: per channel over batch and tokens, then averaged; detached.

    synchronise: over the batches of all ranks (of equal size), as if they were one batch.
    """
    x = x.detach().float().flatten(0, 1)
    n = len(x)
    mean = x.mean(0)
    var = x.var(0, correction=0)
    if synchronise and world_size() > 1:
        n *= world_size()
        moments = torch.stack([mean, var + mean.square()]).double() / world_size()
        mean, square = all_reduce(moments)
        var = (square - mean.square()).float()
        mean = mean.float()
    return mean.mean(), (var * n / max(n - 1, 1)).sqrt().mean()


def match_distribution(residual, feature_mean, feature_std, residual_mean, residual_std):
    """Give the residual [B, N, 8] the features' mean and std (section 3.3); all statistics are scalars."""
    return (residual - residual_mean) / (residual_std + 1e-6) * feature_std + feature_mean


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
    """[B, z, h, w] -> RGB [B, 3, h*2^(levels-1), ...]; attention at the lowest resolution only.

    attention: False leaves it to the middle alone, as in SD-VAE.
    """
    recompute = False

    def __init__(self, z_channels, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=3, attention=True):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = middle(c)
        self.up = nn.ModuleList()  # level 0 is the full resolution; decoding starts at the last level
        for level in reversed(range(len(widths))):
            up = nn.Module()
            up.block = nn.ModuleList()
            for _ in range(blocks):
                up.block.append(ResnetBlock(c, widths[level]))
                c = widths[level]
            attentive = attention and level == len(widths) - 1
            up.attn = nn.ModuleList(AttnBlock(c) for _ in range(blocks if attentive else 0))
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


# -- The autoencoder: image <-> latent ---------------------------------------------------------------------

def pixels_per_token(image_size, grid):
    """Return image_size / grid, the pixels of a token and side; UserError if that is no power of two."""
    ratio = image_size // grid
    if grid * ratio != image_size or ratio & (ratio - 1):
        raise UserError(f"--image-size {image_size} over --grid {grid} is not a power of two; "
                        f"256 goes with 16, 64 with 8")
    return ratio


def level_factors(ratio):
    """Return a decoder's width at each level in units of that at full resolution: (1, 1, 2, 2, 4) for 16."""
    levels = int(math.log2(ratio)) + 1
    return ((1,) * levels + (1, 2, 2, 4))[-levels:]


class LatentStatistics(nn.Module):
    """The mean and std [C] of an autoencoder's latents, its buffers latent_mean and latent_std."""
    fingerprint = None  # of the file it came from
    encoder_file = None  # where its frozen encoder is: file, name, fingerprint
    step = None  # of training, when that was saved

    def statistics(self):
        """Return what a transformer's checkpoint keeps of the autoencoder, to go on and to sample."""
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std}

    def load_statistics(self, recorded):
        """Set what statistics() returned."""
        self.set_latent_stats(recorded["latent_mean"], recorded["latent_std"])

    def normalize(self, latents):
        """Give latents zero mean and unit variance per channel: what the transformer sees."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalize(self, latents):
        """Convert the transformer's latents to those that `decode` takes."""
        return latents * self.latent_std + self.latent_mean

    def moments(self, images):
        """Return what the latents of images [B, 3, H, W] are drawn from: here the latents [B, N, C]."""
        return self.encode(images)

    def draw(self, moments, noise=None):
        """Return latents [B, N, C] drawn from moments; noise: standard normal [B, N, C], of a VAE alone."""
        return moments

    @property
    def measured(self):
        """Whether the latents' mean and std are known (the authors' checkpoint has none)."""
        return bool((self.latent_mean != 0).any())

    def set_latent_stats(self, mean, std):
        """Set the latents' per-channel mean and std [C], for instance to the authors' published ones."""
        if not mean.shape == std.shape == self.latent_mean.shape:
            raise UserError(f"latent statistics of {mean.numel()} channels do not fit latents of "
                            f"{self.channels}")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise UserError("latent statistics are not finite, or a standard deviation is not above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def expectations(self, images):
        """Return the expected latents [B, N, C] of images, not aligned, and their expected squares."""
        latents = self.encode(images, align="none").double()
        return latents, latents.square()

    @torch.no_grad()
    def measure_moments(self, batches):
        """Return mean and std [C] of the latents, not aligned, of images on all ranks; ends in eval.

        In float64, of all images together, so that they do not depend on the batches.
        """
        self.eval()
        sums = torch.zeros(2 * self.channels + 1, dtype=torch.float64)
        for images in batches:
            latents, squares = (x.flatten(0, 1).cpu().double() for x in self.expectations(images))
            sums += torch.cat([latents.sum(0), squares.sum(0), torch.tensor([len(latents)])])
        sums = all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).view(2, -1)
        return mean, (square - mean.square()).clamp(min=1e-12).sqrt()

    def measure_statistics(self, batches):
        """Set the latents' mean and std from batches of images on all ranks; ends in eval."""
        self.set_latent_stats(*self.measure_moments(batches))


class Autoencoder(LatentStatistics):
    """Frozen encoder + residual encoder -> aligned latent [B, N, C]; decoder -> image.

    encoder: a frozen Encoder, or None for decoding only (then give `feature_channels`). image_size: pixels;
    grid: tokens per side, default image_size // 16; their ratio must be a power of two. Any other image size
    whose sides are multiples of that ratio works too. residual: arguments of the residual ViT; decoder:
    arguments of Decoder. align: "none" never aligns the residual (the ablation of table 4). encoder_layers:
    the features are the mean of the tokens after so many last blocks (RAEv2, arXiv 2605.18324).
    """

    def __init__(self, encoder, residual_channels=8, image_size=256, grid=None, mask_ratio=0.1, residual=None,
                 decoder=None, feature_channels=None, align="batch", encoder_layers=1):
        super().__init__()
        grid = grid or image_size // 16
        ratio = pixels_per_token(image_size, grid)
        if encoder and encoder_layers > 1 and encoder_layers > len(encoder.vit.blocks):
            raise UserError(f"--encoder-layers {encoder_layers}: {encoder.name} has "
                            f"{len(encoder.vit.blocks)} layers")
        self.encoder = encoder
        self.encoder_layers = encoder_layers
        self.image_size = image_size
        self.grid = grid
        self.ratio = ratio
        self.mask_ratio = mask_ratio
        self.feature_channels = encoder.dim if encoder else feature_channels
        self.channels = self.feature_channels + residual_channels
        residual = {"dim": 384, "depth": 6, "heads": 8, "dropout": 0.1, **(residual or {})}
        decoder = {"ch": 128, "ch_mult": level_factors(ratio), **(decoder or {})}
        self.config = {"residual_channels": residual_channels, "image_size": image_size, "grid": grid,
                       "mask_ratio": mask_ratio, "residual": residual, "decoder": decoder,
                       "feature_channels": self.feature_channels, "align": align}
        if encoder_layers > 1:
            self.config["encoder_layers"] = encoder_layers
        if residual_channels:
            dim = residual["dim"]
            self.residual = ViT(patch=ratio, grid=grid, layer_scale=False, **residual)
            self.residual_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(),
                                               nn.Linear(dim, residual_channels))
            self.mask_token = nn.Parameter(torch.randn(residual_channels) * 0.02)
        self.decoder = Decoder(self.channels, **decoder)
        # Running alignment statistics: mean and std of the features, mean and std of the residual.
        self.register_buffer("alignment", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.register_buffer("alignment_batches", torch.tensor(0))
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        self._aligned = residual_channels == 0 or align == "none"
        self.to(memory_format=torch.channels_last)

    def encode(self, images, align=None, masked=None):
        """Return latents [B, N, C] of images [B, 3, H, W]: the encoder's features, then the residual.

        align: "batch" uses this batch's statistics (over all ranks while training) and so makes a latent
        depend on its neighbours, as the authors' code does in training and inference alike; "running" uses
        those gathered in training; "none" leaves the residual as it is. Default: batch while training,
        running in eval, so that encode(batch)[i] == encode(batch[i:i+1]); none if it was trained so.
        masked: bool [B], whose residual tokens the mask token replaces in training (default: random ones).
        """
        if self.encoder is None:
            raise UserError("this autoencoder was loaded to decode only: it has no encoder")
        h, w = (n // self.ratio for n in images.shape[-2:])
        features = self.encoder(images, grid=(h, w), layers=self.encoder_layers)  # [B, N, D], frozen
        if self.config["residual_channels"] == 0:
            return features
        residual = self.residual_tokens(images)  # [B, N, 8]
        # Statistics before masking, so that training and eval, which masks nothing, share one distribution.
        statistics = self.alignment_statistics(features, residual, align)
        if self.training:
            residual = self.mask(residual, masked)
        if statistics is not None:  # None: the ablation of table 4
            residual = match_distribution(residual, *statistics)
        return torch.cat([features, residual], -1)

    def residual_tokens(self, images):
        """Return the residual encoder's tokens [B, N, 8] of images [B, 3, H, W], without CLS, not aligned."""
        tokens = self.residual(imagenet_normalize(images))
        return self.residual_head(tokens[:, 1:]).float()

    def alignment_statistics(self, features, residual, align=None):
        """Return the four scalars that match_distribution takes, or None if the residual is not aligned."""
        if align is None:
            align = "batch" if self.training else "running"
            if self.config["align"] == "none":
                align = "none"
        if align == "none":
            return None
        if align == "running":
            if not self.aligned:
                raise UserError("this autoencoder has no running alignment statistics (the authors' file has "
                                "none): use --align batch, or Autoencoder.measure_statistics on some images")
            return self.alignment
        statistics = torch.stack([*channel_statistics(features, self.training),
                                  *channel_statistics(residual, self.training)])
        if self.training:
            # A batch that is not finite is skipped, here as by the optimiser.
            finite = statistics.isfinite().all()
            statistics_or_old = torch.where(finite, statistics, self.alignment)
            self.alignment.lerp_(statistics_or_old, (1 / (self.alignment_batches + 1)).clamp(min=0.01))
            self.alignment_batches += finite
        return statistics

    def mask(self, residual, masked=None):
        """Replace the residual tokens of some images, so that the decoder does not rely on them alone."""
        if masked is None:
            masked = torch.rand(len(residual), device=residual.device) < self.mask_ratio
        return torch.where(masked.view(-1, 1, 1), self.mask_token, residual)

    def decode(self, latents, grid=None):
        """Return images [B, 3, H, W], nominally in [-1, 1], of latents [B, h*w, C]; grid: (h, w)."""
        if grid is None:
            grid = [math.isqrt(latents.shape[1])] * 2
        return self.decoder(latents.unflatten(1, grid).permute(0, 3, 1, 2))  # channels-last, without a copy

    def forward(self, images, masked=None, noise=None):
        """Return the reconstruction [B, 3, H, W] of images [B, 3, H, W].

        noise: [B, N, C], added to the latents in units of each channel's standard deviation in the batch.
        """
        grid = [n // self.ratio for n in images.shape[-2:]]
        latents = self.encode(images, masked=masked)
        if noise is not None:
            latents = latents + noise * latents.detach().std((0, 1))
        return self.decode(latents, grid)

    @property
    def aligned(self):
        """Whether running alignment statistics are known, or not needed; asks the device only until then."""
        self._aligned = self._aligned or bool(self.alignment_batches > 0)
        return self._aligned

    def statistics(self):
        return {**super().statistics(), "alignment": self.alignment}

    def load_statistics(self, recorded):
        super().load_statistics(recorded)
        if "alignment" in recorded:
            self.set_alignment(recorded["alignment"])

    def set_alignment(self, statistics):
        """Set the alignment statistics [4]: mean and std of the features, then of the residual."""
        if not (isinstance(statistics, torch.Tensor) and statistics.shape == self.alignment.shape
                and statistics.isfinite().all()):
            raise UserError("alignment statistics are not four finite numbers")
        self.alignment.copy_(statistics)
        self.alignment_batches.fill_(1)

    def measure_statistics(self, batches):
        """Set the alignment statistics and the latents' mean and std, from images on all ranks; ends in eval.

        Unlike the running averages of training, which have dropout in them, they are exactly those of eval.
        """
        mean, std = self.measure_moments(batches)
        if self.config["residual_channels"] and self.config["align"] != "none":
            features = slice(self.feature_channels)
            residual = slice(self.feature_channels, None)
            statistics = [part.mean() for kind in (features, residual) for part in (mean[kind], std[kind])]
            self.set_alignment(torch.stack(statistics))
            # What alignment makes of the residual's moments.
            mean[residual] = match_distribution(mean[residual], *statistics)
            std[residual] *= statistics[1] / (statistics[3] + 1e-6)
        self.set_latent_stats(mean, std)

    def to_checkpoint(self):
        """Return what a checkpoint holds of this model: never the frozen encoder, only its file and hash."""
        if self.encoder:
            self.encoder_file = {key: getattr(self.encoder, key) for key in ("file", "name", "fingerprint")}
        if self.encoder_file is None:
            raise UserError("an autoencoder of the decoder alone cannot be saved: load the whole file")
        return {"kind": "autoencoder", "config": self.config, "model": self.state_dict(),
                "fingerprint": files.fingerprint(self.state_dict()), "encoder_file": self.encoder_file}


# -- The paper's baselines: VAEs of latent diffusion (LDM) --------------------------------------------------

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


class VAE(LatentStatistics):
    """SD-VAE (f8d4), VA-VAE (f16d32) and their like, used as an Autoencoder is; LDM's parameter names.

    A token stands for 16 x 16 pixels, if grid, the tokens per side, does not say otherwise: 2 x 2 cells of an
    f8 map (SiT's patch size 2), one of an f16 map. Its channels are in the order of pixel_unshuffle: map
    channel by map channel, each row by row. ch, ch_mult, attention: as Decoder's. Statistics are those of the
    posterior's samples, reconstructions and probes are of its mean.
    """

    def __init__(self, z_channels, ch, ch_mult, attention, image_size=256, grid=None):
        super().__init__()
        factor = 2 ** (len(ch_mult) - 1)
        self.ratio = pixels_per_token(image_size, grid) if grid else max(16, factor)
        self.patch = self.ratio // factor  # cells per token and side
        self.image_size = image_size
        self.grid = image_size // self.ratio
        self.channels = z_channels * self.patch ** 2
        self.feature_channels = self.channels  # all come from the encoder, there is no residual
        self.config = {"z_channels": z_channels, "ch": ch, "ch_mult": ch_mult, "attention": attention,
                       "image_size": image_size, "grid": grid}
        self.aligned = True  # nothing to align
        self.encoder = VAEEncoder(z_channels, ch, ch_mult, attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.decoder = Decoder(z_channels, ch, ch_mult, attention=attention)
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        self.to(memory_format=torch.channels_last)

    def posterior(self, images):
        """Return mean and log-variance [B, N, C] of the latents of images [B, 3, H, W]."""
        moments = self.quant_conv(self.encoder(images)).float()  # [B, 2z, H/f, W/f]
        mean, logvar = (F.pixel_unshuffle(part, self.patch).flatten(2).transpose(1, 2)
                        for part in moments.chunk(2, 1))
        return mean, logvar.clamp(-30, 20)

    def moments(self, images):
        """Return mean and standard deviation [B, N, 2C] of the posterior of images [B, 3, H, W]."""
        mean, logvar = self.posterior(images)
        return torch.cat([mean, (logvar / 2).exp()], -1)

    def draw(self, moments, noise=None):
        mean, std = moments.chunk(2, -1)
        return mean + std * (torch.randn_like(mean) if noise is None else noise)

    def expectations(self, images):
        mean, std = self.moments(images).double().chunk(2, -1)
        return mean, mean.square() + std.square()

    def encode(self, images, align=None, sample=None, noise=None):
        """Return latents [B, N, C] of images [B, 3, H, W]: a sample of the posterior, or its mean.

        sample: which of them; default: a sample in training and where `noise` is given, standard normal
        [B, N, C], to draw it with; else the mean. align: ignored, there is nothing to align.
        """
        moments = self.moments(images)
        if sample is None:
            sample = self.training or noise is not None
        return self.draw(moments, noise) if sample else moments[..., :self.channels]

    def decode(self, latents, grid=None):
        """Return images [B, 3, H, W], nominally in [-1, 1], of latents [B, h*w, C]; grid: (h, w)."""
        grid = grid or [math.isqrt(latents.shape[1])] * 2
        patches = latents.unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, h, w]
        return self.decoder(self.post_quant_conv(F.pixel_shuffle(patches, self.patch)))

    def forward(self, images, masked=None):
        """Return the reconstruction [B, 3, H, W] of images; in training of a sample, and its KL divergence.

        The divergence of the posterior from N(0, 1) is summed over an image's latents, averaged over images.
        masked: ignored, there is no residual.
        """
        grid = [n // self.ratio for n in images.shape[-2:]]
        if not self.training:
            return self.decode(self.encode(images), grid)
        mean, logvar = self.posterior(images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
        return self.decode(mean + (logvar / 2).exp() * torch.randn_like(mean), grid), kl

    def to_checkpoint(self):
        """Return what a checkpoint holds of this model."""
        return {"kind": "vae", "config": self.config, "model": self.state_dict(),
                "fingerprint": files.fingerprint(self.state_dict())}


# -- File -> autoencoder -----------------------------------------------------------------------------------

def load_autoencoder(path, encoder=None, decode_only=False, weights_dir=None):
    """Load an autoencoder in eval mode: ours, demo.pt, the authors' Lightning checkpoint, or a VAE.

    encoder: a frozen Encoder to use; default: the recorded file, looked for at its place and in weights_dir
    (the authors' checkpoint holds its encoder). decode_only: load no encoder at all. A VAE's file is in LDM's
    or diffusers' layout and needs neither.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    if files.is_vae(weights):
        return _vae(weights, path)
    if isinstance(checkpoint.get("state_dict"), dict):
        return _authors_autoencoder(checkpoint["state_dict"], path, encoder, decode_only)
    part = checkpoint.get("autoencoder", checkpoint)
    if isinstance(part, dict) and part.get("kind") == "vae":
        files.check_fields(part, {"config": dict, "model": dict, "fingerprint": str}, path)
        model = files.build(VAE, part["config"], path)
        files.strict_load(model, part["model"], path, "VAE", part["fingerprint"])
        model.fingerprint = part["fingerprint"]
        model.step = part.get("step")
        return model.eval()
    if not isinstance(part, dict) or part.get("kind") != "autoencoder":
        raise UserError(f"{path}: not an autoencoder checkpoint (of train_ae.py, the authors', or a VAE): "
                        f"seems to be {files.describe_weights(checkpoint)}")
    files.check_fields(part, {"config": dict, "model": dict, "fingerprint": str, "encoder_file": dict}, path)
    recorded = part["encoder_file"]
    files.check_fields(recorded, {"file": str, "name": str, "fingerprint": str}, path)
    if encoder is None and not decode_only:
        if isinstance(checkpoint.get("encoder"), dict):
            encoder = encoder_from_weights(checkpoint, path)
        else:
            encoder = load_encoder(files.find_encoder(recorded["file"], path, weights_dir))
    if encoder and encoder.fingerprint != recorded["fingerprint"]:
        raise UserError(f"{path} was trained on other encoder weights than {encoder.file}: {recorded['file']}"
                        f" ({recorded['name']}, fingerprint {recorded['fingerprint'][:12]})")
    model = files.build(Autoencoder, {**part["config"], "encoder": encoder}, path)
    files.strict_load(model, part["model"], path, "autoencoder", part["fingerprint"])
    model.fingerprint = part["fingerprint"]
    model.encoder_file = recorded
    model.step = part.get("step")
    return model.eval()


def _authors_autoencoder(state_dict, path, encoder, decode_only):
    """Load the released layout, which keeps no running alignment statistics and no latent statistics."""
    encoder_weights, weights = files.authors_autoencoder_weights(state_dict, path, decode_only)
    if encoder is None and not decode_only:
        encoder = encoder_from_weights(encoder_weights, path)
    attention = any("up.4.attn." in key for key in weights)
    model = Autoencoder(encoder, 0 if files.is_features_alone(state_dict) else 8, feature_channels=384,
                        decoder={"attention": attention})
    if decode_only and "mask_token" not in weights:
        decoder = {k.removeprefix("decoder."): v for k, v in weights.items()}
        files.strict_load(model.decoder, decoder, path, "the authors' decoder")
    else:
        model.encoder_file = {"file": str(path), "name": "the authors'", "fingerprint": ""}
        own = ("alignment", "alignment_batches", "latent_mean", "latent_std")
        weights |= {k: v for k, v in model.state_dict().items() if k in own}
        files.strict_load(model, weights, path, "the authors' autoencoder")
    model.fingerprint = files.fingerprint(state_dict)
    return model.eval()


def _vae(state_dict, path):
    """Load a VAE of LDM's or diffusers' layout, neither of which holds latent statistics."""
    config, weights = files.vae_weights(state_dict, path)
    model = files.build(VAE, config, path)
    statistics = {k: v for k, v in model.state_dict().items() if k in ("latent_mean", "latent_std")}
    files.strict_load(model, {**weights, **statistics}, path, "a VAE of LDM")
    model.fingerprint = files.fingerprint(weights)
    return model.eval()


# -- Noise -> velocity: the diffusion transformer ----------------------------------------------------------

def sincos_positions(dim, grid):
    """Return the fixed 2-D sine-cosine positions [grid*grid, dim]: half the column, half the row (MAE)."""
    omega = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    row, column = np.mgrid[:grid, :grid].reshape(2, -1, 1) * omega
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1)
    return torch.from_numpy(table).float()


def modulate(x, shift, scale):
    """adaLN: x [B, N, D] scaled and shifted per image [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t [B] in [0, 1], unscaled, -> 256 cosines and sines -> [B, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero and QK-Norm (without it a run diverged near 948K steps)."""

    def __init__(self, dim, heads, qk_norm=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, qk_norm)
        self.mlp = Mlp(dim, 4 * dim, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """adaLN and the linear head."""

    def __init__(self, dim, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


SIT_SIZES = {
    "B": {"depth": 12, "dim": 768, "heads": 12},
    "L": {"depth": 24, "dim": 1024, "heads": 16},
    "XL": {"depth": 28, "dim": 1152, "heads": 16},
}


class SiT(nn.Module):
    """The velocity model: model(x_t [B, N, C], t [B], y [B]) -> velocity [B, N, C].

    y are class numbers; num_classes means "no class". model: "B", "L", "XL" or a dict of depth, dim, heads.
    grid: tokens per side. middle_head: another FinalLayer after a third of the blocks, for internal guidance
    (arXiv 2512.24176). A fresh model answers exactly zero.
    """
    recompute = False

    def __init__(self, model="XL", channels=392, num_classes=1000, grid=16, qk_norm=True, middle_head=False):
        super().__init__()
        size = SIT_SIZES[model] if isinstance(model, str) else dict(model)
        dim = size["dim"]
        self.config = {"model": size, "channels": channels, "num_classes": num_classes, "grid": grid,
                       "qk_norm": qk_norm}
        self.channels = channels
        self.num_classes = num_classes
        self.grid = grid
        self.x_embedder = nn.Linear(channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(num_classes + 1, dim)  # the last row is "no class"
        self.register_buffer("pos_embed", sincos_positions(dim, grid)[None], persistent=False)
        self.blocks = nn.ModuleList(SiTBlock(dim, size["heads"], qk_norm) for _ in range(size["depth"]))
        self.final_layer = FinalLayer(dim, channels)
        self.middle_layer = None
        if middle_head:
            self.config["middle_head"] = True
            self.middle_layer = FinalLayer(dim, channels)
        self.initialize()

    def initialize(self):
        """Initialise as DiT: Xavier for linear layers, zero for every gate and the head (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight, self.y_embedder.weight):
            nn.init.normal_(weight, std=0.02)
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        zeros += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        if self.middle_layer:
            zeros += [self.middle_layer.adaLN_modulation[1], self.middle_layer.linear]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, both=False):
        """Return the velocity [B, N, C]; with both=True also the middle head's: [2, B, N, C]."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, c, recompute=self.recompute)
            if both and i + 1 == max(1, len(self.blocks) // 3):
                middle_velocity = self.middle_layer(x, c)
        velocity = self.final_layer(x, c)
        return torch.stack([velocity, middle_velocity]) if both else velocity


META = {  # what a checkpoint of a transformer records besides its weights; fingerprint: of the EMA
    "autoencoder": dict, "alignment": torch.Tensor, "latent_mean": torch.Tensor, "latent_std": torch.Tensor,
    "classes": list, "step": int, "fingerprint": str}


def load_sit(path, ema=True):
    """Load a transformer in eval mode: ours (EMA weights by default), demo.pt, or the authors' {"ema": ...}.

    `model.meta` holds those of META that the checkpoint has (of the authors' none).
    """
    checkpoint = load_checkpoint(path)
    bundled = isinstance(checkpoint.get("sit"), dict)
    if bundled:
        checkpoint = checkpoint["sit"]
    key = "ema" if ema else "model"
    meta = {}
    positions = None
    if checkpoint.get("kind") == "sit":
        files.check_fields(checkpoint, {"config": dict, key: dict}, path)
        config = checkpoint["config"]
        files.check_fields(config, {"model": dict, "channels": int, "num_classes": int, "grid": int}, path)
        weights = checkpoint[key]
        meta = {k: v for k, v in checkpoint.items() if k in META}
        files.check_fields(meta, {k: META[k] for k in meta}, path)
        if "autoencoder" in meta:
            files.check_fields(meta["autoencoder"], {"path": str, "fingerprint": str}, path)
            if bundled:
                meta["autoencoder"]["path"] = str(path)
    else:
        config, weights, positions = files.authors_sit_weights(checkpoint.get(key, checkpoint), path)
    model = files.build(SiT, config, path)
    files.strict_load(model, weights, path, "SiT", meta.get("fingerprint") if ema else None)
    table = model.pos_embed
    if positions is not None and positions.any() and not (  # zeros only keep the place of the table
            positions.shape == table.shape and torch.allclose(positions.float(), table, atol=1e-3)):
        raise UserError(f"{path}: its pos_embed is not the fixed sine-cosine table of a SiT")
    names = meta.get("classes", [])
    if len(names) not in (0, model.num_classes) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: a damaged checkpoint: its classes are not {model.num_classes} names")
    model.meta = meta
    return model.eval()


def bundle(sit, ae):
    """Return one checkpoint of a transformer and its autoencoder, as demo.pt is, without the frozen encoder.

    load_sit and load_autoencoder read it; to encode, the encoder's file is looked for as that of a run is.
    """
    autoencoder = ae.to_checkpoint()
    trained_on = {"path": "", "fingerprint": autoencoder["fingerprint"]}
    transformer = {"kind": "sit", "config": sit.config, **sit.meta, **ae.statistics(),
                   "ema": sit.state_dict(), "fingerprint": files.fingerprint(sit.state_dict()),
                   "autoencoder": trained_on}
    return {"sit": transformer, "autoencoder": autoencoder}


# -- Flow: the loss and the sampler ------------------------------------------------------------------------

def shift_time(u, shift):
    """t = shift*u / (1 + (shift-1)*u): shift < 1 spends more of [0, 1] near the noise (SD3: 1/alpha)."""
    return shift * u / (1 + (shift - 1) * u)


def auto_shift(grid, channels):
    """Return the shift for latents of grid*grid*channels numbers: 0.20 for 16*16*392 (RAE, arXiv 2510.11690).

    1/alpha of RAE, whose t counts the other way: alpha = sqrt(numbers / 4096).
    """
    return math.sqrt(4096 / (grid ** 2 * channels))


def drop_labels(y, num_classes, rate, uniform):
    """Replace labels y [B] by "no class" where uniform [B] < rate: one model learns both velocities."""
    return torch.where(uniform < rate, num_classes, y)


def flow_error(model, latents, y, shift=0.4, u=None, noise=None, both=False):
    """Return the squared error [B, N, C] of the velocity, for normalised latents [B, N, C].

    x_t = (1-t) noise + t data, target = data - noise, t = shift_time(u), u uniform in [0, 1] (paper, eq. 1-3,
    with t reversed). both: also that of the middle head's velocity, [2, B, N, C].
    """
    u = torch.rand(len(latents), device=latents.device) if u is None else u
    noise = torch.randn_like(latents) if noise is None else noise
    t = shift_time(u, shift)
    x_t = (1 - t.view(-1, 1, 1)) * noise + t.view(-1, 1, 1) * latents
    velocity = model(x_t, t, y, both=True).float() if both else model(x_t, t, y).float()
    return (velocity - (latents - noise)).square()


def flow_loss(model, latents, y, shift=0.4, u=None, noise=None, both=False):
    """Return the mean squared error of the velocity per image, [B] or [2, B]; arguments as flow_error's."""
    return flow_error(model, latents, y, shift, u, noise, both).mean((-2, -1))


def euler_times(steps, shift):
    """Return the steps + 1 times of the sampler, from 0 (noise) to 1 (data)."""
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def is_guided(t, guidance, interval):
    """Whether guidance by class acts at time t, a number."""
    return guidance != 1 and interval[0] <= t <= interval[1]


def guided_velocity(model, x, t, y, guidance=1.0, guidance_interval=(0.0, 1.0), internal_guidance=1.0):
    """Return the guided velocity [B, N, C] of x [B, N, C] at time t, a number, for labels y [B].

    By class: v_u + guidance * (v_c - v_u) on all channels where t lies in guidance_interval, conditional and
    unconditional in one batch of 2B; elsewhere v_c. Internally (arXiv 2512.24176), at every t: each of v_c
    and v_u is first v_m + internal_guidance * (v - v_m), v_m the middle head's velocity in the same pass.
    """
    guided = is_guided(t, guidance, guidance_interval)
    if guided:
        x = torch.cat([x, x])
        y = torch.cat([y, torch.full_like(y, model.num_classes)])
    t_batch = torch.full((len(x),), t, device=x.device)
    if internal_guidance == 1:
        v = model(x, t_batch, y).float()
    else:
        v, v_m = model(x, t_batch, y, both=True).float()
        v = v_m + internal_guidance * (v - v_m)
    if not guided:
        return v
    v_c, v_u = v.chunk(2)
    return v_u + guidance * (v_c - v_u)


@torch.no_grad()
def euler_sample(model, noise, y, steps, guidance=1.0, shift=0.15, zero_init=True,
                 guidance_interval=(0.0, 1.0), internal_guidance=1.0, after=None):
    """Integrate noise [B, N, C] (t = 0) to latents [B, N, C] (t = 1) for labels y [B] in `steps` Euler steps.

    steps: a number, or the times themselves: from data back to noise they invert the flow. guidance: 1 is
    none; it acts where t lies in guidance_interval. zero_init: a first step guided by class is skipped, as if
    its velocity were 0. internal_guidance: see guided_velocity; 1 is none. after: a function (t, x) -> x
    that sees, and may change, the state after each step.
    """
    x = noise.float()
    times = euler_times(steps, shift) if isinstance(steps, int) else steps
    guiding = (guidance, guidance_interval, internal_guidance)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        skipped = zero_init and i == 0 and is_guided(t, guidance, guidance_interval)
        if not skipped:
            x = x + (t_next - t) * guided_velocity(model, x, t, y, *guiding)
        if after:
            x = after(t_next, x)
    return x


@torch.no_grad()
def heun_sample(model, noise, y, steps, guidance=1.0, shift=0.15, zero_init=True,
                guidance_interval=(0.0, 1.0), internal_guidance=1.0):
    """Integrate as euler_sample does, by Heun's method of second order, the trapezoid rule.

    A step is x + dt (v(x, t) + v(x + dt v(x, t), t + dt)) / 2, also the last one, which ends at t = 1.
    zero_init skips the whole first step, as in euler_sample; that leaves an error of first order.
    """
    x = noise.float()
    guiding = (guidance, guidance_interval, internal_guidance)
    for i, (t, t_next) in enumerate(itertools.pairwise(euler_times(steps, shift))):
        if zero_init and i == 0 and is_guided(t, guidance, guidance_interval):
            continue
        v = guided_velocity(model, x, t, y, *guiding)
        v_next = guided_velocity(model, x + (t_next - t) * v, t_next, y, *guiding)
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def sample_noise(seed, indices, shape):
    """Return noise [len(indices), *shape]; image i's part is a function of (seed, i) alone."""
    return torch.from_numpy(np.stack([
        np.random.default_rng((seed, int(i))).standard_normal(shape, np.float32) for i in indices]))
