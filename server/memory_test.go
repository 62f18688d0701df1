package server

import (
	"context"
	"testing"
	"time"
)

// TestABurstsMemoryIsGivenBack has the collector pile up garbage, which nobody
// would clear away while the server is at rest.
func TestABurstsMemoryIsGivenBack(t *testing.T) {
	look := make(chan time.Time)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); giveMemoryBack(ctx, look) }()
	look <- time.Time{} // the start is a burst
	look <- time.Time{}
	look <- time.Time{} // what was before the burst is given back by now

	before := memory().held
	const burst = 256 << 20
	live := make([][]byte, 0, burst>>20)
	for range cap(live) {
		live = append(live, make([]byte, 1<<20))
	}
	during := memory().held
	if during < before+burst/2 {
		t.Fatalf("a burst of %d MB took %d MB", burst>>20, (int64(during)-int64(before))>>20)
	}
	live = nil
	look <- time.Time{} // sees the burst
	look <- time.Time{} // sees rest
	stop()
	<-done
	if after := memory().held; after > before+burst/4 {
		t.Errorf("of %d MB that a burst took, %d MB are held at rest", (during-before)>>20, (int64(after)-int64(before))>>20)
	}
}
