package openaisecrets

// The harness of the unit tests: a backend on in-memory storage that can fail or crash at
// any step, the real client, and the simulator. At the end of each test it checks that no
// key or account remains at OpenAI unless the test kept it, and that no key appears in
// the log, an error, an event, a storage key, or a read of the config or the metrics.

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/naming"
	"vault-plugin-secrets-openai/internal/sysview"
)

// Most tests spend their time in timeouts and backoffs, so many more of them run in
// parallel than there are cores.
func TestMain(m *testing.M) {
	flag.Parse()
	if fuzzing := flag.Lookup("test.fuzz").Value.String() != ""; !fuzzing { // also sets the fuzz workers
		if err := flag.Set("test.parallel", "64"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// harness is one mount.
type harness struct {
	t       *testing.T
	b       *backend
	system  *logical.StaticSystemView
	manager *rotationManager
	storage *faultyStorage
	sim     *openaitest.Server
	project string
	log     *lockedBuffer
	events  *eventRecorder
	// releaseStatic undoes holdStatic, and releasePools undoes holdPools.
	releaseStatic, releasePools func()
	// leases are the leases that the arrange step of a fault table issued.
	leases []*logical.Response

	mu     sync.Mutex
	offset time.Duration
	said   []string // every error and warning that a caller received
}

// newHarness returns a mount that is not configured, with one project at the
// simulator.
func newHarness(t *testing.T, opts openaitest.Options) *harness {
	t.Helper()
	h := &harness{
		t:       t,
		sim:     openaitest.Start(t, opts),
		storage: &faultyStorage{inner: &logical.InmemStorage{}},
		log:     &lockedBuffer{},
		events:  &eventRecorder{},
		system: &logical.StaticSystemView{
			DefaultLeaseTTLVal: 768 * time.Hour,
			MaxLeaseTTLVal:     768 * time.Hour,
			PluginEnvironment:  &logical.PluginEnvironment{VaultVersion: "1.21.2", VaultVersionMetadata: "ent"}, // supports events
		},
	}
	h.manager = &rotationManager{StaticSystemView: h.system, refusal: errCommunity}
	h.sim.Validate(t)
	h.project = h.sim.AddProject("apps")
	h.restart()
	// A test keeps the cleanups of its subtests to its end: release the harness early.
	kept := h
	t.Cleanup(func() { kept.checkSecrets(); kept = nil })
	return h
}

// tune sets the mount's max_lease_ttl, as vault secrets tune does.
func (h *harness) tune(maxLeaseTTL time.Duration) {
	h.system.MaxLeaseTTLVal = maxLeaseTTL
	time.Sleep(sysview.FreshFor)
}

// become puts the node into another replication state.
func (h *harness) become(state consts.ReplicationState) {
	h.system.ReplicationStateVal = state
	time.Sleep(sysview.FreshFor)
}

// configured is newHarness with a config and the role "app".
func configured(t *testing.T, opts openaitest.Options) *harness {
	t.Helper()
	h := newHarness(t, opts)
	h.configure(nil)
	h.must(h.write("roles/app", map[string]any{"project_id": h.project}))
	return h
}

// configure writes the simulator's first admin key, and more if given.
func (h *harness) configure(more map[string]any) {
	h.t.Helper()
	_, key := h.sim.AdminKey()
	data := map[string]any{"admin_api_key": key, "api_endpoint": h.sim.URL()}
	for k, v := range more {
		data[k] = v
	}
	h.must(h.write("config", data))
}

// restart creates a new backend on the same storage, like a new plugin process.
func (h *harness) restart() {
	h.t.Helper()
	if h.events == nil {
		h.events = &eventRecorder{}
	}
	b := newBackend()
	b.now = h.now
	require.NoError(h.t, b.Setup(context.Background(), &logical.BackendConfig{
		System:       h.manager,
		StorageView:  h.storage,
		EventsSender: h.events, ObservationRecorder: h.events,
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: h.log, JSONFormat: true}),
	}))
	h.b = b
	h.storage.lived(b.lifetime)
	h.t.Cleanup(func() { b.Cleanup(context.Background()); b = nil })
}

// waitForAbandonedRequests waits, if the process has died, until the simulator has handled
// its requests. On a busy machine, a canceled request can arrive after the test has moved
// the clocks, and a late probe then looks like the use of a returned key.
func (h *harness) waitForAbandonedRequests() {
	h.t.Helper()
	if !h.storage.died() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	require.NoError(h.t, h.sim.CloseConnections(ctx))
}

func (h *harness) now() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Add(h.offset)
}

// shortTimeout is the request_timeout of tests with a hanging call. It is short, since
// each hanging call lasts that long, and long enough for every other call on a busy
// machine.
const shortTimeout = "5s"

// hangs sets shortTimeout if the fault makes a call hang.
func (h *harness) hangs(kind openaitest.FaultKind) {
	h.t.Helper()
	if kind == openaitest.FaultHang || kind == openaitest.FaultHangAfter {
		h.must(h.write("config", map[string]any{"request_timeout": shortTimeout}))
	}
}

// setClock sets the engine's clock, but not OpenAI's.
func (h *harness) setClock(ahead time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.offset = ahead
}

// advance moves the clocks of the engine and of the simulator.
func (h *harness) advance(d time.Duration) {
	h.mu.Lock()
	h.offset += d
	h.mu.Unlock()
	h.sim.Advance(d)
}

// do sends a request as Vault does, with data that passed through JSON, and validates the
// response against the path's schema.
func (h *harness) do(ctx context.Context, op logical.Operation, at string, data map[string]any) (resp *logical.Response, err error) {
	h.t.Helper()
	defer func() {
		if died := recover(); died == any(errKilled) {
			resp, err = nil, errKilled
		} else if died != nil {
			panic(died)
		}
		h.recordMessages(resp, err)
	}()
	req := &logical.Request{
		ID: "req-1", Operation: op, Path: at, Data: throughJSON(h.t, data),
		Storage: h.storage, MountPoint: "openai/", DisplayName: "userpass-alice",
	}
	if op == logical.UpdateOperation { // Vault turns a write of a new entry into a create
		if checked, exists, existErr := h.b.HandleExistenceCheck(ctx, req); existErr == nil && checked && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	resp, err = h.b.HandleRequest(ctx, req)
	if err == nil && !resp.IsError() {
		h.checkSchema(req, resp)
	}
	return resp, err
}

func (h *harness) checkSchema(req *logical.Request, resp *logical.Response) {
	h.t.Helper()
	if resp == nil && req.Operation == logical.ReadOperation {
		return // no entry: Vault answers 404
	}
	if resp != nil && resp.Data[logical.HTTPStatusCode] == http.StatusNotFound {
		return // no entry, with an explanation
	}
	p := h.b.Route(req.Path)
	require.NotNil(h.t, p, req.Path)
	if strings.HasPrefix(req.Path, "usage") && resp.Data["http_raw_body"] == nil { // the schema lacks the fields of each group
		fixed := *resp
		fixed.Data = maps.Clone(resp.Data)
		maps.DeleteFunc(fixed.Data, func(name string, _ any) bool {
			for _, prefix := range []string{costField, "requests_", "input_tokens_", "output_tokens_"} {
				if strings.HasPrefix(name, prefix) {
					return true
				}
			}
			return false
		})
		resp = &fixed
	}
	if resp != nil && resp.Data["http_raw_body"] != nil {
		return
	}
	s := schema.GetResponseSchema(h.t, p, req.Operation)
	schema.ValidateResponse(h.t, s, resp, true)
}

func (h *harness) recordMessages(resp *logical.Response, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.said = append(h.said, err.Error())
	}
	if resp.IsError() {
		h.said = append(h.said, resp.Error().Error())
	}
	if resp != nil {
		h.said = append(h.said, resp.Warnings...)
	}
}

func (h *harness) read(at string) (*logical.Response, error) {
	h.t.Helper()
	return h.do(context.Background(), logical.ReadOperation, at, nil)
}

func (h *harness) write(at string, data map[string]any) (*logical.Response, error) {
	h.t.Helper()
	return h.do(context.Background(), logical.UpdateOperation, at, data)
}

func (h *harness) list(at string) (*logical.Response, error) {
	h.t.Helper()
	return h.do(context.Background(), logical.ListOperation, at, nil)
}

func (h *harness) remove(at string) (*logical.Response, error) {
	h.t.Helper()
	return h.do(context.Background(), logical.DeleteOperation, at, nil)
}

// must fails the test unless a request succeeded.
func (h *harness) must(resp *logical.Response, err error) *logical.Response {
	h.t.Helper()
	require.NoError(h.t, err)
	require.NoError(h.t, resp.Error())
	return resp
}

// refused fails the test unless the response is an error with status 400, and returns its
// text.
func (h *harness) refused(resp *logical.Response, err error) string {
	h.t.Helper()
	require.NoError(h.t, err)
	require.True(h.t, resp.IsError(), "not rejected: %v", resp)
	return resp.Error().Error()
}

// lease issues a credential and returns the lease as Vault stores it.
func (h *harness) lease(at string, data map[string]any) *logical.Response {
	h.t.Helper()
	resp := h.must(h.do(context.Background(), logical.ReadOperation, at, data))
	require.NotNil(h.t, resp.Secret)
	return h.stored(resp)
}

// stored sends a lease through JSON, as Vault's storage does.
func (h *harness) stored(resp *logical.Response) *logical.Response {
	h.t.Helper()
	secret := *resp.Secret
	secret.InternalData = throughJSON(h.t, secret.InternalData)
	secret.IssueTime = time.Now()
	return &logical.Response{Secret: &secret, Data: throughJSON(h.t, resp.Data), Warnings: resp.Warnings}
}

// end sends a renewal or revocation as Vault does.
func (h *harness) end(op logical.Operation, lease *logical.Response) (*logical.Response, error) {
	h.t.Helper()
	secret := *lease.Secret
	req := &logical.Request{Operation: op, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: lease.Data}
	resp, err := h.b.HandleRequest(context.Background(), req)
	h.recordMessages(resp, err)
	return resp, err
}

func (h *harness) revoke(lease *logical.Response) error {
	h.t.Helper()
	resp, err := h.end(logical.RevokeOperation, lease)
	require.Nil(h.t, resp, "Vault reads a response to a revocation, too")
	return err
}

// runPeriodicWork does the work that Vault's rollback tick starts, but WAL entries of any
// age are due, and every 404 is final.
func (h *harness) runPeriodicWork() {
	h.t.Helper()
	for _, j := range h.b.work.jobs() {
		release, err := j.Wait(context.Background())
		require.NoError(h.t, err)
		defer release()
	}
	if !h.b.WriteSafeReplicationState() {
		return
	}
	ctx, req := client.Background(context.Background()), &logical.Request{Storage: h.storage, MountPoint: "openai/"}
	for _, run := range []func() error{
		func() error { return h.b.runSchedule(context.Background(), req) },
		func() error { return h.b.deleteSuperseded(ctx, req) },
		func() error { return h.b.tidyIfDue(ctx, req) },
		func() error { return h.b.refreshWAL(ctx, req) },
	} {
		if err := run(); err != nil {
			h.recordMessages(nil, err)
		}
	}
	defer h.treatNotFoundAsFinal()()
	for _, kind := range walKinds {
		h.b.complainWAL(ctx, req, kind, h.b.runWAL(ctx, req, kind, 0).err())
	}
}

// treatNotFoundAsFinal makes every 404 final, whatever the age of the account or key,
// until restore.
func (h *harness) treatNotFoundAsFinal() (restore func()) {
	b := h.b
	b.settling.Store(0)
	return func() { b.settling.Store(int64(notFinalBefore)) }
}

// rollback sends Vault's rollback tick and waits for the work that it starts.
func (h *harness) rollback() {
	h.t.Helper()
	resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
	h.recordMessages(resp, err)
	release, err := h.b.rotation.look.Wait(context.Background())
	require.NoError(h.t, err)
	release()
	h.settle()
}

// settle waits for the work that the last tick started.
func (h *harness) settle() {
	h.t.Helper()
	for _, j := range h.b.work.jobs() {
		release, err := j.Wait(context.Background())
		require.NoError(h.t, err)
		release()
	}
}

// walEntries returns the IDs of the WAL entries.
func (h *harness) walEntries() []string {
	h.t.Helper()
	ids, err := framework.ListWAL(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	return ids
}

// checkSecrets searches logs, errors, events and reads for every key of the simulator.
func (h *harness) checkSecrets() {
	h.storage.heal()
	texts := map[string]string{"log": h.log.String(), "errors": strings.Join(h.said, "\n"), "events": h.events.text()}
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	texts["storage keys"] = strings.Join(keys, "\n")
	for _, at := range []string{"config", "metrics"} {
		if resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: at, Storage: h.storage}); err == nil && resp != nil {
			texts[at+" read"] = fmt.Sprint(resp.Data)
		}
	}
	// Read each text once, not once for each of a thousand keys.
	const begins = "sk-"
	secrets := map[string][]string{} // by their first characters
	for _, secret := range h.sim.Secrets() {
		require.True(h.t, strings.HasPrefix(secret, begins))
		secrets[secret[:20]] = append(secrets[secret[:20]], secret)
	}
	for where, text := range texts {
		for rest, found := text, true; found; {
			if _, rest, found = strings.Cut(rest, begins); !found || len(rest) < 20 {
				continue
			}
			for _, secret := range secrets[begins+rest[:20-len(begins)]] {
				if strings.HasPrefix(begins+rest, secret) {
					h.t.Errorf("a key is in the %s: %s", where, secret[:12]+"...")
				}
			}
		}
	}
}

// onlyLeased fails the test unless OpenAI has only the accounts of these leases and the
// WAL is empty.
func (h *harness) onlyLeased(leases ...*logical.Response) {
	h.t.Helper()
	var want, alive []string
	for _, lease := range leases {
		want = append(want, lease.Data["service_account_id"].(string))
	}
	for _, a := range h.sim.Accounts() {
		alive = append(alive, a.ID)
	}
	require.ElementsMatch(h.t, want, alive, "accounts at OpenAI")
	require.Empty(h.t, h.walEntries(), "the WAL")
}

// throughJSON encodes a map as JSON and decodes it, as storage and HTTP do.
func throughJSON(t *testing.T, data map[string]any) map[string]any {
	t.Helper()
	if data == nil {
		return map[string]any{}
	}
	encoded, err := json.Marshal(data)
	require.NoError(t, err)
	decoder := json.NewDecoder(bytes.NewReader(encoded))
	decoder.UseNumber()
	var result map[string]any
	require.NoError(t, decoder.Decode(&result))
	return result
}

// lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// adminKeyIDs returns the IDs of the valid admin keys.
func (h *harness) adminKeyIDs() []string {
	var ids []string
	for _, k := range h.sim.AdminKeys() {
		ids = append(ids, k.ID)
	}
	slices.Sort(ids)
	return ids
}

// role replaces the role "app", in the harness's project.
func (h *harness) role(data map[string]any) *logical.Response {
	h.t.Helper()
	h.must(h.remove("roles/app"))
	all := map[string]any{"project_id": h.project}
	for k, v := range data {
		all[k] = v
	}
	return h.must(h.write("roles/app", all))
}

// adopted creates a service account outside the engine and makes "app" a role that leases
// its keys. It returns the account's ID.
func (h *harness) adopted(data map[string]any) string {
	h.t.Helper()
	id := h.sim.AddServiceAccount(h.project, "batch")
	all := map[string]any{"credential_type": typeKey, "service_account_id": id}
	for k, v := range data {
		all[k] = v
	}
	h.role(all)
	return id
}

// onlyKeys fails the test unless OpenAI has only the adopted account and the keys of
// these leases, and the WAL is empty.
func (h *harness) onlyKeys(account string, leases ...*logical.Response) {
	h.t.Helper()
	var want, alive []string
	for _, lease := range leases {
		want = append(want, lease.Data["api_key_id"].(string))
	}
	for _, k := range h.sim.Keys() {
		alive = append(alive, k.ID)
	}
	require.Equal(h.t, []string{account}, h.alive(), "accounts at OpenAI")
	require.ElementsMatch(h.t, want, alive, "valid keys at OpenAI")
	require.Empty(h.t, h.walEntries(), "the WAL")
}

// renew sends the renewal of a lease of that age as Vault does, and returns the lease as
// Vault then stores it, or the error.
func (h *harness) renew(ctx context.Context, lease *logical.Response, age, increment time.Duration) (*logical.Response, error) {
	h.t.Helper()
	secret := *lease.Secret
	secret.InternalData = throughJSON(h.t, lease.Secret.InternalData)
	secret.IssueTime = time.Now().Add(-age) // Vault's clock is the machine's
	secret.Increment = increment
	req := &logical.Request{Operation: logical.RenewOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: throughJSON(h.t, lease.Data)}
	resp, err := h.b.HandleRequest(ctx, req)
	h.recordMessages(resp, err)
	if err != nil || resp.IsError() {
		return resp, err
	}
	renewed := h.stored(resp)
	renewed.Secret.IssueTime = secret.IssueTime
	// Vault calculates its own TTL from the response.
	renewed.Secret.TTL, _, err = framework.CalculateTTL(h.system, increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, secret.IssueTime)
	require.NoError(h.t, err)
	return renewed, nil
}

// sendAlone sends a request with its own transport. A test server that closes also closes
// the idle connections of the default transport, which can break a request of another
// test in a bubble.
func sendAlone(req *http.Request) (*http.Response, error) {
	return (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
}

// inference calls the inference API with a leased key and returns the status.
func (h *harness) inference(lease *logical.Response, method, route string) int {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), method, h.sim.URL()+route, nil)
	require.NoError(h.t, err)
	req.Header.Set("Authorization", "Bearer "+lease.Data["api_key"].(string))
	resp, err := sendAlone(req)
	require.NoError(h.t, err)
	defer resp.Body.Close()
	return resp.StatusCode
}

// bodies records the body of each request from now on.
func (h *harness) bodies() func() []string {
	var mu sync.Mutex
	var all []string
	h.sim.Fail(openaitest.Fault{Match: func(r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if len(body) > 0 {
			all = append(all, r.Method+" "+string(body))
		}
		return false // observes only
	}})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// routes returns the calls since the last ResetRequests, in order.
func (h *harness) routes() []string {
	var all []string
	for _, r := range h.sim.Requests() {
		all = append(all, r.Method+" "+r.Route)
	}
	return all
}

// about fails the test unless a time in a response is near want. The engine and the
// simulator truncate their clocks differently.
func about(t *testing.T, want time.Time, text any) {
	t.Helper()
	got, err := time.Parse(time.RFC3339, fmt.Sprint(text))
	require.NoError(t, err)
	require.WithinDuration(t, want, got, 30*time.Second)
}

// eventRecorder receives events and observations in place of Vault.
type eventRecorder struct {
	mu           sync.Mutex
	refusal      error
	asked        int
	events       map[string]map[string]string // the last of each type
	observations map[string]map[string]any
	all          strings.Builder
}

func (e *eventRecorder) SendEvent(_ context.Context, kind logical.EventType, event *logical.EventData) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	if e.refusal != nil {
		return e.refusal
	}
	data := map[string]string{}
	for name, value := range event.Metadata.AsMap() {
		data[name] = fmt.Sprint(value)
	}
	if e.events == nil {
		e.events = map[string]map[string]string{}
	}
	e.events[string(kind)] = data
	fmt.Fprintln(&e.all, kind, data)
	return nil
}

func (e *eventRecorder) RecordObservationFromPlugin(_ context.Context, kind string, data map[string]any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	if e.refusal != nil {
		return e.refusal
	}
	if e.observations == nil {
		e.observations = map[string]map[string]any{}
	}
	e.observations[kind] = data
	fmt.Fprintln(&e.all, kind, data)
	return nil
}

func (e *eventRecorder) text() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all.String()
}

// heard waits for an event and its observation, and removes them.
func (e *eventRecorder) heard(t *testing.T, kind string) map[string]string {
	t.Helper()
	var event map[string]string
	require.Eventually(t, func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.events[kind] == nil || e.observations[kind] == nil {
			return false
		}
		event = e.events[kind]
		for name, value := range e.observations[kind] {
			require.Equal(t, event[name], value, name)
		}
		delete(e.events, kind)
		delete(e.observations, kind)
		return true
	}, time.Minute, 5*time.Millisecond, "no event %s", kind)
	return event
}

// lines returns the log lines with a message.
func (h *harness) lines(message string) (found []map[string]any) {
	h.t.Helper()
	for line := range strings.Lines(h.log.String()) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) == nil && entry["@message"] == message {
			found = append(found, entry)
		}
	}
	return found
}

// measured reads the mount's metrics as JSON.
func (h *harness) measured() series {
	h.t.Helper()
	all := series{}
	resp := h.must(h.read("metrics"))
	for kind, field := range map[string]string{"counters": "value", "gauges": "value", "histograms": "count"} {
		for _, raw := range resp.Data[kind].([]any) {
			item := raw.(map[string]any)
			var labels []string
			for name, value := range item["labels"].(map[string]any) {
				labels = append(labels, fmt.Sprintf("%s=%q", name, value))
			}
			slices.Sort(labels)
			value, isFloat := item[field].(float64)
			if !isFloat {
				value = float64(item[field].(uint64))
			}
			all[item["name"].(string)+"{"+strings.Join(labels, ",")+"}"] = value
		}
	}
	return all
}

// tidy starts a tidy run by hand, waits for its end and returns its status.
func (h *harness) tidy(apply bool) map[string]any {
	h.t.Helper()
	h.must(h.write("tidy", map[string]any{"apply": apply}))
	return h.tidied()
}

// tidied waits for the end of the tidy run in progress and returns its status.
func (h *harness) tidied() map[string]any {
	h.t.Helper()
	require.Eventually(h.t, func() bool {
		state := h.b.tidy.current().state
		return state != tidyRunning && state != tidyCancelling
	}, 5*time.Minute, time.Millisecond)
	return h.must(h.read("tidy-status")).Data
}

// alive returns the IDs of the accounts at OpenAI.
func (h *harness) alive() []string {
	ids := []string{}
	for _, a := range h.sim.Accounts() {
		ids = append(ids, a.ID)
	}
	return ids
}

// account creates a service account like a request whose response never reached Vault.
func (h *harness) account(project, name string, expiry time.Duration) string {
	h.t.Helper()
	made, _, err := h.api().CreateServiceAccount(h.t.Context(), project, name, expiry)
	require.NoError(h.t, err)
	return made.ID
}

func (h *harness) api() *client.Client {
	h.t.Helper()
	snap, err := h.b.current(h.t.Context(), h.storage)
	require.NoError(h.t, err)
	return snap.api
}

// ours returns a name with the mount tag.
func (h *harness) ours() string {
	h.t.Helper()
	tag, err := getTag(h.t.Context(), h.storage.inner)
	require.NoError(h.t, err)
	random, err := naming.Random(naming.RandomLength)
	require.NoError(h.t, err)
	return "vault-app-" + tag + random
}

// orphan creates an old account of this mount whose key has expired.
func (h *harness) orphan() string {
	h.t.Helper()
	id := h.account(h.project, h.ours(), time.Minute)
	h.advance(defaultTidySafetyBuffer + 2*time.Minute)
	return id
}

// anotherMount is a second mount for the same organization.
func (h *harness) anotherMount() *harness {
	h.t.Helper()
	other := &harness{t: h.t, sim: h.sim, storage: &faultyStorage{inner: &logical.InmemStorage{}}, log: &lockedBuffer{}, system: h.system, manager: h.manager, project: h.project, offset: h.offset}
	other.restart()
	other.configure(nil)
	return other
}

func (h *harness) recorded() []string {
	h.t.Helper()
	ids, err := h.storage.inner.List(h.t.Context(), projectStoragePrefix)
	require.NoError(h.t, err)
	return ids
}

// key creates a key of an account like a request whose response never reached Vault.
func (h *harness) key(account, name string, expiry time.Duration) string {
	h.t.Helper()
	made, err := h.api().CreateServiceAccountKey(h.t.Context(), h.project, account, name, nil, expiry)
	require.NoError(h.t, err)
	return made.ID
}

// keysThere returns the IDs of all keys that OpenAI lists, including expired ones.
func (h *harness) keysThere() []string {
	h.t.Helper()
	keys, err := h.api().ListProjectKeys(h.t.Context(), h.project)
	require.NoError(h.t, err)
	ids := []string{}
	for _, k := range keys {
		ids = append(ids, k.ID)
	}
	return ids
}

// keyEnd returns the expiry of the only valid key.
func (h *harness) keyEnd() time.Time {
	h.t.Helper()
	keys := h.sim.Keys()
	require.Len(h.t, keys, 1)
	return keys[0].ExpiresAt
}

// entries returns the content of storage as text.
func (h *harness) entries() string {
	h.t.Helper()
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	var all strings.Builder
	for _, key := range slices.Sorted(slices.Values(keys)) {
		entry, err := h.storage.inner.Get(context.Background(), key)
		require.NoError(h.t, err)
		fmt.Fprintf(&all, "%s %s\n", key, entry.Value)
	}
	return all.String()
}

// inBubble runs a test in a synctest bubble, with a simulator outside it that uses the
// bubble's clock.
func inBubble(t *testing.T, opts openaitest.Options, test func(t *testing.T, h *harness)) {
	t.Helper()
	// Each request has its own connection: a pending read of an idle one would stop the
	// bubble's time.
	var clock atomic.Int64
	opts.Clock = func() time.Time { return time.Unix(0, clock.Load()) }
	clock.Store(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()) // the start of a bubble
	sim := openaitest.New(opts)
	server := httptest.NewUnstartedServer(sim)
	server.Config.SetKeepAlivesEnabled(false)
	// The same applies to a connection whose request was canceled.
	server.Config.ReadHeaderTimeout = 10 * time.Second
	server.Start()
	defer server.Close()
	defer sim.Close()
	sim.SetURL(server.URL + "/v1")
	synctest.Test(t, func(t *testing.T) {
		clock.Store(time.Now().UnixNano())
		done := make(chan struct{})
		defer close(done)
		go func() {
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case now := <-tick.C:
					clock.Store(now.UnixNano())
				case <-done:
					return
				}
			}
		}()
		h := &harness{
			t: t, sim: sim, storage: &faultyStorage{inner: &logical.InmemStorage{}}, log: &lockedBuffer{},
			system: &logical.StaticSystemView{
				DefaultLeaseTTLVal: 768 * time.Hour, MaxLeaseTTLVal: 768 * time.Hour,
				PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.2"},
			},
		}
		h.manager = &rotationManager{StaticSystemView: h.system, refusal: errCommunity}
		h.project = sim.AddProject("apps")
		h.restart()
		test(t, h)
		h.checkSecrets()
	})
	for _, leak := range sim.Leaks() {
		t.Errorf("left at the simulated OpenAI: %s", leak)
	}
}

// vaultRevokes revokes an expired lease as Vault does and returns the number of attempts;
// over vaultAttempts, the lease is irrevocable.
func (h *harness) vaultRevokes(lease *logical.Response, slots chan struct{}) (attempts int) {
	for {
		slots <- struct{}{}
		ctx, cancel := context.WithTimeout(context.Background(), vaultTimeout)
		secret := *lease.Secret
		req := &logical.Request{Operation: logical.RevokeOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: lease.Data}
		_, err := h.b.HandleRequest(ctx, req)
		cancel()
		<-slots
		h.recordMessages(nil, err)
		attempts++
		if err == nil {
			return attempts
		}
		if attempts == vaultAttempts {
			return attempts + 1
		}
		backoff := float64(vaultBackoff << attempts)
		time.Sleep(time.Duration(backoff * (0.5 + rand.Float64())))
	}
}

// rotationManager fakes Vault's rotation manager and system view.
type rotationManager struct {
	*logical.StaticSystemView

	mu       sync.Mutex
	refusal  error // the error of every call; nil on Enterprise
	jobs     map[string]rotation.RotationJobConfigureRequest
	asked    int
	unasked  int
	tainting bool

	taintsNext     bool                       // after the next look
	entities       map[string]*logical.Entity // of the identity store
	entitiesAsked  int
	entitiesFailed error
}

// EntityInfo returns nothing for an entity that is deleted, as Vault does.
func (m *rotationManager) EntityInfo(id string) (*logical.Entity, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entitiesAsked++
	return m.entities[id], m.entitiesFailed
}

func (m *rotationManager) set(refusal error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refusal = refusal
}

func (m *rotationManager) taint() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tainting = true
}

// taintAfterLook has the taint begin when the engine has just looked for one.
func (m *rotationManager) taintAfterLook() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.taintsNext = true
}

func (m *rotationManager) Tainted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	tainted := m.tainting || m.TaintedVal
	m.tainting, m.taintsNext = m.tainting || m.taintsNext, false
	return tainted
}

// PluginEnv is also called in the background, while a test may change another field:
// StaticSystemView's methods copy all fields.
func (m *rotationManager) PluginEnv(context.Context) (*logical.PluginEnvironment, error) {
	return m.PluginEnvironment, nil
}

func (m *rotationManager) RegisterRotationJob(_ context.Context, req *rotation.RotationJobConfigureRequest) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	if m.refusal != nil {
		return "", m.refusal
	}
	if _, err := rotation.ConfigureRotationJob(req); err != nil {
		return "", status.Error(codes.Internal, err.Error())
	}
	if m.jobs == nil {
		m.jobs = map[string]rotation.RotationJobConfigureRequest{}
	}
	m.jobs[req.MountPoint+req.ReqPath] = *req
	return "id", nil
}

func (m *rotationManager) DeregisterRotationJob(_ context.Context, req *rotation.RotationJobDeregisterRequest) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unasked++
	if m.refusal != nil {
		return m.refusal
	}
	delete(m.jobs, req.MountPoint+req.ReqPath)
	return nil
}

func (m *rotationManager) job() (rotation.RotationJobConfigureRequest, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	job, ok := m.jobs["openai/config"]
	return job, ok
}

func (m *rotationManager) calls() (asked, unasked int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked, m.unasked
}

// rotateByVault sends the rotation manager's request.
func (h *harness) rotateByVault() error {
	h.t.Helper()
	resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RotationOperation, Path: "config", Storage: h.storage, MountPoint: "openai/"})
	h.recordMessages(resp, err)
	return err
}

// runSchedule checks the schedule like the worker, and recovers from a crash of the
// process.
func (h *harness) runSchedule() {
	h.t.Helper()
	defer func() {
		if died := recover(); died != nil && died != any(errKilled) {
			panic(died)
		}
	}()
	if err := h.b.runSchedule(context.Background(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}); err != nil {
		h.recordMessages(nil, err)
	}
}

func (h *harness) config() map[string]any {
	h.t.Helper()
	return h.must(h.read("config")).Data
}

func (h *harness) adminKeyID() string {
	h.t.Helper()
	return h.config()["effective_admin_api_key_id"].(string)
}

// until moves the clocks to a time.
func (h *harness) until(at time.Time) { h.advance(at.Sub(h.now())) }

func (h *harness) time(field string) time.Time {
	h.t.Helper()
	text := h.config()[field]
	if text == nil {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, text.(string))
	require.NoError(h.t, err)
	return at
}

// oneAdminKey ends the grace period and checks that only the stored key is valid.
func (h *harness) oneAdminKey() {
	h.t.Helper()
	h.advance(defaultRotationGrace + time.Second)
	h.runPeriodicWork()
	require.Equal(h.t, []string{h.adminKeyID()}, h.adminKeyIDs())
	require.Empty(h.t, h.walEntries())
	h.sim.Keep(h.adminKeyIDs()...)
}

func (h *harness) runAllWAL(ctx context.Context, req *logical.Request, minAge time.Duration) error {
	_, err := h.b.runAllWAL(ctx, req, minAge)
	return err
}

func (h *harness) storedStatic(name string) *staticRole {
	h.t.Helper()
	r, err := getStaticRole(context.Background(), h.storage, name)
	require.NoError(h.t, err)
	return r
}

func (h *harness) reads() int { return h.sim.Count(http.MethodGet, routeKey) }

// copied is a mount whose storage was restored from a snapshot of h's.
func (h *harness) copied() *harness {
	h.t.Helper()
	other := &harness{
		t: h.t, sim: h.sim, storage: &faultyStorage{inner: &logical.InmemStorage{}}, log: &lockedBuffer{},
		system: h.system, manager: h.manager, project: h.project, offset: h.offset,
	}
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	for _, k := range keys {
		e, err := h.storage.inner.Get(context.Background(), k)
		require.NoError(h.t, err)
		require.NoError(h.t, other.storage.inner.Put(context.Background(), e))
	}
	other.restartStatic()
	return other
}

func (h *harness) keyOf(name string) string {
	h.t.Helper()
	return h.staticCreds(name)["api_key_id"].(string)
}

// checkStoredStaticKeys returns an error if the key of a static role is invalid.
func (h *harness) checkStoredStaticKeys() error {
	names, err := h.storage.inner.List(context.Background(), staticStoragePrefix)
	if err != nil {
		return err
	}
	for _, name := range names {
		r, err := getStaticRole(context.Background(), h.storage.inner, name)
		if err != nil || r == nil {
			return err
		}
		if !slices.ContainsFunc(h.sim.Keys(), func(k openaitest.Key) bool { return k.Value == r.Current.Value.Reveal() }) {
			return fmt.Errorf("the key %s of static role %s is invalid", r.Current.ID, name)
		}
	}
	return nil
}

// requireCleanAfterFault processes the WAL and ends the overlap, then checks that only
// the stored credentials are left and work, and that the role can be rotated and deleted.
func (h *harness) requireCleanAfterFault(name string, others ...string) {
	h.t.Helper()
	h.runPeriodicWork()
	h.advance(2 * time.Second) // a key that OpenAI does not delete expires
	h.onlyStatic(others...)
	r, err := getStaticRole(context.Background(), h.storage, name)
	require.NoError(h.t, err)
	if r == nil {
		return
	}
	h.must(h.write("rotate-role/"+name, nil))
	h.advance(defaultRevocationDelay + longestRetry + time.Second)
	h.runStaticWorker()
	h.runPeriodicWork()
	require.Zero(h.t, h.staticRole(name)["superseded_keys"])
	h.onlyStatic(others...)
	h.deleteStaticRole(name, others...)
}

// withStatic is configured without the role "app". The static worker runs only if the
// test starts it.
func withStatic(t *testing.T, opts openaitest.Options) *harness {
	t.Helper()
	h := newHarness(t, opts)
	h.holdStatic()
	h.configure(nil)
	return h
}

// holdStatic prevents the backend from starting a run of the static worker.
func (h *harness) holdStatic() {
	h.t.Helper()
	release, err := h.b.static.worker.Wait(context.Background())
	require.NoError(h.t, err)
	h.releaseStatic = release
}

func (h *harness) restartStatic() {
	h.t.Helper()
	h.restart()
	h.holdStatic()
}

// static writes a static role of the harness's project that rotates daily,
// unless more says otherwise.
func (h *harness) static(name string, more fields) *logical.Response {
	h.t.Helper()
	data := fields{"project_id": h.project}
	if more["rotation_schedule"] == nil {
		data["rotation_period"] = "24h"
	}
	maps.Copy(data, more)
	return h.must(h.write("static-roles/"+name, data))
}

// adoptStatic creates an account outside the engine, and a static role that adopts it.
func (h *harness) adoptStatic(name string, more fields) (account string) {
	h.t.Helper()
	account = h.sim.AddServiceAccount(h.project, "by hand for "+name)
	data := fields{"service_account_id": account}
	maps.Copy(data, more)
	h.static(name, data)
	return account
}

func (h *harness) staticRole(name string) fields {
	h.t.Helper()
	return h.must(h.read("static-roles/" + name)).Data
}

func (h *harness) staticCreds(name string) fields {
	h.t.Helper()
	resp := h.must(h.read("static-creds/" + name))
	require.Nil(h.t, resp.Secret, "static credentials have no lease")
	return resp.Data
}

// staticTime is a time in the read of a static role.
func (h *harness) staticTime(name, field string) time.Time {
	h.t.Helper()
	text := h.staticRole(name)[field].(string)
	if text == "" {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, text)
	require.NoError(h.t, err)
	return at
}

// runStaticWorker runs the static worker immediately.
func (h *harness) runStaticWorker() {
	h.t.Helper()
	h.b.static.until.Store(0)
	if err := h.b.runStaticWorker(context.Background(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}); err != nil {
		h.recordMessages(nil, err)
	}
}

// accepted reports whether OpenAI accepts a key.
func (h *harness) accepted(key string) bool {
	h.t.Helper()
	return callSim(h, http.MethodGet, "/models", key, "", nil) == http.StatusOK
}

// liveKeys returns the IDs of all valid project keys.
func (h *harness) liveKeys() []string {
	ids := []string{}
	for _, k := range h.sim.Keys() {
		ids = append(ids, k.ID)
	}
	return ids
}

func (h *harness) liveAccounts() []string {
	ids := []string{}
	for _, a := range h.sim.Accounts() {
		ids = append(ids, a.ID)
	}
	return ids
}

// onlyStatic fails the test unless OpenAI has only these accounts and what the stored
// static roles name, the keys that the roles return work, and the WAL is empty.
func (h *harness) onlyStatic(others ...string) {
	h.t.Helper()
	names, err := h.storage.List(context.Background(), staticStoragePrefix)
	require.NoError(h.t, err)
	accounts, keys := slices.Clone(others), []string{}
	for _, name := range names {
		r, err := getStaticRole(context.Background(), h.storage, name)
		require.NoError(h.t, err)
		if !r.Adopted {
			accounts = append(accounts, r.ServiceAccountID)
		}
		for _, k := range r.keys() {
			keys = append(keys, k.ID)
		}
		require.True(h.t, h.accepted(h.staticCreds(name)["api_key"].(string)), "the key of %s works", name)
	}
	require.ElementsMatch(h.t, accounts, h.liveAccounts(), "accounts at OpenAI")
	require.ElementsMatch(h.t, keys, h.liveKeys(), "valid keys at OpenAI")
	require.Empty(h.t, h.walEntries(), "the WAL")
}

// deleteStaticRole deletes a static role and checks that nothing of it is left.
func (h *harness) deleteStaticRole(name string, others ...string) {
	h.t.Helper()
	resp := h.must(h.remove("static-roles/" + name))
	require.Nil(h.t, resp)
	resp, err := h.read("static-roles/" + name)
	require.NoError(h.t, err)
	require.Nil(h.t, resp)
	h.onlyStatic(others...)
}

func (h *harness) delayOf(name string) time.Duration {
	return time.Duration(h.staticRole(name)["revocation_delay"].(int64)) * time.Second
}

// untaint ends a move.
func (m *rotationManager) untaint() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tainting = false
}

// rollbackOnly sends Vault's tick without waiting for the work that it starts.
func (h *harness) rollbackOnly() {
	_, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
	h.recordMessages(nil, err)
}

// unmount disables the mount as Vault does.
func (h *harness) unmount() {
	h.t.Helper()
	h.manager.taint()
	h.releaseStatic() // undoes holdStatic
	h.rollbackOnly()
	ctx, gone := context.WithCancel(context.Background())
	gone() // the client may have disconnected
	h.b.Cleanup(ctx)
}

// firstKeyOf returns the ID of the first key of an account that the engine created.
func (h *harness) firstKeyOf(name string) string {
	h.t.Helper()
	account := h.staticRole(name)["service_account_id"]
	i := slices.IndexFunc(h.sim.Keys(), func(k openaitest.Key) bool { return k.AccountID == account })
	return h.sim.Keys()[i].ID
}

// ticking sends Vault's rollback tick once a minute in a bubble.
func (h *harness) ticking() (stop func()) {
	ticking, cancel := context.WithCancel(context.Background())
	var ticks sync.WaitGroup
	ticks.Go(func() {
		for {
			select {
			case <-time.After(time.Minute):
				_, _ = h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
			case <-ticking.Done():
				return
			}
		}
	})
	return func() { cancel(); ticks.Wait(); h.b.Cleanup(context.Background()); h.sim.KeepAll() }
}

// steals uses an admin key every five seconds for a duration.
func (h *harness) steals(key string, d time.Duration) {
	h.t.Helper()
	for ; d > 0; d -= 5 * time.Second {
		h.advance(min(d, 5*time.Second))
		require.Equal(h.t, http.StatusOK, h.callWith(key))
	}
}

func (h *harness) warnings(at string) string {
	h.t.Helper()
	return strings.Join(h.must(h.read(at)).Warnings, " ")
}

// inStorage0 stores a grace period of 0 like an earlier version, which still kept the
// key.
func (h *harness) inStorage0() {
	h.t.Helper()
	cfg, err := getConfig(h.t.Context(), h.storage)
	require.NoError(h.t, err)
	cfg.RotationGracePeriod = 0
	require.NoError(h.t, h.b.amendConfig(h.t.Context(), h.storage, cfg))
}

// ended disables a mount, or deletes its config, and returns the log or warnings.
func (h *harness) ended(what string) string {
	h.t.Helper()
	if what == "delete" {
		return strings.Join(h.must(h.remove("config")).Warnings, " ")
	}
	h.manager.taint()
	defer h.manager.untaint()
	h.rollback()
	return h.log.String()
}

// callWith calls the Admin API with a key outside the engine and returns the status.
func (h *harness) callWith(adminKey string) int {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodGet, h.sim.URL()+"/organization/admin_api_keys", nil)
	require.NoError(h.t, err)
	req.Header.Set("Authorization", "Bearer "+adminKey)
	resp, err := sendAlone(req)
	require.NoError(h.t, err)
	require.NoError(h.t, resp.Body.Close())
	return resp.StatusCode
}

// adminKeyValue is the value of the active admin key.
func (h *harness) adminKeyValue() string {
	h.t.Helper()
	cfg, err := getConfig(h.t.Context(), h.storage)
	require.NoError(h.t, err)
	return cfg.AdminKey.Reveal()
}

func (h *harness) supersededKeys() []supersededKey {
	h.t.Helper()
	cfg, err := getConfig(h.t.Context(), h.storage)
	require.NoError(h.t, err)
	return cfg.Superseded
}

func (h *harness) rollbackAdminKey(name string, created time.Time) error {
	return h.b.rollbackAdminKey(context.Background(), &logical.Request{Storage: h.storage, MountPoint: "openai/"}, adminKeyEntry{Version: 1, Name: name, CreatedAt: created}, 0)
}

// unseenBefore records that a listing some minutes ago did not show this name.
func (h *harness) unseenBefore(name string) {
	h.b.unseen.confirmed(name, time.Now(), time.Hour)
	h.b.unseen.mu.Lock()
	defer h.b.unseen.mu.Unlock()
	h.b.unseen.since[name] = time.Now().Add(-notFinalBefore)
}

// keyless creates accounts of this mount without a key.
func (h *harness) keyless(n int) (ids []string) {
	h.t.Helper()
	for range n {
		ids = append(ids, h.sim.AddServiceAccount(h.project, h.ours()))
	}
	return ids
}

// listing makes OpenAI list only those keys of the project that show selects, as a
// complete listing.
func (h *harness) listing(show func(client.ProjectKey) bool) (cancel func()) {
	h.t.Helper()
	keys, err := h.api().ListProjectKeys(h.t.Context(), h.project)
	require.NoError(h.t, err)
	data := []any{}
	for _, k := range keys {
		if show(k) {
			data = append(data, keyObject(k, map[string]any{"type": "service_account", "service_account": owner(k.AccountID)}))
		}
	}
	return h.listed(data)
}

func (h *harness) listed(data []any) (cancel func()) {
	h.t.Helper()
	body, err := json.Marshal(map[string]any{"object": "list", "data": data, "first_id": nil, "last_id": nil, "has_more": false})
	require.NoError(h.t, err)
	return h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: listKeysRoute, Kind: openaitest.FaultGarbageBefore, Body: string(body)})
}

// oldEnough advances past the age at which an account without a key is an orphan.
func (h *harness) oldEnough() { h.advance(defaultMaxTTL + expiryMargin + clockSlack + time.Second) }

// tidyTwice starts two runs, far enough apart for the second to confirm the first, and
// returns the status of the second.
func (h *harness) tidyTwice() map[string]any {
	h.t.Helper()
	h.tidy(true)
	h.advance(confirmAfter + time.Second)
	return h.tidy(true)
}

// failed runs tidy while this route fails.
func (h *harness) failed(route string) {
	h.t.Helper()
	cancel := h.sim.Fail(openaitest.Fault{Route: route, Status: 403})
	require.Equal(h.t, tidyError, h.tidy(true)["state"])
	cancel()
}

// begin starts to disable or move the mount as Vault does.
func (h *harness) begin() {
	h.t.Helper()
	h.manager.taint()
	h.releaseStatic() // undoes holdStatic
	h.rollbackOnly()
}

// refusesOnce makes OpenAI refuse the next delete.
func (h *harness) refusesOnce() {
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Status: http.StatusForbidden})
}

// requireStaticKeyAfterRestart fails the test unless OpenAI accepts the static role's key
// after a restart and the end of the taint.
func (h *harness) requireStaticKeyAfterRestart() {
	h.t.Helper()
	h.restartStatic()
	h.manager.untaint()
	require.True(h.t, h.accepted(h.staticCreds("batch")["api_key"].(string)), "the static role's key")
	h.advance(notFinalBefore)
	h.runPeriodicWork()
	h.sim.KeepAll()
}

// tickAt sends Vault's tick to a mount at another path.
func (h *harness) tickAt(mountPoint string) {
	h.t.Helper()
	_, err := h.b.HandleRequest(h.t.Context(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: mountPoint})
	require.NoError(h.t, err)
}

// shows returns the fields of a read that only a write changes.
func (h *harness) shows(at string) map[string]any {
	h.t.Helper()
	data := maps.Clone(h.must(h.read(at)).Data)
	maps.DeleteFunc(data, func(name string, _ any) bool { return slices.Contains(changing, name) })
	return data
}
