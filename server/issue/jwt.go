package issue

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/authority"
)

// Bounds of what one may ask for in a JWT-SVID. A token of the largest
// audience fits into the headers that HTTP servers accept no longer; the
// bounds keep out what cannot be meant.
const (
	MaxAudiences     = 64
	MaxAudience      = 2048     // bytes of one: a SPIFFE ID fits
	maxAudienceBytes = 16 << 10 // of all
)

// token is what a JWT-SVID is built from.
type token struct {
	reason string // for the record
	entry  string // for the record; its ID, if there is one

	id       spiffeid.ID
	audience []string
	ttl      time.Duration
	jti      bool
}

// jwtSigner is a JWT authority and what everything it signs has in common.
type jwtSigner struct {
	*authority.JWT
	header string // encoded, with the dot that follows
	hash   crypto.Hash
	half   int // octets of each half of an ECDSA signature; 0: RSA
	signed *tally
}

// jwtSigner returns the active JWT authority.
func (i *Issuer) jwtSigner() (*jwtSigner, error) {
	a, err := i.authorities.JWT()
	if err != nil {
		return nil, err
	}
	if s := i.jwt.Load(); s != nil && s.JWT == a {
		return s, nil
	}
	s, err := newJWTSigner(a)
	if err != nil {
		return nil, fmt.Errorf("JWT authority %s: %w", a.ID, err)
	}
	s.signed = i.tallyOf(a.ID)
	i.jwt.Store(s)
	return s, nil
}

func newJWTSigner(a *authority.JWT) (*jwtSigner, error) {
	s := &jwtSigner{JWT: a}
	switch a.Algorithm { // RFC 7518 §3.1
	case jose.ES256:
		s.hash, s.half = crypto.SHA256, 32
	case jose.ES384:
		s.hash, s.half = crypto.SHA384, 48
	case jose.RS256:
		s.hash = crypto.SHA256
	default:
		return nil, fmt.Errorf("signing with %s is not supported", a.Algorithm)
	}
	// JWT-SVID §2: alg, kid and typ, and no other.
	header, err := json.Marshal(struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}{string(a.Algorithm), a.ID, "JWT"})
	if err != nil {
		return nil, err
	}
	s.header = base64.RawURLEncoding.EncodeToString(header) + "."
	return s, nil
}

// signJWT builds a JWT-SVID, signs and records it.
func (i *Issuer) signJWT(ctx context.Context, t token) (*JWTSVID, error) {
	ctx, span := telemetry.Span(ctx, "sign JWT")
	defer span.End()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := validateAudience(t.audience); err != nil {
		return nil, err
	}
	s, err := i.jwtSigner()
	if err != nil {
		return nil, err
	}
	// RFC 7519 §2: whole seconds are all that every verifier takes.
	issued := i.now().Truncate(time.Second)
	expires := issued.Add(t.ttl).Truncate(time.Second)
	if end := s.ExpiresAt.Truncate(time.Second); expires.After(end) {
		expires = end
	}
	if !expires.After(issued) {
		return nil, authority.ErrUnavailable
	}
	var jti string
	if t.jti {
		var id [16]byte
		rand.Read(id[:]) // never fails
		jti = base64.RawURLEncoding.EncodeToString(id[:])
	}
	signed, err := s.sign(i.claims(&t, jti, issued, expires))
	if err != nil {
		return nil, fmt.Errorf("sign the token of %s: %w", t.id, err)
	}
	s.signed.add(expires)
	i.metrics.Issued.WithLabelValues("jwt", t.reason).Inc()
	if i.log.Enabled(ctx, slog.LevelInfo) {
		i.log.LogAttrs(ctx, slog.LevelInfo, "issued", recordJWT(&t, s, jti, expires)...)
	}
	return &JWTSVID{ID: t.id, Token: signed, IssuedAt: issued, ExpiresAt: expires}, nil
}

// recordJWT returns what the record says of a token: never the token.
func recordJWT(t *token, s *jwtSigner, jti string, expires time.Time) []slog.Attr {
	attrs := append(make([]slog.Attr, 0, 8),
		slog.String("kind", "jwt"),
		slog.String("for", t.reason),
		slog.String("id", t.id.String()),
		slog.Any("audience", t.audience),
		slog.String("kid", s.ID),
		slog.Time("expires", expires),
	)
	if jti != "" {
		attrs = append(attrs, slog.String("jti", jti))
	}
	if t.entry != "" {
		attrs = append(attrs, slog.String("entry", t.entry))
	}
	return attrs
}

// validateAudience checks the audience that someone asked for.
func validateAudience(audience []string) error {
	switch {
	case len(audience) == 0:
		return invalid("at least one audience is required")
	case len(audience) > MaxAudiences:
		return invalid("%d audiences were asked for; the most is %d", len(audience), MaxAudiences)
	}
	total := 0
	for _, a := range audience {
		switch {
		case a == "":
			return invalid("an audience is empty")
		case len(a) > MaxAudience:
			return invalid("an audience is %d bytes long; the most is %d", len(a), MaxAudience)
		case !utf8.ValidString(a):
			return invalid("an audience is not UTF-8 text")
		}
		total += len(a)
	}
	if total > maxAudienceBytes {
		return invalid("the audiences are %d bytes long together; the most is %d", total, maxAudienceBytes)
	}
	return nil
}

// claims returns the claims of a token, as JSON.
func (i *Issuer) claims(t *token, jti string, issued, expires time.Time) []byte {
	b := make([]byte, 0, 512)
	b = append(b, `{"sub":`...)
	b = appendString(b, t.id.String())
	b = append(b, `,"aud":[`...)
	for n, a := range t.audience {
		if n > 0 {
			b = append(b, ',')
		}
		b = appendString(b, a)
	}
	b = append(b, `],"exp":`...)
	b = strconv.AppendInt(b, expires.Unix(), 10)
	b = append(b, `,"iat":`...)
	b = strconv.AppendInt(b, issued.Unix(), 10)
	if jti != "" {
		b = append(b, `,"jti":`...)
		b = appendString(b, jti)
	}
	if i.jwtIssuer != "" {
		b = append(b, `,"iss":`...)
		b = appendString(b, i.jwtIssuer)
	}
	return append(b, '}')
}

// appendString appends a string as JSON.
func appendString(b []byte, s string) []byte {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(s) // a string always encodes
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// sign returns the token of some claims, in compact serialization.
func (s *jwtSigner) sign(claims []byte) (string, error) {
	enc := base64.RawURLEncoding
	b := make([]byte, 0, len(s.header)+enc.EncodedLen(len(claims))+1+enc.EncodedLen(512))
	b = append(b, s.header...)
	b = enc.AppendEncode(b, claims)
	h := s.hash.New()
	h.Write(b)
	digest := h.Sum(nil)
	signature, err := s.Signer.Sign(rand.Reader, digest, s.hash)
	if err != nil {
		return "", err
	}
	if s.Remote && !verifies(s.Signer.Public(), s.hash, digest, signature) {
		return "", errors.New("the authority's signature does not verify")
	}
	if s.half > 0 {
		if signature, err = fixedSize(signature, s.half); err != nil {
			return "", err
		}
	}
	b = append(b, '.')
	return string(enc.AppendEncode(b, signature)), nil
}

// fixedSize turns an ECDSA signature from ASN.1 into the form of RFC 7518
// §3.4: both numbers, one after the other, each of a fixed size.
func fixedSize(signature []byte, half int) ([]byte, error) {
	var r, s []byte
	in := cryptobyte.String(signature)
	if !in.ReadASN1(&in, asn1.SEQUENCE) || !in.ReadASN1Integer(&r) || !in.ReadASN1Integer(&s) || len(r) > half || len(s) > half {
		return nil, errors.New("the authority's signature is malformed")
	}
	out := make([]byte, 2*half)
	copy(out[half-len(r):], r)
	copy(out[2*half-len(s):], s)
	return out, nil
}

func verifies(public crypto.PublicKey, hash crypto.Hash, digest, signature []byte) bool {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	}
	return false
}
