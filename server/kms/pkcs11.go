//go:build pkcs11 && cgo

package kms

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"sync"
	"time"

	p11 "github.com/miekg/pkcs11"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/pkcs11"
	"go.step.sm/crypto/kms/uri"
)

// errPKCS11 is why this program cannot use PKCS #11, or nil.
var errPKCS11 error

// reopenWait is how long after the token was opened anew, or could not be, it
// may be opened again: each call that fails asks for that.
const reopenWait = time.Second

// pkcs11Keys keeps keys in a PKCS #11 token. After a failure (the token was
// taken away, its service restarted) it opens the token anew.
type pkcs11Keys struct {
	o Options

	mu      sync.RWMutex   // held for reading while the token is used
	token   *pkcs11.PKCS11 // nil: it could not be opened
	opened  int            // how many times
	tried   time.Time      // when it was last opened anew
	failure error          // why that failed
	final   bool           // trying again would lock the token, or it was closed
}

func newPKCS11Keys(o Options) (apiv1.KeyManager, error) {
	k := &pkcs11Keys{o: o}
	if err := k.open(); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *pkcs11Keys) open() (err error) {
	k.token, err = pkcs11.New(context.Background(), apiv1.Options{URI: k.o.URI, Pin: k.o.PIN})
	if err != nil {
		k.token = nil
		return fmt.Errorf("open the PKCS #11 token: %w", err)
	}
	k.opened++
	return nil
}

// reopen opens the token anew, unless another has done that since it was
// opened for the nth time.
func (k *pkcs11Keys) reopen(n int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.opened != n {
		return nil
	}
	if k.final || time.Since(k.tried) < reopenWait {
		return k.failure
	}
	k.tried = time.Now()
	if k.token != nil {
		_ = k.token.Close() // there is nobody there to whom it matters
		k.token = nil
	}
	if err := k.open(); err != nil {
		if k.failure == nil {
			k.o.Log.Error("the PKCS #11 token cannot be used; nothing is signed until it is back", "error", err)
		}
		k.failure = fmt.Errorf("%w: %w", ErrUnavailable, err)
		if pinRefused(err) && !k.final {
			// A token counts wrong PINs, and locks itself at the third or so.
			k.final = true
			k.o.Log.Error("the PKCS #11 token refuses the PIN; it is not tried again until the server is restarted")
		}
		return k.failure
	}
	if k.failure != nil {
		k.o.Log.Info("the PKCS #11 token can be used again")
	}
	k.failure = nil
	return nil
}

func pinRefused(err error) bool {
	var code p11.Error
	if !errors.As(err, &code) {
		return false
	}
	switch code {
	case p11.CKR_PIN_INCORRECT, p11.CKR_PIN_INVALID, p11.CKR_PIN_LEN_RANGE, p11.CKR_PIN_EXPIRED, p11.CKR_PIN_LOCKED:
		return true
	}
	return false
}

// use calls a function with the token. If that fails, for another reason than
// what is or is not in the token, the token is opened anew and the function
// called once more.
func (k *pkcs11Keys) use(do func(*pkcs11.PKCS11) error) error {
	n, err := k.try(do)
	if err == nil || errors.Is(err, apiv1.NotFoundError{}) || errors.Is(err, apiv1.AlreadyExistsError{}) {
		return err
	}
	if err := k.reopen(n); err != nil {
		return err
	}
	if _, err = k.try(do); err != nil && !errors.Is(err, apiv1.NotFoundError{}) && !errors.Is(err, apiv1.AlreadyExistsError{}) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (k *pkcs11Keys) try(do func(*pkcs11.PKCS11) error) (opened int, err error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.token == nil {
		return k.opened, errors.New("the token is not open")
	}
	return k.opened, do(k.token)
}

// Available returns why the token cannot be used, or nil. It tries again to
// open one that could not be.
func (k *pkcs11Keys) Available() error {
	k.mu.RLock()
	n, failure := k.opened, k.failure
	k.mu.RUnlock()
	if failure == nil {
		return nil
	}
	return k.reopen(n)
}

// uri returns the URI of a key in the token. Its ID is made from what its label
// says, so that keys of several trust domains can be in one token; keys are
// found by the ID.
func (k *pkcs11Keys) uri(name string) (byID, full string) {
	label := k.o.owner().label(name)
	sum := sha256.Sum256([]byte(label))
	id := hex.EncodeToString(sum[:16])
	return uri.New(pkcs11.Scheme, url.Values{"id": {id}}).String(),
		uri.New(pkcs11.Scheme, url.Values{"id": {id}, "object": {label}}).String()
}

// ValidateName reports whether a key may have that name.
func (k *pkcs11Keys) ValidateName(name string) error { return CheckName(name) }

// CreateKey makes a key in the token, which it cannot leave. It fails with an
// [apiv1.AlreadyExistsError] if there is a key of that name.
func (k *pkcs11Keys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := CheckName(req.Name); err != nil {
		return nil, err
	}
	if err := Supported(req); err != nil {
		return nil, err
	}
	in := *req
	_, in.Name = k.uri(req.Name)
	in.Extractable = false
	var public crypto.PublicKey
	err := k.use(func(t *pkcs11.PKCS11) error {
		made, err := t.CreateKey(&in)
		if err == nil {
			public = made.PublicKey
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           public,
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (k *pkcs11Keys) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	signer, err := k.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: req.Name})
	if err != nil {
		return nil, err
	}
	return signer.Public(), nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails
// with an [apiv1.NotFoundError] if there is none of that name.
func (k *pkcs11Keys) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	if err := CheckName(req.SigningKey); err != nil {
		return nil, err
	}
	byID, _ := k.uri(req.SigningKey)
	s := &pkcs11Signer{keys: k, uri: byID}
	err := k.use(func(t *pkcs11.PKCS11) error {
		held, err := s.find(t)
		if err == nil {
			s.public = held.Public()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open key %q: %w", req.SigningKey, err)
	}
	return s, nil
}

// DeleteKey deletes a key. It fails with an [apiv1.NotFoundError] if there is
// none of that name.
func (k *pkcs11Keys) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	if err := CheckName(req.Name); err != nil {
		return err
	}
	byID, _ := k.uri(req.Name)
	return k.use(func(t *pkcs11.PKCS11) error {
		if _, err := t.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: byID}); err != nil {
			return err // DeleteKey would say nothing of a key that is not there
		}
		return t.DeleteKey(byID)
	})
}

// Close leaves the token.
func (k *pkcs11Keys) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failure, k.final = errors.New("the key manager was closed"), true
	if k.token == nil {
		return nil
	}
	err := k.token.Close()
	k.token = nil
	return err
}

// pkcs11Signer signs with a key in the token.
type pkcs11Signer struct {
	keys   *pkcs11Keys
	uri    string
	public crypto.PublicKey

	mu   sync.Mutex
	held crypto.Signer  // the key in
	in   *pkcs11.PKCS11 // the token as it was opened
}

func (s *pkcs11Signer) Public() crypto.PublicKey { return s.public }

func (s *pkcs11Signer) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	err = s.keys.use(func(t *pkcs11.PKCS11) error {
		held, err := s.find(t)
		if err == nil && !sameKey(held.Public(), s.public) {
			err = errors.New("the key is another one now")
		}
		if err == nil {
			signature, err = held.Sign(rand, digest, opts)
		}
		return err
	})
	return signature, err
}

// find returns the key in the token as it is opened now.
func (s *pkcs11Signer) find(t *pkcs11.PKCS11) (crypto.Signer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in != t {
		held, err := t.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: s.uri})
		if err != nil {
			return nil, err
		}
		s.held, s.in = held, t
	}
	return s.held, nil
}

func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
