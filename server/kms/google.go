package kms

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

const (
	googleEndpoint = "https://cloudkms.googleapis.com"
	googleScope    = "https://www.googleapis.com/auth/cloudkms"
	googlePage     = 1000
	googleMaxPages = 50
	// googlePoll is between two looks at a key that is being made: one in an HSM
	// takes seconds.
	googlePoll = 200 * time.Millisecond
)

var googlePart = regexp.MustCompile(`^[A-Za-z0-9:._-]{1,63}$`)

var googleAlgorithms = map[keyType]string{
	p256: "EC_SIGN_P256_SHA256", p384: "EC_SIGN_P384_SHA384", rsa2048: "RSA_SIGN_PKCS1_2048_SHA256",
	rsa3072: "RSA_SIGN_PKCS1_3072_SHA256", rsa4096: "RSA_SIGN_PKCS1_4096_SHA256",
}

// googleKMS keeps keys in Google's Cloud KMS: each a CryptoKey with one version.
// Labels say whose it is.
type googleKMS struct {
	owner  owner
	ring   string // URL
	level  string // of protection
	api    *cloud.Service
	tokens cloudauth.Tokens
}

func checkGoogle(u attributes) error {
	for _, name := range []string{"project", "location", "key-ring"} {
		if !googlePart.MatchString(u[name]) {
			return fmt.Errorf("uri has the %s %q; write cloudkms:project=PROJECT;location=LOCATION;key-ring=RING", name, u[name])
		}
	}
	if l := u["protection-level"]; l != "" && l != "software" && l != "hsm" {
		return fmt.Errorf("uri has the protection-level %q; it is software or hsm", l)
	}
	return checkEndpoint(u)
}

func openGoogle(_ context.Context, o Options, u attributes) (service, error) {
	g := &googleKMS{owner: o.owner(), api: cloud.API(), level: "SOFTWARE"}
	endpoint := u["endpoint"]
	if endpoint == "" {
		endpoint = googleEndpoint
	}
	g.ring = endpoint + "/v1/projects/" + u["project"] + "/locations/" + u["location"] + "/keyRings/" + u["key-ring"]
	if u["protection-level"] == "hsm" {
		g.level = "HSM"
	}
	var err error
	g.tokens, err = cloudauth.Google(googleScope)
	return g, err
}

func (g *googleKMS) key(name string) string {
	return g.ring + "/cryptoKeys/hallmark-" + short(g.owner.label(name), 16)
}

func (g *googleKMS) version(name string) string { return g.key(name) + "/cryptoKeyVersions/1" }

func (g *googleKMS) ask(ctx context.Context, method, where string, in, out any) error {
	token, err := g.tokens.Token(ctx)
	if err != nil {
		return err
	}
	return askWithToken(ctx, g.api, method, where, token, in, out)
}

// googleVersion is what the service says of a version.
type googleVersion struct {
	State      string    `json:"state"`
	CreateTime time.Time `json:"createTime"`
}

// is reports whether a version does not sign any more, for ever.
func (v *googleVersion) ended() bool {
	return slices.Contains([]string{"DESTROY_SCHEDULED", "DESTROYED", "GENERATION_FAILED"}, v.State)
}

func (g *googleKMS) create(ctx context.Context, name string, t keyType) error {
	id := g.key(name)
	err := g.ask(ctx, http.MethodPost, g.ring+"/cryptoKeys?cryptoKeyId="+id[strings.LastIndex(id, "/")+1:], map[string]any{
		"purpose":         "ASYMMETRIC_SIGN",
		"versionTemplate": map[string]string{"algorithm": googleAlgorithms[t], "protectionLevel": g.level},
		"labels": map[string]string{
			"hallmark-owner": g.owner.id(), "hallmark-key": name, "hallmark-server": googleLabel(g.owner.server),
			"hallmark-trust-domain": googleLabel(g.owner.trustDomain),
		},
	}, &struct{}{})
	if err != nil {
		return err
	}
	for {
		var v googleVersion
		switch err := g.ask(ctx, http.MethodGet, g.version(name), nil, &v); {
		case err != nil:
			return err
		case v.ended():
			return refusal{fmt.Errorf("it could not make the key (%s)", clip(v.State, 40))}
		case v.State != "PENDING_GENERATION":
			return nil
		}
		select {
		case <-time.After(googlePoll):
		case <-ctx.Done():
			return errors.New("it takes too long to make the key")
		}
	}
}

// googleLabel makes of a text what a label takes.
func googleLabel(text string) string {
	return clip(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '_'
	}, text), 63)
}

func (g *googleKMS) find(ctx context.Context, name string) (*found, error) {
	var v googleVersion
	if err := g.ask(ctx, http.MethodGet, g.version(name), nil, &v); err != nil {
		return nil, err
	}
	if v.ended() {
		return nil, apiv1.NotFoundError{Message: "the key is to be destroyed"}
	}
	if v.State != "ENABLED" {
		return nil, fmt.Errorf("the key is %s", strings.ToLower(clip(v.State, 40)))
	}
	var key struct {
		PEM string `json:"pem"`
	}
	if err := g.ask(ctx, http.MethodGet, g.version(name)+"/publicKey", nil, &key); err != nil {
		return nil, err
	}
	f := &found{}
	var err error
	if f.public, err = parsePublic(key.PEM); err != nil {
		return nil, err
	}
	t, err := typeOfPublic(f.public)
	member := map[keyType]string{p384: "sha384"}[t]
	if member == "" {
		member = "sha256"
	}
	f.sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		var signed struct {
			Signature []byte `json:"signature"`
		}
		err := g.ask(ctx, http.MethodPost, g.version(name)+":asymmetricSign", map[string]any{
			"digest": map[string]string{member: base64.StdEncoding.EncodeToString(digest)},
		}, &signed)
		return signed.Signature, gone(err)
	}
	return f, err
}

// parsePublic reads a public key in PEM.
func parsePublic(text string) (any, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("it answered without a public key")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, errors.New("it answered with something else than a public key")
	}
	return public, nil
}

func (g *googleKMS) remove(ctx context.Context, name string) error {
	var v googleVersion
	if err := g.ask(ctx, http.MethodGet, g.version(name), nil, &v); err != nil {
		return err
	}
	if v.ended() {
		return apiv1.NotFoundError{Message: "the key is to be destroyed"}
	}
	return g.ask(ctx, http.MethodPost, g.version(name)+":destroy", struct{}{}, &struct{}{})
}

// list returns the keys that are there. Of those whose only version was destroyed
// meanwhile it has nothing left.
func (g *googleKMS) list(ctx context.Context) (keys []Key, err error) {
	next := ""
	for range googleMaxPages {
		query := url.Values{"filter": {"labels.hallmark-owner=" + g.owner.id()}, "pageSize": {fmt.Sprint(googlePage)}}
		if next != "" {
			query.Set("pageToken", next)
		}
		var page struct {
			CryptoKeys []struct {
				Labels map[string]string `json:"labels"`
			} `json:"cryptoKeys"`
			Next string `json:"nextPageToken"`
		}
		if err := g.ask(ctx, http.MethodGet, g.ring+"/cryptoKeys?"+query.Encode(), nil, &page); err != nil {
			return nil, err
		}
		for _, one := range page.CryptoKeys {
			name := one.Labels["hallmark-key"]
			if one.Labels["hallmark-owner"] != g.owner.id() || checkRemoteName(name) != nil {
				continue
			}
			var v googleVersion
			switch err := g.ask(ctx, http.MethodGet, g.version(name), nil, &v); {
			case errors.Is(err, apiv1.NotFoundError{}): // another key's label, or none left
			case err != nil:
				return nil, err
			case v.State == "DESTROYED":
				g.forget(ctx, name)
			case !v.ended():
				keys = append(keys, Key{name, v.CreateTime})
			}
			if len(keys) == maxKeys {
				return keys, nil
			}
		}
		if next = page.Next; next == "" {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("the key ring has more than %d keys of this server", googleMaxPages*googlePage)
}

// forget removes what is left of a key. It costs nothing, and the permission may
// not be there, so that it does not matter if it stays.
func (g *googleKMS) forget(ctx context.Context, name string) {
	if g.ask(ctx, http.MethodDelete, g.version(name), nil, &struct{}{}) == nil {
		_ = g.ask(ctx, http.MethodDelete, g.key(name), nil, &struct{}{})
	}
}
