"""`emsr COMMAND ...` and `python -m emsr COMMAND ...`."""

import sys

from emsr import start


def main() -> int:
    start.command()
    from pipeline.__main__ import main as run_command  # only now is it certain whose `pipeline` that is

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
