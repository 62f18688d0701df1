package issue

import (
	"cmp"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

// MintX509 issues an X509-SVID that an administrator describes in a
// certificate signing request: its one URI is the SPIFFE ID, a workload's in
// the trust domain; its DNS names and its subject are used too, after they
// were checked. Everything else in it is not. Zero as the lifetime stands for
// the default.
func (i *Issuer) MintX509(ctx context.Context, csr []byte, ttl time.Duration) (*X509SVID, error) {
	if err := validateTTL(ttl); err != nil {
		return nil, err
	}
	request, err := ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	id, dnsNames, err := subjectAltNames(request)
	if err != nil {
		return nil, err
	}
	if err := i.validateWorkloadID(id); err != nil {
		return nil, err
	}
	subject, err := checkedSubject(request, dnsNames)
	if err != nil {
		return nil, err
	}
	key, err := newSubjectKey(request.PublicKey)
	if err != nil {
		return nil, err
	}
	return i.signX509(ctx, certificate{
		reason:   "mint",
		id:       id,
		dnsNames: dnsNames,
		subject:  subject,
		key:      key,
		ttl:      cmp.Or(ttl, i.x509TTL),
	})
}

// subjectAltNames returns the SPIFFE ID and the DNS names of a request. It
// reads the names themselves, as they are: Go's parsed URLs have lost details
// that make an ID invalid, such as an empty fragment.
func subjectAltNames(csr *x509.CertificateRequest) (spiffeid.ID, []string, error) {
	var uris, dnsNames []string
	for _, ext := range csr.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		names := cryptobyte.String(ext.Value)
		if !names.ReadASN1(&names, asn1.SEQUENCE) {
			return spiffeid.ID{}, nil, invalid("malformed CSR: subject alternative names")
		}
		for !names.Empty() {
			var value cryptobyte.String
			var tag asn1.Tag
			if !names.ReadAnyASN1(&value, &tag) {
				return spiffeid.ID{}, nil, invalid("malformed CSR: subject alternative names")
			}
			switch tag {
			case sanURI:
				uris = append(uris, string(value))
			case sanDNS:
				dnsNames = append(dnsNames, string(value))
			default:
				return spiffeid.ID{}, nil, invalid("the CSR asks for a subject alternative name that is neither a URI nor a DNS name; leave it out")
			}
		}
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, nil, invalid("the CSR has %d URI names; it needs exactly one, the SPIFFE ID", len(uris))
	}
	id, err := spiffeid.FromString(uris[0])
	if err != nil {
		return spiffeid.ID{}, nil, invalid("the CSR's URI is not a SPIFFE ID: %v", err)
	}
	if len(dnsNames) > entry.MaxNames {
		return spiffeid.ID{}, nil, invalid("the CSR has %d DNS names; the most is %d", len(dnsNames), entry.MaxNames)
	}
	seen := make(map[string]bool, len(dnsNames))
	for _, name := range dnsNames {
		if err := entry.ValidateDNSName(name); err != nil {
			return spiffeid.ID{}, nil, invalid("the CSR has an invalid name: %v", err)
		}
		if key := strings.ToLower(name); seen[key] {
			return spiffeid.ID{}, nil, invalid("the CSR has the DNS name %q twice", name)
		} else {
			seen[key] = true
		}
	}
	return id, dnsNames, nil
}

const maxAttributes = 16 // of a subject

// attributes are those a subject may have, by object identifier, with the most
// characters of each. RFC 5280 appendix A.1.
var attributes = map[string]int{
	"2.5.4.3":  maxCommonName,
	"2.5.4.5":  64,  // serialNumber
	"2.5.4.6":  2,   // countryName
	"2.5.4.7":  128, // localityName
	"2.5.4.8":  128, // stateOrProvinceName
	"2.5.4.9":  128, // streetAddress
	"2.5.4.10": 64,  // organizationName
	"2.5.4.11": 64,  // organizationalUnitName
	"2.5.4.17": 16,  // postalCode
}

// checkedSubject returns the subject of a request, checked and encoded anew, or nil
// if it is empty. If it lacks a common name, the first DNS name is added.
func checkedSubject(csr *x509.CertificateRequest, dnsNames []string) ([]byte, error) {
	names := csr.Subject.Names
	if len(names) == 0 {
		return nil, nil
	}
	if len(names) > maxAttributes {
		return nil, invalid("the CSR's subject has %d attributes; the most is %d", len(names), maxAttributes)
	}
	hasCommonName := false
	for _, n := range names {
		oid := n.Type.String()
		most, known := attributes[oid]
		if !known {
			return nil, invalid("the CSR's subject has an attribute (%s) that is not supported", oid)
		}
		value, ok := n.Value.(string)
		switch length := utf8.RuneCountInString(value); {
		case !ok || !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl):
			return nil, invalid("the CSR's subject has an attribute (%s) that is not text", oid)
		case length == 0 || length > most:
			return nil, invalid("the CSR's subject has an attribute (%s) of %d characters; it needs one, and the most is %d", oid, length, most)
		}
		if (oid == "2.5.4.5" || oid == "2.5.4.6") && !isPrintable([]byte(value)) {
			return nil, invalid("the CSR's subject has an attribute (%s) with characters that it may not have", oid)
		}
		hasCommonName = hasCommonName || n.Type.Equal(oidCommonName)
	}
	if !hasCommonName && len(dnsNames) > 0 && len(dnsNames[0]) <= maxCommonName {
		names = append(names[:len(names):len(names)], pkix.AttributeTypeAndValue{Type: oidCommonName, Value: dnsNames[0]})
	}
	return encodeName(names...)
}
