package x509pop

import (
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"strings"

	"github.com/hallmark-id/hallmark/attestors/agentpath"
)

// The templates of agents' paths when none is configured.
const (
	defaultTemplate     = "{{ .PluginName }}/{{ .Fingerprint }}"
	defaultSVIDTemplate = "{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
)

// pathData is what a template is executed with.
type pathData struct {
	*x509.Certificate // all its fields, for example .Subject.CommonName or .DNSNames

	PluginName      string // x509pop
	TrustDomain     string // of the server
	Fingerprint     string // SHA-1 of the certificate, hexadecimal
	SerialNumberHex string
	SVIDPathTrimmed agentpath.Valid   // empty in mode external_pki
	URISanSelectors map[string]string // as in the selectors san:<key>:<value>; of two with one key the last
}

// sample is a certificate that has one of everything.
func sample() pathData {
	const word = "sample"
	words := []string{word}
	name := pkix.Name{
		Country: words, Organization: words, OrganizationalUnit: words, Locality: words, Province: words,
		StreetAddress: words, PostalCode: words, SerialNumber: word, CommonName: word,
	}
	return pathData{
		Certificate: &x509.Certificate{
			SerialNumber: big.NewInt(1), Issuer: name, Subject: name,
			DNSNames: words, EmailAddresses: words, IPAddresses: []net.IP{net.IPv4zero}, URIs: []*url.URL{{Scheme: word, Host: word}},
			SubjectKeyId: []byte(word), AuthorityKeyId: []byte(word),
		},
		PluginName: Name, TrustDomain: word, Fingerprint: strings.Repeat("0a", sha1.Size), SerialNumberHex: "0a", SVIDPathTrimmed: word,
		URISanSelectors: map[string]string{word: word},
	}
}
