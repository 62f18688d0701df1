package issuer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

const (
	maxDocument = 256 << 10 // bytes; the largest in use have some ten keys with certificates, 30 KiB
	maxKeys     = 64        // of one issuer
	maxTried    = 16        // keys that a token without a key ID is tried with
	maxRSA      = 8192      // bits; the time to verify a signature grows with the square
	maxKeyID    = 1024      // bytes

	fetchTime = 10 * time.Second // both documents
	// freshTime is how long keys are taken without asking again: so long lives a
	// key that the issuer has withdrawn.
	freshTime = 5 * time.Minute
	// pause is how long nothing is fetched after a fetch, whatever tokens name.
	pause = 15 * time.Second
	// keepTime is how long keys are taken that could not be fetched again.
	keepTime = 6 * time.Hour
)

// key is one with which an issuer signs.
type key struct {
	id        string
	algorithm string // that it is for; empty: all that fit it
	public    crypto.PublicKey
}

// parseKeys reads a JWK Set. Keys of other kinds and for other ends are left
// out, as new ones may come at any time (RFC 7517 §5); private and symmetric
// ones are an error, since everybody has them now.
func parseKeys(data []byte) ([]key, error) {
	object, err := jwt.DecodeObject(data)
	if err != nil {
		return nil, err
	}
	list, ok := object["keys"].([]any)
	if !ok {
		return nil, errors.New("it has no list of keys")
	}
	if len(list) > maxKeys {
		return nil, fmt.Errorf("it has %d keys; the most is %d", len(list), maxKeys)
	}
	var out []key
	for n, one := range list {
		members, ok := one.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("key %d is no object", n+1)
		}
		for _, secret := range []string{"d", "k", "p", "q", "dp", "dq", "qi", "oth", "priv"} {
			if _, ok := members[secret]; ok {
				return nil, fmt.Errorf("key %d is not a public one", n+1)
			}
		}
		if !signs(members) {
			continue
		}
		delete(members, "x5c") // nothing is done with them, and they may be of any kind
		delete(members, "x5u")
		raw, err := json.Marshal(members)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", n+1, err)
		}
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(raw); errors.Is(err, jose.ErrUnsupportedKeyType) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("key %d: %w", n+1, err)
		}
		if r, ok := k.Key.(*rsa.PublicKey); ok && r.N.BitLen() > maxRSA || len(k.KeyID) > maxKeyID || !k.IsPublic() {
			continue
		}
		out = append(out, key{k.KeyID, k.Algorithm, k.Key})
	}
	if len(out) == 0 {
		return nil, errors.New("it has no key that signs")
	}
	return out, nil
}

// signs reports whether a JWK is for signatures, as far as it says (RFC 7517
// §4.2 and §4.3), and of a kind of key that tokens may be signed with.
func signs(members map[string]any) bool {
	if kty := members["kty"]; kty != "RSA" && kty != "EC" {
		return false
	}
	if use, ok := members["use"]; ok && use != "sig" && use != "jwt-svid" {
		return false
	}
	operations, ok := members["key_ops"]
	if !ok {
		return true
	}
	list, _ := operations.([]any)
	for _, operation := range list {
		if operation == "verify" {
			return true
		}
	}
	return false
}

// matching returns the keys that may have signed a token.
func matching(keys []key, kid string, a jwt.Algorithm) (out []key) {
	for _, k := range keys {
		if (kid == "" || k.id == kid) && (k.algorithm == "" || k.algorithm == a.Name) && a.Fits(k.public) == nil && len(out) < maxTried {
			out = append(out, k)
		}
	}
	return out
}

// file is keys in a file. It is read each time, which is cheap beside verifying
// a signature and misses no change.
type file struct {
	path string

	mu   sync.Mutex
	data []byte // that keys was made of
	keys []key
}

func (f *file) find(_ context.Context, kid string, a jwt.Algorithm) ([]key, error) {
	keys, err := f.load()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return matching(keys, kid, a), nil
}

func (f *file) load() ([]key, error) {
	data, err := readFile(f.path)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.keys != nil && bytes.Equal(f.data, data) {
		return f.keys, nil
	}
	keys, err := parseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("%s is no JWK Set: %w", f.path, err)
	}
	f.data, f.keys = data, keys
	return keys, nil
}

func readFile(path string) ([]byte, error) {
	// A pipe or a device could keep the reader waiting for ever.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readAll(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return data, nil
}

func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(data) > maxDocument {
		err = fmt.Errorf("it is larger than %d bytes", maxDocument)
	}
	return data, err
}

// remote is keys that are fetched: from a URL, or from where the discovery
// document says.
type remote struct {
	issuer   string
	discover string          // where the document is; empty: at is known
	at       string          // where the keys are
	hosts    map[string]bool // where discovered keys may be, as origin writes them
	loopback bool
	client   *http.Client
	now      func() time.Time
	log      *slog.Logger

	known atomic.Pointer[fetched]
	turn  chan struct{} // holds one: whoever takes it fetches
	tried time.Time     // when it was fetched last, or tried; of the holder of turn
	fails int           // in a row; of the holder of turn
}

// fetched is the keys as of a time.
type fetched struct {
	keys []key
	at   time.Time
}

func newRemote(c Config, issuer *url.URL, o Options) (*remote, error) {
	r := &remote{issuer: c.Issuer, at: c.JWKSURL, loopback: c.AllowLoopback, now: o.Now, log: o.Log, turn: make(chan struct{}, 1)}
	if c.JWKSURL != "" {
		if _, err := parseURL(c.JWKSURL, c.AllowLoopback); err != nil {
			return nil, fmt.Errorf("jwks_url %q: %w", clip(c.JWKSURL), err)
		}
	} else {
		// OpenID Connect Discovery §4.1: a slash at the end goes first.
		r.discover = strings.TrimSuffix(c.Issuer, "/") + "/.well-known/openid-configuration"
		r.hosts = map[string]bool{origin(issuer): true}
		for _, host := range c.JWKSHosts {
			u, err := parseURL("https://"+host, false)
			if err != nil || u.Path != "" || u.RawQuery != "" {
				return nil, fmt.Errorf("jwks_hosts has %q; write a host, or host:port", clip(host))
			}
			r.hosts[origin(u)] = true
		}
	}
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAPath != "" {
		data, err := readFile(c.CAPath)
		if err != nil {
			return nil, fmt.Errorf("ca_path: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("ca_path: %s holds no certificate; PEM is expected", c.CAPath)
		}
	}
	r.client = &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        tlsConfig,
			DisableKeepAlives:      true, // two requests in minutes
			DisableCompression:     true, // what is small could become large
			ForceAttemptHTTP2:      true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		// It would lead to where nobody configured.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return r, nil
}

// find returns the keys that fit. If those that are known do not, or are old,
// the keys are fetched: by one caller at a time, and not again within the pause.
// Who has a key that is known waits for nobody else.
func (r *remote) find(ctx context.Context, kid string, a jwt.Algorithm) ([]key, error) {
	found, fresh, _ := r.look(kid, a)
	if fresh && len(found) > 0 {
		return found, nil
	}
	if len(found) > 0 {
		select {
		case r.turn <- struct{}{}:
		default:
			return found, nil
		}
	} else {
		select {
		case r.turn <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
	defer func() { <-r.turn }()
	found, fresh, have := r.look(kid, a) // another may have fetched meanwhile
	if fresh && len(found) > 0 {
		return found, nil
	}
	if now := r.now(); r.tried.IsZero() || now.Sub(r.tried) >= pause {
		r.tried = now
		// One who goes away must not keep the others from the keys.
		err := r.refresh(context.WithoutCancel(ctx))
		found, _, have = r.look(kid, a)
		if !have {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if !have {
		return nil, fmt.Errorf("%w: they are asked for again in a moment", ErrUnavailable)
	}
	return found, nil
}

// look returns what is known: the keys that fit, whether they need no fetching,
// and whether there are any.
func (r *remote) look(kid string, a jwt.Algorithm) (found []key, fresh, have bool) {
	known := r.known.Load()
	if known == nil {
		return nil, false, false
	}
	age := r.now().Sub(known.at)
	if age >= keepTime {
		return nil, false, false
	}
	return matching(known.keys, kid, a), age < freshTime, true
}

func (r *remote) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	began := r.now()
	keys, err := r.fetch(ctx)
	if err != nil {
		r.fails++
		level := slog.LevelDebug // it is loud when the number of failures doubles
		if r.fails&(r.fails-1) == 0 {
			level = slog.LevelWarn
		}
		r.log.Log(ctx, level, "the keys of an issuer could not be fetched; those that are known stay for a while",
			"issuer", r.issuer, "failures", r.fails, "error", err)
		return err
	}
	if r.fails > 0 {
		r.log.Info("the keys of an issuer can be fetched again", "issuer", r.issuer)
	}
	r.fails = 0
	r.known.Store(&fetched{keys, began})
	return nil
}

func (r *remote) fetch(ctx context.Context) ([]key, error) {
	at := r.at
	if r.discover != "" {
		data, err := r.get(ctx, r.discover)
		if err != nil {
			return nil, err
		}
		if at, err = r.discovered(data); err != nil {
			return nil, fmt.Errorf("the document at %s: %w", r.discover, err)
		}
	}
	data, err := r.get(ctx, at)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("the JWK Set at %s: %w", at, err)
	}
	return keys, nil
}

// discovered reads a discovery document and returns where the keys are.
func (r *remote) discovered(data []byte) (string, error) {
	document, err := jwt.DecodeObject(data)
	if err != nil {
		return "", err
	}
	if document["issuer"] != r.issuer { // OpenID Connect Discovery §4.3
		text, _ := document["issuer"].(string)
		return "", fmt.Errorf("its issuer is %q, not %q", clip(text), r.issuer)
	}
	at, _ := document["jwks_uri"].(string)
	u, err := parseURL(at, r.loopback)
	if err != nil {
		return "", fmt.Errorf("its jwks_uri %q: %w", clip(at), err)
	}
	if !r.hosts[origin(u)] {
		return "", fmt.Errorf("its jwks_uri is on %s, which is not the issuer's host; add it to jwks_hosts if that is right", clip(u.Host))
	}
	return at, nil
}

func (r *remote) get(ctx context.Context, at string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json, application/jwk-set+json")
	req.Header.Set("User-Agent", "hallmark")
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: the answer is %d %s", at, resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && kind == "text/html" {
		return nil, fmt.Errorf("get %s: the answer is a web page", at)
	}
	data, err := readAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", at, err)
	}
	return data, nil
}
