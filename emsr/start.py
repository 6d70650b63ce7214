"""How processes of emsr begin: with emsr's own `pipeline` and `models`, and without modules from the current folder.

Only modules that Python has loaded by itself are imported here: any other could come from the current folder, until
`command` has put that aside.
"""

import importlib
import importlib.util
import os
import sys

PACKAGES = ("pipeline", "models")
HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds `emsr` and, beside it, PACKAGES: site-packages, or a checkout."""


is_program = False
"""Whether this process is a command of emsr's. Where it is not, it goes on after the command that it calls."""


def command() -> None:
    """Begin a command, before anything else is imported. Where another package is in emsr's place, or Dask cannot read
    its configuration (it does so while it is imported), it ends with code 2.

    From here on neither this process nor those that it starts import from the current folder, unless emsr lies there.
    """
    global is_program
    is_program = True
    open_standard_files()
    if foreign := _foreign():
        print(f"emsr: {foreign}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONSAFEPATH"] = "1"
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not _is_same(path, os.curdir)]
    if _is_same(HOME, os.curdir):
        found.insert(0, HOME)  # a checkout that is not installed: jobs of a batch system find it so
    else:
        sys.path[:] = [path for path in sys.path if not _is_same(path, os.curdir)]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    try:
        importlib.import_module("distributed")  # by commands alone: what imports this module needs no Dask
    except ImportError:
        raise
    except Exception as error:
        variables = ", ".join(sorted(name for name in os.environ if name.startswith("DASK_"))) or "none is set"
        print(
            f"emsr: Dask cannot read its configuration ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"Correct the file, or the variables that begin with DASK_ ({variables}).",
            file=sys.stderr,
        )
        sys.exit(2)


def open_standard_files() -> None:
    """Open /dev/null as whichever of standard input, output and error is closed, as for jobs of cron and daemons.

    Otherwise the next file that is opened takes its number, and libraries that print would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def check() -> None:
    """Raises ImportError where another package is in emsr's place: for Dask's workers and for other programs."""
    if foreign := _foreign():
        raise ImportError(foreign)


def is_command(package: str) -> bool:
    """Whether Python is just looking for the module of `python -m PACKAGE...`: it imports the package first."""
    return sys.argv[:1] == ["-m"] and any(arg.removeprefix("-m").split(".")[0] == package for arg in sys.orig_argv)


def _foreign() -> str | None:
    """What `import` would find in the place of emsr's own packages, and what to do: one line."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = (spec.origin or next(iter(spec.submodule_search_locations or ()), None)) if spec else None
        if found is None or not _is_same(os.path.dirname(found), os.path.join(HOME, name)):
            return (
                f"`import {name}` finds {found or 'nothing'}. Wanted: emsr's own, {os.path.join(HOME, name)}. "
                "Start emsr in another folder, and leave that one out of PYTHONPATH."
            )
    return None


def _is_same(path: str, other: str) -> bool:
    """Whether both are there and are one folder. An empty path is the current folder, as everywhere in Python."""
    try:
        return os.path.samefile(path or os.curdir, other)
    except OSError:
        return False
