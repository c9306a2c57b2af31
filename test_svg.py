"""The method as its reader may rely on it: answers of independent implementations, and its properties.

    python -m unittest                      # all tests, some minutes on two cores
    python -m unittest test_svg.Golden      # one group

The other tests lie in tests/ by subject.
"""
import functools
import itertools
import tempfile
import unittest
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import sample
import svg
import train_ae
import train_dit
from lib import data, files, layouts, ldm, shapes
from lib.files import UserError
from tests.helpers import (
    GOLDEN,
    MANIFESTS,
    REAL,
    Case,
    demo_images,
    image,
    normal,
    ok,
    tiny_autoencoder,
    to_map,
    trained,
    weights,
    write_safetensors,
)


@functools.cache
def authors_autoencoder():
    """The authors' autoencoder from a Lightning checkpoint file."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": weights("svg_autoencoder")}, f"{folder}/ae.ckpt")
        return svg.load_autoencoder(f"{folder}/ae.ckpt")


@functools.cache
def authors_sit(name):
    """The authors' transformer from a checkpoint file; dit_B has the doubled head, of which half counts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"ema": weights(f"svg_{name}")}, f"{folder}/sit.pt")
        return svg.load_sit(f"{folder}/sit.pt")


def to_hugging_face(official, layer):
    """Official DINO names -> those of transformers; query, key and value apart, DINOv3 without key bias."""
    dinov2, out = "pos_embed" in official, {}
    names = {"cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
             "mask_token": "embeddings.mask_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj.": "embeddings.patch_embeddings." + "projection." * dinov2, "blocks.": layer,
             ".attn.proj.": ".attention.o_proj.", ".ls1.gamma": ".layer_scale1.lambda1",
             ".ls2.gamma": ".layer_scale2.lambda1", ".mlp.w1.": ".mlp.gate_proj.",
             ".mlp.w2.": ".mlp.up_proj.", ".mlp.w3.": ".mlp.down_proj."}
    if dinov2:
        names |= {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    for key, value in official.items():
        for old, new in names.items():
            if old in key and (not old.startswith("norm") or key == old):
                key = key.replace(old, new)
        if key.endswith(("periods", "bias_mask")):
            continue
        if ".attn.qkv." in key:
            parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
            out |= {key.replace("attn.qkv", f"attention.{n}"): v for n, v in parts
                    if n != "k_proj" or dinov2 or key.endswith("weight")}
        else:
            out[key] = value
    return out


class Golden(Case):
    def test_frozen_encoders_agree_with_the_official_models(self):
        for key in [k for k in GOLDEN if k.endswith("/patch")]:
            name, size, _ = key.split("/")
            h, w = map(int, size.split("x"))
            with self.subTest(key):
                encoder = svg.encoder_from_weights(weights(name), name)
                self.assertEqual(encoder.name, name)
                cls, patches = encoder(image(w, (2, 3, h, w)), cls=True)
                self.agree(key, patches[:, ::14, ::5])
                if f"{name}/{size}/cls" in GOLDEN:
                    self.agree(f"{name}/{size}/cls", cls[:, ::5])
                if f"{name}/{size}/patch_stats" in GOLDEN:
                    self.agree(f"{name}/{size}/patch_stats", torch.stack([patches.mean(), patches.std()]))

    def test_hugging_face_files_give_what_the_official_file_gives(self):
        v4 = {"o_proj": "output.dense", "q_proj": "attention.query", "k_proj": "attention.key",
              "v_proj": "attention.value"}  # transformers 4's DINOv2
        for name, layers in (("dinov3_vits16plus", ("layer.", "model.layer.")),
                             ("dinov2_vits14", ("encoder.layer.", "encoder.layer. 4"))):
            official, x = weights(name), image(5, (1, 3, 112, 112))
            torch.save(official, f"{name}.pth")
            expected = svg.load_encoder(f"{name}.pth")(x)
            for layer in layers:
                with self.subTest(name, layer=layer):
                    renamed = to_hugging_face(official, layer.split()[0])
                    shapes = {k.replace("model.layer.", layer): v for k, v in MANIFESTS["hf_" + name].items()}
                    if layer.endswith("4"):
                        for new, old in v4.items():
                            renamed = {k.replace(f".attention.{new}.", f".attention.{old}."): v
                                       for k, v in renamed.items()}
                    else:
                        self.assertEqual(set(renamed), set(shapes))
                    write_safetensors("model.safetensors", renamed)
                    self.close(svg.load_encoder("model.safetensors")(x), expected, 1e-6)

    def test_autoencoder_agrees_with_the_authors(self):
        ae, x = authors_autoencoder(), image(1, (2, 3, 256, 256))
        with torch.no_grad():
            raw = ae.residual_tokens(x)
            self.agree("ae/residual_raw", to_map(raw)[:, :, ::3, ::3])
            latents = ae.encode(x)  # by the batch's statistics, as the file has none
            self.agree("ae/latent", to_map(latents)[:, ::9, ::3, ::3])
            self.agree("ae/latent_residual", to_map(latents)[:, 384:, ::3, ::3])
            y = ae.decode(latents)
            self.agree("ae/recon", y[:, :, ::15, ::15])
            self.agree("ae/recon_stats", torch.stack([y.mean(), y.std()]))
            self.agree("ae/decode_only",
                       ae.decode(normal(6, 1, 392, 16, 16).flatten(2).transpose(1, 2))[:, :, ::15, ::15])

    def test_the_authors_autoencoder_says_that_a_latent_depends_on_its_batch(self):
        torch.save({"state_dict": weights("svg_autoencoder")}, "ae.ckpt")
        with self.assertWarnsRegex(UserWarning, "ae.ckpt has no alignment statistics"):
            svg.load_autoencoder("ae.ckpt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            svg.load_autoencoder("ae.ckpt", decode_only=True)

    def test_what_the_authors_files_lack_is_named(self):
        without = {k: v for k, v in weights("svg_autoencoder").items() if k != "decoder.conv_out.weight"}
        torch.save({"state_dict": without}, "ae.ckpt")
        with self.assertRaisesRegex(UserError, "ae.ckpt.*Missing.*decoder.conv_out.weight"):
            svg.load_autoencoder("ae.ckpt")

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

    def test_stage_1_losses_agree_with_the_authors(self):
        torch.save(weights("torchvision_vgg16"), "vgg16.pth")
        lpips, disc = train_ae.LPIPS("vgg16.pth"), train_ae.PatchDiscriminator()
        disc.load_state_dict(weights("patchgan"))
        a, b = image(11, (2, 3, 128, 128)), image(12, (2, 3, 128, 128))
        with torch.no_grad():
            self.agree("lpips/vgg", lpips(a, b))
            self.close(lpips(a, a), torch.zeros(2))
            self.agree("patchgan/eval", disc.eval()(a)[:, :, ::2, ::2])
            self.agree("patchgan/train", disc.train()(a)[:, :, ::2, ::2])
        disc.load_state_dict(weights("patchgan"))
        ae, x = authors_autoencoder(), image(1, (2, 3, 256, 256))
        y = ae.decode(ae.encode(x))
        nll, l1, perceptual = train_ae.reconstruction_loss(x, y, lpips, 1.0)
        g_loss, last_layer = -disc(y).mean(), ae.decoder.conv_out.weight
        weight = 0.5 * train_ae.adaptive_weight(nll, g_loss, last_layer)
        total = nll + weight * g_loss
        y.backward(train_ae.generator_gradient(y, nll, g_loss, 0.5, last_layer))
        answers = {"l1_mean": l1, "p_loss_mean": perceptual, "nll": nll, "g_loss": g_loss,
                   "d_weight_times_half": weight, "total": total,
                   "disc_loss": train_ae.hinge_loss(disc(x), disc(y.detach())),
                   "grad_conv_out": ae.decoder.conv_out.weight.grad[:, ::16],
                   "grad_conv_in_norm": ae.decoder.conv_in.weight.grad.norm()}
        for key in [k for k in GOLDEN if k.startswith("stage1/")]:
            with self.subTest(key):
                self.agree(key, answers[key.removeprefix("stage1/")])

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

    def test_velocity_agrees_with_the_authors(self):
        for name in ("dit_tiny", "dit_B"):
            with self.subTest(name), torch.no_grad():
                t = torch.from_numpy(GOLDEN[f"{name}/t_noise_to_data"])
                velocity = authors_sit(name)(normal(21, 2, 256, 392), t, torch.tensor([7, 1000]))
                self.agree(f"{name}/velocity", velocity[:, ::18, ::7])

    def test_loss_agrees_with_the_authors(self):
        u = torch.tensor([.25, .6])
        for name, shift in (("dit_tiny", 1.0), ("dit_tiny", 0.4), ("dit_B", 1.0), ("dit_B", 0.4)):
            with self.subTest(name, shift=shift), torch.no_grad():
                loss = svg.flow_loss(authors_sit(name), normal(21, 2, 256, 392), torch.tensor([3, 5]), shift,
                                     u, noise=normal(22, 2, 256, 392))
                self.agree(f"{name}/loss_shift{shift}", loss)

    def test_samples_agree_with_the_authors(self):
        for name, steps, guidance, shift, mode, zero_init in (
                ("dit_tiny", 5, 1.55, 1.0, "constant", False),
                ("dit_tiny", 4, 4.0, 0.4, "constant", False),
                ("dit_tiny", 5, 1.55, 1.0, "cfg_star-1-0", True),
                ("dit_tiny", 3, None, 1.0, "constant", True),  # without guidance no step is skipped
                ("dit_B", 5, 1.55, 1.0, "constant", False),
                ("dit_B", 5, 1.55, 1.0, "cfg_star-1-0", True)):
            key = f"{name}/euler_steps{steps}_cfg{guidance}_shift{shift}_{mode}"
            with self.subTest(key):
                z = svg.euler_sample(authors_sit(name), normal(21, 2, 256, 392), torch.tensor([3, 5]), steps,
                                     guidance or 1.0, shift, zero_init)
                self.agree(key, z[:, ::18, ::7])

    def test_authors_latent_statistics_are_read(self):
        mean, std = (torch.from_numpy(GOLDEN[f"svg_latent_stats/{k}"]) for k in ("mean", "std"))
        torch.save({"dinov3_sp_mean": mean.view(1, 1, -1), "dinov3_sp_std": std.view(1, 1, -1)}, "authors.pt")
        np.savez("ours.npz", mean=mean, std=std)
        sit = svg.SiT({"depth": 1, "dim": 32, "heads": 1})
        latents = normal(0, 2, 256, 392) * std + mean
        for file in ("authors.pt", "ours.npz"):
            sit.set_latent_stats(*layouts.load_latent_stats(file))
            self.close(sit.normalize(latents), normal(0, 2, 256, 392), 1e-4)
            self.close(sit.denormalize(sit.normalize(latents)), latents, 1e-4)


class OtherEncoders(Case):
    """MAE and SigLIP2 from files of their published layouts, and the ablations of table 4."""

    def train(self, file, *flags):
        ok(f"train_ae --demo --image-size 32 --grid 2 --decoder-mult 1,1,1,1,1 --batch 2 "
           f"--steps 2 --log-every 1 --residual-dim 32 --residual-depth 1 --name new "
           f"--encoder {self.folder / file}", *flags)
        ae = svg.load_autoencoder("runs/new/last.pt")
        self.assertEqual(ae(demo_images(2)).shape, (2, 3, 32, 32))
        return ae

    def test_mae_file_loads_and_trains_without_a_residual(self):
        torch.save({"model": {**weights("mae_vitb16"), "decoder_embed.weight": torch.zeros(2)}}, "mae.pth")
        x = image(3, (1, 3, 256, 256))  # 16 x 16 tokens from 14 x 14 positions
        expected = svg.encoder_from_weights(weights("mae_vitb16"), "mae")(x)
        self.assertEqual(expected.shape, (1, 256, 768))
        self.close(svg.load_encoder("mae.pth")(x), expected)
        ae = self.train("mae.pth", "--residual-channels", 0)
        self.assertEqual(ae.channels, 768)
        self.close(ae.encode(demo_images(2)), ae.encoder(demo_images(2), grid=(2, 2)))

    def test_siglip2_loads_alone_and_from_the_two_tower_file_and_trains_unaligned(self):
        tower = weights("siglip2_vitb16_256")
        self.assertEqual(len([k for k in tower if k.startswith("head.")]), 11)  # the pooling head, left out
        both = {f"vision_model.{k}": v for k, v in tower.items()}
        both |= ({f"text_model.{k}": torch.ones(3) for k in tower}
                 | {f"logit_{k}": torch.ones(1) for k in ("scale", "bias")})
        write_safetensors("model.safetensors", both)
        x = image(3, (1, 3, 256, 256))
        encoder = svg.load_encoder("model.safetensors")
        self.close(encoder(x), svg.encoder_from_weights(tower, "tower")(x), 0)
        cls, patches = encoder(x, cls=True)
        self.close(cls, patches.mean(1))  # it has no CLS token
        ae, x = self.train("model.safetensors", "--align", "none"), demo_images(4)
        raw = ae.residual_tokens(x)
        self.assertTrue(torch.equal(ae.encode(x)[..., 768:], raw))
        self.assertEqual(ae.alignment_batches, 0)

    def test_a_tower_that_is_none_of_ours_is_refused(self):
        tower = weights("siglip2_vitb16_256")
        key = "embeddings.position_embedding.weight"
        for change, words in (
                ({key: tower[key][:196]}, r"pos_embed.*\[1, 196, 768\].*\[1, 256, 768\]"),
                ({"extra": torch.zeros(1)}, "Unexpected.*extra"),
                ({"embeddings.patch_embedding.weight": torch.zeros(768, 3, 8, 8)},
                 "'patch': 8, 'registers': 0, 'swiglu': False, 'cls': False} is none of .*siglip2")):
            with self.assertRaisesRegex(UserError, f"tower.safetensors: .*{words}"):
                svg.encoder_from_weights({**tower, **change}, "tower.safetensors")


class Latents(Case):
    def test_latent_does_not_depend_on_batch_mates(self):
        ae, x = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt"), demo_images(6)
        self.close(ae.encode(x)[2:3], ae.encode(x[2:3]))
        ae.has_statistics = False  # as the authors' file
        self.assertGreater((ae.encode(x)[2:3] - ae.encode(x[2:3])).abs().max(), 1e-3)

    def test_frozen_encoder_stays_frozen_and_out_of_checkpoints(self):
        ae, x = tiny_autoencoder(), demo_images(2)
        before = ae.encoder(x)
        ae.train().requires_grad_(True)
        self.assertTrue(ae.residual.training)
        self.assertFalse(any(m.training for m in ae.encoder.modules()))
        self.assertEqual(list(ae.encoder.parameters()), [])
        self.assertFalse(any("encoder" in k for k in ae.state_dict()))
        self.assertNotIn("encoder.", str(list(ae.to_checkpoint()["model"])))
        torch.optim.SGD(ae.parameters(), 1.0).zero_grad()
        ae(x).sum().backward()
        with torch.no_grad():
            for p in ae.parameters():
                p -= p.grad
        self.assertFalse(ae.encoder(x).requires_grad)
        self.assertTrue(torch.equal(ae.encoder(x), before))
        self.assertEqual(ae.to_checkpoint()["encoder_file"]["fingerprint"], ae.encoder.fingerprint)

    def test_images_of_any_size_on_the_grid(self):
        ae = tiny_autoencoder().train()
        x = torch.rand(2, 3, 48, 32) * 2 - 1
        self.assertEqual((ae.encode(x).shape, ae(x).shape), ((2, 24, 72), x.shape))
        for size, grid in ((256, 16), (64, 8)):
            model = svg.Autoencoder(None, feature_channels=8, image_size=size, grid=grid, decoder={"ch": 32})
            self.assertEqual(model.decode(torch.zeros(1, grid * grid, 16)).shape, (1, 3, size, size))
        with self.assertRaisesRegex(UserError, "power of two"):
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

    def test_mask_token_replaces_a_tenth_of_the_residuals_only_in_training(self):
        ae, x = tiny_autoencoder(), demo_images(1000)
        ae.mask_token.data.fill_(1e4)
        with torch.no_grad():
            masked = ae.train().encode(x)[..., ae.encoder.dim:] > 100
            self.assertTrue(torch.equal(masked.any((1, 2)), masked.all((1, 2))))
            self.assertAlmostEqual(masked.any((1, 2)).float().mean().item(), 0.1, delta=0.04)
            self.assertLess(ae.eval().encode(x)[..., ae.encoder.dim:].max(), 100)

    def test_running_alignment_converges_to_the_batch_statistics(self):
        ae, x = tiny_autoencoder(dropout=0.0).train(), demo_images(512)
        with torch.no_grad():
            for i in torch.randint(512, (100, 64)):
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
            moments += torch.stack([other.mean(0), other.square().mean(0)]).double() / 2

            return moments

        with mock.patch("svg.world_size", lambda: 2), mock.patch("svg.all_reduce", add_the_other_rank):
            shared = svg.channel_statistics(x[:3], synchronise=True)
        self.close(torch.stack(shared), torch.stack(svg.channel_statistics(x)))

    def test_measured_alignment_gives_the_residual_the_features_mean_and_std_exactly(self):
        ae = tiny_autoencoder()
        ae.measure_alignment(demo_images(300).split(32))
        with torch.no_grad():
            features, residual = ae.encode(demo_images(300)).split([64, 8], -1)
        for statistic in (lambda x: x.mean(), lambda x: x.flatten(0, 1).std(0).mean()):  # section 3.3
            self.close(statistic(features), statistic(residual), 1e-3)
        before = ae.alignment.clone()
        ae.measure_alignment(demo_images(300).split(7))  # whatever the batches
        self.close(ae.alignment, before, 1e-6)

    def test_measured_latents_have_mean_0_and_std_1_for_the_transformer(self):
        ae = tiny_autoencoder().eval()
        sit = svg.SiT({"depth": 1, "dim": 32, "heads": 1}, 72, 10, 4)
        self.assertTrue(sit.latent_mean.isnan().all())  # unknown
        sit.measure_latents(ae.encode, demo_images(300).split(300))
        with torch.no_grad():
            latents = ae.encode(demo_images(300))
            normalised = sit.normalize(latents).flatten(0, 1)
        self.close(normalised.mean(0), torch.zeros(72), 1e-3)
        self.close(normalised.std(0), torch.ones(72), 1e-3)
        self.close(sit.denormalize(sit.normalize(latents)), latents, 1e-4)
        for mean, std in ((torch.zeros(5), torch.ones(5)), (torch.zeros(72), torch.zeros(72))):
            with self.assertRaisesRegex(UserError, "latent statistics"):
                sit.set_latent_stats(mean, std)


class Field:
    """A velocity field f(x, t, 1 where conditional else 0) that counts the images it is asked for."""
    num_classes = 10

    def __init__(self, f):
        self.f = f
        self.count = 0

    def __call__(self, x, t, y):
        self.count += len(x)
        return self.f(x, t.view(-1, 1, 1), (y < 10).float().view(-1, 1, 1))


class Flow(Case):
    def test_fresh_transformer_answers_exactly_zero(self):
        model = svg.SiT({"depth": 2, "dim": 32, "heads": 2}, 7, 10, 4)
        v = model(torch.randn(3, 16, 7), torch.rand(3), torch.tensor([0, 9, 10]))
        self.assertEqual((v.shape, v.abs().max()), ((3, 16, 7), 0))

    def test_sizes_have_the_papers_parameter_counts(self):
        with torch.device("meta"):
            for name, millions in (("B", 130), ("L", 458), ("XL", 675)):
                count = sum(p.numel() for p in svg.SiT(name).parameters()) / 1e6
                self.assertAlmostEqual(count, millions, delta=0.01 * millions)

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
                                (5 * 0.25 + 3 * 0.5, {"guidance": 2.0, "guidance_interval": (0, 0.4)}),
                                (3, {"guidance": 2.0, "guidance_interval": (0.9, 1)})):
            with self.subTest(settings):
                self.close(svg.euler_sample(field, x, y, 4, shift=1.0, **settings), x + moved)

    def test_times_may_be_given_and_fall(self):
        field, x, y = Field(lambda x, t, c: 1 + x * t), torch.randn(1, 3, 4), torch.tensor([0])
        times = svg.euler_times(4, 0.5)
        half = svg.euler_sample(field, x, y, times[:3])
        whole = svg.euler_sample(field, half, y, times[2:])
        self.close(svg.euler_sample(field, x, y, 4, shift=0.5), whole, 0)
        self.close(svg.euler_sample(field, x, y, [0.75, 0.25]), x - 0.5 * (1 + 0.75 * x))

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
        for name, steps, guidance, zero_init, interval in itertools.product(
                ("euler", "heun"), (1, 5), (1.0, 2.0), (True, False), ([0, 1], [0.1, 0.5])):
            args = mock.Mock(sampler=name, steps=steps, guidance=guidance, zero_init=zero_init, shift=0.4,
                             guidance_interval=interval)
            field = Field(lambda x, t, c: 0 * x)
            sample.SAMPLERS[name](field, torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.long),
                                  **sample.flow_settings(args))
            self.assertEqual(field.count, 3 * sample.evaluations(args), args)
        command = f"sample --ckpt {shapes.DEMO_PT} --num 2 --steps 3"
        self.assertIn("3 Euler steps, guidance 4, shift 0.15: 4 network evaluations", ok(command))
        shown = ok(command + " --sampler heun --out h")
        self.assertIn("3 Heun steps, guidance 4, shift 0.15: 8 network", shown)
        self.assertEqual(files.read_record("h")["settings"]["sampler"], "heun")

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
        for decay in (1.0, 0.0, 0.5):
            ema = torch.nn.Linear(3, 2)
            model = torch.nn.Linear(3, 2)
            before = ema.weight.clone()
            expected = {1.0: before, 0.0: model.weight, 0.5: (before + model.weight) / 2}[decay]
            train_dit.update_ema(ema, model, decay)
            self.close(ema.weight, expected, 1e-6)

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


class Checkpoints(Case):
    def test_autoencoder_checkpoint_round_trip_with_and_without_its_encoder(self):
        path = trained() / "runs/demo-ae/last.pt"
        whole, decoder = svg.load_autoencoder(path), svg.load_autoencoder(path, decode_only=True)
        x = demo_images(2)
        self.assertTrue(torch.equal(whole(x), decoder.decode(whole.encode(x))))
        self.assertIsNone(decoder.encoder)
        with self.assertRaisesRegex(UserError, "other encoder weights"):
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


@unittest.skipUnless(REAL.is_dir(), "real weights are not here")
class RealWeights(Case):
    def test_dinov2_tells_real_images_apart(self):
        encoder = svg.load_encoder(REAL / "weights/dinov2_vits14_pretrain.pth")
        self.assertEqual(encoder.name, "dinov2_vits14")

        def features(split, count):
            images = data.ImageFolder(REAL / "tiny20" / split, 64)
            labels = images.labels
            chosen = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(20)]).tolist()
            x = data.to_float(torch.from_numpy(np.stack([images[i, 0][0] for i in chosen])), "cpu")
            cls = torch.cat([encoder(part, grid=(8, 8), cls=True)[0] for part in x.split(50)])
            return torch.nn.functional.normalize(cls, dim=1), torch.arange(20).repeat_interleave(count)

        (train, labels), (val, truth) = features("train", 15), features("val", 5)
        self.assertGreater((labels[(val @ train.T).argmax(1)] == truth).float().mean(), 0.5)  # chance is 0.05
