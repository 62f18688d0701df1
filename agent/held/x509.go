package held

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"
)

// X509SVID is a signed X509-SVID with its key. It does not change.
type X509SVID struct {
	Chain     []byte // concatenated DER, leaf first, as the Workload API carries it
	Key       []byte // unencrypted PKCS#8 DER
	ExpiresAt time.Time

	issuers []string // authority key IDs of the chain's certificates
	serials []string // their serial numbers, big endian, without leading zeros
}

// Certificates returns the DER of each certificate of the chain, leaf first.
func (x *X509SVID) Certificates() [][]byte {
	var out [][]byte
	for rest := x.Chain; len(rest) > 0; {
		var c asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &c); err != nil {
			return out // it was parsed when it was signed
		}
		out = append(out, c.FullBytes)
	}
	return out
}

func (x *X509SVID) ends() time.Time { return x.ExpiresAt }

// x509 returns the X509-SVID of a credential of that kind; nil if it has none
// that is valid.
func (c *credential) x509(now time.Time) *X509SVID {
	x, _ := c.valid(now).(*X509SVID)
	return x
}

// requestX509 has X509-SVIDs signed.
func (h *Held) requestX509(ctx context.Context, jobs []job) ([]answer, error) {
	requests := make([]X509Request, len(jobs))
	for i, j := range jobs {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, j.key)
		if err != nil {
			return nil, fmt.Errorf("make a certificate request: %w", err)
		}
		requests[i] = X509Request{EntryID: j.entry.ID, CSR: csr}
	}
	results, err := h.signer.SignX509(ctx, requests)
	if err != nil {
		return nil, err
	}
	answers := make([]answer, len(results))
	for i, r := range results[:min(len(results), len(jobs))] {
		if answers[i].err = r.Err; r.Err == nil {
			answers[i] = newX509SVID(jobs[i], r.Chain)
		}
	}
	return answers, nil
}

// newX509SVID checks that a chain is of the key and the SPIFFE ID asked for.
func newX509SVID(j job, chain [][]byte) answer {
	fail := func(format string, args ...any) answer { return answer{err: fmt.Errorf(format, args...)} }
	if len(chain) == 0 {
		return answer{err: errors.New("the server sent an X509-SVID without certificates")}
	}
	x := &X509SVID{}
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fail("certificate %d of the X509-SVID: %w", i, err)
		}
		if i == 0 {
			if !j.key.PublicKey.Equal(cert.PublicKey) {
				return fail("the server sent an X509-SVID of another key")
			}
			if len(cert.URIs) != 1 || cert.URIs[0].String() != j.entry.SPIFFEID.String() {
				return fail("the server sent an X509-SVID of %v; the entry is of %s", cert.URIs, j.entry.SPIFFEID)
			}
		}
		x.Chain = append(x.Chain, der...)
		x.ExpiresAt = earlier(x.ExpiresAt, cert.NotAfter)
		if len(cert.AuthorityKeyId) > 0 {
			x.issuers = append(x.issuers, string(cert.AuthorityKeyId))
			x.serials = append(x.serials, string(cert.SerialNumber.Bytes()))
		}
	}
	key, err := x509.MarshalPKCS8PrivateKey(j.key)
	if err != nil {
		return fail("encode the key of the X509-SVID: %w", err)
	}
	x.Key = key
	return answer{svid: x}
}
