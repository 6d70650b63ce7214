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

REQUIRED = ("yaml", "numpy", "pydantic", "tensorstore", "distributed")
"""Libraries that every command needs, those first without which another cannot be imported."""

is_program = False
"""Whether this process is a command of emsr's. Where it is not, it goes on after the command that it calls."""


def command() -> None:
    """Begin a command, before anything else is imported. Where another package is in emsr's place, a library of
    REQUIRED cannot be imported, or Dask cannot read its configuration (it does so while it is imported), it ends with
    code 2.

    From here on neither this process nor those that it starts import from the current folder, unless emsr lies there.
    """
    global is_program
    is_program = True
    open_standard_files()
    _name_files_in_utf8()
    if wrong := _foreign() or _no_proc():
        print(f"emsr: {wrong}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONSAFEPATH"] = "1"
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not _is_same(path, os.curdir)]
    if _is_same(HOME, os.curdir):
        found.insert(0, HOME)  # a checkout that is not installed: jobs of a batch system find it so
    else:
        sys.path[:] = [path for path in sys.path if not _is_same(path, os.curdir)]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    sys.excepthook = _say_what_is_not_installed
    for library in REQUIRED:  # by commands alone: what imports this module needs none of them
        try:
            importlib.import_module(library)
        except Exception as error:
            print(f"emsr: {_not_imported(library, error)}", file=sys.stderr)
            sys.exit(2)


def program(command: str) -> str:
    """What the user has called for `command`, for the line that shows its usage."""
    called = os.path.basename(sys.argv[0])
    return f"python -m pipeline.{command}" if called == f"{command}.py" else f"emsr {command}"


def _say_what_is_not_installed(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Python's last words, where a command's own imports fail: one line and code 2, and no traceback."""
    if not isinstance(error, ImportError):
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
        return
    print(f"emsr: {_not_imported('', error)}", file=sys.stderr)
    sys.exit(2)


def _not_imported(library: str, error: Exception) -> str:
    """What to say where a library cannot be imported, or refuses its configuration: one line."""
    try:
        from pipeline.base.command import exhausted  # it is certain by now that this is emsr's own
        from pipeline.base.requirements import not_installed
    except MemoryError:
        return "there is no memory left. Raise `ulimit -v`, or give this job more memory."
    if lacks := exhausted(error):
        return f"{lacks}."
    return not_installed(error, library) or _misconfigured(error)


def _misconfigured(error: Exception) -> str:
    """What to say where Dask, which reads its configuration while it is imported, cannot."""
    first: BaseException = error
    while first.__cause__ or first.__context__:
        first = first.__cause__ or first.__context__ or first
    said, cause = (" ".join(str(one).split()) for one in (error, first))
    folders = ", ".join(str(path) for path in getattr(sys.modules.get("dask.config"), "paths", ()))
    variables = ", ".join(sorted(name for name in os.environ if name.startswith("DASK_"))) or "none is set"
    return (
        f"Dask cannot read its configuration ({type(error).__name__}: {said}{'' if cause in said else f': {cause}'}). "
        f"Correct the file{f', which is in {folders}' if folders else ''}, "
        f"or the variables that begin with DASK_ ({variables})."
    )


def _name_files_in_utf8() -> None:
    """Begin this process anew in Python's UTF-8 mode where the locale has another encoding.

    volume.yaml is in UTF-8 and tensorstore names files in it. Under a locale of another encoding Python would look for
    other names than those that the user sees.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
    if not os.path.isdir(HOME):
        return f"emsr lies in the archive {HOME}. Wanted: a folder, which processes of a run share. Unpack it."
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = (spec.origin or next(iter(spec.submodule_search_locations or ()), None)) if spec else None
        if found is None or not _is_same(os.path.dirname(found), os.path.join(HOME, name)):
            return (
                f"`import {name}` finds {found or 'nothing'}. Wanted: emsr's own, {os.path.join(HOME, name)}. "
                "Start emsr in another folder, and leave that one out of PYTHONPATH."
            )
    return None


def _no_proc() -> str:
    """What to say where Linux tells a process nothing of itself; "" where it does."""
    if os.path.exists("/proc/self/stat"):
        return ""
    return "/proc is not there, by which a process knows its memory and its files. Mount it: mount -t proc proc /proc."


def _is_same(path: str, other: str) -> bool:
    """Whether both are there and are one folder. An empty path is the current folder, as everywhere in Python."""
    try:
        return os.path.samefile(path or os.curdir, other)
    except OSError:
        return False
