"""The shipped model."""


import demo
from tests.helpers import ROOT, Case, ok, pictures


class Shipped(Case):
    def test_shipped_model_draws_what_it_is_asked_for(self):
        self.assertLess((ROOT / "demo.pt").stat().st_size, 8e6)
        self.assertIn("demo.pt", ok("sample --steps 5 --num 200"))  # in a bare folder
        classifier, real = demo.train_classifier(steps=400)
        share, each = demo.accuracy(classifier, pictures("samples"))
        self.assertGreaterEqual(real, 0.95)
        self.assertGreaterEqual(share, 0.90, f"by class: {each}")
