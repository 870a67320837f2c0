# tritonspeed on Triton's own image. Weights and the model repository are mounted, read-only:
#   docker build -t tritonspeed .
#   docker run --rm --gpus all --shm-size 1g -p 8000-8003:8000-8003 -v "$PWD/models:/models:ro" tritonspeed
# or one model from a folder of weights:
#   docker run --rm --gpus all --shm-size 1g -p 8000-8003:8000-8003 -v "$PWD/opt:/weights:ro" tritonspeed --model /weights
# 26.07 is the floor: releases before it have published remote-code-execution CVEs.
FROM nvcr.io/nvidia/tritonserver:26.10-py3

# A compiler and Python's headers: OpenAI Triton and DeepSpeed build small modules when a model is loaded.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# The stubs take their packages from the first python3 on PATH.
ENV VIRTUAL_ENV=/opt/tritonspeed \
    PATH=/opt/tritonspeed/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1

# What changes rarely first. DeepSpeed's setup imports torch, so it is built without isolation; its ops when used.
# The build tools may be any recent ones; pyproject.toml pins what matters.
# hadolint ignore=DL3013
RUN python3 -m venv "$VIRTUAL_ENV" \
 && pip install "setuptools>=77" wheel "hatchling>=1.26" ninja packaging psutil py-cpuinfo torch==2.13.0
COPY pyproject.toml README.md LICENSE /src/
COPY client /src/client
COPY backend /src/backend
COPY model_repository /src/model_repository
RUN DS_BUILD_OPS=0 pip install --no-build-isolation "/src[server]" && rm -rf /src

# Everything above belongs to root: the server can write in its own home alone.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tritonspeed && mkdir /models
USER 10001
WORKDIR /home/tritonspeed
ENV HOME=/home/tritonspeed \
    TRITONSPEED_RUN=/home/tritonspeed/run \
    TRITONSPEED_CACHE=/home/tritonspeed/cache

EXPOSE 8000 8001 8002 8003
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=3 CMD ["python3", "-m", "backend.launcher.probe"]
# Beyond loopback the launcher puts the server's own APIs behind a key: TRITONSPEED_ADMIN_KEY, or one it makes up and prints.
ENTRYPOINT ["python3", "-P", "-m", "backend.server", "--host", "0.0.0.0"]
CMD ["--repository", "/models"]
