package authority

import (
	"crypto"
	"fmt"
	"sync"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/kms"
)

// memoryKeys keeps keys in memory: they end with the process.
type memoryKeys struct {
	mu   sync.Mutex
	keys map[string]crypto.Signer
}

// NewMemoryKeys returns a key manager that keeps its keys in memory: a server
// that restarts makes new authorities. It also implements [apiv1.KeyDeleter]
// and [apiv1.NameValidator].
func NewMemoryKeys() apiv1.KeyManager {
	return &memoryKeys{keys: make(map[string]crypto.Signer)}
}

// ValidateName reports whether a key may have that name.
func (k *memoryKeys) ValidateName(name string) error { return kms.CheckName(name) }

// CreateKey makes a key. It fails with an [apiv1.AlreadyExistsError] if there
// is one of that name.
func (k *memoryKeys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := kms.CheckName(req.Name); err != nil {
		return nil, err
	}
	signer, err := generate(req)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys[req.Name] != nil {
		return nil, apiv1.AlreadyExistsError{Message: fmt.Sprintf("key %q exists", req.Name)}
	}
	k.keys[req.Name] = signer
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           signer.Public(),
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (k *memoryKeys) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	signer, err := k.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: req.Name})
	if err != nil {
		return nil, err
	}
	return signer.Public(), nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails
// with an [apiv1.NotFoundError] if there is none of that name.
func (k *memoryKeys) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if signer := k.keys[req.SigningKey]; signer != nil {
		return signer, nil
	}
	return nil, apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found", req.SigningKey)}
}

// DeleteKey deletes a key. It fails with an [apiv1.NotFoundError] if there is
// none of that name.
func (k *memoryKeys) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys[req.Name] == nil {
		return apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found", req.Name)}
	}
	delete(k.keys, req.Name)
	return nil
}

// Close forgets the keys.
func (k *memoryKeys) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.keys)
	return nil
}
