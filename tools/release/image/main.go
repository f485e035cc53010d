// Command image writes the plugin's container image as an archive that
// `docker load` takes. It needs no container engine and nothing to pull, so that
// it works for any architecture on any machine that has Go.
//
// What must stay true: the same binary, version and SOURCE_DATE_EPOCH give the
// same bytes, and with them the same image ID, wherever and whenever it runs.
// Vault is told that ID when the image is registered, and runs no other. This is
// why no engine builds the image: without BuildKit the time of the build is in
// the ID. The archive is both an OCI layout and what Docker reads, since engines
// differ in whether the image's ID is its config's digest or its manifest's;
// here both are fixed.
//
// Dockerfile makes the same image for those who would rather have it compiled in
// a container; test/integration holds the two together.
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // go-digest asks for it to be linked
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
	name = "vault-plugin-secrets-openai"

	// user is not root. Its group is, since that is the group which Vault gives
	// the socket folder when Vault itself runs as root; of any other group Vault
	// makes the container a member. Group 0 owns nothing else in here.
	user = "65532:0"
)

// ipcLock is the file capability cap_ipc_lock=p in the kernel's form
// (vfs_cap_data, revision 2). It lets the process, which is not root, lock its
// memory when Vault asks for that. It is permitted and not effective because the
// kernel refuses to start a program whose effective capabilities the container
// does not have, and Vault grants this one only with mlock.
var ipcLock = []byte{0, 0, 0, 2, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

type options struct {
	binary, version, revision, arch string
	created                         time.Time
}

func main() {
	var o options
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
	if o.binary == "" || out == "" || !strings.HasPrefix(o.version, "v") || strings.Contains(o.version, "+") {
		return errors.New("-binary, -o and a -version are needed, the latter with a leading v and, since it becomes a tag, without build metadata")
	}
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH is the image's date, in seconds: %w", err)
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
	layer, err := archive(o.created, file{name: name, content: content, mode: 0o755, capability: ipcLock})
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(spec.Image{
		Created:  &o.created,
		Platform: spec.Platform{OS: "linux", Architecture: o.arch},
		Config:   spec.ImageConfig{User: user, Entrypoint: []string{"/" + name}, WorkingDir: "/", Labels: labels(o)},
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
		"io.containerd.image.name": "docker.io/library/" + name + ":" + tag, // what docker save writes, and docker load reads
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
	}{{Config: blob(config), RepoTags: []string{name + ":" + tag}, Layers: []string{blob(layer)}}})
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

func labels(o options) map[string]string {
	return map[string]string{
		spec.AnnotationTitle:       name,
		spec.AnnotationDescription: "OpenAI secrets engine for HashiCorp Vault",
		spec.AnnotationVersion:     o.version,
		spec.AnnotationRevision:    o.revision,
		spec.AnnotationLicenses:    "MPL-2.0",
	}
}

func descriptor(mediaType string, content []byte) spec.Descriptor {
	return spec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

// blob is the place of a content in an OCI layout.
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

// archive makes a tar file in which nothing tells of the machine or the moment.
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
