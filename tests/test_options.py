"""Options of others' work: each is off by default, bit for bit, and its formula agrees with a second one."""
import itertools
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import files
import sample
import shapes
import svg
import train_dit
from tests.helpers import (
    MINI_AE,
    MINI_DIT,
    Case,
    demo_images,
    normal,
    ok,
    pictures,
    read_log,
    shell,
    tiny_autoencoder,
    trained,
    write_pictures,
)


def dit(flags):
    """Train a small transformer on the shared autoencoder; its last checkpoint is runs/demo-dit/last.pt."""
    return ok(f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt {flags}")


def random_sit(**settings):
    """A transformer whose gates and heads are not zero."""
    torch.manual_seed(0)
    model = svg.SiT({"depth": 3, "dim": 32, "heads": 2}, 7, 10, 4, **settings)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


class InternalGuidance(Case):
    def test_without_the_head_names_config_and_answers_are_as_before(self):
        plain, headed = random_sit(), random_sit(middle_head=True)
        self.assertEqual({k.split(".")[0] for k in headed.state_dict().keys() - plain.state_dict().keys()},
                         {"middle_layer"})
        self.assertNotIn("middle_head", plain.config)
        plain.load_state_dict(headed.state_dict(), strict=False)
        inputs = normal(1, 2, 16, 7), torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
        with torch.no_grad():
            velocity, middle = headed(*inputs, both=True)
            self.assert_same(plain(*inputs), velocity)
            self.assert_same(plain(*inputs), headed(*inputs))
        self.assertGreater((middle - velocity).abs().mean(), 0.01)
        self.assertNotIn("middle_head", svg.load_sit(trained() / "runs/demo-dit/last.pt").config)

    def test_a_step_follows_the_formula_with_and_without_guidance_by_class(self):
        model, x, y = random_sit(middle_head=True), normal(1, 2, 16, 7), torch.tensor([3, 5])
        states = []
        model.blocks[0].register_forward_hook(lambda _, inputs, out: states.append((out, inputs[1])))

        def velocities(labels):
            with torch.no_grad():
                v = model(x, torch.zeros(2), labels)
                return v, model.middle_layer(*states[-1])  # after a third of three blocks

        (v, v_m), (u, u_m) = velocities(y), velocities(torch.tensor([10, 10]))
        for guidance, expected in ((1.0, v_m + 1.4 * (v - v_m)),
                                   (3.0, 3 * (1.4 * v - 0.4 * v_m) - 2 * (1.4 * u - 0.4 * u_m))):
            z = svg.euler_sample(model, x, y, 1, guidance, zero_init=False, internal_guidance=1.4)
            self.close(z - x, expected, 1e-4)
        before = len(states)
        svg.euler_sample(model, x, y, 3, 3.0, internal_guidance=1.4)
        self.assertEqual(len(states) - before, 2)  # no pass more; the first step is skipped

    def test_its_loss_is_added_by_weight(self):
        model, z, y = random_sit(middle_head=True), normal(1, 2, 16, 7), torch.tensor([3, 5])
        u, noise = torch.tensor([0.3, 0.8]), normal(2, 2, 16, 7)
        with torch.no_grad():
            losses = svg.flow_loss(model, z, y, 0.4, u, noise, True)
            t = svg.shift_time(u, 0.4).view(2, 1, 1)
            both = model((1 - t) * noise + t * z, t.flatten(), y, both=True)
            self.assert_same(losses[0], svg.flow_loss(model, z, y, 0.4, u, noise))
        for i, b in itertools.product(range(2), range(2)):
            self.close(losses[i, b], ((both[i, b] + noise[b] - z[b]) ** 2).mean())
        # A fresh model answers zero, so that only the heads have gradients: squared norms are a + W^2 b.
        squares = []
        for weight in (1, 2, 3):
            dit(f"--steps 1 --mid-loss {weight} --name w{weight}")
            entry, = read_log(f"w{weight}")
            self.assertAlmostEqual(entry["mid_loss"], entry["loss"], places=6)
            squares.append(entry["grad_norm"] ** 2)
        self.assertAlmostEqual((squares[2] - squares[0]) / (squares[1] - squares[0]), 8 / 3, delta=0.01)
        dit("--steps 1")
        self.assertEqual(entry["loss"], read_log("demo-dit")[0]["loss"])  # of the same draws

    def test_two_processes_train_both_heads_and_an_export_keeps_them(self):
        flags = "--steps 3 --lr 0.0001 --mid-loss 0.5 --name"
        dit(f"{flags} one")
        shell(f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt {flags} two", processes=2)
        one, two = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("one", "two"))
        self.assertTrue(one["ema"]["middle_layer.linear.weight"].any())
        for key in one["ema"]:
            self.close(one["ema"][key], two["ema"][key])
        command = "sample --steps 2 --num 2 --internal-guidance 1.5"
        ok(command + " --ckpt runs/one/last.pt --out run")
        ok("sample --ckpt runs/one/last.pt --export all.safetensors")
        ok(command + " --ckpt all.safetensors --out all")
        np.testing.assert_array_equal(pictures("run"), pictures("all"))
        write_pictures("in", 1)
        ok("edit redraw in/0.png --box 0,0,16,16 --class 1 --steps 3 --internal-guidance 1.5 --ckpt "
           "runs/one/last.pt")
        distances = []
        flow = "probe flow --ckpt runs/one/last.pt --data shapes://val --images 20 --steps 2 --workers 0"
        for w in ("1", "900"):  # after three steps both heads still agree
            ok(flow, "--internal-guidance", w)
            distances.append(files.read_json(Path("probes/flow.json"))["frechet_by_steps"]["2"])
        self.assertNotEqual(*distances)
        for command in ("sample", "edit interpolate --class 1 --seeds 1 2", "probe flow"):
            self.refused(f"{command} --internal-guidance 1.5 --ckpt {shapes.DEMO_PT}", "no middle head",
                         "--mid-loss")


class EncoderLayers(Case):
    def test_features_are_the_mean_of_the_last_layers_each_normed(self):
        encoder, x = svg.load_encoder(shapes.DEMO_PT), demo_images(3)
        states = []
        for block in encoder.vit.blocks:
            block.register_forward_hook(lambda _, inputs, out: states.append(out))
        depth = len(encoder.vit.blocks)
        self.assert_same(encoder(x), encoder(x, layers=1))
        for layers in range(1, depth + 1):
            states.clear()
            tokens = encoder(x, layers=layers)
            expected = sum(encoder.vit.norm(state).double() for state in states[depth - layers:]) / layers
            self.close(tokens, expected[:, encoder.vit.prefix:].float())

    def test_it_travels_with_the_checkpoint_through_both_stages(self):
        self.assertNotIn("encoder_layers", svg.load_checkpoint(trained() / "runs/demo-ae/last.pt")["config"])
        ok(MINI_AE + " --steps 2 --encoder-layers 2")
        ok(MINI_DIT + " --steps 1")
        ae, x = svg.load_autoencoder("runs/demo-ae/last.pt"), demo_images(2)
        self.assertEqual(ae.config["encoder_layers"], 2)
        self.assert_same(ae.encode(x)[..., :64], ae.encoder(x, grid=(4, 4), layers=2))
        self.assertGreater((ae.encode(x)[..., :64] - ae.encoder(x, grid=(4, 4))).abs().mean(), 0.01)
        ok("sample --steps 1 --num 2")
        write_pictures("in", 1)
        ok("edit reconstruct in")
        ok("edit redraw in/0.png --box 0,0,16,16 --class 1 --steps 2")
        os.rename("runs", "before")
        self.refused(MINI_AE + " --encoder-layers 99", "--encoder-layers 99", "layers")


class Shift(Case):
    def test_auto_is_the_shift_of_rae_in_our_time(self):
        alpha, t = (256 * 392 / 4096) ** 0.5, torch.linspace(0, 1, 11)  # RAE: t = 1 is noise
        self.close(1 - alpha * t / (1 + (alpha - 1) * t), svg.shift_time(1 - t, svg.auto_shift(16, 392)))
        self.assertAlmostEqual(svg.auto_shift(16, 392), 0.20, places=2)
        self.assertAlmostEqual(0.75 * svg.auto_shift(16, 392), 0.15, places=2)  # the paper's in sampling

    def test_auto_is_recorded_and_printed_as_its_number(self):
        dit("--steps 2 --shift auto --name auto")
        value = json.loads(Path("runs/auto/config.json").read_text())["shift"]
        self.assertAlmostEqual(value, (4096 / (16 * 72)) ** 0.5, places=12)
        dit(f"--steps 2 --shift {value!r} --name given")
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("auto", "given")))
        dit("--steps 3 --shift auto --name auto")  # resumes
        self.assertIn(f"shift {0.75 * value:.6g}:", ok("sample --steps 2 --num 2 --shift auto"))
        self.assertEqual(files.read_record(Path("samples"))["settings"]["shift"], 0.75 * value)
        ok("edit interpolate --class 1 --seeds 1 2 --steps 2 --frames 2 --shift auto")


class NoisyDecoder(Case):
    def test_the_decoder_sees_noise_in_units_of_each_channels_deviation(self):
        ae, x, noise = tiny_autoencoder(dropout=0.0).eval(), demo_images(5), normal(1, 5, 16, 72)
        with mock.patch.object(ae, "decode", lambda latents, grid: latents), torch.no_grad():
            ae.alignment_batches.fill_(1)
            clean, noisy = ae(x), ae(x, noise=noise)
        std = np.std(clean.double().numpy().reshape(-1, 72), 0, ddof=1)
        self.close(noisy, clean + noise * torch.from_numpy(std).float(), 1e-4)

    def test_noise_is_drawn_by_step_and_image_and_none_without_the_flag(self):
        seen = {}

        def forward(ae, images, masked=None, noise=None, real=svg.Autoencoder.forward):
            if ae.training:
                seen.setdefault(name, []).append((masked, noise))
            return real(ae, images, masked, noise)

        flags = " --residual-dropout 0 --steps"
        with mock.patch.object(svg.Autoencoder, "forward", forward):
            for name, more in (("off", ""), ("on", " --noise 0.8"), ("parts", " --noise 0.8 --accumulate 4")):
                ok(f"{MINI_AE}{flags} 2 --name {name}{more}")
        self.assertEqual([noise for _, noise in seen["off"]], [None, None])
        whole, parts = (torch.cat([noise for _, noise in seen[name]]) for name in ("on", "parts"))
        self.assert_same(whole, parts)
        self.assert_same([mask for mask, _ in seen["off"]], [mask for mask, _ in seen["on"]])
        sigma = whole.std((1, 2))
        self.assertGreater(sigma[:8].max() - sigma[:8].min(), 0.2)  # one for each image of a step
        self.assertLess(sigma.max(), 0.8 * 1.1)
        self.assertAlmostEqual(sigma.mean().item(), 0.4, delta=0.2)
        losses = [[entry["l1_loss"] for entry in read_log(name)] for name in ("off", "on")]
        self.assertNotEqual(*losses)
        ok(f"{MINI_AE}{flags} 1 --name halves --noise 0.8")
        ok(f"{MINI_AE}{flags} 2 --name halves --noise 0.8")
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("on", "halves")))


class Oracle(Case):
    def test_reconstructions_with_noise_are_those_of_noisy_normalised_latents(self):
        write_pictures("in", 3)
        ok("edit reconstruct in --out plain")
        ok("edit reconstruct in --out none --noise 0")
        ok("edit reconstruct in --out noisy --noise 0.7")
        ok("edit reconstruct in --out single --noise 0.7 --batch 1")
        np.testing.assert_array_equal(pictures("plain"), pictures("none"))
        self.assertLessEqual(np.abs(pictures("noisy").astype(int) - pictures("single")).max(), 1)
        ae = svg.load_autoencoder(shapes.DEMO_PT)
        x = torch.from_numpy(pictures("in")).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.cat([svg.sample_noise(0, [i], (16, 72)) for i in range(3)])
        with torch.no_grad():
            y = ae.decode(ae.denormalize(ae.normalize(ae.encode(x)) + 0.7 * noise))
        expected = ((y.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).round().numpy()
        self.assertLessEqual(np.abs(pictures("noisy") - expected).max(), 1)
        self.assertGreater(np.abs(pictures("noisy").astype(int) - pictures("plain")).mean(), 3)

    def test_an_autoencoder_without_statistics_is_refused(self):
        ae = files.load_checkpoint(trained() / "runs/demo-ae/last.pt")
        ae["model"]["latent_mean"].zero_()
        torch.save({**ae, "fingerprint": files.fingerprint(ae["model"])}, "theirs.pt")
        write_pictures("in", 1)
        ok("edit reconstruct in --ae theirs.pt --out plain")
        self.refused("edit reconstruct in --ae theirs.pt --noise 1", "--noise 1: theirs.pt", "deviations")


class LossByU(Case):
    def test_sums_and_counts_of_quarters(self):
        losses, u = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.1, 0.9, 0.24, 0.5])
        self.assertEqual(train_dit.loss_by_u(losses, u).tolist(), [[5, 0, 8, 2], [2, 0, 1, 1]])

    def test_the_log_holds_means_over_images_also_where_a_step_has_none(self):
        seen = []

        def flow_loss(*inputs, real=svg.flow_loss, **settings):
            losses = real(*inputs, **settings)
            seen.append((inputs[4].numpy(), losses.detach().numpy()))
            return losses

        flags = "--steps 3 --log-every 3 --batch 4"
        trained()  # before, or its steps would be seen too
        with mock.patch("svg.flow_loss", flow_loss):
            dit(f"{flags} --accumulate 2")
        u, losses = (np.concatenate(x) for x in zip(*seen, strict=True))
        entry, = read_log("demo-dit")
        for i in range(4):
            inside = (u >= i / 4) & (u < (i + 1) / 4)
            self.assertAlmostEqual(entry[f"loss_u{i + 1}"], losses[inside].mean(), places=5)
        self.assertAlmostEqual(entry["loss"], losses.mean(), places=5)
        self.assertEqual([key for key in entry if key.endswith("loss")], ["loss"])  # what loss.png shows
        shell(f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt {flags} --name two", processes=2)
        for key in ("loss", *(f"loss_u{i}" for i in range(1, 5))):
            self.assertAlmostEqual(read_log("two")[0][key], entry[key], places=4)


class Samplers(Case):
    class Field:
        """A velocity field f(x, t, 1 where conditional else 0) that counts the images it is asked for."""
        num_classes = 10

        def __init__(self, f):
            self.f = f
            self.count = 0

        def __call__(self, x, t, y):
            self.count += len(x)
            return self.f(x, t.view(-1, 1, 1), (y < 10).float().view(-1, 1, 1))

    def test_euler_takes_the_steps_it_took(self):
        model, x, y = random_sit(), normal(1, 2, 16, 7), torch.tensor([3, 5])
        for guidance, zero_init, interval in (
                (1.0, True, (0, 1)), (3.0, True, (0, 1)), (3.0, False, (0, 0.5))):
            z = x
            for i, (t, t_next) in enumerate(itertools.pairwise(svg.euler_times(5, 0.15))):
                guided = guidance != 1 and interval[0] <= t <= interval[1]
                if guided and zero_init and i == 0:
                    continue
                with torch.no_grad():
                    if guided:
                        v = model(torch.cat([z, z]), torch.full((4,), t), torch.tensor([3, 5, 10, 10]))
                        v = v[2:] + guidance * (v[:2] - v[2:])
                    else:
                        v = model(z, torch.full((2,), t), y)
                z = z + (t_next - t) * v
            self.assert_same(z, svg.euler_sample(model, x, y, 5, guidance, 0.15, zero_init, interval))

    def test_heun_is_the_trapezoid_rule_of_second_order(self):
        x, y = torch.rand(2, 3, 4) + 1, torch.zeros(2, dtype=torch.long)
        exact, errors = x * np.exp(1.5), []
        for steps in (10, 20, 40):
            z = svg.heun_sample(self.Field(lambda x, t, c: x * (1 + t)), x, y, steps, shift=0.5)
            errors.append((z - exact).abs().max().item())
        for coarse, fine in itertools.pairwise(errors):
            self.assertAlmostEqual(coarse / fine, 4, delta=0.6)
        for zero_init in (False, True):  # guided by 2 the field is 2.5 + 2 t: trapezoids are exact
            field = self.Field(lambda x, t, c: 0 * x + 0.5 + c + 2 * t)
            z = svg.heun_sample(field, x, y, 4, 2.0, 1.0, zero_init)
            skipped = 0.25 * (2.5 + 3.0) / 2 if zero_init else 0
            self.close(z, x + 3.5 - skipped)

    def test_printed_evaluations_are_those_made(self):
        for name, steps, guidance, zero_init, interval in itertools.product(
                ("euler", "heun"), (1, 5), (1.0, 2.0), (True, False), ([0, 1], [0.1, 0.5])):
            args = mock.Mock(sampler=name, steps=steps, guidance=guidance, zero_init=zero_init, shift=0.4,
                             guidance_interval=interval, internal_guidance=1.0)
            field = self.Field(lambda x, t, c: 0 * x)
            sample.SAMPLERS[name](field, torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.long),
                                  **sample.flow_settings(args))
            self.assertEqual(field.count, 3 * sample.evaluations(args), args)
        command = f"sample --ckpt {shapes.DEMO_PT} --num 2 --steps 3"
        self.assertIn("3 Euler steps, guidance 4, shift 0.15: 4 network evaluations", ok(command))
        shown = ok(command + " --sampler heun --out h")
        self.assertIn("3 Heun steps, guidance 4, shift 0.15: 8 network", shown)
        self.assertEqual(files.read_record(Path("h"))["settings"]["sampler"], "heun")


class Refusals(Case):
    def test_impossible_values_are_one_line(self):
        self.refuse_all([
            ("train_dit --demo --mid-loss -1", "--mid-loss"),
            ("train_dit --demo --mid-loss inf", "--mid-loss"),
            ("train_dit --demo --shift 0", "--shift"), ("train_dit --demo --shift automatic", "--shift"),
            ("train_ae --demo --encoder-layers 0", "--encoder-layers"),
            ("train_ae --demo --vae 4 --noise 1", "--noise", "--vae"),
            ("train_ae --demo --noise -0.1", "--noise"), ("sample --sampler rk4", "--sampler"),
            ("sample --internal-guidance nan", "--internal-guidance"), ("sample --shift -1", "--shift"),
            ("edit reconstruct in --noise -1", "--noise")])

    def test_a_transformer_narrower_than_its_latents_is_named(self):
        self.assertRegex(dit("--steps 1"), r"narrower, 32, than a token, which has 72 channels.*2510\.11690")
        wide = f"train_dit --demo --batch 8 --model 1,72,2 --ae {trained()}/runs/demo-ae/last.pt --steps 1"
        self.assertNotIn("a width of", ok(wide, "--name", "wide"))
