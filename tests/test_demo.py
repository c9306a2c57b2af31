"""The shipped models."""
from lab import demo
from tests.helpers import ROOT, Case, ok, pictures


class Shipped(Case):
    def test_shapes_are_what_was_asked_for_by_a_judge_that_is_not_fooled(self):
        self.assertIn("demo.pt", ok("sample --steps 5 --num 200"))  # in a bare folder
        self.assertGreaterEqual(demo.judge(pictures("samples")), 0.90)
        real = demo.pictures("shapes://val", 200)
        self.assertGreaterEqual(demo.judge(real), 0.95)
        self.assertLess(demo.judge(real[range(-1, 199)]), 0.1)  # each asked for another class

    def test_photographs_are_drawn_by_the_names_of_their_classes(self):
        ok(f"sample --ckpt {ROOT / 'photos.pt'} --classes jellyfish pizza --num 2 --steps 5")
        red, _, blue = pictures("samples").mean((1, 2)).T
        self.assertTrue(red[0] + 50 < blue[0] and blue[1] + 50 < red[1], (red, blue))
