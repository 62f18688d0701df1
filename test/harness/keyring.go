package harness

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"
)

// KeyRing has the keys of a service that stands in for a real one, AWS KMS say,
// and makes it fail or lie. The keys and the signatures are real.
type KeyRing struct {
	cloudFaults

	mu      sync.Mutex
	now     func() time.Time
	keys    map[string]*ringKey // by the service's ID
	serial  int
	lies    Lie
	another map[string]crypto.Signer // by kind: what lies are made of
	signed  int
}

// Lie is what a service does wrong.
type Lie int

// The lies of a [KeyRing].
const (
	Honest       Lie = iota
	SignsOther       // with another key
	ShowsOther       // the public half of another key
	SignsNothing     // answers without a signature
)

// ringKey is a key, of a kind as "ec-p256" or "rsa-2048" are.
type ringKey struct {
	id, kind string
	signer   crypto.Signer
	created  time.Time
	tags     map[string]string
	deleted  bool // or about to be
	gone     bool // destroyed
}

// NewKeyRing makes one, whose keys are made by a clock; nil: the system's.
func NewKeyRing(now func() time.Time) *KeyRing {
	if now == nil {
		now = time.Now
	}
	return &KeyRing{now: now, keys: make(map[string]*ringKey), another: make(map[string]crypto.Signer)}
}

// Lie has the service do something wrong from now on.
func (r *KeyRing) Lie(l Lie) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lies = l
}

// Keys returns how many keys can sign.
func (r *KeyRing) Keys() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sorted())
}

// Signed returns how many signatures were made.
func (r *KeyRing) Signed() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.signed
}

// sorted returns the keys that were not deleted. The ring is locked here and below.
func (r *KeyRing) sorted() (keys []*ringKey) {
	for _, k := range r.keys {
		if !k.deleted {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b *ringKey) int { return cmp.Compare(a.id, b.id) })
	return keys
}

// make makes a key; without an ID it gets one.
func (r *KeyRing) make(id, kind string, tags map[string]string) *ringKey {
	if id == "" {
		r.serial++
		id = fmt.Sprintf("1234abcd-12ab-34cd-56ef-%012d", r.serial)
	}
	k := &ringKey{id: id, kind: kind, signer: newKeyOf(kind), created: r.now(), tags: tags}
	r.keys[id] = k
	return k
}

func newKeyOf(kind string) crypto.Signer {
	var signer crypto.Signer
	var err error
	bits := 0
	switch kind {
	case "ec-p256":
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ec-p384":
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		if _, err = fmt.Sscanf(kind, "rsa-%d", &bits); err == nil {
			signer, err = rsa.GenerateKey(rand.Reader, bits)
		}
	}
	if err != nil {
		panic(err) // the test's own mistake
	}
	return signer
}

func (r *KeyRing) other(kind string) crypto.Signer {
	if r.another[kind] == nil {
		r.another[kind] = newKeyOf(kind)
	}
	return r.another[kind]
}

// public returns what the service shows as the public half of a key.
func (r *KeyRing) public(k *ringKey) crypto.PublicKey {
	if r.lies == ShowsOther {
		return r.other(k.kind).Public()
	}
	return k.signer.Public()
}

func (r *KeyRing) publicDER(k *ringKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(r.public(k))
	if err != nil {
		panic(err)
	}
	return der
}

func (r *KeyRing) publicPEM(k *ringKey) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: r.publicDER(k)}))
}

// hash is that of the digests that a key signs.
func (k *ringKey) hash() crypto.Hash {
	if k.kind == "ec-p384" {
		return crypto.SHA384
	}
	return crypto.SHA256
}

// sign signs a digest, of the hash that goes with the key.
func (r *KeyRing) sign(k *ringKey, digest []byte) ([]byte, bool) {
	if len(digest) != k.hash().Size() {
		return nil, false
	}
	signer := k.signer
	switch r.lies {
	case SignsOther:
		signer = r.other(k.kind)
	case SignsNothing:
		return []byte{}, true
	}
	signature, err := signer.Sign(rand.Reader, digest, k.hash())
	r.signed++
	return signature, err == nil
}

// serve makes the service's handler, which has the ring locked.
func (r *KeyRing) serve(h http.Handler) http.Handler {
	return r.api(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		h.ServeHTTP(w, req)
	})
}

// Down has the service answer that it is not there.
func (r *KeyRing) Down() {
	r.Break(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "Service Unavailable", http.StatusServiceUnavailable)
	})
}

// Up ends that.
func (r *KeyRing) Up() { r.Break(nil) }
