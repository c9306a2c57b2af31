"""The tests by subject; `python -m unittest` runs as many modules side by side as there are cores."""
import concurrent.futures
import multiprocessing
import os
import unittest
from pathlib import Path

import torch

LONGEST_FIRST = ("test_golden", "test_training", "test_fid", "test_probe", "test_input")


class Recorder(unittest.TestResult):
    """outcomes: {test's name: [(method of a TestResult, text)]}, empty lists for those that passed."""

    def __init__(self):
        super().__init__()
        self.outcomes = {}

    def startTest(self, test):
        super().startTest(test)
        self.outcomes[test.id()] = []


def run_suite(number):
    """In a forked process: run one suite and return its outcomes."""
    torch.set_num_threads(1)
    record = Recorder()
    SideBySide.suites[number].run(record)
    found = {"addFailure": record.failures, "addError": record.errors, "addSkip": record.skipped}
    for method, tests in found.items():
        for test, text in tests:
            name = getattr(test, "test_case", test).id()  # a subtest's has a test_case
            record.outcomes.setdefault(name, []).append((method, text))
    return record.outcomes


class SideBySide(unittest.TestSuite):
    """Suites that run in processes of their own, forked from this one; their results are reported here."""
    suites = ()

    def run(self, result, debug=False):
        SideBySide.suites = list(self)
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fork) as pool:
            futures = [pool.submit(run_suite, i) for i in range(len(self.suites))]
            for future in concurrent.futures.as_completed(futures):
                for name, outcomes in future.result().items():
                    test = unittest.suite._ErrorHolder(name)  # a test's name without the test
                    result.startTest(test)
                    for method, text in outcomes:
                        reason = text if method == "addSkip" else (AssertionError, AssertionError(text), None)
                        getattr(result, method)(test, reason)
                    if not outcomes:
                        result.addSuccess(test)
                    result.stopTest(test)
        return result


def load_tests(loader, tests, pattern):
    """Called by unittest for the whole package."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    names = dict.fromkeys([*LONGEST_FIRST, *found])
    return SideBySide(loader.loadTestsFromName(f"tests.{name}") for name in names)
