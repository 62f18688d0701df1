package statuslist

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

const (
	// Type is the typ of a status list token. TSL §5.1.
	Type = "statuslist+jwt"
	// MediaType is that of a status list token over HTTP. TSL §8.2.
	MediaType = "application/" + Type

	// MaxToken is how long a status list token may be, in bytes: one of [MaxSize]
	// that does not compress.
	MaxToken = 2 << 20
	maxURI   = 2048 // bytes
	// maxIndex is the highest index that a list of MaxSize can have.
	maxIndex = 8*MaxSize - 1
	// maxTTL is the longest ttl that is believed.
	maxTTL = 24 * time.Hour
)

// Reference is where the status of a token is. TSL §6.2.
type Reference struct {
	URI   string
	Index int
}

// ReferenceOf returns the reference in a token's claims, as encoding/json decodes
// them, with numbers as json.Number or float64 (go-spiffe's). It returns false if the token has no claim
// status, or none that is a status list, and fails if that cannot be read.
func ReferenceOf(claims map[string]any) (Reference, bool, error) {
	status, ok := claims["status"]
	if !ok {
		return Reference{}, false, nil
	}
	object, ok := status.(map[string]any)
	if !ok {
		return Reference{}, false, errors.New("claim status is not an object")
	}
	value, ok := object["status_list"]
	if !ok {
		return Reference{}, false, nil
	}
	list, ok := value.(map[string]any)
	if !ok {
		return Reference{}, false, errors.New("claim status: status_list is not an object")
	}
	uri, _ := list["uri"].(string)
	if uri == "" || len(uri) > maxURI {
		return Reference{}, false, fmt.Errorf("claim status: uri is missing, no string, or longer than %d bytes", maxURI)
	}
	index, ok := integer(list["idx"])
	if !ok || index < 0 || index > maxIndex {
		return Reference{}, false, fmt.Errorf("claim status: idx is missing or no integer from 0 to %d", maxIndex)
	}
	return Reference{uri, index}, true, nil
}

// integer returns a number of a claim that is one, and false for all else.
func integer(value any) (int, bool) {
	switch n := value.(type) {
	case json.Number:
		i, err := strconv.Atoi(n.String())
		return i, err == nil
	case float64: // exact, for what maxIndex allows
		return int(n), n == math.Trunc(n) && math.Abs(n) <= maxIndex
	}
	return 0, false
}

// Token is a status list token that was good when it was read.
type Token struct {
	List      *List
	IssuedAt  time.Time
	ExpiresAt time.Time     // zero: it does not say
	TTL       time.Duration // how long it may be held before a newer one is to be fetched; 0: it does not say

	keyID string
	key   crypto.PublicKey // that verified it
}

// trusted reports whether a bundle has the key that verified the list.
func (t *Token) trusted(b *bundle.Bundle) bool {
	key, ok := b.JWTKey(t.keyID).(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(t.key)
}

// Verify reads the status list token that was fetched from a URI. A JWT
// authority of the bundle must have signed it; now must be before its end. TSL
// §8.3.
func Verify(token, uri string, b *bundle.Bundle, now time.Time) (*Token, error) {
	t, err := jwt.ParseUpTo(token, MaxToken)
	if err != nil {
		return nil, err
	}
	if typ, _ := t.HeaderText("typ"); typ != Type {
		return nil, fmt.Errorf("type %.40q is not that of a status list token", typ)
	}
	if _, ok := t.Header["crit"]; ok { // RFC 7515 §4.1.11: none is understood here
		return nil, errors.New("its header has critical members")
	}
	kid, _ := t.HeaderText("kid")
	key := b.JWTKey(kid)
	if kid == "" || key == nil {
		return nil, fmt.Errorf("trust domain %q has no JWT key with its key ID", b.TrustDomain.Name())
	}
	if err := t.Verify(key); err != nil {
		return nil, err
	}
	if sub, _ := t.Claims["sub"].(string); sub != uri {
		return nil, fmt.Errorf("it is the list of %.200q, not of %.200q", sub, uri)
	}
	out := &Token{keyID: kid, key: key}
	if out.IssuedAt, err = t.Date("iat"); err != nil {
		return nil, err
	}
	if now.Add(jwt.Leeway).Before(out.IssuedAt) {
		return nil, fmt.Errorf("it was issued at %s, which is yet to come", out.IssuedAt.UTC().Format(time.RFC3339))
	}
	if _, ok := t.Claims["exp"]; ok {
		if out.ExpiresAt, _, err = t.ValidAt(now); err != nil {
			return nil, err
		}
	}
	if out.TTL, err = ttlOf(t.Claims); err != nil {
		return nil, err
	}
	out.List, err = listOf(t.Claims)
	return out, err
}

// ttlOf returns the claim ttl: a positive number of seconds.
func ttlOf(claims map[string]any) (time.Duration, error) {
	value, ok := claims["ttl"]
	if !ok {
		return 0, nil
	}
	number, _ := value.(json.Number)
	seconds, err := number.Float64()
	if err != nil || !(seconds > 0) || math.IsInf(seconds, 0) {
		return 0, errors.New("claim ttl is no positive number")
	}
	return max(time.Duration(min(seconds, maxTTL.Seconds())*float64(time.Second)), time.Nanosecond), nil
}

// listOf returns the claim status_list. TSL §4.2.
func listOf(claims map[string]any) (*List, error) {
	object, ok := claims["status_list"].(map[string]any)
	if !ok {
		return nil, errors.New("claim status_list is missing or no object")
	}
	bits, ok := integer(object["bits"])
	if !ok {
		return nil, errors.New("claim status_list: bits is missing or no integer")
	}
	text, ok := object["lst"].(string)
	if !ok || strings.ContainsAny(text, "\r\n") { // which the decoder would skip
		return nil, errors.New("claim status_list: lst is missing or no base64url")
	}
	compressed, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, errors.New("claim status_list: lst is no base64url without padding")
	}
	return Decompress(bits, compressed)
}
