"""Speed and memory of the programs on random images and untrained models: no data, weights or run needed.

    python -m lab.bench train_dit --model XL --batch 128       # and any other flag of the program
    python -m lab.bench train_ae --batch 32
    python -m lab.bench sample --batch 64 --steps 5
    python -m lab.bench fid --batch 64

Training is the program itself as a user starts it, its loader included: the second of two intervals of ten
steps counts, by its own progress line. Sampling writes --num pictures. Prints a line of JSON.
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

import fid
import sample
import svg
import train_ae
import train_dit
from lib import files, runs
from lib.perceptual import LPIPS, Inception, inception_features

PROGRAMS = {"train_ae": train_ae, "train_dit": train_dit, "sample": sample, "fid": fid}
ENCODER = "dinov3_vits16plus"


def write_inputs(folder):
    """Write a packed set of random images, an untrained encoder, autoencoder and VGG16 to a folder."""
    rng = np.random.default_rng(0)
    # 256 of them, in whole batches, or the last one, of another shape, would be compiled too.
    np.save(folder / "images.npy", rng.integers(0, 256, (256, 256, 256, 3), np.uint8))
    np.save(folder / "labels.npy", np.arange(256))
    files.write_json(folder / "classes.json", [str(i) for i in range(1000)])
    config = svg.ENCODERS[ENCODER]
    weights = {"name": ENCODER, "vit": config, "model": svg.ViT(**config).state_dict()}
    files.save_checkpoint(folder / "encoder.pt", {"encoder": weights})
    ae = svg.Autoencoder(svg.load_encoder(folder / "encoder.pt"))
    ae.alignment_batches.fill_(1)
    files.save_checkpoint(folder / "ae.pt", ae.to_checkpoint())
    files.save_checkpoint(folder / "vgg16-397923af.pth", LPIPS(None).state_dict())


def time_training(name, flags):
    """Return images/s and peak memory in GiB of 20 steps of a training program."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        inputs = ["--ae", "ae.pt"] if name == "train_dit" else ["--encoder", "./encoder.pt"]
        command = [sys.executable, PROGRAMS[name].__file__, "--data", folder, "--weights", folder, *inputs,
                   "--steps", "1000000000", "--log-every", "10", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
            for line in process.stdout:
                found = re.match(r"step 20/.* ([\d.]+) images/s .* ([\d.]+) GiB", line)
                if found:
                    process.kill()
                    return float(found[1]), float(found[2])
    raise files.UserError(f"{name} {' '.join(flags)} failed")


def time_sampling(args, device):
    """Return images/s and peak memory in GiB of --num samples, written to files.

    The models are those of --ckpt, or untrained ones of the size XL.
    """
    if args.ckpt:
        sit, ae, _ = sample.find_models(args, device)
    else:
        sit = svg.SiT("XL").to(device).eval()
        sit.set_latent_stats(torch.zeros(sit.channels), torch.ones(sit.channels))
        ae = svg.Autoencoder(None, feature_channels=384).to(device).eval()
    if args.compile:
        sample.compile_models(sit, ae)
    with tempfile.TemporaryDirectory() as folder:
        for num in (args.batch, args.num):  # the first batch is slower
            start = time.perf_counter()
            args.num = num
            sample.write_images(sit, ae, range(sit.num_classes), Path(folder), args, device)
    return args.num / (time.perf_counter() - start), runs.peak_gib(device)


def time_fid(args, device):
    """Return images/s and peak memory in GiB of Inception features and moments of images of 256 pixels."""
    model = Inception().eval().requires_grad_(False).to(device)
    images = torch.randint(256, (args.batch, 256, 256, 3), dtype=torch.uint8)
    for batch in range(7):
        if batch == 2:
            start = time.perf_counter()
        fid.moments(inception_features(model, images)["features"])[1].cpu()  # waits for the device
    return 5 * args.batch / (time.perf_counter() - start), runs.peak_gib(device)


def main():
    """Time the program that the first argument names; the other flags are that program's."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        raise files.UserError(f"name one of {', '.join(PROGRAMS)}, then its flags")
    name = sys.argv.pop(1)
    args = PROGRAMS[name].parse_args()
    settings = {"precision": "fp32", "compile": False, **vars(args)}
    device = runs.setup(settings["precision"])
    if name == "sample":
        rate, gib = time_sampling(args, device)
    elif name == "fid":
        rate, gib = time_fid(args, device)
    else:
        rate, gib = time_training(name, sys.argv[1:])
    print(json.dumps({"program": name, "images_per_second": rate, "peak_gib": gib,
                      "device": runs.device_name(device), **settings}, default=str))


if __name__ == "__main__":
    runs.run_main(main)
