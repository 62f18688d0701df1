// Package invite defines the invitation: the one line by which one trust domain
// tells another where its bundle is published.
//
// An [Invitation] has all that a federation relationship needs, the X.509
// authorities that verify the endpoint for the first time among it. It is no
// secret; but whoever could change it on its way could put a trust domain of
// their own in the other's place. So both sides show a [Invitation.Fingerprint]
// to be compared by people who know each other. "hallmark federation invite"
// prints one, "hallmark federation accept" takes it.
//
// The line is "hallmark-federation-v1." and then, in unpadded base64url, the
// first eight bytes of the SHA-256 over the prefix and what follows, and that, in
// JSON.
package invite

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Prefix begins every invitation of this form.
const Prefix = "hallmark-federation-v1."

// Bounds of an invitation.
const (
	MaxLength = 16 << 10 // characters
	MaxRoots  = 8        // a trust domain has two or three while it rotates
	MaxURL    = 2048     // bytes

	checksumSize = 8
)

// Invitation is what it carries. Make one by filling a value, or with [Parse].
type Invitation struct {
	TrustDomain spiffeid.TrustDomain
	EndpointURL string              // of the bundle endpoint, https
	EndpointID  spiffeid.ID         // profile https_spiffe; zero: https_web
	Roots       []*x509.Certificate // the trust domain's; of https_web there may be none
}

// wire is the JSON of an invitation.
type wire struct {
	TrustDomain string   `json:"td"`
	EndpointURL string   `json:"url"`
	EndpointID  string   `json:"id,omitempty"`
	Roots       [][]byte `json:"roots,omitempty"` // DER
}

// Encode returns the printable form. It fails if a part is missing or beyond its
// bound.
func (i Invitation) Encode() (string, error) {
	body, err := i.body()
	if err != nil {
		return "", fmt.Errorf("make an invitation: %w", err)
	}
	text := Prefix + base64.RawURLEncoding.EncodeToString(append(checksum(body), body...))
	if len(text) > MaxLength {
		return "", fmt.Errorf("make an invitation: it is %d characters long; the most is %d", len(text), MaxLength)
	}
	return text, nil
}

func (i Invitation) body() ([]byte, error) {
	if err := i.validate(); err != nil {
		return nil, err
	}
	w := wire{TrustDomain: i.TrustDomain.Name(), EndpointURL: i.EndpointURL}
	if !i.EndpointID.IsZero() {
		w.EndpointID = i.EndpointID.String()
	}
	for _, root := range i.Roots {
		w.Roots = append(w.Roots, root.Raw)
	}
	return json.Marshal(w)
}

func checksum(body []byte) []byte {
	sum := sha256.Sum256(append([]byte(Prefix), body...))
	return sum[:checksumSize]
}

// Fingerprint returns 80 bits of a hash over all that the invitation says, in
// groups of four digits, to be read out. Whoever could make another invitation
// with the same one would have to find a second preimage.
func (i Invitation) Fingerprint() string {
	body, err := i.body()
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(append([]byte("fingerprint of "+Prefix), body...))
	digits := strings.ToUpper(hex.EncodeToString(sum[:10]))
	var groups []string
	for ; len(digits) > 0; digits = digits[4:] {
		groups = append(groups, digits[:4])
	}
	return strings.Join(groups, " ")
}

var errDamaged = errors.New(`invitation is damaged, or its end is missing; copy the whole line that "hallmark federation invite" printed`)

// Parse reads the printable form. White space around it is ignored.
func Parse(s string) (*Invitation, error) {
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return nil, errors.New("invitation is empty")
	case len(s) > MaxLength:
		return nil, fmt.Errorf("invitation is %d characters long; the most is %d", len(s), MaxLength)
	case !strings.HasPrefix(s, Prefix):
		return nil, fmt.Errorf(`not an invitation: it does not begin with %q; have one made with "hallmark federation invite"`, Prefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s[len(Prefix):])
	if err != nil || len(b) < checksumSize || !bytes.Equal(b[:checksumSize], checksum(b[checksumSize:])) {
		return nil, errDamaged
	}
	i, err := parseBody(b[checksumSize:])
	if err != nil {
		return nil, fmt.Errorf("invitation: %w", err)
	}
	return i, nil
}

func parseBody(b []byte) (*Invitation, error) {
	var w wire
	if err := json.Unmarshal(b, &w); err != nil {
		return nil, err
	}
	i := &Invitation{EndpointURL: w.EndpointURL}
	var err error
	if i.TrustDomain, err = spiffeid.TrustDomainFromString(w.TrustDomain); err != nil {
		return nil, fmt.Errorf("trust domain %q: %w", w.TrustDomain, err)
	}
	if w.EndpointID != "" {
		if i.EndpointID, err = spiffeid.FromString(w.EndpointID); err != nil {
			return nil, fmt.Errorf("endpoint SPIFFE ID %q: %w", w.EndpointID, err)
		}
	}
	if len(w.Roots) > MaxRoots {
		return nil, fmt.Errorf("it has %d authorities; the most is %d", len(w.Roots), MaxRoots)
	}
	for n, der := range w.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("authority %d: %w", n+1, err)
		}
		i.Roots = append(i.Roots, root)
	}
	// One value has one form, so that its fingerprint stands for all of it.
	if again, err := i.body(); err != nil {
		return nil, err
	} else if !bytes.Equal(again, b) {
		return nil, errors.New("it is not in the form that it is made in")
	}
	return i, nil
}

func (i *Invitation) validate() error {
	if i.TrustDomain.IsZero() {
		return errors.New("missing trust domain")
	}
	if len(i.EndpointURL) > MaxURL {
		return fmt.Errorf("URL of the bundle endpoint is %d bytes long; the most is %d", len(i.EndpointURL), MaxURL)
	}
	// SPIFFE Federation §5.2.1.1, §5.2.2.1.
	switch u, err := url.Parse(i.EndpointURL); {
	case err != nil, u.Scheme != "https", u.Hostname() == "", u.User != nil:
		return fmt.Errorf("URL of the bundle endpoint is %q; write https://HOST:PORT/", i.EndpointURL)
	}
	switch n := len(i.Roots); {
	case n > MaxRoots:
		return fmt.Errorf("it has %d authorities; the most is %d", n, MaxRoots)
	case i.EndpointID.IsZero():
	case i.EndpointID.TrustDomain() != i.TrustDomain:
		return fmt.Errorf("endpoint SPIFFE ID %q is not of trust domain %q", i.EndpointID, i.TrustDomain.Name())
	case n == 0:
		return errors.New("it has no authorities to verify the endpoint by")
	}
	return nil
}
