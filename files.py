"""Files: atomic writes, checkpoints, other file formats, the layouts of published weights, downloads.

A file is written whole or not at all. A file that cannot be used ends in a UserError that names it and says
what to do.
"""
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import struct
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class UserError(Exception):
    """An error that the user can fix: programs show it as one line and exit with code 2."""


def short_error(error):
    """The first 90 characters of an exception, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:90]


# -- Writing -----------------------------------------------------------------------------------------------

def write_atomically(path, write, sync=True):
    """Call write(file) on a temporary file beside `path` and rename it to `path`.

    sync: first wait for the disk, so that even a power cut leaves the old file or the new one. Raises
    UserError if that fails; a file that was there before is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None)
        if reason is None:  # torch.save, of whose errors none names the cause
            reason = f"no space left on the disk, or a limit on file sizes: {str(e).splitlines()[0]}"
        raise UserError(f"{path}: not written ({reason}): make room, or give another place; a previous file "
                        f"of that name is intact") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON, atomically; what JSON does not know becomes text."""
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path, checkpoint):
    """Write a checkpoint atomically, by torch.save or, under a name in .safetensors, in that format."""
    save = write_safetensors if str(path).endswith(".safetensors") else torch.save
    write_atomically(path, lambda file: save(checkpoint, file))


def write_safetensors(checkpoint, file):
    """Write nested dicts of tensors and JSON values: tensors under their paths, the rest in the metadata."""
    tensors = {}

    def without_tensors(value, path):
        if isinstance(value, dict):
            parts = {key: without_tensors(part, (*path, key)) for key, part in value.items()}
            return {key: part for key, part in parts.items() if part is not tensors}
        if isinstance(value, torch.Tensor):
            tensors["/".join(path)] = value.detach().cpu().contiguous()
            return tensors  # a mark
        return value

    header = {"__metadata__": {"svg": json.dumps(without_tensors(checkpoint, ()))}}
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    start = 0
    for path, tensor in tensors.items():
        end = start + tensor.nbytes
        header[path] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def save_image(path, image):
    """Write a Pillow image, or uint8 [H, W, 3], as PNG: whole or not at all, its folder too if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    # Level 1: half the time of the default, files a tenth larger.
    write_atomically(path, lambda file: image.save(file, "PNG", compress_level=1), sync=False)


@contextlib.contextmanager
def image_threads():
    """Yield a save_image that returns at once; the block's end waits for the files and raises their errors.

    Pillow compresses outside of Python's lock, so as many files are made at a time as there are cores.
    """
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()

        def save(path, image):
            pending.append(pool.submit(save_image, path, image))
            while len(pending) > 8 * threads:  # no more in memory
                pending.popleft().result()

        try:
            yield save
            for file in pending:
                file.result()
        finally:
            pool.shutdown(cancel_futures=True)


# -- Reading -----------------------------------------------------------------------------------------------

def load_checkpoint(path):
    """Load a dict by torch.load with weights_only and mmap, on the CPU, or from a .safetensors file.

    Raises UserError for a file that is missing, truncated, of another kind, or no dict with text as keys.
    """
    if not os.path.exists(path):
        raise UserError(missing_weights(path))
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file fails in any of torch's, zipfile's and pickle's ways
        raise UserError(f"{path}: not a readable checkpoint ({short_error(e)}): truncated, or another kind "
                        f"of file? copy or download it again") from e
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        found = checkpoint if not isinstance(checkpoint, dict) else min(checkpoint, key=str)
        raise UserError(f"{path}: holds {type(found).__name__}, not a dict of weights by name")
    return checkpoint


SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def read_safetensors(path):
    """Read a .safetensors file: 8 bytes of header length, a JSON header, the raw tensors.

    Returns its tensors by name, or what write_safetensors was given.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8:8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for key, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = SAFETENSORS_TYPES[entry["dtype"]]
            tensors[key] = torch.frombuffer(bytearray(data[start:end]), dtype=dtype).view(entry["shape"])
        if "svg" not in metadata:
            return tensors
        checkpoint = json.loads(metadata["svg"])
        for path_in, tensor in tensors.items():
            *parents, name = path_in.split("/")
            part = checkpoint
            for parent in parents:
                part = part[parent]
            part[name] = tensor
        return checkpoint
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError, struct.error) as e:
        raise UserError(f"{path}: not a readable .safetensors file ({short_error(e)}): truncated? copy or "
                        f"download it again") from e


def load_npz(path, keys=None):
    """Read the arrays of an .npz file, all or those of `keys` that it has."""
    try:
        with np.load(path) as arrays:
            return {k: arrays[k] for k in arrays.files if keys is None or k in keys}
    except Exception as e:  # a damaged file fails in any of NumPy's, zipfile's and zlib's ways
        raise UserError(f"{path}: not a readable .npz file ({short_error(e)})") from e


def read_json(path):
    """Read a JSON object; {} if there is no such file or it holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


RECORD = "record.json"  # in a folder that a program of ours wrote: what decided its files, and their names
OVERVIEW = "overview"  # a folder therein, of pictures that show some of the others and that no score counts


def write_record(folder, settings, names):
    """Write the record of an output folder."""
    write_json(folder / RECORD, {"program": "SVG", "settings": settings, "files": names})


def read_record(folder):
    """Return the settings and files (a list) of an output folder; {} if it is none of ours."""
    record = read_json(Path(folder, RECORD))
    names = record.get("files")
    if record.get("program") == "SVG" and isinstance(names, list) and all(isinstance(n, str) for n in names):
        return {"settings": record.get("settings"), "files": names}
    return {}


# -- Weights -> module -------------------------------------------------------------------------------------

def fingerprint(state_dict):
    """Return the SHA-256 of all names, shapes and float32 values.

    The same weights have the same fingerprint in any file, and in any precision that holds them exactly.
    """
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def check_fields(checkpoint, fields, path):
    """Raise UserError if a checkpoint lacks one of `fields` {name: type}, or holds something else there."""
    missing = [name for name in fields if name not in checkpoint]
    if missing:
        raise UserError(f"{path}: a damaged checkpoint: no {', '.join(missing)} in it")
    for name, kind in fields.items():
        value = checkpoint[name]
        if not isinstance(value, kind) or (kind is torch.Tensor and not is_plain(value)):
            raise UserError(f"{path}: a damaged checkpoint: its {name} is of type {type(value).__name__}, "
                            f"not a plain {kind.__name__}")


def build(model, config, path):
    """Return model(**config); raises UserError for a recorded config that describes no such model."""
    try:
        return model(**config)
    except Exception as e:  # a damaged config fails in any way
        raise UserError(f"{path}: a damaged checkpoint: its config describes no {model.__name__} "
                        f"({short_error(e)})") from e


def is_plain(value):
    """Whether a value is a dense tensor on the CPU, of one of SAFETENSORS_TYPES."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and value.dtype in SAFETENSORS_TYPES.values())


def check_tensors(weights, path):
    """Raise UserError if one of the values of a state dict is no plain tensor, or its name no text."""
    for key, value in weights.items():
        if not (isinstance(key, str) and is_plain(value)):
            raise UserError(f"{path}: not a state dict: its {key} is no dense tensor of numbers, but "
                            f"{type(value).__name__}")


def strict_load(module, weights, path, what, recorded=None):
    """Load every tensor, or raise UserError that names what is missing, unexpected, misshapen, not finite.

    recorded: the fingerprint that was saved with the weights, if one was.
    """
    own = module.state_dict()
    check_tensors(weights, path)
    both = [k for k in own if k in weights]
    found = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "wrong shape": [f"{k} {list(weights[k].shape)} instead of {list(own[k].shape)}" for k in both
                        if weights[k].shape != own[k].shape],
        "not finite": [k for k in both if not weights[k].isfinite().all()]}
    problems = []
    for problem, keys in found.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{problem} {', '.join(keys[:3])}{more}")
    if problems:
        raise UserError(f"{path}: not the weights of {what}: {'; '.join(problems)}")
    if recorded and fingerprint(weights) != recorded:
        raise UserError(f"{path}: its weights are not those that were saved (another fingerprint): the file "
                        f"is damaged or was changed; copy or download it again")
    module.load_state_dict(weights)


def load_optimizer(optimizer, state, path):
    """Load an optimiser's state; raises UserError if it is not that of its parameters."""
    try:
        optimizer.load_state_dict(state)
        fits = all(of_p["exp_avg"].shape == p.shape for p, of_p in optimizer.state.items())
        fits = fits and len(optimizer.state) > 0
    except Exception as e:  # a damaged state fails in any way
        raise UserError(f"{path}: a damaged optimiser's state ({short_error(e)})") from e
    if not fits:
        raise UserError(f"{path}: a damaged optimiser's state: it has other shapes than the parameters")


# -- Layouts of published weights --------------------------------------------------------------------------

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


def to_official_names(weights):
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
    if all(f"{prefix}{i}.weight" in weights for i in "qkv"):
        weights[f"{prefix}qkv.weight"] = torch.cat([weights.pop(f"{prefix}{i}.weight") for i in "qkv"])
        if f"{prefix}q.bias" in weights and f"{prefix}v.bias" in weights:
            # DINOv3 has no key bias.
            weights.setdefault(f"{prefix}k.bias", torch.zeros_like(weights[f"{prefix}q.bias"]))
            weights[f"{prefix}qkv.bias"] = torch.cat([weights.pop(f"{prefix}{i}.bias") for i in "qkv"])


def detect_architecture(weights, known, path):
    """Return the name in `known` ({name: arguments of svg.ViT}) that fits the shapes of official weights."""
    shape = getattr(weights.get("patch_embed.proj.weight"), "shape", ())
    if len(shape) != 4:
        raise UserError(f"{path}: not an encoder: no patch_embed.proj.weight among its {len(weights)} "
                        f"entries ({', '.join(map(str, list(weights)[:3]))}, ...); give one of "
                        f"{', '.join(known)}")
    seen = {"dim": shape[0], "patch": shape[3], "registers": 0,
            "swiglu": "blocks.0.mlp.w1.weight" in weights, "cls": "cls_token" in weights}
    if "register_tokens" in weights:
        seen["registers"] = weights["register_tokens"].shape[1]
    absent = {"registers": 0, "swiglu": False, "cls": True}
    for name, config in known.items():
        if seen.items() <= {**absent, **config}.items():
            return name
    found = ", ".join(f"{key} {value}" for key, value in seen.items())
    raise UserError(f"{path}: a ViT with {found} is none of {', '.join(known)}")


def is_features_alone(weights):
    """Whether the authors' decoder takes DINO's 384 channels alone: "P" of their later SVG-T2I."""
    return getattr(weights.get("decoder.conv_in.weight"), "shape", ())[1:2] == (384,)


def authors_autoencoder_weights(weights, path, decode_only=False):
    """Convert the SVG authors' autoencoder: encoder.*, extra_vit.* (torchvision's), mask_token, decoder.*.

    Returns the encoder's weights and those of svg.Autoencoder; losses are dropped. decode_only: those of the
    decoder, which is all that a file needs to hold.
    """
    check_tensors(weights, path)
    parts = {}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    needed = ["decoder"] if decode_only else ["encoder", "extra_vit", "decoder"]
    if is_features_alone(weights):
        needed = [part for part in needed if part != "extra_vit"]
    missing = [f"{part}.*" for part in needed if part not in parts]
    if missing:
        hint = "; a decoder alone can only decode" if "decoder" in parts else ""
        raise UserError(f"{path}: not the authors' autoencoder: no {', '.join(missing)} among its "
                        f"{len(weights)} tensors{hint}")
    residual = parts.get("extra_vit", {})
    head = {k: v for k, v in residual.items() if k.startswith("heads.")}
    body = {k: v for k, v in residual.items() if k not in head}
    own = {
        **{f"residual.{k}": v for k, v in to_official_names(body).items()},
        **{f"residual_head.{k.removeprefix('heads.')}": v for k, v in head.items()},
        **{f"decoder.{k}": v for k, v in parts["decoder"].items()}}
    if "mask_token" in parts:  # strict_load names it if it is missing
        own["mask_token"] = weights["mask_token"].flatten()
    return parts.get("encoder", {}), own


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


def is_vae(weights):
    """Whether names are those of an LDM autoencoder, whole or a part, in LDM's or diffusers' layout."""
    return (isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
            and any(re.match(r"(post_)?quant_conv\.|encoder\.conv_in\.", key) for key in weights))


def vae_weights(weights, path):
    """Convert an LDM autoencoder of LDM's or diffusers' layout: svg.VAE's arguments and its weights.

    The arguments follow from the shapes; what training alone used is dropped.
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
        if name in out:
            raise UserError(f"{path}: a VAE in LDM's and in diffusers' layout at once: {name} is there twice")
        if getattr(value, "ndim", 0) == 2:  # diffusers' attention has linear layers
            value = value[:, :, None, None]
        out[name] = value
    try:
        ch = out["encoder.conv_in.weight"].shape[0]
        z_channels = out["decoder.conv_in.weight"].shape[1]
        levels = len({key.split(".")[2] for key in out if key.startswith("decoder.up.")})
        widths = [out[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    except (KeyError, AttributeError, IndexError) as e:
        raise UserError(f"{path}: part of a VAE of LDM's or diffusers' layout ({short_error(e)})") from None
    if not widths or any(width == 0 or width % 32 or width % ch for width in (ch, *widths)):
        raise UserError(f"{path}: not a VAE of LDM: its widths {[ch, *widths]} are no multiples of 32")
    attention = any(key.startswith(f"encoder.down.{levels - 1}.attn.") for key in out)
    return {"z_channels": z_channels, "ch": ch, "ch_mult": [width // ch for width in widths],
            "attention": attention}, out


CONTENTS = {  # what a word in the names of weights says about them; the first that is there counts
    "model.diffusion_model.": "a whole Stable Diffusion checkpoint, whose VAE must be a file of its own",
    "adaLN_modulation": "a diffusion transformer",
    "patch_embed": "a vision transformer",
    "decoder.": "part of an autoencoder",
}


def describe_weights(checkpoint):
    """Say what a checkpoint seems to be, by its names and those of the dicts in it."""
    inner = [value for value in checkpoint.values() if isinstance(value, dict)]
    names = [str(name) for part in (checkpoint, *inner) for name in part]
    for word, what in CONTENTS.items():
        if any(word in name for name in names):
            return what
    return f"no weights known here ({', '.join(names[:3])}, ...)"


def authors_sit_weights(weights, path):
    """Convert the SVG authors' transformer, of whose doubled head half counts.

    Returns svg.SiT's arguments, its weights and the position table [1, N, dim], or None.
    """
    try:
        weights = {k.replace("ln1.", "x_embedder.", 1).replace("embedding_table.", ""): v
                   for k, v in weights.items()}
        positions = weights.pop("pos_embed", None)
        dim, channels = weights["x_embedder.weight"].shape
        size = {"depth": 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
                "dim": dim, "heads": dim // weights["blocks.0.attn.q_norm.weight"].shape[0]}
        num_classes = weights["y_embedder.weight"].shape[0] - 1
        grid = 16 if positions is None else math.isqrt(positions.shape[1])
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if weights[key].shape[0] == 2 * channels:
                weights[key] = weights[key][:channels]
    except (KeyError, AttributeError, ValueError, IndexError, ZeroDivisionError):
        raise UserError(f"{path}: not a transformer checkpoint (of train_dit.py, or the authors')") from None
    config = {"model": size, "channels": channels, "num_classes": num_classes, "grid": grid}
    return config, weights, positions


def load_latent_stats(path):
    """Load per-channel mean and std ([C], [C]) of the authors' file, or of an .npz with `mean` and `std`."""
    if str(path).endswith(".npz"):
        arrays = load_npz(path, ("mean", "std", "dinov3_sp_mean", "dinov3_sp_std"))
        stats = {k: torch.from_numpy(v.astype(np.float64)) for k, v in arrays.items()
                 if v.dtype.kind in "fiu"}
    else:
        stats = load_checkpoint(path)
    for mean, std in (("mean", "std"), ("dinov3_sp_mean", "dinov3_sp_std")):
        if mean in stats and std in stats:
            check_fields(stats, {mean: torch.Tensor, std: torch.Tensor}, path)
            return stats[mean].flatten().float(), stats[std].flatten().float()
    raise UserError(f"{path}: no 'mean' and 'std' (or the authors' 'dinov3_sp_mean', 'dinov3_sp_std') in it")


# -- Pretrained files --------------------------------------------------------------------------------------

META = "https://dl.fbaipublicfiles.com"
FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256"
DINOV2 = {  # release: head of its file's SHA-256, where that is known
    "vits14": "b938bf1bc15cd2ec", "vitb14": "0b8b82f85de91b42", "vitl14": "d5383ea8f4877b24",
    "vits14_reg4": None, "vitb14_reg4": None, "vitl14_reg4": None}
OPEN_ENCODERS = {  # openly published: file name -> URL, head of its SHA-256
    **{f"dinov2_{release}_pretrain.pth": (
        f"{META}/dinov2/dinov2_{release.removesuffix('_reg4')}/dinov2_{release}_pretrain.pth", digest)
       for release, digest in DINOV2.items()},
    "mae_pretrain_vit_base.pth": (f"{META}/mae/pretrain/mae_pretrain_vit_base.pth", None),
    "siglip2-base-patch16-256.safetensors": (
        "https://huggingface.co/google/siglip2-base-patch16-256/resolve/main/model.safetensors", None),
}
DOWNLOADS = {
    **OPEN_ENCODERS,
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "pt_inception-2015-12-05-6726825d.pth": (
        f"{FID}/pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    "VIRTUAL_imagenet256_labeled.npz": (f"{ADM}/VIRTUAL_imagenet256_labeled.npz", None),
}


def find_weights(name, weights_dir=None):
    """Return where a pretrained file belongs: a path as it is, a bare name in the weights folder.

    The folder is weights_dir, else $SVG_WEIGHTS, else weights/.
    """
    if os.path.sep in str(name):
        return Path(name)
    return Path(weights_dir or os.environ.get("SVG_WEIGHTS") or "weights") / name


def find_encoder(file, path, weights_dir=None):
    """Return where the encoder file that a checkpoint at `path` recorded lies now."""
    name = Path(file).name
    for place in (Path(file), find_weights(name, weights_dir), Path(__file__).parent / name):
        if place.exists():
            return place
    raise UserError(f"{path} needs its encoder {name}: name its folder by --weights, or put it into "
                    f"{find_weights('x', weights_dir).parent}")


def missing_weights(path):
    """Return the message that says where to get a missing file."""
    name = os.path.basename(str(path))
    if name.startswith("dinov3"):
        return (f"{path} is missing: Meta releases DINOv3 after a licence form (https://ai.meta.com/"
                f"resources/models-and-libraries/dinov3-downloads/); put the file there under that name, or "
                f"use the open DINOv2: --encoder dinov2_vits14_pretrain.pth (downloaded on first use)")
    if name in DOWNLOADS:
        return f"{path} is missing; download it from {DOWNLOADS[name][0]}"
    return f"{path}: no such file"


def download_weights(name, weights_dir=None):
    """Download a published file that is missing, and check its hash.

    A local file with another hash is only worth a warning: it may be a conversion of the same weights.
    """
    path = find_weights(name, weights_dir)
    if path.name not in DOWNLOADS:
        return
    url, digest = DOWNLOADS[path.name]
    if path.exists():
        if digest and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            warnings.warn(f"{path} is not the published file of that name: its SHA-256 does not begin with "
                          f"{digest}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
    except Exception as e:  # no network, a proxy's page, a full disk, a wrong hash: one remedy for all
        raise UserError(f"{missing_weights(path)} (tried just now: {short_error(e)}) and put it there, or "
                        f"name its folder by --weights or $SVG_WEIGHTS") from e
