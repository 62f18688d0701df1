// Package admin serves what an operator asks an agent: how it is, and why a
// process gets the identities it gets or none. It serves SPIRE's agent Debug
// and Logger APIs too, and, where the configuration names delegates, its
// Delegated Identity API. Make a [Server] with [New].
//
// It has a socket of its own, for root and the agent's own user. Delegates may
// be of other users: then the socket's group may connect too, and who may call
// what is decided in one place, for each call (authorize).
package admin

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Modes of the socket.
const (
	// SocketMode is for the agent's own user and root.
	SocketMode = 0o600
	// DelegatesSocketMode is for the socket's group too, where there are
	// delegates. The socket gets its group from a directory with the setgid bit.
	DelegatesSocketMode = 0o660
)

const (
	maxMatches = 1000 // in one explanation; agent.proto promises as much
	// maxStreams is how many calls one connection may have at once: a
	// delegate follows each workload of its node on a stream.
	maxStreams = 8192
)

// Connection is how the agent stands with its server.
type Connection struct {
	AgentID       spiffeid.ID         // zero until attested
	SVIDExpiresAt time.Time           // of the node's own SVID
	Server        string              // host:port of the server that it is or was last connected to; empty: none yet
	Connected     bool                // the push stream is open and in step
	LastError     error               // why it is not
	SyncedAt      time.Time           // when what is held was last what the server says; zero: never
	Chain         []*x509.Certificate // the node's own SVID and what vouches for it; nil until attested
	Authorities   []*x509.Certificate // by which it knows the server; nil before it has a bundle
}

// Options of [New]. All but Delegates, Limits, Now, Log, LogLevel and Traces are required.
type Options struct {
	Listener    net.Listener // of a Unix socket; [peercred.Listen] with one of the modes
	TrustDomain spiffeid.TrustDomain
	Server      string // host:port that is configured
	Held        *held.Held
	Attestor    *workload.Attestor
	Connection  func() Connection
	Delegates   []spiffeid.ID // who may fetch identities on behalf of other workloads
	Limits      endpoint.Limits
	Now         func() time.Time  // nil is time.Now
	Log         *slog.Logger      // nil is silent
	LogLevel    *loglevel.Var     // of Log; nil is one that is nobody's
	Traces      *telemetry.Traces // nil: none
}

// Server serves the agent's AdminService.
type Server struct {
	hallmarkv1.UnimplementedAgentAdminServiceServer

	*endpoint.Endpoint
	o       Options
	started time.Time
}

// New makes a server. [Server.Run] closes the listener.
func New(o Options) *Server {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.LogLevel == nil {
		o.LogLevel = loglevel.New(slog.LevelInfo)
	}
	s := &Server{o: o, started: o.Now()}
	s.Endpoint = endpoint.New(endpoint.Options{
		Listener: o.Listener, Held: o.Held, Attestor: o.Attestor, Limits: o.Limits, MaxStreams: maxStreams,
		RequireOwner: len(o.Delegates) == 0, Authorize: s.authorize, Now: o.Now, Log: o.Log,
		Traces: o.Traces, Traced: byOwner,
	})
	return s
}

// byOwner reports whether a call comes from an operator, whose trace is gone on
// with; that of a delegate is not.
func byOwner(ctx context.Context) bool {
	p, err := peercred.FromContext(ctx)
	return err == nil && p.Owner()
}

// Run serves until ctx ends, and returns its error. It is called once.
func (s *Server) Run(ctx context.Context) error {
	return s.Endpoint.Run(ctx, func(g *grpc.Server) {
		hallmarkv1.RegisterAgentAdminServiceServer(g, s)
		debugv1.RegisterDebugServer(g, &debugService{Server: s})
		loggerv1.RegisterLoggerServer(g, &loggerService{Server: s})
		delegatedv1.RegisterDelegatedIdentityServer(g, &delegatedService{Server: s})
	})
}

// authorize decides who may call what: a delegate the Delegated Identity API,
// an owner of the agent everything else. Being root makes no delegate.
func (s *Server) authorize(ctx context.Context, method string) (context.Context, error) {
	if strings.HasPrefix(method, delegatedMethods) {
		return s.authorizeDelegate(ctx)
	}
	if !byOwner(ctx) {
		return nil, status.Error(codes.PermissionDenied, "this call is for root and the agent's own user")
	}
	return ctx, nil
}

// GetStatus says how the agent is.
func (s *Server) GetStatus(context.Context, *hallmarkv1.GetStatusRequest) (*hallmarkv1.GetStatusResponse, error) {
	c := s.o.Connection()
	entries, svids := s.o.Held.Counts()
	r := &hallmarkv1.GetStatusResponse{
		TrustDomain: s.o.TrustDomain.Name(),
		Version:     version.String(),
		Server:      cmp.Or(c.Server, s.o.Server),
		Connected:   c.Connected,
		Revision:    s.o.Held.Revision(),
		Entries:     int32(entries),
		Svids:       int32(svids),
		StartedAt:   s.started.Unix(),
	}
	if !c.AgentID.IsZero() {
		r.AgentId = c.AgentID.String()
	}
	if !c.SVIDExpiresAt.IsZero() {
		r.SvidExpiresAt = c.SVIDExpiresAt.Unix()
	}
	if c.LastError != nil {
		r.LastError = c.LastError.Error()
	}
	for _, a := range c.Authorities {
		r.Authorities = append(r.Authorities, a.Raw)
	}
	return r, nil
}

// Explain attests a process and compares it to each entry.
func (s *Server) Explain(ctx context.Context, r *hallmarkv1.ExplainRequest) (*hallmarkv1.ExplainResponse, error) {
	if r.Pid <= 0 {
		return nil, status.Errorf(codes.InvalidArgument, "pid %d is not one of a process; a PID is positive", r.Pid)
	}
	p, err := peercred.Pin(r.Pid)
	if err != nil {
		return nil, processError(r.Pid, err)
	}
	defer p.Close()
	set, results, err := s.o.Attestor.Attest(ctx, p)
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if err != nil {
		return nil, processError(r.Pid, err)
	}
	out := &hallmarkv1.ExplainResponse{Pid: r.Pid, Selectors: entry.SelectorsRecord(set)}
	if id := s.o.Connection().AgentID; !id.IsZero() {
		out.AgentId = id.String()
	}
	for _, result := range results {
		a := &hallmarkv1.ExplainResponse_AttestorResult{
			Name: result.Name, Selectors: int32(len(result.Selectors)), Microseconds: result.Took.Microseconds(),
		}
		if result.Err != nil {
			a.Error = result.Err.Error()
		}
		out.Attestors = append(out.Attestors, a)
	}
	out.Matches, out.Total = s.matches(set)
	return out, nil
}

func processError(pid int32, err error) error {
	if errors.Is(err, peercred.ErrEnded) {
		return status.Errorf(codes.NotFound, "there is no process %d; PIDs are those that the agent sees, in its own PID namespace", pid)
	}
	return status.Error(codes.FailedPrecondition, err.Error())
}

// matches compares a set of selectors to each entry held. It returns those
// that match first, then those that miss fewest selectors.
func (s *Server) matches(set selector.Set) (matches []*hallmarkv1.ExplainResponse_Match, total int32) {
	type compared struct {
		entry   *entry.Entry
		missing []selector.Selector
	}
	var all []compared
	var matched []*entry.Entry
	for _, e := range s.o.Held.Entries() { // oldest first
		missing := slices.Collect(e.Selectors.Missing(set))
		all = append(all, compared{e, missing})
		if len(missing) == 0 {
			matched = append(matched, e)
		}
	}
	total = int32(len(all))
	slices.SortStableFunc(all, func(a, b compared) int { return cmp.Compare(len(a.missing), len(b.missing)) })
	why := s.reasons(matched)
	for _, c := range all[:min(len(all), maxMatches)] {
		matches = append(matches, &hallmarkv1.ExplainResponse_Match{
			Entry:   c.entry.Record(),
			Matched: len(c.missing) == 0,
			Missing: entry.SelectorsRecord(c.missing),
			Reason:  why[c.entry],
		})
	}
	return matches, total
}

// reasons says why entries that match yield no SVID, if so.
func (s *Server) reasons(matched []*entry.Entry) map[*entry.Entry]string {
	now := s.o.Now()
	out := make(map[*entry.Entry]string)
	var served []*entry.Entry
	for _, e := range matched {
		switch {
		case e.StoreSVID:
			out[e] = "store_svid: its SVID goes to a store, not to the Workload API"
		case e.Expired(now):
			out[e] = fmt.Sprintf("the entry expired at %s", e.ExpiresAt.UTC().Format(time.RFC3339))
		default:
			served = append(served, e)
		}
	}
	kept, dropped := held.DistinctHints(served)
	for _, e := range dropped {
		out[e] = fmt.Sprintf("an older entry that matches too has the same hint, %q", e.Hint)
	}
	for _, e := range kept {
		st, ok := s.o.Held.Status(e.ID)
		switch {
		case !ok:
			out[e] = "the entry was deleted just now"
		case st.SVID == nil && st.Err != nil:
			out[e] = fmt.Sprintf("signing its X509-SVID failed: %v; the next attempt is in %v",
				st.Err, max(0, st.RetryAt.Sub(now)).Round(time.Second/10))
		}
	}
	return out
}
