"""The method as its reader may rely on it: answers of independent implementations, and its properties.

    python -m unittest                      # all tests, two minutes on two cores
    python -m unittest test_svg.Sampler     # one group

The other tests lie in tests/ by subject.
"""
import itertools
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import sample
import svg
import train_ae
import train_dit
from lib import files, ldm, shapes
from tests.helpers import MINI_AE, Case, demo_images, image, normal, ok, tiny_autoencoder, trained, weights


class Alignment(Case):
    """The residual gets the features' mean and standard deviation (section 3.3)."""

    def test_alignment_agrees_with_the_authors(self):
        h, r = normal(3, 4, 384, 256) * .7 + .1, normal(4, 4, 8, 256) * 5 - 2

        class Tokens(torch.nn.Module):
            dim = 384

            def __init__(self, tokens):
                super().__init__()
                self.tokens = tokens.transpose(1, 2)

            def forward(self, x, grid=None):
                return self.tokens

        ae = svg.Autoencoder(Tokens(h), residual={"dim": 8, "depth": 1, "heads": 1}, decoder={"ch": 32})
        ae.eval()
        ae.residual, ae.residual_head = Tokens(torch.cat([r[..., :1], r], -1)), torch.nn.Identity()
        latents = ae.encode(torch.zeros(4, 3, 256, 256)).transpose(1, 2)
        self.close(latents[:, :384], h)
        self.agree("align/out", latents[:, 384:, ::16])

    def test_latent_does_not_depend_on_batch_mates(self):
        ae, x = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt"), demo_images(6)
        self.close(ae.encode(x)[2:3], ae.encode(x[2:3]))
        ae.has_statistics = False  # as the authors' file
        self.assertGreater((ae.encode(x)[2:3] - ae.encode(x[2:3])).abs().max(), 1e-3)

    def test_images_whose_patches_would_not_meet_those_of_the_encoder_are_refused(self):
        with self.assertRaisesRegex(files.UserError, "39, 40.*multiples of 8"):
            tiny_autoencoder().encode(torch.zeros(1, 3, 39, 40))

    def test_running_alignment_converges_to_the_batch_statistics(self):
        ae, x = tiny_autoencoder(dropout=0.0).train(), demo_images(128)
        with torch.no_grad():
            for i in torch.randint(128, (100, 16)):
                ae.encode(x[i])
            running = ae.eval().encode(x)
            ae.has_statistics = False
            batch = ae.encode(x)
        self.assertLess((running - batch).abs().mean(), 0.02 * batch[..., ae.encoder.dim:].std())

    def test_a_batch_that_is_not_finite_does_not_enter_the_running_alignment(self):
        ae, other = tiny_autoencoder(dropout=0.0).train(), tiny_autoencoder(dropout=0.0).train()
        with torch.no_grad():
            ae.encode(demo_images(2) * torch.nan)
            self.assertEqual(ae.alignment_batches, 0)  # nor does it count
            for model in (ae, other):
                model.encode(demo_images(2))
        self.close(ae.alignment, other.alignment, 0)

    def test_alignment_statistics_of_two_ranks_are_those_of_the_whole_batch(self):
        x = torch.randn(6, 5, 3) * 4 + 2

        def add_the_other_rank(moments):
            other = x[3:].flatten(0, 1)
            return moments + torch.stack([other.mean(0), other.square().mean(0)]).double() / 2

        with mock.patch("svg.world_size", lambda: 2), mock.patch("svg.all_reduce", add_the_other_rank):
            shared = svg.channel_statistics(x[:3], synchronise=True)
        self.close(shared, svg.channel_statistics(x))

    def test_measured_alignment_gives_the_residual_the_features_mean_and_std_exactly(self):
        ae = tiny_autoencoder()
        ae.measure_alignment(demo_images(100).split(32))
        with torch.no_grad():
            features, residual = ae.encode(demo_images(100)).split([64, 8], -1)
        for statistic in (lambda x: x.mean(), lambda x: x.flatten(0, 1).std(0).mean()):  # section 3.3
            self.close(statistic(features), statistic(residual), 1e-3)
        before = ae.alignment.clone()
        ae.measure_alignment(demo_images(100).split(7))  # whatever the batches
        self.close(ae.alignment, before, 1e-6)

    def test_mask_token_replaces_a_tenth_of_the_residuals_only_in_training(self):
        ae, x = tiny_autoencoder(), demo_images(10).repeat(40, 1, 1, 1)
        ae.mask_token.data.fill_(1e4)
        with torch.no_grad():
            masked = ae.train().encode(x)[..., ae.encoder.dim:] > 100
            self.assertTrue(torch.equal(masked.any((1, 2)), masked.all((1, 2))))
            self.assertAlmostEqual(masked.any((1, 2)).float().mean().item(), 0.1, delta=0.05)
            self.assertLess(ae.eval().encode(x)[..., ae.encoder.dim:].max(), 100)


class Autoencoder(Case):
    def test_frozen_encoder_stays_frozen_and_out_of_checkpoints(self):
        ae, x = tiny_autoencoder(), demo_images(2)
        before = ae.encoder(x)
        ae.train().requires_grad_(True)
        self.assertTrue(ae.residual.training)
        self.assertFalse(any(m.training for m in ae.encoder.modules()))
        self.assertEqual(list(ae.encoder.parameters()), [])
        self.assertFalse(any("encoder" in k for k in ae.state_dict()))
        torch.optim.SGD(ae.parameters(), 1.0).zero_grad()
        ae(x).sum().backward()
        with torch.no_grad():
            for p in ae.parameters():
                p -= p.grad
        self.assertFalse(ae.encoder(x).requires_grad)
        self.assertTrue(torch.equal(ae.encoder(x), before))
        self.assertEqual(ae.to_checkpoint()["encoder_file"]["fingerprint"], ae.encoder.fingerprint)

    def test_ablations_of_table_4_train_without_a_residual_and_unaligned(self):
        x = demo_images(4)
        for name, flags in (("features", "--residual-channels 0"), ("unaligned", "--align none")):
            ok(f"{MINI_AE} --steps 2 --name {name} {flags}")
        features = svg.load_autoencoder("runs/features/last.pt")
        unaligned = svg.load_autoencoder("runs/unaligned/last.pt")
        self.assertEqual(features(x).shape, x.shape)
        self.close(features.encode(x), features.encoder(x, grid=(4, 4)), 0)
        self.close(unaligned.encode(x)[..., 64:], unaligned.residual_tokens(x), 0)
        self.assertEqual(unaligned.alignment_batches, 0)

    def test_images_of_any_size_on_the_grid(self):
        ae = tiny_autoencoder().train()
        x = torch.rand(2, 3, 48, 32) * 2 - 1
        self.assertEqual((ae.encode(x).shape, ae(x).shape), ((2, 24, 72), x.shape))
        for size, grid in ((256, 16), (64, 8)):
            model = svg.Autoencoder(None, feature_channels=8, image_size=size, grid=grid, decoder={"ch": 32})
            self.assertEqual(model.decode(torch.zeros(1, grid * grid, 16)).shape, (1, 3, size, size))
        with self.assertRaisesRegex(files.UserError, "power of two"):
            svg.Autoencoder(None, feature_channels=8, image_size=96, grid=8)

    def test_upsampling_is_nearest_neighbours_and_a_convolution(self):
        layer = ldm.Upsample(4).double()
        x = normal(0, 2, 4, 5, 3).double()
        gradients = []
        for upsample in (layer, lambda x: layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))):
            images = upsample(x)
            gradients.append(torch.autograd.grad(images.sin().sum(), list(layer.parameters())))
            gradients[-1] += (images,)
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain)


class Losses(Case):
    def test_one_backward_pass_gives_the_gradient_of_the_sum_of_the_losses(self):
        torch.manual_seed(0)
        lpips, disc = train_ae.LPIPS(None).double(), train_ae.PatchDiscriminator().double()
        last_layer = torch.nn.Conv2d(8, 3, 3, padding=1).double()
        x, h = (image(1, (2, 3, 64, 64)).double(),
                torch.randn(2, 8, 64, 64, dtype=torch.float64, requires_grad=True))
        y = last_layer(h)
        nll, *_ = train_ae.reconstruction_loss(x, y, lpips, 1.0)
        g_loss = -disc(y).mean()
        weight = train_ae.adaptive_weight(nll, g_loss, last_layer.weight)  # the usual way, by two passes
        inputs = y, h, last_layer.weight
        both = torch.autograd.grad(nll + 0.5 * weight * g_loss, inputs, retain_graph=True)
        gradient = train_ae.generator_gradient(y, nll, g_loss, 0.5, last_layer.weight)
        for once, twice in zip((gradient, *torch.autograd.grad(y, inputs[1:], gradient)), both, strict=True):
            self.assertLess((once - twice).norm() / twice.norm(), 1e-12)


class Flow(Case):
    def test_velocity_loss_and_samples_agree_with_the_authors(self):
        torch.save({"ema": weights("svg_dit_tiny")}, "sit.pt")
        sit, x, y = svg.load_sit("sit.pt"), normal(21, 2, 256, 392), torch.tensor([3, 5])
        with torch.no_grad():
            velocity = sit(x, torch.tensor([.13, .78]), torch.tensor([7, 1000]))
            self.agree("dit_tiny/velocity", velocity[:, ::18, ::7])
            for shift in (1.0, 0.4):
                loss = svg.flow_loss(sit, x, y, shift, torch.tensor([.25, .6]), normal(22, 2, 256, 392))
                self.agree(f"dit_tiny/loss_shift{shift}", loss)
        for name, steps, guidance, shift, zero_init in (
                ("steps5_cfg1.55_shift1.0_constant", 5, 1.55, 1.0, False),
                ("steps4_cfg4.0_shift0.4_constant", 4, 4.0, 0.4, False),
                ("steps5_cfg1.55_shift1.0_cfg_star-1-0", 5, 1.55, 1.0, True),
                ("steps3_cfgNone_shift1.0_constant", 3, 1.0, 1.0, True)):  # unguided no step is skipped
            z = svg.euler_sample(sit, x, y, steps, guidance, shift, zero_init)
            self.agree(f"dit_tiny/euler_{name}", z[:, ::18, ::7])

    def test_fresh_transformer_answers_exactly_zero(self):
        model = svg.SiT({"depth": 2, "dim": 32, "heads": 2}, 7, 10, 4)
        v = model(torch.randn(3, 16, 7), torch.rand(3), torch.tensor([0, 9, 10]))
        self.assertEqual((v.shape, v.abs().max()), ((3, 16, 7), 0))

    def test_sizes_have_the_papers_parameter_counts(self):
        with torch.device("meta"):
            for name, millions in (("B", 130), ("L", 458), ("XL", 675)):
                count = sum(p.numel() for p in svg.SiT(name).parameters()) / 1e6
                self.assertAlmostEqual(count, millions, delta=0.01 * millions)

    def test_measured_latents_have_mean_0_and_std_1_for_the_transformer(self):
        with torch.no_grad():
            latents = tiny_autoencoder().eval().encode(demo_images(100))
        for statistics, shape in (("channel", (72,)), ("element", (16, 72))):
            sit = svg.SiT({"depth": 1, "dim": 32, "heads": 1}, 72, 10, 4, statistics=statistics)
            self.assertTrue(sit.latent_mean.isnan().all())  # unknown
            sit.measure_latents(latents.__getitem__, torch.arange(100).split(40))
            normalised = sit.normalize(latents).reshape(-1, *shape)
            self.close(normalised.mean(0), torch.zeros(shape), 1e-3)
            self.close(normalised.std(0, correction=0), torch.ones(shape), 1e-3)
            self.close(sit.denormalize(sit.normalize(latents)), latents, 1e-4)
            for mean, std in ((torch.zeros(5), torch.ones(5)), (torch.zeros(shape), torch.zeros(shape))):
                with self.assertRaisesRegex(files.UserError, "latent statistics"):
                    sit.set_latent_stats(mean, std)

    def test_a_network_that_predicts_x_moves_to_it(self):
        sit = svg.SiT({"depth": 1, "dim": 32, "heads": 1}, 7, 10, 4, predict="x")
        x, noise, y = torch.randn(2, 16, 7), torch.randn(2, 16, 7), torch.tensor([0, 9])
        sit.final_layer.forward = lambda tokens, c: x  # it knows
        loss = svg.flow_loss(sit, x, y, 1.0, torch.tensor([0.6, 0.99]), noise)
        slow = 1 - 0.01 / 0.05  # so close to the end the divisor stays, and with it the size of errors
        self.close(loss, torch.tensor([0, slow ** 2]) * (x - noise).square().mean((1, 2)), 1e-4)
        for steps in (1, 2, 5):
            self.close(svg.euler_sample(sit, noise, y, steps), x, 1e-4)
        self.close(svg.heun_sample(sit, noise, y, 1), (x + noise) / 2, 1e-4)  # at t = 1 it knows no velocity

    def test_time_shift_keeps_the_ends_and_inverts(self):
        u = torch.linspace(0, 1, 11, dtype=torch.float64)
        for shift in (0.15, 0.4, 1.0, 3.0):
            t = svg.shift_time(u, shift)
            self.close(t[[0, -1]], u[[0, -1]], 1e-12)
            self.close(svg.shift_time(t, 1 / shift), u, 1e-12)
        self.assertLess(svg.shift_time(0.5, 0.4), 0.5)  # below 1 means nearer to the noise

    def test_label_dropout_rate(self):
        y = torch.arange(20000) % 10
        dropped = svg.drop_labels(y, 10, 0.1, torch.rand(20000))
        self.assertAlmostEqual((dropped == 10).float().mean().item(), 0.1, delta=0.01)
        self.assertTrue(torch.equal(dropped[dropped != 10], y[dropped != 10]))
        self.assertTrue(torch.equal(svg.drop_labels(y, 10, 0.0, torch.rand(20000)), y))

    def test_ema_keeps_the_old_weights_at_decay_1_and_copies_the_new_ones_at_0(self):
        ema, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        for decay in (1.0, 0.5, 0.0):
            expected = decay * ema.weight + (1 - decay) * model.weight
            train_dit.update_ema(ema, model, decay)
            self.close(ema.weight, expected, 1e-6)


class Field:
    """A velocity field f(x, t, 1 where conditional else 0)."""
    num_classes = 10

    def __init__(self, f):
        self.f = f

    def __call__(self, x, t, y):
        return self.f(x, t.view(-1, 1, 1), (y < 10).float().view(-1, 1, 1))


class Sampler(Case):
    def test_sampler_converges_to_the_exact_solution(self):
        field, x = Field(lambda x, t, c: x * (1 + t)), torch.rand(2, 3, 4) + 1  # ends at x * e^1.5
        for shift in (1.0, 0.15):
            y = torch.zeros(2, dtype=torch.long)
            errors = [(svg.euler_sample(field, x, y, n, shift=shift) / x / np.exp(1.5) - 1).abs().max().item()
                      for n in (50, 100, 200)]
            self.assertLess(errors[2], 0.05)
            for coarse, fine in itertools.pairwise(errors):
                self.assertAlmostEqual(coarse / fine, 2, delta=0.2)  # first order

    def test_guidance_interval_and_zero_init(self):
        field, x, y = Field(lambda x, t, c: 0 * x + 1 + 2 * c), torch.randn(2, 3, 4), torch.tensor([0, 9])
        for moved, settings in ((3, {}), (3, {"zero_init": True}), (1, {"guidance": 0.0, "zero_init": False}),
                                (5, {"guidance": 2.0, "zero_init": False}),
                                (5 * 0.75, {"guidance": 2.0}),  # the first of four steps is skipped
                                (3 * 0.5 + 5 * 0.5, {"guidance": 2.0, "guidance_interval": (0.5, 1)}),
                                (3 * 0.75, {"guidance": 2.0, "guidance_interval": (0, 0.2)}),  # the first
                                (3, {"guidance": 2.0, "guidance_interval": (0.9, 1)})):
            with self.subTest(settings):
                self.close(svg.euler_sample(field, x, y, 4, shift=1.0, **settings), x + moved)
        for sampler in (svg.euler_sample, svg.heun_sample):
            self.close(sampler(field, x, y, 1, 2.0), x + 5)  # the only step is made

    def test_heun_is_the_trapezoid_rule_of_second_order(self):
        x, y = torch.rand(2, 3, 4) + 1, torch.zeros(2, dtype=torch.long)
        exact, errors = x * np.exp(1.5), []
        for steps in (10, 20, 40):
            z = svg.heun_sample(Field(lambda x, t, c: x * (1 + t)), x, y, steps, shift=0.5)
            errors.append((z - exact).abs().max().item())
        for coarse, fine in itertools.pairwise(errors):
            self.assertAlmostEqual(coarse / fine, 4, delta=0.6)
        for zero_init in (False, True):  # guided by 2 the field is 2.5 + 2 t: trapezoids are exact
            field = Field(lambda x, t, c: 0 * x + 0.5 + c + 2 * t)
            z = svg.heun_sample(field, x, y, 4, 2.0, 1.0, zero_init)
            skipped = 0.25 * (2.5 + 3.0) / 2 if zero_init else 0
            self.close(z, x + 3.5 - skipped)

    def test_printed_evaluations_are_those_made(self):
        for euler, heun, settings in [(5, 10, {}), (10, 20, {"guidance": 2}), (1, 2, {"steps": 1}),
                                      (8, 16, {"guidance": 2, "zero_init": True}),
                                      (2, 4, {"guidance": 2, "zero_init": True, "steps": 1}),
                                      (6, 12, {"guidance": 2, "guidance_interval": [0.1, 0.3]})]:
            for name, count in (("euler", euler), ("heun", heun)):
                settings = {"steps": 5, "zero_init": False, "shift": 1, **settings}
                self.assertEqual(sample.evaluations(name, **settings), count, (name, settings))
        command = f"sample --ckpt {shapes.DEMO_PT} --num 2 --steps 3"
        self.assertIn("3 Euler steps, guidance 4, shift 0.15: 4 network evaluations", ok(command))
        shown = ok(command + " --sampler heun --out h")
        self.assertIn("3 Heun steps, guidance 4, shift 0.15: 8 network", shown)
        self.assertEqual(files.read_record("h")["settings"]["sampler"], "heun")

    def test_noise_and_labels_depend_on_the_global_index_alone(self):
        noise = svg.sample_noise(3, range(8), (4, 5))
        self.assertTrue(torch.equal(noise[5:6], svg.sample_noise(3, [5], (4, 5))))
        both = torch.cat([noise, svg.sample_noise(4, range(8), (4, 5))])
        self.assertEqual(len({row.sum().item() for row in both}), 16)
        self.assertLess(abs(svg.sample_noise(0, range(200), (10, 10)).std() - 1), 0.02)
        args = mock.Mock(seed=1, labels="balanced")
        self.assertEqual([sample.label_of(i, [2, 7, 5], args) for i in range(5)], [2, 7, 5, 2, 7])
        args.labels = "random"
        drawn = [sample.label_of(i, [2, 7, 5], args) for i in range(300)]
        self.assertEqual(set(drawn), {2, 5, 7})
        self.assertEqual(drawn[50:60], [sample.label_of(i, [2, 7, 5], args) for i in range(50, 60)])


class Loading(Case):
    def test_autoencoder_checkpoint_round_trip_with_and_without_its_encoder(self):
        path = trained() / "runs/demo-ae/last.pt"
        whole, decoder = svg.load_autoencoder(path), svg.load_autoencoder(path, decode_only=True)
        x = demo_images(2)
        self.assertTrue(torch.equal(whole(x), decoder.decode(whole.encode(x))))
        self.assertIsNone(decoder.encoder)
        with self.assertRaisesRegex(files.UserError, "other encoder weights"):
            svg.load_autoencoder(path, svg.Encoder(svg.ViT(8, 64, 4, 1, registers=4), "demo", "other.pt"))

    def test_transformer_checkpoint_round_trip_gives_the_ema(self):
        path = trained() / "runs/demo-dit/last.pt"
        checkpoint, model = svg.load_checkpoint(path), svg.load_sit(path)
        ema, last = files.fingerprint(checkpoint["ema"]), files.fingerprint(checkpoint["model"])
        self.assertEqual(files.fingerprint(model.state_dict()), ema)
        self.assertEqual(files.fingerprint(svg.load_sit(path, ema=False).state_dict()), last)
        self.assertNotEqual(ema, last)
        self.assertEqual((model.meta["classes"], model.meta["step"]), (shapes.CLASSES, 6))
        self.assertTrue(torch.equal(model.latent_std, checkpoint["model"]["latent_std"]))
        self.assertTrue((model.latent_std > 0).all())
