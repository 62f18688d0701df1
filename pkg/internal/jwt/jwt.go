// Package jwt reads signed JSON Web Tokens as those who judge them must: what
// two readers might read differently is refused, and so is each algorithm that
// the SPIFFE standards do not allow, before any key is looked up. [Parse] takes
// a token apart, [Token.Verify] checks its signature; which headers and claims
// a kind of token may have is for the packages of that kind to say.
package jwt

import (
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MaxToken is how long a token may be, in bytes: room for the longest
	// SPIFFE ID, many audiences and some claims.
	MaxToken = 32 << 10
	// Leeway is how far the clocks of issuer and validator may differ.
	Leeway = 30 * time.Second

	maxSPIFFEID    = 2048 // bytes; SPIFFE-ID §2.3
	maxTrustDomain = 255  // bytes; SPIFFE-ID §2.3
)

// Token is a token whose signature has not been checked.
type Token struct {
	// Header and Claims are as encoding/json decodes them, with numbers as
	// json.Number.
	Header, Claims map[string]any
	Algorithm      Algorithm

	signed, signature []byte
}

// Parse takes a token of the compact form apart: JSON forms, encrypted and
// detached ones are none. Of the header, the members alg, kid and typ are
// strings where they are there, and alg is.
func Parse(token string) (*Token, error) { return ParseUpTo(token, MaxToken) }

// ParseUpTo is Parse of a token of at most so many bytes.
func ParseUpTo(token string, most int) (*Token, error) {
	if len(token) > most {
		return nil, fmt.Errorf("the token is %d bytes long; the most is %d", len(token), most)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, fmt.Errorf("the token has %d parts instead of three: it is no JWT in compact form", len(parts))
	}
	t := &Token{signed: []byte(parts[0] + "." + parts[1])}
	if err := t.parseHeader(parts[0]); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	payload, err := decodePart(parts[1])
	if err == nil {
		t.Claims, err = DecodeObject(payload)
	}
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	if t.signature, err = decodePart(parts[2]); err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	return t, nil
}

var encoding = base64.RawURLEncoding.Strict()

func decodePart(s string) ([]byte, error) {
	if s == "" {
		return nil, errors.New("it is empty")
	}
	if strings.ContainsAny(s, "\r\n") { // which the decoder would skip
		return nil, errors.New("it is not base64url: it has line breaks")
	}
	b, err := encoding.DecodeString(s)
	if err != nil {
		return nil, errors.New("it is not base64url without padding")
	}
	return b, nil
}

func (t *Token) parseHeader(part string) error {
	raw, err := decodePart(part)
	if err != nil {
		return err
	}
	if t.Header, err = DecodeObject(raw); err != nil {
		return err
	}
	for _, name := range []string{"alg", "kid", "typ"} {
		if value, ok := t.Header[name]; ok {
			if _, ok := value.(string); !ok {
				return fmt.Errorf("%q is not a string", name)
			}
		}
	}
	alg, ok := t.HeaderText("alg")
	if !ok {
		return errors.New("it names no algorithm")
	}
	t.Algorithm, err = AlgorithmOf(alg)
	return err
}

// HeaderText returns a member of the header that is a string, and whether it is
// there.
func (t *Token) HeaderText(name string) (string, bool) {
	text, ok := t.Header[name].(string)
	return text, ok
}

// Verify checks the signature with a key, which must be one of the algorithm's.
func (t *Token) Verify(key crypto.PublicKey) error {
	if err := t.Algorithm.Fits(key); err != nil {
		return err
	}
	if !t.Algorithm.verify(key, t.signed, t.signature) {
		return ErrSignature
	}
	return nil
}

// Digest returns the SHA-256 hash of what is signed: of all but the signature,
// which whoever has an ECDSA one can write in another way.
func (t *Token) Digest() [sha256.Size]byte { return sha256.Sum256(t.signed) }

// ErrSignature means that a token was not signed with the key.
var ErrSignature = errors.New("the signature is not valid")

// Subject returns the claim sub, which must be a SPIFFE ID.
func (t *Token) Subject() (spiffeid.ID, error) {
	sub, ok := t.Claims["sub"].(string)
	if !ok {
		return spiffeid.ID{}, errors.New("claim sub is missing or not a string")
	}
	if len(sub) > maxSPIFFEID {
		return spiffeid.ID{}, fmt.Errorf("claim sub is %d bytes long; a SPIFFE ID has at most %d", len(sub), maxSPIFFEID)
	}
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("claim sub: %w", err)
	}
	if n := len(id.TrustDomain().Name()); n > maxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("claim sub: the trust domain is %d bytes long; the most is %d", n, maxTrustDomain)
	}
	return id, nil
}

// Audience returns the claim aud, which has at least one value.
func (t *Token) Audience() ([]string, error) {
	switch aud := t.Claims["aud"].(type) {
	case string:
		return []string{aud}, nil
	case []any:
		out := make([]string, 0, len(aud))
		for _, a := range aud {
			text, ok := a.(string)
			if !ok {
				return nil, errors.New("claim aud has a value that is not a string")
			}
			out = append(out, text)
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	return nil, errors.New("claim aud is missing, empty or of a wrong type")
}

// ValidAt checks that the token is valid at a time and returns its end, and
// its beginning if it has one. A token is not valid before nbf; iat says
// nothing of that (RFC 7519 §4.1.6).
func (t *Token) ValidAt(now time.Time) (exp, nbf time.Time, err error) {
	if exp, err = t.Date("exp"); err != nil {
		return exp, nbf, err
	}
	if !now.Before(exp.Add(Leeway)) {
		return exp, nbf, fmt.Errorf("the token expired at %s", exp.UTC().Format(time.RFC3339))
	}
	if _, ok := t.Claims["nbf"]; !ok {
		return exp, nbf, nil
	}
	if nbf, err = t.Date("nbf"); err != nil {
		return exp, nbf, err
	}
	if now.Add(Leeway).Before(nbf) {
		return exp, nbf, fmt.Errorf("the token is not valid before %s", nbf.UTC().Format(time.RFC3339))
	}
	return exp, nbf, nil
}

// lastSecond is the end of the year 9999, the last that dates are written in.
const lastSecond = 253402300799

// Date returns a claim that is a time and must be there.
func (t *Token) Date(name string) (time.Time, error) {
	n, ok := t.Claims[name].(json.Number)
	if !ok {
		return time.Time{}, fmt.Errorf("claim %s is missing or not a number", name)
	}
	if seconds, err := strconv.ParseInt(n.String(), 10, 64); err == nil && seconds >= 0 && seconds <= lastSecond {
		return time.Unix(seconds, 0), nil
	}
	f, err := n.Float64()
	if err != nil || f < 0 || f > lastSecond {
		return time.Time{}, fmt.Errorf("claim %s is not a date", name)
	}
	whole, fraction := math.Modf(f)
	return time.Unix(int64(whole), int64(fraction*1e9)), nil
}
