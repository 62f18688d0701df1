package badger_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("HALLMARK_TEST_OPEN"); dir != "" {
		if _, err := badger.Open(badger.Options{Dir: dir}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv("HALLMARK_TEST_WRITE"); dir != "" {
		fmt.Println(victim(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const victims = 8 // writers in the process that is killed

// victim writes until it is killed, and prints what was acknowledged. Each
// writer counts: its transaction i sets head/w to i, and writes log/w/i and
// copy/w/i with the same value.
func victim(dir string) error {
	fmt.Println("opening")
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		return err
	}
	fmt.Println("open")
	var next [victims]int
	var heads [victims]store.Revision
	_, err = db.Read(context.Background(), "head/", func(r store.Record) error {
		var w, n int
		if _, err := fmt.Sscanf(r.Key+" "+string(r.Value), "head/%d %d", &w, &n); err != nil {
			return err
		}
		next[w], heads[w] = n, r.Revision
		return nil
	})
	if err != nil {
		return err
	}
	failed := make(chan error)
	for w := range victims {
		go func() {
			random := rand.New(rand.NewPCG(rand.Uint64(), 0))
			for {
				var txns []store.Txn
				head := fmt.Sprint("head/", w)
				first := next[w] + 1
				for range 1 + random.IntN(4) {
					next[w]++
					value := value(random, w, next[w])
					txns = append(txns, store.Txn{Do: []store.Write{
						{Key: head, Value: fmt.Append(nil, next[w])},
						{Key: fmt.Sprintf("log/%d/%d", w, next[w]), Value: value},
						{Key: fmt.Sprintf("copy/%d/%d", w, next[w]), Value: value},
					}})
				}
				txns[0].If = []store.Condition{{Key: head, Revision: heads[w]}}
				var acknowledged bytes.Buffer
				for i, r := range db.Commit(context.Background(), txns...) {
					if r.Err != nil {
						failed <- fmt.Errorf("writer %d: Commit: %w", w, r.Err)
						return
					}
					fmt.Fprintln(&acknowledged, "did", w, first+i, r.Revision)
					heads[w] = r.Revision
				}
				os.Stdout.Write(acknowledged.Bytes())
			}
		}()
	}
	return <-failed
}

// value is small, or now and then large, so that some kills meet a memtable
// that is being written out.
func value(random *rand.Rand, w, i int) []byte {
	size := random.IntN(500)
	if random.IntN(100) == 0 {
		size = random.IntN(300_000)
	}
	return append(fmt.Appendf(nil, "%d/%d/", w, i), bytes.Repeat([]byte{'v'}, size)...)
}

// TestKillLosesNothingAcknowledged kills the writing process in the middle of
// its writes, or while it opens the store, and opens the store after each time:
// everything that was acknowledged is there, and no transaction in part.
func TestKillLosesNothingAcknowledged(t *testing.T) {
	const kills = 50
	dir := t.TempDir()
	acknowledged := map[string]store.Revision{} // "w i"
	opening := 0
	for k := range kills {
		// After how many acknowledgements; below 0 while it opens the store.
		after := rand.IntN(150) - 50
		if after < 0 {
			opening++
		}
		kill(t, dir, after, acknowledged)
		inspect(t, dir, acknowledged)
		if t.Failed() {
			t.Fatalf("after kill %d, which came after %d acknowledgements", k+1, after)
		}
	}
	t.Logf("%d transactions were acknowledged; %d of the kills came during Open", len(acknowledged), opening)
}

func kill(t *testing.T, dir string, after int, acknowledged map[string]store.Revision) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "HALLMARK_TEST_WRITE="+dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	child.Stderr = os.Stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	shoot := sync.OnceFunc(func() { child.Process.Kill() })
	defer shoot()
	lines := bufio.NewScanner(out)
	seen := 0
	for lines.Scan() { // on to the end of the pipe: what it wrote before it died counts
		line := lines.Text()
		var w, i int
		var revision store.Revision
		switch n, _ := fmt.Sscanf(line, "did %d %d %d", &w, &i, &revision); {
		case n == 3:
			acknowledged[fmt.Sprint(w, " ", i)] = revision
			seen++
		case line == "opening" && after < 0: // some way into Open, or just behind it
			time.AfterFunc(time.Duration(rand.IntN(30_000))*time.Microsecond, shoot)
		case line == "opening" || line == "open":
		default:
			t.Errorf("the writer says %q", line)
		}
		if after >= 0 && seen > after {
			shoot()
		}
	}
	child.Wait()
	if s := child.ProcessState.String(); !strings.Contains(s, "killed") {
		t.Errorf("the writer ended by itself: %s", s)
	}
}

func inspect(t *testing.T, dir string, acknowledged map[string]store.Revision) {
	t.Helper()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}()
	heads := map[int]int{}
	logs, copies := map[string]store.Record{}, map[string]store.Record{}
	now, err := db.Read(t.Context(), "", func(r store.Record) error {
		kind, rest, _ := strings.Cut(r.Key, "/")
		name := strings.Replace(rest, "/", " ", 1)
		switch kind {
		case "head":
			var w, n int
			if _, err := fmt.Sscanf(rest+" "+string(r.Value), "%d %d", &w, &n); err != nil {
				return err
			}
			heads[w] = n
		case "log":
			logs[name] = r
		case "copy":
			copies[name] = r
		}
		return nil
	})
	if err != nil {
		t.Fatalf("Read: %v", err)
	}
	sum := 0
	for w, n := range heads {
		sum += n
		for i := 1; i <= n; i++ {
			name := fmt.Sprint(w, " ", i)
			l, c := logs[name], copies[name]
			if l.Revision == 0 || l.Revision != c.Revision || !bytes.Equal(l.Value, c.Value) || !bytes.HasPrefix(l.Value, fmt.Appendf(nil, "%d/%d/", w, i)) {
				t.Errorf("transaction %s is there in part: revisions %d and %d, %d and %d bytes", name, l.Revision, c.Revision, len(l.Value), len(c.Value))
			}
		}
	}
	if len(logs) != sum || len(copies) != sum {
		t.Errorf("%d transactions have %d and %d records", sum, len(logs), len(copies))
	}
	if int(now) != sum {
		t.Errorf("the store has revision %d after %d transactions", now, sum)
	}
	for name, revision := range acknowledged {
		if logs[name].Revision != revision {
			t.Errorf("transaction %s was acknowledged at %d and is there at %d", name, revision, logs[name].Revision)
		}
	}
}
