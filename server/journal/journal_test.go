package journal_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/journal"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func open(t testing.TB, dir string, c *clock) *journal.Journal {
	t.Helper()
	j, err := journal.Open(dir, c.Now, nil)
	must(t, err)
	return j
}

func svid(n int, c *clock, ttl time.Duration) journal.SVID {
	v := journal.SVID{
		ID: fmt.Sprintf("spiffe://example.org/svc/%d", n%10), Node: "spiffe://example.org/spire/agent/a", Authority: "aa",
		IssuedAt: c.now.Unix(), ExpiresAt: c.now.Add(ttl).Unix(),
	}
	v.Serial[0], v.Serial[16], v.Serial[17], v.Serial[18], v.Serial[19] = 0x40, byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return v
}

func all(*journal.SVID) bool { return true }

func TestWhatWasIssuedIsKnownAfterARestartUntilItEnds(t *testing.T) {
	c, dir := &clock{time.Unix(1_800_000_000, 0)}, t.TempDir()
	j := open(t, dir, c)
	for n := range 100 {
		j.Add(svid(n, c, time.Hour))
	}
	j.Add(svid(1000, c, time.Minute))
	if got := j.Find(func(v *journal.SVID) bool { return v.ID == "spiffe://example.org/svc/3" }); len(got) != 10 || got[0] != svid(3, c, time.Hour) {
		t.Errorf("found %d of an identity, first %v", len(got), got)
	}
	// It is read while the first still has it: as after a crash, without Close.
	c.now = c.now.Add(2 * time.Minute)
	again := open(t, dir, c)
	if got := again.Find(all); len(got) != 100 || again.Live() != 100 {
		t.Errorf("after a restart there are %d", len(got))
	}
	c.now = c.now.Add(time.Hour)
	if got := again.Find(all); len(got) != 0 {
		t.Errorf("%d are found after their end", len(got))
	}
	must(t, j.Close())
	must(t, again.Close())
	if last := open(t, dir, c); last.Live() != 0 || files(t, dir) != 0 {
		t.Errorf("%d SVIDs and %d files are left after their end", last.Live(), files(t, dir))
	}
}

func files(t testing.TB, dir string) int {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	must(t, err)
	return len(names)
}

func TestATornFileGivesWhatIsWholeInIt(t *testing.T) {
	c, dir := &clock{time.Unix(1_800_000_000, 0)}, t.TempDir()
	j := open(t, dir, c)
	for n := range 10 {
		j.Add(svid(n, c, time.Hour))
	}
	must(t, j.Close())
	name := filepath.Join(dir, "0000000000.log")
	whole, err := os.ReadFile(name)
	must(t, err)
	for size := range len(whole) {
		must(t, os.WriteFile(name, whole[:size], 0o600))
		j := open(t, dir, c)
		if got := j.Live(); got > 9 {
			t.Fatalf("of %d bytes %d SVIDs were read", size, got)
		}
		j.Add(svid(99, c, time.Hour)) // goes on
		must(t, j.Close())
		must(t, removeOthers(dir, name))
	}
	damaged := append([]byte(nil), whole...)
	damaged[len(damaged)-1] ^= 1
	must(t, os.WriteFile(name, damaged, 0o600))
	if got := open(t, dir, c).Live(); got != 9 {
		t.Errorf("of a damaged file %d SVIDs were read, want 9", got)
	}
}

func removeOthers(dir, keep string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || path == keep {
			return err
		}
		return os.Remove(path)
	})
}

func TestFilesDoNotOutgrowWhatHasNotEnded(t *testing.T) {
	c, dir := &clock{time.Unix(1_800_000_000, 0)}, t.TempDir()
	var j *journal.Journal
	kept := 0
	for round := range 20 {
		j = open(t, dir, c)
		for n := range 2000 {
			ttl := time.Hour
			if n == 0 { // one that lasts pins no file
				ttl = 1000 * time.Hour
				kept++
			}
			j.Add(svid(round*2000+n, c, ttl))
		}
		must(t, j.Close())
		c.now = c.now.Add(2 * time.Hour)
	}
	j = open(t, dir, c)
	if j.Live() != kept {
		t.Errorf("%d are left, want %d", j.Live(), kept)
	}
	if n := files(t, dir); n > 3 {
		t.Errorf("%d files are left", n)
	}
}

func TestIssuingGoesOnWithoutAFile(t *testing.T) {
	c, dir := &clock{time.Unix(1_800_000_000, 0)}, filepath.Join(t.TempDir(), "journal")
	j := open(t, dir, c)
	must(t, os.Remove(dir))
	for n := range 100 {
		j.Add(svid(n, c, time.Hour))
	}
	if got := j.Find(all); len(got) != 100 {
		t.Errorf("%d are known, want 100", len(got))
	}
	must(t, os.Mkdir(dir, 0o700))
	c.now = c.now.Add(2 * time.Minute)
	j.Add(svid(100, c, time.Hour))
	must(t, j.Close())
	if got := open(t, dir, c).Live(); got != 1 {
		t.Errorf("%d were written once that was possible again, want 1", got)
	}
}

func FuzzRead(f *testing.F) {
	c := &clock{time.Unix(1_800_000_000, 0)}
	dir := f.TempDir()
	j := open(f, dir, c)
	j.Add(svid(1, c, time.Hour))
	must(f, j.Close())
	seed, err := os.ReadFile(filepath.Join(dir, "0000000000.log"))
	must(f, err)
	f.Add(seed)
	f.Add(seed[:len(seed)-3])
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "0000000007.log"), content, 0o600))
		j, err := journal.Open(dir, c.Now, nil)
		if err != nil {
			return
		}
		n := j.Live()
		j.Add(svid(2, c, time.Hour))
		must(t, j.Close())
		if again := open(t, dir, c); again.Live() != n+1 {
			t.Errorf("%d were read, one added, then %d", n, again.Live())
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	c := &clock{time.Unix(1_800_000_000, 0)}
	j := open(b, b.TempDir(), c)
	v := svid(1, c, time.Hour)
	b.ReportAllocs()
	for b.Loop() {
		j.Add(v)
	}
}

// BenchmarkLive reports the memory of an SVID that has not ended, and the time
// to find those of an identity among 100,000.
func BenchmarkLive(b *testing.B) {
	const live = 100_000
	c := &clock{time.Unix(1_800_000_000, 0)}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	j := open(b, b.TempDir(), c)
	id := "spiffe://example.org/svc/1" // the registry's own string
	for n := range live {
		v := svid(n, c, time.Hour)
		v.ID = id
		j.Add(v)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	for b.Loop() {
		if got := j.Find(func(v *journal.SVID) bool { return v.Serial[19] == 7 && v.ID == id }); len(got) == 0 {
			b.Fatal("none was found")
		}
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/live, "bytes/SVID")
}
