"""Editing and interpolation (paper, appendices C and D)."""
import itertools
import os
from unittest import mock

import numpy as np
import torch
from PIL import Image

import svg
from lab import edit
from lib import data, shapes
from tests.helpers import Case, demo_images, ok, pictures, write_pictures


class Editing(Case):
    """Editing and interpolation (paper, appendices C and D), with the shipped model."""

    def setUp(self):
        super().setUp()
        self.model, self.ae = svg.load_sit(shapes.DEMO_PT), svg.load_autoencoder(shapes.DEMO_PT)
        self.latents = self.model.normalize(self.ae.encode(demo_images(8)))

    def test_inverting_and_sampling_back_returns_the_latent(self):
        null, errors = torch.full((8,), 10), []
        for steps in (25, 100, 400):
            times = [t for t in svg.euler_times(steps, 0.4) if t >= 0.2]
            start = edit.invert(self.model, self.latents, times)[0]
            self.assertGreater((start - self.latents).std(), 0.3)
            back = svg.euler_sample(self.model, start, null, times)
            errors.append((back - self.latents).square().mean().sqrt().item())
        self.assertLess(errors[2], 0.05)
        for coarse, fine in itertools.pairwise(errors):
            self.assertGreater(coarse / fine, 2.5)

    def test_edit_keeps_what_is_outside_the_mask_and_redraws_inside(self):
        z, times, y = self.latents[:1], [0.1, *svg.euler_times(25, 0.4)[6:]], torch.tensor([3])
        nothing = edit.edit_latents(self.model, z, y, torch.zeros(16, 1), times)
        self.assertTrue(torch.equal(nothing, z))  # and so the pictures
        for outside in (False, True):
            weights = edit.edit_mask((32, 32), (0, 0, 16, 16), 32, 4, outside)
            edited = edit.edit_latents(self.model, z, y, weights, times)
            kept = weights[:, 0] == 0
            self.assertEqual(kept.sum(), 4 if outside else 12)
            self.assertTrue(torch.equal(edited[:, kept], z[:, kept]))
            self.assertGreater((edited - z)[:, ~kept].square().mean().sqrt(), 0.3)
            if not outside:
                with torch.no_grad():
                    a, b = (self.ae.decode(self.model.denormalize(x))[0] for x in (z, edited))
                change = (a - b).abs().mean(0)
                self.assertGreater(change[:16, :16].mean(), 0.1)
                self.assertLess(change[20:, 20:].mean(), 0.03)  # not 0: the decoder looks beyond the mask

    def test_mask_follows_the_box_through_the_crop(self):
        weights = edit.edit_mask((600, 400), (100, 0, 300, 200), 256, 16).view(16, 16)  # square's top left
        self.assertTrue(torch.equal(weights > 0, torch.nn.functional.pad(torch.ones(8, 8), (0, 8, 0, 8)) > 0))
        self.assertGreater(weights.max(), 0.98)  # in the middle
        self.assertTrue(torch.equal(weights[:8, :8], weights[:8, :8].flip(0, 1)))
        rest = edit.edit_mask((600, 400), (100, 0, 300, 200), 256, 16, outside=True).view(16, 16)
        self.assertTrue(torch.equal(rest > 0, weights == 0))
        self.assertGreater(rest[15, 15], rest[8, 8])

    def test_ends_of_an_interpolation_are_the_samples_of_its_seeds(self):
        ok("edit interpolate --class 8 --seeds 5 6 --frames 3 --steps 4")
        for end, seed in ((0, 5), (2, 6)):
            ok(f"sample --num 1 --class 8 --seed {seed} --steps 4 --out plain{seed}")
            for kind in ("slerp", "lerp"):
                frame = np.asarray(Image.open(f"interpolation/{kind}-{end:06d}.png")).astype(int)
                self.assertLessEqual(np.abs(frame - pictures(f"plain{seed}")[0]).max(), 1)
        self.assertEqual(len(pictures("interpolation")), 6)
        self.assertEqual(sorted(os.listdir("interpolation/overview")), ["lerp.png", "slerp.png"])
        a, b = svg.sample_noise(0, range(2), (16, 72))
        slerp, lerp = (edit.interpolate_noise(a, b, torch.tensor([0.5]), kind)
                       for kind in ("slerp", "lerp"))
        self.assertAlmostEqual((slerp.norm() / a.norm()).item(), 1, delta=0.05)
        self.assertAlmostEqual((lerp.norm() / a.norm()).item(), 0.5 ** 0.5, delta=0.05)

    def test_new_noise_of_an_edit_fades_as_the_noise_does(self):
        class Still:  # a flow that stands still, so that what changes is what was renewed
            num_classes = 10

            def __init__(self):
                self.seen = []

            def __call__(self, x, t, y):
                self.seen.append(x[:1])
                return torch.zeros_like(x)

        model, times, weights = Still(), svg.euler_times(50, 0.4)[10:], torch.ones(2000, 1)
        end = edit.edit_latents(model, torch.zeros(1, 2000, 8), torch.tensor([3]), weights, times)
        renewed = [*model.seen[len(times) - 1:], end]  # first it inverts
        self.assertAlmostEqual(renewed[0].std().item(), 1 - times[0], delta=0.02)  # at first all the noise
        for (t, u), (a, b) in zip(itertools.pairwise(times), itertools.pairwise(renewed), strict=True):
            share = (u - t) / (1 - t)  # of noise that a step of the exact flow takes away
            new = (b - (a + (1 - u) * ((1 - share) ** 0.5 - 1) * a)) if u < 1 else b - a
            self.assertAlmostEqual(new.std().item(), (1 - u) * share ** 0.5, delta=0.02)

    def test_edit_writes_the_result_and_a_labelled_overview(self):
        write_pictures("in", 1)
        with mock.patch("sys.argv", ["edit.py", "redraw", "x", "--box", "0,0,1,1", "--class", "0"]):
            args = edit.parse_args()
        self.assertEqual((args.steps, args.shift, args.guidance), (100, 0.4, 4.0))  # appendix C
        ok("edit redraw in/0.png --box 8,8,28,28 --class star --steps 5 --outside --out outside")
        ok("edit redraw in/0.png --box 8,8,28,28 --class star --steps 5")
        differ = pictures("edit").astype(int) - pictures("outside")
        self.assertGreater(np.abs(differ).mean(), 5)
        self.assertEqual(sorted(os.listdir("edit")), ["0.png", "overview", "record.json"])
        self.assertEqual(data.open_rgb("edit/0.png").size, (32, 32))
        self.assertEqual(os.listdir("edit/overview"), ["0.png"])
        self.assertEqual(set(os.listdir()), {"in", "edit", "outside"})
