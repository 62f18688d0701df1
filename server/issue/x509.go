package issue

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	encasn1 "encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/authority"
)

// backdate is how much earlier than it was issued a certificate becomes valid:
// for verifiers whose clock is behind.
const backdate = 10 * time.Second

// maxCommonName is the most characters of a common name. RFC 5280 appendix
// A.1, ub-common-name.
const maxCommonName = 64

// certificate is what a certificate is built from: the registry's and the
// configuration's data, and the public key.
type certificate struct {
	reason string // for the record
	entry  string // for the record; its ID, if there is one

	id       spiffeid.ID
	dnsNames []string
	subject  []byte // a Name, DER; nil: the common name is the first DNS name
	key      subjectKey
	ttl      time.Duration
	ca       bool
}

// x509Signer is an X.509 authority and what everything it signs has in common.
type x509Signer struct {
	*authority.X509
	issuer    []byte // its name, DER
	keyID     []byte // the extension that names its key, DER
	crl       []byte // the extension that says where its CRL is, DER; nil: none
	algorithm signatureAlgorithm
	notBefore time.Time
	notAfter  time.Time
	chain     [][]byte // what follows a leaf, DER
	below     int      // how many CA certificates may follow its own; -1: any number
	signed    *tally
}

type signatureAlgorithm struct {
	der  []byte // AlgorithmIdentifier
	hash crypto.Hash
	x509 x509.SignatureAlgorithm
}

// x509Signer returns the active X.509 authority.
func (i *Issuer) x509Signer() (*x509Signer, error) {
	a, err := i.authorities.X509()
	if err != nil {
		return nil, err
	}
	if s := i.x509.Load(); s != nil && s.X509 == a {
		return s, nil
	}
	s, err := newX509Signer(a, i.crlURL)
	if err != nil {
		return nil, fmt.Errorf("X.509 authority %s: %w", a.ID, err)
	}
	s.signed = i.tallyOf(a.ID)
	i.x509.Store(s)
	return s, nil
}

func newX509Signer(a *authority.X509, crlURL string) (*x509Signer, error) {
	s := &x509Signer{X509: a, issuer: a.Certificate.RawSubject}
	s.notBefore, s.notAfter = a.Validity()
	if len(a.Certificate.SubjectKeyId) == 0 {
		return nil, errors.New("its certificate has no subject key identifier")
	}
	// RFC 5280 §4.2.1.1: not critical.
	b := cryptobyte.NewBuilder(nil)
	addExtension(b, oidAuthorityKeyID, false, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(a.Certificate.SubjectKeyId) })
		})
	})
	s.keyID = b.BytesOrPanic()
	if crlURL != "" {
		s.crl = constantExtensions(func(b *cryptobyte.Builder) { addCRLDistributionPoint(b, crlURL+a.ID+".crl") })
	}
	s.below = -1
	for i, c := range append([]*x509.Certificate{a.Certificate}, a.Chain...) {
		depth := max(i-1, 0) // of certificates between it and those to follow; the chain begins with its own again
		if c.MaxPathLen > 0 || c.MaxPathLenZero {
			if left := max(c.MaxPathLen-depth, 0); s.below < 0 || left < s.below {
				s.below = left
			}
		}
	}
	for _, c := range a.Chain {
		s.chain = append(s.chain, c.Raw)
	}
	var err error
	s.algorithm, err = algorithmFor(a.Signer.Public())
	return s, err
}

// algorithmFor returns the algorithm with which a key signs certificates: that
// which go's x509 chooses as well.
func algorithmFor(public crypto.PublicKey) (signatureAlgorithm, error) {
	var oid encasn1.ObjectIdentifier
	var alg signatureAlgorithm
	null := false
	switch key := public.(type) {
	case *ecdsa.PublicKey: // RFC 5758 §3.2
		switch key.Curve {
		case elliptic.P256():
			oid, alg.hash, alg.x509 = encasn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, crypto.SHA256, x509.ECDSAWithSHA256
		case elliptic.P384():
			oid, alg.hash, alg.x509 = encasn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, crypto.SHA384, x509.ECDSAWithSHA384
		default:
			return alg, fmt.Errorf("signing with curve %s is not supported", key.Curve.Params().Name)
		}
	case *rsa.PublicKey: // RFC 4055 §5: with parameters, which are NULL
		oid, alg.hash, alg.x509, null = encasn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, crypto.SHA256, x509.SHA256WithRSA, true
	default:
		return alg, fmt.Errorf("signing with a %T is not supported", public)
	}
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		if null {
			b.AddASN1NULL()
		}
	})
	alg.der = b.BytesOrPanic()
	return alg, nil
}

// signX509 builds a certificate, signs and records it.
func (i *Issuer) signX509(ctx context.Context, c certificate) (*X509SVID, error) {
	ctx, span := telemetry.Span(ctx, "sign X.509")
	defer span.End()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := i.x509Signer()
	if err != nil {
		return nil, err
	}
	if c.ca && s.below == 0 {
		return nil, invalid("the X.509 authority of this server may not sign others: its path length is 0")
	}
	now := i.now()
	notBefore, notAfter := now.Add(-backdate), now.Add(c.ttl)
	if notBefore.Before(s.notBefore) {
		notBefore = s.notBefore
	}
	if notAfter.After(s.notAfter) {
		notAfter = s.notAfter
	}
	notBefore, notAfter = notBefore.Truncate(time.Second), notAfter.Truncate(time.Second)
	if !notAfter.After(now) {
		return nil, authority.ErrUnavailable
	}
	serial := authority.Serial()
	der, err := s.sign(&c, i.td, serial, notBefore, notAfter)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", c.id, err)
	}
	i.keep(ctx, c.id, s.ID, serial, now, notAfter)
	svid := &X509SVID{
		ID:           c.id,
		Chain:        append(make([][]byte, 0, 1+len(s.chain)), der),
		SerialNumber: new(big.Int).SetBytes(serial).String(),
		ExpiresAt:    notAfter,
		AuthorityID:  s.ID,
	}
	s.signed.add(notAfter)
	i.metrics.Issued.WithLabelValues("x509", c.reason).Inc()
	svid.Chain = append(svid.Chain, s.chain...)
	if i.log.Enabled(ctx, slog.LevelInfo) {
		i.log.LogAttrs(ctx, slog.LevelInfo, "issued", recordX509(&c, s, svid)...)
	}
	return svid, nil
}

// recordX509 returns what the record says of a certificate.
func recordX509(c *certificate, s *x509Signer, svid *X509SVID) []slog.Attr {
	attrs := append(make([]slog.Attr, 0, 7),
		slog.String("kind", "x509"),
		slog.String("for", c.reason),
		slog.String("id", c.id.String()),
		slog.String("serial", svid.SerialNumber),
		slog.String("authority", s.ID),
		slog.Time("expires", svid.ExpiresAt),
	)
	if c.entry != "" {
		attrs = append(attrs, slog.String("entry", c.entry))
	}
	return attrs
}

// The extensions that every leaf has, and those that every CA certificate has.
var (
	leafExtensions = constantExtensions(func(b *cryptobyte.Builder) {
		addKeyUsage(b, 7, 0x80) // X509-SVID §4.3: digitalSignature alone
		addExtension(b, oidExtKeyUsage, false, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // X509-SVID §4.4
				b.AddASN1ObjectIdentifier(encasn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}) // serverAuth
				b.AddASN1ObjectIdentifier(encasn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}) // clientAuth
			})
		})
		addExtension(b, oidBasicConstraints, true, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(*cryptobyte.Builder) {}) // cA is FALSE, which DER leaves out
		})
	})
	caExtensions = constantExtensions(func(b *cryptobyte.Builder) {
		addKeyUsage(b, 1, 0x06) // keyCertSign, cRLSign
	})
)

var (
	oidSubjectKeyID          = encasn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage              = encasn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName        = encasn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints      = encasn1.ObjectIdentifier{2, 5, 29, 19}
	oidAuthorityKeyID        = encasn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtKeyUsage           = encasn1.ObjectIdentifier{2, 5, 29, 37}
	oidCRLDistributionPoints = encasn1.ObjectIdentifier{2, 5, 29, 31}
	oidCommonName            = encasn1.ObjectIdentifier{2, 5, 4, 3}
)

func constantExtensions(add func(*cryptobyte.Builder)) []byte {
	b := cryptobyte.NewBuilder(nil)
	add(b)
	return b.BytesOrPanic()
}

func addExtension(b *cryptobyte.Builder, oid encasn1.ObjectIdentifier, critical bool, value func(*cryptobyte.Builder)) {
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1(asn1.OCTET_STRING, value)
	})
}

// addCRLDistributionPoint adds where a CRL is. RFC 5280 §4.2.1.13: not critical.
func addCRLDistributionPoint(b *cryptobyte.Builder, url string) {
	addExtension(b, oidCRLDistributionPoints, false, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // CRLDistributionPoints
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { // DistributionPoint
				b.AddASN1(asn1.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { // distributionPoint
					b.AddASN1(asn1.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { // fullName
						b.AddASN1(sanURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(url)) })
					})
				})
			})
		})
	})
}

// addKeyUsage adds the key usages of one octet. X509-SVID §4.3: critical.
func addKeyUsage(b *cryptobyte.Builder, unused, bits byte) {
	addExtension(b, oidKeyUsage, true, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.BIT_STRING, func(b *cryptobyte.Builder) { b.AddBytes([]byte{unused, bits}) })
	})
}

// sign builds and signs a certificate. It encodes it itself:
// [x509.CreateCertificate] would verify its own signature each time, which
// costs twice as much as signing, and encode anew what never changes.
func (s *x509Signer) sign(c *certificate, td spiffeid.TrustDomain, serial []byte, notBefore, notAfter time.Time) ([]byte, error) {
	subject, err := c.name(td)
	if err != nil {
		return nil, err
	}
	// Room for all but an unusual number of names.
	size := 512 + len(s.issuer) + len(subject) + len(c.key.spki)
	b := cryptobyte.NewBuilder(make([]byte, 0, size))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
		b.AddASN1(asn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(serial) })
		b.AddBytes(s.algorithm.der)
		b.AddBytes(s.issuer)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, notBefore)
			addTime(b, notAfter)
		})
		b.AddBytes(subject)
		b.AddBytes(c.key.spki)
		b.AddASN1(asn1.Tag(3).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { s.addExtensions(b, c, len(subject) == len(emptyName)) })
		})
	})
	tbs, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	signature, err := s.signature(tbs)
	if err != nil {
		return nil, err
	}
	b = cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+64))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(s.algorithm.der)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}

// signature signs the body of a certificate.
func (s *x509Signer) signature(tbs []byte) ([]byte, error) {
	h := s.algorithm.hash.New()
	h.Write(tbs)
	signature, err := s.Signer.Sign(rand.Reader, h.Sum(nil), s.algorithm.hash)
	if err != nil {
		return nil, err
	}
	if s.Remote { // what a faulty device signs must not leave the house
		if err := s.Certificate.CheckSignature(s.algorithm.x509, tbs, signature); err != nil {
			return nil, fmt.Errorf("the authority's signature does not verify: %w", err)
		}
	}
	return signature, nil
}

// addExtensions adds a certificate's extensions, in the order of go's x509.
func (s *x509Signer) addExtensions(b *cryptobyte.Builder, c *certificate, subjectIsEmpty bool) {
	if c.ca {
		b.AddBytes(caExtensions)
		addExtension(b, oidBasicConstraints, true, func(b *cryptobyte.Builder) { // RFC 5280 §4.2.1.9
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Boolean(true)
				if s.below > 0 {
					b.AddASN1Int64(int64(s.below - 1))
				}
			})
		})
	} else {
		b.AddBytes(leafExtensions)
	}
	addExtension(b, oidSubjectKeyID, false, func(b *cryptobyte.Builder) { b.AddASN1OctetString(c.key.id) })
	b.AddBytes(s.keyID)
	// RFC 5280 §4.2.1.6: critical if it alone says who the subject is.
	addExtension(b, oidSubjectAltName, subjectIsEmpty, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, name := range c.dnsNames {
				b.AddASN1(sanDNS, func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
			}
			b.AddASN1(sanURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(c.id.String())) }) // X509-SVID §2: one
		})
	})
	b.AddBytes(s.crl)
}

// The kinds of name in a subject alternative name. RFC 5280 §4.2.1.6.
const (
	sanDNS = asn1.Tag(2 | 0x80)
	sanURI = asn1.Tag(6 | 0x80)
)

// addTime adds a time. RFC 5280 §4.1.2.5: UTCTime through the year 2049.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

var emptyName = []byte{0x30, 0x00}

// name returns the subject of a certificate.
//
// A leaf without DNS names has none: what it certifies is the SPIFFE ID, which
// is no distinguished name. One name for all workloads would break the rule
// that a name means one subject (RFC 5280 §4.1.2.6), and make all of them the
// same to software that identifies its peers by it. With DNS names the first
// is the common name too, for software that looks only there (PostgreSQL).
func (c *certificate) name(td spiffeid.TrustDomain) ([]byte, error) {
	switch {
	case c.ca:
		return encasn1.Marshal(authority.Name(td, c.key.id).ToRDNSequence())
	case c.subject != nil:
		return c.subject, nil
	case len(c.dnsNames) > 0 && len(c.dnsNames[0]) <= maxCommonName:
		return encodeName(pkix.AttributeTypeAndValue{Type: oidCommonName, Value: c.dnsNames[0]})
	}
	return emptyName, nil
}

// encodeName encodes a name of attributes, in their order, whose values are
// strings.
func encodeName(attributes ...pkix.AttributeTypeAndValue) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, 128))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, a := range attributes {
			b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(a.Type)
					value := []byte(a.Value.(string))
					tag := asn1.UTF8String
					if isPrintable(value) {
						tag = asn1.PrintableString
					}
					b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes(value) })
				})
			})
		}
	})
	return b.Bytes()
}

// isPrintable reports whether a string is an ASN.1 PrintableString.
func isPrintable(s []byte) bool {
	for _, c := range s {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == ' ', c == '\'', c == '(', c == ')', c == '+', c == ',', c == '-', c == '.', c == '/', c == ':', c == '=', c == '?':
		default:
			return false
		}
	}
	return true
}
