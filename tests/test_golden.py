"""Published models: the answers of independent implementations, from files of the published layouts.

The weights are a formula of names and shapes (assets/golden*.npz, helpers.weights); real ones come last.
"""
import functools
import unittest
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import fid
import svg
import train_ae
from lib import data, layouts
from lib.files import UserError
from lib.perceptual import LPIPS
from tests.helpers import GOLDEN, MANIFESTS, REAL, Case, image, normal, weights, write_safetensors


def to_hugging_face(official, layer, version=5):
    """Official DINO names -> those of transformers: query, key, value apart; DINOv3 without key bias."""
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
    if version == 4:
        for new, old in (("o_proj", "output.dense"), ("q_proj", "attention.query"),
                         ("k_proj", "attention.key"), ("v_proj", "attention.value")):
            out = {k.replace(f".attention.{new}.", f".attention.{old}."): v for k, v in out.items()}
    return out


# Official names, and the layouts of transformers for it: prefix of a layer, version.
ENCODERS = [("dinov3_vits16", ()), ("dinov3_vits16plus", (("layer.", 5), ("model.layer.", 5))),
            ("dinov3_vitb16", ()), ("dinov2_vits14", (("encoder.layer.", 5), ("encoder.layer.", 4))),
            ("dinov2_vits14_reg", ())]  # DINOv2's B is of these numbers of layers and heads


class Encoders(Case):
    def agrees(self, encoder, name):
        """Patch tokens, CLS tokens and their statistics; of the larger models for one image of two."""
        count = 1 if "vitb" in name else 2
        keys = [key for key in GOLDEN if key.startswith(f"{name}/") and key.endswith("/patch")]
        for key in keys:
            h, w = map(int, key.split("/")[1].split("x"))
            cls, patches = encoder(image(w, (2, 3, h, w))[:count], cls=True)
            answers = {"patch": patches[:, ::14, ::5], "cls": cls[:, ::5]}
            if count == 2:
                answers["patch_stats"] = torch.stack([patches.mean(), patches.std()])
            for kind, answer in answers.items():
                full_key = key.replace("/patch", f"/{kind}")
                if full_key in GOLDEN:
                    self.agree(full_key, answer, first=count)
        self.assertGreater(len(keys), 0)

    def test_frozen_encoders_agree_with_the_official_models_also_from_files_of_hugging_face(self):
        for name, others in ENCODERS:
            with self.subTest(name):
                official = weights(name)
                torch.save(official, "official.pth")
                encoder = svg.load_encoder("official.pth")
                self.assertEqual(encoder.name, name)
                self.agrees(encoder, name)
            x = image(5, (1, 3, 112, 112))
            for layer, version in others:
                with self.subTest(name, layer=layer, version=version):
                    renamed = to_hugging_face(official, layer, version)
                    if version == 5:
                        published = MANIFESTS["hf_" + name]
                        self.assertEqual(set(renamed), {k.replace("model.layer.", layer) for k in published})
                    write_safetensors("model.safetensors", renamed)
                    self.close(svg.load_encoder("model.safetensors")(x), encoder(x), 1e-6)

    def test_timm_agrees_also_where_its_files_leave_out_biases_and_the_position_of_cls(self):
        for name, ours, (h, w), step in (
                ("vit_small_plus_patch16_dinov3_qkvb", "dinov3_vits16plus", (224, 192), 14),
                ("vit_small_patch16_dinov3", "dinov3_vits16", (224, 192), 14),
                ("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg", (518, 518), 49)):
            with self.subTest(name):
                write_safetensors("timm.safetensors", weights(name))
                encoder = svg.load_encoder("timm.safetensors")
                cls, patches = encoder(image(h + w, (1, 3, h, w)), cls=True)
                for kind, answer in (("patch", patches[:, ::step, ::5]), ("cls", cls[:, ::5]),
                                     ("stats", torch.stack([patches.mean(), patches.std()]))):
                    self.agree(f"{name}/{h}x{w}/{kind}", answer)
                self.assertEqual(encoder.name, ours)

    def test_the_same_weights_from_other_names_and_wrappers_are_the_same_encoder(self):
        official = weights("dinov3_vits16plus")
        names = {"storage_tokens": "reg_token", ".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2",
                 ".w1.": ".fc1_g.", ".w2.": ".fc1_x.", ".w3.": ".fc2."}
        timm = {functools.reduce(lambda k, name: k.replace(*name), names.items(), key): value
                for key, value in official.items() if not key.endswith(("qkv.bias", "bias_mask", "periods"))}
        for key, value in official.items():
            if key.endswith("qkv.bias"):
                q, _, v = value.chunk(3)
                timm |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        timm.pop("mask_token")
        self.assertEqual(timm.keys(), MANIFESTS["vit_small_plus_patch16_dinov3_qkvb"].keys())
        other = {"dino_head.weight": torch.ones(2), "step": torch.ones(1)}
        wrapped = {f"module._orig_mod.backbone.{key}": value for key, value in timm.items()} | other
        extra = {**official, "local_cls_norm.weight": torch.ones(384)}
        encoders = [svg.encoder_from_weights(file, "x.pth") for file in (
            official, timm, extra, {"model": other, "teacher": wrapped}, {"state_dict": wrapped, "epoch": 3})]
        self.assertEqual(len({encoder.fingerprint for encoder in encoders}), 1)
        for file, lacks in ((official, "blocks.3.attn.qkv.bias"), (timm, "blocks.3.attn.q_bias")):
            with self.assertRaisesRegex(UserError, "x.pth: .*blocks.3.attn.qkv.bias"):
                svg.encoder_from_weights({k: v for k, v in file.items() if k != lacks}, "x.pth")

    def test_a_larger_dinov2_is_known_by_its_shapes(self):
        with torch.device("meta"):
            shapes = {key: torch.empty(shape) for key, shape in MANIFESTS["dinov2_vitb14"].items()}
            name = layouts.detect_architecture(layouts.official_names(shapes), svg.ENCODERS)
        self.assertEqual((name, svg.ENCODERS[name]["heads"]), ("dinov2_vitb14", 12))

    def test_mae_agrees_and_takes_other_grids(self):
        official = weights("mae_vitb16")
        torch.save({"model": {**official, "decoder_embed.weight": torch.zeros(2)}}, "mae.pth")
        encoder = svg.load_encoder("mae.pth")
        names = {"attention.o_proj": "attention.output.dense", ".norm1.": ".layernorm_before.",
                 ".norm2.": ".layernorm_after.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        renamed = to_hugging_face(official, "encoder.layer.", version=4)
        renamed = {"vit." + functools.reduce(lambda k, name: k.replace(*name), names.items(), key): value
                   for key, value in renamed.items()} | {"decoder.decoder_norm.weight": torch.zeros(2)}
        self.assertIn("vit.encoder.layer.0.attention.attention.query.weight", renamed)
        self.assertEqual(svg.encoder_from_weights(renamed, "mae.bin").fingerprint, encoder.fingerprint)
        self.agrees(encoder, "mae_vitb16")
        self.assertEqual(encoder(image(3, (1, 3, 256, 256))).shape, (1, 256, 768))  # from 14 x 14 positions

    def test_siglip2_agrees_from_the_two_tower_file_and_other_towers_are_refused(self):
        tower = weights("siglip2_vitb16_256")
        self.assertEqual(len([k for k in tower if k.startswith("head.")]), 11)  # the pooling head, left out
        both = {f"vision_model.{k}": v for k, v in tower.items()}
        both |= ({f"text_model.{k}": torch.ones(3) for k in tower}
                 | {f"logit_{k}": torch.ones(1) for k in ("scale", "bias")})
        write_safetensors("model.safetensors", both)
        encoder = svg.load_encoder("model.safetensors")
        self.agrees(encoder, "siglip2_vitb16_256")
        self.assertEqual(encoder.fingerprint, svg.encoder_from_weights(tower, "tower").fingerprint)
        cls, patches = encoder(image(3, (1, 3, 32, 48)), cls=True)
        self.close(cls, patches.mean(1))  # it has no CLS token
        positions = {"embeddings.position_embedding.weight": torch.zeros(196, 768)}
        for change, words in (
                (positions, r"pos_embed.*\[1, 196, 768\].*\[1, 256, 768\]"),
                ({"extra": torch.zeros(1)}, "Unexpected.*extra"),
                ({"embeddings.patch_embedding.weight": torch.zeros(768, 3, 8, 8)},
                 "none of ENCODERS in svg.py have .*'patch': 8, 'registers': 0, 'swiglu': False, 'cls'")):
            with self.assertRaisesRegex(UserError, f"tower.safetensors: .*{words}"):
                svg.encoder_from_weights({**tower, **change}, "tower.safetensors")
        with (mock.patch.dict(svg.ENCODERS, twin=svg.ENCODERS["siglip2_vitb16_256"]),
              self.assertRaisesRegex(UserError, "siglip2_vitb16_256 and twin of ENCODERS in svg.py have")):
            svg.encoder_from_weights(tower, "tower")


class Authors(Case):
    def test_autoencoder_and_stage_1_losses_agree(self):
        tensors = weights("svg_autoencoder")
        torch.save({"state_dict": tensors}, "ae.ckpt")
        del tensors["decoder.conv_out.weight"]
        torch.save({"state_dict": tensors}, "without.ckpt")
        del tensors
        with self.assertRaisesRegex(UserError, "without.ckpt.*Missing.*decoder.conv_out.weight"):
            svg.load_autoencoder("without.ckpt", decode_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # who only decodes is not warned
            svg.load_autoencoder("ae.ckpt", decode_only=True)
        with self.assertWarnsRegex(UserWarning, "ae.ckpt has no alignment statistics"):
            ae = svg.load_autoencoder("ae.ckpt")

        # Latents and reconstruction; aligned by the batch's statistics, as the file has none.
        x = image(1, (2, 3, 256, 256))
        with torch.no_grad():
            self.agree("ae/residual_raw", to_map(ae.residual_tokens(x))[:, :, ::3, ::3])
            latents = ae.encode(x)
        ae.encoder = None  # 100 MB
        self.agree("ae/latent", to_map(latents)[:, ::9, ::3, ::3])
        self.agree("ae/latent_residual", to_map(latents)[:, 384:, ::3, ::3])
        ae.decoder.recompute = True  # saves a gigabyte, and gradients of two layers alone save time
        ae.requires_grad_(False)
        for layer in (ae.decoder.conv_in, ae.decoder.conv_out):
            layer.requires_grad_(True)
        y = ae.decode(latents)
        self.agree("ae/recon", y[:, :, ::15, ::15])
        self.agree("ae/recon_stats", torch.stack([y.mean(), y.std()]))

        # Losses and the gradient in the decoder.
        lpips, disc = self.lpips_and_discriminator()
        nll, l1, perceptual = train_ae.reconstruction_loss(x, y, lpips, 1.0)
        g_loss, last_layer = -disc(y).mean(), ae.decoder.conv_out.weight
        weight = 0.5 * train_ae.adaptive_weight(nll, g_loss, last_layer)
        total = nll + weight * g_loss
        y.backward(train_ae.generator_gradient(y, nll, g_loss, 0.5, last_layer))
        answers = {"l1_mean": l1, "p_loss_mean": perceptual, "nll": nll, "g_loss": g_loss,
                   "d_weight_times_half": weight, "total": total,
                   "disc_loss": train_ae.hinge_loss(disc(x), disc(y.detach())),
                   "grad_conv_out": last_layer.grad[:, ::16],
                   "grad_conv_in_norm": ae.decoder.conv_in.weight.grad.norm()}
        known = {key for key in GOLDEN if key.startswith("stage1/")}
        self.assertEqual({f"stage1/{name}" for name in answers}, known)
        for name, answer in answers.items():
            self.agree(f"stage1/{name}", answer)

    def lpips_and_discriminator(self):
        vgg = {**weights("torchvision_vgg16", leave_out="classifier."), "classifier.0.bias": torch.zeros(1)}
        torch.save(vgg, "vgg16.pth")
        lpips, disc = LPIPS("vgg16.pth"), train_ae.PatchDiscriminator()
        filled = weights("patchgan")
        disc.load_state_dict(filled)
        a, b = image(11, (2, 3, 128, 128)), image(12, (2, 3, 128, 128))
        with torch.no_grad():
            self.agree("lpips/vgg", lpips(a, b))
            self.close(lpips(a, a), torch.zeros(2))
            self.agree("patchgan/eval", disc.eval()(a)[:, :, ::2, ::2])
            self.agree("patchgan/train", disc.train()(a)[:, :, ::2, ::2])
        disc.load_state_dict(filled)
        return lpips, disc.requires_grad_(False)

    def test_the_transformer_of_size_b_agrees_which_has_a_doubled_head(self):
        torch.save({"ema": weights("svg_dit_B")}, "sit.pt")
        t = torch.from_numpy(GOLDEN["dit_B/t_noise_to_data"])
        sit, x = svg.load_sit("sit.pt"), normal(21, 2, 256, 392)
        with torch.no_grad():
            self.agree("dit_B/velocity", sit(x, t, torch.tensor([7, 1000]))[:, ::18, ::7])

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


def to_map(tokens, patch=1):
    """Tokens [B, 256, C] -> [B, C / patch^2, 16 * patch, 16 * patch]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (16, 16)), patch)


class VAEs(Case):
    def test_vaes_agree_with_the_reference_and_with_diffusers(self):
        # SD-VAE in LDM's layout is the second one: see tests.test_vae.Layouts.
        for name, patch, channels in (("vavae_f16d32", 1, 32), ("diffusers_f8d4", 2, 4)):
            with self.subTest(name), torch.no_grad():
                write_safetensors("vae.safetensors", weights(name))
                ae = svg.load_autoencoder("vae.safetensors")
                self.assertEqual((ae.patch, ae.channels, ae.grid, ae.ratio),
                                 (patch, channels * patch ** 2, 16, 16))
                x = image(61, (len(GOLDEN[f"vae/{name}/mean"]), 3, 256, 256))[:1]
                mean, logvar = (to_map(part, patch) for part in ae.posterior(x))
                z = normal(62, 1, channels, 16 * patch, 16 * patch)
                y = ae.decode(F.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2))
                self.agree(f"vae/{name}/mean", mean[:, ::3, ::3, ::3], first=1)
                self.agree(f"vae/{name}/logvar", logvar[:, ::3, ::3, ::3], first=1)
                self.agree(f"vae/{name}/decode", y[:, :, ::15, ::15], first=1)


class Inception(Case):
    def test_agrees_with_tensorflow_and_pytorch_fid(self):
        torch.save(weights("fid_inception"), "inception.pth")
        model = fid.load_inception("inception.pth")
        images = torch.from_numpy(data.to_uint8(image(31, (3, 3, 256, 256))))
        seen = []
        model.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.append(y))
        adm = fid.inception_features(model, images)
        other = fid.inception_features(model, images, "pytorch-fid")
        logits = adm["logits"] + model.fc.bias
        for key, answer in (("tf1_resize/pool3", adm["features"][:, ::4]),
                            ("tf1_resize/logits", logits[:, ::4]),
                            ("tf1_resize/logits_unbiased", adm["logits"][:, ::4]),
                            ("tf1_resize/softmax_sorted5", logits.softmax(1).topk(5).values),
                            ("pytorch_resize/pool3", other["features"][:, ::4])):
            self.agree(f"inception/{key}", answer)
        with self.assertRaisesRegex(ValueError, "neither adm nor pytorch-fid"):
            fid.inception_features(model, images, "clean-fid")
        # Spatial features: seven channels of mixed_6/conv, channels last.
        expected = np.moveaxis(seen[0].numpy()[:, :7], 1, 3).reshape(3, 17 * 17 * 7)
        np.testing.assert_array_equal(adm["spatial"], expected)


@unittest.skipUnless(REAL.is_dir(), "real weights are not here")
class RealWeights(Case):
    def test_dinov2_tells_real_images_apart(self):
        encoder = svg.load_encoder(REAL / "weights/dinov2_vits14_pretrain.pth")
        cls = []
        for split, count in (("train", 8), ("val", 4)):
            images = data.ImageFolder(REAL / "tiny20" / split, 64)
            rows = [i for c in range(10) for i in np.flatnonzero(images.labels == c)[:count].tolist()]
            x = data.to_float(torch.from_numpy(np.stack([images[i, 0][0] for i in rows])), "cpu")
            cls.append(F.normalize(encoder(x, grid=(8, 8), cls=True)[0], dim=1))
        nearest = (cls[1] @ cls[0].T).argmax(1)
        right = nearest // 8 == torch.arange(40) // 4
        self.assertGreater(right.float().mean(), 0.5)  # chance is 0.1
