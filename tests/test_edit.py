"""Editing and interpolation (paper, appendices C and D), with the shipped model."""
import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import svg
from lab import edit
from lib import files, shapes
from tests.helpers import Case, demo_images, ok, pictures, write_pictures


class Editing(Case):
    @classmethod
    @torch.no_grad()
    def setUpClass(cls):
        cls.model, cls.ae = svg.load_sit(shapes.DEMO_PT), svg.load_autoencoder(shapes.DEMO_PT)
        cls.latents = cls.model.normalize(cls.ae.encode(demo_images(2)))

    @torch.no_grad()
    def test_inverting_and_sampling_back_returns_the_latent(self):
        errors = []
        for steps in (25, 50, 100):
            times = [t for t in svg.euler_times(steps, 0.4) if t >= 0.2]
            start = edit.invert(self.model, self.latents, times)[0]
            self.assertGreater((start - self.latents).std(), 0.3)
            back = svg.euler_sample(self.model, start, torch.tensor([10, 10]), times)
            errors.append((back - self.latents).square().mean().sqrt().item())
        self.assertLess(errors[2], 0.05)
        for coarse, fine in itertools.pairwise(errors):  # of first order: half the error at twice the steps
            self.assertAlmostEqual(coarse / fine, 2, delta=0.3)

    @torch.no_grad()
    def test_edit_keeps_what_is_outside_the_mask_and_redraws_inside(self):
        z, times, y = self.latents[:1], [0.1, *svg.euler_times(25, 0.4)[6:]], torch.tensor([3])
        for outside in (True, False):
            weights = edit.edit_mask((32, 32), (0, 0, 16, 16), 32, 4, outside)
            edited = edit.edit_latents(self.model, z, y, weights, times)
            kept = weights[:, 0] == 0
            self.assertEqual(kept.sum(), 4 if outside else 12)
            self.assertTrue(torch.equal(edited[:, kept], z[:, kept]))
            self.assertGreater((edited - z)[:, ~kept].square().mean().sqrt(), 0.3)
        before, after = self.ae.decode(self.model.denormalize(torch.cat([z, edited])))
        change = (before - after).abs().mean(0)
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
        overviews = sorted(Path("interpolation/overview").iterdir())
        self.assertEqual([path.name for path in overviews], ["lerp.png", "slerp.png"])
        a, b = svg.sample_noise(0, range(2), (16, 72))
        for kind, norm in (("slerp", 1), ("lerp", 0.5 ** 0.5)):
            middle = edit.interpolate_noise(a, b, torch.tensor([0.5]), kind)
            self.assertAlmostEqual((middle.norm() / a.norm()).item(), norm, delta=0.05)

    def test_new_noise_of_an_edit_fades_as_the_noise_does(self):
        # A flow that stands still, so that what changes is what was renewed.
        still, times = mock.Mock(wraps=lambda x, t, y: 0 * x, num_classes=10), svg.euler_times(50, 0.4)[10:]
        end = edit.edit_latents(still, torch.zeros(1, 2000, 8), torch.tensor([3]), torch.ones(2000, 1), times)
        renewed = [*(call.args[0][:1] for call in still.mock_calls[len(times) - 1:]), end]  # first it inverts
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
        edited = pictures("edit")
        self.assertEqual(edited.shape, (1, 32, 32, 3))
        self.assertGreater(np.abs(edited.astype(int) - pictures("outside")).mean(), 5)
        written = {f"{folder}/{name}" for folder in ("edit", "outside")
                   for name in ("0.png", "overview/0.png", "record.json")}
        self.assertEqual({str(path) for path in Path().rglob("*.*")}, written | {"in/0.png"})
