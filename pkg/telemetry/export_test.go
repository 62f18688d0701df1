package telemetry

import (
	"context"
	"time"
)

// Flush exports what waits, for at most so long.
func (t *Traces) Flush(most time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	t.provider.ForceFlush(ctx)
}

// MaxConnections is how many connections are served at once.
const MaxConnections = maxConnections
