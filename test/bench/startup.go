package main

// The time from the start of a plugin process until it accepts connections.

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os/exec"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-openai/test/devenv"
)

// startup starts each plugin as Vault does and waits for its handshake line. With
// Vault itself, the time would include Vault's other work.
func startup(ctx context.Context, l *lab) error {
	cert, err := clientCertificate()
	if err != nil {
		return err
	}
	env := []string{
		plugin.HandshakeConfig.MagicCookieKey + "=" + plugin.HandshakeConfig.MagicCookieValue,
		"PLUGIN_PROTOCOL_VERSIONS=3,4,5",
		"PLUGIN_CLIENT_CERT=" + cert, // the plugin then creates its own, as under Vault
		"PLUGIN_UNIX_SOCKET_DIR=" + l.dir,
		pluginutil.PluginAutoMTLSEnv + "=true",
		pluginutil.PluginVaultVersionEnv + "=1.21.2",
		"TMPDIR=" + l.dir,
	}
	for range l.settings.size(10, 2) {
		for _, p := range []devenv.Plugin{l.null, l.engine} {
			took, err := handshake(ctx, p.Path, env)
			if err != nil {
				return err
			}
			l.book.note("startup", "start of the plugin process until its handshake", "ms", p.Name == l.engine.Name, milliseconds(took))
		}
	}
	return nil
}

func handshake(ctx context.Context, path string, env []string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel() // which ends the process
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = env
	var said strings.Builder
	cmd.Stderr = &said
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	took = time.Since(began)
	cancel()
	_ = cmd.Wait() // the context killed it
	if parts := strings.Split(line, "|"); err != nil || len(parts) < 5 || parts[4] != "grpc" {
		return 0, errors.Join(err, fmt.Errorf("the plugin printed %q instead of a handshake line: %s", line, said.String()))
	}
	return took, nil
}

// clientCertificate is a certificate like those that Vault creates for plugins.
func clientCertificate() (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		return "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}
