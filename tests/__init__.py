"""The tests by subject; `python -m unittest` runs as many modules side by side as there are cores."""
import concurrent.futures
import multiprocessing
import os
import unittest
from pathlib import Path

import torch

FIRST = ("test_golden", "test_training", "test_fid")  # the longest


class Recorder(unittest.TestResult):
    """Also keeps the names of the tests that began."""

    def __init__(self):
        super().__init__()
        self.began = []

    def startTest(self, test):
        super().startTest(test)
        self.began.append(test.id())


def run_suite(number):
    """In a forked process: run a suite; return its tests' names, and (kind, name, text) of trouble."""
    torch.set_num_threads(1)
    record = Recorder()
    SideBySide.suites[number].run(record)
    kinds = {"Failure": record.failures, "Error": record.errors, "Skip": record.skipped}
    return record.began, [(kind, getattr(test, "test_case", test).id(), text)  # a subtest's has a test_case
                          for kind, found in kinds.items() for test, text in found]


class SideBySide(unittest.TestSuite):
    """Suites that run in processes of their own, forked from this one; their results are reported here."""
    suites = ()

    def run(self, result, debug=False):
        SideBySide.suites = list(self)
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fork) as pool:
            numbers = {pool.submit(run_suite, i): i for i in range(len(self.suites))}
            for future in concurrent.futures.as_completed(numbers):
                began, trouble = future.result()
                for name in [*began, *sorted({name for _, name, _ in trouble} - set(began))]:
                    test = unittest.suite._ErrorHolder(name)  # has a name, and nothing to run
                    result.startTest(test)
                    found = [(kind, text) for kind, whose, text in trouble if whose == name]
                    for kind, text in found:
                        reason = text if kind == "Skip" else (AssertionError, AssertionError(text), None)
                        getattr(result, f"add{kind}")(test, reason)
                    if not found:
                        result.addSuccess(test)
                    result.stopTest(test)
        return result


def load_tests(loader, tests, pattern):
    """Called by unittest for the whole package."""
    names = [path.stem for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    names.sort(key=lambda name: name not in FIRST)
    return SideBySide(loader.loadTestsFromName(f"tests.{name}") for name in names)
