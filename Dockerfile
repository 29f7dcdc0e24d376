# CPU:  docker build -t diffseg . && docker run --rm diffseg            (make reproduce; or: ... diffseg make test)
# CUDA: docker build -t diffseg --build-arg TORCH=cuda . && docker run --rm --gpus all diffseg
# A container's files go with it. To keep a run's, give a folder of yours:
#       docker run --rm -v "$PWD/out:/out" diffseg .venv/bin/diffseg run mini-voc --out /out
# With TORCH=cuda it is PyTorch as pip installs it, with the CUDA that constraints.txt names. We never built this image:
# there was no Docker daemon and no network.
FROM python:3.11-slim
ARG TORCH=cpu
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /diffseg
COPY . .
RUN python -m venv .venv \
    && if [ "$TORCH" = cpu ]; then .venv/bin/pip install --no-cache-dir \
        $(grep -E "^torch(vision)?==" constraints.txt) --index-url https://download.pytorch.org/whl/cpu; fi \
    && PIP_NO_CACHE_DIR=1 make install
CMD ["make", "reproduce"]
