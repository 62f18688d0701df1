package issuer

import (
	"context"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

// Check is one of the checks of a token, and its result.
type Check struct {
	Name string // what was checked
	Err  error  // why the token is refused; nil: it passes
}

// Passed reports whether a token passed all checks.
func Passed(checks []Check) bool {
	for _, c := range checks {
		if c.Err != nil {
			return false
		}
	}
	return true
}

// Explain checks a token as [Issuer.Validate] does, but goes on after a check
// that fails. The token that it returns has what the claims say, which is true
// only if all checks passed; it is nil if there is nothing that can be read.
func (i *Issuer) Explain(ctx context.Context, token string) ([]Check, *Token) {
	t, err := jwt.Parse(token)
	checks := []Check{{"form", err}}
	if err != nil {
		return checks, nil
	}
	checks = append(checks, Check{"header", i.checkHeader(t)}, Check{"algorithm", i.checkAlgorithm(t)}, Check{"issuer", i.checkIssuer(t)})
	out := i.tokenOf(t)
	for _, c := range claimChecks {
		checks = append(checks, Check{c.name, c.check(i, t, out)})
	}
	return append(checks, Check{"signature", i.checkSignature(ctx, t)}), out
}

// Explain checks a JWT-SVID as [TrustDomain.Validate] does, and goes on with its
// claims.
func (d *TrustDomain) Explain(ctx context.Context, token string) ([]Check, *Token) {
	t, err := jwt.Parse(token)
	checks := []Check{{"form", err}}
	if err != nil {
		return checks, nil
	}
	_, err = d.svid(token)
	checks = append(checks, Check{"JWT-SVID", err})
	out := d.base.tokenOf(t)
	for _, c := range claimChecks {
		checks = append(checks, Check{c.name, c.check(&d.base, t, out)})
	}
	return checks, out
}
