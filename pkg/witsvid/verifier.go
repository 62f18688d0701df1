package witsvid

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

const (
	// MaxProofLifetime is how far ahead a proof may end. Makers of proofs give
	// them seconds, or minutes if they must.
	MaxProofLifetime = 5 * time.Minute
	// DefaultMaxProofs is room for a thousand requests a second of one caller,
	// with proofs made by [Prove]: some forty megabytes.
	DefaultMaxProofs = 1 << 18

	maxProofID = 256 // bytes
)

// Config says how a [Verifier] verifies.
type Config struct {
	// Origins are the scheme, host and port under which clients know this
	// service, such as https://api.example.org or https://10.0.0.7:8443. What
	// a request says in its Host field counts for nothing.
	Origins []string
	// Bundles has the WIT keys of the trust domains whose callers are let in,
	// as the workloadapi.WITSource of go-spiffe does.
	Bundles witbundle.Source
	// Tokens names the header fields with further tokens that this service
	// goes by; a proof must bind each that a request has, and no others.
	Tokens []string
	// MaxLifetime refuses WIT-SVIDs that are valid for longer; zero: none is.
	MaxLifetime time.Duration
	// MaxProofs bounds the proofs that are remembered so that each works once;
	// zero: [DefaultMaxProofs]. Beyond it requests are answered with
	// [ErrBusy]. One caller's proofs take half of the room at most, so that it
	// does not shut out the others. Each process remembers its own.
	MaxProofs int
	// BehindTLSProxy accepts requests that came without TLS. Set it only if a
	// proxy in front ends TLS, and nobody but that proxy can reach this server.
	BehindTLSProxy bool
	// Now is the clock; nil: [time.Now].
	Now func() time.Time
}

// Verifier checks WIT-SVIDs and their proofs. It is safe for concurrent use.
type Verifier struct {
	config  Config
	origins []string
	replays replays
}

// NewVerifier checks a configuration and returns a verifier.
func NewVerifier(c Config) (*Verifier, error) {
	if c.Bundles == nil {
		return nil, errors.New("witsvid: bundles: none given; nobody could be verified")
	}
	if len(c.Origins) == 0 {
		return nil, errors.New("witsvid: origins: none given; say how clients call this service, such as https://api.example.org")
	}
	if c.MaxLifetime < 0 || c.MaxProofs < 0 {
		return nil, errors.New("witsvid: a bound is negative")
	}
	if err := checkTokens(c.Tokens); err != nil {
		return nil, fmt.Errorf("witsvid: %w", err)
	}
	v := &Verifier{config: c}
	v.config.Tokens = slices.Clone(c.Tokens)
	for _, text := range c.Origins {
		u, err := url.Parse(text)
		if err == nil {
			_, err = targetOf(u)
		}
		if err == nil && (u.Path != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "") {
			err = errors.New("it has more than scheme, host and port")
		}
		if err != nil {
			return nil, fmt.Errorf("witsvid: origin %q: %w", text, err)
		}
		v.origins = append(v.origins, originOf(u))
	}
	if v.config.Now == nil {
		v.config.Now = time.Now
	}
	v.replays = newReplays(cmp.Or(c.MaxProofs, DefaultMaxProofs))
	return v, nil
}

// Verify returns who sent a request. Its proof is used up by that. The error
// says what is wrong with the request, for its sender; it holds nothing of the
// tokens but names of headers, claims and IDs.
func (v *Verifier) Verify(r *http.Request) (*SVID, error) {
	if r.TLS == nil && !v.config.BehindTLSProxy { // WIT-SVID §7.3
		return nil, errors.New("the request did not come over TLS")
	}
	hashes, err := boundTokens(r.Header, v.config.Tokens)
	if err != nil {
		return nil, err
	}
	token, err := only(r.Header, TokenHeader)
	if err != nil {
		return nil, err
	}
	proof, err := only(r.Header, ProofHeader)
	if err != nil {
		return nil, err
	}
	now := v.config.Now()
	u, err := ValidateWithoutProof(token, v.config.Bundles, now)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", TokenHeader, err)
	}
	if err := v.checkLifetime(u, now); err != nil {
		return nil, fmt.Errorf("%s: %w", TokenHeader, err)
	}
	if err := v.checkProof(proof, u, hash(token), hashes, r, now); err != nil {
		return nil, fmt.Errorf("%s: %w", ProofHeader, err)
	}
	return &SVID{ID: u.ID, ExpiresAt: u.ExpiresAt, Claims: u.Claims}, nil
}

// only returns the value of a header field that occurs once.
func only(h http.Header, name string) (string, error) {
	switch values := h.Values(name); len(values) {
	case 1:
		return values[0], nil
	case 0:
		return "", fmt.Errorf("the request has no field %s", name)
	default:
		return "", fmt.Errorf("the request has %d fields %s; one is allowed", len(values), name)
	}
}

// checkLifetime applies WIT-SVID §3.5: without nbf, what is left counts.
func (v *Verifier) checkLifetime(u *Unproven, now time.Time) error {
	from := u.NotBefore
	if from.IsZero() {
		from = now
	}
	if most := v.config.MaxLifetime; most > 0 && u.ExpiresAt.Sub(from) > most {
		return fmt.Errorf("it is valid for %v; the most is %v", u.ExpiresAt.Sub(from), most)
	}
	return nil
}

// checkProof checks all of a proof, and last that it is new: only a right one
// is remembered.
func (v *Verifier) checkProof(proof string, u *Unproven, tokenHash string, hashes boundHashes, r *http.Request, now time.Time) error {
	t, err := jwt.Parse(proof)
	if err != nil {
		return err
	}
	if _, err := checkHeader(t, proofType); err != nil {
		return err
	}
	if t.Algorithm.Name != u.Algorithm {
		return fmt.Errorf("header: the algorithm is %s, and %s in the token", t.Algorithm.Name, u.Algorithm)
	}
	if err := t.Verify(u.Key); err != nil {
		return err
	}
	if err := v.checkTarget(t, r); err != nil {
		return err
	}
	exp, _, err := t.ValidAt(now)
	if err != nil {
		return err
	}
	if exp.Sub(now) > MaxProofLifetime+Leeway {
		return fmt.Errorf("it is valid for %v; the most is %v", exp.Sub(now), MaxProofLifetime)
	}
	if wth, _ := t.Claims["wth"].(string); wth != tokenHash {
		return errors.New("claim wth is missing or that of another token")
	}
	if err := checkHashes(t.Claims, hashes); err != nil {
		return err
	}
	jti, _ := t.Claims["jti"].(string)
	if jti == "" || len(jti) > maxProofID {
		return fmt.Errorf("claim jti is missing, or not a string of at most %d bytes", maxProofID)
	}
	return v.replays.use(u.ID, sha256.Sum256([]byte(tokenHash+jti)), exp.Add(Leeway), now)
}

// checkTarget checks that a proof is for this service and the request's path.
// That is taken from the request line as it came, whatever handlers before
// this one made of the URL; its host, if it has one, counts for nothing.
func (v *Verifier) checkTarget(t *jwt.Token, r *http.Request) error {
	aud, err := t.Audience()
	if err != nil {
		return err
	}
	if len(aud) != 1 {
		return fmt.Errorf("claim aud has %d values; a proof is for one target", len(aud))
	}
	meant, err := url.Parse(aud[0])
	if err != nil {
		return errors.New("claim aud is not a URL")
	}
	if _, err := targetOf(meant); err != nil {
		return fmt.Errorf("claim aud: %w", err)
	}
	if !slices.Contains(v.origins, originOf(meant)) {
		return errors.New("claim aud: the proof is for another service")
	}
	line, err := url.ParseRequestURI(r.RequestURI)
	if err != nil || pathOf(line) != pathOf(meant) {
		return errors.New("claim aud: the proof is for another path")
	}
	return nil
}

// checkHashes checks that a proof binds the tokens of a request, all of them
// and no others.
func checkHashes(claims map[string]any, want boundHashes) error {
	for name, hash := range map[string]string{"ath": want.Access, "tth": want.Transaction} {
		if got, ok := claims[name]; ok != (hash != "") || ok && got != hash {
			return fmt.Errorf("claim %s is missing or not that of the request's token", name)
		}
	}
	value, ok := claims["oth"]
	if !ok && len(want.Other) == 0 {
		return nil
	}
	got, ok := value.(map[string]any)
	if !ok {
		return errors.New("claim oth is missing or not an object")
	}
	for name, hash := range want.Other {
		if got[name] != hash {
			return fmt.Errorf("claim oth: %q is missing or not that of the request", name)
		}
	}
	if len(got) > len(want.Other) {
		return errors.New("claim oth: it has tokens that are not known here or not in the request")
	}
	return nil
}

type contextKey struct{}

// FromContext returns who sent the request that a context is of, once a
// [Verifier.Handler] has let it through, or nil.
func FromContext(ctx context.Context) *SVID {
	s, _ := ctx.Value(contextKey{}).(*SVID)
	return s
}

// Handler lets requests through to next that prove a WIT-SVID. Who may do what
// is for next to decide. Others are answered by 400 and the reason, or by 503
// if that is [ErrBusy].
func (v *Verifier) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		svid, err := v.Verify(r)
		if err != nil {
			status := http.StatusBadRequest // draft-ietf-wimse-wpt-01 §2.1: not 401
			if errors.Is(err, ErrBusy) {
				status = http.StatusServiceUnavailable
				w.Header().Set("Retry-After", "1")
			}
			http.Error(w, err.Error(), status)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), contextKey{}, svid)))
	})
}
