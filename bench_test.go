package openaisecrets

// Benchmarks of the functions that every credential goes through, in the form
// that benchstat reads. test/bench measures a credential in a real Vault.
//
// The storage counts its operations and takes no time. The simulator runs in the
// same process, so B/op and allocs/op include its memory: use them only to compare
// two versions of the engine.

import (
	"context"
	"encoding/json"
	"io"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/naming"
)

// rig is a configured mount with the role "app", without the harness's checks, which
// would cost more than the operations.
type rig struct {
	b       *testing.B
	backend *backend
	storage *watchedStorage
	sim     *openaitest.Server
}

func newRig(b *testing.B) *rig {
	b.Helper()
	r := &rig{b: b, storage: &watchedStorage{Storage: &logical.InmemStorage{}}, sim: openaitest.Start(b, openaitest.Options{})}
	r.sim.KeepAll()
	r.backend = newBackend()
	err := r.backend.Setup(context.Background(), &logical.BackendConfig{
		System: &rotationManager{StaticSystemView: &logical.StaticSystemView{
			DefaultLeaseTTLVal: 768 * time.Hour,
			MaxLeaseTTLVal:     768 * time.Hour,
			PluginEnvironment:  &logical.PluginEnvironment{VaultVersion: "1.21.2"},
		}, refusal: errCommunity},
		StorageView: r.storage,
		// A plugin sends every line to Vault, whatever Vault's log level.
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: io.Discard, JSONFormat: true}),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.backend.Cleanup(context.Background()) })
	_, key := r.sim.AdminKey()
	project := r.sim.AddProject("apps")
	r.handle(logical.UpdateOperation, "config", map[string]any{"admin_api_key": key, "api_endpoint": r.sim.URL()})
	r.handle(logical.CreateOperation, "roles/app", map[string]any{"project_id": project, "activation_timeout": 0})
	r.handle(logical.CreateOperation, "static-roles/app", map[string]any{"project_id": project, "rotation_period": "24h", "activation_timeout": 0})
	return r
}

func (r *rig) handle(op logical.Operation, path string, data map[string]any) *logical.Response {
	return r.send(&logical.Request{Operation: op, Path: path, Data: data})
}

func (r *rig) send(req *logical.Request) *logical.Response {
	req.ID, req.Storage, req.MountPoint, req.DisplayName = "req-1", r.storage, "openai/", "userpass-alice"
	resp, err := r.backend.HandleRequest(context.Background(), req)
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	if err != nil {
		r.b.Error(err)
	}
	return resp
}

// leases issues n credentials and returns their secrets as Vault stores them.
func (r *rig) leases(n int) []*logical.Secret {
	secrets := make([]*logical.Secret, n)
	for i := range secrets {
		secret := r.handle(logical.ReadOperation, "creds/app", nil).Secret
		encoded, err := json.Marshal(secret.InternalData)
		if err == nil {
			secret.InternalData = nil
			err = json.Unmarshal(encoded, &secret.InternalData)
		}
		if err != nil {
			r.b.Fatal(err)
		}
		secret.IssueTime = time.Now()
		secrets[i] = secret
	}
	return secrets
}

// measure starts the counters. The function that it returns stops them and reports the
// cost per operation.
func (r *rig) measure() (done func()) {
	r.sim.ResetRequests()
	operations := r.storage.operations.Load()
	r.b.ReportAllocs()
	r.b.ResetTimer()
	return func() {
		r.b.StopTimer()
		r.b.ReportMetric(float64(r.storage.operations.Load()-operations)/float64(r.b.N), "storage-ops/op")
		r.b.ReportMetric(float64(r.sim.Count("", ""))/float64(r.b.N), "calls/op")
	}
}

func BenchmarkIssue(b *testing.B) {
	for _, workers := range []int{1, 32} {
		b.Run("c="+strconv.Itoa(workers), func(b *testing.B) {
			r := newRig(b)
			done := r.measure()
			if workers == 1 {
				for range b.N {
					r.handle(logical.ReadOperation, "creds/app", nil)
				}
			} else {
				b.SetParallelism(workers) // goroutines per processor
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						r.handle(logical.ReadOperation, "creds/app", nil)
					}
				})
			}
			done()
		})
	}
}

func BenchmarkRevoke(b *testing.B) {
	r := newRig(b)
	leases := r.leases(b.N)
	done := r.measure()
	for _, secret := range leases {
		r.send(&logical.Request{Operation: logical.RevokeOperation, Path: "creds/app", Secret: secret})
	}
	done()
}

func BenchmarkRenew(b *testing.B) {
	r := newRig(b)
	lease := r.leases(1)[0]
	done := r.measure()
	for range b.N {
		secret := *lease
		r.send(&logical.Request{Operation: logical.RenewOperation, Path: "creds/app", Secret: &secret, Data: map[string]any{}})
	}
	done()
}

func BenchmarkStaticRead(b *testing.B) {
	r := newRig(b)
	done := r.measure()
	for range b.N {
		r.handle(logical.ReadOperation, "static-creds/app", nil)
	}
	done()
}

func BenchmarkAccountName(b *testing.B) {
	data := naming.Data{RoleName: "app", DisplayName: "userpass-alice", ProjectID: "proj_0123456789abcdef", UnixTime: 1767323045, RandomSuffix: "ab3defghij4klmn"}
	for _, c := range []struct{ name, template string }{
		{"default", naming.DefaultTemplate},
		{"long", `{{.RoleName | truncate 20}}-{{.DisplayName | lowercase | truncate 40}}-{{.UnixTime}}-{{.RandomSuffix}}`},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := naming.Name(c.template, data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReadRole(b *testing.B) {
	r := newRig(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := getRole(context.Background(), r.storage, "app"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadLease(b *testing.B) {
	r := newRig(b)
	req := &logical.Request{Secret: r.leases(1)[0]}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeLease(req); err != nil {
			b.Fatal(err)
		}
	}
}
