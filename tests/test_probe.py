"""The probes: what they measure, on known answers; what they refuse."""
import argparse
import functools
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import svg
from lab import dense, maps, probe
from lib import data, shapes
from tests.helpers import Case, ok, run, start, trained, write_pictures

ENCODER = f"--encoder {shapes.DEMO_PT}"
SMALL = f"{ENCODER} --size 32 --workers 0"
UNKNOWN = Image.new("L", (60, 44))  # a label
SET = f"--data set {SMALL}"


def dense_files(task, split, i):
    """The image and the label number i to "train" or to "test" on, in the layout of ADE20K or NYUv2."""
    if task == "depth":
        return Path(f"set/{split}/room/rgb_{i}.jpg"), Path(f"set/{split}/room/sync_depth_{i}.png")
    folder = {"train": "training", "test": "validation"}[split]
    return Path(f"set/images/{folder}/{i}.jpg"), Path(f"set/annotations/{folder}/{i}.png")


def write_dense(task):
    """A set with two images to train and two to test on: left half one label, right half another."""
    right = np.tile(np.arange(60) // 30, (44, 1))
    label = {"segment": np.uint8([150, 3]), "depth": np.uint16([6000, 1500])}[task][right]
    for split, i in itertools.product(("train", "test"), (0, 1)):
        for file, array in zip(dense_files(task, split, i), (np.uint8([5, 250])[right], label), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)


def write_tree(count):
    """Write pictures of two classes in tree/train and tree/val."""
    for split, (i, name) in itertools.product(("train", "val"), enumerate("ab")):
        write_pictures(f"tree/{split}/{name}", count, first=100 * i)


def measured(command):
    """What a probe, which must succeed in silence, wrote as JSON."""
    ok(f"probe {command}")
    return json.loads(Path(f"probes/{command.split()[0]}.json").read_text())


# Commands, and the words that their errors must hold.
REFUSED = [
    # Which probe, which flags.
    ("probe", "classify", "features"),
    ("probe guess", "guess", "classify"),
    ("probe toy --demo --data good", "--demo --data good"),
    ("probe features --images good/a/0.png", "--encoder"),
    (f"probe features {ENCODER}", "--images"),
    ("probe space --demo --data good", "--data", "--demo"),
    ("probe space --demo --size 64", "shapes://val", "32 pixels", "64"),
    (f"probe classify {ENCODER} --ae x.pt", "--ae", "--encoder"),
    # Values out of range.
    ("probe classify --demo --batch 1", "--batch", "'1'", "from 2"),
    (f"probe classify --demo {ENCODER} --features residual", "--features residual"),
    ("probe pca --demo --class 10", "0 to 9"),
    (f"probe segment {ENCODER} --demo --features pixels --size 30", "--size 30", "multiple of 8"),
    (f"probe features {ENCODER} --images good/a/0.png --size 100", "--size 100", "multiple of 8"),
    ("probe space --demo --classes 1", "--images 500", "--classes 1", "too few"),
    ("probe space --demo --images 39", "--images 39", "--classes 20", "too few"),
    # Files.
    ("probe space --data good", "--ae"),  # only demo runs are there
    (f"probe classify --data good {ENCODER}", "--data good/train", "no such folder"),
    ("probe pca --image text.pt --demo", "text.pt", "not a readable image"),
    (f"probe segment --data nowhere {SMALL}", "--data nowhere", dense.LAYOUTS["segment"]),
    (f"probe depth --data good {SMALL}", "--data good", dense.LAYOUTS["depth"]),
    ("probe toy --out text.pt", "text.pt"),
    ("probe classify --demo --out text.pt/below", "text.pt/below"),
    ("probe toy --out theirs", "theirs/toy.*", "not of this program"),
]


class Command(Case):
    def test_help_shows_the_flags_of_one_probe_with_their_defaults(self):
        out = ok("probe depth --help")
        self.assertIn("NYUv2's layout", out)
        self.assertRegex(out, r"--epochs EPOCHS\s+passes over the training images \(default: 25\)")
        self.assertNotIn("--cache", out)
        self.assertIn("python -m lab.probe pca --class 207", run("probe --help")[1])

    def test_numbers_come_before_the_files_and_none_is_no_json_number(self):
        settings = argparse.Namespace(out=".", probe="toy")
        with mock.patch("sys.stdout") as out:
            probe.report(settings, {"a": math.nan, "b": {"c": math.inf, "d": 0.123456}, "e": np.float64(2)})
            with mock.patch("lib.files.write_atomically", side_effect=OSError), self.assertRaises(OSError):
                probe.report(settings, {"a": 0.5})
        written = json.loads(Path("toy.json").read_text(), parse_constant=self.fail)
        self.assertEqual((written["a"], written["b"], written["e"]), (None, {"c": None, "d": 0.1235}, 2))
        self.assertIn(mock.call('{"a": 0.5}'), out.write.mock_calls)

    def test_an_unreadable_picture_is_named_once_and_left_out(self):
        write_tree(6)
        for split in ("train", "val"):
            Path(f"tree/{split}/b/3.png").write_text("no picture")
        training = f"classify {SMALL} --data tree --epochs 2 --batch 5"
        for command, splits in ((f"space {SMALL} --data tree/val", ["val"]), (training, ["train", "val"]),
                                (f"{training} --cache", ["train", "val"])):
            with self.subTest(command), warnings.catch_warnings():
                probe.warn_once.cache_clear()  # every command is a process of its own
                code, out, err = run(f"probe {command}")
                self.assertEqual(err.splitlines(), [
                    f"warning: tree/{split}/b/3.png: not a readable image, skipped" for split in splits])
                self.assertEqual((code, out.count('"images": 11')), (0, 1))

    def test_a_packed_set_gives_the_numbers_of_its_tree(self):
        write_tree(6)
        for split in ("train", "val"):
            ok(f"data pack tree/{split} packed/{split} --size 32 --workers 0")
        for command, split in (("space", "/val"), ("classify --cache --epochs 2 --batch 5", "")):
            tree, packed = (measured(f"{command} {SMALL} --data {x}{split}") for x in ("tree", "packed"))
            self.assertNotEqual(tree.pop("settings"), packed.pop("settings"))
            self.assertEqual(tree, packed)

    def test_linear_probe_with_cached_and_with_fresh_crops(self):
        few = {name: shapes.dataset(name, n) for name, n in (("shapes://train", 200), ("shapes://val", 60))}
        with mock.patch("lib.shapes.dataset", lambda name, count=None: few[name]):
            self.assertGreater(measured("classify --demo --batch 50")["top1"], 0.85)
            with mock.patch.dict(probe.DEMO["classify"], cache=False), \
                    mock.patch("lab.probe.random_resized_crops", wraps=probe.random_resized_crops) as cropped:
                crops = measured("classify --demo --features latent --batch 50 --epochs 2 --lr 0.02")
        self.assertEqual(sum(len(call.args[0]) for call in cropped.mock_calls), 2 * 200)  # not the test's
        self.assertGreater(crops["top1"], 0.3)
        self.assertGreaterEqual(crops["top5"], crops["top1"])

    def test_random_crops_are_parts_of_the_image(self):
        ramp = torch.linspace(-1, 1, 32).expand(16, 1, 32, 32).clone()
        crops = probe.random_resized_crops(ramp, torch.Generator().manual_seed(0))
        self.assertLess((crops[:, :, 0] - crops[:, :, -1]).abs().max(), 1e-5)  # rows stay rows
        spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2
        self.assertTrue(((spans.abs() > 0.2) & (spans.abs() < 1.01)).all())
        self.assertTrue((spans > 0).any() and (spans < 0).any())  # mirrored or not

    def test_commands_that_cannot_be_right_end_in_one_line_and_write_nothing(self):
        Path("runs").symlink_to(trained() / "runs")
        write_pictures("good/a", 2)
        Path("text.pt").write_text("not a checkpoint\nat all\n")
        for name in ("probes", "theirs"):
            Path(name).mkdir()
        Path("theirs/toy.png").write_text("a picture of theirs")
        self.refuse_all(REFUSED)


BAD_LABELS = [  # which part, how many of its two labels, what happens to them, words of the error
    ("train", 1, os.remove, "not a label of", "No such file"),
    ("test", 1, lambda path: path.write_text("no picture"), "not a label of"),
    ("test", 1, Image.new("L", (3, 3)).save, "not a label of", "(3, 3)"),
    ("test", 1, Image.new("RGB", (60, 44)).save, "not a label of", "(44, 60, 3)"),
    ("train", 2, UNKNOWN.save, "--data set", "nothing to train"),
    ("test", 2, UNKNOWN.save, "--data set", "nothing to train or to test on"),
]


class Dense(Case):
    def setUp(self):
        super().setUp()
        Path("probes").mkdir()  # --out is made before anything is read
        for task in dense.LAYOUTS:
            write_dense(task)  # one beside the other
            self.enterContext(mock.patch.dict(probe.PAPER[task], width=16, warmup=3))

    def test_segmentation_and_depth_learn_their_own_layouts_and_need_not_know_every_picture(self):
        for task, length in (("segment", "--steps 30"), ("depth", "--epochs 90")):
            UNKNOWN.save(dense_files(task, "train", 0)[1])  # is the whole first batch, with this seed
            self.assertNotIn("nan", ok(f"probe {task} {SET} --batch 2 --lr 0.005 --seed 6 {length}"))
        segments, depth = (json.loads(Path(f"probes/{task}.json").read_text()) for task in dense.LAYOUTS)
        self.assertGreater(segments["mIoU"], 0.8)
        self.assertLess(depth["RMSE_m"], 1)
        self.assertLess(depth["A.Rel"], 0.35)
        self.assertTrue(os.path.exists("probes/segment.png") and os.path.exists("probes/depth.png"))

    def test_learning_rate_rises_then_decays_step_by_step(self):
        rate = functools.partial(dense.learning_rate, steps=8000, lr=8e-5, warmup=1500)
        decayed = 1e-6 + 7.9e-5 * (1 - 750 / 8000) ** 0.9
        for step, expected in ((0, 8e-5 / 1500), (750, 751 / 1500 * decayed), (8000, 1e-6)):
            self.assertAlmostEqual(rate(step), expected, delta=1e-12)
        self.assertEqual(max(range(8000), key=rate), 1499)
        used = []

        def step(optimizer):
            used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))

        for task, steps in (("segment", "--steps 3"), ("depth", "--epochs 3")):
            with mock.patch("torch.optim.AdamW.step", step), mock.patch.dict(probe.PAPER[task], wd=0.3):
                measured(f"{task} {SET} --batch 2 --lr 0.1 {steps}")
        self.assertEqual(used, 2 * [(dense.learning_rate(i, 3, 0.1, 3), 0.3) for i in range(3)])

    def test_numbers_of_known_predictions(self):
        UNKNOWN.save(dense_files("depth", "test", 1)[1])  # left out
        log_depth = torch.linspace(0, 1, 4).expand(1, 1, 3, 4)  # is averaged with the mirrored picture's
        with mock.patch("lab.dense.sliding", lambda predict, x, args: log_depth):
            depth = measured(f"depth {SET} --batch 2 --epochs 1")
        errors = np.abs(math.exp(0.5) - np.array([1.5, 6]))
        self.assertAlmostEqual(depth["RMSE_m"], np.sqrt((errors ** 2).mean()), delta=1e-3)
        self.assertAlmostEqual(depth["A.Rel"], (errors / [1.5, 6]).mean(), delta=1e-3)
        self.assertEqual(depth["images"], 1)
        everywhere_3 = F.one_hot(torch.tensor([2]), 150)[..., None, None].float()  # is half of a picture
        with mock.patch("lab.dense.sliding", lambda predict, x, args: everywhere_3):
            segments = measured(f"segment {SET} --batch 2 --steps 1")
        self.assertEqual((segments["mIoU"], segments["mAcc"]), (0.25, 0.5))  # by class

    def test_crops_and_their_targets_fit_and_depend_on_their_number_alone(self):
        args = argparse.Namespace(probe="segment", demo=False, data="set", seed=0, size=32, least_scale=0.5)
        pairs, _ = dense.list_pairs(args)
        images, targets = dense.random_crops(pairs, args, range(20))
        bright = images.float().mean(3) > 127
        self.assertGreater((bright[targets > 0] == (targets == 3)[targets > 0]).float().mean(), 0.97)
        self.assertTrue((targets == 0).any())  # beyond the picture
        self.assertTrue((targets[:, 0, 0] == 3).any() and (targets[:, 0, 0] == 150).any())  # mirrored or not
        self.assertTrue(torch.equal(dense.random_crops(pairs, args, [7])[0][0], images[7]))

    def test_sliding_window_covers_every_pixel_once_on_average_at_the_papers_stride(self):
        seen = []

        def predict(window):
            seen.append((window.shape[2:], window[0, 0, 0, 0].item()))
            return window * 2

        x = torch.randn(1, 3, 77, 64)
        self.close(dense.sliding(predict, x, argparse.Namespace(size=32, outputs=3)), 2 * x)
        self.assertEqual((len(seen), {size for size, _ in seen}), (4 * 3, {(32, 32)}))
        seen.clear()
        columns = torch.arange(1194.0).expand(1, 1, 512, -1)
        dense.sliding(predict, columns, argparse.Namespace(size=512, outputs=1))
        self.assertEqual([column for _, column in seen], [0, 341, 682])

    def test_labels_are_checked_before_the_training(self):
        for task, (split, count, spoil, *words) in itertools.product(dense.LAYOUTS, BAD_LABELS):
            write_dense(task)
            for i in range(count):
                spoil(dense_files(task, split, i)[1])
            with mock.patch("lab.dense.random_crops", side_effect=AssertionError("no training before this")):
                self.refused(f"probe {task} {SET}", *words)

    def test_a_bad_training_label_ends_the_training_in_one_line_also_from_a_loading_process(self):
        for task in dense.LAYOUTS:
            _, label = dense_files(task, "train", 1)
            Image.new("L", (3, 3)).save(label)
            self.refused(f"probe {task} {SET} --batch 8", f"error: {label}", "not a label of")
            process = start(f"probe {task} {SET} --batch 8 --workers 1")
            _, err = process.communicate()
            self.assertEqual((process.returncode, err.count("\n")), (2, 1), err)
            self.assertTrue(err.startswith(f"error: {label}: not a label of"), err)


class Spaces(Case):
    def test_encoder_features_separate_classes_and_pixels_do_not(self):
        numbers = measured("space --demo --images 120")
        self.assertGreater(numbers["encoder"]["linear"], 0.85)
        self.assertGreater(numbers["encoder"]["1-NN"], 0.85)
        for name in ("pixels", "residual"):
            self.assertLess(numbers[name]["linear"], 0.4)
            self.assertLess(numbers[name]["between/within"], numbers["latent"]["between/within"] / 5)
        self.assertTrue(os.path.exists("probes/space.png"))

    def test_space_takes_some_classes_and_as_many_images_of_each(self):
        for name in "abcde":
            write_pictures(f"tree/{name}", 6, first=100 * ord(name))
        with mock.patch("lab.probe.separability", wraps=probe.separability) as separability, \
                mock.patch("lab.maps.space_picture", wraps=maps.space_picture) as picture:
            numbers = measured(f"space --data tree {SMALL} --classes 3 --images 14")
        self.assertEqual((numbers["images"], numbers["classes"], numbers["chance"]), (12, 3, 0.3333))
        self.assertEqual(separability.call_args_list[0].args[1].tolist(), [0] * 4 + [1] * 4 + [2] * 4)
        self.assertEqual(picture.call_args.args[2], ["a", "c", "e"])

    def test_separability_of_known_clusters_and_of_noise_by_halves_of_each_class(self):
        torch.manual_seed(0)
        y = torch.arange(300) % 3
        apart = probe.separability(20 * torch.eye(3, 8)[y] + torch.randn(300, 8), y, 0)
        self.assertEqual((apart["linear"], apart["1-NN"]), (1, 1))
        self.assertAlmostEqual(apart["between/within"], (2 / 3) * 20 ** 2 / 8, delta=3)  # distance^2 / 8
        self.assertLess(probe.separability(torch.randn(300, 8), y, 0)["linear"], 0.5)
        y = torch.arange(40) // 4  # four of a class: two to learn from, two to test, for every seed
        x = 9 * torch.eye(10)[y] + 0.1 * torch.randn(40, 10)
        self.assertEqual({probe.separability(x, y, seed)["1-NN"] for seed in range(5)}, {1.0})

    def test_tsne_keeps_neighbours_at_every_scale(self):
        torch.manual_seed(0)
        y = torch.arange(90) % 3
        x = 8 * torch.eye(3, 10)[y] + torch.randn(90, 10)
        for scale in (0.01, 1, 100):
            xy = maps.tsne(scale * x)
            nearest = (torch.cdist(xy, xy) + 1e9 * torch.eye(90)).argmin(1)
            self.assertGreater((y[nearest] == y).float().mean(), 0.95)

    def test_principal_components_are_those_of_the_singular_value_decomposition(self):
        x = torch.randn(50, 1) @ torch.randn(1, 300) * 10 + torch.randn(50, 300)
        for y in (x, x[:, :20]):  # fewer rows than columns, and more
            u, s, _ = np.linalg.svd(y.numpy() - y.numpy().mean(0), full_matrices=False)
            self.close(maps.principal(y, 2).abs().float(), np.abs(u * s)[:, :2], 1e-2)

    def test_flow_measures_the_loss_by_t_and_the_distance_of_samples_without_a_decoder(self):
        numbers = measured("flow --demo --images 60 --evaluations 1 25 --seed 3 --shift 0.4")
        sit, ae = svg.load_sit(shapes.DEMO_PT), svg.load_autoencoder(shapes.DEMO_PT)
        dataset = shapes.dataset("shapes://val")
        chosen = np.linspace(0, 1999, 60).round().astype(int).tolist()
        y = torch.tensor([dataset[i, 0][1] for i in chosen])
        with torch.no_grad():
            images = torch.from_numpy(np.stack([dataset[i, 0][0] for i in chosen]))
            latents = ae.encode(data.to_float(images, "cpu"))
            z, noise = sit.normalize(latents), svg.sample_noise(3, range(60), latents.shape[1:])
            for i, (t, loss) in enumerate(numbers["loss_by_t"].items()):
                exact = svg.shift_time((i + 0.5) / 10, 0.4)
                self.assertAlmostEqual(float(t), exact, 3)
                error = sit((1 - exact) * noise + exact * z, torch.full((60,), exact), y) - (z - noise)
                self.assertAlmostEqual(loss, error.square().mean().item(), 3)
            self.assertAlmostEqual(numbers["loss"], np.mean([*numbers["loss_by_t"].values()]), 3)
            fake = sit.denormalize(svg.heun_sample(sit, noise, y, 12, shift=0.4))
        fake, real = ((x[..., :64] / latents[..., :64].std((0, 1))).numpy() for x in (fake, latents))
        found = numbers["distance"]["heun"]["25"]
        self.assertEqual(found["steps"], 12)
        pairs = (fake.mean(1), real.mean(1)), (fake.reshape(-1, 64), real.reshape(-1, 64))
        for name, (a, b) in zip(("pooled", "tokens"), pairs, strict=True):
            expected = fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
            self.assertAlmostEqual(found[name] / expected, 1, 2)
        self.assertLess(found["pooled"], numbers["distance"]["euler"]["1"]["pooled"])

    def test_pca_shows_the_states_that_the_sampler_goes_through_or_as_features_does_photos(self):
        with mock.patch("lab.maps.component_picture", wraps=maps.component_picture) as picture:
            measured("pca --demo --class star --seed 5")
        _, columns, decoded, rows = picture.call_args.args
        sit = svg.load_sit(shapes.DEMO_PT)
        star = torch.tensor([shapes.CLASSES.index("star")])
        times = svg.euler_times(25, 0.4)
        noise = svg.sample_noise(5, [0], (sit.grid ** 2, sit.channels))
        shown = range(0, 26, 5)
        states = [svg.euler_sample(sit, noise, star, times[:i + 1], 4.0) for i in shown]
        self.assertEqual(columns, [f"t {times[i]:.2f}" for i in shown])
        self.assertEqual(list(rows), ["layer 1", "layer 3", "layer 4", "layer 6"])
        with torch.no_grad():
            expected = svg.load_autoencoder(shapes.DEMO_PT).decode(sit.denormalize(torch.cat(states)))
        np.testing.assert_array_equal(decoded, data.to_uint8(expected))
        write_pictures("in", 2)
        of_a_sample = Path("probes/pca.png").read_bytes()
        measured("pca --demo --class star --seed 5 --image in/0.png")
        self.assertNotEqual(Path("probes/pca.png").read_bytes(), of_a_sample)
        measured(f"features {ENCODER} --size 32 --images in/0.png in/1.png")
        self.assertTrue(os.path.exists("probes/features.png"))

    def test_separated_classes_need_fewer_steps_on_the_exact_velocity_field(self):
        numbers = measured("toy")
        for steps in (1, 5, 25):
            self.assertGreater(numbers["entangled"][f"error_{steps}"], numbers["separated"][f"error_{steps}"])
        self.assertGreater(numbers["separated"]["error_1"], 5 * numbers["separated"]["error_25"])
        self.assertTrue(os.path.exists("probes/toy.png"))

    def test_mean_velocity_is_the_regression_of_data_minus_noise(self):
        torch.manual_seed(0)
        blobs = probe.BLOBS[[0, 2, 4]]
        noise = torch.randn(1_000_000, 2)
        points = blobs[torch.randint(3, (len(noise),))] + probe.SIGMA * torch.randn_like(noise)
        spot = torch.tensor([-0.5, 0.3])
        near = (0.6 * noise + 0.4 * points - spot).norm(dim=1) < 0.05
        velocity = probe.mean_velocity(spot.view(1, 1, 2), torch.tensor([0.4]), blobs[None])[0, 0]
        self.assertGreater(near.sum(), 1000)
        self.assertLess((velocity - (points - noise)[near].mean(0)).norm(), 0.2)  # of 2.1
