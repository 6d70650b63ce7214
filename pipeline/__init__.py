"""The pipeline behind emsr's commands. For other programs: `import emsr`."""

from emsr import __version__ as __version__
from emsr import start

if start.is_command(__name__):
    start.command()
else:
    start.check()
