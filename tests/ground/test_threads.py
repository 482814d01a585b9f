"""How threads wait, and how many there are, is set before torch loads; the user's word wins."""

import os
import subprocess
import sys

from infogrowth.threads import cpu_limit

import pytest

WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
SHOW = f"""
import os, sys
import infogrowth
assert "torch" not in sys.modules
print(*[os.environ.get(name) for name in {WAITING}])
"""


def environment(**given):
    kept = {n: v for n, v in os.environ.items() if n not in (*WAITING, "OMP_NUM_THREADS")}
    return {**kept, **given}


def waiting(**given):
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment(**given), capture_output=True, text=True
    )
    return done.stdout.split()


def test_waiting_is_short_unless_the_user_has_chosen():
    assert waiting() == ["1000", "1", "None"]
    assert waiting(OMP_WAIT_POLICY="active") == ["None", "None", "active"]
    assert waiting(GOMP_SPINCOUNT="7") == ["7", "None", "None"]
    assert waiting(KMP_BLOCKTIME="9") == ["None", "9", "None"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP prints its settings on Linux")
@pytest.mark.parametrize("program", ["import infogrowth, torch", "import infogrowth.cli, torch"])
def test_the_runtime_that_torch_loads_reads_the_setting(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(OMP_DISPLAY_ENV="verbose"),
        capture_output=True,
        text=True,
    )
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


def test_as_many_threads_as_the_container_may_use(tmp_path):
    own = tmp_path / "own"
    inner = tmp_path / "pod" / "box"
    inner.mkdir(parents=True)

    def limit(version_two, outer_group, inner_group):
        own.write_text(
            f"0::/{inner.relative_to(tmp_path)}\n" if version_two else "4:cpu,cpuacct:/\n"
        )
        (tmp_path / "pod" / "cpu.max").write_text(outer_group)
        (inner / "cpu.max").write_text(inner_group)
        return cpu_limit(tmp_path, own)

    assert limit(True, "max 100000", "max 100000") is None
    assert limit(True, "100000 100000", "max 100000") == (1 if (os.cpu_count() or 1) > 1 else None)
    assert limit(True, "max 100000", "50000 100000") == 1  # half a core is still one thread
    assert limit(True, "max 100000", "99900000 100000") is None  # more than there are
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert limit(False, "", "") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert limit(False, "", "") == 1
    assert cpu_limit(tmp_path, tmp_path / "missing") is None
