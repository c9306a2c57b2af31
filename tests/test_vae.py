"""VAE latents: answers of independent implementations, both layouts of files, and the programs on them."""
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import svg
from lib import data, files, ldm
from lib.files import UserError
from tests.helpers import (
    MANIFESTS,
    Case,
    formula,
    image,
    normal,
    ok,
    pictures,
    read_log,
    run,
    weights,
    write_pictures,
    write_safetensors,
)

# 32 channels, 4 x 4 cells a token
TINY = {"z_channels": 2, "ch": 32, "ch_mult": [1, 1, 2], "attention": True}


def tiny_weights(**changes):
    """A small VAE's tensors in LDM's layout, filled by the formula."""
    model = ldm.VAE(**{**TINY, **changes})
    return {k: formula(k, v.shape, False) for k, v in model.state_dict().items()}


@functools.cache
def tiny_vae():
    """The small VAE from a file."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tiny_weights(), f"{folder}/vae.pt")
        return svg.load_autoencoder(f"{folder}/vae.pt")


def to_diffusers(original, old=False):
    """LDM's names and shapes -> those of diffusers, of its first releases with `old`."""
    names = {".mid.attn_1.": ".mid_block.attentions.0.", ".mid.block_1.": ".mid_block.resnets.0.",
             ".mid.block_2.": ".mid_block.resnets.1.", ".down.": ".down_blocks.", ".block.": ".resnets.",
             ".attn.": ".attentions.", ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
             ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out."}
    attention = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
                 ".proj_out.": ".to_out.0."}
    if old:
        attention |= {".q.": ".query.", ".k.": ".key.", ".v.": ".value.", ".proj_out.": ".proj_attn."}
    last = max(int(k.split(".")[2]) for k in original if k.startswith("decoder.up."))
    out = {}
    for key, value in original.items():
        key = re.sub(r"\.up\.(\d+)", lambda match: f".up_blocks.{last - int(match[1])}", key)
        if ".attn" in key:
            for name, new in attention.items():
                key = key.replace(name, new)
            value = value[:, :, 0, 0] if value.ndim == 4 else value
        for name, new in names.items():
            key = key.replace(name, new)
        out[key] = value
    return out


def to_map(tokens, patch):
    """[B, 256, C] -> [B, z, 16 * patch, 16 * patch]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (16, 16)), patch)


class Golden(Case):
    def check(self, name, file, patch, z_channels, images=2):
        ae = svg.load_autoencoder(file)
        self.assertEqual((ae.patch, ae.channels, ae.grid, ae.ratio),
                         (patch, z_channels * patch ** 2, 16, 16))
        with torch.no_grad():
            mean, logvar = (to_map(x, patch) for x in ae.posterior(image(61, (images, 3, 256, 256))))
            z = normal(62, images, z_channels, 16 * patch, 16 * patch)
            y = ae.decode(F.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2))
        self.agree(f"vae/{name}/mean", mean[:, ::3, ::3, ::3])
        self.agree(f"vae/{name}/logvar", logvar[:, ::3, ::3, ::3])
        self.agree(f"vae/{name}/decode", y[:, :, ::15, ::15])
        self.agree(f"vae/{name}/stats", torch.stack([mean.mean(), mean.std(), y.mean(), y.std()]))

    def test_sd_vae_agrees_with_the_reference(self):
        torch.save({"state_dict": weights("sd_vae_f8d4")}, "vae.ckpt")
        self.check("sd_vae_f8d4", "vae.ckpt", patch=2, z_channels=4)

    def test_va_vae_agrees_with_the_reference(self):
        torch.save(weights("vavae_f16d32"), "vae.pt")
        self.check("vavae_f16d32", "vae.pt", patch=1, z_channels=32)

    def test_a_file_of_diffusers_agrees_with_diffusers(self):
        write_safetensors("vae.safetensors", weights("diffusers_f8d4"))
        self.check("diffusers_f8d4", "vae.safetensors", patch=2, z_channels=4, images=1)


class Layouts(Case):
    def test_ldm_and_diffusers_files_of_the_same_weights_give_the_same_model(self):
        self.assertEqual(MANIFESTS["diffusers_f8d4"], {k: list(v.shape) for k, v in to_diffusers(
            {k: torch.empty(s) for k, s in MANIFESTS["sd_vae_f8d4"].items()}).items()})
        for attention in (True, False):
            original = tiny_weights(attention=attention)
            unused = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1),
                      "foundation_model.blocks.0.attn.q.weight": torch.ones(2, 2),
                      "linear_proj.weight": torch.ones(2, 2)}
            torch.save(original, "ldm.pt")
            torch.save({"state_dict": {**original, **unused}, "epoch": 3}, "ldm.ckpt")
            write_safetensors("new.safetensors", to_diffusers(original))
            torch.save(to_diffusers(original, old=True), "old.bin")
            models = [svg.load_autoencoder(f) for f in ("ldm.pt", "ldm.ckpt", "new.safetensors", "old.bin")]
            self.assertEqual({model.fingerprint for model in models}, {files.fingerprint(original)})
            for model in models:
                self.assert_same(dict(model.state_dict()), dict(models[0].state_dict()))
                self.assertEqual(model.channels, 32)
                self.assertEqual(len(model.decoder.up[2].attn), 3 * attention)

    def test_the_fingerprint_covers_the_encoder_too(self):
        changed = tiny_weights()
        changed["encoder.conv_in.bias"][0] += 1e-3
        torch.save(changed, "changed.pt")
        self.assertNotEqual(svg.load_autoencoder("changed.pt").fingerprint, tiny_vae().fingerprint)

    def test_other_files_are_refused_in_one_line(self):
        vae = tiny_weights()
        other = tiny_weights(ch_mult=[1, 2, 2])
        encoder = {k: v for k, v in vae.items() if k.startswith("encoder.")}
        for weights_, words in (
                ({k: v for k, v in vae.items() if k.startswith("decoder.")}, "not an autoencoder"),
                (encoder, "decoder.conv_in.weight"),
                ({k: v for k, v in vae.items() if "quant_conv" not in k}, "Missing key(s)"),
                ({**vae, "quantize.embedding.weight": torch.ones(2, 2)}, "Unexpected key(s)"),
                ({**encoder, **{k: v for k, v in other.items() if k not in encoder}}, "size mismatch")):
            torch.save(weights_, "file.pt")
            self.refused("edit reconstruct . --ae file.pt", "file.pt", words)


class Posterior(Case):
    def test_latents_are_samples_in_training_and_means_in_eval(self):
        ae, x = tiny_vae(), image(1, (2, 3, 64, 64))
        self.addCleanup(ae.eval)
        with torch.no_grad():
            mean, logvar = ae.posterior(x)
            self.assert_same(ae.encode(x), mean)
            torch.manual_seed(0)
            drawn = ae.train().encode(x)
            torch.manual_seed(0)
            self.assert_same(drawn, mean + (logvar / 2).exp() * torch.randn_like(mean))

    def test_the_log_variance_is_clamped(self):
        torch.save(tiny_weights(), "vae.pt")
        ae, x = svg.load_autoencoder("vae.pt"), image(1, (1, 3, 64, 64))
        for bias, bound in ((1e3, 20.0), (-1e3, -30.0)):
            ae.quant_conv.bias.data[2:] = bias
            _, logvar = ae.posterior(x)
            self.assertEqual((logvar.min(), logvar.max()), (bound, bound))

    def test_a_token_holds_its_own_cells_in_the_order_of_pixel_unshuffle(self):
        ae, x = tiny_vae(), image(1, (1, 3, 64, 96))
        with torch.no_grad():
            cells = ae.quant_conv(ae.encoder(x))[0, :2]  # [2, 16, 24]
            latents = ae.encode(x)
            self.assertEqual(latents.shape, (1, 24, 32))
            self.assert_same(latents[0, 6 + 2], cells[:, 4:8, 8:12].flatten())  # row 1, column 2
            self.close(ae.decode(latents, (4, 6)), ae.decoder(ae.post_quant_conv(cells[None])))


class Programs(Case):
    def setUp(self):
        super().setUp()
        smaller = mock.patch.object(ldm.VAE.__init__, "__defaults__", (64,))  # pixels, instead of 256
        smaller.start()
        self.addCleanup(smaller.stop)
        torch.save(tiny_weights(), "vae.pt")
        for name in ("train/a", "train/b"):
            write_pictures(name, 4, first=ord(name[-1]))

    TRAIN = ("train_dit --data train --ae vae.pt --model 1,32,2 --batch 4 --workers 0 --preview-steps 1 "
             "--log-every 1")

    def test_one_flag_trains_samples_edits_and_probes_a_vae(self):
        ok(self.TRAIN + " --steps 2")
        checkpoint = svg.load_checkpoint("runs/dit/last.pt")
        self.assertEqual(checkpoint["autoencoder"],
                         {"path": "vae.pt", "fingerprint": files.fingerprint(tiny_weights())})
        self.assertEqual(checkpoint["ema"]["latent_mean"].shape, (32,))
        self.assertTrue((checkpoint["ema"]["latent_std"] > 0.01).all())
        ok("sample --num 2 --steps 2")
        ok("edit reconstruct train/a --ae vae.pt")
        ok("edit interpolate --class a --seeds 1 2 --frames 2 --steps 2")
        ok("edit redraw train/a/0.png --box 4,4,20,20 --class a --steps 2")
        ok("probe space --size 64 --data train --ae vae.pt --classes 2 --images 8 --workers 0")
        shutil.copy("vae.pt", "other.pt")
        ok("probe space --size 64 --data train --ae vae.pt other.pt --classes 2 --images 8 --workers 0 "
           "--out two")
        numbers = json.loads(Path("two/space.json").read_text())
        self.assertEqual((numbers["of"], numbers["vae.pt"]), (["vae.pt", "other.pt"], numbers["other.pt"]))
        ok("sample --export all.pt")
        for name, model in (("run", ""), ("exported", "--ckpt all.pt")):
            ok(f"sample --num 2 --steps 2 {model} --out {name}")
        np.testing.assert_array_equal(pictures("run"), pictures("exported"))
        ok("probe pca")
        Path("val").symlink_to("train")
        ok("probe classify --size 64 --data . --ae vae.pt --epochs 1 --batch 4 --workers 0")
        torch.save(tiny_weights(attention=False), "vae.pt")
        code, _, err = run("sample --num 2 --steps 2 --out other")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("not trained on the autoencoder vae.pt", err)

    def test_the_sample_of_the_posterior_depends_on_seed_and_step_alone(self):
        ok(self.TRAIN + " --steps 3 --name whole")
        ok(self.TRAIN + " --steps 3 --name parts --accumulate 2")
        ok(self.TRAIN + " --steps 2 --name resumed")
        ok(self.TRAIN + " --steps 3 --name resumed")
        losses = {name: [entry["loss"] for entry in read_log(name) if "loss" in entry]
                  for name in ("whole", "parts", "resumed")}
        self.assertEqual(len(losses["whole"]), 3)
        np.testing.assert_allclose(losses["parts"], losses["whole"], 1e-5)
        self.assertEqual(losses["resumed"], losses["whole"])

    def test_latents_in_memory_are_samples_too(self):
        ok(self.TRAIN + " --steps 1 --cache")
        ae, dataset = svg.load_autoencoder("vae.pt"), data.open_data("train", 64)
        cached = data.Latents(dataset, ae.train(), 3, 0, torch.device("cpu"))
        images = torch.from_numpy(np.stack([dataset[i, 0][0] for i in range(8)]))
        with torch.no_grad():
            mean, logvar = ae.posterior(data.to_float(images, "cpu"))
        drawn = (cached.latents[:, 0].float() - mean) / (logvar / 2).exp()
        self.assertAlmostEqual(drawn.std().item(), 1, delta=0.05)
        self.assertAlmostEqual(drawn.mean().item(), 0, delta=0.05)

    def test_training_sees_samples_and_not_means(self):
        np.savez("stats.npz", mean=np.zeros(32), std=np.ones(32))  # the same for both
        ok(self.TRAIN + " --steps 1 --latent-stats stats.npz --name wide")
        narrow = tiny_weights()
        narrow["quant_conv.weight"][2:] = 0
        narrow["quant_conv.bias"][2:] = -100  # a posterior without width, of the same mean
        torch.save(narrow, "vae.pt")
        ok(self.TRAIN + " --steps 1 --latent-stats stats.npz --name narrow")
        (wide,), (narrow,) = ([entry["loss"] for entry in read_log(name) if "loss" in entry]
                              for name in ("wide", "narrow"))
        self.assertGreater(wide, narrow + 0.1)

    def test_a_missing_file_is_named(self):
        with self.assertRaisesRegex(UserError, "vae.safetensors: no such file"):
            svg.load_autoencoder("vae.safetensors")
