# poetx in a container: docker build -t poetx . && docker run --gpus all -v "$PWD:/work" poetx train
# PyTorch's package for Linux brings CUDA; the driver is the host's (--gpus all, NVIDIA Container Toolkit).
FROM python:3.12-slim

# Triton compiles a launcher for each of its kernels.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[peft,data]" && rm -rf /src

# Any user may write its caches and, into the mounted directory, its runs.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["poetx"]
CMD ["--help"]
