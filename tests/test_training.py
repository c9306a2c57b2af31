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
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import svg
from lib import data, files, runs, shapes
from tests.helpers import (
    MINI_AE,
    MINI_DIT,
    REAL_DATA,
    Case,
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
            documented = {".lock", "config.json", "log.jsonl", "loss.png", "last.pt"}
            self.assertEqual(set(os.listdir(f"runs/{name}")), documented | also)
        shell("sample --demo --steps 2 --num 12 --classes star 0 --npz images.npz")
        self.assertEqual(set(os.listdir()), {"images.npz", "runs", "samples"})
        self.assertEqual(sorted(os.listdir("samples")), [*(f"{i:06d}.png" for i in range(12)), "overview",
                                                         "record.json"])
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
        ok("sample --export all.pt")
        shutil.rmtree("runs")
        ok("sample --steps 2 --num 4 --out exported --ckpt all.pt")
        np.testing.assert_array_equal(pictures("exported"), pictures("run"))
        self.assertEqual(svg.load_sit("all.pt").meta["classes"], shapes.CLASSES)
        ok("edit reconstruct in --ae all.pt --out again")
        np.testing.assert_array_equal(pictures("again"), pictures("reconstructions"))

    def test_training_skips_a_corrupt_image_with_one_warning(self):
        write_pictures("data/a", 3)
        write_pictures("data/b", 3)
        Path("data/a/1.png").write_bytes(Path("data/a/0.png").read_bytes()[:100])
        code, _, err = run(f"train_ae {REAL_DATA} --data data --steps 5 --log-every 1")
        self.assertEqual((code, err.count("\n")), (0, 1), err)
        self.assertRegex(err, r"warning: data/a/1\.png.*skipped \(1 so far\)")
        self.assertEqual(read_log("ae")[-1]["corrupt"], 1)


# A program whose compiled graphs are counted, and run as they are.
COUNTED = """
import importlib, sys
import torch
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile
torch.compile = lambda function, **settings: compiled(function, **{**settings, "backend": backend})
program = importlib.import_module(sys.argv.pop(1))
def main():
    program.main()
    print("graphs", len(graphs), "breaks", sum(torch._dynamo.utils.counters["graph_break"].values()))
"""


class Compiled(Case):
    def test_no_graph_breaks_and_none_is_compiled_twice(self):
        Path("counted.py").write_text(COUNTED)
        often = " --save-every 2 --preview-every 2 --workers 0 --compile --steps"
        ae = MINI_AE + " --gan 0.5 --disc-start 2"
        dit = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt"
        sample = f"sample --ckpt {shapes.DEMO_PT} --batch 2 --steps 2 --compile --num"
        for graphs, command, processes in (
                (9, ae + often + " 2", 1), (9, ae + often + " 5", 1),  # train, preview, measure, save, train
                (3, dit + often + " 2", 1), (3, dit + often + " 5", 1),
                (3, dit + often + " 5 --accumulate 2", 2),
                (2, sample + " 2", 1), (2, sample + " 4", 1)):
            with self.subTest(command):
                shutil.rmtree("runs", ignore_errors=True)
                script, *flags = command.split()
                out = shell("counted", script, *flags, processes=processes)
                self.assertEqual(out.count(f"graphs {graphs} breaks 0"), processes, out[-300:])


@unittest.skipUnless(os.path.exists("/dev/nvidia0"), "needs an NVIDIA GPU")
class OnAGPU(Case):
    def test_programs_agree_with_a_cpu(self):
        for name, device in (("cpu", ""), ("gpu", "0")):
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=device):
                shell(f"sample --ckpt {shapes.DEMO_PT} --steps 5 --precision fp32 --out", name)
                shell(f"{MINI_AE} --gan 0.5 --disc-start 2 --steps 4 --no-compile --name", f"{name}-ae")
                ae = trained() / "runs/demo-ae/last.pt"
                shell(f"{MINI_DIT} --steps 4 --ae {ae} --name", f"{name}-dit")  # in bf16, and compiled
        self.assertLessEqual(np.abs(pictures("cpu").astype(int) - pictures("gpu")).max(), 1)
        for run_name, loss in (("ae", "l1_loss"), ("dit", "loss")):
            logs = [[entry[loss] for entry in read_log(f"{name}-{run_name}")] for name in ("cpu", "gpu")]
            np.testing.assert_allclose(*logs, rtol=0.1)  # the noise is another


class Cache(Case):
    """train_dit.py --cache: latents encoded once and kept in memory."""

    def setUp(self):
        super().setUp()
        for name in ("train/a", "train/b"):
            write_pictures(name, 10, first=ord(name[-1]))
        self.command = (f"{MINI_DIT} --data train --ae {trained()}/runs/demo-ae/last.pt --steps 3 "
                        "--label-dropout 0.5 --name")

    def test_latents_in_memory_give_the_losses_of_images_within_half_precision(self):
        ok(self.command, "images")
        ok(self.command, "cached", "--cache")
        shell(self.command, "two", "--cache", processes=2)
        images, cached, two = ([entry["loss"] for entry in read_log(name)]
                               for name in ("images", "cached", "two"))
        np.testing.assert_allclose(cached, images, 1e-3)
        np.testing.assert_allclose(two, cached, 1e-4)
        ok(self.command, "cached", "--cache", "--steps", 4)  # encodes again, and goes on
        ok(self.command, "whole", "--cache", "--steps", 4)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("cached", "whole")))

    def test_they_are_those_of_the_images_and_of_their_mirror_images(self):
        ae = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt")
        dataset = data.open_data("train", 32)
        cached = data.Latents(dataset, ae, 7, 0, torch.device("cpu"))
        x = data.to_float(torch.stack([torch.from_numpy(dataset[i, 0][0]) for i in range(20)]), "cpu")
        for flip, images in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                expected = ae.encode(images)
            error = (cached.latents[:, flip].float() - expected).abs()
            self.assertLess((error / (expected.abs() + 0.01)).max(), 2 ** -10)
        self.assertEqual([cached[i, 0][1] for i in range(20)], [0] * 10 + [1] * 10)

    def test_corrupt_images_are_reported(self):
        Path("train/a/3.png").write_text("no picture")
        code, _, err = run(self.command, "first", "--cache")
        self.assertEqual((code, err.count("warning")), (0, 1), err)
        self.assertIn("train/a/3.png: not a readable image", err)
        self.assertEqual(read_log("first")[-1]["corrupt"], 1)


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
        for other, words in ((command.replace("--model 2", "--model 1"), "Unexpected key(s) in state_dict"),
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

                    with mock.patch("lib.runs.seed_step", seed_step):
                        self.assertEqual(self.train("stopped", *flags, ae=ae)["step"], 2)
                    with open("runs/stopped/log.jsonl", "a") as f:
                        f.write('{"step": 3, "lo')  # what a full disk leaves of a line
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
import os, signal, sys, torch, train_dit
from lib import runs
real = runs.seed_step
def seed_step(seed, step, *rank):
    if runs.rank() == 1 and step == 1 and not os.path.exists("runs/faulty/last.pt"):
        os.kill(os.getpid(), signal.SIGUSR1)
    if runs.rank() == 0 and step == 4 and not os.path.exists("died"):
        open("died", "w").close()
        raise RuntimeError("the card fell off the bus")
    real(seed, step, *rank)
runs.seed_step = seed_step
main = train_dit.main
""")
        command = command.replace("train_dit", "faulty")
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

    def test_a_damaged_checkpoint_ends_in_a_line_and_a_cut_log_in_none(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --name new --steps"
        ok(command, 2)
        last = torch.load("runs/new/last.pt", weights_only=True)
        Path("runs/new/0notes.pt").touch()
        with open("runs/new/log.jsonl", "ab") as f:
            f.write(b'{"step": 1, "lo\n')
        flipped = {**last["ema"], "latent_std": last["ema"]["latent_std"] * 2}
        for damage in ({"opt": {}}, {"ema": flipped}, {"trained_on": "another"}):
            torch.save({**last, **damage}, "runs/new/last.pt")
            code, _, err = run(command, 3)
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertIn("runs/new/last.pt", err)
        torch.save(last, "runs/new/last.pt")
        ok(command, 3)
        self.assertTrue(os.path.exists("runs/new/0notes.pt"))

    def test_a_run_has_one_writer_and_a_killed_one_blocks_nobody(self):
        ae = f" --ae {trained()}/runs/demo-ae/last.pt"
        writer = start(MINI_DIT + ae + " --steps 100000 --save-every 1 --workers 1")
        self.addCleanup(writer.kill)
        for line in writer.stdout:
            if line.startswith("step 3"):
                break
        code, _, err = run(MINI_DIT + ae + " --steps 1 --save-every 1")
        self.assertEqual((code, err.count("\n")), (2, 1), err)
        self.assertIn("runs/demo-dit is being written by another process", err)
        self.assertIsNone(writer.poll())
        writer.kill()
        writer.communicate()
        step = svg.load_checkpoint("runs/demo-dit/last.pt")["step"]
        self.assertIn("resuming", ok(MINI_DIT + ae + f" --save-every 1 --steps {step + 1}"))

    def test_stage_2_measures_latents_once_and_resumes_with_them(self):
        ae = files.load_checkpoint(trained() / "runs/demo-ae/last.pt")
        ae["model"]["alignment_batches"].zero_()  # as the authors' file, without statistics of alignment
        torch.save({**ae, "fingerprint": files.fingerprint(ae["model"])}, "theirs.pt")
        np.savez("stats.npz", mean=np.zeros(72), std=np.ones(72))
        command = MINI_DIT + " --ae theirs.pt --name"
        for name, flags in (("whole", "--steps 4"), ("halves", "--steps 2"), ("halves", "--steps 4"),
                            ("stats", "--steps 1 --latent-stats stats.npz")):
            code, _, err = run(command, name, *flags.split())
            self.assertEqual(code, 0, err)
            if name == "whole":  # Python shows the same warning only once
                self.assertRegex(err, "^warning: theirs.pt has no alignment statistics.*\n$")
        whole, halves, stats = (svg.load_checkpoint(f"runs/{name}/last.pt")
                                for name in ("whole", "halves", "stats"))
        self.assert_same(whole, halves)
        self.assertTrue((stats["ema"]["latent_std"] == 1).all())
        self.assertFalse((whole["ema"]["latent_std"] == 1).any())
        self.assertTrue(torch.equal(whole["ema"]["latent_std"], whole["model"]["latent_std"]))

    def test_stage_2_says_which_autoencoder_it_takes(self):
        shutil.copytree(trained() / "runs/demo-ae", "runs/demo-ae")
        self.assertIn("autoencoder runs/demo-ae/last.pt, step 4, fingerprint", ok(MINI_DIT + " --steps 1"))

    def test_progress_is_shown_every_log_every_steps_and_in_long_loops_by_the_time(self):
        out = ok(MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 6 --log-every 5")
        self.assertEqual([line.split()[1] for line in out.splitlines() if line.startswith("step")],
                         ["5/6", "6/6"])
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
        self.train("run", "--save-every", 1, "--milestone-every", 3, steps=7)
        self.assertEqual(sorted(p.name for p in Path("runs/run").glob("[0-9]*.pt")),
                         [f"000000{i}.pt" for i in (3, 5, 6, 7)])

    def test_bench_needs_nothing_and_writes_nothing(self):
        for command in (f"bench sample --ckpt {shapes.DEMO_PT} --batch 4 --steps 2", "bench fid --batch 1",
                        f"bench train_dit --demo --data shapes://val --ae {shapes.DEMO_PT} --batch 4"):
            with self.subTest(command):
                result = json.loads(shell(command).splitlines()[-1])
                for key in ("images_per_second", "peak_gib"):
                    self.assertGreater(result[key], 0, key)
                self.assertEqual(os.listdir(), [])
