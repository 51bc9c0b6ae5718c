# Three images from one file: "api" (REST API, no torch), "worker" (the same server with torch,
# which also runs jobs) and "ray" (a worker that is a node of a Ray cluster). All take their
# versions from constraints.txt.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md constraints.txt ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --constraint constraints.txt hatchling build
COPY src src
COPY solver solver
COPY sensitivity sensitivity
COPY quantizers quantizers
COPY models models
COPY exports exports
COPY training training
COPY service service
RUN /opt/build/bin/python -m build --no-isolation --wheel --outdir /dist .

# pip looks here beside the package index; this index has the builds of torch without CUDA.
FROM ${PYTHON_IMAGE} AS api-packages
ARG EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY constraints.txt /src/
COPY --from=wheel /dist /dist
RUN python3 -m venv /opt/bitquota \
    && wheel="$(echo /dist/bitquota-*.whl)" \
    && /opt/bitquota/bin/pip install --no-cache-dir --extra-index-url "${EXTRA_INDEX_URL}" \
        --constraint /src/constraints.txt "${wheel}[service,postgres,s3,oidc,otel]"

FROM api-packages AS worker-packages
ARG EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN wheel="$(echo /dist/bitquota-*.whl)" \
    && /opt/bitquota/bin/pip install --no-cache-dir --extra-index-url "${EXTRA_INDEX_URL}" \
        --constraint /src/constraints.txt "${wheel}[service,postgres,s3,oidc,otel,worker,hf,onnx]"

FROM worker-packages AS ray-packages
ARG EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN wheel="$(echo /dist/bitquota-*.whl)" \
    && /opt/bitquota/bin/pip install --no-cache-dir --extra-index-url "${EXTRA_INDEX_URL}" \
        --constraint /src/constraints.txt "${wheel}[service,postgres,s3,oidc,otel,worker,hf,onnx,ray]"

FROM ${PYTHON_IMAGE} AS runtime
# Models run in a sandbox that bubblewrap makes; its version is the distribution's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data bitquota \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data
ENV PATH=/opt/bitquota/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    BITQUOTA_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('BITQUOTA_PORT', '8000') + '/healthz', timeout=4)"]
STOPSIGNAL SIGTERM

FROM runtime AS api
COPY --from=api-packages /opt/bitquota /opt/bitquota
# No jobs here: a worker on the same volume or database runs them.
ENV BITQUOTA_SLOTS=0
CMD ["bitquota", "serve"]

FROM runtime AS worker
COPY --from=worker-packages /opt/bitquota /opt/bitquota
CMD ["bitquota", "serve"]

FROM runtime AS ray
COPY --from=ray-packages /opt/bitquota /opt/bitquota
ENV BITQUOTA_ENGINE=ray
CMD ["bitquota", "serve"]
