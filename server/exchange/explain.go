package exchange

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Explanation says what would become of a token.
type Explanation struct {
	Issuer    string         // its name; empty: of none that is trusted
	Parent    spiffeid.ID    // of the entries for the issuer
	Checks    []issuer.Check // all that were made
	Selectors selector.Set   // of the claims; true only if all checks passed
	Entries   []Match        // all of the issuer; the matching ones first
}

// Match is an entry of an issuer, and what a token lacks for it.
type Match struct {
	Entry   *entry.Entry
	Expired bool
	Missing []selector.Selector // none, and not expired: it matches
}

// Matches reports whether the entry is the token's, if all checks passed.
func (m *Match) Matches() bool { return !m.Expired && len(m.Missing) == 0 }

// Explain checks a token as for an exchange, goes on after what fails, and
// compares it with the entries of its issuer. It uses up nothing.
func (x *Exchange) Explain(ctx context.Context, token string) *Explanation {
	of, err := x.issuerOf(token)
	if err != nil {
		name := "form"
		if errors.Is(err, errUntrusted) {
			name, err = "trust", x.untrusted(token)
		}
		return &Explanation{Checks: []issuer.Check{{Name: name, Err: err}}}
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	out := &Explanation{Issuer: of.Name(), Parent: of.parent, Checks: []issuer.Check{{Name: "trust"}}}
	checks, t, selectors := of.Issuer.Explain(ctx, token)
	out.Checks = append(out.Checks, checks...)
	if t == nil {
		return out
	}
	more, err := of.presetSelectors(t)
	if err != nil {
		out.Checks = append(out.Checks, issuer.Check{Name: "claims", Err: err})
	}
	out.Selectors = selector.NewSet(append(selectors, more...)...)
	out.Checks = append(out.Checks, issuer.Check{Name: "actor", Err: checkActor(t)})
	if !of.config.Reusable {
		err = nil
		if hash, _ := t.Known(); x.o.Registry.View().UsedToken(hash) {
			err = issuer.ErrUsed
		}
		out.Checks = append(out.Checks, issuer.Check{Name: "first use", Err: err})
	}
	now := x.o.Now()
	for one := range x.o.Registry.View().EntriesByParent(of.parent) {
		out.Entries = append(out.Entries, Match{one, one.Expired(now), slices.Collect(one.Selectors.Missing(out.Selectors))})
	}
	slices.SortStableFunc(out.Entries, func(a, b Match) int { // the nearest first
		if a.Expired != b.Expired {
			return map[bool]int{true: 1, false: -1}[a.Expired]
		}
		return len(a.Missing) - len(b.Missing)
	})
	return out
}

// untrusted says of which issuer a token is, and which are trusted.
func (x *Exchange) untrusted(token string) error {
	iss, sub, err := issuer.Claimed(token)
	if err != nil {
		return err
	}
	var names []string
	for url := range x.issuers {
		names = append(names, url)
	}
	slices.Sort(names)
	return &untrustedError{iss, sub, names}
}

// untrustedError is for administrators: callers of the endpoint are not told whom
// it trusts.
type untrustedError struct {
	iss, sub string
	trusted  []string
}

func (e *untrustedError) Error() string {
	return "claim iss is " + quoted(e.iss) + " and sub is " + quoted(e.sub) + "; trusted are " + strings.Join(e.trusted, ", ")
}
