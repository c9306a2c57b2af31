"""Published weights -> ours: names and shapes of official, Hugging Face's, timm's and torchvision's files.

Each function takes a state dict and raises whatever comes for one of another kind: its callers name the file.
"""
import math
import re

import numpy as np
import torch
import torch.nn.functional as F

from lib import files

WRAPPERS = ("teacher", "ema_model", "state_dict", "model")  # under which trainers nest a state dict


def unwrap(weights, marker):
    """Return the tensors of a network in a checkpoint, by their own names; `weights` if it is not there.

    marker: a pattern that finds the name of one of its tensors. What stands before it, such as "module." or
    "backbone.", is taken off, and what has another beginning is left out.
    """
    for part in (*(weights[name] for name in WRAPPERS if isinstance(weights.get(name), dict)), weights):
        for match in filter(None, (re.search(marker, str(key)) for key in part)):
            prefix = match.string[:match.start()]
            return {key.removeprefix(prefix): value for key, value in part.items() if key.startswith(prefix)}
    return weights


# -- Vision transformers -----------------------------------------------------------------------------------

VIT_MARKER = r"(patch_embed\.proj|embeddings\.patch_embeddings?(\.projection)?)\.weight$"

# Key names of Hugging Face (transformers 4 and 5), timm and torchvision -> DINO's and MAE's official names.
RENAMES = [(re.compile(pattern), name) for pattern, name in [
    (r"^(model\.|encoder\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"^encoder\.layers\.(encoder_layer_)?(\d+)\.", r"blocks.\2."),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?|^conv_proj\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding(s|\.weight)$|^encoder\.pos_embedding$", "pos_embed"),
    (r"^embeddings\.|^model\.(?=norm\.)", ""),
    (r"^(storage_tokens|reg_token)$", "register_tokens"),
    (r"^class_token$", "cls_token"),
    (r"^(post_)?layernorm\.|^encoder\.ln\.", "norm."),
    (r"\.(ln_|layer_norm)(\d)\.", r".norm\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.(attention|self_attn)\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.(attention|self_attn)\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.(attention|self_attn)\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(o_proj|output\.dense)\.|\.self_att(entio)?n\.out_proj\.", ".attn.proj."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.layer_scale(\d)\.lambda1$|\.gamma_(\d)$", r".ls\1\2.gamma"),
    (r"\.mlp\.(gate_proj|fc1_g)\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.mlp\.0\.|\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.mlp\.3\.|\.output\.dense\.", ".mlp.fc2."),
]]

# What pretraining alone used, constants, SigLIP2's pooling head.
UNUSED = re.compile(r"mask_token$|rope_embed\.periods$|decoder_|local_cls_norm\.|attn_pool\.|"
                    r"head\.(probe|attention|layernorm|mlp)\b")


def official_names(weights):
    """Convert any known ViT layout to the official DINO one; unused tensors are dropped."""
    out = {}
    for key, value in weights.items():
        for pattern, name in RENAMES:
            key = pattern.sub(name, key)
        if key == "pos_embed" and value.ndim == 2:
            value = value[None]
        if not UNUSED.match(key):
            out[key] = value
    # Names that mean another layer in a gated MLP.
    gated = any(".mlp.w1." in key for key in out)
    for name, plain, in_gated in (("up_proj", "fc1", "w2"), ("down_proj", "fc2", "w3"), ("fc2", "fc2", "w3")):
        for key in list(out):
            out[key.replace(f".mlp.{name}.", f".mlp.{in_gated if gated else plain}.")] = out.pop(key)
    # DINOv3, which has rotary positions, has no bias of keys, or in timm's files of none of the three.
    biased = any(re.search(r"\.attn\.(q|v|qkv)\.bias$", key) for key in out)
    zeros = "" if "pos_embed" in out else "k" if biased else "qkv"
    for key in list(out):
        if key.endswith(".norm1.weight"):
            _join_qkv(out, key.replace("norm1.weight", "attn."), zeros)
    if "pos_embed" in out and "cls_token" in out:
        count = out["pos_embed"].shape[1]
        if math.isqrt(count) ** 2 == count:  # timm's, which has added the position of CLS to its token
            out["pos_embed"] = F.pad(out["pos_embed"], (0, 0, 1, 0))
    return out


def _join_qkv(weights, prefix, zeros):
    """Join query, key and value of one block, in place; zeros: of which a missing bias is 0."""
    if f"{prefix}q.weight" in weights:
        weights[f"{prefix}qkv.weight"] = torch.cat([weights.pop(f"{prefix}{i}.weight") for i in "qkv"])
    name = f"{prefix}qkv.bias"
    if name not in weights:
        for i in zeros:
            weights.setdefault(f"{prefix}{i}.bias", torch.zeros_like(weights[f"{prefix}proj.bias"]))
        if all(f"{prefix}{i}.bias" in weights for i in "qkv"):
            weights[name] = torch.cat([weights.pop(f"{prefix}{i}.bias") for i in "qkv"])
    if weights.pop(f"{name}_mask", None) is not None:  # DINOv3 multiplies the key third by 0
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat([q, torch.zeros_like(k), v])


def detect_architecture(weights, known):
    """Return the name in `known` ({name: arguments of svg.ViT}) that fits the shapes of official weights."""
    if "patch_embed.proj.weight" not in weights:
        raise ValueError(f"no patch_embed.proj.weight, but {', '.join(map(str, list(weights)[:3]))}")
    dim, _, _, patch = weights["patch_embed.proj.weight"].shape
    seen = {"dim": dim, "patch": patch, "registers": 0, "swiglu": "blocks.0.mlp.w1.weight" in weights,
            "cls": "cls_token" in weights}
    if "register_tokens" in weights:
        seen["registers"] = weights["register_tokens"].shape[1]
    absent = {"registers": 0, "swiglu": False, "cls": True}
    fits = [name for name, config in known.items() if seen.items() <= {**absent, **config}.items()]
    if len(fits) != 1:
        raise ValueError(f"{' and '.join(fits) or 'none'} of ENCODERS in svg.py have {seen}")
    return fits[0]


# -- Autoencoders, and the SVG authors' files --------------------------------------------------------------

def autoencoder_checkpoint(checkpoint):
    """Return a file's contents as demo.pt's: an "autoencoder", and the "encoder" if the file holds it."""
    if "autoencoder" in checkpoint:
        return checkpoint
    if "kind" in checkpoint:  # train_ae.py's
        return {"autoencoder": checkpoint}
    weights = unwrap(checkpoint, r"encoder\.conv_in\.weight$")
    if "encoder.conv_in.weight" in weights:
        return {"autoencoder": vae(weights)}
    return authors_autoencoder(unwrap(checkpoint, r"extra_vit\.conv_proj\.weight$"))


def authors_autoencoder(weights):
    """Convert the authors' autoencoder: encoder.*, extra_vit.* (torchvision's), mask_token, decoder.*."""
    parts = {"encoder": {}, "extra_vit": {}, "decoder": {}}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    own = {"mask_token": weights["mask_token"].flatten(),
           "alignment": torch.zeros(2, 392), "alignment_batches": torch.tensor(0)}  # none
    for key, value in official_names(parts["extra_vit"]).items():
        own[f"residual.{key}".replace("residual.heads.", "residual_head.")] = value
    own |= {f"decoder.{key}": value for key, value in parts["decoder"].items()}
    return {"autoencoder": {"kind": "autoencoder", "config": {"feature_channels": 384}, "model": own},
            "encoder": parts["encoder"]}


def authors_sit(weights):
    """Return svg.SiT's arguments, and its weights, of the authors' file; half of its doubled head counts."""
    weights = unwrap(weights, r"y_embedder\.embedding_table\.weight$")
    weights = {key.replace("ln1.", "x_embedder.", 1).replace("embedding_table.", ""): value
               for key, value in weights.items()}
    grid = 16
    if "pos_embed" in weights:  # the fixed sine-cosine table
        grid = math.isqrt(weights.pop("pos_embed").shape[1])
    dim, channels = weights["x_embedder.weight"].shape
    size = {"depth": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
            "dim": dim, "heads": dim // weights["blocks.0.attn.q_norm.weight"].shape[0]}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[key] = weights[key][:channels]
    num_classes = weights["y_embedder.weight"].shape[0] - 1
    return {"model": size, "channels": channels, "num_classes": num_classes, "grid": grid}, weights


def load_latent_stats(path):
    """Load per-channel mean and std ([C], [C]) of the authors' file, or of an .npz with `mean` and `std`."""
    if str(path).endswith(".npz"):
        stats = files.load_npz(path)
    else:
        stats = files.load_checkpoint(path)
    with files.reading(path, "'mean' and 'std', or the authors' 'dinov3_sp_mean' and 'dinov3_sp_std'"):
        prefix = "" if "mean" in stats else "dinov3_sp_"
        return [torch.as_tensor(np.asarray(stats[prefix + key])).flatten().float() for key in ("mean", "std")]


# -- VAEs of LDM and diffusers -----------------------------------------------------------------------------

# Key names of diffusers' AutoencoderKL, old and new -> LDM's.
VAE_RENAMES = [(re.compile(pattern), name) for pattern, name in [
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.(down|up)_blocks\.", r".\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.(conv|group)_norm", ".norm"),
    (r"\.(to_)?(q|k|v)(uery|ey|alue)?\.", r".\2."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]]
# What training alone used: losses, the averages' own copies, VA-VAE's foundation model and its projection.
VAE_UNUSED = re.compile(r"(loss|model_ema|foundation_model|linear_proj\w*)\.")


def vae(weights):
    """Convert an LDM autoencoder of LDM's or diffusers' layout to a checkpoint of ldm.VAE.

    Its arguments follow from the shapes; what training alone used is dropped.
    """
    out = {}
    levels = len({key.split(".")[2] for key in weights if key.startswith("decoder.up_blocks.")})
    for key, value in weights.items():
        if VAE_UNUSED.match(key):
            continue
        # Diffusers counts the decoder's levels from the lowest resolution, LDM from the highest.
        name = re.sub(r"\.up_blocks\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", key)
        for pattern, ldm_name in VAE_RENAMES:
            name = pattern.sub(ldm_name, name)
        if value.ndim == 2:  # diffusers' attention has linear layers
            value = value[:, :, None, None]
        out[name] = value
    ch = out["encoder.conv_in.weight"].shape[0]
    levels = len({key.split(".")[2] for key in out if key.startswith("decoder.up.")})
    widths = [out[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    config = {"z_channels": out["decoder.conv_in.weight"].shape[1], "ch": ch,
              "ch_mult": [width // ch for width in widths],
              "attention": any(key.startswith(f"encoder.down.{levels - 1}.attn.") for key in out)}
    return {"kind": "vae", "config": config, "model": out}
