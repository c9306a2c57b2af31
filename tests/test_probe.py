"""The probes: what they measure, on known answers; what they refuse."""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import fid
import figures
import probe
import shapes
import svg
from tests.helpers import MINI_AE, Case, ok, run, start, trained, write_pictures

ENCODER = f"--encoder {shapes.DEMO_PT}"
SMALL = f"{ENCODER} --size 32 --workers 0"


def write_dense(task, root, count=2, size=(60, 44)):
    """A set of the published layout of ADE20K or NYUv2: left half one label, right half another."""
    right = np.arange(size[0]) >= size[0] / 2
    grey = np.tile(np.where(right, 250, 5).astype(np.uint8), (size[1], 1))
    if task == "segment":
        values = np.where(right, 3, 150).astype(np.uint8)
    else:
        values = np.where(right, 1500, 6000).astype(np.uint16)
    for split in ("training", "test"):
        for i in range(count):
            image, label = dense_files(task, root, split, i)
            for file in (image, label):
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey.repeat(3, 1).reshape(*grey.shape, 3)).save(image)
            Image.fromarray(np.tile(values, (size[1], 1))).save(label)


def dense_files(task, root, split, i):
    """The image and the label number i of the "training" or "test" set."""
    if task == "segment":
        folder = {"training": "training", "test": "validation"}[split]
        return f"{root}/images/{folder}/{i}.png", f"{root}/annotations/{folder}/{i}.png"
    folder = {"training": "train", "test": "test"}[split]
    return f"{root}/{folder}/room/rgb_{i}.png", f"{root}/{folder}/room/sync_depth_{i}.png"


class ProbeCase(Case):
    def numbers(self, command, *more):
        """What a probe wrote as JSON."""
        ok(f"probe {command}", *more)
        return json.loads(Path(f"probes/{command.split()[0]}.json").read_text())


class Command(ProbeCase):
    def test_help_shows_the_flags_of_one_probe_with_their_defaults(self):
        code, out, err = run("probe depth --help")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("NYUv2's layout", out)
        self.assertRegex(out, r"--epochs EPOCHS\s+passes over the training images \(default: 25\)")
        self.assertNotIn("--cache", out)
        self.assertIn("python probe.py pixels --patch 8", run("probe --help")[1])

    def test_numbers_come_before_the_files_and_none_is_no_json_number(self):
        settings = argparse.Namespace(out="here", probe="toy")
        with contextlib.redirect_stdout(io.StringIO()):
            probe.report(settings, {"a": math.nan, "b": [math.inf, 0.123456]})
        written = json.loads(Path("here/toy.json").read_text(), parse_constant=self.fail)
        self.assertEqual((written["a"], written["b"]), (None, [None, 0.1235]))
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch("files.write_atomically", side_effect=OSError), \
                self.assertRaises(OSError):
            probe.report(settings, {"a": 0.5})
        self.assertIn('{"a": 0.5}', out.getvalue())

    def test_an_unreadable_picture_is_named_once_and_left_out(self):
        for split in ("train", "val"):
            for i, name in enumerate("ab"):
                write_pictures(f"tree/{split}/{name}", 8, first=100 * i)
            Path(f"tree/{split}/b/3.png").write_text("no picture")
        for command, splits in (
                (f"space {SMALL} --data tree/val", ["val"]),
                (f"classify {SMALL} --data tree --epochs 2 --batch 5", ["train", "val"]),
                (f"classify {SMALL} --data tree --epochs 2 --batch 5 --cache", ["train", "val"])):
            with self.subTest(command), warnings.catch_warnings():
                code, _, err = run(f"probe {command}")
                self.assertEqual(err.splitlines(), [
                    f"warning: tree/{split}/b/3.png: not a readable image, skipped" for split in splits])
                numbers = json.loads(Path(f"probes/{command.split()[0]}.json").read_text())
                self.assertEqual((code, numbers["images"]), (0, 15))

    def test_a_packed_set_gives_the_numbers_of_its_tree(self):
        for split in ("train", "val"):
            for i, name in enumerate("ab"):
                write_pictures(f"tree/{split}/{name}", 12, first=100 * i)
            ok(f"data pack tree/{split} packed/{split} --size 32 --workers 0")
        for command, split in (("space", "/val"), ("classify --cache --epochs 2 --batch 5", "")):
            tree, packed = (self.numbers(f"{command} {SMALL} --data {root}{split}")
                            for root in ("tree", "packed"))
            for numbers in (tree, packed):
                numbers.pop("settings")
                numbers.pop("seconds", None)
            self.assertEqual(tree, packed)

    def test_pixel_encoder_is_a_rotation_of_the_patches_for_every_program(self):
        ok("probe pixels --patch 8 --channels 200 --out .")
        encoder = svg.load_encoder("pixels.pt")
        x = torch.rand(2, 3, 32, 48) * 2 - 1
        tokens = encoder(x, grid=(4, 6))
        self.assertEqual(tokens.shape, (2, 24, 200))
        patches = torch.nn.functional.unfold(x, 8, stride=8).transpose(1, 2)
        self.close(tokens @ tokens.mT, patches @ patches.mT, 1e-4)  # lengths and angles stay
        ok(f"{MINI_AE} --encoder {self.folder}/pixels.pt --residual-channels 0 --steps 2")
        self.assertEqual(svg.load_autoencoder("runs/demo-ae/last.pt").channels, 200)


class Classification(ProbeCase):
    def test_linear_probe_with_cached_and_with_fresh_crops(self):
        real = shapes.dataset
        counts = {"shapes://train": 300, "shapes://val": 100}
        with mock.patch("shapes.dataset", lambda name, count=None: real(name, counts[name])):
            self.assertGreater(self.numbers("classify --demo --batch 50")["top1"], 0.85)
            with mock.patch.dict(probe.DEMO["classify"], cache=False), \
                    mock.patch("probe.random_resized_crops", wraps=probe.random_resized_crops) as cropped:
                crops = self.numbers("classify --demo --features latent --batch 50 --epochs 2 --lr 0.02")
        self.assertEqual(sum(len(call.args[0]) for call in cropped.mock_calls), 2 * 300)  # not the test's
        self.assertGreater(crops["top1"], 0.3)
        self.assertGreaterEqual(crops["top5"], crops["top1"])

    def test_random_crops_are_parts_of_the_image(self):
        ramp = torch.linspace(-1, 1, 32).expand(16, 1, 32, 32).clone()
        crops = probe.random_resized_crops(ramp, torch.Generator().manual_seed(0))
        self.assertLess((crops[:, :, 0] - crops[:, :, -1]).abs().max(), 1e-5)  # rows stay rows
        spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2
        self.assertTrue(((spans.abs() > 0.2) & (spans.abs() < 1.01)).all())
        self.assertTrue((spans > 0).any() and (spans < 0).any())  # mirrored or not


class Dense(ProbeCase):
    """Segmentation and depth."""

    def test_segmentation_and_depth_learn_their_own_layouts(self):
        for task, steps, good in (
                ("segment", "--steps 30 --warmup 3", lambda n: n["mIoU"] > 0.8),
                ("depth", "--epochs 60", lambda n: n["RMSE_m"] < 1 and n["A.Rel"] < 0.35)):
            with self.subTest(task):
                write_dense(task, task)
                numbers = self.numbers(f"{task} --data {task} {SMALL} --batch 4 --lr 0.005 --width 16 "
                                       f"--log-every 1000 {steps}")
                self.assertTrue(good(numbers), numbers)
                self.assertTrue(os.path.exists(f"probes/{task}.png"))

    def test_learning_rate_rises_then_decays(self):
        rate = functools.partial(probe.learning_rate, steps=8000, lr=8e-5, warmup=1500)
        decayed = 1e-6 + 7.9e-5 * (1 - 750 / 8000) ** 0.9
        for step, expected in ((0, 8e-5 / 1500), (750, 751 / 1500 * decayed), (8000, 1e-6)):
            self.assertAlmostEqual(rate(step), expected, delta=1e-12)
        self.assertEqual(max(range(8000), key=rate), 1499)
        self.assertAlmostEqual(rate(0, lr=0.1, warmup=0), 0.1)

    def test_each_step_has_the_rate_of_the_schedule(self):
        for task, steps in (("segment", "--steps 3"), ("depth", "--epochs 3")):
            write_dense(task, task)
            used = []

            class Recording(torch.optim.AdamW):
                def step(self, used=used):
                    used.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))

            with mock.patch("torch.optim.AdamW", Recording):
                self.numbers(f"{task} --data {task} {SMALL} --batch 2 --width 8 --lr 0.1 --wd 0.3 --warmup 2 "
                             f"{steps}")
            self.assertEqual(used, [(probe.learning_rate(i, 3, 0.1, 2), 0.3) for i in range(3)])

    def test_depth_is_the_mean_with_the_mirrored_pictures(self):
        write_dense("depth", "depth")
        unknown = np.zeros((44, 60), np.uint16)
        Image.fromarray(unknown).save("depth/test/room/sync_depth_1.png")  # left out
        log_depth = torch.linspace(0, 1, 4).expand(1, 1, 3, 4)
        with mock.patch("probe.sliding", lambda predict, x, size: log_depth):
            numbers = self.numbers(f"depth --data depth {SMALL} --batch 2 --width 8 --epochs 1")
        errors = np.abs(math.exp(0.5) - np.array([1.5, 6]))
        self.assertAlmostEqual(numbers["RMSE_m"], np.sqrt((errors ** 2).mean()), delta=1e-3)
        self.assertAlmostEqual(numbers["A.Rel"], (errors / [1.5, 6]).mean(), delta=1e-3)
        self.assertEqual(numbers["images"], 1)

    def test_segmentation_is_scored_by_class_over_all_pictures(self):
        write_dense("segment", "segment")  # half class 3, half class 150
        everywhere_3 = torch.zeros(1, 150, 1, 1)
        everywhere_3[0, 2] = 1
        with mock.patch("probe.sliding", lambda predict, x, size: everywhere_3):
            numbers = self.numbers(f"segment --data segment {SMALL} --batch 2 --width 8 --steps 1")
        self.assertEqual((numbers["mIoU"], numbers["mAcc"]), (0.25, 0.5))

    def test_pictures_without_a_known_pixel_do_not_spoil_the_training(self):
        for task, steps in (("segment", "--steps 8"), ("depth", "--epochs 4")):
            write_dense(task, task)
            _, label = dense_files(task, task, "training", 0)
            Image.fromarray(np.zeros((44, 60), np.uint8 if task == "segment" else np.uint16)).save(label)
            said = ok(f"probe {task} --data {task} {SMALL} --batch 1 --width 8 --log-every 1 {steps}")
            self.assertIn("loss", said)
            self.assertNotRegex(said, "nan|null")

    def test_crops_and_their_targets_fit_and_depend_on_their_number_alone(self):
        write_dense("segment", "set")
        args = argparse.Namespace(probe="segment", seed=0, size=32, least_scale=0.5)
        pairs, _ = probe.list_pairs("segment", "set")
        images, targets = probe.random_crops(pairs, args, range(20))
        bright = images.float().mean(3) > 127
        self.assertGreater((bright[targets > 0] == (targets == 3)[targets > 0]).float().mean(), 0.97)
        self.assertTrue((targets == 0).any())  # beyond the picture
        self.assertTrue((targets[:, 0, 0] == 3).any() and (targets[:, 0, 0] == 150).any())  # mirrored or not
        one, _ = probe.random_crops(pairs, args, [7])
        self.assertTrue(torch.equal(one[0], images[7]))

    def test_sliding_window_covers_every_pixel_once_on_average(self):
        x = torch.randn(1, 3, 77, 64)
        seen = []

        def predict(window):
            seen.append(window.shape[-2:])
            return window * 2

        self.close(probe.sliding(predict, x, 32), 2 * x)
        self.assertEqual((len(seen), set(seen)), (4 * 3, {(32, 32)}))

    def test_sliding_window_strides_as_the_papers(self):
        starts = []
        columns = torch.arange(1194.0).expand(1, 1, 512, -1)

        def predict(window):
            starts.append(window[0, 0, 0, 0].item())
            return window

        probe.sliding(predict, columns, 512)
        self.assertEqual(starts, [0, 341, 682])


class Spaces(ProbeCase):
    """Separability, t-SNE, principal components, mean velocities."""

    def test_encoder_features_separate_classes_and_pixels_do_not(self):
        numbers = self.numbers("space --demo --images 200")
        self.assertGreater(numbers["encoder"]["linear"], 0.85)
        self.assertGreater(numbers["encoder"]["1-NN"], 0.85)
        for name in ("pixels", "residual"):
            self.assertLess(numbers[name]["linear"], 0.4)
            self.assertLess(numbers[name]["between/within"], numbers["latent"]["between/within"] / 5)
        self.assertTrue(os.path.exists("probes/space.png"))

    def test_space_takes_some_classes_and_as_many_images_of_each(self):
        for name in "abcde":
            write_pictures(f"tree/{name}", 6, first=100 * ord(name))
        with mock.patch("probe.separability", wraps=probe.separability) as separability, \
                mock.patch("figures.space_picture", wraps=figures.space_picture) as picture:
            numbers = self.numbers(f"space --data tree {SMALL} --classes 3 --images 14")
        self.assertEqual((numbers["images"], numbers["classes"], numbers["chance"]), (12, 3, 0.3333))
        self.assertEqual(separability.call_args_list[0].args[1].tolist(), [0] * 4 + [1] * 4 + [2] * 4)
        self.assertEqual(picture.call_args.args[2], ["a", "c", "e"])

    def test_each_class_is_split_into_halves(self):
        y = torch.arange(40) // 4  # four of a class: two to learn from, two to test, for every seed
        x = 9 * torch.eye(10)[y] + 0.1 * torch.randn(40, 10)
        self.assertEqual({probe.separability(x, y, seed)["1-NN"] for seed in range(5)}, {1.0})

    def test_separability_of_known_clusters_and_of_noise(self):
        torch.manual_seed(0)
        y = torch.arange(300) % 3
        means = 20 * torch.eye(3, 8)
        apart = probe.separability(means[y] + torch.randn(300, 8), y, 0)
        self.assertEqual((apart["linear"], apart["1-NN"]), (1, 1))
        self.assertAlmostEqual(
            apart["between/within"], (2 / 3) * 20 ** 2 / 8, delta=3)  # |mean - centre|^2 over variance
        self.assertLess(probe.separability(torch.randn(300, 8), y, 0)["linear"], 0.5)

    def test_tsne_keeps_neighbours_at_every_scale(self):
        torch.manual_seed(0)
        y = torch.arange(90) % 3
        x = 8 * torch.eye(3, 10)[y] + torch.randn(90, 10)
        for scale in (0.01, 1, 100):
            xy = figures.tsne(scale * x, perplexity=10)
            nearest = (torch.cdist(xy, xy) + 1e9 * torch.eye(90)).argmin(1)
            self.assertGreater((y[nearest] == y).float().mean(), 0.95)

    def test_principal_components_are_those_of_the_singular_value_decomposition(self):
        x = torch.randn(50, 1) @ torch.randn(1, 300) * 10 + torch.randn(50, 300)
        for y in (x, x[:, :20]):  # fewer rows than columns, and more
            u, s, _ = np.linalg.svd(y.numpy() - y.numpy().mean(0), full_matrices=False)
            np.testing.assert_allclose(figures.principal(y, 2).abs().numpy(), np.abs(u * s)[:, :2],
                                       rtol=1e-2, atol=1e-2)

    def test_flow_splits_the_loss_by_time_and_channels_and_measures_the_samples_features(self):
        numbers = self.numbers("flow --demo --images 60 --steps 1 25 --seed 3")
        sit = svg.load_sit(shapes.DEMO_PT)
        ae = svg.load_autoencoder(shapes.DEMO_PT)
        dataset = shapes.dataset("shapes://val")
        chosen = np.linspace(0, 2000, 60, endpoint=False).astype(int).tolist()
        images = torch.from_numpy(np.stack([dataset[i, 0][0] for i in chosen]))
        y = torch.tensor([i % 10 for i in chosen])
        with torch.no_grad():
            z = ae.normalize(ae.encode(data.to_float(images, "cpu")))
            noise = svg.sample_noise(3, range(60), z.shape[1:])
            whole = []
            for i in range(10):
                u = torch.full((60,), (i + 0.5) / 10)
                whole.append(svg.flow_loss(sit, z, y, 0.4, u, noise).mean().item())
                t = svg.shift_time((i + 0.5) / 10, 0.4)
                error = sit((1 - t) * noise + t * z, torch.full((60,), t), y) - (z - noise)
                for name, part in (("features", error[..., :64]), ("residual", error[..., 64:])):
                    self.assertAlmostEqual(numbers["loss_by_t"][name][i][0], t, 3)
                    self.assertAlmostEqual(numbers["loss_by_t"][name][i][1], part.square().mean().item(), 3)
            split = (64 * numbers["loss_features"] + 8 * numbers["loss_residual"]) / 72
            self.assertAlmostEqual(split, np.mean(whole), 3)
            fake = svg.euler_sample(sit, noise, y, 25)[..., :64].mean(1).numpy()
            real = z[..., :64].mean(1).numpy()
        expected = fid.frechet_distance(fake.mean(0), np.cov(fake.T), real.mean(0), np.cov(real.T))
        self.assertAlmostEqual(numbers["frechet_by_steps"]["25"] / expected, 1, 2)
        self.assertLess(numbers["frechet_by_steps"]["25"], numbers["frechet_by_steps"]["1"])

    def test_pca_shows_an_image_or_a_sample_at_the_chosen_times(self):
        write_pictures("in", 2)
        self.numbers("pca --demo --class star --rows 2 --columns 3")
        sample_picture = Path("probes/pca.png").read_bytes()
        self.numbers("pca --demo --class star --rows 2 --columns 3 --images in/0.png")
        self.assertNotEqual(Path("probes/pca.png").read_bytes(), sample_picture)
        for columns, times in ((1, 1), (26, 26), (40, 26)):
            with mock.patch("figures.hidden_picture", wraps=figures.hidden_picture) as picture:
                self.numbers(f"pca --demo --rows 1 --columns {columns}")
            self.assertEqual(len(picture.call_args.args[1]), times)
        numbers = self.numbers(f"pca {ENCODER} --size 32 --images in/0.png in/1.png")
        self.assertEqual(numbers["images"], 2)

    def test_separated_classes_need_fewer_steps_on_the_exact_velocity_field(self):
        numbers = self.numbers("toy")
        for steps in (1, 5, 25):
            self.assertGreater(numbers["entangled"][f"error_{steps}"], numbers["separated"][f"error_{steps}"])
        self.assertGreater(numbers["separated"]["error_1"], 5 * numbers["separated"]["error_25"])
        self.assertTrue(os.path.exists("probes/toy.png"))

    def test_mean_velocity_is_the_regression_of_data_minus_noise(self):
        torch.manual_seed(0)
        n = 1_000_000
        t = 0.4
        blobs = probe.BLOBS[[0, 2, 4]]
        data = blobs[torch.randint(3, (n,))] + probe.SIGMA * torch.randn(n, 2)
        noise = torch.randn(n, 2)
        spot = torch.tensor([-0.5, 0.3])
        near = ((1 - t) * noise + t * data - spot).norm(dim=1) < 0.05
        expected = (data - noise)[near].mean(0)
        velocity = probe.mean_velocity(spot.view(1, 1, 2), torch.tensor([t]), blobs[None])[0, 0]
        self.assertGreater(near.sum(), 1000)
        self.assertLess((velocity - expected).norm(), 0.2)  # of 2.1


# Commands, and the words that their errors must hold.
REFUSED = [
    # Which probe, which flags.
    ("probe", "classify", "pixels"),
    ("probe guess", "guess", "classify"),
    ("probe toy --data good", "--data"),
    ("probe toy --demo", "--demo"),
    # Flags that contradict each other.
    ("probe space --demo --data good", "--data", "--demo"),
    ("probe space --demo --size 64", "--size 64", "--demo"),
    ("probe classify --demo --size 64", "--size 64", "--demo"),
    (f"probe classify {ENCODER} --ae x.pt", "--ae", "--encoder"),
    (f"probe pca {ENCODER} --images good/a/0.png --ae x.pt", "--ae", "--encoder"),
    (f"probe pca {ENCODER} --images good/a/0.png --ckpt x.pt", "--ckpt", "--encoder"),
    (f"probe pca {ENCODER} --images good/a/0.png --class 3", "--class", "--encoder"),
    (f"probe pca {ENCODER} --images good/a/0.png --demo", "--demo", "--encoder"),
    ("probe pca --size 32 --demo", "--size", "--encoder"),
    ("probe pca --images good/a/0.png --guidance 2", "--guidance", "--images"),
    ("probe pca --demo --images good/a/0.png good/a/1.png", "--images", "one picture"),
    (f"probe pca {ENCODER}", "--images"),
    # Values out of range.
    ("probe classify --demo --batch 1", "--batch 1"),
    (f"probe classify --demo {ENCODER} --features residual", "--features residual"),
    ("probe pca --demo --class 10", "0 to 9"),
    ("probe pixels --patch 16 --channels 392", "--channels 392"),
    *[(f"probe {command} {ENCODER}", "--size", "multiple of 8") for command in (
        "space --data good --size 100", "segment --demo --size 4",
        "segment --demo --features pixels --size 30", "pca --images good/a/0.png --size 100")],
    *[(f"probe space --ae runs/demo-ae/last.pt {few}", "--images", "--classes", "too few") for few in (
        "--demo --classes 1", "--demo --images 39", "--data good --size 32")],
    # Files.
    ("probe space --data good", "--ae"),  # only demo runs are there
    ("probe classify --data good --ae runs/demo-ae/last.pt", "--data good/train", "no such folder"),
    ("probe pca --images text.pt --demo", "text.pt", "not a readable image"),
    *[(f"probe {command} --out {out}", "--out", f"'{out}'", "not a folder")
      for out in ("text.pt", "text.pt/below")
      for command in ("segment --demo", "toy", "pixels", "pca --demo", "space --demo", "classify --demo")],
]


class Refusals(Case):
    """One line, exit code 2, nothing written."""

    def test_commands_that_cannot_be_right(self):
        shutil.copytree(trained() / "runs", "runs")
        write_pictures("good/a", 2)
        Path("text.pt").write_text("not a checkpoint\nat all\n")
        self.refuse_all(REFUSED)
        with mock.patch("os.access", lambda path, mode: False):
            self.refused("probe toy", "--out", "'probes'", str(self.folder), "written")

    def test_a_folder_of_another_layout_is_told_the_right_one(self):
        write_pictures("good/a", 2)
        for task, layout in (("segment", "annotations"), ("depth", "sync_depth_N.png")):
            for folder in ("nowhere", "good"):
                self.refused(f"probe {task} {SMALL} --data {folder}", f"--data {folder}", "expected", layout)

    def test_labels_are_checked_before_the_training(self):
        small = np.zeros((3, 3), np.uint8)
        coloured = np.zeros((44, 60, 3), np.uint8)
        unknown = np.zeros((44, 60), np.uint8)
        for task, layout in (("segment", "annotations"), ("depth", "sync_depth_N.png")):
            labels = {split: [dense_files(task, "set", split, i)[1] for i in (0, 1)]
                      for split in ("training", "test")}
            _, training = labels["training"]
            _, test = labels["test"]
            for broken, content, *words in (
                    ([training], None, training, "No such file", layout),
                    ([training], "no picture", training, "not a readable label", layout),
                    ([test], "no picture", test, "not a readable label", layout),
                    ([test], small, test, "not a label", layout),
                    ([test], coloured, test, "not a label", layout),
                    (labels["training"], unknown, "--data set", "training", "known pixels"),
                    (labels["test"], unknown, "--data set", "test", "known pixels")):
                write_dense(task, "set")
                for file in broken:
                    os.remove(file)
                    if isinstance(content, str):
                        Path(file).write_text(content)
                    elif content is not None:
                        Image.fromarray(content).save(file)
                with mock.patch("probe.random_crops", side_effect=AssertionError("no training before this")):
                    self.refused(f"probe {task} {SMALL} --data set", *words)
                shutil.rmtree("set")

    def test_a_bad_training_label_ends_the_training_in_one_line_also_from_a_loading_process(self):
        for task in ("segment", "depth"):
            write_dense(task, task)
            _, label = dense_files(task, task, "training", 1)
            Image.fromarray(np.zeros((3, 3), np.uint8)).save(label)  # its header is good
            for workers in (0, 1):
                self.refused(f"probe {task} {SMALL} --data {task} --workers {workers} --batch 8",
                             f"error: {label}", "not a label")
        process = start(f"probe depth {SMALL} --data depth --workers 1 --batch 8")
        _, err = process.communicate(timeout=300)
        self.assertEqual((process.returncode, err.count("\n"), err[:12]), (2, 1, "error: depth"), err)
