"""Images: decoding and cropping, folders, packed sets, cached latents, the reproducible stream of a run.

    python data.py pack imagenet/train imagenet/train-256     # decode a tree of class folders once

Every dataset here maps an item (index, position) to (uint8 [size, size, 3], label, index of a corrupt file
or -1), and has `classes`, `labels` and `name(index)`. `position` is the item's place in the endless stream of
a run; it seeds the random crop.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import files
import runs
import shapes
from files import UserError

# -- One image ---------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def open_rgb(path):
    """Decode any mode that Pillow opens into an upright 8-bit RGB image."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits; convert() would clip, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise nearly everything for damaged files
        raise UserError(f"{path}: not a readable image ({files.short_error(e)})") from e


def adm_resize(image, size):
    """Shrink as ADM does: halve with a box filter while the short side is >= 2*size, then bicubic to it."""
    while min(image.size) >= 2 * size:
        image = image.resize([n // 2 for n in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale > 100 * size:  # a strip of a pixel would become gigabytes
        raise UserError(f"a strip of {image.width} x {image.height} pixels is not a readable image")
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


# -- A tree of class folders -------------------------------------------------------------------------------

def list_images(folder):
    """Return the sorted image files below a folder; hidden ones and an output folder's overview are not."""
    found, _ = scan(folder)
    return sorted(found)


def scan(folder):
    """Return the images below a folder, and all folders with the times of their last change.

    Left out are hidden files and folders, such as .ipynb_checkpoints, and the overview of an output folder.
    """
    images = []
    times = {}
    for where, folders, names in os.walk(folder, followlinks=True):
        times[where] = os.stat(where).st_mtime_ns
        folders[:] = [name for name in folders if not name.startswith(".")
                      and not (name == files.OVERVIEW and files.RECORD in names)]
        images += [os.path.join(where, name) for name in names if not name.startswith(".")
                   and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return images, times


def walk_tree(root, flat=False):
    """Return an image tree as arrays: classes, names and labels of the images, folders and their times.

    Each folder in root that has images below it is a class; loose images beside such folders are left out.
    With `flat`, or without such folders, all images are of one class. names, loose and folders are paths
    below the root; times say when each folder last changed.
    """
    images, times = scan(root)
    start = len(os.path.join(root, ""))  # of the path below it; relpath would take most of the time
    by_class = {}
    for path in sorted(path[start:] for path in images):
        folder, _, below = path.partition(os.path.sep)
        by_class.setdefault(folder if below else "", []).append(path)
    loose = by_class.pop("", [])
    if flat or not by_class:
        every = sorted(itertools.chain(loose, *by_class.values()))
        by_class = {os.path.basename(root): every} if every else {}
        loose = []
    classes = sorted(by_class)
    counts = np.array([len(by_class[name]) for name in classes], int)
    # Arrays of bytes, not lists of str: workers share an array, copies of a list would grow with every epoch.
    return {"classes": np.array(classes, str),
            "names": np.array([os.fsencode(path) for name in classes for path in by_class[name]], bytes),
            "labels": np.repeat(np.arange(len(classes)), counts),
            "loose": np.array([os.fsencode(path) for path in loose], bytes),
            "folders": np.array([os.fsencode(os.path.relpath(folder, root)) for folder in times], bytes),
            "times": np.array(list(times.values()), np.int64)}


def index_tree(root):
    """walk_tree, but from the cache ($XDG_CACHE_HOME/svg) while no folder of the tree has changed.

    A file that was added, removed or renamed changes its folder's time.
    """
    root = os.path.realpath(root)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "svg"
    cache /= hashlib.sha256(b"2" + os.fsencode(root)).hexdigest()[:32] + ".npz"  # 2: of the format
    with contextlib.suppress(UserError, KeyError, OSError):
        index = files.load_npz(cache)
        times = [os.stat(os.path.join(root, os.fsdecode(f))).st_mtime_ns for f in index["folders"]]
        if np.array_equal(times, index["times"]):
            return index
    index = walk_tree(root)
    if index["times"].max() < time.time_ns() - 2e9:  # a younger folder could change again without showing it
        with contextlib.suppress(OSError, UserError):  # no home, a full disk: then without a cache
            cache.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(cache, lambda file: np.savez(file, **index))
    return index


class ImageFolder(torch.utils.data.Dataset):
    """A tree root/class/image, in which the sorted class folders are the labels, or a folder of one class.

    A corrupt image is replaced by the next good one and its index returned, for the caller to report. flat:
    all images are of one class.
    """

    def __init__(self, root, size, random_crop=False, seed=0, flat=False):
        if not os.path.isdir(root):
            raise UserError(f"--data {root}: no such folder")
        self.root = str(root)
        self.size = size
        self.random_crop = random_crop
        self.seed = seed
        if runs.rank() > 0:  # the first process walks the tree, the others read its cache
            runs.barrier()
        index = walk_tree(root, flat) if flat else index_tree(root)
        if runs.rank() == 0:
            runs.barrier()
        self.classes = index["classes"].tolist()
        self.names = index["names"]
        self.labels = index["labels"]
        if len(self.names) == 0:
            raise UserError(f"--data {root}: no images, in class folders (root/class/image.jpg) or loose, "
                            f"and not a packed set")
        if len(index["loose"]) and runs.rank() == 0:
            warnings.warn(f"{self.root}: {len(index['loose'])} images beside the class folders are left out, "
                          f"such as {os.fsdecode(index['loose'][0])}")
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
    """A folder that `pack` wrote: images are centre crops, decoded already.

    size: pixels that it must have been packed at, if that matters.
    """

    def __init__(self, root, size=None):
        self.root = str(root)
        try:
            self.images = np.load(os.path.join(root, "images.npy"), mmap_mode="r")
            self.labels = np.load(os.path.join(root, "labels.npy"))
            self.classes = json.loads(Path(root, "classes.json").read_text())
        except Exception as e:  # a damaged file fails in any of NumPy's and JSON's ways
            raise UserError(f"--data {root}: not a whole packed set ({files.short_error(e)}); pack it "
                            f"again") from e
        square = np.shape(self.images)[1:2] * 2
        shape = (self.labels.size, *square, 3)
        if self.images.dtype != np.uint8 or self.images.shape != shape or self.labels.ndim != 1:
            raise UserError(f"--data {root}: images.npy is {self.images.dtype} {list(self.images.shape)} and "
                            f"labels.npy {list(self.labels.shape)}, not uint8 [N, size, size, 3] and [N]; "
                            f"pack it again")
        if len(self.labels) == 0:
            raise UserError(f"--data {root}: a packed set of no images")
        if not isinstance(self.classes, list) or not all(isinstance(c, str) for c in self.classes):
            raise UserError(f"--data {root}: classes.json is no list of names; pack it again")
        known = set(range(len(self.classes)))
        if self.labels.dtype.kind not in "iu" or not set(np.unique(self.labels)) <= known:
            raise UserError(f"--data {root}: labels.npy does not fit the {len(self.classes)} names of "
                            f"classes.json; pack it again")
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
    """Return what must not change about a dataset when a run resumes: labels, classes, how it crops."""
    labels = np.asarray(dataset.labels, np.int64).tobytes()
    return {"images": len(dataset),
            "labels": hashlib.sha256(labels + json.dumps(dataset.classes).encode()).hexdigest(),
            "crops": "random" if getattr(dataset, "random_crop", False) else "centre"}


def dataset_fingerprint(dataset):
    """Return a hash of a dataset's labels and classes, and of its files' names, sizes and times."""
    digest = hashlib.sha256(json.dumps(dataset_identity(dataset)).encode())
    if isinstance(dataset, ImageFolder):
        names = [os.fsdecode(name) for name in dataset.names]
    else:
        names = ["images.npy"] if isinstance(dataset, Packed) else []  # drawn shapes have no file
    for name in names:
        digest.update(os.fsencode(name))
        with contextlib.suppress(OSError):  # a dangling link: a corrupt image, which encoding reports
            stat = os.stat(os.path.join(dataset.root, name))
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


# -- Batches -----------------------------------------------------------------------------------------------

def ignore_stop_signals(_):
    """Keep a loading process alive while its run finishes a step and saves.

    torchrun and clusters send their signals to every process. A second SIGTERM, as from the run, ends it.
    """
    os.setsid()
    for signal_number in runs.STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def batches_of(dataset, items, workers, pin=False):
    """Return a DataLoader of the batches whose items the lists in `items` name."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=items, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None, worker_init_fn=ignore_stop_signals)


def batch_size(batch):
    """Return the number of images of a batch of a DataLoader: images, labels, ..."""
    return len(batch[0])


class Stream:
    """This rank's items of an endless stream of batches, from global batch `start` on.

    Each epoch is a new permutation of the dataset, one after the other with nothing dropped: a function of
    (seed, position) alone.
    """

    def __init__(self, length, batch, seed, start):
        self.length = length
        self.batch = batch
        self.seed = seed
        self.start = start

    def __iter__(self):
        epoch = -1
        local = self.batch // runs.world_size()
        for step in range(self.start, sys.maxsize):
            first = step * self.batch + runs.rank() * local
            items = []
            for position in range(first, first + local):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                items.append((int(order[position % self.length]), position))
            yield items


def training_batches(dataset, batch, seed, start, workers, device):
    """Return this rank's batches of the stream: uint8 [b, H, W, 3], labels [b], corrupt indices [b]."""
    stream = Stream(len(dataset), batch, seed, start)
    return iter(batches_of(dataset, stream, workers, pin=device.type == "cuda"))


def spread_batches(dataset, count, batch, workers, device):
    """Yield this rank's share of `count` images spread over the dataset: float [b, 3, H, W] in [-1, 1]."""
    indices = np.linspace(0, len(dataset), min(count, len(dataset)), endpoint=False).astype(int)
    indices = indices[runs.rank()::runs.world_size()].tolist()
    chunks = [[(i, 0) for i in indices[j:j + batch]] for j in range(0, len(indices), batch)]
    batches = batches_of(dataset, chunks, workers)
    for images, _, _ in runs.progress(batches, "measuring the latents", min(count, len(dataset)), batch_size):
        yield to_float(images, device)


# -- Cached latents ----------------------------------------------------------------------------------------

class Cached(torch.utils.data.Dataset):
    """What `cache_latents` wrote: items (float16 [2, N, C], label, -1), of an image and its mirror image."""

    def __init__(self, folder, classes, count):
        self.root = str(folder)
        self.classes = classes
        self.rows = open_rows(folder, count)
        self.labels = self.rows["label"]

    def __len__(self):
        return len(self.rows)

    def __reduce__(self):  # as Packed
        return Cached, (self.root, self.classes, len(self))

    def name(self, index):
        return f"{self.root} latent {index}"

    def __getitem__(self, item):
        row = self.rows[item[0]]
        return np.array(row["latents"]), int(row["label"]), -1


def open_rows(folder, count):
    """Return the memory-mapped rows of a folder of cached latents; UserError for a damaged file."""
    try:
        rows = np.load(os.path.join(folder, "latents.npy"), mmap_mode="r")
        if rows.shape != (count,) or rows.dtype.names != ("latents", "label"):
            raise ValueError(f"{rows.dtype} {list(rows.shape)}")
    except Exception as e:  # as in Packed
        raise UserError(f"--cache {folder}: latents.npy is damaged ({files.short_error(e)}): remove the "
                        f"folder, and it is encoded again") from e
    return rows


def cache_state(folder, about, count):
    """Return what a folder of cached latents says of them; {} if it is new or empty.

    about: what the latents depend on; count: of images. Raises UserError for the latents of something else,
    and for a folder that cannot be written where there is something to write.
    """
    folder = Path(folder)
    state = files.read_json(folder / "cache.json")
    if state and state.get("kind") != "latents" or (
            not state and folder.exists() and set(os.listdir(folder)) - {runs.LOCK}):
        raise UserError(f"--cache {folder} is not empty and holds no latents: give another folder")
    stale = []
    for name, value in about.items() if state else ():
        known = state.get(name)
        numbers = isinstance(value, list) and isinstance(known, list) and len(value) == len(known)
        # Numbers that were measured in other batches differ by rounding.
        if not (np.allclose(value, known, 1e-3, 1e-5) if numbers else value == known):
            stale.append(name)
    if stale:
        raise UserError(f"--cache {folder} is stale, made with other {', '.join(stale)}: give another "
                        f"folder, or remove it")
    if state.get("encoded") != count:
        try:
            runs.new_folder(folder)
        except argparse.ArgumentTypeError as e:
            raise UserError(f"--cache {e}") from e
    return state


def cache_latents(folder, dataset, encode, shape, about, batch, workers, device, report):
    """Encode a dataset and its mirror images once, in half precision, and return it as a dataset of latents.

    encode(images [B, 3, H, W]) -> [B, *shape]; about: what its answer depends on, dataset_fingerprint among
    it; batch: images at a time and process; report(dataset, indices): is told of corrupt images. Writes
    latents.npy, records of "latents", float16 [2, *shape], and "label", and cache.json. A stopped run goes on
    where it was.
    """
    folder = Path(folder)
    count = len(dataset)
    state = cache_state(folder, about, count)
    if runs.all_reduce(torch.tensor(state.get("encoded") == count, dtype=torch.int64)) < runs.world_size():
        if runs.rank() == 0:
            runs.lock_folder(folder)
        runs.barrier()
        state = cache_state(folder, about, count)  # another run may have changed it before the lock
        runs.barrier()  # every process has read it before the first one changes it
        if state.get("encoded") != count:
            state = {"kind": "latents", "encoded": 0, "corrupt": [], **about, **state}
            write_latents(folder, dataset, encode, shape, state, batch, workers, device, report)
        if runs.rank() == 0:
            runs.unlock_folder(folder)
    elif runs.rank() == 0:
        report(dataset, torch.tensor(state.get("corrupt", []), dtype=torch.int64))
    return Cached(folder, dataset.classes, count)


@torch.no_grad()
def write_latents(folder, dataset, encode, shape, state, batch, workers, device, report):
    """Write the rows of latents.npy after state["encoded"], each process its share, and keep cache.json."""
    count = len(dataset)
    first = state["encoded"]
    row = np.dtype([("latents", np.float16, (2, *shape)), ("label", np.int64)])
    path = folder / "latents.npy"
    if runs.rank() == 0 and first == 0:
        if shutil.disk_usage(folder).free < count * row.itemsize:
            raise UserError(f"--cache {folder}: {count:,} latents take {count * row.itemsize / 1e9:.3g} GB, "
                            f"more than the disk has: give another place, or train without --cache")
        files.write_json(folder / "cache.json", state)
        path.unlink(missing_ok=True)  # a run that reads an old file keeps it
        np.lib.format.open_memmap(path, "w+", row, (count,))
    runs.barrier()
    header = open_rows(folder, count).offset

    # Chunks of images, one of each process at a time. Not through the memory map: on a full disk that kills.
    chunks = [[(i, 0) for i in range(start, min(start + batch, count))]
              for start in range(first, count, batch)]
    mine = chunks[runs.rank()::runs.world_size()]
    batches = iter(runs.progress(batches_of(dataset, mine, workers), "encoding", count - first, batch_size))
    found = set(state.get("corrupt", []))
    with open(path, "r+b") as file:
        for i in range(0, len(chunks), runs.world_size()):
            for images, labels, corrupt in itertools.islice(batches, 1):
                report(dataset, corrupt)
                found |= set(corrupt.tolist()) - {-1}
                images = to_float(images, device)
                both = torch.stack([encode(images), encode(images.flip(-1))], 1).half()
                if not both.isfinite().all():
                    raise UserError(f"--cache {folder}: latents that half precision does not hold: train "
                                    f"without --cache")
                rows = np.empty(len(labels), row)
                rows["latents"] = both.cpu().numpy()
                rows["label"] = labels
                file.seek(header + mine[i // runs.world_size()][0][0] * row.itemsize)
                write_rows(file, rows, folder)
            if i % (8 * runs.world_size()) == 0 or i + runs.world_size() >= len(chunks):
                everywhere = runs.gather(found)  # first the rows of all processes, then the record of them
                if runs.rank() == 0:
                    state["encoded"] = min(count, first + (i + runs.world_size()) * batch)
                    state["corrupt"] = sorted(set().union(*everywhere))
                    files.write_json(folder / "cache.json", state)
    runs.barrier()


def write_rows(file, rows, folder):
    """Write rows at a file's position, and wait for the disk."""
    try:
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
    except OSError as e:
        raise UserError(f"--cache {folder}: not written ({e.strerror}): make room, and the same command goes "
                        f"on; or train without --cache") from e


# -- python data.py pack -----------------------------------------------------------------------------------

HEADER = 128  # bytes before the first image of images.npy


def pack(src, dst, size, workers=0):
    """Decode and centre-crop an image tree `src` once, to `dst`.

    Writes images.npy (uint8 [N, size, size, 3]), labels.npy and classes.json. Returns the number of images
    and the names of the corrupt ones, which are left out. A stopped run resumes where it was; `dst` appears
    when it is whole.
    """
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst} already exists: give another name, or remove it")
    part = dst.with_name(dst.name + ".part")
    dataset = ImageFolder(src, size)
    print(f"{runs.describe(dataset, src)} | {size} pixels | {workers} processes | writes {dst}", flush=True)
    if part.exists() and (not part.is_dir() or any(part.iterdir()) and not (part / "state.json").exists()):
        raise UserError(f"{part} is there, and not of an interrupted packing: move it away")
    runs.lock_folder(part)

    source = hashlib.sha256(b"\n".join([*dataset.names.tolist(), str(size).encode()])).hexdigest()
    state = files.read_json(part / "state.json")
    if state.get("source") != source or not (part / "images.npy").exists():
        state = {"source": source, "read": 0, "corrupt": []}
        files.write_json(part / "state.json", state)
    with open(part / "images.npy", "r+b" if state["read"] else "wb") as file:
        write_images(file, dataset, state, part / "state.json", workers)
        labels = np.delete(dataset.labels, state["corrupt"])
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (len(labels), size, size, 3)})
        assert file.tell() == HEADER
        os.fsync(file.fileno())
    files.write_atomically(part / "labels.npy", lambda file: np.save(file, labels))
    files.write_json(part / "classes.json", dataset.classes)
    (part / "state.json").unlink()
    (part / runs.LOCK).unlink()
    part.rename(dst)
    return len(labels), [dataset.name(i) for i in state["corrupt"]]


def write_images(file, dataset, state, state_file, workers):
    """Append the images after state["read"] to an open images.npy, and keep `state` on the disk."""
    first = state["read"]
    image_bytes = 3 * dataset.size ** 2
    file.truncate(HEADER + (first - len(state["corrupt"])) * image_bytes)
    file.seek(0, os.SEEK_END)
    chunks = [[(i, 0) for i in range(start, min(start + 64, len(dataset)))]
              for start in range(first, len(dataset), 64)]
    saved = 0.0
    batches = runs.progress(batches_of(dataset, chunks, workers), "packing", len(dataset) - first, batch_size)
    for images, _, corrupt in batches:
        file.write(images[corrupt < 0].numpy().tobytes())
        state["corrupt"] += corrupt[corrupt >= 0].tolist()
        state["read"] += len(images)
        if time.time() - saved > 10 or state["read"] == len(dataset):
            file.flush()
            os.fsync(file.fileno())  # first the images, then the record that they are there
            files.write_json(state_file, state)
            saved = time.time()


def main():
    """Run the `pack` command."""
    parser = runs.Parser("Decode a tree of class folders once:\n\n"
                         "    python data.py pack imagenet/train imagenet/train-256")
    add = parser.add_argument
    add("command", choices=["pack"])
    add("src", help="folder of class folders of images")
    add("dst", type=runs.new_folder, help="folder to write, for --data: images.npy, labels.npy, classes.json")
    add("--size", type=runs.positive, default=256, help="pixels per side, cropped the ADM way")
    add("--workers", type=runs.not_negative, default=os.cpu_count(), help="decoding processes")
    args = parser.parse_args()
    count, corrupt = pack(args.src, args.dst, args.size, args.workers)
    for name in corrupt:
        warnings.warn(f"{name}: not a readable image, left out")
    print(f"{count} images in {args.dst}, {len(corrupt)} corrupt ones left out")


if __name__ == "__main__":
    runs.run_main(main)
