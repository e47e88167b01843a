"""Python processes that need not import torch and transformers, which takes ten seconds and more each.

A server imports them once and does nothing else; each process is a fork of it, with the arguments, environment,
folder, input and outputs of whoever asked. What it runs (`hf_pretrain_ext` too) it imports itself. `python()` gives
the words to begin a command with, in the place of `sys.executable`; it knows `-c`, `-m` and scripts.

Not for tests of what an interpreter does as it starts (hash seeds, installed packages, threads, memory). Where
environment variables that libraries read as they are imported differ from the server's, HF_DATASETS_CACHE aside, an
interpreter is started after all.

This file is all three: the module that tests import, the server (`serve`), and the client, which imports little.
"""

from __future__ import annotations

import os
import sys

__all__ = ["Warm", "python", "ranks"]

READ_AT_IMPORT = ("CUDA", "DATASETS_", "HF_", "HUGGINGFACE_", "TORCH", "TRANSFORMERS_")
MOVED = ("HF_DATASETS_CACHE",)
"""Read at import too, and set anew in the fork."""
READ_LATER = ("HF_XET_", "TORCHELASTIC_", "TORCHINDUCTOR_", "TORCH_NCCL_")
"""What launchers give to ranks, and what transfers and compilations look at."""


def _decisive(environment):  # type: ignore[no-untyped-def]
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in MOVED and not name.startswith(READ_LATER)
    }


# The client


def _ask(path: str, arguments: list[str]) -> int:
    """Has the server make a process with this one's files, folder and environment; ends as it ends."""
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = json.dumps({"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answers = connection.makefile("r")
        child = int(answers.readline())
        if not child:
            os.execv(sys.executable, [sys.executable, *arguments])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(child, number))
        code = int(answers.readline() or 1)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# The server


def serve(path: str) -> None:
    """Imports, says so, and forks until its standard input is closed."""
    began = _decisive(os.environ)
    sys.path.remove("")
    import gc
    import select
    import signal
    import socket

    import transformers.trainer
    import trl

    # What they import lazily is imported as it is looked up.
    for each in (
        transformers.Trainer,
        transformers.LlamaForCausalLM,
        transformers.AutoModelForCausalLM,
        trl.SFTTrainer,
    ):
        assert each
    # Arrow's allocator has one that is prepared for forks, as in whatever process has imported Arrow.
    threads = sorted(_name_of(number) for number in os.listdir("/proc/self/task") if int(number) != os.getpid())
    if threads not in ([], ["jemalloc_bg_thd"]):
        raise RuntimeError(f"a process with the threads {threads} cannot be forked safely")
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for the processes are not waited for
    print("ready", flush=True)
    while True:
        ready = select.select([listener, 0], [], [])[0]
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection, began)
        connection.close()


def _name_of(thread: str) -> str:
    with open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as file:
        return file.read().strip()


def _attend(connection, began):  # type: ignore[no-untyped-def]
    """In a fork of the server: makes the process, tells its number, waits, tells how it ended."""
    import json
    import select
    import signal
    import socket

    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    length, content = int.from_bytes(size, "big"), b""
    while len(content) < length:
        content += connection.recv(length - len(content))
    request = json.loads(content)
    if _decisive(request["environment"]) != began:
        connection.sendall(b"0\n")
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.closerange(3, 256)
        _become(request)
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())
    watched = os.pidfd_open(child)
    if watched not in select.select([watched, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)  # whoever asked is gone
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(f"{code}\n".encode())
    finally:
        os._exit(0)


def _become(request):  # type: ignore[no-untyped-def]
    """Runs what a new interpreter would run with these arguments, and ends."""
    import atexit
    import random
    import runpy
    import threading
    import traceback
    import types

    import datasets
    import numpy as np

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if cache := os.environ.get(MOVED[0]):
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.config.DOWNLOADED_DATASETS_PATH = os.path.join(cache, "downloads")
        datasets.config.EXTRACTED_DATASETS_PATH = os.path.join(cache, "downloads", "extracted")
    random.seed()
    np.random.seed()
    kind, *rest = request["arguments"]
    if kind == "-u":
        sys.stdout.reconfigure(write_through=True)
        kind, *rest = rest
    given = os.environ.get("PYTHONPATH")
    sys.path[:0] = given.split(os.pathsep) if given else []
    code = 0
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        else:
            sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
            sys.argv = [kind, *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__file__ = kind
            with open(kind, encoding="utf-8") as script:
                exec(compile(script.read(), kind, "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
        sys.exit()
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))


# For tests


class Warm:
    """
    A server, with the environment that its processes must have as far as libraries read it when they are imported.

    Args:
        environment (`dict[str, str]`, *optional*): that of this process by default.
    """

    def __init__(self, environment=None):  # type: ignore[no-untyped-def]
        import subprocess
        import tempfile

        self.process = None
        if sys.platform != "linux":
            return
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.path = os.path.join(self.folder.name, "socket")
        # Left to the forks, the folder of this file would hide modules of the names of tests.
        code = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, __file__, "serve", self.path],
            env={**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.folder.name,
        )
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of tests/warm.py could not be started")

    @property
    def python(self) -> list[str]:
        """The beginning of a command; a plain interpreter where there is no /proc to look into."""
        return [sys.executable, "-I", "-S", __file__, self.path] if self.process else [sys.executable]

    def close(self) -> None:
        if self.process is None:
            return
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.folder.cleanup()


_SERVERS: list[Warm] = []


def python() -> list[str]:
    """The beginning of a command; the server lives as long as this process."""
    import atexit

    if not _SERVERS:
        _SERVERS.append(Warm())
        atexit.register(_SERVERS[0].close)
    return _SERVERS[0].python


def ranks(number: int) -> list[str]:
    """The beginning of a command that starts as many of them, with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "--no-python"]
    return [*python(), *launcher, *python()]
