# emsr in an image, one for scheduler, worker and client: docker build -t emsr .
#
# TORCH is pip's requirement for torch. The default carries CUDA on x86_64; for a smaller image without it, give a CPU-only wheel:
#   docker build -t emsr --build-arg TORCH="torch @ URL-OF-A-CPU-WHEEL" .
# It must be of the version that constraints.txt names; so are all other packages, the ones that CI ran.
#
# BASE is a tag, which moves. For an image that can be built again as it was, name what the tag is today by its digest:
#   docker pull python:3.11-slim
#   docker build -t emsr --build-arg BASE="$(docker inspect --format '{{index .RepoDigests 0}}' python:3.11-slim)" .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY emsr emsr
COPY pipeline pipeline
COPY models models
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TORCH=torch
COPY --from=build /wheels /wheels
COPY deploy/install.sh constraints.txt /wheels/
# CI runs the same script in a fresh environment.
RUN PIP_CONSTRAINT=/wheels/constraints.txt /wheels/install.sh /wheels/*.whl "${TORCH}"
RUN useradd --create-home --uid 1000 emsr && install --directory --owner=emsr /data
# By number, so that Kubernetes can see that it is not root.
USER 1000
# Writable whatever user a run is given (docker run --user), as the home folder is not.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["emsr"]
CMD ["--help"]
