"""Tests: reference answers of published models, the properties that users rely on, the commands, bad input.

    python -m unittest -v                       # all, some minutes on two cores; pytest collects them too
    python -m unittest test_svg.Golden          # one group

assets/golden.npz holds what independent implementations answered for formula weights (see `formula`), and
the names and shapes of the published checkpoints. Tests with real weights look into ../shared/real and skip
without it.
"""
import argparse
import atexit
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import demo
import fid
import figures
import probe
import sample
import svg
import train_ae
import train_dit

ROOT = Path(__file__).resolve().parent
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # for the index of image trees
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"])
REAL = ROOT.parent / "shared" / "real"
GOLDEN = svg.load_npz(ROOT / "assets" / "golden.npz")
MANIFESTS = json.loads(GOLDEN["manifests"].tobytes())

# -- Formula weights and other helpers ---------------------------------------------------------------------


def formula(key, shape, learned_positions):
    """One tensor as a pure function of its published name and shape (rule of shared/reference/formula.py)."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith(("periods", "bias_mask")) or (key.endswith("pos_embed") and not learned_positions):
        return torch.zeros(shape)  # computed by the architecture
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if key.endswith(("pos_embed", "pos_embedding", "position_embedding.weight")):
        return torch.from_numpy(0.5 * n)
    if len(shape) >= 2:
        return torch.from_numpy(n * np.float32(np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]))))
    if key.endswith("running_var"):
        return torch.from_numpy(1 + 0.1 * np.abs(n))
    return torch.from_numpy(0.1 * n + key.endswith(("weight", "gamma")))


def weights(name):
    """A published checkpoint's tensors, filled by the formula."""
    return {k: formula(k, s, name.startswith(("dinov2", "mae"))) for k, s in MANIFESTS[name].items()}


def image(seed, shape):
    """Sinusoids plus noise, [B, 3, H, W] in [-1, 1] (the rule of formula.py, there in [0, 1])."""
    r, (b, c, h, w) = np.random.RandomState(seed), shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    out = np.empty(shape)
    for i, j in np.ndindex(b, c):
        f, p = r.uniform(1, 6, 4), r.uniform(0, 6.28, 2)
        out[i, j] = 0.5 + 0.25 * np.sin(f[0] * 6.28 * x / w + p[0]) + 0.2 * np.cos(f[1] * 6.28 * y / h + p[1])
    out += 0.05 * r.standard_normal(shape)
    return torch.from_numpy(np.clip(out, 0, 1).astype(np.float32) * 2 - 1)


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def to_map(tokens):
    """[B, 256, C] -> [B, C, 16, 16]."""
    return tokens.transpose(1, 2).unflatten(2, (16, 16))


class Case(unittest.TestCase):
    """A test in an empty folder of its own."""

    def setUp(self):
        before, self.folder = os.getcwd(), Path(tempfile.mkdtemp()).resolve()
        self.addCleanup(shutil.rmtree, self.folder)
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)

    def agree(self, key, actual, rtol=1e-3, atol=1e-4):
        expected, actual = GOLDEN[key], np.asarray(torch.as_tensor(actual).detach())
        self.assertEqual(expected.shape, actual.shape, key)
        np.testing.assert_allclose(actual, expected, rtol, atol * np.abs(expected).max(), err_msg=key)

    def assert_same(self, a, b, where=""):
        """The same numbers, bit for bit, all the way down."""
        self.assertEqual(type(a), type(b), where)
        if isinstance(a, torch.Tensor):
            self.assertTrue(torch.equal(a, b), where)
        elif isinstance(a, (dict, list)):
            self.assertEqual(len(a), len(b), where)
            for key in a if isinstance(a, dict) else range(len(a)):
                self.assert_same(a[key], b[key], f"{where}/{key}")
        else:
            self.assertEqual(a, b, where)

    def close(self, a, b, tolerance=1e-5):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)

    def snapshot(self):
        return {p: p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")}

    def refused(self, command, *words):
        """Exit code 2, one line that holds all `words`, and not a file more, less or different."""
        with self.subTest(command):
            before = self.snapshot()
            code, _, err = run(command)
            self.assertEqual((code, err.count("\n"), err[:7]), (2, 1, "error: "), err)
            for word in words:
                self.assertIn(word, err)
            after = self.snapshot()
            self.assertEqual(before.keys(), after.keys())
            self.assertEqual([p for p in before if before[p] != after[p]], [])


def run(command, *more):
    """A script's real main in this process: "sample --steps 5" -> (exit code, stdout, stderr)."""
    script, *flags = *command.split(), *map(str, more)
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in svg.STOP_SIGNALS}
    with mock.patch("sys.argv", [f"{script}.py", *flags]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            svg.run_main(importlib.import_module(script).main)
        except SystemExit as e:
            code = e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def ok(command, *more):
    """run() that must succeed in silence; what it printed."""
    code, out, err = run(command, *more)
    assert (code, err) == (0, ""), (command, code, err)
    return out


def start(command, *more, processes=1, torchrun=(), **settings):
    """The same through the shell's door: a process of a fresh interpreter, or torchrun."""
    script, *flags = *command.split(), *map(str, more)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun,
                "--"]
    command = [sys.executable, *launcher * (processes > 1), str(ROOT / f"{script}.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, **settings)


def shell(command, *more, **settings):
    """start() that must succeed; what it printed."""
    process = start(command, *more, **settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return out


MINI_AE = "train_ae --demo --batch 8 --stats-images 16 --log-every 1"
MINI_DIT = ("train_dit --demo --batch 8 --model 2,32,2 --lr 0.01 --ema-decay 0.5 --preview-steps 2 "
            "--log-every 1")


@functools.cache
def trained():
    """A folder in which both --demo stages have run for a few steps, by the real command lines."""
    folder, before = Path(tempfile.mkdtemp()).resolve(), os.getcwd()
    atexit.register(shutil.rmtree, folder)
    os.chdir(folder)
    try:
        ok(MINI_AE + " --steps 4 --save-every 2")
        ok(MINI_DIT + " --steps 6")
    finally:
        os.chdir(before)
    return folder


def read_log(name):
    return [json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]


def pictures(folder):
    return np.stack([np.asarray(Image.open(f)) for f in sorted(Path(folder).glob("*.png"))])


def demo_images(count):
    data = demo.dataset("val", count)
    return svg.to_float(torch.from_numpy(np.stack([data[i, 0][0] for i in range(count)])), "cpu")


def tiny_autoencoder(**residual):
    torch.manual_seed(0)
    return svg.Autoencoder(svg.load_encoder(demo.ENCODER), image_size=32, grid=4,
                           residual={"dim": 32, "depth": 1, "heads": 1, **residual},
                           decoder={"ch": 32, "ch_mult": [1] * 4})


# -- What independent implementations answered -------------------------------------------------------------

@functools.cache
def authors_autoencoder():
    """The authors' autoencoder from a Lightning checkpoint file."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": weights("svg_autoencoder")}, f"{folder}/ae.ckpt")
        return svg.load_autoencoder(f"{folder}/ae.ckpt")


def write_safetensors(path, tensors):
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for key, value in tensors.items():
        end = start + 4 * value.numel()
        header[key], start = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}, end
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.writelines(v.numpy().tobytes() for v in tensors.values())


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
            raw = ae.residual_head(ae.residual(svg.imagenet_normalize(x))[:, 1:])
            self.agree("ae/residual_raw", to_map(raw)[:, :, ::3, ::3])
            latents = ae.encode(x, align="batch")
            self.agree("ae/latent", to_map(latents)[:, ::9, ::3, ::3])
            self.agree("ae/latent_residual", to_map(latents)[:, 384:, ::3, ::3])
            y = ae.decode(latents)
            self.agree("ae/recon", y[:, :, ::15, ::15])
            self.agree("ae/recon_stats", torch.stack([y.mean(), y.std()]))
            self.agree("ae/decode_only",
                       ae.decode(normal(6, 1, 392, 16, 16).flatten(2).transpose(1, 2))[:, :, ::15, ::15])
        with self.assertRaisesRegex(svg.UserError, "no running alignment statistics"):
            ae.encode(x)  # the authors' file has none

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
        latents = ae.encode(torch.zeros(4, 3, 256, 256), align="batch").transpose(1, 2)
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
        y = ae.decode(ae.encode(x, align="batch"))
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

    def test_transformer_loss_and_sampler_agree_with_the_authors(self):
        x, y = normal(21, 2, 256, 392), torch.tensor([3, 5])
        for name in ("dit_tiny", "dit_B"):  # B has the doubled head, of which half counts
            torch.save({"ema": weights(f"svg_{name}")}, "sit.pt")
            model = svg.load_sit("sit.pt")
            self.assertEqual(len(model.final_layer.linear.bias), 392)
            for key in [k for k in GOLDEN if k.startswith(name)]:
                what, *rest = key.split("/")[1].split("_", 3)
                with self.subTest(key), torch.no_grad():
                    if what == "velocity":
                        t = torch.from_numpy(GOLDEN[f"{name}/t_noise_to_data"])
                        v = model(x, t, torch.tensor([7, 1000]))
                        self.agree(key, v[:, ::18, ::7])
                    elif what == "euler":
                        steps, guidance, (shift, mode) = rest[0][5:], rest[1][3:], rest[2][5:].split("_", 1)
                        guidance = 1.0 if guidance == "None" else float(guidance)
                        z = svg.euler_sample(model, x, y, int(steps), guidance, float(shift),
                                             zero_init=mode != "constant")
                        self.agree(key, z[:, ::18, ::7])
                    elif what == "loss":
                        u, noise = torch.tensor([.25, .6]), normal(22, 2, 256, 392)
                        self.agree(key, svg.flow_loss(model, x, y, float(rest[0][5:]), u, noise))

    def test_authors_latent_statistics_are_read(self):
        mean, std = (torch.from_numpy(GOLDEN[f"svg_latent_stats/{k}"]) for k in ("mean", "std"))
        torch.save({"dinov3_sp_mean": mean.view(1, 1, -1), "dinov3_sp_std": std.view(1, 1, -1)}, "authors.pt")
        np.savez("ours.npz", mean=mean, std=std)
        ae = authors_autoencoder()
        for file in ("authors.pt", "ours.npz"):
            ae.set_latent_stats(*svg.load_latent_stats(file))
            self.close(ae.normalize(normal(0, 2, 256, 392) * std + mean), normal(0, 2, 256, 392), 1e-4)


# -- Numbers about pictures --------------------------------------------------------------------------------

def gaussians():
    """The two sets of fid/*, isc/* and prc/*, and the logits."""
    r = np.random.RandomState(41)
    a = r.standard_normal((600, 64)) @ (r.standard_normal((64, 64)) / 8) + .3
    b = r.standard_normal((700, 64)) @ (r.standard_normal((64, 64)) / 8)
    return a, b, r.standard_normal((500, 1008)) * 2


def mean_and_covariance(x):
    return x.mean(0), np.cov(x, rowvar=False)


class Metrics(Case):
    def number(self, command, *more):
        """The numbers of a fid command that must succeed, as --json has them."""
        code, out, err = run(f"fid {command} --json out.json", *more)
        self.assertEqual(code, 0, err)
        return {**json.loads(Path("out.json").read_text()), "out": out, "err": err}

    def test_inception_agrees_with_tensorflow_and_pytorch_fid(self):
        torch.save(weights("fid_inception"), "inception.pth")
        model, seen = fid.load_inception("inception.pth"), {}
        model.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.update(conv=y))
        x = ((image(31, (3, 3, 256, 256)) + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1).contiguous()
        answers = fid.inception_features(model, x)
        self.agree("inception/tf1_resize/pool3", answers["pool3"][:, ::4])
        self.agree("inception/tf1_resize/logits_unbiased", answers["logits_unbiased"][:, ::4])
        self.agree("inception/tf1_resize/logits", answers["logits"][:, ::4])
        self.agree("inception/tf1_resize/softmax_sorted5", answers["logits"].softmax(1).topk(5).values)
        spatial = [[seen["conv"][i, c, y, x] for y, x, c in itertools.product(range(17), range(17), range(7))]
                   for i in range(3)]  # TensorFlow's mixed_6/conv[..., :7], channels last
        self.close(answers["spatial"], torch.tensor(spatial))
        answers = fid.inception_features(model, x, "pytorch-fid")
        self.agree("inception/pytorch_resize/pool3", answers["pool3"][:, ::4])

    def test_frechet_distance_to_six_digits_whatever_the_rank_and_batches(self):
        a, b, _ = gaussians()
        for key, x, y in (("fid/distance", a, b), ("fid/rank_deficient", a[:20], b[:25])):
            stats = *mean_and_covariance(x), *mean_and_covariance(y)
            np.testing.assert_allclose(fid.frechet_distance(*stats), GOLDEN[key], rtol=1e-6)
            self.assertLess(fid.frechet_distance(*stats[:2], *stats[:2]), 1e-6)
        n, mean, scatter = functools.reduce(fid.merge_moments, map(fid.moments, torch.from_numpy(a).split(7)))
        self.close(mean, a.mean(0), 1e-12)
        self.close(scatter / (n - 1), np.cov(a, rowvar=False), 1e-12)

    def test_frechet_distance_of_gaussians_with_a_known_answer(self):
        r = np.random.RandomState(0)
        turn = np.linalg.qr(r.standard_normal((50, 50)))[0]
        one, two, mean = r.uniform(0, 4, 50), r.uniform(0, 4, 50), r.standard_normal(50)
        one[:5] = two[3:9] = 0  # of different rank
        known = (mean ** 2).sum() + ((one ** .5 - two ** .5) ** 2).sum()
        distance = fid.frechet_distance(mean, turn * one @ turn.T, 0 * mean, turn * two @ turn.T)
        self.assertAlmostEqual(distance, known, delta=1e-5 * known)
        self.assertAlmostEqual(fid.frechet_distance(mean, 0 * turn, 0 * mean, turn * two @ turn.T),
                               (mean ** 2).sum() + two.sum(), delta=1e-9)

    def test_bias_of_few_images_is_named(self):
        r, scale = np.random.RandomState(0), np.arange(1, 65) ** -.5
        x, y = (mean_and_covariance(r.standard_normal((n, 64)) * scale) for n in (1000, 600))
        bias = fid.expected_bias(np.diag(scale ** 2), (1000, 600))
        self.assertAlmostEqual(fid.frechet_distance(*x, *y) / bias, 1, delta=0.1)

    def test_inception_score(self):
        _, _, logits = gaussians()
        self.agree("isc/logits_mean_std", fid.inception_score(logits), 1e-6, 1e-6)
        sure = 1000 * np.eye(20)[np.arange(400) % 20]  # 20 classes, each certain and equally frequent
        self.close(fid.inception_score(sure), (20., 0.), 1e-6)

    def test_precision_and_recall(self):
        a, b, _ = (torch.from_numpy(x).float() for x in gaussians())

        def brute(real, fake, k):
            radii = torch.cdist(real, real).sort(1).values[:, k]
            return (torch.cdist(fake, real) <= radii).any(1).float().mean().item()

        # The golden entry's first number counts 63 of 600, so that a is the generated set there.
        self.close(fid.precision_recall(b, a), GOLDEN["prc/k3_real_is_A"].tolist(), 1e-6)
        for k, block in ((3, 4096), (3, 100), (5, 7)):
            with mock.patch("fid.BLOCK", block):
                self.close(fid.precision_recall(a, b, k), (brute(a, b, k), brute(b, a, k)), 1e-6)
        sides = [{"name": "", "features": x, "mu": x.mean(0), "sigma": x.T.cov()} for x in (a, b)]
        numbers, _ = fid.compare(*sides, "FD", torch.device("cpu"))  # of a against the reference b
        self.close((numbers["precision"], numbers["recall"]), (brute(b, a, 3), brute(a, b, 3)), 1e-6)
        self.assertGreater(abs(numbers["precision"] - numbers["recall"]), 0.01)
        self.assertEqual(fid.precision_recall(a, a), (1, 1))
        self.assertEqual(fid.precision_recall(a, a + 100), (0, 0))
        self.close(fid.precision_recall(a, a[:4]), (brute(a, a[:4], 3), brute(a[:4], a, 3)), 1e-6)

    def test_kernel_distance(self):
        a, b, _ = gaussians()
        kernel = {(x, y): [(p @ q / 64 + 1) ** 3 for i, p in enumerate(s) for j, q in enumerate(t)
                           if s is not t or i != j]
                  for (x, s), (y, t) in itertools.product((("a", a[:30]), ("b", b[:40])), repeat=2)}
        brute = np.mean(kernel["a", "a"]) + np.mean(kernel["b", "b"]) - 2 * np.mean(kernel["a", "b"])
        for block in (4096, 7):
            with mock.patch("fid.BLOCK", block):
                self.assertAlmostEqual(fid.kernel_distance(a[:30], b[:40]), brute, places=10)
        x = normal(0, 4000, 8)
        self.assertAlmostEqual(fid.kernel_distance(x[:2000], x[2000:]), 0, delta=0.01)  # unbiased

    def test_psnr_and_ssim(self):
        a = ((image(51, (2, 3, 256, 256)) + 1) / 2 * 255).round()
        b = (a + torch.from_numpy(
            np.round(12 * np.random.RandomState(52).standard_normal(a.shape)))).clip(0, 255)
        a, b = (x.byte().permute(0, 2, 3, 1) for x in (a, b))
        self.agree("psnr/uint8", fid.psnr(a, b), 1e-6, 1e-6)
        self.agree("ssim/gaussian11_sigma1.5_rgbmean", fid.ssim(a, b), 1e-6, 1e-6)
        self.assertEqual((fid.psnr(a, a).tolist(), fid.ssim(a, a).tolist()), ([np.inf] * 2, [1] * 2))
        with self.assertRaisesRegex(svg.UserError, "11x11"):
            fid.ssim(a[:, :10], b[:, :10])

    def test_all_numbers_of_a_folder_in_one_command(self):
        write_pictures("a", 10)
        write_pictures("b", 6, first=50)
        os.makedirs("w")
        torch.save(weights("fid_inception"), f"w/{fid.INCEPTION}")
        found = self.number("a --ref b --weights w --workers 0 --save-stats a.npz")
        self.assertRegex(found["out"], r"FID \d.*sFID \d.*IS \d.*precision.*recall.*KID.*10 "
                                       rf"images of a against 6 images of b, adm protocol, {fid.INCEPTION}")
        self.assertRegex(found["err"], "biased upward, here by about")
        self.assertEqual((found["num"], found["reference_num"], found["not_measured"]), (10, 6, {}))
        with np.load("a.npz") as f:  # what pytorch-fid and ADM's evaluator read
            self.assertEqual([f[k].shape for k in ("mu", "sigma", "mu_s", "sigma_s")],
                             [(2048,), (2048, 2048), (2023,), (2023, 2023)])
            np.savez("foreign.npz", mu=f["mu"], sigma=f["sigma"])
        model = fid.load_inception(f"w/{fid.INCEPTION}")
        for protocol, numbers in (("adm", found), ("pytorch-fid", self.number(
                "a --ref b --weights w --workers 0 --protocol pytorch-fid"))):
            with torch.no_grad():
                a, b = (fid.inception_features(model, torch.from_numpy(pictures(x)), protocol) for x in "ab")
            moments = [f(x["pool3"].double().numpy()) for x in (a, b) for f in (
                lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False))]
            self.assertAlmostEqual(numbers["FID"] / fid.frechet_distance(*moments), 1, places=4)
            self.assertAlmostEqual(numbers["IS"], fid.inception_score(a["logits_unbiased"])[0], places=4)
        again = self.number("b --ref a.npz --weights w --batch 5")
        for key in ("FID", "sFID"):
            self.assertAlmostEqual(again[key] / found[key], 1, places=5)
        self.assertIn("no images in a.npz", again["not_measured"]["precision, recall, KID"])
        self.assertIn("no mu_s in foreign.npz", self.number("a.npz --ref foreign.npz")["out"])
        self.assertLess(self.number("a.npz --ref foreign.npz")["FID"], 1e-6)
        self.assertIn("does not name its protocol", self.number("a --ref foreign.npz --weights w")["err"])
        self.refused("fid b --ref a.npz --weights w --protocol pytorch-fid", "a.npz", "adm protocol")

    def test_numbers_do_not_depend_on_batches_workers_processes_or_the_kind_of_file(self):
        write_pictures("a/x", 30)
        write_pictures("a/y", 11, first=30)
        write_pictures("b", 30, first=50)
        whole = self.number("a --ref b --demo --workers 0")
        self.assertGreater(whole["FD-demo-encoder"], 1e-3)
        np.savez("a.npz", arr_0=np.concatenate([pictures("a/x"), pictures("a/y")]))
        np.savez_compressed("small.npz", arr_0=svg.load_npz("a.npz")["arr_0"])
        self.assertIsInstance(fid.open_source("a.npz")["images"].source, np.memmap)
        others = [self.number(f"{command} --ref b --demo") for command in (
            "a --batch 1 --workers 0", "a --batch 7 --workers 2", "a.npz --batch 30", "small.npz")]
        shell("fid a --ref b --demo --batch 6 --workers 0 --json out.json", processes=2)
        others.append(json.loads(Path("out.json").read_text()))
        ok("svg pack a packed --size 32 --workers 0")
        others.append(self.number("packed --ref b --demo"))
        for other in others:
            for key in ("FD-demo-encoder", "precision", "recall", "KID"):
                self.assertAlmostEqual(whole[key], other[key], delta=1e-5 * abs(whole[key]) + 1e-9)
            self.assertEqual((other["num"], other["reference_num"]), (41, 30))

    def test_reference_with_statistics_and_images_uses_each_for_what_it_is_for(self):
        write_pictures("a", 12)
        write_pictures("b", 14, first=50)
        found = self.number("b --ref a --demo --save-stats b.npz")
        np.savez("both.npz", **svg.load_npz("b.npz"), arr_0=pictures("b")[:6])
        self.assertIn("14 images of b.npz", self.number("a --ref b.npz --demo")["out"])
        both = self.number("a --ref both.npz --demo")
        self.assertAlmostEqual(both["FD-demo-encoder"] / found["FD-demo-encoder"], 1, places=5)
        np.savez("six.npz", arr_0=pictures("b")[:6])
        six = self.number("a --ref six.npz --demo")
        self.assertEqual([both[k] for k in ("precision", "recall", "KID")],
                         [six[k] for k in ("precision", "recall", "KID")])
        named = self.number(f"a --ref b --features {demo.ENCODER}")
        self.assertRegex(named["out"], r"FD-demo \d.*CLS token of demo.pt")

    def test_inception_score_takes_class_folders_in_turn(self):
        write_pictures("a/x", 10)
        write_pictures("a/y", 10, first=20)
        source = {**fid.open_source("a"), "num": 20, "mu": np.zeros(3), "sigma": np.eye(3)}
        sure = torch.from_numpy(1000 * np.eye(2)[np.arange(20) // 10])  # x is one class, y the other
        numbers, missing = fid.compare({**source, "logits": sure}, source, "FID", torch.device("cpu"))
        self.assertAlmostEqual(numbers["IS"], 2, places=6)
        self.assertEqual(set(missing), {"sFID", "precision, recall, KID"})

    def test_pairs_are_found_by_path_without_suffix(self):
        write_pictures("val/a", 5)
        write_pictures("val/b", 3, first=5)
        rng = np.random.default_rng(0)
        for file in svg.list_images("val"):
            array = np.asarray(Image.open(file)).astype(int)
            target = Path(file.replace("val", "recon", 1)).with_suffix(".bmp")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                (array + rng.integers(-9, 10, array.shape)).clip(0, 255).astype(np.uint8)).save(target)
            Image.open(file).resize((64, 64), Image.Resampling.BOX).save(file)  # cropped to the samples' size
        found = self.number("recon --ref val --paired --demo --batch 3 --workers 0")
        self.assertEqual(found["not_measured"], {"LPIPS": "--demo downloads nothing"})
        sides = [torch.from_numpy(np.stack([svg.crop(svg.open_rgb(f), 32) for f in svg.list_images(folder)]))
                 for folder in ("recon", "val")]
        for key, values in (("PSNR", fid.psnr(*sides)), ("SSIM", fid.ssim(*sides))):
            self.close((found[key], found[key + "_std"]),
                       (values.mean().item(), values.std(correction=0).item()))
        plain = self.number("recon --ref val --size 32 --demo")
        self.assertAlmostEqual(found["rFD-demo-encoder"], plain["FD-demo-encoder"], places=6)
        shell("fid recon --ref val --paired --demo --batch 3 --workers 0 --json out.json", processes=2)
        two = json.loads(Path("out.json").read_text())
        for key in ("rFD-demo-encoder", "PSNR", "PSNR_std", "SSIM"):
            self.assertAlmostEqual(found[key], two[key], places=6)
        self.assertIsNone(self.number("val --ref val --paired --demo")["PSNR"])  # infinite
        os.rename("recon/a/0.bmp", "recon/a/zero.bmp")
        self.refused("fid recon --ref val --paired --demo", "recon/a/zero.bmp", "counterpart")
        os.remove("recon/a/zero.bmp")
        self.refused("fid recon --ref val --paired --demo", "val/a/0.png", "counterpart")
        self.assertEqual(self.number("recon --ref val --paired --demo --num 4")["num"], 4)
        shutil.copy("recon/a/1.bmp", "recon/a/1.png")
        self.refused("fid recon --ref val --paired --demo", "recon/a/1.bmp", "recon/a/1.png", "rename")

    def test_bad_input_is_refused_in_one_line(self):
        write_pictures("good", 4)
        write_pictures("one", 1)
        write_pictures("mixed", 3)
        Image.open("mixed/1.png").resize((40, 36)).save("mixed/1.png")
        mean, covariance = np.zeros(8), np.eye(8)
        np.savez("half.npz", mu=mean)
        np.savez("nan.npz", mu=mean * np.nan, sigma=covariance)
        np.savez("eight.npz", mu=mean, sigma=covariance)
        np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 3)))
        Path("cut.npz").write_bytes(Path("eight.npz").read_bytes()[:300])
        Path("text.npz").write_text("not an archive")
        for command, words in (
                ("one", ["one", "at least 2"]), ("good --num 5", ["good", "--num 5"]),
                ("nowhere", ["nowhere"]), ("mixed --workers 0", ["mixed/1.png", "40x36", "--size"]),
                ("half.npz", ["half.npz", "neither"]), ("nan.npz", ["nan.npz", "not finite"]),
                ("float.npz", ["float.npz", "uint8"]), ("cut.npz", ["cut.npz"]), ("text.npz", ["text.npz"]),
                ("eight.npz --num 3", ["eight.npz", "--num 3"]), ("good --ref nowhere.npz", ["nowhere.npz"]),
                ("good --json no/x.json", ["--json no/x.json"]),
                ("good --save-stats no/x.npz", ["--save-stats no/x.npz"]),
                ("good --protocol tf", ["--protocol"]),
                ("eight.npz --ref good --paired", ["--paired", "statistics"])):
            self.refused(f"fid {command} --demo" + " --ref good" * ("--ref" not in command), *words)
        code, _, err = run("fid good --ref eight.npz --demo --workers 0")
        self.assertEqual(code, 2)
        self.assertRegex(err, r"\nerror: good against eight.npz: .*\(8,\)")
        self.refused(f"fid good --ref eight.npz --features {demo.ENCODER}", "eight.npz", "--features")
        self.refused("fid good --paired", "--paired", "--ref")
        self.refused("fid good --features x.pth", "--features", "--ref")
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            self.refused("fid good --weights .", fid.ADM_REFERENCE, "https://openaipublic", "no network")
        with mock.patch("svg.Encoder.forward", lambda *_, **__: torch.full((4, 1, 8), torch.nan)):
            code, _, err = run("fid good --demo --workers 0")
        self.assertEqual(code, 2)
        self.assertRegex(err, r"\nerror: good: features are not finite")


class OtherEncoders(Case):
    """MAE and SigLIP2 from files of their published layouts, and the ablations of table 4."""

    def train(self, file, *flags):
        ok(f"train_ae --demo --image-size 32 --grid 2 --decoder-mult 1,1,1,1,1 --batch 2 --stats-images 4 "
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
        raw = ae.residual_head(ae.residual(svg.imagenet_normalize(x))[:, 1:])
        self.assertTrue(torch.equal(ae.encode(x)[..., 768:], raw))
        self.assertFalse(torch.allclose(ae.encode(x, "batch")[..., 768:], raw))
        self.assertEqual(ae.alignment_batches, 0)

    def test_a_tower_that_is_none_of_ours_is_refused(self):
        tower = weights("siglip2_vitb16_256")
        key = "embeddings.position_embedding.weight"
        for change, words in (
                ({key: tower[key][:196]}, r"pos_embed \[1, 196, 768\] instead of \[1, 256, 768\]"),
                ({"extra": torch.zeros(1)}, "unexpected extra"),
                ({"embeddings.patch_embedding.weight": torch.zeros(768, 3, 8, 8)},
                 "patch 8, 0 registers, depth 12, no CLS token is none of .*siglip2_vitb16_256")):
            with self.assertRaisesRegex(svg.UserError, f"tower.safetensors: .*{words}"):
                svg.encoder_from_weights({**tower, **change}, "tower.safetensors")


# -- Properties of the method ------------------------------------------------------------------------------

class Latents(Case):
    def test_latent_does_not_depend_on_batch_mates(self):
        ae, x = svg.load_autoencoder(trained() / "runs/demo-ae/last.pt"), demo_images(6)
        for align in (None, "running"):
            self.close(ae.encode(x, align)[2:3], ae.encode(x[2:3], align))
        self.assertGreater((ae.encode(x, "batch")[2:3] - ae.encode(x[2:3], "batch")).abs().max(), 1e-3)

    def test_frozen_encoder_stays_frozen_and_out_of_checkpoints(self):
        ae, x = tiny_autoencoder(), demo_images(2)
        before = ae.encoder(x)
        ae.train().requires_grad_(True)
        self.assertTrue(ae.residual.training)
        self.assertFalse(any(m.training for m in ae.encoder.modules()))
        self.assertEqual(list(ae.encoder.parameters()), [])
        self.assertFalse(any("encoder" in k for k in ae.state_dict()))
        self.assertNotIn("encoder.", str(list(ae.checkpoint()["model"])))
        torch.optim.SGD(ae.parameters(), 1.0).zero_grad()
        ae(x).sum().backward()
        with torch.no_grad():
            for p in ae.parameters():
                p -= p.grad
        self.assertFalse(ae.encoder(x).requires_grad)
        self.assertTrue(torch.equal(ae.encoder(x), before))
        self.assertEqual(ae.checkpoint()["encoder_file"]["fingerprint"], ae.encoder.fingerprint)

    def test_images_of_any_size_on_the_grid(self):
        ae = tiny_autoencoder().train()
        x = torch.rand(2, 3, 48, 32) * 2 - 1
        self.assertEqual((ae.encode(x).shape, ae(x).shape), ((2, 24, 72), x.shape))
        for size, grid in ((256, 16), (64, 8)):
            model = svg.Autoencoder(None, feature_channels=8, image_size=size, grid=grid, decoder={"ch": 32})
            self.assertEqual(model.decode(torch.zeros(1, grid * grid, 16)).shape, (1, 3, size, size))
        with self.assertRaisesRegex(svg.UserError, "power of two"):
            svg.Autoencoder(None, feature_channels=8, image_size=96, grid=8)

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
            running, batch = ae.eval().encode(x), ae.encode(x, "batch")
        self.assertLess((running - batch).abs().mean(), 0.02 * batch[..., ae.encoder.dim:].std())

    def test_alignment_statistics_of_two_ranks_are_those_of_the_whole_batch(self):
        x = torch.randn(6, 5, 3) * 4 + 2

        def add_the_other_rank(moments):
            other = x[3:].flatten(0, 1)
            moments += torch.stack([other.mean(0), other.square().mean(0)]).double() / 2

        with mock.patch("svg.world_size", lambda: 2), \
                mock.patch("torch.distributed.all_reduce", add_the_other_rank):
            shared = svg.channel_statistics(x[:3], synchronise=True)
        self.close(torch.stack(shared), torch.stack(svg.channel_statistics(x)))

    def test_measured_statistics_make_latents_mean_0_std_1(self):
        ae, data = tiny_autoencoder(), demo.dataset("val", 300)
        self.assertFalse(ae.measured)
        ae.measure(data, 300, 32)
        with torch.no_grad():
            latents = ae.eval().normalize(ae.encode(demo_images(300))).flatten(0, 1)
        self.close(latents.mean(0), torch.zeros(72), 1e-3)
        self.close(latents.std(0), torch.ones(72), 1e-3)
        self.close(ae.denormalize(ae.normalize(latents)), latents, 1e-4)


class Field:
    """A velocity field for the sampler: f(x, t, 1 where conditional else 0)."""
    num_classes = 10

    def __init__(self, f):
        self.f = f

    def __call__(self, x, t, y):
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

    def test_after_sees_the_state_at_every_time(self):
        field, x, y = Field(lambda x, t, c: 0 * x + 1), torch.randn(1, 3, 4), torch.tensor([0])
        for guidance in (1.0, 2.0):  # guided: the first step stays where it is
            seen = {}
            svg.euler_sample(field, x, y, 4, guidance, shift=1.0, after=seen.setdefault)
            self.assertEqual(list(seen), [0.25, 0.5, 0.75, 1])
            self.close(seen[0.25], x + 0.25 * (guidance == 1))
            self.close(seen[1], x + 1 - 0.25 * (guidance != 1))

    def test_time_shift_keeps_the_ends_and_inverts(self):
        u = torch.linspace(0, 1, 11, dtype=torch.float64)
        for shift in (0.15, 0.4, 1.0, 3.0):
            t = svg.shift_time(u, shift)
            self.close(t[[0, -1]], u[[0, -1]], 1e-12)
            self.close(svg.shift_time(t, 1 / shift), u, 1e-12)
        self.close(svg.shift_time(torch.tensor(0.5), 0.4), 0.2 / 0.7)

    def test_label_dropout_rate(self):
        y = torch.arange(20000) % 10
        dropped = svg.drop_labels(y, 10, 0.1, torch.rand(20000))
        self.assertAlmostEqual((dropped == 10).float().mean().item(), 0.1, delta=0.01)
        self.assertTrue(torch.equal(dropped[dropped != 10], y[dropped != 10]))
        self.assertTrue(torch.equal(svg.drop_labels(y, 10, 0.0, torch.rand(20000)), y))

    def test_ema_formula(self):
        ema, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        expected = 0.9 * ema.weight + 0.1 * model.weight
        train_dit.update_ema(ema, model, 0.9)
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


class Editing(Case):
    """Editing and interpolation (paper, appendices C and D), with the shipped model."""

    def setUp(self):
        super().setUp()
        self.model, self.ae = svg.load_sit(sample.DEMO_PT), svg.load_autoencoder(sample.DEMO_PT)
        self.latents = self.ae.normalize(self.ae.encode(demo_images(8)))

    def test_inverting_and_sampling_back_returns_the_latent(self):
        null, errors = torch.full((8,), 10), []
        for steps in (25, 100, 400):
            times = [t for t in svg.euler_times(steps, 0.4) if t >= 0.2]
            start = sample.invert(self.model, self.latents, times)[times[0]]
            self.assertGreater((start - self.latents).std(), 0.3)
            back = svg.euler_sample(self.model, start, null, times)
            errors.append((back - self.latents).square().mean().sqrt().item())
        self.assertLess(errors[2], 0.05)
        for coarse, fine in itertools.pairwise(errors):
            self.assertGreater(coarse / fine, 2.5)

    def test_edit_keeps_what_is_outside_the_mask_and_redraws_inside(self):
        z, times, y = self.latents[:1], [0.1, *svg.euler_times(25, 0.4)[6:]], torch.tensor([3])
        nothing = sample.edit_latents(self.model, z, y, torch.zeros(16, 1), times)
        self.assertTrue(torch.equal(nothing, z))  # and so the pictures
        for outside in (False, True):
            weights = sample.edit_mask((32, 32), (0, 0, 16, 16), 32, 4, outside)
            edited = sample.edit_latents(self.model, z, y, weights, times)
            kept = weights[:, 0] == 0
            self.assertEqual(kept.sum(), 4 if outside else 12)
            self.assertTrue(torch.equal(edited[:, kept], z[:, kept]))
            self.assertGreater((edited - z)[:, ~kept].square().mean().sqrt(), 0.3)
            if not outside:
                with torch.no_grad():
                    a, b = (self.ae.decode(self.ae.denormalize(x))[0] for x in (z, edited))
                change = (a - b).abs().mean(0)
                self.assertGreater(change[:16, :16].mean(), 0.1)
                self.assertLess(change[20:, 20:].mean(), 0.03)  # not 0: the decoder looks beyond the mask

    def test_mask_follows_the_box_through_the_crop(self):
        weights = sample.edit_mask((600, 400), (100, 0, 300, 200), 256, 16).view(16, 16)  # square's top left
        self.assertTrue(torch.equal(weights > 0, torch.nn.functional.pad(torch.ones(8, 8), (0, 8, 0, 8)) > 0))
        self.assertGreater(weights.max(), 0.98)  # in the middle
        self.assertTrue(torch.equal(weights[:8, :8], weights[:8, :8].flip(0, 1)))
        rest = sample.edit_mask((600, 400), (100, 0, 300, 200), 256, 16, outside=True).view(16, 16)
        self.assertTrue(torch.equal(rest > 0, weights == 0))
        self.assertGreater(rest[15, 15], rest[8, 8])

    def test_ends_of_an_interpolation_are_the_samples_of_its_seeds(self):
        ok("sample --interpolate slerp lerp --class 8 --seeds 5 6 --frames 3 --steps 4")
        for end, seed in ((0, 5), (2, 6)):
            ok(f"sample --num 1 --class 8 --seed {seed} --steps 4 --out plain{seed}")
            for kind in ("slerp", "lerp"):
                frame = np.asarray(Image.open(f"interpolation/{kind}-{end:06d}.png")).astype(int)
                self.assertLessEqual(np.abs(frame - pictures(f"plain{seed}")[0]).max(), 1)
        self.assertEqual(len(os.listdir("interpolation")), 6)
        for kind in ("slerp", "lerp"):
            self.assertTrue(os.path.exists(f"interpolation-{kind}.png"))
        a, b = svg.sample_noise(0, range(2), (16, 72))
        slerp, lerp = (sample.interpolate_noise(a, b, torch.tensor([0.5]), kind)
                       for kind in ("slerp", "lerp"))
        self.assertAlmostEqual((slerp.norm() / a.norm()).item(), 1, delta=0.05)
        self.assertAlmostEqual((lerp.norm() / a.norm()).item(), 0.5 ** 0.5, delta=0.05)

    def test_new_noise_of_an_edit_fades_as_the_noise_does(self):
        class Still:  # a flow that stands still, so that what changes is what was renewed
            num_classes = 10

            def __call__(self, x, t, y):
                return torch.zeros_like(x)

        renewed, times, weights = [], svg.euler_times(50, 0.4)[10:], torch.ones(2000, 1)
        real = svg.euler_sample

        def euler_sample(model, x, y, times, *more, after, **settings):
            def record(t, x):
                renewed.append(after(t, x))
                return renewed[-1]

            renewed[:] = [x]  # inverts first, then samples
            return real(model, x, y, times, *more, **settings, after=record)

        with mock.patch("svg.euler_sample", euler_sample):
            sample.edit_latents(Still(), torch.zeros(1, 2000, 8), torch.tensor([3]), weights, times)
        self.assertAlmostEqual(renewed[0].std().item(), 1 - times[0], delta=0.02)  # at first all the noise
        for (t, u), (a, b) in zip(itertools.pairwise(times), itertools.pairwise(renewed), strict=True):
            share = (u - t) / (1 - t)  # of noise that a step of the exact flow takes away
            new = (b - (a + (1 - u) * ((1 - share) ** 0.5 - 1) * a)) if u < 1 else b - a
            self.assertAlmostEqual(new.std().item(), (1 - u) * share ** 0.5, delta=0.02)

    def test_edit_writes_the_result_and_a_labelled_overview(self):
        write_pictures("in", 1)
        with mock.patch("sys.argv", ["sample.py", "--edit", "x", "--box", "0,0,1,1", "--class", "0"]):
            args = sample.parse_args()
        self.assertEqual((args.steps, args.shift, args.guidance), (100, 0.4, 4.0))  # appendix C
        ok("sample --edit in/0.png --box 8,8,28,28 --class star --steps 5 --outside --out outside")
        ok("sample --edit in/0.png --box 8,8,28,28 --class star --steps 5")
        differ = pictures("edit").astype(int) - pictures("outside")
        self.assertGreater(np.abs(differ).mean(), 5)
        self.assertEqual(os.listdir("edit"), ["0.png"])
        self.assertEqual(svg.open_rgb("edit/0.png").size, (32, 32))
        self.assertEqual(set(os.listdir()), {"in", *(f"{name}{suffix}" for name in ("edit", "outside")
                                                     for suffix in ("", ".json", ".png"))})


# -- Files and data ----------------------------------------------------------------------------------------

class Files(Case):
    def test_failed_write_leaves_the_old_checkpoint_and_nothing_else(self):
        svg.save_checkpoint("last.pt", {"step": 1})

        def full_disk(checkpoint, f):
            f.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")

        with mock.patch("torch.save", full_disk), self.assertRaisesRegex(svg.UserError, "last.pt.*No space"):
            svg.save_checkpoint("last.pt", {"step": 2})
        self.assertEqual((svg.load_checkpoint("last.pt"), os.listdir()), ({"step": 1}, ["last.pt"]))

    def test_fingerprint_changes_with_one_weight_and_not_with_the_file(self):
        a = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)}
        self.assertEqual(svg.fingerprint(a), svg.fingerprint({k: v.half() for k, v in reversed(a.items())}))
        b = copy.deepcopy(a)
        b["w"][1, 2] += 1e-5
        self.assertEqual(len({svg.fingerprint(x) for x in (a, b, {"w": a["w"].T, "b": a["b"]})}), 3)

    def test_autoencoder_checkpoint_round_trip_with_and_without_its_encoder(self):
        path = trained() / "runs/demo-ae/last.pt"
        whole, decoder = svg.load_autoencoder(path), svg.load_autoencoder(path, encoder=False)
        x = demo_images(2)
        latents = whole.encode(x)
        self.assertTrue(torch.equal(whole(x), decoder.decode(latents)))
        self.assertTrue(torch.equal(whole.normalize(latents), decoder.normalize(latents)))
        self.assertIsNone(decoder.encoder)
        with self.assertRaisesRegex(svg.UserError, "other encoder weights"):
            svg.load_autoencoder(path, svg.Encoder(svg.ViT(**demo.VIT), "demo", "other.pt"))

    def test_transformer_checkpoint_round_trip_gives_the_ema(self):
        path = trained() / "runs/demo-dit/last.pt"
        checkpoint, model = svg.load_checkpoint(path), svg.load_sit(path)
        ema, last = svg.fingerprint(checkpoint["ema"]), svg.fingerprint(checkpoint["model"])
        self.assertEqual(svg.fingerprint(model.state_dict()), ema)
        self.assertEqual(svg.fingerprint(svg.load_sit(path, ema=False).state_dict()), last)
        self.assertNotEqual(ema, last)
        self.assertEqual((model.meta["classes"], model.meta["step"]), (demo.CLASSES, 6))


class Data(Case):
    def test_images_of_every_mode_decode_to_upright_rgb(self):
        y, x = np.mgrid[:40, :60].astype(np.float32)
        rgb = Image.fromarray(np.stack([x / 59 * 255, y / 39 * 255, 0 * x + 90], -1).astype(np.uint8))
        grey = np.asarray(rgb.convert("L"))
        half = np.full((40, 60), 130, np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        for name, stored, colour, settings in (
                ("L.png", rgb.convert("L"), False, {}), ("P.png", rgb.quantize(256), True, {}),
                ("CMYK.tif", rgb.convert("CMYK"), True, {}),
                ("CMYK.jpg", rgb.convert("CMYK"), True, {"quality": 98}),
                ("RGBA.png", Image.merge("RGBA", [*rgb.split(), Image.fromarray(half)]), True, {}),
                ("LA.png", Image.merge("LA", [rgb.convert("L"), Image.fromarray(half)]), False, {}),
                ("I16.png", Image.fromarray(grey.astype(np.uint16) * 257), False, {}),
                ("turned.jpg", rgb.rotate(90, expand=True), True, {"exif": exif, "quality": 98})):
            with self.subTest(name):
                stored.save(name, **settings)
                image = svg.open_rgb(name)
                expected = np.asarray(rgb) if colour else np.repeat(grey[..., None], 3, 2)
                self.assertEqual((image.mode, image.size), ("RGB", (60, 40)))
                self.assertLess(np.abs(np.asarray(image) - expected.astype(int)).mean(), 4)

    def test_adm_crop_is_a_box_average_and_central(self):
        rng = np.random.default_rng(0)
        big = rng.integers(0, 256, (128, 192, 3), np.uint8)  # halved twice to 32 x 48
        small = big.astype(int)
        for _ in range(2):  # Pillow rounds after each axis
            small = (small[:, ::2] + small[:, 1::2] + 1) // 2
            small = (small[::2] + small[1::2] + 1) // 2
        np.testing.assert_array_equal(svg.crop(Image.fromarray(big), 32), small[:, 8:40])
        tall = rng.integers(0, 256, (45, 32, 3), np.uint8)  # fits as it is: the centre, rounded down
        np.testing.assert_array_equal(svg.crop(Image.fromarray(tall), 32), tall[6:38])
        for size in ((33, 47), (640, 70), (20, 20), (63, 64)):
            self.assertEqual(svg.crop(Image.new("RGB", size), 32).shape, (32, 32, 3))
        crops = [svg.crop(Image.fromarray(tall), 32, np.random.default_rng(i)).tobytes() for i in range(200)]
        self.assertEqual(set(crops), {tall[i:i + 32].tobytes() for i in range(14)})

    def test_stream_visits_each_image_once_per_epoch_in_new_order(self):
        flat = [item for batch, _ in zip(svg.Stream(10, 4, 0, 0), range(10)) for item in batch]
        self.assertEqual([p for _, p in flat], list(range(40)))
        epochs = [[i for i, _ in flat[n:n + 10]] for n in range(0, 40, 10)]
        self.assertTrue(all(sorted(e) == list(range(10)) for e in epochs))
        self.assertEqual(len(set(map(tuple, epochs))), 4)
        self.assertNotEqual(flat[:10], next(iter(svg.Stream(10, 10, 1, 0))))
        self.assertEqual(next(iter(svg.Stream(10, 4, 0, 7))), flat[28:32])  # a restart

    def test_ranks_share_the_batch_of_one_process(self):
        whole = next(iter(svg.Stream(100, 8, 0, 13)))
        shares = []
        for rank in range(2):
            with mock.patch("svg.rank", lambda rank=rank: rank), mock.patch("svg.world_size", lambda: 2):
                shares += next(iter(svg.Stream(100, 8, 0, 13)))
        self.assertEqual(shares, whole)


# -- The commands ------------------------------------------------------------------------------------------

REAL_DATA = (f"--encoder {demo.ENCODER} --image-size 32 --grid 4 --lpips 0 --gan 0 --decoder-channels 32 "
             "--residual-dim 32 --residual-depth 1 --batch 4 --workers 0 --stats-images 4")
DIT_DATA = "train_dit --batch 4 --ae runs/demo-ae/last.pt"


def write_pictures(folder, count, first=0):
    Path(folder).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(
            demo.draw((first + i) % 10, np.random.default_rng(first + i))[0]).save(f"{folder}/{i}.png")


class Commands(Case):
    def test_resumed_training_equals_uninterrupted_training(self):
        ae = f" --ae {trained()}/runs/demo-ae/last.pt"
        for command in (MINI_AE + " --gan 0.5 --disc-start 2", MINI_DIT + ae):
            with self.subTest(command):
                shutil.rmtree("runs", ignore_errors=True)
                ok(command + " --name whole --steps 4")
                ok(command + " --name halves --steps 2")
                self.assertIn("going on with runs/halves at step 2", ok(command + " --name halves --steps 4"))
                whole, halves = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("whole", "halves"))
                self.assert_same(whole, halves)
                self.assertEqual([entry["step"] for entry in read_log("halves")], [1, 2, 3, 4])
                os.remove("runs/halves/last.pt")  # as if stopped before the first checkpoint
                ok(command + " --name halves --steps 1")
                self.assertEqual([entry["step"] for entry in read_log("halves")], [1])

    def test_two_processes_train_the_same_transformer(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --steps 3 --name"
        ok(command, "one")
        shell(command, "two", "--accumulate", 2, processes=2)
        one, two = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("one", "two"))
        for key in one["ema"]:
            self.close(one["ema"][key], two["ema"][key])

    def test_samples_do_not_depend_on_batch_size_or_processes(self):
        os.chdir(trained())
        command = "sample --steps 3 --num 9 --out"
        shown = ok(command, self.folder / "whole")
        self.assertIn("runs/demo-dit/last.pt", shown)
        ok(command, self.folder / "single", "--batch-size", 1)
        ok(command, self.folder / "seven", "--batch-size", 7)
        shell(command, self.folder / "two", processes=2)
        whole = pictures(self.folder / "whole").astype(int)
        self.assertGreater(len(np.unique(whole[:, 0, 0])), 3)
        for other in ("single", "seven", "two"):
            self.assertLessEqual(np.abs(pictures(self.folder / other) - whole).max(), 1, other)

    def test_whole_demo_writes_what_is_documented(self):
        shutil.copytree(trained() / "runs", "runs")
        for name, also in (("demo-ae", {"0000002.pt", "0000004.pt", "preview-0000004.png"}),
                           ("demo-dit", {"0000006.pt", "preview-0000006.png"})):
            documented = {"config.json", "log.jsonl", "loss.png", "last.pt"}
            self.assertEqual(set(os.listdir(f"runs/{name}")), documented | also)
        shell("sample --demo --steps 2 --num 12 --classes star 0 --npz images.npz")
        self.assertEqual(set(os.listdir()), {"images.npz", "runs", "samples", "samples.json", "samples.png"})
        self.assertEqual(sorted(os.listdir("samples")), [f"{i:06d}.png" for i in range(12)])
        np.testing.assert_array_equal(svg.load_npz("images.npz")["arr_0"], pictures("samples"))
        self.assertEqual(pictures("samples").shape, (12, 32, 32, 3))
        ok("sample --demo --steps 2 --num 12 --classes star 0")  # the same command again is the same run
        code, out, _ = run("fid samples --demo --num 10")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\d.*not Inception FID")
        write_pictures("real/a", 3)
        ok("sample --reconstruct real")
        self.assertEqual(sorted(os.listdir("reconstructions/a")), ["0.png", "1.png", "2.png"])
        self.assertTrue(os.path.exists("reconstructions.png"))

    def test_training_skips_a_corrupt_image_with_one_warning(self):
        write_pictures("data/a", 3)
        write_pictures("data/b", 3)
        Path("data/a/1.png").write_bytes(Path("data/a/0.png").read_bytes()[:100])
        code, _, err = run(f"train_ae {REAL_DATA} --data data --steps 5 --log-every 1")
        self.assertEqual((code, err.count("\n")), (0, 1), err)
        self.assertRegex(err, r"warning: data/a/1\.png.*skipped \(1 so far\)")
        self.assertEqual(read_log("ae")[-1]["corrupt"], 1)


class Training(Case):
    """What a run of a week leans on: equal numbers however it is cut up; no fault costs more than a save."""

    def train(self, name, *flags, steps=4, ae=False):
        """A short run of a stage; its last checkpoint."""
        command = MINI_AE if ae else MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001"
        ok(f"{command} --name {name} --steps {steps}", *flags)
        return svg.load_checkpoint(f"runs/{name}/last.pt")

    def assert_same_weights(self, a, b, key="model", tolerance=0.0):
        for k in a[key]:
            torch.testing.assert_close(a[key][k], b[key][k], rtol=tolerance, atol=tolerance, msg=k)

    def test_accumulation_and_recomputation_change_nothing(self):
        whole = self.train("whole")
        self.assert_same_weights(whole, self.train("recomputed", "--recompute"))
        self.assert_same_weights(whole, self.train("parts", "--accumulate", 4), tolerance=1e-5)
        for a, b in zip(read_log("whole"), read_log("parts"), strict=True):
            self.assertAlmostEqual(a["loss"], b["loss"], delta=1e-5)
            self.assertAlmostEqual(a["grad_norm"], b["grad_norm"], delta=1e-4)
        self.assert_same_weights(self.train("ae", ae=True),
                                 self.train("ae-recomputed", "--recompute", ae=True))

    def test_two_processes_train_the_same_autoencoder(self):
        command = MINI_AE + " --gan 0.5 --disc-start 1 --residual-dropout 0 --lr 0.000001 --steps 4 --name"
        ok(command, "one")
        shell(command, "two", processes=2)
        ok(command, "parts", "--accumulate", 2)  # where statistics are those of half a batch
        one, two, parts = ([entry["l1_loss"] + entry["disc_loss"] for entry in read_log(name)]
                           for name in ("one", "two", "parts"))
        np.testing.assert_allclose(two, one, rtol=1e-5)
        self.assertGreater(np.abs(np.array(parts) - one).max(), 1e-3)
        one, two = (svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("one", "two"))
        # As vectors: Adam steps by rounding noise where a gradient is 0, as of a key's bias; with the noise
        # a pixel's |x - y| changes sign. Adam's first moments are the gradients: unsynced they differ by 1.
        for key, tolerance in (("model", 1e-5), ("disc", 1e-5), ("opt", 0.02), ("opt_disc", 0.02)):
            parts = zip(*([v["exp_avg"] if "opt" in key else v for v in c[key].get("state", c[key]).values()]
                          for c in (one, two)), strict=True)
            a, b = (torch.cat([t.double().flatten() for t in side]) for side in zip(*parts, strict=True))
            self.assertLess((a - b).norm() / a.norm(), tolerance, key)

    def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(self):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([p], 0.1, fused=True)
        p.grad = torch.tensor([3.0, 0.0, 4.0])
        norm, skipped = svg.optimizer_step(optimizer, clip=1.0)
        self.close((norm.item(), float(skipped), p.grad.norm().item()), (5.0, 0.0, 1.0))
        before = copy.deepcopy((p.data, optimizer.state_dict()["state"]))
        q = torch.nn.Parameter(torch.ones(3))
        p.grad, q.grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
        self.assertTrue(svg.optimizer_step(optimizer, torch.optim.AdamW([q], fused=True), clip=1.0)[1])
        self.assertEqual(q.tolist(), [1, 1, 1])  # and the optimiser beside it stays too
        after = (p.data, optimizer.state_dict()["state"])
        self.assertTrue(torch.equal(before[0], after[0]))
        for k, v in before[1][0].items():
            self.assertTrue(torch.equal(v, after[1][0][k]), k)

        trained()
        real, calls = svg.flow_loss, itertools.count()
        bad = {1, 2, *range(4, 4 + svg.STREAK)}

        def sometimes(*inputs):
            return real(*inputs) * (math.nan if next(calls) in bad else 1)

        with mock.patch("svg.flow_loss", sometimes):
            self.train("bad", "--log-every", 2)
            self.assertEqual([(e["step"], e["skipped"]) for e in read_log("bad")], [(2, 1), (4, 1)])
            self.assertTrue(all(math.isfinite(e["loss"]) for e in read_log("bad")))
            code, _, err = run(f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --name bad "
                               "--steps 99 --log-every 2")
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertRegex(err, rf"no finite gradient for {svg.STREAK} steps.*runs/bad/last\.pt")
        self.assertEqual(svg.load_checkpoint("runs/bad/last.pt")["step"], 4)
        os.makedirs("runs/mended")  # as the message says
        shutil.copy("runs/bad/last.pt", "runs/mended")
        command = f"{MINI_DIT} --ae {trained()}/runs/demo-ae/last.pt --name mended --steps 5 --lr"
        self.assertIn("going on with runs/mended at step 4", ok(command, 0.001))
        self.assertEqual(svg.load_checkpoint("runs/mended/last.pt")["opt"]["param_groups"][0]["lr"], 0.001)
        for other, words in ((command.replace("--model 2", "--model 1"), "unexpected blocks.1"),
                             (MINI_AE + " --name mended --lr", "not of this stage")):
            os.remove("runs/mended/config.json")
            code, _, err = run(other, 0.1)
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertIn(words, err)

    def test_signals_end_a_run_after_a_step_and_it_goes_on_exactly(self):
        for ae in (False, True):
            flags = ["--accumulate", 2, *["--gan", 0.5, "--disc-start", 1] * ae]
            whole = self.train("whole", *flags, ae=ae, steps=4)
            for number in svg.STOP_SIGNALS:
                with self.subTest(number, ae=ae):
                    real = svg.seed_step

                    def seed_step(seed, step, *rank, number=number, real=real):
                        if step == 1:
                            os.kill(os.getpid(), number)  # in the middle of the second step
                        real(seed, step, *rank)

                    with mock.patch("svg.seed_step", seed_step):
                        self.assertEqual(self.train("stopped", *flags, ae=ae)["step"], 2)
                    with open("runs/stopped/log.jsonl", "a") as f:
                        f.write('{"step": 3, "lo')  # what a full disk leaves of a line
                    if ae:
                        self.assertFalse(svg.load_autoencoder("runs/stopped/last.pt").measured)
                    self.assert_same(whole, self.train("stopped", *flags, ae=ae))
                    shutil.rmtree("runs/stopped")
            shutil.rmtree("runs")

    def test_stopped_run_says_how_to_go_on(self):
        process = start(MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 100000 --workers 2",
                        start_new_session=True)
        for line in process.stdout:
            if line.startswith("step 2"):
                os.killpg(process.pid, signal.SIGTERM)  # its loading processes too
        _, err = process.communicate()
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertRegex(line, r"SIGTERM: stopped after step \d+; "
                               r"the same command goes on from runs/demo-dit/last.pt")

    def test_two_processes_stop_together_and_a_dead_one_is_restarted_where_the_run_was(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --steps 6 --save-every 2 --name"
        shell(command, "whole", processes=2)
        # One rank gets a signal in step 2; once gone on, the other dies in step 5 and torchrun restarts both.
        Path("faulty.py").write_text("""
import os, signal, sys, torch, train_dit, svg
real = svg.seed_step
def seed_step(seed, step, *rank):
    if svg.rank() == 1 and step == 1 and not os.path.exists("runs/faulty/last.pt"):
        os.kill(os.getpid(), signal.SIGUSR1)
    if svg.rank() == 0 and step == 4 and not os.path.exists("died"):
        open("died", "w").close()
        raise RuntimeError("the card fell off the bus")
    real(seed, step, *rank)
svg.seed_step = seed_step
svg.run_main(train_dit.main)
""")
        command = command.replace("train_dit", f"{self.folder}/faulty")
        self.assertIn("stopped after step 2", shell(command, "faulty", processes=2))
        process = start(command, "faulty", processes=2, torchrun=["--max-restarts=1"])
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, err)
        self.assertIn("the card fell off the bus", err)
        self.assertIn("going on with runs/faulty at step 4", out)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("whole", "faulty")))

    def test_a_killed_save_leaves_the_checkpoint_before_it(self):
        def save_for_ever():
            torch.set_num_threads(1)
            for i in itertools.count(last + 1):
                svg.save_checkpoint("last.pt", {"step": i, "weights": torch.from_numpy(np.full(300_000, i))})

        last = -1
        for i in range(12):
            child = multiprocessing.get_context("fork").Process(target=save_for_ever)
            child.start()
            time.sleep(0.05 + 0.013 * i)
            child.kill()
            child.join()
            if os.path.exists("last.pt"):
                checkpoint = svg.load_checkpoint("last.pt")
                self.assertTrue((checkpoint["weights"] == checkpoint["step"]).all())
                self.assertGreaterEqual(checkpoint["step"], last)
                last = checkpoint["step"]
        self.assertGreater(last, 12)

    def test_a_killed_run_goes_on_from_its_last_save(self):
        command = MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --save-every 1 --steps"
        seen = 0
        for _ in range(2):
            process = start(command, 100000)
            for line in process.stdout:
                if line.startswith(f"step {seen + 5}/"):
                    process.kill()
            process.communicate()
            step = svg.load_checkpoint("runs/demo-dit/last.pt")["step"]
            self.assertGreaterEqual(step, seen + 4)
            seen = step
        Path("runs/demo-dit/.last.pt.1.tmp").touch()  # what a kill in the middle of a save leaves
        self.assertIn(f"at step {seen}", ok(command, seen + 2))
        self.assertEqual([e["step"] for e in read_log("demo-dit")], list(range(1, seen + 3)))
        self.assertEqual(list(Path("runs/demo-dit").glob(".*")), [])

    def test_full_disk_is_one_line_and_the_checkpoint_before_it_stays(self):
        before = self.train("full", steps=2)
        size = os.path.getsize("runs/full/last.pt")
        process = start(
            MINI_DIT + f" --ae {trained()}/runs/demo-ae/last.pt --lr 0.0001 --name full --steps 3",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
        _, err = process.communicate(timeout=120)
        self.assertEqual((process.returncode, err.count("\n")), (2, 1), err)
        self.assertRegex(err, r"runs/full/last\.pt: not written .*the previous one is intact")
        self.assert_same(before, svg.load_checkpoint("runs/full/last.pt"))
        self.assertEqual(list(Path("runs/full").glob(".*")), [])

    def test_old_checkpoints_go_and_milestones_stay(self):
        self.train("run", "--save-every", 1, "--keep", 2, "--milestone-every", 3, steps=7)
        self.assertEqual(sorted(p.name for p in Path("runs/run").glob("[0-9]*.pt")),
                         [f"000000{i}.pt" for i in (3, 5, 6, 7)])

    def test_bench_needs_nothing_and_writes_nothing(self):
        flags = "--demo --bench 2 --batch"
        for command in (f"train_ae {flags} 4 --gan 0.5 --accumulate 2", f"train_dit {flags} 4 --recompute",
                        f"sample {flags}-size 4 --steps 2", "fid --bench 1 --batch 1",
                        "train_dit --model 1,32,2 --batch 2 --bench 1"):  # on the paper's autoencoder, fresh
            with self.subTest(command):
                result = json.loads(ok(command).splitlines()[-1])
                self.assertEqual(result["script"], command.split()[0])
                for key in ("step_seconds", "images_per_second", "tflops", "peak_gib"):
                    self.assertGreater(result[key], 0, key)
                self.assertEqual(os.listdir(), [])
        block = svg.SiT({"depth": 1, "dim": 64, "heads": 2}, 8, 10, 4)
        args = mock.Mock(bench=1, precision="fp32", compile=False)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            svg.bench(args, torch.device("cpu"), lambda n: lambda: block(
                torch.zeros(n, 16, 8), torch.zeros(n), torch.zeros(n, dtype=torch.long)), 3, what="block")
        result = json.loads(out.getvalue().splitlines()[-1])
        per_token = 8 * 64 + 12 * 64 * 64 + 2 * 16 * 64 + 64 * 8  # embedding, block, attention, head
        per_image = (256 + 64) * 64 + (6 + 2) * 64 * 64  # timestep embedding, adaLN
        self.assertAlmostEqual(result["tflops"] * result["step_seconds"],
                               3 * 2 * (16 * per_token + per_image) / 1e12,
                               delta=0.001 * result["step_seconds"])


class PackedData(Case):
    def tree(self, count=20):
        for name in ("a", "b"):
            Path("tree", name, "deeper").mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(demo.draw(i % 10, np.random.default_rng(i), 48)[0])
                picture.resize((48, 60)).save(f"tree/{name}/{'deeper/' * (i % 2)}{i}.jpg")

    def test_packed_pixels_are_those_of_the_tree_and_corrupt_images_are_left_out(self):
        self.tree()
        Path("tree/a/4.jpg").write_bytes(b"no picture")
        code, out, err = run("svg pack tree/ packed/ --size 32 --workers 2")
        self.assertEqual((code, err), (0, "warning: tree/a/4.jpg: not a readable image, left out\n"))
        self.assertIn("39 images in packed/, 1 corrupt", out)
        self.assertEqual(sorted(os.listdir("packed")), ["classes.json", "images.npy", "labels.npy"])
        os.remove("tree/a/4.jpg")
        tree, packed = svg.open_data("tree", 32), svg.open_data("packed", 32)
        self.assertIsInstance(packed, svg.Packed)
        self.assertEqual((len(packed), packed.classes), (len(tree), tree.classes))
        for i in range(len(tree)):
            (a, *label), (b, *also) = tree[i, 0], packed[i, 0]
            np.testing.assert_array_equal(a, b)
            self.assertEqual(label, also)
        self.assertEqual(svg.identity(tree), svg.identity(packed))
        self.assertNotEqual(svg.identity(svg.open_data("tree", 32, random_crop=True)), svg.identity(packed))
        self.assertLess(len(pickle.dumps(packed)), 1000)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).images, packed.images)
        command = DIT_DATA.replace("runs", f"{trained()}/runs") + " --model 1,32,2 --steps 2 --workers"
        for name in ("tree", "packed"):
            ok(command, int(name == "packed"), "--name", name, "--data", name)
        self.assert_same(*(svg.load_checkpoint(f"runs/{name}/last.pt") for name in ("tree", "packed")))

    def test_interrupted_packing_goes_on_and_the_result_appears_whole(self):
        self.tree(100)
        ok("svg pack tree whole --size 16 --workers 0")
        real, opened = svg.open_rgb, itertools.count()

        def interrupted(path):
            if next(opened) == 150:
                raise KeyboardInterrupt
            return real(path)

        with mock.patch("svg.open_rgb", interrupted):
            self.assertEqual(run("svg pack tree packed --size 16 --workers 0")[0], 130)
            self.assertFalse(os.path.exists("packed"))
            before = next(opened)
            ok("svg pack tree packed --size 16 --workers 0")
        self.assertLessEqual(next(opened) - before, 200 - 64 + 2)  # not from the beginning again
        for file in os.listdir("whole"):
            self.assertEqual(Path("whole", file).read_bytes(), Path("packed", file).read_bytes(), file)
        self.assertFalse(os.path.exists("packed.part"))

    def test_a_damaged_or_wrong_packed_set_is_refused(self):
        self.tree(3)
        ok("svg pack tree packed --size 32 --workers 0")
        for command, words in (
                ("svg pack tree packed", "packed is already there"),
                ("svg pack nowhere new", "nowhere: no such folder"),
                (f"{REAL_DATA.replace('--image-size 32 --grid 4', '--image-size 64 --grid 8')}",
                 "packed at 32 pixels, needed at 64")):
            command = command if command.startswith("svg") else f"train_ae {command} --data packed"
            code, _, err = run(command)
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertIn(words, err)
        whole = Path("packed/images.npy").read_bytes()
        for damaged in (whole[:200], whole[:50], b""):
            Path("packed/images.npy").write_bytes(damaged)
            code, _, err = run(f"train_ae {REAL_DATA} --data packed")
            self.assertEqual((code, err.count("\n")), (2, 1), err)
            self.assertIn("packed: not a whole packed set", err)

    def test_a_tree_is_walked_once_and_again_when_it_changed(self):
        self.tree(4)
        self.addCleanup(mock.patch.stopall)
        walk = mock.patch("svg.walk_tree", wraps=svg.walk_tree).start()
        now = time.time_ns()
        clock = mock.patch("time.time_ns", return_value=now + 10 ** 10).start()
        first = svg.ImageFolder("tree", 32)
        again = svg.ImageFolder(self.folder / "tree", 32)
        self.assertEqual(walk.call_count, 1)
        for a, b in ((first.classes, again.classes), (first.labels.tolist(), again.labels.tolist()),
                     (first.names.tolist(), again.names.tolist())):
            self.assertEqual(a, b)
        self.assertEqual(sorted(os.listdir("tree")), ["a", "b"])  # nothing is written there
        for change in (lambda: shutil.copy("tree/a/0.jpg", "tree/b/deeper/new.jpg"),
                       lambda: os.remove("tree/a/2.jpg"), lambda: shutil.copytree("tree/a", "tree/c"),
                       lambda: os.rename("tree/b/0.jpg", "tree/b/z.jpg")):
            change()
            names = svg.ImageFolder("tree", 32).names
            self.assertEqual([os.fsdecode(n) for n in names], [
                os.path.relpath(f, "tree") for f in svg.list_images("tree")])
        self.assertEqual(walk.call_count, 5)
        clock.return_value = now  # a tree that changed this very second may change again unseen
        shutil.copy("tree/a/0.jpg", "tree/a/newer.jpg")
        svg.ImageFolder("tree", 32)
        svg.ImageFolder("tree", 32)
        self.assertEqual(walk.call_count, 7)


class BadInput(Case):
    def setUp(self):
        super().setUp()
        shutil.copytree(trained() / "runs", "runs")
        write_pictures("good/a", 2)
        write_pictures("bad/a", 2)
        write_pictures("flat", 1)
        for folder in ("empty", "w", "hollow/a"):
            os.makedirs(folder)
        Path("bad/a/1.png").write_bytes(Path("bad/a/0.png").read_bytes()[:100])
        Path("text.pt").write_text("not a checkpoint\nat all\n")
        Path("text.npz").write_text("not an archive\n")
        Path("zero.pt").touch()
        Path("zero.npz").touch()
        checkpoint = Path("runs/demo-ae/last.pt").read_bytes()
        Path("half.pt").write_bytes(checkpoint[:len(checkpoint) // 2])
        write_safetensors("whole.safetensors", {"cls_token": torch.zeros(1, 1, 384)})
        Path("half.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:200])
        torch.save([1, 2], "list.pt")
        torch.save({1: torch.zeros(2)}, "int.pt")
        for kind in ("sit", "autoencoder"):
            torch.save({"kind": kind}, f"{kind}.pt")
        os.makedirs("runs/foreign")  # and a folder below runs/ that is none of ours
        Path("runs/foreign/config.json").write_text("[not json")
        torch.save({"ema": 0.999}, "ema.pt")
        torch.save({"fc.weight": torch.zeros(2, 2)}, "mlp.pth")
        wrong = {"cls_token": [1, 1, 384], "patch_embed.proj.weight": [384, 3, 14, 14],
                 "norm.weight": [7], "extra": [1]}
        torch.save({k: torch.zeros(shape) for k, shape in wrong.items()}, "wrong.pth")
        np.savez("stats.npz", mean=np.zeros(5), std=np.ones(5))
        other = svg.load_checkpoint("runs/demo-ae/last.pt")
        torch.save({**other, "fingerprint": "0" * 64}, "other.pt")

    def test_missing_weights(self):
        dinov2 = "dinov2_vits14_pretrain.pth"
        self.refused("train_ae --data good", "weights/dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
                     "ai.meta.com", dinov2)
        with mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            for command, file in ((f"train_ae --encoder {dinov2}", dinov2),
                                  (MINI_AE + " --lpips 1 --name new", "vgg16-397923af.pth"),
                                  ("fid good --save-stats x.npz", "pt_inception-2015-12-05-6726825d.pth")):
                self.refused(f"{command} --weights w", f"w/{file}", "https://", "no network", "--weights")

    def test_damaged_and_foreign_files(self):
        for file, words in (("text.pt", ["not a readable checkpoint"]), ("half.pt", ["truncated"]),
                            ("zero.pt", ["not a readable checkpoint"]), ("list.pt", ["list"]),
                            ("int.pt", ["int"]), ("half.safetensors", ["truncated"]),
                            ("whole.safetensors", ["patch_embed.proj"]), ("nowhere.pth", ["no such file"]),
                            ("mlp.pth", ["patch_embed.proj", "fc.weight"]),
                            ("wrong.pth", ["missing", "unexpected extra", "[7] instead of [384]"])):
            self.refused(f"train_ae --data good --encoder {self.folder}/{file}", file, *words)
        for file in ("text.pt", "half.pt", "zero.pt", "list.pt", "int.pt", "ema.pt", "mlp.pth", "nowhere.pt",
                     "sit.pt"):
            self.refused(f"sample --ckpt {file}", file)
        for file in ("text.pt", "half.pt", "mlp.pth", "runs/demo-dit/last.pt", "autoencoder.pt"):
            self.refused(f"train_dit --demo --name new --ae {file}", file)
        for file in ("text.npz", "zero.npz", "mlp.pth"):
            self.refused(f"sample --latent-stats {file}", file)
        self.refused("sample --latent-stats stats.npz", "5 channels", "72")

    def test_bad_data(self):
        for folder, words in (("nowhere", "no such folder"), ("empty", "class folders"),
                              ("hollow", "no images"), ("flat", "one folder per class")):
            self.refused(f"train_ae {REAL_DATA} --data {folder}", f"--data {folder}", words)
            self.refused(f"{DIT_DATA} --data {folder}", f"--data {folder}", words)
        self.refused("fid empty --demo", "empty")
        self.refused("fid nowhere --demo", "nowhere")
        self.refused("fid bad --demo --workers 0", "bad/a/1.png", "not a readable image")
        self.refused("fid good --demo --num 3 --workers 0", "--num 3")
        self.refused("sample --reconstruct empty", "--reconstruct empty")
        for i in range(2):
            Path(f"bad/a/{i}.png").write_text("no picture")
        self.refused(f"train_ae {REAL_DATA} --data bad", "no readable image")
        self.refused(f"{DIT_DATA} --data bad --workers 1", "no readable image")

    def test_flags_out_of_range(self):
        for command, words in (
                ("sample --steps 0", ["--steps", "'0'"]), (MINI_AE + " --steps 0", ["--steps"]),
                (MINI_DIT + " --steps -3", ["--steps"]), ("sample --guidance -1", ["--guidance", "'-1'"]),
                ("sample --num 0", ["--num"]), ("sample --shift 0", ["--shift"]),
                ("sample --seed -1", ["--seed"]), (MINI_DIT + " --seed -1 --name new", ["--seed"]),
                ("sample --nonsense", ["--nonsense"]), ("fid good --batch 0", ["--batch"]),
                ("sample --classes 10", ["--classes 10", "0 to 9", "arrow"]),
                ("sample --classes unicorn", ["--classes unicorn"]),
                (MINI_DIT + " --model 2,30,4", ["--model 2,30,4"]), (MINI_DIT + " --model S", ["--model S"]),
                (MINI_AE + " --image-size 48 --name new", ["--image-size 48"]),
                (MINI_AE + " --decoder-mult 1,1 --name new", ["--decoder-mult 1,1"]),
                (MINI_AE + " --decoder-channels 100 --name new", ["--decoder-channels 100", "32"]),
                (MINI_AE + " --residual-dim 145 --name new", ["--residual-dim 145", "48"]),
                ("sample --dem", ["--dem"])):
            self.refused(command, *words)
        for command, words in (
                ("sample --edit good/a/0.png", ["--edit", "--box"]),
                ("sample --box 1,1,9,9", ["--edit", "--box"]), ("sample --outside", ["--edit"]),
                ("sample --interpolate slerp --class 3", ["--interpolate", "--seeds"]),
                ("sample --interpolate slerp --seeds 1 2", ["--interpolate", "--class"]),
                ("sample --seeds 1 2", ["--seeds", "--interpolate"]),
                ("sample --edit x.png --box 9,1,1,9 --class 3", ["--box", "9,1,1,9"]),
                ("sample --edit x.png --box 1,1,9,9 --class 3", ["x.png"]),
                ("sample --edit text.pt --box 1,1,9,9 --class 3", ["text.pt", "not a readable"]),
                ("sample --edit good/a/0.png --box 1,1,9,99 --class 3", ["--box", "32 x 32"]),
                ("sample --edit good/a/0.png --box 1,1,3,3 --class 3", ["--box", "token"]),
                ("sample --edit good/a/0.png --box 1,1,9,9 --class 10", ["0 to 9"])):
            self.refused(command, *words)
        for command, flag in (("sample --guidance", "nan"), ("sample --shift", "inf"),
                              (MINI_AE + " --name new --gan", "-1"),
                              (MINI_AE + " --name new --workers", "-1"),
                              (MINI_AE + " --name new --residual-channels", "-1"),
                              (MINI_DIT + " --name new --label-dropout", "2"),
                              (MINI_DIT + " --name new --ema-decay", "5")):
            self.refused(f"{command} {flag}", command.split()[-1], f"'{flag}'")
        with mock.patch("svg.world_size", lambda: 3), mock.patch("svg.barrier"):
            self.refused(MINI_AE + " --name new", "--batch 8", "3 processes")
            self.refused(MINI_DIT + " --name new", "--batch 8", "3 processes")

    def test_a_flag_that_would_do_nothing_is_refused(self):
        walk, change = ("--interpolate slerp --class 3 --seeds 1 2",
                        "--edit good/a/0.png --box 1,1,9,9 --class 3")
        for mode in ("--reconstruct good", change, walk, "--bench 1"):
            for flag in ("--num=3", "--labels random", "--npz x.npz"):
                self.refused(f"sample {mode} {flag}", flag[:5], mode.split()[0], "does nothing")
        for command, *words in (
                (f"sample {walk} --seed 1", "--seed ", "--interpolate"),
                ("sample --t-edit 0.2", "--t-edit", "--edit"),
                (f"sample {change} --frames 3", "--frames", "--interpolate"),
                ("sample --align batch", "--align", "--reconstruct or --edit"),
                ("sample --reconstruct good --bench 1", "--bench", "--reconstruct"),
                ("probe space --demo --data good", "--data", "--demo"),
                ("probe space --demo --size 64", "--size", "--demo"),
                ("probe classify --demo --size 64", "--size", "--demo"),
                (f"probe classify --encoder {demo.ENCODER} --ae x.pt", "--ae", "--encoder"),
                ("probe pca --size 32 --demo", "--size", "--encoder"),
                ("probe pca --images good/a/0.png --guidance 2", "--guidance", "--images"),
                ("probe toy --demo", "--demo")):
            self.refused(command, "error", *words)

    def test_probes_refuse_wrong_layouts(self):
        for task, label in (("segment", "whole/annotations/training/1.png"),
                            ("depth", "whole/train/room/sync_depth_1.png")):
            flags = f"probe {task} --encoder {demo.ENCODER} --size 32 --workers 0 --data"
            layout = {"segment": "annotations", "depth": "sync_depth_N.png"}[task]
            for folder in ("nowhere", "good"):
                self.refused(f"{flags} {folder}", f"--data {folder}", "expected", layout)
            write_dense(task, "whole")
            os.rename(label, "elsewhere.png")
            self.refused(f"{flags} whole", label, "No such file", layout)
            test = label.replace("training", "validation").replace("train", "test")
            with mock.patch("probe.random_crops", side_effect=AssertionError("no training before this")):
                for bad in (np.zeros((3, 3), np.uint8), np.zeros((44, 60, 3), np.uint8)):
                    write_dense(task, "whole")
                    Image.fromarray(bad).save(test)
                    self.refused(f"{flags} whole", test, "not a label", layout)
                for file in (test, label):
                    write_dense(task, "whole")
                    Path(file).write_text("no picture")
                    self.refused(f"{flags} whole", file, "not a readable label", layout)
                for unknown, which in (((label, label.replace("1.png", "0.png")), "training"),
                                       ((test, test.replace("1.png", "0.png")), "test")):
                    write_dense(task, "whole")
                    for file in unknown:
                        Image.fromarray(np.zeros((44, 60), np.uint8)).save(file)
                    self.refused(f"{flags} whole", "--data whole", which, "known pixels")
            write_dense(task, "whole")
            Image.fromarray(np.zeros((3, 3), np.uint8)).save(label)  # its header is good
            for workers in (0, 1):
                self.refused(f"{flags} whole --workers {workers} --batch 8", label, "not a label")
            shutil.rmtree("whole")
        with mock.patch("os.access", lambda path, mode: False):
            self.refused("probe toy", "--out probes", str(self.folder), "written")
        self.refused("probe classify --data good --ae runs/demo-ae/last.pt", "--data good/train",
                     "no such folder")
        for few in ("--demo --classes 1", "--demo --images 39", "--data good --size 32"):
            self.refused(f"probe space --ae runs/demo-ae/last.pt {few}", "--images", "--classes", "too few")
        for command in ("space --data good --size 100", "segment --demo --size 4",
                        "segment --demo --features pixels --size 30", "pca --images good/a/0.png --size 100"):
            self.refused(f"probe {command} --encoder {demo.ENCODER}", "--size", "multiple of 8")
        for command in ("segment --demo", "toy", "pixels", "pca --demo", "space --demo", "classify --demo"):
            for out in ("text.pt", "text.pt/below"):
                self.refused(f"probe {command} --out {out}", f"--out {out}")
        self.refused("probe classify --demo --features residual --encoder " + str(demo.ENCODER),
                     "--features residual")
        self.refused("probe space --data good", "--ae")  # only demo runs are there
        self.refused("probe guess", "probe.py guess", "classify")
        self.refused("probe toy --data good", "--data")
        self.refused("probe classify --demo --batch 1", "--batch 1")
        self.refused(f"probe pca --encoder {demo.ENCODER}", "--images")
        self.refused("probe pca --demo --class 10", "0 to 9")
        self.refused("probe pca --demo --images good/a/0.png good/a/1.png", "--images", "one picture")
        self.refused("probe pca --images text.pt --demo", "text.pt", "not a readable image")

    def test_restarts_on_several_nodes_need_a_store_for_each(self):
        nodes = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
        with mock.patch.dict(os.environ, nodes):
            self.refused(MINI_DIT + " --name new", "--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")

    def test_things_that_do_not_belong_together(self):
        self.refused("sample --ae other.pt", "runs/demo-dit/last.pt", "other.pt", "--ae")
        self.refused("train_dit --data good", "train_ae.py", "--ae")  # only demo runs are there
        self.refused(MINI_AE + " --lr 0.1", "runs/demo-ae", "different run", "--lr 0.1 (was ", "--name")
        self.refused(MINI_DIT + " --name demo-ae", "runs/demo-ae", "different run")
        self.refused("sample --steps 2 --out good --overwrite", "good", "not of this program", "--out")
        for flag in ("--out text.pt", "--out .", "--npz nowhere/x.npz"):
            self.refused(f"sample --steps 2 {flag}", flag)
        ok("sample --steps 2 --num 3 --out mine")
        self.refused("sample --steps 3 --num 3 --out mine", "mine", "different run", "--overwrite")
        ok("sample --steps 2 --num 3 --out v1.25")
        before = self.snapshot()
        ok("sample --steps 3 --num 3 --out v1.55")
        after = self.snapshot()
        self.assertEqual([p for p in before if before[p] != after[p]], [])  # each with its own overview


def write_dense(task, root, count=2, size=(60, 44)):
    """A set of the published layout of ADE20K or NYUv2: left half one label, right half another."""
    for split in ("training", "validation") if task == "segment" else ("train", "test"):
        for i in range(count):
            if task == "segment":
                image, label = f"{root}/images/{split}/{i}.png", f"{root}/annotations/{split}/{i}.png"
            else:
                image, label = f"{root}/{split}/room/rgb_{i}.png", f"{root}/{split}/room/sync_depth_{i}.png"
            for file in (image, label):
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            right = np.arange(size[0]) >= size[0] / 2
            grey = np.tile(np.where(right, 250, 5).astype(np.uint8), (size[1], 1))
            Image.fromarray(grey.repeat(3, 1).reshape(*grey.shape, 3)).save(image)
            values = (np.where(right, 3, 150).astype(np.uint8) if task == "segment" else
                      np.where(right, 1500, 6000).astype(np.uint16))
            Image.fromarray(np.tile(values, (size[1], 1))).save(label)


class Probes(Case):
    def numbers(self, command, *more):
        ok(f"probe {command}", *more)
        return json.loads(Path(f"probes/{command.split()[0]}.json").read_text())

    def test_separated_classes_need_fewer_steps_on_the_exact_velocity_field(self):
        numbers = self.numbers("toy")
        for steps in (1, 5, 25):
            self.assertGreater(numbers["entangled"][f"error_{steps}"], numbers["separated"][f"error_{steps}"])
        self.assertGreater(numbers["separated"]["error_1"], 5 * numbers["separated"]["error_25"])
        self.assertTrue(os.path.exists("probes/toy.png"))

    def test_mean_velocity_is_the_regression_of_data_minus_noise(self):
        torch.manual_seed(0)
        blobs, n = figures.BLOBS[[0, 2, 4]], 1_000_000
        data = blobs[torch.randint(3, (n,))] + figures.SIGMA * torch.randn(n, 2)
        noise, t = torch.randn(n, 2), 0.4
        x_t, spot = (1 - t) * noise + t * data, torch.tensor([-0.5, 0.3])
        near = (x_t - spot).norm(dim=1) < 0.05
        expected = (data - noise)[near].mean(0)
        velocity = figures.mean_velocity(spot.view(1, 1, 2), torch.tensor([t]), blobs[None])[0, 0]
        self.assertGreater(near.sum(), 1000)
        self.assertLess((velocity - expected).norm(), 0.2)  # of 2.1

    def test_encoder_features_separate_classes_and_pixels_do_not(self):
        numbers = self.numbers("space --demo --images 200")
        self.assertGreater(numbers["encoder"]["linear"], 0.85)
        self.assertGreater(numbers["encoder"]["1-NN"], 0.85)
        for name in ("pixels", "residual"):
            self.assertLess(numbers[name]["linear"], 0.4)
            self.assertLess(numbers[name]["between/within"], numbers["latent"]["between/within"] / 5)
        self.assertTrue(os.path.exists("probes/space.png"))

    def test_space_takes_some_classes_and_splits_each(self):
        for name in "abcde":
            write_pictures(f"tree/{name}", 6, first=100 * ord(name))
        real, labels = probe.separability, []
        with mock.patch("probe.separability", lambda x, y, seed: labels.append(y) or real(x, y, seed)), \
                mock.patch("figures.space_picture", wraps=figures.space_picture) as picture:
            numbers = self.numbers(f"space --data tree --encoder {demo.ENCODER} --size 32 --workers 0 "
                                   "--classes 3 --images 14")
        self.assertEqual((numbers["images"], numbers["classes"], numbers["chance"]), (12, 3, 0.3333))
        self.assertEqual(labels[0].tolist(), [0] * 4 + [1] * 4 + [2] * 4)
        self.assertEqual(picture.call_args.args[2], ["a", "c", "e"])
        y = torch.arange(40) // 4  # four of a class: two to learn from, two to test, for every seed
        x = 9 * torch.eye(10)[y] + 0.1 * torch.randn(40, 10)
        self.assertEqual({probe.separability(x, y, seed)["1-NN"] for seed in range(5)}, {1.0})

    def test_an_unreadable_picture_is_named_once_and_left_out(self):
        for split in ("train", "val"):
            for i, name in enumerate("ab"):
                write_pictures(f"tree/{split}/{name}", 8, first=100 * i)
            Path(f"tree/{split}/b/3.png").write_text("no picture")
        flags = f"--encoder {demo.ENCODER} --size 32 --workers 0"
        for command, splits, left in (
                (f"space {flags} --data tree/val", ["val"], 15),
                (f"classify {flags} --data tree --epochs 2 --batch 5", ["train", "val"], 15),
                (f"classify {flags} --data tree --epochs 2 --batch 5 --cache", ["train", "val"], 15)):
            with self.subTest(command), warnings.catch_warnings():
                code, _, err = run(f"probe {command}")
                expected = [f"warning: tree/{s}/b/3.png: not a readable image, skipped" for s in splits]
                self.assertEqual(err.splitlines(), expected)
                numbers = json.loads(Path(f"probes/{command.split()[0]}.json").read_text())
                self.assertEqual((code, numbers["images"]), (0, left))

    def test_numbers_come_before_the_files_and_none_is_no_json_number(self):
        settings = argparse.Namespace(out="here", probe="toy")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            probe.report(settings, {"a": math.nan, "b": [math.inf, 0.123456]})
        written = json.loads(Path("here/toy.json").read_text(), parse_constant=self.fail)
        self.assertEqual((written["a"], written["b"]), (None, [None, 0.1235]))
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch("svg.write_atomically", side_effect=OSError), \
                self.assertRaises(OSError):
            probe.report(settings, {"a": 0.5})
        self.assertIn('{"a": 0.5}', out.getvalue())

    def test_defaults_are_the_papers(self):
        for what, expected in {
                "classify": {"lr": 5e-4, "wd": 1e-2, "batch": 3072, "epochs": 30, "cache": False},
                "segment": {"size": 512, "lr": 8e-5, "wd": 1e-3, "warmup": 1500, "steps": 8000},
                "depth": {"size": 480, "lr": 5e-4, "batch": 24, "epochs": 25, "warmup": 0}}.items():
            with mock.patch("sys.argv", ["probe.py", what]):
                args = vars(probe.parse_args(what))
            self.assertEqual({k: args[k] for k in expected}, expected)
        at = functools.partial(probe.learning_rate, args=mock.Mock(lr=8e-5, warmup=1500), steps=8000)
        self.assertAlmostEqual(at(0), 8e-5 / 1500, delta=1e-12)
        self.assertAlmostEqual(at(750), 751 / 1500 * (1e-6 + 7.9e-5 * (1 - 750 / 8000) ** 0.9), delta=1e-12)
        self.assertAlmostEqual(at(1500), 1e-6 + 7.9e-5 * (1 - 1500 / 8000) ** 0.9, delta=1e-12)
        self.assertAlmostEqual(at(8000), 1e-6, delta=1e-12)
        self.assertAlmostEqual(at(0, args=mock.Mock(lr=0.1, warmup=0)), 0.1)

    def test_separability_of_known_clusters_and_of_noise(self):
        torch.manual_seed(0)
        y = torch.arange(300) % 3
        means = 20 * torch.eye(3, 8)
        apart = probe.separability(means[y] + torch.randn(300, 8), y, 0)
        self.assertEqual((apart["linear"], apart["1-NN"]), (1, 1))
        self.assertAlmostEqual(
            apart["between/within"], (2 / 3) * 20 ** 2 / 8, delta=3)  # |mean - centre|^2 over variance
        self.assertLess(probe.separability(torch.randn(300, 8), y, 0)["linear"], 0.5)

    def test_pixel_encoder_is_a_rotation_of_the_patches_for_every_program(self):
        ok("probe pixels --patch 8 --channels 200 --out .")
        encoder, x = svg.load_encoder("pixels.pt"), torch.rand(2, 3, 32, 48) * 2 - 1
        tokens = encoder(x, grid=(4, 6))
        self.assertEqual(tokens.shape, (2, 24, 200))
        patches = torch.nn.functional.unfold(x, 8, stride=8).transpose(1, 2)
        self.close(tokens @ tokens.mT, patches @ patches.mT, 1e-4)  # lengths and angles stay
        ok(f"{MINI_AE} --encoder {self.folder}/pixels.pt --residual-channels 0 --steps 2")
        self.assertEqual(svg.load_autoencoder("runs/demo-ae/last.pt").channels, 200)
        code, _, err = run("probe pixels --patch 16 --channels 392 --out .")
        self.assertEqual((code, err.count("\n")), (2, 1), err)
        self.assertIn("--channels 392", err)

    def test_tsne_keeps_neighbours(self):
        torch.manual_seed(0)
        y = torch.arange(90) % 3
        xy = figures.tsne(8 * torch.eye(3, 10)[y] + torch.randn(90, 10), perplexity=10, steps=250)
        nearest = (torch.cdist(xy, xy) + 1e9 * torch.eye(90)).argmin(1)
        self.assertGreater((y[nearest] == y).float().mean(), 0.95)

    def test_linear_probe_with_cached_and_with_fresh_crops(self):
        real = demo.dataset
        with mock.patch("demo.dataset",
                        lambda split, count=None: real(split, {"train": 300, "val": 100}[split])):
            self.assertGreater(self.numbers("classify --demo --batch 50")["top1"], 0.85)
            with mock.patch.dict(probe.SMALL["classify"], cache=False), \
                    mock.patch("probe.random_resized_crops", wraps=probe.random_resized_crops) as cropped:
                crops = self.numbers("classify --demo --features latent --batch 50 --epochs 2 --lr 0.02")
        self.assertEqual(sum(len(call.args[0]) for call in cropped.mock_calls), 2 * 300)  # not the test's
        self.assertGreater(crops["top1"], 0.3)
        self.assertGreaterEqual(crops["top5"], crops["top1"])

    def test_a_packed_set_gives_the_numbers_of_its_tree(self):
        for split in ("train", "val"):
            for i, name in enumerate("ab"):
                write_pictures(f"tree/{split}/{name}", 12, first=100 * i)
            ok(f"svg pack tree/{split} packed/{split} --size 32 --workers 0")
        flags = f"--encoder {demo.ENCODER} --size 32 --workers 0"
        for command, sub in (("space", "/val"), ("classify --cache --epochs 2 --batch 5", "")):
            tree, packed = (self.numbers(f"{command} {flags} --data {root}{sub}")
                            for root in ("tree", "packed"))
            for numbers in (tree, packed):
                numbers.pop("settings"), numbers.pop("seconds", None)
            self.assertEqual(tree, packed)

    def test_random_crops_are_parts_of_the_image(self):
        ramp = torch.linspace(-1, 1, 32).expand(16, 1, 32, 32).clone()
        crops = probe.random_resized_crops(ramp, torch.Generator().manual_seed(0))
        self.assertLess((crops[:, :, 0] - crops[:, :, -1]).abs().max(), 1e-5)  # rows stay rows
        spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2
        self.assertTrue(((spans.abs() > 0.2) & (spans.abs() < 1.01)).all())
        self.assertTrue((spans > 0).any() and (spans < 0).any())  # mirrored or not

    def test_segmentation_and_depth_learn_their_own_layouts(self):
        for task, extra, good in (("segment", "--steps 30 --warmup 3", lambda n: n["mIoU"] > 0.8),
                                  ("depth", "--epochs 60", lambda n: n["RMSE_m"] < 1 and n["A.Rel"] < 0.35)):
            with self.subTest(task):
                write_dense(task, task)
                numbers = self.numbers(f"{task} --data {task} --encoder {demo.ENCODER} --size 32 --workers 0 "
                                       f"--batch 4 --lr 0.005 --width 16 --log-every 1000 {extra}")
                self.assertTrue(good(numbers), numbers)
                self.assertTrue(os.path.exists(f"probes/{task}.png"))

    def test_each_step_has_the_rate_of_the_schedule(self):
        for task, steps in (("segment", "--steps 3"), ("depth", "--epochs 3")):
            write_dense(task, task)
            used = []

            class Recording(torch.optim.AdamW):
                def step(self, used=used):
                    used.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))

            with mock.patch("torch.optim.AdamW", Recording):
                self.numbers(f"{task} --data {task} --encoder {demo.ENCODER} --size 32 --workers 0 --batch 2 "
                             f"--width 8 --lr 0.1 --wd 0.3 --warmup 2 {steps}")
            args = mock.Mock(lr=0.1, warmup=2)
            self.assertEqual(used, [(probe.learning_rate(i, args, 3), 0.3) for i in range(3)])

    def test_depth_is_the_mean_with_the_mirrored_pictures(self):
        write_dense("depth", "depth")
        path = "depth/test/room/sync_depth_1.png"
        Image.fromarray(np.zeros((44, 60), np.uint16)).save(path)  # nothing known: left out
        log_depth = torch.linspace(0, 1, 4).expand(1, 1, 3, 4)
        with mock.patch("probe.sliding", lambda predict, x, size: log_depth):
            numbers = self.numbers(f"depth --data depth --encoder {demo.ENCODER} --size 32 --workers 0 "
                                   "--batch 2 --width 8 --epochs 1")
        errors = np.abs(math.exp(0.5) - np.array([1.5, 6]))
        self.assertAlmostEqual(numbers["RMSE_m"], np.sqrt((errors ** 2).mean()), delta=1e-3)
        self.assertAlmostEqual(numbers["A.Rel"], (errors / [1.5, 6]).mean(), delta=1e-3)
        self.assertEqual(numbers["images"], 1)

    def test_pictures_without_a_known_pixel_do_not_spoil_the_training(self):
        for task, steps in (("segment", "--steps 8"), ("depth", "--epochs 4")):
            write_dense(task, task)
            label = {"segment": "segment/annotations/training/0.png",
                     "depth": "depth/train/room/sync_depth_0.png"}[task]
            Image.fromarray(np.zeros((44, 60), np.uint16 if task == "depth" else np.uint8)).save(label)
            said = ok(f"probe {task} --data {task} --encoder {demo.ENCODER} --size 32 --workers 0 "
                      f"--batch 1 --width 8 --log-every 1 {steps}")
            self.assertIn("loss", said)
            self.assertNotRegex(said, "nan|null")

    def test_sliding_window_covers_every_pixel_once_on_average(self):
        x = torch.randn(1, 3, 77, 64)
        seen = []

        def predict(window):
            seen.append(window.shape[-2:])
            return window * 2

        self.close(probe.sliding(predict, x, 32), 2 * x)
        self.assertEqual((len(seen), set(seen)), (4 * 3, {(32, 32)}))
        starts = []  # the paper's: windows of 512 at a stride of 341
        columns = torch.arange(1194.0).expand(1, 1, 512, -1)
        probe.sliding(lambda w: starts.append(w[0, 0, 0, 0].item()) or w, columns, 512)
        self.assertEqual(starts, [0, 341, 682])

    def test_principal_components_of_an_image_and_of_a_sample(self):
        write_pictures("in", 2)
        self.numbers("pca --demo --class star --rows 2 --columns 3")
        sample_picture = Path("probes/pca.png").read_bytes()
        self.numbers("pca --demo --class star --rows 2 --columns 3 --images in/0.png")
        self.assertNotEqual(Path("probes/pca.png").read_bytes(), sample_picture)
        for columns, times in ((1, 1), (26, 26), (40, 26)):
            with mock.patch("figures.hidden_picture", wraps=figures.hidden_picture) as picture:
                self.numbers(f"pca --demo --rows 1 --columns {columns}")
            self.assertEqual(len(picture.call_args.args[1]), times)
        self.numbers(f"pca --encoder {demo.ENCODER} --size 32 --images in/0.png in/1.png")
        x = torch.randn(50, 1) @ torch.randn(1, 300) * 10 + torch.randn(50, 300)
        for y in (x, x[:, :20]):  # fewer rows than columns, and more
            expected = np.linalg.svd(y.numpy() - y.numpy().mean(0), full_matrices=False)
            np.testing.assert_allclose(figures.principal(y, 2).abs().numpy(),
                                       np.abs(expected[0] * expected[1])[:, :2], rtol=1e-2, atol=1e-2)


# -- The shipped model, and real weights where they are ----------------------------------------------------

class Shipped(Case):
    def test_shipped_model_draws_what_it_is_asked_for(self):
        self.assertLess((ROOT / "demo.pt").stat().st_size, 8e6)
        self.assertIn("demo.pt", ok("sample --steps 5 --num 200"))  # in a bare folder
        classifier, real = demo.train_classifier(steps=400)
        share, each = demo.accuracy(classifier, pictures("samples"), np.arange(200) % 10)
        self.assertGreaterEqual(real, 0.95)
        self.assertGreaterEqual(share, 0.90, f"by class: {each}")


@unittest.skipUnless(REAL.is_dir(), "real weights are not here")
class RealWeights(Case):
    def test_dinov2_tells_real_images_apart(self):
        encoder = svg.load_encoder(REAL / "weights/dinov2_vits14_pretrain.pth")
        self.assertEqual(encoder.name, "dinov2_vits14")

        def features(split, count):
            data = svg.ImageFolder(REAL / "tiny20" / split, 64)
            labels = data.labels
            chosen = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(20)]).tolist()
            x = svg.to_float(torch.from_numpy(np.stack([data[i, 0][0] for i in chosen])), "cpu")
            cls = torch.cat([encoder(part, grid=(8, 8), cls=True)[0] for part in x.split(50)])
            return torch.nn.functional.normalize(cls, dim=1), torch.arange(20).repeat_interleave(count)

        (train, labels), (val, truth) = features("train", 15), features("val", 5)
        self.assertGreater((labels[(val @ train.T).argmax(1)] == truth).float().mean(), 0.5)  # chance is 0.05

    def test_vgg_and_inception_load_and_order_real_images(self):
        lpips = train_ae.LPIPS(REAL / "weights/vgg16-397923af.pth")
        files = svg.list_images(REAL / "tiny20/val")[:2]
        a, b = (svg.to_float(torch.from_numpy(svg.crop(svg.open_rgb(f), 64))[None], "cpu") for f in files)
        noisy = (a + 0.05 * torch.randn_like(a)).clamp(-1, 1)
        self.assertLess(lpips(a, noisy).item(), lpips(a, b).item())
        inception = fid.load_inception(REAL / "weights/pt_inception-2015-12-05-6726825d.pth")
        answers = fid.inception_features(inception, torch.from_numpy(svg.to_uint8(a)))
        self.assertEqual((answers["pool3"].shape, answers["logits"]), ((1, 2048), None))
        self.assertGreater(answers["pool3"].mean(), 0.1)

    def test_dinov2_distance_and_lpips_of_real_files(self):
        for i, file in enumerate(svg.list_images(REAL / "tiny20/val")[:12]):
            os.makedirs("val/a", exist_ok=True)
            os.makedirs("recon/a", exist_ok=True)
            image = svg.open_rgb(file)
            image.save(f"val/a/{i}.png")
            image.save(f"recon/a/{i}.jpg", quality=20)
        where = f"--weights {REAL / 'weights'} --workers 0 --json out.json"
        code, out, err = run(f"fid recon --ref val --features dinov2_vits14_pretrain.pth {where}")
        self.assertEqual(code, 0, err)
        self.assertRegex(out, r"FD-dinov2_vits14 .*CLS token of dinov2_vits14_pretrain.pth \(.*\) on 16x16")
        self.assertRegex(run(f"fid recon --ref val --paired {where}")[1],
                         r"rFID .*PSNR .* \+- .*SSIM.*LPIPS .* \+- ")
        found, lpips = (json.loads(Path("out.json").read_text()),
                        train_ae.LPIPS(REAL / "weights/vgg16-397923af.pth"))
        pairs = [[svg.to_float(torch.from_numpy(np.asarray(svg.open_rgb(f)).copy())[None], "cpu")
                  for f in (f"val/a/{i}.png", f"recon/a/{i}.jpg")] for i in range(12)]
        one_by_one = torch.cat([lpips(*pair) for pair in pairs])
        self.close((found["LPIPS"], found["LPIPS_std"]),
                   (one_by_one.mean().item(), one_by_one.std(correction=0).item()))
        self.assertEqual(found["not_measured"], {})


if __name__ == "__main__":
    unittest.main()
