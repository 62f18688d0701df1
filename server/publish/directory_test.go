package publish_test

import (
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/hallmark-id/hallmark/server/publish"
)

func directory(path string) publish.Config {
	return everything(publish.Config{Directory: &publish.DirectoryConfig{Path: path}})
}

func read(t testing.TB, path ...string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	must(t, err)
	return text
}

// files lists what is below a directory, with modes.
func files(t testing.TB, dir string) map[string]fs.FileMode {
	t.Helper()
	all := make(map[string]fs.FileMode)
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := e.Info()
		all[strings.TrimPrefix(path, dir+"/")] = info.Mode()
		return err
	}))
	return all
}

// run runs publishers in the bubble of a test until it ends.
func run(t testing.TB, all ...*world) {
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, w := range all {
		running.Go(func() { _ = w.Run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	synctest.Wait()
}

func TestADirectoryHasTheDocumentsAsReadersExpectThem(t *testing.T) {
	dir := t.TempDir()
	old := syscall.Umask(0o077) // of a careful server
	defer syscall.Umask(old)
	b := newBundle(t, 7, "k1", "k2")
	w := newWorld(t, "main", newSource(b), directory(dir))
	must(t, w.Publish(t.Context()))

	got := files(t, dir)
	for _, path := range paths {
		if got[path] != 0o644 {
			t.Errorf("%s has the mode %v", path, got[path])
		}
	}
	for _, path := range []string{".well-known", "shop", "shop/.well-known"} {
		if got[path] != fs.ModeDir|0o755 {
			t.Errorf("%s has the mode %v", path, got[path])
		}
	}
	if len(got) != len(paths)+3 {
		t.Errorf("there is more than the documents: %v", got)
	}
	whole, err := spiffebundle.Parse(td, read(t, dir, "bundle.json"))
	must(t, err)
	if n, _ := whole.SequenceNumber(); n != 7 || !whole.HasJWTAuthority("k2") || len(whole.X509Authorities()) != 1 {
		t.Errorf("the bundle is %s", read(t, dir, "bundle.json"))
	}
	if hint, _ := whole.RefreshHint(); hint != 5*time.Minute {
		t.Errorf("the refresh hint is %v", hint)
	}
	var metadata struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	must(t, json.Unmarshal(read(t, dir, "shop/.well-known/openid-configuration"), &metadata))
	if metadata.Issuer != issuer+"/shop" || metadata.Keys != issuer+"/shop/keys" {
		t.Errorf("the metadata are %+v", metadata)
	}
	var set jose.JSONWebKeySet
	must(t, json.Unmarshal(read(t, dir, "keys"), &set))
	if len(set.Keys) != 2 || set.Keys[0].Use != "sig" || !set.Keys[0].IsPublic() {
		t.Errorf("the keys are %s", read(t, dir, "keys"))
	}
	for _, path := range paths {
		if n := sequence(t, read(t, dir, path)); n != 7 {
			t.Errorf("%s has the sequence number %d", path, n)
		}
	}
	if s := w.Targets()[0]; s.State != publish.Current || s.Sequence != 7 || s.Error != "" || s.PublishedAt.IsZero() || s.Place != dir {
		t.Errorf("the target is %+v", s)
	}
	if w.value(t, "hallmark_server_published_sequence_number", "") != 7 || w.value(t, "hallmark_server_publish_tries_total", "ok") != 1 ||
		w.value(t, "hallmark_server_published_timestamp_seconds", "") == 0 {
		t.Error("the metrics do not say so")
	}
}

func TestAChangeIsPublishedAtOnce(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "main", newSource(newBundle(t, 1, "k1")), directory(dir))
		run(t, w)
		next := with(t, w.bundle, "k2")
		w.set(next)
		synctest.Wait() // no time passes
		for _, path := range paths {
			if n := sequence(t, read(t, dir, path)); n != 2 {
				t.Errorf("%s has the sequence number %d", path, n)
			}
		}
	})
}

func TestWhatSomebodyDeletedOrChangedIsPutBack(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"deleted":    func(t *testing.T, dir string) { must(t, os.Remove(dir+"/keys")) },
		"everything": func(t *testing.T, dir string) { must(t, os.RemoveAll(dir+"/.well-known")) },
		"changed":    func(t *testing.T, dir string) { must(t, os.WriteFile(dir+"/keys", []byte(`{"keys":[]}`), 0o644)) },
		"older": func(t *testing.T, dir string) {
			must(t, os.WriteFile(dir+"/keys", []byte(`{"keys":[],"spiffe_sequence":3}`), 0o644))
		},
		"of another maker": func(t *testing.T, dir string) { must(t, os.WriteFile(dir+"/keys", []byte("<html>"), 0o644)) },
		"cut off":          func(t *testing.T, dir string) { must(t, os.Truncate(dir+"/keys", 10)) },
		"hidden":           func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/keys", 0o600)) },
		"too long":         func(t *testing.T, dir string) { must(t, os.Truncate(dir+"/keys", 5<<20)) },
		"a link elsewhere": func(t *testing.T, dir string) {
			must(t, os.Remove(dir+"/keys"))
			must(t, os.Symlink("/etc/hostname", dir+"/keys"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), directory(dir))
				run(t, w)
				before := files(t, dir)
				keys := read(t, dir, "keys")
				spoil(t, dir)
				time.Sleep(5 * time.Minute) // of the bubble
				synctest.Wait()
				if got := read(t, dir, "keys"); string(got) != string(keys) {
					t.Errorf("the keys are %s", got)
				}
				after := files(t, dir)
				for path, mode := range before {
					if after[path] != mode {
						t.Errorf("%s has the mode %v", path, after[path])
					}
				}
				if w.value(t, "hallmark_server_publish_repairs_total", "") != 1 || !strings.Contains(w.log.String(), "look who may write there") && !strings.Contains(w.log.String(), "gone from the target") {
					t.Errorf("nobody is told:\n%s", w.log)
				}
			})
		})
	}
}

func TestAnOlderServerDoesNotOverwriteANewerOne(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := newBundle(t, 7, "k1")
		behind := newWorld(t, "behind", newSource(b), directory(dir))
		ahead := newWorld(t, "ahead", newSource(with(t, b, "k2")), directory(dir))
		must(t, ahead.Publish(t.Context()))
		newer := read(t, dir, "keys")
		run(t, behind)
		time.Sleep(30 * time.Second)
		if string(read(t, dir, "keys")) != string(newer) {
			t.Error("the older server has put its document there")
		}
		if s := behind.Targets()[0]; s.State != publish.Current || s.Sequence != 8 || s.Newest != 7 {
			t.Errorf("the server that is a little behind says %+v", s)
		}
		// It never learns of it: something is wrong.
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := behind.Targets()[0]; s.State != publish.Failing || !strings.Contains(s.Error, "sequence number is 8") || !strings.Contains(s.Error, "delete the document") {
			t.Errorf("the server says %+v", s)
		}
		behind.set(with(t, ahead.bundle, "k3"))
		synctest.Wait()
		if s := behind.Targets()[0]; s.State != publish.Current || sequence(t, read(t, dir, "keys")) != 9 {
			t.Errorf("the server that has caught up says %+v", s)
		}
	})
}

func TestThreeServersThatPublishToOneDirectoryAgreeOnTheNewest(t *testing.T) {
	dir := t.TempDir()
	bundles := newBundle(t, 1, "k1")
	s := newSource(bundles)
	var all []*world
	for _, name := range []string{"a", "b", "c"} {
		all = append(all, newWorld(t, name, s, directory(dir)))
	}
	for n := range 30 {
		s.set(with(t, s.bundle, "more"+string(rune('a'+n))))
		var running sync.WaitGroup
		for _, w := range all {
			running.Go(func() { must(t, w.Publish(t.Context())) })
		}
		running.Wait()
		for _, path := range paths {
			if got := sequence(t, read(t, dir, path)); got != uint64(n+2) {
				t.Fatalf("%s has the sequence number %d after %d changes", path, got, n+1)
			}
		}
	}
	if got := files(t, dir); len(got) != len(paths)+3 {
		t.Errorf("temporary files are left: %v", got)
	}
	for _, w := range all {
		if w.value(t, "hallmark_server_publish_repairs_total", "") != 0 {
			t.Errorf("a server takes the others for vandals:\n%s", w.log)
		}
	}
}

func TestAServerThatWasKilledWhileItWroteLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/.keys.main.tmp", []byte("half of a docu"), 0o600))
	must(t, newWorld(t, "main", newSource(newBundle(t, 7, "k1")), directory(dir)).Publish(t.Context()))
	if got := files(t, dir); len(got) != len(paths)+3 || got["keys"] != 0o644 {
		t.Errorf("there is %v", got)
	}
}

// TestReadersSeeWholeDocumentsOnly reads all the time while documents change.
func TestReadersSeeWholeDocumentsOnly(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, "main", newSource(newBundle(t, 1, "k1")), directory(dir))
	must(t, w.Publish(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		for last := uint64(0); ctx.Err() == nil; {
			text, err := os.ReadFile(dir + "/keys")
			if err != nil || !json.Valid(text) {
				t.Errorf("a reader got %q, %v", text, err)
				return
			}
			if n := sequence(t, text); n < last {
				t.Errorf("a reader got %d after %d", n, last)
			} else {
				last = n
			}
		}
	})
	for n := range 50 {
		w.set(with(t, w.bundle, "more"+string(rune('a'+n))))
		must(t, w.Publish(t.Context()))
	}
	cancel()
	running.Wait()
}

func TestNothingOutsideOfTheDirectoryIsTouched(t *testing.T) {
	outside := t.TempDir()
	dir := t.TempDir()
	must(t, os.Symlink(outside, dir+"/.well-known"))
	must(t, os.WriteFile(outside+"/precious", []byte("precious"), 0o644))
	must(t, os.Symlink(outside+"/precious", dir+"/keys"))
	w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), directory(dir))
	err := w.Publish(t.Context())
	if err == nil || !strings.Contains(err.Error(), ".well-known") {
		t.Errorf("a link that leads out gives %v", err)
	}
	if got := files(t, outside); len(got) != 1 || string(read(t, outside, "precious")) != "precious" {
		t.Errorf("outside there is %v", got)
	}
	if info, err := os.Lstat(dir + "/keys"); err != nil || info.Mode() != 0o644 {
		t.Errorf("the link is not replaced: %v, %v", info, err)
	}
}

func TestAFailureSaysWhatToDoAndIsTriedAgain(t *testing.T) {
	above := t.TempDir()
	dir := above + "/www"
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), directory(dir))
		run(t, w)
		s := w.Targets()[0]
		if s.State != publish.Failing || !strings.Contains(s.Error, "is not there; make it") || !strings.Contains(w.log.String(), "is not there; make it") {
			t.Errorf("the target is %+v, the log\n%s", s, w.log)
		}
		time.Sleep(time.Hour)
		if n := w.Targets()[0].Failures; n < 12 || n > 40 {
			t.Errorf("it was tried %d times in an hour", n)
		}
		if n := strings.Count(w.log.String(), "does not get what"); n > 7 {
			t.Errorf("the log says so %d times", n)
		}
		if w.value(t, "hallmark_server_publish_tries_total", "failed") < 12 || w.value(t, "hallmark_server_published_timestamp_seconds", "") != 0 {
			t.Error("the metrics do not say so")
		}
		must(t, os.Mkdir(dir, 0o755))
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if s := w.Targets()[0]; s.State != publish.Current || s.Failures != 0 || s.Error != "" {
			t.Errorf("the target is %+v", s)
		}
	})
}

func TestAnAuthorityIsReadyOnceItIsPublishedForAsLongAsDocumentsAreKept(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), directory(dir))
		run(t, w)
		must(t, os.Rename(dir, dir+".away"))
		t.Cleanup(func() { _ = os.Rename(dir+".away", dir) })
		next := with(t, w.bundle, "k2")
		w.set(next)
		synctest.Wait()
		if _, err := w.Ready(authority(next, "k2")); err == nil || !strings.Contains(err.Error(), "not published to web: ") {
			t.Errorf("of an authority that is not there it says %v", err)
		}
		if _, err := w.Ready(authority(next, "k1")); err != nil {
			t.Errorf("of one that is there it says %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.Await(ctx, authority(next, "k2")); err == nil {
			t.Error("it is awaited without being there")
		}
		must(t, os.Rename(dir+".away", dir))
		must(t, w.Await(t.Context(), authority(next, "k2")))
		published := time.Now()
		from, err := w.Ready(authority(next, "k2"))
		if err != nil || !from.Equal(published.Add(5*time.Minute)) {
			t.Errorf("it is ready %v after it was published, %v", from.Sub(published), err)
		}
		// Later documents have it too.
		time.Sleep(time.Minute)
		w.set(with(t, next, "k3"))
		synctest.Wait()
		if again, err := w.Ready(authority(next, "k2")); err != nil || !again.Equal(from) {
			t.Errorf("then it is ready %v after it was published, %v", again.Sub(published), err)
		}
		if _, err := os.Stat(dir + ".away"); err == nil {
			t.Error("the directory is not back")
		}
	})
}
