"""The fixed networks that judge pictures: the FID's Inception, and LPIPS.

    Inception: uint8 images -> resized to 299 pixels by ADM's or pytorch-fid's rule -> features, logits
    LPIPS: two batches of images in [-1, 1] -> a perceptual distance per pair
"""
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib import files
from lib.files import UserError

# -- LPIPS (VGG16) -----------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """Perceptual distance of images [B, 3, H, W] in [-1, 1]: one number per image [B].

    Zhang et al. 2018, version 0.1, VGG16. vgg: path of torchvision's vgg16-397923af.pth, or None for random
    weights (for timing); the published linear heads lie in assets/.
    """

    TAPS = (3, 8, 15, 22, 29)  # the layers whose output is compared: relu1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, vgg):
        super().__init__()
        layers = []
        c = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            if width:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if vgg:
            weights = files.load_checkpoint(vgg)
            with files.reading(vgg, "torchvision's VGG16"):
                self.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier.")})
        heads = files.load_npz(Path(__file__).parent.parent / "assets" / "lpips_vgg_heads.npz")
        constants = {f"head{i}": heads[f"lin{i}"] for i in range(5)}
        constants |= {"shift": np.float32([-.030, -.088, -.188]), "scale": np.float32([.458, .448, .450])}
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value).view(1, -1, 1, 1), persistent=False)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def unit_features(self, images):
        """Return the five feature maps, each of unit length over its channels."""
        h = (images - self.shift) / self.scale
        maps = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.TAPS:
                maps.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, target, images):
        if min(images.shape[2:]) < 16:
            raise UserError(f"LPIPS takes images of at least 16x16 pixels, not {tuple(images.shape[2:])}")
        with torch.no_grad():  # only `images` is being learned
            targets = self.unit_features(target)
        distance = 0
        for i, (a, b) in enumerate(zip(targets, self.unit_features(images), strict=True)):
            head = getattr(self, f"head{i}")
            distance = distance + ((a - b).square() * head).sum(1).float().mean((1, 2))
        return distance


# -- Inception: the TensorFlow graph of 2015-12-05 in PyTorch ----------------------------------------------

def conv_bn(cin, cout, kernel, stride=1, same=True):
    """Convolution, batch normalisation, ReLU; padded to keep the size, or not at all (same=False)."""
    if isinstance(kernel, int):
        kernel = (kernel, kernel)
    padding = [k // 2 for k in kernel] if same else 0
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(cout, eps=1e-3),
        relu=nn.ReLU(True)))


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated; each is a chain of convolutions (width, kernel).

    Two kernels stand for convolutions side by side in the chain. A block with a `_pool` branch keeps the
    grid; one without ends its branches with stride 2 and adds the max-pooled input.
    """

    def __init__(self, cin, branches, pool="avg"):
        super().__init__()
        self.pool = pool
        self.reduce = "_pool" not in branches
        self.chains = {branch: [] for branch in branches}
        for branch, chain in branches.items():
            width = cin
            for i, (cout, *kernels) in enumerate(chain, 1):
                end = self.reduce and i == len(chain)
                name = f"branch{branch}_{i}" if len(chain) > 1 else f"branch{branch}"
                parts = [name] if len(kernels) == 1 else [name + "a", name + "b"]
                for part, kernel in zip(parts, kernels, strict=True):
                    self.add_module(part, conv_bn(width, cout, kernel, 2 if end else 1, same=not end))
                self.chains[branch].append(parts)
                width = cout * len(parts)

    def forward(self, x):
        out = []
        for branch, chain in self.chains.items():
            h = x
            if branch == "_pool" and self.pool == "max":
                h = F.max_pool2d(x, 3, 1, 1)
            elif branch == "_pool":
                h = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            for parts in chain:
                h = torch.cat([getattr(self, part)(h) for part in parts], 1)
            out.append(h)
        if self.reduce:
            out.append(F.max_pool2d(x, 3, 2))
        return torch.cat(out, 1)


def mixed_blocks():
    """Return the blocks in order: name, input width, branches, pooling."""
    row = (1, 7)
    column = (7, 1)
    cross = ((1, 3), (3, 1))

    def grid35(pool):
        return {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)],
                "_pool": [(pool, 1)]}

    def grid17(c):
        return {"1x1": [(192, 1)], "7x7": [(c, 1), (c, row), (192, column)],
                "7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)], "_pool": [(192, 1)]}

    grid8 = {"1x1": [(320, 1)], "3x3": [(384, 1), (384, *cross)],
             "3x3dbl": [(448, 1), (384, 3), (384, *cross)], "_pool": [(192, 1)]}
    to17 = {"3x3": [(384, 3)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    to8 = {"3x3": [(192, 1), (320, 3)], "7x7x3": [(192, 1), (192, row), (192, column), (192, 3)]}
    return [("5b", 192, grid35(32)), ("5c", 256, grid35(64)), ("5d", 288, grid35(64)), ("6a", 288, to17),
            ("6b", 768, grid17(128)), ("6c", 768, grid17(160)), ("6d", 768, grid17(160)),
            ("6e", 768, grid17(192)), ("7a", 768, to8), ("7b", 1280, grid8), ("7c", 2048, grid8, "max")]


class Inception(nn.Module):
    """Inception v3 as FID uses it; parameter names are those of pytorch-fid's file.

    It differs from torchvision's: average pools do not count the padding, the last block pools by maximum,
    and there are 1008 classes. fc=False: without the classifier.
    """

    def __init__(self, fc=True):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, same=False)
        for name, *config in mixed_blocks():
            self.add_module(f"Mixed_{name}", Mixed(*config))
        self.fc = nn.Linear(2048, 1008) if fc else None
        self.to(memory_format=torch.channels_last)  # 1.6 times the speed on a CPU

    def forward(self, x):
        """Return pool3 [B, 2048] and spatial features [B, 2023] of normalised images [B, 3, 299, 299].

        Spatial features are 7 channels of the 17x17 grid at mixed_6/conv, as ADM's evaluator takes them for
        sFID. TensorFlow's mixed_6 is Mixed_6d, and its 1x1 convolution gives the first channels of the block.
        """
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            if name != "fc":
                x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order: channels last
        return x.mean((2, 3)), spatial


def load_inception(path):
    """Load the FID Inception of `pt_inception-2015-12-05-6726825d.pth`, in eval mode on the CPU.

    The classifier (fc.weight and fc.bias) may be absent; then there are features, but no logits.
    """
    weights = files.load_checkpoint(path)
    model = Inception(fc="fc.weight" in weights)
    with files.reading(path, "the FID Inception"):
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def tf1_resize_matrix(n, size=299):
    """Return the matrix [size, n] of TensorFlow 1's linear interpolation.

    Source position = target position * n / size, with no half-pixel offset and no antialiasing: the picture
    shifts by a fraction of a pixel, and the published statistics have that shift in them.
    """
    position = np.arange(size, dtype=np.float32) * np.float32(n / size)
    low = position.astype(np.int64)
    matrix = np.zeros((size, n), np.float32)
    np.add.at(matrix, (np.arange(size), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(size), np.minimum(low + 1, n - 1)), position - low)
    return matrix


@torch.inference_mode()
def inception_features(model, images, protocol="adm"):
    """Return the float32 features and logits of uint8 images [B, H, W, 3], as a dict.

    features [B, 2048] (pool3), spatial [B, 2023], and if the weights have `fc`, logits [B, 1008] without its
    bias, which the Inception Score leaves out. protocol: "adm" as ADM's evaluator (TensorFlow 1's resize,
    input (x - 128) / 128) or "pytorch-fid" (half-pixel bilinear, input 2x/255 - 1).
    """
    device = next(model.parameters()).device
    x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()  # [B, 3, H, W]
    if protocol == "adm":
        rows, columns = (torch.from_numpy(tf1_resize_matrix(n)).to(device) for n in x.shape[-2:])
        x = (rows @ x @ columns.T - 128) / 128
    elif protocol == "pytorch-fid":
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 255 - 1
    else:
        raise ValueError(f"protocol '{protocol}' is neither adm nor pytorch-fid")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pool3, spatial = model(x)
    out = {"features": pool3, "spatial": spatial}
    if model.fc is not None:
        out["logits"] = pool3 @ model.fc.weight.T
    return out
