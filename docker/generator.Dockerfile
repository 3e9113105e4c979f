# The generator service. Build it from the repository's root: docker build -f docker/generator.Dockerfile .
# The base is pinned by its full version; add @sha256:... where your registry's digest is known to you.
FROM python:3.13.14-slim-bookworm AS build
# Where to look for torch wheels besides the package index, for instance an index of CPU-only builds; empty: nowhere,
# which on Linux gives the build with CUDA.
ARG TORCH_INDEX=""
RUN python -m venv /opt/onthefly
ENV PATH=/opt/onthefly/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Dependencies first: this layer is made anew only when they change.
COPY pyproject.toml requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE \
    && pip install --constraint requirements.lock ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[generator]"
COPY README.md LICENSE ./
COPY protocol protocol
COPY agent agent
COPY generator_service generator_service
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --force-reinstall .

FROM python:3.13.14-slim-bookworm
RUN groupadd --gid 10001 onthefly \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp onthefly \
    && install -d -o 10001 -g 10001 /var/lib/onthefly/weights /var/lib/onthefly/samples /var/lib/onthefly/hub
COPY --from=build /opt/onthefly /opt/onthefly
# HF_HOME: checkpoints that are named by a hub id are kept here.
ENV PATH=/opt/onthefly/bin:$PATH HOME=/tmp HF_HOME=/var/lib/onthefly/hub
USER 10001:10001
WORKDIR /var/lib/onthefly
EXPOSE 8000
ENTRYPOINT ["onthefly"]
CMD ["serve", "--config", "/etc/onthefly/run.toml"]
