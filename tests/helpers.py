"""What the tests share: a case in a folder of its own, the programs' mains, formula weights, golden answers.

assets/golden.npz holds what independent implementations answered for formula weights (see `formula`), and
the names and shapes of the published checkpoints; golden_vae.npz those of the VAEs, golden_timm.npz of timm.
"""
import contextlib
import functools
import gc
import importlib
import io
import json
import multiprocessing.util
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import unittest
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import svg
import train_ae
import train_dit
from lib import data, files, runs, shapes

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers here are a CPU's
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"  # real weights and images; tests that need them skip without
train_ae.ALIGNMENT_IMAGES = train_dit.LATENT_IMAGES = 16  # or every run would draw thousands of images
shapes.dataset = functools.cache(shapes.dataset)  # which stay in memory, once drawn
GOLDEN, MANIFESTS = {}, {}
for name in ("golden", "golden_vae", "golden_timm"):
    GOLDEN |= files.load_npz(ROOT / "assets" / f"{name}.npz")
    MANIFESTS |= json.loads(GOLDEN["manifests"].tobytes())


def formula(key, shape, learned_positions):
    """One tensor as a pure function of its published name and shape (rule of shared/reference/formula.py)."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith(("periods", "bias_mask")) or (key.endswith("pos_embed") and not learned_positions):
        return torch.zeros(shape)  # computed by the architecture
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if key.endswith(("pos_embed", "pos_embedding", "position_embedding.weight")):
        return torch.from_numpy(0.5 * n)
    if len(shape) >= 2:
        return torch.from_numpy(n * np.float32(np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]))))
    if key.endswith("running_var"):
        return torch.from_numpy(1 + 0.1 * np.abs(n))
    return torch.from_numpy(0.1 * n + key.endswith(("weight", "gamma")))


def weights(name, leave_out="-"):
    """A published checkpoint's tensors by the formula, but those whose names begin with `leave_out`."""
    return {k: formula(k, s, name.startswith(("dinov2", "mae", "vit"))) for k, s in MANIFESTS[name].items()
            if not k.startswith(leave_out)}


def image(seed, shape):
    """Sinusoids plus noise, [B, 3, H, W] in [-1, 1] (the rule of formula.py, there in [0, 1])."""
    r, (b, c, h, w) = np.random.RandomState(seed), shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    out = np.empty(shape)
    for i, j in np.ndindex(b, c):
        f, p = r.uniform(1, 6, 4), r.uniform(0, 6.28, 2)
        out[i, j] = 0.5 + 0.25 * np.sin(f[0] * 6.28 * x / w + p[0]) + 0.2 * np.cos(f[1] * 6.28 * y / h + p[1])
    out += 0.05 * r.standard_normal(shape)
    return torch.from_numpy(np.clip(out, 0, 1).astype(np.float32) * 2 - 1)


def normal(seed, *shape):
    """Standard normal numbers by NumPy's RandomState, as in the golden answers."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def state_of(path):
    """What is another once a file was written: its contents or, for speed, a large one's place and time."""
    facts = path.lstat()
    if not path.is_file():
        return None
    return path.read_bytes() if facts.st_size < 1e5 else (facts.st_ino, facts.st_size, facts.st_mtime_ns)


class Case(unittest.TestCase):
    """A test in an empty folder of its own."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())).resolve()
        self.enterContext(contextlib.chdir(self.folder))

    def agree(self, key, actual, rtol=1e-3, atol=1e-4, first=None):
        """A golden answer, or those for the `first` images."""
        actual = np.asarray(torch.as_tensor(actual).detach())
        expected = GOLDEN[key][:first] if first else GOLDEN[key]
        self.assertEqual(expected.shape, actual.shape, key)
        np.testing.assert_allclose(actual, expected, rtol, atol * np.abs(expected).max(), err_msg=key)

    def assert_same(self, a, b, where=""):
        """The same numbers, bit for bit, all the way down."""
        self.assertEqual(type(a), type(b), where)
        if isinstance(a, torch.Tensor):
            self.assertTrue(torch.equal(a, b), where)
        elif isinstance(a, (dict, list)):
            self.assertEqual(len(a), len(b), where)
            for key in a if isinstance(a, dict) else range(len(a)):
                self.assert_same(a[key], b[key], f"{where}/{key}")
        else:
            self.assertEqual(a, b, where)

    def close(self, a, b, tolerance=1e-5):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)

    def snapshot(self):
        return {path: state_of(path) for path in self.folder.rglob("*")}

    def refused(self, command, *words):
        """Exit code 2, one line that holds all `words`, and not a file more, less or different."""
        with self.subTest(command):
            before = self.snapshot()
            code, _, err = run(command)
            self.assertEqual((code, err.count("\n"), err[:7]), (2, 1, "error: "), err)
            for word in words:
                self.assertIn(word, err)
            after = self.snapshot()
            self.assertEqual(before.keys(), after.keys())
            self.assertEqual([p for p in before if before[p] != after[p]], [])

    def refuse_all(self, table):
        """refused() for rows of a command and its words."""
        for command, *words in table:
            self.refused(command, *words)


# Programs that are modules of a folder.
MODULES = {"data": "lib.data", **{name: f"lab.{name}" for name in ("edit", "probe", "demo", "bench")}}


def run(command, *more):
    """A program's real main in this process: "sample --steps 5" -> (exit code, stdout, stderr)."""
    script, *flags = *command.split(), *map(str, more)
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in runs.STOP_SIGNALS}
    with mock.patch("sys.argv", [f"{script}.py", *flags]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            runs.run_main(importlib.import_module(MODULES.get(script, script)).main)
        except SystemExit as e:
            code = e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def ok(command, *more):
    """run() that must succeed in silence; what it printed."""
    code, out, err = run(command, *more)
    assert (code, err) == (0, ""), (command, code, err)
    return out


FORK = multiprocessing.get_context("fork")  # spares each process the import of torch


def be_the_program(command, environment, before, out, err):
    """In a process of its own: what a shell, or torchrun, would start."""
    gc.freeze()  # what is garbage of the process before is not this one's to free
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", 1, closefd=False) for i in (1, 2))
    for number in runs.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.environ |= environment
    torch.set_num_threads(1)  # the threads of the process before are not in this one
    before()
    script, *flags = command
    sys.argv = [f"{script}.py", *flags]
    runs.run_main(importlib.import_module(MODULES.get(script, script)).main)


class Processes:
    """A program in `count` processes, ranks of one group if they are several; read as a Popen is."""

    def __init__(self, command, count, before):
        with socket.create_server(("localhost", 0)) as server:
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        read, write = os.pipe()
        self.stdout = os.fdopen(read)
        self.stderr = Path(tempfile.mkstemp()[1])
        self.ranks = []
        with open(write, "w") as out, open(self.stderr, "w") as err:
            for i in range(count):
                environment = group | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count)}
                inputs = (command, environment, before, out, err)
                self.ranks.append(FORK.Process(target=be_the_program, args=inputs))
                self.ranks[-1].start()
        self.pid = self.ranks[0].pid

    def kill(self):
        for process in self.ranks:
            process.kill()

    def communicate(self):
        """Wait for the end: what it printed since the last reading, and what on stderr."""
        with self.stdout:
            out = self.stdout.read()
        for process in self.ranks:
            process.join()
        self.returncode = next((process.exitcode for process in self.ranks if process.exitcode), 0)
        err = self.stderr.read_text()
        self.stderr.unlink()
        return out, err


def start(command, *more, processes=1, before=lambda: None):
    """Start a program as processes of its own, in each of which before() comes first."""
    return Processes([*command.split(), *map(str, more)], processes, before)


def shell(command, *more, **settings):
    """start() that must succeed; what it printed."""
    process = start(command, *more, **settings)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return out


MINI_AE = "train_ae --demo --batch 8 --log-every 1"
MINI_DIT = ("train_dit --demo --batch 8 --model 2,32,2 --lr 0.01 --ema-decay 0.5 --preview-steps 2 "
            "--log-every 1")


@functools.cache
def trained():
    """A folder in which both --demo stages have run for a few steps, by the real command lines."""
    folder = Path(tempfile.mkdtemp()).resolve()
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), exitpriority=0)  # in a forked process too
    with contextlib.chdir(folder):
        ok(MINI_AE + " --steps 4 --save-every 2")
        ok(MINI_DIT + " --steps 6")
    return folder


def read_log(name):
    """The entries of a run's log."""
    return [json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]


def pictures(folder):
    """The PNG files of a folder by name, uint8 [n, H, W, 3]."""
    return np.stack([np.asarray(Image.open(f)) for f in sorted(Path(folder).glob("*.png"))])


def demo_images(count):
    """The first images of the built-in validation set, [count, 3, 32, 32] in [-1, 1]."""
    return data.to_float(torch.from_numpy(shapes.pictures("shapes://val", count)), "cpu")


def tiny_autoencoder(**residual):
    """An untrained autoencoder around demo.pt's encoder; residual: arguments of its ViT."""
    torch.manual_seed(0)
    return svg.Autoencoder(svg.load_encoder(shapes.DEMO_PT), image_size=32, grid=4,
                           residual={"dim": 32, "depth": 1, "heads": 1, **residual},
                           decoder={"ch": 32, "ch_mult": [1] * 4})


def write_safetensors(path, tensors):
    """Write float32 tensors as a .safetensors file."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for key, value in tensors.items():
        end = start + 4 * value.numel()
        header[key], start = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}, end
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.writelines(v.numpy().tobytes() for v in tensors.values())


def write_pictures(folder, count, first=0):
    """Write drawn shapes as PNG files 0.png, 1.png, ..."""
    Path(folder).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(
            shapes.draw((first + i) % 10, np.random.default_rng(first + i))[0]).save(f"{folder}/{i}.png")


# Both stages on --data at the smallest sizes.
REAL_DATA = (f"--encoder {shapes.DEMO_PT} --image-size 32 --grid 4 --lpips 0 --gan 0 --decoder-channels 32 "
             "--residual-dim 32 --residual-depth 1 --batch 4 --workers 0")
DIT_DATA = "train_dit --batch 4 --ae runs/demo-ae/last.pt"
