package witsvid

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	spiffewit "github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

// The header fields of a request that carry a WIT-SVID and its proof.
const (
	TokenHeader = "Workload-Identity-Token"
	ProofHeader = "Workload-Proof-Token"

	transactionHeader = "Txn-Token" // draft-ietf-oauth-transaction-tokens

	proofType = "wpt+jwt"
)

// ProofLifetime is how long a proof made here is valid. With [Leeway] it covers
// what clocks differ; a request on its way takes less.
const ProofLifetime = 30 * time.Second

// Prove sets the header fields with which a request proves an SVID that the
// Workload API gave. Tokens are as of [Transport.Tokens]. What the request
// carries in them, and its URL, must not change afterwards.
func Prove(r *http.Request, svid *spiffewit.SVID, tokens []string, now time.Time) error {
	target, err := targetOf(r.URL)
	if err != nil {
		return err
	}
	if !now.Before(svid.Expiry) {
		return fmt.Errorf("the WIT-SVID of %s expired at %s", svid.ID, svid.Expiry.Format(time.RFC3339))
	}
	token := svid.Marshal()
	t, err := jwt.Parse(token)
	if err != nil {
		return fmt.Errorf("the WIT-SVID of %s: %w", svid.ID, err)
	}
	public, alg, err := confirmation(t.Claims)
	if err != nil {
		return fmt.Errorf("the WIT-SVID of %s: claim cnf: %w", svid.ID, err)
	}
	key, ok := svid.PrivateKey.(crypto.Signer)
	if !ok {
		return fmt.Errorf("the WIT-SVID of %s came without its private key", svid.ID)
	}
	if p, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !p.Equal(public) {
		return fmt.Errorf("the private key of %s is not that of its WIT-SVID", svid.ID)
	}
	hashes, err := boundTokens(r.Header, tokens)
	if err != nil {
		return err
	}
	proof, err := sign(key, alg, &proofClaims{
		Audience: target, Expiry: now.Add(ProofLifetime).Unix(), ID: rand.Text(), // over 128 random bits
		TokenHash: hash(token), boundHashes: hashes,
	})
	if err != nil {
		return fmt.Errorf("prove the WIT-SVID of %s: %w", svid.ID, err)
	}
	r.Header.Set(TokenHeader, token)
	r.Header.Set(ProofHeader, proof)
	return nil
}

type proofClaims struct {
	Audience  string `json:"aud"`
	Expiry    int64  `json:"exp"`
	ID        string `json:"jti"`
	TokenHash string `json:"wth"`
	boundHashes
}

// boundHashes are the claims that bind other tokens of a request.
type boundHashes struct {
	Access      string            `json:"ath,omitempty"`
	Transaction string            `json:"tth,omitempty"`
	Other       map[string]string `json:"oth,omitempty"`
}

func sign(key crypto.Signer, alg string, claims *proofClaims) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: key}, (&jose.SignerOptions{}).WithType(proofType))
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// hash is how a proof names a token.
func hash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// targetOf returns the target of a request as a proof names it: scheme, host
// and path, in one way of writing.
func targetOf(u *url.URL) (string, error) {
	switch {
	case u.Scheme != "https": // WIT-SVID §7.3
		return "", fmt.Errorf("a WIT-SVID is shown over https alone, not over %q", u.Scheme)
	case u.Hostname() == "" || u.Opaque != "":
		return "", errors.New("the URL has no host")
	case u.User != nil:
		return "", errors.New("the URL has user info")
	}
	return originOf(u) + pathOf(u), nil
}

func originOf(u *url.URL) string {
	return "https://" + strings.TrimSuffix(strings.ToLower(u.Host), ":443")
}

func pathOf(u *url.URL) string {
	if path := u.EscapedPath(); path != "" {
		return path
	}
	return "/"
}

// boundTokens returns the hashes of the tokens in a request, beside the
// WIT-SVID: an access token, a transaction token, and the fields named.
func boundTokens(h http.Header, tokens []string) (boundHashes, error) {
	var out boundHashes
	if err := checkTokens(tokens); err != nil {
		return out, err
	}
	access, err := accessToken(h)
	if err != nil {
		return out, err
	}
	if access != "" {
		out.Access = hash(access)
	}
	if out.Transaction, err = fieldHash(h, transactionHeader); err != nil {
		return out, err
	}
	for _, name := range tokens {
		sum, err := fieldHash(h, name)
		if err != nil {
			return out, err
		}
		if sum == "" {
			continue
		}
		if out.Other == nil {
			out.Other = make(map[string]string, len(tokens))
		}
		out.Other[strings.ToLower(name)] = sum
	}
	return out, nil
}

// checkTokens refuses fields that are bound in a way of their own.
func checkTokens(tokens []string) error {
	own := []string{"Authorization", transactionHeader, TokenHeader, ProofHeader}
	for _, name := range tokens {
		if name == "" || slices.ContainsFunc(own, func(o string) bool { return strings.EqualFold(o, name) }) {
			return fmt.Errorf("tokens: %q is not a field of another token", name)
		}
	}
	return nil
}

// fieldHash returns the hash of a header field, or "" if it is not there.
func fieldHash(h http.Header, name string) (string, error) {
	switch values := h.Values(name); len(values) {
	case 0:
		return "", nil
	case 1:
		return hash(strings.Trim(values[0], " ")), nil
	default:
		return "", fmt.Errorf("the request has %d fields %s; a proof binds one", len(values), name)
	}
}

// accessToken returns the OAuth access token of a request, or "". A WIT-SVID is
// none: WIT-SVID §5.
func accessToken(h http.Header) (string, error) {
	values := h.Values("Authorization")
	if len(values) > 1 {
		return "", fmt.Errorf("the request has %d fields Authorization; one is allowed", len(values))
	}
	if len(values) == 0 {
		return "", nil
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	token = strings.Trim(token, " ")
	if isWIT(token) || isWIT(scheme) {
		return "", errors.New("a WIT-SVID is no bearer token: send it in " + TokenHeader + " with its proof, not in Authorization")
	}
	if strings.EqualFold(scheme, "Bearer") || strings.EqualFold(scheme, "DPoP") {
		return token, nil
	}
	return "", nil
}

// isWIT reports whether a token says of itself that it is a WIT-SVID, valid or
// not.
func isWIT(token string) bool {
	head, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(head, "="))
	if err != nil {
		return false
	}
	var header struct {
		Type string `json:"typ"`
	}
	return json.Unmarshal(raw, &header) == nil && strings.TrimPrefix(strings.ToLower(header.Type), "application/") == tokenType
}
