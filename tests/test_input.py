"""Bad input: one line that names the file or flag and the remedy, exit code 2, nothing written.

Each row of a table is a command and the words that its error must hold. fid.py's and probe.py's own rows are
in test_fid.py and test_probe.py.
"""
import argparse
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import sample
from lib import files
from tests import helpers
from tests.helpers import DIT_DATA, MINI_AE, MINI_DIT, REAL_DATA, Case, ok, trained

# One step, so that a command that is not refused ends, too.
NEW_AE = MINI_AE + " --name new --steps 1"
NEW_DIT = MINI_DIT + " --name new --steps 1"
REAL_AE = f"train_ae {REAL_DATA} --steps 1"
REAL_DIT = DIT_DATA + " --model 1,32,2 --steps 1"

OFFLINE = ("https://", "no network", "--weights")
MISSING_FILES = [
    ("train_ae --data good", "weights/vit_small_plus_patch16_dinov3_qkvb.lvd1689m.safetensors", *OFFLINE),
    ("train_ae --data good --encoder dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", "ai.meta.com",
     "weights/dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", "vit_small_plus_patch16_dinov3_qkvb"),
    ("train_ae --data good --encoder dinov2_vits14_pretrain.pth --weights w", "w/dinov2_vits14_pretrain.pth",
     *OFFLINE),
    (NEW_AE + " --lpips 1 --weights w", "w/vgg16-397923af.pth", *OFFLINE),
    ("fid good --save-stats x.npz --weights w", "w/pt_inception-2015-12-05-6726825d.pth", *OFFLINE),
]

BAD_FILES = [
    *[(f"train_ae --data good --encoder {file}", file, *words) for file, *words in (
        ("text.pt", "not a readable checkpoint"), ("half.pt", "damaged"), ("string.pt", "str"),
        ("half.safetensors", "damaged"), ("nowhere.pth", "no such file"), ("args.pt", "argparse.Namespace"),
        ("module.pt", "torch.nn.modules.linear.Linear", "state_dict()"), ("bit.pt", "checksum"),
        ("mlp.pth", "patch_embed.proj", "fc.weight"), ("wrong.pth", "Missing key", "blocks.0."))],
    *[(f"sample --ckpt {file}", file, *words) for file, *words in (
        ("text.pt",), ("half.pt",), ("list.pt",), ("ema.pt",), ("mlp.pth",), ("nowhere.pt",), ("sit.pt",),
        ("sit-config.pt", "KeyError"), ("sit-lacks.pt", "Missing key"), ("sit-changed.pt", "fingerprint"),
        ("sit-nan.pt", "fingerprint"))],
    *[(f"train_dit --demo --steps 1 --name new --ae {file}", file) for file in (
        "text.pt", "half.pt", "mlp.pth", "runs/demo-dit/last.pt", "autoencoder.pt", "ae-config.pt",
        "ae-lacks.pt", "ae-changed.pt", "ae-nan.pt")],
    *[(f"sample --latent-stats {file}", *words) for file, *words in (
        ("text.npz", "text.npz"), ("mlp.pth", "mlp.pth"), ("stats.npz", "5 numbers", "72"),
        ("zero-std.npz", "deviations above 0"))],
    *[(f"{REAL_DIT} --data packed-{damage}", f"packed-{damage}", words) for damage, words in (
        ("labels", "not a whole packed set"), ("none", "0 images"), ("half", "not a whole packed set"))],
    *[(f"{stage} --data {folder}", f"--data {folder}", words)
      for stage in (REAL_AE, REAL_DIT)
      for folder, words in (
          ("nowhere", "no such folder"), ("empty", "class folders"), ("hollow", "no images"))],
    (f"{REAL_AE} --data unreadable", "no readable image"),
    (f"{REAL_DIT} --data unreadable --workers 1", "no readable image"),
    ("edit reconstruct empty", "empty: no images"),
]

OUT_OF_RANGE = [
    ("sample", "--steps 0", "--guidance -1", "--guidance nan", "--num 0", "--shift 0", "--shift inf",
     "--seed -1"),
    (NEW_AE, "--steps 0", "--gan -1", "--workers -1", "--residual-channels -1"),
    (NEW_DIT, "--steps -3", "--seed -1", "--label-dropout 2", "--ema-decay 5"),
]

BAD_FLAGS = [
    *[(f"{program} {flag}", flag) for program, *flags in (
        ("sample", "--nonsense", "--dem", "--classes unicorn", "--guidance-interval 1 0"),
        (NEW_AE, "--grid 3", "--decoder-mult 1,1"),
        (NEW_DIT, "--model 2,30,4", "--model S")) for flag in flags],
    *[(f"sample {flag} {value}", flag, *words) for flag, value, *words in (
        ("--npz", "nowhere/x.npz", "nowhere/x.npz", "no folder"), ("--guidance", "1e300", "0 to 1000"),
        ("--npz", "good", "exists"), ("--guidance-interval", "nan 1", "'nan'"), ("--num", 5000 * "9"),
        ("--seed", 26 * "9", "2^63"), ("--classes", "10", "--classes 10", "0 to 9", "arrow"))],
    ("sample --out text.pt/x", "text.pt", "Not a directory"),
    ("sample --out " + 300 * "x", "File name too long"),
    *[(f"data pack good {folder}", f"{folder} already exists") for folder in ("/", "packed-none")],
    *[(f"{MINI_AE} --name {name}", "--name", "runs/NAME") for name in ("a/b", "../x")],
    (NEW_AE + " --decoder-channels 100", "--decoder-channels 100", "32"),
    (NEW_AE + " --residual-dim 145", "--residual-dim 145", "48"),
    ("edit", "reconstruct | redraw | interpolate"),
    *[(f"edit {command}", *words) for command, *words in (
        ("interpolate --class 3", "--seeds"), ("interpolate --seeds 1 2", "--class"),
        ("reconstruct good --num 3", "--num"), ("redraw good/a/0.png", "--box", "--class"))],
    *[(f"edit redraw {picture} --class 3 --box {box}", *words) for picture, box, *words in (
        ("x.png", "9,1,1,9", "--box", "9,1,1,9"), ("x.png", "1,1,9,9", "x.png"),
        ("text.pt", "1,1,9,9", "text.pt", "not a readable"),
        ("good/a/0.png", "1,1,9,99", "--box", "32 x 32"), ("good/a/0.png", "1,1,3,3", "--box", "token"),
        ("good/a/0.png", "1,1,9,9 --class 10", "0 to 9"),
        ("good/a/0.png", "1,1,9,9 --no-zero-init", "--no-zero-init"))],
]

DO_NOT_BELONG_TOGETHER = [
    ("sample --ae other.pt", "runs/demo-dit/last.pt", "other.pt", "--ae"),
    ("train_dit --data good", "train_ae.py", "--ae"),  # only demo runs are there
    (MINI_AE + " --lr 0.1", "runs/demo-ae", "different run", "lr 0.1 (was ", "--name"),
    (MINI_DIT + " --name demo-ae", "runs/demo-ae", "different run"),
    ("sample --steps 2 --out good --overwrite", "good", "not of this program", "--out"),
    ("sample --steps 2 --out text.pt", "text.pt", "File exists"),
    ("sample --steps 2 --out .", "--out . holds", "not of this program"),
    # What a user has is never removed.
    ("sample --steps 2 --out album --overwrite", "album holds", "not of this program"),
    ("sample --steps 2 --num 2 --out ours --overwrite", "ours holds mine.png", "not of this program"),
    ("edit reconstruct good --out good --overwrite", "--out good lies in good"),
    ("edit reconstruct good/a --out good --overwrite", "--out good holds a"),
    ("edit reconstruct good --out good/new", "--out good/new lies in good"),
    ("edit redraw good/a/0.png --box 0,0,9,9 --class 1 --out good", "--out good holds a"),
    ("sample --steps 2 --out repository", "repository holds .git"),
    ("sample --steps 2 --out linked --overwrite", "linked holds overview"),
    ("sample --steps 2 --out torn --overwrite", "torn holds record.json"),
    ("sample --steps 2 --out new --npz new/x.npz", "no folder"),
    ("data pack good foreign", ".foreign.part", "remove it"),
    (NEW_AE + " --name locked", "runs/locked/.lock", "symbolic links"),
    *[(f"{NEW_AE} --name {name}", f"runs/{name}", "holds no run") for name in ("foreign", "other")],
    *[(f"{program} {path}", path, "no earlier output") for program, *paths in (
        ("sample --steps 2 --npz", "good/a/0.png", "arr_0.npz", "runs/demo-dit/last.pt"),
        ("sample --export", "good/a/0.png", "runs/demo-dit/last.pt"), ("fid good --demo --json", "trip.json"),
        ("fid good --demo --save-stats", "good/a/0.png", "text.pt")) for path in paths],
]

RECORD = '{"program": "SVG", "settings": {"steps": 3}, "files": %s}'  # of an earlier run of sample.py
TEXTS = {
    "text.pt": "not a checkpoint\nat all\n", "text.npz": "not an archive\n",
    "unreadable/a/0.png": "no picture", "unreadable/a/1.png": "no picture",
    "runs/foreign/config.json": "[not json",  # a folder below runs/ that is none of ours
    "runs/other/config.json": '{"stage": "prod"}', "runs/other/2019.pt": "precious",
    "album/record.json": '{"files": ["0.png"]}',
    "trip.json": "{}",  # beside a folder, and none of its files
    "repository/.git/config": "precious",
    ".foreign.part/images.npy": "precious",
    "torn/record.json": RECORD % "null",
    "linked/record.json": RECORD % '["000000.png", "overview/samples.png"]',
    "ours/record.json": RECORD % '["000000.png", "../album/0.png"]',
}
TENSORS = {
    "list.pt": [1, 2], "string.pt": "text", "ema.pt": {"ema": 0.999}, "sit.pt": {"kind": "sit"},
    "autoencoder.pt": {"kind": "autoencoder"}, "mlp.pth": {"fc.weight": torch.zeros(2, 2)},
    "args.pt": {"model": {"fc.weight": torch.zeros(2)}, "args": argparse.Namespace(epochs=3)},
    "module.pt": torch.nn.Linear(2, 2), "bit.pt": {"fc.weight": torch.zeros(1000)},
    "wrong.pth": {"cls_token": torch.zeros(1, 1, 384), "norm.weight": torch.zeros(7),
                  "patch_embed.proj.weight": torch.zeros(384, 3, 14, 14), "extra": torch.zeros(1)},
}


def write_files():
    """Write what the tables name, but for checkpoints of training."""
    for path, text in TEXTS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    for path, value in TENSORS.items():
        torch.save(value, path)
    helpers.write_safetensors("half.safetensors", {"cls_token": torch.zeros(1, 1, 384)})
    os.truncate("half.safetensors", 200)
    whole = bytearray(Path("bit.pt").read_bytes())
    whole[2000] ^= 4  # among the numbers
    Path("bit.pt").write_bytes(whole)
    np.savez("arr_0.npz", np.zeros(5))
    np.savez("stats.npz", mean=np.zeros(5), std=np.ones(5))
    np.savez("zero-std.npz", mean=np.zeros(72), std=np.zeros(72))
    for damage, count, labels in (("labels", 2, [0, 1]), ("none", 0, []), ("half", 1, [0, 0])):
        os.makedirs(f"packed-{damage}")
        np.save(f"packed-{damage}/images.npy", np.zeros((count, 32, 32, 3), np.uint8))
        np.save(f"packed-{damage}/labels.npy", np.array(labels, int))
        Path(f"packed-{damage}/classes.json").write_text('["a"]')
    for folder in ("empty", "w", "hollow/a", "runs/locked"):
        os.makedirs(folder)
    helpers.write_pictures("good/a", 2)
    for path in ("album/0.png", "ours/mine.png", "trip.png"):
        shutil.copy("good/a/0.png", path)
    os.symlink("../good", "linked/overview")
    os.symlink("../../nowhere", "runs/locked/.lock")


def write_checkpoints():
    """Write a trained pair without its optimisers, and copies of both with one thing wrong in each."""
    for kind, run, part in (("sit", "demo-dit", "ema"), ("ae", "demo-ae", "model")):
        trained_run = trained() / "runs" / run
        shutil.copytree(trained_run, f"runs/{run}", ignore=shutil.ignore_patterns("*.pt"))
        shutil.copy(trained() / "runs/demo-dit/autoencoder.pt", "runs/demo-dit")
        whole = files.load_checkpoint(trained_run / "last.pt")
        whole = {key: value for key, value in whole.items() if key not in ("opt", "opt_disc", "disc")}
        torch.save(whole, f"runs/{run}/last.pt")
        weights = whole[part]
        key = next(key for key, value in weights.items() if value.ndim == 2)
        changed = {**weights, key: weights[key] + 1}
        rest = {name: value for name, value in weights.items() if name != key}
        torch.save({**whole, "config": {"model": {}}}, f"{kind}-config.pt")
        torch.save({**whole, part: rest}, f"{kind}-lacks.pt")
        torch.save({**whole, part: changed}, f"{kind}-changed.pt")
        torch.save({**whole, part: {**weights, key: weights[key] * torch.nan}}, f"{kind}-nan.pt")
    torch.save({**whole, part: changed, "fingerprint": files.fingerprint(changed)}, "other.pt")
    shutil.copy("runs/demo-ae/last.pt", "half.pt")
    os.truncate("half.pt", os.path.getsize("half.pt") // 2)


class BadInput(Case):
    @classmethod
    def setUpClass(cls):
        cls.files = cls.enterClassContext(tempfile.TemporaryDirectory())
        with contextlib.chdir(cls.files):
            write_files()
            write_checkpoints()

    def setUp(self):
        super().setUp()
        shutil.copytree(self.files, ".", symlinks=True, dirs_exist_ok=True)

    def test_missing_weights_say_where_to_get_them(self):
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            self.refuse_all(MISSING_FILES)

    def test_damaged_and_foreign_files_and_bad_data_are_named(self):
        self.refuse_all(BAD_FILES)

    def test_flags_out_of_range_or_out_of_place_are_named(self):
        for program, *flags in OUT_OF_RANGE:
            for flag, value in map(str.split, flags):
                self.refused(f"{program} {flag} {value}", flag, f"'{value}'")
        self.refuse_all(BAD_FLAGS)

    def test_things_that_do_not_belong_together_are_refused(self):
        self.refuse_all(DO_NOT_BELONG_TOGETHER)

    def test_processes_that_cannot_share_the_work_are_refused(self):
        with mock.patch("lib.runs.world_size", lambda: 3):
            self.refuse_all([(NEW_AE, "--batch 8", "3 processes"), (NEW_DIT, "--batch 8", "3 processes")])
        shutil.copy(trained() / "runs/demo-ae/last.pt", "runs/demo-ae")
        with mock.patch("lib.runs.gather", lambda step: [step, step + 1]):
            self.refused(MINI_AE + " --steps 4 --save-every 2", "runs/demo-ae/last.pt", "shared disk")

    def test_only_what_the_record_lists_is_replaced(self):
        before = self.snapshot()
        ok("edit redraw trip.png --box 0,0,16,16 --class star --steps 2 --out trip")
        ok("edit redraw trip.png --box 0,0,16,16 --class disc --steps 2 --out trip --overwrite")
        Path("ours/mine.png").unlink()
        Path("ours/.notes").write_text("hidden")
        Path("ours/000000.png").write_text("an old sample")
        ok("sample --steps 2 --num 1 --out ours --overwrite")
        after = self.snapshot()
        self.assertEqual({p.name for p in before if before[p] != after.get(p)}, {"mine.png", "record.json"})
        self.assertTrue(Path("ours/.notes").exists())
        ok("sample --steps 2 --num 1")
        shutil.move("samples", "elsewhere")
        shutil.copytree("elsewhere", "samples")  # as from an archive: who knows whose pictures these are?
        self.refused("sample --steps 2 --num 1", "samples already holds a different run", "--overwrite")
        ok("sample --steps 2 --num 1 --overwrite")

    def test_names_of_classes_that_are_numbers_are_names(self):
        sit = mock.Mock(meta={"classes": ["0", "1", "10", "2"]}, num_classes=4)
        self.assertEqual(sample.class_numbers(["2", "10"], sit), [3, 2])
        with self.assertRaisesRegex(files.UserError, "--classes 3: the model has classes"):
            sample.class_numbers(["3"], sit)

    def test_samples_of_two_commands_are_never_mixed(self):
        ok("sample --steps 2 --num 1 --out v1.25")
        self.refused("sample --steps 3 --num 1 --out v1.25", "v1.25", "different run", "--overwrite")
        ok("sample --steps 3 --num 1 --out v1.25 --overwrite")
        before = self.snapshot()
        ok("sample --steps 2 --num 1 --out v1.55")
        after = self.snapshot()
        self.assertEqual([p for p in before if before[p] != after[p]], [])  # each with its own overview
        ok("sample --steps 2 --num 3")
        ok("sample --demo --steps 3 --num 2")  # replaces its own earlier run in the default folder
        self.assertEqual(len(helpers.pictures("samples")), 2)
