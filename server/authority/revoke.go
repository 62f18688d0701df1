package authority

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Taint marks an old authority, named by its ID, as tainted: in its record and
// in the bundle, in one transaction. What it signed still verifies; whoever
// holds such a thing and sees the mark replaces it at once. One that is tainted
// already stays so.
//
// The authority may be another server's, if that lets it sign no more: no key
// is needed for this. One that signs, or is about to, must be retired on the
// server that has its key, as only that one can tell what signs instead. (Of a
// server that is gone for good, start one of the same name without its keys:
// its authorities are old then.)
//
// Errors of the caller's are [registry.Error]s; before there is an authority of
// this kind the error is [ErrUnavailable].
func (a *Authorities) Taint(ctx context.Context, kind registry.AuthorityKind, id string) (*registry.Authority, error) {
	unlock, err := a.lockFor(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var tainted *registry.Authority
	already := false
	view, err := a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		r, err := a.retired(kind, id, all, "taint")
		if err != nil {
			return registry.AuthorityChange{}, err
		}
		for i := range own.X509Authorities {
			if hasX509Key(r, own.X509Authorities[i]) {
				own.X509Authorities[i].Tainted = true
			}
		}
		for _, keys := range [][]bundle.JWTAuthority{own.JWTAuthorities, own.WITAuthorities} {
			for i := range keys {
				if hasTokenKey(r, keys[i]) {
					keys[i].Tainted = true
				}
			}
		}
		c := *r
		c.Tainted = true
		tainted = &c
		if already = r.Tainted; already {
			return registry.AuthorityChange{}, nil
		}
		return registry.AuthorityChange{Put: []*registry.Authority{tainted}}, nil
	})
	if err != nil {
		return nil, fmt.Errorf("taint %s authority: %w", kind, err)
	}
	if !already {
		a.log.Info("authority tainted", "kind", kind, "id", id, "server", tainted.Server)
	}
	return a.find(view, tainted), nil
}

// Revoke takes a tainted authority, named by its ID, out of the bundle and the
// registry, in one transaction, and deletes its key: what it signed verifies no
// more. It returns the authority as it was.
//
// The key of another server's authority is deleted by that server, within a
// minute if it runs. If it does not, its key stays behind, of no use to anyone.
//
// Errors are those of [Authorities.Taint].
func (a *Authorities) Revoke(ctx context.Context, kind registry.AuthorityKind, id string) (*registry.Authority, error) {
	unlock, err := a.lockFor(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	fail := func(err error) (*registry.Authority, error) {
		return nil, fmt.Errorf("revoke %s authority: %w", kind, err)
	}
	revoked, err := a.revocable(kind, id, a.registry.View().Authorities())
	if err != nil {
		return fail(err)
	}
	// First the key, of which nobody would know after a crash between the two.
	// It is of no use: from here the authority can only go.
	if revoked.Server == a.server {
		a.deleteKey(revoked.KeyName)
	}
	_, err = a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		r, err := a.revocable(kind, id, all)
		if err != nil {
			return registry.AuthorityChange{}, err
		}
		own.X509Authorities = slices.DeleteFunc(own.X509Authorities, func(x bundle.X509Authority) bool { return hasX509Key(r, x) })
		for _, keys := range []*[]bundle.JWTAuthority{&own.JWTAuthorities, &own.WITAuthorities} {
			*keys = slices.DeleteFunc(*keys, func(k bundle.JWTAuthority) bool { return hasTokenKey(r, k) })
		}
		revoked = r
		return registry.AuthorityChange{Delete: []*registry.Authority{r}}, nil
	})
	if err != nil {
		return fail(err)
	}
	a.log.Info("authority revoked", "kind", kind, "id", id, "server", revoked.Server)
	return revoked, nil
}

// lockFor begins a change of the authority that a caller names.
func (a *Authorities) lockFor(ctx context.Context, id string) (unlock func(), err error) {
	if id == "" {
		return nil, &registry.Error{Kind: registry.Invalid, Msg: "no authority ID provided"}
	}
	return a.acquire(ctx)
}

// retired finds an authority that signs no more, of any server. The verb is
// what is to be done with it.
func (a *Authorities) retired(kind registry.AuthorityKind, id string, all []*registry.Authority, verb string) (*registry.Authority, error) {
	if active, _, _ := a.state(kind, all); active == nil {
		return nil, ErrUnavailable
	}
	i := slices.IndexFunc(all, func(r *registry.Authority) bool { return r.Kind == kind && r.ID == id })
	if i < 0 {
		return nil, &registry.Error{Kind: registry.Invalid, Msg: "unexpected authority ID"}
	}
	r := all[i]
	why := ""
	_, publishes := a.upstream.(Publisher)
	switch {
	case kind == registry.X509 && !isOwnRoot(r):
		why = "it is no root: the upstream's that it leads to can be, \"hallmark authority show " + id + "\" names it"
	case kind != registry.X509 && publishes && verb == "revoke":
		why = fmt.Sprintf("the server above has published it to the whole trust domain, and has no way to take it back; it goes when it ends, at %s", r.ExpiresAt.UTC().Format(time.RFC3339))
	case r.State == registry.Old:
		return r, nil
	case r.Server != a.server:
		why = fmt.Sprintf("it is %s on server %q; activate another one there first", r.State, r.Server)
	case r.State == registry.Active:
		why = "it is the one that signs; activate another one first"
	default:
		why = "it is prepared and has signed nothing; prepare another one in its place"
	}
	return nil, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf("unable to %s %s authority %s: %s", verb, kind, id, why)}
}

// revocable finds an authority that may be revoked.
func (a *Authorities) revocable(kind registry.AuthorityKind, id string, all []*registry.Authority) (*registry.Authority, error) {
	r, err := a.retired(kind, id, all, "revoke")
	if err == nil && !r.Tainted {
		return nil, &registry.Error{Kind: registry.FailedPrecondition, Msg: fmt.Sprintf(
			"unable to revoke %s authority %s: it is not tainted; taint it first, so that what it signed is replaced", kind, id)}
	}
	return r, err
}

// hasX509Key and hasTokenKey report whether an authority in a bundle has the key
// of a record: under whichever certificate or name it is there, it is as much
// in doubt.
func hasX509Key(r *registry.Authority, x bundle.X509Authority) bool {
	return r.Kind == registry.X509 && len(r.Chain) > 0 &&
		bytes.Equal(x.Certificate.RawSubjectPublicKeyInfo, r.Chain[0].RawSubjectPublicKeyInfo)
}

func hasTokenKey(r *registry.Authority, k bundle.JWTAuthority) bool {
	return r.Kind != registry.X509 && (k.KeyID == r.ID || sameKey(k.PublicKey, r.PublicKey))
}

// abandon takes away the authorities of a kind that this server had in an
// earlier run and is not to have any more, and what others have published of
// that kind. Those of other servers stay.
func (a *Authorities) abandon(ctx context.Context, kind registry.AuthorityKind) error {
	view := a.registry.View()
	if view.Bundle(a.td) == nil {
		return nil // a first start
	}
	// First the keys, of which nobody would know after a crash between the two.
	for _, r := range view.Authorities() {
		if r.Kind == kind && r.Server == a.server {
			a.deleteKey(r.KeyName)
			a.log.Info("authority abandoned: there are to be none of its kind", "kind", kind, "id", r.ID)
		}
	}
	_, err := a.registry.ChangeAuthorities(ctx, func(own *bundle.Bundle, all []*registry.Authority) (change registry.AuthorityChange, err error) {
		others := make(map[string]bool)
		for _, r := range all {
			switch {
			case r.Kind != kind:
			case r.Server == a.server:
				change.Delete = append(change.Delete, r)
			default:
				others[r.ID] = true
			}
		}
		keys := tokenKeys(own, kind)
		*keys = slices.DeleteFunc(*keys, func(k bundle.JWTAuthority) bool { return !others[k.KeyID] })
		return change, nil
	})
	if err != nil {
		return fmt.Errorf("abandon the %s authorities: %w", kind, err)
	}
	return nil
}

// sweep deletes the keys of authorities that another server has revoked.
func (a *Authorities) sweep(all []*registry.Authority) {
	mine := make(map[string]bool)
	for _, r := range all {
		if r.Server == a.server {
			mine[r.KeyName] = true
		}
	}
	for name := range a.recorded {
		if !mine[name] {
			a.log.Info("another server has removed an authority of this one; its key is deleted", "key", name)
			a.deleteKey(name)
		}
	}
	a.recorded = mine
}
