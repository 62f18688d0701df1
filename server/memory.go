package server

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	memoryLook = 10 * time.Second
	// memoryQuiet is the part of the memory that the server holds which it may
	// use anew in memoryLook and still be at rest.
	memoryQuiet = 1.0 / 16
	// memoryExcess is how much more than after the last time, at least, the
	// server holds when it gives memory back.
	memoryExcess = 1.25
	// memoryLeast is what is not worth giving back, in bytes.
	memoryLeast = 16 << 20
)

// giveMemoryBack returns to the system what a burst has left, whenever look
// receives and the server is at rest. Go's collector keeps room for as much
// garbage as there is live memory, be it ever used again or not: after ten
// thousand agents have come, or a million entries, that is half of all.
func giveMemoryBack(ctx context.Context, look <-chan time.Time) {
	var allocated, left uint64
	for {
		select {
		case <-look:
		case <-ctx.Done():
			return
		}
		m := memory()
		quiet := float64(m.allocated-allocated) < memoryQuiet*float64(m.held)
		allocated, left = m.allocated, min(left, m.held)
		if quiet && m.held > left+memoryLeast && float64(m.held) > memoryExcess*float64(left) {
			runtime.GC() // what pools keep goes at the second and third collection
			runtime.GC()
			debug.FreeOSMemory()
			left = memory().held
		}
	}
}

// usage is memory of this process, in bytes.
type usage struct {
	allocated uint64 // ever, on the heap
	held      uint64 // by the Go runtime, and not given back to the system
}

func memory() usage {
	samples := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(samples)
	return usage{samples[0].Value.Uint64(), samples[1].Value.Uint64() - samples[2].Value.Uint64()}
}
