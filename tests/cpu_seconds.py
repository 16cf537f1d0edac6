"""A pytest plugin that says which tests take the suite's time: `pytest -p cpu_seconds --cpu-seconds 20`.

Seconds by the clock depend on what else the machine does. Counted is the processor's time, of a test with its fixtures
and of the processes that it started.
"""

import contextlib
import os
import resource
from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-seconds", type=int, metavar="N", help="list the N files and the N tests that took most processor time"
    )


def used():
    """Processor seconds of this process and of all that it has started."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent) + _of_children(os.getpid())


def _of_children(pid):
    """Of those that still run, such as the server that others are forked from, with their own that have ended."""
    seconds = 0.0
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):  # it ends meanwhile
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + _of_children(child)
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.cpu_began = used()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.cpu_seconds = used() - item.cpu_began  # travels from an xdist worker with the report
    return report


def pytest_terminal_summary(terminalreporter, config):
    count = config.getoption("--cpu-seconds")
    if not count:
        return
    tests, files = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "cpu_seconds"):
                tests[report.nodeid] += report.cpu_seconds
                files[report.nodeid.partition("::")[0]] += report.cpu_seconds
    terminalreporter.section(f"processor seconds: {tests.total():.0f}")
    for spent in (files, tests):
        for name, seconds in spent.most_common(count):
            terminalreporter.line(f"{seconds:8.1f}  {name}")
        terminalreporter.line("")
