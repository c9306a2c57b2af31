"""What every program needs to run: processes, flags, parts of a training step, progress, the run's folder.

Nothing here knows the method. `Run` is one training run: runs/<name>/ with config.json, log.jsonl, loss.png,
last.pt, numbered checkpoints and preview grids.
"""
import argparse
import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import textwrap
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib import figures, files
from lib.files import UserError

# -- Processes and devices ---------------------------------------------------------------------------------


def rank():
    """Return this process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x):
    """Sum a tensor over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(value):
    """Return the values of all processes, in order of rank, on rank 0; [] on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def barrier():
    """Wait for every process."""
    all_reduce(torch.zeros(1))


def setup(precision="fp32"):
    """Join torchrun's process group, if there is one; return this process's device: CUDA, MPS or CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    tf32 = precision == "tf32"  # set both: cuDNN's default is on
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo for tensors on the host
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    if cuda:
        return torch.device("cuda", local_rank)
    if sys.platform == "linux":  # keep tensors' memory, as new memory is cleared: training is a sixth faster
        for parameter, size in ((-1, 2**25), (-3, 2**23)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device, precision):
    """Return the context in which models run: bf16 autocast, or nothing for fp32 and tf32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fetch_weights(name, weights_dir=None):
    """Return the path of a pretrained file; the first process downloads it if it is openly published."""
    if rank() == 0:
        files.download_weights(name, weights_dir)
    barrier()
    return files.find_weights(name, weights_dir)  # the loader reports a file that is missing


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {  # a pattern in what torch or the system says: what to do
    "Too many open files|items of ancdata": "raise the limit (ulimit -n 65536), or give fewer --workers",
    r"DataLoader worker \(pid|Connection(Reset|Refused)Error|EOFError|</torch_":
        "a loading process was killed, or lacked shared memory (docker run --shm-size=16g): fewer --workers",
    r"C(\+\+)? compiler|working triton": "no compiler: install g++, on a GPU Triton, or give --no-compile",
    "environment variable .* expected": "WORLD_SIZE is set without it: start by torchrun, or unset it",
    "MemoryError|out of memory|allocate memory|bad_alloc|could not create a (memory|primitive)":
        "out of memory: give a smaller --batch; training also takes --accumulate N (in N parts), --recompute"}


def run_main(main):
    """Run a program's main; an error that the user can fix becomes one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
        if dist.is_initialized():
            # Free the group's last holders first, or gloo's threads would outlive the interpreter.
            gc.collect()
            dist.destroy_process_group()  # not after an error: it could wait for ranks that wait for this one
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise another error
        message = error_line(e)
        if message is None or "SVG_DEBUG" in os.environ:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def error_line(error):
    """Return what to tell the user of an exception in one line, or None for a mistake of this program."""
    if isinstance(error, UserError):
        # A loading process wraps an error into its traceback, of which the message is the end.
        return str(error).strip().split("UserError: ")[-1]
    text = f"{type(error).__name__}: {error}"
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, text):
            return f"{remedy} ({files.short_error(error)})"
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
        return f"{error.filename or 'the disk'}: {error.strerror}; make room, or give another place"
    return None


# -- Flags -------------------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default but those of switches, and leaves the docstring's lines as they are."""

    def _get_help_string(self, action):
        if isinstance(action.default, (bool, type(None))):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line; demo: the defaults that --demo replaces."""

    def __init__(self, doc, demo=None, **settings):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **settings)
        self.demo = demo or {}

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if getattr(parsed, "demo", False) and self.demo:
            self.set_defaults(**self.demo)
            parsed, rest = super().parse_known_args(args)
        return parsed, rest


def number(low=0.0, high=math.inf, above=-math.inf):
    """Return an argparse type: a finite number from low to high, and above `above`."""
    def number(text):  # argparse names it where float() fails
        value = float(text)
        if not (low <= value <= high and above < value < math.inf):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {max(low, above):g} to {high:g}")
        return value
    return number


def whole(low):
    """Return an argparse type: a whole number of at least `low`, and of 63 bits, as PyTorch's."""
    def whole(text):  # argparse names it where int() fails
        if not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to 2^63")
        return int(text)
    return whole


positive = whole(1)
not_negative = whole(0)


def output_file(entry):
    """Return an argparse type: a path at which to write, free or of a file that has an entry of this name."""
    def output_file(text):
        folder = Path(text).absolute().parent
        if os.path.lexists(text) and not (os.path.isfile(text) and files.has_entry(text, entry)):
            raise argparse.ArgumentTypeError(f"'{text}' exists and is no earlier output: give another name")
        if not os.access(folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"'{text}': there is no folder {folder} to write in")
        return text
    return output_file


def run_name(text):
    """Check the name of a folder below runs/ (an argparse type)."""
    if not text or text != Path(text).name or text.startswith("."):
        raise argparse.ArgumentTypeError(f"'{text}' is not a plain name: the run is runs/NAME")
    return text


def add_output_flags(parser, out):
    """Add --out and --overwrite, which claim_folder reads."""
    parser.set_defaults(default_out=out)
    parser.add_argument("--out", default=out, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what another run left in --out")


def add_training_flags(parser, name, batch, lr, steps):
    """Add the flags that both stages share."""
    add = parser.add_argument
    add("--demo", action="store_true", help="tiny sizes on built-in data, no download")
    add("--data", default="data/imagenet/train",
        help="folder of class folders of images, a packed set, or shapes://train, which is built in")
    add("--weights", help="folder of pretrained files (default: $SVG_WEIGHTS or weights/)")
    add("--name", type=run_name, default=name, help="folder of the run below runs/")
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
    add("--workers", type=not_negative, default=min(8, os.cpu_count() or 8),
        help="data loading processes per training process")
    add("--log-every", type=positive, default=100, help="steps between progress lines")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--preview-every", type=positive, default=5000, help="steps between preview grids")
    add("--milestone-every", type=positive, default=50_000,
        help="steps between checkpoints that stay for good")


def add_speed_flags(parser):
    """Add the flags that training and sampling share."""
    add_precision_flag(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile",
                        default=torch.cuda.is_available())


def add_precision_flag(parser):
    """Add --precision."""
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"),
        default="bf16" if torch.cuda.is_available() else "fp32",
        help="of the models' arithmetic; weights, losses, statistics and the sampler's state are fp32")


# -- A training step ---------------------------------------------------------------------------------------

def local_batch(args):
    """Return this process's share of the images of a step; raises UserError if they do not divide."""
    if args.batch % (world_size() * args.accumulate):
        parts = f" times --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise UserError(f"--batch {args.batch} does not divide by the {world_size()} processes{parts}")
    return args.batch // world_size()


def data_parallel(model):
    """Wrap a model in DistributedDataParallel, if there are several processes."""
    if world_size() == 1:
        return model
    # Buffers are left alone: every rank computes the same ones, and a frozen encoder is all buffers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch renames the flag and gives it another meaning
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(*models):
    """Compile each block of the transformers in some models, of which equal ones share a graph."""
    torch._dynamo.config.recompile_limit = 64  # two kinds of ViT, training and eval, last batches
    torch._dynamo.config.optimize_ddp = False  # blocks are smaller than its buckets already
    # Channels last also where a convolution narrows: stage 1 is 7% faster on an H200.
    torch._inductor.config.force_layout_optimization = True
    for model in models:
        for module in model.modules():
            for block in getattr(module, "blocks", ()):
                block.compile(dynamic=False)


def seed_step(seed, step, rank=0):
    """Make every random number of a step a function of (seed, step, rank), so that a resume repeats it."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def micro_batches(count, models, *tensors):
    """Yield `count` equal parts of the tensors; DDP models exchange gradients in the last part's backward."""
    parts = zip(*(t.chunk(count) for t in tensors), strict=True)
    for i, part in enumerate(parts, 1):
        for model in models:
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = i == count
        yield part


def optimizer_step(*optimizers, clip=0.0):
    """Clip each optimiser's gradients and step; if any gradient is not finite, change nothing.

    Returns the first one's gradient norm and whether the step was skipped, on the device, unawaited.
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
            optimizer.found_inf = skipped.float()  # the input that a GradScaler gives to fused optimisers
            optimizer.step()
        elif not skipped:
            optimizer.step()
    return norms[0], skipped


# -- What a program shows ----------------------------------------------------------------------------------

def device_name(device):
    """Return the name of a GPU, or the number of threads of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_gib(device):
    """Return the most memory in GiB that this process has used: of a GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def say(text):
    """Print a line, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def say_start(device, precision, *parts):
    """Print the line that opens a program: device, precision, then what it works on and where it writes."""
    processes = f"{world_size()} x " if world_size() > 1 else ""
    say(" | ".join([f"{processes}{device_name(device)}, {precision}", *parts]))


def describe(dataset, name):
    """Return "photos: 1,000 images, 20 classes (arch, bear, ...)", with as many names as fit a line."""
    shown = textwrap.shorten(", ".join(dataset.classes), 150, break_on_hyphens=False, placeholder=" ...")
    return f"{name}: {len(dataset):,} images, {len(dataset.classes):,} classes ({shown})"


def millions(**models):
    """Return "encoder 28.7M, decoder 43.1M parameters"."""
    counts = {name: sum(t.numel() for t in (*model.parameters(), *model.buffers()))
              for name, model in models.items()}
    return ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items()) + " parameters"


def progress(batches, what, total, count=len):
    """Pass batches on, and show at times how many of `total` images, over all processes, are done.

    count(batch): the images of a batch.
    """
    start = time.time()
    shown = start
    done = 0
    for batch in batches:
        yield batch
        done = min(total, done + count(batch) * world_size())
        now = time.time()
        if now - shown > max(3, (now - start) / 10):
            shown = now
            rate = done / (now - start)
            say(f"{what}: {done:,}/{total:,} images  {rate:.1f} images/s  "
                f"{timedelta(seconds=(total - done) // rate)} left")


# -- Folders that a program writes -------------------------------------------------------------------------

# Flags that do not decide what pictures show: where things lie, and speed.
PLACE_FLAGS = {"function", "default_out", "out", "overwrite", "npz", "export", "weights", "demo", "ckpt",
               "ae", "any_ae", "latent_stats", "batch", "workers", "compile"}


def claim_folder(args, names, models):
    """Make the folder --out this program's: remove what an earlier run wrote there, and write a new record.

    names: the files to write, as paths below the folder; models: fingerprints, which with the other flags
    decide what they show. Only what the record lists is ever removed. Raises UserError for a folder that
    holds anything else, so that no FID mixes two sources, and without --overwrite for another run's pictures
    outside of the default folder, or where the record was not written in this folder but copied or unpacked
    into it. Hidden files are left alone.
    """
    out = Path(args.out)
    settings = {name: value for name, value in vars(args).items() if name not in PLACE_FLAGS}
    settings = json.loads(json.dumps({**settings, **models}, default=str))
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        record = files.read_record(out)
        written = set(record.get("files", []))
        found = {path.name for path in out.iterdir()}
        if record:  # a link would lead out of the folder; pathlib lists it, and does not follow it
            found = {str(path.relative_to(out)) for path in out.rglob("*")
                     if path.is_file() or path.is_symlink()}
            found = {name for name in found - {files.RECORD} if not re.search(r"(^|/)\.", name)}
        if found - written:
            raise UserError(f"--out {out} holds {min(found - written)}, which is not of this program: give "
                            f"another --out, or move it away")
        inode = out.stat().st_ino
        same = record.get("settings") == settings or args.out == args.default_out
        if record and not (same and record.get("inode") == inode) and not args.overwrite:
            raise UserError(f"--out {out} already holds a different run of {len(written)} files: give "
                            f"another --out, or --overwrite")
        for name in found:
            (out / name).unlink()
        record = {"program": "SVG", "settings": settings, "files": names, "inode": inode}
        files.write_json(out / files.RECORD, record)
    barrier()


# -- Training runs -----------------------------------------------------------------------------------------

# Flags that may change when a run resumes: its length, its output, its speed, and where files lie that
# fingerprints identify.
FREE_FLAGS = {"steps", "workers", "log_every", "save_every", "preview_every", "name", "weights", "data", "ae",
              "encoder", "compile", "recompute", "cache"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # sent by clusters, people, SLURM
NUMBERED = re.compile(r"\d{7,}\.pt")  # a checkpoint under the number of its step
MAX_SKIPPED = 20  # steps in a row without a finite gradient after which training stops


def read_log(path):
    """Read the entries of a log.jsonl, without lines that a full disk has cut."""
    entries = []
    if os.path.exists(path):
        for line in Path(path).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def latest_run(stage, **settings):
    """Return the newest last.pt below runs/ of a stage with these settings (demo=True), or None."""
    found = []
    for last in Path("runs").glob("*/last.pt"):
        config = files.read_json(last.with_name("config.json"))
        if {"stage": stage, **settings}.items() <= config.items():
            found.append(last)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Run:
    """The folder of one training run: only rank 0 writes, and every rank resumes from the same last.pt.

    stage: the kind of its checkpoints; trained_on: the fingerprint of the frozen model before it; facts: what
    else must not change when the run resumes, besides the flags.
    """

    def __init__(self, stage, args, trained_on, **facts):
        self.path = Path("runs") / args.name
        self.last = self.path / "last.pt"
        self.stage = stage
        self.args = args
        self.trained_on = trained_on
        self.corrupt = set()
        self.signal = 0
        config = {"stage": stage, **vars(args), "trained_on": trained_on, **facts}
        self.config = json.loads(json.dumps(config, default=str))
        self.check_folder()
        barrier()
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_folder()
            self.check_folder()  # another start may have come first
            for leftover in self.path.glob(".*.[0-9]*.tmp"):  # of a process that was killed while it saved
                leftover.unlink()

    def check_folder(self):
        """Raise UserError if the folder holds another run or something else."""
        before = files.read_json(self.path / "config.json")
        names = {path.name for path in self.path.glob("[!.]*")}
        if not {"stage", "trained_on"} <= before.keys() and names - {"last.pt", "autoencoder.pt"}:
            raise UserError(f"{self.path} is not empty and holds no run; give another --name")
        if not self.last.exists() and any(NUMBERED.fullmatch(name) for name in names):
            raise UserError(f"{self.path} has checkpoints but no last.pt: copy one of them to last.pt to go "
                            f"on from it, or give another --name")
        changed = [f"{name} {value} (was {before[name]})" for name, value in self.config.items()
                   if name not in FREE_FLAGS and before.get(name, value) != value]
        if changed and self.last.exists():
            raise UserError(f"{self.path} holds a different run: {'; '.join(changed)}; give the same flags "
                            f"to resume it, or another --name")

    def lock_folder(self):
        """Lock the folder until the run ends, in whatever way; loading processes do not inherit the lock."""
        self.lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path} is being written by another process: wait for it, stop it, or give "
                            f"another --name") from None
        except OSError as e:
            warnings.warn(f"{self.path} cannot be locked ({e.strerror}): take care not to start a run twice")

    def resume(self, state):
        """Load last.pt into state, {name: module or optimiser}, cut the log there, return the step or 0."""
        step = 0
        if self.last.exists():
            checkpoint = files.load_checkpoint(self.last)
            with files.reading(self.last, "a checkpoint of this run"):
                if (checkpoint["kind"], checkpoint["trained_on"]) != (self.stage, self.trained_on):
                    raise UserError(f"{self.last} is not of this stage, or was trained on another encoder or "
                                    f"autoencoder")
                sampled = "ema" if "ema" in state else "model"
                files.check_fingerprint(checkpoint[sampled], checkpoint["fingerprint"])
                for name, part in state.items():
                    part.load_state_dict(checkpoint[name])
                step = checkpoint["step"]
            for part in state.values():
                for group in getattr(part, "param_groups", ()):
                    group["lr"] = self.args.lr
            say(f"resuming {self.path} at step {step}")
        if len(set(gather(step))) > 1:
            raise UserError(f"{self.last} is not the same for every process: runs/ must lie on a shared disk")
        self.saved = step  # of last.pt
        log = self.path / "log.jsonl"
        if rank() == 0:
            files.write_json(self.path / "config.json", self.config)
            kept = [json.dumps(entry) + "\n" for entry in read_log(log) if entry["step"] <= step]
            files.write_atomically(log, lambda file: file.write("".join(kept).encode()))
        barrier()
        return step

    def begin(self):
        """From here on STOP_SIGNALS end the run after a step and a save; return whether it is to stop now."""
        for signal_number in STOP_SIGNALS:
            signal.signal(signal_number, self.on_signal)
        self.start = time.time()
        self.skipped_in_a_row = 0
        self.reset_sums()
        return self.stopped()

    def on_signal(self, signal_number, _):
        self.signal = signal_number

    def stopped(self):
        """Whether any process received one of STOP_SIGNALS; every process gets the same answer."""
        return bool(all_reduce(torch.tensor(self.signal)))

    def report_corrupt(self, dataset, indices):
        """Warn once of every corrupt file, on the rank that met it."""
        for i in set(indices.tolist()) - self.corrupt - {-1}:
            self.corrupt.add(i)
            warnings.warn(f"{dataset.name(i)}: not a readable image, skipped ({len(self.corrupt)} so far)")

    def reset_sums(self):
        """Start a new interval between two progress lines."""
        self.since = time.time()
        self.sums = 0
        self.count = 0

    def record(self, step, values, grad_norm, skipped):
        """Add one step's values, {name: scalar tensor}; every --log-every steps write their means.

        The device is not waited for. Raises UserError when MAX_SKIPPED steps in a row had no finite gradient.
        """
        values = {**values, "grad_norm": grad_norm}
        new = torch.stack(list(values.values())).detach()
        self.sums = self.sums + torch.cat([torch.where(skipped, 0, new), skipped[None].float()])
        self.count += 1
        self.skipped_in_a_row = torch.where(skipped, self.skipped_in_a_row + 1, 0)
        # The host waits for a GPU to read it.
        if (skipped.device.type == "cpu" or step % MAX_SKIPPED == 0) and self.skipped_in_a_row >= MAX_SKIPPED:
            count = int(self.skipped_in_a_row)
            raise self.diverged(f"no finite gradient for {count} steps, up to step {step}")
        if step % self.args.log_every == 0 or step == self.args.steps:
            self.log(step, list(values), new.device)
            self.reset_sums()

    def diverged(self, cause):
        """Return the error that ends a run that has diverged."""
        return UserError(f"{cause}: stopped; the last good checkpoint, if any, is {self.last}; to resume "
                         f"with other flags (--clip 1, a lower --lr, --precision fp32) copy it into a new "
                         f"run: runs/NAME/last.pt, --name NAME")

    def log(self, step, names, device):
        """Print a progress line and append to log.jsonl: means over the steps that were not skipped."""
        *means, skipped = (all_reduce(self.sums.cpu()) / world_size()).tolist()
        corrupt = int(all_reduce(torch.tensor(len(self.corrupt))))
        if rank() != 0:
            return
        skipped = round(skipped)
        entry = {}
        if skipped < self.count:
            entry = {name: mean / (self.count - skipped) for name, mean in zip(names, means, strict=True)}
        rate = self.count * self.args.batch / (time.time() - self.since)
        left = timedelta(seconds=(self.args.steps - step) * self.args.batch // rate)
        text = "".join(f"  {name} {value:.4g}" for name, value in entry.items())
        if skipped:
            text += f"  {skipped} skipped"
        say(f"step {step}/{self.args.steps}{text}  {rate:.1f} images/s  {left} left  "
            f"{peak_gib(device):.1f} GiB")
        entry = {"step": step, **entry, "skipped": skipped, "images_per_second": round(rate, 2),
                 "seconds": round(time.time() - self.start, 1), "corrupt": corrupt}
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def picture(self, step, image):
        """Write a preview grid."""
        if rank() == 0:
            files.save_image(self.path / f"preview-{step:07d}.png", image)

    def save(self, step, state, about):
        """Write last.pt, with `about` for its readers, and loss.png; UserError for weights with NaN."""
        bad = [f"{name}.{key}" for name, part in state.items() if isinstance(part, torch.nn.Module)
               for key, value in part.state_dict().items() if not value.isfinite().all()]
        if bad:
            raise self.diverged(f"{len(bad)} tensors are not finite at step {step}, such as {bad[-1]}")
        if rank() == 0:
            checkpoint = {**about, "step": step, "trained_on": self.trained_on,
                          **{name: part.state_dict() for name, part in state.items()}}
            files.save_checkpoint(self.last, checkpoint, before=self.number_last)
            self.saved = step
            curve = figures.loss_curve(read_log(self.path / "log.jsonl"), f"{self.path}: loss by step")
            if curve:
                files.save_image(self.path / "loss.png", curve)
        barrier()

    def number_last(self):
        """Give last.pt, which is about to be replaced, a number; drop older ones that are no milestones."""
        if not self.last.exists():
            return
        numbered = self.path / f"{self.saved:07d}.pt"
        numbered.unlink(missing_ok=True)
        try:
            os.link(self.last, numbered)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.last, numbered)
        for path in self.path.glob("*.pt"):
            number = int(path.stem) if NUMBERED.fullmatch(path.name) else self.saved
            if number < self.saved and number % self.args.milestone_every:
                path.unlink()

    def end(self, step):
        """Unlock the folder, and say how the run ended and how to resume it."""
        if rank() == 0:
            os.close(self.lock)
        if step >= self.args.steps:
            say(f"done: {self.last}")
            return
        name = signal.Signals(self.signal).name if self.signal else "a signal to another process"
        then = f"resumes from {self.last}" if self.last.exists() else "starts again"
        say(f"{name}: stopped after step {step}; the same command {then}")
