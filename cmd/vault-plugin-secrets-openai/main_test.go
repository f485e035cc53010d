package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// Go reads the system's roots once, so each environment needs a separate process:
// this test starts itself with the certificate to verify.
func TestRoots_SystemRootsTakePrecedence(t *testing.T) {
	if path := os.Getenv("TEST_JUDGE"); path != "" {
		if _, err := readCertificate(t, path).Verify(x509.VerifyOptions{KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Log("NOT TRUSTED: ", err)
		} else {
			t.Log("TRUSTED")
		}
		return
	}
	if runtime.GOOS != "linux" {
		t.Skip("NOT TESTED: the roots that come with the binary, which this system's own verifier is preferred to")
	}

	dir := t.TempDir()
	public, private, nowhere := filepath.Join(dir, "public.pem"), filepath.Join(dir, "private.pem"), filepath.Join(dir, "nowhere")
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			writeCertificate(t, public, root.Certificate)
			break
		}
	}
	writeCertificate(t, private, newRoot(t))

	for _, c := range []struct{ what, system, judged, want string }{
		{"no system roots: the binary's count", nowhere, public, "TRUSTED"},
		{"no system roots: only the binary's count", nowhere, private, "NOT TRUSTED"},
		{"system roots count", private, private, "TRUSTED"},
		{"system roots alone count", private, public, "NOT TRUSTED"},
	} {
		t.Run(c.what, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestRoots_SystemRootsTakePrecedence$", "-test.v")
			cmd.Env = append(os.Environ(), "TEST_JUDGE="+c.judged, "SSL_CERT_FILE="+c.system, "SSL_CERT_DIR="+nowhere)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, string(out))
			require.Contains(t, string(out), ": "+c.want)
		})
	}
}

func newRoot(t *testing.T) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "a private root"},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return der
}

func writeCertificate(t *testing.T, path string, der []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
}

func readCertificate(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	block, _ := pem.Decode(content)
	cert, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	return cert
}
