"""The shipped model."""
import functools
from unittest import mock

from lab import demo
from tests.helpers import ROOT, Case, ok, pictures


class Shipped(Case):
    @mock.patch("lab.demo.pictures", functools.cache(demo.pictures))  # drawn once for three judgements
    def test_shipped_model_draws_what_it_is_asked_for_by_a_judge_that_is_not_fooled(self):
        self.assertLess((ROOT / "demo.pt").stat().st_size, 8e6)
        self.assertIn("demo.pt", ok("sample --steps 5 --num 200"))  # in a bare folder
        self.assertGreaterEqual(demo.judge(pictures("samples")), 0.90)
        real = demo.pictures("shapes://val", 200)
        self.assertGreaterEqual(demo.judge(real), 0.95)
        self.assertLess(demo.judge(real[range(-1, 199)]), 0.1)  # each asked for another class
