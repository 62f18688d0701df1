// Package authority keeps the signing keys of a server: its X.509 authorities,
// which sign X509-SVIDs, its JWT authorities, which sign JWT-SVIDs, and, if it
// is told to, its WIT authorities, which sign WIT-SVIDs, and a second kind of
// JWT authority for relying parties that take nothing but RS256.
//
// Of each kind a server has one active authority, which signs; at times one
// that is prepared to follow it, which is in the bundle already so that every
// verifier knows it when it begins to sign; and old ones, which sign no more
// but stay in the bundle until all they signed has expired. An old one that is
// not to be trusted any longer is tainted, which makes everyone replace what it
// signed, and then revoked, which takes it out of the bundle. The private keys
// are in a key manager, one authority one key; the rest is in the registry,
// changed together with the bundle.
//
// [Open] finds the authorities of an earlier run again, or makes the first;
// [Authorities.Run] keeps them current. [Authorities.X509],
// [Authorities.JWT], [Authorities.JWTRS256] and [Authorities.WIT] say what to sign with; they are cheap
// enough to call for each signature.
package authority

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/server/registry"
)

// ErrUnavailable says that there is no authority to sign with: none was made
// yet, or the active one has expired and the next is being made. Try again.
var ErrUnavailable = errors.New("no signing authority is available yet; try again")

// X509 is an X.509 authority that signs. It is immutable; as long as the same
// authority is active, the same pointer is handed out.
type X509 struct {
	ID          string              // subject key ID, in hex
	Certificate *x509.Certificate   // its own
	Chain       []*x509.Certificate // what follows a leaf: itself and what signed it, without the root; empty when self-signed
	Signer      crypto.Signer
	Remote      bool // the key is not in this process: verify what it signs
}

// Validity returns the time in which everything that the authority signs has
// to lie: that in which it and its chain are valid.
func (x *X509) Validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = x.Certificate.NotBefore, x.Certificate.NotAfter
	for _, c := range x.Chain {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// JWT is an authority that signs JWTs: JWT-SVIDs or WIT-SVIDs. It is immutable;
// as long as the same authority is active, the same pointer is handed out.
type JWT struct {
	ID        string // the kid
	Signer    crypto.Signer
	Algorithm jose.SignatureAlgorithm
	ExpiresAt time.Time
	Remote    bool // the key is not in this process: verify what it signs
}

// DefaultLifetime of an authority.
const DefaultLifetime = 24 * time.Hour

// Bounds of an authority's lifetime. Times in certificates and tokens are
// whole seconds; a shorter life leaves no time to spread the next authority.
// Certificates cannot name a year after 9999.
const (
	MinLifetime = 10 * time.Second
	MaxLifetime = 100 * 365 * 24 * time.Hour
)

// Options are what [Open] needs.
type Options struct {
	Registry *registry.Registry
	// Keys should implement [apiv1.KeyDeleter], or used keys stay. If it has a
	// method Keys as those of package kms do, keys that no authority has are deleted, too.
	Keys        apiv1.KeyManager
	TrustDomain spiffeid.TrustDomain
	Server      string // this server's name: several may share a registry

	X509Lifetime time.Duration // 0: DefaultLifetime
	JWTLifetime  time.Duration // 0: DefaultLifetime
	X509KeyType  KeyType       // of authorities made from now on
	JWTKeyType   KeyType

	WIT         bool          // have WIT authorities too; else those of an earlier run go
	WITLifetime time.Duration // 0: DefaultLifetime
	WITKeyType  KeyType

	// JWTRS256 has authorities of JWTs with RSA keys besides those of JWTKeyType,
	// with the same lifetime. Without it, those of an earlier run sign no more, and
	// stay in the bundle until they expire.
	JWTRS256 bool

	Upstream Upstream // signs the X.509 authorities; nil: each is its own root
	// Counts, if it is set, is called with each outcome of what the upstream is
	// asked for: sign, bundle or publish.
	Counts func(what string, err error)

	Publication Publication      // nil: nobody verifies by what is published elsewhere
	Now         func() time.Time // nil: time.Now
	Log         *slog.Logger     // nil: none
}

// Authorities are the authorities of one server.
type Authorities struct {
	registry *registry.Registry
	keys     apiv1.KeyManager
	td       spiffeid.TrustDomain
	server   string
	kinds    []registry.AuthorityKind // that it has
	plans    map[registry.AuthorityKind]plan
	certify  certify
	upstream Upstream // nil: none
	asked    requests // of the upstream

	publication Publication                       // nil: none
	holding     map[registry.AuthorityKind]string // IDs of those that are known to wait for it; under lock

	now func() time.Time
	log *slog.Logger

	x509 atomic.Pointer[X509] // active; nil before the first
	jwt  atomic.Pointer[JWT]
	wit  atomic.Pointer[JWT]
	rsa  atomic.Pointer[JWT] // of JWTRS256

	following sync.Mutex // what the upstream says is read and applied in turn

	wake chan struct{} // a signature found no authority to sign with

	lock      chan struct{}                  // holds one token: one change at a time
	signers   map[string]crypto.Signer       // by key name; of own prepared and active ones; under lock
	recorded  map[string]bool                // key names of own authorities, as of the last look; under lock
	spare     map[registry.AuthorityKind]key // keys of authorities that were not published; under lock
	collectAt time.Time                      // when to look for keys that no authority has; under lock
	roots     []*x509.Certificate            // that the upstream named last; nil: none yet; under lock
}

// plan is how authorities of one kind are made.
type plan struct {
	lifetime time.Duration
	keyType  KeyType
}

// Open finds the authorities of this server again whose keys the key manager
// still has, and makes and activates one of each kind where there is none that
// can sign. With an upstream that fails, they are made as soon as it does not.
// The registry must be running. Authorities whose keys are gone stay
// in the bundle, as old ones, until they expire.
func Open(ctx context.Context, o Options) (*Authorities, error) {
	if o.Server == "" || strings.Contains(o.Server, "/") {
		return nil, fmt.Errorf("open authorities: %q is not the name of a server; it is not empty and has no slash", o.Server)
	}
	for _, t := range []KeyType{o.X509KeyType, o.JWTKeyType, o.WITKeyType} {
		if t < 0 || int(t) >= len(keyTypes) {
			return nil, fmt.Errorf("open authorities: there is no key type %d", int(t))
		}
	}
	a := &Authorities{
		registry: o.Registry,
		keys:     o.Keys,
		td:       o.TrustDomain,
		server:   o.Server,
		kinds:    []registry.AuthorityKind{registry.X509, registry.JWT},
		plans: map[registry.AuthorityKind]plan{
			registry.X509: {cmp.Or(o.X509Lifetime, DefaultLifetime), o.X509KeyType},
			registry.JWT:  {cmp.Or(o.JWTLifetime, DefaultLifetime), o.JWTKeyType},
		},
		certify:     selfSigned,
		upstream:    o.Upstream,
		publication: o.Publication,
		holding:     make(map[registry.AuthorityKind]string),
		now:         o.Now,
		log:         o.Log,
		wake:        make(chan struct{}, 1),
		lock:        make(chan struct{}, 1),
		signers:     make(map[string]crypto.Signer),
		spare:       make(map[registry.AuthorityKind]key),
	}
	if a.upstream != nil {
		a.certify = a.certified
	}
	a.asked.counts = o.Counts
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if o.WIT {
		a.kinds = append(a.kinds, registry.WIT)
		a.plans[registry.WIT] = plan{cmp.Or(o.WITLifetime, DefaultLifetime), o.WITKeyType}
	}
	if o.JWTRS256 {
		a.kinds = append(a.kinds, registry.JWTRS256)
		a.plans[registry.JWTRS256] = plan{cmp.Or(o.JWTLifetime, DefaultLifetime), RSA2048}
	}
	for kind, p := range a.plans {
		if p.lifetime < MinLifetime || p.lifetime > MaxLifetime {
			return nil, fmt.Errorf("open authorities: the lifetime of %s authorities is %s; it is at least %s and at most %s", kind, p.lifetime, MinLifetime, MaxLifetime)
		}
	}
	if !o.WIT {
		if err := a.abandon(ctx, registry.WIT); err != nil {
			return nil, fmt.Errorf("open authorities: %w", err)
		}
	}
	if _, err := a.Rotate(ctx); err != nil {
		return nil, fmt.Errorf("open authorities: %w", err)
	}
	return a, nil
}

// X509 returns the active X.509 authority, or [ErrUnavailable].
func (a *Authorities) X509() (*X509, error) {
	if x := a.x509.Load(); x != nil {
		now := a.now()
		if notBefore, notAfter := x.Validity(); !now.Before(notBefore) && now.Before(notAfter) {
			return x, nil
		}
	}
	a.nudge()
	return nil, ErrUnavailable
}

// JWT returns the active JWT authority, or [ErrUnavailable].
func (a *Authorities) JWT() (*JWT, error) { return a.token(&a.jwt) }

// JWTRS256 returns the active authority of JWTs that are signed with RS256, or
// [ErrUnavailable].
func (a *Authorities) JWTRS256() (*JWT, error) { return a.token(&a.rsa) }

// WIT returns the active WIT authority, or [ErrUnavailable].
func (a *Authorities) WIT() (*JWT, error) { return a.token(&a.wit) }

func (a *Authorities) token(active *atomic.Pointer[JWT]) (*JWT, error) {
	if j := active.Load(); j != nil && a.now().Before(j.ExpiresAt) {
		return j, nil
	}
	a.nudge()
	return nil, ErrUnavailable
}

// Kinds returns the kinds of authority that this server has. Do not change it.
func (a *Authorities) Kinds() []registry.AuthorityKind { return a.kinds }

// nudge makes Run look at once.
func (a *Authorities) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// State returns this server's authorities of a kind, as they are in the
// registry: the active and the prepared one (nil: none), and the old ones, the
// newest first.
func (a *Authorities) State(kind registry.AuthorityKind) (active, prepared *registry.Authority, old []*registry.Authority) {
	return a.state(kind, a.registry.View().Authorities())
}

func (a *Authorities) state(kind registry.AuthorityKind, all []*registry.Authority) (active, prepared *registry.Authority, old []*registry.Authority) {
	for _, r := range all {
		if r.Server != a.server || r.Kind != kind {
			continue
		}
		switch r.State {
		case registry.Active:
			active = r
		case registry.Prepared:
			prepared = r
		case registry.Old:
			old = append(old, r)
		}
	}
	slices.Reverse(old)
	return active, prepared, old
}

const (
	// maxWait bounds how long Run sleeps: its timer stands still while the
	// machine sleeps, the authorities' ends do not.
	maxWait = time.Minute
	// retryWait is how long Run waits after a failure.
	retryWait = 5 * time.Second
)

// Run prepares, activates and prunes authorities on schedule, and follows the
// upstream, until the
// context ends. It always returns an error, the context's.
func (a *Authorities) Run(ctx context.Context) error {
	running, ctx := errgroup.WithContext(ctx)
	running.Go(func() error { return a.runRotate(ctx) })
	if _, ok := a.upstream.(Follower); ok {
		running.Go(func() error { return a.runFollow(ctx) })
	}
	return running.Wait()
}

func (a *Authorities) runRotate(ctx context.Context) error {
	for {
		next, err := a.Rotate(ctx)
		wake := a.wake
		wait := min(next.Sub(a.now()), maxWait)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			a.log.Error("cannot rotate the signing authorities; will try again", "error", err, "in", retryWait)
			wait, wake = retryWait, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		case <-wake:
			timer.Stop()
		}
	}
}

// KeysAvailable returns why the key manager cannot be used now, or nil. It does
// not wait.
func (a *Authorities) KeysAvailable() error {
	if k, ok := a.keys.(interface{ Available() error }); ok {
		return k.Available()
	}
	return nil
}
