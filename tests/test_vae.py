"""VAE latents: answers of independent implementations, both layouts of files, and the programs on them."""
import copy
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import svg
from lib import data, files, ldm
from tests.helpers import (
    MANIFESTS,
    Case,
    formula,
    image,
    ok,
    pictures,
    read_log,
    write_pictures,
    write_safetensors,
)


@functools.cache
def tiny_weights(ch_mult=(1, 1, 2), attention=True):
    """A small VAE's tensors in LDM's layout, filled by the formula: 32 channels, 4 x 4 cells a token."""
    model = ldm.VAE(2, 32, ch_mult, attention)
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


class Layouts(Case):
    def test_ldm_and_diffusers_files_of_the_same_weights_give_the_same_model(self):
        self.assertEqual(MANIFESTS["diffusers_f8d4"], {k: list(v.shape) for k, v in to_diffusers(
            {k: torch.empty(s, device="meta") for k, s in MANIFESTS["sd_vae_f8d4"].items()}).items()})
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
        bias = "encoder.conv_in.bias"
        torch.save({**tiny_weights(), bias: tiny_weights()[bias] + 1e-3}, "changed.pt")
        self.assertNotEqual(svg.load_autoencoder("changed.pt").fingerprint, tiny_vae().fingerprint)

    def test_other_files_are_refused_in_one_line(self):
        vae = tiny_weights()
        other = tiny_weights((1, 2, 2))
        encoder = {k: v for k, v in vae.items() if k.startswith("encoder.")}
        for weights_, words in (
                ({k: v for k, v in vae.items() if k.startswith("decoder.")}, "not an autoencoder"),
                (encoder, "decoder.conv_in.weight"),
                ({k: v for k, v in vae.items() if "quant_conv" not in k}, "Missing key(s)"),
                ({**vae, "quantize.embedding.weight": torch.ones(2, 2)}, "Unexpected key(s)"),
                ({**encoder, **{k: v for k, v in other.items() if k not in encoder}}, "size mismatch")):
            torch.save(weights_, "file.pt")
            self.refused("edit reconstruct . --ae file.pt", "file.pt", words)
        self.refused("edit reconstruct . --ae vae.safetensors", "vae.safetensors: no such file")


class Posterior(Case):
    def test_latents_are_samples_in_training_and_means_in_eval(self):
        ae, x = tiny_vae(), image(1, (2, 3, 32, 32))
        self.addCleanup(ae.eval)
        with torch.no_grad():
            mean, logvar = ae.posterior(x)
            self.assert_same(ae.encode(x), mean)
            torch.manual_seed(0)
            drawn = ae.train().encode(x)
            torch.manual_seed(0)
            self.assert_same(drawn, mean + (logvar / 2).exp() * torch.randn_like(mean))

    def test_the_log_variance_is_clamped(self):
        ae, x = copy.deepcopy(tiny_vae()), image(1, (1, 3, 32, 32))
        for bias, bound in ((1e3, 20.0), (-1e3, -30.0)):
            ae.quant_conv.bias.data[2:] = bias
            _, logvar = ae.posterior(x)
            self.assertEqual((logvar.min(), logvar.max()), (bound, bound))

    def test_a_token_holds_its_own_cells_in_the_order_of_pixel_unshuffle(self):
        ae, x = tiny_vae(), image(1, (1, 3, 32, 48))
        with torch.no_grad():
            cells = ae.quant_conv(ae.encoder(x))[0, :2]  # [2, 8, 12]
            latents = ae.encode(x)
            self.assertEqual(latents.shape, (1, 6, 32))
            self.assert_same(latents[0, 3 + 2], cells[:, 4:8, 8:12].flatten())  # row 1, column 2
            self.close(ae.decode(latents, (2, 3)), ae.decoder(ae.post_quant_conv(cells[None])))


class Programs(Case):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(ldm.VAE.__init__, "__defaults__", (32,)))  # pixels, not 256
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
        ok("edit reconstruct train/a --ae vae.pt")
        ok("edit interpolate --class a --seeds 1 2 --frames 2 --steps 2")
        ok("edit redraw train/a/0.png --box 4,4,20,20 --class a --steps 2")
        ok("probe space --size 32 --data train --ae vae.pt --classes 2 --images 8 --workers 0")
        shutil.copy("vae.pt", "other.pt")
        ok("probe space --size 32 --data train --ae vae.pt other.pt --classes 2 --images 8 --workers 0 "
           "--out two")
        numbers = json.loads(Path("two/space.json").read_text())
        self.assertEqual((numbers["of"], numbers["vae.pt"]), (["vae.pt", "other.pt"], numbers["other.pt"]))
        ok("sample --export all.pt")
        for name, model in (("run", ""), ("exported", "--ckpt all.pt")):
            ok(f"sample --num 2 --steps 2 {model} --out {name}")
        np.testing.assert_array_equal(pictures("run"), pictures("exported"))
        ok("probe pca")
        Path("val").symlink_to("train")
        ok("probe classify --size 32 --data . --ae vae.pt --epochs 1 --batch 4 --workers 0")
        torch.save(tiny_weights(attention=False), "vae.pt")
        self.refused("sample --out other", "not trained on the autoencoder vae.pt")

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
        ae, dataset = svg.load_autoencoder("vae.pt"), data.open_data("train", 32)
        cached = data.Latents(dataset, ae.train(), 3, 0, torch.device("cpu"))
        images = torch.from_numpy(np.stack([dataset[i, 0][0] for i in range(8)]))
        with torch.no_grad():
            mean, logvar = ae.posterior(data.to_float(images, "cpu"))
        drawn = (cached.latents[:, 0].float() - mean) / (logvar / 2).exp()
        self.assertAlmostEqual(drawn.std().item(), 1, delta=0.1)
        self.assertAlmostEqual(drawn.mean().item(), 0, delta=0.1)

    def test_training_sees_samples_and_not_means(self):
        np.savez("stats.npz", mean=np.zeros(32), std=np.ones(32))  # the same for both
        ok(self.TRAIN + " --steps 1 --latent-stats stats.npz --name wide")
        weight, bias = (tiny_weights()[f"quant_conv.{name}"].clone() for name in ("weight", "bias"))
        weight[2:] = 0
        bias[2:] = -100  # a posterior without width, of the same mean
        torch.save({**tiny_weights(), "quant_conv.weight": weight, "quant_conv.bias": bias}, "vae.pt")
        ok(self.TRAIN + " --steps 1 --latent-stats stats.npz --name narrow")
        (wide,), (narrow,) = ([entry["loss"] for entry in read_log(name) if "loss" in entry]
                              for name in ("wide", "narrow"))
        self.assertGreater(wide, narrow + 0.1)
