package job

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestJob_HasOneRunAtATime(t *testing.T) {
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

func TestJob_EndEndsTheRunInProgress(t *testing.T) {
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

func TestJob_TheWaitForTheEndHonoursItsContext(t *testing.T) {
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

func TestNameLocks_KeepOneNameToOneHolderAndForgetIt(t *testing.T) {
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
