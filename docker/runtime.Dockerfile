# An image that builds the plan for the GPU it starts on, finds it again on later starts, and then runs what it is given. TensorRT, no torch, no onnx,
# no root. Needs the NVIDIA driver and the NVIDIA Container Toolkit on the host; no CUDA base image: what TensorRT needs of CUDA comes with it.
#
#   docker build -f docker/runtime.Dockerfile -t repvgg-runtime .
#   docker run --rm --init --gpus all -p 127.0.0.1:8080:8000 -v "$PWD/models/onnx:/models:ro" -v "$PWD/engines:/engines" repvgg-runtime
#
# TENSORRT_VERSION and CUDA_MAJOR: those of the passport of a plan that exists (`python docker/match_versions.py x.plan` prints the arguments).
# TENSORRT: another package altogether, such as tensorrt-rtx-cu13 with CUDA_MAJOR=13, which also builds without a GPU.
# EXTRAS, PACKAGES: what is run needs besides; the extra `service` is for the default command.
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim-bookworm AS build

ARG CUDA_MAJOR=12
ARG TENSORRT_VERSION=10.11.0.33
ARG TENSORRT=tensorrt-cu${CUDA_MAJOR}==${TENSORRT_VERSION}
ARG EXTRAS=service
ARG PACKAGES=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
# Not by the extra `tensorrt`: its range takes the newest, of another CUDA. Before the code, so that a change of it does not fetch gigabytes again.
# The second library is only for building plans for Windows, which is not done here.
RUN pip install -c constraints.txt "$TENSORRT" "cuda-bindings==${CUDA_MAJOR}.*" \
    && find /opt/venv -name 'libnvinfer_builder_resource_win*' -print -delete
COPY repvgg_deploy ./repvgg_deploy
# $PACKAGES is a list of words.
# hadolint ignore=SC2086
RUN pip install -c constraints.txt ".${EXTRAS:+[$EXTRAS]}" pillow $PACKAGES

FROM python:${PYTHON_VERSION}-slim-bookworm
COPY --from=build /opt/venv /opt/venv
COPY docker/first_start.py /opt/first_start.py
COPY examples /opt/examples
# A named volume at /engines takes over its owner. A folder of the host must belong to this user, or run with --user.
RUN install -d -o 1000 -g 1000 /models /engines
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp \
    REPVGG_MODEL=/models REPVGG_ENGINES=/engines/plans XDG_CACHE_HOME=/engines/plans/cache \
    REPVGG_LISTEN=0.0.0.0:8000 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /opt
VOLUME /engines
EXPOSE 8000
ENTRYPOINT ["python", "/opt/first_start.py"]
CMD ["python", "-m", "examples.service"]
