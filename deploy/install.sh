#!/bin/sh
# Install emsr from a wheel, as the Dockerfile does: deploy/install.sh WHEEL [TORCH]
#
# TORCH is pip's requirement for torch. PYTHON names the interpreter, PIP_FLAGS is handed on to pip.
set -eu
wheel=$1
torch=${2:-torch}
python=${PYTHON:-python3}
# One call, so that torch and what emsr needs of it are chosen together.
# shellcheck disable=SC2086
"$python" -m pip install --no-cache-dir ${PIP_FLAGS:-} "$torch" "$wheel[kubernetes]"
# The packages and what they carry have arrived, wherever this is called from.
cd /
"$python" - <<'CHECK'
import importlib.metadata
import importlib.resources

import emsr
import models
import pipeline

assert importlib.metadata.version("emsr") == emsr.__version__
assert all(importlib.resources.files(package).joinpath("py.typed").is_file() for package in (emsr, models, pipeline))
print("emsr", emsr.__version__)
CHECK
