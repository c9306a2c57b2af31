"""Files: atomic writes, fingerprints."""
import copy
import os
from unittest import mock

import numpy as np
import torch

import svg
from lib import files
from lib.files import UserError
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

    def test_what_fails_in_reading_names_the_file_and_a_debugger_sees_it(self):
        with self.assertRaisesRegex(UserError, "x.pt: not a cake .KeyError: 'egg'.: damaged, or another"), \
                files.reading("x.pt", "a cake"):
            {}["egg"]
        with self.assertRaisesRegex(UserError, "^as it is$"), files.reading("x.pt", "a cake"):
            raise UserError("as it is")
        with mock.patch.dict(os.environ, SVG_DEBUG="1"), self.assertRaises(KeyError), \
                files.reading("x.pt", "a cake"):
            {}["egg"]

    def test_fingerprint_changes_with_one_weight_and_not_with_the_file(self):
        a = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)}
        half = {k: v.half() for k, v in reversed(a.items())}
        self.assertEqual(files.fingerprint(a), files.fingerprint(half))
        b = copy.deepcopy(a)
        b["w"][1, 2] += 1e-5
        self.assertEqual(len({files.fingerprint(x) for x in (a, b, {"w": a["w"].T, "b": a["b"]})}), 3)
