// Package issue is the one way to issue a credential.
package issue

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
)

// Authorities are the keys that sign.
type Authorities interface {
	X509() (*authority.X509, error)
	JWT() (*authority.JWT, error)
}

// Options of an [Issuer].
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Authorities Authorities
	Now         func() time.Time // nil: time.Now
	Log         *slog.Logger     // nil: no log

	X509TTL   time.Duration // of X509-SVIDs; 0: 1 hour
	JWTTTL    time.Duration // of JWT-SVIDs; 0: 5 minutes
	AgentTTL  time.Duration // of nodes' X509-SVIDs; 0: 1 hour
	JWTIssuer string        // claim iss of JWT-SVIDs; empty: none
}

// X509SVID is an issued X509-SVID or CA certificate.
type X509SVID struct {
	ID           spiffeid.ID
	Chain        [][]byte // DER, leaf first
	SerialNumber string   // decimal
	ExpiresAt    time.Time
	Hint         string
}

// JWTSVID is an issued JWT-SVID.
type JWTSVID struct {
	ID        spiffeid.ID
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
	Hint      string
}

// InvalidError says what is wrong with a request.
type InvalidError struct{ Reason string }

func (e *InvalidError) Error() string { return e.Reason }

// Issuer issues credentials.
type Issuer struct{}

var errUnfinished = errors.New("issue: unfinished")

func New(o Options) *Issuer { return &Issuer{} }

func (i *Issuer) WorkloadX509(ctx context.Context, e *entry.Entry, csr []byte) (*X509SVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) WorkloadJWT(ctx context.Context, e *entry.Entry, audience []string) (*JWTSVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) NodeX509(ctx context.Context, id spiffeid.ID, csr []byte) (*X509SVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) MintX509(ctx context.Context, csr []byte, ttl time.Duration) (*X509SVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*JWTSVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) DownstreamCA(ctx context.Context, csr []byte, ttl time.Duration) (*X509SVID, error) {
	return nil, errUnfinished
}
func (i *Issuer) ServerTLS() (*tls.Certificate, error)         { return nil, errUnfinished }
func (i *Issuer) DefaultTTLs() (x509TTL, jwtTTL time.Duration) { return time.Hour, 5 * time.Minute }
