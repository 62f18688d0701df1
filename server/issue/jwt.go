package issue

import (
	"cmp"
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
	"math/big"
	"strconv"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
)

// Bounds of what one may ask for in a JWT-SVID. A token of the largest
// audience fits into the headers that HTTP servers accept no longer; the
// bounds keep out what cannot be meant.
const (
	MaxAudiences     = 64
	MaxAudience      = 2048     // bytes of one: a SPIFFE ID fits
	maxAudienceBytes = 16 << 10 // of all
)

// token is what a JWT-SVID or a WIT-SVID is built from.
type token struct {
	reason string // for the record
	entry  string // for the record; its ID, if there is one

	id       spiffeid.ID
	audience []string // of a JWT-SVID
	key      []byte   // of a WIT-SVID: the public key that it is bound to, a JWK
	ttl      time.Duration
	jti      bool
	profile  *Profile           // of a JWT-SVID; nil: none
	status   *tokenstatus.Place // nil: none
}

// jwtKind is what JWT-SVIDs of one authority, or WIT-SVIDs, have in common.
type jwtKind struct {
	kind      string // for the record
	span      string // for traces
	typ       string // of the header
	authority func() (*authority.JWT, error)
	current   atomic.Pointer[jwtSigner]
}

// jwtSigner is an authority and what everything it signs has in common.
type jwtSigner struct {
	*authority.JWT
	header string // encoded, with the dot that follows
	hash   crypto.Hash
	half   int // octets of each half of an ECDSA signature; 0: RSA
	signed *tally
}

// jwtSigner returns the active authority of a kind.
func (i *Issuer) jwtSigner(p *jwtKind) (*jwtSigner, error) {
	a, err := p.authority()
	if err != nil {
		return nil, err
	}
	if s := p.current.Load(); s != nil && s.JWT == a {
		return s, nil
	}
	s, err := newJWTSigner(a, p.typ)
	if err != nil {
		return nil, fmt.Errorf("%s authority %s: %w", p.kind, a.ID, err)
	}
	s.signed = i.tallyOf(a.ID)
	p.current.Store(s)
	return s, nil
}

func newJWTSigner(a *authority.JWT, typ string) (*jwtSigner, error) {
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
	// JWT-SVID §2, WIT-SVID §2: alg, kid and typ, and no other.
	header, err := json.Marshal(struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}{string(a.Algorithm), a.ID, typ})
	if err != nil {
		return nil, err
	}
	s.header = base64.RawURLEncoding.EncodeToString(header) + "."
	return s, nil
}

// signJWT builds a JWT-SVID, signs and records it.
func (i *Issuer) signJWT(ctx context.Context, t token) (*JWTSVID, error) {
	if err := ValidateAudience(t.audience); err != nil {
		return nil, err
	}
	var err error
	if t.profile, err = i.profileOf(t.audience); err != nil {
		return nil, err
	}
	kind := &i.jwt
	if p := t.profile; p != nil {
		if p.rs256 {
			kind = &i.jwtRS256
		}
		if p.most > 0 {
			t.ttl = min(t.ttl, p.most)
		}
	}
	return i.signToken(ctx, kind, t)
}

// signToken builds a token of a kind, signs and records it.
func (i *Issuer) signToken(ctx context.Context, p *jwtKind, t token) (*JWTSVID, error) {
	ctx, span := telemetry.Span(ctx, p.span)
	defer span.End()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := i.jwtSigner(p)
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
	if i.status != nil {
		place, err := i.status.Take(ctx, expires)
		if err != nil {
			return nil, fmt.Errorf("sign the token of %s: %w", t.id, err)
		}
		t.status, expires = &place, place.ExpiresAt.Truncate(time.Second)
		if !expires.After(issued) {
			return nil, authority.ErrUnavailable
		}
	}
	var jti string
	switch {
	case !t.jti:
	case t.status != nil: // as unique, and what the token is revoked by
		jti = base64.RawURLEncoding.EncodeToString(t.status.Serial[:])
	default:
		var id [16]byte
		rand.Read(id[:]) // never fails
		jti = base64.RawURLEncoding.EncodeToString(id[:])
	}
	claims, err := i.claims(&t, jti, issued, expires)
	if err != nil {
		return nil, err
	}
	signed, err := s.sign(claims)
	if err != nil {
		return nil, fmt.Errorf("sign the token of %s: %w", t.id, err)
	}
	if t.status != nil {
		i.keep(ctx, t.id, s.ID, t.status.Serial[:], issued, expires)
	}
	s.signed.add(expires)
	i.metrics.Issued.WithLabelValues(p.kind, t.reason).Inc()
	if i.log.Enabled(ctx, slog.LevelInfo) {
		i.log.LogAttrs(ctx, slog.LevelInfo, "issued", recordJWT(p.kind, &t, s, jti, expires)...)
	}
	return &JWTSVID{ID: t.id, Token: signed, IssuedAt: issued, ExpiresAt: expires}, nil
}

// recordJWT returns what the record says of a token: never the token.
func recordJWT(kind string, t *token, s *jwtSigner, jti string, expires time.Time) []slog.Attr {
	attrs := append(make([]slog.Attr, 0, 8),
		slog.String("kind", kind),
		slog.String("for", t.reason),
		slog.String("id", t.id.String()),
		slog.String("kid", s.ID),
		slog.Time("expires", expires),
	)
	if len(t.audience) > 0 {
		attrs = append(attrs, slog.Any("audience", t.audience))
	}
	if jti != "" {
		attrs = append(attrs, slog.String("jti", jti))
	}
	if t.status != nil {
		attrs = append(attrs, slog.String("serial", new(big.Int).SetBytes(t.status.Serial[:]).String()))
	}
	if t.entry != "" {
		attrs = append(attrs, slog.String("entry", t.entry))
	}
	return attrs
}

// ValidateAudience checks the audience that someone asked for. Its errors are
// [InvalidError]s.
func ValidateAudience(audience []string) error {
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
func (i *Issuer) claims(t *token, jti string, issued, expires time.Time) ([]byte, error) {
	b := make([]byte, 0, 512)
	b = append(b, `{"sub":`...)
	b = appendString(b, t.id.String())
	for n, a := range t.audience {
		if n == 0 {
			b = append(b, `,"aud":[`...)
		} else {
			b = append(b, ',')
		}
		b = appendString(b, a)
	}
	if len(t.audience) > 0 {
		b = append(b, ']')
	}
	b = append(b, `,"exp":`...)
	b = strconv.AppendInt(b, expires.Unix(), 10)
	b = append(b, `,"iat":`...)
	b = strconv.AppendInt(b, issued.Unix(), 10)
	if jti != "" {
		b = append(b, `,"jti":`...)
		b = appendString(b, jti)
	}
	if t.status != nil { // draft-ietf-oauth-status-list §6.2
		b = append(b, `,"status":{"status_list":{"idx":`...)
		b = strconv.AppendUint(b, uint64(t.status.Index), 10)
		b = append(b, `,"uri":`...)
		b = appendString(b, t.status.URI)
		b = append(b, "}}"...)
	}
	if t.key != nil {
		b = append(b, `,"nbf":`...)
		b = strconv.AppendInt(b, issued.Add(-backdate).Unix(), 10)
		b = append(b, `,"cnf":{"jwk":`...)
		b = append(b, t.key...)
		return append(b, "}}"...), nil // no iss: WIT-SVID §3.7
	}
	iss := i.jwtIssuer
	if p := t.profile; p != nil {
		iss = cmp.Or(p.issuer, iss)
		var err error
		if b, err = p.appendClaims(b, t.id); err != nil {
			return nil, err
		}
	}
	if iss != "" {
		b = append(b, `,"iss":`...)
		b = appendString(b, iss)
	}
	return append(b, '}'), nil
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
