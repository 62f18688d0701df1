package registry

import (
	"context"
	"fmt"
	"iter"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// Federation is a federation relationship: where the bundle of a foreign trust
// domain is published, and how that endpoint proves itself. It is immutable.
type Federation struct {
	TrustDomain spiffeid.TrustDomain
	EndpointURL string      // https
	EndpointID  spiffeid.ID // profile https_spiffe; zero: https_web

	unknown  []byte // what a newer version wrote into the record, as it came
	revision store.Revision
}

const maxEndpointURL = 2048 // bytes

// Validate checks a relationship that a trust domain is to have.
func (f *Federation) Validate(own spiffeid.TrustDomain) error {
	switch {
	case f.TrustDomain.IsZero():
		return fmt.Errorf("trust domain is missing")
	case f.TrustDomain == own:
		return fmt.Errorf("%q is the server's own trust domain; federate with another", own.Name())
	}
	return ValidateEndpointURL(f.EndpointURL)
}

// ValidateEndpointURL checks the URL of a bundle endpoint: https, with a host
// and without user info. SPIFFE Federation §5.2.1.1, §5.2.2.1.
func ValidateEndpointURL(text string) error {
	switch {
	case text == "":
		return fmt.Errorf("bundle endpoint URL is missing")
	case len(text) > maxEndpointURL:
		return fmt.Errorf("bundle endpoint URL is %d bytes long; the most is %d", len(text), maxEndpointURL)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return fmt.Errorf("bundle endpoint URL cannot be parsed; write https://HOST/PATH")
	case !strings.EqualFold(u.Scheme, "https"):
		return fmt.Errorf("bundle endpoint URL has the scheme %q; it must be https", u.Scheme)
	case u.Hostname() == "":
		return fmt.Errorf("bundle endpoint URL has no host")
	case u.User != nil:
		return fmt.Errorf("bundle endpoint URL has user info; endpoints do not authenticate clients, leave it out")
	}
	return nil
}

func federationKey(td spiffeid.TrustDomain) string { return federationPrefix + td.Name() }

func lessFederation(a, b *Federation) bool { return a.TrustDomain.Compare(b.TrustDomain) < 0 }

func (f *Federation) encode() ([]byte, error) {
	r := &hallmarkv1.Federation{TrustDomain: f.TrustDomain.Name(), EndpointUrl: f.EndpointURL}
	if !f.EndpointID.IsZero() {
		r.EndpointSpiffeId = f.EndpointID.String()
	}
	r.ProtoReflect().SetUnknown(f.unknown)
	return proto.Marshal(r)
}

// applyFederation folds the record of the relationship with a trust domain.
func (f *fold) applyFederation(name string, rec store.Record) error {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return err
	}
	if rec.Value == nil {
		f.federations.delete(&Federation{TrustDomain: td})
		return nil
	}
	var r hallmarkv1.Federation
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return err
	}
	item := &Federation{TrustDomain: td, EndpointURL: r.EndpointUrl, unknown: r.ProtoReflect().GetUnknown(), revision: rec.Revision}
	if r.EndpointSpiffeId != "" {
		if item.EndpointID, err = spiffeid.FromString(r.EndpointSpiffeId); err != nil {
			return err
		}
	}
	f.federations.set(item)
	return nil
}

// Federation returns the relationship with a trust domain, or nil.
func (v *View) Federation(td spiffeid.TrustDomain) *Federation {
	f, _ := v.federations.Get(&Federation{TrustDomain: td})
	return f
}

// Federations yields the relationships whose trust domain sorts after the one
// given, by name.
func (v *View) Federations(after string) iter.Seq[*Federation] {
	return func(yield func(*Federation) bool) {
		v.federations.Scan(func(f *Federation) bool {
			return f.TrustDomain.Name() <= after || yield(f)
		})
	}
}

var errFederationNotFound = &Error{Kind: NotFound, Msg: "federation relationship not found"}

// CreateFederation creates a relationship. If edit is given, it edits a copy of
// the trust domain's bundle, empty if there is none, which is stored in the
// same transaction. It may be called again if another writer came first.
func (r *Registry) CreateFederation(ctx context.Context, f Federation, edit func(*View, *bundle.Bundle) error) (*Federation, error) {
	return r.putFederation(ctx, f.TrustDomain, func(old *Federation) (Federation, error) {
		if old != nil {
			return f, &Error{Kind: AlreadyExists, Msg: "federation relationship already exists"}
		}
		return f, nil
	}, edit)
}

// UpdateFederation changes a relationship: change edits a copy. Edit is as of
// [Registry.CreateFederation]. Both may be called again.
func (r *Registry) UpdateFederation(ctx context.Context, td spiffeid.TrustDomain, change func(*Federation), edit func(*View, *bundle.Bundle) error) (*Federation, error) {
	return r.putFederation(ctx, td, func(old *Federation) (Federation, error) {
		if old == nil {
			return Federation{}, errFederationNotFound
		}
		f := *old
		change(&f)
		return f, nil
	}, edit)
}

func (r *Registry) putFederation(ctx context.Context, td spiffeid.TrustDomain, build func(old *Federation) (Federation, error), edit func(*View, *bundle.Bundle) error) (*Federation, error) {
	var f Federation
	v, err := r.change(ctx, func(v *View) (store.Txn, error) {
		var err error
		old := v.Federation(td)
		if f, err = build(old); err != nil {
			return store.Txn{}, err
		}
		f.TrustDomain = td
		if err := f.Validate(r.td); err != nil {
			return store.Txn{}, &Error{Kind: Invalid, Msg: err.Error()}
		}
		value, err := f.encode()
		if err != nil {
			return store.Txn{}, err
		}
		var rev store.Revision
		if old != nil {
			rev = old.revision
		}
		txn := store.Txn{
			If: []store.Condition{{Key: federationKey(td), Revision: rev}},
			Do: []store.Write{{Key: federationKey(td), Value: value}},
		}
		if edit == nil {
			return txn, nil
		}
		was, rev := v.storedBundle(td)
		b := was.Clone()
		if err := edit(v, b); err != nil {
			return txn, err
		}
		if b.TrustDomain != td {
			return txn, invalid("bundle is of trust domain %q, not %q", b.TrustDomain.Name(), td.Name())
		}
		err = putBundle(&txn, was, b, rev)
		return txn, err
	})
	if err != nil {
		return nil, err
	}
	if now := v.Federation(td); now != nil {
		return now, nil
	}
	return nil, errFederationNotFound // deleted right after
}

// DeleteFederation deletes the relationship with a trust domain. Its bundle
// stays until it is deleted too.
func (r *Registry) DeleteFederation(ctx context.Context, td spiffeid.TrustDomain) error {
	_, err := r.change(ctx, func(v *View) (store.Txn, error) {
		f := v.Federation(td)
		if f == nil {
			return store.Txn{}, errFederationNotFound
		}
		return store.Txn{
			If: []store.Condition{{Key: federationKey(td), Revision: f.revision}},
			Do: []store.Write{{Key: federationKey(td)}},
		}, nil
	})
	return err
}
