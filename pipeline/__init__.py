"""The pipeline behind emsr's commands. For other programs: `import emsr`."""

import importlib.util
import os
import sys

_BESIDE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "emsr", "__init__.py")
if "emsr" not in sys.modules:
    # Only then can `emsr` be imported to look at the other packages.
    _spec = importlib.util.find_spec("emsr")
    _origin = _spec.origin if _spec else None
    _there = _origin is not None and os.path.exists(_origin) and os.path.exists(_BESIDE)
    if not (_there and os.path.samefile(str(_origin), _BESIDE)):
        _foreign = (
            f"`import emsr` finds {_origin or 'nothing'}. Wanted: emsr's own, {os.path.dirname(_BESIDE)}. "
            "Start emsr in another folder, and leave that one out of PYTHONPATH."
        )
        if sys.argv[:1] == ["-m"]:
            print(f"emsr: {_foreign}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(_foreign)

from emsr import __version__ as __version__  # noqa: E402
from emsr import start  # noqa: E402

if start.is_command(__name__):
    start.command()
else:
    start.check()
