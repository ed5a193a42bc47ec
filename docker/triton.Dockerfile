# Triton that builds its plans itself: with the TensorRT that it serves with, for the GPU that it starts on. No root.
#
#   docker build -f docker/triton.Dockerfile -t repvgg-triton .
#   docker run --rm --init --gpus all --shm-size 1g -p 127.0.0.1:8000-8002:8000-8002 \
#     -v "$PWD/models/onnx:/models:ro" -v "$PWD/engines:/engines" repvgg-triton
#
# TRITON_RELEASE and TENSORRT_VERSION belong together (repvgg_deploy/serving/containers.py): only TensorRT's Python bindings are installed, and they
# load the container's own library. Releases from 24.05 on; those with CUDA 13 need CUDA_MAJOR=13.
ARG PYTHON_VERSION=3.12
ARG TRITON_RELEASE=25.06
FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY repvgg_deploy ./repvgg_deploy
RUN pip wheel --no-cache-dir --disable-pip-version-check --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3
ARG CUDA_MAJOR=12
ARG TENSORRT_VERSION=10.11.0.33
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
# The container's library must be the one that the bindings, and with them the passports, speak of.
RUN found="$(find /usr/lib /opt -name 'libnvinfer.so.*.*.*' -print -quit)"; \
    case "$TENSORRT_VERSION." in "${found##*.so.}".*) ;; *) \
    echo "this release of Triton has ${found:-no TensorRT}: expected $TENSORRT_VERSION" >&2; exit 1 ;; esac
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
# What Triton's python backend needs goes into the system's Python, which is its own; the rest into a folder, beside whatever the image holds.
# NumPy stays below 2: with it the python backend of some releases gives empty outputs.
RUN grep -v '^numpy==' /wheels/constraints.txt > /wheels/without-numpy.txt \
    && pip install -c /wheels/without-numpy.txt 'numpy<2' pillow \
    && pip install -c /wheels/without-numpy.txt --target /opt/repvgg \
    /wheels/*.whl 'numpy<2' protobuf tritonclient "cuda-bindings==${CUDA_MAJOR}.*" \
    && pip install --target /opt/repvgg --no-deps "tensorrt-cu${CUDA_MAJOR}-bindings==${TENSORRT_VERSION}"
# The package that gives the bindings their usual name would bring a second copy of TensorRT's libraries.
COPY docker/triton/tensorrt.py docker/first_start.py /opt/repvgg/
RUN install -d -o 1000 -g 1000 /models /engines
ENV PATH=/opt/repvgg/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp PYTHONPATH=/opt/repvgg \
    REPVGG_MODEL=/models REPVGG_ENGINES=/engines/plans XDG_CACHE_HOME=/engines/plans/cache
USER 1000:1000
WORKDIR /tmp
VOLUME /engines
EXPOSE 8000 8001 8002
# The first build may take minutes; no failure counts before that.
HEALTHCHECK --start-period=30m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "python3", "/opt/repvgg/first_start.py", "--triton"]
CMD ["tritonserver", "--model-repository={repository}", "--exit-timeout-secs=30", "--metrics-config=summary_latencies=true"]
