package openaisecrets

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

func TestParseEndpoint(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"https://api.openai.com/v1":        "https://api.openai.com/v1",
		"https://api.openai.com/v1/":       "https://api.openai.com/v1",
		"HTTPS://eu.api.openai.com/v1":     "https://eu.api.openai.com/v1",
		"http://127.0.0.1:8080/v1":         "http://127.0.0.1:8080/v1",
		"http://[::1]:8080/v1":             "http://[::1]:8080/v1",
		"http://localhost/v1":              "http://localhost/v1",
		"http://127.0.0.1.evil.example/v1": "",
		"http://10.0.0.1/v1":               "",
		"https://":                         "",
		"https:opaque":                     "",
		"/v1":                              "",
		"":                                 "",
		"ftp://api.openai.com/v1":          "",
		"https://api.openai.com/v1#x":      "",
		"https://api.openai.com/v1#":       "",
		"https://api.openai.com/v1?":       "",
		"https://user@api.openai.com":      "",
		"https://api.openai.com/\x00":      "",
		"https://api.openai.com/ä\xff":     "",
		"https://exa mple.com":             "",
	} {
		got, problem := parseEndpoint(raw, false)
		require.Equal(t, want, got, raw)
		require.Equal(t, want == "", problem != "", raw)
	}
	got, problem := parseEndpoint("http://10.0.0.1/v1", true)
	require.Equal(t, "http://10.0.0.1/v1", got)
	require.Empty(t, problem)
}

func FuzzParseEndpoint(f *testing.F) {
	for _, seed := range []string{"https://api.openai.com/v1", "http://localhost:1", "https://a@b/?#", "http://[::1%25eth0]/", "\xff", "https://%"} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, raw string, insecure bool) {
		endpoint, problem := parseEndpoint(raw, insecure)
		if (endpoint == "") == (problem == "") {
			t.Fatalf("%q: endpoint %q, problem %q", raw, endpoint, problem)
		}
		if problem != "" {
			return
		}
		again, problem := parseEndpoint(endpoint, insecure)
		if problem != "" || again != endpoint {
			t.Fatalf("%q becomes %q, which becomes %q (%s)", raw, endpoint, again, problem)
		}
		if !insecure && !strings.HasPrefix(endpoint, "https://") && !strings.HasPrefix(endpoint, "http://localhost") &&
			!strings.HasPrefix(endpoint, "http://127.") && !strings.HasPrefix(endpoint, "http://[") {
			t.Fatalf("%q is accepted as %q", raw, endpoint)
		}
	})
}

// authority creates a CA certificate, in PEM.
func authority(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestConfig_AddingACARequiresTheAdminKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{TLS: true})
	_, key := h.sim.AdminKey()
	its, other := h.sim.CACert(), authority(t, "other")
	h.configure(map[string]any{"ca_cert": its + other})
	for name, bundle := range map[string]string{
		"another CA":                     authority(t, "evil"),
		"an additional CA":               its + other + authority(t, "evil"),
		"an additional CA first":         authority(t, "evil") + its,
		"an additional CA after garbage": its + "-----BEGIN X-----\n-----END X-----\ngarbage\n" + authority(t, "evil"),
		"the system's CAs":               "",
		"a CA of the same name":          its + authority(t, "other"),
	} {
		for _, skip := range []bool{false, true} {
			before := h.entries()
			said := h.refused(h.write("config", map[string]any{"ca_cert": bundle, "skip_verify": skip}))
			require.Contains(t, said, "ca_cert", name)
			require.Contains(t, said, "create another admin key", name)
			require.Equal(t, before, h.entries(), name)
		}
	}
	comment := "# the gateway's\n"
	for _, bundle := range []string{its + other, other + its, its + its, comment + its, strings.ReplaceAll(its, "\n", "\r\n")} {
		h.must(h.write("config", map[string]any{"ca_cert": bundle}))
		h.must(h.write("config", map[string]any{"request_timeout": 9}))
		h.must(h.write("config", map[string]any{"ca_cert": its + other, "admin_api_key": key}))
	}
	h.must(h.write("config", map[string]any{"ca_cert": "", "admin_api_key": key, "skip_verify": true}))
	require.Contains(t, h.refused(h.write("config", map[string]any{"ca_cert": its})), "requires admin_api_key", "from the system's CAs to a single CA")
	h.must(h.write("config", map[string]any{"ca_cert": "", "skip_verify": true}))
}

func TestConfig_OtherFieldsDoNotRequireTheAdminKey(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{TLS: true})
	h.configure(map[string]any{"ca_cert": h.sim.CACert()})
	h.must(h.write("config/rotate", nil))
	h.sim.KeepAll()
	host := strings.TrimPrefix(h.sim.URL(), "https://")
	for _, data := range []map[string]any{
		{"api_endpoint": "http://" + host, "allow_insecure_endpoint": true}, {"api_endpoint": "https://127.0.0.1:1/v1"}, {"api_endpoint": ""},
	} {
		require.Contains(t, h.refused(h.write("config", data)), "create another admin key")
	}
	for _, data := range []map[string]any{
		{"organization_id": h.sim.OrganizationID()}, {"allow_insecure_endpoint": true}, {"request_timeout": 9}, {"max_concurrent_requests": 9}, {"project_id": h.project},
	} {
		h.must(h.write("config", data))
		require.Equal(t, h.sim.URL(), h.config()["api_endpoint"])
	}
}

func TestConfig_SkipVerifyDoesNotReplaceARotatedKey(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	made := h.adminKeyID()
	lease := h.lease("creds/app", nil)
	for _, data := range []map[string]any{
		{"admin_api_key": "garbage"}, {"admin_api_key": "garbage", "admin_api_key_id": "key_x"}, {"admin_api_key": "garbage", "admin_api_key_id": made},
		{"admin_api_key": "garbage", "api_endpoint": "https://127.0.0.1:1/v1"},
	} {
		data["skip_verify"] = true
		before := h.entries()
		said := h.refused(h.write("config", data))
		require.Contains(t, said, made)
		require.Contains(t, said, "force=true")
		require.Equal(t, before, h.entries())
	}
	require.NoError(t, h.revoke(lease), "the engine still works")

	// With force, superseded keys stay until the ID of the active key is known.
	resp := h.must(h.write("config", map[string]any{"admin_api_key": "garbage", "skip_verify": true, "force": true}))
	stuck := func(resp *logical.Response) {
		t.Helper()
		said := strings.Join(resp.Warnings, " ")
		require.Contains(t, said, "only after it has checked")
		require.Contains(t, said, made)
		require.Contains(t, said, "without skip_verify")
	}
	stuck(resp)
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Contains(t, h.adminKeyIDs(), made)
	stuck(h.must(h.read("config")))
	require.Len(t, h.lines("superseded admin keys not checked: the list of admin keys could not be read"), 1)
	require.Empty(t, h.config()["last_rotated"])
	resp = h.must(h.write("config", map[string]any{"rotation_grace_period": 0, "skip_verify": true}))
	stuck(resp)
	require.NotContains(t, strings.Join(resp.Warnings, " "), "could not be deleted yet")
	id, key := h.sim.AddAdminKey("by hand")
	h.must(h.write("config", map[string]any{"admin_api_key": key}))
	h.runPeriodicWork()
	require.Equal(t, []string{id}, h.adminKeyIDs())
}

func TestConfig_ASupersededKeyRequiresForce(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	first, value := h.sim.AdminKey()
	h.must(h.write("config", map[string]any{"rotation_period": "24h"}))
	h.must(h.write("config/rotate", nil))
	rotated, planned := h.config()["last_rotated"], h.time("next_rotation")
	for _, data := range []map[string]any{{"admin_api_key": value}, {"admin_api_key": value, "admin_api_key_id": first}, {"admin_api_key": value, "api_endpoint": h.sim.URL(), "rotation_grace_period": "1h"}} {
		before := h.entries()
		said := h.refused(h.write("config", data))
		require.Contains(t, said, first)
		require.Contains(t, said, "superseded at")
		require.Contains(t, said, "force=true")
		require.Equal(t, before, h.entries())
	}
	require.Equal(t, rotated, h.config()["last_rotated"])
	require.Equal(t, planned, h.time("next_rotation"))
	require.NotEmpty(t, h.measured().of("admin_key_last_rotation_timestamp_seconds"))

	h.must(h.write("config", map[string]any{"admin_api_key": value, "force": true}))
	require.Equal(t, first, h.adminKeyID())
	require.Empty(t, h.config()["last_rotated"], "no rotation created the active key")
	require.Empty(t, h.measured().of("admin_key_last_rotation_timestamp_seconds"))
	h.restart()
	require.Empty(t, h.config()["last_rotated"])
	h.advance(time.Hour)
	h.runPeriodicWork()
	require.Contains(t, h.adminKeyIDs(), first)
	// An active key can be written again like any other, and is rotated.
	h.must(h.write("config", map[string]any{"admin_api_key": value}))
	h.must(h.write("config/rotate", nil))
	require.NotEmpty(t, h.config()["last_rotated"])
}

// A tool that always sends the field, even if it is empty, can change other fields.
func TestConfig_AnEmptyAdminKeyIDIsIgnored(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.sim.KeepAll()
	h.must(h.write("config/rotate", nil))
	id := h.adminKeyID()
	for _, skip := range []bool{false, true} {
		h.must(h.write("config", map[string]any{"admin_api_key_id": "", "tidy_interval": "6h", "skip_verify": skip}))
		require.Equal(t, id, h.adminKeyID())
	}
	h.refused(h.write("config", map[string]any{"admin_api_key_id": "key_other"}))
	require.NotContains(t, h.refused(h.write("config", map[string]any{"api_endpoint": "https://user:p%zzsecret@host/v1"})), "secret")
}
