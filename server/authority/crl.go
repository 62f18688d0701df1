package authority

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/registry"
)

// ErrNoKey says that the key of an authority is gone: nothing can be signed with
// it any more, no CRL either. It is wrapped.
var ErrNoKey = errors.New("the key of the authority is gone")

// Signer returns the key of an authority of this server, in whichever state, for
// signing its CRL. It fails with [ErrNoKey] if there is none any more.
func (a *Authorities) Signer(ctx context.Context, r *registry.Authority) (crypto.Signer, error) {
	unlock, err := a.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if r.Server != a.server {
		return nil, fmt.Errorf("%w: that of %s authority %s is of server %q", ErrNoKey, r.Kind, r.ID, r.Server)
	}
	if s := a.signers[r.KeyName]; s != nil {
		return s, nil
	}
	s, err := a.keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: r.KeyName})
	switch {
	case errors.Is(err, apiv1.NotFoundError{}) || errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s authority %s", ErrNoKey, r.Kind, r.ID)
	case err != nil:
		return nil, fmt.Errorf("open the key of %s authority %s: %w", r.Kind, r.ID, err)
	case !sameKey(s.Public(), r.PublicKey):
		return nil, fmt.Errorf("%w: %s authority %s has another one", ErrNoKey, r.Kind, r.ID)
	}
	return s, nil
}

// Server returns the name of the server whose authorities these are.
func (a *Authorities) Server() string { return a.server }
