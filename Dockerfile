# qif in a container: training from the command line, or the studio in a browser.
#
#   docker build -t qif .
#   docker run --rm --gpus all -v "$PWD:/work" -v qif-cache:/cache qif train my_run.yaml
#   docker run --rm --gpus all -v "$PWD:/work" -v qif-cache:/cache --network host qif studio /work
#
# The host brings the NVIDIA driver and its container toolkit; torch's wheels bring CUDA's libraries.

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# gcc and the headers: torch.compile writes kernels and launchers that it compiles here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/qif
ENV PATH=/opt/qif/bin:$PATH
COPY requirements.lock /opt/qif/
COPY --from=wheel /wheels/ /tmp/wheels/
# The lock holds the versions that the tests ran with; of it only what the wheel asks for is installed.
RUN wheel=$(ls /tmp/wheels/*.whl) \
    && pip install --no-cache-dir --disable-pip-version-check --constraint /opt/qif/requirements.lock "${wheel}[bitsandbytes,studio]" \
    && rm -r /tmp/wheels

# Who runs it owns what it writes: docker run --user "$(id -u):$(id -g)" writes as you. Both folders take any user.
RUN useradd --create-home --uid 10001 qif && install --directory --mode 1777 /cache /work
USER 10001
ENV HF_HOME=/cache/huggingface TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton HOME=/cache
VOLUME ["/cache", "/work"]
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["qif", "doctor"]
ENTRYPOINT ["qif"]
CMD ["--help"]
