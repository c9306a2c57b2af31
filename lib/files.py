"""Files: atomic writes, checkpoints, other file formats, downloads.

A file is written whole or not at all. A file that cannot be used ends in a UserError that names it and says
what to do.
"""
import contextlib
import hashlib
import json
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class UserError(Exception):
    """An error that the user can fix: programs show it as one line and exit with code 2."""


def short_error(error):
    """Return an exception in one line, of 300 characters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def reading(path, what):
    """Whatever fails while a file's contents are taken apart is that file's fault: one line that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:  # a damaged file fails in any of torch's, zipfile's, pickle's and JSON's ways
        if "SVG_DEBUG" in os.environ:  # or this would hide a mistake of ours
            raise
        hint = "; remove it, to download it again" if Path(path).name in DOWNLOADS else ""
        raise UserError(f"{path}: not {what} ({short_error(e)}): damaged, or another kind?{hint}") from e


# -- Writing -----------------------------------------------------------------------------------------------

def write_atomically(path, write, sync=True, before=lambda: None):
    """Call write(file) on a temporary file beside `path`, then before(), and rename the file to `path`.

    sync: first wait for the disk, so that even a power cut leaves the old file or the new one. Raises
    UserError if that fails; a file that was there before is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a kill has left; a link is not followed
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        # Of torch.save's errors none names the cause.
        reason = getattr(e, "strerror", None) or f"no space left, or a limit on file sizes: {short_error(e)}"
        raise UserError(f"{path}: not written ({reason}): make room, or give another place; a previous file "
                        f"of that name is intact") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON, atomically; what JSON does not know becomes text."""
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path, checkpoint, **settings):
    """Write a checkpoint atomically, by torch.save; settings: of write_atomically."""
    write_atomically(path, lambda file: torch.save(checkpoint, file), **settings)


def save_image(path, image):
    """Write a Pillow image, or uint8 [H, W, 3], as PNG: whole or not at all, its folder too if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    # Level 1: half the time of the default, files a tenth larger.
    write_atomically(path, lambda file: image.save(file, "PNG", compress_level=1), sync=False)


# -- Reading -----------------------------------------------------------------------------------------------

def load_checkpoint(path):
    """Load a dict by torch.load with weights_only and mmap, on the CPU, or from a .safetensors file."""
    if not os.path.exists(path):
        raise UserError(missing_weights(path))
    with reading(path, "a readable checkpoint, a dict of weights by name"):
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and (damaged := zipfile.ZipFile(path).testzip()):  # torch ignores the checksums
            raise ValueError(f"the checksum of its part {damaged} is wrong")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as e:
            if found := re.search(r"GLOBAL (\S+)", str(e)):
                raise UserError(f"{path}: holds objects of {found[1]}, whose loading could run code: save "
                                f"the state dict alone, by torch.save(model.state_dict(), FILE)") from e
            raise
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds {type(checkpoint).__name__}")
        return checkpoint


SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Read a .safetensors file: 8 bytes of header length, a JSON header, the raw tensors."""
    data = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8:8 + length].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = SAFETENSORS_TYPES[entry["dtype"]]
        tensors[key] = torch.from_numpy(np.array(data[start:end])).view(dtype).view(entry["shape"])
    return tensors


def load_npz(path, keys=None):
    """Read the arrays of an .npz file, all or those of `keys` that it has."""
    with reading(path, "a readable .npz file"), np.load(path) as arrays:
        return {k: arrays[k] for k in arrays.files if keys is None or k in keys}


def read_json(path):
    """Read a JSON object; {} if there is no such file or it holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def has_entry(path, name):
    """Whether a file is a checkpoint, an .npz or a JSON object that has something of that name."""
    with contextlib.suppress(Exception):  # it is anything else, and may fail in any way
        if not zipfile.is_zipfile(path):
            return name in read_json(path)
        with np.load(path) as arrays:
            return name in arrays.files or name in load_checkpoint(path)
    return False


def fingerprint(state_dict):
    """Return the SHA-256 of all names, shapes and float32 values, the same in any file."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(state_dict, recorded=None):
    """Return the fingerprint of weights; ValueError if another one was recorded with them."""
    found = fingerprint(state_dict)
    if recorded and found != recorded:
        raise ValueError("its weights are not those that were saved, by their fingerprint")
    return found


# -- Output folders ----------------------------------------------------------------------------------------

RECORD = "record.json"  # in a folder that a program of ours wrote: what decided its files, and their names
OVERVIEW = "overview"  # a folder therein, of pictures that show some of the others and that no score counts


def read_record(folder):
    """Return the settings and files (a list) of an output folder; {} if it is none of ours."""
    record = read_json(Path(folder, RECORD))
    names = record.get("files")
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return record if record.get("program") == "SVG" and whole else {}


# -- Pretrained files --------------------------------------------------------------------------------------

META = "https://dl.fbaipublicfiles.com"
FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256"
DINOV2 = {  # release: head of its file's SHA-256, where that is known
    "vits14": "b938bf1bc15cd2ec", "vitb14": "0b8b82f85de91b42", "vitl14": "d5383ea8f4877b24",
    "vits14_reg4": None, "vitb14_reg4": None, "vitl14_reg4": None}
HUGGING_FACE = "https://huggingface.co"
TIMM = "vit_{}_patch16_dinov3_qkvb.lvd1689m"  # timm's files of DINOv3, which need no form
OPEN_ENCODERS = {  # openly published: file name -> URL, head of its SHA-256
    **{f"{name}.safetensors": (f"{HUGGING_FACE}/timm/{name}/resolve/main/model.safetensors", None)
       for name in map(TIMM.format, ("small_plus", "small", "base", "large"))},
    **{f"dinov2_{release}_pretrain.pth": (
        f"{META}/dinov2/dinov2_{release.removesuffix('_reg4')}/dinov2_{release}_pretrain.pth", digest)
       for release, digest in DINOV2.items()},
    "mae_pretrain_vit_base.pth": (f"{META}/mae/pretrain/mae_pretrain_vit_base.pth", None),
    "siglip2-base-patch16-256.safetensors": (
        f"{HUGGING_FACE}/google/siglip2-base-patch16-256/resolve/main/model.safetensors", None),
}
DOWNLOADS = {
    **OPEN_ENCODERS,
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "pt_inception-2015-12-05-6726825d.pth": (
        f"{FID}/pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    "VIRTUAL_imagenet256_labeled.npz": (f"{ADM}/VIRTUAL_imagenet256_labeled.npz", None),
}


def find_weights(name, weights_dir=None):
    """Return where a file is: a bare name in weights_dir, $SVG_WEIGHTS or weights/, else here; or a path."""
    path = Path(weights_dir or os.environ.get("SVG_WEIGHTS") or "weights") / name
    if os.path.sep in str(name) or os.path.isfile(name) and not path.exists():
        return Path(name)
    return path


def missing_weights(path):
    """Return the message that says where to get a missing file."""
    name = os.path.basename(str(path))
    if name.startswith("dinov3"):
        return (f"{path} is missing: Meta gives it out after a licence form (https://ai.meta.com/resources/"
                f"models-and-libraries/dinov3-downloads/); put it there under that name, or take timm's: "
                f"--encoder {TIMM.format('small_plus')}.safetensors (downloaded on first use)")
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
    if "dinov3" in name:
        print(f"downloading {name}; its use is under the DINOv3 License: "
              f"https://ai.meta.com/resources/models-and-libraries/dinov3-license", flush=True)
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
    except Exception as e:  # no network, a proxy's page, a full disk, a wrong hash: one remedy for all
        if new and path.parent.exists():
            path.parent.rmdir()
        raise UserError(f"{missing_weights(path)} (tried just now: {short_error(e)}) and put it there, or "
                        f"name its folder by --weights or $SVG_WEIGHTS") from e
