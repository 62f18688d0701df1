// Package node is the node's own identity and its connection to the server.
//
// A [Node] proves what the node is (attestation), holds the agent's X509-SVID,
// renews it, and keeps one mutually authenticated connection to the server. On
// a node that has no identity yet it first decides whether to trust the server:
// by a bundle, by the roots pinned in a join string, or not at all when that was
// asked for. Key, SVID and bundle survive a restart in the data directory.
//
// [Open] makes one from what is on disk, [Node.Run] keeps it alive, [Node.Link]
// gives the connection to whoever speaks with the server (the feed), and the
// Node itself signs for agent/held: [Node.SignX509], [Node.SignJWT].
//
// One goroutine, that of Run, decides everything that changes: when to attest,
// to connect, to renew. Others only send it word.
package node

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// AgentPathPrefix begins the path of every agent's SPIFFE ID.
const AgentPathPrefix = "/spire/agent/"

const (
	// taintedRetry is how soon another SVID is asked for when the server
	// signed the new one with a tainted authority again.
	taintedRetry = 30 * time.Second
	// clockCheck bounds how long the node sleeps on a timer: timers stand
	// still while a machine is suspended, the end of an SVID does not.
	clockCheck = time.Minute
	// stableAfter is how long a connection must last for the next attempt to
	// be a first one again. A server that takes connections only to drop them
	// is not hammered.
	stableAfter = 10 * time.Second
	// linkGrace is how long after a connection broke a call waits for the
	// next one, instead of failing at once.
	linkGrace = 5 * time.Second
)

// ErrBanned is what [Node.Run] returns when the server has banned this agent.
var ErrBanned = errors.New(`server has banned this agent; it may come back after "hallmark node evict", with a new attestation`)

// Attestor is how this node proves what it is.
type Attestor struct {
	Name  string // the type on the wire, for example join_token
	Agent attestors.Agent
	// Spent reports whether this very proof admitted the agent id before and
	// is worth nothing now. Nil: the proof can be given again.
	Spent func(id spiffeid.ID) bool
}

// JoinToken makes the attestor that gives a join token. It fails if the token
// cannot be one.
func JoinToken(token string) (*Attestor, error) {
	a, err := jointoken.NewAgent(token)
	if err != nil {
		return nil, err
	}
	path := AgentPathPrefix + jointoken.Name + "/" + token
	return &Attestor{
		Name:  jointoken.Name,
		Agent: a,
		Spent: func(id spiffeid.ID) bool { return id.Path() == path },
	}, nil
}

// Options of [Open].
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Server      string // host:port; a name may stand for several servers
	// OtherServers are further ones, host:port each. Those that a server tells of
	// come on top of them.
	OtherServers []string
	Dir          string // data directory; made if it does not exist

	// InMemory keeps key, SVID and bundle in memory alone, until Run ends: for
	// simulated agents. Dir must be empty.
	InMemory bool

	// TPM has the node's key made and kept in a TPM. Nil: it is in a file in Dir.
	TPM *TPM

	// Attestor may be nil if an identity is on disk.
	Attestor *Attestor

	// At most one of these says why a server is trusted that no bundle from
	// an earlier connection vouches for.
	TrustBundle *bundle.Bundle
	Join        *join.String
	Insecure    bool

	// NextExpiry says when the next of those credentials ends that depend on the
	// connection, zero for none. The node tries more often as that comes
	// near. Nil: never.
	NextExpiry func() time.Time

	// Dial opens a connection to an address; nil is TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Lookup returns the IP addresses of a host. Nil is that of the system, or
	// none if there is a Dial.
	Lookup func(ctx context.Context, host string) ([]string, error)
	Now    func() time.Time // nil is time.Now
	Log    *slog.Logger     // nil is silent

	Traces *telemetry.Traces // nil: none
}

// Status says how the node is.
type Status struct {
	ID        spiffeid.ID // zero until attested
	ExpiresAt time.Time   // of the node's SVID
	Connected bool        // to a server
	Server    string      // host:port of the server that it is connected to, else of the last
	LastError error       // why it is not connected, or why the last renewal failed; else nil
}

// Node is this node's identity and connection. Make one with [Open]; all
// methods may be called concurrently.
type Node struct {
	o        Options
	dir      *dir
	denials  chan denial   // at most one waits; more say nothing new
	bundled  chan struct{} // the bundle changed; at most one waits
	moves    chan string   // a server to go to; at most one waits
	watchers sync.WaitGroup

	// Run's own.
	stay, left string    // addresses of the server to stay with, or to try last
	renewals   Backoff   // of asking for the next SVID
	renewAgain time.Time // when to ask the next server; zero: when it is time

	mu      sync.Mutex
	svid    *svid         // nil until attested
	last    spiffeid.ID   // of the latest valid SVID; zero if there was none
	trust   *trust        // nil until there is a bundle
	link    *Link         // the latest; may be broken; nil if none yet
	changed chan struct{} // closed and replaced when link is
	downAt  time.Time     // when there was last a working link, or Run began
	lastErr error
	closed  bool
	servers []string // that the server told of
	arrival int64    // of the last of them to come; 0 if it is not known
}

// trust is a bundle with the form that verification wants. It does not change
// once it is shared.
type trust struct {
	bundle   *bundle.Bundle
	x509     *x509bundle.Bundle
	disowned []*x509.Certificate // were in earlier bundles and left before their end
}

func newTrust(b *bundle.Bundle) *trust {
	x := x509bundle.New(b.TrustDomain)
	for _, a := range b.X509Authorities {
		x.AddX509Authority(a.Certificate)
	}
	return &trust{bundle: b, x509: x}
}

// denial is the server's word, on a link, that the agent may not go on.
type denial struct {
	link   *Link
	reason types.PermissionDeniedDetails_Reason
	err    error
}

// Open reads the identity and the bundle from the data directory, if they are
// there. It fails if another agent uses the directory, if what it holds is
// damaged or of another trust domain, or if there is no way to an identity. It
// does not speak to the server. Close it if [Node.Run] is not called.
func Open(o Options) (*Node, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Dial == nil {
		o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}
		if o.Lookup == nil {
			o.Lookup = net.DefaultResolver.LookupHost
		}
	}
	if err := o.validate(); err != nil {
		return nil, err
	}
	d := &dir{}
	if !o.InMemory {
		var err error
		if d, err = openDir(o.Dir); err != nil {
			return nil, err
		}
	}
	n := &Node{
		o: o, dir: d,
		denials: make(chan denial, 1), bundled: make(chan struct{}, 1), moves: make(chan string, 1),
		changed: make(chan struct{}), downAt: o.Now(),
	}
	if err := n.load(); err != nil {
		d.close()
		return nil, err
	}
	return n, nil
}

func (o *Options) validate() error {
	var ways []string
	if o.TrustBundle != nil {
		ways = append(ways, "a trust bundle")
		if o.TrustBundle.TrustDomain != o.TrustDomain {
			return fmt.Errorf("trust bundle is of %q, not of the trust domain %q", o.TrustBundle.TrustDomain.Name(), o.TrustDomain.Name())
		}
	}
	if o.Join != nil {
		ways = append(ways, "a join string")
		if o.Join.TrustDomain != o.TrustDomain {
			return fmt.Errorf("join string is for trust domain %q, not %q", o.Join.TrustDomain.Name(), o.TrustDomain.Name())
		}
	}
	if o.Insecure {
		ways = append(ways, "insecure bootstrap")
	}
	if len(ways) > 1 {
		return fmt.Errorf("%s exclude each other; choose one way to trust the server", strings.Join(ways, " and "))
	}
	for _, address := range append([]string{o.Server}, o.OtherServers...) {
		if err := CheckAddress(address); err != nil {
			return fmt.Errorf("server: %w", err)
		}
	}
	if o.InMemory && o.Dir != "" {
		return errors.New("a node that is kept in memory has no data directory")
	}
	return nil
}

// load takes over what is on disk and checks that there is a way forward.
func (n *Node) load() error {
	if err := n.loadServers(); err != nil {
		return err
	}
	b, err := n.dir.loadBundle(n.o.TrustDomain)
	if err != nil {
		return err
	}
	if b != nil {
		n.trust = newTrust(b)
		if n.trust.disowned, err = n.dir.loadDisowned(); err != nil {
			return err
		}
	}
	s, err := n.dir.loadSVID(n.o.TrustDomain, n.o.TPM)
	if err != nil {
		return err
	}
	settled := true
	if s != nil {
		if settled, err = n.checkKey(s, filepath.Join(n.o.Dir, svidFile)); err != nil {
			return err
		}
	}
	switch now := n.o.Now(); {
	case s == nil:
	case b == nil:
		n.o.Log.Warn("data directory holds an identity but no bundle; attesting again", "dir", n.o.Dir, "agent_id", s.id)
	case !now.Before(s.expiresAt):
		n.o.Log.Warn("identity on disk has expired; attesting again", "agent_id", s.id, "expired_at", s.expiresAt)
		if n.spent(s.id) || n.o.Attestor == nil {
			return fmt.Errorf("identity of %s expired at %s, and its proof cannot be given again; %s", s.id, s.expiresAt.UTC().Format(time.RFC3339), n.remedy())
		}
	default:
		s.renewAt = renewalTime(s.leaf().NotBefore, s.expiresAt)
		if !settled {
			n.o.Log.Info("the node's key is to move into the TPM; renewing the identity", "agent_id", s.id)
			s.renewAt = now
		}
		n.svid, n.last = s, s.id
		n.o.Log.Info("identity loaded", "agent_id", s.id, "expires_at", s.expiresAt)
	}
	if n.svid == nil && n.o.Attestor == nil {
		return fmt.Errorf("node has no identity yet and nothing to prove itself with; %s", n.remedy())
	}
	if n.trust == nil && n.o.TrustBundle == nil && n.o.Join == nil && !n.o.Insecure {
		return errors.New(`node has no reason to trust the server; start it with a join string from "hallmark token generate", or with a trust bundle`)
	}
	return nil
}

// remedy tells the operator how this node can get an identity.
func (n *Node) remedy() string {
	if a := n.o.Attestor; a != nil && a.Spent == nil {
		return fmt.Sprintf("see the server's log for why %s attestation failed", a.Name)
	}
	return `make a new join token with "hallmark token generate" and start the agent with it`
}

// spent reports whether the configured proof is the one that id was admitted by,
// and cannot be given again.
func (n *Node) spent(id spiffeid.ID) bool {
	a := n.o.Attestor
	return a != nil && a.Spent != nil && !id.IsZero() && a.Spent(id)
}

// Close gives the data directory free. [Node.Run] does it when it returns.
func (n *Node) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	return n.dir.close()
}

// Run attests the node if it must, connects it, and renews its SVID, until ctx
// ends. It outlives any absence of the server. It returns an error other than
// ctx's when the node cannot have an identity without its operator; the error
// says what to do.
func (n *Node) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer n.Close()
	defer n.watchers.Wait()
	defer n.publish(nil)
	defer cancel()

	var backoff Backoff
	for ctx.Err() == nil {
		err := n.step(ctx, &backoff)
		var fatal *fatalError
		switch {
		case ctx.Err() != nil:
		case errors.As(err, &fatal):
			if errors.Is(err, ErrBanned) {
				n.forget()
			}
			return fatal.err
		case err != nil:
			n.fail("not connected to the server; trying again", err)
			if err := sleep(ctx, min(backoff.Next(), n.patience())); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// patience bounds the wait for the next attempt to connect: an eighth of what
// is left of the credential that ends next, so that there are several attempts
// however short its life is.
func (n *Node) patience() time.Duration {
	if n.o.NextExpiry == nil {
		return backoffMax
	}
	left := n.o.NextExpiry().Sub(n.o.Now())
	if left <= 0 { // nothing is held, or it is too late
		return backoffMax
	}
	bound := max(left/8, firstRetryMax)
	return between(bound/2, bound)
}

// step brings the node from where it is to a working link and stays there
// until the link must be replaced. A link that lasted ends the backoff.
func (n *Node) step(ctx context.Context, backoff *Backoff) error {
	s := n.identity()
	if s == nil || !n.o.Now().Before(s.expiresAt) {
		if err := n.attest(ctx); err != nil {
			return err
		}
		s = n.identity()
	}
	link, err := n.connect(ctx, s)
	if errors.Is(err, errStranger) && n.mayStartAnew() {
		n.o.Log.Warn("nobody whom this node knows vouches for the server; starting anew from what was configured", "error", err)
		if err := n.attest(ctx); err != nil {
			return err
		}
		s = n.identity()
		link, err = n.connect(ctx, s)
	}
	if err != nil {
		return err
	}
	n.publish(link)
	n.o.Log.Info("connected to the server", "server", link.to.String(), "agent_id", s.id)
	since := n.o.Now()
	if err = n.tend(ctx, link); err != nil {
		n.leave(link)
	}
	if n.o.Now().Sub(since) >= stableAfter {
		backoff.Reset()
	}
	return err
}

// mayStartAnew reports whether the configuration gives the node a reason to
// trust a server, and proof of itself, that do not come from an earlier life. A
// node that was away while all authorities were replaced has no other way.
func (n *Node) mayStartAnew() bool {
	return n.o.Attestor != nil && (n.o.TrustBundle != nil || n.o.Join != nil) && !n.spent(n.lastID())
}

// tend looks after a link and its SVID. It returns nil when the node has an
// SVID that is not this link's, or none that is valid.
func (n *Node) tend(ctx context.Context, link *Link) error {
	renewAt := link.svid.renewAt
	if n.renewAgain.IsZero() {
		n.renewals.Reset()
	} else {
		renewAt = n.renewAgain
	}
	if n.tainted(link.svid) && !link.svid.tainted {
		renewAt = n.o.Now()
	}
	for {
		timer := time.NewTimer(min(renewAt.Sub(n.o.Now()), clockCheck))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()

		case <-link.done:
			timer.Stop()
			return fmt.Errorf("connection to the server broke: %w", link.cause)

		case <-n.bundled:
			timer.Stop()
			n.saveBundle()
			if err := n.vouched(link); err != nil {
				link.finish(err)
				return err
			}
			if n.tainted(link.svid) && !link.svid.tainted {
				n.o.Log.Warn("authority that signed the node's SVID is tainted or revoked; renewing", "agent_id", link.svid.id)
				renewAt = n.o.Now()
			}

		case to := <-n.moves:
			timer.Stop()
			if to == link.to.name || to == link.to.address {
				break
			}
			n.o.Log.Info("going to a server that has come", "server", to)
			n.stay = to
			return nil

		case d := <-n.denials:
			timer.Stop()
			if d.link != link {
				break // about an identity that is no longer in use
			}
			return n.denied(d)

		case <-timer.C:
			now := n.o.Now()
			if now.Before(renewAt) {
				break
			}
			if !now.Before(link.svid.expiresAt) {
				n.publish(nil)
				return nil // step attests
			}
			s, err := n.next(ctx, link)
			if errors.Is(err, ErrBanned) {
				return err
			}
			if reason, ok := denialReason(err); ok {
				return n.denied(denial{link, reason, err})
			}
			if err != nil {
				n.fail("could not renew the node's SVID; trying again", err)
				renewAt = now.Add(n.renewals.Next())
				if n.several(link) { // it may be cut off from the others, which can
					n.renewAgain = renewAt
					link.finish(err)
					return err
				}
				break
			}
			n.adopt(s)
			return nil
		}
	}
}

// denied acts on the server's word that the agent may not go on as it is.
func (n *Node) denied(d denial) error {
	if d.reason == types.PermissionDeniedDetails_AGENT_BANNED {
		return &fatalError{ErrBanned}
	}
	if n.o.Attestor == nil || n.spent(d.link.svid.id) {
		return &fatalError{fmt.Errorf("server does not accept the identity of %s any more (%s: %s), and its proof cannot be given again; %s", d.link.svid.id, d.reason, serverWords(d.err), n.remedy())}
	}
	if d.reason != types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
		n.publish(nil) // no call on it would succeed
	}
	n.mu.Lock()
	n.svid = nil
	n.mu.Unlock()
	return fmt.Errorf("server does not accept the identity of %s any more (%s: %s); attesting again", d.link.svid.id, d.reason, serverWords(d.err))
}

// adopt makes an SVID the node's own, on disk before it is first presented:
// the server lets go of the former one when it sees the new one.
func (n *Node) adopt(s *svid) {
	s.tainted = n.tainted(s)
	s.renewAt = renewalTime(n.o.Now(), s.expiresAt)
	if s.tainted {
		s.renewAt = n.o.Now().Add(taintedRetry)
	}
	if err := n.dir.saveSVID(s); err != nil {
		n.o.Log.Error("could not save the node's identity; after a restart the node must attest again", "error", err)
	}
	n.renewAgain = time.Time{}
	n.mu.Lock()
	n.svid, n.last = s, s.id
	n.lastErr = nil
	n.mu.Unlock()
	n.o.Log.Info("node has a new SVID", "agent_id", s.id, "expires_at", s.expiresAt)
}

// forget drops the identity, in memory and on disk.
func (n *Node) forget() {
	n.publish(nil)
	n.mu.Lock()
	n.svid = nil
	n.mu.Unlock()
	if err := n.dir.removeSVID(); err != nil {
		n.o.Log.Error("could not remove the node's identity", "error", err)
	}
}

// fail records why something did not work that will be tried again.
func (n *Node) fail(what string, err error) {
	n.mu.Lock()
	repeated := n.lastErr != nil && n.lastErr.Error() == err.Error()
	n.lastErr = err
	server := n.o.Server
	if n.link != nil {
		server = n.link.to.name
	}
	n.mu.Unlock()
	level := slog.LevelWarn
	if repeated {
		level = slog.LevelDebug
	}
	n.o.Log.Log(context.Background(), level, what, "server", server, "error", err)
}

func (n *Node) identity() *svid {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.svid
}

func (n *Node) lastID() spiffeid.ID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last
}

func (n *Node) trusted() *trust {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.trust
}

// Status says how the node is.
func (n *Node) Status() Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := Status{Connected: n.link.alive(), LastError: n.lastErr}
	if n.link != nil {
		s.Server = n.link.to.name
	}
	if n.svid != nil {
		s.ID, s.ExpiresAt = n.svid.id, n.svid.expiresAt
	}
	return s
}

// SetBundle tells the node its own trust domain's bundle, as the feed has it:
// it decides which server the next connection trusts, and goes to disk. A
// bundle of another trust domain, or one without X.509 authorities, which would
// shut the server out for good, is refused.
func (n *Node) SetBundle(b *bundle.Bundle) error {
	switch {
	case b.TrustDomain != n.o.TrustDomain:
		return fmt.Errorf("bundle of %q is not the node's own", b.TrustDomain.Name())
	case len(b.X509Authorities) == 0:
		return fmt.Errorf("bundle of %q has no X.509 authority", b.TrustDomain.Name())
	}
	n.mu.Lock()
	n.trust = newTrust(b).after(n.trust, n.o.Now())
	n.mu.Unlock()
	select {
	case n.bundled <- struct{}{}:
	default:
	}
	return nil
}

func (n *Node) saveBundle() {
	t := n.trusted()
	err := n.dir.saveDisowned(t.disowned) // first: what is in the bundle is not disowned by it
	if err == nil {
		err = n.dir.saveBundle(t.bundle)
	}
	if err != nil {
		n.o.Log.Error("could not save the bundle", "error", err)
	}
}

// renewalTime is half of the way from one time to another, give or take a tenth
// of the whole, so that agents that attested together do not renew together.
func renewalTime(from, to time.Time) time.Time {
	life := to.Sub(from)
	return from.Add(time.Duration((0.4 + 0.2*rand.Float64()) * float64(life)))
}

// fatalError is one that trying again does not mend.
type fatalError struct{ err error }

func (e *fatalError) Error() string { return e.err.Error() }
func (e *fatalError) Unwrap() error { return e.err }
