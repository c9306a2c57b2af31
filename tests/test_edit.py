"""Editing and interpolation (paper, appendices C and D), with the shipped model."""
import functools
import itertools
import os

import numpy as np
import torch
from PIL import Image

import svg
from lab import edit
from lib import data, files, shapes
from tests.helpers import Case, demo_images, ok, pictures, write_pictures


@functools.cache
def shipped():
    """The shipped transformer and autoencoder, and two latents."""
    model, ae = svg.load_sit(shapes.DEMO_PT), svg.load_autoencoder(shapes.DEMO_PT)
    with torch.no_grad():
        return model, ae, model.normalize(ae.encode(demo_images(2)))


class Editing(Case):
    @torch.no_grad()
    def test_inverting_and_sampling_back_returns_the_latent(self):
        (model, _, latents), errors = shipped(), []
        for steps in (25, 50, 100):
            times = [t for t in svg.euler_times(steps, 0.4) if t >= 0.2]
            start = edit.invert(model, latents, times)[0]
            self.assertGreater((start - latents).std(), 0.3)
            back = svg.euler_sample(model, start, torch.tensor([10, 10]), times)
            errors.append((back - latents).square().mean().sqrt().item())
        self.assertLess(errors[2], 0.05)
        for coarse, fine in itertools.pairwise(errors):  # of first order: half the error at twice the steps
            self.assertAlmostEqual(coarse / fine, 2, delta=0.3)

    def test_edit_keeps_what_is_outside_the_mask_and_redraws_inside(self):
        model, ae, latents = shipped()
        z, times, y = latents[:1], [0.1, *svg.euler_times(25, 0.4)[6:]], torch.tensor([3])
        nothing = edit.edit_latents(model, z, y, torch.zeros(16, 1), times)
        self.assertTrue(torch.equal(nothing, z))  # and so the pictures
        for outside in (False, True):
            weights = edit.edit_mask((32, 32), (0, 0, 16, 16), 32, 4, outside)
            edited = edit.edit_latents(model, z, y, weights, times)
            kept = weights[:, 0] == 0
            self.assertEqual(kept.sum(), 4 if outside else 12)
            self.assertTrue(torch.equal(edited[:, kept], z[:, kept]))
            self.assertGreater((edited - z)[:, ~kept].square().mean().sqrt(), 0.3)
            if not outside:
                with torch.no_grad():
                    a, b = (ae.decode(model.denormalize(x))[0] for x in (z, edited))
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
        for kind, norm in (("slerp", 1), ("lerp", 0.5 ** 0.5)):
            middle = edit.interpolate_noise(a, b, torch.tensor([0.5]), kind)
            self.assertAlmostEqual((middle.norm() / a.norm()).item(), norm, delta=0.05)

    def test_new_noise_of_an_edit_fades_as_the_noise_does(self):
        seen = []

        def still(x, t, y):  # a flow that stands still, so that what changes is what was renewed
            seen.append(x[:1])
            return torch.zeros_like(x)

        still.num_classes = 10
        times = svg.euler_times(50, 0.4)[10:]
        weights = torch.ones(2000, 1)
        end = edit.edit_latents(still, torch.zeros(1, 2000, 8), torch.tensor([3]), weights, times)
        renewed = [*seen[len(times) - 1:], end]  # first it inverts
        self.assertAlmostEqual(renewed[0].std().item(), 1 - times[0], delta=0.02)  # at first all the noise
        for (t, u), (a, b) in zip(itertools.pairwise(times), itertools.pairwise(renewed), strict=True):
            share = (u - t) / (1 - t)  # of noise that a step of the exact flow takes away
            new = (b - (a + (1 - u) * ((1 - share) ** 0.5 - 1) * a)) if u < 1 else b - a
            self.assertAlmostEqual(new.std().item(), (1 - u) * share ** 0.5, delta=0.02)

    def test_edit_writes_the_result_and_a_labelled_overview(self):
        write_pictures("in", 1)
        ok("edit redraw in/0.png --box 8,8,28,28 --class star --steps 5 --outside --out outside")
        ok("edit redraw in/0.png --box 8,8,28,28 --class star")
        settings = files.read_record("edit")["settings"]
        self.assertLess({"steps": 100, "shift": 0.4, "guidance": 4.0}.items(), settings.items())  # appendix C
        differ = pictures("edit").astype(int) - pictures("outside")
        self.assertGreater(np.abs(differ).mean(), 5)
        self.assertEqual(sorted(os.listdir("edit")), ["0.png", "overview", "record.json"])
        self.assertEqual(data.open_rgb("edit/0.png").size, (32, 32))
        self.assertEqual(os.listdir("edit/overview"), ["0.png"])
        self.assertEqual(set(os.listdir()), {"in", "edit", "outside"})
