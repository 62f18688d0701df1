package workload_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type attestor func(ctx context.Context, p attestors.Process) ([]selector.Selector, error)

func (a attestor) Attest(ctx context.Context, p attestors.Process) ([]selector.Selector, error) {
	return a(ctx, p)
}

func gives(values ...string) attestor {
	return func(context.Context, attestors.Process) ([]selector.Selector, error) { return parse(values...), nil }
}

func parse(values ...string) []selector.Selector {
	var out []selector.Selector
	for _, v := range values {
		s, err := selector.Parse(v)
		if err != nil {
			panic(err)
		}
		out = append(out, s)
	}
	return out
}

func self(t *testing.T) *peercred.Peer {
	t.Helper()
	p, err := peercred.Pin(int32(os.Getpid()))
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

func TestAllAttestorsAreAskedAboutTheSameProcess(t *testing.T) {
	p := self(t)
	var asked attestors.Process
	a := workload.New(workload.Options{Attestors: map[string]attestors.Workload{
		"b": gives("b:2", "b:1", "b:2"),
		"a": attestor(func(_ context.Context, p attestors.Process) ([]selector.Selector, error) {
			asked = p
			return parse("a:1"), nil
		}),
		"none": gives(),
	}})
	set, results, err := a.Attest(t.Context(), p)
	must(t, err)
	if want := []string{"a:1", "b:1", "b:2"}; !slices.Equal(set.Strings(), want) {
		t.Errorf("got %v, want %v", set, want)
	}
	if asked != (attestors.Process{PID: p.PID, UID: p.UID, GID: p.GID}) {
		t.Errorf("asked about %+v", asked)
	}
	var names []string
	for _, r := range results {
		names = append(names, r.Name)
		if r.Err != nil {
			t.Errorf("%s: %v", r.Name, r.Err)
		}
	}
	if !slices.Equal(names, []string{"a", "b", "none"}) {
		t.Errorf("results of %v", names)
	}
}

func TestAnAttestorThatFailsTakesOnlyItsOwnSelectorsAway(t *testing.T) {
	p := self(t)
	for name, c := range map[string]struct {
		bad  attestor
		says string
		keep []string
	}{
		"fails": {func(context.Context, attestors.Process) ([]selector.Selector, error) {
			return nil, errors.New("no runtime")
		}, "no runtime", nil},
		"fails in part": {func(context.Context, attestors.Process) ([]selector.Selector, error) {
			return parse("bad:1"), errors.New("too large")
		}, "too large", []string{"bad:1"}},
		"panics": {func(context.Context, attestors.Process) ([]selector.Selector, error) {
			panic("a bug")
		}, "panicked", nil},
		"speaks for another": {gives("bad:1", "good:admin"), "not of its type", nil},
		"gives too many": {func(_ context.Context, p attestors.Process) ([]selector.Selector, error) {
			var out []selector.Selector
			for i := range 2000 {
				out = append(out, selector.Selector{Type: "bad", Value: strings.Repeat("x", i+1)})
			}
			return out, nil
		}, "the most is", nil},
	} {
		t.Run(name, func(t *testing.T) {
			a := workload.New(workload.Options{
				Attestors: map[string]attestors.Workload{"bad": c.bad, "good": gives("good:1")},
			})
			set, results, err := a.Attest(t.Context(), p)
			must(t, err)
			want := append(slices.Clone(c.keep), "good:1")
			if !slices.Equal(set.Strings(), want) {
				t.Errorf("got %v, want %v", set, want)
			}
			if err := results[0].Err; err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("its error is %v, want one that says %q", err, c.says)
			}
		})
	}
}

func TestAnAttestorThatHangsIsLeftBehind(t *testing.T) {
	p := self(t)
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		var hanging atomic.Int32
		a := workload.New(workload.Options{Timeout: time.Second, Attestors: map[string]attestors.Workload{
			"good": gives("good:1"),
			"hung": attestor(func(context.Context, attestors.Process) ([]selector.Selector, error) {
				hanging.Add(1)
				<-stop
				return nil, nil
			}),
		}})
		for range 200 {
			started := time.Now()
			set, results, err := a.Attest(t.Context(), p)
			must(t, err)
			if !slices.Equal(set.Strings(), []string{"good:1"}) {
				t.Errorf("got %v", set)
			}
			if results[1].Err == nil || time.Since(started) > time.Second {
				t.Errorf("after %v: %v", time.Since(started), results[1].Err)
			}
		}
		if n := hanging.Load(); n >= 200 {
			t.Errorf("%d attestations hang", n)
		}
		close(stop)
		synctest.Wait()
	})
}

func TestNobodyWaitsForAnAttestationThatWasGivenUp(t *testing.T) {
	p := self(t)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		a := workload.New(workload.Options{Attestors: map[string]attestors.Workload{
			"slow": attestor(func(ctx context.Context, _ attestors.Process) ([]selector.Selector, error) {
				cancel()
				<-ctx.Done()
				return nil, ctx.Err()
			}),
		}})
		if _, _, err := a.Attest(ctx, p); !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
		synctest.Wait()
	})
}

func TestE29_AProcessThatEndsWhileItIsAttestedHasNoSelectors(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "60")
	must(t, cmd.Start())
	p, err := peercred.Pin(int32(cmd.Process.Pid))
	must(t, err)
	defer p.Close()
	kill := func(context.Context, attestors.Process) ([]selector.Selector, error) {
		cmd.Process.Kill()
		cmd.Wait()
		return parse("a:of whoever has the PID now"), nil
	}
	a := workload.New(workload.Options{Attestors: map[string]attestors.Workload{"a": attestor(kill)}})
	for range 2 { // while it runs, and afterwards
		if set, _, err := a.Attest(t.Context(), p); !errors.Is(err, peercred.ErrEnded) || set != nil {
			t.Errorf("got %v, %v", set, err)
		}
	}
}
