// Package revocation refuses peers whose X509-SVID was revoked.
//
// A [Lists] holds the CRLs of a trust domain's authorities, and says whether a
// certificate is in one of them ([Lists.Check]). A [Source] is one that the
// Workload API keeps current, which sends CRLs in the field crl beside bundles
// and X509-SVIDs; go-spiffe's sources leave them out. [Source.Guard] adds the
// check to a [tls.Config], [Source.Listen] also closes connections whose peer
// is revoked while they are open:
//
//	svids, err := workloadapi.NewX509Source(ctx)                 // go-spiffe
//	crls, err := revocation.NewSource(ctx, revocation.Options{}) // both find SPIFFE_ENDPOINT_SOCKET
//	config := tlsconfig.MTLSServerConfig(svids, svids, tlsconfig.AuthorizeMemberOf(td))
//	listener, err := crls.Listen("tcp", ":8443", config)
//
// # What is believed
//
// A CRL counts for the authority whose key signed it, which is known by the
// certificate that a peer's own was signed with; so what another authority, or
// the holder of a leaf, has signed counts for nobody. While a CRL that names an
// authority is there and none is good (it is signed by another key, malformed,
// beyond its nextUpdate, of an unknown critical extension), peers of that
// authority are refused: it may have revoked them. An authority without a CRL
// has revoked nothing. A CRL whose number is lower than one that was good is
// not taken, and one that is left out later counts until its nextUpdate.
package revocation

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	// MaxCRL is the largest CRL that is read, in bytes: some 19,000 certificates.
	MaxCRL = 1 << 20
	// MaxCRLs is how many are read of one update.
	MaxCRLs = 64
	// Skew is how far the clocks of an authority and a verifier may differ.
	Skew = time.Minute

	maxCandidates = 4  // CRLs that name the same authority
	maxKeys       = 8  // public keys of one identifier
	maxNumber     = 20 // octets of a CRL's number; RFC 5280 §5.2.3
	maxKnown      = 256
)

var (
	// ErrRevoked: the certificate was revoked. It is wrapped.
	ErrRevoked = errors.New("the certificate was revoked")
	// ErrUnknown: whether the certificate was revoked cannot be said. It is
	// wrapped.
	ErrUnknown = errors.New("it cannot be said whether the certificate was revoked")
)

var (
	oidAuthorityKeyID = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidCRLNumber      = asn1.ObjectIdentifier{2, 5, 29, 20}
)

// crl is a CRL that is well formed.
type crl struct {
	list    *x509.RevocationList
	revoked map[string]bool  // serial numbers, big endian
	tested  map[string]error // why a public key (SubjectPublicKeyInfo) has not signed it; nil: it has
}

func (c *crl) stale(now time.Time) bool { return now.After(c.list.NextUpdate.Add(Skew)) }

// parse reads a CRL, whoever signed it. RFC 5280 §5.
func parse(der []byte, now time.Time) (*crl, error) {
	if len(der) > MaxCRL {
		return nil, fmt.Errorf("it has %d bytes; the most is %d", len(der), MaxCRL)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	switch {
	case len(list.Raw) != len(der):
		return nil, errors.New("something follows it")
	case len(list.AuthorityKeyId) == 0:
		return nil, errors.New("it does not name the key that signed it")
	case list.Number == nil || list.Number.Sign() < 0 || len(list.Number.Bytes()) > maxNumber:
		return nil, errors.New("it has no number")
	case list.NextUpdate.IsZero():
		return nil, errors.New("it does not say when the next one comes")
	case list.ThisUpdate.After(now.Add(Skew)):
		return nil, fmt.Errorf("it is of %v, which is to come", list.ThisUpdate)
	}
	for _, e := range list.Extensions {
		if e.Critical && !e.Id.Equal(oidAuthorityKeyID) && !e.Id.Equal(oidCRLNumber) {
			return nil, fmt.Errorf("it has the critical extension %v, which is not known", e.Id)
		}
	}
	c := &crl{list: list, revoked: make(map[string]bool, len(list.RevokedCertificateEntries)), tested: make(map[string]error)}
	for _, entry := range list.RevokedCertificateEntries {
		for _, e := range entry.Extensions {
			if e.Critical { // §5.3: the certificate's issuer, of an indirect CRL, is one
				return nil, fmt.Errorf("one of its certificates has the critical extension %v, which is not known", e.Id)
			}
		}
		c.revoked[string(entry.SerialNumber.Bytes())] = true
	}
	return c, nil
}

// named returns the key that a CRL names, as far as it can be read, so that one
// that is malformed can count against its authority.
func named(der []byte) string {
	if len(der) > MaxCRL {
		return ""
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return ""
	}
	return string(list.AuthorityKeyId)
}

// known is what is held of a key identifier.
type known struct {
	candidates []*crl          // of the last update; whether the key signed them is found out when its certificate is there
	malformed  error           // one that names the key cannot be taken
	missing    bool            // from the last update
	good       map[string]*crl // by the public key that signed it: an identifier can be made up
}

// fresh reports whether a CRL that was good has not ended.
func (k *known) fresh(now time.Time) bool {
	for _, c := range k.good {
		if !c.stale(now) {
			return true
		}
	}
	return false
}

// Lists holds CRLs. The zero value is not ready: use [New]. It is safe for
// concurrent use.
type Lists struct {
	now func() time.Time

	mu     sync.Mutex
	of     map[string]*known // by key identifier
	broken error             // a CRL cannot be read at all: whose it is cannot be said
}

// New makes lists that hold nothing. Nil stands for the time of day.
func New(now func() time.Time) *Lists {
	if now == nil {
		now = time.Now
	}
	return &Lists{now: now, of: make(map[string]*known)}
}

// Update takes in all CRLs that there are now, DER. The error says which cannot
// be taken; the others are. A CRL that cannot be read at all, or more than
// [MaxCRLs], makes every check fail until the next update: it could be anyone's.
func (l *Lists) Update(ders [][]byte) error {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = nil
	if len(ders) > MaxCRLs {
		l.broken = fmt.Errorf("there are %d CRLs; the most is %d", len(ders), MaxCRLs)
		return l.broken
	}
	for _, k := range l.of {
		k.missing, k.malformed = true, nil
		k.candidates = nil
	}
	var errs []error
	for i, der := range ders {
		c, err := parse(der, now)
		if err != nil {
			err = fmt.Errorf("CRL %d: %w", i, err)
			errs = append(errs, err)
			if id := named(der); id == "" {
				l.broken = err
			} else if k := l.key(id); k != nil {
				k.malformed = err
			}
			continue
		}
		k := l.key(string(c.list.AuthorityKeyId))
		switch {
		case k == nil:
			l.broken = fmt.Errorf("CRLs name more than %d authorities", maxKnown)
			errs = append(errs, l.broken)
		case len(k.candidates) == maxCandidates:
			k.malformed = fmt.Errorf("more than %d CRLs name one authority", maxCandidates)
			errs = append(errs, k.malformed)
		default:
			k.candidates = append(k.candidates, c)
		}
	}
	for id, k := range l.of { // those that are left out count until they end
		if k.missing && !k.fresh(now) {
			delete(l.of, id)
		}
	}
	return errors.Join(errs...)
}

func (l *Lists) key(id string) *known {
	k := l.of[id]
	if k == nil {
		if len(l.of) >= maxKnown {
			return nil
		}
		k = &known{good: make(map[string]*crl)}
		l.of[id] = k
	}
	k.missing = false
	return k
}

// Check says whether a certificate, of a chain that has been verified, is to be
// refused: with [ErrRevoked] if its issuer has revoked it, with [ErrUnknown] if
// that cannot be said. The issuer is among the certificates given; if several
// have its name and key identifier, the one whose key has signed.
func (l *Lists) Check(cert *x509.Certificate, issuers []*x509.Certificate) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		return fmt.Errorf("%w: %w", ErrUnknown, l.broken)
	}
	if len(l.of) == 0 {
		return nil
	}
	if len(cert.AuthorityKeyId) > 0 && l.of[string(cert.AuthorityKeyId)] == nil {
		return nil // of an authority that has no CRL, such as another trust domain's
	}
	issuers = slices.DeleteFunc(slices.Clone(issuers), func(issuer *x509.Certificate) bool {
		return !bytes.Equal(issuer.RawSubject, cert.RawIssuer) ||
			len(cert.AuthorityKeyId) > 0 && len(issuer.SubjectKeyId) > 0 && !bytes.Equal(cert.AuthorityKeyId, issuer.SubjectKeyId)
	})
	for _, issuer := range issuers {
		// Of a chain that verifies, the only one that it can be is it.
		if len(issuers) > 1 && cert.CheckSignatureFrom(issuer) != nil {
			continue
		}
		id := issuer.SubjectKeyId
		if len(id) == 0 {
			id = cert.AuthorityKeyId
		}
		return l.check(cert, issuer, string(id))
	}
	return fmt.Errorf("%w: the certificate that it was signed with is not there", ErrUnknown)
}

func (l *Lists) check(cert, issuer *x509.Certificate, id string) error {
	k := l.of[id]
	if k == nil {
		return nil
	}
	now := l.now()
	unknown := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrUnknown, fmt.Sprintf(format, args...))
	}
	key := string(issuer.RawSubjectPublicKeyInfo)
	good := k.good[key]
	var why error
	for _, c := range k.candidates {
		err, done := c.tested[key]
		if !done {
			err = signed(c, issuer)
			if len(c.tested) < maxKeys {
				c.tested[key] = err
			}
		}
		switch {
		case err != nil:
			why = err
		case good == nil || c.list.Number.Cmp(good.list.Number) >= 0:
			good = c
		}
	}
	if _, is := k.good[key]; good != nil && (is || len(k.good) < maxKeys) {
		k.good[key] = good
	}
	switch {
	case good != nil && good.revoked[string(cert.SerialNumber.Bytes())]:
		return fmt.Errorf("%w: serial number %v", ErrRevoked, cert.SerialNumber)
	case good != nil && good.stale(now):
		return unknown("the newest CRL of its authority ended at %v", good.list.NextUpdate)
	case good != nil:
		return nil // also if others came that do not count
	case k.malformed != nil:
		return unknown("%v", k.malformed)
	case why != nil:
		return unknown("%v", why)
	}
	return unknown("its authority's CRL is not there any more")
}

// signed fails unless an issuer has signed a CRL, and may sign any. RFC 5280
// §6.3.3 (f).
func signed(c *crl, issuer *x509.Certificate) error {
	switch {
	case !bytes.Equal(c.list.RawIssuer, issuer.RawSubject):
		return errors.New("the CRL is of another issuer")
	case !issuer.IsCA || issuer.KeyUsage&x509.KeyUsageCRLSign == 0:
		return errors.New("who signed the CRL may not")
	}
	if err := c.list.CheckSignatureFrom(issuer); err != nil {
		return fmt.Errorf("the CRL's signature: %w", err)
	}
	return nil
}
