"""The numeric tests as other processors run them: with narrower vectors, and with more threads.

    make test-cpus
    .venv/bin/python tests/cpus.py --only avx2:2        # one of the runs; what follows goes to pytest

What comes out of a sum depends on the order in which it is added up, and that on the width of a processor's vectors and
on the threads that share the work. `make test` runs everything in one way, this machine's own with one thread.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("tests/merging", "tests/models", "tests/training")
# about files, names and processes; what is trained in `test_routers.py` takes as long as all the rest
LEFT_OUT = (
    *(f"tests/merging/test_{name}*.py" for name in ("adapters", "fuzz", "hostile", "layer", "outcome", "slices")),
    *(f"tests/merging/engine/test_{name}.py" for name in ("interrupted", "processes")),
    *("tests/merging/mergekit/*.py", "tests/merging/tokenizers/test_token*.py"),
    *("tests/models/*_published.py", "tests/models/test_shown.py", "tests/training/test_routers.py"),
)
# vectors, as ATEN_CPU_CAPABILITY knows them, and threads: all of both, not all pairs
RUNS = (("default", 1), ("avx2", 1), ("avx512", 1), ("avx2", 2), ("default", 4))
# vectors -> what keeps the libraries under torch to them as well
WIDTHS = {
    "default": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}


def main() -> int:
    """Runs one after the other; 1 if any of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WIDTH:THREADS")
    parser.add_argument(
        "--workers", type=int, default=2, help="test processes of one thread each; fewer with more threads"
    )
    args, more = parser.parse_known_args()
    known, failed = list(WIDTHS), []
    widest = known.index(widest_here())
    for width, threads in RUNS:
        name = f"{width}:{threads}"
        if args.only and name not in args.only:
            continue
        if known.index(width) > widest:
            print(f"{name}: skipped, this processor has no {width}", flush=True)
            continue
        workers = max(1, args.workers // threads)
        began, used = time.perf_counter(), cpu_seconds()
        if pytest(width, threads, ["-n", str(workers), "--dist", "loadfile", *more]):
            failed.append(name)
        spent = f"{time.perf_counter() - began:.0f} s, {cpu_seconds() - used:.0f} s of CPU"
        print(f"{name}: {'failed' if name in failed else 'passed'} in {spent}", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "green on all")
    return bool(failed)


def cpu_seconds() -> float:
    """CPU time of all runs so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def widest_here() -> str:
    """What torch takes on this processor; asked for more, it would run into instructions that are not there."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    given = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    found = subprocess.run([sys.executable, "-c", code], env=given, check=True, capture_output=True, text=True)
    name = found.stdout.strip().lower()
    return name if name in WIDTHS else "default"


def pytest(width: str, threads: int, options: list[str]) -> int:
    """The exit status of the numeric tests."""
    command = [sys.executable, "-m", "pytest", *FOLDERS, *(f"--ignore-glob=*{name}" for name in LEFT_OUT), *options]
    env = {**os.environ, **WIDTHS[width], "ATEN_CPU_CAPABILITY": width, "OMP_NUM_THREADS": str(threads)}
    env["OMP_WAIT_POLICY"] = "passive"  # threads that wait for a core must not keep one busy
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
