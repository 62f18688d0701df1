package authority

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Upstream is the authority above a server's X.509 authorities: it signs them
// in place of themselves. Nothing that it returns is believed before it was
// verified.
type Upstream interface {
	// Name returns the kind of upstream, as the configuration has it, and what or
	// where it is, for people.
	Name() (kind, address string)
	// Sign certifies the key of a signing request as an authority's, for a
	// lifetime that it may shorten. It returns the new certificate followed by
	// those between it and the roots, and the roots to publish.
	Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error)
}

// Follower is an upstream that can tell at any time what is to be trusted.
type Follower interface {
	// Bundle returns the authorities to publish besides the server's own. If they
	// are the whole trust domain's, what they lack is trusted no longer; else a
	// root that they lack stays as long as anything leads to it.
	Bundle(context.Context) (b *bundle.Bundle, whole bool, err error)
}

// Publisher is an upstream that publishes the JWT and WIT authorities of the
// servers below it to the whole trust domain.
type Publisher interface {
	Publish(ctx context.Context, kind registry.AuthorityKind, key bundle.JWTAuthority) error
}

// What an upstream is asked for.
const (
	askSign    = "sign"
	askBundle  = "bundle"
	askPublish = "publish"
)

const (
	// upstreamTime bounds a question to an upstream.
	upstreamTime = 30 * time.Second
	// After a failure the upstream is asked again, soon and then ever later.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// followEvery is how often an upstream is asked what is to be trusted, or more
	// often where authorities live shortly: followPart of their lifetimes.
	followEvery = 5 * time.Second
	followPart  = 100
	minFollow   = 200 * time.Millisecond
)

// UpstreamRequest is how one thing that the upstream is asked for is doing.
type UpstreamRequest struct {
	What         string    // sign, bundle or publish
	SucceededAt  time.Time // zero: not since the start
	Failure      error     // of the last try; nil: it succeeded
	FailingSince time.Time
	NextTry      time.Time

	wait time.Duration
}

// requests is what an upstream was asked for.
type requests struct {
	sync.Mutex
	of     map[string]*UpstreamRequest
	counts func(what string, err error)
}

// outcome notes how a request ended, and returns when to try again after a
// failure.
func (r *requests) outcome(what string, now time.Time, err error) time.Time {
	r.Lock()
	defer r.Unlock()
	q := r.get(what)
	if r.counts != nil {
		r.counts(what, err)
	}
	if err == nil {
		*q = UpstreamRequest{What: what, SucceededAt: now}
		return time.Time{}
	}
	if q.Failure == nil {
		q.FailingSince = now
	}
	q.Failure = err
	q.wait = min(max(2*q.wait, firstRetry), lastRetry)
	q.NextTry = now.Add(q.wait/2 + mathrand.N(q.wait/2)) // many servers may have failed at once
	return q.NextTry
}

func (r *requests) get(what string) *UpstreamRequest {
	if r.of[what] == nil {
		if r.of == nil {
			r.of = make(map[string]*UpstreamRequest)
		}
		r.of[what] = &UpstreamRequest{What: what}
	}
	return r.of[what]
}

// next returns when a request that has failed is to be tried again; zero: now.
func (r *requests) next(what string) time.Time {
	r.Lock()
	defer r.Unlock()
	return r.get(what).NextTry
}

// UpstreamState says which upstream there is ("": none) and how what it is asked
// for is doing.
func (a *Authorities) UpstreamState() (kind, address string, asked []UpstreamRequest) {
	if a.upstream == nil {
		return "", "", nil
	}
	kind, address = a.upstream.Name()
	a.asked.Lock()
	defer a.asked.Unlock()
	for _, what := range []string{askSign, askPublish, askBundle} {
		if q := a.asked.of[what]; q != nil && (q.Failure != nil || !q.SucceededAt.IsZero()) {
			asked = append(asked, *q)
		}
	}
	return kind, address, asked
}

// UpstreamFailure returns the last failure of what the upstream was asked for
// and has not given since, or nil.
func (a *Authorities) UpstreamFailure() error {
	_, _, asked := a.UpstreamState()
	for _, q := range asked {
		if q.Failure != nil {
			return q.Failure
		}
	}
	return nil
}

// UpstreamError is a failure of the upstream's. The server goes on with what it
// has, and tries again.
type UpstreamError struct {
	what string
	err  error
}

func (e *UpstreamError) Error() string { return e.err.Error() }
func (e *UpstreamError) Unwrap() error { return e.err }

// ask asks the upstream, within a time, and notes how that ends.
func (a *Authorities) ask(ctx context.Context, what string, question func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	err := question(bounded)
	if err == nil {
		a.asked.outcome(what, a.now(), nil)
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err() // the server stops, or who asked has gone
	}
	kind, _ := a.upstream.Name()
	was := a.asked.failure(what)
	next := a.asked.outcome(what, a.now(), err)
	if was == nil || was.Error() != err.Error() {
		a.log.Warn("the upstream authority failed; the server goes on with what it has", "upstream", kind, "asked_to", what, "error", err, "next_try", next)
	}
	return &UpstreamError{what, fmt.Errorf("the upstream authority (%s): %w", kind, err)}
}

// failure returns the failure that a request had last.
func (r *requests) failure(what string) error {
	r.Lock()
	defer r.Unlock()
	return r.get(what).Failure
}

// certified is the certify of a server with an authority above it.
func (a *Authorities) certified(ctx context.Context, signer crypto.Signer, tmpl *x509.Certificate) (chain, roots []*x509.Certificate, err error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: tmpl.Subject, URIs: tmpl.URIs}, signer)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the request for its certificate: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, err
	}
	err = a.ask(ctx, askSign, func(ctx context.Context) error {
		chain, roots, err = a.upstream.Sign(ctx, csr, tmpl.NotAfter.Sub(a.now()).Round(time.Second))
		if err != nil {
			return err
		}
		if err := a.begun(ctx, chain); err != nil {
			return err
		}
		if chain, roots, err = verifyIssued(a.td, signer, chain, roots, a.now()); err != nil {
			return err
		}
		return a.acceptable(chain[0], roots)
	})
	if err != nil {
		return nil, nil, err
	}
	a.roots = roots
	return chain, roots, nil
}

// begun waits until a new certificate is valid, if that is a matter of clocks
// that differ a little.
func (a *Authorities) begun(ctx context.Context, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return nil // is found
	}
	wait := chain[0].NotBefore.Sub(a.now())
	if wait <= 0 || wait > clockSkew {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// acceptable checks what an upstream returned against what there is: it gets no
// other authority's key ID, and no other trust domain's root.
func (a *Authorities) acceptable(own *x509.Certificate, roots []*x509.Certificate) error {
	view, id := a.registry.View(), hex.EncodeToString(own.SubjectKeyId)
	for _, r := range view.Authorities() {
		if r.Kind == registry.X509 && r.ID == id && !sameKey(r.PublicKey, own.PublicKey) {
			return fmt.Errorf("the certificate that it returned has the subject key identifier of another authority, %s", id)
		}
	}
	b := &bundle.Bundle{}
	for _, root := range roots {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: root})
	}
	return a.notForeign(b)
}

// announce has the upstream publish a new JWT or WIT authority, before it is
// published here: others must be able to verify what it signs.
func (a *Authorities) announce(ctx context.Context, kind registry.AuthorityKind, key bundle.JWTAuthority) error {
	up, ok := a.upstream.(Publisher)
	if !ok {
		return nil
	}
	return a.ask(ctx, askPublish, func(ctx context.Context) error { return up.Publish(ctx, kind, key) })
}

// Forward has the upstream publish JWT and WIT authorities of a server below this
// one, if there is an upstream that does, and then calls keep with them, marked
// as the upstream's.
func (a *Authorities) Forward(ctx context.Context, kind registry.AuthorityKind, key bundle.JWTAuthority, keep func(bundle.JWTAuthority) error) error {
	if up, ok := a.upstream.(Publisher); ok {
		// Else a bundle that was read before, and is applied after, would lack it.
		a.following.Lock()
		defer a.following.Unlock()
		if err := a.ask(ctx, askPublish, func(ctx context.Context) error { return up.Publish(ctx, kind, key) }); err != nil {
			return err
		}
		key.Upstream = true
	}
	return keep(key)
}

// isOwnRoot reports whether an X.509 authority is self-signed: its own root.
func isOwnRoot(r *registry.Authority) bool {
	return len(r.Chain) > 0 && r.Chain[0].CheckSignatureFrom(r.Chain[0]) == nil
}

// misplaced reports whether an X.509 authority is its own root although there is
// an upstream, or the other way round: the configuration has changed.
func (a *Authorities) misplaced(r *registry.Authority) bool {
	return r != nil && r.Kind == registry.X509 && isOwnRoot(r) == (a.upstream != nil)
}

// leadsTo reports whether an authority's chain leads to a root.
func leadsTo(r *registry.Authority, root *x509.Certificate) bool {
	if r.Kind != registry.X509 || len(r.Chain) == 0 {
		return false
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, c := range r.Chain[1:] {
		between.AddCert(c)
	}
	_, err := r.Chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: r.CreatedAt, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err == nil
}

// needed reports whether anything that an authority in the registry signed may
// still lead to a root.
func needed(root *x509.Certificate, all []*registry.Authority, now time.Time) bool {
	return slices.ContainsFunc(all, func(r *registry.Authority) bool {
		return now.Before(r.ExpiresAt.Add(pruneAfter)) && leadsTo(r, root)
	})
}

// dropUnneeded takes roots of an upstream out of a bundle that the upstream has
// no longer and that nothing leads to.
func (a *Authorities) dropUnneeded(own *bundle.Bundle, all []*registry.Authority, now time.Time) {
	if a.upstream != nil && a.roots == nil {
		return // it has not said yet which it has
	}
	own.X509Authorities = slices.DeleteFunc(own.X509Authorities, func(x bundle.X509Authority) bool {
		return x.Upstream && !slices.ContainsFunc(a.roots, x.Certificate.Equal) && !needed(x.Certificate, all, now)
	})
}

// RootOf returns the root in a bundle that an X.509 authority leads to: one that
// is not tainted, if there is one. It is nil if there is none at all.
func RootOf(r *registry.Authority, own *bundle.Bundle) *x509.Certificate {
	var root *x509.Certificate
	for _, x := range own.X509Authorities {
		if leadsTo(r, x.Certificate) {
			if root = x.Certificate; !x.Tainted {
				break
			}
		}
	}
	return root
}

// TaintUpstream marks a root of the upstream's as tainted, named by its subject
// key ID in hex: agents replace what leads to it. It must be one that nothing
// which signs, or is about to, leads to: rotate first.
//
// Errors of the caller's are [registry.Error]s.
func (a *Authorities) TaintUpstream(ctx context.Context, id string) error {
	return a.changeRoot(ctx, id, "taint", func(own *bundle.Bundle, is func(bundle.X509Authority) bool) error {
		for i := range own.X509Authorities {
			if is(own.X509Authorities[i]) {
				own.X509Authorities[i].Tainted = true
			}
		}
		return nil
	})
}

// RevokeUpstream takes a tainted root of the upstream's out of the bundle: what
// leads to it verifies no more. The upstream must not have it any longer.
//
// Errors of the caller's are [registry.Error]s.
func (a *Authorities) RevokeUpstream(ctx context.Context, id string) error {
	return a.changeRoot(ctx, id, "revoke", func(own *bundle.Bundle, is func(bundle.X509Authority) bool) error {
		for _, x := range own.X509Authorities {
			if is(x) && !x.Tainted {
				return &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf(
					"unable to revoke upstream authority %s: it is not tainted; taint it first, so that what leads to it is replaced", id)}
			}
			if is(x) && slices.ContainsFunc(a.roots, x.Certificate.Equal) {
				return &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf(
					"unable to revoke upstream authority %s: the upstream still has it among its roots, and it would come back; take it out there first", id)}
			}
		}
		own.X509Authorities = slices.DeleteFunc(own.X509Authorities, is)
		return nil
	})
}

func (a *Authorities) changeRoot(ctx context.Context, id, verb string, change func(*bundle.Bundle, func(bundle.X509Authority) bool) error) error {
	refuse := func(kind registry.ErrorKind, format string, args ...any) error {
		return &registry.Error{Kind: kind, Msg: fmt.Sprintf(format, args...)}
	}
	id = strings.ToLower(id)
	_, follows := a.upstream.(Publisher)
	switch {
	case a.upstream == nil:
		return refuse(registry.FailedPrecondition, "this server has no upstream authority: its X.509 authorities are their own roots")
	case id == "":
		return refuse(registry.Invalid, "no subject key ID provided")
	case follows:
		return refuse(registry.FailedPrecondition, "unable to %s upstream authority %s: the roots are those of the server above; %s it there, and it is so here within seconds", verb, id, verb)
	}
	unlock, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		var none registry.AuthorityChange
		is := func(x bundle.X509Authority) bool {
			return x.Upstream && hex.EncodeToString(x.Certificate.SubjectKeyId) == id
		}
		if !slices.ContainsFunc(own.X509Authorities, is) {
			return none, refuse(registry.Invalid, "unexpected authority ID")
		}
		for _, x := range own.X509Authorities {
			for _, r := range all {
				if is(x) && r.State != registry.Old && leadsTo(r, x.Certificate) {
					return none, refuse(registry.FailedPrecondition,
						"unable to %s upstream authority %s: the %s X.509 authority %s of server %q leads to it; have the upstream sign with another root, and run \"hallmark authority rotate x509\" there first", verb, id, r.State, r.ID, r.Server)
				}
			}
		}
		return none, change(own, is)
	})
	if err != nil {
		return err
	}
	a.log.Info("upstream authority "+map[string]string{"taint": "tainted", "revoke": "revoked"}[verb], "subject_key_id", id)
	return nil
}

// Publishes reports whether there is an upstream that publishes this server's
// authorities to the whole trust domain.
func (a *Authorities) Publishes() bool {
	_, ok := a.upstream.(Publisher)
	return ok
}

// FollowWait is how long a server waits before it asks its upstream again what is
// to be trusted, if its authorities live as long as this one's.
func (a *Authorities) FollowWait() time.Duration {
	wait := followEvery
	for _, kind := range a.kinds {
		wait = min(wait, a.plans[kind].lifetime/followPart)
	}
	return max(wait, minFollow)
}

// runFollow follows what the upstream says is to be trusted, until the context
// ends. It always returns an error, the context's.
func (a *Authorities) runFollow(ctx context.Context) error {
	for {
		wait := a.FollowWait()
		if err := a.Follow(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			wait = max(a.asked.next(askBundle).Sub(a.now()), minFollow)
			var of *UpstreamError
			if !errors.As(err, &of) {
				wait = retryWait
				a.log.Error("cannot follow the upstream authority; will try again", "error", err, "in", wait)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// Follow asks the upstream once what is to be trusted, and makes it so.
// [Authorities.Run] calls it; it may be called at any time.
func (a *Authorities) Follow(ctx context.Context) error {
	up, ok := a.upstream.(Follower)
	if !ok {
		return nil
	}
	a.following.Lock()
	defer a.following.Unlock()
	return a.ask(ctx, askBundle, func(ctx context.Context) error {
		b, whole, err := up.Bundle(ctx)
		if err != nil {
			return err
		}
		if err := checkRoots(bundleRoots(b), a.now()); err != nil {
			return err
		}
		return a.apply(ctx, b, whole)
	})
}

// apply makes what an upstream trusts part of the bundle.
func (a *Authorities) apply(ctx context.Context, b *bundle.Bundle, whole bool) error {
	unlock, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	held := a.escape(ctx, b)
	roots, now, view := bundleRoots(b), a.now(), a.registry.View()
	was := a.roots
	a.roots = roots
	if own := view.Bundle(a.td); own != nil {
		is := own.Clone()
		if a.merge(is, b, whole, held != nil, view.Authorities(), now); same(own, is) {
			return cmp.Or(held, a.republish(ctx, b))
		}
	}
	_, err = a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		a.merge(own, b, whole, held != nil, all, now)
		return registry.AuthorityChange{}, a.notForeign(own)
	})
	if err != nil {
		a.roots = was
		return fmt.Errorf("publish what it trusts: %w", err)
	}
	return cmp.Or(held, a.republish(ctx, b))
}

// escape has another authority sign if the one that does leads to a root that is
// tainted above, and to no other. What signs must be good before the mark is
// seen here: else agents would replace what they have by the like.
func (a *Authorities) escape(ctx context.Context, b *bundle.Bundle) error {
	active, _, _ := a.State(registry.X509)
	own := a.registry.View().Bundle(a.td)
	if active == nil || own == nil {
		return nil
	}
	marked := own.Clone()
	for i := range marked.X509Authorities {
		x := &marked.X509Authorities[i]
		x.Tainted = slices.ContainsFunc(b.X509Authorities, func(y bundle.X509Authority) bool { return y.Tainted && y.Certificate.Equal(x.Certificate) })
	}
	good := func(r *registry.Authority) bool {
		root := RootOf(r, marked)
		return root == nil || !slices.ContainsFunc(marked.X509Authorities, func(x bundle.X509Authority) bool { return x.Tainted && x.Certificate.Equal(root) })
	}
	if good(active) {
		return nil
	}
	if a.now().Before(a.asked.next(askSign)) {
		return errors.New("a root is tainted above, and no authority that leads to another could be had yet")
	}
	a.log.Warn("a root is tainted above; another authority takes the place of the one that leads to it", "id", active.ID)
	next, err := a.prepare(ctx, registry.X509)
	if err != nil {
		return fmt.Errorf("a root is tainted above, and no authority that leads to another could be had: %w", err)
	}
	if !good(next) {
		return errors.New("a root is tainted above, and the upstream still signs with it")
	}
	_, err = a.activate(ctx, registry.X509, next.ID)
	return err
}

// merge makes what an upstream trusts part of a bundle. Marks that are held back
// are not made yet.
func (a *Authorities) merge(own, b *bundle.Bundle, whole, held bool, all []*registry.Authority, now time.Time) {
	end := now.Add(-pruneAfter) // what has ended is pruned here, however long it stays above
	for _, x := range b.X509Authorities {
		if x.Certificate.NotAfter.Before(end) {
			continue
		}
		i := slices.IndexFunc(own.X509Authorities, func(y bundle.X509Authority) bool { return y.Certificate.Equal(x.Certificate) })
		if i < 0 {
			own.X509Authorities = append(own.X509Authorities, bundle.X509Authority{Certificate: x.Certificate, Upstream: true})
			i = len(own.X509Authorities) - 1
		}
		if x.Tainted && !held {
			own.X509Authorities[i].Tainted = true
		}
	}
	if !whole {
		a.dropUnneeded(own, all, now)
		return
	}
	own.X509Authorities = slices.DeleteFunc(own.X509Authorities, func(x bundle.X509Authority) bool {
		return x.Upstream && !slices.ContainsFunc(a.roots, x.Certificate.Equal)
	})
	mergeKeys(&own.JWTAuthorities, b.JWTAuthorities, own, end)
	mergeKeys(&own.WITAuthorities, b.WITAuthorities, own, end)
}

func mergeKeys(keys *[]bundle.JWTAuthority, above []bundle.JWTAuthority, own *bundle.Bundle, end time.Time) {
	*keys = slices.DeleteFunc(*keys, func(k bundle.JWTAuthority) bool {
		return k.Upstream && !slices.ContainsFunc(above, func(x bundle.JWTAuthority) bool { return x.KeyID == k.KeyID && sameKey(x.PublicKey, k.PublicKey) })
	})
	for _, x := range above {
		i := slices.IndexFunc(*keys, func(k bundle.JWTAuthority) bool { return k.KeyID == x.KeyID })
		switch {
		case i >= 0:
			(*keys)[i].Tainted = (*keys)[i].Tainted || x.Tainted && sameKey(x.PublicKey, (*keys)[i].PublicKey)
		case !x.ExpiresAt.IsZero() && x.ExpiresAt.Before(end):
		case !own.HasKeyID(x.KeyID): // WIT-SVID §6.1: one key by that name
			x.Upstream = true
			*keys = append(*keys, x)
		}
	}
}

// republish has the upstream publish those own JWT and WIT authorities that it
// has lost: it may have been restored from a backup.
func (a *Authorities) republish(ctx context.Context, b *bundle.Bundle) error {
	if _, ok := a.upstream.(Publisher); !ok {
		return nil
	}
	now := a.now()
	for _, r := range a.registry.View().Authorities() {
		if r.Kind == registry.X509 || r.Server != a.server || !now.Before(r.ExpiresAt) || b.HasKeyID(r.ID) {
			continue
		}
		key := bundle.JWTAuthority{KeyID: r.ID, PublicKey: r.PublicKey, ExpiresAt: r.ExpiresAt}
		if err := a.announce(ctx, r.Kind, key); err != nil {
			return err
		}
	}
	return nil
}

// notForeign fails if a key of a bundle is also among the authorities of another
// trust domain: whoever holds it could sign for both. SPIFFE Trust Domain and
// Bundle §2, §6.2.
func (a *Authorities) notForeign(own *bundle.Bundle) error {
	for foreign := range a.registry.View().Bundles("") {
		if foreign.TrustDomain == a.td {
			continue
		}
		for _, x := range own.X509Authorities {
			for _, y := range foreign.X509Authorities {
				if string(x.Certificate.RawSubjectPublicKeyInfo) == string(y.Certificate.RawSubjectPublicKeyInfo) {
					return fmt.Errorf("its root %q has a key of trust domain %q; a key may not serve two trust domains", x.Certificate.Subject, foreign.TrustDomain.Name())
				}
			}
		}
		for _, x := range slices.Concat(own.JWTAuthorities, own.WITAuthorities) {
			for _, y := range slices.Concat(foreign.JWTAuthorities, foreign.WITAuthorities) {
				if sameKey(x.PublicKey, y.PublicKey) {
					return fmt.Errorf("its key %q is one of trust domain %q; a key may not serve two trust domains", x.KeyID, foreign.TrustDomain.Name())
				}
			}
		}
	}
	return nil
}

func bundleRoots(b *bundle.Bundle) []*x509.Certificate {
	roots := make([]*x509.Certificate, 0, len(b.X509Authorities))
	for _, x := range b.X509Authorities {
		roots = append(roots, x.Certificate)
	}
	return roots
}

// same reports whether two bundles hold the same authorities, with the same
// marks, in the same order.
func same(a, b *bundle.Bundle) bool {
	keys := func(x, y bundle.JWTAuthority) bool {
		return x.KeyID == y.KeyID && x.Tainted == y.Tainted && x.Upstream == y.Upstream && x.ExpiresAt.Equal(y.ExpiresAt) && sameKey(x.PublicKey, y.PublicKey)
	}
	return slices.EqualFunc(a.X509Authorities, b.X509Authorities, func(x, y bundle.X509Authority) bool {
		return x.Tainted == y.Tainted && x.Upstream == y.Upstream && x.Certificate.Equal(y.Certificate)
	}) && slices.EqualFunc(a.JWTAuthorities, b.JWTAuthorities, keys) && slices.EqualFunc(a.WITAuthorities, b.WITAuthorities, keys)
}
