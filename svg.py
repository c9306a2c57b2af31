"""SVG: Latent Diffusion Model without Variational Autoencoder (arXiv 2510.15301), the method in one file.

    image -> frozen DINO tokens + aligned residual tokens = latent -> noise -> velocity -> latent -> image

Read from top to bottom. Images are float RGB [B, 3, H, W] in [-1, 1]; latents are tokens [B, N, C] in
row-major order, N = grid*grid; t runs from 0 (noise) to 1 (data). `train_ae.py`, `train_dit.py`, `sample.py`
and `fid.py` are the programs that use this file.
"""
import argparse
import contextlib
import errno
import gc
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class UserError(Exception):
    """What the user can mend: shown as one line that names the file or flag and the remedy, exit code 2."""


# -- Image -> tokens: one vision transformer for every frozen encoder and for the residual encoder ---------

def rope_angles(periods, h, w):
    """Angles [h*w, 4*len(periods)] of DINOv3's axial rotary position embedding, patch centres in [-1, 1]."""
    y = (torch.arange(h, device=periods.device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=periods.device) + 0.5) / w * 2 - 1
    yx = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)  # [h*w, 2, 1]
    return (2 * math.pi * yx / periods.float()).flatten(1).repeat(1, 2)


def rotate(x, angles):
    """Rotate the last angles.shape[0] tokens of x [B, heads, tokens, head_dim]; the ones before (CLS,
    registers) stay.
    """
    prefix, patches = x[:, :, :-len(angles)], x[:, :, -len(angles):]
    a, b = patches.chunk(2, -1)
    patches = patches * angles.cos() + torch.cat([-b, a], -1) * angles.sin()
    return torch.cat([prefix, patches.to(x.dtype)], 2)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D]; QK-Norm is a LayerNorm over each head's dimension."""

    def __init__(self, dim, heads, qk_norm=False, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, angles=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # [B, heads, N, D/heads]
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Linear-GELU-Linear; dropout after both, as in torchvision's ViT."""

    def __init__(self, dim, hidden, approximate="none", dropout=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.approximate, self.dropout = approximate, nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x), approximate=self.approximate))
        return self.dropout(self.fc2(x))


class SwiGLU(nn.Module):
    """The gated MLP of DINOv3 S+: w3(silu(w1 x) * w2 x)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

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
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, dropout=dropout)
        self.mlp = SwiGLU(dim, 4 * dim) if swiglu else Mlp(dim, 4 * dim, gelu, dropout)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, angles=None):
        x = x + self.dropout(self.ls1(self.attn(self.norm1(x), angles)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A plain vision transformer; parameter names are those of the official DINO files.

    grid=None gives DINOv3's rotary positions, grid=n a learned position embedding for CLS and n*n patches
    that is resized (bicubic) to other grids; `offset` and `antialias` are the two ways DINOv2's releases do
    that. cls=False leaves out the CLS token and its position. imagenet says whether the images it takes are
    normalised by ImageNet's statistics (the caller's work) or stay in [-1, 1]. forward: such images [B, 3,
    h*patch, w*patch] -> tokens after the final norm [B, prefix + h*w, dim]; the prefix is CLS and registers.
    """

    def __init__(self, patch, dim, depth, heads, grid=None, registers=0, swiglu=False, layer_scale=True,
                 eps=1e-6, offset=0.0, antialias=False, dropout=0.0, cls=True, gelu="none", imagenet=True):
        super().__init__()
        self.patch, self.dim, self.grid, self.offset, self.antialias = patch, dim, grid, offset, antialias
        self.cls, self.prefix, self.imagenet = int(cls), int(cls) + registers, imagenet
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
        self.norm = nn.LayerNorm(dim, eps=eps) if depth else nn.Identity()  # depth 0: probe.py's raw patches

    def positions(self, h, w):
        """The learned position embedding on an h x w grid, that of CLS first: [1, cls + h*w, dim]."""
        n = self.grid
        if (h, w) == (n, n):
            return self.pos_embed
        patches = self.pos_embed[:, self.cls:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
        where = {"size": (h, w)}
        if self.offset:  # gives a scale instead of a size, which moves the sampling positions
            where = {"scale_factor": ((h + self.offset) / n, (w + self.offset) / n)}
        patches = F.interpolate(patches, mode="bicubic", antialias=self.antialias, **where)
        return torch.cat([self.pos_embed[:, :self.cls], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        x = self.patch_embed.proj(x)
        B, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # [B, h*w, dim]
        if self.cls:
            x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)
        angles = None
        if self.grid:
            x = x + self.positions(h, w)
        else:
            angles = rope_angles(self.rope_periods, h, w)
        if self.prefix > 1:
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


_DINOV3 = {"patch": 16, "registers": 4, "eps": 1e-5}
_DINOV2 = {"patch": 14, "grid": 37, "offset": 0.1}
_DINOV2_REG = {"patch": 14, "grid": 37, "registers": 4, "antialias": True}
_MAE = {"patch": 16, "grid": 14, "layer_scale": False}
_SIGLIP2 = {"patch": 16, "grid": 16, "layer_scale": False, "cls": False, "gelu": "tanh", "imagenet": False}
_S = {"dim": 384, "depth": 12, "heads": 6}
_B = {"dim": 768, "depth": 12, "heads": 12}
_L = {"dim": 1024, "depth": 24, "heads": 16}
ENCODERS = {  # name: arguments of ViT
    "dinov3_vits16": dict(_DINOV3, **_S),
    "dinov3_vits16plus": dict(_DINOV3, **_S, swiglu=True),
    "dinov3_vitb16": dict(_DINOV3, **_B),
    "dinov3_vitl16": dict(_DINOV3, **_L),
    "dinov2_vits14": dict(_DINOV2, **_S),
    "dinov2_vitb14": dict(_DINOV2, **_B),
    "dinov2_vitl14": dict(_DINOV2, **_L),
    "dinov2_vits14_reg": dict(_DINOV2_REG, **_S),
    "dinov2_vitb14_reg": dict(_DINOV2_REG, **_B),
    "dinov2_vitl14_reg": dict(_DINOV2_REG, **_L),
    "mae_vitb16": dict(_MAE, **_B),
    "siglip2_vitb16_256": dict(_SIGLIP2, **_B),
}


def imagenet_normalize(images):
    """[-1, 1] -> zero mean and unit variance per channel, by the ImageNet statistics that DINO was trained
    with.
    """
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1).to(
        images, non_blocking=True)  # new_tensor would wait for the device
    return ((images + 1) / 2 - mean) / std


class Encoder(nn.Module):
    """A frozen ViT: images [B, 3, H, W] in [-1, 1] -> patch tokens [B, N, D].

    Its weights are buffers outside the state dict, not parameters: no `.train()`, `.requires_grad_()`,
    optimiser or checkpoint of what contains it can reach them. (In train mode DINOv3 would jitter its
    coordinates at random.)
    """

    def __init__(self, vit, name, file):
        super().__init__()
        self.fingerprint = fingerprint(vit.state_dict())
        self.vit, self.name, self.file, self.dim = vit, name, str(file), vit.dim
        for module in vit.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, value in own:
                delattr(module, key)
                module.register_buffer(key, value.detach(), persistent=False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images, grid=None, cls=False):
        """Patch tokens [B, h*w, D], with cls=True also the CLS token: ([B, D], [B, h*w, D]);
        where there is none (SigLIP2) the mean of the patch tokens.

        grid: (h, w) tokens; images are resized to it (bicubic, antialiased) where they do not fit. Default:
        as many as the patches that fit exactly, else one per 16 pixels (256-pixel images become 224 for a
        patch of 14).
        """
        size, patch = images.shape[-2:], self.vit.patch
        h, w = grid or [n // patch if n % patch == 0 else n // 16 for n in size]
        if size != (h * patch, w * patch):
            images = F.interpolate(images.float(), (h * patch, w * patch), mode="bicubic", antialias=True)
        tokens = self.vit(imagenet_normalize(images) if self.vit.imagenet else images).float()
        patches = tokens[:, self.vit.prefix:]
        return (tokens[:, 0] if self.vit.cls else patches.mean(1), patches) if cls else patches


# Names in other layouts -> DINO's and MAE's official names: Hugging Face (transformers 4 and 5), torchvision.
_RENAMES = [(re.compile(a), b) for a, b in [
    (r"^(dinov\d_?\w*\.)?(model\.|encoder\.)?layer\.(\d+)\.", r"blocks.\3."),
    (r"^vision_model\.", ""),
    (r"^encoder\.layers\.(encoder_layer_)?(\d+)\.", r"blocks.\2."),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?|^conv_proj\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding(s|\.weight)$|^encoder\.pos_embedding$", "pos_embed"),
    (r"^embeddings\.|^model\.(?=norm\.)", ""),
    (r"^storage_tokens$", "register_tokens"),
    (r"^class_token$", "cls_token"),
    (r"^(post_)?layernorm\.|^encoder\.ln\.", "norm."),
    (r"\.(ln_|layer_norm)(\d)\.", r".norm\2."),
    (r"\.(attention|self_attn)\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.(attention|self_attn)\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.(attention|self_attn)\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(o_proj|output\.dense)\.|\.self_att(entio)?n\.out_proj\.", ".attn.proj."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
]]

# Not part of the vision tower: what pretraining alone used, constants, SigLIP2's pooling head and text tower.
_UNUSED = re.compile(r"mask_token$|rope_embed\.periods$|decoder_|text_model\.|logit_(scale|bias)$|"
                     r"head\.(probe|attention|layernorm|mlp)\b")


def to_official_names(weights):
    """Any known ViT layout -> the official DINO one that ViT uses; split q, k, v are joined, unused
    tensors dropped.
    """
    out = {}
    for key, value in weights.items():
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        if not _UNUSED.match(key):
            out[key] = value[None] if key == "pos_embed" and value.ndim == 2 else value
    gated = any(".mlp.w1." in k for k in out)
    up, down = ("w2", "w3") if gated else ("fc1", "fc2")
    out = {k.replace(".mlp.up_proj.", f".mlp.{up}.").replace(".mlp.down_proj.", f".mlp.{down}."): v
           for k, v in out.items()}
    for key in [k for k in out if k.endswith(".attn.q.weight")]:
        base = key[:-len("q.weight")]
        if base + "k.weight" in out and base + "v.weight" in out:
            out[base + "qkv.weight"] = torch.cat([out.pop(f"{base}{i}.weight") for i in "qkv"])
            if base + "q.bias" in out and base + "v.bias" in out:  # DINOv3 has no key bias
                out.setdefault(base + "k.bias", torch.zeros_like(out[base + "q.bias"]))
                out[base + "qkv.bias"] = torch.cat([out.pop(f"{base}{i}.bias") for i in "qkv"])
    for key in [k for k in out if k.endswith(".attn.qkv.bias_mask")]:  # DINOv3 multiplies the key third by 0
        out.pop(key)
        q, k, v = out[key[:-len("_mask")]].chunk(3)
        out[key[:-len("_mask")]] = torch.cat([q, torch.zeros_like(k), v])
    return out


def load_encoder(path, name=None):
    """Load a frozen encoder: encoder(images [B, 3, H, W] in [-1, 1]) -> patch tokens [B, N, D].

    path: an official DINOv3, DINOv2 or MAE `.pth`, DINO's or SigLIP2's Hugging Face `.safetensors` (with or
    without its text tower), or a file that holds an encoder of ours (demo.pt). The architecture is told from
    the shapes, or given as a `name` of ENCODERS; every tensor must fit. Raises UserError that names the
    missing, unexpected or misshapen tensors.
    """
    weights = read_safetensors(path) if str(path).endswith(".safetensors") else load_checkpoint(path)
    return encoder_from_weights(weights, path, name)


def encoder_from_weights(weights, path, name=None):
    """load_encoder for weights in memory; `path` is what messages and checkpoints call them."""
    if isinstance(weights.get("encoder"), dict):
        weights = weights["encoder"]
    if "vit" in weights and need(weights, ("name", "vit", "model"), path):  # ours, with its architecture
        name, config, weights = weights["name"], weights["vit"], weights["model"]
    else:
        if isinstance(weights.get("model"), dict):  # MAE
            weights = weights["model"]
        weights = to_official_names(weights)
        if not name:
            name = _detect(weights, path)
        if name not in ENCODERS:
            raise UserError(f"{name}: no such encoder; known: {', '.join(ENCODERS)}")
        config = ENCODERS[name]
    vit = ViT(**config)
    strict_load(vit, weights, path, name)
    return Encoder(vit, name, path)


def _detect(weights, path):
    try:
        dim, _, _, patch = weights["patch_embed.proj.weight"].shape
    except (KeyError, AttributeError, ValueError):
        raise UserError(f"{path}: not an encoder: no patch_embed.proj.weight among its {len(weights)} "
                        f"entries ({', '.join(map(str, list(weights)[:3]))}, ...); give one of "
                        f"{', '.join(ENCODERS)}") from None
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    depth = 1 + max([int(k.split(".")[1]) for k in weights if k.startswith("blocks.")], default=0)
    swiglu = "blocks.0.mlp.w1.weight" in weights
    cls = "cls_token" in weights
    seen = {"dim": dim, "patch": patch, "registers": registers, "swiglu": swiglu, "cls": cls}
    absent = {"registers": 0, "swiglu": False, "cls": True}
    fits = [name for name, c in ENCODERS.items() if seen.items() <= {**absent, **c}.items()]
    if not fits:
        raise UserError(f"{path}: a ViT of width {dim}, patch {patch}, {registers} registers, depth {depth}"
                        f"{', SwiGLU' if swiglu else ''}{'' if cls else ', no CLS token'} is none of "
                        f"{', '.join(ENCODERS)}")
    return fits[0]


def fresh_encoder(file):
    """An encoder of random weights, of the architecture that an official file name begins with (--bench)."""
    file = Path(file).name.replace("mae_pretrain_vit_base", "mae_vitb16")
    fits = [name for name in sorted(ENCODERS, key=len) if file.startswith(name)]
    if not fits:
        raise UserError(f"--encoder {file}: --bench needs a name that begins with one of "
                        f"{', '.join(ENCODERS)}")
    return Encoder(ViT(**ENCODERS[fits[-1]]), fits[-1], file)


# -- Tokens -> latent -> image: residual encoder, alignment, decoder ---------------------------------------

def group_norm(channels):
    """GroupNorm as in the VQGAN decoder."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm-SiLU-conv twice, with a 1x1 shortcut where the width changes."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = group_norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
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
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


def run_block(block, *inputs, recompute=False):
    """block(*inputs); recompute: keep only the inputs and compute the rest again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


class Decoder(nn.Module):
    """The VQGAN/LDM decoder: [B, z, h, w] -> RGB [B, 3, h*2^(levels-1), ...]; attention at the lowest
    resolution.
    """
    recompute = False

    def __init__(self, z_channels, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=3):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2, self.mid.attn_1 = (
            ResnetBlock(c, c), ResnetBlock(c, c), AttnBlock(c))
        self.up = nn.ModuleList()  # level 0 is the full resolution; decoding starts at the last level
        for level in reversed(range(len(widths))):
            up = nn.Module()
            up.block = nn.ModuleList(
                ResnetBlock(widths[level] if i else c, widths[level]) for i in range(blocks))
            c = widths[level]
            lowest = level == len(widths) - 1
            up.attn = nn.ModuleList(AttnBlock(c) for _ in range(blocks if lowest else 0))
            if level > 0:
                up.upsample = nn.Module()
                up.upsample.conv = nn.Conv2d(c, c, 3, padding=1)
            self.up.insert(0, up)
        self.norm_out, self.conv_out = group_norm(c), nn.Conv2d(c, 3, 3, padding=1)

    def features(self, z):
        """All but the last layer, whose own gradient the adaptive GAN weight needs: [B, ch, H, W]."""
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(range(len(self.up))):
            up = self.up[level]
            for i, block in enumerate(up.block):
                h = run_block(block, h, recompute=self.recompute)
                if len(up.attn):
                    h = up.attn[i](h)
            if level > 0:
                h = up.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return F.silu(self.norm_out(h))

    def forward(self, z):
        return self.conv_out(self.features(z))


def channel_statistics(x, synchronise=False):
    """Mean and std of x [B, N, C] per channel over batch and tokens, then averaged over channels: two
    scalars, detached.

    synchronise: over the batches of all ranks (of equal size), as if they were one batch.
    """
    x = x.detach().float().flatten(0, 1)
    n, mean, var = len(x), x.mean(0), x.var(0, correction=0)
    if synchronise and world_size() > 1:
        moments = torch.stack([mean, var + mean.square()]).double() / world_size()
        dist.all_reduce(moments)
        mean, var = moments[0].float(), (moments[1] - moments[0].square()).float()
        n *= world_size()
    return mean.mean(), (var * n / max(n - 1, 1)).sqrt().mean()


class Autoencoder(nn.Module):
    """Frozen encoder + residual encoder -> aligned latent; decoder -> image (paper, section 3.2).

    encoder: a frozen Encoder, or None for decoding only (then give `feature_channels`). image_size: pixels;
    grid: tokens per side, default image_size // 16; their ratio must be a power of two. Any other image size
    whose sides are multiples of that ratio works too. residual: arguments of the residual ViT; decoder:
    arguments of Decoder. align: "none" never aligns the residual (the ablation of table 4).
    """

    def __init__(self, encoder, residual_channels=8, image_size=256, grid=None, mask_ratio=0.1, residual=None,
                 decoder=None, feature_channels=None, align="batch"):
        super().__init__()
        grid = grid or image_size // 16
        self.ratio = image_size // grid
        if grid * self.ratio != image_size or self.ratio & (self.ratio - 1):
            raise UserError(f"--image-size {image_size} over --grid {grid} is not a power of two; "
                            f"256 goes with 16, 64 with 8")
        self.encoder, self.image_size, self.grid, self.mask_ratio = encoder, image_size, grid, mask_ratio
        self.feature_channels = encoder.dim if encoder else feature_channels
        self.channels = self.feature_channels + residual_channels
        residual = {"dim": 384, "depth": 6, "heads": 8, "dropout": 0.1, **(residual or {})}
        levels = int(math.log2(self.ratio)) + 1
        decoder = {"ch": 128, "ch_mult": ((1,) * levels + (1, 2, 2, 4))[-levels:], **(decoder or {})}
        self.config = {"residual_channels": residual_channels, "image_size": image_size, "grid": grid,
                       "mask_ratio": mask_ratio, "residual": residual, "decoder": decoder,
                       "feature_channels": self.feature_channels, "align": align}
        if residual_channels:
            self.residual = ViT(patch=self.ratio, grid=grid, layer_scale=False, **residual)
            dim = residual["dim"]
            self.residual_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(),
                                               nn.Linear(dim, residual_channels))
            self.mask_token = nn.Parameter(torch.randn(residual_channels) * 0.02)
        self.decoder = Decoder(self.channels, **decoder)
        # Running alignment statistics: mean and std of the features, mean and std of the residual.
        self.register_buffer("alignment", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.register_buffer("alignment_batches", torch.tensor(0))
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        self.fingerprint = None  # of the checkpoint it came from
        self._aligned = not residual_channels or align == "none"
        self.to(memory_format=torch.channels_last)

    def encode(self, images, align=None, masked=None):
        """images [B, 3, H, W] -> latents [B, N, C], the encoder's features first, then the aligned residual.

        align: "batch" uses this batch's statistics (over all ranks while training) and so makes a latent
        depend on its neighbours, as the authors' code does in training and inference alike; "running" uses
        those gathered in training; "none" leaves the residual as it is. Default: batch while training,
        running in eval, so that encode(batch)[i] == encode(batch[i:i+1]); none where it was trained so.
        masked: bool [B], whose residual tokens the mask token replaces in training (default: random ones).
        """
        h, w = (n // self.ratio for n in images.shape[-2:])
        features = self.encoder(images, grid=(h, w))
        if not self.config["residual_channels"]:
            return features
        residual = self.residual_head(self.residual(imagenet_normalize(images))[:, 1:]).float()  # [B, N, 8]
        if not align:
            align = "none" if self.config["align"] == "none" else "batch" if self.training else "running"
        if align == "none":
            statistics = None
        elif align == "batch":
            statistics = torch.stack(channel_statistics(features, self.training)
                                     + channel_statistics(residual, self.training))
            if self.training:  # a batch that is not finite is skipped, here as by the optimiser
                finite = torch.where(statistics.isfinite().all(), statistics, self.alignment)
                self.alignment.lerp_(finite, (1 / (self.alignment_batches + 1)).clamp(min=0.01))
                self.alignment_batches += 1
        elif not self.aligned:
            raise UserError("this autoencoder has no running alignment statistics (the authors' checkpoint "
                            "keeps none): use --align batch, or Autoencoder.measure on some images first")
        else:
            statistics = self.alignment
        if self.training:
            # After the statistics, so that training and eval, which masks nothing, share one distribution.
            if masked is None:
                masked = torch.rand(len(images), device=images.device) < self.mask_ratio
            residual = torch.where(masked.view(-1, 1, 1), self.mask_token, residual)
        if statistics is not None:
            mean_f, std_f, mean_r, std_r = statistics
            residual = (residual - mean_r) / (std_r + 1e-6) * std_f + mean_f
        return torch.cat([features, residual], -1)

    def decode(self, latents, grid=None):
        """latents [B, h*w, C] -> images [B, 3, H, W], nominally in [-1, 1]; grid: (h, w), default square."""
        h, w = grid or (math.isqrt(latents.shape[1]),) * 2
        return self.decoder(latents.unflatten(1, (h, w)).permute(0, 3, 1, 2))  # channels-last, without a copy

    def forward(self, images, masked=None):
        """Reconstruction [B, 3, H, W] of images [B, 3, H, W]."""
        return self.decode(self.encode(images, masked=masked), [n // self.ratio for n in images.shape[-2:]])

    def normalize(self, latents):
        """Latents -> zero mean, unit variance per channel: what the transformer sees."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalize(self, latents):
        """The transformer's latents -> what `decode` takes."""
        return latents * self.latent_std + self.latent_mean

    @property
    def aligned(self):
        """Whether running alignment statistics are known, or not needed; asks the device only until then."""
        self._aligned = self._aligned or bool(self.alignment_batches > 0)
        return self._aligned

    @property
    def measured(self):
        """Whether the latent statistics are known (the authors' checkpoint has none)."""
        return bool((self.latent_mean != 0).any())

    def set_latent_stats(self, mean, std):
        """Replace the latents' per-channel mean and std [C], for instance by the authors' published ones."""
        if not mean.shape == std.shape == self.latent_mean.shape:
            raise UserError(f"latent statistics of {len(mean)} channels do not fit latents of "
                            f"{self.channels}")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    @torch.no_grad()
    def measure(self, dataset, count, batch, workers=0):
        """Set the latents' mean and std, in float64, over `count` images spread over the dataset and shared
        by the ranks.

        Where running alignment statistics are missing (the authors' checkpoint), they are gathered first.
        """
        training, device = self.training, self.latent_mean.device
        self.eval()
        indices = np.linspace(0, len(dataset), min(count, len(dataset)), endpoint=False).astype(int)
        indices = indices[rank()::world_size()]
        chunks = [[(i, 0) for i in indices[j:j + batch].tolist()] for j in range(0, len(indices), batch)]
        images = batches_of(dataset, chunks, workers)
        if not self.aligned:
            total = torch.zeros(5, dtype=torch.float64)
            for x, _, _ in images:
                x = to_float(x, device)
                features = self.encoder(x, grid=(self.grid, self.grid))
                residual = self.residual_head(self.residual(imagenet_normalize(x))[:, 1:])
                total += torch.tensor([*channel_statistics(features), *channel_statistics(residual), 1.0])
            total = all_reduce(total)
            self.alignment.copy_(total[:4] / total[4])
            self.alignment_batches.fill_(int(total[4]))
        sums = torch.zeros(2 * self.channels + 1, dtype=torch.float64)
        for x, _, _ in images:
            latents = self.encode(to_float(x, device)).flatten(0, 1).cpu().double()
            sums += torch.cat([latents.sum(0), latents.square().sum(0), torch.tensor([len(latents)])])
        sums = all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).view(2, -1)
        self.set_latent_stats(mean, (square - mean.square()).clamp(min=1e-12).sqrt())
        self.train(training)

    def checkpoint(self):
        """What a checkpoint holds of this model: never the frozen encoder, only its file name and hash."""
        return {"kind": "autoencoder", "config": self.config, "model": self.state_dict(),
                "fingerprint": fingerprint(self.state_dict()),
                "encoder_file": {"file": self.encoder.file, "name": self.encoder.name,
                                 "fingerprint": self.encoder.fingerprint}}


def load_autoencoder(path, encoder=None, weights_dir=None):
    """Load an autoencoder in eval mode: ours, demo.pt, or the authors' Lightning checkpoint.

    encoder: a frozen Encoder to use; None finds the recorded file (the authors' checkpoint holds it itself);
    False loads for decoding only, which needs no encoder file.
    """
    checkpoint = load_checkpoint(path)
    if isinstance(checkpoint.get("state_dict"), dict):
        return _load_authors_autoencoder(checkpoint["state_dict"], path, encoder)
    part = checkpoint.get("autoencoder", checkpoint)
    if not isinstance(part, dict) or part.get("kind") != "autoencoder":
        raise UserError(f"{path}: not an autoencoder checkpoint (of train_ae.py, or the authors')")
    need(part, ("config", "model", "fingerprint", "encoder_file"), path)
    recorded = part["encoder_file"]
    if encoder is None:
        if isinstance(checkpoint.get("encoder"), dict):
            encoder = encoder_from_weights(checkpoint, path)
        else:
            file = Path(recorded["file"])
            places = (file, find_weights(file.name, weights_dir), Path(__file__).parent / file.name)
            found = [p for p in places if p.exists()]
            if not found:
                raise UserError(f"{path} needs its encoder {file.name}: name its folder by --weights, or put "
                                f"it into {find_weights('', weights_dir)}")
            encoder = load_encoder(found[0])
    if encoder and encoder.fingerprint != recorded["fingerprint"]:
        raise UserError(f"{path} was trained on other encoder weights than {encoder.file}: {recorded['file']}"
                        f" ({recorded['name']}, fingerprint {recorded['fingerprint'][:12]})")
    model = Autoencoder(encoder or None, **part["config"])
    strict_load(model, part["model"], path, "autoencoder")
    model.fingerprint = part["fingerprint"]
    return model.eval()


def _load_authors_autoencoder(weights, path, encoder):
    """The published layout: `encoder.*`, `extra_vit.*` (torchvision), `mask_token`, `decoder.*`; losses
    are dropped.
    """
    parts = {}
    for key, value in weights.items():
        head, _, rest = key.partition(".")
        parts.setdefault(head, {})[rest] = value
    for needed in ("encoder", "extra_vit", "decoder"):
        if needed not in parts:
            raise UserError(f"{path}: not the authors' autoencoder: "
                            f"no {needed}.* among its {len(weights)} tensors")
    if encoder is None:
        encoder = encoder_from_weights(parts["encoder"], path)
    residual = {k: v for k, v in parts["extra_vit"].items() if not k.startswith("heads.")}
    out = {f"residual.{k}": v for k, v in to_official_names(residual).items()}
    out |= {f"residual_head.{k[6:]}": v for k, v in parts["extra_vit"].items() if k.startswith("heads.")}
    out |= {f"decoder.{k}": v for k, v in parts["decoder"].items()}
    out["mask_token"] = parts["mask_token"][""].flatten() if "mask_token" in parts else torch.zeros(8)
    model = Autoencoder(encoder or None, feature_channels=384)
    ours = ("alignment", "alignment_batches", "latent_mean", "latent_std")
    strict_load(model, {**{k: v for k, v in model.state_dict().items() if k in ours}, **out}, path,
                "the authors' autoencoder")
    model.fingerprint = fingerprint(model.decoder.state_dict())
    return model.eval()


def load_latent_stats(path):
    """Per-channel mean and std ([C], [C]) from the authors' statistics file or an .npz with `mean` and
    `std`.
    """
    if str(path).endswith(".npz"):
        stats = {k: torch.from_numpy(v) for k, v in load_npz(path).items()}
    else:
        stats = load_checkpoint(path)
    for mean, std in (("mean", "std"), ("dinov3_sp_mean", "dinov3_sp_std")):
        if mean in stats and std in stats:
            return stats[mean].flatten().float(), stats[std].flatten().float()
    raise UserError(f"{path}: no 'mean' and 'std' (or the authors' 'dinov3_sp_mean', 'dinov3_sp_std') in it")


# -- Noise -> velocity: the diffusion transformer ----------------------------------------------------------

def sincos_positions(dim, grid):
    """Fixed 2-D sine-cosine position embedding [grid*grid, dim]: first half the column, second half the
    row (MAE, DiT).
    """
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
    """Transformer block with adaLN-Zero conditioning and QK-Norm (without which a run diverged near 948K
    steps).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, qk_norm=True)
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
    """Velocity model: (x_t [B, N, C], t [B] in [0, 1], y [B] int, num_classes = no class) -> velocity [B, N,
    C].

    model: "B", "L", "XL" or a dict of depth, dim, heads. grid: tokens per side. A fresh model answers exactly
    zero.
    """
    recompute = False

    def __init__(self, model="XL", channels=392, num_classes=1000, grid=16):
        super().__init__()
        size = SIT_SIZES[model] if isinstance(model, str) else dict(model)
        depth, dim, heads = size["depth"], size["dim"], size["heads"]
        self.config = {"model": size, "channels": channels, "num_classes": num_classes, "grid": grid}
        self.channels, self.num_classes, self.grid = channels, num_classes, grid
        self.x_embedder = nn.Linear(channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(num_classes + 1, dim)  # the last row is "no class"
        self.register_buffer("pos_embed", sincos_positions(dim, grid)[None], persistent=False)
        self.blocks = nn.ModuleList(SiTBlock(dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, channels)
        self.initialize()

    def initialize(self):
        """DiT's initialisation: Xavier for linear layers, zero for every gate and for the head
        (adaLN-Zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight, self.y_embedder.weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                     self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = run_block(block, x, c, recompute=self.recompute)
        return self.final_layer(x, c)


def load_sit(path, ema=True):
    """Load a transformer in eval mode: ours (EMA weights by default), demo.pt, or the authors' {"ema": ...}.

    The doubled output head of the authors' file is cut to the half that counts. `model.meta` holds what the
    checkpoint says besides: the autoencoder's fingerprint and path, latent statistics, class names, step
    (empty for the authors').
    """
    checkpoint = load_checkpoint(path)
    checkpoint = checkpoint.get("sit", checkpoint)
    if checkpoint.get("kind") == "sit":
        need(checkpoint, ("config", "ema" if ema else "model"), path)
        config, weights = checkpoint["config"], checkpoint["ema" if ema else "model"]
        told = ("autoencoder", "latent_mean", "latent_std", "classes", "step")
        meta = {k: v for k, v in checkpoint.items() if k in told}
    else:
        weights = checkpoint.get("ema" if ema else "model", checkpoint)
        if not isinstance(weights, dict):
            raise UserError(f"{path}: not a transformer checkpoint (of train_dit.py, or the authors')")
        weights = {k.replace("ln1.", "x_embedder.", 1).replace("embedding_table.", ""): v
                   for k, v in weights.items() if k != "pos_embed"}  # a constant
        try:
            dim, channels = weights["x_embedder.weight"].shape
            depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
            heads = dim // weights["blocks.0.attn.q_norm.weight"].shape[0]
            num_classes = weights["y_embedder.weight"].shape[0] - 1
            for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
                if weights[key].shape[0] == 2 * channels:
                    weights[key] = weights[key][:channels]
        except (KeyError, AttributeError, ValueError):
            raise UserError(f"{path}: not a transformer checkpoint "
                            f"(of train_dit.py, or the authors')") from None
        size = {"depth": depth, "dim": dim, "heads": heads}
        config = {"model": size, "channels": channels, "num_classes": num_classes}
        meta = {}
    model = SiT(**config)
    strict_load(model, weights, path, "SiT")
    model.meta = meta
    return model.eval()


# -- Flow: the loss and the sampler ------------------------------------------------------------------------

def shift_time(u, shift):
    """t = shift*u / (1 + (shift-1)*u): shift < 1 spends more of [0, 1] near the noise (SD3's alpha is
    1/shift).
    """
    return shift * u / (1 + (shift - 1) * u)


def drop_labels(y, num_classes, rate, uniform):
    """Replace labels y [B] by "no class" where uniform [B] < rate, so that one model learns both
    velocities.
    """
    return torch.where(uniform < rate, num_classes, y)


def flow_loss(model, latents, y, shift=0.4, u=None, noise=None):
    """Flow-matching loss of normalised latents [B, N, C] with labels y [B]: mean squared error per image [B].

    x_t = (1-t) noise + t data, target = data - noise, t = shift_time(u), u uniform (paper eq. 1-3, its t
    reversed).
    """
    u = torch.rand(len(latents), device=latents.device) if u is None else u
    noise = torch.randn_like(latents) if noise is None else noise
    t = shift_time(u, shift)
    x_t = (1 - t.view(-1, 1, 1)) * noise + t.view(-1, 1, 1) * latents
    velocity = model(x_t, t, y).float()
    return (velocity - (latents - noise)).square().mean((1, 2))


def euler_times(steps, shift):
    """The `steps` + 1 times of the sampler, from 0 (noise) to 1 (data)."""
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


@torch.no_grad()
def euler_sample(model, noise, y, steps, guidance=1.0, shift=0.15, zero_init=True,
                 guidance_interval=(0.0, 1.0), after=None):
    """Integrate noise [B, N, C] (t = 0) to latents [B, N, C] (t = 1) for labels y [B] in `steps` Euler steps.

    steps: a number, or the times themselves: from data back to noise they invert the flow.
    after: a function (t, x) -> x that sees, and may change, the state that each step arrives at.
    guidance s: v = v_u + s (v_c - v_u) on all channels where t lies in guidance_interval; both in one batch.
    zero_init: where the first step is guided its velocity is replaced by 0; without guidance it is never
    skipped.
    """
    x, null = noise.float(), torch.full_like(y, model.num_classes)
    times = euler_times(steps, shift) if isinstance(steps, int) else steps
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        guided = guidance != 1 and guidance_interval[0] <= t <= guidance_interval[1]
        if guided and zero_init and i == 0:
            v = 0.0
        elif guided:
            t_batch = torch.full((2 * len(x),), t, device=x.device)
            v_c, v_u = model(torch.cat([x, x]), t_batch, torch.cat([y, null])).float().chunk(2)
            v = v_u + guidance * (v_c - v_u)
        else:
            v = model(x, torch.full((len(x),), t, device=x.device), y).float()
        x = x + (t_next - t) * v
        x = after(t_next, x) if after else x
    return x


def sample_noise(seed, indices, shape):
    """Noise [len(indices), *shape] where image i's part is a function of (seed, i) alone: no batch or GPU
    count in it.
    """
    return torch.from_numpy(np.stack([
        np.random.default_rng((seed, int(i))).standard_normal(shape, np.float32) for i in indices]))


# -- Files: weights and checkpoints ------------------------------------------------------------------------

def fingerprint(state_dict):
    """SHA-256 over names, shapes and float32 values: the same weights in any file or precision that holds
    them exactly.
    """
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def brief(error):
    """An exception in a few words, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:90]


def need(checkpoint, keys, path):
    """True if a checkpoint has all of `keys`, else UserError."""
    if missing := [k for k in keys if k not in checkpoint]:
        raise UserError(f"{path}: a damaged checkpoint: no {', '.join(missing)} in it")
    return True


def duration(seconds):
    """Seconds as h:mm:ss, with any number of hours."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def strict_load(module, weights, path, what):
    """Load every tensor or raise UserError that names what is missing, unexpected or of the wrong shape."""
    own = module.state_dict()
    wrong = [f"{k} {list(weights[k].shape)} instead of {list(own[k].shape)}" for k in own
             if k in weights and weights[k].shape != own[k].shape]
    problems = []
    for label, keys in (("missing", [k for k in own if k not in weights]),
                        ("unexpected", [k for k in weights if k not in own]), ("wrong shape", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{label} {', '.join(keys[:3])}{more}")
    if problems:
        raise UserError(f"{path}: not the weights of {what}: {'; '.join(problems)}")
    module.load_state_dict(weights)


def write_atomically(path, write):
    """write(file) to a temporary file beside `path`, fsync, rename. A failure leaves only the old file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint):
    """Write a checkpoint atomically; UserError if the disk is full."""
    try:
        write_atomically(path, lambda f: torch.save(checkpoint, f))
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        raise UserError(f"{path}: not written ({str(e).splitlines()[0]}); the previous one is intact") from e


def load_checkpoint(path):
    """torch.load with weights_only and mmap, on the CPU; UserError for a missing, truncated or foreign
    file.
    """
    if not os.path.exists(path):
        raise UserError(missing_weights(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file fails in any of torch's, zipfile's and pickle's ways
        raise UserError(f"{path}: not a readable checkpoint ({brief(e)}): truncated, or another kind of "
                        f"file? copy or download it again") from e
    kinds = {type(k) for k in checkpoint} if isinstance(checkpoint, dict) else {type(checkpoint)}
    if kinds - {str}:
        raise UserError(f"{path}: holds {min(k.__name__ for k in kinds - {str})}, "
                        f"not a dict of weights by name")
    return checkpoint


def read_safetensors(path):
    """Tensors by name of a .safetensors file: 8 bytes of header length, a JSON header, the raw tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
    if not os.path.exists(path):
        raise UserError(missing_weights(path))
    try:
        data = np.memmap(path, np.uint8, "r")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8:8 + length].tobytes())
        out = {}
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tensor = torch.frombuffer(bytearray(data[start:end]), dtype=dtypes[entry["dtype"]])
                out[key] = tensor.view(entry["shape"])
        return out
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, struct.error) as e:
        raise UserError(f"{path}: not a readable .safetensors file ({brief(e)}): truncated? copy or download "
                        f"it again") from e


def load_npz(path, keys=None):
    """An .npz file's arrays as a dict, all or those of `keys` it has; UserError if missing or damaged."""
    try:
        with np.load(path) as f:
            return {k: f[k] for k in f.files if keys is None or k in keys}
    except Exception as e:  # a damaged file fails in any of NumPy's, zipfile's and zlib's ways
        raise UserError(f"{path}: not a readable .npz file ({brief(e)})") from e


DOWNLOADS = {  # what is openly published: file name -> folder of its URL, head of its SHA-256
    "dinov2_vits14_pretrain.pth": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14", "b938bf1bc15cd2ec"),
    "vgg16-397923af.pth": ("https://download.pytorch.org/models", "397923af"),
    "pt_inception-2015-12-05-6726825d.pth": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights", "6726825d"),
    "VIRTUAL_imagenet256_labeled.npz": (  # ADM's reference statistics; no hash is published
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256", None),
}


def find_weights(name, weights_dir=None):
    """Path of a pretrained file in the weights folder: weights_dir, else $SVG_WEIGHTS, else weights/."""
    return Path(weights_dir or os.environ.get("SVG_WEIGHTS") or "weights") / name


def missing_weights(path):
    """The line that tells where a missing file is to be had."""
    name = os.path.basename(str(path))
    if name.startswith("dinov3"):
        return (f"{path} is missing: Meta gives DINOv3 out after a licence form (https://ai.meta.com/"
                f"resources/models-and-libraries/dinov3-downloads/); put the file there under that name, or "
                f"use the open DINOv2: --encoder dinov2_vits14_pretrain.pth (downloaded on first use)")
    if name == "mae_pretrain_vit_base.pth":
        return f"{path} is missing; download it from https://dl.fbaipublicfiles.com/mae/pretrain/{name}"
    if name in DOWNLOADS:
        return f"{path} is missing; download it from {DOWNLOADS[name][0]}/{name}"
    return f"{path}: no such file"


def fetch_weights(name, weights_dir=None):
    """Path of a pretrained file by its official name, downloaded if it is openly published, with its hash
    checked if that is published too.

    A local file with another hash is only worth a warning: it may be a conversion of the same weights.
    """
    path = Path(name) if os.path.sep in str(name) else find_weights(name, weights_dir)
    url, digest = DOWNLOADS.get(path.name, (None, None))
    if rank() == 0 and digest and path.exists() and not sha256(path).startswith(digest):
        warnings.warn(f"{path} is not the published file of that name (its SHA-256 does not begin {digest})")
    if rank() == 0 and url and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{url}/{path.name}", str(path), digest,
                                           progress=sys.stderr.isatty())
        except Exception as e:  # no network, a proxy's page, a full disk, a wrong hash: one remedy for all
            raise UserError(f"{missing_weights(path)} (tried just now: {brief(e)}) and put it there, or "
                            f"name its folder by --weights or $SVG_WEIGHTS") from e
    barrier()
    return path  # a loader will say it if it is missing


# -- Data: an ImageFolder tree, read in a reproducible endless order ---------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def open_rgb(path):
    """Decode any mode that Pillow opens into an upright 8-bit RGB image; UserError names a file that does
    not decode.
    """
    try:
        with Image.open(path) as f:
            image = ImageOps.exif_transpose(f)
            if image.mode.startswith("I"):  # 16 bits; convert() would clip, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise nearly everything for damaged files
        raise UserError(f"{path}: not a readable image ({brief(e)})") from e


def adm_resize(image, size):
    """Shrink as ADM does: halve with a box filter while the short side is >= 2*size, then bicubic to it."""
    while min(image.size) >= 2 * size:
        image = image.resize([n // 2 for n in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)


def crop(image, size, rng=None):
    """Shrink the ADM way and crop size x size pixels: the centre, or with a generator at random. uint8
    [size, size, 3].
    """
    array = np.asarray(adm_resize(image, size))
    free = np.array(array.shape[:2]) - size
    y, x = free // 2 if rng is None else rng.integers(0, free + 1)
    return array[y:y + size, x:x + size].copy()  # torch warns of views of Pillow's read-only memory


def list_images(folder):
    """Sorted image files below a folder."""
    return sorted(os.path.join(where, f) for where, _, files in os.walk(folder, followlinks=True)
                  for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES)


def walk_tree(root):
    """An ImageFolder tree as arrays: class names, path below the root and label of every image, and each
    folder's time of last change.
    """
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir())
    names, labels, folders = [], [], {".": os.stat(root).st_mtime_ns}
    for label, name in enumerate(classes):
        files = []
        for where, _, inside in os.walk(os.path.join(root, name), followlinks=True):
            folders[os.path.relpath(where, root)] = os.stat(where).st_mtime_ns
            files += [os.path.join(where, f) for f in inside
                      if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
        names += [os.path.relpath(f, root) for f in sorted(files)]
        labels += [label] * (len(names) - len(labels))
    # Bytes, not a list of str: workers share one array, and copies of a list would grow with every epoch.
    return {"classes": np.array(classes, str), "names": np.array([os.fsencode(n) for n in names], bytes),
            "labels": np.array(labels, np.int64),
            "folders": np.array([os.fsencode(f) for f in folders], bytes),
            "times": np.array(list(folders.values()), np.int64)}


def index_tree(root):
    """walk_tree, but from the cache ($XDG_CACHE_HOME/svg) while no folder of the tree has changed: a file
    that was added, removed or renamed changes its folder's time.
    """
    root = os.path.realpath(root)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "svg"
    cache /= hashlib.sha256(os.fsencode(root)).hexdigest()[:32] + ".npz"
    with contextlib.suppress(UserError, KeyError, OSError):
        index = load_npz(cache)
        times = [os.stat(os.path.join(root, os.fsdecode(f))).st_mtime_ns for f in index["folders"]]
        if np.array_equal(times, index["times"]):
            return index
    index = walk_tree(root)
    if index["times"].max() < time.time_ns() - 2e9:  # a younger folder could change again without showing it
        with contextlib.suppress(OSError):  # no home, a full disk: there is just no cache
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda f: np.savez(f, **index))
    return index


class ImageFolder(torch.utils.data.Dataset):
    """A tree root/class/image: item (index, position) -> (uint8 [size, size, 3], label, index of a corrupt
    file or -1).

    Class folders in sorted order are the labels. `position`, the item's place in the endless stream of the
    run, seeds its random crop. A corrupt image is replaced by the next good one and its index returned, for
    the caller to report.
    """

    def __init__(self, root, size, random_crop=False, seed=0):
        if not os.path.isdir(root):
            raise UserError(f"--data {root}: no such folder")
        self.root, self.size, self.random_crop, self.seed = str(root), size, random_crop, seed
        if rank():  # the first process walks the tree, the others read its cache
            barrier()
        index = index_tree(root)
        if not rank():
            barrier()
        self.classes, self.names, self.labels = index["classes"].tolist(), index["names"], index["labels"]
        if not len(self.names):
            flat = any(os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES for f in os.listdir(root))
            raise UserError(f"--data {root}: " + (
                "images, but no class folders; sort them into one folder per class" if flat else
                "no images in class folders (root/class/image.jpg), and not a packed set"))
        self[0, 0]  # so that a folder of corrupt images is refused here, not by a worker's stack trace

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def __getitem__(self, item):
        index, position = item
        rng = np.random.default_rng((self.seed, position)) if self.random_crop else None
        for i in range(index, index + len(self)):
            i %= len(self)
            try:
                image = crop(open_rgb(self.name(i)), self.size, rng)
                return image, int(self.labels[i]), -1 if i == index else index
            except UserError:
                continue
        raise UserError(f"--data {self.root}: no readable image in it")


class Packed(torch.utils.data.Dataset):
    """A folder that `pack` wrote; items as ImageFolder's, with the centre crop in place of random ones.

    size: pixels that it must have been packed at, if that matters.
    """

    def __init__(self, root, size=None):
        self.root = str(root)
        try:
            self.images = np.load(os.path.join(root, "images.npy"), mmap_mode="r")
            self.labels = np.load(os.path.join(root, "labels.npy"))
            self.classes = json.loads(Path(root, "classes.json").read_text())
            fits = self.images.shape == (len(self.labels), *self.images.shape[1:2] * 2, 3)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"--data {root}: not a whole packed set ({brief(e)}); pack it again") from e
        if not fits or self.images.dtype != np.uint8:
            raise UserError(f"--data {root}: images.npy is {self.images.dtype} {list(self.images.shape)} "
                            f"with {len(self.labels)} labels, not uint8 [N, size, size, 3]; pack it again")
        if size and self.images.shape[1] != size:
            raise UserError(f"--data {root}: packed at {self.images.shape[1]} pixels, needed at {size}: "
                            f"pack it again with --size {size}")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):  # for loading processes that are not forked: map the file again, do not send it
        return Packed, (self.root, self.images.shape[1])

    def name(self, index):
        return f"{self.root} image {index}"

    def __getitem__(self, item):
        return np.array(self.images[item[0]]), int(self.labels[item[0]]), -1


def open_data(root, size, random_crop=False, seed=0):
    """The training images in `root`, a tree of class folders or a packed set."""
    if os.path.exists(os.path.join(root, "images.npy")):
        return Packed(root, size)
    return ImageFolder(root, size, random_crop, seed)


def pack(src, dst, size, workers=0):
    """Decode and centre-crop an ImageFolder tree `src` once, to `dst`: images.npy (uint8 [N, size, size, 3]),
    labels.npy, classes.json; returns the number of images and the names of the corrupt ones, left out.

    A stopped run goes on where it was; `dst` appears when it is whole.
    """
    data, dst = ImageFolder(src, size), Path(dst)
    part = dst.with_name(dst.name + ".part")
    state = {"source": hashlib.sha256(b"\n".join([*data.names.tolist(), str(size).encode()])).hexdigest(),
             "read": 0, "corrupt": []}
    if dst.exists():
        raise UserError(f"{dst} is already there: give another name, or remove it")
    part.mkdir(parents=True, exist_ok=True)
    before = read_json(part / "state.json")
    if before.get("source") == state["source"]:
        state = before
    row, head = 3 * size * size, 128  # bytes of an image and of the header
    chunks = [[(i, 0) for i in range(start, min(start + 64, len(data)))]
              for start in range(state["read"], len(data), 64)]
    batches = batches_of(data, chunks, workers)
    start, shown, first = time.time(), 0.0, state["read"]
    with open(part / "images.npy", "r+b" if state["read"] else "wb") as f:
        f.truncate(head + (state["read"] - len(state["corrupt"])) * row)
        f.seek(0, os.SEEK_END)
        for images, _, corrupt in batches:
            f.write(images[corrupt < 0].numpy().tobytes())
            state["corrupt"] += corrupt[corrupt >= 0].tolist()
            state["read"] += len(images)
            if time.time() - shown > 10 or state["read"] == len(data):
                f.flush()
                os.fsync(f.fileno())  # first the images, then the note that they are there
                write_atomically(part / "state.json", lambda f: f.write(json.dumps(state).encode()))
                shown, rate = time.time(), (state["read"] - first) / (time.time() - start)
                print(f"{state['read']}/{len(data)}  {rate:.1f} images/s  "
                      f"{duration((len(data) - state['read']) / rate)} left", flush=True)
        good = np.delete(data.labels, state["corrupt"])
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False,
                                                 "shape": (len(good), size, size, 3)})
        assert f.tell() == head
        os.fsync(f.fileno())
    write_atomically(part / "labels.npy", lambda f: np.save(f, good))
    write_atomically(part / "classes.json", lambda f: f.write(json.dumps(data.classes).encode()))
    (part / "state.json").unlink()
    part.rename(dst)
    return len(good), [data.name(i) for i in state["corrupt"]]


def shield(_):
    """Keep a loading process alive while its run finishes a step and saves: torchrun and clusters send their
    signals to every process. A second SIGTERM, as from the run itself, ends it.
    """
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def batches_of(dataset, items, workers, pin=False):
    """A DataLoader of the batches whose items the lists in `items` name."""
    return torch.utils.data.DataLoader(dataset, batch_sampler=items, num_workers=workers, pin_memory=pin,
                                       prefetch_factor=4 if workers else None, worker_init_fn=shield)


class Stream:
    """Batches of (index, position) without end: each epoch is a fresh permutation of the dataset, one
    epoch after the other with nothing dropped, a function of (seed, position) alone; this rank's share
    of each global batch.
    """

    def __init__(self, length, batch, seed, start):
        self.length, self.batch, self.seed, self.start = length, batch, seed, start

    def __iter__(self):
        epoch, order, local = -1, None, self.batch // world_size()
        for step in range(self.start, sys.maxsize):
            positions = step * self.batch + rank() * local + np.arange(local)
            items = []
            for p in positions.tolist():
                if p // self.length != epoch:
                    epoch = p // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                items.append((int(order[p % self.length]), p))
            yield items


def identity(dataset):
    """What must not change about a dataset when a run goes on: a hash of labels and classes, how it crops."""
    labels = np.asarray(dataset.labels, np.int64).tobytes()
    return {"images": len(dataset),
            "labels": hashlib.sha256(labels + json.dumps(dataset.classes).encode()).hexdigest(),
            "crops": "random" if getattr(dataset, "random_crop", False) else "centre"}


def loader(dataset, batch, seed, start, workers, device):
    """This rank's batches of the endless stream from global batch `start` on: uint8 [b, H, W, 3], labels,
    corrupt.
    """
    return iter(batches_of(dataset, Stream(len(dataset), batch, seed, start), workers, device.type == "cuda"))


def to_float(images, device):
    """uint8 [B, H, W, 3] on the host -> float [B, 3, H, W] in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded, in NumPy."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# -- Processes, devices, command lines ---------------------------------------------------------------------

def rank():
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x):
    """Sum of a CPU tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def barrier():
    """Wait for every process."""
    all_reduce(torch.zeros(1))


def join(backend):
    """Join torchrun's process group, also when torchrun has restarted this process.

    torchrun keeps one store through all restarts, in which a new process would find the addresses of dead
    ones (https://github.com/pytorch/pytorch/issues/135712), so every restart gets keys of its own, by its
    number. Several nodes may count differently: they need torchrun's way to give each restart a new store.
    """
    env, store = os.environ, None
    if env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"] \
            and env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise UserError("--max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for "
                        "torchrun, or its restarts fail (https://github.com/pytorch/pytorch/issues/135712)")
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart {restart}", store)
    where = {"store": store, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])} if store else {}
    dist.init_process_group(backend, timeout=timedelta(hours=1), **where)


def setup(precision="fp32"):
    """Join torchrun's process group, if there is one, and return this process's device: CUDA, MPS or CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    tf32 = precision == "tf32"  # cuDNN would take it unasked
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo for what lies on the host
    if cuda:
        return torch.device("cuda", local)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device, precision):
    """The context in which models run: bf16 autocast, or nothing for fp32 and tf32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def data_parallel(model):
    """DistributedDataParallel that leaves buffers alone: every rank computes the same ones, and a frozen
    encoder is all buffers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch renames the flag and gives it another meaning
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(*models):
    """torch.compile every transformer block: one graph for all equal blocks, and DDP can send the gradients
    of the last ones while the first are being computed.
    """
    torch._dynamo.config.recompile_limit = 64  # a ViT and the other, training and eval, last batches
    torch._dynamo.config.optimize_ddp = False  # blocks are smaller than its buckets already
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)


def seed_step(seed, step, rank=0):
    """Make every random number of a step a function of (seed, step, rank), so that a resumed run repeats
    it exactly.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default, but not None and False, and leaves the docstring's lines as they are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; --demo swaps in the demo's defaults."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        self.demo = {}

    def error(self, message):
        raise UserError(f"{message} (see {os.path.basename(self.prog)} --help)")

    def parse_args(self, args=None):
        if "--demo" in (sys.argv[1:] if args is None else args):
            self.set_defaults(**self.demo)
        return super().parse_args(args)


def add_training_flags(parser, batch, lr, steps):
    """The flags that both stages share."""
    add = parser.add_argument
    add("--demo", action="store_true", help="built-in data, tiny sizes, no download")
    add("--data", default="data/imagenet/train", help="folder of class folders of images")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--name", help="folder of the run below runs/ (default: the stage)")
    add("--batch", type=positive, default=batch, help="images per step, over all processes")
    add("--lr", type=number(above=0), default=lr, help="learning rate, constant")
    add("--steps", type=positive, default=steps, help="training steps in all")
    add("--seed", type=not_negative, default=0, help="of weights, order, crops and noise")
    add_speed_flags(parser)
    add("--accumulate", type=positive, default=1,
        help="parts in which a process computes its batch, for less memory")
    add("--recompute", action="store_true",
        help="recompute activations in the backward pass: less memory, slower")
    add("--clip", type=number(), default=0.0, help="largest gradient norm; 0: no clipping")
    add("--workers", type=not_negative, default=8, help="data loading processes per training process")
    add("--log-every", type=positive, default=100, help="steps between progress lines")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--preview-every", type=positive, default=5000, help="steps between preview grids")
    add("--keep", type=positive, default=2, help="how many of the newest numbered checkpoints stay")
    add("--milestone-every", type=positive, default=50_000,
        help="steps between checkpoints that stay for good")


def add_speed_flags(parser):
    """The flags that training, sampling and scoring share."""
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--precision", choices=("fp32", "tf32", "bf16"), default="bf16" if cuda else "fp32",
        help="of the models' arithmetic; weights, losses, statistics and the sampler's state are fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="use torch.compile")
    add_bench_flag(parser)


def refuse_idle(idle, needs=None):
    """UserError for a given flag that does nothing: beside another (idle: {"--flag": "--none --of --these"})
    or without others (needs: {"--flag": "--one --of --these"}).
    """
    given = {a.split("=")[0] for a in sys.argv[1:]}
    for flag in sorted(given):
        others = given.intersection(idle.get(flag, "").split())
        if others:
            raise UserError(f"{min(others)} does nothing with {flag}: leave one of them out")
        if flag in (needs or {}) and not given.intersection(needs[flag].split()):
            raise UserError(f"{flag} does nothing without {needs[flag].replace(' ', ' or ')}")


def add_bench_flag(parser):
    """--bench N, on every script that is in a hurry."""
    parser.add_argument("--bench", type=positive, metavar="N",
                        help="time N steps on synthetic data; no data, weights or run needed")


def local_batch(args):
    """This process's share of the images of a step; UserError where they do not divide."""
    if args.batch % (world_size() * args.accumulate):
        raise UserError(f"--batch {args.batch} does not divide by the {world_size()} processes"
                        + f" times --accumulate {args.accumulate}" * (args.accumulate > 1))
    return args.batch // world_size()


def micro_batches(count, models, *tensors):
    """`count` equal parts of the tensors; DDP exchanges gradients only in the last one's backward pass."""
    parts = list(zip(*(t.chunk(count) for t in tensors), strict=True))
    for i, part in enumerate(parts):
        with contextlib.ExitStack() as stack:
            for model in models:
                if i + 1 < len(parts) and hasattr(model, "no_sync"):
                    stack.enter_context(model.no_sync())
            yield part


def optimizer_step(*optimizers, clip=0.0):
    """Clip each optimiser's gradients and step; leave everything as it is where any is not finite. Returns
    the first one's gradient norm and whether the step was skipped, on the device: nothing waits for it.
    """
    norms = []
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norms[-1])
    skipped = ~torch.stack(norms).isfinite().all()
    for optimizer in optimizers:
        if optimizer.defaults["fused"]:
            optimizer.found_inf = skipped.float()  # what fused optimisers take from a GradScaler
            optimizer.step()
        elif not skipped:
            optimizer.step()
    return norms[0], skipped


# Dense bf16 TFLOP/s by the maker's datasheets of the SXM boards; half of it for tf32.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H200": 989, "A100-SXM": 312}


def synthetic_images(n, size, device):
    """Random uint8 images [n, size, size, 3] for --bench, in the memory that a loader's are in."""
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8)
    return images.pin_memory() if device.type == "cuda" else images


def bench(args, device, make, batch, **about):
    """Time args.bench steps on synthetic data after a warm-up: a line to read, and one of JSON.

    make(n) -> a function that runs one step on n images; batch: images per step over all processes. FLOPs are
    those that PyTorch counts as executed for one image, times the batch.
    """
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as count:
        make(1)()
    share = batch // world_size()
    step, marks, cuda = make(share), [], device.type == "cuda"
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for i in range(args.bench + 1):
        if i:
            step()
        if cuda:  # the host runs ahead; what counts is when the device was done
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
    if cuda:
        torch.cuda.synchronize()
        seconds = float(np.median([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]))
        memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        seconds = float(np.median(np.diff(marks)))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
        name = f"{device.type}, {torch.get_num_threads()} threads"
    tflops = count.get_total_flops() * share / seconds / 1e12
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    of_peak = (tflops / peak / {"bf16": 1, "tf32": 0.5}[args.precision]
               if peak and args.precision != "fp32" else None)
    result = {**about, "batch": batch, "precision": args.precision, "compile": args.compile,
              "processes": world_size(), "device": name, "torch": torch.__version__, "steps": args.bench,
              "step_seconds": round(seconds, 5), "images_per_second": round(batch / seconds, 2),
              "tflops": round(tflops, 3), "peak_share": of_peak and round(of_peak, 3),
              "peak_gib": round(memory / 2**30, 2)}
    if rank() == 0:
        print(f"{' '.join(map(str, about.values()))}: {1000 * seconds:.1f} ms a step of {batch} images "
              f"(median of {args.bench}), {batch / seconds:.3g} images/s, {tflops:.2f} TFLOP/s a process, "
              f"all its models included"
              + (f" ({of_peak:.0%} of {name}'s peak)" if of_peak else "") + f", {memory / 2**30:.2f} GiB")
        print(json.dumps(result))


def number(low=0.0, high=math.inf, above=-math.inf):
    """An argparse type: a finite number from low to high, and above `above`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above and math.isfinite(value)):
            limits = f"above {above:g}" if math.isfinite(above) else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {limits}")
        return value
    return parse


def not_negative(text):
    """argparse type: an integer of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text):
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def run_main(main):
    """Run a script's main; a UserError becomes one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
        if dist.is_initialized():
            gc.collect()  # the process group's last holders, or gloo's threads would outlive the interpreter
            dist.destroy_process_group()  # not after an error: it could wait for ranks that wait for this one
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {e.filename or 'a file'}: {e.strerror}; make room, or give another place",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# -- Runs: runs/<name>/ with config.json, log.jsonl, last.pt, numbered checkpoints, previews, loss curve ---

# What may change when a run goes on: its length, its output, its speed, and where files lie that fingerprints
# vouch for.
FREE_FLAGS = {"steps", "workers", "log_every", "save_every", "preview_every", "keep", "milestone_every",
              "name", "weights", "data", "ae", "encoder", "compile", "recompute"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what clusters, people and SLURM send
STREAK = 20  # steps in a row without a finite gradient after which training gives up


def read_json(path):
    """A JSON object of ours; {} where there is none or something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_log(path):
    """The entries of a log.jsonl, without a last line that a full disk or a kill has cut."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


class Run:
    """One training run's folder. Only rank 0 writes; every rank reads the same `last.pt` when it resumes."""

    def __init__(self, stage, args, extra):
        self.path = Path("runs") / (args.name or (f"demo-{stage}" if args.demo else stage))
        self.stage, self.args, self.extra, self.bad, self.signal = stage, args, extra, set(), 0
        config = {"stage": stage, **vars(args), **extra}
        old = self.path / "config.json"
        self.last = self.path / "last.pt"
        if old.exists() and self.last.exists():
            before = read_json(old)
            differ = [f"{'--' * (k not in extra)}{k.replace('_', '-')} {config[k]} (was {before.get(k)})"
                      for k in config if k not in FREE_FLAGS and config[k] != before.get(k)]
            if differ:
                raise UserError(f"{self.path} holds a different run: {'; '.join(differ)}; give the same "
                                f"flags to go on with it, or another --name")
        elif self.path.exists() and any(self.path.iterdir()) and not (old.exists() or self.last.exists()):
            raise UserError(f"{self.path} is not empty and holds no run; give another --name")
        barrier()
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".*.tmp"):  # of a process that was killed while it saved
                left.unlink()
            write_atomically(old, lambda f: f.write(json.dumps(config, indent=1, default=str).encode()))

    def resume(self):
        """The last checkpoint, or None; log entries after it are dropped: the log has each step once.

        From here on STOP_SIGNALS end the run after a step and a save.
        """
        checkpoint = load_checkpoint(self.last) if self.last.exists() else None
        if checkpoint:
            kind, parent = {"ae": ("autoencoder", "encoder_file"), "dit": ("sit", "autoencoder")}[self.stage]
            need(checkpoint, ("kind", "step", "model", "opt"), self.last)
            trained_on = checkpoint.get(parent, {}).get("fingerprint")
            if checkpoint["kind"] != kind or trained_on != self.extra["trained_on"]:
                raise UserError(f"{self.last} is not of this stage, or was trained on another "
                                f"{parent.split('_')[0]}")
        step = checkpoint["step"] if checkpoint else 0
        if all_reduce(torch.tensor([step, step ** 2])).tolist() != [
                world_size() * step, world_size() * step ** 2]:
            raise UserError(f"{self.last} is not the same for every process: runs/ must lie on a shared disk")
        log = self.path / "log.jsonl"
        if rank() == 0 and log.exists():
            kept = [json.dumps(entry) + "\n" for entry in read_log(log) if entry["step"] <= step]
            write_atomically(log, lambda f: f.write("".join(kept).encode()))
        barrier()
        if checkpoint:
            self.say(f"going on with {self.path} at step {step}")
        for number in STOP_SIGNALS:
            signal.signal(number, self.on_signal)
        self.start = self.since = time.time()
        self.sums, self.count, self.streak = 0, 0, 0
        return checkpoint

    def on_signal(self, number, _):
        self.signal = number

    def stopped(self):
        """Whether any process was sent one of STOP_SIGNALS; every process gets the same answer."""
        return bool(all_reduce(torch.tensor(self.signal)))

    def say(self, text):
        if rank() == 0:
            print(text, flush=True)

    def report_corrupt(self, dataset, indices):
        """One warning per corrupt file, on the rank that met it."""
        for i in set(indices.tolist()) - self.bad - {-1}:
            self.bad.add(i)
            warnings.warn(f"{dataset.name(i)}: not a readable image, skipped ({len(self.bad)} so far)")

    def record(self, step, values, grad_norm, skipped):
        """Add a step's values (scalars on the device, which is not waited for); every --log-every steps a
        progress line and a line of log.jsonl with their means over the steps that were not skipped.

        Raises UserError when STREAK steps in a row had no finite gradient.
        """
        new = torch.stack([*values.values(), grad_norm]).detach()
        self.sums = self.sums + torch.cat([torch.where(skipped, 0, new), skipped[None].float()])
        self.streak, self.count = (self.streak + 1) * skipped, self.count + 1
        if step % self.args.log_every and step != self.args.steps:
            return
        *means, skipped = (all_reduce(self.sums.cpu()) / world_size()).tolist()
        corrupt = int(all_reduce(torch.tensor(len(self.bad))))
        seconds, count = time.time() - self.since, self.count - round(skipped)
        entry = {k: v / count if count else math.nan
                 for k, v in zip([*values, "grad_norm"], means, strict=True)}
        rate = self.count * self.args.batch / seconds
        if rank() == 0:
            text = "  ".join(f"{k} {v:.4g}" for k, v in entry.items())
            print(f"step {step}/{self.args.steps}  {text}  " + f"{round(skipped)} skipped  " * bool(skipped)
                  + f"{rate:.1f} images/s  "
                    f"{duration((self.args.steps - step) * self.args.batch / rate)} left", flush=True)
            entry = {"step": step, **{k: v for k, v in entry.items() if math.isfinite(v)},
                     "skipped": round(skipped), "images_per_second": round(rate, 2),
                     "seconds": round(time.time() - self.start, 1), "corrupt": corrupt}
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")
        if self.streak >= STREAK:
            good = (f"the last good checkpoint is {self.last}" if self.last.exists()
                    else "no checkpoint was saved yet")
            raise UserError(f"no finite gradient for {int(self.streak)} steps, up to step {step}: stopped; "
                            f"{good}; to go on with other flags (--clip 1, a lower --lr, --precision fp32) "
                            f"copy it into a new run: runs/NAME/last.pt, --name NAME")
        self.sums, self.count, self.since = 0, 0, time.time()

    def picture(self, step, image):
        """Write a preview grid."""
        if rank() == 0:
            image.save(self.path / f"preview-{step:07d}.png")

    def save(self, checkpoint):
        """Write last.pt, a numbered hard link to it and the loss curve, by rank 0; drop old numbered ones."""
        if rank() == 0:
            save_checkpoint(self.last, checkpoint)
            numbered = self.path / f"{checkpoint['step']:07d}.pt"
            numbered.unlink(missing_ok=True)
            try:
                os.link(self.last, numbered)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.last, numbered)
            old = [p for p in sorted(self.path.glob("[0-9]*.pt")) if int(p.stem) % self.args.milestone_every]
            for path in old[:-self.args.keep]:
                path.unlink()
            plot_log(self.path / "log.jsonl", self.path / "loss.png", f"{self.path}: loss by step")
        barrier()

    def end(self, step):
        """Say how it ended, and how to go on."""
        name = signal.Signals(self.signal).name if self.signal else "a signal to another process"
        self.say(f"done: {self.last}" if step >= self.args.steps
                 else f"{name}: stopped after step {step}; the same command "
                 + (f"goes on from {self.last}" if self.last.exists() else "starts again"))


def latest_run(stage, demo=None):
    """The newest `last.pt` of a stage below runs/, or None; demo: only demo runs (True) or only others
    (False).
    """
    found = []
    for config in Path("runs").glob("*/config.json"):
        settings, last = read_json(config), config.parent / "last.pt"
        if settings.get("stage") == stage and demo in (None, settings["demo"]) and last.exists():
            found.append(last)
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


# -- Pictures ----------------------------------------------------------------------------------------------

def grid_image(images, columns, labels=None, title="", tile=None):
    """A PNG-ready grid of uint8 images [n, H, W, 3], enlarged to `tile` pixels, with a label above each
    and a title.
    """
    tile = tile or max(96, images.shape[1])
    rows, gap, text, head = -(-len(images) // columns), 4, 16 if labels else 0, 24 if title else 0
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, head + rows * (tile + gap + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 4), title, fill="black", font=ImageFont.load_default(14))
    for i, array in enumerate(images):
        x, y = gap + i % columns * (tile + gap), head + gap + i // columns * (tile + gap + text)
        if labels:
            draw.text((x, y), str(labels[i])[:tile // 6], fill="black", font=font)
        sheet.paste(Image.fromarray(array).resize((tile, tile), Image.Resampling.NEAREST), (x, y + text))
    return sheet


def plot_log(log, path, title, size=(720, 400)):
    """Draw every *loss of log.jsonl against the step, on one labelled scale: a PNG at `path`."""
    rows = read_log(log)
    names = [k for k in (rows[-1] if rows else {}) if k.endswith("loss")]
    if len(rows) < 2:
        return
    width, height = size
    left, right, top, bottom = 60, 16, 44, 36
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((left, 6), title, fill="black", font=ImageFont.load_default(14))
    values = [r[n] for n in names for r in rows if math.isfinite(r.get(n, math.nan))] or [0.0]
    low, high = min(values), max(values)
    steps = [r["step"] for r in rows]

    def place(step, value):
        return (left + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (width - left - right),
                top + (high - value) / max(high - low, 1e-12) * (height - top - bottom))

    for i in range(5):
        value, step = low + (high - low) * i / 4, steps[0] + (steps[-1] - steps[0]) * i / 4
        y, x = place(step, value)[1], place(step, value)[0]
        draw.line([(left, y), (width - right, y)], fill="#dddddd")
        draw.text((4, y - 7), f"{value:.3g}", fill="black", font=font)
        draw.text((x - 12, height - bottom + 6), f"{step:.0f}", fill="black", font=font)
    for n, colour in zip(names, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")):
        points = [place(r["step"], r[n]) for r in rows if math.isfinite(r.get(n, math.nan))]
        draw.line(points, fill=colour, width=2)
        draw.text((left + 140 * names.index(n), 24), n, fill=colour, font=font)
    draw.text((width - 40, height - 18), "step", fill="black", font=font)
    sheet.save(path)


# -- python svg.py pack ------------------------------------------------------------------------------------

def main():
    """The `pack` command."""
    p = Parser("Decode a tree of class folders once: python svg.py pack imagenet/train imagenet/train-256")
    p.add_argument("command", choices=["pack"])
    p.add_argument("src", help="folder of class folders of images")
    p.add_argument("dst", help="folder to write, for --data: images.npy, labels.npy, classes.json")
    p.add_argument("--size", type=positive, default=256, help="pixels per side, cropped the ADM way")
    p.add_argument("--workers", type=not_negative, default=os.cpu_count(), help="decoding processes")
    args = p.parse_args()
    count, corrupt = pack(args.src, args.dst, args.size, args.workers)
    for name in corrupt:
        warnings.warn(f"{name}: not a readable image, left out")
    print(f"{count} images in {args.dst}, {len(corrupt)} corrupt ones left out")


if __name__ == "__main__":
    run_main(main)
