package job

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestJob_RunsOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, runs := New(), 0
		run := func(context.Context) {
			runs++
			time.Sleep(time.Second)
		}
		j.Start(t.Context(), run)
		j.Start(t.Context(), run)
		release, err := j.Wait(t.Context())
		if err != nil || runs != 1 {
			t.Fatal(runs, err)
		}
		j.Start(t.Context(), run) // while the slot is held
		release()
		j.Start(t.Context(), run)
		synctest.Wait()
		if runs != 2 {
			t.Fatal(runs)
		}
		time.Sleep(time.Second)
	})
}

func TestJob_EndCancelsTheRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := New()
		var ended error
		run := func(ctx context.Context) {
			<-ctx.Done()
			ended = ctx.Err()
		}
		j.Start(t.Context(), run)
		if err := j.End(t.Context()); err != nil || !errors.Is(ended, context.Canceled) {
			t.Fatal(err, ended)
		}
		j.Start(t.Context(), run) // the slot is free again
		if err := j.End(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestJob_EndHonorsItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := New()
		j.Start(t.Context(), func(context.Context) { time.Sleep(time.Hour) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := j.End(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
	})
}

func TestNameLocks_OneHolderPerName(t *testing.T) {
	l := NewNameLocks()
	unlock, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	unlock()
	if len(l.held) != 0 {
		t.Errorf("locks are left: %v", l.held)
	}
}

func TestSharedLocks_ManyShareOrOneHoldsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewSharedLocks()
		take := func(take func(context.Context, string) (func(), error), name string) func() {
			release, err := take(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			return release
		}
		first, second := take(l.Share, "a"), take(l.Share, "a")
		take(l.Alone, "b")() // another name
		var mu sync.Mutex
		var order []string
		note := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, what)
		}
		noted := func() []string {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(order)
		}
		go func() {
			release := take(l.Alone, "a")
			note("alone")
			time.Sleep(time.Second)
			release()
		}()
		synctest.Wait()
		go func() { // after the waiting caller
			release := take(l.Share, "a")
			note("shared")
			release()
		}()
		synctest.Wait()
		first()
		synctest.Wait()
		if order := noted(); len(order) != 0 {
			t.Fatal("held alone while it is shared", order)
		}
		second()
		synctest.Wait()
		if order := noted(); len(order) != 1 || order[0] != "alone" {
			t.Fatal(order)
		}
		time.Sleep(2 * time.Second)
		if order := noted(); len(order) != 2 || len(l.Held()) != 0 {
			t.Fatal(order, l.Held())
		}
	})
}

func TestSharedLocks_TheWaitHonoursItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewSharedLocks()
		release, err := l.Share(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Alone(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		again, err := l.Share(t.Context(), "a") // the waiting caller has given up
		if err != nil {
			t.Fatal(err)
		}
		again()
		release()
		if len(l.Held()) != 0 {
			t.Fatal(l.Held())
		}
	})
}
