package authority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/registry"
)

// The schedule. The next authority is prepared at half of the active one's
// life, and takes over a sixth of that life before its end: nearly a third of
// a life to spread, and a sixth in which SVIDs have their full lifetime.
const (
	maxPrepareAhead  = 30 * 24 * time.Hour // of an authority's end
	maxActivateAhead = 7 * 24 * time.Hour  // of an authority's end
	// maxSpread is how long an authority is in the bundle, at the most, before
	// the schedule lets it sign, while the active one can: twice the usual
	// refresh hint of a federated bundle.
	maxSpread = 10 * time.Minute
	// pruneAfter an authority's end: for verifiers whose clock is behind.
	pruneAfter = 5 * time.Minute
	// abandonAfter the end of another server's authority, its record goes too:
	// that server will not do it.
	abandonAfter = 24 * time.Hour
	// maxOld bounds how many authorities wait for their end, of each kind,
	// when another is asked for: each makes the bundle larger.
	maxOld = 50
	// maxPruned bounds the records pruned in one transaction.
	maxPruned = 40
)

// step is what the schedule asks for.
type step int

const (
	wait step = iota
	prepare
	activate
)

// due returns the next step of a kind, and when, given the authorities that
// can sign (nil: none). It is in the past when the clock has jumped ahead.
func due(active, prepared *registry.Authority) (step, time.Time) {
	switch {
	case active == nil && prepared == nil:
		return prepare, time.Time{}
	case active == nil:
		return activate, time.Time{}
	}
	life := active.ExpiresAt.Sub(active.CreatedAt)
	if prepared == nil {
		return prepare, active.ExpiresAt.Add(-min(life/2, maxPrepareAhead))
	}
	at := active.ExpiresAt.Add(-min(life/6, maxActivateAhead))
	if spread := prepared.CreatedAt.Add(Spread(life)); at.Before(spread) {
		at = spread
	}
	if at.After(active.ExpiresAt) {
		at = active.ExpiresAt
	}
	return activate, at
}

// Spread returns how long an authority with such a lifetime is in the bundle, at
// the least, before the schedule lets it sign.
func Spread(lifetime time.Duration) time.Duration { return min(lifetime/12, maxSpread) }

// Rotate does what is due now: it makes authorities, activates and prunes
// them. It returns when the next step is due. [Authorities.Run] calls it; it
// may be called at any time.
func (a *Authorities) Rotate(ctx context.Context) (next time.Time, err error) {
	unlock, err := a.acquire(ctx)
	if err != nil {
		return time.Time{}, err
	}
	defer unlock()
	if err := a.adopt(ctx); err != nil {
		return time.Time{}, err
	}
	for _, kind := range a.kinds {
		at, err := a.advance(ctx, kind)
		if err != nil {
			return time.Time{}, err
		}
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	if err := a.prune(ctx); err != nil {
		return time.Time{}, err
	}
	a.collect()
	return next, nil
}

func (a *Authorities) acquire(ctx context.Context) (unlock func(), err error) {
	select {
	case a.lock <- struct{}{}:
		return func() { <-a.lock }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// adopt opens the keys of this server's authorities that may have to sign. One
// whose key is lost, or of a kind that is to sign no more, becomes old. It deletes the keys of those that another
// server has revoked.
func (a *Authorities) adopt(ctx context.Context) error {
	var lost []string
	all := a.registry.View().Authorities()
	a.sweep(all)
	for _, r := range all {
		if r.Server != a.server || r.State == registry.Old || a.signers[r.KeyName] != nil {
			continue
		}
		if !slices.Contains(a.kinds, r.Kind) {
			a.log.Info("authority retired: there are to be none of its kind", "kind", r.Kind, "id", r.ID)
			lost = append(lost, r.KeyName)
			continue
		}
		signer, err := a.keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: r.KeyName})
		switch {
		case errors.Is(err, apiv1.NotFoundError{}) || errors.Is(err, fs.ErrNotExist):
			a.log.Warn("the key of an authority is gone; another takes its place", "kind", r.Kind, "id", r.ID, "key", r.KeyName)
			lost = append(lost, r.KeyName)
		case err != nil:
			return fmt.Errorf("open the key of %s authority %s: %w", r.Kind, r.ID, err)
		case !sameKey(signer.Public(), r.PublicKey):
			a.log.Warn("the key of an authority is another one now; another authority takes its place", "kind", r.Kind, "id", r.ID, "key", r.KeyName)
			lost = append(lost, r.KeyName)
		default:
			a.signers[r.KeyName] = signer
		}
	}
	if len(lost) > 0 {
		_, err := a.registry.ChangeAuthorities(ctx, func(_ *bundle.Bundle, all []*registry.Authority) (change registry.AuthorityChange, err error) {
			for _, r := range all {
				if r.Server == a.server && r.State != registry.Old && slices.Contains(lost, r.KeyName) {
					change.Put = append(change.Put, with(r, registry.Old))
				}
			}
			return change, nil
		})
		if err != nil {
			return fmt.Errorf("retire authorities: %w", err)
		}
	}
	for _, kind := range a.kinds {
		if active, _, _ := a.State(kind); active != nil {
			if err := a.use(active); err != nil {
				return err
			}
		}
	}
	return nil
}

func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// with returns a copy of a record in another state.
func with(r *registry.Authority, state registry.AuthorityState) *registry.Authority {
	c := *r
	c.State = state
	return &c
}

// advance takes the steps of a kind that are due, and returns when the next
// one is.
func (a *Authorities) advance(ctx context.Context, kind registry.AuthorityKind) (time.Time, error) {
	warned := false
	for {
		now, view := a.now(), a.registry.View()
		active, prepared, _ := a.state(kind, view.Authorities())
		own := view.Bundle(a.td)
		if active != nil && !usable(active, own, now) {
			if !warned {
				a.log.Warn("the active authority can sign no more; another takes its place", "kind", kind, "id", active.ID, "expires", active.ExpiresAt)
			}
			active, warned = nil, true
		}
		if prepared != nil && (!usable(prepared, own, now) || a.misplaced(prepared)) {
			prepared = nil
		}
		step, at := due(active, prepared)
		if a.misplaced(active) { // the configuration has changed: not only when it ends
			if at = now; step == activate {
				at = prepared.CreatedAt.Add(Spread(active.ExpiresAt.Sub(active.CreatedAt)))
			}
		}
		if step == activate && active != nil {
			at = a.held(active, prepared, at)
		}
		if step == prepare {
			if retry := a.asked.next(a.asksFor(kind)); at.Before(retry) {
				at = retry
			}
		}
		if at.After(now) {
			return at, nil
		}
		var err error
		if step == prepare {
			_, err = a.prepare(ctx, kind)
		} else {
			_, err = a.activate(ctx, kind, prepared.ID)
		}
		if of := (*UpstreamError)(nil); errors.As(err, &of) {
			return a.asked.next(of.what), nil // the others go on
		}
		if err != nil {
			return time.Time{}, err
		}
	}
}

// Publication knows what those know who verify by documents that are published
// elsewhere.
type Publication interface {
	// Ready returns from when they know a prepared authority; the error says why they
	// do not. It does not wait.
	Ready(r *registry.Authority) (from time.Time, err error)
	// Overtaken is called when an authority is activated that they do not know, with
	// why that is.
	Overtaken(r *registry.Authority, err error)
}

// held returns when a prepared authority is to sign that could at a time: no sooner
// than those know it who verify by what is published elsewhere, but before what the
// active one signs lives too short.
func (a *Authorities) held(active, prepared *registry.Authority, at time.Time) time.Time {
	now := a.now()
	if a.publication == nil || at.After(now) {
		return at
	}
	from, err := a.publication.Ready(prepared)
	life := active.ExpiresAt.Sub(active.CreatedAt)
	last := active.ExpiresAt.Add(-min(life/12, maxActivateAhead/2))
	if err == nil {
		if last.Before(from) {
			from = last
		}
		return later(at, from)
	}
	if !last.After(now) {
		return at
	}
	if a.holding[prepared.Kind] != prepared.ID {
		a.holding[prepared.Kind] = prepared.ID
		a.log.Warn("the next authority does not sign yet, because those who read what is published would refuse it; run \"hallmark publish list\" for what to mend",
			"kind", prepared.Kind, "id", prepared.ID, "error", err, "signs_anyway", last)
	}
	if look := now.Add(retryWait); look.Before(last) {
		return look
	}
	return last
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// asksFor returns what the upstream is asked for before an authority of a kind is
// prepared.
func (a *Authorities) asksFor(kind registry.AuthorityKind) string {
	if kind == registry.X509 {
		return askSign
	}
	return askPublish
}

// usable reports whether an authority may sign: it is valid now and verifiers
// can know it.
func usable(r *registry.Authority, own *bundle.Bundle, now time.Time) bool {
	return now.Before(r.ExpiresAt) && !now.Before(r.CreatedAt.Add(-Backdate)) && Published(r, own)
}

// Published reports whether what an authority signs verifies against a bundle.
func Published(r *registry.Authority, own *bundle.Bundle) bool {
	if own == nil {
		return false
	}
	if r.Kind != registry.X509 {
		return slices.ContainsFunc(*tokenKeys(own, r.Kind), func(k bundle.JWTAuthority) bool {
			return k.KeyID == r.ID && sameKey(k.PublicKey, r.PublicKey)
		})
	}
	if len(r.Chain) == 0 {
		return false
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range own.X509Authorities {
		roots.AddCert(root.Certificate)
	}
	for _, c := range r.Chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := r.Chain[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   r.CreatedAt,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err == nil
}

// Prepare makes the next authority of a kind and publishes it in the bundle.
// It replaces one that is prepared already, which leaves the bundle: it has
// signed nothing. JWT authorities of both kinds are prepared together: to those
// who ask they are one.
func (a *Authorities) Prepare(ctx context.Context, kind registry.AuthorityKind) (*registry.Authority, error) {
	unlock, err := a.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, _, old := a.State(kind); len(old) >= maxOld {
		return nil, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf(
			"%d old %s authorities are still in the bundle, which is the most; the first to expire does so at %s",
			len(old), kind, firstEnd(old).UTC().Format(time.RFC3339))}
	}
	if a.hasBoth(kind) {
		if _, err := a.prepare(ctx, registry.JWTRS256); err != nil {
			return nil, err
		}
	}
	return a.prepare(ctx, kind)
}

// hasBoth reports whether a kind is JWT and there are authorities for RS256 too.
func (a *Authorities) hasBoth(kind registry.AuthorityKind) bool {
	return kind == registry.JWT && slices.Contains(a.kinds, registry.JWTRS256)
}

func firstEnd(rs []*registry.Authority) time.Time {
	return slices.MinFunc(rs, func(x, y *registry.Authority) int { return x.ExpiresAt.Compare(y.ExpiresAt) }).ExpiresAt
}

func (a *Authorities) prepare(ctx context.Context, kind registry.AuthorityKind) (*registry.Authority, error) {
	k, err := a.newKey(kind)
	if err != nil {
		a.collectAt = time.Time{} // it may have been made all the same
		return nil, fmt.Errorf("prepare %s authority: %w", kind, err)
	}
	r, err := a.publish(ctx, kind, k)
	if err != nil {
		// It may have been published all the same, so the key must stay; and
		// the next try takes it, so that keys do not pile up.
		a.spare[kind] = k
		return nil, fmt.Errorf("prepare %s authority: %w", kind, err)
	}
	delete(a.spare, kind)
	a.log.Info("authority prepared", "kind", kind, "id", r.ID, "expires", r.ExpiresAt)
	return r, nil
}

// key is a private key in the key manager.
type key struct {
	name   string
	signer crypto.Signer
}

// newKey returns a key that no authority has.
func (a *Authorities) newKey(kind registry.AuthorityKind) (key, error) {
	if k, ok := a.spare[kind]; ok && !hasKey(a.registry.View().Authorities(), k) {
		return k, nil
	}
	var name [16]byte
	rand.Read(name[:]) // never fails
	return createKey(a.keys, kind.String()+"-"+hex.EncodeToString(name[:]), a.plans[kind].keyType)
}

func hasKey(all []*registry.Authority, k key) bool {
	return slices.ContainsFunc(all, func(r *registry.Authority) bool { return sameKey(k.signer.Public(), r.PublicKey) })
}

// publish makes a key an authority, in place of the one that is prepared.
func (a *Authorities) publish(ctx context.Context, kind registry.AuthorityKind, k key) (*registry.Authority, error) {
	created := a.now().Truncate(time.Second)
	r := &registry.Authority{
		Kind:      kind,
		State:     registry.Prepared,
		Server:    a.server,
		KeyName:   k.name,
		PublicKey: k.signer.Public(),
		CreatedAt: created,
		ExpiresAt: created.Add(a.plans[kind].lifetime).Truncate(time.Second),
	}
	var roots []*x509.Certificate
	if kind == registry.X509 {
		tmpl, err := template(a.td, r.PublicKey, r.CreatedAt, r.ExpiresAt)
		if err != nil {
			return nil, err
		}
		if r.Chain, roots, err = a.certify(ctx, k.signer, tmpl); err != nil {
			return nil, fmt.Errorf("certify its key: %w", err)
		}
		r.ID = hex.EncodeToString(r.Chain[0].SubjectKeyId)
		for _, c := range r.Chain { // an authority above may have given less
			if c.NotAfter.Before(r.ExpiresAt) {
				r.ExpiresAt = c.NotAfter
			}
		}
	} else {
		if _, err := JWTAlgorithm(r.PublicKey); err != nil {
			return nil, err
		}
		thumbprint, err := (&jose.JSONWebKey{Key: r.PublicKey}).Thumbprint(crypto.SHA256) // RFC 7638
		if err != nil {
			return nil, err
		}
		r.ID = idOf(thumbprint)
		if err := a.announce(ctx, kind, bundle.JWTAuthority{KeyID: r.ID, PublicKey: r.PublicKey, ExpiresAt: r.ExpiresAt}); err != nil {
			return nil, err
		}
	}

	var replaced []*registry.Authority
	view, err := a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		replaced = nil
		if hasKey(all, k) {
			return registry.AuthorityChange{}, errors.New("an earlier try has published its key")
		}
		for _, old := range all {
			if old.Server == a.server && old.Kind == kind && old.State == registry.Prepared {
				replaced = append(replaced, old)
				withdraw(own, old)
			}
		}
		for _, root := range roots {
			if !own.HasX509(root) {
				own.X509Authorities = append(own.X509Authorities, bundle.X509Authority{Certificate: root, Upstream: a.upstream != nil})
			}
		}
		if kind != registry.X509 {
			if own.HasKeyID(r.ID) {
				return registry.AuthorityChange{}, fmt.Errorf("another key in the bundle has its key ID, %s", r.ID)
			}
			keys := tokenKeys(own, kind)
			*keys = append(*keys, bundle.JWTAuthority{KeyID: r.ID, PublicKey: r.PublicKey, ExpiresAt: r.ExpiresAt})
		}
		if !Published(r, own) {
			return registry.AuthorityChange{}, errors.New("what it would sign does not verify against the bundle")
		}
		return registry.AuthorityChange{Put: []*registry.Authority{r}, Delete: replaced}, nil
	})
	if err != nil {
		return nil, err
	}
	a.signers[k.name] = k.signer
	for _, old := range replaced {
		a.deleteKey(old.KeyName)
	}
	return a.find(view, r), nil
}

// withdraw takes an authority out of a bundle. The root of an authority that
// is not its own root stays.
func withdraw(own *bundle.Bundle, r *registry.Authority) {
	if r.Kind != registry.X509 {
		keys := tokenKeys(own, r.Kind)
		*keys = slices.DeleteFunc(*keys, func(k bundle.JWTAuthority) bool { return k.KeyID == r.ID })
		return
	}
	own.X509Authorities = slices.DeleteFunc(own.X509Authorities, func(x bundle.X509Authority) bool {
		return len(r.Chain) > 0 && x.Certificate.Equal(r.Chain[0])
	})
}

// tokenKeys returns the keys of a bundle that sign JWTs of a kind.
func tokenKeys(b *bundle.Bundle, kind registry.AuthorityKind) *[]bundle.JWTAuthority {
	if kind == registry.WIT {
		return &b.WITAuthorities
	}
	return &b.JWTAuthorities
}

// find returns an authority as a view has it.
func (a *Authorities) find(v *registry.View, r *registry.Authority) *registry.Authority {
	for _, x := range v.Authorities() {
		if x.Server == r.Server && x.Kind == r.Kind && x.ID == r.ID {
			return x
		}
	}
	return r // gone again already
}

// Activate makes the prepared authority of a kind, named by its ID, the one
// that signs; the active one becomes old. With that of JWT goes the one that is
// prepared for RS256. Errors of the caller's are [registry.Error]s.
func (a *Authorities) Activate(ctx context.Context, kind registry.AuthorityKind, id string) (*registry.Authority, error) {
	if id == "" {
		return nil, &registry.Error{Kind: registry.Invalid, Msg: "no authority ID provided"}
	}
	unlock, err := a.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	next, err := a.activate(ctx, kind, id)
	if err == nil && a.hasBoth(kind) {
		if _, prepared, _ := a.State(registry.JWTRS256); prepared != nil {
			if _, err := a.activate(ctx, registry.JWTRS256, prepared.ID); err != nil {
				return nil, err
			}
		}
	}
	return next, err
}

func (a *Authorities) activate(ctx context.Context, kind registry.AuthorityKind, id string) (*registry.Authority, error) {
	now := a.now()
	former := false // another one signed before
	var next *registry.Authority
	view, err := a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		var change registry.AuthorityChange
		_, prepared, _ := a.state(kind, all)
		switch {
		case prepared == nil:
			return change, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf("no %s authority is prepared; prepare one first", kind)}
		case prepared.ID != id:
			return change, &registry.Error{Kind: registry.Invalid, Msg: "unexpected authority ID"}
		case a.signers[prepared.KeyName] == nil:
			return change, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf("the key of %s authority %s is not here; prepare another one", kind, id)}
		case !usable(prepared, own, now): // design §9: publish before it signs
			return change, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf("%s authority %s has expired or is not in the bundle; prepare another one", kind, id)}
		}
		for _, r := range all {
			if r.Server == a.server && r.Kind == kind && r.State == registry.Active {
				former = true
				change.Put = append(change.Put, with(r, registry.Old))
			}
		}
		next = with(prepared, registry.Active)
		next.ActivatedAt = now
		change.Put = append(change.Put, next)
		return change, nil
	})
	if err != nil {
		return nil, fmt.Errorf("activate %s authority: %w", kind, err)
	}
	next = a.find(view, next)
	if err := a.use(next); err != nil {
		return nil, err
	}
	a.log.Info("authority activated", "kind", kind, "id", next.ID, "expires", next.ExpiresAt)
	if a.publication != nil && former {
		if _, err := a.publication.Ready(next); err != nil {
			a.publication.Overtaken(next, err)
		}
	}
	return next, nil
}

// use makes an active authority the one that signs.
func (a *Authorities) use(r *registry.Authority) error {
	signer := a.signers[r.KeyName]
	if signer == nil {
		return fmt.Errorf("the key of %s authority %s was not opened", r.Kind, r.ID)
	}
	if r.Kind != registry.X509 {
		active := &a.jwt
		switch r.Kind {
		case registry.WIT:
			active = &a.wit
		case registry.JWTRS256:
			active = &a.rsa
		}
		if now := active.Load(); now != nil && now.ID == r.ID {
			return nil
		}
		algorithm, err := JWTAlgorithm(r.PublicKey)
		if err != nil {
			return fmt.Errorf("%s authority %s: %w", r.Kind, r.ID, err)
		}
		active.Store(&JWT{ID: r.ID, Signer: signer, Algorithm: algorithm, ExpiresAt: r.ExpiresAt, Remote: !isLocal(signer)})
		return nil
	}
	if now := a.x509.Load(); now != nil && now.ID == r.ID {
		return nil
	}
	if len(r.Chain) == 0 {
		return fmt.Errorf("x509 authority %s has no certificate", r.ID)
	}
	x := &X509{ID: r.ID, Certificate: r.Chain[0], Chain: r.Chain, Signer: signer, Remote: !isLocal(signer)}
	if isOwnRoot(r) {
		x.Chain = nil
	}
	a.x509.Store(x)
	return nil
}

// prune forgets what has expired: in the bundle, in the registry and the keys.
func (a *Authorities) prune(ctx context.Context) error {
	now := a.now()
	for {
		view := a.registry.View()
		own := view.Bundle(a.td)
		if own == nil {
			return nil
		}
		if gone, trimmed := a.expired(own.Clone(), view.Authorities(), now); len(gone) == 0 && !trimmed {
			return nil
		}
		var gone []*registry.Authority
		_, err := a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
			gone, _ = a.expired(own, all, now)
			return registry.AuthorityChange{Delete: gone}, nil
		})
		if err != nil {
			return fmt.Errorf("prune expired authorities: %w", err)
		}
		for _, r := range gone {
			a.log.Info("authority pruned", "kind", r.Kind, "id", r.ID, "server", r.Server, "expired", r.ExpiresAt)
			if r.Server == a.server {
				a.deleteKey(r.KeyName)
			}
		}
	}
}

// expired takes what has expired out of a bundle, and returns the records that
// may go. An active one stays until another has taken its place.
func (a *Authorities) expired(own *bundle.Bundle, all []*registry.Authority, now time.Time) (gone []*registry.Authority, trimmed bool) {
	end := now.Add(-pruneAfter)
	before := authoritiesIn(own)
	own.X509Authorities = slices.DeleteFunc(own.X509Authorities, func(x bundle.X509Authority) bool {
		return x.Certificate.NotAfter.Before(end)
	})
	a.dropUnneeded(own, all, now)
	ended := func(k bundle.JWTAuthority) bool { return !k.ExpiresAt.IsZero() && k.ExpiresAt.Before(end) }
	own.JWTAuthorities = slices.DeleteFunc(own.JWTAuthorities, ended)
	own.WITAuthorities = slices.DeleteFunc(own.WITAuthorities, ended)
	for _, r := range all {
		end := end
		if r.Server != a.server {
			end = now.Add(-abandonAfter)
		} else if r.State == registry.Active {
			continue
		}
		if r.ExpiresAt.Before(end) && len(gone) < maxPruned {
			gone = append(gone, r)
		}
	}
	return gone, before != authoritiesIn(own)
}

func authoritiesIn(b *bundle.Bundle) int {
	return len(b.X509Authorities) + len(b.JWTAuthorities) + len(b.WITAuthorities)
}

// deleteKey deletes a key that no authority needs any more. If that fails, the
// key stays behind, of no use to anyone.
func (a *Authorities) deleteKey(name string) {
	delete(a.signers, name)
	delete(a.recorded, name)
	deleter, ok := a.keys.(apiv1.KeyDeleter)
	if !ok {
		return
	}
	err := deleter.DeleteKey(&apiv1.DeleteKeyRequest{Name: name})
	if err != nil && !errors.Is(err, apiv1.NotFoundError{}) {
		a.log.Warn("cannot delete the key of a former authority", "key", name, "error", err)
		a.collectAt = time.Time{}
	}
}

// idOf returns the ID of an authority by its key's thumbprint, as text. It does
// not begin with a dash: on a command line it would be taken for a flag.
func idOf(thumbprint []byte) string {
	id := base64.RawURLEncoding.EncodeToString(thumbprint)
	if id[0] == '-' {
		id = "_" + id[1:]
	}
	return id
}
