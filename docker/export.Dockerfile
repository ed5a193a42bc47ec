# An image that exports: checkpoint in, verified ONNX out; and types it, FP16 or INT8. PyTorch's CPU build, no GPU, no root.
#
#   docker build -f docker/export.Dockerfile -t repvgg-export .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/models:/models" repvgg-export --ckpt checkpoints/x.pth --out x.onnx
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/models:/models" --entrypoint repvgg-trt repvgg-export quantize x.onnx --fp16
#
# TORCH_INDEX: PyTorch's own index of CPU builds (its "Get Started" page shows the address). Left empty, pip installs what it finds elsewhere,
# which on Linux is usually the CUDA build: it works as well, and is several gigabytes larger.
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim-bookworm AS build

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
# Before the code, so that a change of the code does not install PyTorch again.
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0
COPY repvgg_deploy ./repvgg_deploy
RUN pip install -c constraints.txt '.[export,cpu]'

FROM python:${PYTHON_VERSION}-slim-bookworm
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
USER 1000:1000
WORKDIR /models
ENTRYPOINT ["repvgg-export"]
CMD ["--help"]
