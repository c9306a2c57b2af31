"""Bad input: one line that names the file or flag and the remedy, exit code 2, nothing written.

Each row of a table is a command and the words that its error must hold. fid.py's and probe.py's own rows are
in test_fid.py and test_probe.py.
"""
import os
import shutil
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import files
import shapes
from tests.helpers import (
    DIT_DATA,
    MINI_AE,
    MINI_DIT,
    REAL_DATA,
    Case,
    ok,
    pictures,
    trained,
    write_pictures,
    write_safetensors,
)

NEW_AE = MINI_AE + " --name new"
NEW_DIT = MINI_DIT + " --name new"

MISSING_FILES = [
    ("train_ae --data good", "weights/dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", "ai.meta.com",
     "dinov2_vits14_pretrain.pth"),
    ("train_ae --encoder dinov2_vits14_pretrain.pth --weights w", "w/dinov2_vits14_pretrain.pth", "https://",
     "no network", "--weights"),
    (NEW_AE + " --lpips 1 --weights w", "w/vgg16-397923af.pth", "https://", "no network", "--weights"),
    ("fid good --save-stats x.npz --weights w", "w/pt_inception-2015-12-05-6726825d.pth", "https://",
     "no network", "--weights"),
]

DAMAGED_FILES = [
    # An encoder.
    *[(f"train_ae --data good --encoder ./{file}", file, *words) for file, *words in (
        ("text.pt", "not a readable checkpoint"), ("half.pt", "truncated"), ("string.pt", "str"),
        ("list.safetensors", "not a readable"), ("blocks.pt", "patch_embed"),
        ("zero.pt", "not a readable checkpoint"), ("list.pt", "list"), ("int.pt", "int"),
        ("half.safetensors", "truncated"), ("whole.safetensors", "patch_embed.proj"),
        ("nowhere.pth", "no such file"), ("mlp.pth", "patch_embed.proj", "fc.weight"),
        ("wrong.pth", "missing", "unexpected extra", "[7] instead of [384]"))],
    # A transformer.
    *[(f"sample --ckpt {file}", file) for file in (
        "text.pt", "half.pt", "zero.pt", "list.pt", "int.pt", "ema.pt", "mlp.pth", "nowhere.pt", "sit.pt",
        "string.pt", "nested.pt", "blocks.pt")],
    *[(f"sample --ckpt sit-{damage}.pt", f"sit-{damage}.pt", *words) for damage, *words in (
        ("config-3", "config"), ("config", "describes no SiT"), ("classes-3", "classes"),
        ("classes", "names"), ("autoencoder-3", "autoencoder"), ("autoencoder", "no path, fingerprint"),
        ("latent_mean-3", "latent_mean"), ("ema-3", "ema"), ("text", "not a state dict"),
        ("flipped", "fingerprint"), ("nan", "not finite"), ("numbers", "names"), ("sparse", "dense"),
        ("complex", "latent_std"))],
    # An autoencoder.
    *[(f"train_dit --demo --name new --ae {file}", file) for file in (
        "text.pt", "half.pt", "mlp.pth", "runs/demo-dit/last.pt", "autoencoder.pt", "ae-config-3.pt",
        "ae-config.pt", "ae-encoder_file-3.pt", "ae-text.pt", "ae-flipped.pt", "ae-nan.pt")],
    # Latent statistics.
    *[(f"sample --latent-stats {file}", file) for file in ("text.npz", "zero.npz", "mlp.pth")],
    ("sample --latent-stats stats.npz", "5 channels", "72"),
    ("sample --latent-stats zero-std.npz", "standard deviation"),
    # A packed set.
    *[(f"{DIT_DATA} --data packed-{damage}", f"packed-{damage}", words) for damage, words in (
        ("labels", "labels.npy does not fit"), ("2d", "[2, 1]"), ("none", "no images"),
        ("classes", "names"))],
]

BAD_DATA = [
    *[(f"{stage} --data {folder}", f"--data {folder}", words)
      for stage in (f"train_ae {REAL_DATA}", DIT_DATA)
      for folder, words in (("nowhere", "no such folder"), ("empty", "class folders"),
                            ("hollow", "no images"))],
    (f"train_ae {REAL_DATA} --data unreadable", "no readable image"),
    (f"{DIT_DATA} --data unreadable --workers 1", "no readable image"),
    ("edit reconstruct empty", "reconstruct empty"),
]

BAD_FLAGS = [
    ("sample --steps 0", "--steps", "'0'"),
    ("sample --guidance -1", "--guidance", "'-1'"),
    ("sample --guidance nan", "--guidance", "'nan'"),
    ("sample --num 0", "--num"),
    ("sample --shift 0", "--shift"),
    ("sample --shift inf", "--shift", "'inf'"),
    ("sample --seed -1", "--seed"),
    ("sample --nonsense", "--nonsense"),
    ("sample --dem", "--dem"),
    ("sample --classes 10", "--classes 10", "0 to 9", "arrow"),
    ("sample --classes unicorn", "--classes unicorn"),
    ("sample --npz nowhere/x.npz", "--npz", "nowhere/x.npz", "no such folder"),
    ("sample --npz good", "--npz", "is a folder"),
    ("sample --guidance 1e300", "--guidance", "0 to 1000"),
    ("sample --guidance-interval nan 1", "--guidance-interval", "'nan'"),
    ("sample --guidance-interval 1 0", "--guidance-interval 1 0"),
    ("sample --seed " + 26 * "9", "--seed", "2^63"),
    ("sample --num " + 5000 * "9", "--num"),
    ("sample --out text.pt/x", "--out", "'text.pt/x'", "text.pt is not a folder"),
    ("sample --out " + 300 * "x", "--out", "too long"),
    ("data pack good /", "/ already exists"),
    ("data pack good packed-none", "packed-none", "already exists"),
    (MINI_AE + " --name a/b", "--name", "runs/NAME"),
    (MINI_AE + " --name ../x", "--name", "runs/NAME"),
    (f"train_dit --demo --ae {shapes.DEMO_PT} --bench 1 --batch 64000000", "out of memory", "--batch",
     "--accumulate", "--recompute"),
    (NEW_AE + " --steps 0", "--steps"),
    (NEW_AE + " --gan -1", "--gan", "'-1'"),
    (NEW_AE + " --workers -1", "--workers", "'-1'"),
    (NEW_AE + " --residual-channels -1", "--residual-channels", "'-1'"),
    (NEW_AE + " --residual-channels 0 --align none", "--align none", "does nothing"),
    (NEW_AE + " --image-size 48", "--image-size 48"),
    (NEW_AE + " --decoder-mult 1,1", "--decoder-mult 1,1"),
    (NEW_AE + " --decoder-channels 100", "--decoder-channels 100", "32"),
    (NEW_AE + " --residual-dim 145", "--residual-dim 145", "48"),
    (NEW_DIT + " --steps -3", "--steps"),
    (NEW_DIT + " --seed -1", "--seed"),
    (NEW_DIT + " --model 2,30,4", "--model 2,30,4"),
    (NEW_DIT + " --model S", "--model S"),
    (NEW_DIT + " --label-dropout 2", "--label-dropout", "'2'"),
    (NEW_DIT + " --ema-decay 5", "--ema-decay", "'5'"),
    # edit.py
    ("edit", "reconstruct | redraw | interpolate"),
    ("edit redraw good/a/0.png", "--box", "--class"),
    ("edit redraw x.png --box 9,1,1,9 --class 3", "--box", "9,1,1,9"),
    ("edit redraw x.png --box 1,1,9,9 --class 3", "x.png"),
    ("edit redraw text.pt --box 1,1,9,9 --class 3", "text.pt", "not a readable"),
    ("edit redraw good/a/0.png --box 1,1,9,99 --class 3", "--box", "32 x 32"),
    ("edit redraw good/a/0.png --box 1,1,3,3 --class 3", "--box", "token"),
    ("edit redraw good/a/0.png --box 1,1,9,9 --class 10", "0 to 9"),
    ("edit redraw good/a/0.png --box 1,1,9,9 --class 3 --no-zero-init", "--no-zero-init"),
    ("edit interpolate --class 3", "--seeds"),
    ("edit interpolate --seeds 1 2", "--class"),
    ("edit reconstruct good --num 3", "--num"),
]

DO_NOT_BELONG_TOGETHER = [
    ("sample --ae other.pt", "runs/demo-dit/last.pt", "other.pt", "--ae"),
    ("train_dit --data good", "train_ae.py", "--ae"),  # only demo runs are there
    (MINI_AE + " --lr 0.1", "runs/demo-ae", "different run", "--lr 0.1 (was ", "--name"),
    (MINI_DIT + " --name demo-ae", "runs/demo-ae", "different run"),
    ("sample --steps 2 --out good --overwrite", "good", "not of this program", "--out"),
    ("sample --steps 2 --out text.pt", "--out", "'text.pt'", "not a folder"),
    ("sample --steps 2 --out .", "--out . holds", "not of this program"),
    # What a user has is never removed.
    ("sample --steps 2 --out album --overwrite", "album holds", "not of this program"),
    ("sample --steps 2 --num 2 --out ours --overwrite", "ours holds mine.png", "not of this program"),
    ("edit reconstruct good --out good --overwrite", "--out good", "the input good"),
    ("edit reconstruct good/a --out good --overwrite", "--out good", "the input good/a"),
    ("edit reconstruct good --out good/new", "--out good/new", "the input good"),
    ("edit redraw good/a/0.png --box 0,0,9,9 --class 1 --out good", "the input good/a/0.png"),
    ("sample --steps 2 --out repository", "repository holds .git"),
    ("sample --steps 2 --out linked --overwrite", "linked holds overview"),
    ("sample --steps 2 --out new --npz new/x.npz", "no such folder"),
    ("data pack good foreign", "foreign.part", "interrupted packing"),
    ("fid shapes.npz --demo --ref good --save-stats shapes.npz", "--save-stats shapes.npz", "measured"),
    ("fid good --demo --json good/x.json", "--json good/x.json", "measured"),
    ("probe toy --out theirs", "theirs/toy.png", "not of this program"),
    ("probe pixels --out theirs", "theirs/pixels.pt"),
]


class BadInput(Case):
    def setUp(self):
        super().setUp()
        shutil.copytree(trained() / "runs", "runs")
        write_pictures("good/a", 2)
        write_pictures("flat", 1)
        for folder in ("empty", "w", "hollow/a", "unreadable/a"):
            os.makedirs(folder)
        for i in range(2):
            Path(f"unreadable/a/{i}.png").write_text("no picture")
        Path("text.pt").write_text("not a checkpoint\nat all\n")
        Path("text.npz").write_text("not an archive\n")
        Path("zero.pt").touch()
        Path("zero.npz").touch()
        checkpoint = Path("runs/demo-ae/last.pt").read_bytes()
        Path("half.pt").write_bytes(checkpoint[:len(checkpoint) // 2])
        write_safetensors("whole.safetensors", {"cls_token": torch.zeros(1, 1, 384)})
        Path("half.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:200])
        torch.save([1, 2], "list.pt")
        torch.save({1: torch.zeros(2)}, "int.pt")
        for kind in ("sit", "autoencoder"):
            torch.save({"kind": kind}, f"{kind}.pt")
        os.makedirs("runs/foreign")  # and a folder below runs/ that is none of ours
        Path("runs/foreign/config.json").write_text("[not json")
        torch.save({"ema": 0.999}, "ema.pt")
        torch.save({"fc.weight": torch.zeros(2, 2)}, "mlp.pth")
        shapes_of_wrong = {"cls_token": [1, 1, 384], "patch_embed.proj.weight": [384, 3, 14, 14],
                           "norm.weight": [7], "extra": [1]}
        torch.save({key: torch.zeros(shape) for key, shape in shapes_of_wrong.items()}, "wrong.pth")
        np.savez("stats.npz", mean=np.zeros(5), std=np.ones(5))
        np.savez("zero-std.npz", mean=np.zeros(72), std=np.zeros(72))
        torch.save("text", "string.pt")
        torch.save({"sit": {"sit": 3}}, "nested.pt")
        torch.save({"blocks.x": torch.zeros(1), "x_embedder.weight": torch.zeros(4, 4)}, "blocks.pt")
        Path("list.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
        self.write_damaged_checkpoints()
        images = np.zeros((2, 32, 32, 3), np.uint8)
        for damage, pixels, labels, classes in (
                ("labels", images, np.array([0, 1]), '["a"]'), ("2d", images, np.zeros((2, 1), int), '["a"]'),
                ("none", images[:0], np.zeros(0, int), '["a"]'), ("classes", images, np.zeros(2, int), "3")):
            os.makedirs(f"packed-{damage}")
            np.save(f"packed-{damage}/images.npy", pixels)
            np.save(f"packed-{damage}/labels.npy", labels)
            Path(f"packed-{damage}/classes.json").write_text(classes)
        write_pictures("album", 1)
        Path("album/record.json").write_text('{"files": ["0.png"]}')
        Path("album.json").write_text("{}")
        for folder in ("repository/.git/refs", "linked", "theirs", "foreign.part"):
            os.makedirs(folder)
        os.symlink("../good", "linked/overview")
        files.write_record(Path("linked"), {"steps": 3}, ["000000.png", "overview/samples.png"])
        Path("theirs/toy.png").write_text("precious")
        Path("theirs/pixels.pt").write_text("precious")
        Path("foreign.part/images.npy").write_text("precious")
        np.savez("shapes.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
        write_pictures("ours", 1)
        os.rename("ours/0.png", "ours/mine.png")
        files.write_record(Path("ours"), {"steps": 3}, ["000000.png", "../album/0.png"])
        other = files.load_checkpoint("runs/demo-ae/last.pt")
        other["model"]["mask_token"] += 1
        torch.save({**other, "fingerprint": files.fingerprint(other["model"])}, "other.pt")

    def write_damaged_checkpoints(self):
        """Both stages' checkpoints with one thing wrong in each."""
        for kind, run, weights, fields in (
                ("sit", "demo-dit", "ema", ("config", "classes", "autoencoder", "latent_mean", "ema")),
                ("ae", "demo-ae", "model", ("config", "encoder_file"))):
            whole = files.load_checkpoint(f"runs/{run}/last.pt")
            whole = {key: value for key, value in whole.items() if key not in ("opt", "opt_disc", "disc")}
            damaged = {f"{field}-3": {field: 3} for field in fields}
            damaged["config"] = {"config": {"model": {}, "channels": 72, "num_classes": 10, "grid": 4}}
            damaged["classes"] = {"classes": ["one"]}
            damaged["autoencoder"] = {"autoencoder": {}}
            key = next(key for key, value in whole[weights].items() if value.ndim == 2)
            flipped = whole[weights][key].clone()
            flipped[0, 0] += 1
            damaged["flipped"] = {weights: {**whole[weights], key: flipped}}
            damaged["nan"] = {weights: {**whole[weights], key: flipped * torch.nan}}
            damaged["numbers"] = {"classes": list(range(10))}
            damaged["sparse"] = {weights: {**whole[weights], key: flipped.to_sparse()}}
            damaged["complex"] = {"latent_std": torch.zeros(72, dtype=torch.complex64)}
            damaged["text"] = {weights: {**whole[weights], key: "text"}}
            for damage, change in damaged.items():
                torch.save({**whole, **change}, f"{kind}-{damage}.pt")

    def test_missing_weights_say_where_to_get_them(self):
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            self.refuse_all(MISSING_FILES)

    def test_damaged_and_foreign_files_are_named(self):
        self.refuse_all(DAMAGED_FILES)

    def test_bad_data_is_named(self):
        self.refuse_all(BAD_DATA)

    def test_flags_out_of_range_or_out_of_place_are_named(self):
        self.refuse_all(BAD_FLAGS)

    def test_things_that_do_not_belong_together_are_refused(self):
        self.refuse_all(DO_NOT_BELONG_TOGETHER)

    def test_a_batch_that_does_not_divide_by_the_processes_is_refused(self):
        with mock.patch("runs.world_size", lambda: 3), mock.patch("runs.barrier"):
            self.refused(NEW_AE, "--batch 8", "3 processes")
            self.refused(NEW_DIT, "--batch 8", "3 processes")

    def test_processes_that_see_different_disks_are_refused(self):
        with mock.patch("runs.all_reduce", lambda x: x + 1):
            self.refused(MINI_AE + " --steps 4 --save-every 2", "runs/demo-ae/last.pt", "shared disk")

    def test_restarts_on_several_nodes_need_a_store_for_each(self):
        nodes = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
        with mock.patch.dict(os.environ, nodes):
            self.refused(NEW_DIT, "--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")

    def test_only_what_the_record_lists_is_replaced(self):
        write_pictures("trip", 1)
        os.rename("trip/0.png", "trip.png")
        os.rmdir("trip")
        Path("trip.json").write_text("{}")
        before = self.snapshot()
        ok("edit redraw trip.png --box 0,0,16,16 --class star --steps 2 --out trip")
        ok("edit redraw trip.png --box 0,0,16,16 --class disc --steps 2 --out trip --overwrite")
        Path("ours/mine.png").unlink()
        Path("ours/.notes").write_text("hidden")
        Path("ours/000000.png").write_text("an old sample")
        ok("sample --steps 2 --num 1 --out ours --overwrite")
        after = self.snapshot()
        self.assertEqual({p.name for p in before if before[p] != after.get(p)},
                         {"mine.png", "record.json"})
        self.assertTrue(Path("ours/.notes").exists())

    def test_readme_runs_from_top_to_bottom(self):
        ok("sample --steps 2 --num 20")
        ok("sample --demo --steps 3 --num 12")  # replaces its own earlier run in the default folder
        self.assertEqual(len(pictures("samples")), 12)
        many = [*(f"{i:06d}.png" for i in range(2000)), "overview/samples.png"]
        files.write_record(Path("samples"), {"steps": 1}, many)
        self.refused("sample --steps 2", "samples", "different run of 2001 files", "--overwrite")

    def test_samples_of_two_commands_are_never_mixed(self):
        ok("sample --steps 2 --num 3 --out mine")
        self.refused("sample --steps 3 --num 3 --out mine", "mine", "different run", "--overwrite")
        ok("sample --steps 3 --num 3 --out mine --overwrite")
        ok("sample --steps 2 --num 3 --out v1.25")
        before = self.snapshot()
        ok("sample --steps 3 --num 3 --out v1.55")
        after = self.snapshot()
        self.assertEqual([p for p in before if before[p] != after[p]], [])  # each with its own overview
