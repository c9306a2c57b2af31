"""Speed and memory of the programs on random images and untrained models: no data, weights or run needed.

    python bench.py train_dit --model XL --batch 128       # and any other flag of the program
    python bench.py train_ae --batch 32
    python bench.py sample --batch 64 --steps 5
    python bench.py fid --batch 64

Training is the program itself as a user starts it, its loader included: the second of two intervals of ten steps
counts, by its own progress line. Sampling and FID are timed in batches. Prints a line of JSON.
"""
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import fid
import files
import runs
import sample
import svg
import train_ae
import train_dit
from perceptual import LPIPS, Inception, inception_features

# Dense TFLOP/s by the maker's datasheets of the SXM boards.
PEAK_TFLOPS = {
    "H100 80GB HBM3": {"bf16": 989, "tf32": 494.5},
    "H200": {"bf16": 989, "tf32": 494.5},
    "A100-SXM": {"bf16": 312, "tf32": 156},
}
ENCODER = "dinov3_vits16plus"


def write_inputs(folder):
    """Write a packed set of random images, an untrained encoder, autoencoder and VGG16 to a folder."""
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (64, 256, 256, 3), np.uint8))
    np.save(folder / "labels.npy", np.arange(64))
    files.write_json(folder / "classes.json", [str(i) for i in range(1000)])
    vit = svg.ViT(**svg.ENCODERS[ENCODER])
    torch.save({"encoder": {"name": ENCODER, "vit": svg.ENCODERS[ENCODER], "model": vit.state_dict()}},
               folder / "encoder.pt")
    ae = svg.Autoencoder(svg.load_encoder(folder / "encoder.pt"))
    ae.alignment_batches.fill_(1)
    files.save_checkpoint(folder / "ae.pt", ae.to_checkpoint())
    torch.save(LPIPS(None).state_dict(), folder / "vgg16-397923af.pth")


def train(program, flags, inputs):
    """Run a training program for 20 steps; return its images/s and peak memory in GiB."""
    command = [sys.executable, program.__file__, "--data", inputs, "--weights", inputs, "--steps", "1000000000",
               "--log-every", "10", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=inputs) as process:
        for line in process.stdout:
            found = re.match(r"step 20/.* ([\d.]+) images/s .* ([\d.]+) GiB", line)
            if found:
                process.kill()
                return float(found[1]), float(found[2])
    raise files.UserError(f"{' '.join(command)} failed")


def median_rate(step, batch, device, count=5):
    """Return the images/s of step(), a batch of images, and the peak memory in GiB."""
    seconds = []
    for _ in range(count + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return batch / float(np.median(seconds[2:])), runs.peak_gib(device)


def training_flops(program, args):
    """Return the floating-point operations of a training step for one image, counted on shapes alone."""
    encoder = svg.Encoder(svg.ViT(**svg.ENCODERS[ENCODER]), ENCODER, "")
    if program is train_ae:
        ae = train_ae.build_autoencoder(encoder, args).eval().to("meta")
        lpips, disc = LPIPS(None).to("meta"), train_ae.PatchDiscriminator().to("meta")
    else:
        ae = svg.Autoencoder(encoder).eval().to("meta")
        sit = svg.SiT(args.model).to("meta")
    x = torch.empty(1, 3, ae.image_size, ae.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        if program is train_ae:
            y = ae(x, torch.empty(1, dtype=torch.bool, device="meta"))
            nll, _, _ = train_ae.reconstruction_loss(x, y, lpips, 1.0)
            last = ae.decoder.conv_out.weight
            y.backward(train_ae.generator_gradient(y, nll, -disc(y).mean(), 0.5, last))
            train_ae.hinge_loss(disc(x), disc(y.detach())).backward()
        else:
            with torch.no_grad():
                latents = ae.encode(x)
            u = torch.empty(1, device="meta")
            svg.flow_loss(sit, latents, u.long(), 0.4, u, torch.empty_like(latents)).sum().backward()
    return counter.get_total_flops()


def time_sampling(args, device):
    """Return images/s and GiB of sampling, by --ckpt or by untrained models of the size XL."""
    if args.ckpt:
        sit, ae, _ = sample.find_models(args, device)
    else:
        sit = svg.SiT("XL").to(device).eval()
        sit.set_latent_stats(torch.zeros(sit.channels), torch.ones(sit.channels))
        ae = svg.Autoencoder(None, feature_channels=384).to(device).eval()
    if args.compile:
        runs.compile_blocks(sit)
        ae.decoder.compile(dynamic=False)
    noise = svg.sample_noise(0, range(args.batch), (sit.grid ** 2, sit.channels)).to(device)
    y = torch.arange(args.batch, device=device) % sit.num_classes
    return median_rate(lambda: sample.images_of(sit, ae, noise, y, args), args.batch, device)


def time_fid(args, device):
    """Return images/s and GiB of Inception features and their moments, of images of 256 pixels."""
    model = Inception().eval().requires_grad_(False).to(device)
    images = torch.randint(256, (args.batch, 256, 256, 3), dtype=torch.uint8)
    return median_rate(lambda: fid.moments(inception_features(model, images)["pool3"]), args.batch, device)


def main():
    """Time the program that the first argument names; the other flags are that program's."""
    programs = {"train_ae": train_ae, "train_dit": train_dit, "sample": sample, "fid": fid}
    if len(sys.argv) < 2 or sys.argv[1] not in programs:
        raise files.UserError(f"name one of {', '.join(programs)}, then its flags\n{__doc__}")
    name = sys.argv.pop(1)
    flags = sys.argv[1:]
    args = programs[name].parse_args()  # of the same flags
    device = runs.setup(args.precision)
    tflops = None
    if name == "sample":
        rate, gib = time_sampling(args, device)
    elif name == "fid":
        rate, gib = time_fid(args, device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder))
            if "--ae" not in flags and name == "train_dit":
                flags += ["--ae", "ae.pt"]
            if "--encoder" not in flags and name == "train_ae":
                flags += ["--encoder", "./encoder.pt"]
            rate, gib = train(programs[name], flags, folder)
        tflops = rate * training_flops(programs[name], args) / 1e12
    peaks = [peaks for board, peaks in PEAK_TFLOPS.items() if board in runs.device_name(device)]
    share = tflops / peaks[0][args.precision] if tflops and peaks and args.precision in peaks[0] else None
    print(json.dumps({"program": name, "flags": " ".join(flags), "precision": args.precision,
                      "compile": args.compile, "device": runs.device_name(device), "torch": torch.__version__,
                      "images_per_second": rate, "tflops": tflops, "peak_share": share, "peak_gib": gib}))


if __name__ == "__main__":
    runs.run_main(main)
