package issue

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
)

// serverSVID is the server's own X509-SVID.
type serverSVID struct {
	certificate *tls.Certificate
	authority   *authority.X509 // that signed it
	renewAt     time.Time       // half of its life
	expiresAt   time.Time
}

// ServerTLS returns the server's own X509-SVID, with a key that is in memory
// only. It issues the first, and another when half of its life is over or
// another authority signs; call it for each handshake
// ([tls.Config.GetCertificate]). If a new one cannot be had, it returns the
// one there is until that expires.
func (i *Issuer) ServerTLS() (*tls.Certificate, error) {
	now := i.now()
	held := i.server.Load()
	if i.isCurrent(held, now) {
		return held.certificate, nil
	}
	if held != nil && now.Before(held.expiresAt) {
		if !i.serverMu.TryLock() { // another is renewing it
			return held.certificate, nil
		}
	} else {
		i.serverMu.Lock()
	}
	defer i.serverMu.Unlock()
	if held = i.server.Load(); i.isCurrent(held, now) {
		return held.certificate, nil
	}
	fresh, err := i.newServerSVID(now)
	if err != nil {
		if held != nil && now.Before(held.expiresAt) {
			return held.certificate, nil
		}
		return nil, fmt.Errorf("issue the server's own SVID: %w", err)
	}
	i.server.Store(fresh)
	return fresh.certificate, nil
}

// isCurrent reports whether there is no reason for another SVID.
func (i *Issuer) isCurrent(held *serverSVID, now time.Time) bool {
	if held == nil || !now.Before(held.renewAt) {
		return false
	}
	active, err := i.authorities.X509()
	return err != nil || active == held.authority
}

func (i *Issuer) newServerSVID(now time.Time) (*serverSVID, error) {
	id, err := spiffeid.FromPath(i.td, entry.ServerPath)
	if err != nil {
		return nil, err
	}
	signer, err := i.x509Signer() // before the SVID: at worst it is renewed once more
	if err != nil {
		return nil, err
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := newSubjectKey(private.Public())
	if err != nil {
		return nil, err
	}
	svid, err := i.signX509(context.Background(), certificate{reason: "server", id: id, key: key, ttl: i.x509TTL})
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		return nil, err
	}
	return &serverSVID{
		certificate: &tls.Certificate{Certificate: svid.Chain, PrivateKey: private, Leaf: leaf},
		authority:   signer.X509,
		renewAt:     now.Add(svid.ExpiresAt.Sub(now) / 2),
		expiresAt:   svid.ExpiresAt,
	}, nil
}
