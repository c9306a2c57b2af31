"""Files: atomic writes, fingerprints."""
import os
from pathlib import Path
from unittest import mock

import torch

from lib import files
from lib.files import UserError
from tests.helpers import Case


class FullDisk:
    """A part of a checkpoint, or a picture, whose writing fails halfway."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error

    def save(self, file, kind, **settings):
        file.write(b"half")
        raise self.error


class Files(Case):
    def test_failed_write_leaves_the_old_checkpoint_and_nothing_else(self):
        files.save_checkpoint("last.pt", {"step": 1})
        for error, words in ((OSError(28, "No space left on device"), "last.pt.*No space"),
                             (RuntimeError("inline_container.cc: unexpected pos 64 vs 0"), "no space left")):
            with self.assertRaisesRegex(UserError, words):
                files.save_checkpoint("last.pt", {"model": torch.ones(9), "step": FullDisk(error)})
            self.assertEqual((files.load_checkpoint("last.pt"), os.listdir()), ({"step": 1}, ["last.pt"]))

    def test_a_link_at_the_temporary_name_is_not_followed(self):
        Path("mine").write_text("precious")
        os.symlink("mine", f".x.json.{os.getpid()}.tmp")
        files.write_json("x.json", {"a": 1})
        self.assertEqual((Path("mine").read_text(), files.read_json("x.json")), ("precious", {"a": 1}))
        self.assertEqual(sorted(os.listdir()), ["mine", "x.json"])

    def test_pictures_appear_whole_or_not_at_all(self):
        self.assertRaises(KeyboardInterrupt, files.save_image, "a/0.png", FullDisk(KeyboardInterrupt()))
        self.assertEqual(os.listdir("a"), [])

    def test_what_fails_in_reading_names_the_file_and_a_debugger_sees_it(self):
        for error, kind, words, environment in (
                (KeyError("egg"), UserError, "x.pt: not a cake .KeyError: 'egg'.: damaged, or another", {}),
                (UserError("as it is"), UserError, "^as it is$", {}),
                (KeyError("egg"), KeyError, "egg", {"SVG_DEBUG": "1"})):
            with mock.patch.dict(os.environ, environment), self.assertRaisesRegex(kind, words), \
                    files.reading("x.pt", "a cake"):
                raise error

    def test_fingerprint_changes_with_one_weight_and_not_with_the_file(self):
        a = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)}
        self.assertEqual(files.fingerprint(a), files.fingerprint({k: a[k].half() for k in reversed(a)}))
        b = {**a, "w": a["w"] + torch.tensor([[0, 0, 0], [0, 0, 1e-5]])}
        self.assertEqual(len({files.fingerprint(x) for x in (a, b, {"w": a["w"].T, "b": a["b"]})}), 3)
