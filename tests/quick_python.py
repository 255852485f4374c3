"""Fresh interpreters without the seconds of their first imports.

A template process imports the large libraries that know neither Hub nor transformers, and is forked for each run. All
that reads the environment when it is imported (huggingface_hub, transformers, datasets, peft), and hf_fusion itself, is
imported in the fork: there an endpoint, an empty cache or a library that is absent count as in any new process. What
tests the start of an interpreter (its hash seed, PYTHONPATH, what ``--help`` imports) starts one by `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.data"),
    *("numpy", "pandas", "pyarrow.dataset", "scipy.stats", "sklearn.metrics", "PIL.Image"),
    *("safetensors.torch", "tokenizers", "httpx", "jinja2", "yaml", "regex", "requests"),
)
UNTOUCHED = ("huggingface_hub", "transformers", "datasets", "peft", "accelerate", "hf_fusion")

_lock = threading.Lock()
_template: subprocess.Popen[str] | None = None


def run_python(
    *arguments: str, env: dict[str, str], cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in a fork of the template.

    Args:
        arguments: ``-c CODE``, ``-m MODULE`` or the path of a script, then the arguments of the program.
        env: the whole environment.
        cwd: the working directory.
        timeout: in seconds; the process is killed after them.
    """
    global _template
    with _lock, tempfile.TemporaryDirectory() as folder:
        if _template is None or _template.poll() is not None:
            command = [sys.executable, __file__]
            started = {**os.environ, "OMP_NUM_THREADS": "1"}
            _template = subprocess.Popen(command, env=started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = {name: Path(folder, name) for name in ("stdout", "stderr")}
        request = {"arguments": arguments, "env": env, "cwd": str(cwd), **{name: str(said[name]) for name in said}}
        pid = int(_ask(_template, request))
        late = threading.Event()
        watch = threading.Timer(timeout, lambda: (late.set(), os.kill(pid, signal.SIGKILL)))
        watch.start()
        code = int(_template.stdout.readline())
        watch.cancel()
        out, err = (said[name].read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
        if late.is_set():
            raise subprocess.TimeoutExpired(arguments, timeout, out, err)
        return subprocess.CompletedProcess(["python", *arguments], code, out, err)


def _ask(template: subprocess.Popen[str], request: dict[str, Any]) -> str:
    assert template.stdin is not None and template.stdout is not None
    template.stdin.write(json.dumps(request) + "\n")
    template.stdin.flush()
    return template.stdout.readline()


def _forked() -> dict[str, Any] | None:
    """Serves requests; comes back in each fork, with its request, and at the end in the template, with None."""
    for name in PRELOADED:
        __import__(name)
    touched = [name for name in UNTOUCHED if name in sys.modules]
    assert not touched, f"{touched} would not be fresh"
    gc.freeze()  # a fork that looks for garbage would copy what it shares with the template
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        _tell(pid)
        _tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def _tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _become(request: dict[str, Any]) -> None:
    """Makes a fork the process that was requested, and runs its program."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - the template's has read ahead
    first, *rest = request["arguments"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.path[0], sys.argv = str(Path.cwd()), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _end(request: dict[str, Any]) -> NoReturn:
    """Runs the program and ends as an interpreter does, but for freeing each object, which takes a second."""
    status: Any = 0
    try:
        _become(request)
    except SystemExit as done:
        status = done.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 255)


if __name__ == "__main__" and (wanted := _forked()):
    _end(wanted)
