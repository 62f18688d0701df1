package api

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

// CallerKind says as what a caller was let in.
type CallerKind uint8

// The kinds of caller. They are bits, so that a method's row can name several.
const (
	local      CallerKind = 1 << iota // on the admin socket
	admin                             // X509-SVID of an admin entry, or a configured admin ID
	agent                             // active X509-SVID of an attested node
	downstream                        // X509-SVID of a downstream entry
	anyone                            // everyone, also without an X509-SVID
)

// Caller is who makes a call, found once for each call before its service is
// reached. Do not change it.
type Caller struct {
	Kind  CallerKind
	ID    spiffeid.ID    // zero for local and anyone
	Node  *registry.Node // of an agent, as of the start of the call
	Entry *entry.Entry   // of an admin or downstream caller; nil for a configured admin ID
}

type callerKey struct{}

// callerFrom returns who makes the call of a service's method.
func callerFrom(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	if c == nil {
		return &Caller{Kind: anyone}
	}
	return c
}
