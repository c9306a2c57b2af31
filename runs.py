"""What every program needs to run: processes, flags, the parts of a training step, timing, the run's folder.

Nothing here knows the method. `Run` is one training run: runs/<name>/ with config.json, log.jsonl, loss.png,
last.pt, numbered checkpoints and preview grids.
"""
import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import figures
import files
from files import UserError

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


def init_process_group(backend):
    """Join torchrun's process group, also when torchrun has restarted this process.

    torchrun keeps one store through all restarts, in which a new process finds the addresses of dead ones
    (https://github.com/pytorch/pytorch/issues/135712). So every restart prefixes its keys with its number.
    Several nodes may count restarts differently; they need torchrun's own way to make a new store.
    """
    env = os.environ
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    nodes = restarts and env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]
    if nodes and env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise UserError("--max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for "
                        "torchrun, or its restarts fail (https://github.com/pytorch/pytorch/issues/135712)")
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    settings = {}
    if restart != "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        settings = {"store": dist.PrefixStore(f"restart {restart}", store),
                    "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}
    dist.init_process_group(backend, timeout=timedelta(hours=1), **settings)


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
        init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo for tensors on the host
    if cuda:
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    limit_memory()
    return torch.device("cpu")


def limit_memory():
    """Let this process allocate no more than the memory that is free now, shared among the processes here.

    Then too large a batch ends in an error and not in the system's killing the process without a word.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):  # no Linux: no limit
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * (int(fields["MemAvailable"].split()[0]) + int(fields["SwapFree"].split()[0]))
        for container in ("memory.max", "memory/memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max": none
                free = min(free, int(Path("/sys/fs/cgroup", container).read_text()))
        own = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        limit = own + free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def autocast(device, precision):
    """Return the context in which models run: bf16 autocast, or nothing for fp32 and tf32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fetch_weights(name, weights_dir=None):
    """Return the path of a pretrained file; the first process downloads it if it is openly published."""
    if rank() == 0:
        files.download_weights(name, weights_dir)
    barrier()
    return files.find_weights(name, weights_dir)  # the loader reports a file that is missing


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EISDIR,
                errno.ENOTDIR, errno.EEXIST)
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|bad_alloc|could not create a (memory|primitive)")


def run_main(main):
    """Run a program's main; a UserError becomes one line on stderr and exit code 2."""
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
        message = error_line(e)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        while held_locks:
            held_locks.popitem()[1].close()


def error_line(error):
    """Return what to tell the user of an exception in one line, or None for a mistake of this program."""
    if isinstance(error, UserError):
        # A loading process wraps an error into its traceback, of which the message is the end.
        return str(error).strip().split("UserError: ")[-1]
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return (f"out of memory ({files.short_error(error)}): give a smaller --batch; training also takes "
                f"--accumulate N, which computes the batch in N parts, and --recompute")
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return f"{error.filename or 'a file'}: {error.strerror}; make room, or give another place"
    return None


# -- Flags -------------------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default but those of switches, and leaves the docstring's lines as they are."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is True or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line.

    demo: the defaults that --demo replaces. Parser.defaults: those without --demo, of the last one that ran.
    """
    defaults = types.MappingProxyType({})

    def __init__(self, doc, demo=None, **settings):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **settings)
        self.demo = demo or {}

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        Parser.defaults = {action.dest: action.default for action in self._actions}
        if getattr(parsed, "demo", False) and self.demo:
            self.set_defaults(**self.demo)
            parsed, rest = super().parse_known_args(args)
        return parsed, rest


def number(low=0.0, high=math.inf, above=-math.inf):
    """Return an argparse type: a finite number from low to high, and above `above`."""
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


def number_or_auto(text):
    """Check "auto" or a number above 0 (an argparse type)."""
    return text if text == "auto" else number(above=0)(text)


def whole(low):
    """Return an argparse type: a whole number of at least `low`, and of 63 bits, as PyTorch's."""
    def parse(text):
        if not text.isdecimal() or not low <= int(text[:99]) < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to 2^63")
        return int(text)
    return parse


positive = whole(1)
not_negative = whole(0)


def new_folder(text):
    """Check that a folder can be written or made at a path, its parents too if need be (an argparse type)."""
    path = Path(text).absolute()
    if max(len(os.fsencode(part)) for part in path.parts) > 200:
        raise argparse.ArgumentTypeError(f"'{text}': too long a name")
    place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise argparse.ArgumentTypeError(f"'{text}': {place} is not a folder that can be written")
    return text


def new_file(text):
    """Check that a file can be written at a path, whose folder must be there (an argparse type)."""
    path = Path(text).absolute()
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else "no such folder"
        raise argparse.ArgumentTypeError(f"'{text}': {problem}")
    new_folder(path.parent)
    return text


def run_name(text):
    """Check the name of a folder below runs/ (an argparse type)."""
    if not text or text != Path(text).name or text.startswith("."):
        raise argparse.ArgumentTypeError(f"'{text}' is not a plain name: the run is runs/NAME")
    new_folder(Path("runs", text))
    return text


def add_output_flags(parser, out):
    """Add --out and --overwrite, which claim_folder reads."""
    parser.set_defaults(default_out=out)
    parser.add_argument("--out", type=new_folder, default=out, help="folder to write")
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
    add("--workers", type=not_negative, default=8, help="data loading processes per training process")
    add("--log-every", type=positive, default=100, help="steps between progress lines")
    add("--save-every", type=positive, default=5000, help="steps between checkpoints")
    add("--preview-every", type=positive, default=5000, help="steps between preview grids")
    add("--keep", type=positive, default=2, help="how many of the newest numbered checkpoints stay")
    add("--milestone-every", type=positive, default=50_000,
        help="steps between checkpoints that stay for good")


def add_speed_flags(parser):
    """Add the flags that training, sampling and scoring share."""
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--precision", choices=("fp32", "tf32", "bf16"), default="bf16" if cuda else "fp32",
        help="of the models' arithmetic; weights, losses, statistics and the sampler's state are fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="use torch.compile")
    add_bench_flag(parser)


def add_bench_flag(parser):
    """Add --bench N."""
    parser.add_argument("--bench", type=positive, metavar="N",
                        help="only time N steps on synthetic data; no data, weights or run needed")


# -- A training step ---------------------------------------------------------------------------------------

def local_batch(args):
    """Return this process's share of the images of a step; raises UserError if they do not divide."""
    if args.batch % (world_size() * args.accumulate):
        parts = f" times --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        raise UserError(f"--batch {args.batch} does not divide by the {world_size()} processes{parts}")
    return args.batch // world_size()


def data_parallel(model):
    """Wrap a model in DistributedDataParallel, if there are several processes.

    Buffers are left alone: every rank computes the same ones, and a frozen encoder is all buffers.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch renames the flag and gives it another meaning
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(*models):
    """Compile every transformer block by itself.

    Equal blocks share one graph, and DDP can send the gradients of the last ones while the first are still
    being computed.
    """
    torch._dynamo.config.recompile_limit = 64  # two kinds of ViT, training and eval, last batches
    torch._dynamo.config.optimize_ddp = False  # blocks are smaller than its buckets already
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False)


def seed_step(seed, step, rank=0):
    """Make every random number of a step a function of (seed, step, rank), so that a resume repeats it."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def micro_batches(count, models, *tensors):
    """Yield `count` equal parts of the tensors.

    DDP models exchange gradients only in the last part's backward pass.
    """
    parts = list(zip(*(t.chunk(count) for t in tensors), strict=True))
    for i, part in enumerate(parts):
        with contextlib.ExitStack() as stack:
            for model in models:
                if i + 1 < len(parts) and isinstance(model, DistributedDataParallel):
                    stack.enter_context(model.no_sync())
            yield part


def optimizer_step(*optimizers, clip=0.0):
    """Clip each optimiser's gradients and step; if any gradient is not finite, change nothing.

    Returns the first optimiser's gradient norm and whether the step was skipped. Both are tensors on the
    device, so that the host does not wait.
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


# -- Timing ------------------------------------------------------------------------------------------------

# Dense TFLOP/s by the maker's datasheets of the SXM boards.
HOPPER = {"bf16": 989, "tf32": 494.5}
PEAK_TFLOPS = {"H100 80GB HBM3": HOPPER, "H200": HOPPER, "A100-SXM": {"bf16": 312, "tf32": 156}}


def synthetic_images(n, size, device):
    """Return random uint8 images [n, size, size, 3] in the kind of memory that a loader uses."""
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8)
    return images.pin_memory() if device.type == "cuda" else images


def count_flops(step):
    """Return the floating-point operations that PyTorch counts in one call of step()."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def median_seconds(step, count, device):
    """Return the median duration of `count` calls of step(), after a warm-up."""
    for _ in range(3):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return float(np.median(np.diff(marks)))
    # The host runs ahead, so the device's own clock counts.
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]))


def bench(args, device, make, batch, **about):
    """Time args.bench steps on synthetic data: print a line to read and one of JSON.

    make(n) -> a function that runs one step on n images; batch: images per step over all processes. FLOPs are
    those counted for one image, times the batch.
    """
    local_batch = batch // world_size()
    flops = local_batch * count_flops(make(1))
    seconds = median_seconds(make(local_batch), args.bench, device)
    tflops = flops / seconds / 1e12
    name = device_name(device)
    memory = peak_gib(device)
    peak_share = None
    for board, peaks in PEAK_TFLOPS.items():
        if board in name and args.precision in peaks:
            peak_share = round(tflops / peaks[args.precision], 3)
    if rank() == 0:
        print(f"{' '.join(map(str, about.values()))}: {1000 * seconds:.1f} ms a step of {batch} images "
              f"(median of {args.bench}), {batch / seconds:.3g} images/s, {tflops:.2f} TFLOP/s a process, "
              f"all its models included, {memory:.2f} GiB")
        print(json.dumps({
            **about, "batch": batch, "precision": args.precision, "compile": args.compile,
            "processes": world_size(), "device": name, "torch": torch.__version__, "steps": args.bench,
            "step_seconds": round(seconds, 5), "images_per_second": round(batch / seconds, 2),
            "tflops": round(tflops, 3), "peak_share": peak_share, "peak_gib": round(memory, 2)}))


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


def total_gib(device):
    """Return the memory of a GPU in GiB; infinite for other devices, of which others take their share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return math.inf


def duration(seconds):
    """Format seconds as h:mm:ss, with any number of hours."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# -- What a program shows ----------------------------------------------------------------------------------

def say(text):
    """Print a line, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def say_start(device, precision, *parts):
    """Print the line that opens a program: device, precision, then what it works on and where it writes."""
    processes = f"{world_size()} x " if world_size() > 1 else ""
    say(" | ".join([f"{processes}{device_name(device)}, {precision}", *parts]))


def describe(dataset, name):
    """Return "photos: 1,000 images, 20 classes"."""
    return f"{name}: {len(dataset):,} images, {len(dataset.classes):,} classes"


def millions(**models):
    """Return "encoder 28.7M, decoder 43.1M parameters"; a model of None is left out."""
    counts = {name: sum(t.numel() for t in (*model.parameters(), *model.buffers()))
              for name, model in models.items() if model is not None}
    return ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items()) + " parameters"


def due(start, shown):
    """Whether to show progress again: every 3 seconds at first, later when a tenth more time has passed."""
    now = time.time()
    return rank() == 0 and now - shown > max(3, (now - start) / 10)


def progress(batches, what, total, count=len):
    """Pass batches on, and show the images done and the time left.

    total: images over all processes, whose shares are equal; count(batch): images of a batch.
    """
    start = time.time()
    shown = start
    done = 0
    for batch in batches:
        yield batch
        done = min(total, done + count(batch) * world_size())
        if due(start, shown):
            shown = time.time()
            rate = done / (shown - start)
            say(f"{what}: {done:,}/{total:,} images  {rate:.1f} images/s  "
                f"{duration((total - done) / rate)} left")


def computed_ahead(function, items):
    """Yield function(item) of each item, the next one being computed in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        results = collections.deque()
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > 1:
                yield results.popleft().result()
        for result in results:
            yield result.result()


# -- Folders that a program writes -------------------------------------------------------------------------

LOCK = ".svg.lock"
held_locks = {}  # folder: its open lock file


def lock_folder(folder):
    """Make a folder and lock it until this program ends, in whatever way; UserError says who has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in held_locks:
        return
    file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115 (it stays open)
    with contextlib.suppress(OSError):  # of a file system that has no locks
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a child process does not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            raise UserError(f"{folder} is being written by {holder}: wait for it, stop it, or give another "
                            f"name") from None
    held_locks[key] = file
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def unlock_folder(folder):
    """Give a lock back before the program ends; its file stays, or two could lock two files."""
    held_locks.pop(folder.resolve()).close()


def is_locked(folder):
    """Whether another process is writing a folder."""
    lock = Path(folder, LOCK)
    if Path(folder).resolve() in held_locks or not os.access(lock, os.R_OK):  # closing it would end our own
        return False
    with open(lock, "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            return isinstance(e, (BlockingIOError, PermissionError))  # else: no locks there
    return False


def lies_in(path, folder):
    """Whether a path is a folder, or lies in it."""
    path = Path(path).resolve()
    return Path(folder).resolve() in (path, *path.parents)


def check_owned(out, record):
    """Raise UserError for a folder that holds anything that its record does not list, or a link."""
    foreign = set(os.listdir(out)) - {LOCK} if out.exists() else set()
    if record:
        own = {*record["files"], files.RECORD}
        paths = {str(path.relative_to(out)): path for path in out.rglob("*")}
        foreign = {name for name, path in paths.items() if path.is_symlink() or (
            path.is_file() and name not in own
            and not any(part.startswith(".") for part in Path(name).parts))}
    if foreign:
        raise UserError(f"--out {out} holds {min(foreign)}, which is not of this program: give another "
                        f"--out, or move it away")


def claim_folder(args, settings, names, inputs=()):
    """Make the folder --out this program's: remove what an earlier run wrote there, and write a new record.

    settings: what decides the pictures. names: the files to write, as paths below the folder. inputs: what
    the program reads. The record lists the files; nothing else is ever removed. Raises UserError for a folder
    that holds an input or anything that is not of this program, so that no FID mixes two sources; for another
    run's pictures without --overwrite, unless --out is the default and they are a thousand at most.
    """
    out = Path(args.out)
    if rank() == 0:
        for path in inputs:
            if lies_in(path, out) or lies_in(out, path):
                raise UserError(f"--out {out} and the input {path} hold one another: give another --out")
        before = files.read_record(out)
        check_owned(out, before)
        written = before.get("files", [])
        same = before.get("settings") == settings
        few = args.out == args.default_out and len(written) <= 1001  # with the overview
        if written and not (same or few or args.overwrite):
            raise UserError(f"--out {out} already holds a different run of {len(written)} files: give "
                            f"another --out, or --overwrite")
        lock_folder(out)
        for name in () if same else written:
            path = out / name
            if lies_in(path.parent, out) and path.is_file():
                path.unlink()
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
        files.write_record(out, settings, names)
    barrier()


# -- Training runs -----------------------------------------------------------------------------------------

# Flags that may change when a run resumes: its length, its output, its speed, and where files lie that
# fingerprints identify.
FREE_FLAGS = {"steps", "workers", "log_every", "save_every", "preview_every", "keep", "milestone_every",
              "name", "weights", "data", "ae", "encoder", "compile", "recompute", "cache"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # sent by clusters, people, SLURM
MAX_SKIPPED = 20  # steps in a row without a finite gradient after which training stops
CHECKPOINTS = {  # stage: kind of its checkpoints, the key of what they were trained on, what else they hold
    "ae": ("autoencoder", "encoder_file", {"disc": dict, "opt_disc": dict, "fingerprint": str}),
    "vae": ("vae", None, {"disc": dict, "opt_disc": dict, "fingerprint": str}),
    "dit": ("sit", "autoencoder", {"ema": dict, "latent_mean": torch.Tensor, "latent_std": torch.Tensor})}


def read_log(path):
    """Read the entries of a log.jsonl, without lines that a full disk has cut, or that are none of ours."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
    return entries


def latest_run(stage, **settings):
    """Return the newest last.pt below runs/ of a stage with these settings (demo=True), or None."""
    found = []
    for config in Path("runs").glob("*/config.json"):
        recorded = files.read_json(config)
        last = config.with_name("last.pt")
        if {"stage": stage, **settings}.items() <= recorded.items() and last.exists():
            found.append(last)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Run:
    """The folder of one training run: only rank 0 writes, and every rank resumes from the same last.pt.

    facts: what must not change when the run resumes, besides the flags.
    """

    def __init__(self, stage, args, facts):
        self.path = Path("runs") / args.name
        self.last = self.path / "last.pt"
        self.stage = stage
        self.args = args
        self.facts = facts
        self.corrupt = set()
        self.signal = 0
        config = {"stage": stage, **vars(args), **facts}
        self.check_folder(config)
        barrier()
        if rank() == 0:
            lock_folder(self.path)
            for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it saved
                leftover.unlink()
            files.write_json(self.path / "config.json", config)

    def check_folder(self, config):
        """Raise UserError if the folder holds another run or something else."""
        config_file = self.path / "config.json"
        ours = config_file.exists() or self.last.exists()
        if not ours and self.path.exists() and set(os.listdir(self.path)) - {LOCK}:
            raise UserError(f"{self.path} is not empty and holds no run; give another --name")
        if not (config_file.exists() and self.last.exists()):
            return
        before = files.read_json(config_file)
        changed = []
        for key, value in config.items():
            was = before.get(key, Parser.defaults.get(key, value))  # a flag can be newer than the run
            if key not in FREE_FLAGS and value != was:
                name = f"--{key.replace('_', '-')}" if key in vars(self.args) else key
                changed.append(f"{name} {value} (was {was})")
        if changed:
            raise UserError(f"{self.path} holds a different run: {'; '.join(changed)}; give the same "
                            f"flags to resume it, or another --name")

    def resume(self):
        """Return the last checkpoint, or None, and drop log entries after it: the log has each step once."""
        checkpoint = None
        step = 0
        if self.last.exists():
            checkpoint = files.load_checkpoint(self.last)
            self.check_checkpoint(checkpoint)
            step = checkpoint["step"]
        steps = all_reduce(torch.eye(world_size(), dtype=torch.int64)[rank()] * step)  # one of each rank
        if (steps != step).any():
            raise UserError(f"{self.last} is not the same for every process: runs/ must lie on a shared disk")
        log = self.path / "log.jsonl"
        if rank() == 0 and log.exists():
            kept = [json.dumps(entry) + "\n" for entry in read_log(log) if entry["step"] <= step]
            files.write_atomically(log, lambda file: file.write("".join(kept).encode()))
        barrier()
        if checkpoint:
            say(f"resuming {self.path} at step {step}")
        return checkpoint

    def begin(self):
        """Begin the training: from here on STOP_SIGNALS end the run after a step and a save.

        Returns whether it is to stop already.
        """
        for signal_number in STOP_SIGNALS:
            signal.signal(signal_number, self.on_signal)
        self.start = time.time()
        self.shown = 0.0
        self.skipped_in_a_row = torch.tensor(0)
        self.reset_sums()
        return self.stopped()

    def until_signal(self, batches):
        """Pass batches on, one at least, until this process gets one of STOP_SIGNALS."""
        for batch in batches:
            yield batch
            if self.signal:
                return

    def check_checkpoint(self, checkpoint):
        """Raise UserError if last.pt is damaged or of another stage or parent."""
        kind, parent, more = CHECKPOINTS[self.stage]
        if checkpoint.get("kind") != kind:
            raise UserError(f"{self.last} is not of this stage")
        if parent:
            more = {**more, parent: dict}
        files.check_fields(checkpoint, {"step": int, "model": dict, "opt": dict, **more}, self.last)
        if type(checkpoint["step"]) is not int or checkpoint["step"] < 0:
            raise UserError(f"{self.last}: a damaged checkpoint: its step is {checkpoint['step']}")
        if parent and checkpoint[parent].get("fingerprint") != self.facts["trained_on"]:
            raise UserError(f"{self.last} was trained on another {parent.split('_')[0]}")

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
        self.part_sums = {}
        self.count = 0

    def record(self, step, values, grad_norm, skipped, parts=None):
        """Add one step's values; every --log-every steps write their means.

        values: {name: scalar tensor on the device}, which is not waited for. parts: {name: tensor [2], the
        sum and the count of images}; their means go to the log alone. Raises UserError when MAX_SKIPPED steps
        in a row had no finite gradient.
        """
        names = [*values, "grad_norm"]
        new = torch.stack([*values.values(), grad_norm]).detach()
        new = torch.where(skipped, 0, new)
        self.sums = self.sums + torch.cat([new, skipped[None].float()])
        for name, part in (parts or {}).items():
            self.part_sums[name] = self.part_sums.get(name, 0) + torch.where(skipped, 0, part)
        self.count += 1
        self.skipped_in_a_row = torch.where(skipped, self.skipped_in_a_row.to(skipped.device) + 1, 0)
        if skipped.device.type == "cpu" or step % MAX_SKIPPED == 0:  # the host waits for a GPU to read it
            self.check_skipped(step)
        if step % self.args.log_every == 0 or step == self.args.steps:
            self.log(step, names, new.device)
            self.reset_sums()
        elif due(self.start, self.shown):  # the first step too
            self.show(step, dict(zip(names, new.tolist(), strict=True)), new.device)

    def check_skipped(self, step):
        """Raise UserError after MAX_SKIPPED steps in a row without a finite gradient."""
        if self.skipped_in_a_row < MAX_SKIPPED:
            return
        good = "no checkpoint was saved yet"
        if self.last.exists():
            good = f"the last good checkpoint is {self.last}"
        raise UserError(f"no finite gradient for {int(self.skipped_in_a_row)} steps, up to step {step}: "
                        f"stopped; {good}; to resume with other flags (--clip 1, a lower --lr, "
                        f"--precision fp32) copy it into a new run: runs/NAME/last.pt, --name NAME")

    def show(self, step, values, device, skipped=0):
        """Print a progress line with the speed since the last interval began; return images per second."""
        self.shown = time.time()
        rate = self.count * self.args.batch / (self.shown - self.since)
        left = duration((self.args.steps - step) * self.args.batch / rate)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if skipped:
            text += f"  {skipped} skipped"
        say(f"step {step}/{self.args.steps}  {text}  {rate:.1f} images/s  {left} left  "
            f"{peak_gib(device):.1f} GiB")
        return rate

    def log(self, step, names, device):
        """Print a progress line and append to log.jsonl: means over the steps that were not skipped."""
        *means, skipped = (all_reduce(self.sums.cpu()) / world_size()).tolist()
        parts = {name: all_reduce(part.cpu()).tolist() for name, part in self.part_sums.items()}
        corrupt = int(all_reduce(torch.tensor(len(self.corrupt))))
        if rank() != 0:
            return
        skipped = round(skipped)
        good_steps = self.count - skipped
        entry = {name: mean / good_steps if good_steps else math.nan
                 for name, mean in zip(names, means, strict=True)}
        rate = self.show(step, entry, device, skipped)
        entry |= {name: total / count for name, (total, count) in parts.items() if count}
        finite = {name: value for name, value in entry.items() if math.isfinite(value)}
        entry = {"step": step, **finite, "skipped": skipped, "images_per_second": round(rate, 2),
                 "seconds": round(time.time() - self.start, 1), "corrupt": corrupt}
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def picture(self, step, image):
        """Write a preview grid."""
        if rank() == 0:
            files.save_image(self.path / f"preview-{step:07d}.png", image)

    def save(self, checkpoint):
        """Write last.pt, a numbered hard link to it and the loss curve; drop old numbered ones."""
        if rank() == 0:
            files.save_checkpoint(self.last, checkpoint)
            numbered = self.path / f"{checkpoint['step']:07d}.pt"
            numbered.unlink(missing_ok=True)
            try:
                os.link(self.last, numbered)
            except OSError:  # a file system without hard links
                with open(self.last, "rb") as last:
                    files.write_atomically(numbered, functools.partial(shutil.copyfileobj, last))
            old = [path for path in sorted(self.path.glob("[0-9]*.pt"))
                   if path.stem.isdecimal() and int(path.stem) % self.args.milestone_every]
            for path in old[:-self.args.keep]:
                path.unlink()
            curve = figures.loss_curve(read_log(self.path / "log.jsonl"), f"{self.path}: loss by step")
            if curve:
                files.save_image(self.path / "loss.png", curve)
        barrier()

    def end(self, step, whole=True):
        """Say how the run ended, and how to resume it; whole: whether the last save holds all it should."""
        if step >= self.args.steps and whole:
            say(f"done: {self.last}")
            return
        name = signal.Signals(self.signal).name if self.signal else "a signal to another process"
        then = f"resumes from {self.last}" if self.last.exists() else "starts again"
        say(f"{name}: stopped after step {step}; the same command {then}")
