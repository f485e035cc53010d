package devenv

// The plugin's image, built and loaded as a user does it, and the containers that
// a Vault server has started. All calls use the docker command, which finds the
// Docker engine as Vault does (DOCKER_HOST, or the local one).

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/vault/api"
)

// Engine is a Docker engine, with some fields of docker info.
type Engine struct {
	ServerVersion   string
	Runtimes        map[string]any
	SecurityOptions []string
}

// Rootless reports whether the engine runs without root.
func (e Engine) Rootless() bool { return slices.Contains(e.SecurityOptions, "name=rootless") }

// FindDocker returns the Docker engine, or an error if none answers.
func FindDocker(ctx context.Context) (Engine, error) {
	var e Engine
	out, err := Docker(ctx, "info", "--format", "{{json .}}")
	if err == nil {
		err = json.Unmarshal([]byte(out), &e)
	}
	if err == nil && e.ServerVersion == "" {
		err = errors.New("no Docker engine answers")
	}
	return e, err
}

// Docker runs the docker command and returns its output.
func Docker(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "docker", args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return "", fmt.Errorf("docker %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Image is a container image with the plugin, with the fields of Vault's catalog.
// Its tag is its version without the v.
type Image struct {
	Repository string
	Version    string
	ID         string
}

// Reference returns the image's name and tag in the engine.
func (i Image) Reference() string {
	return i.Repository + ":" + strings.TrimPrefix(i.Version, "v")
}

// MakeImage builds and loads the plugin's image with `make image`, which writes
// the archive and the binary to dir. env is added to the environment. The caller
// must Remove the image.
func MakeImage(ctx context.Context, dir, version string, env ...string) (Image, error) {
	root, err := Root()
	if err != nil {
		return Image{}, err
	}
	cmd := exec.CommandContext(ctx, "make", "--no-print-directory", "image", "PROGRAMS="+PluginName, "VERSION="+version, "DIST="+dir)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return Image{}, fmt.Errorf("make image: %w\n%s", err, out)
	}
	return FindImage(ctx, PluginName, version)
}

// FindImage looks up an image in the engine.
func FindImage(ctx context.Context, repository, version string) (Image, error) {
	i := Image{Repository: repository, Version: version}
	var err error
	i.ID, err = Docker(ctx, "image", "inspect", "--format", "{{.Id}}", i.Reference())
	return i, err
}

// Remove removes the image from the engine.
func (i Image) Remove(ctx context.Context) error {
	_, err := Docker(ctx, "image", "rm", i.ID)
	return err
}

// RegisterImage registers an image in the catalog under a name, with the plugin
// runtime that runs it and with variables to add to its environment.
func (v *Vault) RegisterImage(ctx context.Context, name string, i Image, runtime string, env ...string) error {
	err := v.Client().Sys().RegisterPluginWithContext(ctx, &api.RegisterPluginInput{
		Name:     name,
		Type:     api.PluginTypeSecrets,
		OCIImage: i.Repository,
		SHA256:   strings.TrimPrefix(i.ID, "sha256:"),
		Version:  i.Version,
		Runtime:  runtime,
		Env:      env,
	})
	if err != nil {
		return fmt.Errorf("registering %s: %w", i.Reference(), err)
	}
	return nil
}

// Containers lists the existing containers that the server has started, including
// stopped ones. It also works after the server has ended.
func (v *Vault) Containers(ctx context.Context) ([]string, error) {
	out, err := Docker(ctx, "ps", "--all", "--quiet", "--no-trunc",
		"--filter", "label=com.hashicorp.vault.plugin.type=secret",
		"--filter", "label=com.hashicorp.vault.pid="+strconv.Itoa(v.process.pid()))
	return strings.Fields(out), err
}
