"""Work shared among processes, in one without the threads that the tests' workers have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, torch
from tinyft.errors import BudgetError, InputError
from tinyft.parallel import apart, in_parallel

signal.signal(signal.SIGTERM, lambda *_: print("stopped"))
factor = 3  # a closure, which no pickle would carry
assert in_parallel(lambda x: x * factor, list(range(20))) == [3 * x for x in range(20)]
assert in_parallel(lambda x: x, [7]) == [7]
assert in_parallel(lambda x: x, []) == []
assert os.getpid() not in in_parallel(lambda _: os.getpid(), [1, 2])
assert apart(os.getpid) != os.getpid()

torch.set_num_threads(2)  # and after this process has used them
expected = float(torch.ones(1 << 20).sum())
assert in_parallel(lambda _: float(torch.ones(1 << 20).sum()), [0, 1]) == [expected] * 2

def fail(x):
    if x:
        raise InputError(f"no {x}")

for work in (lambda: in_parallel(fail, [0, 2]), lambda: apart(lambda: fail(3))):
    try:
        work()
    except InputError as error:
        print(error)

die = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
for work in (lambda: in_parallel(die, [1, 2, 3]), lambda: apart(lambda: die(0))):
    try:
        work()
    except BudgetError as error:
        print("killed" in str(error))

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
assert in_parallel(lambda _: os.getpid(), [1, 2]) == [os.getpid()] * 2
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core"
)
def test_in_parallel():
    """Results in order of any function; errors as they were, a killed worker's, too; workers end
    without a word; no more of them than cores are ours."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("no 2\nno 3\nTrue\nTrue\n", 0), done.stderr
