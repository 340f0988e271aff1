"""Slow: a training that is killed again and again ends where the uninterrupted one ends."""

import pytest
from conftest import run


@pytest.mark.slow
def test_killed_runs_end_where_uninterrupted_ones_do(folder):
    ran = run("tests/kill.py", folder, limit=1500)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert int(ran.stdout.split()[-2]) >= 20, ran.stdout
