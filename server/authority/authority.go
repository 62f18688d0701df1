// Package authority keeps the signing keys of this server: its X.509
// authorities, which sign X509-SVIDs, and its JWT authorities, which sign
// JWT-SVIDs.
package authority

import (
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// ErrUnavailable says that there is no authority to sign with: none was made
// yet, or the active one has expired and the next is being made. Try again.
var ErrUnavailable = errors.New("no signing authority is available yet; try again")

// X509 is an X.509 authority that signs. It is immutable; as long as the same
// authority is active, the same pointer is handed out.
type X509 struct {
	ID          string              // subject key ID, in hex
	Certificate *x509.Certificate   // its own
	Chain       []*x509.Certificate // intermediates to append after a leaf, nearest first; empty when self-signed
	Signer      crypto.Signer
	Remote      bool // the key is not in this process: verify what it signs
}

// JWT is a JWT authority that signs. It is immutable; as long as the same
// authority is active, the same pointer is handed out.
type JWT struct {
	ID        string // the kid
	Signer    crypto.Signer
	Algorithm jose.SignatureAlgorithm
	ExpiresAt time.Time
	Remote    bool // the key is not in this process: verify what it signs
}
