package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	spec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// This test needs no container engine. test/integration checks that an engine
// loads the archive and that the program runs.
func TestTheSameInputIsTheSameArchive(t *testing.T) {
	o := options{name: plugin, binary: binary(t), version: "v1.2.3", revision: "abc", arch: "arm64", created: time.Unix(1_700_000_000, 0).UTC()}
	first, err := build(o)
	require.NoError(t, err)
	o.binary = binary(t)
	require.NoError(t, os.Chtimes(o.binary, time.Now(), time.Unix(1, 0)))
	second, err := build(o)
	require.NoError(t, err)
	require.Equal(t, first, second)

	// The layout refers to the same config as Docker's manifest.
	files := untar(t, first)
	var index spec.Index
	require.NoError(t, json.Unmarshal(files["index.json"], &index))
	var manifest spec.Manifest
	require.NoError(t, json.Unmarshal(files["blobs/sha256/"+index.Manifests[0].Digest.Encoded()], &manifest))
	var docker []struct {
		Config   string
		RepoTags []string
	}
	require.NoError(t, json.Unmarshal(files["manifest.json"], &docker))
	require.Equal(t, docker[0].Config, "blobs/sha256/"+manifest.Config.Digest.Encoded())
	require.Equal(t, []string{"vault-plugin-secrets-openai:1.2.3"}, docker[0].RepoTags)
	var config spec.Image
	require.NoError(t, json.Unmarshal(files[docker[0].Config], &config))
	require.Equal(t, "arm64", config.Architecture)
	require.Equal(t, "65532:0", config.Config.User)
	layer := untar(t, files["blobs/sha256/"+manifest.Layers[0].Digest.Encoded()])
	require.Equal(t, map[string][]byte{plugin: []byte("a program")}, layer)
}

func TestRun_RejectsInvalidTag(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "0")
	for _, version := range []string{"", "1.2.3", "v1.2.3+dirty"} {
		require.Error(t, run(options{name: plugin, binary: binary(t), version: version}, filepath.Join(t.TempDir(), "x.tar")), version)
	}
}

func binary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	require.NoError(t, os.WriteFile(path, []byte("a program"), 0o600))
	return path
}

func untar(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		require.NoError(t, err)
		files[header.Name], err = io.ReadAll(r)
		require.NoError(t, err)
	}
}
