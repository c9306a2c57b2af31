"""Published weights -> ours: names and shapes of official, Hugging Face's and torchvision's files.

Each function takes a state dict and raises whatever comes for one of another kind: its callers name the file.
"""
import math
import re

import numpy as np
import torch

from lib import files

# -- Vision transformers -----------------------------------------------------------------------------------

# Key names of Hugging Face (transformers 4 and 5) and torchvision -> DINO's and MAE's official names.
RENAMES = [(re.compile(pattern), name) for pattern, name in [
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
UNUSED = re.compile(r"mask_token$|rope_embed\.periods$|decoder_|text_model\.|logit_(scale|bias)$|"
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
    # Two names that mean another layer in a gated MLP.
    gated = any(".mlp.w1." in key for key in out)
    up, down = ("w2", "w3") if gated else ("fc1", "fc2")
    for key in list(out):
        renamed = key.replace(".mlp.up_proj.", f".mlp.{up}.").replace(".mlp.down_proj.", f".mlp.{down}.")
        out[renamed] = out.pop(key)
    for key in list(out):
        if key.endswith(".attn.q.weight"):
            _join_qkv(out, key.removesuffix("q.weight"))
    for key in list(out):
        if key.endswith(".attn.qkv.bias_mask"):  # DINOv3 multiplies the key third by 0
            out.pop(key)
            q, k, v = out[key.removesuffix("_mask")].chunk(3)
            out[key.removesuffix("_mask")] = torch.cat([q, torch.zeros_like(k), v])
    return out


def _join_qkv(weights, prefix):
    """Join the split query, key and value of one block, in place."""
    weights[f"{prefix}qkv.weight"] = torch.cat([weights.pop(f"{prefix}{i}.weight") for i in "qkv"])
    if f"{prefix}q.bias" in weights:
        # DINOv3 has no key bias.
        weights.setdefault(f"{prefix}k.bias", torch.zeros_like(weights[f"{prefix}q.bias"]))
        weights[f"{prefix}qkv.bias"] = torch.cat([weights.pop(f"{prefix}{i}.bias") for i in "qkv"])


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
    for name, config in known.items():
        if seen.items() <= {**absent, **config}.items():
            return name
    raise ValueError(f"a ViT with {seen} is none of {', '.join(known)}")


# -- Autoencoders, and the SVG authors' files --------------------------------------------------------------

def autoencoder_checkpoint(checkpoint):
    """Return a file's contents as demo.pt's: an "autoencoder", and the "encoder" if the file holds it."""
    if "autoencoder" in checkpoint:
        return checkpoint
    if "kind" in checkpoint:  # train_ae.py's
        return {"autoencoder": checkpoint}
    weights = checkpoint.get("state_dict", checkpoint)
    if "encoder.conv_in.weight" in weights:
        return {"autoencoder": vae(weights)}
    return authors_autoencoder(weights)


def authors_autoencoder(weights):
    """Convert the authors' autoencoder: encoder.*, extra_vit.* (torchvision's), mask_token, decoder.*."""
    parts = {"encoder": {}, "extra_vit": {}, "decoder": {}}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    own = {"mask_token": weights["mask_token"].flatten(),
           "alignment": torch.tensor([0.0, 1.0, 0.0, 1.0]), "alignment_batches": torch.tensor(0)}  # none
    for key, value in official_names(parts["extra_vit"]).items():
        own[f"residual.{key}".replace("residual.heads.", "residual_head.")] = value
    own |= {f"decoder.{key}": value for key, value in parts["decoder"].items()}
    return {"autoencoder": {"kind": "autoencoder", "config": {"feature_channels": 384}, "model": own},
            "encoder": parts["encoder"]}


def authors_sit(weights):
    """Return svg.SiT's arguments, and its weights, of the authors' file; half of its doubled head counts."""
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
