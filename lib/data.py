"""Images: decoding and cropping, folders, packed sets, latents in memory, the reproducible stream of a run.

    python -m lib.data pack imagenet/train imagenet/train-256     # decode a tree of class folders once

Every dataset here maps an item (index, position) to (uint8 [size, size, 3], label, index of a corrupt file
or -1), and has `classes`, `labels` and `name(index)`. `position` is the item's place in the endless stream of
a run; it seeds the random crop.
"""
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing.queues
import multiprocessing.util
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from lib import files, runs, shapes
from lib.files import UserError

# -- One image ---------------------------------------------------------------------------------------------

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but needs other programs
IMAGE_SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
                  if kind in {*Image.OPEN, "MPO"} - NOT_DECODED}  # MPO is opened as a JPEG
Image.MAX_IMAGE_PIXELS = 2**29  # a picture of twice as many is refused: Pillow's limits are for servers
PngImagePlugin.MAX_TEXT_CHUNK = 2**26


def open_rgb(path):
    """Decode any mode that Pillow opens into an upright 8-bit sRGB image; what is transparent is white."""
    try:
        with Image.open(path) as image:
            image.load()
            profile = image.info.get("icc_profile")
            with contextlib.suppress(Exception):  # the pixels are whole where the EXIF data is not
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # more than 8 bits, which convert() would clip
                image = scale_to_8_bits(np.asarray(image, float))
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            if profile:
                image = to_srgb(image, profile)
            image = image.convert("RGB")
            return Image.composite(image, Image.new("RGB", image.size, "white"), alpha) if alpha else image
    except Exception as e:  # Pillow's decoders raise nearly everything for damaged files
        raise UserError(f"{path}: not a readable image ({files.short_error(e)})") from e


def scale_to_8_bits(values):
    """Return an image of grey values [H, W]; white is the least of the usual ones that none exceeds."""
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low = min(values.min(), 0)
    white = next((white for white in (1, 255, 4095, 65535) if white >= values.max()), values.max())
    return Image.fromarray(((values - low) / (white - low) * 255).round().astype(np.uint8))


def to_srgb(image, profile):
    """Convert an image from its ICC profile, in bytes, to sRGB; one that does not fit it is left as it is."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode != "CMYK":
            image = image.convert(Image.getmodebase(image.mode))  # L or RGB
        if not ImageCms.getProfileDescription(profile).startswith("sRGB"):
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image


def adm_resize(image, size):
    """Shrink as ADM does: halve with a box filter while the short side is >= 2*size, then bicubic to it."""
    while min(image.size) >= 2 * size:
        image = image.resize([n // 2 for n in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)


def crop(image, size, rng=None):
    """Shrink the ADM way and crop to uint8 [size, size, 3]: the centre, or with a generator at random."""
    array = np.asarray(adm_resize(image, size))
    free = np.array(array.shape[:2]) - size
    y, x = free // 2 if rng is None else rng.integers(0, free + 1)
    return array[y:y + size, x:x + size].copy()  # torch warns of views of Pillow's read-only memory


def to_float(images, device):
    """Convert uint8 [B, H, W, 3] on the host to float [B, 3, H, W] in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """Convert float [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded, in NumPy."""
    images = (images.float() * 127.5 + 127.5).round().clamp(0, 255)
    return images.byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(images):
    """Return to_uint8 of images for a user; UserError if they are not finite, which would be black."""
    if not images.isfinite().all():
        raise UserError("the pictures are not finite: too much --guidance, or too little --precision")
    return to_uint8(images)


# -- A tree of class folders -------------------------------------------------------------------------------

def list_images(folder):
    """Return the sorted image files below a folder.

    Left out are hidden files and folders, such as .ipynb_checkpoints, the overview of an output folder, and
    with a warning other files and links to folders that were read already.
    """
    paths = []
    seen = set()
    errors = []
    starts = [folder]
    for start in starts:  # and the links that are met, after all real folders
        for where, folders, names in os.walk(start, onerror=errors.append):
            place = os.stat(where)[1:3]  # inode and device
            if place in seen:
                paths.append(where)
                folders.clear()
                continue
            seen.add(place)
            ours = (files.RECORD, files.OVERVIEW) if files.RECORD in names else ()
            folders[:] = sorted(name for name in folders if name[0] != "." and name not in ours)
            paths += [os.path.join(where, name) for name in names if name[0] != "." and name not in ours]
            starts += filter(os.path.islink, (os.path.join(where, name) for name in folders))
    if errors:
        raise errors[0]
    images = [path for path in paths if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
    images.sort(key=lambda path: path.split(os.path.sep))  # class by class, as ImageFolder has them
    if len(images) < len(paths) and runs.rank() == 0:
        others = set(paths) - set(images)
        warnings.warn(f"{folder}: {len(others)} files that are no images, or links back, are left out, such "
                      f"as {min(others)}")
    return images


class ImageFolder(torch.utils.data.Dataset):
    """A tree root/class/image, in which the sorted class folders are the labels, or a folder of one class.

    Each folder in root that has images below it is a class; loose images beside such folders are left out.
    Without such folders, or with `flat`, all images are of one class. A corrupt image is replaced by the next
    good one and its index returned, for the caller to report.
    """

    def __init__(self, root, size, random_crop=False, seed=0, flat=False):
        if not os.path.isdir(root):
            raise UserError(f"--data {root}: no such folder")
        self.root = str(root)
        self.size = size
        self.random_crop = random_crop
        self.seed = seed
        start = len(os.path.join(root, ""))
        below = [path[start:].split(os.path.sep) for path in list_images(root)]
        nested = [parts for parts in below if len(parts) > 1]
        self.classes = sorted({parts[0] for parts in nested})
        if flat or not nested:
            self.classes = [os.path.basename(os.path.realpath(root))]
            self.labels = np.zeros(len(below), int)
        else:
            if len(nested) < len(below) and runs.rank() == 0:
                loose = next(parts[0] for parts in below if len(parts) == 1)
                warnings.warn(f"{self.root}: {len(below) - len(nested)} images beside the class folders are "
                              f"left out, such as {loose}")
            below = nested
            self.labels = np.searchsorted(self.classes, [parts[0] for parts in below])
        if not below:
            raise UserError(f"--data {root}: no images, in class folders (root/class/image.jpg) or loose, "
                            f"and not a packed set")
        # Bytes, not a list of str: workers share an array, copies of a list would grow with every epoch.
        self.names = np.array([os.fsencode(os.path.join(*parts)) for parts in below])
        self[0, 0]  # refuses a folder of corrupt images here, and not in a worker

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def __getitem__(self, item):
        index, position = item
        rng = np.random.default_rng((self.seed, position)) if self.random_crop else None
        for i in range(index, index + len(self)):
            i %= len(self)
            with contextlib.suppress(UserError):
                image = crop(open_rgb(self.name(i)), self.size, rng)
                return image, int(self.labels[i]), -1 if i == index else index
        raise UserError(f"--data {self.root}: no readable image in it")


# -- A packed set ------------------------------------------------------------------------------------------

class Packed(torch.utils.data.Dataset):
    """A folder that `pack` wrote, of centre crops; size: the pixels that are needed, if that matters."""

    def __init__(self, root, size=None):
        self.root = str(root)
        with files.reading(f"--data {root}", "a whole packed set, pack it again"):
            self.images = np.load(Path(root, "images.npy"), mmap_mode="r")  # uint8 [N, size, size, 3]
            self.labels = np.load(Path(root, "labels.npy"))
            names = Path(root, "names.npy")
            self.names = np.load(names) if names.exists() else []
            self.classes = json.loads(Path(root, "classes.json").read_text())
            if len(self.labels) == 0 or len(self.labels) != len(self.images):
                raise ValueError(f"{len(self.images)} images, {len(self.labels)} labels")
            self.classes[self.labels.max()]  # there is a name for every label
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
        index, _ = item
        return np.array(self.images[index]), int(self.labels[index]), -1


def open_data(root, size, random_crop=False, seed=0):
    """Open the images in `root`: class folders, a packed set, or the built-in shapes://train and val."""
    if str(root) in shapes.SPLITS:
        if size != shapes.SIZE:
            raise UserError(f"--data {root}: its images have {shapes.SIZE} pixels, needed at {size}")
        return shapes.dataset(root)
    if os.path.exists(os.path.join(root, "images.npy")):
        return Packed(root, size)
    return ImageFolder(root, size, random_crop, seed)


def dataset_identity(dataset):
    """Return what must not change when a run resumes: labels, classes, names of files, how it crops."""
    labels = np.asarray(dataset.labels, np.int64).tobytes()
    names = b"\n".join(getattr(dataset, "names", []))  # shapes and older packed sets have none
    return {"images": len(dataset),
            **({"names": hashlib.sha256(names).hexdigest()} if names else {}),
            "labels": hashlib.sha256(labels + json.dumps(dataset.classes).encode()).hexdigest(),
            "crops": "random" if getattr(dataset, "random_crop", False) else "centre"}


# -- Batches -----------------------------------------------------------------------------------------------

def prepare_loader(_):
    """Keep a loading process alive, whatever signals reach it, while its run finishes a step and saves."""
    # Without shared memory a batch would be dropped, and the run would wait for it.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    os.setsid()
    for signal_number in runs.STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)


def kill_loaders():
    """Kill the loading processes, which ignore the signal by which Python would end them, and then wait."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def batches_of(dataset, items, workers, pin=False):
    """Return a DataLoader of the batches whose items the lists in `items` name."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers and 0 <= limit < 32 + 6 * workers:  # batches on their way hold some; torch would hang
        raise UserError(f"--workers {workers}: {limit} open files are too few: raise it (ulimit -n 65536)")
    multiprocessing.util.Finalize(None, kill_loaders, exitpriority=0)  # when this program ends, however
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=items, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, worker_init_fn=prepare_loader)


def in_batches(dataset, indices, batch, workers, what):
    """Yield a process's share of a dataset, `indices`, in batches: of those, of uint8 images [b, H, W, 3], of
    labels [b] and of the indices of corrupt files or -1 [b]; with a progress line.
    """
    parts = [indices[i:i + batch] for i in range(0, len(indices), batch)]
    loader = batches_of(dataset, [[(i, 0) for i in part] for part in parts], workers)
    total = len(indices) * runs.world_size()
    loader = runs.progress(loader, what, total, lambda batch: len(batch[0]))
    for part, (images, labels, corrupt) in zip(parts, loader, strict=True):
        yield part, images, labels, corrupt


def stream(length, batch, seed, start):
    """Yield this rank's items (index, position) of an endless stream of batches, from batch `start` on.

    Each epoch is a new permutation of the dataset, one after the other with nothing dropped: a function of
    (seed, position) alone.
    """
    epoch = -1
    local = batch // runs.world_size()
    for step in itertools.count(start):
        first = step * batch + runs.rank() * local
        items = []
        for position in range(first, first + local):
            if position // length != epoch:
                epoch = position // length
                order = np.random.default_rng((seed, epoch)).permutation(length)
            items.append((int(order[position % length]), position))
        yield items


def training_batches(dataset, batch, seed, start, workers, device):
    """Return this rank's batches of the stream: uint8 [b, H, W, 3], labels [b], corrupt indices [b]."""
    items = stream(len(dataset), batch, seed, start)
    return iter(batches_of(dataset, items, workers, pin=device.type == "cuda"))


def spread_batches(dataset, count, batch, workers, device):
    """Yield this rank's share of `count` images spread over the dataset: float [b, 3, H, W] in [-1, 1]."""
    indices = np.linspace(0, len(dataset), min(count, len(dataset)), endpoint=False).astype(int)
    indices = indices[runs.rank()::runs.world_size()].tolist()
    for _, images, _, _ in in_batches(dataset, indices, batch, workers, "measuring statistics"):
        yield to_float(images, device)


# -- Latents in memory -------------------------------------------------------------------------------------

class Latents(torch.utils.data.Dataset):
    """The latents of a dataset's images and of their mirror images, encoded once, in half precision.

    Items are (float16 [2, N, C], label, index of a corrupt file or -1). Each process encodes its share and
    gets those of all.
    """

    def __init__(self, dataset, ae, batch, workers, device):
        self.dataset = dataset
        self.labels = dataset.labels
        count = len(dataset)
        self.latents = torch.zeros(count, 2, ae.grid ** 2, ae.channels, dtype=torch.float16)
        self.corrupt = torch.zeros(count, dtype=torch.int64)
        mine = list(range(count))[runs.rank()::runs.world_size()]
        for rows, images, _, corrupt in in_batches(dataset, mine, batch, workers, "encoding"):
            images = to_float(images, device)
            with torch.no_grad():
                both = torch.stack([ae.encode(images), ae.encode(images.flip(-1))], 1)
            self.latents[rows] = both.half().cpu()
            self.corrupt[rows] = corrupt + 1
        runs.all_reduce(self.latents)  # the others' rows are zero here
        runs.all_reduce(self.corrupt)
        self.corrupt -= 1

    def __len__(self):
        return len(self.latents)

    def name(self, index):
        return self.dataset.name(index)

    def __getitem__(self, item):
        index, _ = item
        return self.latents[index], int(self.labels[index]), int(self.corrupt[index])


# -- python -m lib.data pack -------------------------------------------------------------------------------

def pack(src, dst, size, workers=0):
    """Decode and centre-crop a tree's readable images once, to `dst`, which appears when whole."""
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst} already exists: give another name, or remove it")
    dataset = ImageFolder(src, size)
    print(f"{runs.describe(dataset, src)} | {size} pixels | {workers} processes | writes {dst}", flush=True)
    part = dst.with_name(f".{dst.name}.part")
    if part.exists():
        raise UserError(f"{part}: a packing that was killed has left it, or one still runs; remove it")
    part.mkdir(parents=True)
    try:
        corrupt = write_images(part / "images.npy", dataset, workers)
        labels = np.delete(dataset.labels, corrupt)
        np.save(part / "labels.npy", labels)
        np.save(part / "names.npy", np.delete(dataset.names, corrupt))
        files.write_json(part / "classes.json", dataset.classes)
        part.rename(dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for i in corrupt:
        warnings.warn(f"{dataset.name(i)}: not a readable image, left out")
    print(f"{len(labels)} images in {dst}, {len(corrupt)} corrupt ones left out")


def write_images(path, dataset, workers):
    """Write the readable images of a dataset as .npy; return the indices of the others."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(dataset), dataset.size, dataset.size, 3)}
    left_out = []
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for _, images, _, corrupt in in_batches(dataset, range(len(dataset)), 64, workers, "packing"):
            file.write(images[corrupt < 0].numpy().tobytes())
            left_out += corrupt[corrupt >= 0].tolist()
        # Their number is known now; NumPy's headers leave room for any.
        header["shape"] = (len(dataset) - len(left_out), *header["shape"][1:])
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == start
        os.fsync(file.fileno())
    return left_out


def main():
    """Run the `pack` command."""
    parser = runs.Parser("Decode a tree of class folders once:\n\n"
                         "    python -m lib.data pack imagenet/train imagenet/train-256")
    add = parser.add_argument
    add("command", choices=["pack"])
    add("src", help="folder of class folders of images")
    add("dst", help="folder to write, for --data: images.npy, labels.npy, names.npy, classes.json")
    add("--size", type=runs.positive, default=256, help="pixels per side, cropped the ADM way")
    add("--workers", type=runs.not_negative, default=os.cpu_count(), help="decoding processes")
    args = parser.parse_args()
    pack(args.src, args.dst, args.size, args.workers)


if __name__ == "__main__":
    runs.run_main(main)
