package openaisecrets

// A disabled mount, and operations that look like a disable.

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"vault-plugin-secrets-openai/client/openaitest"
)

// leased is a mount with the static role "batch" and two leases.
func leased(t *testing.T) (h *harness, one, two *logical.Response) {
	t.Helper()
	h = withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.must(h.write("roles/app", fields{"project_id": h.project}))
	return h, h.lease("creds/app", nil), h.lease("creds/app", nil)
}

func TestUnmount_FailureDuringATaintPersists(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(h *harness){
		"a restart":                  func(*harness) {},
		"Vault's ticks":              func(h *harness) { h.rollbackOnly(); h.rollbackOnly() },
		"a repeated disable or move": func(h *harness) { h.manager.taint(); h.rollbackOnly() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.begin()
			h.refusesOnce()
			require.Error(t, h.revoke(one))   // fails the disable: the mount stays tainted
			require.NoError(t, h.revoke(two)) // another lease expires
			between(h)
			account := h.staticRole("batch")
			h.b.Cleanup(context.Background())
			require.Contains(t, h.log.String(), "a revocation failed or was interrupted after the taint began")
			kept := lines(h.log.String(), "static role keeps its credential")
			require.Len(t, kept, 1)
			for _, said := range []any{account["service_account_id"], account["api_key_id"], account["api_key_expires_at"]} {
				require.Contains(t, kept[0], said)
			}
			h.requireStaticKeyAfterRestart()
		})
	}
}

func lines(log, with string) (found []string) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, with) {
			found = append(found, line)
		}
	}
	return found
}

// A lease that cannot be decoded also fails a disable, before any call.
func TestUnmount_UnreadableLeaseIsAFailure(t *testing.T) {
	t.Parallel()
	h, one, two := leased(t)
	h.begin()
	delete(one.Secret.InternalData, "project_id")
	require.Error(t, h.revoke(one))
	require.NoError(t, h.revoke(two))
	h.b.Cleanup(context.Background())
	h.requireStaticKeyAfterRestart()
}

func TestUnmount_NewTaintResetsTheState(t *testing.T) {
	t.Parallel()
	for name, seen := range map[string]func(h *harness){
		"a tick":    func(h *harness) { h.rollbackOnly() },
		"a request": func(h *harness) { h.must(h.read("config")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.begin()
			h.refusesOnce()
			require.Error(t, h.revoke(one))
			h.manager.untaint()
			seen(h)
			require.NoError(t, h.b.static.worker.End(t.Context()))
			h.manager.taint()
			h.rollbackOnly()
			require.NoError(t, h.revoke(two))
			h.b.Cleanup(context.Background())
			require.Empty(t, h.liveAccounts())
		})
	}
}

// A seal or a step-down cancels the revocation of a disable, and unloads the mount before
// the handler returns.
func TestUnmount_CanceledRevocationIsAFailure(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"in progress", "canceled"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			h, one, _ := leased(t)
			h.begin()
			arrived := make(chan struct{}, 10)
			h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Route: deleteAccountRoute, Kind: openaitest.FaultHang, Match: func(*http.Request) bool {
				arrived <- struct{}{}
				return true
			}})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				secret := *one.Secret
				_, err := h.b.HandleRequest(ctx, &logical.Request{Operation: logical.RevokeOperation, Path: "creds/app", Storage: h.storage, MountPoint: "openai/", Secret: &secret})
				if err == nil {
					t.Error("the revocation succeeded")
				}
			}()
			<-arrived
			if how == "canceled" {
				cancel()
			}
			h.b.Cleanup(context.Background())
			cancel()
			<-done
			h.sim.ClearFaults()
			h.requireStaticKeyAfterRestart()
		})
	}
}

func TestUnmount_StepDownRetainsStaticRoles(t *testing.T) {
	t.Parallel()
	h, one, _ := leased(t)
	h.begin()
	h.refusesOnce()
	require.Error(t, h.revoke(one))
	h.b.Cleanup(context.Background())
	h.restartStatic() // the new active node
	h.releaseStatic()
	h.rollbackOnly()
	require.NoError(t, h.revoke(one))
	h.b.Cleanup(context.Background())
	require.Contains(t, h.log.String(), "this process did not see the taint begin")
	h.requireStaticKeyAfterRestart()
}

// A node loses its leadership after it has revoked all leases: it unloads the mount within
// the minute, which another node goes on with, and only its storage shows that.
func TestUnmount_ANodeThatCannotWriteRetainsStaticRoles(t *testing.T) {
	t.Parallel()
	h, one, two := leased(t)
	h.begin()
	require.NoError(t, h.revoke(one))
	require.NoError(t, h.revoke(two))
	h.storage.fail(storageFault{more: 1000})
	h.b.Cleanup(context.Background())
	h.storage.heal()
	require.Contains(t, h.log.String(), "storage accepts no write")
	h.requireStaticKeyAfterRestart()
}

// A move can fail at Vault after all revocations: its new path is in use, or the mount
// table cannot be stored. The engine gets no call, and the taint stays.
func TestUnmount_FailedMoveRetainsStaticRoles(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]func(h *harness, lease *logical.Response){
		"Vault's ticks go on for minutes": func(h *harness, _ *logical.Response) {
			for range 10 {
				h.advance(time.Minute)
				h.rollbackOnly()
			}
		},
		"Vault ticks twice": func(h *harness, _ *logical.Response) {
			h.rollbackOnly()
			h.advance(unmountTick + time.Second)
			h.rollbackOnly()
		},
		"more than a minute passes": func(h *harness, _ *logical.Response) { h.advance(unmountPause + time.Second) },
		"a lease is revoked later": func(h *harness, lease *logical.Response) {
			h.advance(unmountPause + time.Second)
			require.NoError(h.t, h.revoke(lease))
		},
		"a lease is revoked after two ticks": func(h *harness, lease *logical.Response) {
			h.rollbackOnly()
			h.advance(unmountTick + time.Second)
			h.rollbackOnly()
			require.NoError(h.t, h.revoke(lease))
		},
		"the move is repeated": func(h *harness, lease *logical.Response) {
			h.advance(unmountPause + time.Second)
			h.rollbackOnly()
			require.NoError(h.t, h.revoke(lease))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.begin()
			require.NoError(t, h.revoke(one))
			after(h, two)
			h.b.Cleanup(context.Background())
			require.Contains(t, h.log.String(), "Vault stopped disabling or moving the mount")
			require.Len(t, lines(h.log.String(), "static role keeps its credential"), 1)
			h.requireStaticKeyAfterRestart()
		})
	}
}

func TestUnmount_ALongDisableLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, disable := range map[string]func(h *harness, one, two *logical.Response){
		"ticks between slow revocations": func(h *harness, one, two *logical.Response) {
			h.advance(unmountPause / 2)
			require.NoError(h.t, h.revoke(one))
			h.rollbackOnly()
			h.advance(unmountPause / 2)
			require.NoError(h.t, h.revoke(two))
			h.rollbackOnly()
			h.advance(unmountPause / 2)
		},
		"a revocation that takes minutes": func(h *harness, one, two *logical.Response) {
			h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
				for range 3 {
					h.advance(unmountPause)
					h.rollbackOnly()
				}
			}})
			require.NoError(h.t, h.revoke(one))
			require.NoError(h.t, h.revoke(two))
		},
		"a tick just before the first revocation": func(h *harness, one, two *logical.Response) {
			h.rollbackOnly()
			require.NoError(h.t, h.revoke(one))
			require.NoError(h.t, h.revoke(two))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.begin()
			disable(h, one, two)
			h.b.Cleanup(context.Background())
			require.Empty(t, h.liveAccounts())
			require.Empty(t, lines(h.log.String(), "keeps its credential"))
		})
	}
}

// A disable that begins while Vault's periodic rollback is in flight waits for it, and
// makes no other; storage may accept no write during the rollback.
func TestUnmount_DrainsAtTheUnloadAtTheLatest(t *testing.T) {
	t.Parallel()
	for name, way := range map[string]struct {
		run    func(h *harness, one, two *logical.Response)
		drains bool
		kept   string // why static roles are
	}{
		"the taint begins before the last look": {
			run: func(h *harness, one, two *logical.Response) {
				h.manager.taintAfterLook()
				h.rollbackOnly()
				require.NoError(h.t, h.revoke(one))
				require.NoError(h.t, h.revoke(two))
			},
			drains: true,
		},
		"after the last look": {
			run: func(h *harness, one, two *logical.Response) {
				h.rollbackOnly()
				h.manager.taint()
				require.NoError(h.t, h.revoke(one))
				require.NoError(h.t, h.revoke(two))
			},
			drains: true, kept: "this process did not see the taint begin",
		},
		"and a revocation fails": {
			run: func(h *harness, one, two *logical.Response) {
				h.rollbackOnly()
				h.manager.taint()
				project := one.Secret.InternalData["project_id"]
				delete(one.Secret.InternalData, "project_id") // as if it could not be read
				require.Error(h.t, h.revoke(one))
				one.Secret.InternalData["project_id"] = project
				require.NoError(h.t, h.revoke(one))
				require.NoError(h.t, h.revoke(two))
			},
			drains: true, kept: "a revocation failed",
		},
		"storage accepts no write during the rollback": {
			run: func(h *harness, one, two *logical.Response) {
				h.manager.taint()
				h.storage.fail(storageFault{more: 1000})
				h.rollbackOnly()
				h.storage.heal()
				require.NoError(h.t, h.revoke(one))
				require.NoError(h.t, h.revoke(two))
			},
			drains: true,
		},
		"nor at the unload of a node that has lost its leadership": {
			run: func(h *harness, one, two *logical.Response) {
				require.NoError(h.t, h.revoke(one))
				require.NoError(h.t, h.revoke(two))
				h.manager.taint()
				h.storage.fail(storageFault{more: 1000})
				h.rollbackOnly()
			},
			kept: "storage accepts no write",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, one, two := leased(t)
			h.must(h.write("config/rotate", nil))
			require.Len(t, h.adminKeyIDs(), 2)
			young := h.account(h.project, "vault-app-young", time.Hour)
			require.NoError(t, putWALEntry(t.Context(), h.storage, "young", walAccount, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, Name: "vault-app-young", CreatedAt: h.now()}, h.now()))
			h.releaseStatic()
			way.run(h, one, two)
			ctx, gone := context.WithCancel(t.Context())
			gone() // the client has disconnected
			h.b.Cleanup(ctx)
			h.storage.heal()
			require.Contains(t, h.log.String(), way.kept)
			switch {
			case !way.drains: // another node goes on with the mount
				require.Len(t, h.adminKeyIDs(), 2)
				require.Contains(t, h.liveAccounts(), young)
			case way.kept == "":
				require.Len(t, h.adminKeyIDs(), 1)
				require.Empty(t, h.liveAccounts())
			default:
				require.Len(t, h.adminKeyIDs(), 1)
				h.onlyStatic()
			}
			h.sim.KeepAll()
		})
	}
}

// An unload without any request before it does not tell the mount point, which on OpenBao
// may be in a namespace that is being sealed.
func TestUnmount_UnloadOfAnUnknownMountPoint(t *testing.T) {
	t.Parallel()
	for _, bao := range []bool{false, true} {
		h := configured(t, openaitest.Options{})
		h.must(h.write("config/rotate", nil))
		h.restart()
		if bao {
			h.b.getenv = baoEnv
		}
		h.manager.taint()
		h.b.Cleanup(t.Context())
		require.Equal(t, bao, len(h.adminKeyIDs()) == 2)
		require.Equal(t, bao, strings.Contains(h.log.String(), "superseded admin key retained"))
		h.sim.KeepAll()
	}
}

// A step-down may unload the mount before the first rollback returns.
func TestUnmount_RollbackInProgressRetainsStaticRoles(t *testing.T) {
	t.Parallel()
	h, one, _ := leased(t)
	require.NoError(t, h.revoke(one))
	_, err := framework.PutWAL(t.Context(), h.storage, walAccount, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, Name: "vault-app-young", ID: h.account(h.project, "vault-app-young", time.Hour)})
	require.NoError(t, err)
	arrived, proceed := make(chan struct{}), make(chan struct{})
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Times: 1, Kind: openaitest.FaultSlow, OnStrike: func(*http.Request) {
		close(arrived)
		<-proceed
	}})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		h.begin()
	}()
	<-arrived
	h.b.Cleanup(context.Background())
	close(proceed)
	<-ended
	require.Contains(t, h.log.String(), "the first rollback of the disable has not completed")
	h.requireStaticKeyAfterRestart()
}

// No later run reads what the drain does not read.
func TestUnmount_RepeatsReadsThatFail(t *testing.T) {
	t.Parallel()
	h := configured(t, openaitest.Options{})
	h.must(h.write("config/rotate", nil)) // the previous key is in its grace period
	require.Len(t, h.adminKeyIDs(), 2)
	lease := h.lease("creds/app", nil)
	id, _ := lease.Data["service_account_id"].(string)
	_, err := h.b.recordRevocation(t.Context(), h.storage, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, ID: id})
	require.NoError(t, err)
	h.restart()
	h.manager.taint()
	watched := &watchedStorage{Storage: h.storage}
	reads := watched.failEachOnce()
	require.NoError(t, h.b.drain(t.Context(), &logical.Request{Storage: watched, MountPoint: "openai/"}, drainBudget))
	require.GreaterOrEqual(t, reads(configStorageKey), 2)
	require.Empty(t, h.liveAccounts())
	require.Len(t, h.adminKeyIDs(), 1)
	h.sim.Keep(h.adminKeyIDs()...)
	require.Empty(t, h.walEntries())
}

// A failed disable leaves the mount tainted, and Vault's rollbacks drain it each minute.
func TestUnmount_AFailedDisableDoesNotFloodTheLog(t *testing.T) {
	t.Parallel()
	h, one, two := leased(t)
	h.begin()
	h.sim.Fail(openaitest.Fault{Method: http.MethodDelete, Status: http.StatusForbidden})
	require.Error(t, h.revoke(one))
	require.Error(t, h.revoke(two))
	for range 10 {
		h.advance(time.Minute)
		h.rollbackOnly()
	}
	require.Len(t, lines(h.log.String(), "WAL rollback is incomplete"), 1)
	left := lines(h.log.String(), `"credential remains at OpenAI"`)
	require.Len(t, left, 2, "one line for each account")
	for _, lease := range []*logical.Response{one, two} {
		require.Contains(t, strings.Join(left, ""), lease.Data["service_account_id"])
	}
	h.sim.KeepAll()
}

// A mount that is moved, or whose namespace is sealed, continues. One list does not prove
// that an admin key does not exist or, in a namespace, that an account has no key.
func TestUnmount_SingleListingProvesNothing(t *testing.T) {
	t.Parallel()
	for at, stays := range map[string]bool{"teams/openai/": true, "openai/": false} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := configured(t, openaitest.Options{})
			h.b.getenv = func(name string) string { return map[string]string{"BAO_VERSION": "2.6.2"}[name] }
			began := h.now()
			admin, _ := h.sim.AddAdminKey("vault-admin-unfinished")
			h.sim.Keep(admin)
			_, err := framework.PutWAL(t.Context(), h.storage, walAdminKey, adminKeyEntry{Version: 1, Name: "vault-admin-unfinished", CreatedAt: began})
			require.NoError(t, err)
			account := h.account(h.project, "vault-app-unfinished", 24*time.Hour)
			h.sim.Keep(account)
			_, err = framework.PutWAL(t.Context(), h.storage, walAccount, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, Name: "vault-app-unfinished", CreatedAt: began})
			require.NoError(t, err)
			h.advance(time.Hour)
			without := func(route, body string) {
				h.sim.Fail(openaitest.Fault{Method: http.MethodGet, Route: route, Times: 1, Kind: openaitest.FaultGarbageBefore, Body: `{"object":"list","data":[` + body + `],"first_id":null,"last_id":null,"has_more":false}`})
			}
			i := slices.IndexFunc(h.sim.AdminKeys(), func(k openaitest.AdminKey) bool { return k.ID == h.adminKeyID() })
			active := h.sim.AdminKeys()[i]
			without("/organization/admin_api_keys", fmt.Sprintf(`{"object":"organization.admin_api_key","id":%q,"name":%q,"redacted_value":"sk-admin...x","created_at":%d,"last_used_at":null,"owner":{"type":"user","object":"organization.user","id":"user_1","name":"A","created_at":1,"role":"owner"}}`, active.ID, active.Name, began.Unix()))
			without(routeKeys, "")
			h.manager.taint()
			_, err = h.b.HandleRequest(t.Context(), &logical.Request{Operation: logical.RollbackOperation, Storage: h.storage, MountPoint: at})
			require.Len(t, lines(h.log.String(), "unfinished create not found by one listing"), 1)
			if stays {
				require.ErrorContains(t, err, errNotFinal.Error())
				require.Len(t, h.walEntries(), 2)
				require.Equal(t, []string{account}, h.liveAccounts())
			} else { // after a disable, nothing deletes the account later
				require.NoError(t, err)
				require.Len(t, h.walEntries(), 1)
				require.Empty(t, h.liveAccounts())
			}
			h.manager.untaint()
			h.restart()
			h.runPeriodicWork()
			require.Empty(t, h.walEntries())
			require.Empty(t, h.liveAccounts())
			require.NotContains(t, h.adminKeyIDs(), admin)
		})
	}
}

func TestUnmount_OpenBaoNamespaceRetainsEverything(t *testing.T) {
	t.Parallel()
	for at, stays := range map[string]bool{"vaulted/openai/": true, "a/b/openai/": true, "teams/openai/": true, "openai/": false} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.b.getenv = func(name string) string { return map[string]string{"BAO_VERSION": "2.6.2"}[name] }
			h.static("made", nil)
			account := h.adoptStatic("adopted", nil)
			h.must(h.write("config/rotate", nil))
			admins := h.adminKeyIDs()
			h.sim.Keep(admins...)
			require.Len(t, admins, 2)
			young := h.account(h.project, "vault-app-young", 24*time.Hour)
			_, err := framework.PutWAL(t.Context(), h.storage, walAccount, credential{Version: credentialVersion, Type: typeAccount, ProjectID: h.project, Name: "vault-app-young"})
			require.NoError(t, err)

			if stays {
				_, err := framework.PutWAL(t.Context(), h.storage, walAdminKey, adminKeyEntry{Version: 1, Name: "vault-admin-young", CreatedAt: h.now()})
				require.NoError(t, err)
			}

			h.releaseStatic()
			h.tickAt(at)
			require.NoError(t, h.b.static.worker.End(t.Context()))
			h.manager.taint()
			h.tickAt(at)
			h.tickAt(at)
			h.b.Cleanup(context.Background())
			log := h.log.String()
			if !stays {
				require.Equal(t, []string{account}, h.liveAccounts())
				require.Empty(t, h.liveKeys())
				require.Len(t, h.adminKeyIDs(), 1)
				require.Empty(t, lines(log, "keeps"))
				return
			}
			require.Len(t, h.liveAccounts(), 3)
			require.Contains(t, h.liveAccounts(), young)
			require.Equal(t, admins, h.adminKeyIDs())
			require.Len(t, lines(log, "superseded admin key retained"), 1, "logged once for each taint")
			require.Len(t, lines(log, "WAL entry retained"), 2)
			require.Contains(t, strings.Join(lines(log, "WAL entry retained"), ""), "vault-admin-young")
			kept := lines(log, "static role keeps its credential")
			require.Len(t, kept, 2)
			for _, line := range kept {
				require.Contains(t, line, "key_expires_at\":\"20")
			}
			// After the unseal, the mount works again.
			h.restartStatic()
			h.manager.untaint()
			for _, name := range []string{"made", "adopted"} {
				require.True(t, h.accepted(h.staticCreds(name)["api_key"].(string)))
				h.must(h.write("rotate-role/"+name, nil))
			}
			h.advance(defaultRevocationDelay)
			h.runStaticWorker()
			h.runPeriodicWork()
			h.must(h.remove("static-roles/made"))
			h.deleteStaticRole("adopted", account)
			require.Len(t, h.adminKeyIDs(), 1)
		})
	}
}

func TestUnmount_VaultMountPointMayContainASlash(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.b.getenv = func(string) string { return "" }
	require.False(t, h.b.cannotTellDisable("teams/openai/"))
	h.static("batch", nil)
	h.releaseStatic()
	h.tickAt("teams/openai/")
	require.NoError(t, h.b.static.worker.End(t.Context()))
	h.manager.taint()
	h.tickAt("teams/openai/")
	h.b.Cleanup(context.Background())
	require.Empty(t, h.liveAccounts())
}

// After the unload, nothing checks again whether the account appears.
func TestUnmount_RetriesNotFoundNewCredentials(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	unknown := openaitest.Fault{Method: http.MethodDelete, Route: routeAccount, Times: 1, Status: http.StatusNotFound, Code: "service_account_not_found", Message: "No service account found."}
	h.sim.Fail(unknown)
	unknown.Method = http.MethodGet
	h.sim.Fail(unknown)
	h.unmount()
	require.Empty(t, h.liveAccounts())
	require.NotContains(t, h.log.String(), "remains at OpenAI")
}

func TestUnmount_ClockSetBackDoesNotDelayTheDrain(t *testing.T) {
	t.Parallel()
	h := newHarness(t, openaitest.Options{})
	require.False(t, h.b.inTransit())
	h.b.issued()
	require.True(t, h.b.inTransit())
	require.Contains(t, h.b.lastIssued.Load().String(), " m=", "the monotonic reading")
	ago := h.b.lastIssued.Load().Add(-leaseTransit)
	h.b.lastIssued.Store(&ago)
	require.False(t, h.b.inTransit())
}

func TestStaticDelete_NotFoundNewCredentialIsQueuedInTheWAL(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	account := h.staticRole("batch")["service_account_id"].(string)
	h.sim.DeleteServiceAccount(h.project, account)
	require.Nil(t, h.must(h.remove("static-roles/batch")), "the 404 of a new account is not a failure")
	require.NotContains(t, h.log.String(), "left to the WAL")
	require.Len(t, h.walEntries(), 1, "the WAL checks the account again")
	h.runPeriodicWork() // the account counts as old enough
	require.Empty(t, h.walEntries())
}

// An unproven 404 is a failure: the role is deleted, and its account stays in the WAL.
func TestStaticDelete_UnprovenNotFoundFails(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]openaitest.Fault{
		"an unknown URL":   {Status: http.StatusNotFound, Code: "unknown_url", Message: "Unknown request URL: DELETE /v1/organization/x. Please check the URL for typos."},
		"a gateway's 404":  {Status: http.StatusNotFound, Body: `{"timestamp":"2026-01-01","status":404,"error":"Not Found","path":"/v1"}`},
		"a listed account": {Status: http.StatusNotFound, Code: "service_account_not_found", Message: "No service account found."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := withStatic(t, openaitest.Options{})
			h.static("made", nil)
			account := h.adoptStatic("adopted", nil)
			h.must(h.write("rotate-role/adopted", nil))
			h.advance(defaultRevocationDelay)
			fault.Method = http.MethodDelete
			heal := h.sim.Fail(fault)
			fault.Method, fault.Route = http.MethodPost, routeKey // or the key would expire instead
			healUpdate := h.sim.Fail(fault)
			h.runStaticWorker()
			require.Equal(t, 1, h.staticRole("adopted")["superseded_keys"], "the key stays listed")
			for _, role := range []string{"made", "adopted"} {
				require.Contains(t, h.must(h.remove("static-roles/" + role)).Warnings[0], "Queued for deletion at OpenAI in the WAL")
			}
			require.Len(t, h.liveAccounts(), 2)
			require.Len(t, h.walEntries(), 3)
			heal()
			healUpdate()
			h.runPeriodicWork()
			h.onlyStatic(account)
		})
	}
}

func TestStaticRotation_NotFoundProvesNothingAboutTheAccount(t *testing.T) {
	t.Parallel()
	h := withStatic(t, openaitest.Options{})
	h.static("batch", nil)
	h.advance(notFinalBefore)
	heal := h.sim.Fail(openaitest.Fault{Method: http.MethodPost, Route: routeNewKey, Status: http.StatusNotFound, Code: "service_account_not_found", Message: "No service account found."})
	said := h.refused(h.write("rotate-role/batch", nil))
	require.Contains(t, said, "OpenAI did not find service account")
	require.Contains(t, said, "OpenAI still shows it")
	require.NotContains(t, said, "no longer exists")
	heal()
	h.must(h.write("rotate-role/batch", nil))
	h.onlyStatic()
	h.deleteStaticRole("batch")
}
