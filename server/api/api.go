// Package api is the server as its callers see it: SPIRE's server contracts
// and our own, one file a service.
//
// [New] makes an [API] of what it serves from; [API.Run] serves it on two
// listeners: TCP with TLS 1.3 for agents, workloads and whoever wants to
// become an agent, and the admin socket for operators on the same machine. Who
// may call what is decided in one table (authorize.go); which gRPC code an
// error has, in one function (errors.go).
package api

import (
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Options are what an API serves from.
type Options struct {
	Registry      *registry.Registry
	Issuer        *issue.Issuer
	Feed          *feed.Feed
	NodeAttestors map[string]attestors.Server // by name; how nodes may attest
	AdminIDs      []spiffeid.ID               // administer besides the entries with admin set
	Now           func() time.Time            // nil: time.Now
	Log           *slog.Logger                // nil: none
}

// API serves the server's contracts. Each service is a struct that embeds it.
type API struct {
	registry *registry.Registry
	issuer   *issue.Issuer
	feed     *feed.Feed
	td       spiffeid.TrustDomain
	now      func() time.Time
	log      *slog.Logger
}

// Each service is a struct in the file of its name.
