"""Numbers about pictures: reference answers, known answers, the command, what it refuses, real weights.

    python -m unittest tests.test_fid
"""
import functools
import itertools
import json
import os
import shutil
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import fid
from lib import data, files, shapes
from lib.perceptual import LPIPS
from tests.helpers import GOLDEN, REAL, Case, image, normal, ok, pictures, run, shell, weights, write_pictures

CPU = torch.device("cpu")


def gaussians():
    """The two sets of features behind the golden fid/*, isc/* and prc/*, and the logits."""
    r = np.random.RandomState(41)
    a = r.standard_normal((600, 64)) @ (r.standard_normal((64, 64)) / 8) + .3
    b = r.standard_normal((700, 64)) @ (r.standard_normal((64, 64)) / 8)
    return a, b, r.standard_normal((500, 1008)) * 2


def mean_and_covariance(features):
    return features.mean(0), np.cov(features, rowvar=False)


def to_uint8(images):
    return torch.from_numpy(data.to_uint8(images))


class Inception(Case):
    def setUp(self):
        super().setUp()
        torch.save(weights("fid_inception"), "inception.pth")
        self.model = fid.load_inception("inception.pth")
        self.images = to_uint8(image(31, (3, 3, 256, 256)))

    def test_agrees_with_tensorflow_and_pytorch_fid(self):
        for protocol, output, golden in [
                ("adm", "features", "inception/tf1_resize/pool3"),
                ("adm", "logits", "inception/tf1_resize/logits_unbiased"),
                ("pytorch-fid", "features", "inception/pytorch_resize/pool3")]:
            with self.subTest(golden):
                answers = fid.inception_features(self.model, self.images, protocol)
                self.agree(golden, answers[output][:, ::4])
        logits = fid.inception_features(self.model, self.images)["logits"] + self.model.fc.bias
        self.agree("inception/tf1_resize/logits", logits[:, ::4])
        self.agree("inception/tf1_resize/softmax_sorted5", logits.softmax(1).topk(5).values)
        with self.assertRaisesRegex(ValueError, "neither adm nor pytorch-fid"):
            fid.inception_features(self.model, self.images, "clean-fid")

    def test_spatial_features_are_seven_channels_of_mixed_6_conv_with_channels_last(self):
        seen = []
        self.model.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.append(y))
        spatial = fid.inception_features(self.model, self.images)["spatial"]
        self.assertEqual(spatial.shape, (3, 17 * 17 * 7))
        for k, (y, x, channel) in enumerate(itertools.product(range(17), range(17), range(7))):
            self.close(spatial[:, k], seen[0][:, channel, y, x])


class Formulas(Case):
    def test_frechet_distance_agrees_to_six_digits_whatever_the_rank(self):
        a, b, _ = gaussians()
        for golden, x, y in [("fid/distance", a, b), ("fid/rank_deficient", a[:20], b[:25])]:
            with self.subTest(golden):
                x = mean_and_covariance(x)
                y = mean_and_covariance(y)
                np.testing.assert_allclose(fid.frechet_distance(*x, *y), GOLDEN[golden], rtol=1e-6)
                self.assertLess(fid.frechet_distance(*x, *x), 1e-6)

    def test_frechet_distance_of_gaussians_with_a_known_answer(self):
        r = np.random.RandomState(0)
        turn = np.linalg.qr(r.standard_normal((50, 50)))[0]
        variances = r.uniform(0, 4, (2, 50))
        variances[0, :5] = 0
        variances[1, 3:9] = 0  # of different rank
        one, two = (turn * v @ turn.T for v in variances)
        mean = r.standard_normal(50)
        known = (mean ** 2).sum() + (np.diff(variances ** .5, axis=0) ** 2).sum()  # they commute
        self.assertAlmostEqual(fid.frechet_distance(mean, one, 0 * mean, two), known, delta=1e-5 * known)
        known = (mean ** 2).sum() + variances[1].sum()
        self.assertAlmostEqual(fid.frechet_distance(mean, 0 * one, 0 * mean, two), known, delta=1e-9)

    def test_frechet_distance_refuses_what_does_not_fit_or_is_not_finite(self):
        one = np.eye(4)
        for mean, covariance in [(one[0, :3], one), (one[0], one[0]), (one[0] * np.nan, one)]:
            with self.assertRaisesRegex(ValueError, "other features|not finite"):
                fid.frechet_distance(one[0], one, mean, covariance)

    def test_moments_do_not_depend_on_the_batches(self):
        a, _, _ = gaussians()
        batches = torch.from_numpy(a).split(7)
        count, mean, scatter = functools.reduce(fid.merge_moments, map(fid.moments, batches))
        self.close(mean, a.mean(0), 1e-12)
        self.close(scatter / (count - 1), np.cov(a, rowvar=False), 1e-12)

    def test_inception_score(self):
        _, _, logits = gaussians()
        self.agree("isc/logits_mean_std", fid.inception_score(logits), 1e-6, 1e-6)
        sure = 1000 * np.eye(20)[np.arange(400) % 20]  # 20 classes, each certain and equally frequent
        self.close(fid.inception_score(sure), (20., 0.), 1e-6)

    def test_precision_and_recall(self):
        a, b, _ = (torch.from_numpy(x) for x in gaussians())

        def share_covered(x, centres, k):
            radii = torch.cdist(centres, centres).sort(1).values[:, k]
            return (torch.cdist(x, centres) <= radii).any(1).double().mean().item()

        # The golden entry's first number counts 63 of 600, so that a is the generated set there.
        self.close(fid.precision_recall(b, a), GOLDEN["prc/k3_real_is_A"].tolist(), 1e-6)
        for real, fake, k, block in [(a, b, 3, 4096), (a, b, 3, 100), (a, b, 5, 7), (a, a[:4], 3, 256)]:
            with self.subTest(k=k, block=block), mock.patch("fid.BLOCK", block):
                known = share_covered(fake, real, k), share_covered(real, fake, k)
                self.close(fid.precision_recall(real, fake, k), known, 1e-6)
        self.assertEqual(fid.precision_recall(a, a), (1, 1))
        self.assertEqual(fid.precision_recall(a, a + 100), (0, 0))

    def test_kernel_distance(self):
        a, b, _ = gaussians()
        a = a[:30]
        b = b[:40]

        def mean_kernel(x, y):
            pairs = itertools.product(range(len(x)), range(len(y)))
            return np.mean([(x[i] @ y[j] / 64 + 1) ** 3 for i, j in pairs if x is not y or i != j])

        known = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
        for block in (4096, 7):
            with self.subTest(block=block), mock.patch("fid.BLOCK", block):
                self.assertAlmostEqual(fid.kernel_distance(a, b), known, places=10)
        x = normal(0, 4000, 8)
        self.assertAlmostEqual(fid.kernel_distance(x[:2000], x[2000:]), 0, delta=0.01)  # unbiased

    def test_psnr_and_ssim(self):
        a = to_uint8(image(51, (2, 3, 256, 256)))
        noise = np.round(12 * np.random.RandomState(52).standard_normal((2, 3, 256, 256)))
        b = (a + torch.from_numpy(noise).permute(0, 2, 3, 1)).clip(0, 255).byte()
        for golden, measure in [("psnr/uint8", fid.psnr), ("ssim/gaussian11_sigma1.5_rgbmean", fid.ssim)]:
            with self.subTest(golden):
                self.agree(golden, measure(a, b), 1e-6, 1e-6)
        self.assertEqual(fid.psnr(a, a).tolist(), [np.inf] * 2)
        self.assertEqual(fid.ssim(a, a).tolist(), [1] * 2)


class Known(fid.Source):
    """A measured source with these features."""

    def __init__(self, features, paths=(), **rows):
        self.name = "known"
        self.images = features
        self.paths = paths
        self.rows = {"features": features, **rows}
        self.statistics = {"mu": features.mean(0), "sigma": features.T.cov()}


class Comparison(Case):
    """fid.compare, of sources with known features."""

    def test_precision_is_of_the_samples_and_recall_of_the_reference(self):
        a, b, _ = (torch.from_numpy(x) for x in gaussians())
        numbers = fid.compare(Known(a), Known(b), "FD", CPU)
        self.assertEqual((numbers["precision"], numbers["recall"]), fid.precision_recall(real=b, fake=a))
        self.assertGreater(abs(numbers["precision"] - numbers["recall"]), 0.01)

    def test_inception_score_takes_class_folders_in_turn(self):
        features = normal(0, 20, 3)
        sure = torch.from_numpy(1000 * np.eye(2)[np.arange(20) // 10])  # x is one class, y the other
        for folders, score in [("xy", 2), ("xx", 1)]:
            fake = Known(features, [f"a/{folders[i // 10]}/{i}.png" for i in range(20)], logits=sure)
            self.assertAlmostEqual(fid.compare(fake, fake, "FID", CPU)["IS"], score, places=6)

    def test_what_cannot_be_measured_is_not_a_number(self):
        few = Known(normal(0, 3, 3), logits=normal(0, 3, 5))
        numbers = fid.compare(few, few, "FID", CPU)
        self.assertEqual([key for key in numbers if np.isnan(numbers[key])],
                         ["sFID", "IS", "precision", "recall", "KID"])


class Measured(Case):
    def number(self, command):
        """The numbers of a fid command that must succeed, as --json has them, and what it printed."""
        code, out, err = run(f"fid {command} --json out.json")
        self.assertEqual(code, 0, err)
        return {**json.loads(Path("out.json").read_text()), "out": out, "err": err}

    def by_two_processes(self, command):
        shell(f"fid {command} --json out.json", processes=2)
        return json.loads(Path("out.json").read_text())


class Command(Measured):
    def test_all_numbers_of_a_folder_in_one_command(self):
        write_pictures("a", 20)
        write_pictures("b", 6, first=50)
        os.makedirs("w")
        tensors = weights("fid_inception")
        tensors["fc.weight"] *= 300  # else every picture has one class
        tensors["fc.bias"] *= 30  # the score takes logits without it
        torch.save(tensors, f"w/{fid.INCEPTION}")
        found = self.number("a --ref b --weights w --workers 0 --save-stats a.npz")
        self.assertRegex(found["out"], r"FID \d.*sFID \d.*IS \d\S* \+- \d.*precision.*recall.*KID.*20 "
                                       rf"images of a against 6 images of b, adm protocol, {fid.INCEPTION}")
        self.assertRegex(found["err"], "biased upward")
        self.assertEqual((found["num"], found["reference_num"], found["not_measured"]), (20, 6, []))

        # The numbers are those of the formulas, in either protocol.
        model = fid.load_inception(f"w/{fid.INCEPTION}")
        other = self.number("a --ref b --weights w --workers 0 --protocol pytorch-fid")
        for protocol, numbers in [("adm", found), ("pytorch-fid", other)]:
            with self.subTest(protocol):
                a, b = (fid.inception_features(model, torch.from_numpy(pictures(x)), protocol) for x in "ab")
                for name, key in [("FID", "features"), ("sFID", "spatial")]:
                    x, y = (mean_and_covariance(answers[key].double().numpy()) for answers in (a, b))
                    self.assertAlmostEqual(numbers[name] / fid.frechet_distance(*x, *y), 1, places=4)
                self.assertGreater(numbers["IS"], 1.1)
                self.assertAlmostEqual(numbers["IS"], fid.inception_score(a["logits"])[0], places=4)

        # Saved statistics are what pytorch-fid and ADM's evaluator read, and stand for their images.
        saved = files.load_npz("a.npz")
        self.assertEqual([saved[k].shape for k in ("mu", "sigma", "mu_s", "sigma_s")],
                         [(2048,), (2048, 2048), (2023,), (2023, 2023)])
        again = self.number("b --ref a.npz --weights w --batch 5")
        for key in ("FID", "sFID"):
            self.assertAlmostEqual(again[key] / found[key], 1, places=5)
        self.assertIn("\nnot measured: IS, precision, recall, KID\n", again["out"])
        self.refused("fid b --ref a.npz --weights w --protocol pytorch-fid", "a.npz", "adm protocol")

        # So do another program's, which have mu and sigma alone.
        np.savez("foreign.npz", mu=saved["mu"], sigma=saved["sigma"])
        bare = self.number("a.npz --ref foreign.npz --weights w")
        self.assertEqual(bare["not_measured"], ["sFID", "IS", "precision", "recall", "KID"])
        self.assertLess(bare["FID"], 1e-6)
        self.assertIn("foreign.npz does not name its protocol", bare["err"])
        bare = self.number("b --ref foreign.npz --weights w --protocol pytorch-fid")
        self.assertNotIn("does not name its protocol", bare["err"])

    def test_numbers_do_not_depend_on_batches_workers_processes_or_the_kind_of_file(self):
        write_pictures("a/x", 30)
        write_pictures("a/y", 11, first=30)
        write_pictures("b", 30, first=50)
        np.savez("a.npz", arr_0=np.concatenate([pictures("a/x"), pictures("a/y")]))
        np.savez_compressed("small.npz", arr_0=files.load_npz("a.npz")["arr_0"])
        ok("data pack a packed --size 32 --workers 0")
        whole = self.number("a --ref b --demo --workers 0")
        self.assertGreater(whole["FD-demo-encoder"], 1e-3)
        others = {command: self.number(f"{command} --ref b --demo") for command in (
            "a --batch 1 --workers 0", "a --batch 7 --workers 2", "a.npz --batch 30", "small.npz", "packed")}
        others["two processes"] = self.by_two_processes("a --ref b --demo --batch 6 --workers 0")
        for name, other in others.items():
            with self.subTest(name):
                for key in ("FD-demo-encoder", "precision", "recall", "KID"):
                    self.assertAlmostEqual(whole[key], other[key], delta=1e-5 * abs(whole[key]) + 1e-9)
                self.assertEqual((other["num"], other["reference_num"]), (41, 30))

    def test_images_of_an_npz_stay_on_the_disk(self):
        np.savez("a.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
        self.assertIsInstance(fid.Source("a.npz").images, np.memmap)

    def test_an_output_folder_is_scored_without_its_overview_and_a_missing_image_is_noticed(self):
        ok("sample --steps 1 --num 6")
        self.assertEqual(self.number("samples --demo --workers 0")["num"], 6)
        os.remove("samples/000003.png")
        self.assertIn("samples: 5 images, but its record says 6",
                      self.number("samples --demo --workers 0")["err"])

    def test_size_crops_folders_and_arrays_alike(self):
        write_pictures("a", 5)
        np.savez("a.npz", arr_0=pictures("a"))
        cropped = np.stack([data.crop(data.open_rgb(file), 16) for file in data.list_images("a")])
        Image.open("a/3.png").resize((64, 64), Image.Resampling.NEAREST).save("a/3.png")  # of any size
        for source in ("a", "a.npz"):
            images = fid.Source(source, size=16)
            np.testing.assert_array_equal([images[i] for i in range(5)], cropped)

    def test_reference_with_statistics_and_images_uses_each_for_what_it_is_for(self):
        write_pictures("a", 12)
        write_pictures("b", 14, first=50)
        found = self.number("b --ref a --demo --save-stats b.npz")
        np.savez("both.npz", **files.load_npz("b.npz"), arr_0=pictures("b")[:6])
        np.savez("six.npz", arr_0=pictures("b")[:6])
        self.assertIn("14 images of b.npz", self.number("a --ref b.npz --demo")["out"])
        both = self.number("a --ref both.npz --demo")
        six = self.number("a --ref six.npz --demo")
        self.assertAlmostEqual(both["FD-demo-encoder"] / found["FD-demo-encoder"], 1, places=5)
        for key in ("precision", "recall", "KID"):
            self.assertEqual(both[key], six[key])

    def test_demo_compares_with_the_built_in_images_and_an_encoder_names_its_token(self):
        write_pictures("a", 6)
        write_pictures("b", 6, first=50)
        demo = self.number("a --demo")
        self.assertEqual((demo["reference_num"], demo["err"].count("warning")), (1000, 0))
        named = self.number(f"a --ref b --features {shapes.DEMO_PT}")
        self.assertRegex(named["out"], r"FD-demo \d.*CLS token of demo.pt")
        self.assertRegex(named["err"], "biased upward")

    def test_statistics_are_saved_without_a_reference(self):
        write_pictures("a", 6)
        code, out, err = run(f"fid a --features {shapes.DEMO_PT} --save-stats a.npz")
        self.assertEqual((code, out.splitlines()[1:]), (0, ["statistics of a written to a.npz"]), err)
        self.assertEqual(files.load_npz("a.npz")["num"], 6)


class Pairs(Measured):
    def setUp(self):
        super().setUp()
        write_pictures("val/a", 5)
        write_pictures("val/b", 3, first=5)
        rng = np.random.default_rng(0)
        for file in data.list_images("val"):
            original = Image.open(file)
            noisy = np.asarray(original).astype(int) + rng.integers(-9, 10, (32, 32, 3))
            target = Path(file.replace("val", "recon", 1)).with_suffix(".bmp")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(target)
            original.resize((64, 64), Image.Resampling.BOX).save(file)  # is cropped to the samples' size
        self.sides = [torch.from_numpy(np.stack([data.crop(data.open_rgb(file), 32)
                                                 for file in data.list_images(folder)]))
                      for folder in ("recon", "val")]

    def test_all_numbers_of_pairs_in_one_command(self):
        found = self.number("recon --ref val --paired --demo --batch 3 --workers 0")
        self.assertRegex(found["out"], r"\nrFD-demo-encoder \d.*PSNR \d\S* \+- \d.*SSIM \d\S* \+- \d")
        self.assertNotIn("LPIPS", found)
        for key, measure in [("PSNR", fid.psnr), ("SSIM", fid.ssim)]:
            values = measure(*self.sides)
            self.close((found[key], found[key + "_std"]),
                       (values.mean().item(), values.std(correction=0).item()))
        plain = self.number("recon --ref val --size 32 --demo")
        self.assertAlmostEqual(found["rFD-demo-encoder"], plain["FD-demo-encoder"], places=6)
        two = self.by_two_processes("recon --ref val --paired --demo --batch 3 --workers 0")
        for key in ("rFD-demo-encoder", "PSNR", "PSNR_std", "SSIM"):
            self.assertAlmostEqual(found[key], two[key], places=6)

    def test_exact_copies_have_no_finite_psnr(self):
        found = self.number("val --ref val --paired --demo")
        self.assertEqual((found["PSNR"], found["PSNR_std"], found["SSIM"]), (None, None, 1))
        self.assertIn("PSNR inf  SSIM 1 +- 0", found["out"])

    def test_arrays_are_paired_by_index(self):
        for name, side in zip(("x.npz", "y.npz"), self.sides):
            np.savez(name, arr_0=side.numpy())
        found = self.number("x.npz --ref y.npz --paired --demo")
        self.assertAlmostEqual(found["PSNR"], fid.psnr(*self.sides).mean().item(), places=6)
        np.savez("y.npz", arr_0=self.sides[1][:7].numpy())
        self.refused("fid x.npz --ref y.npz --paired --demo",
                     "8 images of x.npz", "7 images of y.npz", "in one alone: ['7']")

    def test_files_are_paired_by_path_without_suffix(self):
        paired = "fid recon --ref val --paired --demo"
        os.rename("recon/a/0.bmp", "recon/a/zero.bmp")
        self.refused(paired, "in one alone: ['a/0', 'a/zero']")
        os.remove("recon/a/zero.bmp")
        self.refused(paired, "in one alone: ['a/0']")
        os.remove("val/a/0.png")
        found = self.number("recon --ref val --paired --demo --num 4")  # of both
        self.assertEqual((found["num"], found["reference_num"]), (4, 4))
        self.assertAlmostEqual(found["PSNR"], fid.psnr(*[side[1:5] for side in self.sides]).mean().item(),
                               places=6)
        shutil.copy("recon/a/1.bmp", "recon/a/1.png")
        self.refused(paired, "8 images of recon", "7 images of val")


class Refused(Case):
    """Commands that end in one line that says what is wrong, before anything is written."""

    def setUp(self):
        super().setUp()
        write_pictures("good", 4)
        write_pictures("one", 1)
        write_pictures("mixed", 3)
        write_pictures("bad/a", 2)
        Image.open("mixed/1.png").resize((40, 36)).save("mixed/1.png")
        Path("bad/a/1.png").write_bytes(Path("bad/a/0.png").read_bytes()[:100])
        np.savez("half.npz", mu=np.zeros(8))
        np.savez("eight.npz", mu=np.zeros(8), sigma=np.eye(8))
        np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 3)))
        Path("text.npz").write_text("not an archive")

    def test_sources(self):
        for samples, *words in [
                ("one", "one: 1 images", "at least 2"),
                ("nowhere", "nowhere: not a folder of images or an .npz"),
                ("good --num 5", "good: 4 images", "at least 5"),
                ("mixed --workers 2", "mixed/1.png and mixed/0.png differ in size", "--size"),
                ("bad --workers 0", "bad/a/1.png", "not a readable image"),
                ("half.npz", "half.npz: 0 images"),
                ("float.npz", "float.npz", "uint8"),
                ("text.npz", "text.npz: not a folder of images or an .npz"),
                ("eight.npz", "eight.npz", "good", "other features"),
                ("eight.npz --num 3", "eight.npz: 0 images", "at least 3"),
                ("eight.npz --save-stats ./good/../eight.npz", "eight.npz is measured")]:
            self.refused(f"fid {samples} --ref good --demo", *words)
        self.refused("fid good --ref nowhere.npz --demo", "nowhere.npz")

    def test_flags(self):
        for flags, *words in [
                ("--demo --protocol pytorch-fid", "--protocol", "--demo"),
                ("--features x.pth --protocol pytorch-fid --ref good", "--features", "--protocol"),
                ("--demo --json no/x.json", "--json", "'no/x.json'", "no folder"),
                ("--demo --save-stats good", "--save-stats: 'good': is a folder"),
                ("--demo --paired", "--paired", "good", "shapes://val"),
                ("--paired", "--paired", "--ref"),
                ("--features x.pth", "--features", "--ref"),
                ("--demo --paired --ref eight.npz", "--paired", "good", "eight.npz")]:
            self.refused(f"fid good {flags}", *words)

    def test_missing_weights_when_there_is_no_network(self):
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            for command, *words in [
                    ("fid good --weights .", fid.ADM_REFERENCE, "https://openaipublic", "no network"),
                    ("fid good --save-stats x.npz --weights .", fid.INCEPTION, "https://", "--weights")]:
                self.refused(command, *words)

    def test_features_that_are_not_finite(self):
        with mock.patch("svg.Encoder.forward", lambda *_, **__: torch.full((4, 1, 8), torch.nan)):
            self.refused("fid good --demo --workers 0", "good: features are not finite")


@unittest.skipUnless(REAL.is_dir(), "real weights are not here")
class RealWeights(Case):
    def setUp(self):
        super().setUp()
        self.files = data.list_images(REAL / "tiny20/val")

    def test_vgg_and_inception_load_and_order_real_images(self):
        lpips = LPIPS(REAL / "weights/vgg16-397923af.pth")
        a, b = (data.to_float(torch.from_numpy(data.crop(data.open_rgb(file), 64))[None], "cpu")
                for file in self.files[:2])
        noisy = (a + 0.05 * torch.randn_like(a)).clamp(-1, 1)
        self.assertLess(lpips(a, noisy).item(), lpips(a, b).item())
        inception = fid.load_inception(REAL / "weights" / fid.INCEPTION)
        answers = fid.inception_features(inception, to_uint8(a))
        self.assertEqual((answers["features"].shape, "logits" in answers), ((1, 2048), False))
        self.assertGreater(answers["features"].mean(), 0.1)

    def test_dinov2_distance_and_lpips_of_real_files(self):
        os.makedirs("val/a")
        os.makedirs("recon/a")
        for i, file in enumerate(self.files[:12]):
            data.open_rgb(file).save(f"val/a/{i}.png")
            data.open_rgb(file).save(f"recon/a/{i}.jpg", quality=20)
        where = f"--weights {REAL / 'weights'} --workers 0 --json out.json"
        code, out, err = run(f"fid recon --ref val --features dinov2_vits14_pretrain.pth {where}")
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"FD-dinov2_vits14 .*CLS token of dinov2_vits14_pretrain.pth \(.*\) on 16x16")

        code, out, err = run(f"fid recon --ref val --paired {where}")
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"rFID .*PSNR .* \+- .*SSIM.*LPIPS .* \+- ")
        found = json.loads(Path("out.json").read_text())
        self.assertEqual(found["not_measured"], [])
        lpips = LPIPS(REAL / "weights/vgg16-397923af.pth")
        one_by_one = []
        for i in range(12):
            sides = [torch.from_numpy(np.array(data.open_rgb(file)))[None]
                     for file in (f"val/a/{i}.png", f"recon/a/{i}.jpg")]
            one_by_one.append(lpips(*[data.to_float(side, "cpu") for side in sides]).item())
        self.assertAlmostEqual(found["LPIPS"], np.mean(one_by_one), places=5)
        self.assertAlmostEqual(found["LPIPS_std"], np.std(one_by_one), places=5)


if __name__ == "__main__":
    unittest.main()
