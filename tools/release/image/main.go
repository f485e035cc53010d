// Command image writes the container image of a program as an archive for `docker load`.
// It needs neither a container engine nor other images, so it works for any architecture
// on any machine with Go.
//
// What must stay true: the build is reproducible for the same binary, version and
// SOURCE_DATE_EPOCH, and therefore the image ID, which Vault pins when the image is
// registered. A container engine cannot guarantee that: without BuildKit the ID includes
// the time of the build. The archive is both an OCI layout and in Docker's format, since
// engines differ in whether the image's ID is the digest of its config or of its manifest;
// both are fixed here.
//
// Dockerfile builds the same image in a container; test/integration compares the two.
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // required by go-digest
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	spec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	plugin = "vault-plugin-secrets-openai"

	// user is not root, but its group is 0, the group of the socket folder if Vault runs
	// as root; Vault adds the container to any other group. Group 0 owns nothing else in
	// the image.
	user = "65532:0"
)

// ipcLock is the file capability cap_ipc_lock=p in the kernel's format (vfs_cap_data,
// revision 2). It allows the process, which is not root, to lock its memory. It is
// permitted instead of effective because the kernel does not start a program with
// effective capabilities that the container lacks, and Vault grants this one only with
// mlock.
var ipcLock = []byte{0, 0, 0, 2, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

type options struct {
	name, binary, version, revision, arch string
	created                               time.Time
}

func main() {
	var o options
	flag.StringVar(&o.name, "name", plugin, "the program's name, and the image's: vault-plugin-secrets-openai or openai-broker")
	flag.StringVar(&o.binary, "binary", "", "the static Linux `file` to put into the image")
	flag.StringVar(&o.version, "version", "", "its version, such as v0.1.0; the image's tag is the same without the v, as Vault expects")
	flag.StringVar(&o.revision, "revision", "", "the commit that it was built from, if known")
	flag.StringVar(&o.arch, "arch", "amd64", "its architecture, in Go's words")
	out := flag.String("o", "", "the archive to write")
	flag.Parse()
	if err := run(o, *out); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(o options, out string) error {
	if descriptions[o.name] == "" || o.binary == "" || out == "" || !strings.HasPrefix(o.version, "v") || strings.Contains(o.version, "+") {
		return errors.New("a known -name, -binary, -o and -version are required; -version must have a leading v and no build metadata, since it becomes a tag")
	}
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH must be the image's date in seconds: %w", err)
	}
	o.created = time.Unix(epoch, 0).UTC()
	archive, err := build(o)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o750); err != nil {
		return err
	}
	return os.WriteFile(out, archive, 0o600)
}

// build returns the archive.
func build(o options) ([]byte, error) {
	content, err := os.ReadFile(o.binary)
	if err != nil {
		return nil, err
	}
	program := file{name: o.name, content: content, mode: 0o755}
	if o.name == plugin {
		program.capability = ipcLock
	}
	layer, err := archive(o.created, program)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(spec.Image{
		Created:  &o.created,
		Platform: spec.Platform{OS: "linux", Architecture: o.arch},
		Config:   spec.ImageConfig{User: user, Entrypoint: []string{"/" + o.name}, WorkingDir: "/", Labels: labels(o)},
		RootFS:   spec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		History:  []spec.History{{Created: &o.created, CreatedBy: "tools/release/image"}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(spec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: spec.MediaTypeImageManifest,
		Config:    descriptor(spec.MediaTypeImageConfig, config),
		Layers:    []spec.Descriptor{descriptor(spec.MediaTypeImageLayer, layer)},
	})
	if err != nil {
		return nil, err
	}

	tag := strings.TrimPrefix(o.version, "v")
	entry := descriptor(spec.MediaTypeImageManifest, manifest)
	entry.Platform = &spec.Platform{OS: "linux", Architecture: o.arch}
	entry.Annotations = map[string]string{
		spec.AnnotationRefName:     tag,
		"io.containerd.image.name": "docker.io/library/" + o.name + ":" + tag, // what docker save writes, and docker load reads
	}
	index, err := json.Marshal(spec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: spec.MediaTypeImageIndex,
		Manifests: []spec.Descriptor{entry},
	})
	if err != nil {
		return nil, err
	}
	layout, err := json.Marshal(spec.ImageLayout{Version: spec.ImageLayoutVersion})
	if err != nil {
		return nil, err
	}
	docker, err := json.Marshal([]struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{{Config: blob(config), RepoTags: []string{o.name + ":" + tag}, Layers: []string{blob(layer)}}})
	if err != nil {
		return nil, err
	}
	return archive(o.created,
		file{name: spec.ImageLayoutFile, content: layout},
		file{name: spec.ImageIndexFile, content: index},
		file{name: "manifest.json", content: docker},
		file{name: blob(manifest), content: manifest},
		file{name: blob(config), content: config},
		file{name: blob(layer), content: layer},
	)
}

var descriptions = map[string]string{
	plugin:          "OpenAI secrets engine for HashiCorp Vault",
	"openai-broker": "Lets a program use OpenAI without holding a key",
}

func labels(o options) map[string]string {
	return map[string]string{
		spec.AnnotationTitle:       o.name,
		spec.AnnotationDescription: descriptions[o.name],
		spec.AnnotationVersion:     o.version,
		spec.AnnotationRevision:    o.revision,
		spec.AnnotationLicenses:    "MPL-2.0",
	}
}

func descriptor(mediaType string, content []byte) spec.Descriptor {
	return spec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

// blob is the path of a blob in an OCI layout.
func blob(content []byte) string {
	d := digest.FromBytes(content)
	return spec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

type file struct {
	name       string
	content    []byte
	mode       int64
	capability []byte
}

// archive writes a tar file that does not depend on the machine or the time.
func archive(at time.Time, files ...file) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Size: int64(len(f.content)), Mode: f.mode, ModTime: at, Format: tar.FormatPAX}
		if header.Mode == 0 {
			header.Mode = 0o644
		}
		if f.capability != nil {
			header.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": string(f.capability)}
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := io.Copy(w, bytes.NewReader(f.content)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
