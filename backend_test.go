package openaisecrets

// The harness of the unit tests: a backend on in-memory storage that can fail
// or die at any step, the real client, and the simulator. At the end of each
// test it checks that nothing is alive at OpenAI that the test did not keep,
// and that no key ever made has reached a log line, an error, a storage key or
// a read of the config.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client"
	"vault-plugin-secrets-openai/client/openaitest"
	"vault-plugin-secrets-openai/internal/sysview"
)

// Most tests wait for timeouts and backoffs most of their time, so far more of
// them run at once than there are cores.
func TestMain(m *testing.M) {
	flag.Parse()
	if fuzzing := flag.Lookup("test.fuzz").Value.String() != ""; !fuzzing { // whose workers are as many
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
	told    *ear
	// releaseStatic ends holdStatic.
	releaseStatic func()

	mu     sync.Mutex
	offset time.Duration
	said   []string // every error that a caller saw
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
		told:    &ear{},
		system: &logical.StaticSystemView{
			DefaultLeaseTTLVal: 768 * time.Hour,
			MaxLeaseTTLVal:     768 * time.Hour,
			PluginEnvironment:  &logical.PluginEnvironment{VaultVersion: "1.21.2", VaultVersionMetadata: "ent"}, // which takes events
		},
	}
	h.manager = &rotationManager{StaticSystemView: h.system, refusal: errCommunity}
	h.sim.Validate(t)
	h.project = h.sim.AddProject("apps")
	h.restart()
	t.Cleanup(h.checkSecrets)
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

// restart makes a new backend on the same storage, as a new plugin process.
func (h *harness) restart() {
	h.t.Helper()
	if h.told == nil {
		h.told = &ear{}
	}
	b := newBackend()
	b.now = h.now
	require.NoError(h.t, b.Setup(context.Background(), &logical.BackendConfig{
		System:       h.manager,
		StorageView:  h.storage,
		EventsSender: h.told, ObservationRecorder: h.told,
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: h.log, JSONFormat: true}),
	}))
	h.b = b
	h.t.Cleanup(func() { b.Cleanup(context.Background()) })
}

// buried waits, if the process has died, until the simulator has handled all that
// it had sent. A request that was given up may still arrive, on a busy machine long
// after: by then the test has moved the clocks, and a late probe looks like the use
// of a key that was handed out.
func (h *harness) buried() {
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

// shortTimeout is a request_timeout for tests in which a call hangs: each waits
// it out, and on a busy machine every other call must still be answered in time.
const shortTimeout = "5s"

// hangs shortens the wait for an answer if a call is to hang, and only then.
func (h *harness) hangs(kind openaitest.FaultKind) {
	h.t.Helper()
	if kind == openaitest.FaultHang || kind == openaitest.FaultHangAfter {
		h.must(h.write("config", map[string]any{"request_timeout": shortTimeout}))
	}
}

// setClock sets the engine's clock, and not OpenAI's.
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

// do sends a request as Vault does: data is JSON before it gets here, and so
// is what comes back. Whatever comes back is held against the path's schema.
func (h *harness) do(ctx context.Context, op logical.Operation, at string, data map[string]any) (resp *logical.Response, err error) {
	h.t.Helper()
	defer func() {
		if died := recover(); died == any(errKilled) {
			resp, err = nil, errKilled
		} else if died != nil {
			panic(died)
		}
		h.hear(resp, err)
	}()
	req := &logical.Request{
		ID: "req-1", Operation: op, Path: at, Data: throughJSON(h.t, data),
		Storage: h.storage, MountPoint: "openai/", DisplayName: "userpass-alice",
	}
	if op == logical.UpdateOperation { // Vault turns a write into a create where nothing is
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
		return // nothing there: Vault answers 404
	}
	if resp != nil && resp.Data[logical.HTTPStatusCode] == http.StatusNotFound {
		return // likewise, with a word on why
	}
	p := h.b.Route(req.Path)
	require.NotNil(h.t, p, req.Path)
	s := schema.GetResponseSchema(h.t, p, req.Operation)
	schema.ValidateResponse(h.t, s, resp, true)
}

func (h *harness) hear(resp *logical.Response, err error) {
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

// refused fails the test unless a request was answered with status 400, and
// returns what it said.
func (h *harness) refused(resp *logical.Response, err error) string {
	h.t.Helper()
	require.NoError(h.t, err)
	require.True(h.t, resp.IsError(), "not refused: %v", resp)
	return resp.Error().Error()
}

// lease issues a credential of a role and returns it as Vault keeps it.
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

// end sends a renew or revoke as Vault does.
func (h *harness) end(op logical.Operation, lease *logical.Response) (*logical.Response, error) {
	h.t.Helper()
	secret := *lease.Secret
	req := &logical.Request{Operation: op, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: lease.Data}
	resp, err := h.b.HandleRequest(context.Background(), req)
	h.hear(resp, err)
	return resp, err
}

func (h *harness) revoke(lease *logical.Response) error {
	h.t.Helper()
	resp, err := h.end(logical.RevokeOperation, lease)
	require.Nil(h.t, resp, "a revoke answers with nothing or an error: Vault treats a response with care")
	return err
}

// tick is what Vault's rollback tick starts, but the WAL's entries count as old
// enough, and what OpenAI does not find counts as deleted.
func (h *harness) tick() {
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
		func() error { return h.b.keepSchedule(context.Background(), req) },
		func() error { return h.b.deleteRetired(ctx, req) },
		func() error { return h.b.tidyIfDue(ctx, req) },
		func() error { return h.b.refreshWAL(ctx, req) },
	} {
		if err := run(); err != nil {
			h.hear(nil, err)
		}
	}
	defer h.final()()
	for _, kind := range journalKinds {
		h.b.complainWAL(ctx, req, kind, h.b.runWAL(ctx, req, kind, 0).err())
	}
}

// final makes what OpenAI does not find count as deleted, whatever its age, until
// restore.
func (h *harness) final() (restore func()) {
	b := h.b
	b.settling.Store(0)
	return func() { b.settling.Store(int64(notFinalBefore)) }
}

// rollback is Vault's rollback tick itself, and the end of what it started.
func (h *harness) rollback() {
	h.t.Helper()
	resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: "openai/"})
	h.hear(resp, err)
	release, err := h.b.rotation.look.Wait(context.Background())
	require.NoError(h.t, err)
	release()
	h.settle()
}

// settle waits for what the last tick started.
func (h *harness) settle() {
	h.t.Helper()
	for _, j := range h.b.work.jobs() {
		release, err := j.Wait(context.Background())
		require.NoError(h.t, err)
		release()
	}
}

// journal returns the entries of the journal.
func (h *harness) journal() []string {
	h.t.Helper()
	ids, err := framework.ListWAL(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	return ids
}

// checkSecrets looks for every key that the simulator ever made.
func (h *harness) checkSecrets() {
	h.storage.heal()
	texts := map[string]string{"log": h.log.String(), "errors": strings.Join(h.said, "\n"), "events": h.told.text()}
	keys, err := logical.CollectKeys(context.Background(), h.storage.inner)
	require.NoError(h.t, err)
	texts["storage keys"] = strings.Join(keys, "\n")
	for _, at := range []string{"config", "metrics"} {
		if resp, err := h.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: at, Storage: h.storage}); err == nil && resp != nil {
			texts[at+" read"] = fmt.Sprint(resp.Data)
		}
	}
	for _, secret := range h.sim.Secrets() {
		for where, text := range texts {
			if strings.Contains(text, secret) {
				h.t.Errorf("a key is in the %s: %s", where, secret[:12]+"...")
			}
		}
	}
}

// onlyLeased fails the test unless exactly the accounts of these leases are
// alive and the journal is empty.
func (h *harness) onlyLeased(leases ...*logical.Response) {
	h.t.Helper()
	var want, alive []string
	for _, lease := range leases {
		want = append(want, lease.Data["service_account_id"].(string))
	}
	for _, a := range h.sim.Accounts() {
		alive = append(alive, a.ID)
	}
	require.ElementsMatch(h.t, want, alive, "accounts alive at OpenAI")
	require.Empty(h.t, h.journal(), "the journal")
}

// throughJSON is what a map looks like after a trip through storage or wire.
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

// errKilled is what the death of the process looks like to a caller.
var errKilled = errors.New("the plugin process died")

var errStorage = errors.New("storage is not there")

// faultyStorage is storage that fails, or with which the process dies, at a
// chosen step.
type faultyStorage struct {
	inner *logical.InmemStorage

	mu     sync.Mutex
	plan   *storageFault
	dead   bool
	writes []string
}

// storageFault says at which write something goes wrong. Writes count from 0.
type storageFault struct {
	write int
	after bool // the write takes effect
	kill  bool // the process dies; otherwise an error is returned
}

// fail plans a fault, counting writes from here.
func (s *faultyStorage) fail(f storageFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plan, s.writes = &f, nil
}

// heal ends all faults and reports whether the process had died.
func (s *faultyStorage) heal() (died bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	died = s.dead
	s.plan, s.dead = nil, false
	return died
}

func (s *faultyStorage) died() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// kill makes every step from now on find the process dead.
func (s *faultyStorage) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
}

// last returns the last write, whether or not it took effect.
func (s *faultyStorage) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.writes) == 0 {
		return ""
	}
	return s.writes[len(s.writes)-1]
}

func (s *faultyStorage) alive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		panic(errKilled)
	}
}

// step runs one write under the plan.
func (s *faultyStorage) step(ctx context.Context, what string, write func() error) error {
	s.alive()
	if err := ctx.Err(); err != nil {
		return err // Vault's storage behaves so over its plugin protocol
	}
	s.mu.Lock()
	n := len(s.writes)
	s.writes = append(s.writes, what)
	plan := s.plan
	strikes := plan != nil && plan.write == n
	if strikes {
		s.dead = plan.kill
	}
	s.mu.Unlock()
	if !strikes {
		return write()
	}
	if plan.after {
		if err := write(); err != nil {
			return err
		}
	}
	if plan.kill {
		panic(errKilled)
	}
	return errStorage
}

func (s *faultyStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.step(ctx, "put "+path.Dir(entry.Key), func() error { return s.inner.Put(ctx, entry) })
}

func (s *faultyStorage) Delete(ctx context.Context, key string) error {
	return s.step(ctx, "delete "+path.Dir(key), func() error { return s.inner.Delete(ctx, key) })
}

func (s *faultyStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.alive()
	return s.inner.Get(ctx, key)
}

func (s *faultyStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.alive()
	return s.inner.List(ctx, prefix)
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

// adminKeyIDs returns the IDs of the admin keys alive.
func (h *harness) adminKeyIDs() []string {
	var ids []string
	for _, k := range h.sim.AdminKeys() {
		ids = append(ids, k.ID)
	}
	slices.Sort(ids)
	return ids
}

// role writes the role "app" anew, in the project of the harness.
func (h *harness) role(data map[string]any) *logical.Response {
	h.t.Helper()
	h.must(h.remove("roles/app"))
	all := map[string]any{"project_id": h.project}
	for k, v := range data {
		all[k] = v
	}
	return h.must(h.write("roles/app", all))
}

// adopted makes a service account as a person would, and "app" a role that
// leases its keys. It returns the account's ID.
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

// onlyKeys fails the test unless an adopted account is there and nothing else
// but the keys of these leases is alive, and the journal is empty.
func (h *harness) onlyKeys(account string, leases ...*logical.Response) {
	h.t.Helper()
	var want, alive []string
	for _, lease := range leases {
		want = append(want, lease.Data["api_key_id"].(string))
	}
	for _, k := range h.sim.Keys() {
		alive = append(alive, k.ID)
	}
	require.Equal(h.t, []string{account}, h.alive(), "accounts alive at OpenAI")
	require.ElementsMatch(h.t, want, alive, "keys alive at OpenAI")
	require.Empty(h.t, h.journal(), "the journal")
}

// renew sends a renewal as Vault does for a lease of that age, and returns the
// lease as Vault then keeps it; nil after an error.
func (h *harness) renew(ctx context.Context, lease *logical.Response, age, increment time.Duration) (*logical.Response, error) {
	h.t.Helper()
	secret := *lease.Secret
	secret.InternalData = throughJSON(h.t, lease.Secret.InternalData)
	secret.IssueTime = time.Now().Add(-age) // Vault's clock is the machine's
	secret.Increment = increment
	req := &logical.Request{Operation: logical.RenewOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret, Data: throughJSON(h.t, lease.Data)}
	resp, err := h.b.HandleRequest(ctx, req)
	h.hear(resp, err)
	if err != nil || resp.IsError() {
		return resp, err
	}
	renewed := h.stored(resp)
	renewed.Secret.IssueTime = secret.IssueTime
	// Vault makes its own of what it is told.
	renewed.Secret.TTL, _, err = framework.CalculateTTL(h.system, increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, secret.IssueTime)
	require.NoError(h.t, err)
	return renewed, nil
}

// sendAlone sends a request by a transport of its own. When a test server closes, it
// closes the idle connections of the default transport, and with that may end what
// another test began in a bubble.
func sendAlone(req *http.Request) (*http.Response, error) {
	return (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
}

// inference calls the inference side with a leased key and returns the status.
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

// bodies keeps the body of each request from now on.
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
		return false // it never strikes
	}})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// routes is what was called since the last ResetRequests, in order.
func (h *harness) routes() []string {
	var all []string
	for _, r := range h.sim.Requests() {
		all = append(all, r.Method+" "+r.Route)
	}
	return all
}

// about fails the test unless a time in an answer is want, but for the second or
// so by which the clocks of engine and simulator are cut differently.
func about(t *testing.T, want time.Time, text any) {
	t.Helper()
	got, err := time.Parse(time.RFC3339, fmt.Sprint(text))
	require.NoError(t, err)
	require.WithinDuration(t, want, got, 30*time.Second)
}

func TestSystemView_IsTheBackends(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.IsType(t, &sysview.CachedView{}, h.b.System())
}
