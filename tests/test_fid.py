"""Numbers about pictures: reference answers, known answers, the command, what it refuses, real weights."""
import functools
import json
import os
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import fid
from lib import data, files, shapes
from lib.perceptual import LPIPS
from tests.helpers import REAL, Case, image, normal, ok, pictures, run, shell, weights, write_pictures

OVER_PAIRS = ("precision", "recall", "KID")  # numbers that take the features of every image

RANDOM = np.random.RandomState(41)  # behind the golden fid/*, isc/* and prc/*
A = torch.from_numpy(RANDOM.standard_normal((600, 64)) @ (RANDOM.standard_normal((64, 64)) / 8) + .3)
B = torch.from_numpy(RANDOM.standard_normal((700, 64)) @ (RANDOM.standard_normal((64, 64)) / 8))
LOGITS = torch.from_numpy(RANDOM.standard_normal((500, 1008)) * 2)


def mean_and_covariance(features):
    return features.mean(0), features.T.cov()


class Formulas(Case):
    def test_frechet_distance_agrees_to_six_digits_whatever_the_rank(self):
        for golden, *pair in [("fid/distance", A, B), ("fid/rank_deficient", A[:20], B[:25])]:
            a, b = map(mean_and_covariance, pair)
            self.agree(golden, fid.frechet_distance(*a, *b), 1e-6, 0)
            self.assertLess(fid.frechet_distance(*a, *a), 1e-6)

    def test_frechet_distance_of_gaussians_with_a_known_answer(self):
        r = np.random.RandomState(0)
        turn = np.linalg.qr(r.standard_normal((50, 50)))[0]
        full, b = r.uniform(0, 4, (2, 50))
        full[:5] = b[3:9] = 0  # of different rank
        mean = r.standard_normal(50)
        for a in (full, np.zeros(50)):
            known = (mean ** 2 + (a ** .5 - b ** .5) ** 2).sum()  # they commute
            found = fid.frechet_distance(mean, turn * a @ turn.T, 0 * mean, turn * b @ turn.T)
            self.assertAlmostEqual(found, known, delta=1e-5 * known)

    def test_frechet_distance_refuses_what_does_not_fit_or_is_not_finite(self):
        one = np.eye(4)
        for mean, covariance in [(one[0, :3], one), (one[0], one[0]), (one[0] * np.nan, one)]:
            with self.assertRaisesRegex(ValueError, "other features|not finite"):
                fid.frechet_distance(one[0], one, mean, covariance)

    def test_moments_do_not_depend_on_the_batches(self):
        count, mean, scatter = functools.reduce(fid.merge_moments, map(fid.moments, A.split(7)))
        self.close(mean, A.mean(0), 1e-12)
        self.close(scatter / (count - 1), A.T.cov(), 1e-12)

    def test_inception_score(self):
        self.agree("isc/logits_mean_std", fid.inception_score(LOGITS), 1e-6, 1e-6)

    def test_precision_and_recall(self):
        def share_covered(x, centres, k):
            radii = torch.cdist(centres, centres).sort(1).values[:, k]
            return (torch.cdist(x, centres) <= radii).any(1).double().mean().item()

        # The golden entry's first number counts 63 of 600, so that A is the generated set there.
        self.agree("prc/k3_real_is_A", fid.precision_recall(B, A), 1e-6, 0)
        for x, k, block in [(B, 3, 4096), (B, 3, 100), (B, 5, 7), (A[:4], 3, 9), (A, 3, 9), (A + 100, 3, 9)]:
            with self.subTest(k=k, block=block), mock.patch("fid.BLOCK", block):
                known = share_covered(x, A, k), share_covered(A, x, k)
                self.close(fid.precision_recall(A, x, k), known, 1e-6)

    def test_kernel_distance(self):
        features = torch.cat([A[:30], B[:40]])
        kernel = (features @ features.T / 64 + 1) ** 3
        within = kernel.clone().fill_diagonal_(0)  # pairs of different images
        known = (within[:30, :30].sum() / (30 * 29) + within[30:, 30:].sum() / (40 * 39)
                 - 2 * kernel[:30, 30:].mean()).item()
        for block in (4096, 7):
            with mock.patch("fid.BLOCK", block):
                self.assertAlmostEqual(fid.kernel_distance(A[:30], B[:40]), known, places=10)

    def test_psnr_and_ssim(self):
        a = torch.from_numpy(data.to_uint8(image(51, (2, 3, 256, 256))))
        noise = np.round(12 * np.random.RandomState(52).standard_normal((2, 3, 256, 256)))
        b = (a + torch.from_numpy(noise).permute(0, 2, 3, 1)).clip(0, 255).byte()
        self.agree("psnr/uint8", fid.psnr(a, b), 1e-6, 1e-6)
        self.agree("ssim/gaussian11_sigma1.5_rgbmean", fid.ssim(a, b), 1e-6, 1e-6)


class Known(fid.Source):
    """A measured source with these features."""

    def __init__(self, features, paths=(), **rows):
        self.name = "known"
        self.images = features
        self.paths = paths
        self.rows = {"features": features, **rows}
        self.statistics = dict(zip(("mu", "sigma"), mean_and_covariance(features), strict=True))


class Comparison(Case):
    def test_precision_is_of_the_samples_and_recall_of_the_reference(self):
        numbers = fid.compare(Known(A), Known(B), "FD", "cpu")
        self.assertEqual((numbers["precision"], numbers["recall"]), fid.precision_recall(real=B, fake=A))
        self.assertGreater(abs(numbers["precision"] - numbers["recall"]), 0.01)

    def test_inception_score_deals_the_images_whatever_holds_them_and_too_few_give_no_number(self):
        sure = torch.from_numpy(1000 * np.eye(10)[np.arange(1000) // 100])  # class by class
        tree = Known(normal(0, 1000, 3), [f"a/{i // 100}/{i}.png" for i in range(1000)], logits=sure)
        scores = [fid.compare(fake, fake, "FID", "cpu")["IS"]
                  for fake in (tree, Known(tree.images, logits=sure))]
        self.assertEqual(*scores)
        self.assertAlmostEqual(scores[0], 9.5, delta=0.2)  # of 10, by parts of 100; 1 in their order
        self.assertEqual(fid.inception_score(sure[:19], 10)[0], fid.inception_score(sure[:19])[0])
        few = Known(normal(0, 3, 3), logits=normal(0, 3, 5))
        numbers = fid.compare(few, few, "FID", "cpu")
        self.assertEqual([key for key in numbers if np.isnan(numbers[key])], ["sFID", "IS", *OVER_PAIRS])


TO_GOOD = "--ref good --demo --workers 0"
REFUSED = [
    # Sources.
    (f"fid one {TO_GOOD}", "one: 1 images", "at least 2"),
    (f"fid nowhere {TO_GOOD}", "nowhere: not a folder of images or an .npz"),
    (f"fid good --num 5 {TO_GOOD}", "good: 4 images", "at least 5"),
    (f"fid mixed {TO_GOOD}", "mixed/1.png and mixed/0.png differ in size", "--size"),
    (f"fid bad {TO_GOOD}", "bad/a/1.png", "not a readable image"),
    (f"fid half.npz {TO_GOOD}", "half.npz: 0 images"),
    (f"fid float.npz {TO_GOOD}", "float.npz", "uint8"),
    (f"fid text.npz {TO_GOOD}", "text.npz: not a folder of images or an .npz"),
    (f"fid eight.npz {TO_GOOD}", "eight.npz", "good", "other features"),
    (f"fid eight.npz --num 3 {TO_GOOD}", "eight.npz: 0 images", "at least 3"),
    (f"fid eight.npz --save-stats eight.npz {TO_GOOD}", "'eight.npz' exists and is no earlier output"),
    (f"fid own.npz --save-stats ./good/../own.npz {TO_GOOD}", "own.npz is measured"),
    ("fid good --ref nowhere.npz --demo", "nowhere.npz"),
    # Flags.
    ("fid good --demo --protocol pytorch-fid", "--protocol", "--demo"),
    ("fid good --features x.pth --protocol pytorch-fid --ref good", "--features", "--protocol"),
    ("fid good --demo --json no/x.json", "--json", "'no/x.json'", "no folder"),
    ("fid good --demo --save-stats good", "--save-stats: 'good' exists"),
    ("fid bad --demo --paired --num 2", "--paired", "bad", "shapes://val"),
    ("fid good --paired", "--paired", "--ref"),
    ("fid good --features x.pth", "--features", "--ref"),
    ("fid good --demo --paired --ref eight.npz", "--paired", "good", "eight.npz"),
]


def number(command, processes=1):
    """The numbers of a fid command that must succeed, as --json has them, and what it printed."""
    command = f"fid --workers 0 --json out.json {command}"
    code, out, err = run(command) if processes == 1 else (0, shell(command, processes=processes), "")
    assert code == 0, err
    return {**json.loads(Path("out.json").read_text()), "out": out, "err": err}


class Command(Case):
    def test_all_numbers_of_a_folder_in_one_command(self):
        write_pictures("a", 15)
        write_pictures("b", 4, first=50)
        tensors = weights("fid_inception")
        tensors["fc.weight"] *= 300  # else every picture has one class
        tensors["fc.bias"] *= 30  # the score takes logits without it
        torch.save(tensors, fid.INCEPTION)
        found = number("a --ref b --weights . --save-stats a.npz")
        self.assertRegex(found["out"], r"FID \d.*sFID \d.*IS \d\S* \+- \d.*precision.*recall.*KID.*15 "
                                       rf"images of a against 4 images of b, adm protocol, {fid.INCEPTION}")
        self.assertRegex(found["err"], "biased upward")
        # The numbers are those of the formulas.
        model = fid.load_inception(fid.INCEPTION)
        a, b = (fid.inception_features(model, torch.from_numpy(pictures(x))) for x in "ab")
        for name, key in [("FID", "features"), ("sFID", "spatial")]:
            x, y = (mean_and_covariance(answers[key].double()) for answers in (a, b))
            self.assertAlmostEqual(found[name] / fid.frechet_distance(*x, *y), 1, places=4)
        self.assertGreater(found["IS"], 1.05)
        parts = a["logits"][np.random.default_rng(0).permutation(15)].split([1, 2] * 5)
        scores = [fid.inception_score(part, 1)[0] for part in parts]
        self.assertAlmostEqual(found["IS"], np.mean(scores), places=4)
        # Saved statistics are what pytorch-fid and ADM's evaluator read, and stand for their images.
        saved = files.load_npz("a.npz")
        self.assertLessEqual({"mu", "sigma", "mu_s", "sigma_s"}, saved.keys())
        again = number("b --ref a.npz --weights . --batch 3")
        for key in ("FID", "sFID"):
            self.assertAlmostEqual(again[key] / found[key], 1, places=5)
        self.assertIn("\nnot measured: IS, precision, recall, KID\n", again["out"])
        self.refused("fid b --ref a.npz --weights . --protocol pytorch-fid", "a.npz", "adm protocol")
        # So do another program's, which have mu and sigma alone, and may be of the other protocol.
        np.savez("foreign.npz", mu=saved["mu"], sigma=saved["sigma"])
        bare = number("a.npz --ref foreign.npz --weights .")
        self.assertEqual(bare["not_measured"], ["sFID", "IS", *OVER_PAIRS])
        self.assertLess(bare["FID"], 1e-6)
        self.assertIn("foreign.npz does not name its protocol", bare["err"])
        bare = number("b --ref foreign.npz --weights . --protocol pytorch-fid")
        self.assertNotIn("does not name its protocol", bare["err"])
        b = fid.inception_features(model, torch.from_numpy(pictures("b")), "pytorch-fid")["features"]
        known = fid.frechet_distance(*mean_and_covariance(b.double()), saved["mu"], saved["sigma"])
        self.assertAlmostEqual(bare["FID"] / known, 1, places=4)

    def test_numbers_do_not_depend_on_batches_workers_processes_or_the_kind_of_file(self):
        write_pictures("a/x", 9)
        write_pictures("a/y", 4, first=30)
        write_pictures("b", 8, first=50)
        np.savez("a.npz", arr_0=np.concatenate([pictures("a/x"), pictures("a/y")]))
        np.savez_compressed("small.npz", arr_0=files.load_npz("a.npz")["arr_0"])
        ok("data pack a packed --size 32 --workers 0")
        whole = number("a --ref b --demo")
        self.assertGreater(whole["FD-demo-encoder"], 1e-3)
        for command, processes in [("a --batch 1", 1), ("a --batch 5 --workers 2", 1), ("a.npz --batch 9", 1),
                                   ("small.npz", 1), ("packed", 1), ("a --batch 3", 2)]:
            with self.subTest(command):
                other = number(f"{command} --ref b --demo", processes)
                for key in ("FD-demo-encoder", *OVER_PAIRS):
                    self.assertAlmostEqual(whole[key], other[key], delta=1e-5 * abs(whole[key]) + 1e-9)
                self.assertEqual((other["num"], other["reference_num"]), (13, 8))

    def test_demo_compares_an_output_folder_without_its_overview_with_the_built_in_images(self):
        ok("sample --steps 1 --num 4")
        with mock.patch("lib.shapes.pictures", return_value=pictures("samples")) as drawn:  # not all thousand
            found = number("samples --demo")
            os.remove("samples/000003.png")
            one_missing = number("samples --demo")["err"]
            write_pictures("samples/more", 2)
            foreign = number("samples --demo")["err"]
        self.assertEqual(drawn.mock_calls, 3 * [mock.call("shapes://val", 1000)])
        self.assertEqual((found["num"], found["reference"], found["err"]), (4, "shapes://val", ""))
        self.assertLess(found["FD-demo-encoder"], 1e-6)  # the same pictures
        self.assertIn("samples: of the images in its record 1 are missing, and 0 that are not", one_missing)
        self.assertIn("samples: of the images in its record 1 are missing, and 2 that are not", foreign)

    def test_arrays_are_cropped_as_folders_are_and_stay_on_the_disk(self):
        write_pictures("a", 5)
        np.savez("a.npz", arr_0=pictures("a"))
        self.assertIsInstance(fid.Source("a.npz").images, np.memmap)
        cropped = np.stack([data.crop(data.open_rgb(file), 16) for file in data.list_images("a")])
        Image.open("a/3.png").resize((64, 64), Image.Resampling.NEAREST).save("a/3.png")  # of any size
        for source in ("a", "a.npz"):
            np.testing.assert_array_equal(list(fid.Source(source, size=16)), cropped)

    def test_statistics_need_no_reference_and_in_one_replace_those_of_its_images(self):
        write_pictures("a", 6)
        write_pictures("b", 9, first=50)
        encoder = f"--features {shapes.DEMO_PT}"
        printed = ok(f"fid b {encoder} --save-stats b.npz").splitlines()
        self.assertEqual(printed[1:], ["statistics of b written to b.npz"])
        np.savez("both.npz", **files.load_npz("b.npz"), arr_0=pictures("a"))
        images, same, both = (number(f"a --ref {name} {encoder}") for name in ("b", "a", "both.npz"))
        self.assertIn("9 images of both.npz", both["out"])
        self.assertAlmostEqual(both["FD-demo"] / images["FD-demo"], 1, places=5)
        self.assertEqual([both[key] for key in OVER_PAIRS], [same[key] for key in OVER_PAIRS])
        self.assertRegex(images["out"], r"FD-demo \d.*CLS token of demo.pt")

    def test_commands_that_cannot_be_right_end_in_one_line_and_write_nothing(self):
        for folder, count in (("good", 4), ("one", 1), ("mixed", 3), ("bad/a", 2)):
            write_pictures(folder, count)
        Image.open("mixed/1.png").resize((40, 36)).save("mixed/1.png")
        Path("bad/a/1.png").write_bytes(Path("bad/a/0.png").read_bytes()[:100])
        np.savez("half.npz", mu=np.zeros(8))
        np.savez("eight.npz", mu=np.zeros(8), sigma=np.eye(8))
        np.savez("own.npz", mu=np.zeros(8), sigma=np.eye(8), protocol="ours")
        np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 3)))
        Path("text.npz").write_text("not an archive")
        self.refuse_all(REFUSED)
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            self.refused("fid good --weights .", fid.ADM_REFERENCE, "https://openaipublic", "no network")
        with mock.patch("svg.Encoder.forward", lambda *_, **__: torch.full((4, 1, 8), torch.nan)):
            self.refused(f"fid good {TO_GOOD}", "good: features are not finite")


class Pairs(Case):
    COMMAND = "recon --ref val --paired --demo --batch 3"

    def setUp(self):
        super().setUp()
        write_pictures("recon/a", 8)
        recon = pictures("recon/a")
        noise = np.random.default_rng(0).integers(-9, 10, recon.shape)
        val = (recon + noise).clip(0, 255).astype(np.uint8)
        self.sides = [torch.from_numpy(recon), torch.from_numpy(val)]
        os.makedirs("val/a")
        for i, array in enumerate(val):  # larger, and cropped to the samples' size
            Image.fromarray(array).resize((64, 64), Image.Resampling.BOX).save(f"val/a/{i}.bmp")

    def test_all_numbers_of_pairs_in_one_command(self):
        found = number(self.COMMAND)
        self.assertRegex(found["out"], r"\nrFD-demo-encoder \d.*PSNR \d\S* \+- \d.*SSIM \d\S* \+- \d")
        scores = torch.stack([fid.psnr(*self.sides), fid.ssim(*self.sides)])
        known = torch.stack([scores.mean(1), scores.std(1, correction=0)], 1)
        self.close([found[key] for key in ("PSNR", "PSNR_std", "SSIM", "SSIM_std")], known.flatten().tolist())
        plain = number("recon --ref val --size 32 --demo")
        self.assertAlmostEqual(found["rFD-demo-encoder"], plain["FD-demo-encoder"], places=6)
        two = number(self.COMMAND, processes=2)
        for key in ("rFD-demo-encoder", "PSNR", "PSNR_std", "SSIM"):
            self.assertAlmostEqual(found[key], two[key], places=6)

    def test_arrays_are_paired_by_index_and_exact_copies_have_no_finite_psnr(self):
        for name, side in zip(("x.npz", "y.npz"), self.sides, strict=True):
            np.savez(name, arr_0=side)
        found = number("x.npz --ref y.npz --paired --demo")
        self.assertAlmostEqual(found["PSNR"], fid.psnr(*self.sides).mean().item(), places=6)
        found = number("y.npz --ref y.npz --paired --demo")
        self.assertEqual((found["PSNR"], found["PSNR_std"], found["SSIM"]), (None, None, 1))
        self.assertIn("PSNR inf  SSIM 1 +- 0", found["out"])
        np.savez("z.npz", arr_0=torch.cat([self.sides[0][:1], self.sides[1][1:]]))
        found = number("x.npz --ref z.npz --paired --demo")
        others = fid.psnr(*(side[1:] for side in self.sides))
        self.assertAlmostEqual(found["PSNR"], others.mean().item(), places=6)
        self.assertIn("PSNR: 1 of 8 pairs are identical", found["err"])
        np.savez("y.npz", arr_0=self.sides[1][:7])
        self.refused("fid x.npz --ref y.npz --paired --demo",
                     "8 images of x.npz", "7 images of y.npz", "in one alone: ['7']")

    def test_files_are_paired_by_path_without_suffix(self):
        os.rename("recon/a/0.png", "recon/a/zero.png")
        self.refused(f"fid {self.COMMAND}", "in one alone: ['a/0', 'a/zero']")
        os.remove("recon/a/zero.png")
        os.remove("val/a/0.bmp")
        known = fid.psnr(*[side[1:5] for side in self.sides]).mean().item()
        self.assertAlmostEqual(number(f"{self.COMMAND} --num 4")["PSNR"], known, places=6)  # of both
        os.link("recon/a/1.png", "recon/a/1.bmp")
        self.refused(f"fid {self.COMMAND}", "8 images of recon", "7 images of val")


@unittest.skipUnless(REAL.is_dir(), "real weights are not here")
class RealWeights(Case):
    def test_distances_and_lpips_of_real_images(self):
        os.makedirs("val")
        os.makedirs("recon")
        for i, file in enumerate(data.list_images(REAL / "tiny20/val")[:3]):
            data.open_rgb(file).save(f"val/{i}.png")
            data.open_rgb(file).save(f"recon/{i}.jpg", quality=20)
        where = f"--ref val --weights {REAL / 'weights'}"
        out = number(f"recon {where} --features dinov2_vits14_pretrain.pth")["out"]
        self.assertRegex(out, r"FD-dinov2_vits14 .*CLS token of dinov2_vits14_pretrain.pth \(.*\) on 16x16")
        found = number(f"recon {where} --paired")
        self.assertRegex(found["out"], r"rFID [1-9].*PSNR .* \+- .*SSIM.*LPIPS .* \+- ")
        lpips = LPIPS(REAL / "weights/vgg16-397923af.pth")
        images = torch.from_numpy(np.stack([*fid.Source("recon"), *fid.Source("val")]))
        recon, val = data.to_float(images, "cpu").split(3)
        one_by_one = torch.cat([lpips(recon[i:i + 1], val[i:i + 1]) for i in range(3)])
        self.assertAlmostEqual(found["LPIPS"], one_by_one.mean().item(), places=5)
        self.assertLess(one_by_one.max(), lpips(val[:1], val[1:2]).item())  # another image is farther
        inception = fid.load_inception(REAL / "weights" / fid.INCEPTION)
        self.assertNotIn("logits", fid.inception_features(inception, images[:1]))
