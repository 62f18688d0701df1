package api

import (
	"context"
	"errors"
	"time"
)

// turns bound the TLS handshakes that are being computed at once. After a
// restart all agents come at once. If the server worked on ten thousand
// handshakes side by side, all would end at the same time: after the time that
// client and server have for one, so that each would be in vain and be made
// again. One after the other, they come to their end at the rate at which the
// machine can make them.
//
// A turn lasts from the client's first message to the server's answer. While
// the server waits for the client nobody waits for a turn, so one who is slow
// or silent holds up nobody; and a handshake that was begun needs no other.
type turns chan struct{}

const (
	// turnsPerCPU keeps every CPU busy, whatever a turn waits for.
	turnsPerCPU = 2
	// maxTurnWait leaves a handshake that gets its turn enough of
	// handshakeTimeout. Another client is more likely to be there still.
	maxTurnWait = handshakeTimeout / 2
)

var errNoTurn = errors.New("there are too many handshakes; try again")

// begin waits for a turn and returns what ends it.
func (t turns) begin(ctx context.Context) (end func(), err error) {
	end = func() { <-t }
	select {
	case t <- struct{}{}:
		return end, nil
	default:
	}
	timer := time.NewTimer(maxTurnWait)
	defer timer.Stop()
	select {
	case t <- struct{}{}: // those who wait get it in the order they came
		return end, nil
	case <-timer.C:
		return nil, errNoTurn
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
