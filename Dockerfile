# The plugin's image, for those who would rather have it compiled in a container
# than by the Go on their machine. It pulls the Go image and downloads modules.
#
#   docker build --build-arg VERSION=v0.1.0 --tag vault-plugin-secrets-openai:0.1.0 .
#
# `make image` makes the same image and pulls nothing. Only its ID is the same
# each time, and only its program may lock its memory (see docs/containers.md).
# test/integration holds the last stage against it, so what is changed here has
# to be changed in tools/release/image as well.
#
# The first stage runs on the machine's own platform and compiles for the
# target's, so that `docker buildx build --platform linux/amd64,linux/arm64`
# needs no emulation.

FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG VERSION=v0.1.0-dev
ARG TARGETARCH
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=linux GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X vault-plugin-secrets-openai.version=$VERSION" \
    -o /out/vault-plugin-secrets-openai ./cmd/vault-plugin-secrets-openai

FROM scratch
ARG VERSION=v0.1.0-dev
ARG REVISION=
LABEL org.opencontainers.image.title="vault-plugin-secrets-openai" \
      org.opencontainers.image.description="OpenAI secrets engine for HashiCorp Vault" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="MPL-2.0"
COPY --from=build /out/vault-plugin-secrets-openai /
# Not root, in root's group: tools/release/image says why.
USER 65532:0
WORKDIR /
ENTRYPOINT ["/vault-plugin-secrets-openai"]
