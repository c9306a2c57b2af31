"""Training: the same numbers however it is cut up, and no fault that costs more than a save."""
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import svg
import train_dit
from lib import data, files, runs, shapes
from tests import helpers
from tests.helpers import MINI_AE, Case, ok, pictures, read_log, run, shell, start, trained, write_pictures

SMALL_AE = MINI_AE + " --gan 0.5 --disc-start 2 --batch 4 --decoder-mult 1,1,1,1 --residual-depth 1"


@functools.cache
def dit():
    """MINI_DIT with the trained autoencoder, in a file without its optimisers, which are slow to read."""
    ae = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt")
    svg.save_checkpoint(trained() / "ae.pt", ae.to_checkpoint())
    return f"{helpers.MINI_DIT} --ae {trained()}/ae.pt"


def last(name):
    """The last checkpoint of a run."""
    return svg.load_checkpoint(f"runs/{name}/last.pt")


def train(name, command, *more):
    """A run in this process; its last checkpoint."""
    ok(command, *more, "--name", name)
    return last(name)


def logged(name, key="step"):
    """One number of each entry in a run's log."""
    return [entry[key] for entry in read_log(name)]


def in_step(number, action, rank=0):
    """A patch by which a rank does something in the middle of a step."""
    real = runs.seed_step

    def seed_step(seed, step, *more):
        if (step + 1, runs.rank()) == (number, rank):
            action()
        real(seed, step, *more)

    return mock.patch("lib.runs.seed_step", seed_step)


def count_graphs():
    """In a process: print a line for each graph that is compiled, run it as it is, and let none break."""
    def backend(graph, inputs):
        print("one graph more")
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=backend, fullgraph=True)


class Commands(Case):
    def test_resumed_training_equals_uninterrupted_training(self):
        for command, signals in ((SMALL_AE, [signal.SIGTERM]), (dit(), runs.STOP_SIGNALS)):
            command += " --accumulate 2 --steps"
            whole = train("whole", command, 3)
            train("halves", command, 2)
            self.assertIn("resuming runs/halves at step 2", ok(command, 3, "--name", "halves"))
            self.assert_same(whole, last("halves"))
            for number in signals:
                with self.subTest(command, number=number):
                    shutil.copytree("runs/halves", "runs/stopped", dirs_exist_ok=True)
                    for path in Path("runs/stopped").glob("*.pt"):
                        path.unlink()  # as if stopped before the first checkpoint
                    with in_step(2, functools.partial(signal.raise_signal, number)):
                        self.assertEqual(train("stopped", command, 3)["step"], 2)
                    with open("runs/stopped/log.jsonl", "a") as f:
                        f.write('{"step": 3, "lo')  # what a full disk leaves of a line
                    self.assert_same(whole, train("stopped", command, 3))
                    self.assertEqual([logged("halves"), logged("stopped")], [[1, 2, 3]] * 2)
            shutil.rmtree("runs")

    def test_two_processes_train_the_same_transformer(self):
        command = dit() + " --lr 0.0001 --steps 3 --name"
        ok(command, "one")
        shell(command, "two", "--accumulate", 2, processes=2)
        one, two = last("one")["ema"], last("two")["ema"]
        for key in one:
            self.close(one[key], two[key])

    def test_samples_do_not_depend_on_batch_size_or_processes(self):
        os.chdir(trained())
        command = "sample --steps 3 --num 9 --out"
        self.assertIn("runs/demo-dit/last.pt", ok(command, self.folder / "whole"))
        ok(command, self.folder / "single", "--batch", 1)
        ok(command, self.folder / "seven", "--batch", 7)
        shell(command, self.folder / "two", processes=2)
        whole = pictures(self.folder / "whole").astype(int)
        self.assertGreater(len(np.unique(whole[:, 0, 0])), 3)
        for other in ("single", "seven", "two"):
            self.assertLessEqual(np.abs(pictures(self.folder / other) - whole).max(), 1, other)

    def test_whole_demo_writes_what_is_documented(self):
        """And an exported file gives the pixels of its run."""
        shutil.copytree(trained() / "runs", "runs")
        always = {".lock", "config.json", "log.jsonl", "loss.png", "last.pt"}
        for name, more in (("demo-ae", {"0000002.pt", "preview-0000004.png"}),
                           ("demo-dit", {"autoencoder.pt", "preview-0000006.png"})):
            self.assertEqual(set(os.listdir(f"runs/{name}")), always | more)
        command = "sample --demo --steps 2 --num 12 --classes star 0"
        ok(command, "--npz", "images.npz")
        self.assertEqual(set(os.listdir()), {"images.npz", "runs", "samples"})
        names = [f"{i:06d}.png" for i in range(12)]
        self.assertEqual(sorted(os.listdir("samples")), [*names, "overview", "record.json"])
        self.assertEqual(os.listdir("samples/overview"), ["samples.png"])
        sampled = pictures("samples")
        np.testing.assert_array_equal(files.load_npz("images.npz")["arr_0"], sampled)
        self.assertEqual(sampled.shape, (12, 32, 32, 3))
        ok(command)  # the same command again is the same run
        code, out, _ = run("fid samples --demo --num 10 --ref images.npz")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\d.*not Inception FID")
        write_pictures("real/a", 3)
        ok("edit reconstruct real")
        self.assertEqual(sorted(os.listdir("reconstructions/a")), ["0.png", "1.png", "2.png"])
        self.assertTrue(os.path.exists("reconstructions/overview/reconstructions.png"))
        ok("sample --export all.pt")
        shutil.rmtree("runs")
        ok(command, "--ckpt", "all.pt", "--out", "exported")
        np.testing.assert_array_equal(pictures("exported"), sampled)
        self.assertEqual(svg.load_sit("all.pt").meta["classes"], shapes.CLASSES)
        ok("edit reconstruct real --ae all.pt --out again")
        np.testing.assert_array_equal(pictures("again/a"), pictures("reconstructions/a"))

    def test_training_skips_a_corrupt_image_with_one_warning(self):
        write_pictures("data/a", 3)
        write_pictures("data/b", 3)
        Path("data/a/1.png").write_bytes(Path("data/a/0.png").read_bytes()[:100])
        os.symlink("data", "link")  # as Python shows the same warning only once
        for name, command in (("data", SMALL_AE), ("link", dit() + " --cache")):
            code, _, err = run(f"{command} --data {name} --name {name} --steps 4")
            warning = f"warning: {name}/a/1.png: not a readable image, skipped (1 so far)\n"
            self.assertEqual((code, err), (0, warning))
            self.assertEqual(logged(name, "corrupt")[-1], 1)

    def test_no_graph_breaks_and_none_is_compiled_twice(self):
        torch.compile(torch.sin, backend="eager")(torch.ones(1))  # imports what each process would import
        # Train, preview, measure, save, and train again.
        often = " --save-every 2 --preview-every 2 --compile --steps 3"
        for graphs, processes, command in (
                (9, 1, SMALL_AE + often), (3, 1, dit() + often), (3, 2, dit() + often + " --accumulate 2"),
                (2, 1, f"sample --ckpt {shapes.DEMO_PT} --batch 2 --num 4 --steps 2 --compile")):
            with self.subTest(command, processes=processes):
                shutil.rmtree("runs", ignore_errors=True)
                out = shell(command, processes=processes, before=count_graphs)
                self.assertEqual(out.count("one graph more"), graphs * processes)


class Cache(Case):
    def setUp(self):
        super().setUp()
        for name in ("train/a", "train/b"):
            write_pictures(name, 10, first=ord(name[-1]))
        self.command = dit() + " --data train --label-dropout 0.5 --steps 3 --name"

    def test_latents_in_memory_give_the_losses_of_images_within_half_precision(self):
        ok(self.command, "images")
        ok(self.command, "cached", "--cache")
        shell(self.command, "two", "--cache", processes=2)
        images, cached, two = (logged(name, "loss") for name in ("images", "cached", "two"))
        np.testing.assert_allclose(cached, images, 1e-3)
        np.testing.assert_allclose(two, cached, 1e-4)
        ok(self.command, "resumed", "--cache", "--steps", 2)
        ok(self.command, "resumed", "--cache")  # encodes again, and goes on
        self.assert_same(last("resumed"), last("cached"))

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


def die_under_torchrun():
    """In a process: be torchrun, with two forked processes, of which one dies in step 5, once."""
    def die():
        if not os.path.exists("died"):
            Path("died").touch()
            raise RuntimeError("the card fell off the bus")

    def program():
        runs.run_main(main)

    main = train_dit.main
    in_step(5, die).start()
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or the restart may meet a closed port
    config = LaunchConfig(1, 1, 2, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          start_method="fork")
    train_dit.main = elastic_launch(config, program)


def save_and_be_killed(point):
    """Save a checkpoint, and be killed at the point-th call, whatever is called."""
    calls = itertools.count()

    def count(frame, event, function):
        if event == "c_call" and next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    svg.save_checkpoint("last.pt", {"step": 2})
    sys.setprofile(None)


class Training(Case):
    def stops(self, command, words):
        """An error in one line that holds some words, whatever the run wrote before it."""
        code, _, err = run(command)
        self.assertEqual((code, err.count("\n")), (2, 1), err)
        self.assertIn(words, err)

    def test_accumulation_and_recomputation_change_nothing(self):
        command = dit() + " --lr 0.0001 --steps 3"
        whole, parts = train("whole", command), train("parts", command, "--accumulate", 4)
        self.assert_same(whole["model"], train("recomputed", command, "--recompute")["model"])
        for key in whole["model"]:
            self.close(whole["model"][key], parts["model"][key])
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            np.testing.assert_allclose(logged("whole", key), logged("parts", key), atol=tolerance)
        command = SMALL_AE + " --steps 2"
        self.assert_same(train("ae", command)["model"], train("again", command, "--recompute")["model"])

    def test_two_processes_train_the_same_autoencoder(self):
        command = SMALL_AE + " --disc-start 1 --residual-dropout 0 --lr 0.000001 --steps 3 --name"
        ok(command, "one")
        shell(command, "two", processes=2)
        ok(command, "parts", "--accumulate", 2)  # where statistics are those of half a batch
        one, two, parts = (np.add(logged(name, "l1_loss"), logged(name, "disc_loss"))
                           for name in ("one", "two", "parts"))
        np.testing.assert_allclose(two, one, rtol=1e-5)
        self.assertGreater(np.abs(parts - one).max(), 1e-3)
        # As vectors: Adam steps by rounding noise where a gradient is 0, as of a key's bias; with the noise
        # a pixel's |x - y| changes sign. Adam's first moments are the gradients: unsynced they differ by 1.
        for key, tolerance in (("model", 1e-5), ("disc", 1e-5), ("opt", 0.02), ("opt_disc", 0.02)):
            parts = zip(*([v["exp_avg"] if "opt" in key else v for v in c[key].get("state", c[key]).values()]
                          for c in (last("one"), last("two"))), strict=True)
            a, b = (torch.cat([t.double().flatten() for t in side]) for side in zip(*parts, strict=True))
            self.assertLess((a - b).norm() / a.norm(), tolerance, key)

    def test_ablation_flags_change_what_they_name_and_nothing_else(self):
        whole = svg.load_checkpoint(trained() / "runs/demo-dit/last.pt")
        without = train("without", dit(), "--no-qk-norm", "--steps", 1)
        self.assertEqual({k for k in whole["model"] if "q_norm" in k or "k_norm" in k},
                         whole["model"].keys() - without["model"].keys())
        ok("sample --steps 1 --num 2 --ckpt runs/without/last.pt")
        masked = train("masked", SMALL_AE, "--mask-ratio", 1, "--steps", 1)
        self.assertEqual(masked["config"]["mask_ratio"], 1)
        names = [name for name, _ in svg.load_autoencoder("runs/masked/last.pt").named_parameters()]
        states = masked["opt"]["state"]  # nothing reaches the residual
        moved = {name for i, name in enumerate(names) if states[i]["exp_avg"].any()}
        self.assertTrue(any(name.startswith("decoder.") for name in moved))
        self.assertFalse(any(name.startswith("residual") for name in moved))

    def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(self):
        p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer, other = (torch.optim.AdamW([x], 0.1, fused=True) for x in (p, q))
        p.grad = torch.tensor([3.0, 0.0, 4.0])
        norm, skipped = runs.optimizer_step(optimizer, clip=1.0)
        self.close((norm.item(), float(skipped), p.grad.norm().item()), (5.0, 0.0, 1.0))
        before = copy.deepcopy([p.data, optimizer.state_dict()["state"]])
        p.grad, q.grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
        self.assertTrue(runs.optimizer_step(optimizer, other, clip=1.0)[1])
        self.assertEqual(q.tolist(), [1, 1, 1])  # and the optimiser beside it stays too
        self.assert_same(before, [p.data, optimizer.state_dict()["state"]])

        real, calls = svg.flow_loss, itertools.count()
        bad = {1, 2, *range(4, 4 + runs.MAX_SKIPPED)}

        def sometimes(*inputs, **settings):
            return real(*inputs, **settings) * (math.nan if next(calls) in bad else 1)

        command = dit() + " --name bad --log-every"
        with mock.patch("svg.flow_loss", sometimes):
            ok(command, 2, "--steps", 4)
            self.assertEqual([logged("bad"), logged("bad", "skipped")], [[2, 4], [1, 1]])
            self.assertTrue(np.isfinite(logged("bad", "loss")).all())
            step = 4 + runs.MAX_SKIPPED  # the next to be logged would be step 50
            self.stops(command + " 50 --steps 99", f"no finite gradient for {runs.MAX_SKIPPED} steps, up to "
                       f"step {step}: stopped; the last good checkpoint, if any, is runs/bad/last.pt;")
        self.assertEqual(last("bad")["step"], 4)
        os.makedirs("runs/mended")  # as the message says
        shutil.copy("runs/bad/last.pt", "runs/mended")
        command = dit() + " --name mended --steps 5 --lr 0.001"
        self.assertIn("resuming runs/mended at step 4", ok(command))
        self.assertEqual(last("mended")["opt"]["param_groups"][0]["lr"], 0.001)
        os.makedirs("runs/copied")
        shutil.copy("runs/bad/last.pt", "runs/copied")
        command = command.replace("mended", "copied")
        for other, words in ((command.replace("--model 2", "--model 1"), "Unexpected key(s) in state_dict"),
                             (MINI_AE + " --name copied", "not of this stage")):
            self.stops(other, words)
        ok(command)  # nothing remembers the wrong ones

    def test_images_that_are_not_finite_and_too_high_a_rate_spoil_no_checkpoint(self):
        real, spoiled = data.to_float, []

        def spoil(images, device):
            return real(images, device) * (spoiled.pop() if spoiled else 1)

        def spoil_step():
            spoiled[:] = [math.nan]

        command = SMALL_AE + " --disc-start 1 --steps 3 --name"
        patches = contextlib.ExitStack()
        for patch in (mock.patch("lib.data.to_float", spoil), in_step(2, spoil_step)):
            patches.enter_context(patch)
        with patches:
            ok(command, "one")
            shell(command, "two", processes=2)
        for name in ("one", "two"):
            self.assertEqual(logged(name, "skipped"), [0, 1, 0])
            self.assertEqual(last(name)["disc"]["main.3.num_batches_tracked"], 2 * 3)
            self.assertTrue(all(value.isfinite().all() for value in last(name)["disc"].values()))
        ok(command, "one", "--steps", 4)
        for command in (MINI_AE, dit()):
            self.stops(command + " --lr 1e38 --steps 1 --name hot", "are not finite at step 1, such as")
            self.assertFalse(os.path.exists("runs/hot/last.pt"))
            shutil.rmtree("runs/hot")

    def test_a_run_has_one_writer_and_a_killed_one_blocks_nobody(self):
        """A killed run goes on from its last save; a stopped one says how."""
        command = dit() + " --save-every 1 --steps"
        killed = start(command, 100000, "--workers", 1)
        self.addCleanup(killed.kill)
        next(line for line in killed.stdout if line.startswith("step 3/"))
        self.stops(command + " 1", "runs/demo-dit is being written by another process")
        self.assertTrue(killed.ranks[0].is_alive())
        killed.kill()
        killed.ranks[0].join()  # its loading process lives on for seconds
        killed.stdout.close()
        killed.stderr.unlink()
        step = last("demo-dit")["step"]
        self.assertGreaterEqual(step, 2)
        Path("runs/demo-dit/.last.pt.1.tmp").touch()  # what a kill in the middle of a save leaves

        stopped = start(command, 100000, "--workers", 2)
        for line in stopped.stdout:
            if line.startswith(f"step {step + 2}/"):
                os.killpg(stopped.pid, signal.SIGTERM)  # its loading processes too
        _, err = stopped.communicate()
        self.assertEqual((stopped.returncode, err), (0, ""))
        step = last("demo-dit")["step"]
        self.assertEqual(line, f"SIGTERM: stopped after step {step}; the same command resumes from "
                               "runs/demo-dit/last.pt\n")
        ok(command, step + 1)
        self.assertEqual(logged("demo-dit"), list(range(1, step + 2)))
        self.assertNotIn(".last.pt.1.tmp", os.listdir("runs/demo-dit"))

    def test_two_processes_stop_together_and_a_dead_one_is_restarted_where_the_run_was(self):
        command = dit() + " --steps 6 --save-every 2 --name"
        shell(command, "whole", processes=2)
        stop = functools.partial(signal.raise_signal, signal.SIGUSR1)
        out = shell(command, "faulty", processes=2, before=in_step(2, stop, rank=1).start)
        self.assertIn("stopped after step 2", out)
        process = start(command, "faulty", before=die_under_torchrun)
        out, err = process.communicate()
        self.assertEqual(process.returncode, 0, err)  # torchrun's, once both have come to their end
        self.assertIn("the card fell off the bus", err)
        self.assertIn("resuming runs/faulty at step 4", out)
        self.assert_same(last("whole"), last("faulty"))

    def test_a_program_that_fails_ends_at_once_with_its_loading_processes(self):
        def kill_a_loader():
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

        def fail():
            raise RuntimeError("the card fell off the bus")

        for action, code, words in ((kill_a_loader, 2, "error: a loading process was killed"),
                                    (fail, 1, "RuntimeError: the card fell off the bus")):
            process = start(dit() + " --workers 2 --steps 100000", before=in_step(3, action).start)
            _, err = process.communicate()  # returns when none is left that could print
            self.assertEqual(process.returncode, code)
            self.assertIn(words, err)
        with mock.patch.dict(os.environ, WORLD_SIZE="2"):
            self.stops(dit(), "RANK")
        with mock.patch("resource.getrlimit", lambda _: (60, 60)):
            self.stops(dit() + " --workers 8", "--workers 8: 60 open files are too few")

    def test_a_killed_save_leaves_the_checkpoint_before_it(self):
        svg.save_checkpoint("last.pt", {"step": 1})
        steps, child = [], None
        while not child or child.exitcode == -signal.SIGKILL:
            child = helpers.FORK.Process(target=save_and_be_killed, args=[len(steps)])
            child.start()
            child.join()
            steps.append(svg.load_checkpoint("last.pt")["step"])
        self.assertEqual(child.exitcode, 0)
        self.assertEqual(steps, sorted(steps))
        self.assertGreater(min(steps.count(1), steps.count(2)), 1)

    def test_a_damaged_checkpoint_ends_in_a_line_and_a_cut_log_in_none(self):
        command = dit() + " --name new --steps"
        ok(command, 2)
        checkpoint = torch.load("runs/new/last.pt", weights_only=True)  # in memory, as the file changes
        mine = [Path("runs/new", name) for name in ("0notes.pt", "2019.pt", ".notes.tmp")]
        for path in mine:
            path.touch()
        with open("runs/new/log.jsonl", "ab") as f:
            f.write(b'{"step": 1, "lo\n')
        flipped = {**checkpoint["ema"], "latent_std": checkpoint["ema"]["latent_std"] * 2}
        for damage in ({"opt": {}}, {"ema": flipped}, {"trained_on": "another"}):
            torch.save({**checkpoint, **damage}, "runs/new/last.pt")
            self.stops(command + " 3", "runs/new/last.pt")
        torch.save(checkpoint, "runs/new/last.pt")
        ok(command, 5, "--save-every", 1)
        self.assertTrue(all(path.exists() for path in mine))
        os.remove("runs/new/last.pt")
        self.stops(command + " 5", "runs/new has checkpoints but no last.pt")

    def test_stage_2_measures_latents_once_and_resumes_with_them(self):
        ae = files.load_checkpoint(trained() / "runs/demo-ae/last.pt")
        ae["model"]["alignment_batches"].zero_()  # as the authors' file, without statistics of alignment
        torch.save({**ae, "fingerprint": files.fingerprint(ae["model"])}, "theirs.pt")
        np.savez("stats.npz", mean=np.zeros(16 * 72), std=np.ones(16 * 72))
        command = helpers.MINI_DIT + " --ae theirs.pt --predict x --statistics element --steps"
        code, _, err = run(command, 1)
        self.assertEqual(code, 0, err)
        self.assertRegex(err, "^warning: theirs.pt has no alignment statistics.*\n$")
        first = last("demo-dit")
        with mock.patch("svg.SiT.measure_latents", None):  # never called again
            run(command, 2)
        resumed = last("demo-dit")
        self.assertEqual([resumed["config"][key] for key in ("predict", "statistics")], ["x", "element"])
        given = train("given", command, 1, "--latent-stats", "stats.npz")
        for key in ("latent_mean", "latent_std"):
            for weights in (first["model"], resumed["ema"], resumed["model"]):
                self.assert_same(first["ema"][key], weights[key])
            self.assertEqual(given["ema"][key].unique().tolist(), [float(key == "latent_std")])
            self.assertGreater(len(first["ema"][key].unique()), 1)

    def test_a_run_says_what_it_takes_and_how_far_it_is_and_keeps_milestones(self):
        shutil.copytree(trained() / "runs/demo-ae", "runs/demo-ae")
        command = helpers.MINI_DIT + " --ema-decay .8 --save-every 1"
        out = ok(command + " --steps 7 --log-every 5 --milestone-every 3")
        self.assertIn("autoencoder runs/demo-ae/last.pt, step 4, fingerprint", out)
        self.assertRegex(out, r"cpu, \d+ threads, fp32 \| shapes://train: 20,000 images, 10 classes "
                              r"\(arrow, cross, .*, triangle\) \| SiT .*M, autoencoder .*M parameters "
                              r"\| writes runs/dem")
        self.assertEqual(re.findall("^step (.*?) ", out, re.MULTILINE), ["5/7", "7/7"])
        self.assertEqual(logged("demo-dit"), [5, 7])
        self.assertEqual(sorted(p.name for p in Path("runs/demo-dit").glob("[0-9]*.pt")),
                         [f"000000{i}.pt" for i in (3, 6)])
        self.assertRegex(out, "--ema-decay 0.8: of .* 21% will be the initial ones after 7 steps")
        self.stops(command + " --steps 8", "milestone_every 50000 (was 3)")

        # Back to an older checkpoint.
        shutil.copy("runs/demo-dit/0000003.pt", "runs/demo-dit/last.pt")
        ok(command + " --steps 5 --milestone-every 3")
        steps = [svg.load_checkpoint(f"runs/demo-dit/000000{i}.pt")["step"] for i in (3, 4, 6)]
        self.assertEqual([*steps, last("demo-dit")["step"]], [3, 4, 6, 5])

    def test_stage_2_keeps_the_autoencoder_that_it_was_trained_on(self):
        shutil.copytree(trained() / "runs", "runs")
        ok(MINI_AE + " --steps 5 --save-every 2")  # stage 1 goes on
        ok(helpers.MINI_DIT + " --steps 7")
        os.rename("runs/demo-dit", "moved")
        shutil.rmtree("runs")
        ok("sample --ckpt moved/last.pt --steps 2 --num 2")
        self.refused(f"sample --ckpt moved/last.pt --ae {shapes.DEMO_PT} --steps 2 --num 2", "--any-ae")

    def test_long_loops_show_progress_by_the_time(self):
        shown, now = [], 0
        with mock.patch("time.time", lambda: now), mock.patch("lib.runs.say", shown.append):
            for _ in runs.progress([[1]] * 100, "counting", 100):
                now += 1  # a second an image
        self.assertEqual(shown[0], "counting: 4/100 images  1.0 images/s  0:01:36 left")
        self.assertEqual(len(shown), 17)

    def test_full_disk_is_one_line_and_the_checkpoint_before_it_stays(self):
        before = train("full", dit(), "--steps", 2)
        half = os.path.getsize("runs/full/last.pt") // 2
        process = start(dit() + " --name full --steps 3",
                        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
        _, err = process.communicate()
        self.assertEqual((process.returncode, err.count("\n")), (2, 1), err)
        self.assertRegex(err, r"runs/full/last\.pt: not written .*intact")
        self.assert_same(before, last("full"))
        self.assertEqual(os.stat("runs/full/last.pt").st_nlink, 1)  # nor would a copy to it change another
        self.assertEqual(list(Path("runs/full").glob(".*.tmp")), [])

    def test_bench_needs_nothing_and_writes_nothing(self):
        np.savez("stats.npz", mean=np.zeros(72), std=np.ones(72))  # instead of measuring 2,000 images
        commands = {
            "sample": f"--ckpt {shapes.DEMO_PT} --batch 4 --num 4 --steps 2",
            "fid": "--batch 1",
            "train_dit": (f"--demo --data shapes://val --ae {shapes.DEMO_PT} --batch 1 --model 1,32,1 "
                          f"--latent-stats {self.folder}/stats.npz")}
        for program, flags in commands.items():
            with self.subTest(program):
                result = json.loads(ok(f"bench {program} {flags}").splitlines()[-1])
                self.assertGreater(min(result["images_per_second"], result["peak_gib"]), 0)
                self.assertEqual(os.listdir(), ["stats.npz"])
