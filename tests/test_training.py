"""Training: the same numbers however it is cut up, and no fault that costs more than a save."""
import contextlib
import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import files
import perceptual
import runs
import shapes
import svg
import train_ae
import train_dit
from tests.helpers import (
    MINI_AE,
    MINI_DIT,
    REAL_DATA,
    ROOT,
    Case,
    demo_images,
    ok,
    pictures,
    read_log,
    run,
    shell,
    start,
    trained,
    write_pictures,
)


class Commands(Case):
    def test_resumed_training_equals_uninterrupted_training(self):
        ae = f" --ae {trained()}/runs/demo-ae/last.pt"
        for command in (MINI_AE + " --gan 0.5 --disc-start 2", MINI_DIT + ae):
            with self.subTest(command):
                shutil.rmtree("runs", ignore_errors=True)
                ok(command + " --name whole --steps 4")
                ok(command + " --name halves --steps 2")
                self.assertIn("resuming runs/halves at step 2", ok(command + " --name halves --steps 4"))
                whole, halves = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("whole", "halves"))
                self.assert_same(whole, halves)
                self.assertEqual([entry["step"] for entry in read_log("halves")], [1, 2, 3, 4])
                os.remove("runs/halves/last.pt")  # as if stopped before the first checkpoint
                ok(command + " --name halves --steps 1")
                self.assertEqual([entry["step"] for entry in read_log("halves")], [1])

    def test_two_processes_train_the_same_transformer(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --steps 3 --name"
        ok(command, "one")
        shell(command, "two", "--accumulate", 2, processes=2)
        one, two = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("one", "two"))
        for key in one["ema"]:
            self.close(one["ema"][key], two["ema"][key])

    def test_samples_do_not_depend_on_batch_size_or_processes(self):
        os.chdir(trained())
        command = "sample --steps 3 --num 9 --out"
        shown = ok(command, self.folder / "whole")
        self.assertIn("runs/demo-dit/last.pt", shown)
        ok(command, self.folder / "single", "--batch", 1)
        ok(command, self.folder / "seven", "--batch", 7)
        shell(command, self.folder / "two", processes=2)
        whole = pictures(self.folder / "whole").astype(int)
        self.assertGreater(len(np.unique(whole[:, 0, 0])), 3)
        for other in ("single", "seven", "two"):
            self.assertLessEqual(np.abs(pictures(self.folder / other) - whole).max(), 1, other)

    def test_whole_demo_writes_what_is_documented(self):
        shutil.copytree(trained() / "runs", "runs")
        for name, also in (("demo-ae", {"0000002.pt", "0000004.pt", "preview-0000004.png"}),
                           ("demo-dit", {"0000006.pt", "preview-0000006.png"})):
            documented = {".svg.lock", "config.json", "log.jsonl", "loss.png", "last.pt"}
            self.assertEqual(set(os.listdir(f"runs/{name}")), documented | also)
        shell("sample --demo --steps 2 --num 12 --classes star 0 --npz images.npz")
        self.assertEqual(set(os.listdir()), {"images.npz", "runs", "samples"})
        self.assertEqual(sorted(os.listdir("samples")), [".svg.lock", *(f"{i:06d}.png" for i in range(12)),
                                                         "overview", "record.json"])
        self.assertEqual(os.listdir("samples/overview"), ["samples.png"])
        np.testing.assert_array_equal(files.load_npz("images.npz")["arr_0"], pictures("samples"))
        self.assertEqual(pictures("samples").shape, (12, 32, 32, 3))
        ok("sample --demo --steps 2 --num 12 --classes star 0")  # the same command again is the same run
        code, out, _ = run("fid samples --demo --num 10")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\d.*not Inception FID")
        write_pictures("real/a", 3)
        ok("edit reconstruct real")
        self.assertEqual(sorted(os.listdir("reconstructions/a")), ["0.png", "1.png", "2.png"])
        self.assertTrue(os.path.exists("reconstructions/overview/reconstructions.png"))

    def test_an_exported_file_gives_the_pixels_of_its_run(self):
        shutil.copytree(trained() / "runs", "runs")
        ok("sample --steps 2 --num 4 --out run")
        write_pictures("in", 2)
        ok("edit reconstruct in")
        for name in ("all.pt", "all.safetensors"):
            ok("sample --export", name)
        shutil.rmtree("runs")
        for name in ("all.pt", "all.safetensors"):
            ok("sample --steps 2 --num 4 --out", name[4:], "--ckpt", name)
            np.testing.assert_array_equal(pictures(name[4:]), pictures("run"))
            self.assertEqual(svg.load_sit(name).meta["classes"], shapes.CLASSES)
            ok("edit reconstruct in --ae", name, "--out", f"{name[4:]}-in")
            np.testing.assert_array_equal(pictures(f"{name[4:]}-in"), pictures("reconstructions"))

    def test_training_skips_a_corrupt_image_with_one_warning(self):
        write_pictures("data/a", 3)
        write_pictures("data/b", 3)
        Path("data/a/1.png").write_bytes(Path("data/a/0.png").read_bytes()[:100])
        code, _, err = run(f"train_ae {REAL_DATA} --data data --steps 5 --log-every 1")
        self.assertEqual((code, err.count("\n")), (0, 1), err)
        self.assertRegex(err, r"warning: data/a/1\.png.*skipped \(1 so far\)")
        self.assertEqual(read_log("ae")[-1]["corrupt"], 1)


# A program's main under torchrun, whose compiled graphs are counted and run as they are.
COUNTED = """
import importlib, sys
sys.path.insert(0, {root!r})
import torch
import runs
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile
torch.compile = lambda function, **settings: compiled(function, **{{**settings, "backend": backend}})
program = sys.argv.pop(1)
runs.run_main(importlib.import_module(program).main)
print("graphs", len(graphs), "breaks", sum(torch._dynamo.utils.counters["graph_break"].values()))
"""


class Compiled(Case):
    def test_no_graph_breaks_and_none_is_compiled_twice(self):
        Path("counted.py").write_text(COUNTED.format(root=str(ROOT)))
        often = " --save-every 2 --preview-every 2 --workers 0 --compile --steps"
        ae = MINI_AE + " --gan 0.5 --disc-start 2"
        dit = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt"
        sample = f"sample --ckpt {shapes.DEMO_PT} --batch 2 --steps 2 --compile --num"
        for graphs, command, processes in (
                (9, ae + often + " 2", 1), (9, ae + often + " 5", 1),  # train, preview, measure, save, train
                (3, dit + often + " 2", 1), (3, dit + often + " 5", 1),
                (3, dit + often + " 5 --accumulate 2", 2),
                (2, sample + " 2", 1), (2, sample + " 5", 1)):
            with self.subTest(command):
                shutil.rmtree("runs", ignore_errors=True)
                script, *flags = command.split()
                out = shell(f"{self.folder}/counted", script, *flags, processes=processes)
                self.assertEqual(out.count(f"graphs {graphs} breaks 0"), processes, out[-300:])


def kept_gib(forward, modules, images, bf16):
    """GiB that autograd saves in forward(images), parameters and buffers aside; on shapes without numbers."""
    own = {p.untyped_storage()._cdata for m in modules for p in itertools.chain(m.parameters(), m.buffers())}
    storages = {}
    tensors = []  # alive, or a storage's address could be used again

    def pack(tensor):
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    def in_fp32(norm):  # as autocast has it on CUDA, not on a CPU
        return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)

    with FakeTensorMode(allow_non_fake_inputs=True), \
            mock.patch("torch.nn.functional.layer_norm", in_fp32(F.layer_norm)), \
            mock.patch("torch.nn.functional.group_norm", in_fp32(F.group_norm)), \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        forward(images)
    return sum(storages.values()) / 2**30


class Memory(Case):
    def test_the_estimate_of_stage_2_is_what_the_backward_pass_keeps(self):
        def kept(images, bf16):
            return kept_gib(forward, [model], images, bf16)

        def forward(n):
            model(torch.randn(n, 256, 392), torch.rand(n), torch.zeros(n, dtype=torch.long))

        model = svg.SiT("B")
        for bf16 in (True, False):
            for model.recompute in (False, True):
                expected = (kept(5, bf16) - kept(1, bf16)) / 4
                if model.recompute:  # and the block that is computed again
                    model.recompute = False
                    expected += (kept(5, bf16) - kept(1, bf16)) / 4 / 12
                    model.recompute = True
                estimates = [train_dit.training_gib(model, n, bf16) for n in (0, 1)]
                self.assertAlmostEqual((estimates[1] - estimates[0]) / expected, 1, delta=0.1)
        weights = sum(p.numel() for p in model.parameters())
        self.assertAlmostEqual(estimates[0], weights * 4 * 5 / 2**30)  # fp32: w, gradient, m, v, EMA

    def test_the_table_of_stage_1_in_docs_runs_is_what_the_backward_pass_keeps(self):
        encoder = svg.Encoder(svg.ViT(**svg.ENCODERS["dinov3_vits16plus"]), "dinov3_vits16plus", "")
        model = svg.Autoencoder(encoder).train()
        lpips = perceptual.LPIPS(None)
        disc = train_ae.PatchDiscriminator().requires_grad_(False)

        def autoencode(n):
            x = torch.zeros(n, 3, 256, 256)
            return x, model(x, torch.zeros(n, dtype=torch.bool)).float()

        def all_losses(n):
            x, y = autoencode(n)
            return train_ae.reconstruction_loss(x, y, lpips, 1.0), disc(y)

        for model.decoder.recompute, forward, gib in ((False, all_losses, 0.95), (True, autoencode, 0.24)):
            kept = [kept_gib(forward, [model, lpips, disc], n, bf16=True) for n in (1, 3)]
            self.assertAlmostEqual((kept[1] - kept[0]) / 2, gib, delta=0.01)

    def test_a_batch_that_cannot_fit_is_named_at_the_start(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 1"
        with mock.patch("runs.total_gib", lambda device: 24.0), \
                mock.patch("train_dit.training_gib", lambda model, images, bf16: 2.7 * images):
            ok(command + " --name fits")  # 21.6 of 21.8
            for name, flags, words in (
                    ("more", "--batch 16", "43 GiB, where the device has 22: give --accumulate N or --rec"),
                    ("again", "--batch 16 --recompute", "give --accumulate N\n"),
                    ("parts", "--batch 16 --accumulate 2", None)):
                err = run(command, "--name", name, *flags.split())[2]
                self.assertEqual(err == "", words is None)
                self.assertIn(words or "", err)


class Cache(Case):
    def setUp(self):
        super().setUp()
        for name in ("train/a", "train/b"):
            write_pictures(name, 10, first=ord(name[-1]))
        self.command = (f"{MINI_DIT} --data train --ae {trained()}/runs/demo-ae/last.pt --steps 3 "
                        "--label-dropout 0.5 --name")

    def losses(self, name):
        return [entry["loss"] for entry in read_log(name)]

    def test_cached_latents_give_the_losses_of_images_within_half_precision(self):
        ok(self.command, "images")
        ok(self.command, "cached", "--cache", "cache")
        rows = np.load("cache/latents.npy", mmap_mode="r")
        ae = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt")
        dataset = data.open_data("train", 32)
        images = data.to_float(torch.stack([torch.from_numpy(dataset[i, 0][0]) for i in range(20)]), "cpu")
        for flip, x in enumerate((images, images.flip(-1))):
            with torch.no_grad():
                expected = ae.encode(x)
            error = (torch.from_numpy(rows["latents"][:, flip].astype(np.float32)) - expected).abs()
            self.assertLess((error / (expected.abs() + 0.01)).max(), 2 ** -10)
        self.assertEqual(rows["label"].tolist(), [0] * 10 + [1] * 10)
        with mock.patch.object(svg.Autoencoder, "encode", side_effect=AssertionError("encoded again")):
            ok(self.command, "again", "--cache", "cache")
        self.assertEqual(self.losses("again"), self.losses("cached"))
        shell(self.command, "two", "--cache", "cache2", processes=2)
        np.testing.assert_allclose(rows["latents"].astype(np.float32),  # in batches of 4 and 8
                                   np.load("cache2/latents.npy")["latents"].astype(np.float32), 2e-3, 2e-3)
        for name in ("cached", "two"):
            np.testing.assert_allclose(self.losses(name), self.losses("images"), 1e-3)

    def test_an_interrupted_encoding_goes_on_where_it_was(self):
        ok(self.command, "whole", "--cache", "whole")
        encoded = []

        def encode(self, images, real=svg.Autoencoder.encode):
            encoded.append(len(images))
            if len(encoded) == 5:
                raise KeyboardInterrupt
            return real(self, images)

        # Twice 8 images, of which there is a record, twice 8 without one, and an end.
        with mock.patch.object(svg.Autoencoder, "encode", encode):
            self.assertEqual(run(self.command, "halves", "--cache", "halves")[0], 130)
            self.assertEqual(json.loads(Path("halves/cache.json").read_text())["encoded"], 8)
            ok(self.command, "halves", "--cache", "halves")
        self.assertEqual(encoded[5:], [8, 8, 4, 4])
        self.assertEqual(*(Path(name, "latents.npy").read_bytes() for name in ("whole", "halves")))
        self.assertEqual(sorted(os.listdir("halves")), [".svg.lock", "cache.json", "latents.npy"])

    def test_a_stale_or_foreign_cache_is_refused(self):
        ok(self.command, "first", "--cache", "cache")
        for key, flags in (("precision", "--precision bf16"), ("autoencoder", f"--ae {shapes.DEMO_PT}")):
            self.refused(f"{self.command} new --cache cache {flags}", "--cache cache is stale", key, "remove")
        self.refused(f"{self.command} new --cache train", "--cache train", "holds no latents")
        shutil.copytree("train", "grown", copy_function=shutil.copy2)
        ok(f"{self.command} grown --data grown --cache cache")  # the same files elsewhere
        shutil.copy("grown/a/1.png", "grown/a/0.png")
        self.refused(f"{self.command} new --data grown --cache cache", "--cache cache is stale", "other data")
        state = json.loads(Path("cache/cache.json").read_text())
        state["alignment"][1] *= 1.01  # another measurement's; a thousandth would be rounding
        Path("cache/cache.json").write_text(json.dumps(state))
        self.ends(self.command + " new --cache cache", "--cache cache is stale", "alignment")
        self.refused(f"{self.command} new --cache runs/new", "--cache runs/new", "own folder")
        with mock.patch("shutil.disk_usage", lambda _: mock.Mock(free=1000)):
            self.ends(self.command + " new --cache cache3", "more than the disk has")

    def ends(self, command, *words):
        """refused(), but the run's folder may be there already."""
        code, _, err = run(command)
        self.assertEqual((code, err.count("\n")), (2, 1), err)
        for word in words:
            self.assertIn(word, err)

    def test_a_damaged_cache_is_named_whole_or_not(self):
        ok(self.command, "first", "--cache", "whole")
        shutil.copytree("whole", "half")
        state = json.loads(Path("half/cache.json").read_text())
        Path("half/cache.json").write_text(json.dumps({**state, "encoded": 8}))
        for cache in ("whole", "half"):
            path = Path(cache, "latents.npy")
            good = path.read_bytes()
            rows = np.load(path)
            for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b""),
                           lambda path, good=good: path.write_bytes(good[:5000]),
                           lambda path: np.save(path, np.zeros(20)),
                           lambda path, rows=rows: np.save(path, rows[:5])):
                damage(path)
                self.ends(f"{self.command} new --cache {cache}", f"--cache {cache}: latents.npy is damaged")
            path.write_bytes(good)
            ok(f"{self.command} new-{cache} --cache {cache}")

    def test_corrupt_images_are_told_by_every_run_on_the_cache(self):
        Path("train/a/3.png").write_text("no picture")
        os.symlink("nowhere", "train/b/zz.png")
        for name in ("first", "second"):
            with mock.patch("runs.warnings.warn") as warn:
                self.assertEqual(run(self.command, name, "--cache", "cache")[0], 0)
            told = " ".join(str(call.args[0]) for call in warn.call_args_list)
            for file in ("a/3.png", "b/zz.png"):
                self.assertIn(f"train/{file}: not a readable image", told)
            self.assertEqual(read_log(name)[-1]["corrupt"], 2)

    def test_a_cache_has_one_writer_and_any_number_of_readers(self):
        ok(self.command, "first", "--cache", "cache")
        writer = start(self.command, "writer", "--cache", "new", "--steps", 1000)
        while not Path("new/cache.json").exists():
            time.sleep(0.01)
        while json.loads(Path("new/cache.json").read_text())["encoded"] < 20:
            time.sleep(0.01)
        ok(self.command, "reader", "--cache", "new")  # while the other one trains
        writer.kill()
        writer.communicate()
        with mock.patch("os.access", lambda path, mode, real=os.access:
                        False if mode == os.W_OK and "cache" in str(path) else real(path, mode)):
            ok(self.command, "second", "--cache", "cache")  # read only
            self.ends(self.command + " third --cache cache/new", "--cache", "not a folder that can be")


class Training(Case):
    """What a run of a week leans on: equal numbers however it is cut up; no fault costs more than a save."""

    def train(self, name, *flags, steps=4, ae=False):
        """A short run of a stage; its last checkpoint."""
        command = MINI_AE if ae else MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001"
        ok(f"{command} --name {name} --steps {steps}", *flags)
        return svg.load_checkpoint(f"runs/{name}/last.pt")

    def assert_same_weights(self, a, b, key="model", tolerance=0.0):
        for k in a[key]:
            torch.testing.assert_close(a[key][k], b[key][k], rtol=tolerance, atol=tolerance, msg=k)

    def test_accumulation_and_recomputation_change_nothing(self):
        whole = self.train("whole")
        self.assert_same_weights(whole, self.train("recomputed", "--recompute"))
        self.assert_same_weights(whole, self.train("parts", "--accumulate", 4), tolerance=1e-5)
        for a, b in zip(read_log("whole"), read_log("parts"), strict=True):
            self.assertAlmostEqual(a["loss"], b["loss"], delta=1e-5)
            self.assertAlmostEqual(a["grad_norm"], b["grad_norm"], delta=1e-4)
        self.assert_same_weights(self.train("ae", ae=True),
                                 self.train("ae-recomputed", "--recompute", ae=True))

    def test_two_processes_train_the_same_autoencoder(self):
        command = MINI_AE + " --gan 0.5 --disc-start 1 --residual-dropout 0 --lr 0.000001 --steps 4 --name"
        ok(command, "one")
        shell(command, "two", processes=2)
        ok(command, "parts", "--accumulate", 2)  # where statistics are those of half a batch
        one, two, parts = ([entry["l1_loss"] + entry["disc_loss"] for entry in read_log(name)]
                           for name in ("one", "two", "parts"))
        np.testing.assert_allclose(two, one, rtol=1e-5)
        self.assertGreater(np.abs(np.array(parts) - one).max(), 1e-3)
        one, two = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("one", "two"))
        # As vectors: Adam steps by rounding noise where a gradient is 0, as of a key's bias; with the noise
        # a pixel's |x - y| changes sign. Adam's first moments are the gradients: unsynced they differ by 1.
        for key, tolerance in (("model", 1e-5), ("disc", 1e-5), ("opt", 0.02), ("opt_disc", 0.02)):
            parts = zip(*([v["exp_avg"] if "opt" in key else v for v in c[key].get("state", c[key]).values()]
                          for c in (one, two)), strict=True)
            a, b = (torch.cat([t.double().flatten() for t in side]) for side in zip(*parts, strict=True))
            self.assertLess((a - b).norm() / a.norm(), tolerance, key)

    def test_ablation_flags_change_what_they_name_and_nothing_else(self):
        whole = self.train("whole", steps=2)
        without = self.train("without", "--no-qk-norm", steps=2)
        self.assertEqual({k for k in whole["model"] if "q_norm" in k or "k_norm" in k},
                         whole["model"].keys() - without["model"].keys())
        ok("sample --steps 1 --num 2 --ckpt runs/without/last.pt")
        self.assertEqual(self.train("masked", "--mask-ratio", 1, steps=1, ae=True)["config"]["mask_ratio"], 1)
        residual = svg.load_checkpoint("runs/masked/last.pt")["opt"]["state"]  # nothing reaches the residual
        names = [name for name, _ in svg.load_autoencoder("runs/masked/last.pt").named_parameters()]
        moved = {name for i, name in enumerate(names) if residual[i]["exp_avg"].any()}
        self.assertTrue(any(name.startswith("decoder.") for name in moved))
        self.assertFalse(any(name.startswith("residual") for name in moved))

    def test_a_flag_newer_than_a_run_is_compared_with_its_default(self):
        self.train("old", steps=1)
        config = json.loads(Path("runs/old/config.json").read_text())
        for key in ("residual_scale", "mid_loss", "cache"):
            del config[key]
        Path("runs/old/config.json").write_text(json.dumps(config))
        ae = f" --ae {trained()}/runs/demo-ae/last.pt --name old --steps 2 --lr 0.0001"
        self.refused(MINI_DIT + ae + " --residual-scale 3", "--residual-scale 3.0 (was 1.0)")
        ok(MINI_DIT + ae)

    def test_residual_scale_is_the_deviation_of_the_residual_that_the_transformer_sees(self):
        self.train("one", steps=1)
        self.train("three", "--residual-scale", 3, steps=1)
        ok("sample --steps 1 --num 2 --ckpt runs/three/last.pt")
        one, three = (svg.load_sit(f"runs/{name}/last.pt").meta["latent_std"] for name in ("one", "three"))
        self.assertTrue(torch.equal(one[:64], three[:64]))
        self.close(one[64:] / three[64:], torch.full((8,), 3.0))
        ae = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt")
        with torch.no_grad():
            latents = ae.encode(demo_images(64))
            plain = ae.normalize(latents)
            ae.load_statistics(svg.load_sit("runs/three/last.pt").meta)
            self.close(ae.normalize(latents)[..., 64:], 3 * plain[..., 64:])
            self.close(ae.denormalize(ae.normalize(latents)), latents)  # samples come back at their own scale

    def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(self):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([p], 0.1, fused=True)
        p.grad = torch.tensor([3.0, 0.0, 4.0])
        norm, skipped = runs.optimizer_step(optimizer, clip=1.0)
        self.close((norm.item(), float(skipped), p.grad.norm().item()), (5.0, 0.0, 1.0))
        before = copy.deepcopy((p.data, optimizer.state_dict()["state"]))
        q = torch.nn.Parameter(torch.ones(3))
        p.grad, q.grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
        self.assertTrue(runs.optimizer_step(optimizer, torch.optim.AdamW([q], fused=True), clip=1.0)[1])
        self.assertEqual(q.tolist(), [1, 1, 1])  # and the optimiser beside it stays too
        after = (p.data, optimizer.state_dict()["state"])
        self.assertTrue(torch.equal(before[0], after[0]))
        for k, v in before[1][0].items():
            self.assertTrue(torch.equal(v, after[1][0][k]), k)

        trained()
        real, calls = svg.flow_loss, itertools.count()
        bad = {1, 2, *range(4, 4 + runs.MAX_SKIPPED)}

        def sometimes(*inputs, **settings):
            return real(*inputs, **settings) * (math.nan if next(calls) in bad else 1)

        with mock.patch("svg.flow_loss", sometimes):
            self.train("bad", "--log-every", 2)
            self.assertEqual([(e["step"], e["skipped"]) for e in read_log("bad")], [(2, 1), (4, 1)])
            self.assertTrue(all(math.isfinite(e["loss"]) for e in read_log("bad")))
            code, _, err = run(f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --name bad "
                               "--steps 99 --log-every 2")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertRegex(err, rf"no finite gradient for {runs.MAX_SKIPPED} steps.*runs/bad/last\.pt")
        self.assertEqual(svg.load_checkpoint("runs/bad/last.pt")["step"], 4)
        os.makedirs("runs/mended")  # as the message says
        shutil.copy("runs/bad/last.pt", "runs/mended")
        command = f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt --name mended --steps 5 --lr"
        self.assertIn("resuming runs/mended at step 4", ok(command, 0.001))
        self.assertEqual(svg.load_checkpoint("runs/mended/last.pt")["opt"]["param_groups"][0]["lr"], 0.001)
        for other, words in ((command.replace("--model 2", "--model 1"), "unexpected blocks.1"),
                             (MINI_AE + " --name mended --lr", "not of this stage")):
            os.remove("runs/mended/config.json")
            code, _, err = run(other, 0.1)
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertIn(words, err)

    def test_signals_end_a_run_after_a_step_and_it_goes_on_exactly(self):
        for ae in (False, True):
            flags = ["--accumulate", 2, *["--gan", 0.5, "--disc-start", 1] * ae]
            whole = self.train("whole", *flags, ae=ae, steps=4)
            for number in runs.STOP_SIGNALS:
                with self.subTest(number, ae=ae):
                    real = runs.seed_step

                    def seed_step(seed, step, *rank, number=number, real=real):
                        if step == 1:
                            os.kill(os.getpid(), number)  # in the middle of the second step
                        real(seed, step, *rank)

                    with mock.patch("runs.seed_step", seed_step):
                        self.assertEqual(self.train("stopped", *flags, ae=ae)["step"], 2)
                    with open("runs/stopped/log.jsonl", "a") as f:
                        f.write('{"step": 3, "lo')  # what a full disk leaves of a line
                    if ae:
                        self.assertFalse(svg.load_autoencoder("runs/stopped/last.pt").measured)
                    self.assert_same(whole, self.train("stopped", *flags, ae=ae))
                    shutil.rmtree("runs/stopped")
            shutil.rmtree("runs")

    def test_stopped_run_says_how_to_go_on(self):
        process = start(MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 100000 --workers 2",
                        start_new_session=True)
        for line in process.stdout:
            if line.startswith("step 2"):
                os.killpg(process.pid, signal.SIGTERM)  # its loading processes too
        _, err = process.communicate()
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertRegex(line, r"SIGTERM: stopped after step \d+; "
                               r"the same command resumes from runs/demo-dit/last.pt")

    def test_two_processes_stop_together_and_a_dead_one_is_restarted_where_the_run_was(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 6 --save-every 2 --name"
        shell(command, "whole", processes=2)
        # One rank gets a signal in step 2; once gone on, the other dies in step 5 and torchrun restarts both.
        Path("faulty.py").write_text("""
import os, signal, sys, torch, train_dit, runs
real = runs.seed_step
def seed_step(seed, step, *rank):
    if runs.rank() == 1 and step == 1 and not os.path.exists("runs/faulty/last.pt"):
        os.kill(os.getpid(), signal.SIGUSR1)
    if runs.rank() == 0 and step == 4 and not os.path.exists("died"):
        open("died", "w").close()
        raise RuntimeError("the card fell off the bus")
    real(seed, step, *rank)
runs.seed_step = seed_step
runs.run_main(train_dit.main)
""")
        command = command.replace("train_dit", f"{self.folder}/faulty")
        self.assertIn("stopped after step 2", shell(command, "faulty", processes=2))
        process = start(command, "faulty", processes=2, torchrun=["--max-restarts=1"])
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, err)
        self.assertIn("the card fell off the bus", err)
        self.assertIn("resuming runs/faulty at step 4", out)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("whole", "faulty")))

    def test_a_killed_save_leaves_the_checkpoint_before_it(self):
        def save_for_ever():
            torch.set_num_threads(1)
            for i in itertools.count(last + 1):
                svg.save_checkpoint("last.pt", {"step": i, "weights": torch.from_numpy(np.full(300_000, i))})

        last = -1
        for i in range(12):
            child = multiprocessing.get_context("fork").Process(target=save_for_ever)
            child.start()
            time.sleep(0.05 + 0.013 * i)
            child.kill()
            child.join()
            if os.path.exists("last.pt"):
                checkpoint = svg.load_checkpoint("last.pt")
                self.assertTrue((checkpoint["weights"] == checkpoint["step"]).all())
                self.assertGreaterEqual(checkpoint["step"], last)
                last = checkpoint["step"]
        self.assertGreater(last, 12)

    def test_a_last_save_that_was_broken_off_is_made_good(self):
        real = runs.Run.until_signal

        def broken_off(run, batches):
            os.kill(os.getpid(), signal.SIGINT)
            return real(run, batches)

        with mock.patch("runs.Run.until_signal", broken_off):
            self.assertIn("SIGINT: stopped after step 2", ok(MINI_AE + " --name new --steps 2"))
        self.assertFalse(svg.load_autoencoder("runs/new/last.pt").measured)
        self.assertIn("done", ok(MINI_AE + " --name new --steps 2"))
        ok(MINI_AE + " --name whole --steps 2")
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("new", "whole")))

    def test_a_damaged_optimiser_or_log_ends_in_a_line_or_not_at_all(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --name new --steps"
        ok(command, 2)
        last = torch.load("runs/new/last.pt", weights_only=True)
        Path("runs/new/0notes.pt").touch()
        with open("runs/new/log.jsonl", "ab") as f:
            f.write(b'{"step": 1, "loss": "x"}\n[]\n\xff\n' + b"[" * 100_000 + b"\n")
        state = last["opt"]["state"]
        small = {**state, 0: {**state[0], "exp_avg": torch.zeros(1)}}
        for damage in ({"opt": {}}, {"opt": {**last["opt"], "state": {}}}, {"step": -5}, {"alignment": "x"},
                       {"opt": {**last["opt"], "state": small}}):
            torch.save({**last, **damage}, "runs/new/last.pt")
            code, _, err = run(command, 3)
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertRegex(err, "runs/new/last.pt|alignment statistics")
        torch.save(last, "runs/new/last.pt")
        ok(command, 3)

    def test_a_run_has_one_writer_and_a_killed_one_blocks_nobody(self):
        ae = f" --ae {trained()}/runs/demo-ae/last.pt"
        writer = start(MINI_DIT + ae + " --steps 100000 --save-every 1 --workers 1")
        for line in writer.stdout:
            if line.startswith("step 3"):
                break
        code, _, err = run(MINI_DIT + ae + " --steps 100000 --save-every 1")
        self.assertEqual((code, err.count("\n")), (2, 1), err)
        self.assertIn(f"runs/demo-dit is being written by process {writer.pid} on ", err)
        self.assertIsNone(writer.poll())
        writer.kill()
        writer.communicate()
        step = svg.load_checkpoint("runs/demo-dit/last.pt")["step"]
        self.assertIn("resuming", ok(MINI_DIT + ae + f" --save-every 1 --steps {step + 1}"))

    def test_stage_2_resumes_on_an_autoencoder_without_statistics(self):
        ae = files.load_checkpoint(trained() / "runs/demo-ae/last.pt")  # as the authors' is
        ae["model"]["alignment_batches"].zero_()
        ae["model"]["alignment"].copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        ae["model"]["latent_mean"].zero_()
        torch.save({**ae, "fingerprint": files.fingerprint(ae["model"])}, "theirs.pt")
        command = MINI_DIT + " --ae theirs.pt --name"
        with mock.patch("data.spread_batches", lambda dataset, count, *more, real=data.spread_batches:
                        real(dataset, 64, *more)):
            ok(command, "whole", "--steps", 4)
            ok(command, "halves", "--steps", 2)
            np.savez("stats.npz", mean=np.zeros(72), std=np.ones(72))
            ok(command, "stats", "--steps", 1, "--latent-stats", "stats.npz")
        ok(command, "halves", "--steps", 4)  # measures nothing
        whole, halves, stats = (svg.load_checkpoint(f"runs/{name}/last.pt")
                                for name in ("whole", "halves", "stats"))
        self.assert_same(whole, halves)
        self.assertTrue((stats["latent_std"] == 1).all())
        self.assertFalse((whole["latent_std"] == 1).any())
        self.assertTrue(torch.equal(stats["alignment"], whole["alignment"]))
        write_pictures("in", 1)  # encoding takes the statistics that the transformer brings
        ok("edit redraw in/0.png --ckpt runs/halves/last.pt --box 0,0,16,16 --class star --steps 2")

    def test_stage_2_says_which_autoencoder_it_takes_and_warns_of_an_unfinished_one(self):
        shutil.copytree(trained() / "runs/demo-ae", "runs/demo-ae")
        self.assertIn("autoencoder runs/demo-ae/last.pt at step 4 of 4", ok(MINI_DIT + " --steps 1"))
        config = json.loads(Path("runs/demo-ae/config.json").read_text())
        Path("runs/demo-ae/config.json").write_text(json.dumps({**config, "steps": 9}))
        _, out, err = run(MINI_DIT + " --steps 2")
        self.assertIn("at step 4 of 9", out)
        self.assertRegex(err, "warning: runs/demo-ae/last.pt is not trained to its end")
        with mock.patch("runs.is_locked", lambda _: True):
            self.assertRegex(run(MINI_DIT + " --steps 3")[2], "still being trained")

    def test_the_first_step_is_shown_and_then_the_time_decides(self):
        out = ok(MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 6 --log-every 5")
        self.assertEqual([line.split()[1] for line in out.splitlines() if line.startswith("step")],
                         ["1/6", "5/6", "6/6"])
        self.assertRegex(out, r"cpu, \d+ threads, fp32 \| shapes://train: 20,000 images, 10 classes \| "
                              r"SiT .*M, autoencoder .*M parameters \| writes runs/demo-dit/")
        self.assertEqual([e["step"] for e in read_log("demo-dit")], [5, 6])
        shown, now = io.StringIO(), 0
        with mock.patch("time.time", lambda: now), contextlib.redirect_stdout(shown):
            for _ in runs.progress([[1]] * 100, "counting", 100):
                now += 1  # a second an image
        self.assertRegex(shown.getvalue(), r"^counting: 4/100 images  1\.0 images/s  0:01:36 left\n")
        self.assertEqual(len(shown.getvalue().splitlines()), 17)

    def test_bad_steps_stop_the_run_at_their_number_whatever_is_logged(self):
        with mock.patch("svg.flow_loss", lambda *a, real=svg.flow_loss, **b: real(*a, **b) * math.nan):
            code, _, err = run(MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 99 --log-every 50")
        self.assertEqual(code, 2)
        self.assertIn(f"no finite gradient for {runs.MAX_SKIPPED} steps, up to step {runs.MAX_SKIPPED}:", err)

    def test_a_killed_run_goes_on_from_its_last_save(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --save-every 1 --steps"
        seen = 0
        for _ in range(2):
            process = start(command, 100000)
            for line in process.stdout:
                if line.startswith(f"step {seen + 5}/"):
                    process.kill()
            process.communicate()
            step = svg.load_checkpoint("runs/demo-dit/last.pt")["step"]
            self.assertGreaterEqual(step, seen + 4)
            seen = step
        Path("runs/demo-dit/.last.pt.1.tmp").touch()  # what a kill in the middle of a save leaves
        self.assertIn(f"at step {seen}", ok(command, seen + 2))
        self.assertEqual([e["step"] for e in read_log("demo-dit")], list(range(1, seen + 3)))
        self.assertEqual(os.listdir("runs/demo-dit").count(".last.pt.1.tmp"), 0)

    def test_full_disk_is_one_line_and_the_checkpoint_before_it_stays(self):
        before = self.train("full", steps=2)
        size = os.path.getsize("runs/full/last.pt")
        process = start(
            MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --name full --steps 3",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
        _, err = process.communicate(timeout=120)
        self.assertEqual((process.returncode, err.count("\n")), (2, 1), err)
        self.assertRegex(err, r"runs/full/last\.pt: not written .*intact")
        self.assert_same(before, svg.load_checkpoint("runs/full/last.pt"))
        self.assertEqual(list(Path("runs/full").glob(".*.tmp")), [])

    def test_old_checkpoints_go_and_milestones_stay(self):
        self.train("run", "--save-every", 1, "--keep", 2, "--milestone-every", 3, steps=7)
        self.assertEqual(sorted(p.name for p in Path("runs/run").glob("[0-9]*.pt")),
                         [f"000000{i}.pt" for i in (3, 5, 6, 7)])

    def test_bench_needs_nothing_and_writes_nothing(self):
        flags = "--demo --bench 2 --batch"
        for command in (f"train_ae {flags} 4 --gan 0.5 --accumulate 2",
                        f"train_dit --ae {shapes.DEMO_PT} {flags} 4 --recompute",
                        f"sample --ckpt {shapes.DEMO_PT} {flags} 4 --steps 2", "fid --bench 1 --batch 1",
                        "train_dit --model 1,32,2 --batch 2 --bench 1"):  # on the paper's autoencoder, fresh
            with self.subTest(command):
                result = json.loads(ok(command).splitlines()[-1])
                self.assertEqual(result["script"], command.split()[0])
                for key in ("step_seconds", "images_per_second", "tflops", "peak_gib"):
                    self.assertGreater(result[key], 0, key)
                self.assertEqual(os.listdir(), [])
        block = svg.SiT({"depth": 1, "dim": 64, "heads": 2}, 8, 10, 4)
        args = mock.Mock(bench=1, precision="fp32", compile=False)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            runs.bench(args, torch.device("cpu"), lambda n: lambda: block(
                torch.zeros(n, 16, 8), torch.zeros(n), torch.zeros(n, dtype=torch.long)), 3, what="block")
        result = json.loads(out.getvalue().splitlines()[-1])
        per_token = 8 * 64 + 12 * 64 * 64 + 2 * 16 * 64 + 64 * 8  # embedding, block, attention, head
        per_image = (256 + 64) * 64 + (6 + 2) * 64 * 64  # timestep embedding, adaLN
        self.assertAlmostEqual(result["tflops"] * result["step_seconds"],
                               3 * 2 * (16 * per_token + per_image) / 1e12,
                               delta=0.001 * result["step_seconds"])
