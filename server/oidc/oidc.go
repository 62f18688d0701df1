// Package oidc publishes the JWT authorities of the trust domain as OpenID
// Connect Discovery 1.0 says, so that relying parties which know nothing of
// SPIFFE accept JWT-SVIDs: an [Issuer], made by [New], is an HTTP handler with
// two documents for each URL by which it is known, the metadata and the JWK Set.
// It has no secrets and takes no input but the host and path of a request.
package oidc

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

const (
	// MaxIssuers is how many URLs an issuer may have.
	MaxIssuers = 100
	maxURL     = 2048 // bytes

	// MetadataPath and KeysPath are where an issuer's documents are, after its URL.
	MetadataPath = "/.well-known/openid-configuration" // Discovery §4
	KeysPath     = "/keys"
)

// Options of [New]. All but Log and Next are required for serving; for checking
// a configuration URLs and AllowLoopback are enough.
type Options struct {
	// URLs are those by which the issuer is known: each is the claim iss of some
	// tokens.
	URLs []string
	// AllowLoopback allows http URLs of this machine. For trials.
	AllowLoopback bool
	// Bundle returns the newest bundle of the trust domain, or nil before there is
	// one.
	Bundle func() *bundle.Bundle
	// MaxAge is for how long a relying party may keep the documents: less than a
	// key is published before it signs, whole seconds.
	MaxAge time.Duration
	// Next serves what no issuer has. Default: it is not found.
	Next http.Handler
	Log  *slog.Logger // nil is silent
}

// Issuer publishes what verifies JWT-SVIDs. It is safe for concurrent use.
type Issuer struct {
	o     Options
	pages map[page]kind

	mu     sync.Mutex
	of     *bundle.Bundle
	keys   document
	signed []string // algorithms of the keys
}

// page is where a document is: a host in small letters, without the scheme's own
// port, and a path.
type page struct{ host, path string }

// kind is which document is there: the metadata of an issuer, or the keys if
// there is none.
type kind struct{ issuer string }

// document is what is served, with its tag.
type document struct {
	text []byte
	tag  string
}

func newDocument(text []byte) document {
	sum := sha256.Sum256(text)
	return document{text, `"` + hex.EncodeToString(sum[:16]) + `"`}
}

// New makes an issuer. It fails if a URL is none that discovery can be by, or if
// two contradict each other.
func New(o Options) (*Issuer, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch n := len(o.URLs); {
	case n == 0:
		return nil, errors.New("no URL is named; write one like https://id.example.org")
	case n > MaxIssuers:
		return nil, fmt.Errorf("%d URLs are named; the most is %d", n, MaxIssuers)
	}
	i := &Issuer{o: o, pages: make(map[page]kind)}
	for _, text := range o.URLs {
		u, err := parseURL(text, o.AllowLoopback)
		if err != nil {
			return nil, fmt.Errorf("%.200q %w; write one like https://id.example.org", text, err)
		}
		host := hostOf(u.Host)
		for at, is := range map[page]kind{{host, u.Path + MetadataPath}: {text}, {host, u.Path + KeysPath}: {}} {
			if _, twice := i.pages[at]; twice {
				return nil, fmt.Errorf("%.200q is there twice, or is below another", text)
			}
			i.pages[at] = is
		}
	}
	return i, nil
}

// parseURL checks the URL of an issuer: Discovery §3, and what cannot be
// misread. Relying parties compare it byte for byte.
func parseURL(text string, loopback bool) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil || len(text) > maxURL || u.Host == "" || u.User != nil || u.Opaque != "":
		return nil, errors.New("is no URL of a host")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.HasSuffix(text, "#"):
		return nil, errors.New("has a query or a fragment")
	case strings.HasSuffix(text, "/"):
		return nil, errors.New("ends with a slash, which relying parties write or leave out")
	case u.Path != u.EscapedPath() || strings.Contains(u.Path, "//") || strings.Contains(u.Path, "/."):
		return nil, errors.New("has a path that can be written in other ways")
	case u.Host != strings.ToLower(u.Host) || strings.HasSuffix(u.Hostname(), "."):
		return nil, errors.New("has a host that is not written in small letters, without a dot at its end")
	case u.Scheme == "http" && loopback && IsLoopback(u.Hostname()):
	case u.Scheme != "https":
		return nil, errors.New("is not https")
	}
	return u, nil
}

// IsLoopback reports whether a host is this machine, whatever its network.
func IsLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// hostOf returns the host of a URL or request in the one way to write it.
func hostOf(host string) string {
	host = strings.ToLower(host)
	for _, port := range []string{":443", ":80"} { // of https, and of a proxy's http
		if rest, ok := strings.CutSuffix(host, port); ok && (!strings.Contains(rest, ":") || strings.HasSuffix(rest, "]")) {
			return rest
		}
	}
	return host
}

// ServeHTTP answers GET and HEAD of an issuer's documents. A request's own host
// decides; what a proxy says in other headers does not.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	is, ok := i.pages[page{hostOf(r.Host), r.URL.Path}]
	switch {
	case !ok && i.o.Next != nil:
		i.o.Next.ServeHTTP(w, r)
		return
	case !ok:
		http.NotFound(w, r)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are served here", http.StatusMethodNotAllowed)
		return
	}
	d, err := i.document(is)
	if err != nil {
		i.o.Log.Error("the keys for relying parties cannot be published", "error", err)
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the keys cannot be published now", http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(i.o.MaxAge/time.Second)))
	h.Set("ETag", d.tag)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Access-Control-Allow-Origin", "*") // public, the same for everybody
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.text))
}

// document returns a document as the newest bundle has it.
func (i *Issuer) document(is kind) (document, error) {
	keys, algorithms, err := i.jwks()
	if err != nil || is.issuer == "" {
		return keys, err
	}
	text, err := json.Marshal(metadataOf(is.issuer, algorithms))
	return newDocument(text), err
}

// Documents returns the documents of an issuer, by its URL, for where somebody else
// serves them: as an [Issuer] serves them, and besides with the bundle's sequence
// number as spiffe_sequence, so that of two one can tell which is newer. Readers
// ignore members that they do not know: RFC 7517 §5, Discovery §3.
func Documents(issuer string, b *bundle.Bundle) (metadata, keys []byte, err error) {
	set, algorithms := keySet(b)
	m := metadataOf(issuer, algorithms)
	m.Sequence = b.SequenceNumber
	if metadata, err = json.Marshal(m); err != nil {
		return nil, nil, err
	}
	keys, err = json.Marshal(struct {
		jose.JSONWebKeySet
		Sequence uint64 `json:"spiffe_sequence"`
	}{set, b.SequenceNumber})
	return metadata, keys, err
}

func metadataOf(issuer string, algorithms []string) metadata {
	return metadata{
		Issuer:        issuer,
		JWKSURI:       issuer + KeysPath,
		ResponseTypes: []string{"id_token"},
		SubjectTypes:  []string{"public"},
		SigningAlgs:   algorithms,
		Claims:        []string{"aud", "exp", "iat", "iss", "sub"},
		ClaimTypes:    []string{"normal"},
	}
}

// metadata are those of Discovery §3 that hold of an issuer which gives tokens
// to workloads, not to clients of an authorization server: there are no
// endpoints. The algorithms are those of the keys, so RS256 is among them only
// if something signs with it.
type metadata struct {
	Issuer        string   `json:"issuer"`
	JWKSURI       string   `json:"jwks_uri"`
	ResponseTypes []string `json:"response_types_supported"`
	SubjectTypes  []string `json:"subject_types_supported"`
	SigningAlgs   []string `json:"id_token_signing_alg_values_supported"`
	Claims        []string `json:"claims_supported"`
	ClaimTypes    []string `json:"claim_types_supported"`
	Sequence      uint64   `json:"spiffe_sequence,omitempty"`
}

// jwks returns the JWT authorities as relying parties of OpenID Connect read
// them (RFC 7517 §4): in a SPIFFE bundle their use is another.
func (i *Issuer) jwks() (document, []string, error) {
	b := i.o.Bundle()
	if b == nil {
		return document{}, nil, errors.New("there is no bundle yet")
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.of == b {
		return i.keys, i.signed, nil
	}
	set, signed := keySet(b)
	text, err := json.Marshal(set)
	if err != nil {
		return document{}, nil, err
	}
	i.of, i.keys, i.signed = b, newDocument(text), signed
	return i.keys, i.signed, nil
}

// keySet returns the keys of a bundle that sign JWT-SVIDs, and their algorithms.
func keySet(b *bundle.Bundle) (set jose.JSONWebKeySet, signed []string) {
	set.Keys, signed = []jose.JSONWebKey{}, []string{}
	for _, a := range b.JWTAuthorities {
		algorithm, ok := algorithmOf(a.PublicKey)
		if !ok { // of a server that is newer, or of another maker
			continue
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: a.PublicKey, KeyID: a.KeyID, Use: "sig", Algorithm: string(algorithm)})
		if !slices.Contains(signed, string(algorithm)) {
			signed = append(signed, string(algorithm))
		}
	}
	slices.Sort(signed)
	return set, signed
}

// algorithmOf returns the one algorithm that a key's tokens are signed with.
func algorithmOf(public crypto.PublicKey) (jose.SignatureAlgorithm, bool) {
	switch k := public.(type) {
	case *rsa.PublicKey:
		return jose.RS256, true
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return jose.ES256, true
		case elliptic.P384():
			return jose.ES384, true
		}
	}
	return "", false
}
