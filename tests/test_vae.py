"""VAE latents: answers of independent implementations, both layouts of files, and the programs on them."""
import functools
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import svg
from lib import data, files, ldm
from tests import helpers
from tests.helpers import MANIFESTS, Case, formula, image, ok, pictures, write_pictures, write_safetensors

TRAIN = "train_dit --data train --ae vae.pt --model 1,32,2 --batch 4 --workers 0 --preview-steps 1"


@functools.cache
def tiny_weights(ch_mult=(1, 1, 2), attention=True):
    """A small VAE's tensors in LDM's layout, filled by the formula: 32 channels, 4 x 4 cells a token."""
    model = ldm.VAE(2, 32, ch_mult, attention)
    return {k: formula(k, v.shape, False) for k, v in model.state_dict().items()}


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
        is_attention = ".attn" in key
        for name, new in (names | attention if is_attention else names).items():
            key = key.replace(name, new)
        out[key] = value.squeeze() if is_attention else value  # of a convolution -> of a linear layer
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
            torch.save({"model": {f"first_stage_model.{k}": v for k, v in original.items()}
                        | {"model.input_blocks.0.weight": torch.ones(2)}}, "whole.ckpt")
            write_safetensors("new.safetensors", to_diffusers(original))
            torch.save(to_diffusers(original, old=True), "old.bin")
            models = [svg.load_autoencoder(f) for f in (
                "ldm.pt", "ldm.ckpt", "whole.ckpt", "new.safetensors", "old.bin")]
            for model in models:
                self.assert_same(dict(model.state_dict()), original)
                self.assertEqual(model.fingerprint, files.fingerprint(original))
                self.assertEqual((model.channels, len(model.decoder.up[2].attn)), (32, 3 * attention))

    def test_other_files_are_refused_in_one_line(self):
        vae, other = tiny_weights(), tiny_weights((1, 2, 2))
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
    def setUp(self):
        super().setUp()
        torch.save(tiny_weights(), "vae.pt")
        self.ae, self.x = svg.load_autoencoder("vae.pt"), image(1, (2, 3, 32, 48))

    @torch.no_grad()
    def test_latents_are_samples_in_training_and_means_in_eval_and_the_log_variance_is_clamped(self):
        mean, logvar = self.ae.posterior(self.x)
        self.assert_same(self.ae.encode(self.x), mean)
        torch.manual_seed(0)
        drawn = self.ae.train().encode(self.x)
        torch.manual_seed(0)
        self.assert_same(drawn, mean + (logvar / 2).exp() * torch.randn_like(mean))
        for bias, bound in ((1e3, 20.0), (-1e3, -30.0)):
            self.ae.quant_conv.bias[2:] = bias
            _, logvar = self.ae.posterior(self.x)
            self.assertEqual((logvar.min(), logvar.max()), (bound, bound))

    @torch.no_grad()
    def test_a_token_holds_its_own_cells_in_the_order_of_pixel_unshuffle(self):
        cells = self.ae.quant_conv(self.ae.encoder(self.x))[:, :2]  # [2, 2, 8, 12]
        latents = self.ae.encode(self.x)
        self.assertEqual(latents.shape, (2, 6, 32))
        self.assert_same(latents[:, 3 + 2], cells[:, :, 4:8, 8:12].flatten(1))  # row 1, column 2
        self.close(self.ae.decode(latents, (2, 3)), self.ae.decoder(self.ae.post_quant_conv(cells)))


class Programs(Case):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(ldm.VAE.__init__, "__defaults__", (32,)))  # pixels, not 256
        torch.save(tiny_weights(), "vae.pt")
        for name in ("train/a", "train/b"):
            write_pictures(name, 4, first=ord(name[-1]))

    def losses(self, name, flags):
        ok(f"{TRAIN} --log-every 1 --name {name} {flags}")
        return [entry["loss"] for entry in helpers.read_log(name) if "loss" in entry]

    def test_one_flag_trains_samples_edits_and_probes_a_vae(self):
        ok(TRAIN + " --steps 2")
        checkpoint = svg.load_checkpoint("runs/dit/last.pt")
        self.assertEqual(checkpoint["autoencoder"],
                         {"path": "autoencoder.pt", "fingerprint": files.fingerprint(tiny_weights())})
        self.assertEqual(checkpoint["ema"]["latent_mean"].shape, (32,))
        self.assertTrue((checkpoint["ema"]["latent_std"] > 0.01).all())
        ok("edit reconstruct train/a --ae vae.pt")
        ok("edit interpolate --class a --seeds 1 2 --frames 2 --steps 2")
        ok("edit redraw train/a/0.png --box 4,4,20,20 --class a --steps 2")
        probe = "probe space --size 32 --data train --classes 2 --images 8 --workers 0"
        ok(f"{probe} --ae vae.pt")
        shutil.copy("vae.pt", "other.pt")
        ok(f"{probe} --ae vae.pt other.pt --out two")
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
        self.refused("sample --ae vae.pt --out other", "not trained on the autoencoder vae.pt")

    def test_the_sample_of_the_posterior_depends_on_seed_and_step_alone(self):
        whole = self.losses("whole", "--steps 3")
        self.assertEqual(len(whole), 3)
        np.testing.assert_allclose(self.losses("parts", "--steps 3 --accumulate 2"), whole, 1e-5)
        self.assertEqual(self.losses("resumed", "--steps 2"), whole[:2])
        self.assertEqual(self.losses("resumed", "--steps 3"), whole)

    def test_latents_in_memory_are_samples_too(self):
        ok(TRAIN + " --steps 1 --cache")
        ae, dataset = svg.load_autoencoder("vae.pt"), data.open_data("train", 32)
        cached = data.Latents(dataset, ae.train(), 3, 0, torch.device("cpu"))
        images = torch.from_numpy(np.stack([dataset[i, 0][0] for i in range(8)]))
        with torch.no_grad():
            mean, logvar = ae.posterior(data.to_float(images, "cpu"))
        drawn = (cached.latents[:, 0].float() - mean) / (logvar / 2).exp()
        self.close((drawn.mean().item(), drawn.std().item()), (0.0, 1.0), 0.05)

    def test_training_sees_samples_and_not_means(self):
        np.savez("stats.npz", mean=np.zeros(32), std=np.ones(32))  # the same for both
        wide, = self.losses("wide", "--steps 1 --latent-stats stats.npz")
        weights = {name: value.clone() for name, value in tiny_weights().items()}
        weights["quant_conv.weight"][2:] = 0
        weights["quant_conv.bias"][2:] = -100  # a posterior without width, of the same mean
        torch.save(weights, "vae.pt")
        narrow, = self.losses("narrow", "--steps 1 --latent-stats stats.npz")
        self.assertGreater(wide, narrow + 0.1)
