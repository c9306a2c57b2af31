"""Files: atomic writes, fingerprints."""
import copy
import json
import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import files
import runs
import svg
from files import UserError
from tests.helpers import Case


class Files(Case):
    def test_failed_write_leaves_the_old_checkpoint_and_nothing_else(self):
        svg.save_checkpoint("last.pt", {"step": 1})

        def full_disk(checkpoint, f):
            f.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")

        with mock.patch("torch.save", full_disk), self.assertRaisesRegex(UserError, "last.pt.*No space"):
            svg.save_checkpoint("last.pt", {"step": 2})
        self.assertEqual((svg.load_checkpoint("last.pt"), os.listdir()), ({"step": 1}, ["last.pt"]))

    def test_a_full_disk_is_named_whatever_torch_says(self):
        def torch_says(checkpoint, file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

        with mock.patch("torch.save", torch_says), self.assertRaisesRegex(UserError, "no space left"):
            svg.save_checkpoint("last.pt", {})

    def test_pictures_appear_whole_or_not_at_all(self):
        with mock.patch("PIL.Image.Image.save", lambda _, file, kind, **more: file.write(b"half") / 0), \
                self.assertRaises(ZeroDivisionError):
            files.save_image("a/0.png", np.zeros((4, 4, 3), np.uint8))
        self.assertEqual(os.listdir("a"), [])

    def test_pictures_of_threads_are_all_there_at_the_end_and_their_errors_are_raised(self):
        pictures = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
        with files.image_threads() as save_image:
            for i, picture in enumerate(pictures):
                save_image(f"out/{i}.png", picture)
        self.assertTrue(all((np.asarray(Image.open(f"out/{i}.png")) == pictures[i]).all()
                            for i in range(100)))
        Path("file").write_text("no folder")
        with self.assertRaises(FileExistsError), files.image_threads() as save_image:
            save_image("file/0.png", pictures[0])
        saved = []

        def slow(path, image):
            time.sleep(0.05)
            saved.append(path)

        with mock.patch("files.save_image", slow), self.assertRaises(KeyboardInterrupt), \
                files.image_threads() as save_image:
            for i in range(12):
                save_image(f"{i}.png", pictures[0])
            raise KeyboardInterrupt
        self.assertLess(len(saved), 12)  # those that had not begun are left out

    def test_what_is_computed_ahead_comes_in_order_with_its_errors(self):
        started = []

        def square(n):
            started.append(n)
            return n * n

        results = runs.computed_ahead(square, range(5))
        self.assertEqual(next(results), 0)
        while len(started) < 2:
            time.sleep(0.01)
        self.assertEqual(started, [0, 1])  # one ahead and no more
        self.assertEqual(list(results), [1, 4, 9, 16])
        self.assertEqual(list(runs.computed_ahead(square, [])), [])
        with self.assertRaises(ZeroDivisionError):
            list(runs.computed_ahead(lambda n: 1 // n, [1, 0]))

    def test_a_safetensors_file_keeps_nested_dicts_tensors_and_the_rest(self):
        checkpoint = {"a": {"w": torch.arange(6.0).view(2, 3).half(), "n": torch.tensor(3), "text": "x"},
                      "classes": ["one", "two"], "empty": {}}
        svg.save_checkpoint("all.safetensors", checkpoint)
        self.assert_same(svg.load_checkpoint("all.safetensors"), checkpoint)
        data = Path("all.safetensors").read_bytes()  # as other readers see it
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + length])
        self.assertEqual(length % 8, 0)
        self.assertEqual(header["a/w"], {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]})
        self.assertEqual(data[8 + length:][:12], checkpoint["a"]["w"].numpy().tobytes())

    def test_fingerprint_changes_with_one_weight_and_not_with_the_file(self):
        a = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)}
        half = {k: v.half() for k, v in reversed(a.items())}
        self.assertEqual(files.fingerprint(a), files.fingerprint(half))
        b = copy.deepcopy(a)
        b["w"][1, 2] += 1e-5
        self.assertEqual(len({files.fingerprint(x) for x in (a, b, {"w": a["w"].T, "b": a["b"]})}), 3)
