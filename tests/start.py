"""A program as a process of its own, by its module's name: python tests/start.py train_ae --demo."""
import importlib
import sys

import train_ae
import train_dit
from lib import runs

train_ae.ALIGNMENT_IMAGES = 16
train_dit.LATENT_IMAGES = 64
program = importlib.import_module(sys.argv.pop(1))
sys.argv[0] = f"{program.__name__}.py"
runs.run_main(program.main)
