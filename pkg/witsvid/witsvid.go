// Package witsvid is for workloads that prove who they are with WIT-SVIDs, and
// for those who let them in.
//
// A WIT-SVID says which key a workload holds. It is no bearer token: whoever
// saw one can show it, so it counts only with a proof of that key. The proof
// here is a workload proof token (WPT, draft-ietf-wimse-wpt-01), made anew for
// each HTTP request and sent beside the WIT-SVID over TLS.
//
// A client gives its HTTP client a [Transport]:
//
//	source, err := workloadapi.NewWITSource(ctx)
//	client := &http.Client{Transport: &witsvid.Transport{ID: id, SVIDs: source}}
//
// A server puts a [Verifier] before its handlers, which then find the caller
// by [FromContext]:
//
//	v, err := witsvid.NewVerifier(witsvid.Config{Origins: []string{"https://api.example.org"}, Bundles: source})
//	server.Handler = v.Handler(api)
//
// An [SVID] in hand means that the proof was checked. What it does not bind is
// the request's method, query and body: the draft binds the target alone.
//
// WIT-SVID is a standard in incubation: this package follows it, and is not
// yet stable either. Read the bundles of files or endpoints with go-spiffe's
// spiffebundle, which takes the keys for WIT-SVIDs and no others; its
// witbundle.Parse takes every key it sees.
package witsvid

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

const (
	// MaxToken is how long a token may be, in bytes.
	MaxToken = jwt.MaxToken
	// Leeway is how far the clocks of issuer, caller and validator may differ.
	Leeway = jwt.Leeway

	tokenType = "wit+jwt"
)

// SVID is a WIT-SVID whose holder has proved that it has the key.
type SVID struct {
	ID        spiffeid.ID
	ExpiresAt time.Time
	// Claims are all claims, as encoding/json decodes them, with numbers as
	// json.Number.
	Claims map[string]any
}

// Unproven is a WIT-SVID that is valid, shown by nobody knows whom. Let nobody
// in by it.
type Unproven struct {
	ID        spiffeid.ID
	ExpiresAt time.Time
	NotBefore time.Time // zero: the token does not say
	Claims    map[string]any

	// Key is the key that the holder has to prove, with the algorithm
	// (RFC 7518) that the proof has to use.
	Key       crypto.PublicKey
	Algorithm string
}

// ValidateWithoutProof checks a WIT-SVID by itself at now, for those who check
// the proof of possession in another way than a [Verifier] does. The error says
// what is wrong with the token; it holds nothing of the token but names of
// headers, claims and IDs.
func ValidateWithoutProof(token string, bundles witbundle.Source, now time.Time) (*Unproven, error) {
	t, err := jwt.Parse(token)
	if err != nil {
		return nil, err
	}
	kid, err := checkHeader(t, tokenType)
	if err != nil {
		return nil, err
	}
	if kid == "" { // WIT-SVID §2.1
		return nil, errors.New("header: it names no key ID")
	}
	u := &Unproven{Claims: t.Claims}
	if u.ID, err = t.Subject(); err != nil {
		return nil, err
	}
	td := u.ID.TrustDomain()
	b, err := bundles.GetWITBundleForTrustDomain(td)
	if err != nil || b == nil {
		return nil, fmt.Errorf("no bundle for trust domain %q", td.Name())
	}
	if b.TrustDomain() != td {
		return nil, fmt.Errorf("the bundle for trust domain %q is of %q", td.Name(), b.TrustDomain().Name())
	}
	key, ok := b.FindWITAuthority(kid)
	if !ok {
		return nil, fmt.Errorf("trust domain %q has no WIT key with this key ID", td.Name())
	}
	if err := t.Verify(key); err != nil {
		return nil, err
	}
	if _, ok := t.Claims["aud"]; ok { // WIT-SVID §3.8
		return nil, errors.New("a WIT-SVID has no claim aud")
	}
	if u.ExpiresAt, u.NotBefore, err = t.ValidAt(now); err != nil {
		return nil, err
	}
	if u.Key, u.Algorithm, err = confirmation(t.Claims); err != nil {
		return nil, fmt.Errorf("claim cnf: %w", err)
	}
	return u, nil
}

// checkHeader checks that a token is of a type and has no critical extension,
// none of which are known here, and returns its key ID. Other members of the
// header mean nothing. WIT-SVID §2, RFC 7515 §4.1.11.
func checkHeader(t *jwt.Token, want string) (kid string, err error) {
	if typ, _ := t.HeaderText("typ"); typ != want {
		return "", fmt.Errorf("header: type %q is not %s", typ, want)
	}
	if _, ok := t.Header["crit"]; ok {
		return "", errors.New("header: a critical extension is not known here")
	}
	kid, _ = t.HeaderText("kid")
	return kid, nil
}

// privateMembers are those of a JWK that hold what must stay with its owner
// (RFC 7518 §6.2.2, §6.3.2, §6.4).
var privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"}

// confirmation returns the key that a token is bound to and its algorithm.
// WIT-SVID §3.2, RFC 7800 §3.1 and §3.2.
func confirmation(claims map[string]any) (crypto.PublicKey, string, error) {
	cnf, ok := claims["cnf"].(map[string]any)
	if !ok {
		return nil, "", errors.New("it is missing or not an object")
	}
	for _, other := range []string{"jwe", "jku"} {
		if _, ok := cnf[other]; ok {
			return nil, "", fmt.Errorf("it names a key by %s beside jwk", other)
		}
	}
	members, ok := cnf["jwk"].(map[string]any)
	if !ok {
		return nil, "", errors.New("jwk is missing or not an object")
	}
	for _, name := range privateMembers {
		if _, ok := members[name]; ok {
			return nil, "", fmt.Errorf("jwk has the private member %s", name)
		}
	}
	name, ok := members["alg"].(string)
	if !ok {
		return nil, "", errors.New("jwk names no algorithm")
	}
	alg, err := jwt.AlgorithmOf(name)
	if err != nil {
		return nil, "", fmt.Errorf("jwk: %w", err)
	}
	encoded, err := json.Marshal(members)
	if err != nil {
		return nil, "", fmt.Errorf("jwk: %w", err)
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(encoded); err != nil {
		return nil, "", errors.New("jwk is not a public key: EC on its curve, or RSA")
	}
	if err := alg.Fits(jwk.Key); err != nil {
		return nil, "", fmt.Errorf("jwk: %w", err)
	}
	return jwk.Key, alg.Name, nil
}
