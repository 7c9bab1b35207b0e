# The image that `make image` builds without an engine, for those who have one: the same files and the same settings.
#
#   docker build --build-arg VERSION=$(git describe --tags --always) --build-arg REVISION=$(git rev-parse HEAD) -t cacheproxy .
#
# and with `docker buildx build --platform linux/amd64,linux/arm64` for both: the compiler runs where you build, whatever it
# compiles for.
ARG GO_IMAGE=golang:1.26.8-bookworm

FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
COPY tools/image/go.mod tools/image/go.sum tools/image/
RUN go mod download && cd tools/image && go mod download
COPY . .
ARG TARGETARCH
ARG VERSION=devel
RUN cd tools/image && go run . -rootfs /rootfs -platforms linux/${TARGETARCH} -version "${VERSION}"

FROM scratch
COPY --from=build /rootfs/ /
USER 65532:65532
WORKDIR /
EXPOSE 6380 9180
STOPSIGNAL SIGTERM
ENTRYPOINT ["/cacheproxy"]
ARG VERSION=devel
ARG REVISION=
LABEL org.opencontainers.image.title="cacheproxy" \
      org.opencontainers.image.description="A Redis-compatible sidecar that falls back to Postgres JSONB" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
