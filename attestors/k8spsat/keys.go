package k8spsat

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const (
	maxKeysFile = 1 << 20 // bytes
	minRSA      = 2048    // bits
	skew        = 30 * time.Second
)

// algorithms are those that Kubernetes signs tokens with.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512}

// keys verifies tokens by the cluster's public keys.
type keys struct {
	path     string
	issuer   string
	audience []string
	now      func() time.Time

	mu   sync.Mutex
	data []byte // that set was made of
	set  *jose.JSONWebKeySet
}

// claims are those that Kubernetes writes into a token besides the standard's.
type claims struct {
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount named  `json:"serviceaccount"`
		Pod            named  `json:"pod"`
		Node           named  `json:"node"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

func (k *keys) verify(_ context.Context, token string) (*agent, error) {
	set, err := k.load()
	if err != nil {
		return nil, unavailable{err}
	}
	parsed, err := jwt.ParseSigned(token, algorithms)
	if err != nil || len(parsed.Headers) != 1 {
		return nil, errors.New("token is no JWT that a cluster signs")
	}
	found := set.Key(parsed.Headers[0].KeyID)
	if parsed.Headers[0].KeyID == "" || len(found) != 1 {
		return nil, errors.New("token is signed by a key that is none of the cluster's")
	}
	var standard jwt.Claims
	var more claims
	if err := parsed.Claims(found[0].Key, &standard, &more); err != nil {
		return nil, errors.New("token's signature or claims are wrong")
	}
	now, of := k.now(), &more.Kubernetes
	switch {
	case standard.Issuer != k.issuer:
		return nil, errors.New("token is of another issuer than the cluster's")
	case !slices.ContainsFunc(standard.Audience, func(a string) bool { return slices.Contains(k.audience, a) }):
		return nil, errors.New("token has not the audience that this server expects")
	case standard.Expiry == nil || !now.Before(standard.Expiry.Time()):
		return nil, errors.New("token has ended, or never would")
	case standard.NotBefore != nil && now.Add(skew).Before(standard.NotBefore.Time()):
		return nil, errors.New("token is not valid yet")
	case standard.Subject != "system:serviceaccount:"+of.Namespace+":"+of.ServiceAccount.Name:
		return nil, errors.New("token is of no service account, or names two")
	case of.Pod.Name == "" || of.Pod.UID == "":
		return nil, errors.New("token is not bound to a pod; use a projected service account token")
	case of.Node.Name == "" || of.Node.UID == "":
		return nil, errors.New("token does not name its pod's node; the cluster writes that from Kubernetes 1.32 on")
	}
	namespace, account, ok := accountOf(standard.Subject)
	if !ok {
		return nil, errors.New("token is of no service account")
	}
	return &agent{
		namespace: namespace, account: account,
		podName: of.Pod.Name, podUID: of.Pod.UID,
		nodeName: of.Node.Name, nodeUID: of.Node.UID,
	}, nil
}

// load returns the keys in the file as they are now.
func (k *keys) load() (*jose.JSONWebKeySet, error) {
	data, err := pemfile.Read(k.path, maxKeysFile)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.set != nil && bytes.Equal(k.data, data) {
		return k.set, nil
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("%s is no JWKS: %w", k.path, err)
	}
	if len(set.Keys) == 0 {
		return nil, fmt.Errorf("%s holds no key", k.path)
	}
	for i := range set.Keys {
		switch key := set.Keys[i].Key.(type) {
		case *rsa.PublicKey:
			if key.N.BitLen() < minRSA {
				return nil, fmt.Errorf("%s: key %d has %d bits; at least %d are needed", k.path, i+1, key.N.BitLen(), minRSA)
			}
		case *ecdsa.PublicKey:
		default: // a secret one above all
			return nil, fmt.Errorf("%s: key %d is none that verifies a cluster's tokens", k.path, i+1)
		}
	}
	k.data, k.set = data, &set
	return k.set, nil
}
