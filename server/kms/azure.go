package kms

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

const (
	azureVersion  = "api-version=7.4"
	azureMaxPages = 500
)

var azureVault = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9-]{1,126}$`)

// azureKMS keeps keys in an Azure Key Vault, or a managed HSM. Tags say whose a key is.
type azureKMS struct {
	owner  owner
	vault  string // URL
	hsm    string // after the types of keys
	api    *cloud.Service
	tokens cloudauth.Tokens
}

func checkAzure(u attributes) error {
	if (u["vault"] == "") == (u["endpoint"] == "") {
		return errors.New("uri names no vault, or two; write azurekms:vault=NAME, or endpoint=URL of one outside of Azure's public cloud")
	}
	if v := u["vault"]; v != "" && !azureVault.MatchString(v) {
		return fmt.Errorf("uri has the vault %q; write its name alone, as in azurekms:vault=NAME", v)
	}
	if h := u["hsm"]; h != "" && h != "true" && h != "false" {
		return fmt.Errorf("uri has hsm=%s; it is true or false", h)
	}
	return checkEndpoint(u)
}

func openAzure(_ context.Context, o Options, u attributes) (service, error) {
	a := &azureKMS{owner: o.owner(), vault: u["endpoint"], api: cloud.API()}
	scope := "https://vault.azure.net/.default"
	if a.vault == "" {
		a.vault = "https://" + u["vault"] + ".vault.azure.net"
	} else if at, err := url.Parse(a.vault); err == nil {
		// The vaults of a cloud, or of the HSMs in one, share what tokens are for.
		if _, service, ok := strings.Cut(at.Hostname(), "."); ok && at.Scheme == "https" {
			scope = "https://" + service + "/.default"
		}
	}
	if u["hsm"] == "true" {
		a.hsm = "-HSM"
	}
	var err error
	a.tokens, err = cloudauth.Azure(scope)
	return a, err
}

func (a *azureKMS) key(name string) string {
	return a.vault + "/keys/hallmark-" + short(a.owner.label(name), 16)
}

func (a *azureKMS) ask(ctx context.Context, method, where string, in, out any) error {
	token, err := a.tokens.Token(ctx)
	if err != nil {
		return err
	}
	return askWithToken(ctx, a.api, method, where, token, in, out)
}

func (a *azureKMS) create(ctx context.Context, name string, t keyType) error {
	in := map[string]any{
		"key_ops":    []string{"sign", "verify"},
		"attributes": map[string]any{"enabled": true, "exportable": false},
		"tags": map[string]string{
			"hallmark-owner": a.owner.id(), "hallmark-key": name,
			"hallmark-trust-domain": clip(a.owner.trustDomain, 256), "hallmark-server": clip(a.owner.server, 256),
		},
	}
	switch t {
	case p256, p384:
		in["kty"], in["crv"] = "EC"+a.hsm, map[keyType]string{p256: "P-256", p384: "P-384"}[t]
	case rsa2048, rsa3072, rsa4096:
		in["kty"], in["key_size"] = "RSA"+a.hsm, map[keyType]int{rsa2048: 2048, rsa3072: 3072, rsa4096: 4096}[t]
	}
	return a.ask(ctx, http.MethodPost, a.key(name)+"/create?"+azureVersion, in, &struct{}{})
}

// azureKey is what the vault says of a key: a JSON Web Key (RFC 7517), and more.
type azureKey struct {
	Key struct {
		ID  string `json:"kid"`
		Kty string `json:"kty"`
		Crv string `json:"crv"`
		X   string `json:"x"`
		Y   string `json:"y"`
		N   string `json:"n"`
		E   string `json:"e"`
	} `json:"key"`
}

// base64url decodes what JSON Web Keys have. RFC 7515 §2.
func base64url(text string) ([]byte, error) {
	return base64.RawURLEncoding.DecodeString(strings.TrimRight(text, "="))
}

func (k *azureKey) public() (any, error) {
	wrong := errors.New("it answered without a public key")
	decode := func(text string, most int) []byte {
		data, err := base64url(text)
		if err != nil || len(data) == 0 || len(data) > most {
			return nil
		}
		return data
	}
	switch strings.TrimSuffix(k.Key.Kty, "-HSM") {
	case "EC":
		curve := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384()}[k.Key.Crv]
		if curve == nil {
			return nil, wrong
		}
		size := curve.Params().BitSize / 8
		x, y := decode(k.Key.X, size), decode(k.Key.Y, size)
		if x == nil || y == nil {
			return nil, wrong
		}
		raw := make([]byte, 1+2*size)
		raw[0] = 4 // SEC 1 §2.3.3
		copy(raw[1+size-len(x):], x)
		copy(raw[1+2*size-len(y):], y)
		public, err := ecdsa.ParseUncompressedPublicKey(curve, raw)
		if err != nil {
			return nil, wrong
		}
		return public, nil
	case "RSA":
		n, e := decode(k.Key.N, 1024), decode(k.Key.E, 4)
		if n == nil || e == nil {
			return nil, wrong
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}, nil
	}
	return nil, wrong
}

func (a *azureKMS) find(ctx context.Context, name string) (*found, error) {
	var key azureKey
	if err := a.ask(ctx, http.MethodGet, a.key(name)+"?"+azureVersion, nil, &key); err != nil {
		return nil, err
	}
	// The key of this version, so that a later one is not signed with unawares.
	version, ours := strings.CutPrefix(key.Key.ID, a.key(name)+"/")
	if !ours || !azureVault.MatchString("v"+version) {
		return nil, errors.New("it answered with the key of another name")
	}
	f := &found{}
	var err error
	if f.public, err = key.public(); err != nil {
		return nil, err
	}
	t, err := typeOfPublic(f.public)
	f.sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		var signed struct {
			Value string `json:"value"`
		}
		err := a.ask(ctx, http.MethodPost, a.key(name)+"/"+version+"/sign?"+azureVersion, map[string]string{
			"alg": t.jws(), "value": base64.RawURLEncoding.EncodeToString(digest),
		}, &signed)
		if err != nil {
			return nil, gone(err)
		}
		raw, err := base64url(signed.Value)
		if err != nil {
			return nil, errors.New("it answered without a signature")
		}
		if _, ok := f.public.(*ecdsa.PublicKey); ok {
			return derSignature(raw)
		}
		return raw, nil
	}
	return f, err
}

// derSignature makes of a signature with ECDSA as JWS has it (RFC 7518 §3.4) one
// in DER.
func derSignature(raw []byte) ([]byte, error) {
	if len(raw) == 0 || len(raw)%2 != 0 || len(raw) > 132 {
		return nil, errors.New("it answered with something else than a signature")
	}
	half := len(raw) / 2
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(new(big.Int).SetBytes(raw[:half]))
		b.AddASN1BigInt(new(big.Int).SetBytes(raw[half:]))
	})
	return b.Bytes()
}

// remove leaves the key recoverable for as long as the vault keeps what was
// deleted. It does not sign meanwhile.
func (a *azureKMS) remove(ctx context.Context, name string) error {
	return a.ask(ctx, http.MethodDelete, a.key(name)+"?"+azureVersion, nil, &struct{}{})
}

// list looks through all keys of the vault, which does not look for tags.
func (a *azureKMS) list(ctx context.Context) (keys []Key, err error) {
	next := a.vault + "/keys?maxresults=25&" + azureVersion
	for range azureMaxPages {
		var page struct {
			Value []struct {
				ID         string `json:"kid"`
				Attributes struct {
					Created int64 `json:"created"`
				} `json:"attributes"`
				Tags map[string]string `json:"tags"`
			} `json:"value"`
			Next string `json:"nextLink"`
		}
		if err := a.ask(ctx, http.MethodGet, next, nil, &page); err != nil {
			return nil, err
		}
		for _, one := range page.Value {
			name := one.Tags["hallmark-key"]
			if one.Tags["hallmark-owner"] == a.owner.id() && checkRemoteName(name) == nil && one.ID == a.key(name) {
				keys = append(keys, Key{name, time.Unix(one.Attributes.Created, 0)})
			}
		}
		switch next = page.Next; {
		case next == "" || len(keys) >= maxKeys:
			return keys, nil
		case !strings.HasPrefix(next, a.vault+"/keys?"): // the token goes nowhere else
			return nil, errors.New("it answered with a next page that is elsewhere")
		}
	}
	return nil, fmt.Errorf("the vault has more than %d keys", azureMaxPages*25)
}
