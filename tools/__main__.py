"""The command line, ``python -m tools <command>``: finds the command, checks its flags, prints errors as one line."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import signal
import sys

from tools.errors import UserError, nearest

COMMANDS = {
    "new_pretraining": "a copy of a pre-training bundle for the labels of an nnU-Net dataset, or for images without labels",
    "linearize": "a starting point whose task vectors add up exactly, by a linearised network",
    "new_task": "a bundle that fine-tunes one task from a starting point",
    "convert": "a published checkpoint of another framework into a bundle",
    "inflate": "the weights of a 2D network into a 3D starting point",
    "diff": "the task vector between a starting point and a specialist",
    "statistics": "what the methods fisher and regmean need of a specialist, from unlabelled scans",
    "merge": "task vectors and their starting point into one bundle",
    "distil": "merge with coefficients learned from a few scans, with labels or without",
    "pseudo_labels": "what all specialists see in unlabelled scans, as a dataset to train one model on",
    "recalibrate": "measure a merged network's batch normalisation anew",
    "edit": "add, remove or re-weight tasks of a merged bundle",
    "inspect": "what a bundle or a task vector is: lineage, labels, sizes, norms, conflicts",
    "flatness": "how flat the loss is around bundles' weights, between two, and on the plane through three",
    "evaluate": "Dice, surface Dice and HD95 of bundles on a labelled dataset, with intervals, tests and pictures",
    "card": "put measured results into a bundle's model card",
    "report": "one HTML page about a merge: results, slices, agreement, coefficients, landscape, lineage",
    "compare": "a table of every merge method on the same task vectors",
    "search": "choose the coefficients of a merge on validation patients",
    "pack": "a bundle as a zip that MONAI downloads, byte for byte the same whoever packs it",
    "verify": "check a bundle or its zip completely, offline and without running it",
    "vendor": "keep the Python in every bundle's scripts/ equal to tools/bundle_code",
    "phantom": "write the procedural CT dataset",
    "demo": "the whole chain in one go, printing each command it runs",
}

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
KINDS = {  # of flags, by their annotations: what a value looks like
    "int": (re.compile(r"[-+]?\d+"), "a whole number"),
    "float": (re.compile(NUMBER, re.IGNORECASE), "a number"),
    "bool": (re.compile("true|false|0|1", re.IGNORECASE), "True or False"),
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
        print(f"error: no command {name!r}{nearest(name, COMMANDS)}; see python -m tools --help", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished output is removed
    try:
        command = getattr(importlib.import_module(f"tools.{name}"), name)
        if any(argument in ("-h", "--help") for argument in arguments):
            print(_help(command))
            return 0
        _check_flags(command, arguments[1:])
        import fire

        fire.Fire(_text_as_text(command), command=arguments[1:], name=name, serialize=lambda _: None)
        return 0
    except KeyboardInterrupt:
        print(
            "\nstopped: nothing half-written is left, and what can go on does so when it is run again", file=sys.stderr
        )
        return 130
    except (UserError, OSError, ValueError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(
            f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]} (--debug says where)",
            file=sys.stderr,
        )
        return 1


def _help(command) -> str:
    from fire.helptext import HelpText
    from fire.trace import FireTrace

    # without what fire's own decorators leave on a function, which its help would list as a group of commands
    described = functools.wraps(command, updated=())(lambda: None)
    return HelpText(described, FireTrace(described, name=command.__name__))


def _check_flags(command, arguments: list[str]) -> None:
    """Refuse what fire would run the command first with, and complain about afterwards, or make something else of.

    Raises:
        UserError: names a flag that is unknown, missing or there twice, or whose value is no number where it must be one.
    """
    known, help_line = inspect.signature(command).parameters, f"see python -m tools {command.__name__} --help"
    flags: dict[str, str | None] = {}  # and their values
    last = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            last = flag.replace("-", "_")
            if last in flags:
                raise UserError(
                    f"--{last} is there twice, of which the first would be lost; several values are separated by commas"
                )
            flags[last] = value if equals else None
        elif flags.get(last, "") is None:
            flags[last] = argument
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())  # the command checks the others itself
    for flag, value in flags.items():
        if not open_ended and flag not in known and flag.removeprefix("no") not in known:
            raise UserError(f"unknown flag --{flag}{nearest(flag, known)}; {help_line}")
        looks, what = KINDS.get(known[flag].annotation if flag in known else "", (None, ""))
        if looks and value is not None and not looks.fullmatch(value):
            raise UserError(f"--{flag} {value}: it must be {what}")
    if not arguments or arguments[0].startswith("-"):  # nothing is given by position
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [n for n, p in known.items() if p.default is p.empty and p.kind not in variable]
        if missing := [f"--{name}" for name in required if name not in flags]:
            raise UserError(f"{', '.join(missing)} missing; {help_line}")


def _text_as_text(command):
    """The command, for whose text fire would otherwise make other things of ``901``, ``None`` or ``a,b``."""
    from fire.decorators import SetParseFns

    texts = [name for name, parameter in inspect.signature(command).parameters.items() if parameter.annotation == "str"]
    return SetParseFns(**dict.fromkeys(texts, str))(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
