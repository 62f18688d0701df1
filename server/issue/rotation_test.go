package issue_test

import (
	"context"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

// issued is an SVID that is still valid.
type issued struct {
	x509  []*x509.Certificate // or
	token string
	wit   bool // the token is a WIT-SVID

	at      time.Time
	expires time.Time
}

// verify checks an SVID against a bundle, as a verifier would at a time.
func (s issued) verify(b *bundle.Bundle, now time.Time) error {
	if s.token == "" {
		var roots []*x509.Certificate
		for _, a := range b.X509Authorities {
			roots = append(roots, a.Certificate)
		}
		_, _, err := x509svid.Verify(s.x509, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(now))
		return err
	}
	token, err := jwt.ParseSigned(s.token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return err
	}
	key := b.JWTKey(token.Headers[0].KeyID)
	if s.wit {
		key = b.WITKey(token.Headers[0].KeyID)
	}
	if key == nil {
		return fmt.Errorf("the bundle has no key %q", token.Headers[0].KeyID)
	}
	var claims jwt.Claims
	if err := token.Claims(key, &claims); err != nil {
		return err
	}
	expected := jwt.Expected{Time: now}
	if !s.wit {
		expected.AnyAudience = jwt.Audience{"a"}
	}
	return claims.ValidateWithLeeway(expected, 0)
}

// trial is a server with a clock, and all its SVIDs that are still valid.
type trial struct {
	tb       testing.TB
	ctx      context.Context
	random   *rand.Rand
	clock    *clock
	registry *registry.Registry
	keys     apiv1.KeyManager

	authorities *authority.Authorities
	issuer      *issue.Issuer
	entry       *entry.Entry
	csr         []byte
	witKey      issue.WITKey
	valid       []issued
	signedBy    map[string]bool // X.509 authorities, by key ID
}

func newTrial(tb testing.TB) *trial {
	tb.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("ROTATION_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Logf("ROTATION_SEED=%d", seed)
	db, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &trial{
		tb: tb, ctx: ctx, random: rand.New(rand.NewPCG(seed, 0)), clock: &clock{t: start}, keys: authority.NewMemoryKeys(),
		entry: workload(tb), csr: newCSR(tb, nil),
		witKey: newWITKey(tb, newKey(tb, elliptic.P256()), "ES256"), signedBy: make(map[string]bool),
	}
	if x.registry, err = registry.Open(ctx, registry.Options{Store: db, TrustDomain: td, Now: x.clock.now}); err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.registry.Run(ctx)
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
		if err := db.Close(); err != nil {
			tb.Error(err)
		}
	})
	x.start()
	return x
}

// start starts the server, at first or again.
func (x *trial) start() {
	x.tb.Helper()
	var err error
	x.authorities, err = authority.Open(x.ctx, authority.Options{
		Registry: x.registry, Keys: x.keys, TrustDomain: td, Server: "server-1",
		X509Lifetime: 24 * time.Hour, JWTLifetime: 6 * time.Hour, WIT: true, WITLifetime: 9 * time.Hour, Now: x.clock.now,
	})
	if err != nil {
		x.tb.Fatal(err)
	}
	x.issuer = issue.New(issue.Options{TrustDomain: td, Authorities: x.authorities, Now: x.clock.now})
}

// rotate does what is due; after that there is something to sign with.
func (x *trial) rotate() {
	x.tb.Helper()
	next, err := x.authorities.Rotate(x.ctx)
	if err != nil {
		x.tb.Fatal(err)
	}
	if now := x.clock.now(); !next.After(now) {
		x.tb.Fatalf("at %s the next step was due at %s already", now, next)
	}
	if _, err := x.authorities.X509(); err != nil {
		x.tb.Fatalf("after rotation: %v", err)
	}
	if _, err := x.authorities.JWT(); err != nil {
		x.tb.Fatalf("after rotation: %v", err)
	}
	if _, err := x.authorities.WIT(); err != nil {
		x.tb.Fatalf("after rotation: %v", err)
	}
}

func (x *trial) bundle() *bundle.Bundle { return x.registry.View().Bundle(td) }

// issue issues an SVID of each kind, of some lifetime, and verifies it against
// a bundle that verifiers hold.
func (x *trial) issue(held *bundle.Bundle) {
	x.tb.Helper()
	x.entry.X509SVIDTTL = time.Duration(1+x.random.IntN(3*3600)) * time.Second
	x.entry.JWTSVIDTTL = time.Duration(1+x.random.IntN(3600)) * time.Second
	now := x.clock.now()
	switch svid, err := x.issuer.WorkloadX509(x.ctx, x.entry, x.csr); {
	case err == nil:
		cert := parse(x.tb, svid.Chain[0])
		x.signedBy[string(cert.AuthorityKeyId)] = true
		x.keep(issued{x509: []*x509.Certificate{cert}, at: now, expires: svid.ExpiresAt}, held)
	case !errors.Is(err, authority.ErrUnavailable):
		x.tb.Fatal(err)
	}
	switch svid, err := x.issuer.WorkloadJWT(x.ctx, x.entry, []string{"a"}); {
	case err == nil:
		x.keep(issued{token: svid.Token, at: now, expires: svid.ExpiresAt}, held)
	case !errors.Is(err, authority.ErrUnavailable):
		x.tb.Fatal(err)
	}
	switch svid, err := x.issuer.WorkloadWIT(x.ctx, x.entry, x.witKey); {
	case err == nil:
		x.keep(issued{token: svid.Token, wit: true, at: now, expires: svid.ExpiresAt}, held)
	case !errors.Is(err, authority.ErrUnavailable):
		x.tb.Fatal(err)
	}
}

func (x *trial) keep(s issued, held *bundle.Bundle) {
	x.tb.Helper()
	if err := s.verify(held, s.at); err != nil {
		x.tb.Fatalf("issued at %s: it does not verify against the bundle that verifiers hold: %v", s.at, err)
	}
	x.valid = append(x.valid, s)
}

// check verifies each SVID that is valid now against the bundle of now.
func (x *trial) check() {
	x.tb.Helper()
	now, current := x.clock.now(), x.bundle()
	still := x.valid[:0]
	for _, s := range x.valid {
		if !now.Before(s.expires) {
			continue
		}
		still = append(still, s)
		if err := s.verify(current, now); err != nil {
			x.tb.Fatalf("issued at %s, valid until %s: at %s it does not verify against the bundle: %v", s.at, s.expires, now, err)
		}
	}
	x.valid = still
	if n := len(current.X509Authorities) + len(current.JWTAuthorities) + len(current.WITAuthorities); n > 90 {
		x.tb.Fatalf("the bundle has grown to %d authorities", n)
	}
}

// Design §9.6: at every moment each valid SVID verifies against the bundle
// that its verifier holds. The clock goes through many lifetimes of the
// authorities in steps of any size, some of them over everything; now and then
// an administrator rotates, a server starts anew, or loses its keys.
func TestEveryValidSVIDVerifiesThroughAnyRotation(t *testing.T) {
	x := newTrial(t)
	for range 300 {
		// The server notices in time, or late, as when the machine has slept.
		switch p := x.random.IntN(100); {
		case p < 70:
			x.clock.add(time.Duration(x.random.IntN(40)) * time.Minute)
		case p < 97:
			x.clock.add(time.Duration(x.random.Int64N(int64(3 * time.Hour))))
		default:
			x.clock.add(time.Duration(x.random.Int64N(int64(100 * time.Hour))))
		}
		x.issue(x.bundle()) // before the server has noticed
		switch p := x.random.IntN(100); {
		case p < 3:
			x.start()
		case p < 4:
			x.keys = authority.NewMemoryKeys()
			x.start()
		case p < 8:
			kind := []registry.AuthorityKind{registry.X509, registry.JWT}[x.random.IntN(2)]
			next, err := x.authorities.Prepare(x.ctx, kind)
			if err != nil {
				t.Fatal(err)
			}
			x.issue(x.bundle())
			if x.random.IntN(2) == 0 {
				if _, err := x.authorities.Activate(x.ctx, kind, next.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
		x.rotate()
		x.issue(x.bundle())
		x.check()
	}
	if len(x.signedBy) < 12 {
		t.Errorf("only %d X.509 authorities have signed: too few to show anything", len(x.signedBy))
	}
}

// When nothing goes wrong, a verifier's bundle may be out of date by nearly a
// third of an authority's life: here nearly two hours, for the JWT authorities.
func TestVerifiersWhoseBundleIsOutOfDateAcceptEverySVID_JW04(t *testing.T) {
	x := newTrial(t)
	const behind = 110 * time.Minute
	type held struct {
		at     time.Time
		bundle *bundle.Bundle
	}
	history := []held{{x.clock.now(), x.bundle()}}
	for range 400 {
		x.clock.add(time.Duration(x.random.Int64N(int64(10 * time.Minute))))
		x.rotate()
		now := x.clock.now()
		history = append(history, held{now, x.bundle()})
		for len(history) > 1 && !history[1].at.After(now.Add(-behind)) {
			history = history[1:]
		}
		x.issue(history[0].bundle)
		x.check()
	}
	if len(x.signedBy) < 2 {
		t.Errorf("only %d X.509 authorities have signed: too few to show anything", len(x.signedBy))
	}
}
