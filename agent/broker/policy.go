package broker

import (
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

// Policy is what one broker may ask for. Nobody without one may ask for
// anything.
type Policy struct {
	Broker    spiffeid.ID
	SPIFFEIDs []Pattern // of workloads; none is all of the node's
	Audiences []string  // of JWT-SVIDs; none is any
}

// entitles reports whether the broker may have what an entry entitles to.
func (p Policy) entitles(e *entry.Entry) bool {
	return delivery.Delegable(e) &&
		(len(p.SPIFFEIDs) == 0 || slices.ContainsFunc(p.SPIFFEIDs, func(x Pattern) bool { return x.Matches(e.SPIFFEID) }))
}

// refusedAudience returns the first audience that the broker may not ask for.
func (p Policy) refusedAudience(audience []string) (refused string, ok bool) {
	i := slices.IndexFunc(audience, func(a string) bool { return !slices.Contains(p.Audiences, a) })
	if len(p.Audiences) == 0 || i < 0 {
		return "", false
	}
	return audience[i], true
}

// Pattern is a SPIFFE ID, or all those below a path.
type Pattern struct {
	id    spiffeid.ID
	below bool
}

// ParsePattern reads a SPIFFE ID, or one with /* at its end for all those below
// it: spiffe://example.org/shop/*.
func ParsePattern(s string) (Pattern, error) {
	base, below := strings.CutSuffix(s, "/*")
	id, err := spiffeid.FromString(base)
	switch {
	case err != nil:
		return Pattern{}, err
	case !below && id.Path() == "":
		return Pattern{}, errors.New("it has no path; for all workloads of the trust domain write " + s + "/*")
	}
	return Pattern{id: id, below: below}, nil
}

// Matches reports whether the pattern is for a SPIFFE ID.
func (p Pattern) Matches(id spiffeid.ID) bool {
	if p.below {
		return strings.HasPrefix(id.String(), p.id.String()+"/")
	}
	return id == p.id
}

// TrustDomain returns that of the SPIFFE IDs that the pattern is for.
func (p Pattern) TrustDomain() spiffeid.TrustDomain { return p.id.TrustDomain() }
