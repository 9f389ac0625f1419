"""The command line, ``python -m tools <command>``: finds the command, checks its flags, prints errors as one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import signal
import sys

COMMANDS = {
    "new_pretraining": "a copy of a pre-training bundle for the labels of an nnU-Net dataset",
    "new_task": "a bundle that fine-tunes one task from a starting point",
    "diff": "the task vector between a starting point and a specialist",
    "merge": "task vectors and their starting point into one bundle",
    "inspect": "what a bundle or a task vector is: lineage, labels, sizes, norms, conflicts",
    "evaluate": "Dice per case and class on a labelled dataset, and pictures",
    "vendor": "keep the Python in every bundle's scripts/ equal to tools/bundle_code",
    "phantom": "write the procedural CT dataset",
    "demo": "the whole chain in one go, printing each command it runs",
}


def main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: python -m tools <command> [--help] [--debug]\n")
        print("\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items()))
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"error: no command {name!r}{_nearest(name, COMMANDS)}; see python -m tools --help", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished output is removed
    command = getattr(importlib.import_module(f"tools.{name}"), name)
    from tools.errors import UserError

    try:
        if not any(argument in ("-h", "--help") for argument in arguments):
            _check_flags(command, arguments[1:])
        import fire

        os.environ.setdefault("PAGER", "cat")
        fire.Fire(command, command=arguments[1:], name=f"python -m tools {name}", serialize=lambda _: None)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; unfinished output was removed", file=sys.stderr)
        return 130
    except (UserError, OSError, ValueError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _check_flags(command, arguments: list[str]) -> None:
    """Refuse an unknown flag before anything runs; fire would run the command first and complain afterwards."""
    from tools.errors import UserError

    known = inspect.signature(command).parameters
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument[2:].split("=")[0].replace("-", "_")
            if flag not in known and flag.removeprefix("no") not in known:
                raise UserError(
                    f"unknown flag --{flag}{_nearest(flag, known)}; see python -m tools {command.__name__} --help"
                )


def _nearest(word: str, words) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
