"""``python -m …`` as a user runs it, but forked off a process that has imported the libraries, which takes ten seconds.

Reads orders from standard input, a JSON object a line, and answers each with the exit code. It imports nothing of this project
and computes nothing, so a fork is what a new interpreter is after those imports. ``tests.conftest.run`` starts it.
"""

import importlib
import json
import os
import runpy
import signal
import sys

LIBRARIES = (
    "monai.bundle",
    "monai.handlers",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "itk",
    "fire",
)


def main() -> None:
    """Fork for each order; in the fork, return when the module is through."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def become(words: list[str], cwd: str, environment: dict[str, str], output: list[str], timeout: int) -> None:
    """Turn this process into ``python -m <words>``.

    Args:
        words: the module's name and its arguments.
        cwd: working directory.
        environment: all variables; those that libraries read when imported have no effect.
        output: files for standard output and standard error.
        timeout: seconds after which the process is killed by SIGALRM.
    """
    signal.alarm(timeout)
    for descriptor, file in enumerate((os.devnull, *output)):
        opened = os.open(file, os.O_WRONLY if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [cwd, *paths]  # in place of this file's folder
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
